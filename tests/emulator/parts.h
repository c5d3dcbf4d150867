/* What the parts of the runtime know of each other.
 *
 * One OS thread runs everything: blocks one after another, the threads of a block as fibers (fibers.cpp), which change places where threads meet, and
 * nowhere else but before atomics in random order. block.cpp runs a block, launch.cpp a grid of them, cudart.cpp stands in for CUDA's host functions,
 * and one of memory_address.cpp and memory_race.cpp watches memory. A rule that is broken ends the process with a sentence that begins with
 * "emulator:". */
#ifndef TESTS_EMULATOR_PARTS_H
#define TESTS_EMULATOR_PARTS_H

#include <string>
#include <vector>

#include "tests/emulator/runtime.h"

namespace emulator
{

enum order { FORWARD, REVERSE, RANDOM }; /* DISTILL_EMULATE_ORDER */
order schedule();
unsigned random_below(unsigned n);
/* The order in which n things come */
void arrange(std::vector<int> &turns, int n);

const char *setting(const char *name, const char *otherwise); /* an environment variable that is set and not empty */
std::string where();                                          /* kernel, block, thread */
[[noreturn]] void stop(const std::string &what);              /* names where() if a kernel is running */

enum : size_t { STATIC_SHARED_MOST = 48 << 10, SHARED_MOST = 227 << 10, THREADS_MOST = 1024 };
extern struct running {
    bool active;
    const char *kernel;
    int threads, thread; /* in the block; the one that runs */
    uint64_t kernel_number, block_number;
    uint32_t barriers, syncwarps[THREADS_MOST / 32]; /* of this block so far: what orders memory */
    size_t static_shared;                            /* bytes that this block has asked for */
    void (*body)(void *);
    void *context;
} now;
void run_block(uint3 index);

void allow_dynamic_shared(const void *kernel, int bytes); /* cudaFuncSetAttribute */
cudaError_t take_last_error();

void fiber_restart(int thread); /* its next fiber_resume() begins at thread_body() */
void fiber_resume(int thread);  /* runs it until it yields */
void fiber_yield(bool last);    /* back to who resumed it; last: it has ended */
void thread_body();             /* block.cpp */

/* ---- memory: memory_address.cpp or memory_race.cpp ---- */

void *memory_take(size_t bytes, size_t alignment, bool shared);
void memory_give_back(void *p);
void memory_close(void *p, size_t bytes); /* not to be touched by kernels */
void memory_open(void *p, size_t bytes);
/* What the compiler's instrumentation does not see; stops where it is not allowed. */
void memory_reads(const void *p, size_t bytes);
void memory_writes(void *p, size_t bytes);
void memory_atomic(const void *p, size_t bytes);
void memory_end_of_launch();

} // namespace emulator

#endif
