/* Fail points: named places where a test, or a person who wants to see it, makes this process die or a call fail.
 *
 *     DISTILL_FAIL="journal.torn:kill"                  die there the first time
 *     DISTILL_FAIL="shard.write:enospc@3,x.y:error@2+"  the third call fails with ENOSPC; every call from the second on with EIO
 *
 * point:action[@n[+]], comma-separated; actions: kill (SIGKILL to this process), term (SIGTERM to
 * it, and on it goes), error (EIO), enospc. Without @n every
 * pass fires. A point costs one load and a branch when the variable is unset. `grep -r FAILPOINT` lists the points.
 */
#ifndef BASE_FAILPOINT_H
#define BASE_FAILPOINT_H

#include <stdatomic.h>
#include <stdbool.h>

#include "base/error.h"

/* True, with errno set, when the call that follows is to fail: `if (FAILPOINT_FIRES("shard.sync") || fsync(fd)) ...` */
#define FAILPOINT_FIRES(name) (atomic_load_explicit(&failpoint_armed, memory_order_relaxed) && failpoint_fires(name))
/* A status: OK, or ERR_IO with a message, for places between calls: `TRY(FAILPOINT("shard.after_write"));` */
#define FAILPOINT(name) (FAILPOINT_FIRES(name) ? fail_errno(ERR_IO, "fail point %s", name) : OK)

extern atomic_int failpoint_armed;          /* 0: nothing is set; -1 until DISTILL_FAIL was read */
bool failpoint_fires(const char *name);
/* Replaces what DISTILL_FAIL says (NULL or "": nothing fires) and starts counting anew. ERR_USAGE when it is misspelt. */
int failpoint_set(const char *spec);

#endif
