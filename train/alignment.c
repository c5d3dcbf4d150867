/* See alignment.h. */
#include "train/alignment.h"

#include <math.h>

#include "base/error.h"
#include "base/half.h"

enum { POSITIONS = 512, FEWEST = 32, MOST_ROWS = 256 };

/* *exact: by a stored value, not an estimate */
static double logprob(const struct batch *b, const struct shard_manifest *m, int64_t t, int32_t id, bool *exact)
{
    *exact = m->kind != SHARD_SAMPLED;
    if (b->full_logits) return f16_to_float(b->full_logits[t * b->full_width + id]) * b->full_scale - b->lse[t];
    for (int64_t e = t * b->k; e < (t + 1) * b->k; e++)
        if (b->head_ids[e] == id && !(b->weight && b->weight[e] == 0)) return m->kind == SHARD_SAMPLED ? log(b->weight[e]) : b->head_logprob[e];
    if (m->kind == SHARD_SAMPLED) return log(0.5 / m->draws);
    *exact = false;
    double share = b->tail_logmass[t] - log((double)(m->valid_vocab - m->k));
    return share > -100 ? share : -100;         /* an empty tail: impossible, but no reason for an infinite mean */
}

int alignment_measure(struct alignment *out, struct shard_dataset *d, const struct loader_options *options, int64_t most)
{
    const struct shard_manifest *m = shard_dataset_manifest(d);
    struct loader_options o = *options;
    struct loader *loader = NULL;
    struct batch *b;
    bool exact;
    int rc = OK;
    *out = (struct alignment){0};
    o.batch_rows = 1;
    o.temperature = m->temperatures[0];
    o.samples = shard_kind_draws(m->kind);
    TRY(loader_open_dataset(&loader, d, &o));
    for (int64_t row = 0; row < m->rows && row < MOST_ROWS && out->positions < most; row++) {
        TRY(loader_next(loader, &b));
        for (int64_t t = 0; t + 2 < b->n && out->positions < most; t++) {
            if (!b->mask[t] || b->position[t + 2] != b->position[t] + 2) continue;
            if (b->tokens[t] == b->tokens[t + 1] || b->tokens[t + 1] == b->tokens[t + 2]) continue;       /* nothing to tell apart */
            out->back += logprob(b, m, t, b->tokens[t], &exact);
            out->ahead += logprob(b, m, t, b->tokens[t + 2], &exact);
            double next = logprob(b, m, t, b->tokens[t + 1], &exact), stored = b->label_logprob[t];
            out->next += next;
            if (exact && stored != 0) {             /* 0: not stored */
                out->compared++;
                out->disagree += !(fabs(stored - next) <= 0.1);
            }
            out->positions++;
        }
    }
    if (out->positions) {
        out->next /= (double)out->positions;
        out->back /= (double)out->positions;
        out->ahead /= (double)out->positions;
    }
out:
    loader_close(loader);
    return rc;
}

int alignment_check(struct shard_dataset *d, const struct loader_options *o, const char *path)
{
    struct alignment a;
    int rc = alignment_measure(&a, d, o, POSITIONS);
    if (rc != OK) return rc;
    if (a.positions < FEWEST) {
        printf("alignment not checked: only %lld of the first positions have three different tokens to tell apart\n", (long long)a.positions);
        return OK;
    }
    if (!(a.next > a.back && a.next > a.ahead))
        return fail(ERR_MISMATCH, "%s: over %lld supervised positions the targets give the next token %.3f nats on average, the token before it %.3f and the one after it %.3f: they seem to be "
                    "shifted against the tokens (or the teacher knows nothing); look with distill inspect --row, dump again, or set train.check_alignment to false", path, (long long)a.positions, a.next,
                    a.back, a.ahead);
    if (20 * a.disagree > a.compared)
        return fail(ERR_MISMATCH, "%s: at %lld of %lld positions the stored log-probability of the next token is not the one its targets give: tokens and targets do not belong together; "
                    "look with distill inspect --row, and dump again", path, (long long)a.disagree, (long long)a.compared);
    printf("alignment next token %.2f nats, one back %.2f, one ahead %.2f, by the targets of %lld positions\n", a.next, a.back, a.ahead, (long long)a.positions);
    return OK;
}
