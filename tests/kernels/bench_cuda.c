/* How fast each op of the CUDA backend is, at the shapes of a 7B student step and a 72B teacher pass: one JSON line per figure. Memory-bound
 * ops are given as a share of the device's own copy bandwidth, products and attention beside its sustained bf16 product rate, both
 * measured first, in the same run. Data is normal with the scale of trained models, never zeros: the card is limited by power,
 * and zeros draw little. Usage: bench_cuda [NAME...] runs the ops whose names contain one of the words. */
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/half.h"
#include "base/rng.h"
#include "kernels/cuda/cuda.h"

enum { POOL = 1 << 23 };                /* distinct values; larger buffers repeat them */

struct bench {
    struct backend *be;
    const struct ops *op;
    cudaEvent_t begin, end;
    uint16_t *pool;
    char *arena; size_t arena_bytes, used;
    double copy_gbs, read_gbs, gemm_tflops;
    int n_words; char **words;
    /* arguments of the op being timed */
    void *p[12];
    int64_t n[6];
    int heads[3];
    struct attention_args attention;
    struct distill_targets targets;
    struct distill_args loss;
    struct teacher_targets teacher;
    struct adamw_args adamw;
};

static void *room(struct bench *b, size_t bytes)
{
    size_t at = b->used;
    b->used += cuda_round_up(bytes);
    CHECK(b->used <= b->arena_bytes, "the benchmark's arena of %zu bytes is too small", b->arena_bytes);
    return b->arena + at;
}

/* n bf16 normals times scale */
static void *normals(struct bench *b, int64_t n, float scale)
{
    static uint16_t *scaled;
    if (!scaled) scaled = xmalloc(POOL * sizeof *scaled);
    for (int64_t i = 0; i < (n < POOL ? n : POOL); i++) scaled[i] = bf16_from_float(scale * bf16_to_float(b->pool[i]));
    char *to = room(b, (size_t)n * 2);
    int64_t done = n < POOL ? n : POOL;
    b->op->upload(b->be, to, scaled, (size_t)done * 2);
    for (; done < n; done *= 2) b->op->copy(b->be, to + done * 2, to, (size_t)(n - done < done ? n - done : done) * 2);
    b->op->sync(b->be);
    return to;
}

static void *words32(struct bench *b, int64_t n, uint32_t (*value)(struct bench *, int64_t))
{
    uint32_t *host = xmalloc((size_t)n * 4);
    for (int64_t i = 0; i < n; i++) host[i] = value(b, i);
    void *to = room(b, (size_t)n * 4);
    b->op->upload(b->be, to, host, (size_t)n * 4);
    b->op->sync(b->be);
    free(host);
    return to;
}

/* Seconds of one call: warm, then for at least `least` seconds. */
static double seconds(struct bench *b, void (*call)(struct bench *), double least)
{
    cudaStream_t stream = cuda_state_of(b->be)->stream;
    float ms = 0;
    int64_t turns = 2;
    for (int i = 0; i < 2; i++) call(b);
    for (;;) {
        CUDA_CHECK(cudaEventRecord(b->begin, stream));
        for (int64_t i = 0; i < turns; i++) call(b);
        CUDA_CHECK(cudaEventRecord(b->end, stream));
        CUDA_CHECK(cudaEventSynchronize(b->end));
        CUDA_CHECK(cudaEventElapsedTime(&ms, b->begin, b->end));
        if (ms * 1e-3 >= least) return ms * 1e-3 / (double)turns;
        int64_t more = (int64_t)(1.2 * least / (ms * 1e-3 / (double)turns)) + 1;
        turns = more > 2 * turns ? more : 2 * turns;
    }
}

static bool wanted(struct bench *b, const char *name)
{
    if (!b->n_words) return true;
    for (int i = 0; i < b->n_words; i++) if (strstr(name, b->words[i])) return true;
    return false;
}

static void bandwidth(struct bench *b, const char *name, void (*call)(struct bench *), double bytes)
{
    if (!wanted(b, name)) return;
    double s = seconds(b, call, 0.3), gbs = bytes / s * 1e-9;
    printf("{\"op\": \"%s\", \"ms\": %.4f, \"gb_per_s\": %.0f, \"share_of_copy\": %.3f}\n", name, s * 1e3, gbs, gbs / b->copy_gbs);
    fflush(stdout);
}

static void arithmetic(struct bench *b, const char *name, void (*call)(struct bench *), double flop)
{
    if (!wanted(b, name)) return;
    double s = seconds(b, call, 1.0), rate = flop / s * 1e-12;
    printf("{\"op\": \"%s\", \"ms\": %.4f, \"tflop_per_s\": %.1f, \"share_of_products\": %.3f}\n", name, s * 1e3, rate, rate / b->gemm_tflops);
    fflush(stdout);
}

/* ---- calls ---- */

static void call_copy(struct bench *b) { b->op->copy(b->be, b->p[0], b->p[1], (size_t)b->n[0]); }
static void call_squares(struct bench *b) { b->op->sum_squares(b->be, b->p[0], b->p[1], b->n[0]); }
static void call_linear(struct bench *b) { b->op->linear_forward(b->be, b->p[0], b->p[1], b->p[2], b->p[3], b->n[0], b->n[1], b->n[2]); }
static void call_linear_input(struct bench *b) { b->op->linear_backward_input(b->be, b->p[1], b->p[0], b->p[2], b->n[0], b->n[1], b->n[2]); }
static void call_linear_weight(struct bench *b) { b->op->linear_backward_weight(b->be, b->p[4], NULL, b->p[0], b->p[1], b->n[0], b->n[1], b->n[2]); }
static void call_norm(struct bench *b) { b->op->rmsnorm_forward(b->be, b->p[0], b->p[1], b->p[2], b->p[3], b->p[4], b->p[5], b->n[0], b->n[1], 1e-6f); }
static void call_norm_back(struct bench *b) { b->op->rmsnorm_backward(b->be, b->p[0], b->p[6], b->p[2], b->p[3], b->p[4], b->p[5], b->p[1], b->n[0], b->n[1]); }
static void call_qk_norm(struct bench *b) { b->op->qk_norm_forward(b->be, b->p[0], b->p[1], b->p[2], b->p[3], b->p[3], b->n[0], b->heads[0], b->heads[1], b->heads[2], 1e-6f); }
static void call_qk_norm_back(struct bench *b)
{
    b->op->qk_norm_backward(b->be, b->p[4], b->p[5], b->p[5], b->p[0], b->p[2], b->p[3], b->p[3], b->p[1], b->n[0], b->heads[0], b->heads[1], b->heads[2]);
}
static void call_rope(struct bench *b) { b->op->rope_forward(b->be, b->p[1], b->p[2], b->p[3], b->p[0], b->p[4], b->p[4], b->p[5], b->n[0], b->heads[0], b->heads[1], b->heads[2]); }
static void call_rope_back(struct bench *b) { b->op->rope_backward(b->be, b->p[0], b->p[1], b->p[2], b->p[3], b->p[4], b->p[4], b->p[5], b->n[0], b->heads[0], b->heads[1], b->heads[2]); }
static void call_swiglu(struct bench *b) { b->op->swiglu_forward(b->be, b->p[0], b->p[1], b->n[0], b->n[1]); }
static void call_swiglu_back(struct bench *b) { b->op->swiglu_backward(b->be, b->p[2], b->p[0], b->p[1], b->n[0], b->n[1]); }
static void call_embed(struct bench *b) { b->op->embed_forward(b->be, b->p[0], b->p[1], b->p[2], b->n[0], b->n[1]); }
static void call_embed_back(struct bench *b) { b->op->embed_backward(b->be, b->p[2], b->p[0], b->p[1], b->n[0], b->n[1], b->n[2]); }
static void call_attention(struct bench *b) { b->op->attention_forward(b->be, b->p[3], b->p[4], b->p[0], b->p[1], b->p[2], &b->attention); }
static void call_attention_back(struct bench *b)
{
    b->op->attention_backward(b->be, b->p[5], b->p[6], b->p[7], b->p[8], b->p[3], b->p[4], b->p[0], b->p[1], b->p[2], &b->attention);
}
/* The loss overwrites its logits: they are copied in first, and that copy is timed apart. */
static void call_refill(struct bench *b) { b->op->copy(b->be, b->p[0], b->p[1], (size_t)(b->n[0] * b->n[1] * 2)); }
static void call_loss(struct bench *b)
{
    call_refill(b);
    b->op->distill_loss(b->be, b->p[0], b->p[2], b->p[3], &b->targets, &b->loss, b->n[0], b->n[1], b->n[2]);
}
static void call_targets(struct bench *b) { b->op->teacher_targets(b->be, &b->teacher, b->p[1], b->targets.labels, b->n[0], b->n[1], b->n[2]); }
static void call_head(struct bench *b)
{
    int64_t R = b->n[0], V = b->n[1], C = b->n[3];
    for (int64_t chunk = 0; chunk < b->n[4]; chunk += R) {
        act *x = (act *)((char *)b->p[4] + chunk * C * 2), *dx = (act *)((char *)b->p[7] + chunk * C * 2);
        b->op->linear_forward(b->be, b->p[0], x, b->p[5], NULL, R, C, V);
        b->op->distill_loss(b->be, b->p[0], b->p[2], b->p[3], &b->targets, &b->loss, R, V, b->n[2]);
        b->op->linear_backward_weight(b->be, b->p[6], NULL, b->p[0], x, R, C, V);
        b->op->linear_backward_input(b->be, dx, b->p[0], b->p[5], R, C, V);
    }
}
static void call_adamw(struct bench *b) { b->op->adamw(b->be, b->p[0], NULL, b->p[1], b->p[2], b->p[3], b->n[0], b->p[4], &b->adamw); }

/* ---- figures ---- */

static uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static uint32_t random_token(struct bench *b, int64_t i) { (void)b; return philox4x32(1, 0, (uint64_t)i).v[0] % 151665; }
static uint32_t in_row(struct bench *b, int64_t i) { return (uint32_t)(i % b->n[3]); }
static uint32_t document_begin(struct bench *b, int64_t i) { return (uint32_t)(i * b->attention.max_doc); }
static uint32_t half_turn(struct bench *b, int64_t i) { (void)b; (void)i; return bits_of(0.70710678f); }
static uint32_t head_id(struct bench *b, int64_t i) { return (uint32_t)((i % b->targets.K) * 2357 + i / b->targets.K % 997); }
static uint32_t head_logprob(struct bench *b, int64_t i) { (void)i; return bits_of(logf(0.9f / (float)b->targets.K)); }
static uint32_t tail_logmass(struct bench *b, int64_t i) { (void)b; (void)i; return bits_of(logf(0.1f)); }
static uint32_t one_as_double(struct bench *b, int64_t i) { (void)b; return i ? 0x3ff00000u : 0; }

static void rates(struct bench *b)
{
    size_t bytes = (size_t)2 << 30;
    b->p[1] = normals(b, (int64_t)bytes / 2, 1);
    b->p[0] = room(b, bytes);
    b->n[0] = (int64_t)bytes;
    double s = seconds(b, call_copy, 0.5);
    b->copy_gbs = 2.0 * (double)bytes / s * 1e-9;
    printf("{\"rate\": \"copy\", \"gb_per_s\": %.0f}\n", b->copy_gbs);
    b->p[0] = room(b, 256);
    b->n[0] = (int64_t)bytes / 2;
    b->read_gbs = (double)bytes / seconds(b, call_squares, 0.5) * 1e-9;
    printf("{\"rate\": \"read\", \"gb_per_s\": %.0f}\n", b->read_gbs);
    b->used = 0;
    int64_t n = 8192;
    b->p[0] = room(b, (size_t)(n * n) * 2);
    b->p[1] = normals(b, n * n, 1);
    b->p[2] = normals(b, n * n, 0.02f);
    b->p[3] = NULL;
    b->n[0] = b->n[1] = b->n[2] = n;
    seconds(b, call_linear, 2);                              /* until the clock has settled */
    b->gemm_tflops = 2.0 * (double)(n * n) * (double)n / seconds(b, call_linear, 3) * 1e-12;
    printf("{\"rate\": \"sustained bf16 product\", \"tflop_per_s\": %.1f}\n", b->gemm_tflops);
    fflush(stdout);
    b->used = 0;
}

struct shape { const char *name; int64_t N, C, F, V; int Hq, Hkv, D; };

static void pointwise(struct bench *b, const struct shape *s)
{
    char name[96];
    int64_t N = s->N, C = s->C, row = (s->Hq + 2 * s->Hkv) * s->D;
    double NC = (double)(N * C) * 2;
    b->used = 0;
    b->n[0] = N; b->n[1] = C;
    b->p[0] = room(b, (size_t)NC); b->p[1] = room(b, (size_t)N * 4); b->p[2] = normals(b, N * C, 1); b->p[3] = normals(b, N * C, 1); b->p[4] = normals(b, N * C, 1);
    b->p[5] = normals(b, C, 1); b->p[6] = normals(b, C, 1);
    snprintf(name, sizeof name, "rmsnorm_forward %s", s->name);
    bandwidth(b, name, call_norm, 4 * NC);
    snprintf(name, sizeof name, "rmsnorm_backward %s", s->name);
    bandwidth(b, name, call_norm_back, 4 * NC);

    b->used = 0;
    b->heads[0] = s->Hq; b->heads[1] = s->Hkv; b->heads[2] = s->D;
    b->p[0] = normals(b, N * row, 1); b->p[1] = room(b, (size_t)(N * (s->Hq + s->Hkv)) * 4); b->p[2] = normals(b, N * row, 1); b->p[3] = normals(b, s->D, 1);
    b->p[4] = room(b, (size_t)(N * row) * 2); b->p[5] = normals(b, s->D, 1);
    snprintf(name, sizeof name, "qk_norm_forward %s", s->name);
    bandwidth(b, name, call_qk_norm, 2.0 * (double)(N * row) * 2);
    snprintf(name, sizeof name, "qk_norm_backward %s", s->name);
    bandwidth(b, name, call_qk_norm_back, (double)(N * (3 * (s->Hq + s->Hkv) + 2 * s->Hkv) * s->D) * 2);

    b->used = 0;
    b->n[3] = 4096;
    b->p[0] = normals(b, N * row, 1); b->p[1] = room(b, (size_t)(N * s->Hq * s->D) * 2); b->p[2] = room(b, (size_t)(N * s->Hkv * s->D) * 2); b->p[3] = room(b, (size_t)(N * s->Hkv * s->D) * 2);
    b->p[4] = words32(b, 4096 * s->D / 2, half_turn); b->p[5] = words32(b, N, in_row);
    snprintf(name, sizeof name, "rope_forward %s", s->name);
    bandwidth(b, name, call_rope, 2.0 * (double)(N * row) * 2);
    snprintf(name, sizeof name, "rope_backward %s", s->name);
    bandwidth(b, name, call_rope_back, 2.0 * (double)(N * row) * 2);

    b->used = 0;
    b->n[1] = s->F;
    b->p[0] = normals(b, N * s->F, 1); b->p[1] = normals(b, 2 * N * s->F, 1); b->p[2] = room(b, (size_t)(2 * N * s->F) * 2);
    snprintf(name, sizeof name, "swiglu_backward %s", s->name);
    bandwidth(b, name, call_swiglu_back, 5.0 * (double)(N * s->F) * 2);
    snprintf(name, sizeof name, "swiglu_forward %s", s->name);
    bandwidth(b, name, call_swiglu, 3.0 * (double)(N * s->F) * 2);

    b->used = 0;
    b->n[1] = C; b->n[2] = s->V;
    b->p[0] = normals(b, N * C, 0.02f); b->p[1] = words32(b, N, random_token); b->p[2] = normals(b, s->V * C, 0.02f);
    snprintf(name, sizeof name, "embed_backward %s", s->name);
    bandwidth(b, name, call_embed_back, 3 * NC);
    snprintf(name, sizeof name, "embed_forward %s", s->name);
    bandwidth(b, name, call_embed, 2 * NC);
}

static void products(struct bench *b, const struct shape *s)
{
    const struct { const char *name; int64_t C, O; } list[] = {
        {"qkv", s->C, (s->Hq + 2 * s->Hkv) * s->D}, {"o", s->Hq * s->D, s->C}, {"gate_up", s->C, 2 * s->F}, {"down", s->F, s->C}};
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        char name[96];
        int64_t N = s->N, C = list[i].C, O = list[i].O;
        b->used = 0;
        b->n[0] = N; b->n[1] = C; b->n[2] = O;
        b->p[0] = normals(b, N * O, 0.1f); b->p[1] = normals(b, N * C, 1); b->p[2] = normals(b, O * C, 0.02f); b->p[3] = i ? NULL : normals(b, O, 0.1f); b->p[4] = normals(b, O * C, 0.01f);
        double flop = 2.0 * (double)N * (double)C * (double)O;
        snprintf(name, sizeof name, "linear_forward %s %s", s->name, list[i].name);
        arithmetic(b, name, call_linear, flop);
        snprintf(name, sizeof name, "linear_backward_weight %s %s", s->name, list[i].name);
        arithmetic(b, name, call_linear_weight, flop);
        snprintf(name, sizeof name, "linear_backward_input %s %s", s->name, list[i].name);
        arithmetic(b, name, call_linear_input, flop);
    }
}

static void attention(struct bench *b, const struct shape *s, int64_t length)
{
    char name[96];
    int64_t N = 16384, q = N * s->Hq * s->D, kv = N * s->Hkv * s->D;
    b->used = 0;
    b->attention = (struct attention_args){.n_docs = N / length, .max_doc = length, .N = N, .Hq = s->Hq, .Hkv = s->Hkv, .D = s->D, .scale = 1 / sqrtf((float)s->D)};
    b->attention.doc_begin = words32(b, N / length + 1, document_begin);
    b->p[0] = normals(b, q, 1); b->p[1] = normals(b, kv, 1); b->p[2] = normals(b, kv, 1); b->p[3] = room(b, (size_t)q * 2); b->p[4] = room(b, (size_t)(N * s->Hq) * 4);
    b->p[5] = room(b, (size_t)q * 2); b->p[6] = room(b, (size_t)kv * 2); b->p[7] = room(b, (size_t)kv * 2); b->p[8] = normals(b, q, 0.01f);
    double flop = 4.0 * (double)N * (double)length / 2 * s->Hq * s->D;
    snprintf(name, sizeof name, "attention_forward %s %lld tokens a document", s->name, (long long)length);
    arithmetic(b, name, call_attention, flop);
    call_attention(b);                                       /* backward reads its results, also where it was not wanted above */
    snprintf(name, sizeof name, "attention_backward %s %lld tokens a document", s->name, (long long)length);
    arithmetic(b, name, call_attention_back, 2.5 * flop);
}

static void objective(struct bench *b)
{
    enum { R = 2048, C = 3584, TOKENS = 8192 };
    int64_t V = 152064, Vv = 151665;
    b->used = 0;
    b->n[0] = R; b->n[1] = V; b->n[2] = Vv; b->n[3] = C; b->n[4] = TOKENS;
    b->targets = (struct distill_targets){.kind = TARGET_TOPK, .K = 64};
    b->loss = (struct distill_args){.divergence = DIV_FORWARD_KL, .tail = TAIL_BUCKET, .temperature = 1, .kd_weight = 1, .gradient_scale = 1.0f / 65536};
    b->targets.labels = words32(b, R, random_token);
    b->targets.head_ids = words32(b, R * 64, head_id);
    b->targets.head_logprob = words32(b, R * 64, head_logprob);
    b->targets.tail_logmass = words32(b, R, tail_logmass);
    b->p[0] = room(b, (size_t)(R * V) * 2); b->p[1] = normals(b, R * V, 2.5f); b->p[2] = room(b, R * 4); b->p[3] = room(b, R * 4);
    b->p[4] = normals(b, (int64_t)TOKENS * C, 1); b->p[5] = normals(b, V * C, 0.02f); b->p[6] = normals(b, V * C, 0.0001f); b->p[7] = room(b, (size_t)TOKENS * C * 2);
    double bytes = (double)(R * V) * 2, read = bytes / (b->read_gbs * 1e9);
    if (wanted(b, "distill_loss")) {
        double refill = seconds(b, call_refill, 0.3), s = seconds(b, call_loss, 0.5) - refill;
        printf("{\"op\": \"distill_loss top-64 2048 x 152064\", \"ms\": %.4f, \"times_one_read_and_write\": %.3f, \"share_of_copy_at_two_reads_one_write\": %.3f}\n", s * 1e3,
               s / (2 * bytes / (b->copy_gbs * 1e9)), 3 * bytes / s * 1e-9 / b->copy_gbs);
        b->loss.temperature = 2;
        b->loss.ce_weight = 0.5f;
        s = seconds(b, call_loss, 0.5) - refill;
        printf("{\"op\": \"distill_loss top-64 T 2 with cross entropy 2048 x 152064\", \"ms\": %.4f, \"times_one_read_and_write\": %.3f}\n", s * 1e3, s / (2 * bytes / (b->copy_gbs * 1e9)));
        b->loss.temperature = 1;
        b->loss.ce_weight = 0;
    }
    const struct { const char *name; int nT, K; float T[3]; } cases[] = {{"T 1", 1, 64, {1}}, {"T 1 2 4", 3, 64, {1, 2, 4}}, {"T 1 2 3", 3, 64, {1, 2, 3}}, {"T 1 2 4, top-256", 3, 256, {1, 2, 4}}};
    void *ids = room(b, R * 256 * 4), *logprob = room(b, R * 256 * 4), *lse = room(b, R * 12), *tail = room(b, R * 12), *entropy = room(b, R * 4), *label = room(b, R * 4), *padding = room(b, R * 4);
    for (size_t i = 0; i < sizeof cases / sizeof *cases && wanted(b, "teacher_targets"); i++) {
        b->teacher = (struct teacher_targets){.nT = cases[i].nT, .temperatures = cases[i].T, .K = cases[i].K, .head_ids = ids, .head_logprob = logprob, .lse = lse, .tail_logmass = tail,
                                              .entropy = entropy, .label_logprob = label, .padding_mass = padding};
        double s = seconds(b, call_targets, 0.5);
        printf("{\"op\": \"teacher_targets top-%d %s 2048 x 152064\", \"ms\": %.4f, \"times_one_read\": %.3f}\n", cases[i].K, cases[i].name, s * 1e3, s / read);
        fflush(stdout);
    }
    if (wanted(b, "lm_head")) {
        double s = seconds(b, call_head, 3), flop = 6.0 * TOKENS * (double)C * (double)V;
        printf("{\"op\": \"lm_head and objective, forward and backward, 8192 x 3584 x 152064\", \"ms\": %.3f, \"tflop_per_s\": %.1f, \"share_of_products\": %.3f}\n", s * 1e3, flop / s * 1e-12,
               flop / s * 1e-12 / b->gemm_tflops);
        fflush(stdout);
    }
}

static void optimizer(struct bench *b)
{
    int64_t count = (int64_t)1 << 29;
    b->used = 0;
    b->n[0] = count;
    b->adamw = (struct adamw_args){.lr = 1e-5, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1, .step = 100, .clip = 1, .seed = 1};
    b->p[0] = normals(b, count, 0.02f); b->p[1] = normals(b, count, 1e-4f); b->p[2] = normals(b, count, 1e-4f); b->p[3] = room(b, (size_t)count * 2);
    b->op->fill_zero(b->be, b->p[3], (size_t)count * 2);
    b->p[4] = words32(b, 2, one_as_double);
    bandwidth(b, "adamw compact", call_adamw, 14.0 * (double)count);
    b->p[0] = room(b, 256);
    bandwidth(b, "sum_squares", call_squares, 2.0 * (double)count);
}

int main(int argc, char **argv)
{
    struct bench b = {.n_words = argc - 1, .words = argv + 1};
    const struct shape student = {"7B", 8192, 3584, 18944, 152064, 28, 4, 128}, teacher = {"72B", 16384, 8192, 29568, 152064, 64, 8, 128};
    if (backend_open(&b.be, &(struct backend_options){.device = "cuda"}) != OK) {
        fprintf(stderr, "bench_cuda: %s\n", fail_message());
        return ERR_USAGE;
    }
    b.op = b.be->ops;
    printf("{\"device\": \"%s\"}\n", b.be->description);
    CUDA_CHECK(cudaEventCreate(&b.begin));
    CUDA_CHECK(cudaEventCreate(&b.end));
    struct op_limits limits = {.N = 16384, .C = 8192, .F = 29568, .V = 152064, .chunk_rows = 2048, .max_doc = 16384, .Hq = 64, .Hkv = 8, .D = 128, .K = 256, .backward = true};
    b.be->scratch_bytes = b.op->scratch_bytes(b.be, &limits);
    b.be->scratch = b.op->alloc(b.be, b.be->scratch_bytes);
    b.arena_bytes = (size_t)14 << 30;
    b.arena = b.op->alloc(b.be, b.arena_bytes);
    CHECK(b.be->scratch && b.arena, "no room for the benchmark's 15 GiB");
    b.pool = xmalloc(POOL * sizeof *b.pool);
    #pragma omp parallel for
    for (int64_t i = 0; i < POOL; i++) {
        struct philox r = philox4x32(7, 0, (uint64_t)i);
        b.pool[i] = bf16_from_float(normal_float(r.v[0], r.v[1]));
    }
    rates(&b);
    pointwise(&b, &student);
    pointwise(&b, &teacher);
    optimizer(&b);
    objective(&b);
    attention(&b, &student, 4096);
    attention(&b, &student, 1024);
    attention(&b, &teacher, 4096);
    products(&b, &student);
    products(&b, &teacher);
    backend_close(b.be);
    return OK;
}
