/* distill inspect DATASET --rows A:B --jsonl: rows for scripts, one JSON object per line. What teacher-dump stored, at T0 where it has a temperature:
 * `ids` and `logprobs` are as distill import-logits takes them (entry t of logprobs: what the teacher expects at position t + 1). */
#include <math.h>
#include <stdio.h>

#include "base/error.h"
#include "base/half.h"
#include "data/shard.h"
#include "train/inspect.h"

/* JSON has no infinity: a tail that holds nothing is null. */
static json_t *number(double x) { return isfinite(x) ? json_real(x) : json_null(); }

static json_t *per_temperature(const float *values, int64_t t, int nT)
{
    json_t *list = json_array();
    for (int j = 0; j < nT; j++) json_array_append_new(list, number(values[t * nT + j]));
    return list;
}

/* [[id, log p], ...], most likely first; kind full: all ids in their order. */
static json_t *choices(const struct shard_manifest *m, const struct shard_row *row, int64_t t)
{
    json_t *list = json_array();
    if (row->head_ids)
        for (int64_t i = t * m->k; i < (t + 1) * m->k; i++) json_array_append_new(list, json_pack("[I, f]", (json_int_t)row->head_ids[i], (double)f16_to_float(row->head_logprob[i])));
    else if (row->logits)
        for (int64_t v = 0; v < m->valid_vocab; v++)
            json_array_append_new(list, json_pack("[I, f]", (json_int_t)v, (double)f16_to_float(row->logits[t * m->valid_vocab + v]) - row->lse[t * m->n_temperatures]));
    return list;
}

/* [[id, count, log p], ...] of kind hybrid, [[id, count], ...] of kind sampled: what was drawn, and how often of m or N. */
static json_t *draws(const struct shard_manifest *m, const struct shard_row *row, int64_t t)
{
    json_t *list = json_array();
    for (int64_t i = t * m->draws; i < (t + 1) * m->draws && row->draw_count[i]; i++) {
        json_t *draw = json_pack("[I, i]", (json_int_t)row->draw_ids[i], (int)row->draw_count[i]);
        if (row->draw_logprob) json_array_append_new(draw, json_real(f16_to_float(row->draw_logprob[i])));
        json_array_append_new(list, draw);
    }
    return list;
}

static json_t *row_to_json(const struct shard_manifest *m, const struct shard_row *row, int64_t number_of_row)
{
    json_t *ids = json_array(), *mask = json_array(), *document = json_array(), *lse = json_array(), *tail = json_array(), *entropy = json_array(), *label = json_array(), *logprobs = json_array(), *drawn = json_array();
    for (int64_t t = 0; t < m->row_length; t++) {
        json_array_append_new(ids, json_integer(row->tokens[t]));
        json_array_append_new(mask, json_integer(row->loss_mask[t]));
        json_array_append_new(document, json_integer(row->document[t]));
        json_array_append_new(lse, per_temperature(row->lse, t, m->n_temperatures));
        if (row->tail) json_array_append_new(tail, per_temperature(row->tail, t, m->n_temperatures));
        json_array_append_new(entropy, json_real(f16_to_float(row->entropy[t])));
        json_array_append_new(label, json_real(f16_to_float(row->label_logprob[t])));
        json_array_append_new(logprobs, choices(m, row, t));
        if (row->draw_ids) json_array_append_new(drawn, draws(m, row, t));
    }
    json_t *o = json_pack("{s:I, s:o, s:o, s:o, s:o, s:o, s:o}", "row", (json_int_t)number_of_row, "ids", ids, "loss_mask", mask, "document", document, "lse", lse, "entropy", entropy,
                          "label_logprob", label);
    if (row->tail) json_object_set(o, "tail", tail);
    if (row->head_ids || row->logits) json_object_set(o, "logprobs", logprobs);
    if (row->draw_ids) json_object_set(o, "draws", drawn);
    json_decref(tail);
    json_decref(logprobs);
    json_decref(drawn);
    return o;
}

int inspect_rows(const struct inspect_options *o)
{
    struct shard_dataset *d = NULL;
    struct shard_row row = {0};
    int rc = OK;
    TRY(shard_dataset_open(&d, o->path));
    const struct shard_manifest *m = shard_dataset_manifest(d);
    if (o->end_row > m->rows) { rc = fail(ERR_USAGE, "--rows %lld:%lld: %s has rows 0 to %lld", (long long)o->first_row, (long long)o->end_row, o->path, (long long)(m->rows - 1)); goto out; }
    shard_row_alloc(&row, m);
    for (int64_t r = o->first_row; r < o->end_row; r++) {
        TRY(shard_dataset_read(d, r, &row));
        json_t *line = row_to_json(m, &row, r);
        int failed = json_dumpf(line, stdout, JSON_COMPACT | JSON_REAL_PRECISION(9)) || putchar('\n') == EOF;
        json_decref(line);
        if (failed) { rc = fail(ERR_IO, "standard output: cannot be written"); goto out; }
    }
out:
    shard_row_free(&row);
    shard_dataset_close(d);
    return rc;
}
