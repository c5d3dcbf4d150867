/* CUDA's host functions, as far as the backend calls them. Device memory is host memory that only copies and kernels may touch; streams and events
 * have nothing to order, for everything is done when the call returns. DISTILL_EMULATE_TRACE=FILE appends a line with a hash for every copy to the
 * host: two runs that differ in the order of threads alone must write the same file. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <map>

#include "tests/emulator/parts.h"

using namespace emulator;

static const size_t DEVICE_BYTES = 8ull << 30;
enum { DRIVER_VERSION = 13000 };

struct allocation {
    size_t bytes, closed;
    bool host;
};
static std::map<const char *, allocation> allocations;

static const std::pair<const char *const, allocation> *allocation_of(const void *p)
{
    auto after = allocations.upper_bound((const char *)p);
    if (after == allocations.begin()) return nullptr;
    auto &it = *--after;
    return (const char *)p < it.first + it.second.bytes ? &it : nullptr;
}

static cudaError_t allocate(void **p, size_t bytes, bool host)
{
    static const size_t guard =
        (size_t)atoi(setting("DISTILL_EMULATE_GUARD", "0")); /* bytes at the end that the op tests check, and that no kernel may touch */
    char *q = (char *)memory_take(bytes, 256, false);
    if (!q) return cudaErrorMemoryAllocation;
    allocation it = {bytes, !host && bytes > guard ? guard : 0, host};
    if (!host) memset(q, 0xff, bytes);
    memory_close(q + bytes - it.closed, it.closed);
    allocations[q] = it;
    *p = q;
    return cudaSuccess;
}

static cudaError_t release(void *p)
{
    if (!p) return cudaSuccess;
    auto it = allocations.find((const char *)p);
    if (it == allocations.end()) stop("freed what was not allocated");
    memory_open((char *)p + it->second.bytes - it->second.closed, it->second.closed);
    allocations.erase(it);
    memory_give_back(p);
    return cudaSuccess;
}

static void must_be_allocated(const void *p, size_t bytes, const char *what)
{
    auto it = allocation_of(p);
    if (bytes && (!it || (const char *)p + bytes > it->first + it->second.bytes))
        stop(std::string(what) + " of " + std::to_string(bytes) + " bytes is not inside an allocation" + (it ? "" : ": host memory?"));
}

/* Not memcpy, which the sanitizer would see reading a guard */
UNWATCHED static void copy(void *to, const void *from, size_t bytes)
{
    volatile char *t = (volatile char *)to;
    const char *f = (const char *)from;
    size_t i = 0;
    if (!(((uintptr_t)to | (uintptr_t)from) % 8))
        for (; i + 8 <= bytes; i += 8) *(volatile uint64_t *)(t + i) = *(const uint64_t *)(f + i);
    for (; i < bytes; i++) t[i] = f[i];
}

UNWATCHED static void trace(const char *host, size_t bytes)
{
    static FILE *const file = *setting("DISTILL_EMULATE_TRACE", "") ? fopen(getenv("DISTILL_EMULATE_TRACE"), "a") : nullptr;
    if (!file) return;
    uint64_t hash = 14695981039346656037u; /* FNV-1a */
    for (size_t i = 0; i < bytes; i++) hash = (hash ^ (unsigned char)host[i]) * 1099511628211u;
    fprintf(file, "%s %zu %016llx\n", now.kernel ? now.kernel : "-", bytes, (unsigned long long)hash);
    fflush(file);
}

extern "C" {

/* ---- device ---- */

cudaError_t cudaGetDeviceCount(int *n) { return *n = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int)
{
    memset(p, 0, sizeof *p);
    strcpy(p->name, "an emulated Hopper GPU");
    p->major = 9;
    p->multiProcessorCount = atoi(setting("DISTILL_EMULATE_SMS", "132"));
    p->totalGlobalMem = DEVICE_BYTES;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = DRIVER_VERSION, cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) { return *available = *total = DEVICE_BYTES, cudaSuccess; }
cudaError_t cudaGetLastError(void) { return take_last_error(); }
const char *cudaGetErrorString(cudaError_t e)
{
    switch (e) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    default: return "refused by the emulator";
    }
}
cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute attribute, int value)
{
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
    if ((size_t)value > SHARED_MOST) return cudaErrorInvalidValue;
    allow_dynamic_shared(kernel, value);
    return cudaSuccess;
}

/* ---- memory ---- */

cudaError_t cudaMalloc(void **p, size_t bytes) { return allocate(p, bytes, false); }
cudaError_t cudaFree(void *p) { return release(p); }
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned) { return allocate(p, bytes, true); }
cudaError_t cudaFreeHost(void *p) { return release(p); }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p)
{
    auto it = allocation_of(p);
    memset(a, 0, sizeof *a);
    a->type = !it ? cudaMemoryTypeUnregistered : it->second.host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t)
{
    if (kind == cudaMemcpyDeviceToDevice || kind == cudaMemcpyHostToDevice) must_be_allocated(to, bytes, "a copy's target");
    if (kind == cudaMemcpyDeviceToDevice || kind == cudaMemcpyDeviceToHost) must_be_allocated(from, bytes, "a copy's source");
    copy(to, from, bytes);
    if (kind == cudaMemcpyDeviceToHost) trace((const char *)to, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t)
{
    must_be_allocated(p, bytes, "the target of cudaMemsetAsync");
    memset(p, value, bytes);
    return cudaSuccess;
}

/* ---- streams and events ---- */

struct event {
    struct timespec at;
};
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned) { return *s = (cudaStream_t)malloc(1), cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t s) { return free(s), cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) { return *e = (cudaEvent_t)calloc(1, sizeof(event)), cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return free(e), cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t) { return clock_gettime(CLOCK_MONOTONIC, &((event *)e)->at), cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to)
{
    const struct timespec &a = ((event *)from)->at, &b = ((event *)to)->at;
    *ms = (float)(1e3 * (double)(b.tv_sec - a.tv_sec) + 1e-6 * (double)(b.tv_nsec - a.tv_nsec));
    return cudaSuccess;
}

} // extern "C"
