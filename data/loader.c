/* Rows -> batches. See loader.h for the order and for what a batch is.
 *
 * An epoch is a list of blocks, each with its rows permuted: the shards of a dataset (block = shard; epoch 0 in index order), or one
 * block of all rows for a corpus. Where cursor c of epoch e lies follows from the manifest and the seed alone.
 * One thread fills a ring of batches; the consumer holds one of them, so SLOTS - 1 are ready or being filled. What the
 * thread meets (an error with its message, the end) travels through the ring in order and stays there.
 */
#include "data/loader.h"

#include <math.h>
#include <pthread.h>
#include <string.h>
#include <time.h>

#include "base/error.h"
#include "base/exp.h"
#include "base/half.h"
#include "base/rng.h"

/* ---- batches ---- */

struct batch *batch_new(int64_t rows, int64_t length, const struct shard_manifest *teacher, bool samples)
{
    struct batch *b = xcalloc(1, sizeof *b);
    size_t n = (size_t)(rows * length);
    b->rows = rows;
    b->length = length;
    b->n = rows * length;
    b->tokens = xcalloc(n, sizeof *b->tokens);
    b->labels = xcalloc(n, sizeof *b->labels);
    b->mask = xcalloc(n, sizeof *b->mask);
    b->position = xcalloc(n, sizeof *b->position);
    b->doc_begin = xcalloc(n + 1, sizeof *b->doc_begin);
    b->row_index = xcalloc((size_t)rows, sizeof *b->row_index);
    b->full_scale = 1;
    if (!teacher) return b;
    b->lse = xcalloc(n, sizeof *b->lse);
    b->label_logprob = xcalloc(n, sizeof *b->label_logprob);
    b->tail_logmass = xcalloc(n, sizeof *b->tail_logmass);
    b->k = samples ? teacher->k + teacher->draws : teacher->k;
    if (b->k) {
        b->head_ids = xcalloc(n * (size_t)b->k, sizeof *b->head_ids);
        b->head_logprob = xcalloc(n * (size_t)b->k, sizeof *b->head_logprob);
        if (samples) b->weight = xcalloc(n * (size_t)b->k, sizeof *b->weight);
    }
    if (teacher->kind == SHARD_FULL) {
        b->full_width = teacher->valid_vocab;
        b->full_logits = xcalloc(n * (size_t)teacher->valid_vocab, sizeof *b->full_logits);
    }
    return b;
}

void batch_free(struct batch *b)
{
    if (!b) return;
    free(b->tokens); free(b->labels); free(b->mask); free(b->position); free(b->doc_begin); free(b->row_index); free(b->lse);
    free(b->label_logprob); free(b->tail_logmass); free(b->head_ids); free(b->head_logprob);
    free(b->weight); free(b->full_logits);
    free(b);
}

void batch_set_row(struct batch *b, int64_t i, const uint32_t *tokens, const uint8_t *loss_mask, const uint16_t *document)
{
    int64_t L = b->length, at = i * L;
    for (int64_t t = 0, begin = 0; t < L; t++) {
        if (t && document[t] != document[t - 1]) begin = t;
        b->tokens[at + t] = (int32_t)tokens[t];
        b->mask[at + t] = loss_mask[t] && t + 1 < L;
        b->labels[at + t] = b->mask[at + t] ? (int32_t)tokens[t + 1] : -1;
        b->position[at + t] = (int32_t)(t - begin);
    }
}

void batch_finish(struct batch *b)
{
    b->n = b->rows * b->length;
    b->n_docs = b->max_doc = b->n_targets = 0;
    for (int64_t t = 0; t < b->n; t++) {
        if (b->position[t] == 0) b->doc_begin[b->n_docs++] = (int32_t)t;
        if (b->position[t] + 1 > b->max_doc) b->max_doc = b->position[t] + 1;
        b->n_targets += b->mask[t];
    }
    b->doc_begin[b->n_docs] = (int32_t)b->n;
}

/* ---- the loader ---- */

enum { SLOTS = 3, POLL_MS = 200 };
struct slot {
    struct batch *batch;
    struct loader_state after;      /* position behind this batch */
    int status;
    char *message;                  /* of the failure: messages belong to a thread */
    bool end;
};

struct loader {
    struct loader_options options;
    struct shard_dataset *dataset;  /* one of the two */
    const struct corpus_rows *corpus;
    struct shard_manifest manifest; /* of the dataset */
    int t_index;                    /* of options.temperature in the manifest */
    float log_count[SHARD_MAX_DRAWS + 1];
    int64_t rows, block_rows, blocks, last_rows;   /* rows of an epoch, without what is left out; last_rows: of the last block */

    /* the reader thread's */
    struct loader_state at;
    int64_t order_epoch, *order, last_place;      /* blocks of that epoch in order; where the last block, maybe shorter, stands: behind all when it is left out */
    int64_t block_epoch, block, block_begin, block_n, *permutation;   /* the block being read and its rows in order */
    struct shard_row row;

    pthread_mutex_t lock;
    pthread_cond_t changed;
    pthread_t thread;
    struct slot slots[SLOTS];
    int first, ready;               /* ring: slots[first .. first + ready) are filled */
    bool started, quit, holding;    /* holding: the consumer still uses slots[first] */
    struct loader_state told;
    double waited;
};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- order ---- */

static uint64_t stream_of(int64_t epoch, int64_t block) { return (uint64_t)epoch << 32 | (uint32_t)block; }   /* block -1: the order of blocks */

static void epoch_order(struct loader *l, int64_t epoch)
{
    if (l->order_epoch == epoch) return;
    for (int64_t i = 0; i < l->blocks; i++) l->order[i] = i;
    if (l->options.shuffle && epoch > 0) shuffle_int64(l->order, l->blocks, l->options.seed, stream_of(epoch, -1));
    int64_t places = 0, last = -1;
    for (int64_t i = 0; i < l->blocks; i++) {
        if (l->dataset && shard_dataset_left_out(l->dataset, l->order[i])) continue;
        if (l->order[i] == l->blocks - 1) last = places;
        l->order[places++] = l->order[i];
    }
    l->last_place = last < 0 ? places : last;
    l->order_epoch = epoch;
}

static int64_t rows_of_block(const struct loader *l, int64_t block) { return block == l->blocks - 1 ? l->last_rows : l->block_rows; }

/* Which block cursor `at` falls in and where that block begins in the epoch: all blocks but the last are equally long. */
static int64_t block_find(struct loader *l, struct loader_state at, int64_t *begin)
{
    epoch_order(l, at.epoch);
    int64_t last_n = rows_of_block(l, l->blocks - 1), last_begin = l->last_place * l->block_rows, place;
    if (at.cursor < last_begin) *begin = (place = at.cursor / l->block_rows) * l->block_rows;
    else if (at.cursor < last_begin + last_n) { place = l->last_place; *begin = last_begin; }
    else {
        int64_t behind = (at.cursor - last_begin - last_n) / l->block_rows;
        place = l->last_place + 1 + behind;
        *begin = last_begin + last_n + behind * l->block_rows;
    }
    return l->order[place];
}

/* ---- waiting for a shard ---- */

/* Sleeps one poll; true when the loader is being closed. */
static bool poll_sleep(struct loader *l)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += POLL_MS * 1000000L;
    if (until.tv_nsec >= 1000000000L) { until.tv_sec++; until.tv_nsec -= 1000000000L; }
    pthread_mutex_lock(&l->lock);
    int timed_out = 0;
    while (!l->quit && !timed_out) timed_out = pthread_cond_timedwait(&l->changed, &l->lock, &until);
    bool quit = l->quit;
    pthread_mutex_unlock(&l->lock);
    return quit;
}

static int shard_wait(struct loader *l, int64_t shard)
{
    int rc = OK;
    double begin = now();
    while (!shard_dataset_has(l->dataset, shard)) {
        int64_t sealed;
        TRY(shard_dataset_refresh(l->dataset, &sealed));
        if (shard_dataset_has(l->dataset, shard)) break;
        if (!l->options.follow) { rc = fail(ERR_INPUT, "shard %lld is not sealed; let teacher-dump finish or set shards.follow: true", (long long)shard); goto out; }
        if (l->options.stop && *l->options.stop) { rc = fail(ERR_STOPPED, "stopped while waiting for shard %lld", (long long)shard); goto out; }
        if (l->options.wait_s > 0 && now() - begin > l->options.wait_s) {
            rc = fail(ERR_LOST, "shard %lld did not appear within %g s; see whether teacher-dump still runs", (long long)shard, l->options.wait_s);
            goto out;
        }
        if (poll_sleep(l)) { rc = fail(ERR_STOPPED, "the loader is being closed"); goto out; }
    }
    TRY(shard_dataset_check_files(l->dataset));
out:
    return rc;
}

/* The row of the dataset or corpus at the reader's position; makes its block the current one. */
static int row_find(struct loader *l, int64_t *row)
{
    int rc = OK;
    struct loader_state at = l->at;
    if (l->block_epoch != at.epoch || at.cursor < l->block_begin || at.cursor >= l->block_begin + l->block_n) {
        int64_t begin, block = block_find(l, at, &begin);
        if (l->dataset) TRY(shard_wait(l, block));
        l->block_epoch = at.epoch;
        l->block = block;
        l->block_begin = begin;
        l->block_n = rows_of_block(l, block);
        if (l->options.shuffle) {                 /* room for a block only now: a sealed shard of that many rows exists */
            if (!l->permutation) l->permutation = xmalloc((size_t)l->block_rows * sizeof *l->permutation);
            for (int64_t i = 0; i < l->block_n; i++) l->permutation[i] = i;
            shuffle_int64(l->permutation, l->block_n, l->options.seed, stream_of(at.epoch, block));
        }
    }
    int64_t within = at.cursor - l->block_begin;
    *row = l->block * l->block_rows + (l->options.shuffle ? l->permutation[within] : within);
out:
    return rc;
}

/* ---- filling ---- */

struct rescale { float scale, shift; };       /* log p_T = scale log p_0 + shift */

static void logprobs_convert(float *to, const uint16_t *from, int64_t n, struct rescale s)
{
    f16_to_floats(to, from, n);
    if (s.scale != 1) for (int64_t e = 0; e < n; e++) to[e] = s.scale * to[e] + s.shift;
    for (int64_t e = 0; e < n; e++) to[e] = to[e] < 0 ? to[e] : 0;
}

/* Draws from a tail of log mass log r at T0: w = c (r / m) p_T / p_0. At another T than T0 all of it in the exponent: p_T / p_0 alone may overflow where r is tiny. */
static void draws_convert(const struct loader *l, float *w, float *logp, const uint16_t *from, const uint8_t *count, float log_r, bool other, struct rescale s)
{
    int64_t D = l->manifest.draws;
    logprobs_convert(logp, from, D, s);
    if (!other) {
        float share = expf(log_r) / (float)D;
        for (int64_t e = 0; e < D; e++) w[e] = (float)count[e] * share;
        return;
    }
    float log_share = log_r - l->log_count[D] + s.shift;
    for (int64_t e = 0; e < D; e++) {
        float weight = exp_fp32(l->log_count[count[e]] + log_share + (s.scale - 1) * f16_to_float(from[e]));
        w[e] = count[e] ? weight : 0;
        logp[e] = count[e] ? logp[e] : 0;
    }
}

/* Stored: log p_0 = t/T0 - lse_0, lse_i = log sum exp(t/T_i).  log p_i = t/T_i - lse_i = (T0/T_i) (log p_0 + lse_0) - lse_i.
 * Rounding may leave a hair above 0, which no log-probability is. */
static void targets_convert(const struct loader *l, struct batch *b, int64_t i, const struct shard_row *r)
{
    const struct shard_manifest *m = &l->manifest;
    int64_t L = m->row_length, K = m->k, nT = m->n_temperatures, j = l->t_index;
    double ratio = (double)m->temperatures[0] / m->temperatures[j];
    for (int64_t t = 0; t < L; t++) {
        b->lse[i * L + t] = r->lse[t * nT + j];
        b->label_logprob[i * L + t] = f16_to_float(r->label_logprob[t]);
        b->tail_logmass[i * L + t] = r->tail ? fminf(r->tail[t * nT + j], 0) : -INFINITY;
    }
    for (int64_t t = 0; t < L && K; t++) {
        int64_t at = (i * L + t) * b->k;
        struct rescale s = {(float)ratio, j ? (float)(ratio * r->lse[t * nT] - r->lse[t * nT + j]) : 0};
        memcpy(b->head_ids + at, r->head_ids + t * K, (size_t)K * sizeof *b->head_ids);
        logprobs_convert(b->head_logprob + at, r->head_logprob + t * K, K, s);
        if (!b->weight) continue;
        for (int64_t e = 0; e < K; e++) b->weight[at + e] = exp_fp32(b->head_logprob[at + e]);
    }
    for (int64_t t = 0; t < L && b->weight; t++) {
        int64_t at = (i * L + t) * b->k + K, D = m->draws;
        const uint8_t *count = r->draw_count + t * D;
        memcpy(b->head_ids + at, r->draw_ids + t * D, (size_t)D * sizeof *b->head_ids);
        float *w = b->weight + at, *logp = b->head_logprob + at;
        if (m->kind == SHARD_SAMPLED) {
            float minus_entropy = -f16_to_float(r->entropy[t]);
            for (int64_t e = 0; e < D; e++) w[e] = (float)count[e] / (float)D;
            for (int64_t e = 0; e < D; e++) logp[e] = count[e] ? minus_entropy : 0;
            continue;
        }
        draws_convert(l, w, logp, r->draw_logprob + t * D, count, r->tail[t * nT], j != 0,
                      (struct rescale){(float)ratio, j ? (float)(ratio * r->lse[t * nT] - r->lse[t * nT + j]) : 0});
    }
}

static int batch_fill(struct loader *l, struct batch *b, bool *end)
{
    int rc = OK;
    int64_t i, L = b->length, row;
    *end = false;
    for (i = 0; i < l->options.batch_rows; i++) {
        if (l->at.cursor == l->rows) {
            if (!l->options.shuffle) break;
            l->at = (struct loader_state){.epoch = l->at.epoch + 1, .cursor = 0};
        }
        TRY(row_find(l, &row));
        b->row_index[i] = row;
        if (l->dataset) {
            if (b->full_logits) l->row.logits = b->full_logits + i * L * l->manifest.valid_vocab;   /* large: read where it is wanted */
            TRY(shard_dataset_read(l->dataset, row, &l->row));
            batch_set_row(b, i, l->row.tokens, l->row.loss_mask, l->row.document);
            targets_convert(l, b, i, &l->row);
        } else {
            const struct corpus_rows *c = l->corpus;
            batch_set_row(b, i, c->tokens + row * L, c->loss_mask + row * L, c->document + row * L);
        }
        l->at.cursor++;
    }
    if (l->at.cursor == l->rows && l->options.shuffle) l->at = (struct loader_state){.epoch = l->at.epoch + 1, .cursor = 0};
    b->rows = i;
    b->full_scale = l->dataset ? l->manifest.temperatures[0] / l->manifest.temperatures[l->t_index] : 1;
    batch_finish(b);
    *end = i == 0;
out:
    return rc;
}

static void *reader(void *argument)
{
    struct loader *l = argument;
    for (bool more = true; more;) {
        pthread_mutex_lock(&l->lock);
        while (!l->quit && l->ready == SLOTS) pthread_cond_wait(&l->changed, &l->lock);
        struct slot *s = &l->slots[(l->first + l->ready) % SLOTS];
        more = !l->quit;
        pthread_mutex_unlock(&l->lock);
        if (!more) break;
        s->status = batch_fill(l, s->batch, &s->end);
        if (s->status != OK) s->message = xstrdup(fail_message());
        s->after = l->at;
        more = s->status == OK && !s->end;
        pthread_mutex_lock(&l->lock);
        l->ready++;
        pthread_cond_broadcast(&l->changed);
        pthread_mutex_unlock(&l->lock);
    }
    return NULL;
}

/* ---- interface ---- */

static struct loader *loader_new(const struct loader_options *o, int64_t rows, int64_t block_rows)
{
    struct loader *l = xcalloc(1, sizeof *l);
    pthread_condattr_t attr;
    l->options = *o;
    l->rows = rows;
    l->block_rows = block_rows;
    l->blocks = (rows + block_rows - 1) / block_rows;
    l->last_rows = rows - (l->blocks - 1) * block_rows;
    l->order = xmalloc((size_t)l->blocks * sizeof *l->order);
    l->order_epoch = l->block_epoch = -1;
    pthread_mutex_init(&l->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);   /* a clock that is set must not end or prolong a wait */
    pthread_cond_init(&l->changed, &attr);
    pthread_condattr_destroy(&attr);
    return l;
}

int loader_open_dataset(struct loader **out, struct shard_dataset *d, const struct loader_options *o)
{
    int rc = OK, t_index = 0;
    int64_t sealed, rows = 0;
    const struct shard_manifest *m = shard_dataset_manifest(d);
    struct loader *l = NULL;
    CHECK(o->batch_rows > 0 && o->batch_rows <= INT32_MAX / m->row_length, "%lld rows of %lld positions in a batch", (long long)o->batch_rows, (long long)m->row_length);
    while (t_index < m->n_temperatures && m->temperatures[t_index] != o->temperature) t_index++;
    if (t_index == m->n_temperatures) {
        char list[160] = "";
        for (int i = 0, n = 0; i < m->n_temperatures; i++) n += snprintf(list + n, sizeof list - (size_t)n, "%s%g", i ? ", " : "", m->temperatures[i]);
        rc = m->kind == SHARD_SAMPLED ? fail(ERR_MISMATCH, "temperature %g was asked for, but kind sampled serves only the one it was drawn at, %s; use that, or dump shards.kind hybrid, which serves every one listed", o->temperature, list)
                                      : fail(ERR_MISMATCH, "temperature %g was asked for, the dataset has %s; use one of these or dump again with %g in its list", o->temperature, list, o->temperature);
        goto out;
    }
    if (o->samples && m->kind == SHARD_TOPK) {
        rc = fail(ERR_MISMATCH, "samples were asked for, the dataset is of kind topk, which holds no draws from the tail; dump shards.kind hybrid");
        goto out;
    }
    TRY(shard_dataset_refresh(d, &sealed));
    TRY(shard_dataset_check_files(d));
    for (int64_t shard = 0; shard < shard_count(m); shard++) {
        if (shard_dataset_left_out(d, shard)) continue;
        rows += shard_rows(m, shard);
        if (o->follow || shard_dataset_has(d, shard)) continue;
        rc = fail(ERR_INPUT, "%lld of %lld shards are sealed; run teacher-dump again to finish the dataset, set shards.follow: true, or let train leave out what is missing with --allow-missing", (long long)sealed,
                  (long long)shard_count(m));
        goto out;
    }
    if (!rows) { rc = fail(ERR_INPUT, "no shard is there to be read; run teacher-dump, or restore them from a copy"); goto out; }
    l = loader_new(o, m->rows, m->rows_per_shard);
    l->rows = rows;
    l->dataset = d;
    l->manifest = *m;
    l->t_index = t_index;
    for (int i = 1; i <= SHARD_MAX_DRAWS; i++) l->log_count[i] = logf((float)i);
    shard_row_alloc(&l->row, m);
    free(l->row.logits);            /* batch_fill points it into the batch */
    l->row.logits = NULL;
    for (int i = 0; i < SLOTS; i++) l->slots[i].batch = batch_new(o->batch_rows, m->row_length, m, o->samples);
    *out = l;
out:
    return rc;
}

int loader_open_rows(struct loader **out, const struct corpus_rows *r, const struct loader_options *o)
{
    if (r->rows < 1) return fail(ERR_INPUT, "the corpus has no rows; give it more text or shorter rows");
    CHECK(o->batch_rows > 0 && o->batch_rows <= INT32_MAX / r->length, "%lld rows of %lld positions in a batch", (long long)o->batch_rows, (long long)r->length);
    struct loader *l = loader_new(o, r->rows, r->rows);
    l->corpus = r;
    for (int i = 0; i < SLOTS; i++) l->slots[i].batch = batch_new(o->batch_rows, r->length, NULL, false);
    *out = l;
    return OK;
}

void loader_close(struct loader *l)
{
    if (!l) return;
    if (l->started) {
        pthread_mutex_lock(&l->lock);
        l->quit = true;
        pthread_cond_broadcast(&l->changed);
        pthread_mutex_unlock(&l->lock);
        pthread_join(l->thread, NULL);
    }
    for (int i = 0; i < SLOTS; i++) {
        batch_free(l->slots[i].batch);
        free(l->slots[i].message);
    }
    l->row.logits = NULL;
    shard_row_free(&l->row);
    free(l->order);
    free(l->permutation);
    pthread_cond_destroy(&l->changed);
    pthread_mutex_destroy(&l->lock);
    free(l);
}

int loader_next(struct loader *l, struct batch **b)
{
    double begin = now();
    *b = NULL;
    if (!l->started) {
        l->at = l->told;
        int error = pthread_create(&l->thread, NULL, reader, l);
        if (error) return fail(ERR_IO, "the reader thread cannot be started: %s", strerror(error));
        l->started = true;
    }
    pthread_mutex_lock(&l->lock);
    if (l->holding) {
        l->holding = false;
        l->first = (l->first + 1) % SLOTS;
        l->ready--;
        pthread_cond_broadcast(&l->changed);
    }
    while (!l->ready) pthread_cond_wait(&l->changed, &l->lock);
    pthread_mutex_unlock(&l->lock);
    struct slot *s = &l->slots[l->first];
    l->waited += now() - begin;
    if (s->status != OK) return fail(s->status, "%s", s->message);     /* stays first: it is what every later call meets */
    if (s->end) return OK;
    l->holding = true;
    l->told = s->after;
    *b = s->batch;
    return OK;
}

int64_t loader_rows_per_epoch(const struct loader *l) { return l->rows; }
void loader_tell(const struct loader *l, struct loader_state *s) { *s = l->told; }
double loader_wait_seconds(const struct loader *l) { return l->waited; }

int loader_seek(struct loader *l, const struct loader_state *s)
{
    CHECK(!l->started, "seek after the first batch");
    bool past = s->cursor > l->rows || (l->options.shuffle && s->cursor == l->rows);
    if (s->epoch < 0 || s->epoch > INT32_MAX || s->cursor < 0 || past || (!l->options.shuffle && s->epoch))
        return fail(ERR_MISMATCH, "row %lld of epoch %lld is no position in data of %lld rows; resume with the data the run was started with", (long long)s->cursor, (long long)s->epoch, (long long)l->rows);
    l->told = *s;
    return OK;
}
