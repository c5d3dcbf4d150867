/* Scrub: reads everything a dataset directory holds and tells every fault, not the first alone; and repairs what can be.
 *
 * A shard is judged by the journal's line for it (size, SHA-256, number of targets) and by itself (structure, identity, and of every row CRC, ranges,
 * order, mass). Where the journal is damaged, the file's own evidence decides, as it does when a writer adopts a file. Repair changes the journal
 * first: from then on the directory is one that a writer would have left behind, and the renames only make it tidy. Whatever is set aside
 * or replaced keeps its bytes under a .quarantine name. Shards are read by all threads; what is found is told in order. */
#include <omp.h>
#include <string.h>

#include "base/failpoint.h"
#include "base/file.h"
#include "data/shard_internal.h"

static const int64_t ROWS_BYTES = (int64_t)2 << 30;
enum { FAULTS_OF_A_SHARD = 20 };              /* told; the rest is counted: a shard overwritten with zeros has as many as rows */

struct finding { int status; char *text; };
struct subject {                              /* one shard: listed, or there, or both */
    int64_t shard;
    bool present, bad, unreadable;
    struct shard_entry entry;                 /* what a line for it says or would say; sha256 "" while nobody has said it */
    struct finding findings[FAULTS_OF_A_SHARD + 1];
    int n, more;
    int64_t rows;
};
struct scrub {
    const char *dir;
    char *shards, *journal, id[SHA256_HEX];
    struct shard_manifest m;
    shard_found *found;
    void (*progress)(void *context, int64_t done, int64_t all);
    void *context;
    struct shard_scrub *out;
    struct shard_entry *lines;                /* every readable line, in order */
    int64_t n_lines, room;
    bool journal_broken;
    int64_t *subject_of;                      /* [shard_count] index + 1 */
    struct subject *subjects;
    int64_t n_subjects, subjects_room;
    struct { char *name; } *beyond;           /* shard files past the last shard */
    int n_beyond;
};

static void tell(struct scrub *s, int64_t shard, int status, const char *text)
{
    if (status != OK) s->out->faults++;
    if (status == ERR_MISMATCH) s->out->foreign++;
    s->found(s->context, shard, status, text);
}

static struct subject *subject_for(struct scrub *s, int64_t shard)
{
    if (!s->subject_of[shard]) {
        if (s->n_subjects == s->subjects_room) s->subjects = xrealloc(s->subjects, (size_t)(s->subjects_room = s->subjects_room ? 2 * s->subjects_room : 64) * sizeof *s->subjects);
        s->subjects[s->n_subjects] = (struct subject){.shard = shard};
        s->subject_of[shard] = ++s->n_subjects;
    }
    return &s->subjects[s->subject_of[shard] - 1];
}

/* ---- the journal ---- */

static void on_line(void *context, int64_t at, const struct shard_entry *e, int status, const char *fault)
{
    struct scrub *s = context;
    if (fault) {
        char *text = xasprintf("%s: the line at byte %lld %s", s->journal, (long long)at, fault);
        tell(s, e ? e->shard : -1, status, text);
        free(text);
        s->journal_broken = true;
    }
    if (!e) return;
    if (s->n_lines == s->room) s->lines = xrealloc(s->lines, (size_t)(s->room = s->room ? 2 * s->room : 64) * sizeof *s->lines);
    s->lines[s->n_lines++] = *e;
}

static void journal_judge(struct scrub *s)
{
    for (int64_t i = 0; i < s->n_lines; i++) {
        const struct shard_entry *e = &s->lines[i];
        bool known = s->subject_of[e->shard];
        struct subject *x = subject_for(s, e->shard);
        if (!known) { x->entry = *e; continue; }
        bool same = !strcmp(x->entry.sha256, e->sha256) && x->entry.bytes == e->bytes;
        char *text = xasprintf("%s: shard %lld is sealed twice%s", s->journal, (long long)e->shard, same ? ", to the same bytes" : " with different content: two runs were mixed");
        tell(s, e->shard, same ? OK : ERR_MISMATCH, text);
        free(text);
        s->journal_broken |= !same;
    }
}

/* ---- one shard, on a thread of its own ---- */

static void note(struct subject *x, int status)
{
    if (status != OK) x->bad = true;
    if (status == ERR_IO) x->unreadable = true;
    if (x->n == FAULTS_OF_A_SHARD) x->more++;
    else x->findings[x->n++] = (struct finding){status, xstrdup(fail_message())};
}

/* Which of the journal's lines for this shard is this file's? NULL: none. */
static const struct shard_entry *line_of(const struct scrub *s, int64_t shard, int64_t bytes, const char *sha256)
{
    for (int64_t i = 0; i < s->n_lines; i++)
        if (s->lines[i].shard == shard && s->lines[i].bytes == bytes && !strcmp(s->lines[i].sha256, sha256)) return &s->lines[i];
    return NULL;
}

static void shard_judge(const struct scrub *s, struct subject *x)
{
    struct shard_file f = {.fd = -1};
    struct shard_row row;
    char *path = shard_path(s->dir, x->shard), sha256[SHA256_HEX];
    bool listed = x->entry.sha256[0];
    int64_t targets = 0, bytes = path_size(path);
    shard_row_alloc(&row, &s->m);
    x->present = bytes >= 0;
    if (!x->present) { note(x, fail(ERR_INPUT, "%s: the journal lists this shard, but the file is missing", path)); goto out; }
    int rc = sha256_of_file(path, sha256);
    if (rc != OK) { note(x, rc); goto out; }
    const struct shard_entry *line = line_of(s, x->shard, bytes, sha256);
    if (listed && line) x->entry = *line;
    else if (listed && bytes != x->entry.bytes) note(x, fail(ERR_INPUT, "%s: is %lld bytes, the journal says %lld", path, (long long)bytes, (long long)x->entry.bytes));
    else if (listed) note(x, fail(ERR_INPUT, "%s: its SHA-256 is %.16s..., the journal says %.16s...: the file is damaged", path, sha256, x->entry.sha256));
    rc = shard_file_open(&f, path, &s->m, s->id, x->shard, -1);
    if (rc != OK) { note(x, rc); goto out; }
    if (bytes > (int64_t)shard_bytes(&s->m, x->shard)) note(x, fail(ERR_INPUT, "%s: has %lld bytes, too many", path, (long long)bytes));
    for (int64_t r = 0; r < shard_rows(&s->m, x->shard); r++) {
        rc = shard_file_read(&f, &s->m, r, true, &row);
        if (rc != OK) { note(x, rc); continue; }
        x->rows++;
        for (int64_t t = 0; t < s->m.row_length; t++) targets += row.loss_mask[t];
    }
    if (!x->bad && listed && targets != x->entry.targets)
        note(x, fail(ERR_INPUT, "%s: has %lld supervised positions, the journal says %lld", path, (long long)targets, (long long)x->entry.targets));
    if (!listed) {
        x->entry = (struct shard_entry){.shard = x->shard, .rows = shard_rows(&s->m, x->shard), .targets = targets, .bytes = bytes};
        x->entry.tokens = x->entry.rows * s->m.row_length;
        memcpy(x->entry.sha256, sha256, SHA256_HEX);
        if (!x->bad) note(x, fail(OK, "%s: is whole and not in the journal; the next teacher-dump or --repair enters it", path));
    }
out:
    shard_file_close(&f);
    shard_row_free(&row);
    free(path);
}

/* ---- the directory ---- */

static int shards_list(struct scrub *s)
{
    int rc = OK, n = 0;
    char **names = NULL;
    if (!path_is_dir(s->shards)) return OK;
    TRY(dir_list(s->shards, &names, &n));
    for (int i = 0; i < n; i++) {
        int64_t shard = shard_name_parse(names[i]);
        if (shard >= 0 && shard < shard_count(&s->m)) subject_for(s, shard);
    }
    s->beyond = xcalloc((size_t)n, sizeof *s->beyond);
    for (int i = 0; i < n; i++)
        if (shard_name_parse(names[i]) >= shard_count(&s->m)) s->beyond[s->n_beyond++].name = xstrdup(names[i]);
out:
    names_free(names, n);
    return rc;
}

static int others_tell(struct scrub *s)
{
    int rc = OK, n = 0;
    char **names = NULL;
    if (!path_is_dir(s->shards)) return OK;
    TRY(dir_list(s->shards, &names, &n));
    for (int i = 0; i < n; i++) {
        int64_t shard = shard_name_parse(names[i]);
        if (shard >= 0 && shard < shard_count(&s->m)) continue;
        const char *what = shard >= 0 ? "is beyond the last shard of the manifest: it belongs to another dataset"
                           : !strncmp(names[i], ".tmp-", 5) ? "is being written, or was left by a writer that died"
                           : strstr(names[i], ".quarantine") ? "was set aside before" : "is no file of the format; readers ignore it";
        char *text = xasprintf("%s/%s: %s", s->shards, names[i], what);
        tell(s, -1, shard >= 0 ? ERR_MISMATCH : OK, text);
        free(text);
    }
out:
    names_free(names, n);
    return rc;
}

static int by_shard(const void *a, const void *b)
{
    const struct subject *x = a, *y = b;
    return (x->shard > y->shard) - (x->shard < y->shard);
}

/* "3, 7-9": the shards that are neither listed nor there. */
static void missing_tell(struct scrub *s)
{
    char list[400] = "";
    int64_t count = shard_count(&s->m);
    for (int64_t i = 0, end; i < count; i = end) {
        end = i + 1;
        if (s->subject_of[i]) continue;
        while (end < count && !s->subject_of[end]) end++;
        s->out->missing += end - i;
        size_t n = strlen(list);
        if (n > sizeof list - 60) { if (strcmp(list + n - 3, "...")) strcat(list, ", ..."); continue; }
        snprintf(list + n, sizeof list - n, end - i > 1 ? "%s%lld-%lld" : "%s%lld", n ? ", " : "", (long long)i, (long long)(end - 1));
    }
    if (!s->out->missing) return;
    char *text = xasprintf("%s: %lld of %lld shards are not made yet: %s", s->dir, (long long)s->out->missing, (long long)count, list);
    tell(s, -1, OK, text);
    free(text);
}

static int survey(struct scrub *s)
{
    int rc = OK;
    int64_t torn;
    TRY(journal_scan(s->journal, &s->m, s->id, on_line, s, &torn));
    if (torn) {
        char *text = xasprintf("%s: ends with %lld bytes of an unfinished line, which does not count", s->journal, (long long)torn);
        tell(s, -1, OK, text);
        free(text);
    }
    journal_judge(s);
    s->out->sealed = s->n_subjects;
    TRY(shards_list(s));
    qsort(s->subjects, (size_t)s->n_subjects, sizeof *s->subjects, by_shard);
    for (int64_t i = 0; i < s->n_subjects; i++) s->subject_of[s->subjects[i].shard] = i + 1;
    int64_t row = (int64_t)shard_bytes(&s->m, 0) / shard_rows(&s->m, 0), room = ROWS_BYTES / (row ? row : 1), done = 0;   /* every thread holds one row */
    int threads = omp_get_max_threads() < room ? omp_get_max_threads() : room > 1 ? (int)room : 1;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < s->n_subjects; i++) {
        shard_judge(s, &s->subjects[i]);
#pragma omp critical
        if (s->progress) s->progress(s->context, ++done, s->n_subjects);
    }
    for (int64_t i = 0; i < s->n_subjects; i++) {
        const struct subject *x = &s->subjects[i];
        s->out->unreadable += x->unreadable;
        for (int f = 0; f < x->n; f++) tell(s, x->shard, x->findings[f].status, x->findings[f].text);
        if (x->more) {
            char *text = xasprintf("%s/shard-%06lld.h5: %d more faults", s->shards, (long long)x->shard, x->more);
            s->out->faults += x->more - 1;
            tell(s, x->shard, ERR_INPUT, text);
            free(text);
        }
        s->out->rows += x->rows;
        s->out->sound += !x->bad;
    }
    TRY(others_tell(s));
    missing_tell(s);
out:
    return rc;
}

/* ---- repair ---- */

static int set_aside(struct scrub *s, const char *path, int64_t shard)
{
    int rc = OK;
    char *aside = quarantine_name(path), *text = xasprintf("%s: set aside as %s", path, aside);
    TRY(FAILPOINT("repair.rename"));
    if (rename(path, aside)) { rc = fail_errno(ERR_IO, "%s: cannot rename to %s", path, aside); goto out; }
    s->out->aside++;
    tell(s, shard, OK, text);
out:
    free(aside);
    free(text);
    return rc;
}

/* Good lines in their order, then what had none. *same: nothing would change; *kept: every old line is in it. */
static struct shard_entry *entries_new(const struct scrub *s, int64_t *n, bool *same, bool *kept)
{
    struct shard_entry *e = xcalloc((size_t)(s->n_subjects ? s->n_subjects : 1), sizeof *e);
    bool *done = xcalloc((size_t)(s->n_subjects ? s->n_subjects : 1), sizeof *done);
    *n = 0;
    *kept = !s->journal_broken;
    for (int64_t i = 0; i < s->n_lines; i++) {
        int64_t x = s->subject_of[s->lines[i].shard] - 1;
        if (s->subjects[x].bad) *kept = false;
        if (s->subjects[x].bad || done[x]) continue;
        e[(*n)++] = s->subjects[x].entry;
        done[x] = true;
    }
    *same = *kept;
    for (int64_t x = 0; x < s->n_subjects; x++)
        if (!done[x] && !s->subjects[x].bad) {
            e[(*n)++] = s->subjects[x].entry;
            s->out->adopted++;
            *same = false;
        }
    free(done);
    return e;
}

static int journal_rewrite(struct scrub *s)
{
    int rc = OK;
    int64_t n;
    bool same, kept;
    size_t bytes;
    struct shard_entry *e = entries_new(s, &n, &same, &kept);
    char *text = journal_text(e, n, s->id, &bytes), *aside = quarantine_name(s->journal);
    if (same) goto out;
    TRY(FAILPOINT("repair.before"));
    if (!kept && path_exists(s->journal)) {
        TRY(file_copy(s->journal, aside));
        char *line = xasprintf("%s: the old one is kept as %s", s->journal, aside);
        tell(s, -1, OK, line);
        free(line);
    }
    TRY(FAILPOINT("repair.kept"));
    TRY(file_replace(s->journal, text, bytes));
    TRY(FAILPOINT("repair.journal"));
out:
    free(aside);
    free(text);
    free(e);
    return rc;
}

static int repair(struct scrub *s)
{
    int rc = OK;
    char *path = NULL;
    if (s->out->unreadable) { rc = fail(ERR_IO, "%s: %lld shards could not be read, which does not say that they are broken; nothing was changed", s->dir, (long long)s->out->unreadable); goto out; }
    TRY(journal_rewrite(s));
    for (int64_t i = 0; i < s->n_subjects; i++) {
        if (!s->subjects[i].bad || !s->subjects[i].present) continue;
        free(path);
        path = shard_path(s->dir, s->subjects[i].shard);
        TRY(set_aside(s, path, s->subjects[i].shard));
    }
    for (int i = 0; i < s->n_beyond; i++) {
        free(path);
        path = path_join(s->shards, s->beyond[i].name);
        TRY(set_aside(s, path, -1));
    }
    if (s->out->aside) TRY(file_sync_dir(s->shards));
out:
    free(path);
    return rc;
}

int shard_dataset_scrub(const char *dir, bool mend, shard_found *found, void (*progress)(void *context, int64_t done, int64_t all), void *context, struct shard_scrub *out)
{
    int rc = OK;
    struct shard_claims claims = {.fd = -1};
    struct scrub s = {.dir = dir, .shards = path_join(dir, "shards"), .journal = path_join(dir, "journal.jsonl"), .found = found, .progress = progress, .context = context, .out = out};
    *out = (struct shard_scrub){0};
    if (mend) TRY(claims_open(&claims, dir, CLAIMS_ALONE));
    rc = manifest_read(dir, &s.m, s.id);
    if (rc == ERR_INPUT) {                        /* nothing else can be judged without it, or mended */
        tell(&s, -1, rc, fail_message());
        rc = OK;
        goto out;
    }
    if (rc != OK) goto out;
    s.subject_of = xcalloc((size_t)shard_count(&s.m), sizeof *s.subject_of);
    TRY(survey(&s));
    if (mend) TRY(repair(&s));
    out->mended = mend;
out:
    for (int64_t i = 0; i < s.n_subjects; i++)
        for (int f = 0; f < s.subjects[i].n; f++) free(s.subjects[i].findings[f].text);
    for (int i = 0; i < s.n_beyond; i++) free(s.beyond[i].name);
    free(s.beyond);
    free(s.subjects);
    free(s.subject_of);
    free(s.lines);
    free(s.journal);
    free(s.shards);
    claims_close(&claims);
    return rc;
}
