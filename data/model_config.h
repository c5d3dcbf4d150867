/* config.json of a Llama-style decoder, as Hugging Face publishes it: Qwen2ForCausalLM, LlamaForCausalLM, MistralForCausalLM,
 * Qwen3ForCausalLM. Whitelist policy: every key that changes the maths is read; a key that would and is not implemented
 * (logit soft-capping, dynamic rope, weights in 4 bits, ...) is refused by name; unknown keys with a non-default value too.
 */
#ifndef DATA_MODEL_CONFIG_H
#define DATA_MODEL_CONFIG_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "data/quantization.h"

enum architecture { ARCH_QWEN2, ARCH_LLAMA, ARCH_MISTRAL, ARCH_QWEN3, ARCH_COUNT };
enum rope_type { ROPE_DEFAULT, ROPE_LINEAR, ROPE_LLAMA3, ROPE_YARN };

struct rope_config {
    enum rope_type type;
    double theta;
    double factor;                        /* linear, llama3, yarn */
    double low_freq_factor, high_freq_factor;           /* llama3 */
    double beta_fast, beta_slow;          /* yarn */
    double attention_factor;              /* yarn: multiplies cos and sin at every position; resolved (mscale, mscale_all_dim or 0.1 ln f + 1) */
    bool truncate;                        /* yarn: floor/ceil the ramp's bounds (transformers' default true) */
    int64_t original_max_position;        /* llama3, yarn: resolved as transformers does when the key is absent */
};

struct model_config {
    enum architecture arch;
    int64_t vocab_size;                   /* V: columns of the head, padding included */
    int64_t hidden_size;                  /* C */
    int64_t intermediate_size;            /* F */
    int     n_layers;
    int     n_heads, n_kv_heads;          /* Hq, Hkv */
    int     head_dim;                     /* D */
    bool    qkv_bias, o_bias, mlp_bias;   /* o_bias, mlp_bias: Llama's attention_bias and mlp_bias keys */
    bool    qk_norm;                      /* Qwen3: RMSNorm over D of each q and k head, before RoPE */
    bool    tie_embeddings;
    float   rms_norm_eps;
    struct rope_config rope;
    int64_t max_position;
    int64_t sliding_window;               /* 0: none. Tokens i-window+1 .. i are seen */
    bool   *layer_slides;                 /* [n_layers], NULL when no layer does */
    struct quantization quantization;     /* how the weights beside it are stored; no part of the model itself: neither hashed nor written */
    double  initializer_range;
    int32_t bos, eos[8], pad;             /* -1 absent; eos list ends at -1 */
    json_t *json;                         /* the file as read: exports start from it */
};

/* `path`: a config.json or a directory holding one. ERR_INPUT names the key. */
int  model_config_read(struct model_config **out, const char *path);
/* `name` is for messages. Keeps a reference of its own; the caller's stays the caller's. */
int  model_config_from_json(struct model_config **out, json_t *json, const char *name);
void model_config_free(struct model_config *c);         /* NULL-safe */
/* config.json for these dimensions: `c->json` with the keys of the struct set to it (layers, layer_types, torch_dtype = dtype,
 * "float32", "bfloat16", "float16") and without quantization_config; rope is written in both spellings so that transformers 4 and 5 and llama.cpp read the same. New reference. */
json_t *model_config_to_json(const struct model_config *c, const char *dtype);
const char *architecture_name(enum architecture a);     /* "Qwen2ForCausalLM" */

/* inv_freq[D/2] in double and the factor on cos and sin, as transformers' modeling_rope_utils computes them. */
void rope_inverse_frequencies(const struct model_config *c, double *inv_freq, double *attention_factor);
/* All parameters, embeddings and head included (tied once). */
int64_t model_config_parameters(const struct model_config *c);
/* 2 * (weights in products) + attention at half the square, per token, forward (background: performance, section 1). */
double model_config_forward_flops(const struct model_config *c, int64_t sequence);
/* SHA-256 of the keys that change the maths, for binding shards to a teacher: not the spelling of the file, not token ids, not
 * max_position. */
void model_config_hash(const struct model_config *c, char hex[65]);

/* rope_config.c, for model_config.c. Reads rope_theta, rope_scaling, rope_parameters, original_max_position_embeddings and
 * partial_rotary_factor of `config`; writes the same keys, replacing what is there. */
int  rope_config_read(struct rope_config *r, const json_t *config, enum architecture arch, int64_t max_position, const char *name);
void rope_config_write(const struct rope_config *r, json_t *config);

#endif
