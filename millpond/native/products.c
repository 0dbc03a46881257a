/* Products with weights as they are on disk.
 *
 * A matrix [outputs / share][inputs / share] stands for them: vectors [rows][inputs], seen as [inputs / share][rows *
 * share], times it are as many numbers as the product has, [rows][outputs]. So MLX makes room for the result and hands
 * over the vectors, and what happens in between is done here.
 *
 * Of experts the matrix is square, and what it is multiplied with says which of them each result is from: two counts, of
 * vectors and of results, then the vectors, and a number of an expert for each result. Each vector has as many results
 * as any other, one after the other. */

#include "products.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "carried.h"
#include "common.h"
#include "kernels.h"
#include "pool.h"
#include "whole_rows.h"

enum {
    /* Weights a thread takes at a time. */
    PIECE_BYTES = 32 * 1024,
    /* Outputs that are computed together. */
    STRIP = 16,
    /* Multiply-adds below which one thread is as fast as several, and below which a sleeping one wakes too late. */
    SHARED_MACS = 1 << 17,
    ROUSING_MACS = 1 << 18,
};

struct stand_in {
    int64_t share, experts;
    struct weights weights; /* of the first expert; those of the others follow */
};

/* Vectors as a product takes them: turned floats, or planes. */
struct vectors {
    const float *floats;
    struct planes planes;
    void *memory; /* to be freed behind the product */
};

/* Vectors that are multiplied with the same weights. */
struct part {
    struct matrix matrix;
    struct vectors vectors;
    long rows;
    float *result;
    long first, step; /* number of its first piece, and outputs of each */
};

struct parts {
    const struct part *parts;
    long count;
};

static void spoil(float *result, long count)
{
    for (long i = 0; i < count; i++)
        result[i] = NAN;
}

static void run_piece(const void *data, long number)
{
    const struct parts *all = data;
    long low = 0, high = all->count;
    while (high - low > 1) {
        long middle = (low + high) / 2;
        if (all->parts[middle].first <= number)
            low = middle;
        else
            high = middle;
    }
    const struct part *part = &all->parts[low];
    const struct weights *w = &part->matrix.weights;
    long from = (number - part->first) * part->step, to = smaller(from + part->step, w->outputs);
    float *room = scratch((size_t)(whole(w) ? whole_room(w) : packed_room(w)));
    if (!room) {
        for (long row = 0; row < part->rows; row++)
            spoil(part->result + row * w->outputs + from, to - from);
        return;
    }
    if (whole(w))
        whole_rows(w, room, part->rows, &part->vectors.planes, from, to, part->result, w->outputs);
    else
        packed_rows(w, room, part->rows, part->vectors.floats, from, to, part->result, w->outputs);
    if (part->matrix.bias)
        for (long row = 0; row < part->rows; row++)
            for (long j = from; j < to; j++)
                part->result[row * w->outputs + j] += part->matrix.bias[j];
}

/* All pieces of parts that are complete but for where their pieces begin. */
static void run_parts(struct part *parts, long count)
{
    long pieces = 0, macs = 0;
    for (struct part *part = parts; part < parts + count; part++) {
        const struct weights *w = &part->matrix.weights;
        long bytes = w->inputs * bits_of(w->format) / 8;
        part->first = pieces;
        part->step = larger(STRIP, PIECE_BYTES / bytes / STRIP * STRIP);
        pieces += (w->outputs + part->step - 1) / part->step;
        macs += part->rows * w->inputs * w->outputs;
    }
    const struct parts all = {parts, count};
    if (macs >= SHARED_MACS && pool_claim()) {
        pool_run(run_piece, &all, pieces, macs >= ROUSING_MACS);
        return;
    }
    for (long number = 0; number < pieces; number++)
        run_piece(&all, number);
}

/* Some numbers in the order that packed_rows takes. */
static void turn(const float *from, long size, long step, float *to)
{
    for (long at = 0; at < size; at += step)
        for (long i = 0; i < step / 2; i++) {
            to[at + i] = from[at + 2 * i];
            to[at + step / 2 + i] = from[at + 2 * i + 1];
        }
}

/* Vectors [rows][inputs] for products with such weights. Returns whether there was memory for it. */
static int take(const struct weights *w, const float *from, long rows, struct vectors *to)
{
    long size = rows * w->inputs, step = turned(w);
    *to = (struct vectors){.floats = from};
    if (!whole(w) && !step)
        return 1;
    to->memory = malloc(whole(w) ? planes_bytes(w, rows) : (size_t)size * sizeof(float));
    if (!to->memory)
        return 0;
    if (whole(w)) {
        to->planes = planes_at(w, rows, to->memory);
        take_rows(w, from, rows, &to->planes);
    } else {
        to->floats = to->memory;
        turn(from, size, step, to->memory);
    }
    return 1;
}

/* Whether vectors are the same to both. */
static int alike(const struct weights *a, const struct weights *b)
{
    return whole(a) == whole(b) && (whole(a) ? planes_alike(a, b) : turned(a) == turned(b));
}

/* Those of vectors behind the first ones. */
static struct vectors behind(const struct weights *w, const struct vectors *vectors, long rows)
{
    if (whole(w))
        return (struct vectors){.planes = planes_behind(w, &vectors->planes, rows)};
    return (struct vectors){.floats = vectors->floats + rows * w->inputs};
}

enum { MOST_MATRICES = 3 };

void run_products(const float *vectors, long rows, const struct matrix *const *matrices, float *const *results, long count)
{
    struct part parts[MOST_MATRICES];
    int sound = 1;
    for (long i = 0; i < count; i++) {
        parts[i] = (struct part){.matrix = *matrices[i], .rows = rows, .result = results[i]};
        if (i && alike(&matrices[i]->weights, &matrices[0]->weights)) {
            parts[i].vectors = parts[0].vectors;
            parts[i].vectors.memory = NULL;
        } else {
            sound = take(&matrices[i]->weights, vectors, rows, &parts[i].vectors) && sound;
        }
    }
    if (sound)
        run_parts(parts, count);
    for (long i = 0; i < count; i++) {
        if (!sound)
            spoil(results[i], rows * matrices[i]->weights.outputs);
        free(parts[i].vectors.memory);
    }
}

/* The weights of one of several experts. */
static struct weights expert_of(const struct weights *w, long expert)
{
    struct weights found = *w;
    long groups = w->outputs * (w->inputs / w->group);
    found.packed.numbers += expert * (w->outputs * w->inputs * bits_of(w->format) / 8);
    found.packed.scales = factors_at(w->packed.scales, w->scale_type, expert * groups);
    found.packed.biases = factors_at(w->packed.biases, w->scale_type, expert * groups);
    return found;
}

static void run_experts(const struct stand_in *s, const float *b, float *c)
{
    const struct weights *w = &s->weights;
    int64_t counts[2];
    memcpy(counts, b, sizeof counts);
    long vectors = counts[0], results = counts[1], k = w->inputs;
    const float *given = b + 4;
    const uint32_t *experts = (const uint32_t *)(given + vectors * k);
    long *ends = calloc((size_t)(s->experts + 1 + results), sizeof *ends), *places = ends + s->experts + 1;
    struct part *parts = malloc((size_t)smaller(results, s->experts) * sizeof *parts);
    float *sorted = malloc((size_t)(results * (k + w->outputs)) * sizeof(float)), *found = sorted + results * k;
    struct vectors taken = {0};
    int sound = ends && parts && sorted;
    for (long i = 0; i < results; i++)
        sound = sound && experts[i] < s->experts;
    if (sound) {
        for (long i = 0; i < results; i++)
            ends[experts[i] + 1]++;
        for (long e = 0; e < s->experts; e++)
            ends[e + 1] += ends[e];
        for (long i = 0; i < results; i++) {
            places[i] = ends[experts[i]]++;
            memcpy(sorted + places[i] * k, given + i / (results / vectors) * k, (size_t)k * sizeof(float));
        }
        sound = take(w, sorted, results, &taken);
    }
    if (sound) {
        long count = 0;
        for (long e = 0, from = 0; e < s->experts; from = ends[e++])
            if (ends[e] > from)
                parts[count++] = (struct part){.matrix.weights = expert_of(w, e),
                                               .vectors = behind(w, &taken, from),
                                               .rows = ends[e] - from,
                                               .result = found + from * w->outputs};
        run_parts(parts, count);
        for (long i = 0; i < results; i++)
            memcpy(c + i * w->outputs, found + places[i] * w->outputs, (size_t)w->outputs * sizeof(float));
    } else {
        spoil(c, results * w->outputs);
    }
    free(taken.memory);
    free(sorted);
    free(parts);
    free(ends);
}

void multiply_weights(void *job, const float *b, long columns, float *c)
{
    const struct stand_in *s = job;
    if (s->experts)
        run_experts(s, b, c);
    else
        run_products(b, columns / s->share, (const struct matrix *[]){&(struct matrix){s->weights, NULL}}, &c, 1);
}
