/* THE seam: one table of coarse training ops, implemented by kernels/cpu (the specification, fp32) and kernels/cuda
 * (bf16, and fp32 for tests). Model code calls be->ops-> and never asks which one it is.
 *
 * Dimension letters: N tokens of the batch (rows end to end), C model width, F ffn width, V head columns, Vv valid ones
 * (ids 0..Vv-1; the rest are padding), Hq/Hkv query and key/value heads, D head width, O outputs of a product,
 * K teacher entries per token, R rows of a chunk of logits. Row-major, last index contiguous.
 *
 * Arguments: outputs, inputs, sizes, scalars. dX is the gradient of X. Weight gradients ACCUMULATE (+=), activation
 * gradients are OVERWRITTEN (=). Ops return void, never print, never allocate (but a shape's plan, on the host, when it is first met), and only sync() and
 * those that bring something to the host wait, and upload() while its ring of pinned memory is full. What an
 * op needs beside its arguments lies in the scratch arena (scratch_bytes() says how much; the caller puts it into
 * be->scratch). A device failure inside an op ends the process with the expression, file and line.
 */
#ifndef KERNELS_BACKEND_H
#define KERNELS_BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/dtype.h"

/* Elements of the backend's storage types, incomplete on purpose: no arithmetic, and mixing them up does not compile. */
typedef struct act act;         /* activations and weights: be->act_dtype */
typedef struct grad grad;       /* weight gradients: be->grad_dtype */
typedef struct moment moment;   /* AdamW's m and v: be->moment_dtype */

struct backend;

/* ---- arguments that are more than a few numbers ---- */

/* Packed documents: document d is positions [doc_begin[d], doc_begin[d+1]) of the N; causal inside, nothing across. */
struct attention_args {
    const int32_t *doc_begin;   /* device, [n_docs + 1] */
    int64_t n_docs, max_doc, N;
    int Hq, Hkv, D;             /* query head h reads key/value head h / (Hq / Hkv) */
    float scale;                /* of q k^T: D^-1/2 */
    int64_t window;             /* 0: none; else position i sees i-window+1 .. i */
};

enum divergence { DIV_FORWARD_KL, DIV_REVERSE_KL, DIV_JSD, DIV_SKEW_KL, DIV_TVD, DIV_COUNT, DIV_MIX = DIV_COUNT };
/* What stands for the teacher's mass outside the stored ids: nothing is missing (full logits, and samples in expectation), one more outcome,
 * nothing and the head is scaled up to 1, nothing. */
enum tail_policy { TAIL_UNBIASED, TAIL_BUCKET, TAIL_RENORMALISE, TAIL_DROP, TAIL_COUNT };
enum target_kind { TARGET_NONE, TARGET_TOPK, TARGET_SAMPLES, TARGET_FULL };

/* A matrix (R, K) in fp8, row by row: its element (r, k) is the e4m3 number q[r, k] times scale[r] (base/fp8.h). */
struct fp8 {
    uint8_t *q;                 /* [R, K] */
    float *scale;               /* [R] a power of two; of weights that were published in fp8, whatever their publisher chose */
};

/* What became of matrices of a kind when they were rounded: sums over all that were counted since they were set to zero. On the device. */
struct fp8_census {
    double elements, zeros;     /* zeros: rounded to 0, or 0 before; not those of rows that are not finite */
    float largest;              /* largest magnitude */
    float not_finite;           /* rows that hold NaN or infinity */
};

/* What a chunk of R positions learns from. All arrays on the device, first element = first row of the chunk. */
struct distill_targets {
    const int32_t *labels;              /* [R] next token; -1: not supervised, its row contributes nothing and gets zero gradient */
    enum target_kind kind;
    int K;                              /* TARGET_TOPK, TARGET_SAMPLES: entries per position */
    const int32_t *head_ids;            /* [R, K], all < Vv; no id twice in a position */
    const float *head_logprob;          /* [R, K] log p at temperature T */
    const float *tail_logmass;          /* TARGET_TOPK: [R] log mass outside the head at T; -INFINITY: none */
    const float *weight;                /* TARGET_SAMPLES: [R, K] w >= 0, an estimate of p at T. 0: an unused slot, whatever its id; its log p must be finite */
    const void *full;                   /* TARGET_FULL: [R, full_stride] teacher logits; full_scale * them = t / T. Normalised here, over Vv. */
    enum dtype full_dtype;              /* F32, F16 or BF16 */
    int64_t full_stride;
    float full_scale;
};

/* loss = kd_weight T^2 D(p, q) + ce_weight (-log softmax(z)[label]);  p = softmax(t/T), q = softmax(z/T), over Vv ids.
 * Hinton et al. 2015 for T^2; jsd: Agarwal et al. 2024 (GKD) eq. 1; skew_kl: Ko et al. 2024 (DistiLLM) eq. 4.
 *
 * TARGET_FULL       any divergence, any mix of them; nothing is missing, tail is not looked at.
 * TARGET_TOPK       tail bucket (any divergence, over the K ids and one outcome for the rest), renormalise (any; reverse_kl with a floor),
 *                   drop (forward_kl).
 * TARGET_SAMPLES    tail unbiased; forward_kl: D = sum w (log p - log q), its expectation is the full one. */
struct distill_args {
    enum divergence divergence;         /* DIV_MIX: D = sum mix[d] D_d, all mix[d] >= 0 */
    float mix[DIV_COUNT];
    enum tail_policy tail;
    float floor;                        /* reverse_kl is taken to (1 - floor) p + floor / Vv: no id of the teacher's is impossible; 0: to p itself */
    float beta, alpha;                  /* jsd: beta KL(p||m) + (1-beta) KL(q||m), m = beta p + (1-beta) q;  skew: KL(p || alpha p + (1-alpha) q) */
    float temperature, kd_weight, ce_weight;
    float gradient_scale;               /* 1 / supervised targets of the whole step: multiplies the gradient, not the reported losses */
};

/* Per row of the chunk, on the device; 0 where not supervised. */
struct distill_losses {
    float *kd, *ce;                     /* [R] T^2 D(p,q) and -log softmax(z)[label], both unweighted; ce also when ce_weight is 0 */
    float *kd_squares, *ce_squares;     /* [R] squared norms of the two parts of the row's gradient, in units of gradient_scale; both NULL: not computed */
};

/* Teacher side of a dump, for a chunk of R positions. NULL pointers are not computed. */
struct teacher_targets {
    int nT; const float *temperatures;  /* host array */
    int K;
    int32_t *head_ids;                  /* [R, K] by descending logit, ties by lower id */
    float *head_logprob;                /* [R, K] log softmax(t/T0) over Vv */
    float *lse;                         /* [R, nT] log sum exp(t/T) over Vv */
    float *tail_logmass;                /* [R, nT] log mass of the ids outside the head, summed over them: no cancellation */
    float *entropy;                     /* [R] nats at T0 */
    float *label_logprob;               /* [R] log p(label) at T0; 0 where the label is -1 */
    float *padding_mass;                /* [R] softmax mass at T = 1 that the columns Vv..V-1 would have had */
    uint16_t *full;                     /* [R, Vv] f16 of t/T0 */
};

/* Draws from a chunk of R positions of the teacher: D with replacement from softmax(t / T) restricted to the ids outside the head (all Vv without one),
 * as each id once, ascending, with its count; unused slots are 0, all of them where nothing is outside the head. A draw is a function of the
 * row's logits and (seed, row, position, draw) alone, the same on every backend: kernels/draw.h. */
struct sample_targets {
    int draws;                          /* D, 1 .. 255 */
    int32_t *ids;                       /* [R, D] */
    uint8_t *count;                     /* [R, D] */
    float *logprob;                     /* [R, D] log softmax(t / T) over Vv, by the lse given; NULL: not computed */
    int K; const int32_t *head_ids;     /* [R, K] ids that are not drawn */
    const float *lse; int nT;           /* [R, nT] teacher_targets' log-sum-exps, the first at this T; NULL without logprob */
    float temperature;
    uint64_t seed;
    int64_t first, row_length;          /* position i of the chunk is position (first + i) % row_length of row (first + i) / row_length */
};

/* One evaluated position, T = 1, over Vv ids. Ties in an argmax go to the lower id. */
struct eval_row {
    float forward_kl, reverse_kl;       /* KL(p||q), KL(q||p); 0 without a teacher */
    float student_logprob, teacher_logprob;   /* of the label */
    float student_confidence, teacher_confidence;   /* the largest probability */
    uint8_t agree, student_top1, student_top5, teacher_top1, teacher_top5;
    uint8_t counted;                    /* label >= 0 */
};

struct adamw_args {                     /* Loshchilov & Hutter 2019, algorithm 2, decay decoupled */
    double lr, beta1, beta2, eps, weight_decay;
    int64_t step;                       /* from 1: bias corrections 1 - beta^step */
    double clip;                        /* 0: none; gradient *= min(1, clip / (norm + 1e-6)) */
    uint64_t seed;                      /* stochastic rounding where weights have no fp32 master: a function of (seed, step, element) */
    int64_t first;                      /* index of the range's first element in the whole table */
};

/* The largest of each size that ops will be called with. */
struct op_limits { int64_t N, C, F, V, chunk_rows, max_doc; int Hq, Hkv, D, K; bool backward, fp8; };
enum { STREAM_SLOTS = 4 };

struct ops {
    /* ---- memory ---- */
    void *(*alloc)(struct backend *be, size_t bytes);                     /* NULL when there is no room; 256-byte aligned */
    void (*release)(struct backend *be, void *p);
    int64_t (*available)(struct backend *be);                             /* bytes that alloc could give out now */
    void (*upload)(struct backend *be, void *to, const void *from_host, size_t bytes);   /* from_host may be reused at once, unless it is pinned memory: then after sync() */
    void (*download)(struct backend *be, void *to_host, const void *from, size_t bytes);   /* waits */
    void (*upload_act)(struct backend *be, act *to, const float *from_host, int64_t count);       /* rounds to act_dtype; waits */
    void (*download_act)(struct backend *be, float *to_host, const act *from, int64_t count);     /* waits */
    void (*download_grad)(struct backend *be, float *to_host, const grad *from, int64_t count);   /* waits */
    void (*fill_zero)(struct backend *be, void *p, size_t bytes);
    void (*copy)(struct backend *be, void *to, const void *from, size_t bytes);
    void (*sync)(struct backend *be);
    /* Host memory that copies reach at full speed (pinned on CUDA), 256-byte aligned; NULL when there is no room. */
    void *(*alloc_host)(struct backend *be, size_t bytes);
    void (*release_host)(struct backend *be, void *p);
    /* In the order of the ops, without waiting: to_host, from alloc_host, holds the bytes once a later mark has passed. */
    void (*download_async)(struct backend *be, void *to_host, const void *from, size_t bytes);
    /* A mark remembers a point in the order of the ops; places are small numbers that the caller hands out and reuses. wait_mark: the host waits until the
     * device has passed it; another thread may, while this one goes on. seconds_between: device time from mark i to mark j, both passed. */
    void (*mark)(struct backend *be, int place);
    void (*wait_mark)(struct backend *be, int place);
    double (*seconds_between)(struct backend *be, int i, int j);
    /* Copies beside the ops, into one of STREAM_SLOTS places of device memory: stream_in starts as soon as the ops before the slot's last stream_free() are done
     * and returns at once; ops after stream_ready() see the bytes. from_host, from alloc_host, stays as it is until then. */
    void (*stream_in)(struct backend *be, int slot, void *to, const void *from_host, size_t bytes);
    void (*stream_ready)(struct backend *be, int slot);
    void (*stream_free)(struct backend *be, int slot);
    size_t (*scratch_bytes)(struct backend *be, const struct op_limits *limits);

    /* x[i] = mean + std * normal(seed, first + i), i < count: Philox words 0 and 1 at counter (1, first + i) through Box-Muller (base/rng.h), so that the weights of a
     * model are a function of (seed, element) on every device. */
    void (*random_normal)(struct backend *be, act *x, int64_t count, float mean, float std, uint64_t seed, int64_t first);

    /* ---- the model ---- */
    void (*embed_forward)(struct backend *be, act *x, const int32_t *tokens, const act *table, int64_t N, int64_t C);      /* x (N,C), table (V,C) */
    void (*embed_backward)(struct backend *be, grad *dtable, const act *dx, const int32_t *tokens, int64_t N, int64_t C, int64_t V);

    /* s = x + r (r NULL: s = x; sum NULL: not stored);  y = w s rstd,  rstd = (mean s^2 + eps)^-1/2. Zhang & Sennrich 2019. sum may alias x or r. */
    void (*rmsnorm_forward)(struct backend *be, act *y, float *rstd, act *sum, const act *x, const act *r, const act *w, int64_t N, int64_t C, float eps);
    /* dx = dres + gradient through the norm: where the residual stream joins. dres may be NULL or alias dx; dy may alias dx. x is the norm's input s. */
    void (*rmsnorm_backward)(struct backend *be, act *dx, grad *dw, const act *dres, const act *dy, const act *x, const act *w, const float *rstd, int64_t N, int64_t C);

    /* RMSNorm over D of every q and k head of qkv (N, Hq+2Hkv, D); v is copied. rstd (N, Hq+Hkv). y may not alias x. dx may alias dy. */
    void (*qk_norm_forward)(struct backend *be, act *y, float *rstd, const act *x, const act *wq, const act *wk, int64_t N, int Hq, int Hkv, int D, float eps);
    void (*qk_norm_backward)(struct backend *be, act *dx, grad *dwq, grad *dwk, const act *dy, const act *x, const act *wq, const act *wk, const float *rstd,
                             int64_t N, int Hq, int Hkv, int D);

    /* qkv (N, Hq+2Hkv, D), fused as the product wrote it -> planes q (N,Hq,D), k (N,Hkv,D), v (N,Hkv,D), which is what attention kernels want.
     * q and k heads turn: (a, b) = (x_i, x_{i+D/2}) -> (a c - b s, b c + a s), c = cos[position, i]; v is copied. cos, sin (positions, D/2) fp32 with
     * any attention factor multiplied in. Su et al. 2021; halves paired as Hugging Face does. backward: the transpose. No aliasing. */
    void (*rope_forward)(struct backend *be, act *q, act *k, act *v, const act *qkv, const float *cos, const float *sin, const int32_t *position,
                         int64_t N, int Hq, int Hkv, int D);
    void (*rope_backward)(struct backend *be, act *dqkv, const act *dq, const act *dk, const act *dv, const float *cos, const float *sin, const int32_t *position,
                          int64_t N, int Hq, int Hkv, int D);

    /* o (N,Hq,D) = softmax(scale q k^T) v inside every document; lse: N * Hq floats for backward, in the backend's own order. */
    void (*attention_forward)(struct backend *be, act *o, float *lse, const act *q, const act *k, const act *v, const struct attention_args *a);
    void (*attention_backward)(struct backend *be, act *dq, act *dk, act *dv, const act *d_o, const act *o, const float *lse, const act *q, const act *k, const act *v,
                               const struct attention_args *a);
    /* Generation, one sequence: k, v (n,Hkv,D), already rotated, are stored at past .. past+n-1 of the caches (max, Hkv, D); query i attends to 0 .. past+i. */
    void (*attention_cached)(struct backend *be, act *o, act *k_cache, act *v_cache, const act *q, const act *k, const act *v, int64_t n, int64_t past,
                             int Hq, int Hkv, int D, float scale, int64_t window);

    /* y (N,O) = x (N,C) w (O,C)^T + bias (O), bias NULL: none */
    void (*linear_forward)(struct backend *be, act *y, const act *x, const act *w, const act *bias, int64_t N, int64_t C, int64_t O);
    void (*linear_backward_input)(struct backend *be, act *dx, const act *dy, const act *w, int64_t N, int64_t C, int64_t O);
    void (*linear_backward_weight)(struct backend *be, grad *dw, grad *dbias, const act *dy, const act *x, int64_t N, int64_t C, int64_t O);

    /* ---- the same products of matrices in fp8: multiplied as they are. Only where be->fp8 ----
     * Summed in fp32; y and dx on CUDA in the matrix units, which keep fewer bits.
     * A row of x gets e4m3_scale() of its largest magnitude, so nothing saturates; a row with NaN or infinity becomes NaN, its scale is not finite, and so is everything made of it.
     * The same bits on every device. Widths are multiples of be->fp8_multiple; where that is not 1, q is aligned to 16 bytes, and so are the scales of what is multiplied. */
    void (*quantize)(struct backend *be, const struct fp8 *y, const act *x, int64_t R, int64_t K);
    /* w8 (O,C) as quantize(); t8 (C,O), with scales of its own, holds the same numbers transposed, but for what is subnormal at the scale of its new row */
    void (*quantize_weight)(struct backend *be, const struct fp8 *w8, const struct fp8 *t8, const act *w, int64_t O, int64_t C);
    /* y (N,O) = x (N,C) w (O,C)^T + bias.  The gradient of x is this product too: dx (N,C) = dy (N,O) t (C,O)^T, t from quantize_weight() */
    void (*linear_forward_fp8)(struct backend *be, act *y, const struct fp8 *x, const struct fp8 *w, const act *bias, int64_t N, int64_t C, int64_t O);
    /* dw (O,C) += dy^T x, dbias (O) += column sums of dy.  The sum runs over the rows, where both have scales: row n of dy takes the scale of row n of x on and is rounded once more to
     * one scale for all of it, max_n scale_dy[n] scale_x[n]; of that, only what falls among the subnormal numbers loses bits: rows that contribute least. */
    void (*linear_backward_weight_fp8)(struct backend *be, grad *dw, grad *dbias, const struct fp8 *dy, const struct fp8 *x, int64_t N, int64_t C, int64_t O);
    void (*fp8_count)(struct backend *be, struct fp8_census *sum, const struct fp8 *x, int64_t R, int64_t K);     /* *sum += */

    /* h (N,F) = silu(g) u;  gate_up (N, 2F) holds g in columns 0..F-1 and u in F..2F-1. Shazeer 2020. d_gate_up may alias gate_up. */
    void (*swiglu_forward)(struct backend *be, act *h, const act *gate_up, int64_t N, int64_t F);
    void (*swiglu_backward)(struct backend *be, act *d_gate_up, const act *dh, const act *gate_up, int64_t N, int64_t F);

    /* ---- ops that write rounded what products in fp8 read: to the bit what quantize() makes of what the op of the same name writes. Only where be->fp8 ---- */
    void (*rmsnorm_forward_fp8)(struct backend *be, const struct fp8 *y8, float *rstd, act *sum, const act *x, const act *r, const act *w, int64_t N, int64_t C, float eps);
    /* dx itself too, which the norm before it reads and which may be dres or dy, as there */
    void (*rmsnorm_backward_fp8)(struct backend *be, act *dx, const struct fp8 *dx8, grad *dw, const act *dres, const act *dy, const act *x, const act *w, const float *rstd, int64_t N, int64_t C);
    /* d8 (N, (Hq + 2 Hkv) D): what rope_backward writes to dqkv, rounded; the argument dqkv is room to work in, undefined afterwards */
    void (*rope_backward_fp8)(struct backend *be, const struct fp8 *d8, act *dqkv, const act *dq, const act *dk, const act *dv, const float *cos, const float *sin, const int32_t *position, int64_t N, int Hq, int Hkv, int D);
    void (*swiglu_forward_fp8)(struct backend *be, const struct fp8 *h8, const act *gate_up, int64_t N, int64_t F);
    void (*swiglu_backward_fp8)(struct backend *be, const struct fp8 *d8, const act *dh, const act *gate_up, int64_t N, int64_t F);      /* d8 (N, 2F): d_gate_up */

    /* ---- objective, targets, evaluation: over a chunk of R rows of logits (R, V) ---- */
    /* logits -> their gradient in place (padding columns get 0) */
    void (*distill_loss)(struct backend *be, act *logits, const struct distill_losses *out, const struct distill_targets *t, const struct distill_args *a,
                         int64_t R, int64_t V, int64_t Vv);
    void (*teacher_targets)(struct backend *be, const struct teacher_targets *out, const act *logits, const int32_t *labels, int64_t R, int64_t V, int64_t Vv);
    void (*sample_targets)(struct backend *be, const struct sample_targets *s, const act *logits, int64_t R, int64_t V, int64_t Vv);
    /* student (R, Vs), teacher (R, Vt) or NULL */
    void (*compare_logits)(struct backend *be, struct eval_row *out, const act *student, const act *teacher, const int32_t *labels, int64_t R, int64_t Vs, int64_t Vt, int64_t Vv);

    /* ---- optimizer: flat ranges ---- */
    void (*sum_squares)(struct backend *be, double *sum, const grad *g, int64_t count);    /* *sum (device) = */
    void (*sum_rows)(struct backend *be, double *sum, const float *x, int64_t count);      /* *sum (device) += */
    /* Skips itself when *grad_sum_squares is not finite. master: what is updated, and w becomes it, rounded to nearest; only with fp32 moments. NULL: w itself is
     * updated, in fp32 or rounded stochastically to bf16. */
    void (*adamw)(struct backend *be, act *w, float *master, const grad *g, moment *m, moment *v, int64_t count, const double *grad_sum_squares, const struct adamw_args *a);
};

struct backend {
    const char *name;                   /* "cpu", "cuda" */
    enum dtype act_dtype, grad_dtype, moment_dtype;
    bool master;                        /* the optimizer keeps an fp32 copy of the weights for adamw: recipe exact. Any device with fp32 moments can; fp32 weights need none */
    const struct ops *ops;
    bool exact_rows;                    /* as in backend_options */
    bool fp8;                           /* has the products in fp8 */
    int fp8_multiple;                   /* their widths, C and O, and K of what is rounded are multiples of this; N may be anything */
    int64_t fp8_widest;                 /* the longest row that is rounded; 0: any */
    int widest_head;                    /* largest D of attention and q/k norm; 0: any */
    int64_t widest_norm;                /* largest C of a norm: so many vectors of 16 bytes where C is whole vectors, else so many numbers; 0: any */
    bool host_memory;                   /* what alloc() gives is the host's own memory: it may write there itself */
    void *scratch; size_t scratch_bytes;/* set by the caller from its memory plan, at least ops->scratch_bytes() */
    void *state;                        /* the backend's own */
    const char *description;            /* card and library versions, for the start of a run; NULL: nothing to say */
};

struct backend_options {
    const char *device;                 /* "cpu", "cuda" */
    const char *precision;              /* "fp32", "bf16"; NULL: the device's production type */
    int threads;                        /* 0: all cores */
    bool exact_rows;                    /* cpu: a row of linear_forward is a function of that row of x alone, to the bit, whatever N and the threads are. BLAS does not promise that; ours is slower. cuda: no effect */
    bool deterministic;                 /* cuda: the same inputs give the same bits in every run: attention's backward takes kernels without atomics, many times slower than cuDNN's. cpu: always so */
    const char *recipe;                 /* with bf16: "compact" (bf16 gradients and moments, no master), "exact" (fp32 gradients, moments, master); NULL: compact */
};
/* ERR_USAGE: unknown device, or this build or machine has none (says which). Refuses a table with a NULL entry by number (our bug). */
int  backend_open(struct backend **out, const struct backend_options *o);
void backend_close(struct backend *be);                 /* NULL-safe */

#endif
