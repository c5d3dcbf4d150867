/* A model as llama.cpp names its parts, written and read back: architectures qwen2, qwen3 and llama (which Mistral is too). As
 * llama.cpp's convert_hf_to_gguf.py writes them, so that its loader, gguf-py and everything built on them read the file.
 *
 * Rotary pairs: Hugging Face turns (x_i, x_{i+D/2}); llama.cpp does so for qwen2 and qwen3, but for llama it turns (x_2i, x_2i+1). So the
 * rows of q and k (and their biases) are interleaved for llama: row j D/2 + i of a head becomes row 2 i + j.
 * Rope scaling: linear and yarn are keys; cos and sin are multiplied by attn_factor, and by 0.1 ln f + 1 when the type is yarn. For llama
 * alone a tensor, rope_freqs.weight [D/2], divides the frequencies: llama3 scaling, and yarn that the keys cannot say.
 * The bytes of the format are data/gguf.h's. */
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "train/export.h"

enum { STAGE = 1 << 20 };                  /* floats moved at a time */
enum { TYPE_NORMAL = 1, TYPE_UNKNOWN, TYPE_CONTROL, TYPE_USER_DEFINED, TYPE_UNUSED, TYPE_BYTE };   /* llama.cpp's token types */
static const char ROPE_FREQS[] = "rope_freqs.weight";

static const char *gguf_architecture(enum architecture a) { return a == ARCH_QWEN2 ? "qwen2" : a == ARCH_QWEN3 ? "qwen3" : "llama"; }

/* ---- names and the order of rows ---- */

static const struct { const char *hf, *gguf; bool rotary; } layer_names[] = {
    {"input_layernorm.weight", "attn_norm.weight", false},
    {"self_attn.q_proj.weight", "attn_q.weight", true}, {"self_attn.k_proj.weight", "attn_k.weight", true}, {"self_attn.v_proj.weight", "attn_v.weight", false},
    {"self_attn.q_proj.bias", "attn_q.bias", true}, {"self_attn.k_proj.bias", "attn_k.bias", true}, {"self_attn.v_proj.bias", "attn_v.bias", false},
    {"self_attn.q_norm.weight", "attn_q_norm.weight", false}, {"self_attn.k_norm.weight", "attn_k_norm.weight", false},
    {"self_attn.o_proj.weight", "attn_output.weight", false}, {"self_attn.o_proj.bias", "attn_output.bias", false},
    {"post_attention_layernorm.weight", "ffn_norm.weight", false},
    {"mlp.gate_proj.weight", "ffn_gate.weight", false}, {"mlp.up_proj.weight", "ffn_up.weight", false}, {"mlp.down_proj.weight", "ffn_down.weight", false},
    {"mlp.gate_proj.bias", "ffn_gate.bias", false}, {"mlp.up_proj.bias", "ffn_up.bias", false}, {"mlp.down_proj.bias", "ffn_down.bias", false},
};
static const struct { const char *hf, *gguf; } outer_names[] = {
    {"model.embed_tokens.weight", "token_embd.weight"}, {"model.norm.weight", "output_norm.weight"}, {"lm_head.weight", "output.weight"}};

/* GGUF's name of a Hugging Face tensor; *rotary: rows are those of rotated heads */
static void gguf_name(const char *hf, char name[64], bool *rotary)
{
    int layer, skip = 0;
    *rotary = false;
    for (size_t i = 0; i < sizeof outer_names / sizeof *outer_names; i++)
        if (!strcmp(hf, outer_names[i].hf)) { snprintf(name, 64, "%s", outer_names[i].gguf); return; }
    CHECK(sscanf(hf, "model.layers.%d.%n", &layer, &skip) == 1 && skip, "tensor %s has no name in GGUF", hf);
    for (size_t i = 0; i < sizeof layer_names / sizeof *layer_names; i++)
        if (!strcmp(hf + skip, layer_names[i].hf)) {
            snprintf(name, 64, "blk.%d.%s", layer, layer_names[i].gguf);
            *rotary = layer_names[i].rotary;
            return;
        }
    CHECK(0, "tensor %s has no name in GGUF", hf);
}

/* Row of a file -> row of the model, and back, for heads of width D */
static int64_t row_in_model(int64_t r, int64_t D) { int64_t k = r % D; return r - k + k % 2 * (D / 2) + k / 2; }
static int64_t row_in_file(int64_t r, int64_t D) { int64_t k = r % D; return r - k + k % (D / 2) * 2 + k / (D / 2); }

/* ---- what can be said in GGUF ---- */

/* llama.cpp reads beta_fast and beta_slow from its command line alone and always rounds the bounds of the ramp */
static bool plain_yarn(const struct rope_config *r) { return r->beta_fast == 32 && r->beta_slow == 1 && r->truncate; }

int export_gguf_check(const struct model_files *files, const struct tokenizer *t, const char *tokenizer_dir)
{
    static const char remedy[] = "use export.format safetensors";
    const struct model_config *c = files->config;
    const struct rope_config *r = &c->rope;
    bool llama = c->arch == ARCH_LLAMA || c->arch == ARCH_MISTRAL;
    if (!llama && r->type == ROPE_LLAMA3) return fail(ERR_USAGE, "%s: llama.cpp has llama3 rope scaling for Llama and Mistral only; %s", files->path, remedy);
    if (!llama && r->type == ROPE_YARN && !plain_yarn(r))
        return fail(ERR_USAGE, "%s: yarn with beta_fast %g, beta_slow %g, truncate %s: a GGUF file of %s can say 32, 1 and true only; %s", files->path, r->beta_fast, r->beta_slow,
                    r->truncate ? "true" : "false", gguf_architecture(c->arch), remedy);
    if (c->arch == ARCH_QWEN3 && c->o_bias) return fail(ERR_USAGE, "%s: llama.cpp has no attention_bias for Qwen3; %s", files->path, remedy);
    if (c->sliding_window)
        printf("note          llama.cpp has no sliding window for %s: context_length is set to the window of %lld tokens, within which it makes no difference\n", gguf_architecture(c->arch),
               (long long)c->sliding_window);
    if (!t) {
        printf("note          there is no tokenizer.json: the file has no vocabulary, and an engine can be given ids only; set tokenizer.path to add one\n");
        return OK;
    }
    if (tokenizer_vocab_size(t) > c->vocab_size)
        return fail(ERR_MISMATCH, "the tokenizer of %s defines ids up to %d, the model has rows for %lld: GGUF needs one row for every token", tokenizer_dir, tokenizer_vocab_size(t) - 1,
                    (long long)c->vocab_size);
    for (int32_t id = 0; id < tokenizer_vocab_size(t); id++)
        if (tokenizer_token_kind(t, id) == TOKEN_BYTE)
            return fail(ERR_USAGE, "the tokenizer of %s falls back to bytes (SentencePiece style): GGUF wants the scores of its pieces, which tokenizer.json does not hold; %s", tokenizer_dir, remedy);
    if (!tokenizer_gguf_pre(t))
        return fail(ERR_USAGE, "the tokenizer of %s splits text in a way that llama.cpp has no name for, and would be read wrongly; %s, which carries it as it is", tokenizer_dir, remedy);
    return OK;
}

/* ---- writing ---- */

static void put_key_u32(struct gguf_writer *w, const char *arch, const char *key, int64_t v)
{
    char name[128];
    snprintf(name, sizeof name, "%s.%s", arch, key);
    gguf_put_u32(w, name, (uint32_t)v);
}

static void put_key_f32(struct gguf_writer *w, const char *arch, const char *key, double v)
{
    char name[128];
    snprintf(name, sizeof name, "%s.%s", arch, key);
    gguf_put_f32(w, name, (float)v);
}

static double yarn_base(double factor) { return factor <= 1 ? 1 : 0.1 * log(factor) + 1; }

static void put_rope(struct gguf_writer *w, const char *arch, const struct model_config *c)
{
    const struct rope_config *r = &c->rope;
    char name[128];
    put_key_u32(w, arch, "rope.dimension_count", c->head_dim);
    put_key_f32(w, arch, "rope.freq_base", r->theta);
    if (r->type == ROPE_YARN && !plain_yarn(r)) put_key_f32(w, arch, "rope.scaling.attn_factor", r->attention_factor);   /* the rest is in rope_freqs */
    if (r->type != ROPE_LINEAR && (r->type != ROPE_YARN || !plain_yarn(r))) return;
    snprintf(name, sizeof name, "%s.rope.scaling.type", arch);
    gguf_put_string(w, name, r->type == ROPE_LINEAR ? "linear" : "yarn");
    put_key_f32(w, arch, "rope.scaling.factor", r->factor);
    if (r->type == ROPE_LINEAR) return;
    put_key_u32(w, arch, "rope.scaling.original_context_length", r->original_max_position);
    if (fabs(r->attention_factor / yarn_base(r->factor) - 1) > 1e-7) put_key_f32(w, arch, "rope.scaling.attn_factor", r->attention_factor / yarn_base(r->factor));
}

static void put_model(struct gguf_writer *w, const char *name, const struct model_config *c, enum gguf_dtype dtype)
{
    const char *arch = gguf_architecture(c->arch);
    char key[128];
    gguf_put_string(w, "general.architecture", arch);
    gguf_put_string(w, "general.type", "model");
    gguf_put_string(w, "general.name", name);
    put_key_u32(w, arch, "block_count", c->n_layers);
    put_key_u32(w, arch, "context_length", c->sliding_window && c->sliding_window < c->max_position ? c->sliding_window : c->max_position);
    put_key_u32(w, arch, "embedding_length", c->hidden_size);
    put_key_u32(w, arch, "feed_forward_length", c->intermediate_size);
    put_key_u32(w, arch, "attention.head_count", c->n_heads);
    put_key_u32(w, arch, "attention.head_count_kv", c->n_kv_heads);
    put_key_u32(w, arch, "attention.key_length", c->head_dim);
    put_key_u32(w, arch, "attention.value_length", c->head_dim);
    put_key_f32(w, arch, "attention.layer_norm_rms_epsilon", c->rms_norm_eps);
    if (c->sliding_window) {
        bool all = true;
        for (int l = 0; l < c->n_layers; l++) all &= c->layer_slides[l];
        put_key_u32(w, arch, "attention.sliding_window", c->sliding_window);
        snprintf(key, sizeof key, "%s.attention.sliding_window_pattern", arch);
        if (!all) {
            gguf_put_array(w, key, GGUF_BOOL, (uint64_t)c->n_layers);
            for (int l = 0; l < c->n_layers; l++) gguf_item_bool(w, c->layer_slides[l]);
        }
    }
    put_rope(w, arch, c);
    put_key_u32(w, arch, "vocab_size", c->vocab_size);
    gguf_put_u32(w, "general.file_type", dtype == GGUF_DTYPE_F32 ? 0 : dtype == GGUF_DTYPE_F16 ? 1 : dtype == GGUF_DTYPE_Q8_0 ? 7 : 32);   /* llama_ftype */
    gguf_put_u32(w, "general.quantization_version", 2);
}

static bool ends_with(const char *s, const char *end) { size_t n = strlen(s), m = strlen(end); return n >= m && !strcmp(s + n - m, end); }
static bool begins_with(const char *s, const char *start) { return !strncmp(s, start, strlen(start)); }

/* Added tokens that steer a model and are not marked as special in some published files; the converter's list */
static bool looks_special(const char *s)
{
    return !strcmp(s, "<pad>") || !strcmp(s, "<mask>") || !strcmp(s, "<2mass>") || !strcmp(s, "[@BOS@]") || (begins_with(s, "<|") && ends_with(s, "|>"))
        || (begins_with(s, "<\xef\xbd\x9c") && ends_with(s, "\xef\xbd\x9c>")) || (begins_with(s, "<unused") && ends_with(s, ">"));
}

static int token_type(const struct tokenizer *t, int32_t id)
{
    switch (id < tokenizer_vocab_size(t) ? tokenizer_token_kind(t, id) : TOKEN_HOLE) {
    case TOKEN_HOLE: return TYPE_UNUSED;
    case TOKEN_NORMAL: return TYPE_NORMAL;
    case TOKEN_BYTE: return TYPE_BYTE;
    case TOKEN_SPECIAL: return TYPE_CONTROL;
    case TOKEN_ADDED: return looks_special(tokenizer_token_text(t, id)) ? TYPE_CONTROL : TYPE_USER_DEFINED;
    }
    return TYPE_NORMAL;
}

/* The text of a token as GGUF has it: a spare row gets a name, an added token's U+2581 is the space it stands for. `text` is malloc'd. */
static char *token_text(const struct tokenizer *t, int32_t id)
{
    static const char space[] = "\xe2\x96\x81";
    int type = token_type(t, id);
    if (type == TYPE_UNUSED) return xasprintf("[PAD%d]", (int)id);
    char *text = xstrdup(tokenizer_token_text(t, id));
    for (char *p = text; type == TYPE_USER_DEFINED && (p = strstr(p, space)); p++) {
        *p = ' ';
        memmove(p + 1, p + 3, strlen(p + 3) + 1);
    }
    return text;
}

/* Halves of a merge are separated by a space, so that a space inside one is written as the byte-level alphabet writes it, U+0120. */
static void add_half(char *line, size_t *n, const char *half)
{
    for (; *half; half++)
        if (*half == ' ') { memcpy(line + *n, "\xc4\xa0", 2); *n += 2; }
        else line[(*n)++] = *half;
}

/* unk_token of tokenizer_config.json, which llama.cpp keeps and the tokenizer has no use for; -1: none */
static int32_t unknown_token(const struct tokenizer *t, const char *dir)
{
    char *path = path_join(dir, "tokenizer_config.json");
    json_t *o = NULL;
    int32_t id = -1;
    if (path_exists(path) && json_read_file(path, 1 << 26, &o) == OK) {
        const json_t *unk = json_object_get(o, "unk_token");
        const char *text = json_is_object(unk) ? json_string_value(json_object_get(unk, "content")) : json_string_value(unk);
        if (text) id = tokenizer_id_of(t, text);
    }
    json_decref(o);
    free(path);
    return id;
}

static void put_id(struct gguf_writer *w, const char *key, int32_t id, int32_t otherwise)
{
    if (id < 0) id = otherwise;
    if (id >= 0) gguf_put_u32(w, key, (uint32_t)id);
}

static void put_tokenizer(struct gguf_writer *w, const struct tokenizer *t, const char *dir, const struct model_config *c)
{
    if (!t) { gguf_put_string(w, "tokenizer.ggml.model", "none"); return; }
    const char *left, *right;
    int32_t bos = tokenizer_bos(t) >= 0 ? tokenizer_bos(t) : c->bos;
    gguf_put_string(w, "tokenizer.ggml.model", "gpt2");
    gguf_put_string(w, "tokenizer.ggml.pre", tokenizer_gguf_pre(t));
    gguf_put_array(w, "tokenizer.ggml.tokens", GGUF_STRING, (uint64_t)c->vocab_size);
    for (int32_t id = 0; id < c->vocab_size; id++) {
        char *text = token_text(t, id);
        gguf_item_string(w, text, strlen(text));
        free(text);
    }
    gguf_put_array(w, "tokenizer.ggml.token_type", GGUF_I32, (uint64_t)c->vocab_size);
    for (int32_t id = 0; id < c->vocab_size; id++) gguf_item_i32(w, token_type(t, id));
    gguf_put_array(w, "tokenizer.ggml.merges", GGUF_STRING, (uint64_t)tokenizer_n_merges(t));
    for (int64_t i = 0; tokenizer_merge(t, i, &left, &right); i++) {
        char *line = xmalloc(2 * (strlen(left) + strlen(right)) + 1);
        size_t n = 0;
        add_half(line, &n, left);
        line[n++] = ' ';
        add_half(line, &n, right);
        gguf_item_string(w, line, n);
        free(line);
    }
    put_id(w, "tokenizer.ggml.bos_token_id", bos, -1);
    put_id(w, "tokenizer.ggml.eos_token_id", tokenizer_eos(t), c->eos[0]);
    put_id(w, "tokenizer.ggml.unknown_token_id", unknown_token(t, dir), -1);
    put_id(w, "tokenizer.ggml.padding_token_id", tokenizer_pad(t), c->pad);
    gguf_put_bool(w, "tokenizer.ggml.add_bos_token", tokenizer_add_bos(t) && bos >= 0);   /* always: llama.cpp's default depends on `pre` */
    if (tokenizer_chat_template(t)) gguf_put_string(w, "tokenizer.chat_template", tokenizer_chat_template(t));
}

/* What a tensor of the file is filled from */
struct source { const struct export_tensor *tensor; int64_t head; };   /* head: D of interleaved rows, 0: as they are; tensor NULL: rope_freqs */
struct source_list { struct source *source; const float *rope_freqs; };

static int fill_tensor(void *context, const void *user, int64_t first, int64_t count, float *out)
{
    const struct source_list *l = context;
    const struct source *s = user;
    if (!s->tensor) {
        memcpy(out, l->rope_freqs + first, (size_t)count * sizeof *out);
        return OK;
    }
    if (!s->head) return tensor_to_float(s->tensor->source, first, count, out);
    int64_t cols = s->tensor->shape[1];
    while (count > 0) {
        int64_t row = first / cols, col = first % cols, n = cols - col < count ? cols - col : count;
        int rc = tensor_to_float(s->tensor->source, row_in_model(row, s->head) * cols + col, n, out);
        if (rc != OK) return rc;
        first += n;
        count -= n;
        out += n;
    }
    return OK;
}

/* What the plain frequencies are divided by */
static float *rope_factors(const struct model_config *c)
{
    int half = c->head_dim / 2;
    struct model_config plain = *c;
    double *scaled = xmalloc((size_t)half * sizeof *scaled), *unscaled = xmalloc((size_t)half * sizeof *unscaled), factor;
    float *out = xmalloc((size_t)half * sizeof *out);
    plain.rope.type = ROPE_DEFAULT;
    rope_inverse_frequencies(c, scaled, &factor);
    rope_inverse_frequencies(&plain, unscaled, &factor);
    for (int i = 0; i < half; i++) out[i] = (float)(unscaled[i] / scaled[i]);
    free(scaled);
    free(unscaled);
    return out;
}

int export_gguf_write(const char *path, const char *name, const struct model_files *files, const struct tokenizer *tokenizer, const char *tokenizer_dir,
                      const struct export_tensor *t, int n, enum gguf_dtype dtype)
{
    const struct model_config *c = files->config;
    bool llama = c->arch == ARCH_LLAMA || c->arch == ARCH_MISTRAL;
    struct gguf_writer *w = gguf_writer_new();
    struct source *source = xcalloc((size_t)n + 1, sizeof *source);
    float *factors = c->rope.type == ROPE_LLAMA3 || (c->rope.type == ROPE_YARN && !plain_yarn(&c->rope)) ? rope_factors(c) : NULL;
    put_model(w, name, c, dtype);
    put_tokenizer(w, tokenizer, tokenizer_dir, c);
    if (factors) gguf_add_tensor(w, ROPE_FREQS, GGUF_DTYPE_F32, 1, (int64_t[]){c->head_dim / 2}, &source[n]);
    for (int i = 0; i < n; i++) {
        char tensor_name[64];
        bool rotary;
        gguf_name(t[i].name, tensor_name, &rotary);
        source[i] = (struct source){&t[i], llama && rotary ? c->head_dim : 0};
        gguf_add_tensor(w, tensor_name, t[i].dtype, t[i].n_dims, t[i].shape, &source[i]);
    }
    int rc = gguf_write(w, path, fill_tensor, &(struct source_list){source, factors});
    gguf_writer_free(w);
    free(source);
    free(factors);
    return rc;
}

/* ---- reading ---- */

struct reading { const struct gguf_file *f; char arch[16]; json_t *config; };

static const char *full_key(const struct reading *r, const char *key, char name[128])
{
    snprintf(name, 128, "%s.%s", r->arch, key);
    return name;
}

/* A number of the metadata under config.json's name; absent: left out when `optional` */
static int copy_int(struct reading *r, const char *key, const char *hf, bool optional)
{
    char name[128];
    int64_t v;
    bool present = true;
    int rc = gguf_get_int(r->f, full_key(r, key, name), &v, optional ? &present : NULL);
    if (rc == OK && present) json_object_set_new(r->config, hf, json_integer(v));
    return rc;
}

static int copy_double(struct reading *r, const char *key, json_t *o, const char *hf, bool optional)
{
    char name[128];
    double v;
    bool present = true;
    int rc = gguf_get_double(r->f, full_key(r, key, name), &v, optional ? &present : NULL);
    if (rc == OK && present && !isfinite(v)) return fail(ERR_INPUT, "%s: key %s is not finite", gguf_path(r->f), name);
    if (rc == OK && present) json_object_set_new(o, hf, json_real(v));
    return rc;
}

static int read_rope(struct reading *r)
{
    json_t *o = json_object();
    const char *type = NULL;
    char name[128];
    size_t n = 0;
    bool present;
    double attention = 1, factor = 1;
    int64_t original;
    int rc = OK;
    json_object_set_new(r->config, "rope_parameters", o);
    TRY(copy_double(r, "rope.freq_base", o, "rope_theta", false));
    TRY(gguf_get_string(r->f, full_key(r, "rope.scaling.type", name), &type, &n, &present));
    if (!present || (n == 4 && !memcmp(type, "none", 4))) { json_object_set_new(o, "rope_type", json_string("default")); goto out; }
    bool linear = n == 6 && !memcmp(type, "linear", 6);
    if (!linear && !(n == 4 && !memcmp(type, "yarn", 4))) { rc = fail(ERR_INPUT, "%s: key %s is \"%.*s\"; none, linear and yarn are read", gguf_path(r->f), name, (int)(n < 40 ? n : 40), type); goto out; }
    json_object_set_new(o, "rope_type", json_string(linear ? "linear" : "yarn"));
    TRY(copy_double(r, "rope.scaling.factor", o, "factor", false));
    if (linear) goto out;
    TRY(gguf_get_int(r->f, full_key(r, "rope.scaling.original_context_length", name), &original, NULL));
    json_object_set_new(o, "original_max_position_embeddings", json_integer(original));
    TRY(copy_double(r, "rope.scaling.yarn_beta_fast", o, "beta_fast", true));
    TRY(copy_double(r, "rope.scaling.yarn_beta_slow", o, "beta_slow", true));
    TRY(gguf_get_double(r->f, full_key(r, "rope.scaling.attn_factor", name), &attention, &present));
    factor = json_number_value(json_object_get(o, "factor"));
    if (present) json_object_set_new(o, "attention_factor", json_real(attention * yarn_base(factor)));
out:
    return rc;
}

static int read_window(struct reading *r, int64_t layers)
{
    char name[128];
    int64_t window;
    bool present, qwen = strcmp(r->arch, "llama");
    int rc = gguf_get_int(r->f, full_key(r, "attention.sliding_window", name), &window, &present);
    if (rc != OK || !present) return rc;
    const struct gguf_value *pattern = gguf_find_key(r->f, full_key(r, "attention.sliding_window_pattern", name));
    if (pattern && (pattern->type != GGUF_ARRAY || pattern->item != GGUF_BOOL || pattern->count != (uint64_t)layers))
        return fail(ERR_INPUT, "%s: key %s is not a list of %lld booleans", gguf_path(r->f), name, (long long)layers);
    json_object_set_new(r->config, "sliding_window", json_integer(window));
    if (qwen) json_object_set_new(r->config, "use_sliding_window", json_true());
    if (!qwen && !pattern) return OK;
    json_t *types = json_array();
    for (int64_t l = 0; l < layers; l++) json_array_append_new(types, json_string(!pattern || gguf_item(pattern, (uint64_t)l) != 0 ? "sliding_attention" : "full_attention"));
    json_object_set_new(r->config, "layer_types", types);
    return OK;
}

int gguf_model_config(const struct gguf_file *f, struct model_config **out)
{
    static const struct { const char *key, *hf; } sizes[] = {
        {"block_count", "num_hidden_layers"}, {"context_length", "max_position_embeddings"}, {"embedding_length", "hidden_size"}, {"feed_forward_length", "intermediate_size"},
        {"attention.head_count", "num_attention_heads"}, {"attention.head_count_kv", "num_key_value_heads"}, {"attention.key_length", "head_dim"}};
    struct reading r = {.f = f, .config = json_object()};
    const char *arch, *path = gguf_path(f);
    size_t n;
    int64_t key = 0, value = 0, rotated;
    bool present;
    char name[128];
    int rc = OK;
    TRY(gguf_get_string(f, "general.architecture", &arch, &n, NULL));
    snprintf(r.arch, sizeof r.arch, "%.*s", (int)(n < sizeof r.arch ? n : 0), arch);
    bool qwen2 = !strcmp(r.arch, "qwen2"), qwen3 = !strcmp(r.arch, "qwen3"), llama = !strcmp(r.arch, "llama");
    if (!qwen2 && !qwen3 && !llama) { rc = fail(ERR_INPUT, "%s: general.architecture is \"%.*s\"; llama, qwen2 and qwen3 are read", path, (int)(n < 60 ? n : 60), arch); goto out; }
    bool mistral = llama && gguf_find_key(f, "llama.attention.sliding_window");
    json_object_set_new(r.config, "architectures", json_pack("[s]", architecture_name(qwen2 ? ARCH_QWEN2 : qwen3 ? ARCH_QWEN3 : mistral ? ARCH_MISTRAL : ARCH_LLAMA)));
    json_object_set_new(r.config, "model_type", json_string(mistral ? "mistral" : r.arch));
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) TRY(copy_int(&r, sizes[i].key, sizes[i].hf, !strcmp(sizes[i].hf, "head_dim")));
    TRY(copy_double(&r, "attention.layer_norm_rms_epsilon", r.config, "rms_norm_eps", false));
    TRY(read_rope(&r));
    TRY(read_window(&r, json_integer_value(json_object_get(r.config, "num_hidden_layers"))));

    const struct gguf_tensor *embedding = gguf_find_tensor(f, "token_embd.weight");
    if (!embedding || embedding->n_dims != 2) { rc = fail(ERR_INPUT, "%s: tensor token_embd.weight is missing or no matrix", path); goto out; }
    json_object_set_new(r.config, "vocab_size", json_integer(embedding->shape[0]));
    json_object_set_new(r.config, "tie_word_embeddings", json_boolean(!gguf_find_tensor(f, "output.weight")));
    if (llama && !mistral) {
        json_object_set_new(r.config, "attention_bias", json_boolean(gguf_find_tensor(f, "blk.0.attn_output.bias")));
        json_object_set_new(r.config, "mlp_bias", json_boolean(gguf_find_tensor(f, "blk.0.ffn_up.bias")));
    }
    TRY(model_config_from_json(out, r.config, path));
    struct model_config *c = *out;
    rotated = c->head_dim;
    rc = gguf_get_int(f, full_key(&r, "attention.key_length", name), &key, &present);
    if (rc == OK && present) rc = gguf_get_int(f, full_key(&r, "attention.value_length", name), &value, NULL);
    if (rc == OK) rc = gguf_get_int(f, full_key(&r, "rope.dimension_count", name), &rotated, &present);
    if (rc == OK && (key != value || rotated != c->head_dim))
        rc = fail(ERR_INPUT, "%s: keys of %lld, values of %lld and %lld rotated: heads of one width, rotated whole, are implemented", path, (long long)key, (long long)value, (long long)rotated);
    if (rc != OK) { model_config_free(c); *out = NULL; }
out:
    json_decref(r.config);
    return rc;
}

struct loading { const struct gguf_file *f; struct model *m; bool *used; float *stage; };

static int load_tensor(void *context, const char *hf, int n_dims, const int64_t *shape, int64_t offset)
{
    struct loading *l = context;
    struct model *m = l->m;
    char name[64];
    bool rotary;
    gguf_name(hf, name, &rotary);
    const struct gguf_tensor *t = gguf_find_tensor(l->f, name);
    int64_t cols = n_dims == 2 ? shape[1] : 1, D = m->c->head_dim, count = shape[0] * cols;
    if (!t) return fail(ERR_INPUT, "%s: tensor %s is missing", gguf_path(l->f), name);
    if (t->n_dims != n_dims || t->shape[0] != shape[0] || (n_dims == 2 && t->shape[1] != cols))
        return fail(ERR_INPUT, "%s: tensor %s has %lld x %lld elements, the metadata says %lld x %lld", gguf_path(l->f), name, (long long)t->shape[0],
                    (long long)(t->n_dims > 1 ? t->shape[1] : 1), (long long)shape[0], (long long)cols);
    bool interleaved = rotary && (m->c->arch == ARCH_LLAMA || m->c->arch == ARCH_MISTRAL);
    for (int64_t first = 0, n; first < count; first += n) {
        n = count - first < STAGE ? count - first : STAGE;
        if (!interleaved) gguf_to_float(t, first, n, l->stage);
        for (int64_t done = 0, part; interleaved && done < n; done += part) {
            int64_t row = (first + done) / cols, col = (first + done) % cols;
            part = cols - col < n - done ? cols - col : n - done;
            gguf_to_float(t, row_in_file(row, D) * cols + col, part, l->stage + done);
        }
        m->be->ops->upload_act(m->be, (act *)((char *)m->weights + (size_t)(offset + first) * dtype_width(m->be->act_dtype)), l->stage, n);
    }
    for (int i = 0; i < gguf_tensor_count(l->f); i++) if (gguf_tensor_at(l->f, i) == t) l->used[i] = true;
    return OK;
}

/* The table again, with frequencies divided and cos and sin multiplied by what the file says (angles rounded to fp32 as model_ready() does) */
static int refill_rope(const struct gguf_file *f, const struct gguf_tensor *t, double attention, struct model *m)
{
    int half = m->c->head_dim / 2;
    if (t && (t->n_dims != 1 || t->shape[0] != half)) return fail(ERR_INPUT, "%s: tensor %s has %lld elements, heads need %d", gguf_path(f), ROPE_FREQS, (long long)t->count, half);
    size_t count = (size_t)m->o.max_doc * (size_t)half;
    double *inv_freq = xmalloc((size_t)half * sizeof *inv_freq), factor;
    float *divide = xmalloc((size_t)half * sizeof *divide), *cosine = xmalloc(count * sizeof *cosine), *sine = xmalloc(count * sizeof *sine);
    rope_inverse_frequencies(m->c, inv_freq, &factor);
    for (int i = 0; i < half; i++) divide[i] = 1;
    if (t) gguf_to_float(t, 0, half, divide);
    for (int64_t p = 0; p < m->o.max_doc; p++)
        for (int i = 0; i < half; i++) {
            float angle = (float)p * (float)(inv_freq[i] / divide[i]);
            cosine[p * half + i] = (float)(cos((double)angle) * factor * attention);
            sine[p * half + i] = (float)(sin((double)angle) * factor * attention);
        }
    m->be->ops->upload(m->be, m->rope_cos, cosine, count * sizeof *cosine);
    m->be->ops->upload(m->be, m->rope_sin, sine, count * sizeof *sine);
    m->be->ops->sync(m->be);
    free(inv_freq);
    free(divide);
    free(cosine);
    free(sine);
    return OK;
}

int gguf_model_load(const struct gguf_file *f, struct model *m)
{
    struct loading l = {.f = f, .m = m, .used = xcalloc((size_t)gguf_tensor_count(f), sizeof(bool)), .stage = xmalloc(STAGE * sizeof(float))};
    const struct gguf_tensor *factors = NULL;
    double attention = 1;
    bool present, qwen = m->c->arch == ARCH_QWEN2 || m->c->arch == ARCH_QWEN3;
    char key[128];
    int rc = OK;
    TRY(params_each(m->params, load_tensor, &l));
    for (int i = 0; i < gguf_tensor_count(f); i++) {
        const struct gguf_tensor *t = gguf_tensor_at(f, i);
        if (l.used[i]) continue;
        if (strcmp(t->name, ROPE_FREQS) || qwen) {
            rc = fail(ERR_INPUT, "%s: tensor %s belongs to no part of the model that the metadata describes", gguf_path(f), t->name);
            goto out;
        }
        factors = t;
    }
    if (m->c->rope.type != ROPE_YARN) {                /* where it is, it went into the configuration's attention_factor */
        snprintf(key, sizeof key, "%s.rope.scaling.attn_factor", gguf_architecture(m->c->arch));
        TRY(gguf_get_double(f, key, &attention, &present));
    }
    if (factors || attention != 1) rc = refill_rope(f, factors, attention, m);
out:
    free(l.used);
    free(l.stage);
    return rc;
}
