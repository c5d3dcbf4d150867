/* rng: Philox against the vectors published with it, and the distributions made from it. */
#include <criterion/criterion.h>
#include <string.h>

#include "base/rng.h"

Test(rng, philox_vectors)       /* Random123, kat_vectors: philox4x32 10 */
{
    struct philox a = philox4x32(0, 0, 0), b = philox4x32(~0ull, ~0ull, ~0ull), c = philox4x32(0x299f31d0a4093822ull, 0x0370734413198a2eull, 0x85a308d3243f6a88ull);
    static const uint32_t want_a[] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}, want_b[] = {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
                          want_c[] = {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1};
    cr_assert(!memcmp(a.v, want_a, sizeof want_a) && !memcmp(b.v, want_b, sizeof want_b) && !memcmp(c.v, want_c, sizeof want_c));
}

Test(rng, distributions)
{
    enum { N = 200000 };
    double sum = 0, squares = 0, fourth = 0, uniform = 0;
    for (uint64_t i = 0; i < N; i++) {
        struct philox r = philox4x32(3, 1, i);
        double x = normal_float(r.v[0], r.v[1]), u = uniform_float(r.v[2]), w = uniform_double(r.v[2], r.v[3]);
        cr_assert(isfinite(x) && u >= 0 && u < 1 && w >= 0 && w < 1);
        sum += x; squares += x * x; fourth += x * x * x * x; uniform += u;
    }
    cr_assert(fabs(sum / N) < 0.01 && fabs(squares / N - 1) < 0.016 && fabs(fourth / N - 3) < 0.12 && fabs(uniform / N - 0.5) < 0.004);
    cr_assert(uniform_float(0xffffffffu) < 1 && uniform_double(0xffffffffu, 0xffffffffu) < 1 && uniform_float(0) == 0);
    cr_assert(isfinite(normal_float(0xffffffffu, 0)) && isfinite(normal_float(0, 0)));
}

Test(rng, shuffle)
{
    int64_t a[1000], b[1000], seen[1000] = {0}, moved = 0;
    for (int i = 0; i < 1000; i++) a[i] = b[i] = i;
    shuffle_int64(a, 1000, 5, 2);
    shuffle_int64(b, 1000, 5, 2);
    cr_assert(!memcmp(a, b, sizeof a));
    for (int i = 0; i < 1000; i++) { seen[a[i]]++; moved += a[i] != i; }
    for (int i = 0; i < 1000; i++) cr_assert_eq(seen[i], 1);
    cr_assert(moved > 980);
    shuffle_int64(b, 1000, 5, 3);
    cr_assert(memcmp(a, b, sizeof a));
    shuffle_int64(a, 0, 1, 1);
    shuffle_int64(a, 1, 1, 1);
    int count[3][3] = {{0}};
    for (uint64_t s = 0; s < 30000; s++) {
        int64_t x[3] = {0, 1, 2};
        shuffle_int64(x, 3, 9, s);
        for (int i = 0; i < 3; i++) count[i][x[i]]++;
    }
    for (int i = 0; i < 9; i++) cr_assert(abs(count[i / 3][i % 3] - 10000) < 500);
}
