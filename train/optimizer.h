/* AdamW over the parameter table: moments, the global norm, the clip. Flat arrays with the table's offsets. */
#ifndef TRAIN_OPTIMIZER_H
#define TRAIN_OPTIMIZER_H

#include "train/model.h"

struct optimizer {
    struct model *model;
    moment *m, *v;                 /* [total] */
    float *master;                 /* [total] or NULL: the weights are their own master */
    double *norm2;                 /* device: sum of squared gradients of the last optimizer_norm() */
    struct adamw_args args;        /* lr and step are set per step */
};

struct optimizer *optimizer_new(struct model *model, const struct adamw_args *args, struct memory_plan *plan);
void optimizer_free(struct optimizer *o);                 /* NULL-safe */
void optimizer_ready(struct optimizer *o);                /* after the commit: moments 0 */
/* Global norm of the gradients before clipping; waits for the device. */
double optimizer_norm(struct optimizer *o);
/* One update with the norm just measured; leaves everything as it is when that is not finite. step counts from 1. */
void optimizer_step(struct optimizer *o, int64_t step, double lr);

#endif
