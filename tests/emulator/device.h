/* CUDA's device language for the translated kernels: the first thing in each of them. Types and conversions of bf16, fp16 and fp8 are NVIDIA's
 * headers in their host form; what a thread is told and what threads do together is the runtime's. An intrinsic or instruction that is missing here
 * does not compile: README.md says how to add one. */
#ifndef TESTS_EMULATOR_DEVICE_H
#define TESTS_EMULATOR_DEVICE_H

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime_api.h>
#include <math.h>
#include <string.h>
#include <vector_functions.h>

#include "tests/emulator/runtime.h"

#define __CUDA_ARCH__ 900 /* from here on: the project's headers take the device's side */
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __noinline__
#define __noinline__ __attribute__((noinline))

/* ---- where threads meet ---- */

template <typename T> uint64_t bits_of(T v)
{
    static_assert(sizeof(T) <= 8, "wider than what lanes exchange");
    uint64_t bits = 0;
    memcpy(&bits, &v, sizeof v);
    return bits;
}
template <typename T> T from_bits(uint64_t bits)
{
    T v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

#define PLACE emulator::place at = {__builtin_FILE(), __builtin_LINE()} /* the caller's, being a default argument */
template <typename T> T __shfl_sync(unsigned mask, T v, int from, int width = 32, PLACE)
{
    return from_bits<T>(emulator::meet_warp(emulator::SHUFFLE, mask, bits_of(v), from, width, at));
}
template <typename T> T __shfl_xor_sync(unsigned mask, T v, int with, int width = 32, PLACE)
{
    return from_bits<T>(emulator::meet_warp(emulator::SHUFFLE_XOR, mask, bits_of(v), with, width, at));
}
template <typename T> T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, PLACE)
{
    return from_bits<T>(emulator::meet_warp(emulator::SHUFFLE_UP, mask, bits_of(v), (int)by, width, at));
}
inline unsigned __ballot_sync(unsigned mask, int predicate, PLACE)
{
    return (unsigned)emulator::meet_warp(emulator::BALLOT, mask, predicate != 0, 0, 32, at);
}
inline int __reduce_add_sync(unsigned mask, int v, PLACE) { return (int)emulator::meet_warp(emulator::REDUCE_ADD, mask, (unsigned)v, 0, 32, at); }
inline unsigned __reduce_max_sync(unsigned mask, unsigned v, PLACE) { return (unsigned)emulator::meet_warp(emulator::REDUCE_MAX, mask, v, 0, 32, at); }
inline unsigned __reduce_min_sync(unsigned mask, unsigned v, PLACE) { return ~(unsigned)emulator::meet_warp(emulator::REDUCE_MAX, mask, ~v, 0, 32, at); }
inline void __syncwarp(unsigned mask = 0xffffffffu, PLACE) { emulator::meet_warp(emulator::SYNCWARP, mask, 0, 0, 32, at); }
inline void __syncthreads(PLACE) { emulator::meet_block(emulator::BARRIER, false, at); }
inline int __syncthreads_count(int predicate, PLACE) { return emulator::meet_block(emulator::BARRIER_COUNT, predicate != 0, at); }

template <typename T, typename U> T atomicAdd(T *p, U v)
{
    return emulator::atomic(p, [&](T x) { return (T)(x + (T)v); });
}
template <typename T, typename U> T atomicMax(T *p, U v)
{
    return emulator::atomic(p, [&](T x) { return x > (T)v ? x : (T)v; });
}
template <typename T, typename U> T atomicMin(T *p, U v)
{
    return emulator::atomic(p, [&](T x) { return x < (T)v ? x : (T)v; });
}
template <typename T, typename U> T atomicOr(T *p, U v)
{
    return emulator::atomic(p, [&](T x) { return (T)(x | (T)v); });
}

/* ---- integers ---- */

/* for each type by itself, as nvcc overloads them: mixed arguments are ambiguous */
#define MIN_MAX(T)                                                                                                                                   \
    inline T max(T a, T b) { return a > b ? a : b; }                                                                                                 \
    inline T min(T a, T b) { return a < b ? a : b; }
MIN_MAX(int);
MIN_MAX(unsigned);
MIN_MAX(long long);
MIN_MAX(unsigned long long);
#undef MIN_MAX

inline unsigned __float_as_uint(float x) { return from_bits<unsigned>(bits_of(x)); }
inline float __uint_as_float(unsigned u) { return from_bits<float>(u); }
inline float __int_as_float(int i) { return from_bits<float>((unsigned)i); }
inline double __longlong_as_double(long long i) { return from_bits<double>((uint64_t)i); }
template <typename T> T __ldcs(const T *p) { return *p; }
inline int __popc(unsigned u) { return __builtin_popcount(u); }
inline int __ffs(int i) { return __builtin_ffs(i); }
inline int __clz(int i) { return i ? __builtin_clz((unsigned)i) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned long long)((unsigned __int128)a * b >> 64); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector)
{
    uint64_t bytes = (uint64_t)b << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned s = selector >> 4 * i & 15, byte = (unsigned)(bytes >> 8 * (s & 7)) & 255;
        result |= (s & 8 ? byte & 128 ? 255 : 0 : byte) << 8 * i;
    }
    return result;
}
template <typename F> unsigned by_bytes(unsigned a, unsigned b, F f)
{
    unsigned result = 0;
    for (int i = 0; i < 32; i += 8) result |= f(a >> i & 255, b >> i & 255) << i;
    return result;
}
inline unsigned __vmaxu2(unsigned a, unsigned b)
{
    unsigned low = (a & 0xffff) > (b & 0xffff) ? a : b, high = a >> 16 > b >> 16 ? a : b;
    return (high & 0xffff0000u) | (low & 0xffffu);
}
inline unsigned __vmaxu4(unsigned a, unsigned b)
{
    return by_bytes(a, b, [](unsigned x, unsigned y) { return x > y ? x : y; });
}
inline unsigned __vcmpeq4(unsigned a, unsigned b)
{
    return by_bytes(a, b, [](unsigned x, unsigned y) { return x == y ? 255u : 0u; });
}

/* ---- numbers: every operation is rounded by itself, for this is compiled with -ffp-contract=off ---- */

inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline long long __float2ll_rn(float x) { return isnan(x) ? INT64_MIN : x >= 0x1p63f ? INT64_MAX : x < -0x1p63f ? INT64_MIN : llrintf(x); }
inline double __hiloint2double(int high, int low) { return from_bits<double>((uint64_t)(uint32_t)high << 32 | (uint32_t)low); }
/* a divisor beyond 2^126 gives 0, an infinity by it NaN */
inline float __fdividef(float a, float b)
{
    return fabsf(b) > 0x1p126f && isfinite(b) ? (isinf(a) ? NAN : copysignf(0, a) * copysignf(1, b)) : a / b;
}

/* ---- instructions, from asm statements ---- */

inline float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; } /* .ftz */
inline void ptx_ex2_approx_ftz_f32(float &y, float x) { y = flush(emulator::approximate((float)exp2((double)flush(x)))); }
inline void ptx_sqrt_approx_ftz_f32(float &y, float x) { y = flush(emulator::approximate(sqrtf(flush(x)))); }
inline const void *__cvta_generic_to_shared(const void *p) { return p; }
inline void ptx_cp_async_cg_shared_global(const void *to, const void *from, int bytes) { emulator::copy_async((void *)to, from, bytes); }
inline void ptx_cp_async_commit_group() { emulator::close_async_group(); }
inline void ptx_cp_async_wait_group(int groups_left) { emulator::wait_async(groups_left); }

/* ---- launches ---- */

inline void cudaGridDependencySynchronize() {}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *c, void (*kernel)(Parameters...), Arguments &&...arguments)
{
    emulator::launch("launched by cudaLaunchKernelEx", (const void *)kernel, c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream,
                     [&] { kernel(Parameters(arguments)...); });
    return cudaGetLastError();
}

#endif
