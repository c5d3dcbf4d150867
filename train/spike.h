/* Is a step's loss or gradient norm far out of the run's way? Judged against the steps before it, robustly: by their median, and by their median absolute deviation
 * (MAD), which one outlier among them does not move. Nothing is judged before SPIKE_LEAST steps are known. What is judged a spike does not become part of
 * what later steps are judged by. The state belongs to the checkpoint: a resumed run skips what the run that was not stopped skips. */
#ifndef TRAIN_SPIKE_H
#define TRAIN_SPIKE_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

enum { SPIKE_WINDOW = 64, SPIKE_LEAST = 16 };

struct spike_state {
    int64_t skipped, in_a_row;                            /* updates left out: of the whole run; since the last that was made */
    int n;                                                /* steps that are known, the oldest first */
    double loss[SPIKE_WINDOW], norm[SPIKE_WINDOW];
};

struct spike { const char *what; double value, median, deviation; };

/* True when loss or norm (both finite) is more than `threshold` deviations above its median. Deviation: 1.4826 MAD, which is the standard deviation of what is
 * normally distributed, but at least 2 % of the median for losses and 20 % for norms: where the run has hardly moved at all, a small step out of line is no spike. */
bool spike_judge(const struct spike_state *s, double threshold, double loss, double norm, struct spike *out);
void spike_remember(struct spike_state *s, double loss, double norm);   /* of a step that made its update */
void spike_skip(struct spike_state *s);                                 /* of one that did not */
void spike_forget(struct spike_state *s);                               /* what steps are judged by; how many were skipped stays */
json_t *spike_to_json(const struct spike_state *s);
int spike_from_json(struct spike_state *s, const json_t *value /* NULL: nothing is known */, const char *where);

#endif
