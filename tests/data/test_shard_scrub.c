/* Scrub and repair: every fault is told, what is broken is set aside and never deleted, and what is made again is what was there. */
#include "tests/data/shard_helpers.h"

TestSuite(shard_scrub, .init = setup, .fini = teardown, .timeout = 300);

static char told[1 << 16];

static void on_found(void *context, int64_t shard, int status, const char *text)
{
    (void)context;
    size_t n = strlen(told);
    snprintf(told + n, sizeof told - n, "%lld %d %s\n", (long long)shard, status, text);
}

static struct shard_scrub scrub(const char *dir, bool repair)
{
    struct shard_scrub s;
    *told = 0;
    OK_OR_DIE(shard_dataset_scrub(dir, repair, on_found, NULL, NULL, &s));
    return s;
}

#define TELLS(part) cr_assert(strstr(told, part), "\"%s\" is not in:\n%s", part, told)

static struct shard_manifest ten(void) { return fixture_manifest(SHARD_TOPK, 20, 2, 12, 300, 5); }

/* Directory without what was set aside; journals by their content, for a repaired one has another order. */
static void same_but_order(const char *a, const char *b, const char *why)
{
    char *shards = kept_path(b, "shards"), **names;
    int n_names;
    OK_OR_DIE(dir_list(shards, &names, &n_names));
    for (int i = 0; i < n_names; i++)
        if (strstr(names[i], ".quarantine")) unlink(kept_path(shards, names[i]));
    names_free(names, n_names);
    same_tree(kept_path(a, "shards"), shards, why);
    same_tree(kept_path(a, "manifest.json"), kept_path(b, "manifest.json"), why);
    OK_OR_DIE(verify(b));
    same_entries(a, b, why);
}

/* Flips a bit of a field's first row and optionally leaves its CRC right. */
static void damage(const char *dir, const struct shard_manifest *m, int64_t shard, int field, int64_t at)
{
    struct shard_file f;
    char id[SHA256_HEX], *path = kept(shard_path(dir, shard));
    struct shard_manifest read;
    uint8_t byte;
    OK_OR_DIE(manifest_read(dir, &read, id));
    OK_OR_DIE(shard_file_open(&f, path, m, id, shard, -1));
    int fd = open(path, O_RDWR);
    cr_assert(pread(fd, &byte, 1, f.offset[field] + at) == 1);
    byte ^= 4;
    cr_assert(pwrite(fd, &byte, 1, f.offset[field] + at) == 1);
    close(fd);
    shard_file_close(&f);
}

Test(shard_scrub, sound)
{
    struct shard_manifest m = ten();
    char *dir = dataset_new("d", &m), *copy = dataset_new("copy", &m);
    for (int repair = 0; repair < 2; repair++) {
        struct shard_scrub s = scrub(dir, repair);
        cr_assert(s.faults == 0 && s.sealed == 10 && s.sound == 10 && s.rows == 20 && s.missing == 0 && s.aside == 0 && s.adopted == 0 && s.mended == repair, "%s", told);
        cr_assert_str_empty(told);
        same_tree(copy, dir, "nothing to repair");
    }
}

/* Everything at once: each is told, all are repaired, and the dump makes exactly those again. */
Test(shard_scrub, everything_at_once)
{
    struct shard_manifest m = ten(), other = ten();
    char *reference = dataset_new("reference", &m), *dir = dataset_new("d", &m), *path;
    other.seed++;
    char *foreign = dataset_new("foreign", &other);
    size_t bytes, whole;
    damage(dir, &m, 1, SHARD_TOKENS, 4);                                        /* one row */
    damage(dir, &m, 2, SHARD_HEAD_LOGPROB, 3);                                  /* both rows of a shard */
    damage(dir, &m, 2, SHARD_LSE, 12 * 3 * 4 + 9);
    unlink(kept_path(dir, "shards/shard-000003.h5"));                           /* gone */
    cr_assert_eq(truncate(kept_path(dir, "shards/shard-000004.h5"), 5000), 0);  /* cut */
    uint8_t *data = slurp(foreign, "shards/shard-000005.h5", &bytes, &path);    /* another dataset's */
    spit(kept_path(dir, "shards/shard-000005.h5"), data, bytes);
    data = slurp(dir, "shards/shard-000007.h5", &bytes, &path);                 /* in another's place */
    spit(kept_path(dir, "shards/shard-000006.h5"), data, bytes);
    spit(kept_path(dir, "shards/shard-000042.h5"), data, bytes);                /* beyond the end */
    spit(kept_path(dir, "shards/notes.txt"), "x", 1);
    char *text = (char *)slurp(dir, "journal.jsonl", &whole, &path), *line = text;
    for (int i = 0; i < 8; i++) line = strchr(line, '\n') + 1;
    line[20] ^= 1;                                                               /* shard 8's line is broken, so the last one does follow what is there, and is believed */
    spit(path, text, whole);

    struct shard_scrub s = scrub(dir, false);
    TELLS("1 3 "); TELLS("shard-000001.h5: its SHA-256");
    TELLS("shard-000001.h5: row 0 of the shard");
    TELLS("shard-000002.h5: row 0 of the shard");
    TELLS("shard-000002.h5: row 1 of the shard");
    TELLS("shard-000003.h5: the journal lists this shard, but the file is missing");
    TELLS("shard-000004.h5: is 5000 bytes, the journal says");
    TELLS("5 6 "); TELLS("shard-000005.h5: is a shard of another dataset");
    TELLS("shard-000006.h5: says that it is shard 7");
    TELLS("shard-000042.h5: is beyond the last shard");
    TELLS("notes.txt: is no file of the format");
    TELLS("is no line of a journal");
    TELLS("shard-000008.h5: is whole and not in the journal");
    cr_assert_eq(s.sealed, 9);
    cr_assert_eq(s.sound, 4);                                                   /* 0, 7, 8, 9 */
    cr_assert_geq(s.faults, 12);
    cr_assert_eq(s.foreign, 2);
    struct shard_writer *w;
    FAILS(shard_writer_open(&w, dir, &m), ERR_INPUT, "--repair");

    s = scrub(dir, true);
    cr_assert(s.mended && s.aside == 6 && s.adopted == 1, "%d aside, %d adopted: %s", (int)s.aside, (int)s.adopted, told);
    cr_assert(path_exists(kept_path(dir, "journal.jsonl.quarantine")));
    cr_assert(path_exists(kept_path(dir, "shards/shard-000042.h5.quarantine")));
    s = scrub(dir, false);
    cr_assert_eq(s.faults, 0, "%s", told);
    cr_assert_eq(s.missing, 6);
    TELLS("6 of 10 shards are not made yet: 1-6");
    OK_OR_DIE(shard_writer_open(&w, dir, &m));
    cr_assert_eq(shard_writer_rows_done(w), 8);
    shard_writer_close(w);
    OK_OR_DIE(fixture_dump(dir, &m));
    unlink(kept_path(dir, "shards/notes.txt"));
    same_but_order(reference, dir, "after everything");
}

/* In a child, always: a process that forks after its threads have worked leaves the child without them. */
static int repair_under(const char *dir, const char *spec)
{
    int status;
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) { failpoint_set(spec); scrub(dir, true); _exit(0); }
    waitpid(pid, &status, 0);
    return status;
}

/* Killed or failing at every point of a repair: the next one, or the next dump, ends in the same. */
Test(shard_scrub, repair_is_interrupted)
{
    static const char *const points[] = {"repair.before", "repair.kept", "repair.journal", "repair.rename"};
    struct shard_manifest m = ten();
    char *reference = dataset_new("reference", &m), *dir = kept_path(base, "d");
    int kills = 0;
    for (size_t p = 0; p < 4; p++)
        for (int n = 1; n < 4; n++) {
            OK_OR_DIE(fixture_dump(dir, &m));
            damage(dir, &m, 2, SHARD_TOKENS, 0);
            damage(dir, &m, 9, SHARD_TOKENS, 0);
            char *spec = xasprintf("%s:kill@%d", points[p], n);
            kills += WIFSIGNALED(repair_under(dir, spec));
            if (p < 2) cr_assert_eq(repair_under(dir, ""), 0);                  /* the dataset is as it was: the dump would refuse it */
            OK_OR_DIE(fixture_dump(dir, &m));
            same_but_order(reference, dir, spec);
            dir_remove_tree(dir);
            free(spec);
        }
    cr_assert_eq(kills, 5);
}

Test(shard_scrub, journals)
{
    struct shard_manifest m = ten(), other = ten();
    char *dir = dataset_new("d", &m), *reference = dataset_new("reference", &m), *path, id[SHA256_HEX];
    size_t bytes, n;
    char *text = (char *)slurp(dir, "journal.jsonl", &bytes, &path);
    spit(path, text, bytes - 9);                                                /* torn: no fault */
    struct shard_scrub s = scrub(dir, false);
    cr_assert_eq(s.faults, 0, "%s", told);
    TELLS("unfinished line");
    TELLS("shard-000009.h5: is whole and not in the journal");
    unlink(path);                                                               /* gone altogether: everything is adopted */
    s = scrub(dir, true);
    cr_assert(s.faults == 0 && s.adopted == 10, "%s", told);
    same_tree(reference, dir, "a journal from the shards alone");
    /* two runs mixed: the line whose file is there is the true one */
    struct journal j;
    OK_OR_DIE(manifest_read(dir, &m, id));
    journal_init(&j, dir, &m, id);
    OK_OR_DIE(journal_refresh(&j, &m));
    struct shard_entry twice[11];
    memcpy(twice + 1, j.entries, 10 * sizeof *twice);
    twice[0] = j.entries[3];
    twice[0].sha256[0] = twice[0].sha256[0] == '0' ? '1' : '0';
    char *mixed = journal_text(twice, 11, id, &n);
    spit(path, mixed, n);
    free(mixed);
    journal_free(&j);
    s = scrub(dir, false);
    cr_assert(s.faults == 1 && s.foreign == 1 && s.sound == 10, "%s", told);
    TELLS("3 6 ");
    s = scrub(dir, true);
    s = scrub(dir, false);
    cr_assert(s.faults == 0 && s.sound == 10, "%s", told);
    /* another dataset's manifest: nothing follows, nothing belongs */
    other.seed++;
    char *foreign = dataset_new("foreign", &other), *from;
    text = (char *)slurp(foreign, "manifest.json", &n, &from);
    spit(kept_path(dir, "manifest.json"), text, n);
    s = scrub(dir, false);
    cr_assert(s.foreign == 10 && s.sound == 0, "%s", told);
    TELLS("does not follow from the manifest");
    spit(kept_path(dir, "manifest.json"), text, n - 3);
    s = scrub(dir, true);
    cr_assert(s.faults == 1 && !s.mended, "%s", told);
    TELLS("manifest.json: its check does not match");
}

Test(shard_scrub, repair_is_alone)
{
    struct shard_manifest m = ten();
    char *dir = dataset_new("d", &m);
    struct shard_scrub s;
    struct shard_writer *w;
    OK_OR_DIE(shard_writer_open(&w, dir, &m));
    FAILS(shard_dataset_scrub(dir, true, on_found, NULL, NULL, &s), ERR_IO, "a teacher-dump is writing this dataset");
    OK_OR_DIE(shard_dataset_scrub(dir, false, on_found, NULL, NULL, &s));       /* looking is allowed */
    shard_writer_close(w);
    OK_OR_DIE(shard_dataset_scrub(dir, true, on_found, NULL, NULL, &s));
}

/* No silent bit: with the journal's hash every flip in a shard is a fault. */
Test(shard_scrub, every_flip_is_found)
{
    struct shard_manifest m = fixture_manifest(SHARD_TOPK, 2, 1, 6, 40, 3);
    char *dir = dataset_new("d", &m), *path;
    size_t bytes;
    uint8_t *data = slurp(dir, "shards/shard-000001.h5", &bytes, &path);
    int flips = 0;
    for (size_t n = 0; n < bytes; n += 37, flips++) {
        data[n] ^= (uint8_t)(1 << n % 8);
        spit(path, data, bytes);
        cr_assert_geq(scrub(dir, false).faults, 1, "byte %d", (int)n);
        data[n] ^= (uint8_t)(1 << n % 8);
    }
    spit(path, data, bytes);
    cr_assert_eq(scrub(dir, false).faults, 0);
    cr_log_info("%d flips\n", flips);
}
