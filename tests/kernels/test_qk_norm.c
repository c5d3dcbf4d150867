/* qk_norm: RMSNorm over D of every q and k head of a fused row (Hq q heads, Hkv k heads, Hkv v heads); v passes unchanged. */
#include "tests/kernels/ops.h"

#include <math.h>
#include <string.h>

struct norm_case { int64_t N; int Hq, Hkv, D; float scale, eps; bool dx_over_dy; };
static const struct norm_case cases[] = {
    {1, 1, 1, 8, 1, 1e-6f, false}, {3, 4, 2, 16, 1, 1e-6f, true}, {5, 6, 1, 64, 1e-3f, 1e-5f, false}, {2, 3, 3, 80, 1, 1e-6f, true},
    {7, 8, 2, 128, 3, 1e-6f, false}, {65, 2, 1, 24, 1, 1e-6f, true}, {2, 2, 1, 16, 0, 1e-6f, false},
    {9, 4, 2, 256, 1, 1e-6f, false},   /* the widest: a vector of bf16 for each lane of a warp, two of fp32 */
};
/* more tokens than the groups of the backward's blocks, four blocks on each of 132 multiprocessors: 16 groups a block in bf16, 8 in fp32 */
static const struct norm_case true_cases[] = {{9001, 2, 1, 128, 1, 1e-6f, true}};

static const char *name(const void *c_)
{
    const struct norm_case *c = c_;
    return text("N %ld Hq %d Hkv %d D %d scale %g dx over dy %d", (long)c->N, c->Hq, c->Hkv, c->D, (double)c->scale, c->dx_over_dy);
}

static int64_t width(const struct norm_case *c) { return (int64_t)(c->Hq + 2 * c->Hkv) * c->D; }

struct inputs { float *x, *wq, *wk, *dy, *dwq0, *dwk0; };
static struct inputs make_inputs(struct rig *r, const struct norm_case *c)
{
    int64_t n = c->N * width(c);
    return (struct inputs){acts(r, n, c->scale, 1), acts(r, c->D, 1, 2), acts(r, c->D, 1, 3), acts(r, n, 1, 4), acts(r, c->D, 1, 5), acts(r, c->D, 1, 6)};
}

static void run(struct rig *r, const void *c_, struct outputs *out)
{
    const struct norm_case *c = c_;
    int64_t n = c->N * width(c), heads = c->Hq + c->Hkv;
    struct inputs in = make_inputs(r, c);
    act *x = upload_act(r, in.x, n), *wq = upload_act(r, in.wq, c->D), *wk = upload_act(r, in.wk, c->D), *dy = upload_act(r, in.dy, n), *y = poison_act(r, n);
    act *dx = c->dx_over_dy ? dy : poison_act(r, n);
    grad *dwq = upload_grad(r, in.dwq0, c->D), *dwk = upload_grad(r, in.dwk0, c->D);
    float *rstd = poison_float(r, c->N * heads);
    rig_scratch(r, (struct op_limits){.N = c->N, .C = c->Hq * c->D, .V = 1, .Hq = c->Hq, .Hkv = c->Hkv, .D = c->D});
    r->op->qk_norm_forward(r->be, y, rstd, x, wq, wk, c->N, c->Hq, c->Hkv, c->D, c->eps);
    take_act(out, r, "y", FORWARD, y, n);
    take_float(out, r, "rstd", FORWARD, rstd, c->N * heads);
    r->op->qk_norm_backward(r->be, dx, dwq, dwk, dy, x, wq, wk, rstd, c->N, c->Hq, c->Hkv, c->D);
    take_act(out, r, "dx", BACKWARD, dx, n);
    take_grad(out, r, "dwq", BACKWARD, dwq, c->D);
    take_grad(out, r, "dwk", BACKWARD, dwk, c->D);
}

struct definition { const struct norm_case *c; double *x, *wq, *wk, *dy, *dwq0, *dwk0, *y, *rstd; };

static double loss(void *d_)
{
    struct definition *d = d_;
    const struct norm_case *c = d->c;
    double total = 0;
    for (int64_t n = 0; n < c->N; n++)
        for (int h = 0; h < c->Hq + 2 * c->Hkv; h++) {
            int64_t at = n * width(c) + h * c->D;
            const double *w = h < c->Hq ? d->wq : d->wk;
            double squares = 0, rstd = 1;
            bool is_v = h >= c->Hq + c->Hkv;
            for (int k = 0; k < c->D; k++) squares += d->x[at + k] * d->x[at + k];
            if (!is_v) d->rstd[n * (c->Hq + c->Hkv) + h] = rstd = 1 / sqrt(squares / c->D + (double)c->eps);
            for (int k = 0; k < c->D; k++) {
                d->y[at + k] = (is_v ? 1 : w[k]) * d->x[at + k] * rstd;
                total += d->dy[at + k] * d->y[at + k];
            }
        }
    for (int k = 0; k < c->D; k++) total += d->dwq0[k] * d->wq[k] + d->dwk0[k] * d->wk[k];
    return total;
}

Test(cpu, definition)
{
    struct rig r;
    rig_open_cpu(&r);
    for (size_t i = 0; i < COUNT(cases); i++) {
        const struct norm_case *c = &cases[i];
        int64_t n = c->N * width(c), heads = c->Hq + c->Hkv;
        struct outputs out = {0};
        run(&r, c, &out);
        struct inputs in = make_inputs(&r, c);
        struct definition d = {c, doubles(in.x, n), doubles(in.wq, c->D), doubles(in.wk, c->D), doubles(in.dy, n), doubles(in.dwq0, c->D), doubles(in.dwk0, c->D),
                               xmalloc((size_t)n * sizeof(double)), xmalloc((size_t)(c->N * heads) * sizeof(double))};
        loss(&d);
        expect_close(&out, "y", d.y, n, 1e-6, name(c));
        expect_close(&out, "rstd", d.rstd, c->N * heads, 1e-6, name(c));
        const float *y = output(&out, "y")->x, *dx = output(&out, "dx")->x;
        for (int64_t t = 0; t < c->N; t++) {                       /* the values are copied, bit for bit */
            int64_t v = t * width(c) + heads * c->D, bytes = c->Hkv * c->D * (int64_t)sizeof *y;
            cr_assert(!memcmp(y + v, in.x + v, (size_t)bytes) && !memcmp(dx + v, in.dy + v, (size_t)bytes), "%s: v was changed", name(c));
        }
        double h = 1e-3 * (c->scale > 0 ? (double)c->scale : sqrt((double)c->eps) / 10);
        expect_gradient(&out, "dx", d.x, n, loss, &d, h, 2000, 1e-6, name(c));
        expect_gradient(&out, "dwq", d.wq, c->D, loss, &d, 1e-2, 2000, 1e-6, name(c));
        expect_gradient(&out, "dwk", d.wk, c->D, loss, &d, 1e-2, 2000, 1e-6, name(c));
        free(d.x); free(d.wq); free(d.wk); free(d.dy); free(d.dwq0); free(d.dwk0); free(d.y); free(d.rstd);
        outputs_free(&out);
        rig_reset(&r, name(c));
    }
    rig_close(&r);
}

static const struct case_list list = {"qk_norm", cases, COUNT(cases), sizeof *cases, run, name};
Test(gpu, fp32) { ops_compare(&list, "fp32"); }
Test(gpu, bf16) { ops_compare(&list, "bf16"); }
Test(gpu, exact) { ops_compare(&list, "exact"); }

static const struct case_list true_list = {"qk_norm", true_cases, COUNT(true_cases), sizeof *true_cases, run, name};
Test(gpu, true_sizes_fp32) { ops_compare(&true_list, "fp32"); }
Test(gpu, true_sizes_bf16) { ops_compare(&true_list, "bf16"); }
Test(gpu, true_sizes_exact) { ops_compare(&true_list, "exact"); }
