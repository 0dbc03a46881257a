/* Attention of many queries on the CPU, tile by tile, so that scores never leave the cache.
 *
 * MLX computes every score, then masks, subtracts, exponentiates and sums them in passes over memory, one element at a
 * time on one thread; in a long prompt that takes longer than all the products with weights. Here one piece of work is
 * one head and QUERY_TILE queries: scores of KEY_TILE keys at a time, weights relative to the largest score so far, and
 * what was summed up before multiplied down whenever a larger one comes ("online softmax", Milakov and Gimelshein 2018).
 *
 * OpenBLAS's sums depend on the shape of a product. Tiles therefore begin and end at multiples of QUERY_TILE counted from
 * the first key, not from the first query: a prompt has the same bits in whatever chunks it is read, as long as they end
 * at such multiples. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "gemm.h"
#include "kernels.h"
#include "pool.h"

enum { QUERY_TILE = 64, KEY_TILE = 256 };

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

struct tile {
    long first, rows; /* queries */
    float *queries, *scores, *mixed;
    struct running running[QUERY_TILE];
};

/* Scores of one tile's row that are not seen become minus infinity, and those behind the last one too. */
static void hide(const struct attention *a, const struct tile *tile, long row, const unsigned char *mask, long from,
                 long cols)
{
    float *scores = tile->scores + row * KEY_TILE;
    long seen = cols;
    if (a->causal) {
        long last = a->width - a->length + tile->first + row; /* the key of the query itself */
        seen = last + 1 - from < 0 ? 0 : smaller(cols, last + 1 - from);
    }
    if (mask)
        for (long j = 0; j < seen; j++)
            scores[j] = mask[j] ? scores[j] : -INFINITY;
    for (long j = seen; j < (cols + WIDEST - 1) / WIDEST * WIDEST; j++)
        scores[j] = -INFINITY;
}

static void run_tile(const struct attention *a, long batch, long head, struct tile *tile)
{
    long group = head / (a->heads / a->groups), dims = a->dims, value_dims = a->value_dims;
    const float *keys = (const float *)a->keys.base + batch * a->keys.step[0] + group * a->keys.step[1];
    const float *values = (const float *)a->values.base + batch * a->values.step[0] + group * a->values.step[1];
    for (long r = 0; r < tile->rows; r++) {
        const float *from = (const float *)a->queries.base + batch * a->queries.step[0] + head * a->queries.step[1]
                            + (tile->first + r) * a->queries.step[2];
        for (long i = 0; i < dims; i++)
            tile->queries[r * dims + i] = from[i] * a->scale;
        tile->running[r] = (struct running){-INFINITY, 0.0f};
    }
    memset(tile->mixed, 0, (size_t)(tile->rows * value_dims) * sizeof(float));
    long width = a->causal ? a->width - a->length + tile->first + tile->rows : a->width;
    for (long from = 0; from < width; from += KEY_TILE) {
        long cols = smaller(KEY_TILE, width - from);
        next_sgemm(ROW_MAJOR, NO_TRANS, TRANS, (int)tile->rows, (int)cols, (int)dims, 1.0f, tile->queries, (int)dims,
                   keys + from * a->keys.step[2], (int)a->keys.step[2], 0.0f, tile->scores, KEY_TILE);
        for (long r = 0; r < tile->rows; r++) {
            const unsigned char *mask = a->mask.base;
            if (mask)
                mask += batch * a->mask.step[0] + head * a->mask.step[1] + (tile->first + r) * a->mask.step[2] + from;
            hide(a, tile, r, mask, from, cols);
            float factor = softmax_row(tile->scores + r * KEY_TILE, (cols + WIDEST - 1) / WIDEST * WIDEST,
                                       &tile->running[r]);
            if (factor != 1.0f)
                for (long i = 0; i < value_dims; i++)
                    tile->mixed[r * value_dims + i] *= factor;
        }
        next_sgemm(ROW_MAJOR, NO_TRANS, NO_TRANS, (int)tile->rows, (int)value_dims, (int)cols, 1.0f, tile->scores,
                   KEY_TILE, values + from * a->values.step[2], (int)a->values.step[2], 1.0f, tile->mixed,
                   (int)value_dims);
    }
    for (long r = 0; r < tile->rows; r++) {
        float *to = a->result + ((batch * a->length + tile->first + r) * a->heads + head) * value_dims;
        for (long i = 0; i < value_dims; i++)
            to[i] = tile->mixed[r * value_dims + i] / tile->running[r].sum;
    }
}

/* Keys before the first query, in the part of a tile that they fill. */
static long skew(const struct attention *a)
{
    return a->width > a->length ? (a->width - a->length) % QUERY_TILE : 0;
}

static void run_piece(const void *data, long number)
{
    const struct attention *a = data;
    /* Pieces are handed out from the last one down: tiles with the most keys come first. */
    long head = number % a->heads, batch = number / a->heads % a->batch;
    long from = number / a->heads / a->batch * QUERY_TILE - skew(a), first = from < 0 ? 0 : from;
    struct tile tile = {.first = first, .rows = smaller(from + QUERY_TILE, a->length) - first};
    float *memory = scratch(QUERY_TILE * (KEY_TILE + a->dims + a->value_dims));
    if (!memory) {
        /* Not a number is found by whoever reads the result, and only this request fails. */
        for (long r = 0; r < tile.rows; r++)
            for (long i = 0; i < a->value_dims; i++)
                a->result[((batch * a->length + tile.first + r) * a->heads + head) * a->value_dims + i] = NAN;
        return;
    }
    tile.scores = memory;
    tile.queries = memory + QUERY_TILE * KEY_TILE;
    tile.mixed = tile.queries + QUERY_TILE * a->dims;
    run_tile(a, batch, head, &tile);
}

EXPORT void millpond_attention(const struct attention *a)
{
    long pieces = (a->length + skew(a) + QUERY_TILE - 1) / QUERY_TILE * a->heads * a->batch;
    if (pool_claim()) {
        pool_run(run_piece, a, pieces, 1);
        return;
    }
    for (long number = pieces - 1; number >= 0; number--)
        run_piece(a, number);
}
