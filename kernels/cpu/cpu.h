/* What the CPU ops share: casts from the seam's incomplete element types (all fp32 here), per-thread scratch. One prototype per op; the table is in backend.c. */
#ifndef KERNELS_CPU_CPU_H
#define KERNELS_CPU_CPU_H

#include <math.h>
#include <omp.h>

#include "base/exp.h"
#include "kernels/backend.h"

static inline float *fp32(act *x) { return (float *)x; }
static inline const float *cfp32(const act *x) { return (const float *)x; }
static inline float *gfp32(grad *x) { return (float *)x; }
static inline const float *cgfp32(const grad *x) { return (const float *)x; }

/* This thread's part of scratch memory: `floats` floats for every thread, cache line aligned. */
static inline float *thread_part(float *scratch, size_t floats) { return scratch + (size_t)omp_get_thread_num() * ((floats + 15) & ~(size_t)15); }
static inline float *thread_scratch(struct backend *be, size_t floats) { return thread_part(be->scratch, floats); }
static inline size_t thread_scratch_bytes(size_t floats) { return (size_t)omp_get_max_threads() * ((floats + 15) & ~(size_t)15) * sizeof(float); }

/* floats of scratch for one row of V logits: two copies of it, and K entries of two words */
static inline size_t cpu_row_scratch(int64_t V, int K) { return (size_t)(2 * V) + 2 * (size_t)K; }

/* for draws from one row: a copy of it, and 64 bits for every 256 of its ids */
static inline size_t cpu_sample_scratch(int64_t V) { return (size_t)(V + 1 + 2 * (V / 256 + 1)); }

/* for a product with C columns when rows have to be exact (linear.c) */
size_t cpu_exact_rows_scratch(int64_t C);

/* y (N,O), its rows ldy apart, = x (N,C) w (O,C)^T + bias, as be->exact_rows says, with cpu_exact_rows_scratch(C) for every thread at `scratch` (linear.c) */
void cpu_product(const struct backend *be, float *scratch, float *y, int64_t ldy, const float *x, const float *w, const float *bias, int64_t N, int64_t C, int64_t O);

/* dw (O,C) += scale dy^T x, dy's rows being O long; sums (O) += column sums of x (N,O), in double (linear.c) */
void cpu_add_outer_products(float *dw, float scale, const float *dy, const float *x, int64_t N, int64_t C, int64_t O);
void cpu_add_column_sums(float *sums, const float *x, int64_t N, int64_t O);

/* bytes for the products in fp8, and for a row of every thread of the ops that round what they write (fp8.c) */
size_t cpu_fp8_scratch(const struct backend *be, const struct op_limits *l);

/* Row statistics over n values scaled by `scale`: the largest, and log sum exp in double. -INFINITY for an empty or fully masked row. */
float  row_max(const float *x, int64_t n);
double row_log_sum_exp(const float *x, int64_t n, float scale);

void cpu_random_normal(struct backend *be, act *x, int64_t count, float mean, float std, uint64_t seed, int64_t first);
void cpu_embed_forward(struct backend *be, act *x, const int32_t *tokens, const act *table, int64_t N, int64_t C);
void cpu_embed_backward(struct backend *be, grad *dtable, const act *dx, const int32_t *tokens, int64_t N, int64_t C, int64_t V);
void cpu_rmsnorm_forward(struct backend *be, act *y, float *rstd, act *sum, const act *x, const act *r, const act *w, int64_t N, int64_t C, float eps);
void cpu_rmsnorm_forward_fp8(struct backend *be, const struct fp8 *y8, float *rstd, act *sum, const act *x, const act *r, const act *w, int64_t N, int64_t C, float eps);
void cpu_rmsnorm_backward(struct backend *be, act *dx, grad *dw, const act *dres, const act *dy, const act *x, const act *w, const float *rstd, int64_t N, int64_t C);
void cpu_rmsnorm_backward_fp8(struct backend *be, act *dx, const struct fp8 *dx8, grad *dw, const act *dres, const act *dy, const act *x, const act *w, const float *rstd, int64_t N, int64_t C);
void cpu_qk_norm_forward(struct backend *be, act *y, float *rstd, const act *x, const act *wq, const act *wk, int64_t N, int Hq, int Hkv, int D, float eps);
void cpu_qk_norm_backward(struct backend *be, act *dx, grad *dwq, grad *dwk, const act *dy, const act *x, const act *wq, const act *wk, const float *rstd,
                          int64_t N, int Hq, int Hkv, int D);
void cpu_rope_forward(struct backend *be, act *q, act *k, act *v, const act *qkv, const float *cos, const float *sin, const int32_t *position, int64_t N, int Hq, int Hkv, int D);
void cpu_rope_backward(struct backend *be, act *dqkv, const act *dq, const act *dk, const act *dv, const float *cos, const float *sin, const int32_t *position,
                       int64_t N, int Hq, int Hkv, int D);
void cpu_rope_backward_fp8(struct backend *be, const struct fp8 *d8, act *dqkv, const act *dq, const act *dk, const act *dv, const float *cos, const float *sin, const int32_t *position, int64_t N, int Hq, int Hkv, int D);
size_t cpu_attention_scratch(const struct op_limits *l);
void cpu_attention_forward(struct backend *be, act *o, float *lse, const act *q, const act *k, const act *v, const struct attention_args *a);
void cpu_attention_backward(struct backend *be, act *dq, act *dk, act *dv, const act *d_o, const act *o, const float *lse, const act *q, const act *k, const act *v,
                            const struct attention_args *a);
void cpu_attention_cached(struct backend *be, act *o, act *k_cache, act *v_cache, const act *q, const act *k, const act *v, int64_t n, int64_t past,
                          int Hq, int Hkv, int D, float scale, int64_t window);
void cpu_linear_forward(struct backend *be, act *y, const act *x, const act *w, const act *bias, int64_t N, int64_t C, int64_t O);
void cpu_linear_backward_input(struct backend *be, act *dx, const act *dy, const act *w, int64_t N, int64_t C, int64_t O);
void cpu_linear_backward_weight(struct backend *be, grad *dw, grad *dbias, const act *dy, const act *x, int64_t N, int64_t C, int64_t O);
void cpu_quantize(struct backend *be, const struct fp8 *y, const act *x, int64_t R, int64_t K);
void cpu_quantize_weight(struct backend *be, const struct fp8 *w8, const struct fp8 *t8, const act *w, int64_t O, int64_t C);
void cpu_linear_forward_fp8(struct backend *be, act *y, const struct fp8 *x, const struct fp8 *w, const act *bias, int64_t N, int64_t C, int64_t O);
void cpu_linear_backward_weight_fp8(struct backend *be, grad *dw, grad *dbias, const struct fp8 *dy, const struct fp8 *x, int64_t N, int64_t C, int64_t O);
void cpu_fp8_count(struct backend *be, struct fp8_census *sum, const struct fp8 *x, int64_t R, int64_t K);
void cpu_swiglu_forward(struct backend *be, act *h, const act *gate_up, int64_t N, int64_t F);
void cpu_swiglu_backward(struct backend *be, act *d_gate_up, const act *dh, const act *gate_up, int64_t N, int64_t F);
void cpu_swiglu_forward_fp8(struct backend *be, const struct fp8 *h8, const act *gate_up, int64_t N, int64_t F);
void cpu_swiglu_backward_fp8(struct backend *be, const struct fp8 *d8, const act *dh, const act *gate_up, int64_t N, int64_t F);
void cpu_distill_loss(struct backend *be, act *logits, const struct distill_losses *out, const struct distill_targets *t, const struct distill_args *a, int64_t R, int64_t V, int64_t Vv);
void cpu_teacher_targets(struct backend *be, const struct teacher_targets *out, const act *logits, const int32_t *labels, int64_t R, int64_t V, int64_t Vv);
void cpu_sample_targets(struct backend *be, const struct sample_targets *s, const act *logits, int64_t R, int64_t V, int64_t Vv);
void cpu_compare_logits(struct backend *be, struct eval_row *out, const act *student, const act *teacher, const int32_t *labels, int64_t R, int64_t Vs, int64_t Vt, int64_t Vv);
void cpu_sum_squares(struct backend *be, double *sum, const grad *g, int64_t count);
void cpu_sum_rows(struct backend *be, double *sum, const float *x, int64_t count);
void cpu_adamw(struct backend *be, act *w, float *master, const grad *g, moment *m, moment *v, int64_t count, const double *grad_sum_squares, const struct adamw_args *a);

#endif
