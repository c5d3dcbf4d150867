/* Files: whole reads with a bound, writes that are never visible half-done, directories. All errors are ERR_IO unless said. */
#ifndef BASE_FILE_H
#define BASE_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Reads a whole regular file; *data is NUL-terminated (not counted in *bytes) and freed by the caller.
 * Larger than `max` is ERR_INPUT: nothing is allocated from a size a file claims. */
int file_read(const char *path, size_t max, char **data, size_t *bytes);
/* Reads exactly `bytes` at `offset`; loops over short reads and EINTR; end of file is ERR_INPUT. `path` is for the message. */
int file_pread(int fd, void *data, size_t bytes, int64_t offset, const char *path);
/* Writes all of it; loops over short writes and EINTR. */
int file_write_all(int fd, const void *data, size_t bytes, const char *path);
/* path.tmp-PID, write, fsync, rename, fsync of the directory: the old file or the new one, never a mix. */
int file_replace(const char *path, const void *data, size_t bytes);
/* The same, but of several processes that create one file the first wins: a file that is there stays as it is, and that is OK too. Where the file system has no hard links
 * it is file_replace(). */
int file_create(const char *path, const void *data, size_t bytes);
/* Removes path.tmp-PID (and what grew from it) of processes that are gone: a process killed in file_replace() cannot do it itself.
 * `alone`: the caller holds the lock under which these are made (base/lock.h), so that every one but its own is a dead one's. Else a PID that exists is
 * taken for a living writer, which is the safe mistake. */
int file_remove_leftovers(const char *path, bool alone);
int file_sync_dir(const char *dir);                 /* fsync a directory so that renames in it last */
int file_sync_path(const char *path);
int dir_make(const char *path);                     /* mkdir -p */
int dir_remove_tree(const char *path);              /* rm -r; a missing path is OK */
/* Sorted names in a directory, without . and ..; free with names_free(). */
int dir_list(const char *path, char ***names, int *n);
void names_free(char **names, int n);
bool path_exists(const char *path);
bool path_is_dir(const char *path);
int64_t path_size(const char *path);                /* -1 when it cannot be read */
char *path_join(const char *dir, const char *name); /* malloc'd */
/* Copies a file's bytes under a new name through file_replace semantics. */
int file_copy(const char *from, const char *to);

#endif
