/* Export: every architecture, format and type is loaded back; GGUF holds what llama.cpp expects, seen through the reader and not
 * through the exporter's own loader; what cannot be exported is refused by name and leaves nothing. */
#include <criterion/criterion.h>
#include <dirent.h>
#include <fcntl.h>
#include <math.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"
#include "base/failpoint.h"
#include "base/file.h"
#include "base/json.h"
#include "tests/compare.h"
#include "train/export.h"

static char dir[] = "/tmp/test-export-XXXXXX";
static void setup(void) { cr_assert(mkdtemp(dir)); }
static void teardown(void) { dir_remove_tree(dir); strcpy(dir, "/tmp/test-export-XXXXXX"); }
TestSuite(export, .init = setup, .fini = teardown);

/* ---- models ---- */

static const char QWEN2[] = "{\"architectures\": [\"Qwen2ForCausalLM\"], \"hidden_size\": 64, \"intermediate_size\": 96, \"num_hidden_layers\": 2, \"num_attention_heads\": 4, \"num_key_value_heads\": 2,"
    "\"vocab_size\": 71, \"max_position_embeddings\": 512, \"rms_norm_eps\": 1e-6, \"rope_theta\": 10000.0, \"tie_word_embeddings\": true, \"initializer_range\": 0.1}";
static const char LLAMA[] = "{\"architectures\": [\"LlamaForCausalLM\"], \"hidden_size\": 64, \"intermediate_size\": 96, \"num_hidden_layers\": 2, \"num_attention_heads\": 4, \"num_key_value_heads\": 2,"
    "\"vocab_size\": 71, \"max_position_embeddings\": 512, \"rms_norm_eps\": 1e-5, \"rope_theta\": 500000.0, \"tie_word_embeddings\": false, \"initializer_range\": 0.1}";
static const char MISTRAL[] = "{\"architectures\": [\"MistralForCausalLM\"], \"hidden_size\": 64, \"intermediate_size\": 96, \"num_hidden_layers\": 2, \"num_attention_heads\": 8, \"num_key_value_heads\": 1,"
    "\"vocab_size\": 71, \"max_position_embeddings\": 512, \"rms_norm_eps\": 1e-5, \"rope_theta\": 10000.0, \"sliding_window\": 9, \"head_dim\": 16, \"initializer_range\": 0.1}";
static const char QWEN3[] = "{\"architectures\": [\"Qwen3ForCausalLM\"], \"hidden_size\": 64, \"intermediate_size\": 96, \"num_hidden_layers\": 2, \"num_attention_heads\": 4, \"num_key_value_heads\": 1,"
    "\"vocab_size\": 71, \"max_position_embeddings\": 512, \"rms_norm_eps\": 1e-6, \"rope_theta\": 1000000.0, \"head_dim\": 24, \"tie_word_embeddings\": true, \"initializer_range\": 0.1}";

struct spec_list { struct tensor_spec spec[64]; float *weights; int n; };

static int add_spec(void *context, const char *name, int n_dims, const int64_t *shape, int64_t offset)
{
    struct spec_list *l = context;
    struct tensor_spec *s = &l->spec[l->n++];
    *s = (struct tensor_spec){.name = xstrdup(name), .dtype = DTYPE_F32, .n_dims = n_dims, .user = l->weights + offset};
    memcpy(s->shape, shape, (size_t)n_dims * sizeof *shape);
    return OK;
}

static int fill(void *context, const struct tensor_spec *s, size_t offset, size_t bytes, void *out)
{
    (void)context;
    memcpy(out, (const char *)s->user + offset, bytes);
    return OK;
}

/* Deterministic weights for a config with `changes` applied; tensor `poison`, if any, gets `value` at element 5. */
static char *make_model(const char *name, const char *config, const char *changes, const char *poison, float value)
{
    char *path = path_join(dir, name), *file = path_join(path, "config.json");
    json_t *o = json_loads(config, 0, NULL), *more = changes ? json_loads(changes, 0, NULL) : NULL;
    struct model_config *c;
    cr_assert(o && (!changes || more), "%s", changes);
    if (more) json_object_update(o, more);
    cr_assert_eq(dir_make(path), OK);
    cr_assert_eq(json_write_file(file, o), OK);
    cr_assert_eq(model_config_read(&c, path), OK, "%s", fail_message());
    struct params *t = params_new(c);
    struct spec_list l = {.weights = new_normal(t->total, 0.1f, 11)};
    for (int i = 0; i < t->n; i++) for (int64_t j = 0; t->p[i].n_dims == 1 && j < t->p[i].count; j++) l.weights[t->p[i].offset + j] += t->p[i].init_mean;
    params_each(t, add_spec, &l);
    for (int i = 0; i < l.n; i++) if (poison && !strcmp(l.spec[i].name, poison)) { ((float *)l.spec[i].user)[5] = value; poison = NULL; }
    cr_assert(!poison, "no tensor %s", poison);
    cr_assert_eq(safetensors_write_dir(path, l.spec, l.n, 0, fill, NULL), OK, "%s", fail_message());
    for (int i = 0; i < l.n; i++) free((char *)l.spec[i].name);
    free(l.weights);
    params_free(t);
    model_config_free(c);
    json_decref(o);
    json_decref(more);
    free(file);
    return path;
}

static int export(const char *model, const char *name, bool gguf, enum gguf_dtype dtype)
{
    char *path = path_join(dir, name);
    struct export_options o = {.model = model, .path = path, .gguf = gguf, .dtype = dtype, .backend = {.device = "cpu", .precision = "fp32", .threads = 1}};
    int rc = export_run(&o);
    free(path);
    return rc;
}

static int count_entries(void)
{
    char **names;
    int n;
    cr_assert_eq(dir_list(dir, &names, &n), OK);
    names_free(names, n);
    return n;
}

static struct gguf_file *open_gguf(const char *name)
{
    struct gguf_file *f;
    char *path = path_join(dir, name);
    cr_assert_eq(gguf_open(&f, path), OK, "%s", fail_message());
    free(path);
    return f;
}

static double number_of(const struct gguf_file *f, const char *key)
{
    double v = NAN;
    cr_assert_eq(gguf_get_double(f, key, &v, NULL), OK, "%s", fail_message());
    return v;
}

static bool string_is(const struct gguf_file *f, const char *key, const char *want)
{
    const char *s;
    size_t n;
    return gguf_get_string(f, key, &s, &n, NULL) == OK && n == strlen(want) && !memcmp(s, want, n);
}

/* ---- every architecture, format and type ---- */

Test(export, everything_loads_back)
{
    static const struct { const char *config, *changes; } models[] = {
        {QWEN2, NULL}, {LLAMA, NULL}, {MISTRAL, NULL}, {QWEN3, NULL},
        {LLAMA, "{\"attention_bias\": true, \"mlp_bias\": true, \"tie_word_embeddings\": true}"},
        {QWEN2, "{\"rope_scaling\": {\"rope_type\": \"linear\", \"factor\": 2.5}}"},
        {QWEN2, "{\"use_sliding_window\": true, \"sliding_window\": 5, \"max_window_layers\": 1}"},
        {QWEN3, "{\"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 16}}"},
        {QWEN3, "{\"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 16, \"attention_factor\": 1.4}}"},
        {LLAMA, "{\"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 16, \"beta_fast\": 20.0, \"truncate\": false, \"attention_factor\": 0.9}}"},
        {LLAMA, "{\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8.0, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0, \"original_max_position_embeddings\": 32}}"},
        {QWEN2, "{\"max_position_embeddings\": 7}"},
    };
    for (size_t m = 0; m < sizeof models / sizeof *models; m++)
        for (int gguf = 0; gguf < 2; gguf++)
            for (int t = 0; t < 3 + gguf; t++) {
                static const enum gguf_dtype types[] = {GGUF_DTYPE_F32, GGUF_DTYPE_F16, GGUF_DTYPE_BF16, GGUF_DTYPE_Q8_0};
                char name[64];
                snprintf(name, sizeof name, "m%zu", m);
                char *model = make_model(name, models[m].config, models[m].changes, NULL, 0);
                cr_expect_eq(export(model, "out", gguf, types[t]), OK, "model %zu, %s %s: %s", m, gguf ? "gguf" : "safetensors", gguf_dtype_name(types[t]), fail_message());
                cr_expect_eq(count_entries(), 2);
                char *out = path_join(dir, "out");
                dir_remove_tree(out);
                dir_remove_tree(model);
                free(out);
                free(model);
            }
}

/* ---- what llama.cpp reads ---- */

/* Rows of q and k: pairs (x_i, x_{i + D/2}) become neighbours for llama and stay for qwen; nothing else moves. */
Test(export, rotary_rows)
{
    for (int llama = 0; llama < 2; llama++) {
        char *model = make_model("m", llama ? LLAMA : QWEN2, llama ? "{\"attention_bias\": true}" : NULL, NULL, 0);
        cr_assert_eq(export(model, "out.gguf", true, GGUF_DTYPE_F32), OK, "%s", fail_message());
        static const struct { const char *hf, *gguf; bool rotary; } names[] = {
            {"model.layers.1.self_attn.q_proj.weight", "blk.1.attn_q.weight", true}, {"model.layers.1.self_attn.k_proj.weight", "blk.1.attn_k.weight", true},
            {"model.layers.0.self_attn.q_proj.bias", "blk.0.attn_q.bias", true}, {"model.layers.0.self_attn.k_proj.bias", "blk.0.attn_k.bias", true},
            {"model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight", false}, {"model.layers.0.self_attn.v_proj.bias", "blk.0.attn_v.bias", false},
            {"model.layers.0.self_attn.o_proj.weight", "blk.0.attn_output.weight", false}, {"model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight", false},
            {"model.layers.1.input_layernorm.weight", "blk.1.attn_norm.weight", false}, {"model.layers.1.post_attention_layernorm.weight", "blk.1.ffn_norm.weight", false},
            {"model.layers.0.mlp.gate_proj.weight", "blk.0.ffn_gate.weight", false}, {"model.layers.0.mlp.up_proj.weight", "blk.0.ffn_up.weight", false},
            {"model.embed_tokens.weight", "token_embd.weight", false}, {"model.norm.weight", "output_norm.weight", false}};
        struct gguf_file *f = open_gguf("out.gguf");
        struct tensor_set *s;
        enum { D = 16 };
        cr_assert_eq(tensor_set_open(&s, model), OK);
        for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
            const struct tensor_view *v = tensor_set_find(s, names[i].hf);
            const struct gguf_tensor *t = gguf_find_tensor(f, names[i].gguf);
            cr_assert(v && t, "%s", names[i].gguf);
            cr_assert(t->count == v->count && t->n_dims == v->n_dims && t->shape[0] == v->shape[0]);
            int64_t cols = v->count / v->shape[0];
            float *a = malloc((size_t)cols * 4), *b = malloc((size_t)cols * 4);
            for (int64_t head = 0; head < v->shape[0]; head += D)
                for (int64_t r = head; r < head + D && r < v->shape[0]; r++) {
                    int64_t from = llama && names[i].rotary ? head + ((r - head) % 2 ? D / 2 : 0) + (r - head) / 2 : r;
                    gguf_to_float(t, r * cols, cols, a);
                    cr_assert_eq(tensor_to_float(v, from * cols, cols, b), OK);
                    cr_assert(!memcmp(a, b, (size_t)cols * 4), "%s, row %lld", names[i].gguf, (long long)r);
                }
            free(a);
            free(b);
        }
        cr_assert_eq(!gguf_find_tensor(f, "output.weight"), !llama);          /* tied: written once */
        gguf_close(f);
        tensor_set_close(s);
        char *out = path_join(dir, "out.gguf");
        unlink(out);
        free(out);
        dir_remove_tree(model);
        free(model);
    }
}

Test(export, metadata)
{
    char *model = make_model("tiny-mistral", MISTRAL, NULL, NULL, 0);
    cr_assert_eq(export(model, "out.gguf", true, GGUF_DTYPE_Q8_0), OK, "%s", fail_message());
    struct gguf_file *f = open_gguf("out.gguf");
    static const struct { const char *key; double v; } want[] = {
        {"llama.block_count", 2}, {"llama.context_length", 9}, {"llama.embedding_length", 64}, {"llama.feed_forward_length", 96}, {"llama.attention.head_count", 8},
        {"llama.attention.head_count_kv", 1}, {"llama.attention.key_length", 16}, {"llama.attention.value_length", 16}, {"llama.attention.layer_norm_rms_epsilon", (double)1e-5f},
        {"llama.attention.sliding_window", 9}, {"llama.rope.dimension_count", 16}, {"llama.rope.freq_base", 10000}, {"llama.vocab_size", 71}, {"general.file_type", 7},
        {"general.quantization_version", 2}, {"general.alignment", 32}};
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) cr_expect_eq(number_of(f, want[i].key), want[i].v, "%s", want[i].key);
    cr_expect_str_eq(gguf_key_at(f, 0)->key, "general.architecture");
    cr_expect(string_is(f, "general.architecture", "llama") && string_is(f, "general.name", "tiny-mistral") && string_is(f, "tokenizer.ggml.model", "none"));
    cr_expect_eq(gguf_find_tensor(f, "blk.0.attn_q.weight")->dtype, GGUF_DTYPE_Q8_0);
    cr_expect_eq(gguf_find_tensor(f, "blk.0.attn_norm.weight")->dtype, GGUF_DTYPE_F32);
    gguf_close(f);
    free(model);

    /* rows that are no multiple of 32 stay in f16, one tensor at a time */
    model = make_model("odd", QWEN3, "{\"intermediate_size\": 90}", NULL, 0);
    cr_assert_eq(export(model, "odd.gguf", true, GGUF_DTYPE_Q8_0), OK, "%s", fail_message());
    f = open_gguf("odd.gguf");
    cr_expect_eq(gguf_find_tensor(f, "blk.0.ffn_down.weight")->dtype, GGUF_DTYPE_F16);
    cr_expect_eq(gguf_find_tensor(f, "blk.0.ffn_up.weight")->dtype, GGUF_DTYPE_Q8_0);
    cr_expect_eq(gguf_find_tensor(f, "blk.1.attn_q_norm.weight")->dtype, GGUF_DTYPE_F32);
    gguf_close(f);
    free(model);

    /* llama3 scaling divides frequencies: high ones by 1, low ones by the factor */
    model = make_model("three", LLAMA, "{\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8.0, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0, \"original_max_position_embeddings\": 64}}", NULL, 0);
    cr_assert_eq(export(model, "three.gguf", true, GGUF_DTYPE_F32), OK, "%s", fail_message());
    f = open_gguf("three.gguf");
    const struct gguf_tensor *t = gguf_find_tensor(f, "rope_freqs.weight");
    float divide[8];
    cr_assert(t && t->count == 8);
    gguf_to_float(t, 0, 8, divide);
    cr_expect(divide[0] == 1 && divide[7] == 8, "%g %g", (double)divide[0], (double)divide[7]);
    cr_expect(!gguf_find_key(f, "llama.rope.scaling.type"));
    gguf_close(f);
    free(model);

    /* yarn's own factor is llama.cpp's, another is given relative to it */
    model = make_model("yarn", QWEN2, "{\"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 128, \"attention_factor\": 1.5}}", NULL, 0);
    cr_assert_eq(export(model, "yarn.gguf", true, GGUF_DTYPE_BF16), OK, "%s", fail_message());
    f = open_gguf("yarn.gguf");
    cr_expect(string_is(f, "qwen2.rope.scaling.type", "yarn") && number_of(f, "qwen2.rope.scaling.factor") == 4 && number_of(f, "qwen2.rope.scaling.original_context_length") == 128);
    cr_expect_float_eq(number_of(f, "qwen2.rope.scaling.attn_factor"), 1.5 / (0.1 * log(4) + 1), 1e-6);
    cr_expect_eq(number_of(f, "general.file_type"), 32);
    gguf_close(f);
    free(model);
}

/* A small byte-level vocabulary with a hole, an added token, a special one and a merge with nothing special about it. */
static void write_tokenizer(const char *model, const char *pattern)
{
    char *file = path_join(model, "tokenizer.json"), *config = path_join(model, "tokenizer_config.json");
    json_t *vocab = json_object(), *merges = json_pack("[[s, s]]", "a", "b");
    for (int i = 0; i < 26; i++) json_object_set_new(vocab, (char[]){(char)('a' + i), 0}, json_integer(i));
    json_object_set_new(vocab, "ab", json_integer(26));
    json_object_set_new(vocab, "<|end|>", json_integer(28));
    json_object_set_new(vocab, "<tool\xe2\x96\x81" "call>", json_integer(29));
    json_t *o = json_pack("{s:s, s:n, s:n, s:[{s:i, s:s, s:b, s:b, s:b, s:b, s:b}, {s:i, s:s, s:b, s:b, s:b, s:b, s:b}], s:n, s:{s:s, s:[{s:s, s:{s:s}, s:s, s:b}, {s:s, s:b, s:b, s:b}]},"
                          "s:n, s:{s:s, s:b, s:b, s:b}, s:{s:s, s:n, s:n, s:n, s:n, s:b, s:b, s:b, s:o, s:o}}",
                          "version", "1.0", "truncation", "padding", "added_tokens",
                          "id", 28, "content", "<|end|>", "single_word", 0, "lstrip", 0, "rstrip", 0, "normalized", 0, "special", 1,
                          "id", 29, "content", "<tool\xe2\x96\x81" "call>", "single_word", 0, "lstrip", 0, "rstrip", 0, "normalized", 0, "special", 0,
                          "normalizer", "pre_tokenizer", "type", "Sequence", "pretokenizers",
                          "type", "Split", "pattern", "Regex", pattern, "behavior", "Isolated", "invert", 0, "type", "ByteLevel", "add_prefix_space", 0, "trim_offsets", 0, "use_regex", 0,
                          "post_processor", "decoder", "type", "ByteLevel", "add_prefix_space", 1, "trim_offsets", 1, "use_regex", 1,
                          "model", "type", "BPE", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", 0, "byte_fallback", 0, "ignore_merges", 0,
                          "vocab", vocab, "merges", merges);
    cr_assert(o, "the tokenizer's JSON");
    cr_assert_eq(json_write_file(file, o), OK);
    json_decref(o);
    o = json_pack("{s:s, s:s, s:b}", "eos_token", "<|end|>", "unk_token", "ab", "add_bos_token", 0);
    cr_assert_eq(json_write_file(config, o), OK);
    json_decref(o);
    free(file);
    free(config);
}

static int export_with_tokenizer(const char *model, const char *name)
{
    char *path = path_join(dir, name);
    struct export_options o = {.model = model, .tokenizer_dir = model, .path = path, .gguf = true, .dtype = GGUF_DTYPE_F32, .backend = {.device = "cpu", .threads = 1}};
    int rc = export_run(&o);
    free(path);
    return rc;
}

Test(export, vocabulary)
{
    char *model = make_model("m", QWEN2, NULL, NULL, 0);
    write_tokenizer(model, "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+");
    cr_assert_eq(export_with_tokenizer(model, "out.gguf"), OK, "%s", fail_message());
    struct gguf_file *f = open_gguf("out.gguf");
    cr_expect(string_is(f, "tokenizer.ggml.model", "gpt2") && string_is(f, "tokenizer.ggml.pre", "qwen2"));
    const struct gguf_value *tokens = gguf_find_key(f, "tokenizer.ggml.tokens"), *types = gguf_find_key(f, "tokenizer.ggml.token_type"), *merges = gguf_find_key(f, "tokenizer.ggml.merges");
    cr_assert(tokens->count == 71 && types->count == 71 && merges->count == 1);
    static const struct { uint64_t id; const char *text; int type; } want[] = {{0, "a", 1}, {26, "ab", 1}, {27, "[PAD27]", 5}, {28, "<|end|>", 3}, {29, "<tool call>", 4}, {30, "[PAD30]", 5}, {70, "[PAD70]", 5}};
    const char *s;
    size_t n, at = 0;
    for (uint64_t id = 0, w = 0; gguf_next_string(tokens, &at, &s, &n); id++)
        if (w < sizeof want / sizeof *want && want[w].id == id) {
            cr_expect(n == strlen(want[w].text) && !memcmp(s, want[w].text, n) && gguf_item(types, id) == want[w].type, "token %d is %.*s", (int)id, (int)n, s);
            w++;
        }
    at = 0;
    cr_expect(gguf_next_string(merges, &at, &s, &n) && n == 3 && !memcmp(s, "a b", 3));
    cr_expect(number_of(f, "tokenizer.ggml.eos_token_id") == 28 && number_of(f, "tokenizer.ggml.unknown_token_id") == 26 && !gguf_find_key(f, "tokenizer.ggml.bos_token_id"));
    const struct gguf_value *add = gguf_find_key(f, "tokenizer.ggml.add_bos_token");
    cr_expect(add && add->type == GGUF_BOOL && add->data[0] == 0);
    gguf_close(f);

    write_tokenizer(model, "[a-z]+|.");
    cr_expect_eq(export_with_tokenizer(model, "other.gguf"), ERR_USAGE);
    cr_expect(strstr(fail_message(), "splits text"), "%s", fail_message());
    free(model);
}

/* ---- refusals ---- */

#define REFUSED(status, words, call) do { \
    int entries_ = count_entries(); \
    cr_expect_eq(call, status, "%s: %s", words, fail_message()); \
    cr_expect(strstr(fail_message(), words), "\"%s\" is not in: %s", words, fail_message()); \
    cr_expect_eq(count_entries(), entries_, "something was left"); } while (0)

Test(export, values_that_do_not_fit)
{
    char *nan = make_model("nan", QWEN2, NULL, "model.layers.1.mlp.up_proj.weight", NAN), *inf = make_model("inf", LLAMA, NULL, "model.norm.weight", INFINITY);
    char *large = make_model("large", LLAMA, NULL, "model.layers.0.self_attn.k_proj.weight", 70000), *huge = make_model("huge", LLAMA, NULL, "model.layers.0.self_attn.v_proj.weight", 3.4e38f);
    char *vector = make_model("vector", LLAMA, NULL, "model.norm.weight", -66000);
    for (int gguf = 0; gguf < 2; gguf++) {
        REFUSED(ERR_NUMERIC, "model.layers.1.mlp.up_proj.weight holds NaN at element 5", export(nan, "out", gguf, GGUF_DTYPE_F32));
        REFUSED(ERR_NUMERIC, "model.norm.weight holds Inf", export(inf, "out", gguf, GGUF_DTYPE_BF16));
        REFUSED(ERR_NUMERIC, "k_proj.weight holds 70000 at element 5, which f16 cannot hold; use export.dtype bf16", export(large, "out", gguf, GGUF_DTYPE_F16));
        REFUSED(ERR_NUMERIC, "which bf16 cannot hold; use export.dtype f32", export(huge, "out", gguf, GGUF_DTYPE_BF16));
    }
    REFUSED(ERR_NUMERIC, "which f16 cannot hold", export(vector, "out", false, GGUF_DTYPE_F16));
    cr_expect_eq(export(vector, "vector.gguf", true, GGUF_DTYPE_F16), OK, "%s", fail_message());      /* vectors are f32 there */
    REFUSED(ERR_NUMERIC, "v_proj.weight", export(huge, "out", true, GGUF_DTYPE_Q8_0));
    cr_expect_eq(export(large, "large.gguf", true, GGUF_DTYPE_Q8_0), OK, "%s", fail_message());       /* 70000 / 127 fits */
    free(nan); free(inf); free(large); free(huge); free(vector);
}

Test(export, what_llama_cpp_cannot_say)
{
    static const char yarn[] = "{\"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 16, \"beta_fast\": 16.0}}";
    static const char llama3[] = "{\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8.0, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0, \"original_max_position_embeddings\": 16}}";
    char *a = make_model("a", QWEN3, yarn, NULL, 0), *b = make_model("b", QWEN2, llama3, NULL, 0), *c = make_model("c", QWEN3, "{\"attention_bias\": true}", NULL, 0);
    REFUSED(ERR_USAGE, "beta_fast 16", export(a, "out", true, GGUF_DTYPE_F32));
    REFUSED(ERR_USAGE, "llama3", export(b, "out", true, GGUF_DTYPE_F32));
    REFUSED(ERR_USAGE, "attention_bias", export(c, "out", true, GGUF_DTYPE_F32));
    REFUSED(ERR_USAGE, "gguf only", export(a, "out", false, GGUF_DTYPE_Q8_0));
    cr_expect_eq(export(a, "out", false, GGUF_DTYPE_F32), OK, "%s", fail_message());
    free(a); free(b); free(c);
}

Test(export, never_overwrites_and_cleans_up)
{
    char *model = make_model("m", QWEN2, NULL, NULL, 0), *empty = path_join(dir, "empty"), *link = path_join(dir, "link"), *stale = path_join(dir, "new.tmp-1999999999"), *other = path_join(dir, "new.tmp-x");
    cr_assert(dir_make(empty) == OK && !symlink("/nowhere", link));
    for (int gguf = 0; gguf < 2; gguf++) {
        REFUSED(ERR_USAGE, "not overwritten", export(model, "empty", gguf, GGUF_DTYPE_F32));
        REFUSED(ERR_USAGE, "not overwritten", export(model, "empty/", gguf, GGUF_DTYPE_F32));
        REFUSED(ERR_USAGE, "not overwritten", export(model, "link", gguf, GGUF_DTYPE_F32));
        cr_assert_eq(failpoint_set("export.written:enospc"), OK);
        REFUSED(ERR_IO, "No space", export(model, "new", gguf, GGUF_DTYPE_F32));
        cr_assert_eq(failpoint_set("export.checked:error"), OK);
        REFUSED(ERR_IO, "export.checked", export(model, "new", gguf, GGUF_DTYPE_F32));
        cr_assert_eq(failpoint_set(NULL), OK);
    }
    cr_assert(dir_make(stale) == OK && dir_make(other) == OK);           /* of a process that is gone; of nobody we know */
    cr_expect_eq(export(model, "new", true, GGUF_DTYPE_F32), OK, "%s", fail_message());
    cr_expect(!path_exists(stale) && path_exists(other));
    free(model); free(empty); free(link); free(stale); free(other);
}

/* A GGUF file that is well formed and not this model is refused by the loader, not loaded wrongly. */
Test(export, foreign_files)
{
    char *model = make_model("m", LLAMA, NULL, NULL, 0), *path = path_join(dir, "out.gguf");
    cr_assert_eq(export(model, "out.gguf", true, GGUF_DTYPE_F32), OK, "%s", fail_message());
    static const struct { const char *from, *to; } edits[] = {      /* the same length: the file stays well formed */
        {"llama.block_count", "llama.blockscount"}, {"blk.1.attn_k.weight", "blk.1.attn_x.weight"}, {"llama.rope.freq_base", "llama.rope.freq_bass"},
        {"token_embd.weight", "token_embX.weight"}, {"output.weight", "outpuX.weight"}};
    for (size_t i = 0; i < sizeof edits / sizeof *edits; i++) {
        char *data, *bad = path_join(dir, "bad.gguf"), *found;
        size_t n;
        cr_assert_eq(file_read(path, 1 << 22, &data, &n), OK);
        cr_assert((found = memmem(data, n, edits[i].from, strlen(edits[i].from))), "%s", edits[i].from);
        memcpy(found, edits[i].to, strlen(edits[i].to));
        cr_assert_eq(file_replace(bad, data, n), OK);
        struct gguf_file *f = open_gguf("bad.gguf");
        struct model_config *c = NULL;
        struct backend *be;
        int rc = gguf_model_config(f, &c);
        if (rc == OK) {
            cr_assert_eq(backend_open(&be, &(struct backend_options){.device = "cpu", .threads = 1}), OK);
            struct memory_plan *plan = memory_plan_new(be);
            struct model *m = model_new(be, c, &(struct model_options){.N = 4, .max_doc = 4, .head_rows = 4}, plan);
            memory_add_scratch(plan, model_scratch_bytes(m, 1));
            cr_assert_eq(memory_commit(plan, 0), OK);
            model_ready(m);
            rc = gguf_model_load(f, m);
            model_free(m);
            memory_plan_free(plan);
            backend_close(be);
        }
        cr_expect_eq(rc, ERR_INPUT, "%s", edits[i].to);
        model_config_free(c);
        gguf_close(f);
        free(data);
        free(bad);
    }
    free(model);
    free(path);
}
