/* An fcntl() lock of the open file (F_OFD_SETLK): it is the file's, not the process's, so two owners in one process exclude each other too. */
#include "base/lock.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/error.h"

enum { POLL_MS = 20, OWNER_BYTES = 96 };

static int try_lock(int fd)
{
    struct flock l = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    int rc;
    do rc = fcntl(fd, F_OFD_SETLK, &l); while (rc && errno == EINTR);
    return rc;
}

/* For the message of the next one: "12 on node7". */
static void write_owner(int fd)
{
    char host[64] = "", owner[OWNER_BYTES];
    gethostname(host, sizeof host - 1);
    int n = snprintf(owner, sizeof owner, "%lld on %s\n", (long long)getpid(), *host ? host : "an unnamed host");
    if (ftruncate(fd, 0) || pwrite(fd, owner, (size_t)n, 0) != n) return;   /* a lock without a name is a lock */
}

static const char *read_owner(int fd, char owner[OWNER_BYTES])
{
    ssize_t n = pread(fd, owner, OWNER_BYTES - 1, 0);
    owner[n > 0 ? n : 0] = 0;
    owner[strcspn(owner, "\n")] = 0;
    return *owner ? owner : "unknown";
}

int lock_take(int *fd, const char *path, const char *what, double seconds)
{
    char owner[OWNER_BYTES];
    int rc = OK;
    *fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (*fd < 0) return fail_errno(ERR_IO, "%s: cannot open", path);
    for (double waited = 0; try_lock(*fd); waited += POLL_MS * 1e-3) {
        if (errno != EAGAIN && errno != EACCES) {
            warn("%s: this file system has no locks: see to it yourself that nothing else uses %s", path, what);
            goto none;
        }
        if (waited >= seconds) {
            rc = fail(ERR_IO, "%s is in use by pid %s; wait for it or stop it, or choose another directory", what, read_owner(*fd, owner));
            goto none;
        }
        nanosleep(&(struct timespec){.tv_nsec = POLL_MS * 1000000L}, NULL);
    }
    write_owner(*fd);
    return OK;
none:
    close(*fd);
    *fd = -1;
    return rc;
}
