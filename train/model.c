/* See model.h. block_forward and block_backward are mirrors: read them side by side. Weight gradients accumulate, activation
 * gradients overwrite, and `d` is the gradient of the residual stream, which every norm's backward joins (dx = dres + ...). */
#include "train/model.h"

#include <math.h>

#include "base/error.h"

static act *rows_at(const struct model *m, act *x, int64_t row, int64_t width) { return (act *)((char *)x + (size_t)(row * width) * dtype_width(m->be->act_dtype)); }
/* elements of a block in the table, padding included */
static int64_t block_begin(const struct model *m, int l) { return l < m->c->n_layers ? m->params->layer[l].attn_norm->offset : m->params->norm->offset; }

static act *W(const struct model *m, const struct param *p)
{
    bool on_host;
    if (!p) return NULL;
    if (m->o.layer_slots && p->layer >= 0)
        return (act *)((char *)m->slot[m->entered % m->o.layer_slots] + (size_t)(p->offset - block_begin(m, p->layer)) * dtype_width(m->be->act_dtype));
    return weight_home_at(m->be, &m->home, p->offset, &on_host);
}
static grad *G(const struct model *m, const struct param *p) { return grad_at(m->be, m->grads, p); }

/* ---- memory ---- */

struct planner { struct memory_plan *plan; size_t act; int64_t N; const char *row, *key; };

static void plan_act(struct planner *p, act **slot, int64_t width) { memory_add(p->plan, p->row, p->key, slot, (size_t)(p->N * width) * p->act); }
static void plan_float(struct planner *p, float **slot, int64_t width) { memory_add(p->plan, p->row, p->key, slot, (size_t)(p->N * width) * sizeof(float)); }

/* Layer l keeps its own copy of what the policy keeps; the rest is layer 0's, shared by all. */
static void plan_layer(struct model *m, struct planner *p, int l)
{
    const struct model_config *c = m->c;
    int64_t C = c->hidden_size, F = c->intermediate_size, q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    struct layer_acts *a = &m->acts[l], *first = &m->acts[0];
    enum recompute r = m->o.recompute;
    bool own_stream = l == 0 || m->o.train, own_attention = l == 0 || (m->o.train && r < RECOMPUTE_BLOCK);
    bool own_ffn = l == 0 || (m->o.train && r < RECOMPUTE_FFN), own_cheap = l == 0 || (m->o.train && r < RECOMPUTE_SWIGLU_NORM);
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
    if (own_cheap) plan_act(p, &a->norm_attn, C);
    if (own_cheap && m->o.train) plan_act(p, &a->norm_mlp, C);
    struct planner ffn = *p;
    ffn.N = m->o.ffn_rows;
    if (own_ffn) plan_act(&ffn, &a->gate_up, 2 * F);
    if (own_cheap) plan_act(&ffn, &a->h, F);
}

/* Slots are addresses that memory_commit() fills, so layers that share layer 0's buffers copy the pointers afterwards. */
static void share_layers(struct model *m)
{
    for (int l = 0; l < m->c->n_layers; l++) {
        struct layer_acts *a = &m->acts[l], *first = &m->acts[0];
#define SHARE(field) if (!a->field) a->field = first->field
        SHARE(res_attn); SHARE(norm_attn); SHARE(qkv_raw); SHARE(q); SHARE(k); SHARE(v); SHARE(att); SHARE(res_mlp); SHARE(norm_mlp);
        SHARE(gate_up); SHARE(h); SHARE(rstd_attn); SHARE(rstd_mlp); SHARE(rstd_qk); SHARE(lse);
#undef SHARE
        if (!m->o.train) {                                  /* one residual buffer, added to in place, and one for what the norms write */
            a->res_mlp = a->res_attn;
            a->norm_mlp = a->norm_attn;
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
    CHECK(!o->train || (m->o.ffn_rows == o->N && !o->layer_slots), "a model that trains keeps its activations and its weights");
    m->params = params_new(c);
    m->acts = xcalloc((size_t)c->n_layers, sizeof *m->acts);
    size_t act_width = dtype_width(be->act_dtype);
    int64_t C = c->hidden_size, q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    const char *batch_key = o->train ? "train.micro_rows or corpus.row_length" : "the rows per pass or the row length";

    int64_t blocks = block_begin(m, c->n_layers) - block_begin(m, 0), block = blocks / c->n_layers;
    if (o->layer_slots) {
        CHECK(o->layer_slots >= 2 && o->layer_slots <= STREAM_SLOTS, "%d places for streamed blocks", o->layer_slots);
        m->home.begin = block_begin(m, 0);
        m->home.end = block_begin(m, c->n_layers);
        memory_add_host(plan, "blocks in host memory", "the model", &m->home.host, (size_t)blocks * act_width);
        for (int i = 0; i < o->layer_slots; i++) memory_add(plan, "blocks on the device", "the model", &m->slot[i], (size_t)block * act_width);
    }
    memory_add(plan, o->train ? "student weights" : "weights", "the model", &m->weights, (size_t)(m->params->total - (o->layer_slots ? blocks : 0)) * act_width);
    if (o->train) memory_add(plan, "gradients", "the model", &m->grads, (size_t)m->params->total * dtype_width(be->grad_dtype));
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
    params_free(m->params);
    free(m->acts);
    free(m->cache.k);
    free(m->cache.v);
    free(m);
}

size_t model_scratch_bytes(const struct model *m, int k)
{
    const struct model_config *c = m->c;
    struct op_limits limits = {.N = m->o.N, .C = c->hidden_size, .F = c->intermediate_size, .V = c->vocab_size, .chunk_rows = m->o.head_rows,
                               .max_doc = m->o.max_doc, .Hq = c->n_heads, .Hkv = c->n_kv_heads, .D = c->head_dim, .K = k, .backward = m->o.train};
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
    int64_t block = (m->home.end - m->home.begin) / m->c->n_layers;
    weights_random(m->params, m->be, &m->home, seed, m->slot[0], block);
}

int model_load_weights(struct model *m, const struct tensor_set *set, const char *where, const int *layer_of)
{
    return weights_load(m->params, m->be, &m->home, set, where, layer_of);
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

/* norm_attn -> q, k, v -> att -> res_mlp, norm_mlp -> gate_up */
static void attention_forward(struct model *m, int l)
{
    const struct ops *op = m->be->ops;
    const struct model_config *c = m->c;
    const struct layer_params *p = &m->params->layer[l];
    const struct layer_acts *a = &m->acts[l];
    int Hq = c->n_heads, Hkv = c->n_kv_heads, D = c->head_dim;
    int64_t N = m->n, C = c->hidden_size, q = Hq * D, w = (Hq + 2 * Hkv) * D;
    struct attention_args args = attention_of(m, l);

    op->linear_forward(m->be, c->qk_norm ? a->qkv_raw : m->qkv, a->norm_attn, W(m, p->wqkv), W(m, p->bqkv), N, C, w);
    if (c->qk_norm) op->qk_norm_forward(m->be, m->qkv, a->rstd_qk, a->qkv_raw, W(m, p->q_norm), W(m, p->k_norm), N, Hq, Hkv, D, c->rms_norm_eps);
    op->rope_forward(m->be, a->q, a->k, a->v, m->qkv, m->rope_cos, m->rope_sin, m->position, N, Hq, Hkv, D);
    if (m->o.cache) op->attention_cached(m->be, a->att, m->cache.k[l], m->cache.v[l], a->q, a->k, a->v, N, m->cache.past, Hq, Hkv, D, args.scale, args.window);
    else op->attention_forward(m->be, a->att, a->lse, a->q, a->k, a->v, &args);
    op->linear_forward(m->be, m->block_out, a->att, W(m, p->wo), W(m, p->bo), N, q, C);
}

/* The stream enters as x, with `r` (the MLP output of the layer below, NULL in layer 0) still to be added; it leaves as res_mlp with block_out still to be added. */
static void block_forward(struct model *m, int l, const act *x, const act *r)
{
    const struct ops *op = m->be->ops;
    const struct model_config *c = m->c;
    const struct layer_params *p = &m->params->layer[l];
    const struct layer_acts *a = &m->acts[l];
    int64_t N = m->n, C = c->hidden_size, F = c->intermediate_size;

    op->rmsnorm_forward(m->be, a->norm_attn, a->rstd_attn, r ? a->res_attn : NULL, x, r, W(m, p->attn_norm), N, C, c->rms_norm_eps);
    attention_forward(m, l);
    op->rmsnorm_forward(m->be, a->norm_mlp, a->rstd_mlp, a->res_mlp, a->res_attn, m->block_out, W(m, p->mlp_norm), N, C, c->rms_norm_eps);
    for (int64_t first = 0; first < N; first += m->o.ffn_rows) {       /* one turn where activations are kept */
        int64_t rows = N - first < m->o.ffn_rows ? N - first : m->o.ffn_rows;
        op->linear_forward(m->be, a->gate_up, rows_at(m, a->norm_mlp, first, C), W(m, p->w_gate_up), W(m, p->b_gate_up), rows, C, 2 * F);
        op->swiglu_forward(m->be, a->h, a->gate_up, rows, F);
        op->linear_forward(m->be, rows_at(m, m->block_out, first, C), a->h, W(m, p->w_down), W(m, p->b_down), rows, F, C);
    }
}

/* Streamed blocks: block n is layer n mod L. Asked for as far ahead as there are places, around the end of the pass into the next. */
static void block_ask(struct model *m)
{
    int L = m->c->n_layers, slot = (int)(m->streamed % m->o.layer_slots);
    size_t bytes = (size_t)(m->home.end - m->home.begin) / (size_t)L * dtype_width(m->be->act_dtype);
    m->be->ops->stream_in(m->be, slot, m->slot[slot], (const char *)m->home.host + (size_t)(m->streamed % L) * bytes, bytes);
    m->streamed++;
}

static void block_enter(struct model *m)
{
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
    const struct ops *op = m->be->ops;
    const struct model_config *c = m->c;
    const struct layer_params *p = &m->params->layer[l];
    const struct layer_acts *a = &m->acts[l];
    enum recompute policy = m->o.recompute;
    int64_t N = m->n, C = c->hidden_size, F = c->intermediate_size;
    if (policy == RECOMPUTE_NONE) return;

    op->rmsnorm_forward(m->be, a->norm_attn, a->rstd_attn, NULL, a->res_attn, NULL, W(m, p->attn_norm), N, C, c->rms_norm_eps);
    if (policy == RECOMPUTE_BLOCK) {
        attention_forward(m, l);
        op->rmsnorm_forward(m->be, a->norm_mlp, a->rstd_mlp, a->res_mlp, a->res_attn, m->block_out, W(m, p->mlp_norm), N, C, c->rms_norm_eps);
    } else op->rmsnorm_forward(m->be, a->norm_mlp, a->rstd_mlp, NULL, a->res_mlp, NULL, W(m, p->mlp_norm), N, C, c->rms_norm_eps);
    if (policy >= RECOMPUTE_FFN) op->linear_forward(m->be, a->gate_up, a->norm_mlp, W(m, p->w_gate_up), W(m, p->b_gate_up), N, C, 2 * F);
    op->swiglu_forward(m->be, a->h, a->gate_up, N, F);
}

/* d: the gradient of the stream that leaves the layer -> of the stream that enters it. dh takes h's memory, d_gate_up takes gate_up's. */
static void block_backward(struct model *m, int l)
{
    const struct ops *op = m->be->ops;
    const struct model_config *c = m->c;
    const struct layer_params *p = &m->params->layer[l];
    const struct layer_acts *a = &m->acts[l];
    int Hq = c->n_heads, Hkv = c->n_kv_heads, D = c->head_dim;
    int64_t N = m->n, C = c->hidden_size, F = c->intermediate_size, q = Hq * D, w = (Hq + 2 * Hkv) * D;
    struct attention_args args = attention_of(m, l);
    act *d = m->d_hidden;

    block_recompute(m, l);
    op->linear_backward_weight(m->be, G(m, p->w_down), G(m, p->b_down), d, a->h, N, F, C);
    op->linear_backward_input(m->be, a->h, d, W(m, p->w_down), N, F, C);
    op->swiglu_backward(m->be, a->gate_up, a->h, a->gate_up, N, F);
    op->linear_backward_weight(m->be, G(m, p->w_gate_up), G(m, p->b_gate_up), a->gate_up, a->norm_mlp, N, C, 2 * F);
    op->linear_backward_input(m->be, m->d_norm, a->gate_up, W(m, p->w_gate_up), N, C, 2 * F);
    op->rmsnorm_backward(m->be, d, G(m, p->mlp_norm), d, m->d_norm, a->res_mlp, W(m, p->mlp_norm), a->rstd_mlp, N, C);

    op->linear_backward_weight(m->be, G(m, p->wo), G(m, p->bo), d, a->att, N, q, C);
    op->linear_backward_input(m->be, m->d_att, d, W(m, p->wo), N, q, C);
    op->attention_backward(m->be, m->dq, m->dk, m->dv, m->d_att, a->att, a->lse, a->q, a->k, a->v, &args);
    op->rope_backward(m->be, m->qkv, m->dq, m->dk, m->dv, m->rope_cos, m->rope_sin, m->position, N, Hq, Hkv, D);
    if (c->qk_norm)
        op->qk_norm_backward(m->be, m->qkv, G(m, p->q_norm), G(m, p->k_norm), m->qkv, a->qkv_raw, W(m, p->q_norm), W(m, p->k_norm), a->rstd_qk, N, Hq, Hkv, D);
    op->linear_backward_weight(m->be, G(m, p->wqkv), G(m, p->bqkv), m->qkv, a->norm_attn, N, C, w);
    op->linear_backward_input(m->be, m->d_norm, m->qkv, W(m, p->wqkv), N, C, w);
    op->rmsnorm_backward(m->be, d, G(m, p->attn_norm), d, m->d_norm, a->res_attn, W(m, p->attn_norm), a->rstd_attn, N, C);
}

void model_forward(struct model *m)
{
    const struct ops *op = m->be->ops;
    const struct model_config *c = m->c;
    op->embed_forward(m->be, m->acts[0].res_attn, m->tokens, W(m, m->params->embed), m->n, c->hidden_size);
    for (int l = 0; l < c->n_layers; l++) {
        block_enter(m);
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
    op->rmsnorm_backward(m->be, m->d_hidden, G(m, m->params->norm), NULL, m->d_hidden, m->res_final, W(m, m->params->norm), m->rstd_final, m->n, c->hidden_size);
    for (int l = c->n_layers - 1; l >= 0; l--) block_backward(m, l);
    op->embed_backward(m->be, G(m, m->params->embed), m->d_hidden, m->tokens, m->n, c->hidden_size, c->vocab_size);
}

void model_logits(struct model *m, int64_t first, int64_t rows)
{
    int64_t C = m->c->hidden_size;
    m->be->ops->linear_forward(m->be, m->logits, rows_at(m, m->hidden, first, C), W(m, m->params->head), NULL, rows, C, m->c->vocab_size);
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
