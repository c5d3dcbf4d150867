/* A timed backend computes what the one inside computes, counts its calls, and leaves the rest of the table alone. */
#include <criterion/criterion.h>
#include <string.h>

#include "base/error.h"
#include "kernels/timed.h"

enum { N = 5, C = 16, V = 24 };

static const struct timed_op *find(const struct timed_op *ops, int n, const char *name)
{
    for (int i = 0; i < n; i++) if (!strcmp(ops[i].name, name)) return &ops[i];
    return NULL;
}

static act *random_act(struct backend *be, int64_t count, uint64_t seed)
{
    act *x = be->ops->alloc(be, (size_t)count * 4);
    cr_assert_not_null(x);
    be->ops->random_normal(be, x, count, 0, 1, seed, 0);
    return x;
}

static void runs_on(const char *device)
{
    struct backend *be;
    if (backend_open(&be, &(struct backend_options){.device = device, .precision = "fp32"}) != OK) {
        fprintf(stderr, "SKIPPED: %s\n", fail_message());
        cr_skip_test("%s", fail_message());
    }
    struct op_limits limits = {.N = N, .C = C, .F = C, .V = V, .chunk_rows = N, .max_doc = N, .Hq = 1, .Hkv = 1, .D = C, .K = 1, .backward = true};
    be->scratch_bytes = be->ops->scratch_bytes(be, &limits);
    be->scratch = be->ops->alloc(be, be->scratch_bytes);
    act *x = random_act(be, N * C, 1), *w = random_act(be, V * C, 2), *square = random_act(be, C * C, 3), *y = random_act(be, N * V, 4), *z = random_act(be, N * V, 5);
    float want[N * V], got[N * V];
    be->ops->linear_forward(be, y, x, w, NULL, N, C, V);
    be->ops->download_act(be, want, y, N * V);

    struct backend *timed = timed_backend(be, V);
    const struct timed_op *ops;
    int n;
    timed->ops->mark(timed, 0);                              /* the caller's own places stay the caller's */
    timed->ops->linear_forward(timed, z, x, w, NULL, N, C, V);
    for (int i = 0; i < 3; i++) timed->ops->linear_forward(timed, y, x, square, NULL, N, C, C);
    timed->ops->mark(timed, 1);
    timed->ops->download_act(timed, got, z, N * V);          /* not timed, and works */
    timed_collect(timed, &ops, &n);
    cr_assert_arr_eq(got, want, sizeof want);
    cr_assert_eq(n, 2);
    cr_assert_eq(find(ops, n, "head forward")->calls, 1);
    cr_assert_eq(find(ops, n, "head forward")->phase, PHASE_HEAD);
    cr_assert_eq(find(ops, n, "linear_forward")->calls, 3);
    double sum = find(ops, n, "head forward")->seconds + find(ops, n, "linear_forward")->seconds;
    cr_assert(sum > 0 && sum <= timed->ops->seconds_between(timed, 0, 1) + 1e-6, "%g s in ops, %g s around them", sum, timed->ops->seconds_between(timed, 0, 1));

    for (int i = 0; i < TIMED_MAX_CALLS + 10; i++) timed->ops->fill_zero(timed, y, 4);      /* more than there are marks for */
    timed_collect(timed, &ops, &n);
    cr_assert_eq(find(ops, n, "fill_zero")->calls, TIMED_MAX_CALLS + 10);
    cr_assert_eq(find(ops, n, "linear_forward")->calls, 3);
    timed_free(timed);
    void *owned[] = {x, w, square, y, z, be->scratch};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) be->ops->release(be, owned[i]);
    backend_close(be);
}

Test(cpu, timed) { runs_on("cpu"); }
Test(gpu, fp32) { runs_on("cuda"); }
