/* The learning rate: ends, peak, monotony, and formulas checked at single steps. */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "base/error.h"
#include "train/schedule.h"

static struct schedule make(const char *kind, int64_t warmup, int64_t steps, double final_ratio, double decay)
{
    struct config *c = config_new();
    struct schedule s;
    char *set = xasprintf("schedule.kind=%s", kind);
    cr_assert_eq(config_set(c, set), OK);
    free(set);
    c->optimizer_lr = 2.0;
    c->schedule_warmup_steps = warmup;
    c->schedule_final_ratio = final_ratio;
    c->schedule_decay_fraction = decay;
    cr_assert_eq(schedule_make(&s, c, steps), OK, "%s", fail_message());
    config_free(c);
    return s;
}

static void expect(const struct schedule *s, int64_t step, double lr)
{
    cr_expect_lt(fabs(schedule_lr(s, step) - lr), 1e-14, "step %lld: %.17g, not %.17g", (long long)step, schedule_lr(s, step), lr);
}

Test(schedule, warmup_peak_and_end)
{
    static const char *const kinds[] = {"cosine", "linear", "wsd", "constant"};
    for (int k = 0; k < 4; k++)
        for (int64_t warmup = 0; warmup <= 5; warmup++) {
            struct schedule s = make(kinds[k], warmup, 50, 0.1, 0.2);
            for (int64_t i = 0; i < warmup; i++) expect(&s, i, 2.0 * (double)(i + 1) / (double)warmup);
            expect(&s, warmup ? warmup - 1 : 0, 2.0);
            expect(&s, 49, k == 3 ? 2.0 : 0.2);
            expect(&s, 1000, k == 3 ? 2.0 : 0.2);              /* a run continued beyond its steps stays there */
            for (int64_t i = warmup ? warmup : 1; i < 50; i++) cr_expect_leq(schedule_lr(&s, i), schedule_lr(&s, i - 1) + 1e-15, "%s step %lld", kinds[k], (long long)i);
        }
}

Test(schedule, formulas)
{
    struct schedule s = make("cosine", 0, 101, 0.1, 0.2);
    expect(&s, 50, 2.0 * (0.1 + 0.9 * 0.5));
    expect(&s, 25, 2.0 * (0.1 + 0.9 * 0.5 * (1 + sqrt(0.5))));
    s = make("linear", 11, 111, 0, 0.2);                       /* peak in step 10, 100 steps down */
    expect(&s, 10, 2.0);
    expect(&s, 35, 1.5);
    expect(&s, 110, 0);
    s = make("wsd", 10, 100, 0.5, 0.2);                        /* the last 20 */
    expect(&s, 10, 2.0);
    expect(&s, 79, 2.0);
    expect(&s, 80, 2.0 * (1 - 0.5 * 0.05));
    expect(&s, 89, 1.5);
    s = make("wsd", 0, 10, 0, 1);
    expect(&s, 0, 1.8);
    s = make("wsd", 0, 3, 0.1, 0.01);                          /* a decay of less than a step is one step */
    expect(&s, 1, 2.0);
    expect(&s, 2, 0.2);
}

Test(schedule, short_runs)
{
    struct schedule s = make("cosine", 0, 1, 0.1, 0.2);
    expect(&s, 0, 2.0);
    s = make("cosine", 1, 2, 0.1, 0.2);
    expect(&s, 0, 2.0);
    expect(&s, 1, 0.2);
    s = make("linear", 4, 4, 0.1, 0.2);                        /* nothing but warm-up */
    expect(&s, 0, 0.5);
    expect(&s, 3, 2.0);
    struct config *c = config_new();
    c->schedule_warmup_steps = 5;
    cr_expect_eq(schedule_make(&s, c, 4), ERR_USAGE);
    cr_expect(strstr(fail_message(), "schedule.warmup_steps is 5, but the run has 4 steps"));
    cr_assert_eq(config_set(c, "schedule.kind=wsd"), OK);
    c->schedule_decay_fraction = 0.6;
    cr_expect_eq(schedule_make(&s, c, 10), ERR_USAGE);
    cr_expect(strstr(fail_message(), "schedule.decay_fraction"));
    config_free(c);
}
