/* Checkpoints: run.dir/checkpoints/step-NNNNNNNN, a model directory that every other tool loads as it is, and beside the weights
 *
 *     optimizer.safetensors    exp_avg.<name>, exp_avg_sq.<name>, in the moments' own type; master.<name>, F32, where the optimizer has a master
 *     state.json               step, loader position, seed, tokens seen, dataset id, device type; where there are any: the shards that are left out, and the
 *                              losses and norms that spikes are told by
 *     run.yaml                 the resolved configuration
 *     files.json               SHA-256 of every other file
 *
 * Written under a temporary name, synced, renamed: a name that exists is complete. Hashes are verified before anything is used; a broken
 * checkpoint falls back to the one before it and says so. */
#ifndef TRAIN_CHECKPOINT_H
#define TRAIN_CHECKPOINT_H

#include "base/hash.h"
#include "data/loader.h"
#include "train/config.h"
#include "train/optimizer.h"
#include "train/spike.h"

struct shard_list { int64_t *shard, n; };

struct train_state {
    int64_t step;                        /* optimizer steps done */
    struct loader_state loader;
    int64_t tokens, targets;             /* seen so far */
    char data_id[SHA256_HEX];            /* dataset id or corpus hash */
    int64_t seed;                        /* run.seed: with the loader's position it says which rows come next */
    struct shard_list left_out;          /* and so do the shards the run does without; checkpoint_load makes it, the owner frees it */
    struct spike_state spike;
};

/* `tokenizer_dir` NULL: none to copy. Keeps the newest `keep` (>= 1) checkpoints afterwards, itself
 * among them; leftovers of dead writers are removed. */
int checkpoint_save(const char *run_dir, const struct model *m, const struct optimizer *o, const struct train_state *s, const struct config *config,
                    const char *tokenizer_dir, int64_t keep);
/* Newest checkpoint whose files verify; *path malloc'd, NULL when there is none. ERR_INPUT: there are some and every one is broken. */
int checkpoint_find(const char *run_dir, char **path);
/* Weights, moments, master and state. ERR_MISMATCH when it belongs to another architecture or another train.recipe. */
int checkpoint_load(const char *path, struct model *m, struct optimizer *o, struct train_state *s);
/* What eval, generate and export take: `given` if not empty, else the run's newest checkpoint. malloc'd. ERR_USAGE when there is neither. */
int checkpoint_or(const char *given, const char *run_dir, const char *key, char **path);

#endif
