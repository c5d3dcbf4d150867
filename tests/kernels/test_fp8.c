/* fp8: rounding of rows, alone and in the ops that write them, weights in both layouts, products of what was rounded, and the census.
 * The definition has its own list of e4m3's numbers, made from sign, exponent and mantissa, and rounds by searching it; products are the double triple loop over the numbers that the
 * bytes and scales stand for. Bytes, scales and counts of a device are the CPU's to the bit; products are sums of the same terms in another order. */
#include "tests/kernels/ops.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "base/rng.h"

/* ---- the definition ---- */

static double magnitude(int code) { return code < 8 ? ldexp(code, -9) : ldexp(8 + code % 8, code / 8 - 10); }     /* 0 .. 0x7e */
static double number(uint8_t q) { return (q & 0x7f) == 0x7f ? NAN : (q & 0x80 ? -1 : 1) * magnitude(q & 0x7f); }

static uint8_t nearest(double x)
{
    int low = 0;                        /* the largest that is not above */
    for (int step = 64; step; step /= 2) if (low + step <= 0x7e && magnitude(low + step) <= fabs(x)) low += step;
    double below = fabs(x) - magnitude(low), above = low < 0x7e ? magnitude(low + 1) - fabs(x) : INFINITY;
    int code = below < above || (below == above && low % 2 == 0) ? low : low + 1;
    return (uint8_t)(code | (signbit(x) ? 0x80 : 0));
}

/* the least power of two from 2^-62 up that brings `most` to 448 or below */
static double scale_of(double most)
{
    if (!isfinite(most)) return most;
    int e = -62;
    while (ldexp(448, e) < most) e++;
    return ldexp(1, e);
}

static double largest_of(const double *x, int64_t n, int64_t stride)
{
    double most = 0;
    for (int64_t i = 0; i < n; i++) most = isnan(x[i * stride]) || fabs(x[i * stride]) > most ? fabs(x[i * stride]) : most;
    return most;
}

/* ---- the rig's side ---- */

struct host_fp8 { uint8_t *q; float *scale; int64_t R, K; };

static struct fp8 new_fp8(struct rig *r, int64_t R, int64_t K) { return (struct fp8){poison(r, (size_t)(R * K)), poison(r, (size_t)R * sizeof(float))}; }

static struct host_fp8 download_fp8(struct rig *r, const struct fp8 *x, int64_t R, int64_t K)
{
    struct host_fp8 h = {(uint8_t *)floats(r, (R * K + 3) / 4), floats(r, R), R, K};
    r->op->download(r->be, h.q, x->q, (size_t)(R * K));
    r->op->download(r->be, h.scale, x->scale, (size_t)R * sizeof(float));
    return h;
}

static double *numbers_of(const struct host_fp8 *h)
{
    double *x = xmalloc((size_t)(h->R * h->K) * sizeof *x + 1);
    for (int64_t i = 0; i < h->R * h->K; i++) x[i] = number(h->q[i]) * (double)h->scale[i / h->K];
    return x;
}

static void take_bits(struct outputs *out, struct rig *r, const char *name, const float *x, int64_t n)     /* NaN has to be the same NaN */
{
    float *halves = floats(r, 2 * n);
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        halves[2 * i] = (float)(bits >> 16);
        halves[2 * i + 1] = (float)(bits & 0xffff);
    }
    take_host(out, name, EXACT, halves, 2 * n);
}

static void take_fp8(struct outputs *out, struct rig *r, const char *name, const struct fp8 *x, int64_t R, int64_t K)
{
    struct host_fp8 h = download_fp8(r, x, R, K);
    float *bytes = floats(r, R * K);
    for (int64_t i = 0; i < R * K; i++) bytes[i] = h.q[i];
    take_host(out, text("%s bytes", name), EXACT, bytes, R * K);
    take_bits(out, r, text("%s scale", name), h.scale, R);
}

static void take_census(struct outputs *out, struct rig *r, const struct fp8_census *sum)
{
    struct fp8_census host;
    r->op->download(r->be, &host, sum, sizeof host);
    take_host(out, "counts", EXACT, (float[]){(float)host.elements, (float)host.zeros, host.not_finite}, 3);
    take_bits(out, r, "largest", &host.largest, 1);
}

static float rounded(const struct rig *r, float x) { return r->round_inputs ? bf16_to_float(bf16_from_float(x)) : x; }

/* ---- rows ---- */

/* multiples of 16 up to what a thread of a device keeps of a row, one past every such border; the last one in bf16 alone. And any size, on the CPU. */
struct rows_case { int64_t R, K; };
static const struct rows_case rows_cases[] = {{1, 16}, {33, 48}, {64, 272}, {40, 1040}, {24, 2064}, {24, 4112}, {13, 8208}, {13, 20000}, {5, 32768}, {3, 37888}};
static const struct rows_case ragged_rows[] = {{1, 1}, {48, 7}, {37, 33}, {26, 257}};
static const struct rows_case true_rows[] = {{9001, 64}};       /* more than the 8 x 132 blocks that count take in one turn of their loop */

static const char *rows_name(const void *c_) { const struct rows_case *c = c_; return text("R %ld K %ld", (long)c->R, (long)c->K); }

enum { ROW_KINDS = 12 };
static float *rows_input(struct rig *r, const struct rows_case *c)
{
    float *x = acts(r, c->R * c->K, 1, 11);
    for (int64_t n = 0; n < c->R; n++) {
        float *row = x + n * c->K, last = row[c->K - 1];
        int kind = (int)(n % ROW_KINDS), e = (int)((n * 31) % 120) - 60;
        for (int64_t k = 0; k < c->K; k++) switch (kind) {
            case 1: row[k] = ldexpf(row[k], e); break;                                                         /* scales of every size */
            case 2: {                                                                                          /* numbers of the format, and the middles between two */
                int code = (int)(k % 0x7e);
                double v = k % 3 ? (magnitude(code) + magnitude(code + 1)) / 2 : magnitude(code);
                row[k] = (float)ldexp(k % 2 ? -v : v, e);
                break;
            }
            case 3: row[k] = k % 2 ? -0.0f : 0.0f; break;
            case 4: row[k] = k == c->K / 2 ? -6e4f : 0.05f * row[k]; break;                                    /* one outlier, and what it leaves to the rest */
            case 5: row[k] = k % 3 ? FLT_TRUE_MIN : ldexpf(row[k], -64); break;                                /* at the least scale and below */
            case 6: row[k] = ldexpf(row[k], 120); break;
            case 9: row[k] = k ? row[k] : NAN; break;
            case 10: row[k] = k == c->K - 1 ? INFINITY : row[k]; break;
            case 11: row[k] = k % 2 ? -NAN : -INFINITY; break;
            default: break;
        }
        if (kind == 2 || kind == 7) row[c->K - 1] = ldexpf(448, e);                                            /* just fits the scale, */
        if (kind == 8) row[c->K - 1] = nextafterf(448, 500) + (last > 0 ? 0 : 8);                             /* just does not */
        for (int64_t k = 0; k < c->K; k++) row[k] = rounded(r, row[k]);
    }
    return x;
}

static void run_rows(struct rig *r, const void *c_, struct outputs *out)
{
    const struct rows_case *c = c_;
    struct fp8 y = new_fp8(r, c->R, c->K);
    struct fp8_census *sum = poison(r, sizeof *sum);
    r->op->fill_zero(r->be, sum, sizeof *sum);
    act *x = upload_act(r, rows_input(r, c), c->R * c->K);
    r->op->quantize(r->be, &y, x, c->R, c->K);
    for (int i = 0; i < 2; i++) r->op->fp8_count(r->be, sum, &y, c->R, c->K);     /* adds up */
    take_fp8(out, r, "y", &y, c->R, c->K);
    take_census(out, r, sum);
    /* one row, then the others: a matrix may be made some rows at a time, and a row's scale begins anywhere */
    struct fp8 z = new_fp8(r, c->R, c->K), rest = {z.q + c->K, z.scale + 1};
    r->op->quantize(r->be, &z, x, 1, c->K);
    r->op->quantize(r->be, &rest, (act *)((char *)x + (size_t)c->K * dtype_width(r->be->act_dtype)), c->R - 1, c->K);
    take_fp8(out, r, "y in parts", &z, c->R, c->K);
}

static void rows_against_definition(struct rig *r, const struct rows_case *c)
{
    const float *x = rows_input(r, c);
    struct fp8 y = new_fp8(r, c->R, c->K);
    r->op->quantize(r->be, &y, upload_act(r, x, c->R * c->K), c->R, c->K);
    struct host_fp8 got = download_fp8(r, &y, c->R, c->K);
    double zeros = 0, not_finite = 0, largest = 0;
    for (int64_t n = 0; n < c->R; n++) {
        double *row = doubles(x + n * c->K, c->K), scale = scale_of(largest_of(row, c->K, 1));
        if (!isfinite(scale)) {
            cr_assert(!isfinite(got.scale[n]), "%s: row %ld is not finite, its scale is %g", rows_name(c), (long)n, (double)got.scale[n]);
            for (int64_t k = 0; k < c->K; k++) cr_assert(got.q[n * c->K + k] == 0x7f, "%s: row %ld is not finite, byte %ld is %02x", rows_name(c), (long)n, (long)k, got.q[n * c->K + k]);
            not_finite++;
        } else {
            cr_assert((double)got.scale[n] == scale, "%s: scale[%ld] is %g, not %g", rows_name(c), (long)n, (double)got.scale[n], scale);
            for (int64_t k = 0; k < c->K; k++) {
                uint8_t q = got.q[n * c->K + k], want = nearest(row[k] / scale);
                cr_assert(q == want, "%s: (%ld, %ld) %g at scale %g is %02x, not %02x", rows_name(c), (long)n, (long)k, row[k], scale, q, want);
                /* half a unit in the last place, and nothing saturated */
                int code = q & 0x7f, e;
                double unit = code < 16 ? 0x1p-9 : ldexp(1, (frexp(magnitude(code), &e), e) - 4);
                cr_assert(fabs(number(q) - row[k] / scale) <= unit / 2);
                zeros += code == 0;
                largest = fmax(largest, fabs(number(q)) * scale);
            }
        }
        free(row);
    }
    struct fp8_census *sum = poison(r, sizeof *sum), host;
    r->op->fill_zero(r->be, sum, sizeof *sum);
    for (int i = 0; i < 2; i++) r->op->fp8_count(r->be, sum, &y, c->R, c->K);
    r->op->download(r->be, &host, sum, sizeof host);
    cr_assert(host.elements == 2.0 * (double)(c->R * c->K) && host.zeros == 2 * zeros && (double)host.not_finite == 2 * not_finite && (double)host.largest == largest,
              "%s: counted %g elements, %g zeros, %g rows not finite, largest %g", rows_name(c), host.elements, host.zeros, (double)host.not_finite, (double)host.largest);
    rig_reset(r, rows_name(c));
}

Test(cpu, rows)
{
    struct rig r;
    rig_open_cpu(&r);
    for (size_t i = 0; i < COUNT(rows_cases); i++) rows_against_definition(&r, &rows_cases[i]);
    for (size_t i = 0; i < COUNT(ragged_rows); i++) rows_against_definition(&r, &ragged_rows[i]);
    rig_close(&r);
}

/* Weights may come with scales of somebody else's, and with NaN among their bytes. */
static void run_census(struct rig *r, const void *c_, struct outputs *out)
{
    (void)c_;
    enum { R = 20, K = 32 };
    uint8_t q[R * K];
    float scale[R];
    for (int i = 0; i < R * K; i++) q[i] = (uint8_t)(philox4x32(5, 0, (uint64_t)i).v[0] % 0x7f) | (i % 3 ? 0 : 0x80);
    for (int n = 0; n < R; n++) scale[n] = 0.37f * (float)(n + 1);
    q[3 * K + 1] = 0x7f; q[7 * K] = 0xff; q[9 * K + 31] = 0x80; q[9 * K] = 0;
    scale[5] = NAN;
    struct fp8_census *sum = poison(r, sizeof *sum);
    r->op->fill_zero(r->be, sum, sizeof *sum);
    struct fp8 x = {upload(r, q, sizeof q), upload(r, scale, sizeof scale)};
    r->op->fp8_count(r->be, sum, &x, R, K);
    take_census(out, r, sum);
    double zeros = 0, largest = 0;
    for (int n = 0; n < R; n++)
        for (int k = 0; k < K && n != 3 && n != 5 && n != 7; k++) {
            zeros += (q[n * K + k] & 0x7f) == 0;
            largest = fmax(largest, fabs(number(q[n * K + k]) * (double)scale[n]));
        }
    struct fp8_census host;
    r->op->download(r->be, &host, sum, sizeof host);
    cr_expect(host.elements == R * K && host.zeros == zeros && host.not_finite == 3 && (double)host.largest == (double)(float)largest, "%g elements, %g zeros, %g rows not finite, largest %g",
              host.elements, host.zeros, (double)host.not_finite, (double)host.largest);
}

static const char *census_name(const void *c_) { (void)c_; return "published weights"; }

Test(cpu, census)
{
    struct rig r;
    struct outputs out = {0};
    rig_open_cpu(&r);
    run_census(&r, NULL, &out);
    outputs_free(&out);
    rig_close(&r);
}

/* ---- weights ---- */

struct weight_case { int64_t O, C; bool not_finite; };
static const struct weight_case weight_cases[] = {{16, 16, false}, {48, 112, false}, {128, 128, false}, {144, 272, false}, {272, 144, true}, {256, 1040, false}};
static const struct weight_case ragged_weights[] = {{1, 1, false}, {5, 3, false}, {33, 129, false}, {130, 17, true}};

static const char *weight_name(const void *c_) { const struct weight_case *c = c_; return text("O %ld C %ld%s", (long)c->O, (long)c->C, c->not_finite ? " not finite" : ""); }

static struct op_limits limits_of(int64_t N, int64_t C, int64_t O)
{
    return (struct op_limits){.N = N, .C = C, .F = O, .V = O, .chunk_rows = N, .Hq = 1, .Hkv = 1, .D = 8, .backward = true, .fp8 = true};
}

static float *weight_input(struct rig *r, const struct weight_case *c)
{
    float *w = acts(r, c->O * c->C, 0.02f, 21);
    for (int64_t i = 0; i < c->O * c->C; i++) {
        int64_t o = i / c->C, k = i % c->C;
        w[i] = o % 11 == 3 || k % 13 == 5 ? 0 : ldexpf(w[i], (int)(o % 7) - (int)(k % 17));      /* rows and columns of zeros, and of every size */
    }
    if (c->not_finite) w[(c->O / 2) * c->C + c->C / 3] = -INFINITY;
    return w;
}

static void quantize_weight(struct rig *r, const struct weight_case *c, struct fp8 *w8, struct fp8 *t8)
{
    *w8 = new_fp8(r, c->O, c->C);
    *t8 = new_fp8(r, c->C, c->O);
    rig_scratch(r, limits_of(1, c->C, c->O));
    r->op->quantize_weight(r->be, w8, t8, upload_act(r, weight_input(r, c), c->O * c->C), c->O, c->C);
}

static void run_weight(struct rig *r, const void *c_, struct outputs *out)
{
    const struct weight_case *c = c_;
    struct fp8 w8, t8;
    quantize_weight(r, c, &w8, &t8);
    take_fp8(out, r, "w8", &w8, c->O, c->C);
    take_fp8(out, r, "t8", &t8, c->C, c->O);
}

static void weight_against_definition(struct rig *r, const struct weight_case *c)
{
    struct fp8 w8, t8, alone = new_fp8(r, c->O, c->C);
    quantize_weight(r, c, &w8, &t8);
    r->op->quantize(r->be, &alone, upload_act(r, weight_input(r, c), c->O * c->C), c->O, c->C);
    struct host_fp8 w = download_fp8(r, &w8, c->O, c->C), t = download_fp8(r, &t8, c->C, c->O), same = download_fp8(r, &alone, c->O, c->C);
    cr_assert(!memcmp(w.q, same.q, (size_t)(c->O * c->C)) && !memcmp(w.scale, same.scale, (size_t)c->O * sizeof(float)), "%s: w8 is not quantize()'s", weight_name(c));
    double *x = numbers_of(&w);
    for (int64_t k = 0; k < c->C; k++) {
        double scale = scale_of(largest_of(x + k, c->O, c->C));
        if (!isfinite(scale)) {
            cr_assert(!isfinite(t.scale[k]) && c->not_finite);
            for (int64_t o = 0; o < c->O; o++) cr_assert(t.q[k * c->O + o] == 0x7f);
            continue;
        }
        cr_assert(!c->not_finite && (double)t.scale[k] == scale, "%s: scale of column %ld is %g, not %g", weight_name(c), (long)k, (double)t.scale[k], scale);
        for (int64_t o = 0; o < c->O; o++) {
            double v = x[o * c->C + k], got = number(t.q[k * c->O + o]) * scale;
            cr_assert_eq(t.q[k * c->O + o], nearest(v / scale), "%s: (%ld, %ld)", weight_name(c), (long)k, (long)o);
            cr_assert(fabs(v) >= 0x1p-6 * scale ? got == v : fabs(got - v) <= 0x1p-10 * scale, "%s: (%ld, %ld) is %g, was %g", weight_name(c), (long)k, (long)o, got, v);
        }
    }
    free(x);
    rig_reset(r, weight_name(c));
}

Test(cpu, weights)
{
    struct rig r;
    rig_open_cpu(&r);
    for (size_t i = 0; i < COUNT(weight_cases); i++) weight_against_definition(&r, &weight_cases[i]);
    for (size_t i = 0; i < COUNT(ragged_weights); i++) weight_against_definition(&r, &ragged_weights[i]);
    rig_close(&r);
}

/* ---- products ---- */

/* whole: factors are -1, 0 and 1 times powers of two that do not differ much where they are summed over, so that sums are exact in any order, in bf16 too, and a device has to have the
 * CPU's bits */
struct product_case { int64_t N, C, O; bool bias, published, whole; };
static const struct product_case product_cases[] = {
    {1, 16, 16, false, false, true}, {48, 64, 32, false, false, true}, {37, 144, 80, false, false, true}, {64, 48, 272, false, false, true}, {1, 32, 48, true, false, false},
    {16, 16, 16, false, false, false}, {33, 64, 80, true, true, false}, {129, 272, 144, true, false, false}, {200, 512, 384, false, true, false}, {300, 128, 640, true, false, false}};
static const struct product_case ragged_products[] = {{1, 1, 1, true, false, false}, {7, 5, 11, true, true, false}, {33, 63, 65, false, false, false}, {5, 200, 517, true, false, false}};
/* tokens of a pass: their largest scale and the sums over their columns take a block several turns, and the sums have more parts than it has rows of threads. Wider layers are left out: what fast sums lose
 * grows with the width, and no bound is known for it. */
static const struct product_case true_products[] = {{4201, 512, 640, true, false, false}};

static const char *product_name(const void *c_)
{
    const struct product_case *c = c_;
    return text("N %ld C %ld O %ld%s%s%s", (long)c->N, (long)c->C, (long)c->O, c->bias ? " bias" : "", c->published ? " published scales" : "", c->whole ? " whole" : "");
}

/* what the products read, on the device and on the host */
struct factors { struct fp8 x, w, t, dy; struct host_fp8 hx, hw, ht, hdy; float *bias, *dw0, *dbias0; };

enum { LOUDEST = 3501 };                                    /* of long factors, the row of the largest scale: not one of the first that a block's threads look at */
static float *factor(struct rig *r, const struct product_case *c, int64_t rows, int64_t columns, uint64_t seed, int every, int step)
{
    float *x = acts(r, rows * columns, 1, seed);
    for (int64_t i = 0; i < rows * columns; i++) {
        int64_t n = i / columns;
        if (c->whole) x[i] = ldexpf((float)(philox4x32(seed, 1, (uint64_t)i).v[0] % 3) - 1, -(int)(n % 3));
        else x[i] = every && n % every == every - 1 ? 0 : ldexpf(x[i], n == LOUDEST ? 3 : -(int)(n * step % 20));
    }
    return x;
}

static struct factors make_factors(struct rig *r, const struct product_case *c)
{
    struct factors f = {.bias = c->bias ? acts(r, c->O, 1, 33) : NULL, .dw0 = acts(r, c->O * c->C, c->whole ? 0 : 1, 35), .dbias0 = acts(r, c->O, 1, 36)};
    f.x = new_fp8(r, c->N, c->C); f.dy = new_fp8(r, c->N, c->O); f.w = new_fp8(r, c->O, c->C); f.t = new_fp8(r, c->C, c->O);
    rig_scratch(r, limits_of(c->N, c->C, c->O));
    r->op->quantize(r->be, &f.x, upload_act(r, factor(r, c, c->N, c->C, 31, 0, 7), c->N * c->C), c->N, c->C);
    r->op->quantize(r->be, &f.dy, upload_act(r, factor(r, c, c->N, c->O, 34, 5, 3), c->N * c->O), c->N, c->O);        /* rows of zeros: not supervised */
    r->op->quantize_weight(r->be, &f.w, &f.t, upload_act(r, factor(r, c, c->O, c->C, 32, 0, 1), c->O * c->C), c->O, c->C);
    if (c->published) {                                     /* scales of any size */
        float *scale = acts(r, c->O, 0.01f, 37);
        for (int64_t o = 0; o < c->O; o++) scale[o] = fabsf(scale[o]) + 1e-4f;
        r->op->upload(r->be, f.w.scale, scale, (size_t)c->O * sizeof *scale);
    }
    f.hx = download_fp8(r, &f.x, c->N, c->C); f.hdy = download_fp8(r, &f.dy, c->N, c->O); f.hw = download_fp8(r, &f.w, c->O, c->C); f.ht = download_fp8(r, &f.t, c->C, c->O);
    return f;
}

static void products(struct rig *r, const struct product_case *c, const struct factors *f, struct outputs *out)
{
    enum bound sums = c->whole ? EXACT : FP8_SUM;
    act *y = poison_act(r, c->N * c->O), *dx = poison_act(r, c->N * c->C);
    grad *dw = upload_grad(r, f->dw0, c->O * c->C), *dw_alone = upload_grad(r, f->dw0, c->O * c->C), *dbias = upload_grad(r, f->dbias0, c->O);
    r->op->linear_forward_fp8(r->be, y, &f->x, &f->w, upload_act(r, f->bias, c->O), c->N, c->C, c->O);
    r->op->linear_forward_fp8(r->be, dx, &f->dy, &f->t, NULL, c->N, c->O, c->C);
    r->op->linear_backward_weight_fp8(r->be, dw, dbias, &f->dy, &f->x, c->N, c->C, c->O);
    r->op->linear_backward_weight_fp8(r->be, dw_alone, NULL, &f->dy, &f->x, c->N, c->C, c->O);
    take_act(out, r, "y", sums, y, c->N * c->O);
    take_act(out, r, "dx", sums, dx, c->N * c->C);
    take_grad(out, r, "dw", sums, dw, c->O * c->C);
    take_grad(out, r, "dw without dbias", sums, dw_alone, c->O * c->C);
    take_grad(out, r, "dbias", BACKWARD, dbias, c->O);
}

static void run_products(struct rig *r, const void *c_, struct outputs *out)
{
    struct factors f = make_factors(r, c_);
    products(r, c_, &f, out);
}

/* d[n,o] (+)= sum over k of a[n,k] b[o,k] */
static void add_products(double *d, const double *a, const double *b, int64_t N, int64_t K, int64_t O)
{
    for (int64_t n = 0; n < N; n++)
        for (int64_t o = 0; o < O; o++)
            for (int64_t k = 0; k < K; k++) d[n * O + o] += a[n * K + k] * b[o * K + k];
}

static void products_against_definition(struct rig *r, const struct product_case *c)
{
    struct factors f = make_factors(r, c);
    struct outputs out = {0};
    products(r, c, &f, &out);
    double *x = numbers_of(&f.hx), *w = numbers_of(&f.hw), *t = numbers_of(&f.ht), *g = numbers_of(&f.hdy), one = 0;
    double *y = xcalloc((size_t)(c->N * c->O), sizeof *y), *dx = xcalloc((size_t)(c->N * c->C), sizeof *dx), *dw = doubles(f.dw0, c->O * c->C), *dbias = doubles(f.dbias0, c->O);
    if (f.bias) for (int64_t i = 0; i < c->N * c->O; i++) y[i] = f.bias[i % c->O];
    add_products(y, x, w, c->N, c->C, c->O);
    add_products(dx, g, t, c->N, c->O, c->C);
    double *exact = doubles(f.dw0, c->O * c->C), *slack = xcalloc((size_t)(c->O * c->C), sizeof *slack);
    for (int64_t n = 0; n < c->N; n++) one = fmax(one, (double)f.hdy.scale[n] * (double)f.hx.scale[n]);
    for (int64_t n = 0; n < c->N; n++)
        for (int64_t o = 0; o < c->O; o++) {
            double folded = number(nearest(number(f.hdy.q[n * c->O + o]) * ((double)f.hdy.scale[n] * (double)f.hx.scale[n] / one)));
            dbias[o] += g[n * c->O + o];
            for (int64_t k = 0; k < c->C; k++) {
                double other = x[n * c->C + k] / (double)f.hx.scale[n];
                dw[o * c->C + k] += folded * one * other;
                exact[o * c->C + k] += g[n * c->O + o] * x[n * c->C + k];
                slack[o * c->C + k] += 0x1p-10 * one * fabs(other);
            }
        }
    expect_close(&out, "y", y, c->N * c->O, 1e-6, product_name(c));
    expect_close(&out, "dx", dx, c->N * c->C, 1e-6, product_name(c));
    expect_close(&out, "dw", dw, c->O * c->C, 1e-6, product_name(c));
    expect_close(&out, "dw without dbias", dw, c->O * c->C, 1e-6, product_name(c));
    expect_close(&out, "dbias", dbias, c->O, 1e-6, product_name(c));
    /* what the fold loses: half of the least number of the one scale, a term */
    for (int64_t i = 0; i < c->O * c->C; i++) cr_assert(fabs(dw[i] - exact[i]) <= slack[i] * (1 + 1e-9) + 1e-12 * fabs(exact[i]), "%s: dw[%ld]", product_name(c), (long)i);
    free(x); free(w); free(t); free(g); free(y); free(dx); free(dw); free(dbias); free(exact); free(slack);
    outputs_free(&out);
    rig_reset(r, product_name(c));
}

static void all_products(bool exact_rows)
{
    struct rig r;
    rig_open_cpu(&r);
    r.be->exact_rows = exact_rows;
    for (size_t i = 0; i < COUNT(product_cases); i++) products_against_definition(&r, &product_cases[i]);
    for (size_t i = 0; i < COUNT(ragged_products); i++) products_against_definition(&r, &ragged_products[i]);
    rig_close(&r);
}

Test(cpu, products) { all_products(false); }
Test(cpu, products_exact_rows) { all_products(true); }

/* One number that is not finite: in a row of x, it reaches that row of y and all of dw; of dy, that row of dx, all of dw and dbias; of w, that column of y, all of dx. */
static void not_finite(struct rig *r)
{
    enum { N = 40, C = 64, O = 48, ROW = 13 };
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int where = 0; where < 3; where++)
        for (size_t b = 0; b < COUNT(bad); b++) {
            float *x = acts(r, N * C, 1, 41), *dy = acts(r, N * O, 1, 42), *w = acts(r, O * C, 1, 43), *zeros = acts(r, O * C, 0, 44);
            (where == 0 ? x + ROW * C : where == 1 ? dy + ROW * O : w + ROW * C)[7] = bad[b];
            struct fp8 x8 = new_fp8(r, N, C), dy8 = new_fp8(r, N, O), w8 = new_fp8(r, O, C), t8 = new_fp8(r, C, O);
            act *y = poison_act(r, N * O), *dx = poison_act(r, N * C);
            grad *dw = upload_grad(r, zeros, O * C), *dbias = upload_grad(r, zeros, O);
            rig_scratch(r, limits_of(N, C, O));
            r->op->quantize(r->be, &x8, upload_act(r, x, N * C), N, C);
            r->op->quantize(r->be, &dy8, upload_act(r, dy, N * O), N, O);
            r->op->quantize_weight(r->be, &w8, &t8, upload_act(r, w, O * C), O, C);
            r->op->linear_forward_fp8(r->be, y, &x8, &w8, NULL, N, C, O);
            r->op->linear_forward_fp8(r->be, dx, &dy8, &t8, NULL, N, O, C);
            r->op->linear_backward_weight_fp8(r->be, dw, dbias, &dy8, &x8, N, C, O);
            struct outputs out = {0};
            take_act(&out, r, "y", EXACT, y, N * O);
            take_act(&out, r, "dx", EXACT, dx, N * C);
            take_grad(&out, r, "dw", EXACT, dw, O * C);
            take_grad(&out, r, "dbias", EXACT, dbias, O);
            for (int i = 0; i < N * O; i++) cr_assert((isfinite(output(&out, "y")->x[i]) != 0) == !(where == 0 ? i / O == ROW : where == 2 && i % O == ROW), "%d: y[%d]", where, i);
            for (int i = 0; i < N * C; i++) cr_assert((isfinite(output(&out, "dx")->x[i]) != 0) == !(where == 1 ? i / C == ROW : where == 2), "%d: dx[%d]", where, i);
            for (int i = 0; i < O * C; i++) cr_assert((isfinite(output(&out, "dw")->x[i]) != 0) == (where == 2), "%d: dw[%d]", where, i);
            for (int i = 0; i < O; i++) cr_assert((isfinite(output(&out, "dbias")->x[i]) != 0) == (where != 1), "%d: dbias[%d]", where, i);
            outputs_free(&out);
            rig_reset(r, text("not finite, %d", where));
        }
}

Test(cpu, not_finite)
{
    struct rig r;
    rig_open_cpu(&r);
    not_finite(&r);
    rig_close(&r);
}

/* ---- ops that write what they make rounded: to the bit what the op and quantize() make one after the other, on any device, and as close to the op's definition as two roundings leave it ---- */

struct fused_case { int64_t N, K; bool residual; };         /* K: the norm's width, and swiglu's F */
static const struct fused_case fused_cases[] = {{1, 16, false}, {19, 48, true}, {27, 272, true}, {13, 1040, false}, {11, 2064, true}, {11, 4112, true}, {5, 8208, true}, {11, 18944, false}, {3, 29568, true}};
static const struct fused_case ragged_fused[] = {{1, 1, true}, {35, 7, false}, {41, 33, true}, {27, 257, true}};

static const char *fused_name(const struct fused_case *c) { return text("N %ld K %ld%s", (long)c->N, (long)c->K, c->residual ? " residual" : ""); }

enum { FUSED_KINDS = 9, FUSED_PLAIN = 4 };                  /* rows of the first kinds are compared with the definition too */
static float *fused_input(struct rig *r, int64_t N, int64_t K, uint64_t seed)
{
    float *x = acts(r, N * K, 1, seed);
    for (int64_t i = 0; i < N * K; i++) {
        int64_t n = i / K, k = i % K;
        switch (n % FUSED_KINDS) {
            case 1: x[i] = ldexpf(x[i], (int)(n * 7 % 30) - 20); break;
            case 2: x[i] = k % 2 ? -0.0f : 0; break;
            case 3: x[i] = k == K / 2 ? 400 : 0.1f * x[i]; break;       /* an outlier */
            case 4: x[i] = ldexpf(x[i], 120); break;                      /* squares and products overflow */
            case 5: x[i] = ldexpf(x[i], -110); break;                     /* at the least scale and below */
            case 6: x[i] = k == K - 1 ? NAN : x[i]; break;
            case 7: x[i] = k ? x[i] : INFINITY; break;
            case 8: x[i] = k % 2 ? -INFINITY : -NAN; break;
            default: break;
        }
        x[i] = rounded(r, x[i]);
    }
    return x;
}

static void same_bytes(struct rig *r, const void *got, const void *want, int64_t bytes, const char *what, const char *name)
{
    char *a = (char *)floats(r, bytes / 4 + 1), *b = (char *)floats(r, bytes / 4 + 1);
    r->op->download(r->be, a, got, (size_t)bytes);
    r->op->download(r->be, b, want, (size_t)bytes);
    for (int64_t i = 0; i < bytes; i++) cr_assert(a[i] == b[i], "%s: byte %ld of %s is %02x, not %02x", what, (long)i, name, a[i] & 0xff, b[i] & 0xff);
}

/* got is quantize() of x */
static void as_quantized(struct rig *r, const struct fp8 *got, const act *x, int64_t R, int64_t K, const char *what, const char *name)
{
    struct fp8 twice = new_fp8(r, R, K);
    r->op->quantize(r->be, &twice, x, R, K);
    same_bytes(r, got->scale, twice.scale, R * (int64_t)sizeof(float), what, text("%s's scales", name));
    same_bytes(r, got->q, twice.q, R * K, what, name);
}

/* The same, and on plain rows within half a unit of `want`, whose own error is `rel` of it and `slack`. */
static void rounded_as(struct rig *r, const struct fp8 *got, const act *x, int64_t R, int64_t K, const double *want, const double *slack, const char *what, const char *name)
{
    double rel = r->be->act_dtype == DTYPE_F32 ? 0x1p-17 : 0x1.02p-8;
    as_quantized(r, got, x, R, K, what, name);
    struct host_fp8 h = download_fp8(r, got, R, K);
    for (int64_t n = 0; n < R; n++) {
        double most = 0, scale = h.scale[n];
        int kind = (int)(n % FUSED_KINDS);
        if (kind >= 6) cr_assert(!isfinite(scale) && h.q[n * K] == 0x7f && h.q[n * K + K - 1] == 0x7f, "%s: row %ld of %s hides what is not finite", what, (long)n, name);
        if (kind >= FUSED_PLAIN) continue;
        for (int64_t k = n * K; k < (n + 1) * K; k++) {
            int code = h.q[k] & 0x7f, e;
            double unit = code < 16 ? 0x1p-9 : ldexp(1, (frexp(magnitude(code), &e), e) - 4), off = fabs(number(h.q[k]) * scale - want[k]);
            cr_assert(off <= unit / 2 * scale + rel * fabs(want[k]) + slack[k], "%s: %s (%ld, %ld) is %g, not %g", what, name, (long)n, (long)(k % K), number(h.q[k]) * scale, want[k]);
            most = fmax(most, fabs(want[k]));
        }
        cr_assert(scale >= scale_of(most * (1 - 2 * rel)) && scale <= scale_of(most * (1 + 2 * rel)), "%s: %s: scale[%ld] is %g for %g", what, name, (long)n, scale, most);
    }
}

static void fused_norm(struct rig *r, const struct fused_case *c)
{
    int64_t N = c->N, C = c->K, n = N * C, bytes = n * (int64_t)dtype_width(r->be->act_dtype);
    float *x = fused_input(r, N, C, 51), *other = c->residual ? fused_input(r, N, C, 52) : NULL, *weights = acts(r, C, 1, 53), eps = 1e-6f;
    act *w = upload_act(r, weights, C), *y = poison_act(r, n), *sum = poison_act(r, n);
    float *rstd = poison_float(r, N);
    rig_scratch(r, limits_of(N, C, C));
    r->op->rmsnorm_forward(r->be, y, rstd, sum, upload_act(r, x, n), upload_act(r, other, n), w, N, C, eps);

    double *want = xcalloc((size_t)n, sizeof *want), *slack = xcalloc((size_t)n, sizeof *slack);
    for (int64_t i = 0; i < N; i++) {
        double squares = 0;
        for (int64_t k = i * C; k < (i + 1) * C; k++) squares += pow(want[k] = rounded(r, x[k] + (other ? other[k] : 0)), 2);
        for (int64_t k = i * C; k < (i + 1) * C; k++) want[k] *= weights[k % C] / sqrt(squares / (double)C + (double)eps);
    }
    for (int place = 0; place < 4; place++) {               /* where s goes: nowhere, a buffer of its own, over x, over r */
        if (place == 3 && !other) continue;
        static const char *const places[] = {"y", "y, s stored", "y, s over x", "y, s over r"};
        struct fp8 y8 = new_fp8(r, N, C);
        act *from = upload_act(r, x, n), *add = upload_act(r, other, n), *to = place == 0 ? NULL : place == 1 ? poison_act(r, n) : place == 2 ? from : add;
        float *scale = poison_float(r, N);
        r->op->rmsnorm_forward_fp8(r->be, &y8, scale, to, from, add, w, N, C, eps);
        rounded_as(r, &y8, y, N, C, want, slack, fused_name(c), places[place]);
        same_bytes(r, scale, rstd, N * (int64_t)sizeof(float), fused_name(c), "rstd");
        if (to) same_bytes(r, to, sum, bytes, fused_name(c), "s");
    }
    free(want); free(slack);
    rig_reset(r, fused_name(c));
}

static void fused_swiglu(struct rig *r, const struct fused_case *c)
{
    int64_t N = c->N, F = c->K, n = N * F, bytes = 2 * n * (int64_t)dtype_width(r->be->act_dtype);
    float *x = fused_input(r, N, 2 * F, 54), *dh = fused_input(r, N, F, 55);
    act *gate_up = upload_act(r, x, 2 * n), *again = upload_act(r, x, 2 * n), *upstream = upload_act(r, dh, n), *h = poison_act(r, n), *d = poison_act(r, 2 * n);
    struct fp8 h8 = new_fp8(r, N, F), d8 = new_fp8(r, N, 2 * F);
    rig_scratch(r, limits_of(N, F, F));
    r->op->swiglu_forward(r->be, h, again, N, F);
    r->op->swiglu_backward(r->be, d, upstream, again, N, F);
    r->op->swiglu_forward_fp8(r->be, &h8, gate_up, N, F);
    r->op->swiglu_backward_fp8(r->be, &d8, upstream, gate_up, N, F);
    same_bytes(r, gate_up, again, bytes, fused_name(c), "gate_up");

    double *want = xcalloc((size_t)n, sizeof *want), *slack = xcalloc((size_t)(2 * n), sizeof *slack), *gradient = xcalloc((size_t)(2 * n), sizeof *gradient);
    for (int64_t i = 0; i < n; i++) {
        int64_t at = i / F * 2 * F + i % F;
        double g = x[at], u = x[at + F], s = 1 / (1 + exp(-g));
        want[i] = g * s * u;
        gradient[at] = dh[i] * u * s * (1 + g * (1 - s));
        gradient[at + F] = dh[i] * g * s;
        slack[at] = 0x1p-19 * fabs(dh[i] * u * s) * (1 + fabs(g));       /* 1 + g (1 - s) may cancel */
    }
    rounded_as(r, &d8, d, N, 2 * F, gradient, slack, fused_name(c), "d_gate_up");
    memset(slack, 0, (size_t)n * sizeof *slack);
    rounded_as(r, &h8, h, N, F, want, slack, fused_name(c), "h");
    free(want); free(slack); free(gradient);
    rig_reset(r, fused_name(c));
}

/* The op itself is test_rmsnorm's: here dx, dw and the rounding of dx have to be its, in the place of dres and of dy, too. */
static void fused_norm_backward(struct rig *r, const struct fused_case *c)
{
    int64_t N = c->N, C = c->K, n = N * C, bytes = n * (int64_t)dtype_width(r->be->act_dtype);
    float *x = acts(r, n, 1, 56), *dy = fused_input(r, N, C, 57), *stream = c->residual ? fused_input(r, N, C, 58) : NULL, *weights = acts(r, C, 1, 59), *scales = floats(r, N), *zero = floats(r, C);
    for (int64_t i = 0; i < N; i++) scales[i] = 0.5f + (float)(i % 7);
    for (int64_t i = 0; i < C; i++) zero[i] = 0;
    float *rstd = upload(r, scales, (size_t)N * sizeof *scales);
    act *from = upload_act(r, x, n), *upstream = upload_act(r, dy, n), *w = upload_act(r, weights, C), *dres = upload_act(r, stream, n), *dx = poison_act(r, n);
    grad *dw = upload_grad(r, zero, C);
    int64_t grads = C * (int64_t)dtype_width(r->be->grad_dtype);
    rig_scratch(r, limits_of(N, C, C));
    r->op->rmsnorm_backward(r->be, dx, dw, dres, upstream, from, w, rstd, N, C);
    for (int place = 0; place < 3; place++) {               /* dx in memory of its own, in dres's, in dy's */
        if (place == 1 && !stream) continue;
        act *other = upload_act(r, stream, n), *again = upload_act(r, dy, n), *to = place == 0 ? poison_act(r, n) : place == 1 ? other : again;
        grad *sum = upload_grad(r, zero, C);
        struct fp8 dx8 = new_fp8(r, N, C);
        r->op->rmsnorm_backward_fp8(r->be, to, &dx8, sum, other, again, from, w, rstd, N, C);
        same_bytes(r, to, dx, bytes, fused_name(c), "dx");
        same_bytes(r, sum, dw, grads, fused_name(c), "dw");
        as_quantized(r, &dx8, dx, N, C, fused_name(c), "dx");
    }
    rig_reset(r, fused_name(c));
}

/* More rows than a device of 132 multiprocessors has blocks, 1024 threads on each, so that a block takes several rows and rounds each with the sum of the next: of one vector a thread, two, four, eight in bf16 */
static const struct fused_case round_and_round[] = {{4301, 16, true}, {1060, 528, false}, {403, 4112, true}};
static const struct fused_case true_round_and_round[] = {{16384, 3584, true}, {1403, 8192, true}, {803, 8208, false}, {803, 16384, true}, {403, 16400, true}};

struct fused_rope { int64_t N; int Hq, Hkv, D; };
static const struct fused_rope fused_ropes[] = {{1, 2, 1, 4}, {19, 2, 1, 8}, {19, 3, 1, 16}, {30, 12, 2, 48}, {19, 28, 4, 128}, {19, 64, 8, 128}, {11, 4, 4, 256}, {10, 128, 64, 128}, {3, 256, 64, 128}};

static void fused_rope(struct rig *r, const struct fused_rope *c)
{
    enum { POSITIONS = 9 };
    int64_t N = c->N, half = c->D / 2, q = (int64_t)c->Hq * c->D, kv = (int64_t)c->Hkv * c->D, width = q + 2 * kv;
    float *turns = acts(r, 2 * POSITIONS * half, 1, 60);
    int32_t *position = (int32_t *)floats(r, N);
    for (int64_t i = 0; i < N; i++) position[i] = (int32_t)(i * 5 % POSITIONS);
    const float *cos = upload(r, turns, (size_t)(POSITIONS * half) * sizeof *turns), *sin = upload(r, turns + POSITIONS * half, (size_t)(POSITIONS * half) * sizeof *turns);
    const int32_t *at = upload(r, position, (size_t)N * sizeof *position);
    act *dq = upload_act(r, fused_input(r, N, q, 61), N * q), *dk = upload_act(r, fused_input(r, N, kv, 62), N * kv), *dv = upload_act(r, fused_input(r, N, kv, 63), N * kv);
    act *fused = poison_act(r, N * width), *room = poison_act(r, N * width);
    struct fp8 d8 = new_fp8(r, N, width);
    rig_scratch(r, limits_of(N, width, width));
    r->op->rope_backward(r->be, fused, dq, dk, dv, cos, sin, at, N, c->Hq, c->Hkv, c->D);
    r->op->rope_backward_fp8(r->be, &d8, room, dq, dk, dv, cos, sin, at, N, c->Hq, c->Hkv, c->D);
    const char *name = text("N %ld heads %d, %d of %d", (long)N, c->Hq, c->Hkv, c->D);
    as_quantized(r, &d8, fused, N, width, name, "dqkv");
    rig_reset(r, name);
}

static void fused(struct rig *r, const struct fused_case *c)
{
    fused_norm(r, c);
    fused_swiglu(r, c);
    fused_norm_backward(r, c);
}

Test(cpu, fused)
{
    struct rig r;
    rig_open_cpu(&r);
    for (size_t i = 0; i < COUNT(fused_cases); i++) fused(&r, &fused_cases[i]);
    for (size_t i = 0; i < COUNT(ragged_fused); i++) fused(&r, &ragged_fused[i]);
    for (size_t i = 0; i < COUNT(fused_ropes); i++) fused_rope(&r, &fused_ropes[i]);
    rig_close(&r);
}

/* ---- the device ---- */

static void compare(const char *precision)
{
    bool bf16 = strcmp(precision, "fp32") != 0;             /* exact too */
    ops_compare(&(struct case_list){"fp8 rows", rows_cases, COUNT(rows_cases) - (bf16 ? 0 : 1), sizeof *rows_cases, run_rows, rows_name}, precision);
    ops_compare(&(struct case_list){"fp8 census", "", 1, 1, run_census, census_name}, precision);
    ops_compare(&(struct case_list){"fp8 weights", weight_cases, COUNT(weight_cases), sizeof *weight_cases, run_weight, weight_name}, precision);
    ops_compare(&(struct case_list){"fp8 products", product_cases, COUNT(product_cases), sizeof *product_cases, run_products, product_name}, precision);
}

Test(gpu, fp32) { compare("fp32"); }
Test(gpu, bf16) { compare("bf16"); }
Test(gpu, exact) { compare("exact"); }

static void compare_true_sizes(const char *precision)
{
    ops_compare(&(struct case_list){"fp8 rows", true_rows, COUNT(true_rows), sizeof *true_rows, run_rows, rows_name}, precision);
    ops_compare(&(struct case_list){"fp8 products", true_products, COUNT(true_products), sizeof *true_products, run_products, product_name}, precision);
}

Test(gpu, true_sizes_fp32) { compare_true_sizes("fp32"); }
Test(gpu, true_sizes_bf16) { compare_true_sizes("bf16"); }
Test(gpu, true_sizes_exact) { compare_true_sizes("exact"); }

static void fused_on(const char *precision)
{
    struct rig r;
    if (!rig_open_gpu(&r, "fp8, ops that round", precision)) cr_skip_test("no device");
    r.round_inputs = r.be->act_dtype == DTYPE_BF16;
    for (size_t i = 0; i < COUNT(fused_cases); i++) if (2 * fused_cases[i].K <= r.be->fp8_widest) fused(&r, &fused_cases[i]);
    for (size_t i = 0; i < COUNT(round_and_round); i++) fused_norm_backward(&r, &round_and_round[i]);
    for (size_t i = 0; i < COUNT(fused_ropes); i++) if ((fused_ropes[i].Hq + 2 * fused_ropes[i].Hkv) * fused_ropes[i].D <= r.be->fp8_widest) fused_rope(&r, &fused_ropes[i]);
    rig_close(&r);
}

Test(gpu, fused_fp32) { fused_on("fp32"); }
Test(gpu, fused_bf16) { fused_on("bf16"); }

static void fused_true_sizes_on(const char *precision)
{
    struct rig r;
    if (!rig_open_gpu(&r, "fp8, ops that round, true sizes", precision)) cr_skip_test("no device");
    r.round_inputs = r.be->act_dtype == DTYPE_BF16;
    for (size_t i = 0; i < COUNT(true_round_and_round); i++) if (2 * true_round_and_round[i].K <= r.be->fp8_widest) fused_norm_backward(&r, &true_round_and_round[i]);
    rig_close(&r);
}

Test(gpu, true_sizes_fused_fp32) { fused_true_sizes_on("fp32"); }
Test(gpu, true_sizes_fused_bf16) { fused_true_sizes_on("bf16"); }

Test(gpu, not_finite)
{
    struct rig r;
    if (!rig_open_gpu(&r, "fp8 not finite", "bf16")) cr_skip_test("no device");
    not_finite(&r);
    rig_close(&r);
}
