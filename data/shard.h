/* Logit shards, format version 1: a dataset directory of sealed HDF5 files. data/FORMAT.md is the full description.
 *
 *     manifest.json            written first, immutable; its SHA-256 is the dataset id
 *     journal.jsonl            one line per sealed shard, hash-chained
 *     shards/shard-NNNNNN.h5   rows [n * rows_per_shard, ...)
 *
 * This file owns the layout, the writer (one shard collected in memory, written to a temporary name, verified, synced,
 * renamed, journalled) and the reader (pread at fixed offsets, CRC per row). It does not choose rows (loader.h) and does
 * not compute targets (kernels/<backend>/teacher_targets). R rows, L row length, K head entries,
 * D draws per position (m of kind hybrid, N of kind sampled), V valid vocabulary, nT temperatures.
 */
#ifndef DATA_SHARD_H
#define DATA_SHARD_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/hash.h"

/* topk: the K best and the mass of the rest. full: every logit. hybrid: topk and m draws from the rest. sampled: N draws from everything. */
enum shard_kind { SHARD_TOPK, SHARD_FULL, SHARD_HYBRID, SHARD_SAMPLED, SHARD_KIND_COUNT };
static inline bool shard_kind_has_head(enum shard_kind kind) { return kind == SHARD_TOPK || kind == SHARD_HYBRID; }
static inline bool shard_kind_draws(enum shard_kind kind) { return kind == SHARD_HYBRID || kind == SHARD_SAMPLED; }
enum { SHARD_MAX_TEMPERATURES = 8, SHARD_MAX_K = 256, SHARD_MAX_DRAWS = 255 /* a count is a byte */, SHARD_ID_BITS = 18, SHARD_MAX_VOCAB = 1 << SHARD_ID_BITS,
       SHARD_MAX_LENGTH = 1 << 20, SHARD_MAX_SHARDS = 1000000 };
const char *shard_kind_name(enum shard_kind kind);

/* How the teacher multiplied: in the type its device computes in, or, inside its blocks, factors rounded to e4m3 with a scale per row (base/fp8.h). */
enum teacher_precision { PRECISION_NATIVE, PRECISION_FP8 };
const char *teacher_precision_name(enum teacher_precision precision);
/* What that rounding changed, at T = 1 over the supervised positions of some rows of the corpus: p without it, q with it. */
struct precision_error {
    int64_t rows, positions;
    double kl, kl_row_max;                      /* KL(p || q), nats: mean over the positions; the largest of a row's means */
    double agreement;                           /* share of positions where both put the same id first */
    double label_difference;                    /* mean |log p(token t+1) - log q(token t+1)| */
};

/* What the manifest pins. */
struct shard_manifest {
    enum shard_kind kind;
    int64_t rows, row_length, rows_per_shard;
    int     k;                                  /* K of topk and hybrid; 0 for others */
    int     draws;                              /* D: m of hybrid, N of sampled; 0 for others */
    int     n_temperatures; float temperatures[SHARD_MAX_TEMPERATURES];
    int32_t valid_vocab;                        /* ids 0 .. valid_vocab-1 take part in the softmax */
    int32_t teacher_vocab;                      /* columns of the teacher's head */
    uint64_t seed;
    char teacher_config_hash[SHA256_HEX], teacher_weights_hash[SHA256_HEX], tokenizer_hash[SHA256_HEX], corpus_hash[SHA256_HEX];   /* "": not known */
    char packing[128];                          /* one line that says how rows were made */
    char teacher_name[256];                     /* for people: a run that goes on may have another */
    int64_t text_bytes;                         /* corpus_rows.bytes */
    enum teacher_precision precision;
    int native_first, native_last;              /* PRECISION_FP8: so many blocks at the two ends of the teacher were not rounded */
    struct precision_error error;               /* measured once, by whoever made the manifest; all 0 of a native teacher. The other thing in which a run that goes on may differ */
};
/* Reads dir/manifest.json alone. */
int shard_manifest_read(const char *dir, struct shard_manifest *m);
/* Whether a writer could go on in dir with `want`: OK also where nothing was begun. ERR_MISMATCH with both values of what differs. */
int shard_manifest_fits(const char *dir, const struct shard_manifest *want);

/* One row; pointers into the caller's arrays, NULL where the kind has no such field. Positions that are not supervised must hold finite
 * values and ids below valid_vocab, zeros for instance. What a row must fulfil is in FORMAT.md, "What a reader checks". */
struct shard_row {
    uint32_t *tokens;        /* [L] */
    uint8_t  *loss_mask;     /* [L] */
    uint16_t *document;      /* [L] */
    float    *lse;           /* [L, nT] log-sum-exp of t/T over the valid ids */
    float    *tail;          /* [L, nT] log of the mass outside the head at every listed T, from the full logits; -INFINITY when the head holds everything (topk, hybrid) */
    uint16_t *entropy;       /* [L] f16, nats, at temperatures[0]; not negative */
    uint16_t *label_logprob; /* [L] f16, log p(token t+1) at temperatures[0]; 0 where there is no next token in the document */
    uint32_t *head_ids;      /* [L, K] unpacked (topk, hybrid) */
    uint16_t *head_logprob;  /* [L, K] f16, descending (topk, hybrid) */
    uint32_t *draw_ids;      /* [L, D] what was drawn, each id once, ascending, then unused slots with id 0 and count 0 (hybrid: outside the head; sampled) */
    uint8_t  *draw_count;    /* [L, D] how often; they add up to D, or to 0 where there is nothing to draw from */
    uint16_t *draw_logprob;  /* [L, D] f16, log p at temperatures[0]; 0 in unused slots (hybrid) */
    uint16_t *logits;        /* [L, V] f16, t / temperatures[0], the valid ids only, nothing subtracted (full) */
    uint8_t  *packed;        /* scratch of shard_dataset_read for packed ids; shard_row_alloc makes it, put does not use it */
};

/* ---- writing ---- */
struct shard_writer;
/* Opens or creates the dataset. An existing manifest that differs is ERR_MISMATCH naming the first key and both values. Leftover temporary files
 * of dead writers are removed, files without a journal line are adopted after full verification or quarantined. Any number of writers may have
 * one dataset open; each shard is made by one of them, under a lock that dies with its process. Probes that the directory can be written and renamed in.
 * A journalled shard whose file is absent or of another size is ERR_INPUT. A quarantined file is reported with warn(). */
int  shard_writer_open(struct shard_writer **out, const char *dir, const struct shard_manifest *m);
/* For file systems whose locks cannot be relied on: makes the shards first .. end - 1, which are no other process's, and touches nothing that is
 * shared. Its shards have no journal line until a writer of the first kind, or a repair, has verified and adopted them. */
int  shard_writer_open_range(struct shard_writer **out, const char *dir, const struct shard_manifest *m, int64_t first, int64_t end);
void shard_writer_close(struct shard_writer *w);                   /* drops the shard in progress; NULL-safe */
int64_t shard_writer_next_shard(const struct shard_writer *w);     /* first gap (of the range); shard_count() when there is none */
int64_t shard_writer_rows_done(const struct shard_writer *w);      /* rows of the shards (of the range) that are made, by whomever, as far as this writer knows */
/* Takes the first shard that is neither made nor being made by another writer, to be begun next. *shard = SHARD_NONE: every one is made;
 * SHARD_BUSY: others are making the rest, *busy of them, the first is claim_owner's: wait and call again, for a writer may die. A writer may claim up to
 * four ahead of sealing them; those count as made here. */
enum { SHARD_NONE = -1, SHARD_BUSY = -2 };
int  shard_writer_claim(struct shard_writer *w, int64_t *shard, int64_t *busy, const char **owner);
int64_t shard_count(const struct shard_manifest *m);
int64_t shard_first_row(const struct shard_manifest *m, int64_t shard);
int64_t shard_rows(const struct shard_manifest *m, int64_t shard); /* the last one may be shorter */
size_t  shard_bytes(const struct shard_manifest *m, int64_t shard);/* memory and (nearly) file size; kind sampled: at most */
/* Starts shard `n`, not sealed yet, claiming it unless shard_writer_claim did (ERR_IO: another process has it); then exactly shard_rows() calls of put,
 * in row order, then seal. put copies, and checks the row as a reader
 * will: NaN, Inf, mass that is not 1, ids out of range are ERR_NUMERIC. A failed seal leaves no file; the writer then has to be opened again. */
int shard_writer_begin(struct shard_writer *w, int64_t shard);
int shard_writer_put(struct shard_writer *w, const struct shard_row *row);
int shard_writer_seal(struct shard_writer *w);

/* ---- reading ---- */
struct shard_dataset;
/* Reads manifest and journal (a torn last line is ignored, anything else broken is ERR_INPUT). */
int  shard_dataset_open(struct shard_dataset **out, const char *dir);
void shard_dataset_close(struct shard_dataset *d);                 /* NULL-safe */
const struct shard_manifest *shard_dataset_manifest(const struct shard_dataset *d);
const char *shard_dataset_id(const struct shard_dataset *d);       /* hex */
/* Reads journal lines that were appended since; *sealed = number of sealed shards. Cheap when nothing changed. */
int  shard_dataset_refresh(struct shard_dataset *d, int64_t *sealed);
/* Every sealed shard's file is there with the size the journal gives; files already looked at are skipped. ERR_INPUT names the first fault. */
int  shard_dataset_check_files(struct shard_dataset *d);
bool shard_dataset_has(const struct shard_dataset *d, int64_t shard);
/* Shards that cannot be read: not in the journal (never made, or set aside by a repair), or without their file. Ascending, malloc'd. */
void shard_dataset_missing(struct shard_dataset *d, int64_t **shards, int64_t *n);
/* From now on these shards are no part of the dataset: loaders give the rows of the others, check_files does not look for them. Before a loader's first batch; one that is open already has counted
 * rows that are gone, and has to be opened again. */
void shard_dataset_leave_out(struct shard_dataset *d, const int64_t *shards, int64_t n);
bool shard_dataset_left_out(const struct shard_dataset *d, int64_t shard);
/* Reads row `row` (0 .. rows-1 of the dataset) into arrays of shard_row_alloc; verifies size and structure on first touch of a file and the row's CRC
 * and ranges always. SHA-256 of the whole file is verified before the first touch when verify_on_touch was set. Thread-safe.
 * ERR_INPUT names file and row; ERR_MISMATCH: a shard of another dataset; ERR_IO: the disk gives different bytes each time. */
int  shard_dataset_read(struct shard_dataset *d, int64_t row, struct shard_row *out);
void shard_dataset_verify_on_touch(struct shard_dataset *d, bool on);
/* Re-reads every sealed shard: SHA-256, structure, CRCs, ranges. Prints nothing; ERR_INPUT with the first fault. */
int  shard_dataset_verify(struct shard_dataset *d);
/* Everything in the directory, each fault on its own (shard_scrub.c). `found` is called in order of journal lines, then shards, then other files;
 * status OK: no fault, but worth knowing; shard -1: of no shard. */
struct shard_scrub { int64_t sealed, sound, missing, rows, faults, foreign /* of them: of another dataset */, unreadable, aside, adopted; bool mended; };
typedef void shard_found(void *context, int64_t shard, int status, const char *text);
/* Fails only when the directory cannot be read. repair: alone with the dataset (ERR_IO: a writer is there), files that fail are renamed to .quarantine,
 * whole files without a line get one, and the journal is written anew, the old one kept beside it when any of its lines is not in the new one. */
int  shard_dataset_scrub(const char *dir, bool repair, shard_found *found, void (*progress)(void *context, int64_t done, int64_t all) /* may be NULL */, void *context,
                         struct shard_scrub *out);
struct shard_entry { int64_t shard, rows, tokens /* rows * L */, targets /* supervised */, bytes; char sha256[SHA256_HEX]; };
int64_t shard_dataset_entries(const struct shard_dataset *d, const struct shard_entry **entries);   /* sealed, in journal order; valid until a refresh */
char *shard_dataset_path(const struct shard_dataset *d, int64_t shard);                              /* malloc'd */

/* Arrays for one row of this manifest; free with shard_row_free. */
void shard_row_alloc(struct shard_row *row, const struct shard_manifest *m);
void shard_row_free(struct shard_row *row);

#endif
