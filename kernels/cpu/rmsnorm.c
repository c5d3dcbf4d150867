/* RMSNorm with the residual join (Zhang & Sennrich 2019):
 *     s = x + r      y_i = w_i s_i rstd      rstd = (mean s^2 + eps)^-1/2
 *     ds_i = dres_i + rstd (w_i dy_i - s_i rstd^2 mean_j(w_j dy_j s_j))      dw_i += sum_n dy_ni s_ni rstd_n */
#include "base/fp8.h"
#include "kernels/cpu/cpu.h"

/* One row; returns rstd. s may be x, r or y. */
static float norm_row(float *y, float *s, const float *x, const float *r, const float *w, int64_t C, float eps)
{
    double squares = 0;
    if (r) for (int64_t c = 0; c < C; c++) s[c] = x[c] + r[c];
    else if (s != x) for (int64_t c = 0; c < C; c++) s[c] = x[c];
    #pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < C; c++) squares += (double)s[c] * s[c];
    float rstd = (float)(1.0 / sqrt(squares / (double)C + eps));
    for (int64_t c = 0; c < C; c++) y[c] = w[c] * (s[c] * rstd);
    return rstd;
}

void cpu_rmsnorm_forward(struct backend *be, act *y_, float *rstd, act *sum_, const act *x_, const act *r_, const act *w_, int64_t N, int64_t C, float eps)
{
    (void)be;
    float *y = fp32(y_), *sum = fp32(sum_);
    const float *x = cfp32(x_), *r = cfp32(r_), *w = cfp32(w_);
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        float *yn = y + n * C;                                 /* without a place for s it passes through y */
        rstd[n] = norm_row(yn, sum ? sum + n * C : yn, x + n * C, r ? r + n * C : NULL, w, C, eps);
    }
}

void cpu_rmsnorm_forward_fp8(struct backend *be, const struct fp8 *y8, float *rstd, act *sum_, const act *x_, const act *r_, const act *w_, int64_t N, int64_t C, float eps)
{
    float *sum = fp32(sum_);
    const float *x = cfp32(x_), *r = cfp32(r_), *w = cfp32(w_);
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        float *y = thread_scratch(be, (size_t)C);
        rstd[n] = norm_row(y, sum ? sum + n * C : y, x + n * C, r ? r + n * C : NULL, w, C, eps);
        e4m3_round_row(y8->q + n * C, &y8->scale[n], y, C);
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

void cpu_rmsnorm_backward_fp8(struct backend *be, act *dx, const struct fp8 *dx8, grad *dw, const act *dres, const act *dy, const act *x, const act *w, const float *rstd, int64_t N, int64_t C)
{
    cpu_rmsnorm_backward(be, dx, dw, dres, dy, x, w, rstd, N, C);
    cpu_quantize(be, dx8, dx, N, C);
}
