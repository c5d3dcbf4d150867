/* What teacher.precision fp8 changes, measured before a dump begins: some rows of the corpus through the teacher without the rounding and with it, and the two compared position by
 * position. The numbers are a function of teacher, rows, seed and device.
 *
 * Without the rounding the teacher may fit neither the device nor the host. It goes first and alone, with its blocks read from the checkpoint as they are needed (model_options.mapped),
 * all rows in one pass, and leaves its last hidden states on the host. Head and embedding are the same in both, so that the rounded model makes the logits of both. */
#ifndef TRAIN_DUMP_ERROR_H
#define TRAIN_DUMP_ERROR_H

#include "data/shard.h"
#include "train/load.h"

/* Device memory beside the rounded model, a chunk of positions at a time. */
struct error_room { act *hidden, *logits; struct eval_row *rows; int64_t chunk; };
void dump_error_plan(struct error_room *room, const struct model *m, struct memory_plan *plan);

struct dump_error;
/* `n` rows out of `rows`, spread over them, that have a supervised position: fewer where there are not so many. ERR_INPUT: there is none. Borrows rows. */
int  dump_error_new(struct dump_error **out, const struct corpus_rows *rows, int64_t n, uint64_t seed);
void dump_error_free(struct dump_error *e);                /* NULL-safe */
/* The rows through the teacher as it is. Takes device memory (at most memory_limit, 0: what there is) and gives all of it back. ERR_IO: they do not fit. */
int  dump_error_native(struct dump_error *e, struct backend *be, const struct model_files *files, size_t memory_limit);
/* Then through `rounded`, loaded, batch_rows at a time. ERR_NUMERIC: logits that are not finite; with `quarantine` such
 * positions are left out, and it is an error only when there is no other. where: the teacher's directory, for messages. */
int  dump_error_compare(const struct dump_error *e, struct model *rounded, const struct error_room *room, int64_t batch_rows, int64_t Vv, bool quarantine, const char *where,
                        struct precision_error *out);

#endif
