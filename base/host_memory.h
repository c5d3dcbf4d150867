/* What this process can still take of the host's memory. */
#ifndef BASE_HOST_MEMORY_H
#define BASE_HOST_MEMORY_H

#include <stdint.h>

/* Bytes: what the kernel calls available (free, or page cache that it would give up), or less where a control group that the process is in, a container's say, leaves less below its limit. */
int64_t host_memory_available(void);

/* The same of one control group, by its directory: of version 2 (memory.max) or 1 (memory.limit_in_bytes); INT64_MAX without a limit or without such files. */
int64_t control_group_available(const char *dir);

#endif
