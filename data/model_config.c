/* config.json to struct model_config and back, and what follows from it: parameters, FLOPs, identity. Rope: rope_config.c. Quantised weights: quantization.c.
 *
 * Whitelist: `rules` lists every key that is read, is known to be harmless, or has one value that leaves the model alone. Any
 * other key must be null, false or empty, else the file is refused by that key's name: a model that would be computed wrongly
 * must not load. Defaults of absent keys are those of the family's class in transformers; keys that fix a shape, and
 * rope_theta, have none.
 */
#include "data/model_config.h"

#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/json.h"

enum { QWEN2 = 1 << ARCH_QWEN2, LLAMA = 1 << ARCH_LLAMA, MISTRAL = 1 << ARCH_MISTRAL, QWEN3 = 1 << ARCH_QWEN3,
    ALL = QWEN2 | LLAMA | MISTRAL | QWEN3 };

static const struct { const char *name, *type; } architectures[ARCH_COUNT] = {
    [ARCH_QWEN2] = {"Qwen2ForCausalLM", "qwen2"}, [ARCH_LLAMA] = {"LlamaForCausalLM", "llama"},
    [ARCH_MISTRAL] = {"MistralForCausalLM", "mistral"}, [ARCH_QWEN3] = {"Qwen3ForCausalLM", "qwen3"},
};
const char *architecture_name(enum architecture a) { return architectures[a].name; }

enum rule_kind { HARMLESS, READ, EQUALS, REFUSED };
static const struct rule { const char *key; enum rule_kind kind; unsigned families; double value; const char *why; } rules[] = {
    {"architectures", READ, ALL, 0, NULL}, {"model_type", READ, ALL, 0, NULL}, {"vocab_size", READ, ALL, 0, NULL},
    {"hidden_size", READ, ALL, 0, NULL}, {"intermediate_size", READ, ALL, 0, NULL}, {"num_hidden_layers", READ, ALL, 0, NULL},
    {"num_attention_heads", READ, ALL, 0, NULL}, {"num_key_value_heads", READ, ALL, 0, NULL}, {"head_dim", READ, ALL, 0, NULL},
    {"hidden_act", READ, ALL, 0, NULL}, {"rms_norm_eps", READ, ALL, 0, NULL}, {"max_position_embeddings", READ, ALL, 0, NULL},
    {"original_max_position_embeddings", READ, ALL, 0, NULL}, {"rope_theta", READ, ALL, 0, NULL}, {"rope_scaling", READ, ALL, 0, NULL},
    {"rope_parameters", READ, ALL, 0, NULL}, {"partial_rotary_factor", READ, ALL, 0, NULL}, {"tie_word_embeddings", READ, ALL, 0, NULL},
    {"initializer_range", READ, ALL, 0, NULL}, {"bos_token_id", READ, ALL, 0, NULL}, {"eos_token_id", READ, ALL, 0, NULL},
    {"pad_token_id", READ, ALL, 0, NULL}, {"layer_types", READ, ALL, 0, NULL}, {"attention_bias", READ, LLAMA | QWEN3, 0, NULL},
    {"mlp_bias", READ, LLAMA, 0, NULL}, {"sliding_window", READ, QWEN2 | QWEN3 | MISTRAL, 0, NULL},
    {"use_sliding_window", READ, QWEN2 | QWEN3 | MISTRAL, 0, NULL}, {"max_window_layers", READ, QWEN2 | QWEN3, 0, NULL},
    {"quantization_config", READ, ALL, 0, NULL},

    {"pretraining_tp", EQUALS, ALL, 1, "sums over slices of a layer are not implemented"},
    {"attention_dropout", EQUALS, ALL, 0, "dropout is not implemented"}, {"hidden_dropout", EQUALS, ALL, 0, "dropout is not implemented"},
    {"resid_pdrop", EQUALS, ALL, 0, "dropout is not implemented"}, {"embd_pdrop", EQUALS, ALL, 0, "dropout is not implemented"},
    {"residual_dropout", EQUALS, ALL, 0, "dropout is not implemented"}, {"embedding_multiplier", EQUALS, ALL, 1, "multipliers are not implemented"},
    {"residual_multiplier", EQUALS, ALL, 1, "multipliers are not implemented"}, {"logits_scaling", EQUALS, ALL, 1, "multipliers are not implemented"},
    {"logit_scale", EQUALS, ALL, 1, "multipliers are not implemented"}, {"chunk_size_feed_forward", EQUALS, ALL, 0,
        "chunked layers are not implemented"},

    {"compression_config", REFUSED, ALL, 0, "the weights are compressed; use the checkpoint in bf16, f16 or f32"},
    {"auto_map", REFUSED, ALL, 0, "it names code that replaces the model; remove it if the architecture is the plain one"},
    {"attn_logit_softcapping", REFUSED, ALL, 0, "soft-capping is not implemented"},
    {"final_logit_softcapping", REFUSED, ALL, 0, "soft-capping is not implemented"},

    {"transformers_version", HARMLESS, ALL, 0, NULL}, {"torch_dtype", HARMLESS, ALL, 0, NULL}, {"dtype", HARMLESS, ALL, 0, NULL},
    {"use_cache", HARMLESS, ALL, 0, NULL}, {"_name_or_path", HARMLESS, ALL, 0, NULL}, {"name_or_path", HARMLESS, ALL, 0, NULL},
    {"_commit_hash", HARMLESS, ALL, 0, NULL}, {"_attn_implementation", HARMLESS, ALL, 0, NULL}, {"_attn_implementation_autoset", HARMLESS, ALL, 0,
        NULL},
    {"attn_implementation", HARMLESS, ALL, 0, NULL}, {"_flash_attn_2_enabled", HARMLESS, ALL, 0, NULL}, {"gradient_checkpointing", HARMLESS, ALL, 0,
        NULL},
    {"tokenizer_class", HARMLESS, ALL, 0, NULL}, {"unsloth_version", HARMLESS, ALL, 0, NULL}, {"unsloth_fixed", HARMLESS, ALL, 0, NULL},
    {"transformers.js_config", HARMLESS, ALL, 0, NULL}, {"max_sequence_length", HARMLESS, ALL, 0, NULL}, {"model_max_length", HARMLESS, ALL, 0, NULL},
    {"is_llama_config", HARMLESS, LLAMA, 0, NULL},   /* SmolLM */
    {"return_dict", HARMLESS, ALL, 0, NULL}, {"output_attentions", HARMLESS, ALL, 0, NULL}, {"output_hidden_states", HARMLESS, ALL, 0, NULL},
    {"torchscript", HARMLESS, ALL, 0, NULL}, {"use_bfloat16", HARMLESS, ALL, 0, NULL}, {"is_decoder", HARMLESS, ALL, 0, NULL},
    {"tie_encoder_decoder", HARMLESS, ALL, 0, NULL}, {"task_specific_params", HARMLESS, ALL, 0, NULL}, {"problem_type", HARMLESS, ALL, 0, NULL},
    {"finetuning_task", HARMLESS, ALL, 0, NULL}, {"id2label", HARMLESS, ALL, 0, NULL}, {"label2id", HARMLESS, ALL, 0, NULL},
    {"prefix", HARMLESS, ALL, 0, NULL}, {"sep_token_id", HARMLESS, ALL, 0, NULL}, {"decoder_start_token_id", HARMLESS, ALL, 0, NULL},
    /* how to sample: transformers 4 wrote these into config.json */
    {"max_length", HARMLESS, ALL, 0, NULL}, {"min_length", HARMLESS, ALL, 0, NULL}, {"max_new_tokens", HARMLESS, ALL, 0, NULL},
    {"do_sample", HARMLESS, ALL, 0, NULL}, {"early_stopping", HARMLESS, ALL, 0, NULL}, {"num_beams", HARMLESS, ALL, 0, NULL},
    {"num_beam_groups", HARMLESS, ALL, 0, NULL}, {"diversity_penalty", HARMLESS, ALL, 0, NULL}, {"temperature", HARMLESS, ALL, 0, NULL},
    {"top_k", HARMLESS, ALL, 0, NULL}, {"top_p", HARMLESS, ALL, 0, NULL}, {"typical_p", HARMLESS, ALL, 0, NULL},
    {"repetition_penalty", HARMLESS, ALL, 0, NULL}, {"length_penalty", HARMLESS, ALL, 0, NULL}, {"no_repeat_ngram_size", HARMLESS, ALL, 0, NULL},
    {"encoder_no_repeat_ngram_size", HARMLESS, ALL, 0, NULL}, {"bad_words_ids", HARMLESS, ALL, 0, NULL}, {"num_return_sequences", HARMLESS, ALL, 0,
        NULL},
    {"output_scores", HARMLESS, ALL, 0, NULL}, {"return_dict_in_generate", HARMLESS, ALL, 0, NULL}, {"forced_bos_token_id", HARMLESS, ALL, 0, NULL},
    {"forced_eos_token_id", HARMLESS, ALL, 0, NULL}, {"remove_invalid_values", HARMLESS, ALL, 0, NULL},
    {"exponential_decay_length_penalty", HARMLESS, ALL, 0, NULL}, {"suppress_tokens", HARMLESS, ALL, 0, NULL}, {"begin_suppress_tokens", HARMLESS,
        ALL, 0, NULL},
};

static bool is_given(const json_t *v) { return v && !json_is_null(v); }

/* ---- reading ---- */

static int check_keys(const json_t *o, enum architecture arch, const char *name)
{
    const char *key;
    json_t *v;
    char text[80];
    json_object_foreach((json_t *)o, key, v) {
        const struct rule *r = NULL;
        for (size_t i = 0; i < sizeof rules / sizeof *rules && !r; i++)
            if (!strcmp(rules[i].key, key) && rules[i].families >> arch & 1) r = &rules[i];
        if ((r && (r->kind == HARMLESS || r->kind == READ)) || json_says_nothing(v)) continue;
        if (!r)
            return fail(ERR_INPUT, "%s: key \"%.100s\" is %s: %s does not have it; remove it if it does not change the model", name, key,
                        json_shown(v, text), architectures[arch].name);
        if (r->kind == EQUALS && json_is_number(v) && json_number_value(v) == r->value) continue;
        return fail(ERR_INPUT, "%s: key \"%s\" is %s: %s", name, key, json_shown(v, text), r->why);
    }
    return OK;
}

/* An integer within [low, high]; absent or null gives `fallback`, and -1 there means that it is required. */
static int get_int(const json_t *o, const char *key, const char *name, int64_t fallback, int64_t low, int64_t high, int64_t *value)
{
    const json_t *v = json_object_get(o, key);
    char text[80];
    *value = fallback;
    if (!is_given(v)) return fallback == -1 ? fail(ERR_INPUT, "%s: key \"%s\" is missing", name, key) : OK;
    double real = json_number_value(v);
    if (json_is_integer(v)) *value = json_integer_value(v);
    else if (json_is_real(v) && fabs(real) < 0x1p53 && real == floor(real)) *value = (int64_t)real;
    else return fail(ERR_INPUT, "%s: key \"%s\" is %s, not an integer", name, key, json_shown(v, text));
    if (*value < low || *value > high)
        return fail(ERR_INPUT, "%s: key \"%s\" is %lld, it must be from %lld to %lld", name, key, (long long)*value, (long long)low, (long long)high);
    return OK;
}

static int get_double(const json_t *o, const char *key, const char *name, double fallback, double low, double high, double *value)
{
    const json_t *v = json_object_get(o, key);
    char text[80];
    *value = fallback;
    if (!is_given(v)) return OK;
    if (!json_is_number(v)) return fail(ERR_INPUT, "%s: key \"%s\" is %s, not a number", name, key, json_shown(v, text));
    *value = json_number_value(v);
    if (!(*value >= low && *value <= high)) return fail(ERR_INPUT, "%s: key \"%s\" is %g, it must be from %g to %g", name, key, *value, low, high);
    return OK;
}

static int get_architecture(const json_t *o, const char *name, enum architecture *arch)
{
    const json_t *list = json_object_get(o, "architectures"), *type = json_object_get(o, "model_type"), *v = json_array_get(list, 0);
    char text[80];
    int found = -1;
    if (is_given(list)) {
        for (int i = 0; i < ARCH_COUNT; i++)
            if (json_array_size(list) == 1 && json_is_string(v) && !strcmp(json_string_value(v), architectures[i].name)) found = i;
        if (found < 0)
            return fail(ERR_INPUT, "%s: architectures is %s; Qwen2ForCausalLM, LlamaForCausalLM, MistralForCausalLM and Qwen3ForCausalLM "
                        "are implemented", name, json_shown(list, text));
    }
    if (is_given(type)) {
        int by_type = -1;
        for (int i = 0; i < ARCH_COUNT; i++)
            if (json_is_string(type) && !strcmp(json_string_value(type), architectures[i].type)) by_type = i;
        if (by_type < 0) return fail(ERR_INPUT, "%s: model_type is %s; qwen2, llama, mistral and qwen3 are implemented", name, json_shown(type, text));
        if (found >= 0 && found != by_type)
            return fail(ERR_INPUT, "%s: model_type is \"%s\" but architectures is \"%s\"; keep the right one", name,
                        architectures[by_type].type, architectures[found].name);
        found = by_type;
    }
    if (found < 0) return fail(ERR_INPUT, "%s: has neither architectures nor model_type; it is not the config.json of a language model", name);
    *arch = (enum architecture)found;
    return OK;
}

static int get_shape(struct model_config *c, const json_t *o, const char *name)
{
    int rc = OK;
    int64_t layers, heads, kv_heads, head_dim;
    const json_t *stated_dim = json_object_get(o, "head_dim"), *stated_kv = json_object_get(o, "num_key_value_heads");
    TRY(get_int(o, "vocab_size", name, -1, 1, 1 << 18, &c->vocab_size));   /* ids of 18 bits in the logit shards */
    TRY(get_int(o, "hidden_size", name, -1, 1, 1 << 20, &c->hidden_size));
    TRY(get_int(o, "intermediate_size", name, -1, 1, 1 << 20, &c->intermediate_size));
    TRY(get_int(o, "num_hidden_layers", name, -1, 1, 1024, &layers));
    TRY(get_int(o, "num_attention_heads", name, -1, 1, 1 << 14, &heads));
    TRY(get_int(o, "max_position_embeddings", name, -1, 1, (int64_t)1 << 31, &c->max_position));
    /* null means one per query head; absent does so for Llama alone, where the class of the others has a number of its own */
    TRY(get_int(o, "num_key_value_heads", name, stated_kv || c->arch == ARCH_LLAMA ? heads : -1, 1, heads, &kv_heads));
    if (heads % kv_heads) {
        rc = fail(ERR_INPUT, "%s: num_attention_heads %lld is not a multiple of num_key_value_heads %lld", name, (long long)heads,
                  (long long)kv_heads);
        goto out;
    }
    if (c->arch == ARCH_QWEN3) {
        if (stated_dim && json_is_null(stated_dim)) {
            rc = fail(ERR_INPUT, "%s: key \"head_dim\" is null; write the number (Qwen3 models have 128)", name);
            goto out;
        }
        TRY(get_int(o, "head_dim", name, 128, 2, 4096, &head_dim));
    } else {
        if ((!is_given(stated_dim) || c->arch == ARCH_LLAMA) && c->hidden_size % heads) {
            rc = fail(ERR_INPUT, "%s: hidden_size %lld is not a multiple of num_attention_heads %lld", name, (long long)c->hidden_size,
                      (long long)heads);
            goto out;
        }
        TRY(get_int(o, "head_dim", name, c->hidden_size / heads, 2, 4096, &head_dim));
    }
    if (head_dim % 2 || head_dim < 2 || head_dim > 4096 || head_dim * heads > 1 << 20) {
        rc = fail(ERR_INPUT, "%s: head_dim %lld with %lld heads: it must be even, at most 4096, and at most 1048576 in all heads together", name,
                  (long long)head_dim, (long long)heads);
        goto out;
    }
    c->n_layers = (int)layers;
    c->n_heads = (int)heads;
    c->n_kv_heads = (int)kv_heads;
    c->head_dim = (int)head_dim;
out:
    return rc;
}

/* Which layers see a window only. Qwen: none unless use_sliding_window, then layer_types or else the layers from
 * max_window_layers on. Mistral: all, unless sliding_window is null; an absent key is 4096, as in its class. */
static int get_window(struct model_config *c, const json_t *o, const char *name)
{
    const json_t *types = json_object_get(o, "layer_types"), *stated = json_object_get(o, "sliding_window");
    const json_t *use_key = json_object_get(o, "use_sliding_window");
    bool qwen = c->arch == ARCH_QWEN2 || c->arch == ARCH_QWEN3, use, any = false;
    int64_t window = 0, from = 0;
    int rc = OK;
    TRY(json_get_bool(o, "use_sliding_window", name, false, &use));
    if (c->arch != ARCH_LLAMA) TRY(get_int(o, "sliding_window", name, stated ? 0 : 4096, qwen && !use ? 0 : 1, (int64_t)1 << 31, &window));
    if (c->arch == ARCH_MISTRAL && is_given(use_key) && use != (window > 0)) {
        rc = fail(ERR_INPUT,
                  "%s: use_sliding_window and sliding_window contradict each other; remove use_sliding_window, which Mistral does not have", name);
        goto out;
    }
    if (qwen) {
        TRY(get_int(o, "max_window_layers", name, 28, 0, INT32_MAX, &from));
        if (!use) window = 0;
    }
    if (is_given(types) && (!json_is_array(types) || json_array_size(types) != (size_t)c->n_layers)) {
        rc = fail(ERR_INPUT, "%s: layer_types is not a list of num_hidden_layers = %d names", name, c->n_layers);
        goto out;
    }
    c->layer_slides = xcalloc((size_t)c->n_layers, sizeof *c->layer_slides);
    for (int i = 0; i < c->n_layers; i++) {
        c->layer_slides[i] = window && (!qwen || i >= from);
        if (is_given(types)) {
            const json_t *t = json_array_get(types, (size_t)i);
            char text[80];
            bool slides = json_is_string(t) && !strcmp(json_string_value(t), "sliding_attention");
            if (!slides && !(json_is_string(t) && !strcmp(json_string_value(t), "full_attention"))) {
                rc = fail(ERR_INPUT, "%s: layer_types[%d] is %s; full_attention and sliding_attention are implemented", name, i, json_shown(t, text));
                goto out;
            }
            if ((slides && !window) || (!qwen && slides != c->layer_slides[i])) {
                rc = fail(ERR_INPUT, "%s: layer_types[%d] is \"%s\", which sliding_window%s contradicts; keep the right one", name, i,
                          json_string_value(t), qwen ? " or use_sliding_window" : "");
                goto out;
            }
            c->layer_slides[i] = slides;
        }
        any |= c->layer_slides[i];
    }
    c->sliding_window = any ? window : 0;
out:
    if (!any) {
        free(c->layer_slides);
        c->layer_slides = NULL;
    }
    return rc;
}

static int get_token_ids(struct model_config *c, const json_t *o, const char *name)
{
    int rc = OK;
    int64_t id, last = c->vocab_size - 1;
    const json_t *eos = json_object_get(o, "eos_token_id");
    TRY(get_int(o, "bos_token_id", name, -2, -1, last, &id));
    c->bos = id < 0 ? -1 : (int32_t)id;
    TRY(get_int(o, "pad_token_id", name, -2, -1, last, &id));
    c->pad = id < 0 ? -1 : (int32_t)id;
    for (int i = 0; i < 8; i++) c->eos[i] = -1;
    if (!json_is_array(eos)) {
        TRY(get_int(o, "eos_token_id", name, -2, -1, last, &id));
        c->eos[0] = id < 0 ? -1 : (int32_t)id;
        goto out;
    }
    if (json_array_size(eos) > 7) {
        rc = fail(ERR_INPUT, "%s: eos_token_id lists %zu ids, at most 7 are supported", name, json_array_size(eos));
        goto out;
    }
    for (size_t i = 0; i < json_array_size(eos); i++) {
        const json_t *v = json_array_get(eos, i);
        if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > last) {
            rc = fail(ERR_INPUT, "%s: eos_token_id[%zu] is not an id from 0 to %lld", name, i, (long long)last);
            goto out;
        }
        c->eos[i] = (int32_t)json_integer_value(v);
    }
out:
    return rc;
}

int model_config_from_json(struct model_config **out, json_t *json, const char *name)
{
    struct model_config *c = xcalloc(1, sizeof *c);
    const char *activation;
    bool attention_bias;
    double eps;
    int rc = OK;
    c->json = json_incref(json);
    if (!json_is_object(json)) { rc = fail(ERR_INPUT, "%s: is not a JSON object; it is not the config.json of a language model", name); goto out; }
    TRY(get_architecture(json, name, &c->arch));
    TRY(check_keys(json, c->arch, name));
    TRY(get_shape(c, json, name));
    TRY(json_get_string(json, "hidden_act", name, "silu", &activation));
    if (strcmp(activation, "silu")) { rc = fail(ERR_INPUT, "%s: key \"hidden_act\" is \"%.60s\"; silu is implemented", name, activation); goto out; }
    TRY(json_get_bool(json, "attention_bias", name, false, &attention_bias));
    c->qkv_bias = attention_bias || c->arch == ARCH_QWEN2;   /* hard-wired there, with no key that says so */
    c->o_bias = attention_bias;
    TRY(json_get_bool(json, "mlp_bias", name, false, &c->mlp_bias));
    c->qk_norm = c->arch == ARCH_QWEN3;
    TRY(json_get_bool(json, "tie_word_embeddings", name, false, &c->tie_embeddings));
    TRY(get_double(json, "rms_norm_eps", name, 1e-6, 1e-12, 0.1, &eps));
    c->rms_norm_eps = (float)eps;
    TRY(get_double(json, "initializer_range", name, 0.02, 0, 1, &c->initializer_range));
    TRY(rope_config_read(&c->rope, json, c->arch, c->max_position, name));
    TRY(get_window(c, json, name));
    TRY(get_token_ids(c, json, name));
    TRY(quantization_read(&c->quantization, json, name));
    *out = c;
    c = NULL;
out:
    model_config_free(c);
    return rc;
}

int model_config_read(struct model_config **out, const char *path)
{
    char *file = path_is_dir(path) ? path_join(path, "config.json") : xstrdup(path);
    json_t *json = NULL;
    int rc = OK;
    TRY(json_read_file(file, 4 << 20, &json));
    TRY(model_config_from_json(out, json, file));
out:
    json_decref(json);
    free(file);
    return rc;
}

void model_config_free(struct model_config *c)
{
    if (!c) return;
    json_decref(c->json);
    free(c->layer_slides);
    free(c);
}

/* ---- writing ---- */

/* The shortest decimal that reads back as this float: 1e-06 and not 9.99999997e-07 */
static double shortest(float f)
{
    char text[32];
    int digits = 1;
    do snprintf(text, sizeof text, "%.*g", digits, (double)f);
    while (strtof(text, NULL) != f && ++digits <= 9);
    return strtod(text, NULL);
}

static void set_int(json_t *o, const char *key, int64_t value) { json_object_set_new(o, key, json_integer(value)); }
static void set_bool(json_t *o, const char *key, bool value) { json_object_set_new(o, key, json_boolean(value)); }
static void set_id(json_t *o, const char *key, int32_t id) { json_object_set_new(o, key, id < 0 ? json_null() : json_integer(id)); }

static void set_window(const struct model_config *c, json_t *o)
{
    bool qwen = c->arch == ARCH_QWEN2 || c->arch == ARCH_QWEN3;
    if (qwen) set_bool(o, "use_sliding_window", c->layer_slides);
    else json_object_del(o, "use_sliding_window");
    if (c->layer_slides) set_int(o, "sliding_window", c->sliding_window);
    else if (c->arch == ARCH_MISTRAL) json_object_set_new(o, "sliding_window", json_null());
    if (qwen && c->layer_slides) {   /* readers older than layer_types know one boundary only */
        int from = c->n_layers;
        while (from > 0 && c->layer_slides[from - 1]) from--;
        set_int(o, "max_window_layers", from);
    }
    if (!is_given(json_object_get(o, "layer_types")) && !(qwen && c->layer_slides)) return;
    json_t *types = json_array();
    for (int i = 0; i < c->n_layers; i++) {
        bool slides = c->layer_slides && c->layer_slides[i];
        json_array_append_new(types, json_string(slides ? "sliding_attention" : "full_attention"));
    }
    json_object_set_new(o, "layer_types", types);
}

json_t *model_config_to_json(const struct model_config *c, const char *dtype)
{
    json_t *o = c->json ? json_deep_copy(c->json) : json_object();
    json_object_del(o, "_name_or_path");   /* the model this one was made from */
    json_object_del(o, "quantization_config");   /* what is written is written dequantised */
    json_object_set_new(o, "architectures", json_pack("[s]", architectures[c->arch].name));
    json_object_set_new(o, "model_type", json_string(architectures[c->arch].type));
    set_int(o, "vocab_size", c->vocab_size);
    set_int(o, "hidden_size", c->hidden_size);
    set_int(o, "intermediate_size", c->intermediate_size);
    set_int(o, "num_hidden_layers", c->n_layers);
    set_int(o, "num_attention_heads", c->n_heads);
    set_int(o, "num_key_value_heads", c->n_kv_heads);
    set_int(o, "max_position_embeddings", c->max_position);
    /* readers that do not know the key take hidden / heads; Qwen3's default is a number */
    if (c->arch == ARCH_QWEN3 || json_object_get(o, "head_dim") || (int64_t)c->head_dim * c->n_heads != c->hidden_size)
        set_int(o, "head_dim", c->head_dim);
    if (c->arch == ARCH_LLAMA || c->arch == ARCH_QWEN3) set_bool(o, "attention_bias", c->o_bias);
    if (c->arch == ARCH_LLAMA) set_bool(o, "mlp_bias", c->mlp_bias);
    json_object_set_new(o, "hidden_act", json_string("silu"));
    json_object_set_new(o, "rms_norm_eps", json_real(shortest(c->rms_norm_eps)));
    json_object_set_new(o, "initializer_range", json_real(c->initializer_range));
    set_bool(o, "tie_word_embeddings", c->tie_embeddings);
    rope_config_write(&c->rope, o);
    set_window(c, o);
    set_id(o, "bos_token_id", c->bos);
    set_id(o, "pad_token_id", c->pad);
    set_id(o, "eos_token_id", c->eos[0]);
    if (c->eos[0] >= 0 && c->eos[1] >= 0) {
        json_t *list = json_array();
        for (int i = 0; i < 8 && c->eos[i] >= 0; i++) json_array_append_new(list, json_integer(c->eos[i]));
        json_object_set_new(o, "eos_token_id", list);
    }
    json_object_set_new(o, "torch_dtype", json_string(dtype));   /* transformers 4 and 5 */
    json_object_set_new(o, "dtype", json_string(dtype));
    return o;
}

/* ---- what follows from the shape ---- */

/* Weights of one layer that take part in matrix products */
static int64_t layer_product_weights(const struct model_config *c)
{
    return c->hidden_size * c->head_dim * (2 * (int64_t)c->n_heads + 2 * (int64_t)c->n_kv_heads) + 3 * c->hidden_size * c->intermediate_size;
}

int64_t model_config_parameters(const struct model_config *c)
{
    int64_t C = c->hidden_size, F = c->intermediate_size, D = c->head_dim, layer = layer_product_weights(c) + 2 * C;
    if (c->qkv_bias) layer += D * (c->n_heads + 2 * (int64_t)c->n_kv_heads);
    if (c->o_bias) layer += C;
    if (c->mlp_bias) layer += 2 * F + C;
    if (c->qk_norm) layer += 2 * D;
    return c->vocab_size * C * (c->tie_embeddings ? 1 : 2) + c->n_layers * layer + C;
}

double model_config_forward_flops(const struct model_config *c, int64_t sequence)
{
    double S = (double)sequence, W = (double)c->sliding_window, keys = 0;   /* keys a query sees, summed over layers */
    for (int i = 0; i < c->n_layers; i++) keys += c->layer_slides && c->layer_slides[i] && W < S ? W - W * W / (2 * S) : S / 2;
    double weights = (double)c->n_layers * (double)layer_product_weights(c) + (double)c->vocab_size * (double)c->hidden_size;
    return 2 * weights + 4.0 * c->n_heads * c->head_dim * keys;
}

void model_config_hash(const struct model_config *c, char hex[65])
{
    const struct rope_config *r = &c->rope;
    json_t *slides = json_array();
    for (int i = 0; c->layer_slides && i < c->n_layers; i++) json_array_append_new(slides, json_boolean(c->layer_slides[i]));
    json_t *o = json_pack("{s:s, s:I, s:I, s:I, s:i, s:i, s:i, s:i, s:b, s:b, s:b, s:b, s:b, s:f, s:I, s:o}", "architecture",
                          architectures[c->arch].name,
                          "vocab_size", (json_int_t)c->vocab_size, "hidden_size", (json_int_t)c->hidden_size, "intermediate_size",
                              (json_int_t)c->intermediate_size,
                          "layers", c->n_layers, "heads", c->n_heads, "kv_heads", c->n_kv_heads, "head_dim", c->head_dim, "qkv_bias", c->qkv_bias,
                          "o_bias", c->o_bias, "mlp_bias", c->mlp_bias, "qk_norm", c->qk_norm, "tied", c->tie_embeddings, "rms_norm_eps",
                              (double)c->rms_norm_eps,
                          "sliding_window", (json_int_t)c->sliding_window, "layer_slides", slides);
    json_t *rope = json_pack("{s:i, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:b, s:I}", "type", (int)r->type, "theta", r->theta, "factor", r->factor,
                             "low_freq_factor", r->low_freq_factor, "high_freq_factor", r->high_freq_factor, "beta_fast", r->beta_fast, "beta_slow",
                                 r->beta_slow,
                             "attention_factor", r->attention_factor, "truncate", r->truncate, "original_max_position",
                                 (json_int_t)r->original_max_position);
    CHECK(o && rope && !json_object_set_new(o, "rope", rope), "a configuration cannot be hashed");
    char *text = json_canonical(o);
    sha256_of(text, strlen(text), hex);
    free(text);
    json_decref(o);
}
