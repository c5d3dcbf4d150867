/* See dump_error.h. */
#include "train/dump_error.h"

#include <math.h>

#include "base/error.h"
#include "base/rng.h"

enum { CHUNK = 256, FFN_POSITIONS = 8192, CHOICE_STREAM = 29 };

struct dump_error {
    const struct corpus_rows *rows;
    int64_t n, *row;                /* which of them */
    char *hidden; size_t width;     /* [n, L, C] of the teacher without the rounding, as the device stores them; bytes per position */
};

void dump_error_plan(struct error_room *room, const struct model *m, struct memory_plan *plan)
{
    size_t act_width = dtype_width(m->be->act_dtype);
    room->chunk = m->o.head_rows < CHUNK ? m->o.head_rows : CHUNK;
    memory_add(plan, "measuring the error", "dump.chunk_tokens", &room->hidden, (size_t)(room->chunk * m->c->hidden_size) * act_width);
    memory_add(plan, "measuring the error", "dump.chunk_tokens", &room->logits, (size_t)(room->chunk * m->c->vocab_size) * act_width);
    memory_add(plan, "measuring the error", "dump.chunk_tokens", &room->rows, (size_t)room->chunk * sizeof *room->rows);
}

static bool is_learnt(const struct corpus_rows *rows, int64_t row)
{
    for (int64_t t = 0; t < rows->length; t++) if (rows->loss_mask[row * rows->length + t]) return true;
    return false;
}

int dump_error_new(struct dump_error **out, const struct corpus_rows *rows, int64_t n, uint64_t seed)
{
    int64_t learnt = 0, *from = xmalloc((size_t)(rows->rows + 1) * sizeof *from);
    for (int64_t r = 0; r < rows->rows; r++) if (is_learnt(rows, r)) from[learnt++] = r;
    if (!learnt) {
        free(from);
        return fail(ERR_INPUT, "no position of the rows for training is supervised: there is nothing to dump and nothing to measure the error of teacher.precision fp8 on");
    }
    struct dump_error *e = xcalloc(1, sizeof *e);
    e->rows = rows;
    e->n = n < learnt ? n : learnt;
    e->row = xmalloc((size_t)e->n * sizeof *e->row);
    for (int64_t i = 0; i < e->n; i++) {                     /* one of every n-th part of the corpus */
        int64_t begin = learnt * i / e->n, end = learnt * (i + 1) / e->n;
        struct philox r = philox4x32(seed, CHOICE_STREAM, (uint64_t)i);
        e->row[i] = from[begin + (int64_t)((((uint64_t)r.v[0] << 32) | r.v[1]) % (uint64_t)(end - begin))];
    }
    free(from);
    *out = e;
    return OK;
}

void dump_error_free(struct dump_error *e)
{
    if (!e) return;
    free(e->hidden);
    free(e->row);
    free(e);
}

/* Rows [first, first + n) of those that were chosen. */
static void set_batch(const struct dump_error *e, struct batch *b, int64_t first, int64_t n, struct model *m)
{
    int64_t L = e->rows->length;
    b->rows = n;
    for (int64_t i = 0; i < n; i++) {
        int64_t at = e->row[first + i] * L;
        batch_set_row(b, i, e->rows->tokens + at, e->rows->loss_mask + at, e->rows->document + at);
    }
    batch_finish(b);
    model_set_batch(m, b);
}

int dump_error_native(struct dump_error *e, struct backend *be, const struct model_files *files, size_t memory_limit)
{
    int64_t N = e->n * e->rows->length;
    struct model_options o = {.N = N, .max_doc = e->rows->length, .head_rows = 1, .ffn_rows = N < FFN_POSITIONS ? N : FFN_POSITIONS, .mapped = true};
    size_t scratch_bytes = be->scratch_bytes;                /* what another plan asked for */
    struct memory_plan *plan = memory_plan_new(be);
    struct model *m = model_new(be, files->config, &o, plan);
    struct batch *b = NULL;
    int rc = OK;
    memory_add_scratch(plan, model_scratch_bytes(m, 0));
    rc = memory_commit(plan, memory_limit);
    if (rc != OK) { fail_in(rc, "measuring the error of fp8 on %lld rows in one pass (lower dump.error_rows)", (long long)e->n); goto out; }
    b = batch_new(e->n, e->rows->length, NULL, false);
    model_ready(m);
    TRY(model_files_load(files, m));
    set_batch(e, b, 0, e->n, m);
    model_forward(m);
    TRY(m->read_status);
    e->width = (size_t)files->config->hidden_size * dtype_width(be->act_dtype);
    e->hidden = xmalloc((size_t)N * e->width);
    be->ops->download(be, e->hidden, m->hidden, (size_t)N * e->width);
out:
    batch_free(b);
    model_free(m);
    memory_plan_free(plan);
    be->scratch = NULL;
    be->scratch_bytes = scratch_bytes;
    return rc;
}

struct sums { double kl, row_kl, row_most, label; int64_t n, row_n, rows, agree; };     /* rows: those with a position that was measured */

/* A row has ended: its mean is of interest too. */
static void end_row(struct sums *s)
{
    if (s->row_n) { s->rows++; s->row_most = fmax(s->row_most, s->row_kl / (double)s->row_n); }
    s->row_kl = 0;
    s->row_n = 0;
}

/* `row` and `position`: of the corpus; where: the teacher's directory. For messages. */
static int add(struct sums *s, const struct eval_row *r, bool quarantine, int64_t row, int64_t position, const char *where)
{
    if (!r->counted) return OK;
    if (!isfinite(r->teacher_logprob)) {
        if (quarantine) return OK;
        return fail(ERR_NUMERIC, "row %lld, position %lld: the teacher's logits are not finite; check the model with distill inspect %s, or let such positions be set aside with --quarantine",
                    (long long)row, (long long)position, where);
    }
    if (!isfinite(r->student_logprob + r->forward_kl))
        return fail(ERR_NUMERIC, "row %lld, position %lld: the logits of %s are finite at its own precision and not in fp8: set teacher.precision to native, or let more blocks stay native (teacher.fp8_native_first)",
                    (long long)row, (long long)position, where);
    s->n++;
    s->row_n++;
    s->kl += r->forward_kl;
    s->row_kl += r->forward_kl;
    s->agree += r->agree;
    s->label += fabs((double)r->teacher_logprob - r->student_logprob);
    return OK;
}

int dump_error_compare(const struct dump_error *e, struct model *m, const struct error_room *room, int64_t batch_rows, int64_t Vv, bool quarantine, const char *where, struct precision_error *out)
{
    struct backend *be = m->be;
    int64_t L = e->rows->length, V = m->c->vocab_size, n;
    struct batch *b = batch_new(batch_rows, L, NULL, false);
    struct eval_row *host = xmalloc((size_t)room->chunk * sizeof *host);
    struct sums s = {0};
    int rc = OK;
    for (int64_t row = 0; row < e->n; row += n) {
        n = e->n - row < batch_rows ? e->n - row : batch_rows;
        set_batch(e, b, row, n, m);
        model_forward(m);
        for (int64_t first = 0; first < m->n; first += room->chunk) {
            int64_t R = m->n - first < room->chunk ? m->n - first : room->chunk;
            model_logits(m, first, R);
            be->ops->upload(be, room->hidden, e->hidden + (size_t)(row * L + first) * e->width, (size_t)R * e->width);
            model_head(m, room->logits, room->hidden, R);
            be->ops->compare_logits(be, room->rows, m->logits, room->logits, m->labels + first, R, V, V, Vv);
            be->ops->download(be, host, room->rows, (size_t)R * sizeof *host);
            for (int64_t i = 0; i < R; i++) {
                TRY(add(&s, &host[i], quarantine, e->row[row + (first + i) / L], (first + i) % L, where));
                if ((first + i + 1) % L == 0) end_row(&s);
            }
        }
    }
    if (!s.n) { rc = fail(ERR_NUMERIC, "the teacher's logits are not finite at any position that was measured; check the model with distill inspect %s", where); goto out; }
    *out = (struct precision_error){.rows = s.rows, .positions = s.n, .kl = fmax(s.kl / (double)s.n, 0), .kl_row_max = s.row_most,
                                    .agreement = (double)s.agree / (double)s.n, .label_difference = s.label / (double)s.n};
out:
    batch_free(b);
    free(host);
    return rc;
}
