/* Attention over slots; see decode.c. */

#ifndef MILLPOND_DECODE_H
#define MILLPOND_DECODE_H

#include <stdint.h>

#include "kernels.h"

/* Keys or values of one stretch of positions, [rows, heads, capacity, dims] without gaps; packed unless bits is 32. */
struct store {
    struct packed packed; /* ``numbers`` are the floats when they are not packed */
    uint16_t *means;      /* of tiles of keys, see tiles.h; else NULL */
    int64_t capacity;
    int32_t bits, group;
};

struct slots {
    int64_t rows, heads, groups, length, dims, value_dims;
    int64_t window; /* what a query sees, and the second stores are rings; 0: everything */
    /* Positions below ``exact`` are in the first store of each, the others in the second, counted from there. */
    int64_t exact;
    /* Of those only whole tiles are in the second, and the newest positions are in the third stores, which are rings. */
    int64_t tiled;
    struct store keys[3], values[3];
    double scale;   /* of scores whose softmax is to the base of 2 */
    int64_t writes; /* 0: there are no new keys and values; the queries attend to what is there */
};

/* What is computed besides: all without gaps. */
struct fresh {
    const float *queries; /* [rows, heads, length, dims] */
    const float *keys;    /* [rows, groups, length, dims] */
    const float *values;  /* [rows, groups, length, value_dims] */
    float *result;        /* [rows, length, heads, value_dims] */
};

/* ``told``: tokens of each row before this forward; of tiled slots then where each row's newest positions begin, and where
 * they began before: tiles between the two are packed first. */
void attend(const struct slots *slots, const int64_t *told, const struct fresh *fresh);

#endif
