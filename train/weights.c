/* See weights.h. A load is cut into pieces of a few MiB. Every thread takes the next piece, converts it out of the mapped file into pinned memory and
 * starts its copy; with two buffers a thread it converts the next one meanwhile. Pieces of streamed blocks are converted where they stay. */
#include "train/weights.h"

#include <omp.h>
#include <string.h>

#include "base/error.h"
#include "base/half.h"

enum { PIECE = 8 << 20, MOST_THREADS = 16 };

struct piece { const struct tensor_view *from; int64_t first, count, offset; };     /* elements [first, first + count) of the tensor -> element `offset` of the table */
struct pieces { struct piece *list; int64_t n, room, most; };

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
    for (int64_t first = 0; first < v->count; first += p->most) {
        if (p->n == p->room) p->list = xrealloc(p->list, (size_t)(p->room = p->room ? 2 * p->room : 256) * sizeof *p->list);
        p->list[p->n++] = (struct piece){v, first, v->count - first < p->most ? v->count - first : p->most, offset + first};
    }
    return OK;
}

/* params_match() let nothing but F32, F16, BF16 and F8_E4M3 with its scales through, so this cannot fail. */
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
        int rc = tensor_to_float(v, p->first + done, n, at);
        CHECK(rc == OK, "tensor %s holds no weights", v->name);
        if (dtype != DTYPE_F32) for (int64_t i = 0; i < n; i++) ((uint16_t *)to)[done + i] = bf16_from_float(at[i]);
    }
}

int weights_load(const struct params *t, struct backend *be, const struct weight_home *home, const struct tensor_set *set, const char *where, const int *layer_of)
{
    const struct ops *op = be->ops;
    size_t width = dtype_width(be->act_dtype);
    struct pieces p = {.most = PIECE / (int64_t)width};
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
            bool on_host;
            act *to = weight_home_at(be, home, p.list[i].offset, &on_host);
            if (on_host) { convert(to, be->act_dtype, &p.list[i]); continue; }
            turn ^= 1;
            if (busy[turn]) op->wait_mark(be, 2 * me + turn);
            convert(buffer[me][turn], be->act_dtype, &p.list[i]);
            #pragma omp critical(weights_copy)
            {
                op->upload(be, to, buffer[me][turn], (size_t)p.list[i].count * width);
                op->mark(be, 2 * me + turn);
            }
            busy[turn] = true;
        }
    }
    op->sync(be);
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
