/* A block: which of its threads runs, where they meet, and the memory they share. Threads run until they meet: lanes of a warp at shuffles and votes,
 * threads of the block at barriers. That some never come, come to different places or have returned is an error, as it is undefined on a device. */
#include <string.h>

#include <algorithm>

#include "tests/emulator/parts.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator
{

running now;

enum state { READY, AT_WARP, AT_BARRIER, ENDED };
struct pending_copy {
    void *to;
    const void *from;
    int bytes, group;
};
static struct thread {
    state is;
    uint3 index;
    /* where it waits, with what, and what it gets */
    meeting kind;
    unsigned mask;
    uint64_t value, result;
    int parameter, width;
    place at;
    std::vector<pending_copy> copies; /* cp.async */
    int groups;                       /* closed so far */
} threads[THREADS_MOST];

static std::string described(const thread &t)
{
    char text[300];
    if (t.mask) snprintf(text, sizeof text, "%s:%d (mask %08x)", t.at.file, t.at.line, t.mask);
    else snprintf(text, sizeof text, "%s:%d", t.at.file, t.at.line); /* a barrier */
    return text;
}
static bool same_place(const thread &a, const thread &b)
{
    return a.kind == b.kind && a.mask == b.mask && a.at.line == b.at.line && !strcmp(a.at.file, b.at.file);
}

/* ---- a warp's lanes ---- */

/* The lane that lane l reads */
static int source(const thread &t, int l)
{
    int group = l / t.width * t.width;
    switch (t.kind) {
    case SHUFFLE: return group + (t.parameter & (t.width - 1));
    case SHUFFLE_XOR: return (l ^ t.parameter) < group + t.width ? l ^ t.parameter : l;
    default: return l - t.parameter < group ? l : l - t.parameter; /* SHUFFLE_UP */
    }
}

/* If all lanes that t waits for are there: their results, and they are ready; else false. */
static bool try_to_meet(const thread &t)
{
    int first = (int)(&t - threads) & ~31, lanes = std::min(32, now.threads - first);
    thread *lane = threads + first;
    auto taking_part = [&](int l) { return l < lanes && (t.mask >> l & 1) && lane[l].is != ENDED; };
    for (int l = lanes - 1; l >= 0; l--)
        if (taking_part(l) && lane[l].is != AT_WARP) return false;
    uint64_t made_of_all = 0;
    for (int l = 0; l < lanes; l++) {
        if (!taking_part(l)) continue;
        if (!same_place(lane[l], t)) stop("lanes of a warp meet at different places: " + described(t) + " and " + described(lane[l]));
        if (t.kind == BALLOT) made_of_all |= (uint64_t)(lane[l].value != 0) << l;
        if (t.kind == REDUCE_ADD) made_of_all = (unsigned)(made_of_all + lane[l].value);
        if (t.kind == REDUCE_MAX && lane[l].value > made_of_all) made_of_all = lane[l].value;
    }
    for (int l = 0; l < lanes; l++) {
        if (!taking_part(l)) continue;
        lane[l].result = made_of_all;
        if (t.kind == SHUFFLE || t.kind == SHUFFLE_XOR || t.kind == SHUFFLE_UP) {
            int from = source(lane[l], l);
            if (!taking_part(from)) stop("a shuffle reads lane " + std::to_string(from) + ", which is not there: " + described(lane[l]));
            lane[l].result = lane[from].value;
        }
    }
    if (t.kind == SYNCWARP) now.syncwarps[first / 32]++;
    for (int l = 0; l < lanes; l++)
        if (taking_part(l)) lane[l].is = READY;
    return true;
}

uint64_t meet_warp(meeting kind, unsigned mask, uint64_t value, int parameter, int width, place at)
{
    thread &me = threads[now.thread];
    me.kind = kind, me.mask = mask, me.value = value, me.parameter = parameter, me.width = width, me.at = at;
    if (!(mask >> (now.thread & 31) & 1)) stop("a lane is not in its own mask: " + described(me));
    me.is = AT_WARP;
    if (!try_to_meet(me)) fiber_yield(false);
    return me.result;
}

/* ---- a block's threads ---- */

int meet_block(meeting kind, bool predicate, place at)
{
    thread &me = threads[now.thread];
    me.kind = kind, me.mask = 0, me.value = predicate, me.at = at;
    me.is = AT_BARRIER;
    fiber_yield(false);
    return (int)me.result;
}

/* Nobody is ready: all must have come to one barrier. */
static void release_barrier()
{
    const thread *first = nullptr;
    bool ended = false;
    uint64_t count = 0;
    for (int t = 0; t < now.threads; t++) {
        const thread &it = threads[t];
        now.thread = t;
        threadIdx = it.index;
        ended |= it.is == ENDED;
        if (it.is == ENDED) continue;
        if (it.is == AT_WARP) stop("lanes of a warp wait for others that do not come: " + described(it));
        if (first && !same_place(it, *first)) stop("threads of a block wait at different barriers: " + described(it) + " and " + described(*first));
        first = &it;
        count += it.value;
    }
    if (ended) stop("a barrier that some threads of the block never reach, for they have returned: " + described(*first));
    for (int t = 0; t < now.threads; t++) threads[t].result = count, threads[t].is = READY;
    now.barriers++;
}

void thread_body()
{
    now.body(now.context);
    threads[now.thread].is = ENDED;
}

static void resume(int t)
{
    now.thread = t;
    threadIdx = threads[t].index;
    fiber_resume(t);
}

/* The ready lanes of a warp, until none is, or, in random order, until it is another warp's turn. Whether any was ready. */
static bool run_warp(int warp)
{
    static std::vector<int> turns;
    int first = 32 * warp, lanes = std::min(32, now.threads - first);
    bool any = false, again = true;
    arrange(turns, lanes);
    while (again) {
        again = false;
        for (int l : turns) {
            if (threads[first + l].is != READY) continue;
            again = any = true;
            resume(first + l);
            if (threads[first + l].is != ENDED) continue;
            for (int w = first; w < first + lanes; w++) /* who waited for this one too waits for one less */
                if (threads[w].is == AT_WARP) try_to_meet(threads[w]);
        }
        if (schedule() == RANDOM && random_below(3) == 0) break;
    }
    return any;
}

void run_block(uint3 index)
{
    blockIdx = index;
    now.block_number++;
    now.barriers = 0;
    memset(now.syncwarps, 0, sizeof now.syncwarps);
    now.static_shared = 0;
    for (int t = 0; t < now.threads; t++) {
        threads[t].is = READY;
        threads[t].index = {(unsigned)t % blockDim.x, (unsigned)t / blockDim.x % blockDim.y, (unsigned)t / blockDim.x / blockDim.y};
        threads[t].copies.clear();
        threads[t].groups = 0;
        fiber_restart(t);
    }
    std::vector<int> warps;
    for (;;) {
        bool any = false;
        arrange(warps, (now.threads + 31) / 32);
        for (int w : warps) any |= run_warp(w);
        if (any) continue;
        if (std::all_of(threads, threads + now.threads, [](const thread &t) { return t.is == ENDED; })) return;
        release_barrier();
    }
}

/* ---- memory that threads share ---- */

void *shared_variable::of_block_bytes(size_t bytes)
{
    if (!memory) memory = memory_take(bytes, 16, true);
    if (block != now.block_number) {
        block = now.block_number;
        now.static_shared += (bytes + 7) & ~(size_t)7;
        memset(memory, 0xff, bytes);
    }
    return memory;
}

void before_atomic(const void *p, size_t bytes)
{
    memory_atomic(p, bytes);
    if (schedule() == RANDOM && random_below(4) == 0) fiber_yield(false); /* still ready: goes on later */
}

void copy_async(void *to, const void *from, int bytes)
{
    thread &me = threads[now.thread];
    if (((uintptr_t)to | (uintptr_t)from) % (uintptr_t)bytes) stop("cp.async of misaligned addresses");
    memory_reads(from, (size_t)bytes);
    me.copies.push_back({to, from, bytes, me.groups});
}

void close_async_group() { threads[now.thread].groups++; }

void wait_async(int groups_left)
{
    thread &me = threads[now.thread];
    auto arrives = [&](const pending_copy &c) {
        if (c.group >= me.groups - groups_left && !(schedule() == RANDOM && random_below(4) == 0)) return false;
        memory_writes(c.to, (size_t)c.bytes);
        memcpy(c.to, c.from, (size_t)c.bytes);
        return true;
    };
    me.copies.erase(std::remove_if(me.copies.begin(), me.copies.end(), arrives), me.copies.end());
}

} // namespace emulator
