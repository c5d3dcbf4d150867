/* teacher_targets: what a dump keeps of a row, against long double and a sort. Rows are situations: ordinary, ties, a teacher so sure
 * that the tail is 1e-30 of the mass, nothing but ties. Every output can be asked for alone. */
#include "tests/kernels/ops.h"

#include <math.h>
#include <string.h>

enum situation { ORDINARY, TIES, SURE, FAR_APART, UNIFORM, MASKED, RISING, NO_LABEL, SITUATIONS };
enum wanted { HEAD_IDS = 1, HEAD_LOGPROB = 2, LSE = 4, TAIL = 8, ENTROPY = 16, LABEL = 32, PADDING = 64, FULL = 128, ALL = 255 };

struct targets_case { int64_t V, Vv; int K, nT; float T[3]; int wanted; };
static const struct targets_case cases[] = {
    {1, 1, 1, 1, {1}, ALL},               {37, 33, 1, 1, {1}, ALL},              {37, 33, 8, 3, {1, 3, 0.3f}, ALL},  {40, 33, 33, 2, {2, 1}, ALL},
    {33, 33, 32, 2, {0.1f, 20}, ALL},     {300, 300, 64, 1, {3}, ALL},           {2051, 2048, 256, 2, {1, 2}, ALL},  {515, 512, 16, 3, {1, 2, 4}, ALL},
    /* rows of many vectors a thread, whole vectors and not, that begin at any element and not */
    {50000, 49937, 64, 3, {1, 2, 4}, ALL}, {50000, 50000, 256, 2, {2, 1}, ALL},  {12297, 12290, 20, 1, {1}, ALL},    {40960, 40960, 1, 3, {1, 2, 3}, ALL},
    /* ties by the hundred at the last entry of the head; kinds of temperatures and orders of theirs; one more of T = 1 for the padding */
    {600, 600, 64, 2, {1, 2}, ALL},       {1496, 1490, 100, 3, {1, 1.5f, 2.5f}, ALL}, {9000, 9000, 64, 3, {1, 1.5f, 3}, ALL}, {1600, 1600, 64, 3, {2, 1, 4}, ALL},
    {1608, 1600, 200, 3, {2, 3, 4}, ALL}, {1600, 1600, 64, 3, {1, 1.5f, 2}, ALL}, {9000, 9000, 32, 3, {1, 2, 5}, ALL},   {1600, 1600, 64, 3, {1, 2, 2.5f}, ALL},
    {9000, 8990, 64, 2, {1, 3}, ALL},     {1600, 1600, 20, 2, {1, 1.5f}, ALL},   {9000, 8990, 64, 3, {0.5f, 1.5f, 1}, ALL}, {1600, 1600, 64, 2, {2, 6}, ALL},
    {64, 50, 0, 1, {1}, LSE | TAIL | ENTROPY | LABEL | PADDING | FULL},
    {64, 50, 5, 2, {1, 3}, HEAD_IDS},     {64, 50, 5, 2, {1, 3}, HEAD_LOGPROB},  {64, 50, 5, 2, {1, 3}, LSE},        {64, 50, 5, 2, {1, 3}, TAIL},
    {64, 50, 5, 2, {1, 3}, ENTROPY},      {64, 50, 5, 2, {1, 3}, LABEL},         {64, 50, 5, 2, {1, 3}, FULL},       {64, 50, 5, 2, {1, 3}, PADDING},
};
/* rows of a 152k vocabulary, whole vectors and not, and of one so long that its lists get more room */
static const struct targets_case true_cases[] = {
    {152064, 151665, 64, 3, {1, 2, 4}, ALL}, {152064, 151665, 256, 2, {2, 1}, ALL}, {151665, 151665, 64, 1, {1}, ALL}, {262144, 262144, 256, 3, {1, 2, 3}, ALL},
};
/* Chunks whose parts and lists are more than the 64 MiB a launch may have (cuda/teacher_targets.cu, MOST_SCRATCH): two launches for heads of 64 and for heads of 256, nine of rows that are more than a grid
 * is high. The situations come in turn. */
struct chunk_case { int64_t R; struct targets_case row; };
static const struct chunk_case true_chunks[] = {{8501, {2568, 2563, 64, 3, {1, 2, 4}, ALL}}, {2801, {2568, 2563, 256, 1, {2}, ALL}}, {66003, {24, 21, 4, 1, {1}, ALL}}};

static const char *name(const void *c_)
{
    const struct targets_case *c = c_;
    return text("V %ld Vv %ld K %d nT %d T %g wanted %d", (long)c->V, (long)c->Vv, c->K, c->nT, (double)c->T[0], c->wanted);
}

struct inputs { float *t; int32_t *labels; };
static struct inputs make_inputs(struct rig *r, const struct targets_case *c, int64_t R)
{
    struct inputs in = {.t = acts(r, R * c->V, 3, 1), .labels = (int32_t *)floats(r, R)};
    #pragma omp parallel for schedule(static) if (R > SITUATIONS)
    for (int64_t row = 0; row < R; row++) {
        float *t = in.t + row * c->V;
        int n = (int)(row % SITUATIONS);
        int64_t best = (7 * row + 3) % c->Vv;
        for (int64_t j = 0; j < c->V; j++) {
            if (n == TIES) t[j] = roundf(t[j] / 3);
            if (n == SURE && j < c->Vv && j != best) t[j] = bf16_to_float(bf16_from_float(t[j] / 8 - 75 * c->T[0]));
            if (n == FAR_APART) t[j] *= 16;
            if (n == UNIFORM) t[j] = 1.5f;
            if (n == MASKED && j < c->Vv && j % 3 == 1) t[j] = -INFINITY;
            if (n == RISING && j < c->Vv) t[j] = bf16_to_float(bf16_from_float(t[j] / 4 + 8.0f * (float)j / (float)c->Vv));
            if (!(c->wanted & PADDING) && j >= c->Vv) t[j] = j % 2 ? NAN : 1e30f;   /* padding is read for its mass, else never */
        }
        in.labels[row] = n == NO_LABEL ? -1 : (int32_t)((best + (n == MASKED ? 0 : n)) % c->Vv);
        if (n == MASKED && in.labels[row] % 3 == 1) in.labels[row] = 0;
    }
    return in;
}

static void run_rows(struct rig *r, const struct targets_case *c, int64_t R, struct outputs *out)
{
    struct inputs in = make_inputs(r, c, R);
    int64_t heads = R * c->K, stats = R * c->nT, full = R * c->Vv;
    rig_scratch(r, (struct op_limits){.N = R, .C = 8, .V = c->V, .chunk_rows = R, .Hq = 1, .Hkv = 1, .D = 8, .K = c->K});
    struct teacher_targets o = {.nT = c->nT, .temperatures = c->T, .K = c->K};
    if (c->wanted & HEAD_IDS) o.head_ids = poison(r, (size_t)heads * sizeof *o.head_ids);
    if (c->wanted & HEAD_LOGPROB) o.head_logprob = poison_float(r, heads);
    if (c->wanted & LSE) o.lse = poison_float(r, stats);
    if (c->wanted & TAIL) o.tail_logmass = poison_float(r, stats);
    if (c->wanted & ENTROPY) o.entropy = poison_float(r, R);
    if (c->wanted & LABEL) o.label_logprob = poison_float(r, R);
    if (c->wanted & PADDING) o.padding_mass = poison_float(r, R);
    if (c->wanted & FULL) o.full = poison(r, (size_t)full * sizeof *o.full);
    const act *logits = upload_act(r, in.t, R * c->V);
    const int32_t *labels = upload(r, in.labels, (size_t)R * sizeof *in.labels);
    r->op->teacher_targets(r->be, &o, logits, labels, R, c->V, c->Vv);

    if (o.head_ids) {
        int32_t *ids = (int32_t *)floats(r, heads);
        float *as_float = floats(r, heads);
        r->op->download(r->be, ids, o.head_ids, (size_t)heads * sizeof *ids);
        for (int64_t i = 0; i < heads; i++) as_float[i] = (float)ids[i];
        take_host(out, "head_ids", EXACT, as_float, heads);
    }
    if (o.head_logprob) take_float(out, r, "head_logprob", FORWARD, o.head_logprob, heads);
    if (o.lse) take_float(out, r, "lse", FORWARD, o.lse, stats);
    if (o.tail_logmass) take_float(out, r, "tail_logmass", FORWARD, o.tail_logmass, stats);
    if (o.entropy) take_float(out, r, "entropy", FORWARD, o.entropy, R);
    if (o.label_logprob) take_float(out, r, "label_logprob", FORWARD, o.label_logprob, R);
    if (o.padding_mass) take_float(out, r, "padding_mass", FORWARD, o.padding_mass, R);
    if (o.full) {
        uint16_t *half = (uint16_t *)floats(r, full);
        float *as_float = floats(r, full);
        r->op->download(r->be, half, o.full, (size_t)full * sizeof *half);
        for (int64_t i = 0; i < full; i++) as_float[i] = f16_to_float(half[i]);
        take_host(out, "full", FORWARD, as_float, full);
    }
    for (int i = 0; i < out->n; i++) out->o[i].floor = out->o[i].bound == EXACT ? 0 : 1e-3;   /* at V = 1 every log-probability is 0 */
}

static void run(struct rig *r, const void *c, struct outputs *out) { run_rows(r, c, SITUATIONS, out); }

static long double log_sum_exp(const float *x, const bool *skip, int64_t n, long double scale)
{
    long double top = -INFINITY, sum = 0;
    for (int64_t j = 0; j < n; j++) if (!(skip && skip[j]) && x[j] * scale > top) top = x[j] * scale;
    if (top == -INFINITY) return top;
    for (int64_t j = 0; j < n; j++) if (!(skip && skip[j])) sum += expl(x[j] * scale - top);
    return top + logl(sum);
}

static const float *sorted_row;                 /* qsort has no context */
static int descending(const void *a_, const void *b_)
{
    int32_t a = *(const int32_t *)a_, b = *(const int32_t *)b_;
    return sorted_row[a] != sorted_row[b] ? (sorted_row[a] < sorted_row[b] ? 1 : -1) : a - b;
}

Test(cpu, definition)
{
    struct rig r;
    rig_open_cpu(&r);
    for (size_t i = 0; i < COUNT(cases); i++) {
        const struct targets_case *c = &cases[i];
        struct outputs out = {0};
        run(&r, c, &out);
        struct inputs in = make_inputs(&r, c, SITUATIONS);
        int32_t *order = xmalloc((size_t)c->Vv * sizeof *order);
        for (int n = 0; n < SITUATIONS; n++) {
            const float *t = in.t + n * c->V;
            const char *what = text("%s, row %d", name(c), n);
            double lse[3], tail[3], entropy = 0, *head = xmalloc((size_t)c->K * sizeof *head + 1), *ids = xmalloc((size_t)c->K * sizeof *ids + 1), *full = xmalloc((size_t)c->Vv * sizeof *full);
            bool *stored = xcalloc((size_t)c->Vv, sizeof *stored);
            for (int64_t j = 0; j < c->Vv; j++) order[j] = (int32_t)j;
            sorted_row = t;
            qsort(order, (size_t)c->Vv, sizeof *order, descending);
            long double l0 = log_sum_exp(t, NULL, c->Vv, 1 / (long double)c->T[0]);
            for (int k = 0; k < c->K; k++) {
                ids[k] = order[k];
                head[k] = (double)(t[order[k]] / (long double)c->T[0] - l0);
                stored[order[k]] = true;
            }
            for (int k = 0; k < c->nT; k++) {
                long double all = log_sum_exp(t, NULL, c->Vv, 1 / (long double)c->T[k]);
                lse[k] = (double)all;
                tail[k] = (double)(log_sum_exp(t, stored, c->Vv, 1 / (long double)c->T[k]) - all);
            }
            for (int64_t j = 0; j < c->Vv; j++) {
                long double log_p = t[j] / (long double)c->T[0] - l0;
                if (t[j] > -INFINITY) entropy -= (double)(expl(log_p) * log_p);
                full[j] = (double)f16_to_float(f16_from_float(t[j] * (1 / c->T[0])));
            }
            double label = in.labels[n] < 0 ? 0 : (double)(t[in.labels[n]] / (long double)c->T[0] - l0), padding = 0;
            if (c->wanted & PADDING && c->V > c->Vv) padding = (double)expl(log_sum_exp(t + c->Vv, NULL, c->V - c->Vv, 1) - log_sum_exp(t, NULL, c->V, 1));
            if (c->wanted & HEAD_IDS) expect_floats(output(&out, "head_ids")->x + n * c->K, ids, c->K, 0, 0, what, "head_ids");
            if (c->wanted & HEAD_LOGPROB) expect_floats(output(&out, "head_logprob")->x + n * c->K, head, c->K, 1, 3e-7, what, "head_logprob");
            if (c->wanted & LSE) expect_floats(output(&out, "lse")->x + n * c->nT, lse, c->nT, 1, 3e-7, what, "lse");
            for (int k = 0; k < c->nT && c->wanted & TAIL; k++) expect_floats(output(&out, "tail_logmass")->x + n * c->nT + k, &tail[k], 1, 1, 3e-7, what, "tail_logmass");
            if (c->wanted & ENTROPY) expect_floats(output(&out, "entropy")->x + n, &entropy, 1, 0.1, 2e-6, what, "entropy");
            if (c->wanted & LABEL) expect_floats(output(&out, "label_logprob")->x + n, &label, 1, 1, 3e-7, what, "label_logprob");
            if (c->wanted & PADDING) expect_floats(output(&out, "padding_mass")->x + n, &padding, 1, 1e-30, 2e-6, what, "padding_mass");
            if (c->wanted & FULL) expect_floats(output(&out, "full")->x + n * c->Vv, full, c->Vv, 0, 0, what, "full");
            if (n == SURE && c->wanted & TAIL && c->K && c->K < c->Vv) cr_assert(tail[0] < -60, "%s: the tail is not tiny: %g", what, tail[0]);
            free(head); free(ids); free(full); free(stored);
        }
        free(order);
        outputs_free(&out);
        rig_reset(&r, name(c));
    }
    rig_close(&r);
}

/* Rows that are no distribution: a NaN, beside the largest logit and far from it, nothing but NaN, nothing but masked logits, an infinity. A dump sets a position aside when one of its log-sum-exps or its
 * entropy is not finite (train/dump_pipeline.c): they must not be, and the row between must be what it is alone. */
static void not_finite(struct rig *r)
{
    enum { ROWS = 9, GOOD = 3, T = 3, K = 20 };
    static const float temperatures[T] = {1, 2, 3};
    static const int64_t lengths[] = {40, 2048, 5000, 5003, 40961};
    for (size_t i = 0; i < COUNT(lengths); i++) {
        int64_t V = lengths[i];
        float *t = acts(r, ROWS * V, 3, 9), out[2][ROWS * T], entropy[2][ROWS];
        for (int64_t j = 0; j < V; j++) {
            t[2 * V + j] = NAN;
            t[4 * V + j] = -INFINITY;
            t[7 * V + j] = t[8 * V + j] = 1;                 /* a row of ties is done again */
        }
        t[7 * V + V / 2] = NAN;
        t[8 * V + V / 2] = -NAN;
        t[V / 3] = NAN;
        t[V + 8] = 90;
        t[V + 9] = NAN;
        t[5 * V + V - 1] = INFINITY;
        t[6 * V + V - 1] = -NAN;                             /* what fills no vector */
        rig_scratch(r, (struct op_limits){.N = ROWS, .C = 8, .V = V, .chunk_rows = ROWS, .Hq = 1, .Hkv = 1, .D = 8, .K = K});
        for (int alone = 0; alone < 2; alone++) {
            int64_t R = alone ? 1 : ROWS;
            struct teacher_targets o = {.nT = T, .temperatures = temperatures, .K = K, .lse = poison_float(r, R * T), .entropy = poison_float(r, R), .head_ids = poison(r, ROWS * K * sizeof *o.head_ids),
                                        .head_logprob = poison_float(r, R * K), .tail_logmass = poison_float(r, R * T)};
            r->op->teacher_targets(r->be, &o, upload_act(r, t + (alone ? GOOD * V : 0), R * V), NULL, R, V, V);
            r->op->download(r->be, out[alone], o.lse, (size_t)(R * T) * sizeof(float));
            r->op->download(r->be, entropy[alone], o.entropy, (size_t)R * sizeof(float));
        }
        cr_assert(!memcmp(&out[0][GOOD * T], out[1], T * sizeof(float)) && entropy[0][GOOD] == entropy[1][0], "V %ld: a row beside rows that are not finite", (long)V);
        for (int n = 0; n < ROWS; n++) {
            bool good = isfinite(entropy[0][n]);
            for (int k = 0; k < T; k++) good &= isfinite(out[0][n * T + k]) != 0;
            cr_assert_eq(good, n == GOOD, "V %ld, row %d: lse %g, %g, %g, entropy %g", (long)V, n, (double)out[0][n * T], (double)out[0][n * T + 1], (double)out[0][n * T + 2], (double)entropy[0][n]);
        }
        rig_reset(r, "not finite");
    }
    /* padding is not part of the distribution: what it holds is seen in its mass alone */
    static const float held[] = {NAN, INFINITY, -INFINITY};
    for (size_t i = 0; i < COUNT(held); i++) {
        float *t = acts(r, 64, 3, 9), mass, lse;
        for (int j = 50; j < 64; j++) t[j] = j == 60 || held[i] == -INFINITY ? held[i] : 1;
        rig_scratch(r, (struct op_limits){.N = 1, .C = 8, .V = 64, .chunk_rows = 1, .Hq = 1, .Hkv = 1, .D = 8, .K = K});
        struct teacher_targets o = {.nT = 1, .temperatures = temperatures, .K = K, .lse = poison_float(r, 1), .padding_mass = poison_float(r, 1), .head_ids = poison(r, K * sizeof *o.head_ids)};
        r->op->teacher_targets(r->be, &o, upload_act(r, t, 64), NULL, 1, 64, 50);
        r->op->download(r->be, &mass, o.padding_mass, sizeof mass);
        r->op->download(r->be, &lse, o.lse, sizeof lse);
        cr_assert(isfinite(lse) && (held[i] == -INFINITY ? mass == 0 : isnan(mass)), "padding of %g: mass %g, lse %g", (double)held[i], (double)mass, (double)lse);
        rig_reset(r, "padding that is not finite");
    }
}

Test(cpu, not_finite)
{
    struct rig r;
    rig_open_cpu(&r);
    not_finite(&r);
    rig_close(&r);
}

static void not_finite_on(const char *precision)
{
    struct rig r;
    if (!rig_open_gpu(&r, "teacher_targets not finite", precision)) cr_skip_test("no device");
    not_finite(&r);
    rig_close(&r);
}
Test(gpu, not_finite) { not_finite_on("bf16"); }
Test(gpu, not_finite_fp32) { not_finite_on("fp32"); }

static const struct case_list list = {"teacher_targets", cases, COUNT(cases), sizeof *cases, run, name};
Test(gpu, fp32) { ops_compare(&list, "fp32"); }
Test(gpu, bf16) { ops_compare(&list, "bf16"); }

static void run_chunk(struct rig *r, const void *c_, struct outputs *out) { const struct chunk_case *c = c_; run_rows(r, &c->row, c->R, out); }
static const char *chunk_name(const void *c_) { const struct chunk_case *c = c_; return text("R %ld %s", (long)c->R, name(&c->row)); }

static const struct case_list true_list = {"teacher_targets", true_cases, COUNT(true_cases), sizeof *true_cases, run, name};
static const struct case_list true_chunk_list = {"teacher_targets", true_chunks, COUNT(true_chunks), sizeof *true_chunks, run_chunk, chunk_name};
Test(gpu, true_sizes_fp32) { ops_compare(&true_list, "fp32"); ops_compare(&true_chunk_list, "fp32"); }
Test(gpu, true_sizes_bf16) { ops_compare(&true_list, "bf16"); ops_compare(&true_chunk_list, "bf16"); }
