/* AdamW over the parameter table: moments, the fp32 master of weights that are not fp32 (recipe exact), the global norm, the clip. Flat arrays with
 * the table's offsets. */
#ifndef TRAIN_OPTIMIZER_H
#define TRAIN_OPTIMIZER_H

#include "train/model.h"

struct optimizer {
    struct model *model;
    moment *m, *v;                 /* [total] */
    float *master;                 /* [total], with be->master; NULL: the weights are their own master */
    bool master_filled;            /* by one of the two below, or by checkpoint_load() */
    double *norm2;                 /* device: sum of squared gradients of the last optimizer_queue_norm() */
    struct adamw_args args;        /* lr and step are set per step */
};

struct optimizer *optimizer_new(struct model *model, const struct adamw_args *args, struct memory_plan *plan);
void optimizer_free(struct optimizer *o);                 /* NULL-safe */
void optimizer_ready(struct optimizer *o);                /* after the commit: moments 0 */
/* To be called when the model has its first weights; do nothing without a master. A master begins as what the weights were rounded from, where that is there to be read: a
 * checkpoint's tensors (params_match's refusals). Random weights are drawn in the type that stores them, and are the master as they are. */
int  optimizer_load_master(struct optimizer *o, const struct tensor_set *set, const char *where, const int *layer_of);
void optimizer_master_from_weights(struct optimizer *o);
/* Global norm of the gradients before clipping: queued with the step's ops, and read, which waits for the device. One after the other: optimizer_norm(). */
void optimizer_queue_norm(struct optimizer *o);
double optimizer_read_norm(struct optimizer *o);
double optimizer_norm(struct optimizer *o);
/* One update with the norm just measured; leaves everything as it is when that is not finite. step counts from 1. */
void optimizer_step(struct optimizer *o, int64_t step, double lr);

#endif
