/* Shared by export.c (the command, safetensors directories, the load-back check) and export_gguf.c (names and metadata of GGUF). */
#ifndef TRAIN_EXPORT_H
#define TRAIN_EXPORT_H

#include "data/gguf.h"
#include "train/load.h"

struct export {
    const struct config *c;
    struct model_files *source;
    struct tokenizer *tokenizer;          /* NULL: none */
    char *tokenizer_dir;
    struct model *model;                  /* fp32, holds the source, then what was written */
    enum gguf_dtype dtype;                /* of matrices */
    bool gguf;
};

/* The element type a Hugging Face tensor gets: GGUF keeps vectors in f32, and a matrix whose rows q8_0 cannot cut into blocks of 32 in f16. */
enum gguf_dtype export_dtype(const struct export *x, int n_dims, int64_t columns);

/* ERR_USAGE when llama.cpp would compute or tokenize something else than this model does, by name. */
int export_gguf_check(const struct export *x);
int export_gguf_write(const struct export *x, const char *path);
/* The file's tensors into x->model, names and row order undone. */
int export_gguf_load(const struct export *x, const char *path);

#endif
