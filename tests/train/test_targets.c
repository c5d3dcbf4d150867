/* Which objective a dataset can serve: how objective.divergence is read, every kind x tail x divergence is computed or refused as README.md's table says,
 * and a dataset that does not belong to the run is refused with both values: vocabulary, kind, K, row length, targets shifted against their tokens. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "tests/data/shard_fixture.h"
#include "train/alignment.h"
#include "train/binding.h"
#include "train/targets.h"

static void quiet(void) { freopen("/dev/null", "w", stdout); }
TestSuite(targets, .init = quiet);

static void set(struct config *c, const char *assignment) { cr_assert_eq(config_set(c, assignment), OK, "%s", fail_message()); }

static int read_objective(struct distill_args *a, const char *divergence, const char *floor)
{
    struct config *c = config_new();
    char *text = xasprintf("objective.divergence=%s", divergence);
    set(c, text);
    set(c, floor);
    int rc = targets_objective(a, c);
    free(text);
    config_free(c);
    return rc;
}

Test(targets, a_divergence_is_a_name_or_a_weighted_sum)
{
    static const struct { const char *text; enum divergence d; float mix[DIV_COUNT]; const char *back; } good[] = {
        {"forward_kl", DIV_FORWARD_KL, {1}, "forward_kl"}, {" tvd ", DIV_TVD, {[DIV_TVD] = 1}, "tvd"}, {"1.0 jsd", DIV_JSD, {[DIV_JSD] = 1}, "jsd"},
        {"0.7 forward_kl + 0.3 reverse_kl", DIV_MIX, {[DIV_FORWARD_KL] = 0.7f, [DIV_REVERSE_KL] = 0.3f}, "0.7 forward_kl + 0.3 reverse_kl"},
        {"skew_kl+forward_kl", DIV_MIX, {[DIV_FORWARD_KL] = 1, [DIV_SKEW_KL] = 1}, "1 forward_kl + 1 skew_kl"}, {"2 forward_kl", DIV_MIX, {[DIV_FORWARD_KL] = 2}, "2 forward_kl"},
        {"1e-1 tvd + .5 jsd", DIV_MIX, {[DIV_TVD] = 0.1f, [DIV_JSD] = 0.5f}, "0.5 jsd + 0.1 tvd"}};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        struct distill_args a;
        cr_assert_eq(read_objective(&a, good[i].text, "objective.floor=0"), OK, "%s: %s", good[i].text, fail_message());
        cr_expect_eq(a.divergence, good[i].d, "%s", good[i].text);
        for (int d = 0; d < DIV_COUNT; d++) cr_expect_float_eq(a.mix[d], good[i].mix[d], 1e-7, "%s", good[i].text);
        char *back = targets_describe(&a);
        cr_expect_str_eq(back, good[i].back);
        free(back);
    }
    static const char *const bad[][2] = {{"kl", "\"kl\" is none of"}, {"forward_kl reverse_kl", "\"+\" is missing"}, {"forward_kl + forward_kl", "twice"}, {"0 tvd", "weight of tvd is 0"},
                                         {"1e9 tvd", "at most 1e6"}, {"forward_kl +", "is none of"}, {"-1 tvd", "is none of"}, {"0.5", "is none of"}, {"nan tvd", "is none of"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct distill_args a;
        cr_expect_eq(read_objective(&a, bad[i][0], "objective.floor=0"), ERR_USAGE, "%s", bad[i][0]);
        cr_expect(strstr(fail_message(), bad[i][1]), "%s: %s", bad[i][0], fail_message());
    }
    struct distill_args a;
    cr_expect_eq(read_objective(&a, "jsd", "objective.floor=0.1"), ERR_USAGE);
    cr_expect(strstr(fail_message(), "objective.floor"), "%s", fail_message());
    cr_expect_eq(read_objective(&a, "reverse_kl", "objective.floor=0.1"), OK);
}

/* What is computed: '.' refused, T top-k, S samples, F full; in the order auto, unbiased, bucket, renormalise, drop */
Test(targets, every_cell_is_computed_or_refused_as_the_table_says)
{
    static const char *const tails[] = {"auto", "unbiased", "bucket", "renormalise", "drop"}, *const divergences[] = {"forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd", "0.5 forward_kl + 0.5 tvd"};
    static const char *const table[SHARD_KIND_COUNT][6] = {
        [SHARD_TOPK] = {"T.TTT", "T.T..", "T.TT.", "T.TT.", "T.TT.", "T.TT."},
        [SHARD_HYBRID] = {"SSTTT", "..T..", "..TT.", "..TT.", "..TT.", "..TT."},
        [SHARD_SAMPLED] = {"SS...", ".....", ".....", ".....", ".....", "....."},
        [SHARD_FULL] = {"FF...", "FF...", "FF...", "FF...", "FF...", "FF..."}};
    for (int kind = 0; kind < SHARD_KIND_COUNT; kind++)
        for (int d = 0; d < 6; d++)
            for (int i = 0; i < 5; i++) {
                struct shard_manifest m = fixture_manifest((enum shard_kind)kind, 4, 2, 8, 50, 6);
                struct config *c = config_new();
                struct distill_args a;
                enum target_kind target;
                int k;
                char *divergence = xasprintf("objective.divergence=%s", divergences[d]), *tail = xasprintf("objective.tail=%s", tails[i]);
                set(c, divergence);
                set(c, tail);
                cr_assert_eq(targets_objective(&a, c), OK);
                int rc = targets_choose(&a, &target, &k, c, &m);
                char want = table[kind][d][i], got = rc != OK ? '.' : target == TARGET_TOPK ? 'T' : target == TARGET_SAMPLES ? 'S' : target == TARGET_FULL ? 'F' : '?';
                cr_expect_eq(got, want, "%s of %s, tail %s: %c, not %c", divergences[d], shard_kind_name(m.kind), tails[i], got, want);
                if (rc != OK) {
                    cr_expect_eq(rc, ERR_MISMATCH);
                    const char *says[] = {shard_kind_name(m.kind), divergences[d], "; "};     /* what, with what, and the way out */
                    for (int s = 0; s < 3; s++) cr_expect(strstr(fail_message(), says[s]), "no \"%s\" in: %s", says[s], fail_message());
                } else if (target == TARGET_SAMPLES) cr_expect(k == m.k + m.draws && a.tail == TAIL_UNBIASED);
                else if (target == TARGET_TOPK) cr_expect(k == m.k && a.tail != TAIL_UNBIASED);
                free(divergence);
                free(tail);
                config_free(c);
            }
    /* the one that a floor makes finite */
    struct shard_manifest m = fixture_manifest(SHARD_TOPK, 4, 2, 8, 50, 6);
    struct config *c = config_new();
    struct distill_args a;
    enum target_kind target;
    int k;
    set(c, "objective.divergence=reverse_kl");
    set(c, "objective.tail=renormalise");
    set(c, "objective.floor=0.01");
    cr_assert_eq(targets_objective(&a, c), OK);
    cr_expect_eq(targets_choose(&a, &target, &k, c, &m), OK, "%s", fail_message());
    config_free(c);
}

static void binding_fails(const struct shard_manifest *m, const struct config *c, int64_t columns, const char *first, const char *second)
{
    struct model_config model = {.vocab_size = columns};
    struct student s = {.config = &model, .tokenizer_dir = "student"};
    cr_expect_eq(binding_check(m, c, &s, NULL), ERR_MISMATCH);
    cr_expect(strstr(fail_message(), first) && strstr(fail_message(), second), "no \"%s\" and \"%s\" in: %s", first, second, fail_message());
}

Test(targets, another_vocabulary_kind_head_or_row_length_is_refused_with_both_values)
{
    struct shard_manifest m = fixture_manifest(SHARD_TOPK, 4, 2, 24, 50, 6);
    struct config *c = config_new();
    struct model_config model = {.vocab_size = m.teacher_vocab};
    struct student s = {.config = &model, .tokenizer_dir = "student"};
    cr_expect_eq(binding_check(&m, c, &s, NULL), OK, "%s", fail_message());
    binding_fails(&m, c, 49, "50 valid ids", "49");
    binding_fails(&m, c, 60, "63 columns", "60");            /* other padding, and no tokenizers to say that the ids are the same */
    set(c, "shards.k=7");
    binding_fails(&m, c, 63, "shards.k is 7", "top 6");
    m.kind = SHARD_SAMPLED;
    set(c, "shards.draws=9");
    m.draws = 8;
    binding_fails(&m, c, 63, "shards.draws is 9", "8 draws");
    m.kind = SHARD_HYBRID;
    set(c, "shards.k=6");
    set(c, "shards.m=10");
    binding_fails(&m, c, 63, "shards.m is 10", "8 draws");
    m.kind = SHARD_TOPK;
    set(c, "shards.k=6");
    set(c, "shards.kind=full");
    binding_fails(&m, c, 63, "shards.kind is full", "topk");
    set(c, "shards.kind=topk");
    set(c, "corpus.row_length=48");
    binding_fails(&m, c, 63, "corpus.row_length is 48", "24");
    set(c, "corpus.row_length=24");
    cr_expect_eq(binding_check(&m, c, &s, NULL), OK, "%s", fail_message());
    config_free(c);
}

/* A dataset whose text is what its teacher finds likeliest; `shift` moves the tokens against the targets; `lie`: another label_logprob than the head's. */
static char *text_of_the_teacher(const char *base, const struct shard_manifest *m, int shift, bool lie)
{
    char *dir = path_join(base, shift < 0 ? "back" : shift > 0 ? "ahead" : lie ? "lie" : "right");
    struct shard_writer *w;
    struct shard_row row;
    shard_row_alloc(&row, m);
    cr_assert_eq(shard_writer_open(&w, dir, m), OK, "%s", fail_message());
    for (int64_t n = 0; n < shard_count(m); n++) {
        cr_assert_eq(shard_writer_begin(w, n), OK);
        for (int64_t i = 0; i < shard_rows(m, n); i++) {
            fixture_row(m, shard_first_row(m, n) + i, &row);
            for (int64_t t = 0; t < m->row_length; t++) {
                int64_t at = t + 1 + shift, best = 0;
                row.document[t] = (uint16_t)(t / 16);
                row.loss_mask[t] = t % 16 != 15 && t + 1 < m->row_length;
                row.label_logprob[t] = row.loss_mask[t] && lie ? f16_from_float(-9) : 0;
                if (m->kind == SHARD_TOPK || m->kind == SHARD_HYBRID) best = row.head_ids[t * m->k];
                else if (m->kind == SHARD_SAMPLED) {
                    for (int64_t e = 1; e < m->draws; e++) if (row.draw_count[t * m->draws + e] > row.draw_count[t * m->draws + best]) best = e;
                    best = row.draw_ids[t * m->draws + best];
                } else for (int64_t v = 1; v < m->valid_vocab; v++) if (f16_to_float(row.logits[t * m->valid_vocab + v]) > f16_to_float(row.logits[t * m->valid_vocab + best])) best = v;
                if (at >= 0 && at < m->row_length) row.tokens[at] = (uint32_t)best;
            }
            cr_assert_eq(shard_writer_put(w, &row), OK, "%s", fail_message());
        }
        cr_assert_eq(shard_writer_seal(w), OK, "%s", fail_message());
    }
    shard_writer_close(w);
    shard_row_free(&row);
    return dir;
}

static int checked(char *dir)
{
    struct shard_dataset *d;
    struct loader_options o = {.seed = 1, .shuffle = true};
    cr_assert_eq(shard_dataset_open(&d, dir), OK, "%s", fail_message());
    int rc = alignment_check(d, &o, dir);
    shard_dataset_close(d);
    free(dir);
    return rc;
}

Test(targets, a_dataset_whose_targets_are_shifted_against_its_tokens_is_refused)
{
    for (int kind = 0; kind < SHARD_KIND_COUNT; kind++) {
        char *base = fixture_dir();
        struct shard_manifest m = fixture_manifest((enum shard_kind)kind, 6, 3, 64, 90, 8);
        cr_expect_eq(checked(text_of_the_teacher(base, &m, 0, false)), OK, "%s: %s", shard_kind_name(m.kind), fail_message());
        for (int shift = -1; shift <= 1; shift += 2) {
            cr_expect_eq(checked(text_of_the_teacher(base, &m, shift, false)), ERR_MISMATCH, "%s shifted by %d", shard_kind_name(m.kind), shift);
            cr_expect(strstr(fail_message(), "shifted against"), "%s", fail_message());
        }
        if (m.kind != SHARD_SAMPLED) {                           /* which stores no probabilities to compare with */
            cr_expect_eq(checked(text_of_the_teacher(base, &m, 0, true)), ERR_MISMATCH, "%s with other label_logprob", shard_kind_name(m.kind));
            cr_expect(strstr(fail_message(), "do not belong together"), "%s", fail_message());
        }
        dir_remove_tree(base);
        free(base);
    }
}
