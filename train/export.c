/* distill export: a model directory or checkpoint as a safetensors directory or a GGUF file.
 *
 * Written under a temporary name, loaded back, and its logits compared with those of the source weights rounded to the same type in memory, so the
 * bound is that of fp32 arithmetic, not of the type; only then it gets its name. How far the rounding itself moves the logits is reported. */
#include "train/export.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/rng.h"
#include "train/checkpoint.h"
#include "train/command.h"
#include "train/student.h"

static const double BOUND = 1e-5;          /* relative L2 of the logits: two fp32 forwards of the same weights */
enum { PROMPT = 64, STAGE = 1 << 18 };

enum gguf_dtype export_dtype(const struct export *x, int n_dims, int64_t columns)
{
    if (!x->gguf) return x->dtype;
    if (n_dims == 1) return GGUF_DTYPE_F32;
    return x->dtype == GGUF_DTYPE_Q8_0 && columns % GGUF_BLOCK ? GGUF_DTYPE_F16 : x->dtype;
}

/* ---- the source ---- */

static int check_value_range(void *context, const char *name, int n_dims, const int64_t *shape, int64_t offset)
{
    struct export *x = context;
    (void)offset;
    const struct tensor_view *v = tensor_set_find(x->source->tensors, name);
    enum gguf_dtype type = export_dtype(x, n_dims, n_dims == 2 ? shape[1] : 1);
    float *stage = xmalloc(STAGE * sizeof *stage);
    int rc = OK;
    for (int64_t first = 0; first < v->count && rc == OK; first += STAGE) {
        int64_t n = v->count - first < STAGE ? v->count - first : STAGE;
        rc = tensor_to_float(v, first, n, stage);
        for (int64_t i = 0; i < n && rc == OK; i++) {
            if (!isfinite(stage[i])) rc = fail(ERR_NUMERIC, "%s: tensor %s holds a NaN or an infinity; this model cannot be exported", x->source->path, name);
            else if (type == GGUF_DTYPE_F16 && fabsf(stage[i]) > 65504) rc = fail(ERR_NUMERIC, "%s: tensor %s holds %g, which f16 cannot; use export.dtype bf16 or f32", x->source->path, name, (double)stage[i]);
        }
    }
    free(stage);
    return rc;
}

/* Rounds one tensor of the loaded model to its type. */
static int round_tensor(void *context, const char *name, int n_dims, const int64_t *shape, int64_t offset)
{
    struct export *x = context;
    (void)name;
    struct backend *be = x->model->be;
    int64_t count = shape[0] * (n_dims == 2 ? shape[1] : 1);
    enum gguf_dtype type = export_dtype(x, n_dims, n_dims == 2 ? shape[1] : 1);
    float *stage = xmalloc(STAGE * sizeof *stage);
    void *bytes = xmalloc(gguf_dtype_bytes(type, STAGE));
    for (int64_t first = 0; first < count; first += STAGE) {
        int64_t n = count - first < STAGE ? count - first : STAGE;
        act *at = (act *)((char *)x->model->weights + (size_t)(offset + first) * dtype_width(be->act_dtype));
        be->ops->download_act(be, stage, at, n);
        gguf_encode(type, stage, n, bytes);
        gguf_decode(type, bytes, n, stage);
        be->ops->upload_act(be, at, stage, n);
    }
    free(stage);
    free(bytes);
    return OK;
}

/* ---- safetensors ---- */

static enum dtype file_dtype(enum gguf_dtype t) { return t == GGUF_DTYPE_F32 ? DTYPE_F32 : t == GGUF_DTYPE_F16 ? DTYPE_F16 : DTYPE_BF16; }

struct specs { struct tensor_spec *spec; int n, room; enum dtype dtype; };

static int add_spec(void *context, const char *name, int n_dims, const int64_t *shape, int64_t offset)
{
    struct specs *l = context;
    (void)offset;
    if (l->n == l->room) l->spec = xrealloc(l->spec, (size_t)(l->room = l->room ? 2 * l->room : 64) * sizeof *l->spec);
    struct tensor_spec *s = &l->spec[l->n++];
    *s = (struct tensor_spec){.name = xstrdup(name), .dtype = l->dtype, .n_dims = n_dims};
    memcpy(s->shape, shape, (size_t)n_dims * sizeof *shape);
    return OK;
}

static int fill_from_source(void *context, const struct tensor_spec *spec, size_t offset, size_t bytes, void *out)
{
    const struct export *x = context;
    const struct tensor_view *v = tensor_set_find(x->source->tensors, spec->name);
    size_t width = dtype_width(spec->dtype);
    float *stage = xmalloc(STAGE * sizeof *stage);
    int rc = OK;
    for (size_t done = 0; done < bytes && rc == OK;) {
        int64_t n = (int64_t)((bytes - done) / width);
        if (n > STAGE) n = STAGE;
        rc = tensor_to_float(v, (int64_t)((offset + done) / width), n, stage);
        if (rc == OK) gguf_encode(x->dtype, stage, n, (char *)out + done);
        done += (size_t)n * width;
    }
    free(stage);
    return rc;
}

static int write_json(const char *dir, const char *name, json_t *value)
{
    char *path = path_join(dir, name);
    int rc = json_write_file(path, value);
    free(path);
    return rc;
}

static int write_directory(struct export *x, const char *dir)
{
    static const char *const names[] = {[DTYPE_F32] = "float32", [DTYPE_F16] = "float16", [DTYPE_BF16] = "bfloat16"};
    const struct model_config *c = x->source->config;
    struct specs l = {.dtype = file_dtype(x->dtype)};
    int rc = OK;
    char *generation = path_join(dir, "generation_config.json");
    json_t *config = model_config_to_json(c, names[l.dtype]), *settings = json_object();
    int32_t eos = x->tokenizer ? tokenizer_eos(x->tokenizer) : -1, bos = x->tokenizer ? tokenizer_bos(x->tokenizer) : -1;
    TRY(dir_make(dir));
    /* a model made from scratch learnt the tokenizer's end of text, but its config.json did not know it */
    if (c->eos[0] < 0 && eos >= 0) json_object_set_new(config, "eos_token_id", json_integer(eos));
    if (c->bos < 0 && bos >= 0) json_object_set_new(config, "bos_token_id", json_integer(bos));
    TRY(write_json(dir, "config.json", config));
    if (x->tokenizer_dir) TRY(copy_tokenizer_files(x->tokenizer_dir, dir));
    if (!path_exists(generation)) {
        for (const char *const *key = (const char *const[]){"bos_token_id", "eos_token_id", NULL}; *key; key++) {
            json_t *value = json_object_get(config, *key);
            if (value && !json_is_null(value)) json_object_set(settings, *key, value);
        }
        TRY(write_json(dir, "generation_config.json", settings));
    }
    params_each(x->model->params, add_spec, &l);
    TRY(safetensors_write_dir(dir, l.spec, l.n, (size_t)x->c->export_max_file_mib << 20, fill_from_source, x));
out:
    for (int i = 0; i < l.n; i++) free((char *)l.spec[i].name);
    free(l.spec);
    json_decref(config);
    json_decref(settings);
    free(generation);
    return rc;
}

static int load_directory(struct export *x, const char *dir)
{
    struct model_files *files = NULL;
    char have[SHA256_HEX], want[SHA256_HEX];
    int rc = model_files_open(&files, dir);
    if (rc == OK) {
        model_config_hash(files->config, have);
        model_config_hash(x->source->config, want);
        rc = strcmp(have, want) ? fail(ERR_NUMERIC, "%s: config.json does not describe the source model", dir) : model_files_load(files, x->model);
    }
    model_files_close(files);
    return rc;
}

/* ---- the check ---- */

/* Logits of a fixed prompt of pseudo-random ids, malloc'd. */
static float *prompt_logits(struct export *x, struct batch *b)
{
    struct model *m = x->model;
    int64_t count = b->n * m->c->vocab_size;
    float *logits = xmalloc((size_t)count * sizeof *logits);
    model_set_batch(m, b);
    model_forward(m);
    model_logits(m, 0, b->n);
    m->be->ops->download_act(m->be, logits, m->logits, count);
    return logits;
}

static double relative(const float *a, const float *b, int64_t n, double *largest)
{
    double d = 0, r = 0;
    *largest = 0;
    for (int64_t i = 0; i < n; i++) {
        double e = (double)a[i] - b[i];
        d += e * e;
        r += (double)b[i] * b[i];
        if (fabs(e) > *largest) *largest = fabs(e);
    }
    return d == 0 ? 0 : sqrt(d / r);
}

static struct batch *prompt_batch(int64_t length, int64_t valid)
{
    struct batch *b = batch_new(1, length, NULL);
    uint32_t *tokens = xmalloc((size_t)length * sizeof *tokens);
    uint8_t *mask = xcalloc((size_t)length, 1);
    uint16_t *document = xcalloc((size_t)length, sizeof *document);
    for (int64_t i = 0; i < length; i++) tokens[i] = philox4x32(17, 0, (uint64_t)i).v[0] % (uint32_t)valid;
    batch_set_row(b, 0, tokens, mask, document);
    batch_finish(b);
    free(tokens);
    free(mask);
    free(document);
    return b;
}

static int write_and_check(struct export *x, const char *temporary, struct batch *b, const char *path)
{
    int rc = OK;
    int64_t count = b->n * x->model->c->vocab_size;
    double largest, error, rounding;
    float *source = NULL, *rounded = NULL, *loaded = NULL;
    TRY(model_files_load(x->source, x->model));
    TRY(params_each(x->model->params, check_value_range, x));
    source = prompt_logits(x, b);
    params_each(x->model->params, round_tensor, x);
    rounded = prompt_logits(x, b);
    TRY(x->gguf ? export_gguf_write(x, temporary) : write_directory(x, temporary));
    TRY(x->gguf ? export_gguf_load(x, temporary) : load_directory(x, temporary));
    loaded = prompt_logits(x, b);
    error = relative(loaded, rounded, count, &largest);
    if (!(error <= BOUND)) { rc = fail(ERR_NUMERIC, "%s: loaded back, its logits differ from the model's by %.2e (relative L2, bound %.0e); nothing was written", path, error, BOUND); goto out; }
    rounding = relative(loaded, source, count, &largest);
    printf("loaded back: logits of %lld tokens agree to %.1e; rounding to %s moves them by %.1e (relative L2), %.2e at most\n", (long long)b->n, error, x->c->export_dtype, rounding, largest);
out:
    free(source);
    free(rounded);
    free(loaded);
    return rc;
}

static int64_t tree_bytes(const char *path, int *files)
{
    int n = 0;
    char **names = NULL;
    int64_t bytes = 0;
    *files = 1;
    if (!path_is_dir(path)) return path_size(path);
    if (dir_list(path, &names, &n) != OK) return 0;
    for (int i = 0; i < n; i++) {
        char *file = path_join(path, names[i]);
        bytes += path_size(file);
        free(file);
    }
    names_free(names, n);
    *files = n;
    return bytes;
}

static int publish(const char *temporary, const char *path)
{
    char *parent = xstrdup(path), *slash = strrchr(parent, '/');
    int rc = OK;
    if (slash) slash[slash == parent] = 0;
    if (path_is_dir(temporary)) rc = file_sync_dir(temporary);
    if (rc == OK && rename(temporary, path)) rc = fail_errno(ERR_IO, "%s: cannot rename to %s", temporary, path);
    if (rc == OK) rc = file_sync_dir(slash ? parent : ".");
    free(parent);
    return rc;
}

static int run(struct export *x, const char *model_path)
{
    const struct config *c = x->c;
    const char *path = c->export_path;
    struct backend *be = NULL;
    struct memory_plan *plan = NULL;
    struct batch *b = NULL;
    char *temporary = xasprintf("%s.tmp-%d", path, (int)getpid());
    int rc = OK, files;
    TRY(model_files_open(&x->source, model_path));
    x->tokenizer_dir = find_tokenizer_dir(c, (const char *const[]){model_path, NULL});
    if (x->tokenizer_dir) TRY(tokenizer_open(&x->tokenizer, x->tokenizer_dir));
    if (x->gguf) TRY(export_gguf_check(x));

    struct backend_options device = {.device = "cpu", .threads = (int)c->run_threads};     /* fp32: the check is about the file */
    TRY(backend_open(&be, &device));
    plan = memory_plan_new(be);
    int64_t length = x->source->config->max_position < PROMPT ? x->source->config->max_position : PROMPT;
    struct model_options o = {.N = length, .max_doc = length, .head_rows = length};
    x->model = model_new(be, x->source->config, &o, plan);
    memory_add_scratch(plan, model_scratch_bytes(x->model, 0));
    TRY(memory_commit(plan, (size_t)(c->memory_limit_gib * 0x1p30)));
    model_ready(x->model);
    b = prompt_batch(length, valid_vocab(x->source->config, x->tokenizer));
    TRY(write_and_check(x, temporary, b, path));
    int64_t bytes = tree_bytes(temporary, &files);
    TRY(publish(temporary, path));
    printf("%s: %s, %.2fM parameters, %s %s, %d file%s, %.2f MB\n", path, architecture_name(x->source->config->arch), (double)x->model->params->parameters / 1e6, c->export_format, c->export_dtype,
           files, files == 1 ? "" : "s", (double)bytes / 1e6);
    if (!x->tokenizer) warn("%s has no tokenizer.json, so the export has none", model_path);
out:
    if (rc != OK) {
        char *why = xstrdup(fail_message());
        dir_remove_tree(temporary);
        fail(rc, "%s", why);
        free(why);
    }
    batch_free(b);
    model_free(x->model);
    memory_plan_free(plan);
    backend_close(be);
    tokenizer_close(x->tokenizer);
    free(x->tokenizer_dir);
    model_files_close(x->source);
    free(temporary);
    return rc;
}

int command_export(int argc, char **argv)
{
    struct config *c = NULL;
    char *model = NULL;
    int help, rc = OK;
    TRY(command_config(argc, argv, CMD_EXPORT, "Writes a model directory or the run's newest checkpoint as a safetensors directory or a GGUF file, loads it back and compares the logits before it says done.",
                       "distill export configs/quickstart/distill.yaml --set export.format=gguf --set export.dtype=q8_0 --set export.path=student.gguf", NULL, NULL, NULL, &c, &help));
    if (help) goto out;
    struct export x = {.c = c, .gguf = !strcmp(c->export_format, "gguf")};
    x.dtype = !strcmp(c->export_dtype, "f32") ? GGUF_DTYPE_F32 : !strcmp(c->export_dtype, "f16") ? GGUF_DTYPE_F16 : !strcmp(c->export_dtype, "bf16") ? GGUF_DTYPE_BF16 : GGUF_DTYPE_Q8_0;
    if (!*c->export_path) { rc = fail(ERR_USAGE, "export.path is not set: name what is to be written"); goto out; }
    if (x.dtype == GGUF_DTYPE_Q8_0 && !x.gguf) { rc = fail(ERR_USAGE, "export.dtype q8_0 exists in GGUF only; set export.format to gguf, or export.dtype to bf16"); goto out; }
    if (path_exists(c->export_path)) { rc = fail(ERR_USAGE, "%s exists and is not overwritten; remove it or set another export.path", c->export_path); goto out; }
    TRY(checkpoint_or(c->export_model, c->run_dir, "export.model", &model));
    rc = run(&x, model);
out:
    free(model);
    config_free(c);
    return rc;
}
