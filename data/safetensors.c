/* Reading safetensors: the header checks, the index of a sharded model, conversion to float. Scales of F8_E4M3: tensor_scale.c.
 * Writing: safetensors_write.c.
 *
 *     u64 N (little endian) | N bytes of JSON | data
 *     {"__metadata__": {string: string}, NAME: {"dtype": "BF16", "shape": [..], "data_offsets": [begin, end]}, ...}
 *
 * A file is good when the tensors, sorted by offset, tile the data exactly: first begin = 0, each begin = the end before, the
 * last end = the end of the file, end - begin = product(shape) * width. What the reference validator accepts is accepted, but
 * for names used twice or holding NUL, more than 8 dimensions and element types this program has no use for.
 * The header is cut into one piece per tensor before jansson sees it, so that the memory of a parse stays a small multiple of
 * one tensor's text and not of a 100 MB header.
 */
#include "data/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "base/half.h"
#include "base/hash.h"
#include "base/json.h"
#include "data/safetensors_internal.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tensors are used in place, as the little-endian bytes of the file");

enum {
    MAX_HEADER = 100000000,          /* the limit of the reference validator */
    MAX_DESCRIPTION = 1 << 16,       /* text of one tensor; a full one with 8 dimensions is under 300 bytes */
    MAX_NESTING = 64,
    MAX_INDEX = 1 << 26
};

static const struct { const char *name; size_t bytes; } dtypes[DTYPE_COUNT] = {
    [DTYPE_F32] = {"F32", 4}, [DTYPE_F16] = {"F16", 2}, [DTYPE_BF16] = {"BF16", 2}, [DTYPE_F64] = {"F64", 8}, [DTYPE_I64] = {"I64", 8},
    [DTYPE_I32] = {"I32", 4}, [DTYPE_I16] = {"I16", 2}, [DTYPE_I8] = {"I8", 1}, [DTYPE_U64] = {"U64", 8}, [DTYPE_U32] = {"U32", 4},
    [DTYPE_U16] = {"U16", 2}, [DTYPE_U8] = {"U8", 1}, [DTYPE_BOOL] = {"BOOL", 1}, [DTYPE_F8_E4M3] = {"F8_E4M3", 1},
    [DTYPE_F8_E5M2] = {"F8_E5M2", 1},
};
size_t dtype_bytes(enum dtype d) { return dtypes[d].bytes; }
const char *dtype_name(enum dtype d) { return dtypes[d].name; }

/* Control characters (those of U+0080 to U+009F are C2 80 to C2 9F) are replaced, long text is cut. */
const char *tensor_name_shown(const char *name)
{
    static _Thread_local char text[2][200];
    static _Thread_local int turn;
    char *out = text[turn ^= 1];
    const unsigned char *in = (const unsigned char *)name;
    size_t i = 0;
    for (; in[i] && i < sizeof text[0] - 4; i++) out[i] = in[i] < 0x20 || in[i] == 0x7f || (in[i] == 0xc2 && in[i + 1] < 0xa0) ? '?' : name[i];
    strcpy(out + i, name[i] ? "..." : "");
    return out;
}

/* ---- the members of a JSON object, one at a time ---- */

struct members { const char *start, *p, *end; const char *path; bool first; };
struct span { const char *p; size_t n; };

static int bad_json(const struct members *m, const char *what)
{
    return fail(ERR_INPUT, "%s: the header is not valid JSON at byte %zu: %s; the file is damaged or not safetensors", m->path,
                (size_t)(m->p - m->start), what);
}

static void skip_space(struct members *m)
{
    while (m->p < m->end && (*m->p == ' ' || *m->p == '\t' || *m->p == '\n' || *m->p == '\r')) m->p++;
}

/* `text` must be one object and nothing else but white space */
static int members_begin(struct members *m, const char *text, size_t n, const char *path)
{
    *m = (struct members){text, text, text + n, path, true};
    if ((m->p = memchr(text, 0, n))) return bad_json(m, "a NUL byte");   /* jansson passes over one behind a number */
    m->p = text;
    skip_space(m);
    if (m->p == m->end || *m->p != '{') return bad_json(m, "an object was expected");
    m->p++;
    return OK;
}

static int skip_string(struct members *m)
{
    for (m->p++; m->p < m->end; m->p++) {
        if (*m->p == '\\') m->p++;
        else if (*m->p == '"') { m->p++; return OK; }
    }
    m->p = m->end;   /* an escape may have stepped over it */
    return bad_json(m, "a string does not end");
}

/* Finds where a value ends. What is inside is left to jansson, which sees every byte of it. */
static int skip_value(struct members *m, struct span *value)
{
    int depth = 0;
    value->p = m->p;
    while (m->p < m->end) {
        char c = *m->p;
        if (c == '"') {
            int rc = skip_string(m);
            if (rc != OK) return rc;
            if (!depth) break;
            continue;
        }
        if (!depth && strchr(",}] \t\n\r", c)) break;
        m->p++;
        if (c == '{' || c == '[') {
            if (++depth > MAX_NESTING) return bad_json(m, "nested too deeply");
        } else if ((c == '}' || c == ']') && --depth == 0) break;
    }
    value->n = (size_t)(m->p - value->p);
    return OK;
}

/* *more is false after the last member */
static int members_next(struct members *m, struct span *key, struct span *value, bool *more)
{
    int rc = OK;
    skip_space(m);
    if (m->p < m->end && *m->p == '}') {
        m->p++;
        skip_space(m);
        *more = false;
        return m->p == m->end ? OK : bad_json(m, "text after the object");
    }
    if (!m->first) {
        if (m->p == m->end || *m->p != ',') return bad_json(m, "',' or '}' was expected");
        m->p++;
        skip_space(m);
    }
    m->first = false;
    if (m->p == m->end || *m->p != '"') return bad_json(m, "a key was expected");
    key->p = m->p;
    TRY(skip_string(m));
    key->n = (size_t)(m->p - key->p);
    skip_space(m);
    if (m->p == m->end || *m->p != ':') return bad_json(m, "':' was expected");
    m->p++;
    skip_space(m);
    *more = true;
    rc = skip_value(m, value);
out:
    return rc;
}

static int parse_span(const struct members *m, struct span s, json_t **value)
{
    json_error_t e;
    *value = json_loadb(s.p, s.n, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &e);
    if (*value) return OK;
    return fail(ERR_INPUT, "%s: the header is not valid JSON at byte %zu: %s; the file is damaged or not safetensors", m->path,
                (size_t)(s.p - m->start) + (size_t)(e.position > 0 ? e.position : 0), tensor_name_shown(e.text));
}

static int parse_string(const struct members *m, struct span s, char **text)
{
    json_t *value;
    int rc = parse_span(m, s, &value);
    if (rc != OK) return rc;
    if (json_is_string(value)) *text = xstrdup(json_string_value(value));
    else rc = bad_json(m, "a string was expected");
    json_decref(value);
    return rc;
}

static int by_string(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

/* __metadata__ carries nothing we use; it is checked because the format says what it may hold */
static int check_metadata(struct span text, const char *path)
{
    struct members m;
    struct span key, value;
    char **keys = NULL, *s = NULL;
    int n = 0, room = 0, rc = OK;
    if (text.n == 4 && !memcmp(text.p, "null", 4)) return OK;
    if (members_begin(&m, text.p, text.n, path) != OK)
        return fail(ERR_INPUT, "%s: __metadata__ in the header is not an object; the file is damaged", path);
    for (bool more;;) {
        TRY(members_next(&m, &key, &value, &more));
        if (!more) break;
        if (n == room) keys = xrealloc(keys, (size_t)(room = room ? 2 * room : 16) * sizeof *keys);
        TRY(parse_string(&m, key, &keys[n]));
        n++;
        if (!value.n || *value.p != '"') {
            rc = fail(ERR_INPUT, "%s: __metadata__ in the header: the value of \"%s\" is not a string", path, tensor_name_shown(keys[n - 1]));
            goto out;
        }
        TRY(parse_string(&m, value, &s));
        free(s);
        s = NULL;
    }
    if (n) qsort(keys, (size_t)n, sizeof *keys, by_string);
    for (int i = 1; i < n; i++)
        if (!strcmp(keys[i - 1], keys[i])) {
            rc = fail(ERR_INPUT, "%s: __metadata__ in the header has the key \"%s\" twice", path, tensor_name_shown(keys[i]));
            goto out;
        }
out:
    names_free(keys, n);
    return rc;
}

/* ---- one tensor, one file ---- */

static bool is_size(const json_t *v) { return json_is_integer(v) && json_integer_value(v) >= 0; }

static int parse_tensor(struct entry *e, const struct members *m, struct span text)
{
    struct tensor_view *v = &e->view;
    const char *path = m->path, *name = tensor_name_shown(v->name);
    json_t *o = NULL;
    int rc = OK;
    if (text.n > MAX_DESCRIPTION) return fail(ERR_INPUT, "%s: tensor %s: its description in the header is %zu bytes long", path, name, text.n);
    TRY(parse_span(m, text, &o));
    if (memmem(text.p, text.n, "-0", 2)) {   /* which jansson takes for 0 */
        rc = fail(ERR_INPUT, "%s: tensor %s: the header gives it a negative size", path, name);
        goto out;
    }
    const json_t *dtype = json_object_get(o, "dtype"), *shape = json_object_get(o, "shape"), *offsets = json_object_get(o, "data_offsets");
    if (!json_is_string(dtype) || !json_is_array(shape) || !json_is_array(offsets)) {
        rc = fail(ERR_INPUT, "%s: tensor %s: the header does not give it a dtype, a shape and data_offsets", path, name);
        goto out;
    }
    int d = 0;
    while (d < DTYPE_COUNT && strcmp(json_string_value(dtype), dtypes[d].name)) d++;
    if (d == DTYPE_COUNT) {
        rc = fail(ERR_INPUT, "%s: tensor %s: dtype %s is not supported; convert the weights to F32, F16 or BF16", path, name,
                  tensor_name_shown(json_string_value(dtype)));
        goto out;
    }
    v->dtype = (enum dtype)d;
    if (json_array_size(shape) > TENSOR_MAX_DIMS) {
        rc = fail(ERR_INPUT, "%s: tensor %s: %zu dimensions, at most %d are supported", path, name, json_array_size(shape), TENSOR_MAX_DIMS);
        goto out;
    }
    v->n_dims = (int)json_array_size(shape);
    v->count = 1;
    int64_t bytes;
    for (int i = 0; i < v->n_dims; i++) {
        const json_t *size = json_array_get(shape, (size_t)i);
        if (!is_size(size)) { rc = fail(ERR_INPUT, "%s: tensor %s: dimension %d of its shape is not a size", path, name, i); goto out; }
        v->shape[i] = json_integer_value(size);
        if (__builtin_mul_overflow(v->count, v->shape[i], &v->count)) {
            rc = fail(ERR_INPUT, "%s: tensor %s: its shape overflows 64 bits", path, name);
            goto out;
        }
    }
    if (__builtin_mul_overflow(v->count, (int64_t)dtypes[d].bytes, &bytes)) {
        rc = fail(ERR_INPUT, "%s: tensor %s: its shape overflows 64 bits", path, name);
        goto out;
    }
    const json_t *begin = json_array_get(offsets, 0), *end = json_array_get(offsets, 1);
    if (json_array_size(offsets) != 2 || !is_size(begin) || !is_size(end)) {
        rc = fail(ERR_INPUT, "%s: tensor %s: data_offsets is not a pair of sizes", path, name);
        goto out;
    }
    e->begin = (uint64_t)json_integer_value(begin);
    e->end = (uint64_t)json_integer_value(end);
    if (e->end < e->begin || e->end - e->begin != (uint64_t)bytes) {
        rc = fail(ERR_INPUT, "%s: tensor %s: data_offsets %llu to %llu do not hold the %lld bytes of its shape and dtype", path, name,
                  (unsigned long long)e->begin, (unsigned long long)e->end, (long long)bytes);
        goto out;
    }
    v->bytes = (size_t)bytes;
out:
    json_decref(o);
    return rc;
}

static int by_offset(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end;
}

static int by_name(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;
    int c = strcmp(x->view.name, y->view.name);
    return c ? c : x->view.file - y->view.file;
}

/* Appends the tensors of file number `file`, which is mapped, to the set. */
static int read_header(struct tensor_set *s, int file)
{
    const struct mapped_file *f = &s->files[file];
    const char *map = f->map;
    struct members m;
    struct span key, value;
    bool metadata = false;
    int rc = OK, first = s->n;
    uint64_t n, at = 0;
    if (f->bytes < 8) return fail(ERR_INPUT, "%s: is %zu bytes long, too short for safetensors; download or copy it again", f->path, f->bytes);
    memcpy(&n, map, 8);
    if (n > MAX_HEADER) return fail(ERR_INPUT, "%s: claims a header of %llu bytes, more than the %d allowed; it is not a safetensors file", f->path,
                                    (unsigned long long)n, MAX_HEADER);
    if (n > f->bytes - 8) return fail(ERR_INPUT, "%s: claims a header of %llu bytes but is only %zu long; download or copy it again", f->path,
                                      (unsigned long long)n, f->bytes);
    uint64_t data_bytes = f->bytes - 8 - n;

    TRY(members_begin(&m, map + 8, n, f->path));
    for (bool more;;) {
        TRY(members_next(&m, &key, &value, &more));
        if (!more) break;
        if (s->n == s->room) {
            CHECK(s->room < 1 << 29, "too many tensors in %s", f->path);
            s->entries = xrealloc(s->entries, (size_t)(s->room = s->room ? 2 * s->room : 64) * sizeof *s->entries);
        }
        struct entry *e = &s->entries[s->n];
        *e = (struct entry){.view = {.file = file}};
        char *name;
        TRY(parse_string(&m, key, &name));
        if (!strcmp(name, "__metadata__")) {
            free(name);
            if (metadata) { rc = fail(ERR_INPUT, "%s: the header has __metadata__ twice", f->path); goto out; }
            metadata = true;
            TRY(check_metadata(value, f->path));
            continue;
        }
        e->view.name = name;
        s->n++;
        TRY(parse_tensor(e, &m, value));
    }
    if (s->n > first) qsort(s->entries + first, (size_t)(s->n - first), sizeof *s->entries, by_offset);
    for (int i = first; i < s->n; i++) {
        struct entry *e = &s->entries[i];
        if (e->begin != at) {
            rc = fail(ERR_INPUT, "%s: tensor %s: begins at byte %llu of the data where %llu was expected: the file has a hole or an overlap", f->path,
                      tensor_name_shown(e->view.name), (unsigned long long)e->begin, (unsigned long long)at);
            goto out;
        }
        at = e->end;
        if (at > data_bytes) {
            rc = fail(ERR_INPUT, "%s: tensor %s: ends at byte %llu of the data, the file holds %llu; download or copy it again", f->path,
                      tensor_name_shown(e->view.name), (unsigned long long)at, (unsigned long long)data_bytes);
            goto out;
        }
        e->view.data = map + 8 + n + e->begin;
    }
    if (at != data_bytes) rc = fail(ERR_INPUT, "%s: holds %llu bytes of data, its header describes %llu; download or copy it again", f->path,
                                    (unsigned long long)data_bytes, (unsigned long long)at);
out:
    return rc;
}

/* Takes fd and path. */
static int add_file(struct tensor_set *s, int fd, char *path)
{
    struct stat st;
    int rc = OK, file = s->n_files;
    s->files = xrealloc(s->files, (size_t)(file + 1) * sizeof *s->files);
    s->files[file] = (struct mapped_file){path, fd, NULL, 0};
    s->n_files++;
    if (fstat(fd, &st)) { rc = fail_errno(ERR_IO, "%s: cannot stat", path); goto out; }
    if (!S_ISREG(st.st_mode)) { rc = fail(ERR_INPUT, "%s: is not a regular file", path); goto out; }
    if (st.st_size) {   /* an empty file cannot be mapped; read_header() says what is wrong with it */
        void *map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (map == MAP_FAILED) { rc = fail_errno(ERR_IO, "%s: cannot map its %lld bytes", path, (long long)st.st_size); goto out; }
        s->files[file].map = map;
        s->files[file].bytes = (size_t)st.st_size;
    }
    TRY(read_header(s, file));
out:
    return rc;
}

/* ---- directories ---- */

static bool is_inside(const char *path, const char *dir)
{
    size_t n = strlen(dir);
    return !strncmp(path, dir, n) && (path[n] == '/' || (n && dir[n - 1] == '/'));
}

/* A link may point to a file of the directory itself or, where the directory is a snapshot of a Hugging Face cache
 * (models--X/snapshots/REVISION), to models--X/blobs, where that cache keeps the bytes. */
static int follow_link(const char *dir, const char *name, int *fd)
{
    char *path = path_join(dir, name), *target = realpath(path, NULL), *root = realpath(dir, NULL), *blobs = NULL;
    int rc = OK;
    if (!target || !root) { rc = fail_errno(ERR_INPUT, "%s: is a link that leads nowhere; copy the file in its place", path); goto out; }
    char *slash = strrchr(root, '/'), *parent = NULL;
    if (slash && slash > root) parent = memrchr(root, '/', (size_t)(slash - root));
    if (parent && slash - parent == 10 && !memcmp(parent, "/snapshots", 10)) blobs = xasprintf("%.*s/blobs", (int)(parent - root), root);
    if (!is_inside(target, root) && !(blobs && is_inside(target, blobs))) {
        rc = fail(ERR_INPUT, "%s: is a link to %s, outside the model directory; copy the file in its place", path, target);
        goto out;
    }
    *fd = open(target, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (*fd < 0) rc = fail_errno(ERR_IO, "%s: cannot open", target);
out:
    free(path);
    free(target);
    free(root);
    free(blobs);
    return rc;
}

/* O_NONBLOCK: a FIFO put in a file's place must not hang us. *fd is -1 and the status OK when `name` does not exist. */
static int open_member(int dirfd, const char *dir, const char *name, int *fd)
{
    *fd = openat(dirfd, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (*fd >= 0 || errno == ENOENT) return OK;
    if (errno == ELOOP) return follow_link(dir, name, fd);
    return fail_errno(ERR_IO, "%s/%s: cannot open", dir, name);
}

static int read_index(int fd, const char *path, json_t **root)
{
    struct stat st;
    char *text = NULL;
    int rc = OK;
    if (fstat(fd, &st)) { rc = fail_errno(ERR_IO, "%s: cannot stat", path); goto out; }
    if (!S_ISREG(st.st_mode)) { rc = fail(ERR_INPUT, "%s: is not a regular file", path); goto out; }
    if (st.st_size > MAX_INDEX) {
        rc = fail(ERR_INPUT, "%s: is %lld bytes, more than the %d an index may have", path, (long long)st.st_size, MAX_INDEX);
        goto out;
    }
    text = xmalloc((size_t)st.st_size);
    TRY(file_pread(fd, text, (size_t)st.st_size, 0, path));
    TRY(json_read_text(text, (size_t)st.st_size, path, root));
out:
    free(text);
    return rc;
}

/* [A-Za-z0-9._-]+ ending in .safetensors: no separators, so no way out of the directory */
static bool is_plain_name(const char *name)
{
    size_t n = strlen(name), suffix = strlen(".safetensors");
    return n > suffix && n <= 255 && !strcmp(name + n - suffix, ".safetensors") &&
           strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-") == n;
}

/* Every tensor in the file the index names, none beside them, none twice, total_size as the tensors have it. */
static int check_index(const struct tensor_set *s, const json_t *index, const json_t *weight_map, const char *path)
{
    int64_t total = 0;
    for (int i = 0; i < s->n; i++) {
        const struct tensor_view *v = &s->entries[i].view;
        const char *file = strrchr(s->files[v->file].path, '/') + 1, *want = json_string_value(json_object_get(weight_map, v->name));
        if (!want)
            return fail(ERR_INPUT, "%s: tensor %s of %s is not in the index; files of two models may be mixed here", path, tensor_name_shown(v->name), file);
        if (strcmp(want, file)) return fail(ERR_INPUT, "%s: tensor %s is in %s, the index says %s", path, tensor_name_shown(v->name), file, want);
        total += (int64_t)v->bytes;
    }
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)weight_map, name, value)
        if (!tensor_set_find(s, name)) return fail(ERR_INPUT, "%s: tensor %s is not in %s, where the index puts it; download that file again", path,
                                                   tensor_name_shown(name), json_string_value(value));
    const json_t *stated = json_object_get(json_object_get(index, "metadata"), "total_size");
    bool agrees = json_is_integer(stated) ? json_integer_value(stated) == total : json_is_real(stated) && json_real_value(stated) == (double)total;
    if (stated && !json_is_null(stated) && !agrees)
        return fail(ERR_INPUT, "%s: metadata.total_size is not the %lld bytes its tensors have; download the index and its files again", path,
                    (long long)total);
    return OK;
}

static int open_sharded(struct tensor_set *s, int dirfd, const char *dir, int index_fd)
{
    char *path = path_join(dir, "model.safetensors.index.json");
    const char *name, **files = NULL;
    json_t *index = NULL, *value;
    int rc = OK;
    size_t n = 0;
    TRY(read_index(index_fd, path, &index));
    json_t *weight_map = json_object_get(index, "weight_map");
    if (!json_is_object(weight_map) || !json_object_size(weight_map)) {
        rc = fail(ERR_INPUT, "%s: has no weight_map that names files", path);
        goto out;
    }
    files = xmalloc(json_object_size(weight_map) * sizeof *files);
    json_object_foreach(weight_map, name, value) {
        const char *file = json_string_value(value);
        if (!file || !is_plain_name(file)) {
            rc = fail(ERR_INPUT, "%s: tensor %s: \"%s\" is not a plain name of a .safetensors file in this directory", path, tensor_name_shown(name),
                      file ? tensor_name_shown(file) : "(not a string)");
            goto out;
        }
        files[n++] = file;
    }
    qsort(files, n, sizeof *files, by_string);
    for (size_t i = 0; i < n; i++) {
        if (i && !strcmp(files[i - 1], files[i])) continue;
        int fd;
        TRY(open_member(dirfd, dir, files[i], &fd));
        if (fd < 0) { rc = fail(ERR_INPUT, "%s/%s: does not exist, but the index names it; download it", dir, files[i]); goto out; }
        TRY(add_file(s, fd, path_join(dir, files[i])));
    }
    qsort(s->entries, (size_t)s->n, sizeof *s->entries, by_name);
    TRY(check_index(s, index, weight_map, path));
out:
    json_decref(index);
    free(files);
    free(path);
    return rc;
}

/* model.safetensors is preferred to an index, as transformers does. */
static int open_directory(struct tensor_set *s, int dirfd, const char *dir)
{
    int fd;
    int rc = open_member(dirfd, dir, "model.safetensors", &fd);
    if (rc != OK) return rc;
    if (fd >= 0) return add_file(s, fd, path_join(dir, "model.safetensors"));
    rc = open_member(dirfd, dir, "model.safetensors.index.json", &fd);
    if (rc != OK) return rc;
    if (fd < 0)
        return fail(ERR_INPUT, "%s: holds neither model.safetensors nor model.safetensors.index.json; only safetensors weights are read", dir);
    rc = open_sharded(s, dirfd, dir, fd);
    close(fd);
    return rc;
}

int tensor_set_open(struct tensor_set **out, const char *path)
{
    struct tensor_set *s = xcalloc(1, sizeof *s);
    struct stat st;
    int rc = OK, fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &st)) { rc = fail_errno(ERR_IO, "%s: cannot open", path); goto out; }
    if (S_ISDIR(st.st_mode)) {
        TRY(open_directory(s, fd, path));
    } else {
        int file = fd;
        fd = -1;
        TRY(add_file(s, file, xstrdup(path)));
    }
    if (s->n) qsort(s->entries, (size_t)s->n, sizeof *s->entries, by_name);
    for (int i = 1; i < s->n; i++) {
        const struct tensor_view *a = &s->entries[i - 1].view, *b = &s->entries[i].view;
        if (!strcmp(a->name, b->name)) {
            rc = fail(ERR_INPUT, "%s: tensor %s appears twice, there and in %s", s->files[b->file].path, tensor_name_shown(b->name), s->files[a->file].path);
            goto out;
        }
    }
    *out = s;
    s = NULL;
out:
    if (fd >= 0) close(fd);
    tensor_set_close(s);
    return rc;
}

void tensor_set_close(struct tensor_set *s)
{
    if (!s) return;
    for (int i = 0; i < s->n; i++) free((char *)s->entries[i].view.name);
    for (int i = 0; i < s->n_files; i++) {
        if (s->files[i].map) munmap(s->files[i].map, s->files[i].bytes);
        close(s->files[i].fd);
        free(s->files[i].path);
    }
    for (int i = 0; i < s->n_scales; i++) free(s->scales[i].value);
    free(s->scales);
    free(s->entries);
    free(s->files);
    free(s);
}

int tensor_set_count(const struct tensor_set *s) { return s->n; }
const struct tensor_view *tensor_set_at(const struct tensor_set *s, int i) { return &s->entries[i].view; }
int tensor_set_files(const struct tensor_set *s) { return s->n_files; }
const char *tensor_set_file_path(const struct tensor_set *s, int file) { return s->files[file].path; }

static int name_against(const void *name, const void *entry) { return strcmp(name, ((const struct entry *)entry)->view.name); }

const struct tensor_view *tensor_set_find(const struct tensor_set *s, const char *name)
{
    const struct entry *e = s->n ? bsearch(name, s->entries, (size_t)s->n, sizeof *s->entries, name_against) : NULL;
    return e ? &e->view : NULL;
}

enum { HASHED = 16 << 20, HASHED_READ = 1 << 20 };            /* bytes of a tensor that have a hash of their own; of a read */

/* `count` elements from `first` on: the SHA-256 of their bytes */
static int hash_of_elements(const struct tensor_set *s, const struct tensor_view *t, int64_t first, int64_t count, char *buffer, char hex[SHA256_HEX])
{
    int64_t width = (int64_t)dtype_bytes(t->dtype), most = HASHED_READ / width;
    struct sha256 *h = sha256_new();
    int rc = OK;
    for (int64_t done = 0, n; rc == OK && done < count; done += n) {
        n = count - done < most ? count - done : most;
        rc = tensor_read(s, t, first + done, n, buffer);
        if (rc == OK) sha256_add(h, buffer, (size_t)(n * width));
    }
    sha256_hex(h, hex);
    return rc;
}

int tensor_set_hash(const struct tensor_set *s, char hex[65])
{
    struct part { int tensor; int64_t first, count; char hex[SHA256_HEX]; } *part;
    int64_t parts = 0, made = 0;
    int failed = OK;
    char message[1024] = "";
    for (int i = 0; i < s->n; i++) parts += (int64_t)((tensor_set_at(s, i)->bytes + HASHED - 1) / HASHED);
    part = xmalloc((size_t)(parts + 1) * sizeof *part);
    for (int i = 0; i < s->n; i++) {
        const struct tensor_view *t = tensor_set_at(s, i);
        int64_t most = HASHED / (int64_t)dtype_bytes(t->dtype);
        for (int64_t first = 0; first < t->count; first += most) part[made++] = (struct part){i, first, t->count - first < most ? t->count - first : most, ""};
    }
    #pragma omp parallel
    {
        char *buffer = xmalloc(HASHED_READ);
        #pragma omp for schedule(dynamic, 1)
        for (int64_t p = 0; p < parts; p++) {
            int rc = hash_of_elements(s, tensor_set_at(s, part[p].tensor), part[p].first, part[p].count, buffer, part[p].hex);
            if (rc == OK) continue;
            #pragma omp critical(tensor_set_hash)
            if (failed == OK) {
                failed = rc;
                snprintf(message, sizeof message, "%s", fail_message());    /* a thread's own; the caller reads its thread's */
            }
        }
        free(buffer);
    }
    struct sha256 *h = sha256_new();
    for (int i = 0, p = 0; i < s->n; i++) {   /* terminators and counts: no two sets give the same stream */
        const struct tensor_view *v = tensor_set_at(s, i);
        int64_t n_dims = v->n_dims;
        sha256_add(h, v->name, strlen(v->name) + 1);
        sha256_add(h, dtype_name(v->dtype), strlen(dtype_name(v->dtype)) + 1);
        sha256_add(h, &n_dims, sizeof n_dims);
        sha256_add(h, v->shape, (size_t)v->n_dims * sizeof v->shape[0]);
        for (; p < parts && part[p].tensor == i; p++) sha256_add(h, part[p].hex, sizeof part[p].hex);
    }
    sha256_hex(h, hex);
    free(part);
    return failed == OK ? OK : fail(failed, "%s", message);
}

int tensor_read(const struct tensor_set *s, const struct tensor_view *t, int64_t first, int64_t count, void *out)
{
    const struct mapped_file *f = &s->files[t->file];
    size_t width = dtype_bytes(t->dtype);
    CHECK(first >= 0 && count >= 0 && first <= t->count && count <= t->count - first, "tensor %s has %lld elements", t->name, (long long)t->count);
    return file_pread(f->fd, out, (size_t)count * width, (const char *)t->data - (const char *)f->map + first * (int64_t)width, f->path);
}

/* ---- conversion ---- */

static void f16_block(float *out, const char *in, int64_t n)
{
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(in + 2 * i))));
#endif
    for (; i < n; i++) {
        uint16_t h;
        memcpy(&h, in + 2 * i, 2);
        out[i] = f16_to_float(h);
    }
}

static void bf16_block(float *out, const char *in, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        uint16_t h;
        memcpy(&h, in + 2 * i, 2);
        out[i] = bf16_to_float(h);
    }
}

int tensor_to_float(const struct tensor_view *t, int64_t first, int64_t count, float *out)
{
    enum { BLOCK = 1 << 18 };   /* elements a thread takes at once: page faults on the mapping are shared out too */
    CHECK(first >= 0 && count >= 0 && first <= t->count && count <= t->count - first, "tensor %s has %lld elements", t->name, (long long)t->count);
    if (t->dtype == DTYPE_F8_E4M3 && !t->scale)
        return fail(ERR_INPUT, "tensor %s: dtype F8_E4M3 without a scale; its numbers are not the weights", tensor_name_shown(t->name));
    if (t->dtype != DTYPE_F32 && t->dtype != DTYPE_F16 && t->dtype != DTYPE_BF16 && t->dtype != DTYPE_F8_E4M3)
        return fail(ERR_INPUT, "tensor %s: dtype %s is not a weight format; convert it to F32, F16 or BF16", tensor_name_shown(t->name), dtype_name(t->dtype));
    const char *in = (const char *)t->data + (size_t)first * dtype_bytes(t->dtype);
    int64_t blocks = (count + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) if (blocks > 1)
    for (int64_t b = 0; b < blocks; b++) {
        int64_t at = b * BLOCK, n = count - at < BLOCK ? count - at : BLOCK;
        if (t->dtype == DTYPE_F32) memcpy(out + at, in + 4 * at, 4 * (size_t)n);
        else if (t->dtype == DTYPE_F16) f16_block(out + at, in + 2 * at, n);
        else if (t->dtype == DTYPE_F8_E4M3) tensor_scaled_block(t, first + at, n, out + at);
        else bf16_block(out + at, in + 2 * at, n);
    }
    return OK;
}
