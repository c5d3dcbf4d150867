/* What one outcome adds to the objective beside forward KL, and its derivative (the maths is in cpu/distill_loss.c): in fp32 for rows of full
 * logits, in double for the few stored entries of a truncated row. */
#ifndef KERNELS_CUDA_DISTILL_TERMS_CUH
#define KERNELS_CUDA_DISTILL_TERMS_CUH

#include "kernels/cuda/row_stats.cuh"

/* D as a weighted sum of divergences, forward KL apart: it is linear in log q. */
struct terms {
    float forward, reverse, jsd, skew, tvd, beta, alpha, log_keep, log_each;      /* log(1 - floor), log(floor / Vv) or -infinity */
    bool others;                                                                 /* any but forward KL */
};

static inline terms terms_of(const distill_args *a, int64_t Vv)
{
    float w[DIV_COUNT] = {};
    if (a->divergence == DIV_MIX) for (int d = 0; d < DIV_COUNT; d++) w[d] = a->mix[d];
    else w[a->divergence] = 1;
    if (a->alpha == 0) { w[DIV_FORWARD_KL] += w[DIV_SKEW_KL]; w[DIV_SKEW_KL] = 0; }
    terms m = {w[DIV_FORWARD_KL], w[DIV_REVERSE_KL], w[DIV_JSD], w[DIV_SKEW_KL], w[DIV_TVD], a->beta, a->alpha,
               (float)log1p(-(double)a->floor), a->floor > 0 ? (float)log((double)a->floor / (double)Vv) : -INFINITY, false};
    m.others = m.reverse != 0 || m.jsd != 0 || m.skew != 0 || m.tvd != 0;
    return m;
}

/* log(a + (1-a) e^d): through log1p and expm1 near d = 0, from the larger side elsewhere */
__device__ __forceinline__ float log_mix(float a, float d)
{
    float larger = 0;
    if (d > 0) { larger = d; a = 1 - a; d = -d; }
    if (d > -1) return larger + log1pf((1 - a) * expm1f(d));
    float m = a + (1 - a) * expf(d);
    return larger + (m > 0 ? logf(m) : d);
}

/* One id of a full row, from the two log-probabilities and their exponentials. With m = w p + (1-w) q, log p - log m = -log_mix(w, d) and
 * log q - log m = -log_mix(1-w, -d), d = log q - log p. Each loss is written as kl_term, whose sum is the divergence because p, q, p' and m all
 * sum to 1. h is dD/dq. */
__device__ __forceinline__ void other_terms(const terms &t, float log_p, float log_q, float p, float q, float &loss, float &h)
{
    float d = log_q - log_p;
    loss = h = 0;
    if (t.reverse != 0) {
        float e = d, floored = p;
        if (t.log_each > -CUDART_INF_F) {
            float a = t.log_keep + log_p, hi = fmaxf(a, t.log_each), l = hi + log1pf(expf(fminf(a, t.log_each) - hi));
            e = log_q - l;
            floored = expf(l);
        }
        h += t.reverse * e;
        loss += t.reverse * kl_term(q, floored, -e);
    }
    if (t.jsd != 0) {
        float w = t.beta, m = w * p + (1 - w) * q, lm = log_mix(1 - w, -d);
        loss += t.jsd * (w * kl_term(p, m, log_mix(w, d)) + (1 - w) * kl_term(q, m, lm));
        if (q > 0) h -= t.jsd * (1 - w) * lm;
    }
    if (t.skew != 0) {
        float w = t.alpha, lm = log_mix(w, d);
        loss += t.skew * kl_term(p, w * p + (1 - w) * q, lm);
        h += t.skew * (1 - w) * (p > 0 ? -expm1f(-lm) : 1);
    }
    if (t.tvd != 0) {
        loss += t.tvd * 0.5f * fabsf(p - q);
        h += t.tvd * (q > p ? 0.5f : q < p ? -0.5f : 0);
    }
}

/* The same for an outcome of a truncated row, whose stored probabilities need not sum to 1: p log(p/q) as it is, in double. log_floor: what the
 * floor adds to this outcome. Returns the loss. */
__device__ __noinline__ double other_terms(const terms &t, double log_p, double log_q, double log_floor, double &h)
{
    double p = exp(log_p), q = exp(log_q), loss = 0;
    h = 0;
    if (t.reverse != 0) {
        double d = log_q - (log_floor > -CUDART_INF ? log_add(t.log_keep + log_p, log_floor) : log_p);
        h += t.reverse * d;
        if (q > 0) loss += t.reverse * q * d;
    }
    if (t.jsd != 0) {
        double w = t.beta, log_m = log_add(log(w) + log_p, log1p(-w) + log_q), lq = log_q > -CUDART_INF ? log_q - log_m : 0;
        h += t.jsd * (1 - w) * lq;
        if (q > 0) loss += t.jsd * (1 - w) * q * lq;
        if (p > 0) loss += t.jsd * w * p * (log_p - log_m);
    }
    if (t.skew != 0) {
        double w = t.alpha, lp = p > 0 ? log_p - log_add(log(w) + log_p, log1p(-w) + log_q) : 0;
        h += t.skew * (1 - w) * (p > 0 ? -expm1(lp) : 1);
        loss += t.skew * p * lp;
    }
    if (t.tvd != 0) {
        loss += t.tvd * 0.5 * fabs(p - q);
        h += t.tvd * (q > p ? 0.5 : q < p ? -0.5 : 0);
    }
    return loss;
}

/* e^log_q x, 0 where q is 0 even in double and x may be anything */
__device__ __forceinline__ double weighted(double log_q, double x) { return log_q > -700 ? exp(log_q) * x : 0; }

#endif
