/* Rotary position embedding in place (the maths is in cpu/rope.c). A thread takes W pairs of one token and turns them in up to
 * HEADS heads, so that the table is read once for all of them. backward: the transpose, s -> -s. */
#include "kernels/cuda/common.cuh"

enum { THREADS = 256, HEADS = 8 };

template <typename T, int W>
__global__ void __launch_bounds__(THREADS) rope_kernel(T *qkv, const float *__restrict__ cos, const float *__restrict__ sin, const int32_t *__restrict__ position, int64_t N,
                                                       int heads, int chunks, int width, int D, float direction)
{
    int half = D / 2, vectors = half / W;
    int64_t item = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    int i = (int)(item % vectors) * W, chunk = (int)(item / vectors % chunks);
    int64_t n = item / vectors / chunks;
    if (n >= N) return;
    float c[W], s[W];
    int64_t at = (int64_t)position[n] * half + i;
    load<float, W>(c, cos + at);
    load<float, W>(s, sin + at);
    #pragma unroll
    for (int k = 0; k < W; k++) s[k] *= direction;
    T *row = qkv + n * width + i;
    int first = chunk * HEADS, last = min(first + HEADS, heads);
    #pragma unroll 4
    for (int h = first; h < last; h++) {
        float a[W], b[W];
        load<T, W>(a, row + h * D);
        load<T, W>(b, row + h * D + half);
        #pragma unroll
        for (int k = 0; k < W; k++) {
            float turned = a[k] * c[k] - b[k] * s[k];
            b[k] = b[k] * c[k] + a[k] * s[k];
            a[k] = turned;
        }
        store<T, W>(row + h * D, a);
        store<T, W>(row + h * D + half, b);
    }
}

template <typename T, int W>
static void rotate(struct backend *be, act *qkv, const float *cos, const float *sin, const int32_t *position, int64_t N, int Hq, int Hkv, int D, float direction)
{
    int heads = Hq + Hkv, chunks = (int)div_up(heads, HEADS);
    rope_kernel<T, W><<<(unsigned)div_up(N * chunks * (D / 2 / W), THREADS), THREADS, 0, cuda_state_of(be)->stream>>>((T *)qkv, cos, sin, position, N, heads, chunks, (Hq + 2 * Hkv) * D, D, direction);
    CUDA_CHECK(cudaGetLastError());
}

static void rope(struct backend *be, act *qkv, const float *cos, const float *sin, const int32_t *position, int64_t N, int Hq, int Hkv, int D, float direction)
{
    if (!N || D < 2) return;
    bool wide = aligned16(qkv) && aligned16(cos) && aligned16(sin);
    DISPATCH(be->act_dtype, T,
        if (wide && D / 2 % vector_width<T>() == 0 && D % 2 == 0) rotate<T, vector_width<T>()>(be, qkv, cos, sin, position, N, Hq, Hkv, D, direction);
        else rotate<T, 1>(be, qkv, cos, sin, position, N, Hq, Hkv, D, direction));
}

extern "C" void cuda_rope_forward(struct backend *be, act *qkv, const float *cos, const float *sin, const int32_t *position, int64_t N, int Hq, int Hkv, int D)
{
    rope(be, qkv, cos, sin, position, N, Hq, Hkv, D, 1);
}

extern "C" void cuda_rope_backward(struct backend *be, act *dqkv, const float *cos, const float *sin, const int32_t *position, int64_t N, int Hq, int Hkv, int D)
{
    rope(be, dqkv, cos, sin, position, N, Hq, Hkv, D, -1);
}
