/* GGUF version 3, the file format of llama.cpp: typed key-value metadata and tensors, little endian.
 *
 *     "GGUF" | u32 version | u64 tensors | u64 keys
 *     per key      string key | u32 type | value            string: u64 bytes | bytes;   array: u32 item type | u64 count | items
 *     per tensor   string name | u32 dimensions | u64 each, innermost first | u32 element type | u64 offset in the data
 *     zeros to a multiple of general.alignment | data: every tensor at the next multiple of it, zeros between
 *
 * Owns the container and its four element types. What the keys and tensors of a model are called is train/export_gguf.c's.
 * Format: ggml's docs/gguf.md; checks: those of gguf_init_from_file in llama.cpp. A file that is opened is untrusted.
 */
#ifndef DATA_GGUF_H
#define DATA_GGUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum gguf_type { GGUF_U8, GGUF_I8, GGUF_U16, GGUF_I16, GGUF_U32, GGUF_I32, GGUF_F32, GGUF_BOOL, GGUF_STRING, GGUF_ARRAY, GGUF_U64, GGUF_I64,
                 GGUF_F64, GGUF_TYPE_COUNT };

/* Element types by ggml's numbers. q8_0: blocks of 32 = f16 d, 32 int8 q; value = d q; d = max|x| / 127, q = round(x / d). */
enum gguf_dtype { GGUF_DTYPE_F32 = 0, GGUF_DTYPE_F16 = 1, GGUF_DTYPE_Q8_0 = 8, GGUF_DTYPE_BF16 = 30 };
enum { GGUF_MAX_DIMS = 4, GGUF_BLOCK = 32 };

const char *gguf_dtype_name(enum gguf_dtype t);                       /* "f32", "f16", "q8_0", "bf16" */
/* Bytes of `count` elements; count must be a multiple of 32 in q8_0. */
size_t gguf_dtype_bytes(enum gguf_dtype t, int64_t count);
/* Whole rows of floats <-> bytes as the file holds them, round to nearest even (q8_0: half away from zero, as ggml does). */
void gguf_encode(enum gguf_dtype t, const float *x, int64_t count, void *bytes);
void gguf_decode(enum gguf_dtype t, const void *bytes, int64_t count, float *x);

/* ---- writing ---- */

struct gguf_writer;
struct gguf_writer *gguf_writer_new(void);
void gguf_writer_free(struct gguf_writer *w);                         /* NULL-safe */
/* Keys are kept in the order given; a key given twice is our bug. */
void gguf_put_u32(struct gguf_writer *w, const char *key, uint32_t v);
void gguf_put_f32(struct gguf_writer *w, const char *key, float v);
void gguf_put_bool(struct gguf_writer *w, const char *key, bool v);
void gguf_put_string(struct gguf_writer *w, const char *key, const char *v);
/* An array of `count` items of F32, I32, BOOL or STRING; then exactly that many gguf_item_* of the same type. */
void gguf_put_array(struct gguf_writer *w, const char *key, enum gguf_type item, uint64_t count);
void gguf_item_f32(struct gguf_writer *w, float v);
void gguf_item_i32(struct gguf_writer *w, int32_t v);
void gguf_item_bool(struct gguf_writer *w, bool v);
void gguf_item_string(struct gguf_writer *w, const char *bytes, size_t n);
/* Shape as in C, outermost first; q8_0 needs a last dimension that is a multiple of 32. Tensors are written in the order given. */
void gguf_add_tensor(struct gguf_writer *w, const char *name, enum gguf_dtype t, int n_dims, const int64_t *shape, const void *user);
/* Elements [first, first + count) of the tensor that `user` stands for. Called in order, count a multiple of 32 but at the end. */
typedef int gguf_fill(void *context, const void *user, int64_t first, int64_t count, float *out);
/* The file appears under its name only when complete and synced. */
int  gguf_write(const struct gguf_writer *w, const char *path, gguf_fill *fill, void *context);

/* ---- reading ---- */

struct gguf_value {
    const char *key;
    enum gguf_type type, item;                    /* item: of an array */
    uint64_t count;                               /* items of an array; bytes of a string; else 1 */
    const unsigned char *data;                    /* in the mapping, possibly unaligned; a string's bytes without its length */
    size_t bytes;
};

struct gguf_tensor {
    const char *name;
    enum gguf_dtype dtype;
    int n_dims;
    int64_t shape[GGUF_MAX_DIMS];                 /* as in C: outermost first */
    int64_t count;
    const unsigned char *data;
    size_t bytes;
};

struct gguf_file;
/* Maps a file and checks all of it but the values of the weights. ERR_INPUT names the file, the key or tensor and the fault. */
int  gguf_open(struct gguf_file **out, const char *path);
void gguf_close(struct gguf_file *f);                                 /* NULL-safe */
const char *gguf_path(const struct gguf_file *f);
int  gguf_key_count(const struct gguf_file *f);
const struct gguf_value *gguf_key_at(const struct gguf_file *f, int i);            /* in the order of the file */
const struct gguf_value *gguf_find_key(const struct gguf_file *f, const char *key);   /* NULL if absent */
int  gguf_tensor_count(const struct gguf_file *f);
const struct gguf_tensor *gguf_tensor_at(const struct gguf_file *f, int i);        /* in the order of the file */
const struct gguf_tensor *gguf_find_tensor(const struct gguf_file *f, const char *name);   /* NULL if absent */

/* Typed values; an absent key leaves *v as it is and sets *present (may be NULL: then absence is ERR_INPUT), another type is ERR_INPUT.
 * Integers of any width that fit are taken, and f64 for a double. */
int gguf_get_int(const struct gguf_file *f, const char *key, int64_t *v, bool *present);
int gguf_get_double(const struct gguf_file *f, const char *key, double *v, bool *present);
int gguf_get_string(const struct gguf_file *f, const char *key, const char **bytes, size_t *n, bool *present);
/* Item i of an array of numbers or booleans, as a double. Its type and i are the caller's to check. */
double gguf_item(const struct gguf_value *array, uint64_t i);
/* Walks an array of strings: set *at to 0 before the first; false past the last. */
bool gguf_next_string(const struct gguf_value *array, size_t *at, const char **bytes, size_t *n);
/* Elements [first, first + count) as floats: exact for f32, f16 and bf16; d q in float for q8_0. Any first and count inside. */
void gguf_to_float(const struct gguf_tensor *t, int64_t first, int64_t count, float *out);

#endif
