/* Whole-model properties that hold whatever the weights are: each catches a class of bugs that single ops cannot show. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "tests/compare.h"
#include "tests/train/fixture.h"

static const char *const architectures[] = {"qwen2", "llama", "qwen3"};
static const int documents[] = {1, 9, 5, 8, 0};      /* one of length 1, rows of 23 */

static const struct distill_args mixed = {.temperature = 2, .kd_weight = 0.7f, .ce_weight = 0.3f};

/* The loss of a model whose weights were changed along a random direction, against the gradient: central differences on the whole network. */
Test(model, gradient_agrees_with_differences)
{
    for (int a = 0; a < 3; a++) {
        struct fixture f;
        struct fixture_options o = {.architecture = architectures[a], .tie = a == 2, .rows = 2, .length = 23, .kind = TARGET_TOPK, .k = 4, .loss = mixed, .seed = 5};
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
    for (int a = 0; a < 3; a++) {
        float *reference = NULL;
        for (int policy = RECOMPUTE_NONE; policy <= RECOMPUTE_BLOCK; policy++) {
            struct fixture f;
            struct fixture_options o = {.architecture = architectures[a], .rows = 2, .length = 23, .recompute = (enum recompute)policy, .kind = TARGET_TOPK, .k = 4, .loss = mixed, .seed = 5};
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
        struct batch *b = fixture_batch(2, 23, documents, 4, 9);
        double part_kd, part_ce;
        size_t at = (size_t)(half * b->n);
        memcpy(b->tokens, all->tokens + at, (size_t)b->n * sizeof *b->tokens);
        memcpy(b->labels, all->labels + at, (size_t)b->n * sizeof *b->labels);
        memcpy(b->head_ids, all->head_ids + at * 4, (size_t)(b->n * 4) * sizeof *b->head_ids);
        memcpy(b->head_logprob, all->head_logprob + at * 4, (size_t)(b->n * 4) * sizeof *b->head_logprob);
        memcpy(b->tail_logmass, all->tail_logmass + at, (size_t)b->n * sizeof *b->tail_logmass);
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
    for (int a = 0; a < 3; a++) {
        struct fixture packed, alone;
        struct fixture_options o = {.architecture = architectures[a], .rows = 1, .length = 23, .loss = mixed, .seed = 5};
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
