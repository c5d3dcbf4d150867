/* lock: one owner at a time, given back by its end, however it ends. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "base/lock.h"

static char dir[64];
static char *path;

static void make_dir(void) { strcpy(dir, "/tmp/test_lock_XXXXXX"); cr_assert(mkdtemp(dir)); path = path_join(dir, ".lock"); }
static void remove_dir(void) { cr_assert_eq(dir_remove_tree(dir), OK); free(path); }

TestSuite(lock, .init = make_dir, .fini = remove_dir);

Test(lock, one_owner)
{
    int a, b;
    cr_assert_eq(lock_take(&a, path, "the run", 0), OK);
    cr_assert_geq(a, 0);
    cr_assert_eq(lock_take(&b, path, "the run", 0.05), ERR_IO);
    char *pid = xasprintf("the run is in use by pid %d on ", (int)getpid());
    cr_assert(strstr(fail_message(), pid), "%s", fail_message());
    cr_assert_eq(b, -1);
    close(a);
    cr_assert_eq(lock_take(&b, path, "the run", 0), OK);
    close(b);
    free(pid);
}

Test(lock, dies_with_its_owner)
{
    int ready[2], fd;
    char c;
    cr_assert_eq(pipe(ready), 0);
    pid_t child = fork();
    if (child == 0) {
        if (lock_take(&fd, path, "the run", 0) != OK || write(ready[1], "x", 1) != 1) _exit(1);
        for (;;) pause();
    }
    cr_assert_eq(read(ready[0], &c, 1), 1);
    cr_assert_eq(lock_take(&fd, path, "the run", 0), ERR_IO);
    kill(child, SIGKILL);
    cr_assert_eq(lock_take(&fd, path, "the run", 30), OK);   /* while it is a zombie: nobody has waited for it yet */
    cr_assert_eq(waitpid(child, NULL, 0), child);
    close(fd);
}

Test(lock, cannot_open)
{
    int fd;
    cr_assert_eq(lock_take(&fd, "/nonexistent/.lock", "the run", 0), ERR_IO);
    cr_assert(strstr(fail_message(), "/nonexistent/.lock"));
}
