/* Keys and values of 8 or 4 bits in memory, in MLX's order: x = scale * q + bias for each group of neighbours, the first
 * of them in the lowest bits. Scales and biases are of half precision. */

#ifndef MILLPOND_PACKED_H
#define MILLPOND_PACKED_H

#include <stdint.h>

/* Vectors packed one after the other: ``groups`` groups of ``size`` numbers, a multiple of 8. */
struct packed {
    uint8_t *numbers;
    uint16_t *scales, *biases;
};

/* Floats from packed groups; those begin ``at`` groups behind the start. */
void unpack_groups(int bits, struct packed from, long at, long groups, long size, float *to);

/* The other way. A group with a number that is not finite comes back as not a number. */
void pack_groups(int bits, const float *from, long groups, long size, struct packed to, long at);

/* Width in bits of the vectors this machine has. */
void packed_for(int bits);

#endif
