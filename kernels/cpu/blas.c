/* OpenBLAS picks its kernels by the processor's model number when it is loaded. A processor newer than the library is "Prescott" (SSE3) to it:
 * measured on an AVX-512 machine with OpenBLAS 0.3.21, 39 instead of 192 GFLOP/s. What the processor can do is known, so we say so in
 * OPENBLAS_CORETYPE, which the library reads before main() - hence the program starts itself once more. A variable that is set is left alone. */
#include <cblas.h>
#include <stdlib.h>
#include <strings.h>
#include <unistd.h>

#include "kernels/cpu/open.h"

char *openblas_get_corename(void);

void cpu_select_blas(char **argv)
{
#if defined(__x86_64__)
    static const char *const guesses[] = {"Prescott", "Core2", "Generic", "Unknown"};
    const char *core = openblas_get_corename(), *better = NULL;
    int guessed = 0;
    for (size_t i = 0; i < sizeof guesses / sizeof *guesses; i++) guessed |= !strcasecmp(core, guesses[i]);
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) better = "SKYLAKEX";
    else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) better = "HASWELL";
    if (!guessed || !better || getenv("OPENBLAS_CORETYPE")) return;
    setenv("OPENBLAS_CORETYPE", better, 1);
    execv("/proc/self/exe", argv);            /* returns only when it fails: then the slow kernels are right, too */
#else
    (void)argv;
#endif
}
