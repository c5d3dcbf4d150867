/* distill inspect DATASET --against MODEL: rows chosen by a seed go through the model again, and what it says now is compared with what is stored.
 * The model computes at the precision of the dump's teacher. With the model of the dump on the same kind of machine the difference is the rounding of the format; with the same weights on another
 * backend or in another precision it is that noise; with a quantised or another model it is what that costs.
 *
 * Per supervised position, at T0, p stored and q recomputed:
 *   KL(p || q) over the stored outcomes: every id (kind full), or the head's ids and all others as one. Both sides are rounded and sum to 1 only
 *     nearly, so it is sum p log(p/q) - p + q, which is the same when they do and never negative.
 *   first choice: the same id. K best: how many of the K stored are among the K best of the model (full: of the 64 best). */
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/half.h"
#include "base/rng.h"
#include "data/shard.h"
#include "train/inspect.h"
#include "train/load.h"
#include "train/select.h"

enum { CHUNK = 256, BEST_OF_FULL = 64 };

struct noise { double kl, overlap, label, entropy; bool counted, first; };
struct comparison {
    struct model_files *files;
    struct backend *be;
    struct memory_plan *plan;
    struct model *model;
    struct batch *batch;
    const struct shard_manifest *m;
    struct shard_row row;
    float *logits;                            /* [CHUNK, V] */
    float *scratch;                           /* [CHUNK, 2, Vv] */
    struct noise *noise;                      /* [CHUNK] */
};

static double kl_term(double log_p, double log_q) { return exp(log_p) * (log_p > -1e30 ? log_p - log_q : 0) - exp(log_p) + exp(log_q); }

/* Position t of the row against the model's logits (Vv of them valid); `a` and `b` are scratch [Vv]. */
static struct noise compare_position(const struct shard_manifest *m, const struct shard_row *row, int64_t t, const float *logits, float *a, float *b)
{
    struct noise x = {.counted = row->loss_mask[t]};
    int64_t V = m->valid_vocab, best = 0;
    double T = m->temperatures[0], max = -INFINITY, sum = 0, weighted = 0;
    if (!x.counted) return x;
    for (int64_t v = 0; v < V; v++) if (logits[v] > max) { max = logits[v]; best = v; }
    for (int64_t v = 0; v < V; v++) {
        double z = (logits[v] - max) / T, e = exp(z);
        sum += e;
        weighted += e * z;
    }
    double lse = max / T + log(sum);
    x.label = fabs(f16_to_float(row->label_logprob[t]) - (logits[row->tokens[t + 1]] / T - lse));
    x.entropy = fabs(f16_to_float(row->entropy[t]) - (log(sum) - weighted / sum));
    if (row->head_ids) {
        const uint32_t *ids = row->head_ids + t * m->k;
        memcpy(a, logits, (size_t)V * sizeof *a);
        for (int64_t i = 0; i < m->k; i++) {
            x.kl += kl_term(f16_to_float(row->head_logprob[t * m->k + i]), logits[ids[i]] / T - lse);
            a[ids[i]] = -INFINITY;
        }
        double rest = 0;                      /* over the complement: no cancellation */
        for (int64_t v = 0; v < V; v++) rest += exp(a[v] / T - lse);
        x.kl += kl_term(row->tail[t * m->n_temperatures], rest > 0 ? log(rest) : -1e4);
        memcpy(a, logits, (size_t)V * sizeof *a);
        float least = nth_largest(a, V, m->k);
        for (int64_t i = 0; i < m->k; i++) x.overlap += logits[ids[i]] >= least;
        x.overlap /= m->k;
        x.first = ids[0] == (uint32_t)best || logits[ids[0]] == logits[best];
    } else if (row->logits) {
        const uint16_t *stored = row->logits + t * V;
        double stored_lse = row->lse[t * m->n_temperatures];
        int64_t n = V < BEST_OF_FULL ? V : BEST_OF_FULL, first = 0;
        for (int64_t v = 0; v < V; v++) {
            b[v] = f16_to_float(stored[v]);
            if (b[v] > b[first]) first = v;
            x.kl += kl_term(b[v] - stored_lse, logits[v] / T - lse);
        }
        x.first = first == best || logits[first] == logits[best] || b[first] == b[best];
        memcpy(a, logits, (size_t)V * sizeof *a);
        float least = nth_largest(a, V, n);
        memcpy(a, b, (size_t)V * sizeof *a);
        float stored_least = nth_largest(a, V, n);
        for (int64_t v = 0; v < V; v++) x.overlap += b[v] >= stored_least && logits[v] >= least;
        x.overlap = fmin(x.overlap / (double)n, 1);   /* ties */
    }
    return x;
}

static int comparison_open(struct comparison *c, const struct inspect_options *o, struct shard_dataset *d)
{
    struct backend_options device = {.device = o->device, .threads = (int)o->threads};
    int rc = OK;
    c->m = shard_dataset_manifest(d);
    TRY(model_files_open(&c->files, o->against));
    const struct model_config *config = c->files->config;
    if (config->vocab_size < c->m->valid_vocab || config->max_position < c->m->row_length) {
        rc = fail(ERR_MISMATCH, "%s has %lld columns and %lld positions, %s has %d valid ids and rows of %lld: this model cannot have made it", o->against, (long long)config->vocab_size,
                  (long long)config->max_position, o->path, c->m->valid_vocab, (long long)c->m->row_length);
        goto out;
    }
    TRY(backend_open(&c->be, &device));
    TRY(model_check_device(c->be, config, o->against));
    c->plan = memory_plan_new(c->be);
    struct model_options options = {.N = c->m->row_length, .max_doc = c->m->row_length, .head_rows = CHUNK < c->m->row_length ? CHUNK : c->m->row_length, .fp8 = c->m->precision == PRECISION_FP8,
                                    .native_first = c->m->native_first, .native_last = c->m->native_last};
    if (options.fp8 && model_check_fp8(c->be, config, options.native_first, options.native_last, "teacher.precision") != OK) {
        rc = fail_in(ERR_USAGE, "%s was dumped by a teacher in fp8, and has to be compared with one: use --device cpu, or the model that made it", o->path);
        goto out;
    }
    c->model = model_new(c->be, config, &options, c->plan);
    memory_add_scratch(c->plan, model_scratch_bytes(c->model, 0));
    TRY(memory_commit(c->plan, 0));
    model_ready(c->model);
    TRY(model_files_load(c->files, c->model));
    shard_row_alloc(&c->row, c->m);
    c->batch = batch_new(1, c->m->row_length, NULL, false);
    c->logits = xmalloc((size_t)(CHUNK * config->vocab_size) * sizeof *c->logits);
    c->scratch = xmalloc((size_t)(CHUNK * 2 * (int64_t)c->m->valid_vocab) * sizeof *c->scratch);
    c->noise = xmalloc(CHUNK * sizeof *c->noise);
out:
    return rc;
}

static void comparison_close(struct comparison *c)
{
    free(c->noise); free(c->scratch); free(c->logits);
    batch_free(c->batch);
    shard_row_free(&c->row);
    model_free(c->model);
    memory_plan_free(c->plan);
    backend_close(c->be);
    model_files_close(c->files);
}

struct noise_sums { double kl, kl_max, overlap, label, entropy; int64_t first, n, row_of_max, position_of_max; };

static void compare_row(struct comparison *c, int64_t number, struct noise_sums *s)
{
    struct model *m = c->model;
    int64_t V = m->c->vocab_size, Vv = c->m->valid_vocab;
    batch_set_row(c->batch, 0, c->row.tokens, c->row.loss_mask, c->row.document);
    batch_finish(c->batch);
    model_set_batch(m, c->batch);
    model_forward(m);
    for (int64_t first = 0; first < m->n; first += m->o.head_rows) {
        int64_t rows = m->n - first < m->o.head_rows ? m->n - first : m->o.head_rows;
        model_logits(m, first, rows);
        c->be->ops->download_act(c->be, c->logits, m->logits, rows * V);
#pragma omp parallel for schedule(dynamic)
        for (int64_t i = 0; i < rows; i++) c->noise[i] = compare_position(c->m, &c->row, first + i, c->logits + i * V, c->scratch + i * 2 * Vv, c->scratch + (i * 2 + 1) * Vv);
        for (int64_t i = 0; i < rows; i++) {
            const struct noise *x = &c->noise[i];
            if (!x->counted) continue;
            s->n++;
            s->kl += x->kl;
            s->overlap += x->overlap;
            s->label += x->label;
            s->entropy += x->entropy;
            s->first += x->first;
            if (!(x->kl > s->kl_max)) continue;
            s->kl_max = x->kl;
            s->row_of_max = number;
            s->position_of_max = first + i;
        }
    }
}

/* The first `want` of the sealed rows in an order that the seed gives. */
static int64_t *choose_rows(struct shard_dataset *d, uint64_t seed, int64_t want, int64_t *n)
{
    const struct shard_manifest *m = shard_dataset_manifest(d);
    int64_t *rows = xmalloc((size_t)m->rows * sizeof *rows);
    *n = 0;
    for (int64_t r = 0; r < m->rows; r++)
        if (shard_dataset_has(d, r / m->rows_per_shard)) rows[(*n)++] = r;
    shuffle_int64(rows, *n, seed, 0);
    if (want < *n) *n = want;
    return rows;
}

/* weights: the hash of the model's */
static void report_noise(struct report *r, const struct comparison *c, const struct inspect_options *o, int64_t rows, const char *weights, const struct noise_sums *s)
{
    char config[SHA256_HEX];
    double n = (double)(s->n ? s->n : 1);
    model_config_hash(c->files->config, config);
    bool known = *c->m->teacher_weights_hash, same = !strcmp(weights, c->m->teacher_weights_hash) && !strcmp(config, c->m->teacher_config_hash);
    report_section(r, "against", o->path);
    report_text(r, "model", "model", o->against);
    report_line(r, "same_model", known ? json_boolean(same) : json_null(), "is the dump's teacher", "%s", !known ? "not known" : same ? "yes, by the hash of its weights" : "no: its hash differs");
    report_text(r, "device", "device", c->be->name);
    report_text(r, "precision", "precision", teacher_precision_name(c->m->precision));
    report_line(r, "rows", json_integer(rows), "rows", "%lld, chosen by seed %lld", (long long)rows, (long long)o->seed);
    report_int(r, "positions", "supervised positions", s->n);
    bool outcomes = c->row.head_ids || c->row.logits;
    int best = c->m->k ? c->m->k : c->m->valid_vocab < BEST_OF_FULL ? c->m->valid_vocab : BEST_OF_FULL;
    if (outcomes) {
        report_line(r, "kl_mean", json_real(s->kl / n), "KL(stored || now)", "%.3e nats on average%s", s->kl / n, c->row.logits ? "" : ", over the K and the rest as one");
        report_line(r, "kl_max", json_real(s->kl_max), "  largest", "%.3e, row %lld position %lld", s->kl_max, (long long)s->row_of_max, (long long)s->position_of_max);
        report_line(r, "first_agreement", json_real((double)s->first / n), "same first choice", "%.4f %%", 100 * (double)s->first / n);
        report_line(r, "best_agreement", json_real(s->overlap / n), "same K best", "%.4f %% of the %d", 100 * s->overlap / n, best);
    }
    report_line(r, "label_difference", json_real(s->label / n), "log p(next token)", "differs by %.3e on average", s->label / n);
    report_line(r, "entropy_difference", json_real(s->entropy / n), "entropy", "differs by %.3e nats on average", s->entropy / n);
}

int inspect_against(struct report *r, const struct inspect_options *o)
{
    struct shard_dataset *d = NULL;
    struct comparison c = {0};
    struct noise_sums s = {0};
    int64_t *rows = NULL, n = 0;
    char weights[SHA256_HEX];
    int rc = OK;
    TRY(shard_dataset_open(&d, o->path));
    TRY(comparison_open(&c, o, d));
    rows = choose_rows(d, (uint64_t)o->seed, o->sample, &n);
    if (!n) { rc = fail(ERR_INPUT, "%s: no shard is sealed yet; let teacher-dump make one", o->path); goto out; }
    for (int64_t i = 0; i < n; i++) {
        TRY(shard_dataset_read(d, rows[i], &c.row));
        compare_row(&c, rows[i], &s);
        if (!isfinite(s.label)) { rc = fail(ERR_NUMERIC, "row %lld: the logits of %s are not finite; look at it with distill inspect", (long long)rows[i], o->against); goto out; }
    }
    TRY(tensor_set_hash(c.files->tensors, weights));
    report_noise(r, &c, o, n, weights, &s);
out:
    free(rows);
    comparison_close(&c);
    shard_dataset_close(d);
    return rc;
}
