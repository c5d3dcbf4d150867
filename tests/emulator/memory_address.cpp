/* Memory from the heap, whose ends AddressSanitizer guards; what is closed it does not let kernels touch either. Races are memory_race.cpp's. */
#include <stdlib.h>

#include <sanitizer/asan_interface.h>

#include "tests/emulator/parts.h"

namespace emulator
{

void *memory_take(size_t bytes, size_t alignment, bool)
{
    void *p = nullptr;
    return posix_memalign(&p, alignment, bytes) ? nullptr : p;
}
void memory_give_back(void *p) { free(p); }
void memory_close(void *p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
void memory_open(void *p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }

void memory_reads(const void *p, size_t bytes)
{
    if (__asan_region_is_poisoned((void *)p, bytes)) stop("an asynchronous copy reads what is not its to read");
}
void memory_writes(void *p, size_t bytes)
{
    if (__asan_region_is_poisoned(p, bytes)) stop("an asynchronous copy writes what is not its to write");
}
void memory_atomic(const void *, size_t) {}
void memory_end_of_launch() {}

} // namespace emulator
