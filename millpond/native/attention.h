/* Attention of many queries; see attention.c. */

#ifndef MILLPOND_ATTENTION_H
#define MILLPOND_ATTENTION_H

#include <stdint.h>

/* Any position of an array is base + batch * step[0] + head * step[1] + position * step[2]; elements are neighbours. */
struct view {
    const void *base;
    int64_t step[3];
};

/* Shapes: queries [batch, heads, length, dims], keys [batch, groups, width, dims], values [batch, groups, width,
 * value_dims], mask [batch, heads, length, width] or none, result [batch, length, heads, value_dims] without gaps. */
struct attention {
    int64_t batch, heads, groups, length, width, dims, value_dims;
    struct view queries, keys, values, mask;
    float *result;
    float scale; /* of scores whose softmax is to the base of 2 */
    int32_t causal;
};

void attend_queries(const struct attention *a);

#endif
