/* What libraries read from the environment before main(), and so has to be set by starting the program once more. A variable that is set is left alone.
 *
 * OPENBLAS_CORETYPE: OpenBLAS picks its kernels by the processor's model number. A processor newer than the library is "Prescott" (SSE3) to it: measured on
 * an AVX-512 machine with OpenBLAS 0.3.21, 39 instead of 192 GFLOP/s. What the processor can do is known, so we say so.
 * OMP_WAIT_POLICY: threads that spin at the end of a loop keep the one they wait for off the core when the machine is shared: a test took 35 s
 * spinning and 0.9 s sleeping. On a quiet machine the two train at the same rate (1092-1127 and 970-1126 tok/s). */
#include <cblas.h>
#include <stdlib.h>
#include <strings.h>
#include <unistd.h>

#include "kernels/cpu/open.h"

char *openblas_get_corename(void);

/* The kernels OpenBLAS should have picked; NULL when its choice is good. */
static const char *better_kernels(void)
{
#if defined(__x86_64__)
    static const char *const guesses[] = {"Prescott", "Core2", "Generic", "Unknown"};
    const char *core = openblas_get_corename();
    int guessed = 0;
    for (size_t i = 0; i < sizeof guesses / sizeof *guesses; i++) guessed |= !strcasecmp(core, guesses[i]);
    if (!guessed) return NULL;
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) return "SKYLAKEX";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "HASWELL";
#endif
    return NULL;
}

void cpu_prepare_process(char **argv)
{
    const char *kernels = getenv("OPENBLAS_CORETYPE") ? NULL : better_kernels(), *wait = getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT") ? NULL : "passive";
    if (!kernels && !wait) return;
    if (kernels) setenv("OPENBLAS_CORETYPE", kernels, 1);
    if (wait) setenv("OMP_WAIT_POLICY", wait, 1);
    execv("/proc/self/exe", argv);            /* returns only when it fails: then the program is slower, not wrong */
}
