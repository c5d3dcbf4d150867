/* See load.h. */
#include "train/load.h"

#include "base/error.h"
#include "base/file.h"

int model_files_open(struct model_files **out, const char *path)
{
    int rc = OK;
    struct model_files *f = xcalloc(1, sizeof *f);
    f->path = xstrdup(path);
    if (!path_exists(path)) { rc = fail(ERR_IO, "%s: no such model directory", path); goto out; }
    TRY(model_config_read(&f->config, path));
    TRY(tensor_set_open(&f->tensors, path));
    *out = f;
    f = NULL;
out:
    model_files_close(f);
    return rc;
}

void model_files_close(struct model_files *f)
{
    if (!f) return;
    tensor_set_close(f->tensors);
    model_config_free(f->config);
    free(f->path);
    free(f);
}

int model_files_load(const struct model_files *f, struct model *m) { return params_load(m->params, m->be, m->weights, f->tensors, f->path, NULL); }

int64_t valid_vocab(const struct model_config *c, const struct tokenizer *t)
{
    int64_t defined = t ? tokenizer_vocab_size(t) : c->vocab_size;
    return defined < c->vocab_size ? defined : c->vocab_size;
}

int copy_tokenizer_files(const char *from, const char *to)
{
    static const char *const names[] = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
                                        "chat_template.jinja", "generation_config.json"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char *source = path_join(from, names[i]), *target = path_join(to, names[i]);
        int rc = path_exists(source) ? file_copy(source, target) : OK;
        free(source);
        free(target);
        if (rc != OK) return rc;
    }
    return OK;
}
