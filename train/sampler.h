/* Sampling: one row of logits -> the next token. Greedy, temperature, and nucleus (top-p) sampling (Holtzman et al. 2020), all in double.
 *
 *     p_i = exp((z_i - max z) / T) / sum;  kept: the shortest list by descending p (ties: lower id first) whose sum reaches top_p
 *
 * A draw is a function of (seed, position) and the logits alone. Does not own the model or the text. */
#ifndef TRAIN_SAMPLER_H
#define TRAIN_SAMPLER_H

#include <stdint.h>

struct sampler {
    double temperature;              /* 0: the largest logit, ties to the lower id */
    double top_p;                    /* (0, 1]; 1 keeps everything */
    uint64_t seed;
    int64_t V;                       /* ids 0 .. V-1 take part */
    /* the distribution last drawn from */
    int64_t n;                       /* entries that are kept */
    int32_t *ids;                    /* [V] in order of ids when top_p is 1, else by descending probability */
    double *p;                       /* [V] sums to 1 over the n */
};

struct sampler *sampler_new(int64_t V, double temperature, double top_p, uint64_t seed);
void sampler_free(struct sampler *s);                        /* NULL-safe */
/* logits [V] -> ids, p, n. Finite, or -INFINITY for an id that may not be drawn; one is finite. */
void sampler_distribution(struct sampler *s, const float *logits);
/* The token at `position` of the sequence. */
int32_t sampler_pick(struct sampler *s, const float *logits, int64_t position);

#endif
