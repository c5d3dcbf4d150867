/* Corpus: finding files, cutting them into documents, tokenising. Packing documents into rows is packing.c's.
 *
 * One thread reads: it cuts files into units, each the bytes of one document (a file, line, paragraph or JSON object), and
 * gathers them in batches of some 32 MB. All threads then check, parse and tokenise the units of a batch, each unit by
 * itself, and the results are appended in reading order: ids, errors and hashes do not depend on the number of threads.
 */
#include "data/corpus.h"

#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <jansson.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utf8proc.h>

#include "base/error.h"
#include "base/file.h"
#include "base/rng.h"
#include "data/packing.h"

enum { BATCH_BYTES = 32 << 20, BATCH_UNITS = 1 << 16, CHUNK = 1 << 20, MAX_JSON_LINE = 256 << 20 };

/* ---- which files ---- */

struct file { char *path; dev_t device; ino_t inode; int order; };
struct file_list { struct file *item; int n, room; };

static void file_list_add(struct file_list *l, const char *path, const struct stat *st)
{
    if (l->n == l->room) l->item = xrealloc(l->item, (size_t)(l->room = l->room ? 2 * l->room : 64) * sizeof *l->item);
    l->item[l->n] = (struct file){xstrdup(path), st->st_dev, st->st_ino, l->n};
    l->n++;
}

static void file_list_free(struct file_list *l)
{
    for (int i = 0; i < l->n; i++) free(l->item[i].path);
    free(l->item);
}

static bool ends_with(const char *name, const char *end)
{
    size_t n = strlen(name), m = strlen(end);
    return n >= m && !strcmp(name + n - m, end);
}

/* Directories on the way down, so that a link to one of them does not lead in circles. */
struct ancestor { dev_t device; ino_t inode; const struct ancestor *up; };

static int add_directory(struct file_list *l, const char *dir, const struct stat *st, const struct ancestor *up)
{
    struct ancestor here = {st->st_dev, st->st_ino, up};
    char **names = NULL, *path = NULL;
    int rc = OK, n = 0;
    for (const struct ancestor *a = up; a; a = a->up) if (a->device == st->st_dev && a->inode == st->st_ino) return OK;
    TRY(dir_list(dir, &names, &n));
    for (int i = 0; i < n; i++) {
        struct stat child;
        if (names[i][0] == '.') continue;
        free(path);
        path = path_join(dir, names[i]);
        if (stat(path, &child)) { rc = fail_errno(ERR_IO, "%s: cannot be read", path); goto out; }
        if (S_ISDIR(child.st_mode)) TRY(add_directory(l, path, &child, &here));
        else if (S_ISREG(child.st_mode) && (ends_with(path, ".txt") || ends_with(path, ".md") || ends_with(path, ".jsonl"))) file_list_add(l, path, &child);
    }
out:
    free(path);
    names_free(names, n);
    return rc;
}

static int add_path(struct file_list *l, const char *path)
{
    struct stat st;
    int before = l->n, rc = OK;
    if (stat(path, &st)) return fail_errno(ERR_IO, "%s: cannot be read", path);
    if (S_ISREG(st.st_mode)) { file_list_add(l, path, &st); return OK; }
    if (!S_ISDIR(st.st_mode)) return fail(ERR_USAGE, "%s: is neither a file nor a directory", path);
    TRY(add_directory(l, path, &st, NULL));
    if (l->n == before) rc = fail(ERR_USAGE, "%s: this directory holds no *.txt, *.md or *.jsonl; name its files by a pattern", path);
out:
    return rc;
}

static int by_inode(const void *a, const void *b)
{
    const struct file *x = a, *y = b;
    if (x->device != y->device) return x->device < y->device ? -1 : 1;
    if (x->inode != y->inode) return x->inode < y->inode ? -1 : 1;
    return x->order - y->order;
}

static int by_order(const void *a, const void *b) { return ((const struct file *)a)->order - ((const struct file *)b)->order; }

/* A file that several patterns name is read where it is named first. */
static void drop_repeated(struct file_list *l)
{
    int n = 0;
    qsort(l->item, (size_t)l->n, sizeof *l->item, by_inode);
    for (int i = 0; i < l->n; i++) {
        if (n && l->item[i].device == l->item[n - 1].device && l->item[i].inode == l->item[n - 1].inode) free(l->item[i].path);
        else l->item[n++] = l->item[i];
    }
    l->n = n;
    qsort(l->item, (size_t)n, sizeof *l->item, by_order);
}

static int by_name(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

static int find_files(struct file_list *l, const struct corpus_options *o)
{
    int rc = OK;
    if (!o->n_files) return fail(ERR_USAGE, "corpus.files is empty; list files, patterns or directories");
    for (int i = 0; i < o->n_files; i++) {
        const char *pattern = o->files[i];
        if (path_exists(pattern)) { TRY(add_path(l, pattern)); continue; }      /* also names that look like a pattern */
        if (!strpbrk(pattern, "*?[")) { rc = fail(ERR_USAGE, "corpus.files: %s does not exist", pattern); goto out; }
        glob_t g = {0};
        int status = glob(pattern, 0, NULL, &g);
        if (status == GLOB_NOMATCH) rc = fail(ERR_USAGE, "corpus.files: %s matches no file", pattern);
        else if (status) rc = fail(ERR_IO, "corpus.files: %s: the directories cannot be searched", pattern);
        else qsort(g.gl_pathv, g.gl_pathc, sizeof *g.gl_pathv, by_name);
        for (size_t j = 0; rc == OK && j < g.gl_pathc; j++) rc = add_path(l, g.gl_pathv[j]);
        globfree(&g);
        if (rc != OK) goto out;
    }
    drop_repeated(l);
out:
    return rc;
}

/* ---- units ---- */

enum unit_kind { UNIT_TEXT, UNIT_LINES, UNIT_JSON_TEXT, UNIT_JSON_IDS };    /* lines: CRLF reads as LF */

struct unit {
    enum unit_kind kind;
    const char *path;
    int64_t line, offset;            /* where it begins; line 0: it is the file */
    size_t begin, bytes;             /* in batch.text */
    /* results */
    int rc; char *message;           /* malloc'd when rc is not OK */
    int32_t *ids; uint8_t *mask; int64_t n;
    uint64_t hash; bool cut;
};

struct batch_of_units { char *text; size_t bytes, room; struct unit *unit; int n, units_room; };

struct reading {
    const struct corpus_options *o;
    const struct tokenizer *tokenizer;       /* NULL: texts are refused, unless `texts` */
    bool texts;                              /* for corpus_each_text: ids are refused */
    struct batch_of_units batch;
    int (*process)(void *context, struct batch_of_units *b); void *context;
};

static int flush(struct reading *r)
{
    struct batch_of_units *b = &r->batch;
    int rc = b->n ? r->process(r->context, b) : OK;
    for (int i = 0; i < b->n; i++) { free(b->unit[i].message); free(b->unit[i].ids); free(b->unit[i].mask); }
    b->n = 0;
    b->bytes = 0;
    if (b->room > 2 * (size_t)BATCH_BYTES) { free(b->text); b->text = NULL; b->room = 0; }    /* after one long document */
    return rc;
}

static void batch_reserve(struct batch_of_units *b, size_t bytes)
{
    if (b->bytes + bytes <= b->room) return;
    size_t room = b->room + b->room / 2;
    b->room = room > b->bytes + bytes ? room : b->bytes + bytes;
    b->text = xrealloc(b->text, b->room);
}

static struct unit *unit_begin(struct reading *r, enum unit_kind kind, const char *path, int64_t line, int64_t offset)
{
    struct batch_of_units *b = &r->batch;
    if (b->n == b->units_room) b->unit = xrealloc(b->unit, (size_t)(b->units_room = b->units_room ? 2 * b->units_room : 256) * sizeof *b->unit);
    struct unit *u = &b->unit[b->n++];
    batch_reserve(b, 1);                                             /* so that batch.text is there, be the unit empty */
    *u = (struct unit){.kind = kind, .path = path, .line = line, .offset = offset, .begin = b->bytes};
    return u;
}

static void unit_append(struct batch_of_units *b, const char *data, size_t bytes)
{
    batch_reserve(b, bytes);
    memcpy(b->text + b->bytes, data, bytes);
    b->bytes += bytes;
    b->unit[b->n - 1].bytes += bytes;
}

static int unit_end(struct reading *r) { return r->batch.bytes >= BATCH_BYTES || r->batch.n >= BATCH_UNITS ? flush(r) : OK; }

/* ---- reading ---- */

/* Lines of a file of any size; a line is kept whole in `data`. */
struct line_reader { int fd; const char *path; char *data; size_t begin, end, room; int64_t line, offset, next_offset; bool eof; };

static int open_regular(const char *path, int *fd, struct stat *st)
{
    *fd = open(path, O_RDONLY | O_CLOEXEC);
    if (*fd < 0) return fail_errno(ERR_IO, "%s: cannot open", path);
    if (fstat(*fd, st)) return fail_errno(ERR_IO, "%s: cannot stat", path);
    if (!S_ISREG(st->st_mode)) return fail(ERR_USAGE, "%s: is not a regular file", path);
    return OK;
}

static int read_some(int fd, char *data, size_t bytes, const char *path, size_t *got)
{
    ssize_t n;
    do n = read(fd, data, bytes); while (n < 0 && errno == EINTR);
    if (n < 0) return fail_errno(ERR_IO, "%s: cannot read", path);
    *got = (size_t)n;
    return OK;
}

/* The next line, n bytes without its line feed and *bytes with it; r->line and r->offset say where it is. *line is NULL at the end. */
static int next_line(struct line_reader *r, size_t max, const char **line, size_t *n, size_t *bytes)
{
    int rc = OK;
    size_t searched = 0, got = 0;
    for (;;) {
        const char *start = r->data + r->begin, *feed = r->end > r->begin + searched ? memchr(start + searched, '\n', r->end - r->begin - searched) : NULL;
        size_t have = r->end - r->begin, length = feed ? (size_t)(feed - start) : have;
        if (length > max) return fail(ERR_INPUT, "%s:%lld: this line is longer than %zu MiB", r->path, (long long)r->line + 1, max >> 20);
        if (feed || (r->eof && have)) {
            *line = start;
            *n = length;
            *bytes = length + (feed != NULL);
            r->begin += *bytes;
            r->line++;
            r->offset = r->next_offset;
            r->next_offset += (int64_t)*bytes;
            return OK;
        }
        if (r->eof) { *line = NULL; return OK; }
        searched = have;
        if (have) memmove(r->data, start, have);
        r->begin = 0;
        r->end = have;
        if (r->end + CHUNK > r->room) r->data = xrealloc(r->data, r->room = r->end + (r->end > CHUNK ? r->end : CHUNK));
        TRY(read_some(r->fd, r->data + r->end, r->room - r->end, r->path, &got));
        if (!r->line && !have && got >= 3 && !memcmp(r->data, "\xef\xbb\xbf", 3)) r->begin = r->next_offset = 3;    /* byte order mark */
        r->end += got;
        r->eof = !got;
    }
out:
    return rc;
}

static bool is_blank(const char *line, size_t n)
{
    for (size_t i = 0; i < n; i++) if (line[i] != ' ' && line[i] != '\t' && line[i] != '\r') return false;
    return true;
}

static int read_whole(struct reading *r, const char *path)
{
    struct batch_of_units *b = &r->batch;
    struct stat st;
    int rc = OK, fd = -1;
    size_t got = 0, bom;
    TRY(open_regular(path, &fd, &st));
    struct unit *u = unit_begin(r, UNIT_TEXT, path, 0, 0);
    for (size_t expected = (size_t)st.st_size + 1;; expected = CHUNK) {        /* one more, to meet the end without growing */
        if (b->room == b->bytes || expected > CHUNK) batch_reserve(b, expected);
        TRY(read_some(fd, b->text + b->bytes, b->room - b->bytes, path, &got));
        b->bytes += got;
        u->bytes += got;
        if (!got) break;
    }
    bom = u->bytes >= 3 && !memcmp(b->text + u->begin, "\xef\xbb\xbf", 3) ? 3 : 0;
    u->begin += bom;
    u->bytes -= bom;
    u->offset = (int64_t)bom;
    TRY(unit_end(r));
out:
    if (fd >= 0) close(fd);
    return rc;
}

/* One unit per line, or per run of lines that are not blank. A blank line is nothing in itself, but a line document that is empty
 * is counted, as an empty file is. */
static int read_lines(struct reading *r, const char *path, enum unit_kind kind, bool paragraphs)
{
    struct line_reader lines = {.fd = -1, .path = path};
    struct stat st;
    int rc = OK;
    bool inside = false;
    const char *line;
    size_t n, bytes, max = kind == UNIT_LINES ? SIZE_MAX / 4 : MAX_JSON_LINE;
    TRY(open_regular(path, &lines.fd, &st));
    for (;;) {
        TRY(next_line(&lines, max, &line, &n, &bytes));
        if (!line) break;
        bool blank = is_blank(line, n);
        if (inside && (blank || !paragraphs)) { inside = false; TRY(unit_end(r)); }
        if (!blank || (kind == UNIT_LINES && !paragraphs)) {
            if (!inside) unit_begin(r, kind, path, lines.line, lines.offset);
            unit_append(&r->batch, line, blank ? 0 : paragraphs ? bytes : n);
            inside = true;
        }
    }
    if (inside) TRY(unit_end(r));
out:
    if (lines.fd >= 0) close(lines.fd);
    free(lines.data);
    return rc;
}

/* JSONL: one object. *where is for messages. */
static int parse_object(const char *where, const char *text, size_t bytes, json_t **object)
{
    json_error_t e;
    *object = json_loadb(text, bytes, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &e);
    if (!*object) return fail(ERR_INPUT, "%s: not valid JSON, one object a line is expected: column %d: %s", where, e.column, e.text);
    if (!json_is_object(*object)) return fail(ERR_INPUT, "%s: is not a JSON object; one object a line is expected", where);
    return OK;
}

/* format auto: the first object that parses tells what the file holds; what does not parse is met again, with its message, when it is read. */
static int has_ids(const struct corpus_options *o, const char *path, bool *ids)
{
    struct line_reader lines = {.fd = -1, .path = path};
    struct stat st;
    json_t *object = NULL;
    int rc = OK;
    const char *line;
    size_t n, bytes;
    *ids = false;
    TRY(open_regular(path, &lines.fd, &st));
    do TRY(next_line(&lines, MAX_JSON_LINE, &line, &n, &bytes)); while (line && is_blank(line, n));
    if (line && parse_object(path, line, n, &object) == OK) *ids = json_object_get(object, o->ids_field) != NULL;
out:
    if (lines.fd >= 0) close(lines.fd);
    free(lines.data);
    json_decref(object);
    return rc;
}

static int read_file(struct reading *r, const char *path)
{
    const struct corpus_options *o = r->o;
    bool json = o->format == CORPUS_JSONL || o->format == CORPUS_IDS || (o->format == CORPUS_AUTO && (ends_with(path, ".jsonl") || ends_with(path, ".json")));
    bool ids = o->format == CORPUS_IDS;
    int rc = OK;
    if (json && o->format == CORPUS_AUTO) TRY(has_ids(o, path, &ids));
    if (ids && r->texts) return fail(ERR_USAGE, "%s: holds ids; a tokenizer is made from text", path);
    if (!ids && !r->texts) {
        if (!r->tokenizer) return fail(ERR_USAGE, "%s: holds text, and there is no tokenizer; set tokenizer.path", path);
        if (o->append_eos && tokenizer_eos(r->tokenizer) < 0) return fail(ERR_USAGE, "corpus.append_eos is true, but the tokenizer names no end-of-text token; set it to false");
        if (o->prepend_bos && tokenizer_bos(r->tokenizer) < 0) return fail(ERR_USAGE, "corpus.prepend_bos is true, but the tokenizer names no begin-of-text token; set it to false");
    }
    if (json) rc = read_lines(r, path, ids ? UNIT_JSON_IDS : UNIT_JSON_TEXT, false);
    else if (o->document == DOCUMENT_FILE) rc = read_whole(r, path);
    else rc = read_lines(r, path, UNIT_LINES, o->document == DOCUMENT_PARAGRAPH);
out:
    return rc;
}

static int read_all(struct reading *r, const struct file_list *files)
{
    int rc = OK;
    for (int i = 0; i < files->n; i++) TRY(read_file(r, files->item[i].path));
    TRY(flush(r));
out:
    for (int i = 0; i < r->batch.n; i++) { free(r->batch.unit[i].message); free(r->batch.unit[i].ids); free(r->batch.unit[i].mask); }
    free(r->batch.unit);
    free(r->batch.text);
    return rc;
}

/* ---- from a unit to its text or ids ---- */

static void unit_where(const struct unit *u, char where[1024])
{
    if (u->line) snprintf(where, 1024, "%.900s:%lld", u->path, (long long)u->line);
    else snprintf(where, 1024, "%.900s", u->path);
}

/* Index of the first byte that is not UTF-8; n when all of it is. */
static size_t utf8_length(const char *s, size_t n)
{
    size_t i = 0;
    while (i < n) {
        uint64_t eight;
        utf8proc_int32_t code;
        while (i + 8 <= n && (memcpy(&eight, s + i, 8), !(eight & 0x8080808080808080u))) i += 8;
        if (i == n) break;
        utf8proc_ssize_t step = utf8proc_iterate((const utf8proc_uint8_t *)s + i, (utf8proc_ssize_t)(n - i), &code);
        if (step <= 0) break;
        i += (size_t)step;
    }
    return i;
}

static int check_utf8(const struct unit *u, const char *where, const char *text)
{
    size_t good = utf8_length(text, u->bytes);
    if (good == u->bytes) return OK;
    return fail(ERR_INPUT, "%s: not valid UTF-8 at byte %lld of the file; convert it (iconv -t UTF-8) or leave it out", where, (long long)u->offset + (long long)good);
}

/* CRLF -> LF in place, without the line end of the last line: the new length. */
static size_t unix_lines(char *text, size_t n)
{
    size_t out = 0;
    for (size_t i = 0; i < n; i++) if (text[i] != '\r' || (i + 1 < n && text[i + 1] != '\n')) text[out++] = text[i];
    return out && text[out - 1] == '\n' ? out - 1 : out;
}

static int field_of(const json_t *object, const char *where, const char *field, const char *other, json_t **value)
{
    *value = json_object_get(object, field);
    if (*value) return OK;
    return fail(ERR_INPUT, "%s: has no field \"%s\"%s%s%s", where, field, other ? " nor \"" : "", other ? other : "", other ? "\"" : "; name yours with corpus.text_field or corpus.ids_field");
}

/* The document's text. It lies in batch.text or in *object, which the caller releases. */
static int unit_text(const struct unit *u, const struct corpus_options *o, char *raw, const char *where, const char **text, size_t *bytes, json_t **object)
{
    json_t *value;
    int rc = OK;
    TRY(check_utf8(u, where, raw));
    *text = raw;
    *bytes = u->kind == UNIT_LINES ? unix_lines(raw, u->bytes) : u->bytes;
    if (u->kind != UNIT_JSON_TEXT) goto out;
    TRY(parse_object(where, raw, u->bytes, object));
    TRY(field_of(*object, where, o->text_field, o->format == CORPUS_AUTO ? o->ids_field : NULL, &value));
    if (!json_is_string(value)) { rc = fail(ERR_INPUT, "%s: field \"%s\" is not a string", where, o->text_field); goto out; }
    if (json_is_array(json_object_get(*object, o->mask_field))) {
        rc = fail(ERR_INPUT, "%s: field \"%s\" marks tokens, but the record holds text; give \"%s\" beside it, or set corpus.mask_field to another name", where, o->mask_field, o->ids_field);
        goto out;
    }
    *text = json_string_value(value);
    *bytes = json_string_length(value);
out:
    return rc;
}

static int read_ids(struct unit *u, const struct corpus_options *o, const char *where, const json_t *object, int32_t vocab_size)
{
    json_t *ids, *mask = json_object_get(object, o->mask_field);
    int rc = OK;
    TRY(field_of(object, where, o->ids_field, NULL, &ids));
    if (!json_is_array(ids)) return fail(ERR_INPUT, "%s: field \"%s\" is not a list of token ids", where, o->ids_field);
    if (mask && !json_is_array(mask)) return fail(ERR_INPUT, "%s: field \"%s\" is not a list of 0 and 1", where, o->mask_field);
    u->n = (int64_t)json_array_size(ids);
    if (mask && (int64_t)json_array_size(mask) != u->n)
        return fail(ERR_INPUT, "%s: \"%s\" has %zu entries, \"%s\" has %lld; they must be as many", where, o->mask_field, json_array_size(mask), o->ids_field, (long long)u->n);
    u->ids = xmalloc((size_t)u->n * sizeof *u->ids);
    if (mask) u->mask = xmalloc((size_t)u->n);
    for (int64_t i = 0; i < u->n; i++) {
        const json_t *id = json_array_get(ids, (size_t)i), *m = mask ? json_array_get(mask, (size_t)i) : NULL;
        if (!json_is_integer(id)) return fail(ERR_INPUT, "%s: \"%s\"[%lld] is not a whole number", where, o->ids_field, (long long)i);
        int64_t value = json_integer_value(id);
        if (value < 0 || value > INT32_MAX) return fail(ERR_INPUT, "%s: \"%s\"[%lld] is %lld; an id is at least 0 and at most %d", where, o->ids_field, (long long)i, (long long)value, INT32_MAX);
        if (vocab_size && value >= vocab_size)
            return fail(ERR_INPUT, "%s: \"%s\"[%lld] is %lld, but the vocabulary has %d ids; were the ids made with another tokenizer?", where, o->ids_field, (long long)i, (long long)value, vocab_size);
        u->ids[i] = (int32_t)value;
        if (!mask) continue;
        bool zero = json_is_false(m) || (json_is_integer(m) && json_integer_value(m) == 0), one = json_is_true(m) || (json_is_integer(m) && json_integer_value(m) == 1);
        if (!zero && !one) return fail(ERR_INPUT, "%s: \"%s\"[%lld] is neither 0 nor 1", where, o->mask_field, (long long)i);
        u->mask[i] = one;
    }
out:
    return rc;
}

static uint64_t content_hash(const void *data, size_t bytes)
{
    char hex[SHA256_HEX];
    sha256_of(data, bytes, hex);
    hex[16] = 0;
    return strtoull(hex, NULL, 16);
}

/* ---- corpus_read ---- */

struct tokenising {
    const struct corpus_options *o;
    const struct tokenizer *tokenizer;
    struct tokenizer_work **work;            /* one per thread */
    int threads;
    int32_t vocab_size;
    struct documents documents;
    int64_t empty;
};

static int encode_text(struct tokenising *t, struct tokenizer_work *work, struct unit *u, const char *where, const char *text, size_t bytes)
{
    const struct corpus_options *o = t->o;
    const int32_t *ids;
    size_t n;
    int rc = tokenizer_encode(t->tokenizer, work, text, bytes, &ids, &n);
    if (rc != OK) return fail_in(rc, "%s", where);
    if (!n) return OK;
    u->ids = xmalloc((n + 2) * sizeof *u->ids);
    if (o->prepend_bos) u->ids[u->n++] = tokenizer_bos(t->tokenizer);
    memcpy(u->ids + u->n, ids, n * sizeof *ids);
    u->n += (int64_t)n;
    if (o->append_eos) u->ids[u->n++] = tokenizer_eos(t->tokenizer);
    for (int64_t i = 0; t->vocab_size && i < u->n; i++)
        if (u->ids[i] >= t->vocab_size)
            return fail(ERR_MISMATCH, "%s: token %d of the tokenizer is not in the model's vocabulary of %d; use the model's own tokenizer", where, u->ids[i], t->vocab_size);
    return OK;
}

static int tokenise_unit(struct tokenising *t, struct tokenizer_work *work, struct unit *u, char *raw)
{
    const struct corpus_options *o = t->o;
    json_t *object = NULL;
    const char *text;
    char where[1024];
    size_t bytes;
    int rc = OK;
    unit_where(u, where);
    if (u->kind == UNIT_JSON_IDS) {
        TRY(check_utf8(u, where, raw));
        TRY(parse_object(where, raw, u->bytes, &object));
        TRY(read_ids(u, o, where, object, t->vocab_size));
        if (o->heldout_fraction > 0) u->hash = content_hash(u->ids, (size_t)u->n * sizeof *u->ids);
    } else {
        TRY(unit_text(u, o, raw, where, &text, &bytes, &object));
        if (o->heldout_fraction > 0) u->hash = content_hash(text, bytes);
        if (bytes) TRY(encode_text(t, work, u, where, text, bytes));
    }
    u->cut = o->max_document_tokens && u->n > o->max_document_tokens;
    if (u->cut) u->n = o->max_document_tokens;
out:
    json_decref(object);
    return rc;
}

static int tokenise_batch(void *context, struct batch_of_units *b)
{
    struct tokenising *t = context;
    #pragma omp parallel for schedule(dynamic, 8) num_threads(t->threads)
    for (int i = 0; i < b->n; i++) {
        struct unit *u = &b->unit[i];
        u->rc = tokenise_unit(t, t->work[omp_get_thread_num()], u, b->text + u->begin);
        if (u->rc != OK) u->message = xstrdup(fail_message());
    }
    for (int i = 0; i < b->n; i++) {
        struct unit *u = &b->unit[i];
        if (u->rc != OK) return fail(u->rc, "%s", u->message);
        if (!u->n) { t->empty++; continue; }
        bool heldout = (double)u->hash * 0x1p-64 < t->o->heldout_fraction;
        documents_add(&t->documents, u->ids, u->mask, &(struct document){.n = u->n, .hash = u->hash, .heldout = heldout, .cut = u->cut});
    }
    return OK;
}

/* Bytes of text every id stands for; special tokens (the end-of-text token above all) stand for none. */
static int32_t *token_lengths(const struct tokenizer *t)
{
    int32_t n = tokenizer_vocab_size(t), *length = xcalloc((size_t)n, sizeof *length);
    for (int32_t id = 0; id < n; id++) {
        size_t bytes;
        if (tokenizer_token_kind(t, id) != TOKEN_SPECIAL && tokenizer_token_bytes(t, id, &bytes)) length[id] = (int32_t)bytes;
    }
    return length;
}

struct keyed { uint64_t hash; int64_t index; };

static int by_hash(const void *a, const void *b)
{
    const struct keyed *x = a, *y = b;
    if (x->hash != y->hash) return x->hash < y->hash ? -1 : 1;
    return (x->index > y->index) - (x->index < y->index);
}

/* Order of a split's documents. Training follows the seed; held-out documents go by their hash, so that runs with other seeds are
 * measured on the same rows. */
static int64_t *document_order(const struct documents *d, const struct corpus_options *o, bool heldout, int64_t *n)
{
    int64_t *order = xmalloc((size_t)d->n * sizeof *order);
    *n = 0;
    for (int64_t i = 0; i < d->n; i++) if (d->item[i].heldout == heldout) order[(*n)++] = i;
    if (!o->shuffle) return order;
    if (!heldout) { shuffle_int64(order, *n, o->shuffle_seed, 0); return order; }
    struct keyed *keyed = xmalloc((size_t)*n * sizeof *keyed);
    for (int64_t i = 0; i < *n; i++) keyed[i] = (struct keyed){d->item[order[i]].hash, order[i]};
    qsort(keyed, (size_t)*n, sizeof *keyed, by_hash);
    for (int64_t i = 0; i < *n; i++) order[i] = keyed[i].index;
    free(keyed);
    return order;
}

static int pack_split(const struct tokenising *t, bool heldout, uint32_t padding, const int32_t *lengths, struct corpus_rows **rows)
{
    const struct corpus_options *o = t->o;
    int64_t n, *order = document_order(&t->documents, o, heldout, &n);
    *rows = rows_pack(&t->documents, order, n, o->row_length, o->max_rows, padding, lengths, lengths ? tokenizer_vocab_size(t->tokenizer) : 0);
    free(order);
    if ((*rows)->targets) return OK;
    return fail(ERR_INPUT, "corpus.files: the %s documents leave no token to learn (documents of one token, or masks of zeros); use other files", heldout ? "held-out" : "training");
}

static int check_split(const struct documents *d, const struct corpus_options *o)
{
    int64_t heldout = 0;
    for (int64_t i = 0; i < d->n; i++) heldout += d->item[i].heldout;
    if (!d->n) return fail(ERR_INPUT, "corpus.files: the files hold no document");
    if (!(o->heldout_fraction > 0)) return OK;
    if (d->n == 1)
        return fail(ERR_USAGE, "the corpus is one document, which cannot be both learnt and held out; set corpus.document to paragraph or line, or corpus.heldout_fraction to 0");
    if (heldout == 0 || heldout == d->n)
        return fail(ERR_USAGE, "corpus.heldout_fraction %g leaves no document of %lld to %s; set corpus.document to paragraph or line, or %s the fraction", o->heldout_fraction, (long long)d->n,
                    heldout ? "learn" : "hold out", heldout ? "lower" : "raise");
    return OK;
}

static int check_options(const struct corpus_options *o)
{
    if (o->row_length < 2 || o->row_length > UINT16_MAX) return fail(ERR_USAGE, "corpus.row_length is %lld; it must be at least 2 and at most %d", (long long)o->row_length, UINT16_MAX);
    if (!(o->heldout_fraction >= 0 && o->heldout_fraction <= 0.5)) return fail(ERR_USAGE, "corpus.heldout_fraction is %g; it must be at least 0 and at most 0.5", o->heldout_fraction);
    return OK;
}

int corpus_read(struct corpus_rows **train, struct corpus_rows **heldout, const struct corpus_options *o,
                const struct tokenizer *tokenizer, int32_t vocab_size)
{
    struct tokenising t = {.o = o, .tokenizer = tokenizer, .vocab_size = vocab_size, .threads = omp_get_max_threads()};
    struct reading r = {.o = o, .tokenizer = tokenizer, .process = tokenise_batch, .context = &t};
    struct file_list files = {0};
    int32_t *lengths = NULL;
    int rc = OK;
    *train = *heldout = NULL;
    t.work = xcalloc((size_t)t.threads, sizeof *t.work);
    TRY(check_options(o));
    TRY(find_files(&files, o));
    for (int i = 0; tokenizer && i < t.threads; i++) t.work[i] = tokenizer_work_new(tokenizer);
    TRY(read_all(&r, &files));
    TRY(check_split(&t.documents, o));

    int32_t padding = tokenizer ? tokenizer_pad(tokenizer) : -1;
    if (padding < 0 && tokenizer) padding = tokenizer_eos(tokenizer);
    if (padding < 0 || (vocab_size && padding >= vocab_size)) padding = 0;
    if (tokenizer) lengths = token_lengths(tokenizer);
    TRY(pack_split(&t, false, (uint32_t)padding, lengths, train));
    (*train)->empty_documents = t.empty;
    if (o->heldout_fraction > 0) TRY(pack_split(&t, true, (uint32_t)padding, lengths, heldout));
out:
    for (int i = 0; i < t.threads; i++) tokenizer_work_free(t.work[i]);
    free(t.work);
    free(lengths);
    documents_clear(&t.documents);
    file_list_free(&files);
    if (rc != OK) {
        corpus_rows_free(*train);
        corpus_rows_free(*heldout);
        *train = *heldout = NULL;
    }
    return rc;
}

/* ---- corpus_each_text ---- */

struct each_text { const struct corpus_options *o; int (*each)(void *, const char *, size_t); void *context; };

static int hand_over(void *context, struct batch_of_units *b)
{
    struct each_text *e = context;
    int rc = OK;
    for (int i = 0; rc == OK && i < b->n; i++) {
        const struct unit *u = &b->unit[i];
        json_t *object = NULL;
        const char *text;
        char where[1024];
        size_t bytes;
        unit_where(u, where);
        rc = unit_text(u, e->o, b->text + u->begin, where, &text, &bytes, &object);
        if (rc == OK && bytes) rc = e->each(e->context, text, bytes);
        json_decref(object);
    }
    return rc;
}

int corpus_each_text(const struct corpus_options *o, int (*each)(void *context, const char *text, size_t bytes), void *context)
{
    struct each_text e = {o, each, context};
    struct reading r = {.o = o, .texts = true, .process = hand_over, .context = &e};
    struct file_list files = {0};
    int rc = OK;
    TRY(find_files(&files, o));
    TRY(read_all(&r, &files));
out:
    file_list_free(&files);
    return rc;
}
