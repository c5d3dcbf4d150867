/* Commands from inside: what teacher-dump stores of a row is what the definitions give for the teacher's own logits, field by field, whatever the
 * batch and the chunk; and train's first losses are the definition's for the rows the loader names. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "base/half.h"
#include "base/rng.h"
#include "data/shard.h"
#include "tests/compare.h"
#include "tests/train/fixture.h"
#include "train/checkpoint.h"
#include "train/command.h"

enum { LENGTH = 16, V = FIXTURE_VOCAB, K = 5, NT = 3 };
static char dir[200];
static struct fixture teacher;           /* one row at a time */

static char *in_dir(const char *name)
{
    static char path[8][512];
    static int turn;
    snprintf(path[turn &= 7], sizeof path[0], "%s/%s", dir, name);
    return path[turn++];
}

/* A teacher in teacher/checkpoints/step-00000001 and documents of ids, some of one token, some longer than a row, some with a mask */
static void make_world(void)
{
    const char *base = getenv("TMPDIR");
    snprintf(dir, sizeof dir, "%s/train-XXXXXX", base && strlen(base) < 150 ? base : "/tmp");
    cr_assert(mkdtemp(dir));
    freopen("/dev/null", "w", stdout);
    struct fixture_options o = {.architecture = "qwen2", .rows = 1, .length = LENGTH, .loss = {.temperature = 1, .kd_weight = 1}, .seed = 5, .exact_rows = true};
    struct train_state state = {.step = 1, .data_id = "0"};
    struct config *c = config_new();
    fixture_open(&teacher, &o);
    fill_normal((float *)teacher.model->weights + teacher.model->params->head->offset, V * 24, 0.5f, 77);     /* decided, not flat */
    cr_assert_eq(checkpoint_save(in_dir("teacher"), teacher.model, teacher.optimizer, &state, c, NULL, 1), OK, "%s", fail_message());
    config_free(c);
    FILE *f = fopen(in_dir("corpus.jsonl"), "w");
    cr_assert_not_null(f);
    for (uint64_t d = 0; d < 23; d++) {
        int n = d % 7 == 3 ? 1 : (int)(3 + philox4x32(1, d, 0).v[0] % 30);
        fprintf(f, "{\"ids\": [");
        for (int i = 0; i < n; i++) fprintf(f, "%s%u", i ? ", " : "", philox4x32(2, d, (uint64_t)i).v[0] % V);
        fprintf(f, "]");
        for (int i = 0; d % 3 == 0 && i < n; i++) fprintf(f, "%s%d%s", i ? ", " : ", \"mask\": [", i % 4 != 1, i + 1 < n ? "" : "]");
        fprintf(f, "}\n");
    }
    fclose(f);
    char *yaml = xasprintf("teacher: {path: %s/teacher/checkpoints/step-00000001}\ncorpus: {files: [%s/corpus.jsonl], row_length: %d, heldout_fraction: 0}\n"
                           "shards: {kind: topk, k: %d, temperatures: [1.0, 2.0, 0.5], rows_per_shard: 5}\ndump: {batch_rows: 3, chunk_tokens: 7}\nrun: {threads: 2}\n"
                           "train: {check_alignment: false}\n", dir, dir, LENGTH, K);
    cr_assert_eq(file_replace(in_dir("config.yaml"), yaml, strlen(yaml)), OK);
    free(yaml);
}

static void remove_world(void) { fixture_close(&teacher); dir_remove_tree(dir); }
TestSuite(train, .init = make_world, .fini = remove_world);

/* The command with --set for every further argument; NULL-terminated. Returns its status. */
static int command(int (*run)(int, char **), const char *name, const char *const *settings)
{
    char *argv[64] = {(char *)name, in_dir("config.yaml")};
    int argc = 2;
    for (; *settings; settings++) {
        argv[argc++] = (char *)"--set";
        argv[argc++] = (char *)*settings;
    }
    return run(argc, argv);
}

static char *setting(const char *key, const char *value) { return xasprintf("%s=%s", key, value); }

/* The teacher's logits for a row as stored, by the model's own forward over that row alone. */
static const float *logits_of(const struct shard_row *row)
{
    struct batch *b = batch_new(1, LENGTH, NULL, false);
    batch_set_row(b, 0, row->tokens, row->loss_mask, row->document);
    batch_finish(b);
    model_set_batch(teacher.model, b);
    model_forward(teacher.model);
    model_logits(teacher.model, 0, LENGTH);
    batch_free(b);
    return (const float *)teacher.model->logits;
}

static const float temperatures[NT] = {1, 2, 0.5f};

static double log_sum_exp(const float *t, double T)
{
    double sum = 0;
    for (int j = 0; j < V; j++) sum += exp(t[j] / T);
    return log(sum);
}

static bool has_next(const struct shard_row *row, int t) { return t + 1 < LENGTH && row->document[t + 1] == row->document[t]; }

static void expect_common_fields(const struct shard_row *row, int t, const float *z, int64_t r)
{
    double lse = log_sum_exp(z, 1), entropy = 0;
    for (int i = 0; i < NT; i++) cr_expect_float_eq(row->lse[t * NT + i], log_sum_exp(z, temperatures[i]), 1e-5, "row %lld, position %d, T %g", (long long)r, t, temperatures[i]);
    for (int j = 0; j < V; j++) entropy -= exp(z[j] - lse) * (z[j] - lse);
    cr_expect_float_eq(f16_to_float(row->entropy[t]), entropy, 1e-3 * entropy + 1e-4);
    /* padding is a document of zeros here: it has next tokens, too */
    double label = has_next(row, t) ? z[row->tokens[t + 1]] - lse : 0;
    cr_expect_float_eq(f16_to_float(row->label_logprob[t]), label, 6e-4 * fabs(label) + 1e-6, "row %lld, position %d: label %g, not %g", (long long)r, t, f16_to_float(row->label_logprob[t]), label);
}

Test(train, dump_stores_the_definition_of_every_field)
{
    static const char *const ways[][2] = {{"dump.batch_rows=3", "dump.chunk_tokens=7"}, {"dump.batch_rows=1", "dump.chunk_tokens=1000"}, {"dump.batch_rows=64", "dump.chunk_tokens=16"}};
    for (int way = 0; way < 3; way++) {
        char *path = in_dir(way == 0 ? "a" : way == 1 ? "b" : "c"), *shards = setting("shards.path", path);
        cr_assert_eq(command(command_teacher_dump, "teacher-dump", (const char *const[]){shards, ways[way][0], ways[way][1], NULL}), OK, "%s", fail_message());
        free(shards);
        struct shard_dataset *d;
        int64_t sealed;
        cr_assert_eq(shard_dataset_open(&d, path), OK, "%s", fail_message());
        cr_assert_eq(shard_dataset_refresh(d, &sealed), OK);
        const struct shard_manifest *m = shard_dataset_manifest(d);
        cr_assert_eq(sealed, shard_count(m));
        cr_assert(m->rows > 10 && m->valid_vocab == V && m->teacher_vocab == V && m->k == K);
        struct shard_row row;
        shard_row_alloc(&row, m);
        int64_t supervised = 0;
        for (int64_t r = 0; r < m->rows; r++) {
            cr_assert_eq(shard_dataset_read(d, r, &row), OK, "%s", fail_message());
            const float *logits = logits_of(&row);
            for (int t = 0; t < LENGTH; t++) {
                const float *z = logits + t * V;
                bool in_head[V] = {false};
                expect_common_fields(&row, t, z, r);
                supervised += row.loss_mask[t];
                cr_expect(!row.loss_mask[t] || has_next(&row, t), "row %lld, position %d is supervised and has no next token", (long long)r, t);
                double lse = log_sum_exp(z, 1);
                for (int k = 0; k < K; k++) {
                    uint32_t id = row.head_ids[t * K + k];
                    cr_expect_float_eq(f16_to_float(row.head_logprob[t * K + k]), z[id] - lse, 6e-4 * fabs(z[id] - lse) + 1e-6);
                    in_head[id] = true;
                    for (int j = 0; j < V; j++) cr_expect(in_head[j] || z[j] <= z[id] + 1e-5f, "row %lld, position %d: id %d is larger than stored %u", (long long)r, t, j, id);
                }
                for (int i = 0; i < NT; i++) {
                    double rest = 0;
                    for (int j = 0; j < V; j++) if (!in_head[j]) rest += exp(z[j] / temperatures[i]);
                    cr_expect_float_eq(row.tail[t * NT + i], log(rest) - log_sum_exp(z, temperatures[i]), 1e-5);
                }
            }
        }
        cr_expect_gt(supervised, m->rows * LENGTH / 2);
        shard_row_free(&row);
        shard_dataset_close(d);
    }
}

Test(train, dump_of_full_logits_stores_them_over_the_first_temperature)
{
    char *shards = setting("shards.path", in_dir("full"));
    cr_assert_eq(command(command_teacher_dump, "teacher-dump", (const char *const[]){shards, "shards.kind=full", NULL}), OK, "%s", fail_message());
    free(shards);
    char *half = setting("shards.path", in_dir("half"));
    cr_assert_eq(command(command_teacher_dump, "teacher-dump", (const char *const[]){half, "shards.kind=full", "shards.temperatures=[2.0, 1.0]", NULL}), OK, "%s", fail_message());
    free(half);
    for (int over = 1; over <= 2; over++) {
        struct shard_dataset *d;
        int64_t sealed;
        cr_assert_eq(shard_dataset_open(&d, in_dir(over == 1 ? "full" : "half")), OK, "%s", fail_message());
        cr_assert_eq(shard_dataset_refresh(d, &sealed), OK);
        const struct shard_manifest *m = shard_dataset_manifest(d);
        struct shard_row row;
        shard_row_alloc(&row, m);
        for (int64_t r = 0; r < m->rows; r++) {
            cr_assert_eq(shard_dataset_read(d, r, &row), OK, "%s", fail_message());
            const float *logits = logits_of(&row);
            /* 4e-6: near 0 what is left is the order in which fp32 products are summed, 3 rows at a time here and one there */
            for (int64_t i = 0; i < LENGTH * V; i++) cr_assert_float_eq(f16_to_float(row.logits[i]), logits[i] / (float)over, 6e-4 * fabs(logits[i]) + 4e-6);
            if (over == 1) for (int t = 0; t < LENGTH; t++) expect_common_fields(&row, t, logits + t * V, r);
        }
        shard_row_free(&row);
        shard_dataset_close(d);
    }
}

/* Is position t of both rows the same, but for what makes it supervised? */
static bool same_position(const struct shard_manifest *m, const struct shard_row *a, const struct shard_row *b, int t)
{
    size_t nT = (size_t)m->n_temperatures, k = (size_t)m->k, n = (size_t)m->draws, v = (size_t)m->valid_vocab, at = (size_t)t;
#define SAME(field, width) (!a->field || !memcmp(a->field + at * (width), b->field + at * (width), (width) * sizeof *a->field))
    return SAME(lse, nT) && SAME(tail, nT) && SAME(entropy, (size_t)1) && SAME(label_logprob, (size_t)1) && SAME(head_ids, k) && SAME(head_logprob, k) && SAME(draw_ids, n) && SAME(draw_count, n) &&
           SAME(draw_logprob, n) && SAME(logits, v);
#undef SAME
}

static bool document_has(const struct shard_row *row, int t, uint32_t token)
{
    bool has = false;
    for (int i = 0; i < LENGTH; i++) has |= row->document[i] == row->document[t] && row->tokens[i] == token;
    return has;
}

/* A teacher with NaN in the embedding of one token: whatever follows that token in its document has no finite logits (nor what is before it, where attention
 * multiplies the NaN by its weight of 0), and every other document is what the whole teacher says. The dump stops, or with --quarantine sets these positions aside. */
Test(train, positions_without_finite_logits_are_set_aside_when_asked)
{
    const uint32_t sick = philox4x32(2, 2, 1).v[0] % V;      /* the second token of the third document */
    struct train_state state = {.step = 1, .data_id = "0"};
    struct config *c = config_new();
    float *embedding = (float *)teacher.model->weights + teacher.model->params->embed->offset + sick * 24, kept = embedding[3];
    embedding[3] = NAN;
    cr_assert_eq(checkpoint_save(in_dir("sick"), teacher.model, teacher.optimizer, &state, c, NULL, 1), OK, "%s", fail_message());
    embedding[3] = kept;
    config_free(c);
    cr_assert(sick != 0, "padding would be sick, too");
    for (int kind = 0; kind < SHARD_KIND_COUNT; kind++) {
        const char *name = shard_kind_name((enum shard_kind)kind), *temperatures = kind == SHARD_SAMPLED ? "shards.temperatures=[1.0]" : "shards.temperatures=[1.0, 2.0, 0.5]";
        char whole_name[32], sick_name[32], shards_kind[32];
        snprintf(whole_name, sizeof whole_name, "whole-%s", name);
        snprintf(sick_name, sizeof sick_name, "sick-%s", name);
        snprintf(shards_kind, sizeof shards_kind, "shards.kind=%s", name);
        char *whole = setting("shards.path", in_dir(whole_name)), *other = setting("shards.path", in_dir(sick_name)), *path = setting("teacher.path", in_dir("sick/checkpoints/step-00000001"));
        cr_assert_eq(command(command_teacher_dump, "teacher-dump", (const char *const[]){whole, shards_kind, temperatures, NULL}), OK, "%s", fail_message());
        cr_assert_eq(command(command_teacher_dump, "teacher-dump", (const char *const[]){other, shards_kind, temperatures, path, NULL}), ERR_NUMERIC, "%s", fail_message());
        char *argv[] = {(char *)"teacher-dump", in_dir("config.yaml"), (char *)"--quarantine", (char *)"--set", other, (char *)"--set", shards_kind, (char *)"--set", (char *)temperatures, (char *)"--set", path};
        cr_assert_eq(command_teacher_dump(sizeof argv / sizeof *argv, argv), OK, "%s", fail_message());
        struct shard_dataset *d, *e;
        struct shard_row a, b;
        cr_assert(shard_dataset_open(&d, in_dir(whole_name)) == OK && shard_dataset_open(&e, in_dir(sick_name)) == OK, "%s", fail_message());
        cr_assert_eq(shard_dataset_verify(e), OK, "%s", fail_message());
        const struct shard_manifest *m = shard_dataset_manifest(d);
        shard_row_alloc(&a, m);
        shard_row_alloc(&b, m);
        int64_t aside = 0, targets = 0;
        for (int64_t r = 0; r < m->rows; r++) {
            cr_assert(shard_dataset_read(d, r, &a) == OK && shard_dataset_read(e, r, &b) == OK, "%s", fail_message());
            bool met = false;
            for (int t = 0; t < LENGTH; t++) {
                if (t && a.document[t] != a.document[t - 1]) met = false;
                met |= a.tokens[t] == sick;
                cr_assert(b.tokens[t] == a.tokens[t] && b.document[t] == a.document[t]);
                bool same = same_position(m, &a, &b, t) && a.loss_mask[t] == b.loss_mask[t], blank = b.lse[t * m->n_temperatures] == 0 && b.entropy[t] == 0 && b.label_logprob[t] == 0 && !b.loss_mask[t];
                if (!document_has(&a, t, sick)) cr_assert(same, "%s: row %lld, position %d is not what the whole teacher says", name, (long long)r, t);
                else cr_assert(blank || (same && !met), "%s: row %lld, position %d is learnt", name, (long long)r, t);
                aside += blank;
                targets += blank && a.loss_mask[t];
            }
        }
        cr_assert(aside > 5 && targets > 3 && aside < m->rows * LENGTH / 2, "%lld set aside", (long long)aside);
        shard_row_free(&a);
        shard_row_free(&b);
        shard_dataset_close(d);
        shard_dataset_close(e);
        free(whole); free(other); free(path);
    }
}

/* ---- train ---- */

/* "tag": value of the first line of a run's metrics */
static double metric(const char *run, const char *tag)
{
    char *path = xasprintf("%s/metrics.jsonl", in_dir(run)), *text, *at;
    size_t n;
    cr_assert_eq(file_read(path, 1 << 20, &text, &n), OK, "%s", fail_message());
    cr_assert((at = strstr(text, tag)), "no %s in %s", tag, text);
    double value = strtod(at + strlen(tag) + 2, NULL);
    free(path);
    free(text);
    return value;
}

/* The first step's losses over the rows the loader gives first: T^2 KL(p || q) of the bucketed head, or of everything, and cross entropy, in double. */
Test(train, first_losses_are_the_definition)
{
    static const struct { const char *kind, *temperature; double T; } cases[] = {{"topk", "1", 1}, {"topk", "2", 2}, {"topk", "0.5", 0.5}, {"full", "1", 1}, {"full", "2", 2}, {"full", "0.5", 0.5}};
    struct fixture student;
    struct fixture_options o = {.architecture = "llama", .tie = true, .rows = 1, .length = LENGTH, .loss = {.temperature = 1, .kd_weight = 1}, .seed = 31};
    struct train_state state = {.step = 1, .data_id = "0"};
    struct config *c = config_new();
    fixture_open(&student, &o);
    cr_assert_eq(checkpoint_save(in_dir("student"), student.model, student.optimizer, &state, c, NULL, 1), OK, "%s", fail_message());
    config_free(c);
    for (int i = 0; i < 6; i++) {
        char name[32], run_name[32];
        snprintf(name, sizeof name, "shards-%s", cases[i].kind);
        snprintf(run_name, sizeof run_name, "run%d", i);
        char *shards = setting("shards.path", in_dir(name)), *kind = setting("shards.kind", cases[i].kind), *T_setting = setting("objective.temperature", cases[i].temperature);
        char *run = setting("run.dir", in_dir(run_name)), *path = setting("student.path", in_dir("student/checkpoints/step-00000001"));
        cr_assert_eq(command(command_teacher_dump, "teacher-dump", (const char *const[]){shards, kind, NULL}), OK, "%s", fail_message());
        cr_assert_eq(command(command_train, "train", (const char *const[]){shards, kind, run, path, T_setting, "train.steps=1", "train.batch_rows=4", "train.micro_rows=2", "train.chunk_tokens=9",
                                                                             "objective.ce_weight=0.25", "objective.kd_weight=0.5", NULL}), OK, "%s", fail_message());
        struct shard_dataset *d;
        struct loader *l;
        struct batch *b;
        cr_assert_eq(shard_dataset_open(&d, in_dir(name)), OK);
        struct loader_options lo = {.batch_rows = 4, .seed = 1, .temperature = 1, .shuffle = true};
        cr_assert_eq(loader_open_dataset(&l, d, &lo), OK, "%s", fail_message());
        cr_assert_eq(loader_next(l, &b), OK, "%s", fail_message());
        struct shard_row row;
        shard_row_alloc(&row, shard_dataset_manifest(d));
        double kd = 0, ce = 0, T = cases[i].T;
        int64_t targets = 0;
        for (int r = 0; r < 4; r++) {
            cr_assert_eq(shard_dataset_read(d, b->row_index[r], &row), OK);
            const float *t = logits_of(&row);
            struct batch *one = batch_new(1, LENGTH, NULL, false);
            batch_set_row(one, 0, row.tokens, row.loss_mask, row.document);
            batch_finish(one);
            model_set_batch(student.model, one);
            model_forward(student.model);
            model_logits(student.model, 0, LENGTH);
            const float *z = (const float *)student.model->logits;
            for (int p = 0; p < LENGTH; p++, t += V, z += V) {
                if (!row.loss_mask[p]) continue;
                double lse_p = log_sum_exp(t, T), lse_q = log_sum_exp(z, T), P = 0, Q = 0;
                for (int k = 0; k < (row.head_ids ? K : V); k++) {
                    uint32_t id = row.head_ids ? row.head_ids[p * K + k] : (uint32_t)k;
                    double log_p = t[id] / T - lse_p, log_q = z[id] / T - lse_q;
                    kd += T * T * exp(log_p) * (log_p - log_q);
                    P += exp(log_p);
                    Q += exp(log_q);
                }
                if (row.head_ids) kd += T * T * (1 - P) * log((1 - P) / (1 - Q));
                ce += log_sum_exp(z, 1) - z[row.tokens[p + 1]];
                targets++;
            }
            batch_free(one);
        }
        kd /= (double)targets;
        ce /= (double)targets;
        double bound = 2e-3;                                 /* the teacher was stored in f16 */
        cr_expect_float_eq(metric(run_name, "\"train/kd\""), kd, bound * kd, "%s at %s: kd %g, not %g", cases[i].kind, cases[i].temperature, metric(run_name, "\"train/kd\""), kd);
        cr_expect_float_eq(metric(run_name, "\"train/ce\""), ce, 1e-6 * ce);
        cr_expect_float_eq(metric(run_name, "\"train/loss\""), 0.5 * metric(run_name, "\"train/kd\"") + 0.25 * ce, 1e-6 * ce);
        shard_row_free(&row);
        loader_close(l);
        shard_dataset_close(d);
        free(shards); free(kind); free(T_setting); free(run); free(path);
    }
    fixture_close(&student);
}
