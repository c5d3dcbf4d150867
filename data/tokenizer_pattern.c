/* Patterns on PCRE2, see tokenizer_pattern.h.
 *
 * A regular expression is compiled twice: `plain` for texts whose characters PCRE2's Unicode version knows, `exact`, which is slower,
 * with the code points of Unicode 15 and 16 added to every property. Both are JIT-compiled; a match that outgrows the JIT's stack is run
 * again by the interpreter, whose memory is the heap, and every match has a limit on its steps.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "data/tokenizer_pattern.h"

#include <pcre2.h>
#include <string.h>

#include "base/error.h"
#include "data/tokenizer_regex.h"
#include "data/tokenizer_unicode.h"

enum { MAX_PATTERN = 1 << 16, MATCH_LIMIT = 50000000, JIT_STACK = 32 << 20 };

enum pattern_kind { PATTERN_REGEX, PATTERN_LITERAL, PATTERN_CHARACTERS, PATTERN_WORDS };
struct pattern {
    enum pattern_kind kind;
    pcre2_code *plain, *exact;             /* equal when no property is named */
    bool jit;
    char *text;                            /* of a literal; of a regex, for messages */
    size_t n;
    bool (*test)(uint32_t);
};

struct pattern_work { pcre2_match_data *match; pcre2_match_context *context; pcre2_jit_stack *stack; };

static int compile(pcre2_code **out, const char *pattern, const char *where)
{
    int error;
    PCRE2_SIZE offset;
    pcre2_compile_context *context = pcre2_compile_context_create(NULL);
    CHECK(context, "out of memory");
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    *out = pcre2_compile((PCRE2_SPTR)pattern, strlen(pattern), PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &offset, context);
    pcre2_compile_context_free(context);
    if (*out) return OK;
    PCRE2_UCHAR message[128];
    pcre2_get_error_message(error, message, sizeof message);
    return fail(ERR_INPUT, "%s: the pattern cannot be used: %s", where, (const char *)message);
}

int pattern_open_regex(struct pattern **out, const char *regex, size_t n, const char *where)
{
    struct pattern *p = xcalloc(1, sizeof *p);
    char *plain = NULL, *exact = NULL;
    int rc = OK;
    *out = NULL;
    p->kind = PATTERN_REGEX;
    p->text = xstrndup(regex, n);
    p->n = n;
    if (n > MAX_PATTERN) {
        rc = fail(ERR_INPUT, "%s: the pattern has %zu bytes, more than the %d this program reads", where, n, MAX_PATTERN);
        goto out;
    }
    TRY(regex_translate(&plain, regex, n, false, where));
    TRY(regex_translate(&exact, regex, n, true, where));
    TRY(compile(&p->plain, plain, where));
    if (!strcmp(plain, exact)) p->exact = p->plain;
    else TRY(compile(&p->exact, exact, where));
    p->jit = !pcre2_jit_compile(p->plain, PCRE2_JIT_COMPLETE) && (p->exact == p->plain || !pcre2_jit_compile(p->exact, PCRE2_JIT_COMPLETE));
    *out = p;
    p = NULL;
out:
    free(plain);
    free(exact);
    pattern_close(p);
    return rc;
}

struct pattern *pattern_open_literal(const char *text, size_t n)
{
    struct pattern *p = xcalloc(1, sizeof *p);
    p->kind = PATTERN_LITERAL;
    p->text = xstrndup(text, n);
    p->n = n;
    return p;
}

struct pattern *pattern_open_characters(bool (*test)(uint32_t))
{
    struct pattern *p = xcalloc(1, sizeof *p);
    p->kind = PATTERN_CHARACTERS;
    p->test = test;
    return p;
}

struct pattern *pattern_open_words(void)
{
    struct pattern *p = xcalloc(1, sizeof *p);
    p->kind = PATTERN_WORDS;
    return p;
}

void pattern_close(struct pattern *p)
{
    if (!p) return;
    if (p->exact != p->plain) pcre2_code_free(p->exact);
    pcre2_code_free(p->plain);
    free(p->text);
    free(p);
}

/* ---- matching ---- */

struct pattern_work *pattern_work_new(void)
{
    struct pattern_work *w = xcalloc(1, sizeof *w);
    w->match = pcre2_match_data_create(1, NULL);
    w->context = pcre2_match_context_create(NULL);
    w->stack = pcre2_jit_stack_create(64 << 10, JIT_STACK, NULL);
    CHECK(w->match && w->context && w->stack, "out of memory");
    pcre2_set_match_limit(w->context, MATCH_LIMIT);
    pcre2_jit_stack_assign(w->context, NULL, w->stack);
    return w;
}

void pattern_work_free(struct pattern_work *w)
{
    if (!w) return;
    pcre2_match_data_free(w->match);
    pcre2_match_context_free(w->context);
    pcre2_jit_stack_free(w->stack);
    free(w);
}

struct pattern_scan pattern_scan_start(const struct pattern *p, struct pattern_work *w, const char *text, size_t n, bool recent)
{
    return (struct pattern_scan){.pattern = p, .work = w, .text = text, .n = n, .last_end = -1, .recent = recent};
}

static int regex_find(const struct pattern_scan *s, size_t *start, size_t *end, bool *found)
{
    const struct pattern *p = s->pattern;
    const pcre2_code *code = s->recent ? p->exact : p->plain;
    struct pattern_work *w = s->work;
    int rc = PCRE2_ERROR_JIT_STACKLIMIT;
    if (p->jit) rc = pcre2_jit_match(code, (PCRE2_SPTR)s->text, s->n, s->at, 0, w->match, w->context);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
        rc = pcre2_match(code, (PCRE2_SPTR)s->text, s->n, s->at, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, w->match, w->context);
    if (rc < 0 && rc != PCRE2_ERROR_NOMATCH) {
        PCRE2_UCHAR message[128];
        pcre2_get_error_message(rc, message, sizeof message);
        return fail(ERR_INPUT, "the pattern \"%.200s\" gives up on a text of %zu bytes (%s): use a simpler pattern or break the text up",
                    p->text, s->n, (const char *)message);
    }
    *found = rc >= 0;
    *start = pcre2_get_ovector_pointer(w->match)[0];
    *end = pcre2_get_ovector_pointer(w->match)[1];
    return OK;
}

static int find(const struct pattern_scan *s, size_t *start, size_t *end, bool *found)
{
    const struct pattern *p = s->pattern;
    const char *at = s->text + s->at, *limit = s->text + s->n;
    *found = false;
    switch (p->kind) {
    case PATTERN_REGEX: return regex_find(s, start, end, found);
    case PATTERN_LITERAL: {
        const char *hit = p->n ? memmem(at, (size_t)(limit - at), p->text, p->n) : at;
        if (!hit) return OK;
        *start = (size_t)(hit - s->text);
        *end = *start + p->n;
        *found = true;
        return OK;
    }
    case PATTERN_CHARACTERS:
        while (at < limit) {
            const char *from = at;
            if (!p->test(utf8_next(&at))) continue;
            *start = (size_t)(from - s->text);
            *end = (size_t)(at - s->text);
            *found = true;
            break;
        }
        return OK;
    case PATTERN_WORDS:
        while (at < limit) {
            const char *from = at;
            uint32_t c = utf8_next(&at);
            bool word = unicode_is_word(c);
            if (!word && unicode_is_space(c)) continue;
            for (const char *next = at; next < limit; at = next) {
                c = utf8_next(&next);
                if (unicode_is_word(c) != word || (!word && unicode_is_space(c))) break;
            }
            *start = (size_t)(from - s->text);
            *end = (size_t)(at - s->text);
            *found = true;
            break;
        }
        return OK;
    }
    return OK;
}

int pattern_scan_next(struct pattern_scan *s, size_t *start, size_t *end, bool *found)
{
    *found = false;
    while (s->at <= s->n) {
        int rc = find(s, start, end, found);
        if (rc != OK || !*found) return rc;
        if (*start == *end && s->last_end == (int64_t)*end) {
            const char *next = s->text + s->at;
            if (s->at < s->n) utf8_next(&next);
            else next++;
            s->at = (size_t)(next - s->text);
            *found = false;
            continue;
        }
        s->at = *end;
        s->last_end = (int64_t)*end;
        return OK;
    }
    return OK;
}
