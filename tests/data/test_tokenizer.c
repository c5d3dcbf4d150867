/* Tokenizers: ids of every part against Hugging Face's (tests/golden/tokenizer_cases.jsonl, made by scripts/make_tokenizer_cases.py), and
 * what the files cannot show: refusals, identity, tokenizer_config.json, bounded time, the command. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "data/tokenizer.h"
#include "train/tokenize.h"

static char dir[64];
static struct tokenizer *t;
static struct tokenizer_work *w;

static void setup(void)
{
    strcpy(dir, "/tmp/test_tokenizer_XXXXXX");
    cr_assert(mkdtemp(dir));
}

static void teardown(void)
{
    tokenizer_work_free(w);
    tokenizer_close(t);
    w = NULL;
    t = NULL;
    dir_remove_tree(dir);
}

TestSuite(tokenizer, .init = setup, .fini = teardown);

static void put(const char *name, const char *text)
{
    char *path = path_join(dir, name);
    cr_assert_eq(file_replace(path, text, strlen(text)), OK, "%s", fail_message());
    free(path);
}

static int open_here(void)
{
    tokenizer_work_free(w);
    tokenizer_close(t);
    w = NULL;
    int rc = tokenizer_open(&t, dir);
    if (rc == OK) w = tokenizer_work_new(t);
    return rc;
}

#define MODEL(vocab, merges) "\"model\":{\"type\":\"BPE\",\"vocab\":" vocab ",\"merges\":" merges "}"
#define SMALL MODEL("{\"a\":0,\"b\":1,\"ab\":2}", "[\"a b\"]")
#define ADDED(id, content, flag) "{\"id\":" id ",\"content\":\"" content "\",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,\"normalized\":false,\"special\":" flag "}"

/* Ids as " 1 2 3". */
static const char *ids_of(const char *text, size_t n)
{
    static char out[8192];
    const int32_t *ids;
    size_t n_ids;
    int rc = tokenizer_encode(t, w, text, n, &ids, &n_ids);
    cr_assert_eq(rc, OK, "%s", fail_message());
    *out = 0;
    for (size_t i = 0, at = 0; i < n_ids && at < sizeof out - 16; i++) at += (size_t)sprintf(out + at, " %d", (int)ids[i]);
    return out;
}

Test(tokenizer, every_part_as_hugging_face)
{
    FILE *f = fopen(SOURCE_ROOT "/tests/golden/tokenizer_cases.jsonl", "r");
    char *line = NULL;
    size_t capacity = 0;
    ssize_t n;
    json_t *models = NULL;
    int cases = 0, texts = 0;
    cr_assert(f);
    while ((n = getline(&line, &capacity, f)) > 0) {
        json_error_t e;
        json_t *row = json_loadb(line, (size_t)n, JSON_ALLOW_NUL, &e);
        cr_assert(row, "%s", e.text);
        if (!models) { models = row; continue; }
        const char *name = json_string_value(json_object_get(row, "model"));
        json_t *tokenizer = json_object_get(row, "tokenizer"), *list = json_object_get(row, "texts"), *want = json_object_get(row, "ids");
        json_object_set(tokenizer, "model", json_object_get(json_object_get(models, "models"), name));
        char *text = json_dumps(tokenizer, JSON_COMPACT);
        put("tokenizer.json", text);
        json_object_del(tokenizer, "model");
        char *shown = json_dumps(tokenizer, JSON_COMPACT);
        cr_assert_eq(open_here(), OK, "%s: %s", shown, fail_message());
        for (size_t i = 0; i < json_array_size(list); i++, texts++) {
            const json_t *s = json_array_get(list, i), *ids = json_array_get(want, i);
            char expected[8192] = "";
            for (size_t k = 0, at = 0; k < json_array_size(ids); k++) at += (size_t)sprintf(expected + at, " %d", (int)json_integer_value(json_array_get(ids, k)));
            for (int again = 0; again < 2; again++)   /* the second time from the cache of words */
                cr_expect_str_eq(ids_of(json_string_value(s), json_string_length(s)), expected, "model %s, %s, text \"%s\"", name, shown, json_string_value(s));
        }
        free(text);
        free(shown);
        json_decref(row);
        cases++;
    }
    cr_assert(cases >= 50 && texts >= 100, "%d cases, %d texts", cases, texts);
    json_decref(models);
    free(line);
    fclose(f);
}

Test(tokenizer, refusals_name_what_is_wrong)
{
    static const struct { const char *json, *message; } bad[] = {
        {"[]", "not a JSON object"},
        {"{", "not valid JSON"},
        {"{\"model\":1}", "\"model\" is not an object"},
        {"{\"version\":\"2.0\"," SMALL "}", "version is not \"1.0\""},
        {"{\"extra\":1," SMALL "}", "key \"extra\""},
        {"{\"model\":{\"type\":\"Unigram\",\"vocab\":[]}}", "\"Unigram\"; only BPE"},
        {"{\"model\":{\"type\":\"WordPiece\",\"vocab\":{}}}", "\"WordPiece\""},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{},\"merges\":[]}}", "model.vocab or model.merges is missing"},
        {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"dropout\":0.1}}", "model.dropout"},
        {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"end_of_word_suffix\":\"</w>\"}}", "model.end_of_word_suffix is not implemented"},
        {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"continuing_subword_prefix\":\"##\"}}", "model.continuing_subword_prefix"},
        {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"magic\":true}}", "model.magic"},
        {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"fuse_unk\":1}}", "model.fuse_unk is not true or false"},
        {"{" MODEL("{\"a\":0,\"b\":0}", "[]") "}", "id 0 belongs to both"},
        {"{" MODEL("{\"a\":0,\"a\":1}", "[]") "}", "duplicate"},
        {"{" MODEL("{\"a\":-1}", "[]") "}", "no usable id"},
        {"{" MODEL("{\"a\":1.5}", "[]") "}", "no usable id"},
        {"{" MODEL("{\"a\":4000000000}", "[]") "}", "no usable id"},
        {"{" MODEL("{\"a\":0,\"b\":1}", "[\"a b\"]") "}", "model.merges[0]: \"ab\" is not in the vocabulary"},
        {"{" MODEL("{\"a\":0,\"ab\":1}", "[\"a b\"]") "}", "model.merges[0]: \"b\" is not"},
        {"{" MODEL("{\"a\":0,\"b\":1}", "[\"a  b\"]") "}", "model.merges[0] is not two tokens"},
        {"{" MODEL("{\"a\":0,\"b\":1,\"ab\":2}", "[[\"a\",\"b\"],\"a b\"]") "}", "model.merges[1] is not a pair"},
        {"{" MODEL("{\"a\":0,\"b\":1,\"ab\":2}", "[[\"a\"]]") "}", "model.merges[0] is not a pair"},
        {"{\"normalizer\":{\"type\":\"Precompiled\"}," SMALL "}", "normalizer type \"Precompiled\" is not implemented"},
        {"{\"normalizer\":{\"type\":\"BertNormalizer\"}," SMALL "}", "\"BertNormalizer\""},
        {"{\"normalizer\":{\"type\":\"NFC\",\"x\":1}," SMALL "}", "key \"x\""},
        {"{\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFC\"},{\"type\":\"Nope\"}]}," SMALL "}", "normalizer.normalizers[1]"},
        {"{\"pre_tokenizer\":{\"type\":\"UnicodeScripts\"}," SMALL "}", "pre_tokenizer type \"UnicodeScripts\""},
        {"{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"a(\"},\"behavior\":\"Isolated\",\"invert\":false}," SMALL "}", "( without its )"},
        {"{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"[a\"},\"behavior\":\"Isolated\",\"invert\":false}," SMALL "}", "[ without its ]"},
        {"{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"\\\\X\"},\"behavior\":\"Isolated\",\"invert\":false}," SMALL "}", "\\X"},
        {"{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(?i:ss)\"},\"behavior\":\"Isolated\",\"invert\":false}," SMALL "}", "fold to one character"},
        {"{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"\\\\p{Alphabetic}\"},\"behavior\":\"Isolated\",\"invert\":false}," SMALL "}", "Alphabetic"},
        {"{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(?<=a+)b\"},\"behavior\":\"Isolated\",\"invert\":false}," SMALL "}", "lookbehind"},
        {"{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"a\"},\"behavior\":\"Sideways\",\"invert\":false}," SMALL "}", "behavior \"Sideways\""},
        {"{\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"ab\"}," SMALL "}", "not one character"},
        {"{\"decoder\":{\"type\":\"WordPiece\"}," SMALL "}", "decoder type \"WordPiece\""},
        {"{\"post_processor\":{\"type\":\"Mystery\"}," SMALL "}", "\"Mystery\" is not implemented"},
        {"{\"added_tokens\":[" ADDED("9", "<s>", "true") "]," SMALL "}", "\"<s>\" has id 9 in the list but other readers give it 3"},
        {"{\"added_tokens\":[" ADDED("3", "<s>", "true") "," ADDED("3", "<s>", "true") "]," SMALL "}", "listed twice"},
        {"{\"added_tokens\":[{\"id\":3}]," SMALL "}", "no \"content\""},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        put("tokenizer.json", bad[i].json);
        cr_expect_eq(open_here(), ERR_INPUT, "accepted: %s", bad[i].json);
        cr_expect(strstr(fail_message(), bad[i].message), "%s\n  says: %s\n  not: %s", bad[i].json, fail_message(), bad[i].message);
    }
    char *deep = xmalloc(200001);
    memset(deep, '[', 200000);
    deep[200000] = 0;
    put("tokenizer.json", deep);
    cr_expect_eq(open_here(), ERR_INPUT);
    free(deep);
    cr_expect_eq(tokenizer_open(&t, "/nonexistent"), ERR_IO);
}

Test(tokenizer, deep_sequences_are_bounded)
{
    char json[4096] = "{\"normalizer\":";
    for (int i = 0; i < 30; i++) strcat(json, "{\"type\":\"Sequence\",\"normalizers\":[");
    strcat(json, "{\"type\":\"NFC\"}");
    for (int i = 0; i < 30; i++) strcat(json, "]}");
    strcat(json, "," SMALL "}");
    put("tokenizer.json", json);
    cr_assert_eq(open_here(), ERR_INPUT);
    cr_assert(strstr(fail_message(), "nested"), "%s", fail_message());
}

Test(tokenizer, holes_duplicates_and_the_vocabulary)
{
    size_t n;
    const char *left, *right;
    put("tokenizer.json", "{\"added_tokens\":[" ADDED("5", "<s>", "true") "," ADDED("6", "<t>", "false") "]," MODEL("{\"a\":0,\"b\":1,\"ab\":2,\"bab\":9,\"<0x0A>\":4}",
        "[\"b ab\",\"a b\",\"b ab\"]") "}");
    cr_assert_eq(open_here(), OK, "%s", fail_message());
    cr_expect_eq(tokenizer_vocab_size(t), 10);
    cr_expect_eq(tokenizer_holes(t), 3);
    cr_expect_eq(tokenizer_token_kind(t, 3), TOKEN_HOLE);
    cr_expect_null(tokenizer_token_text(t, 3));
    cr_expect_null(tokenizer_token_bytes(t, 8, &n));
    cr_expect_null(tokenizer_token_text(t, 10));
    cr_expect_null(tokenizer_token_text(t, -1));
    cr_expect_eq(tokenizer_token_kind(t, 5), TOKEN_SPECIAL);
    cr_expect_eq(tokenizer_token_kind(t, 6), TOKEN_ADDED);
    cr_expect_eq(tokenizer_token_kind(t, 4), TOKEN_NORMAL, "<0x0A> is a byte only with byte_fallback");
    cr_expect_eq(tokenizer_id_of(t, "bab"), 9);
    cr_expect_eq(tokenizer_id_of(t, "<t>"), 6);
    cr_expect_eq(tokenizer_id_of(t, "<tt>"), -1);
    cr_expect_eq(tokenizer_id_of(t, ""), -1);
    cr_expect_eq(tokenizer_n_merges(t), 2, "a pair listed twice has its last place");
    cr_assert(tokenizer_merge(t, 0, &left, &right));
    cr_expect_str_eq(left, "a");
    cr_assert(tokenizer_merge(t, 1, &left, &right));
    cr_expect_str_eq(right, "ab");
    cr_expect_not(tokenizer_merge(t, 2, &left, &right));
    cr_expect_str_eq(ids_of("babab<s>", 8), " 9 2 5");
}

Test(tokenizer, token_bytes)
{
    size_t n;
    put("tokenizer.json", "{\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":true},"
        "\"decoder\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":true},"
        "\"added_tokens\":[" ADDED("3", "\xc4\xa0<s>", "true") "]," MODEL("{\"\xc4\xa0\":0,\"a\":1,\"\xc3\xa9\":2}", "[]") "}");
    cr_assert_eq(open_here(), OK, "%s", fail_message());
    cr_expect(!memcmp(tokenizer_token_bytes(t, 0, &n), " ", 2) && n == 1);
    cr_expect(!memcmp(tokenizer_token_bytes(t, 2, &n), "\xe9", 2) && n == 1);
    cr_expect_str_eq(tokenizer_token_bytes(t, 3, &n), "\xc4\xa0<s>");
    put("tokenizer.json", "{\"decoder\":{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Replace\",\"pattern\":{\"String\":\"\xe2\x96\x81\"},\"content\":\" \"},{\"type\":\"ByteFallback\"},"
        "{\"type\":\"Fuse\"},{\"type\":\"Strip\",\"content\":\" \",\"start\":1,\"stop\":0}]},\"model\":{\"type\":\"BPE\",\"byte_fallback\":true,\"vocab\":"
        "{\"\xe2\x96\x81" "a\":0,\"<0x0A>\":1,\"<0xE9>\":2,\"b\":3},\"merges\":[]}}");
    cr_assert_eq(open_here(), OK, "%s", fail_message());
    cr_expect_str_eq(tokenizer_token_bytes(t, 0, &n), " a");
    cr_expect_str_eq(tokenizer_token_bytes(t, 1, &n), "\n");
    cr_expect(!memcmp(tokenizer_token_bytes(t, 2, &n), "\xe9", 2) && n == 1);
    cr_expect_eq(tokenizer_token_kind(t, 2), TOKEN_BYTE);
    const char *text;
    cr_assert_eq(tokenizer_decode(t, w, (int32_t[]){0, 3, 0, 1, 2}, 5, false, &text, &n), OK);
    cr_expect(n == 6 && !memcmp(text, "ab a\n\xe9", 7), "the first space is stripped, raw bytes stay raw");
    cr_assert_eq(tokenizer_decode(t, w, NULL, 0, false, &text, &n), OK);
    cr_expect(n == 0 && !*text);
    cr_assert_eq(tokenizer_decode(t, w, (int32_t[]){0, 7}, 2, false, &text, &n), ERR_INPUT);
    cr_expect(strstr(fail_message(), "id 7 at position 1"), "%s", fail_message());
}

Test(tokenizer, special_tokens_in_and_out)
{
    const char *text;
    size_t n;
    put("tokenizer.json", "{\"decoder\":{\"type\":\"Fuse\"},\"added_tokens\":[" ADDED("3", "<s>", "true") "," ADDED("4", "<t>", "false") "]," SMALL "}");
    cr_assert_eq(open_here(), OK, "%s", fail_message());
    cr_expect_str_eq(ids_of("<s>ab<t>a", 9), " 3 2 4 0");
    const int32_t ids[] = {3, 2, 4, 0};
    cr_assert_eq(tokenizer_decode(t, w, ids, 4, true, &text, &n), OK);
    cr_expect_str_eq(text, "ab<t>a");
    cr_assert_eq(tokenizer_decode(t, w, ids, 4, false, &text, &n), OK);
    cr_expect_str_eq(text, "<s>ab<t>a");
}

Test(tokenizer, broken_utf8_is_named_by_its_byte)
{
    static const struct { const char *text; size_t n; int at; } bad[] = {
        {"ab\xff", 3, 2}, {"\xc3", 1, 0}, {"a\xc0\xaf", 3, 1}, {"\xe2\x82", 2, 0}, {"abcdefghijk\xed\xa0\x80", 14, 11}, {"\xf4\x90\x80\x80", 4, 0},
        {"\xe0\x80\x80", 3, 0}, {"\xf0\x80\x80\x80", 4, 0}, {"aaaaaaaa\x80", 9, 8}, {"\xf8\x88\x80\x80\x80", 5, 0}};
    const int32_t *ids;
    size_t n;
    put("tokenizer.json", "{" SMALL "}");
    cr_assert_eq(open_here(), OK);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char want[32];
        snprintf(want, sizeof want, "at byte %d;", bad[i].at);
        cr_expect_eq(tokenizer_encode(t, w, bad[i].text, bad[i].n, &ids, &n), ERR_INPUT, "case %zu", i);
        cr_expect(strstr(fail_message(), want), "case %zu: %s", i, fail_message());
    }
    cr_expect_str_eq(ids_of("a\0b\xf4\x8f\xbf\xbf", 7), " 2", "characters without a token vanish, as in the reference");
}

Test(tokenizer, config_beside_it)
{
    put("tokenizer.json", "{\"added_tokens\":[" ADDED("3", "<s>", "true") "," ADDED("4", "</s>", "true") "],\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":"
        "[{\"SpecialToken\":{\"id\":\"<s>\",\"type_id\":0}},{\"Sequence\":{\"id\":\"A\",\"type_id\":0}}],\"pair\":[],\"special_tokens\":{\"<s>\":{\"id\":\"<s>\",\"ids\":[3],"
        "\"tokens\":[\"<s>\"]}}}," SMALL "}");
    cr_assert_eq(open_here(), OK, "%s", fail_message());
    cr_expect_eq(tokenizer_bos(t), 3, "the template names it");
    cr_expect(tokenizer_add_bos(t));
    cr_expect_eq(tokenizer_eos(t), -1);
    cr_expect_null(tokenizer_chat_template(t));
    cr_expect_str_eq(ids_of("ab", 2), " 2", "encode never adds it");
    put("tokenizer_config.json", "{\"bos_token\":{\"content\":\"<s>\",\"lstrip\":false},\"eos_token\":\"</s>\",\"pad_token\":null,\"add_bos_token\":false,\"chat_template\":"
        "[{\"name\":\"tool\",\"template\":\"T\"},{\"name\":\"default\",\"template\":\"D\"}]}");
    cr_assert_eq(open_here(), OK, "%s", fail_message());
    cr_expect_eq(tokenizer_bos(t), 3);
    cr_expect_eq(tokenizer_eos(t), 4);
    cr_expect_eq(tokenizer_pad(t), -1);
    cr_expect_not(tokenizer_add_bos(t));
    cr_expect_str_eq(tokenizer_chat_template(t), "D");
    put("tokenizer_config.json", "{\"bos_token\":null}");
    put("chat_template.jinja", "J");
    char *file = path_join(dir, "tokenizer.json");
    tokenizer_work_free(w);
    tokenizer_close(t);
    w = NULL;
    cr_assert_eq(tokenizer_open(&t, file), OK, "%s", fail_message());
    cr_expect_eq(tokenizer_bos(t), -1);
    cr_expect_not(tokenizer_add_bos(t));
    cr_expect_str_eq(tokenizer_chat_template(t), "J");
    put("tokenizer_config.json", "{\"eos_token\":7}");
    cr_expect_eq(open_here(), ERR_INPUT);
    free(file);
}

static void hash_here(char hex[SHA256_HEX])
{
    cr_assert_eq(open_here(), OK, "%s", fail_message());
    tokenizer_hash(t, hex);
}

Test(tokenizer, identity)
{
    char a[SHA256_HEX], b[SHA256_HEX];
    put("tokenizer.json", "{\"added_tokens\":[" ADDED("3", "\\n\\u0001\\\"\xc3\xa9", "true") "]," SMALL "}");
    hash_here(a);
    /* sha256 of Python's json.dumps({"added_tokens": [...], "merges": [["a", "b"]], "model": {...}, ...}, sort_keys=True, ...) */
    cr_expect_str_eq(a, "2dabfc0c17fad4fd132c5245ced53f345c3ad4524070bcc99338c44c8da8aeac");
    put("tokenizer.json", "{\"version\":\"1.0\",\"normalizer\":null, \"model\":{\"merges\":[[\"a\",\"b\"]],\"ignore_merges\":false,\"vocab\":{\"ab\":2,\"b\":1,\"a\":0}},"
        "\"added_tokens\":[" ADDED("3", "\\n\\u0001\\\"\xc3\xa9", "true") "]}");
    hash_here(b);
    cr_expect_str_eq(a, b, "the order of keys, the form of merges and defaults do not matter");
    static const char *const other[] = {
        "{" SMALL "}",
        "{\"added_tokens\":[" ADDED("3", "\\n\\u0001\\\"\xc3\xa9", "false") "]," SMALL "}",
        "{\"normalizer\":{\"type\":\"NFC\"},\"added_tokens\":[" ADDED("3", "\\n\\u0001\\\"\xc3\xa9", "true") "]," SMALL "}",
        "{\"added_tokens\":[" ADDED("3", "\\n\\u0001\\\"\xc3\xa9", "true") "]," MODEL("{\"a\":1,\"b\":0,\"ab\":2}", "[\"a b\"]") "}",
        "{\"added_tokens\":[" ADDED("3", "\\n\\u0001\\\"\xc3\xa9", "true") "]," MODEL("{\"a\":0,\"b\":1,\"ab\":2}", "[]") "}",
    };
    for (size_t i = 0; i < sizeof other / sizeof *other; i++) {
        put("tokenizer.json", other[i]);
        hash_here(b);
        cr_expect_str_neq(a, b, "%s", other[i]);
    }
}

Test(tokenizer, same_vocabulary)
{
    struct tokenizer *other;
    int32_t at = -1;
    put("tokenizer.json", "{" SMALL "}");
    cr_assert_eq(tokenizer_open(&other, dir), OK);
    put("tokenizer.json", "{\"added_tokens\":[" ADDED("3", "<s>", "true") "]," SMALL "}");
    cr_assert_eq(open_here(), OK);
    cr_expect(tokenizer_same_vocab(t, other, &at), "a longer one is the same as far as the shorter goes");
    put("tokenizer.json", "{" MODEL("{\"a\":0,\"ab\":1,\"b\":2}", "[]") "}");
    cr_assert_eq(open_here(), OK);
    cr_expect_not(tokenizer_same_vocab(t, other, &at));
    cr_expect_eq(at, 1);
    put("tokenizer.json", "{" MODEL("{\"a\":0,\"b\":1,\"ab\":3}", "[]") "}");
    cr_assert_eq(open_here(), OK);
    cr_expect_not(tokenizer_same_vocab(t, other, &at));
    cr_expect_eq(at, 2, "a hole is not a token");
    tokenizer_close(other);
}

#define SPLIT_JSON(regex) "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" regex "\"},\"behavior\":\"Isolated\",\"invert\":false}"
#define BYTES_JSON(regex) "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":" regex "}"
#define PRE(steps) "{\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[" steps "]},"
#define QWEN_REGEX(digits) "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|" digits "| ?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*|\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+"

Test(tokenizer, names_llama_cpp_knows)
{
    static const struct { const char *json, *name; } cases[] = {
        {PRE(SPLIT_JSON(QWEN_REGEX("\\\\p{N}")) "," BYTES_JSON("false")) SMALL "}", "qwen2"},
        {PRE(SPLIT_JSON(QWEN_REGEX("\\\\p{N}{1,3}")) "," BYTES_JSON("false")) "\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"ignore_merges\":true}}", "llama-bpe"},
        {PRE(BYTES_JSON("true")) SMALL "}", "gpt-2"},
        {PRE("{\"type\":\"Digits\",\"individual_digits\":true}," BYTES_JSON("true")) SMALL "}", "starcoder"},
        {PRE("{\"type\":\"Digits\",\"individual_digits\":true}," BYTES_JSON("true")) "\"added_tokens\":[" ADDED("3", "<|im_start|>", "true") "]," SMALL "}", "smollm"},
        {PRE(BYTES_JSON("true")) "\"normalizer\":{\"type\":\"NFKC\"}," SMALL "}", NULL},
        {PRE(SPLIT_JSON("a+") "," BYTES_JSON("false")) SMALL "}", NULL},
        {"{" SMALL "}", NULL},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        put("tokenizer.json", cases[i].json);
        cr_assert_eq(open_here(), OK, "%s", fail_message());
        const char *name = tokenizer_gguf_pre(t);
        cr_expect_str_eq(name ? name : "none", cases[i].name ? cases[i].name : "none");
    }
}

Test(tokenizer, long_texts_take_bounded_time, .timeout = 120)
{
    static const char *const units[] = {"a", " ", "'", "ab", "\xcc\x81\xcc\xa3", "\xe4\xb8\xad", "\t \r", "1", "<s", "\xe2\x96\x81", "e\xcc\x81"};
    static const char *const files[] = {
        PRE(SPLIT_JSON(QWEN_REGEX("\\\\p{N}")) "," BYTES_JSON("false")) "\"normalizer\":{\"type\":\"NFC\"},\"added_tokens\":[" ADDED("4", "<s>", "true") "],"
            MODEL("{\"a\":0,\"b\":1,\"ab\":2,\"aa\":3}", "[\"a b\",\"a a\"]") "}",
        "{\"normalizer\":{\"type\":\"NFKD\"},\"model\":{\"vocab\":{\"a\":0,\"b\":1,\"ab\":2,\"aa\":3,\"aaaa\":4,\"<unk>\":5,\"\xe2\x96\x81\":6},\"merges\":[\"a b\",\"a a\",\"aa aa\"],"
            "\"unk_token\":\"<unk>\"}}",
    };
    char *text = xmalloc(1 << 20);
    const int32_t *ids;
    size_t n;
    for (size_t f = 0; f < sizeof files / sizeof *files; f++) {
        put("tokenizer.json", files[f]);
        cr_assert_eq(open_here(), OK, "%s", fail_message());
        for (size_t i = 0; i < sizeof units / sizeof *units; i++) {
            size_t k = strlen(units[i]), bytes = (1 << 20) / k * k;
            for (size_t at = 0; at < bytes; at += k) memcpy(text + at, units[i], k);
            int rc = tokenizer_encode(t, w, text, bytes, &ids, &n);
            cr_assert_eq(rc, OK, "%s: %s", units[i], fail_message());
            if (f == 0 && i == 3) cr_expect_eq(n, bytes / 2);
            if (f == 1 && i == 0) cr_expect_eq(n, bytes / 4);
        }
    }
    free(text);
    put("tokenizer.json", PRE(SPLIT_JSON("(a|b|ab)*c|x") "," BYTES_JSON("false")) SMALL "}");
    cr_assert_eq(open_here(), OK, "%s", fail_message());
    static const char bomb[] = "abababababababababababababababababababababababababababababababababababababababababababababab";
    cr_expect_eq(tokenizer_encode(t, w, bomb, sizeof bomb - 1, &ids, &n), ERR_INPUT);
    cr_expect(strstr(fail_message(), "(a|b|ab)*c|x") && strstr(fail_message(), "gives up"), "%s", fail_message());
}

/* Runs the command with these files as standard input and output; returns its status and what it wrote. */
static int run_command(const char *input, size_t n, char **output, size_t *bytes, ...)
{
    char *argv[16] = {"tokenize", "--tokenizer", dir}, *in = path_join(dir, "in"), *out = path_join(dir, "out");
    int argc = 3, saved_in = dup(STDIN_FILENO), saved_out = dup(STDOUT_FILENO);
    va_list args;
    va_start(args, bytes);
    for (char *a; argc < 15 && (a = va_arg(args, char *));) argv[argc++] = a;
    va_end(args);
    cr_assert_eq(file_replace(in, input, n), OK);
    int from = open(in, O_RDONLY), to = open(out, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    cr_assert(from >= 0 && to >= 0);
    dup2(from, STDIN_FILENO);
    dup2(to, STDOUT_FILENO);
    int rc = command_tokenize(argc, argv);
    fflush(stdout);
    dup2(saved_in, STDIN_FILENO);
    dup2(saved_out, STDOUT_FILENO);
    close(from);
    close(to);
    close(saved_in);
    close(saved_out);
    cr_assert_eq(file_read(out, 1 << 20, output, bytes), OK);
    free(in);
    free(out);
    return rc;
}

Test(tokenizer, command)
{
    char *out;
    size_t n;
    put("tokenizer.json", "{\"decoder\":{\"type\":\"Fuse\"},\"added_tokens\":[" ADDED("3", "<s>", "true") "]," SMALL "}");
    put("tokenizer_config.json", "{\"bos_token\":\"<s>\",\"add_bos_token\":true}");
    static const struct { const char *in, *flags[3], *out; int rc; const char *message; } cases[] = {
        {"ab\n\naba\r\n<s>b", {NULL}, "2\n\n2 0\n3 1\n", OK, NULL},
        {"ab\n\n", {"--special"}, "3 2\n3\n", OK, NULL},
        {"", {NULL}, "", OK, NULL},
        {"{\"text\":\"ab\\u0000a\",\"x\":1}\n{\"text\":\"\"}\n", {"--jsonl"}, "{\"ids\":[2,0]}\n{\"ids\":[]}\n", OK, NULL},
        {"{\"body\":\"b\"}", {"--jsonl", "--text-field", "body"}, "{\"ids\":[1]}\n", OK, NULL},
        {"2 0\n\n 3 1", {"--decode"}, "aba\n\nb\n", OK, NULL},
        {"{\"ids\":[3,2]}\n", {"--decode", "--jsonl", "--special"}, "{\"text\":\"<s>ab\"}\n", OK, NULL},
        {"a\na\xff\n", {NULL}, NULL, ERR_INPUT, "line 2: the text is not valid UTF-8 at byte 1"},
        {"{\"text\":\"a\"}\n{\"text\":\"\\ud800\"}\n", {"--jsonl"}, NULL, ERR_INPUT, "line 2"},
        {"{\"text\":1}\n", {"--jsonl"}, NULL, ERR_INPUT, "line 1: key \"text\" is not a string"},
        {"\n", {"--jsonl"}, NULL, ERR_INPUT, "line 1"},
        {"1 x\n", {"--decode"}, NULL, ERR_INPUT, "line 1: column 3 is no token id"},
        {"99\n", {"--decode"}, NULL, ERR_INPUT, "id 99"},
        {"", {"--nonsense"}, NULL, ERR_USAGE, "--nonsense"},
        {"", {"--text-field"}, NULL, ERR_USAGE, "needs a value"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int rc = run_command(cases[i].in, strlen(cases[i].in), &out, &n, cases[i].flags[0], cases[i].flags[1], cases[i].flags[2], NULL);
        cr_expect_eq(rc, cases[i].rc, "case %zu: %d %s", i, rc, fail_message());
        if (cases[i].out) cr_expect_str_eq(out, cases[i].out, "case %zu", i);
        if (cases[i].message) cr_expect(strstr(fail_message(), cases[i].message), "case %zu: %s", i, fail_message());
        free(out);
    }
    cr_expect_eq(run_command("", 0, &out, &n, "--help", NULL), OK);
    cr_expect(strstr(out, "usage: distill tokenize") && strstr(out, "example:"), "%s", out);
    free(out);
}
