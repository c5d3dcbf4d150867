/* eval_rows against the definition in double, whatever the batch, the chunk and the number of rows; calibration errors against the definition, bin by bin. */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/rng.h"
#include "tests/train/fixture.h"
#include "train/eval.h"

enum { ROWS = 7, L = 12, Vv = FIXTURE_VOCAB - 2 };

static struct corpus_rows *make_rows(void)
{
    struct corpus_rows *r = xcalloc(1, sizeof *r);
    *r = (struct corpus_rows){.rows = ROWS, .length = L, .tokens = xcalloc(ROWS * L, 4), .loss_mask = xcalloc(ROWS * L, 1), .document = xcalloc(ROWS * L, 2)};
    for (int i = 0; i < ROWS * L; i++) {
        r->tokens[i] = philox4x32(3, 1, (uint64_t)i).v[0] % Vv;
        r->document[i] = (uint16_t)(i % L >= 5 + i / L % 3);
    }
    for (int i = 0; i < ROWS * L; i++) r->loss_mask[i] = i % L + 1 < L && r->document[i + 1] == r->document[i] && i % 4 != 2;
    return r;
}

static void free_rows(struct corpus_rows *r)
{
    free(r->tokens);
    free(r->loss_mask);
    free(r->document);
    free(r);
}

static float *all_logits(struct fixture *f, const struct batch *b)
{
    float *z = xmalloc((size_t)(b->n * FIXTURE_VOCAB) * sizeof *z);
    model_set_batch(f->model, b);
    model_forward(f->model);
    for (int64_t i = 0; i < b->n; i += f->model->o.head_rows) {
        int64_t n = b->n - i < f->model->o.head_rows ? b->n - i : f->model->o.head_rows;
        model_logits(f->model, i, n);
        f->be->ops->download_act(f->be, z + i * FIXTURE_VOCAB, f->model->logits, n * FIXTURE_VOCAB);
    }
    return z;
}

static int first_of(const float *z) { int best = 0; for (int v = 1; v < Vv; v++) if (z[v] > z[best]) best = v; return best; }
static int rank_of(const float *z, int id) { int rank = 0; for (int v = 0; v < Vv; v++) rank += z[v] > z[id]; return rank; }
static double log_sum(const float *z) { double s = 0; for (int v = 0; v < Vv; v++) s += exp(z[v]); return log(s); }

/* Guo et al. 2017, equations 2 to 5: sum over bins of |B| / n x |accuracy of B - confidence of B| */
static double calibration_by_definition(const double *confidence, const bool *right, int64_t n)
{
    double error = 0;
    for (int m = 1; m <= 15; m++) {
        double size = 0, hits = 0, sure = 0;
        for (int64_t i = 0; i < n; i++) {
            if (confidence[i] * 15 <= m - 1 || confidence[i] * 15 > m) continue;
            size++;
            hits += right[i];
            sure += confidence[i];
        }
        if (size) error += size / (double)n * fabs(hits / size - sure / size);
    }
    return error;
}

static struct eval_result by_definition(struct fixture *student, struct fixture *teacher, const struct batch *b)
{
    struct eval_result r = {0};
    float *zs = all_logits(student, b), *zt = all_logits(teacher, b);
    double *sure = xcalloc((size_t)b->n, sizeof *sure), *teacher_sure = xcalloc((size_t)b->n, sizeof *sure);
    bool *right = xcalloc((size_t)b->n, 1), *teacher_right = xcalloc((size_t)b->n, 1);
    for (int64_t i = 0; i < b->n; i++) {
        const float *q = zs + i * FIXTURE_VOCAB, *p = zt + i * FIXTURE_VOCAB;
        int y = b->labels[i];
        if (y < 0) continue;
        double lq = log_sum(q), lp = log_sum(p);
        sure[r.positions] = exp(q[first_of(q)] - lq);
        teacher_sure[r.positions] = exp(p[first_of(p)] - lp);
        right[r.positions] = first_of(q) == y;
        teacher_right[r.positions] = first_of(p) == y;
        r.confidence += sure[r.positions];
        r.teacher_confidence += teacher_sure[r.positions];
        r.positions++;
        r.loss += lq - q[y];
        r.teacher_loss += lp - p[y];
        r.top1 += rank_of(q, y) < 1;
        r.top5 += rank_of(q, y) < 5;
        r.teacher_top1 += rank_of(p, y) < 1;
        r.teacher_top5 += rank_of(p, y) < 5;
        r.agreement += first_of(p) == first_of(q);
        for (int v = 0; v < Vv; v++) {
            double a = p[v] - lp, c = q[v] - lq;
            r.forward_kl += exp(a) * (a - c);
            r.reverse_kl += exp(c) * (c - a);
        }
    }
    double *mean[] = {&r.loss, &r.teacher_loss, &r.top1, &r.top5, &r.teacher_top1, &r.teacher_top5, &r.agreement, &r.forward_kl, &r.reverse_kl, &r.confidence, &r.teacher_confidence};
    for (size_t i = 0; i < sizeof mean / sizeof *mean; i++) *mean[i] /= (double)r.positions;
    r.calibration_error = calibration_by_definition(sure, right, r.positions);
    r.teacher_calibration_error = calibration_by_definition(teacher_sure, teacher_right, r.positions);
    free(zs);
    free(zt);
    free(sure);
    free(teacher_sure);
    free(right);
    free(teacher_right);
    return r;
}

static void open_pair(struct fixture *student, struct fixture *teacher, int64_t rows, int64_t chunk)
{
    struct fixture_options o = {.architecture = "qwen2", .rows = rows, .length = L, .head_rows = chunk, .kind = TARGET_NONE, .loss = {.temperature = 1, .ce_weight = 1}, .seed = 4};
    fixture_open(student, &o);
    o.seed = 5;
    o.architecture = "llama";
    fixture_open(teacher, &o);
}

Test(eval, rows_by_definition)
{
    static const struct { int64_t batch, chunk, max_rows; } cases[] = {{ROWS, 0, 0}, {1, 5, 0}, {3, 7, 0}, {2, 24, 5}, {ROWS, 100, 1}, {4, 1, 99}};
    struct corpus_rows *rows = make_rows();
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        struct fixture student, teacher, wide_student, wide_teacher;
        struct eval_result got, alone;
        int64_t used = cases[c].max_rows && cases[c].max_rows < ROWS ? cases[c].max_rows : ROWS;
        open_pair(&student, &teacher, cases[c].batch, cases[c].chunk);
        open_pair(&wide_student, &wide_teacher, ROWS, 0);
        struct batch *b = batch_new(used, L, NULL, false);
        for (int64_t i = 0; i < used; i++) batch_set_row(b, i, rows->tokens + i * L, rows->loss_mask + i * L, rows->document + i * L);
        batch_finish(b);
        struct eval_result want = by_definition(&wide_student, &wide_teacher, b);
        cr_assert_eq(eval_rows(student.model, teacher.model, rows, cases[c].max_rows, Vv, &got), OK, "%s", fail_message());
        cr_assert(got.rows == used && got.positions == want.positions);
        cr_assert(got.top1 == want.top1 && got.top5 == want.top5 && got.teacher_top1 == want.teacher_top1 && got.teacher_top5 == want.teacher_top5 && got.agreement == want.agreement);
        cr_assert_float_eq(got.loss, want.loss, 1e-5 * want.loss);
        cr_assert_float_eq(got.teacher_loss, want.teacher_loss, 1e-5 * want.teacher_loss);
        cr_assert_float_eq(got.forward_kl, want.forward_kl, 1e-5 * want.forward_kl);
        cr_assert_float_eq(got.reverse_kl, want.reverse_kl, 1e-5 * want.reverse_kl);
        cr_assert_float_eq(got.confidence, want.confidence, 1e-5 * want.confidence);
        cr_assert_float_eq(got.teacher_confidence, want.teacher_confidence, 1e-5 * want.teacher_confidence);
        cr_assert_float_eq(got.calibration_error, want.calibration_error, 1e-5);
        cr_assert_float_eq(got.teacher_calibration_error, want.teacher_calibration_error, 1e-5);
        cr_assert_eq(eval_rows(student.model, NULL, rows, cases[c].max_rows, Vv, &alone), OK);
        cr_assert(alone.loss == got.loss && alone.top5 == got.top5 && alone.forward_kl == 0 && alone.agreement == 0 && alone.teacher_loss == 0);
        cr_assert_eq(eval_rows(student.model, student.model, rows, cases[c].max_rows, Vv, &alone), OK);
        cr_assert(alone.forward_kl == 0 && alone.reverse_kl == 0 && alone.agreement == 1 && alone.teacher_loss == alone.loss);
        batch_free(b);
        fixture_close(&student);
        fixture_close(&teacher);
        fixture_close(&wide_student);
        fixture_close(&wide_teacher);
    }
    free_rows(rows);
}

Test(eval, refusals)
{
    struct fixture student, teacher;
    struct eval_result r;
    struct corpus_rows *rows = make_rows();
    open_pair(&student, &teacher, 2, 0);
    uint32_t kept = rows->tokens[3 * L + 2];
    rows->tokens[3 * L + 2] = Vv;
    cr_assert_eq(eval_rows(student.model, NULL, rows, 0, Vv, &r), ERR_MISMATCH);
    cr_assert(strstr(fail_message(), "row 3") && strstr(fail_message(), "token 59"), "%s", fail_message());
    rows->tokens[3 * L + 2] = kept;
    float nan = NAN;
    student.be->ops->upload_act(student.be, student.model->weights, &nan, 1);
    rows->tokens[0] = 0;
    cr_assert_eq(eval_rows(student.model, teacher.model, rows, 0, Vv, &r), ERR_NUMERIC);
    cr_assert_eq(eval_rows(teacher.model, student.model, rows, 0, Vv, &r), ERR_NUMERIC);
    memset(rows->loss_mask, 0, ROWS * L);
    cr_assert_eq(eval_rows(teacher.model, NULL, rows, 0, Vv, &r), ERR_INPUT);
    fixture_close(&student);
    fixture_close(&teacher);
    free_rows(rows);
}

Test(eval, calibration)
{
    /* By hand: nine of ten right at 0.9 is no error; sure and always wrong is all of it; 1/15 and 2/15 end their bins; mixed, bins count by their size. */
    struct calibration c = {0}, sure = {0}, edges = {0}, mixed = {0};
    for (int i = 0; i < 10; i++) calibration_add(&c, 0.9, i != 3);
    cr_assert_float_eq(calibration_error(&c), 0, 1e-12);
    for (int i = 0; i < 3; i++) calibration_add(&sure, 1, false);
    cr_assert_float_eq(calibration_error(&sure), 1, 1e-12);
    calibration_add(&edges, 1.0 / 15, true);
    calibration_add(&edges, 2.0 / 15, false);              /* in one bin they would make up for each other: |1 - 3/15| / 2 */
    cr_assert_float_eq(calibration_error(&edges), (14.0 / 15 + 2.0 / 15) / 2, 1e-12);
    for (int i = 0; i < 4; i++) calibration_add(&mixed, 0.75, i < 2);
    calibration_add(&mixed, 0.3, false);
    cr_assert_float_eq(calibration_error(&mixed), (4 * 0.25 + 0.3) / 5, 1e-12);
    cr_assert_eq(calibration_error(&(struct calibration){0}), 0);

    enum { N = 5000 };
    static double confidence[N];
    static bool right[N];
    for (int turn = 0; turn < 4; turn++) {
        struct calibration many = {0};
        for (int i = 0; i < N; i++) {
            struct philox r = philox4x32(7, (uint64_t)turn, (uint64_t)i);
            confidence[i] = r.v[2] % 50 == 0 ? 1 : ((double)r.v[0] + 1) / 0x1p32;
            right[i] = (double)r.v[1] / 0x1p32 < (turn == 0 ? confidence[i] : turn == 1 ? confidence[i] * confidence[i] : turn == 2 ? 0.3 : 1);
            calibration_add(&many, confidence[i], right[i]);
        }
        cr_assert_float_eq(calibration_error(&many), calibration_by_definition(confidence, right, N), 1e-12);
    }
}

Test(eval, standard_error)
{
    cr_assert_float_eq(share_error(0.5, 100), 0.05, 1e-12);
    cr_assert_eq(share_error(0, 100), 0);
    cr_assert_eq(share_error(0.3, 0), 0);
}
