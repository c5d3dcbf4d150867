/* fp8: every byte goes to float and back unchanged, rounding is to the nearest, ties to even, saturating; and the scale of a row. */
#include <criterion/criterion.h>
#include <float.h>
#include <math.h>

#include "base/fp8.h"

/* The value of a byte, from its fields. e4m3 has numbers where IEEE 754 has infinity and NaNs, but for the last one. */
static double value(uint8_t q, int exponent_bits, bool ieee)
{
    int mantissa_bits = 7 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1, e = (q & 0x7f) >> mantissa_bits, m = q & ((1 << mantissa_bits) - 1);
    double magnitude = e ? ldexp(1 + ldexp(m, -mantissa_bits), e - bias) : ldexp(m, 1 - bias - mantissa_bits);
    if (ieee && e == (1 << exponent_bits) - 1) magnitude = m ? NAN : INFINITY;
    if (!ieee && (q & 0x7f) == 0x7f) magnitude = NAN;
    return q & 0x80 ? -magnitude : magnitude;
}

static void check_format(float (*to_float)(uint8_t), uint8_t (*from_float)(float), int exponent_bits, bool ieee, uint8_t largest)
{
    for (int q = 0; q < 256; q++) {
        double v = value((uint8_t)q, exponent_bits, ieee);
        float f = to_float((uint8_t)q);
        if (isnan(v)) { cr_assert(isnan(f) && isnan(to_float(from_float(f))), "%02x", q); continue; }
        cr_assert(f == v && !!signbit(f) == (q >> 7), "%02x is %g", q, (double)f);
        if ((q & 0x7f) > largest) { cr_assert_eq(from_float(f), largest | (q & 0x80)); continue; }      /* infinity saturates */
        cr_assert_eq(from_float(f), q, "%02x", q);
        if ((q & 0x7f) == largest) continue;
        double next = value((uint8_t)(q + 1), exponent_bits, ieee);
        float middle = (float)((v + next) / 2);
        cr_assert((double)middle == (v + next) / 2);
        cr_assert_eq(from_float(middle), q & 1 ? q + 1 : q, "between %02x and the next", q);
        cr_assert_eq(from_float(nextafterf(middle, (float)v)), q);
        cr_assert_eq(from_float(nextafterf(middle, (float)next)), q + 1);
    }
    float most = to_float(largest);
    const float beyond[] = {most * 1.01f, most * 1.2f, most * 3, FLT_MAX, INFINITY};
    for (size_t i = 0; i < sizeof beyond / sizeof *beyond; i++) {
        cr_expect_eq(from_float(beyond[i]), largest, "%g", (double)beyond[i]);
        cr_expect_eq(from_float(-beyond[i]), largest | 0x80);
    }
    cr_expect(isnan(to_float(from_float(NAN))) && isnan(to_float(from_float(-NAN))));
    cr_expect_eq(from_float(FLT_TRUE_MIN), 0);
    cr_expect_eq(from_float(-FLT_TRUE_MIN), 0x80);
}

Test(fp8, e4m3) { check_format(e4m3_to_float, e4m3_from_float, 4, false, 0x7e); cr_assert(e4m3_to_float(0x7e) == E4M3_MAX); }
Test(fp8, e5m2) { check_format(e5m2_to_float, e5m2_from_float, 5, true, 0x7b); cr_assert(e5m2_to_float(0x7b) == E5M2_MAX); }

/* A power of two that brings the largest number into (224, 448], whatever it is; zeros and what is not finite are told apart. */
Test(fp8, scale)
{
    for (float most = 0x1p-53f; most < 0x1p127f; most *= 1.0371f) {
        int exponent;
        float scale = e4m3_scale(most);
        cr_assert(frexpf(scale, &exponent) == 0.5f && most / scale <= 448 && most / scale > 224, "%g: %g", (double)most, (double)scale);
        cr_assert_eq(e4m3_scale(-most), scale);
    }
    for (int e = -53; e < 127; e++) {
        float top = ldexpf(1.75f, e);
        cr_assert(top / e4m3_scale(top) == 448 && nextafterf(top, INFINITY) / e4m3_scale(nextafterf(top, INFINITY)) < 225, "2^%d", e);
    }
    cr_assert(e4m3_scale(0) == 0x1p-62f && e4m3_scale(FLT_TRUE_MIN) == 0x1p-62f && isinf(e4m3_scale(INFINITY)) && isnan(e4m3_scale(NAN)) && e4m3_scale(FLT_MAX) == 0x1p120f);
}

/* The reason for powers of two: a number that changes its scale is not rounded again, as long as it stays above the subnormal ones. */
Test(fp8, another_scale_is_exact)
{
    for (int q = 0x08; q < 0x7f; q++)
        for (int shift = 0; (q >> 3) - shift >= 1; shift++)
            cr_assert(e4m3_to_float(e4m3_from_float(ldexpf(e4m3_to_float((uint8_t)q), -shift))) == ldexpf(e4m3_to_float((uint8_t)q), -shift));
}
