/* See timed.h. The timed table is the inner one with the ops below put in front; an op that is not listed is simply not timed. */
#include "kernels/timed.h"

#include "base/error.h"

const char *const time_phase_names[PHASE_COUNT] = {"products", "attention", "norm and pointwise", "rounding to fp8", "LM head and objective", "optimizer", "embedding and other"};

enum timed_name { LINEAR_FORWARD, LINEAR_BACKWARD_INPUT, LINEAR_BACKWARD_WEIGHT, ATTENTION_FORWARD, ATTENTION_BACKWARD, RMSNORM_FORWARD, RMSNORM_BACKWARD, QK_NORM_FORWARD,
                  QK_NORM_BACKWARD, ROPE_FORWARD, ROPE_BACKWARD, SWIGLU_FORWARD, SWIGLU_BACKWARD, RMSNORM_FORWARD_FP8, RMSNORM_BACKWARD_FP8, ROPE_BACKWARD_FP8, SWIGLU_FORWARD_FP8, SWIGLU_BACKWARD_FP8, QUANTIZE, QUANTIZE_WEIGHT, FORWARD_FP8, BACKWARD_WEIGHT_FP8, FP8_COUNT, HEAD_FORWARD, HEAD_BACKWARD_INPUT, HEAD_BACKWARD_WEIGHT, DISTILL_LOSS,
                  TEACHER_TARGETS, SAMPLE_TARGETS, SUM_ROWS, SUM_SQUARES, ADAMW, EMBED_FORWARD, EMBED_BACKWARD, FILL_ZERO, COPY, UPLOAD, DOWNLOAD, DOWNLOAD_ASYNC, TIMED_COUNT };

static const struct timed_op names[TIMED_COUNT] = {
    [LINEAR_FORWARD] = {"linear_forward", PHASE_GEMM, 0, 0}, [LINEAR_BACKWARD_INPUT] = {"linear_backward_input", PHASE_GEMM, 0, 0},
    [LINEAR_BACKWARD_WEIGHT] = {"linear_backward_weight", PHASE_GEMM, 0, 0}, [ATTENTION_FORWARD] = {"attention_forward", PHASE_ATTENTION, 0, 0},
    [ATTENTION_BACKWARD] = {"attention_backward", PHASE_ATTENTION, 0, 0}, [RMSNORM_FORWARD] = {"rmsnorm_forward", PHASE_POINTWISE, 0, 0},
    [RMSNORM_BACKWARD] = {"rmsnorm_backward", PHASE_POINTWISE, 0, 0}, [QK_NORM_FORWARD] = {"qk_norm_forward", PHASE_POINTWISE, 0, 0},
    [QK_NORM_BACKWARD] = {"qk_norm_backward", PHASE_POINTWISE, 0, 0}, [ROPE_FORWARD] = {"rope_forward", PHASE_POINTWISE, 0, 0}, [ROPE_BACKWARD] = {"rope_backward", PHASE_POINTWISE, 0, 0},
    [SWIGLU_FORWARD] = {"swiglu_forward", PHASE_POINTWISE, 0, 0}, [SWIGLU_BACKWARD] = {"swiglu_backward", PHASE_POINTWISE, 0, 0},
    [RMSNORM_FORWARD_FP8] = {"rmsnorm_forward_fp8", PHASE_POINTWISE, 0, 0}, [RMSNORM_BACKWARD_FP8] = {"rmsnorm_backward_fp8", PHASE_POINTWISE, 0, 0}, [ROPE_BACKWARD_FP8] = {"rope_backward_fp8", PHASE_POINTWISE, 0, 0}, [SWIGLU_FORWARD_FP8] = {"swiglu_forward_fp8", PHASE_POINTWISE, 0, 0},
    [SWIGLU_BACKWARD_FP8] = {"swiglu_backward_fp8", PHASE_POINTWISE, 0, 0}, [HEAD_FORWARD] = {"head forward", PHASE_HEAD, 0, 0},
    [HEAD_BACKWARD_INPUT] = {"head backward_input", PHASE_HEAD, 0, 0}, [HEAD_BACKWARD_WEIGHT] = {"head backward_weight", PHASE_HEAD, 0, 0}, [DISTILL_LOSS] = {"distill_loss", PHASE_HEAD, 0, 0},
    [TEACHER_TARGETS] = {"teacher_targets", PHASE_HEAD, 0, 0}, [SAMPLE_TARGETS] = {"sample_targets", PHASE_HEAD, 0, 0}, [SUM_ROWS] = {"sum_rows", PHASE_HEAD, 0, 0}, [SUM_SQUARES] = {"sum_squares", PHASE_OPTIMIZER, 0, 0},
    [ADAMW] = {"adamw", PHASE_OPTIMIZER, 0, 0}, [EMBED_FORWARD] = {"embed_forward", PHASE_OTHER, 0, 0}, [EMBED_BACKWARD] = {"embed_backward", PHASE_OTHER, 0, 0},
    [FILL_ZERO] = {"fill_zero", PHASE_OTHER, 0, 0}, [COPY] = {"copy", PHASE_OTHER, 0, 0}, [UPLOAD] = {"upload", PHASE_OTHER, 0, 0}, [DOWNLOAD] = {"download", PHASE_OTHER, 0, 0},
    [DOWNLOAD_ASYNC] = {"download_async", PHASE_OTHER, 0, 0},
    [QUANTIZE] = {"quantize", PHASE_QUANTIZE, 0, 0}, [QUANTIZE_WEIGHT] = {"quantize_weight", PHASE_QUANTIZE, 0, 0}, [FP8_COUNT] = {"fp8_count", PHASE_QUANTIZE, 0, 0},
    [FORWARD_FP8] = {"linear_forward_fp8", PHASE_GEMM, 0, 0}, [BACKWARD_WEIGHT_FP8] = {"linear_backward_weight_fp8", PHASE_GEMM, 0, 0},
};

struct timed {
    struct backend be;                        /* first: an op gets it, and inner's state with it, so that ops that are not timed work as they are */
    struct backend *inner;
    struct ops ops;
    int64_t head_columns;
    struct timed_op op[TIMED_COUNT], called[TIMED_COUNT];
    unsigned char pending[TIMED_MAX_CALLS]; int n;   /* call i, not collected yet, between marks TIMED_FIRST_MARK + 2i and + 2i + 1 */
};

static void collect(struct timed *t)
{
    t->inner->ops->sync(t->inner);
    for (int i = 0; i < t->n; i++) {
        struct timed_op *op = &t->op[t->pending[i]];
        op->seconds += t->inner->ops->seconds_between(t->inner, TIMED_FIRST_MARK + 2 * i, TIMED_FIRST_MARK + 2 * i + 1);
        op->calls++;
    }
    t->n = 0;
}

static struct timed *before(struct backend *be, enum timed_name op)
{
    struct timed *t = (struct timed *)be;
    if (t->n == TIMED_MAX_CALLS) collect(t);
    t->pending[t->n] = (unsigned char)op;
    t->inner->ops->mark(t->inner, TIMED_FIRST_MARK + 2 * t->n);
    return t;
}

static void after(struct timed *t)
{
    t->inner->ops->mark(t->inner, TIMED_FIRST_MARK + 2 * t->n + 1);
    t->n++;
}

/* TIMED(op of the table, its name above, parameters after the backend, the same as arguments) */
#define UNWRAP(...) __VA_ARGS__
#define TIMED(op, name, parameters, arguments) static void timed_##op(struct backend *be, UNWRAP parameters) \
    { struct timed *t = before(be, name); t->inner->ops->op(t->inner, UNWRAP arguments); after(t); }
#define HEAD_OR(name) (O == ((struct timed *)be)->head_columns ? HEAD_##name : LINEAR_##name)

TIMED(linear_forward, HEAD_OR(FORWARD), (act *y, const act *x, const act *w, const act *bias, int64_t N, int64_t C, int64_t O), (y, x, w, bias, N, C, O))
TIMED(linear_backward_input, HEAD_OR(BACKWARD_INPUT), (act *dx, const act *dy, const act *w, int64_t N, int64_t C, int64_t O), (dx, dy, w, N, C, O))
TIMED(linear_backward_weight, HEAD_OR(BACKWARD_WEIGHT), (grad *dw, grad *dbias, const act *dy, const act *x, int64_t N, int64_t C, int64_t O), (dw, dbias, dy, x, N, C, O))
TIMED(attention_forward, ATTENTION_FORWARD, (act *o, float *lse, const act *q, const act *k, const act *v, const struct attention_args *a), (o, lse, q, k, v, a))
TIMED(attention_backward, ATTENTION_BACKWARD,
      (act *dq, act *dk, act *dv, const act *d_o, const act *o, const float *lse, const act *q, const act *k, const act *v, const struct attention_args *a), (dq, dk, dv, d_o, o, lse, q, k, v, a))
TIMED(rmsnorm_forward, RMSNORM_FORWARD, (act *y, float *rstd, act *sum, const act *x, const act *r, const act *w, int64_t N, int64_t C, float eps), (y, rstd, sum, x, r, w, N, C, eps))
TIMED(rmsnorm_backward, RMSNORM_BACKWARD, (act *dx, grad *dw, const act *dres, const act *dy, const act *x, const act *w, const float *rstd, int64_t N, int64_t C),
      (dx, dw, dres, dy, x, w, rstd, N, C))
TIMED(qk_norm_forward, QK_NORM_FORWARD, (act *y, float *rstd, const act *x, const act *wq, const act *wk, int64_t N, int Hq, int Hkv, int D, float eps), (y, rstd, x, wq, wk, N, Hq, Hkv, D, eps))
TIMED(qk_norm_backward, QK_NORM_BACKWARD,
      (act *dx, grad *dwq, grad *dwk, const act *dy, const act *x, const act *wq, const act *wk, const float *rstd, int64_t N, int Hq, int Hkv, int D),
      (dx, dwq, dwk, dy, x, wq, wk, rstd, N, Hq, Hkv, D))
TIMED(rope_forward, ROPE_FORWARD, (act *q, act *k, act *v, const act *qkv, const float *cos, const float *sin, const int32_t *position, int64_t N, int Hq, int Hkv, int D),
      (q, k, v, qkv, cos, sin, position, N, Hq, Hkv, D))
TIMED(rope_backward, ROPE_BACKWARD,
      (act *dqkv, const act *dq, const act *dk, const act *dv, const float *cos, const float *sin, const int32_t *position, int64_t N, int Hq, int Hkv, int D),
      (dqkv, dq, dk, dv, cos, sin, position, N, Hq, Hkv, D))
TIMED(swiglu_forward, SWIGLU_FORWARD, (act *h, const act *gate_up, int64_t N, int64_t F), (h, gate_up, N, F))
TIMED(swiglu_backward, SWIGLU_BACKWARD, (act *d_gate_up, const act *dh, const act *gate_up, int64_t N, int64_t F), (d_gate_up, dh, gate_up, N, F))
TIMED(rmsnorm_forward_fp8, RMSNORM_FORWARD_FP8, (const struct fp8 *y8, float *rstd, act *sum, const act *x, const act *r, const act *w, int64_t N, int64_t C, float eps),
      (y8, rstd, sum, x, r, w, N, C, eps))
TIMED(rmsnorm_backward_fp8, RMSNORM_BACKWARD_FP8, (act *dx, const struct fp8 *dx8, grad *dw, const act *dres, const act *dy, const act *x, const act *w, const float *rstd, int64_t N, int64_t C),
      (dx, dx8, dw, dres, dy, x, w, rstd, N, C))
TIMED(rope_backward_fp8, ROPE_BACKWARD_FP8,
      (const struct fp8 *d8, act *dqkv, const act *dq, const act *dk, const act *dv, const float *cos, const float *sin, const int32_t *position, int64_t N, int Hq, int Hkv, int D),
      (d8, dqkv, dq, dk, dv, cos, sin, position, N, Hq, Hkv, D))
TIMED(swiglu_forward_fp8, SWIGLU_FORWARD_FP8, (const struct fp8 *h8, const act *gate_up, int64_t N, int64_t F), (h8, gate_up, N, F))
TIMED(swiglu_backward_fp8, SWIGLU_BACKWARD_FP8, (const struct fp8 *d8, const act *dh, const act *gate_up, int64_t N, int64_t F), (d8, dh, gate_up, N, F))
TIMED(quantize, QUANTIZE, (const struct fp8 *y, const act *x, int64_t R, int64_t K), (y, x, R, K))
TIMED(quantize_weight, QUANTIZE_WEIGHT, (const struct fp8 *w8, const struct fp8 *t8, const act *w, int64_t O, int64_t C), (w8, t8, w, O, C))
TIMED(linear_forward_fp8, FORWARD_FP8, (act *y, const struct fp8 *x, const struct fp8 *w, const act *bias, int64_t N, int64_t C, int64_t O), (y, x, w, bias, N, C, O))
TIMED(linear_backward_weight_fp8, BACKWARD_WEIGHT_FP8, (grad *dw, grad *dbias, const struct fp8 *dy, const struct fp8 *x, int64_t N, int64_t C, int64_t O), (dw, dbias, dy, x, N, C, O))
TIMED(fp8_count, FP8_COUNT, (struct fp8_census *sum, const struct fp8 *x, int64_t R, int64_t K), (sum, x, R, K))
TIMED(distill_loss, DISTILL_LOSS, (act *logits, const struct distill_losses *out, const struct distill_targets *targets, const struct distill_args *a, int64_t R, int64_t V, int64_t Vv),
      (logits, out, targets, a, R, V, Vv))
TIMED(sample_targets, SAMPLE_TARGETS, (const struct sample_targets *s, const act *logits, int64_t R, int64_t V, int64_t Vv), (s, logits, R, V, Vv))
TIMED(teacher_targets, TEACHER_TARGETS, (const struct teacher_targets *out, const act *logits, const int32_t *labels, int64_t R, int64_t V, int64_t Vv), (out, logits, labels, R, V, Vv))
TIMED(sum_rows, SUM_ROWS, (double *sum, const float *x, int64_t count), (sum, x, count))
TIMED(sum_squares, SUM_SQUARES, (double *sum, const grad *g, int64_t count), (sum, g, count))
TIMED(adamw, ADAMW, (act *w, float *master, const grad *g, moment *m, moment *v, int64_t count, const double *grad_sum_squares, const struct adamw_args *a),
      (w, master, g, m, v, count, grad_sum_squares, a))
TIMED(embed_forward, EMBED_FORWARD, (act *x, const int32_t *tokens, const act *table, int64_t N, int64_t C), (x, tokens, table, N, C))
TIMED(embed_backward, EMBED_BACKWARD, (grad *dtable, const act *dx, const int32_t *tokens, int64_t N, int64_t C, int64_t V), (dtable, dx, tokens, N, C, V))
TIMED(fill_zero, FILL_ZERO, (void *p, size_t bytes), (p, bytes))
TIMED(copy, COPY, (void *to, const void *from, size_t bytes), (to, from, bytes))
TIMED(upload, UPLOAD, (void *to, const void *from_host, size_t bytes), (to, from_host, bytes))
TIMED(download, DOWNLOAD, (void *to_host, const void *from, size_t bytes), (to_host, from, bytes))
TIMED(download_async, DOWNLOAD_ASYNC, (void *to_host, const void *from, size_t bytes), (to_host, from, bytes))

struct backend *timed_backend(struct backend *inner, int64_t head_columns)
{
    struct timed *t = xcalloc(1, sizeof *t);
    t->be = *inner;
    t->inner = inner;
    t->head_columns = head_columns;
    t->ops = *inner->ops;
    t->be.ops = &t->ops;
    for (int i = 0; i < TIMED_COUNT; i++) t->op[i] = names[i];
    inner->ops->mark(inner, TIMED_FIRST_MARK + 2 * TIMED_MAX_CALLS - 1);   /* all places are made now: another thread may be waiting for a mark while ops are timed */
#define PUT(op) t->ops.op = timed_##op
    PUT(linear_forward); PUT(linear_backward_input); PUT(linear_backward_weight); PUT(attention_forward); PUT(attention_backward); PUT(rmsnorm_forward); PUT(rmsnorm_backward);
    PUT(qk_norm_forward); PUT(qk_norm_backward); PUT(rope_forward); PUT(rope_backward); PUT(swiglu_forward); PUT(swiglu_backward); PUT(rmsnorm_forward_fp8); PUT(rmsnorm_backward_fp8); PUT(rope_backward_fp8); PUT(swiglu_forward_fp8); PUT(swiglu_backward_fp8); PUT(distill_loss); PUT(teacher_targets); PUT(sample_targets);
    PUT(sum_rows); PUT(sum_squares); PUT(adamw); PUT(embed_forward); PUT(embed_backward); PUT(fill_zero); PUT(copy); PUT(upload); PUT(download); PUT(download_async);
    PUT(quantize); PUT(quantize_weight); PUT(linear_forward_fp8); PUT(linear_backward_weight_fp8); PUT(fp8_count);
#undef PUT
    return &t->be;
}

void timed_free(struct backend *be) { free(be); }

void timed_collect(struct backend *be, const struct timed_op **ops, int *n)
{
    struct timed *t = (struct timed *)be;
    collect(t);
    *n = 0;
    for (int i = 0; i < TIMED_COUNT; i++) if (t->op[i].calls) t->called[(*n)++] = t->op[i];
    *ops = t->called;
}
