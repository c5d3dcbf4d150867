/* Whole-model properties that hold whatever the weights are: each catches a class of bugs that single ops cannot show. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "tests/compare.h"
#include "tests/train/fixture.h"

/* the last one slides: a window shorter than the longest document */
static const char *const architectures[] = {"qwen2", "llama", "qwen3", "mistral"};
static const char *const members[] = {NULL, "\"attention_bias\": true, \"mlp_bias\": true", "\"head_dim\": 10", "\"sliding_window\": 3"};
enum { N_ARCHITECTURES = 4 };
static const int documents[] = {1, 9, 5, 8, 0};      /* one of length 1, rows of 23 */

static const struct distill_args mixed = {.tail = TAIL_BUCKET, .temperature = 2, .kd_weight = 0.7f, .ce_weight = 0.3f};

/* The loss of a model whose weights were changed along a random direction, against the gradient: central differences on the whole network. */
Test(model, gradient_agrees_with_differences)
{
    for (int a = 0; a < N_ARCHITECTURES; a++) {
        struct fixture f;
        struct fixture_options o = {.architecture = architectures[a], .more = members[a], .tie = a == 2, .rows = 2, .length = 23, .kind = TARGET_TOPK, .k = 4, .loss = mixed, .seed = 5};
        fixture_open(&f, &o);
        struct batch *b = fixture_batch(2, 23, documents, 4, 9);
        double kd, ce, loss[2];
        float *g = fixture_gradients(&f, b, (double)b->n_targets, &kd, &ce), *w = (float *)f.model->weights;
        for (int i = 0; i < f.model->params->n; i++) {
            const struct param *p = &f.model->params->p[i];
            float *direction = new_normal(p->count, 1, (uint64_t)(100 + i)), *saved = xmalloc((size_t)p->count * sizeof *saved);
            double dot = 0, size = 0, step = 2e-3;
            for (int64_t j = 0; j < p->count; j++) { dot += (double)g[p->offset + j] * direction[j]; size += (double)g[p->offset + j] * g[p->offset + j]; }
            memcpy(saved, w + p->offset, (size_t)p->count * sizeof *saved);
            for (int side = 0; side < 2; side++) {
                for (int64_t j = 0; j < p->count; j++) w[p->offset + j] = saved[j] + (float)((side ? step : -step) * direction[j] / sqrt((double)p->count));
                free(fixture_gradients(&f, b, (double)b->n_targets, &kd, &ce));
                loss[side] = 0.7 * kd + 0.3 * ce;
            }
            memcpy(w + p->offset, saved, (size_t)p->count * sizeof *saved);
            double slope = (loss[1] - loss[0]) / (2 * step), want = dot / sqrt((double)p->count);
            /* fp32 loss / step: 1e-7 / 2e-3; the rest is the third derivative */
            cr_expect_float_eq(slope, want, 2e-3 * sqrt(size) + 4e-4, "%s, %s: slope %g, gradient says %g", architectures[a], p->part[0].name, slope, want);
            free(direction);
            free(saved);
        }
        free(g);
        batch_free(b);
        fixture_close(&f);
    }
}

Test(model, recompute_changes_no_bit)
{
    for (int a = 0; a < N_ARCHITECTURES; a++) {
        float *reference = NULL;
        for (int policy = RECOMPUTE_NONE; policy <= RECOMPUTE_BLOCK; policy++) {
            struct fixture f;
            struct fixture_options o = {.architecture = architectures[a], .more = members[a], .rows = 2, .length = 23, .recompute = (enum recompute)policy, .kind = TARGET_TOPK, .k = 4, .loss = mixed, .seed = 5};
            fixture_open(&f, &o);
            struct batch *b = fixture_batch(2, 23, documents, 4, 9);
            double kd, ce;
            float *g = fixture_gradients(&f, b, (double)b->n_targets, &kd, &ce);
            if (!reference) reference = g;
            else {
                cr_expect_eq(memcmp(reference, g, (size_t)f.model->params->total * sizeof *g), 0, "%s: recompute %d differs", architectures[a], policy);
                free(g);
            }
            batch_free(b);
            fixture_close(&f);
        }
        free(reference);
    }
}

/* Rows of one batch in two micro-batches, and the head in chunks of 7: the same objective. */
Test(model, accumulation_and_chunks_are_one_big_batch)
{
    struct fixture big, small;
    struct fixture_options o = {.architecture = "qwen2", .rows = 4, .length = 23, .kind = TARGET_TOPK, .k = 4, .loss = mixed, .seed = 5};
    fixture_open(&big, &o);
    o.rows = 2;
    o.head_rows = 7;
    fixture_open(&small, &o);
    struct batch *all = fixture_batch(4, 23, documents, 4, 9);
    double kd, ce, targets = (double)all->n_targets, sum_kd = 0, sum_ce = 0;
    float *g = fixture_gradients(&big, all, targets, &kd, &ce), *accumulated = xcalloc((size_t)big.model->params->total, sizeof *g);
    for (int half = 0; half < 2; half++) {
        struct batch *b = fixture_rows(all, 2 * half, 2, documents);
        double part_kd, part_ce;
        float *part = fixture_gradients(&small, b, targets, &part_kd, &part_ce);
        for (int64_t i = 0; i < small.model->params->total; i++) accumulated[i] += part[i];
        sum_kd += part_kd;
        sum_ce += part_ce;
        free(part);
        batch_free(b);
    }
    cr_expect_float_eq(sum_kd, kd, 1e-6 * kd);
    cr_expect_float_eq(sum_ce, ce, 1e-6 * ce);
    cr_expect_lt(relative_l2(accumulated, g, big.model->params->total), 2e-6, "gradients differ by %g", relative_l2(accumulated, g, big.model->params->total));
    free(g);
    free(accumulated);
    batch_free(all);
    fixture_close(&big);
    fixture_close(&small);
}

/* A document's hidden states do not depend on its neighbours in the row. */
Test(model, packed_documents_are_the_same_documents_alone)
{
    for (int a = 0; a < N_ARCHITECTURES; a++) {
        struct fixture packed, alone;
        struct fixture_options o = {.architecture = architectures[a], .more = members[a], .rows = 1, .length = 23, .loss = mixed, .seed = 5};
        fixture_open(&packed, &o);
        struct batch *row = fixture_batch(1, 23, documents, 0, 9);
        int64_t C = packed.config->hidden_size, begin = 0;
        model_set_batch(packed.model, row);
        model_forward(packed.model);
        for (int d = 0; documents[d]; begin += documents[d++]) {
            struct fixture_options single = o;
            single.length = documents[d];
            fixture_open(&alone, &single);
            struct batch *b = fixture_batch(1, documents[d], (const int[]){documents[d], 0}, 0, 1);
            memcpy(b->tokens, row->tokens + begin, (size_t)documents[d] * sizeof *b->tokens);
            model_set_batch(alone.model, b);
            model_forward(alone.model);
            double error = relative_l2((float *)packed.model->hidden + begin * C, (float *)alone.model->hidden, documents[d] * C);
            cr_expect_lt(error, 2e-6, "%s, document %d: %g", architectures[a], d, error);
            batch_free(b);
            fixture_close(&alone);
        }
        batch_free(row);
        fixture_close(&packed);
    }
}

/* A student that is its own teacher has nothing to learn. */
Test(model, teacher_equal_to_student_gives_zero)
{
    struct fixture f;
    struct fixture_options o = {.architecture = "llama", .rows = 2, .length = 23, .kind = TARGET_FULL, .loss = {.temperature = 3, .kd_weight = 1}, .seed = 5};
    fixture_open(&f, &o);
    struct batch *b = fixture_batch(2, 23, documents, 0, 9);
    double kd, ce;
    model_set_batch(f.model, b);
    model_forward(f.model);
    model_logits(f.model, 0, b->n);
    float *teacher = xmalloc((size_t)(b->n * FIXTURE_VOCAB) * sizeof *teacher);
    memcpy(teacher, f.model->logits, (size_t)(b->n * FIXTURE_VOCAB) * sizeof *teacher);
    f.objective->teacher = teacher;
    f.objective->teacher_dtype = DTYPE_F32;
    f.objective->teacher_stride = FIXTURE_VOCAB;
    f.objective->full_scale = 1.0f / 3;
    float *g = fixture_gradients(&f, b, (double)b->n_targets, &kd, &ce);
    double norm = 0;
    for (int64_t i = 0; i < f.model->params->total; i++) norm += (double)g[i] * g[i];
    cr_expect_float_eq(kd, 0, 1e-9);
    cr_expect_lt(sqrt(norm), 1e-5);
    free(teacher);
    free(g);
    batch_free(b);
    fixture_close(&f);
}

Test(model, overfits_one_batch)
{
    struct fixture f;
    struct fixture_options o = {.architecture = "qwen3", .tie = true, .rows = 1, .length = 23, .loss = {.temperature = 1, .ce_weight = 1}, .seed = 5};
    fixture_open(&f, &o);
    struct batch *b = fixture_batch(1, 23, documents, 0, 9);
    double kd, ce = 0, first = 0;
    for (int step = 1; step <= 150; step++) {
        free(fixture_gradients(&f, b, (double)b->n_targets, &kd, &ce));
        if (step == 1) first = ce;
        cr_assert(isfinite(optimizer_norm(f.optimizer)));
        optimizer_step(f.optimizer, step, 1e-2);
    }
    cr_expect_gt(first, 3);
    cr_expect_lt(ce, 0.02, "after 150 steps the loss is %g", ce);
    batch_free(b);
    fixture_close(&f);
}

/* What the head and the embedding learn apart, one tied matrix learns together. */
Test(model, tied_gradient_is_the_sum_of_head_and_embedding)
{
    struct fixture tied, apart;
    struct fixture_options o = {.architecture = "llama", .tie = true, .rows = 2, .length = 23, .kind = TARGET_TOPK, .k = 4, .loss = mixed, .seed = 5};
    fixture_open(&tied, &o);
    o.tie = false;
    fixture_open(&apart, &o);
    const struct params *t = apart.model->params;
    memcpy(apart.model->weights, tied.model->weights, (size_t)tied.model->params->total * sizeof(float));
    memcpy((float *)apart.model->weights + t->head->offset, tied.model->weights, (size_t)t->head->count * sizeof(float));
    struct batch *b = fixture_batch(2, 23, documents, 4, 9);
    double kd, ce, tied_kd, tied_ce;
    float *g = fixture_gradients(&tied, b, (double)b->n_targets, &tied_kd, &tied_ce), *h = fixture_gradients(&apart, b, (double)b->n_targets, &kd, &ce);
    cr_expect(kd == tied_kd && ce == tied_ce);
    for (int64_t i = 0; i < t->head->count; i++) h[i] += h[t->head->offset + i];
    cr_expect_lt(relative_l2(g, h, tied.model->params->total), 1e-6);
    free(g);
    free(h);
    batch_free(b);
    fixture_close(&tied);
    fixture_close(&apart);
}

/* A model without a backward keeps one layer's buffers and one residual stream: the same hidden states to the bit. */
Test(model, forward_only_is_the_same_forward)
{
    for (int a = 0; a < N_ARCHITECTURES; a++) {
        struct fixture f;
        struct fixture_options o = {.architecture = architectures[a], .more = members[a], .rows = 2, .length = 23, .loss = mixed, .seed = 5};
        fixture_open(&f, &o);
        struct batch *b = fixture_batch(2, 23, documents, 0, 9);
        struct memory_plan *plan = memory_plan_new(f.be);
        struct model_options forward = {.N = b->n, .max_doc = 23, .head_rows = 5};
        struct model *m = model_new(f.be, f.config, &forward, plan);
        cr_assert_eq(memory_commit(plan, 0), OK);
        model_ready(m);
        memcpy(m->weights, f.model->weights, (size_t)m->params->total * sizeof(float));
        model_set_batch(f.model, b);
        model_forward(f.model);
        model_set_batch(m, b);
        model_forward(m);
        cr_expect_arr_eq((float *)m->hidden, (float *)f.model->hidden, (size_t)(b->n * 24) * sizeof(float), "%s", architectures[a]);
        model_free(m);
        memory_plan_free(plan);
        batch_free(b);
        fixture_close(&f);
    }
}

/* Blocks that come in from host memory one after another, and an MLP that takes its rows in pieces, compute what the resident model computes; a second pass
 * goes on where the first one's reading ahead stopped. */
Test(model, streamed_blocks_are_the_same_model)
{
    for (int a = 0; a < N_ARCHITECTURES; a++)
        for (int slots = 2; slots <= STREAM_SLOTS; slots++) {
            struct fixture f;
            struct fixture_options o = {.architecture = architectures[a], .more = members[a], .rows = 2, .length = 23, .loss = mixed, .seed = 5};
            fixture_open(&f, &o);
            struct batch *b = fixture_batch(2, 23, documents, 0, 9);
            struct memory_plan *plan = memory_plan_new(f.be);
            struct model_options streamed = {.N = b->n, .max_doc = 23, .head_rows = 5, .layer_slots = slots, .ffn_rows = slots == 3 ? 7 : 0};
            struct model *m = model_new(f.be, f.config, &streamed, plan);
            cr_assert_eq(memory_commit(plan, 0), OK);
            model_ready(m);
            model_random_weights(m, 5);                        /* the fixture's seed: the same weights */
            model_set_batch(f.model, b);
            model_forward(f.model);
            model_set_batch(m, b);
            for (int pass = 0; pass < 3; pass++) {
                memset(m->hidden, 0xff, (size_t)(b->n * 24) * sizeof(float));
                model_forward(m);
                double error = relative_l2((float *)m->hidden, (float *)f.model->hidden, b->n * 24);
                cr_expect_leq(error, slots == 3 ? 2e-6 : 0, "%s, %d places, pass %d: %g", architectures[a], slots, pass, error);   /* BLAS may sum 7 rows in another order than 46 */
            }
            model_free(m);
            memory_plan_free(plan);
            batch_free(b);
            fixture_close(&f);
        }
}

/* Token by token through the cache, or in pieces, or at once: the hidden states of the packed forward. */
Test(model, the_cache_gives_what_the_whole_sequence_gives)
{
    static const int pieces[][8] = {{20, 0}, {1, 1, 1, 5, 12, 0}, {19, 1, 0}};
    for (int a = 0; a < N_ARCHITECTURES; a++) {
        struct fixture f;
        struct fixture_options o = {.architecture = architectures[a], .more = members[a], .rows = 1, .length = 20, .loss = mixed, .seed = 5};
        fixture_open(&f, &o);
        struct batch *b = fixture_batch(1, 20, (const int[]){20, 0}, 0, 9);
        model_set_batch(f.model, b);
        model_forward(f.model);
        for (int i = 0; i < 3; i++) {
            struct memory_plan *plan = memory_plan_new(f.be);
            struct model_options cached = {.N = 20, .max_doc = 20, .head_rows = 1, .cache = true};
            struct model *m = model_new(f.be, f.config, &cached, plan);
            cr_assert_eq(memory_commit(plan, 0), OK);
            model_ready(m);
            memcpy(m->weights, f.model->weights, (size_t)m->params->total * sizeof(float));
            for (int j = 0, at = 0; pieces[i][j]; at += pieces[i][j++]) {
                model_forward_cached(m, b->tokens + at, pieces[i][j]);
                double error = relative_l2((float *)m->hidden, (float *)f.model->hidden + at * 24, pieces[i][j] * 24);
                cr_expect_lt(error, 2e-6, "%s, pieces %d at %d: %g", architectures[a], i, at, error);
            }
            model_free(m);
            memory_plan_free(plan);
        }
        batch_free(b);
        fixture_close(&f);
    }
}

/* Nothing of an earlier batch is left over: a shorter batch after a longer one is the shorter batch alone. */
Test(model, a_shorter_batch_leaves_no_trace_of_the_one_before)
{
    struct fixture f, fresh;
    struct fixture_options o = {.architecture = "qwen3", .rows = 2, .length = 23, .kind = TARGET_TOPK, .k = 4, .loss = mixed, .seed = 5};
    fixture_open(&f, &o);
    fixture_open(&fresh, &o);
    struct batch *both = fixture_batch(2, 23, documents, 4, 9), *one = fixture_batch(1, 23, documents, 4, 10);
    double kd, ce, kd2, ce2;
    free(fixture_gradients(&f, both, (double)both->n_targets, &kd, &ce));
    float *after = fixture_gradients(&f, one, (double)one->n_targets, &kd, &ce), *alone = fixture_gradients(&fresh, one, (double)one->n_targets, &kd2, &ce2);
    cr_expect(kd == kd2 && ce == ce2);
    cr_expect_arr_eq(after, alone, (size_t)f.model->params->total * sizeof *after);
    free(after);
    free(alone);
    batch_free(both);
    batch_free(one);
    fixture_close(&f);
    fixture_close(&fresh);
}
