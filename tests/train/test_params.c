/* The parameter table: where everything lies, that names and shapes are transformers', what params_load() refuses, and first weights. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "base/fp8.h"
#include "base/half.h"
#include "tests/compare.h"
#include "tests/train/fixture.h"

/* ---- names and shapes ---- */

/* named_parameters() of transformers 5.23 for these keys, layer by layer; "rows x cols" or "count". #: the layer's number */
struct family { const char *name, *more; int64_t parameters; const char *outside, *layer; };

static const struct family table[] = {
    {"qwen2", NULL, 12360, "model.embed_tokens.weight 61x24 model.norm.weight 24 lm_head.weight 61x24",
     "self_attn.q_proj.weight 24x24 self_attn.q_proj.bias 24 self_attn.k_proj.weight 12x24 self_attn.k_proj.bias 12 self_attn.v_proj.weight 12x24 self_attn.v_proj.bias 12 "
     "self_attn.o_proj.weight 24x24 mlp.gate_proj.weight 40x24 mlp.up_proj.weight 40x24 mlp.down_proj.weight 24x40 input_layernorm.weight 24 post_attention_layernorm.weight 24"},
    {"qwen2", "{\"tie_word_embeddings\": true}", 10896, "model.embed_tokens.weight 61x24 model.norm.weight 24",
     "self_attn.q_proj.weight 24x24 self_attn.q_proj.bias 24 self_attn.k_proj.weight 12x24 self_attn.k_proj.bias 12 self_attn.v_proj.weight 12x24 self_attn.v_proj.bias 12 "
     "self_attn.o_proj.weight 24x24 mlp.gate_proj.weight 40x24 mlp.up_proj.weight 40x24 mlp.down_proj.weight 24x40 input_layernorm.weight 24 post_attention_layernorm.weight 24"},
    {"llama", NULL, 12264, "model.embed_tokens.weight 61x24 model.norm.weight 24 lm_head.weight 61x24",
     "self_attn.q_proj.weight 24x24 self_attn.k_proj.weight 12x24 self_attn.v_proj.weight 12x24 self_attn.o_proj.weight 24x24 mlp.gate_proj.weight 40x24 mlp.up_proj.weight 40x24 "
     "mlp.down_proj.weight 24x40 input_layernorm.weight 24 post_attention_layernorm.weight 24"},
    {"llama", "{\"attention_bias\": true, \"mlp_bias\": true}", 12616, "model.embed_tokens.weight 61x24 model.norm.weight 24 lm_head.weight 61x24",
     "self_attn.q_proj.weight 24x24 self_attn.q_proj.bias 24 self_attn.k_proj.weight 12x24 self_attn.k_proj.bias 12 self_attn.v_proj.weight 12x24 self_attn.v_proj.bias 12 "
     "self_attn.o_proj.weight 24x24 self_attn.o_proj.bias 24 mlp.gate_proj.weight 40x24 mlp.gate_proj.bias 40 mlp.up_proj.weight 40x24 mlp.up_proj.bias 40 mlp.down_proj.weight 24x40 "
     "mlp.down_proj.bias 24 input_layernorm.weight 24 post_attention_layernorm.weight 24"},
    {"mistral", "{\"head_dim\": 10}", 14568, "model.embed_tokens.weight 61x24 model.norm.weight 24 lm_head.weight 61x24",
     "self_attn.q_proj.weight 40x24 self_attn.k_proj.weight 20x24 self_attn.v_proj.weight 20x24 self_attn.o_proj.weight 24x40 mlp.gate_proj.weight 40x24 mlp.up_proj.weight 40x24 "
     "mlp.down_proj.weight 24x40 input_layernorm.weight 24 post_attention_layernorm.weight 24"},
    {"qwen3", "{\"head_dim\": 10}", 14608, "model.embed_tokens.weight 61x24 model.norm.weight 24 lm_head.weight 61x24",
     "self_attn.q_proj.weight 40x24 self_attn.k_proj.weight 20x24 self_attn.v_proj.weight 20x24 self_attn.o_proj.weight 24x40 self_attn.q_norm.weight 10 self_attn.k_norm.weight 10 "
     "mlp.gate_proj.weight 40x24 mlp.up_proj.weight 40x24 mlp.down_proj.weight 24x40 input_layernorm.weight 24 post_attention_layernorm.weight 24"},
    {"qwen3", "{\"attention_bias\": true, \"tie_word_embeddings\": true}", 10968, "model.embed_tokens.weight 61x24 model.norm.weight 24",
     "self_attn.q_proj.weight 24x24 self_attn.q_proj.bias 24 self_attn.k_proj.weight 12x24 self_attn.k_proj.bias 12 self_attn.v_proj.weight 12x24 self_attn.v_proj.bias 12 "
     "self_attn.o_proj.weight 24x24 self_attn.o_proj.bias 24 self_attn.q_norm.weight 6 self_attn.k_norm.weight 6 mlp.gate_proj.weight 40x24 mlp.up_proj.weight 40x24 "
     "mlp.down_proj.weight 24x40 input_layernorm.weight 24 post_attention_layernorm.weight 24"},
};
enum { N_FAMILIES = sizeof table / sizeof *table, LAYERS = 2 };

static struct params *params_of(const struct family *a, struct model_config **c)
{
    *c = fixture_config(a->name, a->more);
    (*c)->n_layers = LAYERS;
    return params_new(*c);
}

struct seen { char text[8192]; int64_t elements; int n; };

static int see(void *context, const char *name, int n_dims, const int64_t *shape, int64_t offset)
{
    struct seen *s = context;
    (void)offset;
    size_t at = strlen(s->text);
    int64_t count = shape[0] * (n_dims == 2 ? shape[1] : 1);
    if (n_dims == 2) snprintf(s->text + at, sizeof s->text - at, " %s %lldx%lld ", name, (long long)shape[0], (long long)shape[1]);
    else snprintf(s->text + at, sizeof s->text - at, " %s %lld ", name, (long long)shape[0]);
    s->elements += count;
    s->n++;
    return OK;
}

static void expect_tensors(const struct seen *s, const char *list, int layer, const char *what, int *n)
{
    char *copy = xstrdup(list), *rest = copy, *name;
    while ((name = strsep(&rest, " "))) {
        const char *shape = strsep(&rest, " ");
        char *entry = layer < 0 ? xasprintf(" %s %s ", name, shape) : xasprintf(" model.layers.%d.%s %s ", layer, name, shape);
        cr_expect(strstr(s->text, entry), "%s: no tensor \"%s\" in\n%s", what, entry, s->text);
        free(entry);
        ++*n;
    }
    free(copy);
}

Test(params, names_and_shapes_are_those_of_transformers)
{
    for (int i = 0; i < N_FAMILIES; i++) {
        struct model_config *c;
        struct params *t = params_of(&table[i], &c);
        struct seen s = {0};
        int n = 0;
        cr_assert_eq(params_each(t, see, &s), OK);
        expect_tensors(&s, table[i].outside, -1, table[i].name, &n);
        for (int l = 0; l < LAYERS; l++) expect_tensors(&s, table[i].layer, l, table[i].name, &n);
        cr_expect_eq(s.n, n, "%s %s: %d tensors instead of %d:\n%s", table[i].name, table[i].more, s.n, n, s.text);
        cr_expect_eq(s.elements, table[i].parameters, "%s %s: %lld parameters", table[i].name, table[i].more, (long long)s.elements);
        cr_expect_eq(t->parameters, table[i].parameters);
        cr_expect_eq(model_config_parameters(c), table[i].parameters);
        params_free(t);
        model_config_free(c);
    }
}

/* ---- layout ---- */

Test(params, tensors_are_aligned_and_do_not_overlap_and_layers_are_contiguous)
{
    for (int i = 0; i < N_FAMILIES; i++) {
        struct model_config *c;
        struct params *t = params_of(&table[i], &c);
        int64_t at = 0;
        int layer = -1;
        for (int j = 0; j < t->n; j++) {
            const struct param *p = &t->p[j];
            cr_expect_eq(p->offset, at, "%s: parameter %d begins at %lld, not at %lld", table[i].name, j, (long long)p->offset, (long long)at);
            cr_expect_eq(p->offset % PARAM_ALIGN, 0);
            cr_expect_eq(p->count, p->rows * p->cols);
            at += (p->count + PARAM_ALIGN - 1) / PARAM_ALIGN * PARAM_ALIGN;
            /* embedding (-1), layer 0, 1, ..., then -1 again: a layer is never left and entered again */
            cr_expect(p->layer == layer || p->layer == layer + 1 || (p->layer == -1 && layer == LAYERS - 1), "layer %d behind layer %d", p->layer, layer);
            layer = p->layer;
            int64_t row = 0;
            for (int k = 0; k < p->n_parts; k++) {
                cr_expect_eq(p->part[k].row, row);
                row += p->part[k].rows;
            }
            cr_expect_eq(row, p->rows);
            cr_expect_eq(p->decay, p->n_dims == 2, "%s", p->part[0].name);
            cr_expect(p->n_dims == 2 || p->cols == 1);
        }
        cr_expect_eq(t->total, at);
        cr_expect_eq(t->embed->offset, 0);
        cr_expect_eq(t->head == t->embed, c->tie_embeddings);
        params_free(t);
        model_config_free(c);
    }
}

Test(params, bound_pointers_name_what_they_say)
{
    for (int i = 0; i < N_FAMILIES; i++) {
        struct model_config *c;
        struct params *t = params_of(&table[i], &c);
        for (int l = 0; l < LAYERS; l++) {
            const struct layer_params *p = &t->layer[l];
            const struct { const struct param *p; const char *name; int n_parts; bool there; } want[] = {
                {p->attn_norm, "input_layernorm.weight", 1, true}, {p->wqkv, "self_attn.q_proj.weight", 3, true}, {p->bqkv, "self_attn.q_proj.bias", 3, c->qkv_bias},
                {p->q_norm, "self_attn.q_norm.weight", 1, c->qk_norm}, {p->k_norm, "self_attn.k_norm.weight", 1, c->qk_norm}, {p->wo, "self_attn.o_proj.weight", 1, true},
                {p->bo, "self_attn.o_proj.bias", 1, c->o_bias}, {p->mlp_norm, "post_attention_layernorm.weight", 1, true}, {p->w_gate_up, "mlp.gate_proj.weight", 2, true},
                {p->b_gate_up, "mlp.gate_proj.bias", 2, c->mlp_bias}, {p->w_down, "mlp.down_proj.weight", 1, true}, {p->b_down, "mlp.down_proj.bias", 1, c->mlp_bias}};
            for (size_t k = 0; k < sizeof want / sizeof *want; k++) {
                cr_assert_eq(want[k].p != NULL, want[k].there, "%s: %s", table[i].name, want[k].name);
                if (!want[k].p) continue;
                char name[96];
                snprintf(name, sizeof name, "model.layers.%d.%s", l, want[k].name);
                cr_expect_str_eq(want[k].p->part[0].name, name);
                cr_expect_eq(want[k].p->n_parts, want[k].n_parts);
                cr_expect_eq(want[k].p->layer, l);
            }
            /* the order in which the ops read the rows: q, k, v and gate, up */
            cr_expect(strstr(p->wqkv->part[1].name, ".k_proj.") && strstr(p->wqkv->part[2].name, ".v_proj.") && strstr(p->w_gate_up->part[1].name, ".up_proj."));
            if (p->bqkv) cr_expect(strstr(p->bqkv->part[1].name, ".k_proj.bias") && strstr(p->bqkv->part[2].name, ".v_proj.bias"));
            if (p->b_gate_up) cr_expect(strstr(p->b_gate_up->part[1].name, ".up_proj.bias"));
        }
        params_free(t);
        model_config_free(c);
    }
}

/* ---- first weights ---- */

static float *initial(struct backend *be, const struct params *t, uint64_t seed)
{
    float *w = new_poisoned(t->total);
    params_init(t, be, (act *)w, seed);
    return w;
}

Test(params, initial_weights_have_their_statistics_and_follow_the_seed)
{
    struct backend *be;
    struct backend_options device = {.device = "cpu"};
    cr_assert_eq(backend_open(&be, &device), OK);
    struct model_config *c = fixture_config("qwen3", "{\"hidden_size\": 96, \"intermediate_size\": 160, \"vocab_size\": 300, \"attention_bias\": true, \"num_hidden_layers\": 8, \"initializer_range\": 0.05}");
    struct params *t = params_new(c);
    float *w = initial(be, t, 5), *same = initial(be, t, 5), *other = initial(be, t, 6);
    for (int i = 0; i < t->n; i++) {
        const struct param *p = &t->p[i];
        const char *name = p->part[0].name;
        const float *x = w + p->offset;
        cr_expect_eq(memcmp(x, same + p->offset, (size_t)p->count * sizeof *x), 0, "%s: one seed, two results", name);
        if (p->n_dims == 1) {
            float value = strstr(name, "bias") ? 0 : 1;
            for (int64_t j = 0; j < p->count; j++) cr_assert_eq(x[j], value, "%s[%lld] = %g", name, (long long)j, x[j]);
            continue;
        }
        double mean = 0, square = 0, n = (double)p->count, want = strstr(name, "o_proj") || strstr(name, "down_proj") ? 0.05 / sqrt(16) : 0.05;
        for (int64_t j = 0; j < p->count; j++) { mean += x[j] / n; square += (double)x[j] * x[j] / n; }
        /* five standard errors: of the mean s / sqrt(n), of the deviation s / sqrt(2 n) */
        cr_expect_lt(fabs(mean), 5 * want / sqrt(n), "%s: mean %g", name, mean);
        cr_expect_lt(fabs(sqrt(square) - want), 5 * want / sqrt(2 * n), "%s: deviation %g, not %g", name, sqrt(square), want);
        cr_expect_neq(memcmp(x, other + p->offset, (size_t)p->count * sizeof *x), 0, "%s: two seeds, one result", name);
        for (int k = 0; k < i; k++)    /* no two tensors begin alike */
            if (t->p[k].n_dims == 2) cr_expect_neq(x[0] / p->init_std, w[t->p[k].offset] / t->p[k].init_std, "%s repeats %s", name, t->p[k].part[0].name);
    }
    free(w);
    free(same);
    free(other);
    params_free(t);
    model_config_free(c);
    backend_close(be);
}

/* ---- loading ---- */

static char dir[200];
static struct backend *be;

static void open_all(void)
{
    struct backend_options device = {.device = "cpu"};
    const char *base = getenv("TMPDIR");
    snprintf(dir, sizeof dir, "%s/params-XXXXXX", base && strlen(base) < 150 ? base : "/tmp");
    cr_assert(mkdtemp(dir));
    cr_assert_eq(backend_open(&be, &device), OK);
}

static void close_all(void) { backend_close(be); dir_remove_tree(dir); }
TestSuite(params_load, .init = open_all, .fini = close_all);

/* A file with every tensor of a table, its element i of tensor n being value(n, i); `change` may alter the list before it is written. */
struct file { struct tensor_spec spec[96]; int n; };

static float value_of(const char *name, int64_t i)
{
    float h = 0;
    for (const char *s = name; *s; s++) h = fmodf(h * 31 + (float)*s, 251);
    return (h + (float)(i % 97)) / 16;                       /* 12 bits: exact in f16; in bf16 rounded */
}

/* of an fp8 tensor; no NaN */
static unsigned char byte_of(const char *name, int64_t i) { return (unsigned char)((int64_t)value_of(name, i) * 5 + i) & 0xbf; }

static int collect(void *context, const char *name, int n_dims, const int64_t *shape, int64_t offset)
{
    struct file *f = context;
    (void)offset;
    f->spec[f->n] = (struct tensor_spec){.name = xstrdup(name), .dtype = DTYPE_F32, .n_dims = n_dims};
    memcpy(f->spec[f->n++].shape, shape, (size_t)n_dims * sizeof *shape);
    return OK;
}

static int fill(void *context, const struct tensor_spec *spec, size_t offset, size_t bytes, void *out)
{
    (void)context;
    size_t width = dtype_width(spec->dtype);
    for (size_t i = 0; i < bytes / width; i++) {
        float v = value_of(spec->name, (int64_t)(offset / width + i));
        uint16_t half = spec->dtype == DTYPE_F16 ? f16_from_float(v) : bf16_from_float(v);
        int32_t whole = (int32_t)v;
        if (width == 2) memcpy((char *)out + 2 * i, &half, 2);
        else if (width == 1) ((unsigned char *)out)[i] = byte_of(spec->name, (int64_t)(offset + i));
        else if (spec->dtype == DTYPE_F32) memcpy((char *)out + 4 * i, &v, 4);
        else memcpy((char *)out + 4 * i, &whole, 4);
    }
    return OK;
}

static struct tensor_spec *find(struct file *f, const char *name)
{
    for (int i = 0; i < f->n; i++) if (!strcmp(f->spec[i].name, name)) return &f->spec[i];
    cr_assert_fail("no tensor %s", name);
    return NULL;
}

static void append(struct file *f, const char *name, enum dtype dtype, int n_dims, int64_t rows, int64_t cols)
{
    f->spec[f->n++] = (struct tensor_spec){.name = xstrdup(name), .dtype = dtype, .n_dims = n_dims, .shape = {rows, cols}};
}

static struct tensor_set *write_and_open(struct file *f)
{
    struct tensor_set *set = NULL;
    char *path = path_join(dir, "model.safetensors");
    cr_assert_eq(safetensors_write(path, f->spec, f->n, NULL, fill, NULL), OK, "%s", fail_message());
    cr_assert_eq(tensor_set_open(&set, path), OK, "%s", fail_message());
    for (int i = 0; i < f->n; i++) free((char *)f->spec[i].name);
    free(path);
    return set;
}

static struct file file_of(const struct params *t)
{
    struct file f = {.n = 0};
    params_each(t, collect, &f);
    return f;
}

struct loaded { const float *w; float (*rounded)(float); };
static float as_is(float v) { return v; }
static float through_bf16(float v) { return bf16_to_float(bf16_from_float(v)); }

static int expect_loaded(void *context, const char *name, int n_dims, const int64_t *shape, int64_t offset)
{
    const struct loaded *x = context;
    for (int64_t i = 0; i < shape[0] * (n_dims == 2 ? shape[1] : 1); i++)
        cr_assert_eq(x->w[offset + i], x->rounded(value_of(name, i)), "%s[%lld] = %g", name, (long long)i, x->w[offset + i]);
    return OK;
}

Test(params_load, every_tensor_lands_in_its_place_from_three_types)
{
    static const enum dtype types[] = {DTYPE_F32, DTYPE_F16, DTYPE_BF16};
    for (int a = 0; a < N_FAMILIES; a++)
        for (int d = 0; d < 3; d++) {
            struct model_config *c;
            struct params *t = params_of(&table[a], &c);
            struct file f = file_of(t);
            for (int i = 0; i < f.n; i++) f.spec[i].dtype = types[d];
            append(&f, "model.layers.1.self_attn.rotary_emb.inv_freq", DTYPE_F32, 1, 3, 0);      /* old exports carry it */
            struct tensor_set *set = write_and_open(&f);
            float *w = new_poisoned(t->total);
            cr_assert_eq(params_load(t, be, (act *)w, set, "here", NULL), OK, "%s", fail_message());
            struct loaded x = {w, types[d] == DTYPE_BF16 ? through_bf16 : as_is};
            params_each(t, expect_loaded, &x);
            /* by several threads: written where it stays, and through buffers as for a device with a memory of its own */
            for (int apart = 0; apart < 2; apart++) {
                struct backend device = *be;
                struct weight_home home = {.layout = weight_layout_new(t, be->act_dtype, 0, 0), .device = w};
                device.host_memory = !apart;
                fill_nan(w, t->total);
                cr_assert_eq(weights_load(t, &device, &home, set, "here", NULL), OK, "%s", fail_message());
                params_each(t, expect_loaded, &x);
                weight_layout_free(&home.layout);
            }
            free(w);
            tensor_set_close(set);
            params_free(t);
            model_config_free(c);
        }
}

/* A file that loses its end between opening and loading is an error with its name. */
Test(params_load, a_file_cut_after_it_was_opened)
{
    struct model_config *c;
    struct params *t = params_of(&table[0], &c);
    struct file f = file_of(t);
    struct tensor_set *set = write_and_open(&f);
    float *w = new_poisoned(t->total);
    struct weight_home home = {.layout = weight_layout_new(t, be->act_dtype, 0, 0), .device = w};
    cr_assert_eq(truncate(tensor_set_file_path(set, 0), path_size(tensor_set_file_path(set, 0)) - 4), 0);
    cr_expect_eq(weights_load(t, be, &home, set, "here", NULL), ERR_INPUT);
    cr_expect(strstr(fail_message(), tensor_set_file_path(set, 0)) && strstr(fail_message(), "ends early"), "%s", fail_message());
    weight_layout_free(&home.layout);
    free(w);
    tensor_set_close(set);
    params_free(t);
    model_config_free(c);
}

/* One fault each, and the words its message must have. */
static void drop(struct file *f, const char *name)
{
    struct tensor_spec *s = find(f, name);
    free((char *)s->name);
    *s = f->spec[--f->n];
}
static void fault_missing_matrix(struct file *f) { drop(f, "model.layers.1.self_attn.v_proj.weight"); }
static void fault_missing_bias(struct file *f) { drop(f, "model.layers.0.self_attn.k_proj.bias"); }
static void fault_missing_head(struct file *f) { drop(f, "lm_head.weight"); }
static void fault_missing_embedding(struct file *f) { drop(f, "model.embed_tokens.weight"); }
static void fault_extra(struct file *f) { append(f, "model.layers.0.self_attn.o_proj.bias", DTYPE_F32, 1, 24, 0); }
static void fault_extra_layer(struct file *f) { append(f, "model.layers.2.input_layernorm.weight", DTYPE_F32, 1, 24, 0); }
static void fault_extra_scale(struct file *f) { append(f, "model.layers.0.mlp.up_proj.weight_scale_inv", DTYPE_F32, 2, 1, 1); }
static void fault_rows(struct file *f) { find(f, "model.layers.0.mlp.up_proj.weight")->shape[0] = 41; }
static void fault_columns(struct file *f) { find(f, "model.layers.1.self_attn.k_proj.weight")->shape[1] = 25; }
static void fault_transposed(struct file *f) { struct tensor_spec *s = find(f, "model.layers.0.mlp.down_proj.weight"); s->shape[0] = 40; s->shape[1] = 24; }
static void fault_dimensions(struct file *f) { struct tensor_spec *s = find(f, "model.norm.weight"); s->n_dims = 2; s->shape[1] = 1; }
static void fault_flat(struct file *f) { struct tensor_spec *s = find(f, "model.layers.0.self_attn.q_proj.weight"); s->n_dims = 1; s->shape[0] = 576; }
static void fault_scalar(struct file *f) { find(f, "model.norm.weight")->n_dims = 0; }
static void fault_eight(struct file *f) { struct tensor_spec *s = find(f, "model.norm.weight"); s->n_dims = 8; for (int i = 1; i < 8; i++) s->shape[i] = 1; }
static void fault_no_scale(struct file *f) { find(f, "model.layers.0.self_attn.o_proj.weight")->dtype = DTYPE_F8_E4M3; }
static void fault_norm_without_scale(struct file *f) { find(f, "model.norm.weight")->dtype = DTYPE_F8_E4M3; }
static void fault_embedding_without_scale(struct file *f) { find(f, "model.embed_tokens.weight")->dtype = DTYPE_F8_E4M3; }
static void fault_e5m2(struct file *f) { find(f, "model.layers.0.self_attn.o_proj.weight")->dtype = DTYPE_F8_E5M2; }
static void fault_integer(struct file *f) { find(f, "model.layers.0.self_attn.o_proj.weight")->dtype = DTYPE_I32; }

Test(params_load, faults_are_refused_by_name)
{
    static const struct { void (*change)(struct file *); const char *words[3]; } cases[] = {
        {fault_missing_matrix, {"model.layers.1.self_attn.v_proj.weight", "missing"}}, {fault_missing_bias, {"model.layers.0.self_attn.k_proj.bias", "missing"}},
        {fault_missing_head, {"lm_head.weight", "missing"}}, {fault_missing_embedding, {"model.embed_tokens.weight", "missing"}},
        {fault_extra, {"model.layers.0.self_attn.o_proj.bias", "belongs to no part"}}, {fault_extra_layer, {"model.layers.2.input_layernorm.weight", "belongs to no part"}},
        {fault_extra_scale, {"weight_scale_inv", "belongs to no part"}}, {fault_rows, {"mlp.up_proj.weight", "[41, 24]", "[40, 24]"}},
        {fault_columns, {"k_proj.weight", "[12, 25]", "[12, 24]"}}, {fault_transposed, {"down_proj.weight", "[40, 24]", "[24, 40]"}},
        {fault_dimensions, {"model.norm.weight", "[24, 1]", "[24]"}}, {fault_flat, {"q_proj.weight", "[576]", "[24, 24]"}}, {fault_scalar, {"model.norm.weight", "[]", "[24]"}},
        {fault_eight, {"model.norm.weight", "1, 1", "[24]"}}, {fault_integer, {"o_proj.weight", "I32"}},
        {fault_no_scale, {"o_proj.weight", "F8_E4M3", "no scale"}}, {fault_norm_without_scale, {"model.norm.weight", "no scale"}}, {fault_embedding_without_scale, {"embed_tokens.weight", "no scale"}},
        {fault_e5m2, {"o_proj.weight", "F8_E5M2"}}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct model_config *c;
        struct params *t = params_of(&table[0], &c);
        struct file f = file_of(t);
        cases[i].change(&f);
        struct tensor_set *set = write_and_open(&f);
        float *w = new_poisoned(t->total);
        cr_expect_eq(params_load(t, be, (act *)w, set, "some/model", NULL), ERR_INPUT, "case %zu", i);
        cr_expect(strstr(fail_message(), "some/model"), "%s", fail_message());
        for (int k = 0; k < 3 && cases[i].words[k]; k++) cr_expect(strstr(fail_message(), cases[i].words[k]), "case %zu: no \"%s\" in: %s", i, cases[i].words[k], fail_message());
        free(w);
        tensor_set_close(set);
        params_free(t);
        model_config_free(c);
    }
}

/* fp8 matrices beside a head, norms and biases in other types, as published; layers that are not read keep their scales to themselves. Without what belongs to
 * activations and with a scale too many it is the file that is wrong. */
Test(params_load, fp8_weights_with_scales_and_everything_else_without)
{
    static const int layer_of[] = {0, 2, 4};
    const struct quantization rows = {SCALE_ROW, 0, 0, "compressed-tensors"};
    for (int fault = 0; fault < 2; fault++) {
        struct model_config *big = fixture_config("llama", "{\"num_hidden_layers\": 6}"), *small = fixture_config("llama", NULL);
        struct params *from = params_new(big), *t = params_new(small);
        struct file f = file_of(from);
        int tensors = f.n;
        cr_assert_leq(tensors + 14, (int)(sizeof f.spec / sizeof *f.spec));
        for (int i = 0; i < tensors && f.n < tensors + 13; i++) {
            if (!strstr(f.spec[i].name, "_proj")) continue;
            char *scale = xasprintf("%s_scale", f.spec[i].name);
            f.spec[i].dtype = DTYPE_F8_E4M3;
            append(&f, scale, DTYPE_F32, 2, f.spec[i].shape[0], 1);
            free(scale);
        }
        append(&f, fault ? "model.layers.0.self_attn.weight_scale" : "model.layers.0.self_attn.k_scale", DTYPE_F32, 1, 1, 0);
        struct tensor_set *set = write_and_open(&f);
        cr_assert_eq(tensor_set_bind_scales(set, &rows, "teacher"), OK, "%s", fail_message());
        float *w = new_poisoned(t->total);
        int rc = params_load(t, be, (act *)w, set, "teacher", layer_of);
        if (fault) {
            cr_expect_eq(rc, ERR_INPUT);
            cr_expect(strstr(fail_message(), "model.layers.0.self_attn.weight_scale belongs to no part"), "%s", fail_message());
        } else {
            static const char name[] = "model.layers.0.mlp.up_proj.weight", scale[] = "model.layers.0.mlp.up_proj.weight_scale";
            const struct param *p = t->layer[0].w_gate_up;
            cr_assert_eq(rc, OK, "%s", fail_message());
            for (int64_t i = 0; i < 40 * 24; i++)
                cr_assert_eq(w[p->offset + 40 * 24 + i], e4m3_to_float(byte_of(name, i)) * value_of(scale, i / 24), "%s[%lld]", name, (long long)i);
            for (int64_t i = 0; i < 24; i++) cr_assert_eq(w[t->norm->offset + i], value_of("model.norm.weight", i));
        }
        free(w);
        tensor_set_close(set);
        params_free(t);
        params_free(from);
        model_config_free(big);
        model_config_free(small);
    }
}

/* Tied embeddings with a head in the file: a copy is fine, anything else contradicts config.json. */
static int fill_tied(void *context, const struct tensor_spec *spec, size_t offset, size_t bytes, void *out)
{
    struct tensor_spec as_embedding = *spec;
    if (!strcmp(spec->name, "lm_head.weight")) as_embedding.name = "model.embed_tokens.weight";
    int rc = fill(NULL, &as_embedding, offset, bytes, out);
    if (*(bool *)context && !strcmp(spec->name, "lm_head.weight")) ((float *)out)[bytes / 4 - 1] += 1;
    return rc;
}

Test(params_load, a_head_beside_tied_embeddings_must_be_the_same)
{
    for (int differs = 0; differs < 2; differs++) {
        struct model_config *c;
        struct params *t = params_of(&table[1], &c);
        struct file f = file_of(t);
        struct tensor_set *set = NULL;
        bool change = differs;
        char *path = path_join(dir, "model.safetensors");
        append(&f, "lm_head.weight", DTYPE_F32, 2, FIXTURE_VOCAB, 24);
        cr_assert_eq(safetensors_write(path, f.spec, f.n, NULL, fill_tied, &change), OK, "%s", fail_message());
        cr_assert_eq(tensor_set_open(&set, path), OK, "%s", fail_message());
        float *w = new_poisoned(t->total);
        cr_expect_eq(params_load(t, be, (act *)w, set, "here", NULL), differs ? ERR_INPUT : OK);
        if (differs) cr_expect(strstr(fail_message(), "lm_head.weight") && strstr(fail_message(), "tie_word_embeddings"), "%s", fail_message());
        for (int i = 0; i < f.n; i++) free((char *)f.spec[i].name);
        free(path);
        free(w);
        tensor_set_close(set);
        params_free(t);
        model_config_free(c);
    }
}

/* A student of layers 0, 2, 4 of six; the layers between are no extra tensors, one tensor too many in a layer that is read is. */
Test(params_load, layers_come_from_where_the_map_says)
{
    static const int layer_of[] = {0, 2, 4};
    for (int extra = 0; extra < 2; extra++) {
        struct model_config *big = fixture_config("llama", "{\"num_hidden_layers\": 6}"), *small = fixture_config("llama", NULL);
        struct params *from = params_new(big), *t = params_new(small);
        struct file f = file_of(from);
        append(&f, extra ? "model.layers.2.self_attn.q_proj.bias" : "model.layers.3.self_attn.q_proj.bias", DTYPE_F32, 1, 24, 0);
        struct tensor_set *set = write_and_open(&f);
        float *w = new_poisoned(t->total);
        int rc = params_load(t, be, (act *)w, set, "teacher", layer_of);
        if (extra) {
            cr_expect_eq(rc, ERR_INPUT);
            cr_expect(strstr(fail_message(), "model.layers.2.self_attn.q_proj.bias"), "%s", fail_message());
        } else {
            cr_assert_eq(rc, OK, "%s", fail_message());
            for (int l = 0; l < 3; l++) {
                char name[96];
                snprintf(name, sizeof name, "model.layers.%d.mlp.up_proj.weight", layer_of[l]);
                const struct param *p = t->layer[l].w_gate_up;
                for (int64_t i = 0; i < 40 * 24; i++) cr_assert_eq(w[p->offset + 40 * 24 + i], value_of(name, i), "%s", name);
            }
        }
        free(w);
        tensor_set_close(set);
        params_free(t);
        params_free(from);
        model_config_free(big);
        model_config_free(small);
    }
}
