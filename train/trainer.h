/* Everything a training run holds: opened by train_setup.c, used by the step in train.c. */
#ifndef TRAIN_TRAINER_H
#define TRAIN_TRAINER_H

#include "data/loader.h"
#include "train/checkpoint.h"
#include "train/config.h"
#include "train/metrics.h"
#include "train/objective.h"
#include "train/optimizer.h"
#include "train/schedule.h"
#include "train/student.h"

struct trainer {
    const struct config *c;
    struct student *student;
    struct tokenizer *tokenizer;              /* NULL: the run has none */
    struct shard_dataset *dataset, *heldout_dataset;   /* train.source shards; held-out may be absent */
    struct corpus_rows *rows, *heldout_rows;  /* train.source corpus */
    char data_id[SHA256_HEX];
    int64_t row_length, Vv;
    struct distill_args loss;                 /* objective.*, with the tail policy for the dataset's kind */
    enum target_kind target_kind; int k;      /* how the dataset's entries reach the objective: k per position */

    struct backend *be;
    struct memory_plan *plan;
    struct model *model;
    struct objective *objective;
    struct optimizer *optimizer;
    struct loader *loader;
    struct schedule schedule;
    int accum;                                /* micro-batches per step */
    struct batch **batch;                     /* [accum] copies: targets are counted over all of them before the first gradient */
    int64_t steps;                            /* of the whole run */
    struct train_state state;
    int zero_kd;                              /* steps in a row, of this process, whose KD part was exactly 0 */
    struct { bool known; double kd, ce; } share;      /* of the gradient's norm, as this process measured them last */
    struct metrics *metrics;
    int lock;                                 /* of run.dir, held to the end; -1: none */
};

/* Opens data, student, backend and memory; loads the newest checkpoint when the run is resumed. With `plan_only` it stops before the memory is
 * taken and prints the plan. */
int  trainer_open(struct trainer **out, const struct config *c, bool plan_only);
void trainer_close(struct trainer *t);        /* NULL-safe */
/* The arithmetic of a step up to its gradients: zeroed, then added up over n micro-batches, with the losses in the objective's sums. Nothing waits for the
 * device. train.c; distill bench measures the same function. */
void train_gradients(struct model *m, struct objective *o, struct batch *const *batch, int n, double divisor);
/* Loader options for the held-out data, and for training. */
int  trainer_open_loader(const struct trainer *t, bool heldout, struct loader **out);

#endif
