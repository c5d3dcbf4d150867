#ifndef KERNELS_CPU_OPEN_H
#define KERNELS_CPU_OPEN_H

#include "kernels/backend.h"

int  cpu_backend_open(struct backend **out, const struct backend_options *o);
void cpu_backend_close(struct backend *be);
/* First thing in main(): lets OpenBLAS and OpenMP do what this machine deserves. May start the program once more. */
void cpu_prepare_process(char **argv);

#endif
