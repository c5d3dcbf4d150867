/* RMSNorm with the residual join (Zhang & Sennrich 2019):
 *     s = x + r      y_i = w_i s_i rstd      rstd = (mean s^2 + eps)^-1/2
 *     ds_i = dres_i + rstd (w_i dy_i - s_i rstd^2 mean_j(w_j dy_j s_j))      dw_i += sum_n dy_ni s_ni rstd_n */
#include "kernels/cpu/cpu.h"

void cpu_rmsnorm_forward(struct backend *be, act *y_, float *rstd, act *sum_, const act *x_, const act *r_, const act *w_, int64_t N, int64_t C, float eps)
{
    (void)be;
    float *y = fp32(y_), *sum = fp32(sum_);
    const float *x = cfp32(x_), *r = cfp32(r_), *w = cfp32(w_);
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const float *xn = x + n * C, *rn = r ? r + n * C : NULL;
        float *yn = y + n * C, *sn = sum ? sum + n * C : yn;   /* without a place for s it passes through y */
        double squares = 0;
        if (rn) for (int64_t c = 0; c < C; c++) sn[c] = xn[c] + rn[c];
        else if (sn != xn) for (int64_t c = 0; c < C; c++) sn[c] = xn[c];
        #pragma omp simd reduction(+ : squares)
        for (int64_t c = 0; c < C; c++) squares += (double)sn[c] * sn[c];
        float scale = (float)(1.0 / sqrt(squares / (double)C + eps));
        for (int64_t c = 0; c < C; c++) yn[c] = w[c] * (sn[c] * scale);
        rstd[n] = scale;
    }
}

void cpu_rmsnorm_backward(struct backend *be, act *dx_, grad *dw_, const act *dres_, const act *dy_, const act *x_, const act *w_, const float *rstd, int64_t N, int64_t C)
{
    (void)be;
    float *dx = fp32(dx_), *dw = gfp32(dw_);
    const float *dres = cfp32(dres_), *dy = cfp32(dy_), *x = cfp32(x_), *w = cfp32(w_);
    enum { COLUMNS = 64 };
    /* dw before dx: dx may overwrite dy */
    #pragma omp parallel for schedule(static)
    for (int64_t c0 = 0; c0 < C; c0 += COLUMNS) {
        double part[COLUMNS] = {0};
        int64_t columns = C - c0 < COLUMNS ? C - c0 : COLUMNS;
        for (int64_t n = 0; n < N; n++)
            for (int64_t c = 0; c < columns; c++) part[c] += (double)dy[n * C + c0 + c] * (x[n * C + c0 + c] * rstd[n]);
        for (int64_t c = 0; c < columns; c++) dw[c0 + c] += (float)part[c];
    }
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const float *xn = x + n * C, *dyn = dy + n * C;
        float *dxn = dx + n * C;
        double dot = 0;
        #pragma omp simd reduction(+ : dot)
        for (int64_t c = 0; c < C; c++) dot += (double)(w[c] * dyn[c]) * xn[c];
        float k = (float)(dot / (double)C * rstd[n] * rstd[n]);
        for (int64_t c = 0; c < C; c++) {
            float d = rstd[n] * (w[c] * dyn[c] - xn[c] * k);
            dxn[c] = dres ? dres[n * C + c] + d : d;
        }
    }
}
