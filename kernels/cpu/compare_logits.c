/* Evaluation of a chunk of positions at T = 1 over the Vv valid ids: KL(p||q), KL(q||p), who predicts the label and how sure of its first choice it is, and whether
 * the two agree. p is the teacher, q the student. A rank is the number of ids with a larger logit, or an equal one and a lower id;
 * NaN ranks behind everything, so that a broken model predicts nothing. */
#include "kernels/cpu/cpu.h"

static int64_t argmax(const float *x, int64_t n)
{
    int64_t best = 0;
    for (int64_t j = 1; j < n; j++) if (x[j] > x[best]) best = j;
    return best;
}

static int64_t rank_of(const float *x, int64_t n, int64_t id)
{
    int64_t rank = 0;
    for (int64_t j = 0; j < n; j++) rank += !(x[j] < x[id]) && (x[j] != x[id] || j < id);
    return rank;
}

void cpu_compare_logits(struct backend *be, struct eval_row *out, const act *student, const act *teacher, const int32_t *labels, int64_t R, int64_t Vs, int64_t Vt, int64_t Vv)
{
    (void)be;
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < R; n++) {
        const float *z = cfp32(student) + n * Vs, *t = teacher ? cfp32(teacher) + n * Vt : NULL;
        struct eval_row row = {0};
        int32_t label = labels[n];
        if (label >= 0) {
            double lse_q = row_log_sum_exp(z, Vv, 1);
            int64_t rank = rank_of(z, Vv, label);
            row.counted = 1;
            row.student_logprob = (float)(z[label] - lse_q);
            row.student_confidence = (float)exp(row_max(z, Vv) - lse_q);
            row.student_top1 = rank < 1;
            row.student_top5 = rank < 5;
            if (t) {
                double lse_p = row_log_sum_exp(t, Vv, 1), forward = 0, reverse = 0;
                for (int64_t j = 0; j < Vv; j++) {
                    double log_p = t[j] - lse_p, log_q = z[j] - lse_q;
                    float p = exp_fp32((float)log_p), q = exp_fp32((float)log_q);
                    if (p > 0) forward += p * (log_p - log_q);
                    if (q > 0) reverse += q * (log_q - log_p);
                }
                rank = rank_of(t, Vv, label);
                row.forward_kl = (float)forward;
                row.reverse_kl = (float)reverse;
                row.teacher_logprob = (float)(t[label] - lse_p);
                row.teacher_confidence = (float)exp(row_max(t, Vv) - lse_p);
                row.teacher_top1 = rank < 1;
                row.teacher_top5 = rank < 5;
                row.agree = argmax(z, Vv) == argmax(t, Vv);
            }
        }
        out[n] = row;
    }
}
