/* The LM head with the objective: the loss is the definition's, and neither chunks, padding columns, unsupervised rows nor the way the
 * teacher is given change it. The maths of one row at its extremes is tests/kernels/test_distill_loss.c's. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/half.h"
#include "tests/compare.h"
#include "tests/train/fixture.h"

enum { ROWS = 2, LENGTH = 23, N = ROWS * LENGTH, V = FIXTURE_VOCAB, VV = FIXTURE_VOCAB - 2, C = 24 };
static const int documents[] = {1, 9, 5, 8, 0};

static void open_fixture(struct fixture *f, enum target_kind kind, int k, int64_t head_rows, struct distill_args loss)
{
    struct fixture_options o = {.architecture = "llama", .rows = ROWS, .length = LENGTH, .head_rows = head_rows, .kind = kind, .k = k, .loss = loss, .seed = 5};
    fixture_open(f, &o);
}

/* A batch whose teacher is known whole: logits in f16 for TARGET_FULL, and the k best of the same for TARGET_TOPK at temperature T. */
static struct batch *teacher_batch(enum target_kind kind, int k, float T)
{
    struct shard_manifest m = {.kind = kind == TARGET_FULL ? SHARD_FULL : SHARD_TOPK, .k = kind == TARGET_TOPK ? k : 0, .valid_vocab = VV, .rows = ROWS, .row_length = LENGTH, .n_temperatures = 1,
                               .temperatures = {1}};
    struct batch *plain = fixture_batch(ROWS, LENGTH, documents, 0, 9), *b = batch_new(ROWS, LENGTH, kind == TARGET_NONE ? NULL : &m, false);
    memcpy(b->tokens, plain->tokens, N * sizeof *b->tokens);
    memcpy(b->labels, plain->labels, N * sizeof *b->labels);
    memcpy(b->mask, plain->mask, N * sizeof *b->mask);
    memcpy(b->position, plain->position, N * sizeof *b->position);
    batch_finish(b);
    b->full_scale = 1 / T;
    b->full_width = VV;
    for (int64_t i = 0; i < N && kind != TARGET_NONE; i++) {
        float logits[VV];
        int32_t order[VV];
        double lse = 0, rest = 0;
        fill_normal(logits, VV, 3, 500 + (uint64_t)i);
        for (int j = 0; j < VV; j++) {
            uint16_t half = f16_from_float(logits[j]);
            if (kind == TARGET_FULL) b->full_logits[i * VV + j] = half;
            logits[j] = f16_to_float(half);
            lse += exp(logits[j] / (double)T);
            int at = j;
            for (; at && logits[order[at - 1]] < logits[j]; at--) order[at] = order[at - 1];
            order[at] = j;
        }
        if (kind != TARGET_TOPK) continue;
        for (int j = 0; j < k; j++) {
            b->head_ids[i * k + j] = order[j];
            b->head_logprob[i * k + j] = (float)(logits[order[j]] / (double)T - log(lse));
        }
        for (int j = k; j < VV; j++) rest += exp(logits[order[j]] / (double)T);
        b->tail_logmass[i] = k < VV ? (float)log(rest / lse) : -INFINITY;
    }
    batch_free(plain);
    return b;
}

/* Loss sums, d_hidden and the head's gradient of one run. */
struct result { double kd, ce; float *d_hidden, *head; };

static struct result run(struct fixture *f, const struct batch *b, double targets)
{
    struct model *m = f->model;
    struct result r;
    memset(m->grads, 0, (size_t)m->params->total * sizeof(float));
    fill_nan((float *)m->d_hidden, N * C);
    fill_nan((float *)m->logits, m->o.head_rows * V);
    objective_reset(f->objective);
    model_set_batch(m, b);
    model_forward(m);
    objective_run(f->objective, b, targets, true);
    objective_read(f->objective, &r.kd, &r.ce);
    r.d_hidden = xmalloc(N * C * sizeof *r.d_hidden);
    r.head = xmalloc(V * C * sizeof *r.head);
    memcpy(r.d_hidden, m->d_hidden, N * C * sizeof *r.d_hidden);
    memcpy(r.head, (float *)m->grads + m->params->head->offset, V * C * sizeof *r.head);
    return r;
}

static void result_free(struct result *r) { free(r->d_hidden); free(r->head); }

static bool same_bits(const struct result *a, const struct result *b)
{
    return a->kd == b->kd && a->ce == b->ce && !memcmp(a->d_hidden, b->d_hidden, N * C * sizeof(float)) && !memcmp(a->head, b->head, V * C * sizeof(float));
}

static void expect_close(const struct result *a, const struct result *b, double bound, const char *what)
{
    cr_expect_lt(fabs(a->kd - b->kd), bound * fabs(b->kd) + 1e-12, "%s: kd %.9g and %.9g", what, a->kd, b->kd);
    cr_expect_lt(fabs(a->ce - b->ce), bound * fabs(b->ce) + 1e-12, "%s: ce %.9g and %.9g", what, a->ce, b->ce);
    cr_expect_lt(relative_l2(a->d_hidden, b->d_hidden, N * C), bound, "%s: d_hidden differs by %g", what, relative_l2(a->d_hidden, b->d_hidden, N * C));
    cr_expect_lt(relative_l2(a->head, b->head, V * C), bound, "%s: the head's gradient differs by %g", what, relative_l2(a->head, b->head, V * C));
}

static const struct distill_args mixed = {.temperature = 2, .kd_weight = 0.7f, .ce_weight = 0.3f, .beta = 0.3f, .alpha = 0.2f};

/* Logits, softmax, T^2 KL and its gradient written down in double from what the model hands over. */
Test(objective, is_the_definition)
{
    struct fixture f;
    open_fixture(&f, TARGET_FULL, 0, 0, mixed);
    struct batch *b = teacher_batch(TARGET_FULL, 0, 2);
    double targets = (double)b->n_targets, kd = 0, ce = 0, T = 2;
    struct result r = run(&f, b, targets);
    const float *hidden = (const float *)f.model->hidden, *w = (const float *)f.model->weights + f.model->params->head->offset;
    float *d_hidden = xcalloc(N * C, sizeof *d_hidden), *head = xcalloc(V * C, sizeof *head);
    for (int64_t i = 0; i < N; i++) {
        double z[VV], zq = 0, z1 = 0, zp = 0;
        if (b->labels[i] < 0) continue;
        for (int j = 0; j < VV; j++) {
            z[j] = 0;
            for (int c = 0; c < C; c++) z[j] += (double)hidden[i * C + c] * w[j * C + c];
            zq += exp(z[j] / T);
            z1 += exp(z[j]);
            zp += exp(f16_to_float(b->full_logits[i * VV + j]) / T);
        }
        ce += log(z1) - z[b->labels[i]];
        for (int j = 0; j < VV; j++) {
            double p = exp(f16_to_float(b->full_logits[i * VV + j]) / T) / zp, q = exp(z[j] / T) / zq;
            kd += T * T * p * log(p / q);
            double d = (0.7f * T * (q - p) + 0.3f * (exp(z[j]) / z1 - (j == b->labels[i]))) / targets;
            for (int c = 0; c < C; c++) {
                d_hidden[i * C + c] += (float)(d * w[j * C + c]);
                head[j * C + c] += (float)(d * hidden[i * C + c]);
            }
        }
    }
    struct result want = {kd, ce, d_hidden, head};
    expect_close(&r, &want, 3e-6, "definition");
    result_free(&r);
    result_free(&want);
    batch_free(b);
    fixture_close(&f);
}

Test(objective, chunks_change_nothing)
{
    static const struct { enum target_kind kind; int k; enum divergence d; } cases[] = {
        {TARGET_NONE, 0, DIV_FORWARD_KL}, {TARGET_TOPK, 1, DIV_FORWARD_KL}, {TARGET_TOPK, 5, DIV_FORWARD_KL}, {TARGET_FULL, 0, DIV_FORWARD_KL}, {TARGET_FULL, 0, DIV_REVERSE_KL},
        {TARGET_FULL, 0, DIV_JSD}, {TARGET_FULL, 0, DIV_SKEW_KL}, {TARGET_FULL, 0, DIV_TVD}};
    static const int64_t chunks[] = {1, 7, LENGTH, N - 1};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct distill_args loss = mixed;
        struct fixture whole, part;
        char what[64];
        loss.divergence = cases[i].d;
        open_fixture(&whole, cases[i].kind, cases[i].k, 0, loss);
        struct batch *b = teacher_batch(cases[i].kind, cases[i].k, 2);
        struct result want = run(&whole, b, (double)b->n_targets);
        for (size_t j = 0; j < sizeof chunks / sizeof *chunks; j++) {
            open_fixture(&part, cases[i].kind, cases[i].k, chunks[j], loss);
            struct result got = run(&part, b, (double)b->n_targets);
            snprintf(what, sizeof what, "case %zu in chunks of %lld", i, (long long)chunks[j]);
            expect_close(&got, &want, 3e-6, what);
            result_free(&got);
            fixture_close(&part);
        }
        result_free(&want);
        batch_free(b);
        fixture_close(&whole);
    }
}

/* The rows of the head past Vv may hold anything: no bit of loss or gradient changes, and they get no gradient. */
Test(objective, padding_columns_have_no_influence_and_no_gradient)
{
    for (int kind = TARGET_NONE; kind <= TARGET_FULL; kind++) {
        struct fixture f;
        open_fixture(&f, (enum target_kind)kind, 5, 7, mixed);
        struct batch *b = teacher_batch((enum target_kind)kind, 5, 2);
        struct result before = run(&f, b, (double)b->n_targets);
        float *padding = (float *)f.model->weights + f.model->params->head->offset + VV * C;
        for (int i = 0; i < (V - VV) * C; i++) padding[i] = i % 2 ? 1e6f : -1e30f;
        struct result after = run(&f, b, (double)b->n_targets);
        cr_expect(same_bits(&before, &after), "kind %d", kind);
        for (int i = VV * C; i < V * C; i++) cr_assert_eq(after.head[i], 0);
        result_free(&before);
        result_free(&after);
        batch_free(b);
        fixture_close(&f);
    }
}

Test(objective, rows_that_are_not_supervised_have_no_influence_and_no_gradient)
{
    for (int kind = TARGET_NONE; kind <= TARGET_FULL; kind++) {
        struct fixture f;
        open_fixture(&f, (enum target_kind)kind, 5, 7, mixed);
        struct batch *b = teacher_batch((enum target_kind)kind, 5, 2);
        struct result before = run(&f, b, (double)b->n_targets);
        int64_t unsupervised = 0;
        for (int64_t i = 0; i < N; i++) {
            if (b->labels[i] >= 0) continue;
            unsupervised++;
            for (int c = 0; c < C; c++) cr_assert_eq(before.d_hidden[i * C + c], 0);
            for (int j = 0; kind == TARGET_TOPK && j < 5; j++) b->head_logprob[i * 5 + j] = NAN;
            if (kind == TARGET_TOPK) b->tail_logmass[i] = INFINITY;
            for (int j = 0; kind == TARGET_FULL && j < VV; j++) b->full_logits[i * VV + j] = 0x7e00;      /* NaN */
        }
        cr_assert_gt(unsupervised, 5);
        struct result after = run(&f, b, (double)b->n_targets);
        cr_expect(same_bits(&before, &after), "kind %d", kind);
        result_free(&before);
        result_free(&after);
        batch_free(b);
        fixture_close(&f);
    }
}

/* With all valid ids in the head there is no tail: every policy is the full forward KL. */
Test(objective, top_k_of_everything_is_full_under_every_policy)
{
    struct distill_args loss = {.temperature = 2, .kd_weight = 1};
    struct fixture full;
    open_fixture(&full, TARGET_FULL, 0, 7, loss);
    struct batch *f = teacher_batch(TARGET_FULL, 0, 2), *k = teacher_batch(TARGET_TOPK, VV, 2);
    struct result want = run(&full, f, (double)f->n_targets);
    for (int tail = 0; tail < TAIL_COUNT; tail++) {
        struct fixture top;
        loss.tail = (enum tail_policy)tail;
        open_fixture(&top, TARGET_TOPK, VV, 7, loss);
        struct result got = run(&top, k, (double)k->n_targets);
        char what[32];
        snprintf(what, sizeof what, "policy %d", tail);
        expect_close(&got, &want, 3e-6, what);
        result_free(&got);
        fixture_close(&top);
    }
    result_free(&want);
    batch_free(f);
    batch_free(k);
    fixture_close(&full);
}

/* bucket is a lower bound of the full divergence that grows with k; what it learns from the head is the teacher's, not the head scaled up to 1. */
Test(objective, bucket_grows_with_k_towards_full)
{
    struct distill_args loss = {.temperature = 2, .kd_weight = 1, .tail = TAIL_BUCKET};
    struct fixture full;
    open_fixture(&full, TARGET_FULL, 0, 0, loss);
    struct batch *f = teacher_batch(TARGET_FULL, 0, 2);
    struct result whole = run(&full, f, (double)f->n_targets);
    double last = 0;
    static const int ks[] = {1, 2, 5, 20, 50, VV - 1, VV};
    for (int i = 0; i < 7; i++) {
        struct fixture top;
        open_fixture(&top, TARGET_TOPK, ks[i], 0, loss);
        struct batch *b = teacher_batch(TARGET_TOPK, ks[i], 2);
        struct result got = run(&top, b, (double)b->n_targets);
        cr_expect_gt(got.kd, last * (1 - 1e-6), "k = %d: %g after %g", ks[i], got.kd, last);
        cr_expect_lt(got.kd, whole.kd * (1 + 1e-6), "k = %d: %g of %g", ks[i], got.kd, whole.kd);
        last = got.kd;
        result_free(&got);
        batch_free(b);
        fixture_close(&top);
    }
    result_free(&whole);
    batch_free(f);
    fixture_close(&full);
}

/* The teacher's logits on the device instead of the batch's stored ones: the same numbers, the same result. */
Test(objective, a_teacher_on_the_device_is_the_stored_one)
{
    struct fixture f;
    open_fixture(&f, TARGET_FULL, 0, 7, mixed);
    struct batch *b = teacher_batch(TARGET_FULL, 0, 2);
    struct result stored = run(&f, b, (double)b->n_targets);
    float *teacher = new_poisoned(N * V);                    /* its padding columns are never read */
    for (int64_t i = 0; i < N; i++) for (int j = 0; j < VV; j++) teacher[i * V + j] = f16_to_float(b->full_logits[i * VV + j]);
    f.objective->teacher = teacher;
    f.objective->teacher_dtype = DTYPE_F32;
    f.objective->teacher_stride = V;
    f.objective->full_scale = 0.5f;
    struct result device = run(&f, b, (double)b->n_targets);
    cr_expect(same_bits(&stored, &device));
    free(teacher);
    result_free(&stored);
    result_free(&device);
    batch_free(b);
    fixture_close(&f);
}

Test(objective, the_divisor_scales_the_gradient_and_not_the_loss)
{
    struct fixture f;
    open_fixture(&f, TARGET_TOPK, 5, 7, mixed);
    struct batch *b = teacher_batch(TARGET_TOPK, 5, 2);
    struct result one = run(&f, b, 32), four = run(&f, b, 128);
    cr_expect_eq(one.kd, four.kd);
    cr_expect_eq(one.ce, four.ce);
    for (int i = 0; i < N * C; i++) cr_assert_float_eq(one.d_hidden[i], 4 * four.d_hidden[i], 1e-6 * fabs(one.d_hidden[i]) + 1e-12);
    result_free(&one);
    result_free(&four);
    batch_free(b);
    fixture_close(&f);
}

Test(objective, sums_add_up_until_reset_and_without_backward_no_gradient_is_touched)
{
    struct fixture f;
    double kd, ce;
    open_fixture(&f, TARGET_TOPK, 5, 7, mixed);
    struct batch *b = teacher_batch(TARGET_TOPK, 5, 2);
    struct result once = run(&f, b, (double)b->n_targets);
    int64_t total = f.model->params->total;
    fill_nan((float *)f.model->grads, total);
    fill_nan((float *)f.model->d_hidden, N * C);
    objective_run(f.objective, b, 1, false);
    objective_read(f.objective, &kd, &ce);
    cr_expect_float_eq(kd, 2 * once.kd, 1e-9 * once.kd);
    cr_expect_float_eq(ce, 2 * once.ce, 1e-9 * once.ce);
    for (int64_t i = 0; i < total; i++) cr_assert(isnan(((float *)f.model->grads)[i]));
    for (int i = 0; i < N * C; i++) cr_assert(isnan(((float *)f.model->d_hidden)[i]));
    objective_reset(f.objective);
    objective_read(f.objective, &kd, &ce);
    cr_expect(kd == 0 && ce == 0);
    result_free(&once);
    batch_free(b);
    fixture_close(&f);
}
