/* Where the parameters of a model live, and how they get there: from a checkpoint at the rate of the disk, or random.
 *
 * A model is resident (everything on the device) or streamed: an inference model whose blocks wait in host memory and come onto the device one after
 * another while the one before computes (model.c), with embedding, final norm and head resident. Or mapped: its blocks stay in the checkpoint's files, and each is
 * read anew whenever it is needed: for one pass of a model that neither memory holds.
 * Its parameters are stored in the activations' type, or, of an inference model in fp8, the matrices of its blocks in fp8 as a byte per element and a scale per row (base/fp8.h). */
#ifndef TRAIN_WEIGHTS_H
#define TRAIN_WEIGHTS_H

#include "train/params.h"

struct weight_layout {
    int64_t *at;              /* [n] first byte of parameter i of the table */
    int64_t *scale_at;        /* [n] a matrix in fp8: first byte of its row scales; else -1 */
    int n_layers;
    int64_t *block_at;        /* [L + 1] first byte of block l; the last: behind all */
    int64_t block;            /* bytes of the largest */
    int64_t total;            /* bytes of everything */
};
/* The matrices of blocks [fp8_begin, fp8_end) in fp8. Where there are none parameter i lies at its offset in the table. */
struct weight_layout weight_layout_new(const struct params *t, enum dtype act_dtype, int fp8_begin, int fp8_end);
void weight_layout_free(struct weight_layout *layout);

struct weight_home {
    struct weight_layout layout;
    void *device;             /* the layout; without the bytes of the blocks when they are elsewhere: */
    void *host;               /* streamed: here, from alloc_host; else NULL */
    void *block;              /* mapped: the one that was read last, on the device; else NULL */
};

/* Byte `at` of the layout; *on_host says on which side. */
void *weight_home_at(const struct weight_home *home, int64_t at, bool *on_host);

/* A checkpoint that was found to be this model's (params_load()'s refusals), cut into pieces, and the pinned memory it is read through. Borrows t, home and set. */
struct weight_files;
int  weight_files_open(struct weight_files **out, const struct params *t, struct backend *be, const struct weight_home *home, const struct tensor_set *set, const char *where,
                       const int *layer_of);
enum { WEIGHTS_ALL = -2, WEIGHTS_OUTSIDE_BLOCKS = -1 };
int  weight_files_read(struct weight_files *f, int layer /* or one of these */);   /* after the ops that read what is overwritten; the device has it when this returns. Fails where a file was cut */
void weight_files_close(struct weight_files *f);   /* NULL-safe */

/* What params_load() does, by several threads through pinned memory: reading, conversion and copying overlap. The same refusals, and a file
 * that cannot be read to its end. A matrix that becomes fp8 is rounded here. */
int  weights_load(const struct params *t, struct backend *be, const struct weight_home *home, const struct tensor_set *set, const char *where, const int *layer_of);

/* params_init() for any home. Device memory to make parameters in: `stage`, of stage_count elements, before they are rounded to fp8 or go to the host; `packed`, of the size of a
 * block, for what is rounded and goes to the host. */
void weights_random(const struct params *t, struct backend *be, const struct weight_home *home, uint64_t seed, act *stage, int64_t stage_count, void *packed);

#endif
