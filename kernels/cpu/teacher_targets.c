/* What a dump keeps of a row of teacher logits t, over the Vv valid ids:
 *     lse_T = log sum exp(t/T)         head = the K largest, ties by lower id, log p = t/T0 - lse_T0
 *     tail_T = log sum_{not in head} exp(t/T) - lse_T   summed over the complement, so that it is exact however small
 *     entropy = lse - sum p t/T0 (at T0)
 *     padding = sum_{j >= Vv} e^t / sum_all e^t: what the columns no token has would have taken */
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
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < R; n++) {
        const float *t = cfp32(logits) + n * V;
        float *rest = thread_scratch(be, (size_t)V), inv_T0 = 1 / out->temperatures[0];
        struct entry top[out->K > 0 ? out->K : 1];
        double lse[out->nT];
        for (int i = 0; i < out->nT; i++) lse[i] = row_log_sum_exp(t, Vv, 1 / out->temperatures[i]);
        if (out->lse) for (int i = 0; i < out->nT; i++) out->lse[n * out->nT + i] = (float)lse[i];

        if (out->K) {
            select_top(top, out->K, t, Vv);
            memcpy(rest, t, (size_t)Vv * sizeof *rest);
            for (int k = 0; k < out->K; k++) {
                out->head_ids[n * out->K + k] = top[k].id;
                out->head_logprob[n * out->K + k] = (float)((double)top[k].value / out->temperatures[0] - lse[0]);
                rest[top[k].id] = -INFINITY;
            }
            if (out->tail_logmass)
                for (int i = 0; i < out->nT; i++) out->tail_logmass[n * out->nT + i] = (float)(row_log_sum_exp(rest, Vv, 1 / out->temperatures[i]) - lse[i]);
        }
        if (out->entropy) {
            double mean = 0;
            float shift = (float)lse[0];
            #pragma omp simd reduction(+ : mean)
            for (int64_t j = 0; j < Vv; j++) {
                float x = t[j] * inv_T0, p = exp_fp32(x - shift);
                mean += p > 0 ? (double)p * ((double)x - lse[0]) : 0;
            }
            out->entropy[n] = (float)(mean < 0 ? -mean : 0);
        }
        if (out->label_logprob) out->label_logprob[n] = labels[n] >= 0 ? (float)((double)t[labels[n]] / out->temperatures[0] - lse[0]) : 0;
        if (out->padding_mass) {
            double padding = row_log_sum_exp(t + Vv, V - Vv, 1), valid = row_log_sum_exp(t, Vv, 1);
            out->padding_mass[n] = padding == -INFINITY ? 0 : (float)(1 / (1 + exp(valid - padding)));
        }
        if (out->full) for (int64_t j = 0; j < Vv; j++) out->full[n * Vv + j] = f16_from_float(t[j] * inv_T0);
    }
}
