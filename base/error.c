/* Messages of failed calls, failed checks and small allocations. See error.h for the three classes of error. */
#include "base/error.h"

#include <errno.h>
#include <stdarg.h>
#include <string.h>

static _Thread_local char message[4096];

/* Names come from files that nobody vouched for: no control character of theirs reaches the terminal. */
static void make_printable(char *s)
{
    for (; *s; s++) if ((unsigned char)*s < ' ' || *s == 127) *s = '?';
}

const char *fail_message(void) { return message; }

int fail(int status, const char *fmt, ...)
{
    char text[sizeof message];   /* the arguments may point into `message` */
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    memcpy(message, text, sizeof message);
    make_printable(message);
    return status;
}

int fail_errno(int status, const char *fmt, ...)
{
    int error = errno;
    char text[sizeof message - 256];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    snprintf(message, sizeof message, "%s: %s", text, strerror(error));
    make_printable(message);
    return status;
}

int fail_in(int status, const char *fmt, ...)
{
    char context[1024], old[sizeof message];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(context, sizeof context, fmt, ap);
    va_end(ap);
    memcpy(old, message, sizeof old);
    int n = snprintf(message, sizeof message, "%s: ", context);
    snprintf(message + n, sizeof message - (size_t)n, "%s", old);
    make_printable(message);
    return status;
}

_Noreturn void check_failed(const char *file, int line, const char *cond, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fprintf(stderr, "distill: internal error: %s:%d: %s: ", file, line, cond);
    vfprintf(stderr, fmt, ap);
    fputc('\n', stderr);
    va_end(ap);
    abort();
}

void warn(const char *fmt, ...)
{
    char text[sizeof message];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    make_printable(text);
    fprintf(stderr, "distill: warning: %s\n", text);
}

static void *checked(void *p, size_t bytes)
{
    if (!p && bytes) {
        fprintf(stderr, "distill: out of memory asking for %zu bytes; free memory or make the job smaller\n", bytes);
        exit(ERR_IO);
    }
    return p;
}

void *xmalloc(size_t bytes) { return checked(malloc(bytes ? bytes : 1), bytes); }
void *xcalloc(size_t n, size_t bytes) { return checked(calloc(n ? n : 1, bytes ? bytes : 1), n * bytes); }
void *xrealloc(void *p, size_t bytes) { return checked(realloc(p, bytes ? bytes : 1), bytes); }

char *xstrndup(const char *s, size_t n)
{
    char *copy = xmalloc(n + 1);
    memcpy(copy, s, n);
    copy[n] = 0;
    return copy;
}

char *xstrdup(const char *s) { return xstrndup(s, strlen(s)); }

char *xasprintf(const char *fmt, ...)
{
    char *s;
    va_list ap;
    va_start(ap, fmt);
    int n = vasprintf(&s, fmt, ap);
    va_end(ap);
    return checked(n < 0 ? NULL : s, (size_t)(n < 0 ? 1 : n) + 1);
}
