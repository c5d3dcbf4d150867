/* Sums that decide something: the gradient's norm and the loss. Double, in fixed blocks whose partial sums are added in
 * order: the result does not depend on the number of threads. Also the row statistics that the objective shares. */
#include "kernels/cpu/cpu.h"

enum { BLOCK = 1 << 16 };

void cpu_sum_squares(struct backend *be, double *sum, const grad *g_, int64_t count)
{
    const float *g = cgfp32(g_);
    int64_t blocks = (count + BLOCK - 1) / BLOCK, room = (int64_t)(be->scratch_bytes / sizeof(double));
    double *part = be->scratch, total = 0;
    for (int64_t first = 0; first < blocks; first += room) {
        int64_t n = blocks - first < room ? blocks - first : room;
        #pragma omp parallel for schedule(static)
        for (int64_t b = 0; b < n; b++) {
            int64_t begin = (first + b) * BLOCK, end = begin + BLOCK < count ? begin + BLOCK : count;
            double s = 0;
            #pragma omp simd reduction(+ : s)
            for (int64_t i = begin; i < end; i++) s += (double)g[i] * g[i];
            part[b] = s;
        }
        for (int64_t b = 0; b < n; b++) total += part[b];
    }
    *sum = total;
}

void cpu_sum_rows(struct backend *be, double *sum, const float *x, int64_t count)
{
    (void)be;
    double s = 0;
    for (int64_t i = 0; i < count; i++) s += x[i];
    *sum += s;
}

float row_max(const float *x, int64_t n)
{
    float m = -INFINITY;
    #pragma omp simd reduction(max : m)
    for (int64_t i = 0; i < n; i++) m = x[i] > m ? x[i] : m;
    return m;
}

double row_log_sum_exp(const float *x, int64_t n, float scale)
{
    double m = (double)row_max(x, n) * scale, s = 0;
    if (!(m > -INFINITY)) return -INFINITY;
    #pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < n; i++) s += (double)exp_fp32((float)((double)x[i] * scale - m));
    return m + log(s);
}
