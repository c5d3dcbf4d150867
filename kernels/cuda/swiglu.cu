/* SwiGLU (the maths is in cpu/swiglu.c): one vector of columns per thread, every tensor read and written once. */
#include "kernels/cuda/common.cuh"

enum { THREADS = 256 };

__device__ __forceinline__ float sigmoid(float g, float) { return 1.0f / (1.0f + expf(-g)); }
__device__ __forceinline__ float sigmoid(float g, bf16) { return __fdividef(1.0f, 1.0f + exp2_fast(-LOG2E * g)); }      /* 2^-21: far inside bf16 */

template <typename T, int W>
__global__ void __launch_bounds__(THREADS) swiglu_forward_kernel(T *__restrict__ h, const T *__restrict__ gate_up, int64_t N, int64_t F)
{
    int64_t f = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * W, n = blockIdx.y;
    if (f >= F) return;
    for (; n < N; n += gridDim.y) {
        float g[W], u[W];
        load<T, W>(g, gate_up + n * 2 * F + f);
        load<T, W>(u, gate_up + n * 2 * F + F + f);
        #pragma unroll
        for (int i = 0; i < W; i++) g[i] = g[i] * sigmoid(g[i], T()) * u[i];
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
        #pragma unroll
        for (int i = 0; i < W; i++) {
            float s = sigmoid(g[i], T());
            dg[i] = d[i] * u[i] * s * (1.0f + g[i] * (1.0f - s));
            du[i] = d[i] * g[i] * s;
        }
        store<T, W>(d_gate_up + n * 2 * F + f, dg);
        store<T, W>(d_gate_up + n * 2 * F + F + f, du);
    }
}

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
