/* metrics.jsonl: one JSON object a line, {"step": 12, "train/loss": 3.25, ...}, and the same values for TensorBoard (tensorboard.c).
 * A line is appended by one write, so a killed run leaves at most one torn line. When a run goes on from a checkpoint, what was
 * written after that checkpoint is taken back first, by replacing the file: the curve has every step once.
 */
#include "train/metrics.h"

#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "train/tensorboard.h"

struct metrics { int fd; char *path; struct tensorboard *tensorboard; };

/* Is this line of the run that goes on at `step`? Step 0 is a new run. */
static bool belongs(const char *line, size_t bytes, int64_t step, int64_t *broken)
{
    json_t *object = step ? json_loadb(line, bytes, 0, NULL) : NULL;
    const json_t *at = json_object_get(object, "step");
    bool whole = json_is_integer(at), keep = whole && json_integer_value(at) <= step;
    *broken += step && !whole;
    json_decref(object);
    return keep;
}

static int take_back(const char *path, int64_t step)
{
    char *text = NULL;
    size_t bytes, kept = 0;
    int64_t broken = 0;
    int rc = OK;
    if (!path_exists(path)) return OK;
    TRY(file_read(path, (size_t)1 << 40, &text, &bytes));
    for (size_t at = 0; at < bytes;) {
        const char *feed = memchr(text + at, '\n', bytes - at);
        size_t n = feed ? (size_t)(feed - text) + 1 - at : bytes - at;
        if (feed && belongs(text + at, n, step, &broken)) {
            memmove(text + kept, text + at, n);
            kept += n;
        }
        at += n;
    }
    if (broken) warn("%s: %lld lines that are not JSON objects with a \"step\" are left out", path, (long long)broken);
    if (kept < bytes) TRY(file_replace(path, text, kept));
out:
    free(text);
    return rc;
}

int metrics_open(struct metrics **out, const char *run_dir, int64_t step)
{
    struct metrics *m = xcalloc(1, sizeof *m);
    int rc = OK;
    m->path = path_join(run_dir, "metrics.jsonl");
    m->fd = -1;
    TRY(dir_make(run_dir));
    TRY(take_back(m->path, step));
    m->fd = open(m->path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (m->fd < 0) { rc = fail_errno(ERR_IO, "%s: cannot open", m->path); goto out; }
    TRY(tensorboard_open(&m->tensorboard, run_dir, step ? step + 1 : 0));
    *out = m;
    m = NULL;
out:
    metrics_close(m);
    return rc;
}

int metrics_write(struct metrics *m, int64_t step, const struct metric *values, int n)
{
    json_t *object = json_object();
    int rc = OK;
    json_object_set_new(object, "step", json_integer(step));
    for (int i = 0; i < n; i++) json_object_set_new(object, values[i].tag, isfinite(values[i].value) ? json_real(values[i].value) : json_null());
    char *text = json_dumps(object, JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(9)), *line = NULL;
    CHECK(text, "metrics of step %lld cannot be written as JSON", (long long)step);
    line = xasprintf("%s\n", text);
    TRY(file_write_all(m->fd, line, strlen(line), m->path));
    TRY(tensorboard_write(m->tensorboard, step, values, n));
out:
    free(line);
    free(text);
    json_decref(object);
    return rc;
}

void metrics_close(struct metrics *m)
{
    if (!m) return;
    if (m->fd >= 0) close(m->fd);
    tensorboard_close(m->tensorboard);
    free(m->path);
    free(m);
}
