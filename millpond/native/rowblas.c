/* cblas for MLX on the CPU: products of a few rows done here, large ones cut into pieces for OpenBLAS.
 *
 * Loaded with RTLD_GLOBAL before mlx.core, so that MLX binds to these three symbols instead of its reference BLAS.
 * One decode step multiplies a few rows by every weight once; a general sgemm first packs the weights, which costs
 * more than the product. Reading them in place runs at the speed of memory.
 *
 * The top of the library: it calls gemm.h and carried.h, they call kernels.h and pool.h, and nothing calls back up. */

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "carried.h"
#include "common.h"
#include "gemm.h"
#include "kernels.h"
#include "pool.h"
#include "whole_rows.h"

enum { MAX_ROWS = 32 };

typedef void (*double_gemm)(int, int, int, int, int, int, double, const double *, int, const double *, int, double,
                            double *, int);
typedef void (*complex_gemm)(int, int, int, int, int, int, const void *, const void *, int, const void *, int,
                             const void *, void *, int);

/* --- what MLX calls --------------------------------------------------------------------------------------------- */

/* Above this many multiply-adds, a product with an untransposed B is passed on, where the pool shares it. */
enum { MIX_LIMIT = 1 << 20 };

static double_gemm next_dgemm;
static complex_gemm next_cgemm;
static unsigned char own[MAX_ROWS + 1];
static _Atomic uint64_t own_calls, passed_calls;
static int carrying;
static enum instructions instructions;

/* A job whose right matrix [k][n] has gaps, or is there transposed. */
static void run_turned(const float *a, const float *b, int transposed, long ldb, long m, long n, long k, float *c)
{
    float *copy = malloc((size_t)(n * k) * sizeof(float));
    if (!copy) {
        for (long i = 0; i < m * n; i++)
            c[i] = NAN;
        return;
    }
    for (long i = 0; i < k * n; i++)
        copy[i] = transposed ? b[i % n * ldb + i / n] : b[i / n * ldb + i % n];
    run_carried(a, copy, n, c);
    free(copy);
}

EXPORT void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                        const float *b, int ldb, float beta, float *c, int ldc)
{
    if (order != ROW_MAJOR || m <= 0 || n <= 0 || k <= 0) {
        next_sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
        return;
    }
    if (carrying && trans_a == NO_TRANS && lda == k && carries(a, (long)m * k)) {
        if (trans_b == NO_TRANS && ldb == n)
            run_carried(a, b, n, c);
        else
            run_turned(a, b, trans_b == TRANS, ldb, m, n, k, c);
        return;
    }
    struct gemm g = {trans_a, trans_b, m, n, k, alpha, beta, a, b, c, lda, ldb, ldc};
    if (m == 1 && lda == 1 && trans_a != NO_TRANS) {
        /* One row is the same memory, transposed or not, when its elements are neighbours. */
        g.trans_a = NO_TRANS;
        g.lda = k;
    }
    if (g.trans_a == NO_TRANS && m <= MAX_ROWS && own[m] && alpha == 1.0f && beta == 0.0f) {
        if (trans_b == TRANS) {
            atomic_fetch_add_explicit(&own_calls, 1, memory_order_relaxed);
            own_product(&g);
            return;
        }
        if (trans_b == NO_TRANS && m <= 4 && g.m * g.n * g.k <= MIX_LIMIT) {
            atomic_fetch_add_explicit(&own_calls, 1, memory_order_relaxed);
            mix_rows(g.m, g.n, g.k, a, g.lda, b, g.ldb, c, g.ldc);
            return;
        }
    }
    atomic_fetch_add_explicit(&passed_calls, 1, memory_order_relaxed);
    passed_product(&g);
}

EXPORT void cblas_dgemm(int order, int trans_a, int trans_b, int m, int n, int k, double alpha, const double *a,
                        int lda, const double *b, int ldb, double beta, double *c, int ldc)
{
    next_dgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

EXPORT void cblas_cgemm(int order, int trans_a, int trans_b, int m, int n, int k, const void *alpha, const void *a,
                        int lda, const void *b, int ldb, const void *beta, void *c, int ldc)
{
    next_cgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

/* --- what Python calls, before mlx is loaded -------------------------------------------------------------------- */

/* ``most``: the best of enum instructions that may be used. */
EXPORT void millpond_rowblas_init(void *sgemm, void *dgemm, void *cgemm, int threads, long spin_us, int most)
{
    next_sgemm = (real_gemm)sgemm;
    next_dgemm = (double_gemm)dgemm;
    next_cgemm = (complex_gemm)cgemm;
    instructions = choose_kernels(most);
    if (instructions == AVX512 && most >= AVX512_VNNI && use_whole_rows())
        instructions = AVX512_VNNI;
    carrying = carried_init();
    pool_init(threads, spin_us);
}

/* Whether init has been called, in this process. */
EXPORT int millpond_rowblas_ready(void) { return next_sgemm != NULL; }

/* Whether products of this many rows are done here. */
EXPORT void millpond_rowblas_take(int rows, int yes)
{
    if (rows >= 1 && rows <= MAX_ROWS)
        own[rows] = (unsigned char)(yes != 0);
}

EXPORT int millpond_rowblas_takes(int rows) { return rows >= 1 && rows <= MAX_ROWS && own[rows]; }

EXPORT int millpond_rowblas_max_rows(void) { return MAX_ROWS; }

EXPORT int millpond_rowblas_instructions(void) { return (int)instructions; }

EXPORT uint64_t millpond_rowblas_own_calls(void) { return atomic_load(&own_calls); }

EXPORT uint64_t millpond_rowblas_passed_calls(void) { return atomic_load(&passed_calls); }

/* Fastest time in ns, of several tries, for rows x k times n x k, done here (yes) or passed on. Negative: no memory. */
EXPORT long millpond_rowblas_measure(int rows, int n, int k, int yes, int tries)
{
    float *a = calloc((size_t)rows * k, sizeof(float));
    float *b = malloc((size_t)n * k * sizeof(float));
    float *c = malloc((size_t)rows * n * sizeof(float));
    long best = -1;
    struct gemm g = {NO_TRANS, TRANS, rows, n, k, 1.0f, 0.0f, a, b, c, k, k, n};
    if (a && b && c && rows >= 1) {
        memset(b, 0, (size_t)n * k * sizeof(float));
        for (int i = 0; i < tries; i++) {
            long start = now_ns();
            if (yes)
                own_product(&g);
            else
                passed_product(&g);
            long took = now_ns() - start;
            if (best < 0 || took < best)
                best = took;
        }
    }
    free(a);
    free(b);
    free(c);
    return best;
}
