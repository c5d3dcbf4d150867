/* What the four parts of distill bench share: a shape opened on a device, the device's own rates, the limit they compose to, and how figures are printed.
 *
 * Every part takes the shape of a model from its config.json; weights are random and made on the device, tokens and targets are random, never zeros: a card that is
 * limited by power is fast on zeros. The rates of the device are measured in the same run, before and after, because machines throttle and are shared: the
 * share reached of what they compose to is what can be compared, the absolute figure stands beside it. */
#ifndef TRAIN_BENCH_H
#define TRAIN_BENCH_H

#include "train/config.h"
#include "train/load.h"
#include "train/memory.h"

/* Sustained on a GPU, the best call on a CPU. FLOP/s and bytes/s (read + written); attention counts the causal half of the square, backward 2.5 x the forward. */
struct rates { double product, fp8 /* 0: not asked for */, copy, attention_forward, attention_backward; };

struct bench {
    const struct config *c;
    const char *part, *shape;                 /* "train", ...; the config.json */
    struct model_config *config; int all_layers;   /* config->n_layers is bench.layers where that is set */
    struct backend *be;
    bool fp8;                                 /* the products of blocks are in fp8: their rate is measured too, and the limit is composed with it */
    int fp8_blocks;                           /* of so many blocks; the others stay native */
    double free_before;                       /* bytes of the device, before the plan was committed */
    struct rates rates;
    struct json_t *how;                       /* what a run was asked for: goes into every line of its figures; NULL: nothing */
};

/* What a token costs beside its layers: how it is run. */
struct pass { bool train; enum recompute recompute; int64_t step_tokens /* of one optimizer step */; int k; bool full /* logits are stored */; };

int  bench_train(const struct config *c, const char *shape);
int  bench_teacher(const struct config *c, const char *shape);
int  bench_kernels(const struct config *c, const char *shape, bool teacher, int n_words, char **words);
int  bench_io(const struct config *c, const char *shape, int n_words, char **words);

/* Backend and shape. */
int  bench_open(struct bench *b, const char *part, const struct config *c, const char *shape);
void bench_close(struct bench *b);
/* Before the memory of `plan` is taken, and after the last step: prints its table and beside it what the driver says is in use. */
void bench_memory_begin(struct bench *b);
void bench_memory_end(const struct bench *b, const struct memory_plan *plan);

/* Measures the device, attention at this shape with documents of corpus.row_length in passes of `positions`; keeps the larger of this and what was there. Needs
 * memory of its own for a moment: before the run's is taken or after it is given back. */
int  bench_rates(struct bench *b, int64_t positions);
/* Seconds of one call for at least `least` seconds: the mean on a GPU, where a burst is no rate; the best on a CPU, which is shared and noisy. */
double bench_seconds(struct backend *be, void (*call)(void *context), void *context, double least);

/* Of so many steps or passes: rate, FLOP/s, share of the product rate, the composed limit line by line with its formulas, and the share reached. */
void bench_report(const struct bench *b, const struct pass *p, double tokens, double seconds, int64_t steps);
/* Time by phase of `steps` steps that took `wall` seconds on a timed backend. */
void bench_phases(const struct bench *b, struct backend *timed, int steps, double wall);

/* One JSON line: part, shape, layers, device, what is in `how`, figure, value, unit. */
void bench_figure(const struct bench *b, const char *figure, double value, const char *unit);
/* The same with two more numbers; a key of NULL: none. */
void bench_figure_more(const struct bench *b, const char *figure, double value, const char *unit, const char *key2, double value2, const char *key3, double value3);
const char *bench_quantity(double value, const char *unit);   /* "13.2 GFLOP", into one of eight static buffers */

/* Positions of a teacher's pass: dump.batch_rows, or what fills a device where that is left open. */
int64_t bench_teacher_positions(const struct bench *b);
bool bench_on_cpu(const struct bench *b);
bool bench_wanted(const char *name, int n_words, char **words);  /* no words, or one that `name` contains */

/* Normals of the device's type in `bytes` of its memory; a million different ones, which come round again: making them is slow on a CPU. */
void bench_normals(struct backend *be, void *to, size_t bytes, float mean, float std, uint64_t seed);
/* Rows of one document each, random tokens below V, and a teacher's k distinct ids: with `samples` they have weights, which sum to 1, and else a tail. `stream`: another batch. */
struct batch *bench_batch(int64_t rows, int64_t length, int64_t V, int k, bool samples, uint64_t stream);
/* A fresh directory under run.dir, and its end; run.dir goes too where it was not there before. */
int  bench_dir_make(const struct config *c, char **dir, bool *made_run_dir);
void bench_dir_remove(const struct config *c, char *dir, bool made_run_dir);

#endif
