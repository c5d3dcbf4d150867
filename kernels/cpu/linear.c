/* Linear layer, the one file that calls BLAS. Row-major; w is (O, C) as Hugging Face stores it.
 *     y = x w^T + bias        dx = dy w        dw += dy^T x        dbias += sum_n dy_n */
#include <cblas.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

void cpu_linear_forward(struct backend *be, act *y_, const act *x, const act *w, const act *bias_, int64_t N, int64_t C, int64_t O)
{
    (void)be;
    float *y = fp32(y_);
    const float *bias = cfp32(bias_);
    if (bias) {
        #pragma omp parallel for schedule(static)
        for (int64_t n = 0; n < N; n++) memcpy(y + n * O, bias, (size_t)O * sizeof *y);
    }
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)N, (int)O, (int)C, 1.0f, cfp32(x), (int)C, cfp32(w), (int)C, bias ? 1.0f : 0.0f, y, (int)O);
}

void cpu_linear_backward_input(struct backend *be, act *dx, const act *dy, const act *w, int64_t N, int64_t C, int64_t O)
{
    (void)be;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)N, (int)C, (int)O, 1.0f, cfp32(dy), (int)O, cfp32(w), (int)C, 0.0f, fp32(dx), (int)C);
}

void cpu_linear_backward_weight(struct backend *be, grad *dw, grad *dbias_, const act *dy_, const act *x, int64_t N, int64_t C, int64_t O)
{
    (void)be;
    const float *dy = cfp32(dy_);
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, (int)O, (int)C, (int)N, 1.0f, dy, (int)O, cfp32(x), (int)C, 1.0f, gfp32(dw), (int)C);
    if (!dbias_) return;
    float *dbias = gfp32(dbias_);
    enum { COLUMNS = 64 };
    #pragma omp parallel for schedule(static)
    for (int64_t o0 = 0; o0 < O; o0 += COLUMNS) {
        double part[COLUMNS] = {0};
        int64_t columns = O - o0 < COLUMNS ? O - o0 : COLUMNS;
        for (int64_t n = 0; n < N; n++)
            for (int64_t o = 0; o < columns; o++) part[o] += dy[n * O + o0 + o];
        for (int64_t o = 0; o < columns; o++) dbias[o0 + o] += (float)part[o];
    }
}
