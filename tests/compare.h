/* What the tests share: the metric, fillers and poison. */
#ifndef TESTS_COMPARE_H
#define TESTS_COMPARE_H

#include <stddef.h>
#include <stdint.h>

/* ||a - b|| / ||b|| in double; 0 when both are zero; NaN anywhere gives infinity */
double relative_l2(const float *a, const float *b, int64_t n);
double max_abs_difference(const float *a, const float *b, int64_t n);
/* standard normals times `scale`, a function of (seed, index) alone */
void fill_normal(float *x, int64_t n, float scale, uint64_t seed);
void fill_nan(float *x, int64_t n);
/* malloc'd and filled with NaN, so that an element nobody writes is seen */
float *new_poisoned(int64_t n);
float *new_normal(int64_t n, float scale, uint64_t seed);

#endif
