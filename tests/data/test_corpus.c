/* The corpus: which files, which documents, which rows. Expected hashes come from Python's hashlib. The tokenizer of these
 * tests is 256 bytes, "<eos>" = 256 and "<bos>" = 257, so that a text's ids are its bytes. */
#include <criterion/criterion.h>
#include <omp.h>
#include <stdarg.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/rng.h"
#include "data/corpus.h"

static char dir[64];
static struct corpus_rows *train, *heldout;

static void setup(void)
{
    strcpy(dir, "/tmp/test_corpus_XXXXXX");
    cr_assert(mkdtemp(dir));
}

static void teardown(void)
{
    corpus_rows_free(train);
    corpus_rows_free(heldout);
    train = heldout = NULL;
    dir_remove_tree(dir);
}

TestSuite(corpus, .init = setup, .fini = teardown);

static const char *in_dir(const char *name)
{
    static char path[8][256];
    static int at;
    char *p = path[at = (at + 1) % 8];
    snprintf(p, sizeof path[0], "%s/%s", dir, name);
    return p;
}

static const char *put_bytes(const char *name, const void *data, size_t bytes)
{
    const char *path = in_dir(name);
    char *parent = xstrdup(path);
    *strrchr(parent, '/') = 0;
    cr_assert_eq(dir_make(parent), OK);
    free(parent);
    cr_assert_eq(file_replace(path, data, bytes), OK, "%s", fail_message());
    return path;
}

static const char *put(const char *name, const char *text) { return put_bytes(name, text, strlen(text)); }

static struct corpus_options options_of(const char **files, int n, int64_t row_length)
{
    return (struct corpus_options){.files = files, .n_files = n, .text_field = "text", .ids_field = "ids", .mask_field = "mask", .row_length = row_length};
}

static int read_with(const struct corpus_options *o, const struct tokenizer *t, int32_t vocab_size)
{
    corpus_rows_free(train);
    corpus_rows_free(heldout);
    return corpus_read(&train, &heldout, o, t, vocab_size);
}

static int read_one(const char *file, int64_t row_length)
{
    struct corpus_options o = options_of(&file, 1, row_length);
    return read_with(&o, NULL, 0);
}

static void expect_row(int64_t row, const char *tokens, const char *mask, const char *document)
{
    char t[512] = "", m[512] = "", d[512] = "";
    for (int64_t i = 0; i < train->length; i++) {
        int64_t at = row * train->length + i;
        sprintf(t + strlen(t), "%s%u", i ? " " : "", train->tokens[at]);
        sprintf(m + strlen(m), "%s%u", i ? " " : "", train->loss_mask[at]);
        sprintf(d + strlen(d), "%s%u", i ? " " : "", train->document[at]);
    }
    cr_expect_str_eq(t, tokens, "row %lld: %s", (long long)row, t);
    cr_expect_str_eq(m, mask, "row %lld: %s", (long long)row, m);
    cr_expect_str_eq(d, document, "row %lld: %s", (long long)row, d);
}

static void refused(int rc, int status, const char *pieces)
{
    cr_expect_eq(rc, status, "status %d, not %d (%s)", rc, status, pieces);
    cr_expect_null(train);
    cr_expect_null(heldout);
    char *list = strdup(pieces), *save = NULL;
    for (char *p = strtok_r(list, "|", &save); p; p = strtok_r(NULL, "|", &save))
        cr_expect(strstr(fail_message(), p), "'%s' is not in: %s", p, fail_message());
    free(list);
}

/* ---- packing ---- */

Test(corpus, rows_are_filled_end_to_end)
{
    cr_assert_eq(read_one(put("a.jsonl", "{\"ids\": [1,2,3,4,5]}\n{\"ids\": [6,7,8,9,10]}\n\n{\"ids\": [11,12,13]}\n{\"ids\": []}"), 8), OK, "%s", fail_message());
    cr_assert_eq(train->rows, 2);
    expect_row(0, "1 2 3 4 5 6 7 8", "1 1 1 1 0 1 1 0", "0 0 0 0 0 1 1 1");
    expect_row(1, "9 10 11 12 13 0 0 0", "1 0 1 1 0 0 0 0", "0 0 1 1 1 2 2 2");
    cr_expect_eq(train->documents, 3);
    cr_expect_eq(train->tokens_total, 13);
    cr_expect_eq(train->targets, 9);
    cr_expect_eq(train->empty_documents, 1);
    cr_expect_eq(train->bytes, 0);
    cr_expect_eq(train->max_id, 13);
    cr_expect_null(heldout);
}

Test(corpus, pieces_of_length_one_and_long_documents)
{
    cr_assert_eq(read_one(put("a.jsonl", "{\"ids\": [1,2]}\n{\"ids\": [3,4,5,6,7,8,9]}\n{\"ids\": [10]}\n{\"ids\": [11]}"), 3), OK, "%s", fail_message());
    cr_assert_eq(train->rows, 4);
    expect_row(0, "1 2 3", "1 0 0", "0 0 1");
    expect_row(1, "4 5 6", "1 1 0", "0 0 0");
    expect_row(2, "7 8 9", "1 1 0", "0 0 0");
    expect_row(3, "10 11 0", "0 0 0", "0 1 2");
    cr_assert_eq(read_one(in_dir("a.jsonl"), 11), OK);             /* exactly full: no padding */
    cr_expect_eq(train->rows, 1);
    cr_expect_eq(train->tokens_total, 11);
}

Test(corpus, masks_mark_targets)
{
    cr_assert_eq(read_one(put("a.jsonl", "{\"ids\": [1,2,3,4], \"mask\": [1,0,1,true]}\n{\"mask\": [1,0], \"ids\": [5,6]}\n{\"ids\": [7,8]}\n"), 8), OK, "%s", fail_message());
    expect_row(0, "1 2 3 4 5 6 7 8", "0 1 1 0 0 0 1 0", "0 0 0 0 1 1 2 2");
    cr_expect_eq(train->targets, 3);
}

Test(corpus, hash_is_over_a_stated_layout)
{
    char hex[SHA256_HEX];
    cr_assert_eq(read_one(put("a.jsonl", "{\"ids\": [5,6,7]}\n"), 4), OK);
    corpus_rows_hash(train, hex);
    cr_expect_str_eq(hex, "8151b982ef55fd29479caa8f26aec119022bd653fff697d4e4a29ca9d1483ea6");
}

Test(corpus, long_documents_are_cut_and_rows_limited)
{
    const char *file = put("a.jsonl", "{\"ids\": [1,2,3,4,5]}\n{\"ids\": [6,7]}\n{\"ids\": [8,9,10]}\n");
    struct corpus_options o = options_of(&file, 1, 4);
    o.max_document_tokens = 3;
    cr_assert_eq(read_with(&o, NULL, 0), OK);
    expect_row(0, "1 2 3 6", "1 1 0 0", "0 0 0 1");
    expect_row(1, "7 8 9 10", "0 1 1 0", "0 1 1 1");
    cr_expect_eq(train->cut_documents, 1);
    o.max_rows = 1;
    cr_assert_eq(read_with(&o, NULL, 0), OK);
    cr_expect_eq(train->rows, 1);
    cr_expect_eq(train->documents, 2);
    cr_expect_eq(train->tokens_total, 4);
    cr_expect_eq(train->targets, 2);
}

/* Random documents: every token is where it belongs, every target is learnt exactly once and nowhere else. */
Test(corpus, random_documents_keep_their_tokens)
{
    for (uint64_t seed = 0; seed < 30; seed++) {
        char *text = NULL;
        size_t bytes;
        FILE *f = open_memstream(&text, &bytes);
        int n = 1 + (int)(philox4x32(seed, 1, 0).v[0] % 40), total = 0;
        int64_t length = 2 + philox4x32(seed, 1, 1).v[0] % 17;
        int tokens[40 * 30], learnt[40 * 30], document[40 * 30];
        for (int d = 0; d < n; d++) {
            int m = 1 + (int)(philox4x32(seed, 2, (uint64_t)d).v[0] % 29);
            bool masked = philox4x32(seed, 2, (uint64_t)d).v[1] & 1;
            fprintf(f, "{\"ids\": [");
            for (int i = 0; i < m; i++) {
                struct philox r = philox4x32(seed, 3 + (uint64_t)d, (uint64_t)i);
                tokens[total + i] = (int)(r.v[0] % 1000);
                learnt[total + i] = !masked || (r.v[1] & 1);
                document[total + i] = d;
                fprintf(f, "%s%d", i ? ", " : "", tokens[total + i]);
            }
            if (masked) for (int i = 0; i < m; i++) fprintf(f, "%s%d", i ? ", " : "], \"mask\": [", learnt[total + i]);
            fprintf(f, "]}\r\n");
            total += m;
        }
        fclose(f);
        int rc = read_one(put_bytes("r.jsonl", text, bytes), length);
        free(text);
        int64_t targets = 0;
        for (int i = 0; i + 1 < total; i++) targets += document[i] == document[i + 1] && (i + 1) % length && learnt[i + 1];
        if (!targets) { cr_expect_eq(rc, ERR_INPUT); continue; }
        cr_assert_eq(rc, OK, "%s", fail_message());
        cr_assert_eq(train->rows, (total + length - 1) / length);
        for (int64_t i = 0; i < train->rows * length; i++) {
            bool first = i % length == 0;
            if (i >= total) {
                cr_assert(train->tokens[i] == 0 && !train->loss_mask[i]);
                cr_assert_eq(train->document[i], train->document[total - 1] + 1);
                continue;
            }
            cr_assert_eq(train->tokens[i], tokens[i]);
            cr_assert_eq(train->document[i], first ? 0 : train->document[i - 1] + (document[i] != document[i - 1]));
            cr_assert_eq(train->loss_mask[i], i + 1 < total && (i + 1) % length && document[i] == document[i + 1] && learnt[i + 1]);
        }
        cr_assert_eq(train->targets, targets);
    }
}

/* ---- splits and order ---- */

static char *numbered_ids(int n, int from)
{
    char *text = NULL;
    size_t bytes;
    FILE *f = open_memstream(&text, &bytes);
    for (int i = from; i < from + n; i++) fprintf(f, "{\"ids\": [%d, %d, %d]}\n", 3 * i, 3 * i + 1, 3 * i + 2);
    fclose(f);
    return text;
}

/* Sorted first ids of a split's documents, when every document fits a row. */
static int first_ids(const struct corpus_rows *r, bool seen[])
{
    int n = 0;
    memset(seen, 0, 3000);
    for (int64_t i = 0; i < r->tokens_total; i++) if (r->tokens[i] % 3 == 0) { seen[r->tokens[i]] = true; n++; }
    return n;
}

Test(corpus, heldout_is_chosen_by_content)
{
    static bool before[3000], after[3000], learnt[3000];
    char *many = numbered_ids(500, 0), *more = numbered_ids(400, 500);
    const char *files[] = {put("b.jsonl", many), put("a.jsonl", more)};
    struct corpus_options o = options_of(files, 1, 3);
    o.heldout_fraction = 0.1;
    o.shuffle = true;
    cr_assert_eq(read_with(&o, NULL, 0), OK, "%s", fail_message());
    int n = first_ids(heldout, before), m = first_ids(train, learnt);
    cr_expect_eq(n + m, 500);
    cr_expect(n > 25 && n < 80, "%d of 500 held out", n);
    char first[SHA256_HEX], second[SHA256_HEX], training[SHA256_HEX];
    corpus_rows_hash(heldout, first);
    corpus_rows_hash(train, training);
    for (int i = 0; i < 3000; i++) cr_assert(!(before[i] && learnt[i]));

    o.shuffle_seed = 7;                                        /* another seed: the same held-out rows, another order of training */
    cr_assert_eq(read_with(&o, NULL, 0), OK);
    corpus_rows_hash(heldout, second);
    cr_expect_str_eq(first, second);
    corpus_rows_hash(train, second);
    cr_expect_str_neq(training, second);
    first_ids(train, after);
    cr_expect(!memcmp(learnt, after, sizeof after));

    o.n_files = 2;                                             /* more files: nothing changes sides */
    cr_assert_eq(read_with(&o, NULL, 0), OK);
    first_ids(heldout, after);
    for (int i = 0; i < 1500; i++) cr_assert_eq(before[i], after[i]);
    free(many);
    free(more);
}

Test(corpus, heldout_hash_is_sha256_of_the_ids)
{
    /* [1, 2, 3] as little-endian 32-bit words hashes to 0.27427 of 2^64 */
    const char *file = put("a.jsonl", "{\"ids\": [1,2,3]}\n{\"ids\": [0, 1, 2]}\n{\"ids\": [3, 4, 5]}\n{\"ids\": [6, 7, 8]}\n{\"ids\": [9, 10, 11]}\n{\"ids\": [12, 13, 14]}\n");
    struct corpus_options o = options_of(&file, 1, 3);
    for (int in = 0; in < 2; in++) {
        o.heldout_fraction = in ? 0.2743 : 0.2742;
        if (read_with(&o, NULL, 0) != OK) { cr_expect(!in && strstr(fail_message(), "hold out"), "%s", fail_message()); continue; }
        bool found = false;
        for (int64_t r = 0; r < heldout->rows; r++) found |= heldout->tokens[3 * r] == 1 && heldout->tokens[3 * r + 2] == 3;
        cr_expect_eq(found, in);
    }
}

Test(corpus, a_split_without_documents_is_refused)
{
    const char *file = put("a.jsonl", "{\"ids\": [1,2,3]}\n");
    struct corpus_options o = options_of(&file, 1, 4);
    o.heldout_fraction = 0.1;
    refused(read_with(&o, NULL, 0), ERR_USAGE, "the corpus is one document|corpus.document to paragraph or line|corpus.heldout_fraction to 0");
    put("a.jsonl", "{\"ids\": [1,2,3]}\n{\"ids\": [1,2,3]}\n");
    refused(read_with(&o, NULL, 0), ERR_USAGE, "corpus.heldout_fraction 0.1 leaves no document of 2 to hold out");
    o.heldout_fraction = 0.4;
    refused(read_with(&o, NULL, 0), ERR_USAGE, "leaves no document of 2 to learn|lower");
    o.heldout_fraction = 0.6;
    refused(read_with(&o, NULL, 0), ERR_USAGE, "at most 0.5");
    o.heldout_fraction = 0;
    put("a.jsonl", "\n \n");
    o.format = CORPUS_IDS;
    refused(read_with(&o, NULL, 0), ERR_INPUT, "hold no document");
    put("a.jsonl", "{\"ids\": [1,2,3], \"mask\": [1,0,0]}\n");
    refused(read_with(&o, NULL, 0), ERR_INPUT, "training documents leave no token to learn");
    put("a.jsonl", "{\"ids\": [1]}\n");
    refused(read_with(&o, NULL, 0), ERR_INPUT, "no token to learn");
    o.row_length = 1;
    refused(read_with(&o, NULL, 0), ERR_USAGE, "row_length");
}

/* ---- files ---- */

static void expect_ids(const char **files, int n, const char *ids)
{
    struct corpus_options o = options_of(files, n, 2);
    char got[512] = "";
    cr_assert_eq(read_with(&o, NULL, 0), OK, "%s", fail_message());
    for (int64_t i = 0; i < train->tokens_total; i += 2) sprintf(got + strlen(got), "%s%u", i ? " " : "", train->tokens[i]);
    cr_expect_str_eq(got, ids);
}

Test(corpus, files_patterns_and_directories)
{
    char text[64];
    static const char *const names[] = {"b.jsonl", "a.jsonl", "d/z.jsonl", "d/sub/y.jsonl", "d/.hidden.jsonl", "d/x.ids", "e/[1].jsonl"};
    for (int i = 0; i < 7; i++) { snprintf(text, sizeof text, "{\"ids\": [%d, 0]}\n", i + 1); put(names[i], text); }
    cr_assert_eq(symlink(in_dir("d"), in_dir("d/sub/loop")), 0);
    cr_assert_eq(symlink(in_dir("a.jsonl"), in_dir("d/sub/again.jsonl")), 0);
    expect_ids((const char *[]){in_dir("b.jsonl"), in_dir("a.jsonl")}, 2, "1 2");                /* as named */
    expect_ids((const char *[]){in_dir("*.jsonl")}, 1, "2 1");                                    /* sorted */
    expect_ids((const char *[]){in_dir("b.jsonl"), in_dir("*.jsonl"), in_dir("b.jsonl")}, 3, "1 2");   /* once, where first named */
    expect_ids((const char *[]){in_dir("d")}, 1, "2 4 3");                                        /* a link in it is the file it leads to */
    expect_ids((const char *[]){in_dir("a.jsonl"), in_dir("?")}, 2, "2 4 3 7");                   /* directories among the matches */
    expect_ids((const char *[]){in_dir("e/[1].jsonl")}, 1, "7");                                  /* a name that looks like a pattern */

    const char *file = in_dir("nothing*");
    struct corpus_options o = options_of(&file, 1, 4);
    refused(read_with(&o, NULL, 0), ERR_USAGE, "corpus.files: |nothing* matches no file");
    file = in_dir("missing.txt");
    refused(read_with(&o, NULL, 0), ERR_USAGE, "missing.txt does not exist");
    dir_make(in_dir("empty"));
    file = in_dir("empty");
    refused(read_with(&o, NULL, 0), ERR_USAGE, "holds no *.txt, *.md or *.jsonl");
    o.n_files = 0;
    refused(read_with(&o, NULL, 0), ERR_USAGE, "corpus.files is empty");
    o.n_files = 1;
    cr_assert_eq(mkfifo(in_dir("pipe"), 0600), 0);
    file = in_dir("pipe");
    refused(read_with(&o, NULL, 0), ERR_USAGE, "neither a file nor a directory");
    file = put("text.txt", "hello");
    refused(read_with(&o, NULL, 0), ERR_USAGE, "text.txt: holds text, and there is no tokenizer|tokenizer.path");
}

static void ids_refused(const char *line, const char *pieces)
{
    char *text = xasprintf("{\"ids\": [1, 2]}\n%s\n", line);
    const char *file = put("bad.jsonl", text);
    struct corpus_options o = options_of(&file, 1, 4);
    o.format = CORPUS_IDS;
    refused(read_with(&o, NULL, 100), ERR_INPUT, pieces);
    free(text);
}

Test(corpus, broken_records_are_named)
{
    ids_refused("{\"ids\": [1, 2}", "bad.jsonl:2: not valid JSON");
    ids_refused("{\"ids\": [1, 2]} x", "bad.jsonl:2: not valid JSON");
    ids_refused("{\"ids\": [1], \"ids\": [2]}", "bad.jsonl:2: not valid JSON");
    ids_refused("[1, 2]", "bad.jsonl:2: is not a JSON object");
    ids_refused("{}", "bad.jsonl:2: has no field \"ids\"|corpus.ids_field");
    ids_refused("{\"text\": \"a\"}", "bad.jsonl:2: has no field \"ids\"");
    ids_refused("{\"ids\": \"a\"}", "bad.jsonl:2: field \"ids\" is not a list");
    ids_refused("{\"ids\": null}", "is not a list");
    ids_refused("{\"ids\": [1, -1]}", "bad.jsonl:2: \"ids\"[1] is -1; an id is at least 0");
    ids_refused("{\"ids\": [1, 4294967297]}", "4294967297");
    ids_refused("{\"ids\": [1, 99999999999999999999]}", "not valid JSON");
    ids_refused("{\"ids\": [1, 100]}", "bad.jsonl:2: \"ids\"[1] is 100, but the vocabulary has 100 ids");
    ids_refused("{\"ids\": [1, 2.0]}", "\"ids\"[1] is not a whole number");
    ids_refused("{\"ids\": [1, true]}", "is not a whole number");
    ids_refused("{\"ids\": [1, 2], \"mask\": [1]}", "\"mask\" has 1 entries, \"ids\" has 2");
    ids_refused("{\"ids\": [1, 2], \"mask\": [1, 2]}", "\"mask\"[1] is neither 0 nor 1");
    ids_refused("{\"ids\": [1, 2], \"mask\": 1}", "field \"mask\" is not a list");
    ids_refused("{\"ids\": [1, 2], \"a\": \"\xff\"}", "bad.jsonl:2: not valid UTF-8 at byte 38 of the file");
}

/* ---- text ---- */

static const char *const special[] = {"<eos>", "<bos>"};

/* A tokenizer.json whose ids are bytes: GPT-2's printable spelling of bytes as vocabulary, no merges. */
static struct tokenizer *byte_tokenizer(void)
{
    json_t *vocab = json_object(), *added = json_array();
    int next = 256;
    for (int b = 0; b < 256; b++) {
        bool printable = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
        int code = printable ? b : next++;
        char text[3] = {(char)code, 0, 0};
        if (code >= 0x80) { text[0] = (char)(0xc0 | code >> 6); text[1] = (char)(0x80 | (code & 0x3f)); }
        json_object_set_new(vocab, text, json_integer(b));
    }
    for (int i = 0; i < 2; i++)
        json_array_append_new(added, json_pack("{s:i, s:s, s:b, s:b, s:b, s:b, s:b}", "id", 256 + i, "content", special[i], "single_word", 0, "lstrip", 0, "rstrip", 0, "normalized", 0, "special", 1));
    json_t *json = json_pack("{s:s, s:n, s:n, s:o, s:n, s:{s:s, s:b, s:b, s:b}, s:n, s:{s:s, s:b, s:b, s:b}, s:{s:s, s:n, s:n, s:n, s:n, s:b, s:b, s:o, s:[]}}",
                             "version", "1.0", "truncation", "padding", "added_tokens", added, "normalizer",
                             "pre_tokenizer", "type", "ByteLevel", "add_prefix_space", 0, "trim_offsets", 0, "use_regex", 1, "post_processor",
                             "decoder", "type", "ByteLevel", "add_prefix_space", 1, "trim_offsets", 1, "use_regex", 1,
                             "model", "type", "BPE", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", 0, "byte_fallback", 0, "vocab", vocab, "merges");
    cr_assert_eq(dir_make(in_dir("tok")), OK);
    cr_assert_eq(json_write_file(in_dir("tok/tokenizer.json"), json), OK);
    json_decref(json);
    put("tok/tokenizer_config.json", "{\"eos_token\": \"<eos>\", \"bos_token\": \"<bos>\"}\n");
    struct tokenizer *t;
    cr_assert_eq(tokenizer_open(&t, in_dir("tok")), OK, "%s", fail_message());
    cr_assert_eq(tokenizer_eos(t), 256);
    cr_assert_eq(tokenizer_bos(t), 257);
    return t;
}

/* The documents of a file, each in |...|, as they were tokenised. */
static void expect_text(const struct tokenizer *t, const char *name, const void *data, size_t bytes, enum corpus_document document, const char *expected)
{
    const char *file = put_bytes(name, data, bytes);
    struct corpus_options o = options_of(&file, 1, 256);
    o.document = document;
    o.append_eos = true;
    char got[1024] = "";
    cr_assert_eq(read_with(&o, t, 258), OK, "%s", fail_message());
    for (int64_t i = 0; i < train->tokens_total; i++) {
        char c[2] = {(char)train->tokens[i], 0};
        strcat(got, train->tokens[i] == 256 ? "|" : c);
    }
    cr_expect_str_eq(got, expected, "%s: %s", name, got);
}
#define EXPECT_TEXT(name, text, document, expected) expect_text(t, name, text, sizeof(text) - 1, document, expected)

Test(corpus, documents_of_text)
{
    struct tokenizer *t = byte_tokenizer();
    EXPECT_TEXT("a.txt", "one\r\ntwo\n", DOCUMENT_FILE, "one\r\ntwo\n|");                      /* a file is taken as it is */
    EXPECT_TEXT("a.txt", "\xef\xbb\xbfone", DOCUMENT_FILE, "one|");
    EXPECT_TEXT("a.txt", "one\r\n\r\n  \ntwo\r\rx\nthree", DOCUMENT_LINE, "one|two\r\rx|three|");
    cr_expect_eq(train->empty_documents, 2);
    EXPECT_TEXT("a.txt", "\xef\xbb\xbfone\n", DOCUMENT_LINE, "one|");
    EXPECT_TEXT("a.md", "\n\none\r\ntwo\r\n\r\nthree\n \t\n\nfour", DOCUMENT_PARAGRAPH, "one\ntwo|three|four|");
    cr_expect_eq(train->empty_documents, 0);
    EXPECT_TEXT("a.md", "a\n\nb\n\n", DOCUMENT_PARAGRAPH, "a|b|");
    EXPECT_TEXT("a.md", "\xef\xbb\xbf\n\na\nb", DOCUMENT_PARAGRAPH, "a\nb|");
    EXPECT_TEXT("a.jsonl", "{\"text\": \"one\\r\\ntwo\"}\r\n\r\n{\"text\": \"\"}\n{\"x\": 1, \"text\": \"\\u00e9\"}", DOCUMENT_FILE, "one\r\ntwo|\xc3\xa9|");
    cr_expect_eq(train->empty_documents, 1);
    EXPECT_TEXT("a.json", "\xef\xbb\xbf{\"text\": \"x\"}", DOCUMENT_FILE, "x|");
    EXPECT_TEXT("a.jsonl", "{\"text\": \"a\\u0000b\"}", DOCUMENT_FILE, "ab|");                    /* the NUL does not show, but: */
    cr_expect_eq(train->tokens_total, 4);
    EXPECT_TEXT("a.c", "int x;", DOCUMENT_FILE, "int x;|");
    tokenizer_close(t);
}

Test(corpus, special_tokens_of_text)
{
    struct tokenizer *t = byte_tokenizer();
    const char *file = put("a.txt", "ab\ncde\n");
    struct corpus_options o = options_of(&file, 1, 12);
    o.document = DOCUMENT_LINE;
    o.append_eos = o.prepend_bos = true;
    cr_assert_eq(read_with(&o, t, 0), OK, "%s", fail_message());
    expect_row(0, "257 97 98 256 257 99 100 101 256 256 256 256", "1 1 1 0 1 1 1 1 0 0 0 0", "0 0 0 0 1 1 1 1 1 2 2 2");
    cr_expect_eq(train->bytes, 5);                             /* special tokens stand for no text */
    cr_expect_eq(train->max_id, 257);
    o.prepend_bos = false;
    cr_assert_eq(read_with(&o, t, 0), OK);
    cr_expect_eq(train->bytes, 3);                             /* a document's first token is no target */
    cr_expect_eq(train->targets, 5);
    o.append_eos = false;
    cr_assert_eq(read_with(&o, t, 0), OK);
    cr_expect_eq(train->targets, 3);
    o.append_eos = true;
    o.max_document_tokens = 3;
    cr_assert_eq(read_with(&o, t, 0), OK);
    expect_row(0, "97 98 256 99 100 101 256 256 256 256 256 256", "1 1 0 1 1 0 0 0 0 0 0 0", "0 0 0 1 1 1 2 2 2 2 2 2");
    cr_expect_eq(train->cut_documents, 1);
    o.max_document_tokens = 0;
    refused(read_with(&o, t, 101), ERR_MISMATCH, "a.txt:1: token 256 of the tokenizer is not in the model's vocabulary of 101");
    tokenizer_close(t);
    put("tok/tokenizer_config.json", "{}");
    cr_assert_eq(tokenizer_open(&t, in_dir("tok")), OK);
    refused(read_with(&o, t, 0), ERR_USAGE, "corpus.append_eos is true, but the tokenizer names no end-of-text token; set it to false");
    o.append_eos = false;
    o.prepend_bos = true;
    refused(read_with(&o, t, 0), ERR_USAGE, "corpus.prepend_bos");
    tokenizer_close(t);
}

static void text_refused(const struct tokenizer *t, const char *name, const void *data, size_t bytes, enum corpus_document document, const char *pieces)
{
    const char *file = put_bytes(name, data, bytes);
    struct corpus_options o = options_of(&file, 1, 64);
    o.document = document;
    refused(read_with(&o, t, 0), ERR_INPUT, pieces);
}
#define TEXT_REFUSED(name, text, document, pieces) text_refused(t, name, text, sizeof(text) - 1, document, pieces)

Test(corpus, broken_text_is_named)
{
    struct tokenizer *t = byte_tokenizer();
    TEXT_REFUSED("a.txt", "abc\xff" "d", DOCUMENT_FILE, "a.txt: not valid UTF-8 at byte 3 of the file|iconv");
    TEXT_REFUSED("a.txt", "\xef\xbb\xbf" "abcdefghijk\xc3", DOCUMENT_FILE, "byte 14 of the file");          /* cut in a character */
    TEXT_REFUSED("a.txt", "ab\r\ncd\r\n\xed\xa0\x80\n", DOCUMENT_LINE, "a.txt:3: not valid UTF-8 at byte 8 of the file");   /* a surrogate */
    TEXT_REFUSED("a.txt", "ab\r\n\r\ncd\r\nx\xc0\xaf\n", DOCUMENT_PARAGRAPH, "a.txt:3: not valid UTF-8 at byte 11 of the file");   /* overlong */
    TEXT_REFUSED("a.txt", "ok\n\xf4\x90\x80\x80\n", DOCUMENT_LINE, "a.txt:2: not valid UTF-8 at byte 3");    /* beyond U+10FFFF */
    TEXT_REFUSED("a.jsonl", "{\"text\": \"a\"}\n{\"text\": \"\xe9\"}\n", DOCUMENT_FILE, "a.jsonl:2: not valid UTF-8 at byte 24 of the file");
    TEXT_REFUSED("a.jsonl", "{\"text\": \"a\"}\n{\"text\": 5}\n", DOCUMENT_FILE, "a.jsonl:2: field \"text\" is not a string");
    TEXT_REFUSED("a.jsonl", "{\"content\": \"a\"}\n", DOCUMENT_FILE, "a.jsonl:1: has no field \"text\" nor \"ids\"");
    TEXT_REFUSED("a.jsonl", "{\n\"text\": \"a\"\n}\n", DOCUMENT_FILE, "a.jsonl:1: not valid JSON, one object a line is expected");
    TEXT_REFUSED("a.jsonl", "{\"text\": \"ab\", \"mask\": [1, 1]}\n", DOCUMENT_FILE, "a.jsonl:1: field \"mask\" marks tokens, but the record holds text");
    TEXT_REFUSED("a.jsonl", "{\"text\": \"\\ud800\"}\n", DOCUMENT_FILE, "not valid JSON");
    TEXT_REFUSED("a.txt", "", DOCUMENT_FILE, "hold no document");
    tokenizer_close(t);
}

Test(corpus, threads_do_not_matter)
{
    struct tokenizer *t = byte_tokenizer();
    char hex[4][SHA256_HEX], *text = NULL;
    size_t bytes;
    FILE *f = open_memstream(&text, &bytes);
    for (int i = 0; i < 70000; i++) fprintf(f, "line %d %.*s\n", i, i % 37, "abcdefghijklmnopqrstuvwxyz0123456789+");    /* more than one batch of units */
    fclose(f);
    const char *files[] = {put_bytes("a.txt", text, bytes), put("b.jsonl", "{\"ids\": [1,2,3]}\n{\"text\": \"x\", \"ids\": [4,5]}\n")};
    free(text);
    struct corpus_options o = options_of(files, 2, 128);
    o.document = DOCUMENT_LINE;
    o.append_eos = o.shuffle = true;
    o.heldout_fraction = 0.02;
    static const int threads[] = {1, 3};
    for (int i = 0; i < 2; i++) {
        omp_set_num_threads(threads[i]);
        cr_assert_eq(read_with(&o, t, 258), OK, "%s", fail_message());
        corpus_rows_hash(train, hex[i]);
        corpus_rows_hash(heldout, hex[2 + i]);
        cr_expect_eq(train->documents + heldout->documents, 70002);
    }
    cr_expect_str_eq(hex[0], hex[1]);
    cr_expect_str_eq(hex[2], hex[3]);
    f = fopen(files[0], "a");                                  /* two faults in one batch: the first one is told, on any number of threads */
    fputs("good\nbad \xff\nbad \xfe\n", f);
    fclose(f);
    for (int i = 0; i < 20; i++) {
        omp_set_num_threads(1 + i % 4);
        refused(read_with(&o, t, 258), ERR_INPUT, "a.txt:70002: not valid UTF-8");
    }
    tokenizer_close(t);
}

struct texts { char all[256]; int stop_after; };

static int collect(void *context, const char *text, size_t bytes)
{
    struct texts *c = context;
    snprintf(c->all + strlen(c->all), sizeof c->all - strlen(c->all), "%.*s|", (int)bytes, text);
    return --c->stop_after ? OK : fail(ERR_STOPPED, "enough");
}

Test(corpus, each_text_in_reading_order)
{
    const char *files[] = {put("b.txt", "one\n\ntwo\r\nthree"), put("a.jsonl", "{\"text\": \"four\"}\n{\"text\": \"\"}\n")};
    struct corpus_options o = options_of(files, 2, 64);
    o.document = DOCUMENT_PARAGRAPH;
    struct texts c = {.stop_after = 100};
    cr_assert_eq(corpus_each_text(&o, collect, &c), OK, "%s", fail_message());
    cr_expect_str_eq(c.all, "one|two\nthree|four|");
    c = (struct texts){.stop_after = 2};
    cr_expect_eq(corpus_each_text(&o, collect, &c), ERR_STOPPED);
    cr_expect_str_eq(c.all, "one|two\nthree|");
    put("a.jsonl", "{\"ids\": [1]}\n");
    cr_expect_eq(corpus_each_text(&o, collect, &c), ERR_USAGE);
    cr_expect(strstr(fail_message(), "holds ids"));
}
