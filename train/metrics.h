/* What a run writes down: run.dir/metrics.jsonl (one object a step, "step" first) and a TensorBoard event file with the same tags. */
#ifndef TRAIN_METRICS_H
#define TRAIN_METRICS_H

#include <stdint.h>

struct metric { const char *tag; double value; };      /* "train/loss" */
struct metrics;

/* Appends. Lines of metrics.jsonl with a step beyond `step` (of a run that was killed after its checkpoint) are dropped first. */
int  metrics_open(struct metrics **out, const char *run_dir, int64_t step);
/* One line and one event per value; values that are not finite are written as null and left out of TensorBoard. */
int  metrics_write(struct metrics *m, int64_t step, const struct metric *values, int n);
void metrics_close(struct metrics *m);                 /* NULL-safe */

#endif
