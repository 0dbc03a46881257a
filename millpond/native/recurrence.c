/* The recurrence of a recurrent layer on the CPU: for every row and head, what the tokens of a forward make of its state,
 * and what they read there. One call per layer for all rows; the state is read and written once, however many tokens
 * there are. A head's bits depend neither on its neighbours, nor on how the tokens are cut into forwards, nor on the
 * number of threads. A carried job: see carried.h. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "carried.h"
#include "common.h"
#include "kernels.h"
#include "pool.h"

/* What stands in the left matrix, with the numbers of the tokens behind it; the right one is the states [rows, heads,
 * values, keys], and the result the new ones. What is read takes the place of the values: MLX knows of one result only,
 * and where it held both, states would have gaps between them. */
struct recurrent {
    int64_t rows, columns, key_heads, heads, keys, values;
    int64_t apart;    /* whether each number of a key decays by itself */
    int64_t corrects; /* whether a part of what the state does not say already is added, and not the value */
    int64_t masked;
    /* Queries and keys [rows, columns, key_heads, keys], values [rows, columns, heads, values], decays [rows, columns,
     * heads] or [.., keys], parts [rows, columns, heads], and which columns count [rows, columns]. */
    float numbers[];
};

struct heads {
    struct recurrent *job;
    const float *before;
    float *after;
};

static void run_head(const void *data, long number)
{
    const struct heads *heads = data;
    struct recurrent *j = heads->job;
    long row = number / j->heads, head = number % j->heads, columns = j->rows * j->columns, place = row * j->columns;
    long each = j->apart ? j->keys : 1, size = j->keys * j->values;
    const float *queries = j->numbers, *keyed = queries + columns * j->key_heads * j->keys;
    float *values = j->numbers + 2 * columns * j->key_heads * j->keys;
    const float *decays = values + columns * j->heads * j->values;
    const float *shares = decays + columns * j->heads * each;
    const float *counted = shares + (j->corrects ? columns * j->heads : 0);
    long key_at = (place * j->key_heads + head / (j->heads / j->key_heads)) * j->keys, at = place * j->heads + head;
    struct recurrence g = {
        .columns = j->columns,
        .keys = j->keys,
        .count = j->values,
        .queries = queries + key_at,
        .keyed = keyed + key_at,
        .key_step = j->key_heads * j->keys,
        .values = values + at * j->values,
        .results = values + at * j->values,
        .value_step = j->heads * j->values,
        .decays = decays + at * each,
        .decay_step = j->heads * each,
        .apart = (int)j->apart,
        .shares = j->corrects ? shares + at : NULL,
        .share_step = j->heads,
        .counted = j->masked ? counted + place : NULL,
    };
    memcpy(heads->after + number * size, heads->before + number * size, (size_t)size * sizeof(float));
    recur(&g, heads->after + number * size);
}

void run_recurrence(void *job, const float *b, long columns, float *c)
{
    (void)columns;
    struct recurrent *j = job;
    const struct heads heads = {j, b, c};
    long pieces = j->rows * j->heads, macs = pieces * j->keys * j->values * (1 + 2 * j->columns);
    if (macs >= SHARE_MACS && pool_claim()) {
        pool_run(run_head, &heads, pieces, macs >= WAKE_MACS);
        return;
    }
    for (long number = 0; number < pieces; number++)
        run_head(&heads, number);
}
