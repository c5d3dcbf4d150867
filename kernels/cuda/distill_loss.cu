/* The objective over a chunk of logits, the gradient left in their place (the maths is in cpu/distill_loss.c). A block per row.
 *
 * Floor: a row of 152,064 bf16 logits is 304 KB, more than a multiprocessor's shared memory, so it is read twice (log-sum-exp, then
 * gradient) and written once: 7.5 GB for 8192 rows, 1.8 ms at 4.26 TB/s beside 40 ms of products; the second read goes backwards
 * through the row, so that its beginning is found in L2. One read (a cluster of blocks holding the row) would save at most 0.6 ms.
 *
 * Truncated targets: the block saves z on S and puts -infinity there before it sums, so that the sum IS the one over the
 * complement and 1-Q never comes from a subtraction. Off S the gradient is then
 *     A e^{z/T - lse_rest} + B e^{z - lse}     A = kd_scale ((P + r)(1-Q) - r), B = ce_scale      (r = 0 unless the policy is bucket)
 * with A, B computed once per row in double; at T = 1 the two terms are one. S and the label are written last.
 * Logits enter as differences to the row's largest, and every divergence as a function of d = log q - log p that is second order where p
 * and q are close, so that fp32 suffices. 1/T is rounded to fp32 once, as full_scale is. */
#include "kernels/cuda/row_stats.cuh"

enum { THREADS = 512 };

struct loss_scales { float kd, ce, temperature; };      /* kd_weight T gradient_scale, ce_weight gradient_scale, T */

template <typename T, int W> __device__ __forceinline__ void clear_columns(T *row, int64_t from, int64_t to)
{
    float zero[W] = {};
    for (int64_t j = from + (int64_t)threadIdx.x * W; j < to; j += THREADS * W) store<T, W>(row + j, zero);
}

/* e^{x c - s}, 0 without a coefficient: 0 * NaN is nobody's gradient */
__device__ __forceinline__ float term(float a, float x, float c, float s) { return a != 0 ? a * exp2_fast(fmaf(x, c, -s)) : 0; }

/* Hard labels and truncated targets. The row's z on S waits in shared memory. */
template <typename T, int W>
__global__ void __launch_bounds__(THREADS, 2) distill_truncated_kernel(T *logits, float *kd_out, float *ce_out, distill_targets t, tail_policy tail, loss_scales k, int64_t V, int64_t Vv)
{
    extern __shared__ float head_z[];
    __shared__ int label_in_head;
    __shared__ struct { double lse, lse1, rest, q_weight, scale_p, a; } kept;      /* what the last lines need: not worth registers during the loops */
    int64_t n = blockIdx.x;
    T *row = logits + n * V;
    int label = t.labels[n], K = t.kind == TARGET_TOPK ? t.K : 0;
    if (label < 0) {
        clear_columns<T, W>(row, 0, V);
        if (threadIdx.x == 0) kd_out[n] = ce_out[n] = 0;
        return;
    }
    const int32_t *ids = t.head_ids + n * K;
    const float *logp = t.head_logprob + n * K;
    float z_label = to_float(row[label]), inv_T_fp32 = 1 / k.temperature, c = inv_T_fp32 * LOG2E, top;
    double inv_T = inv_T_fp32;

    if (threadIdx.x == 0) label_in_head = 0;
    for (int i = threadIdx.x; i < K; i += THREADS) head_z[i] = to_float(row[ids[i]]);
    __syncthreads();
    for (int i = threadIdx.x; i < K; i += THREADS) {
        row[ids[i]] = from_float<T>(-CUDART_INF_F);
        if (ids[i] == label) label_in_head = 1;
    }
    __syncthreads();

    /* the complement at T and at 1; the head apart, in double */
    double rest[2];
    bool one = k.temperature == 1 || !K;
    if (one) {
        const float scales[1] = {LOG2E};
        running_sums<1> sums;
        double at1[1];
        sums.clear();
        for_each_vector<T, W, 4, false>(row, Vv, [&](float (&x)[W], int64_t) { sums.template add<W>(x, scales); });
        sums.merge(at1, scales, {1.0});
        rest[0] = rest[1] = at1[0];
        top = sums.top;
    } else {
        const float scales[2] = {c, LOG2E};
        running_sums<2> sums;
        sums.clear();
        for_each_vector<T, W, 4, false>(row, Vv, [&](float (&x)[W], int64_t) { sums.template add<W>(x, scales); });
        sums.merge(rest, scales, {inv_T, 1.0});
        top = sums.top;
    }
    float head_top = -CUDART_INF_F;
    for (int i = threadIdx.x; i < K; i += THREADS) head_top = fmaxf(head_top, head_z[i]);
    head_top = block_max(head_top);
    double head_sum = 0, head_sum1 = 0, P = 0;
    if (head_top > -CUDART_INF_F)
        #pragma unroll 1
        for (int i = threadIdx.x; i < K; i += THREADS) {
            double z = (double)head_z[i] - head_top;
            head_sum += exp(z * inv_T);
            head_sum1 += exp(z);
        }
    #pragma unroll 1
    for (int i = threadIdx.x; i < K; i += THREADS) P += exp((double)logp[i]);
    head_sum = block_sum(head_sum);
    head_sum1 = block_sum(head_sum1);
    P = block_sum(P);
    double lse = head_sum > 0 ? log_add(head_top * inv_T + log(head_sum), rest[0]) : rest[0];
    double lse1 = head_sum1 > 0 ? log_add(head_top + log(head_sum1), rest[1]) : rest[1];

    double scale_p = 1, q_weight = P, r = 0, divergence = 0, log_scale = 0;
    if (K) {
        if (tail == TAIL_BUCKET) {
            double log_tail = t.tail_logmass[n];
            r = rest[0] > -CUDART_INF ? exp(log_tail) : 0;
            q_weight = P + r;
            if (r > 0 && threadIdx.x == 0) divergence = r * (log_tail - (rest[0] - lse));
        } else if (tail == TAIL_RENORMALISE) {
            scale_p = 1 / P;
            log_scale = log(scale_p);
            q_weight = 1;
        }
        #pragma unroll 1
        for (int i = threadIdx.x; i < K; i += THREADS) {
            double p = exp((double)logp[i]) * scale_p;
            if (p > 0) divergence += p * (logp[i] + log_scale - (head_z[i] * inv_T - lse));
        }
        divergence = block_sum(divergence);
    }
    if (threadIdx.x == 0) {
        kd_out[n] = (float)((double)k.temperature * k.temperature * divergence);
        ce_out[n] = (float)(lse1 - z_label);
    }

    /* off S, with e^{z/T - lse_rest} <= 1 as the base; s1 and s2 are what (z - top) c comes short of, in powers of two */
    double a = 0, b = k.ce, share = exp(rest[0] - lse);
    bool some = rest[0] > -CUDART_INF;
    if (K && k.kd != 0 && some) a = k.kd * (q_weight * share - r);
    float a1 = (float)a, s1 = some ? (float)((rest[0] - (one ? 1 : inv_T) * top) * 1.4426950408889634) : 0, a2 = (float)b, s2 = some ? (float)((lse1 - top) * 1.4426950408889634) : 0;
    if (one) {
        a1 = (float)(a + b * exp(rest[1] - lse1));
        a2 = 0;
    }
    float c1 = one ? LOG2E : c;
    if (threadIdx.x == 0) kept = {lse, lse1, rest[0], q_weight, scale_p, a};
    if (a2 == 0)
        for_each_vector<T, W, 4, true>(row, Vv, [&](float (&x)[W], int64_t j) {
            #pragma unroll
            for (int i = 0; i < W; i++) x[i] = term(a1, x[i] - top, c1, s1);
            store<T, W>(row + j, x);
        });
    else
        for_each_vector<T, W, 4, true>(row, Vv, [&](float (&x)[W], int64_t j) {
            #pragma unroll
            for (int i = 0; i < W; i++) x[i] = term(a1, x[i] - top, c1, s1) + term(a2, x[i] - top, LOG2E, s2);
            store<T, W>(row + j, x);
        });
    clear_columns<T, W>(row, div_up(Vv, W) * W, V);
    __syncthreads();
    /* S, and the label */
    #pragma unroll 1
    for (int i = threadIdx.x; i < K; i += THREADS) {
        double z = head_z[i], g = 0;
        if (k.kd != 0) g = k.kd * (kept.q_weight * exp(z * (1 / k.temperature) - kept.lse) - exp((double)logp[i]) * kept.scale_p);
        if (k.ce != 0) g += k.ce * (ids[i] == label ? expm1(z - kept.lse1) : exp(z - kept.lse1));
        row[ids[i]] = from_float<T>((float)g);
    }
    if (threadIdx.x == 0 && !label_in_head && k.ce != 0)
        row[label] = from_float<T>((float)((kept.a != 0 ? kept.a * exp((double)z_label * (1 / k.temperature) - kept.rest) : 0) + k.ce * expm1((double)z_label - kept.lse1)));
}

/* log(a + (1-a) e^d): through log1p and expm1 near d = 0, from the larger side elsewhere */
__device__ __forceinline__ float log_mix(float a, float d)
{
    float larger = 0;
    if (d > 0) { larger = d; a = 1 - a; d = -d; }
    if (d > -1) return larger + log1pf((1 - a) * expm1f(d));
    float m = a + (1 - a) * expf(d);
    return larger + (m > 0 ? logf(m) : d);
}

/* One id's term, all from d = log q - log p and the two probabilities; m = w p + (1-w) q, so that log p - log m = -log_mix(w, d) and
 * log q - log m = -log_mix(1-w, -d). h is dD/dq where D is not linear in log q. */
__device__ __forceinline__ void divergence_term(divergence kind, float w, float p, float q, float d, float &loss, float &h)
{
    loss = h = 0;
    if (kind == DIV_REVERSE_KL) {
        h = d;
        loss = kl_term(q, p, -d);
    } else if (kind == DIV_JSD) {
        float m = w * p + (1 - w) * q, lm = log_mix(1 - w, -d);
        loss = w * kl_term(p, m, log_mix(w, d)) + (1 - w) * kl_term(q, m, lm);
        if (q > 0) h = -(1 - w) * lm;
    } else if (kind == DIV_SKEW_KL) {
        float lm = log_mix(w, d);
        loss = kl_term(p, w * p + (1 - w) * q, lm);
        h = (1 - w) * (p > 0 ? -expm1f(-lm) : 1);
    } else if (kind == DIV_TVD) {
        loss = 0.5f * fabsf(p - q);
        h = q > p ? 0.5f : q < p ? -0.5f : 0;
    }
}

template <typename T, typename TT, int W, bool FORWARD>
__global__ void __launch_bounds__(THREADS, 2) distill_full_kernel(T *logits, float *kd_out, float *ce_out, distill_targets t, divergence kind, float w, loss_scales k, int64_t V, int64_t Vv)
{
    int64_t n = blockIdx.x;
    T *row = logits + n * V;
    const TT *teacher = (const TT *)t.full + n * t.full_stride;
    int label = t.labels[n];
    if (label < 0) {
        clear_columns<T, W>(row, 0, V);
        if (threadIdx.x == 0) kd_out[n] = ce_out[n] = 0;
        return;
    }
    double z_label = to_float(row[label]);
    const float inv_T = 1 / k.temperature, c[2] = {inv_T * LOG2E, LOG2E}, ct[1] = {t.full_scale * LOG2E};
    running_sums<2> sums;
    running_sums<1> teacher_sums;
    double lse[2], lse_p[1];
    sums.clear();
    teacher_sums.clear();
    for_each_pair<T, TT, W, 2, false>(row, teacher, Vv, [&](float (&x)[W], float (&y)[W], int64_t) {
        sums.template add<W>(x, c);
        teacher_sums.template add<W>(y, ct);
    });
    sums.merge(lse, c, {(double)inv_T, 1.0});
    teacher_sums.merge(lse_p, ct, {(double)t.full_scale});

    row_shift q_of = shift_from(sums.top, inv_T, lse[0]), one_of = shift_from(sums.top, 1, lse[1]), p_of = shift_from(teacher_sums.top, t.full_scale, lse_p[0]);
    float h_top = 0, mean = 0;
    double total = 0;
    if (!FORWARD) {
        /* the gradient needs sum q h first; h counts from where q is largest: a student that is sure has mean h = h there, and the
         * difference is all that matters */
        __shared__ int most_likely;
        if (threadIdx.x == 0) most_likely = (int)Vv;
        __syncthreads();
        for_each_vector<T, W, 1, false>(row, Vv, [&](float (&x)[W], int64_t j) {
            for (int i = 0; i < W; i++) if (j + i < Vv && x[i] == sums.top) atomicMin(&most_likely, (int)(j + i));
        });
        __syncthreads();
        if (most_likely < Vv) {
            float log_q = q_of.log_of(to_float(row[most_likely])), log_p = p_of.log_of(to_float(teacher[most_likely])), unused;
            divergence_term(kind, w, exp2_fast(log_p * LOG2E), exp2_fast(log_q * LOG2E), log_q - log_p, unused, h_top);
        }
        double mean_h = 0;
        for_each_pair<T, TT, W, 1, false>(row, teacher, Vv, [&](float (&x)[W], float (&y)[W], int64_t j) {
            float s = 0, m = 0;
            for (int i = 0; i < W; i++) {
                if (j + i >= Vv) continue;
                float log_q = q_of.log_of(x[i]), log_p = p_of.log_of(y[i]), q = exp2_fast(log_q * LOG2E), l, h;
                divergence_term(kind, w, exp2_fast(log_p * LOG2E), q, log_q - log_p, l, h);
                s += l;
                if (q > 0) m += q * (h - h_top);
            }
            total += s;
            mean_h += m;
        });
        total = block_sum(total);
        mean = (float)block_sum(mean_h);
    }
    for_each_pair<T, TT, W, 2, true>(row, teacher, Vv, [&](float (&x)[W], float (&y)[W], int64_t j) {
        float s = 0;
        #pragma unroll
        for (int i = 0; i < W; i++) {
            float log_q = q_of.log_of(x[i]), log_p = p_of.log_of(y[i]), q = exp2_fast(log_q * LOG2E), p = exp2_fast(log_p * LOG2E), z = x[i], g;
            if (FORWARD) {
                if (j + i < Vv) s += kl_term(p, q, log_q - log_p);
                g = q - p;
            } else {
                float l, h;
                divergence_term(kind, w, p, q, log_q - log_p, l, h);
                g = q > 0 ? q * (h - h_top) - q * mean : 0;
            }
            x[i] = k.kd != 0 ? k.kd * g : 0;
            if (k.ce != 0) x[i] += k.ce * (exp2_fast(one_of.log_of(z) * LOG2E) - (j + i == label ? 1 : 0));
            if (j + i >= Vv) x[i] = 0;
        }
        if (FORWARD) total += s;
        store<T, W>(row + j, x);
    });
    if (FORWARD) total = block_sum(total);
    clear_columns<T, W>(row, div_up(Vv, W) * W, V);
    if (threadIdx.x == 0) {
        kd_out[n] = (float)((double)k.temperature * k.temperature * total);
        ce_out[n] = (float)(lse[1] - z_label);
    }
}

template <typename T, typename TT, int W>
static void launch_full(struct backend *be, act *logits, float *kd, float *ce, const struct distill_targets *t, const struct distill_args *a, const loss_scales &k, int64_t R, int64_t V, int64_t Vv)
{
    cudaStream_t stream = cuda_state_of(be)->stream;
    float w = a->divergence == DIV_JSD ? a->beta : a->alpha;
    if (a->divergence == DIV_FORWARD_KL || (a->divergence == DIV_SKEW_KL && a->alpha == 0)) distill_full_kernel<T, TT, W, true><<<(unsigned)R, THREADS, 0, stream>>>((T *)logits, kd, ce, *t, a->divergence, w, k, V, Vv);
    else distill_full_kernel<T, TT, W, false><<<(unsigned)R, THREADS, 0, stream>>>((T *)logits, kd, ce, *t, a->divergence, w, k, V, Vv);
}

template <typename T, int W>
static void launch(struct backend *be, act *logits, float *kd, float *ce, const struct distill_targets *t, const struct distill_args *a, const loss_scales &k, int64_t R, int64_t V, int64_t Vv)
{
    if (t->kind == TARGET_FULL) {
        if (t->full_dtype == DTYPE_F32) launch_full<T, float, W>(be, logits, kd, ce, t, a, k, R, V, Vv);
        else if (t->full_dtype == DTYPE_F16) launch_full<T, __half, W>(be, logits, kd, ce, t, a, k, R, V, Vv);
        else launch_full<T, bf16, W>(be, logits, kd, ce, t, a, k, R, V, Vv);
    } else {
        size_t bytes = t->kind == TARGET_TOPK ? (size_t)t->K * sizeof(float) : 0;
        CUDA_REQUIRE(bytes <= 200 << 10, "distill_loss: more than 51,200 teacher entries per token");
        if (bytes > 40 << 10) CUDA_CHECK(cudaFuncSetAttribute((const void *)distill_truncated_kernel<T, W>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
        distill_truncated_kernel<T, W><<<(unsigned)R, THREADS, bytes, cuda_state_of(be)->stream>>>((T *)logits, kd, ce, *t, a->tail, k, V, Vv);
    }
    CUDA_CHECK(cudaGetLastError());
}

extern "C" void cuda_distill_loss(struct backend *be, act *logits, const struct distill_losses *out, const struct distill_targets *t, const struct distill_args *a, int64_t R, int64_t V, int64_t Vv)
{
    if (!R) return;
    float *kd = out->kd, *ce = out->ce;
    CUDA_REQUIRE(t->kind != TARGET_SAMPLES && (t->kind == TARGET_FULL ? a->divergence != DIV_MIX : a->divergence == DIV_FORWARD_KL) && !out->kd_squares && !a->floor, "not in this kernel yet");
    CUDA_REQUIRE(t->kind != TARGET_TOPK || a->tail != TAIL_UNBIASED, "the K best have no unbiased objective");
    loss_scales k = {a->kd_weight * a->temperature * a->gradient_scale, a->ce_weight * a->gradient_scale, a->temperature};
    bool full = t->kind == TARGET_FULL;
    DISPATCH(be->act_dtype, T,
        constexpr int W = vector_width<T>();
        if (V % W == 0 && aligned16(logits) && (!full || (t->full_stride % 8 == 0 && aligned16(t->full)))) launch<T, W>(be, logits, kd, ce, t, a, k, R, V, Vv);
        else launch<T, 1>(be, logits, kd, ce, t, a, k, R, V, Vv));
}
