/* Opens a backend by name. The only C file that knows whether this build has CUDA. */
#include "kernels/backend.h"

#include <string.h>

#include "base/error.h"
#include "kernels/cpu/open.h"
#ifdef HAVE_CUDA
#include "kernels/cuda/open.h"
#endif

int backend_open(struct backend **out, const struct backend_options *o)
{
    int rc;
    if (!strcmp(o->device, "cpu")) rc = cpu_backend_open(out, o);
#ifdef HAVE_CUDA
    else if (!strcmp(o->device, "cuda")) rc = cuda_backend_open(out, o);
#else
    else if (!strcmp(o->device, "cuda")) return fail(ERR_USAGE, "device cuda: this build has no CUDA backend; configure with -Dcuda=enabled on a machine with nvcc, or use device cpu");
#endif
    else return fail(ERR_USAGE, "unknown device \"%s\"; known: cpu, cuda", o->device);
    if (rc != OK) return rc;
    /* every entry is a function pointer: a table that grew without its implementation is found here, not in the middle of a run */
    void *const *entry = (void *const *)(const void *)(*out)->ops;
    for (size_t i = 0; i < sizeof(struct ops) / sizeof *entry; i++) CHECK(entry[i], "device %s: op %zu of the table is missing", o->device, i);
    return OK;
}

void backend_close(struct backend *be)
{
    if (!be) return;
#ifdef HAVE_CUDA
    if (!strcmp(be->name, "cuda")) { cuda_backend_close(be); return; }
#endif
    cpu_backend_close(be);
}
