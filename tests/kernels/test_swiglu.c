/* swiglu: h = silu(g) u, g and u the halves of a row of gate_up; d_gate_up may lie over gate_up. */
#include "tests/kernels/ops.h"

#include <math.h>

struct swiglu_case { int64_t N, F; float scale; bool in_place; };
static const struct swiglu_case cases[] = {
    {1, 1, 1, false}, {1, 3, 1, true}, {5, 17, 1, false}, {4, 64, 3, true}, {3, 63, 30, false}, {2, 129, 100, true}, {33, 160, 2, true}, {65, 257, 1, false},
};
/* rows that take several blocks, whole vectors; more of them than a grid is high, vectors and single elements */
static const struct swiglu_case true_cases[] = {{65, 18944, 2, true}, {66001, 16, 1, false}, {65537, 5, 1, true}};

static const char *name(const void *c_) { const struct swiglu_case *c = c_; return text("N %ld F %ld scale %g in place %d", (long)c->N, (long)c->F, (double)c->scale, c->in_place); }

static void run(struct rig *r, const void *c_, struct outputs *out)
{
    const struct swiglu_case *c = c_;
    int64_t n = c->N * c->F;
    act *h = poison_act(r, n), *gate_up = upload_act(r, acts(r, 2 * n, c->scale, 1), 2 * n), *dh = upload_act(r, acts(r, n, 1, 2), n);
    act *d_gate_up = c->in_place ? gate_up : poison_act(r, 2 * n);
    rig_scratch(r, (struct op_limits){.N = c->N, .C = 8, .F = c->F, .V = 1, .Hq = 1, .Hkv = 1, .D = 8});
    r->op->swiglu_forward(r->be, h, gate_up, c->N, c->F);
    r->op->swiglu_backward(r->be, d_gate_up, dh, gate_up, c->N, c->F);
    take_act(out, r, "h", FORWARD, h, n);
    take_act(out, r, "d_gate_up", BACKWARD, d_gate_up, 2 * n);
}

struct definition { const struct swiglu_case *c; double *x, *dh, *h; };

static double loss(void *d_)
{
    struct definition *d = d_;
    const struct swiglu_case *c = d->c;
    double total = 0;
    for (int64_t n = 0; n < c->N; n++)
        for (int64_t f = 0; f < c->F; f++) {
            double g = d->x[n * 2 * c->F + f], u = d->x[n * 2 * c->F + c->F + f];
            d->h[n * c->F + f] = g / (1 + exp(-g)) * u;
            total += d->dh[n * c->F + f] * d->h[n * c->F + f];
        }
    return total;
}

Test(cpu, definition)
{
    struct rig r;
    rig_open_cpu(&r);
    for (size_t i = 0; i < COUNT(cases); i++) {
        const struct swiglu_case *c = &cases[i];
        int64_t n = c->N * c->F;
        struct outputs out = {0};
        run(&r, c, &out);
        struct definition d = {c, doubles(acts(&r, 2 * n, c->scale, 1), 2 * n), doubles(acts(&r, n, 1, 2), n), xmalloc((size_t)n * sizeof(double))};
        loss(&d);
        expect_close(&out, "h", d.h, n, 1e-6, name(c));
        expect_gradient(&out, "d_gate_up", d.x, 2 * n, loss, &d, 1e-3, 4000, 1e-6, name(c));
        free(d.x); free(d.dh); free(d.h);
        outputs_free(&out);
        rig_reset(&r, name(c));
    }
    rig_close(&r);
}

/* Gates from far below to far above where exp over- and underflows: finite, and exact in the limit. */
Test(cpu, extreme_gates)
{
    static const float gate[] = {-1e30f, -1e4f, -104, -89, -88.5f, -88, -87.5f, -50, -1e-20f, 0, 1e-20f, 50, 87.5f, 88, 88.5f, 89, 1e4f, 1e18f};
    enum { F = COUNT(gate) };
    float x[2 * F], dh[F], h[F], dx[2 * F];
    struct rig r;
    rig_open_cpu(&r);
    for (int f = 0; f < F; f++) { x[f] = gate[f]; x[F + f] = 3; dh[f] = 2; }
    r.op->swiglu_forward(r.be, (act *)h, (act *)x, 1, F);
    r.op->swiglu_backward(r.be, (act *)dx, (act *)dh, (act *)x, 1, F);
    for (int f = 0; f < F; f++) {
        double g = (double)gate[f], s = 1 / (1 + exp(-g)), dg = 6 * s * (1 + g * (1 - s)), du = 2 * g * s;
        /* below 1e-36 exp_fp32 may say 0 */
        cr_assert(fabs(h[f] - 3 * g * s) <= 1e-6 * fabs(3 * g * s) + 1e-35, "silu(%g) * 3 = %g, not %g", g, (double)h[f], 3 * g * s);
        cr_assert(fabs(dx[f] - dg) <= 1e-6 * fabs(dg) + 1e-35, "dg at %g: %g, not %g", g, (double)dx[f], dg);
        cr_assert(fabs(dx[F + f] - du) <= 1e-6 * fabs(du) + 1e-35, "du at %g: %g, not %g", g, (double)dx[F + f], du);
    }
    rig_close(&r);
}

static const struct case_list list = {"swiglu", cases, COUNT(cases), sizeof *cases, run, name};
Test(gpu, fp32) { ops_compare(&list, "fp32"); }
Test(gpu, bf16) { ops_compare(&list, "bf16"); }

static const struct case_list true_list = {"swiglu", true_cases, COUNT(true_cases), sizeof *true_cases, run, name};
Test(gpu, true_sizes_fp32) { ops_compare(&true_list, "fp32"); }
Test(gpu, true_sizes_bf16) { ops_compare(&true_list, "bf16"); }
