/* See spike.h. 64 numbers are sorted twice a step: nothing beside a step. */
#include "train/spike.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/json.h"

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int n)
{
    qsort(values, (size_t)n, sizeof *values, by_value);
    return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

static bool is_far(const char *what, double value, const double *before, int n, double least, double threshold, struct spike *out)
{
    double copy[SPIKE_WINDOW];
    memcpy(copy, before, (size_t)n * sizeof *copy);
    *out = (struct spike){.what = what, .value = value, .median = median(copy, n)};
    for (int i = 0; i < n; i++) copy[i] = fabs(before[i] - out->median);
    out->deviation = fmax(1.4826 * median(copy, n), least * fabs(out->median));
    return out->deviation > 0 && value > out->median + threshold * out->deviation;
}

bool spike_judge(const struct spike_state *s, double threshold, double loss, double norm, struct spike *out)
{
    if (s->n < SPIKE_LEAST) return false;
    return is_far("the loss", loss, s->loss, s->n, 0.02, threshold, out) || is_far("the gradient norm", norm, s->norm, s->n, 0.2, threshold, out);
}

void spike_remember(struct spike_state *s, double loss, double norm)
{
    if (s->n == SPIKE_WINDOW) {
        s->n--;
        memmove(s->loss, s->loss + 1, (size_t)s->n * sizeof *s->loss);
        memmove(s->norm, s->norm + 1, (size_t)s->n * sizeof *s->norm);
    }
    s->loss[s->n] = loss;
    s->norm[s->n++] = norm;
    s->in_a_row = 0;
}

void spike_skip(struct spike_state *s)
{
    s->skipped++;
    s->in_a_row++;
}

void spike_forget(struct spike_state *s)
{
    s->n = 0;
    s->in_a_row = 0;
}

json_t *spike_to_json(const struct spike_state *s)
{
    json_t *loss = json_array(), *norm = json_array();
    for (int i = 0; i < s->n; i++) {
        json_array_append_new(loss, json_real(s->loss[i]));
        json_array_append_new(norm, json_real(s->norm[i]));
    }
    return json_pack("{s:I, s:I, s:o, s:o}", "skipped", (json_int_t)s->skipped, "in_a_row", (json_int_t)s->in_a_row, "loss", loss, "norm", norm);
}

int spike_from_json(struct spike_state *s, const json_t *value, const char *where)
{
    const json_t *loss = json_object_get(value, "loss"), *norm = json_object_get(value, "norm");
    size_t n = json_array_size(loss);
    int rc = OK;
    *s = (struct spike_state){0};
    if (!value) return OK;
    TRY(json_get_int(value, "skipped", where, -1, &s->skipped));
    TRY(json_get_int(value, "in_a_row", where, -1, &s->in_a_row));
    bool whole = s->skipped >= 0 && s->in_a_row >= 0 && s->in_a_row <= s->skipped && json_is_array(loss) && json_is_array(norm) && n <= SPIKE_WINDOW && json_array_size(norm) == n;
    for (size_t i = 0; whole && i < n; i++) {
        const json_t *l = json_array_get(loss, i), *g = json_array_get(norm, i);
        whole = json_is_number(l) && json_is_number(g);
        if (!whole) break;
        s->loss[i] = json_number_value(l);
        s->norm[i] = json_number_value(g);
    }
    s->n = (int)n;
    if (!whole) {
        *s = (struct spike_state){0};
        rc = fail(ERR_INPUT, "%s: spike is not what a checkpoint says of the steps before it", where);
    }
out:
    return rc;
}
