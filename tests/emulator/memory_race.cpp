/* The race check. All of a device's memory lies in one arena; for every byte the last write and the last read of it are noted. The hooks that g++
 * -fsanitize=thread puts before every access (its run-time library is not linked, these are the functions it calls) compare each access with them. It
 * is a race that two threads of a launch touch a byte, at least one of them writes, not both atomically, and nothing orders them: a barrier of their
 * block, or __syncwarp within a warp. Shuffles and votes order nothing, nor do blocks order each other. */
#include <stdio.h>
#include <sys/mman.h>

#include <map>
#include <mutex>

#include "tests/emulator/parts.h"

namespace emulator
{

/* Who, and what had been passed by then */
struct access {
    uint64_t kernel, block;
    uint32_t barriers, syncwarps;
    uint16_t thread;
    bool atomic;
    void *pc;
};
struct history {
    access write, read;
    bool read_by_others;
}; /* by other threads of the block, too, since the barrier */
enum : uint64_t { SEVERAL_BLOCKS = ~0ull };

/* The upper half is shared memory: a block's own, though the next block finds the same addresses. */
static const size_t ARENA_BYTES = 16ull << 30;
static char *arena;
static history *histories;

/* ---- allocation: rounded up, and used again for the same size ---- */

static std::recursive_mutex mutex; /* memory is taken by the loader's threads, too */
static std::map<char *, size_t> taken;
static std::multimap<size_t, char *> idle[2];
static char *unused[2];

static bool is_shared(const void *p) { return (const char *)p >= arena + ARENA_BYTES / 2; }

static void *reserve(size_t bytes)
{
    void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) stop("no " + std::to_string(bytes >> 30) + " GiB of addresses for the race check: is there a ulimit -v?");
    return p;
}

void *memory_take(size_t bytes, size_t, bool shared)
{
    std::lock_guard<std::recursive_mutex> hold(mutex);
    if (!arena) {
        arena = unused[0] = (char *)reserve(ARENA_BYTES);
        unused[1] = arena + ARENA_BYTES / 2;
        histories = (history *)reserve(ARENA_BYTES * sizeof *histories);
    }
    size_t rounded = (bytes + 4096 + 1023) & ~(size_t)1023;
    auto found = idle[shared].find(rounded);
    char *p;
    if (found != idle[shared].end()) {
        p = found->second;
        idle[shared].erase(found);
    } else {
        p = unused[shared];
        if (p + rounded > arena + ARENA_BYTES / (shared ? 1 : 2)) return nullptr;
        unused[shared] += rounded;
    }
    taken[p] = rounded;
    return p;
}

void memory_give_back(void *p)
{
    std::lock_guard<std::recursive_mutex> hold(mutex);
    if (!p) return;
    auto it = taken.find((char *)p);
    idle[is_shared(p)].insert({it->second, it->first});
    taken.erase(it);
}

void memory_close(void *, size_t) {}
void memory_open(void *, size_t) {}

/* ---- the check ---- */

enum { REPORTS_MOST = 20 };
static int reports;

static void report(const char *what, const void *p, const access &me, const access &other)
{
    if (reports++ >= REPORTS_MOST) return;
    fprintf(stderr, "emulator: race: %s: %s at %p (pc %p); that was thread %u (pc %p)\n", where().c_str(), what, p, me.pc, other.thread, other.pc);
}

void memory_end_of_launch()
{
    if (reports) stop(std::to_string(reports) + " races in this launch");
}

/* Whether an earlier access is over before this one */
static bool ordered(const access &earlier, const access &me, bool shared)
{
    if (earlier.kernel != me.kernel) return true;
    if (earlier.block != me.block) return shared;
    return earlier.barriers != me.barriers || earlier.thread == me.thread ||
           (earlier.thread / 32 == me.thread / 32 && earlier.syncwarps != me.syncwarps);
}

__attribute__((always_inline)) static inline void check(const void *p, size_t bytes, bool write, bool atomic, void *pc)
{
    if ((const char *)p < arena || (const char *)p >= arena + ARENA_BYTES || !now.active) return;
    bool shared = is_shared(p);
    access me = {now.kernel_number, now.block_number, now.barriers, now.syncwarps[now.thread / 32], (uint16_t)now.thread, atomic, pc};
    for (size_t i = 0; i < bytes; i++) {
        history &h = histories[(const char *)p - arena + (ptrdiff_t)i];
        bool same_time = h.read.kernel == me.kernel && h.read.block == me.block && h.read.barriers == me.barriers;
        if (!ordered(h.write, me, shared) && !(atomic && h.write.atomic))
            return report(write ? "writes what another thread wrote" : "reads what another thread wrote", p, me, h.write);
        if (write) {
            bool read_before = ordered(h.read, me, shared) && !(h.read_by_others && same_time);
            if (!read_before && !(atomic && h.read.atomic)) return report("writes what another thread read", p, me, h.read);
            h.write = me;
        } else {
            bool other_block = !shared && h.read.kernel == me.kernel && h.read.block != me.block;
            h.read_by_others = same_time && (h.read_by_others || h.read.thread != me.thread);
            h.read = me;
            if (other_block) h.read.block = SEVERAL_BLOCKS;
        }
    }
}

#define PC __builtin_return_address(0)
void memory_reads(const void *p, size_t bytes) { check(p, bytes, false, false, PC); }
void memory_writes(void *p, size_t bytes) { check(p, bytes, true, false, PC); }
void memory_atomic(const void *p, size_t bytes) { check(p, bytes, true, true, PC); }

} // namespace emulator

extern "C" {

void __tsan_init(void) {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit(void) {}
#define HOOKS(kind, bytes)                                                                                                                           \
    void __tsan_##kind##read##bytes(void *p) { emulator::check(p, bytes, false, false, PC); }                                                        \
    void __tsan_##kind##write##bytes(void *p) { emulator::check(p, bytes, true, false, PC); }
#define HOOKS_OF_SIZE(bytes) HOOKS(, bytes) HOOKS(unaligned_, bytes) HOOKS(volatile_, bytes)
HOOKS_OF_SIZE(1)
HOOKS_OF_SIZE(2)
HOOKS_OF_SIZE(4)
HOOKS_OF_SIZE(8)
HOOKS_OF_SIZE(16)
void __tsan_read_range(void *p, unsigned long bytes) { emulator::check(p, bytes, false, false, PC); }
void __tsan_write_range(void *p, unsigned long bytes) { emulator::check(p, bytes, true, false, PC); }

} // extern "C"
