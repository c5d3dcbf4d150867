/* Sums (see cpu/reduce.c). Double, over fixed ranges whose partial sums are added in order: the same bits every time. Also the
 * second stage of weight gradients that are sums over rows, and the column sums behind bias gradients. */
#include "kernels/cuda/common.cuh"

enum { THREADS = 512, SQUARE_BLOCKS = 1024, COLUMN_ROWS = 8, PART_ROWS = 32 };

template <typename G, int W>
__global__ void __launch_bounds__(THREADS) sum_squares_kernel(double *part, const G *__restrict__ g, int64_t vectors, int64_t count)
{
    int64_t stride = (int64_t)gridDim.x * THREADS, i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    double sum = 0;
    #pragma unroll 4
    for (int64_t v = i; v < vectors; v += stride) {
        float x[W];
        load<G, W>(x, g + v * W);
        #pragma unroll
        for (int k = 0; k < W; k++) sum += (double)x[k] * x[k];
    }
    for (int64_t k = vectors * W + i; k < count; k += stride) { double x = to_float(g[k]); sum += x * x; }
    sum = block_sum(sum);
    if (threadIdx.x == 0) part[blockIdx.x] = sum;
}

template <typename X>
__global__ void __launch_bounds__(THREADS) sum_kernel(double *out, const X *__restrict__ x, int64_t count, bool add)
{
    double sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += THREADS) sum += (double)x[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *out = add ? *out + sum : sum;
}

/* block (32, PART_ROWS): 32 columns, each row of threads takes every PART_ROWS-th part */
template <typename G>
__global__ void __launch_bounds__(32 * PART_ROWS) add_partials_kernel(G *dw, const float *__restrict__ part, int parts, int64_t C)
{
    __shared__ float shared[PART_ROWS][33];
    int64_t c = (int64_t)blockIdx.x * 32 + threadIdx.x;
    float sum = 0;
    cudaGridDependencySynchronize();                        /* the partial sums are there: see the launcher */
    if (c < C) {
        #pragma unroll 9
        for (int p = threadIdx.y; p < parts; p += PART_ROWS) sum += part[p * C + c];
    }
    shared[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || c >= C) return;
    for (int y = 1; y < PART_ROWS; y++) sum += shared[y][threadIdx.x];
    dw[c] = from_float<G>(to_float(dw[c]) + sum);
}

/* block (32, COLUMN_ROWS): 32 vectors of columns, blockIdx.y a range of rows */
template <typename T, int W>
__global__ void __launch_bounds__(32 * COLUMN_ROWS) column_sums_kernel(float *part, const T *__restrict__ x, int64_t N, int64_t rows, int64_t C)
{
    __shared__ float shared[COLUMN_ROWS][32 * W + 1];
    int64_t c = ((int64_t)blockIdx.x * 32 + threadIdx.x) * W, begin = blockIdx.y * rows, end = begin + rows < N ? begin + rows : N;
    float sum[W] = {};
    if (c < C) {
        #pragma unroll 4
        for (int64_t n = begin + threadIdx.y; n < end; n += COLUMN_ROWS) {
            float v[W];
            load<T, W>(v, x + n * C + c);
            #pragma unroll
            for (int i = 0; i < W; i++) sum[i] += v[i];
        }
    }
    #pragma unroll
    for (int i = 0; i < W; i++) shared[threadIdx.y][threadIdx.x * W + i] = sum[i];
    __syncthreads();
    if (threadIdx.y || c >= C) return;
    #pragma unroll
    for (int i = 0; i < W; i++) {
        for (int y = 1; y < COLUMN_ROWS; y++) sum[i] += shared[y][threadIdx.x * W + i];
        part[blockIdx.y * C + c + i] = sum[i];
    }
}

template <typename T>
__global__ void __launch_bounds__(256) fill_rows_kernel(T *y, const T *__restrict__ row, int64_t N, int64_t O)
{
    int64_t at = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (at < N * O) y[at] = row[at % O];
}

template <typename T>
__global__ void __launch_bounds__(256) add_rows_kernel(T *y, const T *__restrict__ row, int64_t N, int64_t O)
{
    int64_t at = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (at < N * O) y[at] = from_float<T>(to_float(y[at]) + to_float(row[at % O]));
}

size_t cuda_reduce_scratch(struct backend *be, const struct op_limits *l) { (void)be; (void)l; return SQUARE_BLOCKS * sizeof(double); }

extern "C" void cuda_sum_squares(struct backend *be, double *sum, const grad *g, int64_t count)
{
    cudaStream_t stream = cuda_state_of(be)->stream;
    double *part = (double *)cuda_scratch(be, SQUARE_BLOCKS * sizeof(double));
    DISPATCH(be->grad_dtype, G,
        constexpr int W = vector_width<G>();
        int64_t vectors = aligned16(g) ? count / W : 0;
        int64_t blocks = least(div_up(count, THREADS * W) + 1, SQUARE_BLOCKS);
        sum_squares_kernel<G, W><<<(unsigned)blocks, THREADS, 0, stream>>>(part, (const G *)g, vectors, count);
        sum_kernel<double><<<1, THREADS, 0, stream>>>(sum, part, blocks, false));
    CUDA_CHECK(cudaGetLastError());
}

extern "C" void cuda_sum_rows(struct backend *be, double *sum, const float *x, int64_t count)
{
    sum_kernel<float><<<1, THREADS, 0, cuda_state_of(be)->stream>>>(sum, x, count, true);
    CUDA_CHECK(cudaGetLastError());
}

extern "C" void cuda_add_partials(struct backend *be, grad *dw, const float *part, int64_t parts, int64_t C)
{
    /* launched while the kernel that writes the parts is still running, so that the launch itself costs nothing; the kernel waits for them */
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t launch = {};
    launch.gridDim = dim3((unsigned)div_up(C, 32));
    launch.blockDim = dim3(32, PART_ROWS);
    launch.stream = cuda_state_of(be)->stream;
    launch.attrs = &early;
    launch.numAttrs = 1;
    DISPATCH(be->grad_dtype, G, CUDA_CHECK(cudaLaunchKernelEx(&launch, add_partials_kernel<G>, (G *)dw, part, (int)parts, C)));
}

/* rows per block: 64 turns of its rows of threads, or what makes at most 64 ranges */
extern "C" int64_t cuda_column_sum_rows(int64_t N) { int64_t most = div_up(N, 64), few = 64; return most > few ? most : few; }

extern "C" size_t cuda_column_sum_scratch(int64_t N, int64_t O) { return (size_t)(div_up(N, cuda_column_sum_rows(N)) * O) * sizeof(float); }

extern "C" void cuda_column_sums(struct backend *be, grad *dbias, const act *dy, int64_t N, int64_t O, float *part)
{
    cudaStream_t stream = cuda_state_of(be)->stream;
    int64_t rows = cuda_column_sum_rows(N), parts = div_up(N, rows);
    DISPATCH(be->act_dtype, T,
        constexpr int W = vector_width<T>();
        if (O % W == 0 && aligned16(dy)) column_sums_kernel<T, W><<<dim3((unsigned)div_up(O, 32 * W), (unsigned)parts), dim3(32, COLUMN_ROWS), 0, stream>>>(part, (const T *)dy, N, rows, O);
        else column_sums_kernel<T, 1><<<dim3((unsigned)div_up(O, 32), (unsigned)parts), dim3(32, COLUMN_ROWS), 0, stream>>>(part, (const T *)dy, N, rows, O));
    CUDA_CHECK(cudaGetLastError());
    cuda_add_partials(be, dbias, part, parts, O);
}

extern "C" void cuda_fill_rows(struct backend *be, act *y, const act *row, int64_t N, int64_t O)
{
    DISPATCH(be->act_dtype, T, fill_rows_kernel<T><<<(unsigned)div_up(N * O, 256), 256, 0, cuda_state_of(be)->stream>>>((T *)y, (const T *)row, N, O));
    CUDA_CHECK(cudaGetLastError());
}

extern "C" void cuda_add_rows(struct backend *be, act *y, const act *row, int64_t N, int64_t O)
{
    DISPATCH(be->act_dtype, T, add_rows_kernel<T><<<(unsigned)div_up(N * O, 256), 256, 0, cuda_state_of(be)->stream>>>((T *)y, (const T *)row, N, O));
    CUDA_CHECK(cudaGetLastError());
}
