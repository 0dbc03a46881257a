/* What is compiled once per instruction set: row products, softmax, packing. They know nothing of threads. */

#ifndef MILLPOND_KERNELS_H
#define MILLPOND_KERNELS_H

#include <stdint.h>

/* Take the best kernels that this machine can run, before any is called; returns the name of its instruction set. */
const char *choose_kernels(void);

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

#endif
