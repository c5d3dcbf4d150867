/* Safetensors: one file, or a directory whose model.safetensors.index.json spreads tensors over several files.
 *
 * Files are mapped read-only; headers are untrusted input and are checked completely (length, UTF-8, duplicate keys,
 * shapes times width = bytes without overflow, no holes, no overlaps, no byte left over) before a tensor is handed out.
 * Format: huggingface/safetensors README and its validator; index rules: file names are plain, [A-Za-z0-9._-]+.safetensors,
 * opened relative to the directory, never through a link out of it, but for the links of a Hugging Face cache from
 * snapshots/REVISION to blobs; tensors and index agree exactly.
 */
#ifndef DATA_SAFETENSORS_H
#define DATA_SAFETENSORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/dtype.h"
#include "data/quantization.h"

size_t dtype_bytes(enum dtype d);
const char *dtype_name(enum dtype d);             /* as safetensors spells it: "F32", "BF16", ... */

enum { TENSOR_MAX_DIMS = 8 };

/* What the numbers of an F8_E4M3 matrix are multiplied by: element (r, c) by value[r / block_rows * across + c / block_cols]. SCALE_TENSOR is one block,
 * SCALE_ROW are blocks of one row; the last block may be partial. */
struct tensor_scale {
    enum scale_kind kind;
    int64_t block_rows, block_cols, across;
    float *value;                                 /* positive and finite, converted from F32, F16 or BF16: exactly */
    int64_t count;
};

struct tensor_view {
    const char *name;                             /* owned by the set */
    enum dtype dtype;
    int n_dims;
    int64_t shape[TENSOR_MAX_DIMS];
    int64_t count;                                /* product of shape */
    const void *data;                             /* in the mapping, little endian, possibly unaligned */
    size_t bytes;
    int file;                                     /* index into files of the set */
    const struct tensor_scale *scale;             /* after tensor_set_bind_scales(); NULL: none. Owned by the set */
    bool is_scale;                                /* it scales another tensor, activations or a kv cache: no weight of its own */
};

struct tensor_set;                                /* sorted by name */

/* `path`: a .safetensors file, or a directory with model.safetensors or model.safetensors.index.json; where both are there the
 * first is read, as transformers does.
 * ERR_INPUT names file, tensor and fault; ERR_IO when it cannot be read. */
int  tensor_set_open(struct tensor_set **out, const char *path);
void tensor_set_close(struct tensor_set *s);      /* NULL-safe; unmaps */
int  tensor_set_count(const struct tensor_set *s);
const struct tensor_view *tensor_set_at(const struct tensor_set *s, int i);
const struct tensor_view *tensor_set_find(const struct tensor_set *s, const char *name);   /* NULL if absent */
int  tensor_set_files(const struct tensor_set *s);
const char *tensor_set_file_path(const struct tensor_set *s, int file);
/* The identity of the weights, however they are sharded: SHA-256 over every tensor's name, dtype, shape and the hashes (SHA-256, in hex) of every 16 MiB of its bytes, tensors in name
 * order. Reads everything once, by all threads: one core hashes about 1 GB/s (16.7 on 16, from the page cache). Fails as tensor_read() does. */
int  tensor_set_hash(const struct tensor_set *s, char hex[65]);
/* `count` elements from element `first` on as they lie in the file, read from it rather than through the mapping: large reads keep a disk busy where page faults do
 * not, and a file that was cut since it was opened is an error (ERR_INPUT) and no signal. */
int tensor_read(const struct tensor_set *s, const struct tensor_view *t, int64_t first, int64_t count, void *out);
/* `count` elements from element `first` on, converted to float: F32, F16, BF16 exactly, F8_E4M3 that has scales as the float next to number times scale;
 * other dtypes, and F8_E4M3 without, are ERR_INPUT by name. */
int tensor_to_float(const struct tensor_view *t, int64_t first, int64_t count, float *out);

/* tensor_scale.c: gives every F8_E4M3 tensor the scales that its quantization names, and marks the tensors that hold them. ERR_INPUT by name, with `where`
 * in front: a scale that is misshapen, of another type, not finite, zero or negative, of a tensor that is not F8_E4M3, of two names; a zero point. An
 * F8_E4M3 tensor without any is left without: params_match() refuses it where a weight is wanted. */
int tensor_set_bind_scales(struct tensor_set *s, const struct quantization *q, const char *where);
/* The scale of each of rows [first, first + n) of a tensor scaled as a whole or by rows. */
void tensor_row_scales(const struct tensor_view *t, int64_t first, int64_t n, float *out);
/* The same numbers: shape, type, bytes and scales. */
bool tensor_same(const struct tensor_view *a, const struct tensor_view *b);

/* Writing. Tensors are written in the order safetensors itself uses (its list of dtypes backwards, then name), the header
 * padded to 8 with spaces. The file appears under its name only when complete and synced. */
struct tensor_spec {
    const char *name;
    enum dtype dtype;
    int n_dims;
    int64_t shape[TENSOR_MAX_DIMS];
    void *user;                                   /* for the callback */
};
/* Fills `bytes` (at most 8 MiB, whole elements) of tensor `spec` starting at byte `offset` of it into `out`. Called in the order
 * of writing; a status other than OK ends the write and is passed on. */
typedef int tensor_fill(void *context, const struct tensor_spec *spec, size_t offset, size_t bytes, void *out);
/* One file. `metadata` is NULL-terminated pairs key, value, ... or NULL. */
int safetensors_write(const char *path, const struct tensor_spec *specs, int n, const char *const *metadata,
                      tensor_fill *fill, void *context);
/* model.safetensors in `dir`, or model-00001-of-0000N.safetensors and an index when the total exceeds max_file_bytes
 * (0: never split). Split in the order of `specs`; names, bytes and metadata {"format": "pt"} as transformers writes them.
 * ERR_USAGE when `dir` already holds a model. */
int safetensors_write_dir(const char *dir, const struct tensor_spec *specs, int n, size_t max_file_bytes,
                          tensor_fill *fill, void *context);

#endif
