/* The learning rate as a function of the step. */
#ifndef TRAIN_SCHEDULE_H
#define TRAIN_SCHEDULE_H

#include <stdint.h>

#include "train/config.h"

enum schedule_kind { SCHEDULE_COSINE, SCHEDULE_LINEAR, SCHEDULE_CONSTANT, SCHEDULE_WSD };

struct schedule {
    enum schedule_kind kind;
    double lr, final_ratio;              /* peak; the last step's share of it */
    double decay_fraction;               /* wsd: the last part of the run, linear down */
    int64_t warmup, steps;               /* linear from lr / warmup to lr */
};

/* ERR_USAGE when the warm-up does not fit into the steps. */
int schedule_make(struct schedule *s, const struct config *c, int64_t steps);
double schedule_lr(const struct schedule *s, int64_t step);   /* step from 0 */

#endif
