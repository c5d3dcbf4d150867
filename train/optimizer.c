/* See optimizer.h; the update of an element is kernels/<backend>/adamw. */
#include "train/optimizer.h"

#include <math.h>

#include "base/error.h"

struct optimizer *optimizer_new(struct model *model, const struct adamw_args *args, struct memory_plan *plan)
{
    struct optimizer *o = xcalloc(1, sizeof *o);
    o->model = model;
    o->args = *args;
    size_t bytes = (size_t)model->params->total * dtype_width(model->be->moment_dtype);
    memory_add(plan, "optimizer moments", "the model", &o->m, bytes);
    memory_add(plan, "optimizer moments", "the model", &o->v, bytes);
    memory_add(plan, "batch and tables", "train.micro_rows", &o->norm2, sizeof *o->norm2);
    return o;
}

void optimizer_free(struct optimizer *o) { free(o); }

void optimizer_ready(struct optimizer *o)
{
    size_t bytes = (size_t)o->model->params->total * dtype_width(o->model->be->moment_dtype);
    o->model->be->ops->fill_zero(o->model->be, o->m, bytes);
    o->model->be->ops->fill_zero(o->model->be, o->v, bytes);
}

double optimizer_norm(struct optimizer *o)
{
    struct backend *be = o->model->be;
    double norm2;
    be->ops->sum_squares(be, o->norm2, o->model->grads, o->model->params->total);
    be->ops->download(be, &norm2, o->norm2, sizeof norm2);
    return sqrt(norm2);
}

void optimizer_step(struct optimizer *o, int64_t step, double lr)
{
    struct model *model = o->model;
    struct backend *be = model->be;
    for (int i = 0; i < model->params->n; i++) {
        const struct param *p = &model->params->p[i];
        size_t at = (size_t)p->offset * dtype_width(be->moment_dtype);
        struct adamw_args args = o->args;
        args.lr = lr;
        args.step = step;
        args.first = p->offset;
        if (!p->decay) args.weight_decay = 0;
        be->ops->adamw(be, weight_at(be, model->weights, p), o->master ? o->master + p->offset : NULL, grad_at(be, model->grads, p),
                       (moment *)((char *)o->m + at), (moment *)((char *)o->v + at), p->count, o->norm2, &args);
    }
}
