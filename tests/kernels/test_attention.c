/* attention: packed documents, causal, grouped heads, sliding windows; forward, backward, and the cached form of generation.
 * The definition is the formula, one query at a time: o_i = sum_j softmax_j(scale q_i k_j) v_j over the keys that i may see. */
#include "tests/kernels/ops.h"

#include <math.h>
#include <omp.h>
#include <string.h>

struct attention_case { int docs[6], n_docs, Hq, Hkv, D; int64_t window; float q_scale; };
static const struct attention_case cases[] = {
    {{1}, 1, 1, 1, 8, 0, 1},                 {{3, 0, 5}, 3, 2, 1, 8, 0, 1},            {{1, 1, 1, 2}, 4, 3, 3, 16, 0, 1},       {{0, 4, 0, 0}, 4, 4, 2, 8, 2, 1},
    {{1, 63, 64, 65, 129}, 5, 2, 2, 16, 0, 1}, {{129, 65, 64, 63, 1}, 5, 4, 1, 8, 0, 1}, {{65, 64}, 2, 6, 2, 64, 0, 1},          {{129}, 1, 4, 1, 80, 0, 1},
    {{0, 70, 0, 1}, 4, 2, 1, 128, 0, 1},     {{67, 128}, 2, 3, 3, 24, 0, 1},           {{64, 200}, 2, 2, 1, 16, 0, 4},          /* nearly one-hot rows */
    {{130, 5}, 2, 2, 1, 16, 1, 1},           {{130, 5}, 2, 2, 2, 16, 7, 1},            {{130, 129}, 2, 2, 1, 16, 63, 1},        {{200}, 1, 2, 1, 16, 64, 1},
    {{200}, 1, 2, 1, 8, 65, 1},              {{193}, 1, 1, 1, 64, 66, 1},              {{70, 3}, 2, 2, 1, 16, 500, 1},
};
/* what training packs into a row of 4096 tokens, in heads of 128: documents of any length, the last of them ended by the row; one that fills it, under a window */
static const struct attention_case true_cases[] = {{{2300, 1, 37, 700, 0, 1058}, 6, 4, 1, 128, 0, 1}, {{4096}, 1, 4, 1, 128, 1024, 1}};

static const char *name(const void *c_)
{
    const struct attention_case *c = c_;
    return text("%d documents from %d, Hq %d Hkv %d D %d window %ld q scale %g", c->n_docs, c->docs[0], c->Hq, c->Hkv, c->D, (long)c->window, (double)c->q_scale);
}

struct inputs { float *q, *k, *v, *d_o; int32_t begin[8]; int64_t N, nq, nk, max_doc; };
static struct inputs make_inputs(struct rig *r, const struct attention_case *c)
{
    struct inputs in = {0};
    for (int d = 0; d < c->n_docs; d++) {
        in.begin[d + 1] = (int32_t)(in.N += c->docs[d]);
        if (c->docs[d] > in.max_doc) in.max_doc = c->docs[d];
    }
    in.nq = in.N * c->Hq * c->D;
    in.nk = in.N * c->Hkv * c->D;
    in.q = acts(r, in.nq, c->q_scale, 1);
    in.k = acts(r, in.nk, 1, 2);
    in.v = acts(r, in.nk, 1, 3);
    in.d_o = acts(r, in.nq, 1, 4);
    return in;
}

static float score_scale(int D) { return (float)(1 / sqrt(D)); }

static void run(struct rig *r, const void *c_, struct outputs *out)
{
    const struct attention_case *c = c_;
    struct inputs in = make_inputs(r, c);
    act *q = upload_act(r, in.q, in.nq), *k = upload_act(r, in.k, in.nk), *v = upload_act(r, in.v, in.nk), *d_o = upload_act(r, in.d_o, in.nq), *o = poison_act(r, in.nq);
    act *dq = poison_act(r, in.nq), *dk = poison_act(r, in.nk), *dv = poison_act(r, in.nk);
    float *lse = poison_float(r, in.N * c->Hq);
    struct attention_args a = {.doc_begin = upload(r, in.begin, (size_t)(c->n_docs + 1) * sizeof *in.begin), .n_docs = c->n_docs, .max_doc = in.max_doc, .N = in.N,
                               .Hq = c->Hq, .Hkv = c->Hkv, .D = c->D, .scale = score_scale(c->D), .window = c->window};
    /* the largest Hkv is another model's, which has no groups */
    rig_scratch(r, (struct op_limits){.N = in.N, .C = c->Hq * c->D, .V = 1, .max_doc = in.max_doc, .Hq = c->Hq, .Hkv = c->Hq, .D = c->D, .backward = true});
    r->op->attention_forward(r->be, o, lse, q, k, v, &a);
    r->op->attention_backward(r->be, dq, dk, dv, d_o, o, lse, q, k, v, &a);
    take_act(out, r, "o", FORWARD, o, in.nq);
    take_act(out, r, "dq", BACKWARD, dq, in.nq);
    take_act(out, r, "dk", BACKWARD, dk, in.nk);
    take_act(out, r, "dv", BACKWARD, dv, in.nk);
    /* a query that sees one key has no gradient: d_o v - d_o o cancels, and the rounding of terms of size 1 is left */
    if (in.max_doc <= 2 || c->window == 1) output(out, "dq")->floor = output(out, "dk")->floor = 1;
}

/* o of query i (at q) over the keys first..i of rows `stride` apart */
static void attend(double *o, const double *q, const double *k, const double *v, int64_t stride, int64_t first, int64_t i, int D, double scale)
{
    double p[512], top = -INFINITY, sum = 0;
    for (int64_t j = first; j <= i; j++) {
        p[j - first] = 0;
        for (int d = 0; d < D; d++) p[j - first] += q[d] * k[j * stride + d];
        top = fmax(top, p[j - first] *= scale);
    }
    for (int d = 0; d < D; d++) o[d] = 0;
    for (int64_t j = first; j <= i; j++) {
        double e = exp(p[j - first] - top);
        sum += e;
        for (int d = 0; d < D; d++) o[d] += e * v[j * stride + d];
    }
    for (int d = 0; d < D; d++) o[d] /= sum;
}

struct definition { const struct attention_case *c; const struct inputs *in; double *q, *k, *v, *o; };

static double loss(void *d_)
{
    struct definition *d = d_;
    const struct attention_case *c = d->c;
    double total = 0;
    for (int doc = 0; doc < c->n_docs; doc++)
        for (int64_t i = 0; i < c->docs[doc]; i++)
            for (int h = 0; h < c->Hq; h++) {
                int64_t begin = d->in->begin[doc], at = ((begin + i) * c->Hq + h) * c->D, kv = (begin * c->Hkv + h / (c->Hq / c->Hkv)) * c->D;
                attend(d->o + at, d->q + at, d->k + kv, d->v + kv, c->Hkv * c->D, c->window && i >= c->window ? i - c->window + 1 : 0, i, c->D, (double)score_scale(c->D));
                for (int e = 0; e < c->D; e++) total += d->in->d_o[at + e] * d->o[at + e];
            }
    return total;
}

Test(cpu, definition)
{
    struct rig r;
    rig_open_cpu(&r);
    for (size_t i = 0; i < COUNT(cases); i++) {
        const struct attention_case *c = &cases[i];
        struct outputs out = {0};
        run(&r, c, &out);
        struct inputs in = make_inputs(&r, c);
        struct definition d = {c, &in, doubles(in.q, in.nq), doubles(in.k, in.nk), doubles(in.v, in.nk), xmalloc((size_t)in.nq * sizeof(double))};
        loss(&d);
        expect_close(&out, "o", d.o, in.nq, 1e-6, name(c));
        int64_t budget = in.N <= 10 ? 4000 : 0;                     /* every element of the small cases */
        expect_gradient(&out, "dq", d.q, in.nq, loss, &d, 1e-3, budget, 2e-6, name(c));
        expect_gradient(&out, "dk", d.k, in.nk, loss, &d, 1e-3, budget, 2e-6, name(c));
        expect_gradient(&out, "dv", d.v, in.nk, loss, &d, 1e-3, budget, 2e-6, name(c));
        free(d.q); free(d.k); free(d.v); free(d.o);
        outputs_free(&out);
        rig_reset(&r, name(c));
    }
    rig_close(&r);
}

/* A document does not know what lies beside it, and the number of threads changes nothing: both bit for bit. */
Test(cpu, documents_and_threads)
{
    struct rig r;
    rig_open_cpu(&r);
    enum { Hq = 4, Hkv = 2, D = 16, A = 65, B = 131, N = A + B };
    float *q = acts(&r, N * Hq * D, 1, 1), *k = acts(&r, N * Hkv * D, 1, 2), *v = acts(&r, N * Hkv * D, 1, 3), *d_o = acts(&r, N * Hq * D, 1, 4);
    float *o[2], *dq[2], *dk[2], *dv[2];
    for (int alone = 0; alone < 2; alone++) {
        omp_set_num_threads(alone ? 1 : 3);
        rig_scratch(&r, (struct op_limits){.N = N, .C = Hq * D, .V = 1, .max_doc = B, .Hq = Hq, .Hkv = Hkv, .D = D, .backward = true});
        o[alone] = poison_float(&r, N * Hq * D); dq[alone] = poison_float(&r, N * Hq * D); dk[alone] = poison_float(&r, N * Hkv * D); dv[alone] = poison_float(&r, N * Hkv * D);
        float *lse = poison_float(&r, N * Hq);
        for (int part = 0; part < (alone ? 2 : 1); part++) {        /* once packed, once one by one */
            int32_t begin[3] = {0, alone ? (part ? B : A) : A, N};
            int64_t at = part ? A : 0, n = alone ? begin[1] : N;
            struct attention_args a = {.doc_begin = begin, .n_docs = alone ? 1 : 2, .max_doc = B, .N = n, .Hq = Hq, .Hkv = Hkv, .D = D, .scale = 0.25f};
            const act *qa = (act *)(q + at * Hq * D), *ka = (act *)(k + at * Hkv * D), *va = (act *)(v + at * Hkv * D);
            act *oa = (act *)(o[alone] + at * Hq * D);
            r.op->attention_forward(r.be, oa, lse, qa, ka, va, &a);
            r.op->attention_backward(r.be, (act *)(dq[alone] + at * Hq * D), (act *)(dk[alone] + at * Hkv * D), (act *)(dv[alone] + at * Hkv * D),
                                     (act *)(d_o + at * Hq * D), oa, lse, qa, ka, va, &a);
        }
    }
    cr_assert(!memcmp(o[0], o[1], sizeof(float) * N * Hq * D) && !memcmp(dq[0], dq[1], sizeof(float) * N * Hq * D));
    cr_assert(!memcmp(dk[0], dk[1], sizeof(float) * N * Hkv * D) && !memcmp(dv[0], dv[1], sizeof(float) * N * Hkv * D));
    rig_close(&r);
}

/* ---- generation ---- */

struct cached_case { int steps[8], n_steps, Hq, Hkv, D; int64_t window, room; };   /* rows fed at once; room: rows of the caches */
static const struct cached_case cached_cases[] = {
    {{1}, 1, 1, 1, 8, 0, 1}, {{1, 1, 1, 1}, 4, 2, 1, 8, 0, 9}, {{5, 1, 1, 3, 1}, 5, 4, 2, 16, 0, 16}, {{70, 1, 64, 1}, 4, 3, 3, 64, 0, 200},
    {{9, 1, 4}, 3, 4, 1, 80, 0, 14}, {{2, 1}, 2, 8, 2, 128, 0, 5}, {{20, 1, 1, 7}, 4, 2, 1, 16, 1, 40}, {{20, 1, 1, 7}, 4, 2, 1, 24, 5, 40}, {{130, 1, 2}, 3, 2, 2, 16, 64, 140},
};

static const char *cached_name(const void *c_)
{
    const struct cached_case *c = c_;
    return text("cached: %d steps from %d, Hq %d Hkv %d D %d window %ld", c->n_steps, c->steps[0], c->Hq, c->Hkv, c->D, (long)c->window);
}

/* more keys than the 256 that the warps of a block take in a turn, the last turn a broken one */
static const struct cached_case true_cached_cases[] = {{{1100, 1, 7, 1}, 4, 4, 1, 128, 0, 1200}, {{1100, 1, 7, 1}, 4, 4, 2, 64, 600, 1200}};

static int64_t cached_rows(const struct cached_case *c)
{
    int64_t n = 0;
    for (int s = 0; s < c->n_steps; s++) n += c->steps[s];
    return n;
}

static void run_cached(struct rig *r, const void *c_, struct outputs *out)
{
    const struct cached_case *c = c_;
    int64_t N = cached_rows(c), q_width = c->Hq * c->D, kv_width = c->Hkv * c->D, past = 0;
    float *q = acts(r, N * q_width, 1, 1), *k = acts(r, N * kv_width, 1, 2), *v = acts(r, N * kv_width, 1, 3), *o = floats(r, N * q_width);
    act *k_cache = poison_act(r, c->room * kv_width), *v_cache = poison_act(r, c->room * kv_width);
    rig_scratch(r, (struct op_limits){.N = N, .C = q_width, .V = 1, .max_doc = c->room, .Hq = c->Hq, .Hkv = c->Hkv, .D = c->D});
    for (int s = 0; s < c->n_steps; past += c->steps[s++]) {
        int64_t n = c->steps[s];
        act *part = poison_act(r, n * q_width);
        r->op->attention_cached(r->be, part, k_cache, v_cache, upload_act(r, q + past * q_width, n * q_width), upload_act(r, k + past * kv_width, n * kv_width),
                                upload_act(r, v + past * kv_width, n * kv_width), n, past, c->Hq, c->Hkv, c->D, score_scale(c->D), c->window);
        r->op->download_act(r->be, o + past * q_width, part, n * q_width);
    }
    take_host(out, "o", FORWARD, o, N * q_width);
    take_act(out, r, "k_cache", EXACT, k_cache, N * kv_width);
    take_act(out, r, "v_cache", EXACT, v_cache, N * kv_width);
    size_t used = (size_t)(N * kv_width) * dtype_width(r->be->act_dtype), rest = (size_t)(c->room * kv_width) * dtype_width(r->be->act_dtype) - used;
    unsigned char *bytes = xmalloc(rest + 1);
    r->op->download(r->be, bytes, (char *)k_cache + used, rest);
    for (size_t i = 0; i < rest; i++) cr_assert(bytes[i] == 0xff, "%s: the cache was written past its last row", cached_name(c));
    free(bytes);
}

Test(cpu, cached_definition)
{
    struct rig r;
    rig_open_cpu(&r);
    for (size_t i = 0; i < COUNT(cached_cases); i++) {
        const struct cached_case *c = &cached_cases[i];
        int64_t N = cached_rows(c), nq = N * c->Hq * c->D, nk = N * c->Hkv * c->D;
        struct outputs out = {0};
        run_cached(&r, c, &out);
        double *q = doubles(acts(&r, nq, 1, 1), nq), *k = doubles(acts(&r, nk, 1, 2), nk), *v = doubles(acts(&r, nk, 1, 3), nk), *o = xmalloc((size_t)nq * sizeof *o);
        for (int64_t row = 0; row < N; row++)
            for (int h = 0; h < c->Hq; h++) {
                int64_t at = (row * c->Hq + h) * c->D, kv = h / (c->Hq / c->Hkv) * c->D;
                attend(o + at, q + at, k + kv, v + kv, c->Hkv * c->D, c->window && row >= c->window ? row - c->window + 1 : 0, row, c->D, (double)score_scale(c->D));
            }
        expect_close(&out, "o", o, nq, 1e-6, cached_name(c));
        expect_close(&out, "k_cache", k, nk, 0, cached_name(c));
        expect_close(&out, "v_cache", v, nk, 0, cached_name(c));
        free(q); free(k); free(v); free(o);
        outputs_free(&out);
        rig_reset(&r, cached_name(c));
    }
    rig_close(&r);
}

static const struct case_list list = {"attention", cases, COUNT(cases), sizeof *cases, run, name};
static const struct case_list cached_list = {"attention_cached", cached_cases, COUNT(cached_cases), sizeof *cached_cases, run_cached, cached_name};
Test(gpu, fp32) { ops_compare(&list, "fp32"); ops_compare(&cached_list, "fp32"); }
Test(gpu, bf16) { ops_compare(&list, "bf16"); ops_compare(&cached_list, "bf16"); }

static const struct case_list true_list = {"attention", true_cases, COUNT(true_cases), sizeof *true_cases, run, name};
static const struct case_list true_cached_list = {"attention_cached", true_cached_cases, COUNT(true_cached_cases), sizeof *true_cached_cases, run_cached, cached_name};
Test(gpu, true_sizes_fp32) { ops_compare(&true_list, "fp32"); ops_compare(&true_cached_list, "fp32"); }
Test(gpu, true_sizes_bf16) { ops_compare(&true_list, "bf16"); ops_compare(&true_cached_list, "bf16"); }
