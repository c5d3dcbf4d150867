/* Embedding:  x_n = table[token_n];  dtable[token_n] += dx_n.
 * Backward is parallel over columns, so that tokens which repeat are added in order and the sum is the same every time. */
#include <string.h>

#include "kernels/cpu/cpu.h"

void cpu_embed_forward(struct backend *be, act *x_, const int32_t *tokens, const act *table_, int64_t N, int64_t C)
{
    (void)be;
    float *x = fp32(x_);
    const float *table = cfp32(table_);
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) memcpy(x + n * C, table + tokens[n] * C, (size_t)C * sizeof *x);
}

void cpu_embed_backward(struct backend *be, grad *dtable_, const act *dx_, const int32_t *tokens, int64_t N, int64_t C, int64_t V)
{
    (void)be; (void)V;
    float *dtable = gfp32(dtable_);
    const float *dx = cfp32(dx_);
    enum { COLUMNS = 64 };                    /* a few cache lines per thread and token */
    #pragma omp parallel for schedule(static)
    for (int64_t c0 = 0; c0 < C; c0 += COLUMNS) {
        int64_t c1 = c0 + COLUMNS < C ? c0 + COLUMNS : C;
        for (int64_t n = 0; n < N; n++) {
            float *d = dtable + tokens[n] * C;
            for (int64_t c = c0; c < c1; c++) d[c] += dx[n * C + c];
        }
    }
}
