/* Regular expressions of tokenizer.json, written for Oniguruma, rewritten for PCRE2 with the same meaning or refused by name. */
#ifndef DATA_TOKENIZER_REGEX_H
#define DATA_TOKENIZER_REGEX_H

#include <stdbool.h>
#include <stddef.h>

/* *out: the pattern for PCRE2 (UTF, UCP, newline LF), malloc'd. `exact` adds the code points of Unicode 15 and 16 to every
 * property. `where` names the file and the part, for messages; ERR_INPUT. */
int regex_translate(char **out, const char *regex, size_t n, bool exact, const char *where);

#endif
