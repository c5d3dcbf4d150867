/* Rotary position embedding on the way from fused rows to planes and back (the maths is in cpu/rope.c). A thread takes W pairs of one
 * token through up to HEADS heads, all asked for before the first is turned, so that the table is read once for all of them; value heads pass unchanged. */
#include "kernels/cuda/common.cuh"

enum { THREADS = 256, HEADS = 4 };

struct rope_shape { int Hq, Hkv, D, chunks; };

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
        if (h < s.Hq + s.Hkv) {
            float a[W], b[W];
            unpack<T, W>(a, lower[j]);
            unpack<T, W>(b, upper[j]);
            #pragma unroll
            for (int w = 0; w < W; w++) {
                float angle = BACKWARD ? -sn[w] : sn[w], turned = a[w] * c[w] - b[w] * angle;
                b[w] = b[w] * c[w] + a[w] * angle;
                a[w] = turned;
            }
            lower[j] = pack<T, W>(a);
            upper[j] = pack<T, W>(b);
        }
        T *to = BACKWARD ? row + h * s.D : plane(h);
        store_packed<T, W>(to, lower[j]);
        store_packed<T, W>(to + half, upper[j]);
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
