/* The attention of a decode step, or of drafts being verified, on the CPU: for every row write its new keys and values
 * into its slots, then attend to everything its queries may see. One call per layer for all rows.
 *
 * One piece of work is one row, one key head and SPLIT positions: all queries that share the head go over a tile of
 * keys while it is in the cache, and packed keys and values are unpacked tile by tile. Pieces and tiles are cut by
 * position alone, so a row's bits depend neither on its neighbours nor on the number of threads.
 * A carried job, see carried.h: the right matrix holds queries, keys and values. */

#include "decode.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "carried.h"
#include "common.h"
#include "kernels.h"
#include "pool.h"
#include "tiles.h"

enum { SPLIT = 512, SETTLE_NUMBERS = 32 * 1024 };

/* One call: what the job works on besides the slots. All without gaps. */
struct call {
    const struct slots *slots;
    const int64_t *lengths; /* tokens of each row before this forward */
    const int64_t *ends;    /* of tiled slots: where each row's newest positions begin */
    const int64_t *settled; /* the same when this forward begins: tiles between the two are packed first */
    const float *queries;   /* [rows, heads, length, dims] */
    const float *keys;      /* [rows, groups, length, dims] */
    const float *values;    /* [rows, groups, length, value_dims] */
    float *result;          /* [rows, length, heads, value_dims] */
};

struct settling {
    const struct call *call;
    int *sound; /* 0 once a thread has lacked memory */
};

/* Which store has a position of a row, and at which of its columns. */
static int place(const struct call *call, long row, long position, long *column)
{
    const struct slots *s = call->slots;
    int which = position < s->exact ? 0 : s->tiled && position >= call->ends[row] ? 2 : 1;
    if (which == 0)
        *column = position;
    else if (which == 2 || s->window)
        *column = position % s->keys[which].capacity;
    else
        *column = position - s->exact;
    return which;
}

static long vector_at(const struct slots *s, const struct store *store, long row, long group, long column)
{
    return (row * s->groups + group) * store->capacity + column;
}

static void put(const struct store *store, long at, long dims, const float *from)
{
    if (store->bits == 32)
        memcpy((float *)store->packed.numbers + at * dims, from, (size_t)dims * sizeof(float));
    else
        pack_groups(store->bits, from, dims / store->group, store->group, store->packed, at * (dims / store->group));
}

/* Copy TILE vectors from a ring. */
static void gather(const struct slots *s, const struct store *ring, long row, long group, long first, long dims, float *to)
{
    for (long t = 0; t < TILE; t++) {
        long at = vector_at(s, ring, row, group, (first + t) % ring->capacity);
        memcpy(to + t * dims, (const float *)ring->packed.numbers + at * dims, (size_t)dims * sizeof(float));
    }
}

/* Pack what has become a tile of the newest positions of one row and group. */
static void settle_piece(const void *data, long number)
{
    const struct settling *settling = data;
    const struct call *call = settling->call;
    const struct slots *s = call->slots;
    long row = number / s->groups, group = number % s->groups;
    if (call->settled[row] >= call->ends[row])
        return;
    float *room = scratch((size_t)(TILE * larger(s->dims, s->value_dims)));
    if (!room) {
        __atomic_store_n(settling->sound, 0, __ATOMIC_RELAXED);
        return;
    }
    for (long first = call->settled[row]; first < call->ends[row]; first += TILE) {
        const struct store *keys = &s->keys[1], *values = &s->values[1];
        long at = vector_at(s, keys, row, group, first - s->exact);
        gather(s, &s->keys[2], row, group, first, s->dims, room);
        pack_tile(keys->bits, room, s->dims, keys->group, keys->packed, keys->means, at);
        gather(s, &s->values[2], row, group, first, s->value_dims, room);
        long each = s->value_dims / values->group;
        pack_groups(values->bits, room, TILE * each, values->group, values->packed, at * each);
    }
}

/* The same for all rows. Returns whether there was memory for it. */
static int settle(const struct call *call)
{
    const struct slots *s = call->slots;
    int sound = 1;
    struct settling settling = {call, &sound};
    long numbers = 0;
    if (s->tiled)
        for (long row = 0; row < s->rows; row++)
            numbers += larger(0, call->ends[row] - call->settled[row]) * s->groups * (s->dims + s->value_dims);
    if (numbers >= SETTLE_NUMBERS && pool_claim())
        pool_run(settle_piece, &settling, s->rows * s->groups, 1);
    else if (numbers)
        for (long number = 0; number < s->rows * s->groups; number++)
            settle_piece(&settling, number);
    return sound;
}

static void write_row(const struct call *call, long row)
{
    const struct slots *s = call->slots;
    for (long l = 0; l < s->length; l++) {
        long column;
        int which = place(call, row, call->lengths[row] + l, &column);
        for (long group = 0; group < s->groups; group++) {
            long at = vector_at(s, &s->keys[which], row, group, column);
            long from = (row * s->groups + group) * s->length + l;
            put(&s->keys[which], at, s->dims, call->keys + from * s->dims);
            put(&s->values[which], at, s->value_dims, call->values + from * s->value_dims);
        }
    }
}

/* --- one piece ----------------------------------------------------------------------------------------------------- */

struct piece {
    int64_t row, group, from, to; /* positions */
    float *part;                  /* where its result goes for merging; NULL when it is the only one of its row */
};

struct work {
    const struct call *call;
    const struct piece *pieces;
};

static const float *floats_of(const struct store *store, long at, long count, long dims, float *room)
{
    if (store->bits == 32)
        return (const float *)store->packed.numbers + at * dims;
    long groups = dims / store->group;
    unpack_groups(store->bits, store->packed, at * groups, count * groups, store->group, room);
    return room;
}

/* What of a result comes from one piece: sums over values, then for every query its largest score and its sum. */
static long part_size(const struct slots *s)
{
    return s->heads / s->groups * s->length * (s->value_dims + 2);
}

static float *result_of(const struct call *call, const struct piece *piece, long query)
{
    const struct slots *s = call->slots;
    long share = s->heads / s->groups, head = piece->group * share + query % share;
    return call->result + ((piece->row * s->length + query / share) * s->heads + head) * s->value_dims;
}

/* There is no memory for it. Not a number is found by whoever reads the result, and only this row's request fails. */
static void lose_piece(const struct call *call, const struct piece *piece)
{
    const struct slots *s = call->slots;
    long queries = s->heads / s->groups * s->length;
    if (piece->part)
        for (long i = 0; i < part_size(s); i++)
            piece->part[i] = NAN;
    for (long q = 0; q < queries; q++)
        for (long i = 0; i < s->value_dims; i++)
            result_of(call, piece, q)[i] = NAN;
}

static void run_piece(const void *data, long number)
{
    const struct call *call = ((const struct work *)data)->call;
    const struct slots *s = call->slots;
    const struct piece *piece = &((const struct work *)data)->pieces[number];
    long share = s->heads / s->groups, queries = share * s->length, length = call->lengths[piece->row];
    float *memory = scratch((size_t)(queries * (s->dims * 2 + s->value_dims * 2 + TILE + 3)
                                     + (TILE + 1) * larger(s->dims, s->value_dims)) + 64);
    if (!memory) {
        lose_piece(call, piece);
        return;
    }
    float *scaled = memory, *mixed = scaled + queries * s->dims, *added = mixed + queries * s->value_dims;
    float *scores = added + queries * s->value_dims, *room = scores + queries * TILE;
    struct running *running = (struct running *)(room + TILE * larger(s->dims, s->value_dims));
    float *turned = (float *)(running + queries), *mean = turned + queries * s->dims, *raised = mean + s->dims;
    for (long q = 0; q < queries; q++) {
        const float *from =
            call->queries + ((piece->row * s->heads + piece->group * share + q % share) * s->length + q / share) * s->dims;
        for (long i = 0; i < s->dims; i++)
            scaled[q * s->dims + i] = from[i] * (float)s->scale;
        running[q] = (struct running){-INFINITY, 0.0f};
    }
    if (s->tiled) {
        memcpy(turned, scaled, (size_t)(queries * s->dims) * sizeof(float));
        rotate(turned, queries, s->dims, OF_QUERIES);
    }
    memset(mixed, 0, (size_t)(queries * s->value_dims) * sizeof(float));
    for (long at = piece->from, next; at < piece->to; at = next) {
        long column;
        int which = place(call, piece->row, at, &column);
        const struct store *keys = &s->keys[which], *values = &s->values[which];
        next = smaller(piece->to, smaller(at / TILE * TILE + TILE, at + keys->capacity - column));
        long cols = next - at, first = vector_at(s, keys, piece->row, piece->group, column);
        dot_rows(queries, cols, s->dims, keys->means ? turned : scaled, s->dims,
                 floats_of(keys, first, cols, s->dims, room), s->dims, scores, TILE);
        if (keys->means) {
            mean_of_tile(keys->means, first, s->dims, mean);
            dot_rows(queries, 1, s->dims, turned, s->dims, mean, s->dims, raised, 1);
            for (long q = 0; q < queries; q++)
                for (long j = 0; j < cols; j++)
                    scores[q * TILE + j] += raised[q];
        }
        for (long q = 0; q < queries; q++) {
            float *row = scores + q * TILE;
            long own = length + q / share, past = own + 1 - at, before = s->window ? own + 1 - s->window - at : 0;
            for (long j = 0; j < smaller(before, cols); j++)
                row[j] = -INFINITY;
            for (long j = larger(0, smaller(past, cols)); j < (cols + WIDEST - 1) / WIDEST * WIDEST; j++)
                row[j] = -INFINITY;
            float factor = softmax_row(row, (cols + WIDEST - 1) / WIDEST * WIDEST, &running[q]);
            if (factor != 1.0f)
                for (long i = 0; i < s->value_dims; i++)
                    mixed[q * s->value_dims + i] *= factor;
        }
        mix_rows(queries, s->value_dims, cols, scores, TILE, floats_of(values, first, cols, s->value_dims, room),
                 s->value_dims, added, s->value_dims);
        for (long i = 0; i < queries * s->value_dims; i++)
            mixed[i] += added[i];
    }
    if (piece->part) {
        memcpy(piece->part, mixed, (size_t)(queries * s->value_dims) * sizeof(float));
        memcpy(piece->part + queries * s->value_dims, running, (size_t)queries * sizeof(struct running));
        return;
    }
    for (long q = 0; q < queries; q++) {
        float *to = result_of(call, piece, q);
        for (long i = 0; i < s->value_dims; i++)
            to[i] = mixed[q * s->value_dims + i] / running[q].sum;
    }
}

/* --- all of them --------------------------------------------------------------------------------------------------- */

/* The pieces of one row and key head; returns how many. */
static long cut_row(const struct call *call, long row, long group, struct piece *pieces)
{
    const struct slots *s = call->slots;
    long last = call->lengths[row] + s->length; /* behind the newest token */
    long first = s->window ? larger(0, call->lengths[row] + 1 - s->window) : 0, count = 0;
    for (long at = first; at < last; at = at / SPLIT * SPLIT + SPLIT)
        pieces[count++] = (struct piece){row, group, at, smaller(last, at / SPLIT * SPLIT + SPLIT), NULL};
    return count;
}

/* Put the parts of one row and key head together, the first one first. */
static void merge(const struct call *call, const struct piece *pieces, long count)
{
    long dims = call->slots->value_dims;
    long queries = call->slots->heads / call->slots->groups * call->slots->length;
    for (long q = 0; q < queries; q++) {
        float *to = result_of(call, pieces, q), largest = -INFINITY, sum = 0.0f;
        for (long p = 0; p < count; p++)
            largest = fmaxf(largest, ((const struct running *)(pieces[p].part + queries * dims))[q].largest);
        memset(to, 0, (size_t)dims * sizeof(float));
        for (long p = 0; p < count; p++) {
            const struct running *part = (const struct running *)(pieces[p].part + queries * dims) + q;
            float factor = exp2f(part->largest - largest);
            sum += part->sum * factor;
            for (long i = 0; i < dims; i++)
                to[i] += pieces[p].part[q * dims + i] * factor;
        }
        for (long i = 0; i < dims; i++)
            to[i] /= sum;
    }
}

static void run_pieces(const struct work *work, long pieces, long macs)
{
    if (pieces > 1 && macs >= SHARE_MACS && pool_claim()) {
        pool_run(run_piece, work, pieces, macs >= WAKE_MACS);
        return;
    }
    for (long number = 0; number < pieces; number++)
        run_piece(work, number);
}

static void run(const struct call *call)
{
    const struct slots *s = call->slots;
    long most = 0, tokens = 0;
    int sound = !s->writes || settle(call);
    for (long row = 0; row < s->rows; row++) {
        if (s->writes)
            write_row(call, row);
        tokens += call->lengths[row] + s->length;
        most += (call->lengths[row] + s->length) / SPLIT + 2;
    }
    most *= s->groups;
    struct piece *pieces = malloc((size_t)most * sizeof *pieces);
    float *parts = malloc((size_t)(most * part_size(s)) * sizeof(float));
    if (!pieces || !parts || !sound) {
        /* Not a number is found by whoever reads the result, and the requests of this step fail. */
        for (long i = 0; i < s->rows * s->length * s->heads * s->value_dims; i++)
            call->result[i] = NAN;
        free(pieces);
        free(parts);
        return;
    }
    long count = 0;
    for (long row = 0; row < s->rows; row++)
        for (long group = 0; group < s->groups; group++) {
            long added = cut_row(call, row, group, pieces + count);
            for (long p = count; added > 1 && p < count + added; p++)
                pieces[p].part = parts + p * part_size(s);
            count += added;
        }
    run_pieces(&(struct work){call, pieces}, count, tokens * s->heads * s->length * (s->dims + s->value_dims));
    for (long p = 0, next; p < count; p = next) {
        for (next = p + 1; next < count && pieces[next].row == pieces[p].row && pieces[next].group == pieces[p].group;)
            next++;
        if (pieces[p].part)
            merge(call, pieces + p, next - p);
    }
    free(pieces);
    free(parts);
}

void attend(const struct slots *s, const int64_t *told, const struct fresh *f)
{
    run(&(struct call){s, told, told + s->rows, told + 2 * s->rows, f->queries, f->keys, f->values, f->result});
}

/* What stands in the left matrix. */
struct attending {
    struct slots slots;
    int64_t told[];
};

void attend_slots(void *job, const float *b, long columns, float *c)
{
    (void)columns;
    const struct attending *attending = job;
    const struct slots *s = &attending->slots;
    long queries = s->rows * s->heads * s->length * s->dims, keys = s->rows * s->groups * s->length * s->dims;
    attend(s, attending->told, &(struct fresh){b, b + queries, b + queries + keys, c});
}
