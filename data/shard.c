/* Reading logit shards. A shard file is untrusted until it proves otherwise: its size must be the journal's, its datasets must have exactly
 * the names, types, shapes and contiguous layout that the manifest implies and lie within the file, and from then on rows are
 * read with pread at fixed offsets, without a lock. Every row's CRC-32C and ranges are checked each time it is read.
 *
 * The structure is read here and not by libhdf5: of a file whose author is hostile, one changed byte with the checksum made right ends
 * the process inside libhdf5 1.10. A shard needs a corner of the HDF5 format ("HDF5 File Format Specification Version 3.0",
 * sections II.B, IV.A), and every value in it is either compared with what the manifest says or is an offset, which the rows' CRCs then
 * prove; so HDF5's own checksums of its metadata are not looked at. Format and checks: FORMAT.md. */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/failpoint.h"
#include "base/file.h"
#include "base/half.h"
#include "data/shard_internal.h"

/* ---- structure of one file: superblock -> root object -> attributes, links -> objects of the datasets ---- */

enum { MSG_DATASPACE = 1, MSG_DATATYPE = 3, MSG_EXTERNAL = 7, MSG_LINK = 6, MSG_LAYOUT = 8, MSG_FILTERS = 11, MSG_ATTRIBUTE = 12, MSG_CONTINUATION = 16 };
enum { OBJECT_BYTES = 1 << 14, OBJECT_MESSAGES = 64, OBJECT_CHUNKS = 16 };
struct message { int type; bool shared; const uint8_t *data; size_t bytes; };
struct object {                              /* an object header: its messages in order */
    uint8_t buffer[OBJECT_BYTES];
    size_t used;
    struct message messages[OBJECT_MESSAGES];
    int n;
};

static uint64_t number_at(const uint8_t *p, size_t bytes)
{
    uint64_t value = 0;
    memcpy(&value, p, bytes);
    return value;
}

/* `bytes` at `at` of the file into the object's buffer; NULL when the file or the buffer ends before. *rc: an error of reading. */
static const uint8_t *object_fetch(const struct shard_file *f, struct object *o, uint64_t at, uint64_t bytes, int *rc)
{
    if (bytes > OBJECT_BYTES - o->used || at > (uint64_t)f->bytes || bytes > (uint64_t)f->bytes - at) return NULL;
    uint8_t *p = o->buffer + o->used;
    *rc = file_pread(f->fd, p, bytes, (int64_t)at, f->path);
    o->used += bytes;
    return *rc == OK ? p : NULL;
}

/* The messages of the object header (version 2) at `at`, its continuations too. False: it is not one, or larger than a shard's can be. */
static bool object_read(const struct shard_file *f, uint64_t at, struct object *o, int *rc)
{
    struct { uint64_t at, bytes; } chunks[OBJECT_CHUNKS];
    int n_chunks = 1;
    o->used = 0;
    o->n = 0;
    const uint8_t *p = object_fetch(f, o, at, 6, rc);
    if (!p || memcmp(p, "OHDR\2", 5)) return false;
    int flags = p[5];
    size_t skip = (flags & 0x20 ? 16 : 0) + (flags & 0x10 ? 4 : 0), width = (size_t)1 << (flags & 3), head = flags & 4 ? 6 : 4;   /* times, attribute limits; creation order */
    if (!(p = object_fetch(f, o, at + 6 + skip, width, rc))) return false;
    chunks[0].at = at + 6 + skip + width;
    chunks[0].bytes = number_at(p, width);
    for (int c = 0; c < n_chunks; c++) {
        if (!(p = object_fetch(f, o, chunks[c].at, chunks[c].bytes, rc))) return false;
        const uint8_t *end = p + chunks[c].bytes;
        if (c) {                             /* a continuation: signature and checksum around the messages */
            if (chunks[c].bytes < 8 || memcmp(p, "OCHK", 4)) return false;
            p += 4;
            end -= 4;
        }
        while ((size_t)(end - p) >= head) {  /* fewer bytes than a message's head are a gap */
            struct message m = {p[0], p[3] & 2, p + head, number_at(p + 1, 2)};
            if (m.bytes > (size_t)(end - m.data)) return false;
            p = m.data + m.bytes;
            if (m.type == MSG_CONTINUATION) {
                if (n_chunks == OBJECT_CHUNKS || m.bytes < 16) return false;
                chunks[n_chunks].at = number_at(m.data, 8);
                chunks[n_chunks++].bytes = number_at(m.data + 8, 8);
            } else {
                if (o->n == OBJECT_MESSAGES) return false;
                o->messages[o->n++] = m;
            }
        }
    }
    return true;
}

/* The one message of a type; NULL when there is none, or two, or it is kept elsewhere. */
static const struct message *object_message(const struct object *o, int type, size_t least)
{
    const struct message *found = NULL;
    for (int i = 0; i < o->n; i++) {
        if (o->messages[i].type != type) continue;
        if (found || o->messages[i].shared || o->messages[i].bytes < least) return NULL;
        found = &o->messages[i];
    }
    return found;
}

static bool object_has(const struct object *o, int type)
{
    for (int i = 0; i < o->n; i++)
        if (o->messages[i].type == type) return true;
    return false;
}

/* Value of a scalar attribute of the root group (version 3 of the message) whose type begins with these `type_bytes`, in `bytes` bytes; NULL: no such. */
static const uint8_t *attribute_find(const struct object *o, const char *name, const uint8_t *type, size_t type_bytes, size_t bytes)
{
    size_t name_bytes = strlen(name) + 1;
    for (int i = 0; i < o->n; i++) {
        const struct message *m = &o->messages[i];
        if (m->type != MSG_ATTRIBUTE || m->shared || m->bytes < 9 || m->data[0] != 3 || m->data[1]) continue;
        size_t n = number_at(m->data + 2, 2), t = number_at(m->data + 4, 2), space = number_at(m->data + 6, 2);
        const uint8_t *p = m->data + 9;
        if (n != name_bytes || m->bytes != 9 + n + t + space + bytes || memcmp(p, name, n)) continue;
        if (t < 8 || t < type_bytes || (p[n] & 15) != (type[0] & 15) || memcmp(p + n + 1, type + 1, type_bytes - 1) || number_at(p + n + 4, 4) != bytes) return NULL;
        if (space < 4 || p[n + t] != 2 || p[n + t + 1] != 0) return NULL;   /* dataspace version 2 of rank 0 */
        return p + n + t + space;
    }
    return NULL;
}

/* Type messages as they are in a file, after the version in the upper half of the first byte: class, bits, size, properties. */
static const uint8_t type_int[] = {0, 8, 0, 0}, type_text[] = {3};
static const struct { uint8_t bytes[20]; size_t n; } types[] = {
    [SHARD_U8]  = {{0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 8, 0}, 12},
    [SHARD_U16] = {{0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 16, 0}, 12},
    [SHARD_U32] = {{0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 32, 0}, 12},
    [SHARD_F16] = {{1, 0x20, 15, 0, 2, 0, 0, 0, 0, 0, 16, 0, 10, 5, 0, 10, 15, 0, 0, 0}, 20},
    [SHARD_F32] = {{1, 0x20, 31, 0, 4, 0, 0, 0, 0, 0, 32, 0, 23, 8, 0, 23, 127, 0, 0, 0}, 20},
};

static int64_t int_attribute(const struct object *o, const char *name)
{
    const uint8_t *p = attribute_find(o, name, type_int, sizeof type_int, 8);
    return p ? (int64_t)number_at(p, 8) : -1;
}

static int identity_check(const struct object *root, const char *path, const char *id, int64_t shard)
{
    const uint8_t *format = attribute_find(root, "format", type_text, 1, sizeof SHARD_FORMAT - 1), *dataset = attribute_find(root, "dataset", type_text, 1, SHA256_HEX - 1);
    if (!format || memcmp(format, SHARD_FORMAT, sizeof SHARD_FORMAT - 1) || int_attribute(root, "version") != SHARD_VERSION)
        return fail(ERR_INPUT, "%s: does not say that it is a logit shard of version %d; " SHARD_REMEDY, path, SHARD_VERSION);
    if (!dataset) return fail(ERR_INPUT, "%s: does not say which dataset it belongs to; " SHARD_REMEDY, path);
    if (memcmp(dataset, id, SHA256_HEX - 1)) return fail(ERR_MISMATCH, "%s: is a shard of another dataset than %.16s...: two runs were mixed; " SHARD_REMEDY, path, id);
    int64_t is = int_attribute(root, "shard");
    if (is != shard) return fail(ERR_INPUT, "%s: says that it is shard %lld; its name says %lld; " SHARD_REMEDY, path, (long long)is, (long long)shard);
    return OK;
}

/* The address a hard link of this name (version 1 of the message) leads to; 0 when there is none. *links counts all of them. */
static uint64_t link_find(const struct object *o, const char *name, int *links)
{
    uint64_t address = 0;
    *links = 0;
    for (int i = 0; i < o->n; i++) {
        const struct message *m = &o->messages[i];
        if (m->type != MSG_LINK) continue;
        ++*links;
        if (m->shared || m->bytes < 2 || m->data[0] != 1) continue;
        int flags = m->data[1];
        size_t width = (size_t)1 << (flags & 3), at = 2 + (flags & 8 ? 1 : 0) + (flags & 4 ? 8 : 0) + (flags & 16 ? 1 : 0);
        if ((flags & 8 && m->data[2] != 0) || m->bytes < at + width) continue;   /* a type other than hard */
        uint64_t n = number_at(m->data + at, width);
        at += width;
        if (n != strlen(name) || m->bytes - at != n + 8 || memcmp(m->data + at, name, n)) continue;
        address = number_at(m->data + at + n, 8);
    }
    return address;
}

/* The first ragged field says how many entries there are, within what the rows can have; the others must agree. */
static int entries_check(struct shard_file *f, const struct shard_manifest *m, const struct shard_layout *l, uint64_t elements)
{
    uint64_t most = (uint64_t)(shard_rows(m, f->shard) * ragged_row_most(m));
    if (!f->entries) {
        if (elements < RAGGED_STEP || elements % RAGGED_STEP || elements > most || l->ragged != 1)
            return fail(ERR_INPUT, "%s: dataset %s has %llu entries, not a multiple of %d up to %llu; " SHARD_REMEDY, f->path, l->name, (unsigned long long)elements, RAGGED_STEP, (unsigned long long)most);
        f->entries = (int64_t)elements;
    }
    if (elements != (uint64_t)(f->entries / l->ragged))
        return fail(ERR_INPUT, "%s: dataset %s has %llu elements for %lld entries; " SHARD_REMEDY, f->path, l->name, (unsigned long long)elements, (long long)f->entries);
    return OK;
}

static int field_check(struct shard_file *f, const struct shard_manifest *m, const struct object *o, const struct shard_layout *l, int64_t *offset)
{
    int rc = OK;
    int64_t rows = shard_rows(m, f->shard);
    const char *path = f->path;
    const struct message *space = object_message(o, MSG_DATASPACE, 4), *type = object_message(o, MSG_DATATYPE, types[l->type].n), *layout = object_message(o, MSG_LAYOUT, 2);
    if (!type || (type->data[0] & 15) != types[l->type].bytes[0] || memcmp(type->data + 1, types[l->type].bytes + 1, types[l->type].n - 1))
        return fail(ERR_INPUT, "%s: dataset %s has another type than the format gives it; " SHARD_REMEDY, path, l->name);
    if (!space || space->data[0] != 2 || space->data[1] != l->rank || space->data[3] != 1 || space->bytes < 4 + 8 * (size_t)l->rank)
        return fail(ERR_INPUT, "%s: dataset %s does not have %d dimensions; " SHARD_REMEDY, path, l->name, l->rank);
    for (int i = 0; i < l->rank; i++) {
        uint64_t is = number_at(space->data + 4 + 8 * i, 8), want = (uint64_t)(i ? l->dims[i - 1] : rows);
        if (l->ragged) TRY(entries_check(f, m, l, is));
        else if (is != want) return fail(ERR_INPUT, "%s: dimension %d of dataset %s is %llu, the manifest says %llu; " SHARD_REMEDY, path, i, l->name, (unsigned long long)is, (unsigned long long)want);
    }
    if (!layout || (layout->data[0] != 3 && layout->data[0] != 4) || layout->data[1] != 1 || layout->bytes < 18 || object_has(o, MSG_EXTERNAL) || object_has(o, MSG_FILTERS))
        return fail(ERR_INPUT, "%s: dataset %s is not stored in one piece in this file; " SHARD_REMEDY, path, l->name);
    uint64_t at = number_at(layout->data + 2, 8), size = number_at(layout->data + 10, 8), need = (uint64_t)(l->ragged ? f->entries / l->ragged * shard_type_bytes(l->type) : rows * l->row_bytes);
    if (size != need || at > (uint64_t)f->bytes || need > (uint64_t)f->bytes - at) return fail(ERR_INPUT, "%s: dataset %s does not lie within the file; " SHARD_REMEDY, path, l->name);
    *offset = (int64_t)at;
out:
    return rc;
}

static int structure_check(struct shard_file *f, const struct shard_manifest *m, const char *id)
{
    static const uint8_t signature[] = {0x89, 'H', 'D', 'F', '\r', '\n', 0x1a, '\n'};
    int rc = OK, fields = 0, links = 0;
    struct shard_layout layout[SHARD_FIELDS];
    struct object *root = xmalloc(sizeof *root), *field = xmalloc(sizeof *field);
    uint8_t super[48];
    shard_layout(m, layout);
    if (f->bytes >= (int64_t)sizeof super) TRY(file_pread(f->fd, super, sizeof super, 0, f->path));
    /* superblock version 2 or 3: 8-byte addresses and lengths, not left open by a writer, address 0 first, no extension, end of file, root, checksum */
    if (f->bytes < (int64_t)sizeof super || memcmp(super, signature, 8) || (super[8] != 2 && super[8] != 3) || super[9] != 8 || super[10] != 8 || super[11] ||
        number_at(super + 12, 8) != 0 || number_at(super + 20, 8) != UINT64_MAX || number_at(super + 28, 8) != (uint64_t)f->bytes || !object_read(f, number_at(super + 36, 8), root, &rc)) {
        if (rc == OK) rc = fail(ERR_INPUT, "%s: is not an HDF5 file of the kind shards are, or is damaged; " SHARD_REMEDY, f->path);
        goto out;
    }
    TRY(identity_check(root, f->path, id, f->shard));
    for (int i = 0; i < SHARD_FIELDS; i++) {
        if (!layout[i].name) continue;
        uint64_t at = link_find(root, layout[i].name, &links);
        if (!at || !object_read(f, at, field, &rc)) {
            if (rc == OK) rc = fail(ERR_INPUT, "%s: dataset %s is missing or damaged; " SHARD_REMEDY, f->path, layout[i].name);
            goto out;
        }
        TRY(field_check(f, m, field, &layout[i], &f->offset[i]));
        fields++;
    }
    if (links != fields) rc = fail(ERR_INPUT, "%s: has datasets that the format does not name; " SHARD_REMEDY, f->path);
out:
    free(root);
    free(field);
    return rc;
}

char *shard_path(const char *dir, int64_t shard) { return xasprintf("%s/shards/shard-%06lld.h5", dir, (long long)shard); }

int64_t shard_name_parse(const char *name)
{
    long long shard;
    char again[64];
    if (sscanf(name, "shard-%18lld.h5", &shard) != 1 || shard < 0) return -1;
    snprintf(again, sizeof again, "shard-%06lld.h5", shard);
    return strcmp(name, again) ? -1 : shard;
}

static int plain_open(int *fd, int64_t *size, const char *path, int64_t bytes)
{
    int rc = OK;
    struct stat st;
    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (*fd < 0) return errno == ENOENT ? fail(ERR_INPUT, "%s: the journal lists this shard, but the file is missing; " SHARD_REMEDY, path) : fail_errno(ERR_IO, "%s: cannot open", path);
    if (fstat(*fd, &st)) rc = fail_errno(ERR_IO, "%s: cannot stat", path);
    else if (!S_ISREG(st.st_mode)) rc = fail(ERR_INPUT, "%s: is not a regular file; " SHARD_REMEDY, path);
    else if (bytes >= 0 && st.st_size != bytes) rc = fail(ERR_INPUT, "%s: is %lld bytes, the journal says %lld; " SHARD_REMEDY, path, (long long)st.st_size, (long long)bytes);
    else *size = st.st_size;
    if (rc != OK) { close(*fd); *fd = -1; }
    return rc;
}

int shard_file_open(struct shard_file *f, const char *path, const struct shard_manifest *m, const char *id, int64_t shard, int64_t bytes)
{
    int rc = OK;
    *f = (struct shard_file){.path = xstrdup(path), .fd = -1, .shard = shard};
    TRY(plain_open(&f->fd, &f->bytes, path, bytes));
    TRY(structure_check(f, m, id));
out:
    if (rc != OK) shard_file_close(f);
    return rc;
}

void shard_file_close(struct shard_file *f)
{
    free(f->path);
    if (f->fd >= 0) close(f->fd);
    *f = (struct shard_file){.fd = -1};
}

/* ---- rows ---- */

/* Where in row->packed the fields lie that are not read in place, each with the room of the largest row; returns the bytes of all. */
static int64_t packed_places(const struct shard_manifest *m, const struct shard_layout *layout, int64_t at[SHARD_FIELDS])
{
    int64_t bytes = 0;
    for (int f = 0; f < SHARD_FIELDS; f++) {
        at[f] = -1;
        bool apart = f == SHARD_IDS_LOW || f == SHARD_IDS_HIGH || f == SHARD_DRAW_OFFSET || f == SHARD_DRAW_LOW || f == SHARD_DRAW_HIGH || layout[f].ragged;
        if (!layout[f].name || !apart) continue;
        at[f] = bytes;
        bytes += layout[f].ragged ? ragged_row_most(m) / layout[f].ragged * shard_type_bytes(layout[f].type) : layout[f].row_bytes;
        bytes = (bytes + 7) & ~(int64_t)7;
    }
    return bytes;
}

void shard_row_alloc(struct shard_row *row, const struct shard_manifest *m)
{
    size_t L = (size_t)m->row_length, nT = (size_t)m->n_temperatures, K = (size_t)m->k, D = (size_t)m->draws;
    *row = (struct shard_row){.tokens = xcalloc(L, 4), .loss_mask = xcalloc(L, 1), .document = xcalloc(L, 2),
                              .lse = xcalloc(L * nT, 4), .entropy = xcalloc(L, 2), .label_logprob = xcalloc(L, 2)};
    if (shard_kind_has_head(m->kind)) {
        row->tail = xcalloc(L * nT, 4);
        row->head_ids = xcalloc(L * K, 4);
        row->head_logprob = xcalloc(L * K, 2);
    }
    if (shard_kind_draws(m->kind)) {
        row->draw_ids = xcalloc(L * D, 4);
        row->draw_count = xcalloc(L * D, 1);
    }
    if (m->kind == SHARD_HYBRID) row->draw_logprob = xcalloc(L * D, 2);
    if (m->kind == SHARD_FULL) row->logits = xcalloc(L * (size_t)m->valid_vocab, 2);
    else {
        struct shard_layout layout[SHARD_FIELDS];
        int64_t at[SHARD_FIELDS];
        shard_layout(m, layout);
        row->packed = xcalloc(1, (size_t)packed_places(m, layout, at));
    }
}

void shard_row_free(struct shard_row *row)
{
    free(row->tokens); free(row->loss_mask); free(row->document); free(row->lse); free(row->tail); free(row->entropy);
    free(row->label_logprob); free(row->head_ids); free(row->head_logprob); free(row->logits);
    free(row->draw_ids); free(row->draw_count); free(row->draw_logprob); free(row->packed);
    *row = (struct shard_row){0};
}

uint32_t shard_row_crc_start(int64_t row) { return crc32c(0, &row, sizeof row); }

/* Ids are split so that 18 bits cost 2.25 bytes: low 16 bits, and the two high bits of four ids in a byte, the first lowest. */
static int ids_unpack(uint32_t *ids, const uint16_t *low, const uint8_t *high, int64_t positions, int64_t K, const char *name)
{
    int64_t H = ids_high_bytes(K);
    uint8_t unused = K % 4 ? (uint8_t)(0xff << 2 * (K % 4)) : 0;
    for (int64_t t = 0; t < positions; t++, ids += K, low += K, high += H) {
        int64_t i = 0;
        for (; i + 4 <= K; i += 4) {
            uint32_t h = high[i >> 2];
            ids[i]     = low[i]     | (h & 0x03) << 16;
            ids[i + 1] = low[i + 1] | (h & 0x0c) << 14;
            ids[i + 2] = low[i + 2] | (h & 0x30) << 12;
            ids[i + 3] = low[i + 3] | (h & 0xc0) << 10;
        }
        for (; i < K; i++) ids[i] = low[i] | (uint32_t)(high[i >> 2] >> 2 * (i & 3) & 3) << 16;
        if (high[H - 1] & unused) return fail(ERR_INPUT, "position %lld: the unused bits of %s are not 0", (long long)t, name);
    }
    return OK;
}

/* The entries of a row of kind sampled: [*begin, *begin + *n) of the shard's, padding included. False: its offsets cannot be. */
static bool ragged_range(const struct shard_file *f, const struct shard_manifest *m, const uint32_t *offset, int64_t *begin, int64_t *n)
{
    *begin = offset[0];
    *n = 0;
    if (*begin % RAGGED_STEP || *begin > f->entries) return false;
    for (int64_t t = 0; t < m->row_length; t++)
        if (offset[t + 1] < offset[t] || offset[t + 1] - offset[t] > (uint32_t)m->draws) return false;
    int64_t length = ragged_round((int64_t)offset[m->row_length] - *begin);
    if (length > f->entries - *begin) return false;
    *n = length;
    return true;
}

/* The entries into m->draws slots per position. */
static int draws_unpack(const struct shard_file *f, const struct shard_manifest *m, const int64_t at[SHARD_FIELDS], struct shard_row *r)
{
    const uint32_t *offset = (const uint32_t *)(r->packed + at[SHARD_DRAW_OFFSET]);
    const uint16_t *low = (const uint16_t *)(r->packed + at[SHARD_DRAW_LOW]);
    const uint8_t *high = r->packed + at[SHARD_DRAW_HIGH], *count = r->packed + at[SHARD_DRAW_COUNT];
    int64_t begin, n, L = m->row_length, D = m->draws, i = 0;
    if (!ragged_range(f, m, offset, &begin, &n)) return fail(ERR_INPUT, "the offsets of its draws do not ascend by at most %lld within the %lld entries of the shard", (long long)D, (long long)f->entries);
    memset(r->draw_ids, 0, (size_t)(L * D) * sizeof *r->draw_ids);
    memset(r->draw_count, 0, (size_t)(L * D));
    for (int64_t t = 0; t < L; t++)
        for (int64_t slot = 0; i < offset[t + 1] - begin; i++, slot++) {
            if (!count[i]) return fail(ERR_INPUT, "position %lld: an entry with count 0", (long long)t);
            r->draw_ids[t * D + slot] = low[i] | (uint32_t)(high[i >> 2] >> 2 * (i & 3) & 3) << 16;
            r->draw_count[t * D + slot] = count[i];
        }
    for (; i < n; i++)
        if (low[i] || count[i] || high[i >> 2] >> 2 * (i & 3) & 3) return fail(ERR_INPUT, "the entries behind its last position are not 0");
    return OK;
}

static int row_pread(const struct shard_file *f, const struct shard_manifest *m, const struct shard_layout *layout, const int64_t at[SHARD_FIELDS], int64_t row, struct shard_row *out,
                     uint32_t *crc, uint32_t *stored)
{
    int rc = OK;
    int64_t begin = 0, entries = 0;
    void *data[SHARD_FIELDS] = {
        [SHARD_TOKENS] = out->tokens, [SHARD_LOSS_MASK] = out->loss_mask, [SHARD_DOCUMENT] = out->document, [SHARD_LSE] = out->lse, [SHARD_TAIL] = out->tail,
        [SHARD_ENTROPY] = out->entropy, [SHARD_LABEL_LOGPROB] = out->label_logprob,
        [SHARD_HEAD_LOGPROB] = out->head_logprob, [SHARD_DRAW_COUNT] = out->draw_count, [SHARD_DRAW_LOGPROB] = out->draw_logprob, [SHARD_LOGITS] = out->logits, [SHARD_ROW_CRC] = stored,
    };
    *crc = shard_row_crc_start(shard_first_row(m, f->shard) + row);
    for (int i = 0; i < SHARD_FIELDS; i++) {
        if (!layout[i].name) continue;
        if (at[i] >= 0) data[i] = out->packed + at[i];
        /* offsets that cannot be lead nowhere: the CRC tells whether they were read wrongly, draws_unpack what is wrong with them */
        if (i == SHARD_DRAW_LOW && layout[i].ragged) ragged_range(f, m, (const uint32_t *)data[SHARD_DRAW_OFFSET], &begin, &entries);
        int64_t width = shard_type_bytes(layout[i].type), step = layout[i].ragged;
        int64_t bytes = step ? entries / step * width : layout[i].row_bytes, from = step ? begin / step * width : row * layout[i].row_bytes;
        TRY(file_pread(f->fd, data[i], (size_t)bytes, f->offset[i] + from, f->path));
        if (i == SHARD_TOKENS && FAILPOINT_FIRES("shard.read_flip")) out->tokens[0] ^= 1u;
        if (i == SHARD_TOKENS && FAILPOINT_FIRES("shard.read_flip_more")) out->tokens[0] ^= 2u;
        if (i != SHARD_ROW_CRC) *crc = crc32c(*crc, data[i], (size_t)bytes);
    }
out:
    return rc;
}

int shard_file_read(const struct shard_file *f, const struct shard_manifest *m, int64_t row, bool deep, struct shard_row *out)
{
    int rc = OK;
    struct shard_layout layout[SHARD_FIELDS];
    int64_t at[SHARD_FIELDS], L = m->row_length;
    uint32_t crc, stored, first_crc, first_stored;
    shard_layout(m, layout);
    packed_places(m, layout, at);
    CHECK(m->kind == SHARD_FULL || out->packed, "rows are read into arrays of shard_row_alloc");
    TRY(row_pread(f, m, layout, at, row, out, &crc, &stored));
    if (crc != stored) {                          /* a bad disk read twice may say two things: that is not a broken file */
        first_crc = crc;
        first_stored = stored;
        TRY(row_pread(f, m, layout, at, row, out, &crc, &stored));
        if (crc == stored) warn("%s: row %lld was read wrongly and then rightly: the disk or the memory of this machine is failing", f->path, (long long)row);
        else if (crc == first_crc && stored == first_stored) { rc = fail(ERR_INPUT, "its CRC does not match: the file is damaged; " SHARD_REMEDY); goto out; }
        else { rc = fail(ERR_IO, "reads differ each time: the disk or the memory of this machine is failing; move the dataset to another disk"); goto out; }
    }
    const uint8_t *packed = out->packed;
    if (shard_kind_has_head(m->kind)) TRY(ids_unpack(out->head_ids, (const uint16_t *)(packed + at[SHARD_IDS_LOW]), packed + at[SHARD_IDS_HIGH], L, m->k, layout[SHARD_IDS_HIGH].name));
    if (m->kind == SHARD_HYBRID) TRY(ids_unpack(out->draw_ids, (const uint16_t *)(packed + at[SHARD_DRAW_LOW]), packed + at[SHARD_DRAW_HIGH], L, m->draws, layout[SHARD_DRAW_HIGH].name));
    if (m->kind == SHARD_SAMPLED) TRY(draws_unpack(f, m, at, out));
    TRY(shard_row_check(m, out, deep, ERR_INPUT));
out:
    if (rc != OK) fail_in(rc, "%s: row %lld of the shard, %lld of the dataset", f->path, (long long)row, (long long)(shard_first_row(m, f->shard) + row));
    return rc;
}

int shard_file_check_rows(const struct shard_file *f, const struct shard_manifest *m, int64_t *targets)
{
    int rc = OK;
    struct shard_row row;
    struct shard_layout layout[SHARD_FIELDS];
    int64_t at[SHARD_FIELDS], next = 0, begin, n;                    /* next: where the rows of a ragged shard have come to */
    shard_row_alloc(&row, m);
    shard_layout(m, layout);
    packed_places(m, layout, at);
    *targets = 0;
    for (int64_t i = 0; i < shard_rows(m, f->shard); i++) {
        TRY(shard_file_read(f, m, i, true, &row));
        for (int64_t t = 0; t < m->row_length; t++) *targets += row.loss_mask[t];
        if (m->kind != SHARD_SAMPLED) continue;
        ragged_range(f, m, (const uint32_t *)(row.packed + at[SHARD_DRAW_OFFSET]), &begin, &n);
        if (begin != next) { rc = fail(ERR_INPUT, "%s: row %lld of the shard: its draws begin at entry %lld, the row before ends at %lld; " SHARD_REMEDY, f->path, (long long)i, (long long)begin, (long long)next); goto out; }
        next += n;
    }
    if (m->kind == SHARD_SAMPLED && f->entries != (next ? next : RAGGED_STEP))
        rc = fail(ERR_INPUT, "%s: has %lld entries of draws, its rows use %lld; " SHARD_REMEDY, f->path, (long long)f->entries, (long long)next);
out:
    shard_row_free(&row);
    return rc;
}

/* ---- the dataset ---- */

enum { MAX_OPEN = 64 };
struct slot {                                     /* one shard that was touched */
    struct shard_file file;
    enum { SLOT_NEW, SLOT_BUSY, SLOT_READY } state;
    int users;
    int64_t used;                                 /* for closing the least recently used one */
};

struct shard_dataset {
    char *dir, id[SHA256_HEX];
    struct shard_manifest manifest;
    pthread_mutex_t lock;                         /* over everything below; never held while data is read */
    pthread_cond_t ready;
    struct journal journal;
    struct slot **slots;                          /* [shard_count], made on first touch */
    int64_t open[MAX_OPEN], clock, checked;
    int n_open;
    bool verify_on_touch, *left_out;              /* [shard_count]; NULL: none is */
};

int shard_dataset_open(struct shard_dataset **out, const char *dir)
{
    int rc = OK;
    struct shard_dataset *d = xcalloc(1, sizeof *d);
    pthread_mutex_init(&d->lock, NULL);
    pthread_cond_init(&d->ready, NULL);
    d->dir = xstrdup(dir);
    TRY(manifest_read(dir, &d->manifest, d->id));
    journal_init(&d->journal, dir, &d->manifest, d->id);
    TRY(journal_refresh(&d->journal, &d->manifest));
    d->slots = xcalloc((size_t)shard_count(&d->manifest), sizeof *d->slots);
    *out = d;
    d = NULL;
out:
    shard_dataset_close(d);
    return rc;
}

void shard_dataset_close(struct shard_dataset *d)
{
    if (!d) return;
    for (int64_t i = 0; d->slots && i < shard_count(&d->manifest); i++) {
        if (d->slots[i] && d->slots[i]->state == SLOT_READY) shard_file_close(&d->slots[i]->file);
        free(d->slots[i]);
    }
    free(d->slots);
    free(d->left_out);
    journal_free(&d->journal);
    pthread_cond_destroy(&d->ready);
    pthread_mutex_destroy(&d->lock);
    free(d->dir);
    free(d);
}

const struct shard_manifest *shard_dataset_manifest(const struct shard_dataset *d) { return &d->manifest; }
const char *shard_dataset_id(const struct shard_dataset *d) { return d->id; }
char *shard_dataset_path(const struct shard_dataset *d, int64_t shard) { return shard_path(d->dir, shard); }

int shard_dataset_refresh(struct shard_dataset *d, int64_t *sealed)
{
    pthread_mutex_lock(&d->lock);
    int rc = journal_refresh(&d->journal, &d->manifest);
    *sealed = d->journal.n;
    pthread_mutex_unlock(&d->lock);
    return rc;
}

bool shard_dataset_has(const struct shard_dataset *d, int64_t shard)
{
    struct shard_dataset *mutable = (struct shard_dataset *)d;
    pthread_mutex_lock(&mutable->lock);
    bool has = shard >= 0 && shard < shard_count(&d->manifest) && journal_find(&d->journal, shard);
    pthread_mutex_unlock(&mutable->lock);
    return has;
}

int64_t shard_dataset_entries(const struct shard_dataset *d, const struct shard_entry **entries)
{
    *entries = d->journal.entries;
    return d->journal.n;
}

void shard_dataset_missing(struct shard_dataset *d, int64_t **shards, int64_t *n)
{
    int64_t count = shard_count(&d->manifest);
    *shards = xmalloc((size_t)count * sizeof **shards);
    *n = 0;
    for (int64_t shard = 0; shard < count; shard++) {
        char *path = shard_path(d->dir, shard);
        if (!shard_dataset_has(d, shard) || (access(path, F_OK) && errno == ENOENT)) (*shards)[(*n)++] = shard;
        free(path);
    }
}

void shard_dataset_leave_out(struct shard_dataset *d, const int64_t *shards, int64_t n)
{
    free(d->left_out);
    d->left_out = n ? xcalloc((size_t)shard_count(&d->manifest), sizeof *d->left_out) : NULL;
    for (int64_t i = 0; i < n; i++) d->left_out[shards[i]] = true;
    d->checked = 0;                               /* those that were passed over and no longer are */
}

bool shard_dataset_left_out(const struct shard_dataset *d, int64_t shard) { return d->left_out && d->left_out[shard]; }

void shard_dataset_verify_on_touch(struct shard_dataset *d, bool on) { d->verify_on_touch = on; }

int shard_dataset_check_files(struct shard_dataset *d)
{
    int rc = OK;
    char *path = NULL;
    pthread_mutex_lock(&d->lock);
    for (; d->checked < d->journal.n; d->checked++) {
        const struct shard_entry *e = &d->journal.entries[d->checked];
        int fd;
        int64_t size;
        if (shard_dataset_left_out(d, e->shard)) continue;
        free(path);
        path = shard_path(d->dir, e->shard);
        if ((rc = plain_open(&fd, &size, path, e->bytes)) != OK) break;
        close(fd);
    }
    pthread_mutex_unlock(&d->lock);
    free(path);
    return rc;
}

static int hash_check(const char *path, const char *sha256)
{
    char hex[SHA256_HEX];
    int rc = sha256_of_file(path, hex);
    if (rc == OK && strcmp(hex, sha256)) rc = fail(ERR_INPUT, "%s: its SHA-256 is %.16s..., the journal says %.16s...: the file is damaged; " SHARD_REMEDY, path, hex, sha256);
    return rc;
}

/* Under the lock: keeps at most MAX_OPEN files open, as far as their readers allow. */
static void open_files_trim(struct shard_dataset *d)
{
    int oldest = -1;
    for (int i = 0; i < d->n_open; i++) {
        const struct slot *s = d->slots[d->open[i]];
        if (!s->users && (oldest < 0 || s->used < d->slots[d->open[oldest]]->used)) oldest = i;
    }
    if (d->n_open < MAX_OPEN || oldest < 0) return;
    struct slot *s = d->slots[d->open[oldest]];
    close(s->file.fd);
    s->file.fd = -1;
    d->open[oldest] = d->open[--d->n_open];
}

static int slot_acquire(struct shard_dataset *d, int64_t shard, struct slot **out)
{
    int rc = OK;
    char *path = NULL;
    pthread_mutex_lock(&d->lock);
    const struct shard_entry *found = journal_find(&d->journal, shard);
    if (!found) { rc = fail(ERR_INPUT, "%s: shard %lld is not sealed yet; let teacher-dump finish", d->dir, (long long)shard); goto out; }
    struct shard_entry entry = *found;
    struct slot *s = d->slots[shard];
    if (!s) {
        s = d->slots[shard] = xcalloc(1, sizeof *s);
        s->file.fd = -1;
    }
    while (s->state == SLOT_BUSY) pthread_cond_wait(&d->ready, &d->lock);
    if (s->state == SLOT_NEW) {
        s->state = SLOT_BUSY;
        pthread_mutex_unlock(&d->lock);
        path = shard_path(d->dir, shard);
        if (d->verify_on_touch) rc = hash_check(path, entry.sha256);
        if (rc == OK) rc = shard_file_open(&s->file, path, &d->manifest, d->id, shard, entry.bytes);
        pthread_mutex_lock(&d->lock);
        s->state = rc == OK ? SLOT_READY : SLOT_NEW;
        pthread_cond_broadcast(&d->ready);
        if (rc != OK) goto out;
        open_files_trim(d);
        if (d->n_open < MAX_OPEN) d->open[d->n_open++] = shard;
    } else if (s->file.fd < 0) {                  /* closed to make room: the structure is known */
        int64_t size;
        TRY(plain_open(&s->file.fd, &size, s->file.path, entry.bytes));
        open_files_trim(d);
        if (d->n_open < MAX_OPEN) d->open[d->n_open++] = shard;
    }
    s->users++;
    s->used = ++d->clock;
    *out = s;
out:
    pthread_mutex_unlock(&d->lock);
    free(path);
    return rc;
}

int shard_dataset_read(struct shard_dataset *d, int64_t row, struct shard_row *out)
{
    int rc = OK;
    struct slot *s = NULL;
    CHECK(row >= 0 && row < d->manifest.rows, "row %lld of %lld", (long long)row, (long long)d->manifest.rows);
    TRY(slot_acquire(d, row / d->manifest.rows_per_shard, &s));
    TRY(shard_file_read(&s->file, &d->manifest, row % d->manifest.rows_per_shard, false, out));
out:
    if (s) {
        pthread_mutex_lock(&d->lock);
        s->users--;
        pthread_mutex_unlock(&d->lock);
    }
    return rc;
}

int shard_dataset_verify(struct shard_dataset *d)
{
    int rc = OK;
    struct shard_file file = {.fd = -1};
    char *path = NULL;
    for (int64_t i = 0;; i++) {
        struct shard_entry e;
        int64_t targets;
        pthread_mutex_lock(&d->lock);             /* a refresh may move the entries */
        bool more = i < d->journal.n;
        if (more) e = d->journal.entries[i];
        pthread_mutex_unlock(&d->lock);
        if (!more) break;
        free(path);
        path = shard_path(d->dir, e.shard);
        TRY(hash_check(path, e.sha256));
        TRY(shard_file_open(&file, path, &d->manifest, d->id, e.shard, e.bytes));
        TRY(shard_file_check_rows(&file, &d->manifest, &targets));
        if (targets != e.targets) { rc = fail(ERR_INPUT, "%s: has %lld supervised positions, the journal says %lld; " SHARD_REMEDY, path, (long long)targets, (long long)e.targets); goto out; }
        shard_file_close(&file);
    }
out:
    shard_file_close(&file);
    free(path);
    return rc;
}
