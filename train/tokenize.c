/* distill tokenize: lines of text to lines of ids and back, streaming: memory holds one line.
 *
 * Owns: the formats of this command. Without --jsonl a line is a text (its newline is not part of it) and its ids are decimal
 * numbers separated by spaces; with it a line is {"text": ...} and {"ids": [...]}. Does not own: the tokenizer, corpora.
 */
#include "train/tokenize.h"

#include <errno.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "data/tokenizer.h"
#include "data/tokenizer_unicode.h"

enum { MAX_LINE = 256 << 20, READ_BYTES = 1 << 20, WRITE_BYTES = 1 << 20 };

static const char help[] =
    "usage: distill tokenize --tokenizer PATH [--jsonl] [--text-field NAME] [--decode] [--special] < in > out\n"
    "\n"
    "Turns each line of text on standard input into one line of token ids on standard output, or ids into text.\n"
    "\n"
    "  --tokenizer PATH    tokenizer.json, or a directory that holds one (required)\n"
    "  --jsonl             lines are JSON objects: {\"text\": \"...\"} in, {\"ids\": [...]} out (default: plain text, ids separated by spaces)\n"
    "  --text-field NAME   with --jsonl: the key of the text (default: text)\n"
    "  --decode            ids in, text out (default: text in, ids out)\n"
    "  --special           encoding: begin with the bos token if the tokenizer adds one; decoding: keep special tokens (default: neither)\n"
    "  --help              this text\n"
    "\n"
    "example: distill tokenize --tokenizer Qwen2.5-0.5B --jsonl < corpus.jsonl > ids.jsonl\n";

struct options { const char *tokenizer, *text_field; bool jsonl, decode, special, help; };

struct stream {
    struct options o;
    struct tokenizer *t;
    struct tokenizer_work *w;
    char *in;                      /* the bytes read and not yet consumed: [in_at, in_n) */
    size_t in_at, in_n, in_capacity;
    bool in_end;
    struct buffer out;
    int64_t line;
};

static int parse_options(int argc, char **argv, struct options *o)
{
    *o = (struct options){.text_field = "text"};
    for (int i = 1; i < argc; i++) {
        const char *a = argv[i], **value = !strcmp(a, "--tokenizer") ? &o->tokenizer : !strcmp(a, "--text-field") ? &o->text_field : NULL;
        if (value) {
            if (++i == argc) return fail(ERR_USAGE, "%s needs a value; see distill tokenize --help", a);
            *value = argv[i];
        } else if (!strcmp(a, "--jsonl")) o->jsonl = true;
        else if (!strcmp(a, "--decode")) o->decode = true;
        else if (!strcmp(a, "--special")) o->special = true;
        else if (!strcmp(a, "--help") || !strcmp(a, "-h")) o->help = true;
        else return fail(ERR_USAGE, "unknown argument \"%s\"; see distill tokenize --help", a);
    }
    if (!o->help && !o->tokenizer) return fail(ERR_USAGE, "--tokenizer PATH is missing; see distill tokenize --help");
    return OK;
}

static int flush(struct stream *s)
{
    for (size_t at = 0; at < s->out.n;) {
        ssize_t n = write(STDOUT_FILENO, s->out.data + at, s->out.n - at);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return fail_errno(ERR_IO, "standard output");
        at += (size_t)n;
    }
    s->out.n = 0;
    return OK;
}

/* The next line without its newline; *line is NULL at the end. It lives until the next call and may be written to. */
static int next_line(struct stream *s, char **line, size_t *bytes)
{
    size_t searched = 0;
    for (;;) {
        size_t left = s->in_n - s->in_at;
        char *start = s->in + s->in_at, *newline = left > searched ? memchr(start + searched, '\n', left - searched) : NULL;
        if (newline || (s->in_end && left)) {
            *line = start;
            *bytes = newline ? (size_t)(newline - start) : left;
            s->in_at += *bytes + (newline != NULL);
            s->line++;
            return OK;
        }
        *line = NULL;
        if (s->in_end) return OK;
        searched = left;
        if (searched > MAX_LINE)
            return fail(ERR_INPUT, "standard input: line %lld is longer than %d bytes; break it up", (long long)s->line + 1, MAX_LINE);
        memmove(s->in, start, searched);
        s->in_at = 0;
        s->in_n = searched;
        if (s->in_capacity - s->in_n < READ_BYTES) s->in = xrealloc(s->in, s->in_capacity = 2 * s->in_capacity + READ_BYTES);
        ssize_t n = read(STDIN_FILENO, s->in + s->in_n, s->in_capacity - s->in_n);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return fail_errno(ERR_IO, "standard input");
        s->in_n += (size_t)n;
        s->in_end = n == 0;
    }
}

static void put_ids(struct buffer *out, const int32_t *ids, size_t n, char separator)
{
    for (size_t i = 0; i < n; i++) {
        char digits[12], *p = digits + sizeof digits;
        uint32_t v = (uint32_t)ids[i];
        do *--p = (char)('0' + v % 10); while (v /= 10);
        if (i) *--p = separator;
        buffer_add(out, p, (size_t)(digits + sizeof digits - p));
    }
}

static int encode_line(struct stream *s, const char *text, size_t n)
{
    const int32_t *ids;
    size_t n_ids;
    int32_t bos = s->o.special && tokenizer_add_bos(s->t) ? tokenizer_bos(s->t) : -1;
    int rc = OK;
    TRY(tokenizer_encode(s->t, s->w, text, n, &ids, &n_ids));
    if (s->o.jsonl) buffer_add_string(&s->out, "{\"ids\":[");
    char separator = s->o.jsonl ? ',' : ' ';
    if (bos >= 0) {
        put_ids(&s->out, &bos, 1, separator);
        if (n_ids) buffer_add(&s->out, &separator, 1);
    }
    put_ids(&s->out, ids, n_ids, separator);
    buffer_add_string(&s->out, s->o.jsonl ? "]}\n" : "\n");
out:
    return rc;
}

/* How many bytes of broken UTF-8 one U+FFFD stands for: the longest start of a well-formed sequence, as Unicode recommends. */
static size_t broken_length(const char *text, size_t n)
{
    const uint8_t *s = (const uint8_t *)text;
    size_t need = s[0] >= 0xc2 && s[0] < 0xe0 ? 2 : s[0] >= 0xe0 && s[0] < 0xf0 ? 3 : s[0] >= 0xf0 && s[0] < 0xf5 ? 4 : 1, k = 1;
    uint8_t low = s[0] == 0xe0 ? 0xa0 : s[0] == 0xf0 ? 0x90 : 0x80, high = s[0] == 0xed ? 0x9f : s[0] == 0xf4 ? 0x8f : 0xbf;
    while (k < need && k < n && s[k] >= low && s[k] <= high) {
        low = 0x80;
        high = 0xbf;
        k++;
    }
    return k;
}

/* JSON is UTF-8: what is none becomes U+FFFD. */
static void put_json_string(struct buffer *out, const char *s, size_t n)
{
    bool recent;
    buffer_add(out, "\"", 1);
    while (n) {
        int64_t bad = utf8_check(s, n, &recent);
        size_t good = bad < 0 ? n : (size_t)bad;
        for (size_t i = 0; i < good; i++) {
            char c = s[i], escape[8];
            if (c == '"' || c == '\\') { escape[0] = '\\'; escape[1] = c; buffer_add(out, escape, 2); }
            else if (c == '\n') buffer_add(out, "\\n", 2);
            else if ((uint8_t)c < 0x20) buffer_add(out, escape, (size_t)snprintf(escape, sizeof escape, "\\u%04x", (unsigned)c));
            else buffer_add(out, &c, 1);
        }
        if (bad >= 0) {
            buffer_add(out, "\xef\xbf\xbd", 3);
            good += broken_length(s + good, n - good);
        }
        s += good;
        n -= good;
    }
    buffer_add(out, "\"", 1);
}

static int decode_ids(struct stream *s, const int32_t *ids, size_t n)
{
    const char *text;
    size_t bytes;
    int rc = OK;
    TRY(tokenizer_decode(s->t, s->w, ids, n, !s->o.special, &text, &bytes));
    if (s->o.jsonl) {
        buffer_add_string(&s->out, "{\"text\":");
        put_json_string(&s->out, text, bytes);
        buffer_add_string(&s->out, "}\n");
    } else {
        buffer_add(&s->out, text, bytes);
        buffer_add(&s->out, "\n", 1);
    }
out:
    return rc;
}

static int parse_ids(const char *line, size_t n, int32_t **ids, size_t *n_ids)
{
    *ids = xmalloc((n / 2 + 1) * sizeof **ids);
    *n_ids = 0;
    for (size_t i = 0; i < n;) {
        int64_t v = 0;
        size_t digits = 0;
        while (i < n && (line[i] == ' ' || line[i] == '\t' || line[i] == '\r')) i++;
        if (i == n) break;
        for (; i < n && line[i] >= '0' && line[i] <= '9' && digits < 10; i++, digits++) v = 10 * v + (line[i] - '0');
        if (!digits || v > INT32_MAX || (i < n && line[i] != ' ' && line[i] != '\t' && line[i] != '\r'))
            return fail(ERR_INPUT, "column %zu is no token id", i + 1);
        (*ids)[(*n_ids)++] = (int32_t)v;
    }
    return OK;
}

static int json_ids(const json_t *object, int32_t **ids, size_t *n)
{
    const json_t *list = json_object_get(object, "ids");
    if (!json_is_array(list)) return fail(ERR_INPUT, "key \"ids\" is not a list");
    *n = json_array_size(list);
    *ids = xmalloc(*n * sizeof **ids);
    for (size_t i = 0; i < *n; i++) {
        const json_t *v = json_array_get(list, i);
        if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > INT32_MAX)
            return fail(ERR_INPUT, "ids[%zu] is no token id", i);
        (*ids)[i] = (int32_t)json_integer_value(v);
    }
    return OK;
}

static int do_line(struct stream *s, const char *line, size_t n)
{
    json_t *object = NULL;
    json_error_t e;
    int32_t *ids = NULL;
    size_t n_ids = 0;
    int rc = OK;
    if (s->o.jsonl) {
        object = json_loadb(line, n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &e);
        if (!object) { rc = fail(ERR_INPUT, "not valid JSON: column %d: %s", e.column, e.text); goto out; }
        if (s->o.decode) TRY(json_ids(object, &ids, &n_ids));
        else {
            const json_t *text = json_object_get(object, s->o.text_field);
            if (!json_is_string(text)) { rc = fail(ERR_INPUT, "key \"%s\" is not a string; --text-field names another", s->o.text_field); goto out; }
            TRY(encode_line(s, json_string_value(text), json_string_length(text)));
        }
    } else if (s->o.decode) TRY(parse_ids(line, n, &ids, &n_ids));
    else TRY(encode_line(s, line, n));
    if (s->o.decode) TRY(decode_ids(s, ids, n_ids));
out:
    json_decref(object);
    free(ids);
    return rc == OK ? OK : fail_in(rc, "standard input: line %lld", (long long)s->line);
}

int command_tokenize(int argc, char **argv)
{
    struct stream s = {0};
    char *line;
    size_t n;
    int rc = OK;
    TRY(parse_options(argc, argv, &s.o));
    if (s.o.help) {
        fputs(help, stdout);
        goto out;
    }
    TRY(tokenizer_open(&s.t, s.o.tokenizer));
    s.w = tokenizer_work_new(s.t);
    s.in = xmalloc(s.in_capacity = READ_BYTES);
    for (;;) {
        TRY(next_line(&s, &line, &n));
        if (!line) break;
        TRY(do_line(&s, line, n));
        if (s.out.n >= WRITE_BYTES) TRY(flush(&s));
    }
    TRY(flush(&s));
out:
    tokenizer_work_free(s.w);
    tokenizer_close(s.t);
    free(s.in);
    free(s.out.data);
    return rc;
}
