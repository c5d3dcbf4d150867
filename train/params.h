/* The parameter table: one list, built from the model config by one function that reads like the model. Loading, saving, init,
 * AdamW, clipping, golden tests and printing iterate over it; nobody lists the names twice.
 *
 * Offsets count elements and are the same in weights, gradients, m, v and master. Order: embedding, layer 0 .. L-1, final norm,
 * head; every layer is one contiguous range. Fused tensors (wqkv, gate_up) list the Hugging Face tensors they stack by rows. */
#ifndef TRAIN_PARAMS_H
#define TRAIN_PARAMS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "data/model_config.h"
#include "data/safetensors.h"
#include "kernels/backend.h"

enum { PARAM_ALIGN = 256 };                 /* elements: tensors start on this boundary, layers are padded to it */

struct param_part { char name[96]; int64_t row, rows; };   /* Hugging Face tensor = rows [row, row + rows) of the parameter */

struct param {
    int64_t rows, cols;                     /* matrix (rows, cols); vector: (count, 1) */
    int n_dims;                             /* of its parts' shapes: 1 or 2 */
    int64_t offset, count;
    int layer;                              /* -1 outside the blocks */
    bool decay;                             /* matrices, embeddings included; no vector */
    float init_mean, init_std;
    int n_parts; struct param_part part[3];
};

/* One layer's parameters by meaning; NULL where the architecture has none. */
struct layer_params {
    const struct param *attn_norm, *wqkv, *bqkv, *q_norm, *k_norm, *wo, *bo, *mlp_norm, *w_gate_up, *b_gate_up, *w_down, *b_down;
};

struct params {
    struct param *p; int n;
    int64_t total;                          /* elements, padding included */
    int64_t parameters;                     /* without padding */
    const struct param *embed, *norm, *head;   /* head == embed when tied */
    struct layer_params *layer; int n_layers;
};

struct params *params_new(const struct model_config *c);
void params_free(struct params *t);                                     /* NULL-safe */

/* weights <- random: N(0, initializer_range), the two products that write the residual stream scaled by (2 L)^-1/2 (Radford et al. 2019),
 * norms 1, biases 0. A function of (seed, element). */
void params_init(const struct params *t, struct backend *be, act *weights, uint64_t seed);

/* take(context, tensor, offset of its first element) for every tensor of `set` in table order. ERR_INPUT, by name: missing, extra, misshapen, of a type
 * that holds no weights (F8_E4M3 without a scale included); a head that contradicts tied embeddings. `where` is for messages. layer_of maps a layer of this table to the layer it is
 * read from (NULL: the same); layers of `set` that are not read are then no extra tensors. */
typedef int params_take(void *context, const struct tensor_view *v, int64_t offset);
int  params_match(const struct params *t, const struct tensor_set *set, const char *where, const int *layer_of, params_take *take, void *context);

/* weights <- tensors of `set`, converted, one after another through upload_act; weights.h has the fast way. */
int  params_load(const struct params *t, struct backend *be, act *weights, const struct tensor_set *set, const char *where, const int *layer_of);

/* The Hugging Face tensors of the table, in table order, `each(context, name, n_dims, shape, offset)`; offset in elements of the flat arrays. */
int  params_each(const struct params *t, int (*each)(void *context, const char *name, int n_dims, const int64_t *shape, int64_t offset), void *context);

static inline act *weight_at(const struct backend *be, act *base, const struct param *p)
{
    return p ? (act *)((char *)base + (size_t)p->offset * dtype_width(be->act_dtype)) : NULL;
}
static inline grad *grad_at(const struct backend *be, grad *base, const struct param *p)
{
    return p ? (grad *)((char *)base + (size_t)p->offset * dtype_width(be->grad_dtype)) : NULL;
}

#endif
