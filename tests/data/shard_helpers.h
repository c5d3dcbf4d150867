/* What the two files of shard tests share: the directory of a test, datasets in it, and ways to spoil and to read them. */
#ifndef TESTS_SHARD_HELPERS_H
#define TESTS_SHARD_HELPERS_H

#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>

#include "base/failpoint.h"
#include "data/shard_internal.h"
#include "tests/data/shard_fixture.h"

static char *base;            /* this test's directory */
static void *kept_things[4096];
static int n_kept;

/* Freed with the test. */
static inline void *kept(void *thing)
{
    CHECK(n_kept < 4096, "too many kept things");
    return kept_things[n_kept++] = thing;
}

static inline char *kept_path(const char *dir, const char *name) { return kept(path_join(dir, name)); }

static void setup(void) { base = fixture_dir(); }
static void teardown(void)
{
    failpoint_set(NULL);
    dir_remove_tree(base);
    free(base);
    while (n_kept) free(kept_things[--n_kept]);
}
#define OK_OR_DIE(call) cr_assert_eq((call), OK, "%s", fail_message())
#define FAILS(call, code, part) do { \
    int status_ = (call); \
    cr_assert_eq(status_, code, "status %d: %s", status_, fail_message()); \
    cr_assert(strstr(fail_message(), part), "\"%s\" is not in: %s", part, fail_message()); \
} while (0)

static inline char *dataset_new(const char *name, const struct shard_manifest *m)
{
    char *dir = kept_path(base, name);
    OK_OR_DIE(fixture_dump(dir, m));
    return dir;
}

static inline struct shard_manifest small(void) { return fixture_manifest(SHARD_TOPK, 5, 2, 12, 300, 5); }

static inline void same_tree(const char *a, const char *b, const char *why)
{
    char *different = tree_difference(a, b);
    cr_assert_null(different, "%s: %s differs", why, different);
}

static inline uint8_t *slurp(const char *dir, const char *name, size_t *bytes, char **path)
{
    static char *data;
    *path = kept_path(dir, name);
    OK_OR_DIE(file_read(*path, (size_t)1 << 30, &data, bytes));
    return kept(data);
}

static inline void spit(const char *path, const void *data, size_t bytes)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    cr_assert(fd >= 0 && file_write_all(fd, data, bytes, path) == OK);
    close(fd);
}

/* For scripts/read_shards.py; skips the test where there is none. */
static inline const char *python_with_h5py(void)
{
    const char *candidates[] = {getenv("DISTILL_PYTHON"), "python3", "/usr/bin/python3"}, *python = NULL;
    for (int i = 0; i < 3 && !python; i++) {
        char *probe = candidates[i] ? xasprintf("%s -c 'import h5py, numpy' 2>/dev/null", candidates[i]) : NULL;
        if (probe && system(probe) == 0) python = candidates[i];
        free(probe);
    }
    if (!python) cr_skip_test("SKIPPED: no python3 with h5py and numpy; name one in DISTILL_PYTHON");
    return python;
}

static inline bool same_entry(const struct shard_entry *e, const struct shard_entry *f)
{
    return e->shard == f->shard && e->rows == f->rows && e->tokens == f->tokens && e->targets == f->targets && e->bytes == f->bytes && !strcmp(e->sha256, f->sha256);
}

/* The same shards in both journals, whatever the order. */
static inline void same_entries(const char *a, const char *b, const char *why)
{
    struct shard_dataset *x, *y;
    const struct shard_entry *e, *f;
    OK_OR_DIE(shard_dataset_open(&x, a));
    OK_OR_DIE(shard_dataset_open(&y, b));
    cr_assert_str_eq(shard_dataset_id(x), shard_dataset_id(y));
    int64_t n = shard_dataset_entries(x, &e), o = shard_dataset_entries(y, &f), same = 0;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < o; j++) same += same_entry(&e[i], &f[j]);
    cr_assert(n == o && same == n, "%s: the journals of %s and %s list other shards", why, a, b);
    shard_dataset_close(x);
    shard_dataset_close(y);
}

static inline int read_everything(const char *dir, bool hash)
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

static inline int verify(const char *dir)
{
    struct shard_dataset *d = NULL;
    int rc = shard_dataset_open(&d, dir);
    if (rc == OK) rc = shard_dataset_verify(d);
    shard_dataset_close(d);
    return rc;
}

/* The dump in a child with `spec` armed; its exit status, or -signal. */
static inline int dump_under(const char *dir, const struct shard_manifest *m, const char *spec)
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

/* Overwrites `bytes` of field f at element offset and makes the row's CRC right, as a hostile or buggy writer would. */
static inline void forge(const char *dir, const struct shard_manifest *m, int f, int64_t row, int64_t at, const void *value, size_t bytes, bool fix_crc)
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
    uint32_t crc = fixture_row_crc(&file, m, fd, row);
    if (fix_crc) cr_assert(pwrite(fd, &crc, 4, file.offset[SHARD_ROW_CRC] + 4 * row) == 4);
    close(fd);
    shard_file_close(&file);
    free(path);
}

#endif
