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
static void product_exact_rows(float *scratch, float *y, int64_t ldy, const float *x, const float *w, const float *bias, int64_t N, int64_t C, int64_t O)
{
    #pragma omp parallel for schedule(static)
    for (int64_t o0 = 0; o0 < O; o0 += PANEL) {
        float *panel = thread_part(scratch, cpu_exact_rows_scratch(C)), *rest = panel + C * PANEL;
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
                for (int64_t o = 0; o < outputs; o++) y[(n0 + n) * ldy + o0 + o] = sum[n * PANEL + o] + (bias ? bias[o0 + o] : 0);
        }
    }
}

void cpu_product(const struct backend *be, float *scratch, float *y, int64_t ldy, const float *x, const float *w, const float *bias, int64_t N, int64_t C, int64_t O)
{
    if (be->exact_rows) { product_exact_rows(scratch, y, ldy, x, w, bias, N, C, O); return; }
    if (bias) {
        #pragma omp parallel for schedule(static)
        for (int64_t n = 0; n < N; n++) memcpy(y + n * ldy, bias, (size_t)O * sizeof *y);
    }
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)N, (int)O, (int)C, 1.0f, x, (int)C, w, (int)C, bias ? 1.0f : 0.0f, y, (int)ldy);
}

void cpu_linear_forward(struct backend *be, act *y, const act *x, const act *w, const act *bias, int64_t N, int64_t C, int64_t O)
{
    cpu_product(be, be->scratch, fp32(y), O, cfp32(x), cfp32(w), cfp32(bias), N, C, O);
}

void cpu_linear_backward_input(struct backend *be, act *dx, const act *dy, const act *w, int64_t N, int64_t C, int64_t O)
{
    (void)be;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)N, (int)C, (int)O, 1.0f, cfp32(dy), (int)O, cfp32(w), (int)C, 0.0f, fp32(dx), (int)C);
}

void cpu_add_outer_products(float *dw, float scale, const float *dy, const float *x, int64_t N, int64_t C, int64_t O)
{
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, (int)O, (int)C, (int)N, scale, dy, (int)O, x, (int)C, 1.0f, dw, (int)C);
}

void cpu_add_column_sums(float *sums, const float *x, int64_t N, int64_t O)
{
    enum { COLUMNS = 64 };
    #pragma omp parallel for schedule(static)
    for (int64_t o0 = 0; o0 < O; o0 += COLUMNS) {
        double part[COLUMNS] = {0};
        int64_t columns = O - o0 < COLUMNS ? O - o0 : COLUMNS;
        for (int64_t n = 0; n < N; n++)
            for (int64_t o = 0; o < columns; o++) part[o] += x[n * O + o0 + o];
        for (int64_t o = 0; o < columns; o++) sums[o0 + o] += (float)part[o];
    }
}

void cpu_linear_backward_weight(struct backend *be, grad *dw, grad *dbias, const act *dy, const act *x, int64_t N, int64_t C, int64_t O)
{
    (void)be;
    cpu_add_outer_products(gfp32(dw), 1, cfp32(dy), cfp32(x), N, C, O);
    if (dbias) cpu_add_column_sums(gfp32(dbias), cfp32(dy), N, O);
}
