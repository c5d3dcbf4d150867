/* Reading logit shards. A shard file is untrusted until it proves otherwise: its size must be the journal's before libhdf5 sees it, its
 * datasets must have exactly the names, types, shapes and contiguous layout that the manifest implies and lie within the
 * file, and from then on rows are read with pread at fixed offsets, without libhdf5 and without a lock. Every row's
 * CRC-32C and ranges are checked each time it is read. Format and checks: FORMAT.md. */
#include <errno.h>
#include <fcntl.h>
#include <hdf5.h>
#include <math.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/failpoint.h"
#include "base/file.h"
#include "base/half.h"
#include "data/shard_internal.h"

/* ---- libhdf5, one thread at a time ---- */

static pthread_mutex_t hdf5_lock = PTHREAD_MUTEX_INITIALIZER;

void hdf5_enter(void)
{
    pthread_mutex_lock(&hdf5_lock);
    H5open();
    H5PLset_loading_state(0);                     /* no code from HDF5_PLUGIN_PATH, whatever a file asks for */
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);        /* the setting is per thread in thread-safe builds */
}

void hdf5_leave(void) { pthread_mutex_unlock(&hdf5_lock); }

int64_t hdf5_type(enum shard_type type)
{
    switch (type) {
    case SHARD_U8:  return H5Tcopy(H5T_STD_U8LE);
    case SHARD_U16: return H5Tcopy(H5T_STD_U16LE);
    case SHARD_U32: return H5Tcopy(H5T_STD_U32LE);
    case SHARD_F32: return H5Tcopy(H5T_IEEE_F32LE);
    case SHARD_F16: break;
    }
    hid_t half = H5Tcopy(H5T_IEEE_F32LE);         /* IEEE binary16: sign 15, exponent 10..14 with bias 15, mantissa 0..9 */
    H5Tset_fields(half, 15, 10, 5, 0, 10);
    H5Tset_size(half, 2);
    H5Tset_ebias(half, 15);
    return half;
}

/* ---- structure of one file ---- */

static int text_attribute(hid_t file, const char *name, char *text, size_t bytes)
{
    hid_t a = H5Aopen(file, name, H5P_DEFAULT), type = a < 0 ? -1 : H5Aget_type(a), space = a < 0 ? -1 : H5Aget_space(a);
    int ok = type >= 0 && space >= 0 && H5Tget_class(type) == H5T_STRING && H5Tis_variable_str(type) == 0 && H5Tget_size(type) == bytes &&
             H5Sget_simple_extent_npoints(space) == 1 && H5Aread(a, type, text) >= 0;
    text[ok ? bytes : 0] = 0;
    if (space >= 0) H5Sclose(space);
    if (type >= 0) H5Tclose(type);
    if (a >= 0) H5Aclose(a);
    return ok ? 0 : -1;
}

static int64_t int_attribute(hid_t file, const char *name)
{
    int64_t value = -1;
    hid_t a = H5Aopen(file, name, H5P_DEFAULT), type = a < 0 ? -1 : H5Aget_type(a), space = a < 0 ? -1 : H5Aget_space(a);
    if (type >= 0 && space >= 0 && H5Tget_class(type) == H5T_INTEGER && H5Sget_simple_extent_npoints(space) == 1 && H5Aread(a, H5T_NATIVE_INT64, &value) < 0) value = -1;
    if (space >= 0) H5Sclose(space);
    if (type >= 0) H5Tclose(type);
    if (a >= 0) H5Aclose(a);
    return value;
}

static int identity_check(hid_t file, const char *path, const char *id, int64_t shard)
{
    char format[sizeof SHARD_FORMAT], dataset[SHA256_HEX];
    if (text_attribute(file, "format", format, sizeof SHARD_FORMAT - 1) || strcmp(format, SHARD_FORMAT) || int_attribute(file, "version") != SHARD_VERSION)
        return fail(ERR_INPUT, "%s: does not say that it is a logit shard of version %d; " SHARD_REMEDY, path, SHARD_VERSION);
    if (text_attribute(file, "dataset", dataset, SHA256_HEX - 1))
        return fail(ERR_INPUT, "%s: does not say which dataset it belongs to; " SHARD_REMEDY, path);
    if (strcmp(dataset, id))
        return fail(ERR_MISMATCH, "%s: is a shard of dataset %.16s..., this one is %.16s...: two runs were mixed; " SHARD_REMEDY, path, dataset, id);
    int64_t is = int_attribute(file, "shard");
    if (is != shard) return fail(ERR_INPUT, "%s: says that it is shard %lld; its name says %lld; " SHARD_REMEDY, path, (long long)is, (long long)shard);
    return OK;
}

static int field_check(hid_t file, const char *path, const struct shard_layout *l, int64_t rows, int64_t bytes, int64_t *offset)
{
    int rc = OK;
    hid_t set = -1, space = -1, type = -1, want = -1, plist = -1;
    H5L_info_t link;
    hsize_t dims[4] = {0};
    if (H5Lget_info(file, l->name, &link, H5P_DEFAULT) < 0 || link.type != H5L_TYPE_HARD || (set = H5Dopen2(file, l->name, H5P_DEFAULT)) < 0) {
        rc = fail(ERR_INPUT, "%s: dataset %s is missing or damaged; " SHARD_REMEDY, path, l->name);
        goto out;
    }
    space = H5Dget_space(set);
    type = H5Dget_type(set);
    want = hdf5_type(l->type);
    plist = H5Dget_create_plist(set);
    if (space < 0 || type < 0 || plist < 0 || H5Tequal(type, want) <= 0) { rc = fail(ERR_INPUT, "%s: dataset %s has another type than the format gives it; " SHARD_REMEDY, path, l->name); goto out; }
    int rank = H5Sget_simple_extent_ndims(space);
    if (rank == l->rank) H5Sget_simple_extent_dims(space, dims, NULL);
    if (rank != l->rank || dims[0] != (hsize_t)rows || (rank > 1 && dims[1] != (hsize_t)l->dims[0]) || (rank > 2 && dims[2] != (hsize_t)l->dims[1])) {
        rc = fail(ERR_INPUT, "%s: dataset %s is [%lld, %lld, %lld] of rank %d, the manifest says [%lld, %lld, %lld] of rank %d; " SHARD_REMEDY, path, l->name, (long long)dims[0],
                  (long long)dims[1], (long long)dims[2], rank, (long long)rows, l->rank > 1 ? (long long)l->dims[0] : 0LL, l->rank > 2 ? (long long)l->dims[1] : 0LL, l->rank);
        goto out;
    }
    if (H5Pget_layout(plist) != H5D_CONTIGUOUS || H5Pget_external_count(plist) != 0 || H5Pget_nfilters(plist) != 0) {
        rc = fail(ERR_INPUT, "%s: dataset %s is not stored in one piece in this file; " SHARD_REMEDY, path, l->name);
        goto out;
    }
    haddr_t at = H5Dget_offset(set);
    hsize_t size = H5Dget_storage_size(set), need = (hsize_t)rows * (hsize_t)l->row_bytes;
    if (at == HADDR_UNDEF || size != need || at > (haddr_t)bytes || need > (hsize_t)bytes - at) {
        rc = fail(ERR_INPUT, "%s: dataset %s does not lie within the file; " SHARD_REMEDY, path, l->name);
        goto out;
    }
    *offset = (int64_t)at;
out:
    if (plist >= 0) H5Pclose(plist);
    if (want >= 0) H5Tclose(want);
    if (type >= 0) H5Tclose(type);
    if (space >= 0) H5Sclose(space);
    if (set >= 0) H5Dclose(set);
    return rc;
}

static int structure_check(struct shard_file *f, const struct shard_manifest *m, const char *id)
{
    int rc = OK;
    struct shard_layout layout[SHARD_FIELDS];
    hid_t access = -1, file = -1;
    H5G_info_t root;
    hsize_t fields = 0;
    shard_layout(m, layout);
    hdf5_enter();
    access = H5Pcreate(H5P_FILE_ACCESS);
    H5Pset_fclose_degree(access, H5F_CLOSE_STRONG);
#if H5_VERSION_GE(1, 10, 7)
    H5Pset_file_locking(access, 0, 1);            /* sealed files do not change, and some file systems cannot lock */
#endif
    file = H5Fopen(f->path, H5F_ACC_RDONLY, access);
    if (file < 0) { rc = fail(ERR_INPUT, "%s: HDF5 cannot open it: the file is damaged; " SHARD_REMEDY, f->path); goto out; }
    TRY(identity_check(file, f->path, id, f->shard));
    for (int i = 0; i < SHARD_FIELDS; i++) {
        if (!layout[i].name) continue;
        TRY(field_check(file, f->path, &layout[i], shard_rows(m, f->shard), f->bytes, &f->offset[i]));
        fields++;
    }
    if (H5Gget_info(file, &root) < 0 || root.nlinks != fields) rc = fail(ERR_INPUT, "%s: has datasets that the format does not name; " SHARD_REMEDY, f->path);
out:
    if (file >= 0) H5Fclose(file);
    if (access >= 0) H5Pclose(access);
    hdf5_leave();
    return rc;
}

char *shard_path(const char *dir, int64_t shard) { return xasprintf("%s/shards/shard-%06lld.h5", dir, (long long)shard); }

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

void shard_row_alloc(struct shard_row *row, const struct shard_manifest *m)
{
    size_t L = (size_t)m->row_length, nT = (size_t)m->n_temperatures, K = (size_t)m->k;
    *row = (struct shard_row){.tokens = xcalloc(L, 4), .loss_mask = xcalloc(L, 1), .document = xcalloc(L, 2),
                              .lse = xcalloc(L * nT, 4), .entropy = xcalloc(L, 2), .label_logprob = xcalloc(L, 2)};
    if (m->kind == SHARD_TOPK) {
        row->tail = xcalloc(L * nT, 4);
        row->head_ids = xcalloc(L * K, 4);
        row->head_logprob = xcalloc(L * K, 2);
        row->packed = xcalloc(L, 2 * K + (K + 3) / 4);
    } else {
        row->logits = xcalloc(L * (size_t)m->valid_vocab, 2);
    }
}

void shard_row_free(struct shard_row *row)
{
    free(row->tokens); free(row->loss_mask); free(row->document); free(row->lse); free(row->tail); free(row->entropy);
    free(row->label_logprob); free(row->head_ids); free(row->head_logprob); free(row->logits); free(row->packed);
    *row = (struct shard_row){0};
}

uint32_t shard_row_crc_start(int64_t row) { return crc32c(0, &row, sizeof row); }

/* Ids are split so that 18 bits cost 2.25 bytes: low 16 bits, and the two high bits of four ids in a byte, the first lowest. */
static int ids_unpack(const struct shard_manifest *m, struct shard_row *r)
{
    int64_t K = m->k, H = (K + 3) / 4;
    const uint16_t *low = (const uint16_t *)r->packed;
    const uint8_t *high = r->packed + 2 * m->row_length * K;
    uint8_t unused = K % 4 ? (uint8_t)(0xff << 2 * (K % 4)) : 0;
    for (int64_t t = 0; t < m->row_length; t++, low += K, high += H) {
        uint32_t *ids = r->head_ids + t * K;
        for (int64_t i = 0; i < K; i++) ids[i] = low[i] | (uint32_t)((high[i >> 2] >> 2 * (i & 3)) & 3) << 16;
        if (high[H - 1] & unused) return fail(ERR_INPUT, "position %lld: the unused bits of head_ids_high are not 0", (long long)t);
    }
    return OK;
}

static int row_pread(const struct shard_file *f, const struct shard_manifest *m, const struct shard_layout *layout, int64_t row, struct shard_row *out, uint32_t *crc, uint32_t *stored)
{
    int rc = OK;
    void *data[SHARD_FIELDS] = {
        [SHARD_TOKENS] = out->tokens, [SHARD_LOSS_MASK] = out->loss_mask, [SHARD_DOCUMENT] = out->document, [SHARD_LSE] = out->lse, [SHARD_TAIL] = out->tail,
        [SHARD_ENTROPY] = out->entropy, [SHARD_LABEL_LOGPROB] = out->label_logprob, [SHARD_IDS_LOW] = out->packed,
        [SHARD_IDS_HIGH] = out->packed ? out->packed + layout[SHARD_IDS_LOW].row_bytes : NULL,
        [SHARD_HEAD_LOGPROB] = out->head_logprob, [SHARD_LOGITS] = out->logits, [SHARD_ROW_CRC] = stored,
    };
    *crc = shard_row_crc_start(shard_first_row(m, f->shard) + row);
    for (int i = 0; i < SHARD_FIELDS; i++) {
        if (!layout[i].name) continue;
        TRY(file_pread(f->fd, data[i], (size_t)layout[i].row_bytes, f->offset[i] + row * layout[i].row_bytes, f->path));
        if (i == SHARD_TOKENS && FAILPOINT_FIRES("shard.read_flip")) out->tokens[0] ^= 1u;
        if (i == SHARD_TOKENS && FAILPOINT_FIRES("shard.read_flip_more")) out->tokens[0] ^= 2u;
        if (i != SHARD_ROW_CRC) *crc = crc32c(*crc, data[i], (size_t)layout[i].row_bytes);
    }
out:
    return rc;
}

int shard_file_read(const struct shard_file *f, const struct shard_manifest *m, int64_t row, bool deep, struct shard_row *out)
{
    int rc = OK;
    struct shard_layout layout[SHARD_FIELDS];
    uint32_t crc, stored, first_crc, first_stored;
    shard_layout(m, layout);
    CHECK(m->kind == SHARD_FULL || out->packed, "rows are read into arrays of shard_row_alloc");
    TRY(row_pread(f, m, layout, row, out, &crc, &stored));
    if (crc != stored) {                          /* a bad disk read twice may say two things: that is not a broken file */
        first_crc = crc;
        first_stored = stored;
        TRY(row_pread(f, m, layout, row, out, &crc, &stored));
        if (crc == stored) warn("%s: row %lld was read wrongly and then rightly: the disk or the memory of this machine is failing", f->path, (long long)row);
        else if (crc == first_crc && stored == first_stored) { rc = fail(ERR_INPUT, "its CRC does not match: the file is damaged; " SHARD_REMEDY); goto out; }
        else { rc = fail(ERR_IO, "reads differ each time: the disk or the memory of this machine is failing; move the dataset to another disk"); goto out; }
    }
    if (m->kind == SHARD_TOPK) TRY(ids_unpack(m, out));
    TRY(shard_row_check(m, out, deep, ERR_INPUT));
out:
    if (rc != OK) fail_in(rc, "%s: row %lld of the shard, %lld of the dataset", f->path, (long long)row, (long long)(shard_first_row(m, f->shard) + row));
    return rc;
}

int shard_file_check_rows(const struct shard_file *f, const struct shard_manifest *m, int64_t *targets)
{
    int rc = OK;
    struct shard_row row;
    shard_row_alloc(&row, m);
    *targets = 0;
    for (int64_t i = 0; i < shard_rows(m, f->shard); i++) {
        TRY(shard_file_read(f, m, i, true, &row));
        for (int64_t t = 0; t < m->row_length; t++) *targets += row.loss_mask[t];
    }
out:
    shard_row_free(&row);
    return rc;
}

/* ---- what a row must be ---- */

/* Probabilities of the f16 log-probabilities: exp is most of the cost of a check, and there are only 31744 of them. */
enum { F16_INFINITY = 0x7c00, F16_SLACK = 0x1400 /* 2^-10: what rounding may lift a log-probability above 0 */ };
static struct { float p, p_logp; } f16_exp[F16_INFINITY];
static pthread_once_t f16_exp_once = PTHREAD_ONCE_INIT;

static void f16_exp_fill(void)
{
    for (int h = 0; h < F16_INFINITY; h++) {
        double x = f16_to_float((uint16_t)h);
        f16_exp[h].p = (float)exp(-x);
        f16_exp[h].p_logp = (float)(exp(-x) * x);
    }
}

static inline int f16_descent(uint16_t h) { return h & 0x8000 ? h & 0x7fff : -(int)h; }   /* grows as the value falls */

/* Rounding to f16 moves a log-probability x by at most |x| / 2^11 and so p by p|x| / 2^11; the rest is fp32 in the producer. */
static const double HALF_ULP = 1.02 / 2048, FLOAT_SLACK = 2e-4;

static int mass_check(const struct shard_manifest *m, const struct shard_row *r, int64_t t, bool deep, int status)
{
    int nT = m->n_temperatures;
    const uint16_t *logp = r->head_logprob + t * m->k;
    const float *lse = r->lse + t * nT, *tail = r->tail + t * nT;
    double sum = exp(tail[0]), entropy = 0;
    for (int i = 0; i < m->k; i++) {
        if (logp[i] & 0x8000) { sum += f16_exp[logp[i] & 0x7fff].p; entropy += f16_exp[logp[i] & 0x7fff].p_logp; }
        else sum += exp(f16_to_float(logp[i]));
    }
    if (!(fabs(sum - 1) <= FLOAT_SLACK + HALF_ULP * entropy)) return fail(status, "position %lld: head and tail hold the mass %.6f, not 1", (long long)t, sum);
    for (int j = 1; deep && j < nT; j++) {
        double ratio = (double)m->temperatures[0] / m->temperatures[j], shift = ratio * lse[0] - lse[j], error = 0;
        sum = exp(tail[j]);
        for (int i = 0; i < m->k; i++) {
            double x = f16_to_float(logp[i]), p = exp(ratio * x + shift);
            sum += p;
            error += p * ratio * fabs(x);
        }
        if (!(fabs(sum - 1) <= FLOAT_SLACK + HALF_ULP * error + 2.4e-7 * (ratio * fabs(lse[0]) + fabs(lse[j]))))
            return fail(status, "position %lld: head and tail hold the mass %.6f, not 1, at temperature %g", (long long)t, sum, m->temperatures[j]);
    }
    return OK;
}

/* The stored log-sum-exp must be that of the stored logits, up to their rounding. */
static int full_mass_check(const struct shard_manifest *m, const struct shard_row *r, int64_t t, int status)
{
    const uint16_t *logits = r->logits + t * m->valid_vocab;
    float lse = r->lse[t * m->n_temperatures];
    double sum = 0, error = 0;
    for (int64_t v = 0; v < m->valid_vocab; v++) {
        float x = f16_to_float(logits[v]), p = expf(x - lse);
        sum += p;
        error += p * fabsf(x);
    }
    if (!(fabs(sum - 1) <= FLOAT_SLACK + HALF_ULP * error + 2.4e-7 * fabs(lse))) return fail(status, "position %lld: the logits hold the mass %.6f by the stored log-sum-exp, not 1", (long long)t, sum);
    return OK;
}

static int head_check(const struct shard_manifest *m, const struct shard_row *r, int64_t t, bool deep, uint64_t *seen, int status)
{
    int K = m->k, descent = -F16_SLACK;
    const uint32_t *ids = r->head_ids + t * K;
    const uint16_t *logp = r->head_logprob + t * K;
    for (int i = 0; i < K; i++) {
        int next = f16_descent(logp[i]);
        if (ids[i] >= (uint32_t)m->valid_vocab) return fail(status, "position %lld: head id %u is not below the valid vocabulary %d", (long long)t, ids[i], m->valid_vocab);
        if (next < -F16_SLACK || next >= F16_INFINITY) return fail(status, "position %lld: log-probability %d of the head is %g", (long long)t, i, f16_to_float(logp[i]));
        if (next < descent) return fail(status, "position %lld: the head is not in descending order at %d", (long long)t, i);
        descent = next;
    }
    const float *tail = r->tail + t * m->n_temperatures;
    for (int j = 0; j < m->n_temperatures; j++)
        if (!(tail[j] <= 1e-3f)) return fail(status, "position %lld: the log of the tail mass is %g", (long long)t, tail[j]);
    if (!r->loss_mask[t]) return OK;
    int twice = -1;
    for (int i = 0; i < K; i++) {
        uint64_t bit = (uint64_t)1 << (ids[i] & 63);
        if (seen[ids[i] >> 6] & bit) twice = i;
        seen[ids[i] >> 6] |= bit;
    }
    for (int i = 0; i < K; i++) seen[ids[i] >> 6] = 0;
    if (twice >= 0) return fail(status, "position %lld: id %u is in the head twice", (long long)t, ids[twice]);
    return mass_check(m, r, t, deep, status);
}

int shard_row_check(const struct shard_manifest *m, const struct shard_row *r, bool deep, int status)
{
    int rc = OK, nT = m->n_temperatures;
    int64_t L = m->row_length;
    bool mass_checked = false;
    float max_entropy = logf((float)m->valid_vocab) * 1.001f + 1e-3f;
    uint64_t seen[SHARD_MAX_VOCAB / 64];
    if (m->kind == SHARD_TOPK) memset(seen, 0, ((size_t)m->valid_vocab + 63) / 64 * 8);
    pthread_once(&f16_exp_once, f16_exp_fill);
    for (int64_t t = 0; t < L; t++) {
        bool next = t + 1 < L && r->document[t + 1] == r->document[t];   /* is there a token t+1 to predict? */
        float entropy = f16_to_float(r->entropy[t]), label = f16_to_float(r->label_logprob[t]);
        if (r->tokens[t] >= (uint32_t)m->valid_vocab) return fail(status, "position %lld: token %u is not below the valid vocabulary %d", (long long)t, r->tokens[t], m->valid_vocab);
        if (r->document[t] != (t ? r->document[t - 1] : 0) && (!t || r->document[t] != r->document[t - 1] + 1))
            return fail(status, "position %lld: document %u does not follow the one before", (long long)t, r->document[t]);
        if (r->loss_mask[t] > 1 || (r->loss_mask[t] && !next)) return fail(status, "position %lld: loss_mask is %u, where %s", (long long)t, r->loss_mask[t], next ? "1 is the largest" : "the document ends");
        for (int j = 0; j < nT; j++)
            if (!isfinite(r->lse[t * nT + j])) return fail(status, "position %lld: the log-sum-exp is %g", (long long)t, r->lse[t * nT + j]);
        if (!(entropy >= 0 && entropy <= max_entropy)) return fail(status, "position %lld: the entropy is %g, not in 0 .. %g", (long long)t, entropy, max_entropy);
        if (!(label <= 1.0f / 1024 && label >= -65504.0f)) return fail(status, "position %lld: the label's log-probability is %g", (long long)t, label);
        if (!next && label != 0) return fail(status, "position %lld: there is no next token, yet its log-probability is %g", (long long)t, label);
        if (m->kind == SHARD_TOPK) {
            TRY(head_check(m, r, t, deep, seen, status));
        } else {
            const uint16_t *logits = r->logits + t * m->valid_vocab;
            int broken = 0;
            for (int64_t v = 0; v < m->valid_vocab; v++) broken |= (logits[v] & 0x7fff) >= F16_INFINITY;
            if (broken) return fail(status, "position %lld: a logit is not finite", (long long)t);
            /* exp over a whole vocabulary is dear: one position tells a wrong temperature or a wrong row, deep looks at all */
            if (r->loss_mask[t] && (deep || !mass_checked)) { TRY(full_mass_check(m, r, t, status)); mass_checked = true; }
        }
    }
out:
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
    bool verify_on_touch;
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
