/* A model as GGUF: what llama.cpp calls the keys and tensors of the architectures it shares with us.
 *
 * Tensor names: docs/gguf.md. Rows of q and k are reordered in the "llama" architecture, whose RoPE pairs neighbours: row 2 i + j of a head is
 * Hugging Face's row j D/2 + i. llama3 scaling travels as rope_freqs.weight, the divisors of the frequencies. */
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "train/export.h"

static const char *architecture(const struct model_config *c)
{
    return c->arch == ARCH_QWEN2 ? "qwen2" : c->arch == ARCH_QWEN3 ? "qwen3" : "llama";
}

static bool pairs_neighbours(const struct model_config *c) { return !strcmp(architecture(c), "llama"); }

int export_gguf_check(const struct export *x)
{
    const struct model_config *c = x->source->config;
    const char *path = x->source->path;
    if (c->layer_slides) return fail(ERR_USAGE, "%s: slides its attention window, which llama.cpp does not do for %s; export safetensors, or set sliding_window to null if every text is shorter", path, architecture(c));
    if (c->rope.type == ROPE_YARN && !c->rope.truncate) return fail(ERR_USAGE, "%s: rope truncate: false has no key in GGUF; export safetensors", path);
    if (!x->tokenizer) return fail(ERR_USAGE, "%s: has no tokenizer.json, and a GGUF file holds the tokenizer; set tokenizer.path", path);
    for (int32_t id = 0; id < tokenizer_vocab_size(x->tokenizer); id++)
        if (tokenizer_token_kind(x->tokenizer, id) == TOKEN_BYTE)
            return fail(ERR_USAGE, "%s: the tokenizer falls back to bytes (SentencePiece style); its GGUF form needs scores that tokenizer.json does not hold; export safetensors", path);
    if (!tokenizer_gguf_pre(x->tokenizer))
        return fail(ERR_USAGE, "%s: llama.cpp has no pre-tokenizer that splits as this tokenizer.json does; export safetensors", path);
    return OK;
}

/* ---- metadata ---- */

static void put_u32(struct gguf_writer *w, const char *arch, const char *key, int64_t v)
{
    char name[96];
    snprintf(name, sizeof name, "%s.%s", arch, key);
    gguf_put_u32(w, name, (uint32_t)v);
}

static void put_f32(struct gguf_writer *w, const char *arch, const char *key, double v)
{
    char name[96];
    snprintf(name, sizeof name, "%s.%s", arch, key);
    gguf_put_f32(w, name, (float)v);
}

static void put_rope(struct gguf_writer *w, const char *arch, const struct rope_config *r)
{
    char key[96];
    put_f32(w, arch, "rope.freq_base", r->theta);
    if (r->type != ROPE_LINEAR && r->type != ROPE_YARN) return;
    snprintf(key, sizeof key, "%s.rope.scaling.type", arch);
    gguf_put_string(w, key, r->type == ROPE_YARN ? "yarn" : "linear");
    put_f32(w, arch, "rope.scaling.factor", r->factor);
    if (r->type == ROPE_LINEAR) return;
    put_u32(w, arch, "rope.scaling.original_context_length", r->original_max_position);
    /* llama.cpp multiplies 0.1 ln factor + 1 itself */
    double own = 0.1 * log(r->factor) + 1;
    if (fabs(r->attention_factor / own - 1) > 1e-6) put_f32(w, arch, "rope.scaling.attn_factor", r->attention_factor / own);
    if (r->beta_fast != 32) put_f32(w, arch, "rope.scaling.yarn_beta_fast", r->beta_fast);
    if (r->beta_slow != 1) put_f32(w, arch, "rope.scaling.yarn_beta_slow", r->beta_slow);
}

static void put_model(struct gguf_writer *w, const struct export *x)
{
    const struct model_config *c = x->source->config;
    const char *arch = architecture(c), *name = strrchr(x->source->path, '/');
    uint32_t file_type = x->dtype == GGUF_DTYPE_F32 ? 0 : x->dtype == GGUF_DTYPE_F16 ? 1 : x->dtype == GGUF_DTYPE_Q8_0 ? 7 : 32;
    gguf_put_string(w, "general.architecture", arch);
    gguf_put_string(w, "general.type", "model");
    gguf_put_string(w, "general.name", name && name[1] ? name + 1 : x->source->path);
    gguf_put_u32(w, "general.file_type", file_type);
    gguf_put_u32(w, "general.quantization_version", 2);
    put_u32(w, arch, "block_count", c->n_layers);
    put_u32(w, arch, "context_length", c->max_position);
    put_u32(w, arch, "embedding_length", c->hidden_size);
    put_u32(w, arch, "feed_forward_length", c->intermediate_size);
    put_u32(w, arch, "attention.head_count", c->n_heads);
    put_u32(w, arch, "attention.head_count_kv", c->n_kv_heads);
    put_f32(w, arch, "attention.layer_norm_rms_epsilon", c->rms_norm_eps);
    put_u32(w, arch, "attention.key_length", c->head_dim);
    put_u32(w, arch, "attention.value_length", c->head_dim);
    put_u32(w, arch, "rope.dimension_count", c->head_dim);
    put_u32(w, arch, "vocab_size", c->vocab_size);
    put_rope(w, arch, &c->rope);
}

static void put_tokenizer(struct gguf_writer *w, const struct export *x)
{
    enum { NORMAL = 1, CONTROL = 3, USER_DEFINED = 4, UNUSED = 5 };
    const struct tokenizer *t = x->tokenizer;
    const struct model_config *c = x->source->config;
    int64_t V = c->vocab_size, defined = tokenizer_vocab_size(t);
    gguf_put_string(w, "tokenizer.ggml.model", "gpt2");
    gguf_put_string(w, "tokenizer.ggml.pre", tokenizer_gguf_pre(t));
    gguf_put_array(w, "tokenizer.ggml.tokens", GGUF_STRING, (uint64_t)V);
    for (int32_t id = 0; id < V; id++) {
        const char *text = id < defined ? tokenizer_token_text(t, id) : NULL;
        char pad[32];
        int n = snprintf(pad, sizeof pad, "[PAD%d]", id);
        if (text) gguf_item_string(w, text, strlen(text));
        else gguf_item_string(w, pad, (size_t)n);
    }
    gguf_put_array(w, "tokenizer.ggml.token_type", GGUF_I32, (uint64_t)V);
    for (int32_t id = 0; id < V; id++) {
        enum token_kind kind = id < defined ? tokenizer_token_kind(t, id) : TOKEN_HOLE;
        gguf_item_i32(w, kind == TOKEN_HOLE ? UNUSED : kind == TOKEN_SPECIAL ? CONTROL : kind == TOKEN_ADDED ? USER_DEFINED : NORMAL);
    }
    gguf_put_array(w, "tokenizer.ggml.merges", GGUF_STRING, (uint64_t)tokenizer_n_merges(t));
    const char *left, *right;
    for (int64_t rank = 0; tokenizer_merge(t, rank, &left, &right); rank++) {
        char *line = xasprintf("%s %s", left, right);
        gguf_item_string(w, line, strlen(line));
        free(line);
    }
    int32_t bos = tokenizer_bos(t) >= 0 ? tokenizer_bos(t) : c->bos, eos = tokenizer_eos(t) >= 0 ? tokenizer_eos(t) : c->eos[0], pad = tokenizer_pad(t) >= 0 ? tokenizer_pad(t) : c->pad;
    if (bos >= 0) gguf_put_u32(w, "tokenizer.ggml.bos_token_id", (uint32_t)bos);
    if (eos >= 0) gguf_put_u32(w, "tokenizer.ggml.eos_token_id", (uint32_t)eos);
    if (pad >= 0) gguf_put_u32(w, "tokenizer.ggml.padding_token_id", (uint32_t)pad);
    gguf_put_bool(w, "tokenizer.ggml.add_bos_token", tokenizer_add_bos(t));
    if (tokenizer_chat_template(t)) gguf_put_string(w, "tokenizer.chat_template", tokenizer_chat_template(t));
}

/* ---- tensors ---- */

/* "model.layers.3.self_attn.q_proj.weight" -> "blk.3.attn_q.weight" */
static void gguf_name(const char *hf, char *name, size_t room)
{
    static const struct { const char *hf, *gguf; } parts[] = {
        {"input_layernorm", "attn_norm"}, {"self_attn.q_proj", "attn_q"}, {"self_attn.k_proj", "attn_k"}, {"self_attn.v_proj", "attn_v"}, {"self_attn.o_proj", "attn_output"},
        {"self_attn.q_norm", "attn_q_norm"}, {"self_attn.k_norm", "attn_k_norm"}, {"post_attention_layernorm", "ffn_norm"}, {"mlp.gate_proj", "ffn_gate"}, {"mlp.up_proj", "ffn_up"},
        {"mlp.down_proj", "ffn_down"}};
    int layer, skip = 0;
    if (sscanf(hf, "model.layers.%d.%n", &layer, &skip) == 1 && skip) {
        const char *rest = hf + skip, *dot = strrchr(rest, '.');
        for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
            if (strlen(parts[i].hf) == (size_t)(dot - rest) && !strncmp(rest, parts[i].hf, (size_t)(dot - rest))) {
                snprintf(name, room, "blk.%d.%s%s", layer, parts[i].gguf, dot);
                return;
            }
        CHECK(false, "tensor %s has no GGUF name", hf);
    }
    snprintf(name, room, "%s", !strcmp(hf, "model.embed_tokens.weight") ? "token_embd.weight" : !strcmp(hf, "model.norm.weight") ? "output_norm.weight" : "output.weight");
}

/* A tensor to write or read: how its rows are ordered, and where its values come from. */
struct item {
    const struct tensor_view *view;      /* NULL: `values` */
    float *values;
    int64_t columns;
    int half;                            /* D/2 when the rows of a head are reordered, else 0 */
};

static int64_t hf_row(const struct item *t, int64_t row)
{
    if (!t->half) return row;
    int64_t head = row / (2 * t->half), r = row % (2 * t->half);
    return head * 2 * t->half + (r % 2) * t->half + r / 2;
}

static int reorders(const struct export *x, const char *hf)
{
    return pairs_neighbours(x->source->config) && (strstr(hf, ".q_proj.") || strstr(hf, ".k_proj.")) ? x->source->config->head_dim / 2 : 0;
}

static int fill(void *context, const void *user, int64_t first, int64_t count, float *out)
{
    (void)context;
    const struct item *t = user;
    if (!t->view) { memcpy(out, t->values + first, (size_t)count * sizeof *out); return OK; }
    while (count) {
        int64_t row = first / t->columns, column = first % t->columns, n = t->half ? t->columns - column : count;
        if (n > count) n = count;
        int rc = tensor_to_float(t->view, hf_row(t, row) * t->columns + column, n, out);
        if (rc != OK) return rc;
        first += n; count -= n; out += n;
    }
    return OK;
}

struct list { const struct export *x; struct gguf_writer *w; struct item *item; int n; };

static int add_tensor(void *context, const char *name, int n_dims, const int64_t *shape, int64_t offset)
{
    (void)offset;
    struct list *l = context;
    char gguf[96];
    struct item *t = &l->item[l->n++];
    *t = (struct item){.view = tensor_set_find(l->x->source->tensors, name), .columns = n_dims == 2 ? shape[1] : 1, .half = reorders(l->x, name)};
    gguf_name(name, gguf, sizeof gguf);
    gguf_add_tensor(l->w, gguf, export_dtype(l->x, n_dims, t->columns), n_dims, shape, t);
    return OK;
}

static int count_tensor(void *context, const char *name, int n_dims, const int64_t *shape, int64_t offset)
{
    (void)name; (void)n_dims; (void)shape; (void)offset;
    ++*(int *)context;
    return OK;
}

int export_gguf_write(const struct export *x, const char *path)
{
    const struct model_config *c = x->source->config;
    int n = 0, half = c->head_dim / 2;
    params_each(x->model->params, count_tensor, &n);
    struct list l = {x, gguf_writer_new(), xcalloc((size_t)(n + 1), sizeof *l.item), 0};
    float *divisors = xmalloc((size_t)half * sizeof *divisors);
    put_model(l.w, x);
    put_tokenizer(l.w, x);
    params_each(x->model->params, add_tensor, &l);
    if (c->rope.type == ROPE_LLAMA3) {
        double *inv_freq = xmalloc((size_t)half * sizeof *inv_freq), factor;
        rope_inverse_frequencies(c, inv_freq, &factor);
        for (int i = 0; i < half; i++) divisors[i] = (float)(pow(c->rope.theta, -2.0 * i / c->head_dim) / inv_freq[i]);
        free(inv_freq);
        l.item[l.n] = (struct item){.values = divisors, .columns = 1};
        gguf_add_tensor(l.w, "rope_freqs.weight", GGUF_DTYPE_F32, 1, (const int64_t[]){half}, &l.item[l.n]);
    }
    int rc = gguf_write(l.w, path, fill, NULL);
    gguf_writer_free(l.w);
    free(l.item);
    free(divisors);
    return rc;
}

struct load { const struct export *x; const struct gguf_file *f; };

static int load_tensor(void *context, const char *name, int n_dims, const int64_t *shape, int64_t offset)
{
    struct load *l = context;
    struct model *m = l->x->model;
    char gguf[96];
    gguf_name(name, gguf, sizeof gguf);
    const struct gguf_tensor *t = gguf_find_tensor(l->f, gguf);
    int64_t columns = n_dims == 2 ? shape[1] : 1, rows = shape[0];
    struct item order = {.half = reorders(l->x, name)};
    if (!t || t->count != rows * columns) return fail(ERR_INPUT, "%s: tensor %s is missing or misshapen", gguf_path(l->f), gguf);
    float *row = xmalloc((size_t)columns * sizeof *row);
    for (int64_t r = 0; r < rows; r++) {
        gguf_to_float(t, r * columns, columns, row);
        m->be->ops->upload_act(m->be, (act *)((char *)m->weights + (size_t)(offset + hf_row(&order, r) * columns) * dtype_width(m->be->act_dtype)), row, columns);
    }
    free(row);
    return OK;
}

int export_gguf_load(const struct export *x, const char *path)
{
    struct load l = {.x = x};
    struct gguf_file *f;
    int rc = gguf_open(&f, path);
    if (rc != OK) return rc;
    l.f = f;
    rc = params_each(x->model->params, load_tensor, &l);
    gguf_close(f);
    return rc;
}
