/* distill inspect PATH: finds out what PATH is and has it read by who knows it. Owns the report, and the listing of single files:
 * the tensors of a safetensors file, keys and tensors of a GGUF file. */
#include "train/inspect.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <utf8proc.h>

#include "base/error.h"
#include "base/file.h"
#include "data/gguf.h"
#include "data/safetensors.h"
#include "train/command.h"

/* ---- the report ---- */

enum { LABEL_WIDTH = 24 };

void report_section(struct report *r, const char *key, const char *title)
{
    r->section = json_object();
    json_object_set_new(r->root, key, r->section);
    if (!r->json) printf("%s%s\n", r->sections++ ? "\n" : "", title);
}

void report_line(struct report *r, const char *key, json_t *value, const char *label, const char *fmt, ...)
{
    if (value) json_object_set_new(r->section, key, value);
    if (r->json) return;
    va_list ap;
    va_start(ap, fmt);
    printf("  %-*s", LABEL_WIDTH, label);
    vprintf(fmt, ap);
    putchar('\n');
    va_end(ap);
}

void report_int(struct report *r, const char *key, const char *label, int64_t value) { report_line(r, key, json_integer(value), label, "%lld", (long long)value); }
void report_text(struct report *r, const char *key, const char *label, const char *value) { report_line(r, key, json_string(value), label, "%s", value); }

const char *bytes_text(int64_t bytes)
{
    static _Thread_local char text[4][32];
    static _Thread_local int next;
    static const char *const unit[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    char *t = text[next++ & 3];
    double v = (double)bytes;
    int u = 0;
    while (v >= 1024 && u < 4) { v /= 1024; u++; }
    snprintf(t, 32, u ? "%.2f %s" : "%.0f %s", v, unit[u]);
    return t;
}

char *escaped(const char *bytes, size_t n)
{
    static const char names[] = "\nn\tt\rr\\\\\"\"";         /* a byte, then the letter it is written with */
    char *text = xmalloc(4 * n + 1), *out = text;
    for (size_t i = 0; i < n;) {
        utf8proc_int32_t c;
        utf8proc_ssize_t length = utf8proc_iterate((const utf8proc_uint8_t *)bytes + i, (utf8proc_ssize_t)(n - i), &c);
        const char *named = length == 1 && c ? strchr(names, c) : NULL;
        if (named && (named - names) % 2 == 0) { *out++ = '\\'; *out++ = named[1]; i++; continue; }
        utf8proc_category_t category = length > 0 ? utf8proc_category(c) : UTF8PROC_CATEGORY_CC;
        if (category == UTF8PROC_CATEGORY_CC || category == UTF8PROC_CATEGORY_CF || category == UTF8PROC_CATEGORY_CN || category == UTF8PROC_CATEGORY_CO ||
            category == UTF8PROC_CATEGORY_ZL || category == UTF8PROC_CATEGORY_ZP) {
            for (utf8proc_ssize_t k = length > 0 ? length : 1; k > 0; k--) out += sprintf(out, "\\x%02x", (unsigned char)bytes[i++]);
            continue;
        }
        memcpy(out, bytes + i, (size_t)length);
        out += length;
        i += (size_t)length;
    }
    *out = 0;
    return text;
}

int display_width(const char *utf8)
{
    int width = 0;
    for (const char *p = utf8; *p;) {
        utf8proc_int32_t c;
        utf8proc_ssize_t n = utf8proc_iterate((const utf8proc_uint8_t *)p, -1, &c);
        width += n > 0 ? utf8proc_charwidth(c) : 1;
        p += n > 0 ? n : 1;
    }
    return width;
}

/* ---- single files ---- */

enum { SHAPE_TEXT = TENSOR_MAX_DIMS * 24 };

/* One line of a list of tensors, and section[name]. */
static void report_tensor(struct report *r, int width, const char *name, const char *dtype, int n_dims, const int64_t *shape, size_t bytes)
{
    json_t *list = json_array();
    char text[SHAPE_TEXT] = "", *at = text;
    for (int d = 0; d < n_dims; d++) {
        json_array_append_new(list, json_integer(shape[d]));
        at += sprintf(at, "%s%lld", d ? ", " : "", (long long)shape[d]);
    }
    json_object_set_new(r->section, name, json_pack("{s:s, s:o, s:I}", "dtype", dtype, "shape", list, "bytes", (json_int_t)bytes));
    if (!r->json) printf("  %-*s  %-7s  [%s]  %s\n", width, name, dtype, text, bytes_text((int64_t)bytes));
}

static void report_total(struct report *r, int tensors, int64_t elements, int64_t bytes)
{
    report_section(r, "total", "total");
    report_int(r, "tensors", "tensors", tensors);
    report_int(r, "elements", "elements", elements);
    report_line(r, "bytes", json_integer(bytes), "bytes of the tensors", "%lld (%s)", (long long)bytes, bytes_text(bytes));
}

static int wider(int width, const char *name) { return (int)strlen(name) > width ? (int)strlen(name) : width; }

static int inspect_safetensors(struct report *r, const char *path)
{
    struct tensor_set *set = NULL;
    int64_t elements = 0, bytes = 0;
    int rc = OK, width = 0;
    TRY(tensor_set_open(&set, path));
    int n = tensor_set_count(set);
    report_section(r, "tensors", path);
    for (int i = 0; i < n; i++) width = wider(width, tensor_set_at(set, i)->name);
    for (int i = 0; i < n; i++) {
        const struct tensor_view *v = tensor_set_at(set, i);
        report_tensor(r, width, v->name, dtype_name(v->dtype), v->n_dims, v->shape, v->bytes);
        elements += v->count;
        bytes += (int64_t)v->bytes;
    }
    report_total(r, n, elements, bytes);
out:
    tensor_set_close(set);
    return rc;
}

/* A key's value as a person reads it: numbers, the beginning of a text, the length of an array. malloc'd */
static char *gguf_value_text(const struct gguf_file *f, const struct gguf_value *v)
{
    static const char *const names[GGUF_TYPE_COUNT] = {"u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64"};
    enum { SHOWN_BYTES = 72 };
    double real = 0;
    int64_t whole = 0;
    bool present;
    if (v->type == GGUF_ARRAY) return xasprintf("%llu x %s", (unsigned long long)v->count, names[v->item]);
    if (v->type == GGUF_BOOL) return xstrdup(v->data[0] ? "true" : "false");
    if (v->type == GGUF_STRING) {
        char *inner = escaped((const char *)v->data, v->bytes < SHOWN_BYTES ? v->bytes : SHOWN_BYTES);
        char *text = xasprintf("\"%s\"%s", inner, v->bytes > SHOWN_BYTES ? "..." : "");
        free(inner);
        return text;
    }
    if (v->type == GGUF_F32 || v->type == GGUF_F64) return gguf_get_double(f, v->key, &real, &present) == OK ? xasprintf("%.8g", real) : xstrdup("?");
    return gguf_get_int(f, v->key, &whole, &present) == OK ? xasprintf("%lld", (long long)whole) : xstrdup("?");
}

static int64_t count_bad(const struct gguf_tensor *t)
{
    enum { STAGE = 1 << 16 };
    float *stage = xmalloc(STAGE * sizeof *stage);
    int64_t bad = 0;
    for (int64_t first = 0; first < t->count; first += STAGE) {
        int64_t n = t->count - first < STAGE ? t->count - first : STAGE;
        gguf_to_float(t, first, n, stage);
        for (int64_t i = 0; i < n; i++) bad += !isfinite(stage[i]);
    }
    free(stage);
    return bad;
}

static int inspect_gguf(struct report *r, const char *path)
{
    struct gguf_file *f = NULL;
    const struct gguf_tensor *worst = NULL;
    int64_t elements = 0, bytes = 0, bad = 0;
    int rc = OK, width = 0;
    TRY(gguf_open(&f, path));
    report_section(r, "keys", path);
    for (int i = 0; i < gguf_key_count(f); i++) width = wider(width, gguf_key_at(f, i)->key);
    for (int i = 0; i < gguf_key_count(f); i++) {
        const struct gguf_value *v = gguf_key_at(f, i);
        char *text = gguf_value_text(f, v);
        json_object_set_new(r->section, v->key, json_string(text));
        if (!r->json) printf("  %-*s  %s\n", width, v->key, text);
        free(text);
    }
    report_section(r, "tensors", "tensors");
    width = 0;
    for (int i = 0; i < gguf_tensor_count(f); i++) width = wider(width, gguf_tensor_at(f, i)->name);
    for (int i = 0; i < gguf_tensor_count(f); i++) {
        const struct gguf_tensor *t = gguf_tensor_at(f, i);
        int64_t here = count_bad(t);
        report_tensor(r, width, t->name, gguf_dtype_name(t->dtype), t->n_dims, t->shape, t->bytes);
        elements += t->count;
        bytes += (int64_t)t->bytes;
        if (here && !worst) worst = t;
        bad += here;
    }
    report_total(r, gguf_tensor_count(f), elements, bytes);
    report_line(r, "not_finite", json_integer(bad), "NaN and Inf", bad ? "%lld" : "none", (long long)bad);
    if (bad) rc = fail(ERR_NUMERIC, "%s: %lld values are NaN or Inf, the first in %s; export it again from good weights", path, (long long)bad, worst->name);
out:
    gguf_close(f);
    return rc;
}

/* ---- what is it? ---- */

static bool ends_with(const char *text, const char *end)
{
    size_t n = strlen(text), m = strlen(end);
    return n >= m && !strcmp(text + n - m, end);
}

static bool holds(const char *dir, const char *name)
{
    char *path = path_join(dir, name);
    bool found = path_exists(path);
    free(path);
    return found;
}

/* .../shards/shard-NNNNNN.h5 -> the dataset's directory and NNNNNN */
static bool is_shard(const char *path, char **dir, int64_t *shard)
{
    const char *name = strrchr(path, '/');
    name = name ? name + 1 : path;
    long long n;
    int end = 0, before = (int)(name - path);
    if (sscanf(name, "shard-%6lld.h5%n", &n, &end) != 1 || end != 15 || name[end] || n < 0) return false;
    *shard = n;
    if (before == 7 && !strncmp(path, "shards/", 7)) *dir = xstrdup(".");
    else if (before > 8 && !strncmp(name - 8, "/shards/", 8)) *dir = xasprintf("%.*s", before - 8, path);
    else *dir = xasprintf("%.*s..", before, path);
    return true;
}

static int inspect_path(struct report *r, const struct inspect_options *o)
{
    const char *path = o->path;
    char *dir = NULL;
    int64_t shard;
    int rc;
    if (!path_exists(path)) return fail(ERR_IO, "%s: no such file or directory", path);
    bool dataset = path_is_dir(path) && holds(path, "manifest.json");
    if (!dataset && (o->verify || o->repair || o->against || o->end_row)) return fail(ERR_USAGE, "%s: --verify, --repair, --against and --rows need a dataset's directory", path);
    if (o->verify || o->repair) return inspect_verify(r, o);
    if (o->against) return inspect_against(r, o);
    if (o->end_row) return inspect_rows(o);
    if (dataset) return inspect_dataset(r, o, path, -1);
    if (!path_is_dir(path) && is_shard(path, &dir, &shard)) {
        rc = inspect_dataset(r, o, dir, shard);
        free(dir);
        return rc;
    }
    if (o->row >= 0) return fail(ERR_USAGE, "%s: --row needs a dataset of shards or one of its shard files", path);
    if (path_is_dir(path) && holds(path, "config.json")) return inspect_model(r, o);
    if (path_is_dir(path) && holds(path, "checkpoints"))
        return fail(ERR_USAGE, "%s is the directory of a run; inspect one of its checkpoints, %s/checkpoints/step-NNNNNNNN", path, path);
    if (ends_with(path, ".safetensors")) return inspect_safetensors(r, path);
    if (ends_with(path, ".gguf")) return inspect_gguf(r, path);
    return fail(ERR_USAGE, "%s is none of what inspect reads: a model directory (config.json), a dataset (manifest.json), a shard (shard-NNNNNN.h5), a .safetensors or .gguf file", path);
}

static void print_help(void)
{
    printf("distill inspect PATH [--row R] [--top N] [--tokenizer DIR] [--json]\n"
           "distill inspect DATASET --verify | --repair | --against MODEL | --rows A:B --jsonl\n\n"
           "Reads and validates everything in PATH and says what is in it. PATH is\n"
           "  a model directory or a checkpoint: architecture, parameters, types, tokenizer; every value is read, NaN and Inf are counted (exit code 5)\n"
           "  a dataset of logit shards, or one shard file: identity, rows, bytes per token, percentiles of the kept mass\n"
           "  a .safetensors or .gguf file: its tensors, and what a GGUF says about the model\n\n"
           "  --row R          show row R of a dataset: every token, whether it is supervised, what the teacher expected next\n"
           "  --top N          teacher choices shown per position, default 5\n"
           "  --tokenizer DIR  tokenizer.json or its directory, to show tokens as text; without it they are ids\n"
           "  --json           one JSON object instead of text\n\n"
           "  --verify         read a whole dataset and tell every fault: journal chain, SHA-256, structure, CRC, ranges, order and mass of every row, files that\n"
           "                   are missing, twice there or from elsewhere. Exit code 3, or 6 when everything found is from another dataset, 4 when a disk fails\n"
           "  --repair         the same, then set what is broken aside (renamed to .quarantine, nothing is deleted), enter whole shards that the journal lacks,\n"
           "                   and write the journal anew. The next teacher-dump makes exactly the missing shards. Not while a teacher-dump or a train uses the dataset\n"
           "  --against MODEL  run MODEL (a directory) over sampled rows and report the noise of the stored targets: KL(stored || recomputed), agreement of the\n"
           "                   first choice and of the K best. With --sample ROWS (default 8), --seed S, --device cpu|cuda, --threads N\n"
           "  --rows A:B       with --jsonl: rows A to B-1, a JSON object per line: tokens, mask, documents, and per position the ids with their log-probabilities\n\n"
           "Examples:\n    distill inspect run/checkpoints/step-00002000\n    distill inspect logits --row 3 --tokenizer teacher\n");
}

static int parse_int(const char *flag, const char *value, int64_t low, int64_t high, int64_t *out)
{
    char *end;
    long long v = strtoll(value, &end, 10);
    if (end == value || *end || v < low || v > high)
        return fail(ERR_USAGE, "%s %s: is not a whole number from %lld to %lld", flag, value, (long long)low, (long long)high);
    *out = v;
    return OK;
}

static int parse_range(const char *value, int64_t *first, int64_t *end)
{
    long long a, b;
    int used = 0;
    if (sscanf(value, "%18lld:%18lld%n", &a, &b, &used) != 2 || value[used] || a < 0 || b <= a)
        return fail(ERR_USAGE, "--rows %s: is not a range A:B of rows, B the first that is left out", value);
    *first = a;
    *end = b;
    return OK;
}

int command_inspect(int argc, char **argv)
{
    struct inspect_options o = {.row = -1, .top = 5, .sample = 8, .seed = 1, .device = "cpu"};
    struct report r = {.root = json_object()};
    int64_t top = o.top;
    int rc = OK;
    for (int i = 1; i < argc; i++) {
        const char *a = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (!strcmp(a, "--help") || !strcmp(a, "-h")) { print_help(); goto out; }
        else if (!strcmp(a, "--json")) r.json = true;
        else if (!strcmp(a, "--jsonl")) o.jsonl = true;
        else if (!strcmp(a, "--verify")) o.verify = true;
        else if (!strcmp(a, "--repair")) o.repair = true;
        else if (a[0] != '-' && !o.path) o.path = a;
        else if (a[0] != '-') { rc = fail(ERR_USAGE, "takes one path; %s is a second one", a); goto out; }
        else if (!value) { rc = fail(ERR_USAGE, "%s is unknown or needs a value; see distill inspect --help", a); goto out; }
        else if (!strcmp(a, "--row")) { TRY(parse_int(a, value, 0, INT64_MAX, &o.row)); i++; }
        else if (!strcmp(a, "--top")) { TRY(parse_int(a, value, 1, 256, &top)); o.top = (int)top; i++; }
        else if (!strcmp(a, "--tokenizer")) { o.tokenizer = value; i++; }
        else if (!strcmp(a, "--rows")) { TRY(parse_range(value, &o.first_row, &o.end_row)); i++; }
        else if (!strcmp(a, "--against")) { o.against = value; i++; }
        else if (!strcmp(a, "--device")) { o.device = value; i++; }
        else if (!strcmp(a, "--sample")) { TRY(parse_int(a, value, 1, INT32_MAX, &o.sample)); i++; }
        else if (!strcmp(a, "--seed")) { TRY(parse_int(a, value, 0, INT64_MAX, &o.seed)); i++; }
        else if (!strcmp(a, "--threads")) { TRY(parse_int(a, value, 0, 4096, &o.threads)); i++; }
        else { rc = fail(ERR_USAGE, "unknown option %s; see distill inspect --help", a); goto out; }
    }
    if (!o.path) { rc = fail(ERR_USAGE, "no path given; see distill inspect --help"); goto out; }
    if (!o.jsonl != !o.end_row) { rc = fail(ERR_USAGE, "--rows A:B and --jsonl go together; see distill inspect --help"); goto out; }
    if ((o.verify || o.repair) + (o.against != NULL) + (o.end_row != 0) + (o.row >= 0) > 1) { rc = fail(ERR_USAGE, "--verify or --repair, --against, --rows and --row are different questions: ask one at a time"); goto out; }
    rc = inspect_path(&r, &o);
    if (r.json && json_object_size(r.root)) {            /* what was found before a failure is worth reading */
        json_dumpf(r.root, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(9));
        putchar('\n');
    }
out:
    json_decref(r.root);
    return rc;
}
