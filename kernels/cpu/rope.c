/* Rotary position embedding (Su et al. 2021), halves paired as Hugging Face does: for i < D/2
 *     (a, b) = (x_i, x_{i+D/2}) -> (a c - b s, b c + a s)      c, s = cos, sin[position, i]
 * The table carries any attention factor, so the backward is the transpose, not the inverse: (a c + b s, b c - a s). */
#include "kernels/cpu/cpu.h"

static void rotate(float *qkv, const float *cos, const float *sin, const int32_t *position, int64_t N, int Hq, int Hkv, int D, float direction)
{
    int half = D / 2, width = (Hq + 2 * Hkv) * D;
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const float *c = cos + (int64_t)position[n] * half, *s = sin + (int64_t)position[n] * half;
        for (int h = 0; h < Hq + Hkv; h++) {
            float *a = qkv + n * width + h * D, *b = a + half;
            for (int i = 0; i < half; i++) {
                float ai = a[i], bi = b[i], si = direction * s[i];
                a[i] = ai * c[i] - bi * si;
                b[i] = bi * c[i] + ai * si;
            }
        }
    }
}

void cpu_rope_forward(struct backend *be, act *qkv, const float *cos, const float *sin, const int32_t *position, int64_t N, int Hq, int Hkv, int D)
{
    (void)be;
    rotate(fp32(qkv), cos, sin, position, N, Hq, Hkv, D, 1);
}

void cpu_rope_backward(struct backend *be, act *dqkv, const float *cos, const float *sin, const int32_t *position, int64_t N, int Hq, int Hkv, int D)
{
    (void)be;
    rotate(fp32(dqkv), cos, sin, position, N, Hq, Hkv, D, -1);
}
