/* distill check CASE_DIR: this build against a reference that transformers and PyTorch made (scripts/make_reference.py).
 *
 * A case holds teacher/, student/, reference.json and reference.safetensors: ids, mask, logits of both models, losses of several
 * kinds, dlogits of the first sequence, the forward KL's gradient of every parameter, and loss, gradient norm and weights over ten AdamW
 * steps. Losses are means over mask = 1 positions times T^2, position t against position t. Prints quantity, relative L2, bound, verdict. */
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "train/command.h"
#include "train/load.h"
#include "train/objective.h"
#include "train/optimizer.h"

struct bounds { double logits, loss, gradient, trajectory, weights, topk_gradient; };
static const struct bounds bounds_fp32 = {1e-5, 1e-5, 1e-4, 1e-4, 1e-3, 1e-4};
/* bf16 keeps 8 bits: 2^-9 per rounding, grown by the depth of the network; gradients and the AdamW walk (which turns the sign of a small gradient
 * into a whole step) see it several times over. Worst seen on an H200: weights 4.7e-2, of a key bias, whose gradient is next to
 * nothing; gradient of a truncated loss 1.2e-1: logits that are equal in 8 bits put other ids into the top k */
static const struct bounds bounds_bf16 = {2e-2, 2e-2, 6e-2, 2e-2, 6e-2, 2e-1};
/* e4m3 keeps 4 bits: 2^-4 at most and 2.6e-2 rms per rounding, of both factors of every product: 3.7e-2 of its result, which add up as sqrt(products on the way). So these
 * cases, random weights that average nothing out, show a wrong factor, sign, scale or a part left out, not one rounding too many; tests/kernels/test_fp8.c compares with
 * rounded references for that. Worst seen on a CPU (tests/golden/qwen3_tied and yarn): logits 1.2e-1, loss 3.4e-2, gradient 3.0e-1, of a truncated loss 3.6e-1,
 * loss after steps 2.6e-2 and its norm 1.6e-1, weights 6.2e-2 */
static const struct bounds bounds_fp8 = {2e-1, 6e-2, 4.5e-1, 6e-2, 1e-1, 5.5e-1};

struct check {
    const char *dir;
    const char *const *allowed; int n_allowed;       /* loss kinds that may be missing */
    struct bounds bound;
    bool fp8;                                        /* the products of both models' blocks */
    struct backend *be;
    struct memory_plan *plan;
    struct model_files *teacher_files, *student_files;
    struct model *teacher, *student;
    struct objective *objective;
    struct optimizer *optimizer;
    struct tensor_set *ref;
    json_t *json;
    struct batch *batch;
    double T; int k; double targets;
    int failed, missing, compared;
};

static void report(struct check *c, const char *quantity, double error, double bound)
{
    int good = error <= bound;          /* a NaN is not */
    printf("%-56s %10.2e %9.0e  %s\n", quantity, error, bound, good ? "ok" : "OUTSIDE");
    c->failed += !good;
    c->compared++;
}

static double relative(const float *a, const float *b, int64_t n)
{
    double d = 0, r = 0;
    for (int64_t i = 0; i < n; i++) { d += ((double)a[i] - b[i]) * ((double)a[i] - b[i]); r += (double)b[i] * b[i]; }
    return d == 0 ? 0 : sqrt(d / r);
}

static double norm_of(const float *a, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)a[i] * a[i];
    return sqrt(sum);
}

static double relative_number(double a, double b) { return a == b ? 0 : fabs(a - b) / fabs(b); }

static int reference(const struct check *c, const char *name, int64_t count, float **values)
{
    const struct tensor_view *v = tensor_set_find(c->ref, name);
    *values = NULL;
    if (!v) return fail(ERR_INPUT, "%s/reference.safetensors: tensor %s is missing; make the case again with scripts/make_reference.py", c->dir, name);
    if (v->count != count) return fail(ERR_INPUT, "%s/reference.safetensors: tensor %s has %lld elements, %lld were expected", c->dir, name, (long long)v->count, (long long)count);
    *values = xmalloc((size_t)count * sizeof **values);
    int rc = tensor_to_float(v, 0, count, *values);
    if (rc != OK) { free(*values); *values = NULL; }
    return rc;
}

static int64_t integer_at(const struct tensor_view *v, int64_t i)
{
    const char *p = (const char *)v->data + (size_t)i * dtype_width(v->dtype);
    switch (v->dtype) {
    case DTYPE_I64: { int64_t x; memcpy(&x, p, 8); return x; }
    case DTYPE_I32: { int32_t x; memcpy(&x, p, 4); return x; }
    case DTYPE_U8: case DTYPE_BOOL: return *(const unsigned char *)p;
    default: return -1;
    }
}

/* ids and mask become a batch in which every sequence is one document; label = the id itself where mask = 1 (KD reads no label but its sign) */
static int read_batch(struct check *c)
{
    const struct tensor_view *ids = tensor_set_find(c->ref, "ids"), *mask = tensor_set_find(c->ref, "mask");
    if (!ids || !mask || ids->n_dims != 2 || mask->count != ids->count)
        return fail(ERR_INPUT, "%s/reference.safetensors: needs ids [B, L] and a mask of the same shape", c->dir);
    int64_t rows = ids->shape[0], length = ids->shape[1], V = c->teacher_files->config->vocab_size, Vs = c->student_files->config->vocab_size;
    if (rows < 1 || length < 2 || ids->count > 1 << 20) return fail(ERR_INPUT, "%s/reference.safetensors: ids has the shape [%lld, %lld]; at least 1 x 2 and at most 2^20 positions", c->dir, (long long)rows, (long long)length);
    if (V != Vs) return fail(ERR_MISMATCH, "%s: the teacher's vocabulary is %lld and the student's %lld; a reference case has one vocabulary", c->dir, (long long)V, (long long)Vs);
    c->batch = batch_new(rows, length, NULL, false);
    uint32_t *tokens = xmalloc((size_t)length * sizeof *tokens);
    uint8_t *learn = xmalloc((size_t)length);
    uint16_t *document = xcalloc((size_t)length, sizeof *document);
    int rc = OK;
    for (int64_t r = 0; r < rows && rc == OK; r++) {
        for (int64_t t = 0; t < length; t++) {
            int64_t id = integer_at(ids, r * length + t);
            if (id < 0 || id >= V) { rc = fail(ERR_INPUT, "%s/reference.safetensors: ids[%lld, %lld] = %lld is outside the vocabulary of %lld", c->dir, (long long)r, (long long)t, (long long)id, (long long)V); break; }
            tokens[t] = (uint32_t)id;
            learn[t] = 0;
        }
        if (rc == OK) batch_set_row(c->batch, r, tokens, learn, document);
    }
    if (rc == OK) {
        batch_finish(c->batch);
        for (int64_t i = 0; i < ids->count; i++) {
            int on = integer_at(mask, i) == 1;
            c->batch->labels[i] = on ? c->batch->tokens[i] : -1;
            c->targets += on;
        }
        if (c->targets == 0) rc = fail(ERR_INPUT, "%s/reference.safetensors: mask is 0 everywhere", c->dir);
    }
    free(tokens);
    free(learn);
    free(document);
    return rc;
}

static int open_case(struct check *c, const struct backend_options *options)
{
    int rc = OK;
    char *teacher = path_join(c->dir, "teacher"), *student = path_join(c->dir, "student"), *json = path_join(c->dir, "reference.json"), *tensors = path_join(c->dir, "reference.safetensors");
    int64_t k;
    TRY(json_read_file(json, 1 << 24, &c->json));
    TRY(json_get_double(c->json, "temperature", json, 0, &c->T));
    TRY(json_get_int(c->json, "topk", json, 0, &k));
    if (c->T <= 0 || k < 1 || k > 4096) { rc = fail(ERR_INPUT, "%s: temperature must be above 0 and topk between 1 and 4096", json); goto out; }
    c->k = (int)k;
    if (json_object_size(json_object_get(c->json, "losses")) == 0) { rc = fail(ERR_INPUT, "%s: losses is no object of loss kinds; make the case again with scripts/make_reference.py", json); goto out; }
    TRY(tensor_set_open(&c->ref, tensors));
    TRY(model_files_open(&c->teacher_files, teacher));
    TRY(model_files_open(&c->student_files, student));
    if (k > c->teacher_files->config->vocab_size) { rc = fail(ERR_INPUT, "%s: topk is %lld, but the vocabulary has %lld ids", json, (long long)k, (long long)c->teacher_files->config->vocab_size); goto out; }
    TRY(read_batch(c));
    TRY(backend_open(&c->be, options));
    TRY(model_check_device(c->be, c->teacher_files->config, c->teacher_files->path));
    TRY(model_check_device(c->be, c->student_files->config, c->student_files->path));

    c->plan = memory_plan_new(c->be);
    struct model_options o = {.N = c->batch->n, .max_doc = c->batch->length, .head_rows = c->batch->n, .fp8 = c->fp8};
    if (c->fp8) {
        TRY(model_check_fp8(c->be, c->teacher_files->config, 0, 0, "--matmul"));
        TRY(model_check_fp8(c->be, c->student_files->config, 0, 0, "--matmul"));
    }
    c->teacher = model_new(c->be, c->teacher_files->config, &o, c->plan);
    o.train = true;
    c->student = model_new(c->be, c->student_files->config, &o, c->plan);
    struct distill_args loss = {.tail = TAIL_BUCKET, .temperature = (float)c->T, .kd_weight = 1};
    c->objective = objective_new(c->student, &loss, c->student->c->vocab_size, TARGET_TOPK, c->k, c->plan);
    const json_t *a = json_object_get(c->json, "adamw"), *betas = json_object_get(a, "betas");
    struct adamw_args adamw = {.beta1 = json_number_value(json_array_get(betas, 0)), .beta2 = json_number_value(json_array_get(betas, 1)),
                               .eps = json_number_value(json_object_get(a, "eps")), .weight_decay = json_number_value(json_object_get(a, "weight_decay_2d")),
                               .clip = json_number_value(json_object_get(a, "clip"))};
    if (json_number_value(json_object_get(a, "weight_decay_1d")) != 0) { rc = fail(ERR_INPUT, "%s: adamw.weight_decay_1d is not 0; this build decays no vector", json); goto out; }
    c->optimizer = optimizer_new(c->student, &adamw, c->plan);
    memory_add_scratch(c->plan, model_scratch_bytes(c->teacher, c->k));
    memory_add_scratch(c->plan, model_scratch_bytes(c->student, c->k));
    TRY(memory_commit(c->plan, 0));
    model_ready(c->teacher);
    model_ready(c->student);
    optimizer_ready(c->optimizer);
    TRY(model_files_load(c->teacher_files, c->teacher));
    TRY(model_files_load(c->student_files, c->student));
out:
    free(teacher);
    free(student);
    free(json);
    free(tensors);
    return rc;
}

static int check_logits(struct check *c, struct model *m, const char *name)
{
    int64_t count = m->n * m->c->vocab_size;
    float *want = NULL, *got = xmalloc((size_t)count * sizeof *got);
    int rc = reference(c, name, count, &want);
    if (rc == OK) {
        m->be->ops->download_act(m->be, got, m->logits, count);
        report(c, name, relative(got, want, count), c->bound.logits);
    }
    free(want);
    free(got);
    return rc;
}

/* Teacher's top k at T by our own op: what a shard would hold. */
static void teacher_topk(struct check *c)
{
    struct batch *b = c->batch;
    float T = (float)c->T;
    int64_t n = b->n;
    struct backend *be = c->be;
    struct teacher_targets out = {.nT = 1, .temperatures = &T, .K = c->k};
    out.head_ids = be->ops->alloc(be, (size_t)(n * c->k) * 4);
    out.head_logprob = be->ops->alloc(be, (size_t)(n * c->k) * 4);
    out.tail_logmass = be->ops->alloc(be, (size_t)n * 4);
    CHECK(out.head_ids && out.head_logprob && out.tail_logmass, "no memory for %lld rows of targets", (long long)n);
    be->ops->teacher_targets(be, &out, c->teacher->logits, c->teacher->labels, n, c->teacher->c->vocab_size, c->teacher->c->vocab_size);
    b->k = c->k;
    b->head_ids = xmalloc((size_t)(n * c->k) * sizeof *b->head_ids);
    b->head_logprob = xmalloc((size_t)(n * c->k) * sizeof *b->head_logprob);
    b->tail_logmass = xmalloc((size_t)n * sizeof *b->tail_logmass);
    be->ops->download(be, b->head_ids, out.head_ids, (size_t)(n * c->k) * 4);
    be->ops->download(be, b->head_logprob, out.head_logprob, (size_t)(n * c->k) * 4);
    be->ops->download(be, b->tail_logmass, out.tail_logmass, (size_t)n * 4);
    be->ops->release(be, out.head_ids);
    be->ops->release(be, out.head_logprob);
    be->ops->release(be, out.tail_logmass);
}

/* "jsd_0.5" and the like -> kind, divergence, tail and its parameter. False: a kind this build lacks. */
static bool loss_kind(const char *name, struct objective *o)
{
    double value = 0;
    int end = 0;
    o->kind = TARGET_FULL;
    if (!strcmp(name, "forward_kl")) o->args.divergence = DIV_FORWARD_KL;
    else if (!strcmp(name, "reverse_kl")) o->args.divergence = DIV_REVERSE_KL;
    else if (!strcmp(name, "tvd")) o->args.divergence = DIV_TVD;
    else if (sscanf(name, "jsd_%lf%n", &value, &end) == 1 && !name[end] && value > 0 && value < 1) { o->args.divergence = DIV_JSD; o->args.beta = (float)value; }
    else if (sscanf(name, "skew_kl_%lf%n", &value, &end) == 1 && !name[end] && value > 0 && value < 1) { o->args.divergence = DIV_SKEW_KL; o->args.alpha = (float)value; }
    else if (!strcmp(name, "topk_tail_kl") || !strcmp(name, "topk_renorm_kl")) {
        o->kind = TARGET_TOPK;
        o->args.divergence = DIV_FORWARD_KL;
        o->args.tail = name[5] == 't' ? TAIL_BUCKET : TAIL_RENORMALISE;
    } else return false;
    return true;
}

static void run_objective(struct check *c, bool backward, double *kd, double *ce)
{
    objective_reset(c->objective);
    objective_run(c->objective, c->batch, c->targets, backward);
    objective_read(c->objective, kd, ce);
}

static int check_losses(struct check *c)
{
    int rc = OK;
    const char *kind;
    json_t *value;
    double kd, ce;
    int64_t first = c->batch->length * c->student->c->vocab_size;      /* the first sequence of dlogits */
    float *want = NULL, *got = xmalloc((size_t)first * sizeof *got);
    json_object_foreach(json_object_get(c->json, "losses"), kind, value) {
        char name[160];
        if (!loss_kind(kind, c->objective)) {
            int allowed = 0;
            for (int i = 0; i < c->n_allowed; i++) allowed |= !strcmp(c->allowed[i], kind);
            snprintf(name, sizeof name, "loss %s", kind);
            printf("%-56s %10s %9s  %s\n", name, "-", "-", allowed ? "missing (allowed)" : "MISSING");
            c->missing += !allowed;
            continue;
        }
        run_objective(c, false, &kd, &ce);
        snprintf(name, sizeof name, "loss %s", kind);
        report(c, name, relative_number(kd / c->targets, json_number_value(value)), c->bound.loss);
        snprintf(name, sizeof name, "dlogits.%s", kind);
        if (!tensor_set_find(c->ref, name)) continue;
        TRY(reference(c, name, first, &want));
        c->be->ops->download_act(c->be, got, c->student->logits, first);
        report(c, name, relative(got, want, first), c->objective->kind == TARGET_TOPK ? c->bound.topk_gradient : c->bound.gradient);
        free(want);
        want = NULL;
    }
out:
    free(want);
    free(got);
    return rc;
}

/* cross entropy of token t+1 at position t, over every sequence, mask or not */
static void check_cross_entropy(struct check *c)
{
    const json_t *value = json_object_get(c->json, "cross_entropy_shifted");
    if (!json_is_number(value)) return;
    struct batch *b = c->batch;
    int32_t *labels = xmalloc((size_t)b->n * sizeof *labels);
    double kd, ce;
    for (int64_t i = 0; i < b->n; i++) labels[i] = (i + 1) % b->length ? b->tokens[i + 1] : -1;
    c->be->ops->upload(c->be, c->student->labels, labels, (size_t)b->n * sizeof *labels);
    c->objective->kind = TARGET_NONE;
    run_objective(c, false, &kd, &ce);
    report(c, "cross_entropy_shifted", relative_number(ce / (double)(b->n - b->rows), json_number_value(value)), c->bound.loss);
    free(labels);
}

struct compare_context { struct check *c; const char *prefix; const float *values; double bound; bool gradients; };

/* The keys' bias moves all keys of a query alike, which softmax does not see but for the turns of RoPE: its gradient is what is left of terms that cancel, each of which e4m3 has rounded, so a
 * bound on its relative error says little. Uncancelled it would be like a column of the weight's gradient, the same sum with an input in place of 1: the bound is 0.3 of one (0.20 was the worst of 112,
 * from random models), relative to what there is, if there is anything. A gradient left out altogether can be as near as that; the native check sees it. */
static int key_bias_bound(struct check *c, const char *key, const float *bias, int64_t count, double *bound)
{
    static const char suffix[] = "k_proj.bias";
    size_t length = strlen(key), stem = length - (sizeof suffix - 1);
    char name[160];
    float *weight;
    if (!c->fp8 || length < sizeof suffix || strcmp(key + stem, suffix)) return OK;
    snprintf(name, sizeof name, "%.*sk_proj.weight", (int)stem, key);
    int64_t C = c->student->c->hidden_size;
    int rc = reference(c, name, count * C, &weight);
    if (rc != OK) return rc;
    double left = norm_of(bias, count);
    if (left > 0) *bound = fmax(*bound, 0.3 * norm_of(weight, count * C) / sqrt((double)C) / left);
    free(weight);
    return OK;
}

static int compare_tensor(void *context, const char *name, int n_dims, const int64_t *shape, int64_t offset)
{
    struct compare_context *x = context;
    int64_t count = shape[0] * (n_dims == 2 ? shape[1] : 1);
    char key[160];
    float *want;
    snprintf(key, sizeof key, "%s.%s", x->prefix, name);
    double bound = x->bound;
    int rc = reference(x->c, key, count, &want);
    if (rc == OK && x->gradients) rc = key_bias_bound(x->c, key, want, count, &bound);
    if (rc == OK) report(x->c, key, relative(x->values + offset, want, count), bound);
    free(want);
    return rc;
}

static int check_gradients(struct check *c)
{
    struct model *m = c->student;
    double kd, ce;
    loss_kind("forward_kl", c->objective);
    c->be->ops->fill_zero(c->be, m->grads, (size_t)m->params->total * dtype_width(c->be->grad_dtype));
    model_set_batch(m, c->batch);
    model_forward(m);
    run_objective(c, true, &kd, &ce);
    model_backward(m);
    float *grads = xmalloc((size_t)m->params->total * sizeof *grads);
    c->be->ops->download_grad(c->be, grads, m->grads, m->params->total);
    struct compare_context x = {.c = c, .prefix = "grad", .values = grads, .bound = c->bound.gradient, .gradients = true};
    int rc = params_each(m->params, compare_tensor, &x);
    free(grads);
    return rc;
}

static int check_trajectory(struct check *c)
{
    struct model *m = c->student;
    const json_t *losses = json_object_get(c->json, "trajectory_loss"), *norms = json_object_get(c->json, "trajectory_grad_norm");
    double lr = json_number_value(json_object_get(json_object_get(c->json, "adamw"), "lr")), kd, ce;
    size_t steps = json_array_size(losses);
    float *weights = xmalloc((size_t)m->params->total * sizeof *weights);
    int rc = OK;
    if (!steps || json_array_size(norms) != steps) { rc = fail(ERR_INPUT, "%s/reference.json: trajectory_loss and trajectory_grad_norm must be lists of one length", c->dir); goto out; }
    for (size_t i = 0; i < steps; i++) {
        char name[64];
        c->be->ops->fill_zero(c->be, m->grads, (size_t)m->params->total * dtype_width(c->be->grad_dtype));
        model_forward(m);
        run_objective(c, true, &kd, &ce);
        model_backward(m);
        double norm = optimizer_norm(c->optimizer);
        optimizer_step(c->optimizer, (int64_t)i + 1, lr);
        model_weights_changed(m);
        snprintf(name, sizeof name, "trajectory loss, step %zu", i + 1);
        report(c, name, relative_number(kd / c->targets, json_number_value(json_array_get(losses, i))), c->bound.trajectory);
        snprintf(name, sizeof name, "trajectory gradient norm, step %zu", i + 1);
        report(c, name, relative_number(norm, json_number_value(json_array_get(norms, i))), c->bound.gradient);
    }
    c->be->ops->download_act(c->be, weights, m->weights, m->params->total);
    char prefix[32];
    snprintf(prefix, sizeof prefix, "after%zu", steps);
    struct compare_context x = {.c = c, .prefix = prefix, .values = weights, .bound = c->bound.weights};
    rc = params_each(m->params, compare_tensor, &x);
out:
    free(weights);
    return rc;
}

static int run_case(struct check *c, const struct backend_options *options)
{
    int rc = OK;
    TRY(open_case(c, options));
    printf("%s on %s: %s student, T = %g, k = %d, %.0f supervised positions\n\n%-56s %10s %9s\n", c->dir, options->device, architecture_name(c->student->c->arch), c->T, c->k, c->targets,
           "quantity", "rel. L2", "bound");
    model_set_batch(c->teacher, c->batch);
    model_forward(c->teacher);
    model_logits(c->teacher, 0, c->teacher->n);
    TRY(check_logits(c, c->teacher, "teacher_logits"));
    teacher_topk(c);
    c->objective->teacher = c->teacher->logits;
    c->objective->teacher_dtype = c->be->act_dtype;
    c->objective->teacher_stride = c->teacher->c->vocab_size;
    c->objective->full_scale = (float)(1 / c->T);

    model_set_batch(c->student, c->batch);
    model_forward(c->student);
    model_logits(c->student, 0, c->student->n);
    TRY(check_logits(c, c->student, "student_logits"));
    TRY(check_losses(c));
    check_cross_entropy(c);
    TRY(check_gradients(c));
    TRY(check_trajectory(c));
    printf("\n%d quantities compared, %d outside their bound, %d missing\n", c->compared, c->failed, c->missing);
    if (c->failed || c->missing)
        rc = fail(ERR_NUMERIC, "%s: %d of %d quantities are outside their bound and %d loss kinds are missing%s", c->dir, c->failed, c->compared, c->missing,
                  c->fp8 && c->failed ? "; bounds in fp8 are what small models with random weights keep, another model's own rounding may be larger (teacher-dump --dry-run measures a teacher's)" : "");
out:
    return rc;
}

static void print_help(void)
{
    printf("distill check CASE_DIR [--device cpu|cuda] [--precision fp32|bf16] [--matmul native|fp8] [--allow-missing KIND]...\n\n"
           "Compares this build with a reference made by transformers and PyTorch: logits, losses, gradients and ten AdamW steps. Exit code 5 if anything is outside its bound.\n\n"
           "  --device NAME         cpu (default) or cuda\n"
           "  --precision NAME      fp32 or bf16; default: fp32 on cpu, bf16 on cuda\n"
           "  --matmul NAME         native (default), or fp8: the products of the blocks in e4m3, within what small models with random weights keep\n"
           "  --allow-missing KIND  a loss kind that this build lacks does not fail the check\n\n"
           "A case for your own model: scripts/make_reference.py MODEL_DIR -o CASE_DIR\n\nExample:\n    distill check tests/golden/widths16 --matmul fp8\n");
}

int command_check(int argc, char **argv)
{
    struct check c = {.bound = bounds_fp32};
    const char **allowed = xcalloc((size_t)argc, sizeof *allowed);
    struct backend_options options = {.device = "cpu"};
    int rc = OK;
    for (int i = 1; i < argc; i++) {
        const char *a = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (!strcmp(a, "--help") || !strcmp(a, "-h")) { print_help(); goto out; }
        else if (a[0] != '-' && !c.dir) c.dir = a;
        else if (a[0] != '-') { rc = fail(ERR_USAGE, "takes one case; %s is a second one", a); goto out; }
        else if (!value) { rc = fail(ERR_USAGE, "%s is unknown or needs a value; see distill check --help", a); goto out; }
        else if (!strcmp(a, "--allow-missing")) { allowed[c.n_allowed++] = value; i++; }
        else if (!strcmp(a, "--device")) { options.device = value; i++; }
        else if (!strcmp(a, "--precision")) { options.precision = value; i++; }
        else if (!strcmp(a, "--matmul")) {
            if (strcmp(value, "native") && strcmp(value, "fp8")) { rc = fail(ERR_USAGE, "--matmul is native or fp8; %s is neither", value); goto out; }
            c.fp8 = !strcmp(value, "fp8");
            i++;
        }
        else { rc = fail(ERR_USAGE, "unknown option %s; see distill check --help", a); goto out; }
    }
    if (!c.dir) { rc = fail(ERR_USAGE, "no case given; see distill check --help"); goto out; }
    if (!strcmp(options.device, "cuda") && !(options.precision && !strcmp(options.precision, "fp32"))) c.bound = bounds_bf16;
    if (c.fp8) c.bound = bounds_fp8;
    c.allowed = allowed;
    rc = run_case(&c, &options);
out:
    free(allowed);
    objective_free(c.objective);
    optimizer_free(c.optimizer);
    model_free(c.teacher);
    model_free(c.student);
    memory_plan_free(c.plan);
    backend_close(c.be);
    batch_free(c.batch);
    model_files_close(c.teacher_files);
    model_files_close(c.student_files);
    tensor_set_close(c.ref);
    json_decref(c.json);
    return rc;
}
