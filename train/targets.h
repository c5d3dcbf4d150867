/* What a run learns from its dataset: the divergences that objective.divergence names, and the tail policy that the dataset's kind allows.
 * The table of what each combination computes is in README.md, "The objective". */
#ifndef TRAIN_TARGETS_H
#define TRAIN_TARGETS_H

#include "data/shard.h"
#include "kernels/backend.h"
#include "train/config.h"

/* objective.* but the tail -> arguments of the op. "forward_kl", or a weighted sum such as "0.7 forward_kl + 0.3 reverse_kl". ERR_USAGE names what is wrong. */
int targets_objective(struct distill_args *out, const struct config *c);

/* The tail policy for a dataset of this kind, and how its entries reach the op: kind, and k entries per position. ERR_MISMATCH: a combination that has no
 * meaning, with the reason and the way out. Warns where it is biased. */
int targets_choose(struct distill_args *a, enum target_kind *kind, int *k, const struct config *c, const struct shard_manifest *m);

/* "0.7 forward_kl + 0.3 jsd", for the start of a run; malloc'd */
char *targets_describe(const struct distill_args *a);
const char *tail_name(enum tail_policy tail);

#endif
