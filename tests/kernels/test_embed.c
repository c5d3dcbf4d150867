/* embed: x_n = table[token_n]; dtable[token_n] += dx_n. No arithmetic forward, so it must be exact. */
#include "tests/kernels/ops.h"

#include "base/rng.h"

struct embed_case { int64_t N, C, V; };
static const struct embed_case cases[] = {{1, 1, 1}, {1, 3, 5}, {7, 17, 11}, {5, 64, 100}, {33, 80, 2}, {130, 65, 512}, {257, 128, 33}};
/* rows that take several blocks; more of them than a grid is high; ids of a 152k vocabulary */
static const struct embed_case true_cases[] = {{1031, 3584, 700}, {66001, 8, 152064}};

static const char *name(const void *c_) { const struct embed_case *c = c_; return text("N %ld C %ld V %ld", (long)c->N, (long)c->C, (long)c->V); }

static int32_t *make_tokens(struct rig *r, const struct embed_case *c)
{
    int32_t *tokens = (int32_t *)floats(r, c->N);
    for (int64_t n = 0; n < c->N; n++) tokens[n] = (int32_t)(philox4x32(1, 0, (uint64_t)n).v[0] % (uint64_t)c->V);
    tokens[c->N - 1] = (int32_t)(c->V - 1);
    return tokens;
}

static void run(struct rig *r, const void *c_, struct outputs *out)
{
    const struct embed_case *c = c_;
    act *x = poison_act(r, c->N * c->C), *table = upload_act(r, acts(r, c->V * c->C, 1, 2), c->V * c->C), *dx = upload_act(r, acts(r, c->N * c->C, 1, 3), c->N * c->C);
    grad *dtable = upload_grad(r, acts(r, c->V * c->C, 1, 4), c->V * c->C);
    int32_t *tokens = upload(r, make_tokens(r, c), (size_t)c->N * sizeof *tokens);
    rig_scratch(r, (struct op_limits){.N = c->N, .C = c->C, .V = c->V, .Hq = 1, .Hkv = 1, .D = 8});
    r->op->embed_forward(r->be, x, tokens, table, c->N, c->C);
    r->op->embed_backward(r->be, dtable, dx, tokens, c->N, c->C, c->V);
    take_act(out, r, "x", EXACT, x, c->N * c->C);
    take_grad(out, r, "dtable", BACKWARD, dtable, c->V * c->C);
}

Test(cpu, definition)
{
    struct rig r;
    rig_open_cpu(&r);
    for (size_t i = 0; i < COUNT(cases); i++) {
        const struct embed_case *c = &cases[i];
        struct outputs out = {0};
        run(&r, c, &out);
        int32_t *tokens = make_tokens(&r, c);
        double *table = doubles(acts(&r, c->V * c->C, 1, 2), c->V * c->C), *dx = doubles(acts(&r, c->N * c->C, 1, 3), c->N * c->C);
        double *x = xmalloc((size_t)(c->N * c->C) * sizeof *x), *dtable = doubles(acts(&r, c->V * c->C, 1, 4), c->V * c->C);
        for (int64_t n = 0; n < c->N; n++)
            for (int64_t k = 0; k < c->C; k++) {
                x[n * c->C + k] = table[tokens[n] * c->C + k];
                dtable[tokens[n] * c->C + k] += dx[n * c->C + k];
            }
        expect_close(&out, "x", x, c->N * c->C, 0, name(c));
        expect_close(&out, "dtable", dtable, c->V * c->C, 1e-6, name(c));
        free(table); free(dx); free(x); free(dtable);
        outputs_free(&out);
        rig_reset(&r, name(c));
    }
    rig_close(&r);
}

static const struct case_list list = {"embed", cases, COUNT(cases), sizeof *cases, run, name};
Test(gpu, fp32) { ops_compare(&list, "fp32"); }
Test(gpu, bf16) { ops_compare(&list, "bf16"); }
Test(gpu, exact) { ops_compare(&list, "exact"); }

static const struct case_list true_list = {"embed", true_cases, COUNT(true_cases), sizeof *true_cases, run, name};
Test(gpu, true_sizes_fp32) { ops_compare(&true_list, "fp32"); }
Test(gpu, true_sizes_bf16) { ops_compare(&true_list, "bf16"); }
Test(gpu, true_sizes_exact) { ops_compare(&true_list, "exact"); }
