/* See fixture.h. */
#include "tests/train/fixture.h"

#include <criterion/criterion.h>
#include <ctype.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/rng.h"

struct model_config *fixture_config(const char *architecture, const char *more)
{
    char text[1024], name[32];
    snprintf(name, sizeof name, "%sForCausalLM", architecture);
    name[0] = (char)toupper((unsigned char)name[0]);
    snprintf(text, sizeof text, "{\"architectures\": [\"%s\"], \"model_type\": \"%s\", \"hidden_size\": 24, \"intermediate_size\": 40, \"num_hidden_layers\": 3, \"num_attention_heads\": 4, "
             "\"num_key_value_heads\": 2, \"head_dim\": 6, \"vocab_size\": %d, \"tie_word_embeddings\": false, \"max_position_embeddings\": 256, \"rms_norm_eps\": 1e-6, \"rope_theta\": 1000.0, "
             "\"hidden_act\": \"silu\", \"initializer_range\": 0.2}", name, architecture, FIXTURE_VOCAB);
    json_t *json = json_loads(text, 0, NULL), *changes = json_loads(more ? more : "{}", 0, NULL);
    struct model_config *c = NULL;
    cr_assert(json && changes);
    json_object_update(json, changes);
    cr_assert_eq(model_config_from_json(&c, json, "fixture"), OK, "%s", fail_message());
    json_decref(json);
    json_decref(changes);
    return c;
}

void fixture_open(struct fixture *f, const struct fixture_options *o)
{
    memset(f, 0, sizeof *f);
    char *more = xasprintf("{\"tie_word_embeddings\": %s%s%s}", o->tie ? "true" : "false", o->more ? ", " : "", o->more ? o->more : "");
    f->config = fixture_config(o->architecture, more);
    free(more);
    struct backend_options device = {.device = o->device ? o->device : "cpu", .precision = o->precision, .deterministic = o->deterministic, .exact_rows = o->exact_rows,
                                     .recipe = o->recipe};
    cr_assert_eq(backend_open(&f->be, &device), OK, "%s", fail_message());
    f->be->master |= o->master;
    f->plan = memory_plan_new(f->be);
    int64_t N = o->rows * o->length;
    struct model_options m = {.N = N, .max_doc = o->length, .head_rows = o->head_rows ? o->head_rows : N, .train = true, .recompute = o->recompute, .fp8 = o->fp8,
                              .native_first = o->native_first, .native_last = o->native_last};
    struct adamw_args adamw = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1, .clip = 1};
    f->model = model_new(f->be, f->config, &m, f->plan);
    f->objective = objective_new(f->model, &o->loss, FIXTURE_VOCAB - 2, o->kind, o->k, f->plan);
    f->optimizer = optimizer_new(f->model, &adamw, f->plan);
    memory_add_scratch(f->plan, model_scratch_bytes(f->model, o->k));
    cr_assert_eq(memory_commit(f->plan, 0), OK, "%s", fail_message());
    model_ready(f->model);
    optimizer_ready(f->optimizer);
    params_init(f->model->params, f->be, f->model->weights, o->seed);
    optimizer_master_from_weights(f->optimizer);
    model_weights_changed(f->model);
}

void fixture_close(struct fixture *f)
{
    optimizer_free(f->optimizer);
    objective_free(f->objective);
    model_free(f->model);
    memory_plan_free(f->plan);
    backend_close(f->be);
    model_config_free(f->config);
}

struct batch *fixture_batch(int64_t rows, int64_t length, const int *documents, int k, uint64_t seed)
{
    struct shard_manifest m = {.kind = SHARD_TOPK, .k = k, .valid_vocab = FIXTURE_VOCAB - 2, .rows = rows, .row_length = length, .n_temperatures = 1, .temperatures = {1}};
    struct batch *b = batch_new(rows, length, k ? &m : NULL, false);
    uint32_t *tokens = xmalloc((size_t)length * sizeof *tokens);
    uint8_t *mask = xmalloc((size_t)length);
    uint16_t *document = xmalloc((size_t)length * sizeof *document);
    for (int64_t r = 0; r < rows; r++) {
        int64_t t = 0;
        for (int d = 0; documents[d]; d++)
            for (int i = 0; i < documents[d]; i++, t++) {
                tokens[t] = philox4x32(seed, (uint64_t)r, (uint64_t)t).v[0] % (FIXTURE_VOCAB - 2);
                mask[t] = i + 1 < documents[d] && t % 5 != 3;
                document[t] = (uint16_t)d;
            }
        cr_assert_eq(t, length);
        batch_set_row(b, r, tokens, mask, document);
    }
    batch_finish(b);
    for (int64_t i = 0; k && i < b->n; i++) {
        float left = 1;
        uint32_t start = philox4x32(seed, 1000, (uint64_t)i).v[0];
        for (int j = 0; j < k; j++) {
            float p = left * 0.4f;
            left -= p;
            b->head_ids[i * k + j] = (int32_t)((start + 7u * (uint32_t)j) % (FIXTURE_VOCAB - 2));
            b->head_logprob[i * k + j] = logf(p);
        }
        b->tail_logmass[i] = logf(left);
    }
    free(tokens);
    free(mask);
    free(document);
    return b;
}

struct batch *fixture_rows(const struct batch *all, int64_t first, int64_t rows, const int *documents)
{
    struct batch *b = fixture_batch(rows, all->length, documents, all->k, 0);
    size_t at = (size_t)(first * all->length), n = (size_t)b->n, k = (size_t)all->k;
    memcpy(b->tokens, all->tokens + at, n * sizeof *b->tokens);
    memcpy(b->labels, all->labels + at, n * sizeof *b->labels);
    if (!k) return b;
    memcpy(b->head_ids, all->head_ids + at * k, n * k * sizeof *b->head_ids);
    memcpy(b->head_logprob, all->head_logprob + at * k, n * k * sizeof *b->head_logprob);
    memcpy(b->tail_logmass, all->tail_logmass + at, n * sizeof *b->tail_logmass);
    return b;
}

float *fixture_gradients(struct fixture *f, const struct batch *b, double targets, double *kd, double *ce)
{
    struct model *m = f->model;
    f->be->ops->fill_zero(f->be, m->grads, (size_t)m->params->total * dtype_width(f->be->grad_dtype));
    objective_reset(f->objective);
    model_set_batch(m, b);
    model_forward(m);
    objective_run(f->objective, b, targets, true);
    model_backward(m);
    objective_read(f->objective, kd, ce);
    *kd /= targets;
    *ce /= targets;
    float *grads = xmalloc((size_t)m->params->total * sizeof *grads);
    f->be->ops->download_grad(f->be, grads, m->grads, m->params->total);
    return grads;
}
