/* RMSNorm with the residual join (the maths is in cpu/rmsnorm.c). Memory-bound: every tensor is read once and written once.
 *
 * Forward: a block per row, the row in registers between the sum of squares and the scaling. s is rounded to the storage type
 * before anything is computed from it, so that a recomputation from the stored s gives the same bits. In fp8 y takes s's place in the registers until its largest magnitude is
 * known: x, r -> s and a byte each, (3 e + 1) C bytes a row, e + 1 without r and s; y itself, 2 e C bytes written and read again by quantize, never exists.
 * Backward: persistent blocks walk over rows with the next rows' loads in flight; every thread owns columns and keeps their part
 * of dw in registers, written once per block to scratch and added up in block order. Where registers hold one row ahead, too little is
 * in flight to fill the memory system, so rows of 16-byte vectors come through a ring in shared memory, asynchronously; each thread
 * reads what it asked for itself, so the ring needs no barrier. Rounded to fp8 as well, dx waits in registers for its largest magnitude, which the block finds together with the next
 * row's sum: one barrier a row as without; a byte more, where quantize would read e and write one. */
#include "kernels/cuda/fp8.cuh"

enum { FORWARD_THREADS = 1024, BACKWARD_THREADS = 512 };   /* 64 and 128 registers */
static_assert(4 * FORWARD_THREADS == CUDA_WIDEST_NORM && 8 * BACKWARD_THREADS == CUDA_WIDEST_NORM, "the most vectors of a thread");

/* ROUND: y goes to y8 alone */
template <typename T, int W, int VPT, bool ROUND>
__global__ void __launch_bounds__(FORWARD_THREADS) rmsnorm_forward_kernel(T *y, struct fp8 y8, float *rstd, T *sum, const T *x, const T *r, const T *__restrict__ w, int C, float eps)
{
    int64_t base = (int64_t)blockIdx.x * C;
    packed<T, W> s[VPT];
    float squares = 0;
    #pragma unroll
    for (int v = 0; v < VPT; v++) {
        int c = (threadIdx.x + v * blockDim.x) * W;
        if (c < C) s[v] = load_packed<T, W>(x + base + c);
    }
    if (r) {
        packed<T, W> rv[VPT];
        #pragma unroll
        for (int v = 0; v < VPT; v++) {
            int c = (threadIdx.x + v * blockDim.x) * W;
            if (c < C) rv[v] = load_packed<T, W>(r + base + c);
        }
        #pragma unroll
        for (int v = 0; v < VPT; v++) {
            int c = (threadIdx.x + v * blockDim.x) * W;
            if (c < C) {
                float a[W], b[W];
                unpack<T, W>(a, s[v]);
                unpack<T, W>(b, rv[v]);
                #pragma unroll
                for (int i = 0; i < W; i++) a[i] += b[i];
                s[v] = pack<T, W>(a);
            }
        }
    }
    #pragma unroll
    for (int v = 0; v < VPT; v++) {
        int c = (threadIdx.x + v * blockDim.x) * W;
        if (c < C) {
            float a[W];
            unpack<T, W>(a, s[v]);
            #pragma unroll
            for (int i = 0; i < W; i++) squares += a[i] * a[i];
            if (sum) store_packed<T, W>(sum + base + c, s[v]);
        }
    }
    float scale = 1.0f / sqrtf(block_sum(squares) / (float)C + eps);
    uint32_t most = 0;
    if (threadIdx.x == 0) rstd[blockIdx.x] = scale;
    #pragma unroll
    for (int v = 0; v < VPT; v++) {
        int c = (threadIdx.x + v * blockDim.x) * W;
        if (c < C) {
            float a[W], weight[W];
            unpack<T, W>(a, s[v]);
            load<T, W>(weight, w + c);
            #pragma unroll
            for (int i = 0; i < W; i++) a[i] = weight[i] * (a[i] * scale);
            if constexpr (ROUND) {
                s[v] = pack<T, W>(a);
                most = max(most, largest_of<T, W>(s[v]));
            } else store<T, W>(y + base + c, a);
        }
    }
    if constexpr (ROUND) {
        float factor = factor_of_row(y8.scale + blockIdx.x, most);
        #pragma unroll
        for (int v = 0; v < VPT; v++) {
            int c = (threadIdx.x + v * blockDim.x) * W;
            if (c < C) store_rounded<T, W>(y8.q + base + c, s[v], factor);
        }
    }
}

template <typename T, int W, int VPT> struct norm_row { packed<T, W> dy[VPT], x[VPT], dres[VPT]; float rstd; };

template <typename T, int W, int VPT>
__device__ __forceinline__ void load_row(norm_row<T, W, VPT> &row, const T *dy, const T *x, const T *dres, const float *rstd, int64_t n, int C)
{
    row.rstd = rstd[n];
    #pragma unroll
    for (int v = 0; v < VPT; v++) {
        int c = (threadIdx.x + v * blockDim.x) * W;
        if (c < C) {
            row.dy[v] = load_packed<T, W>(dy + n * C + c);
            row.x[v] = load_packed<T, W>(x + n * C + c);
            if (dres) row.dres[v] = load_packed<T, W>(dres + n * C + c);
        }
    }
}

__device__ __forceinline__ void copy_16_async(void *shared, const void *global)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"((unsigned)__cvta_generic_to_shared(shared)), "l"(global));
}
__device__ __forceinline__ void close_group() { asm volatile("cp.async.commit_group;"); }
template <int N> __device__ __forceinline__ void wait_for_all_but() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }

/* dx may be dy or dres: a thread has read its columns of a row before it writes them, and nobody else reads them. RING: rows in flight, 0: one, in registers. ROUND: dx goes to dx8, too. */
template <typename T, int W, int VPT, int RING, bool ROUND>
__global__ void __launch_bounds__(BACKWARD_THREADS) rmsnorm_backward_kernel(T *dx, struct fp8 dx8, float *part, const T *dres, const T *dy, const T *x, const T *__restrict__ w, const float *rstd,
                                                                       int64_t N, int C)
{
    __shared__ float sums[2][32];
    __shared__ uint32_t tops[2][32];
    float dw[VPT][W] = {};
    packed<T, W> weights[VPT];
    #pragma unroll
    for (int v = 0; v < VPT; v++) {
        int c = (threadIdx.x + v * blockDim.x) * W;
        if (c < C) weights[v] = load_packed<T, W>(w + c);
    }
    norm_row<T, W, VPT> row, next;
    packed<T, W> waiting[VPT];                              /* ROUND: dx of the row before, */
    uint32_t most = 0;                                      /* and the largest of it that this thread has */
    int turn = 0, place = 0;
    auto round_waiting = [&](int64_t n, uint32_t top) {
        float s = e4m3_scale(__uint_as_float(top)), factor = inverse_of(s);
        if (threadIdx.x == 0) dx8.scale[n] = s;
        #pragma unroll
        for (int v = 0; v < VPT; v++) {
            int c = (threadIdx.x + v * blockDim.x) * W;
            if (c < C) store_rounded<T, W>(dx8.q + n * C + c, waiting[v], factor);
        }
    };
    extern __shared__ __align__(16) unsigned char ring[];
    auto slot = [&](int stage, int tensor, int v) { return reinterpret_cast<T *>(ring + ((size_t)((stage * 3 + tensor) * VPT + v) * blockDim.x + threadIdx.x) * 16); };
    auto ask = [&](int64_t n, int stage) {
        #pragma unroll
        for (int v = 0; v < VPT; v++) {
            int c = (threadIdx.x + v * blockDim.x) * W;
            if (n >= N || c >= C) continue;
            copy_16_async(slot(stage, 0, v), dy + n * C + c);
            copy_16_async(slot(stage, 1, v), x + n * C + c);
            if (dres) copy_16_async(slot(stage, 2, v), dres + n * C + c);
        }
        close_group();                                      /* an empty one too: they are counted */
    };
    if constexpr (RING) {
        for (int i = 0; i < RING - 1; i++) ask(blockIdx.x + (int64_t)i * gridDim.x, i);
        next.rstd = rstd[blockIdx.x];
    } else load_row<T, W, VPT>(next, dy, x, dres, rstd, blockIdx.x, C);
    int64_t n = blockIdx.x;
    for (; n < N; n += gridDim.x) {
        if constexpr (RING) {
            ask(n + (int64_t)(RING - 1) * gridDim.x, (place + RING - 1) % RING);
            wait_for_all_but<RING - 1>();
            row.rstd = next.rstd;
            if (n + gridDim.x < N) next.rstd = rstd[n + gridDim.x];
            #pragma unroll
            for (int v = 0; v < VPT; v++) {
                row.dy[v] = load_packed<T, W>(slot(place, 0, v));
                row.x[v] = load_packed<T, W>(slot(place, 1, v));
                row.dres[v] = load_packed<T, W>(slot(place, 2, v));
            }
            place = (place + 1) % RING;
        } else {
            row = next;
            if (n + gridDim.x < N) load_row<T, W, VPT>(next, dy, x, dres, rstd, n + gridDim.x, C);
        }
        float dot = 0;
        #pragma unroll
        for (int v = 0; v < VPT; v++) {
            int c = (threadIdx.x + v * blockDim.x) * W;
            if (c < C) {
                float d[W], xv[W], weight[W];
                unpack<T, W>(d, row.dy[v]);
                unpack<T, W>(xv, row.x[v]);
                unpack<T, W>(weight, weights[v]);
                #pragma unroll
                for (int i = 0; i < W; i++) {
                    dot += weight[i] * d[i] * xv[i];
                    dw[v][i] += d[i] * (xv[i] * row.rstd);
                }
            }
        }
        /* two buffers in turn: a barrier per row is enough */
        if constexpr (ROUND) {
            block_reduce_two_into(dot, add_op(), sums[turn], most, max_op(), tops[turn]);
            if (n != blockIdx.x) round_waiting(n - gridDim.x, most);
            most = 0;
        } else dot = block_reduce_into(dot, 0.0f, add_op(), sums[turn]);
        turn ^= 1;
        float k = dot / (float)C * row.rstd * row.rstd;
        #pragma unroll
        for (int v = 0; v < VPT; v++) {
            int c = (threadIdx.x + v * blockDim.x) * W;
            if (c < C) {
                float d[W], xv[W], weight[W], g[W] = {};
                unpack<T, W>(d, row.dy[v]);
                unpack<T, W>(xv, row.x[v]);
                unpack<T, W>(weight, weights[v]);
                if (dres) unpack<T, W>(g, row.dres[v]);
                #pragma unroll
                for (int i = 0; i < W; i++) g[i] += row.rstd * (weight[i] * d[i] - xv[i] * k);
                packed<T, W> out = pack<T, W>(g);
                store_packed<T, W>(dx + n * C + c, out);
                if constexpr (ROUND) {
                    waiting[v] = out;
                    most = max(most, largest_of<T, W>(out));
                }
            }
        }
    }
    if constexpr (ROUND) round_waiting(n - gridDim.x, block_reduce_into(most, 0u, max_op(), tops[turn]));
    #pragma unroll
    for (int v = 0; v < VPT; v++) {
        int c = (threadIdx.x + v * blockDim.x) * W;
        if (c < C) {
            #pragma unroll
            for (int i = 0; i < W; i++) part[(int64_t)blockIdx.x * C + c + i] = dw[v][i];
        }
    }
}

static int threads_for(int64_t vectors, int per_thread) { return (int)div_up(div_up(vectors, per_thread), 32) * 32; }

/* Enough blocks for 1024 threads on every multiprocessor: more would only add partial sums. */
static int64_t backward_blocks(struct cuda_state *s, int64_t N, int threads) { return least(N, (int64_t)s->sms * (1024 / threads)); }

size_t cuda_rmsnorm_scratch(struct backend *be, const struct op_limits *l)
{
    /* backward_blocks * C: blocks of t threads own at most 8 t columns with one vector each; with more, t > 256 */
    return (size_t)cuda_state_of(be)->sms * (size_t)(4 * l->C < 8192 ? 8192 : 4 * l->C) * sizeof(float);
}

/* where y goes: y8 NULL: to y */
struct norm_output { act *y; const struct fp8 *y8; };

template <typename T, int W, int VPT, bool ROUND>
static void launch_forward(struct backend *be, struct norm_output out, float *rstd, act *sum, const act *x, const act *r, const act *w, int64_t N, int64_t C, float eps)
{
    rmsnorm_forward_kernel<T, W, VPT, ROUND><<<(unsigned)N, threads_for(div_up(C, W), VPT), 0, cuda_state_of(be)->stream>>>(
        (T *)out.y, out.y8 ? *out.y8 : (struct fp8){NULL, NULL}, rstd, (T *)sum, (const T *)x, (const T *)r, (const T *)w, (int)C, eps);
}

template <typename T, int W, int VPT, bool ROUND>
static void launch_backward(struct backend *be, act *dx, const struct fp8 *dx8, grad *dw, const act *dres, const act *dy, const act *x, const act *w, const float *rstd, int64_t N, int64_t C)
{
    struct cuda_state *s = cuda_state_of(be);
    int threads = threads_for(div_up(C, W), VPT);
    int64_t blocks = backward_blocks(s, N, threads);
    float *part = (float *)cuda_scratch(be, (size_t)(blocks * C) * sizeof(float));
    constexpr int RING = W * sizeof(T) != 16 || VPT > 2 ? 0 : VPT == 1 ? 4 : 2;      /* two blocks' rings fit a multiprocessor */
    auto kernel = rmsnorm_backward_kernel<T, W, VPT, RING, ROUND>;
    size_t ring = (size_t)RING * 3 * VPT * (size_t)threads * 16;
    if (ring > 40 << 10) CUDA_CHECK(cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)ring));
    kernel<<<(unsigned)blocks, threads, ring, s->stream>>>((T *)dx, dx8 ? *dx8 : (struct fp8){NULL, NULL}, part, (const T *)dres, (const T *)dy, (const T *)x, (const T *)w, rstd, N, (int)C);
    CUDA_CHECK(cudaGetLastError());
    cuda_add_partials(be, dw, part, blocks, C);
}

/* Vectors per thread: as few as leave a block's threads enough registers. */
template <typename T, int W, bool ROUND>
static void forward(struct backend *be, struct norm_output out, float *rstd, act *sum, const act *x, const act *r, const act *w, int64_t N, int64_t C, float eps)
{
    int64_t vectors = div_up(C, W);
    CUDA_REQUIRE(vectors <= 4 * FORWARD_THREADS, "rmsnorm: rows this wide are not implemented");
    if (vectors <= 256) launch_forward<T, W, 1, ROUND>(be, out, rstd, sum, x, r, w, N, C, eps);
    else if (vectors <= 1024) launch_forward<T, W, 2, ROUND>(be, out, rstd, sum, x, r, w, N, C, eps);
    else launch_forward<T, W, 4, ROUND>(be, out, rstd, sum, x, r, w, N, C, eps);
    CUDA_CHECK(cudaGetLastError());
}

template <typename T, int W, bool ROUND>
static void backward(struct backend *be, act *dx, const struct fp8 *dx8, grad *dw, const act *dres, const act *dy, const act *x, const act *w, const float *rstd, int64_t N, int64_t C)
{
    int64_t vectors = div_up(C, W);
    CUDA_REQUIRE(vectors <= 8 * BACKWARD_THREADS, "rmsnorm: rows this wide are not implemented");
    if (vectors <= BACKWARD_THREADS) launch_backward<T, W, 1, ROUND>(be, dx, dx8, dw, dres, dy, x, w, rstd, N, C);
    else if (vectors <= 2 * BACKWARD_THREADS) launch_backward<T, W, 2, ROUND>(be, dx, dx8, dw, dres, dy, x, w, rstd, N, C);
    else if (vectors <= 4 * BACKWARD_THREADS) launch_backward<T, W, 4, ROUND>(be, dx, dx8, dw, dres, dy, x, w, rstd, N, C);
    else launch_backward<T, W, 8, ROUND>(be, dx, dx8, dw, dres, dy, x, w, rstd, N, C);
}

extern "C" void cuda_rmsnorm_forward(struct backend *be, act *y, float *rstd, act *sum, const act *x, const act *r, const act *w, int64_t N, int64_t C, float eps)
{
    if (!N) return;
    bool wide = aligned16(y) && aligned16(x) && aligned16(w) && aligned16(r) && aligned16(sum);      /* NULL is aligned */
    DISPATCH(be->act_dtype, T,
        if (wide && C % vector_width<T>() == 0) forward<T, vector_width<T>(), false>(be, norm_output{y, NULL}, rstd, sum, x, r, w, N, C, eps);
        else forward<T, 1, false>(be, norm_output{y, NULL}, rstd, sum, x, r, w, N, C, eps));
}

extern "C" void cuda_rmsnorm_forward_fp8(struct backend *be, const struct fp8 *y8, float *rstd, act *sum, const act *x, const act *r, const act *w, int64_t N, int64_t C, float eps)
{
    if (!N) return;
    require_fp8(y8, C);
    CUDA_REQUIRE(aligned16(x) && aligned16(w) && aligned16(r) && aligned16(sum), "rmsnorm: an input is not aligned to 16 bytes");
    DISPATCH(be->act_dtype, T, forward<T, vector_width<T>(), true>(be, norm_output{NULL, y8}, rstd, sum, x, r, w, N, C, eps));
}

extern "C" void cuda_rmsnorm_backward(struct backend *be, act *dx, grad *dw, const act *dres, const act *dy, const act *x, const act *w, const float *rstd, int64_t N, int64_t C)
{
    if (!N) return;
    bool wide = aligned16(dx) && aligned16(dy) && aligned16(x) && aligned16(w) && aligned16(dres);
    DISPATCH(be->act_dtype, T,
        if (wide && C % vector_width<T>() == 0) backward<T, vector_width<T>(), false>(be, dx, NULL, dw, dres, dy, x, w, rstd, N, C);
        else backward<T, 1, false>(be, dx, NULL, dw, dres, dy, x, w, rstd, N, C));
}

extern "C" void cuda_rmsnorm_backward_fp8(struct backend *be, act *dx, const struct fp8 *dx8, grad *dw, const act *dres, const act *dy, const act *x, const act *w, const float *rstd, int64_t N, int64_t C)
{
    if (!N) return;
    require_fp8(dx8, C);
    CUDA_REQUIRE(aligned16(dx) && aligned16(dy) && aligned16(x) && aligned16(w) && aligned16(dres), "rmsnorm: an input is not aligned to 16 bytes");
    DISPATCH(be->act_dtype, T, backward<T, vector_width<T>(), true>(be, dx, dx8, dw, dres, dy, x, w, rstd, N, C));
}
