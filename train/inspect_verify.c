/* distill inspect DATASET --verify, --repair: the scrub of data/shard_scrub.c as a report, and its findings as an exit code. */
#include <unistd.h>

#include "base/error.h"
#include "data/shard.h"
#include "train/inspect.h"
#include "train/progress.h"

struct verification { struct report *r; json_t *faults, *notes; double shown; bool show; };

static void on_found(void *context, int64_t shard, int status, const char *text)
{
    struct verification *v = context;
    json_t *j = json_pack("{s:s}", "text", text);
    if (shard >= 0) json_object_set_new(j, "shard", json_integer(shard));
    if (status != OK) json_object_set_new(j, "code", json_integer(status));
    json_array_append_new(status != OK ? v->faults : v->notes, j);
    if (v->show) progress_end();
    if (!v->r->json) printf("  %-5s  %s\n", status == OK ? "note" : "FAULT", text);
}

static void on_progress(void *context, int64_t done, int64_t all)
{
    struct verification *v = context;
    if (!v->show || now_seconds() - v->shown < 0.5) return;
    v->shown = now_seconds();
    progress("  read %lld of %lld shards", (long long)done, (long long)all);
}

int inspect_verify(struct report *r, const struct inspect_options *o)
{
    struct verification v = {.r = r, .faults = json_array(), .notes = json_array(), .show = !r->json && isatty(STDOUT_FILENO)};
    struct shard_scrub s;
    int rc = OK;
    report_section(r, "verify", o->path);
    json_object_set_new(r->section, "faults", v.faults);
    json_object_set_new(r->section, "notes", v.notes);
    TRY(shard_dataset_scrub(o->path, o->repair, on_found, on_progress, &v, &s));
    if (v.show) progress_end();
    report_line(r, "shards_sealed", json_integer(s.sealed), "shards sealed", "%lld, %lld not made yet", (long long)s.sealed, (long long)s.missing);
    report_line(r, "shards_sound", json_integer(s.sound), "sound", "%lld", (long long)s.sound);
    report_line(r, "rows_sound", json_integer(s.rows), "rows read", "%lld, every check passed", (long long)s.rows);
    json_object_set_new(r->section, "shards_missing", json_integer(s.missing));
    report_line(r, "fault_count", json_integer(s.faults), "faults", s.faults ? "%lld" : "none", (long long)s.faults);
    if (o->repair) {
        report_int(r, "set_aside", "set aside", s.aside);
        report_int(r, "entered", "entered in the journal", s.adopted);
    }
    if (!s.faults) goto out;
    if (s.unreadable) rc = fail(ERR_IO, "%s: %lld shards cannot be read; see to the disk first", o->path, (long long)s.unreadable);
    else if (!s.mended)
        rc = fail(s.foreign == s.faults ? ERR_MISMATCH : ERR_INPUT, "%s: %lld faults; distill inspect %s --repair sets aside what is broken, teacher-dump makes it again", o->path,
                  (long long)s.faults, o->path);
    else if (!r->json) printf("\nwhat was broken is set aside; run teacher-dump again to make it anew\n");
out:
    return rc;
}
