/* See eval.h; and distill eval: held-out rows through teacher and students, one column each.
 *
 *     perplexity = exp(loss)   bits per byte = sum of -log2 q(label) / text bytes of the labels   retained = top-1 of student / of teacher
 *     gap closed = (distilled - control) / (teacher - control): what distillation adds to training the same student on hard labels */
#include "train/eval.h"

#include <math.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "train/checkpoint.h"
#include "train/command.h"
#include "train/load.h"
#include "train/progress.h"
#include "train/student.h"

/* ---- the measurement ---- */

struct sums {
    double loss, loss2, top1, top5, confidence, teacher_loss, teacher_loss2, teacher_top1, teacher_top5, teacher_confidence, forward, forward2, reverse, agree;
    int64_t n;
    struct calibration calibration, teacher_calibration;
};

struct evaluation {
    struct model **student; int n_students;
    const char *const *name;              /* [n_students] for messages */
    struct model *teacher;                /* NULL: none */
    struct loader *loader;
    int64_t max_rows, Vv;                 /* max_rows 0: all */
    bool show_progress;
    int64_t chunk;                        /* positions whose logits exist at one time: what every model has room for */
    struct eval_row *device, *host;       /* [chunk] */
    struct sums *sums;                    /* [n_students] */
    int64_t rows;
};

void calibration_add(struct calibration *c, double confidence, bool right)
{
    int bin = confidence > 0 ? (int)ceil(confidence * CALIBRATION_BINS) - 1 : 0;
    if (bin >= CALIBRATION_BINS) bin = CALIBRATION_BINS - 1;      /* 1 rounded up */
    c->confidence[bin] += confidence;
    c->right[bin] += right;
    c->n++;
}

double calibration_error(const struct calibration *c)
{
    double sum = 0;                           /* a bin's count cancels: n_b / n x |right_b / n_b - confidence_b / n_b| */
    for (int b = 0; b < CALIBRATION_BINS; b++) sum += fabs((double)c->right[b] - c->confidence[b]);
    return c->n ? sum / (double)c->n : 0;
}

static void add_rows(struct sums *s, const struct eval_row *r, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        if (!r[i].counted) continue;
        double loss = -(double)r[i].student_logprob, teacher = -(double)r[i].teacher_logprob, forward = r[i].forward_kl;
        s->n++;
        s->loss += loss;
        s->loss2 += loss * loss;
        s->top1 += r[i].student_top1;
        s->top5 += r[i].student_top5;
        s->confidence += r[i].student_confidence;
        calibration_add(&s->calibration, r[i].student_confidence, r[i].student_top1);
        s->teacher_loss += teacher;
        s->teacher_loss2 += teacher * teacher;
        s->teacher_top1 += r[i].teacher_top1;
        s->teacher_top5 += r[i].teacher_top5;
        s->teacher_confidence += r[i].teacher_confidence;
        calibration_add(&s->teacher_calibration, r[i].teacher_confidence, r[i].teacher_top1);
        s->forward += forward;
        s->forward2 += forward * forward;
        s->reverse += r[i].reverse_kl;
        s->agree += r[i].agree;
    }
}

static int check_ids(const struct evaluation *e, const struct batch *b)
{
    for (int64_t i = 0; i < b->n; i++)
        if (b->tokens[i] < 0 || b->tokens[i] >= e->Vv)
            return fail(ERR_MISMATCH, "held-out row %lld holds token %d, but only ids below %lld are valid in every model and the tokenizer: they do not belong together",
                        (long long)b->row_index[i / b->length], b->tokens[i], (long long)e->Vv);
    return OK;
}

/* The first n positions of the batch, whose hidden states every model has. */
static int compare_batch(struct evaluation *e, int64_t n)
{
    struct backend *be = e->student[0]->be;
    for (int64_t first = 0; first < n; first += e->chunk) {
        int64_t R = n - first < e->chunk ? n - first : e->chunk;
        if (e->teacher) model_logits(e->teacher, first, R);
        for (int s = 0; s < e->n_students; s++) {
            struct model *m = e->student[s];
            model_logits(m, first, R);
            be->ops->compare_logits(be, e->device, m->logits, e->teacher ? e->teacher->logits : NULL, m->labels + first, R, m->c->vocab_size,
                                    e->teacher ? e->teacher->c->vocab_size : 0, e->Vv);
            be->ops->download(be, e->host, e->device, (size_t)R * sizeof *e->host);
            add_rows(&e->sums[s], e->host, R);
            if (!isfinite(e->sums[s].teacher_loss)) return fail(ERR_NUMERIC, "the teacher's logits are not finite; look for NaN and Inf with distill inspect");
            if (!isfinite(e->sums[s].loss + e->sums[s].forward + e->sums[s].reverse))
                return fail(ERR_NUMERIC, "the logits of %s are not finite; look for NaN and Inf with distill inspect", e->name[s]);
        }
    }
    return OK;
}

static int evaluate(struct evaluation *e)
{
    struct backend *be = e->student[0]->be;
    int64_t total = loader_rows_per_epoch(e->loader);
    double start = now_seconds(), shown = start;
    struct batch *b;
    int rc = OK;
    if (e->max_rows && e->max_rows < total) total = e->max_rows;
    e->chunk = e->teacher ? e->teacher->o.head_rows : INT64_MAX;
    for (int s = 0; s < e->n_students; s++) if (e->student[s]->o.head_rows < e->chunk) e->chunk = e->student[s]->o.head_rows;
    e->host = xmalloc((size_t)e->chunk * sizeof *e->host);
    e->device = be->ops->alloc(be, (size_t)e->chunk * sizeof *e->device);
    if (!e->device) { rc = fail(ERR_IO, "device %s: no memory for the results of %lld positions", be->name, (long long)e->chunk); goto out; }
    while (e->rows < total) {
        TRY(loader_next(e->loader, &b));
        if (!b) break;
        TRY(check_ids(e, b));
        int64_t rows = total - e->rows < b->rows ? total - e->rows : b->rows;
        if (e->teacher) { model_set_batch(e->teacher, b); model_forward(e->teacher); }
        for (int s = 0; s < e->n_students; s++) { model_set_batch(e->student[s], b); model_forward(e->student[s]); }
        TRY(compare_batch(e, rows * b->length));
        e->rows += rows;
        if (e->show_progress && now_seconds() - shown > 0.5) {
            shown = now_seconds();
            progress("eval  %lld of %lld rows, %.0f tok/s, %s left", (long long)e->rows, (long long)total, (double)(e->rows * b->length) / (shown - start),
                     duration_text((shown - start) * (double)(total - e->rows) / (double)e->rows));
        }
    }
    if (e->sums[0].n == 0) rc = fail(ERR_INPUT, "no position of the held-out rows is supervised: there is nothing to evaluate on");
out:
    if (e->show_progress) progress_end();
    be->ops->release(be, e->device);
    free(e->host);
    return rc;
}

/* of the mean of n draws with these sums */
static double mean_error(double sum, double sum2, double n)
{
    double variance = n > 1 ? (sum2 - sum * sum / n) / (n - 1) : 0;
    return variance > 0 ? sqrt(variance / n) : 0;
}

double share_error(double share, int64_t n) { return n > 0 ? sqrt(share * (1 - share) / (double)n) : 0; }

static struct eval_result result_of(const struct sums *s, int64_t rows)
{
    double n = (double)s->n;
    return (struct eval_result){.rows = rows, .positions = s->n, .loss = s->loss / n, .top1 = s->top1 / n, .top5 = s->top5 / n, .teacher_loss = s->teacher_loss / n,
                                .teacher_top1 = s->teacher_top1 / n, .teacher_top5 = s->teacher_top5 / n, .forward_kl = s->forward / n, .reverse_kl = s->reverse / n,
                                .agreement = s->agree / n, .loss_error = mean_error(s->loss, s->loss2, n), .forward_kl_error = mean_error(s->forward, s->forward2, n),
                                .teacher_loss_error = mean_error(s->teacher_loss, s->teacher_loss2, n), .confidence = s->confidence / n, .calibration_error = calibration_error(&s->calibration),
                                .teacher_confidence = s->teacher_confidence / n, .teacher_calibration_error = calibration_error(&s->teacher_calibration)};
}

int eval_rows(struct model *student, struct model *teacher, const struct corpus_rows *rows, int64_t max_rows, int64_t Vv, struct eval_result *out)
{
    int64_t fit = student->o.N / rows->length;
    struct loader_options o = {.batch_rows = fit < rows->rows ? fit : rows->rows};
    struct sums sums = {0};
    struct evaluation e = {.student = &student, .n_students = 1, .name = (const char *const[]){"the student"}, .teacher = teacher, .max_rows = max_rows,
                           .Vv = Vv, .sums = &sums};
    int rc = OK;
    if (rows->rows == 0) return fail(ERR_INPUT, "there are no held-out rows to evaluate on");
    CHECK(fit >= 1, "rows of %lld positions for a model made for %lld", (long long)rows->length, (long long)student->o.N);
    TRY(loader_open_rows(&e.loader, rows, &o));
    TRY(evaluate(&e));
    *out = result_of(&sums, e.rows);
out:
    loader_close(e.loader);
    return rc;
}

/* ---- the command ---- */

struct column {
    char *name, *path;
    struct model_files *files;
    struct model *model;
    int64_t parameters;
    struct eval_result r;                 /* of the teacher: its own numbers moved to where a student's are */
};

struct eval {
    const struct config *c;
    const char **flag_models; int n_flags;    /* --model, as given */
    struct column *column; int n;             /* the teacher first, if there is one */
    bool teacher;
    char *tokenizer_dir;
    struct tokenizer *tokenizer;
    struct corpus_rows *rows, *unused;
    struct shard_dataset *dataset;
    struct loader *loader;
    int64_t row_length, Vv, bytes;            /* bytes 0: not known */
    char *source;                             /* where the rows come from, for people */
    struct backend *be;
    struct memory_plan *plan;
};

static int model_flag(void *context, int argc, char **argv, int *i)
{
    struct eval *e = context;
    if (strcmp(argv[*i], "--model") || *i + 1 >= argc) return 0;
    const char *value = argv[++*i];
    for (int k = 0; k < e->n_flags; k++) if (e->flag_models[k] == value) return 1;      /* flags are offered twice */
    e->flag_models[e->n_flags++] = value;
    return 1;
}

/* Takes `path`. */
static int add_column(struct eval *e, const char *name, size_t length, char *path)
{
    struct column *c = &e->column[e->n++];
    c->name = xstrndup(name, length);
    c->path = path;
    for (int i = 0; i < e->n - 1; i++)
        if (!strcmp(e->column[i].name, c->name)) return fail(ERR_USAGE, "two models are named %s; give every --model a name of its own", c->name);
    int rc = model_files_open(&c->files, path);
    if (rc == OK) c->parameters = model_config_parameters(c->files->config);
    return rc;
}

static int open_models(struct eval *e)
{
    const struct config *c = e->c;
    char *path = NULL;
    int rc = OK;
    e->column = xcalloc((size_t)e->n_flags + 2, sizeof *e->column);
    e->teacher = *c->teacher_path;
    if (e->teacher) TRY(add_column(e, "teacher", 7, xstrdup(c->teacher_path)));
    if (*c->eval_model || !e->n_flags) {
        TRY(checkpoint_or(c->eval_model, c->run_dir, "eval.model", &path));
        TRY(add_column(e, "student", 7, path));
    }
    for (int i = 0; i < e->n_flags; i++) {
        const char *flag = e->flag_models[i], *equals = strchr(flag, '=');
        if (!equals || equals == flag || !equals[1]) { rc = fail(ERR_USAGE, "--model %s: is not of the form name=path", flag); goto out; }
        TRY(add_column(e, flag, (size_t)(equals - flag), xstrdup(equals + 1)));
    }
out:
    return rc;
}

static bool same_file(const char *a, const char *b)
{
    char x[SHA256_HEX], y[SHA256_HEX];
    return sha256_of_file(a, x) == OK && sha256_of_file(b, y) == OK && !strcmp(x, y);
}

/* Every model that brings a tokenizer must mean the same by every id. */
static int check_tokenizer(const struct eval *e, const struct column *c)
{
    int rc = OK;
    struct tokenizer *own = NULL;
    char *file = path_join(c->path, "tokenizer.json"), *reference = path_join(e->tokenizer_dir, "tokenizer.json");
    int32_t id;
    if (!path_exists(file) || same_file(file, reference)) goto out;
    TRY(tokenizer_open(&own, c->path));
    if (!tokenizer_same_vocab(e->tokenizer, own, &id)) {
        const char *a = tokenizer_token_text(e->tokenizer, id), *b = tokenizer_token_text(own, id);
        rc = fail(ERR_MISMATCH, "%s and %s have different vocabularies: id %d is \"%s\" in one and \"%s\" in the other; models can be compared only over one vocabulary", e->tokenizer_dir, c->path, id,
                  a ? a : "(nothing)", b ? b : "(nothing)");
    }
out:
    free(file);
    free(reference);
    tokenizer_close(own);
    return rc;
}

static int open_tokenizer(struct eval *e)
{
    int rc = OK;
    const char **candidates = xcalloc((size_t)e->n + 1, sizeof *candidates);
    for (int i = 0; i < e->n; i++) candidates[i] = e->column[i].path;
    e->tokenizer_dir = find_tokenizer_dir(e->c, candidates);
    free(candidates);
    if (e->tokenizer_dir) {
        TRY(tokenizer_open(&e->tokenizer, e->tokenizer_dir));
        for (int i = 0; i < e->n; i++) TRY(check_tokenizer(e, &e->column[i]));
    }
    e->Vv = valid_vocab(e->column[0].files->config, e->tokenizer);
    for (int i = 1; i < e->n; i++) {
        int64_t v = valid_vocab(e->column[i].files->config, e->tokenizer);
        if (v < e->Vv) e->Vv = v;
    }
out:
    return rc;
}

static int open_corpus(struct eval *e)
{
    struct corpus_options o = corpus_options_of(e->c);
    bool everything = o.heldout_fraction == 0;
    int rc = OK;
    if (e->c->eval_max_rows && (!o.max_rows || e->c->eval_max_rows < o.max_rows)) o.max_rows = e->c->eval_max_rows;
    TRY(corpus_read(everything ? &e->rows : &e->unused, everything ? &e->unused : &e->rows, &o, e->tokenizer, (int32_t)e->Vv));
    if (!e->rows || !e->rows->rows) {
        rc = fail(ERR_INPUT, "corpus.files: no document falls into the held-out share of %g; raise corpus.heldout_fraction, or set it to 0 to evaluate on every row", o.heldout_fraction);
        goto out;
    }
    e->row_length = e->rows->length;
    e->bytes = e->rows->bytes;
    e->source = everything ? xasprintf("every row of corpus.files, because corpus.heldout_fraction is 0: held out only if no model was trained on them")
                           : xasprintf("held-out documents of corpus.files (corpus.heldout_fraction %g)", o.heldout_fraction);
out:
    return rc;
}

static int open_dataset(struct eval *e)
{
    const struct config *c = e->c;
    int rc = OK;
    char *dir = heldout_shards_path(c), hash[SHA256_HEX];
    if (!path_exists(dir)) { rc = fail(ERR_USAGE, "there are no held-out rows: corpus.files is empty and %s does not exist; set corpus.files, or shards.heldout_path to a dataset", dir); goto out; }
    TRY(shard_dataset_open(&e->dataset, dir));
    const struct shard_manifest *m = shard_dataset_manifest(e->dataset);
    if (e->tokenizer && *m->tokenizer_hash) {
        tokenizer_hash(e->tokenizer, hash);
        if (strcmp(hash, m->tokenizer_hash)) {
            rc = fail(ERR_MISMATCH, "tokenizer %s has hash %.16s, %s was dumped with %.16s: evaluate with the tokenizer the rows were made with",
                      e->tokenizer_dir, hash, dir, m->tokenizer_hash);
            goto out;
        }
    }
    e->row_length = m->row_length;
    if (m->valid_vocab < e->Vv) e->Vv = m->valid_vocab;
    if (!c->eval_max_rows || c->eval_max_rows >= m->rows) e->bytes = m->text_bytes;
    e->source = xasprintf("rows of %s", dir);
out:
    free(dir);
    return rc;
}

static int open_rows(struct eval *e)
{
    const struct config *c = e->c;
    struct loader_options o = {.batch_rows = c->eval_batch_rows, .temperature = 1};
    int rc = OK;
    TRY(c->corpus_files.n ? open_corpus(e) : open_dataset(e));
    for (int i = 0; i < e->n; i++) {
        int64_t most = e->column[i].files->config->max_position;
        if (e->row_length > most) {
            rc = fail(ERR_MISMATCH, "rows are %lld tokens long, max_position_embeddings of %s is %lld: make the rows shorter", (long long)e->row_length,
                      e->column[i].path, (long long)most);
            goto out;
        }
    }
    if (e->dataset) o.temperature = shard_dataset_manifest(e->dataset)->temperatures[0];      /* the stored targets are not read */
    TRY(e->dataset ? loader_open_dataset(&e->loader, e->dataset, &o) : loader_open_rows(&e->loader, e->rows, &o));
out:
    return rc;
}

/* stream: the teacher's blocks wait in host memory */
static void plan_models(struct eval *e, bool stream)
{
    int64_t N = e->c->eval_batch_rows * e->row_length;
    struct model_options o = {.N = N, .max_doc = e->row_length, .head_rows = e->c->train_chunk_tokens < N ? e->c->train_chunk_tokens : N};
    e->plan = memory_plan_new(e->be);
    for (int i = 0; i < e->n; i++) {
        o.layer_slots = stream && e->teacher && i == 0 ? 2 : 0;
        e->column[i].model = model_new(e->be, e->column[i].files->config, &o, e->plan);
        memory_add_scratch(e->plan, model_scratch_bytes(e->column[i].model, 0));
    }
}

static void unplan_models(struct eval *e)
{
    for (int i = 0; i < e->n; i++) {
        model_free(e->column[i].model);
        e->column[i].model = NULL;
    }
    memory_plan_free(e->plan);
    e->plan = NULL;
}

static int load_models(struct eval *e)
{
    const struct config *c = e->c;
    struct backend_options device = {.device = c->run_device, .threads = (int)c->run_threads};
    size_t limit = (size_t)(c->memory_limit_gib * 0x1p30);
    int rc = OK;
    TRY(backend_open(&e->be, &device));
    for (int i = 0; i < e->n; i++) TRY(model_check_device(e->be, e->column[i].files->config, e->column[i].files->path));
    plan_models(e, !strcmp(c->teacher_weights, "streamed"));
    if (!strcmp(c->teacher_weights, "auto") && e->teacher && !e->be->host_memory && !memory_fits(e->plan, limit)) {
        char *resident;
        memory_check(e->plan, limit);
        resident = xstrdup(fail_message());
        unplan_models(e);
        plan_models(e, true);
        rc = memory_commit(e->plan, limit);
        if (rc != OK) rc = fail(rc, "%s, or eval.batch_rows. With the teacher's blocks streamed, %s", resident, fail_message());
        free(resident);
    } else rc = memory_commit(e->plan, limit);
    if (rc != OK) goto out;
    for (int i = 0; i < e->n; i++) {
        model_ready(e->column[i].model);
        TRY(model_files_load(e->column[i].files, e->column[i].model));
    }
out:
    return rc;
}

static int measure(struct eval *e, bool show_progress)
{
    int first = e->teacher, students = e->n - first, rc = OK;
    struct model **models = xcalloc((size_t)students, sizeof *models);
    const char **names = xcalloc((size_t)students, sizeof *names);
    struct evaluation v = {.student = models, .n_students = students, .name = names, .teacher = e->teacher ? e->column[0].model : NULL, .loader = e->loader,
                           .max_rows = e->c->eval_max_rows, .Vv = e->Vv, .show_progress = show_progress, .sums = xcalloc((size_t)students, sizeof *v.sums)};
    for (int i = 0; i < students; i++) { models[i] = e->column[first + i].model; names[i] = e->column[first + i].path; }
    TRY(evaluate(&v));
    for (int i = 0; i < students; i++) e->column[first + i].r = result_of(&v.sums[i], v.rows);
    if (e->teacher) {
        const struct eval_result *r = &e->column[1].r;
        e->column[0].r = (struct eval_result){.rows = r->rows, .positions = r->positions, .loss = r->teacher_loss, .top1 = r->teacher_top1,
                                              .top5 = r->teacher_top5, .loss_error = r->teacher_loss_error, .confidence = r->teacher_confidence,
                                              .calibration_error = r->teacher_calibration_error};
    }
out:
    free(v.sums);
    free(models);
    free(names);
    return rc;
}

/* ---- the report ---- */

static double bits_per_byte(const struct eval *e, const struct eval_result *r) { return e->bytes ? r->loss / log(2) * (double)r->positions / (double)e->bytes : NAN; }

/* (a - b) / (t - b); NAN when the teacher is not ahead of the control and there is no gap to close */
static double closed(double distilled, double control, double teacher, bool ahead) { return ahead ? (distilled - control) / (teacher - control) : NAN; }

static const struct column *column_named(const struct eval *e, const char *name)
{
    for (int i = e->teacher; i < e->n; i++) if (!strcmp(e->column[i].name, name)) return &e->column[i];
    return NULL;
}

/* False when the three are not all there. The distilled model is the one of that name, or eval.model. */
static bool gap_closed(const struct eval *e, double *top1, double *loss)
{
    const struct column *kd = column_named(e, "distilled"), *ce = column_named(e, "control"), *t = &e->column[0];
    if (!kd) kd = column_named(e, "student");
    if (!e->teacher || !kd || !ce) return false;
    *top1 = closed(kd->r.top1, ce->r.top1, t->r.top1, t->r.top1 > ce->r.top1);
    *loss = closed(kd->r.loss, ce->r.loss, t->r.loss, t->r.loss < ce->r.loss);
    return true;
}

enum cell { CELL_PARAMETERS, CELL_RATIO, CELL_LOSS, CELL_PERPLEXITY, CELL_BITS, CELL_TOP1, CELL_TOP5, CELL_CONFIDENCE, CELL_CALIBRATION, CELL_RETAINED, CELL_AGREEMENT, CELL_FORWARD, CELL_REVERSE,
            CELL_COUNT };
static const struct { const char *title; bool needs_teacher; } lines[CELL_COUNT] = {
    [CELL_PARAMETERS] = {"parameters", false},
    [CELL_RATIO]      = {"  share of the teacher's", true},
    [CELL_LOSS]       = {"loss, nats per token", false},
    [CELL_PERPLEXITY] = {"perplexity", false},
    [CELL_BITS]       = {"bits per byte", false},
    [CELL_TOP1]       = {"top-1 accuracy, %", false},
    [CELL_TOP5]       = {"top-5 accuracy, %", false},
    [CELL_CONFIDENCE] = {"mean confidence, %", false},
    [CELL_CALIBRATION] = {"calibration error, %", false},
    [CELL_RETAINED]   = {"accuracy retained, %", true},
    [CELL_AGREEMENT]  = {"top-1 agreement, %", true},
    [CELL_FORWARD]    = {"KL(teacher || student)", true},
    [CELL_REVERSE]    = {"KL(student || teacher)", true},
};

static void format_cell(const struct eval *e, enum cell line, const struct column *c, char text[32])
{
    const struct column *t = &e->column[0];
    const struct eval_result *r = &c->r;
    bool is_teacher = e->teacher && c == t;
    if (is_teacher && (line >= CELL_AGREEMENT)) { strcpy(text, "-"); return; }
    switch (line) {
    case CELL_PARAMETERS: snprintf(text, 32, "%lld", (long long)c->parameters); break;
    case CELL_RATIO:      snprintf(text, 32, "%.4f", (double)c->parameters / (double)t->parameters); break;
    case CELL_LOSS:       snprintf(text, 32, "%.4f +- %.4f", r->loss, r->loss_error); break;
    case CELL_PERPLEXITY: snprintf(text, 32, "%.5g", exp(r->loss)); break;
    case CELL_BITS:       if (e->bytes) snprintf(text, 32, "%.4f", bits_per_byte(e, r)); else strcpy(text, "-"); break;
    case CELL_TOP1:       snprintf(text, 32, "%.2f +- %.2f", 100 * r->top1, 100 * share_error(r->top1, r->positions)); break;
    case CELL_TOP5:       snprintf(text, 32, "%.2f +- %.2f", 100 * r->top5, 100 * share_error(r->top5, r->positions)); break;
    case CELL_CONFIDENCE: snprintf(text, 32, "%.2f", 100 * r->confidence); break;
    case CELL_CALIBRATION: snprintf(text, 32, "%.2f", 100 * r->calibration_error); break;
    case CELL_RETAINED:   if (t->r.top1 > 0) snprintf(text, 32, "%.2f", 100 * r->top1 / t->r.top1); else strcpy(text, "-"); break;
    case CELL_AGREEMENT:  snprintf(text, 32, "%.2f +- %.2f", 100 * r->agreement, 100 * share_error(r->agreement, r->positions)); break;
    case CELL_FORWARD:    snprintf(text, 32, "%.4f +- %.4f", r->forward_kl, r->forward_kl_error); break;
    case CELL_REVERSE:    snprintf(text, 32, "%.4f", r->reverse_kl); break;
    case CELL_COUNT: break;
    }
}

static void print_table(const struct eval *e, FILE *f)
{
    double top1, loss;
    char text[32];
    int longest = 8;
    int *width = xcalloc((size_t)e->n, sizeof *width);
    for (int i = 0; i < e->n; i++) {
        width[i] = (int)strlen(e->column[i].name);
        for (enum cell l = 0; l < CELL_COUNT; l++) {
            if (lines[l].needs_teacher && !e->teacher) continue;
            format_cell(e, l, &e->column[i], text);
            if ((int)strlen(text) > width[i]) width[i] = (int)strlen(text);
        }
    }
    for (int i = 0; i < e->n; i++) if ((int)strlen(e->column[i].name) > longest) longest = (int)strlen(e->column[i].name);
    for (int i = 0; i < e->n; i++) fprintf(f, "%-*s  %s\n", longest, e->column[i].name, e->column[i].path);
    fprintf(f, "\n%-24s", "");
    for (int i = 0; i < e->n; i++) fprintf(f, "  %*s", width[i], e->column[i].name);
    for (enum cell l = 0; l < CELL_COUNT; l++) {
        if (lines[l].needs_teacher && !e->teacher) continue;
        fprintf(f, "\n%-24s", lines[l].title);
        for (int i = 0; i < e->n; i++) {
            format_cell(e, l, &e->column[i], text);
            fprintf(f, "  %*s", width[i], text);
        }
    }
    free(width);
    fputc('\n', f);
    if (gap_closed(e, &top1, &loss)) {
        fprintf(f, "\ngap closed, (distilled - control) / (teacher - control):");
        if (isnan(top1)) fprintf(f, " top-1: the teacher is not ahead of the control;"); else fprintf(f, " %.1f %% of top-1,", 100 * top1);
        if (isnan(loss)) fprintf(f, " loss: the teacher is not ahead of the control\n"); else fprintf(f, " %.1f %% of the loss\n", 100 * loss);
    }
    const struct eval_result *r = &e->column[0].r;
    fprintf(f, "\n%lld positions of %lld rows x %lld: %s\nvalid ids: %lld. +- is one standard error with positions taken as independent, which in text they are not quite. Confidence: the largest probability;\n"
            "calibration error: the expected one over %d bins of confidence (Guo et al. 2017).\n", (long long)r->positions,
            (long long)r->rows, (long long)e->row_length, e->source, (long long)e->Vv, CALIBRATION_BINS);
    if (strcmp(e->c->teacher_precision, "native") || strcmp(e->c->train_matmul, "native"))
        fprintf(f, "Every model is multiplied at the device's own precision here: teacher.precision and train.matmul are of dumps and of training.\n");
}

/* NULL for a number that is not known: JSON has no NaN */
static json_t *number(double x) { return isfinite(x) ? json_real(x) : json_null(); }

static json_t *column_json(const struct eval *e, const struct column *c)
{
    const struct column *t = &e->column[0];
    const struct eval_result *r = &c->r;
    json_t *o = json_pack("{s:s, s:s, s:I, s:f, s:f, s:o, s:o, s:f, s:f, s:f, s:f, s:f, s:f}", "name", c->name, "path", c->path, "parameters", (json_int_t)c->parameters,
                          "loss", r->loss, "loss_error", r->loss_error, "perplexity", number(exp(r->loss)), "bits_per_byte", number(bits_per_byte(e, r)),
                          "top1", r->top1, "top1_error", share_error(r->top1, r->positions), "top5", r->top5, "top5_error", share_error(r->top5, r->positions),
                          "confidence", r->confidence, "calibration_error", r->calibration_error);
    if (!e->teacher) return o;
    json_object_set_new(o, "parameter_ratio", json_real((double)c->parameters / (double)t->parameters));
    json_object_set_new(o, "accuracy_retained", number(r->top1 / t->r.top1));
    if (c == t) return o;
    json_object_set_new(o, "agreement", json_real(r->agreement));
    json_object_set_new(o, "agreement_error", json_real(share_error(r->agreement, r->positions)));
    json_object_set_new(o, "forward_kl", json_real(r->forward_kl));
    json_object_set_new(o, "forward_kl_error", json_real(r->forward_kl_error));
    json_object_set_new(o, "reverse_kl", json_real(r->reverse_kl));
    return o;
}

static int write_json(const struct eval *e, const char *path)
{
    const struct eval_result *r = &e->column[0].r;
    double top1, loss;
    int rc = OK;
    json_t *models = json_array();
    json_t *o = json_pack("{s:I, s:I, s:I, s:I, s:s, s:o, s:o}", "rows", (json_int_t)r->rows, "row_length", (json_int_t)e->row_length, "positions", (json_int_t)r->positions,
                          "valid_vocab", (json_int_t)e->Vv, "source", e->source, "text_bytes", e->bytes ? json_integer(e->bytes) : json_null(), "models", models);
    for (int i = 0; i < e->n; i++) json_array_append_new(models, column_json(e, &e->column[i]));
    if (gap_closed(e, &top1, &loss)) json_object_set_new(o, "gap_closed", json_pack("{s:o, s:o}", "top1", number(top1), "loss", number(loss)));
    if (strcmp(path, "-")) rc = json_write_file(path, o);
    else {
        json_dumpf(o, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(12));
        putchar('\n');
    }
    json_decref(o);
    return rc;
}

static void eval_close(struct eval *e)
{
    loader_close(e->loader);
    for (int i = 0; i < e->n; i++) model_free(e->column[i].model);
    memory_plan_free(e->plan);
    backend_close(e->be);
    for (int i = 0; i < e->n; i++) {
        model_files_close(e->column[i].files);
        free(e->column[i].name);
        free(e->column[i].path);
    }
    free(e->column);
    shard_dataset_close(e->dataset);
    corpus_rows_free(e->rows);
    corpus_rows_free(e->unused);
    tokenizer_close(e->tokenizer);
    free(e->tokenizer_dir);
    free(e->source);
    free(e->flag_models);
}

int command_eval(int argc, char **argv)
{
    struct eval e = {.flag_models = xcalloc((size_t)argc, sizeof *e.flag_models)};
    struct config *c = NULL;
    int rc = OK, help;
    TRY(command_config(argc, argv, CMD_EVAL,
                       "Compares models on held-out rows: loss, perplexity, bits per byte, top-1 and top-5 accuracy, calibration error, and, against teacher.path,\n"
                       "accuracy retained, agreement and KL both ways. Rows are the held-out documents of corpus.files, or those of the dataset shards.heldout_path when corpus.files\n"
                       "is empty. A table on standard output; the same as JSON in eval.json. With eval.json=- standard output is JSON and the table goes to standard error.",
                       "distill eval run.yaml --model distilled=runs/kd/checkpoints/step-00002000 --model control=runs/ce/checkpoints/step-00002000", model_flag, &e,
                       "  --model NAME=PATH    a further model, one column each; may be repeated. A teacher, a model named distilled (or eval.model)\n"
                       "                       and one named control also give the gap closed: (distilled - control) / (teacher - control)\n", &c, &help));
    if (help) goto out;
    e.c = c;
    bool json_out = !strcmp(c->eval_json, "-");
    TRY(open_models(&e));
    TRY(open_tokenizer(&e));
    TRY(open_rows(&e));
    TRY(load_models(&e));
    TRY(measure(&e, !json_out && isatty(STDOUT_FILENO)));
    print_table(&e, json_out ? stderr : stdout);
    if (*c->eval_json) TRY(write_json(&e, c->eval_json));
out:
    eval_close(&e);
    config_free(c);
    return rc;
}
