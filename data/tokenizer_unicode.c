/* See tokenizer_unicode.h. The tables were made by comparing, for every code point, what Hugging Face tokenizers does with what
 * PCRE2 10.42 and utf8proc 2.8 do; newer libraries know some of these ranges themselves, which changes nothing. */
#include "data/tokenizer_unicode.h"

#include <string.h>
#include <utf8proc.h>

#include "base/error.h"

#define GC(name) UTF8PROC_CATEGORY_##name

struct range { uint32_t first, last; };

const struct unicode_recent unicode_recent[] = {
    {0x897, 0x897, GC(MN), SCRIPT_ARABIC}, {0xcf3, 0xcf3, GC(MC), SCRIPT_KANNADA}, {0xece, 0xece, GC(MN), SCRIPT_LAO},
    {0x1b4e, 0x1b4f, GC(PO), 0}, {0x1b7f, 0x1b7f, GC(PO), 0}, {0x1c89, 0x1c89, GC(LU), SCRIPT_CYRILLIC},
    {0x1c8a, 0x1c8a, GC(LL), SCRIPT_CYRILLIC}, {0x2427, 0x2429, GC(SO), 0}, {0x2ffc, 0x2fff, GC(SO), 0},
    {0x31e4, 0x31e5, GC(SO), 0}, {0x31ef, 0x31ef, GC(SO), 0}, {0xa7cb, 0xa7cc, GC(LU), SCRIPT_LATIN},
    {0xa7cd, 0xa7cd, GC(LL), SCRIPT_LATIN}, {0xa7da, 0xa7da, GC(LU), SCRIPT_LATIN}, {0xa7db, 0xa7db, GC(LL), SCRIPT_LATIN},
    {0xa7dc, 0xa7dc, GC(LU), SCRIPT_LATIN}, {0x105c0, 0x105f3, GC(LO), 0}, {0x10d40, 0x10d49, GC(ND), 0},
    {0x10d4a, 0x10d4d, GC(LO), 0}, {0x10d4e, 0x10d4e, GC(LM), 0}, {0x10d4f, 0x10d4f, GC(LO), 0},
    {0x10d50, 0x10d65, GC(LU), 0}, {0x10d69, 0x10d6d, GC(MN), 0}, {0x10d6e, 0x10d6e, GC(PD), 0},
    {0x10d6f, 0x10d6f, GC(LM), 0}, {0x10d70, 0x10d85, GC(LL), 0}, {0x10d8e, 0x10d8f, GC(SM), 0},
    {0x10ec2, 0x10ec4, GC(LO), SCRIPT_ARABIC}, {0x10efc, 0x10eff, GC(MN), SCRIPT_ARABIC}, {0x1123f, 0x11240, GC(LO), 0},
    {0x11241, 0x11241, GC(MN), 0}, {0x11380, 0x11389, GC(LO), 0}, {0x1138b, 0x1138b, GC(LO), 0},
    {0x1138e, 0x1138e, GC(LO), 0}, {0x11390, 0x113b5, GC(LO), 0}, {0x113b7, 0x113b7, GC(LO), 0},
    {0x113b8, 0x113ba, GC(MC), 0}, {0x113bb, 0x113c0, GC(MN), 0}, {0x113c2, 0x113c2, GC(MC), 0},
    {0x113c5, 0x113c5, GC(MC), 0}, {0x113c7, 0x113ca, GC(MC), 0}, {0x113cc, 0x113cd, GC(MC), 0},
    {0x113ce, 0x113ce, GC(MN), 0}, {0x113cf, 0x113cf, GC(MC), 0}, {0x113d0, 0x113d0, GC(MN), 0},
    {0x113d1, 0x113d1, GC(LO), 0}, {0x113d2, 0x113d2, GC(MN), 0}, {0x113d3, 0x113d3, GC(LO), 0},
    {0x113d4, 0x113d5, GC(PO), 0}, {0x113d7, 0x113d8, GC(PO), 0}, {0x113e1, 0x113e2, GC(MN), 0},
    {0x116d0, 0x116e3, GC(ND), SCRIPT_MYANMAR}, {0x1171e, 0x1171e, GC(MC), 0}, {0x11b00, 0x11b09, GC(PO), SCRIPT_DEVANAGARI},
    {0x11bc0, 0x11be0, GC(LO), 0}, {0x11be1, 0x11be1, GC(PO), 0}, {0x11bf0, 0x11bf9, GC(ND), 0},
    {0x11f00, 0x11f01, GC(MN), 0}, {0x11f02, 0x11f02, GC(LO), 0}, {0x11f03, 0x11f03, GC(MC), 0},
    {0x11f04, 0x11f10, GC(LO), 0}, {0x11f12, 0x11f33, GC(LO), 0}, {0x11f34, 0x11f35, GC(MC), 0},
    {0x11f36, 0x11f3a, GC(MN), 0}, {0x11f3e, 0x11f3f, GC(MC), 0}, {0x11f40, 0x11f40, GC(MN), 0},
    {0x11f41, 0x11f41, GC(MC), 0}, {0x11f42, 0x11f42, GC(MN), 0}, {0x11f43, 0x11f4f, GC(PO), 0},
    {0x11f50, 0x11f59, GC(ND), 0}, {0x11f5a, 0x11f5a, GC(MN), 0}, {0x1342f, 0x1342f, GC(LO), 0},
    {0x13439, 0x1343f, GC(CF), 0}, {0x13440, 0x13440, GC(MN), 0}, {0x13441, 0x13446, GC(LO), 0},
    {0x13447, 0x13455, GC(MN), 0}, {0x13460, 0x143fa, GC(LO), 0}, {0x16100, 0x1611d, GC(LO), 0},
    {0x1611e, 0x16129, GC(MN), 0}, {0x1612a, 0x1612c, GC(MC), 0}, {0x1612d, 0x1612f, GC(MN), 0},
    {0x16130, 0x16139, GC(ND), 0}, {0x16d40, 0x16d42, GC(LM), 0}, {0x16d43, 0x16d6a, GC(LO), 0},
    {0x16d6b, 0x16d6c, GC(LM), 0}, {0x16d6d, 0x16d6f, GC(PO), 0}, {0x16d70, 0x16d79, GC(ND), 0},
    {0x18cff, 0x18cff, GC(LO), 0}, {0x1b132, 0x1b132, GC(LO), SCRIPT_HIRAGANA}, {0x1b155, 0x1b155, GC(LO), SCRIPT_KATAKANA},
    {0x1cc00, 0x1ccef, GC(SO), 0}, {0x1ccf0, 0x1ccf9, GC(ND), 0}, {0x1cd00, 0x1ceb3, GC(SO), 0},
    {0x1d2c0, 0x1d2d3, GC(NO), 0}, {0x1df25, 0x1df2a, GC(LL), SCRIPT_LATIN}, {0x1e030, 0x1e06d, GC(LM), SCRIPT_CYRILLIC},
    {0x1e08f, 0x1e08f, GC(MN), SCRIPT_CYRILLIC}, {0x1e4d0, 0x1e4ea, GC(LO), 0}, {0x1e4eb, 0x1e4eb, GC(LM), 0},
    {0x1e4ec, 0x1e4ef, GC(MN), 0}, {0x1e4f0, 0x1e4f9, GC(ND), 0}, {0x1e5d0, 0x1e5ed, GC(LO), 0},
    {0x1e5ee, 0x1e5ef, GC(MN), 0}, {0x1e5f0, 0x1e5f0, GC(LO), 0}, {0x1e5f1, 0x1e5fa, GC(ND), 0},
    {0x1e5ff, 0x1e5ff, GC(PO), 0}, {0x1f6dc, 0x1f6dc, GC(SO), 0}, {0x1f774, 0x1f776, GC(SO), 0},
    {0x1f77b, 0x1f77f, GC(SO), 0}, {0x1f7d9, 0x1f7d9, GC(SO), 0}, {0x1f8b2, 0x1f8bb, GC(SO), 0},
    {0x1f8c0, 0x1f8c1, GC(SO), 0}, {0x1fa75, 0x1fa77, GC(SO), 0}, {0x1fa87, 0x1fa89, GC(SO), 0},
    {0x1fa8f, 0x1fa8f, GC(SO), 0}, {0x1faad, 0x1faaf, GC(SO), 0}, {0x1fabb, 0x1fabf, GC(SO), 0},
    {0x1fac6, 0x1fac6, GC(SO), 0}, {0x1face, 0x1facf, GC(SO), 0}, {0x1fada, 0x1fadc, GC(SO), 0},
    {0x1fadf, 0x1fadf, GC(SO), 0}, {0x1fae8, 0x1fae9, GC(SO), 0}, {0x1faf7, 0x1faf8, GC(SO), 0},
    {0x1fbcb, 0x1fbef, GC(SO), 0}, {0x2b739, 0x2b739, GC(LO), SCRIPT_HAN}, {0x2ebf0, 0x2ee5d, GC(LO), SCRIPT_HAN},
    {0x31350, 0x323af, GC(LO), SCRIPT_HAN},
    {0, 0, 0, 0}
};

/* Gaps of Unicode 9 that later versions filled with marks or decomposing characters: to the normalization that fixed the ids
 * they are starters that neither decompose nor compose, and no marks. Sorted. */
static const struct range inert_since_unicode_9[] = {
    {0x7fb, 0x7ff}, {0x85f, 0x89f}, {0x8be, 0x8d3}, {0x9fc, 0xa00}, {0xafa, 0xb00}, {0xb4e, 0xb55}, {0xc04, 0xc04}, {0xc3a, 0xc3c},
    {0xc5b, 0xc5f}, {0xcf3, 0xd00}, {0xd3b, 0xd3c}, {0xd80, 0xd81}, {0xeba, 0xeba}, {0xece, 0xecf}, {0x1715, 0x171f}, {0x180f, 0x180f},
    {0x1abf, 0x1aff}, {0x1cf7, 0x1cf7}, {0x1df6, 0x1dfa}, {0x32ff, 0x32ff}, {0xa7b8, 0xa7f6}, {0xa82c, 0xa82f}, {0xa8fe, 0xa8ff},
    {0xab66, 0xab6f}, {0x10570, 0x105ff}, {0x10768, 0x107ff}, {0x10d00, 0x10e5f}, {0x10e7f, 0x10fff}, {0x11070, 0x1107e}, {0x110c2, 0x110cf},
    {0x11144, 0x1114f}, {0x111ce, 0x111cf}, {0x1123f, 0x1127f}, {0x1133a, 0x1133b}, {0x11375, 0x113ff}, {0x1145e, 0x1147f},
    {0x11740, 0x1189f}, {0x11900, 0x11abf}, {0x11cb7, 0x11fff}, {0x1342f, 0x143ff}, {0x14647, 0x167ff}, {0x16b90, 0x16eff},
    {0x16f45, 0x16f4f}, {0x16f7f, 0x16f8e}, {0x16fe1, 0x16fff}, {0x1bca4, 0x1cfff}, {0x1e02b, 0x1e7ff}, {0x1f16c, 0x1f16f},
    {0x1f9c1, 0x1fffd},
};

/* Punctuation (P*) of Unicode 16 that the Punctuation pre-tokenizer, whose table stops at Unicode 8, does not know. Sorted. */
static const struct range punctuation_since_unicode_8[] = {
    {0x61d, 0x61d}, {0x9fd, 0x9fd}, {0xa76, 0xa76}, {0xc77, 0xc77}, {0xc84, 0xc84}, {0x1b4e, 0x1b4f}, {0x1b7d, 0x1b7f}, {0x2e43, 0x2e4f},
    {0x2e52, 0x2e5d}, {0x10d6e, 0x10d6e}, {0x10ead, 0x10ead}, {0x10f55, 0x10f59}, {0x10f86, 0x10f89}, {0x113d4, 0x113d5}, {0x113d7, 0x113d8},
    {0x1144b, 0x1144f}, {0x1145a, 0x1145b}, {0x1145d, 0x1145d}, {0x11660, 0x1166c}, {0x116b9, 0x116b9}, {0x1183b, 0x1183b},
    {0x11944, 0x11946}, {0x119e2, 0x119e2}, {0x11a3f, 0x11a46}, {0x11a9a, 0x11a9c}, {0x11a9e, 0x11aa2}, {0x11b00, 0x11b09},
    {0x11be1, 0x11be1}, {0x11c41, 0x11c45}, {0x11c70, 0x11c71}, {0x11ef7, 0x11ef8}, {0x11f43, 0x11f4f}, {0x11fff, 0x11fff},
    {0x12ff1, 0x12ff2}, {0x16d6d, 0x16d6f}, {0x16e97, 0x16e9a}, {0x16fe2, 0x16fe2}, {0x1e5ff, 0x1e5ff}, {0x1e95e, 0x1e95f},
};

/* Lower case of capitals newer than Unicode 15: first..last map to to..; step 1. */
static const struct { uint32_t first, last, to; } lower_since_unicode_15[] = {
    {0x1c89, 0x1c89, 0x1c8a}, {0xa7cb, 0xa7cb, 0x264}, {0xa7cc, 0xa7cc, 0xa7cd}, {0xa7ce, 0xa7ce, 0xa7cf}, {0xa7d2, 0xa7d2, 0xa7d3},
    {0xa7d4, 0xa7d4, 0xa7d5}, {0xa7da, 0xa7da, 0xa7db}, {0xa7dc, 0xa7dc, 0x19b}, {0x10d50, 0x10d65, 0x10d70}, {0x16ea0, 0x16eb8, 0x16ebb},
};

static bool in_ranges(const struct range *r, int n, uint32_t c)
{
    int low = 0, high = n;
    while (low < high) {
        int mid = (low + high) / 2;
        if (c > r[mid].last) low = mid + 1;
        else high = mid;
    }
    return low < n && c >= r[low].first;
}

#define IN(table, c) in_ranges(table, sizeof table / sizeof *table, c)

static const struct unicode_recent *find_recent(uint32_t c)
{
    int low = 0, high = sizeof unicode_recent / sizeof *unicode_recent - 1, n = high;
    while (low < high) {
        int mid = (low + high) / 2;
        if (c > unicode_recent[mid].last) low = mid + 1;
        else high = mid;
    }
    return low < n && c >= unicode_recent[low].first ? &unicode_recent[low] : NULL;
}

void buffer_add(struct buffer *b, const void *data, size_t n)
{
    if (b->n + n + 1 > b->capacity) {
        b->capacity = b->n + n + 1 > 2 * b->capacity ? b->n + n + 64 : 2 * b->capacity;
        b->data = xrealloc(b->data, b->capacity);
    }
    if (n) memcpy(b->data + b->n, data, n);
    b->n += n;
    b->data[b->n] = 0;
}

void buffer_add_string(struct buffer *b, const char *s) { buffer_add(b, s, strlen(s)); }

int utf8_put(uint32_t c, char out[4])
{
    if (c < 0x80) { out[0] = (char)c; return 1; }
    if (c < 0x800) { out[0] = (char)(0xc0 | c >> 6); out[1] = (char)(0x80 | (c & 63)); return 2; }
    if (c < 0x10000) { out[0] = (char)(0xe0 | c >> 12); out[1] = (char)(0x80 | (c >> 6 & 63)); out[2] = (char)(0x80 | (c & 63)); return 3; }
    out[0] = (char)(0xf0 | c >> 18);
    out[1] = (char)(0x80 | (c >> 12 & 63));
    out[2] = (char)(0x80 | (c >> 6 & 63));
    out[3] = (char)(0x80 | (c & 63));
    return 4;
}

int64_t utf8_check(const char *text, size_t n, bool *recent)
{
    const uint8_t *s = (const uint8_t *)text;
    *recent = false;
    for (size_t i = 0; i < n;) {
        uint64_t eight;
        while (i + 8 <= n && (memcpy(&eight, s + i, 8), !(eight & 0x8080808080808080u))) i += 8;
        if (i == n) break;
        if (s[i] < 0x80) { i++; continue; }
        uint32_t c;
        if (s[i] >= 0xc2 && s[i] < 0xe0 && n - i >= 2 && (s[i + 1] & 0xc0) == 0x80) { i += 2; continue; }   /* nothing recent below U+0800 */
        if (s[i] >= 0xe0 && s[i] < 0xf0 && n - i >= 3 && (s[i + 1] & 0xc0) == 0x80 && (s[i + 2] & 0xc0) == 0x80) {
            c = (s[i] & 15u) << 12 | (s[i + 1] & 63u) << 6 | (s[i + 2] & 63u);
            if (c < 0x800 || (c >= 0xd800 && c < 0xe000)) return (int64_t)i;
            i += 3;
            if (c >= 0x3200 && c < 0xa7cb) continue;                                                       /* CJK: nothing recent */
        } else if (s[i] >= 0xf0 && s[i] < 0xf5 && n - i >= 4 && (s[i + 1] & 0xc0) == 0x80 && (s[i + 2] & 0xc0) == 0x80 && (s[i + 3] & 0xc0) == 0x80) {
            c = (s[i] & 7u) << 18 | (s[i + 1] & 63u) << 12 | (s[i + 2] & 63u) << 6 | (s[i + 3] & 63u);
            if (c < 0x10000 || c > 0x10ffff) return (int64_t)i;
            i += 4;
        } else return (int64_t)i;
        if (!*recent) *recent = find_recent(c) != NULL;
    }
    return -1;
}

int unicode_category(uint32_t c)
{
    const struct unicode_recent *r = c < 0x800 ? NULL : find_recent(c);
    return r ? r->category : (int)utf8proc_category((utf8proc_int32_t)c);
}

bool unicode_is_space(uint32_t c)
{
    return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 ||
           c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

bool unicode_is_numeric(uint32_t c)
{
    if (c < 0x80) return c >= '0' && c <= '9';
    int category = unicode_category(c);
    return category == GC(ND) || category == GC(NL) || category == GC(NO) || (c >= 0x11de0 && c <= 0x11de9) || (c >= 0x16ff4 && c <= 0x16ff6);
}

bool unicode_is_punctuation(uint32_t c)
{
    if (c < 0x80) return c > 0x20 && c < 0x7f && !((c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'z'));
    if (c == 0x166d || c == 0x111c9) return true;   /* punctuation then, not any more */
    int category = unicode_category(c);
    return category >= GC(PC) && category <= GC(PO) && !IN(punctuation_since_unicode_8, c);
}

bool unicode_is_word(uint32_t c)
{
    if (c < 0x80) return (c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'z') || c == '_';
    if (c == 0x200c || c == 0x200d) return true;
    int category = unicode_category(c);
    if ((category >= GC(LU) && category <= GC(NL)) || category == GC(PC)) return true;   /* LU LL LT LM LO MN MC ME ND NL */
    return (c >= 0x24b6 && c <= 0x24e9) || (c >= 0x1f130 && c <= 0x1f149) || (c >= 0x1f150 && c <= 0x1f169) || (c >= 0x1f170 && c <= 0x1f189);
}

bool unicode_is_inert(uint32_t c) { return IN(inert_since_unicode_9, c); }

bool unicode_is_mark(uint32_t c)
{
    if (c < 0x300) return false;
    if (c == 0x1cf2 || c == 0x1cf3) return true;    /* marks then, letters now */
    int category = (int)utf8proc_category((utf8proc_int32_t)c);
    return category >= GC(MN) && category <= GC(ME) && c != 0x111c9 && !unicode_is_inert(c);
}

int unicode_lower(uint32_t c, uint32_t out[2])
{
    if (c == 0x130) { out[0] = 'i'; out[1] = 0x307; return 2; }
    for (size_t i = 0; c >= 0x1c89 && i < sizeof lower_since_unicode_15 / sizeof *lower_since_unicode_15; i++) {
        if (c < lower_since_unicode_15[i].first || c > lower_since_unicode_15[i].last) continue;
        out[0] = lower_since_unicode_15[i].to + (c - lower_since_unicode_15[i].first);
        return 1;
    }
    out[0] = c < 0x80 ? (c >= 'A' && c <= 'Z' ? c + 32 : c) : (uint32_t)utf8proc_tolower((utf8proc_int32_t)c);
    return 1;
}

/* ---- normalization ----
 *
 * Only the stretches that are not already stable are touched: decompose every character (utf8proc), order the marks by combining class
 * with a counting sort (a million marks in a row are fine), compose (utf8proc). */

/* A character that no normalization form changes and that the characters before it do not touch: the text may be cut in front of it. */
static bool is_stable(uint32_t c, enum normal_form form)
{
    if (c < 0xa0 || (c < 0x300 && form == NFC)) return true;
    if (c >= 0x1160 && c < 0x1200) return false;                                  /* Hangul vowels and finals */
    if (c >= 0xac00 && c < 0xd7a4) return form == NFC || form == NFKC;
    const utf8proc_property_t *p = utf8proc_get_property((utf8proc_int32_t)c);
    if (p->combining_class == 0 && p->decomp_seqindex == UINT16_MAX &&
        p->category != UTF8PROC_CATEGORY_MN && p->category != UTF8PROC_CATEGORY_MC && p->category != UTF8PROC_CATEGORY_ME) return true;
    return unicode_is_inert(c);
}

static void code_add(struct normal_work *w, int32_t c)
{
    if (w->code_n == w->code_capacity) {
        w->code_capacity = w->code_capacity ? 2 * w->code_capacity : 256;
        w->code = xrealloc(w->code, w->code_capacity * sizeof *w->code);
    }
    w->code[w->code_n++] = c;
}

static int combining_class(int32_t c) { return utf8proc_get_property(c)->combining_class; }

/* Canonical order: runs of marks sorted by combining class, stable. */
static void order_marks(struct normal_work *w)
{
    for (size_t i = 0, end; i < w->code_n; i = end) {
        size_t count[257] = {0};
        bool ordered = true;
        end = i + 1;
        if (!combining_class(w->code[i])) continue;
        while (end < w->code_n && combining_class(w->code[end])) {
            ordered &= combining_class(w->code[end - 1]) <= combining_class(w->code[end]);
            end++;
        }
        if (ordered) continue;
        if (end - i > w->sorted_capacity) w->sorted = xrealloc(w->sorted, (w->sorted_capacity = 2 * (end - i)) * sizeof *w->sorted);
        for (size_t k = i; k < end; k++) count[combining_class(w->code[k]) + 1]++;
        for (int k = 1; k < 257; k++) count[k] += count[k - 1];
        for (size_t k = i; k < end; k++) w->sorted[count[combining_class(w->code[k])]++] = w->code[k];
        memcpy(w->code + i, w->sorted, (end - i) * sizeof *w->code);
    }
}

static void normalize_stretch(enum normal_form form, struct normal_work *w, const char *p, const char *end, struct buffer *out)
{
    bool compose = form == NFC || form == NFKC;
    utf8proc_option_t options = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | (form == NFKC || form == NFKD ? UTF8PROC_COMPAT : 0);
    w->code_n = 0;
    while (p < end) {
        utf8proc_int32_t parts[32];
        int boundary = 0;
        utf8proc_ssize_t n = utf8proc_decompose_char((utf8proc_int32_t)utf8_next(&p), parts, 32, options, &boundary);
        CHECK(n >= 0 && n <= 32, "a character decomposes into %d", (int)n);
        for (utf8proc_ssize_t i = 0; i < n; i++) code_add(w, parts[i]);
    }
    order_marks(w);
    utf8proc_ssize_t n = (utf8proc_ssize_t)w->code_n;
    if (compose) n = utf8proc_normalize_utf32(w->code, n, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    for (utf8proc_ssize_t i = 0; i < n; i++) {
        char s[4];
        buffer_add(out, s, (size_t)utf8_put((uint32_t)w->code[i], s));
    }
}

bool unicode_normalize(enum normal_form form, struct normal_work *w, const char *text, size_t bytes, struct buffer *out)
{
    const char *p = text, *end = text + bytes, *copied = text, *before = NULL;   /* before: the stable character before p */
    bool changed = false;
    while (p < end) {
        uint64_t eight;
        while (end - p >= 8 && (memcpy(&eight, p, 8), !(eight & 0x8080808080808080u))) { before = p + 7; p += 8; }
        if (p == end) break;
        const char *at = p;
        uint32_t c = utf8_next(&p);
        if (is_stable(c, form)) { before = at; continue; }
        const char *from = at;
        if (before) {
            const char *b = before;
            if (!unicode_is_inert(utf8_next(&b))) from = before;
        }
        while (p < end) {
            at = p;
            if (is_stable(utf8_next(&p), form)) { p = at; break; }
        }
        if (!changed) out->n = 0;
        changed = true;
        buffer_add(out, copied, (size_t)(from - copied));
        normalize_stretch(form, w, from, p, out);
        copied = p;
        before = NULL;
    }
    if (changed) buffer_add(out, copied, (size_t)(end - copied));
    return changed;
}

void normal_work_free(struct normal_work *w)
{
    free(w->code);
    free(w->sorted);
}
