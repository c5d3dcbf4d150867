/* Order statistics of an array. */
#ifndef TRAIN_SELECT_H
#define TRAIN_SELECT_H

#include <stdint.h>

/* The n-th largest of x[0 .. count), 1 <= n <= count; x is reordered (Hoare's selection). */
static inline float nth_largest(float *x, int64_t count, int64_t n)
{
    int64_t low = 0, high = count - 1;
    while (low < high) {
        float pivot = x[low + (high - low) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot) i++;
            while (x[j] < pivot) j--;
            if (i > j) break;
            float t = x[i];
            x[i++] = x[j];
            x[j--] = t;
        }
        if (n - 1 <= j) high = j;
        else if (n - 1 >= i) low = i;
        else break;
    }
    return x[n - 1];
}

#endif
