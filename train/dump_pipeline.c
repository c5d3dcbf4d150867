/* See dump_pipeline.h. What leaves the device per position is one list of fields: a chunk's worth of device memory, and per batch in flight the
 * whole batch's worth of pinned host memory. */
#include "train/dump_pipeline.h"

#include <math.h>
#include <pthread.h>
#include <string.h>

#include "base/error.h"
#include "base/half.h"
#include "data/loader.h"

enum { IN_FLIGHT = 2, MAX_FIELDS = 12 };

struct field { void **device; void **host[IN_FLIGHT]; size_t bytes; };       /* bytes per position */

/* What the host gets of a batch, [N, ...] each. */
struct answer { int32_t *head_ids, *draw_ids; uint8_t *draw_count; float *head_logprob, *draw_logprob, *lse, *tail, *entropy, *label_logprob, *padding_mass; uint16_t *full; };

struct job { int64_t shard, first_row, rows; bool begins, ends; };

struct dump_run {
    struct teacher_targets out;                /* device, one chunk */
    struct sample_targets sample;              /* the same, for kinds that draw */
    struct answer answer[IN_FLIGHT];           /* pinned */
    struct field field[MAX_FIELDS]; int n_fields;
    struct batch *batch;
    /* what shard rows are made of: one batch, the thread's own */
    uint32_t *tokens[IN_FLIGHT]; uint8_t *loss_mask[IN_FLIGHT]; uint16_t *document[IN_FLIGHT];
    uint16_t *head_logprob, *draw_logprob, *entropy, *label_logprob;

    pthread_t thread; bool started;
    pthread_mutex_t lock, sink_lock;
    pthread_cond_t changed;
    struct job job[IN_FLIGHT];
    int64_t submitted, taken;                  /* batches; batch i lies in place i mod IN_FLIGHT */
    bool stop;
    int rc; char *message;                     /* of the first failure */
    struct dump_sink sink; const char *where;
    struct dump_stats stats;
};

/* ---- planning ---- */

/* Positions of a pass. Streamed weights hide behind the arithmetic of some 14,000 positions at 55 GB/s and 31,000 at 25 GB/s (twice for safety, where they fit);
 * resident ones gain nothing past what fills the device. MLP buffers are the widest, so that the MLP goes through in pieces. */
enum { STREAMED_POSITIONS = 65536, RESIDENT_POSITIONS = 16384, FFN_POSITIONS = 8192, CPU_POSITIONS = 2048 };

static void add_field(struct dump_pipeline *p, void **device, size_t offset_in_answer, size_t per_position)
{
    struct dump_run *r = p->run;
    CHECK(r->n_fields < MAX_FIELDS, "more than %d fields of targets", MAX_FIELDS);
    struct field *f = &r->field[r->n_fields++];
    *f = (struct field){.device = device, .bytes = per_position};
    memory_add_slot(p->plan, "targets of a chunk", "dump.chunk_tokens", device, (size_t)p->model->o.head_rows * per_position);
    for (int i = 0; i < IN_FLIGHT; i++) {
        f->host[i] = (void **)(void *)((char *)&r->answer[i] + offset_in_answer);
        memory_add_host_slot(p->plan, "targets of two batches", "dump.batch_rows", f->host[i], (size_t)p->model->o.N * per_position);
    }
}
#define ADD(source, member, per_position) add_field(p, (void **)(void *)&p->run->source, offsetof(struct answer, member), per_position)

static void plan(struct dump_pipeline *p, const struct model_config *c, int64_t batch_rows, bool streamed)
{
    const struct dump_options *o = &p->o;
    int64_t N = batch_rows * o->row_length;
    struct model_options m = {.N = N, .max_doc = o->row_length, .head_rows = o->chunk_tokens < N ? o->chunk_tokens : N, .ffn_rows = N < FFN_POSITIONS ? N : FFN_POSITIONS,
                              .layer_slots = streamed ? 2 : 0, .blocks_key = o->fp8 ? NULL : "the model (teacher.precision: fp8 halves its blocks)", .fp8 = o->fp8, .native_first = o->native_first, .native_last = o->native_last};
    size_t nT = (size_t)o->nT;
    p->run = xcalloc(1, sizeof *p->run);
    p->plan = memory_plan_new(p->be);
    p->model = model_new(p->be, c, &m, p->plan);
    p->run->out = (struct teacher_targets){.nT = o->nT, .temperatures = p->o.temperatures, .K = o->k};
    if (o->kind == SHARD_FULL) ADD(out.full, full, (size_t)o->Vv * sizeof(uint16_t));
    if (o->k) {
        ADD(out.head_ids, head_ids, (size_t)o->k * sizeof(int32_t));
        ADD(out.head_logprob, head_logprob, (size_t)o->k * sizeof(float));
        ADD(out.tail_logmass, tail, nT * sizeof(float));
    }
    p->run->sample = (struct sample_targets){.draws = o->draws, .K = o->k, .nT = o->nT, .temperature = o->temperatures[0], .seed = o->seed, .row_length = o->row_length};
    if (o->draws) {
        ADD(sample.ids, draw_ids, (size_t)o->draws * sizeof(int32_t));
        ADD(sample.count, draw_count, (size_t)o->draws);
    }
    if (o->kind == SHARD_HYBRID) ADD(sample.logprob, draw_logprob, (size_t)o->draws * sizeof(float));
    ADD(out.lse, lse, nT * sizeof(float));
    ADD(out.entropy, entropy, sizeof(float));
    ADD(out.label_logprob, label_logprob, sizeof(float));
    ADD(out.padding_mass, padding_mass, sizeof(float));
    if (o->measure) dump_error_plan(&p->error_room, p->model, p->plan);
    memory_add_scratch(p->plan, model_scratch_bytes(p->model, o->k));
    p->o.batch_rows = batch_rows;
    p->o.weights = streamed ? WEIGHTS_STREAMED : WEIGHTS_RESIDENT;
}

static void unplan(struct dump_pipeline *p)
{
    model_free(p->model);
    memory_plan_free(p->plan);
    free(p->run);
    p->model = NULL;
    p->plan = NULL;
    p->run = NULL;
}

static bool fits(const struct dump_pipeline *p) { return memory_fits(p->plan, p->o.memory_limit); }

/* The most rows up to `positions` that fit, by halves; false: not even one, which is what is planned then. */
static bool plan_largest(struct dump_pipeline *p, const struct model_config *c, int64_t positions, bool streamed)
{
    for (int64_t rows = positions / p->o.row_length > 1 ? positions / p->o.row_length : 1;; rows /= 2) {
        plan(p, c, rows, streamed);
        if (fits(p)) return true;
        if (rows == 1) return false;
        unplan(p);
    }
}

struct dump_pipeline *dump_pipeline_new(struct backend *be, const struct model_config *c, const struct dump_options *o)
{
    struct dump_pipeline *p = xcalloc(1, sizeof *p);
    p->o = *o;
    p->be = be;
    bool cpu = !strcmp(be->name, "cpu");
    if (o->batch_rows) {
        plan(p, c, o->batch_rows, o->weights == WEIGHTS_STREAMED);
        if (o->weights != WEIGHTS_AUTO || cpu || fits(p)) return p;
        unplan(p);
        plan(p, c, o->batch_rows, true);
        return p;
    }
    if (o->weights != WEIGHTS_STREAMED) {
        if (plan_largest(p, c, cpu ? CPU_POSITIONS : RESIDENT_POSITIONS, false) || o->weights == WEIGHTS_RESIDENT || cpu) return p;
        unplan(p);
    }
    plan_largest(p, c, cpu ? CPU_POSITIONS : STREAMED_POSITIONS, true);       /* what is still too large is refused by name when the memory is taken */
    return p;
}

/* ---- the thread ---- */

static void *take_batches(void *p_);

int dump_pipeline_ready(struct dump_pipeline *p)
{
    struct dump_run *r = p->run;
    int rc = OK;
    TRY(memory_commit(p->plan, p->o.memory_limit));
    model_ready(p->model);
    size_t N = (size_t)p->model->o.N, k = (size_t)p->o.k, draws = (size_t)p->o.draws;
    r->batch = batch_new(p->o.batch_rows, p->o.row_length, NULL, false);
    for (int i = 0; i < IN_FLIGHT; i++) {
        r->tokens[i] = xmalloc(N * sizeof *r->tokens[i]);
        r->loss_mask[i] = xmalloc(N);
        r->document[i] = xmalloc(N * sizeof *r->document[i]);
    }
    r->head_logprob = xmalloc((N * k + 1) * sizeof *r->head_logprob);
    r->draw_logprob = xmalloc((N * draws + 1) * sizeof *r->draw_logprob);
    r->entropy = xmalloc(N * sizeof *r->entropy);
    r->label_logprob = xmalloc(N * sizeof *r->label_logprob);
    pthread_mutex_init(&r->lock, NULL);
    pthread_mutex_init(&r->sink_lock, NULL);
    pthread_cond_init(&r->changed, NULL);
    if (pthread_create(&r->thread, NULL, take_batches, p)) rc = fail(ERR_IO, "no thread for the shard writer");
    else r->started = true;
out:
    return rc;
}

void dump_pipeline_free(struct dump_pipeline *p)
{
    if (!p) return;
    struct dump_run *r = p->run;
    if (r->started) {
        pthread_mutex_lock(&r->lock);
        r->stop = true;
        pthread_cond_broadcast(&r->changed);
        pthread_mutex_unlock(&r->lock);
        pthread_join(r->thread, NULL);
        pthread_mutex_destroy(&r->lock);
        pthread_mutex_destroy(&r->sink_lock);
        pthread_cond_destroy(&r->changed);
    }
    batch_free(r->batch);
    for (int i = 0; i < IN_FLIGHT; i++) { free(r->tokens[i]); free(r->loss_mask[i]); free(r->document[i]); }
    free(r->head_logprob);
    free(r->draw_logprob);
    free(r->entropy);
    free(r->label_logprob);
    free(r->message);
    p->be->ops->sync(p->be);                    /* nothing may still be on its way into what is freed now */
    unplan(p);
    free(p);
}

static void to_half(uint16_t *to, const float *from, size_t n) { for (size_t i = 0; i < n; i++) to[i] = f16_from_float(from[i]); }

/* ---- positions without finite targets ---- */

enum { FEW_ROWS = 64, MOST_MESSAGES = 8 };   /* rows after which a teacher that gives nothing is told from a row that it stumbles over */
static const float F16_MOST = 65504;

/* Can everything the teacher says at position i be stored, in f16 where that is its type? */
static bool storable(const struct dump_pipeline *p, const struct answer *a, size_t i)
{
    size_t k = (size_t)p->o.k, nT = (size_t)p->o.nT, draws = (size_t)p->o.draws, Vv = (size_t)p->o.Vv;
    bool good = isfinite(a->entropy[i]) && a->label_logprob[i] >= -F16_MOST;
    for (size_t j = 0; j < nT; j++) good &= isfinite(a->lse[i * nT + j]) && !(k && isnan(a->tail[i * nT + j]));
    for (size_t j = 0; j < k; j++) good &= a->head_logprob[i * k + j] >= -F16_MOST;
    for (size_t j = 0; j < draws && a->draw_logprob; j++) good &= a->draw_logprob[i * draws + j] >= -F16_MOST;
    for (size_t j = 0; j < Vv && a->full; j++) good &= (a->full[i * Vv + j] & 0x7fff) < 0x7c00;
    return good;
}

static void blank(const struct dump_pipeline *p, const struct answer *a, size_t i)
{
    size_t k = (size_t)p->o.k, nT = (size_t)p->o.nT, draws = (size_t)p->o.draws, Vv = (size_t)p->o.Vv;
    a->entropy[i] = a->label_logprob[i] = a->padding_mass[i] = 0;
    memset(a->lse + i * nT, 0, nT * sizeof *a->lse);
    if (k) {
        memset(a->tail + i * nT, 0, nT * sizeof *a->tail);
        memset(a->head_ids + i * k, 0, k * sizeof *a->head_ids);
        memset(a->head_logprob + i * k, 0, k * sizeof *a->head_logprob);
    }
    if (draws) {
        memset(a->draw_ids + i * draws, 0, draws * sizeof *a->draw_ids);
        memset(a->draw_count + i * draws, 0, draws);
    }
    if (a->draw_logprob) memset(a->draw_logprob + i * draws, 0, draws * sizeof *a->draw_logprob);
    if (a->full) memset(a->full + i * Vv, 0, Vv * sizeof *a->full);
}

/* With quarantine: what cannot be stored becomes zeros that nobody learns, row by row; *s counts. */
static int set_aside(struct dump_pipeline *p, const struct job *j, int place, struct dump_stats *s)
{
    struct dump_run *r = p->run;
    const struct answer *a = &r->answer[place];
    int64_t L = p->o.row_length;
    for (int64_t row = 0; row < j->rows; row++) {
        int64_t before = s->aside, first = -1;
        for (int64_t i = row * L; i < (row + 1) * L; i++) {
            if (storable(p, a, (size_t)i)) continue;
            blank(p, a, (size_t)i);
            s->targets_aside += r->loss_mask[place][i];
            r->loss_mask[place][i] = 0;
            s->aside++;
            if (first < 0) first = i % L;
        }
        if (first < 0) continue;
        s->rows_aside++;
        if (s->rows_aside <= MOST_MESSAGES)
            warn("row %lld: the teacher's logits are not finite at %lld of %lld positions, the first is %lld: set aside, not learnt%s", (long long)(j->first_row + row), (long long)(s->aside - before),
                 (long long)L, (long long)first, s->rows_aside == MOST_MESSAGES ? "; further rows are counted at the end" : "");
    }
    if (s->rows + j->rows >= FEW_ROWS && 2 * s->aside > (s->rows + j->rows) * L)
        return fail(ERR_NUMERIC, "row %lld: the teacher's logits were not finite at %lld of %lld positions so far: it is the teacher, not some rows; check the model with distill inspect %s",
                    (long long)j->first_row, (long long)s->aside, (long long)((s->rows + j->rows) * L), r->where);
    return OK;
}

static int hand_on(struct dump_pipeline *p, const struct job *j, int place)
{
    struct dump_run *r = p->run;
    const struct answer *a = &r->answer[place];
    int64_t L = p->o.row_length, n = j->rows * L;
    size_t k = (size_t)p->o.k, nT = (size_t)p->o.nT, draws = (size_t)p->o.draws;
    struct dump_stats s = dump_stats(p);       /* this thread alone changes them */
    int rc = OK;
    if (p->o.quarantine) {
        rc = set_aside(p, j, place, &s);
        if (rc != OK) return rc;
    }
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(a->lse[(size_t)i * nT]))
            return fail(ERR_NUMERIC, "row %lld, position %lld: the teacher's logits are not finite; check the model with distill inspect %s, or let such positions be set aside with --quarantine",
                        (long long)(j->first_row + i / L), (long long)(i % L), r->where);
        if (k) s.kept_mass += -expm1((double)a->tail[(size_t)i * nT]);
        s.padding_mass += (double)a->padding_mass[i];
    }
    if (k) to_half(r->head_logprob, a->head_logprob, (size_t)n * k);
    if (a->draw_logprob) to_half(r->draw_logprob, a->draw_logprob, (size_t)n * draws);
    for (size_t i = 0; i < (size_t)n * draws; i++) s.drawn += a->draw_count[i] != 0;
    to_half(r->entropy, a->entropy, (size_t)n);
    to_half(r->label_logprob, a->label_logprob, (size_t)n);
    pthread_mutex_lock(&r->sink_lock);
    if (j->begins) TRY(r->sink.begin(r->sink.context, j->shard));
    for (int64_t at = 0; at < n; at += L) {
        struct shard_row row = {.tokens = r->tokens[place] + at, .loss_mask = r->loss_mask[place] + at, .document = r->document[place] + at, .lse = a->lse + (size_t)at * nT,
                                .entropy = r->entropy + at, .label_logprob = r->label_logprob + at};
        if (k) {
            row.tail = a->tail + (size_t)at * nT;
            row.head_ids = (uint32_t *)a->head_ids + (size_t)at * k;
            row.head_logprob = r->head_logprob + (size_t)at * k;
        }
        if (draws) {
            row.draw_ids = (uint32_t *)a->draw_ids + (size_t)at * draws;
            row.draw_count = a->draw_count + (size_t)at * draws;
        }
        if (a->draw_logprob) row.draw_logprob = r->draw_logprob + (size_t)at * draws;
        if (a->full) row.logits = a->full + at * p->o.Vv;
        TRY(r->sink.put(r->sink.context, &row));
    }
    if (j->ends) TRY(r->sink.seal(r->sink.context));
out:
    pthread_mutex_unlock(&r->sink_lock);
    if (rc != OK) return rc;
    s.rows += j->rows;
    s.positions += n;
    pthread_mutex_lock(&r->lock);
    r->stats = s;
    pthread_mutex_unlock(&r->lock);
    return OK;
}

static void *take_batches(void *p_)
{
    struct dump_pipeline *p = p_;
    struct dump_run *r = p->run;
    pthread_mutex_lock(&r->lock);
    for (;;) {
        while (!r->stop && r->taken == r->submitted) pthread_cond_wait(&r->changed, &r->lock);
        if (r->taken == r->submitted) break;
        int place = (int)(r->taken % IN_FLIGHT), rc = r->rc;
        struct job j = r->job[place];
        pthread_mutex_unlock(&r->lock);
        p->be->ops->wait_mark(p->be, place);
        if (rc == OK) rc = hand_on(p, &j, place);        /* after a failure what is in flight is dropped */
        pthread_mutex_lock(&r->lock);
        if (rc != OK && r->rc == OK) {
            r->rc = rc;
            r->message = xstrdup(fail_message());
        }
        r->taken++;
        pthread_cond_broadcast(&r->changed);
    }
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

/* ---- the calling side ---- */

void dump_start(struct dump_pipeline *p, const struct dump_sink *sink, const char *where)
{
    struct dump_run *r = p->run;
    CHECK(r->taken == r->submitted && r->rc == OK, "a dump begins when the one before is finished");
    r->sink = *sink;
    r->where = where;
}

/* Waits until at most `most` batches are in flight. Holds the lock when it returns. */
static int wait_for(struct dump_run *r, int64_t most)
{
    pthread_mutex_lock(&r->lock);
    while (r->submitted - r->taken > most) pthread_cond_wait(&r->changed, &r->lock);
    return r->rc == OK ? OK : fail(r->rc, "%s", r->message);
}

/* What the teacher predicts at every position that has a next token in its document, learnt or not. */
static void set_next_tokens(struct batch *b)
{
    for (int64_t doc = 0; doc < b->n_docs; doc++)
        for (int64_t i = b->doc_begin[doc]; i < b->doc_begin[doc + 1]; i++) b->labels[i] = i + 1 < b->doc_begin[doc + 1] ? b->tokens[i + 1] : -1;
}

/* Of the chunk's rows, whose first position counts from the beginning of the dataset. A second read of the logits: a thousandth of what making them cost. */
static void draw(struct dump_pipeline *p, int64_t first, int64_t rows)
{
    struct sample_targets s = p->run->sample;
    s.first = first;
    s.head_ids = p->run->out.head_ids;
    s.lse = p->run->out.lse;
    p->be->ops->sample_targets(p->be, &s, p->model->logits, rows, p->model->c->vocab_size, p->o.Vv);
}

static void compute(struct dump_pipeline *p, int place, int64_t first_row)
{
    struct dump_run *r = p->run;
    struct backend *be = p->be;
    struct model *m = p->model;
    model_set_batch(m, r->batch);
    model_forward(m);
    for (int64_t first = 0; first < m->n; first += m->o.head_rows) {
        int64_t rows = m->n - first < m->o.head_rows ? m->n - first : m->o.head_rows;
        model_logits(m, first, rows);
        be->ops->teacher_targets(be, &r->out, m->logits, m->labels + first, rows, m->c->vocab_size, p->o.Vv);
        if (p->o.draws) draw(p, first_row * p->o.row_length + first, rows);
        for (int f = 0; f < r->n_fields; f++) {
            const struct field *x = &r->field[f];
            be->ops->download_async(be, (char *)*x->host[place] + (size_t)first * x->bytes, *x->device, (size_t)rows * x->bytes);
        }
    }
    be->ops->mark(be, place);
}

int dump_submit(struct dump_pipeline *p, int64_t shard, bool begins, bool ends, int64_t first_row, int64_t n, const uint32_t *tokens, const uint8_t *loss_mask, const uint16_t *document)
{
    struct dump_run *r = p->run;
    struct batch *b = r->batch;
    int64_t L = p->o.row_length;
    CHECK(n > 0 && n <= p->o.batch_rows, "%lld rows for a pass of %lld", (long long)n, (long long)p->o.batch_rows);
    int rc = wait_for(r, IN_FLIGHT - 1), place = (int)(r->submitted % IN_FLIGHT);
    pthread_mutex_unlock(&r->lock);
    if (rc != OK) return rc;
    b->rows = n;
    b->n = n * L;
    for (int64_t i = 0; i < n; i++) batch_set_row(b, i, tokens + i * L, loss_mask + i * L, document + i * L);
    batch_finish(b);
    set_next_tokens(b);
    memcpy(r->tokens[place], tokens, (size_t)(n * L) * sizeof *tokens);
    memcpy(r->loss_mask[place], loss_mask, (size_t)(n * L));
    memcpy(r->document[place], document, (size_t)(n * L) * sizeof *document);
    compute(p, place, first_row);
    pthread_mutex_lock(&r->lock);
    r->job[place] = (struct job){.shard = shard, .first_row = first_row, .rows = n, .begins = begins, .ends = ends};
    r->submitted++;
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->lock);
    return OK;
}

int dump_finish(struct dump_pipeline *p)
{
    int rc = wait_for(p->run, 0);
    pthread_mutex_unlock(&p->run->lock);
    return rc;
}

struct dump_stats dump_stats(struct dump_pipeline *p)
{
    pthread_mutex_lock(&p->run->lock);
    struct dump_stats s = p->run->stats;
    pthread_mutex_unlock(&p->run->lock);
    return s;
}

void dump_lock(struct dump_pipeline *p) { pthread_mutex_lock(&p->run->sink_lock); }
void dump_unlock(struct dump_pipeline *p) { pthread_mutex_unlock(&p->run->sink_lock); }
