/* Reading GGUF: everything a header claims is checked against the bytes that are there before it is used. Format: gguf.h.
 *
 * The file is mapped; what is allocated grows with what has been parsed, never from a count that the file states. Refused, as by
 * gguf_init_from_file in llama.cpp: counts, lengths and shapes beyond the file or beyond 63 bits, an alignment that is no power of
 * two, unknown types, keys or tensors named twice, tensors that leave gaps, overlap or end outside; and beyond that, arrays of
 * arrays, booleans that are neither 0 nor 1, bytes behind the last tensor. Element types: the four of gguf.h.
 */
#include "data/gguf.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"
#include "base/half.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "values are used in place, as the little-endian bytes of the file");

enum { MAX_KEY = 65535, MAX_NAME = 64, DEFAULT_ALIGNMENT = 32, MAX_ALIGNMENT = 1 << 20, BLOCK_BYTES = 2 + GGUF_BLOCK };

struct gguf_file {
    char *path;
    unsigned char *map; size_t bytes;
    struct gguf_value *value; int n_values, values_room;
    struct gguf_tensor *tensor; int n_tensors, tensors_room;
    const struct gguf_value **by_key;
    const struct gguf_tensor **by_name;
};

static const unsigned char widths[GGUF_TYPE_COUNT] = {[GGUF_U8] = 1, [GGUF_I8] = 1, [GGUF_U16] = 2, [GGUF_I16] = 2, [GGUF_U32] = 4, [GGUF_I32] = 4, [GGUF_F32] = 4,
                                                      [GGUF_BOOL] = 1, [GGUF_U64] = 8, [GGUF_I64] = 8, [GGUF_F64] = 8};   /* 0: string, array */

struct cursor { const struct gguf_file *f; size_t at; };

static size_t left(const struct cursor *c) { return c->f->bytes - c->at; }

static int ends_early(const struct cursor *c, const char *what)
{
    return fail(ERR_INPUT, "%s: ends at byte %zu within %s; the file is cut short or damaged", c->f->path, c->f->bytes, what);
}

static int take(struct cursor *c, void *to, size_t n, const char *what)
{
    if (left(c) < n) return ends_early(c, what);
    memcpy(to, c->f->map + c->at, n);
    c->at += n;
    return OK;
}

static int take_u32(struct cursor *c, uint32_t *v, const char *what) { return take(c, v, 4, what); }
static int take_u64(struct cursor *c, uint64_t *v, const char *what) { return take(c, v, 8, what); }

/* A name of plain characters, copied with a NUL. */
static int take_name(struct cursor *c, size_t max, const char *what, char **name)
{
    uint64_t n = 0;
    int rc = take_u64(c, &n, what);
    if (rc != OK) return rc;
    if (n == 0 || n > max) return fail(ERR_INPUT, "%s: %s at byte %zu has %llu bytes, 1 to %zu are allowed", c->f->path, what, c->at - 8, (unsigned long long)n, max);
    if (left(c) < n) return ends_early(c, what);
    for (size_t i = 0; i < n; i++) {
        unsigned char b = c->f->map[c->at + i];
        if (b <= 0x20 || b >= 0x7f) return fail(ERR_INPUT, "%s: %s at byte %zu holds the byte 0x%02x, which no name has", c->f->path, what, c->at, b);
    }
    *name = xstrndup((const char *)c->f->map + c->at, n);
    c->at += n;
    return OK;
}

/* ---- keys ---- */

static int skip_strings(struct cursor *c, uint64_t count, const char *key)
{
    for (uint64_t i = 0; i < count; i++) {
        uint64_t n = 0;
        int rc = take_u64(c, &n, "an array of strings");
        if (rc != OK) return rc;
        if (n > left(c)) return fail(ERR_INPUT, "%s: key %s: string %llu claims %llu bytes, more than the file has left", c->f->path, key, (unsigned long long)i, (unsigned long long)n);
        c->at += n;
    }
    return OK;
}

static int check_booleans(const struct gguf_file *f, const struct gguf_value *v)
{
    bool boolean = v->type == GGUF_BOOL || (v->type == GGUF_ARRAY && v->item == GGUF_BOOL);
    for (size_t i = 0; boolean && i < v->bytes; i++)
        if (v->data[i] > 1) return fail(ERR_INPUT, "%s: key %s: a boolean is %d, it must be 0 or 1", f->path, v->key, v->data[i]);
    return OK;
}

static int take_value(struct cursor *c, struct gguf_value *v)
{
    const char *path = c->f->path;
    uint32_t type = 0;
    int rc = OK;
    TRY(take_u32(c, &type, "a key's type"));
    if (type >= GGUF_TYPE_COUNT) { rc = fail(ERR_INPUT, "%s: key %s has the unknown type %d", path, v->key, (int)type); goto out; }
    v->type = (enum gguf_type)type;
    v->count = 1;
    if (v->type == GGUF_STRING) {
        TRY(take_u64(c, &v->count, "a string"));
        if (v->count > left(c)) { rc = fail(ERR_INPUT, "%s: key %s: a string claims %llu bytes, more than the file has left", path, v->key, (unsigned long long)v->count); goto out; }
        v->bytes = v->count;
    } else if (v->type == GGUF_ARRAY) {
        TRY(take_u32(c, &type, "an array's type"));
        TRY(take_u64(c, &v->count, "an array"));
        if (type >= GGUF_TYPE_COUNT || type == GGUF_ARRAY) { rc = fail(ERR_INPUT, "%s: key %s is an array of the unknown type %d", path, v->key, (int)type); goto out; }
        v->item = (enum gguf_type)type;
        size_t least = type == GGUF_STRING ? 8 : widths[type];
        if (v->count > left(c) / least) { rc = fail(ERR_INPUT, "%s: key %s: an array claims %llu items, more than the file has room for", path, v->key, (unsigned long long)v->count); goto out; }
        v->bytes = widths[type] * v->count;
    } else {
        v->bytes = widths[type];
        if (v->bytes > left(c)) { rc = ends_early(c, "a value"); goto out; }
    }
    v->data = c->f->map + c->at;
    if (v->type == GGUF_ARRAY && v->item == GGUF_STRING) {
        TRY(skip_strings(c, v->count, v->key));
        v->bytes = (size_t)(c->f->map + c->at - v->data);
    } else c->at += v->bytes;
    rc = check_booleans(c->f, v);
out:
    return rc;
}

static int compare_keys(const void *a, const void *b) { return strcmp((*(const struct gguf_value *const *)a)->key, (*(const struct gguf_value *const *)b)->key); }
static int compare_names(const void *a, const void *b) { return strcmp((*(const struct gguf_tensor *const *)a)->name, (*(const struct gguf_tensor *const *)b)->name); }

static int take_keys(struct cursor *c, struct gguf_file *f, uint64_t count)
{
    int rc = OK;
    if (count > left(c) / 13) return fail(ERR_INPUT, "%s: claims %llu keys, more than the file has room for", f->path, (unsigned long long)count);   /* 8 + 1 + 4 bytes at least */
    for (uint64_t i = 0; i < count; i++) {
        if (f->n_values == f->values_room) f->value = xrealloc(f->value, (size_t)(f->values_room = 2 * f->values_room + 32) * sizeof *f->value);
        struct gguf_value *v = &f->value[f->n_values];
        char *key;
        *v = (struct gguf_value){0};
        TRY(take_name(c, MAX_KEY, "a key", &key));
        v->key = key;
        f->n_values++;
        TRY(take_value(c, v));
    }
    f->by_key = xmalloc((size_t)f->n_values * sizeof *f->by_key);
    for (int i = 0; i < f->n_values; i++) f->by_key[i] = &f->value[i];
    if (f->n_values) qsort(f->by_key, (size_t)f->n_values, sizeof *f->by_key, compare_keys);
    for (int i = 1; i < f->n_values; i++)
        if (!compare_keys(&f->by_key[i - 1], &f->by_key[i])) { rc = fail(ERR_INPUT, "%s: key %s is there twice", f->path, f->by_key[i]->key); goto out; }
out:
    return rc;
}

/* ---- tensors ---- */

static int check_tensor(const struct gguf_file *f, struct gguf_tensor *t, const uint64_t *dims)
{
    uint64_t count = 1;
    for (int d = 0; d < t->n_dims; d++) {
        uint64_t size = dims[d];
        if (!size || size > INT64_MAX || __builtin_mul_overflow(count, size, &count) || count > INT64_MAX / 4)
            return fail(ERR_INPUT, "%s: tensor %s: dimension %d is %llu; the shape is empty or beyond any file", f->path, t->name, d, (unsigned long long)size);
        t->shape[t->n_dims - 1 - d] = (int64_t)size;
    }
    t->count = (int64_t)count;
    if (t->dtype == GGUF_DTYPE_Q8_0 && dims[0] % GGUF_BLOCK)
        return fail(ERR_INPUT, "%s: tensor %s: rows of %llu elements are no whole blocks of q8_0", f->path, t->name, (unsigned long long)dims[0]);
    t->bytes = gguf_dtype_bytes(t->dtype, t->count);
    return OK;
}

/* `offset` of each tensor is kept in `data` as a number until the data's place is known */
static int take_tensors(struct cursor *c, struct gguf_file *f, uint64_t count)
{
    int rc = OK;
    if (count > left(c) / 33) return fail(ERR_INPUT, "%s: claims %llu tensors, more than the file has room for", f->path, (unsigned long long)count);   /* 9 + 4 + 8 + 4 + 8 */
    for (uint64_t i = 0; i < count; i++) {
        if (f->n_tensors == f->tensors_room) f->tensor = xrealloc(f->tensor, (size_t)(f->tensors_room = 2 * f->tensors_room + 64) * sizeof *f->tensor);
        struct gguf_tensor *t = &f->tensor[f->n_tensors];
        char *name;
        uint32_t n_dims = 0, type = 0;
        uint64_t dims[GGUF_MAX_DIMS] = {0}, offset = 0;
        *t = (struct gguf_tensor){0};
        TRY(take_name(c, MAX_NAME, "a tensor's name", &name));
        t->name = name;
        f->n_tensors++;
        TRY(take_u32(c, &n_dims, "a tensor's shape"));
        if (n_dims < 1 || n_dims > GGUF_MAX_DIMS) { rc = fail(ERR_INPUT, "%s: tensor %s has %u dimensions, 1 to %d are allowed", f->path, name, n_dims, GGUF_MAX_DIMS); goto out; }
        TRY(take(c, dims, 8 * (size_t)n_dims, "a tensor's shape"));
        TRY(take_u32(c, &type, "a tensor's type"));
        TRY(take_u64(c, &offset, "a tensor's offset"));
        if (type != GGUF_DTYPE_F32 && type != GGUF_DTYPE_F16 && type != GGUF_DTYPE_BF16 && type != GGUF_DTYPE_Q8_0) {
            rc = fail(ERR_INPUT, "%s: tensor %s has the element type %d; f32, f16, bf16 and q8_0 are read", f->path, name, (int)type);
            goto out;
        }
        t->dtype = (enum gguf_dtype)type;
        t->n_dims = (int)n_dims;
        TRY(check_tensor(f, t, dims));
        t->data = (const unsigned char *)(uintptr_t)offset;
    }
    f->by_name = xmalloc((size_t)f->n_tensors * sizeof *f->by_name);
    for (int i = 0; i < f->n_tensors; i++) f->by_name[i] = &f->tensor[i];
    if (f->n_tensors) qsort(f->by_name, (size_t)f->n_tensors, sizeof *f->by_name, compare_names);
    for (int i = 1; i < f->n_tensors; i++)
        if (!compare_names(&f->by_name[i - 1], &f->by_name[i])) { rc = fail(ERR_INPUT, "%s: tensor %s is there twice", f->path, f->by_name[i]->name); goto out; }
out:
    return rc;
}

static int get_alignment(const struct gguf_file *f, size_t *alignment)
{
    int64_t a = DEFAULT_ALIGNMENT;
    bool present;
    int rc = gguf_get_int(f, "general.alignment", &a, &present);
    if (rc == OK && (a < 8 || a > MAX_ALIGNMENT || (a & (a - 1))))
        rc = fail(ERR_INPUT, "%s: general.alignment is %lld, it must be a power of two from 8 to %d", f->path, (long long)a, MAX_ALIGNMENT);
    *alignment = (size_t)a;
    return rc;
}

static int place_tensors(struct gguf_file *f, size_t head)
{
    size_t alignment, at = 0;
    int rc = get_alignment(f, &alignment);
    if (rc != OK) return rc;
    size_t begin = (head + alignment - 1) / alignment * alignment, room = begin < f->bytes ? f->bytes - begin : 0;
    for (int i = 0; i < f->n_tensors; i++) {
        struct gguf_tensor *t = &f->tensor[i];
        uint64_t offset = (uintptr_t)t->data;
        if (offset != at) return fail(ERR_INPUT, "%s: tensor %s begins at %llu of the data, %zu was expected: the file is damaged", f->path, t->name, (unsigned long long)offset, at);
        if (at > room || t->bytes > room - at)
            return fail(ERR_INPUT, "%s: tensor %s needs %zu bytes at %zu of the data, which has %zu: the file is cut short", f->path, t->name, t->bytes, at, room);
        t->data = f->map + begin + at;
        at = (at + t->bytes + alignment - 1) / alignment * alignment;      /* below twice the file's size and an alignment: no overflow */
    }
    if (f->n_tensors && room > at) return fail(ERR_INPUT, "%s: %zu bytes follow the last tensor; they belong to nothing", f->path, room - at);
    return OK;
}

/* ---- the file ---- */

static int map_file(struct gguf_file *f)
{
    int rc = OK, fd = open(f->path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    if (fd < 0) return fail_errno(ERR_IO, "%s: cannot open", f->path);
    if (fstat(fd, &st)) { rc = fail_errno(ERR_IO, "%s: cannot stat", f->path); goto out; }
    if (!S_ISREG(st.st_mode)) { rc = fail(ERR_INPUT, "%s: is not a regular file", f->path); goto out; }
    if (st.st_size < 24) { rc = fail(ERR_INPUT, "%s: has %lld bytes; a GGUF file has at least 24", f->path, (long long)st.st_size); goto out; }
    f->bytes = (size_t)st.st_size;
    void *map = mmap(NULL, f->bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    if (map == MAP_FAILED) { rc = fail_errno(ERR_IO, "%s: cannot map", f->path); goto out; }
    f->map = map;
out:
    close(fd);
    return rc;
}

int gguf_open(struct gguf_file **out, const char *path)
{
    int rc = OK;
    struct gguf_file *f = xcalloc(1, sizeof *f);
    struct cursor c = {f, 8};
    uint32_t version;
    uint64_t tensors = 0, keys = 0;
    f->path = xstrdup(path);
    TRY(map_file(f));
    memcpy(&version, f->map + 4, 4);
    if (memcmp(f->map, "GGUF", 4)) { rc = fail(ERR_INPUT, "%s: does not begin with \"GGUF\"; it is no GGUF file", path); goto out; }
    if (version != 3) {
        rc = fail(ERR_INPUT, "%s: is of version %u%s; version 3, little endian, is read", path, version, version && !(version & 0xffff) ? " or of the other byte order" : "");
        goto out;
    }
    TRY(take_u64(&c, &tensors, "the header"));
    TRY(take_u64(&c, &keys, "the header"));
    TRY(take_keys(&c, f, keys));
    TRY(take_tensors(&c, f, tensors));
    TRY(place_tensors(f, c.at));
    *out = f;
    f = NULL;
out:
    gguf_close(f);
    return rc;
}

void gguf_close(struct gguf_file *f)
{
    if (!f) return;
    if (f->map) munmap(f->map, f->bytes);
    for (int i = 0; i < f->n_values; i++) free((char *)f->value[i].key);
    for (int i = 0; i < f->n_tensors; i++) free((char *)f->tensor[i].name);
    free(f->value);
    free(f->tensor);
    free(f->by_key);
    free(f->by_name);
    free(f->path);
    free(f);
}

const char *gguf_path(const struct gguf_file *f) { return f->path; }
int gguf_key_count(const struct gguf_file *f) { return f->n_values; }
const struct gguf_value *gguf_key_at(const struct gguf_file *f, int i) { return &f->value[i]; }
int gguf_tensor_count(const struct gguf_file *f) { return f->n_tensors; }
const struct gguf_tensor *gguf_tensor_at(const struct gguf_file *f, int i) { return &f->tensor[i]; }

const struct gguf_value *gguf_find_key(const struct gguf_file *f, const char *key)
{
    struct gguf_value wanted = {.key = key};
    const struct gguf_value *p = &wanted, *const *found = f->n_values ? bsearch(&p, f->by_key, (size_t)f->n_values, sizeof p, compare_keys) : NULL;
    return found ? *found : NULL;
}

const struct gguf_tensor *gguf_find_tensor(const struct gguf_file *f, const char *name)
{
    struct gguf_tensor wanted = {.name = name};
    const struct gguf_tensor *p = &wanted, *const *found = f->n_tensors ? bsearch(&p, f->by_name, (size_t)f->n_tensors, sizeof p, compare_names) : NULL;
    return found ? *found : NULL;
}

/* ---- values ---- */

/* A number or boolean of any type, as the wider of the two kinds */
static bool number(enum gguf_type type, const unsigned char *p, int64_t *integer, double *real)
{
    union { uint8_t u8; int8_t i8; uint16_t u16; int16_t i16; uint32_t u32; int32_t i32; float f32; uint64_t u64; int64_t i64; double f64; } v = {0};
    memcpy(&v, p, widths[type]);
    switch (type) {
    case GGUF_U8: case GGUF_BOOL: *integer = v.u8; break;
    case GGUF_I8: *integer = v.i8; break;
    case GGUF_U16: *integer = v.u16; break;
    case GGUF_I16: *integer = v.i16; break;
    case GGUF_U32: *integer = v.u32; break;
    case GGUF_I32: *integer = v.i32; break;
    case GGUF_U64: if (v.u64 > INT64_MAX) { *real = (double)v.u64; return false; } *integer = (int64_t)v.u64; break;
    case GGUF_I64: *integer = v.i64; break;
    case GGUF_F32: *real = v.f32; return false;
    case GGUF_F64: *real = v.f64; return false;
    default: CHECK(0, "type %d is no number", (int)type);
    }
    *real = (double)*integer;
    return true;
}

/* OK with *v NULL when absent and that is allowed */
static int find(const struct gguf_file *f, const char *key, bool *present, const struct gguf_value **v)
{
    *v = gguf_find_key(f, key);
    if (present) *present = *v;
    return *v || present ? OK : fail(ERR_INPUT, "%s: key %s is missing", f->path, key);
}

int gguf_get_int(const struct gguf_file *f, const char *key, int64_t *out, bool *present)
{
    const struct gguf_value *v;
    double real;
    int rc = find(f, key, present, &v);
    if (rc != OK || !v) return rc;
    return v->type != GGUF_STRING && v->type != GGUF_ARRAY && number(v->type, v->data, out, &real) ? OK : fail(ERR_INPUT, "%s: key %s is not an integer", f->path, key);
}

int gguf_get_double(const struct gguf_file *f, const char *key, double *out, bool *present)
{
    const struct gguf_value *v;
    int64_t integer;
    int rc = find(f, key, present, &v);
    if (rc != OK || !v) return rc;
    if (v->type == GGUF_STRING || v->type == GGUF_ARRAY || v->type == GGUF_BOOL) return fail(ERR_INPUT, "%s: key %s is not a number", f->path, key);
    number(v->type, v->data, &integer, out);
    return OK;
}

int gguf_get_string(const struct gguf_file *f, const char *key, const char **bytes, size_t *n, bool *present)
{
    const struct gguf_value *v;
    int rc = find(f, key, present, &v);
    if (rc != OK || !v) return rc;
    if (v->type != GGUF_STRING) return fail(ERR_INPUT, "%s: key %s is not a string", f->path, key);
    *bytes = (const char *)v->data;
    *n = v->bytes;
    return OK;
}

double gguf_item(const struct gguf_value *array, uint64_t i)
{
    CHECK(array->type == GGUF_ARRAY && i < array->count, "key %s has no item %llu", array->key, (unsigned long long)i);
    int64_t integer;
    double real;
    number(array->item, array->data + i * widths[array->item], &integer, &real);
    return real;
}

bool gguf_next_string(const struct gguf_value *array, size_t *at, const char **bytes, size_t *n)
{
    CHECK(array->type == GGUF_ARRAY && array->item == GGUF_STRING, "key %s is no array of strings", array->key);
    uint64_t length;
    if (*at >= array->bytes) return false;
    memcpy(&length, array->data + *at, 8);
    *bytes = (const char *)array->data + *at + 8;
    *n = length;
    *at += 8 + length;
    return true;
}

void gguf_to_float(const struct gguf_tensor *t, int64_t first, int64_t count, float *out)
{
    CHECK(first >= 0 && count >= 0 && first <= t->count && count <= t->count - first, "elements outside tensor %s", t->name);
    if (t->dtype != GGUF_DTYPE_Q8_0) {
        gguf_decode(t->dtype, t->data + gguf_dtype_bytes(t->dtype, first), count, out);
        return;
    }
    float block[GGUF_BLOCK];
    while (count > 0) {
        int64_t skip = first % GGUF_BLOCK, n;
        const unsigned char *p = t->data + first / GGUF_BLOCK * BLOCK_BYTES;
        if (!skip && count >= GGUF_BLOCK) {
            n = count / GGUF_BLOCK * GGUF_BLOCK;
            gguf_decode(GGUF_DTYPE_Q8_0, p, n, out);
        } else {
            n = GGUF_BLOCK - skip < count ? GGUF_BLOCK - skip : count;
            gguf_decode(GGUF_DTYPE_Q8_0, p, GGUF_BLOCK, block);
            memcpy(out, block + skip, (size_t)n * sizeof *out);
        }
        first += n;
        count -= n;
        out += n;
    }
}
