/* See json.h. */
#include "base/json.h"

#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"

int json_read_text(const char *text, size_t bytes, const char *name, json_t **root)
{
    json_error_t e;
    *root = NULL;
    if (memchr(text, 0, bytes)) return fail(ERR_INPUT, "%s: not valid JSON: it contains a NUL byte", name);   /* jansson would skip one behind a number */
    *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &e);
    if (!*root) return fail(ERR_INPUT, "%s: not valid JSON: line %d, column %d: %s", name, e.line, e.column, e.text);
    return OK;
}

int json_read_file(const char *path, size_t max_bytes, json_t **root)
{
    char *text = NULL;
    size_t bytes;
    int rc = OK;
    TRY(file_read(path, max_bytes, &text, &bytes));
    TRY(json_read_text(text, bytes, path, root));
out:
    free(text);
    return rc;
}

char *json_canonical(const json_t *value)
{
    return json_dumps(value, JSON_COMPACT | JSON_SORT_KEYS | JSON_ENCODE_ANY);
}

bool json_says_nothing(const json_t *value)
{
    return json_is_null(value) || json_is_false(value) || (json_is_object(value) && !json_object_size(value)) || (json_is_array(value) && !json_array_size(value));
}

const char *json_shown(const json_t *value, char text[80])
{
    char *s = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT | JSON_ENSURE_ASCII);
    snprintf(text, 80, strlen(s) < 80 ? "%s" : "%.76s...", s);
    free(s);
    return text;
}

int json_write_file(const char *path, const json_t *value)
{
    /* 15 digits keep what a person wrote (1e-06, not 9.9999999999999995e-07); 17 when a number needs them */
    char *text = json_dumps(value, JSON_INDENT(2) | JSON_ENCODE_ANY | JSON_REAL_PRECISION(15));
    CHECK(text, "JSON value for %s cannot be written", path);
    json_t *again = json_loads(text, JSON_DECODE_ANY, NULL);
    if (!json_equal(again, value)) {
        free(text);
        text = json_dumps(value, JSON_INDENT(2) | JSON_ENCODE_ANY | JSON_REAL_PRECISION(17));
    }
    json_decref(again);
    char *line = xasprintf("%s\n", text);
    int rc = file_replace(path, line, strlen(line));
    free(line);
    free(text);
    return rc;
}

static int wrong(const char *where, const char *key, const char *type)
{
    return fail(ERR_INPUT, "%s: key \"%s\" is not %s", where, key, type);
}

int json_get_int(const json_t *o, const char *key, const char *where, int64_t fallback, int64_t *value)
{
    const json_t *v = json_object_get(o, key);
    *value = fallback;
    if (!v || json_is_null(v)) return OK;
    double real = json_is_real(v) ? json_real_value(v) : 0.5;
    if (fabs(real) < 0x1p53 && real == floor(real)) *value = (int64_t)real;
    else if (json_is_integer(v)) *value = json_integer_value(v);
    else return wrong(where, key, "an integer");
    return OK;
}

int json_get_double(const json_t *o, const char *key, const char *where, double fallback, double *value)
{
    const json_t *v = json_object_get(o, key);
    *value = fallback;
    if (!v || json_is_null(v)) return OK;
    if (!json_is_number(v)) return wrong(where, key, "a number");
    *value = json_number_value(v);
    return OK;
}

int json_get_bool(const json_t *o, const char *key, const char *where, bool fallback, bool *value)
{
    const json_t *v = json_object_get(o, key);
    *value = fallback;
    if (!v || json_is_null(v)) return OK;
    if (!json_is_boolean(v)) return wrong(where, key, "true or false");
    *value = json_is_true(v);
    return OK;
}

int json_get_string(const json_t *o, const char *key, const char *where, const char *fallback, const char **value)
{
    const json_t *v = json_object_get(o, key);
    *value = fallback;
    if (!v || json_is_null(v)) return OK;
    if (!json_is_string(v)) return wrong(where, key, "a string");
    *value = json_string_value(v);
    return OK;
}
