/* linear: y = x w^T + bias; dx = dy w; dw += dy^T x; dbias += column sums of dy. The definition is the double triple loop. */
#include "tests/kernels/ops.h"

#include <omp.h>
#include <string.h>

struct linear_case { int64_t N, C, O; bool bias; };
static const struct linear_case cases[] = {
    {1, 1, 1, true}, {1, 8, 16, false}, {1, 17, 3, true}, {7, 5, 11, true}, {16, 64, 32, false}, {33, 63, 65, true}, {64, 128, 96, true}, {5, 200, 130, true}, {129, 48, 70, false},
};
/* outputs just large enough for the largest tiles (cuda/linear.c, choose()), ragged ones: y, dx and dw in turn. The first has 64 partial sums of dbias, of 66 rows; all cross the
 * 32 MiB in which bf16 comes to the host. */
static const struct linear_case true_cases[] = {{4161, 320, 4160, true}, {4160, 4168, 320, false}, {320, 4168, 4160, false}};

static const char *name(const void *c_) { const struct linear_case *c = c_; return text("N %ld C %ld O %ld bias %d", (long)c->N, (long)c->C, (long)c->O, c->bias); }

struct inputs { float *x, *w, *bias, *dy, *dw0, *dbias0; };
static struct inputs make_inputs(struct rig *r, const struct linear_case *c)
{
    return (struct inputs){acts(r, c->N * c->C, 1, 1), acts(r, c->O * c->C, 1, 2), c->bias ? acts(r, c->O, 1, 3) : NULL, acts(r, c->N * c->O, 1, 4),
                           acts(r, c->O * c->C, 1, 5), c->bias ? acts(r, c->O, 1, 6) : NULL};
}

static void run(struct rig *r, const void *c_, struct outputs *out)
{
    const struct linear_case *c = c_;
    struct inputs in = make_inputs(r, c);
    act *x = upload_act(r, in.x, c->N * c->C), *w = upload_act(r, in.w, c->O * c->C), *bias = upload_act(r, in.bias, c->O), *dy = upload_act(r, in.dy, c->N * c->O);
    act *y = poison_act(r, c->N * c->O), *dx = poison_act(r, c->N * c->C);
    grad *dw = upload_grad(r, in.dw0, c->O * c->C), *dbias = upload_grad(r, in.dbias0, c->O);
    rig_scratch(r, (struct op_limits){.N = c->N, .C = c->C, .F = c->O, .V = c->O, .chunk_rows = c->N, .Hq = 1, .Hkv = 1, .D = 8});
    r->op->linear_forward(r->be, y, x, w, bias, c->N, c->C, c->O);
    r->op->linear_backward_input(r->be, dx, dy, w, c->N, c->C, c->O);
    r->op->linear_backward_weight(r->be, dw, dbias, dy, x, c->N, c->C, c->O);
    take_act(out, r, "y", FORWARD, y, c->N * c->O);
    take_act(out, r, "dx", BACKWARD, dx, c->N * c->C);
    take_grad(out, r, "dw", BACKWARD, dw, c->O * c->C);
    if (dbias) take_grad(out, r, "dbias", BACKWARD, dbias, c->O);
}

static void against_definition(bool exact_rows)
{
    struct rig r;
    rig_open_cpu(&r);
    r.be->exact_rows = exact_rows;
    for (size_t i = 0; i < COUNT(cases); i++) {
        const struct linear_case *c = &cases[i];
        struct outputs out = {0};
        run(&r, c, &out);
        struct inputs in = make_inputs(&r, c);
        double *y = xcalloc((size_t)(c->N * c->O), sizeof *y), *dx = xcalloc((size_t)(c->N * c->C), sizeof *dx), *dw = doubles(in.dw0, c->O * c->C);
        double *dbias = c->bias ? doubles(in.dbias0, c->O) : NULL;
        for (int64_t n = 0; n < c->N; n++)
            for (int64_t o = 0; o < c->O; o++) {
                double dy = in.dy[n * c->O + o];
                for (int64_t k = 0; k < c->C; k++) {
                    y[n * c->O + o] += (double)in.x[n * c->C + k] * in.w[o * c->C + k];
                    dx[n * c->C + k] += dy * in.w[o * c->C + k];
                    dw[o * c->C + k] += dy * in.x[n * c->C + k];
                }
                if (c->bias) { y[n * c->O + o] += in.bias[o]; dbias[o] += dy; }
            }
        expect_close(&out, "y", y, c->N * c->O, 1e-6, name(c));
        expect_close(&out, "dx", dx, c->N * c->C, 1e-6, name(c));
        expect_close(&out, "dw", dw, c->O * c->C, 1e-6, name(c));
        if (c->bias) expect_close(&out, "dbias", dbias, c->O, 1e-6, name(c));
        free(y); free(dx); free(dw); free(dbias);
        outputs_free(&out);
        rig_reset(&r, name(c));
    }
    rig_close(&r);
}

Test(cpu, definition) { against_definition(false); }
Test(cpu, exact_rows_definition) { against_definition(true); }

/* exact_rows: the bits of a row of y do not depend on which rows stand beside it, nor on the number of threads. */
Test(cpu, exact_rows)
{
    struct rig r;
    rig_open_cpu(&r);
    r.be->exact_rows = true;
    for (size_t i = 0; i < COUNT(cases); i++) {
        const struct linear_case *c = &cases[i];
        struct inputs in = make_inputs(&r, c);
        float *whole = floats(&r, c->N * c->O), *part = floats(&r, c->N * c->O);
        for (int64_t step = 0; step <= 7; step++) {
            omp_set_num_threads(1 + (int)step % 3);
            r.be->scratch = NULL;
            rig_scratch(&r, (struct op_limits){.N = c->N, .C = c->C, .F = c->O, .V = c->O, .chunk_rows = c->N, .Hq = 1, .Hkv = 1, .D = 8});
            float *y = step ? part : whole;
            int64_t rows = step ? step : c->N;
            for (int64_t n = 0; n < c->N; n += rows)
                r.op->linear_forward(r.be, (act *)(y + n * c->O), (const act *)(in.x + n * c->C), (const act *)in.w, (const act *)in.bias, c->N - n < rows ? c->N - n : rows, c->C, c->O);
            cr_assert(!memcmp(whole, y, (size_t)(c->N * c->O) * sizeof *y), "%s: rows by %ld differ", name(c), (long)rows);
        }
        rig_reset(&r, name(c));
    }
    rig_close(&r);
}

static const struct case_list list = {"linear", cases, COUNT(cases), sizeof *cases, run, name};
Test(gpu, fp32) { ops_compare(&list, "fp32"); }
Test(gpu, bf16) { ops_compare(&list, "bf16"); }
Test(gpu, exact) { ops_compare(&list, "exact"); }

static const struct case_list true_list = {"linear", true_cases, COUNT(true_cases), sizeof *true_cases, run, name};
Test(gpu, true_sizes_bf16) { ops_compare(&true_list, "bf16"); }
Test(gpu, true_sizes_exact) { ops_compare(&true_list, "exact"); }
