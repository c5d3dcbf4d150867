/* rope: from fused rows to planes, q and k turned by the angle of their position, v copied; backward is the transpose. */
#include "tests/kernels/ops.h"

#include <math.h>
#include <string.h>

#include "base/rng.h"

struct rope_case { int64_t N, positions; int Hq, Hkv, D; double factor; };   /* factor: yarn's attention factor, multiplied into the table */
static const struct rope_case cases[] = {
    {1, 1, 1, 1, 8, 1}, {1, 5, 3, 1, 2, 1}, {7, 9, 4, 2, 16, 1}, {33, 40, 6, 6, 64, 1.2}, {5, 5000, 5, 1, 80, 1}, {65, 65, 8, 2, 128, 0.8}, {129, 300, 2, 1, 24, 1},
};

static const char *name(const void *c_)
{
    const struct rope_case *c = c_;
    return text("N %ld positions %ld Hq %d Hkv %d D %d factor %g", (long)c->N, (long)c->positions, c->Hq, c->Hkv, c->D, c->factor);
}

struct inputs { float *qkv, *cos, *sin, *dq, *dk, *dv; int32_t *position; int64_t nq, nk, n; };
static struct inputs make_inputs(struct rig *r, const struct rope_case *c)
{
    int64_t half = c->D / 2, nq = c->N * c->Hq * c->D, nk = c->N * c->Hkv * c->D;
    struct inputs in = {acts(r, nq + 2 * nk, 1, 1), floats(r, c->positions * half), floats(r, c->positions * half), acts(r, nq, 1, 2), acts(r, nk, 1, 3), acts(r, nk, 1, 4),
                        (int32_t *)floats(r, c->N), nq, nk, nq + 2 * nk};
    for (int64_t p = 0; p < c->positions; p++)
        for (int64_t i = 0; i < half; i++) {
            double angle = (double)p * pow(10000, -(double)i / (double)half);
            in.cos[p * half + i] = (float)(cos(angle) * c->factor);
            in.sin[p * half + i] = (float)(sin(angle) * c->factor);
        }
    for (int64_t n = 0; n < c->N; n++) in.position[n] = (int32_t)(philox4x32(9, 0, (uint64_t)n).v[0] % (uint64_t)c->positions);   /* any order: documents restart */
    in.position[c->N - 1] = (int32_t)(c->positions - 1);
    return in;
}

static void run(struct rig *r, const void *c_, struct outputs *out)
{
    const struct rope_case *c = c_;
    struct inputs in = make_inputs(r, c);
    size_t table = (size_t)(c->positions * (c->D / 2)) * sizeof(float);
    act *qkv = upload_act(r, in.qkv, in.n), *q = poison_act(r, in.nq), *k = poison_act(r, in.nk), *v = poison_act(r, in.nk), *dqkv = poison_act(r, in.n);
    act *dq = upload_act(r, in.dq, in.nq), *dk = upload_act(r, in.dk, in.nk), *dv = upload_act(r, in.dv, in.nk);
    float *cosine = upload(r, in.cos, table), *sine = upload(r, in.sin, table);
    int32_t *position = upload(r, in.position, (size_t)c->N * sizeof *position);
    rig_scratch(r, (struct op_limits){.N = c->N, .C = c->Hq * c->D, .V = 1, .Hq = c->Hq, .Hkv = c->Hkv, .D = c->D});
    r->op->rope_forward(r->be, q, k, v, qkv, cosine, sine, position, c->N, c->Hq, c->Hkv, c->D);
    r->op->rope_backward(r->be, dqkv, dq, dk, dv, cosine, sine, position, c->N, c->Hq, c->Hkv, c->D);
    take_act(out, r, "q", FORWARD, q, in.nq);
    take_act(out, r, "k", FORWARD, k, in.nk);
    take_act(out, r, "v", EXACT, v, in.nk);
    take_act(out, r, "dqkv", BACKWARD, dqkv, in.n);
}

struct definition { const struct rope_case *c; const struct inputs *in; double *x, *q, *k, *v; };

/* z = a + i b is multiplied by factor e^{i angle}, taken from the fp32 table */
static double loss(void *d_)
{
    struct definition *d = d_;
    const struct rope_case *c = d->c;
    const struct inputs *in = d->in;
    int half = c->D / 2, heads = c->Hq + 2 * c->Hkv;
    double total = 0;
    for (int64_t n = 0; n < c->N; n++)
        for (int h = 0; h < heads; h++) {
            const double *x = d->x + (n * heads + h) * c->D;
            bool is_q = h < c->Hq, is_v = h >= c->Hq + c->Hkv;
            int64_t at = is_q ? (n * c->Hq + h) * c->D : (n * c->Hkv + (h - c->Hq) % c->Hkv) * c->D;
            double *y = (is_q ? d->q : is_v ? d->v : d->k) + at;
            const float *dy = (is_q ? in->dq : is_v ? in->dv : in->dk) + at;
            for (int i = 0; i < half; i++) {
                double co = is_v ? 1 : (double)in->cos[in->position[n] * half + i], si = is_v ? 0 : (double)in->sin[in->position[n] * half + i];
                y[i] = x[i] * co - x[i + half] * si;
                y[i + half] = x[i + half] * co + x[i] * si;
                total += dy[i] * y[i] + dy[i + half] * y[i + half];
            }
        }
    return total;
}

Test(cpu, definition)
{
    struct rig r;
    rig_open_cpu(&r);
    for (size_t i = 0; i < COUNT(cases); i++) {
        const struct rope_case *c = &cases[i];
        struct outputs out = {0};
        run(&r, c, &out);
        struct inputs in = make_inputs(&r, c);
        struct definition d = {c, &in, doubles(in.qkv, in.n), xmalloc((size_t)in.nq * sizeof(double)), xmalloc((size_t)in.nk * sizeof(double)), xmalloc((size_t)in.nk * sizeof(double))};
        loss(&d);
        expect_close(&out, "q", d.q, in.nq, 1e-6, name(c));
        expect_close(&out, "k", d.k, in.nk, 1e-6, name(c));
        expect_close(&out, "v", d.v, in.nk, 0, name(c));
        expect_gradient(&out, "dqkv", d.x, in.n, loss, &d, 1e-2, 4000, 1e-6, name(c));
        free(d.x); free(d.q); free(d.k); free(d.v);
        outputs_free(&out);
        rig_reset(&r, name(c));
    }
    rig_close(&r);
}

static const struct case_list list = {"rope", cases, COUNT(cases), sizeof *cases, run, name};
Test(gpu, fp32) { ops_compare(&list, "fp32"); }
Test(gpu, bf16) { ops_compare(&list, "bf16"); }
