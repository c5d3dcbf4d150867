/* The objective over a chunk of logits, the gradient left in their place.
 *
 *     loss = kd_weight T^2 D(p, q) + ce_weight (-log softmax(z)[y])      p = softmax(t/T), q = softmax(z/T), both over Vv ids
 *
 * With u = z/T, d loss / dz_j = kd_weight T dD/du_j + ce_weight (softmax(z)_j - [j = y]), all times gradient_scale.
 *
 * Truncated targets, S the stored ids, p_i stored, r the stored tail mass, P = sum_S p_i, and 1-Q summed over the complement:
 *     bucket       D = sum_S p_i log(p_i/q_i) + r log(r/(1-Q))     dD/du_j = q_j (P + r) - p_j on S,  q_j (P + r) - r q_j/(1-Q) off S
 *     renormalise  D = sum_S p_i/P log(p_i/(P q_i))                dD/du_j = q_j - (p_j/P)[j in S]
 *     drop         D = sum_S p_i log(p_i/q_i)                      dD/du_j = q_j P - p_j [j in S]
 * Full targets, with h_j = dD/dq_j where D is not linear in log q:
 *     forward_kl   sum p log(p/q)                                  dD/du_j = q_j - p_j
 *     reverse_kl   sum q log(q/p)                                  h_j = log(q_j/p_j)
 *     jsd          beta KL(p||m) + (1-beta) KL(q||m)               h_j = (1-beta) log(q_j/m_j),   m = beta p + (1-beta) q
 *     skew_kl      KL(p || m)                                      h_j = -(1-alpha) p_j/m_j,      m = alpha p + (1-alpha) q
 *     tvd          1/2 sum |p - q|                                 h_j = sign(q_j - p_j) / 2
 *                                                                  dD/du_j = q_j (h_j - sum_i q_i h_i)
 * Logs are kept and subtracted as logs (double), so nothing is lost where p or q is near 0 or 1; 0 log 0 = 0. */
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

/* D over the stored ids; g[j] = dD/du_j for all Vv. z is overwritten on S while the complement is summed, then restored. */
static double topk_loss(float *g, float *z, const struct distill_targets *t, int64_t row, const struct distill_args *a, int64_t Vv)
{
    int K = t->K;
    const int32_t *ids = t->head_ids + row * K;
    const float *logp = t->head_logprob + row * K;
    double inv_T = 1.0 / a->temperature, P = 0, log_tail = t->tail_logmass[row], loss = 0;
    float head_z[K];

    for (int i = 0; i < K; i++) { head_z[i] = z[ids[i]]; P += exp(logp[i]); }
    double lse_head = row_log_sum_exp(head_z, K, (float)inv_T);
    for (int i = 0; i < K; i++) z[ids[i]] = -INFINITY;
    double lse_rest = row_log_sum_exp(z, Vv, (float)inv_T);
    for (int i = 0; i < K; i++) z[ids[i]] = head_z[i];
    double lse = log_add(lse_head, lse_rest);

    double scale_p = 1, q_weight = P, r = 0;          /* dD/du_j = q_weight q_j - scale_p p_j [S] - r q_j/(1-Q) [off S] */
    if (a->tail == TAIL_BUCKET) {
        r = lse_rest > -INFINITY ? exp(log_tail) : 0;
        q_weight = P + r;
        if (r > 0) loss += r * (log_tail - (lse_rest - lse));
    } else if (a->tail == TAIL_RENORMALISE) {
        scale_p = 1 / P;
        q_weight = 1;
    }
    double log_scale = log(scale_p);
    for (int i = 0; i < K; i++) {
        double p = exp(logp[i]) * scale_p;
        if (p > 0) loss += p * (logp[i] + log_scale - (head_z[i] * inv_T - lse));
    }

    /* off S first, everywhere; then S */
    float fT = (float)inv_T, shift = (float)lse, shift_rest = (float)lse_rest, fw = (float)q_weight, fr = (float)r;
    if (fr > 0) {
        #pragma omp simd
        for (int64_t j = 0; j < Vv; j++) g[j] = fw * exp_fp32(z[j] * fT - shift) - fr * exp_fp32(z[j] * fT - shift_rest);
    } else {
        #pragma omp simd
        for (int64_t j = 0; j < Vv; j++) g[j] = fw * exp_fp32(z[j] * fT - shift);
    }
    for (int i = 0; i < K; i++) g[ids[i]] = (float)(q_weight * exp(head_z[i] * inv_T - lse) - exp(logp[i]) * scale_p);
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
    float shift_q = (float)lse_q, shift_p = (float)lse_p;
    #pragma omp simd reduction(+ : loss)
    for (int64_t j = 0; j < Vv; j++) {
        double log_p = (double)t[j] * t_scale - lse_p, log_q = (double)z[j] * z_scale - lse_q;
        float p = exp_fp32(t[j] * t_scale - shift_p);
        loss += p > 0 ? (double)p * (log_p - log_q) : 0;
        g[j] = exp_fp32(z[j] * z_scale - shift_q) - p;
    }
    return loss;
}

static double full_loss(float *g, const float *z, const float *t, float t_scale, const struct distill_args *a, int64_t Vv)
{
    float z_scale = 1 / a->temperature;
    double lse_q = row_log_sum_exp(z, Vv, z_scale), lse_p = row_log_sum_exp(t, Vv, t_scale), loss = 0, mean_h = 0;
    if (a->divergence == DIV_FORWARD_KL) return forward_kl(g, z, t, z_scale, t_scale, lse_q, lse_p, Vv);

    double w = a->divergence == DIV_JSD ? a->beta : a->alpha, log_w = log(w), log_1w = log1p(-w);
    for (int64_t j = 0; j < Vv; j++) {
        double log_p = (double)t[j] * t_scale - lse_p, log_q = (double)z[j] * z_scale - lse_q, p = exp(log_p), q = exp(log_q), h = 0, log_m;
        switch (a->divergence) {
        case DIV_REVERSE_KL:
            h = log_q - log_p;
            if (q > 0) loss += q * h;
            break;
        case DIV_JSD:
            log_m = log_add(log_w + log_p, log_1w + log_q);
            if (p > 0) loss += w * p * (log_p - log_m);
            if (q > 0) loss += (1 - w) * q * (log_q - log_m);
            h = q > 0 ? (1 - w) * (log_q - log_m) : 0;
            break;
        case DIV_SKEW_KL:
            log_m = log_add(log_w + log_p, log_1w + log_q);
            if (p > 0) loss += p * (log_p - log_m);
            h = p > 0 ? -(1 - w) * exp(log_p - log_m) : 0;
            break;
        case DIV_TVD:
            loss += 0.5 * fabs(p - q);
            h = q > p ? 0.5 : q < p ? -0.5 : 0;
            break;
        default: CHECK(false, "divergence %d", (int)a->divergence);
        }
        if (q > 0) mean_h += q * h;
        g[j] = (float)h;
    }
    for (int64_t j = 0; j < Vv; j++) {
        double q = exp((double)z[j] * z_scale - lse_q);
        g[j] = q > 0 ? (float)(q * (g[j] - mean_h)) : 0;
    }
    return loss;
}

void cpu_distill_loss(struct backend *be, act *logits_, float *kd, float *ce, const struct distill_targets *t, const struct distill_args *a, int64_t R, int64_t V, int64_t Vv)
{
    float *logits = fp32(logits_);
    CHECK(t->kind != TARGET_TOPK || a->divergence == DIV_FORWARD_KL, "only forward_kl is defined on truncated targets");
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < R; n++) {
        float *row = logits + n * V, *z = thread_scratch(be, (size_t)(2 * V)), *teacher = z + V;
        int32_t label = t->labels[n];
        kd[n] = ce[n] = 0;
        if (label < 0) { memset(row, 0, (size_t)V * sizeof *row); continue; }
        memcpy(z, row, (size_t)Vv * sizeof *z);

        float kd_scale = a->kd_weight * a->temperature * a->gradient_scale, ce_scale = a->ce_weight * a->gradient_scale;
        double divergence = 0;
        if (t->kind == TARGET_TOPK) divergence = topk_loss(row, z, t, n, a, Vv);
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
            float shift = (float)lse;
            #pragma omp simd
            for (int64_t j = 0; j < Vv; j++) row[j] += ce_scale * exp_fp32(z[j] - shift);
            row[label] -= ce_scale;
        }
        memset(row + Vv, 0, (size_t)(V - Vv) * sizeof *row);
    }
}
