/* e^x in fp32 from operations that are rounded alike everywhere (fused multiply-adds where they are written, nothing the compiler may fuse on its
 * own), so that the same x gives the same bits on every CPU and on a GPU, and a loop over it can be vectorised. */
#ifndef BASE_EXP_H
#define BASE_EXP_H

#include <math.h>
#include <stdint.h>

#include "base/device.h"

/* e^x within 2 ulp of fp32, without branches: x = n ln 2 + r, |r| <= ln 2 / 2, e^r by its Taylor polynomial of degree 7
 * (the next term is below 6e-9), times 2^n through the exponent bits. Below -87 it is 0, as
 * masked logits of -INFINITY must be; above 88.37 it is INFINITY. NaN stays NaN. */
static inline HOST_DEVICE float exp_fp32(float x)
{
    float n = rintf(x * 1.44269504088896341f);
    n = n > -126.0f ? n < 127.0f ? n : 127.0f : -126.0f;        /* of NaN: -126 */
    float r = fmaf(n, -0.693145751953125f, x);
    r = fmaf(n, -1.42860682030941723212e-6f, r);
    float p = 1.9841269841e-4f;
    p = fmaf(p, r, 1.3888888889e-3f);
    p = fmaf(p, r, 8.3333333333e-3f);
    p = fmaf(p, r, 4.1666666667e-2f);
    p = fmaf(p, r, 1.6666666667e-1f);
    p = fmaf(p, r, 5.0e-1f);
    p = fmaf(p * r, r, r) + 1.0f;
    union { int32_t i; float f; } scale = {.i = ((int32_t)n + 127) << 23};
    float y = p * scale.f;
    y = x < -87.0f ? 0.0f : y;
    y = x > 88.37f ? INFINITY : y;
    return x != x ? x : y;
}

#endif
