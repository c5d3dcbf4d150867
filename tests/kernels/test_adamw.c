/* adamw: ten steps against the formula in double, with the clip active and not; a norm that is not finite leaves every bit alone;
 * any split into ranges gives the same bits; a master is what is updated, the weights its rounded copy, whatever they were; without one, bf16
 * weights are rounded stochastically and without bias. */
#include "tests/kernels/ops.h"

#include <math.h>
#include <string.h>

struct adamw_case { int64_t count; double lr, weight_decay, clip, eps; float g_scale; bool master; };
static const struct adamw_case cases[] = {
    {1, 1e-2, 0.1, 1, 1e-8, 1, false},      {3, 1e-2, 0, 0, 1e-8, 1, true},           {17, 1e-3, 0.1, 1e9, 1e-8, 1, false},   {1003, 1e-2, 0.1, 1, 1e-8, 1, true},
    {4099, 3e-3, 0.01, 0.5, 1e-6, 1e-3f, false}, {64, 1e-2, 0, 0, 1e-8, 1e-12f, false},    /* gradients below eps */
    {64, 1e-2, 0.1, 1e-4, 1e-8, 1e-4f, false},  /* the 1e-6 beside the norm counts */
    {64, 1e-2, 0.1, 1, 1e-8, 1e6f, false},  {130, 1e-2, 0, 1, 1e-8, 0, false},
};
/* more than the 132 x 16 blocks of an H200 take in one turn of their loop, vectors and, of the part that begins at no multiple of 4, single elements */
static const struct adamw_case true_cases[] = {{9000007, 1e-2, 0.1, 1, 1e-8, 1, false}, {4500003, 1e-2, 0.1, 1, 1e-8, 1, true}};

static const char *name(const void *c_)
{
    const struct adamw_case *c = c_;
    return text("count %ld lr %g decay %g clip %g g scale %g master %d", (long)c->count, c->lr, c->weight_decay, c->clip, (double)c->g_scale, c->master);
}

/* bf16 moments add 2^-9 of noise at every step: few steps keep it below the bound. Millions of elements say enough in two. */
static int steps(const struct rig *r, const struct adamw_case *c) { return c->count > 1000000 ? 2 : r->round_inputs ? 3 : 10; }

static float *gradient(struct rig *r, const struct adamw_case *c, int step) { return acts(r, c->count, c->g_scale, 100 + (uint64_t)step); }

static double sum_squares(const float *g, int64_t n)
{
    double s = 0;
    for (int64_t i = 0; i < n; i++) s += (double)g[i] * g[i];
    return s;
}

static struct adamw_args args(const struct adamw_case *c, int step)
{
    return (struct adamw_args){.lr = c->lr, .beta1 = 0.9, .beta2 = 0.95, .eps = c->eps, .weight_decay = c->weight_decay, .step = step, .clip = c->clip, .seed = 77, .first = 0};
}

struct state { act *w; float *master; moment *m, *v; };
static struct state make_state(struct rig *r, const struct adamw_case *c)
{
    float *w = acts(r, c->count, 1, 1), *zero = floats(r, c->count);
    memset(zero, 0, (size_t)c->count * sizeof *zero);
    bool master = c->master && r->be->moment_dtype == DTYPE_F32;
    return (struct state){upload_act(r, master ? zero : w, c->count), master ? upload(r, w, (size_t)c->count * sizeof *w) : NULL, upload_moment(r, zero, c->count), upload_moment(r, zero, c->count)};
}

/* One update of [first, first + n) */
static void update(struct rig *r, const struct state *s, const grad *g, int64_t first, int64_t n, const double *norm2, struct adamw_args a)
{
    size_t w = (size_t)first * dtype_width(r->be->act_dtype), gw = (size_t)first * dtype_width(r->be->grad_dtype), mw = (size_t)first * dtype_width(r->be->moment_dtype);
    a.first += first;
    r->op->adamw(r->be, (act *)((char *)s->w + w), s->master ? s->master + first : NULL, (const grad *)((const char *)g + gw), (moment *)((char *)s->m + mw),
                 (moment *)((char *)s->v + mw), n, norm2, &a);
}

static void expect_same(struct rig *r, const void *a, const void *b, size_t bytes, const char *what)
{
    char *x = xmalloc(bytes), *y = xmalloc(bytes);
    r->op->download(r->be, x, a, bytes);
    r->op->download(r->be, y, b, bytes);
    cr_assert(!memcmp(x, y, bytes), "%s", what);
    free(x);
    free(y);
}

static void run(struct rig *r, const void *c_, struct outputs *out)
{
    const struct adamw_case *c = c_;
    struct state whole = make_state(r, c), parts = make_state(r, c);
    int64_t n = c->count, cut = n > 2 ? n / 2 - 1 : n;
    rig_scratch(r, (struct op_limits){.N = 1, .C = 8, .V = 1, .Hq = 1, .Hkv = 1, .D = 8});
    for (int step = 1; step <= steps(r, c); step++) {
        float *g = gradient(r, c, step);
        grad *dg = upload_grad(r, g, n);
        double norm2 = sum_squares(g, n), *on_device = upload(r, &norm2, sizeof norm2);
        update(r, &whole, dg, 0, n, on_device, args(c, step));
        update(r, &parts, dg, 0, cut, on_device, args(c, step));
        if (cut < n) update(r, &parts, dg, cut, n - cut, on_device, args(c, step));
    }
    size_t act_bytes = (size_t)n * dtype_width(r->be->act_dtype), moment_bytes = (size_t)n * dtype_width(r->be->moment_dtype);
    expect_same(r, whole.w, parts.w, act_bytes, "the weights of two ranges are not those of one");
    expect_same(r, whole.v, parts.v, moment_bytes, "the moments of two ranges are not those of one");
    if (whole.master) expect_same(r, whole.master, parts.master, (size_t)n * sizeof(float), "the masters of two ranges are not that of one");
    bool noise = r->round_inputs && n < 16;                     /* stochastic rounding of so few elements is no measure */
    if (!noise) take_act(out, r, "w", r->round_inputs ? BACKWARD : FORWARD, whole.w, n);
    if (whole.master) {                                         /* the weights are the rounded master */
        float *w = xmalloc((size_t)n * sizeof *w), *master = xmalloc((size_t)n * sizeof *master);
        r->op->download_act(r->be, w, whole.w, n);
        r->op->download(r->be, master, whole.master, (size_t)n * sizeof *master);
        bool rounded = r->be->act_dtype != DTYPE_F32;
        for (int64_t i = 0; i < n; i++) cr_assert(w[i] == (rounded ? bf16_to_float(bf16_from_float(master[i])) : master[i]), "%s: w[%ld] is %g, its master %.9g", name(c), (long)i, (double)w[i], (double)master[i]);
        free(w);
        free(master);
    }
    if (!noise) take_moment(out, r, "m", BACKWARD, whole.m, n);
    if (!noise) take_moment(out, r, "v", BACKWARD, whole.v, n);

    static const double broken[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        act *w = poison_act(r, n);
        moment *m = poison(r, moment_bytes), *v = poison(r, moment_bytes);
        r->op->copy(r->be, w, whole.w, act_bytes);
        r->op->copy(r->be, m, whole.m, moment_bytes);
        r->op->copy(r->be, v, whole.v, moment_bytes);
        float *master = whole.master ? poison(r, (size_t)n * sizeof *master) : NULL;
        if (master) r->op->copy(r->be, master, whole.master, (size_t)n * sizeof *master);
        struct state before = {w, master, m, v};
        update(r, &before, upload_grad(r, gradient(r, c, 1), n), 0, n, upload(r, &broken[i], sizeof broken[i]), args(c, steps(r, c) + 1));
        expect_same(r, w, whole.w, act_bytes, "a norm that is not finite changed the weights");
        expect_same(r, m, whole.m, moment_bytes, "a norm that is not finite changed m");
        expect_same(r, v, whole.v, moment_bytes, "a norm that is not finite changed v");
        if (master) expect_same(r, master, whole.master, (size_t)n * sizeof *master, "a norm that is not finite changed the master");
    }
}

Test(cpu, definition)
{
    struct rig r;
    rig_open_cpu(&r);
    for (size_t i = 0; i < COUNT(cases); i++) {
        const struct adamw_case *c = &cases[i];
        int64_t n = c->count;
        struct outputs out = {0};
        run(&r, c, &out);
        double *w = doubles(acts(&r, n, 1, 1), n), *m = xcalloc((size_t)n, sizeof *m), *v = xcalloc((size_t)n, sizeof *v);
        for (int t = 1; t <= steps(&r, c); t++) {
            float *g = gradient(&r, c, t);
            double norm = sqrt(sum_squares(g, n)), scale = c->clip > 0 ? fmin(1, c->clip / (norm + 1e-6)) : 1;
            for (int64_t k = 0; k < n; k++) {                   /* torch.optim.AdamW after clip_grad_norm_ */
                double gk = g[k] * scale;
                m[k] = 0.9 * m[k] + 0.1 * gk;
                v[k] = 0.95 * v[k] + 0.05 * gk * gk;
                w[k] *= 1 - c->lr * c->weight_decay;
                w[k] -= c->lr * (m[k] / (1 - pow(0.9, t))) / (sqrt(v[k] / (1 - pow(0.95, t))) + c->eps);
            }
        }
        expect_close(&out, "w", w, n, 1e-6, name(c));
        expect_close(&out, "m", m, n, 1e-6, name(c));
        expect_close(&out, "v", v, n, 1e-6, name(c));
        free(w); free(m); free(v);
        outputs_free(&out);
        rig_reset(&r, name(c));
    }
    rig_close(&r);
}

/* A hundred decays of 1e-8, each far below half a unit of the weight, and updates of the same sign: the sum in front of the rounding keeps both. */
Test(cpu, small_decay_is_not_lost)
{
    struct rig r;
    rig_open_cpu(&r);
    float w = 1000, g = 1, m = 0, v = 0;
    double norm2 = 1, want = 1000;
    for (int t = 1; t <= 100; t++) {
        struct adamw_args a = {.lr = 1e-4, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 3e-4, .step = t};
        r.op->adamw(r.be, (act *)&w, NULL, (grad *)&g, (moment *)&m, (moment *)&v, 1, &norm2, &a);
        want = want * (1 - a.lr * a.weight_decay) - a.lr;       /* the normalised update is 1 */
    }
    cr_assert(fabs(w - want) < 0.3 * (1000 - want), "1000 became %.6f, not %.6f", (double)w, want);
    rig_close(&r);
}

static const struct case_list list = {"adamw", cases, COUNT(cases), sizeof *cases, run, name};
Test(gpu, fp32) { ops_compare(&list, "fp32"); }
Test(gpu, exact) { ops_compare(&list, "exact"); }
Test(gpu, bf16)
{
    ops_compare(&list, "bf16");
    /* updates of a tenth of a unit: each weight moves by a whole unit or not at all, their mean by a tenth */
    enum { N = 1 << 16 };
    struct rig r;
    if (!rig_open_gpu(&r, "adamw", "bf16")) cr_skip_test("no device");
    float *one = floats(&r, N), *zero = floats(&r, N), *w = floats(&r, N);
    for (int i = 0; i < N; i++) { one[i] = 1; zero[i] = 0; }
    double norm2 = N, mean = 0, unit = 0x1p-8, lr = 0.1 * unit;                /* below 1 the unit is 2^-8 ... */
    act *dw = upload_act(&r, one, N);
    struct adamw_args a = {.lr = lr, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .step = 1, .seed = 5};
    r.op->adamw(r.be, dw, NULL, upload_grad(&r, one, N), upload_moment(&r, zero, N), upload_moment(&r, zero, N), N, upload(&r, &norm2, sizeof norm2), &a);
    r.op->download_act(r.be, w, dw, N);
    for (int i = 0; i < N; i++) {
        cr_assert(w[i] == 1 || w[i] == 1 - (float)unit / 2 || w[i] == 1 - (float)unit, "w[%d] is %g", i, (double)w[i]);
        mean += (1 - (double)w[i]) / N;
    }
    cr_assert(fabs(mean / lr - 1) < 0.05, "the mean update is %g of the exact one", mean / lr);   /* 5 sigma is 4 % */
    rig_close(&r);
}

static const struct case_list true_list = {"adamw", true_cases, COUNT(true_cases), sizeof *true_cases, run, name};
Test(gpu, true_sizes_fp32) { ops_compare(&true_list, "fp32"); }
Test(gpu, true_sizes_exact) { ops_compare(&true_list, "exact"); }
Test(gpu, true_sizes_bf16) { ops_compare(&true_list, "bf16"); }
