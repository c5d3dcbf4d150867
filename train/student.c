/* See student.h. */
#include "train/student.h"

#include <string.h>

#include "base/error.h"
#include "base/file.h"

char *find_tokenizer_dir(const struct config *c, const char *const *candidates)
{
    if (*c->tokenizer_path) {
        /* tokenizer.path may be the file itself */
        const char *path = c->tokenizer_path, *slash = strrchr(path, '/');
        if (path_is_dir(path) || strcmp(slash ? slash + 1 : path, "tokenizer.json")) return xstrdup(path);
        return !slash ? xstrdup(".") : slash == path ? xstrdup("/") : xstrndup(path, (size_t)(slash - path));
    }
    for (; *candidates; candidates++) {
        char *file = path_join(*candidates, "tokenizer.json");
        bool found = **candidates && path_exists(file);
        free(file);
        if (found) return xstrdup(*candidates);
    }
    return NULL;
}

static int missing(const char *init, const char *key)
{
    return fail(ERR_USAGE, "student.init is %s, so %s must say where to read from", init, key);
}

/* Layers 0, n, 2n, ... of the teacher, which is opened as `files`. */
static int keep_layers(struct student *s, const char *path, int every)
{
    int rc = model_config_read(&s->config, path);
    if (rc != OK) return rc;
    struct model_config *k = s->config;
    if (every > k->n_layers) return fail(ERR_USAGE, "student.keep_every is %d, but the teacher has %d layers", every, k->n_layers);
    k->n_layers = (k->n_layers + every - 1) / every;
    s->layer_of = xmalloc((size_t)k->n_layers * sizeof *s->layer_of);
    for (int l = 0; l < k->n_layers; l++) {
        s->layer_of[l] = l * every;
        if (k->layer_slides) k->layer_slides[l] = k->layer_slides[l * every];
    }
    return OK;
}

int student_open(struct student **out, const struct config *c)
{
    int rc = OK;
    struct student *s = xcalloc(1, sizeof *s);
    const char *init = c->student_init;
    if (!strcmp(init, "scratch")) {
        if (!*c->student_config) { rc = missing(init, "student.config"); goto out; }
        TRY(model_config_read(&s->config, c->student_config));
    } else if (!strcmp(init, "teacher")) {
        if (!*c->teacher_path) { rc = missing(init, "teacher.path"); goto out; }
        TRY(model_files_open(&s->files, c->teacher_path));
        TRY(keep_layers(s, c->teacher_path, (int)c->student_keep_every));
    } else {
        if (!*c->student_path) { rc = missing(init, "student.path"); goto out; }
        TRY(model_files_open(&s->files, c->student_path));
        TRY(model_config_read(&s->config, c->student_path));
    }
    s->tokenizer_dir = find_tokenizer_dir(c, (const char *const[]){c->student_path, c->teacher_path, NULL});
    *out = s;
    s = NULL;
out:
    student_close(s);
    return rc;
}

void student_close(struct student *s)
{
    if (!s) return;
    model_config_free(s->config);
    model_files_close(s->files);
    free(s->layer_of);
    free(s->tokenizer_dir);
    free(s);
}

int student_weights(const struct student *s, struct model *m, uint64_t seed)
{
    if (s->files) return model_load_weights(m, s->files->tensors, s->files->path, s->layer_of);
    model_random_weights(m, seed);
    return OK;
}

int student_master(const struct student *s, struct optimizer *o)
{
    if (s->files) return optimizer_load_master(o, s->files->tensors, s->files->path, s->layer_of);
    optimizer_master_from_weights(o);
    return OK;
}

void student_describe(const struct student *s, const struct config *c, int64_t parameters)
{
    const struct model_config *k = s->config;
    printf("student   %s, %.2fM parameters: %d layers, width %lld, ffn %lld, %d/%d heads of %d, vocabulary %lld; ", architecture_name(k->arch), (double)parameters / 1e6,
           k->n_layers, (long long)k->hidden_size, (long long)k->intermediate_size, k->n_heads, k->n_kv_heads, k->head_dim, (long long)k->vocab_size);
    if (s->layer_of) printf("every %lld. layer of %s\n", (long long)c->student_keep_every, c->teacher_path);
    else if (s->files) printf("from %s\n", s->files->path);
    else printf("random weights, seed %lld\n", (long long)c->run_seed);
}
