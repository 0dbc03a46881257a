/* One layer of a transformer in a decode step, or of drafts being verified, on the CPU: norms, products, rotations,
 * attention over slots, and sums, for all rows. In between MLX would be called sixty times, which costs a step of few rows
 * more than its products. A carried job, see carried.h: the right matrix is what the layers before have left, and the
 * result what this one leaves, [rows * length, hidden] both. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "carried.h"
#include "common.h"
#include "decode.h"
#include "kernels.h"
#include "products.h"

struct norm {
    const float *weight; /* NULL: there is none */
    double eps;
};

struct layer {
    int64_t hidden, inner; /* numbers of a vector, and of what is gated */
    struct norm before, attended, between, done; /* in front of attention and the products, and behind them */
    struct norm queries, keys;                   /* of each head */
    struct matrix query, key, value, output, gate, up, down;
    const float *turns; /* of each position: cosines of half of what is rotated, then sines */
    int64_t rotated;    /* first numbers of a head that are */
    int64_t kind;       /* how it is gated */
};

/* What stands in the left matrix. */
struct layered {
    struct layer layer;
    struct slots slots;
    int64_t told[];
};

static void norm_all(const struct norm *norm, const float *from, long count, long size, float *to)
{
    for (long i = 0; i < count; i++)
        normalise(from + i * size, norm->weight, size, (float)norm->eps, to + i * size);
}

static void rotate_head(const struct layer *l, long position, float *head)
{
    long half = l->rotated / 2;
    const float *cosines = l->turns + position * l->rotated, *sines = cosines + half;
    for (long i = 0; i < half; i++) {
        float first = head[i], second = head[i + half];
        head[i] = first * cosines[i] - second * sines[i];
        head[i + half] = second * cosines[i] + first * sines[i];
    }
}

/* Heads of vectors [rows][length][heads][dims] in the order of attention, [rows][heads][length][dims], ready for it. */
static void take_heads(const struct layered *job, const struct norm *norm, int rotates, const float *from, long heads,
                       long dims, float *to)
{
    const struct slots *s = &job->slots;
    for (long row = 0; row < s->rows; row++)
        for (long t = 0; t < s->length; t++)
            for (long h = 0; h < heads; h++) {
                const float *source = from + ((row * s->length + t) * heads + h) * dims;
                float *head = to + ((row * heads + h) * s->length + t) * dims;
                if (norm && norm->weight)
                    normalise(source, norm->weight, dims, (float)norm->eps, head);
                else
                    memcpy(head, source, (size_t)dims * sizeof(float));
                if (rotates && job->layer.rotated)
                    rotate_head(&job->layer, job->told[row] + t, head);
            }
}

/* to = residual + what was added, which is normed first where that is asked for. */
static void add_all(const struct norm *norm, const float *residual, float *added, long count, long size, float *to)
{
    if (norm->weight)
        norm_all(norm, added, count, size, added);
    for (long i = 0; i < count * size; i++)
        to[i] = residual[i] + added[i];
}

void run_layer(void *described, const float *b, long columns, float *c)
{
    (void)columns;
    const struct layered *job = described;
    const struct layer *l = &job->layer;
    const struct slots *s = &job->slots;
    long n = s->rows * s->length, queries = s->heads * s->dims, keys = s->groups * s->dims;
    long values = s->groups * s->value_dims, mixed = s->heads * s->value_dims;
    float *memory = malloc((size_t)(n * (2 * (l->hidden + queries + keys + values + l->inner) + mixed)) * sizeof(float));
    if (!memory) {
        for (long i = 0; i < n * l->hidden; i++)
            c[i] = NAN;
        return;
    }
    float *normed = memory, *added = normed + n * l->hidden, *gate = added + n * l->hidden, *up = gate + n * l->inner;
    float *raw = up + n * l->inner, *heads = raw + n * (queries + keys + values);
    float *result = heads + n * (queries + keys + values);
    float *const computed[] = {raw, raw + n * queries, raw + n * (queries + keys)};
    float *const taken[] = {heads, heads + n * queries, heads + n * (queries + keys)};

    norm_all(&l->before, b, n, l->hidden, normed);
    run_products(normed, n, (const struct matrix *[]){&l->query, &l->key, &l->value}, computed, 3);
    take_heads(job, &l->queries, 1, computed[0], s->heads, s->dims, taken[0]);
    take_heads(job, &l->keys, 1, computed[1], s->groups, s->dims, taken[1]);
    take_heads(job, NULL, 0, computed[2], s->groups, s->value_dims, taken[2]);
    attend(s, job->told, &(struct fresh){taken[0], taken[1], taken[2], result});
    run_products(result, n, (const struct matrix *[]){&l->output}, (float *const[]){added}, 1);
    add_all(&l->attended, b, added, n, l->hidden, c);

    norm_all(&l->between, c, n, l->hidden, normed);
    run_products(normed, n, (const struct matrix *[]){&l->gate, &l->up}, (float *const[]){gate, up}, 2);
    gate_all((int)l->kind, gate, up, n * l->inner, gate);
    run_products(gate, n, (const struct matrix *[]){&l->down}, (float *const[]){added}, 1);
    add_all(&l->done, c, added, n, l->hidden, c);
    free(memory);
}
