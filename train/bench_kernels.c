/* distill bench kernels: how fast every op is at the shapes of a configuration, against the seam, so that it runs on any device. Ops that move memory stand beside
 * the device's own copy bandwidth, products and attention beside the rate of its products, both measured first, in the same run; products in fp8 beside a large
 * square one in fp8. Data is normal with the scale of trained models, never zeros, outputs included; arguments that would fit a cache exist several times and take
 * turns. */
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/rng.h"
#include "train/bench.h"

enum { MAX_ARGUMENTS = 12, MAX_TURNS = 8, HEAD_TOKENS = 8192, SQUARE_FP8_CPU = 1024, SQUARE_FP8 = 8192 /* rows: no more than HEAD_TOKENS */ };
static const double CACHE_CPU = 128 << 20, CACHE_GPU = 256 << 20;    /* bytes of one round of turns: past the caches */

struct buffer { char *base; size_t stride; };

struct kernels {
    struct bench b;
    struct memory_plan *plan;                 /* scratch alone: arguments come and go with the ops */
    const struct ops *op;
    bool teacher;                             /* forward ops at a teacher's pass; else all ops at a student's micro-batch */
    int n_words; char **words;
    int64_t N, C, F, V, Vv, S, R; int Hq, Hkv, D, K;   /* R: rows of logits at a time */
    double e, g, m, read, fp8;                /* widths in bytes; bytes/s of one read; FLOP/s of products in fp8, 0: not measured */
    int rc;                                   /* of the first failure; nothing is measured after it */
    /* the op being timed: arguments, and memory that goes with the next set */
    struct buffer p[MAX_ARGUMENTS];
    int turns; int64_t turn;
    void *owned[64]; int n_owned;
    int64_t n[3];
    struct attention_args attention;
    struct distill_targets targets;
    struct distill_args loss;
    struct teacher_targets out;
    struct sample_targets sample;
    struct adamw_args adamw;
};

static bool wanted(const struct kernels *k, const char *name) { return k->rc == OK && bench_wanted(name, k->n_words, k->words); }

/* ---- arguments ---- */

static void set_end(struct kernels *k)
{
    k->op->sync(k->b.be);
    for (int i = 0; i < k->n_owned; i++) k->op->release(k->b.be, k->owned[i]);
    k->n_owned = 0;
    memset(k->p, 0, sizeof k->p);
}

/* A new set of arguments, of which one call touches `bytes`. */
static void set_begin(struct kernels *k, double bytes)
{
    double turns = ceil((bench_on_cpu(&k->b) ? CACHE_CPU : CACHE_GPU) / bytes);
    set_end(k);
    k->turns = turns < 1 ? 1 : turns > MAX_TURNS ? MAX_TURNS : (int)turns;
    k->turn = 0;
}

static void *room(struct kernels *k, size_t bytes)
{
    void *p = k->rc == OK ? k->op->alloc(k->b.be, bytes) : NULL;
    CHECK(k->n_owned < (int)(sizeof k->owned / sizeof *k->owned), "more buffers in a set than there is room for");
    if (p) k->owned[k->n_owned++] = p;
    else if (k->rc == OK) k->rc = fail(ERR_IO, "device %s: no room for %.2f GiB more; measure a smaller shape", k->b.be->name, (double)bytes / 0x1p30);
    return p;
}

/* Argument i: room for `bytes`, once per turn, filled with normals of the device's type. Where floats or wider numbers are meant they are outputs, or moments whose
 * bits are as good as any. */
static void normals_at(struct kernels *k, int i, double bytes, float mean, float std)
{
    size_t stride = ((size_t)bytes + 255) / 256 * 256;
    k->p[i] = (struct buffer){room(k, stride * (size_t)k->turns), stride};
    if (k->p[i].base) bench_normals(k->b.be, k->p[i].base, stride * (size_t)k->turns, mean, std, 17 + (uint64_t)i);
}
static void normals(struct kernels *k, int i, double elements, float std) { normals_at(k, i, elements * k->e, 0, std); }
static void output(struct kernels *k, int i, double bytes) { normals_at(k, i, bytes, 0, 1); }

static void *words32(struct kernels *k, int64_t n, uint32_t (*value)(const struct kernels *, int64_t))
{
    void *to = room(k, (size_t)n * 4);
    if (!to) return NULL;
    uint32_t *host = xmalloc((size_t)n * 4);
    for (int64_t i = 0; i < n; i++) host[i] = value(k, i);
    k->op->upload(k->b.be, to, host, (size_t)n * 4);
    k->op->sync(k->b.be);
    free(host);
    return to;
}
/* the same for every turn */
static void words32_at(struct kernels *k, int i, int64_t n, uint32_t (*value)(const struct kernels *, int64_t)) { k->p[i] = (struct buffer){words32(k, n, value), 0}; }

static uint32_t bits_of(double x) { float f = (float)x; uint32_t u; memcpy(&u, &f, 4); return u; }
static uint32_t random_token(const struct kernels *k, int64_t i) { return philox4x32(1, 0, (uint64_t)i).v[0] % (uint32_t)k->Vv; }
static uint32_t in_row(const struct kernels *k, int64_t i) { return (uint32_t)(i % k->S); }
static uint32_t document_begin(const struct kernels *k, int64_t i) { return (uint32_t)(i * k->attention.max_doc); }
static uint32_t half_turn(const struct kernels *k, int64_t i) { (void)k; (void)i; return bits_of(0.70710678); }
static uint32_t head_id(const struct kernels *k, int64_t i) { return (uint32_t)(((i % k->K) * (k->Vv / k->K) + philox4x32(2, 0, (uint64_t)(i / k->K)).v[0]) % k->Vv); }
static uint32_t head_logprob(const struct kernels *k, int64_t i) { (void)i; return bits_of(log(0.9 / k->K)); }
static uint32_t tail_logmass(const struct kernels *k, int64_t i) { (void)k; (void)i; return bits_of(log(0.1)); }
static uint32_t one_as_double(const struct kernels *k, int64_t i) { (void)k; return i ? 0x3ff00000u : 0; }

/* ---- calls ---- */

static void *at(const struct kernels *k, int i) { return k->p[i].base + (size_t)(k->turn % k->turns) * k->p[i].stride; }
#define CALL(name) static void name(void *context)
#define OP struct kernels *k = context; k->turn++; k->op
#define BE k->b.be
#define HEADS k->Hq, k->Hkv, k->D

CALL(call_read) { OP->sum_squares(BE, at(k, 0), at(k, 1), k->n[0]); }
CALL(call_random) { OP->random_normal(BE, at(k, 0), k->n[0], 0, 1, 1, 0); }
CALL(call_zero) { OP->fill_zero(BE, at(k, 0), (size_t)k->n[0]); }
CALL(call_upload) { OP->upload(BE, at(k, 0), at(k, 1), (size_t)k->n[0]); k->op->sync(BE); }
CALL(call_download) { OP->download_async(BE, at(k, 1), at(k, 0), (size_t)k->n[0]); k->op->sync(BE); }
CALL(call_linear) { OP->linear_forward(BE, at(k, 0), at(k, 1), at(k, 2), k->p[3].base ? at(k, 3) : NULL, k->n[0], k->n[1], k->n[2]); }
CALL(call_linear_input) { OP->linear_backward_input(BE, at(k, 1), at(k, 0), at(k, 2), k->n[0], k->n[1], k->n[2]); }
CALL(call_linear_weight) { OP->linear_backward_weight(BE, at(k, 4), NULL, at(k, 0), at(k, 1), k->n[0], k->n[1], k->n[2]); }
/* A matrix in fp8 is one argument: its bytes, then its scales. */
static struct fp8 matrix(const struct kernels *k, int i, int64_t R, int64_t K)
{
    uint8_t *q = at(k, i);
    return (struct fp8){q, (float *)(void *)(q + (R * K + 255) / 256 * 256)};
}
enum { X8 = 5, DY8, W8, T8, ROUNDED };                        /* beside the matrices they are made of, at 1, 0 and 2; what an op writes rounded */
#define X_FP8 (struct fp8[]){matrix(k, X8, k->n[0], k->n[1])}
#define DY_FP8 (struct fp8[]){matrix(k, DY8, k->n[0], k->n[2])}
#define W_FP8 (struct fp8[]){matrix(k, W8, k->n[2], k->n[1])}
#define T_FP8 (struct fp8[]){matrix(k, T8, k->n[1], k->n[2])}
CALL(call_quantize_x) { OP->quantize(BE, X_FP8, at(k, 1), k->n[0], k->n[1]); }
CALL(call_quantize_dy) { OP->quantize(BE, DY_FP8, at(k, 0), k->n[0], k->n[2]); }
CALL(call_quantize_weight) { OP->quantize_weight(BE, W_FP8, T_FP8, at(k, 2), k->n[2], k->n[1]); }
CALL(call_linear_fp8) { OP->linear_forward_fp8(BE, at(k, 0), X_FP8, W_FP8, k->p[3].base ? at(k, 3) : NULL, k->n[0], k->n[1], k->n[2]); }
CALL(call_linear_input_fp8) { OP->linear_forward_fp8(BE, at(k, 1), DY_FP8, T_FP8, NULL, k->n[0], k->n[2], k->n[1]); }
CALL(call_linear_weight_fp8) { OP->linear_backward_weight_fp8(BE, at(k, 4), NULL, DY_FP8, X_FP8, k->n[0], k->n[1], k->n[2]); }
CALL(call_norm) { OP->rmsnorm_forward(BE, at(k, 0), at(k, 1), at(k, 2), at(k, 3), at(k, 4), at(k, 5), k->N, k->C, 1e-6f); }
CALL(call_norm_back) { OP->rmsnorm_backward(BE, at(k, 0), at(k, 6), at(k, 2), at(k, 3), at(k, 4), at(k, 5), at(k, 1), k->N, k->C); }
CALL(call_norm_fp8) { OP->rmsnorm_forward_fp8(BE, (struct fp8[]){matrix(k, ROUNDED, k->N, k->C)}, at(k, 1), at(k, 2), at(k, 3), at(k, 4), at(k, 5), k->N, k->C, 1e-6f); }
CALL(call_norm_back_fp8) { OP->rmsnorm_backward_fp8(BE, at(k, 0), (struct fp8[]){matrix(k, ROUNDED, k->N, k->C)}, at(k, 6), at(k, 2), at(k, 3), at(k, 4), at(k, 5), at(k, 1), k->N, k->C); }
CALL(call_qk_norm) { OP->qk_norm_forward(BE, at(k, 0), at(k, 1), at(k, 2), at(k, 3), at(k, 3), k->N, HEADS, 1e-6f); }
CALL(call_qk_norm_back) { OP->qk_norm_backward(BE, at(k, 4), at(k, 5), at(k, 5), at(k, 0), at(k, 2), at(k, 3), at(k, 3), at(k, 1), k->N, HEADS); }
CALL(call_rope) { OP->rope_forward(BE, at(k, 1), at(k, 2), at(k, 3), at(k, 0), at(k, 4), at(k, 4), at(k, 5), k->N, HEADS); }
CALL(call_rope_back) { OP->rope_backward(BE, at(k, 0), at(k, 1), at(k, 2), at(k, 3), at(k, 4), at(k, 4), at(k, 5), k->N, HEADS); }
CALL(call_rope_back_fp8) { OP->rope_backward_fp8(BE, (struct fp8[]){matrix(k, ROUNDED, k->N, (k->Hq + 2 * k->Hkv) * k->D)}, at(k, 0), at(k, 1), at(k, 2), at(k, 3), at(k, 4), at(k, 4), at(k, 5), k->N, HEADS); }
CALL(call_swiglu) { OP->swiglu_forward(BE, at(k, 0), at(k, 1), k->N, k->F); }
CALL(call_swiglu_back) { OP->swiglu_backward(BE, at(k, 2), at(k, 0), at(k, 1), k->N, k->F); }
CALL(call_swiglu_fp8) { OP->swiglu_forward_fp8(BE, (struct fp8[]){matrix(k, ROUNDED, k->N, k->F)}, at(k, 1), k->N, k->F); }
CALL(call_swiglu_back_fp8) { OP->swiglu_backward_fp8(BE, (struct fp8[]){matrix(k, ROUNDED, k->N, 2 * k->F)}, at(k, 0), at(k, 1), k->N, k->F); }
CALL(call_embed) { OP->embed_forward(BE, at(k, 0), at(k, 1), at(k, 2), k->N, k->C); }
CALL(call_embed_back) { OP->embed_backward(BE, at(k, 3), at(k, 0), at(k, 1), k->N, k->C, k->V); }
CALL(call_attention) { OP->attention_forward(BE, at(k, 3), at(k, 4), at(k, 0), at(k, 1), at(k, 2), &k->attention); }
CALL(call_attention_back) { OP->attention_backward(BE, at(k, 5), at(k, 6), at(k, 7), at(k, 8), at(k, 3), at(k, 4), at(k, 0), at(k, 1), at(k, 2), &k->attention); }
CALL(call_cached) { OP->attention_cached(BE, at(k, 0), at(k, 1), at(k, 2), at(k, 3), at(k, 4), at(k, 5), 1, k->S - 1, HEADS, k->attention.scale, 0); }
CALL(call_targets) { OP->teacher_targets(BE, &k->out, at(k, 1), k->targets.labels, k->R, k->V, k->Vv); }
CALL(call_sample) { OP->sample_targets(BE, &k->sample, at(k, 1), k->R, k->V, k->Vv); }
CALL(call_compare) { OP->compare_logits(BE, at(k, 0), at(k, 1), at(k, 2), k->targets.labels, k->R, k->V, k->V, k->Vv); }
CALL(call_adamw) { OP->adamw(BE, at(k, 0), BE->master ? at(k, 5) : NULL, at(k, 1), at(k, 2), at(k, 3), k->n[0], at(k, 4), &k->adamw); }
CALL(call_sum_rows) { OP->sum_rows(BE, at(k, 0), at(k, 1), k->n[0]); }

/* The loss overwrites its logits: they are copied in first, and that copy is timed apart. */
CALL(call_refill) { OP->copy(BE, at(k, 0), at(k, 1), (size_t)((double)(k->R * k->V) * k->e)); }
CALL(call_loss)
{
    struct kernels *k = context;
    call_refill(k);
    k->op->distill_loss(BE, at(k, 0), &(struct distill_losses){.kd = at(k, 2), .ce = at(k, 3)}, &k->targets, &k->loss, k->R, k->V, k->Vv);
}

/* What objective_run() does over HEAD_TOKENS positions; a teacher's chunks end in their targets. */
CALL(call_head)
{
    struct kernels *k = context;
    act *logits = at(k, 0), *w = at(k, 5);
    for (int64_t chunk = 0; chunk < HEAD_TOKENS; chunk += k->R) {
        int64_t rows = HEAD_TOKENS - chunk < k->R ? HEAD_TOKENS - chunk : k->R;
        size_t first = (size_t)((double)(chunk * k->C) * k->e);
        act *x = (act *)((char *)at(k, 4) + first);
        k->op->linear_forward(BE, logits, x, w, NULL, rows, k->C, k->V);
        if (k->teacher) { k->op->teacher_targets(BE, &k->out, logits, k->targets.labels, rows, k->V, k->Vv); continue; }
        k->op->distill_loss(BE, logits, &(struct distill_losses){.kd = at(k, 2), .ce = at(k, 3)}, &k->targets, &k->loss, rows, k->V, k->Vv);
        k->op->linear_backward_weight(BE, at(k, 6), NULL, logits, x, rows, k->C, k->V);
        k->op->linear_backward_input(BE, (act *)((char *)at(k, 7) + first), logits, w, rows, k->C, k->V);
    }
}

/* ---- figures ---- */

static double seconds(struct kernels *k, void (*call)(void *), double share) { return bench_seconds(k->b.be, call, k, share * k->b.c->bench_seconds); }

static void print(struct kernels *k, const char *name, double s, double rate, const char *unit, const char *share_name, double share)
{
    char said[32] = "";
    if (unit) snprintf(said, sizeof said, "%s", bench_quantity(rate, unit));
    printf("%-58s %11.4f ms  %13s  %s %.3f\n", name, 1e3 * s, said, share_name, share);
    bench_figure_more(&k->b, name, unit ? rate : 1e3 * s, unit ? unit : "ms", "ms", 1e3 * s, share_name, share);
}

static void bandwidth(struct kernels *k, const char *op, const char *detail, void (*call)(void *), double bytes)
{
    char name[96];
    if (!wanted(k, op)) return;
    snprintf(name, sizeof name, "%s %s", op, detail);
    double s = seconds(k, call, 0.025);
    print(k, name, s, bytes / s, "B/s", "share of copy", bytes / s / k->b.rates.copy);
}

static void arithmetic_beside(struct kernels *k, const char *op, const char *detail, void (*call)(void *), double flop, const char *share_name, double rate)
{
    char name[96];
    if (!wanted(k, op)) return;
    snprintf(name, sizeof name, "%s %s", op, detail);
    double s = seconds(k, call, 0.1);
    print(k, name, s, flop / s, "FLOP/s", share_name, flop / s / rate);
}
static void arithmetic(struct kernels *k, const char *op, const char *detail, void (*call)(void *), double flop)
{
    arithmetic_beside(k, op, detail, call, flop, "share of products", k->b.rates.product);
}

static void memory(struct kernels *k)
{
    double bytes = bench_on_cpu(&k->b) ? 0x1p27 : 0x1p30;
    set_begin(k, bytes);
    output(k, 0, bytes);
    output(k, 1, bytes);
    if (k->rc != OK) return;
    k->n[0] = (int64_t)(bytes / k->g);
    k->read = bytes / seconds(k, call_read, 0.025);
    print(k, "one read (sum_squares)", bytes / k->read, k->read, "B/s", "share of copy", k->read / k->b.rates.copy);
    k->n[0] = (int64_t)(bytes / k->e) / 16;                   /* ten rounds of integers an element: slow on a CPU */
    bandwidth(k, "random_normal", "", call_random, (double)k->n[0] * k->e);
    k->n[0] = (int64_t)bytes;
    bandwidth(k, "fill_zero", "", call_zero, bytes);
    void *pinned = wanted(k, "upload") || wanted(k, "download_async") ? k->op->alloc_host(k->b.be, (size_t)bytes) : NULL;
    if (!pinned) return;
    k->op->download(k->b.be, pinned, k->p[1].base, (size_t)bytes);
    k->p[1] = (struct buffer){pinned, 0};
    bandwidth(k, "upload", "from pinned host memory", call_upload, bytes);
    bandwidth(k, "download_async", "to pinned host memory", call_download, bytes);
    k->op->sync(k->b.be);
    k->op->release_host(k->b.be, pinned);
}

static bool fp8_wanted(const struct kernels *k, const char *name) { return k->b.be->fp8 && wanted(k, name); }

static bool rounding_wanted(const struct kernels *k)
{
    static const char *const names[] = {"rmsnorm_forward_fp8", "rmsnorm_backward_fp8", "rope_backward_fp8", "swiglu_forward_fp8", "swiglu_backward_fp8"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) if (fp8_wanted(k, names[i])) return true;
    return false;
}

/* Rows of an op that writes them rounded, `width` wide; its argument is there only where it is measured. */
static bool rounds(struct kernels *k, const char *name, int64_t width)
{
    if (!fp8_wanted(k, name) || width % k->b.be->fp8_multiple || (k->b.be->fp8_widest && width > k->b.be->fp8_widest)) return false;
    output(k, ROUNDED, (double)k->N * ((double)width + 4) + 256);
    return k->rc == OK;
}

static void pointwise(struct kernels *k)
{
    char detail[64];
    double N = (double)k->N, C = (double)k->C, F = (double)k->F, q = (double)(k->Hq * k->D), kv = (double)(k->Hkv * k->D), row = q + 2 * kv, e = k->e;
    if (wanted(k, "rmsnorm_forward") || wanted(k, "rmsnorm_backward") || fp8_wanted(k, "rmsnorm_forward_fp8") || fp8_wanted(k, "rmsnorm_backward_fp8")) {
        snprintf(detail, sizeof detail, "%lld x %lld", (long long)k->N, (long long)k->C);
        set_begin(k, 4 * N * C * e);
        output(k, 0, N * C * e); output(k, 1, N * 4); normals(k, 2, N * C, 1); normals(k, 3, N * C, 1); normals(k, 4, N * C, 1); normals(k, 5, C, 1); output(k, 6, C * k->g);
        for (int i = 0; i < k->turns && k->rc == OK; i++) call_norm(k);    /* backward reads rstd, also where forward was not wanted */
        bandwidth(k, "rmsnorm_forward", detail, call_norm, 4 * N * C * e);
        if (!k->teacher) bandwidth(k, "rmsnorm_backward", detail, call_norm_back, 4 * N * C * e);
        if (rounds(k, "rmsnorm_forward_fp8", k->C)) bandwidth(k, "rmsnorm_forward_fp8", detail, call_norm_fp8, N * C * (3 * e + 1));
        if (!k->teacher && rounds(k, "rmsnorm_backward_fp8", k->C)) bandwidth(k, "rmsnorm_backward_fp8", detail, call_norm_back_fp8, N * C * (4 * e + 1));
    }
    snprintf(detail, sizeof detail, "%lld x (%d + 2 x %d) x %d", (long long)k->N, k->Hq, k->Hkv, k->D);
    if (wanted(k, "qk_norm_forward") || wanted(k, "qk_norm_backward")) {
        set_begin(k, 2 * N * row * e);
        output(k, 0, N * row * e); output(k, 1, N * (k->Hq + k->Hkv) * 4); normals(k, 2, N * row, 1); normals(k, 3, k->D, 1); output(k, 4, N * row * e); output(k, 5, k->D * k->g);
        for (int i = 0; i < k->turns && k->rc == OK; i++) call_qk_norm(k);
        bandwidth(k, "qk_norm_forward", detail, call_qk_norm, 2 * N * row * e);
        if (!k->teacher) bandwidth(k, "qk_norm_backward", detail, call_qk_norm_back, N * (3 * (q + kv) + 2 * kv) * e);
    }
    if (wanted(k, "rope_forward") || wanted(k, "rope_backward") || fp8_wanted(k, "rope_backward_fp8")) {
        set_begin(k, 2 * N * row * e);
        normals(k, 0, N * row, 1); normals(k, 1, N * q, 1); normals(k, 2, N * kv, 1); normals(k, 3, N * kv, 1);
        words32_at(k, 4, k->S * k->D / 2, half_turn);
        words32_at(k, 5, k->N, in_row);
        bandwidth(k, "rope_forward", detail, call_rope, 2 * N * row * e);
        if (!k->teacher) bandwidth(k, "rope_backward", detail, call_rope_back, 2 * N * row * e);
        if (!k->teacher && rounds(k, "rope_backward_fp8", (int64_t)row)) bandwidth(k, "rope_backward_fp8", detail, call_rope_back_fp8, N * row * (e + 1));
    }
    if (wanted(k, "swiglu_forward") || wanted(k, "swiglu_backward") || fp8_wanted(k, "swiglu_forward_fp8") || fp8_wanted(k, "swiglu_backward_fp8")) {
        snprintf(detail, sizeof detail, "%lld x %lld", (long long)k->N, (long long)k->F);
        set_begin(k, 3 * N * F * e);
        normals(k, 0, N * F, 1); normals(k, 1, 2 * N * F, 1);
        if (!k->teacher) output(k, 2, 2 * N * F * e);
        if (!k->teacher) bandwidth(k, "swiglu_backward", detail, call_swiglu_back, 5 * N * F * e);
        bandwidth(k, "swiglu_forward", detail, call_swiglu, 3 * N * F * e);
        if (!k->teacher && rounds(k, "swiglu_backward_fp8", 2 * k->F)) bandwidth(k, "swiglu_backward_fp8", detail, call_swiglu_back_fp8, N * F * (3 * e + 2));
        if (rounds(k, "swiglu_forward_fp8", k->F)) bandwidth(k, "swiglu_forward_fp8", detail, call_swiglu_fp8, N * F * (2 * e + 1));
    }
    if (wanted(k, "embed_forward") || wanted(k, "embed_backward")) {
        snprintf(detail, sizeof detail, "%lld x %lld of %lld", (long long)k->N, (long long)k->C, (long long)k->V);
        set_begin(k, CACHE_GPU);                             /* the table is wider than any cache */
        normals(k, 0, N * C, 0.02f); words32_at(k, 1, k->N, random_token); normals(k, 2, (double)k->V * C, 0.02f);
        if (!k->teacher) { output(k, 3, (double)k->V * C * k->g); bandwidth(k, "embed_backward", detail, call_embed_back, N * C * (e + 2 * k->g)); }
        bandwidth(k, "embed_forward", detail, call_embed, 2 * N * C * e);
    }
}

static void attention(struct kernels *k, int64_t length)
{
    if (!wanted(k, "attention_forward") && !wanted(k, "attention_backward") && !wanted(k, "attention_cached")) return;
    char detail[96];
    int64_t documents = k->N / length, N = documents * length;
    double q = (double)(N * k->Hq * k->D), kv = (double)(N * k->Hkv * k->D), flop = 4 * q * (double)length / 2, cache = (double)(k->S * k->Hkv * k->D);
    set_begin(k, (2 * q + 2 * kv) * k->e);
    k->attention = (struct attention_args){.n_docs = documents, .max_doc = length, .N = N, .Hq = k->Hq, .Hkv = k->Hkv, .D = k->D, .scale = 1 / sqrtf((float)k->D)};
    k->attention.doc_begin = words32(k, documents + 1, document_begin);
    normals(k, 0, q, 1); normals(k, 1, kv, 1); normals(k, 2, kv, 1); output(k, 3, q * k->e); output(k, 4, (double)(N * k->Hq) * 4);
    if (!k->teacher) { output(k, 5, q * k->e); output(k, 6, kv * k->e); output(k, 7, kv * k->e); normals(k, 8, q, 0.01f); }
    for (int i = 0; i < k->turns && k->rc == OK; i++) call_attention(k);   /* backward reads its results */
    snprintf(detail, sizeof detail, "%lld x %lld tokens, %d/%d heads of %d", (long long)documents, (long long)length, k->Hq, k->Hkv, k->D);
    arithmetic(k, "attention_forward", detail, call_attention, flop);
    if (!k->teacher) arithmetic(k, "attention_backward", detail, call_attention_back, 2.5 * flop);
    if (length != k->S || !wanted(k, "attention_cached")) return;
    set_begin(k, 2 * cache * k->e);
    output(k, 0, k->Hq * k->D * k->e); normals(k, 1, cache, 1); normals(k, 2, cache, 1); normals(k, 3, k->Hq * k->D, 1); normals(k, 4, k->Hkv * k->D, 1); normals(k, 5, k->Hkv * k->D, 1);
    snprintf(detail, sizeof detail, "1 token after %lld", (long long)k->S - 1);
    bandwidth(k, "attention_cached", detail, call_cached, 2 * cache * k->e);
}

static bool products_fp8_wanted(const struct kernels *k)
{
    static const char *const names[] = {"quantize", "quantize_weight", "linear_forward_fp8", "linear_backward_input_fp8", "linear_backward_weight_fp8"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) if (fp8_wanted(k, names[i])) return true;
    return false;
}

/* The layer whose product in the activations' type was just measured. A weight's two layouts count as one read and two writes, though its columns' scales ask for a second look. */
static void layer_fp8(struct kernels *k, const char *layer, int64_t layer_C, int64_t layer_O, bool bias)
{
    char detail[96], x_detail[96], dy_detail[96], weight_detail[96];
    double N = (double)k->N, C = (double)layer_C, O = (double)layer_O, flop = 2 * N * C * O;
    if (layer_C % k->b.be->fp8_multiple || layer_O % k->b.be->fp8_multiple) return;
    set_begin(k, N * C + N * O * k->e + C * O);
    k->n[0] = k->N; k->n[1] = layer_C; k->n[2] = layer_O;
    normals(k, 0, N * O, 0.1f); normals(k, 1, N * C, 1); normals(k, 2, O * C, 0.02f);
    if (bias) normals(k, 3, O, 0.1f);
    if (!k->teacher) normals_at(k, 4, O * C * k->g, 0, 0.01f);
    if (!k->teacher) output(k, DY8, N * (O + 4) + 256);
    output(k, X8, N * (C + 4) + 256); output(k, W8, O * (C + 4) + 256); output(k, T8, C * (O + 4) + 256);
    for (int i = 0; i < k->turns && k->rc == OK; i++) {       /* what the products read; a call takes the next turn */
        int64_t turn = k->turn;
        call_quantize_x(k); k->turn = turn;
        if (!k->teacher) call_quantize_dy(k);
        k->turn = turn;
        call_quantize_weight(k);
    }
    snprintf(detail, sizeof detail, "%s %lld x %lld x %lld", layer, (long long)k->N, (long long)layer_C, (long long)layer_O);
    snprintf(x_detail, sizeof x_detail, "%s x %lld x %lld", layer, (long long)k->N, (long long)layer_C);
    snprintf(dy_detail, sizeof dy_detail, "%s dy %lld x %lld", layer, (long long)k->N, (long long)layer_O);
    snprintf(weight_detail, sizeof weight_detail, "%s %lld x %lld", layer, (long long)layer_O, (long long)layer_C);
    arithmetic_beside(k, "linear_forward_fp8", detail, call_linear_fp8, flop, "share of fp8 products", k->fp8);
    if (!k->teacher) {
        arithmetic_beside(k, "linear_backward_weight_fp8", detail, call_linear_weight_fp8, flop, "share of fp8 products", k->fp8);
        arithmetic_beside(k, "linear_backward_input_fp8", detail, call_linear_input_fp8, flop, "share of fp8 products", k->fp8);
        bandwidth(k, "quantize", dy_detail, call_quantize_dy, N * O * (k->e + 1));
    }
    bandwidth(k, "quantize", x_detail, call_quantize_x, N * C * (k->e + 1));
    bandwidth(k, "quantize_weight", weight_detail, call_quantize_weight, O * C * (k->e + 2));
}

/* What a large square product in fp8 sustains: the figure that the layers' stand beside. */
static void rate_fp8(struct kernels *k)
{
    int64_t square = bench_on_cpu(&k->b) ? SQUARE_FP8_CPU : SQUARE_FP8;
    double n = (double)square;
    if (!products_fp8_wanted(k)) return;
    set_begin(k, CACHE_GPU);
    k->n[0] = k->n[1] = k->n[2] = square;
    normals(k, 0, n * n, 0.1f); normals(k, 1, n * n, 1); normals(k, 2, n * n, 0.02f);
    output(k, X8, n * (n + 4) + 256); output(k, W8, n * (n + 4) + 256); output(k, T8, n * (n + 4) + 256);
    if (k->rc != OK) return;
    call_quantize_x(k);
    call_quantize_weight(k);
    double s = seconds(k, call_linear_fp8, 0.15);
    k->fp8 = 2 * n * n * n / s;
    char name[96];
    snprintf(name, sizeof name, "square product in fp8 %lld^3", (long long)square);
    print(k, name, s, k->fp8, "FLOP/s", "times products", k->fp8 / k->b.rates.product);
}

static void products(struct kernels *k)
{
    const struct { const char *name; int64_t C, O; float scale; } list[] = {
        {"qkv", k->C, (k->Hq + 2 * k->Hkv) * k->D, 0.02f}, {"o", k->Hq * k->D, k->C, 0.02f}, {"gate_up", k->C, 2 * k->F, 0.02f}, {"down", k->F, k->C, 0.02f}};
    bool fp8 = products_fp8_wanted(k);
    if (!wanted(k, "linear_forward") && !wanted(k, "linear_backward_weight") && !wanted(k, "linear_backward_input") && !fp8) return;
    rate_fp8(k);
    for (size_t i = 0; i < sizeof list / sizeof *list && k->rc == OK; i++) {
        char detail[96];
        double N = (double)k->N, C = (double)list[i].C, O = (double)list[i].O, flop = 2 * N * C * O;
        set_begin(k, (N * C + N * O + C * O) * k->e);
        k->n[0] = k->N; k->n[1] = list[i].C; k->n[2] = list[i].O;
        normals(k, 0, N * O, 0.1f); normals(k, 1, N * C, 1); normals(k, 2, O * C, list[i].scale);
        if (!i && k->b.config->qkv_bias) normals(k, 3, O, 0.1f);
        if (!k->teacher) normals_at(k, 4, O * C * k->g, 0, 0.01f);
        snprintf(detail, sizeof detail, "%s %lld x %lld x %lld", list[i].name, (long long)k->N, (long long)list[i].C, (long long)list[i].O);
        arithmetic(k, "linear_forward", detail, call_linear, flop);
        if (!k->teacher) {
            arithmetic(k, "linear_backward_weight", detail, call_linear_weight, flop);
            arithmetic(k, "linear_backward_input", detail, call_linear_input, flop);
        }
        if (fp8) layer_fp8(k, list[i].name, list[i].C, list[i].O, !i && k->b.config->qkv_bias);
    }
}

/* Loss, targets, draws and comparison over a chunk of logits. A loss reads its logits and writes their gradient: times that is its figure; the others: times one read. */
static void logits(struct kernels *k)
{
    char name[96];
    double R = (double)k->R, V = (double)k->V, bytes = R * V * k->e, read = bytes / k->read, read_write = 2 * bytes / k->b.rates.copy;
    const struct { const char *name; int nT, K; float T[3]; } cases[] = {{"T 1", 1, 64, {1}}, {"T 1 2 4", 3, 64, {1, 2, 4}}, {"T 1 2 3", 3, 64, {1, 2, 3}}, {"T 1 2 4", 3, 256, {1, 2, 4}}};
    if (!wanted(k, "distill_loss") && !wanted(k, "teacher_targets") && !wanted(k, "sample_targets") && !wanted(k, "compare_logits")) return;
    set_begin(k, bytes);
    k->targets = (struct distill_targets){.kind = TARGET_TOPK, .K = k->K, .labels = words32(k, k->R, random_token), .head_ids = words32(k, k->R * k->K, head_id),
                                          .head_logprob = words32(k, k->R * k->K, head_logprob), .tail_logmass = words32(k, k->R, tail_logmass)};
    k->loss = (struct distill_args){.divergence = DIV_FORWARD_KL, .tail = TAIL_BUCKET, .temperature = 1, .kd_weight = 1, .gradient_scale = 1.0f / 65536};
    output(k, 0, bytes); normals(k, 1, R * V, 2.5f); output(k, 2, bytes);
    output(k, 3, R * 4); output(k, 4, R * (double)sizeof(struct eval_row));
    if (!k->teacher && wanted(k, "distill_loss")) {
        struct buffer wide = k->p[2];
        k->p[2] = k->p[4];                                    /* kd, ce: [R] */
        double refill = seconds(k, call_refill, 0.025);
        for (int i = 0; i < 2; i++) {
            if (i) { k->loss.temperature = 2; k->loss.ce_weight = 0.5f; }
            double s = seconds(k, call_loss, 0.025) - refill;
            snprintf(name, sizeof name, "distill_loss top-%d%s %lld x %lld", k->K, i ? " T 2 with cross entropy" : "", (long long)k->R, (long long)k->V);
            print(k, name, s, 2 * bytes / s, "B/s", "times one read and write", s / read_write);
        }
        k->p[2] = wide;
    }
    void *ids = room(k, (size_t)k->R * 256 * 4), *logprob = room(k, (size_t)k->R * 256 * 4), *lse = room(k, (size_t)k->R * 12), *tail = room(k, (size_t)k->R * 12), *entropy = room(k, (size_t)k->R * 4),
         *label = room(k, (size_t)k->R * 4), *padding = room(k, (size_t)k->R * 4);
    for (size_t i = 0; i < sizeof cases / sizeof *cases && wanted(k, "teacher_targets"); i++) {
        int K = cases[i].K < k->Vv ? cases[i].K : (int)k->Vv;
        k->out = (struct teacher_targets){.nT = cases[i].nT, .temperatures = cases[i].T, .K = K, .head_ids = ids, .head_logprob = logprob, .lse = lse, .tail_logmass = tail,
                                          .entropy = entropy, .label_logprob = label, .padding_mass = padding};
        double s = seconds(k, call_targets, 0.025);
        snprintf(name, sizeof name, "teacher_targets top-%d %s %lld x %lld", K, cases[i].name, (long long)k->R, (long long)k->V);
        print(k, name, s, bytes / s, "B/s", "times one read", s / read);
    }
    for (int hybrid = 1; hybrid >= 0 && wanted(k, "sample_targets"); hybrid--) {    /* as teacher-dump draws for the two kinds; what lse holds is of no weight */
        int64_t D = hybrid ? k->b.c->shards_m : k->b.c->shards_draws, K = hybrid ? k->K : 0;
        k->sample = (struct sample_targets){.draws = (int)D, .ids = room(k, (size_t)(k->R * D) * 4), .count = room(k, (size_t)(k->R * D)), .logprob = hybrid ? room(k, (size_t)(k->R * D) * 4) : NULL, .K = (int)K,
                                            .head_ids = hybrid ? k->targets.head_ids : NULL, .lse = hybrid ? k->targets.tail_logmass : NULL, .nT = 1, .temperature = 1, .seed = 1, .row_length = k->S};
        double s = seconds(k, call_sample, 0.025);
        if (hybrid) snprintf(name, sizeof name, "sample_targets %d draws beside a head of %d, %lld x %lld", (int)D, (int)K, (long long)k->R, (long long)k->V);
        else snprintf(name, sizeof name, "sample_targets %d draws from everything, %lld x %lld", (int)D, (long long)k->R, (long long)k->V);
        print(k, name, s, bytes / s, "B/s", "times one read", s / read);
    }
    if (wanted(k, "compare_logits")) {
        k->p[0] = k->p[4];
        double s = seconds(k, call_compare, 0.025);
        snprintf(name, sizeof name, "compare_logits %lld x %lld, two models", (long long)k->R, (long long)k->V);
        print(k, name, s, 2 * bytes / s, "B/s", "times one read of both", s / (2 * read));
    }
}

/* In the loop that train and teacher-dump run, chunk by chunk. */
static void head(struct kernels *k)
{
    char name[96];
    static const float T = 1;
    double R = (double)k->R, V = (double)k->V, C = (double)k->C, n = HEAD_TOKENS, flop = (k->teacher ? 2 : 6) * n * C * V;
    if (!wanted(k, "lm_head")) return;
    set_begin(k, CACHE_GPU);
    k->targets.labels = words32(k, k->R, random_token);
    output(k, 0, R * V * k->e); normals(k, 4, n * C, 1); normals(k, 5, V * C, 0.02f); output(k, 2, R * 4); output(k, 3, R * 4);
    if (k->teacher) {
        k->out = (struct teacher_targets){.nT = 1, .temperatures = &T, .K = k->K, .head_ids = room(k, (size_t)(k->R * k->K) * 4), .head_logprob = room(k, (size_t)(k->R * k->K) * 4),
                                          .lse = room(k, (size_t)k->R * 4), .tail_logmass = room(k, (size_t)k->R * 4), .entropy = room(k, (size_t)k->R * 4),
                                          .label_logprob = room(k, (size_t)k->R * 4), .padding_mass = room(k, (size_t)k->R * 4)};
        snprintf(name, sizeof name, "lm_head and targets, %d x %lld x %lld", HEAD_TOKENS, (long long)k->C, (long long)k->V);
    } else {
        k->targets = (struct distill_targets){.kind = TARGET_TOPK, .K = k->K, .labels = k->targets.labels, .head_ids = words32(k, k->R * k->K, head_id),
                                              .head_logprob = words32(k, k->R * k->K, head_logprob), .tail_logmass = words32(k, k->R, tail_logmass)};
        k->loss = (struct distill_args){.divergence = DIV_FORWARD_KL, .tail = TAIL_BUCKET, .temperature = 1, .kd_weight = 1, .gradient_scale = 1.0f / 65536};
        normals_at(k, 6, V * C * k->g, 0, 0.0001f);
        output(k, 7, n * C * k->e);
        snprintf(name, sizeof name, "lm_head and objective, both ways, %d x %lld x %lld", HEAD_TOKENS, (long long)k->C, (long long)k->V);
    }
    if (k->rc != OK) return;
    double s = seconds(k, call_head, 0.15);
    print(k, name, s, flop / s, "FLOP/s", "share of products", flop / s / k->b.rates.product);
}

static void optimizer(struct kernels *k)
{
    double count = bench_on_cpu(&k->b) ? 0x1p24 : 0x1p29, rows = (double)k->R;
    if (!wanted(k, "adamw") && !wanted(k, "sum_squares") && !wanted(k, "sum_rows")) return;
    bool master = k->b.be->master;
    set_begin(k, count * (k->e + k->g + 2 * k->m + (master ? 4 : 0)));
    k->n[0] = (int64_t)count;
    k->adamw = (struct adamw_args){.lr = 1e-5, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1, .step = 100, .clip = 1, .seed = 1};
    normals(k, 0, count, 0.02f); normals_at(k, 1, count * k->g, 0, 1e-4f); normals_at(k, 2, count * k->m, 0, 1e-4f);
    normals_at(k, 3, count * k->m, 1e-8f, 1e-9f);             /* second moments: positive */
    words32_at(k, 4, 2, one_as_double);
    if (master) normals_at(k, 5, count * 4, 0, 0.02f);
    bandwidth(k, "adamw", master ? "with a master" : "", call_adamw, count * ((master ? k->e + 8 : 2 * k->e) + k->g + 4 * k->m));
    words32_at(k, 0, 2, one_as_double);
    bandwidth(k, "sum_squares", "of gradients", call_read, count * k->g);
    k->n[0] = k->R;
    bandwidth(k, "sum_rows", "of a chunk's losses", call_sum_rows, rows * 4);
}

int bench_kernels(const struct config *c, const char *shape, bool teacher, int n_words, char **words)
{
    struct kernels k = {.teacher = teacher, .n_words = n_words, .words = words};
    struct bench *b = &k.b;
    int rc = OK;
    TRY(bench_open(b, "kernels", c, shape));
    const struct model_config *m = b->config;
    k.op = b->be->ops;
    k.S = c->corpus_row_length;
    k.N = teacher ? bench_teacher_positions(b) : c->train_micro_rows * k.S;
    k.C = m->hidden_size; k.F = m->intermediate_size; k.V = m->vocab_size; k.Vv = k.V - k.V / 400;       /* some columns are padding, as in most heads */
    k.R = teacher ? c->dump_chunk_tokens : c->train_chunk_tokens;
    k.Hq = m->n_heads; k.Hkv = m->n_kv_heads; k.D = m->head_dim;
    k.K = c->shards_k < k.Vv ? (int)c->shards_k : (int)k.Vv;
    k.e = (double)dtype_width(b->be->act_dtype); k.g = (double)dtype_width(b->be->grad_dtype); k.m = (double)dtype_width(b->be->moment_dtype);
    TRY(bench_rates(b, k.N));
    struct op_limits limits = {.N = k.N > HEAD_TOKENS ? k.N : HEAD_TOKENS, .C = k.C, .F = k.F, .V = k.V, .chunk_rows = k.R, .max_doc = k.S, .Hq = k.Hq, .Hkv = k.Hkv, .D = k.D, .K = 256,
                               .backward = !teacher, .fp8 = products_fp8_wanted(&k) || rounding_wanted(&k)};
    k.plan = memory_plan_new(b->be);
    memory_add_scratch(k.plan, k.op->scratch_bytes(b->be, &limits));
    TRY(memory_commit(k.plan, (size_t)(c->memory_limit_gib * 0x1p30)));
    memory(&k);
    pointwise(&k);
    if (!teacher) optimizer(&k);
    logits(&k);
    head(&k);
    attention(&k, k.S);
    if (k.S >= 4) attention(&k, k.S / 4);
    products(&k);
    rc = k.rc;
out:
    if (b->be) set_end(&k);
    memory_plan_free(k.plan);
    bench_close(b);
    return rc;
}
