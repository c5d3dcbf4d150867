/* file: whole reads with a bound, replacement that is all or nothing, directories. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"

static char dir[64];

static void make_dir(void) { strcpy(dir, "/tmp/test_file_XXXXXX"); cr_assert(mkdtemp(dir)); }
static void remove_dir(void) { cr_assert_eq(dir_remove_tree(dir), OK); cr_assert(!path_exists(dir)); }

TestSuite(file, .init = make_dir, .fini = remove_dir);

Test(file, read)
{
    char *path = path_join(dir, "x"), *data = NULL;
    size_t n = 0;
    cr_assert_eq(file_replace(path, "a\0b", 3), OK);
    cr_assert_eq(file_read(path, 3, &data, &n), OK);
    cr_assert(n == 3 && !memcmp(data, "a\0b\0", 4));                 /* with a NUL behind it */
    free(data);
    cr_assert_eq(file_read(path, 2, &data, &n), ERR_INPUT);
    cr_assert(strstr(fail_message(), path));
    cr_assert_eq(file_read(dir, 100, &data, &n), ERR_INPUT);
    cr_assert_eq(file_read("/dev/zero", 100, &data, &n), ERR_INPUT);
    cr_assert_eq(file_read("/nonexistent", 100, &data, &n), ERR_IO);
    cr_assert_eq(file_replace(path, "", 0), OK);
    cr_assert_eq(file_read(path, 0, &data, &n), OK);
    cr_assert(n == 0 && data[0] == 0);
    free(data);
    cr_assert_eq(truncate(path, (off_t)1 << 40), 0);                  /* a hole: the bound stops it before memory does */
    cr_assert_eq(file_read(path, 1 << 20, &data, &n), ERR_INPUT);
    free(path);
}

Test(file, pread)
{
    char *path = path_join(dir, "x"), buffer[16] = {0};
    cr_assert_eq(file_replace(path, "0123456789", 10), OK);
    int fd = open(path, O_RDONLY);
    cr_assert_eq(file_pread(fd, buffer, 4, 3, path), OK);
    cr_assert_str_eq(buffer, "3456");
    cr_assert_eq(file_pread(fd, buffer, 4, 7, path), ERR_INPUT);
    cr_assert(strstr(fail_message(), "ends early"));
    cr_assert_eq(file_pread(fd, buffer, 0, 100, path), OK);
    close(fd);
    cr_assert_eq(file_pread(fd, buffer, 1, 0, path), ERR_IO);
    free(path);
}

Test(file, replace_leaves_the_old_file_or_the_new_one)
{
    char *path = path_join(dir, "x"), *inside = path_join(dir, "x/y"), *missing = path_join(dir, "no/such"), *data;
    size_t n;
    cr_assert_eq(file_replace(path, "old", 3), OK);
    cr_assert_eq(file_replace(inside, "new", 3), ERR_IO);             /* x is no directory */
    cr_assert_eq(file_replace(missing, "new", 3), ERR_IO);
    cr_assert_eq(file_replace(dir, "new", 3), ERR_IO);                /* the rename fails: no temporary file stays */
    cr_assert_eq(file_replace(path, "newer", 5), OK);
    cr_assert_eq(file_read(path, 10, &data, &n), OK);
    cr_assert_str_eq(data, "newer");
    free(data);
    char **names;
    int count;
    cr_assert_eq(dir_list(dir, &names, &count), OK);
    cr_assert(count == 1 && !strcmp(names[0], "x"));
    names_free(names, count);
    char *parent = xasprintf("%s.tmp-%d", dir, (int)getpid());
    cr_assert(!path_exists(parent));
    free(parent); free(path); free(inside); free(missing);
}

/* The first of several wins, whatever the others have to say. */
Test(file, create_leaves_what_is_there)
{
    char *path = path_join(dir, "made"), *data;
    size_t n;
    int status;
    cr_assert_eq(file_create(path, "first", 5), OK);
    cr_assert_eq(file_create(path, "second", 6), OK);
    cr_assert_eq(file_read(path, 100, &data, &n), OK);
    cr_assert(n == 5 && !memcmp(data, "first", 5));
    free(data);
    for (int round = 0; round < 20; round++) {
        cr_assert_eq(unlink(path), 0);
        for (int i = 0; i < 4; i++) {
            if (fork()) continue;
            char text[8];
            snprintf(text, sizeof text, "by %d", i);
            int rc = file_create(path, text, 4), before = rc == OK ? file_read(path, 100, &data, &n) : rc;
            char *again = NULL;
            struct timespec moment = {.tv_nsec = 2000000};
            nanosleep(&moment, NULL);
            _exit(before == OK && file_read(path, 100, &again, &n) == OK && n == 4 && !memcmp(data, again, 4) ? 0 : 1);   /* what it saw is what stays */
        }
        for (int i = 0; i < 4; i++) cr_assert(wait(&status) > 0 && status == 0);
    }
    char **names;
    int count;
    cr_assert_eq(dir_list(dir, &names, &count), OK);
    cr_assert_eq(count, 1, "%d files", count);                     /* no temporary one */
    names_free(names, count);
    free(path);
}

Test(file, copy)
{
    char *a = path_join(dir, "a"), *b = path_join(dir, "b"), *data;
    size_t n;
    cr_assert_eq(file_replace(a, "bytes", 5), OK);
    cr_assert_eq(file_copy(a, b), OK);
    cr_assert_eq(file_read(b, 10, &data, &n), OK);
    cr_assert_str_eq(data, "bytes");
    cr_assert_eq(file_copy("/nonexistent", b), ERR_IO);
    cr_assert_eq(path_size(b), 5);
    free(data); free(a); free(b);
}

Test(file, directories)
{
    char *deep = path_join(dir, "a/b//c/"), *file = path_join(dir, "a/file"), *link = path_join(dir, "a/b/link"), *a = path_join(dir, "a");
    cr_assert_eq(dir_make(deep), OK);
    cr_assert_eq(dir_make(deep), OK);
    cr_assert(path_is_dir(deep));
    cr_assert_eq(file_replace(file, "x", 1), OK);
    cr_assert_eq(dir_make(file), ERR_IO);
    cr_assert(strstr(fail_message(), "not a directory"));
    char *outside = path_join(dir, "outside"), *kept = path_join(dir, "outside/kept");
    cr_assert_eq(dir_make(outside), OK);
    cr_assert_eq(file_replace(kept, "x", 1), OK);
    cr_assert_eq(symlink(outside, link), 0);
    char **names;
    int n;
    cr_assert_eq(dir_list(a, &names, &n), OK);
    cr_assert(n == 2 && !strcmp(names[0], "b") && !strcmp(names[1], "file"));
    names_free(names, n);
    cr_assert_eq(dir_list(file, &names, &n), ERR_IO);
    cr_assert_eq(dir_remove_tree(a), OK);
    cr_assert(!path_exists(a) && path_exists(kept));                  /* the link went, not what it points to */
    cr_assert_eq(dir_remove_tree(a), OK);
    free(deep); free(file); free(link); free(a); free(outside); free(kept);
}

Test(file, leftovers)
{
    char *path = path_join(dir, "run.yaml"), *other = path_join(dir, "other.yaml.tmp-1"), *mine = xasprintf("%s.tmp-%d", path, (int)getpid()), *word = xasprintf("%s.tmp-old", path);
    pid_t dead = fork();
    if (dead == 0) _exit(0);
    cr_assert(waitpid(dead, NULL, 0) == dead);
    char *left = xasprintf("%s.tmp-%d", path, (int)dead), *alive = xasprintf("%s.tmp-%d", path, (int)getppid());
    char *all[] = {path, other, mine, word, left, alive};
    for (int i = 0; i < 6; i++) cr_assert_eq(file_replace(all[i], "x", 1), OK);
    cr_assert_eq(file_remove_leftovers(path, false), OK);
    for (int i = 0; i < 6; i++) cr_expect_eq(path_exists(all[i]), all[i] != left, "%s", all[i]);     /* what a living process or nobody writes stays */
    cr_assert_eq(file_remove_leftovers(path, true), OK);
    for (int i = 0; i < 6; i++) cr_expect_eq(path_exists(all[i]), all[i] != left && all[i] != alive, "%s", all[i]);   /* a PID says nothing to who holds the lock */
    for (int i = 0; i < 6; i++) free(all[i]);
}

Test(file, sizes)
{
    char *path = path_join(dir, "x");
    cr_assert_eq(path_size(path), -1);
    cr_assert(!path_exists(path) && !path_is_dir(path));
    cr_assert_eq(file_replace(path, "12345", 5), OK);
    cr_assert_eq(path_size(path), 5);
    cr_assert(path_exists(path) && !path_is_dir(path) && path_is_dir(dir));
    cr_assert_eq(file_sync_path(path), OK);
    cr_assert_eq(file_sync_dir(dir), OK);
    cr_assert_eq(file_sync_path("/nonexistent"), ERR_IO);
    free(path);
}
