/* Datasets for the shard and loader tests and the fuzzer: rows made from their number alone, with targets computed from random
 * logits by definition (double, full sort), and directories under a temporary name that can be compared byte for byte. */
#ifndef TESTS_SHARD_FIXTURE_H
#define TESTS_SHARD_FIXTURE_H

#include <math.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "base/half.h"
#include "base/rng.h"
#include "data/shard.h"

/* k: the head; of kind hybrid the same number of draws and one more, of kind sampled the draws */
static inline struct shard_manifest fixture_manifest(enum shard_kind kind, int64_t rows, int64_t rows_per_shard, int64_t length, int32_t vocab, int k)
{
    struct shard_manifest m = {.kind = kind, .rows = rows, .row_length = length, .rows_per_shard = rows_per_shard, .k = shard_kind_has_head(kind) ? k : 0,
                               .draws = kind == SHARD_HYBRID ? k + 1 : kind == SHARD_SAMPLED ? k : 0, .n_temperatures = kind == SHARD_SAMPLED ? 1 : 3, .temperatures = {1, 0.7f, 3}, .valid_vocab = vocab, .teacher_vocab = vocab + 13, .seed = 0xfedcba9876543210u, .text_bytes = 12345};
    if (kind == SHARD_SAMPLED) m.temperatures[1] = m.temperatures[2] = 0;
    memset(m.tokenizer_hash, 'a', SHA256_HEX - 1);
    memset(m.corpus_hash, '0', SHA256_HEX - 1);
    strcpy(m.packing, "test \"rows\" é");
    strcpy(m.teacher_name, "fixture");
    return m;
}

struct scored { double t; uint32_t id; };
static inline int by_score(const void *a, const void *b)
{
    const struct scored *x = a, *y = b;
    return x->t != y->t ? (x->t < y->t ? 1 : -1) : x->id < y->id ? -1 : 1;
}

/* Logit v of position t of a row: what a teacher would say. */
static inline void fixture_logits(const struct shard_manifest *m, int64_t row, int64_t t, double *logits)
{
    for (int32_t v = 0; v < m->valid_vocab; v++) {
        struct philox r = philox4x32(7, (uint64_t)(row << 20 | t), (uint64_t)v);
        logits[v] = f16_to_float(f16_from_float(3 * normal_float(r.v[0], r.v[1]) + 5));   /* what kind full can hold exactly at T0 = 1 */
    }
}

static inline double log_sum_exp(const double *x, int64_t n, double T)
{
    double max = -INFINITY, sum = 0;
    for (int64_t i = 0; i < n; i++) max = fmax(max, x[i] / T);
    for (int64_t i = 0; i < n; i++) sum += exp(x[i] / T - max);
    return max + log(sum);
}

/* D draws from the entries of sorted[first ..], by their definition: one after another, then counted. */
static inline void fixture_draws(const struct shard_manifest *m, int64_t row, int64_t t, const struct scored *sorted, int64_t first, double lse, struct shard_row *out)
{
    int64_t V = m->valid_vocab, D = m->draws;
    int *times = xcalloc((size_t)V, sizeof *times);
    double *logp = xcalloc((size_t)V, sizeof *logp), mass = 0;
    for (int64_t i = first; i < V; i++) mass += exp(sorted[i].t / m->temperatures[0] - lse);
    for (int64_t d = 0; d < D && first < V; d++) {
        struct philox r = philox4x32(10, (uint64_t)(row << 20 | t), (uint64_t)d);
        double at = uniform_double(r.v[0], r.v[1]) * mass;
        int64_t i = first;
        for (; i < V - 1 && (at -= exp(sorted[i].t / m->temperatures[0] - lse)) >= 0; i++) {}
        times[sorted[i].id]++;
        logp[sorted[i].id] = sorted[i].t / m->temperatures[0] - lse;
    }
    int64_t n = 0;
    for (int64_t v = 0; v < V; v++) {
        if (!times[v]) continue;
        out->draw_ids[t * D + n] = (uint32_t)v;
        out->draw_count[t * D + n] = (uint8_t)times[v];
        if (out->draw_logprob) out->draw_logprob[t * D + n] = f16_from_float((float)logp[v]);
        n++;
    }
    for (; n < D; n++) {
        out->draw_ids[t * D + n] = out->draw_count[t * D + n] = 0;
        if (out->draw_logprob) out->draw_logprob[t * D + n] = 0;
    }
    free(times);
    free(logp);
}

/* Documents of random lengths, the last one sometimes padding; `out` from shard_row_alloc. */
static inline void fixture_row(const struct shard_manifest *m, int64_t row, struct shard_row *out)
{
    int64_t L = m->row_length, V = m->valid_vocab, nT = m->n_temperatures, K = m->k;
    double *logits = xmalloc((size_t)V * sizeof *logits), T0 = m->temperatures[0];
    struct scored *sorted = xmalloc((size_t)V * sizeof *sorted);
    uint16_t document = 0;
    for (int64_t t = 0; t < L; t++) {
        struct philox r = philox4x32(8, (uint64_t)row, (uint64_t)t);
        if (t && r.v[0] % 5 == 0) document++;
        out->document[t] = document;
        out->tokens[t] = r.v[1] % (uint32_t)V;
    }
    for (int64_t t = 0; t < L; t++) {
        bool next = t + 1 < L && out->document[t + 1] == out->document[t];
        out->loss_mask[t] = next && philox4x32(9, (uint64_t)row, (uint64_t)t).v[0] % 4;
        fixture_logits(m, row, t, logits);
        double lse = log_sum_exp(logits, V, T0), entropy = 0;
        for (int64_t v = 0; v < V; v++) {
            double logp = logits[v] / T0 - lse;
            entropy -= exp(logp) * logp;
            sorted[v] = (struct scored){logits[v], (uint32_t)v};
            if (out->logits) out->logits[t * V + v] = f16_from_float((float)(logits[v] / T0));
        }
        out->entropy[t] = f16_from_float((float)fmax(entropy, 0));
        out->label_logprob[t] = next ? f16_from_float((float)(logits[out->tokens[t + 1]] / T0 - lse)) : 0;
        qsort(sorted, (size_t)V, sizeof *sorted, by_score);
        for (int64_t i = 0; i < K; i++) {
            out->head_ids[t * K + i] = sorted[i].id;
            out->head_logprob[t * K + i] = f16_from_float((float)(sorted[i].t / T0 - lse));
        }
        if (out->draw_ids) fixture_draws(m, row, t, sorted, K, lse, out);
        for (int64_t j = 0; j < nT; j++) {
            double T = m->temperatures[j], lse_j = log_sum_exp(logits, V, T), tail = 0;
            out->lse[t * nT + j] = (float)lse_j;
            for (int64_t i = K; i < V; i++) tail += exp(sorted[i].t / T - lse_j);
            if (out->tail) out->tail[t * nT + j] = (float)log(tail);
        }
    }
    free(sorted);
    free(logits);
}

/* What teacher-dump does: every shard that is missing, in order. */
static inline int fixture_dump(const char *dir, const struct shard_manifest *m)
{
    int rc = OK;
    struct shard_writer *w = NULL;
    struct shard_row row;
    shard_row_alloc(&row, m);
    TRY(shard_writer_open(&w, dir, m));
    for (int64_t n; (n = shard_writer_next_shard(w)) < shard_count(m);) {
        TRY(shard_writer_begin(w, n));
        for (int64_t i = 0; i < shard_rows(m, n); i++) {
            fixture_row(m, shard_first_row(m, n) + i, &row);
            TRY(shard_writer_put(w, &row));
        }
        TRY(shard_writer_seal(w));
    }
out:
    shard_writer_close(w);
    shard_row_free(&row);
    return rc;
}

static inline char *fixture_dir(void)
{
    const char *tmp = getenv("TMPDIR");
    char *path = xasprintf("%s/distill-test-XXXXXX", tmp ? tmp : "/tmp");
    CHECK(mkdtemp(path), "no temporary directory");
    return path;
}

/* NULL when two trees hold the same names and bytes, else the first name that differs (malloc'd). */
static inline char *tree_difference(const char *a, const char *b)
{
    if (path_is_dir(a) && path_is_dir(b)) {
        char **x, **y, *found = NULL;
        int n, o;
        CHECK(dir_list(a, &x, &n) == OK && dir_list(b, &y, &o) == OK, "%s", fail_message());
        for (int i = 0; i < n || i < o; i++) {
            if (i >= n || i >= o || strcmp(x[i], y[i])) { found = path_join(i < n ? a : b, i < n ? x[i] : y[i]); break; }
            char *p = path_join(a, x[i]), *q = path_join(b, y[i]);
            found = tree_difference(p, q);
            free(p);
            free(q);
            if (found) break;
        }
        names_free(x, n);
        names_free(y, o);
        return found;
    }
    char *p = NULL, *q = NULL;
    size_t n = 0, o = 1;
    bool same = file_read(a, (size_t)1 << 40, &p, &n) == OK && file_read(b, (size_t)1 << 40, &q, &o) == OK && n == o && !memcmp(p, q, n);
    free(p);
    free(q);
    return same ? NULL : xstrdup(a);
}

#endif
