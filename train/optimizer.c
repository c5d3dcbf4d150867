/* See optimizer.h; the update of an element is kernels/<backend>/adamw. */
#include "train/optimizer.h"

#include <math.h>
#include <stdlib.h>

#include "base/error.h"

struct optimizer *optimizer_new(struct model *model, const struct adamw_args *args, struct memory_plan *plan)
{
    struct optimizer *o = xcalloc(1, sizeof *o);
    o->model = model;
    o->args = *args;
    bool master = model->be->master;
    size_t bytes = (size_t)model->params->total * dtype_width(model->be->moment_dtype);
    const char *key = master ? "train.recipe" : "the model";
    memory_add(plan, "optimizer moments", key, &o->m, bytes);
    memory_add(plan, "optimizer moments", key, &o->v, bytes);
    if (master) memory_add(plan, "optimizer master weights", key, &o->master, (size_t)model->params->total * sizeof *o->master);
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

enum { STAGE = 1 << 20 };   /* floats moved at a time: through the host, since it is done once, at the start */

struct master_load { struct optimizer *o; float *stage; const char *where; };

static int load_tensor(void *context, const struct tensor_view *v, int64_t offset)
{
    struct master_load *l = context;
    struct backend *be = l->o->model->be;
    for (int64_t first = 0; first < v->count; first += STAGE) {
        int64_t n = v->count - first < STAGE ? v->count - first : STAGE;
        int rc = tensor_to_float(v, first, n, l->stage);
        if (rc != OK) return fail_in(rc, "%s", l->where);
        be->ops->upload(be, l->o->master + offset + first, l->stage, (size_t)n * sizeof *l->stage);
    }
    return OK;
}

int optimizer_load_master(struct optimizer *o, const struct tensor_set *set, const char *where, const int *layer_of)
{
    if (!o->master) return OK;
    struct master_load l = {o, xmalloc(STAGE * sizeof *l.stage), where};
    int rc = params_match(o->model->params, set, where, layer_of, load_tensor, &l);
    free(l.stage);
    o->master_filled = rc == OK;
    return rc;
}

void optimizer_master_from_weights(struct optimizer *o)
{
    if (!o->master) return;
    struct model *model = o->model;
    struct backend *be = model->be;
    float *stage = xmalloc(STAGE * sizeof *stage);
    for (int i = 0; i < model->params->n; i++) {
        const struct param *p = &model->params->p[i];
        const char *weights = (const char *)weight_at(be, model->weights, p);
        for (int64_t first = 0; first < p->count; first += STAGE) {
            int64_t n = p->count - first < STAGE ? p->count - first : STAGE;
            be->ops->download_act(be, stage, (const act *)(weights + (size_t)first * dtype_width(be->act_dtype)), n);
            be->ops->upload(be, o->master + p->offset + first, stage, (size_t)n * sizeof *stage);
        }
    }
    free(stage);
    o->master_filled = true;
}

void optimizer_queue_norm(struct optimizer *o) { o->model->be->ops->sum_squares(o->model->be, o->norm2, o->model->grads, o->model->params->total); }

double optimizer_read_norm(struct optimizer *o)
{
    double norm2;
    o->model->be->ops->download(o->model->be, &norm2, o->norm2, sizeof norm2);
    return sqrt(norm2);
}

double optimizer_norm(struct optimizer *o)
{
    optimizer_queue_norm(o);
    return optimizer_read_norm(o);
}

void optimizer_step(struct optimizer *o, int64_t step, double lr)
{
    struct model *model = o->model;
    struct backend *be = model->be;
    CHECK(!o->master || o->master_filled, "a step with master weights that nobody has filled");
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
