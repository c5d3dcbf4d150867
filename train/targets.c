/* See targets.h. */
#include "train/targets.h"

#include <ctype.h>
#include <math.h>
#include <string.h>

#include "base/error.h"

static const char *const divergence_names[DIV_COUNT] = {[DIV_FORWARD_KL] = "forward_kl", [DIV_REVERSE_KL] = "reverse_kl", [DIV_JSD] = "jsd", [DIV_SKEW_KL] = "skew_kl", [DIV_TVD] = "tvd"};
static const char *const tail_names[TAIL_COUNT] = {[TAIL_UNBIASED] = "unbiased", [TAIL_BUCKET] = "bucket", [TAIL_RENORMALISE] = "renormalise", [TAIL_DROP] = "drop"};

const char *tail_name(enum tail_policy tail) { return tail_names[tail]; }

static double weight_of(const struct distill_args *a, enum divergence d) { return a->divergence == DIV_MIX ? (double)a->mix[d] : a->divergence == d; }

static bool only_forward(const struct distill_args *a)
{
    for (int d = DIV_REVERSE_KL; d < DIV_COUNT; d++) if (weight_of(a, (enum divergence)d) > 0) return false;
    return true;
}

/* [weight] name { + [weight] name } */
static int parse_divergence(const char *text, struct distill_args *a)
{
    const char *s = text;
    int terms = 0;
    for (;; s++) {
        char *end;
        while (isspace((unsigned char)*s)) s++;
        double weight = 1;
        if (isdigit((unsigned char)*s) || *s == '.') {
            weight = strtod(s, &end);
            s = end;
            while (isspace((unsigned char)*s)) s++;
        }
        size_t n = strcspn(s, " \t+");
        int d = 0;
        while (d < DIV_COUNT && (strlen(divergence_names[d]) != n || strncmp(divergence_names[d], s, n))) d++;
        if (d == DIV_COUNT)
            return fail(ERR_USAGE, "objective.divergence \"%s\": \"%.*s\" is none of forward_kl, reverse_kl, jsd, skew_kl, tvd; a mix is written 0.7 forward_kl + 0.3 reverse_kl", text, (int)(n < 40 ? n : 40), s);
        if (!(weight > 0 && weight <= 1e6)) return fail(ERR_USAGE, "objective.divergence \"%s\": the weight of %s is %g, not above 0 and at most 1e6", text, divergence_names[d], weight);
        if (a->mix[d] > 0) return fail(ERR_USAGE, "objective.divergence \"%s\": %s is there twice", text, divergence_names[d]);
        a->mix[d] = (float)weight;
        a->divergence = (enum divergence)d;
        terms++;
        s += n;
        while (isspace((unsigned char)*s)) s++;
        if (!*s) break;
        if (*s != '+') return fail(ERR_USAGE, "objective.divergence \"%s\": a \"+\" is missing before \"%.40s\"", text, s);
    }
    if (terms > 1 || a->mix[a->divergence] != 1) a->divergence = DIV_MIX;
    return OK;
}

int targets_objective(struct distill_args *out, const struct config *c)
{
    *out = (struct distill_args){.floor = (float)c->objective_floor, .beta = (float)c->objective_beta, .alpha = (float)c->objective_alpha, .temperature = (float)c->objective_temperature,
                                 .kd_weight = (float)c->objective_kd_weight, .ce_weight = (float)c->objective_ce_weight};
    int rc = parse_divergence(c->objective_divergence, out);
    if (rc != OK) return rc;
    if (c->objective_floor > 0 && weight_of(out, DIV_REVERSE_KL) == 0)
        return fail(ERR_USAGE, "objective.floor is %g, but objective.divergence %s has no reverse_kl, which alone uses it: leave it at 0", c->objective_floor, c->objective_divergence);
    return OK;
}

static int refuse(const struct config *c, const struct shard_manifest *m, enum tail_policy tail, const char *why, const char *instead)
{
    char shape[48] = "";
    if (shard_kind_has_head(m->kind)) snprintf(shape, sizeof shape, " (K = %d)", m->k);
    return fail(ERR_MISMATCH, "%s holds %s targets%s: objective.divergence %s with objective.tail %s is not computed from them: %s; %s", c->shards_path, shard_kind_name(m->kind), shape, c->objective_divergence,
                tail_names[tail], why, instead);
}

int targets_choose(struct distill_args *a, enum target_kind *kind, int *k, const struct config *c, const struct shard_manifest *m)
{
    bool head = shard_kind_has_head(m->kind), draws = shard_kind_draws(m->kind), forward = only_forward(a);
    enum tail_policy tail = m->kind == SHARD_TOPK ? TAIL_BUCKET : TAIL_UNBIASED;
    if (strcmp(c->objective_tail, "auto")) for (tail = 0; strcmp(c->objective_tail, tail_names[tail]); tail++) {}
    a->tail = tail;
    *kind = TARGET_NONE;
    *k = 0;
    if (c->objective_kd_weight == 0) return OK;

    const char *other_tail = head ? "use objective.tail bucket" : "dump shards.kind full or hybrid";
    if (tail == TAIL_UNBIASED && m->kind == SHARD_TOPK)
        return refuse(c, m, tail, "nothing was drawn from the rest, so nothing estimates it", "use objective.tail bucket, or dump shards.kind hybrid or full");
    if (tail == TAIL_UNBIASED && draws && !forward)
        return refuse(c, m, tail, "only forward_kl is linear in the teacher's probabilities, so only its gradient is right on average over draws", other_tail);
    if (tail != TAIL_UNBIASED && !head)
        return refuse(c, m, tail, m->kind == SHARD_FULL ? "nothing is missing from full logits" : "there is no head whose rest could be treated so", "use objective.tail unbiased (auto)");
    if (tail == TAIL_DROP && !forward) return refuse(c, m, tail, "what is left is no distribution, and only forward_kl has a meaning without one", "use objective.tail bucket");
    if (tail == TAIL_RENORMALISE && weight_of(a, DIV_REVERSE_KL) > 0 && a->floor == 0)
        return refuse(c, m, tail, "reverse_kl is infinite where the teacher's probability is set to 0", "use objective.tail bucket, or give the teacher a floor (objective.floor)");

    *kind = m->kind == SHARD_FULL ? TARGET_FULL : tail == TAIL_UNBIASED ? TARGET_SAMPLES : TARGET_TOPK;
    *k = *kind == TARGET_TOPK ? m->k : *kind == TARGET_SAMPLES ? m->k + m->draws : 0;
    if (tail == TAIL_RENORMALISE || tail == TAIL_DROP)
        warn("objective.tail %s is biased: the student learns the teacher's top %d %s; bucket keeps the right mass outside them", tail_names[tail], m->k,
             tail == TAIL_DROP ? "and nothing about the rest" : "scaled up to 1");
    return OK;
}

char *targets_describe(const struct distill_args *a)
{
    char text[DIV_COUNT * 40] = "";
    size_t n = 0;
    for (int d = 0; d < DIV_COUNT; d++) {
        double weight = weight_of(a, (enum divergence)d);
        if (weight == 0) continue;
        if (n) n += (size_t)snprintf(text + n, sizeof text - n, " + ");
        if (a->divergence == DIV_MIX) n += (size_t)snprintf(text + n, sizeof text - n, "%g ", weight);
        n += (size_t)snprintf(text + n, sizeof text - n, "%s", divergence_names[d]);
    }
    return xstrdup(text);
}
