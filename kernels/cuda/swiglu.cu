/* SwiGLU (the maths is in cpu/swiglu.c). Every tensor is read once and written once.
 *
 * In the activations' type: one vector of columns per thread.
 * Rounded to fp8, where the first byte needs the largest magnitude of the whole row: a block per row, and the row, packed as it would have been written, waits for it in shared memory.
 * Of the backward's rows at F = 18944 (76 KB) a multiprocessor has room for two there, of which one loads while the other is written; in registers, beside the loads in flight, it would by their count have room for one.
 * Bytes a row, e of an activation: forward (2 e + 1) F, backward (3 e + 2) F; 2 e F and 4 e F less than through memory. */
#include "kernels/cuda/fp8.cuh"

enum { THREADS = 256, ROW_THREADS = 512 };

__device__ __forceinline__ float sigmoid(float g, float) { return 1.0f / (1.0f + expf(-g)); }
__device__ __forceinline__ float sigmoid(float g, bf16) { return __fdividef(1.0f, 1.0f + exp2_fast(-LOG2E * g)); }      /* 2^-21: far inside bf16 */

/* h takes g's place */
template <typename T, int W> __device__ __forceinline__ void forward(float (&g)[W], const float (&u)[W])
{
    #pragma unroll
    for (int i = 0; i < W; i++) g[i] = g[i] * sigmoid(g[i], T()) * u[i];
}

template <typename T, int W> __device__ __forceinline__ void backward(float (&dg)[W], float (&du)[W], const float (&d)[W], const float (&g)[W], const float (&u)[W])
{
    #pragma unroll
    for (int i = 0; i < W; i++) {
        float s = sigmoid(g[i], T());
        dg[i] = d[i] * u[i] * s * (1.0f + g[i] * (1.0f - s));
        du[i] = d[i] * g[i] * s;
    }
}

template <typename T, int W>
__global__ void __launch_bounds__(THREADS) swiglu_forward_kernel(T *__restrict__ h, const T *__restrict__ gate_up, int64_t N, int64_t F)
{
    int64_t f = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * W, n = blockIdx.y;
    if (f >= F) return;
    for (; n < N; n += gridDim.y) {
        float g[W], u[W];
        load<T, W>(g, gate_up + n * 2 * F + f);
        load<T, W>(u, gate_up + n * 2 * F + F + f);
        forward<T, W>(g, u);
        store<T, W>(h + n * F + f, g);
    }
}

/* d_gate_up may be gate_up: a thread reads g and u before it writes dg and du in their places. */
template <typename T, int W>
__global__ void __launch_bounds__(THREADS) swiglu_backward_kernel(T *d_gate_up, const T *__restrict__ dh, const T *gate_up, int64_t N, int64_t F)
{
    int64_t f = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * W, n = blockIdx.y;
    if (f >= F) return;
    for (; n < N; n += gridDim.y) {
        float g[W], u[W], d[W], dg[W], du[W];
        load<T, W>(g, gate_up + n * 2 * F + f);
        load<T, W>(u, gate_up + n * 2 * F + F + f);
        load<T, W>(d, dh + n * F + f);
        backward<T, W>(dg, du, d, g, u);
        store<T, W>(d_gate_up + n * 2 * F + f, dg);
        store<T, W>(d_gate_up + n * 2 * F + F + f, du);
    }
}

/* ---- rounded ---- */

/* The row of K that the block's threads have put into shared memory, `most` being the largest magnitude that this one has put there, to `out`. The barrier of the maximum over
 * the block stands between their writing it and others' reading it. */
template <typename T> __device__ __forceinline__ void write_row(const struct fp8 &out, const T *row, uint32_t most, int K)
{
    constexpr int W = vector_width<T>();
    float factor = factor_of_row(out.scale + blockIdx.x, most);
    uint8_t *q = out.q + (int64_t)blockIdx.x * K;
    #pragma unroll 4
    for (int k = threadIdx.x * W; k < K; k += blockDim.x * W) store_rounded<T, W>(q + k, load_packed<T, W>(row + k), factor);
}

/* A thread asks for BATCH vectors of each input before it uses the first. */
template <typename T, int BATCH>
__global__ void __launch_bounds__(ROW_THREADS, 2) swiglu_forward_fp8_kernel(struct fp8 h8, const T *__restrict__ gate_up, int F)
{
    constexpr int W = vector_width<T>();
    const T *gate = gate_up + (int64_t)blockIdx.x * 2 * F, *up = gate + F;
    extern __shared__ __align__(16) unsigned char shared[];
    T *row = reinterpret_cast<T *>(shared);
    int step = blockDim.x * W;
    uint32_t most = 0;
    for (int begin = threadIdx.x * W; begin < F; begin += BATCH * step) {
        packed<T, W> g[BATCH], u[BATCH];
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int f = begin + b * step;
            if (f < F) {
                g[b] = load_packed<T, W>(gate + f);
                u[b] = load_packed<T, W>(up + f);
            }
        }
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int f = begin + b * step;
            if (f < F) {
                float x[W], y[W];
                unpack<T, W>(x, g[b]);
                unpack<T, W>(y, u[b]);
                forward<T, W>(x, y);
                packed<T, W> h = pack<T, W>(x);
                store_packed<T, W>(row + f, h);
                most = max(most, largest_of<T, W>(h));
            }
        }
    }
    write_row<T>(h8, row, most, F);
}

template <typename T, int BATCH>
__global__ void __launch_bounds__(ROW_THREADS, 2) swiglu_backward_fp8_kernel(struct fp8 d8, const T *__restrict__ dh, const T *__restrict__ gate_up, int F)
{
    constexpr int W = vector_width<T>();
    const T *gate = gate_up + (int64_t)blockIdx.x * 2 * F, *up = gate + F, *upstream = dh + (int64_t)blockIdx.x * F;
    extern __shared__ __align__(16) unsigned char shared[];
    T *row = reinterpret_cast<T *>(shared);
    int step = blockDim.x * W;
    uint32_t most = 0;
    for (int begin = threadIdx.x * W; begin < F; begin += BATCH * step) {
        packed<T, W> g[BATCH], u[BATCH], d[BATCH];
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int f = begin + b * step;
            if (f < F) {
                g[b] = load_packed<T, W>(gate + f);
                u[b] = load_packed<T, W>(up + f);
                d[b] = load_packed<T, W>(upstream + f);
            }
        }
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int f = begin + b * step;
            if (f < F) {
                float x[W], y[W], z[W], dg[W], du[W];
                unpack<T, W>(x, g[b]);
                unpack<T, W>(y, u[b]);
                unpack<T, W>(z, d[b]);
                backward<T, W>(dg, du, z, x, y);
                packed<T, W> left = pack<T, W>(dg), right = pack<T, W>(du);
                store_packed<T, W>(row + f, left);
                store_packed<T, W>(row + F + f, right);
                most = max(most, max(largest_of<T, W>(left), largest_of<T, W>(right)));
            }
        }
    }
    write_row<T>(d8, row, most, 2 * F);
}

/* ---- launchers ---- */

template <int W> static dim3 grid_for(int64_t N, int64_t F) { return dim3((unsigned)div_up(div_up(F, W), THREADS), (unsigned)least(N, 65535)); }

extern "C" void cuda_swiglu_forward(struct backend *be, act *h, const act *gate_up, int64_t N, int64_t F)
{
    if (!N) return;
    cudaStream_t stream = cuda_state_of(be)->stream;
    bool wide = aligned16(h) && aligned16(gate_up);
    DISPATCH(be->act_dtype, T,
        constexpr int W = vector_width<T>();
        if (wide && F % W == 0) swiglu_forward_kernel<T, W><<<grid_for<W>(N, F), THREADS, 0, stream>>>((T *)h, (const T *)gate_up, N, F);
        else swiglu_forward_kernel<T, 1><<<grid_for<1>(N, F), THREADS, 0, stream>>>((T *)h, (const T *)gate_up, N, F));
    CUDA_CHECK(cudaGetLastError());
}

extern "C" void cuda_swiglu_backward(struct backend *be, act *d_gate_up, const act *dh, const act *gate_up, int64_t N, int64_t F)
{
    if (!N) return;
    cudaStream_t stream = cuda_state_of(be)->stream;
    bool wide = aligned16(d_gate_up) && aligned16(dh) && aligned16(gate_up);
    DISPATCH(be->act_dtype, T,
        constexpr int W = vector_width<T>();
        if (wide && F % W == 0) swiglu_backward_kernel<T, W><<<grid_for<W>(N, F), THREADS, 0, stream>>>((T *)d_gate_up, (const T *)dh, (const T *)gate_up, N, F);
        else swiglu_backward_kernel<T, 1><<<grid_for<1>(N, F), THREADS, 0, stream>>>((T *)d_gate_up, (const T *)dh, (const T *)gate_up, N, F));
    CUDA_CHECK(cudaGetLastError());
}

/* Dynamic shared memory for a row of K of T, which may be more than a kernel gets unasked. */
template <typename T, typename Kernel> static size_t room_for_row(Kernel kernel, int64_t K)
{
    size_t bytes = (size_t)K * sizeof(T);
    CUDA_REQUIRE(bytes <= CUDA_FP8_WIDEST_BYTES, "swiglu: rows this wide are not implemented in fp8");
    if (bytes > 40 << 10) CUDA_CHECK(cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    return bytes;
}

template <typename T> static int row_threads(int64_t F) { return (int)least(div_up(F / vector_width<T>(), 32) * 32, ROW_THREADS); }

extern "C" void cuda_swiglu_forward_fp8(struct backend *be, const struct fp8 *h8, const act *gate_up, int64_t N, int64_t F)
{
    if (!N) return;
    require_fp8(h8, F);
    CUDA_REQUIRE(aligned16(gate_up), "swiglu: the input is not aligned to 16 bytes");
    DISPATCH(be->act_dtype, T,
        auto kernel = swiglu_forward_fp8_kernel<T, 4>;
        size_t shared = room_for_row<T>(kernel, F);
        kernel<<<(unsigned)N, row_threads<T>(F), shared, cuda_state_of(be)->stream>>>(*h8, (const T *)gate_up, (int)F));
    CUDA_CHECK(cudaGetLastError());
}

extern "C" void cuda_swiglu_backward_fp8(struct backend *be, const struct fp8 *d8, const act *dh, const act *gate_up, int64_t N, int64_t F)
{
    if (!N) return;
    require_fp8(d8, 2 * F);
    CUDA_REQUIRE(F % CUDA_FP8_MULTIPLE == 0, "swiglu: a width in fp8 is not a multiple of 16");
    CUDA_REQUIRE(aligned16(dh) && aligned16(gate_up), "swiglu: an input is not aligned to 16 bytes");
    DISPATCH(be->act_dtype, T,
        auto kernel = swiglu_backward_fp8_kernel<T, 2>;
        size_t shared = room_for_row<T>(kernel, 2 * F);
        kernel<<<(unsigned)N, row_threads<T>(F), shared, cuda_state_of(be)->stream>>>(*d8, (const T *)dh, (const T *)gate_up, (int)F));
    CUDA_CHECK(cudaGetLastError());
}
