/* Keys that are packed a tile of positions at a time, with the mean of the tile apart. */

#ifndef MILLPOND_TILES_H
#define MILLPOND_TILES_H

#include <stdint.h>

#include "kernels.h"

enum { TILE = 64 }; /* positions; those of a tile begin at a multiple of it */

/* Halves for each position that together hold the mean of a tile: TILE times as many are no fewer than its dimensions. */
static inline long mean_share(long dims) { return (dims + TILE - 1) / TILE; }

enum rotation { OF_KEYS, OF_QUERIES };

/* Turn vectors so that what stands out in one dimension is spread over all: a Hadamard matrix over each stretch of the
 * largest power of two that divides ``dims``, which is no less than 8. Products of turned keys and queries are those of unturned ones. Keys that
 * are turned again as queries are come back. All factors are powers of two, so nothing but the additions rounds. */
void rotate(float *vectors, long count, long dims, enum rotation as);

/* Pack keys [TILE][dims], which are overwritten. ``at``: vectors before them, of numbers, scales, biases and means. */
void pack_tile(int bits, float *keys, long dims, long size, struct packed to, uint16_t *means, long at);

/* The mean of a turned tile, as floats. */
void mean_of_tile(const uint16_t *means, long at, long dims, float *mean);

/* The keys as they were, but for rounding. */
void unpack_tile(int bits, struct packed from, const uint16_t *means, long at, long dims, long size, float *keys);

#endif
