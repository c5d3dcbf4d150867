/* Generation: the cached forward, whatever the chunks, is the full forward; and the sampler draws from the distribution it says. */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/rng.h"
#include "data/loader.h"
#include "tests/compare.h"
#include "train/model.h"
#include "train/sampler.h"

/* ---- cache ---- */

enum { V = 59, ROOM = 48 };

struct machine { struct backend *be; struct memory_plan *plan; struct model_config *config; struct model *full, *cached; };

static struct model *open_model(struct machine *m, const struct model_options *o)
{
    struct model *model = model_new(m->be, m->config, o, m->plan);
    memory_add_scratch(m->plan, model_scratch_bytes(model, 0));
    return model;
}

/* One set of weights in two models: every value random, norms and biases too, so that none of them can be left out unseen. */
static void machine_open(struct machine *m, const char *keys, int64_t chunk)
{
    struct backend_options device = {.device = "cpu"};
    char text[1024];
    snprintf(text, sizeof text, "{\"hidden_size\": 24, \"intermediate_size\": 40, \"num_hidden_layers\": 3, \"num_attention_heads\": 4, \"vocab_size\": %d, "
             "\"max_position_embeddings\": 64, \"rms_norm_eps\": 1e-6, \"hidden_act\": \"silu\", %s}", V, keys);
    json_t *json = json_loads(text, 0, NULL);
    cr_assert_not_null(json, "%s", text);
    cr_assert_eq(model_config_from_json(&m->config, json, "test"), OK, "%s", fail_message());
    json_decref(json);
    cr_assert_eq(backend_open(&m->be, &device), OK, "%s", fail_message());
    m->plan = memory_plan_new(m->be);
    m->full = open_model(m, &(struct model_options){.N = ROOM, .max_doc = ROOM, .head_rows = ROOM});
    m->cached = open_model(m, &(struct model_options){.N = chunk, .max_doc = ROOM, .head_rows = 1, .cache = true});
    cr_assert_eq(memory_commit(m->plan, 0), OK, "%s", fail_message());
    model_ready(m->full);
    model_ready(m->cached);
    float *w = new_normal(m->full->params->total, 0.25f, 11);
    m->be->ops->upload_act(m->be, m->full->weights, w, m->full->params->total);
    m->be->ops->upload_act(m->be, m->cached->weights, w, m->full->params->total);
    free(w);
}

static void machine_close(struct machine *m)
{
    model_free(m->full);
    model_free(m->cached);
    memory_plan_free(m->plan);
    backend_close(m->be);
    model_config_free(m->config);
}

static void full_logits(struct machine *m, const int32_t *tokens, int64_t n, float *last)
{
    struct batch *b = batch_new(1, n, NULL, false);
    uint32_t row[ROOM];
    uint8_t mask[ROOM] = {0};
    uint16_t document[ROOM] = {0};
    for (int64_t i = 0; i < n; i++) row[i] = (uint32_t)tokens[i];
    batch_set_row(b, 0, row, mask, document);
    batch_finish(b);
    model_set_batch(m->full, b);
    model_forward(m->full);
    model_logits(m->full, n - 1, 1);
    m->be->ops->download_act(m->be, last, m->full->logits, V);
    batch_free(b);
}

static int64_t argmax(const float *x, int64_t n)
{
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++) if (x[i] > x[best]) best = i;
    return best;
}

static void compare_paths(const char *keys, int64_t prompt, int64_t chunk)
{
    struct machine m;
    int32_t tokens[ROOM], id;
    float full[V], cached[V];
    machine_open(&m, keys, chunk);
    struct sampler *greedy = sampler_new(V, 0, 1, 1);
    for (int64_t i = 0; i < prompt; i++) tokens[i] = (int32_t)(philox4x32(5, 0, (uint64_t)i).v[0] % V);
    for (int64_t at = 0; at < prompt; at += chunk) model_forward_cached(m.cached, tokens + at, prompt - at < chunk ? prompt - at : chunk);
    for (int64_t n = prompt; n < ROOM; n++) {
        model_logits(m.cached, m.cached->n - 1, 1);
        m.be->ops->download_act(m.be, cached, m.cached->logits, V);
        full_logits(&m, tokens, n, full);
        cr_assert_leq(relative_l2(cached, full, V), 1e-5, "%s: prompt %d in chunks of %d, after %d tokens: %g", keys, (int)prompt, (int)chunk, (int)n, relative_l2(cached, full, V));
        id = sampler_pick(greedy, cached, n);
        cr_assert_eq(id, argmax(full, V), "%s: after %d tokens", keys, (int)n);
        tokens[n] = id;
        model_forward_cached(m.cached, &id, 1);
    }
    sampler_free(greedy);
    machine_close(&m);
}

Test(generate, cached_forward_is_the_full_forward)
{
    static const char *const models[] = {
        "\"architectures\": [\"Qwen2ForCausalLM\"], \"model_type\": \"qwen2\", \"num_key_value_heads\": 2, \"tie_word_embeddings\": true, \"rope_theta\": 1000.0",
        "\"architectures\": [\"Qwen3ForCausalLM\"], \"model_type\": \"qwen3\", \"num_key_value_heads\": 1, \"head_dim\": 10, \"tie_word_embeddings\": false, \"rope_theta\": 1000.0",
        "\"architectures\": [\"MistralForCausalLM\"], \"model_type\": \"mistral\", \"num_key_value_heads\": 4, \"tie_word_embeddings\": false, \"rope_theta\": 1000.0, \"sliding_window\": 5",
        "\"architectures\": [\"LlamaForCausalLM\"], \"model_type\": \"llama\", \"num_key_value_heads\": 2, \"attention_bias\": true, \"mlp_bias\": true, \"tie_word_embeddings\": false, "
        "\"rope_theta\": 1000.0, \"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 16}",
    };
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        compare_paths(models[i], 1, 1);
        compare_paths(models[i], 17, 17);
        compare_paths(models[i], 17, 5);          /* a last chunk of 2; chunks longer and shorter than the window */
        compare_paths(models[i], 13, 6);          /* a last chunk of 1 */
    }
}

/* ---- sampler ---- */

static void set_probabilities(float *logits, const double *p, int n) { for (int i = 0; i < n; i++) logits[i] = (float)log(p[i]) + 3; }

Test(sampler, nucleus_is_the_shortest_list)
{
    static const double p[] = {0.1, 0.4, 0.1, 0.25, 0.15};     /* descending: 1, 3, 4, then 0 and 2 tie */
    static const struct { double top_p; int n; } cases[] = {{1e-9, 1}, {0.39, 1}, {0.41, 2}, {0.64, 2}, {0.66, 3}, {0.79, 3}, {0.81, 4}, {0.89, 4}, {0.91, 5}, {0.999999, 5}};
    static const int32_t order[] = {1, 3, 4, 0, 2};
    float logits[5];
    set_probabilities(logits, p, 5);
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        struct sampler *s = sampler_new(5, 1, cases[c].top_p, 1);
        double mass = 0;
        sampler_distribution(s, logits);
        cr_assert_eq(s->n, cases[c].n, "top_p %g keeps %d", cases[c].top_p, (int)s->n);
        for (int i = 0; i < s->n; i++) mass += p[s->ids[i]];
        for (int i = 0; i < s->n; i++) {
            cr_assert_eq(s->ids[i], order[i]);
            cr_assert_float_eq(s->p[i], p[order[i]] / mass, 1e-6);
        }
        sampler_free(s);
    }
    struct sampler *all = sampler_new(5, 2, 1, 1);             /* temperature 2: the square root of every probability */
    double sum = 0;
    sampler_distribution(all, logits);
    for (int i = 0; i < 5; i++) sum += sqrt(p[i]);
    cr_assert_eq(all->n, 5);
    for (int i = 0; i < 5; i++) cr_assert(all->ids[i] == i && fabs(all->p[i] - sqrt(p[i]) / sum) < 1e-6);
    sampler_free(all);
}

/* Against the definition, over sizes, temperatures and top_p: sorted, minimal, nothing larger left out, sums to 1. */
Test(sampler, nucleus_by_definition)
{
    static const double top_ps[] = {0.01, 0.3, 0.5, 0.9, 0.99, 0.99999}, temperatures[] = {0.1, 0.7, 1, 5};
    for (int V = 1; V < 700; V = V * 2 + 1)
        for (int t = 0; t < 4; t++)
            for (int k = 0; k < 6; k++) {
                float *logits = new_normal(V, 3, (uint64_t)(V * 100 + t * 10 + k));
                if (V > 5) logits[4] = logits[2];
                struct sampler *s = sampler_new(V, temperatures[t], top_ps[k], 1);
                double *p = xmalloc((size_t)V * sizeof *p), sum = 0, kept = 0, before = 0, total = 0;
                bool *in = xcalloc((size_t)V, 1);
                for (int i = 0; i < V; i++) sum += p[i] = exp(((double)logits[i] - logits[argmax(logits, V)]) / temperatures[t]);
                sampler_distribution(s, logits);
                for (int i = 0; i < s->n; i++) {
                    int32_t id = s->ids[i];
                    if (i) cr_assert(p[s->ids[i - 1]] > p[id] || (p[s->ids[i - 1]] == p[id] && s->ids[i - 1] < id));
                    before = kept;
                    kept += p[id] / sum;
                    total += s->p[i];
                    in[id] = true;
                }
                cr_assert(kept >= top_ps[k] - 1e-12 && before < top_ps[k], "V %d: %g kept, %g before the last, top_p %g", V, kept, before, top_ps[k]);
                cr_assert_float_eq(total, 1, 1e-12);
                for (int i = 0; i < V; i++) {
                    if (in[i]) continue;
                    cr_assert_leq(p[i], p[s->ids[s->n - 1]]);
                }
                for (int i = 0; i < s->n; i++) cr_assert_float_eq(s->p[i], p[s->ids[i]] / sum / kept, 1e-12);
                free(p);
                free(in);
                free(logits);
                sampler_free(s);
            }
}

Test(sampler, small_temperature_is_greedy)
{
    float logits[] = {1, 2.5f, -4, 2.5f, 2.499f};
    static const double temperatures[] = {0, 1e-300, 1e-5};
    for (int t = 0; t < 3; t++) {
        struct sampler *s = sampler_new(5, temperatures[t], 1, 9);
        for (int i = 0; i < 200; i++) {
            int32_t id = sampler_pick(s, logits, i);
            cr_assert(id == 1 || (t && id == 3), "temperature %g draws %d", temperatures[t], id);   /* a tie: greedy takes the lower id */
        }
        sampler_free(s);
    }
}

Test(sampler, draws_follow_seed_and_position)
{
    enum { N = 300 };
    float *logits = new_normal(100, 1, 3);
    struct sampler *a = sampler_new(100, 1, 0.95, 42), *b = sampler_new(100, 1, 0.95, 42), *c = sampler_new(100, 1, 0.95, 43);
    int same_seed = 0, other_seed = 0;
    int32_t first[N];
    for (int i = 0; i < N; i++) first[i] = sampler_pick(a, logits, i);
    for (int i = N - 1; i >= 0; i--) {                             /* in any order */
        same_seed += sampler_pick(b, logits, i) == first[i];
        other_seed += sampler_pick(c, logits, i) == first[i];
    }
    cr_assert_eq(same_seed, N);
    cr_assert_lt(other_seed, N / 4);
    free(logits);
    sampler_free(a);
    sampler_free(b);
    sampler_free(c);
}

/* Pearson's chi-square of 100,000 draws; the bounds are the 0.9999 quantiles, and the draws are the same on every run. */
Test(sampler, draws_have_the_probabilities)
{
    enum { DRAWS = 100000 };
    static const double p[] = {0.02, 0.3, 0.05, 0.2, 0.1, 0.25, 0.03, 0.05};
    static const struct { double temperature, top_p, bound; } cases[] = {{1, 1, 29.9}, {1, 0.8, 25.7}, {0.6, 1, 29.9}, {3, 0.9, 29.9}};
    float logits[8];
    set_probabilities(logits, p, 8);
    for (int c = 0; c < 4; c++) {
        struct sampler *s = sampler_new(8, cases[c].temperature, cases[c].top_p, 2024);
        int count[8] = {0};
        double chi = 0;
        for (int i = 0; i < DRAWS; i++) count[sampler_pick(s, logits, i)]++;
        sampler_distribution(s, logits);
        for (int i = 0; i < s->n; i++) {
            double want = s->p[i] * DRAWS;
            chi += (count[s->ids[i]] - want) * (count[s->ids[i]] - want) / want;
            count[s->ids[i]] = 0;
        }
        for (int i = 0; i < 8; i++) cr_assert_eq(count[i], 0, "an id outside the nucleus was drawn");
        cr_assert_lt(chi, cases[c].bound, "case %d: chi-square %g over %d ids", c, chi, (int)s->n);
        sampler_free(s);
    }
}

Test(sampler, a_masked_id_is_never_drawn)
{
    float logits[] = {-INFINITY, 0, -INFINITY, 0.5f, -INFINITY};
    for (double top_p = 0.5; top_p < 1.6; top_p += 0.5) {
        struct sampler *s = sampler_new(5, 1, fmin(top_p, 1), 1);
        for (int i = 0; i < 2000; i++) { int32_t id = sampler_pick(s, logits, i); cr_assert(id == 1 || id == 3); }
        sampler_free(s);
    }
    logits[1] = -INFINITY;
    struct sampler *s = sampler_new(5, 0, 1, 1);
    cr_assert_eq(sampler_pick(s, logits, 0), 3);
    sampler_free(s);
}
