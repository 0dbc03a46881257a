/* Products with weights as they are on disk; see products.c. */

#ifndef MILLPOND_PRODUCTS_H
#define MILLPOND_PRODUCTS_H

#include "kernels.h"

struct matrix {
    struct weights weights;
    const float *bias; /* NULL: there is none */
};

/* The same vectors [rows][inputs] times some matrices: results [rows][outputs] each. Not a number where there is no memory
 * for it, which is found by whoever reads the result. */
void run_products(const float *vectors, long rows, const struct matrix *const *matrices, float *const *results, long count);

#endif
