/* Rotary position embedding (Su et al. 2021), halves paired as Hugging Face does: for i < D/2
 *     (a, b) = (x_i, x_{i+D/2}) -> (a c - b s, b c + a s)      c, s = cos, sin[position, i]
 * on the way from the fused rows of the q,k,v product to one plane each (v passes unchanged). The table carries any attention
 * factor, so the backward is the transpose, not the inverse: (a c + b s, b c - a s). */
#include <string.h>

#include "kernels/cpu/cpu.h"

static void turn_head(float *out, const float *in, const float *c, const float *s, int half, float direction)
{
    for (int i = 0; i < half; i++) {
        out[i] = in[i] * c[i] - in[i + half] * (direction * s[i]);
        out[i + half] = in[i + half] * c[i] + in[i] * (direction * s[i]);
    }
}

void cpu_rope_forward(struct backend *be, act *q, act *k, act *v, const act *qkv, const float *cos, const float *sin, const int32_t *position, int64_t N, int Hq, int Hkv, int D)
{
    (void)be;
    int64_t half = D / 2, width = (Hq + 2 * Hkv) * D, kv_width = Hkv * D;
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const float *c = cos + position[n] * half, *s = sin + position[n] * half, *in = cfp32(qkv) + n * width;
        for (int h = 0; h < Hq; h++) turn_head(fp32(q) + (n * Hq + h) * D, in + h * D, c, s, (int)half, 1);
        for (int h = 0; h < Hkv; h++) turn_head(fp32(k) + (n * Hkv + h) * D, in + (Hq + h) * D, c, s, (int)half, 1);
        memcpy(fp32(v) + n * kv_width, in + (Hq + Hkv) * D, (size_t)kv_width * sizeof(float));
    }
}

void cpu_rope_backward(struct backend *be, act *dqkv, const act *dq, const act *dk, const act *dv, const float *cos, const float *sin, const int32_t *position,
                       int64_t N, int Hq, int Hkv, int D)
{
    (void)be;
    int64_t half = D / 2, width = (Hq + 2 * Hkv) * D, kv_width = Hkv * D;
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const float *c = cos + position[n] * half, *s = sin + position[n] * half;
        float *out = fp32(dqkv) + n * width;
        for (int h = 0; h < Hq; h++) turn_head(out + h * D, cfp32(dq) + (n * Hq + h) * D, c, s, (int)half, -1);
        for (int h = 0; h < Hkv; h++) turn_head(out + (Hq + h) * D, cfp32(dk) + (n * Hkv + h) * D, c, s, (int)half, -1);
        memcpy(out + (Hq + Hkv) * D, cfp32(dv) + n * kv_width, (size_t)kv_width * sizeof(float));
    }
}

void cpu_rope_backward_fp8(struct backend *be, const struct fp8 *d8, act *dqkv, const act *dq, const act *dk, const act *dv, const float *cos, const float *sin, const int32_t *position, int64_t N, int Hq, int Hkv, int D)
{
    cpu_rope_backward(be, dqkv, dq, dk, dv, cos, sin, position, N, Hq, Hkv, D);
    cpu_quantize(be, d8, dqkv, N, (int64_t)(Hq + 2 * Hkv) * D);
}
