/* SwiGLU (Shazeer 2020):  h = silu(g) u,  silu(g) = g sigmoid(g)
 *     du = dh silu(g)      dg = dh u sigmoid(g) (1 + g (1 - sigmoid(g)))
 * gate_up (N, 2F): g in columns 0..F-1, u in F..2F-1. */
#include "base/fp8.h"
#include "kernels/cpu/cpu.h"

static inline float sigmoid(float g) { return 1.0f / (1.0f + exp_fp32(-g)); }

/* One row each. */
static void forward_row(float *h, const float *g, const float *u, int64_t F)
{
    #pragma omp simd
    for (int64_t f = 0; f < F; f++) h[f] = g[f] * sigmoid(g[f]) * u[f];
}

static void backward_row(float *dg, float *du, const float *dh, const float *g, const float *u, int64_t F)
{
    #pragma omp simd
    for (int64_t f = 0; f < F; f++) {              /* g, u are read before dg, du are written: they may be the same memory */
        float gf = g[f], uf = u[f], s = sigmoid(gf);
        dg[f] = dh[f] * uf * s * (1.0f + gf * (1.0f - s));
        du[f] = dh[f] * gf * s;
    }
}

void cpu_swiglu_forward(struct backend *be, act *h, const act *gate_up_, int64_t N, int64_t F)
{
    (void)be;
    const float *gate_up = cfp32(gate_up_);
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) forward_row(fp32(h) + n * F, gate_up + n * 2 * F, gate_up + n * 2 * F + F, F);
}

void cpu_swiglu_backward(struct backend *be, act *d_gate_up_, const act *dh, const act *gate_up_, int64_t N, int64_t F)
{
    (void)be;
    float *d_gate_up = fp32(d_gate_up_);
    const float *gate_up = cfp32(gate_up_);
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) backward_row(d_gate_up + n * 2 * F, d_gate_up + n * 2 * F + F, cfp32(dh) + n * F, gate_up + n * 2 * F, gate_up + n * 2 * F + F, F);
}

void cpu_swiglu_forward_fp8(struct backend *be, const struct fp8 *h8, const act *gate_up_, int64_t N, int64_t F)
{
    const float *gate_up = cfp32(gate_up_);
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        float *h = thread_scratch(be, (size_t)F);
        forward_row(h, gate_up + n * 2 * F, gate_up + n * 2 * F + F, F);
        e4m3_round_row(h8->q + n * F, &h8->scale[n], h, F);
    }
}

void cpu_swiglu_backward_fp8(struct backend *be, const struct fp8 *d8, const act *dh, const act *gate_up_, int64_t N, int64_t F)
{
    const float *gate_up = cfp32(gate_up_);
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        float *d = thread_scratch(be, (size_t)(2 * F));
        backward_row(d, d + F, cfp32(dh) + n * F, gate_up + n * 2 * F, gate_up + n * 2 * F + F, F);
        e4m3_round_row(d8->q + n * 2 * F, &d8->scale[n], d, 2 * F);
    }
}
