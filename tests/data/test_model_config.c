/* config.json: published files give the shapes they are known for, both spellings mean the same, what would change the maths is
 * refused by its key, rotary frequencies agree with transformers, and what is written is read back the same. */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "data/model_config.h"

static json_t *parse(const char *text)
{
    json_t *json;
    cr_assert_eq(json_read_text(text, strlen(text), "test", &json), OK, "%s: %s", text, fail_message());
    return json;
}

static struct model_config *read_config(const char *text)
{
    struct model_config *c = NULL;
    json_t *json = parse(text);
    int rc = model_config_from_json(&c, json, "config.json");
    json_decref(json);
    cr_assert_eq(rc, OK, "%s", fail_message());
    return c;
}

/* `base` with the keys of `changes` set; a value "DELETE" removes a key */
static json_t *changed(const char *base, const char *changes)
{
    json_t *json = parse(base), *patch = parse(changes), *v;
    const char *key;
    json_object_foreach(patch, key, v) {
        if (json_is_string(v) && !strcmp(json_string_value(v), "DELETE")) json_object_del(json, key);
        else json_object_set(json, key, v);
    }
    json_decref(patch);
    return json;
}

static void expect_refusal(const char *base, const char *changes, const char *part)
{
    struct model_config *c = NULL;
    json_t *json = changed(base, changes);
    int rc = model_config_from_json(&c, json, "config.json");
    json_decref(json);
    cr_expect_eq(rc, ERR_INPUT, "%s is accepted", changes);
    if (rc == OK) model_config_free(c);
    else cr_expect(!strncmp(fail_message(), "config.json: ", 13) && strstr(fail_message(), part), "%s: \"%s\" is not in \"%s\"", changes, part, fail_message());
}

static struct model_config *read_changed(const char *base, const char *changes)
{
    struct model_config *c = NULL;
    json_t *json = changed(base, changes);
    int rc = model_config_from_json(&c, json, "config.json");
    json_decref(json);
    cr_assert_eq(rc, OK, "%s: %s", changes, fail_message());
    return c;
}

/* ---- published files ---- */

static const char *const qwen2_72b =
    "{\"architectures\":[\"Qwen2ForCausalLM\"],\"attention_dropout\":0.0,\"bos_token_id\":151643,\"eos_token_id\":151643,\"hidden_act\":\"silu\","
    "\"hidden_size\":8192,\"initializer_range\":0.02,\"intermediate_size\":29568,\"max_position_embeddings\":131072,\"max_window_layers\":80,"
    "\"model_type\":\"qwen2\",\"num_attention_heads\":64,\"num_hidden_layers\":80,\"num_key_value_heads\":8,\"rms_norm_eps\":1e-05,"
    "\"rope_theta\":1000000.0,\"sliding_window\":131072,\"tie_word_embeddings\":false,\"torch_dtype\":\"bfloat16\","
    "\"transformers_version\":\"4.40.1\",\"use_cache\":true,\"use_sliding_window\":false,\"vocab_size\":152064}";
static const char *const llama31_8b =
    "{\"architectures\":[\"LlamaForCausalLM\"],\"attention_bias\":false,\"attention_dropout\":0.0,\"bos_token_id\":128000,"
    "\"eos_token_id\":[128001,128008,128009],\"hidden_act\":\"silu\",\"hidden_size\":4096,\"initializer_range\":0.02,\"intermediate_size\":14336,"
    "\"max_position_embeddings\":131072,\"mlp_bias\":false,\"model_type\":\"llama\",\"num_attention_heads\":32,\"num_hidden_layers\":32,"
    "\"num_key_value_heads\":8,\"pretraining_tp\":1,\"rms_norm_eps\":1e-05,\"rope_scaling\":{\"factor\":8.0,\"low_freq_factor\":1.0,"
    "\"high_freq_factor\":4.0,\"original_max_position_embeddings\":8192,\"rope_type\":\"llama3\"},\"rope_theta\":500000.0,"
    "\"tie_word_embeddings\":false,\"torch_dtype\":\"bfloat16\",\"transformers_version\":\"4.42.3\",\"use_cache\":true,\"vocab_size\":128256}";
static const char *const mistral_v01 =
    "{\"architectures\":[\"MistralForCausalLM\"],\"bos_token_id\":1,\"eos_token_id\":2,\"hidden_act\":\"silu\",\"hidden_size\":4096,"
    "\"initializer_range\":0.02,\"intermediate_size\":14336,\"max_position_embeddings\":32768,\"model_type\":\"mistral\",\"num_attention_heads\":32,"
    "\"num_hidden_layers\":32,\"num_key_value_heads\":8,\"rms_norm_eps\":1e-05,\"rope_theta\":10000.0,\"sliding_window\":4096,"
    "\"tie_word_embeddings\":false,\"torch_dtype\":\"bfloat16\",\"transformers_version\":\"4.34.0.dev0\",\"use_cache\":true,\"vocab_size\":32000}";
static const char *const qwen3_8b =
    "{\"architectures\":[\"Qwen3ForCausalLM\"],\"attention_bias\":false,\"attention_dropout\":0.0,\"bos_token_id\":151643,\"eos_token_id\":151645,"
    "\"head_dim\":128,\"hidden_act\":\"silu\",\"hidden_size\":4096,\"initializer_range\":0.02,\"intermediate_size\":12288,"
    "\"max_position_embeddings\":40960,\"max_window_layers\":36,\"model_type\":\"qwen3\",\"num_attention_heads\":32,\"num_hidden_layers\":36,"
    "\"num_key_value_heads\":8,\"rms_norm_eps\":1e-06,\"rope_scaling\":null,\"rope_theta\":1000000,\"sliding_window\":null,"
    "\"tie_word_embeddings\":false,\"torch_dtype\":\"bfloat16\",\"transformers_version\":\"4.51.0\",\"use_cache\":true,"
    "\"use_sliding_window\":false,\"vocab_size\":151936}";
static const char *const llama2_7b =
    "{\"_name_or_path\":\"meta-llama/Llama-2-7b-hf\",\"architectures\":[\"LlamaForCausalLM\"],\"bos_token_id\":1,\"eos_token_id\":2,"
    "\"hidden_act\":\"silu\",\"hidden_size\":4096,\"initializer_range\":0.02,\"intermediate_size\":11008,\"max_position_embeddings\":4096,"
    "\"model_type\":\"llama\",\"num_attention_heads\":32,\"num_hidden_layers\":32,\"num_key_value_heads\":32,\"pretraining_tp\":1,"
    "\"rms_norm_eps\":1e-05,\"rope_scaling\":null,\"tie_word_embeddings\":false,\"torch_dtype\":\"float16\","
    "\"transformers_version\":\"4.31.0.dev0\",\"use_cache\":true,\"vocab_size\":32000}";

Test(model_config, published)
{
    /* the file, or what differs from one of its family; parameters as the model cards and transformers count them */
    static const struct {
        const char *name, *base, *changes;
        enum architecture arch;
        int64_t V, C, F;
        int L, Hq, Hkv, D;
        bool bias, tied;
        double eps, theta;
        enum rope_type rope;
        int64_t window, parameters;
    } cases[] = {
        {"Qwen2-72B", qwen2_72b, "{}", ARCH_QWEN2, 152064, 8192, 29568, 80, 64, 8, 128, true, false, 1e-5, 1e6, ROPE_DEFAULT, 0, 72706203648},
        {"Qwen2.5-72B-Instruct", qwen2_72b, "{\"eos_token_id\":151645,\"max_position_embeddings\":32768,\"max_window_layers\":70,\"rms_norm_eps\":1e-06,\"transformers_version\":\"4.43.1\"}",
         ARCH_QWEN2, 152064, 8192, 29568, 80, 64, 8, 128, true, false, 1e-6, 1e6, ROPE_DEFAULT, 0, 72706203648},
        {"Qwen2.5-7B", qwen2_72b, "{\"hidden_size\":3584,\"intermediate_size\":18944,\"max_window_layers\":28,\"num_attention_heads\":28,\"num_hidden_layers\":28,"
         "\"num_key_value_heads\":4,\"rms_norm_eps\":1e-06,\"use_mrope\":false}", ARCH_QWEN2, 152064, 3584, 18944, 28, 28, 4, 128, true, false, 1e-6, 1e6, ROPE_DEFAULT, 0, 7615616512},
        {"Qwen2.5-0.5B", qwen2_72b, "{\"hidden_size\":896,\"intermediate_size\":4864,\"max_position_embeddings\":32768,\"max_window_layers\":24,\"num_attention_heads\":14,"
         "\"num_hidden_layers\":24,\"num_key_value_heads\":2,\"rms_norm_eps\":1e-06,\"sliding_window\":32768,\"tie_word_embeddings\":true,\"use_mrope\":false,\"vocab_size\":151936}",
         ARCH_QWEN2, 151936, 896, 4864, 24, 14, 2, 64, true, true, 1e-6, 1e6, ROPE_DEFAULT, 0, 494032768},
        {"DeepSeek-R1-Distill-Qwen-7B", qwen2_72b, "{\"hidden_size\":3584,\"intermediate_size\":18944,\"max_window_layers\":28,\"num_attention_heads\":28,\"num_hidden_layers\":28,"
         "\"num_key_value_heads\":4,\"rms_norm_eps\":1e-06,\"rope_theta\":10000,\"sliding_window\":4096,\"use_mrope\":false,\"transformers_version\":\"4.44.0\"}",
         ARCH_QWEN2, 152064, 3584, 18944, 28, 28, 4, 128, true, false, 1e-6, 1e4, ROPE_DEFAULT, 0, 7615616512},
        {"DeepSeek-R1-Distill-Qwen-1.5B", qwen2_72b, "{\"hidden_size\":1536,\"intermediate_size\":8960,\"max_window_layers\":21,\"num_attention_heads\":12,\"num_hidden_layers\":28,"
         "\"num_key_value_heads\":2,\"rms_norm_eps\":1e-06,\"rope_theta\":10000,\"sliding_window\":4096,\"use_mrope\":false,\"vocab_size\":151936}",
         ARCH_QWEN2, 151936, 1536, 8960, 28, 12, 2, 128, true, false, 1e-6, 1e4, ROPE_DEFAULT, 0, 1777088000},
        {"Qwen3-8B", qwen3_8b, "{}", ARCH_QWEN3, 151936, 4096, 12288, 36, 32, 8, 128, false, false, 1e-6, 1e6, ROPE_DEFAULT, 0, 8190735360},
        {"Qwen3-0.6B", qwen3_8b, "{\"hidden_size\":1024,\"intermediate_size\":3072,\"max_window_layers\":28,\"num_attention_heads\":16,\"num_hidden_layers\":28,\"tie_word_embeddings\":true}",
         ARCH_QWEN3, 151936, 1024, 3072, 28, 16, 8, 128, false, true, 1e-6, 1e6, ROPE_DEFAULT, 0, 596049920},
        {"Qwen3-32B", qwen3_8b, "{\"hidden_size\":5120,\"intermediate_size\":25600,\"max_window_layers\":64,\"num_attention_heads\":64,\"num_hidden_layers\":64}",
         ARCH_QWEN3, 151936, 5120, 25600, 64, 64, 8, 128, false, false, 1e-6, 1e6, ROPE_DEFAULT, 0, 32762123264},
        {"Llama-2-7b", llama2_7b, "{}", ARCH_LLAMA, 32000, 4096, 11008, 32, 32, 32, 128, false, false, 1e-5, 1e4, ROPE_DEFAULT, 0, 6738415616},
        {"Meta-Llama-3-8B", llama31_8b, "{\"mlp_bias\":\"DELETE\",\"eos_token_id\":128001,\"max_position_embeddings\":8192,\"rope_scaling\":null,\"transformers_version\":\"4.40.0.dev0\"}",
         ARCH_LLAMA, 128256, 4096, 14336, 32, 32, 8, 128, false, false, 1e-5, 5e5, ROPE_DEFAULT, 0, 8030261248},
        {"Llama-3.1-8B-Instruct", llama31_8b, "{}", ARCH_LLAMA, 128256, 4096, 14336, 32, 32, 8, 128, false, false, 1e-5, 5e5, ROPE_LLAMA3, 0, 8030261248},
        {"Llama-3.2-1B", llama31_8b, "{\"eos_token_id\":128001,\"head_dim\":64,\"hidden_size\":2048,\"intermediate_size\":8192,\"num_hidden_layers\":16,\"rope_scaling\":{\"factor\":32.0,"
         "\"high_freq_factor\":4.0,\"low_freq_factor\":1.0,\"original_max_position_embeddings\":8192,\"rope_type\":\"llama3\"},\"tie_word_embeddings\":true}",
         ARCH_LLAMA, 128256, 2048, 8192, 16, 32, 8, 64, false, true, 1e-5, 5e5, ROPE_LLAMA3, 0, 1235814400},
        {"DeepSeek-R1-Distill-Llama-70B", llama31_8b, "{\"eos_token_id\":128001,\"hidden_size\":8192,\"intermediate_size\":28672,\"num_attention_heads\":64,\"num_hidden_layers\":80}",
         ARCH_LLAMA, 128256, 8192, 28672, 80, 64, 8, 128, false, false, 1e-5, 5e5, ROPE_LLAMA3, 0, 70553706496},
        {"TinyLlama-1.1B", llama2_7b, "{\"hidden_size\":2048,\"intermediate_size\":5632,\"max_position_embeddings\":2048,\"num_hidden_layers\":22,\"num_key_value_heads\":4,"
         "\"attention_bias\":false,\"rope_theta\":10000.0,\"transformers_version\":\"4.35.0\"}", ARCH_LLAMA, 32000, 2048, 5632, 22, 32, 4, 64, false, false, 1e-5, 1e4, ROPE_DEFAULT, 0, 1100048384},
        {"Mistral-7B-v0.1", mistral_v01, "{}", ARCH_MISTRAL, 32000, 4096, 14336, 32, 32, 8, 128, false, false, 1e-5, 1e4, ROPE_DEFAULT, 4096, 7241732096},
        {"Mistral-7B-v0.3", mistral_v01, "{\"rope_theta\":1000000.0,\"sliding_window\":null,\"vocab_size\":32768,\"attention_dropout\":0.0,\"transformers_version\":\"4.42.0.dev0\"}",
         ARCH_MISTRAL, 32768, 4096, 14336, 32, 32, 8, 128, false, false, 1e-5, 1e6, ROPE_DEFAULT, 0, 7248023552},
        {"Mistral-Nemo-Base-2407", mistral_v01, "{\"head_dim\":128,\"hidden_size\":5120,\"max_position_embeddings\":128000,\"num_hidden_layers\":40,\"rope_theta\":1000000.0,"
         "\"sliding_window\":null,\"vocab_size\":131072}", ARCH_MISTRAL, 131072, 5120, 14336, 40, 32, 8, 128, false, false, 1e-5, 1e6, ROPE_DEFAULT, 0, 12247782400},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct model_config *c = read_changed(cases[i].base, cases[i].changes);
        const char *n = cases[i].name;
        cr_expect_eq(c->arch, cases[i].arch, "%s", n);
        cr_expect(c->vocab_size == cases[i].V && c->hidden_size == cases[i].C && c->intermediate_size == cases[i].F, "%s", n);
        cr_expect(c->n_layers == cases[i].L && c->n_heads == cases[i].Hq && c->n_kv_heads == cases[i].Hkv && c->head_dim == cases[i].D, "%s", n);
        cr_expect(c->qkv_bias == cases[i].bias && !c->o_bias && !c->mlp_bias && c->qk_norm == (c->arch == ARCH_QWEN3), "%s", n);
        cr_expect(c->tie_embeddings == cases[i].tied && c->rms_norm_eps == (float)cases[i].eps, "%s", n);
        cr_expect(c->rope.theta == cases[i].theta && c->rope.type == cases[i].rope, "%s", n);
        cr_expect(c->sliding_window == cases[i].window && !c->layer_slides == !cases[i].window, "%s", n);
        cr_expect_eq(model_config_parameters(c), cases[i].parameters, "%s: %lld", n, (long long)model_config_parameters(c));
        model_config_free(c);
    }
    struct model_config *c = read_config(llama31_8b);
    cr_expect(c->bos == 128000 && c->pad == -1 && c->eos[0] == 128001 && c->eos[1] == 128008 && c->eos[2] == 128009 && c->eos[3] == -1);
    cr_expect(c->rope.factor == 8 && c->rope.low_freq_factor == 1 && c->rope.high_freq_factor == 4 && c->rope.original_max_position == 8192);
    model_config_free(c);
    c = read_config(qwen2_72b);   /* performance figures of the design: 142.917e9 in products, 5.369e9 in attention at 4096 */
    cr_expect_float_eq(model_config_forward_flops(c, 4096), 148.285e9, 0.002e9);
    model_config_free(c);
    c = read_config(mistral_v01);
    double full = model_config_forward_flops(c, 4096), with_window = model_config_forward_flops(c, 16384);
    cr_expect_float_eq(with_window - full, 4.0 * 32 * 128 * 32 * (4096 - 512 - 2048), 1);
    model_config_free(c);
}

/* ---- spellings and defaults ---- */

static const char *const tiny =
    "{\"architectures\":[\"LlamaForCausalLM\"],\"vocab_size\":100,\"hidden_size\":64,\"intermediate_size\":96,\"num_hidden_layers\":3,"
    "\"num_attention_heads\":4,\"rms_norm_eps\":1e-6,\"max_position_embeddings\":512,\"rope_theta\":10000.0}";

static void hash_of(const char *base, const char *changes, char hex[65])
{
    struct model_config *c = read_changed(base, changes);
    model_config_hash(c, hex);
    model_config_free(c);
}

Test(model_config, defaults_of_each_family)
{
    struct model_config *c = read_config(tiny);
    cr_expect(c->n_kv_heads == 4 && c->head_dim == 16 && !c->qkv_bias && !c->tie_embeddings && c->initializer_range == 0.02);
    cr_expect(c->bos == -1 && c->eos[0] == -1 && c->pad == -1);
    model_config_free(c);
    c = read_changed(tiny, "{\"head_dim\":null,\"num_key_value_heads\":null,\"attention_bias\":true,\"mlp_bias\":true,\"tie_word_embeddings\":true,\"pad_token_id\":-1}");
    cr_expect(c->n_kv_heads == 4 && c->head_dim == 16 && c->qkv_bias && c->o_bias && c->mlp_bias && c->tie_embeddings && c->pad == -1);
    model_config_free(c);
    c = read_changed(tiny, "{\"head_dim\":32}");
    cr_expect_eq(c->head_dim, 32);
    model_config_free(c);
    c = read_changed(tiny, "{\"architectures\":[\"Qwen3ForCausalLM\"],\"num_key_value_heads\":2}");
    cr_expect(c->head_dim == 128 && c->qk_norm && !c->qkv_bias && !c->o_bias);
    model_config_free(c);
    c = read_changed(tiny, "{\"architectures\":[\"Qwen3ForCausalLM\"],\"num_key_value_heads\":null,\"attention_bias\":true,\"hidden_size\":66,\"head_dim\":20}");
    cr_expect(c->head_dim == 20 && c->qk_norm && c->qkv_bias && c->o_bias && c->n_kv_heads == 4);
    model_config_free(c);
    c = read_changed(tiny, "{\"architectures\":\"DELETE\",\"model_type\":\"qwen2\",\"num_key_value_heads\":1,\"attention_bias\":false,\"head_dim\":null}");
    cr_expect(c->arch == ARCH_QWEN2 && c->qkv_bias && !c->o_bias && c->n_kv_heads == 1 && c->head_dim == 16);
    model_config_free(c);
    c = read_changed(tiny, "{\"architectures\":[\"Qwen2ForCausalLM\"],\"num_key_value_heads\":1,\"head_dim\":24}");
    cr_expect_eq(c->head_dim, 24);
    model_config_free(c);
    c = read_changed(tiny, "{\"hidden_size\":64.0,\"rope_theta\":10000,\"quantization_config\":null,\"something_new\":false,\"other\":{},\"more\":[],\"pretraining_tp\":1,"
                           "\"attention_dropout\":0,\"partial_rotary_factor\":1.0,\"torch_dtype\":\"float32\",\"temperature\":0.6}");
    cr_expect_eq(c->hidden_size, 64);
    model_config_free(c);
    c = read_changed(tiny, "{\"architectures\":[\"LlamaForCausalLM\"],\"is_llama_config\":true,\"rope_interleaved\":false}");   /* as SmolLM says */
    cr_expect_eq(c->arch, ARCH_LLAMA);
    model_config_free(c);
}

Test(model_config, sliding_windows)
{
    static const struct { const char *changes; int64_t window; const char *layers; } cases[] = {
        {"{\"model_type\":\"mistral\"}", 4096, "sss"},
        {"{\"model_type\":\"mistral\",\"sliding_window\":null}", 0, NULL},
        {"{\"model_type\":\"mistral\",\"sliding_window\":8,\"use_sliding_window\":true}", 8, "sss"},
        {"{\"model_type\":\"mistral\",\"sliding_window\":8,\"layer_types\":[\"sliding_attention\",\"sliding_attention\",\"sliding_attention\"]}", 8, "sss"},
        {"{\"model_type\":\"qwen2\",\"sliding_window\":8}", 0, NULL},
        {"{\"model_type\":\"qwen2\",\"sliding_window\":8,\"use_sliding_window\":false,\"max_window_layers\":0}", 0, NULL},
        {"{\"model_type\":\"qwen2\",\"use_sliding_window\":true,\"max_window_layers\":1}", 4096, "fss"},
        {"{\"model_type\":\"qwen2\",\"use_sliding_window\":true,\"sliding_window\":null,\"max_window_layers\":1}", 0, NULL},
        {"{\"model_type\":\"qwen2\",\"use_sliding_window\":true,\"sliding_window\":8}", 0, NULL},
        {"{\"model_type\":\"qwen3\",\"use_sliding_window\":true,\"sliding_window\":8,\"max_window_layers\":0}", 8, "sss"},
        {"{\"model_type\":\"qwen3\",\"use_sliding_window\":true,\"sliding_window\":8,\"max_window_layers\":0,\"layer_types\":[\"sliding_attention\",\"full_attention\",\"sliding_attention\"]}", 8, "sfs"},
        {"{\"model_type\":\"qwen3\",\"sliding_window\":8,\"layer_types\":[\"full_attention\",\"full_attention\",\"full_attention\"]}", 0, NULL},
        {"{\"model_type\":\"llama\",\"layer_types\":[\"full_attention\",\"full_attention\",\"full_attention\"],\"sliding_window\":null}", 0, NULL},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char base[600];
        snprintf(base, sizeof base, "{%s,%s", "\"num_key_value_heads\":2", strchr(tiny, ',') + 1);   /* without architectures */
        struct model_config *c = read_changed(base, cases[i].changes), *again;
        json_t *json = model_config_to_json(c, "bfloat16");
        cr_assert_eq(model_config_from_json(&again, json, "again"), OK, "%s", fail_message());
        struct model_config *both[2] = {c, again};
        for (int k = 0; k < 2; k++) {
            cr_expect_eq(both[k]->sliding_window, cases[i].window, "%s", cases[i].changes);
            cr_expect_eq(!both[k]->layer_slides, !cases[i].layers, "%s", cases[i].changes);
            for (int l = 0; l < 3 && both[k]->layer_slides && cases[i].layers; l++) cr_expect_eq(both[k]->layer_slides[l], cases[i].layers[l] == 's', "%s", cases[i].changes);
        }
        json_decref(json);
        model_config_free(c);
        model_config_free(again);
    }
}

Test(model_config, spellings_agree)
{
    static const char *const llama3[] = {
        "{\"rope_theta\":5e5,\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,\"high_freq_factor\":4,\"original_max_position_embeddings\":64}}",
        "{\"rope_theta\":500000,\"rope_scaling\":{\"type\":\"llama3\",\"factor\":8.0,\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,\"original_max_position_embeddings\":64.0}}",
        "{\"rope_theta\":\"DELETE\",\"rope_parameters\":{\"rope_theta\":500000.0,\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,\"high_freq_factor\":4,\"original_max_position_embeddings\":64}}",
        "{\"rope_theta\":500000,\"rope_parameters\":{\"rope_type\":\"llama3\",\"type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,\"high_freq_factor\":4},\"original_max_position_embeddings\":64,\"rope_scaling\":{}}",
        "{\"rope_theta\":500000,\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,\"high_freq_factor\":4,\"original_max_position_embeddings\":64},"
        "\"rope_parameters\":{\"rope_theta\":500000.0,\"type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,\"high_freq_factor\":4,\"original_max_position_embeddings\":64,\"beta_fast\":null}}",
        "{\"rope_theta\":5e5,\"torch_dtype\":\"bfloat16\",\"initializer_range\":0.01,\"eos_token_id\":[1,2],\"max_position_embeddings\":4096,"
        "\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,\"high_freq_factor\":4,\"original_max_position_embeddings\":64}}",
    };
    char first[65], hex[65], plain[65];
    hash_of(tiny, llama3[0], first);
    for (size_t i = 1; i < sizeof llama3 / sizeof *llama3; i++) {
        hash_of(tiny, llama3[i], hex);
        cr_expect_str_eq(first, hex, "%s", llama3[i]);
    }
    /* a hash for every change of the maths */
    static const char *const different[] = {
        "{\"rope_theta\":10001}", "{\"rms_norm_eps\":1e-5}", "{\"tie_word_embeddings\":true}", "{\"num_key_value_heads\":2}", "{\"attention_bias\":true}", "{\"mlp_bias\":true}",
        "{\"head_dim\":32}", "{\"vocab_size\":101}", "{\"num_hidden_layers\":4}", "{\"intermediate_size\":97}", "{\"rope_scaling\":{\"type\":\"linear\",\"factor\":2}}",
        "{\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2}}", "{\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2,\"truncate\":false}}",
        "{\"architectures\":[\"MistralForCausalLM\"],\"num_key_value_heads\":4,\"sliding_window\":null}", "{\"architectures\":[\"MistralForCausalLM\"],\"num_key_value_heads\":4,\"sliding_window\":9}",
    };
    enum { N = sizeof different / sizeof *different };
    char hashes[N][65];
    hash_of(tiny, "{}", plain);
    hash_of(tiny, "{\"rope_theta\":\"DELETE\",\"rope_parameters\":{\"rope_theta\":10000,\"rope_type\":\"default\"}}", hex);
    cr_expect_str_eq(plain, hex);
    for (int i = 0; i < N; i++) {
        hash_of(tiny, different[i], hashes[i]);
        cr_expect_str_neq(plain, hashes[i], "%s", different[i]);
        for (int k = 0; k < i; k++) cr_expect_str_neq(hashes[k], hashes[i], "%s and %s", different[k], different[i]);
    }
}

/* ---- refusals ---- */

#define ROPE(inside) "{\"rope_scaling\":{" inside "}}"
#define L3 "\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,\"high_freq_factor\":4"

Test(model_config, refuses_by_name)
{
    static const struct { const char *changes, *part; } cases[] = {
        {"{\"architectures\":[\"GemmaForCausalLM\"]}", "architectures is [\"GemmaForCausalLM\"]"}, {"{\"architectures\":[]}", "architectures is []"},
        {"{\"architectures\":[\"LlamaForCausalLM\",\"LlamaForCausalLM\"]}", "architectures is"}, {"{\"architectures\":\"LlamaForCausalLM\"}", "architectures is"},
        {"{\"architectures\":[\"LlamaForSequenceClassification\"]}", "architectures is"}, {"{\"architectures\":\"DELETE\"}", "neither architectures nor model_type"},
        {"{\"model_type\":\"mixtral\"}", "model_type is \"mixtral\""}, {"{\"model_type\":\"qwen2\"}", "model_type is \"qwen2\" but architectures is \"LlamaForCausalLM\""},
        {"{\"model_type\":7}", "model_type is 7"},
        {"{\"vocab_size\":\"DELETE\"}", "\"vocab_size\" is missing"}, {"{\"hidden_size\":null}", "\"hidden_size\" is missing"}, {"{\"intermediate_size\":\"DELETE\"}", "\"intermediate_size\" is missing"},
        {"{\"num_hidden_layers\":\"DELETE\"}", "\"num_hidden_layers\" is missing"}, {"{\"num_attention_heads\":\"DELETE\"}", "\"num_attention_heads\" is missing"},
        {"{\"max_position_embeddings\":\"DELETE\"}", "\"max_position_embeddings\" is missing"},
        {"{\"architectures\":[\"Qwen2ForCausalLM\"]}", "\"num_key_value_heads\" is missing"}, {"{\"architectures\":[\"MistralForCausalLM\"]}", "\"num_key_value_heads\" is missing"},
        {"{\"vocab_size\":0}", "\"vocab_size\" is 0"}, {"{\"vocab_size\":262145}", "\"vocab_size\" is 262145"}, {"{\"vocab_size\":-5}", "\"vocab_size\" is -5"},
        {"{\"vocab_size\":\"100\"}", "\"vocab_size\" is \"100\", not an integer"}, {"{\"vocab_size\":100.5}", "\"vocab_size\" is 100.5, not an integer"},
        {"{\"vocab_size\":1e300}", "\"vocab_size\" is 1"}, {"{\"vocab_size\":true}", "\"vocab_size\" is true"}, {"{\"vocab_size\":9223372036854775807}", "\"vocab_size\" is 9223372036854775807"},
        {"{\"hidden_size\":1048580}", "\"hidden_size\" is 1048580"}, {"{\"intermediate_size\":0}", "\"intermediate_size\" is 0"}, {"{\"num_hidden_layers\":1025}", "\"num_hidden_layers\" is 1025"},
        {"{\"num_attention_heads\":0}", "\"num_attention_heads\" is 0"}, {"{\"num_attention_heads\":3}", "hidden_size 64 is not a multiple of num_attention_heads 3"},
        {"{\"num_key_value_heads\":3}", "num_attention_heads 4 is not a multiple of num_key_value_heads 3"}, {"{\"num_key_value_heads\":0}", "\"num_key_value_heads\" is 0"},
        {"{\"num_key_value_heads\":8}", "\"num_key_value_heads\" is 8"}, {"{\"head_dim\":15}", "head_dim 15"}, {"{\"head_dim\":0}", "\"head_dim\" is 0"}, {"{\"head_dim\":5000}", "\"head_dim\" is 5000"},
        {"{\"hidden_size\":60}", "head_dim 15"}, {"{\"hidden_size\":1048576,\"head_dim\":\"DELETE\"}", "head_dim 262144"},
        {"{\"architectures\":[\"Qwen3ForCausalLM\"],\"num_key_value_heads\":2,\"head_dim\":null}", "\"head_dim\" is null"},
        {"{\"max_position_embeddings\":0}", "\"max_position_embeddings\" is 0"}, {"{\"rms_norm_eps\":0}", "\"rms_norm_eps\" is 0"}, {"{\"rms_norm_eps\":-1e-6}", "\"rms_norm_eps\" is -1e-06"},
        {"{\"rms_norm_eps\":\"1e-6\"}", "\"rms_norm_eps\" is \"1e-6\""}, {"{\"initializer_range\":2}", "\"initializer_range\" is 2"}, {"{\"hidden_act\":\"gelu\"}", "\"hidden_act\" is \"gelu\""},
        {"{\"hidden_act\":3}", "\"hidden_act\" is not a string"}, {"{\"attention_bias\":1}", "\"attention_bias\" is not true or false"}, {"{\"tie_word_embeddings\":\"no\"}", "\"tie_word_embeddings\""},
        {"{\"attention_dropout\":0.1}", "\"attention_dropout\" is 0.1"}, {"{\"pretraining_tp\":2}", "\"pretraining_tp\" is 2"}, {"{\"partial_rotary_factor\":0.5}", "\"partial_rotary_factor\" is 0.5"},
        {"{\"quantization_config\":{\"quant_method\":\"gptq\"}}", "\"quantization_config.quant_method\" is \"gptq\""},
        {"{\"compression_config\":{\"a\":1}}", "\"compression_config\""}, {"{\"auto_map\":{\"AutoModel\":\"x.Y\"}}", "\"auto_map\""},
        {"{\"final_logit_softcapping\":30.0}", "\"final_logit_softcapping\" is 30"}, {"{\"attn_logit_softcapping\":50}", "\"attn_logit_softcapping\""},
        {"{\"logits_scaling\":8.0}", "\"logits_scaling\" is 8.0"}, {"{\"residual_multiplier\":0.22}", "\"residual_multiplier\""}, {"{\"attention_multiplier\":0.01}", "\"attention_multiplier\""},
        {"{\"num_experts\":8}", "\"num_experts\" is 8: LlamaForCausalLM does not have it"}, {"{\"use_qk_norm\":true}", "\"use_qk_norm\" is true"}, {"{\"no_rope_layers\":[1,0,1]}", "\"no_rope_layers\" is [1,0,1]"},
        {"{\"sliding_window\":4096}", "\"sliding_window\" is 4096: LlamaForCausalLM does not have it"}, {"{\"is_encoder_decoder\":true}", "\"is_encoder_decoder\""},
        {"{\"architectures\":[\"MistralForCausalLM\"],\"num_key_value_heads\":2,\"attention_bias\":true}", "\"attention_bias\" is true: MistralForCausalLM does not have it"},
        {"{\"architectures\":[\"Qwen2ForCausalLM\"],\"num_key_value_heads\":2,\"mlp_bias\":true}", "\"mlp_bias\" is true"},
        {"{\"architectures\":[\"Qwen2ForCausalLM\"],\"num_key_value_heads\":2,\"use_mrope\":true}", "\"use_mrope\" is true"},
        {"{\"architectures\":[\"Qwen2ForCausalLM\"],\"num_key_value_heads\":2,\"use_sliding_window\":true,\"sliding_window\":0}", "\"sliding_window\" is 0"},
        {"{\"architectures\":[\"Qwen2ForCausalLM\"],\"num_key_value_heads\":2,\"layer_types\":[\"full_attention\"]}", "layer_types is not a list of num_hidden_layers = 3"},
        {"{\"architectures\":[\"Qwen2ForCausalLM\"],\"num_key_value_heads\":2,\"layer_types\":[\"full_attention\",\"chunked_attention\",\"full_attention\"]}", "layer_types[1] is \"chunked_attention\""},
        {"{\"architectures\":[\"Qwen2ForCausalLM\"],\"num_key_value_heads\":2,\"layer_types\":[\"full_attention\",\"full_attention\",\"sliding_attention\"]}", "layer_types[2]"},
        {"{\"architectures\":[\"MistralForCausalLM\"],\"num_key_value_heads\":2,\"layer_types\":[\"full_attention\",\"full_attention\",\"sliding_attention\"]}", "layer_types[0]"},
        {"{\"architectures\":[\"MistralForCausalLM\"],\"num_key_value_heads\":2,\"use_sliding_window\":false}", "use_sliding_window and sliding_window contradict"},
        {"{\"bos_token_id\":100}", "\"bos_token_id\" is 100"}, {"{\"eos_token_id\":[1,100]}", "eos_token_id[1]"}, {"{\"eos_token_id\":[1,2,3,4,5,6,7,8]}", "eos_token_id lists 8"},
        {"{\"eos_token_id\":\"</s>\"}", "\"eos_token_id\" is \"</s>\""}, {"{\"pad_token_id\":-2}", "\"pad_token_id\" is -2"},
        {"{\"rope_theta\":\"DELETE\"}", "\"rope_theta\" is missing"}, {"{\"rope_theta\":null}", "\"rope_theta\" is missing"}, {"{\"rope_theta\":\"DELETE\",\"transformers_version\":\"4.45.0\"}", "\"rope_theta\" is missing"},
        {"{\"rope_theta\":\"DELETE\",\"transformers_version\":\"4.31.0\",\"architectures\":[\"MistralForCausalLM\"],\"num_key_value_heads\":2}", "\"rope_theta\" is missing"},
        {"{\"rope_theta\":\"DELETE\",\"rope_parameters\":{\"rope_type\":\"default\"}}", "\"rope_theta\" is missing"},
        {"{\"rope_theta\":1}", "\"rope_theta\" is 1"}, {"{\"rope_theta\":-10000}", "\"rope_theta\" is -10000"}, {"{\"rope_theta\":\"1e4\"}", "\"rope_theta\" of the file's top level is not a number"},
        {"{\"rope_theta\":1e16}", "\"rope_theta\" is 1e+16"}, {"{\"rope_parameters\":{\"rope_theta\":20000,\"rope_type\":\"default\"}}", "\"rope_theta\" is 10000 in the file's top level and 20000 in rope_parameters"},
        {"{\"rope_scaling\":3}", "\"rope_scaling\" is not an object"}, {"{\"rope_parameters\":[]}", "\"rope_parameters\" is not an object"},
        {ROPE("\"type\":\"dynamic\",\"factor\":2"), "rope type \"dynamic\""}, {ROPE("\"type\":\"longrope\",\"long_factor\":[1],\"short_factor\":[1]"), "rope type \"longrope\""},
        {ROPE("\"type\":\"su\""), "rope type \"su\""}, {ROPE("\"type\":\"mrope\",\"mrope_section\":[16,24,24]"), "rope type \"mrope\""}, {ROPE("\"rope_type\":3"), "rope_type is not a string"},
        {ROPE("\"rope_type\":\"linear\",\"type\":\"yarn\",\"factor\":2"), "rope_type is \"linear\" and type is \"yarn\""},
        {"{\"rope_scaling\":{\"type\":\"linear\",\"factor\":2},\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":10000}}", "rope_scaling is of type \"linear\", rope_parameters of type \"default\""},
        {"{\"rope_scaling\":{\"type\":\"linear\",\"factor\":2},\"rope_parameters\":{\"rope_type\":\"linear\",\"factor\":4}}", "disagree about \"factor\""},
        {"{\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2},\"rope_parameters\":{\"rope_type\":\"yarn\",\"factor\":2,\"beta_fast\":16}}", "disagree about \"beta_fast\""},
        {"{\"rope_parameters\":{\"full_attention\":{\"rope_type\":\"default\",\"rope_theta\":1e4},\"sliding_attention\":{\"rope_type\":\"default\",\"rope_theta\":1e4}}}", "per layer type"},
        {ROPE("\"type\":\"linear\""), "lack \"factor\""}, {ROPE("\"type\":\"linear\",\"factor\":0.5"), "\"factor\" of the rope parameters is 0.5"}, {ROPE("\"type\":\"linear\",\"factor\":\"2\""), "\"factor\" of the rope parameters is not a number"},
        {ROPE("\"type\":\"linear\",\"factor\":2,\"beta_fast\":1"), "\"beta_fast\" of rope_scaling is not known for rope type \"linear\""}, {ROPE("\"factor\":2"), "\"factor\" of rope_scaling is not known for rope type \"default\""},
        {ROPE("\"rope_type\":\"llama3\",\"factor\":8,\"high_freq_factor\":4"), "lack \"low_freq_factor\""}, {ROPE("\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,\"high_freq_factor\":4"), "high_freq_factor 4 is not above"},
        {ROPE(L3 ",\"original_max_position_embeddings\":0"), "\"original_max_position_embeddings\" is 0"}, {ROPE(L3 ",\"original_max_position_embeddings\":12.5"), "\"original_max_position_embeddings\" is 12.5"},
        {"{\"original_max_position_embeddings\":64,\"rope_scaling\":{" L3 ",\"original_max_position_embeddings\":32}}", "\"original_max_position_embeddings\" is 64 in the file's top level and 32 in rope_scaling"},
        {ROPE(L3 ",\"partial_rotary_factor\":0.25"), "\"partial_rotary_factor\" is 0.25"},
        {ROPE("\"type\":\"yarn\""), "lack \"factor\""}, {ROPE("\"type\":\"yarn\",\"factor\":2,\"truncate\":1"), "\"truncate\""}, {ROPE("\"type\":\"yarn\",\"factor\":2,\"beta_fast\":1,\"beta_slow\":2"), "beta_fast 1 is below beta_slow 2"},
        {ROPE("\"type\":\"yarn\",\"factor\":2,\"attention_factor\":0"), "\"attention_factor\" of the rope parameters is 0"}, {ROPE("\"type\":\"yarn\",\"factor\":null,\"original_max_position_embeddings\":1024"), "rope factor is null"},
        {ROPE("\"type\":\"yarn\",\"factor\":1000,\"mscale\":-100,\"mscale_all_dim\":1"), "attention factor of"}, {ROPE("\"type\":\"yarn\",\"factor\":2,\"finetuned\":true"), "\"finetuned\" of rope_scaling is not known"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) expect_refusal(tiny, cases[i].changes, cases[i].part);
    expect_refusal("[]", "{}", "is not a JSON object");
}

/* ---- quantization_config ---- */

#define QUANTISED(members) "{\"quantization_config\":{" members "}}"
#define GROUP(weights) "\"config_groups\":{\"group_0\":{\"targets\":[\"Linear\"],\"input_activations\":{\"dynamic\":true,\"num_bits\":8,\"strategy\":\"token\",\"type\":\"float\"},\"output_activations\":null,\"weights\":{" weights "}}}"
#define COMPRESSED(format, weights) QUANTISED("\"quant_method\":\"compressed-tensors\",\"format\":\"" format "\",\"ignore\":[\"lm_head\"],\"kv_cache_scheme\":null,\"quantization_status\":\"compressed\"," GROUP(weights))
#define E4M3_WEIGHTS "\"num_bits\":8,\"type\":\"float\",\"symmetric\":true,\"dynamic\":false,\"observer\":\"minmax\",\"observer_kwargs\":{},\"actorder\":null,\"group_size\":null,"
#define DEEPSEEK "\"quant_method\":\"fp8\",\"activation_scheme\":\"dynamic\",\"fmt\":\"e4m3\",\"weight_block_size\":[128,128]"

/* As DeepSeek-V3, Qwen3-FP8, AutoFP8, llm-compressor, Llama 3.1 405B FP8 and ModelOpt write it. */
Test(model_config, quantisation_that_is_known)
{
    static const struct { const char *changes, *method; enum scale_kind scales; int64_t rows, cols; } cases[] = {
        {"{}", NULL, SCALE_NONE, 0, 0}, {"{\"quantization_config\":{}}", NULL, SCALE_NONE, 0, 0},
        {QUANTISED(DEEPSEEK), "fp8", SCALE_BLOCK, 128, 128}, {QUANTISED(DEEPSEEK ",\"scale_fmt\":\"ue8m0\""), "fp8", SCALE_BLOCK, 128, 128},
        {QUANTISED(DEEPSEEK ",\"modules_to_not_convert\":[\"lm_head\",\"model.layers.0.input_layernorm\"]"), "fp8", SCALE_BLOCK, 128, 128},
        {QUANTISED("\"quant_method\":\"fp8\",\"weight_block_size\":[1,64]"), "fp8", SCALE_BLOCK, 1, 64},
        {QUANTISED("\"quant_method\":\"fp8\",\"activation_scheme\":\"static\",\"ignored_layers\":[\"lm_head\"],\"kv_cache_scheme\":\"static\""), "fp8", SCALE_TENSOR, 0, 0},
        {QUANTISED("\"quant_method\":\"fp8\",\"weight_block_size\":null,\"dequantize\":true"), "fp8", SCALE_TENSOR, 0, 0},
        {COMPRESSED("float-quantized", E4M3_WEIGHTS "\"strategy\":\"channel\",\"block_structure\":null"), "compressed-tensors", SCALE_ROW, 0, 0},
        {COMPRESSED("naive-quantized", E4M3_WEIGHTS "\"strategy\":\"tensor\""), "compressed-tensors", SCALE_TENSOR, 0, 0},
        {COMPRESSED("float-quantized", E4M3_WEIGHTS "\"strategy\":\"block\",\"block_structure\":[128,64]"), "compressed-tensors", SCALE_BLOCK, 128, 64},
        {QUANTISED("\"quant_method\":\"fbgemm_fp8\",\"activation_scale_ub\":1200.0,\"modules_to_not_convert\":[\"model.layers.0.mlp.down_proj\"]"), "fbgemm_fp8", SCALE_ROW, 0, 0},
        {QUANTISED("\"quant_method\":\"modelopt\",\"quant_algo\":\"FP8\",\"ignore\":[\"lm_head\"],\"producer\":{\"name\":\"modelopt\"},\"kv_cache_scheme\":{\"num_bits\":8},"
                   "\"config_groups\":{\"group_0\":{\"targets\":[\"Linear\"],\"input_activations\":{\"num_bits\":8},\"weights\":{\"dynamic\":false,\"num_bits\":8,\"type\":\"float\"}}}"), "modelopt", SCALE_TENSOR, 0, 0},
        {QUANTISED("\"quant_method\":\"modelopt\",\"quant_algo\":\"FP8\",\"kv_cache_quant_algo\":\"FP8\",\"exclude_modules\":[\"lm_head\"]"), "modelopt", SCALE_TENSOR, 0, 0},
    };
    struct model_config *plain = read_changed(tiny, "{}");
    char hash[65], plain_hash[65];
    model_config_hash(plain, plain_hash);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct model_config *c = read_changed(tiny, cases[i].changes);
        const struct quantization *q = &c->quantization;
        cr_expect(q->scales == cases[i].scales && q->block_rows == cases[i].rows && q->block_cols == cases[i].cols, "%s", cases[i].changes);
        cr_expect(cases[i].method ? q->method && !strcmp(q->method, cases[i].method) : !q->method, "%s", cases[i].changes);
        model_config_hash(c, hash);
        cr_expect_str_eq(hash, plain_hash, "the model is the same, however its weights are stored");
        json_t *written = model_config_to_json(c, "bfloat16");
        cr_expect_null(json_object_get(written, "quantization_config"), "what is written is not quantised");
        json_decref(written);
        model_config_free(c);
    }
    model_config_free(plain);
}

Test(model_config, quantisation_that_is_refused_by_name)
{
    static const struct { const char *changes, *part; } cases[] = {
        {"{\"quantization_config\":3}", "\"quantization_config\" is 3"}, {QUANTISED("\"bits\":4"), "\"quantization_config.quant_method\" is missing"},
        {QUANTISED("\"quant_method\":\"awq\",\"bits\":4"), "\"quantization_config.quant_method\" is \"awq\"; fp8, compressed-tensors, fbgemm_fp8 and modelopt"},
        {QUANTISED("\"quant_method\":\"bitsandbytes\",\"load_in_8bit\":true"), "is \"bitsandbytes\""}, {QUANTISED("\"quant_method\":\"mxfp4\""), "is \"mxfp4\""},
        {QUANTISED("\"quant_method\":\"fp8\",\"fmt\":\"e5m2\""), "\"quantization_config.fmt\" is \"e5m2\"; weights are read from e4m3"},
        {QUANTISED("\"quant_method\":\"fp8\",\"expert_dtype\":\"fp4\""), "expert_dtype"}, {QUANTISED("\"quant_method\":\"fp8\",\"scale_fmt\":\"e5m3\""), "scale_fmt"},
        {QUANTISED("\"quant_method\":\"fp8\",\"weight_block_size\":[128]"), "\"quantization_config.weight_block_size\" is [128]"},
        {QUANTISED("\"quant_method\":\"fp8\",\"weight_block_size\":[128,0]"), "[128,0]"}, {QUANTISED("\"quant_method\":\"fp8\",\"weight_block_size\":[128.5,128]"), "[128.5,128]"},
        {QUANTISED("\"quant_method\":\"fp8\",\"weight_block_size\":128"), "is 128"}, {QUANTISED("\"quant_method\":\"fp8\",\"weight_block_size\":[-1,1048577]"), "[-1,1048577]"},
        {QUANTISED(DEEPSEEK ",\"rotation\":\"hadamard\""), "\"quantization_config.rotation\" is \"hadamard\"; this program does not know it"},
        {QUANTISED("\"quant_method\":\"compressed-tensors\",\"format\":\"float-quantized\""), "\"quantization_config.config_groups\" is missing"},
        {QUANTISED("\"quant_method\":\"compressed-tensors\"," GROUP(E4M3_WEIGHTS "\"strategy\":\"channel\"")), "\"quantization_config.format\" is missing"},
        {COMPRESSED("int-quantized", E4M3_WEIGHTS "\"strategy\":\"channel\""), "\"quantization_config.format\" is \"int-quantized\""},
        {COMPRESSED("pack-quantized", "\"num_bits\":4,\"type\":\"int\""), "pack-quantized"}, {COMPRESSED("mixed-precision", E4M3_WEIGHTS "\"strategy\":\"channel\""), "mixed-precision"},
        {COMPRESSED("float-quantized", "\"num_bits\":4,\"type\":\"float\",\"strategy\":\"channel\""), "\"quantization_config.config_groups.group_0.weights.num_bits\" is 4"},
        {COMPRESSED("float-quantized", "\"num_bits\":8,\"type\":\"int\",\"strategy\":\"channel\""), "weights.type\" is \"int\""},
        {COMPRESSED("float-quantized", "\"num_bits\":8,\"strategy\":\"channel\""), "weights.type\" is missing"},
        {COMPRESSED("float-quantized", "\"num_bits\":8,\"type\":\"float\",\"strategy\":\"channel\",\"symmetric\":false"), "weights.symmetric\" is false; zero points"},
        {COMPRESSED("float-quantized", "\"num_bits\":8,\"type\":\"float\",\"strategy\":\"channel\",\"dynamic\":true"), "weights.dynamic\" is true"},
        {COMPRESSED("float-quantized", E4M3_WEIGHTS "\"strategy\":\"group\""), "weights.strategy\" is \"group\""}, {COMPRESSED("float-quantized", "\"num_bits\":8,\"type\":\"float\",\"group_size\":128,\"strategy\":\"channel\""), "weights.group_size\" is 128"},
        {COMPRESSED("float-quantized", E4M3_WEIGHTS "\"strategy\":\"block\""), "weights.block_structure\" is missing"}, {COMPRESSED("float-quantized", E4M3_WEIGHTS "\"strategy\":\"block\",\"block_structure\":\"128x128\""), "\"128x128\""},
        {QUANTISED("\"quant_method\":\"compressed-tensors\",\"format\":\"float-quantized\",\"config_groups\":{\"FP8\":[\"Linear\"]}"), "\"quantization_config.config_groups.FP8\" is [\"Linear\"]"},
        {QUANTISED("\"quant_method\":\"compressed-tensors\",\"format\":\"float-quantized\",\"config_groups\":{\"g\":{\"weights\":null}}"), "\"quantization_config.config_groups.g.weights\" is missing"},
        {QUANTISED("\"quant_method\":\"compressed-tensors\",\"format\":\"float-quantized\",\"config_groups\":{\"a\":{\"weights\":{\"num_bits\":8,\"type\":\"float\",\"strategy\":\"channel\"}},"
                   "\"b\":{\"weights\":{\"num_bits\":8,\"type\":\"float\",\"strategy\":\"tensor\"}}}"), "in different ways"},
        {QUANTISED("\"quant_method\":\"compressed-tensors\",\"format\":\"float-quantized\",\"sparsity_config\":{\"format\":\"sparse-24-bitmask\"}," GROUP(E4M3_WEIGHTS "\"strategy\":\"channel\"")), "sparsity_config"},
        {QUANTISED("\"quant_method\":\"compressed-tensors\",\"format\":\"float-quantized\",\"transform_config\":{\"config_groups\":{\"u\":{}}}," GROUP(E4M3_WEIGHTS "\"strategy\":\"channel\"")), "transform_config"},
        {QUANTISED("\"quant_method\":\"modelopt\",\"quant_algo\":\"NVFP4\""), "\"quantization_config.quant_algo\" is \"NVFP4\"; FP8 is known"}, {QUANTISED("\"quant_method\":\"modelopt\""), "quant_algo\" is missing"},
        {QUANTISED("\"quant_method\":\"modelopt\",\"quant_algo\":\"FP8\"," GROUP("\"num_bits\":4,\"type\":\"float\"")), "num_bits\" is 4"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) expect_refusal(tiny, cases[i].changes, cases[i].part);
}

Test(model_config, files)
{
    char dir[200], path[300];
    struct model_config *c = NULL;
    const char *base = getenv("TMPDIR");
    snprintf(dir, sizeof dir, "%s/config-XXXXXX", base && strlen(base) < 150 ? base : "/tmp");
    cr_assert(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/config.json", dir);
    cr_expect_eq(model_config_read(&c, dir), ERR_IO);
    cr_assert_eq(file_replace(path, qwen3_8b, strlen(qwen3_8b)), OK);
    cr_assert_eq(model_config_read(&c, dir), OK, "%s", fail_message());
    model_config_free(c);
    cr_assert_eq(model_config_read(&c, path), OK, "%s", fail_message());
    model_config_free(c);
    static const char *const broken[] = {"", "{", "[1]", "null", "{\"vocab_size\":1e999999}", "{\"a\":\"\\ud800\"}", "\xef\xbb\xbf{}", "\xff\xfe{\0}\0", "{\"a\":1,\"a\":2}"};
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
        cr_assert_eq(file_replace(path, broken[i], strlen(broken[i])), OK);
        cr_expect_eq(model_config_read(&c, dir), ERR_INPUT, "%s", broken[i]);
        cr_expect(strstr(fail_message(), path));
    }
    char *deep = malloc(200001);   /* nesting is bounded */
    memset(deep, '[', 200000);
    deep[200000] = 0;
    cr_assert_eq(file_replace(path, deep, 200000), OK);
    cr_expect_eq(model_config_read(&c, dir), ERR_INPUT);
    char *large = malloc(6 << 20);
    memset(large, ' ', 6 << 20);
    cr_assert_eq(file_replace(path, large, 6 << 20), OK);
    cr_expect_eq(model_config_read(&c, dir), ERR_INPUT);
    free(deep);
    free(large);
    dir_remove_tree(dir);
}

/* ---- writing ---- */

Test(model_config, writes_both_spellings)
{
    struct model_config *c = read_config(llama31_8b), *again;
    json_t *json = model_config_to_json(c, "float32");
    const json_t *old = json_object_get(json, "rope_scaling"), *now = json_object_get(json, "rope_parameters");
    cr_expect_str_eq(json_string_value(json_object_get(json, "torch_dtype")), "float32");
    cr_expect_str_eq(json_string_value(json_object_get(json, "dtype")), "float32");
    cr_expect_eq(json_number_value(json_object_get(json, "rope_theta")), 500000);
    cr_expect_null(json_object_get(old, "rope_theta"));
    cr_expect_eq(json_number_value(json_object_get(now, "rope_theta")), 500000);
    cr_expect_str_eq(json_string_value(json_object_get(old, "rope_type")), "llama3");
    cr_expect_str_eq(json_string_value(json_object_get(now, "rope_type")), "llama3");
    cr_expect_eq(json_array_size(json_object_get(json, "eos_token_id")), 3);
    cr_expect_eq(json_real_value(json_object_get(json, "rms_norm_eps")), 1e-5);
    cr_assert_eq(model_config_from_json(&again, json, "again"), OK, "%s", fail_message());
    model_config_free(again);
    json_decref(json);
    cr_expect_str_eq(json_string_value(json_object_get(c->json, "torch_dtype")), "bfloat16");   /* the original is left alone */
    model_config_free(c);

    c = read_config(llama2_7b);   /* theta was implied there and is written out */
    json = model_config_to_json(c, "float16");
    cr_expect_eq(json_number_value(json_object_get(json, "rope_theta")), 10000);
    cr_expect(json_is_null(json_object_get(json, "rope_scaling")));
    cr_expect_null(json_object_get(json, "_name_or_path"));
    cr_expect_null(json_object_get(json, "head_dim"));
    json_decref(json);
    model_config_free(c);
}

Test(model_config, writes_a_smaller_model)
{
    /* a student made of some of its teacher's layers */
    struct model_config *c = read_changed(tiny, "{\"architectures\":[\"Qwen2ForCausalLM\"],\"num_key_value_heads\":2,\"use_sliding_window\":true,\"sliding_window\":8,\"max_window_layers\":1,"
                                          "\"layer_types\":[\"full_attention\",\"sliding_attention\",\"full_attention\"],\"eos_token_id\":[7]}"), *again;
    c->n_layers = 2;
    c->vocab_size = 90;
    c->hidden_size = 48;
    c->tie_embeddings = true;
    c->rope.type = ROPE_YARN;
    c->rope.factor = 4;
    c->rope.beta_fast = 32;
    c->rope.beta_slow = 1;
    c->rope.attention_factor = 0.9;
    c->rope.truncate = false;
    c->rope.original_max_position = 128;
    json_t *json = model_config_to_json(c, "bfloat16");
    cr_expect_eq(json_array_size(json_object_get(json, "layer_types")), 2);
    cr_expect_eq(json_integer_value(json_object_get(json, "max_window_layers")), 1);
    cr_expect_eq(json_integer_value(json_object_get(json, "head_dim")), 16);
    cr_expect_eq(json_integer_value(json_object_get(json, "eos_token_id")), 7);
    cr_assert_eq(model_config_from_json(&again, json, "again"), OK, "%s", fail_message());
    char hex[65], hex_again[65];
    model_config_hash(c, hex);
    model_config_hash(again, hex_again);
    cr_expect_str_eq(hex, hex_again);
    cr_expect(again->n_layers == 2 && again->head_dim == 16 && again->tie_embeddings && again->layer_slides[1] && !again->layer_slides[0]);
    cr_expect(again->rope.attention_factor == 0.9 && !again->rope.truncate && again->rope.original_max_position == 128);
    model_config_free(again);
    json_decref(json);
    model_config_free(c);
}

/* ---- rotary frequencies ---- */

static const struct rope_golden { const char *keys; int head_dim, max_position; double attention_factor; int n; struct { int i; double w; } at[8]; } rope_golden[] = {
    /* from here: scripts/make_rope_golden.py, transformers 5.23.0 */
    {"{\"rope_theta\":10000.0,\"rope_scaling\":null}", 128, 4096, 1,
     8, {{0, 1}, {9, 0.273841977}, {18, 0.0749894157}, {27, 0.0205352511}, {36, 0.00562341325}, {45, 0.00153992651}, {54, 0.000421696488}, {63, 0.000115478193}}},
    {"{\"rope_parameters\":{\"rope_theta\":1000000,\"rope_type\":\"default\"}}", 64, 32768, 1,
     8, {{0, 1}, {4, 0.177827939}, {9, 0.0205352511}, {13, 0.00365174143}, {18, 0.000421696488}, {22, 7.49894243e-05}, {27, 8.65964375e-06}, {31, 1.53992653e-06}}},
    {"{\"rope_theta\":11158839.92}", 80, 4096, 1,
     8, {{0, 1}, {6, 0.0876712352}, {11, 0.0115320021}, {17, 0.00101102481}, {22, 0.000132987072}, {28, 1.16591464e-05}, {33, 1.53360793e-06}, {39, 1.34453245e-07}}},
    {"{\"rope_theta\":10000,\"rope_scaling\":{\"type\":\"linear\",\"factor\":2.5}}", 96, 4096, 1,
     8, {{0, 0.400000006}, {7, 0.104406282}, {13, 0.0330161676}, {20, 0.00861774012}, {27, 0.00224936521}, {34, 0.000587119837}, {40, 0.000185663579}, {47, 4.8461101e-05}}},
    {"{\"rope_theta\":500000.0,\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8.0,\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,\"original_max_position_embeddings\":8192}}", 128, 131072, 1,
     8, {{0, 1}, {9, 0.157972813}, {18, 0.0249554086}, {27, 0.00394227589}, {36, 7.78465546e-05}, {45, 1.22976389e-05}, {54, 1.94269251e-06}, {63, 3.06892588e-07}}},
    {"{\"rope_theta\":500000.0,\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":32.0,\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,\"original_max_position_embeddings\":8192}}", 64, 131072, 1,
     8, {{0, 1}, {4, 0.193922758}, {9, 0.0249554086}, {13, 0.00483942125}, {18, 1.94616387e-05}, {22, 3.77405445e-06}, {27, 4.85673127e-07}, {31, 9.41830649e-08}}},
    {"{\"rope_parameters\":{\"rope_type\":\"llama3\",\"factor\":8.0,\"low_freq_factor\":0.5,\"high_freq_factor\":4.0,\"original_max_position_embeddings\":64,\"rope_theta\":10000.0}}", 16, 512, 1,
     8, {{0, 1}, {1, 0.254647911}, {2, 0.0254647918}, {3, 0.00395284733}, {4, 0.00124999997}, {5, 0.000395284733}, {6, 0.000125000006}, {7, 3.95284733e-05}}},
    {"{\"rope_parameters\":{\"rope_type\":\"llama3\",\"rope_theta\":1000000.0,\"factor\":2,\"low_freq_factor\":1,\"high_freq_factor\":3}}", 32, 2048, 1,
     8, {{0, 1}, {2, 0.177827939}, {4, 0.0316227786}, {6, 0.00398270879}, {9, 0.000210848244}, {11, 3.74947122e-05}, {13, 6.66760707e-06}, {15, 1.18568687e-06}}},
    {"{\"rope_theta\":1000000.0,\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4.0,\"original_max_position_embeddings\":32768}}", 128, 32768, 1.1386294361119891,
     8, {{0, 1}, {9, 0.143301263}, {18, 0.0205352511}, {27, 0.00242342241}, {36, 0.000179841154}, {45, 1.51074091e-05}, {54, 2.16491094e-06}, {63, 3.10234441e-07}}},
    {"{\"rope_theta\":1000000.0,\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4.0,\"original_max_position_embeddings\":32768}}", 128, 131072, 1.1386294361119891,
     8, {{0, 1}, {9, 0.143301263}, {18, 0.0205352511}, {27, 0.00242342241}, {36, 0.000179841154}, {45, 1.51074091e-05}, {54, 2.16491094e-06}, {63, 3.10234441e-07}}},
    {"{\"rope_theta\":10000.0,\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4.0}}", 128, 4096, 1.1386294361119891,
     8, {{0, 1}, {9, 0.273841977}, {18, 0.0749894157}, {27, 0.0163887106}, {36, 0.00302799162}, {45, 0.0004294026}, {54, 0.000105424122}, {63, 2.88695483e-05}}},
    {"{\"rope_theta\":10000.0,\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":40,\"original_max_position_embeddings\":4096,\"mscale\":0.707,\"mscale_all_dim\":1.0}}", 64, 163840, 0.92104235531633993,
     8, {{0, 1}, {4, 0.316227764}, {9, 0.0749894157}, {13, 0.0183781441}, {18, 0.00224936521}, {22, 0.00017782794}, {27, 1.05424124e-05}, {31, 3.33380353e-06}}},
    {"{\"rope_theta\":10000.0,\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4.0,\"original_max_position_embeddings\":4096,\"mscale\":0.707}}", 64, 16384, 1.1386294361119891,
     8, {{0, 1}, {4, 0.316227764}, {9, 0.0749894157}, {13, 0.0196094345}, {18, 0.00302799162}, {22, 0.000547162897}, {27, 0.000105424122}, {31, 3.33380376e-05}}},
    {"{\"rope_theta\":10000.0,\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4.0,\"original_max_position_embeddings\":4096,\"attention_factor\":0.75,\"mscale\":2.0,\"mscale_all_dim\":1.0}}", 64, 16384, 0.75,
     8, {{0, 1}, {4, 0.316227764}, {9, 0.0749894157}, {13, 0.0196094345}, {18, 0.00302799162}, {22, 0.000547162897}, {27, 0.000105424122}, {31, 3.33380376e-05}}},
    {"{\"rope_theta\":150000.0,\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":32.0,\"original_max_position_embeddings\":4096,\"truncate\":false}}", 64, 131072, 1.3465735902799727,
     8, {{0, 1}, {4, 0.225418001}, {9, 0.0317056961}, {13, 0.00386035908}, {18, 3.83088118e-05}, {22, 8.63549576e-06}, {27, 1.34129095e-06}, {31, 3.0235114e-07}}},
    {"{\"rope_theta\":10000.0,\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4.0,\"original_max_position_embeddings\":2048,\"beta_fast\":16,\"beta_slow\":2.0}}", 112, 8192, 1.1386294361119891,
     8, {{0, 1}, {8, 0.268269569}, {16, 0.0719685555}, {24, 0.0126237925}, {31, 0.00152635085}, {39, 0.000409473345}, {47, 0.00010984925}, {55, 2.94692127e-05}}},
    {"{\"rope_theta\":10000.0,\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4.0,\"original_max_position_embeddings\":2048,\"beta_fast\":null,\"beta_slow\":0}}", 16, 8192, 1.1386294361119891,
     8, {{0, 1}, {1, 0.316227764}, {2, 0.100000001}, {3, 0.025693506}, {4, 0.00624999963}, {5, 0.00138349656}, {6, 0.000250000012}, {7, 7.90569466e-05}}},
    {"{\"rope_theta\":10000.0,\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":null,\"original_max_position_embeddings\":2048}}", 128, 16384, 1.2079441541679836,
     8, {{0, 1}, {9, 0.273841977}, {18, 0.0697401538}, {27, 0.0126291802}, {36, 0.00168702402}, {45, 0.000192490814}, {54, 5.2712061e-05}, {63, 1.44347741e-05}}},
    {"{\"rope_theta\":10000.0,\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":1.0,\"original_max_position_embeddings\":2048}}", 32, 2048, 1,
     8, {{0, 1}, {2, 0.316227764}, {4, 0.100000001}, {6, 0.0316227786}, {9, 0.00562341325}, {11, 0.00177827943}, {13, 0.000562341302}, {15, 0.00017782794}}},
    {"{\"rope_parameters\":{\"rope_type\":\"yarn\",\"factor\":4.0,\"rope_theta\":10000.0,\"original_max_position_embeddings\":8}}", 8, 32, 1.1386294361119891,
     4, {{0, 1}, {1, 0.0250000004}, {2, 0.00249999994}, {3, 0.000250000012}}},
    {"{\"rope_theta\":10000.0,\"original_max_position_embeddings\":2048,\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":8}}", 128, 16384, 1.2079441541679836,
     8, {{0, 1}, {9, 0.273841977}, {18, 0.0697401538}, {27, 0.0126291802}, {36, 0.00168702402}, {45, 0.000192490814}, {54, 5.2712061e-05}, {63, 1.44347741e-05}}},
    /* to here: scripts/make_rope_golden.py */
};

Test(model_config, rope_frequencies)
{
    for (size_t g = 0; g < sizeof rope_golden / sizeof *rope_golden; g++) {
        const struct rope_golden *want = &rope_golden[g];
        char base[600];
        double w[128], factor;
        snprintf(base, sizeof base, "{\"model_type\":\"llama\",\"vocab_size\":9,\"hidden_size\":%d,\"intermediate_size\":8,\"num_hidden_layers\":1,\"num_attention_heads\":2,"
                 "\"max_position_embeddings\":%d}", 2 * want->head_dim, want->max_position);
        struct model_config *c = read_changed(base, want->keys), *again;
        rope_inverse_frequencies(c, w, &factor);
        cr_expect_float_eq(factor, want->attention_factor, 1e-15 * factor, "%s", want->keys);
        /* 4e-7: the float32 pow of the reference is off by a unit in places, which interpolation can triple */
        for (int k = 0; k < want->n; k++) cr_expect_float_eq(w[want->at[k].i], want->at[k].w, 4e-7 * want->at[k].w, "%s: [%d] is %.9g, not %.9g", want->keys, want->at[k].i, w[want->at[k].i], want->at[k].w);
        /* and so does what we write */
        json_t *json = model_config_to_json(c, "float32");
        double w_again[128], factor_again;
        cr_assert_eq(model_config_from_json(&again, json, "again"), OK, "%s", fail_message());
        rope_inverse_frequencies(again, w_again, &factor_again);
        cr_expect(factor == factor_again && !memcmp(w, w_again, (size_t)want->head_dim / 2 * sizeof *w), "%s", want->keys);
        json_decref(json);
        model_config_free(again);
        model_config_free(c);
    }
}

Test(model_config, golden_models)
{
    static const char *const dirs[] = {"qwen2_tiny/student", "qwen2_tiny/teacher", "llama3_tiny/student", "llama3_tiny/teacher"};
    for (int i = 0; i < 4; i++) {
        char path[600];
        struct model_config *c;
        snprintf(path, sizeof path, "%s/../shared/golden/%s", SOURCE_ROOT, dirs[i]);
        if (!path_is_dir(path)) cr_skip_test("SKIPPED: ../shared/golden is not here");
        cr_assert_eq(model_config_read(&c, path), OK, "%s", fail_message());
        cr_expect_eq(c->vocab_size, 512);
        model_config_free(c);
    }
}
