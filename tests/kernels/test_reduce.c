/* reduce: sum_squares (=) and sum_rows (+=) in double, independent of the number of threads and of the scratch arena's size; and the
 * CPU's row statistics and exp, on which the objective stands. */
#include "tests/kernels/ops.h"

#include <math.h>
#include <omp.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

struct sum_case { int64_t count; float scale; };
static const struct sum_case cases[] = {{1, 1}, {7, 1}, {17, 1e-15f}, {1000, 1e15f}, {65535, 1}, {65536, 1}, {65537, 1}, {200001, 0.01f}, {700007, 1}};
/* four turns of the 1024 blocks of a device, which are asked for at once, and some of a fifth */
static const struct sum_case true_cases[] = {{20000003, 1}};

static const char *name(const void *c_) { const struct sum_case *c = c_; return text("count %ld scale %g", (long)c->count, (double)c->scale); }

static void take_double(struct outputs *out, struct rig *r, const char *which, const double *x)
{
    double value;
    r->op->download(r->be, &value, x, sizeof value);
    float v = (float)value;
    take_host(out, which, FORWARD, &v, 1);
}

static void run(struct rig *r, const void *c_, struct outputs *out)
{
    const struct sum_case *c = c_;
    float *x = acts(r, c->count, c->scale, 1);
    double start = 3.25 * (double)c->scale, *squares = poison(r, sizeof *squares), *sum = upload(r, &start, sizeof start);
    rig_scratch(r, (struct op_limits){.N = 1, .C = 8, .V = 1, .Hq = 1, .Hkv = 1, .D = 8});
    r->op->sum_squares(r->be, squares, upload_grad(r, x, c->count), c->count);
    r->op->sum_rows(r->be, sum, upload(r, x, (size_t)c->count * sizeof *x), c->count);
    take_double(out, r, "squares", squares);
    take_double(out, r, "sum", sum);
}

Test(cpu, definition)
{
    struct rig r;
    rig_open_cpu(&r);
    for (size_t i = 0; i < COUNT(cases); i++) {
        const struct sum_case *c = &cases[i];
        struct outputs out = {0};
        run(&r, c, &out);
        float *x = acts(&r, c->count, c->scale, 1);
        long double squares = 0, sum = 3.25L * c->scale;
        for (int64_t k = 0; k < c->count; k++) { squares += (long double)x[k] * x[k]; sum += x[k]; }
        double want[2] = {(double)squares, (double)sum};
        expect_close(&out, "squares", &want[0], 1, 1e-7, name(c));
        expect_close(&out, "sum", &want[1], 1, 1e-7, name(c));

        double got = NAN, first = NAN;                          /* the double itself, and its bits whatever the threads and the room */
        r.op->sum_squares(r.be, &first, (grad *)x, c->count);
        cr_assert(fabs(first - want[0]) <= 1e-13 * want[0], "%s: %.17g, not %.17g", name(c), first, want[0]);
        size_t room = r.be->scratch_bytes;
        for (int threads = 1; threads <= 3; threads++)
            for (size_t doubles = 1; doubles <= 3; doubles++) {
                omp_set_num_threads(threads);
                r.be->scratch_bytes = doubles * sizeof(double);
                r.op->sum_squares(r.be, &got, (grad *)x, c->count);
                cr_assert(!memcmp(&got, &first, sizeof got), "%s: %d threads, %zu partial sums: %.17g, not %.17g", name(c), threads, doubles, got, first);
            }
        r.be->scratch_bytes = room;
        outputs_free(&out);
        rig_reset(&r, name(c));
    }
    double empty = NAN;
    rig_scratch(&r, (struct op_limits){.N = 1, .C = 8, .V = 1, .Hq = 1, .Hkv = 1, .D = 8});
    r.op->sum_squares(r.be, &empty, NULL, 0);
    cr_assert(empty == 0);
    float bad[3] = {1, NAN, 2};
    r.op->sum_squares(r.be, &empty, (grad *)bad, 3);
    cr_assert(isnan(empty));
    rig_close(&r);
}

/* exp_fp32 is within 2 ulp, 0 below -87, infinite above 88.37, and passes NaN. */
Test(cpu, exp_fp32)
{
    double worst = 0;
    for (int i = 0; i <= 4000000; i++) {
        float x = -87.0f + 175.37f * (float)i / 4000000.0f;
        double want = exp((double)x), ulp = ldexp(1, ilogb(want) - 23), off = fabs(exp_fp32(x) - want) / ulp;
        if (off > worst) worst = off;
    }
    cr_assert(worst <= 2, "exp_fp32 is off by %.2f ulp", worst);
    cr_assert(exp_fp32(0) == 1 && exp_fp32(-0.0f) == 1);
    cr_assert(exp_fp32(-87.5f) == 0 && exp_fp32(-1e30f) == 0 && exp_fp32(-INFINITY) == 0);
    cr_assert(exp_fp32(88.38f) == INFINITY && exp_fp32(1e30f) == INFINITY && exp_fp32(INFINITY) == INFINITY);
    cr_assert(isnan(exp_fp32(NAN)) && isnan(exp_fp32(-NAN)));
}

Test(cpu, row_statistics)
{
    float masked[3] = {-INFINITY, -INFINITY, -INFINITY}, mixed[5] = {-INFINITY, 2, -INFINITY, 3, 2}, far[3] = {-1e30f, 1e30f, 0}, nan[3] = {1, NAN, 2};
    cr_assert(row_log_sum_exp(NULL, 0, 1) == -INFINITY && row_max(NULL, 0) == -INFINITY);
    cr_assert(row_log_sum_exp(masked, 3, 1) == -INFINITY);
    cr_assert(fabs(row_log_sum_exp(mixed, 5, 1) - log(2 * exp(2) + exp(3))) < 1e-6 && row_max(mixed, 5) == 3);
    cr_assert(row_log_sum_exp(far, 3, 1) == (double)1e30f);
    cr_assert(isnan(row_log_sum_exp(nan, 3, 1)));
    float x[1000];
    fill_normal(x, 1000, 30, 5);
    for (int s = 0; s < 4; s++) {
        static const float scale[] = {1, 0.05f, 3, 10};
        double top = -INFINITY, sum = 0;
        for (int i = 0; i < 1000; i++) top = fmax(top, (double)x[i] * scale[s]);
        for (int i = 0; i < 1000; i++) sum += exp((double)x[i] * scale[s] - top);
        cr_assert(fabs(row_log_sum_exp(x, 1000, scale[s]) - top - log(sum)) < 2e-7, "scale %g", (double)scale[s]);
    }
}

static const struct case_list list = {"reduce", cases, COUNT(cases), sizeof *cases, run, name};
Test(gpu, fp32) { ops_compare(&list, "fp32"); }
Test(gpu, bf16) { ops_compare(&list, "bf16"); }
Test(gpu, exact) { ops_compare(&list, "exact"); }

static const struct case_list true_list = {"reduce", true_cases, COUNT(true_cases), sizeof *true_cases, run, name};
Test(gpu, true_sizes_fp32) { ops_compare(&true_list, "fp32"); }
Test(gpu, true_sizes_bf16) { ops_compare(&true_list, "bf16"); }
Test(gpu, true_sizes_exact) { ops_compare(&true_list, "exact"); }
