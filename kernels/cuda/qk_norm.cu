/* q/k norm (the maths is in cpu/qk_norm.c). A group of G lanes owns a head at a time: its D values stay in registers, sums are
 * shuffles inside the group. Backward: a group walks over whole tokens, so that it keeps its part of dwq and dwk in registers; the
 * groups of a block add theirs up through shared memory and the blocks theirs through scratch, both in order. */
#include "kernels/cuda/common.cuh"

enum { THREADS = 256, MAX_D = CUDA_WIDEST_HEAD };

template <int G> __device__ __forceinline__ float group_sum(float x)
{
    #pragma unroll
    for (int s = G / 2; s; s >>= 1) x += __shfl_xor_sync(0xffffffffu, x, s);
    return x;
}

/* Groups of a warp run the same number of turns (shuffles name the whole warp); `live` says whether this turn's head exists. */
template <typename T, int W, int G, int VPT>
__global__ void __launch_bounds__(THREADS) qk_norm_forward_kernel(T *y, float *rstd, const T *__restrict__ x, const T *__restrict__ wq, const T *__restrict__ wk,
                                                                  int64_t N, int Hq, int Hkv, int D, float eps)
{
    int lane = threadIdx.x % G, heads = Hq + 2 * Hkv;
    int64_t item = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / G;
    bool live = item < N * heads;
    int h = live ? (int)(item % heads) : heads;
    float a[VPT][W] = {}, squares = 0;
    packed<T, W> raw[VPT];
    #pragma unroll
    for (int v = 0; v < VPT; v++) {
        int d = (lane + v * G) * W;
        if (live && d < D) {
            raw[v] = load_packed<T, W>(x + item * D + d);
            unpack<T, W>(a[v], raw[v]);
        }
        #pragma unroll
        for (int i = 0; i < W; i++) squares += a[v][i] * a[v][i];
    }
    float scale = 1.0f / sqrtf(group_sum<G>(squares) / (float)D + eps);
    if (!live) return;
    bool value = h >= Hq + Hkv;
    if (!value && lane == 0) rstd[item / heads * (Hq + Hkv) + h] = scale;
    const T *w = h < Hq ? wq : wk;
    #pragma unroll
    for (int v = 0; v < VPT; v++) {
        int d = (lane + v * G) * W;
        if (d < D) {
            if (!value) {
                float weight[W];
                load<T, W>(weight, w + d);
                #pragma unroll
                for (int i = 0; i < W; i++) a[v][i] = weight[i] * (a[v][i] * scale);
                raw[v] = pack<T, W>(a[v]);
            }
            store_packed<T, W>(y + item * D + d, raw[v]);
        }
    }
}

template <typename T, int W, int G, int VPT>
__global__ void __launch_bounds__(THREADS) qk_norm_backward_kernel(T *dx, float *part_q, float *part_k, const T *dy, const T *__restrict__ x, const T *__restrict__ wq,
                                                                   const T *__restrict__ wk, const float *__restrict__ rstd, int64_t N, int Hq, int Hkv, int D)
{
    constexpr int GROUPS = THREADS / G;
    __shared__ float shared[2][GROUPS * G * VPT * W];
    int lane = threadIdx.x % G, group = threadIdx.x / G, heads = Hq + Hkv;
    int64_t width = (int64_t)(Hq + 2 * Hkv) * D;
    float dw[2][VPT][W] = {}, weight[2][VPT][W] = {};
    #pragma unroll
    for (int v = 0; v < VPT; v++) {
        int d = (lane + v * G) * W;
        if (d < D) {
            load<T, W>(weight[0][v], wq + d);
            load<T, W>(weight[1][v], wk + d);
        }
    }
    int64_t stride = (int64_t)gridDim.x * GROUPS;
    for (int64_t first = (int64_t)blockIdx.x * GROUPS; first < N; first += stride) {      /* the same turns for every group of the block */
        int64_t n = first + group;
        bool live = n < N;
        #pragma unroll
        for (int kind = 0; kind < 2; kind++) {
            for (int h = kind ? Hq : 0; h < (kind ? heads : Hq); h++) {
                int64_t at = n * width + (int64_t)h * D;
                float dv[VPT][W] = {}, xv[VPT][W] = {}, dot = 0, scale = live ? rstd[n * heads + h] : 0;
                #pragma unroll
                for (int v = 0; v < VPT; v++) {
                    int d = (lane + v * G) * W;
                    if (live && d < D) {
                        load<T, W>(dv[v], dy + at + d);
                        load<T, W>(xv[v], x + at + d);
                    }
                    #pragma unroll
                    for (int i = 0; i < W; i++) {
                        dot += weight[kind][v][i] * dv[v][i] * xv[v][i];
                        dw[kind][v][i] += dv[v][i] * (xv[v][i] * scale);
                    }
                }
                float k = group_sum<G>(dot) / (float)D * scale * scale;
                #pragma unroll
                for (int v = 0; v < VPT; v++) {
                    int d = (lane + v * G) * W;
                    if (live && d < D) {
                        #pragma unroll
                        for (int i = 0; i < W; i++) dv[v][i] = scale * (weight[kind][v][i] * dv[v][i] - xv[v][i] * k);
                        store<T, W>(dx + at + d, dv[v]);
                    }
                }
            }
        }
        if (dx != dy && live)
            for (int64_t d = (int64_t)lane * W; d < (int64_t)Hkv * D; d += G * W) {
                int64_t at = n * width + (int64_t)heads * D + d;
                store_packed<T, W>(dx + at, load_packed<T, W>(dy + at));
            }
    }
    #pragma unroll
    for (int kind = 0; kind < 2; kind++) {
        #pragma unroll
        for (int v = 0; v < VPT; v++) {
            #pragma unroll
            for (int i = 0; i < W; i++) shared[kind][(group * VPT + v) * G * W + lane * W + i] = dw[kind][v][i];
        }
    }
    __syncthreads();
    for (int d = threadIdx.x; d < 2 * D; d += THREADS) {
        int kind = d >= D, c = d - kind * D;
        float s = 0;
        for (int g = 0; g < GROUPS; g++) s += shared[kind][g * VPT * G * W + c];      /* column c lies at v * G * W + lane * W + i = c */
        (kind ? part_k : part_q)[(int64_t)blockIdx.x * D + c] = s;
    }
}

static int64_t backward_blocks(struct cuda_state *s, int64_t N, int groups) { return least(div_up(N, groups), (int64_t)s->sms * 4); }

size_t cuda_qk_norm_scratch(struct backend *be, const struct op_limits *l)
{
    return (size_t)cuda_state_of(be)->sms * 4 * 2 * sizeof(float) * (size_t)l->D;
}

template <typename T, int W, int G, int VPT>
static void forward(struct backend *be, act *y, float *rstd, const act *x, const act *wq, const act *wk, int64_t N, int Hq, int Hkv, int D, float eps)
{
    qk_norm_forward_kernel<T, W, G, VPT><<<(unsigned)div_up(N * (Hq + 2 * Hkv), THREADS / G), THREADS, 0, cuda_state_of(be)->stream>>>(
        (T *)y, rstd, (const T *)x, (const T *)wq, (const T *)wk, N, Hq, Hkv, D, eps);
    CUDA_CHECK(cudaGetLastError());
}

template <typename T, int W, int G, int VPT>
static void backward(struct backend *be, act *dx, grad *dwq, grad *dwk, const act *dy, const act *x, const act *wq, const act *wk, const float *rstd, int64_t N, int Hq, int Hkv, int D)
{
    struct cuda_state *s = cuda_state_of(be);
    int64_t blocks = backward_blocks(s, N, THREADS / G);
    float *part_q = (float *)cuda_scratch(be, (size_t)(2 * blocks * D) * sizeof(float)), *part_k = part_q + blocks * D;
    qk_norm_backward_kernel<T, W, G, VPT><<<(unsigned)blocks, THREADS, 0, s->stream>>>((T *)dx, part_q, part_k, (const T *)dy, (const T *)x, (const T *)wq, (const T *)wk, rstd, N, Hq, Hkv, D);
    CUDA_CHECK(cudaGetLastError());
    cuda_add_partials(be, dwq, part_q, blocks, D);
    cuda_add_partials(be, dwk, part_k, blocks, D);
}

/* lanes per head: enough that a lane holds one vector, up to a warp */
#define BY_WIDTH(T, fn, ...) do { \
        constexpr int W = vector_width<T>(); \
        if (!wide || D % W) fn<T, 1, 32, 8>(__VA_ARGS__); \
        else if (D <= 8 * W) fn<T, W, 8, 1>(__VA_ARGS__); \
        else if (D <= 16 * W) fn<T, W, 16, 1>(__VA_ARGS__); \
        else if (D <= 32 * W) fn<T, W, 32, 1>(__VA_ARGS__); \
        else fn<T, W, 32, 2>(__VA_ARGS__); \
    } while (0)

extern "C" void cuda_qk_norm_forward(struct backend *be, act *y, float *rstd, const act *x, const act *wq, const act *wk, int64_t N, int Hq, int Hkv, int D, float eps)
{
    if (!N) return;
    CUDA_REQUIRE(D <= MAX_D, "qk_norm: heads wider than 256 are not implemented");
    bool wide = aligned16(y) && aligned16(x) && aligned16(wq) && aligned16(wk);
    DISPATCH(be->act_dtype, T, BY_WIDTH(T, forward, be, y, rstd, x, wq, wk, N, Hq, Hkv, D, eps));
}

extern "C" void cuda_qk_norm_backward(struct backend *be, act *dx, grad *dwq, grad *dwk, const act *dy, const act *x, const act *wq, const act *wk, const float *rstd,
                                      int64_t N, int Hq, int Hkv, int D)
{
    if (!N) return;
    CUDA_REQUIRE(D <= MAX_D, "qk_norm: heads wider than 256 are not implemented");
    bool wide = aligned16(dx) && aligned16(dy) && aligned16(x) && aligned16(wq) && aligned16(wk);
    DISPATCH(be->act_dtype, T, BY_WIDTH(T, backward, be, dx, dwq, dwk, dy, x, wq, wk, rstd, N, Hq, Hkv, D));
}
