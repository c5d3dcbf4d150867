/* Shards: what is read is what was put; a manifest, a row or a file that is not what the format says is refused. Deaths and
 * damage are in test_shard_faults.c. */
#include <hdf5.h>
#include <pthread.h>

#include "tests/data/shard_helpers.h"

TestSuite(shard, .init = setup, .fini = teardown, .timeout = 300);

/* ---- content ---- */

static void round_trip(const char *name, struct shard_manifest m)
{
    char *dir = dataset_new(name, &m), *again = kept_path(base, "again");
    struct shard_dataset *d;
    struct shard_row want, got;
    const struct shard_entry *entries;
    int64_t sealed, L = m.row_length;
    OK_OR_DIE(shard_dataset_open(&d, dir));
    OK_OR_DIE(shard_dataset_refresh(d, &sealed));
    cr_assert_eq(sealed, shard_count(&m));
    cr_assert_eq(shard_dataset_entries(d, &entries), sealed);
    OK_OR_DIE(shard_dataset_check_files(d));
    OK_OR_DIE(shard_dataset_verify(d));
    shard_row_alloc(&want, &m);
    shard_row_alloc(&got, &m);
    for (int64_t r = m.rows - 1; r >= 0; r--) {
        fixture_row(&m, r, &want);
        OK_OR_DIE(shard_dataset_read(d, r, &got));
#define SAME(f, n) cr_assert(memcmp(want.f, got.f, (size_t)(n) * sizeof *want.f) == 0, "%s: row %lld: " #f, name, (long long)r)
        SAME(tokens, L); SAME(loss_mask, L); SAME(document, L); SAME(entropy, L); SAME(label_logprob, L); SAME(lse, L * m.n_temperatures);
        if (shard_kind_has_head(m.kind)) { SAME(tail, L * m.n_temperatures); SAME(head_ids, L * m.k); SAME(head_logprob, L * m.k); }
        if (shard_kind_draws(m.kind)) { SAME(draw_ids, L * m.draws); SAME(draw_count, L * m.draws); }
        if (m.kind == SHARD_HYBRID) SAME(draw_logprob, L * m.draws);
        if (m.kind == SHARD_FULL) SAME(logits, L * m.valid_vocab);
    }
    const struct shard_manifest *back = shard_dataset_manifest(d);
    OK_OR_DIE(manifest_same(dir, back, &m));
    cr_assert_str_eq(back->teacher_name, m.teacher_name);
    cr_assert_eq(back->seed, m.seed);
    cr_assert(!memcmp(back->temperatures, m.temperatures, sizeof m.temperatures));
    for (int64_t i = 0; i < sealed; i++) {
        char *path = shard_dataset_path(d, entries[i].shard), hex[SHA256_HEX];
        cr_assert_eq(path_size(path), entries[i].bytes);
        cr_assert_leq((size_t)entries[i].bytes, shard_bytes(&m, entries[i].shard));
        OK_OR_DIE(sha256_of_file(path, hex));
        cr_assert_str_eq(hex, entries[i].sha256);
        free(path);
    }
    shard_dataset_close(d);
    shard_row_free(&want);
    shard_row_free(&got);
    OK_OR_DIE(fixture_dump(again, &m));
    same_tree(dir, again, "written twice");
    OK_OR_DIE(fixture_dump(dir, &m));                             /* nothing left to do: nothing changes */
    same_tree(dir, again, "opened again");
    dir_remove_tree(again);
}

Test(shard, round_trip)
{
    round_trip("topk", small());
    round_trip("k4", fixture_manifest(SHARD_TOPK, 4, 4, 9, 50, 4));
    round_trip("ids18", fixture_manifest(SHARD_TOPK, 1, 1, 3, SHARD_MAX_VOCAB, 7));    /* both high bits */
    round_trip("whole", fixture_manifest(SHARD_TOPK, 3, 1, 6, 11, 11));                /* the head holds everything: tail -inf */
    round_trip("k1", fixture_manifest(SHARD_TOPK, 1, 1, 2, 2, 1));
    round_trip("full", fixture_manifest(SHARD_FULL, 5, 2, 12, 37, 0));
    round_trip("hybrid", fixture_manifest(SHARD_HYBRID, 5, 2, 12, 300, 5));
    round_trip("hybrid18", fixture_manifest(SHARD_HYBRID, 1, 1, 3, SHARD_MAX_VOCAB, 7));
    round_trip("hybrid whole", fixture_manifest(SHARD_HYBRID, 3, 1, 6, 11, 11));       /* nothing to draw from */
    round_trip("hybrid one left", fixture_manifest(SHARD_HYBRID, 3, 1, 6, 12, 11));
    struct shard_manifest most = fixture_manifest(SHARD_HYBRID, 1, 1, 4, 2000, 254);   /* a count may be 255 */
    round_trip("hybrid255", most);
    round_trip("sampled", fixture_manifest(SHARD_SAMPLED, 5, 2, 12, 300, 9));
    round_trip("sampled18", fixture_manifest(SHARD_SAMPLED, 2, 1, 3, SHARD_MAX_VOCAB, 7));
    round_trip("sampled1", fixture_manifest(SHARD_SAMPLED, 3, 3, 5, 20, 1));
    round_trip("sampled255", fixture_manifest(SHARD_SAMPLED, 2, 2, 5, 1, 255));
    round_trip("sampled pages", fixture_manifest(SHARD_SAMPLED, 4, 4, 700, 100, 40));
    struct shard_manifest hot = small();
    hot.n_temperatures = 1;
    hot.temperatures[0] = 20;
    hot.temperatures[1] = hot.temperatures[2] = 0;
    round_trip("hot", hot);
}

Test(shard, data_begin_at_pages)
{
    struct shard_manifest m = fixture_manifest(SHARD_TOPK, 4, 4, 1100, 64, 9);
    char *dir = dataset_new("pages", &m), *path = kept(shard_path(dir, 0)), id[SHA256_HEX];
    struct shard_file f;
    struct shard_layout layout[SHARD_FIELDS];
    OK_OR_DIE(manifest_read(dir, &m, id));
    OK_OR_DIE(shard_file_open(&f, path, &m, id, 0, -1));
    shard_layout(&m, layout);
    int64_t data = 0;
    for (int i = 0; i < SHARD_FIELDS; i++) {
        if (layout[i].row_bytes * m.rows >= SHARD_ALIGNMENT) cr_assert_eq(f.offset[i] % SHARD_ALIGNMENT, 0, "%s at %lld", layout[i].name, (long long)f.offset[i]);
        data += layout[i].row_bytes * m.rows;
    }
    cr_assert_leq(f.bytes - data, (SHARD_FIELDS + 2) * SHARD_ALIGNMENT);
    shard_file_close(&f);
}

static struct shard_manifest rounded(void)
{
    struct shard_manifest m = small();
    m.precision = PRECISION_FP8;
    m.error = (struct precision_error){.rows = 4, .positions = 1234, .kl = 0.0012345678, .kl_row_max = 0.25, .agreement = 0.9875, .label_difference = 0};
    return m;
}

/* An independent reader, when Python with h5py is there. */
Test(shard, h5py_reads_everything)
{
    const char *python = python_with_h5py();
    struct shard_manifest kinds[] = {small(), fixture_manifest(SHARD_FULL, 5, 2, 12, 37, 0), fixture_manifest(SHARD_TOPK, 2, 1, 4, 140000, 7),
                                     fixture_manifest(SHARD_HYBRID, 5, 2, 12, 300, 5), fixture_manifest(SHARD_HYBRID, 2, 1, 4, 140000, 7), fixture_manifest(SHARD_HYBRID, 3, 1, 6, 11, 11),
                                     fixture_manifest(SHARD_SAMPLED, 5, 2, 12, 300, 9), fixture_manifest(SHARD_SAMPLED, 2, 1, 4, 140000, 7), rounded()};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        char *dir = dataset_new(kept(xasprintf("kind%zu", i)), &kinds[i]);
        char *command = xasprintf("%s %s/scripts/read_shards.py --row 1 %s > %s/out", python, SOURCE_ROOT, dir, base);
        cr_assert_eq(system(command), 0, "%s", command);
        free(command);
    }
}

/* ---- locks, manifests ---- */

Test(shard, another_manifest)
{
    struct shard_manifest m = small(), other;
    struct shard_writer *w;
    char *dir = dataset_new("d", &m);
#define DIFFERENT(change, part) do { other = m; change; FAILS(shard_writer_open(&w, dir, &other), ERR_MISMATCH, part); } while (0)
    DIFFERENT(other.k = 4, "k 5, this run has 4");
    DIFFERENT(other.rows = 6, "rows 5, this run has 6");
    DIFFERENT(other.kind = SHARD_FULL; other.k = 0, "kind \"topk\", this run has \"full\"");
    DIFFERENT(other.temperatures[1] = 0.75f, "temperatures [1.0,0.7,3.0], this run has [1.0,0.75,3.0]");
    DIFFERENT(other.seed++, "seed \"18364758544493064720\", this run has \"18364758544493064721\"");
    DIFFERENT(memset(other.teacher_weights_hash, 'b', 64), "teacher_weights_hash \"\"");
    DIFFERENT(other.corpus_hash[63] = '1', "corpus_hash");
    DIFFERENT(strcpy(other.packing, "x"), "packing");
    other = m;
    strcpy(other.teacher_name, "moved elsewhere");
    OK_OR_DIE(shard_writer_open(&w, dir, &other));
    shard_writer_close(w);
    char *no = kept_path(base, "no");
#define REFUSED(change, part) do { other = m; change; FAILS(shard_writer_open(&w, no, &other), ERR_USAGE, part); cr_assert(!path_exists(no)); } while (0)
    REFUSED(other.kind = SHARD_HYBRID, "m is 0");
    REFUSED(other.draws = 1, "m is 1");
    REFUSED(other.kind = SHARD_HYBRID; other.draws = 256, "m is 256, not in 1 .. 255");
    REFUSED(other.kind = SHARD_SAMPLED; other.draws = 9, "k is 5");
    REFUSED(other.kind = SHARD_SAMPLED; other.k = 0, "n is 0");
    REFUSED(other.kind = SHARD_SAMPLED; other.k = 0; other.draws = 9, "list one, or use kind hybrid");
    REFUSED(other.kind = SHARD_SAMPLED; other.k = 0; other.draws = 255; other.n_temperatures = 1; other.row_length = 1 << 20; other.rows = other.rows_per_shard = 17, "2^32 entries");
    REFUSED(other.k = 0, "k is 0");
    REFUSED(other.k = 301, "k is 301");
    REFUSED(other.k = 300, "k is 300");
    REFUSED(other.rows_per_shard = 0, "rows_per_shard");
    REFUSED(other.temperatures[2] = 1, "twice");
    REFUSED(other.temperatures[2] = NAN, "temperature");
    REFUSED(other.temperatures[2] = 0, "temperature");
    REFUSED(other.n_temperatures = 0, "temperatures");
    REFUSED(other.teacher_vocab = 299, "teacher_vocab");
    REFUSED(other.valid_vocab = SHARD_MAX_VOCAB + 1, "valid_vocab");
    REFUSED(other.corpus_hash[3] = 'X', "SHA-256");
    REFUSED(other.rows = (int64_t)1 << 40, "more than 1000000 shards");
    REFUSED(other.rows = other.rows_per_shard = (int64_t)1 << 40, "2^40");
    other = m;
    strcpy(other.teacher_name, "\xff");
    FAILS(shard_writer_open(&w, no, &other), ERR_USAGE, "UTF-8");
}

struct forgery { const char *from, *to, *part; };

/* Well-formed manifests that say what they should not: the check is made right again. */
static void hostile(const char *dir, const struct forgery *cases, size_t n)
{
    size_t bytes;
    struct shard_dataset *d;
    char *path, *text = (char *)slurp(dir, "manifest.json", &bytes, &path), *key = strstr(text, ",\n  \"check\"");
    *key = 0;
    for (size_t i = 0; i < n; i++) {
        char *at = strstr(text, cases[i].from);
        cr_assert(at, "%s", cases[i].from);
        char *body = xasprintf("%.*s%s%s", (int)(at - text), text, cases[i].to, at + strlen(cases[i].from));
        char *whole = xasprintf("%s,\n  \"check\": \"%08x\"\n}\n", body, crc32c(0, body, strlen(body)));
        spit(path, whole, strlen(whole));
        FAILS(shard_dataset_open(&d, dir), ERR_INPUT, cases[i].part);
        free(body);
        free(whole);
    }
}

Test(shard, hostile_manifest)
{
    static const struct forgery cases[] = {
        {"\"topk\"", "\"hybrid\"", "\"m\" is missing"}, {"\"topk\"", "\"sampled\"", "\"n\" is missing"}, {"\"k\": 5", "\"k\": 5,\n  \"m\": 1", "key \"m\""}, {"\"k\": 5", "\"k\": 5,\n  \"n\": 1", "key \"n\""}, {"\"topk\"", "\"zip\"", "zip"}, {"\"k\": 5", "\"k\": 5,\n  \"zz\": 1", "zz"},
        {"\"version\": 1", "\"version\": 2", "version 2"}, {"\"rows\": 5", "\"rows\": 0", "rows"}, {"\"rows\": 5", "\"rows\": 1e3", "rows"}, {"\"rows\": 5", "\"rows\": -5", "rows"},
        {"\"rows\": 5", "\"rows\": 1000000000000", "shards"}, {"\"row_length\": 12", "\"row_length\": 1", "row_length"}, {"\"row_length\": 12", "\"row_length\": 4000000000", "row_length"},
        {"\"valid_vocab\": 300", "\"valid_vocab\": 300000", "valid_vocab"}, {"\"valid_vocab\": 300", "\"valid_vocab\": 4", "k is 5"}, {"0.7", "\"0.7\"", "temperature"}, {"0.7", "-0.7", "temperature"},
        {"0.7", "1e999", "JSON"}, {"0.7", "1e300", "temperature"}, {"\"seed\": \"", "\"seed\": \"0", "seed"}, {"\"seed\": \"", "\"seed\": \"9", "seed"}, {"\"seed\": \"", "\"seed\": \"-", "seed"},
        {"distill-logit-shards", "other", "format"}, {"\"k\": 5", "\"k\": 5,\n  \"k\": 5", "JSON"}, {"aaaa", "AAAA", "SHA-256"}, {"aaaa", "aaa", "SHA-256"}, {"\"text_bytes\": 12345", "\"text_bytes\": \"\"", "text_bytes"},
    };
    struct shard_manifest m = small();
    char *dir = dataset_new("d", &m), *path = kept_path(dir, "manifest.json");
    hostile(dir, cases, sizeof cases / sizeof *cases);
    struct shard_dataset *d;
    FAILS(shard_dataset_open(&d, base), ERR_INPUT, "no manifest.json");
    unlink(path);
    struct shard_writer *w;
    FAILS(shard_writer_open(&w, dir, &m), ERR_INPUT, "journal but no manifest");
}

/* A teacher in fp8: the error is of the manifest's bytes and not of its identity; a native manifest says nothing of either. */
Test(shard, rounded_teacher)
{
    struct shard_manifest m = rounded(), native = small(), other, back;
    struct shard_writer *w;
    size_t bytes;
    char *dir = dataset_new("d", &m), *plain = dataset_new("plain", &native), *path;
    char *text = (char *)slurp(dir, "manifest.json", &bytes, &path);
    cr_assert(strstr(text, "\"teacher_precision\": \"fp8_e4m3\",\n  \"precision_error\": {\n    \"rows\": 4,\n    \"positions\": 1234,\n    \"kl\": 0.00123457,\n"), "%s", text);
    cr_assert(!strstr((char *)slurp(plain, "manifest.json", &bytes, &path), "precision"));
    OK_OR_DIE(shard_manifest_read(plain, &back));
    cr_assert_eq(back.precision, PRECISION_NATIVE);
    OK_OR_DIE(shard_manifest_read(dir, &back));
    cr_assert(back.precision == PRECISION_FP8 && back.error.rows == 4 && back.error.positions == 1234 && back.error.kl == 0.00123457 && back.error.kl_row_max == 0.25 &&
              back.error.agreement == 0.9875 && back.error.label_difference == 0);
    other = m;
    other.error.kl = 0.5;
    OK_OR_DIE(shard_writer_open(&w, dir, &other));                /* measured on another device: the dataset keeps what it has */
    shard_writer_close(w);
    OK_OR_DIE(fixture_dump(dir, &other));
    struct shard_manifest again;
    OK_OR_DIE(shard_manifest_read(dir, &again));
    cr_assert_eq(again.error.kl, 0.00123457);
    round_trip("rounded", back);
    FAILS(shard_writer_open(&w, dir, &native), ERR_MISMATCH, "teacher_precision \"fp8_e4m3\", this run has \"native\"");
    FAILS(shard_writer_open(&w, plain, &m), ERR_MISMATCH, "teacher_precision \"native\", this run has \"fp8_e4m3\"");
    char *no = kept_path(base, "no");
    REFUSED(other.error = (struct precision_error){0}, "rows of precision_error");
    REFUSED(other.error.positions = 0, "positions of precision_error");
    REFUSED(other.error.kl = NAN, "cannot be");
    REFUSED(other.error.kl = -1e-9, "cannot be");
    REFUSED(other.error.kl_row_max = INFINITY, "cannot be");
    REFUSED(other.error.agreement = 1.5, "cannot be");
    REFUSED(other.native_first = -1, "native_blocks");
    REFUSED(other.native_last = 5000, "native_blocks");
    static const struct forgery cases[] = {
        {"\"fp8_e4m3\"", "\"native\"", "teacher_precision is not"}, {"\"fp8_e4m3\"", "\"fp4\"", "newer distill"}, {"\"fp8_e4m3\"", "8", "teacher_precision is not"},
        {"\"teacher_precision\": \"fp8_e4m3\",", "", "teacher_precision is not"}, {"\"precision_error\"", "\"precision_errors\"", "not known"},
        {"\"kl\": 0.00123457", "\"kl\": \"0\"", "kl"}, {"\"kl\": 0.00123457", "\"kl\": -0.1", "cannot be"}, {"\"kl\": 0.00123457,", "", "six numbers"},
        {"\"kl\": 0.00123457", "\"lk\": 1", "\"kl\" of precision_error"}, {"\"rows\": 4", "\"rows\": 0", "rows"}, {"\"positions\": 1234", "\"positions\": 0", "positions"},
        {"\"top1_agreement\": 0.9875", "\"top1_agreement\": 2", "cannot be"}, {"\"rows\": 4", "\"rows\": 4, \"x\": 1", "six numbers"},
    };
    hostile(dir, cases, sizeof cases / sizeof *cases);
}

/* Blocks of such a teacher that stayed native are of the identity; a manifest that has none says nothing of them. */
Test(shard, native_blocks)
{
    struct shard_manifest none = rounded(), m = none, back;
    struct shard_writer *w;
    m.native_first = 2;
    m.native_last = 1;
    char *all = dataset_new("all", &none), *ends = dataset_new("ends", &m);
    size_t bytes;
    char *path;
    cr_assert(!strstr((char *)slurp(all, "manifest.json", &bytes, &path), "native_blocks"));
    OK_OR_DIE(shard_manifest_read(ends, &back));
    cr_assert(back.native_first == 2 && back.native_last == 1);
    FAILS(shard_writer_open(&w, all, &m), ERR_MISMATCH, "native_blocks [0,0], this run has [2,1]");
    FAILS(shard_writer_open(&w, ends, &none), ERR_MISMATCH, "native_blocks [2,1], this run has [0,0]");
    static const struct forgery blocks[] = {
        {"    2,\n    1\n", "    0,\n    0\n", "not both 0"}, {"    2,\n    1\n", "    2\n", "two numbers"}, {"    2,\n    1\n", "    2,\n    -1\n", "two numbers"}, {"    2,\n    1\n", "    2,\n    4097\n", "two numbers"},
        {"    2,\n    1\n", "    2,\n    1.5\n", "two numbers"}, {"    2,\n    1\n", "    2,\n    1,\n    1\n", "two numbers"},
    };
    hostile(ends, blocks, sizeof blocks / sizeof *blocks);
}

/* ---- what a row must be ---- */

Test(shard, rows_out_of_range)
{
    struct shard_manifest m = fixture_manifest(SHARD_TOPK, 1, 1, 8, 300, 5), f = fixture_manifest(SHARD_FULL, 1, 1, 8, 37, 0);
    struct shard_writer *w, *wf;
    struct shard_row good, r, full;
    char *dir = kept_path(base, "t"), *dir_full = kept_path(base, "f");
    OK_OR_DIE(shard_writer_open(&w, dir, &m));
    OK_OR_DIE(shard_writer_open(&wf, dir_full, &f));
    shard_row_alloc(&good, &m);
    shard_row_alloc(&r, &m);
    shard_row_alloc(&full, &f);
    fixture_row(&m, 0, &good);
    int64_t on = 0, off = 7;
    while (!good.loss_mask[on]) on++;
    OK_OR_DIE(shard_writer_begin(w, 0));
#define COPY(field, n) memcpy(r.field, good.field, (size_t)(n) * sizeof *r.field)
#define BAD(change, part) do { \
        COPY(tokens, 8); COPY(loss_mask, 8); COPY(document, 8); COPY(lse, 24); COPY(tail, 24); COPY(entropy, 8); COPY(label_logprob, 8); COPY(head_ids, 40); COPY(head_logprob, 40); \
        change; FAILS(shard_writer_put(w, &r), ERR_NUMERIC, part); } while (0)
    uint16_t nan = 0x7e00, inf = 0x7c00, minus_inf = 0xfc00, half = f16_from_float(0.5f), down = f16_from_float(-3);
    BAD(r.tokens[3] = 300, "token 300");
    BAD(r.loss_mask[on] = 2, "loss_mask is 2");
    BAD(r.loss_mask[7] = 1, "document ends");
    BAD(r.document[0] = 1, "document 1");
    BAD((memset(r.loss_mask, 0, 8), memset(r.label_logprob, 0, 16), r.document[7] += 2), "does not follow");
    BAD(r.lse[4] = NAN, "log-sum-exp is nan");
    BAD(r.lse[0] = INFINITY, "log-sum-exp is inf");
    BAD(r.entropy[2] = nan, "entropy");
    BAD(r.entropy[2] = down, "entropy");
    BAD(r.entropy[2] = f16_from_float(6), "entropy");
    BAD(r.label_logprob[on] = nan, "label");
    BAD(r.label_logprob[on] = minus_inf, "label");
    BAD(r.label_logprob[on] = half, "label");
    BAD(r.label_logprob[off] = down, "no next token");
    BAD(r.head_ids[on * 5] = 300, "head id 300");
    BAD(r.head_ids[on * 5] = r.head_ids[on * 5 + 3], "twice");
    BAD(r.head_logprob[on * 5] = nan, "log-probability 0");
    BAD(r.head_logprob[on * 5 + 4] = minus_inf, "log-probability 4");
    BAD(r.head_logprob[on * 5] = inf, "log-probability 0");
    BAD(r.head_logprob[on * 5] = half, "log-probability 0");
    BAD(r.head_logprob[on * 5 + 1] = f16_from_float(-0.0f), "descending");
    BAD(r.head_logprob[on * 5 + 4] = f16_from_float(-9), "mass");
    BAD(r.tail[on * 3] = NAN, "tail");
    BAD(r.tail[on * 3 + 2] = 0.5f, "tail");
    BAD(r.tail[on * 3] = -INFINITY, "not 1");
    BAD(r.tail[on * 3] += 0.01f, "not 1");
    BAD(r.tail[on * 3 + 1] += 0.05f, "at temperature 0.7");
    BAD(r.lse[on * 3 + 2] += 0.05f, "at temperature 3");
    BAD(r.lse[on * 3] += 0.05f, "at temperature");
    OK_OR_DIE(shard_writer_put(w, &good));
    OK_OR_DIE(shard_writer_seal(w));
    shard_writer_close(w);
    OK_OR_DIE(shard_writer_begin(wf, 0));
    fixture_row(&f, 0, &full);
    for (on = 0; !full.loss_mask[on]; on++) {}
    uint16_t keep = full.logits[on * 37 + 3];
    full.logits[on * 37 + 3] = nan;
    FAILS(shard_writer_put(wf, &full), ERR_NUMERIC, "not finite");
    full.logits[on * 37 + 3] = keep;
    full.lse[on * 3] += 0.1f;
    FAILS(shard_writer_put(wf, &full), ERR_NUMERIC, "not 1");
    full.lse[on * 3] -= 0.1f;
    OK_OR_DIE(shard_writer_put(wf, &full));
    shard_writer_close(wf);
    shard_row_free(&full);
    shard_row_free(&r);
    /* the reader refuses the same, whatever the CRC says */
    for (on = 0; !good.loss_mask[on]; on++) {}
    uint16_t id = 0xffff;
    uint8_t high = 0xff;
    uint32_t token = 300;
    float tail = -INFINITY;
    struct { int field; int64_t at; const void *value; size_t bytes; const char *part; } forged[] = {
        {SHARD_IDS_LOW, on * 10, &id, 2, "head id 65535"}, {SHARD_IDS_HIGH, on * 2 + 1, &high, 1, "unused bits"}, {SHARD_TOKENS, 0, &token, 4, "token 300"},
        {SHARD_TAIL, on * 12, &tail, 4, "not 1"}, {SHARD_HEAD_LOGPROB, on * 10, &nan, 2, "nan"}, {SHARD_LOSS_MASK, 7, &high, 1, "loss_mask"}};
    for (size_t i = 0; i < sizeof forged / sizeof *forged; i++) {
        char *again = kept_path(base, "again");
        OK_OR_DIE(fixture_dump(again, &m));
        forge(again, &m, forged[i].field, 0, forged[i].at, forged[i].value, forged[i].bytes, false);
        FAILS(read_everything(again, false), ERR_INPUT, "CRC");
        forge(again, &m, forged[i].field, 0, forged[i].at, forged[i].value, forged[i].bytes, true);
        FAILS(read_everything(again, false), ERR_INPUT, forged[i].part);
        FAILS(verify(again), ERR_INPUT, "SHA-256");
        dir_remove_tree(again);
    }
    shard_row_free(&good);
}

/* What is drawn: `r` is a good row, spoilt one way at a time, by whoever puts it and by whoever forges a file. */
struct drawn { struct shard_manifest m; struct shard_writer *w; struct shard_row good, r; int64_t on; char *dir; };

static void open_drawn(struct drawn *d, const char *name, enum shard_kind kind)
{
    d->m = fixture_manifest(kind, 1, 1, 8, 300, 6);
    d->dir = kept_path(base, name);
    OK_OR_DIE(shard_writer_open(&d->w, d->dir, &d->m));
    OK_OR_DIE(shard_writer_begin(d->w, 0));
    shard_row_alloc(&d->good, &d->m);
    shard_row_alloc(&d->r, &d->m);
    fixture_row(&d->m, 0, &d->good);
    fixture_row(&d->m, 0, &d->r);
    for (d->on = 0; !d->good.loss_mask[d->on]; d->on++) {}
}

static void close_drawn(struct drawn *d)
{
    OK_OR_DIE(shard_writer_put(d->w, &d->good));
    OK_OR_DIE(shard_writer_seal(d->w));
    shard_writer_close(d->w);
    OK_OR_DIE(verify(d->dir));
    shard_row_free(&d->r);
}

static void restore(struct drawn *d)
{
    size_t n = (size_t)(d->m.row_length * d->m.draws);
    memcpy(d->r.draw_ids, d->good.draw_ids, n * 4);
    memcpy(d->r.draw_count, d->good.draw_count, n);
    if (d->r.draw_logprob) memcpy(d->r.draw_logprob, d->good.draw_logprob, n * 2);
    if (d->r.tail) memcpy(d->r.tail, d->good.tail, (size_t)(d->m.row_length * d->m.n_temperatures) * 4);
}

static void forged_draws(const struct drawn *d, int field, int64_t at, const void *value, size_t bytes, const char *part)
{
    char *again = kept_path(base, "again");
    OK_OR_DIE(fixture_dump(again, &d->m));
    forge(again, &d->m, field, 0, at, value, bytes, false);
    FAILS(read_everything(again, false), ERR_INPUT, "CRC");
    forge(again, &d->m, field, 0, at, value, bytes, true);
    FAILS(read_everything(again, false), ERR_INPUT, part);
    dir_remove_tree(again);
}

#define SPOILT(change, part) do { restore(&d); change; FAILS(shard_writer_put(d.w, &d.r), ERR_NUMERIC, part); } while (0)

Test(shard, hybrid_draws_out_of_range)
{
    struct drawn d;
    open_drawn(&d, "hybrid", SHARD_HYBRID);
    int64_t D = d.m.draws, at = d.on * D, used = 0;
    uint32_t *ids = d.r.draw_ids + at, head = d.r.head_ids[d.on * d.m.k + 2];
    uint8_t *count = d.r.draw_count + at;
    uint16_t *logp = d.r.draw_logprob + at;
    while (used < D && count[used]) used++;
    cr_assert(used >= 2 && used < D, "the fixture's row draws nothing twice: %d", (int)used);
    SPOILT(count[0]++, "add up to 8, not to 7");
    SPOILT((memset(count, 0, 7), memset(ids, 0, 28), memset(logp, 0, 14)), "no draws");
    SPOILT(count[0] = 0, "then zeros");
    SPOILT(ids[used] = 1, "then zeros");
    SPOILT(logp[used] = 1, "then zeros");
    SPOILT(ids[1] = ids[0], "ascending");
    SPOILT(ids[used - 1] = 300, "vocabulary 300");
    SPOILT((ids[0] = head, count[0] = 7, memset(count + 1, 0, 6), memset(ids + 1, 0, 24), memset(logp + 1, 0, 12)), "is in the head");
    SPOILT(logp[1] = 0x7e00, "log-probability 1 of the draws");
    SPOILT(logp[0] = 0xfc00, "log-probability 0 of the draws");
    SPOILT(logp[0] = f16_from_float(0.25f), "log-probability 0 of the draws");
    SPOILT(logp[0] = f16_from_float(-0.1f), "likelier than the head's last");
    for (int64_t t = 0; t < 8; t++) d.good.loss_mask[t] = t == d.on;       /* a tail of nothing, were it not for the draws */
    memcpy(d.r.loss_mask, d.good.loss_mask, 8);
    restore(&d);
    for (int64_t i = 0; i < used; i++) d.r.draw_logprob[at + i] = d.good.head_logprob[d.on * d.m.k + d.m.k - 1];
    d.r.tail[d.on * 3] -= 2;
    cr_assert_eq(shard_writer_put(d.w, &d.r), ERR_NUMERIC);
    /* where nothing is learnt, zeros do */
    struct shard_row zeros = d.good;
    zeros.draw_ids = kept(xcalloc((size_t)(8 * D), 4));
    zeros.draw_count = kept(xcalloc((size_t)(8 * D), 1));
    zeros.draw_logprob = kept(xcalloc((size_t)(8 * D), 2));
    zeros.loss_mask = kept(xcalloc(8, 1));
    OK_OR_DIE(shard_row_check(&d.m, &zeros, true, ERR_NUMERIC));
    fixture_row(&d.m, 0, &d.good);
    close_drawn(&d);
    uint16_t id = 0xffff, up = f16_from_float(-0.1f);
    uint8_t byte = 0xff;
    forged_draws(&d, SHARD_DRAW_LOW, at * 2, &id, 2, "vocabulary 300");
    forged_draws(&d, SHARD_DRAW_HIGH, d.on * 2 + 1, &byte, 1, "unused bits of tail_ids_high");
    forged_draws(&d, SHARD_DRAW_COUNT, at, &byte, 1, "add up to");
    forged_draws(&d, SHARD_DRAW_LOGPROB, at * 2, &up, 2, "likelier");
    shard_row_free(&d.good);
}

Test(shard, sampled_draws_out_of_range)
{
    struct drawn d;
    open_drawn(&d, "sampled", SHARD_SAMPLED);
    int64_t D = d.m.draws, at = d.on * D, used = 0, entries = 0;
    uint32_t *ids = d.r.draw_ids + at, more = (uint32_t)D + 1, two = 2, far = 4000, down;
    uint8_t *count = d.r.draw_count + at, zero = 0, many = 200, ff = 0xff;
    while (used < D && count[used]) used++;
    cr_assert(used >= 2, "the fixture's row draws one id alone");
    SPOILT(count[1]++, "add up to 7, not to 6");
    SPOILT((memset(count, 0, 6), memset(ids, 0, 24)), "no draws");
    SPOILT(ids[0] = ids[1], "ascending");
    SPOILT(ids[used - 1] = 300, "vocabulary 300");
    for (int64_t i = 0; i < 8 * D; i++) entries += d.good.draw_count[i] > 0;
    close_drawn(&d);
    uint32_t one[2] = {0, more};
    forged_draws(&d, SHARD_DRAW_OFFSET, 0, one, 8, "do not ascend by at most 6");
    forged_draws(&d, SHARD_DRAW_OFFSET, 0, &two, 4, "do not ascend");
    forged_draws(&d, SHARD_DRAW_OFFSET, 0, &far, 4, "do not ascend");
    down = 0;
    forged_draws(&d, SHARD_DRAW_OFFSET, 4 * 8, &down, 4, "do not ascend");
    forged_draws(&d, SHARD_DRAW_COUNT, 0, &zero, 1, "count 0");
    forged_draws(&d, SHARD_DRAW_COUNT, 0, &many, 1, "add up to");
    forged_draws(&d, SHARD_DRAW_HIGH, 0, &ff, 1, "vocabulary 300");
    cr_assert(entries % RAGGED_STEP, "the fixture's entries need no padding");
    forged_draws(&d, SHARD_DRAW_COUNT, entries, &many, 1, "behind its last position");
    shard_row_free(&d.good);
}

/* Rows of a ragged shard that overlap, each sound on its own; a shard without one draw; and dimensions that do not fit each other. */
Test(shard, ragged_shards)
{
    struct shard_manifest m = fixture_manifest(SHARD_SAMPLED, 3, 3, 8, 300, 6);
    char *dir = dataset_new("d", &m), id[SHA256_HEX];
    struct shard_layout layout[SHARD_FIELDS];
    struct shard_file f;
    int64_t targets;
    uint32_t offset[9];
    shard_layout(&m, layout);
    OK_OR_DIE(manifest_read(dir, &m, id));
    char *path = kept(shard_path(dir, 0));
    OK_OR_DIE(shard_file_open(&f, path, &m, id, 0, -1));
    OK_OR_DIE(shard_file_check_rows(&f, &m, &targets));
    OK_OR_DIE(file_pread(f.fd, offset, sizeof offset, f.offset[SHARD_DRAW_OFFSET], path));
    for (int i = 0; i < 9; i++) offset[i] += RAGGED_STEP;                     /* row 0 where row 1 begins, a little later */
    shard_file_close(&f);
    forge(dir, &m, SHARD_DRAW_OFFSET, 0, 0, offset, sizeof offset, true);
    OK_OR_DIE(shard_file_open(&f, path, &m, id, 0, -1));
    cr_assert_eq(shard_file_check_rows(&f, &m, &targets), ERR_INPUT);
    shard_file_close(&f);

    char *empty = kept_path(base, "empty");
    struct shard_writer *w;
    struct shard_row row;
    m = fixture_manifest(SHARD_SAMPLED, 2, 2, 8, 300, 6);
    shard_row_alloc(&row, &m);
    OK_OR_DIE(shard_writer_open(&w, empty, &m));
    OK_OR_DIE(shard_writer_begin(w, 0));
    OK_OR_DIE(shard_writer_put(w, &row));
    OK_OR_DIE(shard_writer_put(w, &row));
    OK_OR_DIE(shard_writer_seal(w));
    shard_writer_close(w);
    OK_OR_DIE(verify(empty));
    OK_OR_DIE(read_everything(empty, true));
    shard_row_free(&row);
}

/* ---- files that libhdf5 likes and we must not ---- */

static void attribute(hid_t file, const char *name, const char *text, int64_t value)
{
    hid_t type = text ? H5Tcopy(H5T_C_S1) : H5Tcopy(H5T_STD_I64LE), space = H5Screate(H5S_SCALAR);
    if (text) H5Tset_size(type, strlen(text));
    hid_t a = H5Acreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    H5Awrite(a, type, text ? (const void *)text : &value);
    H5Aclose(a);
    H5Sclose(space);
    H5Tclose(type);
}

enum trick { PLAIN, CHUNKED, EXTERNAL, SOFT_LINK, EXTERNAL_LINK, A_GROUP, WRONG_TYPE, OTHER_ENDIAN, WRONG_SHAPE, WRONG_RANK, EXTRA, COMPACT, LATE, ABSENT, FILTERED, COMMITTED, DENSE, OLD, USER_BLOCK, TIMES,
             NO_ID, VLEN_ID, TRICKS };

static hid_t memory_type(enum shard_type type)
{
    hid_t half = H5Tcopy(H5T_IEEE_F32LE);
    H5Tset_fields(half, 15, 10, 5, 0, 10);
    H5Tset_size(half, 2);
    H5Tset_ebias(half, 15);
    return type == SHARD_F16 ? half : H5Tcopy(type == SHARD_U8 ? H5T_STD_U8LE : type == SHARD_U16 ? H5T_STD_U16LE : type == SHARD_U32 ? H5T_STD_U32LE : H5T_IEEE_F32LE);
}

static void forge_file(const char *path, const struct shard_manifest *m, const char *id, enum trick trick)
{
    struct shard_layout layout[SHARD_FIELDS];
    shard_layout(m, layout);
    unlink(path);
    hid_t create = H5Pcreate(H5P_FILE_CREATE), access = H5Pcreate(H5P_FILE_ACCESS), file;
    if (trick != DENSE) H5Pset_link_phase_change(create, 32, 16);
    if (trick != OLD) H5Pset_libver_bounds(access, H5F_LIBVER_V110, H5F_LIBVER_V110);
    if (trick == USER_BLOCK) H5Pset_userblock(create, 512);
    if (trick == TIMES) H5Pset_attr_creation_order(create, H5P_CRT_ORDER_TRACKED);   /* other heads of messages: well-formed */
    file = H5Fcreate(path, H5F_ACC_TRUNC, create, access);
    attribute(file, "format", SHARD_FORMAT, 0);
    attribute(file, "version", NULL, 1);
    attribute(file, "shard", NULL, 0);
    if (trick == VLEN_ID) {
        hid_t type = H5Tcopy(H5T_C_S1), space = H5Screate(H5S_SCALAR);
        H5Tset_size(type, H5T_VARIABLE);
        hid_t a = H5Acreate2(file, "dataset", type, space, H5P_DEFAULT, H5P_DEFAULT);
        H5Awrite(a, type, &id);
        H5Aclose(a);
    } else if (trick != NO_ID) attribute(file, "dataset", id, 0);
    for (int i = 0; i < SHARD_FIELDS; i++) {
        bool here = i == SHARD_LOSS_MASK;
        if (!layout[i].name || (here && trick == ABSENT)) continue;
        hsize_t dims[3] = {(hsize_t)shard_rows(m, 0), (hsize_t)layout[i].dims[0], (hsize_t)layout[i].dims[1]};
        int rank = layout[i].rank;
        hid_t type = memory_type(layout[i].type), plist = H5Pcreate(H5P_DATASET_CREATE);
        const char *name = layout[i].name;
        H5Pset_alloc_time(plist, here && trick == LATE ? H5D_ALLOC_TIME_LATE : H5D_ALLOC_TIME_EARLY);
        if (here && trick == CHUNKED) H5Pset_chunk(plist, rank, dims);
        if (here && trick == FILTERED) { H5Pset_chunk(plist, rank, dims); H5Pset_deflate(plist, 1); }
        if (here && trick == COMMITTED) H5Tcommit2(file, "type", type, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
        if (here && trick == COMPACT) H5Pset_layout(plist, H5D_COMPACT);
        if (here && trick == EXTERNAL) H5Pset_external(plist, "/etc/passwd", 0, H5F_UNLIMITED);
        if (here && trick == WRONG_TYPE) type = H5Tcopy(H5T_STD_I8LE);
        if (i == SHARD_TOKENS && trick == OTHER_ENDIAN) type = H5Tcopy(H5T_STD_U32BE);
        if (here && trick == WRONG_SHAPE) dims[1]++;
        if (here && trick == WRONG_RANK) rank = 1;
        if (here && (trick == SOFT_LINK || trick == EXTERNAL_LINK)) name = "elsewhere";
        if (here && trick == A_GROUP) { H5Gclose(H5Gcreate2(file, name, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT)); continue; }
        hid_t space = H5Screate_simple(rank, dims, NULL), set = H5Dcreate2(file, name, type, space, H5P_DEFAULT, plist, H5P_DEFAULT);
        if (here && trick == SOFT_LINK) H5Lcreate_soft("/elsewhere", file, layout[i].name, H5P_DEFAULT, H5P_DEFAULT);
        if (here && trick == EXTERNAL_LINK) H5Lcreate_external(path, "/elsewhere", file, layout[i].name, H5P_DEFAULT, H5P_DEFAULT);
        if (here && trick == EXTRA) H5Lcreate_hard(file, name, file, "more", H5P_DEFAULT, H5P_DEFAULT);
        H5Dclose(set);
        H5Sclose(space);
        H5Pclose(plist);
        H5Tclose(type);
    }
    H5Fclose(file);
}

Test(shard, forged_structure)
{
    static const char *const parts[TRICKS] = {
        [CHUNKED] = "one piece", [EXTERNAL] = "one piece", [SOFT_LINK] = "missing", [EXTERNAL_LINK] = "missing", [A_GROUP] = "another type", [WRONG_TYPE] = "another type",
        [OTHER_ENDIAN] = "another type", [WRONG_SHAPE] = "dimension 1", [WRONG_RANK] = "2 dimensions", [EXTRA] = "does not name", [COMPACT] = "one piece", [LATE] = "lie within",
        [ABSENT] = "missing", [FILTERED] = "one piece", [COMMITTED] = "another type", [DENSE] = "missing", [OLD] = "not an HDF5 file of the kind", [USER_BLOCK] = "not an HDF5 file of the kind",
        [NO_ID] = "which dataset", [VLEN_ID] = "which dataset"};
    struct shard_manifest m = small();
    char *dir = dataset_new("d", &m), *path = kept_path(base, "forged.h5"), id[SHA256_HEX];
    struct shard_file f;
    OK_OR_DIE(manifest_read(dir, &m, id));
    for (int t = 0; t < TRICKS; t++) {
        forge_file(path, &m, id, (enum trick)t);
        int rc = shard_file_open(&f, path, &m, id, 0, -1);
        cr_assert_eq(rc, parts[t] ? ERR_INPUT : OK, "trick %d: %s", t, fail_message());
        if (parts[t]) cr_assert(strstr(fail_message(), parts[t]), "trick %d: %s", t, fail_message());
        shard_file_close(&f);
    }
    id[0] ^= 1;
    forge_file(path, &m, id, PLAIN);
    id[0] ^= 1;
    FAILS(shard_file_open(&f, path, &m, id, 0, -1), ERR_MISMATCH, "two runs");
    FAILS(shard_file_open(&f, path, &m, id, 1, -1), ERR_MISMATCH, "two runs");
    spit(path, "not HDF5", 8);
    FAILS(shard_file_open(&f, path, &m, id, 0, -1), ERR_INPUT, "not an HDF5 file");
}

/* ---- threads, sizes ---- */

struct job { struct shard_dataset *d; int64_t begin; int rc; char message[256]; };

static void *read_all(void *argument)
{
    struct job *j = argument;
    struct shard_row row, want;
    const struct shard_manifest *m = shard_dataset_manifest(j->d);
    shard_row_alloc(&row, m);
    shard_row_alloc(&want, m);
    for (int64_t i = 0; i < 2 * m->rows && j->rc == OK; i++) {
        int64_t r = (i * 37 + j->begin) % m->rows;
        j->rc = shard_dataset_read(j->d, r, &row);
        fixture_row(m, r, &want);
        if (j->rc == OK && memcmp(row.head_ids, want.head_ids, 4 * (size_t)(m->row_length * m->k))) j->rc = 99;
    }
    snprintf(j->message, sizeof j->message, "%s", fail_message());
    shard_row_free(&row);
    shard_row_free(&want);
    return NULL;
}

Test(shard, many_readers_many_files)
{
    struct shard_manifest m = fixture_manifest(SHARD_TOPK, 150, 1, 4, 20, 3);   /* more files than are kept open */
    char *dir = dataset_new("d", &m);
    struct shard_dataset *d;
    enum { THREADS = 4 };
    struct job jobs[THREADS];
    pthread_t threads[THREADS];
    OK_OR_DIE(shard_dataset_open(&d, dir));
    shard_dataset_verify_on_touch(d, true);
    for (int i = 0; i < THREADS; i++) {
        jobs[i] = (struct job){.d = d, .begin = 40 * i};
        pthread_create(&threads[i], NULL, read_all, &jobs[i]);
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        cr_assert_eq(jobs[i].rc, OK, "%s", jobs[i].message);
    }
    char **names;
    int n;
    OK_OR_DIE(dir_list("/proc/self/fd", &names, &n));
    cr_assert_lt(n, 100);
    names_free(names, n);
    shard_dataset_close(d);
}

Test(shard, sizes_of_large_datasets)
{
    struct shard_manifest m = fixture_manifest(SHARD_TOPK, (int64_t)1 << 32, 1 << 14, 4096, 152064, 64);
    cr_assert_eq(manifest_check(&m, "m", ERR_USAGE), OK, "%s", fail_message());
    cr_assert_eq(shard_count(&m), (int64_t)1 << 18);
    cr_assert_eq(shard_first_row(&m, shard_count(&m) - 1), ((int64_t)1 << 32) - (1 << 14));
    double per_token = (double)shard_bytes(&m, 0) / ((double)m.row_length * m.rows_per_shard);
    cr_assert(per_token > 295 && per_token < 312, "%g bytes per token with 3 temperatures", per_token);
    m.n_temperatures = 1;
    per_token = (double)shard_bytes(&m, 0) / ((double)m.row_length * m.rows_per_shard);
    cr_assert(per_token < 300, "%g bytes per token", per_token);
    m.kind = SHARD_HYBRID;
    m.k = m.draws = 32;
    per_token = (double)shard_bytes(&m, 0) / ((double)m.row_length * m.rows_per_shard);
    cr_assert(per_token < 330, "%g bytes per token", per_token);
}

Test(failpoint, parsing)
{
    cr_assert_eq(failpoint_set("a:kill@x"), ERR_USAGE);
    cr_assert_eq(failpoint_set("a:explode"), ERR_USAGE);
    cr_assert_eq(failpoint_set("a"), ERR_USAGE);
    cr_assert_eq(failpoint_set("a:error@0"), ERR_USAGE);
    cr_assert_eq(failpoint_set("a:error@2-"), ERR_USAGE);
    cr_assert_eq(failpoint_set("a:error@2+,b:enospc@3,c:error"), OK, "%s", fail_message());
    cr_assert(!FAILPOINT_FIRES("a") && FAILPOINT_FIRES("a") && FAILPOINT_FIRES("a") && errno == EIO);
    cr_assert(!FAILPOINT_FIRES("b") && !FAILPOINT_FIRES("b") && FAILPOINT_FIRES("b") && errno == ENOSPC && !FAILPOINT_FIRES("b"));
    cr_assert_eq(FAILPOINT("c"), ERR_IO);
    cr_assert_eq(FAILPOINT("d"), OK);
    cr_assert_eq(failpoint_set(NULL), OK);
    cr_assert_eq(FAILPOINT("c"), OK);
}
