/* One progress line: rewritten in place on a terminal, plain lines when piped. */
#ifndef TRAIN_PROGRESS_H
#define TRAIN_PROGRESS_H

double now_seconds(void);                                  /* monotonic */
void progress(const char *fmt, ...) __attribute__((format(printf, 1, 2)));   /* replaces the line before it */
void progress_end(void);                                   /* keeps the last line; call before other output */
/* "2h05m", "3m20s", "12s" into a static buffer of this thread */
const char *duration_text(double seconds);

#endif
