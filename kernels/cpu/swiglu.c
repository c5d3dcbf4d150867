/* SwiGLU (Shazeer 2020):  h = silu(g) u,  silu(g) = g sigmoid(g)
 *     du = dh silu(g)      dg = dh u sigmoid(g) (1 + g (1 - sigmoid(g)))
 * gate_up (N, 2F): g in columns 0..F-1, u in F..2F-1. */
#include "kernels/cpu/cpu.h"

static inline float sigmoid(float g) { return 1.0f / (1.0f + exp_fp32(-g)); }

void cpu_swiglu_forward(struct backend *be, act *h_, const act *gate_up_, int64_t N, int64_t F)
{
    (void)be;
    float *h = fp32(h_);
    const float *gate_up = cfp32(gate_up_);
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const float *g = gate_up + n * 2 * F, *u = g + F;
        float *hn = h + n * F;
        #pragma omp simd
        for (int64_t f = 0; f < F; f++) hn[f] = g[f] * sigmoid(g[f]) * u[f];
    }
}

void cpu_swiglu_backward(struct backend *be, act *d_gate_up_, const act *dh_, const act *gate_up_, int64_t N, int64_t F)
{
    (void)be;
    float *d_gate_up = fp32(d_gate_up_);
    const float *dh = cfp32(dh_), *gate_up = cfp32(gate_up_);
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const float *g = gate_up + n * 2 * F, *u = g + F, *d = dh + n * F;
        float *dg = d_gate_up + n * 2 * F, *du = dg + F;
        #pragma omp simd
        for (int64_t f = 0; f < F; f++) {          /* g, u are read before dg, du are written: they may be the same memory */
            float gf = g[f], uf = u[f], s = sigmoid(gf);
            dg[f] = d[f] * uf * s * (1.0f + gf * (1.0f - s));
            du[f] = d[f] * gf * s;
        }
    }
}
