/* The loader: the same rows in the same order whatever is sealed, prefetched or resumed, with targets at any listed temperature. */
#include <criterion/criterion.h>
#include <pthread.h>
#include <sys/wait.h>
#include <time.h>

#include "base/failpoint.h"
#include "data/loader.h"
#include "tests/data/shard_helpers.h"

TestSuite(loader, .init = setup, .fini = teardown, .timeout = 120);

static struct loader_options options(int64_t batch_rows, bool shuffle) { return (struct loader_options){.batch_rows = batch_rows, .seed = 5, .temperature = 1, .shuffle = shuffle}; }

/* 11 rows in shards of 3: the last one has 2. */
static struct shard_manifest eleven(void) { return fixture_manifest(SHARD_TOPK, 11, 3, 8, 40, 4); }

static struct shard_dataset *open_dataset(const char *dir)
{
    struct shard_dataset *d;
    OK_OR_DIE(shard_dataset_open(&d, dir));
    return d;
}

/* Row numbers of the next n batches from `from`, in order. */
static int64_t take(struct shard_dataset *d, const struct corpus_rows *c, const struct loader_options *o, const struct loader_state *from, int64_t batches, int64_t *rows, struct loader_state *end)
{
    struct loader *l;
    struct batch *b;
    int64_t n = 0;
    OK_OR_DIE(d ? loader_open_dataset(&l, d, o) : loader_open_rows(&l, c, o));
    if (from) OK_OR_DIE(loader_seek(l, from));
    for (int64_t i = 0; i < batches; i++) {
        OK_OR_DIE(loader_next(l, &b));
        if (!b) break;
        for (int64_t r = 0; r < b->rows; r++) rows[n++] = b->row_index[r];
    }
    if (end) loader_tell(l, end);
    loader_close(l);
    return n;
}

static int take_status(struct shard_dataset *d, const struct loader_options *o)
{
    struct loader *l = NULL;
    int rc = loader_open_dataset(&l, d, o);
    loader_close(l);
    return rc;
}

static struct corpus_rows *corpus_of(int64_t rows, int64_t length)
{
    struct corpus_rows *c = kept(xcalloc(1, sizeof *c));
    size_t n = (size_t)(rows * length);
    *c = (struct corpus_rows){.rows = rows, .length = length, .tokens = kept(xcalloc(n, 4)), .loss_mask = kept(xcalloc(n, 1)), .document = kept(xcalloc(n, 2))};
    for (int64_t i = 0; i < rows * length; i++) {
        c->tokens[i] = (uint32_t)i;
        c->document[i] = (uint16_t)(i % length / 3);
        c->loss_mask[i] = i % length % 3 != 2 && i % length != length - 1;
    }
    return c;
}

/* ---- order ---- */

Test(loader, epochs_are_permutations)
{
    struct shard_manifest m = eleven();
    struct shard_dataset *d = open_dataset(dataset_new("d", &m));
    struct corpus_rows *c = corpus_of(23, 4);
    struct loader_options o = options(1, true);
    for (int kind = 0; kind < 2; kind++) {
        int64_t n = kind ? c->rows : m.rows, rows[23 * 6], different = 0;
        cr_assert_eq(take(kind ? NULL : d, c, &o, NULL, 6 * n, rows, NULL), 6 * n);
        for (int64_t e = 0; e < 6; e++) {
            bool seen[23] = {false};
            for (int64_t i = 0; i < n; i++) {
                int64_t r = rows[e * n + i];
                cr_assert(r >= 0 && r < n && !seen[r], "epoch %lld has row %lld twice", (long long)e, (long long)r);
                seen[r] = true;
                if (e == 0 && !kind) cr_assert_eq(r / 3, i / 3, "epoch 0 visits the shards in order");
                if (e) different += r != rows[(e - 1) * n + i];
            }
            /* later epochs: a shard's rows stay together */
            if (!kind) for (int64_t i = 0, run = 1; i < n; i++, run++)
                if (i + 1 == n || rows[e * n + i + 1] / 3 != rows[e * n + i] / 3) { cr_assert_eq(run, rows[e * n + i] / 3 == 3 ? 2 : 3); run = 0; }
        }
        cr_assert_gt(different, 3 * n);
    }
    o.seed = 6;
    int64_t a[11], b[11];
    take(d, NULL, &o, NULL, 11, a, NULL);
    o.seed = 5;
    take(d, NULL, &o, NULL, 11, b, NULL);
    cr_assert(memcmp(a, b, sizeof a), "the seed changes the order");
    shard_dataset_close(d);
}

Test(loader, batches_cross_epochs_and_cut_nothing)
{
    struct shard_manifest m = eleven();
    struct shard_dataset *d = open_dataset(dataset_new("d", &m));
    struct loader_options one = options(1, true);
    int64_t want[132], got[132];
    struct loader_state at;
    take(d, NULL, &one, NULL, 132, want, NULL);
    for (int64_t batch = 2; batch <= 33; batch += batch == 4 ? 7 : batch == 11 ? 22 : 1) {   /* 2 3 4 11 33: 33 is three epochs at once */
        struct loader_options o = options(batch, true);
        int64_t batches = 132 / batch;
        cr_assert_eq(take(d, NULL, &o, NULL, batches, got, &at), batches * batch);
        cr_assert(!memcmp(want, got, (size_t)(batches * batch) * sizeof *want), "batches of %lld", (long long)batch);
        cr_assert_eq(at.epoch * 11 + at.cursor, batches * batch);
        cr_assert_lt(at.cursor, 11);
    }
    shard_dataset_close(d);
}

/* Files that are gone: what is left comes in the order it has in the whole dataset, for every set of shards that is missing. */
Test(loader, left_out_shards_leave_the_order_of_the_others)
{
    struct shard_manifest m = eleven();
    const char *dir = dataset_new("d", &m);
    struct shard_dataset *d = open_dataset(dir);
    for (int shuffle = 0; shuffle < 2; shuffle++) {
        struct loader_options o = options(1, shuffle);
        int64_t epochs = shuffle ? 5 : 1, whole[55], n = take(d, NULL, &o, NULL, 11 * epochs, whole, NULL);
        cr_assert_eq(n, 11 * epochs);
        for (unsigned set = 1; set < 15; set++) {
            int64_t want[55], got[55], wanted = 0, *missing, n_missing, stop = 4;
            char *path[4], *away[4];
            struct loader_state at;
            for (int s = 0; s < 4; s++) {
                path[s] = shard_dataset_path(d, s);
                away[s] = xasprintf("%s.away", path[s]);
                if (set >> s & 1) cr_assert_eq(rename(path[s], away[s]), 0);
            }
            struct shard_dataset *rest = open_dataset(dir);
            FAILS(take_status(rest, &o), ERR_INPUT, "missing");
            shard_dataset_missing(rest, &missing, &n_missing);
            cr_assert_eq(n_missing, __builtin_popcount(set));
            for (int64_t i = 0; i < n_missing; i++) cr_assert(set >> missing[i] & 1);
            shard_dataset_leave_out(rest, missing, n_missing);
            for (int64_t i = 0; i < n; i++) if (!(set >> whole[i] / 3 & 1)) want[wanted++] = whole[i];
            cr_assert_eq(take(rest, NULL, &o, NULL, wanted, got, NULL), wanted);
            cr_assert(!memcmp(want, got, (size_t)wanted * sizeof *want), "set %u", set);
            if (shuffle) {                        /* and goes on in the middle */
                if (stop > wanted) stop = wanted;
                take(rest, NULL, &o, NULL, stop, got, &at);
                take(rest, NULL, &o, &at, wanted - stop, got + stop, NULL);
                cr_assert(!memcmp(want, got, (size_t)wanted * sizeof *want), "set %u, stopped after %lld", set, (long long)stop);
            }
            shard_dataset_leave_out(rest, NULL, 0);
            FAILS(take_status(rest, &o), ERR_INPUT, "missing");
            shard_dataset_close(rest);
            free(missing);
            for (int s = 0; s < 4; s++) {
                if (set >> s & 1) cr_assert_eq(rename(away[s], path[s]), 0);
                free(path[s]);
                free(away[s]);
            }
        }
    }
    shard_dataset_leave_out(d, (const int64_t[]){0, 1, 2, 3}, 4);
    struct loader_options o = options(1, true);
    FAILS(take_status(d, &o), ERR_INPUT, "no shard is there");
    shard_dataset_close(d);
}

Test(loader, seek_and_tell)
{
    struct shard_manifest m = eleven();
    struct shard_dataset *d = open_dataset(dataset_new("d", &m));
    struct corpus_rows *c = corpus_of(10, 4);
    for (int kind = 0; kind < 2; kind++) {
        struct loader_options o = options(3, true);
        int64_t want[60], got[60];
        take(kind ? NULL : d, c, &o, NULL, 20, want, NULL);
        for (int64_t stop = 0; stop < 20; stop++) {
            struct loader_state at, end;
            take(kind ? NULL : d, c, &o, NULL, stop, got, &at);
            take(kind ? NULL : d, c, &o, &at, 20 - stop, got + 3 * stop, &end);
            cr_assert(!memcmp(want, got, sizeof want), "stopped after %lld", (long long)stop);
        }
        struct loader *l;
        OK_OR_DIE(kind ? loader_open_rows(&l, c, &o) : loader_open_dataset(&l, d, &o));
        cr_assert_eq(loader_rows_per_epoch(l), kind ? 10 : 11);
        const struct loader_state bad[] = {{0, 11}, {0, -1}, {-1, 0}, {0, 12}, {(int64_t)1 << 40, 0}};
        for (int i = 0; i < 5; i++) FAILS(loader_seek(l, &bad[i]), ERR_MISMATCH, "no position");
        loader_close(l);
    }
    shard_dataset_close(d);
}

/* What was read ahead is not what was consumed. */
Test(loader, prefetch_does_not_move_tell)
{
    struct shard_manifest m = eleven();
    struct shard_dataset *d = open_dataset(dataset_new("d", &m));
    struct loader_options o = options(2, true);
    int64_t want[44];
    take(d, NULL, &o, NULL, 22, want, NULL);
    struct loader *l;
    struct batch *b;
    struct loader_state at;
    OK_OR_DIE(loader_open_dataset(&l, d, &o));
    loader_tell(l, &at);
    cr_assert(at.epoch == 0 && at.cursor == 0);
    for (int64_t i = 0; i < 22; i++) {
        OK_OR_DIE(loader_next(l, &b));
        if (i % 3 == 0) usleep(20000);                            /* the reader runs as far ahead as it may */
        loader_tell(l, &at);
        cr_assert_eq(at.epoch * 11 + at.cursor, 2 * (i + 1));
        cr_assert(b->row_index[0] == want[2 * i] && b->row_index[1] == want[2 * i + 1], "batch %lld was overwritten or out of order", (long long)i);
    }
    cr_assert_geq(loader_wait_seconds(l), 0.0);
    loader_close(l);
    shard_dataset_close(d);
}

Test(loader, without_shuffle_once_in_order)
{
    struct shard_manifest m = eleven();
    struct shard_dataset *d = open_dataset(dataset_new("d", &m));
    struct loader_options o = options(4, false);
    struct loader *l;
    struct batch *b;
    struct loader_state at, end = {0, 11};
    int64_t n = 0;
    OK_OR_DIE(loader_open_dataset(&l, d, &o));
    for (;;) {
        OK_OR_DIE(loader_next(l, &b));
        if (!b) break;
        cr_assert_eq(b->rows, n == 8 ? 3 : 4);
        cr_assert_eq(b->n, b->rows * 8);
        cr_assert_eq(b->doc_begin[b->n_docs], b->n);
        for (int64_t i = 0; i < b->rows; i++) cr_assert_eq(b->row_index[i], n++);
    }
    cr_assert_eq(n, 11);
    loader_tell(l, &at);
    cr_assert(at.epoch == 0 && at.cursor == 11);
    for (int i = 0; i < 3; i++) { OK_OR_DIE(loader_next(l, &b)); cr_assert_null(b); }
    loader_close(l);
    OK_OR_DIE(loader_open_dataset(&l, d, &o));
    OK_OR_DIE(loader_seek(l, &end));
    OK_OR_DIE(loader_next(l, &b));
    cr_assert_null(b);
    loader_close(l);
    shard_dataset_close(d);
}

/* ---- content ---- */

Test(loader, batch_of_documents)
{
    struct batch *b = batch_new(2, 6, NULL, false);
    uint32_t tokens[] = {5, 6, 7, 8, 9, 10};
    uint8_t mask[] = {1, 0, 0, 1, 0, 0}, last[] = {0, 0, 0, 0, 0, 1};
    uint16_t document[] = {0, 0, 1, 2, 2, 3}, whole[6] = {0};
    batch_set_row(b, 0, tokens, mask, document);
    batch_set_row(b, 1, tokens, last, whole);                     /* the last position has no label, whatever a mask says */
    batch_finish(b);
    const int32_t position[] = {0, 1, 0, 0, 1, 0, 0, 1, 2, 3, 4, 5}, labels[] = {6, -1, -1, 9, -1, -1, -1, -1, -1, -1, -1, -1}, begin[] = {0, 2, 3, 5, 6, 12};
    cr_assert_arr_eq(b->position, position, sizeof position);
    cr_assert_arr_eq(b->labels, labels, sizeof labels);
    cr_assert_arr_eq(b->doc_begin, begin, sizeof begin);
    cr_assert(b->n_docs == 5 && b->max_doc == 6 && b->n_targets == 2 && b->tokens[11] == 10);
    cr_assert(!b->head_ids && !b->lse && !b->full_logits);
    batch_free(b);
    batch_free(NULL);
}

/* Entries and weights of the kinds that draw, at every temperature: each against its definition; and over many positions sum w f and sum p f are the same
 * within five standard errors, f being what a truncated head gets wrong. */
Test(loader, samples)
{
    struct shard_manifest kinds[] = {fixture_manifest(SHARD_HYBRID, 60, 20, 32, 40, 4), fixture_manifest(SHARD_SAMPLED, 60, 20, 32, 40, 6), fixture_manifest(SHARD_HYBRID, 8, 4, 8, 5, 5)};
    for (int kind = 0; kind < 3; kind++) {
        struct shard_manifest *m = &kinds[kind];
        struct shard_dataset *d = open_dataset(dataset_new(kept(xasprintf("d%d", kind)), m));
        int64_t L = m->row_length, V = m->valid_vocab, K = m->k, D = m->draws;
        double *logits = kept(xmalloc((size_t)V * sizeof *logits));
        struct shard_row stored;
        shard_row_alloc(&stored, m);
        for (int j = 0; j < m->n_temperatures; j++) {
            struct loader_options o = options(3, true);
            struct loader *l;
            struct batch *b;
            double T = o.temperature = m->temperatures[j], T0 = m->temperatures[0], sum[3] = {0}, square[3] = {0};
            int64_t positions = 0;
            o.samples = true;
            OK_OR_DIE(loader_open_dataset(&l, d, &o));
            for (int64_t rows = 0; rows < m->rows; rows += 3) {
                OK_OR_DIE(loader_next(l, &b));
                cr_assert_eq(b->k, K + D);
                for (int64_t n = 0; n < b->n; n++, positions++) {
                    int64_t row = b->row_index[n / L], t = n % L, at = n * b->k;
                    fixture_logits(m, row, t, logits);
                    if (t == 0) OK_OR_DIE(shard_dataset_read(d, row, &stored));
                    double lse = log_sum_exp(logits, V, T), lse0 = log_sum_exp(logits, V, T0), r = 0, estimate[3] = {0}, exact = 0, head = 0;
                    for (int64_t i = 0; i < K; i++) head += exp(logits[stored.head_ids[t * K + i]] / T0 - lse0);
                    r = K ? fmax(1 - head, 0) : 1;
                    for (int64_t v = 0; v < V; v++) exact += exp(logits[v] / T - lse) * logits[v];
                    for (int64_t i = 0; i < K + D; i++) {
                        double w = b->weight[at + i], want, p = exp(logits[b->head_ids[at + i]] / T - lse), p0 = exp(logits[b->head_ids[at + i]] / T0 - lse0);
                        int count = i < K ? -1 : stored.draw_count[t * D + i - K];
                        if (!count) {
                            cr_assert(w == 0 && b->head_ids[at + i] == 0 && b->head_logprob[at + i] == 0, "an unused slot is not empty");
                            continue;
                        }
                        want = count < 0 ? p : count / (double)D * r * p / p0;
                        cr_assert(fabs(w - want) <= want * (fabs(log(p0)) / 1000 * (1 + T0 / T) + 1e-4), "T = %g, entry %d: weight %g is not %g", T, (int)i, w, want);
                        if (m->kind == SHARD_SAMPLED) cr_assert_float_eq(b->head_logprob[at + i], -f16_to_float(stored.entropy[t]), 0);
                        else cr_assert_float_eq(b->head_logprob[at + i], log(p), 1e-3 * (1 + fabs(log(p0))));
                        estimate[0] += w * logits[b->head_ids[at + i]];
                        if (i >= K) continue;
                        estimate[1] += p * logits[b->head_ids[at + i]];
                        estimate[2] += p;
                    }
                    double off[3] = {estimate[0] - exact, K ? estimate[1] / estimate[2] - exact : 0, 0};
                    for (int i = 0; i < 2; i++) { sum[i] += off[i]; square[i] += off[i] * off[i]; }
                }
            }
            double n = (double)positions, error = sqrt(fmax(square[0] / n - sum[0] / n * (sum[0] / n), 0) / n), biased = sqrt(fmax(square[1] / n - sum[1] / n * (sum[1] / n), 0) / n);
            cr_assert(fabs(sum[0] / n) <= 5 * error + 2e-3, "%s at T = %g: off by %g, the standard error is %g", shard_kind_name(m->kind), T, sum[0] / n, error);
            if (K && K < V) cr_assert(fabs(sum[1] / n) > 20 * biased, "a head alone passes this test: %g, %g", sum[1] / n, biased);
            loader_close(l);
        }
        shard_row_free(&stored);
        shard_dataset_close(d);
    }
}

/* Targets at every temperature against the definition, from the logits the fixture made. */
Test(loader, temperatures)
{
    struct shard_manifest kinds[] = {eleven(), fixture_manifest(SHARD_FULL, 5, 2, 8, 21, 0), eleven(), fixture_manifest(SHARD_HYBRID, 11, 3, 8, 40, 4)};
    kinds[2].temperatures[0] = 2;                                 /* stored at T0 = 2, asked for at 0.7 */
    for (int kind = 0; kind < 4; kind++) {
        struct shard_manifest *m = &kinds[kind];
        char *name = xasprintf("d%d", kind);
        struct shard_dataset *d = open_dataset(dataset_new(name, m));
        int64_t L = m->row_length, V = m->valid_vocab, K = m->k;
        double *logits = xmalloc((size_t)V * sizeof *logits);
        struct shard_row stored;
        shard_row_alloc(&stored, m);
        for (int j = 0; j < m->n_temperatures; j++) {
            struct loader_options o = options(3, true);
            struct loader *l;
            struct batch *b;
            double T = o.temperature = m->temperatures[j], T0 = m->temperatures[0];
            OK_OR_DIE(loader_open_dataset(&l, d, &o));
            OK_OR_DIE(loader_next(l, &b));
            cr_assert_eq(b->k, K);
            for (int64_t n = 0; n < b->n; n++) {
                int64_t row = b->row_index[n / L], t = n % L;
                fixture_logits(m, row, t, logits);
                if (t == 0) OK_OR_DIE(shard_dataset_read(d, row, &stored));
                double lse = log_sum_exp(logits, V, T), mass = 0;
                cr_assert_float_eq(b->lse[n], lse, 1e-5 * fabs(lse) + 1e-6);
                cr_assert_eq(b->tokens[n], (int32_t)stored.tokens[t]);
                cr_assert_eq(b->labels[n], stored.loss_mask[t] ? (int32_t)stored.tokens[t + 1] : -1);
                if (stored.loss_mask[t]) cr_assert_float_eq(b->label_logprob[n], logits[stored.tokens[t + 1]] / T0 - log_sum_exp(logits, V, T0), 0.01);
                for (int64_t i = 0; i < K; i++) {
                    float got = b->head_logprob[n * K + i], same = f16_to_float(stored.head_logprob[t * K + i]);
                    double want = logits[b->head_ids[n * K + i]] / T - lse, rounding = T0 / T * fabs(same) / 2000 + 2e-6 * (1 + fabs(lse));
                    cr_assert(fabs(got - want) <= rounding, "T = %g: %g is not %g", T, got, want);
                    cr_assert_leq(got, 0.0f);
                    if (j == 0) cr_assert_eq(got, same, "as stored");
                    mass += exp(want);
                }
                if (K) cr_assert_float_eq(exp(b->tail_logmass[n]), 1 - mass, 1e-5);
                else cr_assert(isinf(b->tail_logmass[n]) && b->tail_logmass[n] < 0);
                for (int64_t v = 0; !K && v < V; v++)
                    cr_assert_float_eq(f16_to_float(b->full_logits[n * V + v]) * b->full_scale, logits[v] / T, 1e-5 * fabs(logits[v] / T));
            }
            loader_close(l);
        }
        shard_row_free(&stored);
        shard_dataset_close(d);
        free(logits);
        free(name);
    }
}

Test(loader, nothing_supervised)
{
    struct corpus_rows *c = corpus_of(3, 4);
    struct loader_options o = options(2, true);
    struct loader *l;
    struct batch *b;
    memset(c->loss_mask, 0, 12);
    for (int i = 0; i < 12; i++) c->document[i] = (uint16_t)(i % 4);   /* documents of one token */
    OK_OR_DIE(loader_open_rows(&l, c, &o));
    OK_OR_DIE(loader_next(l, &b));
    cr_assert(b->n_targets == 0 && b->n_docs == 8 && b->max_doc == 1);
    loader_close(l);
    c->rows = 0;
    FAILS(loader_open_rows(&l, c, &o), ERR_INPUT, "no rows");
}

/* ---- refusals and failures ---- */

Test(loader, refuses)
{
    struct shard_manifest m = eleven();
    char *dir = dataset_new("d", &m);
    struct shard_dataset *d = open_dataset(dir);
    struct loader_options o = options(2, true);
    struct loader *l;
    o.temperature = 2;
    FAILS(loader_open_dataset(&l, d, &o), ERR_MISMATCH, "temperature 2 was asked for, the dataset has 1, 0.7, 3");
    o.temperature = 1;
    o.samples = true;
    FAILS(loader_open_dataset(&l, d, &o), ERR_MISMATCH, "kind topk, which holds no draws");
    o.samples = false;
    o.temperature = 2;
    struct shard_manifest sampled = fixture_manifest(SHARD_SAMPLED, 2, 1, 4, 20, 3);
    struct shard_dataset *drawn = open_dataset(dataset_new("sampled", &sampled));
    FAILS(loader_open_dataset(&l, drawn, &o), ERR_MISMATCH, "temperature 2 was asked for, but kind sampled serves only the one it was drawn at, 1;");
    shard_dataset_close(drawn);
    shard_dataset_close(d);
    char *journal = kept_path(dir, "journal.jsonl"), *text;
    size_t bytes;
    OK_OR_DIE(file_read(journal, 1 << 20, &text, &bytes));
    kept(text);
    spit(journal, text, (size_t)(strchr(text, '\n') - text) + 1);
    d = open_dataset(dir);
    o.temperature = 1;
    FAILS(loader_open_dataset(&l, d, &o), ERR_INPUT, "1 of 4 shards are sealed");
    shard_dataset_close(d);
    spit(journal, text, bytes);
    char *path = kept(shard_path(dir, 2));
    unlink(path);
    d = open_dataset(dir);
    FAILS(loader_open_dataset(&l, d, &o), ERR_INPUT, "shard-000002.h5: the journal lists this shard, but the file is missing");
    shard_dataset_close(d);
}

Test(loader, broken_row_surfaces_in_order)
{
    struct shard_manifest m = eleven();
    char *dir = dataset_new("d", &m);
    uint16_t x = 0x1234;
    forge(dir, &m, SHARD_IDS_LOW, 1, 4, &x, 2, false);            /* row 1 */
    struct shard_dataset *d = open_dataset(dir);
    struct loader_options o = options(1, false);
    struct loader *l;
    struct batch *b;
    struct loader_state at;
    OK_OR_DIE(loader_open_dataset(&l, d, &o));
    OK_OR_DIE(loader_next(l, &b));
    usleep(20000);
    cr_assert_eq(b->row_index[0], 0);
    for (int i = 0; i < 3; i++) {
        fail(ERR_IO, "another message of this thread");
        FAILS(loader_next(l, &b), ERR_INPUT, "row 1 of the shard, 1 of the dataset: its CRC");
        cr_assert_null(b);
    }
    loader_tell(l, &at);
    cr_assert_eq(at.cursor, 1);
    loader_close(l);
    shard_dataset_close(d);
}

/* ---- following ---- */

struct writing { const char *dir; struct shard_manifest m; int rc; int64_t pause_us; };

static void *write_slowly(void *argument)
{
    struct writing *job = argument;
    struct shard_writer *w = NULL;
    struct shard_row row;
    int rc = OK;
    shard_row_alloc(&row, &job->m);
    TRY(shard_writer_open(&w, job->dir, &job->m));
    for (int64_t n; (n = shard_writer_next_shard(w)) < shard_count(&job->m);) {
        TRY(shard_writer_begin(w, n));
        for (int64_t i = 0; i < shard_rows(&job->m, n); i++) {
            fixture_row(&job->m, shard_first_row(&job->m, n) + i, &row);
            TRY(shard_writer_put(w, &row));
        }
        usleep((useconds_t)job->pause_us);
        TRY(shard_writer_seal(w));
    }
out:
    shard_writer_close(w);
    shard_row_free(&row);
    job->rc = rc;
    return NULL;
}

static char *empty_dataset(const char *name, const struct shard_manifest *m)
{
    struct shard_writer *w;
    char *dir = kept_path(base, name);
    OK_OR_DIE(shard_writer_open(&w, dir, m));
    shard_writer_close(w);
    return dir;
}

Test(loader, follows_a_writer)
{
    struct shard_manifest m = fixture_manifest(SHARD_TOPK, 20, 3, 8, 40, 4);
    char *whole = dataset_new("whole", &m), *dir = empty_dataset("growing", &m);
    struct loader_options o = options(3, true);
    int64_t want[60], got[60];
    struct shard_dataset *d = open_dataset(whole);
    take(d, NULL, &o, NULL, 20, want, NULL);
    shard_dataset_close(d);
    struct writing job = {.dir = dir, .m = m, .pause_us = 80000};
    pthread_t thread;
    pthread_create(&thread, NULL, write_slowly, &job);
    d = open_dataset(dir);
    o.follow = true;
    struct loader *l;
    struct batch *b;
    OK_OR_DIE(loader_open_dataset(&l, d, &o));
    for (int64_t i = 0; i < 20; i++) {                            /* three epochs: the later ones need every shard */
        OK_OR_DIE(loader_next(l, &b));
        memcpy(got + 3 * i, b->row_index, 3 * sizeof *got);
    }
    cr_assert(!memcmp(want, got, sizeof want), "the order does not depend on what is sealed");
    cr_assert_gt(loader_wait_seconds(l), 0.2);
    loader_close(l);
    shard_dataset_close(d);
    pthread_join(thread, NULL);
    cr_assert_eq(job.rc, OK);
    char *different = tree_difference(whole, dir);
    cr_assert_null(different, "%s", different);
}

static void *stop_later(void *argument)
{
    usleep(300000);
    *(volatile int *)argument = 1;
    return NULL;
}

Test(loader, waiting_ends)
{
    struct shard_manifest m = eleven();
    char *dir = empty_dataset("d", &m);
    struct shard_dataset *d = open_dataset(dir);
    struct loader_options o = options(2, true);
    struct loader *l;
    struct batch *b;
    volatile int stop = 0;
    pthread_t thread;
    o.follow = true;
    o.wait_s = 0.3;
    OK_OR_DIE(loader_open_dataset(&l, d, &o));
    FAILS(loader_next(l, &b), ERR_LOST, "shard 0 did not appear within 0.3 s");
    loader_close(l);
    o.wait_s = 0;
    o.stop = &stop;
    OK_OR_DIE(loader_open_dataset(&l, d, &o));
    pthread_create(&thread, NULL, stop_later, (void *)&stop);
    FAILS(loader_next(l, &b), ERR_STOPPED, "stopped while waiting");
    pthread_join(thread, NULL);
    loader_close(l);
    stop = 0;
    struct shard_writer *w;                                       /* one shard: one batch is there, the reader waits for the next; closing does not */
    struct shard_row row;
    shard_row_alloc(&row, &m);
    OK_OR_DIE(shard_writer_open(&w, dir, &m));
    OK_OR_DIE(shard_writer_begin(w, 0));
    for (int64_t i = 0; i < 3; i++) { fixture_row(&m, i, &row); OK_OR_DIE(shard_writer_put(w, &row)); }
    OK_OR_DIE(shard_writer_seal(w));
    shard_writer_close(w);
    shard_row_free(&row);
    OK_OR_DIE(loader_open_dataset(&l, d, &o));
    OK_OR_DIE(loader_next(l, &b));
    struct timespec begin, end;
    usleep(50000);
    clock_gettime(CLOCK_MONOTONIC, &begin);
    loader_close(l);
    clock_gettime(CLOCK_MONOTONIC, &end);
    cr_assert_lt((double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec), 0.15);
    /* a journal that breaks while it is followed */
    OK_OR_DIE(loader_open_dataset(&l, d, &o));
    OK_OR_DIE(loader_next(l, &b));
    char *journal = kept_path(dir, "journal.jsonl");
    FILE *f = fopen(journal, "a");
    fputs("{\"shard\":1}\n", f);
    fclose(f);
    FAILS(loader_next(l, &b), ERR_INPUT, "journal.jsonl: the line at byte");
    loader_close(l);
    shard_dataset_close(d);
}
