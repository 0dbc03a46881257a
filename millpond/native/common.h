/* What every part of the library may need. */

#ifndef MILLPOND_COMMON_H
#define MILLPOND_COMMON_H

#define EXPORT __attribute__((visibility("default")))

static inline long smaller(long a, long b) { return a < b ? a : b; }
static inline long larger(long a, long b) { return a > b ? a : b; }

#endif
