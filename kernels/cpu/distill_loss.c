/* The objective over a chunk of logits, the gradient left in their place.
 *
 *     loss = kd_weight T^2 D(p, q) + ce_weight (-log softmax(z)[y])      p = softmax(t/T), q = softmax(z/T), both over Vv ids
 *
 * With u = z/T, d loss / dz_j = kd_weight T dD/du_j + ce_weight (softmax(z)_j - [j = y]), all times gradient_scale.
 *
 * Truncated targets, S the stored ids, p_i stored, r the stored tail mass, P = sum_S p_i, and 1-Q summed over the complement:
 *     bucket       D = sum_S p_i log(p_i/q_i) + r log(r/(1-Q))     dD/du_j = q_j (P + r) - p_j on S,  q_j (P + r - r/(1-Q)) off S
 *     renormalise  D = sum_S p_i/P log(p_i/(P q_i))                dD/du_j = q_j - (p_j/P)[j in S]
 *     drop         D = sum_S p_i log(p_i/q_i)                      dD/du_j = q_j P - p_j [j in S]
 * Full targets, with h_j = dD/dq_j where D is not linear in log q:
 *     forward_kl   sum p log(p/q)                                  dD/du_j = q_j - p_j
 *     reverse_kl   sum q log(q/p)                                  h_j = log(q_j/p_j)
 *     jsd          beta KL(p||m) + (1-beta) KL(q||m)               h_j = (1-beta) log(q_j/m_j),   m = beta p + (1-beta) q
 *     skew_kl      KL(p || m)                                      h_j = (1-alpha) (1 - p_j/m_j), m = alpha p + (1-alpha) q
 *     tvd          1/2 sum |p - q|                                 h_j = sign(q_j - p_j) / 2
 *                                                                  dD/du_j = q_j (h_j - sum_i q_i h_i): h up to a constant
 * Logs are kept and subtracted as logs (double), so nothing is lost where p or q is near 0 or 1; 0 log 0 = 0. 1/T is rounded to
 * fp32 once, as full_scale is: where the teacher's logits are the student's, p is q to the last bit. */
#include <string.h>

#include "base/error.h"
#include "base/half.h"
#include "kernels/cpu/cpu.h"

/* log(e^a + e^b) */
static double log_add(double a, double b)
{
    double hi = a > b ? a : b, lo = a > b ? b : a;
    return hi == -INFINITY ? -INFINITY : hi + log1p(exp(lo - hi));
}

/* D over the stored ids; g[j] = dD/du_j for all Vv. z is overwritten on S while the complement is summed, then restored;
 * head_z [K] is scratch. */
static double topk_loss(float *g, float *z, float *head_z, const struct distill_targets *t, int64_t row, const struct distill_args *a, int64_t Vv)
{
    int K = t->K;
    const int32_t *ids = t->head_ids + row * K;
    const float *logp = t->head_logprob + row * K;
    float z_scale = 1 / a->temperature;
    double P = 0, log_tail = t->tail_logmass[row], loss = 0;

    for (int i = 0; i < K; i++) { head_z[i] = z[ids[i]]; P += exp(logp[i]); }
    double lse_head = row_log_sum_exp(head_z, K, z_scale);
    for (int i = 0; i < K; i++) z[ids[i]] = -INFINITY;
    double lse_rest = row_log_sum_exp(z, Vv, z_scale);
    for (int i = 0; i < K; i++) z[ids[i]] = head_z[i];
    double lse = log_add(lse_head, lse_rest);

    double scale_p = 1, q_weight = P, log_ratio = -INFINITY;      /* dD/du_j = q_weight q_j - scale_p p_j on S, q_j (q_weight - e^log_ratio) off S */
    if (a->tail == TAIL_BUCKET && lse_rest > -INFINITY && log_tail > -INFINITY) {
        double r = exp(log_tail);
        log_ratio = log_tail - (lse_rest - lse);                  /* r / (1-Q) */
        q_weight = P + r;
        loss += r * log_ratio;
    } else if (a->tail == TAIL_RENORMALISE) {
        scale_p = 1 / P;
        q_weight = 1;
    }
    double log_scale = log(scale_p);
    for (int i = 0; i < K; i++) {
        double p = exp(logp[i]) * scale_p;
        if (p > 0) loss += p * (logp[i] + log_scale - ((double)head_z[i] * z_scale - lse));
    }

    /* off S first, everywhere; then S. The factor goes into the exponent: 1-Q may be so small that r/(1-Q) overflows and q_j underflows. */
    double larger = log_ratio > 0 ? log_ratio : 0, factor = q_weight * exp(-larger) - exp(log_ratio - larger), shift = lse - larger - log(fabs(factor));
    float sign = factor < 0 ? -1 : 1;
    #pragma omp simd
    for (int64_t j = 0; j < Vv; j++) g[j] = sign * exp_fp32((float)((double)z[j] * z_scale - shift));
    for (int i = 0; i < K; i++) g[ids[i]] = (float)(q_weight * exp((double)head_z[i] * z_scale - lse) - exp(logp[i]) * scale_p);
    return loss;
}

/* The teacher's logits of one row, as float */
static void read_teacher(float *out, const struct distill_targets *t, int64_t row, int64_t Vv)
{
    if (t->full_dtype == DTYPE_F32) memcpy(out, (const float *)t->full + row * t->full_stride, (size_t)Vv * sizeof *out);
    else {
        const uint16_t *half = (const uint16_t *)t->full + row * t->full_stride;
        if (t->full_dtype == DTYPE_F16) for (int64_t j = 0; j < Vv; j++) out[j] = f16_to_float(half[j]);
        else for (int64_t j = 0; j < Vv; j++) out[j] = bf16_to_float(half[j]);
    }
}

static double forward_kl(float *g, const float *z, const float *t, float z_scale, float t_scale, double lse_q, double lse_p, int64_t Vv)
{
    double loss = 0;
    #pragma omp simd reduction(+ : loss)
    for (int64_t j = 0; j < Vv; j++) {
        double log_p = (double)t[j] * t_scale - lse_p, log_q = (double)z[j] * z_scale - lse_q;
        float p = exp_fp32((float)log_p);
        loss += p > 0 ? (double)p * (log_p - log_q) : 0;
        g[j] = exp_fp32((float)log_q) - p;
    }
    return loss;
}

struct divergence_args { enum divergence kind; double w, log_w, log_1w; };      /* w: the teacher's share of the mixture m */

/* One id's share of D, and *h = dD/dq where D is not linear in log q */
static double term(const struct divergence_args *a, double log_p, double log_q, double *h)
{
    double p = exp(log_p), q = exp(log_q), w = a->w, log_m, share = 0;
    *h = 0;
    switch (a->kind) {
    case DIV_REVERSE_KL:
        *h = log_q - log_p;
        return q > 0 ? q * *h : 0;
    case DIV_JSD:
        log_m = log_add(a->log_w + log_p, a->log_1w + log_q);
        if (q > 0) share += q * (*h = (1 - w) * (log_q - log_m));
        if (p > 0) share += w * p * (log_p - log_m);
        return share;
    case DIV_SKEW_KL:
        log_m = log_add(a->log_w + log_p, a->log_1w + log_q);
        if (p > 0) share = p * (log_p - log_m);
        *h = (1 - w) * (1 - (p > 0 ? exp(log_p - log_m) : 0));
        return share;
    case DIV_TVD:
        *h = q > p ? 0.5 : q < p ? -0.5 : 0;
        return 0.5 * fabs(p - q);
    default: CHECK(false, "divergence %d", (int)a->kind);
    }
}

static double full_loss(float *g, const float *z, const float *t, float t_scale, const struct distill_args *a, int64_t Vv)
{
    float z_scale = 1 / a->temperature;
    double lse_q = row_log_sum_exp(z, Vv, z_scale), lse_p = row_log_sum_exp(t, Vv, t_scale), loss = 0, mean_h = 0, h, h_top;
    if (a->divergence == DIV_FORWARD_KL || (a->divergence == DIV_SKEW_KL && a->alpha == 0)) return forward_kl(g, z, t, z_scale, t_scale, lse_q, lse_p, Vv);

    double w = a->divergence == DIV_JSD ? a->beta : a->alpha;
    const struct divergence_args args = {a->divergence, w, log(w), log1p(-w)};
    /* h counts from where q is largest: a student that is sure has mean h = h there, and the difference is all that matters */
    int64_t top = 0;
    for (int64_t j = 1; j < Vv; j++) if (z[j] > z[top]) top = j;
    term(&args, (double)t[top] * t_scale - lse_p, (double)z[top] * z_scale - lse_q, &h_top);
    for (int64_t j = 0; j < Vv; j++) {
        double log_q = (double)z[j] * z_scale - lse_q, qh;
        loss += term(&args, (double)t[j] * t_scale - lse_p, log_q, &h);
        mean_h += qh = log_q > -700 ? exp(log_q) * (h - h_top) : 0;
        g[j] = (float)qh;
    }
    for (int64_t j = 0; j < Vv; j++) g[j] = (float)(g[j] - exp((double)z[j] * z_scale - lse_q) * mean_h);
    return loss;
}

void cpu_distill_loss(struct backend *be, act *logits_, const struct distill_losses *out, const struct distill_targets *t, const struct distill_args *a, int64_t R, int64_t V, int64_t Vv)
{
    float *logits = fp32(logits_);
    CHECK(t->kind != TARGET_SAMPLES && (t->kind == TARGET_FULL ? a->divergence != DIV_MIX : a->divergence == DIV_FORWARD_KL) && !out->kd_squares && !a->floor, "not in this kernel yet");
    CHECK(t->kind != TARGET_TOPK || a->tail != TAIL_UNBIASED, "the %d best have no unbiased objective", t->K);
    float *kd = out->kd, *ce = out->ce;
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < R; n++) {
        float *row = logits + n * V, *z = thread_scratch(be, cpu_row_scratch(V, t->K)), *teacher = z + V, *head_z = teacher + V;
        int32_t label = t->labels[n];
        kd[n] = ce[n] = 0;
        if (label < 0) { memset(row, 0, (size_t)V * sizeof *row); continue; }
        memcpy(z, row, (size_t)Vv * sizeof *z);

        float kd_scale = a->kd_weight * a->temperature * a->gradient_scale, ce_scale = a->ce_weight * a->gradient_scale;
        double divergence = 0;
        if (t->kind == TARGET_TOPK) divergence = topk_loss(row, z, head_z, t, n, a, Vv);
        else if (t->kind == TARGET_FULL) {
            read_teacher(teacher, t, n, Vv);
            divergence = full_loss(row, z, teacher, t->full_scale, a, Vv);
        }
        kd[n] = (float)((double)a->temperature * a->temperature * divergence);
        if (t->kind == TARGET_NONE || kd_scale == 0) memset(row, 0, (size_t)Vv * sizeof *row);   /* 0 * g, without 0 * infinity */
        else for (int64_t j = 0; j < Vv; j++) row[j] *= kd_scale;

        double lse = row_log_sum_exp(z, Vv, 1);
        ce[n] = (float)(lse - z[label]);
        if (ce_scale != 0) {
            #pragma omp simd
            for (int64_t j = 0; j < Vv; j++) row[j] += ce_scale * exp_fp32((float)(z[j] - lse));
            row[label] -= ce_scale;
        }
        memset(row + Vv, 0, (size_t)(V - Vv) * sizeof *row);
    }
}
