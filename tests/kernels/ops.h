/* What the op tests share. A test file holds one case list, one function that runs a case on whichever backend the rig opened,
 * and one double-precision definition of the op, written from its equation. Then
 *     Test(cpu, ...)   the CPU against the definition: outputs directly, gradients by central differences of the definition
 *     Test(gpu, ...)   the device against the CPU, in fp32 and in bf16 on inputs rounded to bf16 first (ops_compare)
 *     Test(gpu, true_sizes_...)   the same on a second list: the sizes of training, of which the small ones are no sample where code depends on size (loops that take another turn, a row or a
 *                                 chunk that takes several blocks or launches, the tiles of large products). For a card at its own speed: the emulator and
 *                                 the sanitizers leave out whatever has this name (scripts/emulate.sh, scripts/gpu.sh).
 * Every device buffer is poisoned (bytes of 0xff: NaN in fp32 and bf16, -1 in integers), so an element nobody writes is seen, and
 * carries a guard behind its end that is checked when the case is over. The scratch arena is exactly as large as the backend asks.
 *
 * Metric: relative L2, one number per tensor. Bounds of the device: fp32 1e-5 forward, 1e-4 backward; bf16 5e-3 and 1e-2; sums of products
 * in fp8 2e-3 and 5e-3, because the matrix units keep some 13 bits of them and not fp32's 24; the CPU is held to about 1e-6 against the
 * definition. OPS_VERBOSE=1 in the environment prints every error; OPS_CASES=n compares at most n cases of a list,
 * spread over it: what a sanitizer, under which a case takes seconds, has time for. */
#ifndef TESTS_KERNELS_OPS_H
#define TESTS_KERNELS_OPS_H

#include <criterion/criterion.h>

#include "base/error.h"
#include "base/half.h"
#include "kernels/backend.h"
#include "tests/compare.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))

struct rig {                        /* an open backend, and everything one case allocated on it */
    struct backend *be;
    const struct ops *op;
    bool round_inputs;              /* acts() and grads() round to bf16 first, on whichever backend */
    struct allocation { void *host, *device; size_t bytes; } *allocations;
    int n;
};

void rig_open_cpu(struct rig *r);
/* Ends the case: checks the guards, frees what it allocated; the backend stays open. `what` is for the message. */
void rig_reset(struct rig *r, const char *what);
void rig_close(struct rig *r);
/* Allocates and poisons be->scratch. */
void rig_scratch(struct rig *r, struct op_limits limits);

/* Host inputs, freed by rig_reset: normals from (seed, index), rounded to bf16 if the rig says so. */
float *acts(struct rig *r, int64_t n, float scale, uint64_t seed);
float *floats(struct rig *r, int64_t n);                               /* host, uninitialised */
/* Device buffers, freed by rig_reset. */
void *upload(struct rig *r, const void *from, size_t bytes);
act *upload_act(struct rig *r, const float *from, int64_t n);          /* NULL in, NULL out */
grad *upload_grad(struct rig *r, const float *from, int64_t n);
moment *upload_moment(struct rig *r, const float *from, int64_t n);
void *poison(struct rig *r, size_t bytes);
act *poison_act(struct rig *r, int64_t n);
static inline float *poison_float(struct rig *r, int64_t n) { return poison(r, (size_t)n * sizeof(float)); }

/* What a case produced, copied to the host. */
enum bound { EXACT, FORWARD, BACKWARD, FP8_SUM };
struct output {
    char name[24];
    enum bound bound;
    int64_t n;
    float *x;
    double floor;       /* the reference's root mean square counts as at least this: for gradients that cancel to nothing */
};
struct outputs { struct output o[64]; int n; };
void take_act(struct outputs *out, struct rig *r, const char *name, enum bound bound, const act *x, int64_t n);
void take_grad(struct outputs *out, struct rig *r, const char *name, enum bound bound, const grad *x, int64_t n);
void take_moment(struct outputs *out, struct rig *r, const char *name, enum bound bound, const moment *x, int64_t n);
void take_float(struct outputs *out, struct rig *r, const char *name, enum bound bound, const float *x, int64_t n);
void take_host(struct outputs *out, const char *name, enum bound bound, const float *x, int64_t n);
struct output *output(struct outputs *out, const char *name);   /* fails the test when there is none */
void outputs_free(struct outputs *out);

/* One assertion: output `name` within `bound` of n doubles. A non-finite value must be matched by the same one. */
void expect_close(struct outputs *out, const char *name, const double *want, int64_t n, double bound, const char *what);
/* The same for a tensor held elsewhere. */
void expect_floats(const float *got, const double *want, int64_t n, double floor, double bound, const char *what, const char *name);

/* Output `name` is the gradient of `loss(context)` with respect to x[n], which the loss reads in place. 4-point central differences
 * with step h: every element when 4 n evaluations fit the budget, else along 4 dense random directions, which see any wrong element too. */
void expect_gradient(struct outputs *out, const char *name, double *x, int64_t n, double (*loss)(void *context), void *context, double h, int64_t budget,
                     double bound, const char *what);

/* The gpu half: runs all cases on the CPU and on device cuda in `precision`, compares every output. "fp32", "bf16" (recipe compact), or "exact": bf16 with the recipe
 * of that name, whose gradients and moments are fp32. Without a device it prints
 * SKIPPED with the reason and skips the test. */
struct case_list { const char *op; const void *cases; size_t n, size; void (*run)(struct rig *r, const void *c, struct outputs *out); const char *(*name)(const void *c); };
void ops_compare(const struct case_list *l, const char *precision);
/* For gpu tests of their own: false (after printing SKIPPED) without a device. */
bool rig_open_gpu(struct rig *r, const char *op, const char *precision);

double *doubles(const float *x, int64_t n);     /* malloc'd copy */
/* A printf into a ring of static buffers: names of cases. */
const char *text(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

#endif
