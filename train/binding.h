/* Does a dataset belong to this run's student and configuration? train takes tokens, row length, kind and temperatures from the dataset; what
 * contradicts it is refused with both values. */
#ifndef TRAIN_BINDING_H
#define TRAIN_BINDING_H

#include "data/shard.h"
#include "data/tokenizer.h"
#include "train/student.h"

/* Tokenizer, vocabulary, and keys of the configuration that name another dataset. tokenizer: the student's, or NULL. ERR_MISMATCH. */
int binding_check(const struct shard_manifest *m, const struct config *c, const struct student *s, const struct tokenizer *tokenizer);

#endif
