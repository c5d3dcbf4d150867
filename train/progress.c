/* See progress.h. */
#include "train/progress.h"

#include <stdarg.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

static int open_line;                                      /* of a terminal */
static char kept[512];                                     /* not on a terminal: the newest line, if it was not printed */
static double printed;                                     /* when a line was, 0: never */

double now_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void print_kept(void)
{
    printf("%s\n", kept);
    fflush(stdout);
    kept[0] = 0;
    printed = now_seconds();
}

static void take_line(const char *fmt, va_list ap, int always)
{
    if (isatty(STDOUT_FILENO)) {
        fputs("\r", stdout);
        vfprintf(stdout, fmt, ap);
        fputs("\033[K", stdout);
        fflush(stdout);
        open_line = 1;
        return;
    }
    vsnprintf(kept, sizeof kept, fmt, ap);
    if (always || !printed || now_seconds() - printed >= PROGRESS_SECONDS) print_kept();
}

void progress(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    take_line(fmt, ap, 0);
    va_end(ap);
}

void progress_always(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    take_line(fmt, ap, 1);
    va_end(ap);
}

void progress_end(void)
{
    if (open_line) { fputc('\n', stdout); fflush(stdout); }
    if (kept[0]) print_kept();
    open_line = 0;
}

const char *duration_text(double seconds)
{
    static _Thread_local char text[32];
    long s = seconds > 0 ? (long)(seconds + 0.5) : 0;
    if (s >= 3600) snprintf(text, sizeof text, "%ldh%02ldm", s / 3600, s / 60 % 60);
    else if (s >= 60) snprintf(text, sizeof text, "%ldm%02lds", s / 60, s % 60);
    else snprintf(text, sizeof text, "%lds", s);
    return text;
}
