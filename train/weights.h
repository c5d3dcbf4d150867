/* Where the elements of a parameter table live, and how they get there: from a checkpoint at the rate of the disk, or random.
 *
 * A model is resident (everything on the device) or streamed: an inference model whose blocks wait in host memory and come onto the device one after
 * another while the one before computes (model.c), with embedding, final norm and head resident. */
#ifndef TRAIN_WEIGHTS_H
#define TRAIN_WEIGHTS_H

#include "train/params.h"

struct weight_home {
    act *device;
    act *host;                /* NULL: resident. Else elements [begin, end) of the table, all blocks; from alloc_host */
    int64_t begin, end;       /* at `device` the table lies without them */
};

/* Element `offset` of the table; *on_host says on which side. */
act *weight_home_at(const struct backend *be, const struct weight_home *home, int64_t offset, bool *on_host);

/* What params_load() does, by several threads through pinned memory: reading, conversion and copying overlap. The same refusals, and a file
 * that cannot be read to its end. */
int  weights_load(const struct params *t, struct backend *be, const struct weight_home *home, const struct tensor_set *set, const char *where, const int *layer_of);

/* params_init() for either home; `stage` is device memory of `stage_count` elements that blocks are made in on their way to the host. */
void weights_random(const struct params *t, struct backend *be, const struct weight_home *home, uint64_t seed, act *stage, int64_t stage_count);

#endif
