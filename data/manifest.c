/* manifest.json and what follows from it: which fields a row has, how large a shard is, which rows it covers.
 *
 * The text is the identity of a dataset (its SHA-256 is the dataset id), so it holds nothing that changes between two runs of
 * the same job, and its last key is a CRC-32C of the bytes before it: a flipped bit is noticed before the first shard binds
 * the id. An unknown key is refused: it may change what the other keys mean. What was measured of a rounded teacher is part of the text too, but two
 * runs of one job may measure it differently in the last digits: who makes the manifest has measured it for all. Format: FORMAT.md.
 */
#include <math.h>
#include <string.h>

#include "base/failpoint.h"
#include "base/file.h"
#include "base/json.h"
#include "data/shard_internal.h"

#ifndef DISTILL_VERSION
#define DISTILL_VERSION "0.1.0"
#endif
#define CHECK_KEY ",\n  \"check\": \""

enum { MANIFEST_MAX_BYTES = 65536 };
static const int64_t SHARD_MAX_BYTES = (int64_t)1 << 40, MAX_ROWS = (int64_t)1 << 40, MAX_BLOCKS = 4096;
static const char *const kind_names[SHARD_KIND_COUNT] = {"topk", "full", "hybrid", "sampled"};

const char *shard_kind_name(enum shard_kind kind) { return kind_names[kind]; }
const char *teacher_precision_name(enum teacher_precision precision) { return precision == PRECISION_FP8 ? "fp8_e4m3" : "native"; }

/* ---- layout ---- */

void shard_layout(const struct shard_manifest *m, struct shard_layout *layout)
{
    int64_t L = m->row_length, K = m->k, D = m->draws, nT = m->n_temperatures;
    memset(layout, 0, SHARD_FIELDS * sizeof *layout);
    layout[SHARD_TOKENS]        = (struct shard_layout){"tokens", SHARD_U32, 2, {L, 1}, 0, 0};
    layout[SHARD_LOSS_MASK]     = (struct shard_layout){"loss_mask", SHARD_U8, 2, {L, 1}, 0, 0};
    layout[SHARD_DOCUMENT]      = (struct shard_layout){"document", SHARD_U16, 2, {L, 1}, 0, 0};
    layout[SHARD_LSE]           = (struct shard_layout){"lse", SHARD_F32, 3, {L, nT}, 0, 0};
    layout[SHARD_ENTROPY]       = (struct shard_layout){"entropy", SHARD_F16, 2, {L, 1}, 0, 0};
    layout[SHARD_LABEL_LOGPROB] = (struct shard_layout){"label_logprob", SHARD_F16, 2, {L, 1}, 0, 0};
    layout[SHARD_ROW_CRC]       = (struct shard_layout){"row_crc", SHARD_U32, 1, {1, 1}, 0, 0};
    if (shard_kind_has_head(m->kind)) {
        layout[SHARD_TAIL]         = (struct shard_layout){"tail", SHARD_F32, 3, {L, nT}, 0, 0};
        layout[SHARD_IDS_LOW]      = (struct shard_layout){"head_ids_low", SHARD_U16, 3, {L, K}, 0, 0};
        layout[SHARD_IDS_HIGH]     = (struct shard_layout){"head_ids_high", SHARD_U8, 3, {L, ids_high_bytes(K)}, 0, 0};
        layout[SHARD_HEAD_LOGPROB] = (struct shard_layout){"head_logprob", SHARD_F16, 3, {L, K}, 0, 0};
    }
    if (m->kind == SHARD_HYBRID) {
        layout[SHARD_DRAW_LOW]     = (struct shard_layout){"tail_ids_low", SHARD_U16, 3, {L, D}, 0, 0};
        layout[SHARD_DRAW_HIGH]    = (struct shard_layout){"tail_ids_high", SHARD_U8, 3, {L, ids_high_bytes(D)}, 0, 0};
        layout[SHARD_DRAW_COUNT]   = (struct shard_layout){"tail_count", SHARD_U8, 3, {L, D}, 0, 0};
        layout[SHARD_DRAW_LOGPROB] = (struct shard_layout){"tail_logprob", SHARD_F16, 3, {L, D}, 0, 0};
    }
    if (m->kind == SHARD_SAMPLED) {
        layout[SHARD_DRAW_OFFSET]  = (struct shard_layout){"sample_offset", SHARD_U32, 2, {L + 1, 1}, 0, 0};
        layout[SHARD_DRAW_LOW]     = (struct shard_layout){"sample_ids_low", SHARD_U16, 1, {1, 1}, 0, 1};
        layout[SHARD_DRAW_HIGH]    = (struct shard_layout){"sample_ids_high", SHARD_U8, 1, {1, 1}, 0, RAGGED_STEP};
        layout[SHARD_DRAW_COUNT]   = (struct shard_layout){"sample_count", SHARD_U8, 1, {1, 1}, 0, 1};
    }
    if (m->kind == SHARD_FULL) layout[SHARD_LOGITS] = (struct shard_layout){"logits", SHARD_F16, 3, {L, m->valid_vocab}, 0, 0};
    for (int f = 0; f < SHARD_FIELDS; f++)
        if (layout[f].name && !layout[f].ragged) layout[f].row_bytes = layout[f].dims[0] * layout[f].dims[1] * shard_type_bytes(layout[f].type);
}

/* Of all fields, with so many entries in a ragged one. */
static int64_t row_bytes(const struct shard_manifest *m, int64_t entries, int *fields)
{
    struct shard_layout layout[SHARD_FIELDS];
    int64_t bytes = 0;
    shard_layout(m, layout);
    *fields = 0;
    for (int f = 0; f < SHARD_FIELDS; f++) {
        bytes += layout[f].ragged ? entries / layout[f].ragged * shard_type_bytes(layout[f].type) : layout[f].row_bytes;
        *fields += layout[f].name != NULL;
    }
    return bytes;
}

int64_t shard_count(const struct shard_manifest *m) { return (m->rows + m->rows_per_shard - 1) / m->rows_per_shard; }
int64_t shard_first_row(const struct shard_manifest *m, int64_t shard) { return shard * m->rows_per_shard; }

int64_t shard_rows(const struct shard_manifest *m, int64_t shard)
{
    int64_t left = m->rows - shard_first_row(m, shard);
    return left < m->rows_per_shard ? left : m->rows_per_shard;
}

/* HDF5's own metadata are two pages, and every field may be padded to the next. */
size_t shard_bytes(const struct shard_manifest *m, int64_t shard)
{
    int fields;
    int64_t row = row_bytes(m, ragged_row_most(m), &fields);
    return (size_t)(shard_rows(m, shard) * row + (fields + 3) * SHARD_ALIGNMENT);
}

size_t shard_least_bytes(const struct shard_manifest *m, int64_t shard)
{
    int fields;
    return (size_t)(shard_rows(m, shard) * row_bytes(m, 0, &fields));
}

/* ---- checks ---- */

static bool hash_is_valid(const char *hex) { return !*hex || (strlen(hex) == SHA256_HEX - 1 && strspn(hex, "0123456789abcdef") == SHA256_HEX - 1); }

int manifest_check(const struct shard_manifest *m, const char *where, int status)
{
#define WITHIN(value, low, high, key) \
    if ((value) < (low) || (value) > (high)) return fail(status, "%s: %s is %lld, not in %lld .. %lld", where, key, (long long)(value), (long long)(low), (long long)(high))
    WITHIN(m->rows, 1, MAX_ROWS, "rows");
    WITHIN(m->row_length, 2, SHARD_MAX_LENGTH, "row_length");
    WITHIN(m->rows_per_shard, 1, m->rows, "rows_per_shard");
    if (shard_count(m) > SHARD_MAX_SHARDS)
        return fail(status, "%s: %lld rows in shards of %lld make more than %d shards; use larger shards", where, (long long)m->rows, (long long)m->rows_per_shard, SHARD_MAX_SHARDS);
    WITHIN(m->valid_vocab, 1, SHARD_MAX_VOCAB, "valid_vocab");
    WITHIN(m->teacher_vocab, m->valid_vocab, INT32_MAX, "teacher_vocab");
    int max_k = !shard_kind_has_head(m->kind) ? 0 : m->valid_vocab < SHARD_MAX_K ? m->valid_vocab : SHARD_MAX_K, draws = shard_kind_draws(m->kind);
    WITHIN(m->k, max_k ? 1 : 0, max_k, "k");
    WITHIN(m->draws, draws, draws ? SHARD_MAX_DRAWS : 0, m->kind == SHARD_SAMPLED ? "n" : "m");
    WITHIN(m->text_bytes, 0, INT64_MAX, "text_bytes");
    WITHIN(m->n_temperatures, 1, SHARD_MAX_TEMPERATURES, "number of temperatures");
    for (int i = 0; i < m->n_temperatures; i++) {
        if (!(m->temperatures[i] >= 1e-3f && m->temperatures[i] <= 1e4f)) return fail(status, "%s: temperature %g is not in 0.001 .. 10000", where, m->temperatures[i]);
        for (int j = 0; j < i; j++)
            if (m->temperatures[i] == m->temperatures[j]) return fail(status, "%s: temperature %g is listed twice", where, m->temperatures[i]);
    }
    if (m->kind == SHARD_SAMPLED && m->n_temperatures > 1)
        return fail(status, "%s: %d temperatures are listed, but draws serve only the one they are made at: kind sampled has one temperature; list one, or use kind hybrid, which serves every one listed", where, m->n_temperatures);
    if (m->kind == SHARD_SAMPLED && m->rows_per_shard > UINT32_MAX / ragged_row_most(m))
        return fail(status, "%s: %lld rows of %lld positions with %d draws can be more than 2^32 entries of a shard; use smaller shards", where, (long long)m->rows_per_shard, (long long)m->row_length, m->draws);
    int fields;
    int64_t row = row_bytes(m, ragged_row_most(m), &fields);
    if (m->rows_per_shard > SHARD_MAX_BYTES / row)
        return fail(status, "%s: %lld rows of %lld bytes make a shard of more than 2^40 bytes; use smaller shards", where, (long long)m->rows_per_shard, (long long)row);
    const struct precision_error *e = &m->error;
    if (m->precision == PRECISION_FP8) {
        WITHIN(m->native_first, 0, MAX_BLOCKS, "blocks of native_blocks");
        WITHIN(m->native_last, 0, MAX_BLOCKS, "blocks of native_blocks");
        WITHIN(e->rows, 1, MAX_ROWS, "rows of precision_error");
        WITHIN(e->positions, 1, INT64_MAX, "positions of precision_error");
        if (!(e->kl >= 0 && e->kl_row_max >= 0 && e->label_difference >= 0 && isfinite(e->kl + e->kl_row_max + e->label_difference)) || !(e->agreement >= 0 && e->agreement <= 1))
            return fail(status, "%s: precision_error holds a number that cannot be: KL %g, of a row %g, agreement %g, difference %g", where, e->kl, e->kl_row_max, e->agreement, e->label_difference);
    }
    const char *hashes[] = {m->teacher_config_hash, m->teacher_weights_hash, m->tokenizer_hash, m->corpus_hash};
    for (int i = 0; i < 4; i++)
        if (!hash_is_valid(hashes[i])) return fail(status, "%s: \"%s\" is not a SHA-256 in lower-case hex", where, hashes[i]);
    return OK;
#undef WITHIN
}

/* ---- text ---- */

/* The shortest decimal that reads back as this float, as a double: 0.7f is written 0.7, not 0.69999998807907104. */
static double decimal_of(float value)
{
    char text[32];
    for (int digits = 1; digits < 9; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, (double)value);
        if (strtof(text, NULL) == value) break;
        snprintf(text, sizeof text, "%.9g", (double)value);
    }
    return strtod(text, NULL);
}

enum { DUMP_FLAGS = JSON_ENCODE_ANY | JSON_REAL_PRECISION(9) };

/* The key of D; NULL: this kind does not draw, and a manifest of it has no such key. */
static const char *draws_key(enum shard_kind kind) { return kind == SHARD_HYBRID ? "m" : kind == SHARD_SAMPLED ? "n" : NULL; }

static json_t *native_blocks(const struct shard_manifest *m) { return json_pack("[i, i]", m->native_first, m->native_last); }

/* A measured number: more digits than it is worth are in nobody's way of reading it. */
static json_t *measured(double value)
{
    char text[32];
    snprintf(text, sizeof text, "%.6g", value);
    return json_real(strtod(text, NULL));
}

/* Every key but "check". NULL when a string is not UTF-8. */
static json_t *manifest_to_json(const struct shard_manifest *m)
{
    char seed[24];
    snprintf(seed, sizeof seed, "%llu", (unsigned long long)m->seed);
    json_t *temperatures = json_array();
    for (int i = 0; i < m->n_temperatures; i++) json_array_append_new(temperatures, json_real(decimal_of(m->temperatures[i])));
    json_t *o = json_pack("{s:s, s:i, s:s, s:s, s:I, s:I, s:I, s:i, s:o, s:i, s:i, s:s, s:s, s:s, s:s, s:s, s:s, s:s, s:I}",
                     "format", SHARD_FORMAT, "version", SHARD_VERSION, "tool", "distill " DISTILL_VERSION, "kind", kind_names[m->kind],
                     "rows", (json_int_t)m->rows, "row_length", (json_int_t)m->row_length, "rows_per_shard", (json_int_t)m->rows_per_shard,
                     "k", m->k, "temperatures", temperatures, "valid_vocab", (int)m->valid_vocab, "teacher_vocab", (int)m->teacher_vocab,
                     "seed", seed, "teacher_name", m->teacher_name, "teacher_config_hash", m->teacher_config_hash,
                     "teacher_weights_hash", m->teacher_weights_hash, "tokenizer_hash", m->tokenizer_hash, "corpus_hash", m->corpus_hash,
                     "packing", m->packing, "text_bytes", (json_int_t)m->text_bytes);
    if (o && draws_key(m->kind)) json_object_set_new(o, draws_key(m->kind), json_integer(m->draws));
    if (o && m->precision != PRECISION_NATIVE) {
        const struct precision_error *e = &m->error;
        json_object_set_new(o, "teacher_precision", json_string(teacher_precision_name(m->precision)));
        json_object_set_new(o, "precision_error", json_pack("{s:I, s:I, s:o, s:o, s:o, s:o}", "rows", (json_int_t)e->rows, "positions", (json_int_t)e->positions, "kl", measured(e->kl),
                            "kl_row_max", measured(e->kl_row_max), "top1_agreement", measured(e->agreement), "label_logprob_difference", measured(e->label_difference)));
        if (m->native_first || m->native_last) json_object_set_new(o, "native_blocks", native_blocks(m));
    }
    return o;
}

int manifest_write(const char *dir, const struct shard_manifest *m)
{
    int rc = OK;
    char *path = path_join(dir, "manifest.json"), *body = NULL, *text = NULL;
    json_t *o = manifest_to_json(m);
    if (!o) { rc = fail(ERR_USAGE, "%s: the teacher's name or the packing is not valid UTF-8; rename the teacher", path); goto out; }
    body = json_dumps(o, JSON_INDENT(2) | DUMP_FLAGS);
    CHECK(body && strlen(body) > 2, "manifest cannot be written as JSON");
    body[strlen(body) - 2] = 0;                              /* "\n}" comes after the check */
    text = xasprintf("%s" CHECK_KEY "%08x\"\n}\n", body, crc32c(0, body, strlen(body)));
    TRY(FAILPOINT("manifest.before"));
    /* Without locks two processes may come here at once. Of a native teacher they write the same bytes; else what the second one measured must not replace what shards of the first bind. */
    TRY((m->precision == PRECISION_NATIVE ? file_replace : file_create)(path, text, strlen(text)));
    TRY(FAILPOINT("manifest.after"));
out:
    json_decref(o);
    free(text);
    free(body);
    free(path);
    return rc;
}

static int get_int(const json_t *o, const char *key, const char *where, int64_t low, int64_t high, int64_t *value)
{
    const json_t *v = json_object_get(o, key);
    if (!v) return fail(ERR_INPUT, "%s: key \"%s\" is missing; " SHARD_REMEDY, where, key);
    if (!json_is_integer(v) || json_integer_value(v) < low || json_integer_value(v) > high)
        return fail(ERR_INPUT, "%s: key \"%s\" is not an integer in %lld .. %lld; " SHARD_REMEDY, where, key, (long long)low, (long long)high);
    *value = json_integer_value(v);
    return OK;
}

static int get_text(const json_t *o, const char *key, const char *where, char *text, size_t room)
{
    const json_t *v = json_object_get(o, key);
    if (!json_is_string(v) || json_string_length(v) >= room)
        return fail(ERR_INPUT, "%s: key \"%s\" is missing or not a string of fewer than %zu bytes; " SHARD_REMEDY, where, key, room);
    snprintf(text, room, "%s", json_string_value(v));
    return OK;
}

static int get_measured(const json_t *o, const char *key, const char *where, double *value)
{
    const json_t *v = json_object_get(o, key);
    *value = json_number_value(v);
    return json_is_number(v) ? OK : fail(ERR_INPUT, "%s: key \"%s\" of precision_error is missing or not a number; " SHARD_REMEDY, where, key);
}

/* Neither of the two keys, or both; with both perhaps native_blocks. */
static int precision_parse(const json_t *o, const char *where, struct shard_manifest *m)
{
    const json_t *precision = json_object_get(o, "teacher_precision"), *e = json_object_get(o, "precision_error");
    int rc = OK;
    if (!precision && !e) {
        if (json_object_get(o, "native_blocks")) rc = fail(ERR_INPUT, "%s: native_blocks are there and no teacher_precision; " SHARD_REMEDY, where);
        goto out;
    }
    m->precision = PRECISION_FP8;
    if (!json_is_string(precision) || strcmp(json_string_value(precision), teacher_precision_name(PRECISION_FP8))) {
        rc = fail(ERR_INPUT, "%s: teacher_precision is not \"%s\", and another is not known to format version %d: use a newer distill", where, teacher_precision_name(PRECISION_FP8), SHARD_VERSION);
        goto out;
    }
    if (json_object_size(e) != 6) { rc = fail(ERR_INPUT, "%s: precision_error is missing or no object of six numbers; " SHARD_REMEDY, where); goto out; }
    TRY(get_int(e, "rows", where, 1, MAX_ROWS, &m->error.rows));
    TRY(get_int(e, "positions", where, 1, INT64_MAX, &m->error.positions));
    TRY(get_measured(e, "kl", where, &m->error.kl));
    TRY(get_measured(e, "kl_row_max", where, &m->error.kl_row_max));
    TRY(get_measured(e, "top1_agreement", where, &m->error.agreement));
    TRY(get_measured(e, "label_logprob_difference", where, &m->error.label_difference));
    const json_t *native = json_object_get(o, "native_blocks"), *first = json_array_get(native, 0), *last = json_array_get(native, 1);
    if (!native) goto out;                                  /* none */
    if (json_array_size(native) != 2 || !json_is_integer(first) || !json_is_integer(last) || json_integer_value(first) < 0 || json_integer_value(first) > MAX_BLOCKS || json_integer_value(last) < 0 ||
        json_integer_value(last) > MAX_BLOCKS || json_integer_value(first) + json_integer_value(last) == 0) {
        rc = fail(ERR_INPUT, "%s: native_blocks is not a list of two numbers of blocks, not both 0; " SHARD_REMEDY, where);
        goto out;
    }
    m->native_first = (int)json_integer_value(first);
    m->native_last = (int)json_integer_value(last);
out:
    return rc;
}

static int members_parse(const json_t *o, const char *where, struct shard_manifest *m)
{
    static const char *const known[] = {"format", "version", "tool", "kind", "rows", "row_length", "rows_per_shard", "k", "temperatures", "valid_vocab",
                                        "teacher_vocab", "seed", "teacher_name", "teacher_config_hash", "teacher_weights_hash", "tokenizer_hash",
                                        "corpus_hash", "packing", "text_bytes", "teacher_precision", "precision_error", "native_blocks", "check"};
    int rc = OK;
    int64_t version = 0, k = 0, draws = 0, valid_vocab = 0, teacher_vocab = 0;
    char format[64], kind[32], tool[256], seed[24];
    TRY(get_text(o, "format", where, format, sizeof format));
    if (strcmp(format, SHARD_FORMAT)) { rc = fail(ERR_INPUT, "%s: format is \"%s\", not \"" SHARD_FORMAT "\"", where, format); goto out; }
    TRY(get_int(o, "version", where, 0, INT32_MAX, &version));
    if (version != SHARD_VERSION) { rc = fail(ERR_INPUT, "%s: format version %lld; this build reads version %d: use a newer distill", where, (long long)version, SHARD_VERSION); goto out; }
    TRY(get_text(o, "kind", where, kind, sizeof kind));
    for (m->kind = 0; m->kind < SHARD_KIND_COUNT && strcmp(kind, kind_names[m->kind]); m->kind++) {}
    if (m->kind == SHARD_KIND_COUNT) { rc = fail(ERR_INPUT, "%s: kind \"%s\" is not known to format version %d", where, kind, SHARD_VERSION); goto out; }
    const char *key, *drawn = draws_key(m->kind);
    json_t *value;
    json_object_foreach((json_t *)o, key, value) {
        size_t i = 0, n = sizeof known / sizeof *known;
        while (i < n && strcmp(key, known[i])) i++;
        if (i == n && !(drawn && !strcmp(key, drawn))) { rc = fail(ERR_INPUT, "%s: key \"%s\" is not known to format version %d: use a newer distill", where, key, SHARD_VERSION); goto out; }
    }
    TRY(get_text(o, "tool", where, tool, sizeof tool));
    TRY(get_int(o, "rows", where, 1, MAX_ROWS, &m->rows));
    TRY(get_int(o, "row_length", where, 2, SHARD_MAX_LENGTH, &m->row_length));
    TRY(get_int(o, "rows_per_shard", where, 1, MAX_ROWS, &m->rows_per_shard));
    TRY(get_int(o, "k", where, 0, SHARD_MAX_K, &k));
    if (drawn) TRY(get_int(o, drawn, where, 1, SHARD_MAX_DRAWS, &draws));
    TRY(get_int(o, "valid_vocab", where, 1, SHARD_MAX_VOCAB, &valid_vocab));
    TRY(get_int(o, "teacher_vocab", where, 1, INT32_MAX, &teacher_vocab));
    TRY(get_int(o, "text_bytes", where, 0, INT64_MAX, &m->text_bytes));
    m->k = (int)k;
    m->draws = (int)draws;
    m->valid_vocab = (int32_t)valid_vocab;
    m->teacher_vocab = (int32_t)teacher_vocab;
    TRY(get_text(o, "seed", where, seed, sizeof seed));
    char back[24];
    m->seed = strtoull(seed, NULL, 10);
    snprintf(back, sizeof back, "%llu", (unsigned long long)m->seed);
    if (strcmp(seed, back)) { rc = fail(ERR_INPUT, "%s: seed \"%s\" is not a number of 64 bits in decimal", where, seed); goto out; }
    TRY(get_text(o, "teacher_name", where, m->teacher_name, sizeof m->teacher_name));
    TRY(get_text(o, "teacher_config_hash", where, m->teacher_config_hash, SHA256_HEX));
    TRY(get_text(o, "teacher_weights_hash", where, m->teacher_weights_hash, SHA256_HEX));
    TRY(get_text(o, "tokenizer_hash", where, m->tokenizer_hash, SHA256_HEX));
    TRY(get_text(o, "corpus_hash", where, m->corpus_hash, SHA256_HEX));
    TRY(get_text(o, "packing", where, m->packing, sizeof m->packing));
    const json_t *list = json_object_get(o, "temperatures");
    if (!json_is_array(list) || json_array_size(list) < 1 || json_array_size(list) > SHARD_MAX_TEMPERATURES) {
        rc = fail(ERR_INPUT, "%s: key \"temperatures\" is not a list of 1 to %d numbers; " SHARD_REMEDY, where, SHARD_MAX_TEMPERATURES);
        goto out;
    }
    m->n_temperatures = (int)json_array_size(list);
    for (int i = 0; i < m->n_temperatures; i++) {
        double t = json_number_value(json_array_get(list, (size_t)i));     /* 0 when it is no number */
        m->temperatures[i] = t > 0 && t < 1e30 ? (float)t : 0;
    }
    TRY(precision_parse(o, where, m));
    TRY(manifest_check(m, where, ERR_INPUT));
out:
    return rc;
}

/* The check comes before JSON: what it covers is then the bytes, whatever they say. */
static int text_check(const char *text, size_t bytes, const char *where)
{
    enum { END = sizeof "00000000\"\n}\n" - 1, KEY = sizeof CHECK_KEY - 1 };
    char end[END + 1];
    size_t body = bytes - KEY - END;
    if (bytes >= KEY + END) {
        snprintf(end, sizeof end, "%08x\"\n}\n", crc32c(0, text, body));
        if (!memcmp(text + body, CHECK_KEY, KEY) && !memcmp(text + body + KEY, end, END)) return OK;
    }
    return fail(ERR_INPUT, "%s: its check does not match: the file was changed or damaged; " SHARD_REMEDY, where);
}

int manifest_parse(const char *text, size_t bytes, const char *where, struct shard_manifest *m)
{
    int rc = OK;
    json_t *o = NULL;
    *m = (struct shard_manifest){0};
    TRY(text_check(text, bytes, where));
    TRY(json_read_text(text, bytes, where, &o));
    if (!json_is_object(o)) { rc = fail(ERR_INPUT, "%s: is not a JSON object", where); goto out; }
    TRY(members_parse(o, where, m));
out:
    json_decref(o);
    return rc;
}

int manifest_read(const char *dir, struct shard_manifest *m, char id[SHA256_HEX])
{
    int rc = OK;
    char *path = path_join(dir, "manifest.json"), *text = NULL;
    size_t bytes;
    if (!path_exists(path)) { rc = fail(ERR_INPUT, "%s: is not a dataset of logit shards: it has no manifest.json; name the directory that teacher-dump wrote", dir); goto out; }
    TRY(file_read(path, MANIFEST_MAX_BYTES, &text, &bytes));
    TRY(manifest_parse(text, bytes, path, m));
    sha256_of(text, bytes, id);
out:
    free(text);
    free(path);
    return rc;
}

int shard_manifest_read(const char *dir, struct shard_manifest *m)
{
    char id[SHA256_HEX];
    return manifest_read(dir, m, id);
}

int manifest_same(const char *where, const struct shard_manifest *file, const struct shard_manifest *want)
{
    int rc = OK;
    json_t *a = manifest_to_json(file), *b = manifest_to_json(want), *value;
    const char *key;
    if (!b) { rc = fail(ERR_USAGE, "%s: the teacher's name or the packing is not valid UTF-8; rename the teacher", where); goto out; }
    json_object_set_new(a, "teacher_precision", json_string(teacher_precision_name(file->precision)));   /* here a native one has it too */
    json_object_set_new(b, "teacher_precision", json_string(teacher_precision_name(want->precision)));
    json_object_set_new(a, "native_blocks", native_blocks(file));
    json_object_set_new(b, "native_blocks", native_blocks(want));
    json_object_foreach(b, key, value) {
        const json_t *there = json_object_get(a, key);
        if (!strcmp(key, "teacher_name") || !strcmp(key, "precision_error") || json_equal(there, value)) continue;
        char *have = json_dumps(there, JSON_COMPACT | DUMP_FLAGS), *asked = json_dumps(value, JSON_COMPACT | DUMP_FLAGS);
        rc = fail(ERR_MISMATCH, "%s: was made with %s %s, this run has %s; go on with the settings it was made with or choose another directory", where, key, have, asked);
        free(have);
        free(asked);
        break;
    }
out:
    json_decref(a);
    json_decref(b);
    return rc;
}

int shard_manifest_fits(const char *dir, const struct shard_manifest *want)
{
    struct shard_manifest m;
    char *path = path_join(dir, "manifest.json");
    bool begun = path_exists(path);
    int rc = begun ? shard_manifest_read(dir, &m) : OK;
    free(path);
    return begun && rc == OK ? manifest_same(dir, &m, want) : rc;
}
