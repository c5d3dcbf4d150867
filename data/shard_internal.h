/* What manifest.c, journal.c, shard.c, shard_check.c and shard_write.c share: the layout of a shard, the two text files, one open shard file. */
#ifndef DATA_SHARD_INTERNAL_H
#define DATA_SHARD_INTERNAL_H

#include <pthread.h>

#include "base/error.h"
#include "data/shard.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "shards are little-endian and are read and written in place"
#endif

#define SHARD_FORMAT "distill-logit-shards"
#define SHARD_REMEDY "restore it from a copy, or let distill inspect DATASET --repair set aside what is broken and teacher-dump make it again"
enum { SHARD_VERSION = 1, SHARD_ALIGNMENT = 4096 };

/* ---- manifest.c: manifest.json, and the layout that follows from it ---- */

enum shard_type { SHARD_U8, SHARD_U16, SHARD_U32, SHARD_F16, SHARD_F32 };
/* In the order in which a row's CRC runs over them. */
enum shard_field { SHARD_TOKENS, SHARD_LOSS_MASK, SHARD_DOCUMENT, SHARD_LSE, SHARD_TAIL, SHARD_ENTROPY, SHARD_LABEL_LOGPROB,
                   SHARD_IDS_LOW, SHARD_IDS_HIGH, SHARD_HEAD_LOGPROB, SHARD_DRAW_OFFSET, SHARD_DRAW_LOW, SHARD_DRAW_HIGH, SHARD_DRAW_COUNT, SHARD_DRAW_LOGPROB,
                   SHARD_LOGITS, SHARD_ROW_CRC, SHARD_FIELDS };
/* Kind sampled has as many entries as there are different ids: its fields are ragged, one list per shard in which every row begins at a multiple
 * of RAGGED_STEP entries, so that four ids share a byte of high bits within a row and not across two. SHARD_DRAW_OFFSET says where. */
enum { RAGGED_STEP = 4 };
struct shard_layout {
    const char *name;            /* of the dataset; NULL: this kind has no such field */
    enum shard_type type;
    int     rank;                /* 1 .. 3, rows first */
    int64_t dims[2];             /* of one row */
    int64_t row_bytes;           /* 0: ragged */
    int     ragged;              /* entries per element of a ragged field, 1 or RAGGED_STEP; 0: every row has the same size */
};
static inline int64_t shard_type_bytes(enum shard_type t) { return t == SHARD_U8 ? 1 : t == SHARD_U16 || t == SHARD_F16 ? 2 : 4; }
static inline int64_t ragged_round(int64_t entries) { return (entries + RAGGED_STEP - 1) / RAGGED_STEP * RAGGED_STEP; }
/* The most entries a row of kind sampled can have. */
static inline int64_t ragged_row_most(const struct shard_manifest *m) { return ragged_round(m->row_length * m->draws); }
static inline int64_t ids_high_bytes(int64_t K) { return (K + 3) / 4; }
/* layout[SHARD_FIELDS] for this manifest; the manifest was checked. */
void shard_layout(const struct shard_manifest *m, struct shard_layout *layout);
size_t shard_least_bytes(const struct shard_manifest *m, int64_t shard);   /* no file of this shard is smaller; shard_bytes: none is larger */
/* Ranges of every member; fails with `status`, naming `where`. */
int manifest_check(const struct shard_manifest *m, const char *where, int status);
/* Reads and checks dir/manifest.json; id is the SHA-256 of its bytes. */
int manifest_read(const char *dir, struct shard_manifest *m, char id[SHA256_HEX]);
int manifest_parse(const char *text, size_t bytes, const char *where, struct shard_manifest *m);
int manifest_write(const char *dir, const struct shard_manifest *m);
/* ERR_MISMATCH naming the first key that differs and both values; the teacher's name and the measured error may differ. */
int manifest_same(const char *where, const struct shard_manifest *file, const struct shard_manifest *want);

/* ---- journal.c: journal.jsonl ---- */

struct journal {
    char *path;
    char prev[SHA256_HEX];       /* hash of the last whole line; the dataset id before the first */
    int64_t offset, torn;        /* bytes parsed; bytes of an unfinished last line after them */
    struct shard_entry *entries;
    int64_t n, room;
    int32_t *entry_of;           /* [shard_count] index + 1 into entries, 0: not sealed */
};
void journal_init(struct journal *j, const char *dir, const struct shard_manifest *m, const char *id);
void journal_free(struct journal *j);
/* Parses what was appended since the last call. ERR_INPUT: a broken line; ERR_MISMATCH: one shard twice with different content. */
int journal_refresh(struct journal *j, const struct shard_manifest *m);
/* `fd` is open for appending. One write, one fsync. */
int journal_append(struct journal *j, int fd, const struct shard_entry *e);
/* Every line on its own, for a scrub: `line` gets its place, its values unless they cannot be read, and what is wrong with it (NULL: nothing). *torn as above. */
int journal_scan(const char *path, const struct shard_manifest *m, const char *id, void (*line)(void *context, int64_t at, const struct shard_entry *e, int status, const char *fault),
                 void *context, int64_t *torn);
/* The lines of these entries, chained anew. malloc'd */
char *journal_text(const struct shard_entry *entries, int64_t n, const char *id, size_t *bytes);
static inline const struct shard_entry *journal_find(const struct journal *j, int64_t shard)
{
    return j->entry_of[shard] ? &j->entries[j->entry_of[shard] - 1] : NULL;
}

/* path.quarantine, path.quarantine-2, ...: the first that is free. malloc'd */
char *quarantine_name(const char *path);

/* ---- shard_claim.c: who writes which shard ---- */

enum claims_mode { CLAIMS_SHARED,     /* a writer among others */
                   CLAIMS_OPTIONAL,   /* a writer of a range of its own: works where the file system has no locks */
                   CLAIMS_ALONE };    /* nobody else may have the dataset open for writing */
struct shard_claims { char *path; int fd; bool locks; };
/* Opens dir/.lock; the locks go with the descriptor. ERR_IO names the process that is in the way. */
int  claims_open(struct shard_claims *c, const char *dir, enum claims_mode mode);
void claims_close(struct shard_claims *c);
/* Between the two nobody else changes manifest or journal. Never held while a shard is computed or read. */
bool claims_alone(const struct shard_claims *c);   /* nobody else has the dataset open; stays true until claims_leave() when asked after claims_enter() */
int  claims_enter(struct shard_claims *c);
void claims_leave(struct shard_claims *c);
int  claim_take(struct shard_claims *c, int64_t shard, bool *taken);   /* does not wait: *taken false when another has it */
void claim_drop(struct shard_claims *c, int64_t shard);
const char *claim_owner(const struct shard_claims *c, int64_t shard);  /* for messages; valid until the next call of this thread */

/* ---- shard.c: one shard file ---- */

struct shard_file {
    char *path;
    int fd;
    int64_t shard, bytes;
    int64_t offset[SHARD_FIELDS];   /* where a field's data begins */
    int64_t entries;                /* of the ragged fields */
};
char *shard_path(const char *dir, int64_t shard);
/* Opens the file, compares its size with `bytes` (-1: any) and its structure with the manifest. */
int  shard_file_open(struct shard_file *f, const char *path, const struct shard_manifest *m, const char *id, int64_t shard, int64_t bytes);
void shard_file_close(struct shard_file *f);
int  shard_file_read(const struct shard_file *f, const struct shard_manifest *m, int64_t row /* within the shard */, bool deep, struct shard_row *out);
/* Reads every row with every check; *targets = supervised positions. */
int  shard_file_check_rows(const struct shard_file *f, const struct shard_manifest *m, int64_t *targets);
int64_t shard_name_parse(const char *name);   /* shard-NNNNNN.h5 -> N; -1: no shard's name */
uint32_t shard_row_crc_start(int64_t row);   /* over the row's number in the dataset: a row in another's place is not that row */

/* ---- shard_check.c ---- */

/* Is this row what FORMAT.md says a row is? Fails with `status`, naming the position. deep: the mass at every temperature, not the first alone. */
int  shard_row_check(const struct shard_manifest *m, const struct shard_row *r, bool deep, int status);

#endif
