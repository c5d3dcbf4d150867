/* Several writers of one dataset: each shard is made once, by whoever holds its lock; a writer that dies leaves its shards to the others; and the
 * end is what one writer alone makes, but for the order of lines in the journal. */
#include "tests/data/shard_helpers.h"

TestSuite(shard_writers, .init = setup, .fini = teardown, .timeout = 300);

/* As teacher-dump does it: claims until nothing is left, waiting for what others have. first < 0: all shards. */
static int dump_shared(const char *dir, const struct shard_manifest *m, int64_t first, int64_t end)
{
    int rc = OK;
    struct shard_writer *w = NULL;
    struct shard_row row;
    int64_t shard, busy;
    const char *owner;
    shard_row_alloc(&row, m);
    TRY(first < 0 ? shard_writer_open(&w, dir, m) : shard_writer_open_range(&w, dir, m, first, end));
    for (;;) {
        TRY(shard_writer_claim(w, &shard, &busy, &owner));
        if (shard == SHARD_NONE) break;
        if (shard == SHARD_BUSY) { usleep(500); continue; }
        TRY(shard_writer_begin(w, shard));
        for (int64_t i = 0; i < shard_rows(m, shard); i++) {
            fixture_row(m, shard_first_row(m, shard) + i, &row);
            TRY(shard_writer_put(w, &row));
        }
        TRY(shard_writer_seal(w));
    }
out:
    shard_writer_close(w);
    shard_row_free(&row);
    return rc;
}

static pid_t start(const char *dir, const struct shard_manifest *m, int64_t first, int64_t end, const char *spec)
{
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        int rc = failpoint_set(spec);
        if (rc == OK) rc = dump_shared(dir, m, first, end);
        if (rc != OK && rc != ERR_IO) fprintf(stderr, "%s\n", fail_message());
        _exit(rc);
    }
    return pid;
}

static int ended(pid_t pid)
{
    int status;
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

/* The same shards, manifest and lock; the journals list the same files, whatever the order. */
static void same_dataset(const char *a, const char *b, const char *why)
{
    OK_OR_DIE(verify(b));
    same_entries(a, b, why);
    const char *parts[] = {"shards", "manifest.json", ".lock"};
    for (int i = 0; i < 3; i++) same_tree(kept_path(a, parts[i]), kept_path(b, parts[i]), why);
    cr_assert_eq(path_size(kept_path(a, "journal.jsonl")), path_size(kept_path(b, "journal.jsonl")), "%s", why);
}

Test(shard_writers, three_and_one_is_killed)
{
    struct shard_manifest m = fixture_manifest(SHARD_TOPK, 40, 1, 8, 60, 3);
    char *reference = dataset_new("reference", &m);
    int killed = 0;
    for (int round = 0; round < 12; round++) {
        char *dir = kept_path(base, "dir");
        pid_t a = start(dir, &m, -1, -1, ""), b = start(dir, &m, -1, -1, ""), c = start(dir, &m, -1, -1, "");
        usleep(philox4x32(3, 4, (uint64_t)round).v[0] % 15000);
        kill(b, SIGKILL);
        cr_assert_eq(ended(a), OK);
        killed += ended(b) == -SIGKILL;
        cr_assert_eq(ended(c), OK);
        if (path_size(kept_path(dir, ".lock")) > 0) OK_OR_DIE(dump_shared(dir, &m, -1, -1));   /* the dead one's temporary files and pid */
        same_dataset(reference, dir, "three writers");
        dir_remove_tree(dir);
    }
    cr_log_info("%d of 12 killed on the way\n", killed);
    cr_assert_geq(killed, 4);
}

/* One dies at each point of a seal while another works beside it, which takes over what it leaves. */
Test(shard_writers, one_dies_at_every_point)
{
    static const char *const points[] = {"manifest.before", "manifest.after", "shard.before_write", "shard.skeleton", "shard.write", "shard.after_write", "shard.read_back",
                                         "shard.verified", "shard.sync", "shard.close", "shard.before_rename", "shard.rename", "shard.after_rename", "shard.dir_sync",
                                         "journal.before", "journal.torn", "journal.written", "journal.sync", "journal.after"};
    struct shard_manifest m = fixture_manifest(SHARD_TOPK, 6, 1, 6, 40, 3);
    char *reference = dataset_new("reference", &m), *dir = kept_path(base, "dir");
    int kills = 0, failures = 0;
    for (size_t p = 0; p < sizeof points / sizeof *points; p++)
        for (int action = 0; action < 2; action++) {
            char *spec = xasprintf("%s:%s", points[p], action ? "error" : "kill");
            pid_t dying = start(dir, &m, -1, -1, spec), living = start(dir, &m, -1, -1, "");
            int status = ended(dying);
            cr_assert(status == OK || status == (action ? ERR_IO : -SIGKILL), "%s: %d", spec, status);
            kills += status == -SIGKILL;
            failures += status == ERR_IO;
            cr_assert_eq(ended(living), OK, "%s", spec);
            OK_OR_DIE(dump_shared(dir, &m, -1, -1));
            same_dataset(reference, dir, spec);
            dir_remove_tree(dir);
            free(spec);
        }
    cr_log_info("%d kills, %d failures\n", kills, failures);
    cr_assert_geq(kills, 12);
    cr_assert_geq(failures, 12);
}

Test(shard_writers, a_shard_has_one_maker)
{
    struct shard_manifest m = small(), other = small();
    struct shard_writer *w, *second;
    char *dir = kept_path(base, "d"), pid[32];
    const char *owner;
    int64_t shard, busy;
    int ready[2];
    OK_OR_DIE(shard_writer_open(&w, dir, &m));
    OK_OR_DIE(shard_writer_open(&second, dir, &m));
    OK_OR_DIE(shard_writer_begin(w, 0));
    snprintf(pid, sizeof pid, "(pid %d on ", (int)getpid());
    FAILS(shard_writer_begin(second, 0), ERR_IO, pid);
    OK_OR_DIE(shard_writer_claim(second, &shard, &busy, &owner));
    cr_assert_eq(shard, 1);
    shard_writer_close(w);                                        /* dropped: free again */
    OK_OR_DIE(shard_writer_begin(second, 0));
    shard_writer_close(second);
    cr_assert_eq(path_size(kept_path(dir, ".lock")), 0);
    other.seed++;
    FAILS(shard_writer_open(&w, dir, &other), ERR_MISMATCH, "seed");   /* another teacher, corpus or kind: refused beside others too */

    cr_assert_eq(pipe(ready), 0);
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        char c = (char)shard_writer_open(&w, dir, &m);
        for (int64_t i = 0; !c && i < 2; i++) {                   /* two of the three shards, from two writers */
            c = (char)shard_writer_open(&w, dir, &m);
            if (!c) c = (char)shard_writer_begin(w, i);
        }
        if (write(ready[1], &c, 1) == 1) pause();
        _exit(0);
    }
    char c = 99;
    cr_assert(read(ready[0], &c, 1) == 1 && c == OK);
    OK_OR_DIE(shard_writer_open(&second, dir, &m));
    OK_OR_DIE(shard_writer_begin(second, 2));
    OK_OR_DIE(shard_writer_open(&w, dir, &m));
    OK_OR_DIE(shard_writer_claim(w, &shard, &busy, &owner));
    cr_assert(shard == SHARD_BUSY && busy == 3, "%d, %d", (int)shard, (int)busy);
    snprintf(pid, sizeof pid, "pid %d on ", (int)child);
    cr_assert(!strncmp(owner, pid, strlen(pid)), "%s", owner);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    OK_OR_DIE(shard_writer_claim(w, &shard, &busy, &owner));     /* the locks died with their owner */
    cr_assert_eq(shard, 0);
    shard_writer_close(w);
    shard_writer_close(second);
}

Test(shard_writers, ranges_without_locks)
{
    struct shard_manifest m = fixture_manifest(SHARD_TOPK, 19, 2, 8, 60, 3);
    char *reference = dataset_new("reference", &m), *dir = kept_path(base, "dir");
    struct shard_dataset *d;
    struct shard_writer *w;
    int64_t sealed;
    /* where locks are to be had: the same, and a writer may share the work */
    for (int locks = 0; locks < 2; locks++) {
        const char *none = locks ? "" : "claim.lock:error";
        pid_t a = start(dir, &m, 0, 3, none), b = start(dir, &m, 3, 7, none), c = start(dir, &m, 7, 10, none);
        cr_assert(ended(a) == OK && ended(b) == OK && ended(c) == OK);
        cr_assert_not(path_exists(kept_path(dir, "journal.jsonl")));
        OK_OR_DIE(shard_dataset_open(&d, dir));
        OK_OR_DIE(shard_dataset_refresh(d, &sealed));
        cr_assert_eq(sealed, 0, "a range enters nothing in the journal");
        shard_dataset_close(d);
        cr_assert_eq(ended(start(dir, &m, 3, 7, none)), OK);       /* again: all is there */
        OK_OR_DIE(fixture_dump(dir, &m));                          /* adopts in order, so even the journal is the same */
        same_tree(reference, dir, "ranges");
        dir_remove_tree(dir);
    }
    /* a range that died is gone on with; what is damaged is set aside and made again */
    cr_assert_eq(ended(start(dir, &m, 0, 5, "claim.lock:error,shard.after_rename:kill@3")), -SIGKILL);
    char *path = kept(shard_path(dir, 1)), id[SHA256_HEX];
    struct shard_file f;
    OK_OR_DIE(manifest_read(dir, &m, id));
    OK_OR_DIE(shard_file_open(&f, path, &m, id, 1, -1));
    int fd = open(path, O_WRONLY);
    cr_assert(pwrite(fd, "\x55", 1, f.offset[SHARD_TOKENS] + 2) == 1);
    close(fd);
    shard_file_close(&f);
    cr_assert_eq(ended(start(dir, &m, 0, 5, "claim.lock:error")), OK);
    cr_assert_eq(ended(start(dir, &m, 5, 10, "claim.lock:error")), OK);
    OK_OR_DIE(fixture_dump(dir, &m));
    cr_assert_eq(unlink(kept_path(dir, "shards/shard-000001.h5.quarantine")), 0);
    same_tree(reference, dir, "ranges after a death");
    FAILS(shard_writer_open_range(&w, dir, &m, 5, 11), ERR_USAGE, "shards 0 to 9");
    FAILS(shard_writer_open_range(&w, dir, &m, 5, 5), ERR_USAGE, "no range");
    failpoint_set("claim.lock:error");
    FAILS(shard_writer_open(&w, dir, &m), ERR_IO, "--shards A:B");
}
