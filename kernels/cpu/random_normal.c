/* Initial weights: x[i] = mean + std normal(seed, first + i), two Philox words and Box-Muller in double per element. */
#include "base/rng.h"
#include "kernels/cpu/cpu.h"

void cpu_random_normal(struct backend *be, act *x, int64_t count, float mean, float std, uint64_t seed, int64_t first)
{
    (void)be;
    float *y = fp32(x);
    #pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++) {
        struct philox r = philox4x32(seed, 1, (uint64_t)(first + i));
        y[i] = std > 0 ? mean + std * normal_float(r.v[0], r.v[1]) : mean;
    }
}
