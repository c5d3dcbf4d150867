/* Normalizers, pre-tokenizers and decoders, see tokenizer_parts.h.
 *
 * Pre-tokenizer steps call each other depth first, one piece at a time, so that no list of words is ever built and memory does not
 * grow with the text.
 */
#include "data/tokenizer_parts.h"

#include <stdarg.h>
#include <string.h>
#include <utf8proc.h>

#include "base/error.h"
#include "base/json.h"
#include "data/bpe.h"
#include "data/tokenizer_pattern.h"
#include "data/tokenizer_unicode.h"

enum { MAX_STEPS = 64, MAX_SEQUENCE_DEPTH = 8 };

enum step_kind { NORMAL_FORM, LOWERCASE, STRIP, STRIP_ACCENTS, REPLACE, PREPEND, BYTE_LEVEL, PREFIX_SPACE, SPLIT, METASPACE, BYTE_FALLBACK, FUSE };
enum behavior { REMOVED, ISOLATED, MERGED_WITH_PREVIOUS, MERGED_WITH_NEXT, CONTIGUOUS };
enum scheme { ALWAYS, FIRST, NEVER };
static const char *const behavior_names[] = {"Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"};
static const char *const scheme_names[] = {"always", "first", "never"};

struct step {
    enum step_kind kind;
    enum normal_form form;
    struct pattern *pattern;       /* SPLIT, REPLACE */
    char *name;                    /* pre-tokenizers: type and pattern as the file has them, for the signature */
    char *content;                 /* REPLACE, PREPEND, METASPACE and decoder STRIP (one character) */
    size_t content_n;
    enum behavior behavior;
    enum scheme scheme;
    bool invert, left, right, regex;
    int64_t start, stop;           /* decoder STRIP */
};
struct steps { struct step step[MAX_STEPS]; int n; };
struct normalizer { struct steps s; };
struct pre_tokenizer { struct steps s; };
struct decoder { struct steps s; bool none; };

struct span { size_t at, n; };
struct parts_work {
    struct pattern_work *pattern;
    struct buffer normal[2];
    struct normal_work normal_form;
    struct buffer *rewritten;      /* [n_steps] texts that a pre-tokenizer step rewrote */
    int n_steps;
    struct buffer tokens[2];       /* decoding: texts of tokens, before and after a step */
    struct span *spans[2];
    size_t spans_n[2], spans_capacity[2];
};

/* ---- reading steps ---- */

static void steps_free(struct steps *s)
{
    for (int i = 0; i < s->n; i++) {
        pattern_close(s->step[i].pattern);
        free(s->step[i].name);
        free(s->step[i].content);
    }
}

/* Every non-null key of `o` is one of the names, which end with NULL. */
static int only_keys(const json_t *o, const char *where, ...)
{
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)o, key, value) {
        va_list names;
        bool known = json_is_null(value);
        va_start(names, where);
        for (const char *name; !known && (name = va_arg(names, const char *));) known = !strcmp(name, key);
        va_end(names);
        if (!known) return fail(ERR_INPUT, "%s: key \"%s\" is not one this program implements", where, key);
    }
    return OK;
}

static int need_bool(const json_t *o, const char *key, const char *where, bool *value)
{
    const json_t *v = json_object_get(o, key);
    if (!json_is_boolean(v)) return fail(ERR_INPUT, "%s: key \"%s\" is not true or false", where, key);
    *value = json_is_true(v);
    return OK;
}

static int need_string(const json_t *o, const char *key, const char *where, const char **value)
{
    const json_t *v = json_object_get(o, key);
    if (!json_is_string(v)) return fail(ERR_INPUT, "%s: key \"%s\" is not a string", where, key);
    *value = json_string_value(v);
    return OK;
}

static int need_content(const json_t *o, const char *key, const char *where, bool one_character, struct step *s)
{
    const char *text = NULL, *end;
    int rc = OK;
    TRY(need_string(o, key, where, &text));
    end = text;
    if (*text) utf8_next(&end);
    if (one_character && (!*text || *end)) return fail(ERR_INPUT, "%s: key \"%s\" is not one character", where, key);
    s->content = xstrdup(text);
    s->content_n = strlen(text);
out:
    return rc;
}

/* {"String": literal} or {"Regex": pattern} */
static int read_pattern(const json_t *o, const char *where, struct step *s)
{
    const json_t *pattern = json_object_get(o, "pattern"), *literal = json_object_get(pattern, "String"), *regex = json_object_get(pattern, "Regex");
    if (json_is_string(literal) && json_object_size(pattern) == 1) {
        s->pattern = pattern_open_literal(json_string_value(literal), json_string_length(literal));
        return OK;
    }
    if (!json_is_string(regex) || json_object_size(pattern) != 1)
        return fail(ERR_INPUT, "%s: pattern is not {\"String\": ...} or {\"Regex\": ...}", where);
    s->regex = true;
    return pattern_open_regex(&s->pattern, json_string_value(regex), json_string_length(regex), where);
}

static int read_behavior(const json_t *o, const char *where, struct step *s)
{
    const char *name = NULL;
    int rc = OK;
    TRY(need_string(o, "behavior", where, &name));
    for (int i = 0; i < 5; i++) {
        if (strcmp(name, behavior_names[i])) continue;
        s->behavior = (enum behavior)i;
        return OK;
    }
    rc = fail(ERR_INPUT, "%s: behavior \"%s\" is not implemented", where, name);
out:
    return rc;
}

/* Pre-tokenizers: *split says whether a split in front of every replacement follows. */
static int read_metaspace(const json_t *o, const char *where, struct step *s, bool *split)
{
    const char *scheme = NULL;
    bool prefix = true;
    int rc = OK;
    TRY(only_keys(o, where, "type", "replacement", "prepend_scheme", "split", "add_prefix_space", "str_rep", NULL));
    TRY(need_content(o, "replacement", where, true, s));
    TRY(json_get_bool(o, "add_prefix_space", where, true, &prefix));
    TRY(json_get_bool(o, "split", where, true, split));
    TRY(json_get_string(o, "prepend_scheme", where, prefix ? "always" : "never", &scheme));
    s->kind = METASPACE;
    for (s->scheme = ALWAYS; s->scheme <= NEVER && strcmp(scheme, scheme_names[s->scheme]); s->scheme++) {}
    if (s->scheme > NEVER) { rc = fail(ERR_INPUT, "%s: prepend_scheme \"%s\" is not implemented", where, scheme); goto out; }
    if (!prefix && s->scheme != NEVER) rc = fail(ERR_INPUT, "%s: add_prefix_space is false but prepend_scheme is \"%s\"", where, scheme);
out:
    return rc;
}

static struct step *step_add(struct steps *all, enum step_kind kind)
{
    struct step *s = &all->step[all->n++];
    *s = (struct step){.kind = kind};
    return s;
}

static int read_normalizer_step(const json_t *o, const char *type, const char *where, struct steps *all)
{
    static const char *const plain[] = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "ByteLevel"};
    static const enum step_kind kinds[] = {NORMAL_FORM, NORMAL_FORM, NORMAL_FORM, NORMAL_FORM, LOWERCASE, STRIP_ACCENTS, BYTE_LEVEL};
    struct step *s = step_add(all, STRIP);
    int rc = OK;
    for (int i = 0; i < 7; i++) {
        if (strcmp(type, plain[i])) continue;
        s->kind = kinds[i];
        s->form = (enum normal_form)i;
        return only_keys(o, where, "type", NULL);
    }
    if (!strcmp(type, "Strip")) {
        TRY(only_keys(o, where, "type", "strip_left", "strip_right", NULL));
        TRY(need_bool(o, "strip_left", where, &s->left));
        TRY(need_bool(o, "strip_right", where, &s->right));
    } else if (!strcmp(type, "Replace") || !strcmp(type, "Prepend")) {
        bool replace = *type == 'R';
        s->kind = replace ? REPLACE : PREPEND;
        TRY(only_keys(o, where, "type", replace ? "pattern" : "prepend", replace ? "content" : NULL, NULL));
        if (replace) TRY(read_pattern(o, where, s));
        TRY(need_content(o, replace ? "content" : "prepend", where, false, s));
    } else rc = fail(ERR_INPUT, "%s: normalizer type \"%s\" is not implemented", where, type);
out:
    return rc;
}

#define GPT2_PATTERN "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

/* A space in front, GPT-2's split, and the byte alphabet, as three steps. */
static int read_byte_level(const json_t *o, const char *where, struct steps *all)
{
    bool prefix = true, regex = true;
    struct step *s;
    int rc = OK;
    TRY(only_keys(o, where, "type", "add_prefix_space", "trim_offsets", "use_regex", NULL));
    TRY(json_get_bool(o, "add_prefix_space", where, true, &prefix));
    TRY(json_get_bool(o, "use_regex", where, true, &regex));
    if (prefix) step_add(all, PREFIX_SPACE)->name = xstrdup("PrefixSpace");
    if (regex) {
        s = step_add(all, SPLIT);
        s->behavior = ISOLATED;
        s->name = xstrdup("Split Isolated " GPT2_PATTERN);
        TRY(pattern_open_regex(&s->pattern, GPT2_PATTERN, strlen(GPT2_PATTERN), where));
    }
    step_add(all, BYTE_LEVEL)->name = xstrdup("ByteLevel");
out:
    return rc;
}

static int read_split(const json_t *o, const char *where, struct step *s)
{
    int rc = OK;
    TRY(only_keys(o, where, "type", "pattern", "behavior", "invert", NULL));
    TRY(read_pattern(o, where, s));
    TRY(read_behavior(o, where, s));
    TRY(need_bool(o, "invert", where, &s->invert));
    const json_t *p = json_object_get(o, "pattern"), *regex = json_object_get(p, "Regex");
    s->name = xasprintf("Split%s %s %s", s->invert ? " inverted" : "", behavior_names[s->behavior],
                        json_string_value(regex ? regex : json_object_get(p, "String")));
out:
    return rc;
}

static int read_pre_tokenizer_step(const json_t *o, const char *type, const char *where, struct steps *all)
{
    int rc = OK;
    bool flag = false;
    if (!strcmp(type, "ByteLevel")) return read_byte_level(o, where, all);
    struct step *s = step_add(all, SPLIT);
    s->behavior = ISOLATED;
    if (!strcmp(type, "Split")) TRY(read_split(o, where, s));
    else if (!strcmp(type, "Metaspace")) {
        TRY(read_metaspace(o, where, s, &flag));
        if (flag) {
            struct step *split = step_add(all, SPLIT);
            split->behavior = MERGED_WITH_NEXT;
            split->pattern = pattern_open_literal(s->content, s->content_n);
            split->name = xstrdup("MetaspaceSplit");
        }
    } else if (!strcmp(type, "Digits")) {
        TRY(only_keys(o, where, "type", "individual_digits", NULL));
        TRY(need_bool(o, "individual_digits", where, &flag));
        s->behavior = flag ? ISOLATED : CONTIGUOUS;
        s->pattern = pattern_open_characters(unicode_is_numeric);
    } else if (!strcmp(type, "Punctuation")) {
        TRY(only_keys(o, where, "type", "behavior", NULL));
        if (json_object_get(o, "behavior")) TRY(read_behavior(o, where, s));
        s->pattern = pattern_open_characters(unicode_is_punctuation);
    } else if (!strcmp(type, "Whitespace") || !strcmp(type, "WhitespaceSplit")) {
        TRY(only_keys(o, where, "type", NULL));
        s->behavior = REMOVED;
        s->invert = !strcmp(type, "Whitespace");
        s->pattern = s->invert ? pattern_open_words() : pattern_open_characters(unicode_is_space);
    } else if (!strcmp(type, "CharDelimiterSplit")) {
        TRY(only_keys(o, where, "type", "delimiter", NULL));
        TRY(need_content(o, "delimiter", where, true, s));
        s->behavior = REMOVED;
        s->pattern = pattern_open_literal(s->content, s->content_n);
    } else rc = fail(ERR_INPUT, "%s: pre_tokenizer type \"%s\" is not implemented", where, type);
    if (rc == OK && !s->name) s->name = xasprintf("%s %s", type, s->kind == METASPACE ? scheme_names[s->scheme] : behavior_names[s->behavior]);
out:
    return rc;
}

static int read_decoder_step(const json_t *o, const char *type, const char *where, struct steps *all)
{
    bool split;
    struct step *s = step_add(all, STRIP);
    int rc = OK;
    if (!strcmp(type, "ByteLevel")) {
        s->kind = BYTE_LEVEL;
        return only_keys(o, where, "type", "add_prefix_space", "trim_offsets", "use_regex", NULL);
    }
    if (!strcmp(type, "Metaspace")) return read_metaspace(o, where, s, &split);
    if (!strcmp(type, "ByteFallback") || !strcmp(type, "Fuse")) {
        s->kind = *type == 'B' ? BYTE_FALLBACK : FUSE;
        return only_keys(o, where, "type", NULL);
    }
    if (!strcmp(type, "Replace")) {
        s->kind = REPLACE;
        TRY(only_keys(o, where, "type", "pattern", "content", NULL));
        TRY(read_pattern(o, where, s));
        TRY(need_content(o, "content", where, false, s));
    } else if (!strcmp(type, "Strip")) {
        TRY(only_keys(o, where, "type", "content", "start", "stop", NULL));
        TRY(need_content(o, "content", where, true, s));
        TRY(json_get_int(o, "start", where, 0, &s->start));
        TRY(json_get_int(o, "stop", where, 0, &s->stop));
    } else rc = fail(ERR_INPUT, "%s: decoder type \"%s\" is not implemented", where, type);
out:
    return rc;
}

typedef int read_step(const json_t *o, const char *type, const char *where, struct steps *all);

/* Sequences of sequences become one list. `list` is the key a Sequence has its members under. */
static int read_steps(struct steps *s, const json_t *o, const char *list, read_step *read, const char *where, int depth)
{
    const char *type = NULL;
    int rc = OK;
    if (!o || json_is_null(o)) return OK;
    if (depth > MAX_SEQUENCE_DEPTH) return fail(ERR_INPUT, "%s: sequences are nested more than %d deep", where, MAX_SEQUENCE_DEPTH);
    if (!json_is_object(o)) return fail(ERR_INPUT, "%s is not an object", where);
    TRY(need_string(o, "type", where, &type));
    if (!strcmp(type, "Sequence")) {
        const json_t *members = json_object_get(o, list);
        TRY(only_keys(o, where, "type", list, NULL));
        if (!json_is_array(members)) return fail(ERR_INPUT, "%s: key \"%s\" is not a list", where, list);
        for (size_t i = 0; i < json_array_size(members); i++) {
            const json_t *member = json_array_get(members, i);
            if (!json_is_object(member)) return fail(ERR_INPUT, "%s: %s[%zu] is not an object", where, list, i);
            char *at = xasprintf("%s.%s[%zu]", where, list, i);
            rc = read_steps(s, member, list, read, at, depth + 1);
            free(at);
            if (rc != OK) goto out;
        }
        return OK;
    }
    if (s->n + 3 > MAX_STEPS) return fail(ERR_INPUT, "%s: more than %d steps", where, MAX_STEPS);
    TRY(read(o, type, where, s));
out:
    return rc;
}

int normalizer_open(struct normalizer **out, const json_t *part, const char *where)
{
    *out = xcalloc(1, sizeof **out);
    int rc = read_steps(&(*out)->s, part, "normalizers", read_normalizer_step, where, 0);
    if (rc != OK) { normalizer_close(*out); *out = NULL; }
    return rc;
}

int pre_tokenizer_open(struct pre_tokenizer **out, const json_t *part, const char *where)
{
    *out = xcalloc(1, sizeof **out);
    int rc = read_steps(&(*out)->s, part, "pretokenizers", read_pre_tokenizer_step, where, 0);
    if (rc != OK) { pre_tokenizer_close(*out); *out = NULL; }
    return rc;
}

int decoder_open(struct decoder **out, const json_t *part, const char *where)
{
    struct decoder *d = *out = xcalloc(1, sizeof *d);
    int rc = OK;
    bool bytes = false;
    d->none = !part || json_is_null(part);
    TRY(read_steps(&d->s, part, "decoders", read_decoder_step, where, 0));
    for (int i = 0; i < d->s.n; i++) {
        if (bytes && d->s.step[i].regex) {
            rc = fail(ERR_INPUT, "%s: a Regex pattern after ByteLevel or ByteFallback is not implemented", where);
            goto out;
        }
        bytes |= d->s.step[i].kind == BYTE_LEVEL || d->s.step[i].kind == BYTE_FALLBACK;
    }
out:
    if (rc != OK) { decoder_close(d); *out = NULL; }
    return rc;
}

void normalizer_close(struct normalizer *n) { if (n) steps_free(&n->s); free(n); }
void pre_tokenizer_close(struct pre_tokenizer *p) { if (p) steps_free(&p->s); free(p); }
void decoder_close(struct decoder *d) { if (d) steps_free(&d->s); free(d); }

struct parts_work *parts_work_new(const struct pre_tokenizer *p)
{
    struct parts_work *w = xcalloc(1, sizeof *w);
    w->pattern = pattern_work_new();
    w->n_steps = p->s.n;
    w->rewritten = xcalloc((size_t)p->s.n, sizeof *w->rewritten);
    return w;
}

void parts_work_free(struct parts_work *w)
{
    if (!w) return;
    pattern_work_free(w->pattern);
    for (int i = 0; i < 2; i++) {
        free(w->normal[i].data);
        free(w->tokens[i].data);
        free(w->spans[i]);
    }
    for (int i = 0; i < w->n_steps; i++) free(w->rewritten[i].data);
    free(w->rewritten);
    normal_work_free(&w->normal_form);
    free(w);
}

/* ---- normalizers ---- */

static void map_bytes(const char *text, size_t n, struct buffer *out)
{
    for (size_t i = 0; i < n; i++) {
        char s[2];
        buffer_add(out, s, (size_t)byte_to_utf8((uint8_t)text[i], s));
    }
}

static int replace_all(const struct step *s, struct pattern_work *w, const char *text, size_t n, bool recent, size_t *lead, struct buffer *out)
{
    struct pattern_scan scan = pattern_scan_start(s->pattern, w, text, n, recent);
    size_t done = 0, start, end, new_lead = 0;
    bool found;
    int rc = OK;
    for (;;) {
        TRY(pattern_scan_next(&scan, &start, &end, &found));
        if (!found) start = n;
        if (done < *lead) new_lead += (start < *lead ? start : *lead) - done;
        buffer_add(out, text + done, start - done);
        if (!found) break;
        if (*lead && end <= *lead) new_lead += s->content_n;   /* the content is aligned with the end of what it replaces */
        buffer_add(out, s->content, s->content_n);
        done = end;
    }
    *lead = new_lead;
out:
    return rc;
}

static int normalizer_step(const struct step *s, struct parts_work *w, const char *text, size_t n, bool recent, size_t *lead,
                           struct buffer *out, bool *changed)
{
    const char *p = text, *end = text + n;
    size_t old_lead = *lead, new_lead = 0;
    out->n = 0;
    *changed = true;
    switch (s->kind) {
    case NORMAL_FORM:
        *changed = unicode_normalize(s->form, &w->normal_form, text, n, out);
        if (*changed && old_lead) {   /* what the lead alone becomes, as far as the whole begins with it; one character at least */
            struct buffer alone = {0};
            if (!unicode_normalize(s->form, &w->normal_form, text, old_lead, &alone)) buffer_add(&alone, text, old_lead);
            while (new_lead < out->n && new_lead < alone.n && out->data[new_lead] == alone.data[new_lead]) new_lead++;
            while (new_lead < out->n && ((uint8_t)out->data[new_lead] & 0xc0) == 0x80) new_lead++;
            if (!new_lead && out->n) {
                p = out->data;
                utf8_next(&p);
                new_lead = (size_t)(p - out->data);
            }
            free(alone.data);
            *lead = new_lead;
        }
        return OK;
    case LOWERCASE:
        while (p < end) {
            uint32_t lower[2];
            bool leads = (size_t)(p - text) < old_lead;
            int k = unicode_lower(utf8_next(&p), lower);
            for (int i = 0; i < k; i++) {
                char c[4];
                buffer_add(out, c, (size_t)utf8_put(lower[i], c));
            }
            if (leads) new_lead = out->n;
        }
        *lead = new_lead;
        return OK;
    case STRIP: {
        const char *from = text;
        while (s->left && p < end && unicode_is_space(utf8_next(&p))) from = p;
        while (s->right && end > from && unicode_is_space(utf8_before(end))) {
            do end--; while (((uint8_t)*end & 0xc0) == 0x80);
        }
        buffer_add(out, from, (size_t)(end - from));
        *lead = old_lead > (size_t)(from - text) ? old_lead - (size_t)(from - text) : 0;
        if (*lead > out->n) *lead = out->n;
        return OK;
    }
    case STRIP_ACCENTS:
        while (p < end) {
            const char *at = p;
            if (!unicode_is_mark(utf8_next(&p))) buffer_add(out, at, (size_t)(p - at));
            if ((size_t)(at - text) < old_lead) new_lead = out->n;
        }
        *lead = new_lead;
        return OK;
    case REPLACE: return replace_all(s, w->pattern, text, n, recent, lead, out);
    case PREPEND:
        buffer_add(out, s->content, s->content_n);
        buffer_add(out, text, n);
        *lead = old_lead ? old_lead + s->content_n : 0;
        return OK;
    default:
        CHECK(s->kind == BYTE_LEVEL, "a normalizer step of kind %d", (int)s->kind);
        map_bytes(text, old_lead, out);
        *lead = out->n;
        map_bytes(text + old_lead, n - old_lead, out);
        return OK;
    }
}

bool normalizer_is_nfc_or_none(const struct normalizer *n)
{
    for (int i = 0; i < n->s.n; i++) if (n->s.step[i].kind != NORMAL_FORM || n->s.step[i].form != NFC) return false;
    return true;
}

int normalizer_run(const struct normalizer *n, struct parts_work *w, const char *text, size_t bytes, bool recent, size_t *lead,
                   const char **out, size_t *out_bytes)
{
    int rc = OK, next = 0;
    for (int i = 0; i < n->s.n && bytes; i++) {   /* nothing grows out of an empty text */
        bool changed;
        struct buffer *b = &w->normal[next];
        TRY(normalizer_step(&n->s.step[i], w, text, bytes, recent, lead, b, &changed));
        if (!changed) continue;
        text = b->n ? b->data : "";
        bytes = b->n;
        next ^= 1;
    }
    *out = text;
    *out_bytes = bytes;
out:
    return rc;
}

/* ---- pre-tokenizers ---- */

struct run { const struct steps *s; struct parts_work *w; bool recent, raw; word_sink *sink; void *context; };

static int run_step(const struct run *r, int i, const char *text, size_t n, size_t lead);

/* Folds matches and the gaps between them into pieces; a group is held back while the next element may still join it. */
struct fold { const struct run *r; int next; enum behavior behavior; const char *text; size_t lead, start, end; bool held, previous; };

static int fold_emit(struct fold *f, size_t start, size_t end)
{
    if (start == end) return OK;
    return run_step(f->r, f->next, f->text + start, end - start, f->lead > start ? f->lead - start : 0);
}

static int fold_add(struct fold *f, size_t start, size_t end, bool match)
{
    int rc = OK;
    if (f->behavior == ISOLATED) return fold_emit(f, start, end);
    if (f->behavior == REMOVED) return match ? OK : fold_emit(f, start, end);
    bool joins = f->behavior == CONTIGUOUS ? match == f->previous : match != f->previous && match == (f->behavior == MERGED_WITH_PREVIOUS);
    if (!f->held || !joins) {
        if (f->held) TRY(fold_emit(f, f->start, f->end));
        f->start = start;
    }
    f->end = end;
    f->held = true;
    f->previous = match;
out:
    return rc;
}

static int run_split(const struct run *r, int i, const char *text, size_t n, size_t lead)
{
    const struct step *s = &r->s->step[i];
    struct fold f = {.r = r, .next = i + 1, .behavior = s->behavior, .text = text, .lead = lead};
    struct pattern_scan scan = pattern_scan_start(s->pattern, r->w->pattern, text, n, r->recent);
    size_t done = 0, start, end;
    bool found;
    int rc = OK;
    for (;;) {
        TRY(pattern_scan_next(&scan, &start, &end, &found));
        if (!found) break;
        if (start > done) TRY(fold_add(&f, done, start, s->invert));
        TRY(fold_add(&f, start, end, !s->invert));
        done = end;
    }
    if (done < n) TRY(fold_add(&f, done, n, s->invert));
    if (f.held) TRY(fold_emit(&f, f.start, f.end));
out:
    return rc;
}

static int run_byte_level(const struct run *r, int i, const char *text, size_t n, size_t lead)
{
    struct buffer *b = &r->w->rewritten[i];
    if (r->raw) return r->sink(r->context, text, n);
    if (lead > n) lead = n;
    b->n = 0;
    map_bytes(text, lead, b);
    size_t mapped_lead = b->n;
    map_bytes(text + lead, n - lead, b);
    return run_step(r, i + 1, b->data, b->n, mapped_lead);
}

static int run_prefix_space(const struct run *r, int i, const char *text, size_t n, size_t lead)
{
    struct buffer *b = &r->w->rewritten[i];
    if (*text == ' ') return run_step(r, i + 1, text, n, lead);
    b->n = 0;
    buffer_add(b, " ", 1);
    buffer_add(b, text, n);
    return run_step(r, i + 1, b->data, b->n, lead ? lead + 1 : 0);
}

static int run_metaspace(const struct run *r, int i, const char *text, size_t n, size_t lead)
{
    const struct step *s = &r->s->step[i];
    struct buffer *b = &r->w->rewritten[i];
    const char *p = text, *end = text + n;
    size_t new_lead = 0;
    bool starts = *text == ' ' || (n >= s->content_n && !memcmp(text, s->content, s->content_n));
    b->n = 0;
    if (!starts && (s->scheme == ALWAYS || (s->scheme == FIRST && lead))) buffer_add(b, s->content, s->content_n);
    while (p < end) {
        const char *space = memchr(p, ' ', (size_t)(end - p)), *stop = space ? space : end;
        buffer_add(b, p, (size_t)(stop - p));
        if ((size_t)(p - text) < lead) new_lead = b->n - ((size_t)(stop - text) > lead ? (size_t)(stop - text) - lead : 0);
        p = stop;
        if (!space) break;
        buffer_add(b, s->content, s->content_n);
        if ((size_t)(p - text) < lead) new_lead = b->n;
        p++;
    }
    return run_step(r, i + 1, b->data, b->n, new_lead);
}

static int run_step(const struct run *r, int i, const char *text, size_t n, size_t lead)
{
    if (i == r->s->n) return r->sink(r->context, text, n);
    switch (r->s->step[i].kind) {
    case BYTE_LEVEL: return run_byte_level(r, i, text, n, lead);
    case PREFIX_SPACE: return run_prefix_space(r, i, text, n, lead);
    case METASPACE: return run_metaspace(r, i, text, n, lead);
    default: return run_split(r, i, text, n, lead);
    }
}

bool pre_tokenizer_raw_bytes(const struct pre_tokenizer *p)
{
    int byte_levels = 0;
    for (int i = 0; i < p->s.n; i++) byte_levels += p->s.step[i].kind == BYTE_LEVEL;
    return byte_levels == 1 && p->s.step[p->s.n - 1].kind == BYTE_LEVEL;
}

int pre_tokenizer_run(const struct pre_tokenizer *p, struct parts_work *w, const char *text, size_t bytes, bool recent, size_t lead,
                      word_sink *sink, void *context)
{
    struct run r = {&p->s, w, recent, pre_tokenizer_raw_bytes(p), sink, context};
    return bytes ? run_step(&r, 0, text, bytes, lead) : OK;
}

char *pre_tokenizer_signature(const struct pre_tokenizer *p)
{
    struct buffer b = {0};
    buffer_add_string(&b, "");
    for (int i = 0; i < p->s.n; i++) {
        if (i) buffer_add_string(&b, "\n");
        buffer_add_string(&b, p->s.step[i].name);
    }
    return b.data;
}

/* ---- decoders ---- */

bool decoder_is_byte_level(const struct decoder *d)
{
    for (int i = 0; i < d->s.n; i++) if (d->s.step[i].kind == BYTE_LEVEL) return true;
    return false;
}

void decoder_start(struct parts_work *w)
{
    w->tokens[0].n = 0;
    w->spans_n[0] = 0;
}

static void span_add(struct parts_work *w, int side, size_t at, size_t n)
{
    if (w->spans_n[side] == w->spans_capacity[side]) {
        w->spans_capacity[side] = w->spans_capacity[side] ? 2 * w->spans_capacity[side] : 256;
        w->spans[side] = xrealloc(w->spans[side], w->spans_capacity[side] * sizeof **w->spans);
    }
    w->spans[side][w->spans_n[side]++] = (struct span){at, n};
}

void decoder_add(struct parts_work *w, const char *token, size_t bytes)
{
    span_add(w, 0, w->tokens[0].n, bytes);
    buffer_add(&w->tokens[0], token, bytes);
}

static void unmap_bytes(const char *token, size_t n, struct buffer *out)
{
    size_t m;
    buffer_add(out, token, n);   /* room for the bytes, which are never more than the text; and the text itself if it is no spelling */
    if (byte_level_decode(token, n, out->data + out->n - n, &m)) out->n -= n - m;
    else memcpy(out->data + out->n - n, token, n);
}

static void strip_token(const struct step *s, const char *token, size_t n, struct buffer *out)
{
    size_t from = 0, to = n, k = s->content_n;
    for (int64_t i = 0; i < s->start && n - from >= k && !memcmp(token + from, s->content, k); i++) from += k;
    for (int64_t i = 0; i < s->stop && to >= from + k && !memcmp(token + to - k, s->content, k); i++) to -= k;
    buffer_add(out, token + from, to - from);
}

static void metaspace_token(const struct step *s, const char *token, size_t n, bool first, struct buffer *out)
{
    for (size_t i = 0; i < n;) {
        if (n - i >= s->content_n && !memcmp(token + i, s->content, s->content_n)) {
            if (!first || s->scheme == NEVER) buffer_add(out, " ", 1);
            i += s->content_n;
        } else buffer_add(out, token + i++, 1);
    }
}

/* One step over one token that stays one token. */
static int decode_token(const struct step *s, struct parts_work *w, const char *token, size_t n, bool first, struct buffer *out)
{
    size_t lead = 0;
    switch (s->kind) {
    case METASPACE: metaspace_token(s, token, n, first, out); return OK;
    case STRIP: strip_token(s, token, n, out); return OK;
    case REPLACE: return replace_all(s, w->pattern, token, n, true, &lead, out);
    default: buffer_add(out, token, n); return OK;
    }
}

int decoder_finish(const struct decoder *d, struct parts_work *w, const char **text, size_t *bytes)
{
    int rc = OK, in = 0;
    for (int i = 0; i < d->s.n; i++, in ^= 1) {
        const struct step *s = &d->s.step[i];
        const struct span *span = w->spans[in];
        struct buffer *from = &w->tokens[in], *to = &w->tokens[in ^ 1];
        to->n = 0;
        w->spans_n[in ^ 1] = 0;
        buffer_add(to, "", 0);
        if (s->kind == BYTE_LEVEL) {                     /* all tokens become one */
            for (size_t k = 0; k < w->spans_n[in]; k++) unmap_bytes(from->data + span[k].at, span[k].n, to);
            span_add(w, in ^ 1, 0, to->n);
            continue;
        }
        bool in_bytes = false;
        for (size_t k = 0; k < w->spans_n[in]; k++) {
            const char *token = from->data + span[k].at;
            size_t at = to->n, n = span[k].n;
            uint8_t byte;
            if (s->kind == BYTE_FALLBACK && byte_token(token, n, &byte)) {   /* a run of byte tokens becomes one */
                buffer_add(to, &byte, 1);
                if (in_bytes) w->spans[in ^ 1][w->spans_n[in ^ 1] - 1].n++;
                else span_add(w, in ^ 1, at, 1);
                in_bytes = true;
                continue;
            }
            in_bytes = false;
            TRY(decode_token(s, w, token, n, k == 0, to));
            if (s->kind == FUSE && k) w->spans[in ^ 1][0].n += to->n - at;
            else span_add(w, in ^ 1, at, to->n - at);
        }
    }
    if (d->none && w->spans_n[in] > 1) {                 /* no decoder: tokens with a space between them */
        struct buffer *to = &w->tokens[in ^ 1];
        to->n = 0;
        for (size_t k = 0; k < w->spans_n[in]; k++) {
            if (k) buffer_add(to, " ", 1);
            buffer_add(to, w->tokens[in].data + w->spans[in][k].at, w->spans[in][k].n);
        }
        in ^= 1;
    }
    buffer_add(&w->tokens[in], "", 0);
    *text = w->tokens[in].data;
    *bytes = w->tokens[in].n;
out:
    return rc;
}

void decoder_token(const struct decoder *d, struct parts_work *w, const char *token, size_t bytes, struct buffer *out)
{
    struct buffer now = {0}, next = {0};
    buffer_add(&now, token, bytes);
    for (int i = 0; i < d->s.n; i++) {
        const struct step *s = &d->s.step[i];
        uint8_t byte;
        next.n = 0;
        buffer_add(&next, "", 0);
        if (s->kind == BYTE_LEVEL) unmap_bytes(now.data, now.n, &next);
        else if (s->kind == BYTE_FALLBACK && byte_token(now.data, now.n, &byte)) buffer_add(&next, &byte, 1);
        else if (s->kind == STRIP || decode_token(s, w, now.data, now.n, false, &next) != OK) {   /* Strip is for the ends of a text */
            next.n = 0;
            buffer_add(&next, now.data, now.n);
        }
        struct buffer swap = now;
        now = next;
        next = swap;
    }
    buffer_add(out, now.data, now.n);
    free(now.data);
    free(next.data);
}
