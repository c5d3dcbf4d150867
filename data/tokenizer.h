/* Hugging Face tokenizer.json, byte-level BPE and BPE with byte fallback: text <-> ids.
 *
 * Owns: added and special tokens, normalizers (utf8proc), pre-tokenizers (PCRE2), ranked merges, decoders, and the
 * identity of the vocabulary. Does not own: chat templates (text is encoded as it is), padding, truncation ("padding" and
 * "truncation" of a tokenizer.json are ignored with a warning: a corpus is encoded whole).
 * A tokenizer is immutable after it is opened; struct tokenizer_work holds what one thread needs to encode.
 * What a tokenizer.json asks for and this file does not implement is refused by name (ERR_INPUT), never approximated.
 */
#ifndef DATA_TOKENIZER_H
#define DATA_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/hash.h"

struct tokenizer;
struct tokenizer_work;

/* `path` is a tokenizer.json or a directory holding one (with tokenizer_config.json and chat_template.jinja beside it, read when
 * present). ERR_INPUT: not JSON, or a part that is not implemented, named. */
int  tokenizer_open(struct tokenizer **out, const char *path);
void tokenizer_close(struct tokenizer *t);               /* NULL-safe */

struct tokenizer_work *tokenizer_work_new(const struct tokenizer *t);
void tokenizer_work_free(struct tokenizer_work *w);      /* NULL-safe */

/* Ids of a UTF-8 text, as tokenizers' encode(text, add_special_tokens=False). *ids belongs to `w` and lives until its
 * next call. ERR_INPUT when the text is not valid UTF-8, with the byte offset. */
int tokenizer_encode(const struct tokenizer *t, struct tokenizer_work *w, const char *text, size_t bytes,
                     const int32_t **ids, size_t *n);
/* Bytes of ids, as decode(ids, skip_special_tokens=skip_special) but with raw bytes where they are not valid UTF-8.
 * *text is NUL-terminated, belongs to `w`, and lives until its next decode. ERR_INPUT: an id outside the vocabulary. */
int tokenizer_decode(const struct tokenizer *t, struct tokenizer_work *w, const int32_t *ids, size_t n, bool skip_special,
                     const char **text, size_t *bytes);
/* The text after the normalizer, added tokens as they are: what decode(encode(text)) gives back unless the pre-tokenizer adds or drops
 * characters (add_prefix_space, Metaspace, Removed). *normalized belongs to `w` and lives until its next normalize. */
int tokenizer_normalize(const struct tokenizer *t, struct tokenizer_work *w, const char *text, size_t bytes,
                        const char **normalized, size_t *normalized_bytes);

/* 1 + the largest id the tokenizer defines (vocabulary and added tokens): the valid columns of a padded LM head. */
int32_t tokenizer_vocab_size(const struct tokenizer *t);
/* How many ids below tokenizer_vocab_size() no token has. */
int32_t tokenizer_holes(const struct tokenizer *t);
/* The bytes token `id` stands for inside a text (byte-level tokens unmapped, "<0x0A>" is its byte, the decoder's replacements made,
 * added tokens their content); NULL for a hole. Used for bits per byte and display. */
const char *tokenizer_token_bytes(const struct tokenizer *t, int32_t id, size_t *bytes);
/* The token as tokenizer.json spells it (byte-level alphabet), for GGUF; NULL for a hole. */
const char *tokenizer_token_text(const struct tokenizer *t, int32_t id);
enum token_kind { TOKEN_HOLE, TOKEN_NORMAL, TOKEN_BYTE, TOKEN_ADDED, TOKEN_SPECIAL };
enum token_kind tokenizer_token_kind(const struct tokenizer *t, int32_t id);
/* Merge `rank` as its two halves, as spelled; returns false past the last. A pair listed twice in the file is here once, at its last place. */
bool tokenizer_merge(const struct tokenizer *t, int64_t rank, const char **left, const char **right);
int64_t tokenizer_n_merges(const struct tokenizer *t);
int32_t tokenizer_id_of(const struct tokenizer *t, const char *token_text);   /* spelled as in tokenizer.json; -1 if absent */
/* -1 when tokenizer_config.json and the post-processor name none. */
int32_t tokenizer_bos(const struct tokenizer *t);
int32_t tokenizer_eos(const struct tokenizer *t);
int32_t tokenizer_pad(const struct tokenizer *t);
bool tokenizer_add_bos(const struct tokenizer *t);       /* tokenizer_config.json's add_bos_token, or a TemplateProcessing that starts with bos */
const char *tokenizer_chat_template(const struct tokenizer *t);   /* NULL if none; carried, never rendered */

/* SHA-256 of the canonical JSON (as Python's json.dumps(..., sort_keys=True, separators=(",", ":"), ensure_ascii=False)) of
 * {added_tokens sorted by id, merges as pairs, model: {byte_fallback, fuse_unk, ignore_merges, unk_token}, normalizer, post_processor,
 * pre_tokenizer, vocab}: equal hash, equal ids for every text, whichever way the file was formatted. */
void tokenizer_hash(const struct tokenizer *t, char hex[SHA256_HEX]);
/* The same id -> bytes map and special flags below min(vocab sizes)? If not, *first_difference is the first such id. */
bool tokenizer_same_vocab(const struct tokenizer *a, const struct tokenizer *b, int32_t *first_difference);
/* Name of the pre-tokenizer as llama.cpp calls it ("qwen2", "llama-bpe", "deepseek-v3", "deepseek-r1-qwen", "gpt-2", ...),
 * from the normalizer (none or NFC), the split patterns, ignore_merges and the added tokens; NULL when llama.cpp has none that splits
 * the same way, and for models that are not byte-level. */
const char *tokenizer_gguf_pre(const struct tokenizer *t);

#endif
