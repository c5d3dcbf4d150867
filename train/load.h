/* A model directory as published: config.json, safetensors, tokenizer. What every command opens first. */
#ifndef TRAIN_LOAD_H
#define TRAIN_LOAD_H

#include "data/corpus.h"
#include "data/model_config.h"
#include "data/safetensors.h"
#include "data/tokenizer.h"
#include "train/config.h"
#include "train/model.h"

struct model_files {
    char *path;
    struct model_config *config;
    struct tensor_set *tensors;
};

/* Config, tensor headers and the scales of fp8 weights; nothing large is read yet. */
int  model_files_open(struct model_files **out, const char *path);
void model_files_close(struct model_files *f);            /* NULL-safe */
/* Into the model's weights, every tensor accounted for. */
int  model_files_load(const struct model_files *f, struct model *m);

/* ids that take part in a softmax: those the tokenizer defines and the head has; the whole head without a tokenizer. */
int64_t valid_vocab(const struct model_config *c, const struct tokenizer *t);

/* The corpus.* keys as corpus.h wants them; points into `c`. */
struct corpus_options corpus_options_of(const struct config *c);

/* Where the held-out rows' shards are: shards.heldout_path, else shards.path with -heldout added. malloc'd. */
char *heldout_shards_path(const struct config *c);

/* Files beside the weights that an inference engine reads: tokenizer.json, tokenizer_config.json, generation_config.json, ...;
 * those that `from` has are copied to `to`. */
int copy_tokenizer_files(const char *from, const char *to);
int check_tokenizer_dir(const char *dir);                /* ERR_USAGE: `dir` is a file, whose neighbours nothing is known of: asked before a run that ends in a copy */

#endif
