/* Loader: rows of a dataset or of a corpus -> batches, in an order that is a function of (seed, epoch).
 *
 * struct batch is the contract between data and training: plain host arrays that one op->upload each moves to the device.
 * Order: epoch e visits the shards in index order when e = 0 (so that a dataset still being written can be followed and
 * gives the same order as a finished one) and in a permuted order later; within a shard the rows are permuted. For a
 * corpus the whole epoch is permuted. A row is never split, and an epoch's last short batch is filled from the next epoch.
 * Without shuffle: rows as stored, once; the last batch may have fewer rows. An order depends on the manifest alone, not on
 * what is sealed, so (seed, epoch, cursor) names the same rows while a dataset grows and after. Shards that are left out (shard_dataset_leave_out) leave the
 * order of the others as it is, and the cursor counts the rows that are there: it means something together with their list.
 * Targets at temperature T = temperatures[i]: log p_T = (T0 / T) (log p_0 + lse_0) - lse_i, at most 0; as stored when T = T0.
 * Weights: head p_T; a draw counted c of m, from the tail of mass r at T0: w = (c / m) r p_T / p_0, its proposal being p_0 / r (importance sampling, unbiased at
 * every T); kind sampled: c / N, at T0 alone.
 * A reader thread keeps the next batches ready; the time the step had to wait for it is counted.
 */
#ifndef DATA_LOADER_H
#define DATA_LOADER_H

#include <stdbool.h>
#include <stdint.h>

#include "data/corpus.h"
#include "data/shard.h"

/* B rows of length L; N = B * L positions, row after row. */
struct batch {
    int64_t rows, length, n;      /* B, L, N */
    int32_t *tokens;              /* [N] */
    int32_t *labels;              /* [N] token t+1 where loss_mask[t], else -1 */
    uint8_t *mask;                /* [N] supervised */
    int32_t *position;            /* [N] from 0 in every document */
    int32_t *doc_begin;           /* [n_docs + 1] cumulative positions: document d is [doc_begin[d], doc_begin[d+1]); padding is a document of its own */
    int64_t n_docs, max_doc;      /* room for N + 1 entries; longest document */
    int64_t n_targets;            /* supervised positions */
    /* teacher targets; NULL without */
    int32_t k;                    /* entries per position: K; with samples K + m (hybrid: the head, then the draws) or N (sampled) */
    int32_t *head_ids;            /* [N, k] different within a position, but for unused slots: id 0, log p 0, weight 0 */
    float   *head_logprob;        /* [N, k] log p at the loader's temperature; kind sampled stores none: minus the entropy, so that sum w (log p - log q) is cross entropy less entropy */
    float   *weight;              /* [N, k] with samples: an unbiased estimate of p, so that sum w f(id) estimates sum p f over the vocabulary; else NULL */
    float   *tail_logmass;        /* [N] log of the mass outside the head, -INFINITY when nothing is left */
    uint16_t *full_logits;        /* [N, Vv] f16 as stored, t / temperatures[0] (kind full) */
    float    full_scale;          /* full_logits * full_scale = t / T at the loader's temperature: a rescaled f16 would be rounded twice */
    int64_t full_width;           /* Vv: ids per position in full_logits */
    float   *lse;                 /* [N] log-sum-exp of t/T at the loader's temperature */
    float   *label_logprob;       /* [N] teacher's log p of the label at temperatures[0] */
    int64_t *row_index;           /* [B] which row of the dataset, for messages */
};

/* samples: room for what a loader with that option fills in */
struct batch *batch_new(int64_t rows, int64_t length, const struct shard_manifest *teacher /* NULL: without targets */, bool samples);
void batch_free(struct batch *b);   /* NULL-safe */

struct loader_options {
    int64_t batch_rows;           /* rows of one micro-batch */
    uint64_t seed;
    float temperature;            /* must be listed in the manifest, else ERR_MISMATCH naming both */
    bool samples;                 /* kinds that draw: head and draws with their weights; else the head alone. No difference for kind full; ERR_MISMATCH for topk, which draws nothing */
    bool follow; double wait_s;   /* wait for shards that are not sealed yet, at most wait_s for one (then ERR_LOST); 0: for ever. Without: every shard must be sealed */
    bool shuffle;                 /* false: dataset order, one epoch, for evaluation */
    volatile const int *stop;     /* waiting ends with ERR_STOPPED when *stop becomes nonzero; may be NULL */
};
struct loader;
struct loader_state { int64_t epoch, cursor; };   /* rows consumed of this epoch; what a checkpoint stores */

int  loader_open_dataset(struct loader **out, struct shard_dataset *d, const struct loader_options *o);   /* borrows d */
int  loader_open_rows(struct loader **out, const struct corpus_rows *r, const struct loader_options *o);  /* borrows r */
void loader_close(struct loader *l);              /* joins its thread; NULL-safe */
/* The next batch, valid until the next call. ERR_INPUT: a broken row. With shuffle off, after the last row *b is NULL. A failure repeats. */
int  loader_next(struct loader *l, struct batch **b);
int64_t loader_rows_per_epoch(const struct loader *l);
/* Position after the batch last returned, whatever was read ahead. Seek before the first loader_next; ERR_MISMATCH: no such position. */
void loader_tell(const struct loader *l, struct loader_state *s);
int  loader_seek(struct loader *l, const struct loader_state *s);
double loader_wait_seconds(const struct loader *l);   /* how long loader_next has blocked in total */
/* Host helper: positions, labels and document bounds of rows as stored. Used by the loader, eval, dump and generate. */
void batch_set_row(struct batch *b, int64_t i, const uint32_t *tokens, const uint8_t *loss_mask, const uint16_t *document);
void batch_finish(struct batch *b);               /* doc_begin, n_docs, max_doc, n_targets after the rows are set */

#endif
