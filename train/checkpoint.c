/* See checkpoint.h. */
#include "train/checkpoint.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/failpoint.h"
#include "base/file.h"
#include "base/json.h"
#include "train/load.h"

static const char PREFIX[] = "step-", TEMPORARY[] = ".tmp-step-";

/* ---- writing ---- */

/* A flat array on the device, and what its tensors are called: prefix and the weight's name. */
struct flat { const char *prefix; char *base; enum dtype dtype; };
enum { MOST_ARRAYS = 3 };

/* What optimizer.safetensors holds, with and without a master. */
static int optimizer_arrays(const struct optimizer *o, struct flat array[MOST_ARRAYS])
{
    enum dtype moment = o->model->be->moment_dtype;
    array[0] = (struct flat){"exp_avg.", (char *)o->m, moment};
    array[1] = (struct flat){"exp_avg_sq.", (char *)o->v, moment};
    array[2] = (struct flat){"master.", (char *)o->master, DTYPE_F32};
    return o->master ? 3 : 2;
}

struct dump { const struct model *m; const struct flat *array; int n; };

struct spec_list { struct tensor_spec *spec; int n, room; const struct flat *array; };

static int add_spec(void *context, const char *name, int n_dims, const int64_t *shape, int64_t offset)
{
    struct spec_list *l = context;
    if (l->n == l->room) l->spec = xrealloc(l->spec, (size_t)(l->room = l->room ? 2 * l->room : 64) * sizeof *l->spec);
    struct tensor_spec *s = &l->spec[l->n++];
    *s = (struct tensor_spec){.name = xasprintf("%s%s", l->array->prefix, name), .dtype = l->array->dtype, .n_dims = n_dims, .user = (void *)(intptr_t)offset};
    memcpy(s->shape, shape, (size_t)n_dims * sizeof *shape);
    return OK;
}

static void free_specs(struct spec_list *l)
{
    for (int i = 0; i < l->n; i++) free((char *)l->spec[i].name);
    free(l->spec);
}

static int fill_from_device(void *context, const struct tensor_spec *spec, size_t offset, size_t bytes, void *out)
{
    const struct dump *d = context;
    const struct flat *array = d->array;
    while (strncmp(spec->name, array->prefix, strlen(array->prefix))) array++;
    d->m->be->ops->download(d->m->be, out, array->base + (size_t)(intptr_t)spec->user * dtype_width(array->dtype) + offset, bytes);
    return OK;
}

static void list_specs(struct spec_list *l, const struct dump *d)
{
    for (int i = 0; i < d->n; i++) {
        l->array = &d->array[i];
        params_each(d->m->params, add_spec, l);
    }
}

/* In the type the model computes with, beside a master too: it is the model that the run's losses and held-out figures are of, and what the next step starts from. */
static int write_weights(const char *dir, const struct model *m)
{
    struct flat weights = {"", (char *)m->weights, m->be->act_dtype};
    struct dump d = {m, &weights, 1};
    struct spec_list list = {0};
    list_specs(&list, &d);
    int rc = safetensors_write_dir(dir, list.spec, list.n, 0, fill_from_device, &d);
    free_specs(&list);
    return rc;
}

static int write_optimizer(const char *dir, const struct optimizer *o)
{
    struct flat array[MOST_ARRAYS];
    struct dump d = {o->model, array, optimizer_arrays(o, array)};
    struct spec_list list = {0};
    char *path = path_join(dir, "optimizer.safetensors");
    list_specs(&list, &d);
    int rc = safetensors_write(path, list.spec, list.n, NULL, fill_from_device, &d);
    free_specs(&list);
    free(path);
    return rc;
}

static int write_json(const char *dir, const char *name, json_t *value)
{
    char *path = path_join(dir, name);
    int rc = json_write_file(path, value);
    free(path);
    json_decref(value);
    return rc;
}

static int write_file_list(const char *dir)
{
    int rc = OK, n = 0;
    char **names = NULL;
    json_t *files = json_object();
    TRY(dir_list(dir, &names, &n));
    for (int i = 0; i < n; i++) {
        char hex[SHA256_HEX], *path = path_join(dir, names[i]);
        rc = sha256_of_file(path, hex);
        free(path);
        if (rc != OK) goto out;
        json_object_set_new(files, names[i], json_string(hex));
    }
    rc = write_json(dir, "files.json", files);
    files = NULL;
out:
    json_decref(files);
    names_free(names, n);
    return rc;
}

static json_t *state_to_json(const struct train_state *s, const char *device)
{
    json_t *state = json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:s, s:s}", "step", (json_int_t)s->step, "epoch", (json_int_t)s->loader.epoch, "cursor", (json_int_t)s->loader.cursor,
                              "tokens", (json_int_t)s->tokens, "targets", (json_int_t)s->targets, "seed", (json_int_t)s->seed, "data_id", s->data_id, "device", device);
    if (s->left_out.n) {
        json_t *list = json_array();
        for (int64_t i = 0; i < s->left_out.n; i++) json_array_append_new(list, json_integer(s->left_out.shard[i]));
        json_object_set_new(state, "left_out", list);
    }
    if (s->spike.n || s->spike.skipped) json_object_set_new(state, "spike", spike_to_json(&s->spike));
    return state;
}

static int left_out_from_json(struct shard_list *l, const json_t *list, const char *where)
{
    size_t n = json_array_size(list);
    *l = (struct shard_list){0};
    if (list && !json_is_array(list)) return fail(ERR_INPUT, "%s: left_out is not a list of shards", where);
    if (n) l->shard = xmalloc(n * sizeof *l->shard);
    for (; (size_t)l->n < n; l->n++) {
        const json_t *shard = json_array_get(list, (size_t)l->n);
        l->shard[l->n] = json_is_integer(shard) ? json_integer_value(shard) : -1;
        if (l->shard[l->n] < 0 || (l->n && l->shard[l->n] <= l->shard[l->n - 1])) return fail(ERR_INPUT, "%s: left_out is not a list of shards in ascending order", where);
    }
    return OK;
}

static int write_all(const char *dir, const struct model *m, const struct optimizer *o, const struct train_state *s, const struct config *config, const char *tokenizer_dir)
{
    static const char *const type_name[DTYPE_COUNT] = {[DTYPE_F32] = "float32", [DTYPE_BF16] = "bfloat16", [DTYPE_F16] = "float16"};
    int rc = OK;
    char *yaml = path_join(dir, "run.yaml");
    TRY(dir_make(dir));
    TRY(write_json(dir, "config.json", model_config_to_json(m->c, type_name[m->be->act_dtype])));
    if (tokenizer_dir) TRY(copy_tokenizer_files(tokenizer_dir, dir));
    TRY(write_weights(dir, m));
    TRY(write_optimizer(dir, o));
    TRY(config_write(config, yaml));
    TRY(write_json(dir, "state.json", state_to_json(s, m->be->name)));
    TRY(write_file_list(dir));
    TRY(file_sync_dir(dir));
out:
    free(yaml);
    return rc;
}

/* ---- the directory of checkpoints ---- */

static char *checkpoints_dir(const char *run_dir) { return path_join(run_dir, "checkpoints"); }

/* step-00000012 -> 12; -1: not a checkpoint's name. Steps are padded to 8 digits, larger ones have more. */
static int64_t step_of(const char *name)
{
    const char *digits = name + sizeof PREFIX - 1;
    size_t n;
    if (strncmp(name, PREFIX, sizeof PREFIX - 1) || (n = strspn(digits, "0123456789")) < 8 || n > 18 || digits[n]) return -1;
    return strtoll(digits, NULL, 10);
}

static int newest_first(const void *a, const void *b)
{
    const char *x = *(char *const *)a, *y = *(char *const *)b;
    int64_t s = step_of(x), t = step_of(y);
    return s != t ? (s < t) - (s > t) : strcmp(x, y);
}

static int list_newest_first(const char *dir, char ***names, int *n)
{
    int rc = dir_list(dir, names, n);
    if (rc == OK && *n) qsort(*names, (size_t)*n, sizeof **names, newest_first);
    return rc;
}

/* Removes what dead writers left and, of the checkpoints up to `step`, all but the newest `keep`. One beyond `step` was passed over as
 * broken by the load this run began with: it must not count, or it would push out the one just written. */
static int prune(const char *dir, int64_t step, int64_t keep)
{
    int rc = OK, n = 0;
    int64_t kept = 0;
    char **names = NULL;
    TRY(list_newest_first(dir, &names, &n));
    for (int i = 0; i < n; i++) {
        int64_t s = step_of(names[i]);
        bool temporary = !strncmp(names[i], TEMPORARY, sizeof TEMPORARY - 1), old = s >= 0 && s <= step && ++kept > keep;
        if (!temporary && !old) continue;
        char *path = path_join(dir, names[i]);
        rc = dir_remove_tree(path);
        free(path);
        if (rc != OK) break;
    }
out:
    names_free(names, n);
    return rc;
}

int checkpoint_save(const char *run_dir, const struct model *m, const struct optimizer *o, const struct train_state *s, const struct config *config,
                    const char *tokenizer_dir, int64_t keep)
{
    int rc = OK;
    char *dir = checkpoints_dir(run_dir), *temporary = xasprintf("%s/%s%08lld", dir, TEMPORARY, (long long)s->step);
    char *final = xasprintf("%s/%s%08lld", dir, PREFIX, (long long)s->step);
    TRY(dir_make(dir));
    TRY(dir_remove_tree(temporary));
    TRY(write_all(temporary, m, o, s, config, tokenizer_dir));
    TRY(FAILPOINT("checkpoint.before_rename"));
    TRY(dir_remove_tree(final));                     /* a broken one of the same step, which the load has passed over */
    if (rename(temporary, final)) { rc = fail_errno(ERR_IO, "%s: cannot rename to %s", temporary, final); goto out; }
    TRY(FAILPOINT("checkpoint.after_rename"));
    TRY(file_sync_dir(dir));
    TRY(prune(dir, s->step, keep));
out:
    if (rc != OK) {
        char *why = xstrdup(fail_message());
        dir_remove_tree(temporary);                  /* on a full disk it would hold the room that is wanted */
        fail(rc, "checkpoint of step %lld: %s", (long long)s->step, why);
        free(why);
    }
    free(dir);
    free(temporary);
    free(final);
    return rc;
}

static int verify(const char *dir)
{
    int rc = OK;
    char *list = path_join(dir, "files.json");
    json_t *files = NULL, *value;
    const char *name;
    TRY(json_read_file(list, 1 << 20, &files));
    if (!json_is_object(files) || !json_object_get(files, "model.safetensors")) { rc = fail(ERR_INPUT, "%s: is not a list of files", list); goto out; }
    json_object_foreach(files, name, value) {
        char hex[SHA256_HEX], *path = path_join(dir, name);
        rc = strchr(name, '/') || !json_is_string(value) ? fail(ERR_INPUT, "%s: entry %s is not a file name with a hash", list, name) : sha256_of_file(path, hex);
        if (rc == OK && strcmp(hex, json_string_value(value))) rc = fail(ERR_INPUT, "%s: SHA-256 differs from files.json", path);
        free(path);
        if (rc != OK) goto out;
    }
out:
    json_decref(files);
    free(list);
    return rc;
}

int checkpoint_find(const char *run_dir, char **path)
{
    int rc = OK, n = 0;
    char *dir = checkpoints_dir(run_dir), **names = NULL;
    *path = NULL;
    int broken = 0;
    if (!path_is_dir(dir)) goto out;
    TRY(list_newest_first(dir, &names, &n));
    for (int i = 0; i < n && !*path; i++) {
        if (step_of(names[i]) < 0) continue;
        char *candidate = path_join(dir, names[i]);
        if (verify(candidate) == OK) *path = candidate;
        else {
            warn("checkpoint %s is broken (%s); falling back to the one before it", candidate, fail_message());
            free(candidate);
            broken++;
        }
    }
    if (!*path && broken) rc = fail(ERR_INPUT, "%s: none of its %d checkpoints is intact; remove the directory to train from the beginning, or choose another run.dir", dir, broken);
out:
    names_free(names, n);
    free(dir);
    return rc;
}

int checkpoint_or(const char *given, const char *run_dir, const char *key, char **path)
{
    if (given && *given) { *path = xstrdup(given); return OK; }
    int rc = checkpoint_find(run_dir, path);
    if (rc == OK && !*path) rc = fail(ERR_USAGE, "%s is not set and %s has no checkpoint; name a model directory or train first", key, run_dir);
    return rc;
}

/* ---- reading ---- */

struct optimizer_load { const struct tensor_set *set; struct backend *be; const struct flat *array; int n; const char *path; };

static int load_tensor(void *context, const char *name, int n_dims, const int64_t *shape, int64_t offset)
{
    struct optimizer_load *l = context;
    for (const struct flat *array = l->array; array < l->array + l->n; array++) {
        char key[160];
        snprintf(key, sizeof key, "%s%s", array->prefix, name);
        const struct tensor_view *v = tensor_set_find(l->set, key);
        int64_t count = shape[0] * (n_dims == 2 ? shape[1] : 1);
        if (!v || v->count != count || v->dtype != array->dtype)
            return fail(ERR_MISMATCH, "%s: %s does not fit this run's optimizer; resume with the model and device the checkpoint was made with", l->path, key);
        l->be->ops->upload(l->be, array->base + (size_t)offset * dtype_width(array->dtype), v->data, v->bytes);
    }
    return OK;
}

/* NULL: fp32 weights without a master, as the CPU has them, which no recipe changes */
static const char *recipe_of(bool master, enum dtype moment) { return master ? "exact" : moment == DTYPE_F32 ? NULL : "compact"; }

/* Another recipe's state is refused as what it is, before its first tensor is found not to fit. */
static int check_recipe(const struct tensor_set *set, const struct optimizer *o, const char *path)
{
    char first[160], master[160];
    snprintf(first, sizeof first, "exp_avg.%s", o->model->params->embed->part[0].name);
    snprintf(master, sizeof master, "master.%s", o->model->params->embed->part[0].name);
    const struct tensor_view *m = tensor_set_find(set, first);
    bool has_master = tensor_set_find(set, master) != NULL;
    const char *was = recipe_of(has_master, m ? m->dtype : DTYPE_F32), *is = recipe_of(o->master, o->model->be->moment_dtype);
    if (was && is && strcmp(was, is))
        return fail(ERR_MISMATCH, "%s: was written by a run with train.recipe %s, this run's is %s: resume with train.recipe %s, or start another run.dir", path, was, is, was);
    if (has_master && !o->master)
        return fail(ERR_MISMATCH, "%s: holds master weights (%s), which this run's device does not keep; resume with the device the checkpoint was made with", path, master);
    return OK;
}

int checkpoint_load(const char *path, struct model *m, struct optimizer *o, struct train_state *s)
{
    int rc = OK;
    char *state_path = path_join(path, "state.json"), *optimizer = path_join(path, "optimizer.safetensors");
    struct model_files *files = NULL;
    struct tensor_set *set = NULL;
    json_t *state = NULL;
    const char *data_id;
    TRY(model_files_open(&files, path));
    char have[SHA256_HEX], want[SHA256_HEX];
    model_config_hash(files->config, have);
    model_config_hash(m->c, want);
    if (strcmp(have, want)) { rc = fail(ERR_MISMATCH, "%s: config.json differs from this run's student; resume with the configuration the run was started with", path); goto out; }
    TRY(model_files_load(files, m));
    TRY(tensor_set_open(&set, optimizer));
    TRY(check_recipe(set, o, optimizer));
    struct flat array[MOST_ARRAYS];
    struct optimizer_load load = {set, m->be, array, optimizer_arrays(o, array), optimizer};
    TRY(params_each(m->params, load_tensor, &load));
    o->master_filled = true;
    m->be->ops->sync(m->be);
    TRY(json_read_file(state_path, 1 << 25, &state));
    TRY(json_get_int(state, "step", state_path, -1, &s->step));
    TRY(json_get_int(state, "epoch", state_path, -1, &s->loader.epoch));
    TRY(json_get_int(state, "cursor", state_path, -1, &s->loader.cursor));
    TRY(json_get_int(state, "tokens", state_path, 0, &s->tokens));
    TRY(json_get_int(state, "targets", state_path, 0, &s->targets));
    TRY(json_get_int(state, "seed", state_path, -1, &s->seed));
    TRY(json_get_string(state, "data_id", state_path, "", &data_id));
    if (s->step < 0 || s->loader.epoch < 0 || s->loader.cursor < 0 || s->seed < 0 || strlen(data_id) >= sizeof s->data_id) { rc = fail(ERR_INPUT, "%s: step, epoch, cursor, seed or data_id is missing or makes no sense", state_path); goto out; }
    strcpy(s->data_id, data_id);
    TRY(left_out_from_json(&s->left_out, json_object_get(state, "left_out"), state_path));
    TRY(spike_from_json(&s->spike, json_object_get(state, "spike"), state_path));
out:
    model_files_close(files);
    tensor_set_close(set);
    json_decref(state);
    free(state_path);
    free(optimizer);
    return rc;
}
