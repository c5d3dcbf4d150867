/* Errors: three classes.
 *
 * 1. What a correct program can meet (files, configuration, data, memory, a missing device): functions return an int
 *    status. The status IS the exit code of the program. fail() sets a message in a thread-local buffer and returns
 *    the status; callers add context with fail_in() on the way up; main prints it once.
 *        if (rows != want) { rc = fail(ERR_INPUT, "%s: %d rows, the manifest says %d; run distill inspect --repair", ...); goto out; }
 *        TRY(safetensors_open(&f, path));          // int rc = OK at the top, one out: label at the bottom
 *    A message names the object and says what to do about it.
 * 2. Our own bug: CHECK() aborts with file and line, in release builds too. Never for user input.
 * 3. A device failure inside an op: the backend aborts with rank, expression, file and line.
 */
#ifndef BASE_ERROR_H
#define BASE_ERROR_H

#include <stdio.h>
#include <stdlib.h>

enum status {
    OK = 0,
    ERR_USAGE = 2,     /* command line or configuration */
    ERR_INPUT = 3,     /* an input file is broken */
    ERR_IO = 4,        /* reading or writing failed, no space, no memory, no device */
    ERR_NUMERIC = 5,   /* NaN or Inf, a check outside its bound */
    ERR_MISMATCH = 6,  /* inputs that do not belong together */
    ERR_LOST = 7,      /* a hang or a lost peer */
    ERR_STOPPED = 75   /* stopped by a signal; run the command again to go on */
};

/* Sets the message (replacing an older one) and returns `status`. */
int fail(int status, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* As fail(), with ": <strerror(errno)>" appended. */
int fail_errno(int status, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Prefixes the current message with context and ": "; returns `status` unchanged. */
int fail_in(int status, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
const char *fail_message(void);

/* Jump to `out` if a call fails. Needs `int rc` and a label `out`. First error wins. */
#define TRY(call) do { if ((rc = (call)) != OK) goto out; } while (0)

#define CHECK(cond, ...) do { if (!(cond)) check_failed(__FILE__, __LINE__, #cond, __VA_ARGS__); } while (0)
_Noreturn void check_failed(const char *file, int line, const char *cond, const char *fmt, ...) __attribute__((format(printf, 4, 5)));

/* One line on stderr, "distill: warning: ...". Use for what the user should know and may ignore. */
void warn(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* Allocation of small host objects; the process ends with exit code 4 and one sentence when memory is gone.
 * Large buffers whose size comes from a file are bounded by the file's size before they are asked for. */
void *xmalloc(size_t bytes);
void *xcalloc(size_t n, size_t bytes);
void *xrealloc(void *p, size_t bytes);
char *xstrdup(const char *s);
char *xstrndup(const char *s, size_t n);
char *xasprintf(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

#endif
