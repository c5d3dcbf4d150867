/* The two 8-bit floating-point formats of "FP8 formats for deep learning" (Micikevicius et al. 2022; OCP OFP8), and how a row of numbers becomes one.
 *     e4m3   S.EEEE.MMM, bias 7: 448 down to 2^-6, subnormals to 2^-9; no infinity, NaN is S.1111.111
 *     e5m2   S.EEEEE.MM, bias 15: 57344 down to 2^-14, subnormals to 2^-16; infinity and NaN as in IEEE 754
 * Conversions round to nearest even and saturate: what is larger than the largest number, infinity included, becomes the largest number; NaN stays NaN. That is
 * what the hardware's conversions do with .satfinite. */
#ifndef BASE_FP8_H
#define BASE_FP8_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "base/device.h"

#define E4M3_MAX 448.0f
#define E4M3_NAN 0x7f
#define E5M2_MAX 57344.0f

HOST_DEVICE static inline uint32_t float_bits(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

HOST_DEVICE static inline float bits_float(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* mantissa: bits of it; bias: 120 or 112 = 127 - the format's; magic: a power of two whose unit in the last place is the smallest subnormal. No branch on the value, so that
 * compilers vectorise it. */
HOST_DEVICE static inline uint8_t fp8_from_float(float f, int mantissa, uint32_t bias, float magic, float max, uint8_t nan)
{
    uint32_t bits = float_bits(f), sign = bits >> 24 & 0x80, a = bits & 0x7fffffffu, shift = 23u - (uint32_t)mantissa;
    uint32_t most = float_bits(max), clamped = a < most ? a : most;
    uint32_t normal = (clamped - (bias << 23) + ((1u << (shift - 1)) - 1) + (clamped >> shift & 1)) >> shift;
    uint32_t subnormal = float_bits(bits_float(clamped) + magic) - float_bits(magic);      /* the adder rounds to a multiple of the smallest subnormal */
    uint32_t q = clamped < (bias + 1) << 23 ? subnormal : normal;
    return (uint8_t)(sign | (a > 0x7f800000u ? nan : q));
}

HOST_DEVICE static inline uint8_t e4m3_from_float(float f) { return fp8_from_float(f, 3, 120, 0x1p14f, E4M3_MAX, E4M3_NAN); }
HOST_DEVICE static inline uint8_t e5m2_from_float(float f) { return fp8_from_float(f, 2, 112, 0x1p7f, E5M2_MAX, 0x7f); }

HOST_DEVICE static inline float e4m3_to_float(uint8_t q)
{
    uint32_t sign = (uint32_t)(q & 0x80) << 24, rest = q & 0x7f;
    /* exponent and mantissa at their places, times 2^120: exact for normal and subnormal numbers alike */
    float f = bits_float(rest << 20) * 0x1p120f;
    return bits_float(sign | (rest == 0x7f ? 0x7fc00000u : float_bits(f)));
}

HOST_DEVICE static inline float e5m2_to_float(uint8_t q)
{
    uint32_t sign = (uint32_t)(q & 0x80) << 24, rest = q & 0x7f;
    float f = bits_float(rest << 21) * 0x1p112f;
    return bits_float(sign | (rest >= 0x7c ? 0x7f800000u | (rest & 3) << 21 : float_bits(f)));
}

/* The scale of numbers whose largest magnitude is `most`: the power of two that brings it into (224, 448]. Multiplying by a power of two rounds nothing, and a
 * floating-point format is as exact at one power of two as at the next: what a scale without a mantissa costs is at most one of e4m3's eighteen binades, what it buys is
 * that a number can change its scale without being rounded again.
 * Not below 2^-62, so that the product of two scales is a normal number; zeros have that one, and so weigh nothing where scales are compared.
 * Infinity or the one quiet NaN, and then everything is not finite, where `most` is not finite. */
HOST_DEVICE static inline float e4m3_scale(float most)
{
    uint32_t bits = float_bits(most) & 0x7fffffffu;
    if (bits >= 0x7f800000u) return bits_float(bits > 0x7f800000u ? 0x7fc00000u : bits);
    int exponent = (int)(bits >> 23) - 127 - 8 + ((bits & 0x7fffffu) > 0x600000u);         /* 448 = 1.75 * 2^8 */
    if (exponent < -62) exponent = -62;
    return bits_float((uint32_t)(exponent + 127) << 23);
}

/* A row of n numbers, rounded at the scale of its largest; NaN throughout where one is not finite. What every device does, to the bit. */
static inline void e4m3_round_row(uint8_t *q, float *scale, const float *x, int64_t n)
{
    float most = 0;
    int nan = 0;
    for (int64_t i = 0; i < n; i++) {
        float a = fabsf(x[i]);
        most = a > most ? a : most;
        nan |= a != a;
    }
    *scale = e4m3_scale(nan ? NAN : most);
    float inverse = 1 / *scale;
    if (float_bits(*scale) >= 0x7f800000u) memset(q, E4M3_NAN, (size_t)n);
    else for (int64_t i = 0; i < n; i++) q[i] = e4m3_from_float(x[i] * inverse);
}

#endif
