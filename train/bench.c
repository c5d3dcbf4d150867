/* distill bench: how fast this machine trains, dumps, computes and reads and writes at the shapes of a configuration. See bench.h. */
#include "train/bench.h"

#include <ctype.h>
#include <jansson.h>
#include <math.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "base/rng.h"
#include "kernels/timed.h"
#include "train/command.h"
#include "train/objective.h"
#include "train/progress.h"

bool bench_on_cpu(const struct bench *b) { return !strcmp(b->be->name, "cpu"); }

bool bench_wanted(const char *name, int n_words, char **words)
{
    for (int i = 0; i < n_words; i++) if (strstr(name, words[i])) return true;
    return !n_words;
}

const char *bench_quantity(double value, const char *unit)
{
    static char text[8][32];
    static int next;
    static const char prefix[] = " kMGTP";
    int p = 0;
    while (value >= 999.5 && prefix[p + 1]) { value /= 1000; p++; }
    char *out = text[next = (next + 1) % 8];
    snprintf(out, sizeof text[0], "%.*f %.*s%s", value < 9.995 ? 2 : value < 99.95 ? 1 : 0, value, p > 0, &prefix[p], unit);
    return out;
}

void bench_figure(const struct bench *b, const char *figure, double value, const char *unit) { bench_figure_more(b, figure, value, unit, NULL, 0, NULL, 0); }

void bench_figure_more(const struct bench *b, const char *figure, double value, const char *unit, const char *key2, double value2, const char *key3, double value3)
{
    json_t *line = json_pack("{s:s, s:s, s:i, s:s, s:s, s:f, s:s}", "bench", b->part, "shape", b->shape, "layers", b->config->n_layers, "device",
                             b->be->description ? b->be->description : b->be->name, "figure", figure, "value", isfinite(value) ? value : -1.0, "unit", unit);
    CHECK(line, "a figure that is no JSON: %s", figure);
    if (b->how) json_object_update(line, b->how);
    if (key2) json_object_set_new(line, key2, json_real(value2));
    if (key3) json_object_set_new(line, key3, json_real(value3));
    char *text = json_dumps(line, JSON_COMPACT | JSON_REAL_PRECISION(6));
    printf("%s\n", text);
    fflush(stdout);
    free(text);
    json_decref(line);
}

/* A line of a table as a figure: its name behind `prefix`, in letters, digits and underscores */
static void table_figure(const struct bench *b, const char *prefix, const char *name, double value, const char *unit, const char *key2, double value2)
{
    char figure[96];
    int n = 0;
    snprintf(figure, sizeof figure, "%s%s", prefix, name);
    for (const char *c = figure; *c; c++) {                 /* what is neither, once for a run of them */
        char kept = isalnum((unsigned char)*c) ? *c : '_';
        if (kept != '_' || !n || figure[n - 1] != '_') figure[n++] = kept;
    }
    figure[n] = 0;
    bench_figure_more(b, figure, value, unit, key2, value2, NULL, 0);
}

/* ---- a shape on a device ---- */

int bench_open(struct bench *b, const char *part, const struct config *c, const char *shape)
{
    int rc = OK;
    struct backend_options device = {.device = c->run_device, .threads = (int)c->run_threads, .deterministic = c->train_deterministic, .exact_rows = !strcmp(part, "teacher"), .recipe = c->train_recipe};
    *b = (struct bench){.c = c, .part = part, .shape = shape};
    TRY(model_config_read(&b->config, shape));
    b->all_layers = b->config->n_layers;
    if (c->bench_layers > b->all_layers) { rc = fail(ERR_USAGE, "bench.layers is %lld, %s has %d", (long long)c->bench_layers, shape, b->all_layers); goto out; }
    if (c->bench_layers) b->config->n_layers = (int)c->bench_layers;
    TRY(backend_open(&b->be, &device));
    TRY(model_check_device(b->be, b->config, shape));
    printf("%s: %s, %d layers", part, shape, b->config->n_layers);
    if (b->config->n_layers < b->all_layers) printf(" of %d (bench.layers)", b->all_layers);
    printf(", on %s\n", b->be->description ? b->be->description : b->be->name);
    fflush(stdout);
out:
    return rc;
}

void bench_close(struct bench *b)
{
    backend_close(b->be);
    model_config_free(b->config);
    json_decref(b->how);
}

int64_t bench_teacher_positions(const struct bench *b)
{
    int64_t S = b->c->corpus_row_length, positions = bench_on_cpu(b) ? 2048 : 16384;
    return S * (b->c->dump_batch_rows ? b->c->dump_batch_rows : positions > S ? positions / S : 1);
}

/* A GPU's free memory. On a CPU memory is taken when it is touched and other programs come and go, so there it is minus what this process has in memory. */
static double memory_free(const struct bench *b)
{
    if (!bench_on_cpu(b)) return (double)b->be->ops->available(b->be);
    long pages = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    if (f && fscanf(f, "%*d %ld", &pages) != 1) pages = 0;
    if (f) fclose(f);
    return -(double)pages * (double)sysconf(_SC_PAGESIZE);
}

void bench_memory_begin(struct bench *b)
{
    b->be->ops->sync(b->be);
    b->free_before = memory_free(b);
}

void bench_memory_end(const struct bench *b, const struct memory_plan *p)
{
    double plan = (double)memory_total(p), used = b->free_before - memory_free(b), apart = (used - plan) / plan;
    memory_print(p, stdout);
    printf("  %-28s %9.3f GiB  %+.1f %% of the plan%s\n", bench_on_cpu(b) ? "in memory since the plan" : "the driver says", used / 0x1p30, 100 * apart,
           fabs(apart) <= 0.03 ? "" : bench_on_cpu(b) ? " (a page nobody touched is not there; batches and shards are)" : ": MORE THAN 3 % APART");
    const char *name;
    size_t bytes;
    for (int i = 0; memory_row(p, i, &name, &bytes); i++) table_figure(b, "memory_", name, (double)bytes, "B", NULL, 0);
    bench_figure(b, "memory_planned", plan, "B");
    bench_figure(b, "memory_in_use", used, "B");
}

/* ---- data ---- */

void bench_normals(struct backend *be, void *to, size_t bytes, float mean, float std, uint64_t seed)
{
    enum { DIFFERENT = 1 << 20 };
    size_t width = dtype_width(be->act_dtype), done = DIFFERENT * width < bytes ? DIFFERENT * width : bytes;
    be->ops->random_normal(be, to, (int64_t)(done / width), mean, std, seed, 0);
    for (; done < bytes; done *= 2) be->ops->copy(be, (char *)to + done, to, bytes - done < done ? bytes - done : done);
}

struct batch *bench_batch(int64_t rows, int64_t length, int64_t V, int k, bool samples, uint64_t stream)
{
    const double head = samples ? 1 : 0.95;                 /* its mass; the tail has the rest */
    struct shard_manifest m = {.kind = SHARD_TOPK, .k = k, .valid_vocab = (int32_t)V, .row_length = length, .rows = rows, .n_temperatures = 1, .temperatures = {1}};
    struct batch *b = batch_new(rows, length, k ? &m : NULL, samples);
    uint32_t *tokens = xmalloc((size_t)length * sizeof *tokens);
    uint8_t *mask = xmalloc((size_t)length);
    uint16_t *document = xcalloc((size_t)length, sizeof *document);
    double sum = 0, stride = k ? (double)V / k : 0;
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t t = 0; t < length; t++) {
            tokens[t] = philox4x32(11 + stream, (uint64_t)r, (uint64_t)t).v[0] % (uint32_t)V;
            mask[t] = t + 1 < length;
        }
        batch_set_row(b, r, tokens, mask, document);
    }
    batch_finish(b);
    for (int j = 0; j < k; j++) sum += 1.0 / (j + 1);
    for (int64_t i = 0; k && i < b->n; i++) {
        uint32_t shift = philox4x32(13 + stream, 1, (uint64_t)i).v[0];
        for (int j = 0; j < k; j++) {
            b->head_ids[i * k + j] = (int32_t)(((int64_t)(j * stride) + shift) % V);
            b->head_logprob[i * k + j] = (float)log(head / (j + 1) / sum);
            if (samples) b->weight[i * k + j] = (float)(head / (j + 1) / sum);
        }
        b->tail_logmass[i] = logf(0.05f);
    }
    free(tokens);
    free(mask);
    free(document);
    return b;
}

int bench_dir_make(const struct config *c, char **dir, bool *made_run_dir)
{
    char *name = xasprintf("bench-%lld", (long long)getpid());
    *made_run_dir = !path_exists(c->run_dir);
    *dir = path_join(c->run_dir, name);
    free(name);
    return dir_make(*dir);
}

void bench_dir_remove(const struct config *c, char *dir, bool made_run_dir)
{
    if (dir && dir_remove_tree(dir) != OK) warn("%s", fail_message());
    if (dir && made_run_dir) rmdir(c->run_dir);               /* empty, or somebody else uses it by now */
    free(dir);
}

/* ---- the device's rates ---- */

double bench_seconds(struct backend *be, void (*call)(void *), void *context, double least)
{
    const struct ops *op = be->ops;
    call(context);
    if (!strcmp(be->name, "cpu")) {
        double best = INFINITY, begin = now_seconds();
        do {
            op->mark(be, 0);
            call(context);
            op->mark(be, 1);
            double s = op->seconds_between(be, 0, 1);
            if (s < best) best = s;
        } while (now_seconds() - begin < least);
        return best;
    }
    call(context);
    for (int64_t turns = 2;;) {
        op->mark(be, 0);
        for (int64_t i = 0; i < turns; i++) call(context);
        op->mark(be, 1);
        op->wait_mark(be, 1);
        double s = op->seconds_between(be, 0, 1);
        if (s >= least || turns > 1 << 24) return s / (double)turns;
        int64_t more = (int64_t)(1.2 * least / (s / (double)turns)) + 1;
        turns = more > 2 * turns ? more : 2 * turns;
    }
}

/* Beyond the caches and long enough to time: matrices of 9 MB on a CPU and 134 MB on a GPU, copies of 256 MiB and 2 GiB. */
enum { SQUARE_CPU = 1536, SQUARE_GPU = 8192 };
static const size_t COPY_CPU = (size_t)1 << 28, COPY_GPU = (size_t)1 << 31;

struct device_rates {
    struct backend *be;
    int64_t square; act *a, *b, *y;           /* y = a b^T */
    struct fp8 a8, b8;                        /* the same, rounded */
    size_t bytes; void *from, *to;
    struct attention_args attention; int32_t *doc_begin;
    act *q, *k, *v, *o, *dq, *dk, *dv, *d_o; float *lse;
};

static void call_product(void *context) { struct device_rates *r = context; r->be->ops->linear_forward(r->be, r->y, r->a, r->b, NULL, r->square, r->square, r->square); }
static void call_product_fp8(void *context) { struct device_rates *r = context; r->be->ops->linear_forward_fp8(r->be, r->y, &r->a8, &r->b8, NULL, r->square, r->square, r->square); }
static void call_copy(void *context) { struct device_rates *r = context; r->be->ops->copy(r->be, r->to, r->from, r->bytes); }
static void call_attention(void *context) { struct device_rates *r = context; r->be->ops->attention_forward(r->be, r->o, r->lse, r->q, r->k, r->v, &r->attention); }
static void call_attention_back(void *context)
{
    struct device_rates *r = context;
    r->be->ops->attention_backward(r->be, r->dq, r->dk, r->dv, r->d_o, r->o, r->lse, r->q, r->k, r->v, &r->attention);
}

static void keep_larger(double *rate, double now) { if (now > *rate) *rate = now; }

int bench_rates(struct bench *b, int64_t positions)
{
    int rc = OK;
    bool cpu = bench_on_cpu(b);
    struct backend *be = b->be;
    const struct ops *op = be->ops;
    struct memory_plan *plan = memory_plan_new(be);
    struct device_rates r = {.be = be, .square = cpu ? SQUARE_CPU : SQUARE_GPU, .bytes = cpu ? COPY_CPU : COPY_GPU};
    int64_t S = b->c->corpus_row_length, N = positions, Hq = b->config->n_heads, Hkv = b->config->n_kv_heads, D = b->config->head_dim, n2 = r.square * r.square;
    size_t width = dtype_width(be->act_dtype), q = (size_t)(N * Hq * D) * width, kv = (size_t)(N * Hkv * D) * width;
    double now = cpu ? fmin(0.5, b->c->bench_seconds / 10) : fmin(1, b->c->bench_seconds / 10), settled = cpu ? now : fmin(3, b->c->bench_seconds);   /* short runs are for tests */
    struct rates seen = {0};
    act **const planes[] = {&r.q, &r.o, &r.dq, &r.d_o, &r.k, &r.v, &r.dk, &r.dv};
    act **const squares[] = {&r.a, &r.b, &r.y};
    for (int i = 0; i < 3; i++) memory_add(plan, "square product", "nothing", squares[i], (size_t)n2 * width);
    for (int i = 0; i < 2 && b->fp8; i++) {
        memory_add(plan, "square product", "nothing", i ? &r.b8.q : &r.a8.q, (size_t)n2);
        memory_add(plan, "square product", "nothing", i ? &r.b8.scale : &r.a8.scale, (size_t)r.square * sizeof(float));
    }
    memory_add(plan, "copy", "nothing", &r.from, r.bytes);
    memory_add(plan, "copy", "nothing", &r.to, r.bytes);
    for (int i = 0; i < 8; i++) memory_add(plan, "attention", "the rows of a pass", planes[i], i < 4 ? q : kv);
    memory_add(plan, "attention", "the rows of a pass", &r.lse, (size_t)(N * Hq) * sizeof *r.lse);
    memory_add(plan, "attention", "the rows of a pass", &r.doc_begin, (size_t)(N / S + 1) * sizeof *r.doc_begin);
    struct op_limits limits = {.N = N > r.square ? N : r.square, .C = r.square, .F = r.square, .V = r.square, .chunk_rows = r.square, .max_doc = S, .Hq = (int)Hq, .Hkv = (int)Hkv, .D = (int)D,
                               .K = 1, .backward = true, .fp8 = b->fp8};
    memory_add_scratch(plan, op->scratch_bytes(be, &limits));
    TRY(memory_commit(plan, 0));

    bench_normals(be, r.a, (size_t)n2 * width, 0, 1, 5);
    bench_normals(be, r.b, (size_t)n2 * width, 0, 0.02f, 6);
    bench_normals(be, r.from, r.bytes, 0, 1, 7);
    for (int i = 0; i < 8; i++) bench_normals(be, *planes[i], i < 4 ? q : kv, 0, i == 3 ? 0.01f : 1, 8 + (uint64_t)i);
    int32_t *begin = xmalloc((size_t)(N / S + 1) * sizeof *begin);
    for (int64_t d = 0; d <= N / S; d++) begin[d] = (int32_t)(d * S);
    op->upload(be, r.doc_begin, begin, (size_t)(N / S + 1) * sizeof *begin);
    op->sync(be);
    free(begin);
    r.attention = (struct attention_args){.doc_begin = r.doc_begin, .n_docs = N / S, .max_doc = S, .N = N, .Hq = (int)Hq, .Hkv = (int)Hkv, .D = (int)D, .scale = 1 / sqrtf((float)D)};

    double flop = 4.0 * (double)(N * Hq * D) * (double)S / 2;
    if (!cpu) bench_seconds(be, call_product, &r, settled);     /* until the clock has settled */
    seen.product = 2.0 * (double)n2 * (double)r.square / bench_seconds(be, call_product, &r, settled);
    if (b->fp8) {
        op->quantize(be, &r.a8, r.a, r.square, r.square);
        op->quantize(be, &r.b8, r.b, r.square, r.square);
        seen.fp8 = 2.0 * (double)n2 * (double)r.square / bench_seconds(be, call_product_fp8, &r, settled);
    }
    seen.attention_forward = flop / bench_seconds(be, call_attention, &r, now);
    seen.attention_backward = 2.5 * flop / bench_seconds(be, call_attention_back, &r, now);
    seen.copy = 2.0 * (double)r.bytes / bench_seconds(be, call_copy, &r, now);
    printf("rates   product %lld^3 %s   attention %s forward, %s backward (%lld/%lld heads of %lld, documents of %lld)   copy %s\n", (long long)r.square, bench_quantity(seen.product, "FLOP/s"),
           bench_quantity(seen.attention_forward, "FLOP/s"), bench_quantity(seen.attention_backward, "FLOP/s"), (long long)Hq, (long long)Hkv, (long long)D, (long long)S,
           bench_quantity(seen.copy, "B/s"));
    if (b->fp8) printf("        the same product in fp8 %s, %.2f times as fast\n", bench_quantity(seen.fp8, "FLOP/s"), seen.fp8 / seen.product);
    fflush(stdout);
    keep_larger(&b->rates.product, seen.product);
    keep_larger(&b->rates.fp8, seen.fp8);
    keep_larger(&b->rates.attention_forward, seen.attention_forward);
    keep_larger(&b->rates.attention_backward, seen.attention_backward);
    keep_larger(&b->rates.copy, seen.copy);
out:
    memory_plan_free(plan);
    return rc;
}

/* ---- the composed limit ---- */

enum row_kind { ROW_PRODUCT, ROW_FP8, ROW_ATTENTION, ROW_ATTENTION_BACK, ROW_BYTES };
struct row { const char *name; enum row_kind kind; double amount; const char *formula; };
enum { MAX_LIMIT_ROWS = 32 };
static const double BANDWIDTH_SHARE = 0.9;    /* of a plain copy: what good pointwise kernels reach */

/* What the ops of model.c, objective.c and optimizer.c must do for a token: products and attention in FLOP, every other op in bytes, each input read once and each
 * output written once. Left out because a pass shares it among its tokens or because it is small: weights of norms, rotary tables, one float per row (rstd, lse,
 * losses), bias gradients (a sum over columns that are being read anyway). The mirrors: a change there is a change here. */
static int limit_rows(const struct bench *b, const struct pass *p, struct row *row)
{
    const struct model_config *c = b->config;
    double e = (double)dtype_width(b->be->act_dtype), g = (double)dtype_width(b->be->grad_dtype), m = (double)dtype_width(b->be->moment_dtype);
    double L = c->n_layers, C = (double)c->hidden_size, F = (double)c->intermediate_size, V = (double)c->vocab_size, q = c->n_heads * c->head_dim, W = (c->n_heads + 2 * c->n_kv_heads) * c->head_dim;
    double P = C * W + q * C + 3 * C * F, head = 2 * C * V, K = p->k;
    double attention = model_config_forward_flops(c, b->c->corpus_row_length) - 2 * L * P - head;
    double optimizer = (double)model_config_parameters(c) / (double)(p->step_tokens ? p->step_tokens : 1);
    bool cheap = p->recompute >= RECOMPUTE_SWIGLU_NORM, ffn = p->recompute >= RECOMPUTE_FFN, block = p->recompute == RECOMPUTE_BLOCK;
    double L8 = b->fp8 ? b->fp8_blocks : 0, N = L - L8, h = L8 + N * e;        /* blocks in fp8 and native; bytes of an element that an op writes for a product to read, over all of them */
    int n = 0;
#define ROW(...) row[n++] = (struct row){__VA_ARGS__}
    if (L8 > 0) ROW("layers forward, fp8", ROW_FP8, 2 * L8 * P, "2 L8 P,  P = C W + Hq D C + 3 C F,  W = (Hq + 2 Hkv) D;  L8 blocks in fp8, N native, L in all");
    if (N > 0) ROW("layers forward", ROW_PRODUCT, 2 * N * P, L8 > 0 ? "2 N P" : "2 L P,  P = C W + Hq D C + 3 C F,  W = (Hq + 2 Hkv) D");
    ROW("head forward", ROW_PRODUCT, head, "2 C V");
    if (b->fp8) ROW("rounding inputs", ROW_BYTES, L8 * q * (e + 1), "L8 Hq D (e + 1): attention's results -> fp8; the others are written so");
    ROW("attention forward", ROW_ATTENTION, attention, "4 L Hq D S/2");
    ROW("embedding", ROW_BYTES, 2 * C * e, "2 C e");
    ROW("norm + residual", ROW_BYTES, (6 * L + 2) * C * e + 2 * C * h, b->fp8 ? "(6 L + 2) C e + 2 C (L8 + N e): x, r -> s, y, twice a layer, y in fp8, and once more; the first has no r and no s"
                                                                             : "(8 L + 2) C e: x, r -> s, y, twice a layer and once more; the first has no r and no s");
    if (c->qk_norm) ROW("q/k norm", ROW_BYTES, 2 * L * W * e, "2 L W e");
    ROW("rope", ROW_BYTES, 2 * L * W * e, "2 L W e");
    ROW("swiglu", ROW_BYTES, 2 * L * F * e + F * h, b->fp8 ? "F (2 L e + L8 + N e)" : "3 L F e");
    if (!p->train) {
        if (p->full) ROW("teacher targets", ROW_BYTES, V * e + 2 * V, "V e + 2 V: logits -> f16");
        else ROW("teacher targets", ROW_BYTES, V * e + 8 * K, "V e + 8 K");
        return n;
    }
    ROW("loss", ROW_BYTES, 2 * V * e + 8 * K, "2 V e + 8 K: logits -> their gradient, in place");
    if (L8 > 0) ROW("layers backward, fp8", ROW_FP8, 4 * L8 * P, "4 L8 P");
    if (N > 0) ROW("layers backward", ROW_PRODUCT, 4 * N * P, L8 > 0 ? "4 N P" : "4 L P");
    if (b->fp8 && c->qk_norm) ROW("rounding gradients", ROW_BYTES, L8 * W * (e + 1), "L8 W (e + 1): those of q, k, v -> fp8; the others are written so");
    if (b->fp8) ROW("transposing for dw", ROW_BYTES, 2 * L8 * (4 * C + q + W + 3 * F), "2 L8 (4 C + Hq D + W + 3 F): x, dy -> their transposes, a byte each");
    if (b->fp8) ROW("rounding weights", ROW_BYTES, L8 * P * (e + 3) / (double)(p->step_tokens ? p->step_tokens : 1), "L8 P (e + 3) / tokens per step: w -> fp8 -> its transpose");
    ROW("head backward", ROW_PRODUCT, 2 * head, "4 C V");
    ROW("attention backward", ROW_ATTENTION_BACK, 2.5 * attention, "2.5 x forward");
    ROW("norm backward", ROW_BYTES, (8 * L + 3) * C * e + 2 * L8 * C, b->fp8 ? "(8 L + 3) C e + 2 L8 C: dres, dy, s -> dx, and in fp8" : "(8 L + 3) C e: dres, dy, s -> dx");
    if (c->qk_norm) ROW("q/k norm backward", ROW_BYTES, 3 * L * (q + (W - q) / 2) * e, "3 L (Hq + Hkv) D e: dy, x -> dx, v stays");
    ROW("rope backward", ROW_BYTES, L * W * e + (c->qk_norm ? L * e : h) * W, b->fp8 && !c->qk_norm ? "W (L e + L8 + N e): its result in fp8" : "2 L W e");
    ROW("swiglu backward", ROW_BYTES, 3 * L * F * e + 2 * F * h, b->fp8 ? "F (3 L e + 2 L8 + 2 N e): dh, gate, up -> dgate, dup in fp8" : "5 L F e: dh, gate, up -> dgate, dup");
    ROW("embedding backward", ROW_BYTES, C * e + 2 * C * g, "C e + 2 C g");
    double twice = block ? P - C * F : ffn ? 2 * C * F : 0;                   /* of a layer's products, those that are computed once more */
    if (twice > 0 && L8 > 0) ROW("recompute in fp8", ROW_FP8, 2 * L8 * twice, block ? "2 L8 (P - C F): all but the product down" : "4 L8 C F: gate and up");
    if (twice > 0 && N > 0) ROW("recompute products", ROW_PRODUCT, 2 * N * twice, L8 > 0 ? block ? "2 N (P - C F)" : "4 N C F" : block ? "2 L (P - C F): all but the product down" : "4 L C F: gate and up");
    if (block) ROW("recompute attention", ROW_ATTENTION, attention, "as forward");
    if (block) ROW("recompute rope", ROW_BYTES, (c->qk_norm ? 4 : 2) * L * W * e, c->qk_norm ? "4 L W e, q/k norm included" : "2 L W e");
    if (block) ROW("recompute norms", ROW_BYTES, C * (4 * L * e + 2 * h), b->fp8 ? "C (4 L e + 2 L8 + 2 N e)" : "6 L C e");
    else if (cheap) ROW("recompute norms", ROW_BYTES, C * (2 * L * e + 2 * h), b->fp8 ? "C (2 L e + 2 L8 + 2 N e)" : "4 L C e");
    if (cheap) ROW("recompute swiglu", ROW_BYTES, F * (2 * L * e + h), b->fp8 ? "F (2 L e + L8 + N e)" : "3 L F e");
    if (cheap && b->fp8) ROW("recompute rounding", ROW_BYTES, L8 * q * (e + 1), "L8 Hq D (e + 1): attention's out");
    if (b->be->master) ROW("optimizer", ROW_BYTES, optimizer * (e + 8 + 3 * g + 4 * m), "(e + 8 + 3 g + 4 m) parameters / tokens per step: AdamW with its fp32 master, the norm, zeroed gradients");
    else ROW("optimizer", ROW_BYTES, optimizer * (2 * e + 3 * g + 4 * m), "(2 e + 3 g + 4 m) parameters / tokens per step: AdamW, the norm, zeroed gradients");
#undef ROW
    CHECK(n <= MAX_LIMIT_ROWS, "more rows of the limit than there is room for");
    return n;
}

static double row_seconds(const struct rates *r, const struct row *row)
{
    switch (row->kind) {
    case ROW_PRODUCT: return row->amount / r->product;
    case ROW_FP8: return row->amount / r->fp8;
    case ROW_ATTENTION: return row->amount / r->attention_forward;
    case ROW_ATTENTION_BACK: return row->amount / r->attention_backward;
    case ROW_BYTES: break;
    }
    return row->amount / (BANDWIDTH_SHARE * r->copy);
}

/* Seconds of a token at the limit. */
static double limit_seconds(const struct bench *b, const struct pass *p)
{
    struct row row[MAX_LIMIT_ROWS];
    double total = 0;
    for (int i = 0, n = limit_rows(b, p, row); i < n; i++) total += row_seconds(&b->rates, &row[i]);
    return total;
}

static void print_limit(const struct bench *b, const struct pass *p, double total)
{
    struct row row[MAX_LIMIT_ROWS];
    int n = limit_rows(b, p, row);
    printf("composed limit, per token: FLOP / rate of products and of attention, bytes / %.0f %% of copy bandwidth; e, g, m: %zu, %zu, %zu bytes of an activation, a gradient, a moment\n",
           100 * BANDWIDTH_SHARE, dtype_width(b->be->act_dtype), dtype_width(b->be->grad_dtype), dtype_width(b->be->moment_dtype));
    for (int i = 0; i < n; i++)
        printf("  %-22s %12s  %9.3f us   %s\n", row[i].name, bench_quantity(row[i].amount, row[i].kind == ROW_BYTES ? "B" : "FLOP"), 1e6 * row_seconds(&b->rates, &row[i]), row[i].formula);
    printf("  %-22s %12s  %9.3f us   %.0f tok/s\n", "sum", "", 1e6 * total, 1 / total);
    for (int i = 0; i < n; i++) table_figure(b, "limit_", row[i].name, row_seconds(&b->rates, &row[i]), "s per token", row[i].kind == ROW_BYTES ? "bytes" : "flop", row[i].amount);
}

/* What the data sheet promises, dense bf16, for the cards this was run on; 0: not known. */
static double data_sheet(const struct bench *b)
{
    const char *d = b->be->description ? b->be->description : "";
    return strstr(d, "H200") || strstr(d, "H100 80GB HBM3") ? 989.4e12 : 0;
}

void bench_report(const struct bench *b, const struct pass *p, double tokens, double seconds, int64_t steps)
{
    double flop = (p->train ? 3 : 1) * model_config_forward_flops(b->config, b->c->corpus_row_length), rate = tokens / seconds, achieved = rate * flop, sheet = data_sheet(b);
    struct model_config whole = *b->config;
    printf("rates   the larger of before and after: product %s, attention %s forward, %s backward, copy %s\n", bench_quantity(b->rates.product, "FLOP/s"),
           bench_quantity(b->rates.attention_forward, "FLOP/s"), bench_quantity(b->rates.attention_backward, "FLOP/s"), bench_quantity(b->rates.copy, "B/s"));
    if (b->fp8) printf("        product in fp8 %s\n", bench_quantity(b->rates.fp8, "FLOP/s"));
    double limit = limit_seconds(b, p);
    print_limit(b, p, limit);
    printf("%-7s %.0f tok/s (%.0f tokens in %.1f s), %s of the model: MFU %.1f %% of what products sustain here", b->part, rate, tokens, seconds, bench_quantity(achieved, "FLOP/s"),
           100 * achieved / b->rates.product);
    if (sheet) printf(", %.1f %% of the data sheet's %s", 100 * achieved / sheet, bench_quantity(sheet, "FLOP/s"));
    printf("\n        model FLOP per token = %s2 (L P + C V) + 4 L Hq D S/2%s = %s; causal attention at half the square, what is recomputed is not counted\n", p->train ? "3 (" : "",
           p->train ? ")" : "", bench_quantity(flop, "FLOP"));
    printf("        %.1f %% of the composed limit of %.0f tok/s\n", 100 * rate * limit, 1 / limit);
    if (b->config->n_layers < b->all_layers) {
        whole.n_layers = b->all_layers;
        struct bench all = *b;
        all.config = &whole;
        all.fp8_blocks += b->all_layers - b->config->n_layers;                /* what was left out are blocks of the kind that most are */
        double share = rate * limit, scaled = share / limit_seconds(&all, p);
        printf("        %d of %d layers were measured: at the same share of the limit of all, %.0f tok/s, the whole model runs at %.0f tok/s\n", b->config->n_layers, b->all_layers,
               scaled / share, scaled);
        bench_figure(b, "tokens_per_second_scaled_to_all_layers", scaled, "tok/s");
    }
    bench_figure_more(b, "tokens_per_second", rate, "tok/s", "steps", (double)steps, "seconds", seconds);
    bench_figure(b, "model_flop_per_token", flop, "FLOP");
    bench_figure(b, "model_flop_per_second", achieved, "FLOP/s");
    bench_figure(b, "mfu_of_sustained_products", achieved / b->rates.product, "1");
    if (sheet) bench_figure(b, "mfu_of_data_sheet", achieved / sheet, "1");
    bench_figure(b, "composed_limit", 1 / limit, "tok/s");
    bench_figure(b, "share_of_composed_limit", rate * limit, "1");
    bench_figure(b, "rate_product", b->rates.product, "FLOP/s");
    if (b->fp8) bench_figure(b, "rate_product_fp8", b->rates.fp8, "FLOP/s");
    bench_figure(b, "rate_copy", b->rates.copy, "B/s");
    bench_figure(b, "rate_attention_forward", b->rates.attention_forward, "FLOP/s");
    bench_figure(b, "rate_attention_backward", b->rates.attention_backward, "FLOP/s");
}

void bench_phases(const struct bench *b, struct backend *timed, int steps, double wall)
{
    static const char *const keys[PHASE_COUNT] = {"phase_products", "phase_attention", "phase_norm_and_pointwise", "phase_quantize", "phase_head_and_objective", "phase_optimizer", "phase_other"};
    const struct timed_op *ops;
    int n;
    double device = 0;
    timed_collect(timed, &ops, &n);
    for (int i = 0; i < n; i++) device += ops[i].seconds;
    printf("time by phase, per step, over %d more steps whose ops stood between marks (%.1f ms a step; the rate below is from steps without marks)\n", steps, 1e3 * wall / steps);
    for (int phase = 0; phase < PHASE_COUNT; phase++) {
        double sum = 0;
        for (int i = 0; i < n; i++) if (ops[i].phase == (enum time_phase)phase) sum += ops[i].seconds;
        if (sum == 0) continue;
        printf("  %-28s %10.3f ms  %5.1f %%\n", time_phase_names[phase], 1e3 * sum / steps, 100 * sum / wall);
        for (int i = 0; i < n; i++)
            if (ops[i].phase == (enum time_phase)phase) printf("      %-24s %10.3f ms  %5.1f %%   %lld calls\n", ops[i].name, 1e3 * ops[i].seconds / steps, 100 * ops[i].seconds / wall,
                                                               (long long)(ops[i].calls / steps));
    }
    printf("  %-28s %10.3f ms  %5.1f %%   wall clock minus device; waiting for streamed weights is here too\n", "host", 1e3 * (wall - device) / steps, 100 * (wall - device) / wall);
    for (int phase = 0; phase < PHASE_COUNT; phase++) {
        double sum = 0;
        for (int i = 0; i < n; i++) if (ops[i].phase == (enum time_phase)phase) sum += ops[i].seconds;
        bench_figure_more(b, keys[phase], sum / wall, "share of step", "seconds", sum / steps, NULL, 0);
    }
    for (int i = 0; i < n; i++) table_figure(b, "op_", ops[i].name, ops[i].seconds / steps, "s per step", "calls", (double)(ops[i].calls / steps));
    bench_figure_more(b, "phase_host", (wall - device) / wall, "share of step", "seconds", (wall - device) / steps, NULL, 0);
}

/* ---- the command ---- */

static const char *const parts[] = {"train", "teacher", "kernels", "io"};
enum { N_PARTS = sizeof parts / sizeof *parts };

struct arguments { const char *part; char **own; int n; char **words; int n_words; };   /* own: what command_config() shall see */

/* bench [PART] CONFIG [--set key=value] [WORD...] */
static void take_arguments(struct arguments *a, int argc, char **argv)
{
    bool config = false;
    a->own = xcalloc((size_t)argc + 1, sizeof *a->own);
    a->words = xcalloc((size_t)argc + 1, sizeof *a->words);
    a->own[a->n++] = argv[0];
    for (int i = 1; i < argc; i++) {
        if (i == 1) for (int p = 0; p < N_PARTS; p++) if (!strcmp(argv[1], parts[p])) a->part = parts[p];
        if (i == 1 && a->part) continue;
        bool option = argv[i][0] == '-', filtered = a->part && (!strcmp(a->part, "kernels") || !strcmp(a->part, "io"));
        if (!option && config && filtered) { a->words[a->n_words++] = argv[i]; continue; }
        if (!option) config = true;
        a->own[a->n++] = argv[i];
        if (!strcmp(argv[i], "--set") && i + 1 < argc) a->own[a->n++] = argv[++i];
    }
}

static int check_keys(const struct config *c)
{
    if (c->train_batch_rows % c->train_micro_rows)
        return fail(ERR_USAGE, "train.batch_rows (%lld) is not a multiple of train.micro_rows (%lld)", (long long)c->train_batch_rows, (long long)c->train_micro_rows);
    int64_t rows = c->train_micro_rows > c->dump_batch_rows ? c->train_micro_rows : c->dump_batch_rows;
    if (rows > INT32_MAX / c->corpus_row_length)
        return fail(ERR_USAGE, "%lld rows of %lld tokens are more positions than one pass can count: make train.micro_rows and dump.batch_rows smaller", (long long)rows, (long long)c->corpus_row_length);
    return OK;
}

int command_bench(int argc, char **argv)
{
    struct config *c = NULL;
    struct arguments a = {0};
    int help, rc = OK;
    take_arguments(&a, argc, argv);
    if (!a.part && argc > 2 && argv[1][0] != '-' && argv[2][0] != '-') { rc = fail(ERR_USAGE, "there is no part %s; known: train, teacher, kernels, io", argv[1]); goto out; }
    TRY(command_config(a.n, a.own, CMD_BENCH,
                       "Measures this machine at the shapes of a configuration (student.config or student.path, teacher.path: a config.json is enough) with random weights made on the device.\n\n"
                       "  distill bench train CONFIG          optimizer steps: tokens per second, MFU, memory by row, time by phase, share of the limit\n"
                       "  distill bench teacher CONFIG        the teacher's forward, its targets and shards written: the same\n"
                       "  distill bench kernels CONFIG [WORD...]   every op beside copy bandwidth and product rate; words select ops by name\n"
                       "  distill bench io CONFIG [WORD...]   sealing and reading shards, loading a checkpoint, beside plain writes and reads; words: topk, full, hybrid, sampled, checkpoint\n"
                       "  distill bench CONFIG                train, if there is a student, and teacher\n\n"
                       "The limit is composed from rates measured in the same run: products, attention, copies. Every figure is also one line of JSON.\n"
                       "Formula: train = 3 x forward; forward = 2 x (weights in products) + causal attention at half the square, per token.",
                       "distill bench train configs/bench/cpu-30m.yaml", NULL, NULL, NULL, &c, &help));
    if (help) goto out;
    TRY(check_keys(c));
    const char *student = *c->student_config ? c->student_config : c->student_path, *teacher = *c->teacher_path ? c->teacher_path : student;
    if (!*student && !*teacher) { rc = fail(ERR_USAGE, "set student.config (or student.path, teacher.path): a config.json gives the shape to measure"); goto out; }
    if (a.part && !strcmp(a.part, "train") && !*student) { rc = fail(ERR_USAGE, "set student.config (or student.path) to the shape to train"); goto out; }
    bool train = *student && (!a.part || !strcmp(a.part, "train")), full = train && !strcmp(c->shards_kind, "full");
    if (full && a.part) {
        rc = fail(ERR_USAGE, "shards.kind is full: bench train steps on topk, hybrid or sampled targets; distill bench kernels times the objective on all logits");
        goto out;
    }
    if (full) warn("shards.kind is full: steps are measured on topk, hybrid or sampled targets, so the student is left out");
    else if (train) TRY(bench_train(c, student));
    if (!a.part || !strcmp(a.part, "teacher")) TRY(bench_teacher(c, teacher));
    if (a.part && !strcmp(a.part, "kernels")) {
        if (*student) TRY(bench_kernels(c, student, false, a.n_words, a.words));
        if (*c->teacher_path) TRY(bench_kernels(c, teacher, true, a.n_words, a.words));
    }
    if (a.part && !strcmp(a.part, "io")) TRY(bench_io(c, *student ? student : teacher, a.n_words, a.words));
out:
    free(a.own);
    free(a.words);
    config_free(c);
    return rc;
}
