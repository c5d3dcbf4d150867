/* What the files of the CUDA backend share, in C and in CUDA: the backend's state, the checks that end the process on a device
 * failure, the scratch arena, and one prototype per op. Everything runs on one stream; the table is in backend.c. */
#ifndef KERNELS_CUDA_CUDA_H
#define KERNELS_CUDA_CUDA_H

#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <cudnn.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "kernels/backend.h"

struct product_plan;        /* linear.c: a shape's descriptors and algorithm */
struct attention_plan;      /* attention_cudnn.c: a shape's execution plan */

struct cuda_state {
    bool deterministic;                             /* as in backend_options */
    int device, sms;                                /* multiprocessors: what persistent grids are sized by */
    cudaStream_t stream;
    cublasLtHandle_t blas;
    cudnnHandle_t dnn;
    struct product_plan *products; int n_products;  /* found once per shape, kept until close */
    struct attention_plan *attentions; int n_attentions;
    char *staging; cudaEvent_t staging_done[2]; int staging_half; size_t staging_used;   /* pinned, two halves in turn: host memory on its way to the device */
    cudaStream_t copies;                            /* beside `stream`: weights on their way in */
    cudaEvent_t slot_arrived[STREAM_SLOTS], slot_free[STREAM_SLOTS];
    cudaEvent_t *marks; int n_marks;
    char description[352];      /* the card's name alone may be 255 bytes */
};

static inline struct cuda_state *cuda_state_of(struct backend *be) { return (struct cuda_state *)be->state; }

/* Prints the library's sentence, expression, file and line, then aborts: a context cannot be saved after a failure. */
void cuda_failed(const char *library, const char *reason, const char *expression, const char *file, int line) __attribute__((noreturn));
#define CUDA_CHECK(e) do { cudaError_t code_ = (e); if (code_ != cudaSuccess) cuda_failed("CUDA", cudaGetErrorString(code_), #e, __FILE__, __LINE__); } while (0)
#define CUBLAS_CHECK(e) do { cublasStatus_t code_ = (e); if (code_ != CUBLAS_STATUS_SUCCESS) cuda_failed("cuBLASLt", cublasLtGetStatusString(code_), #e, __FILE__, __LINE__); } while (0)
#define CUDNN_CHECK(e) do { cudnnStatus_t code_ = (e); if (code_ != CUDNN_STATUS_SUCCESS) cuda_failed("cuDNN", cudnnGetErrorString(code_), #e, __FILE__, __LINE__); } while (0)
/* Our own bug: arguments that no caller may pass. */
#define CUDA_REQUIRE(cond, sentence) do { if (!(cond)) cuda_failed("distill", sentence, #cond, __FILE__, __LINE__); } while (0)

/* The scratch arena from its start, after checking that it holds `bytes`. An op uses it alone: the stream orders ops. */
void *cuda_scratch(struct backend *be, size_t bytes);
static inline size_t cuda_round_up(size_t bytes) { return (bytes + 255) & ~(size_t)255; }

/* What each op needs of it at the given limits; backend.c takes the largest. */
size_t cuda_embed_scratch(struct backend *be, const struct op_limits *l);
size_t cuda_rmsnorm_scratch(struct backend *be, const struct op_limits *l);
size_t cuda_qk_norm_scratch(struct backend *be, const struct op_limits *l);
size_t cuda_attention_scratch(struct backend *be, const struct op_limits *l);
size_t cuda_linear_scratch(struct backend *be, const struct op_limits *l);
size_t cuda_fp8_scratch(struct backend *be, const struct op_limits *l);
size_t cuda_reduce_scratch(struct backend *be, const struct op_limits *l);
size_t cuda_teacher_targets_scratch(struct backend *be, const struct op_limits *l);

void cuda_linear_close(struct cuda_state *s);
void cuda_attention_close(struct cuda_state *s);

/* ---- pieces shared by ops ---- */
/* dw[c] += sum_p part[p][c], p in order: the second stage of every weight gradient that is a sum over rows */
void cuda_add_partials(struct backend *be, grad *dw, const float *part, int64_t parts, int64_t C);
/* dbias (O) += sum_n dy (N, O). part: cuda_column_sum_scratch() bytes */
void cuda_column_sums(struct backend *be, grad *dbias, const act *dy, int64_t N, int64_t O, float *part);
size_t cuda_column_sum_scratch(int64_t N, int64_t O);
int64_t cuda_column_sum_rows(int64_t N);        /* rows of one partial sum */
/* every row of y (N, O) = row (O) */
void cuda_fill_rows(struct backend *be, act *y, const act *row, int64_t N, int64_t O);
void cuda_add_rows(struct backend *be, act *y, const act *row, int64_t N, int64_t O);      /* += */

/* linear.c: d (m,n) = op(a) (m,k) op(b) (k,n) [+ d] [+ bias (m)], column-major. In fp8, e4m3, both are read along the sum: a transposed, b not; k and m are multiples of 16. */
enum product_kind {
    PRODUCT_PLAIN,              /* a and b have the activations' type */
    PRODUCT_FP8_ROWS,           /* fp8: scale_a [m] and scale_b [n] on the device, d (i,j) times scale_a[i] scale_b[j] */
    PRODUCT_FP8_ONE             /* fp8: scale_a [1] on the device, for all of d */
};
struct product_args {
    void *d; enum dtype d_type;
    const void *a, *b, *bias;
    int64_t m, n, k;
    int transpose_a, transpose_b, accumulate;
    enum product_kind kind;
    const float *scale_a, *scale_b;
};
enum { CUDA_PRODUCT_WORKSPACE = 64 << 20 };     /* at the start of the scratch arena. 32 MiB is what Hopper's own algorithms ask for; split-K of wide outputs takes more */
/* false: not with a bias for this shape, nothing was done */
bool cuda_product(struct backend *be, const struct product_args *p);

/* fp8.cu: what products in fp8 read. out (K, padded) = in (R, K)^T, its columns R .. padded - 1 zero. _folded: *one = max_r scale[r] times[r], and row r of `in` is
 * rounded once more, from scale[r] times[r] to *one. Both on the device, nothing waits. */
enum { CUDA_FP8_MULTIPLE = 16,                  /* widths: 16 bytes, what cuBLASLt asks of rows in fp8 */
       CUDA_FP8_WIDEST_BYTES = 1 << 17 };       /* a row that is rounded stays in the registers of a block */
void cuda_fp8_transpose(struct backend *be, uint8_t *out, const uint8_t *in, int64_t R, int64_t K, int64_t padded);
void cuda_fp8_transpose_folded(struct backend *be, uint8_t *out, float *one, const struct fp8 *in, const float *times, int64_t R, int64_t K, int64_t padded);
/* as cuda_column_sums() */
void cuda_fp8_column_sums(struct backend *be, grad *dbias, const struct fp8 *dy, int64_t N, int64_t O, float *part);

/* cuDNN's attention, bf16. false: this head width or machine has no such plan, nothing was done. */
bool cuda_attention_cudnn_forward(struct backend *be, act *o, float *lse, const act *q, const act *k, const act *v, const struct attention_args *a);
bool cuda_attention_cudnn_backward(struct backend *be, act *dq, act *dk, act *dv, const act *d_o, const act *o, const float *lse, const act *q, const act *k, const act *v,
                                   const struct attention_args *a);
size_t cuda_attention_cudnn_scratch(const struct op_limits *l);
/* Document lengths [slots] and element offsets [slots + 1] of rows `width` wide for several widths; slots past n_docs are empty. */
enum { ATTENTION_WIDTHS = 4 };
struct attention_offsets { int32_t *length; int32_t *offset[ATTENTION_WIDTHS]; int64_t width[ATTENTION_WIDTHS]; int widths; };
void cuda_attention_fill_offsets(struct backend *be, const struct attention_offsets *to, const int32_t *doc_begin, int64_t n_docs, int64_t slots);

/* ---- the ops ---- */
void cuda_random_normal(struct backend *be, act *x, int64_t count, float mean, float std, uint64_t seed, int64_t first);
void cuda_embed_forward(struct backend *be, act *x, const int32_t *tokens, const act *table, int64_t N, int64_t C);
void cuda_embed_backward(struct backend *be, grad *dtable, const act *dx, const int32_t *tokens, int64_t N, int64_t C, int64_t V);
/* What these kernels take, as the backend tells (backend.h) */
enum { CUDA_WIDEST_HEAD = 256,                  /* D, of attention and q/k norm */
       CUDA_WIDEST_NORM = 4096 };               /* vectors of a row, or its numbers where it is no whole vectors */
void cuda_rmsnorm_forward(struct backend *be, act *y, float *rstd, act *sum, const act *x, const act *r, const act *w, int64_t N, int64_t C, float eps);
void cuda_rmsnorm_forward_fp8(struct backend *be, const struct fp8 *y8, float *rstd, act *sum, const act *x, const act *r, const act *w, int64_t N, int64_t C, float eps);
void cuda_rmsnorm_backward(struct backend *be, act *dx, grad *dw, const act *dres, const act *dy, const act *x, const act *w, const float *rstd, int64_t N, int64_t C);
void cuda_rmsnorm_backward_fp8(struct backend *be, act *dx, const struct fp8 *dx8, grad *dw, const act *dres, const act *dy, const act *x, const act *w, const float *rstd, int64_t N, int64_t C);
void cuda_qk_norm_forward(struct backend *be, act *y, float *rstd, const act *x, const act *wq, const act *wk, int64_t N, int Hq, int Hkv, int D, float eps);
void cuda_qk_norm_backward(struct backend *be, act *dx, grad *dwq, grad *dwk, const act *dy, const act *x, const act *wq, const act *wk, const float *rstd,
                           int64_t N, int Hq, int Hkv, int D);
void cuda_rope_forward(struct backend *be, act *q, act *k, act *v, const act *qkv, const float *cos, const float *sin, const int32_t *position, int64_t N, int Hq, int Hkv, int D);
void cuda_rope_backward(struct backend *be, act *dqkv, const act *dq, const act *dk, const act *dv, const float *cos, const float *sin, const int32_t *position,
                        int64_t N, int Hq, int Hkv, int D);
void cuda_rope_backward_fp8(struct backend *be, const struct fp8 *d8, act *dqkv, const act *dq, const act *dk, const act *dv, const float *cos, const float *sin, const int32_t *position, int64_t N, int Hq, int Hkv, int D);
void cuda_attention_forward(struct backend *be, act *o, float *lse, const act *q, const act *k, const act *v, const struct attention_args *a);
void cuda_attention_backward(struct backend *be, act *dq, act *dk, act *dv, const act *d_o, const act *o, const float *lse, const act *q, const act *k, const act *v,
                             const struct attention_args *a);
void cuda_attention_cached(struct backend *be, act *o, act *k_cache, act *v_cache, const act *q, const act *k, const act *v, int64_t n, int64_t past,
                           int Hq, int Hkv, int D, float scale, int64_t window);
void cuda_linear_forward(struct backend *be, act *y, const act *x, const act *w, const act *bias, int64_t N, int64_t C, int64_t O);
void cuda_linear_backward_input(struct backend *be, act *dx, const act *dy, const act *w, int64_t N, int64_t C, int64_t O);
void cuda_linear_backward_weight(struct backend *be, grad *dw, grad *dbias, const act *dy, const act *x, int64_t N, int64_t C, int64_t O);
void cuda_quantize(struct backend *be, const struct fp8 *y, const act *x, int64_t R, int64_t K);
void cuda_quantize_weight(struct backend *be, const struct fp8 *w8, const struct fp8 *t8, const act *w, int64_t O, int64_t C);
void cuda_linear_forward_fp8(struct backend *be, act *y, const struct fp8 *x, const struct fp8 *w, const act *bias, int64_t N, int64_t C, int64_t O);
void cuda_linear_backward_weight_fp8(struct backend *be, grad *dw, grad *dbias, const struct fp8 *dy, const struct fp8 *x, int64_t N, int64_t C, int64_t O);
void cuda_fp8_count(struct backend *be, struct fp8_census *sum, const struct fp8 *x, int64_t R, int64_t K);
void cuda_swiglu_forward(struct backend *be, act *h, const act *gate_up, int64_t N, int64_t F);
void cuda_swiglu_backward(struct backend *be, act *d_gate_up, const act *dh, const act *gate_up, int64_t N, int64_t F);
void cuda_swiglu_forward_fp8(struct backend *be, const struct fp8 *h8, const act *gate_up, int64_t N, int64_t F);
void cuda_swiglu_backward_fp8(struct backend *be, const struct fp8 *d8, const act *dh, const act *gate_up, int64_t N, int64_t F);
void cuda_distill_loss(struct backend *be, act *logits, const struct distill_losses *out, const struct distill_targets *t, const struct distill_args *a, int64_t R, int64_t V, int64_t Vv);
void cuda_teacher_targets(struct backend *be, const struct teacher_targets *out, const act *logits, const int32_t *labels, int64_t R, int64_t V, int64_t Vv);
void cuda_sample_targets(struct backend *be, const struct sample_targets *s, const act *logits, int64_t R, int64_t V, int64_t Vv);
void cuda_compare_logits(struct backend *be, struct eval_row *out, const act *student, const act *teacher, const int32_t *labels, int64_t R, int64_t Vs, int64_t Vt, int64_t Vv);
void cuda_sum_squares(struct backend *be, double *sum, const grad *g, int64_t count);
void cuda_sum_rows(struct backend *be, double *sum, const float *x, int64_t count);
void cuda_adamw(struct backend *be, act *w, float *master, const grad *g, moment *m, moment *v, int64_t count, const double *grad_sum_squares, const struct adamw_args *a);

#ifdef __cplusplus
}
#endif

#endif
