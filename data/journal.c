/* journal.jsonl: one line per sealed shard, each bound to the one before it.
 *
 *     {"shard":3,"rows":32,"tokens":16384,"targets":15000,"bytes":5000000,"sha256":"..","prev":"..","crc":"1a2b3c4d"}\n
 *
 * prev = SHA-256 of the previous line with its newline, of the manifest's bytes for the first; crc = CRC-32C of the line's bytes
 * before `,"crc":`. A line is accepted only if writing its values again gives the same bytes, so nothing in it is unread.
 * A line without a newline is being written or was torn: it does not count. Anything else that is wrong is fatal.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/failpoint.h"
#include "base/file.h"
#include "data/shard_internal.h"

enum { LINE_MAX_BYTES = 512 };

void journal_init(struct journal *j, const char *dir, const struct shard_manifest *m, const char *id)
{
    *j = (struct journal){.path = path_join(dir, "journal.jsonl"), .entry_of = xcalloc((size_t)shard_count(m), sizeof *j->entry_of)};
    memcpy(j->prev, id, SHA256_HEX);
}

void journal_free(struct journal *j)
{
    free(j->path);
    free(j->entries);
    free(j->entry_of);
    *j = (struct journal){0};
}

static int line_format(char line[LINE_MAX_BYTES], const struct shard_entry *e, const char *prev)
{
    int n = snprintf(line, LINE_MAX_BYTES, "{\"shard\":%lld,\"rows\":%lld,\"tokens\":%lld,\"targets\":%lld,\"bytes\":%lld,\"sha256\":\"%s\",\"prev\":\"%s\"",
                     (long long)e->shard, (long long)e->rows, (long long)e->tokens, (long long)e->targets, (long long)e->bytes, e->sha256, prev);
    return n + snprintf(line + n, LINE_MAX_BYTES - (size_t)n, ",\"crc\":\"%08x\"}\n", crc32c(0, line, (size_t)n));
}

/* `text` is one line with its newline. The numbers have at most 18 digits, so the scan cannot overflow. */
static bool line_parse(const char *text, size_t bytes, struct shard_entry *e, char prev[SHA256_HEX])
{
    char copy[LINE_MAX_BYTES], again[LINE_MAX_BYTES];
    long long shard, rows, tokens, targets, size;
    if (bytes >= sizeof copy) return false;
    memcpy(copy, text, bytes);
    copy[bytes] = 0;
    if (sscanf(copy, "{\"shard\":%18lld,\"rows\":%18lld,\"tokens\":%18lld,\"targets\":%18lld,\"bytes\":%18lld,\"sha256\":\"%64[0-9a-f]\",\"prev\":\"%64[0-9a-f]\"",
               &shard, &rows, &tokens, &targets, &size, e->sha256, prev) != 7) return false;
    e->shard = shard; e->rows = rows; e->tokens = tokens; e->targets = targets; e->bytes = size;
    return (size_t)line_format(again, e, prev) == bytes && !memcmp(again, text, bytes) && strlen(e->sha256) == SHA256_HEX - 1;
}

static bool entry_possible(const struct shard_manifest *m, const struct shard_entry *e)
{
    return e->shard >= 0 && e->shard < shard_count(m) && e->rows == shard_rows(m, e->shard) && e->tokens == e->rows * m->row_length && e->targets >= 0 && e->targets <= e->tokens &&
           e->bytes <= (int64_t)shard_bytes(m, e->shard) && e->bytes >= (int64_t)shard_least_bytes(m, e->shard);
}

static int entry_add(struct journal *j, const struct shard_entry *e)
{
    const struct shard_entry *old = journal_find(j, e->shard);
    if (old) {
        if (!strcmp(old->sha256, e->sha256) && old->bytes == e->bytes) return OK;   /* two workers sealed the same rows to the same bytes */
        return fail(ERR_MISMATCH, "%s: shard %lld is sealed twice with different content: two runs were mixed; " SHARD_REMEDY, j->path, (long long)e->shard);
    }
    if (j->n == j->room) j->entries = xrealloc(j->entries, (size_t)(j->room = j->room ? 2 * j->room : 64) * sizeof *j->entries);
    j->entries[j->n++] = *e;
    j->entry_of[e->shard] = (int32_t)j->n;
    return OK;
}

static int line_accept(struct journal *j, const struct shard_manifest *m, const char *line, size_t bytes)
{
    struct shard_entry e;
    char prev[SHA256_HEX];
    int rc = OK;
    if (!line_parse(line, bytes, &e, prev))
        return fail(ERR_INPUT, "%s: the line at byte %lld is broken; " SHARD_REMEDY, j->path, (long long)j->offset);
    if (strcmp(prev, j->prev))
        return fail(ERR_INPUT, "%s: the line at byte %lld does not follow the line before it%s; " SHARD_REMEDY, j->path, (long long)j->offset,
                    j->offset ? "" : ", here the manifest: one of the two files was changed or comes from another dataset");
    if (!entry_possible(m, &e))
        return fail(ERR_INPUT, "%s: the line at byte %lld tells of a shard %lld that the manifest does not allow (%lld rows, %lld bytes); " SHARD_REMEDY,
                    j->path, (long long)j->offset, (long long)e.shard, (long long)e.rows, (long long)e.bytes);
    TRY(entry_add(j, &e));
    sha256_of(line, bytes, j->prev);
    j->offset += (int64_t)bytes;
out:
    return rc;
}

int journal_refresh(struct journal *j, const struct shard_manifest *m)
{
    int rc = OK, fd = open(j->path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    char *text = NULL;
    if (fd < 0 && errno == ENOENT && j->offset == 0) { j->torn = 0; return OK; }
    if (fd < 0) return fail_errno(ERR_IO, "%s: cannot open", j->path);
    if (fstat(fd, &st)) { rc = fail_errno(ERR_IO, "%s: cannot stat", j->path); goto out; }
    if (!S_ISREG(st.st_mode)) { rc = fail(ERR_INPUT, "%s: is not a regular file", j->path); goto out; }
    if (st.st_size < j->offset) { rc = fail(ERR_INPUT, "%s: lost lines that were there before; " SHARD_REMEDY, j->path); goto out; }
    /* Twice the longest journal of this many shards: a journal names a shard more than once only when workers raced. */
    if (st.st_size > 2 * LINE_MAX_BYTES * (shard_count(m) + 1)) { rc = fail(ERR_INPUT, "%s: is %lld bytes, too many for %lld shards; " SHARD_REMEDY, j->path, (long long)st.st_size, (long long)shard_count(m)); goto out; }
    size_t want = (size_t)(st.st_size - j->offset), bytes = 0;
    j->torn = 0;
    if (!want) goto out;
    text = xmalloc(want);
    while (bytes < want) {                                       /* a writer that starts may cut a torn line off meanwhile: its end is no error */
        ssize_t n = pread(fd, text + bytes, want - bytes, j->offset + (int64_t)bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) { rc = fail_errno(ERR_IO, "%s: cannot read", j->path); goto out; }
        if (n == 0) break;
        bytes += (size_t)n;
    }
    for (const char *line = text, *end = text + bytes; line < end;) {
        const char *newline = memchr(line, '\n', (size_t)(end - line));
        if (!newline) {
            j->torn = end - line;
            if (j->torn >= LINE_MAX_BYTES) rc = fail(ERR_INPUT, "%s: %lld bytes at its end are no line; " SHARD_REMEDY, j->path, (long long)j->torn);
            break;
        }
        TRY(line_accept(j, m, line, (size_t)(newline + 1 - line)));
        line = newline + 1;
    }
out:
    free(text);
    if (fd >= 0) close(fd);
    return rc;
}

int journal_scan(const char *path, const struct shard_manifest *m, const char *id, void (*line)(void *, int64_t, const struct shard_entry *, int, const char *), void *context,
                 int64_t *torn)
{
    int rc = OK;
    char *text = NULL, expected[SHA256_HEX], prev[SHA256_HEX];
    size_t bytes = 0;
    *torn = 0;
    if (!path_exists(path)) return OK;
    TRY(file_read(path, (size_t)LINE_MAX_BYTES * (2 * SHARD_MAX_SHARDS + 2), &text, &bytes));
    memcpy(expected, id, SHA256_HEX);
    for (char *at = text, *end = text + bytes; at < end;) {
        struct shard_entry e;
        char *newline = memchr(at, '\n', (size_t)(end - at));
        if (!newline) {
            *torn = end - at;
            break;
        }
        size_t n = (size_t)(newline + 1 - at);
        bool readable = line_parse(at, n, &e, prev);
        if (!readable) line(context, at - text, NULL, ERR_INPUT, "is no line of a journal, or its crc does not match");
        else if (!entry_possible(m, &e)) line(context, at - text, NULL, ERR_INPUT, "tells of a shard that the manifest does not allow");
        else if (strcmp(prev, expected)) line(context, at - text, &e, ERR_INPUT, at == text ? "does not follow from the manifest" : "does not follow the line before it");
        else line(context, at - text, &e, OK, NULL);
        sha256_of(at, n, expected);                              /* what follows is judged by what is there */
        at += n;
    }
out:
    free(text);
    return rc;
}

char *journal_text(const struct shard_entry *entries, int64_t n, const char *id, size_t *bytes)
{
    char *text = xmalloc((size_t)n * LINE_MAX_BYTES + 1), prev[SHA256_HEX];
    *bytes = 0;
    memcpy(prev, id, SHA256_HEX);
    for (int64_t i = 0; i < n; i++) {
        size_t length = (size_t)line_format(text + *bytes, &entries[i], prev);
        sha256_of(text + *bytes, length, prev);
        *bytes += length;
    }
    return text;
}

int journal_append(struct journal *j, int fd, const struct shard_entry *e)
{
    char line[LINE_MAX_BYTES];
    int rc = OK;
    size_t bytes = (size_t)line_format(line, e, j->prev);
    size_t torn = atomic_load(&failpoint_armed) > 0 ? bytes / 2 : 0;   /* a test can stop between two halves of the one write */
    TRY(FAILPOINT("journal.before"));
    if (torn) {
        TRY(file_write_all(fd, line, torn, j->path));
        TRY(FAILPOINT("journal.torn"));
    }
    TRY(file_write_all(fd, line + torn, bytes - torn, j->path));
    TRY(FAILPOINT("journal.written"));
    if (FAILPOINT_FIRES("journal.sync") || fsync(fd)) { rc = fail_errno(ERR_IO, "%s: cannot sync to disk", j->path); goto out; }
    TRY(entry_add(j, e));
    sha256_of(line, bytes, j->prev);
    j->offset += (int64_t)bytes;
    TRY(FAILPOINT("journal.after"));
out:
    /* A line that may not be on the disk must not be followed by another: cut it off; if that fails too, the next writer does. */
    if (rc != OK && !journal_find(j, e->shard) && ftruncate(fd, j->offset)) warn("%s: its unfinished last line cannot be cut off now", j->path);
    return rc;
}
