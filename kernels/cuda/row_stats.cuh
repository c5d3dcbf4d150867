/* What the three ops over rows of logits share: the running maximum and sums of exponentials of a thread, one vector of the row at
 * a time, and their merge over the block. A row's exponents are taken relative to its largest logit; -1e30 stands for "none yet", so
 * that masked logits of -infinity add exactly 0. */
#ifndef KERNELS_CUDA_ROW_STATS_CUH
#define KERNELS_CUDA_ROW_STATS_CUH

#include "kernels/cuda/common.cuh"

constexpr float NONE = -1e30f;

/* f(x, j) for every vector of a row's first Vv columns, from column j; columns past Vv read as -infinity. BATCH vectors are asked for before
 * the first is used. Backwards: the same vectors of each thread in reverse. f may overwrite the vector it was given. */
template <typename T, int W, int BATCH, bool BACKWARDS, typename F> __device__ __forceinline__ void for_each_vector(const T *row, int64_t Vv, F f)
{
    int64_t step = (int64_t)blockDim.x * W, turns = (Vv + step * BATCH - 1) / (step * BATCH);
    for (int64_t turn = 0; turn < turns; turn++) {
        int64_t begin = (BACKWARDS ? turns - 1 - turn : turn) * step * BATCH + (int64_t)threadIdx.x * W;
        packed<T, W> v[BATCH];
        #pragma unroll
        for (int b = 0; b < BATCH; b++) if (begin + b * step < Vv) v[b] = load_packed<T, W>(row + begin + b * step);
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int64_t j = begin + b * step;
            if (j < Vv) {
                float x[W];
                unpack<T, W>(x, v[b]);
                if (j + W > Vv) {
                    #pragma unroll
                    for (int i = 0; i < W; i++) if (j + i >= Vv) x[i] = -CUDART_INF_F;
                }
                f(x, j);
            }
        }
    }
}

/* The same over two rows at once: f(x, y, j) */
template <typename T, typename TT, int W, int BATCH, bool BACKWARDS, typename F> __device__ __forceinline__ void for_each_pair(const T *row, const TT *other, int64_t Vv, F f)
{
    int64_t step = (int64_t)blockDim.x * W, turns = (Vv + step * BATCH - 1) / (step * BATCH);
    for (int64_t turn = 0; turn < turns; turn++) {
        int64_t begin = (BACKWARDS ? turns - 1 - turn : turn) * step * BATCH + (int64_t)threadIdx.x * W;
        packed<T, W> v[BATCH];
        packed<TT, W> u[BATCH];
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int64_t j = begin + b * step;
            if (j < Vv) { v[b] = load_packed<T, W>(row + j); u[b] = load_packed<TT, W>(other + j); }
        }
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int64_t j = begin + b * step;
            if (j < Vv) {
                float x[W], y[W];
                unpack<T, W>(x, v[b]);
                unpack<TT, W>(y, u[b]);
                if (j + W > Vv) {
                    #pragma unroll
                    for (int i = 0; i < W; i++) if (j + i >= Vv) x[i] = y[i] = -CUDART_INF_F;
                }
                f(x, y, j);
            }
        }
    }
}

/* sum[k] = sum of 2^{c[k] (x - top)} of what was added, c[k] = log2(e) / T_k. x - top first: rounding top c would shift every term alike. */
template <int KINDS> struct running_sums {
    float top, sum[KINDS];
    __device__ __forceinline__ void clear() { top = NONE; for (int k = 0; k < KINDS; k++) sum[k] = 0; }
    template <int W> __device__ __forceinline__ void add(const float (&x)[W], const float (&c)[KINDS])
    {
        float most = x[0];
        #pragma unroll
        for (int i = 1; i < W; i++) most = fmaxf(most, x[i]);
        if (most > top) {
            #pragma unroll
            for (int k = 0; k < KINDS; k++) sum[k] *= exp2_fast((top - most) * c[k]);
            top = most;
        }
        float s[KINDS] = {};
        #pragma unroll
        for (int i = 0; i < W; i++) {
            float d = x[i] - top;
            #pragma unroll
            for (int k = 0; k < KINDS; k++) s[k] += exp2_fast(d * c[k]);
        }
        #pragma unroll
        for (int k = 0; k < KINDS; k++) sum[k] += s[k];
    }
    /* lse[k] = log sum e^{x / T_k} over the block; -infinity where everything is masked */
    __device__ __forceinline__ void merge(double (&lse)[KINDS], const float (&c)[KINDS], const double (&inv_T)[KINDS])
    {
        float most = block_max(top);
        #pragma unroll
        for (int k = 0; k < KINDS; k++) {
            double total = block_sum((double)(sum[k] * exp2_fast((top - most) * c[k])));
            lse[k] = most == NONE ? -CUDART_INF : (double)most * inv_T[k] + log(total);
        }
        top = most;                         /* of the row, from here on */
    }
};

/* log softmax of a row at one temperature: (x - top) / T - rest with rest = lse - top / T. Both parts are small where it matters, so that fp32
 * loses nothing however large the logits are. */
struct row_shift {
    float top, inv_T, rest;
    __device__ __forceinline__ float log_of(float x) const { return fmaf(x - top, inv_T, -rest); }
};
__device__ __forceinline__ row_shift shift_from(float top, float inv_T, double lse) { return {top, inv_T, lse > -CUDART_INF ? (float)(lse - (double)top * inv_T) : 0}; }

/* One id's share of KL(p||q) = sum p (e^d - 1 - d), d = log q - log p: the terms are >= 0 and second order in d, where those of
 * sum p log(p/q) are first order and cancel. With p = 0 what is left is q. */
__device__ __forceinline__ float kl_term(float p, float q, float d)
{
    if (!(p > 0)) return q;
    if (fabsf(d) >= 0.5f) return q - p - p * d;
    float s = 1.0f / 40320;                                          /* d^2 (1/2 + d/6 + ... + d^6/8! ), the next term is below 1e-8 of it */
    s = fmaf(s, d, 1.0f / 5040);
    s = fmaf(s, d, 1.0f / 720);
    s = fmaf(s, d, 1.0f / 120);
    s = fmaf(s, d, 1.0f / 24);
    s = fmaf(s, d, 1.0f / 6);
    s = fmaf(s, d, 0.5f);
    return p * d * d * s;
}

/* log(e^a + e^b) */
__device__ __forceinline__ double log_add(double a, double b)
{
    double hi = a > b ? a : b, lo = a > b ? b : a;
    return hi == -CUDART_INF ? hi : hi + log1p(exp(lo - hi));
}

#endif
