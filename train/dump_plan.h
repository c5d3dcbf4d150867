/* What teacher-dump --dry-run tells before the money is spent: whether the shards fit on the disk, how long the dump takes at the rate of
 * a few batches, and what K, m and N cost in gradient error on this text with this teacher. */
#ifndef TRAIN_DUMP_PLAN_H
#define TRAIN_DUMP_PLAN_H

#include "data/shard.h"
#include "train/load.h"

/* Bytes of the shards that are not sealed yet: 0 when dir holds all of them. */
int64_t plan_bytes_missing(const char *dir, const struct shard_manifest *m);
/* Free bytes where `dir` is or will be; -1: not known. */
int64_t plan_bytes_free(const char *dir);

enum { PLAN_K = 6, PLAN_N = 5 };
extern const int plan_k[PLAN_K], plan_n[PLAN_N];   /* 8 .. 256; 12 .. 200 */

/* Sums over positions. Errors are E |g' - g|^2, g the gradient of the full forward KL with respect to the student's logits times 1/T
 * (q - p), g' that of a stored target; the closed forms are in dump_plan.c. */
struct plan_sums {
    int64_t positions;
    double gradient;                          /* |g|^2 */
    double kept[PLAN_K], bucket[PLAN_K], renormalise[PLAN_K], hybrid_one[PLAN_K];   /* hybrid with m draws: hybrid_one / m */
    double sampled_one, unique[PLAN_N];       /* sampled with N draws: sampled_one / N; different ids among them */
};
/* Adds one position: teacher's and student's logits over V ids, both over T already. scratch: [2 V] doubles, [V] floats. */
void plan_add(struct plan_sums *s, const float *teacher, const float *student, int64_t V, double *scratch, float *order);

struct dump_plan {
    const struct config *c;
    struct model *model;                      /* the teacher, loaded */
    const struct corpus_rows *rows;
    const struct shard_manifest *manifest;
    int64_t tokens;                           /* of both datasets */
    int64_t batch_rows;
    int (*passes)(void *context, int64_t first_row, int64_t rows);   /* these rows through the dump as it is, but for the writing */
    void *context;
};
/* Runs a few batches and prints the rate and the table. */
int dump_plan_measure(const struct dump_plan *p);

#endif
