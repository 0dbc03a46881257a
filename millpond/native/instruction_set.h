/* The kernels for one instruction set. Included by kernels.c once per set, with
 *   WIDTH      floats in one vector
 *   TARGET     the function attribute that allows the instructions
 *   NAME(base) the function's name for this set */

typedef float NAME(vec) __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t NAME(ints) __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

#include "row_products.h"
#include "packed_rows.h"
#include "softmax.h"
#include "lanes.h"
#include "elementwise.h"
#include "recurrence.h"
#if WIDTH <= 8
#include "packing.h"
#endif

#undef WIDTH
#undef TARGET
#undef NAME
