/* GGUF: what is written is read back, element types round as ggml's do, and no header makes the reader crash or believe it. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <math.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "base/half.h"
#include "data/gguf.h"
#include "tests/compare.h"

static char dir[] = "/tmp/test-gguf-XXXXXX";
static void setup(void) { cr_assert(mkdtemp(dir)); }
static void teardown(void) { dir_remove_tree(dir); strcpy(dir, "/tmp/test-gguf-XXXXXX"); }
TestSuite(gguf, .init = setup, .fini = teardown);

/* ---- element types ---- */

Test(gguf, halves_round_to_nearest_even)
{
    const float x[] = {1, -2.5f, 1e-8f, 65504, 0.1f, 1 + 0x1p-8f, 1 + 0x3p-8f, -0.0f};
    unsigned char bytes[16];
    float y[8];
    gguf_encode(GGUF_DTYPE_BF16, x, 8, bytes);
    gguf_decode(GGUF_DTYPE_BF16, bytes, 8, y);
    cr_assert(y[0] == 1 && y[1] == -2.5f && y[3] == 65536 && y[5] == 1 && y[6] == 1 + 0x1p-6f && signbit(y[7]));
    gguf_encode(GGUF_DTYPE_F16, x, 8, bytes);
    gguf_decode(GGUF_DTYPE_F16, bytes, 8, y);
    cr_assert(y[0] == 1 && y[1] == -2.5f && y[2] == 0 && y[3] == 65504 && y[5] == x[5]);
}

/* The definition, block by block, with its own rounding of d */
Test(gguf, q8_0_is_its_definition)
{
    enum { N = 32 * 40 };
    float *x = new_normal(N, 0.05f, 3), y[N];
    unsigned char bytes[N / 32 * 34];
    memset(x, 0, 32 * sizeof *x);                                /* a block of zeros */
    for (int i = 32; i < 64; i++) x[i] = (float)(i - 48) * 1e-42f;  /* d underflows */
    x[64] = 127; x[65] = 0.5f; x[66] = -0.5f; x[67] = 1.5f;      /* d = 1: halves round away from zero */
    for (int i = 68; i < 96; i++) x[i] = 0;
    cr_assert_eq(gguf_dtype_bytes(GGUF_DTYPE_Q8_0, N), sizeof bytes);
    gguf_encode(GGUF_DTYPE_Q8_0, x, N, bytes);
    gguf_decode(GGUF_DTYPE_Q8_0, bytes, N, y);
    for (int i = 0; i < 64; i++) cr_assert_eq(y[i], 0);
    cr_assert(y[64] == 127 && y[65] == 1 && y[66] == -1 && y[67] == 2);
    for (int b = 3; b < N / 32; b++) {
        float largest = 0;
        for (int i = 0; i < 32; i++) largest = fmaxf(largest, fabsf(x[32 * b + i]));
        float d = largest / 127, stored = f16_to_float(f16_from_float(d));
        for (int i = 0; i < 32; i++) {
            float q = roundf(x[32 * b + i] * (1 / d));
            cr_assert_eq(y[32 * b + i], q * stored);
            cr_assert_leq(fabsf(y[32 * b + i] - x[32 * b + i]), 0.51f * d + 127 * fabsf(stored - d));
        }
    }
    free(x);
}

/* ---- a file and back ---- */

struct weights { const float *x; };
static int fill(void *context, const void *user, int64_t first, int64_t count, float *out)
{
    (void)context;
    memcpy(out, ((const struct weights *)user)->x + first, (size_t)count * sizeof *out);
    return OK;
}

enum { BIG = 3 << 19 };        /* more than one stage of the writer */

static char *write_sample(const char *name, int64_t big)
{
    static const char binary[] = "a\0b";
    struct gguf_writer *w = gguf_writer_new();
    float *x = new_normal(big > 4096 ? big : 4096, 1, 7);
    struct weights all = {x};
    char *path = path_join(dir, name);
    gguf_put_string(w, "general.architecture", "llama");
    gguf_put_u32(w, "u", 4000000000u);
    gguf_put_f32(w, "f", 0.1f);
    gguf_put_bool(w, "b", true);
    gguf_put_array(w, "strings", GGUF_STRING, 3);
    gguf_item_string(w, "", 0);
    gguf_item_string(w, binary, 3);
    gguf_item_string(w, "zwei", 4);
    gguf_put_array(w, "ints", GGUF_I32, 2);
    gguf_item_i32(w, -5);
    gguf_item_i32(w, 6);
    gguf_put_array(w, "none", GGUF_F32, 0);
    gguf_put_array(w, "flags", GGUF_BOOL, 2);
    gguf_item_bool(w, true);
    gguf_item_bool(w, false);
    gguf_put_string(w, "empty", "");
    gguf_add_tensor(w, "one", GGUF_DTYPE_F32, 1, (int64_t[]){1}, &all);
    gguf_add_tensor(w, "half", GGUF_DTYPE_F16, 2, (int64_t[]){3, 7}, &all);
    gguf_add_tensor(w, "brain", GGUF_DTYPE_BF16, 3, (int64_t[]){2, 3, 5}, &all);
    gguf_add_tensor(w, "blocks", GGUF_DTYPE_Q8_0, 2, (int64_t[]){5, 64}, &all);
    if (big) gguf_add_tensor(w, "big", GGUF_DTYPE_Q8_0, 2, (int64_t[]){big / 96, 96}, &all);
    cr_assert_eq(gguf_write(w, path, fill, NULL), OK, "%s", fail_message());
    gguf_writer_free(w);
    free(x);
    return path;
}

Test(gguf, what_is_written_is_read)
{
    char *path = write_sample("sample.gguf", BIG);
    struct gguf_file *f;
    cr_assert_eq(gguf_open(&f, path), OK, "%s", fail_message());
    int64_t i = 0;
    double d = 0;
    const char *s;
    size_t n, at = 0;
    bool present;
    cr_assert_eq(gguf_key_count(f), 10);
    cr_assert_str_eq(gguf_key_at(f, 0)->key, "general.architecture");
    cr_assert(gguf_get_int(f, "u", &i, NULL) == OK && i == 4000000000);
    cr_assert(gguf_get_int(f, "general.alignment", &i, NULL) == OK && i == 32);
    cr_assert(gguf_get_double(f, "f", &d, NULL) == OK && d == (double)0.1f);
    cr_assert(gguf_get_int(f, "b", &i, NULL) == OK && i == 1);
    cr_assert(gguf_get_string(f, "empty", &s, &n, &present) == OK && present && n == 0);
    cr_assert(gguf_get_int(f, "absent", &i, &present) == OK && !present);
    cr_assert(gguf_get_int(f, "absent", &i, NULL) == ERR_INPUT && gguf_get_int(f, "f", &i, NULL) == ERR_INPUT && gguf_get_double(f, "empty", &d, NULL) == ERR_INPUT);
    cr_assert(gguf_get_string(f, "u", &s, &n, NULL) == ERR_INPUT && strstr(fail_message(), "key u"));
    const struct gguf_value *strings = gguf_find_key(f, "strings"), *ints = gguf_find_key(f, "ints"), *flags = gguf_find_key(f, "flags");
    cr_assert(gguf_next_string(strings, &at, &s, &n) && n == 0);
    cr_assert(gguf_next_string(strings, &at, &s, &n) && n == 3 && !memcmp(s, "a\0b", 3));
    cr_assert(gguf_next_string(strings, &at, &s, &n) && n == 4 && !gguf_next_string(strings, &at, &s, &n));
    cr_assert(ints->count == 2 && gguf_item(ints, 0) == -5 && gguf_item(ints, 1) == 6 && gguf_item(flags, 0) == 1 && gguf_item(flags, 1) == 0);

    float *x = new_normal(BIG, 1, 7), *y = new_poisoned(BIG), *z = new_poisoned(BIG);
    unsigned char *bytes = malloc(BIG * 4);
    cr_assert_eq(gguf_tensor_count(f), 5);
    for (int t = 0; t < 5; t++) {
        const struct gguf_tensor *v = gguf_tensor_at(f, t);
        cr_assert_eq(gguf_find_tensor(f, v->name), v);
        cr_assert_eq((v->data - gguf_tensor_at(f, 0)->data) % 32, 0);
        gguf_encode(v->dtype, x, v->count, bytes);
        cr_assert(!memcmp(bytes, v->data, v->bytes), "%s", v->name);
        gguf_decode(v->dtype, bytes, v->count, z);
        gguf_to_float(v, 0, v->count, y);
        cr_assert(!memcmp(y, z, (size_t)v->count * sizeof *y), "%s", v->name);
        for (int64_t first = 0, part = 1; first < v->count && first < 300; first += part, part = (part + 12) % 71 + 1) {   /* any range, blocks or not */
            int64_t count = v->count - first < part ? v->count - first : part;
            gguf_to_float(v, first, count, y);
            cr_assert(!memcmp(y, z + first, (size_t)count * sizeof *y), "%s from %lld", v->name, (long long)first);
        }
    }
    const struct gguf_tensor *brain = gguf_find_tensor(f, "brain");
    cr_assert(brain->n_dims == 3 && brain->shape[0] == 2 && brain->shape[2] == 5 && !gguf_find_tensor(f, "nothing"));
    gguf_close(f);
    free(x);
    free(y);
    free(z);
    free(bytes);
    free(path);
}

/* ---- hostile files ---- */

struct bytes { unsigned char p[4096]; size_t n; };
static void put(struct bytes *b, const void *p, size_t n) { memcpy(b->p + b->n, p, n); b->n += n; }
static void put32(struct bytes *b, uint32_t v) { put(b, &v, 4); }
static void put64(struct bytes *b, uint64_t v) { put(b, &v, 8); }
static void put_string(struct bytes *b, const char *s) { put64(b, strlen(s)); put(b, s, strlen(s)); }
static void pad(struct bytes *b, size_t to) { while (b->n % to) b->p[b->n++] = 0; }
static struct bytes head(uint64_t tensors, uint64_t keys)
{
    struct bytes b = {.n = 0};
    put(&b, "GGUF", 4);
    put32(&b, 3);
    put64(&b, tensors);
    put64(&b, keys);
    return b;
}
static void put_tensor(struct bytes *b, const char *name, uint32_t dims, const uint64_t *shape, uint32_t type, uint64_t offset)
{
    put_string(b, name);
    put32(b, dims);
    for (uint32_t i = 0; i < dims; i++) put64(b, shape[i]);
    put32(b, type);
    put64(b, offset);
}

static int try_bytes(const void *p, size_t n)
{
    char *path = path_join(dir, "bad.gguf");
    struct gguf_file *f = NULL;
    FILE *out = fopen(path, "wb");
    cr_assert(out && fwrite(p, 1, n, out) == n && !fclose(out));
    int rc = gguf_open(&f, path);
    gguf_close(f);
    free(path);
    return rc;
}

#define REFUSED(b, words) do { \
    cr_expect_eq(try_bytes((b).p, (b).n), ERR_INPUT, "accepted: %s", words); \
    cr_expect(strstr(fail_message(), words), "\"%s\" is not in: %s", words, fail_message()); } while (0)

Test(gguf, hostile_headers_are_refused)
{
    struct bytes b = {.n = 0};
    REFUSED(b, "0 bytes");
    b = head(0, 0); b.p[0] = 'X'; REFUSED(b, "no GGUF");
    b = head(0, 0); b.p[4] = 2; REFUSED(b, "version 2");
    b = head(0, 0); memcpy(b.p + 4, "\0\0\0\3", 4); REFUSED(b, "byte order");
    b = head(0, (uint64_t)1 << 63); REFUSED(b, "keys");
    b = head((uint64_t)1 << 63, 0); REFUSED(b, "tensors");
    b = head(0, UINT64_MAX); REFUSED(b, "keys");
    b = head(0, 2); put_string(&b, "k"); put32(&b, GGUF_U8); put(&b, "\0", 1); put(&b, "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 16); REFUSED(b, "0 bytes");

    b = head(0, 1); put64(&b, UINT64_MAX); put64(&b, 0); REFUSED(b, "a key");
    b = head(0, 1); put64(&b, 70000); pad(&b, 64); REFUSED(b, "70000");
    b = head(0, 1); put64(&b, 60000); pad(&b, 64); REFUSED(b, "ends");
    b = head(0, 1); put_string(&b, "a b"); put32(&b, GGUF_U8); put(&b, "\0", 1); REFUSED(b, "0x20");
    b = head(0, 1); put_string(&b, "k"); put32(&b, UINT32_MAX); put64(&b, 0); REFUSED(b, "unknown type -1");
    b = head(0, 1); put_string(&b, "k"); put32(&b, GGUF_TYPE_COUNT); put64(&b, 0); REFUSED(b, "unknown type 13");
    b = head(0, 1); put_string(&b, "k"); put32(&b, GGUF_BOOL); put(&b, "\2", 1); REFUSED(b, "0 or 1");
    b = head(0, 1); put_string(&b, "k"); put32(&b, GGUF_STRING); put64(&b, UINT64_MAX); REFUSED(b, "claims 18446744073709551615");
    b = head(0, 1); put_string(&b, "k"); put32(&b, GGUF_ARRAY); put32(&b, GGUF_ARRAY); put64(&b, 1); REFUSED(b, "array of the unknown type 9");
    b = head(0, 1); put_string(&b, "k"); put32(&b, GGUF_ARRAY); put32(&b, GGUF_U64); put64(&b, (uint64_t)1 << 61); REFUSED(b, "claims");
    b = head(0, 1); put_string(&b, "k"); put32(&b, GGUF_ARRAY); put32(&b, GGUF_STRING); put64(&b, UINT64_MAX); REFUSED(b, "claims");
    b = head(0, 1); put_string(&b, "k"); put32(&b, GGUF_ARRAY); put32(&b, GGUF_STRING); put64(&b, 1); put64(&b, UINT64_MAX - 7); REFUSED(b, "string 0");
    b = head(0, 1); put_string(&b, "k"); put32(&b, GGUF_U64); put32(&b, 0); REFUSED(b, "ends");
    b = head(0, 2); for (int i = 0; i < 2; i++) { put_string(&b, "twice"); put32(&b, GGUF_U32); put32(&b, 1); } REFUSED(b, "twice is there twice");

    for (size_t i = 0; i < 5; i++) {
        uint32_t alignment = (uint32_t[]){0, 3, 4, 96, 1u << 31}[i];
        b = head(0, 1); put_string(&b, "general.alignment"); put32(&b, GGUF_U32); put32(&b, alignment); REFUSED(b, "power of two");
    }
    b = head(0, 1); put_string(&b, "general.alignment"); put32(&b, GGUF_STRING); put_string(&b, "32"); REFUSED(b, "general.alignment");
}

Test(gguf, hostile_tensors_are_refused)
{
    static const uint64_t four[] = {4}, huge[] = {(uint64_t)1 << 33, (uint64_t)1 << 33}, zero[] = {0}, negative[] = {UINT64_MAX}, odd[] = {33}, wide[] = {(uint64_t)1 << 62};
    struct bytes b = head(1, 0); put_tensor(&b, "t", 1, four, 0, 0); REFUSED(b, "cut short");
    b = head(1, 0); put_tensor(&b, "t", 0, four, 0, 0); put64(&b, 0); REFUSED(b, "0 dimensions");
    b = head(1, 0); put_string(&b, "t"); put32(&b, 5); for (int i = 0; i < 8; i++) put64(&b, 1); REFUSED(b, "5 dimensions");
    b = head(1, 0); put_tensor(&b, "t", 2, huge, 0, 0); REFUSED(b, "beyond");
    b = head(1, 0); put_tensor(&b, "t", 1, zero, 0, 0); REFUSED(b, "empty");
    b = head(1, 0); put_tensor(&b, "t", 1, negative, 0, 0); REFUSED(b, "beyond");
    b = head(1, 0); put_tensor(&b, "t", 1, wide, 0, 0); REFUSED(b, "beyond");
    b = head(1, 0); put_tensor(&b, "t", 1, four, UINT32_MAX, 0); REFUSED(b, "type -1");
    b = head(1, 0); put_tensor(&b, "t", 1, four, 2, 0); REFUSED(b, "type 2");
    b = head(1, 0); put_tensor(&b, "t", 1, odd, GGUF_DTYPE_Q8_0, 0); REFUSED(b, "whole blocks");
    b = head(1, 0); put_tensor(&b, "t", 1, four, 0, 8); pad(&b, 32); put64(&b, 0); put64(&b, 0); put64(&b, 0); REFUSED(b, "expected");
    b = head(1, 0); put_tensor(&b, "t", 1, four, 0, UINT64_MAX - 15); pad(&b, 32); put64(&b, 0); put64(&b, 0); REFUSED(b, "expected");
    b = head(2, 0); put_tensor(&b, "t", 1, four, 0, 0); put_tensor(&b, "t", 1, four, 0, 32); pad(&b, 32); put64(&b, 0); put64(&b, 0); REFUSED(b, "twice");
    b = head(2, 0); put_tensor(&b, "t", 1, four, 0, 0); put_tensor(&b, "u", 1, four, 0, 0); pad(&b, 32); put64(&b, 0); put64(&b, 0); REFUSED(b, "expected");
    b = head(1, 0); put_string(&b, "0123456789012345678901234567890123456789012345678901234567890123456789"); put32(&b, 1); put64(&b, 4); put64(&b, 0); put32(&b, 0); REFUSED(b, "70 bytes");
    b = head(1, 0); put_tensor(&b, "t", 1, four, 0, 0); pad(&b, 32); put64(&b, 0); put64(&b, 0); cr_expect_eq(try_bytes(b.p, b.n), OK, "%s", fail_message());
    pad(&b, 32); cr_expect_eq(try_bytes(b.p, b.n), OK, "%s", fail_message());
    put(&b, "x", 1); REFUSED(b, "follow");
}

/* Every shorter file is refused; no flipped byte does more than make it refused or change a value. */
Test(gguf, truncated_and_flipped_files)
{
    char *path = write_sample("sample.gguf", 0), *data, *copy;
    size_t n, header = 0;
    cr_assert_eq(file_read(path, 1 << 20, &data, &n), OK);
    struct gguf_file *f;
    cr_assert_eq(gguf_open(&f, path), OK);
    const struct gguf_tensor *last = gguf_tensor_at(f, gguf_tensor_count(f) - 1), *first = gguf_tensor_at(f, 0);
    size_t total = (size_t)(last->data + last->bytes - first->data);
    gguf_close(f);
    header = n - (total + 31) / 32 * 32;
    for (size_t cut = 0; cut < header + total; cut += cut < header ? 1 : 37) cr_assert_eq(try_bytes(data, cut), ERR_INPUT, "a file of %zu bytes was accepted", cut);
    copy = malloc(n);
    for (size_t at = 0; at < header; at++)
        for (int bit = 0; bit < 8; bit += 7) {
            memcpy(copy, data, n);
            copy[at] = (char)(copy[at] ^ 1 << bit);
            int rc = try_bytes(copy, n);
            cr_assert(rc == OK || rc == ERR_INPUT, "byte %zu: status %d", at, rc);
        }
    cr_assert_eq(gguf_open(&f, "/nowhere/at/all.gguf"), ERR_IO);
    cr_assert_eq(gguf_open(&f, dir), ERR_INPUT);
    free(copy);
    free(data);
    free(path);
}
