/* Conversions between float and the two 16-bit formats, round to nearest even. Bits in, bits out: no compiler
 * support for half types is assumed. bf16: NaN is made quiet and keeps its sign. */
#ifndef BASE_HALF_H
#define BASE_HALF_H

#include <stdint.h>
#include <string.h>

static inline float bf16_to_float(uint16_t h)
{
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint16_t bf16_from_float(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

#if defined(__F16C__)
#include <immintrin.h>
static inline float f16_to_float(uint16_t h) { return _cvtsh_ss(h); }
static inline uint16_t f16_from_float(float f) { return _cvtss_sh(f, 0); }
#else
static inline float f16_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
    if (exponent == 31) bits = sign | 0x7f800000u | (mantissa << 13);
    else if (exponent) bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
    else {                                   /* subnormal: mantissa * 2^-24 is exact in float */
        float f = (float)mantissa * 5.9604644775390625e-8f;
        memcpy(&bits, &f, 4);
        bits |= sign;
    }
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint16_t f16_from_float(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00;
    if (bits >= 0x477ff000u) return sign | 0x7c00;              /* rounds to 65520 or more: infinity */
    if (bits < 0x38800000u) {                                   /* below 2^-14: let the adder round to a multiple of 2^-24 */
        float a;
        memcpy(&a, &bits, 4);
        a += 0.5f;
        memcpy(&bits, &a, 4);
        return sign | (uint16_t)(bits - 0x3f000000u);
    }
    bits += 0xc8000fffu + ((bits >> 13) & 1);
    return sign | (uint16_t)(bits >> 13);
}
#endif

/* The same for many: compilers do not widen the instruction by themselves. */
static inline void f16_to_floats(float *to, const uint16_t *from, int64_t n)
{
    int64_t i = 0;
#if defined(__F16C__)
    for (int64_t wide = n / 8 * 8; i < wide; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(from + i))));
#endif
    for (; i < n; i++) to[i] = f16_to_float(from[i]);
}

#endif
