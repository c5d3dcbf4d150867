/* One owner of a directory at a time. */
#ifndef BASE_LOCK_H
#define BASE_LOCK_H

/* Takes `path` (made when missing, left behind afterwards) for this process and gives its descriptor in *fd; closing it gives the lock back, and so
 * does the death of the process, however it dies: what a PID in a file does not tell (reused, another container's, a zombie's).
 * Waits up to `seconds` for an owner that may be dying, then ERR_IO names it: "`what` is in use by pid 12 on node7 ...".
 * *fd is -1, with a warning, where the file system has no locks: then nobody watches. */
int lock_take(int *fd, const char *path, const char *what, double seconds);

#endif
