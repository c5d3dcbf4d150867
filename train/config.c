/* Reading and writing of configurations: YAML through libyaml's events -> struct config, and back.
 *
 * The accepted YAML is small on purpose: one document of two levels, section and key, whose values are scalars or lists of
 * scalars. Anchors, aliases, tags, further documents, deeper levels and keys given twice are refused with file and line:
 * each of them is a way for a file to say something else than what it seems to say.
 * What a key accepts is in the table of options.c; a value's type comes from there, never from how YAML would guess it.
 */
#include "train/config.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <utf8proc.h>
#include <yaml.h>

#include "base/error.h"
#include "base/file.h"
#include "train/options.h"

enum { MAX_CONFIG_BYTES = 1 << 20, MAX_TEXTS = 100000 };

/* ---- members ---- */

static void *member(const struct config *c, const struct option *o) { return (char *)c + o->offset; }

static void clear(struct config *c, const struct option *o)
{
    if (o->type == OPTION_TEXT || o->type == OPTION_CHOICE) {
        char **text = member(c, o);
        free(*text);
        *text = NULL;
    } else if (o->type == OPTION_TEXTS) {
        struct string_list *list = member(c, o);
        for (int i = 0; i < list->n; i++) free(list->item[i]);
        free(list->item);
        *list = (struct string_list){0};
    } else if (o->type == OPTION_REALS) {
        struct double_list *list = member(c, o);
        free(list->item);
        *list = (struct double_list){0};
    }
}

struct config *config_new(void)
{
    struct config *c = xcalloc(1, sizeof *c);
    for (int i = 0; i < option_count; i++) {
        const struct option *o = &options[i];
        if (*o->fallback) {
            char *assignment = xasprintf("%s=%s", o->key, o->fallback);
            CHECK(config_set(c, assignment) == OK, "%s", fail_message());
            free(assignment);
        } else if (o->type == OPTION_TEXT) *(char **)member(c, o) = xstrdup("");
    }
    return c;
}

void config_free(struct config *c)
{
    if (!c) return;
    for (int i = 0; i < option_count; i++) clear(c, &options[i]);
    free(c);
}

/* ---- numbers ---- */

/* "1_000" -> "1000": underscores between digits only. NULL when they stand elsewhere or the text is too long for a number. */
static const char *without_underscores(const char *text, char out[128])
{
    size_t n = 0;
    for (size_t i = 0; text[i]; i++) {
        if (n == 127) return NULL;
        if (text[i] != '_') { out[n++] = text[i]; continue; }
        if (!i || text[i - 1] < '0' || text[i - 1] > '9' || text[i + 1] < '0' || text[i + 1] > '9') return NULL;
    }
    out[n] = 0;
    return out;
}

/* Decimal notation only: [+-] digits [. digits] [e [+-] digits]. No hexadecimal, octal, infinity or NaN. */
static bool is_decimal(const char *s)
{
    s += *s == '+' || *s == '-';
    size_t whole = strspn(s, "0123456789");
    s += whole;
    if (*s == '.') {
        size_t fraction = strspn(++s, "0123456789");
        if (!whole && !fraction) return false;
        s += fraction;
    } else if (!whole) return false;
    if (*s == 'e' || *s == 'E') {
        s++;
        s += *s == '+' || *s == '-';
        size_t exponent = strspn(s, "0123456789");
        if (!exponent) return false;
        s += exponent;
    }
    return !*s;
}

/* The whole number a decimal text states exactly: 1e6 and 1.5e3 are whole, 0.5 and 1e-1 are not. The text is digits x 10^exponent
 * without leading and trailing zeros, so that it is whole where the exponent is not negative. Magnitudes of 10^18 and more become
 * +-10^18, which is outside every range. */
static bool whole_number(const char *s, int64_t *value)
{
    char digits[128];
    int n = 0;
    int64_t exponent = 0, v = 0;
    bool negative = *s == '-', fraction = false;
    for (s += *s == '+' || *s == '-'; *s && *s != 'e' && *s != 'E'; s++) {
        if (*s == '.') { fraction = true; continue; }
        if (n || *s != '0') digits[n++] = *s;
        exponent -= fraction;
    }
    if (*s) {
        int64_t e = strtol(s + 1, NULL, 10);       /* at most 127 characters: saturates */
        exponent += e > 1000000 ? 1000000 : e < -1000000 ? -1000000 : e;
    }
    while (n && digits[n - 1] == '0') { n--; exponent++; }
    if (n && exponent < 0) return false;
    if (n && n + exponent > 18) v = 1000000000000000000;
    else {
        for (int i = 0; i < n; i++) v = 10 * v + (digits[i] - '0');
        for (int64_t i = 0; n && i < exponent; i++) v *= 10;
    }
    *value = negative ? -v : v;
    return true;
}

/* ---- values ---- */

/* A piece of the input as messages show it: on one line, not longer than one. */
static const char *shown(const char *text)
{
    static _Thread_local char out[100];
    size_t n = strlen(text), keep = n < 80 ? n : 77;
    while (keep && keep < n && ((unsigned char)text[keep] & 0xc0) == 0x80) keep--;    /* not inside a character */
    for (size_t i = 0; i < keep; i++) out[i] = (unsigned char)text[i] < ' ' || text[i] == 127 ? '?' : text[i];
    strcpy(out + keep, keep < n ? "..." : "");
    return out;
}

static int out_of_range(const struct option *o, const char *where, const char *text)
{
    int digits = o->type == OPTION_WHOLE ? 16 : 15;                              /* 2^53 has 16 */
    return fail(ERR_USAGE, "%s: %s = %s is out of range: it must be %s%.*g and %s%.*g", where, o->key, shown(text),
                o->above ? "above " : "at least ", digits, o->low, o->below ? "below " : "at most ", digits, o->high);
}

static int set_real(const struct option *o, const char *where, const char *text, double *value)
{
    char digits[128];
    const char *s = without_underscores(text, digits);
    const char *unsigned_text = text + (*text == '+' || *text == '-');
    if (!strcasecmp(unsigned_text, ".inf") || !strcasecmp(unsigned_text, "inf") || !strcasecmp(unsigned_text, "infinity") || !strcasecmp(unsigned_text, ".nan") || !strcasecmp(unsigned_text, "nan"))
        return fail(ERR_USAGE, "%s: %s must be a finite number, not %s", where, o->key, shown(text));
    if (!s || !is_decimal(s)) return fail(ERR_USAGE, "%s: %s must be a number, not '%s'", where, o->key, shown(text));
    double v = strtod(s, NULL);
    if (!isfinite(v) || v < o->low || v > o->high || (o->above && v == o->low) || (o->below && v == o->high)) return out_of_range(o, where, text);
    *value = v + 0.0;                              /* -0 becomes 0 */
    return OK;
}

static int set_whole(const struct option *o, const char *where, const char *text, int64_t *value)
{
    char digits[128];
    const char *s = without_underscores(text, digits);
    int64_t v;
    if (!s || !is_decimal(s) || !whole_number(s, &v)) return fail(ERR_USAGE, "%s: %s must be a whole number, not '%s'", where, o->key, shown(text));
    if (v < (int64_t)o->low || v > (int64_t)o->high) return out_of_range(o, where, text);
    *value = v;
    return OK;
}

static int set_switch(const struct option *o, const char *where, const char *text, bool *value)
{
    if (!strcasecmp(text, "true") || !strcasecmp(text, "yes") || !strcasecmp(text, "on")) *value = true;
    else if (!strcasecmp(text, "false") || !strcasecmp(text, "no") || !strcasecmp(text, "off")) *value = false;
    else return fail(ERR_USAGE, "%s: %s must be true or false, not '%s'", where, o->key, shown(text));
    return OK;
}

static int no_value(const struct option *o, const char *where)
{
    return fail(ERR_USAGE, "%s: %s has no value; give it one or remove the key%s", where, o->key,
                o->type == OPTION_TEXT && !*o->fallback ? " ('' is the empty text)" : "");
}

/* `plain`: written without quotes, where YAML's words for nothing mean nothing. */
static int set_scalar(struct config *c, const struct option *o, const char *where, const char *text, bool plain)
{
    int rc;
    if (plain && (!*text || !strcmp(text, "~") || !strcmp(text, "null") || !strcmp(text, "Null") || !strcmp(text, "NULL"))) return no_value(o, where);
    if (!*text && (o->type != OPTION_TEXT || *o->fallback)) return fail(ERR_USAGE, "%s: %s must not be empty", where, o->key);
    switch (o->type) {
    case OPTION_WHOLE:  return set_whole(o, where, text, member(c, o));
    case OPTION_REAL:   return set_real(o, where, text, member(c, o));
    case OPTION_SWITCH: return set_switch(o, where, text, member(c, o));
    case OPTION_CHOICE:
        if (!option_lists(o->choices, text)) return fail(ERR_USAGE, "%s: %s must be one of %s, not '%s'", where, o->key, o->choices, shown(text));
        /* fall through */
    case OPTION_TEXT:
        clear(c, o);
        *(char **)member(c, o) = xstrdup(text);
        return OK;
    case OPTION_TEXTS: {
        struct string_list *list = member(c, o);
        if (list->n == MAX_TEXTS) return fail(ERR_USAGE, "%s: %s has more than %d items; name a directory or a pattern", where, o->key, MAX_TEXTS);
        list->item = xrealloc(list->item, (size_t)(list->n + 1) * sizeof *list->item);
        list->item[list->n++] = xstrdup(text);
        return OK;
    }
    case OPTION_REALS: {
        struct double_list *list = member(c, o);
        double value;
        if ((rc = set_real(o, where, text, &value)) != OK) return rc;
        if (list->n == OPTION_MAX_ITEMS) return fail(ERR_USAGE, "%s: %s has more than %d items", where, o->key, OPTION_MAX_ITEMS);
        for (int i = 0; i < list->n; i++)
            if (list->item[i] == value) return fail(ERR_USAGE, "%s: %s lists %.15g twice", where, o->key, value);
        list->item = xrealloc(list->item, (size_t)(list->n + 1) * sizeof *list->item);
        list->item[list->n++] = value;
        return OK;
    }
    }
    return OK;
}

/* ---- names ---- */

/* Levenshtein distance; names longer than any key are simply far. */
static int distance(const char *a, const char *b)
{
    enum { MAX = 64 };
    int row[MAX + 1], n = (int)strnlen(a, MAX + 1), m = (int)strnlen(b, MAX + 1);
    if (n > MAX || m > MAX) return MAX;
    for (int j = 0; j <= m; j++) row[j] = j;
    for (int i = 1; i <= n; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= m; j++) {
            int best = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            if (row[j] + 1 < best) best = row[j] + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            row[j] = best;
        }
    }
    return row[m];
}

static const struct option *find(const char *key)
{
    for (int i = 0; i < option_count; i++) if (!strcmp(options[i].key, key)) return &options[i];
    return NULL;
}

static const char *key_part(const char *key) { const char *dot = strchr(key, '.'); return dot ? dot + 1 : key; }

static int unknown_key(const char *where, const char *key)
{
    const struct option *nearest = NULL;
    int best = 1 + (int)(strnlen(key, 64) + 2) / 4, d;
    for (int i = 0; i < option_count; i++) {
        d = distance(key, options[i].key);
        if (d > 1 && !strcmp(key_part(key), key_part(options[i].key))) d = 1;    /* right key, wrong section or none */
        if (d < best) { best = d; nearest = &options[i]; }
    }
    if (nearest) return fail(ERR_USAGE, "%s: unknown key %s; did you mean %s?", where, shown(key), nearest->key);
    return fail(ERR_USAGE, "%s: unknown key %s; --help of the command lists the keys", where, shown(key));
}

static bool is_section(const char *name)
{
    size_t n = strlen(name);
    for (int i = 0; i < option_count; i++) if (!strncmp(options[i].key, name, n) && options[i].key[n] == '.') return true;
    return false;
}

static int unknown_section(const char *where, const char *name)
{
    char nearest[64] = "";
    int best = 1 + (int)(strnlen(name, 64) + 2) / 3;
    for (int i = 0; i < option_count; i++) {
        char section[64];
        snprintf(section, sizeof section, "%.*s", (int)(strchr(options[i].key, '.') - options[i].key), options[i].key);
        int d = distance(name, section);
        if (d < best) { best = d; strcpy(nearest, section); }
    }
    if (*nearest) return fail(ERR_USAGE, "%s: unknown section %s; did you mean %s?", where, shown(name), nearest);
    return fail(ERR_USAGE, "%s: unknown section %s; --help of the command lists the keys", where, shown(name));
}

/* ---- YAML ---- */

struct reader {
    yaml_parser_t parser;
    yaml_event_t event;              /* the current one; all zero before the first */
    const char *name;
    bool lines;                      /* false: the text is not a file's, its lines say nothing */
    char where[512];                 /* "name:line" of the current event */
    int *key_line;                   /* [option_count] where a key was set, 0: not yet */
};

static void set_where(struct reader *r, size_t line)
{
    if (r->lines) snprintf(r->where, sizeof r->where, "%.400s:%zu", r->name, line + 1);
    else snprintf(r->where, sizeof r->where, "%.400s", r->name);
}

static int text_error(struct reader *r)
{
    yaml_parser_t *p = &r->parser;
    if (p->error == YAML_READER_ERROR)
        return fail(ERR_USAGE, "%s: byte %zu: %s; a configuration is UTF-8 text", r->name, p->problem_offset, p->problem);
    set_where(r, p->problem_mark.line);
    const char *context = p->context ? p->context : "";
    return fail(ERR_USAGE, "%s: not valid YAML: %s%s", r->where, p->problem ? p->problem : "cannot be parsed",
                strstr(context, "alias") ? "; quote a text that begins with *" : strstr(context, "anchor") ? "; quote a text that begins with &" : "");
}

static int next(struct reader *r)
{
    yaml_event_t *e = &r->event;
    yaml_event_delete(e);
    memset(e, 0, sizeof *e);
    if (!yaml_parser_parse(&r->parser, e)) return text_error(r);
    set_where(r, e->start_mark.line);
    if (e->type == YAML_ALIAS_EVENT)
        return fail(ERR_USAGE, "%s: aliases (*%s) are not used in configurations; quote a text that begins with *", r->where, shown((const char *)e->data.alias.anchor));
    const yaml_char_t *anchor = NULL, *tag = NULL;
    if (e->type == YAML_SCALAR_EVENT) { anchor = e->data.scalar.anchor; tag = e->data.scalar.tag; }
    if (e->type == YAML_SEQUENCE_START_EVENT) { anchor = e->data.sequence_start.anchor; tag = e->data.sequence_start.tag; }
    if (e->type == YAML_MAPPING_START_EVENT) { anchor = e->data.mapping_start.anchor; tag = e->data.mapping_start.tag; }
    if (anchor) return fail(ERR_USAGE, "%s: anchors (&%s) are not used in configurations; quote a text that begins with &", r->where, shown((const char *)anchor));
    if (tag) return fail(ERR_USAGE, "%s: tags (%s) are not used in configurations; quote a text that begins with !", r->where, shown((const char *)tag));
    if (e->type == YAML_SCALAR_EVENT && strlen((const char *)e->data.scalar.value) != e->data.scalar.length)
        return fail(ERR_USAGE, "%s: a text holds a NUL byte", r->where);
    return OK;
}

static const char *scalar(const struct reader *r) { return (const char *)r->event.data.scalar.value; }
static bool is_plain(const struct reader *r) { return r->event.data.scalar.style == YAML_PLAIN_SCALAR_STYLE; }

/* The current event is the value of `o`: a scalar or a list; a list key takes one scalar as a list of one. */
static int read_value(struct reader *r, struct config *c, const struct option *o)
{
    bool list = o->type == OPTION_TEXTS || o->type == OPTION_REALS;
    int rc = OK;
    if (list) clear(c, o);
    if (r->event.type == YAML_SCALAR_EVENT) return set_scalar(c, o, r->where, scalar(r), is_plain(r));
    if (r->event.type != YAML_SEQUENCE_START_EVENT)
        return fail(ERR_USAGE, "%s: %s holds further keys; a configuration has two levels, section and key", r->where, o->key);
    if (!list) return fail(ERR_USAGE, "%s: %s takes one value, not a list", r->where, o->key);
    for (int n = 0;; n++) {
        TRY(next(r));
        if (r->event.type == YAML_SEQUENCE_END_EVENT) {
            if (!n && *o->fallback) rc = no_value(o, r->where);
            goto out;
        }
        if (r->event.type != YAML_SCALAR_EVENT) return fail(ERR_USAGE, "%s: the items of %s must be plain values", r->where, o->key);
        TRY(set_scalar(c, o, r->where, scalar(r), is_plain(r)));
    }
out:
    return rc;
}

static int read_section(struct reader *r, struct config *c, const char *section)
{
    char *key = NULL;
    int rc = OK;
    for (;;) {
        TRY(next(r));
        if (r->event.type == YAML_MAPPING_END_EVENT) goto out;
        if (r->event.type != YAML_SCALAR_EVENT) { rc = fail(ERR_USAGE, "%s: a key of section %s is not a name", r->where, section); goto out; }
        free(key);
        key = xasprintf("%s.%s", section, scalar(r));
        const struct option *o = find(key);
        if (!o) { rc = unknown_key(r->where, key); goto out; }
        int *line = &r->key_line[o - options];
        if (*line) { rc = fail(ERR_USAGE, "%s: %s is given twice, first on line %d", r->where, key, *line); goto out; }
        *line = (int)r->event.start_mark.line + 1;
        TRY(next(r));
        TRY(read_value(r, c, o));
    }
out:
    free(key);
    return rc;
}

/* The current event is a key of the top level. */
static int read_top(struct reader *r, struct config *c, bool *section_seen)
{
    char *name = NULL;
    int rc = OK, at = 0;
    if (r->event.type != YAML_SCALAR_EVENT) return fail(ERR_USAGE, "%s: a section is not a name", r->where);
    name = xstrdup(scalar(r));
    if (!is_section(name)) {
        char *where = xstrdup(r->where);
        bool value = next(r) == OK && r->event.type != YAML_MAPPING_START_EVENT;      /* "lr: 1" at the top: a key that lost its section */
        rc = value || strchr(name, '.') ? unknown_key(where, name) : unknown_section(where, name);
        if (value && find(name))
            rc = fail(ERR_USAGE, "%s: %s: write the section on a line of its own (%.*s:) and below it, indented, %s", where, name, (int)strcspn(name, "."), name, key_part(name));
        free(where);
        goto out;
    }
    while (strncmp(options[at].key, name, strlen(name)) || options[at].key[strlen(name)] != '.') at++;
    if (section_seen[at]) { rc = fail(ERR_USAGE, "%s: section %s is given twice; put its keys together", r->where, name); goto out; }
    section_seen[at] = true;
    TRY(next(r));
    if (r->event.type == YAML_SCALAR_EVENT && is_plain(r) && !*scalar(r)) goto out;    /* a section whose keys are all commented out */
    if (r->event.type != YAML_MAPPING_START_EVENT) { rc = fail(ERR_USAGE, "%s: section %s must hold keys, one per line and indented", r->where, name); goto out; }
    TRY(read_section(r, c, name));
out:
    free(name);
    return rc;
}

static int read_text(struct config *c, const char *text, size_t bytes, const char *name, bool lines)
{
    struct reader r = {.name = name, .lines = lines};
    bool *section_seen = xcalloc((size_t)option_count, sizeof *section_seen);    /* at the section's first option */
    int rc = OK;
    r.key_line = xcalloc((size_t)option_count, sizeof *r.key_line);
    if (!yaml_parser_initialize(&r.parser)) { rc = fail(ERR_IO, "%s: no memory to parse it", name); goto out; }
    yaml_parser_set_input_string(&r.parser, (const unsigned char *)text, bytes);
    TRY(next(&r));                                                               /* stream start */
    TRY(next(&r));
    if (r.event.type != YAML_DOCUMENT_START_EVENT) { rc = fail(ERR_USAGE, "%s: is empty; a configuration is sections of keys", name); goto out; }
    TRY(next(&r));
    if (r.event.type != YAML_MAPPING_START_EVENT) { rc = fail(ERR_USAGE, "%s: a configuration is sections of keys, 'section:' and below it, indented, 'key: value'", r.where); goto out; }
    for (;;) {
        TRY(next(&r));
        if (r.event.type == YAML_MAPPING_END_EVENT) break;
        TRY(read_top(&r, c, section_seen));
    }
    TRY(next(&r));                                                               /* document end */
    TRY(next(&r));
    if (r.event.type != YAML_STREAM_END_EVENT) rc = fail(ERR_USAGE, "%s: a second YAML document begins; a configuration is one", r.where);
out:
    yaml_event_delete(&r.event);
    yaml_parser_delete(&r.parser);
    free(r.key_line);
    free(section_seen);
    return rc;
}

int config_read_text(struct config *c, const char *text, size_t bytes, const char *name) { return read_text(c, text, bytes, name, true); }

int config_read_file(struct config *c, const char *path)
{
    char *text = NULL;
    size_t bytes;
    int rc = file_read(path, MAX_CONFIG_BYTES, &text, &bytes);
    if (rc == ERR_INPUT) rc = ERR_USAGE;                                         /* a directory, or too large for what it should be */
    if (rc != OK) goto out;
    TRY(config_read_text(c, text, bytes, path));
out:
    free(text);
    return rc;
}

/* ---- --set ---- */

static int check_utf8(const char *text, const char *key)
{
    utf8proc_int32_t code;
    for (const char *s = text; *s;) {
        utf8proc_ssize_t n = utf8proc_iterate((const utf8proc_uint8_t *)s, -1, &code);
        if (n <= 0) return fail(ERR_USAGE, "--set %s: the value is not valid UTF-8 at byte %td", key, s - text);
        s += n;
    }
    return OK;
}

static int set_list(struct config *c, const struct option *o, const char *value)
{
    int rc = OK;
    clear(c, o);
    if (*value == '[') {                                                         /* as in a file: through the same reader */
        char *text = xasprintf("%.*s:\n  %s: %s\n", (int)(key_part(o->key) - 1 - o->key), o->key, key_part(o->key), value);
        rc = strpbrk(value, "\r\n") ? fail(ERR_USAGE, "--set: %s: a list stands on one line", o->key) : read_text(c, text, strlen(text), "--set", false);
        free(text);
        return rc;
    }
    for (const char *s = value;; s++) {
        size_t n = strcspn(s, ",");
        const char *end = s + n;
        while (s < end && *s == ' ') s++;
        while (end > s && end[-1] == ' ') end--;
        char *item = xstrndup(s, (size_t)(end - s));
        rc = set_scalar(c, o, "--set", item, true);
        free(item);
        s += strcspn(s, ",");
        if (rc != OK || !*s) return rc;
    }
}

int config_set(struct config *c, const char *assignment)
{
    const char *equals = strchr(assignment, '=');
    if (!equals) return fail(ERR_USAGE, "--set %s: write section.key=value", shown(assignment));
    char *key = xstrndup(assignment, (size_t)(equals - assignment));
    const char *value = equals + 1;
    const struct option *o = find(key);
    int rc = OK;
    if (!o) { rc = unknown_key("--set", key); goto out; }
    TRY(check_utf8(value, key));
    if (o->type == OPTION_TEXTS || o->type == OPTION_REALS) rc = set_list(c, o, value);
    else if (!strcmp(value, "''") || !strcmp(value, "\"\"")) rc = set_scalar(c, o, "--set", "", false);
    else if (!*value) rc = no_value(o, "--set");
    else rc = set_scalar(c, o, "--set", value, o->type != OPTION_TEXT);          /* a text is taken as it is, "null" included */
out:
    free(key);
    return rc;
}

/* ---- writing ---- */

/* A scalar that every YAML reader takes for text: plain where that is safe, else in double quotes with escapes for what YAML's
 * character set or line folding would not keep. */
static void write_text(FILE *f, const char *text)
{
    static const char *const words[] = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"};
    bool plain = strchr("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ/", *text) && *text
                 && strspn(text, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./+@") == strlen(text);
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) if (!strcasecmp(text, words[i])) plain = false;
    if (plain) { fputs(text, f); return; }
    fputc('"', f);
    for (const char *s = text; *s;) {
        utf8proc_int32_t code;
        utf8proc_ssize_t n = utf8proc_iterate((const utf8proc_uint8_t *)s, -1, &code);
        CHECK(n > 0, "a configuration text is not UTF-8");
        if (code == '"' || code == '\\') fprintf(f, "\\%c", (int)code);
        else if (code == '\n') fputs("\\n", f);
        else if (code == '\t') fputs("\\t", f);
        else if (code < 0x20 || (code >= 0x7f && code <= 0xa0)) fprintf(f, "\\x%02x", (unsigned)code);
        else if (code == 0x2028 || code == 0x2029 || code == 0xfeff || (code >= 0xfffe && code <= 0xffff)) fprintf(f, "\\u%04x", (unsigned)code);
        else fwrite(s, 1, (size_t)n, f);
        s += n;
    }
    fputc('"', f);
}

/* The shortest digits that read back to the same double, with a point, which YAML 1.1 wants in a number with an exponent. */
static void write_real(FILE *f, double value)
{
    char text[40];
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, value);
        if (strtod(text, NULL) == value) break;
    }
    char *e = strchr(text, 'e');
    if (strchr(text, '.')) fputs(text, f);
    else if (e) fprintf(f, "%.*s.0%s", (int)(e - text), text, e);
    else fprintf(f, "%s.0", text);
}

static void write_value(FILE *f, const struct config *c, const struct option *o)
{
    const void *m = member(c, o);
    const struct string_list *texts = m;
    const struct double_list *reals = m;
    switch (o->type) {
    case OPTION_TEXT: case OPTION_CHOICE: write_text(f, *(char *const *)m); break;
    case OPTION_WHOLE:  fprintf(f, "%lld", (long long)*(const int64_t *)m); break;
    case OPTION_REAL:   write_real(f, *(const double *)m); break;
    case OPTION_SWITCH: fputs(*(const bool *)m ? "true" : "false", f); break;
    case OPTION_TEXTS:
        fputc('[', f);
        for (int i = 0; i < texts->n; i++) { fputs(i ? ", " : "", f); write_text(f, texts->item[i]); }
        fputc(']', f);
        break;
    case OPTION_REALS:
        fputc('[', f);
        for (int i = 0; i < reals->n; i++) { fputs(i ? ", " : "", f); write_real(f, reals->item[i]); }
        fputc(']', f);
        break;
    }
}

char *config_to_yaml(const struct config *c)
{
    char *text = NULL;
    size_t bytes;
    FILE *f = open_memstream(&text, &bytes);
    CHECK(f, "no memory for the text of a configuration");
    fputs("# Every key with the value that was used, defaults included. Replay: distill <command> THIS_FILE\n", f);
    const char *section = "";
    for (int i = 0; i < option_count; i++) {
        const struct option *o = &options[i];
        size_t n = (size_t)(key_part(o->key) - o->key);
        if (strncmp(section, o->key, n)) fprintf(f, "\n%.*s:\n", (int)n - 1, o->key);
        section = o->key;
        char *range = option_range(o);
        fprintf(f, "  # %s", o->help);
        if (option_has_range(o)) fprintf(f, " (%s)", range);
        if (*o->fallback) fprintf(f, "; default %s", o->fallback);
        fprintf(f, "\n  %s: ", key_part(o->key));
        write_value(f, c, o);
        fputc('\n', f);
        free(range);
    }
    CHECK(!fclose(f), "no memory for the text of a configuration");
    return text;
}

static char *value_text(const struct config *c, const struct option *o)
{
    char *text = NULL;
    size_t bytes;
    FILE *f = open_memstream(&text, &bytes);
    CHECK(f, "no memory for the text of %s", o->key);
    write_value(f, c, o);
    CHECK(!fclose(f), "no memory for the text of %s", o->key);
    return text;
}

char *config_differences(const struct config *was, const struct config *is, enum command_id command)
{
    char *all = xstrdup("");
    for (int i = 0; i < option_count; i++) {
        if (!(options[i].commands >> command & 1)) continue;
        char *a = value_text(was, &options[i]), *b = value_text(is, &options[i]), *before = all;
        if (strcmp(a, b)) {
            all = xasprintf("%s%s%s %s -> %s", before, *before ? ", " : "", options[i].key, a, b);
            free(before);
        }
        free(a);
        free(b);
    }
    return all;
}

int config_write(const struct config *c, const char *path)
{
    char *text = config_to_yaml(c);
    int rc = file_replace(path, text, strlen(text));
    free(text);
    return rc;
}
