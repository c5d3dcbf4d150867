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
#include "kernels/cuda/distill_terms.cuh"

enum { THREADS = 512 };

/* What a kernel computes: forward KL alone; also the squared norms of the gradient's parts; any divergence (and the norms, which cost little there).
 * The first is the production path and pays for nothing else. */
enum form { PLAIN, MEASURED, OTHERS };

/* kd_weight T gradient_scale (times forward KL's weight where it is alone), ce_weight gradient_scale, T, forward KL's weight where it is alone,
 * gradient_scale^-2 */
struct loss_scales { float kd, ce, temperature, forward; double unscaled; };

template <typename T, int W> __device__ __forceinline__ void clear_columns(T *row, int64_t from, int64_t to)
{
    float zero[W] = {};
    for (int64_t j = from + (int64_t)threadIdx.x * W; j < to; j += THREADS * W) store<T, W>(row + j, zero);
}

/* e^{x c - s}, 0 without a coefficient: 0 * NaN is nobody's gradient */
__device__ __forceinline__ float term(float a, float x, float c, float s) { return a != 0 ? a * exp2_fast(fmaf(x, c, -s)) : 0; }

__device__ __forceinline__ void store_losses(const distill_losses &out, int64_t n, double kd, double ce, double kd_squares, double ce_squares)
{
    out.kd[n] = (float)kd;
    out.ce[n] = (float)ce;
    if (!out.kd_squares) return;
    out.kd_squares[n] = (float)kd_squares;
    out.ce_squares[n] = (float)ce_squares;
}

/* Hard labels, truncated targets and samples. The row's z on S waits in shared memory. */
template <typename T, int W, form FORM>
__global__ void __launch_bounds__(THREADS, FORM == OTHERS ? 1 : 2) distill_truncated_kernel(T *logits, distill_losses out, distill_targets t, tail_policy tail, loss_scales k, terms m, int64_t V, int64_t Vv)
{
    extern __shared__ float head_z[];
    __shared__ int label_in_head, first_top;
    __shared__ struct { double lse, lse1, rest, q_weight, scale_p, a, mean, base, divergence; } kept;      /* what the last lines need: not worth registers during the loops */
    int64_t n = blockIdx.x;
    T *row = logits + n * V;
    int label = t.labels[n], K = t.kind == TARGET_TOPK || t.kind == TARGET_SAMPLES ? t.K : 0;
    if (label < 0) {
        clear_columns<T, W>(row, 0, V);
        if (threadIdx.x == 0) store_losses(out, n, 0, 0, 0, 0);
        return;
    }
    const int32_t *ids = t.head_ids + n * K;
    const float *logp = t.head_logprob + n * K, *weight = t.kind == TARGET_SAMPLES ? t.weight + n * K : nullptr;
    float z_label = to_float(row[label]), inv_T_fp32 = 1 / k.temperature, c = inv_T_fp32 * LOG2E, top;
    double inv_T = inv_T_fp32;
    auto stored = [&](int i) { return !weight || weight[i] > 0; };      /* an unused slot's id may be another slot's */

    if (threadIdx.x == 0) label_in_head = 0;
    for (int i = threadIdx.x; i < K; i += THREADS) head_z[i] = stored(i) ? to_float(row[ids[i]]) : -CUDART_INF_F;
    __syncthreads();
    for (int i = threadIdx.x; i < K; i += THREADS)
        if (stored(i)) {
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
    for (int i = threadIdx.x; i < K; i += THREADS) P += weight ? (double)weight[i] : exp((double)logp[i]);
    head_sum = block_sum(head_sum);
    head_sum1 = block_sum(head_sum1);
    P = block_sum(P);
    double lse = head_sum > 0 ? log_add(head_top * inv_T + log(head_sum), rest[0]) : rest[0];
    double lse1 = head_sum1 > 0 ? log_add(head_top + log(head_sum1), rest[1]) : rest[1];

    double scale_p = 1, q_weight = P, r = 0, divergence = 0, log_scale = 0, log_tail = -CUDART_INF;
    bool some = rest[0] > -CUDART_INF;
    if (K) {
        if (tail == TAIL_BUCKET) {
            if (some) log_tail = t.tail_logmass[n];
            r = exp(log_tail);
            q_weight = P + r;
            if (r > 0 && threadIdx.x == 0) divergence = r * (log_tail - (rest[0] - lse));
        } else if (tail == TAIL_RENORMALISE) {
            scale_p = 1 / P;
            log_scale = log(scale_p);
            q_weight = 1;
        }
        #pragma unroll 1
        for (int i = threadIdx.x; i < K; i += THREADS) {
            double p = weight ? (double)weight[i] : exp((double)logp[i]) * scale_p;
            if (p > 0) divergence += p * (logp[i] + log_scale - (head_z[i] * inv_T - lse));
        }
        divergence = block_sum(divergence);
    }

    /* off S, with e^{z/T - lse_rest} <= 1 as the base; s1 and s2 are what (z - top) c comes short of, in powers of two */
    double a = 0, b = k.ce, share = exp(rest[0] - lse);
    float slope = 0;
    if (K && k.kd != 0 && some) a = k.kd * (q_weight * share - r);
    if constexpr (FORM == OTHERS) {
        /* The other divergences: off S h_j = h_rest + by_rank log q_j; h counts from where q is largest. top: the complement's largest. */
        bool by_id = tail == TAIL_RENORMALISE && m.reverse != 0;
        double log_q_rest = rest[0] - lse, log_q_top = some ? top * inv_T - lse : -CUDART_INF, h_rest = 0, by_rank = by_id ? m.reverse : 0, base = 0, mean = 0, others = 0, h;
        if (some) {
            terms constant = m;                                        /* what the rest is as one outcome */
            if (by_id) constant.reverse = 0;
            double loss = other_terms(constant, log_tail, log_q_rest, m.log_each + log((double)(Vv - K)), h_rest);
            if (threadIdx.x == 0) others = loss;
            if (by_id) h_rest -= by_rank * m.log_each;
            base = h_rest + (by_id ? by_rank * log_q_top : 0);
        }
        if (threadIdx.x == 0) first_top = K;
        __syncthreads();
        for (int i = threadIdx.x; i < K; i += THREADS) if (head_z[i] == head_top) atomicMin(&first_top, i);
        __syncthreads();
        if (head_top * inv_T >= (by_id ? (some ? top * inv_T : -CUDART_INF) : rest[0])) other_terms(m, (double)logp[first_top] + log_scale, head_top * inv_T - lse, (double)m.log_each, base);
        #pragma unroll 1
        for (int i = threadIdx.x; i < K; i += THREADS) {
            double log_q = head_z[i] * inv_T - lse;
            others += other_terms(m, (double)logp[i] + log_scale, log_q, (double)m.log_each, h);
            mean += weighted(log_q, h - base);
        }
        if (by_id && some) {                                           /* sum over the complement of its shares e times (z - top) / T, from one more look at it */
            double below = 0;
            const float shift = (float)((rest[0] - inv_T * top) * 1.4426950408889634);
            for_each_vector<T, W, 2, false>(row, Vv, [&](float (&x)[W], int64_t) {
                float sum = 0;
                #pragma unroll
                for (int i = 0; i < W; i++) {
                    float d = x[i] - top, e = exp2_fast(fmaf(d, c, -shift));
                    if (e > 0) sum += e * (d * inv_T_fp32);
                }
                below += sum;
            });
            below = block_sum(below);
            if (threadIdx.x == 0) {
                others += share * by_rank * (below + log_q_top - m.log_each);
                mean += share * (h_rest + by_rank * (log_q_top + below) - base);
            }
        } else if (some && threadIdx.x == 0) mean += weighted(log_q_rest, h_rest - base);
        others = block_sum(others);
        mean = block_sum(mean);
        divergence = m.forward * divergence + others;
        if (k.kd != 0 && some) {
            a = k.kd * (m.forward * (q_weight * share - r) + share * (h_rest + (by_id ? by_rank * log_q_top : 0) - base - mean));
            slope = (float)(k.kd * share * by_rank * inv_T);
        }
        if (threadIdx.x == 0) { kept.mean = mean; kept.base = base; }
    } else divergence *= k.forward;

    float a1 = (float)a, s1 = some ? (float)((rest[0] - (one ? 1 : inv_T) * top) * 1.4426950408889634) : 0, a2 = (float)b, s2 = some ? (float)((lse1 - top) * 1.4426950408889634) : 0;
    float kd1 = a1, ce1 = 0, kd_squares = 0, ce_squares = 0;           /* one: KD's and CE's coefficients apart */
    if (one) {
        ce1 = (float)(b * exp(rest[1] - lse1));
        a1 = (float)(a + b * exp(rest[1] - lse1));
        a2 = 0;
    }
    float c1 = one ? LOG2E : c;
    if (threadIdx.x == 0) { kept.lse = lse; kept.lse1 = lse1; kept.rest = rest[0]; kept.q_weight = q_weight; kept.scale_p = scale_p; kept.a = a; kept.divergence = divergence; }
    if constexpr (FORM != PLAIN)
        for_each_vector<T, W, 2, true>(row, Vv, [&](float (&x)[W], int64_t j) {
            #pragma unroll
            for (int i = 0; i < W; i++) {
                float d = x[i] - top, e = exp2_fast(fmaf(d, c1, -s1)), e2 = a2 != 0 ? exp2_fast(fmaf(d, LOG2E, -s2)) : 0, extra = 0;
                if constexpr (FORM == OTHERS) if (e > 0) extra = slope * d * e;
                float kd = e > 0 ? kd1 * e + extra : 0, ce = one ? ce1 * e : a2 * e2;      /* padding gets 0 also where D is infinite */
                x[i] = e > 0 ? (a1 * e + extra) + a2 * e2 : a2 * e2;
                if (j + i != label) { kd_squares += kd * kd; ce_squares += ce * ce; }
            }
            store<T, W>(row + j, x);
        });
    else if (a2 == 0)
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
    double squares[2] = {kd_squares, ce_squares};
    #pragma unroll 1
    for (int i = threadIdx.x; i < K; i += THREADS) {
        if (!stored(i)) continue;
        double z = head_z[i], log_q = z * (1 / k.temperature) - kept.lse, kd = 0, ce = 0;
        if (k.kd != 0) {
            kd = kept.q_weight * exp(log_q) - (weight ? (double)weight[i] : exp((double)logp[i]) * kept.scale_p);
            if constexpr (FORM == OTHERS) {
                double h;
                other_terms(m, (double)logp[i] + log_scale, log_q, (double)m.log_each, h);
                kd = m.forward * kd + weighted(log_q, h - kept.base) - exp(log_q) * kept.mean;
            }
            kd *= k.kd;
        }
        if (k.ce != 0) ce = k.ce * (ids[i] == label ? expm1(z - kept.lse1) : exp(z - kept.lse1));
        row[ids[i]] = from_float<T>((float)(kd + ce));
        if constexpr (FORM != PLAIN) { squares[0] += kd * kd; squares[1] += ce * ce; }
    }
    if (threadIdx.x == 0 && !label_in_head) {
        double kd = 0, ce = k.ce != 0 ? k.ce * expm1((double)z_label - kept.lse1) : 0;
        if (kept.a != 0 || slope != 0) kd = (kept.a + (double)slope * (z_label - top)) * exp((double)z_label * (1 / k.temperature) - kept.rest);
        if (k.ce != 0) row[label] = from_float<T>((float)(kd + ce));
        if constexpr (FORM != PLAIN) { squares[0] += kd * kd; squares[1] += ce * ce; }
    }
    if constexpr (FORM != PLAIN) {
        squares[0] = block_sum(squares[0]);
        squares[1] = block_sum(squares[1]);
    }
    if (threadIdx.x == 0) store_losses(out, n, (double)k.temperature * k.temperature * kept.divergence, kept.lse1 - z_label, squares[0] * k.unscaled, squares[1] * k.unscaled);
}

template <typename T, typename TT, int W, form FORM>
__global__ void __launch_bounds__(THREADS, 2) distill_full_kernel(T *logits, distill_losses out, distill_targets t, loss_scales k, terms m, int64_t V, int64_t Vv)
{
    int64_t n = blockIdx.x;
    T *row = logits + n * V;
    const TT *teacher = (const TT *)t.full + n * t.full_stride;
    int label = t.labels[n];
    if (label < 0) {
        clear_columns<T, W>(row, 0, V);
        if (threadIdx.x == 0) store_losses(out, n, 0, 0, 0, 0);
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
    float base = 0, mean = 0, kd_squares = 0, ce_squares = 0;
    double total = 0;
    if (FORM == OTHERS) {
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
            other_terms(m, log_p, log_q, exp2_fast(log_p * LOG2E), exp2_fast(log_q * LOG2E), unused, base);
        }
        double mean_h = 0;
        for_each_pair<T, TT, W, 1, false>(row, teacher, Vv, [&](float (&x)[W], float (&y)[W], int64_t j) {
            float s = 0, h_sum = 0;
            for (int i = 0; i < W; i++) {
                if (j + i >= Vv) continue;
                float log_q = q_of.log_of(x[i]), log_p = p_of.log_of(y[i]), q = exp2_fast(log_q * LOG2E), p = exp2_fast(log_p * LOG2E), l, h;
                other_terms(m, log_p, log_q, p, q, l, h);
                s += l;
                if (m.forward != 0) s += m.forward * kl_term(p, q, log_q - log_p);
                if (q > 0) h_sum += q * (h - base);
            }
            total += s;
            mean_h += h_sum;
        });
        total = block_sum(total);
        mean = (float)block_sum(mean_h);
    }
    for_each_pair<T, TT, W, 2, true>(row, teacher, Vv, [&](float (&x)[W], float (&y)[W], int64_t j) {
        float s = 0;
        #pragma unroll
        for (int i = 0; i < W; i++) {
            float log_q = q_of.log_of(x[i]), log_p = p_of.log_of(y[i]), q = exp2_fast(log_q * LOG2E), p = exp2_fast(log_p * LOG2E), z = x[i], g, ce = 0;
            if (FORM != OTHERS) {
                if (j + i < Vv) s += kl_term(p, q, log_q - log_p);
                g = q - p;
            } else {
                float l, h;
                other_terms(m, log_p, log_q, p, q, l, h);
                g = q > 0 ? q * (h - base) - q * mean : 0;
                if (m.forward != 0) g += m.forward * (q - p);
            }
            x[i] = k.kd != 0 ? k.kd * g : 0;
            if (FORM != PLAIN && j + i < Vv) kd_squares += x[i] * x[i];
            if (k.ce != 0) x[i] += ce = k.ce * (exp2_fast(one_of.log_of(z) * LOG2E) - (j + i == label ? 1 : 0));
            if (FORM != PLAIN && j + i < Vv) ce_squares += ce * ce;
            if (j + i >= Vv) x[i] = 0;
        }
        if (FORM != OTHERS) total += s;
        store<T, W>(row + j, x);
    });
    if (FORM != OTHERS) total = k.forward * block_sum(total);
    clear_columns<T, W>(row, div_up(Vv, W) * W, V);
    double squares[2] = {0, 0};
    if (FORM != PLAIN) {
        squares[0] = block_sum((double)kd_squares);
        squares[1] = block_sum((double)ce_squares);
    }
    if (threadIdx.x == 0) store_losses(out, n, (double)k.temperature * k.temperature * total, lse[1] - z_label, squares[0] * k.unscaled, squares[1] * k.unscaled);
}

struct call { struct backend *be; act *logits; distill_losses out; const distill_targets *t; tail_policy tail; loss_scales k; terms m; form wanted; int64_t R, V, Vv; };

template <typename T, typename TT, int W, form FORM> static void start_full(const call &x)
{
    distill_full_kernel<T, TT, W, FORM><<<(unsigned)x.R, THREADS, 0, cuda_state_of(x.be)->stream>>>((T *)x.logits, x.out, *x.t, x.k, x.m, x.V, x.Vv);
}

template <typename T, int W, form FORM> static void start_truncated(const call &x)
{
    size_t bytes = x.t->kind == TARGET_NONE ? 0 : (size_t)x.t->K * sizeof(float);
    CUDA_REQUIRE(bytes <= 200 << 10, "distill_loss: more than 51,200 teacher entries per token");
    if (bytes > 40 << 10) CUDA_CHECK(cudaFuncSetAttribute((const void *)distill_truncated_kernel<T, W, FORM>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    distill_truncated_kernel<T, W, FORM><<<(unsigned)x.R, THREADS, bytes, cuda_state_of(x.be)->stream>>>((T *)x.logits, x.out, *x.t, x.tail, x.k, x.m, x.V, x.Vv);
}

template <typename T, int W, form FORM> static void start(const call &x)
{
    if (x.t->kind != TARGET_FULL) start_truncated<T, W, FORM>(x);
    else if (x.t->full_dtype == DTYPE_F32) start_full<T, float, W, FORM>(x);
    else if (x.t->full_dtype == DTYPE_F16) start_full<T, __half, W, FORM>(x);
    else start_full<T, bf16, W, FORM>(x);
    CUDA_CHECK(cudaGetLastError());
}

template <typename T, int W> static void launch(const call &x)
{
    if (x.wanted == PLAIN) start<T, W, PLAIN>(x);
    else if (x.wanted == MEASURED) start<T, W, MEASURED>(x);
    else start<T, W, OTHERS>(x);
}

extern "C" void cuda_distill_loss(struct backend *be, act *logits, const struct distill_losses *out, const struct distill_targets *t, const struct distill_args *a, int64_t R, int64_t V, int64_t Vv)
{
    if (!R) return;
    terms m = terms_of(a, Vv);
    bool truncated = t->kind == TARGET_TOPK || t->kind == TARGET_SAMPLES, full = t->kind == TARGET_FULL;
    CUDA_REQUIRE(!out->kd_squares == !out->ce_squares, "one part's squared norm without the other's");
    CUDA_REQUIRE(!truncated || (t->kind == TARGET_SAMPLES) == (a->tail == TAIL_UNBIASED), "a tail policy that these targets cannot have");
    CUDA_REQUIRE(!truncated || !m.others || (t->kind == TARGET_TOPK && a->tail != TAIL_DROP), "a divergence that has no meaning on these targets");
    CUDA_REQUIRE(t->kind != TARGET_TOPK || a->tail != TAIL_RENORMALISE || m.reverse == 0 || a->floor > 0, "reverse_kl to probabilities of 0");
    if (t->kind == TARGET_NONE) m.others = false;
    float forward = m.others ? 1 : m.forward;
    loss_scales k = {a->kd_weight * a->temperature * a->gradient_scale * forward, a->ce_weight * a->gradient_scale, a->temperature, forward, 1 / ((double)a->gradient_scale * a->gradient_scale)};
    call x = {be, logits, *out, t, a->tail, k, m, m.others ? OTHERS : out->kd_squares ? MEASURED : PLAIN, R, V, Vv};
    DISPATCH(be->act_dtype, T,
        constexpr int W = vector_width<T>();
        if (V % W == 0 && aligned16(logits) && (!full || (t->full_stride % 8 == 0 && aligned16(t->full)))) launch<T, W>(x);
        else launch<T, 1>(x));
}
