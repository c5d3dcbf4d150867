/* Writing logit shards, so that a file under its final name is whole and verified, whenever the process or the machine dies.
 *
 * One shard is collected in memory in the layout of the file. seal: libhdf5 makes the datasets without data in a temporary file,
 * the data are written at their offsets with plain writes (whose errors are exact, where HDF5's are not), the file is read back
 * and compared, synced, renamed, its directory synced, and its line appended to the journal. A file that has its name
 * but no line yet (the process died in between) is verified and adopted at the next start, or set aside.
 * Several processes may write one dataset: shard_claim.c says who has which shard. Format: FORMAT.md.
 */
#include <errno.h>
#include <fcntl.h>
#include <hdf5.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/failpoint.h"
#include "base/file.h"
#include "data/shard_internal.h"

enum { MAX_CLAIMS = 4 };

struct shard_writer {
    char *dir, *shards, id[SHA256_HEX];
    struct shard_manifest manifest;
    struct shard_layout layout[SHARD_FIELDS];
    struct journal journal;
    struct shard_claims claims;
    int journal_fd;                   /* -1: a writer of a range, which leaves the journal alone */
    int64_t first, end;               /* shards that are its business */
    bool ranged, *made;               /* ranged: [end - first] shards of the range that have their name */
    int64_t claimed[MAX_CLAIMS];      /* ahead of their sealing; -1: none */
    int64_t shard, put, targets;      /* shard in progress (-1: none), rows it has, supervised positions */
    uint8_t *field[SHARD_FIELDS];     /* its data, as large as the largest shard; ragged fields grow as needed */
    int64_t entries, room;            /* of the ragged fields: used, allocated */
    bool failed;                      /* a seal failed: what is on disk is for the next start to judge */
};

/* ---- opening ---- */

/* Files whose name begins with `prefix` and whose maker is dead: the lock that guards them is held here. */
static int leftovers_remove(const char *dir, const char *prefix)
{
    int rc = OK, n = 0;
    char **names = NULL;
    TRY(dir_list(dir, &names, &n));
    for (int i = 0; i < n; i++) {
        if (strncmp(names[i], prefix, strlen(prefix))) continue;
        char *path = path_join(dir, names[i]);
        if (unlink(path) && errno != ENOENT) rc = fail_errno(ERR_IO, "%s: cannot remove this leftover of a dead writer", path);
        free(path);
        if (rc != OK) break;
    }
out:
    names_free(names, n);
    return rc;
}

/* Everything a seal does to the directory, now, before hours of work depend on it. */
static int directory_probe(const char *shards)
{
    int rc = OK;
    char *from = xasprintf("%s/.tmp-probe-%lld", shards, (long long)getpid()), *to = xasprintf("%s-renamed", from);
    int fd = open(from, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0 || file_write_all(fd, "probe", 5, from) != OK || fsync(fd) || FAILPOINT_FIRES("writer.probe")) rc = fail_errno(ERR_IO, "%s: cannot write files here", shards);
    if (fd >= 0) close(fd);
    if (rc == OK && rename(from, to)) rc = fail_errno(ERR_IO, "%s: cannot rename files here; this file system cannot hold a dataset", shards);
    unlink(from);
    unlink(to);
    if (rc == OK) rc = file_sync_dir(shards);
    free(from);
    free(to);
    return rc;
}

static int manifest_settle(struct shard_writer *w, const struct shard_manifest *m)
{
    int rc = OK;
    char *path = path_join(w->dir, "manifest.json"), *journal = path_join(w->dir, "journal.jsonl");
    if (!path_exists(path)) {
        if (path_exists(journal)) { rc = fail(ERR_INPUT, "%s: has a journal but no manifest.json; " SHARD_REMEDY, w->dir); goto out; }
        TRY(manifest_write(w->dir, m));
    }
    TRY(manifest_read(w->dir, &w->manifest, w->id));
    TRY(manifest_same(w->dir, &w->manifest, m));
out:
    free(path);
    free(journal);
    return rc;
}

/* With the shared lock held: what others appended, and an unfinished line, whose writer is dead, cut off. */
static int journal_catch_up(struct shard_writer *w)
{
    int rc = OK;
    TRY(journal_refresh(&w->journal, &w->manifest));
    if (w->ranged || !w->journal.torn) goto out;
    if (ftruncate(w->journal_fd, w->journal.offset)) { rc = fail_errno(ERR_IO, "%s: cannot cut off its torn last line", w->journal.path); goto out; }
    w->journal.torn = 0;
out:
    return rc;
}

static int journal_settle(struct shard_writer *w)
{
    int rc = OK;
    journal_init(&w->journal, w->dir, &w->manifest, w->id);
    if (w->ranged) { rc = journal_catch_up(w); goto out; }
    w->journal_fd = open(w->journal.path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (w->journal_fd < 0) { rc = fail_errno(ERR_IO, "%s: cannot open for appending", w->journal.path); goto out; }
    TRY(journal_catch_up(w));
    if (fsync(w->journal_fd)) { rc = fail_errno(ERR_IO, "%s: cannot sync to disk", w->journal.path); goto out; }   /* a killed writer's last line too */
    TRY(file_sync_dir(w->dir));
out:
    return rc;
}

char *quarantine_name(const char *path)
{
    char *aside = xasprintf("%s.quarantine", path);
    for (int i = 2; path_exists(aside); i++) {
        free(aside);
        aside = xasprintf("%s.quarantine-%d", path, i);
    }
    return aside;
}

static int quarantine(const char *path)
{
    int rc = OK;
    char *aside = quarantine_name(path);
    if (rename(path, aside)) rc = fail_errno(ERR_IO, "%s: cannot rename to %s", path, aside);
    else warn("%s; set aside as %s", fail_message(), aside);
    free(aside);
    return rc;
}

static int sync_and_journal(struct shard_writer *w, const char *path, int64_t shard, int64_t targets, int64_t bytes, const char *sha256)
{
    struct shard_entry e = {.shard = shard, .rows = shard_rows(&w->manifest, shard), .targets = targets, .bytes = bytes};
    int rc = OK;
    e.tokens = e.rows * w->manifest.row_length;
    memcpy(e.sha256, sha256, SHA256_HEX);
    if (path) TRY(file_sync_path(path));
    if (FAILPOINT_FIRES("shard.dir_sync")) { rc = fail_errno(ERR_IO, "%s: cannot sync to disk", w->shards); goto out; }
    TRY(file_sync_dir(w->shards));
    if (w->ranged) { w->made[shard - w->first] = true; goto out; }
    TRY(claims_enter(&w->claims));
    rc = journal_catch_up(w);
    if (rc == OK) rc = journal_append(&w->journal, w->journal_fd, &e);
    claims_leave(&w->claims);
out:
    return rc;
}

/* A shard that has its name was whole when it got it; believe that only after reading every byte. */
static int shard_adopt(struct shard_writer *w, int64_t shard)
{
    int rc = OK;
    struct shard_file file = {.fd = -1};
    int64_t targets, bytes;
    char *path = shard_path(w->dir, shard), sha256[SHA256_HEX];
    if (shard >= shard_count(&w->manifest)) rc = fail(ERR_INPUT, "%s: is beyond the %lld shards of the manifest", path, (long long)shard_count(&w->manifest));
    if (rc == OK) rc = shard_file_open(&file, path, &w->manifest, w->id, shard, -1);
    if (rc == OK && file.bytes > (int64_t)shard_bytes(&w->manifest, shard)) rc = fail(ERR_INPUT, "%s: has %lld bytes, too many", path, (long long)file.bytes);
    if (rc == OK) rc = shard_file_check_rows(&file, &w->manifest, &targets);
    bytes = file.bytes;
    shard_file_close(&file);
    if (rc == ERR_INPUT || rc == ERR_MISMATCH) { rc = quarantine(path); goto out; }
    if (rc != OK) goto out;
    TRY(sha256_of_file(path, sha256));
    TRY(sync_and_journal(w, path, shard, targets, bytes, sha256));
out:
    free(path);
    return rc;
}

static int listed_check(struct shard_writer *w)
{
    int rc = OK;
    for (int64_t i = 0; rc == OK && i < w->journal.n; i++) {
        const struct shard_entry *e = &w->journal.entries[i];
        char *path = shard_path(w->dir, e->shard);
        int64_t size = path_size(path);
        if (size < 0) rc = fail(ERR_INPUT, "%s: the journal lists this shard, but the file is missing; " SHARD_REMEDY, path);
        else if (size != e->bytes) rc = fail(ERR_INPUT, "%s: is %lld bytes, the journal says %lld; " SHARD_REMEDY, path, (long long)size, (long long)e->bytes);
        free(path);
    }
    return rc;
}

static bool is_made(const struct shard_writer *w, int64_t shard)
{
    return journal_find(&w->journal, shard) || (w->ranged && w->made[shard - w->first]);
}

/* With the shard claimed: its maker, if there was one, is dead. Its temporary files go, a file that has the name already is judged. */
static int shard_settle(struct shard_writer *w, int64_t shard)
{
    int rc = OK;
    char *path = shard_path(w->dir, shard), *prefix = xasprintf(".tmp-shard-%06lld.h5-", (long long)shard);
    TRY(leftovers_remove(w->shards, prefix));
    TRY(claims_enter(&w->claims));
    rc = journal_catch_up(w);                     /* it may have been sealed since we looked */
    claims_leave(&w->claims);
    if (rc == OK && !is_made(w, shard) && path_exists(path)) rc = shard_adopt(w, shard);
out:
    free(path);
    free(prefix);
    return rc;
}

/* Beyond the last shard: nobody makes such a file, and nobody can be making it. */
static int beyond_settle(struct shard_writer *w, const char *name, int64_t shard)
{
    char *path = path_join(w->shards, name);
    int rc = claims_enter(&w->claims);
    if (rc == OK) {
        if (!path_exists(path)) rc = OK;
        else if (*name == '.') rc = leftovers_remove(w->shards, name);
        else rc = shard_adopt(w, shard);
        claims_leave(&w->claims);
    }
    free(path);
    return rc;
}

/* Every shard file without a line, and every temporary one, whose maker is dead. */
static int shards_settle(struct shard_writer *w)
{
    int rc = OK, n = 0;
    char **names = NULL;
    TRY(dir_list(w->shards, &names, &n));
    for (int i = 0; i < n && rc == OK; i++) {
        long long shard;
        bool taken, temporary = sscanf(names[i], ".tmp-shard-%18lld.h5-", &shard) == 1;
        if (!temporary) shard = shard_name_parse(names[i]);
        if (shard < 0) continue;                                              /* quarantined, or not ours */
        if (shard >= shard_count(&w->manifest)) {
            if (!w->ranged) rc = beyond_settle(w, names[i], shard);
            continue;
        }
        if (shard < w->first || shard >= w->end || (!temporary && is_made(w, shard))) continue;
        TRY(claim_take(&w->claims, shard, &taken));
        if (!taken) continue;
        rc = shard_settle(w, shard);
        claim_drop(&w->claims, shard);
    }
out:
    names_free(names, n);
    return rc;
}

static int writer_open(struct shard_writer **out, const char *dir, const struct shard_manifest *m, bool ranged, int64_t first, int64_t end)
{
    int rc = OK;
    bool entered = false;
    char *parent = path_join(dir, "..");
    struct shard_writer *w = xcalloc(1, sizeof *w);
    w->claims.fd = w->journal_fd = -1;
    w->shard = -1;
    for (int i = 0; i < MAX_CLAIMS; i++) w->claimed[i] = -1;
    w->dir = xstrdup(dir);
    w->shards = path_join(dir, "shards");
    TRY(manifest_check(m, dir, ERR_USAGE));
    w->ranged = ranged;
    w->first = ranged ? first : 0;
    w->end = ranged ? end : shard_count(m);
    if (w->first < 0 || w->first >= w->end || w->end > shard_count(m)) {
        rc = fail(ERR_USAGE, "%s: has the shards 0 to %lld; %lld:%lld is no range of them (the second is the first that is left out)", dir, (long long)(shard_count(m) - 1), (long long)first, (long long)end);
        goto out;
    }
    if (ranged) w->made = xcalloc((size_t)(end - first), sizeof *w->made);
    TRY(dir_make(dir));
    TRY(claims_open(&w->claims, dir, ranged ? CLAIMS_OPTIONAL : CLAIMS_SHARED));
    TRY(claims_enter(&w->claims));
    entered = true;
    if (!ranged) TRY(leftovers_remove(dir, "manifest.json.tmp-"));
    TRY(manifest_settle(w, m));
    TRY(dir_make(w->shards));
    if (!ranged) TRY(leftovers_remove(w->shards, ".tmp-probe-"));
    TRY(directory_probe(w->shards));
    TRY(journal_settle(w));
    TRY(file_sync_dir(parent));
    TRY(listed_check(w));
    claims_leave(&w->claims);
    entered = false;
    TRY(shards_settle(w));
    shard_layout(&w->manifest, w->layout);
    *out = w;
    w = NULL;
out:
    if (entered) claims_leave(&w->claims);
    free(parent);
    shard_writer_close(w);
    return rc;
}

int shard_writer_open(struct shard_writer **out, const char *dir, const struct shard_manifest *m) { return writer_open(out, dir, m, false, 0, 0); }

int shard_writer_open_range(struct shard_writer **out, const char *dir, const struct shard_manifest *m, int64_t first, int64_t end)
{
    return writer_open(out, dir, m, true, first, end);
}

/* The last one to leave takes what a writer that died while it opened has left: shards of its own, which others take over with their files, it had none yet. */
static void last_one_tidies(struct shard_writer *w)
{
    if (!w->claims.locks) return;
    char *message = xstrdup(fail_message());                     /* of the failure that this close may follow */
    if (claims_enter(&w->claims) == OK) {
        if (claims_alone(&w->claims)) leftovers_remove(w->shards, ".tmp-probe-");
        claims_leave(&w->claims);
    }
    fail(OK, "%s", message);
    free(message);
}

void shard_writer_close(struct shard_writer *w)
{
    if (!w) return;
    last_one_tidies(w);
    for (int f = 0; f < SHARD_FIELDS; f++) free(w->field[f]);
    if (w->journal_fd >= 0) close(w->journal_fd);
    if (w->journal.path) journal_free(&w->journal);
    claims_close(&w->claims);
    free(w->made);
    free(w->shards);
    free(w->dir);
    free(w);
}

int64_t shard_writer_next_shard(const struct shard_writer *w)
{
    int64_t n = w->first;
    while (n < w->end && is_made(w, n)) n++;
    return n < w->end ? n : shard_count(&w->manifest);
}

int64_t shard_writer_rows_done(const struct shard_writer *w)
{
    int64_t rows = 0;
    for (int64_t n = w->first; n < w->end; n++)
        if (is_made(w, n)) rows += shard_rows(&w->manifest, n);
    return rows;
}

/* Where `shard` stands among the claims, -1: not there. Of shard -1: a free place. */
static int claim_place(const struct shard_writer *w, int64_t shard)
{
    for (int i = 0; i < MAX_CLAIMS; i++) if (w->claimed[i] == shard) return i;
    return -1;
}

int shard_writer_claim(struct shard_writer *w, int64_t *shard, int64_t *busy, const char **owner)
{
    int rc = OK;
    bool taken = false;
    int place = claim_place(w, -1);
    CHECK(place >= 0, "%d shards are claimed already", MAX_CLAIMS);
    TRY(claims_enter(&w->claims));
    rc = journal_catch_up(w);
    claims_leave(&w->claims);
    *shard = SHARD_NONE;
    *busy = 0;
    for (int64_t n = w->first; rc == OK && n < w->end; n++) {
        if (is_made(w, n) || claim_place(w, n) >= 0) continue;
        TRY(claim_take(&w->claims, n, &taken));
        if (!taken) {
            if (!(*busy)++) *owner = claim_owner(&w->claims, n);
            continue;
        }
        rc = shard_settle(w, n);
        if (rc != OK || is_made(w, n)) { claim_drop(&w->claims, n); continue; }
        *shard = w->claimed[place] = n;
        goto out;
    }
    if (*busy) *shard = SHARD_BUSY;
out:
    return rc;
}

static void claim_end(struct shard_writer *w, int64_t shard)
{
    int place = claim_place(w, shard);
    if (place < 0) return;
    claim_drop(&w->claims, shard);
    w->claimed[place] = -1;
}

/* ---- collecting ---- */

int shard_writer_begin(struct shard_writer *w, int64_t shard)
{
    if (w->failed) return fail(ERR_IO, "%s: a shard could not be sealed before; start again so that the directory is checked", w->dir);
    CHECK(shard >= w->first && shard < w->end && !is_made(w, shard), "shard %lld cannot be begun", (long long)shard);
    if (w->shard >= 0 && w->shard != shard) claim_end(w, w->shard);      /* given up unsealed */
    if (claim_place(w, shard) < 0) {
        bool taken;
        int place = claim_place(w, -1);
        CHECK(place >= 0, "%d shards are claimed already", MAX_CLAIMS);
        int rc = claim_take(&w->claims, shard, &taken);
        if (rc != OK) return rc;
        if (!taken) return fail(ERR_IO, "%s: another process is writing shard %lld (%s); wait for it or stop it", w->dir, (long long)shard, claim_owner(&w->claims, shard));
        w->claimed[place] = shard;
    }
    for (int f = 0; f < SHARD_FIELDS; f++) {
        size_t bytes = (size_t)(w->manifest.rows_per_shard * w->layout[f].row_bytes);
        if (!bytes || w->field[f]) continue;
        w->field[f] = malloc(bytes);
        if (!w->field[f]) return fail(ERR_IO, "%s: no memory for the %zu bytes of %s of one shard; use fewer rows per shard", w->dir, bytes, w->layout[f].name);
    }
    w->shard = shard;
    w->put = w->targets = w->entries = 0;
    return OK;
}

static int64_t field_bytes(const struct shard_writer *w, int f)
{
    const struct shard_layout *l = &w->layout[f];
    return l->ragged ? w->entries / l->ragged * shard_type_bytes(l->type) : w->put * l->row_bytes;
}

/* Room for a shard's ragged entries, with a fourth to spare: a shard may be gigabytes. */
static int entries_reserve(struct shard_writer *w, int64_t entries)
{
    if (entries <= w->room) return OK;
    int64_t room = ragged_round(entries + entries / 4);
    for (int f = 0; f < SHARD_FIELDS; f++) {
        if (!w->layout[f].ragged) continue;
        size_t bytes = (size_t)(room / w->layout[f].ragged * shard_type_bytes(w->layout[f].type));
        uint8_t *data = realloc(w->field[f], bytes);
        if (!data) return fail(ERR_IO, "%s: no memory for the %zu bytes of %s of one shard; use fewer rows per shard", w->dir, bytes, w->layout[f].name);
        w->field[f] = data;
    }
    w->room = room;
    return OK;
}

/* The row's draws behind those of the rows before; padded with zeros to the step. */
static int ragged_put(struct shard_writer *w, const struct shard_row *row, uint32_t *offset)
{
    int rc = OK;
    int64_t L = w->manifest.row_length, D = w->manifest.draws, at = w->entries;
    TRY(entries_reserve(w, at + ragged_row_most(&w->manifest)));
    uint16_t *low = (uint16_t *)w->field[SHARD_DRAW_LOW];
    uint8_t *high = w->field[SHARD_DRAW_HIGH], *count = w->field[SHARD_DRAW_COUNT];
    memset(high + at / RAGGED_STEP, 0, (size_t)(ragged_row_most(&w->manifest) / RAGGED_STEP));
    offset[0] = (uint32_t)at;
    for (int64_t t = 0; t < L; t++) {
        for (int64_t i = 0; i < D && row->draw_count[t * D + i]; i++, at++) {
            uint32_t id = row->draw_ids[t * D + i];
            low[at] = (uint16_t)id;
            high[at / RAGGED_STEP] |= (uint8_t)(id >> 16 << 2 * (at % RAGGED_STEP));
            count[at] = row->draw_count[t * D + i];
        }
        offset[t + 1] = (uint32_t)at;
    }
    for (; at % RAGGED_STEP; at++) low[at] = count[at] = 0;
    w->entries = at;
out:
    return rc;
}

static void ids_pack(const uint32_t *ids, int64_t positions, int64_t K, uint16_t *low, uint8_t *high)
{
    int64_t H = ids_high_bytes(K);
    memset(high, 0, (size_t)(positions * H));
    for (int64_t t = 0; t < positions; t++, ids += K, low += K, high += H)
        for (int64_t i = 0; i < K; i++) {
            low[i] = (uint16_t)ids[i];
            high[i >> 2] |= (uint8_t)(ids[i] >> 16 << 2 * (i & 3));
        }
}

int shard_writer_put(struct shard_writer *w, const struct shard_row *row)
{
    const struct shard_manifest *m = &w->manifest;
    CHECK(w->shard >= 0 && w->put < shard_rows(m, w->shard), "no shard has room for this row");
    int rc = OK;
    int64_t number = shard_first_row(m, w->shard) + w->put;
    const void *data[SHARD_FIELDS] = {
        [SHARD_TOKENS] = row->tokens, [SHARD_LOSS_MASK] = row->loss_mask, [SHARD_DOCUMENT] = row->document, [SHARD_LSE] = row->lse, [SHARD_TAIL] = row->tail,
        [SHARD_ENTROPY] = row->entropy, [SHARD_LABEL_LOGPROB] = row->label_logprob, [SHARD_HEAD_LOGPROB] = row->head_logprob, [SHARD_DRAW_COUNT] = row->draw_count,
        [SHARD_DRAW_LOGPROB] = row->draw_logprob, [SHARD_LOGITS] = row->logits,
    };
    uint32_t crc = shard_row_crc_start(number);
    if ((rc = shard_row_check(m, row, m->kind != SHARD_FULL, ERR_NUMERIC)) != OK) return fail_in(rc, "%s: row %lld cannot be stored", w->dir, (long long)number);
    int64_t begin = w->entries, L = m->row_length;
    for (int f = 0; f < SHARD_ROW_CRC; f++) {
        const struct shard_layout *l = &w->layout[f];
        if (!l->name) continue;
        size_t bytes = (size_t)l->row_bytes;
        uint8_t *at = w->field[f] + w->put * l->row_bytes;
        if (l->ragged) {                          /* SHARD_DRAW_OFFSET comes before and has put them */
            at = w->field[f] + begin / l->ragged * shard_type_bytes(l->type);
            bytes = (size_t)((w->entries - begin) / l->ragged * shard_type_bytes(l->type));
        } else if (f == SHARD_DRAW_OFFSET) TRY(ragged_put(w, row, (uint32_t *)at));
        else if (f == SHARD_IDS_LOW) ids_pack(row->head_ids, L, m->k, (uint16_t *)at, w->field[SHARD_IDS_HIGH] + w->put * w->layout[SHARD_IDS_HIGH].row_bytes);
        else if (f == SHARD_DRAW_LOW) ids_pack(row->draw_ids, L, m->draws, (uint16_t *)at, w->field[SHARD_DRAW_HIGH] + w->put * w->layout[SHARD_DRAW_HIGH].row_bytes);
        else if (f != SHARD_IDS_HIGH && f != SHARD_DRAW_HIGH) memcpy(at, data[f], bytes);
        crc = crc32c(crc, at, bytes);
    }
    ((uint32_t *)w->field[SHARD_ROW_CRC])[w->put] = crc;
    for (int64_t t = 0; t < m->row_length; t++) w->targets += row->loss_mask[t];
    w->put++;
out:
    return rc;
}

/* ---- sealing: the file through libhdf5 ---- */

static pthread_mutex_t hdf5_lock = PTHREAD_MUTEX_INITIALIZER;   /* libhdf5 is entered by one thread at a time */

static hid_t hdf5_type(enum shard_type type)
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

static bool attribute_write(hid_t file, const char *name, hid_t type, hid_t memory, const void *value)
{
    hid_t space = H5Screate(H5S_SCALAR), a = H5Acreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    bool ok = a >= 0 && H5Awrite(a, memory, value) >= 0;
    if (a >= 0) H5Aclose(a);
    H5Sclose(space);
    return ok;
}

static bool text_attribute_write(hid_t file, const char *name, const char *text)
{
    hid_t type = H5Tcopy(H5T_C_S1);
    H5Tset_size(type, strlen(text));
    H5Tset_strpad(type, H5T_STR_NULLPAD);
    bool ok = attribute_write(file, name, type, type, text);
    H5Tclose(type);
    return ok;
}

static bool int_attribute_write(hid_t file, const char *name, int64_t value) { return attribute_write(file, name, H5T_STD_I64LE, H5T_NATIVE_INT64, &value); }

static bool dataset_create(hid_t file, const struct shard_layout *l, int64_t elements /* rows, or of a ragged field */, int64_t *offset)
{
    hsize_t dims[3] = {(hsize_t)elements, (hsize_t)l->dims[0], (hsize_t)l->dims[1]};
    hid_t type = hdf5_type(l->type), space = H5Screate_simple(l->rank, dims, NULL), plist = H5Pcreate(H5P_DATASET_CREATE), set = -1;
    H5Pset_layout(plist, H5D_CONTIGUOUS);
    H5Pset_alloc_time(plist, H5D_ALLOC_TIME_EARLY);
    H5Pset_fill_time(plist, H5D_FILL_TIME_NEVER);
    H5Pset_obj_track_times(plist, 0);
    set = H5Dcreate2(file, l->name, type, space, H5P_DEFAULT, plist, H5P_DEFAULT);
    haddr_t at = set < 0 ? HADDR_UNDEF : H5Dget_offset(set);
    *offset = (int64_t)at;
    if (set >= 0) H5Dclose(set);
    H5Pclose(plist);
    H5Sclose(space);
    H5Tclose(type);
    return at != HADDR_UNDEF;
}

/* Up to so many links stay in the root group's header: more than any kind has datasets. Both values are written into the file. */
enum { LINKS_COMPACT = 26, LINKS_DENSE = 13 };

/* The file with its datasets allocated and empty. The same shapes give the same bytes: no times, fixed bounds of the format, links kept in the
 * root group's header (where our reader looks for them). Small data stay together; what fills a page begins at one. */
static int skeleton_write(const struct shard_writer *w, const char *path, int64_t offset[SHARD_FIELDS])
{
    int rc = OK;
    const struct shard_manifest *m = &w->manifest;
    bool ok;
    pthread_mutex_lock(&hdf5_lock);
    H5dont_atexit();                              /* a file that could not be written is tried again at exit, and that ends in a crash (1.10) */
    H5open();
    H5PLset_loading_state(0);                     /* no code from HDF5_PLUGIN_PATH */
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);        /* no messages of its own; the setting is per thread in thread-safe builds */
    hid_t create = H5Pcreate(H5P_FILE_CREATE), access = H5Pcreate(H5P_FILE_ACCESS), file;
    H5Pset_obj_track_times(create, 0);
    H5Pset_link_phase_change(create, LINKS_COMPACT, LINKS_DENSE);
    H5Pset_attr_phase_change(create, 16, 8);
    H5Pset_libver_bounds(access, H5F_LIBVER_V110, H5F_LIBVER_V110);
    H5Pset_alignment(access, SHARD_ALIGNMENT, SHARD_ALIGNMENT);
    H5Pset_fclose_degree(access, H5F_CLOSE_STRONG);
#if H5_VERSION_GE(1, 10, 7)
    H5Pset_file_locking(access, 0, 1);
#endif
    errno = 0;
    file = H5Fcreate(path, H5F_ACC_EXCL, create, access);
    ok = file >= 0 && text_attribute_write(file, "format", SHARD_FORMAT) && int_attribute_write(file, "version", SHARD_VERSION) &&
         text_attribute_write(file, "dataset", w->id) && text_attribute_write(file, "kind", shard_kind_name(m->kind)) && int_attribute_write(file, "shard", w->shard) &&
         int_attribute_write(file, "first_row", shard_first_row(m, w->shard)) && int_attribute_write(file, "rows", shard_rows(m, w->shard));
    for (int f = 0; ok && f < SHARD_FIELDS; f++) {
        const struct shard_layout *l = &w->layout[f];
        ok = !l->name || dataset_create(file, l, l->ragged ? w->entries / l->ragged : shard_rows(m, w->shard), &offset[f]);
    }
    if (file >= 0 && H5Fclose(file) < 0) ok = false;
    if (!ok) rc = errno ? fail_errno(ERR_IO, "%s: HDF5 cannot write it", path) : fail(ERR_IO, "%s: HDF5 cannot write it", path);
    H5Pclose(access);
    H5Pclose(create);
    pthread_mutex_unlock(&hdf5_lock);
    return rc;
}

/* The file is segments end to end: the fields, and between them what libhdf5 wrote. */
struct segment { int64_t at, bytes; uint8_t *data; bool field; };
enum { MAX_SEGMENTS = 2 * SHARD_FIELDS + 1 };

static int by_place(const void *a, const void *b)
{
    const struct segment *x = a, *y = b;
    return (x->at > y->at) - (x->at < y->at);
}

/* What is between the fields is kept, so that the whole file is compared when it is read back. */
static int segments_make(const struct shard_writer *w, const struct shard_file *f, struct segment segments[MAX_SEGMENTS], int *n)
{
    int rc = OK, fields = 0;
    int64_t at = 0;
    *n = 0;
    for (int i = 0; i < SHARD_FIELDS; i++)
        if (w->layout[i].name) segments[(*n)++] = (struct segment){f->offset[i], field_bytes(w, i), w->field[i], true};
    fields = *n;
    qsort(segments, (size_t)fields, sizeof *segments, by_place);
    for (int i = 0; i <= fields; i++) {
        int64_t next = i < fields ? segments[i].at : f->bytes;
        CHECK(next >= at, "datasets overlap in %s", f->path);
        if (next > at) {
            segments[*n] = (struct segment){at, next - at, xmalloc((size_t)(next - at)), false};
            (*n)++;
            TRY(file_pread(f->fd, segments[*n - 1].data, (size_t)(next - at), at, f->path));
        }
        if (i < fields) at = segments[i].at + segments[i].bytes;
    }
    qsort(segments, (size_t)*n, sizeof *segments, by_place);
out:
    return rc;
}

static int data_write(int fd, const char *path, const struct segment *segments, int n)
{
    int rc = OK;
    for (int i = 0; i < n; i++) {
        const struct segment *s = &segments[i];
        if (!s->field) continue;
        if (FAILPOINT_FIRES("shard.write")) { rc = fail_errno(ERR_IO, "%s: cannot write %lld bytes", path, (long long)s->bytes); goto out; }
        if (lseek(fd, s->at, SEEK_SET) < 0) { rc = fail_errno(ERR_IO, "%s: cannot seek", path); goto out; }
        TRY(file_write_all(fd, s->data, (size_t)s->bytes, path));
    }
out:
    return rc;
}

/* Reads the file back: every byte must be the one in memory, and the SHA-256 is of what was read. */
static int read_back(const struct shard_file *f, const struct segment *segments, int n, char sha256[SHA256_HEX])
{
    enum { CHUNK = 1 << 20 };
    int rc = OK;
    uint8_t *chunk = xmalloc(CHUNK);
    struct sha256 *hash = sha256_new();
    for (int i = 0; i < n; i++)
        for (int64_t at = 0; at < segments[i].bytes; at += CHUNK) {
            size_t bytes = (size_t)(segments[i].bytes - at < CHUNK ? segments[i].bytes - at : CHUNK);
            TRY(file_pread(f->fd, chunk, bytes, segments[i].at + at, f->path));
            if (FAILPOINT_FIRES("shard.read_back")) chunk[bytes - 1] ^= 1;
            if (memcmp(chunk, segments[i].data + at, bytes)) {
                rc = fail(ERR_IO, "%s: reads back differently from what was written: the disk or the memory of this machine is failing; write to another disk", f->path);
                goto out;
            }
            sha256_add(hash, chunk, bytes);
        }
out:
    sha256_hex(hash, sha256);
    free(chunk);
    return rc;
}

int shard_writer_seal(struct shard_writer *w)
{
    CHECK(w->shard >= 0 && w->put == shard_rows(&w->manifest, w->shard), "shard %lld has %lld rows", (long long)w->shard, (long long)w->put);
    int rc = OK, fd = -1, n = 0;
    struct shard_file file = {.fd = -1};
    struct segment segments[MAX_SEGMENTS];
    int64_t offset[SHARD_FIELDS];
    char sha256[SHA256_HEX], *path = shard_path(w->dir, w->shard), *tmp = xasprintf("%s/.tmp-shard-%06lld.h5-%lld", w->shards, (long long)w->shard, (long long)getpid());
    bool named = false;
    TRY(FAILPOINT("shard.before_write"));
    if (w->manifest.kind == SHARD_SAMPLED && !w->entries) {   /* not one draw in the shard: HDF5 keeps no place for nothing */
        TRY(entries_reserve(w, RAGGED_STEP));
        for (int f = 0; f < SHARD_FIELDS; f++)
            if (w->layout[f].ragged) memset(w->field[f], 0, (size_t)(RAGGED_STEP / w->layout[f].ragged * shard_type_bytes(w->layout[f].type)));
        w->entries = RAGGED_STEP;
    }
    TRY(skeleton_write(w, tmp, offset));
    TRY(FAILPOINT("shard.skeleton"));
    TRY(shard_file_open(&file, tmp, &w->manifest, w->id, w->shard, -1));       /* the reader's own view of the structure must be libhdf5's */
    for (int f = 0; f < SHARD_FIELDS; f++)
        if (w->layout[f].name && file.offset[f] != offset[f]) {
            rc = fail(ERR_IO, "%s: this HDF5 library lays files out in a way that format %d does not; build with another version of it (1.10 and 2.0 are known to do it)", tmp, SHARD_VERSION);
            goto out;
        }
    TRY(segments_make(w, &file, segments, &n));
    fd = open(tmp, O_WRONLY | O_CLOEXEC);
    if (fd < 0) { rc = fail_errno(ERR_IO, "%s: cannot open", tmp); goto out; }
    TRY(data_write(fd, tmp, segments, n));
    TRY(FAILPOINT("shard.after_write"));
    TRY(read_back(&file, segments, n, sha256));
    TRY(FAILPOINT("shard.verified"));
    if (FAILPOINT_FIRES("shard.sync") || fsync(fd)) { rc = fail_errno(ERR_IO, "%s: cannot sync to disk", tmp); goto out; }
    int closed = close(fd);
    fd = -1;
    if (FAILPOINT_FIRES("shard.close") || closed) { rc = fail_errno(ERR_IO, "%s: cannot close", tmp); goto out; }
    TRY(FAILPOINT("shard.before_rename"));
    if (FAILPOINT_FIRES("shard.rename") || rename(tmp, path)) { rc = fail_errno(ERR_IO, "%s: cannot rename to %s", tmp, path); goto out; }
    named = true;
    TRY(FAILPOINT("shard.after_rename"));
    TRY(sync_and_journal(w, NULL, w->shard, w->targets, file.bytes, sha256));
out:
    if (fd >= 0) close(fd);
    shard_file_close(&file);
    for (int i = 0; i < n; i++)
        if (!segments[i].field) free(segments[i].data);
    if (rc != OK) {
        if (!named) unlink(tmp);
        fail_in(rc, "shard %lld of %s (%zu bytes) is not sealed", (long long)w->shard, w->dir, shard_bytes(&w->manifest, w->shard));
        w->failed = true;
    }
    claim_end(w, w->shard);
    w->shard = -1;
    free(path);
    free(tmp);
    return rc;
}
