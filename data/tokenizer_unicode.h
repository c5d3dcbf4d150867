/* Code points as tokenizers see them: UTF-8, general categories, and where the Unicode versions meet.
 *
 * Token ids were fixed by a Rust program that carries several Unicode versions: its regular expressions know Unicode 16, its
 * standard library 17, its normalization 9, its punctuation 8. PCRE2 and utf8proc carry whatever the distribution packaged
 * (14 and 15 on Debian 12). The functions here add the differences, so that a text gives the same ids on every machine.
 */
#ifndef DATA_TOKENIZER_UNICODE_H
#define DATA_TOKENIZER_UNICODE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A growing byte string, NUL-terminated once something was added. */
struct buffer { char *data; size_t n, capacity; };
void buffer_add(struct buffer *b, const void *data, size_t n);
void buffer_add_string(struct buffer *b, const char *s);

/* Next code point of valid UTF-8; advances *p. */
static inline uint32_t utf8_next(const char **p)
{
    const uint8_t *s = (const uint8_t *)*p;
    if (s[0] < 0x80) { *p += 1; return s[0]; }
    if (s[0] < 0xe0) { *p += 2; return (s[0] & 31u) << 6 | (s[1] & 63u); }
    if (s[0] < 0xf0) { *p += 3; return (s[0] & 15u) << 12 | (s[1] & 63u) << 6 | (s[2] & 63u); }
    *p += 4;
    return (s[0] & 7u) << 18 | (s[1] & 63u) << 12 | (s[2] & 63u) << 6 | (s[3] & 63u);
}
/* The code point that ends before p (p > start of valid UTF-8). */
static inline uint32_t utf8_before(const char *p)
{
    do p--; while (((uint8_t)*p & 0xc0) == 0x80);
    return utf8_next(&p);
}
int utf8_put(uint32_t c, char out[4]);                /* bytes written */
/* Offset of the first byte that is not valid UTF-8, -1 if all is. *recent: the text holds a code point PCRE2 may not know. */
int64_t utf8_check(const char *text, size_t n, bool *recent);

/* UTF8PROC_CATEGORY_* of a code point in Unicode 16. */
int unicode_category(uint32_t c);
bool unicode_is_space(uint32_t c);                    /* White_Space */
bool unicode_is_numeric(uint32_t c);                  /* N*, Unicode 17 */
bool unicode_is_punctuation(uint32_t c);              /* ASCII punctuation, P* of Unicode 8 */
bool unicode_is_word(uint32_t c);                     /* \w of Rust's regex: Alphabetic, M*, Nd, Pc, Join_Control */
bool unicode_is_mark(uint32_t c);                     /* M* of Unicode 9 */
bool unicode_is_inert(uint32_t c);                    /* no part in normalization: unassigned in Unicode 9 */
int unicode_lower(uint32_t c, uint32_t out[2]);       /* 1 or 2 code points */

enum normal_form { NFC, NFD, NFKC, NFKD };
struct normal_work { int32_t *code, *sorted; size_t code_n, code_capacity, sorted_capacity; };   /* starts as zeros */
void normal_work_free(struct normal_work *w);
/* Writes the normal form of valid UTF-8 into `out`; false, and nothing written, when the text is in that form already. */
bool unicode_normalize(enum normal_form form, struct normal_work *w, const char *text, size_t bytes, struct buffer *out);

/* Scripts whose members changed after Unicode 14. */
enum script { SCRIPT_OTHER, SCRIPT_HAN, SCRIPT_HIRAGANA, SCRIPT_KATAKANA, SCRIPT_LATIN, SCRIPT_CYRILLIC, SCRIPT_ARABIC,
              SCRIPT_DEVANAGARI, SCRIPT_KANNADA, SCRIPT_LAO, SCRIPT_MYANMAR };
/* Code points whose category is new or other in Unicode 16 than in Unicode 14. Sorted; ends with first = 0. */
struct unicode_recent { uint32_t first, last; uint8_t category, script; };
extern const struct unicode_recent unicode_recent[];

#endif
