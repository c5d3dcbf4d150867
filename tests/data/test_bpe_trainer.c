/* The BPE trainer against the definition: count all pairs anew for every merge, take the most frequent (ties: smaller ids). And its
 * files are a tokenizer this project reads, whose ids give the text back. */
#include <criterion/criterion.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/rng.h"
#include "data/bpe_trainer.h"
#include "data/tokenizer.h"

static char dir[64];

static void setup(void)
{
    strcpy(dir, "/tmp/test_bpe_trainer_XXXXXX");
    cr_assert(mkdtemp(dir));
}

static void teardown(void) { dir_remove_tree(dir); }

TestSuite(bpe_trainer, .init = setup, .fini = teardown);

static struct tokenizer *train(const char *const *documents, int n, int32_t size, int32_t *tokens)
{
    struct bpe_trainer *b = bpe_trainer_new();
    struct tokenizer *t;
    for (int i = 0; i < n; i++) cr_assert_eq(bpe_trainer_add(b, documents[i], strlen(documents[i])), OK, "%s", fail_message());
    cr_assert_eq(bpe_trainer_write(b, size, dir, tokens), OK, "%s", fail_message());
    bpe_trainer_free(b);
    cr_assert_eq(tokenizer_open(&t, dir), OK, "%s", fail_message());
    return t;
}

enum { WORDS = 400, LONGEST = 24, MERGES = 120 };

/* Words of few letters with long runs: overlapping pairs, pairs that come and go within one merge. One word per document: no spaces. */
static int make_words(char words[WORDS][LONGEST + 1])
{
    for (int i = 0; i < WORDS; i++) {
        struct philox r = philox4x32(7, 0, (uint64_t)i);
        int n = 1 + (int)(r.v[0] % LONGEST), run = r.v[1] % 3 == 0;
        for (int k = 0; k < n; k++) words[i][k] = run ? 'a' : "aabbc"[philox4x32(7, (uint64_t)i + 1, (uint64_t)k).v[0] % 5];
        words[i][n] = 0;
    }
    return WORDS;
}

Test(bpe_trainer, merges_are_the_most_frequent_pairs)
{
    static char words[WORDS][LONGEST + 1];
    static const char *documents[WORDS];
    static int32_t symbols[WORDS][LONGEST], counts[256 + MERGES][256 + MERGES];
    int length[WORDS], n = make_words(words);
    int32_t tokens;
    char *text[256 + MERGES] = {NULL};
    for (int i = 0; i < n; i++) {
        documents[i] = words[i];
        length[i] = (int)strlen(words[i]);
        for (int k = 0; k < length[i]; k++) symbols[i][k] = (uint8_t)words[i][k];
    }
    struct tokenizer *t = train(documents, n, 256 + MERGES + 3, &tokens);
    for (int c = 'a'; c <= 'c'; c++) text[c] = xasprintf("%c", c);
    for (int32_t m = 0; m < tokenizer_n_merges(t); m++) {
        int32_t left = 0, right = 0;
        const char *l, *r;
        memset(counts, 0, sizeof counts);
        for (int i = 0; i < n; i++) for (int k = 0; k + 1 < length[i]; k++) counts[symbols[i][k]][symbols[i][k + 1]]++;
        for (int32_t a = 0; a < 256 + m; a++) for (int32_t b = 0; b < 256 + m; b++) if (counts[a][b] > counts[left][right]) { left = a; right = b; }
        cr_assert(tokenizer_merge(t, m, &l, &r));
        cr_assert(!strcmp(l, text[left]) && !strcmp(r, text[right]), "merge %d is %s %s, %d times, not %s %s", m, l, r, counts[left][right], text[left], text[right]);
        text[256 + m] = xasprintf("%s%s", l, r);
        cr_assert_eq(tokenizer_id_of(t, text[256 + m]), 256 + m);
        for (int i = 0; i < n; i++) {
            int out = 0;
            for (int k = 0; k < length[i]; k++) {
                bool here = k + 1 < length[i] && symbols[i][k] == left && symbols[i][k + 1] == right;
                symbols[i][out++] = here ? 256 + m : symbols[i][k];
                k += here;
            }
            length[i] = out;
        }
    }
    cr_assert_geq(tokenizer_n_merges(t), 60);
    for (int i = 0; i < 256 + MERGES; i++) free(text[i]);
    tokenizer_close(t);
}

Test(bpe_trainer, files_are_a_tokenizer)
{
    static const char *const documents[] = {"Hello world, hello words! It's the 1st of the worlds.\n\n  Hello\tworld\n", "e\xcc\x81t\xc3\xa9 \xe4\xb8\x96\xe7\x95\x8c \xf0\x9f\x98\x80 hello world", ""};
    static const char text[] = "hello worlds, <|im_start|>unseen \xd0\x96 e\xcc\x81<|endoftext|>";
    int32_t tokens, again;
    const int32_t *ids;
    const char *back, *normal;
    size_t n, bytes, normal_bytes;
    char a[SHA256_HEX], b[SHA256_HEX];
    struct tokenizer *t = train(documents, 3, 300, &tokens);
    cr_expect_eq(tokenizer_vocab_size(t), tokens);
    cr_expect_eq(tokenizer_holes(t), 0);
    cr_expect_str_eq(tokenizer_gguf_pre(t), "qwen2");
    cr_expect_eq(tokenizer_eos(t), tokens - 3);
    cr_expect_eq(tokenizer_id_of(t, "<|endoftext|>"), tokens - 3);
    cr_expect_eq(tokenizer_id_of(t, "<|im_start|>"), tokens - 2);
    cr_expect_eq(tokenizer_id_of(t, "<|im_end|>"), tokens - 1);
    cr_expect_eq(tokenizer_token_kind(t, tokens - 1), TOKEN_SPECIAL);
    struct tokenizer_work *w = tokenizer_work_new(t);
    cr_assert_eq(tokenizer_encode(t, w, text, sizeof text - 1, &ids, &n), OK, "%s", fail_message());
    cr_expect_lt(n, sizeof text - 24);
    cr_assert_eq(tokenizer_decode(t, w, ids, n, false, &back, &bytes), OK);
    cr_assert_eq(tokenizer_normalize(t, w, text, sizeof text - 1, &normal, &normal_bytes), OK);
    cr_expect(bytes == normal_bytes && !memcmp(back, normal, bytes), "%s", back);
    tokenizer_hash(t, a);
    tokenizer_work_free(w);
    tokenizer_close(t);
    t = train(documents, 3, 300, &again);
    tokenizer_hash(t, b);
    cr_expect_str_eq(a, b, "the same text gives the same tokenizer");
    tokenizer_close(t);
    t = train(NULL, 0, 259, &tokens);
    cr_expect_eq(tokens, 259, "no text: bytes and special tokens");
    tokenizer_close(t);
}

Test(bpe_trainer, refusals)
{
    struct bpe_trainer *b = bpe_trainer_new();
    int32_t tokens;
    cr_expect_eq(bpe_trainer_add(b, "ok \xff", 4), ERR_INPUT);
    cr_expect(strstr(fail_message(), "byte 3"), "%s", fail_message());
    cr_expect_eq(bpe_trainer_write(b, 258, dir, &tokens), ERR_USAGE);
    bpe_trainer_free(b);
}
