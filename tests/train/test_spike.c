/* Spikes: the judgement against a median and a deviation found by counting ranks; what is not judged; the state through JSON to the bit. */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "base/rng.h"
#include "tests/compare.h"
#include "train/spike.h"

/* The value of rank k by counting, ties by place: no sorting. */
static double ranked(const double *v, int n, int k)
{
    for (int i = 0; i < n; i++) {
        int below = 0;
        for (int j = 0; j < n; j++) below += v[j] < v[i] || (v[j] == v[i] && j < i);
        if (below == k) return v[i];
    }
    return NAN;
}
static double middle(const double *v, int n) { return (ranked(v, n, (n - 1) / 2) + ranked(v, n, n / 2)) / 2; }

static double deviation(const double *v, int n, double least)
{
    double away[SPIKE_WINDOW], m = middle(v, n);
    for (int i = 0; i < n; i++) away[i] = fabs(v[i] - m);
    return fmax(1.4826 * middle(away, n), least * fabs(m));
}

Test(spike, judges_by_the_median_and_the_median_absolute_deviation)
{
    for (uint64_t round = 0; round < 200; round++) {
        struct spike_state s = {0};
        struct spike found;
        int n = SPIKE_LEAST + (int)(round % (SPIKE_WINDOW - SPIKE_LEAST + 1));
        float noise[2 * SPIKE_WINDOW];
        fill_normal(noise, 2 * n, round % 3 ? 0.3f : 0.001f, 1000 + round);
        for (int i = 0; i < n; i++) spike_remember(&s, 3 + noise[i], fabs(0.5 + noise[n + i]));
        double m = middle(s.loss, n), d = deviation(s.loss, n, 0.02), gm = middle(s.norm, n), gd = deviation(s.norm, n, 0.2), T = 1 + (double)(round % 12);
        cr_assert(!spike_judge(&s, T, m + T * d * (1 - 1e-12) - 1e-9, gm, &found), "just below");
        cr_assert(spike_judge(&s, T, m + T * d + 1e-9, gm, &found), "just above");
        cr_assert(!strcmp(found.what, "the loss") && fabs(found.median - m) < 1e-12 && fabs(found.deviation - d) < 1e-12);
        cr_assert(!spike_judge(&s, T, m, gm + T * gd - 1e-9, &found));
        cr_assert(spike_judge(&s, T, m, gm + T * gd + 1e-9, &found));
        cr_assert(!strcmp(found.what, "the gradient norm") && fabs(found.median - gm) < 1e-12 && fabs(found.deviation - gd) < 1e-12);
        cr_assert(!spike_judge(&s, T, 0, 0, &found), "what falls is no spike");
    }
}

Test(spike, a_hundredfold_step_is_one_and_the_steps_after_it_are_not)
{
    struct spike_state s = {0};
    struct spike found;
    int spikes = 0;
    for (int step = 0; step < 300; step++) {
        double loss = (2 + 3 * exp(-step / 20.0)) * (1 + 0.02 * sin(step * 1.7)) * (step % 97 == 60 ? 100 : 1);
        bool spike = spike_judge(&s, 10, loss, 0.4, &found);
        cr_assert_eq(spike, step % 97 == 60, "step %d", step);
        if (spike) { spike_skip(&s); spikes++; }
        else spike_remember(&s, loss, 0.4);
        cr_assert_eq(s.in_a_row, spike);
    }
    cr_assert(spikes == 3 && s.skipped == 3 && s.n == SPIKE_WINDOW);
    for (int i = 0; i < s.n; i++) cr_assert(s.loss[i] < 6, "a spike is not what later steps are judged by");
}

Test(spike, nothing_is_judged_before_enough_is_known_or_without_any_scale)
{
    struct spike_state s = {0};
    struct spike found;
    for (int i = 0; i < SPIKE_LEAST - 1; i++) {
        cr_assert(!spike_judge(&s, 10, 1e9, 1e9, &found));
        spike_remember(&s, 1, 1);
    }
    cr_assert(!spike_judge(&s, 10, 1e9, 1e9, &found));
    spike_remember(&s, 1, 1);
    cr_assert(spike_judge(&s, 10, 1e9, 1, &found));
    spike_forget(&s);
    for (int i = 0; i < SPIKE_WINDOW; i++) spike_remember(&s, 0, 0);
    cr_assert(!spike_judge(&s, 10, 1e-3, 1e-3, &found), "all are 0: there is nothing to measure by");
}

Test(spike, the_window_holds_the_newest)
{
    struct spike_state s = {0};
    for (int i = 0; i < 3 * SPIKE_WINDOW + 5; i++) {
        spike_remember(&s, i, -i);
        cr_assert_eq(s.n, i + 1 < SPIKE_WINDOW ? i + 1 : SPIKE_WINDOW);
        for (int j = 0; j < s.n; j++) cr_assert(s.loss[j] == i - s.n + 1 + j && s.norm[j] == -s.loss[j]);
    }
}

Test(spike, goes_through_json_to_the_bit)
{
    struct spike_state s = {.skipped = 7, .in_a_row = 2}, back;
    for (int i = 0; i < SPIKE_WINDOW; i++) {
        uint64_t v = philox4x32(3, (uint64_t)i, 0).v[0];
        s.loss[i] = ldexp(1 + (double)v / 3e9, i - 30);
        s.norm[i] = 1.0 / (double)(v + 1);
    }
    for (s.n = 0; s.n <= SPIKE_WINDOW; s.n += 16) {
        json_t *value = spike_to_json(&s);
        char *text = json_dumps(value, JSON_REAL_PRECISION(17));
        json_t *again = json_loads(text, 0, NULL);
        cr_assert_eq(spike_from_json(&back, again, "x"), OK, "%s", fail_message());
        cr_assert(back.skipped == 7 && back.in_a_row == 2 && back.n == s.n && !memcmp(back.loss, s.loss, (size_t)s.n * 8) && !memcmp(back.norm, s.norm, (size_t)s.n * 8));
        free(text);
        json_decref(value);
        json_decref(again);
    }
    cr_assert(spike_from_json(&back, NULL, "x") == OK && back.n == 0 && back.skipped == 0);
    static const char *const broken[] = {"[]", "{}", "{\"skipped\": 1, \"in_a_row\": 2, \"loss\": [], \"norm\": []}", "{\"skipped\": 1, \"in_a_row\": 0, \"loss\": [1], \"norm\": []}",
                                         "{\"skipped\": 1, \"in_a_row\": 0, \"loss\": [\"1\"], \"norm\": [1]}", "{\"skipped\": -1, \"in_a_row\": 0, \"loss\": [1], \"norm\": [1]}",
                                         "{\"skipped\": 0.5, \"in_a_row\": 0, \"loss\": [], \"norm\": []}", "{\"skipped\": 0, \"in_a_row\": 0, \"loss\": 3, \"norm\": []}"};
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
        json_t *value = json_loads(broken[i], 0, NULL);
        cr_expect_eq(spike_from_json(&back, value, "state.json"), ERR_INPUT, "%s", broken[i]);
        cr_expect(strstr(fail_message(), "state.json"), "%s", fail_message());
        json_decref(value);
    }
}
