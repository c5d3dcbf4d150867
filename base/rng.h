/* Counter-based random numbers: Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
 * The same (key, counter) gives the same four words on every machine and in any order, so nothing has to be saved
 * for a resume but what the caller already knows (seed, step, row, position). */
#ifndef BASE_RNG_H
#define BASE_RNG_H

#include <math.h>
#include <stdint.h>

#include "base/device.h"

struct philox { uint32_t v[4]; };

static inline HOST_DEVICE struct philox philox4x32(uint64_t key, uint64_t counter_hi, uint64_t counter_lo)
{
    uint32_t c0 = (uint32_t)counter_lo, c1 = (uint32_t)(counter_lo >> 32), c2 = (uint32_t)counter_hi, c3 = (uint32_t)(counter_hi >> 32);
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
#ifdef __CUDA_ARCH__
    #pragma unroll
    for (int round = 0; round < 10; round++) {                  /* spelt out: as 64-bit products AdamW on an H200 took 6.8 ms where it takes 2.0 */
        uint32_t hi0 = __umulhi(0xd2511f53u, c0), hi1 = __umulhi(0xcd9e8d57u, c2), lo0 = 0xd2511f53u * c0, lo1 = 0xcd9e8d57u * c2;
#else
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xd2511f53u * c0, p1 = (uint64_t)0xcd9e8d57u * c2;
        uint32_t hi0 = (uint32_t)(p0 >> 32), hi1 = (uint32_t)(p1 >> 32), lo0 = (uint32_t)p0, lo1 = (uint32_t)p1;
#endif
        uint32_t n0 = hi1 ^ c1 ^ k0, n2 = hi0 ^ c3 ^ k1;
        c1 = lo1; c3 = lo0; c0 = n0; c2 = n2;
        k0 += 0x9e3779b9u; k1 += 0xbb67ae85u;
    }
    struct philox r = {{c0, c1, c2, c3}};
    return r;
}

/* 32 random bits -> [0, 1) with 24 bits, never 1 */
static inline HOST_DEVICE float uniform_float(uint32_t bits) { return (float)(bits >> 8) * 0x1p-24f; }
/* 64 random bits -> [0, 1) with 53 bits */
static inline HOST_DEVICE double uniform_double(uint32_t hi, uint32_t lo) { return (double)((((uint64_t)hi << 32) | lo) >> 11) * 0x1p-53; }
/* two words -> one standard normal (Box-Muller) */
static inline HOST_DEVICE float normal_float(uint32_t a, uint32_t b)
{
    double u = 1.0 - uniform_double(a, 0), v = uniform_double(b, 0);
    return (float)(sqrt(-2.0 * log(u)) * cos(6.283185307179586476925 * v));
}

/* Fisher-Yates over items[n], a function of (key, stream) alone */
static inline void shuffle_int64(int64_t *items, int64_t n, uint64_t key, uint64_t stream)
{
    for (int64_t i = n - 1; i > 0; i--) {
        struct philox r = philox4x32(key, stream, (uint64_t)i);
        int64_t j = (int64_t)(((((uint64_t)r.v[0] << 32) | r.v[1])) % (uint64_t)(i + 1));
        int64_t t = items[i];
        items[i] = items[j];
        items[j] = t;
    }
}

#endif
