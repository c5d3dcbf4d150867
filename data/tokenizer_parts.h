/* The parts of a tokenizer.json around its model: normalizer, pre-tokenizer and decoder.
 *
 * Owns: reading them (a Sequence becomes a flat list of steps) and running them as Hugging Face tokenizers does. Does not own: added
 * tokens, the model, post-processors. Parts are immutable; parts_work belongs to one thread. All text is valid UTF-8.
 *
 * `lead` is the number of bytes at the start of a text that stem from the first character of the caller's text: Metaspace
 * with prepend_scheme "first" looks at nothing else of the alignment between a text and its original.
 */
#ifndef DATA_TOKENIZER_PARTS_H
#define DATA_TOKENIZER_PARTS_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "data/tokenizer_unicode.h"

struct normalizer;
struct pre_tokenizer;
struct decoder;
struct parts_work;

/* `part` may be NULL or JSON null: no steps. ERR_INPUT names the step that is not implemented. */
int  normalizer_open(struct normalizer **out, const json_t *part, const char *where);
void normalizer_close(struct normalizer *n);                       /* NULL-safe, as all closes here */
int  pre_tokenizer_open(struct pre_tokenizer **out, const json_t *part, const char *where);
void pre_tokenizer_close(struct pre_tokenizer *p);
int  decoder_open(struct decoder **out, const json_t *part, const char *where);
void decoder_close(struct decoder *d);

struct parts_work *parts_work_new(const struct pre_tokenizer *p);
void parts_work_free(struct parts_work *w);

/* No step but NFC: what engines without normalizers read nearly alike. */
bool normalizer_is_nfc_or_none(const struct normalizer *n);
/* *out is the input itself when nothing changes, else a buffer of `w` that lives until the next call. */
int normalizer_run(const struct normalizer *n, struct parts_work *w, const char *text, size_t bytes, bool recent, size_t *lead,
                   const char **out, size_t *out_bytes);

/* The last step, and no other, maps bytes to the byte-level alphabet: words are then passed on as plain bytes. */
bool pre_tokenizer_raw_bytes(const struct pre_tokenizer *p);
typedef int word_sink(void *context, const char *word, size_t bytes);
int pre_tokenizer_run(const struct pre_tokenizer *p, struct parts_work *w, const char *text, size_t bytes, bool recent, size_t lead,
                      word_sink *sink, void *context);
/* How llama.cpp is told to split: the patterns and steps as one string, "Split Isolated REGEX\n...". malloc'd. */
char *pre_tokenizer_signature(const struct pre_tokenizer *p);

bool decoder_is_byte_level(const struct decoder *d);               /* some step is ByteLevel */
/* The bytes one token stands for inside a text. Appends to `out`. */
void decoder_token(const struct decoder *d, struct parts_work *w, const char *token, size_t bytes, struct buffer *out);
/* Tokens are collected, then decoded together into *text. */
void decoder_start(struct parts_work *w);
void decoder_add(struct parts_work *w, const char *token, size_t bytes);
int  decoder_finish(const struct decoder *d, struct parts_work *w, const char **text, size_t *bytes);

#endif
