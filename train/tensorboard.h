/* TensorBoard event files: scalar curves that `tensorboard --logdir RUN_DIR` shows. */
#ifndef TRAIN_TENSORBOARD_H
#define TRAIN_TENSORBOARD_H

#include <stdint.h>

#include "train/metrics.h"

struct tensorboard;

/* A new file in `dir`, named by time and host as TensorBoard expects. Events of older files in it at `first_step` or later are
 * taken back: TensorBoard shows what this file says instead. ERR_IO. */
int  tensorboard_open(struct tensorboard **out, const char *dir, int64_t first_step);
/* One event with the finite ones of n values; it is in the file when the call returns. */
int  tensorboard_write(struct tensorboard *t, int64_t step, const struct metric *values, int n);
void tensorboard_close(struct tensorboard *t);         /* NULL-safe */

#endif
