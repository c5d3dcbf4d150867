/* Where the parameters of a model live, and how they get there: from a checkpoint at the rate of the disk, or random.
 *
 * A model is resident (everything on the device) or streamed: an inference model whose blocks wait in host memory and come onto the device one after
 * another while the one before computes (model.c), with embedding, final norm and head resident.
 * Its parameters are stored in the activations' type, or, of an inference model in fp8, the matrices of the blocks as a byte per element and a scale per row (base/fp8.h). */
#ifndef TRAIN_WEIGHTS_H
#define TRAIN_WEIGHTS_H

#include "train/params.h"

struct weight_layout {
    int64_t *at;              /* [n] first byte of parameter i of the table */
    int64_t *scale_at;        /* [n] a matrix in fp8: first byte of its row scales; else -1 */
    int64_t begin, end;       /* bytes of all blocks; each takes (end - begin) / n_layers */
    int64_t total;            /* bytes of everything */
};
/* Without fp8 parameter i lies at its offset in the table. */
struct weight_layout weight_layout_new(const struct params *t, enum dtype act_dtype, bool fp8);
void weight_layout_free(struct weight_layout *layout);

struct weight_home {
    struct weight_layout layout;
    void *device;
    void *host;               /* NULL: resident. Else the bytes [begin, end) of the layout, from alloc_host; at `device` the layout lies without them */
};

/* Byte `at` of the layout; *on_host says on which side. */
void *weight_home_at(const struct weight_home *home, int64_t at, bool *on_host);

/* What params_load() does, by several threads through pinned memory: reading, conversion and copying overlap. The same refusals. A matrix that becomes fp8 is rounded here. */
int  weights_load(const struct params *t, struct backend *be, const struct weight_home *home, const struct tensor_set *set, const char *where, const int *layer_of);

/* params_init() for any home. Device memory to make parameters in: `stage`, of stage_count elements, before they are rounded to fp8 or go to the host; `packed`, of the size of a
 * block, for what is rounded and goes to the host. */
void weights_random(const struct params *t, struct backend *be, const struct weight_home *home, uint64_t seed, act *stage, int64_t stage_count, void *packed);

#endif
