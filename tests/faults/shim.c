/* LD_PRELOAD shim: makes system calls on the files under one directory fail, be cut short, be slow, or be the last before a power cut.
 *
 *     DISTILL_SHIM=call:action@n[+][,...]   the n-th such call (from the n-th on) under DISTILL_SHIM_DIR
 *     call     open write (pwrite) read (pread) fsync close rename mkdir unlink ftruncate, or change: everything but open, read and close
 *     action   an errno: ENOSPC EDQUOT EIO EROFS EACCES EXDEV EINTR;  short: half of it is done;  delay=MS;  kill;
 *              power, power-data, power-names: the machine dies before this call, and with it what was not synced: everything, contents only, names only
 *     DISTILL_SHIM_LOG                      a file that gets a line when a rule fires
 *     DISTILL_SHIM_FREE                     bytes that statvfs says are free
 *
 * Power cut: contents last from fsync of the file on, names (creations, renames, removals) from fsync of their directory on. Every change is kept in an
 * undo log until then; at the cut the log is undone backwards. Stricter than ext4 and xfs are, which is the point. */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

enum { MAX_RULES = 8, PATH_BYTES = 4096 };
enum action { ERRNO, SHORT, DELAY, KILL, POWER, POWER_DATA, POWER_NAMES };
struct rule { char call[16]; enum action action; int value; long from, to, passed; };
static struct rule rules[MAX_RULES];
static int n_rules;
static bool power;                            /* a rule needs the undo log */
static char dir[PATH_BYTES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local int inside;              /* our own calls, and those of what we call, do not count */

#define REAL(name) ({ static __typeof__(name) *real_; if (!real_) real_ = (__typeof__(name) *)dlsym(RTLD_NEXT, #name); real_; })

/* ---- the undo log ---- */

enum kind { WRITTEN, CREATED, RENAMED, REMOVED };
struct change { enum kind kind; char *path, *to, *backup; dev_t dev; ino_t ino; int fd; off_t at, size; size_t bytes; char *old; struct change *before; };
static struct change *newest;
static int backups;

static char *backup_name(void)
{
    char *name;
    return asprintf(&name, "%s.shim-%d-%d", dir, (int)getpid(), backups++) < 0 ? NULL : name;
}

static struct change *change_new(enum kind kind, const char *path)
{
    struct change *c = calloc(1, sizeof *c);
    c->kind = kind;
    c->path = path ? strdup(path) : NULL;
    c->fd = -1;
    c->before = newest;
    return newest = c;
}

static int own_fd(dev_t dev, ino_t ino, int fd)
{
    for (struct change *c = newest; c; c = c->before)
        if (c->fd >= 0 && c->dev == dev && c->ino == ino) return c->fd;
    char proc[64];
    snprintf(proc, sizeof proc, "/proc/self/fd/%d", fd);
    return REAL(open)(proc, O_RDWR | O_CLOEXEC);
}

/* Before [at, at + bytes) of the file is overwritten, or cut off. */
static void before_write(int fd, off_t at, size_t bytes)
{
    struct stat st;
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) return;
    int own = own_fd(st.st_dev, st.st_ino, fd);
    struct change *c = change_new(WRITTEN, NULL);
    c->dev = st.st_dev; c->ino = st.st_ino; c->fd = own; c->at = at; c->size = st.st_size;
    c->bytes = at < st.st_size ? (size_t)(st.st_size - at) < bytes ? (size_t)(st.st_size - at) : bytes : 0;
    c->old = malloc(c->bytes + 1);
    if (c->bytes && REAL(pread)(own, c->old, c->bytes, at) != (ssize_t)c->bytes) abort();
}

static bool same_parent(const char *path, const char *parent)
{
    const char *slash = strrchr(path, '/');
    return slash && (size_t)(slash - path) == strlen(parent) && !strncmp(path, parent, (size_t)(slash - path));
}

static void forget(struct change **link)
{
    struct change *c = *link;
    *link = c->before;
    if (c->backup) REAL(unlink)(c->backup);
    free(c->path); free(c->to); free(c->backup); free(c->old);
    free(c);                                  /* its descriptor stays open for others of its file; the process is short */
}

static void on_sync(int fd, const char *path)
{
    struct stat st;
    if (fstat(fd, &st)) return;
    for (struct change **c = &newest; *c;) {
        bool lasts = (*c)->kind == WRITTEN ? S_ISREG(st.st_mode) && (*c)->dev == st.st_dev && (*c)->ino == st.st_ino
                                           : S_ISDIR(st.st_mode) && same_parent((*c)->kind == RENAMED ? (*c)->to : (*c)->path, path);
        if (lasts) forget(c);
        else c = &(*c)->before;
    }
}

static void cut(enum action a)
{
    for (struct change *c = newest; c; c = c->before) {
        if (c->kind == WRITTEN ? a == POWER_NAMES : a == POWER_DATA) {
            if (c->backup) REAL(unlink)(c->backup);
            continue;
        }
        switch (c->kind) {
        case WRITTEN:
            if (c->bytes && REAL(pwrite)(c->fd, c->old, c->bytes, c->at) != (ssize_t)c->bytes) abort();
            if (REAL(ftruncate)(c->fd, c->size)) abort();
            break;
        case CREATED: REAL(unlink)(c->path); break;
        case RENAMED:
            REAL(rename)(c->to, c->path);
            if (c->backup) REAL(rename)(c->backup, c->to);
            break;
        case REMOVED: if (c->backup) REAL(rename)(c->backup, c->path); break;
        }
    }
}

/* ---- rules ---- */

static void parse(void)
{
    static const struct { const char *name; int value; } errors[] = {{"ENOSPC", ENOSPC}, {"EDQUOT", EDQUOT}, {"EIO", EIO}, {"EROFS", EROFS}, {"EACCES", EACCES}, {"EXDEV", EXDEV}, {"EINTR", EINTR}};
    static const char *const actions[] = {[SHORT] = "short", [KILL] = "kill", [POWER] = "power", [POWER_DATA] = "power-data", [POWER_NAMES] = "power-names"};
    const char *spec = getenv("DISTILL_SHIM"), *where = getenv("DISTILL_SHIM_DIR");
    if (!spec || !where || !*spec) return;
    snprintf(dir, sizeof dir, "%s", where);
    char *copy = strdup(spec), *rest = copy;
    for (char *text; (text = strsep(&rest, ",")) && n_rules < MAX_RULES;) {
        struct rule *r = &rules[n_rules++];
        char action[24] = "";
        bool known = false;
        *r = (struct rule){.from = 1, .to = 1L << 60};
        if (sscanf(text, "%15[^:]:%23[^@]", r->call, action) != 2) abort();
        char *at = strchr(text, '@');
        if (at) {
            char *end;
            r->from = strtol(at + 1, &end, 10);
            if (*end != '+') r->to = r->from;
        }
        for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
            if (!strcmp(action, errors[i].name)) { r->action = ERRNO; r->value = errors[i].value; known = true; }
        for (size_t i = 0; i < sizeof actions / sizeof *actions; i++)
            if (actions[i] && !strcmp(action, actions[i])) { r->action = (enum action)i; known = true; }
        if (!strncmp(action, "delay=", 6)) { r->action = DELAY; r->value = atoi(action + 6); known = true; }
        if (!known) abort();
        power |= r->action >= POWER;
    }
    free(copy);
}

__attribute__((constructor)) static void start(void) { parse(); }

/* Absolute path of a descriptor or of a name; false: not under the directory. */
static bool ours_fd(int fd, char *path)
{
    char proc[64];
    snprintf(proc, sizeof proc, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(proc, path, PATH_BYTES - 1);
    path[n > 0 ? n : 0] = 0;
    return n > 0 && !strncmp(path, dir, strlen(dir));
}

static bool ours_name(const char *name, char *path)
{
    char cwd[PATH_BYTES / 2] = "";
    if (*name == '/') snprintf(path, PATH_BYTES, "%s", name);
    else snprintf(path, PATH_BYTES, "%s/%s", getcwd(cwd, sizeof cwd) ? cwd : "", name);
    return !strncmp(path, dir, strlen(dir));
}

static const struct rule *passes(const char *call, const char *path)
{
    bool reads = !strcmp(call, "open") || !strcmp(call, "read") || !strcmp(call, "close");
    struct rule *fired = NULL;
    for (int i = 0; i < n_rules; i++) {
        struct rule *r = &rules[i];
        if (strcmp(r->call, call) && (strcmp(r->call, "change") || reads)) continue;
        r->passed++;
        if (r->passed >= r->from && r->passed <= r->to && !fired) fired = r;
    }
    const char *log = getenv("DISTILL_SHIM_LOG");
    if (fired && log && fired->passed == fired->from) {
        int fd = REAL(open)(log, O_WRONLY | O_CREAT | O_APPEND, 0666);
        dprintf(fd, "%s %s\n", call, path);
        REAL(close)(fd);
    }
    if (!fired) return NULL;
    if (fired->action >= POWER) cut(fired->action);
    if (fired->action >= KILL) for (;;) { kill(getpid(), SIGKILL); pause(); }
    if (fired->action == DELAY) nanosleep(&(struct timespec){fired->value / 1000, fired->value % 1000 * 1000000L}, NULL);
    return fired->action == ERRNO || fired->action == SHORT ? fired : NULL;
}

/* Runs `body` under the lock if the call is ours; `r` is the rule that fired. */
#define HOOK(is_ours, call, body) \
    if (n_rules && !inside) { \
        char path[PATH_BYTES]; \
        inside = 1; \
        pthread_mutex_lock(&lock); \
        if (is_ours) { const struct rule *r = passes(call, path); (void)r; body } \
        pthread_mutex_unlock(&lock); \
        inside = 0; \
    }
#define FAILED(r) ((r) && (r)->action == ERRNO)

/* ---- the calls ---- */

static int open_hook(const char *name, int flags, mode_t mode)
{
    int error = 0;
    HOOK(ours_name(name, path), "open", {
        struct stat st;
        if (FAILED(r)) error = r->value;
        else if (power && (flags & O_CREAT) && stat(path, &st)) change_new(CREATED, path);
    })
    if (error) { errno = error; return -1; }
    return REAL(open)(name, flags, mode);
}

int open(const char *name, int flags, ...)
{
    va_list ap;
    va_start(ap, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(ap, mode_t) : 0;
    va_end(ap);
    return open_hook(name, flags, mode);
}

int open64(const char *name, int flags, ...)
{
    va_list ap;
    va_start(ap, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(ap, mode_t) : 0;
    va_end(ap);
    return open_hook(name, flags | O_LARGEFILE, mode);
}

static ssize_t write_hook(int fd, const void *data, size_t bytes, off_t at /* -1: where the descriptor stands */)
{
    int error = 0;
    HOOK(ours_fd(fd, path), "write", {
        if (FAILED(r)) error = r->value;
        else if (r && r->action == SHORT && bytes > 1) bytes /= 2;
        if (!error && power) {
            struct stat st;
            off_t begin = at;
            if (at < 0) begin = fcntl(fd, F_GETFL) & O_APPEND && !fstat(fd, &st) ? st.st_size : lseek(fd, 0, SEEK_CUR);
            before_write(fd, begin, bytes);
        }
    })
    if (error) { errno = error; return -1; }
    return at < 0 ? REAL(write)(fd, data, bytes) : REAL(pwrite)(fd, data, bytes, at);
}

ssize_t write(int fd, const void *data, size_t bytes) { return write_hook(fd, data, bytes, -1); }
ssize_t pwrite(int fd, const void *data, size_t bytes, off_t at) { return write_hook(fd, data, bytes, at); }
ssize_t pwrite64(int fd, const void *data, size_t bytes, off64_t at) { return write_hook(fd, data, bytes, at); }

static ssize_t read_hook(int fd, void *data, size_t bytes, off_t at)
{
    int error = 0;
    HOOK(ours_fd(fd, path), "read", {
        if (FAILED(r)) error = r->value;
        else if (r && r->action == SHORT && bytes > 1) bytes /= 2;
    })
    if (error) { errno = error; return -1; }
    return at < 0 ? REAL(read)(fd, data, bytes) : REAL(pread)(fd, data, bytes, at);
}

ssize_t read(int fd, void *data, size_t bytes) { return read_hook(fd, data, bytes, -1); }
ssize_t pread(int fd, void *data, size_t bytes, off_t at) { return read_hook(fd, data, bytes, at); }
ssize_t pread64(int fd, void *data, size_t bytes, off64_t at) { return read_hook(fd, data, bytes, at); }

int fsync(int fd)
{
    int error = 0;
    HOOK(ours_fd(fd, path), "fsync", { if (FAILED(r)) error = r->value; else if (power) on_sync(fd, path); })
    if (error) { errno = error; return -1; }
    return REAL(fsync)(fd);
}

int close(int fd)
{
    int error = 0;
    HOOK(ours_fd(fd, path), "close", { if (FAILED(r)) error = r->value; })
    int rc = REAL(close)(fd);
    if (error) { errno = error; return -1; }
    return rc;
}

int rename(const char *from, const char *to)
{
    int error = 0;
    char target[PATH_BYTES];
    HOOK(ours_name(to, path), "rename", {
        if (FAILED(r)) error = r->value;
        else if (power && ours_name(from, target)) {
            struct stat st;
            struct change *c = change_new(RENAMED, target);
            c->to = strdup(path);
            if (!stat(path, &st) && S_ISREG(st.st_mode) && link(path, c->backup = backup_name())) abort();
        }
    })
    if (error) { errno = error; return -1; }
    return REAL(rename)(from, to);
}

int mkdir(const char *name, mode_t mode)
{
    int error = 0;
    HOOK(ours_name(name, path), "mkdir", { if (FAILED(r)) error = r->value; })
    if (error) { errno = error; return -1; }
    return REAL(mkdir)(name, mode);
}

int unlink(const char *name)
{
    int error = 0;
    HOOK(ours_name(name, path), "unlink", {
        struct stat st;
        if (FAILED(r)) error = r->value;
        else if (power && !stat(path, &st)) {
            struct change *c = change_new(REMOVED, path);
            if (link(path, c->backup = backup_name())) abort();
        }
    })
    if (error) { errno = error; return -1; }
    return REAL(unlink)(name);
}

static int ftruncate_hook(int fd, off_t size)
{
    int error = 0;
    HOOK(ours_fd(fd, path), "ftruncate", { if (FAILED(r)) error = r->value; else if (power) before_write(fd, size, SIZE_MAX / 2); })
    if (error) { errno = error; return -1; }
    return REAL(ftruncate)(fd, size);
}

int ftruncate(int fd, off_t size) { return ftruncate_hook(fd, size); }
int ftruncate64(int fd, off64_t size) { return ftruncate_hook(fd, size); }

static void free_space(const char *name, struct statvfs *s)
{
    const char *text = getenv("DISTILL_SHIM_FREE");
    char path[PATH_BYTES];
    if (!text || !*dir || !ours_name(name, path)) return;
    s->f_frsize = 1;
    s->f_bavail = strtoull(text, NULL, 10);
}

int statvfs(const char *name, struct statvfs *s)
{
    int rc = REAL(statvfs)(name, s);
    if (!rc) free_space(name, s);
    return rc;
}

int statvfs64(const char *name, struct statvfs64 *s)
{
    int rc = REAL(statvfs64)(name, s);
    if (!rc) free_space(name, (struct statvfs *)s);
    return rc;
}
