/* One small matrix product for attention's tiles, in registers:  c[i][j] += sum_k a[i][k] b[k][j].
 * b and c have contiguous rows (ldb, ldc apart); a is read through two strides, so that it can be a transposed tile.
 * A block of c stays in registers over k: six rows by four vectors where there are 32 registers, by two where there are 16.
 * Vectors are as wide as the processor's registers: gcc takes wider ones apart through memory, twenty times slower. */
#ifndef KERNELS_CPU_TILE_H
#define KERNELS_CPU_TILE_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
enum { LANES = 16, WIDEST = 4, MOST_ROWS = 6 };
#elif defined(__AVX__)
enum { LANES = 8, WIDEST = 2, MOST_ROWS = 6 };
#else
enum { LANES = 4, WIDEST = 2, MOST_ROWS = 6 };
#endif

typedef float vector __attribute__((vector_size(LANES * sizeof(float))));

static inline vector load_vector(const float *p) { vector v; memcpy(&v, p, sizeof v); return v; }
static inline vector broadcast(float x) { return x - (vector){0}; }
static inline void add_vector(float *p, vector v) { vector old = load_vector(p); old += v; memcpy(p, &old, sizeof old); }

/* A vector stays in its register from here on, and the loads stay in this order. Left alone, gcc loads a vector again for each of its products, or
 * all of them ahead of their use and then has no register left: the loads set the pace, not the products. */
#if defined(__x86_64__)
#define IN_REGISTER(v) __asm__ volatile("" : "+v"(v))
#else
#define IN_REGISTER(v) (void)(v)
#endif

/* rows (1..MOST_ROWS) x vectors (1..WIDEST) of c; both are constants after inlining, and the loops over them disappear at every optimisation level */
static inline __attribute__((always_inline)) void tile_block(float *c, int64_t ldc, const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t ldb,
                                                             int64_t k_count, const int rows, const int vectors)
{
    vector sum[MOST_ROWS][WIDEST] = {0}, bk[WIDEST];
    for (int64_t k = 0; k < k_count; k++) {
        #pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            bk[v] = load_vector(b + k * ldb + LANES * v);
            IN_REGISTER(bk[v]);
        }
        #pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            vector ark = broadcast(a[r * a_row + k * a_col]);
            IN_REGISTER(ark);
            #pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[r][v] += ark * bk[v];
        }
    }
    #pragma GCC unroll 6
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
    for (; i + MOST_ROWS <= m; i += MOST_ROWS) tile_columns(c + i * ldc, ldc, a + i * a_row, a_row, a_col, b, ldb, n, k_count, MOST_ROWS);
    for (; i + 2 <= m; i += 2) tile_columns(c + i * ldc, ldc, a + i * a_row, a_row, a_col, b, ldb, n, k_count, 2);
    for (; i < m; i++) tile_columns(c + i * ldc, ldc, a + i * a_row, a_row, a_col, b, ldb, n, k_count, 1);
}

#endif
