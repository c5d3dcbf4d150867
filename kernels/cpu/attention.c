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

size_t cpu_attention_scratch(const struct op_limits *l) { return thread_scratch_bytes(scratch_floats(l->D, l->Hq / l->Hkv, l->max_doc)); }

/* t[d][j] = x[j][d] for `rows` rows; columns past them are zero */
static void transpose_tile(float *t, const float *x, int64_t stride, int64_t rows, int D)
{
    for (int d = 0; d < D; d++)
        for (int64_t j = 0; j < TILE; j++) t[d * TILE + j] = j < rows ? x[j * stride + d] : 0;
}

/* scores[i][j] = scale q_i k_j, -INFINITY where i may not see j; i and j count from i0 and j0 inside the document */
static void score_tile(float *scores, const float *q, int64_t stride, const float *k_transposed, int64_t i0, int64_t rows, int64_t j0, int64_t columns,
                       int D, float scale, int64_t window)
{
    memset(scores, 0, (size_t)(rows * TILE) * sizeof *scores);
    tile_product(scores, TILE, q, stride, 1, k_transposed, TILE, rows, TILE, D);
    for (int64_t i = 0; i < rows; i++) {
        int64_t last = smaller(i0 + i - j0, columns - 1), first = window ? i0 + i - window + 1 - j0 : 0;
        for (int64_t j = 0; j < TILE; j++) scores[i * TILE + j] = j > last || j < first ? -INFINITY : scores[i * TILE + j] * scale;
    }
}

static int64_t first_key_tile(int64_t i0, int64_t window) { return window && i0 - window + 1 > 0 ? (i0 - window + 1) / TILE * TILE : 0; }

static void forward_head(float *scratch, float *o, float *lse, const float *qkv, int64_t length, int h, const struct attention_args *a)
{
    int D = a->D, kv = h / (a->Hq / a->Hkv);
    int64_t width = (a->Hq + 2 * a->Hkv) * D, o_width = a->Hq * D;
    const float *q = qkv + h * D, *k = qkv + (a->Hq + kv) * D, *v = qkv + (a->Hq + a->Hkv + kv) * D;
    float *k_transposed = scratch, *scores = k_transposed + TILE * D, *sum = scores + TILE * TILE, top[TILE], weight[TILE];

    for (int64_t i0 = 0; i0 < length; i0 += TILE) {
        int64_t rows = smaller(TILE, length - i0);
        memset(sum, 0, (size_t)(rows * D) * sizeof *sum);
        for (int64_t i = 0; i < rows; i++) { top[i] = -INFINITY; weight[i] = 0; }
        for (int64_t j0 = first_key_tile(i0, a->window); j0 < i0 + rows; j0 += TILE) {
            int64_t columns = smaller(TILE, length - j0);
            transpose_tile(k_transposed, k + j0 * width, width, columns, D);
            score_tile(scores, q + i0 * width, width, k_transposed, i0, rows, j0, columns, D, a->scale, a->window);
            for (int64_t i = 0; i < rows; i++) {
                float *s = scores + i * TILE, m = fmaxf(top[i], row_max(s, TILE));
                if (m == -INFINITY) { memset(s, 0, TILE * sizeof *s); continue; }       /* the window hides the whole tile from this row */
                float shrink = exp_fp32(top[i] - m), added = 0;
                #pragma omp simd reduction(+ : added)
                for (int64_t j = 0; j < TILE; j++) { s[j] = exp_fp32(s[j] - m); added += s[j]; }
                weight[i] = weight[i] * shrink + added;
                top[i] = m;
                for (int d = 0; d < D; d++) sum[i * D + d] *= shrink;
            }
            tile_product(sum, D, scores, TILE, 1, v + j0 * width, width, rows, D, columns);
        }
        for (int64_t i = 0; i < rows; i++) {
            float r = 1 / weight[i];
            for (int d = 0; d < D; d++) o[(i0 + i) * o_width + h * D + d] = sum[i * D + d] * r;
            lse[i0 + i] = top[i] + logf(weight[i]);
        }
    }
}

void cpu_attention_forward(struct backend *be, act *o, float *lse, const act *qkv, const struct attention_args *a)
{
    int64_t width = (a->Hq + 2 * a->Hkv) * a->D;
    #pragma omp parallel for schedule(dynamic)
    for (int64_t task = 0; task < a->n_docs * a->Hq; task++) {
        int64_t begin = a->doc_begin[task / a->Hq], end = a->doc_begin[task / a->Hq + 1];
        int h = (int)(task % a->Hq);
        forward_head(thread_scratch(be, scratch_floats(a->D, a->Hq / a->Hkv, a->max_doc)), fp32(o) + begin * a->Hq * a->D, lse + h * a->N + begin,
                     cfp32(qkv) + begin * width, end - begin, h, a);
    }
}

static void backward_group(float *scratch, float *dqkv, const float *d_o, const float *o, const float *lse, const float *qkv, int64_t length, int kv, const struct attention_args *a)
{
    int D = a->D, group = a->Hq / a->Hkv, h0 = kv * group;
    int64_t width = (a->Hq + 2 * a->Hkv) * D, o_width = a->Hq * D, k_at = (a->Hq + kv) * D, v_at = (a->Hq + a->Hkv + kv) * D;
    float *k_transposed = scratch, *v_transposed = k_transposed + TILE * D, *dk = v_transposed + TILE * D, *dv = dk + TILE * D;
    float *p = dv + TILE * D, *dp = p + TILE * TILE, *o_dot_do = dp + TILE * TILE;

    for (int64_t i = 0; i < length; i++)
        for (int g = 0; g < group; g++) {
            const float *oi = o + i * o_width + (h0 + g) * D, *di = d_o + i * o_width + (h0 + g) * D;
            float dot = 0;
            #pragma omp simd reduction(+ : dot)
            for (int d = 0; d < D; d++) dot += oi[d] * di[d];
            o_dot_do[g * length + i] = dot;
            memset(dqkv + i * width + (h0 + g) * D, 0, (size_t)D * sizeof *dqkv);
        }
    for (int64_t j0 = 0; j0 < length; j0 += TILE) {
        int64_t columns = smaller(TILE, length - j0), last_query = a->window ? smaller(length, j0 + columns - 1 + a->window) : length;
        transpose_tile(k_transposed, qkv + j0 * width + k_at, width, columns, D);
        transpose_tile(v_transposed, qkv + j0 * width + v_at, width, columns, D);
        memset(dk, 0, (size_t)(2 * TILE * D) * sizeof *dk);                       /* dk and dv */
        for (int g = 0; g < group; g++)
            for (int64_t i0 = j0; i0 < last_query; i0 += TILE) {
                int64_t rows = smaller(TILE, length - i0);
                const float *q = qkv + i0 * width + (h0 + g) * D, *di = d_o + i0 * o_width + (h0 + g) * D;
                score_tile(p, q, width, k_transposed, i0, rows, j0, columns, D, a->scale, a->window);
                memset(dp, 0, (size_t)(rows * TILE) * sizeof *dp);
                tile_product(dp, TILE, di, o_width, 1, v_transposed, TILE, rows, TILE, D);
                for (int64_t i = 0; i < rows; i++) {
                    float lse_i = lse[(h0 + g) * a->N + i0 + i], delta = o_dot_do[g * length + i0 + i];
                    #pragma omp simd
                    for (int64_t j = 0; j < TILE; j++) {
                        float pij = exp_fp32(p[i * TILE + j] - lse_i);
                        p[i * TILE + j] = pij;
                        dp[i * TILE + j] = pij * (dp[i * TILE + j] - delta) * a->scale;
                    }
                }
                tile_product(dv, D, p, 1, TILE, di, o_width, columns, D, rows);
                tile_product(dk, D, dp, 1, TILE, q, width, columns, D, rows);
                tile_product(dqkv + i0 * width + (h0 + g) * D, width, dp, TILE, 1, qkv + j0 * width + k_at, width, rows, D, columns);
            }
        for (int64_t j = 0; j < columns; j++) {
            memcpy(dqkv + (j0 + j) * width + k_at, dk + j * D, (size_t)D * sizeof *dk);
            memcpy(dqkv + (j0 + j) * width + v_at, dv + j * D, (size_t)D * sizeof *dv);
        }
    }
}

void cpu_attention_backward(struct backend *be, act *dqkv, const act *d_o, const act *o, const float *lse, const act *qkv, const struct attention_args *a)
{
    int64_t width = (a->Hq + 2 * a->Hkv) * a->D, o_width = a->Hq * a->D;
    #pragma omp parallel for schedule(dynamic)
    for (int64_t task = 0; task < a->n_docs * a->Hkv; task++) {
        int64_t begin = a->doc_begin[task / a->Hkv], end = a->doc_begin[task / a->Hkv + 1];
        backward_group(thread_scratch(be, scratch_floats(a->D, a->Hq / a->Hkv, a->max_doc)), fp32(dqkv) + begin * width, cfp32(d_o) + begin * o_width,
                       cfp32(o) + begin * o_width, lse + begin, cfp32(qkv) + begin * width, end - begin, (int)(task % a->Hkv), a);
    }
}

void cpu_attention_cached(struct backend *be, act *o_, act *k_cache_, act *v_cache_, const act *qkv_, int64_t n, int64_t past, int Hq, int Hkv, int D, float scale, int64_t window)
{
    (void)be;
    float *o = fp32(o_), *k_cache = fp32(k_cache_), *v_cache = fp32(v_cache_);
    const float *qkv = cfp32(qkv_);
    int64_t width = (Hq + 2 * Hkv) * D, kv_width = Hkv * D;
    for (int64_t i = 0; i < n; i++) {
        memcpy(k_cache + (past + i) * kv_width, qkv + i * width + Hq * D, (size_t)kv_width * sizeof *k_cache);
        memcpy(v_cache + (past + i) * kv_width, qkv + i * width + (Hq + Hkv) * D, (size_t)kv_width * sizeof *v_cache);
    }
    #pragma omp parallel for schedule(static)
    for (int h = 0; h < Hq; h++) {
        int kv = h / (Hq / Hkv);
        for (int64_t i = 0; i < n; i++) {
            const float *q = qkv + i * width + h * D;
            float *out = o + (i * Hq + h) * D, top = -INFINITY;
            double weight = 0, sum[D];
            for (int d = 0; d < D; d++) sum[d] = 0;
            int64_t first = window && past + i - window + 1 > 0 ? past + i - window + 1 : 0;
            for (int64_t j = first; j <= past + i; j++) {
                const float *k = k_cache + j * kv_width + kv * D, *v = v_cache + j * kv_width + kv * D;
                float s = 0;
                #pragma omp simd reduction(+ : s)
                for (int d = 0; d < D; d++) s += q[d] * k[d];
                s *= scale;
                float m = fmaxf(top, s);
                double shrink = exp((double)top - m), p = exp((double)s - m);
                weight = weight * shrink + p;
                for (int d = 0; d < D; d++) sum[d] = sum[d] * shrink + p * v[d];
                top = m;
            }
            for (int d = 0; d < D; d++) out[d] = (float)(sum[d] / weight);
        }
    }
}
