/* Attention of a block of queries for one instruction set; see kernels.h and instruction_set.h.
 *
 * Each query is a lane of vectors, whether products or a softmax are computed: nothing is turned but queries and results,
 * nothing is added up across a vector, and a query's bits depend on no other and on no place. Keys and values are read
 * where they stand, a number at a time for all lanes. */

enum { NAME(LANES) = 2 * WIDTH, NAME(BLOCK) = WIDTH == 16 ? 8 : 4 };

/* c[r][lanes], 0 at first or as they are, plus the sum over i of a[r * row_step + i * step] * b[i][lanes]. */
TARGET static inline __attribute__((always_inline)) void NAME(lane_block)(
    const int rows, int adds, long k, const float *a, long row_step, long step, const float *b, float *c)
{
    NAME(vec) acc[NAME(BLOCK)][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        const NAME(vec) *from = (const NAME(vec) *)(c + r * NAME(LANES));
        acc[r][0] = adds ? from[0] : (NAME(vec)){0};
        acc[r][1] = adds ? from[1] : (NAME(vec)){0};
    }
    for (long i = 0; i < k; i++) {
        NAME(vec) x = *(const NAME(vec) *)(b + i * NAME(LANES)), y = *(const NAME(vec) *)(b + i * NAME(LANES) + WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            float w = a[r * row_step + i * step];
            acc[r][0] += w * x;
            acc[r][1] += w * y;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        NAME(vec) *to = (NAME(vec) *)(c + r * NAME(LANES));
        to[0] = acc[r][0];
        to[1] = acc[r][1];
    }
}

TARGET static void NAME(lane_product)(int adds, long m, long k, const float *a, long row_step, long step, const float *b,
                                      float *c)
{
    long r = 0;
    for (; r + NAME(BLOCK) <= m; r += NAME(BLOCK))
        NAME(lane_block)(NAME(BLOCK), adds, k, a + r * row_step, row_step, step, b, c + r * NAME(LANES));
    for (; r < m; r++)
        NAME(lane_block)(1, adds, k, a + r * row_step, row_step, step, b, c + r * NAME(LANES));
}

/* Scores of keys that a lane does not see become minus infinity. ``from``: the number of the first of them. */
TARGET static void NAME(hide)(const struct attended *a, long lane, long from, long count, float *scores)
{
    for (long r = 0; r < NAME(LANES); r++) {
        const unsigned char *mask = a->masks[lane + r];
        long seen = a->seen[lane + r] - from;
        for (long j = 0; mask && j < smaller(seen, count); j++)
            scores[j * NAME(LANES) + r] = mask[from + j] ? scores[j * NAME(LANES) + r] : -INFINITY;
        for (long j = larger(seen, 0); j < count; j++)
            scores[j * NAME(LANES) + r] = -INFINITY;
    }
}

/* One softmax per lane of vector ``v``, of scores so far; what was summed up before is multiplied by what is returned. */
TARGET static NAME(vec) NAME(soften)(float *scores, long count, float *largest, float *sum)
{
    NAME(vec) before = *(NAME(vec) *)largest, most = before;
    for (long j = 0; j < count; j++)
        most = NAME(larger)(*(const NAME(vec) *)(scores + j * NAME(LANES)), most);
    NAME(vec) base = (NAME(vec))((NAME(ints))most & (most > -INFINITY)); /* 0: nothing is seen yet */
    NAME(vec) total = {0};
    for (long j = 0; j < count; j++) {
        NAME(vec) weight = NAME(power)(*(const NAME(vec) *)(scores + j * NAME(LANES)) - base);
        *(NAME(vec) *)(scores + j * NAME(LANES)) = weight;
        total += weight;
    }
    NAME(vec) factor = NAME(power)(before - base);
    *(NAME(vec) *)largest = most;
    *(NAME(vec) *)sum = *(NAME(vec) *)sum * factor + total;
    return factor;
}

TARGET static void NAME(attend_lanes)(const struct attended *a, float *room)
{
    float largest[QUERIES], sum[QUERIES] = {0};
    float *queries = room, *mixed = queries + QUERIES * a->dims, *scores = mixed + QUERIES * a->value_dims;
    long width = 0, shown = LONG_MAX;
    for (long r = 0; r < QUERIES; r++) {
        float *to = queries + r / NAME(LANES) * NAME(LANES) * a->dims + r % NAME(LANES);
        for (long i = 0; i < a->dims; i++)
            to[i * NAME(LANES)] = a->queries[r] ? a->queries[r][i] * a->scale : 0.0f;
        largest[r] = -INFINITY;
        width = larger(width, a->seen[r]);
        shown = a->masks[r] ? 0 : smaller(shown, a->seen[r]);
    }
    memset(mixed, 0, (size_t)(QUERIES * a->value_dims) * sizeof *mixed);
    for (long from = 0; from < width; from += KEYS) {
        long count = smaller(KEYS, width - from);
        const float *keys = a->keys + from * a->key_step, *values = a->values + from * a->value_step;
        for (long lane = 0; lane < QUERIES; lane += NAME(LANES)) {
            float *to = mixed + lane * a->value_dims;
            NAME(lane_product)(0, count, a->dims, keys, a->key_step, 1, queries + lane * a->dims, scores);
            if (from + count > shown)
                NAME(hide)(a, lane, from, count, scores);
            NAME(vec) low = NAME(soften)(scores, count, largest + lane, sum + lane);
            NAME(vec) high = NAME(soften)(scores + WIDTH, count, largest + lane + WIDTH, sum + lane + WIDTH);
            for (long i = 0; from && i < a->value_dims; i++) {
                *(NAME(vec) *)(to + i * NAME(LANES)) *= low;
                *(NAME(vec) *)(to + i * NAME(LANES) + WIDTH) *= high;
            }
            NAME(lane_product)(1, a->value_dims, count, values, 1, a->value_step, scores, to);
        }
    }
    for (long r = 0; r < QUERIES; r++) {
        const float *from = mixed + r / NAME(LANES) * NAME(LANES) * a->value_dims + r % NAME(LANES);
        for (long i = 0; a->results[r] && i < a->value_dims; i++)
            a->results[r][i] = from[i * NAME(LANES)] / sum[r];
    }
}
