/* The table of teacher-dump --dry-run: its closed forms against the gradients themselves. Bias by the definitions of design 7, term by term; noise by
 * enumerating every possible draw of one (the error with m is 1/m of it), and the number of different ids by drawing. */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "base/rng.h"
#include "train/dump_plan.h"

enum { V = 40 };
static double p[V], q[V];
static float t[V], z[V];

static void make(uint64_t seed, double sharp)
{
    double sp = 0, sq = 0;
    for (int v = 0; v < V; v++) {
        struct philox r = philox4x32(seed, 1, (uint64_t)v);
        t[v] = (float)(sharp * normal_float(r.v[0], r.v[1]));
        z[v] = t[v] + 0.7f * normal_float(r.v[2], r.v[3]);
        sp += p[v] = exp(t[v]);
        sq += q[v] = exp(z[v]);
    }
    for (int v = 0; v < V; v++) { p[v] /= sp; q[v] /= sq; }
}

static double distance(const double *g)
{
    double d = 0;
    for (int v = 0; v < V; v++) d += (g[v] - (q[v] - p[v])) * (g[v] - (q[v] - p[v]));
    return d;
}

static bool in_head(int v, int K)
{
    int above = 0;
    for (int u = 0; u < V; u++) above += t[u] > t[v];
    return above < K;
}

Test(dump_plan, errors_are_those_of_the_gradients)
{
    double scratch[2 * V], g[V];
    float order[V];
    for (uint64_t seed = 1; seed < 20; seed++) {
        struct plan_sums s = {0};
        make(seed, 0.3 * (double)seed);
        plan_add(&s, t, z, V, scratch, order);
        double full = 0, one = 0;
        for (int v = 0; v < V; v++) full += (q[v] - p[v]) * (q[v] - p[v]);
        cr_assert_float_eq(s.gradient, full, 1e-9 * full + 1e-15);
        for (int draw = 0; draw < V; draw++) {                    /* sampled, N = 1 */
            for (int v = 0; v < V; v++) g[v] = q[v] - (v == draw);
            one += p[draw] * distance(g);
        }
        cr_assert_float_eq(s.sampled_one, one, 1e-9 * one + 1e-12);
        for (int i = 0; plan_k[i] <= V; i++) {
            int K = plan_k[i];
            double a = 0, b = 0, hybrid = 0;
            for (int v = 0; v < V; v++) if (in_head(v, K)) { a += p[v]; b += q[v]; }
            cr_assert_float_eq(s.kept[i], a, 1e-9);
            for (int v = 0; v < V; v++) g[v] = in_head(v, K) ? q[v] - p[v] : q[v] * (a - b) / (1 - b);
            cr_assert_float_eq(s.bucket[i], distance(g), 1e-8 * distance(g) + 1e-14, "bucket %d: %g, %g", K, s.bucket[i], distance(g));
            for (int v = 0; v < V; v++) g[v] = in_head(v, K) ? q[v] - p[v] / a : q[v];
            cr_assert_float_eq(s.renormalise[i], distance(g), 1e-8 * distance(g) + 1e-14);
            for (int draw = 0; draw < V; draw++) {                /* hybrid, m = 1 */
                if (in_head(draw, K)) continue;
                for (int v = 0; v < V; v++) g[v] = q[v] - (in_head(v, K) ? p[v] : (1 - a) * (v == draw));
                hybrid += p[draw] / (1 - a) * distance(g);
            }
            cr_assert_float_eq(s.hybrid_one[i], hybrid, 1e-8 * hybrid + 1e-14, "hybrid %d: %g, %g", K, s.hybrid_one[i], hybrid);
        }
    }
}

Test(dump_plan, different_ids_among_draws)
{
    double scratch[2 * V];
    float order[V];
    struct plan_sums s = {0};
    make(3, 1.5);
    plan_add(&s, t, z, V, scratch, order);
    for (int i = 0; i < 2; i++) {
        double sum = 0;
        enum { ROUNDS = 4000 };
        for (int round = 0; round < ROUNDS; round++) {
            bool seen[V] = {0};
            for (int n = 0; n < plan_n[i]; n++) {
                double u = uniform_double(philox4x32(9, (uint64_t)round, (uint64_t)n).v[0], 0);
                int v = 0;
                while (v < V - 1 && (u -= p[v]) >= 0) v++;
                sum += !seen[v];
                seen[v] = true;
            }
        }
        cr_assert_float_eq(s.unique[i], sum / ROUNDS, 0.1, "%g, %g", s.unique[i], sum / ROUNDS);
    }
}

Test(dump_plan, ends_of_the_range)
{
    double scratch[2 * V];
    float order[V];
    struct plan_sums s = {0};
    for (int v = 0; v < V; v++) { t[v] = v == 7 ? 200 : 0; z[v] = 0; }    /* one-hot teacher, uniform student */
    plan_add(&s, t, z, V, scratch, order);
    for (int i = 0; i < PLAN_K; i++) cr_assert(isfinite(s.bucket[i]) && isfinite(s.renormalise[i]) && isfinite(s.hybrid_one[i]) && s.bucket[i] < 1e-12 && s.kept[i] > 1 - 1e-9);
    cr_assert_float_eq(s.unique[0], 1, 1e-9);
    memset(&s, 0, sizeof s);
    for (int v = 0; v < V; v++) t[v] = z[v] = 1;                          /* nothing but ties, nothing to learn */
    plan_add(&s, t, z, V, scratch, order);
    cr_assert_float_eq(s.kept[0], 8.0 / V, 1e-9);
    cr_assert_lt(s.gradient, 1e-20);
    cr_assert(plan_bytes_free("/nowhere/at/all") != 0 && plan_bytes_free("relative/not/there") != 0);
}
