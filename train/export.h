/* Export: a model directory or checkpoint -> a safetensors directory or a GGUF file, proved by loading it back.
 *
 * export.c owns the command, the numbers (what is refused, rounding, the comparison) and safetensors; export_gguf.c owns what
 * llama.cpp calls a model's parts, in both directions. */
#ifndef TRAIN_EXPORT_H
#define TRAIN_EXPORT_H

#include "data/gguf.h"
#include "train/load.h"

struct export_options {
    const char *model;               /* directory with config.json and weights */
    const char *tokenizer_dir;       /* directory with tokenizer.json; NULL: none */
    const char *path;                /* must not exist */
    bool gguf;                       /* else safetensors */
    enum gguf_dtype dtype;           /* q8_0 in GGUF only */
    size_t max_file_bytes;           /* of a safetensors file; 0: one file */
    size_t memory_limit;             /* bytes; 0: what the device has */
    struct backend_options backend;
};

/* Writes under a temporary name beside `path`, loads that back, compares logits, renames, prints what it did. ERR_USAGE: `path` exists.
 * ERR_NUMERIC: NaN, Inf or overflow in a tensor, by name, or logits that differ; nothing is left then. */
int export_run(const struct export_options *o);

/* One tensor of the model, in the order of the parameter table, and the type it is exported in. */
struct export_tensor {
    char name[96];                   /* Hugging Face's */
    int n_dims;
    int64_t shape[2], count, offset; /* offset in the flat weights */
    enum gguf_dtype dtype;
    const struct tensor_view *source;
};

/* ---- export_gguf.c ---- */

/* ERR_USAGE when llama.cpp cannot express the model or its tokenizer, by name and with the remedy; prints what it will do differently. */
int export_gguf_check(const struct model_files *files, const struct tokenizer *tokenizer, const char *tokenizer_dir);
/* `name` goes into general.name; `t` lists all tensors. */
int export_gguf_write(const char *path, const char *name, const struct model_files *files, const struct tokenizer *tokenizer, const char *tokenizer_dir,
                      const struct export_tensor *t, int n, enum gguf_dtype dtype);
/* The model's configuration as the metadata says it. ERR_INPUT by key. */
int gguf_model_config(const struct gguf_file *f, struct model_config **out);
/* Weights (dequantised, rows of q and k back in Hugging Face's order) and rotary factors; after model_ready(). Every tensor accounted for. */
int gguf_model_load(const struct gguf_file *f, struct model *m);

#endif
