/* distill_loss: every divergence, alone and mixed, on full and on truncated targets under every tail policy that has a meaning, samples, with
 * cross entropy beside it, from T = 0.1 to 20. The definition evaluates the loss of one row in long double, logs kept as logs, over all ids
 * (bucket: over the stored ones and one for the rest); gradients are its central differences.
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
    int K;                  /* TARGET_TOPK, TARGET_SAMPLES */
    enum dtype full_dtype;
    bool tempered;          /* the stored full logits are t/T already: full_scale is 1 */
    int64_t full_stride;    /* of the stored full logits; 0: Vv + 3 */
    struct distill_args a;
};

static const char *name(const void *c_)
{
    const struct loss_case *c = c_;
    static const char *const divergence[] = {"forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd", "mix"}, *const tail[] = {"unbiased", "bucket", "renormalise", "drop"};
    static const char *const kind[] = {"none", "topk", "samples", "full"};
    return text("%s %s of %s V %ld Vv %ld K %d dtype %d T %g beta %g alpha %g floor %g mix %g %g %g %g %g kd %g ce %g", tail[c->a.tail], divergence[c->a.divergence], kind[c->kind], (long)c->V,
                (long)c->Vv, c->K, (int)c->full_dtype, (double)c->a.temperature, (double)c->a.beta, (double)c->a.alpha, (double)c->a.floor, (double)c->a.mix[0], (double)c->a.mix[1],
                (double)c->a.mix[2], (double)c->a.mix[3], (double)c->a.mix[4], (double)c->a.kd_weight, (double)c->a.ce_weight);
}

static double weight_of(const struct distill_args *a, enum divergence d) { return a->divergence == DIV_MIX ? (double)a->mix[d] : a->divergence == d; }

static struct loss_case cases[512];
static size_t n_cases;

static struct loss_case *add(enum target_kind kind, int64_t V, int64_t Vv, float T)
{
    cr_assert(n_cases < COUNT(cases));
    cases[n_cases] = (struct loss_case){.V = V, .Vv = Vv, .kind = kind, .full_dtype = DTYPE_F32,
                                        .a = {.beta = 0.5f, .alpha = 0.1f, .temperature = T, .kd_weight = 1, .gradient_scale = 1.0f / 37}};
    return &cases[n_cases++];
}

static const float mixes[][DIV_COUNT] = {{0.7f, 0.3f, 0, 0, 0}, {0.3f, 0.1f, 0.25f, 0.15f, 0.2f}, {0, 0, 0.5f, 1.5f, 0}, {2, 0, 0, 0, 0}};

static void set_mix(struct loss_case *c, int i)
{
    c->a.divergence = DIV_MIX;
    memcpy(c->a.mix, mixes[i], sizeof c->a.mix);
}

/* Everything but plain forward KL: what has a meaning under this policy. */
static void add_truncated(enum tail_policy tail)
{
    static const float T[] = {1, 0.1f, 0.3f, 3, 20};
    static const struct { int64_t V, Vv; int K; } sizes[] = {{20, 19, 1}, {1, 1, 1}, {24, 21, 21}, {24, 21, 20}, {300, 300, 16}, {1030, 1027, 64}};
    for (int d = DIV_REVERSE_KL; d < DIV_COUNT + (int)COUNT(mixes); d++)
        for (int i = 0; i < (int)(COUNT(T) + COUNT(sizes)); i++) {
            int s = i - (int)COUNT(T);
            if (d > DIV_COUNT + 1 && (i % 3 || s == 5)) continue;        /* the last mixes: some */
            struct loss_case *c = s < 0 ? add(TARGET_TOPK, 37, 33, T[i]) : add(TARGET_TOPK, sizes[s].V, sizes[s].Vv, s % 2 ? 1 : 3);
            c->K = s < 0 ? 8 : sizes[s].K;
            c->a.tail = tail;
            if (d < DIV_COUNT) c->a.divergence = (enum divergence)d;
            else set_mix(c, d - DIV_COUNT);
            if (weight_of(&c->a, DIV_REVERSE_KL) > 0) c->a.floor = tail == TAIL_BUCKET && i % 2 ? 0 : i % 3 ? 1e-4f : 0.3f;
            if (i % 4 == 0) c->a.kd_weight = 0.5f, c->a.ce_weight = 0.75f;
        }
}

static void add_samples(void)
{
    static const float T[] = {1, 0.1f, 0.3f, 3, 20};
    static const struct { int64_t V, Vv; int K; } sizes[] = {{20, 19, 1}, {1, 1, 1}, {24, 21, 21}, {24, 21, 20}, {300, 300, 16}, {1030, 1027, 64}};
    for (int i = 0; i < (int)(COUNT(T) + COUNT(sizes)); i++) {
        int s = i - (int)COUNT(T);
        struct loss_case *c = s < 0 ? add(TARGET_SAMPLES, 37, 33, T[i]) : add(TARGET_SAMPLES, sizes[s].V, sizes[s].Vv, s % 2 ? 1 : 3);
        c->K = s < 0 ? 8 : sizes[s].K;
        if (i % 3 == 0) c->a.kd_weight = 0.5f, c->a.ce_weight = 0.75f;
        if (i == 1) set_mix(c, 3);
    }
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
    for (int m = 0; m < (int)COUNT(mixes); m++)
        for (int i = 0; i < (int)COUNT(T); i++) {
            struct loss_case *c = add(TARGET_FULL, 37, 33, T[i]);
            set_mix(c, m);
            c->full_dtype = types[(m + i) % 3];
            if (i % 2) c->a.floor = i == 1 ? 1e-3f : 0.5f;
            if (i == 2) c->a.kd_weight = 0.5f, c->a.ce_weight = 0.75f;
        }
    for (int i = 0; i < (int)COUNT(T); i++) {
        struct loss_case *c = add(TARGET_FULL, 37, 33, T[i]);
        c->a.divergence = DIV_REVERSE_KL;
        c->a.floor = i % 2 ? 1e-5f : 0.1f;
    }
    add_truncated(TAIL_BUCKET);
    add_truncated(TAIL_RENORMALISE);
    add_samples();
    struct loss_case *c = add(TARGET_NONE, 37, 33, 3);
    c->a.ce_weight = 1;
    c = add(TARGET_FULL, 37, 33, 3);                    /* the KD part is reported, and nothing else */
    c->a.kd_weight = 0;
    c->a.ce_weight = 0.25f;
    c->full_dtype = DTYPE_BF16;
}

/* Rows of a 152k vocabulary, of which a device's loops take many turns forwards and backwards and whose last turn is a broken one: what training runs, at T = 1 and 2; the other divergences' extra
 * looks at a row; heads of more entries than a block has threads, and of more than fit the shared memory that a kernel gets unasked; full logits as a dump stores them, rows that begin anywhere, and as
 * a teacher beside the student leaves them, whole vectors; a vocabulary that is no multiple of a vector. */
static void build_true_cases(void)
{
    enum { V = 152064, VV = 151665 };
    static const struct { enum target_kind kind; enum tail_policy tail; int K, mix; enum divergence d; } kinds[] = {
        {TARGET_TOPK, TAIL_BUCKET, 64, -1, DIV_FORWARD_KL},  {TARGET_TOPK, TAIL_RENORMALISE, 64, -1, DIV_FORWARD_KL}, {TARGET_TOPK, TAIL_DROP, 64, -1, DIV_FORWARD_KL},
        {TARGET_SAMPLES, TAIL_UNBIASED, 96, -1, DIV_FORWARD_KL}, {TARGET_FULL, TAIL_UNBIASED, 0, -1, DIV_FORWARD_KL}, {TARGET_FULL, TAIL_UNBIASED, 0, 1, DIV_MIX},
        {TARGET_TOPK, TAIL_BUCKET, 600, 1, DIV_MIX},         {TARGET_TOPK, TAIL_RENORMALISE, 256, -1, DIV_REVERSE_KL}, {TARGET_NONE, TAIL_UNBIASED, 0, -1, DIV_FORWARD_KL},
    };
    n_cases = 0;
    for (int i = 0; i < (int)COUNT(kinds); i++)
        for (int T = 1; T <= 2; T++) {
            if (T == 2 && kinds[i].kind == TARGET_NONE) continue;
            struct loss_case *c = add(kinds[i].kind, V, VV, (float)T);
            c->K = kinds[i].K;
            c->a.tail = kinds[i].tail;
            c->a.divergence = kinds[i].d;
            if (kinds[i].mix >= 0) set_mix(c, kinds[i].mix);
            if (weight_of(&c->a, DIV_REVERSE_KL) > 0) c->a.floor = 1e-4f;
            if (c->kind == TARGET_NONE) c->a.ce_weight = 1;
            else if ((i + T) % 2) c->a.kd_weight = 0.75f, c->a.ce_weight = 0.25f;
            c->full_dtype = T == 1 ? DTYPE_BF16 : DTYPE_F16;
            c->full_stride = T == 1 ? V : VV;
        }
    add(TARGET_TOPK, V, VV, 2)->K = 12000;
    cases[n_cases - 1].a.tail = TAIL_BUCKET;
    add(TARGET_TOPK, VV, VV, 2)->K = 64;
    cases[n_cases - 1].a.tail = TAIL_BUCKET;
    cases[n_cases - 1].a.ce_weight = 0.5f;
}

struct inputs {
    float *z, *t, *head_logprob, *tail_logmass, *weight;   /* z (rows, V), t (rows, Vv): what is stored, times full_scale = t/T */
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

struct entry { long double log_p; int64_t id; };
static int larger_first(const void *a_, const void *b_)
{
    const struct entry *a = a_, *b = b_;
    return a->log_p > b->log_p ? -1 : a->log_p < b->log_p ? 1 : a->id < b->id ? -1 : 1;
}

static bool long_rows(const struct loss_case *c) { return c->Vv > 100000; }

static struct inputs make_inputs(struct rig *r, const struct loss_case *c)
{
    int64_t rows = SITUATIONS, V = c->V, Vv = c->Vv;
    int K = c->K;
    float T = c->a.temperature, scale = long_rows(c) ? 4 : T < 1 ? T * 2 : 2;      /* keeps the tempered distributions ordinary where T is small, and peaked where they are long */
    struct inputs in = {.z = acts(r, rows * V, scale, 1), .t = acts(r, rows * Vv, scale, 2), .head_logprob = floats(r, rows * K), .tail_logmass = floats(r, rows), .weight = floats(r, rows * K),
                        .labels = (int32_t *)floats(r, rows), .head_ids = (int32_t *)floats(r, rows * K), .full_scale = c->tempered ? 1 : 1 / T};
    #pragma omp parallel for schedule(dynamic) if (long_rows(c))
    for (int64_t n = 0; n < rows; n++) {
        float *z = in.z + n * V, *t = in.t + n * Vv;
        long double *log_p = xmalloc((size_t)Vv * sizeof *log_p);
        struct entry *order = xmalloc((size_t)Vv * sizeof *order);
        int64_t best = (5 * n + 3 + (long_rows(c) ? n * (Vv / rows) : 0)) % Vv, other = (best + 1) % Vv;
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
        for (int64_t j = 0; j < Vv; j++) order[j] = (struct entry){log_p[j], j};
        if (K) qsort(order, (size_t)Vv, sizeof *order, larger_first);
        for (int k = 0; k < K; k++) {
            in.head_ids[n * K + k] = (int32_t)order[k].id;
            in.head_logprob[n * K + k] = n == TEACHER_CERTAIN ? (k ? -INFINITY : 0) : (float)order[k].log_p;
        }
        for (int64_t j = Vv - 1; j >= K; j--) tail += expl(order[j].log_p);
        in.tail_logmass[n] = n == TEACHER_CERTAIN ? -INFINITY : (float)logl(tail);
        for (int k = 0; k < K && c->kind == TARGET_SAMPLES; k++) {    /* the last slots of most rows are not used, one in the middle of some is not; none of a row is */
            bool unused = (n % 4 && k >= K - n % 4) || (n % 5 == 2 && k == K / 2) || n == UNIFORM;
            in.weight[n * K + k] = unused ? 0 : expf(in.head_logprob[n * K + k]) * (0.5f + 0.25f * (float)((k + n) % 5));
            if (unused) in.head_ids[n * K + k] = 0;
            if (unused || n == TEACHER_CERTAIN) in.head_logprob[n * K + k] = 0;
        }
        free(log_p);
        free(order);
    }
    return in;
}

/* The teacher rules ids out and the student does not: reverse KL without a floor is infinite. p = q up to the rounding of what is stored: the
 * sign of p - q, which is TVD's derivative, is anything. */
static bool no_gradient(const struct loss_case *c, int64_t n)
{
    if (c->kind == TARGET_TOPK && weight_of(&c->a, DIV_TVD) > 0 && (n == EQUAL || n == UNIFORM)) return true;
    return c->kind == TARGET_TOPK && n == TEACHER_CERTAIN && weight_of(&c->a, DIV_REVERSE_KL) > 0 && c->a.floor == 0 && c->Vv > 1;
}

static float natural_gradient(const struct loss_case *c)
{
    float total = 0;
    for (int d = 0; d < DIV_COUNT; d++) total += (float)weight_of(&c->a, (enum divergence)d);
    return c->a.gradient_scale * (c->a.kd_weight * c->a.temperature * total + c->a.ce_weight);
}

static void run(struct rig *r, const void *c_, struct outputs *out)
{
    const struct loss_case *c = c_;
    int64_t rows = SITUATIONS, V = c->V, Vv = c->Vv, stride = c->full_stride ? c->full_stride : Vv + 3;
    struct inputs in = make_inputs(r, c);
    rig_scratch(r, (struct op_limits){.N = rows, .C = 8, .V = V, .chunk_rows = rows, .Hq = 1, .Hkv = 1, .D = 8, .K = c->K});
    struct distill_targets t = {.labels = upload(r, in.labels, (size_t)rows * sizeof *in.labels), .kind = c->kind};
    if (c->K) {
        t.K = c->K;
        t.head_ids = upload(r, in.head_ids, (size_t)(rows * c->K) * sizeof *in.head_ids);
        t.head_logprob = upload(r, in.head_logprob, (size_t)(rows * c->K) * sizeof *in.head_logprob);
        if (c->kind == TARGET_TOPK) t.tail_logmass = upload(r, in.tail_logmass, (size_t)rows * sizeof *in.tail_logmass);
        else t.weight = upload(r, in.weight, (size_t)(rows * c->K) * sizeof *in.weight);
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
    /* twice with different padding, which must not matter to the bit; a third time with the parts' squared norms */
    enum { TIMES = 3 };
    float *dz[TIMES] = {floats(r, rows * V), floats(r, rows * V), floats(r, rows * V)}, *kd[TIMES], *ce[TIMES], *squares[2] = {poison_float(r, rows), poison_float(r, rows)};
    for (int again = 0; again < TIMES; again++) {
        static const float padding[TIMES][3] = {{NAN, 1e30f, INFINITY}, {-3, 1000, 0}, {INFINITY, NAN, -1e30f}};
        kd[again] = poison_float(r, rows);
        ce[again] = poison_float(r, rows);
        for (int64_t n = 0; n < rows; n++) for (int64_t j = Vv; j < V; j++) in.z[n * V + j] = padding[again][(n + j) % 3];
        act *z = upload_act(r, in.z, rows * V);
        r->op->distill_loss(r->be, z, &(struct distill_losses){kd[again], ce[again], again == 2 ? squares[0] : NULL, again == 2 ? squares[1] : NULL}, &t, &c->a, rows, V, Vv);
        r->op->download_act(r->be, dz[again], z, rows * V);
    }
    cr_assert(!memcmp(dz[0], dz[1], (size_t)(rows * V) * sizeof **dz), "%s: padding columns changed the gradient", name(c));
    for (int64_t n = 0; n < rows; n++)
        for (int64_t j = n == NOT_SUPERVISED ? 0 : Vv; j < V; j++) cr_assert(dz[0][n * V + j] == 0, "%s: row %ld, column %ld has gradient %g", name(c), (long)n, (long)j, (double)dz[0][n * V + j]);
    float *losses[8] = {kd[0], kd[1], ce[0], ce[1], squares[0], squares[1], kd[2], ce[2]}, host[8][SITUATIONS];
    for (int i = 0; i < 8; i++) r->op->download(r->be, host[i], losses[i], sizeof host[i]);
    cr_assert(!memcmp(host[0], host[1], sizeof host[0]) && !memcmp(host[2], host[3], sizeof host[0]), "%s: padding columns changed the loss", name(c));
    cr_assert(!memcmp(host[0], host[6], sizeof host[0]) && !memcmp(host[2], host[7], sizeof host[0]), "%s: measuring changed the loss", name(c));
    for (int i = 0; i < 8; i++) cr_assert(host[i][NOT_SUPERVISED] == 0, "%s: an unsupervised row has a loss or a gradient", name(c));

    for (int64_t n = 0; n < rows; n++) {
        double T = (double)c->a.temperature, top = 0;
        for (int64_t j = 0; j < Vv; j++) top = fmax(top, fabs((double)in.z[n * V + j]) / T);
        take_host(out, text("kd %s", situations[n]), FORWARD, &host[0][n], 1);
        output(out, text("kd %s", situations[n]))->floor = T * T * (1 + top) / 10;      /* fp32 logits of size `top` carry errors of that size */
        take_host(out, text("ce %s", situations[n]), FORWARD, &host[2][n], 1);
        output(out, text("ce %s", situations[n]))->floor = (1 + top * T) / 10;
        if (no_gradient(c, n)) continue;
        cr_assert(relative_l2(dz[2] + n * V, dz[0] + n * V, V) < 2e-3, "%s: %s: measuring changed the gradient", name(c), situations[n]);    /* bf16 may round the other way */
        for (int part = 0; part < 2; part++) {
            const char *what = text("%s_sq %s", part ? "ce" : "kd", situations[n]);
            double usual = part ? (double)c->a.ce_weight : (double)c->a.kd_weight * T;
            take_host(out, what, BACKWARD, &host[4 + part][n], 1);
            output(out, what)->floor = usual * usual / 100;
        }
        take_host(out, text("dz %s", situations[n]), BACKWARD, dz[0] + n * V, V);
        /* a row's norm: a tenth of the usual; of a long row, over which more of the mass is spread, a hundredth */
        output(out, text("dz %s", situations[n]))->floor = natural_gradient(c) / ((long_rows(c) ? 100 : 10) * sqrt((double)V));
    }
}

struct definition { const struct loss_case *c; const struct inputs *in; int64_t row; double *z; double kd, ce; long double *log_p, *log_q; bool *stored; };

static long double x_log_ratio(long double log_x, long double log_y) { return log_x == -INFINITY ? 0 : expl(log_x) * (log_x - log_y); }
static long double log_add(long double a, long double b) { long double hi = a > b ? a : b, lo = a > b ? b : a; return lo == -INFINITY ? hi : hi + log1pl(expl(lo - hi)); }

/* D over n outcomes; log_floor[i]: what the floor adds to outcome i */
static long double divergence(const struct distill_args *a, const long double *log_p, const long double *log_q, const long double *log_floor, int64_t n)
{
    long double D = 0, beta = a->beta, alpha = a->alpha;
    double w[DIV_COUNT];
    for (int d = 0; d < DIV_COUNT; d++) w[d] = weight_of(a, (enum divergence)d);
    for (int64_t j = 0; j < n; j++) {
        long double lp = log_p[j], lq = log_q[j], lm;
        if (w[DIV_FORWARD_KL] > 0) D += w[DIV_FORWARD_KL] * x_log_ratio(lp, lq);
        if (w[DIV_REVERSE_KL] > 0) D += w[DIV_REVERSE_KL] * x_log_ratio(lq, a->floor > 0 ? log_add(logl(1 - (long double)a->floor) + lp, log_floor[j]) : lp);
        if (w[DIV_JSD] > 0) { lm = log_add(logl(beta) + lp, logl(1 - beta) + lq); D += w[DIV_JSD] * (beta * x_log_ratio(lp, lm) + (1 - beta) * x_log_ratio(lq, lm)); }
        if (w[DIV_SKEW_KL] > 0) D += w[DIV_SKEW_KL] * x_log_ratio(lp, log_add(logl(alpha) + lp, logl(1 - alpha) + lq));
        if (w[DIV_TVD] > 0) D += w[DIV_TVD] * fabsl(expl(lp) - expl(lq)) / 2;
    }
    return D;
}

static long double truncated(const struct definition *d)
{
    const struct loss_case *c = d->c;
    const int32_t *ids = d->in->head_ids + d->row * c->K;
    const float *log_p = d->in->head_logprob + d->row * c->K, *weight = d->in->weight + d->row * c->K;
    long double P = 0, D = 0, rest = 0, top = -INFINITY, *lp = xmalloc((size_t)(c->Vv + 1) * 3 * sizeof *lp), *lq = lp + c->Vv + 1, *lf = lq + c->Vv + 1;
    for (int k = 0; k < c->K; k++) P += expl(log_p[k]);
    if (c->kind == TARGET_SAMPLES) {
        for (int k = 0; k < c->K; k++) if (weight[k] > 0) D += weight_of(&c->a, DIV_FORWARD_KL) * weight[k] * (log_p[k] - d->log_q[ids[k]]);
    } else if (c->a.tail == TAIL_DROP) {
        for (int k = 0; k < c->K; k++) D += x_log_ratio(log_p[k], d->log_q[ids[k]]);
    } else if (c->a.tail == TAIL_RENORMALISE) {
        for (int64_t j = 0; j < c->Vv; j++) { lp[j] = -INFINITY; lq[j] = d->log_q[j]; lf[j] = logl(c->a.floor) - logl(c->Vv); }
        for (int k = 0; k < c->K; k++) lp[ids[k]] = log_p[k] - logl(P);
        D = divergence(&c->a, lp, lq, lf, c->Vv);
    } else {
        for (int k = 0; k < c->K; k++) { lp[k] = log_p[k]; lq[k] = d->log_q[ids[k]]; lf[k] = logl(c->a.floor) - logl(c->Vv); }
        for (int64_t j = 0; j < c->Vv; j++) if (!d->stored[j] && d->log_q[j] > top) top = d->log_q[j];
        for (int64_t j = 0; j < c->Vv; j++) if (!d->stored[j]) rest += expl(d->log_q[j] - top);
        lp[c->K] = d->in->tail_logmass[d->row];
        lq[c->K] = top + logl(rest);
        lf[c->K] = logl(c->a.floor) + logl(c->Vv - c->K) - logl(c->Vv);
        D = divergence(&c->a, lp, lq, lf, c->K < c->Vv ? c->K + 1 : c->K);
    }
    free(lp);
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
    if (d->c->K) D = truncated(d);
    if (d->c->kind == TARGET_FULL) {
        long double *log_floor = xmalloc((size_t)Vv * sizeof *log_floor);
        for (int64_t j = 0; j < Vv; j++) log_floor[j] = logl(a->floor) - logl(Vv);
        D = divergence(a, d->log_p, d->log_q, log_floor, Vv);
        free(log_floor);
    }
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
        struct outputs out = {0}, parts[2] = {0};
        run(&r, c, &out);
        for (int part = 0; part < 2; part++) {                  /* the gradient's KD part alone, its CE part alone */
            struct loss_case *alone = memcpy(floats(&r, sizeof *c / sizeof(float) + 1), c, sizeof *c);
            *(part ? &alone->a.kd_weight : &alone->a.ce_weight) = 0;
            run(&r, alone, &parts[part]);
        }
        struct inputs in = make_inputs(&r, c);
        struct definition d = {.c = c, .in = &in, .z = xmalloc((size_t)c->V * sizeof(double)), .log_p = xmalloc((size_t)c->Vv * sizeof(long double)),
                               .log_q = xmalloc((size_t)c->Vv * sizeof(long double)), .stored = xcalloc((size_t)c->Vv, sizeof(bool))};
        for (d.row = 0; d.row < SITUATIONS; d.row++) {
            if (d.row == NOT_SUPERVISED) continue;
            const char *what = text("%s: %s", name(c), situations[d.row]), *dz = text("dz %s", situations[d.row]);
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
            if (no_gradient(c, d.row)) continue;
            struct output *g = output(&out, dz);
            bool same = c->kind == TARGET_FULL && (d.row == EQUAL || d.row == UNIFORM) && c->a.floor == 0, only_forward = true, kinks = weight_of(&c->a, DIV_TVD) > 0;
            for (int i = DIV_REVERSE_KL; i < DIV_COUNT; i++) only_forward &= weight_of(&c->a, (enum divergence)i) == 0 || (i == DIV_SKEW_KL && c->a.alpha == 0);
            for (int i = 0; i < 2; i++) {
                const char *square = text("%s_sq %s", i ? "ce" : "kd", situations[d.row]);
                const struct output *part = output(&parts[i], dz);
                double norm = 0;
                for (int64_t j = 0; j < c->V; j++) norm += (double)part->x[j] * part->x[j];
                norm /= (double)c->a.gradient_scale * (double)c->a.gradient_scale;
                expect_floats(output(&out, square)->x, &norm, 1, output(&out, square)->floor / 100, 1e-5, what, square);
            }
            if (same && !c->tempered) cr_assert(fabs(kd) < 1e-12 && fabs(output(&out, text("kd %s", situations[d.row]))->x[0]) <= 2e-7 * T * T, "%s: teacher == student, kd %g", what,
                                                (double)output(&out, text("kd %s", situations[d.row]))->x[0]);
            if (same && c->a.ce_weight == 0)
                for (int64_t j = 0; j < c->V; j++) cr_assert(fabsf(g->x[j]) <= 2e-7f * natural_gradient(c), "%s: teacher == student, gradient %g", what, (double)g->x[j]);
            if (kinks && (d.row == EQUAL || d.row == UNIFORM)) continue;   /* |p - q| has no derivative there */
            /* q - p in fp32, where the two differ by a percent, is as good as the row's usual gradient needs it */
            if (c->kind != TARGET_FULL || !only_forward || d.row != CLOSE) g->floor /= 10;
            /* small steps where there are kinks, so that few |p_j - q_j| change their sign; there is none where each q is 0 or 1 */
            expect_gradient(&out, dz, d.z, c->V, loss, &d, (kinks && d.row != STUDENT_CERTAIN ? 1e-6 : 2e-3) * fmin(T, 1), c->a.divergence == DIV_MIX ? 100 : 200, 1e-6, what);
        }
        free(d.z); free(d.log_p); free(d.log_q); free(d.stored);
        outputs_free(&out);
        outputs_free(&parts[0]);
        outputs_free(&parts[1]);
        rig_reset(&r, name(c));
    }
    rig_close(&r);
}

static void compare(void (*build)(void), const char *precision)
{
    build();
    struct case_list list = {"distill_loss", cases, n_cases, sizeof *cases, run, name};
    ops_compare(&list, precision);
}

Test(gpu, fp32) { compare(build_cases, "fp32"); }
Test(gpu, bf16) { compare(build_cases, "bf16"); }
Test(gpu, true_sizes_fp32) { compare(build_true_cases, "fp32"); }
Test(gpu, true_sizes_bf16) { compare(build_true_cases, "bf16"); }
