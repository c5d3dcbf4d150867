/* A block's threads as fibers: their stacks, the switch from one to the other (x86-64), and AddressSanitizer's notion of which stack is in use. */
#include <stdlib.h>
#include <sys/mman.h>

#include "tests/emulator/parts.h"

#ifdef EMULATE_ADDRESS
#include <sanitizer/common_interface_defs.h>
#define START_SWITCH(save, bottom, size) __sanitizer_start_switch_fiber(save, bottom, size)
#define FINISH_SWITCH(saved, bottom, size) __sanitizer_finish_switch_fiber(saved, bottom, size)
#else
#define START_SWITCH(save, bottom, size) ((void)(save))
#define FINISH_SWITCH(saved, bottom, size) ((void)(saved))
#endif

/* Pushes what a call preserves, stores the stack's pointer in *save, and continues where `to` was stored. */
extern "C" void emulator_switch(void **save, void *to);
asm(R"(
.text
.globl emulator_switch
emulator_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");

namespace emulator
{

enum { STACK_BYTES = 512 << 10, SAVED_REGISTERS = 6 };

static struct {
    char *stack;
    void *top;
} fibers[THREADS_MOST];
static void *resumer; /* the stack that fiber_resume() was called on */
static const void *resumer_bottom;
static size_t resumer_bytes;

static void begin()
{
    FINISH_SWITCH(nullptr, &resumer_bottom, &resumer_bytes);
    thread_body();
    fiber_yield(true);
    abort();
}

void fiber_restart(int thread)
{
    auto &f = fibers[thread];
    if (!f.stack) {
        void *p = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) stop("no memory for the stacks of a block");
        f.stack = (char *)p;
    }
    void **top = (void **)(f.stack + STACK_BYTES - 64);
    *--top = nullptr; /* where begin() would return to; with it the stack is aligned as a call leaves it */
    *--top = (void *)begin;
    for (int i = 0; i < SAVED_REGISTERS; i++) *--top = nullptr;
    f.top = top;
}

void fiber_resume(int thread)
{
    void *fake = nullptr;
    START_SWITCH(&fake, fibers[thread].stack, STACK_BYTES);
    emulator_switch(&resumer, fibers[thread].top);
    FINISH_SWITCH(fake, nullptr, nullptr);
}

void fiber_yield(bool last)
{
    void *fake = nullptr;
    START_SWITCH(last ? nullptr : &fake, resumer_bottom, resumer_bytes);
    emulator_switch(&fibers[now.thread].top, resumer);
    FINISH_SWITCH(fake, &resumer_bottom, &resumer_bytes);
}

} // namespace emulator
