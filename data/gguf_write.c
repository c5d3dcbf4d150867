/* Writing GGUF: keys and tensor descriptions gather in memory, weights stream through one buffer. Format: gguf.h. */
#include "data/gguf.h"

#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"

enum { ALIGNMENT = 32, STAGE = 1 << 20 };   /* elements moved at a time: whole blocks */

struct buffer { unsigned char *p; size_t n, room; };
struct tensor { char *name; enum gguf_dtype dtype; int n_dims; int64_t shape[GGUF_MAX_DIMS], count; const void *user; };

struct gguf_writer {
    struct buffer keys;
    uint64_t n_keys;
    char **names; size_t names_room;
    enum gguf_type item; uint64_t left;         /* of the array being written */
    struct tensor *tensor; int n_tensors, room;
};

static void add(struct buffer *b, const void *data, size_t n)
{
    if (b->n + n > b->room) b->p = xrealloc(b->p, b->room = 2 * (b->n + n) + 256);
    memcpy(b->p + b->n, data, n);
    b->n += n;
}

static void add_u32(struct buffer *b, uint32_t v) { add(b, &v, 4); }
static void add_u64(struct buffer *b, uint64_t v) { add(b, &v, 8); }
static void add_string(struct buffer *b, const char *s, size_t n) { add_u64(b, n); add(b, s, n); }

struct gguf_writer *gguf_writer_new(void) { return xcalloc(1, sizeof(struct gguf_writer)); }

void gguf_writer_free(struct gguf_writer *w)
{
    if (!w) return;
    for (uint64_t i = 0; i < w->n_keys; i++) free(w->names[i]);
    for (int i = 0; i < w->n_tensors; i++) free(w->tensor[i].name);
    free(w->names);
    free(w->tensor);
    free(w->keys.p);
    free(w);
}

static struct buffer *begin(struct gguf_writer *w, const char *key, enum gguf_type type)
{
    CHECK(!w->left, "key %s comes before the array ahead of it is complete", key);
    for (uint64_t i = 0; i < w->n_keys; i++) CHECK(strcmp(w->names[i], key), "key %s is written twice", key);
    if (w->n_keys == w->names_room) w->names = xrealloc(w->names, (w->names_room = 2 * w->names_room + 32) * sizeof *w->names);
    w->names[w->n_keys++] = xstrdup(key);
    add_string(&w->keys, key, strlen(key));
    add_u32(&w->keys, type);
    return &w->keys;
}

void gguf_put_u32(struct gguf_writer *w, const char *key, uint32_t v) { add_u32(begin(w, key, GGUF_U32), v); }
void gguf_put_f32(struct gguf_writer *w, const char *key, float v) { add(begin(w, key, GGUF_F32), &v, 4); }
void gguf_put_bool(struct gguf_writer *w, const char *key, bool v) { add(begin(w, key, GGUF_BOOL), v ? "\1" : "\0", 1); }
void gguf_put_string(struct gguf_writer *w, const char *key, const char *v) { add_string(begin(w, key, GGUF_STRING), v, strlen(v)); }

void gguf_put_array(struct gguf_writer *w, const char *key, enum gguf_type item, uint64_t count)
{
    struct buffer *b = begin(w, key, GGUF_ARRAY);
    add_u32(b, item);
    add_u64(b, count);
    w->item = item;
    w->left = count;
}

static struct buffer *item(struct gguf_writer *w, enum gguf_type type)
{
    CHECK(w->left && w->item == type, "an item of type %d does not belong here", (int)type);
    w->left--;
    return &w->keys;
}

void gguf_item_f32(struct gguf_writer *w, float v) { add(item(w, GGUF_F32), &v, 4); }
void gguf_item_i32(struct gguf_writer *w, int32_t v) { add(item(w, GGUF_I32), &v, 4); }
void gguf_item_bool(struct gguf_writer *w, bool v) { add(item(w, GGUF_BOOL), v ? "\1" : "\0", 1); }
void gguf_item_string(struct gguf_writer *w, const char *bytes, size_t n) { add_string(item(w, GGUF_STRING), bytes, n); }

void gguf_add_tensor(struct gguf_writer *w, const char *name, enum gguf_dtype t, int n_dims, const int64_t *shape, const void *user)
{
    CHECK(strlen(name) < 64 && n_dims >= 1 && n_dims <= GGUF_MAX_DIMS, "tensor %s does not fit GGUF", name);
    CHECK(t != GGUF_DTYPE_Q8_0 || shape[n_dims - 1] % GGUF_BLOCK == 0, "tensor %s: rows of %lld are no whole blocks", name, (long long)shape[n_dims - 1]);
    if (w->n_tensors == w->room) w->tensor = xrealloc(w->tensor, (size_t)(w->room = 2 * w->room + 64) * sizeof *w->tensor);
    struct tensor *x = &w->tensor[w->n_tensors++];
    *x = (struct tensor){.name = xstrdup(name), .dtype = t, .n_dims = n_dims, .count = 1, .user = user};
    for (int i = 0; i < n_dims; i++) x->count *= x->shape[i] = shape[i];
}

static size_t aligned(size_t n) { return (n + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

static int write_tensor(int fd, const struct tensor *t, float *stage, unsigned char *bytes, const char *path, gguf_fill *fill, void *context)
{
    static const unsigned char zeros[ALIGNMENT];
    int rc = OK;
    size_t total = gguf_dtype_bytes(t->dtype, t->count);
    for (int64_t first = 0; first < t->count; first += STAGE) {
        int64_t n = t->count - first < STAGE ? t->count - first : STAGE;
        TRY(fill(context, t->user, first, n, stage));
        gguf_encode(t->dtype, stage, n, bytes);
        TRY(file_write_all(fd, bytes, gguf_dtype_bytes(t->dtype, n), path));
    }
    TRY(file_write_all(fd, zeros, aligned(total) - total, path));
out:
    return rc;
}

int gguf_write(const struct gguf_writer *w, const char *path, gguf_fill *fill, void *context)
{
    static const unsigned char zeros[ALIGNMENT];
    CHECK(!w->left, "the last array is not complete");
    int rc = OK, fd = -1;
    struct buffer head = {0};
    float *stage = xmalloc(STAGE * sizeof *stage);
    unsigned char *bytes = xmalloc(STAGE * sizeof *stage);
    const char *slash = strrchr(path, '/');
    char *tmp = xasprintf("%s.tmp-%d", path, (int)getpid()), *dir = slash ? xstrndup(path, slash == path ? 1 : (size_t)(slash - path)) : xstrdup(".");
    uint64_t offset = 0;
    add(&head, "GGUF", 4);
    add_u32(&head, 3);
    add_u64(&head, (uint64_t)w->n_tensors);
    add_u64(&head, w->n_keys + 1);
    if (w->keys.n) add(&head, w->keys.p, w->keys.n);
    add_string(&head, "general.alignment", 17);
    add_u32(&head, GGUF_U32);
    add_u32(&head, ALIGNMENT);
    for (int i = 0; i < w->n_tensors; i++) {
        const struct tensor *t = &w->tensor[i];
        add_string(&head, t->name, strlen(t->name));
        add_u32(&head, (uint32_t)t->n_dims);
        for (int d = t->n_dims - 1; d >= 0; d--) add_u64(&head, (uint64_t)t->shape[d]);
        add_u32(&head, t->dtype);
        add_u64(&head, offset);
        offset += aligned(gguf_dtype_bytes(t->dtype, t->count));
    }
    add(&head, zeros, aligned(head.n) - head.n);
    fd = open(tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) { rc = fail_errno(ERR_IO, "%s: cannot create", tmp); goto out; }
    TRY(file_write_all(fd, head.p, head.n, tmp));
    for (int i = 0; i < w->n_tensors; i++) TRY(write_tensor(fd, &w->tensor[i], stage, bytes, tmp, fill, context));
    if (fsync(fd)) { rc = fail_errno(ERR_IO, "%s: cannot sync to disk", tmp); goto out; }
    int closed = close(fd);
    fd = -1;
    if (closed) { rc = fail_errno(ERR_IO, "%s: cannot close", tmp); goto out; }
    if (rename(tmp, path)) { rc = fail_errno(ERR_IO, "%s: cannot rename to %s", tmp, path); goto out; }
    TRY(file_sync_dir(dir));
out:
    if (fd >= 0) close(fd);
    if (rc != OK) unlink(tmp);
    free(head.p);
    free(stage);
    free(bytes);
    free(tmp);
    free(dir);
    return rc;
}
