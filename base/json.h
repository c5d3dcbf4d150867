/* JSON through jansson, for untrusted files: bounded size, duplicate keys refused, errors that name file, line and key. */
#ifndef BASE_JSON_H
#define BASE_JSON_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Parses a file of at most max_bytes; *root is a new reference. ERR_INPUT when it is not JSON. */
int json_read_file(const char *path, size_t max_bytes, json_t **root);
/* Parses text; `name` is for the message. */
int json_read_text(const char *text, size_t bytes, const char *name, json_t **root);
/* One line without spaces, keys sorted: the canonical form used for hashes. malloc'd. */
char *json_canonical(const json_t *value);
/* null, false or empty: a key with such a value asks for nothing. */
bool json_says_nothing(const json_t *value);
/* The value as a file has it, cut to fit a message; returns `text`. */
const char *json_shown(const json_t *value, char text[80]);
/* Pretty-printed with 2 spaces and a final newline, written with file_replace(). */
int json_write_file(const char *path, const json_t *value);

/* Typed members of object `o`. A missing or null key gives `fallback`; a wrong type is ERR_INPUT naming `where` and the key. */
int json_get_int(const json_t *o, const char *key, const char *where, int64_t fallback, int64_t *value);
int json_get_double(const json_t *o, const char *key, const char *where, double fallback, double *value);
int json_get_bool(const json_t *o, const char *key, const char *where, bool fallback, bool *value);
int json_get_string(const json_t *o, const char *key, const char *where, const char *fallback, const char **value); /* borrowed */

#endif
