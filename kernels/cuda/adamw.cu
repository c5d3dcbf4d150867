/* AdamW (the maths is in cpu/adamw.c), one pass: every state is read and written once.
 *
 * Types: fp32 throughout, with a master or none; bf16 weights, gradients and moments (compact); bf16 weights with fp32 gradients, moments and either a fp32
 * master or none. The update itself is fp32 from unrounded m and v. What is kept in bf16 and has no fp32 master is rounded
 * stochastically: up with the probability of the part cut off, so that updates below half a unit are not lost. The 32 bits of an
 * element are word (e mod 4) of Philox 4x32-10 (Salmon et al. 2011) at counter (e / 4, step) under the seed, e its index in the
 * whole table: the high half rounds w, the low half m and v. Any split of the table into ranges gives the same weights. */
#include "base/rng.h"
#include "kernels/cuda/common.cuh"

enum { THREADS = 256 };

struct adamw_constants { float b1, b2, new1, new2, eps, step_size, v_scale, decay; double clip; uint64_t seed, step; int64_t first; };

/* bf16 bits of x, rounded up with probability (low half of x) / 2^16: random16 in its low 16 bits. Infinities and NaN stay what they are. */
__device__ __forceinline__ uint32_t round_stochastic(float x, uint32_t random16)
{
    uint32_t bits = __float_as_uint(x);
    return ((bits & 0x7f800000u) == 0x7f800000u ? bits | (bits & 0xffffu ? 0x400000u : 0) : bits + random16) >> 16;
}

template <typename T, int W> __device__ __forceinline__ void store_rounded(T *p, const float (&x)[W], const uint32_t (&random)[W], int shift)
{
    if constexpr (sizeof(T) == 4) store<T, W>(p, x);
    else {
        packed<T, W> r;
        if constexpr (W == 1) r.word[0] = round_stochastic(x[0], random[0] >> shift & 0xffffu);
        else {
            #pragma unroll
            for (int i = 0; i < W / 2; i++)
                r.word[i] = round_stochastic(x[2 * i], random[2 * i] >> shift & 0xffffu) | round_stochastic(x[2 * i + 1], random[2 * i + 1] >> shift & 0xffffu) << 16;
        }
        store_packed<T, W>(p, r);
    }
}

__device__ __forceinline__ float divide(float a, float b, float) { return a / b; }
__device__ __forceinline__ float divide(float a, float b, bf16) { return __fdividef(a, b); }
__device__ __forceinline__ float root(float x, float) { return sqrtf(x); }
__device__ __forceinline__ float root(float x, bf16) { float y; asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }

template <typename T, typename G, typename M, bool MASTER, int W>
__device__ __forceinline__ void update(T *w, float *master, const G *g, M *m, M *v, int64_t i, float scale, const adamw_constants &k)
{
    constexpr bool RANDOM = (sizeof(T) == 2 && !MASTER) || sizeof(M) == 2;
    float wv[W], gv[W], mv[W], vv[W];
    uint32_t random[W] = {};
    if constexpr (MASTER) load<float, W>(wv, master + i);
    else load<T, W>(wv, w + i);
    load<G, W>(gv, g + i);
    load<M, W>(mv, m + i);
    load<M, W>(vv, v + i);
    if constexpr (RANDOM) {
        uint64_t e = (uint64_t)(k.first + i);
        if constexpr (W % 4 == 0) {                       /* e is a multiple of 4: see the launcher */
            #pragma unroll
            for (int j = 0; j < W; j += 4) {
                philox r = philox4x32(k.seed, k.step, (e + j) >> 2);
                #pragma unroll
                for (int q = 0; q < 4; q++) random[j + q] = r.v[q];
            }
        } else {
            philox r = philox4x32(k.seed, k.step, e >> 2);
            random[0] = e & 2 ? (e & 1 ? r.v[3] : r.v[2]) : (e & 1 ? r.v[1] : r.v[0]);
        }
    }
    #pragma unroll
    for (int j = 0; j < W; j++) {
        /* every rounding is spelt out: left to itself the compiler contracts the wide and the narrow instance differently, and a tensor's
         * tail would depend on where its range begins */
        float gi = __fmul_rn(gv[j], scale);
        mv[j] = __fmaf_rn(k.b1, mv[j], __fmul_rn(k.new1, gi));
        vv[j] = __fmaf_rn(k.b2, vv[j], __fmul_rn(__fmul_rn(k.new2, gi), gi));
        float move = divide(__fmul_rn(k.step_size, mv[j]), __fmaf_rn(root(vv[j], M()), k.v_scale, k.eps), M());
        wv[j] = __fsub_rn(wv[j], __fmaf_rn(k.decay, wv[j], move));
    }
    store_rounded<M, W>(m + i, mv, random, 0);
    store_rounded<M, W>(v + i, vv, random, 0);
    if constexpr (MASTER) {
        store<float, W>(master + i, wv);
        store<T, W>(w + i, wv);
    } else store_rounded<T, W>(w + i, wv, random, 16);
}

template <typename T, typename G, typename M, bool MASTER, int W>
__global__ void __launch_bounds__(THREADS) adamw_kernel(T *w, float *master, const G *g, M *m, M *v, int64_t vectors, int64_t count, const double *grad_sum_squares, adamw_constants k)
{
    __shared__ float shared_scale;
    double squares = *grad_sum_squares;
    if (!isfinite(squares)) return;
    if (threadIdx.x == 0) {
        double shrink = k.clip > 0 ? k.clip / (sqrt(squares) + 1e-6) : 1;
        shared_scale = (float)(shrink < 1 ? shrink : 1);
    }
    __syncthreads();
    float scale = shared_scale;
    int64_t stride = (int64_t)gridDim.x * THREADS, first = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    for (int64_t i = first; i < vectors; i += stride) update<T, G, M, MASTER, W>(w, master, g, m, v, i * W, scale, k);
    for (int64_t i = vectors * W + first; i < count; i += stride) update<T, G, M, MASTER, 1>(w, master, g, m, v, i, scale, k);
}

template <typename T, typename G, typename M, bool MASTER>
static void launch(struct backend *be, act *w, float *master, const grad *g, moment *m, moment *v, int64_t count, const double *grad_sum_squares, const adamw_constants &k)
{
    struct cuda_state *s = cuda_state_of(be);
    constexpr int W = sizeof(M) == 2 ? 8 : 4;
    bool wide = aligned16(w) && aligned16(g) && aligned16(m) && aligned16(v) && (!MASTER || aligned16(master)) && k.first % 4 == 0;
    int64_t vectors = wide ? count / W : 0, blocks = least(div_up(count, THREADS * (wide ? W : 1)), (int64_t)s->sms * 16);
    adamw_kernel<T, G, M, MASTER, W><<<(unsigned)blocks, THREADS, 0, s->stream>>>((T *)w, master, (const G *)g, (M *)m, (M *)v, vectors, count, grad_sum_squares, k);
    CUDA_CHECK(cudaGetLastError());
}

extern "C" void cuda_adamw(struct backend *be, act *w, float *master, const grad *g, moment *m, moment *v, int64_t count, const double *grad_sum_squares, const struct adamw_args *a)
{
    if (!count) return;
    adamw_constants k = {};
    k.b1 = (float)a->beta1; k.b2 = (float)a->beta2; k.new1 = (float)(1 - a->beta1); k.new2 = (float)(1 - a->beta2); k.eps = (float)a->eps;
    k.step_size = (float)(a->lr / (1 - pow(a->beta1, (double)a->step)));
    k.v_scale = (float)(1 / sqrt(1 - pow(a->beta2, (double)a->step)));
    k.decay = (float)(a->lr * a->weight_decay);
    k.clip = a->clip; k.seed = a->seed; k.step = (uint64_t)a->step; k.first = a->first;
    if (be->act_dtype == DTYPE_F32 && master) launch<float, float, float, true>(be, w, master, g, m, v, count, grad_sum_squares, k);
    else if (be->act_dtype == DTYPE_F32) launch<float, float, float, false>(be, w, NULL, g, m, v, count, grad_sum_squares, k);
    else if (be->moment_dtype == DTYPE_BF16) {
        CUDA_REQUIRE(!master && be->grad_dtype == DTYPE_BF16, "adamw: bf16 moments go with bf16 gradients and no master weights");
        launch<bf16, bf16, bf16, false>(be, w, NULL, g, m, v, count, grad_sum_squares, k);
    } else if (master) launch<bf16, float, float, true>(be, w, master, g, m, v, count, grad_sum_squares, k);
    else launch<bf16, float, float, false>(be, w, NULL, g, m, v, count, grad_sum_squares, k);
}
