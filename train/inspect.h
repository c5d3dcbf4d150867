/* distill inspect: what its parts share. A report is written once and comes out as aligned text while it is made, or as one JSON object at its
 * end. inspect.c finds out what a path is and lists files; inspect_model.c looks into models and checkpoints, inspect_dataset.c into shards. */
#ifndef TRAIN_INSPECT_H
#define TRAIN_INSPECT_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "data/tokenizer.h"

struct report {
    bool json;
    json_t *root, *section;        /* of the JSON object; kept in text mode too, it is small */
    int sections;
};

/* Starts object root[key]; in text, a line with the title. */
void report_section(struct report *r, const char *key, const char *title);
/* section[key] = value (a reference that is taken; NULL: text only), and in text one line: label, formatted words. */
void report_line(struct report *r, const char *key, json_t *value, const char *label, const char *fmt, ...) __attribute__((format(printf, 5, 6)));
/* The same with a number or a text as it is. */
void report_int(struct report *r, const char *key, const char *label, int64_t value);
void report_text(struct report *r, const char *key, const char *label, const char *value);

struct inspect_options {
    const char *path, *tokenizer;  /* tokenizer NULL: none given */
    int64_t row;                   /* -1: no row */
    int top;                       /* teacher choices shown per position */
    bool verify, repair, jsonl;
    int64_t first_row, end_row;    /* --rows; end 0: not given */
    const char *against, *device;  /* a model's directory; where it runs */
    int64_t sample, seed, threads; /* rows compared with it */
};

int inspect_model(struct report *r, const struct inspect_options *o);
/* `path` is the dataset's directory; shard -1: all of it. */
int inspect_dataset(struct report *r, const struct inspect_options *o, const char *path, int64_t shard);
int inspect_verify(struct report *r, const struct inspect_options *o);     /* --verify, --repair */
int inspect_against(struct report *r, const struct inspect_options *o);    /* --against */
int inspect_rows(const struct inspect_options *o);                         /* --rows --jsonl: to stdout, a line per row */

/* "1.50 GiB", "12 B" into a static buffer of this thread; four may be in use at a time */
const char *bytes_text(int64_t bytes);
/* Bytes as a reader can see them: \n, \t, \\, \" and \xNN for what is not printable UTF-8. malloc'd */
char *escaped(const char *bytes, size_t n);
int display_width(const char *utf8);      /* columns on a terminal */

#endif
