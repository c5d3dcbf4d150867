/* Matrices in fp8 (base/fp8.h): rounding into them, and the products of what was rounded.
 *     q[r,k] = e4m3(x[r,k] / scale[r]),  scale[r] = e4m3_scale(max_k |x[r,k]|);  NaN throughout where that is not finite
 * The product of two e4m3 numbers is exact in fp32, so devices differ by the order of a sum, and by the bits their sums keep (kernels/cuda/linear.c). Here the numbers are turned back into floats, a
 * panel of outputs at a time, and linear.c multiplies them. */
#include <string.h>

#include "base/fp8.h"
#include "kernels/cpu/cpu.h"

enum { PANEL = 512 };

void cpu_quantize(struct backend *be, const struct fp8 *y, const act *x_, int64_t R, int64_t K)
{
    (void)be;
    const float *x = cfp32(x_);
    #pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < R; r++) e4m3_round_row(y->q + r * K, &y->scale[r], x + r * K, K);
}

static float number(const struct fp8 *x, int64_t r, int64_t k, int64_t K) { return e4m3_to_float(x->q[r * K + k]) * x->scale[r]; }

void cpu_quantize_weight(struct backend *be, const struct fp8 *w8, const struct fp8 *t8, const act *w, int64_t O, int64_t C)
{
    cpu_quantize(be, w8, w, O, C);
    #pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < C; c++) {
        float most = 0;
        bool finite = true;
        for (int64_t o = 0; o < O; o++) {
            float a = fabsf(number(w8, o, c, C));
            most = a > most ? a : most;
            finite &= isfinite(a) != 0;
        }
        float scale = finite ? e4m3_scale(most) : NAN;
        t8->scale[c] = scale;
        if (!finite) memset(t8->q + c * O, E4M3_NAN, (size_t)O);
        else for (int64_t o = 0; o < O; o++) t8->q[c * O + o] = e4m3_from_float(number(w8, o, c, C) / scale);
    }
}

/* the widest input or output of a product */
static int64_t widest_of(const struct op_limits *l)
{
    int64_t heads = (int64_t)(l->Hq + 2 * l->Hkv) * l->D, most = l->C > 2 * l->F ? l->C : 2 * l->F;
    return heads > most ? heads : most;
}

size_t cpu_fp8_scratch(const struct backend *be, const struct op_limits *l)
{
    if (!l->fp8) return 0;
    int64_t widest = widest_of(l), taller = l->N > widest ? l->N : widest;
    size_t products = (size_t)(l->N * (widest + 1) + PANEL * taller) * sizeof(float) + (be->exact_rows ? thread_scratch_bytes(cpu_exact_rows_scratch(widest)) : 0);
    size_t rows = thread_scratch_bytes((size_t)widest);
    return products > rows ? products : rows;
}

/* rows [first, first + rows) of x as floats */
static void numbers(float *out, const struct fp8 *x, int64_t first, int64_t rows, int64_t K)
{
    #pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < K; k++) out[r * K + k] = number(x, first + r, k, K);
}

void cpu_linear_forward_fp8(struct backend *be, act *y, const struct fp8 *x, const struct fp8 *w, const act *bias, int64_t N, int64_t C, int64_t O)
{
    float *all = be->scratch, *panel = all + N * C, *rest = panel + PANEL * C;
    numbers(all, x, 0, N, C);
    for (int64_t first = 0; first < O; first += PANEL) {
        int64_t outputs = O - first < PANEL ? O - first : PANEL;
        numbers(panel, w, first, outputs, C);
        cpu_product(be, rest, fp32(y) + first, O, all, panel, bias ? cfp32(bias) + first : NULL, N, C, outputs);
    }
}

void cpu_linear_backward_weight_fp8(struct backend *be, grad *dw, grad *dbias, const struct fp8 *dy, const struct fp8 *x, int64_t N, int64_t C, int64_t O)
{
    float *all = be->scratch, *folded = all + N * C, *panel = folded + N, scale = 0;
    bool finite = true;
    for (int64_t n = 0; n < N; n++) {
        folded[n] = dy->scale[n] * x->scale[n];
        scale = folded[n] > scale ? folded[n] : scale;
        finite &= isfinite(folded[n]) != 0;
    }
    if (!finite) scale = NAN;
    #pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < N * C; i++) all[i] = e4m3_to_float(x->q[i]);
    for (int64_t first = 0; first < O; first += PANEL) {
        int64_t outputs = O - first < PANEL ? O - first : PANEL;
        #pragma omp parallel for schedule(static)
        for (int64_t n = 0; n < N; n++)
            for (int64_t o = 0; o < outputs; o++)
                panel[n * outputs + o] = e4m3_to_float(e4m3_from_float(e4m3_to_float(dy->q[n * O + first + o]) * (folded[n] / scale)));
        cpu_add_outer_products(gfp32(dw) + first * C, scale, panel, all, N, C, outputs);
        if (!dbias) continue;
        #pragma omp parallel for schedule(static)
        for (int64_t n = 0; n < N; n++)
            for (int64_t o = 0; o < outputs; o++) panel[n * outputs + o] = number(dy, n, first + o, O);
        cpu_add_column_sums(gfp32(dbias) + first, panel, N, outputs);
    }
}

void cpu_fp8_count(struct backend *be, struct fp8_census *sum, const struct fp8 *x, int64_t R, int64_t K)
{
    (void)be;
    int64_t zeros = 0, not_finite = 0;
    float most = sum->largest;
    #pragma omp parallel for schedule(static) reduction(+ : zeros, not_finite) reduction(max : most)
    for (int64_t r = 0; r < R; r++) {
        if (!isfinite(x->scale[r])) { not_finite++; continue; }
        uint8_t top = 0;
        int64_t row_zeros = 0;
        for (int64_t k = 0; k < K; k++) {
            uint8_t magnitude = x->q[r * K + k] & 0x7f;
            row_zeros += magnitude == 0;
            top = magnitude > top ? magnitude : top;
        }
        if (top == E4M3_NAN) { not_finite++; continue; }
        zeros += row_zeros;
        float a = e4m3_to_float(top) * x->scale[r];
        most = a > most ? a : most;
    }
    sum->elements += (double)(R * K);
    sum->zeros += (double)zeros;
    sum->largest = most;
    sum->not_finite += (float)not_finite;
}
