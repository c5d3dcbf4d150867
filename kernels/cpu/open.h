#ifndef KERNELS_CPU_OPEN_H
#define KERNELS_CPU_OPEN_H

#include "kernels/backend.h"

int  cpu_backend_open(struct backend **out, const struct backend_options *o);
void cpu_backend_close(struct backend *be);

#endif
