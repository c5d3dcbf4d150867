/* See sampler.h. */
#include "train/sampler.h"

#include <math.h>

#include "base/error.h"
#include "base/rng.h"

enum { STREAM = 0x73616d70 };        /* keeps these draws apart from others that use the same seed */

struct sampler *sampler_new(int64_t V, double temperature, double top_p, uint64_t seed)
{
    CHECK(V >= 1 && temperature >= 0 && top_p > 0 && top_p <= 1, "V %lld, temperature %g, top_p %g", (long long)V, temperature, top_p);
    struct sampler *s = xcalloc(1, sizeof *s);
    *s = (struct sampler){.temperature = temperature, .top_p = top_p, .seed = seed, .V = V};
    s->ids = xmalloc((size_t)V * sizeof *s->ids);
    s->p = xmalloc((size_t)V * sizeof *s->p);
    return s;
}

void sampler_free(struct sampler *s)
{
    if (!s) return;
    free(s->ids);
    free(s->p);
    free(s);
}

static int32_t argmax(const float *x, int64_t n)
{
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++) if (x[i] > x[best]) best = i;
    return (int32_t)best;
}

static int descending(const void *a, const void *b, void *probabilities)
{
    int32_t i = *(const int32_t *)a, j = *(const int32_t *)b;
    const double *p = probabilities;
    return p[i] > p[j] ? -1 : p[i] < p[j] ? 1 : i < j ? -1 : i > j;
}

/* An id below (1 - top_p) / V is never needed: all such ids together hold less than 1 - top_p, so the others reach top_p without them.
 * What is left to sort is short even for a large vocabulary. */
static void keep_nucleus(struct sampler *s)
{
    double least = (1 - s->top_p) / (double)s->V, sum = 0;
    int64_t n = 0;
    for (int64_t i = 0; i < s->V; i++) if (s->p[i] >= least) s->ids[n++] = (int32_t)i;
    qsort_r(s->ids, (size_t)n, sizeof *s->ids, descending, s->p);
    double *kept = xmalloc((size_t)n * sizeof *kept);
    for (s->n = 0; s->n < n && sum < s->top_p; s->n++) sum += kept[s->n] = s->p[s->ids[s->n]];
    for (int64_t i = 0; i < s->n; i++) s->p[i] = kept[i] / sum;
    free(kept);
}

void sampler_distribution(struct sampler *s, const float *logits)
{
    int32_t best = argmax(logits, s->V);
    if (s->temperature == 0) {
        s->n = 1;
        s->ids[0] = best;
        s->p[0] = 1;
        return;
    }
    double sum = 0;
    for (int64_t i = 0; i < s->V; i++) sum += s->p[i] = exp(((double)logits[i] - logits[best]) / s->temperature);
    for (int64_t i = 0; i < s->V; i++) s->p[i] /= sum;
    if (s->top_p < 1) { keep_nucleus(s); return; }
    s->n = s->V;
    for (int64_t i = 0; i < s->V; i++) s->ids[i] = (int32_t)i;
}

int32_t sampler_pick(struct sampler *s, const float *logits, int64_t position)
{
    sampler_distribution(s, logits);
    struct philox r = philox4x32(s->seed, STREAM, (uint64_t)position);
    double u = uniform_double(r.v[0], r.v[1]), below = 0;
    int64_t last = 0;                                /* rounding may leave the sum a hair under u: then the last id that has any probability */
    for (int64_t i = 0; i < s->n; i++) {
        if (s->p[i] > 0) last = i;
        below += s->p[i];
        if (u < below) return s->ids[i];
    }
    return s->ids[last];
}
