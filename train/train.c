/* distill train: the optimizer step and the loop around it. train_setup.c opens what is used here; a batch goes on from here to model.c,
 * objective.c and optimizer.c. */
#include "train/trainer.h"

#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/failpoint.h"
#include "train/command.h"
#include "train/progress.h"
#include "train/signals.h"

struct step_stats { double loss, kd, ce, grad_norm, lr, kd_norm, ce_norm; int64_t targets; bool measured, skipped; struct fp8_census census[CENSUS_COUNT]; };
enum { ZERO_KD_STEPS = 3 };   /* a student that is the teacher may start at KL 0; it does not stay there while anything else moves it */

/* Our own copy of a batch the loader will overwrite. */
static void batch_keep(struct batch *to, const struct batch *from)
{
    size_t n = (size_t)from->n;
    memcpy(to->tokens, from->tokens, n * sizeof *to->tokens);
    memcpy(to->labels, from->labels, n * sizeof *to->labels);
    memcpy(to->mask, from->mask, n * sizeof *to->mask);
    memcpy(to->position, from->position, n * sizeof *to->position);
    memcpy(to->doc_begin, from->doc_begin, (size_t)(from->n_docs + 1) * sizeof *to->doc_begin);
    memcpy(to->row_index, from->row_index, (size_t)from->rows * sizeof *to->row_index);
    to->n_docs = from->n_docs;
    to->max_doc = from->max_doc;
    to->n_targets = from->n_targets;
    if (from->head_ids) {
        memcpy(to->head_ids, from->head_ids, n * (size_t)from->k * sizeof *to->head_ids);
        memcpy(to->head_logprob, from->head_logprob, n * (size_t)from->k * sizeof *to->head_logprob);
    }
    if (from->tail_logmass) memcpy(to->tail_logmass, from->tail_logmass, n * sizeof *to->tail_logmass);
    if (from->weight) memcpy(to->weight, from->weight, n * (size_t)from->k * sizeof *to->weight);
    to->full_scale = from->full_scale;
    if (from->full_logits) memcpy(to->full_logits, from->full_logits, n * (size_t)from->full_width * sizeof *to->full_logits);
}

/* The KD part is exactly 0: nothing to learn from, or a student that is its teacher. */
static int check_zero_kd(struct trainer *t, const struct step_stats *s)
{
    long long step = (long long)t->state.step + 1;
    bool teacher = false;
    for (int i = 0; i < t->accum; i++) teacher |= objective_has_teacher(t->objective, t->batch[i]);
    if (!teacher) return fail(ERR_NUMERIC, "step %lld: objective.kd_weight is %g, but the shards give no teacher's probability at any of %lld targets; no weight was changed. Look at rows from %lld with distill inspect", step,
                              t->c->objective_kd_weight, (long long)s->targets, (long long)t->batch[0]->row_index[0]);
    if (++t->zero_kd < ZERO_KD_STEPS || (s->measured && s->kd_norm > 0)) return OK;
    return fail(ERR_NUMERIC, "step %lld: the KD loss and its gradient have been exactly 0 for %d steps, the last over %lld targets: student and teacher are the same model, or no targets differ from what "
                "the student must say (objective.kd_weight 0 trains on the text alone)", step, t->zero_kd, (long long)s->targets);
}

/* Of a measured step in fp8, for its end: how many rows of products held what is not finite; valid until the next call. */
static const char *rounded_text(const struct trainer *t, const struct step_stats *s)
{
    static char text[120];
    if (!s->measured || !t->model->o.fp8) return "";
    snprintf(text, sizeof text, ", not finite in products in fp8: %.0f rows of inputs, %.0f of gradients", (double)s->census[CENSUS_ACTIVATIONS].not_finite, (double)s->census[CENSUS_GRADIENTS].not_finite);
    return text;
}

/* Loss and norm must be finite before a weight moves; a distillation whose KD part is nothing is no distillation. */
static int check_numbers(struct trainer *t, const struct step_stats *s)
{
    if (!isfinite(s->loss) || !isfinite(s->grad_norm) || (s->measured && !(isfinite(s->kd_norm) && isfinite(s->ce_norm))))
        return fail(ERR_NUMERIC, "step %lld: loss %g (kd %g, ce %g), gradient norm %g%s; no weight was changed. First row of the step: %lld. Lower optimizer.lr, or look at the row with distill inspect",
                    (long long)(t->state.step + 1), s->loss, s->kd, s->ce, s->grad_norm, rounded_text(t, s), (long long)t->batch[0]->row_index[0]);
    if (t->c->objective_kd_weight != 0 && s->targets && s->kd == 0) return check_zero_kd(t, s);
    t->zero_kd = 0;
    return OK;
}

/* "3, 18, 7": rows of the step, the first few of them; valid until the next call. */
static const char *rows_text(const struct trainer *t)
{
    static char text[200];
    int64_t n = 0;
    size_t used = 0;
    for (int i = 0; i < t->accum; i++)
        for (int64_t r = 0; r < t->batch[i]->rows && n < 8; r++, n++)
            used += (size_t)snprintf(text + used, sizeof text - used, "%s%lld", n ? ", " : "", (long long)t->batch[i]->row_index[r]);
    if (n < t->c->train_batch_rows) snprintf(text + used, sizeof text - used, ", ...");
    return text;
}

/* train.spike: what a step far out of the run's way is worth, after its numbers were found finite and before a weight moves. */
static int check_spike(struct trainer *t, struct step_stats *s)
{
    struct spike_state *state = &t->state.spike;
    struct spike found;
    long long step = (long long)t->state.step + 1;
    s->skipped = false;
    if (!strcmp(t->c->train_spike, "off") || !s->targets) return OK;
    if (!spike_judge(state, t->c->train_spike_threshold, s->loss, s->grad_norm, &found)) {
        spike_remember(state, s->loss, s->grad_norm);
        return OK;
    }
    char *what = xasprintf("step %lld: %s %g is %.1f deviations above the median of the %d steps before it, %g +- %g; rows %s", step, found.what, found.value, (found.value - found.median) / found.deviation,
                           state->n, found.median, found.deviation, rows_text(t));
    progress_end();
    int rc = OK;
    if (!strcmp(t->c->train_spike, "stop"))
        rc = fail(ERR_NUMERIC, "%s. No weight was changed (train.spike stop); look at the rows with distill inspect, lower optimizer.lr, or set train.spike to skip", what);
    else if (!t->c->train_spike_most)
        rc = fail(ERR_NUMERIC, "%s. train.spike_most is 0, so that no step may be left out: raise it, or set train.spike to stop", what);
    else if (state->in_a_row >= t->c->train_spike_most)
        rc = fail(ERR_NUMERIC, "%s. %lld steps before it were left out as well (train.spike_most): that is no spike, the run has left its way; go on from an earlier checkpoint with a lower optimizer.lr", what,
                  (long long)state->in_a_row);
    else {
        spike_skip(state);
        s->skipped = true;
        warn("%s: its update is left out, %lld so far (train.spike skip)", what, (long long)state->skipped);
    }
    free(what);
    return rc;
}

void train_gradients(struct model *m, struct objective *o, struct batch *const *batch, int n, double divisor)
{
    m->be->ops->fill_zero(m->be, m->grads, (size_t)m->params->total * dtype_width(m->be->grad_dtype));
    objective_reset(o);
    for (int i = 0; i < n; i++) {
        model_set_batch(m, batch[i]);
        model_forward(m);                                      /* tokens -> hidden */
        objective_run(o, batch[i], divisor, true);             /* hidden -> loss, d_hidden, head gradient */
        model_backward(m);                                     /* d_hidden -> gradients */
    }
}

/* For the tests: what a bit that flips in the device's memory does to a gradient, the highest of its exponent. */
static void flip_bit(struct model *m)
{
    size_t width = dtype_width(m->be->grad_dtype);
    unsigned char *gradient = (unsigned char *)m->grads + (size_t)m->params->norm->offset * width, value[8];
    m->be->ops->download(m->be, value, gradient, width);
    value[width - 1] ^= 0x40;
    m->be->ops->upload(m->be, gradient, value, width);
}

/* One optimizer step, top to bottom. */
static int train_step(struct trainer *t, struct step_stats *s)
{
    struct batch *next;
    int rc = OK;

    s->targets = 0;                                            /* over all micro-batches: the objective must not depend on the split */
    for (int i = 0; i < t->accum; i++) {
        TRY(loader_next(t->loader, &next));
        batch_keep(t->batch[i], next);
        s->targets += next->n_targets;
    }
    double divisor = s->targets ? (double)s->targets : 1;
    int64_t step = t->state.step + 1;
    s->measured = t->objective->measure = step == 1 || step % t->c->train_measure_every == 0 || step == t->steps || t->zero_kd > 0;
    if (s->measured) model_count_fp8(t->model);
    train_gradients(t->model, t->objective, t->batch, t->accum, divisor);
    if (FAILPOINT_FIRES("train.flip")) flip_bit(t->model);
    optimizer_queue_norm(t->optimizer);
    objective_read(t->objective, &s->kd, &s->ce);              /* here the host waits for the step; what it reads further on is there by then */
    model_read_census(t->model, s->census);
    if (s->measured) objective_norms(t->objective, divisor, &s->kd_norm, &s->ce_norm);
    s->grad_norm = optimizer_read_norm(t->optimizer);
    s->kd /= divisor;
    s->ce /= divisor;
    s->loss = t->c->objective_kd_weight * s->kd + t->c->objective_ce_weight * s->ce;
    s->lr = schedule_lr(&t->schedule, t->state.step);
    TRY(check_numbers(t, s));
    TRY(check_spike(t, s));
    TRY(FAILPOINT("train.before_update"));
    if (s->targets && !s->skipped) {
        optimizer_step(t->optimizer, t->state.step + 1 - t->state.spike.skipped, s->lr);   /* moments have seen no skipped step */
        model_weights_changed(t->model);
    }

    t->state.step++;
    t->state.tokens += t->accum * t->model->n;
    t->state.targets += s->targets;
    loader_tell(t->loader, &t->state.loader);
    TRY(FAILPOINT("train.after_update"));
out:
    return rc;
}

/* Mean losses over the held-out rows, forward only. */
static int evaluate(struct trainer *t, double *kd, double *ce)
{
    struct loader *loader = NULL;
    struct batch *b;
    int64_t targets = 0, rows = 0;
    int rc = OK;
    TRY(trainer_open_loader(t, true, &loader));
    t->objective->measure = false;
    objective_reset(t->objective);
    for (;;) {
        TRY(loader_next(loader, &b));
        if (!b) break;
        model_set_batch(t->model, b);
        model_forward(t->model);
        objective_run(t->objective, b, 1, false);
        targets += b->n_targets;
        rows += b->rows;
        if (t->c->eval_max_rows && rows >= t->c->eval_max_rows) break;
    }
    objective_read(t->objective, kd, ce);
    *kd /= (double)(targets ? targets : 1);
    *ce /= (double)(targets ? targets : 1);
out:
    loader_close(loader);
    return rc;
}

static bool has_heldout(const struct trainer *t) { return t->heldout_dataset || (t->heldout_rows && t->heldout_rows->rows); }

static int evaluate_and_report(struct trainer *t)
{
    double kd = 0, ce = 0;
    int rc = evaluate(t, &kd, &ce);
    if (rc != OK) return rc;
    double loss = t->c->objective_kd_weight * kd + t->c->objective_ce_weight * ce;
    progress_end();
    printf("held-out at step %lld: loss %.4f  kd %.4f  ce %.4f  perplexity %.3f\n", (long long)t->state.step, loss, kd, ce, exp(ce));
    const struct metric values[] = {{"heldout/loss", loss}, {"heldout/kd", kd}, {"heldout/ce", ce}};
    return metrics_write(t->metrics, t->state.step, values, 3);
}

/* What rounding to fp8 did to the inputs of the products and to the gradients of their outputs. Nothing can saturate (each row is scaled by its largest), so what is
 * lost is what becomes 0. */
static int add_census(struct metric *values, const struct fp8_census *census)
{
    static const char *const tags[CENSUS_COUNT][3] = {{"fp8/activation_largest", "fp8/activation_zero_share", "fp8/activation_rows_not_finite"},
                                                      {"fp8/gradient_largest", "fp8/gradient_zero_share", "fp8/gradient_rows_not_finite"}};
    int n = 0;
    for (int i = 0; i < CENSUS_COUNT; i++) {
        const struct fp8_census *s = &census[i];
        values[n++] = (struct metric){tags[i][0], s->largest};
        values[n++] = (struct metric){tags[i][1], s->elements > 0 ? s->zeros / s->elements : 0};
        values[n++] = (struct metric){tags[i][2], s->not_finite};
    }
    return n;
}

static int report_step(struct trainer *t, const struct step_stats *s, double rate, double eta)
{
    double both = s->kd_norm + s->ce_norm;
    int64_t every = t->c->train_log_every, step = t->state.step;
    char kd_share[16] = "", ce_share[16] = "";
    if (s->measured) {
        t->share.known = true;
        t->share.kd = both > 0 ? s->kd_norm / both : 0;
        t->share.ce = both > 0 ? s->ce_norm / both : 0;
    }
    struct metric values[13 + 3 * CENSUS_COUNT] = {{"train/loss", s->loss}, {"train/kd", s->kd}, {"train/ce", s->ce}, {"train/grad_norm", s->grad_norm}, {"train/lr", s->lr},
                                    {"train/tokens_per_second", rate}, {"train/loader_wait_seconds", loader_wait_seconds(t->loader)}, {"train/tokens", (double)t->state.tokens}};
    int n = 8;
    if (strcmp(t->c->train_spike, "off")) values[n++] = (struct metric){"train/steps_skipped", (double)t->state.spike.skipped};
    const struct metric measured[] = {{"train/kd_norm", s->kd_norm}, {"train/ce_norm", s->ce_norm}, {"train/kd_share", t->share.kd}, {"train/ce_share", t->share.ce}};
    for (int i = 0; i < 4 && s->measured; i++) values[n++] = measured[i];
    if (s->measured && t->model->o.fp8) n += add_census(values + n, s->census);
    if (t->share.known) {
        snprintf(kd_share, sizeof kd_share, " (%.0f %%)", 100 * t->share.kd);
        snprintf(ce_share, sizeof ce_share, " (%.0f %%)", 100 * t->share.ce);
    }
    if (every == 0 || step % every == 0 || step == t->steps)
        (every ? progress_always : progress)("step %lld/%lld  loss %.4f  kd %.4f%s  ce %.4f%s  |g| %.3f  lr %.2e  %.0f tok/s  waited %.1fs  eta %s", (long long)step, (long long)t->steps, s->loss,
                                             s->kd, kd_share, s->ce, ce_share, s->grad_norm, s->lr, rate, loader_wait_seconds(t->loader), duration_text(eta));
    return metrics_write(t->metrics, step, values, n);
}

static int save(struct trainer *t)
{
    return checkpoint_save(t->c->run_dir, t->model, t->optimizer, &t->state, t->c, t->student->tokenizer_dir, t->c->train_keep_checkpoints);
}

static int train_loop(struct trainer *t)
{
    const struct config *c = t->c;
    struct step_stats s;
    double start = now_seconds();
    int64_t first = t->state.step, saved = first;
    int rc = OK;
    while (t->state.step < t->steps && !stop_requested) {
        rc = train_step(t, &s);
        if (rc == ERR_STOPPED) break;                         /* a signal while it waited for shards */
        if (rc != OK) goto out;
        double elapsed = now_seconds() - start, per_step = elapsed / (double)(t->state.step - first);
        TRY(report_step(t, &s, (double)(c->train_batch_rows * t->row_length) / per_step, per_step * (double)(t->steps - t->state.step)));
        TRY(FAILPOINT("train.step_done"));
        if (c->train_eval_every && t->state.step % c->train_eval_every == 0 && has_heldout(t)) TRY(evaluate_and_report(t));
        if (c->train_checkpoint_every && t->state.step % c->train_checkpoint_every == 0) { TRY(save(t)); saved = t->state.step; }
    }
    rc = OK;
    progress_end();
    if (t->state.step > saved) TRY(save(t));
    if (t->state.step < t->steps) rc = fail(ERR_STOPPED, "stopped by a signal after step %lld of %lld; go on with --resume", (long long)t->state.step, (long long)t->steps);
    else printf("done      %lld steps, %.2fM tokens; student in %s/checkpoints/step-%08lld\n", (long long)t->state.step, (double)t->state.tokens / 1e6, c->run_dir, (long long)t->state.step);
out:
    progress_end();
    return rc;
}

struct flags { bool resume, dry_run, allow_missing; };

static int take_flag(void *context, int argc, char **argv, int *i)
{
    struct flags *f = context;
    (void)argc;
    if (!strcmp(argv[*i], "--resume")) f->resume = true;
    else if (!strcmp(argv[*i], "--dry-run")) f->dry_run = true;
    else if (!strcmp(argv[*i], "--allow-missing")) f->allow_missing = true;
    else return 0;
    return 1;
}

int command_train(int argc, char **argv)
{
    struct config *c = NULL;
    struct trainer *t = NULL;
    struct flags flags = {0};
    int help, rc = OK;
    TRY(command_config(argc, argv, CMD_TRAIN, "Trains a student on a teacher's logit shards (or, with train.source: corpus, a model on plain text) and writes checkpoints that other tools load.",
                       "distill train configs/quickstart/distill.yaml --set train.steps=100", take_flag, &flags,
                       "  --resume    go on from the newest checkpoint in run.dir\n  --dry-run   print the plan (steps, FLOPs, memory) and stop\n"
                       "  --allow-missing   train without the shards that are missing or set aside; how many rows that is, is said, and a resumed run leaves out the same ones\n", &c, &help));
    if (help) goto out;
    if (flags.resume) c->run_resume = true;
    if (flags.allow_missing) c->shards_allow_missing = true;
    signals_install();
    TRY(trainer_open(&t, c, flags.dry_run));
    if (!flags.dry_run) TRY(train_loop(t));
out:
    trainer_close(t);
    config_free(c);
    return rc;
}
