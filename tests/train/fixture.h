/* A tiny random model, ready to run, on the CPU unless a test asks for another device: what the tests of train/ start from. */
#ifndef TESTS_TRAIN_FIXTURE_H
#define TESTS_TRAIN_FIXTURE_H

#include "train/model.h"
#include "train/objective.h"
#include "train/optimizer.h"

struct fixture {
    struct backend *be;
    struct memory_plan *plan;
    struct model_config *config;
    struct model *model;
    struct objective *objective;
    struct optimizer *optimizer;
};

struct fixture_options {
    const char *architecture;        /* "qwen2", "llama", "mistral", "qwen3" */
    const char *more;                /* further members of config.json, or NULL */
    bool tie;
    int64_t rows, length, head_rows; /* N = rows * length; head_rows 0: all at once */
    enum recompute recompute;
    enum target_kind kind; int k;
    struct distill_args loss;
    uint64_t seed;
    bool fp8; int native_first, native_last;
    bool exact_rows;                 /* as a teacher in a dump computes: the same bits in any batch */
    const char *device, *precision, *recipe;   /* as in backend_options, with deterministic; device NULL: cpu */
    bool deterministic;
    bool master;                     /* master weights whether or not the device asks for them */
};

enum { FIXTURE_VOCAB = 61 };         /* not a multiple of anything */

/* C 24, F 40, 3 layers, 4/2 heads of 6, untied; `more` is a JSON object that changes or adds keys, or NULL. */
struct model_config *fixture_config(const char *architecture, const char *more);
void fixture_open(struct fixture *f, const struct fixture_options *o);
void fixture_close(struct fixture *f);
/* Rows of random tokens with documents of the given lengths (0-terminated, must fill a row); top-k targets of a random teacher when k > 0. */
struct batch *fixture_batch(int64_t rows, int64_t length, const int *documents, int k, uint64_t seed);
/* Rows [first, first + rows) of a batch whose rows all hold the same documents, as a batch of their own. */
struct batch *fixture_rows(const struct batch *all, int64_t first, int64_t rows, const int *documents);
/* Zero gradients, forward, objective, backward; returns the loss sums divided by `targets`, gradients downloaded into grads (malloc'd, total floats). */
float *fixture_gradients(struct fixture *f, const struct batch *b, double targets, double *kd, double *ce);

#endif
