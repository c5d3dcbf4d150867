/* Patterns of tokenizers: regular expressions as Oniguruma reads them, run by PCRE2; literals; and classes of characters.
 *
 * Owns: compiling them and the walk over the matches of a text. Does not own: the translation of the syntax (tokenizer_regex.h), what is
 * done with the matches.
 * A pattern is immutable; pattern_work belongs to one thread and serves all patterns.
 */
#ifndef DATA_TOKENIZER_PATTERN_H
#define DATA_TOKENIZER_PATTERN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct pattern;
struct pattern_work;

/* `where` names the file and the part, for messages. */
int  pattern_open_regex(struct pattern **out, const char *regex, size_t n, const char *where);
struct pattern *pattern_open_literal(const char *text, size_t n);
struct pattern *pattern_open_characters(bool (*test)(uint32_t));   /* each character that passes is one match */
struct pattern *pattern_open_words(void);                          /* \w+|[^\w\s]+ as Rust's regex reads it */
void pattern_close(struct pattern *p);                             /* NULL-safe */

struct pattern_work *pattern_work_new(void);
void pattern_work_free(struct pattern_work *w);                    /* NULL-safe */

/* The matches of a text, left to right; an empty match right behind the last match is none. */
struct pattern_scan { const struct pattern *pattern; struct pattern_work *work; const char *text; size_t n, at; int64_t last_end; bool recent; };
/* `recent`: the text may hold code points newer than PCRE2's tables (see utf8_check). */
struct pattern_scan pattern_scan_start(const struct pattern *p, struct pattern_work *w, const char *text, size_t n, bool recent);
/* *found is false behind the last match. ERR_INPUT when a match needs more steps than a sane pattern does. */
int pattern_scan_next(struct pattern_scan *s, size_t *start, size_t *end, bool *found);

#endif
