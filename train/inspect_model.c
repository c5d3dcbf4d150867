/* distill inspect MODEL: everything a model directory or checkpoint holds is read: config, tokenizer, every value of every tensor.
 *
 * Weights are validated by the function that loads them (params_load), on a backend that keeps nothing and looks at every value that passes: what
 * inspect accepts is what train, eval and export accept, and a model larger than memory can be inspected. */
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "train/inspect.h"
#include "train/load.h"

/* The first failure is what the command ends with; what comes after it is still looked at. */
struct verdict { int status; char *message; };

static void judge(struct verdict *v, int rc)
{
    if (rc == OK || v->status != OK) return;
    v->status = rc;
    v->message = xstrdup(fail_message());
}

/* ---- config.json ---- */

static void report_rope(struct report *r, const struct model_config *c)
{
    const struct rope_config *p = &c->rope;
    json_t *j = json_pack("{s:f}", "theta", p->theta);
    char text[200];
    switch (p->type) {
    case ROPE_DEFAULT: snprintf(text, sizeof text, "theta %g", p->theta); break;
    case ROPE_LINEAR:  snprintf(text, sizeof text, "linear, theta %g, factor %g", p->theta, p->factor); break;
    case ROPE_LLAMA3:  snprintf(text, sizeof text, "llama3, theta %g, factor %g, low %g, high %g, original length %lld", p->theta, p->factor,
                                p->low_freq_factor, p->high_freq_factor, (long long)p->original_max_position); break;
    case ROPE_YARN:    snprintf(text, sizeof text, "yarn, theta %g, factor %g, beta %g to %g, attention factor %g, original length %lld", p->theta, p->factor,
                                p->beta_slow, p->beta_fast, p->attention_factor, (long long)p->original_max_position); break;
    }
    static const char *const names[] = {[ROPE_DEFAULT] = "default", [ROPE_LINEAR] = "linear", [ROPE_LLAMA3] = "llama3", [ROPE_YARN] = "yarn"};
    json_object_set_new(j, "type", json_string(names[p->type]));
    if (p->type != ROPE_DEFAULT) json_object_set_new(j, "factor", json_real(p->factor));
    if (p->type == ROPE_LLAMA3 || p->type == ROPE_YARN) json_object_set_new(j, "original_max_position", json_integer(p->original_max_position));
    if (p->type == ROPE_YARN) json_object_set_new(j, "attention_factor", json_real(p->attention_factor));
    report_line(r, "rope", j, "rotary positions", "%s", text);
}

/* quantised: how many tensors have scales */
static void report_config(struct report *r, const struct model_config *c, const char *path, int quantised)
{
    char hash[SHA256_HEX], flags[128] = "";
    int sliding = 0;
    report_section(r, "model", path);
    report_text(r, "architecture", "architecture", architecture_name(c->arch));
    report_int(r, "layers", "layers", c->n_layers);
    report_int(r, "hidden_size", "width", c->hidden_size);
    report_int(r, "intermediate_size", "ffn width", c->intermediate_size);
    json_object_set_new(r->section, "heads", json_integer(c->n_heads));
    json_object_set_new(r->section, "kv_heads", json_integer(c->n_kv_heads));
    report_line(r, "head_dim", json_integer(c->head_dim), "heads", "%d query, %d key/value, %d wide", c->n_heads, c->n_kv_heads, c->head_dim);
    report_int(r, "vocab_size", "vocabulary (columns)", c->vocab_size);
    report_line(r, "tied", json_boolean(c->tie_embeddings), "embeddings and head", c->tie_embeddings ? "tied" : "separate");
    const struct { bool on; const char *key, *name; } flag[] = {
        {c->qkv_bias, "qkv_bias", "q, k, v bias"}, {c->o_bias, "o_bias", "o bias"}, {c->mlp_bias, "mlp_bias", "ffn bias"}, {c->qk_norm, "qk_norm", "q/k norm"}};
    for (int i = 0; i < 4; i++) {
        json_object_set_new(r->section, flag[i].key, json_boolean(flag[i].on));
        if (flag[i].on) sprintf(flags + strlen(flags), "%s%s", *flags ? ", " : "", flag[i].name);
    }
    report_line(r, NULL, NULL, "extras", "%s", *flags ? flags : "none");
    report_line(r, "rms_norm_eps", json_real(c->rms_norm_eps), "norm epsilon", "%g", (double)c->rms_norm_eps);
    report_rope(r, c);
    report_int(r, "max_position", "longest sequence", c->max_position);
    for (int l = 0; c->layer_slides && l < c->n_layers; l++) sliding += c->layer_slides[l];
    if (sliding) report_line(r, "sliding_window", json_integer(c->sliding_window), "sliding window", "%lld tokens in %d of %d layers",
                             (long long)c->sliding_window, sliding, c->n_layers);
    if (c->quantization.scales != SCALE_NONE) {
        const struct quantization *q = &c->quantization;
        char scales[64];
        scales_text(q->scales, q->block_rows, q->block_cols, scales);
        report_line(r, "quantization", json_pack("{s:s, s:s}", "method", q->method, "scales", scales), "quantised by", "%s: e4m3, %s%s", q->method, scales,
                    quantised ? "" : ", says config.json; no tensor is");
    }
    model_config_hash(c, hash);
    report_text(r, "config_hash", "hash of the config", hash);
}

static void report_parameters(struct report *r, const struct params *t)
{
    int64_t embedding = t->embed->count, head = t->head == t->embed ? 0 : t->head->count, layer = 0;
    for (int i = 0; i < t->n; i++) if (t->p[i].layer == 0) layer += t->p[i].count;
    report_section(r, "parameters", "parameters");
    report_line(r, "total", json_integer(t->parameters), "total", "%lld (%.3f M)", (long long)t->parameters, (double)t->parameters / 1e6);
    report_line(r, "embedding", json_integer(embedding), "embedding", "%lld%s", (long long)embedding, head ? "" : ", also the head");
    if (head) report_int(r, "head", "head", head);
    report_int(r, "per_layer", "per layer", layer);
    report_int(r, "without_embeddings", "without embeddings", t->parameters - embedding - head);
}

/* ---- tokenizer.json ---- */

static void report_token(struct report *r, const struct tokenizer *t, const char *key, const char *label, int32_t id)
{
    size_t n = 0;
    const char *bytes = id >= 0 ? tokenizer_token_bytes(t, id, &n) : NULL;
    char *text = bytes ? escaped(bytes, n) : NULL;
    if (id < 0) report_line(r, key, json_null(), label, "none");
    else report_line(r, key, json_integer(id), label, "%d %s", id, text ? text : "");
    free(text);
}

static int report_tokenizer(struct report *r, const char *path, int64_t V)
{
    struct tokenizer *t = NULL;
    char *file = path_is_dir(path) ? path_join(path, "tokenizer.json") : xstrdup(path), hash[SHA256_HEX];
    int rc = OK;
    report_section(r, "tokenizer", "tokenizer");
    if (!path_exists(file)) { report_line(r, "present", json_false(), "tokenizer.json", "none"); goto out; }
    rc = tokenizer_open(&t, path);
    if (rc != OK) { report_line(r, "refused", json_string(fail_message()), "refused", "%s", fail_message()); goto out; }
    int32_t size = tokenizer_vocab_size(t), added = 0, special = 0;
    for (int32_t i = 0; i < size; i++) {
        enum token_kind k = tokenizer_token_kind(t, i);
        added += k == TOKEN_ADDED || k == TOKEN_SPECIAL;
        special += k == TOKEN_SPECIAL;
    }
    report_line(r, "present", json_true(), "ids", "0 to %d, %d of them without a token", size - 1, tokenizer_holes(t));
    json_object_set_new(r->section, "vocab_size", json_integer(size));
    json_object_set_new(r->section, "holes", json_integer(tokenizer_holes(t)));
    json_object_set_new(r->section, "special", json_integer(special));
    report_line(r, "added", json_integer(added), "added tokens", "%d, %d of them special", added, special);
    report_int(r, "merges", "merges", tokenizer_n_merges(t));
    report_token(r, t, "bos", "begins a text", tokenizer_bos(t));
    report_token(r, t, "eos", "ends a text", tokenizer_eos(t));
    report_token(r, t, "pad", "padding", tokenizer_pad(t));
    const char *pre = tokenizer_gguf_pre(t);
    report_line(r, "gguf_pre", pre ? json_string(pre) : json_null(), "llama.cpp calls it", "%s", pre ? pre : "nothing: it has none that splits like this");
    if (V >= size) report_line(r, "padding_columns", json_integer(V - size), "padding columns", "%lld: columns of the head that no token uses", (long long)(V - size));
    else report_line(r, "padding_columns", json_integer(V - size), "padding columns", "none, and %lld ids that the head has no column for", (long long)(size - V));
    tokenizer_hash(t, hash);
    report_text(r, "hash", "hash of the tokenizer", hash);
out:
    tokenizer_close(t);
    free(file);
    return rc;
}

/* ---- weights ---- */

struct tensor_faults { const char *name; int64_t end, nan, inf; };   /* elements [end of the one before, end) of the flat weights */
struct look { struct tensor_faults *tensor; int n, at; int64_t values, nan, inf; float largest; const char *largest_name; };

static int add_tensor(void *context, const char *name, int n_dims, const int64_t *shape, int64_t offset)
{
    struct look *l = context;
    l->tensor = xrealloc(l->tensor, (size_t)(l->n + 1) * sizeof *l->tensor);
    l->tensor[l->n++] = (struct tensor_faults){.name = name, .end = offset + shape[0] * (n_dims == 2 ? shape[1] : 1)};
    return OK;
}

static act *const NOWHERE = (act *)4096;       /* weights begin here in addresses that are told apart and never touched */

static void look_at(struct backend *be, act *to, const float *values, int64_t count)
{
    struct look *l = be->state;
    int64_t first = ((char *)to - (char *)NOWHERE) / (int64_t)sizeof *values, nan = 0, inf = 0;
    float largest = 0;
    while (first >= l->tensor[l->at].end) l->at++;           /* params_load goes through the table in order */
    #pragma omp parallel for simd schedule(static) reduction(+ : nan, inf) reduction(max : largest)
    for (int64_t i = 0; i < count; i++) {
        float a = fabsf(values[i]);
        nan += a != a;
        inf += a > 3.402823466e38f;
        largest = a > largest && a <= 3.402823466e38f ? a : largest;
    }
    struct tensor_faults *t = &l->tensor[l->at];
    t->nan += nan;
    t->inf += inf;
    l->nan += nan;
    l->inf += inf;
    l->values += count;
    if (largest > l->largest) { l->largest = largest; l->largest_name = t->name; }
}

static void report_dtypes(struct report *r, const struct tensor_set *set)
{
    json_t *j = json_object();
    char text[256] = "";
    for (int d = 0; d < DTYPE_COUNT; d++) {
        int64_t n = 0, bytes = 0;
        for (int i = 0; i < tensor_set_count(set); i++) {
            const struct tensor_view *v = tensor_set_at(set, i);
            if (v->dtype == (enum dtype)d) { n++; bytes += (int64_t)v->bytes; }
        }
        if (!n) continue;
        json_object_set_new(j, dtype_name((enum dtype)d), json_pack("{s:I, s:I}", "tensors", (json_int_t)n, "bytes", (json_int_t)bytes));
        snprintf(text + strlen(text), sizeof text - strlen(text), "%s%s in %lld tensors, %s", *text ? "; " : "", dtype_name((enum dtype)d), (long long)n,
                 bytes_text(bytes));
    }
    report_line(r, "dtypes", j, "types", "%s", text);
}

static void report_scales(struct report *r, const struct tensor_set *set)
{
    int64_t tensors = 0, scales = 0, bookkeeping = 0;
    float least = INFINITY, most = 0;
    for (int i = 0; i < tensor_set_count(set); i++) {
        const struct tensor_view *v = tensor_set_at(set, i);
        bookkeeping += v->is_scale;
        if (!v->scale) continue;
        tensors++;
        scales += v->scale->count;
        for (int64_t k = 0; k < v->scale->count; k++) {
            least = fminf(least, v->scale->value[k]);
            most = fmaxf(most, v->scale->value[k]);
        }
    }
    if (!tensors) return;
    bookkeeping -= tensors;
    report_line(r, "scales", json_pack("{s:I, s:I, s:f, s:f, s:I}", "tensors", (json_int_t)tensors, "values", (json_int_t)scales, "least", (double)least, "most", (double)most,
                                       "not_of_weights", (json_int_t)bookkeeping),
                "scales", "%lld for %lld F8_E4M3 tensors, from %g to %g", (long long)scales, (long long)tensors, (double)least, (double)most);
    if (bookkeeping) report_line(r, NULL, NULL, "", "%lld more of activations or a kv cache, which are not used", (long long)bookkeeping);
}

static void report_faults(struct report *r, const struct look *l)
{
    enum { SHOWN = 20 };
    json_t *j = json_object();
    int shown = 0;
    report_line(r, "values", json_integer(l->values), "values read", "%lld", (long long)l->values);
    if (l->largest_name) report_line(r, "largest", json_real(l->largest), "largest magnitude", "%g in %s", (double)l->largest, l->largest_name);
    json_object_set_new(r->section, "nan", json_integer(l->nan));
    report_line(r, "inf", json_integer(l->inf), "NaN and Inf", l->nan || l->inf ? "%lld NaN, %lld Inf" : "none", (long long)l->nan, (long long)l->inf);
    for (int i = 0; i < l->n; i++) {
        const struct tensor_faults *t = &l->tensor[i];
        if (!t->nan && !t->inf) continue;
        json_object_set_new(j, t->name, json_pack("{s:I, s:I}", "nan", (json_int_t)t->nan, "inf", (json_int_t)t->inf));
        if (shown++ < SHOWN) report_line(r, NULL, NULL, "", "%s: %lld NaN, %lld Inf", t->name, (long long)t->nan, (long long)t->inf);
    }
    if (shown > SHOWN) report_line(r, NULL, NULL, "", "and %d tensors more", shown - SHOWN);
    json_object_set_new(r->section, "faults", j);
}

static int report_weights(struct report *r, const struct model_files *f, const struct params *t)
{
    char hash[SHA256_HEX];
    struct look l = {0};
    struct ops ops = {.upload_act = look_at};
    struct backend be = {.name = "inspect", .act_dtype = DTYPE_F32, .ops = &ops, .state = &l};
    int64_t bytes = 0;
    int files = tensor_set_files(f->tensors), rc = OK;
    for (int i = 0; i < files; i++) bytes += path_size(tensor_set_file_path(f->tensors, i));
    report_section(r, "weights", "weights");
    json_object_set_new(r->section, "bytes", json_integer(bytes));
    json_object_set_new(r->section, "tensors", json_integer(tensor_set_count(f->tensors)));
    report_line(r, "files", json_integer(files), "files", "%d with %d tensors, %lld bytes (%s)", files, tensor_set_count(f->tensors), (long long)bytes,
                bytes_text(bytes));
    report_dtypes(r, f->tensors);
    report_scales(r, f->tensors);
    params_each(t, add_tensor, &l);
    TRY(params_load(t, &be, NOWHERE, f->tensors, f->path, NULL));
    report_faults(r, &l);
    TRY(tensor_set_hash(f->tensors, hash));
    report_text(r, "hash", "hash of the weights", hash);
    if (l.nan || l.inf) rc = fail(ERR_NUMERIC, "%s: the weights hold %lld NaN and %lld Inf; restore them from where they came from", f->path,
                                  (long long)l.nan, (long long)l.inf);
out:
    free(l.tensor);
    return rc;
}

/* ---- what a checkpoint has beside a model ---- */

static int verify_files(struct report *r, const char *path)
{
    int rc = OK, n = 0;
    char *list = path_join(path, "files.json");
    json_t *files = NULL, *value;
    const char *name;
    if (!path_exists(list)) goto out;
    TRY(json_read_file(list, 1 << 20, &files));
    json_object_foreach(files, name, value) {
        char hash[SHA256_HEX], *file = path_join(path, name);
        rc = strchr(name, '/') || !json_is_string(value) ? fail(ERR_INPUT, "%s: entry %s is not a file name with a hash", list, name) : sha256_of_file(file, hash);
        if (rc == OK && strcmp(hash, json_string_value(value)))
            rc = fail(ERR_INPUT, "%s: SHA-256 differs from files.json: the checkpoint is damaged, use the one before it", file);
        free(file);
        if (rc != OK) goto out;
        n++;
    }
    report_line(r, "files_verified", json_integer(n), "files", "%d, SHA-256 as listed in files.json", n);
out:
    json_decref(files);
    free(list);
    return rc;
}

static int report_optimizer(struct report *r, const char *path)
{
    enum { STAGE = 1 << 18 };
    int rc = OK;
    char *file = path_join(path, "optimizer.safetensors");
    struct tensor_set *set = NULL;
    float *stage = xmalloc(STAGE * sizeof *stage);
    int64_t values = 0, bad = 0;
    if (!path_exists(file)) { report_line(r, "optimizer", json_null(), "optimizer state", "none"); goto out; }
    TRY(tensor_set_open(&set, file));
    for (int i = 0; i < tensor_set_count(set); i++) {
        const struct tensor_view *v = tensor_set_at(set, i);
        for (int64_t first = 0; first < v->count; first += STAGE) {
            int64_t n = v->count - first < STAGE ? v->count - first : STAGE;
            if ((rc = tensor_to_float(v, first, n, stage)) != OK) { fail_in(rc, "%s", file); goto out; }
            for (int64_t j = 0; j < n; j++) bad += !isfinite(stage[j]);
            values += n;
        }
    }
    report_line(r, "optimizer", json_pack("{s:i, s:I, s:I}", "tensors", tensor_set_count(set), "values", (json_int_t)values, "not_finite", (json_int_t)bad),
                "optimizer state",
                "%d tensors, %lld values, %lld of them NaN or Inf", tensor_set_count(set), (long long)values, (long long)bad);
    if (bad) rc = fail(ERR_NUMERIC, "%s: %lld values are NaN or Inf; go on from an older checkpoint", file, (long long)bad);
out:
    tensor_set_close(set);
    free(stage);
    free(file);
    return rc;
}

static int report_checkpoint(struct report *r, const char *path, struct verdict *v)
{
    static const char *const keys[][2] = {{"step", "optimizer steps"}, {"tokens", "tokens seen"}, {"targets", "targets learnt from"}, {"epoch", "epoch"},
                                          {"cursor", "rows of the epoch"}};
    int rc = OK;
    char *file = path_join(path, "state.json");
    json_t *state = NULL;
    const char *text;
    if (!path_exists(file)) goto out;
    report_section(r, "checkpoint", "checkpoint");
    judge(v, verify_files(r, path));
    TRY(json_read_file(file, 1 << 20, &state));
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        int64_t value;
        TRY(json_get_int(state, keys[i][0], file, -1, &value));
        if (value >= 0) report_int(r, keys[i][0], keys[i][1], value);
    }
    TRY(json_get_string(state, "data_id", file, "", &text));
    report_text(r, "data_id", "trained on data", *text ? text : "unknown");
    TRY(json_get_string(state, "device", file, "", &text));
    report_text(r, "device", "on", *text ? text : "unknown");
    TRY(report_optimizer(r, path));
out:
    json_decref(state);
    free(file);
    return rc;
}

int inspect_model(struct report *r, const struct inspect_options *o)
{
    struct verdict v = {OK, NULL};
    struct model_files *files = NULL;
    struct params *params = NULL;
    int rc = OK, quantised = 0;
    TRY(model_files_open(&files, o->path));
    params = params_new(files->config);
    for (int i = 0; i < tensor_set_count(files->tensors); i++) quantised += tensor_set_at(files->tensors, i)->scale != NULL;
    report_config(r, files->config, o->path, quantised);
    report_parameters(r, params);
    judge(&v, report_tokenizer(r, o->tokenizer ? o->tokenizer : o->path, files->config->vocab_size));
    judge(&v, report_weights(r, files, params));
    judge(&v, report_checkpoint(r, o->path, &v));
    if (v.status != OK) rc = fail(v.status, "%s", v.message);
out:
    free(v.message);
    params_free(params);
    model_files_close(files);
    return rc;
}
