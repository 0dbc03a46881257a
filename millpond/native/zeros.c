/* Zeros that cost nothing until they are written over: pages given back to the system come again as such. A carried job,
 * see carried.h, whose result is the memory. And the other way: pages before they are written. */

#define _DEFAULT_SOURCE

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "carried.h"
#include "common.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

void leave_zeros(void *described, const float *b, long columns, float *c)
{
    (void)b, (void)columns;
    uintptr_t size = (uintptr_t)*(const int64_t *)described, from = (uintptr_t)c, end = from + size;
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = (from + page - 1) / page * page, last = end / page * page;
    if (first >= last || madvise((void *)first, last - first, MADV_DONTNEED) != 0) {
        memset(c, 0, size);
        return;
    }
    memset(c, 0, first - from);
    memset((void *)last, 0, end - last);
}

EXPORT void millpond_touch(void *from, size_t size)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = (uintptr_t)from / page * page;
    madvise((void *)first, (uintptr_t)from + size - first, MADV_POPULATE_WRITE);
}
