/* Who writes which shard of a dataset: byte-range locks on `.lock`, which the kernel takes back when their owner dies.
 *
 *     byte 0        held for the moments in which something changes that all writers share: manifest, journal
 *     byte 1        shared by every writer as long as it has the dataset open; a repair holds it alone
 *     byte 2 + n    held while shard n is made, from the claim to its line in the journal
 *
 * The locks are of the open file, not of the process (F_OFD_SETLK): two writers of one process exclude each other too, and closing another
 * descriptor releases nothing. The file's content is for messages only: 48 bytes at 48 n say who has claimed shard n, "pid host\n"; the last
 * writer empties it. A lock says something only where the file system passes it on to the other machines: FORMAT.md, "Several writers". */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/failpoint.h"
#include "base/file.h"
#include "data/shard_internal.h"

enum { OWNER_BYTES = 48, BYTE_SHARED = 0, BYTE_PRESENCE = 1, BYTE_SHARDS = 2, PATIENCE_MS = 60000, POLL_MS = 4 };

static int lock_set(int fd, short type, int64_t start, int64_t length)
{
    struct flock l = {.l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = length};
    int rc;
    if (type != F_UNLCK && FAILPOINT_FIRES("claim.lock")) return -1;
    do rc = fcntl(fd, F_OFD_SETLK, &l); while (rc && errno == EINTR);
    return rc;
}

static bool taken_by_another(int error) { return error == EAGAIN || error == EACCES; }

/* "pid 12 on node7", for messages. */
static const char *owner_text(const struct shard_claims *c, int64_t shard)
{
    static _Thread_local char text[OWNER_BYTES + 16];
    char record[OWNER_BYTES + 1] = "", host[OWNER_BYTES + 1] = "";
    long long pid;
    ssize_t n = pread(c->fd, record, OWNER_BYTES, shard * OWNER_BYTES);
    record[n > 0 ? n : 0] = 0;
    if (sscanf(record, "%18lld %48s", &pid, host) == 2) snprintf(text, sizeof text, "pid %lld on %s", pid, host);
    else snprintf(text, sizeof text, "its pid is not known");
    return text;
}

/* Waits its turn: what is done under this lock takes milliseconds. */
int claims_enter(struct shard_claims *c)
{
    if (!c->locks) return OK;
    for (int waited = 0; lock_set(c->fd, F_WRLCK, BYTE_SHARED, 1); waited += POLL_MS) {
        if (!taken_by_another(errno)) return fail_errno(ERR_IO, "%s: cannot lock", c->path);
        if (waited >= PATIENCE_MS) return fail(ERR_IO, "%s: has been locked by another process for a minute; see what uses this dataset", c->path);
        nanosleep(&(struct timespec){.tv_nsec = POLL_MS * 1000000L}, NULL);
    }
    return OK;
}

void claims_leave(struct shard_claims *c)
{
    if (c->locks) lock_set(c->fd, F_UNLCK, BYTE_SHARED, 1);
}

int claims_open(struct shard_claims *c, const char *dir, enum claims_mode mode)
{
    int rc = OK;
    *c = (struct shard_claims){.path = path_join(dir, ".lock"), .fd = -1, .locks = true};
    c->fd = open(c->path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (c->fd < 0) { rc = fail_errno(ERR_IO, "%s: cannot open; the dataset's directory must be writable", c->path); goto out; }
    if (!lock_set(c->fd, mode == CLAIMS_ALONE ? F_WRLCK : F_RDLCK, BYTE_PRESENCE, 1)) goto out;
    if (taken_by_another(errno)) {
        if (mode == CLAIMS_ALONE) rc = fail(ERR_IO, "%s: a teacher-dump is writing this dataset (%s); wait for it or stop it", dir, owner_text(c, 0));
        else rc = fail(ERR_IO, "%s: is being repaired by another process; wait for it", dir);
    } else if (mode == CLAIMS_OPTIONAL) c->locks = false;       /* the user has parted the work, because locks are not to be had here */
    else rc = fail_errno(ERR_IO, "%s: this file system has no locks; give every process shards of its own, teacher-dump --shards A:B", c->path);
out:
    if (rc != OK) {
        c->locks = false;                                       /* not ours: its content stays */
        claims_close(c);
    }
    return rc;
}

/* Is a byte from `start` on locked by somebody else? */
static bool locked_elsewhere(const struct shard_claims *c, int64_t start, int64_t length)
{
    struct flock l = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = start, .l_len = length};
    return fcntl(c->fd, F_OFD_GETLK, &l) == 0 && l.l_type != F_UNLCK;
}

bool claims_alone(const struct shard_claims *c) { return c->locks && !locked_elsewhere(c, BYTE_PRESENCE, 1); }

void claims_close(struct shard_claims *c)
{
    if (c->fd >= 0) {
        if (c->locks && claims_enter(c) == OK && claims_alone(c) && ftruncate(c->fd, 0)) warn("%s: cannot be emptied", c->path);
        close(c->fd);
    }
    free(c->path);
    *c = (struct shard_claims){.fd = -1};
}

int claim_take(struct shard_claims *c, int64_t shard, bool *taken)
{
    char owner[OWNER_BYTES + 1], host[64] = "";
    *taken = true;
    if (!c->locks) return OK;
    if (lock_set(c->fd, F_WRLCK, BYTE_SHARDS + shard, 1)) {
        *taken = false;
        return taken_by_another(errno) ? OK : fail_errno(ERR_IO, "%s: cannot lock", c->path);
    }
    gethostname(host, sizeof host - 1);
    int n = snprintf(owner, sizeof owner, "%lld %.20s", (long long)getpid(), *host ? host : "?");
    memset(owner + n, ' ', (size_t)(OWNER_BYTES - n));
    owner[OWNER_BYTES - 1] = '\n';
    ssize_t written = pwrite(c->fd, owner, OWNER_BYTES, shard * OWNER_BYTES);
    (void)written;                                              /* a message without a pid is no reason to stop */
    return OK;
}

void claim_drop(struct shard_claims *c, int64_t shard)
{
    if (c->locks) lock_set(c->fd, F_UNLCK, BYTE_SHARDS + shard, 1);
}

const char *claim_owner(const struct shard_claims *c, int64_t shard) { return owner_text(c, shard); }
