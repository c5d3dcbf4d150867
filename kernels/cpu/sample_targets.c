/* Draws from the teacher's distribution, ids of the head left out: weights and uniforms are defined in kernels/draw.h. The row's weights are
 * summed tile by tile; the draws, in ascending order, then walk over tiles, and through those that one of them falls into. */
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/draw.h"

static uint64_t tile_weight(const float *t, int64_t n, float top, float inv_T)
{
    uint64_t sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += draw_weight(t[j], top, inv_T);
    return sum;
}

static void sort(uint64_t *x, int n)
{
    for (int i = 1; i < n; i++) {
        uint64_t v = x[i];
        int j = i;
        for (; j > 0 && x[j - 1] > v; j--) x[j] = x[j - 1];
        x[j] = v;
    }
}

void cpu_sample_targets(struct backend *be, const struct sample_targets *s, const act *logits, int64_t R, int64_t V, int64_t Vv)
{
    float inv_T = 1 / s->temperature;
    int64_t tiles = (Vv + DRAW_TILE - 1) / DRAW_TILE;
    int D = s->draws;
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < R; n++) {
        const float *t = cfp32(logits) + n * V;
        float *rest = thread_scratch(be, cpu_sample_scratch(V));
        uint64_t *weight = (uint64_t *)(rest + ((V + 1) & ~(int64_t)1)), at[DRAW_MOST], total = 0, before = 0;
        int64_t tile = 0, id, first = s->first + n;
        int used = 0, drawn = D;
        memcpy(rest, t, (size_t)Vv * sizeof *rest);
        for (int k = 0; k < s->K; k++) rest[s->head_ids[n * s->K + k]] = -INFINITY;
        float top = row_max(rest, Vv);
        for (int64_t i = 0; i < tiles; i++) {
            int64_t left = Vv - i * DRAW_TILE;
            total += weight[i] = tile_weight(rest + i * DRAW_TILE, left < DRAW_TILE ? left : DRAW_TILE, top, inv_T);
        }
        if (total == 0) drawn = 0;                        /* the head holds everything */
        for (int d = 0; d < drawn; d++) at[d] = draw_target(s->seed, first / s->row_length, first % s->row_length, d, total);
        sort(at, drawn);
        for (int d = 0; d < drawn;) {
            for (; before + weight[tile] <= at[d]; tile++) before += weight[tile];
            uint64_t below = before;
            for (id = tile * DRAW_TILE; below + draw_weight(rest[id], top, inv_T) <= at[d]; id++) below += draw_weight(rest[id], top, inv_T);
            uint64_t end = below + draw_weight(rest[id], top, inv_T);
            int count = 0;
            for (; d < drawn && at[d] < end; d++) count++;
            s->ids[n * D + used] = (int32_t)id;
            s->count[n * D + used] = (uint8_t)count;
            if (s->logprob) s->logprob[n * D + used] = (float)((double)t[id] * inv_T - s->lse[n * s->nT]);
            used++;
        }
        for (; used < D; used++) {
            s->ids[n * D + used] = s->count[n * D + used] = 0;
            if (s->logprob) s->logprob[n * D + used] = 0;
        }
    }
}
