/* Attention (the maths is in cpu/attention.c). bf16 heads that cuDNN has a kernel for go there (attention_cudnn.c); this file holds the
 * plain kernels for fp32, for other head widths and for generation, and the lists that cuDNN's plans read. Log-sum-exps are (N, Hq), as
 * cuDNN's are, so that forward and backward may take different ways.
 *
 * Plain forward: a block per (query, head). Its warps take blocks of 32 keys in turn, a key per lane for the scores, the head's
 * columns across the lanes for the weighted sum, each warp with its own running softmax; the warps merge in order.
 * Plain backward: the same shape, once per query for dq and once per key for dk and dv, whose block walks over all queries of the
 * group that see the key. No atomics. */
#include "kernels/cuda/common.cuh"

enum { WARPS = 4, CACHED_WARPS = 8, MAX_D = CUDA_WIDEST_HEAD, COLUMNS = MAX_D / 32 };

/* The document of position i: [begin, end). false: i belongs to none. */
__device__ __forceinline__ bool document_of(int64_t i, const int32_t *doc_begin, int64_t n_docs, int64_t &begin, int64_t &end)
{
    int64_t lo = 0, hi = n_docs;                        /* the last d with doc_begin[d] <= i; empty documents before it are passed over */
    while (hi - lo > 1) {
        int64_t mid = (lo + hi) / 2;
        if (doc_begin[mid] <= i) lo = mid; else hi = mid;
    }
    begin = doc_begin[lo];
    end = doc_begin[lo + 1];
    return begin <= i && i < end;
}

template <typename T> __device__ __forceinline__ float dot_row(const float *a, const T *b, int D)
{
    float s = 0;
    if (D % vector_width<T>() == 0 && (reinterpret_cast<uintptr_t>(b) & 15) == 0) {
        for (int d = 0; d < D; d += vector_width<T>()) {
            float x[vector_width<T>()];
            load<T, vector_width<T>()>(x, b + d);
            #pragma unroll
            for (int i = 0; i < vector_width<T>(); i++) s += a[d + i] * x[i];
        }
    } else for (int d = 0; d < D; d++) s += a[d] * to_float(b[d]);
    return s;
}

/* One query over keys first..last, kv_stride apart; NW warps. lse may be NULL. */
template <typename T, int NW>
__device__ __forceinline__ void attend(T *o, float *lse, const T *q, const T *k, const T *v, int64_t kv_stride, int64_t first, int64_t last, int D, float scale)
{
    __shared__ float query[MAX_D], sums[NW][MAX_D], tops[NW], weights[NW];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int d = threadIdx.x; d < D; d += NW * 32) query[d] = to_float(q[d]);
    __syncthreads();
    float top = -CUDART_INF_F, weight = 0, sum[COLUMNS] = {};
    for (int64_t j0 = first + warp * 32; j0 <= last; j0 += NW * 32) {
        float s = j0 + lane <= last ? scale * dot_row(query, k + (j0 + lane) * kv_stride, D) : -CUDART_INF_F;
        float m = fmaxf(top, warp_reduce(s, max_op())), shrink = expf(top - m), p = expf(s - m);
        weight = weight * shrink + warp_reduce(p, add_op());
        top = m;
        #pragma unroll
        for (int c = 0; c < COLUMNS; c++) sum[c] *= shrink;
        int keys = (int)(last - j0 < 31 ? last - j0 + 1 : 32);
        for (int t = 0; t < keys; t++) {
            float pt = __shfl_sync(0xffffffffu, p, t);
            const T *vt = v + (j0 + t) * kv_stride;
            #pragma unroll
            for (int c = 0; c < COLUMNS; c++) if (lane + 32 * c < D) sum[c] += pt * to_float(vt[lane + 32 * c]);
        }
    }
    if (lane == 0) { tops[warp] = top; weights[warp] = weight; }
    #pragma unroll
    for (int c = 0; c < COLUMNS; c++) if (lane + 32 * c < D) sums[warp][lane + 32 * c] = sum[c];
    __syncthreads();
    float all = tops[0], total = 0;
    for (int w = 1; w < NW; w++) all = fmaxf(all, tops[w]);
    for (int w = 0; w < NW; w++) total += weights[w] * expf(tops[w] - all);
    for (int d = threadIdx.x; d < D; d += NW * 32) {
        float x = 0;
        for (int w = 0; w < NW; w++) x += sums[w][d] * expf(tops[w] - all);
        o[d] = from_float<T>(x / total);
    }
    if (lse && threadIdx.x == 0) *lse = all + logf(total);
}

template <typename T>
__global__ void __launch_bounds__(WARPS * 32) attention_forward_kernel(T *o, float *lse, const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v, attention_args a)
{
    int64_t i = blockIdx.x, begin, end;
    int h = blockIdx.y, kv = h / (a.Hq / a.Hkv);
    if (!document_of(i, a.doc_begin, a.n_docs, begin, end)) return;
    int64_t first = a.window && i - a.window + 1 > begin ? i - a.window + 1 : begin, at = i * a.Hq + h;
    attend<T, WARPS>(o + at * a.D, lse + at, q + at * a.D, k + kv * a.D, v + kv * a.D, (int64_t)a.Hkv * a.D, first, i, a.D, a.scale);
}

/* delta = o do of every (position, head) */
template <typename T>
__global__ void __launch_bounds__(WARPS * 32) attention_delta_kernel(float *delta, const T *__restrict__ o, const T *__restrict__ d_o, int64_t items, int D)
{
    int64_t item = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    if (item >= items) return;
    float s = 0;
    for (int d = threadIdx.x % 32; d < D; d += 32) s += to_float(o[item * D + d]) * to_float(d_o[item * D + d]);
    s = warp_reduce(s, add_op());
    if (threadIdx.x % 32 == 0) delta[item] = s;
}

template <typename T>
__global__ void __launch_bounds__(WARPS * 32) attention_query_gradient_kernel(T *dq, const T *__restrict__ d_o, const float *__restrict__ lse, const float *__restrict__ delta,
                                                                              const T *__restrict__ q, const T *__restrict__ keys_of, const T *__restrict__ values_of, attention_args a)
{
    __shared__ float query[MAX_D], dout[MAX_D], sums[WARPS][MAX_D];
    int64_t i = blockIdx.x, begin, end, width = (int64_t)a.Hkv * a.D;
    int h = blockIdx.y, kv = h / (a.Hq / a.Hkv), lane = threadIdx.x % 32, warp = threadIdx.x / 32, D = a.D;
    if (!document_of(i, a.doc_begin, a.n_docs, begin, end)) return;
    int64_t first = a.window && i - a.window + 1 > begin ? i - a.window + 1 : begin, at = i * a.Hq + h;
    const T *k = keys_of + kv * D, *v = values_of + kv * D;
    for (int d = threadIdx.x; d < D; d += WARPS * 32) {
        query[d] = to_float(q[at * D + d]);
        dout[d] = to_float(d_o[at * D + d]);
    }
    __syncthreads();
    float lse_i = lse[at], delta_i = delta[at], sum[COLUMNS] = {};
    for (int64_t j0 = first + warp * 32; j0 <= i; j0 += WARPS * 32) {
        float ds = 0;
        if (j0 + lane <= i) {
            float p = expf(a.scale * dot_row(query, k + (j0 + lane) * width, D) - lse_i);
            ds = p * (dot_row(dout, v + (j0 + lane) * width, D) - delta_i) * a.scale;
        }
        int keys = (int)(i - j0 < 31 ? i - j0 + 1 : 32);
        for (int t = 0; t < keys; t++) {
            float st = __shfl_sync(0xffffffffu, ds, t);
            const T *kt = k + (j0 + t) * width;
            #pragma unroll
            for (int c = 0; c < COLUMNS; c++) if (lane + 32 * c < D) sum[c] += st * to_float(kt[lane + 32 * c]);
        }
    }
    #pragma unroll
    for (int c = 0; c < COLUMNS; c++) if (lane + 32 * c < D) sums[warp][lane + 32 * c] = sum[c];
    __syncthreads();
    for (int d = threadIdx.x; d < D; d += WARPS * 32) {
        float x = 0;
        for (int w = 0; w < WARPS; w++) x += sums[w][d];
        dq[at * D + d] = from_float<T>(x);
    }
}

template <typename T>
__global__ void __launch_bounds__(WARPS * 32) attention_key_gradient_kernel(T *dk_out, T *dv_out, const T *__restrict__ d_o, const float *__restrict__ lse, const float *__restrict__ delta,
                                                                            const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v, attention_args a)
{
    __shared__ float key[MAX_D], value[MAX_D], sums[2][WARPS][MAX_D];
    int64_t j = blockIdx.x, begin, end;
    int kv = blockIdx.y, group = a.Hq / a.Hkv, lane = threadIdx.x % 32, warp = threadIdx.x / 32, D = a.D;
    if (!document_of(j, a.doc_begin, a.n_docs, begin, end)) return;
    int64_t last = a.window && j + a.window < end ? j + a.window - 1 : end - 1, at = (j * a.Hkv + kv) * D;
    for (int d = threadIdx.x; d < D; d += WARPS * 32) {
        key[d] = to_float(k[at + d]);
        value[d] = to_float(v[at + d]);
    }
    __syncthreads();
    float dk[COLUMNS] = {}, dv[COLUMNS] = {};
    for (int h = kv * group; h < (kv + 1) * group; h++)
        for (int64_t i0 = j + warp * 32; i0 <= last; i0 += WARPS * 32) {
            float p = 0, ds = 0;
            int64_t i = (i0 + lane) * a.Hq + h;
            if (i0 + lane <= last) {
                p = expf(a.scale * dot_row(key, q + i * D, D) - lse[i]);
                ds = p * (dot_row(value, d_o + i * D, D) - delta[i]) * a.scale;
            }
            int queries = (int)(last - i0 < 31 ? last - i0 + 1 : 32);
            for (int t = 0; t < queries; t++) {
                float pt = __shfl_sync(0xffffffffu, p, t), st = __shfl_sync(0xffffffffu, ds, t);
                const T *qt = q + ((i0 + t) * a.Hq + h) * D, *dt = d_o + ((i0 + t) * a.Hq + h) * D;
                #pragma unroll
                for (int c = 0; c < COLUMNS; c++)
                    if (lane + 32 * c < D) {
                        dk[c] += st * to_float(qt[lane + 32 * c]);
                        dv[c] += pt * to_float(dt[lane + 32 * c]);
                    }
            }
        }
    #pragma unroll
    for (int c = 0; c < COLUMNS; c++) if (lane + 32 * c < D) { sums[0][warp][lane + 32 * c] = dk[c]; sums[1][warp][lane + 32 * c] = dv[c]; }
    __syncthreads();
    for (int d = threadIdx.x; d < D; d += WARPS * 32) {
        float x = 0, y = 0;
        for (int w = 0; w < WARPS; w++) { x += sums[0][w][d]; y += sums[1][w][d]; }
        dk_out[at + d] = from_float<T>(x);
        dv_out[at + d] = from_float<T>(y);
    }
}

template <typename T>
__global__ void __launch_bounds__(CACHED_WARPS * 32) attention_cached_kernel(T *o, const T *__restrict__ k_cache, const T *__restrict__ v_cache, const T *__restrict__ q, int64_t past,
                                                                             int Hq, int Hkv, int D, float scale, int64_t window)
{
    int64_t i = blockIdx.x, last = past + i, first = window && last - window + 1 > 0 ? last - window + 1 : 0, at = (i * Hq + blockIdx.y) * D;
    int kv = blockIdx.y / (Hq / Hkv);
    attend<T, CACHED_WARPS>(o + at, NULL, q + at, k_cache + kv * D, v_cache + kv * D, (int64_t)Hkv * D, first, last, D, scale);
}

/* ---- what cuDNN's plans read beside the tensors ---- */

__global__ void __launch_bounds__(256) offsets_kernel(attention_offsets to, const int32_t *__restrict__ doc_begin, int64_t n_docs, int64_t slots)
{
    int64_t d = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (d > slots) return;
    int32_t begin = doc_begin[d < n_docs ? d : n_docs];
    if (d < slots) to.length[d] = d < n_docs ? doc_begin[d + 1] - begin : 0;
    #pragma unroll
    for (int w = 0; w < ATTENTION_WIDTHS; w++) if (w < to.widths) to.offset[w][d] = (int32_t)(begin * to.width[w]);
}

extern "C" void cuda_attention_fill_offsets(struct backend *be, const struct attention_offsets *to, const int32_t *doc_begin, int64_t n_docs, int64_t slots)
{
    offsets_kernel<<<(unsigned)div_up(slots + 1, 256), 256, 0, cuda_state_of(be)->stream>>>(*to, doc_begin, n_docs, slots);
    CUDA_CHECK(cudaGetLastError());
}

/* ---- the ops ---- */

size_t cuda_attention_scratch(struct backend *be, const struct op_limits *l)
{
    size_t plain = sizeof(float) * (size_t)l->N * (size_t)l->Hq, cudnn = be->act_dtype == DTYPE_BF16 ? cuda_attention_cudnn_scratch(l) : 0;
    return plain > cudnn ? plain : cudnn;
}

extern "C" void cuda_attention_forward(struct backend *be, act *o, float *lse, const act *q, const act *k, const act *v, const struct attention_args *a)
{
    if (!a->N || !a->n_docs) return;
    if (be->act_dtype == DTYPE_BF16 && cuda_attention_cudnn_forward(be, o, lse, q, k, v, a)) return;
    CUDA_REQUIRE(a->D <= MAX_D, "attention: heads wider than 256 are not implemented");
    DISPATCH(be->act_dtype, T, attention_forward_kernel<T><<<dim3((unsigned)a->N, (unsigned)a->Hq), WARPS * 32, 0, cuda_state_of(be)->stream>>>(
        (T *)o, lse, (const T *)q, (const T *)k, (const T *)v, *a));
    CUDA_CHECK(cudaGetLastError());
}

extern "C" void cuda_attention_backward(struct backend *be, act *dq, act *dk, act *dv, const act *d_o, const act *o, const float *lse, const act *q, const act *k, const act *v,
                                        const struct attention_args *a)
{
    if (!a->N || !a->n_docs) return;
    if (be->act_dtype == DTYPE_BF16 && cuda_attention_cudnn_backward(be, dq, dk, dv, d_o, o, lse, q, k, v, a)) return;
    CUDA_REQUIRE(a->D <= MAX_D, "attention: heads wider than 256 are not implemented");
    cudaStream_t stream = cuda_state_of(be)->stream;
    float *delta = (float *)cuda_scratch(be, sizeof(float) * (size_t)a->N * (size_t)a->Hq);
    DISPATCH(be->act_dtype, T,
        attention_delta_kernel<T><<<(unsigned)div_up(a->N * a->Hq, WARPS), WARPS * 32, 0, stream>>>(delta, (const T *)o, (const T *)d_o, a->N * a->Hq, a->D);
        attention_query_gradient_kernel<T><<<dim3((unsigned)a->N, (unsigned)a->Hq), WARPS * 32, 0, stream>>>(
            (T *)dq, (const T *)d_o, lse, delta, (const T *)q, (const T *)k, (const T *)v, *a);
        attention_key_gradient_kernel<T><<<dim3((unsigned)a->N, (unsigned)a->Hkv), WARPS * 32, 0, stream>>>(
            (T *)dk, (T *)dv, (const T *)d_o, lse, delta, (const T *)q, (const T *)k, (const T *)v, *a));
    CUDA_CHECK(cudaGetLastError());
}

extern "C" void cuda_attention_cached(struct backend *be, act *o, act *k_cache, act *v_cache, const act *q, const act *k, const act *v, int64_t n, int64_t past,
                                      int Hq, int Hkv, int D, float scale, int64_t window)
{
    if (!n) return;
    CUDA_REQUIRE(D <= MAX_D, "attention: heads wider than 256 are not implemented");
    cudaStream_t stream = cuda_state_of(be)->stream;
    DISPATCH(be->act_dtype, T,
        size_t row = sizeof(T) * (size_t)Hkv * (size_t)D;
        CUDA_CHECK(cudaMemcpyAsync((char *)k_cache + row * (size_t)past, k, row * (size_t)n, cudaMemcpyDeviceToDevice, stream));
        CUDA_CHECK(cudaMemcpyAsync((char *)v_cache + row * (size_t)past, v, row * (size_t)n, cudaMemcpyDeviceToDevice, stream));
        attention_cached_kernel<T><<<dim3((unsigned)n, (unsigned)Hq), CACHED_WARPS * 32, 0, stream>>>(
            (T *)o, (const T *)k_cache, (const T *)v_cache, (const T *)q, past, Hq, Hkv, D, scale, window));
    CUDA_CHECK(cudaGetLastError());
}
