/* What translated kernels call, by way of device.h: where threads meet, memory that they share, launches. */
#ifndef TESTS_EMULATOR_RUNTIME_H
#define TESTS_EMULATOR_RUNTIME_H

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#ifdef EMULATE_RACE
#define UNWATCHED __attribute__((no_sanitize("thread"), noinline)) /* its accesses are told to the race check as what they are */
#else
#define UNWATCHED
#endif

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulator
{

/* ---- of kernels: where threads meet ---- */

struct place {
    const char *file;
    int line;
};
enum meeting { SHUFFLE, SHUFFLE_XOR, SHUFFLE_UP, BALLOT, REDUCE_ADD, REDUCE_MAX, SYNCWARP, BARRIER, BARRIER_COUNT };

/* Lanes of a warp, those in `mask`: gives each the value of another (by parameter and width), or what is made of all. */
uint64_t meet_warp(meeting kind, unsigned mask, uint64_t value, int parameter, int width, place at);
/* All threads of the block. */
int meet_block(meeting kind, bool predicate, place at);

/* ---- of kernels: memory ---- */

/* A __shared__ variable: undefined (bytes of 0xff) in every block anew */
struct shared_variable {
    void *memory;
    uint64_t block;
    void *of_block_bytes(size_t bytes);
    template <typename T> T &of_block() { return *(T *)of_block_bytes(sizeof(T)); }
};
void *dynamic_shared_memory();

/* Whoever is ready may go first (in random order); the race check hears of it. */
void before_atomic(const void *p, size_t bytes);
template <typename T, typename F> UNWATCHED T atomic(T *p, F changed)
{
    before_atomic(p, sizeof *p);
    T was = *p;
    *p = changed(was);
    return was;
}

/* cp.async: what was asked for arrives when its group is waited for, or, in random order, at an earlier wait. */
void copy_async(void *to, const void *from, int bytes);
void close_async_group();
void wait_async(int groups_left);

void check_launch_bounds(int most);
float approximate(float exact); /* DISTILL_EMULATE_NOISE: what an approximate instruction may give */

/* ---- launches ---- */

void launch_body(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared, void (*body)(void *), void *context);
template <typename F> void launch(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t, F body)
{
    launch_body(
        name, kernel, grid, block, shared, [](void *f) { (*(F *)f)(); }, &body);
}

} // namespace emulator

#endif
