/* Embedding (the maths is in cpu/embed.c). Forward: a gather of rows.
 * Backward without atomics and in the order of the CPU: a first kernel links every position to the next one with the same token
 * and marks the first of each chain (N^2 comparisons of integers: 0.02 ms at 8192 tokens); then the block of a first position
 * walks its chain and adds all the rows to the table's row in one read and one write. */
#include "kernels/cuda/common.cuh"

enum { LINK_THREADS = 256, ROW_THREADS = 256 };

template <typename T, int W>
__global__ void __launch_bounds__(ROW_THREADS) embed_forward_kernel(T *__restrict__ x, const int32_t *__restrict__ tokens, const T *__restrict__ table, int64_t N, int64_t C)
{
    int64_t c = ((int64_t)blockIdx.x * ROW_THREADS + threadIdx.x) * W;
    if (c >= C) return;
    for (int64_t n = blockIdx.y; n < N; n += gridDim.y) store_packed<T, W>(x + n * C + c, load_packed<T, W>(table + (int64_t)tokens[n] * C + c));
}

/* next[n]: the next position with n's token, -1 at the end; first[n]: whether no earlier one has it */
__global__ void __launch_bounds__(LINK_THREADS) embed_link_kernel(int32_t *next, int32_t *first, const int32_t *__restrict__ tokens, int N)
{
    __shared__ int32_t tile[LINK_THREADS];
    int n = blockIdx.x * LINK_THREADS + threadIdx.x, mine = n < N ? tokens[n] : -1, following = -1, is_first = 1;
    for (int begin = 0; begin < N; begin += LINK_THREADS) {
        __syncthreads();
        tile[threadIdx.x] = begin + (int)threadIdx.x < N ? tokens[begin + threadIdx.x] : -2;
        __syncthreads();
        #pragma unroll 16
        for (int i = 0; i < LINK_THREADS; i++) {
            int m = begin + i;
            if (tile[i] == mine) {
                if (m < n) is_first = 0;
                else if (m > n && following < 0) following = m;
            }
        }
    }
    if (n < N) { next[n] = following; first[n] = is_first; }
}

template <typename T, typename G, int W>
__global__ void __launch_bounds__(ROW_THREADS) embed_backward_kernel(G *dtable, const T *__restrict__ dx, const int32_t *__restrict__ tokens, const int32_t *__restrict__ next,
                                                                     const int32_t *__restrict__ first, int64_t C)
{
    int64_t n = blockIdx.x, c = ((int64_t)blockIdx.y * ROW_THREADS + threadIdx.x) * W;
    if (!first[n] || c >= C) return;
    G *row = dtable + (int64_t)tokens[n] * C + c;
    float sum[W];
    load<G, W>(sum, row);
    for (int64_t m = n; m >= 0; m = next[m]) {
        float d[W];
        load<T, W>(d, dx + m * C + c);
        #pragma unroll
        for (int i = 0; i < W; i++) sum[i] += d[i];
    }
    store<G, W>(row, sum);
}

size_t cuda_embed_scratch(struct backend *be, const struct op_limits *l) { (void)be; return 2 * sizeof(int32_t) * (size_t)l->N; }

template <int W> static dim3 grid_for(int64_t N, int64_t C) { return dim3((unsigned)div_up(div_up(C, W), ROW_THREADS), (unsigned)N); }

extern "C" void cuda_embed_forward(struct backend *be, act *x, const int32_t *tokens, const act *table, int64_t N, int64_t C)
{
    if (!N) return;
    cudaStream_t stream = cuda_state_of(be)->stream;
    bool wide = aligned16(x) && aligned16(table);
    int64_t rows = least(N, 65535);
    DISPATCH(be->act_dtype, T,
        constexpr int W = vector_width<T>();
        if (wide && C % W == 0) embed_forward_kernel<T, W><<<grid_for<W>(rows, C), ROW_THREADS, 0, stream>>>((T *)x, tokens, (const T *)table, N, C);
        else embed_forward_kernel<T, 1><<<grid_for<1>(rows, C), ROW_THREADS, 0, stream>>>((T *)x, tokens, (const T *)table, N, C));
    CUDA_CHECK(cudaGetLastError());
}

template <typename T, typename G, int W>
static void backward(struct backend *be, grad *dtable, const act *dx, const int32_t *tokens, const int32_t *next, const int32_t *first, int64_t N, int64_t C)
{
    dim3 grid((unsigned)N, (unsigned)div_up(div_up(C, W), ROW_THREADS));
    embed_backward_kernel<T, G, W><<<grid, ROW_THREADS, 0, cuda_state_of(be)->stream>>>((G *)dtable, (const T *)dx, tokens, next, first, C);
}

extern "C" void cuda_embed_backward(struct backend *be, grad *dtable, const act *dx, const int32_t *tokens, int64_t N, int64_t C, int64_t V)
{
    (void)V;
    if (!N) return;
    int32_t *next = (int32_t *)cuda_scratch(be, 2 * sizeof(int32_t) * (size_t)N), *first = next + N;
    embed_link_kernel<<<(unsigned)div_up(N, LINK_THREADS), LINK_THREADS, 0, cuda_state_of(be)->stream>>>(next, first, tokens, (int)N);
    bool wide = aligned16(dx) && aligned16(dtable);
    DISPATCH(be->act_dtype, T, DISPATCH(be->grad_dtype, G,
        constexpr int W = vector_width<T>();
        if (wide && C % W == 0) backward<T, G, W>(be, dtable, dx, tokens, next, first, N, C);
        else backward<T, G, 1>(be, dtable, dx, tokens, next, first, N, C)));
    CUDA_CHECK(cudaGetLastError());
}
