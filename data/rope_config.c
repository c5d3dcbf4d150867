/* Rotary position embedding: the keys of config.json in their two spellings, and the frequencies they stand for.
 *
 *     old    "rope_theta": b, "rope_scaling": null | {"rope_type" (older: "type"): T, ...}
 *     new    "rope_parameters": {"rope_theta": b, "rope_type": T, ...}                       (transformers 5)
 *
 *     default   w_i = b^(-2i/D)                         linear    w_i / f
 *     llama3    with L the original context and lambda = 2 pi / w: w if lambda < L / high, w / f if lambda > L / low, else
 *               (1 - s) w / f + s w,  s = (L / lambda - low) / (high - low)
 *     yarn      g w + (1 - g) w / f,  g = 1 - clamp((i - lo) / (hi - lo)), lo and hi the dimensions that turn beta_fast and beta_slow
 *               times within L; cos and sin are multiplied by attention_factor (default 0.1 ln f + 1)
 *
 * As transformers 5 reads them (modeling_rope_utils.py): yarn's factor is the one written, not max_position / original.
 */
#include "data/model_config.h"

#include <math.h>
#include <string.h>

#include "base/error.h"

static const char *const type_names[] = {[ROPE_DEFAULT] = "default", [ROPE_LINEAR] = "linear", [ROPE_LLAMA3] = "llama3", [ROPE_YARN] = "yarn"};

/* What each type reads besides its name and theta. original_max_position_embeddings is harmless where it is not used. */
static const char *const type_keys[][10] = {
    [ROPE_DEFAULT] = {"original_max_position_embeddings", NULL},
    [ROPE_LINEAR] = {"factor", "original_max_position_embeddings", NULL},
    [ROPE_LLAMA3] = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", NULL},
    [ROPE_YARN] = {"factor", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate", "original_max_position_embeddings",
        NULL},
};

static bool is_given(const json_t *v) { return v && !json_is_null(v); }
static bool same(const json_t *a, const json_t *b)
{
    return json_is_number(a) && json_is_number(b) ? json_number_value(a) == json_number_value(b) : json_equal(a, b);
}

/* The object under `key`, NULL when it is absent, null or empty: readers treat these alike. */
static int get_object(const json_t *config, const char *key, const char *name, const json_t **object)
{
    *object = json_object_get(config, key);
    if (!is_given(*object)) *object = NULL;
    else if (!json_is_object(*object)) return fail(ERR_INPUT, "%s: key \"%s\" is not an object", name, key);
    else if (!json_object_size(*object)) *object = NULL;
    return OK;
}

/* "rope_type" or the older "type"; NULL when neither is there */
static int get_type(const json_t *object, const char *key, const char *name, const char **type)
{
    const json_t *now = json_object_get(object, "rope_type"), *old = json_object_get(object, "type");
    *type = NULL;
    if ((is_given(now) && !json_is_string(now)) || (is_given(old) && !json_is_string(old)))
        return fail(ERR_INPUT, "%s: %s: its rope_type is not a string", name, key);
    if (is_given(now) && is_given(old) && !same(now, old))
        return fail(ERR_INPUT, "%s: %s: rope_type is \"%.60s\" and type is \"%.60s\"; keep the right one", name, key, json_string_value(now),
                    json_string_value(old));
    *type = is_given(now) ? json_string_value(now) : is_given(old) ? json_string_value(old) : NULL;
    return OK;
}

/* One number that may be written in up to three places; they have to agree. *value stays as it was when there is none. */
static int get_agreed(const json_t *const places[3], const char *const place_names[3], const char *key, const char *name, const json_t **value)
{
    int first = -1;
    for (int i = 0; i < 3; i++) {
        const json_t *v = json_object_get(places[i], key);
        if (!is_given(v)) continue;
        if (!json_is_number(v)) return fail(ERR_INPUT, "%s: key \"%s\" of %s is not a number", name, key, place_names[i]);
        if (first >= 0 && !same(*value, v))
            return fail(ERR_INPUT, "%s: key \"%s\" is %.17g in %s and %.17g in %s; keep the right one", name, key, json_number_value(*value),
                        place_names[first], json_number_value(v), place_names[i]);
        if (first < 0) first = i;
        *value = v;
    }
    return OK;
}

/* A member of the rope object within [low, high]; absent or null gives `fallback`, NAN meaning that it is required. */
static int get_number(const json_t *o, const char *key, const char *name, double fallback, double low, double high, double *value)
{
    const json_t *v = json_object_get(o, key);
    *value = fallback;
    if (!is_given(v)) return isnan(fallback) ? fail(ERR_INPUT, "%s: the rope parameters lack \"%s\"", name, key) : OK;
    if (!json_is_number(v)) return fail(ERR_INPUT, "%s: key \"%s\" of the rope parameters is not a number", name, key);
    *value = json_number_value(v);
    if (!(*value >= low && *value <= high))
        return fail(ERR_INPUT, "%s: key \"%s\" of the rope parameters is %g, it must be from %g to %g", name, key, *value, low, high);
    return OK;
}

static bool is_one_of(const char *key, const char *const *list)
{
    while (*list && strcmp(*list, key)) list++;
    return *list;
}

static int check_keys(const json_t *o, enum rope_type type, const char *where, const char *name)
{
    static const char *const common[] = {"rope_type", "type", "rope_theta", "partial_rotary_factor", NULL};
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)o, key, v) {
        if (json_is_null(v) || json_is_false(v) || is_one_of(key, common) || is_one_of(key, type_keys[type])) continue;
        if (json_is_object(v)) return fail(ERR_INPUT, "%s: key \"%s\" of %s: rope parameters per layer type are not supported", name, key, where);
        if (!strcmp(key, "factor") && json_is_number(v) && json_number_value(v) == 1) continue;   /* scaling by one */
        return fail(ERR_INPUT, "%s: key \"%s\" of %s is not known for rope type \"%s\"; remove it if it does not change the model", name, key, where,
                    type_names[type]);
    }
    return OK;
}

/* Both objects given: they must say the same, for one reader takes the old, another the new. */
static int check_agreement(const json_t *scaling, const json_t *parameters, const char *name)
{
    static const char *const elsewhere[] = {"rope_type", "type", "rope_theta", NULL};   /* compared on their own */
    const json_t *const pair[2] = {scaling, parameters};
    const char *key;
    json_t *v;
    for (int i = 0; scaling && parameters && i < 2; i++)
        json_object_foreach((json_t *)pair[i], key, v) {
            const json_t *other = json_object_get(pair[1 - i], key);
            if (is_one_of(key, elsewhere) || (is_given(v) ? other && same(v, other) : !is_given(other))) continue;
            return fail(ERR_INPUT, "%s: rope_scaling and rope_parameters disagree about \"%s\"; keep the right one", name, key);
        }
    return OK;
}

/* Written before transformers 4.33, a Llama configuration had no rope_theta: the base was the constant 10000. */
static bool predates_rope_theta(const json_t *config, enum architecture arch)
{
    int major, minor;
    const char *version = json_string_value(json_object_get(config, "transformers_version"));
    return arch == ARCH_LLAMA && version && sscanf(version, "%d.%d", &major, &minor) == 2 && (major < 4 || (major == 4 && minor < 33));
}

static double mscale(double factor, double scale) { return factor <= 1 ? 1 : 0.1 * scale * log(factor) + 1; }

static int read_yarn(struct rope_config *r, const json_t *o, int64_t max_position, const char *name)
{
    int rc = OK;
    double scale, scale_all;
    const json_t *truncate = json_object_get(o, "truncate");
    if (truncate && !json_is_boolean(truncate) && !json_is_null(truncate))
        return fail(ERR_INPUT, "%s: key \"truncate\" of the rope parameters is not true or false", name);
    r->truncate = !truncate || json_is_true(truncate);
    /* "factor": null is how some files leave it to the two lengths */
    TRY(get_number(o, "factor", name, json_object_get(o, "factor") ? (double)max_position / (double)r->original_max_position : NAN, 1, 1e6,
                   &r->factor));
    if (r->factor < 1)
        return fail(ERR_INPUT, "%s: original_max_position_embeddings is more than max_position_embeddings and rope factor is null; "
                    "write the factor", name);
    TRY(get_number(o, "beta_fast", name, 0, 0, 1e6, &r->beta_fast));
    TRY(get_number(o, "beta_slow", name, 0, 0, 1e6, &r->beta_slow));
    if (r->beta_fast == 0) r->beta_fast = 32;   /* 0 counts as absent */
    if (r->beta_slow == 0) r->beta_slow = 1;
    if (r->beta_fast < r->beta_slow) return fail(ERR_INPUT, "%s: rope beta_fast %g is below beta_slow %g", name, r->beta_fast, r->beta_slow);
    TRY(get_number(o, "mscale", name, 0, -1e6, 1e6, &scale));
    TRY(get_number(o, "mscale_all_dim", name, 0, -1e6, 1e6, &scale_all));
    double implied = scale != 0 && scale_all != 0 ? mscale(r->factor, scale) / mscale(r->factor, scale_all) : mscale(r->factor, 1);
    TRY(get_number(o, "attention_factor", name, implied, 1e-6, 1e6, &r->attention_factor));
    if (!(r->attention_factor >= 1e-6 && r->attention_factor <= 1e6))
        rc = fail(ERR_INPUT, "%s: rope mscale and mscale_all_dim give an attention factor of %g", name, r->attention_factor);
out:
    return rc;
}

int rope_config_read(struct rope_config *r, const json_t *config, enum architecture arch, int64_t max_position, const char *name)
{
    static const char *const place_names[3] = {"the file's top level", "rope_scaling", "rope_parameters"};
    const json_t *scaling, *parameters, *theta = NULL, *original = NULL, *partial = NULL;
    const char *old_type, *new_type;
    int rc = OK;
    *r = (struct rope_config){.factor = 1, .attention_factor = 1, .truncate = true};
    TRY(get_object(config, "rope_scaling", name, &scaling));
    TRY(get_object(config, "rope_parameters", name, &parameters));
    TRY(get_type(scaling, "rope_scaling", name, &old_type));
    TRY(get_type(parameters, "rope_parameters", name, &new_type));
    const char *type = scaling ? old_type : new_type;
    if (!type) type = "default";
    if (scaling && parameters && strcmp(type, new_type ? new_type : "default")) {
        rc = fail(ERR_INPUT, "%s: rope_scaling is of type \"%.60s\", rope_parameters of type \"%.60s\"; keep the right one", name, type,
                  new_type ? new_type : "default");
        goto out;
    }
    int known = 0;
    while (known <= ROPE_YARN && strcmp(type, type_names[known])) known++;
    if (known > ROPE_YARN) {
        rc = fail(ERR_INPUT, "%s: rope type \"%.60s\" is not implemented; default, linear, llama3 and yarn are", name, type);
        goto out;
    }
    r->type = (enum rope_type)known;
    TRY(check_keys(scaling, r->type, "rope_scaling", name));
    TRY(check_keys(parameters, r->type, "rope_parameters", name));
    TRY(check_agreement(scaling, parameters, name));

    const json_t *const places[3] = {config, scaling, parameters}, *o = scaling ? scaling : parameters;
    TRY(get_agreed(places, place_names, "rope_theta", name, &theta));
    TRY(get_agreed(places, place_names, "original_max_position_embeddings", name, &original));
    TRY(get_agreed(places, place_names, "partial_rotary_factor", name, &partial));
    if (!theta && !predates_rope_theta(config, arch)) {
        rc = fail(ERR_INPUT,
                  "%s: key \"rope_theta\" is missing (and \"rope_parameters\" does not hold it); write the value the model was trained with", name);
        goto out;
    }
    r->theta = theta ? json_number_value(theta) : 10000;
    if (!(r->theta > 1 && r->theta <= 1e15)) {
        rc = fail(ERR_INPUT, "%s: key \"rope_theta\" is %g, it must be above 1 and at most 1e15", name, r->theta);
        goto out;
    }
    if (partial && json_number_value(partial) != 1) {
        rc = fail(ERR_INPUT, "%s: key \"partial_rotary_factor\" is %g: rotating a part of each head is not implemented", name,
                  json_number_value(partial));
        goto out;
    }
    double length = original ? json_number_value(original) : (double)max_position;
    if (!(length >= 1 && length <= 2147483648.0 && length == floor(length))) {
        rc = fail(ERR_INPUT, "%s: key \"original_max_position_embeddings\" is %g, it must be a length from 1 to 2147483648", name, length);
        goto out;
    }
    if (r->type == ROPE_LLAMA3 || r->type == ROPE_YARN) r->original_max_position = (int64_t)length;
    if (r->type == ROPE_LINEAR || r->type == ROPE_LLAMA3) TRY(get_number(o, "factor", name, NAN, 1, 1e6, &r->factor));
    if (r->type == ROPE_LLAMA3) {
        TRY(get_number(o, "low_freq_factor", name, NAN, 1e-6, 1e6, &r->low_freq_factor));
        TRY(get_number(o, "high_freq_factor", name, NAN, 1e-6, 1e6, &r->high_freq_factor));
        if (r->high_freq_factor <= r->low_freq_factor)
            rc = fail(ERR_INPUT, "%s: rope high_freq_factor %g is not above low_freq_factor %g", name, r->high_freq_factor, r->low_freq_factor);
    }
    if (r->type == ROPE_YARN) TRY(read_yarn(r, o, max_position, name));
out:
    return rc;
}

void rope_config_write(const struct rope_config *r, json_t *config)
{
    json_t *o = json_pack("{s:s}", "rope_type", type_names[r->type]);
    if (r->type != ROPE_DEFAULT) json_object_set_new(o, "factor", json_real(r->factor));
    if (r->type == ROPE_LLAMA3) {
        json_object_set_new(o, "low_freq_factor", json_real(r->low_freq_factor));
        json_object_set_new(o, "high_freq_factor", json_real(r->high_freq_factor));
    }
    if (r->type == ROPE_YARN) {
        json_object_set_new(o, "beta_fast", json_real(r->beta_fast));
        json_object_set_new(o, "beta_slow", json_real(r->beta_slow));
        if (r->attention_factor != mscale(r->factor, 1)) json_object_set_new(o, "attention_factor", json_real(r->attention_factor));
        if (!r->truncate) json_object_set_new(o, "truncate", json_false());
    }
    if (r->type == ROPE_LLAMA3 || r->type == ROPE_YARN)
        json_object_set_new(o, "original_max_position_embeddings", json_integer(r->original_max_position));
    json_object_set_new(config, "rope_theta", json_real(r->theta));
    json_object_set_new(config, "rope_scaling", r->type == ROPE_DEFAULT ? json_null() : json_deep_copy(o));
    json_object_set_new(o, "rope_theta", json_real(r->theta));
    json_object_set_new(config, "rope_parameters", o);
    json_object_del(config, "original_max_position_embeddings");   /* would override the one in rope_parameters */
    json_object_del(config, "partial_rotary_factor");
}

/* One rounding to float. transformers computes in float32 step by step, and at a million positions its roundings are visible:
 * the same steps give the same angles. volatile, so that no compiler fuses two steps into one. */
static double rounded(double x)
{
    volatile float f = (float)x;
    return f;
}

/* The dimension that makes `turns` full turns within the original context */
static double yarn_dimension(const struct rope_config *r, int dim, double turns)
{
    return dim * log((double)r->original_max_position / (turns * 2 * M_PI)) / (2 * log(r->theta));
}

void rope_inverse_frequencies(const struct model_config *c, double *inv_freq, double *attention_factor)
{
    const struct rope_config *r = &c->rope;
    int dim = c->head_dim;
    double theta = rounded(r->theta), factor = rounded(r->factor), length = (double)r->original_max_position, low = 0, high = 0;
    if (r->type == ROPE_YARN) {
        low = yarn_dimension(r, dim, r->beta_fast);
        high = yarn_dimension(r, dim, r->beta_slow);
        if (r->truncate) { low = floor(low); high = ceil(high); }
        low = fmax(low, 0);
        high = fmin(high, dim - 1);
        if (low == high) high += 0.001;
    }
    for (int i = 0; i < dim / 2; i++) {
        double power = rounded(pow(theta, rounded(2.0 * i / dim))), w = rounded(1 / power);
        if (r->type == ROPE_LINEAR) w = rounded(w / factor);
        if (r->type == ROPE_LLAMA3) {
            double wavelength = rounded(rounded(1 / w) * rounded(2 * M_PI)), turns = rounded(rounded(1 / wavelength) * rounded(length));
            double s = rounded(rounded(turns - rounded(r->low_freq_factor)) / rounded(r->high_freq_factor - r->low_freq_factor));
            if (wavelength > rounded(length / r->low_freq_factor)) w = rounded(w / factor);
            else if (wavelength >= rounded(length / r->high_freq_factor)) w = rounded(rounded(rounded(rounded(1 - s) * w) / factor) + rounded(s * w));
        }
        if (r->type == ROPE_YARN) {
            double ramp = rounded(rounded(i - rounded(low)) / rounded(high - low)), keep = rounded(1 - fmin(fmax(ramp, 0), 1));
            double interpolated = rounded(1 / rounded(factor * power));
            w = rounded(rounded(interpolated * rounded(1 - keep)) + rounded(w * keep));
        }
        inv_freq[i] = w;
    }
    *attention_factor = r->attention_factor;
}
