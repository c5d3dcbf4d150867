/* random_normal: x[i] = mean + std normal(seed, first + i). A function of the element's number alone, whatever range it is made in. */
#include "tests/kernels/ops.h"

#include <math.h>

#include "base/rng.h"

struct random_case { int64_t count; float mean, std; uint64_t seed; int64_t first; };
static const struct random_case cases[] = {{1, 0, 1, 1, 0}, {1000, 0, 0.02f, 7, (int64_t)1 << 33}, {257, 1, 0, 3, 5}, {70001, -0.5f, 3, UINT64_MAX, 12345}};
/* more than the 132 x 32 blocks of an H200 take in one turn of their loop, in either half too */
static const struct random_case true_cases[] = {{3000001, 0, 0.02f, 7, 12345}};

static const char *name(const void *c_) { const struct random_case *c = c_; return text("count %ld mean %g std %g first %ld", (long)c->count, (double)c->mean, (double)c->std, (long)c->first); }

static void run(struct rig *r, const void *c_, struct outputs *out)
{
    const struct random_case *c = c_;
    act *x = poison_act(r, c->count), *parts = poison_act(r, c->count);
    r->op->random_normal(r->be, x, c->count, c->mean, c->std, c->seed, c->first);
    int64_t half = c->count / 2;
    size_t width = dtype_width(r->be->act_dtype);
    r->op->random_normal(r->be, (act *)((char *)parts + (size_t)half * width), c->count - half, c->mean, c->std, c->seed, c->first + half);
    r->op->random_normal(r->be, parts, half, c->mean, c->std, c->seed, c->first);
    take_act(out, r, "x", FORWARD, x, c->count);
    take_act(out, r, "parts", FORWARD, parts, c->count);
    cr_assert_arr_eq(output(out, "x")->x, output(out, "parts")->x, (size_t)c->count * sizeof(float), "%s on %s: two ranges give other numbers than one", name(c), r->be->name);
}

Test(cpu, definition)
{
    struct rig r;
    rig_open_cpu(&r);
    for (size_t i = 0; i < COUNT(cases); i++) {
        const struct random_case *c = &cases[i];
        struct outputs out = {0};
        run(&r, c, &out);
        double *want = xmalloc((size_t)c->count * sizeof *want), sum = 0, squares = 0;
        for (int64_t k = 0; k < c->count; k++) {
            struct philox p = philox4x32(c->seed, 1, (uint64_t)(c->first + k));
            want[k] = (double)c->mean + (double)c->std * (double)normal_float(p.v[0], p.v[1]);
            double z = c->std > 0 ? (want[k] - (double)c->mean) / (double)c->std : 0;
            sum += z;
            squares += z * z;
        }
        expect_close(&out, "x", want, c->count, 1e-6, name(c));
        if (c->count > 10000) {                             /* five standard errors of mean and variance */
            double n = (double)c->count;
            cr_expect(fabs(sum / n) < 5 / sqrt(n) && fabs(squares / n - 1) < 5 * sqrt(2 / n), "%s: mean %g, variance %g of what should be standard normals", name(c), sum / n, squares / n);
        }
        free(want);
        outputs_free(&out);
        rig_reset(&r, name(c));
    }
    rig_close(&r);
}

static const struct case_list list = {"random_normal", cases, COUNT(cases), sizeof *cases, run, name};
Test(gpu, fp32) { ops_compare(&list, "fp32"); }
Test(gpu, bf16) { ops_compare(&list, "bf16"); }

static const struct case_list true_list = {"random_normal", true_cases, COUNT(true_cases), sizeof *true_cases, run, name};
Test(gpu, true_sizes_fp32) { ops_compare(&true_list, "fp32"); }
Test(gpu, true_sizes_bf16) { ops_compare(&true_list, "bf16"); }
