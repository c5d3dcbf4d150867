/* See progress.h. */
#include "train/progress.h"

#include <stdarg.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

static int open_line;

double now_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void progress(const char *fmt, ...)
{
    int terminal = isatty(STDOUT_FILENO);
    va_list ap;
    if (terminal) fputs("\r", stdout);
    va_start(ap, fmt);
    vfprintf(stdout, fmt, ap);
    va_end(ap);
    fputs(terminal ? "\033[K" : "\n", stdout);
    open_line = terminal;
    fflush(stdout);
}

void progress_end(void)
{
    if (open_line) { fputc('\n', stdout); fflush(stdout); }
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
