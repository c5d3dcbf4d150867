/* The scales of published fp8 checkpoints: which tensor scales which, what shape it must have, and number times scale. Declared in safetensors.h. */
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/fp8.h"
#include "data/safetensors_internal.h"

static bool ends_with(const char *name, const char *suffix)
{
    size_t n = strlen(name), m = strlen(suffix);
    return n > m && !strcmp(name + n - m, suffix);
}

/* Scales of activations, their bounds, and scales of the kv cache, as AutoFP8, llm-compressor, ModelOpt, transformers and fbgemm name them. They say how another
 * program rounds what it computes, not what the weights are. */
static bool scales_activations(const char *name)
{
    static const char *const suffixes[] = {".input_scale", ".output_scale", ".activation_scale", ".act_scale", ".input_scale_ub",
                                          ".k_scale", ".v_scale", ".kv_scale", ".q_scale"};
    for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++) if (ends_with(name, suffixes[i])) return true;
    return false;
}

static struct tensor_view *find(struct tensor_set *s, const char *name, const char *suffix)
{
    char *full = xasprintf("%s%s", name, suffix);
    struct tensor_view *v = (struct tensor_view *)tensor_set_find(s, full);
    free(full);
    return v;
}

static int64_t blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }

/* shape: what scales of this kind have; and [rows] or [rows, 1] by rows, and [], [1] or [1, 1] for a tensor */
static bool has_shape(const struct tensor_view *v, enum scale_kind kind, int64_t down, int64_t across)
{
    if (kind == SCALE_BLOCK) return v->n_dims == 2 && v->shape[0] == down && v->shape[1] == across;
    if (kind == SCALE_ROW) return (v->n_dims == 1 || (v->n_dims == 2 && v->shape[1] == 1)) && v->shape[0] == down;
    return v->n_dims <= 2 && v->count == 1;
}

static int bind(struct tensor_scale *scale, struct tensor_view *weight, struct tensor_view *from, const struct quantization *q, const char *where)
{
    const char *name = from->name;
    char has[80] = "", text[64];
    if (weight->dtype != DTYPE_F8_E4M3)
        return fail(ERR_INPUT, "%s: tensor %s scales %s, which has type %s; scaled weights are read from F8_E4M3", where, tensor_name_shown(name),
                    tensor_name_shown(weight->name), dtype_name(weight->dtype));
    if (from->dtype != DTYPE_F32 && from->dtype != DTYPE_F16 && from->dtype != DTYPE_BF16)
        return fail(ERR_INPUT, "%s: tensor %s has type %s; scales are read from F32, F16 and BF16", where, tensor_name_shown(name), dtype_name(from->dtype));
    if (weight->n_dims != 2 && q->scales != SCALE_TENSOR)
        return fail(ERR_INPUT, "%s: tensor %s is no matrix, and config.json says %s; such a tensor is read from F32, F16 and BF16", where, tensor_name_shown(weight->name),
                    scales_text(q->scales, q->block_rows, q->block_cols, text));
    int64_t rows = weight->n_dims == 2 ? weight->shape[0] : 1, cols = weight->n_dims == 2 ? weight->shape[1] : weight->count;
    *scale = (struct tensor_scale){.kind = q->scales, .block_rows = q->scales == SCALE_TENSOR ? rows : q->scales == SCALE_ROW ? 1 : q->block_rows,
                                   .block_cols = q->scales == SCALE_BLOCK ? q->block_cols : cols};
    if (!weight->count) return fail(ERR_INPUT, "%s: tensor %s is empty", where, tensor_name_shown(weight->name));
    int64_t down = blocks(rows, scale->block_rows);
    scale->across = blocks(cols, scale->block_cols);
    if (!has_shape(from, scale->kind, down, scale->across)) {
        for (int d = 0; d < from->n_dims && strlen(has) < 60; d++) snprintf(has + strlen(has), 24, "%s%lld", d ? ", " : "", (long long)from->shape[d]);
        return fail(ERR_INPUT, "%s: tensor %s has shape [%s]; config.json says %s: [%lld, %lld] for the [%lld, %lld] of %s", where,
                    tensor_name_shown(name), has, scales_text(q->scales, q->block_rows, q->block_cols, text), (long long)down, (long long)scale->across, (long long)rows,
                    (long long)cols, tensor_name_shown(weight->name));
    }
    scale->count = from->count;
    scale->value = xmalloc((size_t)scale->count * sizeof *scale->value);
    int rc = tensor_to_float(from, 0, scale->count, scale->value);
    CHECK(rc == OK, "tensor %s was converted before", name);
    for (int64_t i = 0; i < scale->count; i++)
        if (!(scale->value[i] > 0) || isinf(scale->value[i]))
            return fail(ERR_INPUT, "%s: tensor %s: element %lld is %g; a scale is finite and above 0, download the file again", where,
                        tensor_name_shown(name), (long long)i, (double)scale->value[i]);
    weight->scale = scale;
    from->is_scale = true;
    return OK;
}

int tensor_set_bind_scales(struct tensor_set *s, const struct quantization *q, const char *where)
{
    if (q->scales == SCALE_NONE) return OK;
    CHECK(!s->scales, "%s: scales are bound twice", where);
    s->scales = xcalloc((size_t)s->n + 1, sizeof *s->scales);
    for (int i = 0; i < s->n; i++) {
        struct tensor_view *weight = &s->entries[i].view;
        if (scales_activations(weight->name)) { weight->is_scale = true; continue; }
        if (ends_with(weight->name, ".weight_zero_point"))
            return fail(ERR_INPUT, "%s: tensor %s: zero points are not implemented; use the checkpoint in bf16, f16 or f32", where, tensor_name_shown(weight->name));
        struct tensor_view *plain = find(s, weight->name, "_scale"), *inverse = find(s, weight->name, "_scale_inv");
        if (plain && inverse)
            return fail(ERR_INPUT, "%s: tensor %s has two scales, weight_scale and weight_scale_inv; keep the right one", where, tensor_name_shown(weight->name));
        if (!plain && !inverse) continue;
        int rc = bind(&s->scales[s->n_scales++], weight, plain ? plain : inverse, q, where);
        if (rc != OK) return rc;
    }
    return OK;
}

void tensor_row_scales(const struct tensor_view *t, int64_t first, int64_t n, float *out)
{
    const struct tensor_scale *s = t->scale;
    CHECK(s && s->kind != SCALE_BLOCK && first >= 0 && n >= 0 && (s->kind == SCALE_TENSOR || n <= s->count - first),
          "tensor %s has no scales of rows %lld to %lld", t->name, (long long)first, (long long)(first + n));
    for (int64_t i = 0; i < n; i++) out[i] = s->value[s->kind == SCALE_ROW ? first + i : 0];
}

bool tensor_same(const struct tensor_view *a, const struct tensor_view *b)
{
    const struct tensor_scale *s = a->scale, *r = b->scale;
    if (a->dtype != b->dtype || a->n_dims != b->n_dims || memcmp(a->shape, b->shape, (size_t)a->n_dims * sizeof *a->shape)) return false;
    if (memcmp(a->data, b->data, a->bytes)) return false;
    return !s == !r && (!s || (s->count == r->count && !memcmp(s->value, r->value, (size_t)s->count * sizeof *s->value)));
}

void tensor_scaled_block(const struct tensor_view *t, int64_t first, int64_t n, float *out)
{
    const struct tensor_scale *s = t->scale;
    const uint8_t *in = (const uint8_t *)t->data + first;
    int64_t cols = t->n_dims == 2 ? t->shape[1] : t->count, row = first / cols, col = first % cols;
    float number[256];
    for (int q = 0; q < 256; q++) number[q] = e4m3_to_float((uint8_t)q);
    while (n > 0) {       /* as far as one scale goes in this row */
        int64_t end = (col / s->block_cols + 1) * s->block_cols, span = (end < cols ? end : cols) - col;
        float scale = s->value[row / s->block_rows * s->across + col / s->block_cols];
        if (span > n) span = n;
        for (int64_t i = 0; i < span; i++) out[i] = number[in[i]] * scale;
        in += span;
        out += span;
        n -= span;
        if ((col += span) == cols) { col = 0; row++; }
    }
}
