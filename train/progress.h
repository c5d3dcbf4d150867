/* One progress line: rewritten in place on a terminal; in a file or pipe plain lines, at most one in PROGRESS_SECONDS unless every one was asked for. */
#ifndef TRAIN_PROGRESS_H
#define TRAIN_PROGRESS_H

double now_seconds(void);                                  /* monotonic */
enum { PROGRESS_SECONDS = 5 };
/* Replaces the line before it. Not on a terminal: printed when the last one was printed PROGRESS_SECONDS ago, else kept until a later one replaces it or progress_end(). */
void progress(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void progress_always(const char *fmt, ...) __attribute__((format(printf, 1, 2)));   /* the same, printed wherever it goes */
void progress_end(void);                                   /* prints what was kept and keeps the last line; call before other output */
/* "2h05m", "3m20s", "12s" into a static buffer of this thread */
const char *duration_text(double seconds);

#endif
