/* See quantization.h. Whitelist, like model_config.c: a key that is not in `known` must say nothing, or the file is refused by it. */
#include "data/quantization.h"

#include <string.h>

#include "base/error.h"
#include "base/json.h"

enum { FP8 = 1, COMPRESSED = 2, FBGEMM = 4, MODELOPT = 8, GROUP = 16, WEIGHTS = 32 };      /* bits: the methods, then the objects inside config_groups */

static const struct { const char *name; unsigned method; } methods[] = {
    {"fp8", FP8}, {"compressed-tensors", COMPRESSED}, {"fbgemm_fp8", FBGEMM}, {"modelopt", MODELOPT},
};

/* Keys that are read, and keys that say nothing about the values of weights. Which tensors are quantised, their types say: lists of modules are read over. */
static const struct { const char *key; unsigned where; } known[] = {
    {"quant_method", FP8 | COMPRESSED | FBGEMM | MODELOPT}, {"fmt", FP8}, {"weight_block_size", FP8}, {"scale_fmt", FP8}, {"expert_dtype", FP8},
    {"activation_scheme", FP8}, {"modules_to_not_convert", FP8 | FBGEMM}, {"ignored_layers", FP8}, {"modules_to_convert", FP8}, {"dequantize", FP8},
    {"activation_scale_ub", FBGEMM}, {"kv_cache_scheme", FP8 | COMPRESSED | MODELOPT}, {"kv_cache_quant_algo", MODELOPT}, {"quant_algo", MODELOPT},
    {"exclude_modules", MODELOPT}, {"producer", MODELOPT}, {"config_groups", COMPRESSED | MODELOPT}, {"ignore", COMPRESSED | MODELOPT}, {"format", COMPRESSED | GROUP},
    {"quantization_status", COMPRESSED}, {"global_compression_ratio", COMPRESSED}, {"version", COMPRESSED}, {"sparsity_config", COMPRESSED},
    {"targets", GROUP}, {"weights", GROUP}, {"input_activations", GROUP}, {"output_activations", GROUP},
    {"num_bits", WEIGHTS}, {"type", WEIGHTS}, {"symmetric", WEIGHTS}, {"dynamic", WEIGHTS}, {"strategy", WEIGHTS}, {"block_structure", WEIGHTS},
    {"observer", WEIGHTS}, {"observer_kwargs", WEIGHTS}, {"scale_dtype", WEIGHTS}, {"zp_dtype", WEIGHTS},
};

const char *scales_text(enum scale_kind kind, int64_t block_rows, int64_t block_cols, char text[64])
{
    static const char *const of[] = {[SCALE_NONE] = "no scales", [SCALE_TENSOR] = "one scale per tensor", [SCALE_ROW] = "one scale per row",
                                     [SCALE_BLOCK] = "one scale per block of"};
    if (kind == SCALE_BLOCK) snprintf(text, 64, "%s %lld x %lld", of[kind], (long long)block_rows, (long long)block_cols);
    else snprintf(text, 64, "%s", of[kind]);
    return text;
}

struct place { const char *name, *prefix; };      /* file, and "quantization_config." or the way to an object inside it */

static int refuse(const struct place *at, const char *key, const json_t *value, const char *why)
{
    char text[80];
    if (!value) return fail(ERR_INPUT, "%s: key \"%s%s\" is missing; %s", at->name, at->prefix, key, why);
    return fail(ERR_INPUT, "%s: key \"%s%s\" is %s; %s", at->name, at->prefix, key, json_shown(value, text), why);
}

/* NULL where the key is absent or null: readers treat these alike. */
static const json_t *get(const json_t *o, const char *key)
{
    const json_t *v = json_object_get(o, key);
    return json_is_null(v) ? NULL : v;
}

static bool is_one_of(const json_t *v, const char *const *names)
{
    for (; json_is_string(v) && *names; names++) if (!strcmp(json_string_value(v), *names)) return true;
    return false;
}

static int check_keys(const json_t *o, unsigned where, const struct place *at)
{
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)o, key, v) {
        bool found = json_says_nothing(v);
        for (size_t i = 0; i < sizeof known / sizeof *known && !found; i++) found = known[i].where & where && !strcmp(known[i].key, key);
        if (!found) return refuse(at, key, v, "this program does not know it; use the checkpoint in bf16, f16 or f32");
    }
    return OK;
}

static int get_block(struct quantization *q, const json_t *v, const char *key, const struct place *at)
{
    int64_t size[2] = {0, 0};
    for (int i = 0; i < 2 && json_array_size(v) == 2; i++) size[i] = json_integer_value(json_array_get(v, (size_t)i));
    if (size[0] < 1 || size[1] < 1 || size[0] > 1 << 20 || size[1] > 1 << 20)
        return refuse(at, key, v, "a block is a list of two sizes from 1 to 1048576, such as [128, 128]");
    q->scales = SCALE_BLOCK;
    q->block_rows = size[0];
    q->block_cols = size[1];
    return OK;
}

static int read_fp8(struct quantization *q, const json_t *o, const struct place *at)
{
    const json_t *fmt = get(o, "fmt"), *block = get(o, "weight_block_size"), *scale = get(o, "scale_fmt"),
                 *expert = get(o, "expert_dtype");
    q->scales = SCALE_TENSOR;
    if (fmt && !is_one_of(fmt, (const char *const[]){"e4m3", "float8_e4m3fn", NULL})) return refuse(at, "fmt", fmt, "weights are read from e4m3");
    /* ue8m0: powers of two; the type of the tensor says how they are stored */
    if (scale && !is_one_of(scale, (const char *const[]){"float", "ue8m0", NULL})) return refuse(at, "scale_fmt", scale, "float and ue8m0 are known");
    if (expert && !is_one_of(expert, (const char *const[]){"fp8", NULL})) return refuse(at, "expert_dtype", expert, "weights are read from e4m3");
    return block ? get_block(q, block, "weight_block_size", at) : OK;
}

/* "weights" of one of config_groups. modelopt's have no strategy: quant_algo says it. */
static int read_weights(struct quantization *q, const json_t *o, bool has_strategy, const struct place *at)
{
    const json_t *bits = get(o, "num_bits"), *type = get(o, "type"), *symmetric = get(o, "symmetric"),
                 *dynamic = get(o, "dynamic"), *strategy = get(o, "strategy");
    int rc = OK;
    TRY(check_keys(o, WEIGHTS, at));
    if (!json_is_integer(bits) || json_integer_value(bits) != 8) { rc = refuse(at, "num_bits", bits, "weights are read from e4m3, which has 8"); goto out; }
    if (!is_one_of(type, (const char *const[]){"float", NULL})) { rc = refuse(at, "type", type, "weights are read from e4m3, which is float"); goto out; }
    if (symmetric && !json_is_true(symmetric)) { rc = refuse(at, "symmetric", symmetric, "zero points are not implemented"); goto out; }
    if (dynamic && !json_is_false(dynamic)) { rc = refuse(at, "dynamic", dynamic, "the scales of weights must be in the file"); goto out; }
    if (!has_strategy) goto out;
    if (is_one_of(strategy, (const char *const[]){"tensor", NULL})) q->scales = SCALE_TENSOR;
    else if (is_one_of(strategy, (const char *const[]){"channel", NULL})) q->scales = SCALE_ROW;
    else if (is_one_of(strategy, (const char *const[]){"block", NULL})) rc = get_block(q, get(o, "block_structure"), "block_structure", at);
    else rc = refuse(at, "strategy", strategy, "tensor, channel and block are known");
out:
    return rc;
}

static int read_groups(struct quantization *q, const json_t *o, bool has_strategy, const struct place *at)
{
    static const char *const formats[] = {"float-quantized", "naive-quantized", NULL};
    const json_t *groups = get(o, "config_groups"), *format = get(o, "format"), *sparsity = get(o, "sparsity_config");
    const char *key;
    json_t *group;
    int rc = OK;
    bool first = true;
    char *prefix = NULL, *inner = NULL;
    if (has_strategy && !is_one_of(format, formats)) { rc = refuse(at, "format", format, "float-quantized and naive-quantized are known"); goto out; }
    if (sparsity && !json_says_nothing(sparsity) && !is_one_of(get(sparsity, "format"), (const char *const[]){"dense", NULL})) {
        rc = refuse(at, "sparsity_config", sparsity, "weights that are packed by their sparsity are not read");
        goto out;
    }
    if (!groups && !has_strategy) goto out;
    if (!json_is_object(groups) || !json_object_size(groups)) { rc = refuse(at, "config_groups", groups, "it says how weights are scaled"); goto out; }
    json_object_foreach((json_t *)groups, key, group) {
        const json_t *weights = get(group, "weights"), *own = get(group, "format");
        struct quantization here = *q;
        free(prefix);
        free(inner);
        prefix = xasprintf("%sconfig_groups.%.40s.", at->prefix, key);
        inner = xasprintf("%sweights.", prefix);
        struct place in = {at->name, prefix}, in_weights = {at->name, inner};
        if (!json_is_object(group)) { rc = refuse(&(struct place){at->name, "quantization_config.config_groups."}, key, group, "a group is an object"); goto out; }
        TRY(check_keys(group, GROUP, &in));
        if (!json_is_object(weights)) { rc = refuse(&in, "weights", weights, "groups that quantise weights are known"); goto out; }
        if (own && !is_one_of(own, formats)) { rc = refuse(&in, "format", own, "float-quantized and naive-quantized are known"); goto out; }
        TRY(read_weights(&here, weights, has_strategy, &in_weights));
        if (!first && (here.scales != q->scales || here.block_rows != q->block_rows || here.block_cols != q->block_cols)) {
            rc = refuse(&in, "weights", weights, "groups that are scaled in different ways in one model are not implemented");
            goto out;
        }
        *q = here;
        first = false;
    }
out:
    free(prefix);
    free(inner);
    return rc;
}

int quantization_read(struct quantization *q, const json_t *config, const char *name)
{
    const json_t *o = get(config, "quantization_config"), *method = get(o, "quant_method"), *algorithm = get(o, "quant_algo");
    struct place at = {name, "quantization_config."};
    int rc = OK;
    size_t m = 0;
    *q = (struct quantization){.scales = SCALE_NONE};
    if (!o || json_says_nothing(o)) return OK;
    if (!json_is_object(o)) return refuse(&(struct place){name, ""}, "quantization_config", o, "an object is known");
    while (m < sizeof methods / sizeof *methods && !is_one_of(method, (const char *const[]){methods[m].name, NULL})) m++;
    if (m == sizeof methods / sizeof *methods)
        return refuse(&at, "quant_method", method,
                      "fp8, compressed-tensors, fbgemm_fp8 and modelopt (FP8) are known; else use the checkpoint in bf16, f16 or f32");
    TRY(check_keys(o, methods[m].method, &at));
    q->method = methods[m].name;
    switch (methods[m].method) {
    case FP8: rc = read_fp8(q, o, &at); break;
    case COMPRESSED: rc = read_groups(q, o, true, &at); break;
    case FBGEMM: q->scales = SCALE_ROW; break;
    case MODELOPT:
        q->scales = SCALE_TENSOR;
        if (!is_one_of(algorithm, (const char *const[]){"FP8", NULL})) rc = refuse(&at, "quant_algo", algorithm, "FP8 is known");
        else rc = read_groups(q, o, false, &at);
        break;
    }
out:
    return rc;
}
