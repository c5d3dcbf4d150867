/* The LM head and the objective, in row chunks: logits -> loss and dlogits in place -> head gradient -> d_hidden. The [N, V] logits
 * never exist whole. Losses are reported as sums; the gradient is divided by the supervised targets of the whole optimizer step, so
 * that accumulation and batch split cannot change the objective. */
#ifndef TRAIN_OBJECTIVE_H
#define TRAIN_OBJECTIVE_H

#include "train/model.h"

struct objective {
    struct model *m;
    struct distill_args args;
    int64_t Vv;                    /* valid ids: columns past them are masked on both sides */
    enum target_kind kind; int k; float full_scale;
    /* TARGET_FULL from a teacher on the same device: its logits [N, teacher_stride], instead of the batch's stored ones; full_scale times them is t / T. */
    const void *teacher; enum dtype teacher_dtype; int64_t teacher_stride;
    /* device: one chunk of targets, and the sums */
    int32_t *head_ids; float *head_logprob, *tail_logmass, *weight; uint16_t *full;
    float *kd, *ce, *kd_squares, *ce_squares;   /* (head_rows) */
    bool measure;                  /* also the squared norms of the two parts of dlogits: a slower kernel, so not for every step */
    double *sums;                  /* [4]: T^2 D, cross entropy, over supervised targets since objective_reset(); squared norms of KD's and CE's dlogits times step_targets */
};

/* kind and k say what there must be room for; o->kind may be changed between runs to a kind that needs no more. */
struct objective *objective_new(struct model *m, const struct distill_args *args, int64_t Vv, enum target_kind kind, int k, struct memory_plan *plan);
void objective_free(struct objective *o);                       /* NULL-safe */
void objective_reset(struct objective *o);
/* Loss of the batch whose hidden states model_forward() left. With `backward`: d_hidden and the head's gradient, scaled by 1 / step_targets. */
void objective_run(struct objective *o, const struct batch *b, double step_targets, bool backward);
/* Waits for the device. */
void objective_read(struct objective *o, double *kd_sum, double *ce_sum);
/* Norms of KD's and of CE's part of the gradient with respect to the logits, over what ran with `measure` since objective_reset(). Waits. */
void objective_norms(struct objective *o, double step_targets, double *kd_norm, double *ce_norm);
/* Does the batch hold any teacher's probability at a supervised position? False: the KD part is absent, however it came about. */
bool objective_has_teacher(const struct objective *o, const struct batch *b);

#endif
