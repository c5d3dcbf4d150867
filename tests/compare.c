/* See compare.h. */
#include "tests/compare.h"

#include <math.h>

#include "base/error.h"
#include "base/rng.h"

double relative_l2(const float *a, const float *b, int64_t n)
{
    double difference = 0, reference = 0;
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(a[i]) || !isfinite(b[i])) return INFINITY;
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        reference += (double)b[i] * b[i];
    }
    return difference == 0 ? 0 : sqrt(difference / reference);
}

double max_abs_difference(const float *a, const float *b, int64_t n)
{
    double worst = 0;
    for (int64_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - b[i]);
        if (!(d <= worst)) worst = d;
    }
    return worst;
}

void fill_normal(float *x, int64_t n, float scale, uint64_t seed)
{
    #pragma omp parallel for schedule(static) if (n > 1 << 16)
    for (int64_t i = 0; i < n; i++) {
        struct philox r = philox4x32(seed, 0, (uint64_t)i);
        x[i] = scale * normal_float(r.v[0], r.v[1]);
    }
}

void fill_nan(float *x, int64_t n) { for (int64_t i = 0; i < n; i++) x[i] = NAN; }

float *new_poisoned(int64_t n)
{
    float *x = xmalloc((size_t)n * sizeof *x);
    fill_nan(x, n);
    return x;
}

float *new_normal(int64_t n, float scale, uint64_t seed)
{
    float *x = xmalloc((size_t)n * sizeof *x);
    fill_normal(x, n, scale, seed);
    return x;
}
