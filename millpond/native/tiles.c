/* Tiles of keys; see tiles.h. */

#include "tiles.h"

#include "halves.h"

typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));

#if defined(__clang__)
#define SHUFFLED(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
typedef int32_t places __attribute__((vector_size(32)));
#define SHUFFLED(x, ...) __builtin_shuffle(x, (places){__VA_ARGS__})
#endif

static float power_of_two(int exponent)
{
    float power = 1.0f;
    for (; exponent > 0; exponent--)
        power *= 2.0f;
    for (; exponent < 0; exponent++)
        power *= 0.5f;
    return power;
}

void rotate(float *vectors, long count, long dims, enum rotation as)
{
    long stretch = dims & -dims;
    int exponent = __builtin_ctzl((unsigned long)stretch);
    float factor = power_of_two(-(as == OF_KEYS ? exponent - exponent / 2 : exponent / 2));
    for (float *vector = vectors; vector < vectors + count * dims; vector += stretch) {
        for (eight *v = (eight *)vector; v < (eight *)(vector + stretch); v++) {
            eight x = *v;
            x = SHUFFLED(x, 1, 0, 3, 2, 5, 4, 7, 6) + x * (eight){1, -1, 1, -1, 1, -1, 1, -1};
            x = SHUFFLED(x, 2, 3, 0, 1, 6, 7, 4, 5) + x * (eight){1, 1, -1, -1, 1, 1, -1, -1};
            x = SHUFFLED(x, 4, 5, 6, 7, 0, 1, 2, 3) + x * (eight){1, 1, 1, 1, -1, -1, -1, -1};
            *v = x * factor;
        }
        for (long half = 8; half < stretch; half *= 2)
            for (long first = 0; first < stretch; first += 2 * half)
                for (eight *left = (eight *)(vector + first), *end = left + half / 8; left < end; left++) {
                    eight *right = left + half / 8, difference = *left - *right;
                    *left += *right;
                    *right = difference;
                }
    }
}

void pack_tile(int bits, float *keys, long dims, long size, struct packed to, uint16_t *means, long at)
{
    rotate(keys, TILE, dims, OF_KEYS);
    means += at * mean_share(dims);
    for (long i = 0; i < dims; i += 8) {
        eight mean = {0};
        for (long t = 0; t < TILE; t++)
            mean += *(eight *)(keys + t * dims + i);
        mean /= TILE;
        for (int j = 0; j < 8; j++) {
            /* A vector that is not finite must not spoil those beside it. */
            means[i + j] = mean[j] - mean[j] == 0.0f ? float_to_half(mean[j], 0) : 0;
            mean[j] = half_to_float(means[i + j]);
        }
        for (long t = 0; t < TILE; t++)
            *(eight *)(keys + t * dims + i) -= mean;
    }
    for (long i = dims; i < TILE * mean_share(dims); i++)
        means[i] = 0;
    pack_groups(bits, keys, TILE * (dims / size), size, to, at * (dims / size));
}

void mean_of_tile(const uint16_t *means, long at, long dims, float *mean)
{
    means += at * mean_share(dims);
    for (long i = 0; i < dims; i++)
        mean[i] = half_to_float(means[i]);
}

void unpack_tile(int bits, struct packed from, const uint16_t *means, long at, long dims, long size, float *keys)
{
    unpack_groups(bits, from, at * (dims / size), TILE * (dims / size), size, keys);
    means += at * mean_share(dims);
    for (long i = 0; i < dims; i++) {
        float mean = half_to_float(means[i]);
        for (long t = 0; t < TILE; t++)
            keys[t * dims + i] += mean;
    }
    rotate(keys, TILE, dims, OF_QUERIES);
}
