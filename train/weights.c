/* See weights.h. A load is cut into pieces of a few MiB, in the order of the files. Every thread takes the next piece, reads it from its file, into pinned memory where nothing
 * is to be converted, and starts its copy; with two buffers a thread it reads the next one meanwhile. What the host can write itself, streamed blocks and
 * the weights of a backend whose memory is the host's, is read or converted where it stays. */
#include "train/weights.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/half.h"

enum { PIECE = 8 << 20, MOST_THREADS = 16 };

struct piece { const struct tensor_view *from; int64_t first, count, offset; };     /* elements [first, first + count) of the tensor -> element `offset` of the table */
struct pieces { struct piece *list; int64_t n, room; size_t width; };      /* width of the device's elements */

static act *element(const struct backend *be, act *base, int64_t i) { return (act *)((char *)base + (size_t)i * dtype_width(be->act_dtype)); }

act *weight_home_at(const struct backend *be, const struct weight_home *home, int64_t offset, bool *on_host)
{
    *on_host = home->host && offset >= home->begin && offset < home->end;
    if (*on_host) return element(be, home->host, offset - home->begin);
    return element(be, home->device, home->host && offset >= home->end ? offset - (home->end - home->begin) : offset);
}

static int cut(void *context, const struct tensor_view *v, int64_t offset)
{
    struct pieces *p = context;
    size_t width = dtype_width(v->dtype) > p->width ? dtype_width(v->dtype) : p->width;
    int64_t most = PIECE / (int64_t)width;
    for (int64_t first = 0; first < v->count; first += most) {
        if (p->n == p->room) p->list = xrealloc(p->list, (size_t)(p->room = p->room ? 2 * p->room : 256) * sizeof *p->list);
        p->list[p->n++] = (struct piece){v, first, v->count - first < most ? v->count - first : most, offset + first};
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

/* raw: room for a piece as it lies in the file */
static int fetch(void *to, enum dtype dtype, const struct piece *p, const struct tensor_set *set, void *raw)
{
    if (p->from->dtype == dtype) return tensor_read(set, p->from, p->first, p->count, to);
    int rc = tensor_read(set, p->from, p->first, p->count, raw);
    struct tensor_view v = *p->from;
    v.data = raw;
    v.count = p->count;
    enum { SPAN = 4096 };
    float span[SPAN];
    for (int64_t done = 0, n; rc == OK && done < p->count; done += n) {
        n = p->count - done < SPAN ? p->count - done : SPAN;
        float *at = dtype == DTYPE_F32 ? (float *)to + done : span;
        rc = tensor_to_float(&v, done, n, at);
        if (dtype != DTYPE_F32) for (int64_t i = 0; i < n; i++) ((uint16_t *)to)[done + i] = bf16_from_float(at[i]);
    }
    return rc;
}

int weights_load(const struct params *t, struct backend *be, const struct weight_home *home, const struct tensor_set *set, const char *where, const int *layer_of)
{
    const struct ops *op = be->ops;
    size_t width = dtype_width(be->act_dtype);
    struct pieces p = {.width = width};
    void *buffer[MOST_THREADS][2] = {{NULL}};
    char message[1024] = "";
    int rc = OK, failed = OK;
    TRY(params_match(t, set, where, layer_of, cut, &p));
    qsort(p.list, (size_t)p.n, sizeof *p.list, by_place);
    int threads = omp_get_num_procs() < MOST_THREADS ? omp_get_num_procs() : MOST_THREADS;
    if (p.n < threads) threads = (int)p.n;
    for (int i = 0; i < 2 * threads && !be->host_memory; i++)
        if (!(buffer[i / 2][i % 2] = op->alloc_host(be, PIECE))) { rc = fail(ERR_IO, "device %s: no host memory for the buffers that weights are loaded through (%d MiB)", be->name, 2 * threads * (PIECE >> 20)); goto out; }

    #pragma omp parallel num_threads(threads)
    {
        int me = omp_get_thread_num(), turn = 0, status;
        bool busy[2] = {false, false};
        char *raw = xmalloc(PIECE);
        #pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < p.n; i++) {
            bool on_host;
            act *to = weight_home_at(be, home, p.list[i].offset, &on_host);
            on_host |= be->host_memory;
            if (!on_host && busy[turn ^= 1]) op->wait_mark(be, 2 * me + turn);
            status = fetch(on_host ? (void *)to : buffer[me][turn], be->act_dtype, &p.list[i], set, raw);
            if (status == OK && on_host) continue;
            #pragma omp critical(weights_copy)
            if (status == OK) {
                op->upload(be, to, buffer[me][turn], (size_t)p.list[i].count * width);
                op->mark(be, 2 * me + turn);
                busy[turn] = true;
            } else if (failed == OK) {
                failed = status;
                snprintf(message, sizeof message, "%s", fail_message());        /* a thread's own; the caller reads its thread's */
            }
        }
        free(raw);
    }
    op->sync(be);
    if (failed != OK) rc = fail(failed, "%s", message);
out:
    for (int i = 0; i < 2 * MOST_THREADS; i++) if (buffer[i / 2][i % 2]) op->release_host(be, buffer[i / 2][i % 2]);
    free(p.list);
    return rc;
}

void weights_random(const struct params *t, struct backend *be, const struct weight_home *home, uint64_t seed, act *stage, int64_t stage_count)
{
    for (int i = 0; i < t->n; i++) {
        const struct param *p = &t->p[i];
        bool on_host;
        act *to = weight_home_at(be, home, p->offset, &on_host);
        if (!on_host) { be->ops->random_normal(be, to, p->count, p->init_mean, p->init_std, seed, p->offset); continue; }
        for (int64_t first = 0; first < p->count; first += stage_count) {
            int64_t n = p->count - first < stage_count ? p->count - first : stage_count;
            be->ops->random_normal(be, stage, n, p->init_mean, p->init_std, seed, p->offset + first);
            be->ops->download(be, element(be, to, first), stage, (size_t)n * dtype_width(be->act_dtype));
        }
    }
}
