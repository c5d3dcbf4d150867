/* Oniguruma's syntax on PCRE2, see tokenizer_regex.h.
 *
 * The translation parses the pattern and writes it anew, so that nothing is passed through that the two read differently:
 *   \s \w \h \v \b [[:punct:]] ...   written out as the sets Oniguruma means (PCRE2's \s holds U+180E, its \h is blanks)
 *   {n,m}+ {n}? {,n}                 Oniguruma: a repeated repeat, an optional one, {0,n}
 *   [a[bc]] [a&&[^b]] [^\S]          nested sets and intersections, as alternatives and lookaheads of one character
 *   (?i)a|b                          the option reaches to the end of the group
 *   \p{Han}                          the script, not PCRE2's script extensions
 *   ^ $ (?m:.)                       lines always; (?m) is PCRE2's (?s)
 *   (?i:...)                         ASCII only: full case folding ("ss" = U+00DF) is refused
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "data/tokenizer_regex.h"

#include <pcre2.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <utf8proc.h>

#include "base/error.h"
#include "data/tokenizer_unicode.h"

enum { MAX_DEPTH = 64 };

/* ---- sets of characters ---- */

/* The union of a bracket's items and of alternatives "x|y", each a pattern for one character. */
struct set { struct buffer items, others; };

struct translation {
    const char *p, *end, *where;
    struct buffer out;
    size_t atom;                           /* where the last atom begins in out */
    bool has_atom;                         /* a quantifier may follow */
    bool exact, ignore_case, dot_all;
    uint32_t previous;                     /* the letter before, under ignore_case */
    int depth;
};

#define CATEGORY(name) (1u << UTF8PROC_CATEGORY_##name)
enum {
    MASK_L = CATEGORY(LU) | CATEGORY(LL) | CATEGORY(LT) | CATEGORY(LM) | CATEGORY(LO), MASK_M = CATEGORY(MN) | CATEGORY(MC) | CATEGORY(ME),
    MASK_N = CATEGORY(ND) | CATEGORY(NL) | CATEGORY(NO), MASK_S = CATEGORY(SM) | CATEGORY(SC) | CATEGORY(SK) | CATEGORY(SO),
    MASK_P = CATEGORY(PC) | CATEGORY(PD) | CATEGORY(PS) | CATEGORY(PE) | CATEGORY(PI) | CATEGORY(PF) | CATEGORY(PO),
    MASK_Z = CATEGORY(ZS) | CATEGORY(ZL) | CATEGORY(ZP), MASK_ALL = (1u << 30) - 1,
    MASK_C = MASK_ALL & ~(MASK_L | MASK_M | MASK_N | MASK_S | MASK_P | MASK_Z)
};

/* Names as Oniguruma compares them: lower case, without spaces, hyphens and underscores. */
static const struct { const char *name, *long_name; uint32_t mask; } categories[] = {
    {"l", "letter", MASK_L}, {"m", "mark", MASK_M}, {"n", "number", MASK_N}, {"s", "symbol", MASK_S}, {"p", "punctuation", MASK_P},
    {"z", "separator", MASK_Z}, {"c", "other", MASK_C}, {"lc", "casedletter", CATEGORY(LU) | CATEGORY(LL) | CATEGORY(LT)},
    {"any", "any", MASK_ALL}, {"assigned", "assigned", MASK_ALL & ~CATEGORY(CN)}, {"m", "combiningmark", MASK_M}, {"p", "punct", MASK_P},
    {"lu", "uppercaseletter", CATEGORY(LU)}, {"ll", "lowercaseletter", CATEGORY(LL)}, {"lt", "titlecaseletter", CATEGORY(LT)},
    {"lm", "modifierletter", CATEGORY(LM)}, {"lo", "otherletter", CATEGORY(LO)}, {"mn", "nonspacingmark", CATEGORY(MN)},
    {"mc", "spacingmark", CATEGORY(MC)}, {"me", "enclosingmark", CATEGORY(ME)}, {"nd", "decimalnumber", CATEGORY(ND)},
    {"nl", "letternumber", CATEGORY(NL)}, {"no", "othernumber", CATEGORY(NO)}, {"pc", "connectorpunctuation", CATEGORY(PC)},
    {"pd", "dashpunctuation", CATEGORY(PD)}, {"ps", "openpunctuation", CATEGORY(PS)}, {"pe", "closepunctuation", CATEGORY(PE)},
    {"pi", "initialpunctuation", CATEGORY(PI)}, {"pf", "finalpunctuation", CATEGORY(PF)}, {"po", "otherpunctuation", CATEGORY(PO)},
    {"sm", "mathsymbol", CATEGORY(SM)}, {"sc", "currencysymbol", CATEGORY(SC)}, {"sk", "modifiersymbol", CATEGORY(SK)},
    {"so", "othersymbol", CATEGORY(SO)}, {"zs", "spaceseparator", CATEGORY(ZS)}, {"zl", "lineseparator", CATEGORY(ZL)},
    {"zp", "paragraphseparator", CATEGORY(ZP)}, {"cc", "control", CATEGORY(CC)}, {"cf", "format", CATEGORY(CF)},
    {"cn", "unassigned", CATEGORY(CN)}, {"co", "privateuse", CATEGORY(CO)}, {"nd", "digit", CATEGORY(ND)}, {"cc", "cntrl", CATEGORY(CC)},
};

static const struct { const char *name, *pcre; enum script script; } scripts[] = {
    {"han", "Han", SCRIPT_HAN}, {"hiragana", "Hiragana", SCRIPT_HIRAGANA}, {"katakana", "Katakana", SCRIPT_KATAKANA},
    {"latin", "Latin", SCRIPT_LATIN},
    {"cyrillic", "Cyrillic", SCRIPT_CYRILLIC}, {"arabic", "Arabic", SCRIPT_ARABIC}, {"devanagari", "Devanagari", SCRIPT_DEVANAGARI},
    {"kannada", "Kannada", SCRIPT_KANNADA}, {"lao", "Lao", SCRIPT_LAO}, {"myanmar", "Myanmar", SCRIPT_MYANMAR}, {"hangul", "Hangul", 0},
    {"greek", "Greek", 0}, {"hebrew", "Hebrew", 0}, {"thai", "Thai", 0}, {"bengali", "Bengali", 0}, {"tamil", "Tamil", 0}, {"telugu", "Telugu", 0},
    {"malayalam", "Malayalam", 0}, {"gujarati", "Gujarati", 0}, {"gurmukhi", "Gurmukhi", 0}, {"oriya", "Oriya", 0}, {"sinhala", "Sinhala", 0},
    {"khmer", "Khmer", 0}, {"tibetan", "Tibetan", 0}, {"mongolian", "Mongolian", 0}, {"georgian", "Georgian", 0}, {"armenian", "Armenian", 0},
    {"ethiopic", "Ethiopic", 0}, {"bopomofo", "Bopomofo", 0}, {"cherokee", "Cherokee", 0}, {"syriac", "Syriac", 0}, {"thaana", "Thaana", 0},
    {"inherited", "Inherited", 0},
};

#define SPACE_ITEMS "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
#define CIRCLED_LETTERS "\\x{24b6}-\\x{24e9}\\x{1f130}-\\x{1f149}\\x{1f150}-\\x{1f169}\\x{1f170}-\\x{1f189}"   /* Alphabetic but symbols */
#define ANY "(?s:.)"

static int refuse(const struct translation *t, const char *what)
{
    return fail(ERR_INPUT, "%s: the pattern uses %s, which is not implemented", t->where, what);
}

static void add_range(struct buffer *b, uint32_t first, uint32_t last)
{
    char s[48];
    snprintf(s, sizeof s, first == last ? "\\x{%x}" : "\\x{%x}-\\x{%x}", first, last);
    buffer_add_string(b, s);
}

static void set_free(struct set *s)
{
    free(s->items.data);
    free(s->others.data);
}

static void set_add_other(struct set *s, const char *before, const struct buffer *items, const char *after)
{
    if (s->others.n) buffer_add(&s->others, "|", 1);
    buffer_add_string(&s->others, before);
    if (items->n) buffer_add(&s->others, items->data, items->n);
    buffer_add_string(&s->others, after);
}

/* s |= all characters whose category is in the mask. A mask with Cn is written as the complement of the others: PCRE2's Cn is too large. */
static int set_add_mask(struct translation *t, struct set *s, uint32_t mask)
{
    static const char *const names[30] = {"Cn", "Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pc", "Pd", "Ps", "Pe", "Pi", "Pf",
                                          "Po", "Sm", "Sc", "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Cs", "Co"};
    static const struct { const char *name; uint32_t mask; } groups[] = {{"L", MASK_L}, {"M", MASK_M}, {"N", MASK_N},
                                                                         {"P", MASK_P}, {"S", MASK_S}, {"Z", MASK_Z}};
    uint32_t letters = mask & (MASK_L | MASK_M);
    if (t->ignore_case && letters && letters != (MASK_L | MASK_M)) return refuse(t, "a property that is not closed under case folding inside (?i)");
    bool complement = mask & CATEGORY(CN);
    uint32_t want = complement ? MASK_ALL & ~mask : mask, left = want;
    struct buffer items = {0};
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++) {
        if ((want & groups[i].mask) != groups[i].mask) continue;
        left &= ~groups[i].mask;
        buffer_add_string(&items, "\\p{");
        buffer_add_string(&items, groups[i].name);
        buffer_add_string(&items, "}");
    }
    for (int i = 0; i < 30; i++) {
        if (!(left >> i & 1)) continue;
        buffer_add_string(&items, "\\p{");
        buffer_add_string(&items, names[i]);
        buffer_add_string(&items, "}");
    }
    for (const struct unicode_recent *r = unicode_recent; t->exact && r->first; r++)
        if (want >> r->category & 1) add_range(&items, r->first, r->last);
    bool ahom = t->exact && (want & CATEGORY(MN)) && !(want & CATEGORY(MC));   /* U+1171E moved from Mn to Mc */
    if (complement) {
        if (items.n) set_add_other(s, "[^", &items, "]");
        else set_add_other(s, ANY, &items, "");
        if (ahom) add_range(&s->items, 0x1171e, 0x1171e);
    } else if (ahom) set_add_other(s, "(?:(?!\\x{1171e})[", &items, "])");
    else if (items.n) buffer_add(&s->items, items.data, items.n);
    free(items.data);
    return OK;
}

static int set_add_items(struct translation *t, struct set *s, bool negated, const char *items, uint32_t mask)
{
    struct set positive = {0};
    int rc = OK;
    if (items) buffer_add_string(&positive.items, items);
    if (mask) TRY(set_add_mask(t, &positive, mask));   /* never with Cn */
    if (negated) set_add_other(s, "[^", &positive.items, "]");
    else buffer_add(&s->items, positive.items.data, positive.items.n);
out:
    set_free(&positive);
    return rc;
}

/* \w inside brackets; outside of them Oniguruma's own table adds the Latin-1 superscripts and fractions. */
static int set_add_word(struct translation *t, struct set *s, bool negated, bool bare)
{
    return set_add_items(t, s, negated, bare ? CIRCLED_LETTERS "\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}" : CIRCLED_LETTERS,
                         MASK_L | MASK_M | CATEGORY(ND) | CATEGORY(NL) | CATEGORY(PC));
}

static bool scripts_need_prefix(void)
{
    char version[64] = "";
    int major = 0, minor = 0;
    pcre2_config(PCRE2_CONFIG_VERSION, version);
    return sscanf(version, "%d.%d", &major, &minor) == 2 && (major > 10 || (major == 10 && minor >= 40));
}

static int set_add_named(struct translation *t, struct set *s, const char *name, size_t n, bool negated, bool bare)
{
    char key[32];
    size_t m = 0;
    for (size_t i = 0; i < n; i++) {
        if (name[i] == ' ' || name[i] == '-' || name[i] == '_') continue;
        if (m + 1 < sizeof key) key[m++] = (char)(name[i] >= 'A' && name[i] <= 'Z' ? name[i] + 32 : name[i]);
        else break;
    }
    key[m] = 0;
    for (size_t i = 0; i < sizeof categories / sizeof *categories; i++)
        if (!strcmp(key, categories[i].name) || !strcmp(key, categories[i].long_name))
            return set_add_mask(t, s, negated ? MASK_ALL & ~categories[i].mask : categories[i].mask);
    if (!strcmp(key, "word")) return set_add_word(t, s, negated, bare);
    if (!strcmp(key, "space") || !strcmp(key, "whitespace")) return set_add_items(t, s, negated, SPACE_ITEMS, 0);
    if (!strcmp(key, "xdigit")) return set_add_items(t, s, negated, "0-9A-Fa-f", 0);
    if (!strcmp(key, "ascii")) return set_add_items(t, s, negated, "\\x{0}-\\x{7f}", 0);
    if (!strcmp(key, "blank")) return set_add_items(t, s, negated, "\\x{9}", CATEGORY(ZS));
    for (size_t i = 0; i < sizeof scripts / sizeof *scripts; i++) {
        if (strcmp(key, scripts[i].name)) continue;
        if (t->ignore_case) return refuse(t, "a script inside (?i)");
        struct buffer items = {0};
        buffer_add_string(&items, scripts_need_prefix() ? "\\p{sc:" : "\\p{");
        buffer_add_string(&items, scripts[i].pcre);
        buffer_add_string(&items, "}");
        for (const struct unicode_recent *r = unicode_recent; t->exact && scripts[i].script && r->first; r++)
            if (r->script == scripts[i].script) add_range(&items, r->first, r->last);
        if (negated) set_add_other(s, "[^", &items, "]");
        else buffer_add(&s->items, items.data, items.n);
        free(items.data);
        return OK;
    }
    char what[80];
    snprintf(what, sizeof what, "the property \"%.*s\"", (int)(n < 40 ? n : 40), name);
    return refuse(t, what);
}

/* Writes the set, or its complement, as a pattern for one character. */
static void set_write(const struct set *s, bool negated, struct buffer *out)
{
    if (!s->others.n && s->items.n) {
        buffer_add_string(out, negated ? "[^" : "[");
        buffer_add(out, s->items.data, s->items.n);
        buffer_add_string(out, "]");
        return;
    }
    if (negated) buffer_add_string(out, "(?:(?!");
    if (!s->others.n) buffer_add_string(out, "(?!)");
    else {
        bool single = !s->items.n && !strchr(s->others.data, '|');
        if (!single) buffer_add_string(out, "(?>");   /* one way to match a character is enough: nothing to backtrack into */
        if (s->items.n) {
            buffer_add_string(out, "[");
            buffer_add(out, s->items.data, s->items.n);
            buffer_add_string(out, "]|");
        }
        buffer_add(out, s->others.data, s->others.n);
        if (!single) buffer_add_string(out, ")");
    }
    if (negated) buffer_add_string(out, ")" ANY ")");
}

/* ---- parsing ---- */

static bool looking_at(const struct translation *t, const char *s) { return (size_t)(t->end - t->p) >= strlen(s) && !strncmp(t->p, s, strlen(s)); }

static int hex_value(char c) { return c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1; }

/* A literal under ignore_case must have no case partners but ASCII's own (and the long s and the Kelvin sign, which PCRE2 knows). */
static int check_case(struct translation *t, uint32_t c, bool literal)
{
    uint32_t before = t->previous;
    t->previous = 0;
    if (!t->ignore_case) return OK;
    if (c >= 0x80) {
        uint32_t caseless = MASK_P | MASK_Z | CATEGORY(ND) | CATEGORY(NO) | CATEGORY(SM) | CATEGORY(SC);
        return caseless >> unicode_category(c) & 1 ? OK : refuse(t, "(?i) with characters beyond ASCII");
    }
    if (!literal) return OK;
    c |= (c >= 'A' && c <= 'Z') ? 32 : 0;
    t->previous = c;
    if ((before == 's' && (c == 's' || c == 't')) || (before == 'f' && (c == 'f' || c == 'i' || c == 'l')))
        return refuse(t, "(?i) with letters that fold to one character (ss, st, ff, fi, fl)");
    return OK;
}

static void write_literal(struct buffer *out, uint32_t c)
{
    if ((c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'z' && c < 0x80)) buffer_add(out, &(char){(char)c}, 1);
    else add_range(out, c, c);
}

enum escape { ESCAPE_ERROR, ESCAPE_LITERAL, ESCAPE_SET, ESCAPE_OTHER };

/* What stands behind a backslash, t->p on it: a code point, a set added to *s, or neither (then t->p stays on the letter). */
static enum escape parse_escape(struct translation *t, struct set *s, bool in_class, uint32_t *c, int *rc)
{
    *rc = OK;
    if (t->p == t->end) { *rc = refuse(t, "a backslash at its end"); return ESCAPE_ERROR; }
    const char *start = t->p;
    *c = utf8_next(&t->p);
    switch (*c) {
    case 't': *c = 9; return ESCAPE_LITERAL;
    case 'n': *c = 10; return ESCAPE_LITERAL;
    case 'v': *c = 11; return ESCAPE_LITERAL;
    case 'f': *c = 12; return ESCAPE_LITERAL;
    case 'r': *c = 13; return ESCAPE_LITERAL;
    case 'a': *c = 7; return ESCAPE_LITERAL;
    case 'e': *c = 27; return ESCAPE_LITERAL;
    case 'd': case 'D': *rc = set_add_mask(t, s, *c == 'd' ? CATEGORY(ND) : MASK_ALL & ~CATEGORY(ND)); break;
    case 's': case 'S': *rc = set_add_items(t, s, *c == 'S', SPACE_ITEMS, 0); break;
    case 'h': case 'H': *rc = set_add_items(t, s, *c == 'H', "0-9A-Fa-f", 0); break;
    case 'w': case 'W': *rc = set_add_word(t, s, *c == 'W', !in_class); break;
    case 'p': case 'P': {
        bool negated = *c == 'P';
        const char *close = t->p < t->end && *t->p == '{' ? memchr(t->p, '}', (size_t)(t->end - t->p)) : NULL;
        if (!close) { *rc = refuse(t, "\\p without {name}"); return ESCAPE_ERROR; }
        const char *name = t->p + 1;
        if (*name == '^') { negated = !negated; name++; }
        *rc = set_add_named(t, s, name, (size_t)(close - name), negated, !in_class);
        t->p = close + 1;
        break;
    }
    case 'x': case 'u': {
        bool braces = *c == 'x' && t->p < t->end && *t->p == '{';
        int digits = 0, most = braces ? 8 : *c == 'x' ? 2 : 4;
        uint64_t v = 0;
        if (braces) t->p++;
        while (t->p < t->end && digits < most && hex_value(*t->p) >= 0) { v = v * 16 + (uint64_t)hex_value(*t->p++); digits++; }
        if (braces && (t->p == t->end || *t->p++ != '}')) digits = 0;
        if (!digits || (*c == 'u' && digits != 4) || v > 0x10ffff || (v >= 0xd800 && v < 0xe000) || (*c == 'x' && !braces && v > 0x7f)) {
            *rc = refuse(t, "a code in \\x or \\u that is not one code point");
            return ESCAPE_ERROR;
        }
        *c = (uint32_t)v;
        return ESCAPE_LITERAL;
    }
    default:
        if (*c >= 0x80 || !((*c >= '0' && *c <= '9') || ((*c | 32) >= 'a' && (*c | 32) <= 'z'))) return ESCAPE_LITERAL;
        t->p = start;
        return ESCAPE_OTHER;
    }
    return *rc == OK ? ESCAPE_SET : ESCAPE_ERROR;
}

static int parse_class(struct translation *t, struct buffer *out);

static int parse_posix(struct translation *t, struct set *s)   /* on "[:" */
{
    const char *name = t->p + 2, *close = name;
    while (close < t->end && *close != ':') close++;
    if (close + 1 >= t->end || close[1] != ']') return refuse(t, "an unfinished [[:name:]]");
    bool negated = *name == '^';
    if (negated) name++;
    t->p = close + 2;
    if (close - name == 5 && !strncmp(name, "punct", 5))
        return set_add_mask(t, s, negated ? MASK_ALL & ~(MASK_P | MASK_S) : MASK_P | MASK_S);
    return set_add_named(t, s, name, (size_t)(close - name), negated, false);
}

/* Everything between [ or [^ or && and the next && or ]: a union. Leaves t->p there. */
static int parse_class_union(struct translation *t, struct set *s)
{
    int rc = OK;
    bool first = true, after_range = false;
    while (t->p < t->end && *t->p != ']' && !looking_at(t, "&&")) {
        uint32_t c;
        enum escape kind = ESCAPE_LITERAL;
        bool plain_hyphen = *t->p == '-';
        if (looking_at(t, "[:")) { TRY(parse_posix(t, s)); kind = ESCAPE_SET; }
        else if (*t->p == '[') {
            struct buffer inner = {0};
            t->p++;
            rc = parse_class(t, &inner);
            if (rc == OK) set_add_other(s, "", &inner, "");
            free(inner.data);
            if (rc != OK) goto out;
            kind = ESCAPE_SET;
        } else if (*t->p == '\\') {
            t->p++;
            kind = parse_escape(t, s, true, &c, &rc);
            if (kind == ESCAPE_ERROR) goto out;
            if (kind == ESCAPE_OTHER) {
                if (*t->p != 'b') { rc = refuse(t, "an escape that has no meaning in brackets"); goto out; }
                t->p++;
                c = 8;
                kind = ESCAPE_LITERAL;
            }
        } else c = utf8_next(&t->p);
        bool last = t->p == t->end || *t->p == ']' || looking_at(t, "&&");
        if (plain_hyphen && !first && !last) { rc = refuse(t, after_range ? "a hyphen after a range" : "a hyphen after a set"); goto out; }
        after_range = false;
        if (kind == ESCAPE_SET) {
            first = false;
            continue;
        }
        uint32_t to = c;
        if (t->p + 1 < t->end && *t->p == '-' && t->p[1] != ']' && !(t->p[1] == '&' && t->p + 2 < t->end && t->p[2] == '&')) {
            t->p++;
            if (plain_hyphen || *t->p == '[') { rc = refuse(t, "a range that starts with a hyphen or ends with a set"); goto out; }
            struct set none = {0};
            kind = ESCAPE_LITERAL;
            if (*t->p == '\\') {
                t->p++;
                kind = parse_escape(t, &none, true, &to, &rc);
                set_free(&none);
            } else to = utf8_next(&t->p);
            if (rc != OK) goto out;
            if (kind != ESCAPE_LITERAL || to < c) { rc = refuse(t, "a range whose end is no character or before its start"); goto out; }
            after_range = true;
            if (t->ignore_case && to >= 0x80) { rc = refuse(t, "(?i) with a range beyond ASCII"); goto out; }
        }
        TRY(check_case(t, c, false));
        add_range(&s->items, c, to);
        first = false;
    }
out:
    return rc;
}

/* A bracket, t->p behind its [. Writes a pattern for one character. */
static int parse_class(struct translation *t, struct buffer *out)
{
    int rc = OK;
    struct set s = {0};
    struct buffer both = {0};
    bool negated = t->p < t->end && *t->p == '^';
    if (++t->depth > MAX_DEPTH) return refuse(t, "deep nesting");
    if (negated) t->p++;
    if (t->p < t->end && *t->p == ']') { rc = refuse(t, "an empty bracket"); goto out; }
    TRY(parse_class_union(t, &s));
    while (looking_at(t, "&&")) {                       /* A&&B: (?=A)B */
        t->p += 2;
        if (!s.items.n && !s.others.n) { rc = refuse(t, "an empty side of &&"); goto out; }
        buffer_add_string(&both, "(?=");
        set_write(&s, false, &both);
        buffer_add_string(&both, ")");
        set_free(&s);
        s = (struct set){0};
        TRY(parse_class_union(t, &s));
    }
    if (t->p == t->end) { rc = fail(ERR_INPUT, "%s: the pattern has a [ without its ]", t->where); goto out; }
    t->p++;
    if (!s.items.n && !s.others.n) { rc = refuse(t, "an empty bracket or side of &&"); goto out; }
    if (both.n) {
        set_write(&s, false, &both);
        set_free(&s);
        s = (struct set){0};
        set_add_other(&s, "(?:", &both, ")");
    }
    set_write(&s, negated, out);
out:
    t->depth--;
    set_free(&s);
    free(both.data);
    return rc;
}

static void insert(struct buffer *b, size_t at, const char *s)
{
    size_t n = strlen(s), tail = b->n - at;
    buffer_add(b, s, n);
    memmove(b->data + at + n, b->data + at, tail);
    memcpy(b->data + at, s, n);
}

/* {n}, {n,}, {,m}, {n,m}; false when the brace is a literal. */
static bool parse_interval(struct translation *t, long *low, long *high)
{
    const char *p = t->p + 1;
    bool has_low = false, has_high = false, comma = false;
    *low = *high = 0;
    for (; p < t->end && *p >= '0' && *p <= '9' && *low < 1000000; p++) { *low = *low * 10 + (*p - '0'); has_low = true; }
    if (p < t->end && *p == ',') {
        comma = true;
        for (p++; p < t->end && *p >= '0' && *p <= '9' && *high < 1000000; p++) { *high = *high * 10 + (*p - '0'); has_high = true; }
    }
    if (p == t->end || *p != '}' || (!has_low && !has_high)) return false;
    if (!comma) *high = *low;
    else if (!has_high) *high = -1;
    t->p = p + 1;
    return true;
}

/* The quantifiers behind an atom. In Oniguruma *+ ++ ?+ are possessive, but + and ? behind {n} (and + behind {n,m}) repeat the repeat. */
static int parse_quantifiers(struct translation *t)
{
    bool after_interval = false;
    for (int count = 0; t->p < t->end; count++) {
        long low, high;
        char c = *t->p, s[48];
        bool interval = c == '{' && parse_interval(t, &low, &high);
        if (!interval && c != '*' && c != '+' && c != '?') return OK;
        if (!t->has_atom) return refuse(t, "a quantifier with nothing to repeat");
        if (count && !(after_interval && !interval && count == 1)) return refuse(t, "stacked quantifiers");
        if (count) {
            insert(&t->out, t->atom, "(?:");
            buffer_add_string(&t->out, ")");
        }
        if (interval) {
            if (high >= 0 && high < low) return refuse(t, "{n,m} with n > m");
            if (low > 65535 || high > 65535) return refuse(t, "a repeat count above 65535");
            if (high < 0) snprintf(s, sizeof s, "{%ld,}", low);
            else if (high == low) snprintf(s, sizeof s, "{%ld}", low);
            else snprintf(s, sizeof s, "{%ld,%ld}", low, high);
            buffer_add_string(&t->out, s);
            if (high != low && t->p < t->end && *t->p == '?') {
                buffer_add_string(&t->out, "?");
                t->p++;
            }
        } else {
            t->p++;
            buffer_add(&t->out, &c, 1);
            if (t->p < t->end && (*t->p == '?' || *t->p == '+')) buffer_add(&t->out, t->p++, 1);
        }
        after_interval = interval;
        t->previous = 0;
    }
    return OK;
}

static int parse_alternatives(struct translation *t);

/* (?imx-imx) and (?imx-imx:...), t->p behind the question mark */
static int parse_options(struct translation *t)
{
    bool on = true, ignore_case = t->ignore_case, dot_all = t->dot_all, old_case = ignore_case, old_dot = dot_all;
    int rc = OK;
    for (; t->p < t->end && *t->p != ')' && *t->p != ':'; t->p++) {
        if (*t->p == '-') on = false;
        else if (*t->p == 'i') ignore_case = on;
        else if (*t->p == 'm') dot_all = on;
        else return refuse(t, "a group option other than i and m");
    }
    if (t->p == t->end) return fail(ERR_INPUT, "%s: the pattern has a ( without its )", t->where);
    bool isolated = *t->p++ == ')';
    buffer_add_string(&t->out, ignore_case == old_case ? "(?:" : ignore_case ? "(?i:" : "(?-i:");
    t->ignore_case = ignore_case;
    t->dot_all = dot_all;
    TRY(parse_alternatives(t));
    buffer_add_string(&t->out, ")");
    t->ignore_case = old_case;
    t->dot_all = old_dot;
    if (!isolated && (t->p == t->end || *t->p++ != ')')) rc = fail(ERR_INPUT, "%s: the pattern has a ( without its )", t->where);
    t->has_atom = !isolated;
out:
    return rc;
}

static int parse_group(struct translation *t)   /* t->p behind ( */
{
    static const char *const openings[] = {"?:", "?=", "?!", "?>", "?<=", "?<!"};
    int rc = OK, opening = -1;
    if (looking_at(t, "?#")) {
        const char *close = memchr(t->p, ')', (size_t)(t->end - t->p));
        if (!close) return fail(ERR_INPUT, "%s: the pattern has a comment without its )", t->where);
        t->p = close + 1;
        t->has_atom = false;
        return OK;
    }
    if (looking_at(t, "*")) return refuse(t, "a callout");
    for (int i = 0; i < 6; i++) if (looking_at(t, openings[i])) opening = i;
    if (opening < 0 && looking_at(t, "?<")) {           /* a named group: nothing refers to it */
        const char *close = memchr(t->p, '>', (size_t)(t->end - t->p));
        if (!close) return refuse(t, "a group name without its >");
        t->p = close + 1;
    } else if (opening < 0 && looking_at(t, "?")) {
        t->p++;
        if (t->p < t->end && strchr("im-", *t->p)) return parse_options(t);
        return refuse(t, "a group of a kind beyond (?:, (?=, (?!, (?<=, (?<!, (?>, (?i and (?m");
    }
    buffer_add_string(&t->out, "(");
    buffer_add_string(&t->out, opening < 0 ? "?:" : openings[opening]);
    if (opening >= 0) t->p += strlen(openings[opening]);
    TRY(parse_alternatives(t));
    if (t->p == t->end) { rc = fail(ERR_INPUT, "%s: the pattern has a ( without its )", t->where); goto out; }
    t->p++;
    buffer_add_string(&t->out, ")");
    t->has_atom = opening < 0 || opening == 0 || opening == 3;
out:
    return rc;
}

static int write_word_boundary(struct translation *t, bool negated)
{
    struct set word = {0};
    struct buffer w = {0};
    int rc = OK;
    TRY(set_add_word(t, &word, false, true));
    set_write(&word, false, &w);
    const char *format[2] = {"(?:(?<=%s)(?!%s)|(?<!%s)(?=%s))", "(?:(?<=%s)(?=%s)|(?<!%s)(?!%s))"};
    char *s = xasprintf(format[negated], w.data, w.data, w.data, w.data);
    buffer_add_string(&t->out, s);
    free(s);
    t->has_atom = false;
out:
    set_free(&word);
    free(w.data);
    return rc;
}

static int parse_backslash(struct translation *t)   /* t->p behind it, outside of brackets */
{
    struct set s = {0};
    uint32_t c;
    int rc;
    switch (parse_escape(t, &s, false, &c, &rc)) {
    case ESCAPE_ERROR: break;
    case ESCAPE_LITERAL:
        TRY(check_case(t, c, true));
        write_literal(&t->out, c);
        break;
    case ESCAPE_SET:
        t->previous = 0;
        set_write(&s, false, &t->out);
        break;
    case ESCAPE_OTHER:
        t->previous = 0;
        switch (*t->p++) {
        case 'A': buffer_add_string(&t->out, "\\A"); t->has_atom = false; break;
        case 'z': buffer_add_string(&t->out, "\\z"); t->has_atom = false; break;
        case 'Z': buffer_add_string(&t->out, "\\Z"); t->has_atom = false; break;
        case 'b': rc = write_word_boundary(t, false); break;
        case 'B': rc = write_word_boundary(t, true); break;
        case 'R': buffer_add_string(&t->out, "(?>\\x{d}\\x{a}|[\\x{a}-\\x{d}\\x{85}\\x{2028}\\x{2029}])"); break;
        case '0':
            if (t->p < t->end && *t->p >= '0' && *t->p <= '7') { rc = refuse(t, "an octal code"); goto out; }
            write_literal(&t->out, 0);
            break;
        default: {
            char what[] = {'\\', t->p[-1], 0};
            rc = refuse(t, what);
        }
        }
    }
out:
    set_free(&s);
    return rc;
}

/* a|b|c up to the end or a ) that is left to the caller */
static int parse_alternatives(struct translation *t)
{
    int rc = OK;
    if (++t->depth > MAX_DEPTH) return refuse(t, "deep nesting");
    t->has_atom = false;
    t->previous = 0;
    while (t->p < t->end && *t->p != ')') {
        size_t atom = t->out.n;
        uint32_t c = utf8_next(&t->p);
        t->has_atom = true;
        if (c == '|') {
            buffer_add_string(&t->out, "|");
            t->has_atom = false;
            t->previous = 0;
        } else if (c == '(') {
            t->previous = 0;
            TRY(parse_group(t));
            t->previous = 0;
        } else if (c == '[') {
            TRY(parse_class(t, &t->out));
            t->previous = 0;
        } else if (c == '\\') TRY(parse_backslash(t));
        else if (c == '.') {
            buffer_add_string(&t->out, t->dot_all ? ANY : "[^\\x{a}]");
            t->previous = 0;
        } else if (c == '^' || c == '$') {
            buffer_add_string(&t->out, c == '^' ? "(?m:^)" : "(?m:$)");
            t->has_atom = false;
            t->previous = 0;
        } else if (c == '*' || c == '+' || c == '?') {
            rc = refuse(t, "a quantifier with nothing to repeat");
            goto out;
        } else {
            TRY(check_case(t, c, true));
            write_literal(&t->out, c);
        }
        t->atom = atom;
        TRY(parse_quantifiers(t));
    }
out:
    t->depth--;
    return rc;
}

int regex_translate(char **out, const char *regex, size_t n, bool exact, const char *where)
{
    struct translation t = {.p = regex, .end = regex + n, .where = where, .exact = exact};
    int rc = OK;
    buffer_add_string(&t.out, "");
    TRY(parse_alternatives(&t));
    if (t.p != t.end) rc = fail(ERR_INPUT, "%s: the pattern has a ) without its (", where);
out:
    if (rc != OK) { free(t.out.data); t.out.data = NULL; }
    *out = t.out.data;
    return rc;
}
