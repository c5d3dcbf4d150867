/* The memory plan: every large buffer is announced first, with the row of the table it belongs to and the key that shrinks it;
 * then one allocation per row, and nothing is allocated afterwards. If it cannot fit, the program stops before the first one. */
#ifndef TRAIN_MEMORY_H
#define TRAIN_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

#include "kernels/backend.h"

struct memory_plan;
struct memory_plan *memory_plan_new(struct backend *be);
void memory_plan_free(struct memory_plan *m);            /* releases the memory too; NULL-safe */

/* *slot is set by memory_commit(). `row` and `key` are string constants; zero bytes give NULL. */
#define memory_add(m, row, key, slot, bytes) memory_add_slot(m, row, key, (void **)(slot), bytes)
void memory_add_slot(struct memory_plan *m, const char *row, const char *key, void **slot, size_t bytes);

/* Host memory that copies reach at full speed; rows of its own, outside memory_total() and the limit. */
#define memory_add_host(m, row, key, slot, bytes) memory_add_host_slot(m, row, key, (void **)(slot), bytes)
void memory_add_host_slot(struct memory_plan *m, const char *row, const char *key, void **slot, size_t bytes);

/* The scratch arena of the plan's backend: the largest of the calls counts. */
void memory_add_scratch(struct memory_plan *m, size_t bytes);

/* What memory_commit() would refuse, without taking anything. */
int  memory_check(const struct memory_plan *m, size_t limit_bytes);
/* ERR_IO when the plan needs more than limit_bytes (0: what the device has now), or more of the host than it has: names the largest row and its key. */
int  memory_commit(struct memory_plan *m, size_t limit_bytes);
size_t memory_total(const struct memory_plan *m);
bool memory_fits(const struct memory_plan *m, size_t limit_bytes);   /* on the device: for a choice between plans */
void memory_print(const struct memory_plan *m, FILE *f);  /* the table: row, GiB, share */
/* Row i of the table -> its name and bytes; false: there are fewer. */
bool memory_row(const struct memory_plan *m, int i, const char **name, size_t *bytes);

#endif
