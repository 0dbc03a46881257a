/* One product: done by our kernels, or cut into pieces for OpenBLAS.
 *
 * OpenBLAS runs with one thread per call, on the pieces that the pool hands out: a thread that the system takes away
 * delays one piece, where OpenBLAS's own threads would all wait for it. */

#ifndef MILLPOND_GEMM_H
#define MILLPOND_GEMM_H

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };

typedef void (*real_gemm)(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *,
                          int);

/* OpenBLAS's sgemm: one thread per call. */
extern real_gemm next_sgemm;

/* One product: C = alpha A . B + beta C, with BLAS's meaning of every field. */
struct gemm {
    int trans_a, trans_b;
    long m, n, k;
    float alpha, beta;
    const float *a, *b;
    float *c;
    long lda, ldb, ldc;
};

/* Few rows in A, B transposed, alpha 1, beta 0: done here, B's rows shared out. */
void own_product(const struct gemm *g);

/* Anything else: cut along its longer side. */
void passed_product(const struct gemm *g);

#endif
