/* rmsnorm: s = x + r, y_i = w_i s_i rstd, rstd = (mean s^2 + eps)^-1/2; backward joins the residual gradient and adds to dw. */
#include "tests/kernels/ops.h"

#include <math.h>

enum sum_place { SUM_NONE, SUM_OWN, SUM_X, SUM_R };     /* where s goes: nowhere, a buffer of its own, over x, over r */
enum dres_place { DRES_NONE, DRES_OWN, DRES_DX };
struct norm_case { int64_t N, C; float scale, eps; bool residual; enum sum_place sum; enum dres_place dres; bool dx_over_dy; };
static const struct norm_case cases[] = {
    /* C = 1: only eps keeps y from being +-w, and the gradient through the norm nearly cancels; dres gives the error its scale */
    {1, 1, 1, 1e-5f, false, SUM_NONE, DRES_OWN, false}, {1, 2, 1, 1e-6f, true, SUM_OWN, DRES_OWN, false},
    {3, 17, 1, 1e-6f, true, SUM_X, DRES_DX, false},      {5, 64, 1, 1e-5f, true, SUM_R, DRES_NONE, true},
    {4, 63, 1, 1e-5f, false, SUM_OWN, DRES_OWN, true},   {2, 80, 1, 1e-5f, false, SUM_X, DRES_OWN, true},
    {9, 130, 1, 1e-5f, true, SUM_NONE, DRES_OWN, false}, {7, 65, 1e-3f, 1e-5f, true, SUM_OWN, DRES_DX, false},   /* eps weighs in */
    {3, 48, 1e4f, 1e-6f, true, SUM_OWN, DRES_OWN, true}, {3, 33, 0, 1e-6f, true, SUM_X, DRES_OWN, false},        /* a row of zeros */
    {67, 129, 1, 1e-6f, true, SUM_X, DRES_OWN, true},    {33, 896, 2, 1e-6f, true, SUM_X, DRES_DX, false},
    /* widths at which a thread of a device takes one vector of the row, two, four, eight */
    {2, 1027, 1, 1e-6f, true, SUM_X, DRES_OWN, false},   {3, 2056, 1, 1e-6f, true, SUM_OWN, DRES_DX, true},      {2, 4104, 1, 1e-6f, true, SUM_X, DRES_OWN, false},
    {3, 8208, 1, 1e-6f, true, SUM_X, DRES_OWN, true},    {2, 16384, 1, 1e-6f, false, SUM_NONE, DRES_NONE, false},
};
/* more rows than blocks: the backward's blocks, 1024 threads of them on each of 132 multiprocessors, walk over several, with as many on their way as the width allows: the models of 7B and 72B, one of
 * 0.5B, rows that are no whole vectors */
static const struct norm_case true_cases[] = {
    {1403, 3584, 1, 1e-6f, true, SUM_X, DRES_DX, false}, {803, 8192, 1, 1e-6f, true, SUM_R, DRES_OWN, true}, {5303, 896, 1, 1e-6f, false, SUM_NONE, DRES_NONE, false},
    {1003, 1027, 1, 1e-6f, true, SUM_OWN, DRES_OWN, true},
};

static const char *name(const void *c_)
{
    const struct norm_case *c = c_;
    return text("N %ld C %ld scale %g residual %d sum %d dres %d dx over dy %d", (long)c->N, (long)c->C, (double)c->scale, c->residual, c->sum, c->dres, c->dx_over_dy);
}

/* Inputs, the same for every backend: s is what the forward should store, rounded as the backend would. */
struct inputs { float *x, *r, *w, *dy, *dres, *dw0, *s; };
static struct inputs make_inputs(struct rig *rig, const struct norm_case *c)
{
    int64_t n = c->N * c->C;
    struct inputs in = {acts(rig, n, c->scale, 1), c->residual ? acts(rig, n, c->scale, 2) : NULL, acts(rig, c->C, 1, 3), acts(rig, n, 1, 4),
                        c->dres ? acts(rig, n, 1, 5) : NULL, acts(rig, c->C, 1, 6), floats(rig, n)};
    for (int64_t i = 0; i < n; i++) {
        float s = in.x[i] + (in.r ? in.r[i] : 0);
        in.s[i] = rig->round_inputs ? bf16_to_float(bf16_from_float(s)) : s;
    }
    return in;
}

static void run(struct rig *rig, const void *c_, struct outputs *out)
{
    const struct norm_case *c = c_;
    int64_t n = c->N * c->C;
    struct inputs in = make_inputs(rig, c);
    act *x = upload_act(rig, in.x, n), *r = upload_act(rig, in.r, n), *w = upload_act(rig, in.w, c->C), *y = poison_act(rig, n);
    act *sum = c->sum == SUM_NONE ? NULL : c->sum == SUM_X ? x : c->sum == SUM_R ? r : poison_act(rig, n);
    float *rstd = poison_float(rig, c->N);
    rig_scratch(rig, (struct op_limits){.N = c->N, .C = c->C, .F = c->C, .V = 1, .Hq = 1, .Hkv = 1, .D = 8});
    rig->op->rmsnorm_forward(rig->be, y, rstd, sum, x, r, w, c->N, c->C, c->eps);
    take_act(out, rig, "y", FORWARD, y, n);
    take_float(out, rig, "rstd", FORWARD, rstd, c->N);
    if (sum) take_act(out, rig, "sum", FORWARD, sum, n);

    act *s = upload_act(rig, in.s, n), *dy = upload_act(rig, in.dy, n), *dres = upload_act(rig, in.dres, n);
    act *dx = c->dx_over_dy ? dy : c->dres == DRES_DX ? dres : poison_act(rig, n);
    grad *dw = upload_grad(rig, in.dw0, c->C);
    rig->op->rmsnorm_backward(rig->be, dx, dw, dres, dy, s, w, rstd, c->N, c->C);
    take_act(out, rig, "dx", BACKWARD, dx, n);
    take_grad(out, rig, "dw", BACKWARD, dw, c->C);
}

struct definition { const struct norm_case *c; double *s, *w, *dy, *dres, *dw0, *y, *rstd; };

/* sum dy y(s, w) + dres s + dw0 w: its gradients are dx and what dw must hold */
static double loss(void *d_)
{
    struct definition *d = d_;
    const struct norm_case *c = d->c;
    double total = 0;
    for (int64_t n = 0; n < c->N; n++) {
        double squares = 0;
        for (int64_t k = 0; k < c->C; k++) squares += d->s[n * c->C + k] * d->s[n * c->C + k];
        d->rstd[n] = 1 / sqrt(squares / (double)c->C + (double)c->eps);
        for (int64_t k = n * c->C; k < (n + 1) * c->C; k++) {
            d->y[k] = d->w[k % c->C] * d->s[k] * d->rstd[n];
            total += d->dy[k] * d->y[k] + (d->dres ? d->dres[k] * d->s[k] : 0);
        }
    }
    for (int64_t k = 0; k < c->C; k++) total += d->dw0[k] * d->w[k];
    return total;
}

Test(cpu, definition)
{
    struct rig r;
    rig_open_cpu(&r);
    for (size_t i = 0; i < COUNT(cases); i++) {
        const struct norm_case *c = &cases[i];
        int64_t n = c->N * c->C;
        struct outputs out = {0};
        run(&r, c, &out);
        struct inputs in = make_inputs(&r, c);
        struct definition d = {c, doubles(in.s, n), doubles(in.w, c->C), doubles(in.dy, n), in.dres ? doubles(in.dres, n) : NULL, doubles(in.dw0, c->C),
                               xmalloc((size_t)n * sizeof(double)), xmalloc((size_t)c->N * sizeof(double))};
        loss(&d);
        expect_close(&out, "y", d.y, n, 1e-6, name(c));
        expect_close(&out, "rstd", d.rstd, c->N, 1e-6, name(c));
        if (c->sum != SUM_NONE) expect_close(&out, "sum", d.s, n, 0, name(c));
        /* steps relative to the size of the input; at 0 the norm curves on the scale of sqrt(eps) */
        double h = 1e-3 * (c->scale > 0 ? (double)c->scale : sqrt((double)c->eps) / 10);
        expect_gradient(&out, "dx", d.s, n, loss, &d, h, 4000, 1e-6, name(c));
        expect_gradient(&out, "dw", d.w, c->C, loss, &d, 1e-2, 4000, 1e-6, name(c));
        free(d.s); free(d.w); free(d.dy); free(d.dres); free(d.dw0); free(d.y); free(d.rstd);
        outputs_free(&out);
        rig_reset(&r, name(c));
    }
    rig_close(&r);
}

static const struct case_list list = {"rmsnorm", cases, COUNT(cases), sizeof *cases, run, name};
Test(gpu, fp32) { ops_compare(&list, "fp32"); }
Test(gpu, bf16) { ops_compare(&list, "bf16"); }
Test(gpu, exact) { ops_compare(&list, "exact"); }

static const struct case_list true_list = {"rmsnorm", true_cases, COUNT(true_cases), sizeof *true_cases, run, name};
Test(gpu, true_sizes_fp32) { ops_compare(&true_list, "fp32"); }
Test(gpu, true_sizes_bf16) { ops_compare(&true_list, "bf16"); }
Test(gpu, true_sizes_exact) { ops_compare(&true_list, "exact"); }
