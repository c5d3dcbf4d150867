/* distill bench: how fast this machine trains and dumps at the shapes of a configuration. Random weights, tokens and targets, so nothing has to
 * be there but the shape; the code path is the one of train and teacher-dump. The machine's own rate of matrix products is measured in the same
 * run, before and after, and every rate is reported beside it: machines differ and are shared, the ratio is what can be compared. */
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/rng.h"
#include "train/command.h"
#include "train/load.h"
#include "train/objective.h"
#include "train/optimizer.h"
#include "train/progress.h"

struct bench {
    const struct config *c;
    struct model_config *config;
    struct backend *be;
    struct memory_plan *plan;
    struct model *model;
    struct batch *batch;
    act *a, *b, *y; int64_t square;           /* y = a b^T, all square x square */
    double gemm_rate;                         /* FLOP/s, the best of what was seen: the machine's rate, not its noise */
};

/* Beyond the caches and long enough to time: 27 MB in three matrices on a CPU, 400 MB on a GPU. */
enum { SQUARE_CPU = 1536, SQUARE_GPU = 8192 };

/* Rate of the square product, for at least `seconds`. */
static void measure_gemm(struct bench *x, double seconds)
{
    const struct ops *op = x->be->ops;
    op->linear_forward(x->be, x->y, x->a, x->b, NULL, x->square, x->square, x->square);
    op->sync(x->be);
    double begin = now_seconds();
    do {
        double start = now_seconds();
        op->linear_forward(x->be, x->y, x->a, x->b, NULL, x->square, x->square, x->square);
        op->sync(x->be);
        double rate = 2.0 * (double)(x->square * x->square * x->square) / (now_seconds() - start);
        if (rate > x->gemm_rate) x->gemm_rate = rate;
    } while (now_seconds() - begin < seconds);
}

static void random_floats(float *x, int64_t n, uint64_t stream, float scale)
{
    #pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        struct philox r = philox4x32(7, stream, (uint64_t)i);
        x[i] = scale * normal_float(r.v[0], r.v[1]);
    }
}

static void fill_square(struct bench *x)
{
    int64_t count = x->square * x->square;
    float *host = xmalloc((size_t)count * sizeof *host);
    random_floats(host, count, 1, 1);
    x->be->ops->upload_act(x->be, x->a, host, count);
    random_floats(host, count, 2, 0.02f);
    x->be->ops->upload_act(x->be, x->b, host, count);
    free(host);
}

/* Rows of one document each, random tokens; with k > 0 a teacher's head of k distinct ids and its tail. */
static struct batch *random_batch(int64_t rows, int64_t length, int64_t V, int k)
{
    struct shard_manifest m = {.kind = SHARD_TOPK, .k = k, .valid_vocab = (int32_t)V, .row_length = length, .rows = rows, .n_temperatures = 1, .temperatures = {1}};
    struct batch *b = batch_new(rows, length, k ? &m : NULL, false);
    uint32_t *tokens = xmalloc((size_t)length * sizeof *tokens);
    uint8_t *mask = xmalloc((size_t)length);
    uint16_t *document = xcalloc((size_t)length, sizeof *document);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t t = 0; t < length; t++) {
            tokens[t] = philox4x32(11, (uint64_t)r, (uint64_t)t).v[0] % (uint32_t)V;
            mask[t] = t + 1 < length;
        }
        batch_set_row(b, r, tokens, mask, document);
    }
    batch_finish(b);
    for (int64_t i = 0; k && i < b->n; i++) {
        double sum = 0, stride = (double)V / k;
        for (int j = 0; j < k; j++) sum += 1.0 / (j + 1);
        for (int j = 0; j < k; j++) {
            b->head_ids[i * k + j] = (int32_t)(((int64_t)(j * stride) + philox4x32(13, 0, (uint64_t)i).v[0]) % V);
            b->head_logprob[i * k + j] = (float)log(0.95 / (j + 1) / sum);
        }
        b->tail_logmass[i] = logf(0.05f);
    }
    free(tokens);
    free(mask);
    free(document);
    return b;
}

static void report(const struct bench *x, const char *what, double tokens, double seconds, double flops_per_token)
{
    double rate = tokens / seconds, achieved = rate * flops_per_token;
    printf("%-6s %10.0f tok/s   %8.2f GFLOP/s   %5.1f %% of the machine's product rate (%.1f GFLOP/s)\n", what, rate, achieved / 1e9, 100 * achieved / x->gemm_rate, x->gemm_rate / 1e9);
    printf("{\"bench\": \"%s\", \"device\": \"%s\", \"tokens_per_second\": %.1f, \"flop_per_token\": %.6g, \"flop_per_second\": %.6g, \"gemm_flop_per_second\": %.6g, \"share_of_gemm\": %.4f}\n",
           what, x->be->name, rate, flops_per_token, achieved, x->gemm_rate, achieved / x->gemm_rate);
}

static int open_common(struct bench *x, const char *shape)
{
    int rc = OK;
    struct backend_options device = {.device = x->c->run_device, .threads = (int)x->c->run_threads};
    TRY(model_config_read(&x->config, shape));
    TRY(backend_open(&x->be, &device));
    x->plan = memory_plan_new(x->be);
    x->square = strcmp(x->be->name, "cpu") ? SQUARE_GPU : SQUARE_CPU;
    size_t square = (size_t)(x->square * x->square) * dtype_width(x->be->act_dtype);
    memory_add(x->plan, "square product", "nothing", &x->a, square);
    memory_add(x->plan, "square product", "nothing", &x->b, square);
    memory_add(x->plan, "square product", "nothing", &x->y, square);
out:
    return rc;
}

static int ready(struct bench *x, int k)
{
    memory_add_scratch(x->plan, model_scratch_bytes(x->model, k));
    int rc = memory_commit(x->plan, (size_t)(x->c->memory_limit_gib * 0x1p30));
    if (rc != OK) return rc;
    model_ready(x->model);
    params_init(x->model->params, x->be, x->model->weights, 3);
    fill_square(x);
    memory_print(x->plan, stdout);
    return OK;
}

static void close_common(struct bench *x)
{
    batch_free(x->batch);
    model_free(x->model);
    memory_plan_free(x->plan);
    backend_close(x->be);
    model_config_free(x->config);
}

/* Has it run for the seconds and steps asked for? */
static bool enough(const struct config *c, int64_t steps, double seconds) { return steps >= c->bench_steps && seconds >= c->bench_seconds; }

static int bench_train(const struct config *c, const char *shape)
{
    static const char *const recompute[] = {"none", "swiglu_norm", "ffn", "block"};
    struct bench x = {.c = c};
    struct objective *objective = NULL;
    struct optimizer *optimizer = NULL;
    int rc = OK, policy = 0;
    for (int i = 0; i < 4; i++) if (!strcmp(c->train_recompute, recompute[i])) policy = i;
    TRY(open_common(&x, shape));
    int64_t V = x.config->vocab_size, N = c->train_micro_rows * c->corpus_row_length, accum = c->train_batch_rows / c->train_micro_rows;
    int k = c->shards_k < V ? (int)c->shards_k : (int)V;
    struct model_options o = {.N = N, .max_doc = c->corpus_row_length, .head_rows = c->train_chunk_tokens < N ? c->train_chunk_tokens : N, .train = true, .recompute = (enum recompute)policy};
    struct distill_args loss = {.temperature = 1, .kd_weight = 1};
    struct adamw_args adamw = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1, .clip = 1};
    x.model = model_new(x.be, x.config, &o, x.plan);
    objective = objective_new(x.model, &loss, V, TARGET_TOPK, k, x.plan);
    optimizer = optimizer_new(x.model, &adamw, x.plan);
    TRY(ready(&x, k));
    optimizer_ready(optimizer);
    x.batch = random_batch(c->train_micro_rows, c->corpus_row_length, V, k);
    printf("train  %s, %.2fM parameters, %lld x %lld tokens a step in %lld micro-batches, top %d targets\n", architecture_name(x.config->arch), (double)x.model->params->parameters / 1e6,
           (long long)(accum * c->train_micro_rows), (long long)c->corpus_row_length, (long long)accum, k);

    int64_t steps = 0;
    double start = 0, seconds = 0;
    measure_gemm(&x, 1);
    for (int64_t step = 1; !enough(c, steps, seconds); step++) {
        if (step == 3) start = now_seconds();                  /* two steps warm up */
        x.be->ops->fill_zero(x.be, x.model->grads, (size_t)x.model->params->total * dtype_width(x.be->grad_dtype));
        objective_reset(objective);
        for (int64_t i = 0; i < accum; i++) {
            model_set_batch(x.model, x.batch);
            model_forward(x.model);
            objective_run(objective, x.batch, (double)(accum * x.batch->n_targets), true);
            model_backward(x.model);
        }
        optimizer_norm(optimizer);
        optimizer_step(optimizer, step, 1e-4);
        x.be->ops->sync(x.be);
        if (step >= 3) { steps++; seconds = now_seconds() - start; }
    }
    measure_gemm(&x, 1);
    report(&x, "train", (double)(steps * accum * N), seconds, 3 * model_config_forward_flops(x.config, c->corpus_row_length));
out:
    objective_free(objective);
    optimizer_free(optimizer);
    close_common(&x);
    return rc;
}

static int bench_dump(const struct config *c, const char *shape)
{
    struct bench x = {.c = c};
    int rc = OK;
    TRY(open_common(&x, shape));
    int64_t V = x.config->vocab_size, N = c->dump_batch_rows * c->corpus_row_length, chunk = c->dump_chunk_tokens < N ? c->dump_chunk_tokens : N;
    int k = c->shards_k < V ? (int)c->shards_k : (int)V;
    float T = 1;
    struct model_options o = {.N = N, .max_doc = c->corpus_row_length, .head_rows = chunk};
    x.model = model_new(x.be, x.config, &o, x.plan);
    struct teacher_targets out = {.nT = 1, .temperatures = &T, .K = k};
    size_t r = (size_t)chunk;
    memory_add(x.plan, "targets of a chunk", "dump.chunk_tokens", &out.head_ids, r * (size_t)k * 4);
    memory_add(x.plan, "targets of a chunk", "dump.chunk_tokens", &out.head_logprob, r * (size_t)k * 4);
    memory_add(x.plan, "targets of a chunk", "dump.chunk_tokens", &out.lse, r * 4);
    memory_add(x.plan, "targets of a chunk", "dump.chunk_tokens", &out.tail_logmass, r * 4);
    memory_add(x.plan, "targets of a chunk", "dump.chunk_tokens", &out.entropy, r * 4);
    TRY(ready(&x, k));
    x.batch = random_batch(c->dump_batch_rows, c->corpus_row_length, V, 0);
    printf("dump   %s, %.2fM parameters, %lld rows of %lld a pass, top %d; writing is not included (distill bench measures arithmetic)\n", architecture_name(x.config->arch),
           (double)x.model->params->parameters / 1e6, (long long)c->dump_batch_rows, (long long)c->corpus_row_length, k);

    int64_t passes = 0;
    double start = 0, seconds = 0;
    measure_gemm(&x, 1);
    for (int64_t pass = 1; !enough(c, passes, seconds); pass++) {
        if (pass == 3) start = now_seconds();
        model_set_batch(x.model, x.batch);
        model_forward(x.model);
        for (int64_t first = 0; first < N; first += chunk) {
            int64_t rows = N - first < chunk ? N - first : chunk;
            model_logits(x.model, first, rows);
            x.be->ops->teacher_targets(x.be, &out, x.model->logits, x.model->labels + first, rows, V, V);
        }
        x.be->ops->sync(x.be);
        if (pass >= 3) { passes++; seconds = now_seconds() - start; }
    }
    measure_gemm(&x, 1);
    report(&x, "dump", (double)(passes * N), seconds, model_config_forward_flops(x.config, c->corpus_row_length));
out:
    close_common(&x);
    return rc;
}

int command_bench(int argc, char **argv)
{
    struct config *c = NULL;
    int help, rc = OK;
    TRY(command_config(argc, argv, CMD_BENCH, "Measures training of the student's shape and dumping of the teacher's with random weights, beside the machine's own rate of matrix products.\n"
                       "Formula: train = 3 x forward; forward = 2 x (weights in products) + causal attention at half the square, per token.",
                       "distill bench configs/bench/cpu-30m.yaml", NULL, NULL, NULL, &c, &help));
    if (help) goto out;
    const char *student = *c->student_config ? c->student_config : c->student_path, *teacher = *c->teacher_path ? c->teacher_path : student;
    if (!*student && !*teacher) { rc = fail(ERR_USAGE, "set student.config (or student.path, teacher.path): a config.json gives the shape to measure"); goto out; }
    if (c->train_batch_rows % c->train_micro_rows) { rc = fail(ERR_USAGE, "train.batch_rows is not a multiple of train.micro_rows"); goto out; }
    if (*student) TRY(bench_train(c, student));
    TRY(bench_dump(c, teacher));
out:
    config_free(c);
    return rc;
}
