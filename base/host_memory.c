/* Linux says it in text files: /proc/meminfo, and of control groups (Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst) those of the process's own and of all above it. */
#include "base/host_memory.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"

/* The number that a file holds alone, or behind `key` and a space at the beginning of a line; `otherwise` where there is none ("max", too) */
static int64_t number_in(const char *dir, const char *name, const char *key, int64_t otherwise)
{
    char *path = xasprintf("%s/%s", dir, name), line[256];
    FILE *f = fopen(path, "r");
    size_t n = key ? strlen(key) : 0;
    long long value = otherwise;
    while (f && fgets(line, sizeof line, f))
        if (!n || (!strncmp(line, key, n) && line[n] == ' ')) {
            if (sscanf(line + n, "%lld", &value) != 1) value = otherwise;
            break;
        }
    if (f) fclose(f);
    free(path);
    return value;
}

int64_t control_group_available(const char *dir)
{
    int64_t limit = number_in(dir, "memory.max", NULL, -1), used = number_in(dir, "memory.current", NULL, 0), cache = number_in(dir, "memory.stat", "inactive_file", 0) + number_in(dir, "memory.stat", "active_file", 0) +
            number_in(dir, "memory.stat", "slab_reclaimable", 0);
    if (limit < 0) {
        limit = number_in(dir, "memory.limit_in_bytes", NULL, -1);
        used = number_in(dir, "memory.usage_in_bytes", NULL, 0);
        cache = number_in(dir, "memory.stat", "total_inactive_file", 0) + number_in(dir, "memory.stat", "total_active_file", 0);
    }
    if (limit < 0) return INT64_MAX;
    int64_t left = limit - (used > cache ? used - cache : 0);
    return left > 0 ? left : 0;
}

int64_t host_memory_available(void)
{
    int64_t kib = number_in("/proc", "meminfo", "MemAvailable:", -1), least = kib >= 0 ? kib * 1024 : (int64_t)sysconf(_SC_AVPHYS_PAGES) * sysconf(_SC_PAGESIZE);
    char line[1024];
    FILE *f = fopen("/proc/self/cgroup", "r");
    while (f && fgets(line, sizeof line, f)) {              /* 0::/a/b of version 2; 5:cpu,memory:/a/b of version 1 */
        char *names = strchr(line, ':'), *path = names ? strchr(names + 1, ':') : NULL;
        if (!path) continue;
        line[strcspn(line, "\n")] = 0;
        bool second = path == names + 1;
        *path++ = 0;
        if (!second && !strstr(names, "memory")) continue;
        for (;;) {                                          /* a container sees its own group as the topmost, under whatever path */
            char *dir = xasprintf("/sys/fs/cgroup%s%s", second ? "" : "/memory", path);
            int64_t left = control_group_available(dir);
            free(dir);
            if (left < least) least = left;
            char *last = strrchr(path, '/');
            if (!last) break;
            *last = 0;
        }
    }
    if (f) fclose(f);
    return least;
}
