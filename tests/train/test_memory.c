/* The memory plan: where slots lie, that a plan which does not fit stops before the first allocation and says what to shrink, and that
 * everything taken is given back. The backend's alloc and release are wrapped, so that allocations can be counted and made to fail. */
#include <criterion/criterion.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "train/memory.h"

static struct backend *cpu, be;
static struct ops ops;
static int taken, released, fail_at;
static int64_t machine;

static void *counted_alloc(struct backend *b, size_t bytes)
{
    (void)b;
    if (++taken == fail_at) return NULL;
    return cpu->ops->alloc(cpu, bytes);
}

static void counted_release(struct backend *b, void *p)
{
    (void)b;
    released++;
    cpu->ops->release(cpu, p);
}

static int64_t small_machine(struct backend *b) { (void)b; return machine; }

static void open_backend(void)
{
    struct backend_options device = {.device = "cpu"};
    cr_assert_eq(backend_open(&cpu, &device), OK);
    ops = *cpu->ops;
    ops.alloc = counted_alloc;
    ops.release = counted_release;
    ops.available = small_machine;
    be = *cpu;
    be.ops = &ops;
    taken = released = fail_at = 0;
    machine = 1 << 20;
}

static void close_backend(void) { backend_close(cpu); }
TestSuite(memory, .init = open_backend, .fini = close_backend);

Test(memory, slots_are_aligned_apart_and_one_block_a_row)
{
    static const size_t sizes[] = {1, 255, 256, 257, 0, 4096, 3, 1000};
    enum { N = sizeof sizes / sizeof *sizes };
    void *slot[N];
    size_t total = 0;
    struct memory_plan *m = memory_plan_new(&be);
    for (int i = 0; i < N; i++) {
        slot[i] = &slot;                                     /* whatever was there */
        memory_add(m, i % 2 ? "odd" : "even", "some.key", &slot[i], sizes[i]);
        cr_expect_null(slot[i], "a slot is NULL until the commit");
        total += (sizes[i] + 255) / 256 * 256;
    }
    cr_expect_eq(memory_total(m), total);
    cr_assert_eq(memory_commit(m, 0), OK, "%s", fail_message());
    cr_expect_eq(taken, 2);
    for (int i = 0; i < N; i++) {
        if (!sizes[i]) { cr_expect_null(slot[i]); continue; }
        cr_assert_not_null(slot[i]);
        cr_expect_eq((uintptr_t)slot[i] % 256, 0);
        memset(slot[i], i + 1, sizes[i]);
    }
    for (int i = 0; i < N; i++)                              /* nobody wrote over a neighbour */
        for (size_t b = 0; b < sizes[i]; b++) cr_assert_eq(((unsigned char *)slot[i])[b], i + 1);
    memory_plan_free(m);
    cr_expect_eq(released, 2);
}

Test(memory, scratch_is_the_largest_of_its_calls)
{
    void *before, *after;
    struct memory_plan *m = memory_plan_new(&be);
    memory_add(m, "other", "key", &before, 100);
    memory_add_scratch(m, 1000);
    memory_add_scratch(m, 5000);
    memory_add(m, "other", "key", &after, 100);
    memory_add_scratch(m, 2000);
    cr_expect_eq(be.scratch_bytes, 5000);
    cr_expect_eq(memory_total(m), 2 * 256 + 5120);
    cr_assert_eq(memory_commit(m, 0), OK);
    cr_assert(be.scratch && before && after && before != after);
    memset(be.scratch, 1, 5000);
    memset(before, 2, 100);
    memset(after, 3, 100);
    cr_expect_eq(((char *)be.scratch)[4999], 1);
    memory_plan_free(m);
}

Test(memory, what_does_not_fit_is_refused_before_the_first_allocation)
{
    static const struct { int64_t machine; size_t limit; bool fits; } cases[] = {
        {1 << 20, 0, true}, {70656, 0, true}, {70655, 0, false}, {1 << 20, 70656, true}, {1 << 20, 70655, false}, {70655, 1 << 20, false}, {0, 0, false}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        void *a, *b, *c;
        struct memory_plan *m = memory_plan_new(&be);
        machine = cases[i].machine;
        taken = 0;
        memory_add(m, "weights", "the model", &a, 5000);                 /* 5120 */
        memory_add(m, "activations", "train.micro_rows", &b, 65000);     /* 65024 */
        memory_add(m, "batch", "train.micro_rows", &c, 512);
        int rc = memory_commit(m, cases[i].limit);
        cr_expect_eq(rc, cases[i].fits ? OK : ERR_IO, "case %zu", i);
        if (!cases[i].fits) {
            cr_expect_eq(taken, 0);
            cr_expect(strstr(fail_message(), "activations") && strstr(fail_message(), "train.micro_rows") && strstr(fail_message(), "GiB"), "%s", fail_message());
        }
        memory_plan_free(m);
    }
}

Test(memory, an_allocation_that_fails_names_its_row_and_gives_the_others_back)
{
    void *a, *b, *c;
    struct memory_plan *m = memory_plan_new(&be);
    memory_add(m, "weights", "the model", &a, 5000);
    memory_add(m, "gradients", "student.config", &b, 5000);
    memory_add(m, "logits", "train.chunk_tokens", &c, 5000);
    fail_at = 2;
    cr_expect_eq(memory_commit(m, 0), ERR_IO);
    cr_expect(strstr(fail_message(), "gradients") && strstr(fail_message(), "student.config"), "%s", fail_message());
    memory_plan_free(m);
    cr_expect_eq(released, 1);
}

Test(memory, the_table_has_every_row_and_the_total)
{
    void *a, *b;
    char *text = NULL;
    size_t size;
    struct memory_plan *m = memory_plan_new(&be);
    memory_add(m, "weights", "the model", &a, (size_t)3 << 30);
    memory_add(m, "activations", "train.micro_rows", &b, (size_t)1 << 30);
    FILE *f = open_memstream(&text, &size);
    memory_print(m, f);
    fclose(f);
    cr_expect(strstr(text, "weights") && strstr(text, "3.000 GiB") && strstr(text, "75.0 %") && strstr(text, "train.micro_rows") && strstr(text, "4.000 GiB"), "%s", text);
    free(text);
    memory_plan_free(m);
    memory_plan_free(NULL);
}

Test(memory, more_than_the_host_has)
{
    void *a, *b, *c;
    struct memory_plan *m = memory_plan_new(&be);
    memory_add(m, "weights", "the model", &a, 256);
    memory_add_host(m, "targets of two batches", "dump.batch_rows", &b, 256);
    memory_add_host(m, "blocks in host memory", "the model (teacher.precision: fp8 halves its blocks)", &c, (size_t)1 << 50);
    cr_assert_eq(memory_commit(m, 0), ERR_IO);
    cr_expect(strstr(fail_message(), "host memory") && strstr(fail_message(), "blocks in host memory with 1048576.00 GiB: make the model (teacher.precision"), "%s", fail_message());
    memory_plan_free(m);
}

Test(memory, asking_after_the_commit_is_our_bug, .signal = SIGABRT)
{
    void *a;
    struct memory_plan *m = memory_plan_new(&be);
    memory_add(m, "weights", "the model", &a, 256);
    cr_assert_eq(memory_commit(m, 0), OK);
    memory_add(m, "late", "key", &a, 256);
}
