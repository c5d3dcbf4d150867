/* See load.h. */
#include "train/load.h"

#include <string.h>

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
    TRY(tensor_set_bind_scales(f->tensors, &f->config->quantization, path));
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

int model_files_load(const struct model_files *f, struct model *m) { return model_load_weights(m, f->tensors, f->path, NULL); }

int64_t valid_vocab(const struct model_config *c, const struct tokenizer *t)
{
    int64_t defined = t ? tokenizer_vocab_size(t) : c->vocab_size;
    return defined < c->vocab_size ? defined : c->vocab_size;
}

struct corpus_options corpus_options_of(const struct config *c)
{
    static const struct { const char *name; enum corpus_format value; } formats[] = {{"auto", CORPUS_AUTO}, {"text", CORPUS_TEXT}, {"jsonl", CORPUS_JSONL}, {"ids", CORPUS_IDS}};
    static const struct { const char *name; enum corpus_document value; } documents[] = {{"file", DOCUMENT_FILE}, {"line", DOCUMENT_LINE}, {"paragraph", DOCUMENT_PARAGRAPH}};
    struct corpus_options o = {.files = (const char *const *)c->corpus_files.item, .n_files = c->corpus_files.n, .text_field = c->corpus_text_field, .ids_field = c->corpus_ids_field,
                               .mask_field = c->corpus_mask_field, .row_length = c->corpus_row_length, .append_eos = c->corpus_append_eos, .prepend_bos = c->corpus_prepend_bos,
                               .heldout_fraction = c->corpus_heldout_fraction, .shuffle_seed = (uint64_t)c->run_seed, .shuffle = c->corpus_shuffle, .max_rows = c->corpus_max_rows,
                               .max_document_tokens = c->corpus_max_document_tokens};
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++) if (!strcmp(c->corpus_format, formats[i].name)) o.format = formats[i].value;
    for (size_t i = 0; i < sizeof documents / sizeof *documents; i++) if (!strcmp(c->corpus_document, documents[i].name)) o.document = documents[i].value;
    return o;
}

char *heldout_shards_path(const struct config *c)
{
    if (*c->shards_heldout_path) return xstrdup(c->shards_heldout_path);
    size_t n = strlen(c->shards_path);
    while (n > 1 && c->shards_path[n - 1] == '/') n--;          /* "logits/" means the same as "logits" */
    return xasprintf("%.*s-heldout", (int)n, c->shards_path);
}

int check_tokenizer_dir(const char *dir)
{
    if (path_is_dir(dir) || !path_exists(dir)) return OK;
    return fail(ERR_USAGE, "%s: a model is written with its tokenizer, so tokenizer.path has to be a directory or a file named tokenizer.json", dir);
}

int copy_tokenizer_files(const char *from, const char *to)
{
    static const char *const names[] = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
                                        "chat_template.jinja", "generation_config.json"};
    int named = check_tokenizer_dir(from);
    if (named != OK) return named;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char *source = path_join(from, names[i]), *target = path_join(to, names[i]);
        int rc = path_exists(source) ? file_copy(source, target) : OK;
        free(source);
        free(target);
        if (rc != OK) return rc;
    }
    return OK;
}
