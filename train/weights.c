/* See weights.h. A load is cut into pieces of a few MiB. Every thread takes the next piece, converts it out of the mapped file into pinned memory and
 * starts its copy; with two buffers a thread it converts the next one meanwhile. Pieces of streamed blocks are converted where they stay. */
#include "train/weights.h"

#include <math.h>
#include <omp.h>
#include <string.h>

#include "base/error.h"
#include "base/fp8.h"
#include "base/half.h"

enum { PIECE = 8 << 20, MOST_THREADS = 16, ALIGNMENT = 256 };

/* ---- layout ---- */

static int64_t aligned(int64_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

struct weight_layout weight_layout_new(const struct params *t, enum dtype act_dtype, bool fp8)
{
    int64_t width = (int64_t)dtype_width(act_dtype);
    struct weight_layout w = {.at = xmalloc((size_t)t->n * sizeof *w.at), .scale_at = xmalloc((size_t)t->n * sizeof *w.scale_at)};
    for (int i = 0; i < t->n; i++) {
        const struct param *p = &t->p[i];
        bool rounded = fp8 && p->layer >= 0 && p->n_dims == 2;
        if (!fp8) w.total = p->offset * width;
        if (p->layer == 0 && !w.begin) w.begin = w.total;
        if (p == t->norm) w.end = w.total;
        w.at[i] = w.total;
        w.total += aligned(rounded ? p->count : p->count * width);
        w.scale_at[i] = rounded ? w.total : -1;
        if (rounded) w.total += aligned(p->rows * (int64_t)sizeof(float));
    }
    if (!fp8) w.total = t->total * width;
    return w;
}

void weight_layout_free(struct weight_layout *layout)
{
    free(layout->at);
    free(layout->scale_at);
}

void *weight_home_at(const struct weight_home *home, int64_t at, bool *on_host)
{
    const struct weight_layout *w = &home->layout;
    *on_host = home->host && at >= w->begin && at < w->end;
    if (*on_host) return (char *)home->host + (at - w->begin);
    return (char *)home->device + (home->host && at >= w->end ? at - (w->end - w->begin) : at);
}

/* ---- loading ---- */

/* elements [first, first + count) of a tensor, which are elements from `within` on of parameter i; whole rows where they become fp8 */
struct piece { const struct tensor_view *from; int64_t first, count, within; int param; };
struct pieces { const struct params *table; const struct weight_layout *layout; int64_t width; struct piece *list; int64_t n, room; };

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
    struct pieces *p = context;
    int i = param_at(p->table, offset);
    int64_t cols = p->table->p[i].cols, most = PIECE / p->width;
    if (p->layout->scale_at[i] >= 0) most = (PIECE - ALIGNMENT) / (cols + (int64_t)sizeof(float)) * cols;
    CHECK(most > 0, "a row of %lld elements is longer than a piece", (long long)cols);
    for (int64_t first = 0; first < v->count; first += most) {
        if (p->n == p->room) p->list = xrealloc(p->list, (size_t)(p->room = p->room ? 2 * p->room : 256) * sizeof *p->list);
        p->list[p->n++] = (struct piece){v, first, v->count - first < most ? v->count - first : most, offset - p->table->p[i].offset + first, i};
    }
    return OK;
}

/* params_match() let nothing but weights through, so this cannot fail. */
static void read_floats(const struct tensor_view *v, int64_t first, int64_t count, float *out)
{
    int rc = tensor_to_float(v, first, count, out);
    CHECK(rc == OK, "tensor %s holds no weights", v->name);
}

static void convert(void *to, enum dtype dtype, const struct piece *p)
{
    const struct tensor_view *v = p->from;
    if (v->dtype == dtype) {
        memcpy(to, (const char *)v->data + (size_t)p->first * dtype_width(dtype), (size_t)p->count * dtype_width(dtype));
        return;
    }
    enum { SPAN = 4096 };
    float span[SPAN];
    for (int64_t done = 0, n; done < p->count; done += n) {
        n = p->count - done < SPAN ? p->count - done : SPAN;
        float *at = dtype == DTYPE_F32 ? (float *)to + done : span;
        read_floats(v, p->first + done, n, at);
        if (dtype != DTYPE_F32) for (int64_t i = 0; i < n; i++) ((uint16_t *)to)[done + i] = bf16_from_float(at[i]);
    }
}

/* As op->quantize rounds them. */
static void convert_fp8(uint8_t *q, float *scale, const struct piece *p, int64_t cols)
{
    float *row = xmalloc((size_t)cols * sizeof *row);
    for (int64_t r = 0; r < p->count / cols; r++) {
        float most = 0;
        bool nan = false;
        read_floats(p->from, p->first + r * cols, cols, row);
        for (int64_t c = 0; c < cols; c++) {
            float a = fabsf(row[c]);
            most = a > most ? a : most;
            nan |= a != a;
        }
        scale[r] = e4m3_scale(nan ? NAN : most);
        float inverse = 1 / scale[r];
        for (int64_t c = 0; c < cols; c++) q[r * cols + c] = e4m3_from_float(row[c] * inverse);
    }
    free(row);
}

/* One piece to where it belongs: converted there, or by way of `buffer`. Returns whether the device still has to read the buffer. */
static bool place(struct backend *be, const struct weight_home *home, const struct pieces *all, const struct piece *p, void *buffer)
{
    const struct param *param = &all->table->p[p->param];
    const struct weight_layout *w = &home->layout;
    bool rounded = w->scale_at[p->param] >= 0, on_host;
    int64_t rows = p->count / param->cols, bytes = rounded ? p->count : p->count * all->width;
    char *to = weight_home_at(home, w->at[p->param] + (rounded ? p->within : p->within * all->width), &on_host), *scale_to = NULL;
    if (rounded) scale_to = weight_home_at(home, w->scale_at[p->param] + p->within / param->cols * (int64_t)sizeof(float), &on_host);
    char *q = on_host ? to : buffer, *scale = on_host ? scale_to : q + rows * param->cols + (-rows * param->cols & 3);
    if (rounded) convert_fp8((uint8_t *)q, (float *)(void *)scale, p, param->cols);
    else convert(q, be->act_dtype, p);
    if (on_host) return false;
    #pragma omp critical(weights_copy)
    {
        be->ops->upload(be, to, q, (size_t)bytes);
        if (rounded) be->ops->upload(be, scale_to, scale, (size_t)rows * sizeof(float));
    }
    return true;
}

int weights_load(const struct params *t, struct backend *be, const struct weight_home *home, const struct tensor_set *set, const char *where, const int *layer_of)
{
    const struct ops *op = be->ops;
    struct pieces p = {.table = t, .layout = &home->layout, .width = (int64_t)dtype_width(be->act_dtype)};
    void *buffer[MOST_THREADS][2] = {{NULL}};
    int rc = OK;
    TRY(params_match(t, set, where, layer_of, cut, &p));
    int threads = omp_get_num_procs() < MOST_THREADS ? omp_get_num_procs() : MOST_THREADS;
    if (p.n < threads) threads = (int)p.n;
    for (int i = 0; i < 2 * threads; i++)
        if (!(buffer[i / 2][i % 2] = op->alloc_host(be, PIECE))) { rc = fail(ERR_IO, "device %s: no host memory for the buffers that weights are loaded through (%d MiB)", be->name, 2 * threads * (PIECE >> 20)); goto out; }

    #pragma omp parallel num_threads(threads)
    {
        int me = omp_get_thread_num(), turn = 0;
        bool busy[2] = {false, false};
        #pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < p.n; i++) {
            if (busy[turn]) op->wait_mark(be, 2 * me + turn);
            busy[turn] = place(be, home, &p, &p.list[i], buffer[me][turn]);
            if (!busy[turn]) continue;
            #pragma omp critical(weights_copy)
            op->mark(be, 2 * me + turn);
            turn ^= 1;
        }
    }
    op->sync(be);
out:
    for (int i = 0; i < 2 * MOST_THREADS; i++) if (buffer[i / 2][i % 2]) op->release_host(be, buffer[i / 2][i % 2]);
    free(p.list);
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
