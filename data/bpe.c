/* Byte pair encoding, see bpe.h.
 *
 * Two hash tables with linear probing carry the work: string -> id, and (left id, right id) -> (rank, joined id). Words of
 * up to SHORT_WORD symbols are merged by scanning an array; longer ones with a linked list and a binary heap of (rank, position),
 * O(n log n), so that a megabyte without a space takes a second. A direct-mapped cache of one word per 128-byte slot answers
 * most words of real text; being keyed by the whole word it cannot change an id.
 */
#include "data/bpe.h"

#include <string.h>

#include "base/error.h"

enum { SHORT_WORD = 28, CACHE_SLOTS = 1 << 15, CACHE_BYTES = 62, CACHE_IDS = 15 };
enum { NO_RANK = -1 };   /* as uint32_t: after every rank */
#define METASPACE "\xe2\x96\x81"

struct string_slot { uint32_t hash; int32_t id; };
struct string_table { struct string_slot *slots; uint32_t mask; };
struct merge_slot { int32_t left, right; uint32_t rank; int32_t joined; };
struct merge { int32_t left, right, joined; };
struct token { uint32_t text, text_n, raw, raw_n; };   /* ranges of the pool; text_n = UINT32_MAX marks a hole, raw_n = UINT32_MAX no raw form */

struct bpe {
    struct token *tokens;               /* [size] by id */
    int32_t size, count;
    char *pool;
    struct string_table by_text, by_raw;
    struct merge *merges;               /* by rank */
    int64_t n_merges;
    struct merge_slot *merge_slots;
    int merge_shift;
    bool raw_bytes, byte_fallback, fuse_unk, ignore_merges, break_at_metaspace;
    char *unk_token;                    /* NULL: characters without a token vanish */
    int32_t unk;
    int32_t first_id[256];              /* raw: symbol of a byte; otherwise of an ASCII character; -1: none */
    int32_t fallback[256];              /* ids of <0x00>..<0xFF> */
};

struct cache_slot { uint32_t hash; uint8_t n_bytes, n_ids; char bytes[CACHE_BYTES]; int32_t ids[CACHE_IDS]; };
_Static_assert(sizeof(struct cache_slot) == 128, "one cache slot is two cache lines");

struct bpe_work {
    struct cache_slot *cache;
    int32_t *id, *next, *prev, *joined; /* symbols of a long word, and what the pair starting here becomes */
    uint32_t *rank;
    uint64_t *heap;                     /* rank << 32 | position */
    size_t capacity, heap_n, heap_capacity;
};

void id_list_add(struct id_list *l, int32_t id)
{
    if (l->n == l->capacity) {
        l->capacity = l->capacity ? 2 * l->capacity : 256;
        l->ids = xrealloc(l->ids, l->capacity * sizeof *l->ids);
    }
    l->ids[l->n++] = id;
}

/* ---- the byte-level alphabet ---- */

static bool byte_is_printable(unsigned b) { return (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae; }

int32_t byte_of_char(uint32_t c)
{
    static const uint8_t moved[68] = {   /* the bytes that U+0100.. stand for, in order */
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32,
        127, 128, 129, 130, 131, 132, 133, 134, 135, 136, 137, 138, 139, 140, 141, 142, 143, 144, 145, 146, 147, 148, 149, 150,
        151, 152, 153, 154, 155, 156, 157, 158, 159, 160, 173};
    if (c < 256) return byte_is_printable(c) ? (int32_t)c : -1;
    return c < 256 + 68 ? moved[c - 256] : -1;
}

int byte_to_utf8(uint8_t byte, char out[2])
{
    unsigned c = byte;
    if (!byte_is_printable(byte)) c = byte <= 32 ? 256u + byte : byte == 173 ? 256 + 67 : 256 + 33 + (byte - 127u);
    if (c < 128) { out[0] = (char)c; return 1; }
    out[0] = (char)(0xc0 | c >> 6);
    out[1] = (char)(0x80 | (c & 63));
    return 2;
}

bool byte_level_decode(const char *text, size_t n, char *out, size_t *n_out)
{
    size_t m = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t c = (uint8_t)text[i];
        if (c >= 0x80) {
            if ((c & 0xe0) != 0xc0 || i + 1 >= n) return false;
            c = (c & 31) << 6 | ((uint8_t)text[++i] & 63);
        }
        int32_t b = byte_of_char(c);
        if (b < 0) return false;
        out[m++] = (char)b;
    }
    *n_out = m;
    return true;
}

bool byte_token(const char *token, size_t n, uint8_t *byte)
{
    unsigned v = 0;
    if (n != 6 || memcmp(token, "<0x", 3) || token[5] != '>') return false;
    for (int i = 3; i < 5; i++) {
        char c = token[i];
        if (!((c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'f'))) return false;
        v = 16 * v + (unsigned)(c <= '9' ? c - '0' : (c | 32) - 'a' + 10);
    }
    *byte = (uint8_t)v;
    return true;
}

/* ---- tables ---- */

static uint32_t hash_bytes(const char *s, size_t n)
{
    uint64_t h = n * 0x9e3779b97f4a7c15u, v;
    for (; n >= 8; s += 8, n -= 8) {
        memcpy(&v, s, 8);
        h = (h ^ v) * 0xd6e8feb86659fd93u;
        h ^= h >> 32;
    }
    v = 0;
    memcpy(&v, s, n);
    h = (h ^ v) * 0xd6e8feb86659fd93u;
    h ^= h >> 32;
    h *= 0xd6e8feb86659fd93u;
    return (uint32_t)(h >> 32);
}

static void table_init(struct string_table *t, int64_t n)
{
    uint64_t size = 64;
    while (size < 2 * (uint64_t)n) size *= 2;
    t->slots = xmalloc(size * sizeof *t->slots);
    for (uint64_t i = 0; i < size; i++) t->slots[i].id = -1;
    t->mask = (uint32_t)(size - 1);
}

/* The id of a string under `raw` or spelled keys, -1 if absent; *slot is where it is or belongs. */
static int32_t table_find(const struct bpe *b, const struct string_table *t, bool raw, const char *s, size_t n, uint32_t *slot, uint32_t *hash)
{
    *hash = hash_bytes(s, n);
    for (uint32_t i = *hash & t->mask;; i = (i + 1) & t->mask) {
        *slot = i;
        const struct string_slot *e = &t->slots[i];
        if (e->id < 0) return -1;
        if (e->hash != *hash) continue;
        const struct token *k = &b->tokens[e->id];
        if (n == (raw ? k->raw_n : k->text_n) && !memcmp(s, b->pool + (raw ? k->raw : k->text), n)) return e->id;
    }
}

static int32_t find(const struct bpe *b, bool raw, const char *s, size_t n)
{
    uint32_t slot, hash;
    return table_find(b, raw ? &b->by_raw : &b->by_text, raw, s, n, &slot, &hash);
}

int32_t bpe_find(const struct bpe *b, const char *text, size_t bytes) { return find(b, false, text, bytes); }

static inline uint32_t merge_hash(const struct bpe *b, int32_t left, int32_t right)
{
    return (uint32_t)((((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0x9e3779b97f4a7c15u) >> b->merge_shift);
}

static inline struct merge_slot *merge_at(const struct bpe *b, int32_t left, int32_t right)
{
    uint32_t mask = (uint32_t)(1ull << (64 - b->merge_shift)) - 1;
    for (uint32_t i = merge_hash(b, left, right);; i = (i + 1) & mask) {
        struct merge_slot *m = &b->merge_slots[i];
        if (m->joined < 0 || (m->left == left && m->right == right)) return m;
    }
}

static inline uint32_t merge_rank(const struct bpe *b, int32_t left, int32_t right, int32_t *joined)
{
    const struct merge_slot *m = merge_at(b, left, right);
    *joined = m->joined;
    return m->joined < 0 ? (uint32_t)NO_RANK : m->rank;
}

/* ---- reading the model ---- */

static int read_vocab(struct bpe *b, const json_t *vocab, const char *where)
{
    const char *text;
    json_t *value;
    int64_t count = (int64_t)json_object_size(vocab), limit = 4 * count + (1 << 20), largest = -1;
    size_t bytes = 0, pool_n = 0;
    json_object_foreach((json_t *)vocab, text, value) {
        json_int_t id = json_is_integer(value) ? json_integer_value(value) : -1;
        if (id < 0 || id >= limit)
            return fail(ERR_INPUT, "%s: model.vocab: token \"%s\" has no usable id: an integer of at least 0 and below %lld is needed",
                        where, text, (long long)limit);
        if (id > largest) largest = id;
        bytes += 2 * strlen(text) + 2;
    }
    if (bytes >= UINT32_MAX) return fail(ERR_INPUT, "%s: model.vocab: the tokens have more than 2 GB of text", where);
    b->size = (int32_t)(largest + 1);
    b->count = (int32_t)count;
    b->tokens = xmalloc((size_t)b->size * sizeof *b->tokens);
    for (int32_t i = 0; i < b->size; i++) b->tokens[i] = (struct token){.text_n = UINT32_MAX, .raw_n = UINT32_MAX};
    b->pool = xmalloc(bytes + 1);
    table_init(&b->by_text, count);
    if (b->raw_bytes) table_init(&b->by_raw, count);
    json_object_foreach((json_t *)vocab, text, value) {
        int32_t id = (int32_t)json_integer_value(value);
        struct token *k = &b->tokens[id];
        size_t n = strlen(text), raw_n;
        uint32_t slot, hash;
        if (k->text_n != UINT32_MAX)
            return fail(ERR_INPUT, "%s: model.vocab: id %d belongs to both \"%s\" and \"%s\"", where, id, b->pool + k->text, text);
        k->text = (uint32_t)pool_n;
        memcpy(b->pool + pool_n, text, n + 1);
        pool_n += n + 1;
        table_find(b, &b->by_text, false, text, n, &slot, &hash);   /* absent: JSON keys are unique */
        b->by_text.slots[slot] = (struct string_slot){hash, id};
        k->text_n = (uint32_t)n;
        if (b->raw_bytes && byte_level_decode(text, n, b->pool + pool_n, &raw_n)) {
            k->raw = (uint32_t)pool_n;
            pool_n += raw_n + 1;
            table_find(b, &b->by_raw, true, b->pool + k->raw, raw_n, &slot, &hash);
            b->by_raw.slots[slot] = (struct string_slot){hash, id};
            k->raw_n = (uint32_t)raw_n;
        }
    }
    return OK;
}

/* A merge is "left right" or ["left", "right"]; one file uses one form. */
static int merge_parts(const json_t *entry, bool pairs, const char *part[2], size_t n[2])
{
    if (pairs) {
        if (!json_is_array(entry) || json_array_size(entry) != 2) return -1;
        for (int i = 0; i < 2; i++) {
            const json_t *s = json_array_get(entry, (size_t)i);
            if (!json_is_string(s)) return -1;
            part[i] = json_string_value(s);
            n[i] = json_string_length(s);
        }
        return 0;
    }
    if (!json_is_string(entry)) return -1;
    const char *s = json_string_value(entry), *space = strchr(s, ' ');
    if (!space || strchr(space + 1, ' ')) return -1;
    part[0] = s;
    n[0] = (size_t)(space - s);
    part[1] = space + 1;
    n[1] = strlen(space + 1);
    return 0;
}

static int read_merges(struct bpe *b, const json_t *merges, const char *where)
{
    size_t count = json_array_size(merges), joined_capacity = 256;
    bool pairs = count && json_is_array(json_array_get(merges, 0));
    char *joined = xmalloc(joined_capacity);
    int rc = OK;
    b->merges = xmalloc(count * sizeof *b->merges);
    b->merge_shift = 64 - 6;
    while (b->merge_shift > 33 && (1ull << (64 - b->merge_shift)) < 2 * (uint64_t)count) b->merge_shift--;
    b->merge_slots = xmalloc((sizeof *b->merge_slots) << (64 - b->merge_shift));
    for (uint64_t i = 0; i < 1ull << (64 - b->merge_shift); i++) b->merge_slots[i].joined = -1;
    for (size_t i = 0; i < count; i++) {
        const char *part[2];
        size_t n[2];
        const json_t *entry = json_array_get(merges, i);
        if (!pairs && json_is_string(entry) && !strncmp(json_string_value(entry), "#version", 8)) continue;
        if (merge_parts(entry, pairs, part, n)) {
            rc = fail(ERR_INPUT, "%s: model.merges[%zu] is not %s", where, i, pairs ? "a pair of strings" : "two tokens separated by one space");
            goto out;
        }
        if (n[0] + n[1] > joined_capacity) joined = xrealloc(joined, joined_capacity = 2 * (n[0] + n[1]));
        memcpy(joined, part[0], n[0]);
        memcpy(joined + n[0], part[1], n[1]);
        struct merge m = {bpe_find(b, part[0], n[0]), bpe_find(b, part[1], n[1]), bpe_find(b, joined, n[0] + n[1])};
        if (m.left < 0 || m.right < 0 || m.joined < 0) {
            const char *missing = m.left < 0 ? part[0] : m.right < 0 ? part[1] : joined;
            size_t missing_n = m.left < 0 ? n[0] : m.right < 0 ? n[1] : n[0] + n[1];
            int shown = (int)(missing_n < 200 ? missing_n : 200);
            rc = fail(ERR_INPUT, "%s: model.merges[%zu]: \"%.*s\" is not in the vocabulary", where, i, shown, missing);
            goto out;
        }
        /* a pair listed twice has the rank of its last place; its first one leaves the list */
        struct merge_slot *slot = merge_at(b, m.left, m.right);
        if (slot->joined >= 0) b->merges[slot->rank].joined = -1;
        *slot = (struct merge_slot){m.left, m.right, (uint32_t)b->n_merges, m.joined};
        b->merges[b->n_merges++] = m;
    }
    int64_t kept = 0;
    for (int64_t i = 0; i < b->n_merges; i++) {
        if (b->merges[i].joined < 0) continue;
        merge_at(b, b->merges[i].left, b->merges[i].right)->rank = (uint32_t)kept;
        b->merges[kept++] = b->merges[i];
    }
    b->n_merges = kept;
out:
    free(joined);
    return rc;
}

/* A long text of a model with U+2581 for spaces is one word. If no merge joins another character to a U+2581 after it, and no
 * character vanishes, the word falls apart in front of each U+2581 that follows another one, exactly; the pieces are short and cached. */
static bool breaks_at_metaspace(const struct bpe *b)
{
    bool all_bytes = b->byte_fallback;
    for (int i = 0; i < 256; i++) all_bytes &= b->fallback[i] >= 0;
    if (b->raw_bytes || b->ignore_merges || bpe_find(b, METASPACE, 3) < 0 || !(all_bytes || b->unk >= 0)) return false;
    for (int64_t i = 0; i < b->n_merges; i++) {
        const struct token *l = &b->tokens[b->merges[i].left], *r = &b->tokens[b->merges[i].right];
        if (r->text_n >= 3 && !memcmp(b->pool + r->text, METASPACE, 3) &&
            (l->text_n < 3 || memcmp(b->pool + l->text + l->text_n - 3, METASPACE, 3))) return false;
    }
    return true;
}

static int read_flag(const json_t *model, const char *key, const char *where, bool *flag)
{
    const json_t *v = json_object_get(model, key);
    if (v && !json_is_null(v) && !json_is_boolean(v)) return fail(ERR_INPUT, "%s: model.%s is not true or false", where, key);
    *flag = json_is_true(v);
    return OK;
}

static int read_options(struct bpe *b, const json_t *model, const char *where)
{
    static const char *const known[] = {"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
                                        "byte_fallback", "ignore_merges", "vocab", "merges", NULL};
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)model, key, value) {
        int i = 0;
        while (known[i] && strcmp(known[i], key)) i++;
        if (!known[i] && !json_is_null(value)) return fail(ERR_INPUT, "%s: model.%s is not a key this program implements", where, key);
    }
    const json_t *dropout = json_object_get(model, "dropout");
    if (dropout && !json_is_null(dropout) && !(json_is_number(dropout) && json_number_value(dropout) == 0))
        return fail(ERR_INPUT, "%s: model.dropout is not null: ids would be random; set it to null", where);
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    for (int i = 0; i < 2; i++) {
        const json_t *v = json_object_get(model, affixes[i]);
        if (v && !json_is_null(v) && !(json_is_string(v) && json_string_length(v) == 0))
            return fail(ERR_INPUT, "%s: model.%s is not implemented", where, affixes[i]);
    }
    const json_t *unk = json_object_get(model, "unk_token");
    if (unk && !json_is_null(unk) && !json_is_string(unk)) return fail(ERR_INPUT, "%s: model.unk_token is not a string", where);
    if (json_is_string(unk)) b->unk_token = xstrdup(json_string_value(unk));
    int rc = OK;
    TRY(read_flag(model, "fuse_unk", where, &b->fuse_unk));
    TRY(read_flag(model, "byte_fallback", where, &b->byte_fallback));
    TRY(read_flag(model, "ignore_merges", where, &b->ignore_merges));
out:
    return rc;
}

int bpe_open(struct bpe **out, const json_t *model, bool raw_bytes, const char *where)
{
    struct bpe *b = xcalloc(1, sizeof *b);
    int rc = OK;
    *out = NULL;
    b->raw_bytes = raw_bytes;
    const json_t *type = json_object_get(model, "type"), *vocab = json_object_get(model, "vocab"), *merges = json_object_get(model, "merges");
    if (type && !(json_is_string(type) && !strcmp(json_string_value(type), "BPE"))) {
        rc = fail(ERR_INPUT, "%s: model.type is \"%s\"; only BPE is implemented", where, json_is_string(type) ? json_string_value(type) : "?");
        goto out;
    }
    if (!json_is_object(vocab) || !json_object_size(vocab) || !json_is_array(merges)) {
        rc = fail(ERR_INPUT, "%s: model.vocab or model.merges is missing: this is not a BPE model", where);
        goto out;
    }
    TRY(read_options(b, model, where));
    TRY(read_vocab(b, vocab, where));
    TRY(read_merges(b, merges, where));
    b->unk = b->unk_token ? bpe_find(b, b->unk_token, strlen(b->unk_token)) : -1;
    for (int i = 0; i < 256; i++) {
        char byte = (char)i, code[8];
        b->first_id[i] = b->raw_bytes || i < 128 ? find(b, b->raw_bytes, &byte, 1) : -1;
        snprintf(code, sizeof code, "<0x%02X>", (unsigned)i);
        b->fallback[i] = bpe_find(b, code, 6);
    }
    b->break_at_metaspace = breaks_at_metaspace(b);
    *out = b;
    b = NULL;
out:
    bpe_close(b);
    return rc;
}

void bpe_close(struct bpe *b)
{
    if (!b) return;
    free(b->tokens);
    free(b->pool);
    free(b->by_text.slots);
    free(b->by_raw.slots);
    free(b->merges);
    free(b->merge_slots);
    free(b->unk_token);
    free(b);
}

int32_t bpe_size(const struct bpe *b) { return b->size; }
int32_t bpe_count(const struct bpe *b) { return b->count; }
int64_t bpe_n_merges(const struct bpe *b) { return b->n_merges; }
bool bpe_byte_fallback(const struct bpe *b) { return b->byte_fallback; }
bool bpe_ignore_merges(const struct bpe *b) { return b->ignore_merges; }

void bpe_merge(const struct bpe *b, int64_t rank, int32_t *left, int32_t *right)
{
    *left = b->merges[rank].left;
    *right = b->merges[rank].right;
}

const char *bpe_text(const struct bpe *b, int32_t id, size_t *bytes)
{
    if (id < 0 || id >= b->size || b->tokens[id].text_n == UINT32_MAX) return NULL;
    *bytes = b->tokens[id].text_n;
    return b->pool + b->tokens[id].text;
}

json_t *bpe_options(const struct bpe *b)
{
    return json_pack("{s:b, s:b, s:b, s:s?}", "byte_fallback", b->byte_fallback, "fuse_unk", b->fuse_unk, "ignore_merges", b->ignore_merges,
                     "unk_token", b->unk_token);
}

/* ---- encoding a word ---- */

struct bpe_work *bpe_work_new(const struct bpe *b)
{
    (void)b;
    struct bpe_work *w = xcalloc(1, sizeof *w);
    w->cache = xcalloc(CACHE_SLOTS, sizeof *w->cache);
    return w;
}

void bpe_work_free(struct bpe_work *w)
{
    if (!w) return;
    free(w->cache);
    free(w->id);
    free(w->next);
    free(w->prev);
    free(w->joined);
    free(w->rank);
    free(w->heap);
    free(w);
}

static void work_reserve(struct bpe_work *w, size_t n)
{
    if (n <= w->capacity) return;
    w->capacity = n > 2 * w->capacity ? n : 2 * w->capacity;
    w->id = xrealloc(w->id, w->capacity * sizeof *w->id);
    w->next = xrealloc(w->next, w->capacity * sizeof *w->next);
    w->prev = xrealloc(w->prev, w->capacity * sizeof *w->prev);
    w->joined = xrealloc(w->joined, w->capacity * sizeof *w->joined);
    w->rank = xrealloc(w->rank, w->capacity * sizeof *w->rank);
}

/* The first symbols of a word, into w->id. A character without a token becomes its bytes' <0xHH> tokens, if byte_fallback and all
 * of them exist, else the unknown token (a run of them one, if fuse_unk), else nothing. A pending unknown token is put down
 * in front of the next known symbol, so behind fallback bytes that follow it: the order that fixed the ids. */
static int first_symbols(const struct bpe *b, struct bpe_work *w, const char *word, size_t n, size_t *n_symbols)
{
    size_t m = 0;
    bool pending = false;
    work_reserve(w, (b->raw_bytes ? 2 * n : n) + 1);   /* a raw byte can fall back to the 2 bytes of its spelling */
    for (size_t i = 0; i < n;) {
        uint8_t c = (uint8_t)word[i];
        size_t len = b->raw_bytes || c < 0x80 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
        int32_t id = len == 1 ? b->first_id[c] : find(b, false, word + i, len);
        char spelled[2];
        const char *s = word + i;
        size_t s_n = len;
        i += len;
        if (id >= 0) {
            if (pending) w->id[m++] = b->unk;
            pending = false;
            w->id[m++] = id;
            continue;
        }
        if (b->raw_bytes) { s_n = (size_t)byte_to_utf8(c, spelled); s = spelled; }
        if (b->byte_fallback) {
            bool all = true;
            for (size_t k = 0; k < s_n; k++) all &= b->fallback[(uint8_t)s[k]] >= 0;
            if (all) {
                for (size_t k = 0; k < s_n; k++) w->id[m++] = b->fallback[(uint8_t)s[k]];
                continue;
            }
        }
        if (!b->unk_token) continue;
        if (b->unk < 0)
            return fail(ERR_INPUT, "the text holds \"%.*s\", which needs unk_token \"%s\", which the vocabulary lacks", (int)s_n, s, b->unk_token);
        if (pending && !b->fuse_unk) w->id[m++] = b->unk;
        pending = true;
    }
    if (pending) w->id[m++] = b->unk;
    *n_symbols = m;
    return OK;
}

static size_t merge_short(const struct bpe *b, int32_t *id, size_t n)
{
    uint32_t rank[SHORT_WORD];
    int32_t joined[SHORT_WORD];
    for (size_t i = 0; i + 1 < n; i++) rank[i] = merge_rank(b, id[i], id[i + 1], &joined[i]);
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++) if (rank[i] < rank[best]) best = i;
        if (rank[best] == (uint32_t)NO_RANK) break;
        id[best] = joined[best];
        n--;
        memmove(id + best + 1, id + best + 2, (n - best - 1) * sizeof *id);
        if (best + 1 < n) {
            memmove(rank + best + 1, rank + best + 2, (n - best - 2) * sizeof *rank);
            memmove(joined + best + 1, joined + best + 2, (n - best - 2) * sizeof *joined);
            rank[best] = merge_rank(b, id[best], id[best + 1], &joined[best]);
        }
        if (best > 0) rank[best - 1] = merge_rank(b, id[best - 1], id[best], &joined[best - 1]);
    }
    return n;
}

static void heap_down(uint64_t *heap, size_t n, size_t i)
{
    uint64_t v = heap[i];
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && heap[child + 1] < heap[child]) child++;
        if (v <= heap[child]) break;
        heap[i] = heap[child];
    }
    heap[i] = v;
}

static void heap_push(struct bpe_work *w, uint64_t v)
{
    if (w->heap_n == w->heap_capacity) {
        w->heap_capacity = w->heap_capacity ? 2 * w->heap_capacity : 1024;
        w->heap = xrealloc(w->heap, w->heap_capacity * sizeof *w->heap);
    }
    size_t i = w->heap_n++;
    for (size_t parent; i && v < w->heap[parent = (i - 1) / 2]; i = parent) w->heap[i] = w->heap[parent];
    w->heap[i] = v;
}

/* Heap entries are not removed when a neighbour changes; one counts only while rank[position] is still its rank. */
static size_t merge_long(const struct bpe *b, struct bpe_work *w, size_t n)
{
    int32_t *id = w->id, *next = w->next, *prev = w->prev, count = (int32_t)n;
    w->heap_n = 0;
    for (int32_t i = 0; i < count; i++) {
        next[i] = i + 1;
        prev[i] = i - 1;
        w->rank[i] = i + 1 < count ? merge_rank(b, id[i], id[i + 1], &w->joined[i]) : (uint32_t)NO_RANK;
        if (w->rank[i] != (uint32_t)NO_RANK) heap_push(w, (uint64_t)w->rank[i] << 32 | (uint32_t)i);
    }
    while (w->heap_n) {
        uint64_t top = w->heap[0];
        w->heap[0] = w->heap[--w->heap_n];
        if (w->heap_n) heap_down(w->heap, w->heap_n, 0);
        int32_t i = (int32_t)(uint32_t)top;
        if (w->rank[i] != (uint32_t)(top >> 32)) continue;
        int32_t dead = next[i];
        id[i] = w->joined[i];
        next[i] = next[dead];
        w->rank[dead] = (uint32_t)NO_RANK;
        if (next[i] < count) prev[next[i]] = i;
        for (int side = 0; side < 2; side++) {
            int32_t left = side ? i : prev[i];
            if (left < 0) continue;
            w->rank[left] = next[left] < count ? merge_rank(b, id[left], id[next[left]], &w->joined[left]) : (uint32_t)NO_RANK;
            if (w->rank[left] != (uint32_t)NO_RANK) heap_push(w, (uint64_t)w->rank[left] << 32 | (uint32_t)left);
        }
    }
    size_t m = 0;
    for (int32_t i = 0; i < count; i = next[i]) id[m++] = id[i];
    return m;
}

static int encode_piece(const struct bpe *b, struct bpe_work *w, const char *word, size_t n, struct id_list *out)
{
    uint32_t hash = hash_bytes(word, n);
    struct cache_slot *slot = n <= CACHE_BYTES ? &w->cache[hash % CACHE_SLOTS] : NULL;
    if (slot && slot->hash == hash && slot->n_bytes == n && !memcmp(slot->bytes, word, n)) {
        for (int i = 0; i < slot->n_ids; i++) id_list_add(out, slot->ids[i]);
        return OK;
    }
    size_t first = out->n, m = 0;
    int32_t whole = b->ignore_merges ? find(b, b->raw_bytes, word, n) : -1;
    if (whole >= 0) id_list_add(out, whole);
    else {
        if (n > INT32_MAX / 4) return fail(ERR_INPUT, "the text holds a word of %zu bytes; break it up", n);
        int rc = first_symbols(b, w, word, n, &m);
        if (rc != OK) return rc;
        m = m <= SHORT_WORD ? merge_short(b, w->id, m) : merge_long(b, w, m);
        for (size_t i = 0; i < m; i++) id_list_add(out, w->id[i]);
    }
    size_t n_ids = out->n - first;
    if (slot && n_ids <= CACHE_IDS) {
        slot->hash = hash;
        slot->n_bytes = (uint8_t)n;
        slot->n_ids = (uint8_t)n_ids;
        memcpy(slot->bytes, word, n);
        if (n_ids) memcpy(slot->ids, out->ids + first, n_ids * sizeof *slot->ids);
    }
    return OK;
}

int bpe_encode(const struct bpe *b, struct bpe_work *w, const char *word, size_t n, struct id_list *out)
{
    int rc = OK;
    if (!n) return OK;
    if (!b->break_at_metaspace) return encode_piece(b, w, word, n, out);
    size_t start = 0;
    for (size_t i = 1; i < n; i++) {
        const char *p = memchr(word + i, METASPACE[0], n - i);
        if (!p) break;
        i = (size_t)(p - word);
        bool here = n - i >= 3 && !memcmp(p, METASPACE, 3), before = i >= 3 && !memcmp(p - 3, METASPACE, 3);
        if (!here || before) continue;
        TRY(encode_piece(b, w, word + start, i - start, out));
        start = i;
    }
    TRY(encode_piece(b, w, word + start, n - start, out));
out:
    return rc;
}
