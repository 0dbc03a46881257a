/* One layer of a transformer on the CPU: norms, products, rotations, attention, gate, and sums, for all rows. In between
 * MLX would be called sixty times, which costs a step of few rows more than its products, and goes over a prompt's vectors
 * once for each call, on one thread. Carried jobs, see carried.h: the right matrix is what the layers before have left, and
 * the result what this one leaves, [rows * length, hidden] both. Either rows of slots go on (a decode step, or drafts being
 * verified), or prompts are read into caches of their own. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"
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

/* What vectors stand for: so many new tokens of each row, the first of them behind ``before`` others. */
struct shape {
    int64_t rows, length, heads, groups, dims, value_dims;
    const int64_t *before;
};

/* Where one row's heads go: ``step`` numbers from head to head. */
struct place {
    float *to;
    long step;
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

/* Heads of one row's vectors [length][heads][dims], normed and rotated where they are to be. */
static void take_heads(const struct layer *l, const struct norm *norm, int rotates, const float *from, long length, long before,
                       long heads, long dims, struct place place)
{
    for (long t = 0; t < length; t++)
        for (long h = 0; h < heads; h++) {
            const float *source = from + (t * heads + h) * dims;
            float *head = place.to + h * place.step + t * dims;
            if (norm && norm->weight)
                normalise(source, norm->weight, dims, (float)norm->eps, head);
            else
                memcpy(head, source, (size_t)dims * sizeof(float));
            if (rotates && l->rotated)
                rotate_head(l, before + t, head);
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

/* Vectors that a layer works on, [rows * length] of each. */
struct room {
    float *memory, *normed, *added, *gate, *up; /* of the products in front and behind */
    float *queries, *keys, *values, *mixed;     /* as computed, and what attention makes of them */
    float *spare;                               /* as much as queries, keys and values take */
};

static struct room room_for(const struct layer *l, const struct shape *s)
{
    long n = s->rows * s->length, queries = s->heads * s->dims, keys = s->groups * s->dims;
    long values = s->groups * s->value_dims, heads = queries + keys + values;
    struct room r;
    r.memory = malloc((size_t)(n * (2 * (l->hidden + heads + l->inner) + s->heads * s->value_dims)) * sizeof(float));
    r.normed = r.memory;
    r.added = r.normed + n * l->hidden;
    r.gate = r.added + n * l->hidden;
    r.up = r.gate + n * l->inner;
    r.queries = r.up + n * l->inner;
    r.keys = r.queries + n * queries;
    r.values = r.keys + n * keys;
    r.spare = r.values + n * values;
    r.mixed = r.spare + n * heads;
    return r;
}

/* Queries, keys and values. */
static void run_front(const struct layer *l, const float *b, long n, const struct room *r)
{
    norm_all(&l->before, b, n, l->hidden, r->normed);
    run_products(r->normed, n, (const struct matrix *[]){&l->query, &l->key, &l->value},
                 (float *const[]){r->queries, r->keys, r->values}, 3);
}

/* What comes behind attention. */
static void run_back(const struct layer *l, const float *b, long n, const struct room *r, float *c)
{
    run_products(r->mixed, n, (const struct matrix *[]){&l->output}, (float *const[]){r->added}, 1);
    add_all(&l->attended, b, r->added, n, l->hidden, c);
    norm_all(&l->between, c, n, l->hidden, r->normed);
    run_products(r->normed, n, (const struct matrix *[]){&l->gate, &l->up}, (float *const[]){r->gate, r->up}, 2);
    gate_all((int)l->kind, r->gate, r->up, n * l->inner, r->gate);
    run_products(r->gate, n, (const struct matrix *[]){&l->down}, (float *const[]){r->added}, 1);
    add_all(&l->done, c, r->added, n, l->hidden, c);
}

static void lose(const struct layer *l, long n, float *c)
{
    for (long i = 0; i < n * l->hidden; i++)
        c[i] = NAN;
}

/* What stands in the left matrix for a step over slots. */
struct stepping {
    struct layer layer;
    struct slots slots;
    int64_t told[];
};

/* c may be b. */
static void run_layer(const struct stepping *job, const float *b, float *c)
{
    const struct layer *l = &job->layer;
    const struct slots *slots = &job->slots;
    const struct shape s = {slots->rows, slots->length, slots->heads, slots->groups,
                            slots->dims, slots->value_dims, job->told};
    struct room r = room_for(l, &s);
    long n = s.rows * s.length, queries = s.length * s.heads * s.dims, keys = s.length * s.groups * s.dims;
    long values = s.length * s.groups * s.value_dims;
    if (!r.memory) {
        lose(l, n, c);
        return;
    }
    run_front(l, b, n, &r);
    const struct fresh fresh = {r.spare, r.spare + s.rows * queries, r.spare + s.rows * (queries + keys), r.mixed};
    for (long row = 0; row < s.rows; row++) {
        struct place to[] = {{r.spare + row * queries, s.length * s.dims},
                             {r.spare + s.rows * queries + row * keys, s.length * s.dims},
                             {r.spare + s.rows * (queries + keys) + row * values, s.length * s.value_dims}};
        take_heads(l, &l->queries, 1, r.queries + row * queries, s.length, s.before[row], s.heads, s.dims, to[0]);
        take_heads(l, &l->keys, 1, r.keys + row * keys, s.length, s.before[row], s.groups, s.dims, to[1]);
        take_heads(l, NULL, 0, r.values + row * values, s.length, s.before[row], s.groups, s.value_dims, to[2]);
    }
    attend(slots, job->told, &fresh);
    run_back(l, b, n, &r, c);
    free(r.memory);
}

/* What stands in the left matrix: how many layers, how many bytes are told of each, and that, one after the other. */
void run_layers(void *described, const float *b, long columns, float *c)
{
    (void)columns;
    const int64_t *job = described, count = job[0], *sizes = job + 1;
    const char *told = (const char *)(sizes + count);
    for (long i = 0; i < count; told += sizes[i], i++)
        run_layer((const struct stepping *)told, i ? c : b, c);
}

/* The cache of one prompt in this layer: keys [groups][capacity][dims], and values. */
struct prompt {
    int64_t count, before, capacity; /* new tokens, and those that are there */
    float *keys, *values;
};

/* What stands in the left matrix for prompts that are read; behind the end of shorter ones nobody looks. */
struct reading {
    struct layer layer;
    int64_t prompts, length, heads, groups, dims, value_dims;
    double scale; /* of scores whose softmax is to the base of 2 */
    struct prompt prompt[];
};

/* Of the last layer nobody reads more than these. */
static void lose_positions(const struct prompt *p, const struct shape *s)
{
    for (long i = p->before; i < p->before + p->count; i++)
        p->keys[i * s->dims] = p->values[i * s->value_dims] = NAN;
}

void read_layer(void *described, const float *b, long columns, float *c)
{
    (void)columns;
    const struct reading *job = described;
    const struct layer *l = &job->layer;
    const struct shape s = {job->prompts, job->length, job->heads, job->groups, job->dims, job->value_dims, NULL};
    struct room r = room_for(l, &s);
    long n = s.rows * s.length, queries = s.length * s.heads * s.dims, keys = s.length * s.groups * s.dims;
    long values = s.length * s.groups * s.value_dims, mixed = s.length * s.heads * s.value_dims;
    if (!r.memory) {
        lose(l, n, c);
        for (long row = 0; row < s.rows; row++)
            lose_positions(&job->prompt[row], &s);
        return;
    }
    run_front(l, b, n, &r);
    memset(r.mixed, 0, (size_t)(s.rows * mixed) * sizeof(float));
    for (long row = 0; row < s.rows; row++) {
        const struct prompt *p = &job->prompt[row];
        struct place to[] = {{r.spare + row * queries, s.length * s.dims},
                             {p->keys + p->before * s.dims, p->capacity * s.dims},
                             {p->values + p->before * s.value_dims, p->capacity * s.value_dims}};
        take_heads(l, &l->queries, 1, r.queries + row * queries, p->count, p->before, s.heads, s.dims, to[0]);
        take_heads(l, &l->keys, 1, r.keys + row * keys, p->count, p->before, s.groups, s.dims, to[1]);
        take_heads(l, NULL, 0, r.values + row * values, p->count, p->before, s.groups, s.value_dims, to[2]);
        attend_queries(&(struct attention){
            .batch = 1,
            .heads = s.heads,
            .groups = s.groups,
            .length = p->count,
            .width = p->before + p->count,
            .dims = s.dims,
            .value_dims = s.value_dims,
            .queries = {to[0].to, {0, to[0].step, s.dims}},
            .keys = {p->keys, {0, to[1].step, s.dims}},
            .values = {p->values, {0, to[2].step, s.value_dims}},
            .result = r.mixed + row * mixed,
            .scale = (float)job->scale,
            .causal = 1,
        });
    }
    run_back(l, b, n, &r, c);
    free(r.memory);
}
