/* The arithmetic of a dump: rows -> teacher forward -> targets -> rows of shards, arranged so that the device never waits for the host. The calling thread
 * queues batches on the device; targets leave chunk by chunk into pinned memory, in the order of the ops; a thread of the pipeline's own waits for each batch,
 * turns it into shard rows and hands them on, while the device computes the next one. Two batches are in flight. */
#ifndef TRAIN_DUMP_PIPELINE_H
#define TRAIN_DUMP_PIPELINE_H

#include "data/shard.h"
#include "train/dump_error.h"

struct dump_options {
    enum shard_kind kind;
    int k, draws, nT; float temperatures[SHARD_MAX_TEMPERATURES];
    uint64_t seed;                     /* of the draws */
    int64_t Vv;                        /* valid ids */
    int64_t row_length;
    int64_t batch_rows;                /* rows of one pass; 0: as many as fit the device, up to what hides the streaming of weights */
    int64_t chunk_tokens;              /* positions whose logits exist at one time */
    enum { WEIGHTS_AUTO, WEIGHTS_RESIDENT, WEIGHTS_STREAMED } weights;   /* auto: streamed where the device cannot hold them */
    bool fp8; int native_first, native_last;   /* the products of the blocks in fp8, but for those (model_options) */
    bool measure;                      /* with room to measure what that changes (dump_error.h) */
    size_t memory_limit;               /* bytes of device memory the plan may take; 0: what there is */
    bool quarantine;                   /* positions whose targets are not finite are set aside: zeros, not supervised. Else they are ERR_NUMERIC */
};

/* Where rows go. Called from the pipeline's thread, one at a time, in the order of submission. */
struct dump_sink {
    void *context;
    int (*begin)(void *context, int64_t shard);
    int (*put)(void *context, const struct shard_row *row);
    int (*seal)(void *context);
};

/* Taken by the sink so far; sums over positions; drawn: different tokens; aside: positions set aside, in rows_aside rows, targets_aside of them supervised. */
struct dump_stats { int64_t rows, positions, drawn, aside, targets_aside, rows_aside; double kept_mass, padding_mass; };

struct dump_pipeline;
/* Chooses batch_rows and residence, and plans the memory: p->plan is complete but for what the caller adds. Nothing is allocated. */
struct dump_pipeline {
    struct dump_options o;             /* with the choices made */
    struct backend *be;
    struct memory_plan *plan;
    struct model *model;
    struct error_room error_room;      /* o.measure */
    struct dump_run *run;
};
struct dump_pipeline *dump_pipeline_new(struct backend *be, const struct model_config *c, const struct dump_options *o);
void dump_pipeline_free(struct dump_pipeline *p);        /* after dump_finish; NULL-safe */
/* Takes the memory and starts the thread; then the model's weights are to be loaded. ERR_IO when it does not fit. */
int  dump_pipeline_ready(struct dump_pipeline *p);

/* Between start and finish rows are submitted in order; `where` is for messages. */
void dump_start(struct dump_pipeline *p, const struct dump_sink *sink, const char *where);
/* rows [first_row, first_row + n) of the dataset, n <= batch_rows; arrays [n, L] from the first of them on. `begins`: they open shard `shard`; `ends`: they complete
 * it. Waits only while two batches are in flight. A failure of the sink, or logits that are not finite (ERR_NUMERIC), is reported by the next call. */
int  dump_submit(struct dump_pipeline *p, int64_t shard, bool begins, bool ends, int64_t first_row, int64_t n, const uint32_t *tokens, const uint8_t *loss_mask, const uint16_t *document);
int  dump_finish(struct dump_pipeline *p);               /* waits until everything submitted was taken, or something failed */
struct dump_stats dump_stats(struct dump_pipeline *p);   /* any time */
/* The sink's functions exclude this lock: hold it to ask a shard writer something while rows are in flight. */
void dump_lock(struct dump_pipeline *p);
void dump_unlock(struct dump_pipeline *p);

#endif
