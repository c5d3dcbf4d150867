/* See dump_plan.h. With p the teacher's distribution at T0, q the student's, S the K most likely ids, a = sum_S p, b = sum_S q, per position:
 *
 *     full           g = q - p                                                       |g|^2 = sum (q - p)^2
 *     bucket         exact on S, q (a - b)/(1 - b) elsewhere                          error = sum_{not S} (p - q (1 - a)/(1 - b))^2    bias
 *     renormalise    q - p/a on S, q elsewhere                                        error = ((1 - a)/a)^2 sum_S p^2 + sum_{not S} p^2    bias
 *     hybrid, m      q - p on S, q - (1 - a) c/m elsewhere, c ~ m draws of p/(1 - a)  error = ((1 - a)^2 - sum_{not S} p^2) / m    noise, mean 0
 *     sampled, N     q - c/N, c ~ N draws of p                                        error = (1 - sum p^2) / N    noise, mean 0
 *
 * Shown as the sum of errors over positions divided by the sum of |g|^2. Only bucket and g depend on the student. Its logits are its own where
 * student.init is hf or checkpoint and student.path is set; else a stand-in: the teacher's logits over T0, plus 0.7 times a normal number per id and 0.5 times one
 * per id and position (background: a student that has learnt, with a preference for some ids and noise). */
#include "train/dump_plan.h"

#include <math.h>
#include <stddef.h>
#include <string.h>
#include <sys/statvfs.h>

#include "base/error.h"
#include "base/file.h"
#include "base/rng.h"
#include "train/progress.h"
#include "train/select.h"
#include "train/student.h"

const int plan_k[PLAN_K] = {8, 16, 32, 64, 128, 256}, plan_n[PLAN_N] = {12, 25, 50, 100, 200};
enum { BATCHES = 4, WINDOWS = 8, WINDOW = 8 };   /* positions of the table: WINDOW in a row, at WINDOWS places of every batch */

/* ---- disk ---- */

int64_t plan_bytes_missing(const char *dir, const struct shard_manifest *m)
{
    struct shard_dataset *d = NULL;
    int64_t bytes = 0;
    char *manifest = path_join(dir, "manifest.json");
    bool there = path_exists(manifest) && shard_dataset_open(&d, dir) == OK;   /* what is wrong with it, the writer says */
    for (int64_t n = 0; n < shard_count(m); n++)
        if (!there || !shard_dataset_has(d, n)) bytes += (int64_t)shard_bytes(m, n);
    shard_dataset_close(d);
    free(manifest);
    return bytes;
}

int64_t plan_bytes_free(const char *dir)
{
    char *at = xstrdup(dir);
    struct statvfs s;
    while (statvfs(*at ? at : ".", &s)) {
        char *slash = strrchr(at, '/');
        if (!*at || (slash == at && !at[1])) { free(at); return -1; }
        if (slash == at) at[1] = 0;
        else if (slash) *slash = 0;
        else *at = 0;
    }
    free(at);
    return s.f_blocks ? (int64_t)s.f_bavail * (int64_t)s.f_frsize : -1;
}

/* ---- the table ---- */

static void softmax(double *p, const float *logits, int64_t V)
{
    double max = -INFINITY, sum = 0;
    for (int64_t v = 0; v < V; v++) max = fmax(max, logits[v]);
    for (int64_t v = 0; v < V; v++) sum += p[v] = exp(logits[v] - max);
    for (int64_t v = 0; v < V; v++) p[v] /= sum;
}

struct ranked { double p, q; };
static int by_p(const void *a, const void *b)
{
    double x = ((const struct ranked *)a)->p, y = ((const struct ranked *)b)->p;
    return (x < y) - (x > y);
}

void plan_add(struct plan_sums *s, const float *teacher, const float *student, int64_t V, double *scratch, float *order)
{
    double *p = scratch, *q = scratch + V, p2 = 0, q2 = 0, pq = 0;
    int K = (int)(V < plan_k[PLAN_K - 1] ? V : plan_k[PLAN_K - 1]), n = 0;
    struct ranked top[256 + 1];
    softmax(p, teacher, V);
    softmax(q, student, V);
    memcpy(order, teacher, (size_t)V * sizeof *order);
    float least = nth_largest(order, V, K);
    for (int ties = 0; ties < 2; ties++)                         /* those above the K-th, then as many of its equals as there is room for */
        for (int64_t v = 0; v < V && n < K; v++)
            if (ties ? teacher[v] == least : teacher[v] > least) top[n++] = (struct ranked){p[v], q[v]};
    qsort(top, (size_t)n, sizeof *top, by_p);
    s->positions++;
    for (int64_t v = 0; v < V; v++) {
        p2 += p[v] * p[v];
        q2 += q[v] * q[v];
        pq += p[v] * q[v];
        s->gradient += (q[v] - p[v]) * (q[v] - p[v]);
    }
    s->sampled_one += 1 - p2;
    for (int i = 0; i < PLAN_N; i++)
        for (int64_t v = 0; v < V; v++) s->unique[i] -= expm1(plan_n[i] * log1p(-p[v] < -1 + 1e-16 ? -1 + 1e-16 : -p[v]));
    double a = 0, b = 0, p2s = 0, q2s = 0, pqs = 0;
    for (int i = 0, j = 0; i < PLAN_K; i++) {
        for (; j < n && j < plan_k[i]; j++) {
            a += top[j].p;
            b += top[j].q;
            p2s += top[j].p * top[j].p;
            q2s += top[j].q * top[j].q;
            pqs += top[j].p * top[j].q;
        }
        double r = fmax(1 - a, 0), rest = 1 - b, c = rest > 1e-12 ? r / rest : 0, off = fmax(p2 - p2s, 0);
        s->kept[i] += a;
        s->bucket[i] += fmax(off - 2 * c * (pq - pqs) + c * c * (q2 - q2s), 0);
        s->renormalise[i] += r / a * (r / a) * p2s + off;
        s->hybrid_one[i] += fmax(r * r - off, 0);
    }
}

/* Bytes per token of a dataset like this one, of another kind. Of kind sampled a file has the ids that are different only. */
static double bytes_per_token(const struct shard_manifest *like, enum shard_kind kind, int k, int draws, double unique)
{
    struct shard_manifest m = *like;
    m.rows_per_shard = m.rows;                                   /* the padding of many small fields to pages is not what is asked for */
    m.kind = kind;
    m.k = k;
    m.draws = draws;
    double tokens = (double)(shard_rows(&m, 0) * m.row_length), bytes = (double)shard_bytes(&m, 0) / tokens;
    if (kind != SHARD_SAMPLED) return bytes;
    m.draws = 2 * draws;
    double slot = ((double)shard_bytes(&m, 0) / tokens - bytes) / draws;
    return bytes - slot * (draws - unique);
}

static void print_table(const struct dump_plan *p, const struct plan_sums *s, const char *student)
{
    const struct shard_manifest *m = p->manifest;
    double n = (double)s->positions, g = s->gradient > 0 ? s->gradient : 1;
    printf("\nwhat a target costs: %lld positions, T %g; student: %s\n", (long long)s->positions, (double)m->temperatures[0], student);
    printf("error = squared distance from the gradient of the full KL, in units of its square, per token. Of bucket and renormalise it is bias, which more tokens do not\n"
           "reduce; of hybrid and sampled noise, which over n tokens is 1/n of it (hybrid with another m: 1/m of it)\n\n");
    printf("%5s %10s | %12s %12s %12s | %14s %12s %12s\n", "K", "kept mass", "topk B/token", "bucket", "renormalise", "hybrid, m = K", "B/token", "error");
    for (int i = 0; i < PLAN_K && plan_k[i] <= m->valid_vocab; i++) {
        printf("%5d %10.5f | %12.0f %12.3g %12.3g |", plan_k[i], s->kept[i] / n, bytes_per_token(m, SHARD_TOPK, plan_k[i], 0, 0), s->bucket[i] / g, s->renormalise[i] / g);
        if (plan_k[i] <= SHARD_MAX_DRAWS) printf(" %14s %12.0f %12.3g", "", bytes_per_token(m, SHARD_HYBRID, plan_k[i], plan_k[i], 0), s->hybrid_one[i] / plan_k[i] / g);
        putchar('\n');
    }
    printf("\n%5s %10s | %12s %12s\n", "N", "unique ids", "sampled B/tok", "error");
    for (int i = 0; i < PLAN_N; i++)
        printf("%5d %10.1f | %12.0f %12.3g\n", plan_n[i], s->unique[i] / n, bytes_per_token(m, SHARD_SAMPLED, 0, plan_n[i], s->unique[i] / n), s->sampled_one / plan_n[i] / g);
}

/* ---- a few batches ---- */

struct measurement {
    const struct dump_plan *p;
    struct student *student;                  /* NULL: the stand-in */
    struct memory_plan *memory;
    struct model *student_model;
    void *scratch; size_t scratch_bytes;      /* the teacher's */
    float *teacher, *own, *bias;              /* [WINDOW, V] logits; the stand-in's preference for ids [Vv] */
    struct plan_sums sums;
    struct batch *batch;
};

static void scratch_restore(struct measurement *x)
{
    if (!x->scratch) return;
    x->p->model->be->scratch = x->scratch;
    x->p->model->be->scratch_bytes = x->scratch_bytes;
}

/* A student that is trained already says more than a stand-in. One that does not fit beside the teacher is done without. */
static int student_add(struct measurement *x)
{
    const struct config *c = x->p->c;
    struct backend *be = x->p->model->be;
    int rc = OK;
    if (!*c->student_path || (strcmp(c->student_init, "hf") && strcmp(c->student_init, "checkpoint"))) return OK;
    TRY(student_open(&x->student, c));
    if (x->student->config->vocab_size < x->p->manifest->valid_vocab) {
        rc = fail(ERR_MISMATCH, "%s has %lld columns, the teacher %d valid ids: give it the teacher's vocabulary", c->student_path, (long long)x->student->config->vocab_size, x->p->manifest->valid_vocab);
        goto out;
    }
    if (model_check_device(be, x->student->config, c->student_path) != OK) {
        warn("%s; the table is made with a stand-in", fail_message());
        goto out;
    }
    struct model_options o = {.N = x->p->model->o.N, .max_doc = x->p->model->o.max_doc, .head_rows = WINDOW};
    x->scratch = be->scratch;
    x->scratch_bytes = be->scratch_bytes;
    x->memory = memory_plan_new(be);
    x->student_model = model_new(be, x->student->config, &o, x->memory);
    memory_add_scratch(x->memory, model_scratch_bytes(x->student_model, 0));
    rc = memory_commit(x->memory, 0);
    if (rc != OK || be->scratch_bytes < x->scratch_bytes) scratch_restore(x);   /* one arena for both: the larger */
    if (rc != OK) {
        warn("the student does not fit beside the teacher (%s); the table is made with a stand-in", fail_message());
        model_free(x->student_model);
        x->student_model = NULL;
        rc = OK;
        goto out;
    }
    model_ready(x->student_model);
    TRY(student_weights(x->student, x->student_model, (uint64_t)c->run_seed));
out:
    return rc;
}

static void stand_in(const struct measurement *x, float *z, const float *teacher, int64_t V, int64_t position)
{
    float T = x->p->manifest->temperatures[0];
    for (int64_t v = 0; v < V; v++) {
        struct philox r = philox4x32((uint64_t)x->p->c->run_seed, (uint64_t)position + 1, (uint64_t)v);
        z[v] = teacher[v] / T + x->bias[v] + 0.5f * normal_float(r.v[0], r.v[1]);
    }
}

static void add_window(struct measurement *x, int64_t first, int64_t count, int64_t number)
{
    const struct dump_plan *p = x->p;
    struct model *m = p->model, *sm = x->student_model;
    int64_t V = m->c->vocab_size, Vs = sm ? sm->c->vocab_size : V, Vv = p->manifest->valid_vocab;
    float T = p->manifest->temperatures[0];
    model_logits(m, first, count);
    m->be->ops->download_act(m->be, x->teacher, m->logits, count * V);
    if (sm) {
        model_logits(sm, first, count);
        m->be->ops->download_act(m->be, x->own, sm->logits, count * Vs);
    }
    struct plan_sums *part = xcalloc((size_t)count, sizeof *part);
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < count; i++) {
        double *scratch = xmalloc((size_t)(2 * Vv) * sizeof *scratch);
        float *order = xmalloc((size_t)Vv * sizeof *order), *t = x->teacher + i * V, *z = x->own + i * Vs;
        if (sm) for (int64_t v = 0; v < Vv; v++) z[v] /= T;
        else stand_in(x, z, t, Vv, number + first + i);
        for (int64_t v = 0; v < Vv; v++) t[v] /= T;
        plan_add(&part[i], t, z, Vv, scratch, order);
        free(scratch);
        free(order);
    }
    for (int64_t i = 0; i < count; i++) {                         /* in order: the table does not depend on the threads */
        double *to = (double *)&x->sums.gradient, *from = (double *)&part[i].gradient;
        x->sums.positions++;
        for (size_t j = 0; j < (sizeof *part - offsetof(struct plan_sums, gradient)) / sizeof(double); j++) to[j] += from[j];
    }
    free(part);
}

/* Some positions of the batch that begins with this row. */
static void sample_batch(struct measurement *x, int64_t row)
{
    const struct dump_plan *p = x->p;
    int64_t L = p->rows->length;
    x->batch->rows = p->rows->rows - row < p->batch_rows ? p->rows->rows - row : p->batch_rows;
    for (int64_t r = 0; r < x->batch->rows; r++) batch_set_row(x->batch, r, p->rows->tokens + (row + r) * L, p->rows->loss_mask + (row + r) * L, p->rows->document + (row + r) * L);
    batch_finish(x->batch);
    model_set_batch(p->model, x->batch);
    model_forward(p->model);
    if (x->student_model) {
        model_set_batch(x->student_model, x->batch);
        model_forward(x->student_model);
    }
    for (int w = 0; w < WINDOWS; w++) {
        int64_t first = x->batch->n * w / WINDOWS, count = x->batch->n - first < WINDOW ? x->batch->n - first : WINDOW;
        if (count > p->model->o.head_rows) count = p->model->o.head_rows;
        add_window(x, first, count, row * L);
    }
}

int dump_plan_measure(const struct dump_plan *p)
{
    struct measurement x = {.p = p};
    int64_t V = p->model->c->vocab_size, batch_rows = p->batch_rows, batches = p->rows->rows / batch_rows < BATCHES ? (p->rows->rows + batch_rows - 1) / batch_rows : BATCHES;
    int rc = OK;
    TRY(student_add(&x));
    int64_t Vs = x.student_model ? x.student_model->c->vocab_size : V;
    x.teacher = xmalloc((size_t)(WINDOW * V) * sizeof *x.teacher);
    x.own = xmalloc((size_t)(WINDOW * Vs) * sizeof *x.own);
    x.bias = xmalloc((size_t)V * sizeof *x.bias);
    for (int64_t v = 0; v < V; v++) {
        struct philox r = philox4x32((uint64_t)p->c->run_seed, 0, (uint64_t)v);
        x.bias[v] = 0.7f * normal_float(r.v[0], r.v[1]);
    }
    x.batch = batch_new(batch_rows, p->rows->length, NULL, false);
    for (int64_t b = 0; b < batches; b++) sample_batch(&x, p->rows->rows * b / batches);
    int64_t rows = batches * batch_rows < p->rows->rows ? batches * batch_rows : p->rows->rows;
    double begin = now_seconds();                                 /* the model is warm by now */
    TRY(p->passes(p->context, 0, rows));
    double rate = (double)(rows * p->rows->length) / (now_seconds() - begin);
    printf("rate      %.0f tok/s over %lld positions: %s for the %.3gM tokens of the corpus, %.3g hours\n", rate, (long long)(rows * p->rows->length), duration_text((double)p->tokens / rate),
           (double)p->tokens / 1e6, (double)p->tokens / rate / 3600);
    print_table(p, &x.sums, x.student_model ? p->c->student_path : "a stand-in, the teacher's logits + 0.7 normal per id + 0.5 normal per id and position");
out:
    free(x.teacher);
    free(x.own);
    free(x.bias);
    batch_free(x.batch);
    scratch_restore(&x);
    model_free(x.student_model);
    memory_plan_free(x.memory);
    student_close(x.student);
    return rc;
}
