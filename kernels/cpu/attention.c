/* Causal attention inside packed documents, grouped queries (Vaswani et al. 2017; tiles and the running softmax as in Dao
 * et al. 2022). For a query i and the keys j <= i of its document (and j > i - window when there is one):
 *     s_ij = scale q_i k_j      p_ij = exp(s_ij - lse_i)      o_i = sum_j p_ij v_j
 *     dv_j += sum_i p_ij do_i   ds_ij = p_ij (do_i v_j - do_i o_i)   dq_i += scale sum_j ds_ij k_j   dk_j += scale sum_i ds_ij q_i
 * The score matrix exists one 64 x 64 tile at a time. Forward is parallel over (document, query head), backward over (document,
 * key/value head), whose query heads add to the same dk and dv in a fixed order. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/tile.h"

enum { TILE = 64 };   /* queries and keys per tile: q, k, v, scores of a head of 128 stay in a 256 KiB L2 */

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* floats of scratch per thread: two transposed tiles, two score tiles, two accumulators, and do.o of a document's query heads */
static size_t scratch_floats(int D, int group, int64_t max_doc) { return (size_t)(4 * TILE * D + 2 * TILE * TILE) + (size_t)group * (size_t)max_doc; }

/* The limits may be those of several models: their largest group is at most Hq. */
size_t cpu_attention_scratch(const struct op_limits *l) { return thread_scratch_bytes(scratch_floats(l->D, l->Hq, l->max_doc)); }

/* t[d][j] = x[j][d] for `rows` rows; columns past them are zero */
static void transpose_tile(float *t, const float *x, int64_t stride, int64_t rows, int D)
{
    for (int d = 0; d < D; d++)
        for (int64_t j = 0; j < TILE; j++) t[d * TILE + j] = j < rows ? x[j * stride + d] : 0;
}

/* scores[i][j] = scale q_i k_j, -INFINITY where i may not see j; i and j count from i0 and j0 inside the document */
static void score_tile(float *scores, const float *q, int64_t stride, const float *k_transposed, int64_t i0, int64_t rows, int64_t j0, int64_t columns,
                       const struct attention_args *a)
{
    memset(scores, 0, (size_t)(rows * TILE) * sizeof *scores);
    tile_product(scores, TILE, q, stride, 1, k_transposed, TILE, rows, TILE, a->D);
    if (columns == TILE && j0 + TILE - 1 <= i0 && (!a->window || i0 + rows - a->window <= j0)) {          /* every query sees every key */
        for (int64_t i = 0; i < rows * TILE; i++) scores[i] *= a->scale;
        return;
    }
    for (int64_t i = 0; i < rows; i++) {
        int64_t last = smaller(i0 + i - j0, columns - 1), first = a->window ? i0 + i - a->window + 1 - j0 : 0;
        for (int64_t j = 0; j < TILE; j++) scores[i * TILE + j] = j > last || j < first ? -INFINITY : scores[i * TILE + j] * a->scale;
    }
}

static int64_t first_key_tile(int64_t i0, int64_t window) { return window && i0 - window + 1 > 0 ? (i0 - window + 1) / TILE * TILE : 0; }

static void forward_head(float *scratch, float *o, float *lse, const float *q, const float *k, const float *v, int64_t length, const struct attention_args *a)
{
    int64_t D = a->D, q_width = a->Hq * D, kv_width = a->Hkv * D;
    float *k_transposed = scratch, *scores = k_transposed + TILE * D, *sum = scores + TILE * TILE, top[TILE], weight[TILE];

    for (int64_t i0 = 0; i0 < length; i0 += TILE) {
        int64_t rows = smaller(TILE, length - i0);
        memset(sum, 0, (size_t)(rows * D) * sizeof *sum);
        for (int64_t i = 0; i < rows; i++) { top[i] = -INFINITY; weight[i] = 0; }
        for (int64_t j0 = first_key_tile(i0, a->window); j0 < i0 + rows; j0 += TILE) {
            int64_t columns = smaller(TILE, length - j0);
            transpose_tile(k_transposed, k + j0 * kv_width, kv_width, columns, a->D);
            score_tile(scores, q + i0 * q_width, q_width, k_transposed, i0, rows, j0, columns, a);
            for (int64_t i = 0; i < rows; i++) {
                float *s = scores + i * TILE, m = fmaxf(top[i], row_max(s, TILE));
                if (m == -INFINITY) { memset(s, 0, TILE * sizeof *s); continue; }       /* the window hides the whole tile from this row */
                float shrink = exp_fp32(top[i] - m), added = 0;
                #pragma omp simd reduction(+ : added)
                for (int64_t j = 0; j < TILE; j++) { s[j] = exp_fp32(s[j] - m); added += s[j]; }
                weight[i] = weight[i] * shrink + added;
                top[i] = m;
                for (int64_t d = 0; d < D; d++) sum[i * D + d] *= shrink;
            }
            tile_product(sum, D, scores, TILE, 1, v + j0 * kv_width, kv_width, rows, D, columns);
        }
        for (int64_t i = 0; i < rows; i++) {
            float r = 1 / weight[i];
            for (int64_t d = 0; d < D; d++) o[(i0 + i) * q_width + d] = sum[i * D + d] * r;
            lse[i0 + i] = top[i] + logf(weight[i]);
        }
    }
}

void cpu_attention_forward(struct backend *be, act *o, float *lse, const act *q, const act *k, const act *v, const struct attention_args *a)
{
    int64_t D = a->D, group = a->Hq / a->Hkv;
    #pragma omp parallel for schedule(dynamic)
    for (int64_t task = 0; task < a->n_docs * a->Hq; task++) {
        int64_t begin = a->doc_begin[task / a->Hq], end = a->doc_begin[task / a->Hq + 1], h = task % a->Hq;
        int64_t q_at = (begin * a->Hq + h) * D, kv_at = (begin * a->Hkv + h / group) * D;
        forward_head(thread_scratch(be, scratch_floats(a->D, (int)group, a->max_doc)), fp32(o) + q_at, lse + h * a->N + begin,
                     cfp32(q) + q_at, cfp32(k) + kv_at, cfp32(v) + kv_at, end - begin, a);
    }
}

/* The pointers are at the first query head of the group, and at the key/value head, of the document's first position. */
static void backward_group(float *scratch, float *dq, float *dk, float *dv, const float *d_o, const float *o, const float *lse, const float *q, const float *k, const float *v,
                           int64_t length, const struct attention_args *a)
{
    int64_t D = a->D, q_width = a->Hq * D, kv_width = a->Hkv * D;
    int group = a->Hq / a->Hkv;
    float *k_transposed = scratch, *v_transposed = k_transposed + TILE * D, *dk_tile = v_transposed + TILE * D, *dv_tile = dk_tile + TILE * D;
    float *p = dv_tile + TILE * D, *dp = p + TILE * TILE, *o_dot_do = dp + TILE * TILE;

    for (int64_t i = 0; i < length; i++)
        for (int g = 0; g < group; g++) {
            const float *oi = o + i * q_width + g * D, *di = d_o + i * q_width + g * D;
            float dot = 0;
            #pragma omp simd reduction(+ : dot)
            for (int64_t d = 0; d < D; d++) dot += oi[d] * di[d];
            o_dot_do[g * length + i] = dot;
            memset(dq + i * q_width + g * D, 0, (size_t)D * sizeof *dq);
        }
    for (int64_t j0 = 0; j0 < length; j0 += TILE) {
        int64_t columns = smaller(TILE, length - j0), last_query = a->window ? smaller(length, j0 + columns - 1 + a->window) : length;
        transpose_tile(k_transposed, k + j0 * kv_width, kv_width, columns, a->D);
        transpose_tile(v_transposed, v + j0 * kv_width, kv_width, columns, a->D);
        memset(dk_tile, 0, (size_t)(2 * TILE * D) * sizeof *dk_tile);             /* and dv_tile behind it */
        for (int g = 0; g < group; g++)
            for (int64_t i0 = j0; i0 < last_query; i0 += TILE) {
                int64_t rows = smaller(TILE, length - i0);
                const float *qi = q + i0 * q_width + g * D, *di = d_o + i0 * q_width + g * D;
                score_tile(p, qi, q_width, k_transposed, i0, rows, j0, columns, a);
                memset(dp, 0, (size_t)(rows * TILE) * sizeof *dp);
                tile_product(dp, TILE, di, q_width, 1, v_transposed, TILE, rows, TILE, D);
                for (int64_t i = 0; i < rows; i++) {
                    float lse_i = lse[g * a->N + i0 + i], delta = o_dot_do[g * length + i0 + i];
                    #pragma omp simd
                    for (int64_t j = 0; j < TILE; j++) {
                        float pij = exp_fp32(p[i * TILE + j] - lse_i);
                        p[i * TILE + j] = pij;
                        dp[i * TILE + j] = pij * (dp[i * TILE + j] - delta) * a->scale;
                    }
                }
                tile_product(dv_tile, D, p, 1, TILE, di, q_width, columns, D, rows);
                tile_product(dk_tile, D, dp, 1, TILE, qi, q_width, columns, D, rows);
                tile_product(dq + i0 * q_width + g * D, q_width, dp, TILE, 1, k + j0 * kv_width, kv_width, rows, D, columns);
            }
        for (int64_t j = 0; j < columns; j++) {
            memcpy(dk + (j0 + j) * kv_width, dk_tile + j * D, (size_t)D * sizeof *dk);
            memcpy(dv + (j0 + j) * kv_width, dv_tile + j * D, (size_t)D * sizeof *dv);
        }
    }
}

void cpu_attention_backward(struct backend *be, act *dq, act *dk, act *dv, const act *d_o, const act *o, const float *lse, const act *q, const act *k, const act *v,
                            const struct attention_args *a)
{
    int64_t D = a->D, group = a->Hq / a->Hkv;
    #pragma omp parallel for schedule(dynamic)
    for (int64_t task = 0; task < a->n_docs * a->Hkv; task++) {
        int64_t begin = a->doc_begin[task / a->Hkv], end = a->doc_begin[task / a->Hkv + 1], kv = task % a->Hkv;
        int64_t q_at = (begin * a->Hq + kv * group) * D, kv_at = (begin * a->Hkv + kv) * D;
        backward_group(thread_scratch(be, scratch_floats(a->D, (int)group, a->max_doc)), fp32(dq) + q_at, fp32(dk) + kv_at, fp32(dv) + kv_at,
                       cfp32(d_o) + q_at, cfp32(o) + q_at, lse + kv * group * a->N + begin, cfp32(q) + q_at, cfp32(k) + kv_at, cfp32(v) + kv_at, end - begin, a);
    }
}

void cpu_attention_cached(struct backend *be, act *o, act *k_cache, act *v_cache, const act *q, const act *k, const act *v, int64_t n, int64_t past,
                          int Hq, int Hkv, int D, float scale, int64_t window)
{
    (void)be;
    int64_t kv_width = Hkv * D;
    memcpy(fp32(k_cache) + past * kv_width, k, (size_t)(n * kv_width) * sizeof(float));
    memcpy(fp32(v_cache) + past * kv_width, v, (size_t)(n * kv_width) * sizeof(float));
    #pragma omp parallel for schedule(static)
    for (int h = 0; h < Hq; h++) {
        int kv = h / (Hq / Hkv);
        for (int64_t i = 0; i < n; i++) {
            const float *qi = cfp32(q) + (i * Hq + h) * D;
            float *out = fp32(o) + (i * Hq + h) * D, top = -INFINITY;
            double weight = 0, sum[D];
            for (int d = 0; d < D; d++) sum[d] = 0;
            for (int64_t j = window && past + i - window + 1 > 0 ? past + i - window + 1 : 0; j <= past + i; j++) {
                const float *kj = cfp32(k_cache) + j * kv_width + kv * D, *vj = cfp32(v_cache) + j * kv_width + kv * D;
                float s = 0;
                #pragma omp simd reduction(+ : s)
                for (int d = 0; d < D; d++) s += qi[d] * kj[d];
                s *= scale;
                float m = fmaxf(top, s);
                double shrink = exp((double)top - m), p = exp((double)s - m);
                weight = weight * shrink + p;
                for (int d = 0; d < D; d++) sum[d] = sum[d] * shrink + p * vj[d];
                top = m;
            }
            for (int d = 0; d < D; d++) out[d] = (float)(sum[d] / weight);
        }
    }
}
