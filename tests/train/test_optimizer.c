/* The optimizer over the table: AdamW as Loshchilov & Hutter write it (in double, beside ours), who decays, the clip of the global norm, and
 * that a norm which is not finite moves nothing; and that a master is what is updated, the weights its copy. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "tests/compare.h"
#include "tests/train/fixture.h"

static void open_fixture(struct fixture *f, const char *architecture, bool tie)
{
    struct fixture_options o = {.architecture = architecture, .tie = tie, .rows = 1, .length = 8, .loss = {.temperature = 1, .ce_weight = 1}, .seed = 5};
    fixture_open(f, &o);
}

/* Gradients that differ in size from tensor to tensor; padding stays 0. */
static double set_gradients(struct fixture *f, uint64_t seed, float scale)
{
    const struct params *t = f->model->params;
    float *g = (float *)f->model->grads;
    double sum = 0;
    memset(g, 0, (size_t)t->total * sizeof *g);
    for (int i = 0; i < t->n; i++) {
        fill_normal(g + t->p[i].offset, t->p[i].count, scale * (1 + (float)(i % 5)), seed + (uint64_t)i);
        for (int64_t j = 0; j < t->p[i].count; j++) sum += (double)g[t->p[i].offset + j] * g[t->p[i].offset + j];
    }
    return sqrt(sum);
}

static void expect_trajectory(double clip, float scale, bool tie)
{
    struct fixture f;
    open_fixture(&f, "qwen3", tie);
    f.optimizer->args.clip = clip;
    const struct params *t = f.model->params;
    size_t n = (size_t)t->total;
    double *w = xcalloc(n, sizeof *w), *m = xcalloc(n, sizeof *m), *v = xcalloc(n, sizeof *v), b1 = 0.9, b2 = 0.95;
    for (int i = 0; i < t->n; i++) for (int64_t j = 0; j < t->p[i].count; j++) w[t->p[i].offset + j] = ((float *)f.model->weights)[t->p[i].offset + j];
    for (int step = 1; step <= 6; step++) {
        double lr = 1e-2 / step, norm = set_gradients(&f, (uint64_t)(1000 * step), scale), got = optimizer_norm(f.optimizer);
        cr_expect_lt(fabs(got - norm) / norm, 1e-12, "norm %.17g, not %.17g", got, norm);
        double shrink = clip > 0 && clip / (norm + 1e-6) < 1 ? clip / (norm + 1e-6) : 1;
        optimizer_step(f.optimizer, step, lr);
        for (int i = 0; i < t->n; i++)
            for (int64_t j = t->p[i].offset; j < t->p[i].offset + t->p[i].count; j++) {
                double g = ((float *)f.model->grads)[j] * shrink;
                m[j] = b1 * m[j] + (1 - b1) * g;
                v[j] = b2 * v[j] + (1 - b2) * g * g;
                w[j] -= lr * ((t->p[i].n_dims == 2 ? 0.1 : 0) * w[j] + m[j] / (1 - pow(b1, step)) / (sqrt(v[j] / (1 - pow(b2, step))) + 1e-8));
            }
    }
    for (int i = 0; i < t->n; i++)
        for (int64_t j = t->p[i].offset; j < t->p[i].offset + t->p[i].count; j++)
            cr_assert_float_eq(((float *)f.model->weights)[j], w[j], 2e-6, "%s: %.9g, not %.9g", t->p[i].part[0].name, ((float *)f.model->weights)[j], w[j]);
    free(w);
    free(m);
    free(v);
    fixture_close(&f);
}

Test(optimizer, is_adamw_with_decay_of_matrices_only) { expect_trajectory(0, 1e-3f, false); }
Test(optimizer, clips_the_global_norm) { expect_trajectory(1, 1, false); }
Test(optimizer, leaves_a_norm_below_the_clip_alone) { expect_trajectory(1e6, 1e-3f, true); }

/* Two steps whose gradients differ by a factor, both above the clip, are one and the same step. */
Test(optimizer, a_clipped_step_forgets_the_size_of_the_gradient)
{
    struct fixture a, b;
    open_fixture(&a, "llama", false);
    open_fixture(&b, "llama", false);
    set_gradients(&a, 7, 1);
    set_gradients(&b, 7, 64);
    optimizer_norm(a.optimizer);
    optimizer_norm(b.optimizer);
    optimizer_step(a.optimizer, 1, 1e-2);
    optimizer_step(b.optimizer, 1, 1e-2);
    for (int i = 0; i < a.model->params->n; i++) {
        const struct param *p = &a.model->params->p[i];
        double error = relative_l2((float *)a.optimizer->m + p->offset, (float *)b.optimizer->m + p->offset, p->count);
        cr_expect_lt(error, 1e-6, "%s: %g", p->part[0].name, error);
    }
    fixture_close(&a);
    fixture_close(&b);
}

Test(optimizer, a_norm_that_is_not_finite_moves_nothing)
{
    static const float bad[] = {NAN, INFINITY, -INFINITY, 3e38f};    /* the last is finite, but for its square in fp32: the norm is fine in double */
    for (int i = 0; i < 4; i++) {
        struct fixture f;
        open_fixture(&f, "qwen2", false);
        const struct params *t = f.model->params;
        size_t bytes = (size_t)t->total * sizeof(float);
        f.optimizer->args.weight_decay = 0.5;
        set_gradients(&f, 7, 1);
        optimizer_norm(f.optimizer);
        optimizer_step(f.optimizer, 1, 1e-2);
        float *w = xmalloc(bytes), *m = xmalloc(bytes), *v = xmalloc(bytes);
        memcpy(w, f.model->weights, bytes);
        memcpy(m, f.optimizer->m, bytes);
        memcpy(v, f.optimizer->v, bytes);
        ((float *)f.model->grads)[t->norm->offset + 3] = bad[i];
        double norm = optimizer_norm(f.optimizer);
        optimizer_step(f.optimizer, 2, 1e-2);
        bool moved = memcmp(w, f.model->weights, bytes) || memcmp(m, f.optimizer->m, bytes) || memcmp(v, f.optimizer->v, bytes);
        cr_expect_eq(moved, i == 3);
        cr_expect_eq(isfinite(norm) != 0, i == 3);
        if (i == 3) for (int64_t j = 0; j < t->norm->count; j++) cr_expect(isfinite(((float *)f.model->weights)[t->norm->offset + j]));
        free(w);
        free(m);
        free(v);
        fixture_close(&f);
    }
}

Test(optimizer, begins_with_moments_of_zero_and_the_first_step_is_the_sign)
{
    struct fixture f;
    open_fixture(&f, "llama", false);
    const struct params *t = f.model->params;
    for (int64_t i = 0; i < t->total; i++) cr_assert(((float *)f.optimizer->m)[i] == 0 && ((float *)f.optimizer->v)[i] == 0);
    const struct param *p = t->layer[1].mlp_norm;                    /* a vector of ones, no decay */
    set_gradients(&f, 3, 1e-3f);
    f.optimizer->args.clip = 0;
    optimizer_norm(f.optimizer);
    optimizer_step(f.optimizer, 1, 1e-2);
    for (int64_t j = 0; j < p->count; j++) {
        float g = ((float *)f.model->grads)[p->offset + j];
        cr_expect_float_eq(((float *)f.model->weights)[p->offset + j], 1 - 1e-2 * g / (fabs((double)g) + 1e-8), 2e-7);
    }
    fixture_close(&f);
}

/* ---- master weights ---- */

static void open_with_master(struct fixture *f, uint64_t seed)
{
    struct fixture_options o = {.architecture = "qwen3", .rows = 1, .length = 8, .loss = {.temperature = 1, .ce_weight = 1}, .seed = seed, .master = true};
    fixture_open(f, &o);
}

static void one_step(struct fixture *f, int step)
{
    set_gradients(f, (uint64_t)(100 * step), 1);
    optimizer_norm(f->optimizer);
    optimizer_step(f->optimizer, step, 1e-2);
}

Test(optimizer, has_a_master_where_the_device_keeps_one_and_plans_it)
{
    struct fixture without, with;
    open_fixture(&without, "qwen3", false);
    open_with_master(&with, 5);
    cr_expect_null(without.optimizer->master);
    cr_assert_not_null(with.optimizer->master);
    size_t bytes = (size_t)with.model->params->total * sizeof(float), more = memory_total(with.plan) - memory_total(without.plan);
    cr_expect(more >= bytes && more < bytes + 256, "the plan grew by %zu bytes for a master of %zu", more, bytes);
    for (int i = 0; i < with.model->params->n; i++) {
        const struct param *p = &with.model->params->p[i];
        cr_assert_arr_eq(with.optimizer->master + p->offset, (float *)with.model->weights + p->offset, (size_t)p->count * sizeof(float), "%s: the master does not begin as the weights", p->part[0].name);
    }
    fixture_close(&without);
    fixture_close(&with);
}

/* Weights that were lost between two steps, as rounding loses part of them, are back after the second. */
Test(optimizer, updates_the_master_and_copies_it_to_the_weights)
{
    struct fixture plain, f;
    open_fixture(&plain, "qwen3", false);
    open_with_master(&f, 5);
    const struct params *t = f.model->params;
    for (int step = 1; step <= 4; step++) {
        one_step(&plain, step);
        for (int64_t i = 0; i < t->total; i++) ((float *)f.model->weights)[i] = 7;
        one_step(&f, step);
        for (int i = 0; i < t->n; i++) {
            size_t bytes = (size_t)t->p[i].count * sizeof(float);
            int64_t at = t->p[i].offset;
            cr_assert_arr_eq(f.optimizer->master + at, (float *)plain.model->weights + at, bytes, "step %d, %s: not the weights of a run without a master", step, t->p[i].part[0].name);
            cr_assert_arr_eq((float *)f.model->weights + at, f.optimizer->master + at, bytes, "step %d, %s: weights are not their master", step, t->p[i].part[0].name);
        }
    }
    float *before = xmalloc((size_t)t->total * sizeof *before);
    memcpy(before, f.optimizer->master, (size_t)t->total * sizeof *before);
    ((float *)f.model->grads)[t->norm->offset] = NAN;
    optimizer_norm(f.optimizer);
    optimizer_step(f.optimizer, 5, 1e-2);
    for (int i = 0; i < t->n; i++) cr_assert_arr_eq(f.optimizer->master + t->p[i].offset, before + t->p[i].offset, (size_t)t->p[i].count * sizeof(float), "a norm that is not finite moved the master");
    free(before);
    fixture_close(&plain);
    fixture_close(&f);
}
