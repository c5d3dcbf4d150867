/* Shards: what is read is what was put, whatever happens in between is either undone at the next start or reported. */
#include <criterion/criterion.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <hdf5.h>
#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "base/failpoint.h"
#include "data/shard_internal.h"
#include "tests/data/shard_fixture.h"

static char *base;            /* this test's directory */
static void setup(void) { base = fixture_dir(); }
static void teardown(void)
{
    failpoint_set(NULL);
    dir_remove_tree(base);
    free(base);
}
TestSuite(shard, .init = setup, .fini = teardown, .timeout = 300);

#define OK_OR_DIE(call) cr_assert_eq((call), OK, "%s", fail_message())
#define FAILS(call, code, part) do { \
    int status_ = (call); \
    cr_assert_eq(status_, code, "status %d: %s", status_, fail_message()); \
    cr_assert(strstr(fail_message(), part), "\"%s\" is not in: %s", part, fail_message()); \
} while (0)

static char *dataset_new(const char *name, const struct shard_manifest *m)
{
    char *dir = path_join(base, name);
    OK_OR_DIE(fixture_dump(dir, m));
    return dir;
}

static struct shard_manifest small(void) { return fixture_manifest(SHARD_TOPK, 5, 2, 12, 300, 5); }

static void same_tree(const char *a, const char *b, const char *why)
{
    char *different = tree_difference(a, b);
    cr_assert_null(different, "%s: %s differs", why, different);
}

static uint8_t *slurp(const char *dir, const char *name, size_t *bytes, char **path)
{
    char *data;
    *path = path_join(dir, name);
    OK_OR_DIE(file_read(*path, (size_t)1 << 30, &data, bytes));
    return (uint8_t *)data;
}

static void spit(const char *path, const void *data, size_t bytes)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    cr_assert(fd >= 0 && file_write_all(fd, data, bytes, path) == OK);
    close(fd);
}

static int read_everything(const char *dir, bool hash)
{
    int rc = OK;
    struct shard_dataset *d = NULL;
    struct shard_row row = {0};
    TRY(shard_dataset_open(&d, dir));
    shard_dataset_verify_on_touch(d, hash);
    shard_row_alloc(&row, shard_dataset_manifest(d));
    for (int64_t r = 0; r < shard_dataset_manifest(d)->rows; r++) TRY(shard_dataset_read(d, r, &row));
out:
    shard_row_free(&row);
    shard_dataset_close(d);
    return rc;
}

static int verify(const char *dir)
{
    struct shard_dataset *d = NULL;
    int rc = shard_dataset_open(&d, dir);
    if (rc == OK) rc = shard_dataset_verify(d);
    shard_dataset_close(d);
    return rc;
}

/* ---- content ---- */

static void round_trip(const char *name, struct shard_manifest m)
{
    char *dir = dataset_new(name, &m), *again = path_join(base, "again");
    struct shard_dataset *d;
    struct shard_row want, got;
    const struct shard_entry *entries;
    int64_t sealed, L = m.row_length;
    OK_OR_DIE(shard_dataset_open(&d, dir));
    OK_OR_DIE(shard_dataset_refresh(d, &sealed));
    cr_assert_eq(sealed, shard_count(&m));
    cr_assert_eq(shard_dataset_entries(d, &entries), sealed);
    OK_OR_DIE(shard_dataset_check_files(d));
    OK_OR_DIE(shard_dataset_verify(d));
    shard_row_alloc(&want, &m);
    shard_row_alloc(&got, &m);
    for (int64_t r = m.rows - 1; r >= 0; r--) {
        fixture_row(&m, r, &want);
        OK_OR_DIE(shard_dataset_read(d, r, &got));
#define SAME(f, n) cr_assert(memcmp(want.f, got.f, (size_t)(n) * sizeof *want.f) == 0, "%s: row %lld: " #f, name, (long long)r)
        SAME(tokens, L); SAME(loss_mask, L); SAME(document, L); SAME(entropy, L); SAME(label_logprob, L); SAME(lse, L * m.n_temperatures);
        if (m.kind == SHARD_TOPK) { SAME(tail, L * m.n_temperatures); SAME(head_ids, L * m.k); SAME(head_logprob, L * m.k); }
        else SAME(logits, L * m.valid_vocab);
    }
    const struct shard_manifest *back = shard_dataset_manifest(d);
    OK_OR_DIE(manifest_same(dir, back, &m));
    cr_assert_str_eq(back->teacher_name, m.teacher_name);
    cr_assert_eq(back->seed, m.seed);
    cr_assert(!memcmp(back->temperatures, m.temperatures, sizeof m.temperatures));
    for (int64_t i = 0; i < sealed; i++) {
        char *path = shard_dataset_path(d, entries[i].shard), hex[SHA256_HEX];
        cr_assert_eq(path_size(path), entries[i].bytes);
        cr_assert_leq((size_t)entries[i].bytes, shard_bytes(&m, entries[i].shard));
        OK_OR_DIE(sha256_of_file(path, hex));
        cr_assert_str_eq(hex, entries[i].sha256);
        free(path);
    }
    shard_dataset_close(d);
    shard_row_free(&want);
    shard_row_free(&got);
    OK_OR_DIE(fixture_dump(again, &m));
    same_tree(dir, again, "written twice");
    OK_OR_DIE(fixture_dump(dir, &m));                             /* nothing left to do: nothing changes */
    same_tree(dir, again, "opened again");
    dir_remove_tree(again);
    free(again);
    free(dir);
}

Test(shard, round_trip)
{
    round_trip("topk", small());
    round_trip("k4", fixture_manifest(SHARD_TOPK, 4, 4, 9, 50, 4));
    round_trip("ids18", fixture_manifest(SHARD_TOPK, 2, 1, 4, SHARD_MAX_VOCAB, 7));    /* both high bits */
    round_trip("whole", fixture_manifest(SHARD_TOPK, 3, 1, 6, 11, 11));                /* the head holds everything: tail -inf */
    round_trip("k1", fixture_manifest(SHARD_TOPK, 1, 1, 2, 2, 1));
    round_trip("full", fixture_manifest(SHARD_FULL, 5, 2, 12, 37, 0));
    struct shard_manifest hot = small();
    hot.n_temperatures = 1;
    hot.temperatures[0] = 20;
    hot.temperatures[1] = hot.temperatures[2] = 0;
    round_trip("hot", hot);
}

Test(shard, data_begin_at_pages)
{
    struct shard_manifest m = fixture_manifest(SHARD_TOPK, 4, 4, 1100, 64, 9);
    char *dir = dataset_new("pages", &m), *path = shard_path(dir, 0), id[SHA256_HEX];
    struct shard_file f;
    struct shard_layout layout[SHARD_FIELDS];
    OK_OR_DIE(manifest_read(dir, &m, id));
    OK_OR_DIE(shard_file_open(&f, path, &m, id, 0, -1));
    shard_layout(&m, layout);
    int64_t data = 0;
    for (int i = 0; i < SHARD_FIELDS; i++) {
        if (layout[i].row_bytes * m.rows >= SHARD_ALIGNMENT) cr_assert_eq(f.offset[i] % SHARD_ALIGNMENT, 0, "%s at %lld", layout[i].name, (long long)f.offset[i]);
        data += layout[i].row_bytes * m.rows;
    }
    cr_assert_leq(f.bytes - data, (SHARD_FIELDS + 2) * SHARD_ALIGNMENT);
    shard_file_close(&f);
    free(path);
    free(dir);
}

/* An independent reader, when Python with h5py is there. */
Test(shard, h5py_reads_everything)
{
    const char *candidates[] = {getenv("DISTILL_PYTHON"), "python3", "/usr/bin/python3"}, *python = NULL;
    for (int i = 0; i < 3 && !python; i++) {
        char *probe = candidates[i] ? xasprintf("%s -c 'import h5py, numpy' 2>/dev/null", candidates[i]) : NULL;
        if (probe && system(probe) == 0) python = candidates[i];
        free(probe);
    }
    if (!python) cr_skip_test("SKIPPED: no python3 with h5py and numpy; name one in DISTILL_PYTHON");
    struct shard_manifest kinds[] = {small(), fixture_manifest(SHARD_FULL, 5, 2, 12, 37, 0), fixture_manifest(SHARD_TOPK, 2, 1, 4, SHARD_MAX_VOCAB, 7)};
    for (int i = 0; i < 3; i++) {
        char *dir = dataset_new(i == 0 ? "a" : i == 1 ? "b" : "c", &kinds[i]);
        char *command = xasprintf("%s %s/scripts/read_shards.py --row 1 %s > %s/out", python, SOURCE_ROOT, dir, base);
        cr_assert_eq(system(command), 0, "%s", command);
        free(command);
        free(dir);
    }
}

/* ---- deaths and failures ---- */

/* The dump in a child with `spec` armed; its exit status, or -signal. */
static int dump_under(const char *dir, const struct shard_manifest *m, const char *spec)
{
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        int rc = failpoint_set(spec);
        if (rc == OK) rc = fixture_dump(dir, m);
        if (rc != OK && !strstr(fail_message(), "fail point") && !strstr(fail_message(), dir)) rc = 99;   /* a message names its object */
        _exit(rc);
    }
    int status;
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static int temporary_files(const char *dir)
{
    char *shards = path_join(dir, "shards"), **names = NULL;
    int n = 0, found = 0;
    if (path_is_dir(shards)) OK_OR_DIE(dir_list(shards, &names, &n));
    for (int i = 0; i < n; i++) found += names[i][0] == '.';
    names_free(names, n);
    free(shards);
    return found;
}

static const char *const points[] = {"manifest.before", "manifest.after", "shard.before_write", "shard.skeleton", "shard.write", "shard.after_write",
                                     "shard.read_back", "shard.verified", "shard.sync", "shard.close", "shard.before_rename", "shard.rename", "shard.after_rename",
                                     "shard.dir_sync", "journal.before", "journal.torn", "journal.written", "journal.sync", "journal.after"};

/* Every point, at its n-th passing for every n until none is left; killed, failed once, failed from then on; each time the next
 * start ends in the bytes of an uninterrupted run. What is sealed is readable in between. */
Test(shard, every_failpoint)
{
    struct shard_manifest m = small();
    char *reference = dataset_new("reference", &m), *dir = path_join(base, "dir");
    int kills = 0, failures = 0;
    for (size_t p = 0; p < sizeof points / sizeof *points; p++) {
        const char *actions[] = {"kill", "error", "enospc"};
        for (int a = 0; a < 3; a++) {
            bool fired = true;
            for (int n = 1; fired; n++) {
                char *spec = xasprintf("%s:%s@%d%s", points[p], actions[a], n, a == 2 ? "+" : "");
                int status = dump_under(dir, &m, spec);
                fired = status != OK;
                cr_assert(n > 1 || fired, "%s never fires", spec);
                cr_assert(status == OK || status == (a == 0 ? -SIGKILL : ERR_IO), "%s: status %d", spec, status);
                kills += status == -SIGKILL;
                failures += status == ERR_IO;
                if (status == ERR_IO) cr_assert_eq(temporary_files(dir), 0, "%s left a temporary file", spec);
                if (path_exists(path_join(dir, "journal.jsonl"))) OK_OR_DIE(verify(dir));
                cr_assert_eq(dump_under(dir, &m, ""), OK, "%s: restart", spec);
                same_tree(reference, dir, spec);
                dir_remove_tree(dir);
                free(spec);
            }
        }
    }
    cr_log_info("%d kills, %d failures\n", kills, failures);
    cr_assert_geq(kills, 60);
    cr_assert_geq(failures, 100);
}

/* Killed again and again on the way: no progress is lost, and the end is the same. */
Test(shard, killed_many_times)
{
    struct shard_manifest m = fixture_manifest(SHARD_TOPK, 12, 1, 6, 40, 3);
    char *reference = dataset_new("reference", &m), *dir = path_join(base, "dir");
    int kills = 0;
    for (size_t p = 0; p < 3 * sizeof points / sizeof *points; p++) {
        char *spec = xasprintf("%s:kill@%d", points[p % (sizeof points / sizeof *points)], 1 + (int)(p % 2));
        kills += dump_under(dir, &m, spec) == -SIGKILL;
        free(spec);
    }
    cr_assert_geq(kills, 10);
    cr_assert_eq(dump_under(dir, &m, ""), OK);
    same_tree(reference, dir, "after many kills");
}

/* At no chosen point: whenever the signal lands. */
Test(shard, killed_at_random)
{
    struct shard_manifest m = fixture_manifest(SHARD_TOPK, 40, 1, 6, 40, 3);
    char *reference = dataset_new("reference", &m), *dir = path_join(base, "dir");
    int kills = 0, status;
    for (int i = 0; i < 40; i++) {
        fflush(NULL);
        pid_t pid = fork();
        if (pid == 0) _exit(fixture_dump(dir, &m));
        usleep(philox4x32(1, 2, (uint64_t)i).v[0] % 20000);
        kill(pid, SIGKILL);
        waitpid(pid, &status, 0);
        kills += WIFSIGNALED(status);
    }
    cr_assert_eq(dump_under(dir, &m, ""), OK);
    same_tree(reference, dir, "after random kills");
    cr_log_info("%d random kills\n", kills);
}

Test(shard, seal_failure_stops_the_writer)
{
    struct shard_manifest m = small();
    struct shard_writer *w;
    struct shard_row row;
    char *dir = path_join(base, "d");
    shard_row_alloc(&row, &m);
    OK_OR_DIE(shard_writer_open(&w, dir, &m));
    OK_OR_DIE(shard_writer_begin(w, 0));
    for (int64_t i = 0; i < 2; i++) { fixture_row(&m, i, &row); OK_OR_DIE(shard_writer_put(w, &row)); }
    failpoint_set("shard.write:enospc@3");
    FAILS(shard_writer_seal(w), ERR_IO, "No space left on device");
    cr_assert(strstr(fail_message(), dir) && strstr(fail_message(), " bytes"), "%s", fail_message());
    FAILS(shard_writer_begin(w, 0), ERR_IO, "start again");
    shard_writer_close(w);
    failpoint_set("writer.probe:error");
    FAILS(shard_writer_open(&w, dir, &m), ERR_IO, "cannot write files here");
    failpoint_set(NULL);
    char *file = path_join(base, "file"), *below = path_join(file, "data");
    spit(file, "x", 1);
    FAILS(shard_writer_open(&w, file, &m), ERR_IO, "not a directory");
    FAILS(shard_writer_open(&w, below, &m), ERR_IO, "file");
    shard_row_free(&row);
}

/* ---- locks, manifests ---- */

Test(shard, one_writer)
{
    struct shard_manifest m = small();
    struct shard_writer *w, *second;
    char *dir = path_join(base, "d"), pid[32];
    int ready[2];
    OK_OR_DIE(shard_writer_open(&w, dir, &m));
    snprintf(pid, sizeof pid, "(pid %d)", (int)getpid());
    FAILS(shard_writer_open(&second, dir, &m), ERR_IO, pid);
    cr_assert_eq(dump_under(dir, &m, ""), ERR_IO);
    shard_writer_close(w);
    cr_assert_eq(pipe(ready), 0);
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        char c = (char)shard_writer_open(&w, dir, &m);
        if (write(ready[1], &c, 1) == 1) pause();
        _exit(0);
    }
    char c = 99;
    cr_assert(read(ready[0], &c, 1) == 1 && c == OK);
    FAILS(shard_writer_open(&second, dir, &m), ERR_IO, "another process");
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    OK_OR_DIE(shard_writer_open(&second, dir, &m));               /* the lock died with its owner */
    shard_writer_close(second);
}

Test(shard, another_manifest)
{
    struct shard_manifest m = small(), other;
    struct shard_writer *w;
    char *dir = dataset_new("d", &m);
#define DIFFERENT(change, part) do { other = m; change; FAILS(shard_writer_open(&w, dir, &other), ERR_MISMATCH, part); } while (0)
    DIFFERENT(other.k = 4, "k 5, this run has 4");
    DIFFERENT(other.rows = 6, "rows 5, this run has 6");
    DIFFERENT(other.kind = SHARD_FULL; other.k = 0, "kind \"topk\", this run has \"full\"");
    DIFFERENT(other.temperatures[1] = 0.75f, "temperatures [1.0,0.7,3.0], this run has [1.0,0.75,3.0]");
    DIFFERENT(other.seed++, "seed \"18364758544493064720\", this run has \"18364758544493064721\"");
    DIFFERENT(memset(other.teacher_weights_hash, 'b', 64), "teacher_weights_hash \"\"");
    DIFFERENT(other.corpus_hash[63] = '1', "corpus_hash");
    DIFFERENT(strcpy(other.packing, "x"), "packing");
    other = m;
    strcpy(other.teacher_name, "moved elsewhere");
    OK_OR_DIE(shard_writer_open(&w, dir, &other));
    shard_writer_close(w);
#define REFUSED(change, part) do { other = m; change; char *p_ = path_join(base, "no"); FAILS(shard_writer_open(&w, p_, &other), ERR_USAGE, part); cr_assert(!path_exists(p_)); free(p_); } while (0)
    REFUSED(other.kind = SHARD_HYBRID, "hybrid");
    REFUSED(other.kind = SHARD_SAMPLED, "sampled");
    REFUSED(other.k = 0, "k is 0");
    REFUSED(other.k = 301, "k is 301");
    REFUSED(other.k = 300, "k is 300");
    REFUSED(other.rows_per_shard = 0, "rows_per_shard");
    REFUSED(other.temperatures[2] = 1, "twice");
    REFUSED(other.temperatures[2] = NAN, "temperature");
    REFUSED(other.temperatures[2] = 0, "temperature");
    REFUSED(other.n_temperatures = 0, "temperatures");
    REFUSED(other.teacher_vocab = 299, "teacher_vocab");
    REFUSED(other.valid_vocab = SHARD_MAX_VOCAB + 1, "valid_vocab");
    REFUSED(other.corpus_hash[3] = 'X', "SHA-256");
    REFUSED(other.rows = (int64_t)1 << 40, "more than 1000000 shards");
    REFUSED(other.rows = other.rows_per_shard = (int64_t)1 << 40, "2^40");
    other = m;
    strcpy(other.teacher_name, "\xff");
    char *no = path_join(base, "no");
    FAILS(shard_writer_open(&w, no, &other), ERR_USAGE, "UTF-8");
}

/* Well-formed manifests that say what they should not: the check is made right again. */
Test(shard, hostile_manifest)
{
    static const struct { const char *from, *to, *part; } cases[] = {
        {"\"topk\"", "\"hybrid\"", "hybrid"}, {"\"topk\"", "\"sampled\"", "sampled"}, {"\"topk\"", "\"zip\"", "zip"}, {"\"k\": 5", "\"k\": 5,\n  \"zz\": 1", "zz"},
        {"\"version\": 1", "\"version\": 2", "version 2"}, {"\"rows\": 5", "\"rows\": 0", "rows"}, {"\"rows\": 5", "\"rows\": 1e3", "rows"}, {"\"rows\": 5", "\"rows\": -5", "rows"},
        {"\"rows\": 5", "\"rows\": 1000000000000", "shards"}, {"\"row_length\": 12", "\"row_length\": 1", "row_length"}, {"\"row_length\": 12", "\"row_length\": 4000000000", "row_length"},
        {"\"valid_vocab\": 300", "\"valid_vocab\": 300000", "valid_vocab"}, {"\"valid_vocab\": 300", "\"valid_vocab\": 4", "k is 5"}, {"0.7", "\"0.7\"", "temperature"}, {"0.7", "-0.7", "temperature"},
        {"0.7", "1e999", "JSON"}, {"0.7", "1e300", "temperature"}, {"\"seed\": \"", "\"seed\": \"0", "seed"}, {"\"seed\": \"", "\"seed\": \"9", "seed"}, {"\"seed\": \"", "\"seed\": \"-", "seed"},
        {"distill-logit-shards", "other", "format"}, {"\"k\": 5", "\"k\": 5,\n  \"k\": 5", "JSON"}, {"aaaa", "AAAA", "SHA-256"}, {"aaaa", "aaa", "SHA-256"}, {"\"text_bytes\": 12345", "\"text_bytes\": \"\"", "text_bytes"},
    };
    struct shard_manifest m = small();
    char *dir = dataset_new("d", &m), *path;
    size_t bytes;
    char *text = (char *)slurp(dir, "manifest.json", &bytes, &path), *key = strstr(text, ",\n  \"check\"");
    struct shard_dataset *d;
    *key = 0;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *at = strstr(text, cases[i].from);
        cr_assert(at, "%s", cases[i].from);
        char *body = xasprintf("%.*s%s%s", (int)(at - text), text, cases[i].to, at + strlen(cases[i].from));
        char *whole = xasprintf("%s,\n  \"check\": \"%08x\"\n}\n", body, crc32c(0, body, strlen(body)));
        spit(path, whole, strlen(whole));
        FAILS(shard_dataset_open(&d, dir), ERR_INPUT, cases[i].part);
        free(body);
        free(whole);
    }
    FAILS(shard_dataset_open(&d, base), ERR_INPUT, "no manifest.json");
    unlink(path);
    struct shard_writer *w;
    FAILS(shard_writer_open(&w, dir, &m), ERR_INPUT, "journal but no manifest");
}

/* ---- damage ---- */

Test(shard, truncated_anywhere)
{
    struct shard_manifest m = small();
    char *dir = dataset_new("d", &m), *path;
    size_t bytes;
    uint8_t *data = slurp(dir, "shards/shard-000001.h5", &bytes, &path);
    struct shard_dataset *d;
    for (size_t n = 0; n < bytes; n += n % 512 == 511 || n + 1 < bytes ? 61 : 1) {
        spit(path, data, n);
        FAILS(read_everything(dir, false), ERR_INPUT, "shard-000001.h5");
        FAILS(verify(dir), ERR_INPUT, "shard-000001.h5");
        OK_OR_DIE(shard_dataset_open(&d, dir));
        FAILS(shard_dataset_check_files(d), ERR_INPUT, "shard-000001.h5");
        shard_dataset_close(d);
    }
    data = realloc(data, bytes + 100);
    spit(path, data, bytes + 100);                                /* garbage appended */
    FAILS(read_everything(dir, false), ERR_INPUT, "the journal says");
    struct shard_writer *w;
    FAILS(shard_writer_open(&w, dir, &m), ERR_INPUT, "the journal says");
    unlink(path);
    FAILS(read_everything(dir, false), ERR_INPUT, "missing");
    FAILS(shard_writer_open(&w, dir, &m), ERR_INPUT, "missing");
    OK_OR_DIE(dir_make(path));
    FAILS(read_everything(dir, false), ERR_INPUT, "not a regular file");
}

/* One bit anywhere. With the hash every flip is found. Without it a row is refused or it is the row that was written. */
Test(shard, flipped_bits)
{
    struct shard_manifest m = small();
    char *dir = dataset_new("d", &m), *path, *hash_message = "SHA-256";
    size_t bytes;
    uint8_t *data = slurp(dir, "shards/shard-000000.h5", &bytes, &path);
    struct shard_row want[2], got;
    int refused = 0, harmless = 0;
    for (int i = 0; i < 2; i++) { shard_row_alloc(&want[i], &m); fixture_row(&m, i, &want[i]); }
    shard_row_alloc(&got, &m);
    for (size_t n = 0; n < bytes; n++) {
        struct shard_dataset *d;
        data[n] ^= (uint8_t)(1 << n % 8);
        int fd = open(path, O_WRONLY);
        cr_assert(pwrite(fd, data + n, 1, (off_t)n) == 1);
        if (n % 16 == 0) {
            FAILS(read_everything(dir, true), ERR_INPUT, hash_message);
            FAILS(verify(dir), ERR_INPUT, hash_message);
        }
        OK_OR_DIE(shard_dataset_open(&d, dir));
        for (int i = 0; i < 2; i++) {
            int rc = shard_dataset_read(d, i, &got);
            cr_assert(rc == OK || rc == ERR_INPUT || rc == ERR_MISMATCH, "byte %zu: %d: %s", n, rc, fail_message());
            refused += rc != OK;
            if (rc != OK) continue;
            harmless++;
            cr_assert(!memcmp(got.tokens, want[i].tokens, 4 * (size_t)m.row_length) && !memcmp(got.head_ids, want[i].head_ids, 4 * (size_t)(m.row_length * m.k)) &&
                      !memcmp(got.head_logprob, want[i].head_logprob, 2 * (size_t)(m.row_length * m.k)) && !memcmp(got.lse, want[i].lse, 4 * (size_t)(m.row_length * 3)) &&
                      !memcmp(got.tail, want[i].tail, 4 * (size_t)(m.row_length * 3)) && !memcmp(got.loss_mask, want[i].loss_mask, (size_t)m.row_length), "byte %zu: silently wrong", n);
        }
        shard_dataset_close(d);
        data[n] ^= (uint8_t)(1 << n % 8);
        cr_assert(pwrite(fd, data + n, 1, (off_t)n) == 1);
        close(fd);
    }
    cr_log_info("%zu flips: %d rows refused, %d right\n", bytes, refused, harmless);
    OK_OR_DIE(verify(dir));
}

Test(shard, flipped_bits_in_text)
{
    struct shard_manifest m = small();
    char *dir = dataset_new("d", &m);
    const char *names[] = {"manifest.json", "journal.jsonl"};
    for (int f = 0; f < 2; f++) {
        char *path;
        size_t bytes;
        uint8_t *data = slurp(dir, names[f], &bytes, &path);
        for (size_t n = 0; n < bytes; n++)
            for (int bit = 0; bit < 8; bit++) {
                data[n] ^= (uint8_t)(1 << bit);
                spit(path, data, bytes);
                int rc = verify(dir), incomplete = 0;
                if (rc == OK) {                                   /* the last newline is what makes the last line count */
                    struct shard_dataset *d;
                    int64_t sealed;
                    OK_OR_DIE(shard_dataset_open(&d, dir));
                    OK_OR_DIE(shard_dataset_refresh(d, &sealed));
                    incomplete = sealed == shard_count(&m) - 1 && f == 1 && n == bytes - 1;
                    shard_dataset_close(d);
                }
                cr_assert(rc == ERR_INPUT || incomplete, "%s: byte %zu bit %d: %d", names[f], n, bit, rc);
                if (rc == ERR_INPUT) cr_assert(strstr(fail_message(), names[f]), "%s", fail_message());
                data[n] ^= (uint8_t)(1 << bit);
            }
        spit(path, data, bytes);
    }
    char *path;
    size_t bytes;
    uint8_t *data = slurp(dir, "manifest.json", &bytes, &path);
    for (size_t n = 0; n < bytes; n++) {
        spit(path, data, n);
        FAILS(verify(dir), ERR_INPUT, "manifest.json");
    }
}

Test(shard, journal_lines)
{
    struct shard_manifest m = small();
    char *dir = dataset_new("d", &m), *copy = dataset_new("copy", &m), *path, *lines[3];
    size_t bytes, begin[4] = {0};
    char *text = (char *)slurp(dir, "journal.jsonl", &bytes, &path);
    struct shard_dataset *d;
    int64_t sealed;
    for (int i = 0; i < 3; i++) {
        begin[i + 1] = (size_t)(strchr(text + begin[i], '\n') - text) + 1;
        lines[i] = xstrndup(text + begin[i], begin[i + 1] - begin[i]);
    }
    for (size_t n = 0; n < bytes; n++) {                          /* torn anywhere: whole lines count, the rest does not, and the writer mends it */
        spit(path, text, n);
        OK_OR_DIE(shard_dataset_open(&d, dir));
        OK_OR_DIE(shard_dataset_refresh(d, &sealed));
        cr_assert_eq(sealed, n >= begin[2] ? 2 : n >= begin[1] ? 1 : 0);
        if (n % 40 == 0) {
            OK_OR_DIE(fixture_dump(dir, &m));
            same_tree(dir, copy, "mended journal");
            OK_OR_DIE(shard_dataset_refresh(d, &sealed));         /* a reader that was there all along sees it */
            cr_assert_eq(sealed, 3);
        }
        shard_dataset_close(d);
    }
    static const int orders[][4] = {{1, 0, 2, -1}, {0, 2, -1}, {0, 2, 1, -1}, {0, 0, 1, -1}, {1, -1}};
    for (size_t o = 0; o < 5; o++) {
        char whole[2048] = "";
        for (int i = 0; orders[o][i] >= 0; i++) strcat(whole, lines[orders[o][i]]);
        spit(path, whole, strlen(whole));
        FAILS(shard_dataset_open(&d, dir), ERR_INPUT, "does not follow");
        struct shard_writer *w;
        FAILS(shard_writer_open(&w, dir, &m), ERR_INPUT, "does not follow");
    }
    char *torn_middle = xasprintf("%.*s\n%s", 50, lines[0], lines[1]);
    spit(path, torn_middle, strlen(torn_middle));
    FAILS(shard_dataset_open(&d, dir), ERR_INPUT, "broken");
    spit(path, text, bytes);
    OK_OR_DIE(shard_dataset_open(&d, dir));
    spit(path, text, begin[1]);
    FAILS(shard_dataset_refresh(d, &sealed), ERR_INPUT, "lost lines");
    shard_dataset_close(d);
    char *noise = xcalloc(1, 4000);
    spit(path, noise, 600);
    FAILS(shard_dataset_open(&d, dir), ERR_INPUT, "no line");
    spit(path, noise, 100);                                       /* as after a power cut: the size was kept, the data were not */
    OK_OR_DIE(fixture_dump(dir, &m));
    same_tree(dir, copy, "zeros for a journal");
}

/* Lines whose chain and crc are right and whose content is not. */
Test(shard, hostile_journal)
{
    struct shard_manifest m = small();
    char *dir = dataset_new("d", &m), *path = path_join(dir, "journal.jsonl"), id[SHA256_HEX];
    struct shard_dataset *d;
    struct journal good, j;
    OK_OR_DIE(manifest_read(dir, &m, id));
    journal_init(&good, dir, &m, id);
    OK_OR_DIE(journal_refresh(&good, &m));
#define LINES(first, second, code, part) do { \
        struct shard_entry a = good.entries[0], b = good.entries[1]; \
        (void)a; (void)b; first; second; \
        unlink(path); \
        int fd = open(path, O_WRONLY | O_CREAT | O_APPEND, 0666); \
        struct shard_manifest any = m; \
        any.rows = 1000; \
        journal_init(&j, dir, &any, id); \
        int32_t *none = xcalloc(1 << 10, 4); \
        OK_OR_DIE(journal_append(&j, fd, &a)); \
        free(j.entry_of); j.entry_of = none; \
        OK_OR_DIE(journal_append(&j, fd, &b)); \
        close(fd); \
        journal_free(&j); \
        int rc = shard_dataset_open(&d, dir); \
        cr_assert_eq(rc, code, "%d: %s", rc, fail_message()); \
        if (rc) cr_assert(strstr(fail_message(), part), "%s", fail_message()); else shard_dataset_close(d); \
    } while (0)
    LINES(, , OK, "");
    LINES(, b = a, OK, "");                                                     /* twice the same: two workers */
    LINES(, (b = a, b.sha256[0] ^= 1), ERR_MISMATCH, "two runs were mixed");
    LINES(, b.shard = 3, ERR_INPUT, "does not allow");
    LINES(, b.rows = 1, ERR_INPUT, "does not allow");
    LINES(, b.tokens++, ERR_INPUT, "does not allow");
    LINES(, b.targets = 1000, ERR_INPUT, "does not allow");
    LINES(, b.bytes = 100, ERR_INPUT, "does not allow");
    LINES(, b.bytes = (int64_t)1 << 50, ERR_INPUT, "does not allow");
    journal_free(&good);
}

Test(shard, leftovers)
{
    struct shard_manifest m = small(), other = small();
    char *reference = dataset_new("reference", &m), *dir = dataset_new("d", &m), *path, *journal;
    other.seed++;
    char *foreign = dataset_new("foreign", &other);
    size_t bytes, journal_bytes;
    uint8_t *data = slurp(dir, "shards/shard-000001.h5", &bytes, &path), *text = slurp(dir, "journal.jsonl", &journal_bytes, &journal);
    char *first_end = strchr((char *)text, '\n');
    size_t first = (size_t)(first_end - (char *)text) + 1;
    char *tmp = path_join(dir, "shards/.tmp-shard-000001.h5-1"), *tmp2 = path_join(dir, "manifest.json.tmp-77"), *note = path_join(dir, "notes.txt");
    spit(tmp, "x", 1);
    spit(tmp2, "x", 1);
    spit(journal, text, first);                                   /* shards 1 and 2 lost their lines */
    OK_OR_DIE(fixture_dump(dir, &m));
    same_tree(reference, dir, "adopted");
    /* damaged, foreign, in another's place, beyond the end: set aside, dumped again */
    static const char *const aside[] = {"shards/shard-000001.h5.quarantine", "shards/shard-000001.h5.quarantine-2", "shards/shard-000001.h5.quarantine-3", "shards/shard-000009.h5.quarantine"};
    for (int i = 0; i < 4; i++) {
        char *other_path;
        size_t n = bytes;
        uint8_t *content = data;
        if (i == 1) content = slurp(foreign, "shards/shard-000001.h5", &n, &other_path);
        if (i == 2) content = slurp(dir, "shards/shard-000000.h5", &n, &other_path);
        if (i == 0) data[bytes / 2] ^= 4;
        spit(journal, text, first);
        if (i < 3) spit(path, content, n);
        else { char *beyond = path_join(dir, "shards/shard-000009.h5"); spit(beyond, data, bytes); free(beyond); }
        if (i == 0) data[bytes / 2] ^= 4;
        OK_OR_DIE(fixture_dump(dir, &m));
        char *q = path_join(dir, aside[i]);
        cr_assert_eq(path_size(q), (int64_t)n, "%s", aside[i]);
        free(q);
        OK_OR_DIE(verify(dir));
    }
    for (int i = 0; i < 4; i++) { char *q = path_join(dir, aside[i]); unlink(q); free(q); }
    same_tree(reference, dir, "after quarantine");
    spit(note, "keep me", 7);
    OK_OR_DIE(fixture_dump(dir, &m));
    cr_assert(path_exists(note));
    /* the same shard of another run under a journalled name */
    char *other_path;
    uint8_t *content = slurp(foreign, "shards/shard-000001.h5", &bytes, &other_path);
    spit(path, content, bytes);
    FAILS(read_everything(dir, false), ERR_MISMATCH, "two runs were mixed");
    FAILS(verify(dir), ERR_INPUT, "SHA-256");
    char *zero = path_join(dir, "shards/shard-000000.h5");
    spit(zero, data, path_size(zero) > 0 ? (size_t)path_size(zero) : 0);
    FAILS(read_everything(dir, false), ERR_INPUT, "its name says 0");
}

/* ---- what a row must be ---- */

/* Overwrites `bytes` of field f at element offset and makes the row's CRC right, as a hostile or buggy writer would. */
static void forge(const char *dir, const struct shard_manifest *m, int f, int64_t row, int64_t at, const void *value, size_t bytes, bool fix_crc)
{
    struct shard_layout layout[SHARD_FIELDS];
    struct shard_file file;
    char *path = shard_path(dir, 0), id[SHA256_HEX];
    struct shard_manifest read;
    shard_layout(m, layout);
    OK_OR_DIE(manifest_read(dir, &read, id));
    OK_OR_DIE(shard_file_open(&file, path, m, id, 0, -1));
    int fd = open(path, O_RDWR);
    cr_assert(pwrite(fd, value, bytes, file.offset[f] + row * layout[f].row_bytes + at) == (ssize_t)bytes);
    uint32_t crc = shard_row_crc_start(row);
    for (int i = 0; i < SHARD_ROW_CRC; i++) {
        if (!layout[i].row_bytes) continue;
        uint8_t *data = xmalloc((size_t)layout[i].row_bytes);
        cr_assert(pread(fd, data, (size_t)layout[i].row_bytes, file.offset[i] + row * layout[i].row_bytes) == layout[i].row_bytes);
        crc = crc32c(crc, data, (size_t)layout[i].row_bytes);
        free(data);
    }
    if (fix_crc) cr_assert(pwrite(fd, &crc, 4, file.offset[SHARD_ROW_CRC] + 4 * row) == 4);
    close(fd);
    shard_file_close(&file);
    free(path);
}

Test(shard, rows_out_of_range)
{
    struct shard_manifest m = fixture_manifest(SHARD_TOPK, 1, 1, 8, 300, 5), f = fixture_manifest(SHARD_FULL, 1, 1, 8, 37, 0);
    struct shard_writer *w, *wf;
    struct shard_row good, r, full;
    char *dir = path_join(base, "t"), *dir_full = path_join(base, "f");
    OK_OR_DIE(shard_writer_open(&w, dir, &m));
    OK_OR_DIE(shard_writer_open(&wf, dir_full, &f));
    shard_row_alloc(&good, &m);
    shard_row_alloc(&r, &m);
    shard_row_alloc(&full, &f);
    fixture_row(&m, 0, &good);
    int64_t on = 0, off = 7;
    while (!good.loss_mask[on]) on++;
    OK_OR_DIE(shard_writer_begin(w, 0));
#define COPY(field, n) memcpy(r.field, good.field, (size_t)(n) * sizeof *r.field)
#define BAD(change, part) do { \
        COPY(tokens, 8); COPY(loss_mask, 8); COPY(document, 8); COPY(lse, 24); COPY(tail, 24); COPY(entropy, 8); COPY(label_logprob, 8); COPY(head_ids, 40); COPY(head_logprob, 40); \
        change; FAILS(shard_writer_put(w, &r), ERR_NUMERIC, part); } while (0)
    uint16_t nan = 0x7e00, inf = 0x7c00, minus_inf = 0xfc00, half = f16_from_float(0.5f), down = f16_from_float(-3);
    BAD(r.tokens[3] = 300, "token 300");
    BAD(r.loss_mask[on] = 2, "loss_mask is 2");
    BAD(r.loss_mask[7] = 1, "document ends");
    BAD(r.document[0] = 1, "document 1");
    BAD(r.document[7] += 2, "does not follow");
    BAD(r.lse[4] = NAN, "log-sum-exp is nan");
    BAD(r.lse[0] = INFINITY, "log-sum-exp is inf");
    BAD(r.entropy[2] = nan, "entropy");
    BAD(r.entropy[2] = down, "entropy");
    BAD(r.entropy[2] = f16_from_float(6), "entropy");
    BAD(r.label_logprob[on] = nan, "label");
    BAD(r.label_logprob[on] = minus_inf, "label");
    BAD(r.label_logprob[on] = half, "label");
    BAD(r.label_logprob[off] = down, "no next token");
    BAD(r.head_ids[on * 5] = 300, "head id 300");
    BAD(r.head_ids[on * 5] = r.head_ids[on * 5 + 3], "twice");
    BAD(r.head_logprob[on * 5] = nan, "log-probability 0");
    BAD(r.head_logprob[on * 5 + 4] = minus_inf, "log-probability 4");
    BAD(r.head_logprob[on * 5] = inf, "log-probability 0");
    BAD(r.head_logprob[on * 5] = half, "log-probability 0");
    BAD(r.head_logprob[on * 5 + 1] = f16_from_float(-0.0f), "descending");
    BAD(r.head_logprob[on * 5 + 4] = f16_from_float(-9), "mass");
    BAD(r.tail[on * 3] = NAN, "tail");
    BAD(r.tail[on * 3 + 2] = 0.5f, "tail");
    BAD(r.tail[on * 3] = -INFINITY, "not 1");
    BAD(r.tail[on * 3] += 0.01f, "not 1");
    BAD(r.tail[on * 3 + 1] += 0.05f, "at temperature 0.7");
    BAD(r.lse[on * 3 + 2] += 0.05f, "at temperature 3");
    BAD(r.lse[on * 3] += 0.05f, "at temperature");
    OK_OR_DIE(shard_writer_put(w, &good));
    OK_OR_DIE(shard_writer_seal(w));
    shard_writer_close(w);
    OK_OR_DIE(shard_writer_begin(wf, 0));
    fixture_row(&f, 0, &full);
    for (on = 0; !full.loss_mask[on]; on++) {}
    uint16_t keep = full.logits[on * 37 + 3];
    full.logits[on * 37 + 3] = nan;
    FAILS(shard_writer_put(wf, &full), ERR_NUMERIC, "not finite");
    full.logits[on * 37 + 3] = keep;
    full.lse[on * 3] += 0.1f;
    FAILS(shard_writer_put(wf, &full), ERR_NUMERIC, "not 1");
    full.lse[on * 3] -= 0.1f;
    OK_OR_DIE(shard_writer_put(wf, &full));
    shard_writer_close(wf);
    /* the reader refuses the same, whatever the CRC says */
    for (on = 0; !good.loss_mask[on]; on++) {}
    uint16_t id = 0xffff;
    uint8_t high = 0xff;
    uint32_t token = 300;
    float tail = -INFINITY;
    struct { int field; int64_t at; const void *value; size_t bytes; const char *part; } forged[] = {
        {SHARD_IDS_LOW, on * 10, &id, 2, "head id 65535"}, {SHARD_IDS_HIGH, on * 2 + 1, &high, 1, "unused bits"}, {SHARD_TOKENS, 0, &token, 4, "token 300"},
        {SHARD_TAIL, on * 12, &tail, 4, "not 1"}, {SHARD_HEAD_LOGPROB, on * 10, &nan, 2, "nan"}, {SHARD_LOSS_MASK, 7, &high, 1, "loss_mask"}};
    for (size_t i = 0; i < sizeof forged / sizeof *forged; i++) {
        char *again = path_join(base, "again");
        OK_OR_DIE(fixture_dump(again, &m));
        forge(again, &m, forged[i].field, 0, forged[i].at, forged[i].value, forged[i].bytes, false);
        FAILS(read_everything(again, false), ERR_INPUT, "CRC");
        forge(again, &m, forged[i].field, 0, forged[i].at, forged[i].value, forged[i].bytes, true);
        FAILS(read_everything(again, false), ERR_INPUT, forged[i].part);
        FAILS(verify(again), ERR_INPUT, "SHA-256");
        dir_remove_tree(again);
    }
}

/* What Fletcher-32 does not see. */
Test(shard, swapped_words_zeroed_pages_swapped_rows)
{
    struct shard_manifest m = fixture_manifest(SHARD_TOPK, 8, 4, 600, 64, 4);
    char *dir = dataset_new("d", &m), *path;
    size_t bytes;
    uint8_t *data = slurp(dir, "shards/shard-000000.h5", &bytes, &path);
    int seen = 0;
    for (size_t n = 4096; n + 1 < bytes; n += 2) {
        uint8_t *p = data + n;
        if (memcmp(p, "\0\0", 2) || seen > 200) continue;
        memcpy(p, "\xff\xff", 2);
        spit(path, data, bytes);
        seen++;
        FAILS(verify(dir), ERR_INPUT, "SHA-256");
        memcpy(p, "\0\0", 2);
    }
    cr_assert_gt(seen, 100);
    struct shard_file f;
    char id[SHA256_HEX];
    struct shard_layout layout[SHARD_FIELDS];
    spit(path, data, bytes);
    OK_OR_DIE(manifest_read(dir, &m, id));
    OK_OR_DIE(shard_file_open(&f, path, &m, id, 0, -1));
    shard_layout(&m, layout);
    uint32_t zeros[1024] = {0};
    uint16_t ffff = 0xffff;
    forge(dir, &m, SHARD_TOKENS, 0, 0, zeros, 2400, false);
    FAILS(read_everything(dir, false), ERR_INPUT, "CRC");
    spit(path, data, bytes);
    forge(dir, &m, SHARD_TOKENS, 2, 2, &ffff, 2, false);          /* the high half of a token: 0 before */
    FAILS(read_everything(dir, false), ERR_INPUT, "row 2 of the shard");
    uint8_t *swapped = xmalloc(bytes);                            /* rows 0 and 1 whole, CRCs too, in each other's place */
    memcpy(swapped, data, bytes);
    for (int i = 0; i < SHARD_FIELDS; i++) {
        size_t n = (size_t)layout[i].row_bytes;
        memcpy(swapped + f.offset[i], data + f.offset[i] + n, n);
        memcpy(swapped + f.offset[i] + n, data + f.offset[i], n);
    }
    spit(path, swapped, bytes);
    FAILS(read_everything(dir, false), ERR_INPUT, "row 0 of the shard");
    shard_file_close(&f);
}

Test(shard, flaky_disk)
{
    struct shard_manifest m = small();
    char *dir = dataset_new("d", &m);
    failpoint_set("shard.read_flip:error@2");
    OK_OR_DIE(read_everything(dir, false));                       /* once wrong, then right: warned, used */
    failpoint_set("shard.read_flip:error@2,shard.read_flip_more:error@3");
    FAILS(read_everything(dir, false), ERR_IO, "reads differ");
    failpoint_set("shard.read_flip:error@2+");
    FAILS(read_everything(dir, false), ERR_INPUT, "row 1 of the shard");
    failpoint_set("shard.read_back:error@2");
    char *other = path_join(base, "other");
    FAILS(fixture_dump(other, &m), ERR_IO, "reads back differently");
}

/* ---- files that libhdf5 likes and we must not ---- */

static void attribute(hid_t file, const char *name, const char *text, int64_t value)
{
    hid_t type = text ? H5Tcopy(H5T_C_S1) : H5Tcopy(H5T_STD_I64LE), space = H5Screate(H5S_SCALAR);
    if (text) H5Tset_size(type, strlen(text));
    hid_t a = H5Acreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    H5Awrite(a, type, text ? (const void *)text : &value);
    H5Aclose(a);
    H5Sclose(space);
    H5Tclose(type);
}

enum trick { PLAIN, CHUNKED, EXTERNAL, SOFT_LINK, EXTERNAL_LINK, A_GROUP, WRONG_TYPE, OTHER_ENDIAN, WRONG_SHAPE, WRONG_RANK, EXTRA, COMPACT, LATE, ABSENT, NO_ID, VLEN_ID, TRICKS };

static void forge_file(const char *path, const struct shard_manifest *m, const char *id, enum trick trick)
{
    struct shard_layout layout[SHARD_FIELDS];
    shard_layout(m, layout);
    unlink(path);
    hid_t file = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    attribute(file, "format", SHARD_FORMAT, 0);
    attribute(file, "version", NULL, 1);
    attribute(file, "shard", NULL, 0);
    if (trick == VLEN_ID) {
        hid_t type = H5Tcopy(H5T_C_S1), space = H5Screate(H5S_SCALAR);
        H5Tset_size(type, H5T_VARIABLE);
        hid_t a = H5Acreate2(file, "dataset", type, space, H5P_DEFAULT, H5P_DEFAULT);
        H5Awrite(a, type, &id);
        H5Aclose(a);
    } else if (trick != NO_ID) attribute(file, "dataset", id, 0);
    for (int i = 0; i < SHARD_FIELDS; i++) {
        bool here = i == SHARD_LOSS_MASK;
        if (!layout[i].name || (here && trick == ABSENT)) continue;
        hsize_t dims[3] = {(hsize_t)shard_rows(m, 0), (hsize_t)layout[i].dims[0], (hsize_t)layout[i].dims[1]};
        int rank = layout[i].rank;
        hid_t type = hdf5_type(layout[i].type), plist = H5Pcreate(H5P_DATASET_CREATE);
        const char *name = layout[i].name;
        H5Pset_alloc_time(plist, here && trick == LATE ? H5D_ALLOC_TIME_LATE : H5D_ALLOC_TIME_EARLY);
        if (here && trick == CHUNKED) H5Pset_chunk(plist, rank, dims);
        if (here && trick == COMPACT) H5Pset_layout(plist, H5D_COMPACT);
        if (here && trick == EXTERNAL) H5Pset_external(plist, "/etc/passwd", 0, H5F_UNLIMITED);
        if (here && trick == WRONG_TYPE) type = H5Tcopy(H5T_STD_I8LE);
        if (i == SHARD_TOKENS && trick == OTHER_ENDIAN) type = H5Tcopy(H5T_STD_U32BE);
        if (here && trick == WRONG_SHAPE) dims[1]++;
        if (here && trick == WRONG_RANK) rank = 1;
        if (here && (trick == SOFT_LINK || trick == EXTERNAL_LINK)) name = "elsewhere";
        if (here && trick == A_GROUP) { H5Gclose(H5Gcreate2(file, name, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT)); continue; }
        hid_t space = H5Screate_simple(rank, dims, NULL), set = H5Dcreate2(file, name, type, space, H5P_DEFAULT, plist, H5P_DEFAULT);
        if (here && trick == SOFT_LINK) H5Lcreate_soft("/elsewhere", file, layout[i].name, H5P_DEFAULT, H5P_DEFAULT);
        if (here && trick == EXTERNAL_LINK) H5Lcreate_external(path, "/elsewhere", file, layout[i].name, H5P_DEFAULT, H5P_DEFAULT);
        if (here && trick == EXTRA) H5Lcreate_hard(file, name, file, "more", H5P_DEFAULT, H5P_DEFAULT);
        H5Dclose(set);
        H5Sclose(space);
        H5Pclose(plist);
        H5Tclose(type);
    }
    H5Fclose(file);
}

Test(shard, forged_structure)
{
    static const char *const parts[TRICKS] = {NULL, "one piece", "one piece", "missing", "missing", "missing", "another type", "another type", "of rank 2", "of rank 1", "does not name",
                                              "one piece", "lie within", "missing", "which dataset", "which dataset"};
    struct shard_manifest m = small();
    char *dir = dataset_new("d", &m), *path = path_join(base, "forged.h5"), id[SHA256_HEX];
    struct shard_file f;
    OK_OR_DIE(manifest_read(dir, &m, id));
    for (int t = 0; t < TRICKS; t++) {
        forge_file(path, &m, id, (enum trick)t);
        int rc = shard_file_open(&f, path, &m, id, 0, -1);
        cr_assert_eq(rc, parts[t] ? ERR_INPUT : OK, "trick %d: %s", t, fail_message());
        if (parts[t]) cr_assert(strstr(fail_message(), parts[t]), "trick %d: %s", t, fail_message());
        shard_file_close(&f);
    }
    id[0] ^= 1;
    forge_file(path, &m, id, PLAIN);
    id[0] ^= 1;
    FAILS(shard_file_open(&f, path, &m, id, 0, -1), ERR_MISMATCH, "two runs");
    FAILS(shard_file_open(&f, path, &m, id, 1, -1), ERR_MISMATCH, "two runs");
    spit(path, "not HDF5", 8);
    FAILS(shard_file_open(&f, path, &m, id, 0, -1), ERR_INPUT, "HDF5 cannot open");
}

/* ---- threads, sizes ---- */

struct job { struct shard_dataset *d; int64_t begin; int rc; char message[256]; };

static void *read_all(void *argument)
{
    struct job *j = argument;
    struct shard_row row, want;
    const struct shard_manifest *m = shard_dataset_manifest(j->d);
    shard_row_alloc(&row, m);
    shard_row_alloc(&want, m);
    for (int64_t i = 0; i < 2 * m->rows && j->rc == OK; i++) {
        int64_t r = (i * 37 + j->begin) % m->rows;
        j->rc = shard_dataset_read(j->d, r, &row);
        fixture_row(m, r, &want);
        if (j->rc == OK && memcmp(row.head_ids, want.head_ids, 4 * (size_t)(m->row_length * m->k))) j->rc = 99;
    }
    snprintf(j->message, sizeof j->message, "%s", fail_message());
    shard_row_free(&row);
    shard_row_free(&want);
    return NULL;
}

Test(shard, many_readers_many_files)
{
    struct shard_manifest m = fixture_manifest(SHARD_TOPK, 150, 1, 4, 20, 3);   /* more files than are kept open */
    char *dir = dataset_new("d", &m);
    struct shard_dataset *d;
    enum { THREADS = 4 };
    struct job jobs[THREADS];
    pthread_t threads[THREADS];
    OK_OR_DIE(shard_dataset_open(&d, dir));
    shard_dataset_verify_on_touch(d, true);
    for (int i = 0; i < THREADS; i++) {
        jobs[i] = (struct job){.d = d, .begin = 40 * i};
        pthread_create(&threads[i], NULL, read_all, &jobs[i]);
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        cr_assert_eq(jobs[i].rc, OK, "%s", jobs[i].message);
    }
    char **names;
    int n;
    OK_OR_DIE(dir_list("/proc/self/fd", &names, &n));
    cr_assert_lt(n, 100);
    names_free(names, n);
    shard_dataset_close(d);
}

Test(shard, sizes_of_large_datasets)
{
    struct shard_manifest m = fixture_manifest(SHARD_TOPK, (int64_t)1 << 32, 1 << 14, 4096, 152064, 64);
    cr_assert_eq(manifest_check(&m, "m", ERR_USAGE), OK, "%s", fail_message());
    cr_assert_eq(shard_count(&m), (int64_t)1 << 18);
    cr_assert_eq(shard_first_row(&m, shard_count(&m) - 1), ((int64_t)1 << 32) - (1 << 14));
    double per_token = (double)shard_bytes(&m, 0) / ((double)m.row_length * m.rows_per_shard);
    cr_assert(per_token > 295 && per_token < 312, "%g bytes per token with 3 temperatures", per_token);
    m.n_temperatures = 1;
    per_token = (double)shard_bytes(&m, 0) / ((double)m.row_length * m.rows_per_shard);
    cr_assert(per_token < 300, "%g bytes per token", per_token);
}

Test(failpoint, parsing)
{
    cr_assert_eq(failpoint_set("a:kill@x"), ERR_USAGE);
    cr_assert_eq(failpoint_set("a:explode"), ERR_USAGE);
    cr_assert_eq(failpoint_set("a"), ERR_USAGE);
    cr_assert_eq(failpoint_set("a:error@0"), ERR_USAGE);
    cr_assert_eq(failpoint_set("a:error@2-"), ERR_USAGE);
    cr_assert_eq(failpoint_set("a:error@2+,b:enospc@3,c:error"), OK, "%s", fail_message());
    cr_assert(!FAILPOINT_FIRES("a") && FAILPOINT_FIRES("a") && FAILPOINT_FIRES("a") && errno == EIO);
    cr_assert(!FAILPOINT_FIRES("b") && !FAILPOINT_FIRES("b") && FAILPOINT_FIRES("b") && errno == ENOSPC && !FAILPOINT_FIRES("b"));
    cr_assert_eq(FAILPOINT("c"), ERR_IO);
    cr_assert_eq(FAILPOINT("d"), OK);
    cr_assert_eq(failpoint_set(NULL), OK);
    cr_assert_eq(FAILPOINT("c"), OK);
}
