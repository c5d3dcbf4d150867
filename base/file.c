/* See file.h. Every write here ends in fsync; a failed fsync is final (after it the kernel may have dropped the pages). */
#include "base/file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"

char *path_join(const char *dir, const char *name) { return xasprintf("%s/%s", dir, name); }

bool path_exists(const char *path) { struct stat st; return stat(path, &st) == 0; }
bool path_is_dir(const char *path) { struct stat st; return stat(path, &st) == 0 && S_ISDIR(st.st_mode); }
int64_t path_size(const char *path) { struct stat st; return stat(path, &st) == 0 ? (int64_t)st.st_size : -1; }

int file_pread(int fd, void *data, size_t bytes, int64_t offset, const char *path)
{
    char *p = data;
    while (bytes) {
        ssize_t n = pread(fd, p, bytes, offset);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return fail_errno(ERR_IO, "%s: cannot read", path);
        if (n == 0) return fail(ERR_INPUT, "%s: ends early: %zu more bytes were expected at offset %lld", path, bytes, (long long)offset);
        p += n; offset += n; bytes -= (size_t)n;
    }
    return OK;
}

int file_write_all(int fd, const void *data, size_t bytes, const char *path)
{
    const char *p = data;
    while (bytes) {
        ssize_t n = write(fd, p, bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return fail_errno(ERR_IO, "%s: cannot write %zu bytes", path, bytes);
        p += n; bytes -= (size_t)n;
    }
    return OK;
}

int file_read(const char *path, size_t max, char **data, size_t *bytes)
{
    int rc = OK, fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    char *buffer = NULL;
    if (fd < 0) { rc = fail_errno(ERR_IO, "%s: cannot open", path); goto out; }
    if (fstat(fd, &st)) { rc = fail_errno(ERR_IO, "%s: cannot stat", path); goto out; }
    if (!S_ISREG(st.st_mode)) { rc = fail(ERR_INPUT, "%s: is not a regular file", path); goto out; }
    if ((size_t)st.st_size > max) { rc = fail(ERR_INPUT, "%s: is %lld bytes, more than the %zu this kind of file may have", path, (long long)st.st_size, max); goto out; }
    buffer = malloc((size_t)st.st_size + 1);
    if (!buffer) { rc = fail(ERR_IO, "%s: no memory for its %lld bytes", path, (long long)st.st_size); goto out; }
    TRY(file_pread(fd, buffer, (size_t)st.st_size, 0, path));
    buffer[st.st_size] = 0;
    *data = buffer;
    *bytes = (size_t)st.st_size;
    buffer = NULL;
out:
    free(buffer);
    if (fd >= 0) close(fd);
    return rc;
}

int file_sync_path(const char *path)
{
    int rc = OK, fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return fail_errno(ERR_IO, "%s: cannot open", path);
    if (fsync(fd)) rc = fail_errno(ERR_IO, "%s: cannot sync to disk", path);
    close(fd);
    return rc;
}

int file_sync_dir(const char *dir) { return file_sync_path(dir); }

static int sync_parent(const char *path)
{
    const char *slash = strrchr(path, '/');
    char *dir = slash ? xstrndup(path, slash == path ? 1 : (size_t)(slash - path)) : xstrdup(".");
    int rc = file_sync_dir(dir);
    free(dir);
    return rc;
}

/* Links have names of their own: EEXIST comes from the file system, without a moment between looking and doing. */
static bool links(const char *tmp, const char *path) { return !link(tmp, path) || errno == EEXIST; }

static int write_beside(const char *path, const void *data, size_t bytes, bool replace)
{
    int rc = OK, fd = -1;
    char *tmp = xasprintf("%s.tmp-%d", path, (int)getpid());
    fd = open(tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) { rc = fail_errno(ERR_IO, "%s: cannot create", tmp); goto out; }
    TRY(file_write_all(fd, data, bytes, tmp));
    if (fsync(fd)) { rc = fail_errno(ERR_IO, "%s: cannot sync to disk", tmp); goto out; }
    int closed = close(fd);
    fd = -1;
    if (closed) { rc = fail_errno(ERR_IO, "%s: cannot close", tmp); goto out; }
    if (!replace && links(tmp, path)) unlink(tmp);
    else if (rename(tmp, path)) { rc = fail_errno(ERR_IO, "%s: cannot rename to %s", tmp, path); goto out; }
    TRY(sync_parent(path));
out:
    if (fd >= 0) close(fd);
    if (rc != OK) unlink(tmp);
    free(tmp);
    return rc;
}

int file_replace(const char *path, const void *data, size_t bytes) { return write_beside(path, data, bytes, true); }
int file_create(const char *path, const void *data, size_t bytes) { return write_beside(path, data, bytes, false); }

int file_copy(const char *from, const char *to)
{
    char *data = NULL;
    size_t bytes;
    int rc = OK;
    TRY(file_read(from, (size_t)1 << 40, &data, &bytes));
    TRY(file_replace(to, data, bytes));
out:
    free(data);
    return rc;
}

int dir_make(const char *path)
{
    char *p = xstrdup(path);
    int rc = OK;
    for (char *s = p + (*p != 0);; s++) {
        char c = *s;
        if (c && c != '/') continue;
        *s = 0;
        if (mkdir(p, 0777) && errno != EEXIST) { rc = fail_errno(ERR_IO, "%s: cannot create this directory", p); break; }
        *s = c;
        if (!c) break;
    }
    if (rc == OK && !path_is_dir(path)) rc = fail(ERR_IO, "%s: exists and is not a directory", path);
    free(p);
    return rc;
}

static int by_name(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

int dir_list(const char *path, char ***names, int *n)
{
    DIR *d = opendir(path);
    if (!d) return fail_errno(ERR_IO, "%s: cannot open this directory", path);
    char **list = NULL;
    int count = 0, room = 0;
    for (struct dirent *e; errno = 0, (e = readdir(d));) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
        if (count == room) list = xrealloc(list, (size_t)(room = room ? 2 * room : 16) * sizeof *list);
        list[count++] = xstrdup(e->d_name);
    }
    int error = errno;
    closedir(d);
    if (error) {
        names_free(list, count);
        errno = error;
        return fail_errno(ERR_IO, "%s: cannot read this directory", path);
    }
    if (count) qsort(list, (size_t)count, sizeof *list, by_name);
    *names = list;
    *n = count;
    return OK;
}

void names_free(char **names, int n)
{
    for (int i = 0; i < n; i++) free(names[i]);
    free(names);
}

int dir_remove_tree(const char *path)
{
    int rc = OK, n = 0;
    char **names = NULL;
    struct stat st;
    if (lstat(path, &st)) return OK;
    if (S_ISDIR(st.st_mode)) {
        TRY(dir_list(path, &names, &n));
        for (int i = 0; i < n; i++) {
            char *child = path_join(path, names[i]);
            rc = dir_remove_tree(child);
            free(child);
            if (rc != OK) goto out;
        }
        if (rmdir(path)) rc = fail_errno(ERR_IO, "%s: cannot remove", path);
    } else if (unlink(path)) rc = fail_errno(ERR_IO, "%s: cannot remove", path);
out:
    names_free(names, n);
    return rc;
}

int file_remove_leftovers(const char *path, bool alone)
{
    int rc = OK, n = 0;
    const char *slash = strrchr(path, '/');
    char *parent = slash ? xstrndup(path, slash == path ? 1 : (size_t)(slash - path)) : xstrdup("."), **names = NULL;
    char *prefix = xasprintf("%s.tmp-", slash ? slash + 1 : path), *end;
    TRY(dir_list(parent, &names, &n));
    for (int i = 0; i < n; i++) {
        if (strncmp(names[i], prefix, strlen(prefix))) continue;
        long pid = strtol(names[i] + strlen(prefix), &end, 10);
        if (pid <= 0 || (*end && strncmp(end, ".tmp-", 5)) || pid == getpid()) continue;
        if (!alone && (!kill((pid_t)pid, 0) || errno != ESRCH)) continue;
        char *leftover = path_join(parent, names[i]);
        rc = dir_remove_tree(leftover);
        free(leftover);
        if (rc != OK) goto out;
    }
out:
    names_free(names, n);
    free(parent);
    free(prefix);
    return rc;
}
