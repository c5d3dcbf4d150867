/* distill_loss: every divergence on full targets, every tail policy on truncated ones, mixed with cross entropy, from T = 0.1 to 20.
 * The definition evaluates the loss of one row in long double, logs kept as logs; gradients are its central differences.
 *
 * The rows of a case are situations: ordinary ones and the extremes where p or q lies within 1e-30 of 0 or 1. Each row is judged
 * alone, so that a row with a loss of thousands does not hide another. Padding columns hold NaN, infinity and 1e30. */
#include "tests/kernels/ops.h"

#include <math.h>
#include <string.h>

#include "base/rng.h"

enum situation {
    ORDINARY, EQUAL, TEACHER_SURE, STUDENT_SURE, BOTH_SURE, SURE_OF_OTHERS, FAR_APART, UNIFORM,
    NOT_SUPERVISED,         /* label -1: whatever lies there, NaN here, is not looked at */
    TEACHER_CERTAIN,        /* the other p are exactly 0, and so is the tail */
    CLOSE,
    STUDENT_CERTAIN,        /* the other q underflow even in double, and so does 1 - Q where the head holds the student's choice */
    SITUATIONS
};
static const char *const situations[] = {"ordinary", "equal", "teacher sure", "student sure", "both sure", "sure of others", "far apart", "uniform",
                                         "not supervised", "teacher certain", "close", "student certain"};

struct loss_case {
    int64_t V, Vv;
    enum target_kind kind;
    int K;                  /* TARGET_TOPK */
    enum dtype full_dtype;
    bool tempered;          /* the stored full logits are t/T already: full_scale is 1 */
    struct distill_args a;
};

static const char *name(const void *c_)
{
    const struct loss_case *c = c_;
    static const char *const divergence[] = {"forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd"}, *const tail[] = {"unbiased", "bucket", "renormalise", "drop"};
    const char *what = c->kind == TARGET_NONE ? "none" : c->kind == TARGET_FULL ? divergence[c->a.divergence] : tail[c->a.tail];
    return text("%s V %ld Vv %ld K %d dtype %d T %g beta %g alpha %g kd %g ce %g", what, (long)c->V, (long)c->Vv, c->K, (int)c->full_dtype, (double)c->a.temperature,
                (double)c->a.beta, (double)c->a.alpha, (double)c->a.kd_weight, (double)c->a.ce_weight);
}

static struct loss_case cases[128];
static size_t n_cases;

static struct loss_case *add(enum target_kind kind, int64_t V, int64_t Vv, float T)
{
    cr_assert(n_cases < COUNT(cases));
    cases[n_cases] = (struct loss_case){.V = V, .Vv = Vv, .kind = kind, .full_dtype = DTYPE_F32,
                                        .a = {.beta = 0.5f, .alpha = 0.1f, .temperature = T, .kd_weight = 1, .gradient_scale = 1.0f / 37}};
    return &cases[n_cases++];
}

static void build_cases(void)
{
    static const float T[] = {1, 0.1f, 0.3f, 3, 20}, mix[] = {0.1f, 0.5f, 0.9f};
    static const enum dtype types[] = {DTYPE_F32, DTYPE_F16, DTYPE_BF16};
    n_cases = 0;
    for (int d = 0; d < DIV_COUNT; d++) {
        for (int i = 0; i < (int)COUNT(T); i++) {
            struct loss_case *c = add(TARGET_FULL, 37, 33, T[i]);
            c->a.divergence = (enum divergence)d;
            c->full_dtype = types[(d + i) % 3];
        }
        add(TARGET_FULL, 1, 1, 2)->a.divergence = (enum divergence)d;
        add(TARGET_FULL, 300, 300, 2)->a.divergence = (enum divergence)d;
        struct loss_case *c = add(TARGET_FULL, 1030, 1027, 1);
        c->a.divergence = (enum divergence)d;
        c->a.kd_weight = 0.7f;
        c->a.ce_weight = 0.4f;
    }
    for (int i = 0; i < (int)COUNT(mix); i++) {
        struct loss_case *c = add(TARGET_FULL, 35, 35, 3);
        c->a.divergence = DIV_JSD;
        c->a.beta = mix[i];
        c = add(TARGET_FULL, 35, 35, 3);
        c->a.divergence = DIV_SKEW_KL;
        c->a.alpha = mix[i];
    }
    for (int i = 0; i < 2; i++) {                       /* no teacher in the mixture: forward KL; hardly any */
        struct loss_case *c = add(TARGET_FULL, 35, 35, 2);
        c->a.divergence = DIV_SKEW_KL;
        c->a.alpha = i ? 1e-20f : 0;
    }
    add(TARGET_FULL, 40, 37, 3)->tempered = true;
    cases[n_cases - 1].full_dtype = DTYPE_F16;
    for (int tail = TAIL_BUCKET; tail < TAIL_COUNT; tail++) {
        for (int i = 0; i < (int)COUNT(T); i++) {
            struct loss_case *c = add(TARGET_TOPK, 37, 33, T[i]);
            c->K = 8;
            c->a.tail = (enum tail_policy)tail;
        }
        static const struct { int64_t V, Vv; int K; } sizes[] = {{20, 19, 1}, {1, 1, 1}, {24, 21, 21}, {24, 21, 20}, {300, 300, 16}, {1030, 1027, 64}};
        for (int i = 0; i < (int)COUNT(sizes); i++) {
            struct loss_case *c = add(TARGET_TOPK, sizes[i].V, sizes[i].Vv, i % 2 ? 1 : 3);
            c->K = sizes[i].K;
            c->a.tail = (enum tail_policy)tail;
            if (i == 4) c->a.kd_weight = 0.5f, c->a.ce_weight = 0.5f;
        }
    }
    struct loss_case *c = add(TARGET_NONE, 37, 33, 3);
    c->a.ce_weight = 1;
    c = add(TARGET_FULL, 37, 33, 3);                    /* the KD part is reported, and nothing else */
    c->a.kd_weight = 0;
    c->a.ce_weight = 0.25f;
    c->full_dtype = DTYPE_BF16;
}

struct inputs {
    float *z, *t, *head_logprob, *tail_logmass;         /* z (rows, V), t (rows, Vv): what is stored, times full_scale = t/T */
    int32_t *labels, *head_ids;
    float full_scale;
};

static float to_bf16(float x) { return bf16_to_float(bf16_from_float(x)); }

/* log p of a row of stored logits */
static void log_softmax(long double *out, const float *x, int64_t n, long double scale)
{
    long double top = -INFINITY, sum = 0;
    for (int64_t j = 0; j < n; j++) if (x[j] * scale > top) top = x[j] * scale;
    for (int64_t j = 0; j < n; j++) sum += expl(x[j] * scale - top);
    for (int64_t j = 0; j < n; j++) out[j] = x[j] * scale - top - logl(sum);
}

static struct inputs make_inputs(struct rig *r, const struct loss_case *c)
{
    int64_t rows = SITUATIONS, V = c->V, Vv = c->Vv;
    int K = c->K;
    float T = c->a.temperature, scale = T < 1 ? T * 2 : 2;      /* keeps the tempered distributions ordinary where T is small */
    struct inputs in = {.z = acts(r, rows * V, scale, 1), .t = acts(r, rows * Vv, scale, 2), .head_logprob = floats(r, rows * K), .tail_logmass = floats(r, rows),
                        .labels = (int32_t *)floats(r, rows), .head_ids = (int32_t *)floats(r, rows * K), .full_scale = c->tempered ? 1 : 1 / T};
    long double *log_p = xmalloc((size_t)Vv * sizeof *log_p);
    for (int64_t n = 0; n < rows; n++) {
        float *z = in.z + n * V, *t = in.t + n * Vv;
        int64_t best = (5 * n + 3) % Vv, other = (best + 1) % Vv;
        /* bf16 values are exact in every storage type, so that equal logits stay equal */
        for (int64_t j = 0; j < Vv; j++) t[j] = to_bf16(t[j] + z[j]);
        if (n == TEACHER_SURE || n == BOTH_SURE || n == SURE_OF_OTHERS) for (int64_t j = 0; j < Vv; j++) if (j != best) t[j] = to_bf16(t[j] - 75 * T);
        if (n == STUDENT_SURE || n == BOTH_SURE) for (int64_t j = 0; j < Vv; j++) if (j != best) z[j] -= 80 * T;
        if (n == SURE_OF_OTHERS) for (int64_t j = 0; j < Vv; j++) if (j != other) z[j] -= 80 * T;
        if (n == STUDENT_CERTAIN) for (int64_t j = 0; j < Vv; j++) { z[j] = (j == best ? 0 : -2000 * T) + z[j]; t[j] = to_bf16(j == best ? 4 * T : t[j]); }
        if (n == FAR_APART) for (int64_t j = 0; j < Vv; j++) { t[j] = to_bf16(t[j] * 60 / scale); z[j] *= 60 / scale; }
        if (n == UNIFORM) for (int64_t j = 0; j < Vv; j++) z[j] = t[j] = 0;
        if (n == TEACHER_CERTAIN) for (int64_t j = 0; j < Vv; j++) t[j] = j == best ? 0 : -8192 * (T < 4 ? 1 : 4);
        if (c->tempered) for (int64_t j = 0; j < Vv; j++) t[j] = to_bf16(t[j] / T);
        if (n == EQUAL) for (int64_t j = 0; j < Vv; j++) z[j] = t[j] * (c->tempered ? T : 1);
        if (n == CLOSE) for (int64_t j = 0; j < Vv; j++) z[j] = (c->tempered ? T : 1) * t[j] + 1e-2f * T * z[j] / scale;
        in.labels[n] = n == NOT_SUPERVISED ? -1 : (int32_t)((n % 3 ? best : other));
        if (r->round_inputs) for (int64_t j = 0; j < Vv; j++) z[j] = to_bf16(z[j]);
        for (int64_t j = 0; j < Vv; j++) if (n == NOT_SUPERVISED) z[j] = t[j] = NAN;

        log_softmax(log_p, t, Vv, in.full_scale);
        long double tail = 0;
        for (int k = 0; k < K; k++) {                           /* the K largest: the row is short, so plainly */
            int64_t top = -1;
            for (int64_t j = 0; j < Vv; j++) {
                bool taken = false;
                for (int i = 0; i < k; i++) taken |= in.head_ids[n * K + i] == j;
                if (!taken && (top < 0 || log_p[j] > log_p[top])) top = j;
            }
            in.head_ids[n * K + k] = (int32_t)top;
            in.head_logprob[n * K + k] = n == TEACHER_CERTAIN ? (k ? -INFINITY : 0) : (float)log_p[top];
        }
        for (int64_t j = 0; j < Vv; j++) {
            bool taken = false;
            for (int i = 0; i < K; i++) taken |= in.head_ids[n * K + i] == j;
            if (!taken) tail += expl(log_p[j]);
        }
        in.tail_logmass[n] = n == TEACHER_CERTAIN ? -INFINITY : (float)logl(tail);
    }
    free(log_p);
    return in;
}

static float natural_gradient(const struct loss_case *c) { return c->a.gradient_scale * (c->a.kd_weight * c->a.temperature + c->a.ce_weight); }

static void run(struct rig *r, const void *c_, struct outputs *out)
{
    const struct loss_case *c = c_;
    int64_t rows = SITUATIONS, V = c->V, Vv = c->Vv, stride = Vv + 3;
    struct inputs in = make_inputs(r, c);
    rig_scratch(r, (struct op_limits){.N = rows, .C = 8, .V = V, .chunk_rows = rows, .Hq = 1, .Hkv = 1, .D = 8, .K = c->K});
    struct distill_targets t = {.labels = upload(r, in.labels, (size_t)rows * sizeof *in.labels), .kind = c->kind};
    if (c->kind == TARGET_TOPK) {
        t.K = c->K;
        t.head_ids = upload(r, in.head_ids, (size_t)(rows * c->K) * sizeof *in.head_ids);
        t.head_logprob = upload(r, in.head_logprob, (size_t)(rows * c->K) * sizeof *in.head_logprob);
        t.tail_logmass = upload(r, in.tail_logmass, (size_t)rows * sizeof *in.tail_logmass);
    }
    if (c->kind == TARGET_FULL) {                               /* rows further apart than they are long, NaN between them */
        float *full = floats(r, rows * stride);
        fill_nan(full, rows * stride);
        for (int64_t n = 0; n < rows; n++) memcpy(full + n * stride, in.t + n * Vv, (size_t)Vv * sizeof *full);
        uint16_t *half = (uint16_t *)floats(r, rows * stride);
        for (int64_t i = 0; i < rows * stride; i++) half[i] = c->full_dtype == DTYPE_F16 ? f16_from_float(full[i]) : bf16_from_float(full[i]);
        t.full_dtype = c->full_dtype;
        t.full_stride = stride;
        t.full_scale = in.full_scale;
        t.full = upload(r, c->full_dtype == DTYPE_F32 ? (void *)full : half, (size_t)(rows * stride) * dtype_width(c->full_dtype));
    }
    float *dz[2] = {floats(r, rows * V), floats(r, rows * V)}, *kd[2], *ce[2];
    for (int again = 0; again < 2; again++) {                   /* twice with different padding, which must not matter */
        static const float padding[2][3] = {{NAN, 1e30f, INFINITY}, {-3, 1000, 0}};
        kd[again] = poison_float(r, rows);
        ce[again] = poison_float(r, rows);
        for (int64_t n = 0; n < rows; n++) for (int64_t j = Vv; j < V; j++) in.z[n * V + j] = padding[again][(n + j) % 3];
        act *z = upload_act(r, in.z, rows * V);
        r->op->distill_loss(r->be, z, &(struct distill_losses){.kd = kd[again], .ce = ce[again]}, &t, &c->a, rows, V, Vv);
        r->op->download_act(r->be, dz[again], z, rows * V);
    }
    cr_assert(!memcmp(dz[0], dz[1], (size_t)(rows * V) * sizeof **dz), "%s: padding columns changed the gradient", name(c));
    for (int64_t n = 0; n < rows; n++)
        for (int64_t j = n == NOT_SUPERVISED ? 0 : Vv; j < V; j++) cr_assert(dz[0][n * V + j] == 0, "%s: row %ld, column %ld has gradient %g", name(c), (long)n, (long)j, (double)dz[0][n * V + j]);
    float *losses[4] = {kd[0], kd[1], ce[0], ce[1]}, host[4][SITUATIONS];
    for (int i = 0; i < 4; i++) r->op->download(r->be, host[i], losses[i], sizeof host[i]);
    cr_assert(!memcmp(host[0], host[1], sizeof host[0]) && !memcmp(host[2], host[3], sizeof host[0]), "%s: padding columns changed the loss", name(c));
    cr_assert(host[0][NOT_SUPERVISED] == 0 && host[2][NOT_SUPERVISED] == 0, "%s: an unsupervised row has a loss", name(c));

    for (int64_t n = 0; n < rows; n++) {
        double T = (double)c->a.temperature, top = 0;
        for (int64_t j = 0; j < Vv; j++) top = fmax(top, fabs((double)in.z[n * V + j]) / T);
        take_host(out, text("kd %s", situations[n]), FORWARD, &host[0][n], 1);
        output(out, text("kd %s", situations[n]))->floor = T * T * (1 + top) / 10;      /* fp32 logits of size `top` carry errors of that size */
        take_host(out, text("ce %s", situations[n]), FORWARD, &host[2][n], 1);
        output(out, text("ce %s", situations[n]))->floor = (1 + top * T) / 10;
        take_host(out, text("dz %s", situations[n]), BACKWARD, dz[0] + n * V, V);
        output(out, text("dz %s", situations[n]))->floor = natural_gradient(c) / (10 * sqrt((double)V));   /* a row's norm: a tenth of the usual */
    }
}

struct definition { const struct loss_case *c; const struct inputs *in; int64_t row; double *z; double kd, ce; long double *log_p, *log_q; bool *stored; };

static long double x_log_ratio(long double log_x, long double log_y) { return log_x == -INFINITY ? 0 : expl(log_x) * (log_x - log_y); }
static long double log_add(long double a, long double b) { long double hi = a > b ? a : b, lo = a > b ? b : a; return lo == -INFINITY ? hi : hi + log1pl(expl(lo - hi)); }

static long double truncated(const struct definition *d)
{
    const struct loss_case *c = d->c;
    const int32_t *ids = d->in->head_ids + d->row * c->K;
    const float *log_p = d->in->head_logprob + d->row * c->K;
    long double P = 0, D = 0, rest = 0, top = -INFINITY, log_tail = d->in->tail_logmass[d->row];
    for (int k = 0; k < c->K; k++) P += expl(log_p[k]);
    for (int64_t j = 0; j < c->Vv; j++) if (!d->stored[j] && d->log_q[j] > top) top = d->log_q[j];
    for (int64_t j = 0; j < c->Vv; j++) if (!d->stored[j]) rest += expl(d->log_q[j] - top);
    for (int k = 0; k < c->K; k++) {
        long double l = c->a.tail == TAIL_RENORMALISE ? log_p[k] - logl(P) : (long double)log_p[k];
        D += x_log_ratio(l, d->log_q[ids[k]]);
    }
    return D + (c->a.tail == TAIL_BUCKET && c->K < c->Vv ? x_log_ratio(log_tail, top + logl(rest)) : 0);
}

static long double full(const struct definition *d)
{
    const struct distill_args *a = &d->c->a;
    long double D = 0, w = a->divergence == DIV_JSD ? (long double)a->beta : (long double)a->alpha, log_w = logl(w), log_1w = logl(1 - w);
    for (int64_t j = 0; j < d->c->Vv; j++) {
        long double lp = d->log_p[j], lq = d->log_q[j], lm = a->divergence == DIV_JSD || a->divergence == DIV_SKEW_KL ? log_add(log_w + lp, log_1w + lq) : 0;
        switch (a->divergence) {
        case DIV_FORWARD_KL: D += x_log_ratio(lp, lq); break;
        case DIV_REVERSE_KL: D += x_log_ratio(lq, lp); break;
        case DIV_JSD:        D += w * x_log_ratio(lp, lm) + (1 - w) * x_log_ratio(lq, lm); break;
        case DIV_SKEW_KL:    D += x_log_ratio(lp, lm); break;
        case DIV_TVD:        D += fabsl(expl(lp) - expl(lq)) / 2; break;
        default: cr_assert(false);
        }
    }
    return D;
}

static double loss(void *d_)
{
    struct definition *d = d_;
    const struct distill_args *a = &d->c->a;
    int64_t Vv = d->c->Vv;
    long double top = -INFINITY, sum = 0, sum_T = 0, T = a->temperature, inv_T = 1 / a->temperature, D = 0;   /* 1/T rounded to fp32, as full_scale is */
    for (int64_t j = 0; j < Vv; j++) if (d->z[j] > top) top = d->z[j];
    for (int64_t j = 0; j < Vv; j++) { sum += expl(d->z[j] - top); sum_T += expl((d->z[j] - top) * inv_T); }
    for (int64_t j = 0; j < Vv; j++) d->log_q[j] = (d->z[j] - top) * inv_T - logl(sum_T);
    if (d->c->kind == TARGET_TOPK) D = truncated(d);
    if (d->c->kind == TARGET_FULL) D = full(d);
    d->kd = (double)(T * T * D);
    d->ce = (double)(top + logl(sum) - d->z[d->in->labels[d->row]]);
    return (double)a->gradient_scale * ((double)a->kd_weight * d->kd + (double)a->ce_weight * d->ce);
}

Test(cpu, definition)
{
    struct rig r;
    rig_open_cpu(&r);
    build_cases();
    for (size_t i = 0; i < n_cases; i++) {
        const struct loss_case *c = &cases[i];
        struct outputs out = {0};
        run(&r, c, &out);
        struct inputs in = make_inputs(&r, c);
        struct definition d = {.c = c, .in = &in, .z = xmalloc((size_t)c->V * sizeof(double)), .log_p = xmalloc((size_t)c->Vv * sizeof(long double)),
                               .log_q = xmalloc((size_t)c->Vv * sizeof(long double)), .stored = xcalloc((size_t)c->Vv, sizeof(bool))};
        for (d.row = 0; d.row < SITUATIONS; d.row++) {
            if (d.row == NOT_SUPERVISED) continue;
            const char *what = text("%s: %s", name(c), situations[d.row]), *dz = text("dz %s", situations[d.row]);
            struct output *g = output(&out, dz);
            double T = (double)c->a.temperature, kd, ce;
            for (int64_t j = 0; j < c->V; j++) d.z[j] = j < c->Vv ? (double)in.z[d.row * c->V + j] : 0;
            log_softmax(d.log_p, in.t + d.row * c->Vv, c->Vv, in.full_scale);
            memset(d.stored, 0, (size_t)c->Vv * sizeof *d.stored);
            for (int k = 0; k < c->K; k++) d.stored[in.head_ids[d.row * c->K + k]] = true;
            loss(&d);
            kd = d.kd;
            ce = d.ce;
            expect_floats(output(&out, text("kd %s", situations[d.row]))->x, &kd, 1, T * T, 1e-6, what, "kd");
            expect_floats(output(&out, text("ce %s", situations[d.row]))->x, &ce, 1, 1, 1e-6, what, "ce");
            bool same = c->kind == TARGET_FULL && (d.row == EQUAL || d.row == UNIFORM);
            if (same && !c->tempered) cr_assert(fabs(kd) < 1e-12 && fabs(output(&out, text("kd %s", situations[d.row]))->x[0]) <= 2e-7 * T * T, "%s: teacher == student, kd %g", what,
                                                (double)output(&out, text("kd %s", situations[d.row]))->x[0]);
            if (same && c->a.ce_weight == 0)
                for (int64_t j = 0; j < c->V; j++) cr_assert(fabsf(g->x[j]) <= 2e-7f * natural_gradient(c), "%s: teacher == student, gradient %g", what, (double)g->x[j]);
            if (same && c->a.divergence == DIV_TVD) continue;   /* |p - q| has no derivative there */
            /* q - p in fp32, where the two differ by a percent, is as good as the row's usual gradient needs it */
            bool forward = c->kind == TARGET_FULL && (c->a.divergence == DIV_FORWARD_KL || (c->a.divergence == DIV_SKEW_KL && c->a.alpha == 0));
            if (!forward || d.row != CLOSE) g->floor /= 10;
            bool kinks = c->kind == TARGET_FULL && c->a.divergence == DIV_TVD;      /* small steps: few |p_j - q_j| change their sign */
            expect_gradient(&out, dz, d.z, c->V, loss, &d, (kinks ? 1e-6 : 2e-3) * fmin(T, 1), 200, 1e-6, what);
        }
        free(d.z); free(d.log_p); free(d.log_q); free(d.stored);
        outputs_free(&out);
        rig_reset(&r, name(c));
    }
    rig_close(&r);
}

static void compare(const char *precision)
{
    build_cases();
    struct case_list list = {"distill_loss", cases, n_cases, sizeof *cases, run, name};
    ops_compare(&list, precision);
}

Test(gpu, fp32) { compare("fp32"); }
Test(gpu, bf16) { compare("bf16"); }
