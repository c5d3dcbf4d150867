/* Shards: whatever kills the writer or spoils a file is either undone at the next start or reported; never is a wrong row read. */
#include <sys/resource.h>

#include "tests/data/shard_helpers.h"

TestSuite(shard_faults, .init = setup, .fini = teardown, .timeout = 300);

/* ---- deaths and failures ---- */

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
Test(shard_faults, every_failpoint)
{
    struct shard_manifest m = fixture_manifest(SHARD_TOPK, 3, 1, 6, 40, 3);
    char *reference = dataset_new("reference", &m), *dir = kept_path(base, "dir"), *journal = kept_path(dir, "journal.jsonl");
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
                if (path_exists(journal)) OK_OR_DIE(verify(dir));
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

/* The same of the kinds that draw, at the second passing; and no bit of their files may flip unnoticed. */
Test(shard_faults, kinds_that_draw)
{
    static const enum shard_kind kinds[] = {SHARD_HYBRID, SHARD_SAMPLED};
    for (int k = 0; k < 2; k++) {
        struct shard_manifest m = fixture_manifest(kinds[k], 3, 1, 6, 40, 3);
        const char *kind = shard_kind_name(m.kind);
        char *reference = dataset_new(kind, &m), *dir = kept_path(base, "dir"), *data;
        for (size_t p = 2; p < sizeof points / sizeof *points; p++)
            for (int a = 0; a < 2; a++) {
                char *spec = xasprintf("%s:%s@2", points[p], a ? "enospc" : "kill");
                cr_assert_eq(dump_under(dir, &m, spec), a ? ERR_IO : -SIGKILL, "%s, %s", kind, spec);
                cr_assert_eq(dump_under(dir, &m, ""), OK, "%s, %s: restart", kind, spec);
                same_tree(reference, dir, spec);
                dir_remove_tree(dir);
                free(spec);
            }
        char *path = shard_path(reference, 1);
        size_t bytes;
        OK_OR_DIE(file_read(path, 1 << 20, &data, &bytes));
        for (size_t at = 0; at < bytes; at += 13) {
            data[at] ^= (char)(1 << at % 8);
            spit(path, data, bytes);
            cr_assert_eq(verify(reference), ERR_INPUT, "%s: a bit of byte %zu", kind, at);
            data[at] ^= (char)(1 << at % 8);
        }
        free(data);
        free(path);
    }
}

/* Killed again and again on the way: no progress is lost, and the end is the same. */
Test(shard_faults, killed_many_times)
{
    struct shard_manifest m = fixture_manifest(SHARD_TOPK, 30, 1, 6, 40, 3);
    char *reference = dataset_new("reference", &m), *dir = kept_path(base, "dir");
    int kills = 0;
    size_t n_points = sizeof points / sizeof *points;
    for (size_t p = 0; p < 2 * n_points; p++) {                   /* at the first shard or the second: most of the dump is never done by one process */
        char *spec = xasprintf("%s:kill@%d", points[2 + p % (n_points - 2)], 1 + (int)(p % 2));
        kills += dump_under(dir, &m, spec) == -SIGKILL;
        free(spec);
    }
    cr_log_info("%d kills\n", kills);
    cr_assert_geq(kills, 20);
    cr_assert_eq(dump_under(dir, &m, ""), OK);
    same_tree(reference, dir, "after many kills");
}

/* At no chosen point: whenever the signal lands. */
Test(shard_faults, killed_at_random)
{
    struct shard_manifest m = fixture_manifest(SHARD_TOPK, 40, 1, 6, 40, 3);
    char *reference = dataset_new("reference", &m), *dir = kept_path(base, "dir");
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

/* No file may grow beyond `limit` bytes: every kind of write fails for real, libhdf5's too. */
Test(shard_faults, writes_refused_by_the_system)
{
    struct shard_manifest m = fixture_manifest(SHARD_TOPK, 3, 1, 6, 40, 3);
    char *reference = dataset_new("reference", &m), *dir = kept_path(base, "dir");
    int failed = 0;
    for (rlim_t limit = 4; limit < 6000; limit += limit < 1000 ? 99 : 500) {
        fflush(NULL);
        pid_t pid = fork();
        if (pid == 0) {
            signal(SIGXFSZ, SIG_IGN);
            setrlimit(RLIMIT_FSIZE, &(struct rlimit){limit, RLIM_INFINITY});
            int rc = fixture_dump(dir, &m);
            _exit(rc == OK || strstr(fail_message(), dir) ? rc : 99);
        }
        int status;
        waitpid(pid, &status, 0);
        cr_assert(WIFEXITED(status) && (WEXITSTATUS(status) == ERR_IO || WEXITSTATUS(status) == OK), "limit %d: status %x", (int)limit, (unsigned)status);
        failed += WEXITSTATUS(status) == ERR_IO;
        cr_assert_eq(temporary_files(dir), 0);
        cr_assert_eq(dump_under(dir, &m, ""), OK, "limit %d", (int)limit);
        same_tree(reference, dir, "after refused writes");
        dir_remove_tree(dir);
    }
    cr_assert_geq(failed, 10);
}

Test(shard_faults, seal_failure_stops_the_writer)
{
    struct shard_manifest m = small();
    struct shard_writer *w;
    struct shard_row row;
    char *dir = kept_path(base, "d");
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
    char *file = kept_path(base, "file"), *below = kept_path(file, "data");
    spit(file, "x", 1);
    FAILS(shard_writer_open(&w, file, &m), ERR_IO, "not a directory");
    FAILS(shard_writer_open(&w, below, &m), ERR_IO, "file");
    shard_row_free(&row);
}

/* ---- damage ---- */

Test(shard_faults, truncated_anywhere)
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
    uint8_t *longer = kept(xcalloc(bytes + 100, 1));
    memcpy(longer, data, bytes);
    spit(path, longer, bytes + 100);                              /* garbage appended */
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
Test(shard_faults, flipped_bits)
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
        if (n % 64 == 0) {
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
    shard_row_free(&want[0]);
    shard_row_free(&want[1]);
    shard_row_free(&got);
}

Test(shard_faults, flipped_bits_in_text)
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

Test(shard_faults, journal_lines)
{
    struct shard_manifest m = small();
    char *dir = dataset_new("d", &m), *copy = dataset_new("copy", &m), *path, *lines[3];
    size_t bytes, begin[4] = {0};
    char *text = (char *)slurp(dir, "journal.jsonl", &bytes, &path);
    struct shard_dataset *d;
    int64_t sealed;
    for (int i = 0; i < 3; i++) {
        begin[i + 1] = (size_t)(strchr(text + begin[i], '\n') - text) + 1;
        lines[i] = kept(xstrndup(text + begin[i], begin[i + 1] - begin[i]));
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
    char *torn_middle = kept(xasprintf("%.*s\n%s", 50, lines[0], lines[1]));
    spit(path, torn_middle, strlen(torn_middle));
    FAILS(shard_dataset_open(&d, dir), ERR_INPUT, "broken");
    spit(path, text, bytes);
    OK_OR_DIE(shard_dataset_open(&d, dir));
    spit(path, text, begin[1]);
    FAILS(shard_dataset_refresh(d, &sealed), ERR_INPUT, "lost lines");
    shard_dataset_close(d);
    char *noise = kept(xcalloc(1, 4000));
    spit(path, noise, 600);
    FAILS(shard_dataset_open(&d, dir), ERR_INPUT, "no line");
    spit(path, noise, 100);                                       /* as after a power cut: the size was kept, the data were not */
    OK_OR_DIE(fixture_dump(dir, &m));
    same_tree(dir, copy, "zeros for a journal");
}

/* Lines whose chain and crc are right and whose content is not. */
Test(shard_faults, hostile_journal)
{
    struct shard_manifest m = small();
    char *dir = dataset_new("d", &m), *path = kept_path(dir, "journal.jsonl"), id[SHA256_HEX];
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

Test(shard_faults, leftovers)
{
    struct shard_manifest m = small(), other = small();
    char *reference = dataset_new("reference", &m), *dir = dataset_new("d", &m), *path, *journal;
    other.seed++;
    char *foreign = dataset_new("foreign", &other);
    size_t bytes, journal_bytes;
    uint8_t *data = slurp(dir, "shards/shard-000001.h5", &bytes, &path), *text = slurp(dir, "journal.jsonl", &journal_bytes, &journal);
    char *first_end = strchr((char *)text, '\n');
    size_t first = (size_t)(first_end - (char *)text) + 1;
    char *tmp = kept_path(dir, "shards/.tmp-shard-000001.h5-1"), *tmp2 = kept_path(dir, "manifest.json.tmp-77"), *note = kept_path(dir, "notes.txt");
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
        else { spit(kept_path(dir, "shards/shard-000009.h5"), data, bytes); }
        if (i == 0) data[bytes / 2] ^= 4;
        OK_OR_DIE(fixture_dump(dir, &m));
        char *q = kept_path(dir, aside[i]);
        cr_assert_eq(path_size(q), (int64_t)n, "%s", aside[i]);
        
        OK_OR_DIE(verify(dir));
    }
    for (int i = 0; i < 4; i++) unlink(kept_path(dir, aside[i]));
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
    char *zero = kept_path(dir, "shards/shard-000000.h5");
    spit(zero, data, path_size(zero) > 0 ? (size_t)path_size(zero) : 0);
    FAILS(read_everything(dir, false), ERR_INPUT, "its name says 0");
}

/* What Fletcher-32 does not see. */
Test(shard_faults, swapped_words_zeroed_pages_swapped_rows)
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
    uint8_t *swapped = kept(xmalloc(bytes));                            /* rows 0 and 1 whole, CRCs too, in each other's place */
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

Test(shard_faults, flaky_disk)
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
    char *other = kept_path(base, "other");
    FAILS(fixture_dump(other, &m), ERR_IO, "reads back differently");
}
