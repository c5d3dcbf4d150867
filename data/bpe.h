/* Byte pair encoding: a vocabulary, its ranked merges, and the ids of one word.
 *
 * Owns: the "model" object of a tokenizer.json. Does not own: added tokens, normalization, splitting into words.
 * A word starts as one symbol per byte (byte-level, keys are raw bytes) or per character (keys are text); of all adjacent pairs
 * with a merge the one of lowest rank, leftmost first, is joined until none is left. A bpe is immutable; bpe_work belongs to one thread.
 */
#ifndef DATA_BPE_H
#define DATA_BPE_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct bpe;
struct bpe_work;

struct id_list { int32_t *ids; size_t n, capacity; };
void id_list_add(struct id_list *l, int32_t id);

/* GPT-2's byte <-> character table: printable Latin-1 stands for itself, the other 68 bytes for U+0100 onwards. */
int32_t byte_of_char(uint32_t c);                             /* -1: not in the table */
int byte_to_utf8(uint8_t byte, char out[2]);                  /* its character, 1 or 2 bytes long */
/* Text in the byte-level alphabet -> bytes; false, nothing written, when a character is outside of it. `out` holds n bytes. */
bool byte_level_decode(const char *text, size_t n, char *out, size_t *n_out);

/* "<0xHH>", sentencepiece's spelling of a byte that no character token covers */
bool byte_token(const char *token, size_t n, uint8_t *byte);

/* `raw_bytes`: words arrive as plain bytes and stand for their byte-level spelling. ERR_INPUT names what is wrong or not
 * implemented; `where` is the file, for messages. */
int  bpe_open(struct bpe **out, const json_t *model, bool raw_bytes, const char *where);
void bpe_close(struct bpe *b);                                /* NULL-safe */
int32_t bpe_size(const struct bpe *b);                        /* 1 + the largest id */
int32_t bpe_count(const struct bpe *b);                       /* number of tokens */
const char *bpe_text(const struct bpe *b, int32_t id, size_t *bytes);    /* as spelled; NULL for a hole */
int32_t bpe_find(const struct bpe *b, const char *text, size_t bytes);   /* spelled; -1 if absent */
int64_t bpe_n_merges(const struct bpe *b);
void bpe_merge(const struct bpe *b, int64_t rank, int32_t *left, int32_t *right);
bool bpe_byte_fallback(const struct bpe *b);
bool bpe_ignore_merges(const struct bpe *b);
/* {"byte_fallback", "fuse_unk", "ignore_merges", "unk_token"} with defaults filled in: part of the tokenizer's identity. New reference. */
json_t *bpe_options(const struct bpe *b);

struct bpe_work *bpe_work_new(const struct bpe *b);
void bpe_work_free(struct bpe_work *w);                       /* NULL-safe */
/* Appends the ids of a word (valid UTF-8). ERR_INPUT only for a character that needs an unk_token the vocabulary lacks. */
int bpe_encode(const struct bpe *b, struct bpe_work *w, const char *word, size_t n, struct id_list *out);

#endif
