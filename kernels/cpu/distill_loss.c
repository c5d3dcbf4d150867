/* The objective over a chunk of logits, the gradient left in their place.
 *
 *     loss = kd_weight T^2 D(p, q) + ce_weight (-log softmax(z)[y])      p = softmax(t/T), q = softmax(z/T), both over Vv ids
 *
 * With u = z/T, d loss / dz_j = kd_weight T dD/du_j + ce_weight (softmax(z)_j - [j = y]), all times gradient_scale.
 *
 * D is a weighted sum of divergences. Over outcomes i with probabilities p_i and q_i, and h_i = dD/dq_i where D is not linear in log q:
 *     forward_kl   sum p log(p/q)                                  dD/du_j = q_j sum p - p_j
 *     reverse_kl   sum q log(q/p'), p' = (1-floor) p + floor/Vv    h_j = log(q_j/p'_j)
 *     jsd          beta KL(p||m) + (1-beta) KL(q||m)               h_j = (1-beta) log(q_j/m_j),   m = beta p + (1-beta) q
 *     skew_kl      KL(p || m)                                      h_j = (1-alpha) (1 - p_j/m_j), m = alpha p + (1-alpha) q
 *     tvd          1/2 sum |p - q|                                 h_j = sign(q_j - p_j) / 2
 *                                                                  dD/du_j = q_j (h_j - sum_i q_i h_i): h up to a constant
 * Full targets: the outcomes are the Vv ids. Truncated ones, S the stored ids, p_i stored, r the stored tail mass, P = sum_S p_i, and 1-Q summed
 * over the complement:
 *     bucket       S and one outcome for the rest, (r, 1-Q), whose derivative an id off S shares by q_j/(1-Q). Forward KL:
 *                  sum_S p_i log(p_i/q_i) + r log(r/(1-Q))         dD/du_j = q_j (P + r) - p_j on S,  q_j (P + r - r/(1-Q)) off S
 *     renormalise  p_i/P on S, 0 off it. With p = 0, h does not depend on q but for reverse_kl: the rest is again one outcome, (0, 1-Q), and
 *                  reverse_kl adds sum_(off S) q log(q Vv/floor) over the ids. Forward KL:
 *                  sum_S p_i/P log(p_i/(P q_i))                    dD/du_j = q_j - (p_j/P)[j in S]
 *     drop         sum_S p_i log(p_i/q_i)                          dD/du_j = q_j P - p_j [j in S]
 * Samples, S the slots with w > 0:
 *                  sum_S w_i (log p_i - log q_i)                   dD/du_j = q_j sum w - w_j [j in S]
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

/* D as a sum, forward KL apart from the divergences that need h */
struct terms {
    double forward, reverse, jsd, skew, tvd;
    bool others;                                                    /* any but forward KL */
    double beta, log_beta, log_1beta, alpha, log_alpha, log_1alpha;
    double log_keep, log_each;                                      /* log(1 - floor), log(floor / Vv) */
};

static struct terms terms_of(const struct distill_args *a, int64_t Vv)
{
    double w[DIV_COUNT] = {0};
    if (a->divergence == DIV_MIX) for (int d = 0; d < DIV_COUNT; d++) w[d] = a->mix[d];
    else w[a->divergence] = 1;
    if (a->alpha == 0) { w[DIV_FORWARD_KL] += w[DIV_SKEW_KL]; w[DIV_SKEW_KL] = 0; }
    double beta = a->beta, alpha = a->alpha, floor = a->floor;
    return (struct terms){.forward = w[DIV_FORWARD_KL], .reverse = w[DIV_REVERSE_KL], .jsd = w[DIV_JSD], .skew = w[DIV_SKEW_KL], .tvd = w[DIV_TVD],
                          .others = w[DIV_REVERSE_KL] != 0 || w[DIV_JSD] != 0 || w[DIV_SKEW_KL] != 0 || w[DIV_TVD] != 0,
                          .beta = beta, .log_beta = log(beta), .log_1beta = log1p(-beta), .alpha = alpha, .log_alpha = log(alpha), .log_1alpha = log1p(-alpha),
                          .log_keep = log1p(-floor), .log_each = floor > 0 ? log(floor / (double)Vv) : -INFINITY};
}

/* One outcome's share of D without its forward KL, and *h = dD/dq. log_floor is the outcome's part of the floor. */
static double other_terms(const struct terms *m, double log_p, double log_q, double log_floor, double *h)
{
    double p = exp(log_p), q = exp(log_q), share = 0;
    *h = 0;
    if (m->reverse != 0) {
        double d = log_q - (log_floor > -INFINITY ? log_add(m->log_keep + log_p, log_floor) : log_p);
        *h += m->reverse * d;
        if (q > 0) share += m->reverse * q * d;
    }
    if (m->jsd != 0) {
        double log_m = log_add(m->log_beta + log_p, m->log_1beta + log_q), lq = log_q > -INFINITY ? log_q - log_m : 0;
        *h += m->jsd * (1 - m->beta) * lq;
        if (q > 0) share += m->jsd * (1 - m->beta) * q * lq;
        if (p > 0) share += m->jsd * m->beta * p * (log_p - log_m);
    }
    if (m->skew != 0) {
        double lp = p > 0 ? log_p - log_add(m->log_alpha + log_p, m->log_1alpha + log_q) : 0;
        *h += m->skew * (1 - m->alpha) * (1 - (p > 0 ? exp(lp) : 0));
        share += m->skew * p * lp;
    }
    if (m->tvd != 0) {
        *h += m->tvd * (q > p ? 0.5 : q < p ? -0.5 : 0);
        share += m->tvd * 0.5 * fabs(p - q);
    }
    return share;
}

/* q x, 0 where q is 0 even in double and x may be anything */
static double weighted(double log_q, double x) { return log_q > -700 ? exp(log_q) * x : 0; }

/* D over stored entries; g[j] = dD/du_j for all Vv. z is -INFINITY on S while the complement is looked at, then restored; head_z [K] is scratch. */
static double truncated_loss(float *g, float *z, float *head_z, const struct distill_targets *t, int64_t row, const struct terms *m, const struct distill_args *a, int64_t Vv)
{
    int K = t->K;
    int64_t n_rest = Vv;
    const int32_t *ids = t->head_ids + row * K;
    const float *logp = t->head_logprob + row * K, *weight = t->kind == TARGET_SAMPLES ? t->weight + row * K : NULL;
    float z_scale = 1 / a->temperature;
    double P = 0, loss = 0, h;
#define EACH_STORED(i) for (int i = 0; i < K; i++) if (!weight || weight[i] > 0)
    for (int i = 0; i < K; i++) head_z[i] = -INFINITY;
    EACH_STORED(i) { head_z[i] = z[ids[i]]; P += weight ? weight[i] : exp(logp[i]); n_rest--; }
    double lse_head = row_log_sum_exp(head_z, K, z_scale);
    EACH_STORED(i) z[ids[i]] = -INFINITY;
    double lse_rest = row_log_sum_exp(z, Vv, z_scale), lse = log_add(lse_head, lse_rest), log_q_rest = lse_rest - lse;

    double scale_p = 1, log_scale = 0, sum_p = P, log_tail = -INFINITY;
    if (a->tail == TAIL_BUCKET && lse_rest > -INFINITY && t->tail_logmass[row] > -INFINITY) {
        log_tail = t->tail_logmass[row];
        sum_p = P + exp(log_tail);
    } else if (a->tail == TAIL_RENORMALISE) {
        scale_p = 1 / P;
        log_scale = log(scale_p);
        sum_p = 1;
    }
#define STORED_P(i) (weight ? weight[i] : exp(logp[i]) * scale_p)
#define LOG_Q(z) ((double)(z) * z_scale - lse)

    /* forward KL: dD/du_j = forward (q_j sum_p - p_j) on S, forward q_j (sum_p - e^log_ratio) off S */
    double log_ratio = -INFINITY;                                   /* r / (1-Q) */
    if (m->forward != 0) {
        EACH_STORED(i) { double p = STORED_P(i); if (p > 0) loss += m->forward * p * (logp[i] + log_scale - LOG_Q(head_z[i])); }
        if (log_tail > -INFINITY) { log_ratio = log_tail - log_q_rest; loss += m->forward * exp(log_tail) * log_ratio; }
    }

    /* the others: h counts from where q is largest: a student that is sure has mean h = h there, and the difference is all that matters */
    double base = 0, mean = 0, h_rest = 0, slope = 0;               /* off S: h_j = h_rest + slope log q_j */
    if (m->others) {
        float top_z = row_max(head_z, K), top_rest = row_max(z, Vv);
        bool by_id = a->tail == TAIL_RENORMALISE && m->reverse != 0;
        struct terms constant = *m;                                 /* what the rest is as one outcome */
        if (by_id) { constant.reverse = 0; slope = m->reverse; }
        double log_floor_rest = m->log_each + log((double)n_rest);
        if (lse_rest > -INFINITY) {
            loss += other_terms(&constant, log_tail, log_q_rest, log_floor_rest, &h_rest);
            if (by_id) h_rest -= m->reverse * m->log_each;
        }
        base = h_rest + (by_id ? slope * LOG_Q(top_rest) : 0);
        if ((double)top_z * z_scale >= (by_id ? (double)top_rest * z_scale : lse_rest))
            EACH_STORED(i) if (head_z[i] == top_z) { other_terms(m, logp[i] + log_scale, LOG_Q(head_z[i]), m->log_each, &base); break; }
        EACH_STORED(i) {
            double log_q = LOG_Q(head_z[i]);
            loss += other_terms(m, logp[i] + log_scale, log_q, m->log_each, &h);
            mean += weighted(log_q, h - base);
        }
        if (!by_id && lse_rest > -INFINITY) mean += weighted(log_q_rest, h_rest - base);
        if (by_id && lse_rest > -INFINITY)
            for (int64_t j = 0; j < Vv; j++) {
                double log_q = LOG_Q(z[j]);
                loss += weighted(log_q, slope * (log_q - m->log_each));
                mean += weighted(log_q, h_rest + slope * log_q - base);
            }
    }

    /* off S first, everywhere; then S. The factor goes into the exponent: 1-Q may be so small that r/(1-Q) overflows and q_j underflows. */
    double even = m->forward * sum_p + (lse_rest > -INFINITY ? h_rest - base - mean : 0), larger = log_ratio > 0 ? log_ratio : 0;
    double factor = even * exp(-larger) - m->forward * exp(log_ratio - larger), shift = lse - larger - log(fabs(factor));
    float sign = factor < 0 ? -1 : 1;
    if (slope == 0)
        #pragma omp simd
        for (int64_t j = 0; j < Vv; j++) g[j] = sign * exp_fp32((float)((double)z[j] * z_scale - shift));
    else for (int64_t j = 0; j < Vv; j++) g[j] = (float)weighted(LOG_Q(z[j]), even + slope * LOG_Q(z[j]));
    EACH_STORED(i) {
        double log_q = LOG_Q(head_z[i]), d = m->forward * (sum_p * exp(log_q) - STORED_P(i));
        if (m->others) {
            other_terms(m, logp[i] + log_scale, log_q, m->log_each, &h);
            d += weighted(log_q, h - base) - exp(log_q) * mean;
        }
        g[ids[i]] = (float)d;
        z[ids[i]] = head_z[i];
    }
#undef LOG_Q
#undef STORED_P
#undef EACH_STORED
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

static double sum_of_squares(const float *x, int64_t n)
{
    double sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += (double)x[j] * x[j];
    return sum;
}

static double full_loss(float *g, const float *z, const float *t, float t_scale, const struct terms *m, float z_scale, int64_t Vv)
{
    double lse_q = row_log_sum_exp(z, Vv, z_scale), lse_p = row_log_sum_exp(t, Vv, t_scale), loss = 0, mean = 0, h, base;
    if (!m->others && m->forward == 1) return forward_kl(g, z, t, z_scale, t_scale, lse_q, lse_p, Vv);

    int64_t top = 0;                                                /* h counts from where q is largest, as above */
    for (int64_t j = 1; j < Vv; j++) if (z[j] > z[top]) top = j;
    other_terms(m, (double)t[top] * t_scale - lse_p, (double)z[top] * z_scale - lse_q, m->log_each, &base);
    for (int64_t j = 0; j < Vv; j++) {
        double log_p = (double)t[j] * t_scale - lse_p, log_q = (double)z[j] * z_scale - lse_q, p = exp(log_p), qh;
        loss += other_terms(m, log_p, log_q, m->log_each, &h);
        if (p > 0) loss += m->forward * p * (log_p - log_q);
        mean += qh = weighted(log_q, h - base);
        g[j] = (float)(qh + m->forward * (exp(log_q) - p));
    }
    for (int64_t j = 0; j < Vv; j++) g[j] = (float)(g[j] - exp((double)z[j] * z_scale - lse_q) * mean);
    return loss;
}

static void check_arguments(const struct distill_losses *out, const struct distill_targets *t, const struct distill_args *a)
{
    double reverse = a->divergence == DIV_MIX ? a->mix[DIV_REVERSE_KL] : a->divergence == DIV_REVERSE_KL;
    bool only_forward = a->divergence == DIV_FORWARD_KL || (a->divergence == DIV_MIX && reverse == 0 && a->mix[DIV_JSD] == 0 && a->mix[DIV_SKEW_KL] == 0 && a->mix[DIV_TVD] == 0);
    CHECK(!out->kd_squares == !out->ce_squares, "one part's squared norm without the other's");
    if (t->kind != TARGET_TOPK && t->kind != TARGET_SAMPLES) return;
    CHECK((t->kind == TARGET_SAMPLES) == (a->tail == TAIL_UNBIASED), "tail policy %d on targets of kind %d", (int)a->tail, (int)t->kind);
    CHECK(only_forward || (t->kind == TARGET_TOPK && a->tail != TAIL_DROP), "divergence %d under tail policy %d on targets of kind %d", (int)a->divergence,
          (int)a->tail, (int)t->kind);
    CHECK(a->tail != TAIL_RENORMALISE || reverse == 0 || a->floor > 0, "reverse_kl to probabilities of 0");
}

void cpu_distill_loss(struct backend *be, act *logits_, const struct distill_losses *out, const struct distill_targets *t, const struct distill_args *a, int64_t R, int64_t V, int64_t Vv)
{
    float *logits = fp32(logits_);
    struct terms terms = terms_of(a, Vv);
    check_arguments(out, t, a);
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < R; n++) {
        float *row = logits + n * V, *z = thread_scratch(be, cpu_row_scratch(V, t->K)), *teacher = z + V, *head_z = teacher + V;
        int32_t label = t->labels[n];
        out->kd[n] = out->ce[n] = 0;
        if (out->kd_squares) out->kd_squares[n] = out->ce_squares[n] = 0;
        if (label < 0) { memset(row, 0, (size_t)V * sizeof *row); continue; }
        memcpy(z, row, (size_t)Vv * sizeof *z);

        float kd_scale = a->kd_weight * a->temperature * a->gradient_scale, ce_scale = a->ce_weight * a->gradient_scale;
        double divergence = 0;
        if (t->kind == TARGET_TOPK || t->kind == TARGET_SAMPLES) divergence = truncated_loss(row, z, head_z, t, n, &terms, a, Vv);
        else if (t->kind == TARGET_FULL) {
            read_teacher(teacher, t, n, Vv);
            divergence = full_loss(row, z, teacher, t->full_scale, &terms, 1 / a->temperature, Vv);
        }
        out->kd[n] = (float)((double)a->temperature * a->temperature * divergence);
        if (t->kind == TARGET_NONE || kd_scale == 0) memset(row, 0, (size_t)Vv * sizeof *row);   /* 0 * g, without 0 * infinity */
        else {
            if (out->kd_squares) out->kd_squares[n] = (float)(sum_of_squares(row, Vv) * (a->kd_weight * a->temperature) * (a->kd_weight * a->temperature));
            for (int64_t j = 0; j < Vv; j++) row[j] *= kd_scale;
        }

        double lse = row_log_sum_exp(z, Vv, 1);
        out->ce[n] = (float)(lse - z[label]);
        if (ce_scale != 0) {
            float p_label = exp_fp32((float)(z[label] - lse));
            #pragma omp simd
            for (int64_t j = 0; j < Vv; j++) row[j] += ce_scale * (z[j] = exp_fp32((float)(z[j] - lse)));
            row[label] -= ce_scale;
            z[label] = p_label - 1;
            if (out->ce_squares) out->ce_squares[n] = (float)(sum_of_squares(z, Vv) * a->ce_weight * a->ce_weight);
        }
        memset(row + Vv, 0, (size_t)(V - Vv) * sizeof *row);
    }
}
