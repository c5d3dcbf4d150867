/* compare_logits: KL both ways, log-probabilities, confidences and ranks of a position, against double and counting. */
#include "tests/kernels/ops.h"

#include <math.h>
#include <string.h>

enum situation { ORDINARY, EQUAL, TIES, SURE, FAR_APART, UNIFORM, NO_LABEL, SITUATIONS };

struct compare_case { int64_t Vs, Vt, Vv; bool teacher; };
static const struct compare_case cases[] = {{1, 1, 1, true}, {5, 4, 4, true}, {37, 33, 33, true}, {33, 40, 33, true}, {70, 66, 64, true}, {64, 0, 50, false}, {1030, 1024, 1024, true}};
/* many turns of a device's loops over a row, the last a broken one; a teacher of another head; no teacher; rows that are no whole vectors */
static const struct compare_case true_cases[] = {{152064, 152064, 151665, true}, {152064, 151936, 151665, true}, {152064, 0, 151665, false}, {151665, 151665, 151665, true}};

static const char *name(const void *c_) { const struct compare_case *c = c_; return text("Vs %ld Vt %ld Vv %ld teacher %d", (long)c->Vs, (long)c->Vt, (long)c->Vv, c->teacher); }

struct inputs { float *z, *t; int32_t labels[SITUATIONS]; };
static struct inputs make_inputs(struct rig *r, const struct compare_case *c)
{
    struct inputs in = {.z = acts(r, SITUATIONS * c->Vs, 2, 1), .t = c->teacher ? acts(r, SITUATIONS * c->Vt, 2, 2) : NULL};
    for (int n = 0; n < SITUATIONS; n++) {
        float *z = in.z + n * c->Vs, *t = in.t ? in.t + n * c->Vt : NULL;
        for (int64_t j = 0; j < c->Vv; j++) {
            if (n == TIES) z[j] = roundf(z[j] / 2);
            if (n == SURE && j) z[j] = r->round_inputs ? bf16_to_float(bf16_from_float(z[j] - 64)) : z[j] - 64;
            if (n == FAR_APART) z[j] *= 32;
            if (n == UNIFORM) z[j] = 1;
            if (!t) continue;
            if (n == EQUAL || n == UNIFORM) t[j] = z[j];
            if (n == TIES) t[j] = roundf(t[j] / 2);
            if (n == FAR_APART) t[j] *= 32;
        }
        for (int64_t j = c->Vv; j < c->Vs; j++) z[j] = (n + j) % 2 ? NAN : 1e30f;
        for (int64_t j = c->Vv; t && j < c->Vt; j++) t[j] = (n + j) % 2 ? 1e30f : NAN;
        in.labels[n] = n == NO_LABEL ? -1 : (int32_t)(n * (c->Vv / SITUATIONS + 3) % c->Vv);
    }
    return in;
}

static void run(struct rig *r, const void *c_, struct outputs *out)
{
    const struct compare_case *c = c_;
    struct inputs in = make_inputs(r, c);
    struct eval_row rows[SITUATIONS], *on_device = poison(r, sizeof rows);
    rig_scratch(r, (struct op_limits){.N = SITUATIONS, .C = 8, .V = c->Vs > c->Vt ? c->Vs : c->Vt, .chunk_rows = SITUATIONS, .Hq = 1, .Hkv = 1, .D = 8});
    r->op->compare_logits(r->be, on_device, upload_act(r, in.z, SITUATIONS * c->Vs), upload_act(r, in.t, SITUATIONS * c->Vt), upload(r, in.labels, sizeof in.labels),
                          SITUATIONS, c->Vs, c->Vt, c->Vv);
    r->op->download(r->be, rows, on_device, sizeof rows);
    for (int n = 0; n < SITUATIONS; n++) {
        float values[4] = {rows[n].forward_kl, rows[n].reverse_kl, rows[n].student_logprob, rows[n].teacher_logprob}, confidence[2] = {rows[n].student_confidence, rows[n].teacher_confidence};
        float flags[6] = {rows[n].agree, rows[n].student_top1, rows[n].student_top5, rows[n].teacher_top1, rows[n].teacher_top5, rows[n].counted};
        take_host(out, text("values %d", n), FORWARD, values, 4);
        output(out, text("values %d", n))->floor = n == FAR_APART || n == SURE ? 10 : 1;
        take_host(out, text("confidence %d", n), FORWARD, confidence, 2);
        take_host(out, text("flags %d", n), EXACT, flags, 6);
    }
}

static double log_sum_exp(const float *x, int64_t n)
{
    double top = -INFINITY, sum = 0;
    for (int64_t j = 0; j < n; j++) top = fmax(top, (double)x[j]);
    for (int64_t j = 0; j < n; j++) sum += exp(x[j] - top);
    return top + log(sum);
}

static int64_t rank(const float *x, int64_t n, int64_t id)
{
    int64_t ahead = 0;
    for (int64_t j = 0; j < n; j++) ahead += x[j] > x[id] || (x[j] == x[id] && j < id);
    return ahead;
}

Test(cpu, definition)
{
    struct rig r;
    rig_open_cpu(&r);
    for (size_t i = 0; i < COUNT(cases); i++) {
        const struct compare_case *c = &cases[i];
        struct outputs out = {0};
        run(&r, c, &out);
        struct inputs in = make_inputs(&r, c);
        for (int n = 0; n < SITUATIONS; n++) {
            const float *z = in.z + n * c->Vs, *t = in.t ? in.t + n * c->Vt : NULL;
            double values[4] = {0}, confidence[2] = {0}, flags[6] = {0}, lz = log_sum_exp(z, c->Vv), lt = t ? log_sum_exp(t, c->Vv) : 0;
            int32_t label = in.labels[n];
            if (label >= 0) {
                int64_t best_z = 0, best_t = 0;
                for (int64_t j = 0; j < c->Vv; j++) {
                    confidence[0] = fmax(confidence[0], exp(z[j] - lz));
                    if (t) confidence[1] = fmax(confidence[1], exp(t[j] - lt));
                    if (!rank(z, c->Vv, j)) best_z = j;
                    if (!t) continue;
                    if (!rank(t, c->Vv, j)) best_t = j;
                    double lp = t[j] - lt, lq = z[j] - lz;
                    values[0] += exp(lp) * (lp - lq);
                    values[1] += exp(lq) * (lq - lp);
                }
                values[2] = z[label] - lz;
                flags[1] = rank(z, c->Vv, label) < 1;
                flags[2] = rank(z, c->Vv, label) < 5;
                flags[5] = 1;
                if (t) {
                    values[3] = t[label] - lt;
                    flags[0] = best_z == best_t;
                    flags[3] = rank(t, c->Vv, label) < 1;
                    flags[4] = rank(t, c->Vv, label) < 5;
                }
            }
            const char *what = text("%s, row %d", name(c), n);
            for (int k = 0; k < 4; k++) expect_floats(output(&out, text("values %d", n))->x + k, &values[k], 1, 1, 1e-6, what, k == 0 ? "forward KL" : k == 1 ? "reverse KL" : "log-probability");
            expect_floats(output(&out, text("confidence %d", n))->x, confidence, 2, 1e-6, 1e-6, what, "confidence");
            expect_floats(output(&out, text("flags %d", n))->x, flags, 6, 0, 0, what, "flags");
            if (n == EQUAL && t) cr_assert(output(&out, text("values %d", n))->x[0] == 0 && output(&out, text("values %d", n))->x[1] == 0, "%s: KL of equal logits", what);
        }
        outputs_free(&out);
        rig_reset(&r, name(c));
    }
    rig_close(&r);
}

/* A model that says NaN predicts nothing. */
Test(cpu, nan_is_never_right)
{
    struct rig r;
    rig_open_cpu(&r);
    float z[8], t[8];
    int32_t label = 0;
    fill_nan(z, 8);
    fill_normal(t, 8, 1, 1);
    struct eval_row row;
    r.op->compare_logits(r.be, &row, (act *)z, (act *)t, &label, 1, 8, 8, 8);
    cr_assert(row.counted == 1 && row.student_top1 == 0 && row.student_top5 == 0 && isnan(row.student_logprob) && isnan(row.student_confidence) && isnan(row.forward_kl));
    rig_close(&r);
}

static const struct case_list list = {"compare_logits", cases, COUNT(cases), sizeof *cases, run, name};
Test(gpu, fp32) { ops_compare(&list, "fp32"); }
Test(gpu, bf16) { ops_compare(&list, "bf16"); }

static const struct case_list true_list = {"compare_logits", true_cases, COUNT(true_cases), sizeof *true_cases, run, name};
Test(gpu, true_sizes_fp32) { ops_compare(&true_list, "fp32"); }
Test(gpu, true_sizes_bf16) { ops_compare(&true_list, "bf16"); }
