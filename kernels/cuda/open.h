#ifndef KERNELS_CUDA_OPEN_H
#define KERNELS_CUDA_OPEN_H

#include "kernels/backend.h"

int  cuda_backend_open(struct backend **out, const struct backend_options *o);
void cuda_backend_close(struct backend *be);

#endif
