/* Rotary position embedding on the way from fused rows to planes and back (the maths is in cpu/rope.c). A thread takes W pairs of one
 * token through up to HEADS heads, all asked for before the first is turned, so that the table is read once for all of them; value heads pass unchanged.
 * Backward into fp8, a block per token, whose row waits in registers for its largest magnitude: e + 1 bytes an element, where they are 3 e + 1 with dqkv written and read again. */
#include "kernels/cuda/fp8.cuh"

enum { THREADS = 256, HEADS = 4, ROW_THREADS = 512 };

struct rope_shape { int Hq, Hkv, D, chunks; };

/* W pairs by their angles, or, BACKWARD, by the transpose of the rotation */
template <typename T, int W, bool BACKWARD> __device__ __forceinline__ void turn(packed<T, W> &lower, packed<T, W> &upper, const float (&c)[W], const float (&sn)[W])
{
    float a[W], b[W];
    unpack<T, W>(a, lower);
    unpack<T, W>(b, upper);
    #pragma unroll
    for (int w = 0; w < W; w++) {
        float angle = BACKWARD ? -sn[w] : sn[w], turned = a[w] * c[w] - b[w] * angle;
        b[w] = b[w] * c[w] + a[w] * angle;
        a[w] = turned;
    }
    lower = pack<T, W>(a);
    upper = pack<T, W>(b);
}

/* BACKWARD: planes -> fused, with the transpose of the rotation */
template <typename T, int W, bool BACKWARD>
__global__ void __launch_bounds__(THREADS, 4) rope_kernel(T *__restrict__ fused, T *__restrict__ q, T *__restrict__ k, T *__restrict__ v, const float *__restrict__ cos,
                                                       const float *__restrict__ sin, const int32_t *__restrict__ position, int64_t N, rope_shape s)
{
    int half = s.D / 2, vectors = half / W, heads = s.Hq + 2 * s.Hkv;
    int64_t item = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    int i = (int)(item % vectors) * W, first = (int)(item / vectors % s.chunks) * HEADS;
    int64_t n = item / vectors / s.chunks;
    if (n >= N) return;
    T *row = fused + n * heads * s.D + i, *q_row = q + n * s.Hq * s.D + i, *k_row = k + n * s.Hkv * s.D + i, *v_row = v + n * s.Hkv * s.D + i;
    auto plane = [&](int h) { return h < s.Hq ? q_row + h * s.D : h < s.Hq + s.Hkv ? k_row + (h - s.Hq) * s.D : v_row + (h - s.Hq - s.Hkv) * s.D; };
    packed<T, W> lower[HEADS], upper[HEADS];
    #pragma unroll
    for (int j = 0; j < HEADS; j++) {
        if (first + j >= heads) break;
        const T *from = BACKWARD ? plane(first + j) : row + (first + j) * s.D;
        lower[j] = load_packed<T, W>(from);
        upper[j] = load_packed<T, W>(from + half);
    }
    /* asked for after the heads: its address waits for the position */
    float c[W], sn[W];
    int64_t at = (int64_t)position[n] * half + i;
    load<float, W>(c, cos + at);
    load<float, W>(sn, sin + at);
    #pragma unroll
    for (int j = 0; j < HEADS; j++) {
        int h = first + j;
        if (h >= heads) break;
        if (h < s.Hq + s.Hkv) turn<T, W, BACKWARD>(lower[j], upper[j], c, sn);
        T *to = BACKWARD ? row + h * s.D : plane(h);
        store_packed<T, W>(to, lower[j]);
        store_packed<T, W>(to + half, upper[j]);
    }
}

/* planes -> fused, rounded. A thread has the same pairs of up to OWN heads, every `groups`-th, so that it reads the table once; threads beyond vectors x groups only help to find the maximum. */
template <typename T, int W, int OWN>
__global__ void __launch_bounds__(ROW_THREADS) rope_backward_fp8_kernel(struct fp8 d8, const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v, const float *__restrict__ cos,
                                                                      const float *__restrict__ sin, const int32_t *__restrict__ position, rope_shape s, int groups)
{
    __shared__ uint32_t shared[32];
    int half = s.D / 2, vectors = half / W, heads = s.Hq + 2 * s.Hkv, i = threadIdx.x % vectors * W, group = threadIdx.x / vectors, end = group < groups ? heads : 0;
    int64_t n = blockIdx.x, table = (int64_t)position[n] * half + i;
    const T *q_row = q + n * s.Hq * s.D + i, *k_row = k + n * s.Hkv * s.D + i, *v_row = v + n * s.Hkv * s.D + i;
    packed<T, W> lower[OWN], upper[OWN];
    uint32_t most = 0;
    #pragma unroll
    for (int j = 0; j < OWN; j++) {
        int h = group + j * groups;
        if (h >= end) break;
        const T *from = h < s.Hq ? q_row + h * s.D : h < s.Hq + s.Hkv ? k_row + (h - s.Hq) * s.D : v_row + (h - s.Hq - s.Hkv) * s.D;
        lower[j] = load_packed<T, W>(from);
        upper[j] = load_packed<T, W>(from + half);
    }
    float c[W], sn[W];
    load<float, W>(c, cos + table);
    load<float, W>(sn, sin + table);
    #pragma unroll
    for (int j = 0; j < OWN; j++) {
        int h = group + j * groups;
        if (h >= end) break;
        if (h < s.Hq + s.Hkv) turn<T, W, true>(lower[j], upper[j], c, sn);
        most = max(most, max(largest_of<T, W>(lower[j]), largest_of<T, W>(upper[j])));
    }
    float scale = e4m3_scale(__uint_as_float(block_reduce_into(most, 0u, max_op(), shared))), factor = inverse_of(scale);
    if (threadIdx.x == 0) d8.scale[n] = scale;
    #pragma unroll
    for (int j = 0; j < OWN; j++) {
        int h = group + j * groups;
        if (h >= end) break;
        uint8_t *to = d8.q + (n * heads + h) * s.D + i;
        store_rounded<T, W>(to, lower[j], factor);
        store_rounded<T, W>(to + half, upper[j], factor);
    }
}

template <bool BACKWARD>
static void rope(struct backend *be, act *fused, act *q, act *k, act *v, const float *cos, const float *sin, const int32_t *position, int64_t N, int Hq, int Hkv, int D)
{
    if (!N || D < 2) return;
    cudaStream_t stream = cuda_state_of(be)->stream;
    rope_shape s = {Hq, Hkv, D, (int)div_up(Hq + 2 * Hkv, HEADS)};
    bool wide = aligned16(fused) && aligned16(q) && aligned16(k) && aligned16(v) && aligned16(cos) && aligned16(sin);
    DISPATCH(be->act_dtype, T,
        constexpr int W = vector_width<T>();
        unsigned blocks = (unsigned)div_up(N * s.chunks * (D / 2), THREADS);
        unsigned wide_blocks = (unsigned)div_up(N * s.chunks * (D / 2 / W), THREADS);
        if (wide && D % (2 * W) == 0) rope_kernel<T, W, BACKWARD><<<wide_blocks, THREADS, 0, stream>>>((T *)fused, (T *)q, (T *)k, (T *)v, cos, sin, position, N, s);
        else rope_kernel<T, 1, BACKWARD><<<blocks, THREADS, 0, stream>>>((T *)fused, (T *)q, (T *)k, (T *)v, cos, sin, position, N, s));
    CUDA_CHECK(cudaGetLastError());
}

extern "C" void cuda_rope_forward(struct backend *be, act *q, act *k, act *v, const act *qkv, const float *cos, const float *sin, const int32_t *position,
                                  int64_t N, int Hq, int Hkv, int D)
{
    rope<false>(be, const_cast<act *>(qkv), q, k, v, cos, sin, position, N, Hq, Hkv, D);
}

extern "C" void cuda_rope_backward(struct backend *be, act *dqkv, const act *dq, const act *dk, const act *dv, const float *cos, const float *sin, const int32_t *position,
                                   int64_t N, int Hq, int Hkv, int D)
{
    rope<true>(be, dqkv, const_cast<act *>(dq), const_cast<act *>(dk), const_cast<act *>(dv), cos, sin, position, N, Hq, Hkv, D);
}

template <typename T, int W> static int row_threads(const rope_shape &s, int own) { return (int)div_up(s.D / 2 / W * div_up(s.Hq + 2 * s.Hkv, own), 32) * 32; }

template <typename T, int W, int OWN>
static void launch_fp8(struct backend *be, const struct fp8 *d8, const act *dq, const act *dk, const act *dv, const float *cos, const float *sin, const int32_t *position, int64_t N, const rope_shape &s)
{
    rope_backward_fp8_kernel<T, W, OWN><<<(unsigned)N, row_threads<T, W>(s, OWN), 0, cuda_state_of(be)->stream>>>(*d8, (const T *)dq, (const T *)dk, (const T *)dv, cos, sin, position, s,
                                                                                                               (int)div_up(s.Hq + 2 * s.Hkv, OWN));
    CUDA_CHECK(cudaGetLastError());
}

extern "C" void cuda_rope_backward_fp8(struct backend *be, const struct fp8 *d8, act *dqkv, const act *dq, const act *dk, const act *dv, const float *cos, const float *sin, const int32_t *position,
                                       int64_t N, int Hq, int Hkv, int D)
{
    if (!N) return;
    int64_t width = (int64_t)(Hq + 2 * Hkv) * D;
    require_fp8(d8, width);
    bool wide = aligned16(dq) && aligned16(dk) && aligned16(dv) && aligned16(cos) && aligned16(sin);
    DISPATCH(be->act_dtype, T,
        constexpr int W = vector_width<T>();
        rope_shape s = {Hq, Hkv, D, 0};
        bool fits = row_threads<T, W>(s, 8) <= ROW_THREADS;
        CUDA_REQUIRE(fits, "rope: rows this wide are not implemented");
        if (!wide || D % (2 * W)) {                         /* no vectors: a view that begins elsewhere, heads of a few numbers */
            cuda_rope_backward(be, dqkv, dq, dk, dv, cos, sin, position, N, Hq, Hkv, D);
            cuda_quantize(be, d8, dqkv, N, width);
        } else if (row_threads<T, W>(s, 1) <= 128) launch_fp8<T, W, 1>(be, d8, dq, dk, dv, cos, sin, position, N, s);
        else if (row_threads<T, W>(s, 4) <= ROW_THREADS) launch_fp8<T, W, 4>(be, d8, dq, dk, dv, cos, sin, position, N, s);
        else launch_fp8<T, W, 8>(be, d8, dq, dk, dv, cos, sin, position, N, s));
}
