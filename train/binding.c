/* See binding.h. */
#include "train/binding.h"

#include <string.h>

#include "base/error.h"
#include "base/file.h"

/* A token in a message: printable, short. */
static const char *shown(const struct tokenizer *t, int32_t id, char out[64])
{
    size_t n = 0, at = 0;
    const char *bytes = id < tokenizer_vocab_size(t) ? tokenizer_token_bytes(t, id, &n) : NULL;
    if (!bytes) return strcpy(out, "nothing");
    out[at++] = '"';
    for (size_t i = 0; i < n && at < 56; i++)
        at += (size_t)snprintf(out + at, 64 - at, (unsigned char)bytes[i] < 32 || (unsigned char)bytes[i] >= 127 ? "\\x%02x" : "%c", (unsigned char)bytes[i]);
    strcpy(out + at, "\"");
    return out;
}

/* The two tokenizers' first different id, where the teacher's directory still has the one that the shards were dumped with. malloc'd, maybe "". */
static char *first_difference(const struct shard_manifest *m, const struct config *c, const struct tokenizer *tokenizer)
{
    struct tokenizer *teacher = NULL;
    char hash[SHA256_HEX], a[64], b[64], *file = path_join(c->teacher_path, "tokenizer.json"), *text = NULL;
    int32_t id;
    if (*c->teacher_path && path_exists(file) && tokenizer_open(&teacher, c->teacher_path) == OK) {
        tokenizer_hash(teacher, hash);
        if (strcmp(hash, m->tokenizer_hash)) text = xstrdup("");
        else if (!tokenizer_same_vocab(tokenizer, teacher, &id)) text = xasprintf("; id %d is %s here and %s there", id, shown(tokenizer, id, a), shown(teacher, id, b));
        else if (tokenizer_vocab_size(tokenizer) != tokenizer_vocab_size(teacher))
            text = xasprintf("; it has %d ids, that one %d", tokenizer_vocab_size(tokenizer), tokenizer_vocab_size(teacher));
        else text = xstrdup("; every id is the same, but merges, normalizer, pre-tokenizer or flags are not");
    }
    tokenizer_close(teacher);
    free(file);
    return text ? text : xstrdup("");
}

static int check_tokenizer(const struct shard_manifest *m, const struct config *c, const struct student *s, const struct tokenizer *tokenizer)
{
    char hash[SHA256_HEX];
    int64_t V = s->config->vocab_size;
    if (V < m->valid_vocab)
        return fail(ERR_MISMATCH, "%s was dumped over %d valid ids, the student's head has %lld: give it the teacher's vocabulary", c->shards_path, m->valid_vocab, (long long)V);
    if (tokenizer && *m->tokenizer_hash) {
        tokenizer_hash(tokenizer, hash);
        if (strcmp(hash, m->tokenizer_hash)) {
            char *difference = first_difference(m, c, tokenizer);
            int rc = fail(ERR_MISMATCH, "tokenizer %s has hash %.16s, %s was dumped with %.16s%s: use the teacher's tokenizer", s->tokenizer_dir, hash, c->shards_path, m->tokenizer_hash, difference);
            free(difference);
            return rc;
        }
    }
    if (V == m->teacher_vocab) return OK;
    if (!tokenizer || !*m->tokenizer_hash)
        return fail(ERR_MISMATCH, "%s comes from a head of %d columns, the student's has %lld, and without the tokenizers of both nothing says that the %d valid ids mean the same: set tokenizer.path%s",
                    c->shards_path, m->teacher_vocab, (long long)V, m->valid_vocab, *m->tokenizer_hash ? "" : " and dump again with one");
    printf("vocabulary the teacher's head has %d columns, the student's %lld; the %d valid ids are the same, the other columns are masked\n", m->teacher_vocab, (long long)V, m->valid_vocab);
    return OK;
}

/* Keys of the dump may stand in the same file. One that was changed from its default and names another dataset is a mistake. */
static int check_keys(const struct shard_manifest *m, const struct config *c)
{
    struct config *normal = config_new();
    int rc = OK;
    if (strcmp(c->shards_kind, normal->shards_kind) && strcmp(c->shards_kind, shard_kind_name(m->kind)))
        rc = fail(ERR_MISMATCH, "shards.kind is %s, %s holds %s: point shards.path at the dataset you mean", c->shards_kind, c->shards_path, shard_kind_name(m->kind));
    else if (shard_kind_has_head(m->kind) && c->shards_k != normal->shards_k && c->shards_k != m->k)
        rc = fail(ERR_MISMATCH, "shards.k is %lld, %s holds the top %d: point shards.path at the dataset you mean", (long long)c->shards_k, c->shards_path, m->k);
    else if (m->kind == SHARD_HYBRID && c->shards_m != normal->shards_m && c->shards_m != m->draws)
        rc = fail(ERR_MISMATCH, "shards.m is %lld, %s holds %d draws: point shards.path at the dataset you mean", (long long)c->shards_m, c->shards_path, m->draws);
    else if (m->kind == SHARD_SAMPLED && c->shards_draws != normal->shards_draws && c->shards_draws != m->draws)
        rc = fail(ERR_MISMATCH, "shards.draws is %lld, %s holds %d draws: point shards.path at the dataset you mean", (long long)c->shards_draws, c->shards_path, m->draws);
    else if (strcmp(c->teacher_precision, normal->teacher_precision) && m->precision == PRECISION_NATIVE)
        rc = fail(ERR_MISMATCH, "teacher.precision is %s, %s was dumped with a teacher at its %s precision: point shards.path at the dataset you mean", c->teacher_precision, c->shards_path,
                  teacher_precision_name(m->precision));
    else if (m->precision == PRECISION_FP8 && ((c->teacher_fp8_native_first != normal->teacher_fp8_native_first && c->teacher_fp8_native_first != m->native_first) ||
                                               (c->teacher_fp8_native_last != normal->teacher_fp8_native_last && c->teacher_fp8_native_last != m->native_last)))
        rc = fail(ERR_MISMATCH, "teacher.fp8_native_first and fp8_native_last are %lld and %lld, the teacher of %s kept %d and %d blocks native: point shards.path at the dataset you mean",
                  (long long)c->teacher_fp8_native_first, (long long)c->teacher_fp8_native_last, c->shards_path, m->native_first, m->native_last);
    else if (c->corpus_row_length != normal->corpus_row_length && c->corpus_row_length != m->row_length)
        rc = fail(ERR_MISMATCH, "corpus.row_length is %lld, the rows of %s are %lld tokens long: a run takes its rows from the shards; point shards.path at the dataset you mean",
                  (long long)c->corpus_row_length, c->shards_path, (long long)m->row_length);
    config_free(normal);
    return rc;
}

int binding_check(const struct shard_manifest *m, const struct config *c, const struct student *s, const struct tokenizer *tokenizer)
{
    int rc = check_tokenizer(m, c, s, tokenizer);
    return rc == OK ? check_keys(m, c) : rc;
}
