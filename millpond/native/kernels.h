/* What is compiled once per instruction set: row products, softmax, packing. They know nothing of threads. */

#ifndef MILLPOND_KERNELS_H
#define MILLPOND_KERNELS_H

#include <stdint.h>

/* Instruction sets, each with all that those before it have; the last one is for whole_rows.h. */
enum instructions { PORTABLE, AVX2, AVX512, AVX512_VNNI };

/* Take the best kernels that this machine can run, but none beyond ``most``, before any is called; returns whose they are. */
enum instructions choose_kernels(enum instructions most);

typedef void (*product)(long m, long n, long k, const float *a, long lda, const float *b, long ldb, float *c, long ldc);

/* C[m][n] = A[m][k] . B[n][k], and A[m][k] . B[k][n], with few rows in A. */
extern product dot_rows, mix_rows;

/* A softmax to the base of 2 that is computed in pieces: what is known after those so far. Begins at -INFINITY, 0. */
struct running {
    float largest, sum;
};

enum { WIDEST = 16 };

/* Turn a row of scores into weights 2^(score - largest so far), in place. Returns by how much what was summed up with an
 * earlier, smaller maximum has to be multiplied. ``cols`` is a multiple of WIDEST. */
extern float (*softmax_row)(float *scores, long cols, struct running *running);

enum { QUERIES = 32, KEYS = 128 /* at a time */ };

/* Attention of some queries over keys and values that stand so many numbers apart. */
struct attended {
    const float *queries[QUERIES];       /* NULL: there is none */
    float *results[QUERIES];             /* the same */
    const unsigned char *masks[QUERIES]; /* of each key, 0: it is not seen; NULL: all are */
    long seen[QUERIES];                  /* keys, from the first one */
    const float *keys, *values;
    long key_step, value_step, dims, value_dims;
    float scale; /* of scores whose softmax is to the base of 2 */
};

static inline long attended_room(long dims, long value_dims) { return QUERIES * (dims + value_dims + KEYS); }

/* ``room``: so many floats. Who sees nothing reads what is not a number. */
extern void (*attend_lanes)(const struct attended *a, float *room);

/* to = from, divided by the root of its mean square and eps, times a weight for each number. */
extern void (*normalise)(const float *from, const float *weight, long count, float eps, float *to);

enum { SILU, GELU /* by tanh */ };

/* to = SILU or GELU of gate, times up. */
extern void (*gate_all)(int kind, const float *gate, const float *up, long count, float *to);

/* One head of a recurrent layer: columns of queries and keys, of values, and of what decays. */
struct recurrence {
    long columns, keys, count; /* numbers of a key, and of a value */
    const float *queries, *keyed;
    long key_step; /* from column to column, as all steps */
    const float *values;
    float *results;
    long value_step;
    const float *decays;
    long decay_step;
    int apart; /* one for each number of a key */
    const float *shares; /* NULL: values are added as they are */
    long share_step;
    const float *counted; /* columns that are 0 here change nothing and read 0; NULL: all count */
};

/* Column by column the state [count][keys] decays, takes the value up at the key (with shares: a part of what the value
 * is beyond what the state says at the key), and is read at the query. */
extern void (*recur)(const struct recurrence *, float *state);

/* Keys and values of 8 or 4 bits in memory, in MLX's order: x = scale * q + bias for each group of neighbours, the first
 * of them in the lowest bits. Scales and biases are of half precision. Vectors are packed one after the other: ``groups``
 * groups of ``size`` numbers, a multiple of 8. */
struct packed {
    uint8_t *numbers;
    uint16_t *scales, *biases;
};

/* Floats from packed groups; those begin ``at`` groups behind the start. */
void unpack_groups(int bits, struct packed from, long at, long groups, long size, float *to);

/* The other way. A group with a number that is not finite comes back as not a number. */
void pack_groups(int bits, const float *from, long groups, long size, struct packed to, long at);

/* Weights as they are on disk, [outputs][inputs]. */
enum format { /* 1 to 8: affine, of so many bits, in MLX's order */ E2M1 = 16, E4M3, BRAINS, HALVES, FLOATS, POWERS };

struct weights {
    struct packed packed; /* scales and biases are of ``scale_type`` */
    int64_t inputs, outputs, group;
    int32_t format, scale_type;
};

static inline int affine(int format) { return format <= 8; }
static inline int plain(int format) { return format == BRAINS || format == HALVES || format == FLOATS; }
static inline int bits_of(int format)
{
    return affine(format) ? format : format == FLOATS ? 32 : plain(format) ? 16 : format == E4M3 ? 8 : 4;
}

/* Scales or biases, so many groups further on. */
static inline uint16_t *factors_at(uint16_t *start, int type, long groups)
{
    return (uint16_t *)((uint8_t *)start + groups * (type == FLOATS ? 4 : type == E4M3 || type == POWERS ? 1 : 2));
}

/* So many of them as floats, from ``at`` on. */
extern void (*factor_floats)(uint16_t *factors, int type, long at, long count, float *to);

/* How many numbers of vectors are to be turned at once, those of even places first; 0: they are taken in order. */
long turned(const struct weights *w);

/* Floats that packed_rows needs. */
long packed_room(const struct weights *w);

/* C[m][from..to) = A[m][inputs] . W[from..to)[inputs], with vectors that are turned. */
extern void (*packed_rows)(const struct weights *w, float *room, long m, const float *a, long from, long to, float *c,
                           long ldc);

#endif
