/* host_memory: what /proc/meminfo and control groups say. */
#include <criterion/criterion.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "base/host_memory.h"

static char dir[64];

static void make_dir(void) { strcpy(dir, "/tmp/test_host_memory_XXXXXX"); cr_assert(mkdtemp(dir)); }
static void remove_dir(void) { cr_assert_eq(dir_remove_tree(dir), OK); }

TestSuite(host_memory, .init = make_dir, .fini = remove_dir);

static void put(const char *name, const char *text)
{
    char *path = path_join(dir, name);
    FILE *f = fopen(path, "w");
    cr_assert(f && fputs(text, f) >= 0 && fclose(f) == 0);
    free(path);
}

Test(host_memory, here)
{
    int64_t available = host_memory_available();
    cr_expect_gt(available, 1 << 20);
    cr_expect_leq(available, (int64_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE));
}

Test(host_memory, control_groups)
{
    cr_expect_eq(control_group_available(dir), INT64_MAX);                      /* no such files */
    put("memory.max", "max\n");
    put("memory.current", "700\n");
    cr_expect_eq(control_group_available(dir), INT64_MAX);
    put("memory.max", "1000\n");
    cr_expect_eq(control_group_available(dir), 300);
    put("memory.stat", "anon 450\nfile 250\ninactive_file_x 9\ninactive_file 200\nactive_file 50\n");
    cr_expect_eq(control_group_available(dir), 550);                            /* page cache makes room */
    put("memory.max", "400\n");
    cr_expect_eq(control_group_available(dir), 0);
}

Test(host_memory, control_groups_of_version_1)
{
    put("memory.limit_in_bytes", "5000000000\n");
    put("memory.usage_in_bytes", "3000000000\n");
    put("memory.stat", "inactive_file 7\ntotal_inactive_file 500000000\ntotal_active_file 0\n");
    cr_expect_eq(control_group_available(dir), 2500000000);
}
