/* See memory.h. */
#include "train/memory.h"

#include <string.h>

#include "base/error.h"
#include "base/host_memory.h"

enum { ALIGN = 256, MAX_ROWS = 32 };

struct slot { void **address; int row; size_t bytes, offset; };
struct row { const char *name, *key; size_t bytes; void *block; bool on_host; };

struct memory_plan {
    struct backend *be;
    struct row row[MAX_ROWS]; int n_rows;
    struct slot *slot; int n_slots, room;
    bool committed;
};

struct memory_plan *memory_plan_new(struct backend *be)
{
    struct memory_plan *m = xcalloc(1, sizeof *m);
    m->be = be;
    return m;
}

void memory_plan_free(struct memory_plan *m)
{
    if (!m) return;
    for (int i = 0; i < m->n_rows; i++) if (m->row[i].block) (m->row[i].on_host ? m->be->ops->release_host : m->be->ops->release)(m->be, m->row[i].block);
    free(m->slot);
    free(m);
}

void memory_add_slot(struct memory_plan *m, const char *name, const char *key, void **address, size_t bytes)
{
    CHECK(!m->committed, "memory for \"%s\" asked for after the plan was committed", name);
    int r = 0;
    while (r < m->n_rows && strcmp(m->row[r].name, name)) r++;
    if (r == m->n_rows) {
        CHECK(r < MAX_ROWS, "too many rows in the memory plan");
        m->row[m->n_rows++] = (struct row){.name = name, .key = key};
    }
    if (m->n_slots == m->room) m->slot = xrealloc(m->slot, (size_t)(m->room = m->room ? 2 * m->room : 64) * sizeof *m->slot);
    m->slot[m->n_slots++] = (struct slot){address, r, bytes, m->row[r].bytes};
    m->row[r].bytes += (bytes + ALIGN - 1) / ALIGN * ALIGN;
    *address = NULL;
}

void memory_add_host_slot(struct memory_plan *m, const char *name, const char *key, void **address, size_t bytes)
{
    memory_add_slot(m, name, key, address, bytes);
    m->row[m->slot[m->n_slots - 1].row].on_host = true;
}

void memory_add_scratch(struct memory_plan *m, size_t bytes)
{
    for (int i = 0; i < m->n_slots; i++)
        if (m->slot[i].address == &m->be->scratch) {
            if (bytes <= m->be->scratch_bytes) return;
            m->row[m->slot[i].row].bytes = 0;               /* the row holds nothing else */
            m->slot[i] = m->slot[--m->n_slots];
        }
    m->be->scratch_bytes = bytes;
    memory_add(m, "scratch", "corpus.row_length", &m->be->scratch, bytes);
}

size_t memory_total(const struct memory_plan *m)
{
    size_t total = 0;
    for (int i = 0; i < m->n_rows; i++) if (!m->row[i].on_host) total += m->row[i].bytes;
    return total;
}

static size_t limit_now(const struct memory_plan *m, size_t limit)
{
    int64_t available = m->be->ops->available(m->be);
    return !limit || (int64_t)limit > available ? (size_t)available : limit;
}

bool memory_fits(const struct memory_plan *m, size_t limit) { return memory_total(m) <= limit_now(m, limit); }

/* The largest row of the device, or of the host */
static const struct row *largest_row(const struct memory_plan *m, bool on_host)
{
    const struct row *largest = NULL;
    for (int i = 0; i < m->n_rows; i++) if (m->row[i].on_host == on_host && (!largest || m->row[i].bytes > largest->bytes)) largest = &m->row[i];
    return largest;
}

int memory_check(const struct memory_plan *m, size_t limit)
{
    size_t total = memory_total(m), host = 0;
    int64_t host_available = host_memory_available();
    limit = limit_now(m, limit);
    for (int i = 0; i < m->n_rows; i++) if (m->row[i].on_host) host += m->row[i].bytes;
    const struct row *largest = largest_row(m, false);
    if (total > limit)
        return fail(ERR_IO, "device %s: the run needs %.2f GiB and may use %.2f GiB; the largest part is %s with %.2f GiB: make %s smaller",
                    m->be->name, (double)total / 0x1p30, (double)limit / 0x1p30, largest->name, (double)largest->bytes / 0x1p30, largest->key);
    largest = largest_row(m, true);
    if (m->be->host_memory && largest) host += total;       /* all of it is the host's */
    if (largest && (int64_t)host > host_available)                     /* else a container is killed, without a word, while it is pinned */
        return fail(ERR_IO, "host memory: the run needs %.2f GiB, for device %s to copy from, and %.2f GiB can be had; the largest part is %s with %.2f GiB: make %s smaller",
                    (double)host / 0x1p30, m->be->name, (double)host_available / 0x1p30, largest->name, (double)largest->bytes / 0x1p30, largest->key);
    return OK;
}

int memory_commit(struct memory_plan *m, size_t limit)
{
    int rc = memory_check(m, limit);
    if (rc != OK) return rc;
    for (int i = 0; i < m->n_rows; i++) {
        if (!m->row[i].bytes) continue;
        m->row[i].block = (m->row[i].on_host ? m->be->ops->alloc_host : m->be->ops->alloc)(m->be, m->row[i].bytes);
        if (!m->row[i].block && m->row[i].on_host)
            return fail(ERR_IO, "no %.2f GiB of host memory for %s that device %s can copy from; free some, or raise the locked-memory limit", (double)m->row[i].bytes / 0x1p30, m->row[i].name, m->be->name);
        if (!m->row[i].block)
            return fail(ERR_IO, "device %s: no memory for %s (%.2f GiB); make %s smaller", m->be->name, m->row[i].name, (double)m->row[i].bytes / 0x1p30, m->row[i].key);
    }
    for (int i = 0; i < m->n_slots; i++)
        if (m->slot[i].bytes) *m->slot[i].address = (char *)m->row[m->slot[i].row].block + m->slot[i].offset;
    m->committed = true;
    return OK;
}

bool memory_row(const struct memory_plan *m, int i, const char **name, size_t *bytes)
{
    if (i >= m->n_rows) return false;
    *name = m->row[i].name;
    *bytes = m->row[i].bytes;
    return true;
}

void memory_print(const struct memory_plan *m, FILE *f)
{
    size_t total = memory_total(m);
    fprintf(f, "memory on %s\n", m->be->name);
    for (int i = 0; i < m->n_rows; i++)
        if (m->row[i].on_host) fprintf(f, "  %-28s %9.3f GiB  on the host   %s\n", m->row[i].name, (double)m->row[i].bytes / 0x1p30, m->row[i].key);
        else fprintf(f, "  %-28s %9.3f GiB  %5.1f %%   %s\n", m->row[i].name, (double)m->row[i].bytes / 0x1p30, total ? 100.0 * (double)m->row[i].bytes / (double)total : 0, m->row[i].key);
    fprintf(f, "  %-28s %9.3f GiB\n", "total", (double)total / 0x1p30);
}
