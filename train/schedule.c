/* The learning rate of every step, s = 0 .. S-1, with a warm-up of W steps, peak lr and final ratio r:
 *
 *     s < W       lr (s + 1) / W                                  lr / W in the first step, lr in step W-1
 *     after it    x = (s - s0) / (S - 1 - s0), s0 = max(W-1, 0)   0 at the peak, 1 in the last step
 *       cosine    lr (r + (1 - r) (1 + cos(pi x)) / 2)
 *       linear    lr (1 - (1 - r) x)
 *       constant  lr
 *       wsd       lr, and over the last D = decay_fraction S steps linear down: lr (1 - (1 - r) (s - (S - D) + 1) / D)
 */
#include "train/schedule.h"

#include <math.h>
#include <string.h>

#include "base/error.h"

static int64_t decay_steps(const struct schedule *s)
{
    int64_t n = llround(s->decay_fraction * (double)s->steps);
    return n < 1 ? 1 : n;
}

int schedule_make(struct schedule *s, const struct config *c, int64_t steps)
{
    static const struct { const char *name; enum schedule_kind kind; } kinds[] = {{"cosine", SCHEDULE_COSINE}, {"linear", SCHEDULE_LINEAR}, {"constant", SCHEDULE_CONSTANT}, {"wsd", SCHEDULE_WSD}};
    *s = (struct schedule){.lr = c->optimizer_lr, .final_ratio = c->schedule_final_ratio, .decay_fraction = c->schedule_decay_fraction, .warmup = c->schedule_warmup_steps, .steps = steps};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) if (!strcmp(c->schedule_kind, kinds[i].name)) s->kind = kinds[i].kind;
    if (s->warmup > steps)
        return fail(ERR_USAGE, "schedule.warmup_steps is %lld, but the run has %lld steps; make the warm-up shorter or the run longer", (long long)s->warmup, (long long)steps);
    if (s->kind == SCHEDULE_WSD && s->warmup + decay_steps(s) > steps)
        return fail(ERR_USAGE, "schedule.warmup_steps %lld and the last %lld steps, in which wsd lowers the learning rate, do not fit into %lld steps; lower schedule.decay_fraction or the warm-up",
                    (long long)s->warmup, (long long)decay_steps(s), (long long)steps);
    return OK;
}

double schedule_lr(const struct schedule *s, int64_t step)
{
    if (step < s->warmup) return s->lr * (double)(step + 1) / (double)s->warmup;
    if (step >= s->steps) step = s->steps - 1;
    int64_t peak = s->warmup > 0 ? s->warmup - 1 : 0, last = s->steps - 1, decay = decay_steps(s);
    double x = last > peak ? (double)(step - peak) / (double)(last - peak) : 0, fall = 1 - s->final_ratio;
    switch (s->kind) {
    case SCHEDULE_COSINE:   return s->lr * (s->final_ratio + fall * 0.5 * (1 + cos(M_PI * x)));
    case SCHEDULE_LINEAR:   return s->lr * (1 - fall * x);
    case SCHEDULE_CONSTANT: return s->lr;
    case SCHEDULE_WSD:      return step < s->steps - decay ? s->lr : s->lr * (1 - fall * (double)(step - (s->steps - decay) + 1) / (double)decay);
    }
    CHECK(0, "schedule kind %d", s->kind);
}
