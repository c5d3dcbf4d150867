/* The published tokenizers of ../shared/tokenizers: every text has the ids Hugging Face gives, and comes back as its normal form. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "data/tokenizer.h"

static void check_text(const struct tokenizer *t, struct tokenizer_work *w, const char *name, int line, const json_t *row)
{
    const json_t *s = json_object_get(row, "text"), *want = json_object_get(row, "ids");
    const int32_t *ids;
    const char *text, *normal;
    size_t n, bytes, normal_bytes;
    cr_assert(json_is_string(s) && json_is_array(want), "%s: line %d", name, line);
    int rc = tokenizer_encode(t, w, json_string_value(s), json_string_length(s), &ids, &n);
    cr_assert_eq(rc, OK, "%s: line %d: %s", name, line, fail_message());
    bool same = n == json_array_size(want);
    for (size_t i = 0; same && i < n; i++) same = ids[i] == json_integer_value(json_array_get(want, i));
    cr_expect(same, "%s: line %d: other ids than the reference", name, line);
    cr_assert_eq(tokenizer_decode(t, w, ids, n, false, &text, &bytes), OK, "%s: line %d: %s", name, line, fail_message());
    cr_assert_eq(tokenizer_normalize(t, w, json_string_value(s), json_string_length(s), &normal, &normal_bytes), OK);
    cr_expect(bytes == normal_bytes && !memcmp(text, normal, bytes), "%s: line %d: decode(encode(text)) is not the normalized text", name, line);
}

static void check_tokenizer(const char *name, int least, int32_t vocab, const char *pre)
{
    char *dir = path_join(SOURCE_ROOT "/../shared/tokenizers", name), *file = path_join(dir, "expected.jsonl.gz"), *line = NULL;
    if (!path_exists(file)) {
        free(dir);
        free(file);
        cr_skip_test("SKIPPED: ../shared/tokenizers/%s is not there", name);
    }
    struct tokenizer *t;
    size_t capacity = 0;
    ssize_t n;
    int lines = 0;
    cr_assert_eq(tokenizer_open(&t, dir), OK, "%s", fail_message());
    cr_expect_eq(tokenizer_vocab_size(t), vocab);
    cr_expect_eq(tokenizer_holes(t), 0);
    cr_expect_str_eq(tokenizer_gguf_pre(t), pre);
    struct tokenizer_work *w = tokenizer_work_new(t);
    char *command = xasprintf("gzip -dc '%s'", file);
    FILE *f = popen(command, "r");
    cr_assert(f);
    while ((n = getline(&line, &capacity, f)) > 0) {
        json_error_t e;
        json_t *row = json_loadb(line, (size_t)n, JSON_ALLOW_NUL, &e);
        cr_assert(row, "%s: line %d: %s", name, lines + 1, e.text);
        check_text(t, w, name, ++lines, row);
        json_decref(row);
    }
    cr_assert_eq(pclose(f), 0);
    cr_assert_geq(lines, least);
    tokenizer_work_free(w);
    tokenizer_close(t);
    free(command);
    free(line);
    free(dir);
    free(file);
}

Test(tokenizer_golden, qwen2_5) { check_tokenizer("qwen2_5", 1586, 151665, "qwen2"); }
Test(tokenizer_golden, deepseek_v3) { check_tokenizer("deepseek_v3", 1586, 128815, "deepseek-v3"); }
