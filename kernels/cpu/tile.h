/* One small matrix product for attention's tiles, in registers:  c[i][j] += sum_k a[i][k] b[k][j].
 * b and c have contiguous rows (ldb, ldc apart); a is read through two strides, so that it can be a transposed tile.
 * Four rows of c by two vectors of 16 stay in registers over k, which is what it takes to keep the FMA units busy; gcc
 * lowers the 64-byte vectors to what the processor has. */
#ifndef KERNELS_CPU_TILE_H
#define KERNELS_CPU_TILE_H

#include <stdint.h>
#include <string.h>

typedef float vector16 __attribute__((vector_size(64)));

static inline vector16 load16(const float *p) { vector16 v; memcpy(&v, p, sizeof v); return v; }
static inline void add16(float *p, vector16 v) { vector16 old = load16(p); old += v; memcpy(p, &old, sizeof old); }

/* rows (1..4) x vectors (1..2) of c; both are constants after inlining */
static inline __attribute__((always_inline)) void tile_block(float *c, int64_t ldc, const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t ldb,
                                                             int64_t k_count, const int rows, const int vectors)
{
    vector16 sum[4][2] = {0};
    for (int64_t k = 0; k < k_count; k++)
        for (int v = 0; v < vectors; v++) {
            vector16 bv = load16(b + k * ldb + 16 * v);
            for (int r = 0; r < rows; r++) sum[r][v] += a[r * a_row + k * a_col] * bv;
        }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) add16(c + r * ldc + 16 * v, sum[r][v]);
}

static void tile_product(float *c, int64_t ldc, const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t ldb, int64_t m, int64_t n, int64_t k_count)
{
    int64_t i = 0;
    for (; i < m; i += i + 4 <= m ? 4 : 1) {
        int full = i + 4 <= m;
        const float *ai = a + i * a_row;
        float *ci = c + i * ldc;
        int64_t j = 0;
        for (; j + 32 <= n; j += 32) {
            if (full) tile_block(ci + j, ldc, ai, a_row, a_col, b + j, ldb, k_count, 4, 2);
            else tile_block(ci + j, ldc, ai, a_row, a_col, b + j, ldb, k_count, 1, 2);
        }
        for (; j + 16 <= n; j += 16) {
            if (full) tile_block(ci + j, ldc, ai, a_row, a_col, b + j, ldb, k_count, 4, 1);
            else tile_block(ci + j, ldc, ai, a_row, a_col, b + j, ldb, k_count, 1, 1);
        }
        for (; j < n; j++)
            for (int r = 0; r < (full ? 4 : 1); r++) {
                float s = 0;
                for (int64_t k = 0; k < k_count; k++) s += ai[r * a_row + k * a_col] * b[k * ldb + j];
                ci[r * ldc + j] += s;
            }
    }
}

#endif
