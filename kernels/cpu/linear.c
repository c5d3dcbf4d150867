/* Linear layer, the one file that calls BLAS. Row-major; w is (O, C) as Hugging Face stores it.
 *     y = x w^T + bias        dx = dy w        dw += dy^T x        dbias += sum_n dy_n
 * BLAS adds up an element in an order that depends on where its row stands in the call and on the number of threads (OpenBLAS on an AVX2 machine has two
 * orders for six rows each). A dump whose rows have to be the same bytes whoever computes them asks for exact_rows: then every element is one
 * sum over c = 0 .. C-1 in that order. */
#include <cblas.h>
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/tile.h"

enum { PANEL = LANES * WIDEST, GROUP = 4 };       /* outputs and rows of one block of registers */

size_t cpu_exact_rows_scratch(int64_t C) { return (size_t)(C * (PANEL + GROUP)); }

/* y = x w^T + bias, PANEL outputs at a time: their rows of w are transposed, then met by four rows of x after four; missing ones are zeros, so that
 * every element comes out of the same instructions. */
static void linear_exact_rows(struct backend *be, float *y, const float *x, const float *w, const float *bias, int64_t N, int64_t C, int64_t O)
{
    #pragma omp parallel for schedule(static)
    for (int64_t o0 = 0; o0 < O; o0 += PANEL) {
        float *panel = thread_scratch(be, cpu_exact_rows_scratch(C)), *rest = panel + C * PANEL;
        int64_t outputs = O - o0 < PANEL ? O - o0 : PANEL;
        for (int64_t o = 0; o < PANEL; o++)
            for (int64_t c = 0; c < C; c++) panel[c * PANEL + o] = o < outputs ? w[(o0 + o) * C + c] : 0;
        for (int64_t n0 = 0; n0 < N; n0 += GROUP) {
            int64_t rows = N - n0 < GROUP ? N - n0 : GROUP;
            const float *group = x + n0 * C;
            float sum[GROUP * PANEL] = {0};
            if (rows < GROUP) {
                memcpy(rest, group, (size_t)(rows * C) * sizeof *rest);
                memset(rest + rows * C, 0, (size_t)((GROUP - rows) * C) * sizeof *rest);
                group = rest;
            }
            tile_block(sum, PANEL, group, C, 1, panel, PANEL, C, GROUP, WIDEST);
            for (int64_t n = 0; n < rows; n++)
                for (int64_t o = 0; o < outputs; o++) y[(n0 + n) * O + o0 + o] = sum[n * PANEL + o] + (bias ? bias[o0 + o] : 0);
        }
    }
}

void cpu_linear_forward(struct backend *be, act *y_, const act *x, const act *w, const act *bias_, int64_t N, int64_t C, int64_t O)
{
    float *y = fp32(y_);
    const float *bias = cfp32(bias_);
    if (be->exact_rows) { linear_exact_rows(be, y, cfp32(x), cfp32(w), bias, N, C, O); return; }
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
