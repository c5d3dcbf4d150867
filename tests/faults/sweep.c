/* Fails the n-th system call for every n until no fault fires, once and from then on, as SQLite tests itself: sweep SHIM TARGET [CALL]
 * (DISTILL_LONG_TESTS=1: every read too; else the first 12 and every eleventh)
 *
 * After each fault: the exit code is 0 or 4, never a core; a message names a file of the dataset; a run without faults ends in the bytes of a run that
 * never met one. A fault that can be worked around (EINTR, a short write or read) must be. Prints a line per kind: what, how often, lost. */
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <sys/wait.h>

#include "tests/data/shard_fixture.h"

extern char **environ;
static const char *shim, *target;
static char *base, *dir, *reference, *log_file, *errors;

struct sweep { const char *call, *action; bool absorbed, killed, once /* a second name for the same path through the program: not from then on */; };
static const struct sweep sweeps[] = {
    {.call = "write", .action = "ENOSPC"},
    {.call = "write", .action = "EDQUOT", .once = true},
    {.call = "write", .action = "EIO", .once = true},
    {.call = "write", .action = "short", .absorbed = true},
    {.call = "write", .action = "EINTR", .absorbed = true, .once = true},
    {.call = "fsync", .action = "EIO"},
    {.call = "close", .action = "EIO"},
    {.call = "rename", .action = "EIO"},
    {.call = "rename", .action = "EXDEV", .once = true},
    {.call = "open", .action = "EACCES"},
    {.call = "open", .action = "EROFS", .once = true},
    {.call = "mkdir", .action = "ENOSPC"},
    {.call = "unlink", .action = "EIO"},
    {.call = "ftruncate", .action = "EIO"},
    {.call = "read", .action = "EIO"},
    {.call = "read", .action = "short", .absorbed = true},
    {.call = "read", .action = "EINTR", .absorbed = true, .once = true},
    {.call = "change", .action = "kill", .killed = true},
    {.call = "change", .action = "power", .killed = true},
    {.call = "change", .action = "power-data", .killed = true},
    {.call = "change", .action = "power-names", .killed = true},
};

static void die(const char *spec, const char *what, int status)
{
    char *text = NULL;
    size_t n;
    if (file_read(errors, 1 << 20, &text, &n) != OK) text = NULL;
    fprintf(stderr, "sweep: %s: %s (status %d)\n%s\n", spec, what, status, text ? text : "");
    exit(1);
}

/* Exit code of the target, or -signal; standard error goes to a file. */
static int run(const char *spec)
{
    char *argv[] = {(char *)target, dir, NULL};
    posix_spawn_file_actions_t actions;
    pid_t pid;
    int status;
    setenv("DISTILL_SHIM", spec, 1);
    setenv("LD_PRELOAD", *spec ? shim : "", 1);
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 2, errors, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    CHECK(!posix_spawn(&pid, target, &actions, NULL, argv, environ), "cannot start %s", target);
    posix_spawn_file_actions_destroy(&actions);
    unsetenv("LD_PRELOAD");
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static void expect(const struct sweep *s, const char *spec, int status)
{
    char *text = NULL;
    size_t n;
    if (s->killed) { if (status != -SIGKILL) die(spec, "was not killed", status); return; }
    if (s->absorbed && status != OK) die(spec, "should have been worked around", status);
    if (status != OK && status != ERR_IO) die(spec, "neither goes on nor ends with 4", status);
    if (status == OK) return;
    if (file_read(errors, 1 << 20, &text, &n) != OK || !strstr(text, dir)) die(spec, "the message names no file", status);
    free(text);
}

int main(int argc, char **argv)
{
    if (argc < 3) return ERR_USAGE;
    shim = argv[1];
    target = argv[2];
    const char *wish = getenv("DISTILL_LONG_TESTS");
    bool long_run = wish && !strcmp(wish, "1");
    base = fixture_dir();
    dir = path_join(base, "d");
    reference = path_join(base, "reference");
    log_file = path_join(base, "fired");
    errors = path_join(base, "errors");
    setenv("DISTILL_SHIM_DIR", dir, 1);
    setenv("DISTILL_SHIM_LOG", log_file, 1);
    if (run("") != OK || rename(dir, reference)) die("", "the target does not work", 0);
    int total = 0;
    for (size_t i = 0; i < sizeof sweeps / sizeof *sweeps; i++) {
        const struct sweep *s = &sweeps[i];
        int tried = 0, refused = 0;
        if (argc > 3 && strcmp(argv[3], s->call)) continue;
        for (int persistent = 0; persistent < (s->killed || s->once ? 1 : 2); persistent++)
            for (int n = 1;; n += !long_run && n > 12 && !strcmp(s->call, "read") ? 11 : 1) {   /* there are many reads, of a few kinds */
                char *spec = xasprintf("%s:%s@%d%s", s->call, s->action, n, persistent ? "+" : "");
                unlink(log_file);
                int status = run(spec);
                bool fired = path_exists(log_file);
                if (fired) {
                    expect(s, spec, status);
                    tried++;
                    refused += status == ERR_IO;
                } else if (status != OK) die(spec, "fails without a fault", status);
                if (fired && (status = run("")) != OK) die(spec, "the next start fails", status);
                char *different = tree_difference(reference, dir);
                if (different) die(spec, different, 0);
                CHECK(dir_remove_tree(dir) == OK, "%s", fail_message());
                free(spec);
                if (!fired) break;
            }
        printf("%-10s %-12s tried %4d, ended with 4: %4d, lost 0\n", s->call, s->action, tried, refused);
        fflush(stdout);
        total += tried;
        if (!tried) die(s->call, "is never called", 0);
    }
    printf("%d faults\n", total);
    dir_remove_tree(base);
    return 0;
}
