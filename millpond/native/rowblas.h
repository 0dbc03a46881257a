/* What the parts of the library share. */

#ifndef MILLPOND_ROWBLAS_H
#define MILLPOND_ROWBLAS_H

#define EXPORT __attribute__((visibility("default")))

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };

typedef void (*real_gemm)(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *,
                          int);

/* OpenBLAS's sgemm: one thread per call. */
extern real_gemm next_sgemm;

/* Below this many multiply-adds one thread is as fast as several, and below the second a sleeping one wakes too late. */
enum { SHARE_MACS = 1 << 20, WAKE_MACS = 4 << 20 };

typedef void (*product)(long m, long n, long k, const float *a, long lda, const float *b, long ldb, float *c, long ldc);

/* C[m][n] = A[m][k] . B[n][k], and A[m][k] . B[k][n], with few rows in A, on the calling thread. */
extern product dot_rows, mix_rows;

/* A softmax to the base of 2 that is computed in pieces: what is known after those so far. Begins at -INFINITY, 0. */
struct running {
    float largest, sum;
};

enum { WIDEST = 16 };

/* Turn a row of scores into weights 2^(score - largest so far), in place. Returns by how much what was summed up with an
 * earlier, smaller maximum has to be multiplied. ``cols`` is a multiple of WIDEST. */
extern float (*softmax_row)(float *scores, long cols, struct running *running);

/* Jobs that MLX passes on disguised as products; see decode.c. Their left matrices are square, CARRIED_SIDE at least. */
enum { PASSWORD_BYTES = 32, CARRIED_SIDE = 16 };
int carried_init(void);
int carries(const float *a);
void run_carried(const float *a, const float *b, float *c);

/* Width in bits of the vectors this machine has. */
void attention_for(int bits);

static inline long smaller(long a, long b) { return a < b ? a : b; }
static inline long larger(long a, long b) { return a > b ? a : b; }

#endif
