/* One small matrix product for attention's tiles, in registers:  c[i][j] += sum_k a[i][k] b[k][j].
 * b and c have contiguous rows (ldb, ldc apart); a is read through two strides, so that it can be a transposed tile.
 * A block of c stays in registers over k: four rows by four vectors where there are 32 registers, by two where there are 16.
 * Vectors are as wide as the processor's registers: gcc takes wider ones apart through memory, twenty times slower. */
#ifndef KERNELS_CPU_TILE_H
#define KERNELS_CPU_TILE_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
enum { LANES = 16, WIDEST = 4 };
#elif defined(__AVX__)
enum { LANES = 8, WIDEST = 2 };
#else
enum { LANES = 4, WIDEST = 2 };
#endif

typedef float vector __attribute__((vector_size(LANES * sizeof(float))));

static inline vector load_vector(const float *p) { vector v; memcpy(&v, p, sizeof v); return v; }
static inline void add_vector(float *p, vector v) { vector old = load_vector(p); old += v; memcpy(p, &old, sizeof old); }

/* rows (1..4) x vectors (1..4) of c; both are constants after inlining, and the loops over them disappear at every optimisation level */
static inline __attribute__((always_inline)) void tile_block(float *c, int64_t ldc, const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t ldb,
                                                             int64_t k_count, const int rows, const int vectors)
{
    vector sum[4][4] = {0};
    for (int64_t k = 0; k < k_count; k++)
        #pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            vector bv = load_vector(b + k * ldb + LANES * v);
            #pragma GCC unroll 4
            for (int r = 0; r < rows; r++) sum[r][v] += a[r * a_row + k * a_col] * bv;
        }
    #pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
        #pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) add_vector(c + r * ldc + LANES * v, sum[r][v]);
}

static inline __attribute__((always_inline)) void tile_columns(float *c, int64_t ldc, const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t ldb,
                                                               int64_t n, int64_t k_count, const int rows)
{
    int64_t j = 0;
    for (; j + LANES * WIDEST <= n; j += LANES * WIDEST) tile_block(c + j, ldc, a, a_row, a_col, b + j, ldb, k_count, rows, WIDEST);
    for (; j + LANES <= n; j += LANES) tile_block(c + j, ldc, a, a_row, a_col, b + j, ldb, k_count, rows, 1);
    for (; j < n; j++)
        for (int r = 0; r < rows; r++) {
            float s = 0;
            for (int64_t k = 0; k < k_count; k++) s += a[r * a_row + k * a_col] * b[k * ldb + j];
            c[r * ldc + j] += s;
        }
}

static inline void tile_product(float *c, int64_t ldc, const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t ldb, int64_t m, int64_t n, int64_t k_count)
{
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) tile_columns(c + i * ldc, ldc, a + i * a_row, a_row, a_col, b, ldb, n, k_count, 4);
    for (; i < m; i++) tile_columns(c + i * ldc, ldc, a + i * a_row, a_row, a_col, b, ldb, n, k_count, 1);
}

#endif
