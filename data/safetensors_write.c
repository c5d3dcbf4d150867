/* Writing safetensors, one file or a directory of them; reading and the format: safetensors.c.
 *
 * Tensors stream through one buffer, so a model larger than memory can be written. Every file is made under a temporary name,
 * synced and renamed; of a directory all files are complete before the first is renamed and the index comes last, so what has
 * a final name is whole. The bytes are those that the reference library and transformers write for the same tensors.
 */
#include "data/safetensors.h"

#include <fcntl.h>
#include <jansson.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"

enum {
    CHUNK = 8 << 20,                 /* a multiple of every element's width: a callback sees whole elements */
    MAX_HEADER = 100000000
};

/* The reference library sorts by descending position in its list of dtypes, wide ones last, then by name. */
static const int write_rank[DTYPE_COUNT] = {
    [DTYPE_BOOL] = 0, [DTYPE_U8] = 1, [DTYPE_I8] = 2, [DTYPE_F8_E5M2] = 3, [DTYPE_F8_E4M3] = 4, [DTYPE_I16] = 5, [DTYPE_U16] = 6, [DTYPE_F16] = 7,
    [DTYPE_BF16] = 8, [DTYPE_I32] = 9, [DTYPE_U32] = 10, [DTYPE_F32] = 11, [DTYPE_F64] = 12, [DTYPE_I64] = 13, [DTYPE_U64] = 14,
};

static int in_write_order(const void *a, const void *b)
{
    const struct tensor_spec *x = *(const struct tensor_spec *const *)a, *y = *(const struct tensor_spec *const *)b;
    if (write_rank[x->dtype] != write_rank[y->dtype]) return write_rank[y->dtype] - write_rank[x->dtype];
    return strcmp(x->name, y->name);
}

static size_t spec_count(const struct tensor_spec *t)
{
    size_t count = 1;
    CHECK(t->n_dims >= 0 && t->n_dims <= TENSOR_MAX_DIMS, "tensor %s has %d dimensions", t->name, t->n_dims);
    for (int i = 0; i < t->n_dims; i++)
        CHECK(t->shape[i] >= 0 && !__builtin_mul_overflow(count, (size_t)t->shape[i], &count), "tensor %s: shape overflows", t->name);
    return count;
}

static size_t spec_bytes(const struct tensor_spec *t)
{
    size_t bytes;
    CHECK(!__builtin_mul_overflow(spec_count(t), dtype_bytes(t->dtype), &bytes) && bytes <= INT64_MAX, "tensor %s: shape overflows", t->name);
    return bytes;
}

static void print_string(FILE *f, const char *s)
{
    json_t *value = json_string(s);
    CHECK(value, "a tensor's name or metadata is not UTF-8");
    char *text = json_dumps(value, JSON_ENCODE_ANY);
    fputs(text, f);
    free(text);
    json_decref(value);
}

/* The u64 length and the header, padded with spaces to a multiple of 8. malloc'd. */
static char *make_header(const struct tensor_spec *const *order, int n, const char *const *metadata, size_t *bytes)
{
    char *text = NULL;
    size_t size, at = 0;
    FILE *f = open_memstream(&text, &size);
    CHECK(f, "no memory for a header");
    fputs("01234567{", f);   /* the length goes there */
    if (metadata) {
        fputs("\"__metadata__\":{", f);
        for (int i = 0; metadata[i]; i += 2) {
            if (i) fputc(',', f);
            print_string(f, metadata[i]);
            fputc(':', f);
            print_string(f, metadata[i + 1]);
        }
        fputs(n ? "}," : "}", f);
    }
    for (int i = 0; i < n; i++) {
        const struct tensor_spec *t = order[i];
        CHECK(!i || in_write_order(&order[i - 1], &order[i]) < 0, "tensor %s is written twice", t->name);
        CHECK(strcmp(t->name, "__metadata__"), "a tensor cannot have this name");
        if (i) fputc(',', f);
        print_string(f, t->name);
        fprintf(f, ":{\"dtype\":\"%s\",\"shape\":[", dtype_name(t->dtype));
        for (int d = 0; d < t->n_dims; d++) fprintf(f, d ? ",%lld" : "%lld", (long long)t->shape[d]);
        fprintf(f, "],\"data_offsets\":[%zu,%zu]}", at, at + spec_bytes(t));
        at += spec_bytes(t);
    }
    fputc('}', f);
    fflush(f);
    while (size % 8) { fputc(' ', f); fflush(f); }
    fclose(f);
    uint64_t length = size - 8;
    CHECK(length <= MAX_HEADER, "a header of %llu bytes is over the format's limit", (unsigned long long)length);
    memcpy(text, &length, 8);
    *bytes = size;
    return text;
}

/* Writes and syncs a file under the name given, which is removed again on failure. */
static int write_file(const char *path, const struct tensor_spec *const *specs, int n, const char *const *metadata, tensor_fill *fill, void *context)
{
    int rc = OK, fd = -1;
    const struct tensor_spec **order = xmalloc((size_t)n * sizeof *order);
    char *header = NULL, *buffer = NULL;
    size_t header_bytes;
    if (n) memcpy(order, specs, (size_t)n * sizeof *order);
    if (n) qsort(order, (size_t)n, sizeof *order, in_write_order);
    header = make_header(order, n, metadata, &header_bytes);
    buffer = xmalloc(CHUNK);
    fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) { rc = fail_errno(ERR_IO, "%s: cannot create", path); goto out; }
    TRY(file_write_all(fd, header, header_bytes, path));
    for (int i = 0; i < n; i++) {
        size_t bytes = spec_bytes(order[i]);
        for (size_t at = 0; at < bytes; at += CHUNK) {
            size_t part = bytes - at < CHUNK ? bytes - at : CHUNK;
            TRY(fill(context, order[i], at, part, buffer));
            TRY(file_write_all(fd, buffer, part, path));
        }
    }
    if (fsync(fd)) { rc = fail_errno(ERR_IO, "%s: cannot sync to disk", path); goto out; }
    int closed = close(fd);
    fd = -1;
    if (closed) rc = fail_errno(ERR_IO, "%s: cannot close", path);
out:
    if (fd >= 0) close(fd);
    if (rc != OK) unlink(path);
    free(order);
    free(header);
    free(buffer);
    return rc;
}

static char *parent_of(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? xstrndup(path, slash == path ? 1 : (size_t)(slash - path)) : xstrdup(".");
}

int safetensors_write(const char *path, const struct tensor_spec *specs, int n, const char *const *metadata, tensor_fill *fill, void *context)
{
    int rc = OK;
    char *tmp = xasprintf("%s.tmp-%d", path, (int)getpid()), *dir = parent_of(path);
    const struct tensor_spec **list = xmalloc((size_t)n * sizeof *list);
    for (int i = 0; i < n; i++) list[i] = &specs[i];
    TRY(write_file(tmp, list, n, metadata, fill, context));
    if (rename(tmp, path)) {
        rc = fail_errno(ERR_IO, "%s: cannot rename to %s", tmp, path);
        unlink(tmp);
        goto out;
    }
    TRY(file_sync_dir(dir));
out:
    free(tmp);
    free(dir);
    free(list);
    return rc;
}

/* As transformers splits: in the order given, a tensor that does not fit any more begins the next file, and one that is larger
 * than a file gets its own without closing the one being filled. file_of[i] is the file of tensor i; returns how many there are. */
static int split_files(const struct tensor_spec *specs, int n, size_t max_file_bytes, int *file_of)
{
    int *group = xmalloc((size_t)n * sizeof *group), *number = xmalloc(((size_t)n + 1) * sizeof *number);
    int groups = 1, open = 0, files = 0;   /* files are numbered in the order they are closed: number[group] */
    size_t used = 0;
    for (int i = 0; i < n; i++) {
        size_t bytes = spec_bytes(&specs[i]);
        if (max_file_bytes && bytes > max_file_bytes) {
            number[group[i] = groups++] = files++;
            continue;
        }
        if (max_file_bytes && used + bytes > max_file_bytes) {
            number[open] = files++;
            open = groups++;
            used = 0;
        }
        group[i] = open;
        used += bytes;
    }
    for (int i = 0; i < n; i++)
        if (group[i] == open) { number[open] = files++; break; }
    for (int i = 0; i < n; i++) file_of[i] = number[group[i]];
    free(group);
    free(number);
    return files;
}

/* {"metadata": {total_parameters, total_size}, "weight_map": {tensor: file}}, keys sorted, as transformers writes it */
static int write_index(const char *path, const struct tensor_spec *specs, int n, char *const *names, const int *file_of)
{
    json_t *weight_map = json_object();
    size_t parameters = 0, total = 0;
    for (int i = 0; i < n; i++) {
        parameters += spec_count(&specs[i]);
        total += spec_bytes(&specs[i]);
        CHECK(!json_object_set_new(weight_map, specs[i].name, json_string(names[file_of[i]])), "tensor name %s is not UTF-8", specs[i].name);
    }
    json_t *index = json_pack("{s:{s:I, s:I}, s:o}", "metadata", "total_parameters", (json_int_t)parameters, "total_size", (json_int_t)total,
                              "weight_map", weight_map);
    CHECK(index, "the index cannot be made");
    char *text = json_dumps(index, JSON_INDENT(2) | JSON_SORT_KEYS | JSON_ENSURE_ASCII), *line = xasprintf("%s\n", text);
    int rc = file_replace(path, line, strlen(line));
    free(line);
    free(text);
    json_decref(index);
    return rc;
}

int safetensors_write_dir(const char *dir, const struct tensor_spec *specs, int n, size_t max_file_bytes, tensor_fill *fill, void *context)
{
    static const char *const metadata[] = {"format", "pt", NULL};
    const struct tensor_spec **list = xmalloc((size_t)n * sizeof *list);
    int *file_of = xmalloc((size_t)n * sizeof *file_of);
    int files = split_files(specs, n, max_file_bytes, file_of), made = 0, renamed = 0, rc = OK;
    if (!files) files = 1;
    char **names = xcalloc((size_t)files, sizeof *names), **paths = xcalloc((size_t)files, sizeof *paths);
    char **tmps = xcalloc((size_t)files, sizeof *tmps);
    char *single = path_join(dir, "model.safetensors"), *index = path_join(dir, "model.safetensors.index.json");
    for (int f = 0; f < files; f++) {
        names[f] = files == 1 ? xstrdup("model.safetensors") : xasprintf("model-%05d-of-%05d.safetensors", f + 1, files);
        paths[f] = path_join(dir, names[f]);
        tmps[f] = xasprintf("%s.tmp-%d", paths[f], (int)getpid());
    }
    /* beside a model that is there, readers would take one or the other */
    if (path_exists(single) || path_exists(index)) {
        rc = fail(ERR_USAGE, "%s: already holds a model; remove it or name another directory", dir);
        goto out;
    }
    for (; made < files; made++) {
        int count = 0;
        for (int i = 0; i < n; i++)
            if (file_of[i] == made) list[count++] = &specs[i];
        TRY(write_file(tmps[made], list, count, metadata, fill, context));
    }
    for (; renamed < files; renamed++)
        if (rename(tmps[renamed], paths[renamed])) { rc = fail_errno(ERR_IO, "%s: cannot rename to %s", tmps[renamed], paths[renamed]); goto out; }
    TRY(file_sync_dir(dir));
    if (files > 1) TRY(write_index(index, specs, n, names, file_of));
out:
    for (int f = 0; rc != OK && f < made; f++) unlink(f < renamed ? paths[f] : tmps[f]);
    names_free(names, files);
    names_free(paths, files);
    names_free(tmps, files);
    free(single);
    free(index);
    free(list);
    free(file_of);
    return rc;
}
