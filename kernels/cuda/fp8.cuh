/* Rounding a row to fp8 (the maths is in cpu/fp8.c and base/fp8.h), for the kernels that hold one between its largest magnitude and its bytes: quantize's, and those of the ops that write
 * what they make rounded.
 *
 * Floats become e4m3 by the hardware's conversion, which is e4m3_from_float() to the bit for all that is not NaN; NaN out of an arithmetic instruction is the one positive
 * NaN, so a factor of NaN writes E4M3_NAN. Maxima are taken of the floats' bits without their sign, which order as the floats do and put NaN on top. */
#ifndef KERNELS_CUDA_FP8_CUH
#define KERNELS_CUDA_FP8_CUH

#include <cuda_fp8.h>

#include "base/fp8.h"
#include "kernels/cuda/common.cuh"

constexpr uint32_t INFINITY_BITS = 0x7f800000u;

__device__ __forceinline__ uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }
__device__ __forceinline__ float quiet_nan() { return __uint_as_float(0x7fc00000u); }
/* what a number is multiplied by to become e4m3; scale is a power of two, so this is exact */
__device__ __forceinline__ float inverse_of(float scale) { return magnitude_bits(scale) < INFINITY_BITS ? 1.0f / scale : quiet_nan(); }

__device__ __forceinline__ uint32_t round4(const float (&x)[4])
{
    uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(x[0], x[1]), __NV_SATFINITE, __NV_E4M3), high = __nv_cvt_float2_to_fp8x2(make_float2(x[2], x[3]), __NV_SATFINITE, __NV_E4M3);
    return low | high << 16;
}

/* ---- W numbers of a row, as they were or would have been written in T ---- */

/* bits of the largest magnitude among them */
template <typename T, int W> __device__ __forceinline__ uint32_t largest_of(const packed<T, W> &x)
{
    uint32_t most = 0;
    if constexpr (__is_same(T, bf16) && W % 2 == 0) {          /* bf16 is the upper half of a float: two are compared at a time */
        #pragma unroll
        for (int i = 0; i < W / 2; i++) most = __vmaxu2(most, x.word[i] & 0x7fff7fffu);
        return max(most << 16, most & 0xffff0000u);
    } else {
        float a[W];
        unpack<T, W>(a, x);
        #pragma unroll
        for (int i = 0; i < W; i++) most = max(most, magnitude_bits(a[i]));
        return most;
    }
}

/* The factor of a row that a block holds, `most` being the largest that this thread has seen of it; its scale goes to *scale. All threads of the block together. */
__device__ __forceinline__ float factor_of_row(float *scale, uint32_t most)
{
    float s = e4m3_scale(__uint_as_float(block_reduce(most, 0u, max_op())));
    if (threadIdx.x == 0) *scale = s;
    return inverse_of(s);
}

template <typename T, int W> __device__ __forceinline__ void store_rounded(uint8_t *q, const packed<T, W> &x, float factor)
{
    float a[W];
    packed<uint8_t, W> out;
    unpack<T, W>(a, x);
    #pragma unroll
    for (int i = 0; i < W; i += 4) {
        float four[4] = {a[i] * factor, a[i + 1] * factor, a[i + 2] * factor, a[i + 3] * factor};
        out.word[i / 4] = round4(four);
    }
    store_packed<uint8_t, W>(q, out);
}

/* ---- launchers ---- */

static inline void require_fp8(const struct fp8 *x, int64_t K)
{
    CUDA_REQUIRE(K % CUDA_FP8_MULTIPLE == 0, "fp8: the width of a matrix is not a multiple of 16");
    CUDA_REQUIRE(aligned16(x->q), "fp8: a matrix is not aligned to 16 bytes");      /* its scales may begin anywhere: some rows of a larger one */
}

#endif
