/* half: every 16-bit pattern goes to float and back unchanged, and rounding is to the nearest, ties to even. */
#include <criterion/criterion.h>
#include <math.h>

#include "base/half.h"

/* The value of a half pattern, from its fields: 1 sign bit, `exponent` bits, then mantissa. */
static double value(uint16_t h, int exponent_bits)
{
    int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1, e = (h & 0x7fff) >> mantissa_bits, m = h & ((1 << mantissa_bits) - 1);
    double magnitude = e == (1 << exponent_bits) - 1 ? (m ? NAN : INFINITY) : e ? ldexp(1 + ldexp(m, -mantissa_bits), e - bias) : ldexp(m, 1 - bias - mantissa_bits);
    return h & 0x8000 ? -magnitude : magnitude;
}

static void check_format(float (*to_float)(uint16_t), uint16_t (*from_float)(float), int exponent_bits)
{
    uint16_t infinity = (uint16_t)(((1 << exponent_bits) - 1) << (15 - exponent_bits));
    for (uint32_t h = 0; h < 0x10000; h++) {
        double v = value((uint16_t)h, exponent_bits);
        float f = to_float((uint16_t)h);
        if (isnan(v)) {
            cr_assert(isnan(f) && isnan(to_float(from_float(f))) && (from_float(f) & 0x8000) == (h & 0x8000), "%04x", h);
            continue;
        }
        cr_assert(f == v && !!signbit(f) == !!(h & 0x8000) && from_float(f) == h, "%04x is %g", h, (double)f);
        if ((h & 0x7fff) >= infinity - 1u) continue;
        /* halfway to the next one goes to the even one; a bit less stays, a bit more goes */
        double next = value((uint16_t)(h + 1), exponent_bits);
        float middle = (float)((v + next) / 2);
        cr_assert((double)middle == (v + next) / 2);
        cr_assert_eq(from_float(middle), h & 1 ? h + 1 : h, "between %04x and the next", h);
        cr_assert_eq(from_float(nextafterf(middle, (float)v)), h);
        cr_assert_eq(from_float(nextafterf(middle, (float)next)), h + 1);
    }
    cr_assert_eq(from_float(INFINITY), infinity);
    cr_assert_eq(from_float(-INFINITY), infinity | 0x8000);
}

/* Many at once, from any place and of any number, are the same as one by one. */
Test(half, f16_many)
{
    static uint16_t all[0x10000];
    static float many[0x10000];
    for (uint32_t h = 0; h < 0x10000; h++) all[h] = (uint16_t)h;
    for (int n = 0; n < 40; n++)
        for (int at = 0; at < 0x10000 - 40; at += 37) {
            many[n] = 7;
            f16_to_floats(many, all + at, n);
            for (int i = 0; i < n; i++) {
                float one = f16_to_float(all[at + i]);
                cr_assert(isnan(one) ? isnan(many[i]) : one == many[i] && !!signbit(one) == !!signbit(many[i]), "%04x", all[at + i]);
            }
            cr_assert_eq(many[n], 7);
        }
}

Test(half, f16)
{
    check_format(f16_to_float, f16_from_float, 5);
    cr_assert_eq(f16_from_float(65504), 0x7bff);
    cr_assert_eq(f16_from_float(65519.996f), 0x7bff);
    cr_assert_eq(f16_from_float(65520), 0x7c00);
    cr_assert_eq(f16_from_float(1e30f), 0x7c00);
    cr_assert_eq(f16_from_float(0x1p-25f), 0);              /* halfway to the smallest: even is 0 */
    cr_assert_eq(f16_from_float(0x1.000002p-25f), 1);
    cr_assert_eq(f16_from_float(-0x1p-30f), 0x8000);
}

Test(half, bf16)
{
    check_format(bf16_to_float, bf16_from_float, 8);
    cr_assert_eq(bf16_from_float(1.0f + 0x1p-8f), 0x3f80);
    cr_assert_eq(bf16_from_float(1.0f + 0x1.8p-7f), 0x3f82);
    cr_assert_eq(bf16_from_float(3.4e38f), 0x7f80);         /* FLT_MAX rounds up to infinity */
    cr_assert_eq(bf16_from_float(0x1p-133f), 1);
}
