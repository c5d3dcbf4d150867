/* Do the teacher's targets belong to the tokens beside them? A dataset whose targets are shifted by one against its tokens trains without a
 * complaint, towards the wrong thing. */
#ifndef TRAIN_ALIGNMENT_H
#define TRAIN_ALIGNMENT_H

#include "data/loader.h"

/* Mean log-probability, by the stored targets at position t, of the token at t+1 (which they are about), at t and at t+2. */
struct alignment {
    int64_t positions; double next, back, ahead;
    int64_t compared, disagree;   /* next tokens in the head whose stored label_logprob is there, too; those where the two differ */
};

/* Over the first supervised positions of the dataset whose three tokens lie in one document and differ from the next one; at most `most`. Tokens outside a
 * head count as an even share of the tail, tokens that were not drawn as half a draw. */
int alignment_measure(struct alignment *out, struct shard_dataset *d, const struct loader_options *o, int64_t most);

/* ERR_MISMATCH when a shifted reading is as likely as the right one, or label_logprob is not the head's; prints one line otherwise. `path` is for the message. */
int alignment_check(struct shard_dataset *d, const struct loader_options *o, const char *path);

#endif
