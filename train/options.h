/* The table of configuration keys, shared by options.c (the table, --help, the reference) and config.c (reading, writing).
 * Everything that is said about a key is said once, in its row. */
#ifndef TRAIN_OPTIONS_H
#define TRAIN_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>

#include "train/config.h"

/* member of struct config:  TEXT char *   CHOICE char *   WHOLE int64_t   REAL double   SWITCH bool   TEXTS string_list   REALS double_list */
enum option_type { OPTION_TEXT, OPTION_CHOICE, OPTION_WHOLE, OPTION_REAL, OPTION_SWITCH, OPTION_TEXTS, OPTION_REALS };

struct option {
    const char *key;               /* "section.key" */
    enum option_type type;
    size_t offset;                 /* in struct config */
    const char *fallback;          /* the default as --set takes it; "" is the empty text or list, and only such a key may be empty */
    double low, high;              /* of WHOLE, REAL and every item of REALS */
    bool above, below;             /* low, high themselves are outside */
    const char *choices;           /* CHOICE: "a|b|c" */
    unsigned commands;             /* bit 1 << enum command_id */
    const char *help;              /* one line */
};

extern const struct option options[];
extern const int option_count;
enum { OPTION_MAX_ITEMS = 8 };     /* of a list of numbers */

/* "0 to 1", "above 0 to 10", "a|b|c", "text", ...: what the key accepts. malloc'd */
char *option_range(const struct option *o);
/* Does the range say more than the type's name? */
bool option_has_range(const struct option *o);
/* Does the |-separated list name `text`? */
bool option_lists(const char *choices, const char *text);

#endif
