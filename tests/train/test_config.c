/* The configuration: what is accepted, what every refusal says, and that what is written reads back the same. */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "train/config.h"
#include "train/options.h"

static int read_text(struct config *c, const char *text) { return config_read_text(c, text, strlen(text), "configs/x.yaml"); }

/* `text` must be refused with a message that holds every one of the |-separated pieces. */
static void refused(const char *text, const char *pieces)
{
    struct config *c = config_new();
    int rc = read_text(c, text);
    cr_assert_eq(rc, ERR_USAGE, "accepted or other status %d: %s", rc, text);
    char *list = strdup(pieces), *save = NULL;
    for (char *p = strtok_r(list, "|", &save); p; p = strtok_r(NULL, "|", &save))
        cr_expect(strstr(fail_message(), p), "'%s' is not in: %s", p, fail_message());
    free(list);
    config_free(c);
}

static void set_refused(const char *assignment, const char *piece)
{
    struct config *c = config_new();
    cr_assert_eq(config_set(c, assignment), ERR_USAGE, "accepted: %s", assignment);
    cr_expect(strstr(fail_message(), piece), "'%s' is not in: %s", piece, fail_message());
    config_free(c);
}

Test(config, defaults)
{
    struct config *c = config_new();
    cr_expect_str_eq(c->run_dir, "run");
    cr_expect_str_eq(c->run_device, "cpu");
    cr_expect_eq(c->run_seed, 1);
    cr_expect_eq(c->corpus_files.n, 0);
    cr_expect_str_eq(c->teacher_path, "");
    cr_expect_eq(c->optimizer_lr, 3e-4);
    cr_expect_eq(c->optimizer_beta2, 0.95);
    cr_expect_eq(c->shards_temperatures.n, 1);
    cr_expect_eq(c->shards_temperatures.item[0], 1.0);
    cr_expect(c->corpus_append_eos && !c->corpus_prepend_bos && c->corpus_shuffle);
    cr_expect_str_eq(c->shards_kind, "hybrid");
    cr_expect(c->shards_k == 32 && c->shards_m == 32 && c->shards_draws == 50);
    config_free(c);
    config_free(NULL);
}

Test(config, table_is_well_formed)
{
    cr_assert_leq(option_count, 1000);
    for (int i = 0; i < option_count; i++) {
        const struct option *o = &options[i];
        cr_expect(strchr(o->key, '.') && !strchr(strchr(o->key, '.') + 1, '.'), "%s", o->key);
        cr_expect(o->commands, "%s is read by no command", o->key);
        cr_expect(o->help && *o->help && !strchr(o->help, '\n') && !strchr(o->help, '|'), "%s", o->key);
        cr_expect(strlen(o->key) < 64, "%s is too long to be suggested", o->key);
        for (int j = 0; j < i; j++) {
            cr_expect(strcmp(o->key, options[j].key), "%s twice", o->key);
            cr_expect_neq(o->offset, options[j].offset, "%s and %s share a member", o->key, options[j].key);
        }
        if (o->type == OPTION_WHOLE || o->type == OPTION_REAL || o->type == OPTION_REALS) cr_expect_lt(o->low, o->high, "%s", o->key);
    }
}

Test(config, reads_every_type)
{
    struct config *c = config_new();
    const char *text = "# comment\n"
                       "run:\n  dir: runs/a  # comment\n  seed: 1_000\n"
                       "corpus:\n  files:\n    - data/a.txt\n    - \"*.md\"\n  shuffle: no\n  append_eos: Off\n  heldout_fraction: .5\n"
                       "train: {steps: 1e6, epochs: 2.5}\n"
                       "shards:\n  temperatures: [1, 2.0, 3e0]\n"
                       "student:\n"
                       "optimizer:\n  lr: 1_0.0e-5\n"
                       "generate:\n  prompt: |\n    two\n    lines\n"
                       "objective:\n  'divergence': \"jsd\"\n";
    cr_assert_eq(read_text(c, text), OK, "%s", fail_message());
    cr_expect_str_eq(c->run_dir, "runs/a");
    cr_expect_eq(c->run_seed, 1000);
    cr_assert_eq(c->corpus_files.n, 2);
    cr_expect_str_eq(c->corpus_files.item[1], "*.md");
    cr_expect(!c->corpus_shuffle && !c->corpus_append_eos);
    cr_expect_eq(c->corpus_heldout_fraction, 0.5);
    cr_expect_eq(c->train_steps, 1000000);
    cr_expect_eq(c->train_epochs, 2.5);
    cr_assert_eq(c->shards_temperatures.n, 3);
    cr_expect_eq(c->shards_temperatures.item[2], 3.0);
    cr_expect_eq(c->optimizer_lr, 1e-4);
    cr_expect_str_eq(c->generate_prompt, "two\nlines\n");
    cr_expect_str_eq(c->objective_divergence, "jsd");
    cr_assert_eq(read_text(c, "corpus:\n  files: one.txt\n"), OK);          /* one item needs no brackets; replaces the older list */
    cr_assert_eq(c->corpus_files.n, 1);
    cr_expect_str_eq(c->corpus_files.item[0], "one.txt");
    config_free(c);
}

Test(config, whole_numbers)
{
    static const struct { const char *text; int64_t value; } good[] = {
        {"0", 0}, {"+7", 7}, {"1e6", 1000000}, {"1.5e3", 1500}, {"12.", 12}, {"12.000", 12}, {"120e-1", 12}, {"1_000_000", 1000000}, {"007", 7},
        {"0e999999999999999999999", 0}, {"-0", 0}, {"10000000000000000000000e-20", 100}, {"0.000000000000000000000000001e30", 1000}, {"999999999999", 999999999999}};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        struct config *c = config_new();
        char *set = xasprintf("train.steps=%s", good[i].text);
        cr_assert_eq(config_set(c, set), OK, "%s: %s", set, fail_message());
        cr_expect_eq(c->train_steps, good[i].value, "%s", set);
        free(set);
        config_free(c);
    }
    static const char *const bad[] = {"ten", "1.5", "1e-1", "0x10", "1e", "e5", ".", "1 000", "1,000", "_1", "1_", "1__0", "10k", "--1", "nan", ".inf", "1.5e0", "true", "0.1e-999999999999"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char *set = xasprintf("train.steps=%s", bad[i]);
        set_refused(set, "train.steps must be a whole number, not '");
        free(set);
    }
    set_refused("train.steps=-1", "out of range: it must be at least 0 and at most 1000000000000");
    set_refused("train.steps=1e12.5", "whole number");
    set_refused("train.steps=1000000000001", "out of range");
    set_refused("train.steps=99999999999999999999999999999999", "out of range");
    set_refused("train.steps=1e999999999999999999999999", "out of range");
    set_refused("run.seed=9007199254740993", "at most 9007199254740992");
}

Test(config, real_numbers)
{
    static const char *const bad[] = {"x", "0x1p3", "1e", "", "1..2", "1.2.3", "--5", "1e5.5"};
    for (size_t i = 1; i < sizeof bad / sizeof *bad; i++) {
        char *set = xasprintf("optimizer.lr=%s", bad[i]);
        set_refused(set, i == 3 ? "has no value" : "optimizer.lr must be a number, not '");
        free(set);
    }
    static const char *const infinite[] = {".inf", "-.inf", "inf", "-Infinity", ".nan", "NaN", "+.INF"};
    for (size_t i = 0; i < sizeof infinite / sizeof *infinite; i++) {
        char *set = xasprintf("optimizer.lr=%s", infinite[i]);
        set_refused(set, "must be a finite number");
        free(set);
    }
    set_refused("optimizer.lr=0", "above 0 and at most 10");
    set_refused("optimizer.lr=1e-999", "above 0");
    set_refused("optimizer.lr=1e999", "out of range");
    set_refused("optimizer.beta1=1", "at least 0 and below 1");
    set_refused("objective.beta=0", "above 0 and below 1");
    set_refused("objective.beta=1", "above 0 and below 1");
    set_refused("objective.alpha=1", "below 1");
    set_refused("objective.temperature=0", "at least 0.01");
    struct config *c = config_new();
    cr_assert_eq(config_set(c, "objective.kd_weight=-0"), OK);
    cr_expect(!signbit(c->objective_kd_weight));
    config_free(c);
}

Test(config, refusals_name_line_and_remedy)
{
    refused("objective:\n  divergence: jsd\n\n  temprature: 2\n", "configs/x.yaml:4: unknown key objective.temprature; did you mean objective.temperature?");
    refused("run:\n  dir: a\ntrain:\n  lr: 1\n", "configs/x.yaml:4: unknown key train.lr; did you mean optimizer.lr?");
    refused("lr: 1\n", "configs/x.yaml:1: unknown key lr; did you mean optimizer.lr?");
    refused("optimizer.lr: 1\n", "configs/x.yaml:1: optimizer.lr: write the section on a line of its own (optimizer:)|indented, lr");
    refused("optimiser:\n  lr: 1\n", "configs/x.yaml:1: unknown section optimiser; did you mean optimizer?");
    refused("wholly_other:\n  lr: 1\n", "unknown section wholly_other; --help");
    refused("run:\n  zzzzzzzzzzzzzzzz: 1\n", "unknown key run.zzzzzzzzzzzzzzzz; --help");
    refused("train:\n  steps: ten\n", "configs/x.yaml:2: train.steps must be a whole number, not 'ten'");
    refused("train:\n  steps: -5\n", "configs/x.yaml:2: train.steps = -5 is out of range|at least 0|at most 1000000000000");
    refused("run:\n  device: gpu\n", "configs/x.yaml:2: run.device must be one of cpu|cuda|not 'gpu'");
    refused("run:\n  device: CPU\n", "must be one of cpu");
    refused("run:\n  resume: maybe\n", "run.resume must be true or false, not 'maybe'");
    refused("shards:\n  kind: zip\n", "configs/x.yaml:2: shards.kind must be one of hybrid|topk|sampled|full|not 'zip'");
    refused("shards:\n  m: 0\n", "shards.m = 0 is out of range");
    refused("shards:\n  draws: 256\n", "at most 255");
    refused("train:\n  steps:\n", "configs/x.yaml:2: train.steps has no value");
    refused("train:\n  steps: null\n", "has no value");
    refused("teacher:\n  path: ~\n", "teacher.path has no value|''");
    refused("run:\n  dir: ''\n", "run.dir must not be empty");
    refused("shards:\n  temperatures: []\n", "shards.temperatures has no value");
    refused("shards:\n  temperatures: [1, 2, 1.0]\n", "lists 1 twice");
    refused("shards:\n  temperatures: [1,2,3,4,5,6,7,8,9]\n", "more than 8");
    refused("shards:\n  temperatures: [1, hot]\n", "shards.temperatures must be a number, not 'hot'");
    refused("corpus:\n  files: [a, , b]\n", "not valid YAML|configs/x.yaml:2");
    refused("corpus:\n  files: [a, '', b]\n", "corpus.files must not be empty");
    refused("corpus:\n  files: [a, [b]]\n", "items of corpus.files must be plain values");
    refused("corpus:\n  files: [a, {b: c}]\n", "items of corpus.files must be plain values");
    refused("corpus:\n  files: *.txt\n", "configs/x.yaml:2: not valid YAML|quote a text that begins with *");
    refused("corpus:\n  files: *all\n", "configs/x.yaml:2: aliases (*all)|quote a text that begins with *");
    refused("corpus:\n  files: &a [b]\n", "configs/x.yaml:2: anchors (&a)");
    refused("run: &r\n  dir: a\n", "configs/x.yaml:1: anchors");
    refused("run:\n  dir: !!str a\n", "tags");
    refused("run:\n  <<: *base\n", "unknown key");
    refused("run:\n  dir: [a]\n", "run.dir takes one value, not a list");
    refused("run:\n  dir:\n    deeper: 1\n", "run.dir holds further keys|two levels");
    refused("run:\n  dir: a\n  dir: b\n", "configs/x.yaml:3: run.dir is given twice, first on line 2");
    refused("run:\n  dir: a\ntrain:\n  steps: 1\nrun:\n  seed: 2\n", "configs/x.yaml:5: section run is given twice");
    refused("run:\n  dir: a\n---\nrun:\n  dir: b\n", "configs/x.yaml:3: a second YAML document");
    refused("run: 5\n", "section run must hold keys");
    refused("run: [dir]\n", "section run must hold keys");
    refused("- run\n", "configuration is sections of keys");
    refused("just text\n", "configuration is sections of keys");
    refused("", "configs/x.yaml: is empty");
    refused("# nothing\n", "is empty");
    refused("run:\n\tdir: a\n", "configs/x.yaml:2: not valid YAML");
    refused("run: {dir: a\n", "not valid YAML");
    refused("run:\n  dir: \"a\\0b\"\n", "NUL");
    refused("run:\n  dir: \xff\xfe\n", "UTF-8");
    refused("? [a]\n: b\n", "a section is not a name");
    refused("run:\n  ? [a]\n  : b\n", "a key of section run is not a name");
}

Test(config, set_on_the_command_line)
{
    struct config *c = config_new();
    cr_assert_eq(config_set(c, "corpus.files=a.txt, b.txt"), OK);
    cr_assert_eq(c->corpus_files.n, 2);
    cr_expect_str_eq(c->corpus_files.item[1], "b.txt");
    cr_assert_eq(config_set(c, "corpus.files=['a,b', \"c: d\"]"), OK, "%s", fail_message());
    cr_assert_eq(c->corpus_files.n, 2);
    cr_expect_str_eq(c->corpus_files.item[0], "a,b");
    cr_expect_str_eq(c->corpus_files.item[1], "c: d");
    cr_assert_eq(config_set(c, "shards.temperatures=[1, 2]"), OK);
    cr_assert_eq(config_set(c, "shards.temperatures=4"), OK);
    cr_assert_eq(c->shards_temperatures.n, 1);
    cr_assert_eq(config_set(c, "generate.prompt=Hello: {world} # = \"x\""), OK);
    cr_expect_str_eq(c->generate_prompt, "Hello: {world} # = \"x\"");
    cr_assert_eq(config_set(c, "generate.prompt=null"), OK);
    cr_expect_str_eq(c->generate_prompt, "null");
    cr_assert_eq(config_set(c, "generate.prompt=''"), OK);
    cr_expect_str_eq(c->generate_prompt, "");
    config_free(c);
    set_refused("train.steps", "write section.key=value");
    set_refused("train.stpes=5", "--set: unknown key train.stpes; did you mean train.steps?");
    set_refused("train.steps=", "train.steps has no value");
    set_refused("teacher.path=", "teacher.path has no value");
    set_refused("run.dir=''", "must not be empty");
    set_refused("run.dir=a\xff", "not valid UTF-8 at byte 1");
    set_refused("corpus.files=a,,b", "has no value");
    set_refused("corpus.files=[a", "--set: not valid YAML");
    set_refused("corpus.files=[a]\nrun: {}", "one line");
    set_refused("=5", "unknown key");
}

/* Another value than the default for every key, hard ones for texts. */
static void set_other_value(struct config *c, const struct option *o, int variant)
{
    static const char *const hard[] = {"a b", "x: y # z", "'", "\"\\\n\t\r\x01\x7f", "- a", "*.txt", "~/x", "null", "TRUE", "1e5", "\xc3\xa9\xe2\x80\xa8\xef\xbb\xbf\xc2\x85\xc2\xa0", "\xf0\x9f\x90\x8d", " lead and trail ",
                                       "{a}", "[b]", "%x", "@x", "`x", "!x", "&x", "|", ">", "?", "a,b", "''x''", "y", "\xef\xbf\xbe" };
    enum { N = sizeof hard / sizeof *hard };
    char *value = NULL;
    switch (o->type) {
    case OPTION_TEXT: value = xstrdup(hard[(size_t)variant % N]); break;
    case OPTION_CHOICE: value = xstrdup(strrchr(o->choices, '|') + 1); break;
    case OPTION_WHOLE: value = xasprintf("%.0f", variant % 2 ? o->high : o->low + 1); break;
    case OPTION_REAL: value = xasprintf("%.17g", o->low + (o->high - o->low) * (variant % 2 ? 1.0 / 3 : 0.1234567890123 * 1e-9)); break;
    case OPTION_SWITCH: value = xstrdup(strcmp(o->fallback, "true") ? "true" : "false"); break;
    case OPTION_REALS: value = xstrdup("0.1, 3.3333333333333335, 100"); break;
    case OPTION_TEXTS: {
        char *yaml = xasprintf("%.*s:\n  %s: [\"a, b\", 'c''d', \"\\x01\\u2028\", \"%s\"]\n", (int)strcspn(o->key, "."), o->key, strchr(o->key, '.') + 1, variant % 2 ? "null" : "*");
        cr_assert_eq(config_read_text(c, yaml, strlen(yaml), "x"), OK, "%s", fail_message());
        free(yaml);
        return;
    }
    }
    char *set = xasprintf("%s=%s", o->key, value);
    cr_assert_eq(config_set(c, set), OK, "%s", fail_message());
    free(set);
    free(value);
}

static void expect_same(const struct config *a, const struct config *b)
{
    for (int i = 0; i < option_count; i++) {
        const struct option *o = &options[i];
        const void *x = (const char *)a + o->offset, *y = (const char *)b + o->offset;
        const struct string_list *s = x, *t = y;
        const struct double_list *d = x, *e = y;
        switch (o->type) {
        case OPTION_TEXT: case OPTION_CHOICE: cr_expect_str_eq(*(char *const *)x, *(char *const *)y, "%s", o->key); break;
        case OPTION_WHOLE: cr_expect_eq(*(const int64_t *)x, *(const int64_t *)y, "%s", o->key); break;
        case OPTION_REAL: cr_expect(!memcmp(x, y, sizeof(double)), "%s: %.17g %.17g", o->key, *(const double *)x, *(const double *)y); break;
        case OPTION_SWITCH: cr_expect_eq(*(const bool *)x, *(const bool *)y, "%s", o->key); break;
        case OPTION_TEXTS:
            cr_assert_eq(s->n, t->n, "%s", o->key);
            for (int j = 0; j < s->n; j++) cr_expect_str_eq(s->item[j], t->item[j], "%s", o->key);
            break;
        case OPTION_REALS:
            cr_assert_eq(d->n, e->n, "%s", o->key);
            cr_expect(!memcmp(d->item, e->item, (size_t)d->n * sizeof *d->item), "%s", o->key);
            break;
        }
    }
}

Test(config, differences)
{
    struct config *was = config_new(), *is = config_new();
    char *none = config_differences(was, is, CMD_TRAIN), *some, *other;
    cr_expect_str_eq(none, "");
    static const char *const set[] = {"optimizer.lr=1e-3", "student.path=a b", "train.steps=7", "run.resume=true", "corpus.files=p,q", "generate.seed=9"};
    for (size_t i = 0; i < sizeof set / sizeof *set; i++) cr_assert_eq(config_set(is, set[i]), OK, "%s", fail_message());
    some = config_differences(was, is, CMD_TRAIN);
    cr_expect_str_eq(some, "run.resume false -> true, student.path \"\" -> \"a b\", corpus.files [] -> [p, q], optimizer.lr 0.0003 -> 0.001, train.steps 0 -> 7");
    other = config_differences(was, is, CMD_GENERATE);
    cr_expect_str_eq(other, "generate.seed 1 -> 9");
    free(none);
    free(some);
    free(other);
    config_free(was);
    config_free(is);
}

Test(config, written_file_reads_back)
{
    char dir[] = "/tmp/test_config_XXXXXX";
    cr_assert(mkdtemp(dir));
    char *path = path_join(dir, "resolved.yaml");
    for (int variant = 0; variant < 40; variant++) {
        struct config *c = config_new(), *back = config_new();
        if (variant) for (int i = 0; i < option_count; i++) set_other_value(c, &options[i], variant + i);
        if (variant == 1) {                                  /* the case list really leaves every default */
            for (int i = 0; i < option_count; i++) {
                const struct option *o = &options[i];
                const void *x = (char *)c + o->offset, *y = (char *)back + o->offset;
                if (o->type == OPTION_SWITCH) cr_expect_neq(*(const bool *)x, *(const bool *)y, "%s", o->key);
                if (o->type == OPTION_REAL) cr_expect_neq(*(const double *)x, *(const double *)y, "%s", o->key);
                if (o->type == OPTION_CHOICE || o->type == OPTION_TEXT) cr_expect_str_neq(*(char *const *)x, *(char *const *)y, "%s", o->key);
            }
        }
        cr_assert_eq(config_write(c, path), OK, "%s", fail_message());
        cr_assert_eq(config_read_file(back, path), OK, "%s", fail_message());
        expect_same(c, back);
        char *a = config_to_yaml(c), *b = config_to_yaml(back);
        cr_expect_str_eq(a, b);
        for (int i = 0; i < option_count; i++) cr_expect(strstr(a, options[i].help), "%s has no comment", options[i].key);
        free(a);
        free(b);
        config_free(c);
        config_free(back);
    }
    struct config *c = config_new();
    char *missing = path_join(dir, "missing.yaml");
    cr_expect_eq(config_read_file(c, missing), ERR_IO);
    cr_expect(strstr(fail_message(), "missing.yaml"));
    cr_expect_eq(config_read_file(c, dir), ERR_USAGE);
    config_free(c);
    free(missing);
    free(path);
    dir_remove_tree(dir);
}

Test(config, help_fits_100_columns)
{
    for (int command = 0; command < CMD_CONFIG_COUNT; command++) {
        char *text = NULL;
        size_t bytes;
        FILE *f = open_memstream(&text, &bytes);
        config_print_help(f, command);
        fclose(f);
        for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) cr_expect_lt(strlen(line), 100, "%s", line);
        free(text);
    }
    char *text = NULL;
    size_t bytes;
    FILE *f = open_memstream(&text, &bytes);
    config_print_markdown(f);
    fclose(f);
    for (int i = 0; i < option_count; i++) {
        char *cell = xasprintf("| `%s` |", options[i].key);
        cr_expect(strstr(text, cell), "%s", cell);
        free(cell);
    }
    free(text);
}
