/* What a dump keeps of a row of teacher logits t, over the Vv valid ids:
 *     lse_T = log sum exp(t/T)         head = the K largest, ties by lower id, log p = t/T0 - lse_T0
 *     tail_T = log sum_{not in head} exp(t/T) - lse_T   summed over the complement, so that it is exact however small
 *     entropy = lse - sum p t/T0 (at T0)
 *     padding = sum_{j >= Vv} e^t / sum_all e^t: what the columns no token has would have taken */
#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "kernels/cpu/cpu.h"

struct entry { float value; int32_t id; };

/* a ranks before b: larger logit, then lower id */
static int before(struct entry a, struct entry b) { return a.value > b.value || (a.value == b.value && a.id < b.id); }

static int rank(const void *a, const void *b) { return before(*(const struct entry *)a, *(const struct entry *)b) ? -1 : 1; }

static void sift_down(struct entry *heap, int n, int i)
{
    for (int child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && before(heap[child], heap[child + 1])) child++;     /* the one that ranks later */
        if (!before(heap[i], heap[child])) return;
        struct entry e = heap[i];
        heap[i] = heap[child];
        heap[child] = e;
    }
}

/* The K entries that rank first, in order. The heap's root is the one that ranks last, so most of the row is one comparison. */
static void select_top(struct entry *top, int K, const float *t, int64_t Vv)
{
    for (int i = 0; i < K; i++) top[i] = (struct entry){t[i], i};
    for (int i = K / 2 - 1; i >= 0; i--) sift_down(top, K, i);
    for (int64_t j = K; j < Vv; j++)
        if (t[j] > top[0].value) {                                              /* an equal one has a higher id: it ranks later */
            top[0] = (struct entry){t[j], (int32_t)j};
            sift_down(top, K, 0);
        }
    qsort(top, (size_t)K, sizeof *top, rank);
}

void cpu_teacher_targets(struct backend *be, const struct teacher_targets *out, const act *logits, const int32_t *labels, int64_t R, int64_t V, int64_t Vv)
{
    int K = out->K, nT = out->nT;
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < R; n++) {
        const float *t = cfp32(logits) + n * V;
        float *rest = thread_scratch(be, cpu_row_scratch(V, K)), inv_T0 = 1 / out->temperatures[0];
        struct entry *top = (struct entry *)(rest + 2 * V);
        double lse[nT];
        for (int i = 0; i < nT; i++) lse[i] = row_log_sum_exp(t, Vv, 1 / out->temperatures[i]);
        if (out->lse) for (int i = 0; i < nT; i++) out->lse[n * nT + i] = (float)lse[i];

        if (K) select_top(top, K, t, Vv);
        if (out->head_ids) for (int k = 0; k < K; k++) out->head_ids[n * K + k] = top[k].id;
        if (out->head_logprob) for (int k = 0; k < K; k++) out->head_logprob[n * K + k] = (float)((double)top[k].value * inv_T0 - lse[0]);
        if (out->tail_logmass) {
            memcpy(rest, t, (size_t)Vv * sizeof *rest);
            for (int k = 0; k < K; k++) rest[top[k].id] = -INFINITY;
            for (int i = 0; i < nT; i++) out->tail_logmass[n * nT + i] = (float)(row_log_sum_exp(rest, Vv, 1 / out->temperatures[i]) - lse[i]);
        }
        if (out->entropy) {
            double mean = 0;
            #pragma omp simd reduction(+ : mean)
            for (int64_t j = 0; j < Vv; j++) {
                double log_p = (double)t[j] * inv_T0 - lse[0];
                float p = exp_fp32((float)log_p);
                mean += p > 0 ? (double)p * log_p : 0;
            }
            out->entropy[n] = (float)(mean < 0 ? -mean : 0);
        }
        if (out->label_logprob) out->label_logprob[n] = labels[n] >= 0 ? (float)((double)t[labels[n]] * inv_T0 - lse[0]) : 0;
        if (out->padding_mass) {
            double padding = row_log_sum_exp(t + Vv, V - Vv, 1), valid = row_log_sum_exp(t, Vv, 1);
            out->padding_mass[n] = padding == -INFINITY ? 0 : (float)(1 / (1 + exp(valid - padding)));
        }
        if (out->full) for (int64_t j = 0; j < Vv; j++) out->full[n * Vv + j] = f16_from_float(t[j] * inv_T0);
    }
}
