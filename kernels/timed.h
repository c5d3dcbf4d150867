/* A backend that keeps time: the same device, the same ops, a mark before and after each, and the seconds between the two added up by op. For a few
 * steps beside a measurement, never inside it: the marks themselves cost a little, on a GPU and on a CPU.
 *
 * Device time, so on a GPU it says nothing about waiting: wall clock minus the sum is what the device was idle, which is the host's share. */
#ifndef KERNELS_TIMED_H
#define KERNELS_TIMED_H

#include "kernels/backend.h"

enum time_phase { PHASE_GEMM, PHASE_ATTENTION, PHASE_POINTWISE, PHASE_QUANTIZE, PHASE_HEAD, PHASE_OPTIMIZER, PHASE_OTHER, PHASE_COUNT };
extern const char *const time_phase_names[PHASE_COUNT];   /* "products", "attention", "norm and pointwise", "rounding to fp8", "LM head and objective", "optimizer", "embedding and other" */

struct timed_op { const char *name; enum time_phase phase; double seconds; int64_t calls; };

/* Around `inner`, which stays open and has its scratch already; memory of one is memory of the other. Products with head_columns outputs are the LM head's.
 * The caller's marks keep their places below TIMED_FIRST_MARK. After TIMED_MAX_CALLS ops without a timed_collect() the next one waits for the device. */
enum { TIMED_FIRST_MARK = 1024, TIMED_MAX_CALLS = 1 << 14 };
struct backend *timed_backend(struct backend *inner, int64_t head_columns);
void timed_free(struct backend *be);                       /* NULL-safe; inner stays open */
/* Waits for the device; adds what was called since the last time. *ops, *n: every op that was ever called, in the order of the table, valid until timed_free. */
void timed_collect(struct backend *be, const struct timed_op **ops, int *n);

#endif
