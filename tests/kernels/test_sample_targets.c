/* sample_targets: every draw against the inverse of the distribution function in long double at the same uniform; the frequencies of many draws against the
 * probabilities; and that a draw depends on (seed, row, position, draw) and on nothing else. On a device: the same ids and counts, exactly. */
#include "tests/kernels/ops.h"

#include <math.h>
#include <omp.h>
#include <string.h>

#include "base/rng.h"

enum situation { ORDINARY, TIES, SURE, FAR_APART, UNIFORM, MASKED, SITUATIONS };

struct sample_case { int64_t V, Vv; int K, D; float T; bool logprob; };
static const struct sample_case cases[] = {
    {1, 1, 0, 5, 1, true},     {1, 1, 1, 5, 1, true},       {37, 33, 0, 1, 1, true},      {37, 33, 8, 32, 3, true},  {40, 33, 33, 7, 2, true},  {33, 33, 32, 50, 0.1f, true},
    {300, 300, 64, 255, 3, true}, {2051, 2048, 256, 32, 1, true}, {515, 512, 16, 50, 20, false}, {515, 513, 0, 50, 1, false}, {70000, 69999, 32, 32, 1, true},
};
/* vocabularies of 152k, and of the most that is implemented, the shared memory of which is nearly all a kernel gets unasked */
static const struct sample_case true_cases[] = {{152064, 151665, 64, 32, 1, true}, {262144, 262144, 256, 255, 2, true}};

static const char *name(const void *c_)
{
    const struct sample_case *c = c_;
    return text("V %ld Vv %ld K %d D %d T %g", (long)c->V, (long)c->Vv, c->K, c->D, (double)c->T);
}

enum { LENGTH = 4, FIRST = 4 * 1000003 + 2 };       /* the chunk begins within a row and ends within another */
static const uint64_t SEED = 0x0123456789abcdefu;

struct inputs { float *t, *lse; int32_t *head; };
static struct inputs make_inputs(struct rig *r, const struct sample_case *c)
{
    struct inputs in = {acts(r, SITUATIONS * c->V, 3, 1), floats(r, SITUATIONS * 2), (int32_t *)floats(r, SITUATIONS * c->K + 1)};
    for (int n = 0; n < SITUATIONS; n++) {
        float *t = in.t + n * c->V;
        int64_t best = (7 * n + 3) % c->Vv;
        for (int64_t j = 0; j < c->V; j++) {
            if (n == TIES) t[j] = roundf(t[j] / 3);
            if (n == SURE && j != best) t[j] = bf16_to_float(bf16_from_float(t[j] / 8 - 75 * c->T));
            if (n == FAR_APART) t[j] *= 16;
            if (n == UNIFORM) t[j] = 1.5f;
            if (n == MASKED && j % 3 == 1) t[j] = -INFINITY;
            if (j >= c->Vv) t[j] = j % 2 ? NAN : 1e30f;         /* padding is never read */
        }
        /* the head: the K largest, ties by lower id, as teacher_targets has it */
        bool *taken = xcalloc((size_t)c->Vv, sizeof *taken);
        for (int k = 0; k < c->K; k++) {
            int32_t top = -1;
            for (int32_t j = 0; j < c->Vv; j++) if (!taken[j] && (top < 0 || t[j] > t[top])) top = j;
            taken[in.head[n * c->K + k] = top] = true;
        }
        free(taken);
        double most = -INFINITY, sum = 0;
        for (int64_t j = 0; j < c->Vv; j++) most = fmax(most, t[j]);
        for (int64_t j = 0; j < c->Vv; j++) sum += exp((t[j] - most) / c->T);
        in.lse[2 * n] = (float)(most / c->T + log(sum));
        in.lse[2 * n + 1] = NAN;                                /* of another temperature: not looked at */
    }
    return in;
}

static struct sample_targets make_targets(struct rig *r, const struct sample_case *c, const struct inputs *in, int64_t R)
{
    rig_scratch(r, (struct op_limits){.N = R, .C = 8, .V = c->V, .chunk_rows = R, .Hq = 1, .Hkv = 1, .D = 8, .K = c->K});
    return (struct sample_targets){.draws = c->D, .ids = poison(r, (size_t)(R * c->D) * 4), .count = poison(r, (size_t)(R * c->D)),
                                   .logprob = c->logprob ? poison_float(r, R * c->D) : NULL, .K = c->K, .head_ids = upload(r, in->head, (size_t)(R * c->K) * 4),
                                   .lse = c->logprob ? upload(r, in->lse, (size_t)(2 * R) * 4) : NULL, .nT = 2, .temperature = c->T, .seed = SEED, .first = FIRST, .row_length = LENGTH};
}

/* ids and counts as floats: both are exact */
static void take_draws(struct rig *r, const struct sample_targets *s, int64_t R, float *ids, float *count)
{
    int64_t n = R * s->draws;
    int32_t *host_ids = xmalloc((size_t)n * 4);
    uint8_t *host_count = xmalloc((size_t)n);
    r->op->download(r->be, host_ids, s->ids, (size_t)n * 4);
    r->op->download(r->be, host_count, s->count, (size_t)n);
    for (int64_t i = 0; i < n; i++) { ids[i] = (float)host_ids[i]; count[i] = host_count[i]; }
    free(host_ids);
    free(host_count);
}

static void run(struct rig *r, const void *c_, struct outputs *out)
{
    const struct sample_case *c = c_;
    struct inputs in = make_inputs(r, c);
    struct sample_targets s = make_targets(r, c, &in, SITUATIONS);
    int64_t n = SITUATIONS * c->D;
    r->op->sample_targets(r->be, &s, upload_act(r, in.t, SITUATIONS * c->V), SITUATIONS, c->V, c->Vv);
    float *ids = floats(r, n), *count = floats(r, n);
    take_draws(r, &s, SITUATIONS, ids, count);
    take_host(out, "ids", EXACT, ids, n);
    take_host(out, "count", EXACT, count, n);
    if (s.logprob) take_float(out, r, "logprob", FORWARD, s.logprob, n);
}

Test(cpu, definition)
{
    struct rig r;
    rig_open_cpu(&r);
    int64_t draws = 0, disputed = 0;
    for (size_t i = 0; i < COUNT(cases); i++) {
        const struct sample_case *c = &cases[i];
        struct outputs out = {0};
        run(&r, c, &out);
        struct inputs in = make_inputs(&r, c);
        long double *end = xmalloc((size_t)c->Vv * sizeof *end);
        for (int n = 0; n < SITUATIONS; n++) {
            const float *t = in.t + n * c->V, *ids = output(&out, "ids")->x + n * c->D, *count = output(&out, "count")->x + n * c->D;
            const char *what = text("%s, row %d", name(c), n);
            bool *head = xcalloc((size_t)c->Vv, sizeof *head);
            int *want = xcalloc((size_t)c->Vv, sizeof *want), sum = 0, used = 0;
            for (int k = 0; k < c->K; k++) head[in.head[n * c->K + k]] = true;
            long double top = -INFINITY, total = 0;
            for (int64_t j = 0; j < c->Vv; j++) if (!head[j] && t[j] > top) top = t[j];
            for (int64_t j = 0; j < c->Vv; j++) end[j] = total += head[j] || t[j] == -INFINITY ? 0 : expl((t[j] - top) / c->T);
            for (; used < c->D && count[used] > 0; used++) {
                int32_t id = (int32_t)ids[used];
                cr_assert(id >= 0 && id < c->Vv && !head[id] && t[id] > -INFINITY, "%s: %d was drawn", what, id);
                cr_assert(!used || ids[used] > ids[used - 1], "%s: not in ascending order", what);
                sum += (int)count[used];
                double logp = t[id] / (double)c->T - in.lse[2 * n];
                if (c->logprob) expect_floats(output(&out, "logprob")->x + n * c->D + used, &logp, 1, 1, 3e-7, what, "logprob");
            }
            for (int k = used; k < c->D; k++) cr_assert(ids[k] == 0 && count[k] == 0 && (!c->logprob || output(&out, "logprob")->x[n * c->D + k] == 0), "%s: slot %d is not empty", what, k);
            cr_assert_eq(sum, total > 0 ? c->D : 0, "%s: %d draws", what, sum);
            int64_t row = (FIRST + n) / LENGTH, position = (FIRST + n) % LENGTH;
            for (int d = 0; d < sum; d++) {
                struct philox u = philox4x32(SEED ^ 0x73616d706c657321u, (uint64_t)row, (uint64_t)position << 32 | (uint32_t)(d / 2));
                long double at = ((long double)u.v[2 * (d & 1)] * 0x1p-32L + (long double)u.v[2 * (d & 1) + 1] * 0x1p-64L) * total;
                int64_t j = 0;
                while (end[j] <= at) j++;
                /* weights are exact to fp32: near a boundary the neighbour may have it */
                bool near = fabsl(end[j] - at) < 5e-7L * total || (j && fabsl(end[j - 1] - at) < 5e-7L * total);
                disputed += near;
                if (near) {
                    for (int64_t k = j; k < c->Vv && (k == j || end[k - 1] - at < 5e-7L * total); k++) want[k] = -c->D;
                    for (int64_t k = j - 1; k >= 0 && at - end[k] < 5e-7L * total; k--) want[k] = -c->D;
                }
                else want[j]++;
                draws++;
            }
            for (int k = 0; k < used; k++) want[(int32_t)ids[k]] -= want[(int32_t)ids[k]] >= 0 ? (int)count[k] : 0;
            for (int64_t j = 0; j < c->Vv && c->Vv < 3000; j++) cr_assert(want[j] <= 0, "%s: id %ld should have been drawn %d times more", what, (long)j, want[j]);
            free(head);
            free(want);
        }
        free(end);
        outputs_free(&out);
        rig_reset(&r, name(c));
    }
    cr_assert(draws > 2900 && disputed * 50 < draws, "%ld of %ld draws were not compared", (long)disputed, (long)draws);
    rig_close(&r);
}

/* The same row of logits at many positions: counts over all are multinomial. Chi-square of the frequencies, and the spread of a count within a
 * position, which would be another if draws depended on each other. Both within five standard deviations. */
Test(cpu, frequencies)
{
    struct rig r;
    rig_open_cpu(&r);
    static const struct sample_case many[] = {{41, 37, 0, 50, 1, false}, {41, 37, 5, 32, 1, false}, {700, 700, 32, 32, 2, false}, {700, 699, 0, 1, 0.5f, false}};
    for (size_t i = 0; i < COUNT(many); i++) {
        const struct sample_case *c = &many[i];
        enum { R = 20000 };
        struct inputs in = {floats(&r, R * c->V), floats(&r, 1), (int32_t *)floats(&r, R * c->K + 1)};
        float *row = acts(&r, c->V, 1.5f, 77);
        for (int k = 0; k < c->K; k++) row[3 * k] = 9 - (float)k / 10;
        for (int64_t n = 0; n < R; n++) {
            memcpy(in.t + n * c->V, row, (size_t)c->V * sizeof *row);
            for (int k = 0; k < c->K; k++) in.head[n * c->K + k] = 3 * k;
        }
        struct sample_targets s = make_targets(&r, c, &in, R);
        r.op->sample_targets(r.be, &s, upload_act(&r, in.t, R * c->V), R, c->V, c->Vv);
        double *p = xcalloc((size_t)c->Vv, sizeof *p), *seen = xcalloc((size_t)c->Vv, sizeof *seen), *square = xcalloc((size_t)c->Vv, sizeof *square), total = 0, chi = 0;
        int cells = 0;
        for (int64_t j = 0; j < c->Vv; j++) total += p[j] = j % 3 == 0 && j / 3 < c->K ? 0 : exp(row[j] / (double)c->T);
        for (int64_t n = 0; n < R * c->D; n++) {
            seen[s.ids[n]] += s.count[n];
            square[s.ids[n]] += s.count[n] * s.count[n];
        }
        for (int64_t j = 0; j < c->Vv; j++) {
            p[j] /= total;
            double want = p[j] * R * c->D;
            if (p[j] == 0) { cr_assert_eq(seen[j], 0); continue; }
            if (want < 20) continue;
            chi += (seen[j] - want) * (seen[j] - want) / want;
            cells++;
            double variance = square[j] / R - (seen[j] / R) * (seen[j] / R), expected = c->D * p[j] * (1 - p[j]);
            /* the variance of a variance: (kurtosis + 2) sigma^4 / R, the kurtosis of a binomial being (1 - 6 p q) / (D p q) */
            double spread = expected * sqrt(((1 - 6 * p[j] * (1 - p[j])) / expected + 2) / R);
            cr_assert(fabs(variance - expected) < 5 * spread + 1e-9, "%s: id %ld: variance %g, not %g", name(c), (long)j, variance, expected);
        }
        cr_assert(cells > 30 && fabs(chi - (cells - 1)) < 5 * sqrt(2.0 * (cells - 1)), "%s: chi-square %g over %d cells", name(c), chi, cells);
        free(p);
        free(seen);
        free(square);
        rig_reset(&r, name(c));
    }
    rig_close(&r);
}

/* However rows are cut into chunks, whatever the threads: the same draws. Another seed, row or position: others. */
Test(cpu, keys)
{
    struct rig r;
    rig_open_cpu(&r);
    const struct sample_case c = {300, 290, 8, 32, 1, true};
    enum { R = 24 };
    struct inputs in = {floats(&r, R * c.V), floats(&r, 2 * R), (int32_t *)floats(&r, R * c.K)};
    float *row = acts(&r, c.V, 2, 5), *whole[2], *part[2];
    for (int n = 0; n < R; n++) {
        memcpy(in.t + n * c.V, row, (size_t)c.V * sizeof *row);
        in.lse[2 * n] = 10;
        for (int k = 0; k < c.K; k++) in.head[n * c.K + k] = k;
    }
    struct sample_targets s = make_targets(&r, &c, &in, R);
    const act *logits = upload_act(&r, in.t, R * c.V);
    for (int i = 0; i < 2; i++) { whole[i] = floats(&r, R * c.D); part[i] = floats(&r, R * c.D); }
    r.op->sample_targets(r.be, &s, logits, R, c.V, c.Vv);
    take_draws(&r, &s, R, whole[0], whole[1]);
    for (int n = 1; n < R; n++)
        for (int m = 0; m < n; m++) cr_assert(memcmp(whole[0] + n * c.D, whole[0] + m * c.D, (size_t)c.D * sizeof(float)), "positions %d and %d have the same draws", m, n);
    for (int chunk = 1; chunk <= 7; chunk += 3) {
        omp_set_num_threads(chunk);
        for (int n = 0; n < R; n += chunk) {
            struct sample_targets p = s;
            int rows = R - n < chunk ? R - n : chunk;
            p.first += n;
            r.op->sample_targets(r.be, &p, logits, rows, c.V, c.Vv);            /* the same logits everywhere */
            take_draws(&r, &p, rows, part[0] + n * c.D, part[1] + n * c.D);
        }
        cr_assert(!memcmp(whole[0], part[0], (size_t)(R * c.D) * sizeof(float)) && !memcmp(whole[1], part[1], (size_t)(R * c.D) * sizeof(float)), "chunks of %d", chunk);
    }
    s.seed++;
    r.op->sample_targets(r.be, &s, logits, 1, c.V, c.Vv);
    take_draws(&r, &s, 1, part[0], part[1]);
    cr_assert(memcmp(whole[0], part[0], (size_t)c.D * sizeof(float)), "the seed changes nothing");
    rig_close(&r);
}

static const struct case_list list = {"sample_targets", cases, COUNT(cases), sizeof *cases, run, name};
Test(gpu, fp32) { ops_compare(&list, "fp32"); }
Test(gpu, bf16) { ops_compare(&list, "bf16"); }

static const struct case_list true_list = {"sample_targets", true_cases, COUNT(true_cases), sizeof *true_cases, run, name};
Test(gpu, true_sizes_fp32) { ops_compare(&true_list, "fp32"); }
Test(gpu, true_sizes_bf16) { ops_compare(&true_list, "bf16"); }
