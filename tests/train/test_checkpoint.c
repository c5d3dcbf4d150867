/* Checkpoints: what is saved comes back bit for bit; a broken one is passed over whatever is broken in it; nothing else in the directory is
 * touched; a checkpoint is a model directory. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/error.h"
#include "base/failpoint.h"
#include "base/file.h"
#include "tests/compare.h"
#include "tests/train/fixture.h"
#include "train/checkpoint.h"
#include "train/load.h"

static char dir[200];
static struct config *config;

static void make_dir(void)
{
    const char *base = getenv("TMPDIR");
    snprintf(dir, sizeof dir, "%s/checkpoint-XXXXXX", base && strlen(base) < 150 ? base : "/tmp");
    cr_assert(mkdtemp(dir));
    config = config_new();
    failpoint_set(NULL);
}

static void remove_dir(void) { config_free(config); dir_remove_tree(dir); }
TestSuite(checkpoint, .init = make_dir, .fini = remove_dir);

/* dir/checkpoints/<rest>, good until four more calls */
static const char *at(const char *rest)
{
    static char path[4][512];
    static int turn;
    snprintf(path[turn &= 3], sizeof path[0], "%s/checkpoints/%s", dir, rest);
    return path[turn++];
}

static void open_fixture_of(struct fixture *f, const char *architecture, bool tie, uint64_t seed, bool master)
{
    struct fixture_options o = {.architecture = architecture, .tie = tie, .rows = 1, .length = 8, .loss = {.temperature = 1, .ce_weight = 1}, .seed = seed, .master = master};
    fixture_open(f, &o);
}

static void open_fixture(struct fixture *f, const char *architecture, bool tie, uint64_t seed) { open_fixture_of(f, architecture, tie, seed, false); }

/* weights, m, v and master unlike anything else's */
static void fill_state(struct fixture *f, uint64_t seed)
{
    int64_t n = f->model->params->total;
    fill_normal((float *)f->model->weights, n, 1, seed);
    fill_normal((float *)f->optimizer->m, n, 1e-3f, seed + 1);
    fill_normal((float *)f->optimizer->v, n, 1e-6f, seed + 2);
    if (f->optimizer->master) fill_normal(f->optimizer->master, n, 1, seed + 3);
}

static bool same_state(const struct fixture *a, const struct fixture *b)
{
    const struct params *t = a->model->params;
    for (int i = 0; i < t->n; i++) {
        size_t at_byte = (size_t)t->p[i].offset * sizeof(float), bytes = (size_t)t->p[i].count * sizeof(float);
        if (memcmp((char *)a->model->weights + at_byte, (char *)b->model->weights + at_byte, bytes)) return false;
        if (memcmp((char *)a->optimizer->m + at_byte, (char *)b->optimizer->m + at_byte, bytes)) return false;
        if (memcmp((char *)a->optimizer->v + at_byte, (char *)b->optimizer->v + at_byte, bytes)) return false;
        if (a->optimizer->master && memcmp((char *)a->optimizer->master + at_byte, (char *)b->optimizer->master + at_byte, bytes)) return false;
    }
    return true;
}

static struct train_state state_of(int64_t step)
{
    return (struct train_state){.step = step, .loader = {.epoch = 3, .cursor = 17}, .tokens = 5000000000, .targets = 4999999999, .seed = 9007199254740991, .data_id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"};
}

static int save(const struct fixture *f, int64_t step, int64_t keep)
{
    struct train_state s = state_of(step);
    return checkpoint_save(dir, f->model, f->optimizer, &s, config, NULL, keep);
}

static void expect_found(const char *name)
{
    char *path;
    cr_assert_eq(checkpoint_find(dir, &path), OK, "%s", fail_message());
    if (!name) { cr_expect_null(path); return; }
    cr_assert_not_null(path, "found nothing instead of %s", name);
    cr_expect_str_eq(path, at(name));
    free(path);
}

static void flip_bit(const char *path, int64_t bit)
{
    FILE *f = fopen(path, "r+b");
    cr_assert_not_null(f);
    fseek(f, bit / 8, SEEK_SET);
    int c = fgetc(f);
    fseek(f, bit / 8, SEEK_SET);
    fputc(c ^ 1 << bit % 8, f);
    fclose(f);
}

static void write_text(const char *path, const char *text) { cr_assert_eq(file_replace(path, text, strlen(text)), OK); }

/* ---- the round trip ---- */

Test(checkpoint, comes_back_bit_for_bit)
{
    static const struct { const char *architecture; bool tie, master; } cases[] = {{"qwen2", false, false}, {"llama", true, false}, {"mistral", false, false}, {"qwen3", true, false},
                                                                                   {"qwen2", false, true}, {"qwen3", true, true}};
    for (int i = 0; i < 6; i++) {
        struct fixture f, g;
        struct train_state s = {0}, want = state_of(i + 1);
        char *path;
        open_fixture_of(&f, cases[i].architecture, cases[i].tie, 5, cases[i].master);
        open_fixture_of(&g, cases[i].architecture, cases[i].tie, 6, cases[i].master);
        fill_state(&f, 100);
        cr_assert_eq(save(&f, i + 1, 10), OK, "%s", fail_message());
        cr_assert_eq(checkpoint_find(dir, &path), OK);
        cr_assert(!same_state(&f, &g));
        cr_assert_eq(checkpoint_load(path, g.model, g.optimizer, &s), OK, "%s", fail_message());
        cr_expect(same_state(&f, &g), "%s", cases[i].architecture);
        cr_expect(s.step == want.step && s.loader.epoch == 3 && s.loader.cursor == 17 && s.tokens == want.tokens && s.seed == want.seed && s.targets == want.targets);
        cr_expect_str_eq(s.data_id, want.data_id);
        free(path);
        fixture_close(&f);
        fixture_close(&g);
    }
}

/* Steps, a checkpoint, steps, and the same steps without the checkpoint between. The weights of the first part are spoilt before they are saved: what goes on is the master. */
Test(checkpoint, a_run_with_a_master_goes_on_bit_for_bit)
{
    struct fixture straight, stopped, resumed;
    struct train_state s;
    open_fixture_of(&straight, "qwen2", true, 5, true);
    open_fixture_of(&stopped, "qwen2", true, 5, true);
    open_fixture_of(&resumed, "qwen2", true, 6, true);
    for (int step = 1; step <= 6; step++) {
        struct fixture *of[2] = {&straight, step <= 3 ? &stopped : &resumed};
        for (int i = 0; i < 2; i++) {
            fill_normal((float *)of[i]->model->grads, of[i]->model->params->total, 1, (uint64_t)(50 + step));
            optimizer_norm(of[i]->optimizer);
            optimizer_step(of[i]->optimizer, step, 1e-2);
        }
        if (step != 3) continue;
        ((float *)stopped.model->weights)[stopped.model->params->norm->offset] += 1;
        cr_assert_eq(save(&stopped, step, 1), OK, "%s", fail_message());
        cr_assert_eq(checkpoint_load(at("step-00000003"), resumed.model, resumed.optimizer, &s), OK, "%s", fail_message());
    }
    cr_expect(same_state(&straight, &resumed));
    fixture_close(&straight);
    fixture_close(&stopped);
    fixture_close(&resumed);
}

Test(checkpoint, the_same_state_gives_the_same_bytes)
{
    static const char *const files[] = {"model.safetensors", "optimizer.safetensors", "state.json", "config.json", "files.json", "run.yaml"};
    struct fixture f;
    open_fixture(&f, "qwen2", true, 5);
    fill_state(&f, 100);
    char *first[6];
    size_t bytes[6];
    for (int pass = 0; pass < 2; pass++) {
        cr_assert_eq(save(&f, 4, 1), OK);
        for (int i = 0; i < 6; i++) {
            char name[64], *data;
            size_t n;
            snprintf(name, sizeof name, "step-00000004/%s", files[i]);
            cr_assert_eq(file_read(at(name), 1 << 24, &data, &n), OK, "%s", fail_message());
            if (!pass) { first[i] = data; bytes[i] = n; continue; }
            cr_expect(n == bytes[i] && !memcmp(data, first[i], n), "%s", files[i]);
            free(data);
            free(first[i]);
        }
    }
    fixture_close(&f);
}

Test(checkpoint, is_a_model_directory_with_its_tokenizer)
{
    struct fixture f, g;
    struct model_files *files;
    char *tokenizer = xasprintf("%s/tok", dir), *tokenizer_json = path_join(tokenizer, "tokenizer.json"), *other = path_join(tokenizer, "secret.txt");
    open_fixture(&f, "qwen3", true, 5);
    open_fixture(&g, "qwen3", true, 6);
    fill_state(&f, 100);
    cr_assert_eq(dir_make(tokenizer), OK);
    write_text(tokenizer_json, "{\"version\": \"1.0\"}");
    write_text(other, "no");
    struct train_state s = state_of(7);
    cr_assert_eq(checkpoint_save(dir, f.model, f.optimizer, &s, config, tokenizer, 1), OK, "%s", fail_message());
    cr_expect(path_exists(at("step-00000007/tokenizer.json")));
    cr_expect(!path_exists(at("step-00000007/secret.txt")));
    cr_assert_eq(model_files_open(&files, at("step-00000007")), OK, "%s", fail_message());
    cr_assert_eq(model_files_load(files, g.model), OK, "%s", fail_message());
    for (int i = 0; i < f.model->params->n; i++) {
        const struct param *p = &f.model->params->p[i];
        cr_expect_arr_eq((float *)f.model->weights + p->offset, (float *)g.model->weights + p->offset, (size_t)p->count * sizeof(float));
    }
    cr_expect_null(tensor_set_find(files->tensors, "exp_avg.model.norm.weight"));
    model_files_close(files);
    free(tokenizer);
    free(tokenizer_json);
    free(other);
    fixture_close(&f);
    fixture_close(&g);
}

/* ---- finding ---- */

Test(checkpoint, a_run_without_checkpoints_has_none)
{
    char *path;
    expect_found(NULL);
    cr_expect_eq(checkpoint_or("", dir, "eval.model", &path), ERR_USAGE);
    cr_expect(strstr(fail_message(), "eval.model") && strstr(fail_message(), dir), "%s", fail_message());
    cr_expect_eq(checkpoint_or("given/dir", dir, "eval.model", &path), OK);
    cr_expect_str_eq(path, "given/dir");
    free(path);
}

/* Bits all over every file, the list of hashes included. */
Test(checkpoint, a_flipped_bit_in_any_file_falls_back)
{
    struct fixture f;
    char **names;
    int n;
    open_fixture(&f, "qwen2", false, 5);
    fill_state(&f, 100);
    cr_assert_eq(save(&f, 1, 9), OK);
    cr_assert_eq(save(&f, 2, 9), OK);
    expect_found("step-00000002");
    cr_assert_eq(dir_list(at("step-00000002"), &names, &n), OK);
    cr_assert_geq(n, 6);
    freopen("/dev/null", "w", stderr);                       /* a warning per flip */
    for (int i = 0; i < n; i++) {
        char name[128];
        snprintf(name, sizeof name, "step-00000002/%s", names[i]);
        int64_t bits = 8 * path_size(at(name)), step = bits / 40 + 1;
        for (int64_t bit = 0; bit < bits; bit += step + bit % 7) {
            flip_bit(at(name), bit);
            expect_found("step-00000001");
            flip_bit(at(name), bit);
        }
        flip_bit(at(name), bits - 1);
        expect_found("step-00000001");
        flip_bit(at(name), bits - 1);
    }
    expect_found("step-00000002");
    names_free(names, n);
    fixture_close(&f);
}

/* two bytes: the last one of files.json is a newline, which says nothing */
Test(checkpoint, a_missing_or_cut_file_falls_back)
{
    static const char *const files[] = {"model.safetensors", "optimizer.safetensors", "state.json", "config.json", "files.json", "run.yaml"};
    struct fixture f;
    open_fixture(&f, "qwen2", false, 5);
    cr_assert_eq(save(&f, 1, 9), OK);
    for (int i = 0; i < 6; i++)
        for (int cut = 0; cut < 2; cut++) {
            char name[64];
            cr_assert_eq(save(&f, 2, 9), OK);
            snprintf(name, sizeof name, "step-00000002/%s", files[i]);
            cr_assert_eq(cut ? truncate(at(name), path_size(at(name)) - 2) : unlink(at(name)), 0);
            expect_found("step-00000001");
        }
    fixture_close(&f);
}

Test(checkpoint, a_list_of_files_that_is_no_list_is_broken)
{
    static const char *const lists[] = {"", "[]", "{}", "{\"model.safetensors\": 3}", "{\"model.safetensors\": \"00\", \"../x\": \"00\"}", "\"model.safetensors\"", "null"};
    struct fixture f;
    open_fixture(&f, "qwen2", false, 5);
    cr_assert_eq(save(&f, 1, 9), OK);
    cr_assert_eq(save(&f, 2, 9), OK);
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++) {
        write_text(at("step-00000002/files.json"), lists[i]);
        expect_found("step-00000001");
    }
    fixture_close(&f);
}

/* To start over silently would throw a run away. */
Test(checkpoint, when_all_are_broken_that_is_an_error)
{
    struct fixture f;
    char *path;
    open_fixture(&f, "qwen2", false, 5);
    cr_assert_eq(save(&f, 1, 9), OK);
    cr_assert_eq(save(&f, 2, 9), OK);
    flip_bit(at("step-00000001/model.safetensors"), 9000);
    flip_bit(at("step-00000002/state.json"), 9);
    cr_expect_eq(checkpoint_find(dir, &path), ERR_INPUT);
    cr_expect_null(path);
    cr_expect(strstr(fail_message(), "checkpoints") && strstr(fail_message(), "2"), "%s", fail_message());
    fixture_close(&f);
}

Test(checkpoint, newest_is_by_number_and_other_names_are_none)
{
    struct fixture f;
    open_fixture(&f, "qwen2", false, 5);
    cr_assert_eq(save(&f, 99999999, 9), OK);
    cr_assert_eq(save(&f, 100000000, 9), OK);
    expect_found("step-100000000");
    static const char *const others[] = {"step-best", "step-00000012.bak", "step-9", "step-", "step-00000013-mine", "step-999999999999999999999999"};
    for (int i = 0; i < 6; i++) cr_assert_eq(dir_make(at(others[i])), OK);
    expect_found("step-100000000");
    cr_assert_eq(save(&f, 100000001, 1), OK);
    for (int i = 0; i < 6; i++) cr_expect(path_exists(at(others[i])), "%s was removed", others[i]);
    cr_expect(!path_exists(at("step-99999999")) && !path_exists(at("step-100000000")) && path_exists(at("step-100000001")));
    fixture_close(&f);
}

/* ---- pruning ---- */

Test(checkpoint, the_newest_are_kept_and_leftovers_are_removed)
{
    struct fixture f;
    open_fixture(&f, "qwen2", false, 5);
    cr_assert_eq(dir_make(at(".tmp-step-00000002")), OK);
    write_text(at(".tmp-step-00000002/model.safetensors"), "half");
    write_text(at("notes.txt"), "mine");
    expect_found(NULL);
    for (int step = 1; step <= 5; step++) {
        char name[32];
        cr_assert_eq(save(&f, step, 3), OK, "%s", fail_message());
        cr_expect(!path_exists(at(".tmp-step-00000002")));
        for (int s = 1; s <= step; s++) {
            snprintf(name, sizeof name, "step-%08d", s);
            cr_expect_eq(path_exists(at(name)), s > step - 3, "after step %d: %s", step, name);
        }
    }
    cr_expect(path_exists(at("notes.txt")));
    fixture_close(&f);
}

/* The run fell back from a broken step 9 and saves step 4 with keep = 1: step 4 must live. */
Test(checkpoint, a_broken_newer_one_does_not_push_out_the_one_just_written)
{
    struct fixture f;
    open_fixture(&f, "qwen2", false, 5);
    cr_assert_eq(save(&f, 3, 9), OK);
    cr_assert_eq(save(&f, 9, 9), OK);
    flip_bit(at("step-00000009/model.safetensors"), 12345);
    expect_found("step-00000003");
    cr_assert_eq(save(&f, 4, 1), OK);
    expect_found("step-00000004");
    cr_assert_eq(save(&f, 9, 1), OK);                        /* and the run comes by there again */
    expect_found("step-00000009");
    cr_expect(!path_exists(at("step-00000004")));
    fixture_close(&f);
}

/* ---- loading ---- */

Test(checkpoint, of_another_architecture_is_refused)
{
    static const struct { const char *architecture; bool tie; } others[] = {{"qwen3", false}, {"llama", false}, {"qwen2", true}};
    struct fixture f, g;
    struct train_state s;
    open_fixture(&f, "qwen2", false, 5);
    cr_assert_eq(save(&f, 1, 9), OK);
    for (int i = 0; i < 3; i++) {
        open_fixture(&g, others[i].architecture, others[i].tie, 6);
        cr_expect_eq(checkpoint_load(at("step-00000001"), g.model, g.optimizer, &s), ERR_MISMATCH);
        cr_expect(strstr(fail_message(), "step-00000001") && strstr(fail_message(), "config.json"), "%s", fail_message());
        fixture_close(&g);
    }
    fixture_close(&f);
}

Test(checkpoint, a_state_that_makes_no_sense_is_refused_by_name)
{
    static const char *const states[] = {
        "{", "[]", "{}", "{\"step\": 3, \"epoch\": 0}", "{\"step\": -1, \"epoch\": 0, \"cursor\": 0}", "{\"step\": 3, \"epoch\": -2, \"cursor\": 0}", "{\"step\": \"3\", \"epoch\": 0, \"cursor\": 0}",
        "{\"step\": 3.5, \"epoch\": 0, \"cursor\": 0}", "{\"step\": 3, \"epoch\": 0, \"cursor\": 0, \"seed\": 1, \"data_id\": 4}", "{\"step\": 3, \"epoch\": 0, \"cursor\": 0, \"data_id\": \"0\"}",
        "{\"step\": 3, \"epoch\": 0, \"cursor\": 0, \"seed\": 1, \"data_id\": \"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0\"}",
#define WHOLE_STATE "{\"step\": 3, \"epoch\": 0, \"cursor\": 0, \"seed\": 1, \"data_id\": \"0\", "
        WHOLE_STATE "\"left_out\": 3}", WHOLE_STATE "\"left_out\": [3, 3]}", WHOLE_STATE "\"left_out\": [-1]}", WHOLE_STATE "\"left_out\": [\"3\"]}", WHOLE_STATE "\"spike\": {\"skipped\": 1}}"};
    struct fixture f;
    struct train_state s;
    open_fixture(&f, "qwen2", false, 5);
    cr_assert_eq(save(&f, 1, 9), OK);
    for (size_t i = 0; i < sizeof states / sizeof *states; i++) {
        write_text(at("step-00000001/state.json"), states[i]);
        cr_expect_eq(checkpoint_load(at("step-00000001"), f.model, f.optimizer, &s), ERR_INPUT, "state %s", states[i]);
        cr_expect(strstr(fail_message(), "state.json"), "%s", fail_message());
        if (strstr(states[i], "\"left_out\": [")) free(s.left_out.shard);
    }
    fixture_close(&f);
}

Test(checkpoint, what_a_run_leaves_out_and_judges_by_comes_back)
{
    struct fixture f;
    struct train_state s = state_of(4), back;
    int64_t shards[] = {0, 7, 999999};
    open_fixture(&f, "qwen2", false, 5);
    s.left_out = (struct shard_list){shards, 3};
    s.spike = (struct spike_state){.skipped = 5, .in_a_row = 1, .n = 2, .loss = {1.0 / 3, 2e-300}, .norm = {1e300, 0.1}};
    cr_assert_eq(checkpoint_save(dir, f.model, f.optimizer, &s, config, NULL, 9), OK, "%s", fail_message());
    cr_assert_eq(checkpoint_load(at("step-00000004"), f.model, f.optimizer, &back), OK, "%s", fail_message());
    cr_assert(back.left_out.n == 3 && !memcmp(back.left_out.shard, shards, sizeof shards));
    cr_assert(back.spike.skipped == 5 && back.spike.in_a_row == 1 && back.spike.n == 2);
    for (int i = 0; i < 2; i++) cr_assert(back.spike.loss[i] == s.spike.loss[i] && back.spike.norm[i] == s.spike.norm[i]);
    free(back.left_out.shard);
    cr_assert_eq(save(&f, 5, 9), OK);
    cr_assert_eq(checkpoint_load(at("step-00000005"), f.model, f.optimizer, &back), OK, "%s", fail_message());
    cr_assert(back.left_out.n == 0 && !back.left_out.shard && back.spike.n == 0 && back.spike.skipped == 0);
    fixture_close(&f);
}

/* Moments of a model that has the weights' names but other sizes, or no moments for a tensor. */

static int fill_zero(void *context, const struct tensor_spec *spec, size_t offset, size_t bytes, void *out)
{
    (void)context; (void)spec; (void)offset;
    memset(out, 0, bytes);
    return OK;
}

Test(checkpoint, moments_that_do_not_fit_are_refused_by_name)
{
    struct fixture f;
    struct train_state s;
    struct tensor_spec one = {.name = "exp_avg.model.embed_tokens.weight", .dtype = DTYPE_F32, .n_dims = 2, .shape = {FIXTURE_VOCAB, 24}};
    open_fixture(&f, "qwen2", false, 5);
    for (int fault = 0; fault < 3; fault++) {
        struct tensor_spec spec[2] = {one, one};
        cr_assert_eq(save(&f, 1, 9), OK);
        spec[1].name = "exp_avg_sq.model.embed_tokens.weight";
        if (fault == 1) spec[1].shape[0]--;
        if (fault == 2) spec[1].dtype = DTYPE_BF16;
        cr_assert_eq(safetensors_write(at("step-00000001/optimizer.safetensors"), spec, fault ? 2 : 1, NULL, fill_zero, NULL), OK, "%s", fail_message());
        cr_expect_eq(checkpoint_load(at("step-00000001"), f.model, f.optimizer, &s), ERR_MISMATCH);
        cr_expect(strstr(fail_message(), "optimizer.safetensors") && strstr(fail_message(), "exp_avg_sq.model.embed_tokens.weight"), "%s", fail_message());
    }
    fixture_close(&f);
}

/* Every pair of recipes whose state the other cannot go on from; a device of bf16 moments is played by what it says of itself, which is all that is looked at before the refusal. */
Test(checkpoint, of_another_recipe_is_refused_by_name)
{
    struct fixture exact, fp32, compact;
    struct train_state s;
    open_fixture_of(&exact, "qwen2", false, 5, true);
    open_fixture(&fp32, "qwen2", false, 5);
    open_fixture(&compact, "qwen2", false, 5);
    compact.be->moment_dtype = DTYPE_BF16;
    cr_assert_eq(save(&exact, 1, 9), OK);
    cr_assert_eq(save(&fp32, 2, 9), OK);
    cr_assert_eq(save(&compact, 3, 9), OK);
    const struct { const struct fixture *run; const char *from, *says[3]; } cases[] = {
        {&compact, "step-00000001", {"train.recipe exact", "this run's is compact", "resume with train.recipe exact"}},
        {&exact, "step-00000003", {"train.recipe compact", "this run's is exact", "resume with train.recipe compact"}},
        {&fp32, "step-00000001", {"master.model.embed_tokens.weight", "device", "optimizer.safetensors"}},
        {&exact, "step-00000002", {"master.model.embed_tokens.weight", "device", "optimizer.safetensors"}},
        {&fp32, "step-00000003", {"exp_avg.model.embed_tokens.weight", "device", "optimizer.safetensors"}},
        {&compact, "step-00000002", {"exp_avg.model.embed_tokens.weight", "device", "optimizer.safetensors"}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        cr_expect_eq(checkpoint_load(at(cases[i].from), cases[i].run->model, cases[i].run->optimizer, &s), ERR_MISMATCH, "case %zu", i);
        for (int j = 0; j < 3; j++) cr_expect(strstr(fail_message(), cases[i].says[j]), "case %zu: no \"%s\" in: %s", i, cases[i].says[j], fail_message());
    }
    fixture_close(&exact);
    fixture_close(&fp32);
    fixture_close(&compact);
}

/* A run that starts from a model directory takes its master from the files, not from what the weights were rounded to. */
Test(checkpoint, a_master_begins_at_the_precision_of_the_files)
{
    struct fixture f, g;
    struct model_files *files;
    open_fixture(&f, "qwen2", false, 5);
    open_fixture_of(&g, "qwen2", false, 6, true);
    fill_state(&f, 100);
    cr_assert_eq(save(&f, 1, 9), OK);
    cr_assert_eq(model_files_open(&files, at("step-00000001")), OK, "%s", fail_message());
    cr_assert_eq(optimizer_load_master(g.optimizer, files->tensors, files->path, NULL), OK, "%s", fail_message());
    for (int i = 0; i < f.model->params->n; i++) {
        const struct param *p = &f.model->params->p[i];
        cr_expect_arr_eq(g.optimizer->master + p->offset, (float *)f.model->weights + p->offset, (size_t)p->count * sizeof(float), "%s", p->part[0].name);
        cr_expect_arr_neq(g.optimizer->master + p->offset, (float *)g.model->weights + p->offset, (size_t)p->count * sizeof(float), "%s", p->part[0].name);
    }
    model_files_close(files);
    fixture_close(&f);
    fixture_close(&g);
}

/* ---- dying in the middle ---- */

static void expect_after_failure(const char *point, const char *found)
{
    struct fixture f;
    open_fixture(&f, "qwen2", false, 5);
    fill_state(&f, 100);
    cr_assert_eq(save(&f, 1, 1), OK);
    for (int kill = 0; kill < 2; kill++) {
        pid_t pid = fork();
        if (!pid) {
            char *spec = xasprintf("%s:%s", point, kill ? "kill" : "error");
            failpoint_set(spec);
            _exit(save(&f, 2, 1));
        }
        int status;
        waitpid(pid, &status, 0);
        if (kill) cr_expect(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "%s: status %x", point, status);
        else cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == ERR_IO, "%s: status %x", point, status);
        expect_found(found);
        if (!strcmp(found, "step-00000002")) dir_remove_tree(at("step-00000002"));
    }
    cr_assert_eq(save(&f, 3, 2), OK);
    expect_found("step-00000003");
    char **names;
    int n;
    cr_assert_eq(dir_list(at(""), &names, &n), OK);
    for (int i = 0; i < n; i++) cr_expect_neq(names[i][0], '.', "%s was left behind", names[i]);
    names_free(names, n);
    fixture_close(&f);
}

Test(checkpoint, death_before_the_rename_leaves_the_old_one) { expect_after_failure("checkpoint.before_rename", "step-00000001"); }
Test(checkpoint, death_after_the_rename_leaves_the_new_one) { expect_after_failure("checkpoint.after_rename", "step-00000002"); }

Test(checkpoint, a_directory_that_cannot_be_written_is_an_io_error_by_name)
{
    struct fixture f;
    char *file = path_join(dir, "checkpoints");
    open_fixture(&f, "qwen2", false, 5);
    write_text(file, "in the way");
    cr_expect_eq(save(&f, 1, 1), ERR_IO);
    cr_expect(strstr(fail_message(), "checkpoint of step 1") && strstr(fail_message(), file), "%s", fail_message());
    free(file);
    fixture_close(&f);
}
