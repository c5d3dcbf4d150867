/* Initial weights (the maths is in cpu/random_normal.c): in double like there, since a model is initialised once. */
#include "base/rng.h"
#include "kernels/cuda/common.cuh"

enum { THREADS = 256 };

template <typename T>
__global__ void __launch_bounds__(THREADS) random_normal_kernel(T *x, int64_t count, float mean, float std, uint64_t seed, int64_t first)
{
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += (int64_t)gridDim.x * THREADS) {
        philox r = philox4x32(seed, 1, (uint64_t)(first + i));
        x[i] = from_float<T>(std > 0 ? __fadd_rn(mean, __fmul_rn(std, normal_float(r.v[0], r.v[1]))) : mean);
    }
}

extern "C" void cuda_random_normal(struct backend *be, act *x, int64_t count, float mean, float std, uint64_t seed, int64_t first)
{
    if (!count) return;
    struct cuda_state *s = cuda_state_of(be);
    DISPATCH(be->act_dtype, T, random_normal_kernel<T><<<(unsigned)least(div_up(count, THREADS), (int64_t)s->sms * 32), THREADS, 0, s->stream>>>((T *)x, count, mean, std, seed, first));
    CUDA_CHECK(cudaGetLastError());
}
