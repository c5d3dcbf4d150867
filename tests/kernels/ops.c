/* See ops.h. */
#include "tests/kernels/ops.h"

#include <criterion/hooks.h>
#include <math.h>
#include <stdarg.h>
#include <string.h>

#include "base/rng.h"

enum { GUARD = 256, GUARD_BYTE = 0xa5, POISON_BYTE = 0xff };

/* ---- rig ---- */

static bool open_rig(struct rig *r, const char *device, const char *precision)
{
    bool exact = precision && !strcmp(precision, "exact");
    struct backend_options o = {.device = device, .precision = exact ? "bf16" : precision, .recipe = exact ? "exact" : NULL, .threads = 0};
    *r = (struct rig){0};
    if (backend_open(&r->be, &o) != OK) return false;
    r->op = r->be->ops;
    return true;
}

void rig_open_cpu(struct rig *r) { cr_assert(open_rig(r, "cpu", NULL), "%s", fail_message()); }

bool rig_open_gpu(struct rig *r, const char *op, const char *precision)
{
    if (open_rig(r, "cuda", precision)) return true;
    printf("SKIPPED gpu part of %s: %s\n", op, fail_message());
    fflush(stdout);
    return false;
}

static struct allocation *remember(struct rig *r, void *host, void *device, size_t bytes)
{
    r->allocations = xrealloc(r->allocations, (size_t)(r->n + 1) * sizeof *r->allocations);
    r->allocations[r->n] = (struct allocation){host, device, bytes};
    return &r->allocations[r->n++];
}

void rig_reset(struct rig *r, const char *what)
{
    for (int i = 0; i < r->n; i++) {
        struct allocation *a = &r->allocations[i];
        free(a->host);
        if (!a->device) continue;
        unsigned char guard[GUARD];
        r->op->download(r->be, guard, (char *)a->device + a->bytes, GUARD);
        for (int b = 0; b < GUARD; b++) cr_assert(guard[b] == GUARD_BYTE, "%s on %s: byte %d behind a buffer of %zu bytes was overwritten", what, r->be->name, b, a->bytes);
        r->op->release(r->be, a->device);
    }
    r->n = 0;
    r->be->scratch = NULL;
    r->be->scratch_bytes = 0;
}

void rig_close(struct rig *r)
{
    rig_reset(r, "close");
    free(r->allocations);
    backend_close(r->be);
}

void rig_scratch(struct rig *r, struct op_limits limits)
{
    size_t bytes = r->op->scratch_bytes(r->be, &limits);
    r->be->scratch = poison(r, bytes);
    r->be->scratch_bytes = bytes;
}

/* ---- buffers ---- */

float *floats(struct rig *r, int64_t n)
{
    float *x = xmalloc((size_t)n * sizeof *x + 1);
    remember(r, x, NULL, 0);
    return x;
}

float *acts(struct rig *r, int64_t n, float scale, uint64_t seed)
{
    float *x = floats(r, n);
    fill_normal(x, n, scale, seed);
    if (r->round_inputs) {
        #pragma omp parallel for schedule(static) if (n > 1 << 16)
        for (int64_t i = 0; i < n; i++) x[i] = bf16_to_float(bf16_from_float(x[i]));
    }
    return x;
}

void *poison(struct rig *r, size_t bytes)
{
    char *device = r->op->alloc(r->be, bytes + GUARD), *host = xmalloc(bytes + GUARD);
    cr_assert(device, "no room for %zu bytes on %s", bytes, r->be->name);
    cr_assert((uintptr_t)device % 256 == 0, "alloc: %p is not aligned to 256 bytes", (void *)device);
    memset(host, POISON_BYTE, bytes);
    memset(host + bytes, GUARD_BYTE, GUARD);
    r->op->upload(r->be, device, host, bytes + GUARD);
    r->op->sync(r->be);
    free(host);
    return remember(r, NULL, device, bytes)->device;
}

void *upload(struct rig *r, const void *from, size_t bytes)
{
    if (!from) return NULL;
    void *to = poison(r, bytes);
    r->op->upload(r->be, to, from, bytes);
    r->op->sync(r->be);                 /* `from` may go away */
    return to;
}

act *poison_act(struct rig *r, int64_t n) { return poison(r, (size_t)n * dtype_width(r->be->act_dtype)); }

act *upload_act(struct rig *r, const float *from, int64_t n)
{
    if (!from) return NULL;
    act *to = poison_act(r, n);
    r->op->upload_act(r->be, to, from, n);
    return to;
}

/* fp32 or bf16 on the device */
static void *upload_rounded(struct rig *r, const float *from, int64_t n, enum dtype type)
{
    if (!from || type == DTYPE_F32) return upload(r, from, (size_t)n * sizeof *from);
    cr_assert(type == DTYPE_BF16, "dtype %d", (int)type);
    uint16_t *half = xmalloc((size_t)n * sizeof *half + 1);
    for (int64_t i = 0; i < n; i++) half[i] = bf16_from_float(from[i]);
    void *to = upload(r, half, (size_t)n * sizeof *half);
    free(half);
    return to;
}

grad *upload_grad(struct rig *r, const float *from, int64_t n) { return upload_rounded(r, from, n, r->be->grad_dtype); }
moment *upload_moment(struct rig *r, const float *from, int64_t n) { return upload_rounded(r, from, n, r->be->moment_dtype); }

/* ---- outputs ---- */

static float *new_output(struct outputs *out, const char *name, enum bound bound, int64_t n)
{
    cr_assert(out->n < (int)COUNT(out->o), "too many outputs");
    struct output *o = &out->o[out->n++];
    *o = (struct output){.bound = bound, .n = n, .x = new_poisoned(n)};
    snprintf(o->name, sizeof o->name, "%s", name);
    return o->x;
}

void take_host(struct outputs *out, const char *name, enum bound bound, const float *x, int64_t n)
{
    memcpy(new_output(out, name, bound, n), x, (size_t)n * sizeof *x);
}

void take_float(struct outputs *out, struct rig *r, const char *name, enum bound bound, const float *x, int64_t n)
{
    r->op->download(r->be, new_output(out, name, bound, n), x, (size_t)n * sizeof *x);
}

void take_act(struct outputs *out, struct rig *r, const char *name, enum bound bound, const act *x, int64_t n)
{
    r->op->download_act(r->be, new_output(out, name, bound, n), x, n);
}

void take_grad(struct outputs *out, struct rig *r, const char *name, enum bound bound, const grad *x, int64_t n)
{
    r->op->download_grad(r->be, new_output(out, name, bound, n), x, n);
}

void take_moment(struct outputs *out, struct rig *r, const char *name, enum bound bound, const moment *x, int64_t n)
{
    float *to = new_output(out, name, bound, n);
    if (r->be->moment_dtype == DTYPE_F32) { r->op->download(r->be, to, x, (size_t)n * sizeof *to); return; }
    uint16_t *half = xmalloc((size_t)n * sizeof *half + 1);
    r->op->download(r->be, half, x, (size_t)n * sizeof *half);
    for (int64_t i = 0; i < n; i++) to[i] = bf16_to_float(half[i]);
    free(half);
}

struct output *output(struct outputs *out, const char *name)
{
    for (int i = 0; i < out->n; i++) if (!strcmp(out->o[i].name, name)) return &out->o[i];
    CHECK(false, "no output \"%s\"", name);
}

void outputs_free(struct outputs *out)
{
    for (int i = 0; i < out->n; i++) free(out->o[i].x);
    out->n = 0;
}

/* ---- comparisons ---- */

double *doubles(const float *x, int64_t n)
{
    double *d = xmalloc((size_t)n * sizeof *d + 1);
    for (int64_t i = 0; i < n; i++) d[i] = x[i];
    return d;
}

static void report(double error, double bound, const char *what, const char *name)
{
    if (getenv("OPS_VERBOSE")) printf("%-60s %-14s %.2e (bound %.0e)\n", what, name, error, bound);
    cr_expect(error <= bound, "%s: %s is off by %.3g (relative L2), the bound is %.0e", what, name, error, bound);
}

void expect_floats(const float *got, const double *want, int64_t n, double floor, double bound, const char *what, const char *name)
{
    double difference = 0, reference = 0;
    for (int64_t i = 0; i < n; i++) {
        if (isfinite(want[i])) {
            cr_assert(isfinite(got[i]), "%s: %s[%ld] is %g, not %.9g", what, name, (long)i, (double)got[i], want[i]);
            difference += (got[i] - want[i]) * (got[i] - want[i]);
            reference += want[i] * want[i];
        } else cr_assert((double)got[i] == want[i], "%s: %s[%ld] is %g, not %g", what, name, (long)i, (double)got[i], want[i]);
    }
    report(difference == 0 ? 0 : sqrt(difference / fmax(reference, floor * floor * (double)n)), bound, what, name);
}

void expect_close(struct outputs *out, const char *name, const double *want, int64_t n, double bound, const char *what)
{
    const struct output *o = output(out, name);
    cr_assert(o->n == n, "%s: %s has %ld elements, not %ld", what, name, (long)o->n, (long)n);
    expect_floats(o->x, want, n, o->floor, bound, what, name);
}

/* d loss / d s at s = 0 of x + s v, error O(h^4) */
static double slope(double *x, const double *v, int64_t n, double (*loss)(void *), void *context, double h)
{
    static const struct { double step, weight; } point[4] = {{1, 8}, {-1, -8}, {2, -1}, {-2, 1}};
    double *x0 = xmalloc((size_t)n * sizeof *x0), sum = 0;
    memcpy(x0, x, (size_t)n * sizeof *x);
    for (int p = 0; p < 4; p++) {
        for (int64_t i = 0; i < n; i++) x[i] = x0[i] + point[p].step * h * v[i];
        sum += point[p].weight * loss(context);
    }
    memcpy(x, x0, (size_t)n * sizeof *x);
    free(x0);
    return sum / (12 * h);
}

void expect_gradient(struct outputs *out, const char *name, double *x, int64_t n, double (*loss)(void *context), void *context, double h, int64_t budget,
                     double bound, const char *what)
{
    enum { DIRECTIONS = 4 };
    const struct output *o = output(out, name);
    cr_assert(o->n == n, "%s: %s has %ld elements, not %ld", what, name, (long)o->n, (long)n);
    double *v = xmalloc((size_t)n * sizeof *v), norm2 = 0, one = 1;
    if (4 * n <= budget) {
        for (int64_t i = 0; i < n; i++) v[i] = slope(x + i, &one, 1, loss, context, h);
        expect_close(out, name, v, n, bound, what);
    } else {
        for (int64_t i = 0; i < n; i++) {
            cr_assert(isfinite(o->x[i]), "%s: %s[%ld] is %g", what, name, (long)i, (double)o->x[i]);
            norm2 += (double)o->x[i] * o->x[i];
        }
        norm2 = fmax(norm2, o->floor * o->floor * (double)n);
        for (int k = 0; k < DIRECTIONS; k++) {
            double along = 0;
            for (int64_t i = 0; i < n; i++) {
                struct philox r = philox4x32(0x5105e + (uint64_t)k, (uint64_t)n, (uint64_t)i);
                v[i] = normal_float(r.v[0], r.v[1]);
                along += v[i] * o->x[i];
            }
            /* over directions, the slope has the gradient's norm as its standard deviation */
            double off = fabs(along - slope(x, v, n, loss, context, h));
            report(off == 0 ? 0 : off / sqrt(norm2), bound, what, name);
        }
    }
    free(v);
}

void ops_compare(const struct case_list *l, const char *precision)
{
    bool bf16 = strcmp(precision, "fp32");
    struct rig cpu, gpu;
    if (!rig_open_gpu(&gpu, l->op, precision)) cr_skip_test("no device");
    rig_open_cpu(&cpu);
    cpu.round_inputs = gpu.round_inputs = bf16;
    const char *most = getenv("OPS_CASES");
    size_t cases = most && atoi(most) > 0 && (size_t)atoi(most) < l->n ? (size_t)atoi(most) : l->n;
    for (size_t turn = 0; turn < cases; turn++) {
        size_t i = turn * l->n / cases;
        const void *c = (const char *)l->cases + i * l->size;
        char *what = xasprintf("%s %s, case %zu (%s)", l->op, precision, i, l->name(c));      /* a case may use up the ring of text() */
        struct outputs want = {0}, got = {0};
        l->run(&cpu, c, &want);
        l->run(&gpu, c, &got);
        cr_assert(want.n == got.n);
        for (int k = 0; k < want.n; k++) {
            const struct output *w = &want.o[k];
            double *x = doubles(w->x, w->n);
            output(&got, w->name)->floor = w->floor;
            static const double bounds[][2] = {[EXACT] = {0, 0}, [FORWARD] = {1e-5, 5e-3}, [BACKWARD] = {1e-4, 1e-2}, [FP8_SUM] = {2e-3, 5e-3}};
            expect_close(&got, w->name, x, w->n, bounds[w->bound][bf16], what);
            free(x);
        }
        outputs_free(&want);
        outputs_free(&got);
        rig_reset(&cpu, what);
        rig_reset(&gpu, what);
        free(what);
    }
    rig_close(&cpu);
    rig_close(&gpu);
}

const char *text(const char *fmt, ...)
{
    static char ring[8][256];
    static int next;
    char *to = ring[next++ % 8];
    va_list args;
    va_start(args, fmt);
    vsnprintf(to, sizeof ring[0], fmt, args);
    va_end(args);
    return to;
}

/* ---- main: Criterion's, but a run in which every test was skipped exits with 77, which Meson shows as SKIP; and why a test was skipped is
 * printed, which Criterion keeps to itself ---- */

static size_t ran;

ReportHook(POST_ALL)(struct criterion_global_stats *stats) { ran = stats->tests_passed + stats->tests_failed + stats->tests_crashed; }

ReportHook(POST_TEST)(struct criterion_test_stats *stats)
{
    if (stats->test_status == CR_STATUS_SKIPPED && stats->message) printf("%s: %s\n", stats->test->name, stats->message);
}

int main(int argc, char **argv)
{
    struct criterion_test_set *tests = criterion_initialize();
    int rc = 0;
    if (criterion_handle_args(argc, argv, true)) rc = criterion_run_all_tests(tests) ? ran ? 0 : 77 : 1;
    criterion_finalize(tests);
    return rc;
}
