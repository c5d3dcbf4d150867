/* See weights.h. A checkpoint is cut into pieces of a MiB, in the order of its files. Every thread takes the next piece, reads it, into pinned memory where nothing is to be
 * converted, and starts its copy; with two buffers a thread it reads the next one meanwhile. What the host can write itself, streamed blocks and the
 * weights of a backend whose memory is the host's, is read or converted where it stays. */
#include "train/weights.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/fp8.h"
#include "base/half.h"

enum { PIECE = 1 << 20, MOST_THREADS = 16, ALIGNMENT = 256 };

/* ---- layout ---- */

static int64_t aligned(int64_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

struct weight_layout weight_layout_new(const struct params *t, enum dtype act_dtype, int fp8_begin, int fp8_end)
{
    bool fp8 = fp8_begin < fp8_end;
    int64_t width = (int64_t)dtype_width(act_dtype);
    struct weight_layout w = {.at = xmalloc((size_t)t->n * sizeof *w.at), .scale_at = xmalloc((size_t)t->n * sizeof *w.scale_at), .n_layers = t->n_layers,
                              .block_at = xmalloc((size_t)(t->n_layers + 1) * sizeof *w.block_at)};
    for (int i = 0, begun = 0; i < t->n; i++) {
        const struct param *p = &t->p[i];
        bool rounded = p->n_dims == 2 && p->layer >= fp8_begin && p->layer < fp8_end;
        if (!fp8) w.total = p->offset * width;
        if (p->layer == begun || p == t->norm) w.block_at[begun++] = w.total;
        w.at[i] = w.total;
        w.total += aligned(rounded ? p->count : p->count * width);
        w.scale_at[i] = rounded ? w.total : -1;
        if (rounded) w.total += aligned(p->rows * (int64_t)sizeof(float));
    }
    if (!fp8) w.total = t->total * width;
    for (int l = 0; l < t->n_layers; l++) if (w.block_at[l + 1] - w.block_at[l] > w.block) w.block = w.block_at[l + 1] - w.block_at[l];
    return w;
}

void weight_layout_free(struct weight_layout *layout)
{
    free(layout->at);
    free(layout->scale_at);
    free(layout->block_at);
}

void *weight_home_at(const struct weight_home *home, int64_t at, bool *on_host)
{
    const struct weight_layout *w = &home->layout;
    int64_t begin = w->block_at[0], end = w->block_at[w->n_layers];
    bool in_block = at >= begin && at < end, elsewhere = home->host || home->block;
    *on_host = home->host && in_block;
    if (*on_host) return (char *)home->host + (at - begin);
    if (home->block && in_block) {
        int l = 0;
        while (at >= w->block_at[l + 1]) l++;
        return (char *)home->block + (at - w->block_at[l]);
    }
    return (char *)home->device + (elsewhere && at >= end ? at - (end - begin) : at);
}

/* ---- loading ---- */

/* elements [first, first + count) of a tensor, which are elements from `within` on of parameter i; whole rows where they become fp8 */
struct piece { const struct tensor_view *from; int64_t first, count, within; int param; };
struct weight_files {
    const struct params *table;
    struct backend *be;
    const struct weight_home *home;
    const struct tensor_set *set;
    int64_t width;                                           /* of the device's elements */
    struct piece *list; int64_t n, room;                     /* in the order of the files */
    int64_t piece;                                           /* bytes: PIECE, or what a row that is rounded takes */
    int threads; char *buffers;                              /* of a piece each, two a thread */
};

static int param_at(const struct params *t, int64_t offset)
{
    int low = 0, high = t->n;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (t->p[middle].offset <= offset) low = middle;
        else high = middle;
    }
    return low;
}

static int cut(void *context, const struct tensor_view *v, int64_t offset)
{
    struct weight_files *f = context;
    int i = param_at(f->table, offset);
    int64_t cols = f->table->p[i].cols, width = (int64_t)dtype_width(v->dtype), most = f->piece / (width > f->width ? width : f->width);
    if (f->home->layout.scale_at[i] >= 0) {                  /* a row as it lies in the file has to fit as well */
        most = (f->piece - ALIGNMENT) / (cols * width > cols + (int64_t)sizeof(float) ? cols * width : cols + (int64_t)sizeof(float)) * cols;
        CHECK(most > 0, "a row of %lld elements is longer than a piece", (long long)cols);
    }
    for (int64_t first = 0; first < v->count; first += most) {
        if (f->n == f->room) f->list = xrealloc(f->list, (size_t)(f->room = f->room ? 2 * f->room : 256) * sizeof *f->list);
        f->list[f->n++] = (struct piece){v, first, v->count - first < most ? v->count - first : most, offset - f->table->p[i].offset + first, i};
    }
    return OK;
}

static int by_place(const void *a, const void *b)
{
    const struct piece *p = a, *q = b;
    if (p->from->file != q->from->file) return p->from->file < q->from->file ? -1 : 1;
    const char *x = (const char *)p->from->data + (size_t)p->first * dtype_width(p->from->dtype), *y = (const char *)q->from->data + (size_t)q->first * dtype_width(q->from->dtype);
    return (x > y) - (x < y);
}

/* The tensor of a piece, with the piece's elements, which were read to `raw`, at their own numbers. */
static struct tensor_view view_of(const struct piece *p, const void *raw)
{
    struct tensor_view v = *p->from;
    v.data = (const void *)((uintptr_t)raw - (uintptr_t)p->first * dtype_width(v.dtype));
    return v;
}

/* params_match() let nothing but weights through, so this cannot fail. */
static void read_floats(const struct tensor_view *v, int64_t first, int64_t count, float *out)
{
    int rc = tensor_to_float(v, first, count, out);
    CHECK(rc == OK, "tensor %s holds no weights", v->name);
}

/* raw: room for a piece as it lies in the file */
static int fetch(void *to, enum dtype dtype, const struct piece *p, const struct tensor_set *set, void *raw)
{
    if (p->from->dtype == dtype) return tensor_read(set, p->from, p->first, p->count, to);
    int rc = tensor_read(set, p->from, p->first, p->count, raw);
    struct tensor_view v = view_of(p, raw);
    enum { SPAN = 4096 };
    float span[SPAN];
    for (int64_t done = 0, n; rc == OK && done < p->count; done += n) {
        n = p->count - done < SPAN ? p->count - done : SPAN;
        float *at = dtype == DTYPE_F32 ? (float *)to + done : span;
        read_floats(&v, p->first + done, n, at);
        if (dtype != DTYPE_F32) for (int64_t i = 0; i < n; i++) ((uint16_t *)to)[done + i] = bf16_from_float(at[i]);
    }
    return rc;
}

/* As op->quantize rounds them. What was published in fp8 with a scale per row, or one for all, stays as it is: rounding it to other scales would round it twice. */
static int fetch_fp8(uint8_t *q, float *scale, const struct piece *p, int64_t cols, const struct tensor_set *set, void *raw)
{
    const struct tensor_scale *published = p->from->scale;
    int64_t rows = p->count / cols;
    if (published && published->kind != SCALE_BLOCK) {
        tensor_row_scales(p->from, p->first / cols, rows, scale);
        return tensor_read(set, p->from, p->first, p->count, q);
    }
    int rc = tensor_read(set, p->from, p->first, p->count, raw);
    struct tensor_view v = view_of(p, raw);
    float *row = xmalloc((size_t)cols * sizeof *row);
    for (int64_t r = 0; rc == OK && r < rows; r++) {
        read_floats(&v, p->first + r * cols, cols, row);
        e4m3_round_row(q + r * cols, &scale[r], row, cols);
    }
    free(row);
    return rc;
}

/* One piece to where it belongs: made there, or in `buffer`. *copying: the device still has to read the buffer. */
static int place(const struct weight_files *f, const struct piece *p, void *buffer, void *raw, bool *copying)
{
    struct backend *be = f->be;
    const struct weight_home *home = f->home;
    const struct param *param = &f->table->p[p->param];
    const struct weight_layout *w = &home->layout;
    bool rounded = w->scale_at[p->param] >= 0, here;
    int64_t rows = p->count / param->cols, bytes = rounded ? p->count : p->count * f->width;
    char *to = weight_home_at(home, w->at[p->param] + (rounded ? p->within : p->within * f->width), &here), *scale_to = NULL;
    if (rounded) scale_to = weight_home_at(home, w->scale_at[p->param] + p->within / param->cols * (int64_t)sizeof(float), &here);
    here |= be->host_memory;
    char *made = here ? to : buffer, *scale = here ? scale_to : made + bytes + (-bytes & 3);
    int rc = rounded ? fetch_fp8((uint8_t *)made, (float *)(void *)scale, p, param->cols, f->set, raw) : fetch(made, be->act_dtype, p, f->set, raw);
    *copying = rc == OK && !here;
    if (!*copying) return rc;
    #pragma omp critical(weights_copy)
    {
        be->ops->upload(be, to, made, (size_t)bytes);
        if (rounded) be->ops->upload(be, scale_to, scale, (size_t)rows * sizeof(float));
    }
    return OK;
}

int weight_files_open(struct weight_files **out, const struct params *t, struct backend *be, const struct weight_home *home, const struct tensor_set *set, const char *where,
                      const int *layer_of)
{
    struct weight_files *f = xcalloc(1, sizeof *f);
    int rc = OK;
    *f = (struct weight_files){.table = t, .be = be, .home = home, .set = set, .width = (int64_t)dtype_width(be->act_dtype), .piece = PIECE};
    for (int i = 0; i < t->n; i++)
        if (home->layout.scale_at[i] >= 0 && t->p[i].cols * (int64_t)sizeof(float) + ALIGNMENT > f->piece) f->piece = aligned(t->p[i].cols * (int64_t)sizeof(float)) + ALIGNMENT;
    TRY(params_match(t, set, where, layer_of, cut, f));
    qsort(f->list, (size_t)f->n, sizeof *f->list, by_place);
    f->threads = omp_get_num_procs() < MOST_THREADS ? omp_get_num_procs() : MOST_THREADS;
    if (f->n < f->threads) f->threads = (int)f->n;
    if (!be->host_memory && !(f->buffers = be->ops->alloc_host(be, (size_t)(2 * f->threads) * (size_t)f->piece))) {
        rc = fail(ERR_IO, "device %s: no host memory for the buffers that weights are loaded through (%d MiB)", be->name, (int)(2 * f->threads * f->piece >> 20));
        goto out;
    }
    *out = f;
    f = NULL;
out:
    weight_files_close(f);
    return rc;
}

void weight_files_close(struct weight_files *f)
{
    if (!f) return;
    if (f->buffers) f->be->ops->release_host(f->be, f->buffers);
    free(f->list);
    free(f);
}

int weight_files_read(struct weight_files *f, int layer)
{
    struct backend *be = f->be;
    char message[1024] = "";
    int failed = OK;
    #pragma omp parallel num_threads(f->threads)
    {
        int me = omp_get_thread_num(), turn = 0, rc;
        bool busy[2] = {false, false};
        char *raw = xmalloc((size_t)f->piece);
        #pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < f->n; i++) {
            if (layer != WEIGHTS_ALL && f->table->p[f->list[i].param].layer != layer) continue;
            if (busy[turn]) be->ops->wait_mark(be, 2 * me + turn);
            rc = place(f, &f->list[i], f->buffers ? f->buffers + (2 * me + turn) * f->piece : NULL, raw, &busy[turn]);
            if (rc == OK && !busy[turn]) continue;
            #pragma omp critical(weights_copy)
            if (rc == OK) {
                be->ops->mark(be, 2 * me + turn);
                turn ^= 1;
            } else if (failed == OK) {
                failed = rc;
                snprintf(message, sizeof message, "%s", fail_message());        /* a thread's own; the caller reads its thread's */
            }
        }
        free(raw);
    }
    be->ops->sync(be);
    return failed == OK ? OK : fail(failed, "%s", message);
}

int weights_load(const struct params *t, struct backend *be, const struct weight_home *home, const struct tensor_set *set, const char *where, const int *layer_of)
{
    struct weight_files *f = NULL;
    int rc = weight_files_open(&f, t, be, home, set, where, layer_of);
    if (rc == OK) rc = weight_files_read(f, WEIGHTS_ALL);
    weight_files_close(f);
    return rc;
}

/* ---- random ---- */

/* `rows` whole rows that were made in `stage`: rounded, to where they belong */
static void place_fp8(struct backend *be, const struct weight_home *home, int i, const struct param *p, int64_t first, int64_t rows, const act *stage, void *packed)
{
    bool on_host;
    void *q = weight_home_at(home, home->layout.at[i] + first * p->cols, &on_host), *scale = weight_home_at(home, home->layout.scale_at[i] + first * (int64_t)sizeof(float), &on_host);
    struct fp8 made = {q, scale};
    if (on_host) made = (struct fp8){packed, (float *)(void *)((char *)packed + aligned(rows * p->cols))};
    be->ops->quantize(be, &made, stage, rows, p->cols);
    if (!on_host) return;
    be->ops->download(be, q, made.q, (size_t)(rows * p->cols));
    be->ops->download(be, scale, made.scale, (size_t)rows * sizeof(float));
}

void weights_random(const struct params *t, struct backend *be, const struct weight_home *home, uint64_t seed, act *stage, int64_t stage_count, void *packed)
{
    for (int i = 0; i < t->n; i++) {
        const struct param *p = &t->p[i];
        bool on_host, rounded = home->layout.scale_at[i] >= 0;
        char *to = weight_home_at(home, home->layout.at[i], &on_host);
        if (!on_host && !rounded) { be->ops->random_normal(be, (act *)to, p->count, p->init_mean, p->init_std, seed, p->offset); continue; }
        int64_t most = rounded ? stage_count / p->cols * p->cols : stage_count;
        CHECK(most > 0, "rows of %lld elements are made in memory for %lld", (long long)p->cols, (long long)stage_count);
        for (int64_t first = 0; first < p->count; first += most) {
            int64_t n = p->count - first < most ? p->count - first : most;
            be->ops->random_normal(be, stage, n, p->init_mean, p->init_std, seed, p->offset + first);
            if (rounded) place_fp8(be, home, i, p, first / p->cols, n / p->cols, stage, packed);
            else be->ops->download(be, to + (size_t)first * dtype_width(be->act_dtype), stage, (size_t)n * dtype_width(be->act_dtype));
        }
    }
}
