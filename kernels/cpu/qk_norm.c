/* q/k norm (Qwen3): RMSNorm over the D values of every query and key head, before RoPE; values pass unchanged. The maths is
 * rmsnorm.c's with C = D, one weight for all query heads and one for all key heads. */
#include <string.h>

#include "kernels/cpu/cpu.h"

void cpu_qk_norm_forward(struct backend *be, act *y_, float *rstd, const act *x_, const act *wq, const act *wk, int64_t N, int Hq, int Hkv, int D, float eps)
{
    (void)be;
    float *y = fp32(y_);
    const float *x = cfp32(x_);
    int heads = Hq + Hkv, width = (Hq + 2 * Hkv) * D;
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        for (int h = 0; h < heads; h++) {
            const float *w = cfp32(h < Hq ? wq : wk), *in = x + n * width + h * D;
            float *out = y + n * width + h * D;
            double squares = 0;
            for (int d = 0; d < D; d++) squares += (double)in[d] * in[d];
            float scale = (float)(1.0 / sqrt(squares / D + eps));
            for (int d = 0; d < D; d++) out[d] = w[d] * (in[d] * scale);
            rstd[n * heads + h] = scale;
        }
        memcpy(y + n * width + heads * D, x + n * width + heads * D, (size_t)(Hkv * D) * sizeof *y);
    }
}

void cpu_qk_norm_backward(struct backend *be, act *dx_, grad *dwq, grad *dwk, const act *dy_, const act *x_, const act *wq, const act *wk, const float *rstd,
                          int64_t N, int Hq, int Hkv, int D)
{
    (void)be;
    float *dx = fp32(dx_);
    const float *dy = cfp32(dy_), *x = cfp32(x_);
    int heads = Hq + Hkv, width = (Hq + 2 * Hkv) * D;
    /* dw before dx: dx may overwrite dy. One thread per block of columns keeps the order of the sum. */
    enum { COLUMNS = 16 };
    int blocks = (D + COLUMNS - 1) / COLUMNS;
    #pragma omp parallel for schedule(static)
    for (int block = 0; block < 2 * blocks; block++) {
        int is_k = block >= blocks, d0 = (block - is_k * blocks) * COLUMNS, columns = D - d0 < COLUMNS ? D - d0 : COLUMNS;
        double part[COLUMNS] = {0};
        for (int64_t n = 0; n < N; n++)
            for (int h = is_k ? Hq : 0; h < (is_k ? heads : Hq); h++)
                for (int d = 0; d < columns; d++)
                    part[d] += (double)dy[n * width + h * D + d0 + d] * (x[n * width + h * D + d0 + d] * rstd[n * heads + h]);
        for (int d = 0; d < columns; d++) gfp32(is_k ? dwk : dwq)[d0 + d] += (float)part[d];
    }
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        for (int h = 0; h < heads; h++) {
            const float *w = cfp32(h < Hq ? wq : wk), *in = x + n * width + h * D, *dout = dy + n * width + h * D;
            float *din = dx + n * width + h * D, scale = rstd[n * heads + h];
            double dot = 0;
            for (int d = 0; d < D; d++) dot += (double)(w[d] * dout[d]) * in[d];
            float k = (float)(dot / D * scale * scale);
            for (int d = 0; d < D; d++) din[d] = scale * (w[d] * dout[d] - in[d] * k);
        }
        if (dx != dy) memcpy(dx + n * width + heads * D, dy + n * width + heads * D, (size_t)(Hkv * D) * sizeof *dx);
    }
}
