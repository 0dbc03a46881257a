/* Packing to 8 or 4 bits and back, as Python calls it: many vectors or tiles at once, on all cores. */

#include "common.h"
#include "kernels.h"
#include "pool.h"
#include "tiles.h"

enum { PIECE_NUMBERS = 64 * 1024 };

struct conversion {
    int32_t bits, unpacks;
    int64_t groups, size;
    float *floats;
    struct packed packed;
    uint16_t *means; /* NULL unless what is packed are keys of whole tiles */
    int64_t dims;    /* of those */
};

static long groups_per_piece(const struct conversion *c)
{
    return c->size < PIECE_NUMBERS ? PIECE_NUMBERS / c->size : 1;
}

static void run_piece(const void *data, long number)
{
    const struct conversion *c = data;
    long step = groups_per_piece(c), from = number * step;
    long count = c->groups - from < step ? c->groups - from : step;
    if (c->unpacks)
        unpack_groups(c->bits, c->packed, from, count, c->size, c->floats + from * c->size);
    else
        pack_groups(c->bits, c->floats + from * c->size, count, c->size, c->packed, from);
}

static void run_tile(const void *data, long number)
{
    const struct conversion *c = data;
    float *floats = c->floats + number * TILE * c->dims;
    if (c->unpacks)
        unpack_tile(c->bits, c->packed, c->means, number * TILE, c->dims, c->size, floats);
    else
        pack_tile(c->bits, floats, c->dims, c->size, c->packed, c->means, number * TILE);
}

/* Floats of tiles that are packed are overwritten. */
EXPORT void millpond_convert(const struct conversion *c)
{
    long step = groups_per_piece(c), pieces = (c->groups + step - 1) / step;
    void (*run)(const void *, long) = run_piece;
    if (c->means) {
        run = run_tile;
        pieces = c->groups * c->size / (TILE * c->dims);
    }
    if (pieces > 1 && pool_claim()) {
        pool_run(run, c, pieces, 1);
        return;
    }
    for (long number = 0; number < pieces; number++)
        run(c, number);
}
