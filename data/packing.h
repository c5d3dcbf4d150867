/* Packing: tokenised documents -> rows of a fixed length. Internal to the corpus; the layout of the rows is told in corpus.h. */
#ifndef DATA_PACKING_H
#define DATA_PACKING_H

#include <stdbool.h>
#include <stdint.h>

#include "data/corpus.h"

/* Set in a stored id when the token is context only. Ids are at most 31 bits. */
#define ID_NOT_LEARNT 0x80000000u

/* Documents end to end in one array, in reading order. */
struct document { int64_t begin, n; uint64_t hash; bool heldout, cut; };
struct documents {
    uint32_t *ids; int64_t n_ids, ids_room;
    struct document *item; int64_t n, room;
};

/* Copies; mask may be NULL: everything is learnt. */
void documents_add(struct documents *d, const int32_t *ids, const uint8_t *mask, const struct document *document);
void documents_clear(struct documents *d);

/* Rows from the documents order[0 .. n). max_rows 0: all. token_bytes[id] for id < n_token_bytes; NULL: unknown. */
struct corpus_rows *rows_pack(const struct documents *d, const int64_t *order, int64_t n, int64_t length, int64_t max_rows, uint32_t padding,
                              const int32_t *token_bytes, int32_t n_token_bytes);

#endif
