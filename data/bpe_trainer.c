/* See bpe_trainer.h. Distinct words are counted first; every pair of neighbouring symbols then knows how often it occurs and in which words. A merge
 * touches those words alone, and a heap with lazy updates finds the next pair, so the cost is near that of reading the text. */
#include "data/bpe_trainer.h"

#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "data/bpe.h"
#include "data/tokenizer_pattern.h"
#include "data/tokenizer_unicode.h"

static const char SPLIT[] = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
static const char *const SPECIAL[] = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"};
enum { BYTES = 256, N_SPECIAL = sizeof SPECIAL / sizeof *SPECIAL };

struct word { int64_t text; int32_t n, length; int64_t count; int32_t *symbols; };   /* text: offset into `texts`; n bytes; length symbols */
/* key: left << 32 | right, plus one, so that 0 is an empty slot; grown: 1 + the last merge that added occurrences */
struct pair { uint64_t key; int64_t count; int32_t *words; int32_t n_words, room, grown; };
struct candidate { int64_t count; uint64_t key; };

struct bpe_trainer {
    struct pattern *split;
    struct pattern_work *work;
    struct normal_work normal;
    struct buffer normalized, texts;
    struct word *word; int64_t n_words, word_room;
    int64_t *word_slot; int64_t word_slots;                   /* open addressing: index + 1 */
    struct pair *pair; int64_t pair_slots, n_pairs;
    struct candidate *heap; int64_t n_heap, heap_room;
    uint64_t *grown; int64_t n_grown, grown_room;             /* keys of the pairs that the merge under way added occurrences of */
    int32_t (*merge)[2]; int32_t n_merges;
};

/* ---- counting words ---- */

static uint64_t hash_bytes(const char *s, size_t n)           /* FNV-1a */
{
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < n; i++) h = (h ^ (unsigned char)s[i]) * 0x100000001b3u;
    return h ^ h >> 29;
}

static void grow_words(struct bpe_trainer *t)
{
    t->word_slots = t->word_slots ? 2 * t->word_slots : 1 << 14;
    free(t->word_slot);
    t->word_slot = xcalloc((size_t)t->word_slots, sizeof *t->word_slot);
    for (int64_t i = 0; i < t->n_words; i++) {
        int64_t s = (int64_t)(hash_bytes(t->texts.data + t->word[i].text, (size_t)t->word[i].n) & (uint64_t)(t->word_slots - 1));
        while (t->word_slot[s]) s = (s + 1) & (t->word_slots - 1);
        t->word_slot[s] = i + 1;
    }
}

static void count_word(struct bpe_trainer *t, const char *text, size_t n)
{
    if (2 * t->n_words >= t->word_slots) grow_words(t);
    int64_t s = (int64_t)(hash_bytes(text, n) & (uint64_t)(t->word_slots - 1));
    for (; t->word_slot[s]; s = (s + 1) & (t->word_slots - 1)) {
        struct word *w = &t->word[t->word_slot[s] - 1];
        if ((size_t)w->n == n && !memcmp(t->texts.data + w->text, text, n)) { w->count++; return; }
    }
    if (t->n_words == t->word_room) t->word = xrealloc(t->word, (size_t)(t->word_room = t->word_room ? 2 * t->word_room : 4096) * sizeof *t->word);
    t->word[t->n_words] = (struct word){.text = (int64_t)t->texts.n, .n = (int32_t)n, .count = 1};
    buffer_add(&t->texts, text, n);
    t->word_slot[s] = ++t->n_words;
}

struct bpe_trainer *bpe_trainer_new(void)
{
    struct bpe_trainer *t = xcalloc(1, sizeof *t);
    int rc = pattern_open_regex(&t->split, SPLIT, sizeof SPLIT - 1, "the trainer's split pattern");
    CHECK(rc == OK, "%s", fail_message());
    t->work = pattern_work_new();
    return t;
}

int bpe_trainer_add(struct bpe_trainer *t, const char *text, size_t bytes)
{
    enum { LONGEST = 1 << 12 };                                /* a longer run (base64, rules of dashes) teaches nothing and is left out */
    bool recent, found;
    int64_t bad = utf8_check(text, bytes, &recent);
    if (bad >= 0) return fail(ERR_INPUT, "byte %lld is not valid UTF-8", (long long)bad);
    t->normalized.n = 0;
    if (unicode_normalize(NFC, &t->normal, text, bytes, &t->normalized)) { text = t->normalized.data; bytes = t->normalized.n; }
    struct pattern_scan scan = pattern_scan_start(t->split, t->work, text, bytes, recent);
    for (;;) {
        size_t start, end;
        int rc = pattern_scan_next(&scan, &start, &end, &found);
        if (rc != OK || !found) return rc;
        if (end - start <= LONGEST) count_word(t, text + start, end - start);
    }
}

/* ---- pairs ---- */

static uint64_t pair_key(int32_t left, int32_t right) { return ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) + 1; }
static int32_t key_left(uint64_t key) { return (int32_t)((key - 1) >> 32); }
static int32_t key_right(uint64_t key) { return (int32_t)(key - 1); }

static struct pair *pair_slot(struct pair *table, int64_t slots, uint64_t key)
{
    uint64_t h = key * 0x9e3779b97f4a7c15u;
    int64_t s = (int64_t)((h ^ h >> 32) & (uint64_t)(slots - 1));
    while (table[s].key && table[s].key != key) s = (s + 1) & (slots - 1);
    return &table[s];
}

static struct pair *find_pair(struct bpe_trainer *t, uint64_t key)
{
    if (2 * t->n_pairs >= t->pair_slots) {
        int64_t slots = t->pair_slots ? 2 * t->pair_slots : 1 << 16;
        struct pair *table = xcalloc((size_t)slots, sizeof *table);
        for (int64_t i = 0; i < t->pair_slots; i++) if (t->pair[i].key) *pair_slot(table, slots, t->pair[i].key) = t->pair[i];
        free(t->pair);
        t->pair = table;
        t->pair_slots = slots;
    }
    struct pair *p = pair_slot(t->pair, t->pair_slots, key);
    if (!p->key) { p->key = key; t->n_pairs++; }
    return p;
}

static bool ranks_before(const struct candidate *a, const struct candidate *b) { return a->count != b->count ? a->count > b->count : a->key < b->key; }

static void heap_push(struct bpe_trainer *t, struct candidate c)
{
    if (t->n_heap == t->heap_room) t->heap = xrealloc(t->heap, (size_t)(t->heap_room = t->heap_room ? 2 * t->heap_room : 1 << 14) * sizeof *t->heap);
    int64_t i = t->n_heap++;
    for (; i && ranks_before(&c, &t->heap[(i - 1) / 2]); i = (i - 1) / 2) t->heap[i] = t->heap[(i - 1) / 2];
    t->heap[i] = c;
}

static struct candidate heap_pop(struct bpe_trainer *t)
{
    struct candidate top = t->heap[0], last = t->heap[--t->n_heap];
    int64_t i = 0;
    for (int64_t child; (child = 2 * i + 1) < t->n_heap; i = child) {
        if (child + 1 < t->n_heap && ranks_before(&t->heap[child + 1], &t->heap[child])) child++;
        if (!ranks_before(&t->heap[child], &last)) break;
        t->heap[i] = t->heap[child];
    }
    t->heap[i] = last;
    return top;
}

/* `by` more occurrences of a pair in word `w`. The same merge may take them away again, so what grew is only noted here. */
static void change_pair(struct bpe_trainer *t, int32_t left, int32_t right, int64_t by, int32_t w)
{
    struct pair *p = find_pair(t, pair_key(left, right));
    p->count += by;
    if (by < 0) return;
    if (!p->n_words || p->words[p->n_words - 1] != w) {
        if (p->n_words == p->room) p->words = xrealloc(p->words, (size_t)(p->room = p->room ? 2 * p->room : 4) * sizeof *p->words);
        p->words[p->n_words++] = w;
    }
    if (p->grown == t->n_merges + 1) return;
    p->grown = t->n_merges + 1;
    if (t->n_grown == t->grown_room) t->grown = xrealloc(t->grown, (size_t)(t->grown_room = t->grown_room ? 2 * t->grown_room : 1 << 14) * sizeof *t->grown);
    t->grown[t->n_grown++] = p->key;
}

/* Every pair that grew enters the heap with the count it has now. */
static void offer_grown(struct bpe_trainer *t)
{
    for (int64_t i = 0; i < t->n_grown; i++) heap_push(t, (struct candidate){find_pair(t, t->grown[i])->count, t->grown[i]});
    t->n_grown = 0;
}

static void merge_in_word(struct bpe_trainer *t, int32_t index, int32_t left, int32_t right, int32_t merged)
{
    struct word *w = &t->word[index];
    int32_t out = 0;
    for (int32_t i = 0; i < w->length; i++) {
        if (i + 1 < w->length && w->symbols[i] == left && w->symbols[i + 1] == right) {
            if (out) {
                change_pair(t, w->symbols[out - 1], left, -w->count, index);
                change_pair(t, w->symbols[out - 1], merged, w->count, index);
            }
            if (i + 2 < w->length) {
                change_pair(t, right, w->symbols[i + 2], -w->count, index);
                change_pair(t, merged, w->symbols[i + 2], w->count, index);
            }
            w->symbols[out++] = merged;
            i++;
        } else w->symbols[out++] = w->symbols[i];
    }
    w->length = out;
}

static void learn(struct bpe_trainer *t, int32_t merges)
{
    CHECK(t->n_words < INT32_MAX, "%lld distinct words", (long long)t->n_words);
    for (int32_t i = 0; i < t->n_words; i++) {
        struct word *w = &t->word[i];
        w->symbols = xmalloc((size_t)w->n * sizeof *w->symbols);
        w->length = w->n;
        for (int32_t j = 0; j < w->n; j++) w->symbols[j] = (unsigned char)t->texts.data[w->text + j];
        for (int32_t j = 0; j + 1 < w->n; j++) change_pair(t, w->symbols[j], w->symbols[j + 1], w->count, i);
    }
    offer_grown(t);
    t->merge = xmalloc((size_t)(merges > 0 ? merges : 1) * sizeof *t->merge);
    while (t->n_merges < merges && t->n_heap) {
        struct candidate c = heap_pop(t);
        struct pair *p = find_pair(t, c.key);
        if (c.count != p->count) {                             /* it lost occurrences since it was offered */
            if (p->count > 1 && p->count < c.count) heap_push(t, (struct candidate){p->count, c.key});
            continue;
        }
        if (p->count < 2) break;
        int32_t left = key_left(c.key), right = key_right(c.key), merged = BYTES + t->n_merges, n = p->n_words, *words = p->words;
        t->merge[t->n_merges][0] = left;
        t->merge[t->n_merges++][1] = right;
        p->words = NULL;                                       /* the pair is gone from every word after this */
        p->count = p->n_words = p->room = 0;
        for (int32_t i = 0; i < n; i++) merge_in_word(t, words[i], left, right, merged);
        find_pair(t, c.key)->count = 0;                        /* overlaps (aaa) were counted twice */
        offer_grown(t);
        free(words);
    }
}

/* ---- writing ---- */

/* The bytes of every token, then its spelling in the byte-level alphabet. */
static char **spell(const struct bpe_trainer *t)
{
    char **text = xcalloc((size_t)(BYTES + t->n_merges), sizeof *text);
    for (int b = 0; b < BYTES; b++) {
        char c[2];
        int n = byte_to_utf8((uint8_t)b, c);
        text[b] = xstrndup(c, (size_t)n);
    }
    for (int32_t i = 0; i < t->n_merges; i++) text[BYTES + i] = xasprintf("%s%s", text[t->merge[i][0]], text[t->merge[i][1]]);
    return text;
}

static json_t *byte_level_step(void) { return json_pack("{s:s, s:b, s:b, s:b}", "type", "ByteLevel", "add_prefix_space", 0, "trim_offsets", 0, "use_regex", 0); }

static json_t *added_token(int32_t id, const char *content)
{
    return json_pack("{s:i, s:s, s:b, s:b, s:b, s:b, s:b}", "id", id, "content", content, "single_word", 0, "lstrip", 0, "rstrip", 0, "normalized", 0, "special", 1);
}

int bpe_trainer_write(struct bpe_trainer *t, int32_t vocab_size, const char *dir, int32_t *tokens)
{
    int rc = OK;
    char *tokenizer = path_join(dir, "tokenizer.json"), *config = path_join(dir, "tokenizer_config.json");
    if (vocab_size < BYTES + N_SPECIAL) { rc = fail(ERR_USAGE, "a vocabulary of %d is too small: 256 bytes and %d special tokens are always there", vocab_size, (int)N_SPECIAL); goto out; }
    learn(t, vocab_size - BYTES - N_SPECIAL);
    char **text = spell(t);
    int32_t n = BYTES + t->n_merges;
    json_t *vocab = json_object(), *merges = json_array(), *added = json_array();
    for (int32_t i = 0; i < n; i++) json_object_set_new(vocab, text[i], json_integer(i));
    for (int32_t i = 0; i < t->n_merges; i++) {
        char *line = xasprintf("%s %s", text[t->merge[i][0]], text[t->merge[i][1]]);
        json_array_append_new(merges, json_string(line));
        free(line);
    }
    for (int i = 0; i < N_SPECIAL; i++) json_array_append_new(added, added_token(n + i, SPECIAL[i]));
    json_t *split = json_pack("{s:s, s:{s:s}, s:s, s:b}", "type", "Split", "pattern", "Regex", SPLIT, "behavior", "Isolated", "invert", 0);
    json_t *model = json_pack("{s:s, s:n, s:n, s:s, s:s, s:b, s:b, s:b, s:o, s:o}", "type", "BPE", "dropout", "unk_token", "continuing_subword_prefix", "", "end_of_word_suffix", "",
                              "fuse_unk", 0, "byte_fallback", 0, "ignore_merges", 0, "vocab", vocab, "merges", merges);
    json_t *root = json_pack("{s:s, s:n, s:n, s:o, s:{s:s}, s:{s:s, s:[o, o]}, s:o, s:o, s:o}", "version", "1.0", "truncation", "padding", "added_tokens", added, "normalizer", "type", "NFC",
                             "pre_tokenizer", "type", "Sequence", "pretokenizers", split, byte_level_step(), "post_processor", byte_level_step(), "decoder", byte_level_step(), "model", model);
    CHECK(root, "tokenizer.json cannot be put together");
    *tokens = n + N_SPECIAL;
    if ((rc = dir_make(dir)) == OK) rc = json_write_file(tokenizer, root);
    json_decref(root);
    if (rc == OK) {
        root = json_pack("{s:s, s:s, s:s, s:b, s:b, s:I}", "tokenizer_class", "PreTrainedTokenizerFast", "eos_token", SPECIAL[0], "pad_token", SPECIAL[0], "add_bos_token", 0,
                         "clean_up_tokenization_spaces", 0, "model_max_length", (json_int_t)1000000);
        rc = json_write_file(config, root);
        json_decref(root);
    }
    for (int32_t i = 0; i < n; i++) free(text[i]);
    free(text);
out:
    free(tokenizer);
    free(config);
    return rc;
}

void bpe_trainer_free(struct bpe_trainer *t)
{
    if (!t) return;
    pattern_close(t->split);
    pattern_work_free(t->work);
    normal_work_free(&t->normal);
    free(t->normalized.data);
    free(t->texts.data);
    for (int64_t i = 0; i < t->n_words; i++) free(t->word[i].symbols);
    free(t->word);
    free(t->word_slot);
    for (int64_t i = 0; i < t->pair_slots; i++) free(t->pair[i].words);
    free(t->pair);
    free(t->heap);
    free(t->grown);
    free(t->merge);
    free(t);
}
