/* How sample_targets draws, one definition for every backend.
 *
 * Id j has the integer weight floor(2^45 exp((t_j - top) / T)), top being the largest logit that may be drawn; ids of the head have none. Integers
 * add up to the same in any order, and the exponential is made of operations that are rounded alike everywhere: so the same logits (to the
 * bit) give the same draws on every backend, with any number of threads, in any split into chunks. Draw d of position p of row r takes
 * the first id whose weights up to and including its own exceed floor(u W / 2^64), W being the sum of all weights and u a 64-bit word of
 * Philox keyed by (seed, r, p, d). What an id of less than 2^-45 of the likeliest one's probability loses by the rounding down is below what fp32 logits say. */
#ifndef KERNELS_DRAW_H
#define KERNELS_DRAW_H

#include "base/exp.h"
#include "base/rng.h"

enum { DRAW_TILE = 256 /* ids whose weights are summed together */, DRAW_MOST = 255, DRAW_MAX_VOCAB = 1 << 18 /* their weights fit 64 bits */ };

/* 0 for -INFINITY and NaN */
static inline HOST_DEVICE uint64_t draw_weight(float t, float top, float inv_T)
{
    float e = exp_fp32((t - top) * inv_T);
    return e > 0 ? (uint64_t)(int64_t)(e * 0x1p45f) : 0;
}

/* Where draw d falls in 0 .. total - 1. The key differs from the seed, which has other uses. */
static inline HOST_DEVICE uint64_t draw_target(uint64_t seed, int64_t row, int64_t position, int d, uint64_t total)
{
    struct philox r = philox4x32(seed ^ 0x73616d706c657321u, (uint64_t)row, (uint64_t)position << 32 | (uint32_t)(d >> 1));
    uint64_t u = d & 1 ? (uint64_t)r.v[2] << 32 | r.v[3] : (uint64_t)r.v[0] << 32 | r.v[1];
#ifdef __CUDA_ARCH__
    return __umul64hi(u, total);
#else
    return (uint64_t)((unsigned __int128)u * total >> 64);
#endif
}

#endif
