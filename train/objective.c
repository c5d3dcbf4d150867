/* See objective.h; the maths of a row is kernels/<backend>/distill_loss. */
#include "train/objective.h"

#include <math.h>

#include "base/error.h"

enum { SUMS = 4 };

struct objective *objective_new(struct model *m, const struct distill_args *args, int64_t Vv, enum target_kind kind, int k, struct memory_plan *plan)
{
    struct objective *o = xcalloc(1, sizeof *o);
    *o = (struct objective){.m = m, .args = *args, .Vv = Vv, .kind = kind, .k = k, .full_scale = 1};
    size_t rows = (size_t)m->o.head_rows;
    const char *row = "objective", *key = "train.chunk_tokens";
    if (kind == TARGET_TOPK || kind == TARGET_SAMPLES) {
        memory_add(plan, row, key, &o->head_ids, rows * (size_t)k * sizeof *o->head_ids);
        memory_add(plan, row, key, &o->head_logprob, rows * (size_t)k * sizeof *o->head_logprob);
    }
    if (kind == TARGET_TOPK) memory_add(plan, row, key, &o->tail_logmass, rows * sizeof *o->tail_logmass);
    if (kind == TARGET_SAMPLES) memory_add(plan, row, key, &o->weight, rows * (size_t)k * sizeof *o->weight);
    if (kind == TARGET_FULL) memory_add(plan, row, key, &o->full, rows * (size_t)Vv * sizeof *o->full);
    memory_add(plan, row, key, &o->kd, rows * sizeof *o->kd);
    memory_add(plan, row, key, &o->ce, rows * sizeof *o->ce);
    memory_add(plan, row, key, &o->kd_squares, rows * sizeof *o->kd_squares);
    memory_add(plan, row, key, &o->ce_squares, rows * sizeof *o->ce_squares);
    memory_add(plan, row, key, &o->sums, SUMS * sizeof *o->sums);
    return o;
}

void objective_free(struct objective *o) { free(o); }

void objective_reset(struct objective *o) { o->m->be->ops->fill_zero(o->m->be, o->sums, SUMS * sizeof *o->sums); }

static void upload_targets(struct objective *o, const struct batch *b, int64_t first, int64_t rows)
{
    const struct ops *op = o->m->be->ops;
    struct backend *be = o->m->be;
    if (o->kind == TARGET_TOPK || o->kind == TARGET_SAMPLES) {
        op->upload(be, o->head_ids, b->head_ids + first * o->k, (size_t)(rows * o->k) * sizeof *o->head_ids);
        op->upload(be, o->head_logprob, b->head_logprob + first * o->k, (size_t)(rows * o->k) * sizeof *o->head_logprob);
    }
    if (o->kind == TARGET_TOPK) op->upload(be, o->tail_logmass, b->tail_logmass + first, (size_t)rows * sizeof *o->tail_logmass);
    if (o->kind == TARGET_SAMPLES) op->upload(be, o->weight, b->weight + first * o->k, (size_t)(rows * o->k) * sizeof *o->weight);
    if (o->kind == TARGET_FULL && !o->teacher) op->upload(be, o->full, b->full_logits + first * o->Vv, (size_t)(rows * o->Vv) * sizeof *o->full);
}

void objective_run(struct objective *o, const struct batch *b, double step_targets, bool backward)
{
    struct model *m = o->m;
    const struct ops *op = m->be->ops;
    const struct param *head = m->params->head;
    int64_t C = m->c->hidden_size, V = m->c->vocab_size;
    size_t act_bytes = (size_t)C * dtype_width(m->be->act_dtype);
    struct distill_args args = o->args;
    args.gradient_scale = (float)(1.0 / step_targets);
    struct distill_losses out = {.kd = o->kd, .ce = o->ce, .kd_squares = o->measure ? o->kd_squares : NULL, .ce_squares = o->measure ? o->ce_squares : NULL};

    for (int64_t first = 0; first < m->n; first += m->o.head_rows) {
        int64_t rows = m->n - first < m->o.head_rows ? m->n - first : m->o.head_rows;
        act *hidden = (act *)((char *)m->hidden + (size_t)first * act_bytes), *d_hidden = (act *)((char *)m->d_hidden + (size_t)first * act_bytes);
        struct distill_targets t = {.labels = m->labels + first, .kind = o->kind, .K = o->k, .head_ids = o->head_ids, .head_logprob = o->head_logprob,
                                    .tail_logmass = o->tail_logmass, .weight = o->weight, .full = o->full, .full_dtype = DTYPE_F16, .full_stride = o->Vv, .full_scale = o->teacher ? o->full_scale : b->full_scale};
        if (o->teacher) {
            t.full = (const char *)o->teacher + (size_t)(first * o->teacher_stride) * dtype_width(o->teacher_dtype);
            t.full_dtype = o->teacher_dtype;
            t.full_stride = o->teacher_stride;
        }
        upload_targets(o, b, first, rows);
        model_logits(m, first, rows);
        op->distill_loss(m->be, m->logits, &out, &t, &args, rows, V, o->Vv);
        op->sum_rows(m->be, &o->sums[0], o->kd, rows);
        op->sum_rows(m->be, &o->sums[1], o->ce, rows);
        if (o->measure) {
            op->sum_rows(m->be, &o->sums[2], o->kd_squares, rows);
            op->sum_rows(m->be, &o->sums[3], o->ce_squares, rows);
        }
        if (!backward) continue;
        op->linear_backward_weight(m->be, grad_at(m->be, m->grads, head), NULL, m->logits, hidden, rows, C, V);
        op->linear_backward_input(m->be, d_hidden, m->logits, weight_at(m->be, m->weights, head), rows, C, V);
    }
}

void objective_read(struct objective *o, double *kd_sum, double *ce_sum)
{
    double sums[2];
    o->m->be->ops->download(o->m->be, sums, o->sums, sizeof sums);
    *kd_sum = sums[0];
    *ce_sum = sums[1];
}

void objective_norms(struct objective *o, double step_targets, double *kd_norm, double *ce_norm)
{
    double sums[SUMS];
    o->m->be->ops->download(o->m->be, sums, o->sums, sizeof sums);
    *kd_norm = sqrt(sums[2]) / step_targets;
    *ce_norm = sqrt(sums[3]) / step_targets;
}

bool objective_has_teacher(const struct objective *o, const struct batch *b)
{
    if (o->kind == TARGET_NONE) return false;
    if (o->kind == TARGET_FULL) return true;             /* no row of logits is no distribution */
    for (int64_t i = 0; i < b->n; i++)
        for (int64_t e = i * o->k; b->labels[i] >= 0 && e < (i + 1) * o->k; e++)
            if (o->kind == TARGET_SAMPLES ? b->weight[e] > 0 : b->head_logprob[e] > -INFINITY) return true;
    return false;
}
