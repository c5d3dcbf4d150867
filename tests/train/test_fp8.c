/* A model whose products are in fp8 (their arithmetic: tests/kernels/test_fp8.c): close to the model that was not rounded, and the same bits whatever is recomputed, streamed or
 * loaded. */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "tests/compare.h"
#include "tests/train/fixture.h"

static const int documents[] = {9, 3, 11, 0};
static const char *const architectures[] = {"qwen2", "llama", "qwen3"};
static const struct distill_args mixed = {.divergence = DIV_FORWARD_KL, .tail = TAIL_BUCKET, .temperature = 1, .kd_weight = 1, .ce_weight = 0.3f};
enum { N_ARCHITECTURES = sizeof architectures / sizeof *architectures };

static struct fixture_options options(const char *architecture, bool fp8)
{
    return (struct fixture_options){.architecture = architecture, .rows = 2, .length = 23, .kind = TARGET_TOPK, .k = 4, .loss = mixed, .seed = 5, .fp8 = fp8};
}

/* Blocks at the two ends, of three, that stay native */
static const struct { int first, last; } ends[] = {{0, 0}, {1, 0}, {0, 1}, {1, 1}, {2, 0}};
enum { N_ENDS = sizeof ends / sizeof *ends };

static struct model *inference_model(struct fixture *f, struct memory_plan *plan, const struct model_options *o)
{
    struct model *m = model_new(f->be, f->config, o, plan);
    memory_add_scratch(plan, model_scratch_bytes(m, 0));
    cr_assert_eq(memory_commit(plan, 0), OK);
    model_ready(m);
    return m;
}

/* Rounding to three bits of mantissa changes an element by up to 1/16, by 1/40 in the mean; a gradient has gone through seven rounded products per layer and direction,
 * and through softmax. The whole gradient is bounded, and every tensor's more loosely: in small ones little averages out. */
Test(fp8, gradients_are_close_to_those_of_the_native_model)
{
    for (int a = 0; a < N_ARCHITECTURES; a++) {
        struct fixture native, f;
        struct fixture_options o = options(architectures[a], false), o8 = options(architectures[a], true);
        fixture_open(&native, &o);
        fixture_open(&f, &o8);
        struct batch *b = fixture_batch(2, 23, documents, 4, 9);
        double kd, ce, kd8, ce8;
        float *g = fixture_gradients(&native, b, (double)b->n_targets, &kd, &ce), *h = fixture_gradients(&f, b, (double)b->n_targets, &kd8, &ce8);
        cr_expect(fabs(kd8 / kd - 1) < 0.02 && fabs(ce8 / ce - 1) < 0.02, "%s: kd %g and %g, ce %g and %g", architectures[a], kd, kd8, ce, ce8);
        const struct params *t = f.model->params;
        double whole = relative_l2(h, g, t->total);
        cr_expect(whole > 0.01 && whole < 0.25, "%s: %g", architectures[a], whole);
        for (int i = 0; i < t->n; i++) {
            double error = relative_l2(h + t->p[i].offset, g + t->p[i].offset, t->p[i].count);
            cr_expect_lt(error, 0.4, "%s, %s: %g", architectures[a], t->p[i].part[0].name, error);
        }
        free(g);
        free(h);
        batch_free(b);
        fixture_close(&native);
        fixture_close(&f);
    }
}

/* What is not kept is rounded again from the same numbers. */
Test(fp8, recompute_changes_no_bit)
{
    for (int a = 0; a < N_ARCHITECTURES * N_ENDS; a++) {
        struct batch *b = fixture_batch(2, 23, documents, 4, 9);
        const char *architecture = architectures[a / N_ENDS];
        float *first = NULL;
        for (int policy = RECOMPUTE_NONE; policy <= RECOMPUTE_BLOCK; policy++) {
            struct fixture f;
            struct fixture_options o = options(architecture, true);
            o.recompute = (enum recompute)policy;
            o.native_first = ends[a % N_ENDS].first;
            o.native_last = ends[a % N_ENDS].last;
            fixture_open(&f, &o);
            double kd, ce;
            float *g = fixture_gradients(&f, b, (double)b->n_targets, &kd, &ce);
            if (first) cr_expect(!memcmp(first, g, (size_t)f.model->params->total * sizeof *g), "%s, ends %d, policy %d", architecture, a % N_ENDS, policy);
            else first = memcpy(xmalloc((size_t)f.model->params->total * sizeof *g), g, (size_t)f.model->params->total * sizeof *g);
            free(g);
            fixture_close(&f);
        }
        free(first);
        batch_free(b);
    }
}

/* Blocks before the first in fp8 are the native model's to the bit, those after it are not. What a native block multiplies was not rounded; one in fp8 has matrices of its own. */
Test(fp8, ends_stay_native)
{
    for (int e = 0; e < N_ENDS; e++) {
        struct fixture native, f;
        struct fixture_options o = options("qwen3", false), o8 = options("qwen3", true);
        o8.native_first = ends[e].first;
        o8.native_last = ends[e].last;
        fixture_open(&native, &o);
        fixture_open(&f, &o8);
        struct batch *b = fixture_batch(2, 23, documents, 4, 9);
        model_set_batch(native.model, b);
        model_forward(native.model);
        model_set_batch(f.model, b);
        model_forward(f.model);
        for (int l = 0; l < 3; l++) {
            bool same = !memcmp(native.model->acts[l].res_mlp, f.model->acts[l].res_mlp, (size_t)(b->n * 24) * sizeof(float));
            cr_expect_eq(same, l < ends[e].first, "ends %d, block %d: %s", e, l, same ? "not rounded" : "rounded");
        }
        float *again = xmalloc((size_t)(b->n * 80) * sizeof *again);
        for (int l = 0; l < 3; l++) {
            const struct layer_acts *a = &f.model->acts[l];
            bool rounded = l >= ends[e].first && l < 3 - ends[e].last;
            cr_expect_eq(f.model->fp8[l].w[PRODUCT_DOWN].q != NULL, rounded, "ends %d, block %d", e, l);
            cr_expect_eq(a->x8[PRODUCT_DOWN].q != NULL, rounded, "ends %d, block %d", e, l);
            if (rounded) continue;
            f.be->ops->linear_forward(f.be, (act *)again, a->norm_mlp, (act *)((float *)f.model->weights + f.model->params->layer[l].w_gate_up->offset), NULL, b->n, 24, 80);
            cr_expect(!memcmp(again, a->gate_up, (size_t)(b->n * 80) * sizeof *again), "ends %d, block %d: gate and up are not the product of what it says it read", e, l);
        }
        free(again);
        batch_free(b);
        fixture_close(&native);
        fixture_close(&f);
    }
}

/* Stored as bytes and scales, resident or streamed, random or (in pieces, by the loader's own rounding) from a file: the training model's forward. */
Test(fp8, inference_is_the_training_models_forward)
{
    for (int a = 0; a < N_ARCHITECTURES * N_ENDS; a++)
        for (int slots = 0; slots <= 3; slots += slots ? 1 : 2) {
            struct fixture f;
            const char *architecture = architectures[a / N_ENDS];
            struct fixture_options o = options(architecture, true);
            o.native_first = ends[a % N_ENDS].first;
            o.native_last = ends[a % N_ENDS].last;
            fixture_open(&f, &o);
            struct batch *b = fixture_batch(2, 23, documents, 0, 9);
            struct memory_plan *plan = memory_plan_new(f.be);
            struct model *m = inference_model(&f, plan, &(struct model_options){.N = b->n, .max_doc = 23, .head_rows = 5, .layer_slots = slots, .ffn_rows = slots == 3 ? 7 : 0, .fp8 = true,
                                                                               .native_first = o.native_first, .native_last = o.native_last});
            model_random_weights(m, 5);                        /* the fixture's seed: the same weights */
            model_set_batch(f.model, b);
            model_forward(f.model);
            model_set_batch(m, b);
            for (int pass = 0; pass < 2; pass++) {
                memset(m->hidden, 0xff, (size_t)(b->n * 24) * sizeof(float));
                model_forward(m);
                double error = relative_l2((float *)m->hidden, (float *)f.model->hidden, b->n * 24);
                cr_expect_leq(error, slots == 3 ? 0.05 : 0, "%s, ends %d, %d places, pass %d: %g", architecture, a % N_ENDS, slots, pass, error);   /* another order of a sum may round to the next fp8 number */
            }
            model_free(m);
            memory_plan_free(plan);
            batch_free(b);
            fixture_close(&f);
        }
}

static int take_tensor(void *context, const char *name, int n_dims, const int64_t *shape, int64_t offset)
{
    struct { struct tensor_spec spec[64]; int64_t offset[64]; int n; } *list = context;
    list->offset[list->n] = offset;
    struct tensor_spec *s = &list->spec[list->n++];
    *s = (struct tensor_spec){.name = xstrdup(name), .dtype = DTYPE_F32, .n_dims = n_dims};
    memcpy(s->shape, shape, (size_t)n_dims * sizeof *shape);
    return OK;
}

struct source { const float *weights; const struct tensor_spec *spec; const int64_t *offset; };

static int give_tensor(void *context, const struct tensor_spec *spec, size_t offset, size_t bytes, void *out)
{
    const struct source *s = context;
    int64_t i = 0;
    while (strcmp(s->spec[i].name, spec->name)) i++;
    memcpy(out, (const char *)(s->weights + s->offset[i]) + offset, bytes);
    return OK;
}

/* The fixture's weights as a checkpoint in `dir`, opened. */
static struct tensor_set *checkpoint(const struct fixture *f, const char *dir)
{
    struct { struct tensor_spec spec[64]; int64_t offset[64]; int n; } list = {.n = 0};
    struct tensor_set *set = NULL;
    cr_assert_eq(params_each(f->model->params, take_tensor, &list), OK);
    struct source source = {(const float *)f->model->weights, list.spec, list.offset};
    cr_assert_eq(safetensors_write_dir(dir, list.spec, list.n, 0, give_tensor, &source), OK, "%s", fail_message());
    cr_assert_eq(tensor_set_open(&set, dir), OK, "%s", fail_message());
    for (int i = 0; i < list.n; i++) free((char *)(void *)(uintptr_t)list.spec[i].name);
    return set;
}

/* Resident, streamed, or read block by block in every pass: the hidden states of the training model, rounded or not, to the bit. */
Test(fp8, a_loaded_model_is_the_training_models_forward)
{
    static const struct { int slots; bool mapped; } ways[] = {{0, false}, {2, false}, {0, true}};
    for (int fp8 = 0; fp8 <= N_ENDS; fp8++) {
        struct fixture f;
        struct fixture_options o = options("qwen2", fp8 > 0);
        char dir[] = "/tmp/test_fp8_XXXXXX";
        cr_assert(mkdtemp(dir));
        if (fp8) {
            o.native_first = ends[fp8 - 1].first;
            o.native_last = ends[fp8 - 1].last;
        }
        fixture_open(&f, &o);
        struct tensor_set *set = checkpoint(&f, dir);
        for (int way = 0; way < 3; way++) {
            struct memory_plan *plan = memory_plan_new(f.be);
            struct batch *b = fixture_batch(2, 23, documents, 0, 9);
            struct model *m = inference_model(&f, plan, &(struct model_options){.N = b->n, .max_doc = 23, .head_rows = 5, .layer_slots = ways[way].slots, .mapped = ways[way].mapped, .fp8 = fp8 > 0,
                                                                               .native_first = o.native_first, .native_last = o.native_last});
            cr_assert_eq(model_load_weights(m, set, dir, NULL), OK, "%s", fail_message());
            model_set_batch(f.model, b);
            model_forward(f.model);
            model_set_batch(m, b);
            for (int pass = 0; pass < 2; pass++) {
                memset(m->hidden, 0xff, (size_t)(b->n * 24) * sizeof(float));
                model_forward(m);
                cr_expect(!memcmp(m->hidden, f.model->hidden, (size_t)(b->n * 24) * sizeof(float)), "fp8 %d, way %d, pass %d", fp8, way, pass);
            }
            /* a byte per element of the blocks' matrices, four for a scale: the reason for all this */
            const struct weight_layout *w = &m->home.layout;
            int64_t blocks = w->block_at[3] - w->block_at[0];
            if (fp8 == 1) cr_expect_lt(blocks, f.model->params->total * 2, "blocks take %ld bytes", (long)blocks);
            model_free(m);
            memory_plan_free(plan);
            batch_free(b);
        }
        tensor_set_close(set);
        fixture_close(&f);
        cr_assert_eq(dir_remove_tree(dir), OK);
    }
}

/* The loader rounds on the host what a training model rounds on its device: the same bytes and scales, rows that hold infinity or NaN included. */
Test(fp8, loading_rounds_as_the_device_does)
{
    struct fixture f;
    struct fixture_options o = options("qwen2", true);
    char dir[] = "/tmp/test_fp8_XXXXXX";
    cr_assert(mkdtemp(dir));
    fixture_open(&f, &o);
    const struct param *p = f.model->params->layer[1].w_down;
    float *down = (float *)f.model->weights + p->offset;
    down[3] = INFINITY;
    down[p->cols + 5] = NAN;
    model_weights_changed(f.model);
    struct tensor_set *set = checkpoint(&f, dir);
    struct memory_plan *plan = memory_plan_new(f.be);
    struct model *m = inference_model(&f, plan, &(struct model_options){.N = 46, .max_doc = 23, .head_rows = 5, .fp8 = true});
    cr_assert_eq(model_load_weights(m, set, dir, NULL), OK, "%s", fail_message());
    const struct weight_layout *w = &m->home.layout;
    const struct fp8 *want = &f.model->fp8[1].w[PRODUCT_DOWN];
    int64_t i = p - f.model->params->p;
    cr_expect(!memcmp((char *)m->home.device + w->at[i], want->q, (size_t)p->count));
    cr_expect(!memcmp((char *)m->home.device + w->scale_at[i], want->scale, (size_t)p->rows * sizeof(float)));
    model_free(m);
    memory_plan_free(plan);
    tensor_set_close(set);
    fixture_close(&f);
    cr_assert_eq(dir_remove_tree(dir), OK);
}

/* Thirty steps on one batch: the curve of the native model, within what rounding explains; the census sees what was rounded. */
Test(fp8, trains_like_the_native_model)
{
    double last[2];
    for (int fp8 = 0; fp8 < 2; fp8++) {
        struct fixture f;
        struct fixture_options o = options("qwen2", fp8);
        fixture_open(&f, &o);
        struct batch *b = fixture_batch(2, 23, documents, 4, 9);
        double kd = 0, ce = 0, first = 0;
        for (int step = 1; step <= 30; step++) {
            struct fp8_census census[CENSUS_COUNT];
            model_count_fp8(f.model);
            free(fixture_gradients(&f, b, (double)b->n_targets, &kd, &ce));
            model_read_census(f.model, census);
            if (step == 1) first = kd;
            for (int i = 0; i < CENSUS_COUNT; i++) {
                const struct fp8_census *s = &census[i];
                if (!fp8) cr_assert(s->elements == 0 && s->largest == 0);
                else cr_assert(s->elements > 1000 && s->zeros < 0.5 * s->elements && s->largest > 0 && isfinite(s->largest) && s->not_finite == 0);
            }
            cr_assert(isfinite(optimizer_norm(f.optimizer)));
            optimizer_step(f.optimizer, step, 3e-3);
            model_weights_changed(f.model);
        }
        cr_assert_lt(kd, 0.7 * first);
        last[fp8] = kd;
        batch_free(b);
        fixture_close(&f);
    }
    cr_expect(fabs(last[1] / last[0] - 1) < 0.03, "native %g, fp8 %g", last[0], last[1]);
}

/* A weight that is no number is not hidden by rounding. */
Test(fp8, what_is_not_finite_stays_so)
{
    struct fixture f;
    struct fixture_options o = options("llama", true);
    fixture_open(&f, &o);
    struct batch *b = fixture_batch(2, 23, documents, 4, 9);
    double kd, ce;
    ((float *)f.model->weights)[f.model->params->layer[1].w_down->offset + 3] = INFINITY;
    model_weights_changed(f.model);
    free(fixture_gradients(&f, b, (double)b->n_targets, &kd, &ce));
    cr_expect(!isfinite(kd));
    batch_free(b);
    fixture_close(&f);
}
