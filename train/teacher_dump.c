/* distill teacher-dump: the corpus into rows, and shard after shard of them through the pipeline (dump_pipeline.c: forward, targets, and back to the
 * host beside the next batch) into the shard writer. Held-out rows first. What is dumped in fp8 is measured before anything is written (dump_error.c). */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/error.h"
#include "base/file.h"
#include "data/shard.h"
#include "train/command.h"
#include "train/dump_error.h"
#include "train/dump_pipeline.h"
#include "train/dump_plan.h"
#include "train/load.h"
#include "train/progress.h"
#include "train/signals.h"
#include "train/student.h"

struct shard_range { int64_t first, end; };    /* end 0: every shard that nobody else makes, by locks; -1: every shard, without */
struct dump_flags { bool dry_run, no_measure, no_space_check, quarantine, bad_range; struct shard_range range; };

struct dump {
    const struct config *c;
    struct dump_flags flags;
    struct model_files *files;
    struct tokenizer *tokenizer;
    struct corpus_rows *train, *heldout;
    int64_t Vv;
    enum shard_kind kind;
    int k, draws, nT; float temperatures[SHARD_MAX_TEMPERATURES];
    char weights_hash[SHA256_HEX];            /* reads every weight once: taken once for both datasets */

    struct backend *be;
    struct dump_pipeline *pipeline;
    struct precision_error error;             /* of a teacher in fp8: measured, or what a dataset of it says */
};

static int open_teacher(struct dump *d)
{
    const struct config *c = d->c;
    int rc = OK;
    if (!*c->teacher_path) { rc = fail(ERR_USAGE, "teacher.path is not set: name the teacher's Hugging Face directory"); goto out; }
    TRY(model_files_open(&d->files, c->teacher_path));
    char *dir = find_tokenizer_dir(c, (const char *const[]){c->teacher_path, NULL});
    if (dir) rc = tokenizer_open(&d->tokenizer, dir);
    free(dir);
    if (rc != OK) goto out;
    d->Vv = valid_vocab(d->files->config, d->tokenizer);
    struct corpus_options o = corpus_options_of(c);
    if (o.row_length > d->files->config->max_position) {
        rc = fail(ERR_USAGE, "corpus.row_length is %lld, the teacher's max_position_embeddings is %lld: make the rows shorter", (long long)o.row_length, (long long)d->files->config->max_position);
        goto out;
    }
    if (c->dump_batch_rows && c->dump_batch_rows > INT32_MAX / o.row_length) {
        rc = fail(ERR_USAGE, "dump.batch_rows %lld with rows of %lld tokens is more positions than one pass can count: make dump.batch_rows smaller", (long long)c->dump_batch_rows, (long long)o.row_length);
        goto out;
    }
    if (!strcmp(c->teacher_precision, "fp8") && c->dump_error_rows > INT32_MAX / o.row_length) {
        rc = fail(ERR_USAGE, "dump.error_rows %lld with rows of %lld tokens is more positions than one pass can count: make dump.error_rows smaller", (long long)c->dump_error_rows, (long long)o.row_length);
        goto out;
    }
    TRY(corpus_read(&d->train, &d->heldout, &o, d->tokenizer, (int32_t)d->Vv));
out:
    return rc;
}

static int read_kind(struct dump *d)
{
    const struct config *c = d->c;
    for (d->kind = 0; strcmp(c->shards_kind, shard_kind_name(d->kind)); d->kind++) {}
    d->k = shard_kind_has_head(d->kind) ? (int)c->shards_k : 0;
    d->draws = d->kind == SHARD_HYBRID ? (int)c->shards_m : d->kind == SHARD_SAMPLED ? (int)c->shards_draws : 0;
    d->nT = c->shards_temperatures.n;
    if (d->nT < 1 || d->nT > SHARD_MAX_TEMPERATURES) return fail(ERR_USAGE, "shards.temperatures lists %d values; 1 to %d are possible", d->nT, SHARD_MAX_TEMPERATURES);
    for (int i = 0; i < d->nT; i++) d->temperatures[i] = (float)c->shards_temperatures.item[i];
    if (d->kind == SHARD_SAMPLED && d->nT > 1)
        return fail(ERR_USAGE, "shards.temperatures lists %d values, but draws serve only the temperature they are made at: list one, or use shards.kind hybrid, which serves every one listed", d->nT);
    if (d->k > d->Vv) return fail(ERR_USAGE, "shards.k is %d, but the teacher has only %lld valid ids", d->k, (long long)d->Vv);
    return OK;
}

static int plan_memory(struct dump *d)
{
    const struct config *c = d->c;
    int rc = OK;
    struct backend_options device = {.device = c->run_device, .threads = (int)c->run_threads, .exact_rows = true};   /* whoever computes a row, in whatever batch: the same bytes */
    TRY(backend_open(&d->be, &device));
    struct dump_options o = {.kind = d->kind, .k = d->k, .draws = d->draws, .seed = (uint64_t)c->run_seed, .nT = d->nT, .Vv = d->Vv, .row_length = c->corpus_row_length, .batch_rows = c->dump_batch_rows, .chunk_tokens = c->dump_chunk_tokens,
                             .weights = !strcmp(c->teacher_weights, "resident") ? WEIGHTS_RESIDENT : !strcmp(c->teacher_weights, "streamed") ? WEIGHTS_STREAMED : WEIGHTS_AUTO,
                             .memory_limit = (size_t)(c->memory_limit_gib * 0x1p30), .fp8 = !strcmp(c->teacher_precision, "fp8"), .quarantine = d->flags.quarantine,
                             .native_first = (int)c->teacher_fp8_native_first, .native_last = (int)c->teacher_fp8_native_last};
    o.measure = o.fp8;
    memcpy(o.temperatures, d->temperatures, sizeof o.temperatures);
    TRY(model_check_device(d->be, d->files->config, d->files->path));
    if (o.fp8) TRY(model_check_fp8(d->be, d->files->config, o.native_first, o.native_last, "teacher.precision"));
    d->pipeline = dump_pipeline_new(d->be, d->files->config, &o);
out:
    return rc;
}

static int make_manifest(const struct dump *d, const struct corpus_rows *rows, struct shard_manifest *m)
{
    const struct config *c = d->c;
    *m = (struct shard_manifest){.kind = d->kind, .rows = rows->rows, .row_length = rows->length, .rows_per_shard = c->shards_rows_per_shard < rows->rows ? c->shards_rows_per_shard : rows->rows, .k = d->k, .draws = d->draws, .n_temperatures = d->nT,
                                 .valid_vocab = (int32_t)d->Vv, .teacher_vocab = (int32_t)d->files->config->vocab_size, .seed = (uint64_t)c->run_seed, .text_bytes = rows->bytes};
    memcpy(m->temperatures, d->temperatures, sizeof m->temperatures);
    if (d->pipeline->o.fp8) {
        m->precision = PRECISION_FP8;
        m->native_first = d->pipeline->o.native_first;
        m->native_last = d->pipeline->o.native_last;
    }
    m->error = d->error;
    model_config_hash(d->files->config, m->teacher_config_hash);
    strcpy(m->teacher_weights_hash, d->weights_hash);
    if (d->tokenizer) tokenizer_hash(d->tokenizer, m->tokenizer_hash);
    corpus_rows_hash(rows, m->corpus_hash);
    snprintf(m->packing, sizeof m->packing, "documents end to end in rows of %lld, positions restart at every document and row", (long long)rows->length);
    snprintf(m->teacher_name, sizeof m->teacher_name, "%s", d->files->path);
    return OK;
}

/* ---- what fp8 changes ---- */

static void print_error(const struct precision_error *e, const char *when)
{
    printf("precision %s, %s: KL(native || fp8) %.3g nats per token over %lld positions of %lld rows (%.3g in the worst row), the same first choice at %.2f %%, log p(next token) differs by %.3g\n",
           teacher_precision_name(PRECISION_FP8), when, e->kl, (long long)e->positions, (long long)e->rows, e->kl_row_max, 100 * e->agreement, e->label_difference);
}

/* A dataset of this teacher that was begun holds the figures for all that follow: others may get other last digits. What is wrong with a manifest, the writer says. */
static bool error_found(struct dump *d)
{
    char *heldout = heldout_shards_path(d->c), hash[SHA256_HEX];
    const char *paths[] = {heldout, d->c->shards_path};
    bool found = false;
    model_config_hash(d->files->config, hash);
    for (int i = 0; i < 2 && !found; i++) {
        struct shard_manifest m;
        char *manifest = path_join(paths[i], "manifest.json");
        found = path_exists(manifest) && shard_manifest_read(paths[i], &m) == OK && m.precision == PRECISION_FP8 && m.native_first == d->pipeline->o.native_first && m.native_last == d->pipeline->o.native_last &&
                m.seed == (uint64_t)d->c->run_seed && !strcmp(m.teacher_config_hash, hash) &&
                !strcmp(m.teacher_weights_hash, d->weights_hash);
        if (found) d->error = m.error;
        free(manifest);
    }
    free(heldout);
    return found;
}

static int error_check(const struct dump *d)
{
    double bound = d->c->dump_max_error;
    if (bound <= 0 || d->error.kl <= bound) return OK;
    return fail(ERR_NUMERIC, "%s: in fp8 it is %.3g nats per token from what it is without (KL over %lld positions), and dump.max_error allows %g: let more blocks stay native (teacher.fp8_native_first, %lld here), set teacher.precision to native, or raise dump.max_error to dump it all the same",
                d->files->path, d->error.kl, (long long)d->error.positions, bound, (long long)d->pipeline->o.native_first);
}

/* A dataset that was begun with other settings is refused before a teacher is loaded and measured for it; the writer, which asks again, would say so only then. */
static int begun_check(const struct dump *d)
{
    char *heldout = heldout_shards_path(d->c);
    struct shard_manifest m;
    int rc = OK;
    TRY(make_manifest(d, d->train, &m));
    TRY(shard_manifest_fits(d->c->shards_path, &m));
    if (d->heldout && d->heldout->rows) {
        TRY(make_manifest(d, d->heldout, &m));
        rc = shard_manifest_fits(heldout, &m);
    }
out:
    free(heldout);
    return rc;
}

/* The pipeline's memory and weights; of a teacher in fp8 that nobody has measured yet what the rounding changes, before there is a manifest. */
static int load_teacher(struct dump *d)
{
    struct dump_pipeline *p = d->pipeline;
    struct dump_error *e = NULL;
    bool fp8 = p->o.fp8, dry_run = d->flags.dry_run;
    int rc = OK;
    TRY(memory_check(p->plan, p->o.memory_limit));           /* before every weight is read */
    if (!dry_run) {
        TRY(tensor_set_hash(d->files->tensors, d->weights_hash));
        TRY(begun_check(d));
    }
    if (fp8 && (dry_run || !error_found(d))) {
        TRY(dump_error_new(&e, d->train, d->c->dump_error_rows, (uint64_t)d->c->run_seed));
        TRY(dump_error_native(e, d->be, d->files, p->o.memory_limit));
    }
    TRY(dump_pipeline_ready(p));
    TRY(model_files_load(d->files, p->model));
    if (e) TRY(dump_error_compare(e, p->model, &p->error_room, p->o.batch_rows, d->Vv, d->flags.quarantine, d->files->path, &d->error));
    if (fp8) print_error(&d->error, e ? "measured" : "as measured when the dataset was begun");
    fflush(stdout);
    if (fp8 && !dry_run) rc = error_check(d);
out:
    dump_error_free(e);
    return rc;
}

/* For the progress line: `at_start` rows were made before, by whomever; this process has taken stats_at_start rows of other datasets. */
struct dump_progress { const char *name; double start; int64_t at_start, stats_at_start; };

/* The pipeline's sink is the shard writer. */
static int sink_begin(void *w, int64_t shard) { return shard_writer_begin(w, shard); }
static int sink_put(void *w, const struct shard_row *row) { return shard_writer_put(w, row); }
static int sink_seal(void *w) { return shard_writer_seal(w); }

static int64_t rows_sealed(struct dump *d, const struct shard_writer *w)
{
    dump_lock(d->pipeline);
    int64_t rows = shard_writer_rows_done(w);
    dump_unlock(d->pipeline);
    return rows;
}

/* One shard: its rows in batches, into the pipeline. */
static int dump_shard(struct dump *d, struct shard_writer *w, const struct shard_manifest *m, const struct corpus_rows *rows, int64_t shard, struct dump_progress *p)
{
    int64_t first = shard_first_row(m, shard), end = first + shard_rows(m, shard), L = rows->length, n;
    for (int64_t row = first; row < end; row += n) {
        if (stop_requested) return fail(ERR_STOPPED, "stopped by a signal: %lld rows of %s are sealed, those of unfinished shards will be computed again; run the command again to go on",
                                        (long long)rows_sealed(d, w), p->name);
        n = end - row < d->pipeline->o.batch_rows ? end - row : d->pipeline->o.batch_rows;
        int rc = dump_submit(d->pipeline, shard, row == first, row + n == end, row, n, rows->tokens + row * L, rows->loss_mask + row * L, rows->document + row * L);
        if (rc != OK) return rc;
        int64_t taken = dump_stats(d->pipeline).rows - p->stats_at_start;
        double rate = (double)taken / (now_seconds() - p->start);
        if (taken) progress("%s  shard %lld/%lld  rows %lld/%lld  %.0f tok/s  eta %s", p->name, (long long)(shard + 1), (long long)shard_count(m), (long long)(p->at_start + taken), (long long)m->rows,
                            rate * (double)L, duration_text((double)(m->rows - p->at_start - taken) / rate));
    }
    return OK;
}

/* Claims and makes shards until none is left. What other processes are making is waited for if `wait` says so: should one die, its shards
 * are free again. *complete: every shard (of the range) is made. */
static int dump_shards(struct dump *d, struct shard_writer *w, const struct shard_manifest *m, const struct corpus_rows *rows, const char *path, bool wait, bool *complete)
{
    struct dump_progress p = {.name = path, .start = now_seconds(), .at_start = shard_writer_rows_done(w), .stats_at_start = dump_stats(d->pipeline).rows};
    struct dump_sink sink = {w, sink_begin, sink_put, sink_seal};
    int64_t shard, busy, said = 0;
    const char *owner;
    int rc = OK, finished = OK;
    *complete = false;
    dump_start(d->pipeline, &sink, d->files->path);
    for (;;) {
        dump_lock(d->pipeline);
        rc = shard_writer_claim(w, &shard, &busy, &owner);
        dump_unlock(d->pipeline);
        if (rc != OK) goto out;
        if (shard == SHARD_NONE) { *complete = true; break; }
        if (shard != SHARD_BUSY) {
            TRY(dump_shard(d, w, m, rows, shard, &p));
            said = 0;
            continue;
        }
        TRY(dump_finish(d->pipeline));                  /* our own part is made */
        if (!wait) break;
        if (busy != said) {
            progress_end();
            printf("%s: other processes are making the last %lld shards (%s); waiting, to take over what they leave\n", path, (long long)busy, owner);
            fflush(stdout);
            said = busy;
        }
        if (stop_requested) { rc = fail(ERR_STOPPED, "stopped by a signal while other processes make the last %lld shards of %s", (long long)busy, path); break; }
        nanosleep(&(struct timespec){.tv_nsec = 250000000}, NULL);
    }
out:
    finished = dump_finish(d->pipeline);                /* the writer is about to be closed, whatever happened */
    if (rc == OK) rc = finished;
    progress_end();
    return rc;
}

static int dump_dataset(struct dump *d, const struct corpus_rows *rows, const char *path, struct shard_range range, bool wait, bool *complete)
{
    struct shard_manifest m;
    struct shard_writer *w = NULL;
    int rc = OK;
    if (d->pipeline->o.fp8) error_found(d);                  /* another process may have been the first to begin */
    TRY(make_manifest(d, rows, &m));
    if (range.end < 0) range.end = shard_count(&m);
    if (range.end) TRY(shard_writer_open_range(&w, path, &m, range.first, range.end));
    else TRY(shard_writer_open(&w, path, &m));
    int64_t shards = range.end ? range.end - range.first : shard_count(&m), done = shard_writer_rows_done(w);
    if (shard_writer_next_shard(w) >= shard_count(&m)) { printf("%s: all %lld shards are %s\n", path, (long long)shards, range.end ? "made" : "sealed"); *complete = true; goto out; }
    if (done > 0) printf("%s: %lld of %lld rows are sealed, going on\n", path, (long long)done, (long long)m.rows);
    TRY(dump_shards(d, w, &m, rows, path, wait, complete));
    if (range.end) printf("%s: shards %lld to %lld are made; when every range is, distill inspect %s --repair enters them in the journal\n", path, (long long)range.first, (long long)(range.end - 1), path);
out:
    shard_writer_close(w);
    return rc;
}

/* Held-out rows first, without waiting for the shards of others; those come last. A range is one of the training rows; its first process has the held-out ones. */
static int dump_datasets(struct dump *d, const char *heldout)
{
    struct shard_range range = d->flags.range, all = {0, range.end ? -1 : 0};
    bool complete, heldout_complete = true;
    int rc = OK;
    if (d->heldout && d->heldout->rows && range.first == 0) TRY(dump_dataset(d, d->heldout, heldout, all, false, &heldout_complete));
    TRY(dump_dataset(d, d->train, d->c->shards_path, range, true, &complete));
    if (!heldout_complete) TRY(dump_dataset(d, d->heldout, heldout, all, true, &heldout_complete));
out:
    return rc;
}

static void print_plan(const struct dump *d)
{
    struct shard_manifest m = {.kind = d->kind, .rows = d->train->rows, .row_length = d->train->length, .rows_per_shard = d->train->rows ? d->train->rows : 1, .k = d->k, .draws = d->draws, .n_temperatures = d->nT,
                               .valid_vocab = (int32_t)d->Vv};
    double tokens = (double)(d->train->rows * d->train->length), bytes = d->train->rows ? (double)shard_bytes(&m, 0) / tokens : 0, flops = model_config_forward_flops(d->files->config, d->train->length);
    int64_t heldout = d->heldout ? d->heldout->rows : 0;
    printf("teacher   %s, %s, %.2fM parameters, %lld of %lld ids valid\n", d->files->path, architecture_name(d->files->config->arch), (double)d->pipeline->model->params->parameters / 1e6, (long long)d->Vv,
           (long long)d->files->config->vocab_size);
    printf("corpus    %lld documents, %lld rows of %lld for training, %lld held out; %lld supervised positions\n", (long long)d->train->documents, (long long)d->train->rows,
           (long long)d->train->length, (long long)heldout, (long long)d->train->targets);
    const char *most = d->kind == SHARD_SAMPLED ? " at most" : "";        /* what is drawn twice is stored once */
    printf("shards    %s", shard_kind_name(d->kind));
    if (d->k) printf(" %d", d->k);
    if (d->draws) printf(d->k ? " + %d draws" : ", %d draws", d->draws);
    printf(",%s %.0f bytes per token, %.2f GiB in all; %.3g FLOP per token\n", most, bytes, bytes * (tokens + (double)(heldout * d->train->length)) / 0x1p30, flops);
    printf("pass      %lld rows at a time; weights %s\n", (long long)d->pipeline->o.batch_rows, d->pipeline->o.weights == WEIGHTS_STREAMED ? "streamed from host memory, block by block" : "resident");
    memory_print(d->pipeline->plan, stdout);
}

/* What is still to be written, and whether there is room for it. */
static int check_space(struct dump *d, const char *heldout, int64_t *bytes)
{
    const struct config *c = d->c;
    struct shard_manifest m;
    int64_t free_bytes = plan_bytes_free(c->shards_path);
    *bytes = 0;
    make_manifest(d, d->train, &m);
    if (m.rows) *bytes += plan_bytes_missing(c->shards_path, &m);
    if (d->heldout && d->heldout->rows) {
        make_manifest(d, d->heldout, &m);
        *bytes += plan_bytes_missing(heldout, &m);
    }
    if (free_bytes < 0) { printf("disk      %.2f GiB to be written at most; how much is free is not known\n", (double)*bytes / 0x1p30); return OK; }
    printf("disk      %.2f GiB to be written at most, %.2f GiB free\n", (double)*bytes / 0x1p30, (double)free_bytes / 0x1p30);
    if (*bytes <= free_bytes || d->flags.no_space_check) return OK;
    return fail(ERR_IO, "%s: %lld bytes are to be written and %lld are free: free some, choose another shards.path, store less per token (shards.kind, shards.k), or insist with --no-space-check",
                c->shards_path, (long long)*bytes, (long long)free_bytes);
}

/* A pass of the plan ends nowhere. */
static int nowhere_begin(void *context, int64_t shard) { (void)context; (void)shard; return OK; }
static int nowhere_put(void *context, const struct shard_row *row) { (void)context; (void)row; return OK; }
static int nowhere_seal(void *context) { (void)context; return OK; }

static int plan_passes(void *context, int64_t first_row, int64_t rows)
{
    struct dump *d = context;
    struct dump_sink nowhere = {NULL, nowhere_begin, nowhere_put, nowhere_seal};
    int64_t L = d->train->length, n;
    int rc = OK, finished;
    dump_start(d->pipeline, &nowhere, d->files->path);
    for (int64_t row = first_row; rc == OK && row < first_row + rows; row += n) {
        n = first_row + rows - row < d->pipeline->o.batch_rows ? first_row + rows - row : d->pipeline->o.batch_rows;
        rc = dump_submit(d->pipeline, 0, row == first_row, row + n == first_row + rows, row, n, d->train->tokens + row * L, d->train->loss_mask + row * L, d->train->document + row * L);
    }
    finished = dump_finish(d->pipeline);
    return rc != OK ? rc : finished;
}

/* Rate and table of a few batches; the weights are loaded. */
static int measure(struct dump *d)
{
    struct shard_manifest m;
    int64_t heldout = d->heldout ? d->heldout->rows : 0;
    make_manifest(d, d->train, &m);
    struct dump_plan p = {.c = d->c, .model = d->pipeline->model, .rows = d->train, .manifest = &m, .tokens = (d->train->rows + heldout) * d->train->length,
                          .batch_rows = d->pipeline->o.batch_rows, .passes = plan_passes, .context = d};
    return dump_plan_measure(&p);
}

static int run(struct dump *d)
{
    const struct config *c = d->c;
    int rc = OK;
    char *heldout = heldout_shards_path(c), *no_room = NULL;
    TRY(open_teacher(d));
    TRY(read_kind(d));
    TRY(plan_memory(d));
    print_plan(d);
    int64_t bytes;
    int space = check_space(d, heldout, &bytes);
    no_room = xstrdup(fail_message());
    if (!d->flags.dry_run || d->flags.no_measure) TRY(space);
    if (d->flags.no_measure) goto out;
    fflush(stdout);
    TRY(load_teacher(d));
    if (d->flags.dry_run) {
        TRY(measure(d));
        rc = space != OK ? fail(space, "%s", no_room) : error_check(d);   /* the plan first, then what is wrong with it */
        goto out;
    }
    TRY(dump_datasets(d, heldout));
    struct dump_stats stats = dump_stats(d->pipeline);
    if (stats.positions) {
        double good = stats.positions > stats.aside ? (double)(stats.positions - stats.aside) : 1;
        printf("done      %lld positions dumped by this run", (long long)stats.positions);
        if (d->k) printf(", the top %d keep %.4f of the mass on average", d->k, stats.kept_mass / good);
        if (d->draws) printf(", %d draws are %.1f different tokens", d->draws, (double)stats.drawn / (double)stats.positions);
        printf("; %lld padding columns masked, they held %.2e of the mass\n", (long long)(d->files->config->vocab_size - d->Vv), stats.padding_mass / good);
    }
    if (stats.aside) printf("set aside %lld positions of %lld rows, %lld of them supervised, where the teacher's logits are not finite\n", (long long)stats.aside, (long long)stats.rows_aside, (long long)stats.targets_aside);
    if (2 * stats.aside > stats.positions)                    /* fewer rows than it takes to stop in the middle */
        rc = fail(ERR_NUMERIC, "the teacher's logits were not finite at %lld of %lld positions: it is the teacher, not some rows; check the model with distill inspect %s, and dump into another shards.path",
                  (long long)stats.aside, (long long)stats.positions, d->files->path);
out:
    free(no_room);
    free(heldout);
    return rc;
}

static int take_flag(void *context, int argc, char **argv, int *i)
{
    struct dump_flags *f = context;
    long long first, end;
    int used = 0;
    if (!strcmp(argv[*i], "--dry-run")) { f->dry_run = true; return 1; }
    if (!strcmp(argv[*i], "--no-measure")) { f->dry_run = f->no_measure = true; return 1; }
    if (!strcmp(argv[*i], "--no-space-check")) { f->no_space_check = true; return 1; }
    if (!strcmp(argv[*i], "--quarantine")) { f->quarantine = true; return 1; }
    if (strcmp(argv[*i], "--shards")) return 0;
    if (*i + 1 == argc) { f->bad_range = true; return 1; }
    const char *range = argv[++*i];
    f->bad_range = sscanf(range, "%18lld:%18lld%n", &first, &end, &used) != 2 || range[used] || first < 0 || end <= first;
    if (!f->bad_range) f->range = (struct shard_range){first, end};
    return 1;
}

int command_teacher_dump(int argc, char **argv)
{
    struct config *c = NULL;
    struct dump d = {0};
    int help, rc = OK;
    TRY(command_config(argc, argv, CMD_TEACHER_DUMP, "Runs the teacher once over the corpus and writes its targets into HDF5 shards. Run it again to go on where it stopped; several at once share the work.",
                       "distill teacher-dump configs/quickstart/distill.yaml", take_flag, &d.flags,
                       "  --dry-run      print the plan and stop: bytes per token, memory, FLOPs, disk, and from a few batches the hours and a table of what K, m and N cost\n"
                       "                 in gradient error, and what teacher.precision fp8 changes. Exit code 4 when the shards do not fit on the disk, 5 when fp8 changes more than dump.max_error\n"
                       "  --no-measure   with --dry-run: without the batches, so that no weight is read\n"
                       "  --no-space-check   dump although the disk seems too small\n"
                       "  --quarantine   where the teacher's logits are not finite, set the position aside (it is stored as zeros and not learnt) and count it, instead of stopping\n"
                       "  --shards A:B   make shards A to B-1 and no others, without relying on locks: for job arrays on file systems whose locks do not reach other\n"
                       "                 machines. Every process needs a range of its own; afterwards distill inspect DATASET --repair enters the shards in the journal\n", &c, &help));
    if (help) goto out;
    if (d.flags.bad_range) { rc = fail(ERR_USAGE, "--shards needs a range A:B of shards, B the first that is left out: --shards 0:8"); goto out; }
    d.c = c;
    signals_install();
    rc = run(&d);
out:
    dump_pipeline_free(d.pipeline);
    backend_close(d.be);
    corpus_rows_free(d.train);
    corpus_rows_free(d.heldout);
    tokenizer_close(d.tokenizer);
    model_files_close(d.files);
    config_free(c);
    return rc;
}
