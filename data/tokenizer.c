/* tokenizer.json as a whole: added tokens, the way of a text through the parts, identity, and tokenizer_config.json. See tokenizer.h.
 *
 * A text is cut at added tokens (leftmost, then longest) that match it as it is; each stretch between is normalized, cut at the
 * added tokens that match normalized text, split into words, and each word encoded by the BPE model.
 */
#include "data/tokenizer.h"

#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "data/bpe.h"
#include "data/tokenizer_parts.h"
#include "data/tokenizer_unicode.h"

enum { MAX_FILE = 256 << 20, MAX_CONFIG = 64 << 20, MAX_ADDED_BYTES = 4096, MAX_PROCESSOR_DEPTH = 8 };

struct added { char *content, *pattern; size_t n, pattern_n; int32_t id; bool special, normalized, lstrip, rstrip, single_word; };

/* Added tokens by their bytes: `first` by the first byte, then lists of siblings. */
struct trie_node { int32_t child, sibling, added; uint8_t byte; };
struct trie { struct trie_node *nodes; int32_t n, capacity, first[256]; };

struct tokenizer {
    struct bpe *bpe;
    struct normalizer *normalizer;
    struct pre_tokenizer *pre_tokenizer;
    struct decoder *decoder;
    struct added *added;
    int n_added;
    struct trie contents;                   /* all of them, as the file spells them */
    struct trie raw, normalized;            /* those that match the text as given, and as normalized */
    int32_t size, holes;
    int32_t *added_of;                      /* [size] index of the added token of an id, or -1 */
    struct { size_t at, n; } *bytes;        /* [size] what a token stands for, in `pool` */
    struct buffer pool;
    char *canonical_parts[4];               /* model options, normalizer, post_processor, pre_tokenizer */
    char *template_first;                   /* the special token the post-processor puts in front */
    int32_t bos, eos, pad;
    bool add_bos;
    char *chat_template;
};

struct tokenizer_work {
    struct bpe_work *bpe;
    struct parts_work *parts;
    struct id_list ids;
    struct buffer normal;
};

/* ---- added tokens ---- */

static int32_t trie_child(const struct trie *t, const int32_t *list, uint8_t byte)
{
    for (int32_t i = *list; i >= 0; i = t->nodes[i].sibling) if (t->nodes[i].byte == byte) return i;
    return -1;
}

static void trie_init(struct trie *t)
{
    for (int i = 0; i < 256; i++) t->first[i] = -1;
}

/* false when the same bytes are there already */
static bool trie_add(struct trie *t, const char *s, size_t n, int32_t added)
{
    int32_t node = -1;
    for (size_t i = 0; i < n; i++) {
        int32_t *list = node < 0 ? &t->first[(uint8_t)s[0]] : &t->nodes[node].child, next = trie_child(t, list, (uint8_t)s[i]);
        if (next < 0) {
            if (t->n == t->capacity) {
                t->capacity = t->capacity ? 2 * t->capacity : 256;
                t->nodes = xrealloc(t->nodes, (size_t)t->capacity * sizeof *t->nodes);
                list = node < 0 ? &t->first[(uint8_t)s[0]] : &t->nodes[node].child;
            }
            next = t->n++;
            t->nodes[next] = (struct trie_node){-1, *list, -1, (uint8_t)s[i]};
            *list = next;
        }
        node = next;
    }
    if (t->nodes[node].added >= 0) return false;
    t->nodes[node].added = added;
    return true;
}

/* The longest token that starts at `s`, or -1. */
static int32_t trie_longest(const struct trie *t, const char *s, size_t n)
{
    int32_t found = -1, node = t->first[(uint8_t)*s];
    for (size_t i = 0; node >= 0;) {
        if (t->nodes[node].added >= 0) found = t->nodes[node].added;
        if (++i == n) break;
        node = t->nodes[node].child;
        while (node >= 0 && t->nodes[node].byte != (uint8_t)s[i]) node = t->nodes[node].sibling;
    }
    return found;
}

typedef int piece_sink(void *context, const struct added *token, const char *text, size_t start, size_t end);

/* Cuts a text at the tokens of a trie: the sink gets every stretch, with the token it is or NULL. A token may take spaces beside it
 * (lstrip, rstrip) or ask to stand alone (single_word); one that is refused for that still ends the search in its bytes. */
static int cut_at_added(const struct tokenizer *t, const struct trie *trie, const char *text, size_t n, piece_sink *sink, void *context)
{
    int rc = OK;
    size_t done = 0;
    for (size_t i = 0; trie->n && i < n;) {
        int32_t k = -1;
        while (i < n && (trie->first[(uint8_t)text[i]] < 0 || (k = trie_longest(trie, text + i, n - i)) < 0)) i++;
        if (i == n) break;
        const struct added *a = &t->added[k];
        size_t start = i, stop = i + a->pattern_n;
        i = stop;
        if (a->single_word) {
            const char *after = text + stop;
            if (start > 0 && unicode_is_word(utf8_before(text + start))) continue;
            if (stop < n && unicode_is_word(utf8_next(&after))) continue;
        }
        if (a->lstrip) {
            while (start > 0 && unicode_is_space(utf8_before(text + start))) {
                do start--; while (((uint8_t)text[start] & 0xc0) == 0x80);
            }
            if (start < done) start = done;
        }
        for (const char *p = text + stop; a->rstrip && stop < n && unicode_is_space(utf8_next(&p));) stop = (size_t)(p - text);
        if (done < start) TRY(sink(context, NULL, text, done, start));
        TRY(sink(context, a, text, start, stop));
        done = stop;
    }
    if (done < n) TRY(sink(context, NULL, text, done, n));
out:
    return rc;
}

static int find_added(const struct tokenizer *t, const char *content)
{
    int32_t node = -1;
    for (size_t i = 0; content[i]; i++) {
        node = trie_child(&t->contents, i ? &t->contents.nodes[node].child : &t->contents.first[(uint8_t)content[0]], (uint8_t)content[i]);
        if (node < 0) return -1;
    }
    return node < 0 ? -1 : t->contents.nodes[node].added;
}

static int read_added_token(struct tokenizer *t, const json_t *o, struct parts_work *w, int32_t *next_id, const char *where)
{
    static const char *const keys[] = {"special", "normalized", "lstrip", "rstrip", "single_word"};
    struct added a = {0};
    bool *const flags[] = {&a.special, &a.normalized, &a.lstrip, &a.rstrip, &a.single_word};
    const char *content, *key, *pattern;
    json_t *value;
    int rc = OK;
    if (!json_is_object(o) || !json_is_string(json_object_get(o, "content")) || !json_is_integer(json_object_get(o, "id")))
        return fail(ERR_INPUT, "%s: an entry has no \"content\" string or no integer \"id\"", where);
    content = json_string_value(json_object_get(o, "content"));
    json_object_foreach((json_t *)o, key, value) {
        int i = 0;
        while (i < 5 && strcmp(keys[i], key)) i++;
        if (i == 5 && strcmp(key, "content") && strcmp(key, "id"))
            return fail(ERR_INPUT, "%s: key \"%s\" of \"%s\" is not implemented", where, key, content);
    }
    for (int i = 0; i < 5; i++) {
        value = json_object_get(o, keys[i]);
        if (!json_is_boolean(value)) return fail(ERR_INPUT, "%s: key \"%s\" of \"%s\" is not true or false", where, keys[i], content);
        *flags[i] = json_is_true(value);
    }
    a.n = strlen(content);
    if (!a.n) return OK;   /* matches nothing, has no id of its own */
    if (a.n > MAX_ADDED_BYTES) return fail(ERR_INPUT, "%s: a token has %zu bytes, more than the %d this program reads", where, a.n, MAX_ADDED_BYTES);
    /* ids are not the file's choice: a token of the vocabulary has that one's, the others follow the number of its entries */
    int64_t id = json_integer_value(json_object_get(o, "id"));
    int same = find_added(t, content);
    a.id = same >= 0 ? t->added[same].id : bpe_find(t->bpe, content, a.n);
    if (a.id < 0) a.id = *next_id;
    if (id != a.id)
        return fail(ERR_INPUT, "%s: \"%s\" has id %lld in the list but other readers give it %d: its id must be the vocabulary's, or follow the "
                    "vocabulary's size", where, content, (long long)id, (int)a.id);
    if (same >= 0) return fail(ERR_INPUT, "%s: \"%s\" is listed twice", where, content);
    if (a.id == *next_id) {
        size_t other_n;
        const char *other = bpe_text(t->bpe, a.id, &other_n);
        if (other && strcmp(other, content))
            return fail(ERR_INPUT, "%s: \"%s\" has id %d, which is \"%s\" in the vocabulary", where, content, (int)a.id, other);
        if (!other) ++*next_id;
    }
    size_t lead = 0;
    if (a.normalized) TRY(normalizer_run(t->normalizer, w, content, a.n, true, &lead, &pattern, &a.pattern_n));
    else { pattern = content; a.pattern_n = a.n; }
    if (!a.pattern_n) { rc = fail(ERR_INPUT, "%s: nothing is left of \"%s\" after normalization", where, content); goto out; }
    if (!trie_add(a.normalized ? &t->normalized : &t->raw, pattern, a.pattern_n, t->n_added)) {
        rc = fail(ERR_INPUT, "%s: \"%s\" is the same as another token after normalization", where, content);
        goto out;
    }
    trie_add(&t->contents, content, a.n, t->n_added);
    a.content = xstrdup(content);
    a.pattern = xstrndup(pattern, a.pattern_n);
    t->added[t->n_added++] = a;
out:
    return rc;
}

static int read_added(struct tokenizer *t, const json_t *list, const char *path)
{
    int rc = OK;
    int32_t next_id = bpe_count(t->bpe);
    struct parts_work *w = parts_work_new(t->pre_tokenizer);
    char *where = xasprintf("%s: added_tokens", path);
    if (list && !json_is_null(list) && !json_is_array(list)) { rc = fail(ERR_INPUT, "%s is not a list", where); goto out; }
    t->added = xcalloc(json_array_size(list), sizeof *t->added);
    for (size_t i = 0; i < json_array_size(list); i++) TRY(read_added_token(t, json_array_get(list, i), w, &next_id, where));
    t->size = bpe_size(t->bpe);
    for (int i = 0; i < t->n_added; i++) if (t->added[i].id >= t->size) t->size = t->added[i].id + 1;
    t->added_of = xmalloc((size_t)t->size * sizeof *t->added_of);
    for (int32_t i = 0; i < t->size; i++) t->added_of[i] = -1;
    for (int i = 0; i < t->n_added; i++) t->added_of[t->added[i].id] = i;
    t->bytes = xcalloc((size_t)t->size, sizeof *t->bytes);
    for (int32_t i = 0; i < t->size; i++) {
        size_t n;
        const char *text = bpe_text(t->bpe, i, &n);
        t->bytes[i].at = t->pool.n;
        if (t->added_of[i] >= 0) buffer_add(&t->pool, t->added[t->added_of[i]].content, t->added[t->added_of[i]].n);
        else if (text) decoder_token(t->decoder, w, text, n, &t->pool);
        else t->holes++;
        t->bytes[i].n = t->pool.n - t->bytes[i].at;
        buffer_add(&t->pool, "", 1);
    }
out:
    parts_work_free(w);
    free(where);
    return rc;
}

/* ---- opening ---- */

/* Post-processors put special tokens around a text, which encode() does not; what is read is which one comes first. */
static int read_post_processor(struct tokenizer *t, const json_t *o, const char *where, int depth)
{
    if (!o || json_is_null(o)) return OK;
    const char *type = json_string_value(json_object_get(o, "type")), *first = NULL;
    if (!type) return fail(ERR_INPUT, "%s: key \"type\" is not a string", where);
    if (!strcmp(type, "ByteLevel")) return OK;
    if (!strcmp(type, "Sequence")) {
        const json_t *members = json_object_get(o, "processors");
        if (!json_is_array(members) || depth > MAX_PROCESSOR_DEPTH) return fail(ERR_INPUT, "%s: \"processors\" is not a list or too deep", where);
        for (size_t i = 0; i < json_array_size(members); i++) {
            int rc = read_post_processor(t, json_array_get(members, i), where, depth + 1);
            if (rc != OK) return rc;
        }
        return OK;
    }
    if (!strcmp(type, "TemplateProcessing")) {
        const json_t *single = json_object_get(o, "single");
        if (!json_is_array(single)) return fail(ERR_INPUT, "%s: \"single\" of TemplateProcessing is not a list", where);
        first = json_string_value(json_object_get(json_object_get(json_array_get(single, 0), "SpecialToken"), "id"));
    } else if (!strcmp(type, "RobertaProcessing") || !strcmp(type, "BertProcessing")) {
        first = json_string_value(json_array_get(json_object_get(o, "cls"), 0));
    } else return fail(ERR_INPUT, "%s: type \"%s\" is not implemented", where, type);
    if (first && !t->template_first) t->template_first = xstrdup(first);
    return OK;
}

static int check_top_keys(const json_t *root, const char *path)
{
    static const char *const known[] = {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor",
                                        "decoder", "model", NULL};
    const char *key;
    json_t *value;
    if (!json_is_object(root)) return fail(ERR_INPUT, "%s: not a JSON object", path);
    json_object_foreach((json_t *)root, key, value) {
        int i = 0;
        while (known[i] && strcmp(known[i], key)) i++;
        if (!known[i] && !json_is_null(value)) return fail(ERR_INPUT, "%s: key \"%s\" is not one this program implements", path, key);
    }
    const json_t *version = json_object_get(root, "version");
    if (version && !json_is_null(version) && !(json_is_string(version) && !strcmp(json_string_value(version), "1.0")))
        return fail(ERR_INPUT, "%s: version is not \"1.0\"", path);
    if (!json_is_object(json_object_get(root, "model"))) return fail(ERR_INPUT, "%s: key \"model\" is not an object", path);
    return OK;
}

static char *canonical(const json_t *value)
{
    return value ? json_canonical(value) : xstrdup("null");
}

static int read_tokenizer(struct tokenizer *t, const char *path)
{
    json_t *root = NULL, *options = NULL;
    char *at_normalizer = xasprintf("%s: normalizer", path), *at_pre = xasprintf("%s: pre_tokenizer", path);
    char *at_decoder = xasprintf("%s: decoder", path), *at_post = xasprintf("%s: post_processor", path);
    int rc = OK;
    TRY(json_read_file(path, MAX_FILE, &root));
    TRY(check_top_keys(root, path));
    const json_t *normalizer = json_object_get(root, "normalizer"), *pre = json_object_get(root, "pre_tokenizer");
    const json_t *post = json_object_get(root, "post_processor");
    TRY(normalizer_open(&t->normalizer, normalizer, at_normalizer));
    TRY(pre_tokenizer_open(&t->pre_tokenizer, pre, at_pre));
    TRY(decoder_open(&t->decoder, json_object_get(root, "decoder"), at_decoder));
    TRY(read_post_processor(t, post, at_post, 0));
    TRY(bpe_open(&t->bpe, json_object_get(root, "model"), pre_tokenizer_raw_bytes(t->pre_tokenizer), path));
    TRY(read_added(t, json_object_get(root, "added_tokens"), path));
    for (int i = 0; i < 2; i++) {
        const char *key = i ? "padding" : "truncation";
        const json_t *v = json_object_get(root, key);
        if (v && !json_is_null(v)) warn("%s: \"%s\" is ignored: texts are encoded whole", path, key);
    }
    options = bpe_options(t->bpe);
    t->canonical_parts[0] = canonical(options);
    t->canonical_parts[1] = canonical(normalizer);
    t->canonical_parts[2] = canonical(post);
    t->canonical_parts[3] = canonical(pre);
out:
    json_decref(options);
    json_decref(root);
    free(at_normalizer);
    free(at_pre);
    free(at_decoder);
    free(at_post);
    return rc;
}

/* A token of tokenizer_config.json: a string or {"content": ...}. */
static int read_config_token(const struct tokenizer *t, const json_t *config, const char *key, const char *path, int32_t *id)
{
    const json_t *v = json_object_get(config, key);
    *id = -1;
    if (json_is_object(v)) v = json_object_get(v, "content");
    if (!v || json_is_null(v)) return OK;
    if (!json_is_string(v)) return fail(ERR_INPUT, "%s: %s is neither a string nor an object with \"content\"", path, key);
    *id = tokenizer_id_of(t, json_string_value(v));
    if (*id < 0) warn("%s: %s \"%s\" is not a token of the tokenizer; ignored", path, key, json_string_value(v));
    return OK;
}

static int read_chat_template(struct tokenizer *t, const json_t *config, const char *dir)
{
    const json_t *v = json_object_get(config, "chat_template"), *named;
    char *path = NULL;
    size_t bytes;
    int rc = OK;
    for (size_t i = 0; json_is_array(v) && i < json_array_size(v); i++) {   /* several by name: "default", else the first */
        named = json_array_get(v, i);
        const char *name = json_string_value(json_object_get(named, "name")), *text = json_string_value(json_object_get(named, "template"));
        if (!text || (t->chat_template && (!name || strcmp(name, "default")))) continue;
        free(t->chat_template);
        t->chat_template = xstrdup(text);
    }
    if (json_is_string(v)) t->chat_template = xstrdup(json_string_value(v));
    path = path_join(dir, "chat_template.jinja");
    if (!t->chat_template && path_exists(path)) TRY(file_read(path, MAX_CONFIG, &t->chat_template, &bytes));
out:
    free(path);
    return rc;
}

static int read_config(struct tokenizer *t, const char *dir)
{
    char *path = path_join(dir, "tokenizer_config.json");
    json_t *config = NULL;
    int rc = OK;
    if (path_exists(path)) {
        TRY(json_read_file(path, MAX_CONFIG, &config));
        if (!json_is_object(config)) { rc = fail(ERR_INPUT, "%s: not a JSON object", path); goto out; }
    }
    TRY(read_config_token(t, config, "bos_token", path, &t->bos));
    TRY(read_config_token(t, config, "eos_token", path, &t->eos));
    TRY(read_config_token(t, config, "pad_token", path, &t->pad));
    TRY(read_chat_template(t, config, dir));
    int32_t first = t->template_first ? tokenizer_id_of(t, t->template_first) : -1;
    if (t->bos < 0 && !json_object_get(config, "bos_token")) t->bos = first;
    TRY(json_get_bool(config, "add_bos_token", path, first >= 0 && first == t->bos, &t->add_bos));
    t->add_bos &= t->bos >= 0;
out:
    json_decref(config);
    free(path);
    return rc;
}

int tokenizer_open(struct tokenizer **out, const char *path)
{
    struct tokenizer *t = xcalloc(1, sizeof *t);
    bool is_dir = path_is_dir(path);
    char *file = is_dir ? path_join(path, "tokenizer.json") : xstrdup(path), *dir = xstrdup(path);
    char *slash = is_dir ? NULL : strrchr(dir, '/');
    int rc = OK;
    *out = NULL;
    trie_init(&t->contents);
    trie_init(&t->raw);
    trie_init(&t->normalized);
    t->bos = t->eos = t->pad = -1;
    if (!is_dir && !slash) strcpy(dir, *dir ? "." : "");
    else if (slash) slash[slash == dir] = 0;
    TRY(read_tokenizer(t, file));
    TRY(read_config(t, dir));
    *out = t;
    t = NULL;
out:
    tokenizer_close(t);
    free(file);
    free(dir);
    return rc;
}

void tokenizer_close(struct tokenizer *t)
{
    if (!t) return;
    bpe_close(t->bpe);
    normalizer_close(t->normalizer);
    pre_tokenizer_close(t->pre_tokenizer);
    decoder_close(t->decoder);
    for (int i = 0; i < t->n_added; i++) {
        free(t->added[i].content);
        free(t->added[i].pattern);
    }
    free(t->added);
    free(t->contents.nodes);
    free(t->raw.nodes);
    free(t->normalized.nodes);
    free(t->added_of);
    free(t->bytes);
    free(t->pool.data);
    for (int i = 0; i < 4; i++) free(t->canonical_parts[i]);
    free(t->template_first);
    free(t->chat_template);
    free(t);
}

/* ---- encoding and decoding ---- */

struct tokenizer_work *tokenizer_work_new(const struct tokenizer *t)
{
    struct tokenizer_work *w = xcalloc(1, sizeof *w);
    w->bpe = bpe_work_new(t->bpe);
    w->parts = parts_work_new(t->pre_tokenizer);
    return w;
}

void tokenizer_work_free(struct tokenizer_work *w)
{
    if (!w) return;
    bpe_work_free(w->bpe);
    parts_work_free(w->parts);
    free(w->ids.ids);
    free(w->normal.data);
    free(w);
}

/* One text on its way. `words` is false when only the normalized text is wanted. */
struct passage { const struct tokenizer *t; struct tokenizer_work *w; bool recent, words; size_t lead; };

static int encode_word(void *context, const char *word, size_t n)
{
    struct passage *p = context;
    return bpe_encode(p->t->bpe, p->w->bpe, word, n, &p->w->ids);
}

static int take_normalized(void *context, const struct added *token, const char *text, size_t start, size_t end)
{
    struct passage *p = context;
    size_t lead = p->lead > start ? p->lead - start : 0;
    if (!p->words) buffer_add(&p->w->normal, token ? token->pattern : text + start, token ? token->pattern_n : end - start);
    else if (token) id_list_add(&p->w->ids, token->id);
    else return pre_tokenizer_run(p->t->pre_tokenizer, p->w->parts, text + start, end - start, p->recent, lead, encode_word, p);
    return OK;
}

static int take_raw(void *context, const struct added *token, const char *text, size_t start, size_t end)
{
    struct passage *p = context;
    const char *normal, *after = text + start;
    size_t n;
    int rc = OK;
    if (token) {
        if (p->words) id_list_add(&p->w->ids, token->id);
        else buffer_add(&p->w->normal, token->content, token->n);
        return OK;
    }
    utf8_next(&after);
    p->lead = start ? 0 : (size_t)(after - text);
    TRY(normalizer_run(p->t->normalizer, p->w->parts, text + start, end - start, p->recent, &p->lead, &normal, &n));
    TRY(cut_at_added(p->t, &p->t->normalized, normal, n, take_normalized, p));
out:
    return rc;
}

static int pass(const struct tokenizer *t, struct tokenizer_work *w, const char *text, size_t bytes, bool words)
{
    struct passage p = {.t = t, .w = w, .words = words};
    int64_t bad = utf8_check(text, bytes, &p.recent);
    if (bad >= 0) return fail(ERR_INPUT, "the text is not valid UTF-8 at byte %lld; convert it first", (long long)bad);
    return cut_at_added(t, &t->raw, text, bytes, take_raw, &p);
}

int tokenizer_encode(const struct tokenizer *t, struct tokenizer_work *w, const char *text, size_t bytes, const int32_t **ids, size_t *n)
{
    w->ids.n = 0;
    int rc = pass(t, w, text, bytes, true);
    *ids = w->ids.ids;
    *n = rc == OK ? w->ids.n : 0;
    return rc;
}

int tokenizer_normalize(const struct tokenizer *t, struct tokenizer_work *w, const char *text, size_t bytes,
                        const char **normalized, size_t *normalized_bytes)
{
    w->normal.n = 0;
    buffer_add(&w->normal, "", 0);
    int rc = pass(t, w, text, bytes, false);
    *normalized = w->normal.data;
    *normalized_bytes = w->normal.n;
    return rc;
}

int tokenizer_decode(const struct tokenizer *t, struct tokenizer_work *w, const int32_t *ids, size_t n, bool skip_special,
                     const char **text, size_t *bytes)
{
    decoder_start(w->parts);
    for (size_t i = 0; i < n; i++) {
        size_t token_n = 0;
        const char *token = tokenizer_token_text(t, ids[i]);
        if (!token) return fail(ERR_INPUT, "id %d at position %zu is no token: the vocabulary has %d ids", (int)ids[i], i, (int)t->size);
        const struct added *a = t->added_of[ids[i]] >= 0 ? &t->added[t->added_of[ids[i]]] : NULL;
        if (a && a->special && skip_special) continue;
        if (!a) token = bpe_text(t->bpe, ids[i], &token_n);
        if (a) decoder_add(w->parts, a->pattern, a->pattern_n);   /* a normalized token goes back through the decoder as it matched */
        else decoder_add(w->parts, token, token_n);
    }
    return decoder_finish(t->decoder, w->parts, text, bytes);
}

/* ---- the vocabulary ---- */

int32_t tokenizer_vocab_size(const struct tokenizer *t) { return t->size; }
int32_t tokenizer_holes(const struct tokenizer *t) { return t->holes; }
int32_t tokenizer_bos(const struct tokenizer *t) { return t->bos; }
int32_t tokenizer_eos(const struct tokenizer *t) { return t->eos; }
int32_t tokenizer_pad(const struct tokenizer *t) { return t->pad; }
bool tokenizer_add_bos(const struct tokenizer *t) { return t->add_bos; }
const char *tokenizer_chat_template(const struct tokenizer *t) { return t->chat_template; }
int64_t tokenizer_n_merges(const struct tokenizer *t) { return bpe_n_merges(t->bpe); }

const char *tokenizer_token_text(const struct tokenizer *t, int32_t id)
{
    size_t n;
    if (id < 0 || id >= t->size) return NULL;
    return t->added_of[id] >= 0 ? t->added[t->added_of[id]].content : bpe_text(t->bpe, id, &n);
}

const char *tokenizer_token_bytes(const struct tokenizer *t, int32_t id, size_t *bytes)
{
    if (!tokenizer_token_text(t, id)) return NULL;
    *bytes = t->bytes[id].n;
    return t->pool.data + t->bytes[id].at;
}

enum token_kind tokenizer_token_kind(const struct tokenizer *t, int32_t id)
{
    const char *text = tokenizer_token_text(t, id);
    if (!text) return TOKEN_HOLE;
    if (t->added_of[id] >= 0) return t->added[t->added_of[id]].special ? TOKEN_SPECIAL : TOKEN_ADDED;
    uint8_t byte;
    return bpe_byte_fallback(t->bpe) && byte_token(text, strlen(text), &byte) ? TOKEN_BYTE : TOKEN_NORMAL;
}

bool tokenizer_merge(const struct tokenizer *t, int64_t rank, const char **left, const char **right)
{
    int32_t l, r;
    size_t n;
    if (rank < 0 || rank >= bpe_n_merges(t->bpe)) return false;
    bpe_merge(t->bpe, rank, &l, &r);
    *left = bpe_text(t->bpe, l, &n);
    *right = bpe_text(t->bpe, r, &n);
    return true;
}

int32_t tokenizer_id_of(const struct tokenizer *t, const char *token_text)
{
    int i = find_added(t, token_text);
    return i >= 0 ? t->added[i].id : bpe_find(t->bpe, token_text, strlen(token_text));
}

bool tokenizer_same_vocab(const struct tokenizer *a, const struct tokenizer *b, int32_t *first_difference)
{
    int32_t size = a->size < b->size ? a->size : b->size;
    for (int32_t i = 0; i < size; i++) {
        size_t n = 0, m = 0;
        const char *x = tokenizer_token_bytes(a, i, &n), *y = tokenizer_token_bytes(b, i, &m);
        bool special = (tokenizer_token_kind(a, i) == TOKEN_SPECIAL) == (tokenizer_token_kind(b, i) == TOKEN_SPECIAL);
        if (!x == !y && n == m && special && (!x || !memcmp(x, y, n))) continue;
        *first_difference = i;
        return false;
    }
    return true;
}

/* ---- identity ---- */

/* As Python's json.dumps(s, ensure_ascii=False) writes it. */
static void hash_string(struct sha256 *h, const char *s)
{
    static const char controls[] = "\bb\ff\nn\rr\tt";
    struct buffer b = {0};
    buffer_add(&b, "\"", 1);
    for (; *s; s++) {
        char escape[8] = "";
        if (*s == '"' || *s == '\\') snprintf(escape, sizeof escape, "\\%c", *s);
        else if ((uint8_t)*s < 0x20) {
            const char *c = strchr(controls, *s);
            if (c) snprintf(escape, sizeof escape, "\\%c", c[1]);
            else snprintf(escape, sizeof escape, "\\u%04x", (unsigned)*s);
        }
        if (*escape) buffer_add_string(&b, escape);
        else buffer_add(&b, s, 1);
    }
    buffer_add(&b, "\"", 1);
    sha256_add(h, b.data, b.n);
    free(b.data);
}

static void hash_plain(struct sha256 *h, const char *s) { sha256_add(h, s, strlen(s)); }

static int compare_added(const void *x, const void *y)
{
    const struct added *a = *(const struct added *const *)x, *b = *(const struct added *const *)y;
    return (a->id > b->id) - (a->id < b->id);
}

struct entry { const char *text; int32_t id; };
static int compare_entries(const void *x, const void *y) { return strcmp(((const struct entry *)x)->text, ((const struct entry *)y)->text); }

void tokenizer_hash(const struct tokenizer *t, char hex[SHA256_HEX])
{
    struct sha256 *h = sha256_new();
    const struct added **added = xmalloc((size_t)t->n_added * sizeof *added);
    struct entry *entries = xmalloc((size_t)bpe_count(t->bpe) * sizeof *entries);
    char number[32];
    int32_t n = 0;
    hash_plain(h, "{\"added_tokens\":[");
    for (int i = 0; i < t->n_added; i++) added[i] = &t->added[i];
    qsort(added, (size_t)t->n_added, sizeof *added, compare_added);
    for (int i = 0; i < t->n_added; i++) {
        const struct added *a = added[i];
        hash_plain(h, i ? ",{\"content\":" : "{\"content\":");
        hash_string(h, a->content);
        char *flags = xasprintf(",\"id\":%d,\"lstrip\":%s,\"normalized\":%s,\"rstrip\":%s,\"single_word\":%s,\"special\":%s}", (int)a->id,
                                a->lstrip ? "true" : "false", a->normalized ? "true" : "false", a->rstrip ? "true" : "false",
                                a->single_word ? "true" : "false", a->special ? "true" : "false");
        hash_plain(h, flags);
        free(flags);
    }
    hash_plain(h, "],\"merges\":[");
    const char *left, *right;
    for (int64_t i = 0; tokenizer_merge(t, i, &left, &right); i++) {
        hash_plain(h, i ? ",[" : "[");
        hash_string(h, left);
        hash_plain(h, ",");
        hash_string(h, right);
        hash_plain(h, "]");
    }
    static const char *const keys[] = {"],\"model\":", ",\"normalizer\":", ",\"post_processor\":", ",\"pre_tokenizer\":"};
    for (int i = 0; i < 4; i++) {
        hash_plain(h, keys[i]);
        hash_plain(h, t->canonical_parts[i]);
    }
    hash_plain(h, ",\"vocab\":{");
    for (int32_t i = 0; i < bpe_size(t->bpe); i++) {
        size_t bytes;
        const char *text = bpe_text(t->bpe, i, &bytes);
        if (text) entries[n++] = (struct entry){text, i};
    }
    qsort(entries, (size_t)n, sizeof *entries, compare_entries);
    for (int32_t i = 0; i < n; i++) {
        if (i) hash_plain(h, ",");
        hash_string(h, entries[i].text);
        snprintf(number, sizeof number, ":%d", (int)entries[i].id);
        hash_plain(h, number);
    }
    hash_plain(h, "}}");
    sha256_hex(h, hex);
    free(added);
    free(entries);
}

/* ---- llama.cpp's name ---- */

#define CONTRACTIONS "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
#define WORD "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+"
#define LINES "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define REST " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*" LINES
#define REST_SLASH " ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*" LINES
#define UPPER "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]"
#define LOWER "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
#define CASED(tail) "[^\\r\\n\\p{L}\\p{N}]?" UPPER "*" LOWER "+" tail "|[^\\r\\n\\p{L}\\p{N}]?" UPPER "+" LOWER "*" tail "|"
#define SPLIT "Split Isolated "
#define BYTES "\nByteLevel"
#define GPT2 SPLIT "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+" BYTES
#define HAN_KANA "[\xe4\xb8\x80-\xe9\xbe\xa5\xe3\x81\x80-\xe3\x82\x9f\xe3\x82\xa0-\xe3\x83\xbf]+"
#define HAN_HANGUL "[\xe4\xb8\x80-\xe9\xbe\xa5\xe0\xa0\x80-\xe4\xb8\x80\xea\xb0\x80-\xed\x9f\xbf]+"
#define DEEPSEEK_WORDS "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*"
#define DEEPSEEK_BOS "<\xef\xbd\x9c" "begin\xe2\x96\x81of\xe2\x96\x81sentence\xef\xbd\x9c>"
#define BLOOM_STOPS ".,!?\xe2\x80\xa6\xe3\x80\x82\xef\xbc\x8c\xe3\x80\x81\xe0\xa5\xa4\xdb\x94\xd8\x8c"

const char *tokenizer_gguf_pre(const struct tokenizer *t)
{
    /* names that split alike are told apart by a token only one family has; ignore_merges is part of what a name means */
    static const struct { const char *name, *signature; bool ignore_merges; const char *token; } known[] = {
        {"deepseek-r1-qwen", SPLIT CONTRACTIONS "|" WORD "|\\p{N}|" REST BYTES, false, DEEPSEEK_BOS},
        {"qwen2", SPLIT CONTRACTIONS "|" WORD "|\\p{N}|" REST BYTES, false, NULL},
        {"qwen35", SPLIT CONTRACTIONS "|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\\p{N}| ?[^\\s\\p{L}\\p{M}\\p{N}]+[\\r\\n]*" LINES BYTES, false, NULL},
        {"llama-bpe", SPLIT CONTRACTIONS "|" WORD "|\\p{N}{1,3}|" REST BYTES, true, NULL},
        {"dbrx", SPLIT CONTRACTIONS "|" WORD "|\\p{N}{1,3}|" REST BYTES, false, NULL},
        {"tekken", SPLIT CASED("") "\\p{N}|" REST_SLASH BYTES, true, NULL},
        {"gpt-4o", SPLIT CASED(CONTRACTIONS "?") "\\p{N}{1,3}|" REST_SLASH BYTES, false, NULL},
        {"deepseek-v3", SPLIT "\\p{N}{1,3}\n" SPLIT HAN_KANA "\n" SPLIT DEEPSEEK_WORDS "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+" BYTES, false, NULL},
        {"deepseek-coder", SPLIT "[\r\n]\n" SPLIT "\\s?\\p{L}+\n" SPLIT "\\s?\\p{P}+\n" SPLIT HAN_HANGUL "\nDigits Isolated" BYTES, false, NULL},
        {"gpt-2", GPT2, false, NULL},
        {"smollm", "Digits Isolated\n" GPT2, false, "<|im_start|>"},
        {"starcoder", "Digits Isolated\n" GPT2, false, NULL},
        {"falcon", "Punctuation Contiguous\n" GPT2 "\nDigits Contiguous\n" SPLIT "[0-9][0-9][0-9]", false, NULL},
        {"bloom", SPLIT " ?[^(\\s|[" BLOOM_STOPS "])]+" BYTES, false, NULL},
    };
    const char *name = NULL;
    if (!normalizer_is_nfc_or_none(t->normalizer)) return NULL;
    char *signature = pre_tokenizer_signature(t->pre_tokenizer);
    for (size_t i = 0; !name && i < sizeof known / sizeof *known; i++) {
        if (strcmp(signature, known[i].signature) || bpe_ignore_merges(t->bpe) != known[i].ignore_merges) continue;
        if (!known[i].token || tokenizer_id_of(t, known[i].token) >= 0) name = known[i].name;
    }
    free(signature);
    return name;
}
