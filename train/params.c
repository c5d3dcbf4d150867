/* See params.h. params_new() is the model's architecture as a list. */
#include "train/params.h"

#include <math.h>
#include <string.h>

#include "base/error.h"

static int64_t align(int64_t n) { return (n + PARAM_ALIGN - 1) / PARAM_ALIGN * PARAM_ALIGN; }

/* Appends a parameter that stacks `n_parts` tensors named prefix + name[i] with rows[i] rows each. cols = 0: vectors. */
static const struct param *add(struct params *t, int layer, const char *const *names, const int64_t *rows, int n_parts, int64_t cols, float mean, float std)
{
    struct param *p = &t->p[t->n++];
    *p = (struct param){.cols = cols ? cols : 1, .n_dims = cols ? 2 : 1, .layer = layer, .decay = cols != 0, .init_mean = mean, .init_std = std,
                        .n_parts = n_parts, .offset = t->total};
    for (int i = 0; i < n_parts; i++) {
        struct param_part *part = &p->part[i];
        if (layer >= 0) snprintf(part->name, sizeof part->name, "model.layers.%d.%s", layer, names[i]);
        else snprintf(part->name, sizeof part->name, "%s", names[i]);
        part->row = p->rows;
        part->rows = rows[i];
        p->rows += rows[i];
    }
    p->count = p->rows * p->cols;
    t->total += align(p->count);
    t->parameters += p->count;
    return p;
}

static const struct param *matrix(struct params *t, int layer, const char *name, int64_t rows, int64_t cols, float std)
{
    return add(t, layer, &name, &rows, 1, cols, 0, std);
}

static const struct param *vector(struct params *t, int layer, const char *name, int64_t count, float value)
{
    return add(t, layer, &name, &count, 1, 0, value, 0);
}

struct params *params_new(const struct model_config *c)
{
    enum { PER_LAYER = 12 };
    struct params *t = xcalloc(1, sizeof *t);
    t->n_layers = c->n_layers;
    t->p = xcalloc((size_t)(PER_LAYER * c->n_layers + 3), sizeof *t->p);     /* fixed, so that pointers into it stay good */
    t->layer = xcalloc((size_t)c->n_layers, sizeof *t->layer);

    int64_t C = c->hidden_size, F = c->intermediate_size, D = c->head_dim, q = c->n_heads * D, kv = c->n_kv_heads * D;
    float std = (float)c->initializer_range, residual_std = std / sqrtf(2.0f * (float)c->n_layers);
    static const char *const qkv_weight[] = {"self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"};
    static const char *const qkv_bias[] = {"self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"};
    static const char *const gate_up_weight[] = {"mlp.gate_proj.weight", "mlp.up_proj.weight"};
    static const char *const gate_up_bias[] = {"mlp.gate_proj.bias", "mlp.up_proj.bias"};

    t->embed = matrix(t, -1, "model.embed_tokens.weight", c->vocab_size, C, std);
    for (int l = 0; l < c->n_layers; l++) {
        struct layer_params *p = &t->layer[l];
        p->attn_norm = vector(t, l, "input_layernorm.weight", C, 1);
        p->wqkv = add(t, l, qkv_weight, (int64_t[]){q, kv, kv}, 3, C, 0, std);
        if (c->qkv_bias) p->bqkv = add(t, l, qkv_bias, (int64_t[]){q, kv, kv}, 3, 0, 0, 0);
        if (c->qk_norm) {
            p->q_norm = vector(t, l, "self_attn.q_norm.weight", D, 1);
            p->k_norm = vector(t, l, "self_attn.k_norm.weight", D, 1);
        }
        p->wo = matrix(t, l, "self_attn.o_proj.weight", C, q, residual_std);
        if (c->o_bias) p->bo = vector(t, l, "self_attn.o_proj.bias", C, 0);
        p->mlp_norm = vector(t, l, "post_attention_layernorm.weight", C, 1);
        p->w_gate_up = add(t, l, gate_up_weight, (int64_t[]){F, F}, 2, C, 0, std);
        if (c->mlp_bias) p->b_gate_up = add(t, l, gate_up_bias, (int64_t[]){F, F}, 2, 0, 0, 0);
        p->w_down = matrix(t, l, "mlp.down_proj.weight", C, F, residual_std);
        if (c->mlp_bias) p->b_down = vector(t, l, "mlp.down_proj.bias", C, 0);
    }
    t->norm = vector(t, -1, "model.norm.weight", C, 1);
    t->head = c->tie_embeddings ? t->embed : matrix(t, -1, "lm_head.weight", c->vocab_size, C, std);
    return t;
}

void params_free(struct params *t)
{
    if (!t) return;
    free(t->p);
    free(t->layer);
    free(t);
}

int params_each(const struct params *t, int (*each)(void *, const char *, int, const int64_t *, int64_t), void *context)
{
    for (int i = 0; i < t->n; i++)
        for (int j = 0; j < t->p[i].n_parts; j++) {
            const struct param *p = &t->p[i];
            const struct param_part *part = &p->part[j];
            int64_t shape[2] = {part->rows, p->cols};
            int rc = each(context, part->name, p->n_dims, shape, p->offset + part->row * p->cols);
            if (rc != OK) return rc;
        }
    return OK;
}

static act *element(const struct backend *be, act *base, int64_t i) { return (act *)((char *)base + (size_t)i * dtype_width(be->act_dtype)); }

enum { STAGE = 1 << 20 };   /* floats moved at a time */

void params_init(const struct params *t, struct backend *be, act *weights, uint64_t seed)
{
    for (int i = 0; i < t->n; i++) {
        const struct param *p = &t->p[i];
        be->ops->random_normal(be, element(be, weights, p->offset), p->count, p->init_mean, p->init_std, seed, p->offset);
    }
}

static int check_shape(const struct tensor_view *v, const struct param *p, const struct param_part *part, const char *where)
{
    bool same = v->n_dims == p->n_dims && v->shape[0] == part->rows && (p->n_dims == 1 || v->shape[1] == p->cols);
    if (same) return OK;
    char has[128] = "", want[64];
    for (int d = 0; d < v->n_dims && strlen(has) < 96; d++) snprintf(has + strlen(has), 32, "%s%lld", d ? ", " : "", (long long)v->shape[d]);
    snprintf(want, sizeof want, p->n_dims == 2 ? "%lld, %lld" : "%lld", (long long)part->rows, (long long)p->cols);
    return fail(ERR_INPUT, "%s: tensor %s has shape [%s], config.json says [%s]", where, v->name, has, want);
}

/* Old Llama exports carry the rotary frequencies as a buffer; they follow from config.json. */
static bool is_buffer(const char *name)
{
    static const char suffix[] = ".rotary_emb.inv_freq";
    size_t n = strlen(name);
    return n > sizeof suffix - 1 && !strcmp(name + n - (sizeof suffix - 1), suffix);
}

/* With layer_of, the other layers of the file are no extra tensors; one more tensor in a layer that is read still is. */
static bool is_skipped_layer(const struct params *t, const char *name, const int *layer_of)
{
    int layer;
    if (!layer_of || sscanf(name, "model.layers.%9d.", &layer) != 1) return false;
    for (int l = 0; l < t->n_layers; l++) if (layer_of[l] == layer) return false;
    return true;
}

static int check_type(const struct tensor_view *v, const char *where)
{
    if (v->dtype == DTYPE_F32 || v->dtype == DTYPE_F16 || v->dtype == DTYPE_BF16 || (v->dtype == DTYPE_F8_E4M3 && v->scale)) return OK;
    if (v->dtype == DTYPE_F8_E4M3)
        return fail(ERR_INPUT, "%s: tensor %s has type F8_E4M3 and no scale that is understood; it needs weight_scale or weight_scale_inv beside it, and "
                               "a quantization_config in config.json that says what it is", where, v->name);
    return fail(ERR_INPUT, "%s: tensor %s has type %s; weights are read from F32, F16, BF16 and F8_E4M3", where, v->name, dtype_name(v->dtype));
}

int params_match(const struct params *t, const struct tensor_set *set, const char *where, const int *layer_of, params_take *take, void *context)
{
    int rc = OK, n_tensors = tensor_set_count(set);
    bool *used = xcalloc((size_t)n_tensors, sizeof *used);
    for (int i = 0; i < t->n; i++)
        for (int j = 0; j < t->p[i].n_parts; j++) {
            const struct param *p = &t->p[i];
            const struct param_part *part = &p->part[j];
            char name[sizeof part->name];
            snprintf(name, sizeof name, "%s", part->name);
            if (layer_of && p->layer >= 0) {
                int skip = 0;
                sscanf(part->name, "model.layers.%*d.%n", &skip);
                snprintf(name, sizeof name, "model.layers.%d.%s", layer_of[p->layer], part->name + skip);
            }
            const struct tensor_view *v = tensor_set_find(set, name);
            if (!v) { rc = fail(ERR_INPUT, "%s: tensor %s is missing; config.json asks for it", where, name); goto out; }
            TRY(check_shape(v, p, part, where));
            TRY(check_type(v, where));
            TRY(take(context, v, p->offset + part->row * p->cols));
            for (int k = 0; k < n_tensors; k++) if (tensor_set_at(set, k) == v) used[k] = true;
        }
    for (int k = 0; k < n_tensors; k++) {
        const struct tensor_view *v = tensor_set_at(set, k);
        if (used[k] || v->is_scale || is_buffer(v->name) || is_skipped_layer(t, v->name, layer_of)) continue;
        if (t->head == t->embed && !strcmp(v->name, "lm_head.weight")) {
            const struct tensor_view *e = tensor_set_find(set, t->embed->part[0].name);
            if (tensor_same(e, v)) continue;
            rc = fail(ERR_INPUT, "%s: config.json ties the embeddings, but lm_head.weight differs from model.embed_tokens.weight; "
                                 "set tie_word_embeddings to false if the head is meant", where);
            goto out;
        }
        rc = fail(ERR_INPUT, "%s: tensor %s belongs to no part of the model that config.json describes", where, v->name);
        goto out;
    }
out:
    free(used);
    return rc;
}

struct plain_load { struct backend *be; act *weights; float *stage; const char *where; };

static int load_tensor(void *context, const struct tensor_view *v, int64_t offset)
{
    struct plain_load *l = context;
    for (int64_t first = 0; first < v->count; first += STAGE) {
        int64_t n = v->count - first < STAGE ? v->count - first : STAGE;
        int rc = tensor_to_float(v, first, n, l->stage);
        if (rc != OK) return fail_in(rc, "%s", l->where);
        l->be->ops->upload_act(l->be, element(l->be, l->weights, offset + first), l->stage, n);
    }
    return OK;
}

int params_load(const struct params *t, struct backend *be, act *weights, const struct tensor_set *set, const char *where, const int *layer_of)
{
    struct plain_load l = {be, weights, xmalloc(STAGE * sizeof *l.stage), where};
    int rc = params_match(t, set, where, layer_of, load_tensor, &l);
    free(l.stage);
    return rc;
}
