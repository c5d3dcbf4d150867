/* distill import-logits: log-probabilities that another program captured, as JSONL, into a dataset of kind topk.
 *
 * One document per line, in one of two shapes:
 *     {"ids": [t0, t1, ...], "logprobs": [[[id, lp], ...], ...]}             entry i of logprobs: what the teacher expects AFTER t0 .. ti, at token i + 1;
 *                                                                            as many entries as ids, or one fewer (nothing follows the last)
 *     {"prompt_token_ids": [t0, ...], "prompt_logprobs": [null, {"id": {"logprob": lp, ...}, ...}, ...]}
 *                                                                            as vLLM has it: entry i is what was expected AT token i, given t0 .. t(i-1); the first is null
 * so prompt_logprobs[i + 1] is logprobs[i]. The names of the ids are interchangeable; an entry of vLLM may be a bare number. A null anywhere is a position that was
 * not captured. `mask` (corpus.mask_field) marks learnt tokens with 1, as in a corpus of ids.
 *
 * A head has exactly K = shards.k entries: of more the K best are kept, with fewer the position is not learnt (and counted), for nothing may be said of an id
 * that nobody captured. Tail = 1 - sum over the head, in double from the values as given, before they are rounded to f16.
 * What such a capture does not say is stored so that it is true of logits that are log-probabilities themselves: lse = 0, at the one temperature of the
 * capture. entropy is that of head and tail as one outcome: a lower bound. label_logprob is an upper bound where the next token was not captured.
 *
 * Everything is read twice, so that nothing but the tokens is held in memory: once to check and to make the rows, once to fill the shards. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "base/file.h"
#include "base/half.h"
#include "base/json.h"
#include "data/packing.h"
#include "data/shard.h"
#include "train/command.h"
#include "train/load.h"
#include "train/progress.h"
#include "train/signals.h"
#include "train/student.h"

enum { MAX_LINE = 1 << 30, MAX_ENTRIES = SHARD_MAX_K + 64 };
struct entry { uint32_t id; double lp; };
struct inputs { const char **file; int n; };

struct import {
    const struct config *c;
    const struct inputs *inputs;
    struct tokenizer *tokenizer;
    int64_t Vv;
    int K;
    struct documents documents;
    struct corpus_rows *rows;
    /* the second reading: rows of a shard are filled one after the other */
    struct shard_writer *writer;
    const struct shard_manifest *m;
    struct shard_row row;
    int64_t at;                               /* positions done over all rows */
    int64_t positions, captured, fewest, short_ones, uncaptured; double kept;   /* supervised ones */
};

/* ---- one line ---- */

static int bad(const char *where, int64_t position, const char *what) { return fail(ERR_INPUT, "%s: position %lld: %s", where, (long long)position, what); }

static int by_lp(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;
    return x->lp != y->lp ? (x->lp < y->lp) - (x->lp > y->lp) : (x->id > y->id) - (x->id < y->id);
}

static int entry_add(const struct import *x, const char *where, int64_t position, double id, const json_t *lp, struct entry *e, int *n)
{
    if (!(id >= 0 && id < (double)x->Vv && id == floor(id))) return fail(ERR_INPUT, "%s: position %lld: id %.17g is not one of the %lld valid ids", where, (long long)position, id, (long long)x->Vv);
    if (!json_is_number(lp)) return bad(where, position, "a log-probability is no number");
    if (*n == MAX_ENTRIES) return fail(ERR_INPUT, "%s: position %lld: has more than %d entries", where, (long long)position, MAX_ENTRIES);
    double value = json_number_value(lp);
    if (!isfinite(value) || value > 1e-3) return fail(ERR_INPUT, "%s: position %lld: %g is no log-probability", where, (long long)position, value);
    e[(*n)++] = (struct entry){(uint32_t)id, value};
    return OK;
}

/* The entries of one position, most likely first. *n = -1: not captured. */
static int entries_read(const struct import *x, const char *where, int64_t position, const json_t *value, struct entry *e, int *n)
{
    int rc = OK;
    *n = -1;
    if (!value || json_is_null(value)) return OK;
    *n = 0;
    if (json_is_array(value)) {
        for (size_t i = 0; i < json_array_size(value); i++) {
            const json_t *pair = json_array_get(value, i);
            if (!json_is_array(pair) || json_array_size(pair) != 2 || !json_is_integer(json_array_get(pair, 0))) return bad(where, position, "an entry is not [id, log-probability]");
            TRY(entry_add(x, where, position, (double)json_integer_value(json_array_get(pair, 0)), json_array_get(pair, 1), e, n));
        }
    } else if (json_is_object(value)) {
        const char *key;
        json_t *item;
        json_object_foreach((json_t *)value, key, item) {
            char *end;
            double id = strtod(key, &end);
            if (end == key || *end || strspn(key, "0123456789") != strlen(key)) return bad(where, position, "the key of an entry is not a token id");
            TRY(entry_add(x, where, position, id, json_is_object(item) ? json_object_get(item, "logprob") : item, e, n));
        }
    } else return bad(where, position, "is neither a list, an object nor null");
    qsort(e, (size_t)*n, sizeof *e, by_lp);
    double sum = 0, slack = 2e-4;                             /* and what bf16, the coarsest that captures are stored in, does to each p: p |log p| 2^-9 */
    for (int i = *n - 1; i >= 0; i--) {                       /* the small ones first */
        double p = exp(e[i].lp);
        sum += p;
        slack += p * fabs(e[i].lp) / 512;
    }
    if (sum > 1 + slack) return fail(ERR_INPUT, "%s: position %lld: the probabilities add up to %.6f: they are not log-probabilities of one distribution", where, (long long)position, sum);
    for (int i = 1; i < *n; i++)                              /* quadratic, and the lists are short */
        for (int j = 0; j < i; j++)
            if (e[i].id == e[j].id) return fail(ERR_INPUT, "%s: position %lld: id %u is there twice", where, (long long)position, e[i].id);
out:
    return rc;
}

struct capture {                              /* a document as read */
    const json_t *ids, *logprobs, *mask;
    int64_t n;
    int shift;                                /* logprobs[t + shift] belongs to position t */
};

static int capture_read(const struct import *x, const char *where, const json_t *o, struct capture *d)
{
    *d = (struct capture){.ids = json_object_get(o, "ids"), .logprobs = json_object_get(o, "logprobs"), .mask = json_object_get(o, x->c->corpus_mask_field)};
    if (!d->ids) d->ids = json_object_get(o, "prompt_token_ids");
    if (!d->logprobs) {
        d->logprobs = json_object_get(o, "prompt_logprobs");
        d->shift = 1;
    }
    if (!json_is_array(d->ids) || !json_is_array(d->logprobs)) return fail(ERR_INPUT, "%s: has no lists ids and logprobs (or prompt_token_ids and prompt_logprobs)", where);
    d->n = (int64_t)json_array_size(d->ids);
    int64_t n = (int64_t)json_array_size(d->logprobs);
    if (d->shift ? n != d->n : n != d->n && n != d->n - 1)
        return fail(ERR_INPUT, "%s: has %lld ids and %lld lists of log-probabilities: %s", where, (long long)d->n, (long long)n, d->shift ? "prompt_logprobs has one for every token" : "one for every token, or one fewer");
    if (d->shift && n && !json_is_null(json_array_get(d->logprobs, 0))) return fail(ERR_INPUT, "%s: the first of prompt_logprobs is not null: nothing can be expected at the first token", where);
    if (d->mask && (!json_is_array(d->mask) || (int64_t)json_array_size(d->mask) != d->n)) return fail(ERR_INPUT, "%s: %s is not a list as long as the ids", where, x->c->corpus_mask_field);
    for (int64_t i = 0; i < d->n; i++) {
        const json_t *id = json_array_get(d->ids, (size_t)i), *mask = d->mask ? json_array_get(d->mask, (size_t)i) : NULL;
        if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) >= x->Vv) return fail(ERR_INPUT, "%s: id %lld of the text is not one of the %lld valid ids", where, (long long)i, (long long)x->Vv);
        if (d->mask && (!json_is_integer(mask) || (json_integer_value(mask) != 0 && json_integer_value(mask) != 1))) return fail(ERR_INPUT, "%s: %s is not 0 or 1 at %lld", where, x->c->corpus_mask_field, (long long)i);
    }
    return OK;
}

/* Calls `each` for every line of every file. */
static int each_capture(struct import *x, int (*each)(struct import *, const char *where, const struct capture *))
{
    int rc = OK;
    FILE *f = NULL;
    char *line = NULL, *where = NULL;
    size_t room = 0;
    json_t *o = NULL;
    for (int i = 0; i < x->inputs->n; i++) {
        const char *path = x->inputs->file[i];
        f = fopen(path, "r");
        if (!f) { rc = fail_errno(ERR_IO, "%s: cannot open", path); goto out; }
        ssize_t n;
        for (int64_t number = 1; (n = getline(&line, &room, f)) >= 0; number++) {
            struct capture d;
            if (stop_requested) { rc = fail(ERR_STOPPED, "stopped by a signal; run the command again to go on"); goto out; }
            if (n > MAX_LINE) { rc = fail(ERR_INPUT, "%s:%lld: is longer than 2^30 bytes", path, (long long)number); goto out; }
            if (line[strspn(line, " \t\r\n")] == 0) continue;
            free(where);
            where = xasprintf("%s:%lld", path, (long long)number);
            TRY(json_read_text(line, (size_t)n, where, &o));
            if (!json_is_object(o)) { rc = fail(ERR_INPUT, "%s: is not a JSON object", where); goto out; }
            TRY(capture_read(x, where, o, &d));
            TRY(each(x, where, &d));
            json_decref(o);
            o = NULL;
        }
        if (ferror(f)) { rc = fail_errno(ERR_IO, "%s: cannot read", path); goto out; }
        fclose(f);
        f = NULL;
    }
out:
    json_decref(o);
    if (f) fclose(f);
    free(line);
    free(where);
    return rc;
}

/* ---- first reading: tokens, and which positions can be learnt ---- */

static int first_reading(struct import *x, const char *where, const struct capture *d)
{
    int rc = OK;
    struct entry e[MAX_ENTRIES];
    int n;
    int32_t *ids = xmalloc((size_t)(d->n + 1) * sizeof *ids);
    uint8_t *mask = xcalloc((size_t)d->n + 1, 1);
    for (int64_t i = 0; i < d->n; i++) {
        ids[i] = (int32_t)json_integer_value(json_array_get(d->ids, (size_t)i));
        bool learnt = !d->mask || json_integer_value(json_array_get(d->mask, (size_t)i));
        if (i == 0) { mask[0] = learnt; continue; }
        TRY(entries_read(x, where, i - 1 + d->shift, json_array_get(d->logprobs, (size_t)(i - 1 + d->shift)), e, &n));
        mask[i] = learnt && n >= x->K;
        if (!learnt) continue;
        x->positions++;
        x->uncaptured += n < 0;
        x->short_ones += n >= 0 && n < x->K;
        if (n >= 0 && (x->fewest < 0 || n < x->fewest)) x->fewest = n;
    }
    if (!d->shift && (int64_t)json_array_size(d->logprobs) == d->n && d->n) TRY(entries_read(x, where, d->n - 1, json_array_get(d->logprobs, (size_t)(d->n - 1)), e, &n));   /* checked, not used */
    if (d->n) documents_add(&x->documents, ids, mask, &(struct document){.n = d->n});
out:
    free(ids);
    free(mask);
    return rc;
}

/* ---- second reading: targets ---- */

/* Position t of the current row from `n` entries; the label is -1 where nothing follows. */
static void position_fill(struct import *x, int64_t t, struct entry *e, int n, int64_t label)
{
    int K = x->K;
    double sum = 0, entropy = 0, label_lp = 0;
    for (int i = K - 1; i >= 0; i--) sum += exp(e[i].lp);
    double shift = sum > 1 ? log(sum) : 0;                    /* rounded captures of a head that holds everything */
    double tail = shift > 0 ? 0 : 1 - sum, noise = 0;
    for (int i = 0; i < K; i++) noise += exp(e[i].lp) * fabs(e[i].lp) * 0x1p-24;
    if (tail < noise + 1e-9) tail = 0;                        /* less than the rounding of fp32 captures can tell from nothing */
    for (int i = 0; i < K; i++) {
        double lp = fmin(e[i].lp - shift, 0);
        x->row.head_ids[t * K + i] = e[i].id;
        x->row.head_logprob[t * K + i] = f16_from_float((float)fmax(lp, -65504));
        entropy -= exp(lp) * lp;
    }
    if (tail > 0) entropy -= tail * log(tail);
    if (label >= 0) {
        bool found = false;
        for (int i = 0; i < n && !found; i++)
            if (e[i].id == (uint32_t)label) { label_lp = fmin(e[i].lp - shift, 0); found = true; }
        if (!found) label_lp = tail > 0 ? fmin(e[K - 1].lp, log(tail)) : e[K - 1].lp;   /* no more than the least of the K, and than all that is left */
    }
    x->row.lse[t] = 0;
    x->row.tail[t] = tail > 0 ? (float)log(tail) : -INFINITY;
    x->row.entropy[t] = f16_from_float((float)fmax(entropy, 0));
    x->row.label_logprob[t] = label >= 0 ? f16_from_float((float)fmax(label_lp, -65504)) : 0;
    x->kept += 1 - tail;
    x->captured++;
}

/* A position that is not learnt: zeros, and ids that are different although nobody asks. */
static void position_clear(struct import *x, int64_t t)
{
    memset(x->row.head_logprob + t * x->K, 0, (size_t)x->K * 2);
    memset(x->row.head_ids + t * x->K, 0, (size_t)x->K * 4);
    x->row.lse[t] = 0;
    x->row.tail[t] = -INFINITY;
    x->row.entropy[t] = x->row.label_logprob[t] = 0;
}

/* The position at x->at is filled; when its row is full it goes to the shard that has it. */
static int position_done(struct import *x)
{
    int rc = OK;
    int64_t L = x->rows->length, row = x->at / L, shard = row / x->m->rows_per_shard;
    if (++x->at % L) return OK;
    if (row == shard_first_row(x->m, shard) && shard_writer_next_shard(x->writer) == shard) TRY(shard_writer_begin(x->writer, shard));
    if (shard_writer_next_shard(x->writer) != shard) goto out;    /* sealed by a run before */
    x->row.tokens = x->rows->tokens + row * L;
    x->row.loss_mask = x->rows->loss_mask + row * L;
    x->row.document = x->rows->document + row * L;
    TRY(shard_writer_put(x->writer, &x->row));
    if (row + 1 == shard_first_row(x->m, shard) + shard_rows(x->m, shard)) TRY(shard_writer_seal(x->writer));
    progress("rows %lld/%lld", (long long)(row + 1), (long long)x->rows->rows);
out:
    return rc;
}

static int second_reading(struct import *x, const char *where, const struct capture *d)
{
    int rc = OK;
    struct entry e[MAX_ENTRIES];
    int n;
    int64_t L = x->rows->length;
    for (int64_t i = 0; i < d->n && x->at < x->rows->rows * L; i++) {
        int64_t t = x->at % L;
        if (!x->rows->loss_mask[x->at]) position_clear(x, t);
        else {
            TRY(entries_read(x, where, i + d->shift, json_array_get(d->logprobs, (size_t)(i + d->shift)), e, &n));
            if (n < x->K) { rc = fail(ERR_INPUT, "%s: changed while it was read", where); goto out; }
            position_fill(x, t, e, n, x->rows->tokens[x->at + 1]);
        }
        TRY(position_done(x));
    }
out:
    return rc;
}

/* ---- the command ---- */

static int open_vocabulary(struct import *x, struct shard_manifest *m)
{
    const struct config *c = x->c;
    struct model_config *teacher = NULL;
    int rc = OK;
    char *dir = find_tokenizer_dir(c, (const char *const[]){c->teacher_path, NULL});
    if (dir) TRY(tokenizer_open(&x->tokenizer, dir));
    if (*c->teacher_path) TRY(model_config_read(&teacher, c->teacher_path));
    if (!x->tokenizer && !teacher) { rc = fail(ERR_USAGE, "neither tokenizer.path nor teacher.path is set: the ids cannot be checked against a vocabulary"); goto out; }
    m->teacher_vocab = (int32_t)(teacher ? teacher->vocab_size : tokenizer_vocab_size(x->tokenizer));
    x->Vv = teacher ? valid_vocab(teacher, x->tokenizer) : m->teacher_vocab;
    m->valid_vocab = (int32_t)x->Vv;
    if (teacher) model_config_hash(teacher, m->teacher_config_hash);
    if (x->tokenizer) tokenizer_hash(x->tokenizer, m->tokenizer_hash);
out:
    model_config_free(teacher);
    free(dir);
    return rc;
}

static int run(struct import *x)
{
    const struct config *c = x->c;
    struct shard_manifest m = {.kind = SHARD_TOPK, .row_length = c->corpus_row_length, .k = (int)c->shards_k, .n_temperatures = 1, .seed = (uint64_t)c->run_seed};
    int rc = OK;
    int64_t *order = NULL;
    if (c->shards_temperatures.n != 1) { rc = fail(ERR_USAGE, "shards.temperatures lists %d values: log-probabilities are known at the one temperature they were captured at", c->shards_temperatures.n); goto out; }
    m.temperatures[0] = (float)c->shards_temperatures.item[0];
    TRY(open_vocabulary(x, &m));
    x->K = (int)c->shards_k;
    if (x->K > x->Vv) { rc = fail(ERR_USAGE, "shards.k is %d, but there are only %lld valid ids", x->K, (long long)x->Vv); goto out; }
    x->fewest = -1;
    TRY(each_capture(x, first_reading));
    printf("capture   %lld documents, %lld positions; %lld were not captured, %lld have fewer than %d entries and are not learnt (the fewest: %lld)\n", (long long)x->documents.n,
           (long long)x->positions, (long long)x->uncaptured, (long long)x->short_ones, x->K, (long long)(x->fewest < 0 ? 0 : x->fewest));
    if (x->uncaptured + x->short_ones == x->positions) { rc = fail(ERR_INPUT, "no position has %d entries (shards.k): set shards.k to what the capture has, at most %lld", x->K, (long long)x->fewest); goto out; }
    order = xmalloc((size_t)x->documents.n * sizeof *order);
    for (int64_t i = 0; i < x->documents.n; i++) order[i] = i;
    int32_t padding = x->tokenizer ? tokenizer_pad(x->tokenizer) >= 0 ? tokenizer_pad(x->tokenizer) : tokenizer_eos(x->tokenizer) : 0;
    x->rows = rows_pack(&x->documents, order, x->documents.n, c->corpus_row_length, c->corpus_max_rows, padding >= 0 && padding < x->Vv ? (uint32_t)padding : 0, NULL, 0);
    documents_clear(&x->documents);
    m.rows = x->rows->rows;
    m.rows_per_shard = c->shards_rows_per_shard < m.rows ? c->shards_rows_per_shard : m.rows;
    corpus_rows_hash(x->rows, m.corpus_hash);
    snprintf(m.packing, sizeof m.packing, "imported log-probabilities, lse 0; documents end to end in rows of %lld in the order of the files", (long long)m.row_length);
    snprintf(m.teacher_name, sizeof m.teacher_name, "%s", *c->teacher_path ? c->teacher_path : "imported");
    TRY(shard_writer_open(&x->writer, c->shards_path, &m));
    x->m = &m;
    shard_row_alloc(&x->row, &m);
    free(x->row.tokens); free(x->row.loss_mask); free(x->row.document);
    x->row.tokens = NULL; x->row.loss_mask = NULL; x->row.document = NULL;
    if (shard_writer_next_shard(x->writer) < shard_count(&m)) TRY(each_capture(x, second_reading));
    while (x->at < m.rows * m.row_length) {                   /* the padding of the last row */
        position_clear(x, x->at % m.row_length);
        TRY(position_done(x));
    }
    progress_end();
    printf("done      %lld rows of %lld in %lld shards", (long long)m.rows, (long long)m.row_length, (long long)shard_count(&m));
    if (x->captured) printf(", the top %d keep %.4f of the mass on average", x->K, x->kept / (double)x->captured);
    putchar('\n');
out:
    progress_end();
    free(order);
    x->row.tokens = NULL; x->row.loss_mask = NULL; x->row.document = NULL;
    shard_row_free(&x->row);
    shard_writer_close(x->writer);
    corpus_rows_free(x->rows);
    documents_clear(&x->documents);
    tokenizer_close(x->tokenizer);
    return rc;
}

static int take_flag(void *context, int argc, char **argv, int *i)
{
    struct inputs *in = context;
    if (strcmp(argv[*i], "--input")) return 0;
    in->n = 0;                                                /* the command line is gone through twice */
    in->file = xrealloc(in->file, (size_t)argc * sizeof *in->file);
    while (*i + 1 < argc && argv[*i + 1][0] != '-') in->file[in->n++] = argv[++*i];
    return 1;
}

int command_import_logits(int argc, char **argv)
{
    struct config *c = NULL;
    struct inputs inputs = {0};
    struct import x = {.inputs = &inputs};
    int help, rc = OK;
    TRY(command_config(argc, argv, CMD_IMPORT_LOGITS, "Makes a dataset of kind topk from log-probabilities that another program captured: a JSON object per line, {\"ids\": [...],\n"
                       "\"logprobs\": [[[id, logprob], ...], ...]} (entry i: what is expected after token i) or vLLM's prompt_token_ids and prompt_logprobs.",
                       "distill import-logits config.yaml --input capture.jsonl", take_flag, &inputs, "  --input FILE...   the captures, in this order\n", &c, &help));
    if (help) goto out;
    if (!inputs.n) { rc = fail(ERR_USAGE, "no capture given: --input FILE.jsonl ..."); goto out; }
    x.c = c;
    signals_install();
    rc = run(&x);
out:
    free(inputs.file);
    config_free(c);
    return rc;
}
