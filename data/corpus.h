/* Corpus: files of text or ids -> documents -> rows of a fixed length.
 *
 * A corpus is a list of files given as paths, globs or directories (each sorted, read in that order, a file named twice once).
 * Documents are numbered in reading order and shuffled by seed. Held-out documents are chosen by a hash of their content (its
 * first 64 bits as a fraction of 2^64), so that adding files moves no document from one split to the other; they are ordered by
 * that hash, so that runs with other seeds are measured on the same rows. Rows are filled with documents end to end (best use
 * of the row, a document longer than the room left continues in the next row as a new piece with positions from 0: attention,
 * positions and targets never cross a document boundary, and never a row's end).
 */
#ifndef DATA_CORPUS_H
#define DATA_CORPUS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/hash.h"
#include "data/tokenizer.h"

enum corpus_format { CORPUS_AUTO, CORPUS_TEXT, CORPUS_JSONL, CORPUS_IDS };   /* auto: .txt/.md/other = text, .jsonl/.json = by its fields */
enum corpus_document { DOCUMENT_FILE, DOCUMENT_LINE, DOCUMENT_PARAGRAPH };   /* what one document of a text file is; paragraph: blank lines part them */
enum corpus_split { SPLIT_TRAIN, SPLIT_HELDOUT };

struct corpus_options {
    const char *const *files; int n_files;   /* paths, globs, directories (recursive: *.txt *.md *.jsonl) */
    enum corpus_format format;
    enum corpus_document document;
    const char *text_field, *ids_field, *mask_field;   /* "text", "ids", "mask" */
    int64_t row_length;                      /* L >= 2 */
    bool append_eos;                         /* the tokenizer's eos ends every document of text (supervised as a target) */
    bool prepend_bos;                        /* and its bos begins it */
    double heldout_fraction;                 /* 0 .. 0.5 of the documents */
    uint64_t shuffle_seed; bool shuffle;     /* order of documents */
    int64_t max_rows;                        /* of either split; 0: all */
    int64_t max_document_tokens;             /* 0: no limit; longer documents are cut */
};

/* Rows of one split, in memory: tokens u32 [R, L], loss_mask u8 [R, L], document u16 [R, L] exactly as a shard stores them.
 * loss_mask[t] = 1: position t predicts token t+1 and counts. 0 on a document's last token, padding, and where a document's
 * own mask says so (a JSONL mask marks TARGET tokens: mask[i] = 1 means token i is learnt, hence loss_mask[i-1] = 1).
 * document: number of the piece within the row, from 0; padding (the tokenizer's pad, else eos, else 0) has the number one past the last piece. */
struct corpus_rows {
    int64_t rows, length;
    uint32_t *tokens;
    uint8_t *loss_mask;
    uint16_t *document;
    int64_t documents, tokens_total, targets, cut_documents, empty_documents;   /* without padding; empty documents are left out, and counted with the training split */
    int64_t bytes;                            /* text bytes the supervised targets stand for, special tokens for none: the base of bits per byte; 0 when unknown */
    int32_t max_id;
};

/* `tokenizer` may be NULL when every file holds ids. ERR_INPUT names file and line: not UTF-8, not JSON, a field that is absent or of
 * the wrong type, an id that is negative or >= vocab_size (0: not checked), a mask of another length. ERR_USAGE: a pattern that matches
 * nothing, a split that gets no document. ERR_MISMATCH: a text gives an id >= vocab_size. *heldout is NULL when heldout_fraction is 0.
 * Uses all OpenMP threads; the result does not depend on how many. */
int  corpus_read(struct corpus_rows **train, struct corpus_rows **heldout, const struct corpus_options *o,
                 const struct tokenizer *tokenizer, int32_t vocab_size);
void corpus_rows_free(struct corpus_rows *r);            /* NULL-safe */
/* SHA-256 over rows, length, tokens, mask and documents: the content a teacher's shards are bound to. */
void corpus_rows_hash(const struct corpus_rows *r, char hex[SHA256_HEX]);

/* Calls `each` for every document's text (ids files are refused), in reading order, until it returns other than OK: used to train a tokenizer. */
int corpus_each_text(const struct corpus_options *o, int (*each)(void *context, const char *text, size_t bytes), void *context);

#endif
