/* distill bench train: optimizer steps at the student's shape through the functions distill train runs, train_gradients() and the optimizer; the loader alone is
 * left out (distill bench io measures it). */
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "kernels/timed.h"
#include "train/bench.h"
#include "train/progress.h"
#include "train/trainer.h"

enum { WARM_STEPS = 2, PHASE_STEPS = 3 };

struct training {
    struct bench b;
    struct memory_plan *plan;
    struct model *model;
    struct objective *objective;
    struct optimizer *optimizer;
    struct batch **batch; int accum;
    int64_t step;
    double kd;                                /* per target, of the last step */
};

static int step(struct training *t)
{
    double targets = 0, kd, ce, norm;
    for (int i = 0; i < t->accum; i++) targets += (double)t->batch[i]->n_targets;
    train_gradients(t->model, t->objective, t->batch, t->accum, targets);
    optimizer_queue_norm(t->optimizer);
    objective_read(t->objective, &kd, &ce);
    norm = optimizer_read_norm(t->optimizer);
    t->kd = kd / targets;
    if (!isfinite(t->kd) || !isfinite(norm)) return fail(ERR_NUMERIC, "step %lld: loss %g, gradient norm %g", (long long)t->step + 1, t->kd, norm);
    optimizer_step(t->optimizer, ++t->step, 1e-4);
    model_weights_changed(t->model);
    return OK;
}

static int by_phase(struct training *t)
{
    int rc = OK;
    struct bench *b = &t->b;
    struct backend *timed = timed_backend(b->be, b->config->vocab_size);
    t->model->be = timed;                     /* objective and optimizer go through the model's */
    double start = now_seconds();
    for (int i = 0; i < PHASE_STEPS; i++) TRY(step(t));
    timed->ops->sync(timed);
    bench_phases(b, timed, PHASE_STEPS, now_seconds() - start);
out:
    t->model->be = b->be;
    timed_free(timed);
    return rc;
}

static void release(struct training *t)
{
    objective_free(t->objective);
    optimizer_free(t->optimizer);
    model_free(t->model);
    memory_plan_free(t->plan);
    t->objective = NULL;
    t->optimizer = NULL;
    t->model = NULL;
    t->plan = NULL;
}

int bench_train(const struct config *c, const char *shape)
{
    static const char *const recompute[] = {"none", "swiglu_norm", "ffn", "block"};
    struct training t = {0};
    struct bench *b = &t.b;
    struct distill_args loss = {.tail = TAIL_BUCKET, .temperature = 1, .kd_weight = 1};
    struct adamw_args adamw = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1, .clip = 1};
    int rc = OK, policy = 0, kind = 0;
    for (int i = 0; i < 4; i++) if (!strcmp(c->train_recompute, recompute[i])) policy = i;
    t.accum = (int)(c->train_batch_rows / c->train_micro_rows);
    TRY(bench_open(b, "train", c, shape));
    int64_t V = b->config->vocab_size, N = c->train_micro_rows * c->corpus_row_length, steps = 0;
    while (strcmp(c->shards_kind, shard_kind_name((enum shard_kind)kind))) kind++;
    bool samples = kind != SHARD_TOPK;                      /* as train reads a hybrid dataset: its head and its draws with weights */
    int64_t stored = kind == SHARD_SAMPLED ? c->shards_draws : c->shards_k + (samples ? c->shards_m : 0);
    int k = stored < V ? (int)stored : (int)V;
    struct model_options o = {.N = N, .max_doc = c->corpus_row_length, .head_rows = c->train_chunk_tokens < N ? c->train_chunk_tokens : N, .train = true, .recompute = (enum recompute)policy, .fp8 = !strcmp(c->train_matmul, "fp8"),
                              .native_first = (int)c->train_fp8_native_first, .native_last = (int)c->train_fp8_native_last};
    struct pass pass = {.train = true, .recompute = o.recompute, .step_tokens = t.accum * N, .k = k};
    if (samples) loss.tail = TAIL_UNBIASED;
    if (o.fp8) TRY(model_check_fp8(b->be, b->config, o.native_first, o.native_last, "train.matmul"));
    b->fp8 = o.fp8;
    b->fp8_blocks = b->config->n_layers - o.native_first - o.native_last;
    TRY(bench_rates(b, N));
    t.plan = memory_plan_new(b->be);
    t.model = model_new(b->be, b->config, &o, t.plan);
    t.objective = objective_new(t.model, &loss, V, samples ? TARGET_SAMPLES : TARGET_TOPK, k, t.plan);
    t.optimizer = optimizer_new(t.model, &adamw, t.plan);
    memory_add_scratch(t.plan, model_scratch_bytes(t.model, k));
    bench_memory_begin(b);
    TRY(memory_commit(t.plan, (size_t)(c->memory_limit_gib * 0x1p30)));
    model_ready(t.model);
    optimizer_ready(t.optimizer);
    model_random_weights(t.model, 3);
    optimizer_master_from_weights(t.optimizer);
    t.batch = xcalloc((size_t)t.accum, sizeof *t.batch);
    for (int i = 0; i < t.accum; i++) t.batch[i] = bench_batch(c->train_micro_rows, c->corpus_row_length, V, k, samples, (uint64_t)i);
    const char *recipe = bench_on_cpu(b) ? "fp32" : c->train_recipe;
    printf("steps   %.2fM parameters, %lld rows of %lld tokens a step in %d micro-batches, %s targets of %d ids, recipe %s, recompute %s", (double)t.model->params->parameters / 1e6,
           (long long)(t.accum * c->train_micro_rows), (long long)c->corpus_row_length, t.accum, c->shards_kind, k, recipe, c->train_recompute);
    if (o.fp8) printf(", the products of %d of %d blocks in fp8", b->fp8_blocks, b->config->n_layers);
    printf("\n");
    fflush(stdout);

    for (int i = 0; i < WARM_STEPS; i++) TRY(step(&t));
    double first = t.kd, start, seconds = 0;
    b->be->ops->sync(b->be);
    start = now_seconds();
    while (steps < c->bench_steps || seconds < c->bench_seconds) {
        TRY(step(&t));
        steps++;
        seconds = now_seconds() - start;
    }
    b->be->ops->sync(b->be);
    seconds = now_seconds() - start;
    b->how = json_pack("{s:s, s:s, s:s, s:I, s:I, s:I, s:s, s:i, s:b}", "matmul", c->train_matmul, "recipe", recipe, "recompute", c->train_recompute, "row_length", (json_int_t)c->corpus_row_length,
                       "micro_rows", (json_int_t)c->train_micro_rows, "batch_rows", (json_int_t)c->train_batch_rows, "kind", c->shards_kind, "ids", k, "deterministic", c->train_deterministic);
    printf("        %lld steps in %.1f s; KL on the same random targets %.4f -> %.4f\n", (long long)steps, seconds, first, t.kd);
    bench_memory_end(b, t.plan);
    TRY(by_phase(&t));
    release(&t);
    TRY(bench_rates(b, N));
    bench_report(b, &pass, (double)(steps * pass.step_tokens), seconds, steps);
out:
    for (int i = 0; t.batch && i < t.accum; i++) batch_free(t.batch[i]);
    free(t.batch);
    release(&t);
    bench_close(b);
    return rc;
}
