/* Evaluation of a chunk of positions (the maths is in cpu/compare_logits.c). A block per row; one pass for the two log-sum-exps, the
 * argmaxes and the label's ranks, one for the divergences. */
#include "kernels/cuda/row_stats.cuh"

enum { THREADS = 512 };

/* What one row says by itself: larger key first, then lower id */
struct row_view { unsigned long long best; int rank; };

template <int W> __device__ __forceinline__ void look(row_view &r, const float (&x)[W], int64_t j, int64_t Vv, float mine, int label)
{
    #pragma unroll
    for (int i = 0; i < W; i++) {
        if (j + i >= Vv) continue;
        int id = (int)(j + i);
        r.rank += !(x[i] < mine) && (x[i] != mine || id < label);
        uint32_t order = x[i] == x[i] ? ordered_key(x[i]) : id ? 0 : 0xffffffffu;      /* a NaN is the largest only where it comes first, as on the CPU */
        unsigned long long key = (unsigned long long)order << 32 | (uint32_t)~id;
        r.best = key > r.best ? key : r.best;
    }
}

template <typename T, int W>
__global__ void __launch_bounds__(THREADS, 2) compare_logits_kernel(eval_row *out, const T *__restrict__ student, const T *__restrict__ teacher, const int32_t *__restrict__ labels,
                                                                    int64_t Vs, int64_t Vt, int64_t Vv)
{
    int64_t n = blockIdx.x;
    const T *z = student + n * Vs, *t = teacher ? teacher + n * Vt : z;
    int label = labels[n];
    eval_row row = {};
    if (label >= 0) {
        const float c[1] = {LOG2E};
        float z_label = to_float(z[label]), t_label = to_float(t[label]);
        running_sums<1> sum_q, sum_p;
        row_view view_q = {0, 0}, view_p = {0, 0};
        double lse_q[1], lse_p[1], forward = 0, reverse = 0;
        sum_q.clear();
        sum_p.clear();
        for_each_pair<T, T, W, 1, false>(z, t, Vv, [&](float (&x)[W], float (&y)[W], int64_t j) {
            sum_q.template add<W>(x, c);
            look<W>(view_q, x, j, Vv, z_label, label);
            if (teacher) {
                sum_p.template add<W>(y, c);
                look<W>(view_p, y, j, Vv, t_label, label);
            }
        });
        sum_q.merge(lse_q, c, {1.0});
        int rank_q = block_sum(view_q.rank);
        row.counted = 1;
        row.student_logprob = (float)(z_label - lse_q[0]);
        row.student_confidence = expf((float)(sum_q.top - lse_q[0]));
        row.student_top1 = rank_q < 1;
        row.student_top5 = rank_q < 5;
        if (teacher) {
            sum_p.merge(lse_p, c, {1.0});
            int rank_p = block_sum(view_p.rank);
            unsigned long long best_q = block_reduce(view_q.best, 0ull, max_op()), best_p = block_reduce(view_p.best, 0ull, max_op());
            row_shift q_of = shift_from(sum_q.top, 1, lse_q[0]), p_of = shift_from(sum_p.top, 1, lse_p[0]);
            for_each_pair<T, T, W, 2, true>(z, t, Vv, [&](float (&x)[W], float (&y)[W], int64_t j) {
                float f = 0, r = 0;
                for (int i = 0; i < W; i++) {
                    if (j + i >= Vv) continue;
                    float log_p = p_of.log_of(y[i]), log_q = q_of.log_of(x[i]), p = exp2_fast(log_p * LOG2E), q = exp2_fast(log_q * LOG2E);
                    f += kl_term(p, q, log_q - log_p);
                    r += kl_term(q, p, log_p - log_q);
                }
                forward += f;
                reverse += r;
            });
            row.forward_kl = (float)block_sum(forward);
            row.reverse_kl = (float)block_sum(reverse);
            row.teacher_logprob = (float)(t_label - lse_p[0]);
            row.teacher_confidence = expf((float)(sum_p.top - lse_p[0]));
            row.teacher_top1 = rank_p < 1;
            row.teacher_top5 = rank_p < 5;
            row.agree = (uint32_t)best_q == (uint32_t)best_p;      /* the low halves are the ids */
        }
    }
    if (threadIdx.x == 0) out[n] = row;
}

extern "C" void cuda_compare_logits(struct backend *be, struct eval_row *out, const act *student, const act *teacher, const int32_t *labels, int64_t R, int64_t Vs, int64_t Vt, int64_t Vv)
{
    if (!R) return;
    cudaStream_t stream = cuda_state_of(be)->stream;
    DISPATCH(be->act_dtype, T,
        constexpr int W = vector_width<T>();
        if (Vs % W == 0 && aligned16(student) && (!teacher || (Vt % W == 0 && aligned16(teacher))))
            compare_logits_kernel<T, W><<<(unsigned)R, THREADS, 0, stream>>>(out, (const T *)student, (const T *)teacher, labels, Vs, Vt, Vv);
        else compare_logits_kernel<T, 1><<<(unsigned)R, THREADS, 0, stream>>>(out, (const T *)student, (const T *)teacher, labels, Vs, Vt, Vv));
    CUDA_CHECK(cudaGetLastError());
}
