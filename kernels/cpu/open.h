#ifndef KERNELS_CPU_OPEN_H
#define KERNELS_CPU_OPEN_H

#include "kernels/backend.h"

int  cpu_backend_open(struct backend **out, const struct backend_options *o);
void cpu_backend_close(struct backend *be);
/* First thing in main(): makes OpenBLAS use the kernels this processor deserves. May start the program once more. */
void cpu_select_blas(char **argv);

#endif
