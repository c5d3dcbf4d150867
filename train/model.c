/* See model.h. block_forward and block_backward are mirrors: read them side by side. Weight gradients accumulate, activation
 * gradients overwrite, and `d` is the gradient of the residual stream, which every norm's backward joins (dx = dres + ...). */
#include "train/model.h"

#include <math.h>
#include <string.h>

#include "base/error.h"

static act *rows_at(const struct model *m, act *x, int64_t row, int64_t width) { return (act *)((char *)x + (size_t)(row * width) * dtype_width(m->be->act_dtype)); }

/* Byte `at` of the layout, which belongs to layer l (-1: to none), on the device. */
static void *weight_byte(const struct model *m, int l, int64_t at)
{
    bool on_host;
    if (m->o.layer_slots && l >= 0) return (char *)m->slot[m->entered % m->o.layer_slots] + (at - m->home.layout.block_at[l]);
    return weight_home_at(&m->home, at, &on_host);
}

static act *W(const struct model *m, const struct param *p) { return p ? weight_byte(m, p->layer, m->home.layout.at[p - m->params->p]) : NULL; }

static const struct param *matrix_of(const struct layer_params *p, enum product i)
{
    const struct param *const matrix[PRODUCT_COUNT] = {p->wqkv, p->wo, p->w_gate_up, p->w_down};
    return matrix[i];
}

static const struct param *bias_of(const struct layer_params *p, enum product i)
{
    const struct param *const bias[PRODUCT_COUNT] = {p->bqkv, p->bo, p->b_gate_up, p->b_down};
    return bias[i];
}

static bool in_fp8(const struct model *m, int l) { return l >= m->fp8_begin && l < m->fp8_end; }

static struct fp8 W8(const struct model *m, int l, enum product i)
{
    if (m->o.train) return m->fp8[l].w[i];
    const struct param *p = matrix_of(&m->params->layer[l], i);
    return (struct fp8){weight_byte(m, l, m->home.layout.at[p - m->params->p]), weight_byte(m, l, m->home.layout.scale_at[p - m->params->p])};
}
static grad *G(const struct model *m, const struct param *p) { return grad_at(m->be, m->grads, p); }

/* ---- memory ---- */

struct planner { struct memory_plan *plan; size_t act; int64_t N; const char *row, *key; };

static void plan_act(struct planner *p, act **slot, int64_t width) { memory_add(p->plan, p->row, p->key, slot, (size_t)(p->N * width) * p->act); }
static void plan_float(struct planner *p, float **slot, int64_t width) { memory_add(p->plan, p->row, p->key, slot, (size_t)(p->N * width) * sizeof(float)); }

static void plan_fp8(struct planner *p, struct fp8 *slot, int64_t width)
{
    memory_add(p->plan, p->row, p->key, &slot->q, (size_t)(p->N * width));
    memory_add(p->plan, p->row, p->key, &slot->scale, (size_t)p->N * sizeof(float));
}

/* The first block whose products are of the same kind as those of block l */
static int first_alike(const struct model *m, int l) { return in_fp8(m, l) ? m->fp8_begin : m->fp8_begin == 0 ? m->fp8_end : 0; }

/* Layer l keeps its own copy of what the policy keeps. The rest is shared by all: what products read, which is of two kinds, belongs to the first layer of its kind, and everything else to layer 0. */
static void plan_layer(struct model *m, struct planner *p, int l)
{
    const struct model_config *c = m->c;
    int64_t C = c->hidden_size, F = c->intermediate_size, q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    struct layer_acts *a = &m->acts[l], *first = &m->acts[0];
    enum recompute r = m->o.recompute;
    bool own_stream = l == 0 || m->o.train, own_attention = l == 0 || (m->o.train && r < RECOMPUTE_BLOCK);
    bool own_ffn = l == 0 || (m->o.train && r < RECOMPUTE_FFN);
    bool rounds = in_fp8(m, l), first_of_kind = l == first_alike(m, l), own_inputs = first_of_kind || (m->o.train && r < RECOMPUTE_SWIGLU_NORM);
    *a = *first;
    if (own_stream) plan_act(p, &a->res_attn, C);
    if (own_attention) {
        if (m->o.train) plan_act(p, &a->res_mlp, C);
        plan_float(p, &a->lse, c->n_heads);
        if (c->qk_norm) { plan_act(p, &a->qkv_raw, q + 2 * kv); plan_float(p, &a->rstd_qk, c->n_heads + c->n_kv_heads); }
        plan_act(p, &a->q, q);
        plan_act(p, &a->k, kv);
        plan_act(p, &a->v, kv);
        plan_act(p, &a->att, q);
        plan_float(p, &a->rstd_attn, 1);
        plan_float(p, &a->rstd_mlp, 1);
    }
    if (m->o.train ? !rounds && own_inputs : l == 0) plan_act(p, &a->norm_attn, C);
    if (!rounds && own_inputs && m->o.train) plan_act(p, &a->norm_mlp, C);
    struct planner ffn = *p;
    ffn.N = m->o.ffn_rows;
    if (own_ffn) plan_act(&ffn, &a->gate_up, 2 * F);
    /* In fp8 products read what is written as they read it: dh alone needs the memory of h. Where h is recomputed all blocks have one. */
    if (m->o.train && r >= RECOMPUTE_SWIGLU_NORM ? l == 0 : rounds ? first_of_kind && m->o.train : own_inputs) plan_act(&ffn, &a->h, F);
    for (int i = 0; i < PRODUCT_COUNT && rounds && own_inputs; i++)
        if (m->o.train || i != PRODUCT_GATE_UP) plan_fp8(i == PRODUCT_DOWN ? &ffn : p, &a->x8[i], matrix_of(&m->params->layer[l], i)->cols);
}

/* What a training model in fp8 has besides: both layouts of every matrix, and room for the gradient of the widest output. */
static void plan_products_fp8(struct model *m, struct planner *p)
{
    int64_t widest = 0;
    m->fp8 = xcalloc((size_t)m->c->n_layers, sizeof *m->fp8);
    for (int l = m->fp8_begin; l < m->fp8_end; l++)
        for (int i = 0; i < PRODUCT_COUNT; i++) {
            const struct param *w = matrix_of(&m->params->layer[l], i);
            struct planner rows = {p->plan, p->act, w->rows, "student weights in fp8", "the model, or train.matmul"}, cols = rows;
            cols.N = w->cols;
            plan_fp8(&rows, &m->fp8[l].w[i], w->cols);
            plan_fp8(&cols, &m->fp8[l].t[i], w->rows);
            widest = w->rows > widest ? w->rows : widest;
        }
    plan_fp8(p, &m->dy8, widest);
    memory_add(p->plan, "batch and tables", p->key, &m->census, CENSUS_COUNT * sizeof *m->census);
}

/* Slots are addresses that memory_commit() fills, so layers that share another's buffers copy the pointers afterwards. */
static void share_layers(struct model *m)
{
    for (int l = 0; l < m->c->n_layers; l++) {
        struct layer_acts *a = &m->acts[l], *first = &m->acts[0], *alike = &m->acts[first_alike(m, l)];
#define SHARE(field, from) if (!a->field) a->field = from->field
        SHARE(res_attn, first); SHARE(qkv_raw, first); SHARE(q, first); SHARE(k, first); SHARE(v, first); SHARE(att, first); SHARE(res_mlp, first);
        SHARE(gate_up, first); SHARE(rstd_attn, first); SHARE(rstd_mlp, first); SHARE(rstd_qk, first); SHARE(lse, first);
        if (!m->o.train) SHARE(norm_attn, first);
        if (m->o.recompute >= RECOMPUTE_SWIGLU_NORM) SHARE(h, first);
        SHARE(norm_attn, alike); SHARE(norm_mlp, alike); SHARE(h, alike);
        for (int i = 0; i < PRODUCT_COUNT; i++) { SHARE(x8[i].q, alike); SHARE(x8[i].scale, alike); }
#undef SHARE
        if (!m->o.train) {                                  /* one residual buffer, added to in place, and one for what the norms write */
            a->res_mlp = a->res_attn;
            a->norm_mlp = a->norm_attn;
            a->x8[PRODUCT_GATE_UP] = a->x8[PRODUCT_QKV];
        }
    }
    if (!m->o.train) {
        m->res_final = m->acts[0].res_attn;
        m->hidden = m->acts[0].norm_attn;
    }
}

struct model *model_new(struct backend *be, const struct model_config *c, const struct model_options *o, struct memory_plan *plan)
{
    struct model *m = xcalloc(1, sizeof *m);
    m->be = be;
    m->c = c;
    m->o = *o;
    if (!o->ffn_rows || o->ffn_rows > o->N) m->o.ffn_rows = o->N;
    CHECK(!o->train || (m->o.ffn_rows == o->N && !o->layer_slots && !o->mapped), "a model that trains keeps its activations and its weights");
    CHECK(!o->mapped || !o->layer_slots, "blocks come from the files or from host memory");
    m->params = params_new(c);
    m->acts = xcalloc((size_t)c->n_layers, sizeof *m->acts);
    size_t act_width = dtype_width(be->act_dtype);
    int64_t C = c->hidden_size, q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    const char *batch_key = o->train ? "train.micro_rows or corpus.row_length" : "the rows per pass or the row length";

    if (o->fp8) {
        m->fp8_begin = o->native_first;
        m->fp8_end = c->n_layers - o->native_last;
        CHECK(m->fp8_begin >= 0 && m->fp8_begin < m->fp8_end && m->fp8_end <= c->n_layers, "blocks [%d, %d) of %d in fp8", m->fp8_begin, m->fp8_end, c->n_layers);
    }
    m->home.layout = weight_layout_new(m->params, be->act_dtype, o->train ? 0 : m->fp8_begin, o->train ? 0 : m->fp8_end);
    int64_t blocks = m->home.layout.block_at[c->n_layers] - m->home.layout.block_at[0];
    if (o->layer_slots) {
        CHECK(o->layer_slots >= 2 && o->layer_slots <= STREAM_SLOTS, "%d places for streamed blocks", o->layer_slots);
        memory_add_host(plan, "blocks in host memory", o->blocks_key ? o->blocks_key : "the model", &m->home.host, (size_t)blocks);
        for (int i = 0; i < o->layer_slots; i++) memory_add(plan, "blocks on the device", "the model", &m->slot[i], (size_t)m->home.layout.block);
    }
    if (o->mapped) memory_add(plan, "blocks on the device", "the model", &m->home.block, (size_t)m->home.layout.block);
    memory_add(plan, o->train ? "student weights" : "weights", "the model", &m->weights, (size_t)(m->home.layout.total - (o->layer_slots || o->mapped ? blocks : 0)));
    if (o->train) memory_add(plan, "gradients", be->master ? "train.recipe" : "the model", &m->grads, (size_t)m->params->total * dtype_width(be->grad_dtype));
    size_t rope = (size_t)o->max_doc * (size_t)(c->head_dim / 2) * sizeof(float);
    memory_add(plan, "batch and tables", batch_key, &m->rope_cos, rope);
    memory_add(plan, "batch and tables", batch_key, &m->rope_sin, rope);
    memory_add(plan, "batch and tables", batch_key, &m->tokens, (size_t)o->N * sizeof(int32_t));
    memory_add(plan, "batch and tables", batch_key, &m->labels, (size_t)o->N * sizeof(int32_t));
    memory_add(plan, "batch and tables", batch_key, &m->position, (size_t)o->N * sizeof(int32_t));
    memory_add(plan, "batch and tables", batch_key, &m->doc_begin, (size_t)(o->N + 1) * sizeof(int32_t));

    struct planner p = {plan, act_width, o->N, "activations", o->train ? "train.micro_rows, or use train.recompute" : batch_key};
    for (int l = 0; l < c->n_layers; l++) plan_layer(m, &p, l);
    p.row = "activations outside layers";
    plan_act(&p, &m->qkv, q + 2 * kv);
    plan_act(&p, &m->block_out, C);
    plan_float(&p, &m->rstd_final, 1);
    if (o->train) {
        plan_act(&p, &m->res_final, C);
        plan_act(&p, &m->hidden, C);
        plan_act(&p, &m->d_hidden, C);
        plan_act(&p, &m->d_norm, C);
        plan_act(&p, &m->d_att, q);
        plan_act(&p, &m->dq, q);
        plan_act(&p, &m->dk, kv);
        plan_act(&p, &m->dv, kv);
        if (o->fp8) plan_products_fp8(m, &p);
    }
    if (o->cache) {
        m->cache.k = xcalloc((size_t)c->n_layers, sizeof *m->cache.k);
        m->cache.v = xcalloc((size_t)c->n_layers, sizeof *m->cache.v);
        m->cache.room = o->max_doc;
        for (int l = 0; l < c->n_layers; l++) {
            memory_add(plan, "key/value cache", "generate.max_tokens", &m->cache.k[l], (size_t)(o->max_doc * kv) * act_width);
            memory_add(plan, "key/value cache", "generate.max_tokens", &m->cache.v[l], (size_t)(o->max_doc * kv) * act_width);
        }
    }
    memory_add(plan, "logits", "the chunk of the LM head (train.chunk_tokens, dump.chunk_tokens)", &m->logits, (size_t)(o->head_rows * c->vocab_size) * act_width);
    return m;
}

void model_free(struct model *m)
{
    if (!m) return;
    weight_files_close(m->files);
    weight_layout_free(&m->home.layout);
    params_free(m->params);
    free(m->fp8);
    free(m->acts);
    free(m->cache.k);
    free(m->cache.v);
    free(m);
}

size_t model_scratch_bytes(const struct model *m, int k)
{
    const struct model_config *c = m->c;
    struct op_limits limits = {.N = m->o.N, .C = c->hidden_size, .F = c->intermediate_size, .V = c->vocab_size, .chunk_rows = m->o.head_rows,
                               .max_doc = m->o.max_doc, .Hq = c->n_heads, .Hkv = c->n_kv_heads, .D = c->head_dim, .K = k, .backward = m->o.train, .fp8 = m->o.fp8};
    return m->be->ops->scratch_bytes(m->be, &limits);
}

/* cos and sin as transformers computes them: the frequency and the angle are rounded to fp32 on the way. */
void model_ready(struct model *m)
{
    int half = m->c->head_dim / 2;
    size_t count = (size_t)m->o.max_doc * (size_t)half;
    double *inv_freq = xmalloc((size_t)half * sizeof *inv_freq), factor;
    float *cosine = xmalloc(count * sizeof *cosine), *sine = xmalloc(count * sizeof *sine);
    rope_inverse_frequencies(m->c, inv_freq, &factor);
    for (int64_t t = 0; t < m->o.max_doc; t++)
        for (int i = 0; i < half; i++) {
            float angle = (float)t * (float)inv_freq[i];
            cosine[t * half + i] = (float)(cos((double)angle) * factor);
            sine[t * half + i] = (float)(sin((double)angle) * factor);
        }
    m->be->ops->upload(m->be, m->rope_cos, cosine, count * sizeof *cosine);
    m->be->ops->upload(m->be, m->rope_sin, sine, count * sizeof *sine);
    m->be->ops->sync(m->be);
    free(inv_freq);
    free(cosine);
    free(sine);
    m->home.device = m->weights;
    share_layers(m);
}

void model_random_weights(struct model *m, uint64_t seed)
{
    CHECK(!m->o.mapped, "a mapped model has no place for random blocks");
    weights_random(m->params, m->be, &m->home, seed, m->logits, m->o.head_rows * m->c->vocab_size, m->slot[0]);
    model_weights_changed(m);
}

int model_load_weights(struct model *m, const struct tensor_set *set, const char *where, const int *layer_of)
{
    int rc;
    if (m->o.mapped) {
        rc = weight_files_open(&m->files, m->params, m->be, &m->home, set, where, layer_of);
        if (rc == OK) rc = weight_files_read(m->files, WEIGHTS_OUTSIDE_BLOCKS);
    } else rc = weights_load(m->params, m->be, &m->home, set, where, layer_of);
    if (rc == OK) model_weights_changed(m);
    return rc;
}

int model_check_device(const struct backend *be, const struct model_config *c, const char *where)
{
    int64_t vector = 16 / (int64_t)dtype_width(be->act_dtype), C = c->hidden_size, widest = be->widest_norm * (C % vector ? 1 : vector);
    if (be->widest_head && c->head_dim > be->widest_head)
        return fail(ERR_USAGE, "%s: heads of %d numbers, and device %s has attention for at most %d; use device cpu", where, c->head_dim, be->name, be->widest_head);
    if (widest && C > widest)
        return fail(ERR_USAGE, "%s: hidden size %lld, and device %s normalises rows of at most %lld numbers%s; use device cpu", where, (long long)C, be->name, (long long)widest,
                    C % vector ? " where they are no whole vectors of 16 bytes" : "");
    return OK;
}

int model_check_fp8(const struct backend *be, const struct model_config *c, int native_first, int native_last, const char *key)
{
    bool train = strncmp(key, "teacher", 7) != 0;           /* gradients of what the last two multiply with are rounded too */
    int64_t heads = c->n_heads * c->head_dim, widths[] = {c->hidden_size, c->intermediate_size, heads, heads + 2 * c->n_kv_heads * c->head_dim, 2 * c->intermediate_size};
    if (!be->fp8) return fail(ERR_USAGE, "%s is fp8, and device %s (%s) has no products in fp8, for which cuBLASLt has to be 12.9 or newer; install that or set it to native", key, be->name, be->description ? be->description : be->name);
    for (int i = 0; i < 5; i++) {
        if (widths[i] % be->fp8_multiple) return fail(ERR_USAGE, "%s is fp8, and device %s multiplies in fp8 only widths that are multiples of %d: the model has one of %lld; set it to native", key, be->name, be->fp8_multiple, (long long)widths[i]);
        if (be->fp8_widest && widths[i] > be->fp8_widest && (train || i < 3)) return fail(ERR_USAGE, "%s is fp8, and device %s rounds rows of at most %lld numbers: the model has one of %lld; set it to native", key, be->name, (long long)be->fp8_widest, (long long)widths[i]);
    }
    if (native_first + native_last >= c->n_layers)
        return fail(ERR_USAGE, "%s is fp8, blocks that stay native are %d at the front and %d at the end, and the model has %d: none is left; lower %s.fp8_native_first or fp8_native_last", key, native_first, native_last,
                    c->n_layers, train ? "train" : "teacher");
    return OK;
}

void model_weights_changed(struct model *m)
{
    if (!m->o.fp8 || !m->o.train) return;
    for (int l = m->fp8_begin; l < m->fp8_end; l++)
        for (int i = 0; i < PRODUCT_COUNT; i++) {
            const struct param *w = matrix_of(&m->params->layer[l], i);
            m->be->ops->quantize_weight(m->be, &m->fp8[l].w[i], &m->fp8[l].t[i], W(m, w), w->rows, w->cols);
        }
}

void model_set_batch(struct model *m, const struct batch *b)
{
    CHECK(b->n <= m->o.N && b->max_doc <= m->o.max_doc, "a batch of %lld positions for a model made for %lld", (long long)b->n, (long long)m->o.N);
    const struct ops *op = m->be->ops;
    op->upload(m->be, m->tokens, b->tokens, (size_t)b->n * sizeof *m->tokens);
    op->upload(m->be, m->labels, b->labels, (size_t)b->n * sizeof *m->labels);
    op->upload(m->be, m->position, b->position, (size_t)b->n * sizeof *m->position);
    op->upload(m->be, m->doc_begin, b->doc_begin, (size_t)(b->n_docs + 1) * sizeof *m->doc_begin);
    m->n = b->n;
    m->n_docs = b->n_docs;
    m->longest = b->max_doc;
}

/* ---- forward and backward ---- */

static struct attention_args attention_of(const struct model *m, int l)
{
    const struct model_config *c = m->c;
    return (struct attention_args){.doc_begin = m->doc_begin, .n_docs = m->n_docs, .max_doc = m->longest, .N = m->n, .Hq = c->n_heads, .Hkv = c->n_kv_heads,
                                   .D = c->head_dim, .scale = 1 / sqrtf((float)c->head_dim), .window = c->layer_slides && c->layer_slides[l] ? c->sliding_window : 0};
}

/* What the products of a block read. In fp8 these are matrices of their own, x8 and dy8: norms and swiglu write them in place of what only products read, as does rope's
 * backward, and norms beside the gradient of the residual stream; attention's results, and gradients of q, k, v that pass through norms of their own, are rounded when a product comes to them. */

static void input_rounded(struct model *m, int l, enum product i, int64_t N)
{
    if (m->count) m->be->ops->fp8_count(m->be, &m->census[CENSUS_ACTIVATIONS], &m->acts[l].x8[i], N, matrix_of(&m->params->layer[l], i)->cols);
}

static void gradient_rounded(struct model *m, int l, enum product i)
{
    if (m->count) m->be->ops->fp8_count(m->be, &m->census[CENSUS_GRADIENTS], &m->dy8, m->n, matrix_of(&m->params->layer[l], i)->rows);
}

static void round_input(struct model *m, int l, enum product i, const act *x)
{
    if (!in_fp8(m, l)) return;
    m->be->ops->quantize(m->be, &m->acts[l].x8[i], x, m->n, matrix_of(&m->params->layer[l], i)->cols);
    input_rounded(m, l, i, m->n);
}

static void round_gradient(struct model *m, int l, enum product i, const act *dy)
{
    if (!in_fp8(m, l)) return;
    m->be->ops->quantize(m->be, &m->dy8, dy, m->n, matrix_of(&m->params->layer[l], i)->rows);
    gradient_rounded(m, l, i);
}

/* s = x + r -> sum, and its norm: what product i, qkv or gate and up, reads */
static void norm_forward(struct model *m, int l, enum product i, act *sum, const act *x, const act *r)
{
    const struct ops *op = m->be->ops;
    const struct layer_params *p = &m->params->layer[l];
    const struct layer_acts *a = &m->acts[l];
    bool attn = i == PRODUCT_QKV;
    const act *w = W(m, attn ? p->attn_norm : p->mlp_norm);
    float *rstd = attn ? a->rstd_attn : a->rstd_mlp, eps = m->c->rms_norm_eps;
    if (in_fp8(m, l)) {
        op->rmsnorm_forward_fp8(m->be, &a->x8[i], rstd, sum, x, r, w, m->n, m->c->hidden_size, eps);
        input_rounded(m, l, i, m->n);
    } else op->rmsnorm_forward(m->be, attn ? a->norm_attn : a->norm_mlp, rstd, sum, x, r, w, m->n, m->c->hidden_size, eps);
}

/* dy, the gradient of a norm of x, and dres of x itself -> d_hidden, which is one of them. What reads it next is product i of layer l; -1: none of a block. */
static void norm_backward(struct model *m, const struct param *norm, const act *dres, const act *dy, const act *x, const float *rstd, int l, enum product i)
{
    const struct ops *op = m->be->ops;
    act *d = m->d_hidden;
    if (l >= 0 && in_fp8(m, l)) {
        op->rmsnorm_backward_fp8(m->be, d, &m->dy8, G(m, norm), dres, dy, x, W(m, norm), rstd, m->n, m->c->hidden_size);
        gradient_rounded(m, l, i);
    } else op->rmsnorm_backward(m->be, d, G(m, norm), dres, dy, x, W(m, norm), rstd, m->n, m->c->hidden_size);
}

/* gate_up -> h */
static void swiglu_forward(struct model *m, int l, int64_t N)
{
    const struct layer_acts *a = &m->acts[l];
    if (in_fp8(m, l)) {
        m->be->ops->swiglu_forward_fp8(m->be, &a->x8[PRODUCT_DOWN], a->gate_up, N, m->c->intermediate_size);
        input_rounded(m, l, PRODUCT_DOWN, N);
    } else m->be->ops->swiglu_forward(m->be, a->h, a->gate_up, N, m->c->intermediate_size);
}

/* dh, in h's memory -> d_gate_up, in gate_up's or, in fp8, dy8 */
static void swiglu_backward(struct model *m, int l)
{
    const struct layer_acts *a = &m->acts[l];
    if (in_fp8(m, l)) {
        m->be->ops->swiglu_backward_fp8(m->be, &m->dy8, a->h, a->gate_up, m->n, m->c->intermediate_size);
        gradient_rounded(m, l, PRODUCT_GATE_UP);
    } else m->be->ops->swiglu_backward(m->be, a->gate_up, a->h, a->gate_up, m->n, m->c->intermediate_size);
}

/* y (N,O) = x w^T + bias, x from its row `first` on; in fp8 x8 */
static void product_forward(struct model *m, int l, enum product i, act *y, act *x, int64_t first, int64_t N)
{
    const struct ops *op = m->be->ops;
    const struct param *w = matrix_of(&m->params->layer[l], i), *bias = bias_of(&m->params->layer[l], i);
    int64_t C = w->cols, O = w->rows;
    if (in_fp8(m, l)) {
        struct fp8 w8 = W8(m, l, i), x8 = {m->acts[l].x8[i].q + first * C, m->acts[l].x8[i].scale + first};
        op->linear_forward_fp8(m->be, y, &x8, &w8, W(m, bias), N, C, O);
    } else op->linear_forward(m->be, y, rows_at(m, x, first, C), W(m, w), W(m, bias), N, C, O);
}

/* dw += dy^T x, dbias += sums of dy, dx = dy w; in fp8 dy8 and x8 are read. dx may take the memory of x */
static void product_backward(struct model *m, int l, enum product i, act *dx, const act *dy, const act *x)
{
    const struct ops *op = m->be->ops;
    const struct param *w = matrix_of(&m->params->layer[l], i), *bias = bias_of(&m->params->layer[l], i);
    int64_t N = m->n, C = w->cols, O = w->rows;
    if (in_fp8(m, l)) {
        op->linear_backward_weight_fp8(m->be, G(m, w), G(m, bias), &m->dy8, &m->acts[l].x8[i], N, C, O);
        op->linear_forward_fp8(m->be, dx, &m->dy8, &m->fp8[l].t[i], NULL, N, O, C);
    } else {
        op->linear_backward_weight(m->be, G(m, w), G(m, bias), dy, x, N, C, O);
        op->linear_backward_input(m->be, dx, dy, W(m, w), N, C, O);
    }
}

void model_count_fp8(struct model *m)
{
    m->count = m->o.fp8 && m->o.train;
    if (m->count) m->be->ops->fill_zero(m->be, m->census, CENSUS_COUNT * sizeof *m->census);
}

void model_read_census(struct model *m, struct fp8_census census[CENSUS_COUNT])
{
    memset(census, 0, CENSUS_COUNT * sizeof *census);
    if (m->count) m->be->ops->download(m->be, census, m->census, CENSUS_COUNT * sizeof *census);
    m->count = false;
}

/* norm_attn -> q, k, v -> att -> res_mlp, norm_mlp -> gate_up */
static void attention_forward(struct model *m, int l)
{
    const struct ops *op = m->be->ops;
    const struct model_config *c = m->c;
    const struct layer_params *p = &m->params->layer[l];
    const struct layer_acts *a = &m->acts[l];
    int Hq = c->n_heads, Hkv = c->n_kv_heads, D = c->head_dim;
    int64_t N = m->n;
    struct attention_args args = attention_of(m, l);

    product_forward(m, l, PRODUCT_QKV, c->qk_norm ? a->qkv_raw : m->qkv, a->norm_attn, 0, N);
    if (c->qk_norm) op->qk_norm_forward(m->be, m->qkv, a->rstd_qk, a->qkv_raw, W(m, p->q_norm), W(m, p->k_norm), N, Hq, Hkv, D, c->rms_norm_eps);
    op->rope_forward(m->be, a->q, a->k, a->v, m->qkv, m->rope_cos, m->rope_sin, m->position, N, Hq, Hkv, D);
    if (m->o.cache) op->attention_cached(m->be, a->att, m->cache.k[l], m->cache.v[l], a->q, a->k, a->v, N, m->cache.past, Hq, Hkv, D, args.scale, args.window);
    else op->attention_forward(m->be, a->att, a->lse, a->q, a->k, a->v, &args);
    round_input(m, l, PRODUCT_ATTENTION_OUT, a->att);
    product_forward(m, l, PRODUCT_ATTENTION_OUT, m->block_out, a->att, 0, N);
}

/* The stream enters as x, with `r` (the MLP output of the layer below, NULL in layer 0) still to be added; it leaves as res_mlp with block_out still to be added. */
static void block_forward(struct model *m, int l, const act *x, const act *r)
{
    const struct layer_acts *a = &m->acts[l];
    int64_t N = m->n, C = m->c->hidden_size;

    norm_forward(m, l, PRODUCT_QKV, r ? a->res_attn : NULL, x, r);
    attention_forward(m, l);
    norm_forward(m, l, PRODUCT_GATE_UP, a->res_mlp, a->res_attn, m->block_out);
    for (int64_t first = 0; first < N; first += m->o.ffn_rows) {       /* one turn where activations are kept */
        int64_t rows = N - first < m->o.ffn_rows ? N - first : m->o.ffn_rows;
        product_forward(m, l, PRODUCT_GATE_UP, a->gate_up, a->norm_mlp, first, rows);
        swiglu_forward(m, l, rows);
        product_forward(m, l, PRODUCT_DOWN, rows_at(m, m->block_out, first, C), a->h, 0, rows);
    }
}

/* Streamed blocks: block n is layer n mod L. Asked for as far ahead as there are places, around the end of the pass into the next. */
static void block_ask(struct model *m)
{
    int slot = (int)(m->streamed % m->o.layer_slots);
    const int64_t *at = m->home.layout.block_at, l = m->streamed % m->c->n_layers;
    m->be->ops->stream_in(m->be, slot, m->slot[slot], (const char *)m->home.host + (at[l] - at[0]), (size_t)(at[l + 1] - at[l]));
    m->streamed++;
}

static void block_enter(struct model *m, int l)
{
    if (m->files && m->read_status == OK) m->read_status = weight_files_read(m->files, l);          /* in the order of the ops: the block before is done with its memory */
    if (!m->o.layer_slots) return;
    while (m->streamed < m->entered + m->o.layer_slots) block_ask(m);
    m->be->ops->stream_ready(m->be, (int)(m->entered % m->o.layer_slots));
}

static void block_leave(struct model *m)
{
    if (!m->o.layer_slots) return;
    m->be->ops->stream_free(m->be, (int)(m->entered % m->o.layer_slots));
    m->entered++;
}

/* Brings back what the policy dropped, by the same ops on the same inputs. */
static void block_recompute(struct model *m, int l)
{
    const struct layer_acts *a = &m->acts[l];
    enum recompute policy = m->o.recompute;
    int64_t N = m->n;
    if (policy == RECOMPUTE_NONE) return;

    norm_forward(m, l, PRODUCT_QKV, NULL, a->res_attn, NULL);
    if (policy == RECOMPUTE_BLOCK) {
        attention_forward(m, l);
        norm_forward(m, l, PRODUCT_GATE_UP, a->res_mlp, a->res_attn, m->block_out);
    } else {
        round_input(m, l, PRODUCT_ATTENTION_OUT, a->att);
        norm_forward(m, l, PRODUCT_GATE_UP, NULL, a->res_mlp, NULL);
    }
    if (policy >= RECOMPUTE_FFN) product_forward(m, l, PRODUCT_GATE_UP, a->gate_up, a->norm_mlp, 0, N);
    swiglu_forward(m, l, N);
}

/* d, and in fp8 its rounding in dy8: the gradient of the stream that leaves the layer -> of the stream that enters it. dh takes h's memory. */
static void block_backward(struct model *m, int l)
{
    const struct ops *op = m->be->ops;
    const struct model_config *c = m->c;
    const struct layer_params *p = &m->params->layer[l];
    const struct layer_acts *a = &m->acts[l];
    int Hq = c->n_heads, Hkv = c->n_kv_heads, D = c->head_dim;
    int64_t N = m->n;
    struct attention_args args = attention_of(m, l);
    act *d = m->d_hidden;

    block_recompute(m, l);
    product_backward(m, l, PRODUCT_DOWN, a->h, d, a->h);
    swiglu_backward(m, l);
    product_backward(m, l, PRODUCT_GATE_UP, m->d_norm, a->gate_up, a->norm_mlp);
    norm_backward(m, p->mlp_norm, d, m->d_norm, a->res_mlp, a->rstd_mlp, l, PRODUCT_ATTENTION_OUT);

    product_backward(m, l, PRODUCT_ATTENTION_OUT, m->d_att, d, a->att);
    op->attention_backward(m->be, m->dq, m->dk, m->dv, m->d_att, a->att, a->lse, a->q, a->k, a->v, &args);
    if (in_fp8(m, l) && !c->qk_norm) {
        op->rope_backward_fp8(m->be, &m->dy8, m->qkv, m->dq, m->dk, m->dv, m->rope_cos, m->rope_sin, m->position, N, Hq, Hkv, D);
        gradient_rounded(m, l, PRODUCT_QKV);
    } else {
        op->rope_backward(m->be, m->qkv, m->dq, m->dk, m->dv, m->rope_cos, m->rope_sin, m->position, N, Hq, Hkv, D);
        if (c->qk_norm)
            op->qk_norm_backward(m->be, m->qkv, G(m, p->q_norm), G(m, p->k_norm), m->qkv, a->qkv_raw, W(m, p->q_norm), W(m, p->k_norm), a->rstd_qk, N, Hq, Hkv, D);
        round_gradient(m, l, PRODUCT_QKV, m->qkv);
    }
    product_backward(m, l, PRODUCT_QKV, m->d_norm, m->qkv, a->norm_attn);
    norm_backward(m, p->attn_norm, d, m->d_norm, a->res_attn, a->rstd_attn, l - 1, PRODUCT_DOWN);
}

void model_forward(struct model *m)
{
    const struct ops *op = m->be->ops;
    const struct model_config *c = m->c;
    op->embed_forward(m->be, m->acts[0].res_attn, m->tokens, W(m, m->params->embed), m->n, c->hidden_size);
    for (int l = 0; l < c->n_layers; l++) {
        block_enter(m, l);
        block_forward(m, l, l ? m->acts[l - 1].res_mlp : m->acts[0].res_attn, l ? m->block_out : NULL);
        block_leave(m);
    }
    op->rmsnorm_forward(m->be, m->hidden, m->rstd_final, m->res_final, m->acts[c->n_layers - 1].res_mlp, m->block_out, W(m, m->params->norm),
                        m->n, c->hidden_size, c->rms_norm_eps);
}

void model_backward(struct model *m)
{
    const struct ops *op = m->be->ops;
    const struct model_config *c = m->c;
    norm_backward(m, m->params->norm, NULL, m->d_hidden, m->res_final, m->rstd_final, c->n_layers - 1, PRODUCT_DOWN);
    for (int l = c->n_layers - 1; l >= 0; l--) block_backward(m, l);
    op->embed_backward(m->be, G(m, m->params->embed), m->d_hidden, m->tokens, m->n, c->hidden_size, c->vocab_size);
}

void model_logits(struct model *m, int64_t first, int64_t rows)
{
    model_head(m, m->logits, rows_at(m, m->hidden, first, m->c->hidden_size), rows);
}

void model_head(struct model *m, act *logits, const act *hidden, int64_t rows)
{
    m->be->ops->linear_forward(m->be, logits, hidden, W(m, m->params->head), NULL, rows, m->c->hidden_size, m->c->vocab_size);
}

void model_forward_cached(struct model *m, const int32_t *tokens, int64_t n)
{
    CHECK(m->o.cache && n <= m->o.N && m->cache.past + n <= m->cache.room, "%lld tokens do not fit the cache", (long long)n);
    int32_t *position = xmalloc((size_t)n * sizeof *position);
    for (int64_t i = 0; i < n; i++) position[i] = (int32_t)(m->cache.past + i);
    m->be->ops->upload(m->be, m->tokens, tokens, (size_t)n * sizeof *tokens);
    m->be->ops->upload(m->be, m->position, position, (size_t)n * sizeof *position);
    m->be->ops->sync(m->be);
    free(position);
    m->n = n;
    model_forward(m);
    m->cache.past += n;
}
