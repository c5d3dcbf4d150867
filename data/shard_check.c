/* What a row of logit shards must be, whoever made it: FORMAT.md, "What a reader checks". The writer asks before it stores a row, every reader after
 * it has read one; so most of a decode's time is spent here, and the checks that nearly always hold are made without branches. */
#include <math.h>
#include <string.h>

#include "base/half.h"
#include "data/shard_internal.h"

/* Probabilities of the f16 log-probabilities: exp is most of the cost of a check, and there are only 31744 of them. */
enum { F16_INFINITY = 0x7c00, F16_SLACK = 0x1400 /* 2^-10: what rounding may lift a log-probability above 0 */ };
static struct { float p, p_logp; } f16_exp[F16_INFINITY];
static pthread_once_t f16_exp_once = PTHREAD_ONCE_INIT;

static void f16_exp_fill(void)
{
    for (int h = 0; h < F16_INFINITY; h++) {
        double x = f16_to_float((uint16_t)h);
        f16_exp[h].p = (float)exp(-x);
        f16_exp[h].p_logp = (float)(exp(-x) * x);
    }
}

static inline int f16_descent(uint16_t h) { return h & 0x8000 ? h & 0x7fff : -(int)h; }   /* grows as the value falls */

/* Rounding to f16 moves a log-probability x by at most |x| / 2^11 and so p by p|x| / 2^11; the rest is fp32 in the producer. */
static const double HALF_ULP = 1.02 / 2048, FLOAT_SLACK = 2e-4;

static int mass_check(const struct shard_manifest *m, const struct shard_row *r, int64_t t, bool deep, int status)
{
    int nT = m->n_temperatures;
    const uint16_t *logp = r->head_logprob + t * m->k;
    const float *lse = r->lse + t * nT, *tail = r->tail + t * nT;
    float sum_f = 0, entropy = 0;                 /* K of them, each off by 2^-24: far within what is allowed below */
    double sum = exp(tail[0]);
    int i = 0;
    for (; i < m->k && !(logp[i] & 0x8000); i++) sum += exp(f16_to_float(logp[i]));   /* descending: what is not negative comes first */
    for (; i < m->k; i++) { sum_f += f16_exp[logp[i] & 0x7fff].p; entropy += f16_exp[logp[i] & 0x7fff].p_logp; }
    sum += sum_f;
    if (!(fabs(sum - 1) <= FLOAT_SLACK + HALF_ULP * entropy)) return fail(status, "position %lld: head and tail hold the mass %.6f, not 1", (long long)t, sum);
    for (int j = 1; deep && j < nT; j++) {
        double ratio = (double)m->temperatures[0] / m->temperatures[j], shift = ratio * lse[0] - lse[j], error = 0;
        sum = exp(tail[j]);
        for (i = 0; i < m->k; i++) {
            double x = f16_to_float(logp[i]), p = exp(ratio * x + shift);
            sum += p;
            error += p * ratio * fabs(x);
        }
        if (!(fabs(sum - 1) <= FLOAT_SLACK + HALF_ULP * error + 2.4e-7 * (ratio * fabs(lse[0]) + fabs(lse[j]))))
            return fail(status, "position %lld: head and tail hold the mass %.6f, not 1, at temperature %g", (long long)t, sum, m->temperatures[j]);
    }
    return OK;
}

/* The stored log-sum-exp must be that of the stored logits, up to their rounding. */
static int full_mass_check(const struct shard_manifest *m, const struct shard_row *r, int64_t t, int status)
{
    const uint16_t *logits = r->logits + t * m->valid_vocab;
    float lse = r->lse[t * m->n_temperatures];
    double sum = 0, error = 0;
    for (int64_t v = 0; v < m->valid_vocab; v++) {
        float x = f16_to_float(logits[v]), p = expf(x - lse);
        sum += p;
        error += p * fabsf(x);
    }
    if (!(fabs(sum - 1) <= FLOAT_SLACK + HALF_ULP * error + 2.4e-7 * fabs(lse))) return fail(status, "position %lld: the logits hold the mass %.6f by the stored log-sum-exp, not 1", (long long)t, sum);
    return OK;
}

/* The draws of a position, `seen` with the bits of its head set. Each id once and ascending, so that the same draws are the same bytes. */
static int draws_check(const struct shard_manifest *m, const struct shard_row *r, int64_t t, const uint64_t *seen, int status)
{
    int D = m->draws, n = 0, sum = 0, broken = 0;
    const uint32_t *ids = r->draw_ids + t * D;
    const uint8_t *count = r->draw_count + t * D;
    const uint16_t *logp = m->kind == SHARD_HYBRID ? r->draw_logprob + t * D : NULL;
    for (; n < D && count[n]; n++) sum += count[n];
    for (int i = 0; i < n; i++) broken |= (ids[i] >= (uint32_t)m->valid_vocab) | (i && ids[i] <= ids[i - 1]);
    for (int i = n; i < D; i++) broken |= ids[i] != 0 || count[i] || (logp && logp[i]);
    if (broken) return fail(status, "position %lld: the draws are not ids below the valid vocabulary %d in ascending order, then zeros", (long long)t, m->valid_vocab);
    if (sum && sum != D) return fail(status, "position %lld: the counts of the draws add up to %d, not to %d", (long long)t, sum, D);
    bool nothing = logp && r->tail[t * m->n_temperatures] == -INFINITY;        /* the head holds everything */
    if (r->loss_mask[t] && !sum != nothing) return fail(status, "position %lld: %s", (long long)t, sum ? "draws from a tail without mass" : "there are no draws");
    if (!logp) return OK;
    /* No drawn id can be likelier than the head's last, nor all of them than the tail: up to rounding, each on its own, of f16 and of the producer's fp32. */
    int least = f16_descent(r->head_logprob[t * m->k + m->k - 1]) - 1;
    float mass = 0, error = 0;
    for (int i = 0; i < n; i++) {
        int next = f16_descent(logp[i]);
        broken |= (next < -F16_SLACK) | (next >= F16_INFINITY);
        if (r->loss_mask[t]) broken |= (next < least) | (int)(seen[ids[i] >> 6] >> (ids[i] & 63) & 1);
        mass += f16_exp[logp[i] < 0x8000 || broken ? 0 : logp[i] & 0x7fff].p;
        error += f16_exp[logp[i] < 0x8000 || broken ? 0 : logp[i] & 0x7fff].p_logp;
    }
    for (int i = 0; broken && i < n; i++) {
        int next = f16_descent(logp[i]);
        if (next < -F16_SLACK || next >= F16_INFINITY) return fail(status, "position %lld: log-probability %d of the draws is %g", (long long)t, i, f16_to_float(logp[i]));
        if (!r->loss_mask[t]) continue;
        if (seen[ids[i] >> 6] >> (ids[i] & 63) & 1) return fail(status, "position %lld: id %u was drawn and is in the head", (long long)t, ids[i]);
        if (next < least) return fail(status, "position %lld: id %u was drawn from the tail, but is likelier than the head's last", (long long)t, ids[i]);
    }
    if (r->loss_mask[t] && !(mass <= exp(r->tail[t * m->n_temperatures]) + FLOAT_SLACK + HALF_ULP * error))
        return fail(status, "position %lld: the drawn ids hold the mass %.6f, the tail only %.6f", (long long)t, mass, exp(r->tail[t * m->n_temperatures]));
    return OK;
}

static int head_check(const struct shard_manifest *m, const struct shard_row *r, int64_t t, bool deep, uint64_t *seen, int status)
{
    int K = m->k, descent = -F16_SLACK;
    const uint32_t *ids = r->head_ids + t * K;
    const uint16_t *logp = r->head_logprob + t * K;
    int broken = 0;
    for (int i = 0; i < K; i++) {                 /* without a branch: nearly always there is nothing to say */
        int next = f16_descent(logp[i]);
        broken |= (ids[i] >= (uint32_t)m->valid_vocab) | (next < descent) | (next >= F16_INFINITY);
        descent = next;
    }
    descent = -F16_SLACK;
    for (int i = 0; broken && i < K; i++) {
        int next = f16_descent(logp[i]);
        if (ids[i] >= (uint32_t)m->valid_vocab) return fail(status, "position %lld: head id %u is not below the valid vocabulary %d", (long long)t, ids[i], m->valid_vocab);
        if (next < -F16_SLACK || next >= F16_INFINITY) return fail(status, "position %lld: log-probability %d of the head is %g", (long long)t, i, f16_to_float(logp[i]));
        if (next < descent) return fail(status, "position %lld: the head is not in descending order at %d", (long long)t, i);
        descent = next;
    }
    const float *tail = r->tail + t * m->n_temperatures;
    for (int j = 0; j < m->n_temperatures; j++)
        if (!(tail[j] <= 1e-3f)) return fail(status, "position %lld: the log of the tail mass is %g", (long long)t, tail[j]);
    if (!r->loss_mask[t]) return m->draws ? draws_check(m, r, t, seen, status) : OK;
    int twice = -1, rc = OK;
    for (int i = 0; i < K; i++) {
        uint64_t bit = (uint64_t)1 << (ids[i] & 63);
        if (seen[ids[i] >> 6] & bit) twice = i;
        seen[ids[i] >> 6] |= bit;
    }
    if (m->draws) rc = draws_check(m, r, t, seen, status);
    for (int i = 0; i < K; i++) seen[ids[i] >> 6] = 0;
    if (rc != OK) return rc;
    if (twice >= 0) return fail(status, "position %lld: id %u is in the head twice", (long long)t, ids[twice]);
    return mass_check(m, r, t, deep, status);
}

int shard_row_check(const struct shard_manifest *m, const struct shard_row *r, bool deep, int status)
{
    int rc = OK, nT = m->n_temperatures;
    int64_t L = m->row_length;
    bool mass_checked = false;
    float max_entropy = logf((float)m->valid_vocab) * 1.001f + 1e-3f;
    uint64_t seen[SHARD_MAX_VOCAB / 64];
    if (shard_kind_has_head(m->kind)) memset(seen, 0, ((size_t)m->valid_vocab + 63) / 64 * 8);
    pthread_once(&f16_exp_once, f16_exp_fill);
    for (int64_t t = 0; t < L; t++) {
        bool next = t + 1 < L && r->document[t + 1] == r->document[t];   /* is there a token t+1 to predict? */
        float entropy = f16_to_float(r->entropy[t]), label = f16_to_float(r->label_logprob[t]);
        if (r->tokens[t] >= (uint32_t)m->valid_vocab) return fail(status, "position %lld: token %u is not below the valid vocabulary %d", (long long)t, r->tokens[t], m->valid_vocab);
        if (r->document[t] != (t ? r->document[t - 1] : 0) && (!t || r->document[t] != r->document[t - 1] + 1))
            return fail(status, "position %lld: document %u does not follow the one before", (long long)t, r->document[t]);
        if (r->loss_mask[t] > 1 || (r->loss_mask[t] && !next)) return fail(status, "position %lld: loss_mask is %u, where %s", (long long)t, r->loss_mask[t], next ? "1 is the largest" : "the document ends");
        for (int j = 0; j < nT; j++)
            if (!isfinite(r->lse[t * nT + j])) return fail(status, "position %lld: the log-sum-exp is %g", (long long)t, r->lse[t * nT + j]);
        if (!(entropy >= 0 && entropy <= max_entropy)) return fail(status, "position %lld: the entropy is %g, not in 0 .. %g", (long long)t, entropy, max_entropy);
        if (!(label <= 1.0f / 1024 && label >= -65504.0f)) return fail(status, "position %lld: the label's log-probability is %g", (long long)t, label);
        if (!next && label != 0) return fail(status, "position %lld: there is no next token, yet its log-probability is %g", (long long)t, label);
        if (shard_kind_has_head(m->kind)) {
            TRY(head_check(m, r, t, deep, seen, status));
        } else if (m->kind == SHARD_SAMPLED) {
            TRY(draws_check(m, r, t, seen, status));
        } else {
            const uint16_t *logits = r->logits + t * m->valid_vocab;
            int broken = 0;
            for (int64_t v = 0; v < m->valid_vocab; v++) broken |= (logits[v] & 0x7fff) >= F16_INFINITY;
            if (broken) return fail(status, "position %lld: a logit is not finite", (long long)t);
            /* exp over a whole vocabulary is dear: one position tells a wrong temperature or a wrong row, deep looks at all */
            if (r->loss_mask[t] && (deep || !mass_checked)) { TRY(full_mass_check(m, r, t, status)); mass_checked = true; }
        }
    }
out:
    return rc;
}
