/* Opens a training run: what the keys mean together is decided here, before anything is computed. */
#include <math.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "base/lock.h"
#include "train/alignment.h"
#include "train/binding.h"
#include "train/progress.h"
#include "train/signals.h"
#include "train/targets.h"
#include "train/trainer.h"

static int choice(const char *value, const char *const *names)
{
    for (int i = 0; names[i]; i++) if (!strcmp(value, names[i])) return i;
    CHECK(false, "the option table let \"%s\" through", value);
}

static bool from_corpus(const struct config *c) { return !strcmp(c->train_source, "corpus"); }

/* Keys that contradict each other, whatever the data is. */
static int check_keys(const struct config *c)
{
    if (c->objective_kd_weight == 0 && c->objective_ce_weight == 0) return fail(ERR_USAGE, "objective.kd_weight and objective.ce_weight are both 0: there is nothing to learn");
    if (from_corpus(c) && c->objective_kd_weight != 0)
        return fail(ERR_USAGE, "train.source is corpus, which has no teacher: set objective.kd_weight to 0 and objective.ce_weight to 1, or train.source to shards");
    if (c->train_batch_rows % c->train_micro_rows)
        return fail(ERR_USAGE, "train.batch_rows (%lld) is not a multiple of train.micro_rows (%lld)", (long long)c->train_batch_rows, (long long)c->train_micro_rows);
    if (c->shards_allow_missing && c->shards_follow)
        return fail(ERR_USAGE, "shards.allow_missing and shards.follow are both set: a shard that is not there yet is either waited for or left out");
    if (!c->train_steps && c->train_epochs <= 0) return fail(ERR_USAGE, "train.steps and train.epochs are both 0: say how long to train");
    return OK;
}

/* A run that follows a dump may be started before it. */
static int wait_for_manifest(const struct config *c)
{
    char *manifest = path_join(c->shards_path, "manifest.json");
    double start = now_seconds();
    int rc = OK;
    if (!path_exists(manifest)) printf("waiting for %s\n", manifest);
    fflush(stdout);
    while (rc == OK && !path_exists(manifest)) {
        if (stop_requested) rc = fail(ERR_STOPPED, "stopped by a signal while waiting for %s", manifest);
        else if (c->shards_wait_s > 0 && now_seconds() - start > c->shards_wait_s)
            rc = fail(ERR_LOST, "%s did not appear within %g seconds (shards.wait_s); start distill teacher-dump", manifest, c->shards_wait_s);
        else nanosleep(&(struct timespec){.tv_nsec = 200000000}, NULL);
    }
    free(manifest);
    return rc;
}

/* With shards.allow_missing: the dataset is what is there, and how much that is not is said. */
static void leave_out_missing(struct shard_dataset *d, const char *path, struct shard_list *out)
{
    const struct shard_manifest *m = shard_dataset_manifest(d);
    int64_t rows = 0;
    shard_dataset_missing(d, &out->shard, &out->n);
    for (int64_t i = 0; i < out->n; i++) rows += shard_rows(m, out->shard[i]);
    if (out->n) warn("%s: %lld of %lld shards are missing and left out, the first is shard %lld: %lld of %lld rows, %.2f %%", path, (long long)out->n, (long long)shard_count(m), (long long)out->shard[0],
                     (long long)rows, (long long)m->rows, 100 * (double)rows / (double)m->rows);
    shard_dataset_leave_out(d, out->shard, out->n);
}

static int open_shards(struct trainer *t)
{
    const struct config *c = t->c;
    int rc = OK;
    char *heldout = heldout_shards_path(c), *manifest = path_join(heldout, "manifest.json");
    struct shard_list heldout_left_out = {0};
    if (c->shards_follow) TRY(wait_for_manifest(c));
    TRY(shard_dataset_open(&t->dataset, c->shards_path));
    const struct shard_manifest *m = shard_dataset_manifest(t->dataset);
    TRY(binding_check(m, c, t->student, t->tokenizer));
    TRY(targets_choose(&t->loss, &t->target_kind, &t->k, c, m));
    strcpy(t->data_id, shard_dataset_id(t->dataset));
    if (c->shards_allow_missing) leave_out_missing(t->dataset, c->shards_path, &t->state.left_out);
    t->row_length = m->row_length;
    t->Vv = m->valid_vocab;
    if (c->train_eval_every && path_exists(manifest)) {
        TRY(shard_dataset_open(&t->heldout_dataset, heldout));
        const struct shard_manifest *h = shard_dataset_manifest(t->heldout_dataset);
        if (h->kind != m->kind || h->k != m->k || h->draws != m->draws || h->valid_vocab != m->valid_vocab || h->row_length != m->row_length || h->precision != m->precision ||
            h->native_first != m->native_first || h->native_last != m->native_last || strcmp(h->teacher_weights_hash, m->teacher_weights_hash)) {
            rc = fail(ERR_MISMATCH, "%s and %s were not dumped with one teacher and one configuration; dump both again or set train.eval_every to 0", c->shards_path, heldout);
            goto out;
        }
        if (c->shards_allow_missing) leave_out_missing(t->heldout_dataset, heldout, &heldout_left_out);
    } else if (c->train_eval_every) warn("%s does not exist: there is no held-out evaluation during training", heldout);
out:
    free(heldout_left_out.shard);
    free(heldout);
    free(manifest);
    return rc;
}

static int open_corpus(struct trainer *t)
{
    int rc = OK;
    struct corpus_options o = corpus_options_of(t->c);
    t->Vv = valid_vocab(t->student->config, t->tokenizer);
    TRY(corpus_read(&t->rows, &t->heldout_rows, &o, t->tokenizer, (int32_t)t->Vv));
    corpus_rows_hash(t->rows, t->data_id);
    t->row_length = t->rows->length;
    printf("corpus    %lld documents, %lld tokens in %lld rows of %lld; held out: %lld rows\n", (long long)t->rows->documents, (long long)t->rows->tokens_total, (long long)t->rows->rows,
           (long long)t->rows->length, (long long)(t->heldout_rows ? t->heldout_rows->rows : 0));
    if (t->c->train_eval_every && !(t->heldout_rows && t->heldout_rows->rows)) warn("corpus.heldout_fraction keeps no rows: there is no held-out evaluation during training");
out:
    return rc;
}

int trainer_open_loader(const struct trainer *t, bool heldout, struct loader **out)
{
    struct loader_options o = {.batch_rows = t->c->train_micro_rows, .seed = (uint64_t)t->c->run_seed, .temperature = (float)t->c->objective_temperature, .samples = t->target_kind == TARGET_SAMPLES,
                               .shuffle = !heldout, .follow = t->c->shards_follow && !heldout, .wait_s = t->c->shards_wait_s, .stop = &stop_requested};
    if (from_corpus(t->c)) return loader_open_rows(out, heldout ? t->heldout_rows : t->rows, &o);
    return loader_open_dataset(out, heldout ? t->heldout_dataset : t->dataset, &o);
}

static int check_alignment(const struct trainer *t)
{
    struct loader_options o = {.seed = (uint64_t)t->c->run_seed, .shuffle = true, .follow = t->c->shards_follow, .wait_s = t->c->shards_wait_s, .stop = &stop_requested};
    return alignment_check(t->dataset, &o, t->c->shards_path);
}

static int plan_memory(struct trainer *t)
{
    static const char *const recompute[] = {[RECOMPUTE_NONE] = "none", [RECOMPUTE_SWIGLU_NORM] = "swiglu_norm", [RECOMPUTE_FFN] = "ffn", [RECOMPUTE_BLOCK] = "block", NULL};
    const struct config *c = t->c;
    struct backend_options device = {.device = c->run_device, .threads = (int)c->run_threads, .deterministic = c->train_deterministic, .recipe = c->train_recipe};
    int rc = OK;
    TRY(backend_open(&t->be, &device));
    int64_t N = c->train_micro_rows * t->row_length;
    struct model_options o = {.N = N, .max_doc = t->row_length, .head_rows = c->train_chunk_tokens < N ? c->train_chunk_tokens : N, .train = true,
                              .recompute = choice(c->train_recompute, recompute), .fp8 = !strcmp(c->train_matmul, "fp8"),
                              .native_first = (int)c->train_fp8_native_first, .native_last = (int)c->train_fp8_native_last};
    TRY(model_check_device(t->be, t->student->config, "the student"));
    if (o.fp8) TRY(model_check_fp8(t->be, t->student->config, o.native_first, o.native_last, "train.matmul"));
    struct adamw_args adamw = {.beta1 = c->optimizer_beta1, .beta2 = c->optimizer_beta2, .eps = c->optimizer_eps, .weight_decay = c->optimizer_weight_decay, .clip = c->optimizer_clip,
                               .seed = (uint64_t)c->run_seed};
    t->plan = memory_plan_new(t->be);
    t->model = model_new(t->be, t->student->config, &o, t->plan);
    t->objective = objective_new(t->model, &t->loss, t->Vv, t->target_kind, t->k, t->plan);
    t->optimizer = optimizer_new(t->model, &adamw, t->plan);
    memory_add_scratch(t->plan, model_scratch_bytes(t->model, t->k));
out:
    return rc;
}

static void print_plan(const struct trainer *t, int64_t rows)
{
    const struct config *c = t->c;
    double tokens = (double)t->steps * (double)(c->train_batch_rows * t->row_length), flops = 3 * model_config_forward_flops(t->student->config, t->row_length);
    printf("plan      %lld steps of %lld rows x %lld tokens (%d micro-batches), %.2f epochs of %lld rows, %.1fM tokens\n", (long long)t->steps, (long long)c->train_batch_rows,
           (long long)t->row_length, t->accum, (double)(t->steps * c->train_batch_rows) / (double)rows, (long long)rows, tokens / 1e6);
    printf("          %.3g FLOP per token, %.3g in all: %.1f hours at 100 GFLOP/s, %.2f at 100 TFLOP/s\n", flops, flops * tokens, flops * tokens / 1e11 / 3600, flops * tokens / 1e14 / 3600);
    const struct model *m = t->model;
    if (m->o.fp8) printf("matmul    fp8 in %d of %d blocks; %d at the front and %d at the end stay native\n", m->fp8_end - m->fp8_begin, m->c->n_layers, m->o.native_first, m->o.native_last);
    char *divergence = targets_describe(&t->loss);
    if (t->target_kind != TARGET_NONE) {
        printf("objective %g x %s at T = %g, tail %s of %s targets; %g x cross entropy\n", c->objective_kd_weight, divergence, c->objective_temperature, tail_name(t->loss.tail),
               shard_kind_name(shard_dataset_manifest(t->dataset)->kind), c->objective_ce_weight);
    } else printf("objective cross entropy with the text alone\n");
    free(divergence);
    memory_print(t->plan, stdout);
}

/* What was set otherwise when the checkpoint was written. It may be meant, a longer run or another learning rate, and is said because it may not be. */
static void say_changes(const struct config *c, const char *checkpoint)
{
    struct config *was = config_new();
    char *yaml = path_join(checkpoint, "run.yaml"), *changes;
    if (config_read_file(was, yaml) != OK) {
        warn("what changed since %s is not known: %s", checkpoint, fail_message());
        goto out;
    }
    was->run_resume = c->run_resume;
    changes = config_differences(was, c, CMD_TRAIN);
    if (*changes) printf("changed   since the checkpoint: %s\n", changes);
    free(changes);
out:
    free(yaml);
    config_free(was);
}

/* The loader, and how long the run is by what it gives. */
static int open_rows(struct trainer *t)
{
    const struct config *c = t->c;
    int rc = OK;
    loader_close(t->loader);
    t->loader = NULL;
    TRY(trainer_open_loader(t, false, &t->loader));
    t->accum = (int)(c->train_batch_rows / c->train_micro_rows);
    t->steps = c->train_steps ? c->train_steps : (int64_t)ceil(c->train_epochs * (double)loader_rows_per_epoch(t->loader) / (double)c->train_batch_rows);
    TRY(schedule_make(&t->schedule, c, t->steps));
out:
    return rc;
}

static bool lists(const struct shard_list *l, int64_t shard)
{
    for (int64_t i = 0; i < l->n; i++) if (l->shard[i] == shard) return true;
    return false;
}

/* The shards the run began without are those it goes on without, or its place among the rows would mean others. `missing`: those of today, the caller's. */
static int keep_left_out(struct trainer *t, const struct shard_list *missing, const char *path)
{
    struct shard_list *began = &t->state.left_out;
    int64_t back = 0;
    for (int64_t i = 0; i < missing->n; i++)
        if (!lists(began, missing->shard[i]))
            return fail(ERR_MISMATCH, "%s: shard %lld is missing, but the run of %s began with it, and which rows come next depends on it; let distill inspect %s --repair and teacher-dump make it again, "
                        "or start another run.dir", t->c->shards_path, (long long)missing->shard[i], path, t->c->shards_path);
    if (began->n == missing->n) return OK;
    for (int64_t i = 0; i < began->n; i++) {
        if (!t->dataset || began->shard[i] >= shard_count(shard_dataset_manifest(t->dataset))) return fail(ERR_INPUT, "%s: state.json leaves out a shard %lld, which there is not", path, (long long)began->shard[i]);
        back += !lists(missing, began->shard[i]);
    }
    printf("resume    %lld shards are there again that were missing when the run began; it goes on without them", (long long)back);
    shard_dataset_leave_out(t->dataset, began->shard, began->n);
    int rc = open_rows(t);
    printf(rc == OK ? ", for %lld steps in all\n" : "\n", (long long)t->steps);
    return rc;
}

/* Position of the data, weights and moments of the newest checkpoint, or a fresh start. */
static int start_or_resume(struct trainer *t)
{
    const struct config *c = t->c;
    int rc = OK;
    char *path = NULL;
    struct shard_list missing = {0};
    TRY(checkpoint_find(c->run_dir, &path));
    if (path && !c->run_resume) {
        rc = fail(ERR_USAGE, "%s already holds a run (%s); go on with --resume, or choose another run.dir", c->run_dir, path);
        goto out;
    }
    if (!path) {
        if (c->run_resume) printf("resume    %s has no checkpoint yet: starting from the beginning\n", c->run_dir);
        TRY(student_weights(t->student, t->model, (uint64_t)c->run_seed));
        TRY(student_master(t->student, t->optimizer));
        strcpy(t->state.data_id, t->data_id);
        t->state.seed = c->run_seed;
        goto out;
    }
    missing = t->state.left_out;
    t->state.left_out = (struct shard_list){0};
    TRY(checkpoint_load(path, t->model, t->optimizer, &t->state));
    if (strcmp(t->state.data_id, t->data_id)) {
        rc = fail(ERR_MISMATCH, "%s was trained on data %.16s, this run's data is %.16s: resume with the same shards or corpus, or start another run.dir", path, t->state.data_id, t->data_id);
        goto out;
    }
    if (t->state.seed != c->run_seed) {
        rc = fail(ERR_MISMATCH, "%s was trained with run.seed %lld, which gives the order of the rows, not with %lld: resume with the same seed", path, (long long)t->state.seed, (long long)c->run_seed);
        goto out;
    }
    TRY(keep_left_out(t, &missing, path));
    if (t->state.step > t->steps) {
        rc = fail(ERR_USAGE, "%s is beyond the %lld steps that this configuration asks for (train.steps, train.epochs): ask for more, or start another run.dir", path, (long long)t->steps);
        goto out;
    }
    if (!strcmp(c->train_spike, "off")) spike_forget(&t->state.spike);
    TRY(loader_seek(t->loader, &t->state.loader));
    printf("resume    from %s\n", path);
    say_changes(c, path);
out:
    free(missing.shard);
    free(path);
    return rc;
}

enum { DYING_SECONDS = 10 };   /* how long a killed run may take to give its memory back and die: it is started again at once by those who have a loop for it */

/* Two runs in one directory would take each other's checkpoints for their own. */
static int lock_run_dir(struct trainer *t)
{
    int rc = OK;
    char *lock = path_join(t->c->run_dir, ".lock");
    TRY(dir_make(t->c->run_dir));
    TRY(lock_take(&t->lock, lock, t->c->run_dir, DYING_SECONDS));
out:
    free(lock);
    return rc;
}

static int open_run_dir(struct trainer *t)
{
    int rc = OK;
    bool alone = t->lock >= 0;
    char *yaml = path_join(t->c->run_dir, "run.yaml"), *metrics = path_join(t->c->run_dir, "metrics.jsonl");
    TRY(file_remove_leftovers(yaml, alone));
    TRY(file_remove_leftovers(metrics, alone));
    TRY(config_write(t->c, yaml));
    TRY(metrics_open(&t->metrics, t->c->run_dir, t->state.step));
out:
    free(metrics);
    free(yaml);
    return rc;
}

int trainer_open(struct trainer **out, const struct config *c, bool plan_only)
{
    int rc = OK;
    struct trainer *t = xcalloc(1, sizeof *t);
    t->c = c;
    t->lock = -1;
    TRY(check_keys(c));
    TRY(targets_objective(&t->loss, c));
    TRY(student_open(&t->student, c));
    if (t->student->tokenizer_dir) TRY(check_tokenizer_dir(t->student->tokenizer_dir));
    if (t->student->tokenizer_dir) TRY(tokenizer_open(&t->tokenizer, t->student->tokenizer_dir));
    TRY(from_corpus(c) ? open_corpus(t) : open_shards(t));
    if (t->row_length > t->student->config->max_position) {
        rc = fail(ERR_MISMATCH, "rows are %lld tokens long, the student's max_position_embeddings is %lld: make the rows shorter", (long long)t->row_length, (long long)t->student->config->max_position);
        goto out;
    }
    if (c->train_micro_rows > INT32_MAX / t->row_length) {
        rc = fail(ERR_USAGE, "train.micro_rows %lld with rows of %lld tokens is more positions than one pass can count: make train.micro_rows smaller", (long long)c->train_micro_rows, (long long)t->row_length);
        goto out;
    }
    TRY(plan_memory(t));
    TRY(open_rows(t));
    student_describe(t->student, c, t->model->params->parameters);
    print_plan(t, loader_rows_per_epoch(t->loader));
    if (!plan_only) {
        if (t->dataset && c->train_check_alignment && t->target_kind != TARGET_NONE) TRY(check_alignment(t));
        TRY(lock_run_dir(t));                    /* a run that is dying still has its memory */
        TRY(memory_commit(t->plan, (size_t)(c->memory_limit_gib * 0x1p30)));
        model_ready(t->model);
        optimizer_ready(t->optimizer);
        TRY(start_or_resume(t));
        model_weights_changed(t->model);
        TRY(open_run_dir(t));
        t->batch = xcalloc((size_t)t->accum, sizeof *t->batch);
        for (int i = 0; i < t->accum; i++) t->batch[i] = batch_new(c->train_micro_rows, t->row_length, t->dataset ? shard_dataset_manifest(t->dataset) : NULL, t->target_kind == TARGET_SAMPLES);
    }
    *out = t;
    t = NULL;
out:
    trainer_close(t);
    return rc;
}

void trainer_close(struct trainer *t)
{
    if (!t) return;
    metrics_close(t->metrics);
    for (int i = 0; t->batch && i < t->accum; i++) batch_free(t->batch[i]);
    free(t->batch);
    free(t->state.left_out.shard);
    loader_close(t->loader);
    optimizer_free(t->optimizer);
    objective_free(t->objective);
    model_free(t->model);
    memory_plan_free(t->plan);
    backend_close(t->be);
    shard_dataset_close(t->dataset);
    shard_dataset_close(t->heldout_dataset);
    corpus_rows_free(t->rows);
    corpus_rows_free(t->heldout_rows);
    tokenizer_close(t->tokenizer);
    student_close(t->student);
    if (t->lock >= 0) close(t->lock);
    free(t);
}
