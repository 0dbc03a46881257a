/* Attention of many queries on the CPU, so that scores never leave the cache.
 *
 * MLX computes every score, then masks, subtracts, exponentiates and sums them in passes over memory, one element at a
 * time on one thread; in a long prompt that takes longer than all the products with weights. Here one piece of work is
 * QUERIES queries, of all the heads that share a head of keys: scores of KEYS keys at a time, weights relative to the
 * largest score so far, and what was summed up before multiplied down whenever a larger one comes ("online softmax",
 * Milakov and Gimelshein 2018). A query's bits depend on what it sees alone, as long as that is finite: a prompt has the
 * same in whatever chunks it is read. */

#include "attention.h"

#include <math.h>
#include <stdint.h>

#include "common.h"
#include "kernels.h"
#include "pool.h"

static long blocks(const struct attention *a)
{
    return (a->length * (a->heads / a->groups) + QUERIES - 1) / QUERIES;
}

static void run_piece(const void *data, long number)
{
    const struct attention *a = data;
    /* Pieces are handed out from the last one down: blocks with the most keys come first. */
    long group = number % a->groups, batch = number / a->groups % a->batch, block = number / a->groups / a->batch;
    long share = a->heads / a->groups;
    struct attended piece = {
        .keys = (const float *)a->keys.base + batch * a->keys.step[0] + group * a->keys.step[1],
        .values = (const float *)a->values.base + batch * a->values.step[0] + group * a->values.step[1],
        .key_step = a->keys.step[2],
        .value_step = a->values.step[2],
        .dims = a->dims,
        .value_dims = a->value_dims,
        .scale = a->scale,
    };
    for (long r = 0; r < QUERIES; r++) {
        long place = (block * QUERIES + r) / share, head = group * share + (block * QUERIES + r) % share;
        piece.seen[r] = a->causal ? a->width - a->length + smaller(place, a->length - 1) + 1 : a->width;
        if (place >= a->length)
            continue;
        piece.queries[r] = (const float *)a->queries.base + batch * a->queries.step[0] + head * a->queries.step[1]
                           + place * a->queries.step[2];
        piece.results[r] = a->result + ((batch * a->length + place) * a->heads + head) * a->value_dims;
        if (a->mask.base)
            piece.masks[r] = (const unsigned char *)a->mask.base + batch * a->mask.step[0] + head * a->mask.step[1]
                             + place * a->mask.step[2];
    }
    float *room = scratch((size_t)attended_room(a->dims, a->value_dims));
    if (room) {
        attend_lanes(&piece, room);
        return;
    }
    /* Not a number is found by whoever reads the result, and only this request fails. */
    for (long r = 0; r < QUERIES; r++)
        for (long i = 0; piece.results[r] && i < a->value_dims; i++)
            piece.results[r][i] = NAN;
}

void attend_queries(const struct attention *a)
{
    long pieces = blocks(a) * a->groups * a->batch;
    if (pool_claim()) {
        pool_run(run_piece, a, pieces, 1);
        return;
    }
    for (long number = pieces - 1; number >= 0; number--)
        run_piece(a, number);
}

EXPORT void millpond_attention(const struct attention *a) { attend_queries(a); }
