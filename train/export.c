/* distill export: a model for an inference engine. The promise: what is under the final name was loaded back and gives the same logits.
 *
 *     1. run a prompt through the source, then round its weights in memory exactly as the file will hold them and run it again
 *     2. write under PATH.tmp-PID     3. load that into a new model, run the prompt, compare with the rounded source     4. rename
 *
 * Comparing with rounded weights makes the bound that of fp32 arithmetic, whatever the type; what rounding costs is printed. One model is
 * in memory at a time. Owns the command, safetensors and the numbers; GGUF's names are export_gguf.c's. */
#include "train/export.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"
#include "base/failpoint.h"
#include "base/file.h"
#include "base/json.h"
#include "base/rng.h"
#include "train/checkpoint.h"
#include "train/command.h"
#include "train/student.h"

enum { PROMPT = 64, STAGE = 1 << 20 };     /* positions compared; floats moved at a time: whole blocks of q8_0 */

/* The same weights give the same logits, bit for bit. GGUF keeps rope_theta, yarn's and llama3's factors in f32, which moves an angle by
 * 6e-8 of itself. */
static const double bound_safetensors = 1e-6, bound_gguf = 1e-5;

struct export {
    const struct export_options *o;
    char *path, *tmp, *name;               /* o->path without slashes at its end */
    struct model_files *files;
    struct tokenizer *tokenizer;
    struct backend *be;
    struct export_tensor *tensor; int n;
    struct batch *batch;
    float *logits, *rounded, *loaded;      /* [positions, V] */
    int64_t positions, parameters;
};

/* ---- one model at a time ---- */

struct loaded { struct memory_plan *plan; struct model *model; };

static void loaded_close(struct loaded *l)
{
    model_free(l->model);
    memory_plan_free(l->plan);
    *l = (struct loaded){0};
}

static int loaded_open(struct export *e, struct loaded *l, const struct model_config *c)
{
    int rc = model_check_device(e->be, c, e->o->model);
    if (rc != OK) return rc;
    l->plan = memory_plan_new(e->be);
    struct model_options o = {.N = e->positions, .max_doc = e->positions, .head_rows = e->positions};
    l->model = model_new(e->be, c, &o, l->plan);
    memory_add_scratch(l->plan, model_scratch_bytes(l->model, 1));
    TRY(memory_commit(l->plan, e->o->memory_limit));
    model_ready(l->model);
out:
    return rc;
}

static void run_prompt(struct export *e, struct model *m, float **logits)
{
    int64_t count = e->positions * m->c->vocab_size;
    if (!*logits) *logits = xmalloc((size_t)count * sizeof **logits);
    model_set_batch(m, e->batch);
    model_forward(m);
    model_logits(m, 0, e->positions);
    m->be->ops->download_act(m->be, *logits, m->logits, count);
}

/* A fixed text, or pseudo-random ids where there is no tokenizer. */
static int make_prompt(struct export *e)
{
    static const char text[] = "In 1969, about 3.14159 kg of naïve café crème cost 42 €; nobody could say why. def main(argv):\n    return len(argv) * 2\n\n"
                               "The quick brown fox jumps over the lazy dog, and 东京 is far away. \"Well,\" she said, \"that's that!\"";
    const struct model_config *c = e->files->config;
    struct tokenizer_work *work = NULL;
    const int32_t *ids = NULL;
    uint32_t tokens[PROMPT];
    uint8_t mask[PROMPT] = {0};
    uint16_t document[PROMPT] = {0};
    size_t n = 0;
    int rc = OK;
    e->positions = c->max_position < PROMPT ? c->max_position : PROMPT;
    if (e->tokenizer) {
        work = tokenizer_work_new(e->tokenizer);
        TRY(tokenizer_encode(e->tokenizer, work, text, sizeof text - 1, &ids, &n));
    }
    for (int64_t i = 0; i < e->positions; i++) {
        tokens[i] = n ? (uint32_t)ids[i % (int64_t)n] : philox4x32(1, 0, (uint64_t)i).v[0] % (uint32_t)valid_vocab(c, e->tokenizer);
        if ((int64_t)tokens[i] >= c->vocab_size) {
            rc = fail(ERR_MISMATCH, "token %u of %s is outside the vocabulary of %lld of %s: this tokenizer does not belong to the model", tokens[i],
                      e->o->tokenizer_dir, (long long)c->vocab_size, e->files->path);
            goto out;
        }
    }
    e->batch = batch_new(1, e->positions, NULL, false);
    batch_set_row(e->batch, 0, tokens, mask, document);
    batch_finish(e->batch);
out:
    tokenizer_work_free(work);
    return rc;
}

/* ---- the tensors and their types ---- */

struct listing { struct export *e; int room; };

/* GGUF keeps vectors in f32, as llama.cpp's own conversion does; a matrix whose rows are no whole blocks cannot be q8_0 and stays f16. */
static enum gguf_dtype type_of(const struct export_options *o, int n_dims, const int64_t *shape)
{
    if (!o->gguf) return o->dtype;
    if (n_dims < 2) return GGUF_DTYPE_F32;
    return o->dtype == GGUF_DTYPE_Q8_0 && shape[n_dims - 1] % GGUF_BLOCK ? GGUF_DTYPE_F16 : o->dtype;
}

static int list_tensor(void *context, const char *name, int n_dims, const int64_t *shape, int64_t offset)
{
    struct listing *l = context;
    struct export *e = l->e;
    if (e->n == l->room) e->tensor = xrealloc(e->tensor, (size_t)(l->room = 2 * l->room + 64) * sizeof *e->tensor);
    struct export_tensor *t = &e->tensor[e->n++];
    *t = (struct export_tensor){.n_dims = n_dims, .shape = {shape[0], n_dims == 2 ? shape[1] : 1}, .offset = offset,
                                .dtype = type_of(e->o, n_dims, shape), .source = tensor_set_find(e->files->tensors, name)};
    snprintf(t->name, sizeof t->name, "%s", name);
    t->count = t->shape[0] * t->shape[1];
    e->parameters += t->count;
    CHECK(t->source, "tensor %s was loaded and is gone", name);
    return OK;
}

static int64_t first_not_finite(const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) if (!isfinite(x[i])) return i;
    return -1;
}

/* The weights in memory become what the file will hold. Refuses what is not finite before or after. */
static int round_weights(struct export *e, struct model *m)
{
    const struct ops *op = e->be->ops;
    float *x = xmalloc(STAGE * sizeof *x), *y = xmalloc(STAGE * sizeof *y);
    void *bytes = xmalloc(STAGE * sizeof *x);
    int rc = OK;
    for (int i = 0; i < e->n; i++) {
        const struct export_tensor *t = &e->tensor[i];
        for (int64_t first = 0; first < t->count; first += STAGE) {
            int64_t n = t->count - first < STAGE ? t->count - first : STAGE, bad;
            act *at = (act *)((char *)m->weights + (size_t)(t->offset + first) * dtype_width(e->be->act_dtype));
            op->download_act(e->be, x, at, n);
            if ((bad = first_not_finite(x, n)) >= 0) {
                rc = fail(ERR_NUMERIC, "%s: tensor %s holds %s at element %lld; a model with such weights is not exported: go back to an earlier checkpoint", e->files->path, t->name,
                          isnan(x[bad]) ? "NaN" : "Inf", (long long)(first + bad));
                goto out;
            }
            gguf_encode(t->dtype, x, n, bytes);
            gguf_decode(t->dtype, bytes, n, y);
            if ((bad = first_not_finite(y, n)) >= 0) {
                rc = fail(ERR_NUMERIC, "%s: tensor %s holds %g at element %lld, which %s cannot hold; use export.dtype %s", e->files->path, t->name, (double)x[bad],
                          (long long)(first + bad), gguf_dtype_name(t->dtype), t->dtype == GGUF_DTYPE_BF16 ? "f32" : "bf16");
                goto out;
            }
            op->upload_act(e->be, at, y, n);
        }
    }
out:
    free(x);
    free(y);
    free(bytes);
    return rc;
}

/* The source's logits as it is and as it will be. */
static int run_source(struct export *e)
{
    struct loaded l = {0};
    int rc = OK;
    TRY(loaded_open(e, &l, e->files->config));
    memory_print(l.plan, stdout);
    TRY(model_files_load(e->files, l.model));
    TRY(params_each(l.model->params, list_tensor, &(struct listing){.e = e}));
    run_prompt(e, l.model, &e->logits);
    TRY(round_weights(e, l.model));
    run_prompt(e, l.model, &e->rounded);
    if (first_not_finite(e->logits, e->positions * l.model->c->vocab_size) >= 0 || first_not_finite(e->rounded, e->positions * l.model->c->vocab_size) >= 0)
        rc = fail(ERR_NUMERIC, "%s: its weights are finite, its logits are not; such a model is not exported", e->files->path);
out:
    loaded_close(&l);
    return rc;
}

/* ---- safetensors ---- */

static int fill_tensor(void *context, const struct tensor_spec *spec, size_t offset, size_t bytes, void *out)
{
    (void)context;
    const struct export_tensor *t = spec->user;
    size_t width = dtype_width(spec->dtype);
    int64_t first = (int64_t)(offset / width), n = (int64_t)(bytes / width);
    int rc = OK;
    float *x = xmalloc(STAGE * sizeof *x);
    for (int64_t done = 0; done < n; done += STAGE) {
        int64_t part = n - done < STAGE ? n - done : STAGE;
        TRY(tensor_to_float(t->source, first + done, part, x));
        gguf_encode(t->dtype, x, part, (char *)out + (size_t)done * width);
    }
out:
    free(x);
    return rc;
}

/* config.json; a model made from scratch learnt the tokenizer's ends of text without its configuration knowing their ids */
static json_t *make_config(const struct export *e, const char *dtype)
{
    json_t *o = model_config_to_json(e->files->config, dtype);
    const struct { const char *key; int32_t id; } ids[] = {{"bos_token_id", e->tokenizer ? tokenizer_bos(e->tokenizer) : -1},
                                                           {"eos_token_id", e->tokenizer ? tokenizer_eos(e->tokenizer) : -1},
                                                           {"pad_token_id", e->tokenizer ? tokenizer_pad(e->tokenizer) : -1}};
    for (size_t i = 0; i < sizeof ids / sizeof *ids; i++)
        if (json_is_null(json_object_get(o, ids[i].key)) && ids[i].id >= 0 && ids[i].id < e->files->config->vocab_size) json_object_set_new(o, ids[i].key, json_integer(ids[i].id));
    return o;
}

/* A minimal one where the source has none. */
static int write_generation_config(const char *dir, const json_t *config)
{
    static const char *const keys[] = {"bos_token_id", "eos_token_id", "pad_token_id"};
    char *path = path_join(dir, "generation_config.json");
    json_t *o = json_pack("{s:b}", "_from_model_config", 1);
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (!json_is_null(json_object_get(config, keys[i]))) json_object_set(o, keys[i], json_object_get(config, keys[i]));
    int rc = path_exists(path) ? OK : json_write_file(path, o);
    json_decref(o);
    free(path);
    return rc;
}

static int write_safetensors(struct export *e)
{
    static const struct { enum gguf_dtype type; enum dtype dtype; const char *name; } types[] = {
        {GGUF_DTYPE_F32, DTYPE_F32, "float32"}, {GGUF_DTYPE_F16, DTYPE_F16, "float16"}, {GGUF_DTYPE_BF16, DTYPE_BF16, "bfloat16"}};
    int rc = OK, which = 0;
    while (types[which].type != e->o->dtype) which++;
    char *config_path = path_join(e->tmp, "config.json");
    char *generation = path_join(e->files->path, "generation_config.json"), *generation_copy = path_join(e->tmp, "generation_config.json");
    json_t *config = make_config(e, types[which].name);
    struct tensor_spec *spec = xcalloc((size_t)e->n, sizeof *spec);
    for (int i = 0; i < e->n; i++)
        spec[i] = (struct tensor_spec){.name = e->tensor[i].name, .dtype = types[which].dtype, .n_dims = e->tensor[i].n_dims,
                                       .shape = {e->tensor[i].shape[0], e->tensor[i].shape[1]}, .user = &e->tensor[i]};
    TRY(dir_make(e->tmp));
    TRY(json_write_file(config_path, config));
    TRY(safetensors_write_dir(e->tmp, spec, e->n, e->o->max_file_bytes, fill_tensor, NULL));
    TRY(copy_tokenizer_files(e->o->tokenizer_dir ? e->o->tokenizer_dir : e->files->path, e->tmp));
    if (path_exists(generation)) TRY(file_copy(generation, generation_copy));      /* the model's, not that of a tokenizer found elsewhere */
    TRY(write_generation_config(e->tmp, config));
    TRY(file_sync_dir(e->tmp));
out:
    free(config_path);
    free(generation);
    free(generation_copy);
    json_decref(config);
    free(spec);
    return rc;
}

/* ---- loading back ---- */

static double relative(const float *a, const float *b, int64_t n)
{
    double d = 0, r = 0;
    for (int64_t i = 0; i < n; i++) { d += ((double)a[i] - b[i]) * ((double)a[i] - b[i]); r += (double)b[i] * b[i]; }
    return d == 0 ? 0 : sqrt(d / r);
}

static int64_t top(const float *x, int64_t n)
{
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++) if (x[i] > x[best]) best = i;
    return best;
}

static int compare(struct export *e)
{
    int64_t V = e->files->config->vocab_size, count = e->positions * V, same = 0;
    double bound = e->o->gguf ? bound_gguf : bound_safetensors, error = relative(e->loaded, e->rounded, count), largest = 0;
    if (!(error <= bound))
        return fail(ERR_NUMERIC, "%s: loaded back, its logits differ from the model's by %.2e relative, more than %.0e: it is not kept; please report this", e->path, error, bound);
    for (int64_t i = 0; i < count; i++) largest = fmax(largest, fabs((double)e->loaded[i] - e->logits[i]));
    for (int64_t i = 0; i < e->positions; i++) same += top(e->loaded + i * V, V) == top(e->logits + i * V, V);
    printf("loaded back   %lld positions: logits agree with the rounded weights to %.1e (bound %.0e)\n", (long long)e->positions, error, bound);
    printf("against %-5s relative L2 %.2e, largest change of a logit %.2e, same first choice at %lld of %lld positions\n", "model", relative(e->loaded, e->logits, count), largest,
           (long long)same, (long long)e->positions);
    return OK;
}

static int load_back(struct export *e)
{
    struct loaded l = {0};
    struct gguf_file *gguf = NULL;
    struct model_files *files = NULL;
    struct model_config *config = NULL;
    int rc = OK;
    if (e->o->gguf) {
        TRY(gguf_open(&gguf, e->tmp));
        TRY(gguf_model_config(gguf, &config));
    } else TRY(model_files_open(&files, e->tmp));
    const struct model_config *c = config ? config : files->config;
    if (files) {                                                         /* GGUF's f32 numbers would differ in the last digits */
        char have[SHA256_HEX], want[SHA256_HEX];
        model_config_hash(c, have);
        model_config_hash(e->files->config, want);
        if (strcmp(have, want)) { rc = fail(ERR_NUMERIC, "%s: the config.json written does not describe the model; it is not kept; please report this", e->path); goto out; }
    }
    if (c->vocab_size != e->files->config->vocab_size) { rc = fail(ERR_NUMERIC, "%s: loaded back, its vocabulary is %lld", e->path, (long long)c->vocab_size); goto out; }
    TRY(loaded_open(e, &l, c));
    TRY(gguf ? gguf_model_load(gguf, l.model) : model_files_load(files, l.model));
    run_prompt(e, l.model, &e->loaded);
    rc = compare(e);
out:
    loaded_close(&l);
    gguf_close(gguf);
    model_files_close(files);
    model_config_free(config);
    return rc;
}

/* ---- names on disk ---- */

static char *parent_of(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? xstrndup(path, slash == path ? 1 : (size_t)(slash - path)) : xstrdup(".");
}

static int already_there(const char *path) { return fail(ERR_USAGE, "%s: exists and is not overwritten; remove it or set export.path to another name", path); }

/* Atomic, and never over something: not even over an empty directory, which a plain rename would replace. */
static int publish(const char *tmp, const char *path)
{
    struct stat st;
    char *parent = parent_of(path);
    int rc = OK;
    if (renameat2(AT_FDCWD, tmp, AT_FDCWD, path, RENAME_NOREPLACE)) {
        if (errno == EEXIST) rc = already_there(path);
        else if (errno != EINVAL && errno != ENOSYS) rc = fail_errno(ERR_IO, "%s: cannot rename to %s", tmp, path);
        else if (!lstat(path, &st)) rc = already_there(path);             /* a file system without the flag */
        else if (rename(tmp, path)) rc = fail_errno(ERR_IO, "%s: cannot rename to %s", tmp, path);
    }
    if (rc == OK) rc = file_sync_dir(parent);
    free(parent);
    return rc;
}

/* What the model is called in the file: its directory; of a checkpoint, its run's. */
static char *model_name(const char *path)
{
    char *real = realpath(path, NULL), *name = real ? strrchr(real, '/') : NULL, *up;
    if (name && !strncmp(name, "/step-", 6)) {
        *name = 0;
        if ((up = strrchr(real, '/')) && !strcmp(up, "/checkpoints")) {
            *up = 0;
            name = strrchr(real, '/');
        } else *name = '/';
    }
    char *copy = xstrdup(name && name[1] ? name + 1 : "model");
    free(real);
    return copy;
}

static int print_written(const struct export *e)
{
    int rc = OK, n = 0;
    char **names = NULL;
    int64_t bytes = e->o->gguf ? path_size(e->path) : 0;
    if (!e->o->gguf) TRY(dir_list(e->path, &names, &n));
    for (int i = 0; i < n; i++) {
        char *file = path_join(e->path, names[i]);
        bytes += path_size(file);
        free(file);
    }
    printf("written       %s: %d file%s, %.2f MiB, %.3f million parameters in %s\n", e->path, e->o->gguf ? 1 : n, n > 1 ? "s" : "", (double)bytes / 0x1p20,
           (double)e->parameters / 1e6, gguf_dtype_name(e->o->dtype));
out:
    names_free(names, n);
    return rc;
}

static void print_fallback(const struct export *e)
{
    int n = 0, first = -1;
    for (int i = 0; i < e->n; i++)
        if (e->tensor[i].n_dims == 2 && e->tensor[i].dtype != e->o->dtype) { if (!n++) first = i; }
    if (n) printf("note          %d tensors have rows that are no multiple of %d and stay in f16, the first is %s\n", n, GGUF_BLOCK, e->tensor[first].name);
}

int export_run(const struct export_options *o)
{
    struct export e = {.o = o};
    struct stat st;
    char *parent = NULL;
    int rc = OK;
    if (!o->path || !*o->path) { rc = fail(ERR_USAGE, "export.path is not set: name %s to write", o->gguf ? "a file" : "a directory"); goto out; }
    if (!o->gguf && o->dtype == GGUF_DTYPE_Q8_0) { rc = fail(ERR_USAGE, "export.dtype q8_0 exists in gguf only; set export.format gguf, or f32, f16 or bf16"); goto out; }
    size_t length = strlen(o->path);
    while (length > 1 && o->path[length - 1] == '/') length--;
    e.path = xstrndup(o->path, length);
    if (!lstat(e.path, &st)) { rc = already_there(e.path); goto out; }
    e.tmp = xasprintf("%s.tmp-%d", e.path, (int)getpid());
    e.name = model_name(o->model);
    parent = parent_of(e.path);

    TRY(model_files_open(&e.files, o->model));
    if (o->tokenizer_dir) TRY(tokenizer_open(&e.tokenizer, o->tokenizer_dir));
    if (o->gguf) TRY(export_gguf_check(e.files, e.tokenizer, o->tokenizer_dir));
    TRY(make_prompt(&e));
    TRY(dir_make(parent));
    TRY(file_remove_leftovers(e.path, false));
    TRY(backend_open(&e.be, &o->backend));
    printf("exporting     %s: %s to %s %s\n", o->model, architecture_name(e.files->config->arch), o->gguf ? "gguf" : "safetensors", gguf_dtype_name(o->dtype));
    TRY(run_source(&e));
    print_fallback(&e);
    TRY(o->gguf ? export_gguf_write(e.tmp, e.name, e.files, e.tokenizer, o->tokenizer_dir, e.tensor, e.n, o->dtype) : write_safetensors(&e));
    TRY(FAILPOINT("export.written"));
    TRY(load_back(&e));
    TRY(FAILPOINT("export.checked"));
    TRY(publish(e.tmp, e.path));
    TRY(print_written(&e));
out:
    if (e.tmp && rc != OK) {               /* the first message is the one to report */
        char *message = xstrdup(fail_message());
        if (dir_remove_tree(e.tmp) != OK) fail(rc, "%s", message);
        free(message);
    }
    batch_free(e.batch);
    backend_close(e.be);
    tokenizer_close(e.tokenizer);
    model_files_close(e.files);
    free(e.tensor);
    free(e.logits);
    free(e.rounded);
    free(e.loaded);
    free(e.path);
    free(e.tmp);
    free(e.name);
    free(parent);
    return rc;
}

/* tokenizer.path may name another tokenizer than the model's own: only one that means the same ids. */
static int check_tokenizer(const char *model, const char *dir)
{
    struct tokenizer *own = NULL, *named = NULL;
    char *a = path_join(model, "tokenizer.json"), *b = dir ? path_join(dir, "tokenizer.json") : NULL;
    int rc = OK;
    int32_t id;
    struct stat x, y;
    if (!b || stat(a, &x) || stat(b, &y) || (x.st_dev == y.st_dev && x.st_ino == y.st_ino)) goto out;
    TRY(tokenizer_open(&own, model));
    TRY(tokenizer_open(&named, dir));
    if (!tokenizer_same_vocab(own, named, &id))
        rc = fail(ERR_MISMATCH, "%s and %s have different vocabularies, the first difference is id %d; leave tokenizer.path empty to export the model's own", model, dir, id);
out:
    tokenizer_close(own);
    tokenizer_close(named);
    free(a);
    free(b);
    return rc;
}

int command_export(int argc, char **argv)
{
    static const struct { const char *name; enum gguf_dtype type; } types[] = {
        {"f32", GGUF_DTYPE_F32}, {"f16", GGUF_DTYPE_F16}, {"bf16", GGUF_DTYPE_BF16}, {"q8_0", GGUF_DTYPE_Q8_0}};
    struct config *c = NULL;
    char *model = NULL, *tokenizer_dir = NULL;
    int rc = OK, help;
    TRY(command_config(argc, argv, CMD_EXPORT,
                       "Writes a model for an inference engine, a Hugging Face directory (safetensors) or a GGUF file for llama.cpp, loads it back and compares logits before it appears under its name. "
                       "Takes checkpoints and any Hugging Face directory.",
                       "distill export config.yaml --set export.path=student.gguf --set export.format=gguf --set export.dtype=q8_0", NULL, NULL, NULL, &c, &help));
    if (help) goto out;
    TRY(checkpoint_or(c->export_model, c->run_dir, "export.model", &model));
    tokenizer_dir = find_tokenizer_dir(c, (const char *const[]){model, NULL});
    if (tokenizer_dir && strcmp(c->export_format, "gguf")) TRY(check_tokenizer_dir(tokenizer_dir));
    TRY(check_tokenizer(model, tokenizer_dir));
    struct export_options o = {.model = model, .tokenizer_dir = tokenizer_dir, .path = c->export_path, .gguf = !strcmp(c->export_format, "gguf"),
                               .max_file_bytes = (size_t)c->export_max_file_mib << 20, .memory_limit = (size_t)(c->memory_limit_gib * 0x1p30),
                               .backend = {.device = c->run_device, .precision = "fp32", .threads = (int)c->run_threads}};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) if (!strcmp(c->export_dtype, types[i].name)) o.dtype = types[i].type;
    rc = export_run(&o);
out:
    config_free(c);
    free(model);
    free(tokenizer_dir);
    return rc;
}
