/* TensorBoard's files: records of protobuf messages (event.proto, encoded by protobuf-c), each framed as
 *
 *     u64 length | u32 masked crc32c of the length | the message | u32 masked crc32c of the message       little-endian
 *     masked(c) = rotate right(c, 15) + 0xa282ead8
 *
 * The first record names the format, "brain.Event:2"; the second begins a session, by which TensorBoard forgets what an earlier
 * run logged at the same steps.
 */
#include "train/tensorboard.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "base/hash.h"
#include "train/event.pb-c.h"

struct tensorboard { int fd; char *path; };

static uint32_t masked_crc(const void *data, size_t bytes)
{
    uint32_t crc = crc32c(0, data, bytes);
    return ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
}

static int write_event(struct tensorboard *t, Tensorboard__Event *e)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    e->has_wall_time = 1;
    e->wall_time = (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
    uint64_t length = tensorboard__event__get_packed_size(e);
    uint8_t *record = xmalloc(8 + 4 + length + 4);
    uint32_t crc = masked_crc(&length, 8);
    memcpy(record, &length, 8);
    memcpy(record + 8, &crc, 4);
    tensorboard__event__pack(e, record + 12);
    crc = masked_crc(record + 12, length);
    memcpy(record + 12 + length, &crc, 4);
    int rc = file_write_all(t->fd, record, 8 + 4 + length + 4, t->path);     /* one write, so that a reader meets whole records */
    free(record);
    return rc;
}

int tensorboard_open(struct tensorboard **out, const char *dir, int64_t first_step)
{
    struct tensorboard *t = xcalloc(1, sizeof *t);
    char host[256] = "localhost";
    int rc = OK;
    if (gethostname(host, sizeof host - 1) || !*host || strchr(host, '/')) strcpy(host, "localhost");
    time_t now = time(NULL);
    do {                                                                     /* two runs within a second must not share a file */
        free(t->path);
        t->path = xasprintf("%s/events.out.tfevents.%010lld.%s", dir, (long long)now++, host);
        t->fd = open(t->path, O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0666);
    } while (t->fd < 0 && errno == EEXIST);
    if (t->fd < 0) { rc = fail_errno(ERR_IO, "%s: cannot create", t->path); goto out; }
    Tensorboard__Event version = TENSORBOARD__EVENT__INIT, start = TENSORBOARD__EVENT__INIT;
    Tensorboard__SessionLog session = TENSORBOARD__SESSION_LOG__INIT;
    version.file_version = "brain.Event:2";
    session.has_status = 1;
    session.status = TENSORBOARD__SESSION_LOG__STATUS__START;
    start.has_step = 1;
    start.step = first_step;
    start.session_log = &session;
    TRY(write_event(t, &version));
    TRY(write_event(t, &start));
    *out = t;
    t = NULL;
out:
    tensorboard_close(t);
    return rc;
}

int tensorboard_write(struct tensorboard *t, int64_t step, const struct metric *values, int n)
{
    Tensorboard__Event event = TENSORBOARD__EVENT__INIT;
    Tensorboard__Summary summary = TENSORBOARD__SUMMARY__INIT;
    Tensorboard__Summary__Value *value = xcalloc((size_t)n, sizeof *value), **list = xcalloc((size_t)n, sizeof *list);
    for (int i = 0; i < n; i++) {
        if (!isfinite(values[i].value)) continue;
        Tensorboard__Summary__Value *v = list[summary.n_value++] = &value[i];
        tensorboard__summary__value__init(v);
        v->tag = (char *)values[i].tag;
        v->has_simple_value = 1;                                             /* zero is a value */
        v->simple_value = (float)values[i].value;
    }
    summary.value = list;
    event.has_step = 1;
    event.step = step;
    event.summary = &summary;
    int rc = summary.n_value ? write_event(t, &event) : OK;
    free(value);
    free(list);
    return rc;
}

void tensorboard_close(struct tensorboard *t)
{
    if (!t) return;
    if (t->fd >= 0) close(t->fd);
    free(t->path);
    free(t);
}
