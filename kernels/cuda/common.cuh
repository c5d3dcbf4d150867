/* Device helpers of every op: the two element types, vectors of W elements as 4-byte words (16-byte accesses where W elements
 * are 16 bytes or more), sums over warps and blocks in a fixed order, fast exponentials, and the choice of a kernel's
 * template arguments from the backend's types. */
#ifndef KERNELS_CUDA_COMMON_CUH
#define KERNELS_CUDA_COMMON_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>

#include "kernels/cuda/cuda.h"

typedef __nv_bfloat16 bf16;

/* DISPATCH(be->act_dtype, T, kernel<T><<<...>>>(...)): T is float or bf16 */
#define DISPATCH(dtype, T, ...) do { if ((dtype) == DTYPE_F32) { typedef float T; __VA_ARGS__; } else { typedef bf16 T; __VA_ARGS__; } } while (0)

/* elements of a 16-byte vector */
template <typename T> __host__ __device__ constexpr int vector_width() { return 16 / (int)sizeof(T); }

static inline bool aligned16(const void *p) { return ((uintptr_t)p & 15) == 0; }
static __host__ __device__ inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }

/* ---- W elements of T: packed as in memory (words), or as floats ---- */

template <typename T, int W> struct packed { uint32_t word[(W * sizeof(T) + 3) / 4]; };     /* W = 1 of a 16-bit type: the low half */

template <typename T, int W> __device__ __forceinline__ packed<T, W> load_packed(const T *p)
{
    constexpr int words = W * (int)sizeof(T) / 4;
    packed<T, W> r;
    if constexpr (W * sizeof(T) < 4) r.word[0] = *reinterpret_cast<const uint16_t *>(p);
    else if constexpr (words % 4 == 0) {
        #pragma unroll
        for (int i = 0; i < words / 4; i++) {
            uint4 q = reinterpret_cast<const uint4 *>(p)[i];
            r.word[4 * i] = q.x; r.word[4 * i + 1] = q.y; r.word[4 * i + 2] = q.z; r.word[4 * i + 3] = q.w;
        }
    } else if constexpr (words % 2 == 0) {
        #pragma unroll
        for (int i = 0; i < words / 2; i++) {
            uint2 q = reinterpret_cast<const uint2 *>(p)[i];
            r.word[2 * i] = q.x; r.word[2 * i + 1] = q.y;
        }
    } else {
        #pragma unroll
        for (int i = 0; i < words; i++) r.word[i] = reinterpret_cast<const uint32_t *>(p)[i];
    }
    return r;
}

template <typename T, int W> __device__ __forceinline__ void store_packed(T *p, const packed<T, W> &r)
{
    constexpr int words = W * (int)sizeof(T) / 4;
    if constexpr (W * sizeof(T) < 4) *reinterpret_cast<uint16_t *>(p) = (uint16_t)r.word[0];
    else if constexpr (words % 4 == 0) {
        #pragma unroll
        for (int i = 0; i < words / 4; i++)
            reinterpret_cast<uint4 *>(p)[i] = make_uint4(r.word[4 * i], r.word[4 * i + 1], r.word[4 * i + 2], r.word[4 * i + 3]);
    } else if constexpr (words % 2 == 0) {
        #pragma unroll
        for (int i = 0; i < words / 2; i++) reinterpret_cast<uint2 *>(p)[i] = make_uint2(r.word[2 * i], r.word[2 * i + 1]);
    } else {
        #pragma unroll
        for (int i = 0; i < words; i++) reinterpret_cast<uint32_t *>(p)[i] = r.word[i];
    }
}

template <typename T, int W> __device__ __forceinline__ void unpack(float (&x)[W], const packed<T, W> &r)
{
    if constexpr (sizeof(T) == 4) {
        #pragma unroll
        for (int i = 0; i < W; i++) x[i] = __uint_as_float(r.word[i]);
    } else {
        #pragma unroll
        for (int i = 0; i < W; i++) {
            uint32_t bits = i % 2 ? r.word[i / 2] >> 16 : r.word[i / 2] & 0xffffu;
            if constexpr (sizeof(T) == 2 && __is_same(T, bf16)) x[i] = __uint_as_float(i % 2 ? r.word[i / 2] & 0xffff0000u : bits << 16);
            else x[i] = __half2float(__ushort_as_half((unsigned short)bits));
        }
    }
}

template <typename T, int W> __device__ __forceinline__ packed<T, W> pack(const float (&x)[W])
{
    packed<T, W> r;
    if constexpr (sizeof(T) == 4) {
        #pragma unroll
        for (int i = 0; i < W; i++) r.word[i] = __float_as_uint(x[i]);
    } else if constexpr (W == 1) r.word[0] = __bfloat16_as_ushort(__float2bfloat16_rn(x[0]));
    else {
        #pragma unroll
        for (int i = 0; i < W / 2; i++) {
            __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
            r.word[i] = *reinterpret_cast<const uint32_t *>(&pair);
        }
    }
    return r;
}

template <typename T, int W> __device__ __forceinline__ void load(float (&x)[W], const T *p) { unpack<T, W>(x, load_packed<T, W>(p)); }
template <typename T, int W> __device__ __forceinline__ void store(T *p, const float (&x)[W]) { store_packed<T, W>(p, pack<T, W>(x)); }

/* ---- exponentials ---- */

constexpr float LOG2E = 1.4426950408889634f;
/* 2^x, relative error 2^-22, results below 2^-126 are 0 */
__device__ __forceinline__ float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }

/* ---- over a warp and a block, in a fixed order ---- */

struct add_op { template <typename V> __device__ V operator()(V a, V b) const { return a + b; } };
struct max_op { template <typename V> __device__ V operator()(V a, V b) const { return a > b ? a : b; } };

template <typename V, typename Op> __device__ __forceinline__ V warp_reduce(V x, Op op)
{
    #pragma unroll
    for (int s = 16; s; s >>= 1) x = op(x, __shfl_xor_sync(0xffffffffu, x, s));
    return x;
}

/* one instruction, where the shuffles and comparisons of the one above are ten */
__device__ __forceinline__ uint32_t warp_reduce(uint32_t x, max_op) { return __reduce_max_sync(0xffffffffu, x); }

/* The result reaches every thread. shared: 32 elements, free to use again after the next barrier; blockDim.x a multiple of 32. */
template <typename V, typename Op> __device__ __forceinline__ V block_reduce_into(V x, V identity, Op op, V *shared)
{
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    x = warp_reduce(x, op);
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return warp_reduce(lane < (int)blockDim.x / 32 ? shared[lane] : identity, op);
}
/* Two of them behind one barrier, each in place and with 32 elements of its own, as above; 0 is the identity of both. */
template <typename A, typename OpA, typename B, typename OpB> __device__ __forceinline__ void block_reduce_two_into(A &a, OpA op_a, A *shared_a, B &b, OpB op_b, B *shared_b)
{
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = (int)blockDim.x / 32;
    a = warp_reduce(a, op_a);
    b = warp_reduce(b, op_b);
    if (lane == 0) { shared_a[warp] = a; shared_b[warp] = b; }
    __syncthreads();
    a = warp_reduce(lane < warps ? shared_a[lane] : (A)0, op_a);
    b = warp_reduce(lane < warps ? shared_b[lane] : (B)0, op_b);
}
template <typename V, typename Op> __device__ __forceinline__ V block_reduce(V x, V identity, Op op)
{
    __shared__ V shared[32];
    __syncthreads();
    return block_reduce_into(x, identity, op, shared);
}
template <typename V> __device__ __forceinline__ V block_sum(V x) { return block_reduce(x, (V)0, add_op()); }
__device__ __forceinline__ float block_max(float x) { return block_reduce(x, -CUDART_INF_F, max_op()); }

/* ---- floats as integers in the same order: larger float, larger key; -0 ties with +0 ---- */

__device__ __forceinline__ uint32_t ordered_key(float x)
{
    uint32_t b = __float_as_uint(x + 0.0f);
    return b & 0x80000000u ? ~b : b | 0x80000000u;
}
__device__ __forceinline__ float key_value(uint32_t k) { return __uint_as_float(k & 0x80000000u ? k & 0x7fffffffu : ~k); }

#endif
