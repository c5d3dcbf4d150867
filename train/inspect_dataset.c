/* distill inspect DATASET: what a dataset of logit shards is, how far it is, how much of the teacher it keeps; and one row, position by
 * position. Every sealed row is read, with all the checks a reader makes.
 *
 * Percentiles of the kept mass 1 - exp(tail) come from a histogram over the leading bits of the tail mass as fp32, which keeps 13 bits of it
 * at every magnitude: the dataset may be larger than memory. */
#include <math.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/file.h"
#include "base/half.h"
#include "data/shard.h"
#include "train/inspect.h"
#include "train/progress.h"

enum { DROPPED_BITS = 10, BINS = (0x3f800000 >> DROPPED_BITS) + 2 };      /* 0 .. 1.0, and rounding a hair above */

struct survey {
    int64_t rows, supervised, documents, different;   /* different: ids among the draws of supervised positions */
    double entropy, label_logprob, kept;
    int64_t *bin;                             /* [BINS] supervised positions by tail mass; NULL: this kind has no tail */
};

/* ---- identity ---- */

static void report_hash(struct report *r, const char *key, const char *label, const char *hash) { report_text(r, key, label, *hash ? hash : "not known"); }

/* Of a teacher that was rounded: how, and what that changed. */
static void report_precision(struct report *r, const struct shard_manifest *m)
{
    const struct precision_error *e = &m->error;
    report_text(r, "teacher_precision", "  precision", teacher_precision_name(m->precision));
    if (m->precision == PRECISION_NATIVE) return;
    if (m->native_first || m->native_last)
        report_line(r, "precision_native_blocks", json_pack("[i, i]", m->native_first, m->native_last), "  native blocks", "%d at the front, %d at the end", m->native_first, m->native_last);
    report_line(r, "precision_kl", json_real(e->kl), "  KL(native || it)", "%.3g nats per token, %.3g in the worst row", e->kl, e->kl_row_max);
    json_object_set_new(r->section, "precision_kl_row_max", json_real(e->kl_row_max));
    report_line(r, "precision_agreement", json_real(e->agreement), "  same first choice", "%.2f %%", 100 * e->agreement);
    report_line(r, "precision_label_difference", json_real(e->label_difference), "  log p(next token)", "differs by %.3g on average", e->label_difference);
    report_line(r, "precision_positions", json_integer(e->positions), "  measured on", "%lld positions of %lld rows", (long long)e->positions, (long long)e->rows);
    json_object_set_new(r->section, "precision_rows", json_integer(e->rows));
}

static void report_identity(struct report *r, const struct shard_dataset *d, const char *path)
{
    const struct shard_manifest *m = shard_dataset_manifest(d);
    json_t *list = json_array();
    char text[256] = "";
    report_section(r, "dataset", path);
    report_text(r, "id", "identity", shard_dataset_id(d));
    json_object_set_new(r->section, "k", json_integer(m->k));
    if (m->draws) json_object_set_new(r->section, "draws", json_integer(m->draws));
    if (m->kind == SHARD_FULL) report_text(r, "kind", "kind", shard_kind_name(m->kind));
    else if (m->kind == SHARD_HYBRID) report_line(r, "kind", json_string("hybrid"), "kind", "hybrid, the best %d per position and %d draws from the rest", m->k, m->draws);
    else if (m->kind == SHARD_SAMPLED) report_line(r, "kind", json_string("sampled"), "kind", "sampled, %d draws per position", m->draws);
    else report_line(r, "kind", json_string(shard_kind_name(m->kind)), "kind", "%s, %d per position", shard_kind_name(m->kind), m->k);
    for (int i = 0; i < m->n_temperatures; i++) {
        json_array_append_new(list, json_real(m->temperatures[i]));
        sprintf(text + strlen(text), "%s%.7g", i ? ", " : "", (double)m->temperatures[i]);
    }
    report_line(r, "temperatures", list, "temperatures", "%s", text);
    json_object_set_new(r->section, "teacher_vocab", json_integer(m->teacher_vocab));
    report_line(r, "valid_vocab", json_integer(m->valid_vocab), "valid ids", "%d of the teacher's %d columns", m->valid_vocab, m->teacher_vocab);
    report_text(r, "teacher_name", "teacher", m->teacher_name);
    report_precision(r, m);
    report_hash(r, "teacher_config_hash", "  hash of its config", m->teacher_config_hash);
    report_hash(r, "teacher_weights_hash", "  hash of its weights", m->teacher_weights_hash);
    report_hash(r, "tokenizer_hash", "hash of the tokenizer", m->tokenizer_hash);
    report_hash(r, "corpus_hash", "hash of the rows", m->corpus_hash);
    report_text(r, "packing", "packing", m->packing);
    report_int(r, "row_length", "row length", m->row_length);
    report_line(r, "seed", json_integer((json_int_t)m->seed), "seed", "%llu", (unsigned long long)m->seed);
}

/* Sealed so far, by the journal; shard -1: all. */
static void report_progress(struct report *r, const struct shard_dataset *d, int64_t shard)
{
    const struct shard_manifest *m = shard_dataset_manifest(d);
    const struct shard_entry *e;
    int64_t n = shard_dataset_entries(d, &e), rows = 0, tokens = 0, targets = 0, bytes = 0, sealed = 0;
    for (int64_t i = 0; i < n; i++) {
        if (shard >= 0 && e[i].shard != shard) continue;
        sealed++;
        rows += e[i].rows;
        tokens += e[i].tokens;
        targets += e[i].targets;
        bytes += e[i].bytes;
        if (shard >= 0) report_text(r, "sha256", "SHA-256", e[i].sha256);
    }
    if (shard >= 0) {
        report_line(r, "first_row", json_integer(shard_first_row(m, shard)), "rows", "%lld to %lld", (long long)shard_first_row(m, shard),
                    (long long)(shard_first_row(m, shard) + rows - 1));
        json_object_set_new(r->section, "rows", json_integer(rows));
    } else {
        json_object_set_new(r->section, "shards_sealed", json_integer(sealed));
        json_object_set_new(r->section, "rows_sealed", json_integer(rows));
        report_line(r, "shards", json_integer(shard_count(m)), "shards sealed", "%lld of %lld", (long long)sealed, (long long)shard_count(m));
        report_line(r, "rows", json_integer(m->rows), "rows sealed", "%lld of %lld", (long long)rows, (long long)m->rows);
    }
    report_int(r, "tokens", "tokens", tokens);
    report_line(r, "supervised", json_integer(targets), "supervised", tokens ? "%lld (%.1f %%)" : "%lld", (long long)targets,
                tokens ? 100.0 * (double)targets / (double)tokens : 0.0);
    report_line(r, "bytes", json_integer(bytes), "bytes", "%lld (%s)", (long long)bytes, bytes_text(bytes));
    if (tokens) report_line(r, "bytes_per_token", json_real((double)bytes / (double)tokens), "bytes per token", "%.1f, whole files", (double)bytes / (double)tokens);
}

/* ---- every row ---- */

static int64_t bin_of(float tail_mass)
{
    uint32_t bits;
    memcpy(&bits, &tail_mass, sizeof bits);
    int64_t bin = bits >> DROPPED_BITS;
    return bin < BINS ? bin : BINS - 1;
}

/* The middle of a bin's values; a tail of 0 is 0. */
static double bin_value(int64_t bin)
{
    uint32_t low = (uint32_t)bin << DROPPED_BITS, high = (uint32_t)(bin + 1) << DROPPED_BITS;
    float a, b;
    memcpy(&a, &low, sizeof a);
    memcpy(&b, &high, sizeof b);
    double value = bin ? 0.5 * ((double)a + b) : 0;
    return value < 1 ? value : 1;
}

static void survey_row(struct survey *s, const struct shard_manifest *m, const struct shard_row *row)
{
    int64_t L = m->row_length;
    s->rows++;
    for (int64_t t = 0; t < L; t++) {
        if (!row->loss_mask[t]) continue;
        s->supervised++;
        s->entropy += f16_to_float(row->entropy[t]);
        s->label_logprob += f16_to_float(row->label_logprob[t]);
        for (int i = 0; i < m->draws && row->draw_count[t * m->draws + i]; i++) s->different++;
        if (!s->bin) continue;
        float tail = row->tail[t * m->n_temperatures], mass = expf(tail);
        s->bin[bin_of(mass)]++;
        s->kept += -expm1(tail < 0 ? tail : 0);
    }
    /* pieces of documents that are learnt from: padding at the end has a number of its own and no supervised position */
    for (int64_t begin = 0, end; begin < L; begin = end) {
        bool learnt = false;
        for (end = begin; end < L && row->document[end] == row->document[begin]; end++) learnt |= row->loss_mask[end];
        s->documents += learnt;
    }
}

static double kept_percentile(const struct survey *s, double percent)
{
    int64_t rank = (int64_t)ceil(percent / 100 * (double)s->supervised), seen = 0;   /* nearest rank, from the least kept: the largest tails */
    if (rank < 1) rank = 1;
    for (int64_t b = BINS - 1; b >= 0; b--) if ((seen += s->bin[b]) >= rank) return 1 - bin_value(b);
    return 1;
}

static int survey_rows(struct report *r, struct shard_dataset *d, int64_t shard, struct survey *s)
{
    const struct shard_manifest *m = shard_dataset_manifest(d);
    const struct shard_entry *e;
    int64_t n = shard_dataset_entries(d, &e), done = 0;
    double shown = now_seconds();
    bool show = !r->json && isatty(STDOUT_FILENO);
    struct shard_row row;
    int rc = OK;
    shard_row_alloc(&row, m);
    for (int64_t i = 0; i < n; i++) {
        if (shard >= 0 && e[i].shard != shard) continue;
        for (int64_t j = 0; j < e[i].rows; j++) {
            TRY(shard_dataset_read(d, shard_first_row(m, e[i].shard) + j, &row));
            survey_row(s, m, &row);
            if (!show || now_seconds() - shown < 0.5) continue;
            shown = now_seconds();
            progress("  reading shard %lld of %lld", (long long)done + 1, (long long)(shard >= 0 ? 1 : n));
        }
        done++;
    }
out:
    if (show) progress_end();
    shard_row_free(&row);
    return rc;
}

static void report_survey(struct report *r, const struct shard_manifest *m, const struct survey *s)
{
    static const int percent[] = {1, 5, 25, 50, 75, 95, 99};
    report_section(r, "content", "content of the supervised positions");
    report_line(r, "rows_read", json_integer(s->rows), "rows read", "%lld, every CRC and range good", (long long)s->rows);
    report_int(r, "documents", "pieces of documents", s->documents);
    if (!s->supervised) return;
    double n = (double)s->supervised;
    if (s->bin) {
        json_t *j = json_object();
        char text[256] = "", key[8];
        for (size_t i = 0; i < sizeof percent / sizeof *percent; i++) {
            double kept = kept_percentile(s, percent[i]);
            snprintf(key, sizeof key, "p%d", percent[i]);
            json_object_set_new(j, key, json_real(kept));
            snprintf(text + strlen(text), sizeof text - strlen(text), "%s%s %.4f", i ? "  " : "", key, kept);
        }
        report_line(r, "kept_mass", j, "kept mass", "%s", text);
        report_line(r, "kept_mass_mean", json_real(s->kept / n), "  mean", "%.5f", s->kept / n);
    } else if (m->kind == SHARD_FULL) report_line(r, NULL, NULL, "kept mass", "all of it");
    if (m->draws) report_line(r, "different_ids_mean", json_real((double)s->different / n), "different ids", "%.2f of %d draws on average", (double)s->different / n, m->draws);
    report_line(r, "entropy_mean", json_real(s->entropy / n), "teacher's entropy", "%.4f nats on average", s->entropy / n);
    report_line(r, "label_logprob_mean", json_real(s->label_logprob / n), "its log p(next token)", "%.4f on average: perplexity %.4g", s->label_logprob / n,
                exp(-s->label_logprob / n));
}

/* ---- one row ---- */

static int open_names(struct tokenizer **names, const struct inspect_options *o, const struct shard_manifest *m)
{
    char hash[SHA256_HEX];
    if (!o->tokenizer) return OK;
    int rc = tokenizer_open(names, o->tokenizer);
    if (rc != OK || !*m->tokenizer_hash) return rc;
    tokenizer_hash(*names, hash);
    if (!strcmp(hash, m->tokenizer_hash)) return OK;
    return fail(ERR_MISMATCH, "tokenizer %s has hash %.16s, the dataset was dumped with %.16s: its texts would not be what the teacher read", o->tokenizer,
                hash, m->tokenizer_hash);
}

/* The token's text as it can be shown; NULL without a tokenizer or a token. malloc'd */
static char *text_of(const struct tokenizer *names, uint32_t id)
{
    size_t n;
    const char *bytes = names && id < (uint32_t)tokenizer_vocab_size(names) ? tokenizer_token_bytes(names, (int32_t)id, &n) : NULL;
    return bytes ? escaped(bytes, n) : NULL;
}

/* What a person sees for an id: its text in quotes, or the id. malloc'd */
static char *name_of(const struct tokenizer *names, uint32_t id)
{
    char *inner = text_of(names, id), *name = inner ? xasprintf("\"%s\"", inner) : xasprintf("%u", id);
    free(inner);
    return name;
}

static void set_text(json_t *o, const struct tokenizer *names, uint32_t id)
{
    char *text = text_of(names, id);
    if (text) json_object_set_new(o, "text", json_string(text));
    free(text);
}

struct choice { uint32_t id; float p; };

static int by_probability(const void *a, const void *b)
{
    const struct choice *x = a, *y = b;
    return x->p > y->p ? -1 : x->p < y->p ? 1 : x->id < y->id ? -1 : x->id > y->id;
}

/* The teacher's first `top` choices at position t, at T0. Returns how many there are. */
static int choices_at(const struct shard_manifest *m, const struct shard_row *row, int64_t t, int top, struct choice *out)
{
    int n = 0;
    if (shard_kind_has_head(m->kind)) {
        for (; n < top && n < m->k; n++) out[n] = (struct choice){row->head_ids[t * m->k + n], expf(f16_to_float(row->head_logprob[t * m->k + n]))};
        return n;
    }
    bool drawn = m->kind == SHARD_SAMPLED;                    /* then the shares of the draws stand for the probabilities */
    for (int64_t v = 0; v < (drawn ? m->draws : m->valid_vocab); v++) {            /* insertion into a short list: top is small */
        int64_t at = t * m->draws + v;
        if (drawn && !row->draw_count[at]) break;
        struct choice c = drawn ? (struct choice){row->draw_ids[at], (float)row->draw_count[at] / (float)m->draws}
                                : (struct choice){(uint32_t)v, expf(f16_to_float(row->logits[t * m->valid_vocab + v]) - row->lse[t * m->n_temperatures])};
        if (n == top && by_probability(&out[n - 1], &c) < 0) continue;
        int place = n < top ? n++ : n - 1;
        for (; place > 0 && by_probability(&c, &out[place - 1]) < 0; place--) out[place] = out[place - 1];
        out[place] = c;
    }
    return n;
}

static void print_padded(const char *text, int width)
{
    printf("%s%*s", text, width > display_width(text) ? width - display_width(text) : 0, "");
}

enum { NAME_WIDTH = 18 };

/* What was drawn from the tail: how often, and how likely it is. */
static void report_draws(struct report *r, json_t *position, const struct tokenizer *names, const struct shard_manifest *m, const struct shard_row *row, int64_t t)
{
    json_t *list = json_array();
    for (int64_t i = t * m->draws; i < (t + 1) * m->draws && row->draw_count[i]; i++) {
        char *name = name_of(names, row->draw_ids[i]);
        double p = exp(f16_to_float(row->draw_logprob[i]));
        json_t *c = json_pack("{s:I, s:i, s:f}", "id", (json_int_t)row->draw_ids[i], "count", (int)row->draw_count[i], "p", p);
        set_text(c, names, row->draw_ids[i]);
        json_array_append_new(list, c);
        if (!r->json) {
            printf("%s%s", i == t * m->draws ? "  drawn: " : "  ", name);
            if (row->draw_count[i] > 1) printf(" x%d", row->draw_count[i]);
            printf(" %.2g", p);
        }
        free(name);
    }
    json_object_set_new(position, "drawn", list);
}

static void report_position(struct report *r, json_t *list, const struct tokenizer *names, const struct shard_manifest *m, const struct shard_row *row,
                            int64_t t, int64_t position, int top)
{
    struct choice choice[SHARD_MAX_K];
    bool next = t + 1 < m->row_length && row->document[t + 1] == row->document[t];
    int n = choices_at(m, row, t, top, choice);
    double kept = shard_kind_has_head(m->kind) ? -expm1(fminf(row->tail[t * m->n_temperatures], 0)) : 1, entropy = f16_to_float(row->entropy[t]);
    char *token = name_of(names, row->tokens[t]), *after = next ? name_of(names, row->tokens[t + 1]) : xstrdup("-");
    json_t *j = json_pack("{s:I, s:i, s:I, s:I, s:b, s:f}", "index", (json_int_t)t, "document", (int)row->document[t], "position", (json_int_t)position,
                          "token", (json_int_t)row->tokens[t],
                          "supervised", row->loss_mask[t], "entropy", entropy), *top_list = json_array();
    if (m->kind != SHARD_SAMPLED) json_object_set_new(j, "kept_mass", json_real(kept));
    set_text(j, names, row->tokens[t]);
    if (next) {
        json_object_set_new(j, "next", json_integer(row->tokens[t + 1]));
        json_object_set_new(j, "next_logprob", json_real(f16_to_float(row->label_logprob[t])));
    }
    if (!r->json) {
        printf("%5lld %4u %5lld  ", (long long)t, row->document[t], (long long)position);
        print_padded(token, NAME_WIDTH);
        printf("  %s  ", row->loss_mask[t] ? "*" : " ");
        print_padded(after, NAME_WIDTH);
        if (next) printf("  %7.4f", (double)expf(f16_to_float(row->label_logprob[t]))); else printf("  %7s", "-");
        if (m->kind != SHARD_SAMPLED) printf("  %6.4f", kept); else printf("  %6s", "-");
        printf("  %6.3f  ", entropy);
    }
    for (int i = 0; i < n; i++) {
        char *name = name_of(names, choice[i].id);
        json_t *c = json_pack("{s:I, s:f}", "id", (json_int_t)choice[i].id, "p", (double)choice[i].p);
        set_text(c, names, choice[i].id);
        json_array_append_new(top_list, c);
        if (!r->json) printf("%s%s %.4f", i ? "  " : "", name, (double)choice[i].p);
        free(name);
    }
    if (m->kind == SHARD_HYBRID) report_draws(r, j, names, m, row, t);
    if (!r->json) putchar('\n');
    json_object_set_new(j, "top", top_list);
    json_array_append_new(list, j);
    free(token);
    free(after);
}

static int report_row(struct report *r, struct shard_dataset *d, const struct inspect_options *o)
{
    const struct shard_manifest *m = shard_dataset_manifest(d);
    struct tokenizer *names = NULL;             /* tokens as text; NULL: as ids */
    struct shard_row row;
    char title[64];
    int rc = OK;
    shard_row_alloc(&row, m);
    TRY(open_names(&names, o, m));
    TRY(shard_dataset_read(d, o->row, &row));
    snprintf(title, sizeof title, "row %lld, at temperature %g", (long long)o->row, (double)m->temperatures[0]);
    report_section(r, "row", title);
    json_object_set_new(r->section, "row", json_integer(o->row));
    json_t *list = json_array();
    json_object_set_new(r->section, "positions", list);
    if (!r->json) {
        printf("%5s %4s %5s  %-*s  *  %-*s  %7s  %6s  %6s  %s\n", "index", "doc", "pos", NAME_WIDTH, names ? "token" : "token id", NAME_WIDTH, "next",
               "p(next)", "kept", "nats",
               "the teacher's choices for the next token (* supervised)");
    }
    for (int64_t t = 0, begin = 0; t < m->row_length; t++) {
        if (t && row.document[t] != row.document[t - 1]) begin = t;
        report_position(r, list, names, m, &row, t, t - begin, o->top);
    }
out:
    tokenizer_close(names);
    shard_row_free(&row);
    return rc;
}

static int check_shard(const struct shard_dataset *d, const char *path, int64_t shard)
{
    const struct shard_manifest *m = shard_dataset_manifest(d);
    if (shard >= shard_count(m)) return fail(ERR_INPUT, "%s: the dataset has shards 0 to %lld, not %lld", path, (long long)(shard_count(m) - 1), (long long)shard);
    if (!shard_dataset_has(d, shard))
        return fail(ERR_INPUT, "%s: shard %lld is not in the journal: it was not finished; run teacher-dump again", path, (long long)shard);
    return OK;
}

static int check_row(const struct shard_dataset *d, const char *path, int64_t row, int64_t shard)
{
    const struct shard_manifest *m = shard_dataset_manifest(d);
    if (row >= m->rows) return fail(ERR_USAGE, "--row %lld: %s has rows 0 to %lld", (long long)row, path, (long long)(m->rows - 1));
    int64_t in = row / m->rows_per_shard;
    if (shard >= 0 && in != shard)
        return fail(ERR_USAGE, "--row %lld is in shard %lld; shard %lld has the dataset's rows %lld to %lld", (long long)row, (long long)in, (long long)shard,
                    (long long)shard_first_row(m, shard),
                    (long long)(shard_first_row(m, shard) + shard_rows(m, shard) - 1));
    return check_shard(d, path, in);
}

int inspect_dataset(struct report *r, const struct inspect_options *o, const char *path, int64_t shard)
{
    struct shard_dataset *d = NULL;
    struct survey s = {0};
    char *file = NULL;
    int rc = OK;
    TRY(shard_dataset_open(&d, path));
    if (shard >= 0) TRY(check_shard(d, path, shard));
    if (o->row >= 0) {
        TRY(check_row(d, path, o->row, shard));
        TRY(report_row(r, d, o));
        goto out;
    }
    report_identity(r, d, path);
    if (shard >= 0) {
        file = shard_dataset_path(d, shard);
        report_section(r, "shard", file);
    } else report_section(r, "sealed", "sealed shards");
    report_progress(r, d, shard);
    if (shard_kind_has_head(shard_dataset_manifest(d)->kind)) s.bin = xcalloc(BINS, sizeof *s.bin);
    TRY(survey_rows(r, d, shard, &s));
    report_survey(r, shard_dataset_manifest(d), &s);
out:
    free(file);
    free(s.bin);
    shard_dataset_close(d);
    return rc;
}
