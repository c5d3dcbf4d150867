/* distill bench teacher: random rows through the pipeline that distill teacher-dump runs (dump_pipeline.h), forward, targets and shards written and synced under
 * run.dir; the directory is removed afterwards. The time ends when the last shard is sealed. */
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/rng.h"
#include "kernels/timed.h"
#include "train/bench.h"
#include "train/dump_pipeline.h"
#include "train/progress.h"

enum { WARM_PASSES = 2, PHASE_PASSES = 3 };

struct teaching {
    struct bench b;
    struct dump_pipeline *p;
    struct shard_writer *writer;              /* NULL: rows go nowhere */
    double writing;                           /* seconds of the pipeline's thread in the writer */
    uint32_t *tokens; uint8_t *mask; uint16_t *document; int64_t pool;   /* rows that are submitted in turns */
};

/* ---- the sink: the shard writer, and how long it takes ---- */

static int sink_begin(void *context, int64_t shard)
{
    struct teaching *t = context;
    return t->writer ? shard_writer_begin(t->writer, shard) : OK;
}

static int sink_put(void *context, const struct shard_row *row)
{
    struct teaching *t = context;
    double start = now_seconds();
    int rc = t->writer ? shard_writer_put(t->writer, row) : OK;
    t->writing += now_seconds() - start;
    return rc;
}

static int sink_seal(void *context)
{
    struct teaching *t = context;
    double start = now_seconds();
    int rc = t->writer ? shard_writer_seal(t->writer) : OK;
    t->writing += now_seconds() - start;
    return rc;
}

/* ---- rows ---- */

static void make_rows(struct teaching *t)
{
    int64_t L = t->p->o.row_length, V = t->b.config->vocab_size;
    t->pool = 4 * t->p->o.batch_rows;
    t->tokens = xmalloc((size_t)(t->pool * L) * sizeof *t->tokens);
    t->mask = xmalloc((size_t)(t->pool * L));
    t->document = xcalloc((size_t)(t->pool * L), sizeof *t->document);
    for (int64_t i = 0; i < t->pool * L; i++) {
        t->tokens[i] = philox4x32(29, 0, (uint64_t)i).v[0] % (uint32_t)V;
        t->mask[i] = i % L + 1 < L;
    }
}

/* Rows of shards of `per_shard`, as teacher-dump submits them, until all are sealed. */
static int run(struct teaching *t, int64_t rows, int64_t per_shard)
{
    struct dump_pipeline *p = t->p;
    int64_t L = p->o.row_length, n;
    int rc = OK, finished;
    dump_start(p, &(struct dump_sink){t, sink_begin, sink_put, sink_seal}, t->b.shape);
    for (int64_t row = 0; row < rows && rc == OK; row += n) {
        int64_t at = row % per_shard, from = row / p->o.batch_rows * p->o.batch_rows % t->pool;
        n = p->o.batch_rows < per_shard - at ? p->o.batch_rows : per_shard - at;
        rc = dump_submit(p, row / per_shard, at == 0, at + n == per_shard, row, n, t->tokens + from * L, t->mask + from * L, t->document + from * L);
    }
    finished = dump_finish(p);
    return rc == OK ? finished : rc;
}

static int by_phase(struct teaching *t)
{
    struct bench *b = &t->b;
    struct backend *timed = timed_backend(b->be, b->config->vocab_size);
    t->p->be = timed;                         /* nothing is in flight now, nor after run() */
    t->p->model->be = timed;
    double start = now_seconds();
    int rc = run(t, PHASE_PASSES * t->p->o.batch_rows, PHASE_PASSES * t->p->o.batch_rows);
    if (rc == OK) bench_phases(b, timed, PHASE_PASSES, now_seconds() - start);
    t->p->be = b->be;
    t->p->model->be = b->be;
    timed_free(timed);
    return rc;
}

static void make_manifest(const struct teaching *t, int64_t rows, int64_t per_shard, struct shard_manifest *m)
{
    const struct dump_options *o = &t->p->o;
    *m = (struct shard_manifest){.kind = o->kind, .rows = rows, .row_length = o->row_length, .rows_per_shard = per_shard, .k = o->k, .draws = o->draws, .n_temperatures = o->nT, .valid_vocab = (int32_t)o->Vv,
                                 .teacher_vocab = (int32_t)t->b.config->vocab_size, .packing = "benchmark", .teacher_name = "benchmark"};
    memcpy(m->temperatures, o->temperatures, sizeof m->temperatures);
}

static int options(const struct bench *b, struct dump_options *o)
{
    const struct config *c = b->c;
    int64_t V = b->config->vocab_size;
    *o = (struct dump_options){.nT = c->shards_temperatures.n, .Vv = V, .row_length = c->corpus_row_length, .batch_rows = c->dump_batch_rows, .chunk_tokens = c->dump_chunk_tokens,
                               .weights = !strcmp(c->teacher_weights, "resident") ? WEIGHTS_RESIDENT : !strcmp(c->teacher_weights, "streamed") ? WEIGHTS_STREAMED : WEIGHTS_AUTO,
                               .memory_limit = (size_t)(c->memory_limit_gib * 0x1p30), .fp8 = !strcmp(c->teacher_precision, "fp8"),
                               .native_first = (int)c->teacher_fp8_native_first, .native_last = (int)c->teacher_fp8_native_last};
    for (int kind = 0; kind < SHARD_KIND_COUNT; kind++) if (!strcmp(c->shards_kind, shard_kind_name((enum shard_kind)kind))) o->kind = (enum shard_kind)kind;
    if (o->nT > SHARD_MAX_TEMPERATURES) return fail(ERR_USAGE, "shards.temperatures lists %d values; 1 to %d are possible", o->nT, SHARD_MAX_TEMPERATURES);
    for (int i = 0; i < o->nT; i++) o->temperatures[i] = (float)c->shards_temperatures.item[i];
    if (shard_kind_has_head(o->kind)) o->k = c->shards_k < V ? (int)c->shards_k : (int)V;
    o->draws = o->kind == SHARD_HYBRID ? (int)c->shards_m : o->kind == SHARD_SAMPLED ? (int)c->shards_draws : 0;
    o->seed = 1;
    return OK;
}

int bench_teacher(const struct config *c, const char *shape)
{
    struct teaching t = {0};
    struct bench *b = &t.b;
    struct dump_options o;
    struct shard_manifest m;
    char *dir = NULL;
    bool made_run_dir = false;
    int rc = OK;
    TRY(bench_open(b, "teacher", c, shape));
    TRY(options(b, &o));
    if (o.fp8) TRY(model_check_fp8(b->be, b->config, o.native_first, o.native_last, "teacher.precision"));
    b->fp8 = o.fp8;
    b->fp8_blocks = b->config->n_layers - o.native_first - o.native_last;
    struct pass pass = {.k = o.k, .full = o.kind == SHARD_FULL};
    TRY(bench_rates(b, bench_teacher_positions(b)));
    t.p = dump_pipeline_new(b->be, b->config, &o);
    bench_memory_begin(b);
    TRY(dump_pipeline_ready(t.p));
    model_random_weights(t.p->model, 3);
    make_rows(&t);
    int64_t batch = t.p->o.batch_rows, L = o.row_length, per_shard = c->shards_rows_per_shard;
    printf("passes  %.2fM parameters, weights %s, %lld rows of %lld a pass, %s", (double)t.p->model->params->parameters / 1e6, t.p->o.weights == WEIGHTS_STREAMED ? "streamed" : "resident",
           (long long)batch, (long long)L, shard_kind_name(o.kind));
    if (o.k) printf(" %d", o.k);
    if (o.draws) printf(" + %d draws", o.draws);
    printf(" at %d temperature%s", o.nT, o.nT > 1 ? "s" : "");
    if (o.fp8) printf(", %d of %d blocks in fp8", b->fp8_blocks, b->config->n_layers);
    printf("\n");
    fflush(stdout);

    TRY(run(&t, WARM_PASSES * batch, WARM_PASSES * batch));
    double start = now_seconds();
    TRY(run(&t, batch, batch));
    double passes = fmax((double)c->bench_steps, ceil(c->bench_seconds / (now_seconds() - start)));
    int64_t rows = (int64_t)passes * batch;
    if (per_shard > rows) per_shard = rows;
    rows = (rows + per_shard - 1) / per_shard * per_shard;
    make_manifest(&t, rows, per_shard, &m);
    TRY(bench_dir_make(c, &dir, &made_run_dir));
    TRY(shard_writer_open(&t.writer, dir, &m));
    t.writing = 0;
    start = now_seconds();
    TRY(run(&t, rows, per_shard));
    double seconds = now_seconds() - start;
    shard_writer_close(t.writer);
    t.writer = NULL;
    printf("        %lld rows in %lld sealed shards (%.0f bytes per token) in %.1f s, in %s\n", (long long)rows, (long long)shard_count(&m), (double)shard_bytes(&m, 0) / (double)(per_shard * L), seconds, dir);
    b->how = json_pack("{s:s, s:s, s:s, s:i, s:i, s:i, s:I, s:I}", "precision", c->teacher_precision, "weights", t.p->o.weights == WEIGHTS_STREAMED ? "streamed" : "resident", "kind", shard_kind_name(o.kind),
                       "k", o.k, "draws", o.draws, "temperatures", o.nT, "row_length", (json_int_t)L, "pass_rows", (json_int_t)batch);
    printf("        the writer's thread was at work %.2f s, %.1f %% of the time, beside the device\n", t.writing, 100 * t.writing / seconds);
    bench_figure(b, "writer_busy", t.writing / seconds, "share of time");
    bench_memory_end(b, t.p->plan);
    TRY(by_phase(&t));
    dump_pipeline_free(t.p);
    t.p = NULL;
    TRY(bench_rates(b, bench_teacher_positions(b)));
    bench_report(b, &pass, (double)(rows * L), seconds, rows / batch);
out:
    shard_writer_close(t.writer);
    dump_pipeline_free(t.p);
    bench_dir_remove(c, dir, made_run_dir);
    free(t.tokens);
    free(t.mask);
    free(t.document);
    bench_close(b);
    return rc;
}
