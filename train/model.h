/* The model: forward and hand-written backward of a Llama-style decoder over packed rows, through backend.h.
 *
 * Owns the bound parameters, the activations and their recompute policy, the rotary table. Does not own the LM head's product
 * with the objective (objective.h), the optimizer, or files (load.h). N tokens, C width, F ffn width, W = (Hq+2Hkv) D. */
#ifndef TRAIN_MODEL_H
#define TRAIN_MODEL_H

#include "data/loader.h"
#include "data/model_config.h"
#include "kernels/backend.h"
#include "train/memory.h"
#include "train/params.h"
#include "train/weights.h"

/* What the backward finds kept from the forward; the rest is computed again from it, bit for bit the same. */
enum recompute { RECOMPUTE_NONE, RECOMPUTE_SWIGLU_NORM, RECOMPUTE_FFN, RECOMPUTE_BLOCK };

/* The matrices of a block, by what they multiply. */
enum product { PRODUCT_QKV, PRODUCT_ATTENTION_OUT, PRODUCT_GATE_UP, PRODUCT_DOWN, PRODUCT_COUNT };

struct layer_acts {
    act *res_attn;            /* (N, C)  residual stream entering attention */
    act *norm_attn;           /* (N, C) */
    act *qkv_raw;             /* (N, W)  before q/k norm; only with q/k norm */
    act *q, *k, *v;           /* (N, Hq, D), (N, Hkv, D), (N, Hkv, D)  rotated */
    act *att;                 /* (N, Hq, D) */
    act *res_mlp;             /* (N, C)  residual stream entering the MLP */
    act *norm_mlp;            /* (N, C) */
    act *gate_up;             /* (N, 2F) */
    act *h;                   /* (N, F) */
    float *rstd_attn, *rstd_mlp;   /* (N) */
    float *rstd_qk;           /* (N, Hq+Hkv) */
    float *lse;               /* N * Hq */
    struct fp8 x8[PRODUCT_COUNT];  /* norm_attn, att, norm_mlp, h as the products read them; only of blocks in fp8, which keep of these but att: when training h, for dh; else norm_attn, for hidden */
};

/* A training model's matrices as the products read them, made from its weights after every step: w (O,C), t (C,O). */
struct layer_fp8 { struct fp8 w[PRODUCT_COUNT], t[PRODUCT_COUNT]; };
enum { CENSUS_ACTIVATIONS, CENSUS_GRADIENTS, CENSUS_COUNT };

struct kv_cache { act **k, **v; int64_t past, room; };   /* one (room, Hkv, D) each per layer */

struct model_options {
    int64_t N;                /* positions per pass */
    int64_t max_doc;          /* longest document = largest position + 1 */
    int64_t head_rows;        /* rows of logits at a time: the chunk of the LM head */
    bool train;               /* gradients and activations for a backward */
    enum recompute recompute;
    bool cache;               /* generation: a KV cache of max_doc positions instead of packed attention */
    const char *blocks_key;   /* what makes streamed blocks smaller, for a message; NULL: the model alone */
    int64_t ffn_rows;         /* inference: positions that pass through the MLP at a time, its buffers being the widest; 0: all N. In fp8 on CUDA a multiple of 4, or all N */
    bool fp8;                 /* the products of the blocks in fp8; embedding, head and attention stay as they are. Only where model_check_fp8() is OK */
    int native_first, native_last;   /* but not of so many blocks at the two ends */
    int layer_slots;          /* inference: 0: blocks are resident; 2 .. STREAM_SLOTS: they are streamed from host memory through so many places */
    bool mapped;              /* inference: every pass reads each block from the checkpoint's files when its turn comes, into room for one */
};

struct model {
    struct backend *be;
    const struct model_config *c;
    struct params *params;
    struct model_options o;
    act *weights; grad *grads;            /* weights: home.device; of a model that trains, the table itself */
    struct weight_home home;
    struct weight_files *files; int read_status;    /* o.mapped: where blocks are read from, and the first failure of that: passes are worth nothing then */
    int fp8_begin, fp8_end;                         /* blocks whose products are in fp8 */
    struct layer_fp8 *fp8; struct fp8 dy8;          /* [L]; the gradient of the next product's output */
    struct fp8_census *census; bool count;          /* device, [CENSUS_COUNT]; count: what passes through products is counted there */
    void *slot[STREAM_SLOTS]; int64_t streamed, entered;   /* streamed: blocks asked for and blocks begun since the start; block n is layer n mod L in slot n mod layer_slots */
    float *rope_cos, *rope_sin;           /* (max_doc, D/2) */
    struct layer_acts *acts;              /* [L] */
    act *qkv, *block_out;                 /* scratch (N, W), (N, C) */
    act *res_final, *hidden; float *rstd_final;   /* (N, C): the stream into the final norm, and what the head reads */
    act *d_hidden;                        /* (N, C) gradient of hidden, written by the objective; then the gradient of the residual stream */
    act *d_norm, *d_att, *dq, *dk, *dv;   /* scratch of the backward */
    act *logits;                          /* (head_rows, V) */
    struct kv_cache cache;
    /* the batch on the device */
    int32_t *tokens, *labels, *position, *doc_begin; int64_t n, n_docs, longest;
};

/* Binds a model to a backend and announces its memory; usable after memory_commit() and model_ready(). Borrows `c`. */
struct model *model_new(struct backend *be, const struct model_config *c, const struct model_options *o, struct memory_plan *plan);
void model_ready(struct model *m);        /* after the commit: fills the rotary table */
void model_random_weights(struct model *m, uint64_t seed);      /* N(0, initializer_range) and so on: params_init */
int  model_load_weights(struct model *m, const struct tensor_set *set, const char *where, const int *layer_of);   /* params_match's refusals. o.mapped: `set` stays open as long as m */
/* ERR_USAGE: a model, `where`, with heads or rows that this device's kernels do not take. */
int  model_check_device(const struct backend *be, const struct model_config *c, const char *where);
/* ERR_USAGE: this device, or these widths on it, have no products in fp8, or no block is left for it; `key` asked for them. */
int  model_check_fp8(const struct backend *be, const struct model_config *c, int native_first, int native_last, const char *key);
/* To be called when a training model's weights were set or moved: rounds them to fp8. Does nothing without o.fp8. */
void model_weights_changed(struct model *m);
/* What rounding does in a measured step: model_count_fp8() before it, model_read_census() after it (waits for the device). Zeros without o.fp8. */
void model_count_fp8(struct model *m);
void model_read_census(struct model *m, struct fp8_census census[CENSUS_COUNT]);
void model_free(struct model *m);         /* NULL-safe; its memory belongs to the plan */
size_t model_scratch_bytes(const struct model *m, int k);   /* what ops need for this model with k targets per token */

void model_set_batch(struct model *m, const struct batch *b);   /* upload; b->n <= o.N */
void model_forward(struct model *m);                            /* batch -> hidden */
void model_backward(struct model *m);                           /* d_hidden -> grads (+=) */
/* logits (rows, V) of hidden rows [first, first + rows), rows <= head_rows, into m->logits */
void model_logits(struct model *m, int64_t first, int64_t rows);
void model_head(struct model *m, act *logits, const act *hidden, int64_t rows);   /* the same, of any hidden states */
/* Generation: the next n tokens of the one sequence -> hidden; the cache grows by n. */
void model_forward_cached(struct model *m, const int32_t *tokens, int64_t n);

#endif
