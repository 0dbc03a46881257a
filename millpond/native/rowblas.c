/* cblas for MLX on the CPU: products of a few rows done here, large ones cut into pieces for OpenBLAS.
 *
 * Loaded with RTLD_GLOBAL before mlx.core, so that MLX binds to these three symbols instead of its reference BLAS.
 * One decode step multiplies a few rows by every weight once; a general sgemm first packs the weights, which costs
 * more than the product. Reading them in place runs at the speed of memory.
 *
 * OpenBLAS runs with one thread per call, on the pieces that the pool hands out: a thread that the system takes away
 * delays one piece, where OpenBLAS's own threads would all wait for it. */

#include "rowblas.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "packed.h"
#include "pool.h"

enum { MAX_ROWS = 32 };

typedef void (*double_gemm)(int, int, int, int, int, int, double, const double *, int, const double *, int, double,
                            double *, int);
typedef void (*complex_gemm)(int, int, int, int, int, int, const void *, const void *, int, const void *, int,
                             const void *, void *, int);

/* --- kernels by instruction set ------------------------------------------------------------------------------- */

typedef float quarter __attribute__((vector_size(16)));

#define WIDTH 4
#define TARGET
#define NAME(base) base##_portable
#include "kernels.h"

#if defined(__x86_64__)
#define WIDTH 8
#define TARGET __attribute__((target("avx2,fma")))
#define NAME(base) base##_avx2
#include "kernels.h"

#define WIDTH 16
#define TARGET __attribute__((target("avx512f,fma")))
#define NAME(base) base##_avx512
#include "kernels.h"
#endif

product dot_rows = dot_rows_portable;
product mix_rows = mix_rows_portable;
static const char *instructions = "portable";

static void choose_kernels(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) {
        dot_rows = dot_rows_avx512;
        mix_rows = mix_rows_avx512;
        instructions = "avx512";
        attention_for(512);
        packed_for(512);
    } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        dot_rows = dot_rows_avx2;
        mix_rows = mix_rows_avx2;
        instructions = "avx2";
        attention_for(256);
        packed_for(256);
    }
#elif defined(__aarch64__)
    instructions = "neon";
#endif
}

/* --- pieces ---------------------------------------------------------------------------------------------------- */

enum {
    /* Weights a thread takes at a time: small enough to even out threads that are slowed down by others. */
    CHUNK_BYTES = 64 * 1024,
    /* Below this one thread is as fast as several. */
    SHARE_BYTES = 2 * CHUNK_BYTES,
    /* Below this a sleeping worker would wake too late to help. */
    WAKE_BYTES = 256 * 1024,
    /* Multiply-adds a thread takes at a time of products passed on. */
    PIECE_MACS = 2 << 20,
    /* Pieces are multiples of this many rows or columns, to suit every kernel's tile. */
    PIECE_STEP = 48,
};

real_gemm next_sgemm;

/* One product: C = alpha A . B + beta C, with BLAS's meaning of every field. */
struct gemm {
    int trans_a, trans_b;
    long m, n, k;
    float alpha, beta;
    const float *a, *b;
    float *c;
    long lda, ldb, ldc;
};

struct job {
    struct gemm whole;
    int own;     /* few rows of A, B transposed: done here */
    int by_rows; /* cut along m, else along n */
    long step;
};

static void pass_on(const struct gemm *g)
{
    next_sgemm(ROW_MAJOR, g->trans_a, g->trans_b, (int)g->m, (int)g->n, (int)g->k, g->alpha, g->a, (int)g->lda, g->b,
               (int)g->ldb, g->beta, g->c, (int)g->ldc);
}

static void run_piece(const void *data, long number)
{
    const struct job *job = data;
    struct gemm g = job->whole;
    long from = number * job->step, length = job->by_rows ? g.m : g.n;
    long count = length - from < job->step ? length - from : job->step;
    if (job->by_rows) {
        g.m = count;
        g.a += from * (g.trans_a == NO_TRANS ? g.lda : 1);
        g.c += from * g.ldc;
    } else {
        g.n = count;
        g.b += from * (g.trans_b == NO_TRANS ? 1 : g.ldb);
        g.c += from;
    }
    if (job->own)
        dot_rows(g.m, g.n, g.k, g.a, g.lda, g.b, g.ldb, g.c, g.ldc);
    else
        pass_on(&g);
}

static long rounded(long value, long step) { return value < step ? step : value / step * step; }

/* Few rows: B's rows are shared out. */
static void own_product(const struct gemm *g)
{
    long bytes = g->n * g->k * (long)sizeof(float);
    if (bytes < SHARE_BYTES || !pool_claim()) {
        dot_rows(g->m, g->n, g->k, g->a, g->lda, g->b, g->ldb, g->c, g->ldc);
        return;
    }
    long step = rounded(CHUNK_BYTES / (g->k * (long)sizeof(float)), 12); /* a multiple of both tile widths */
    struct job job = {*g, 1, 0, step};
    pool_run(run_piece, &job, (g->n + step - 1) / step, bytes >= WAKE_BYTES);
}

/* Anything else: cut along its longer side. */
static void passed_product(const struct gemm *g)
{
    long macs = g->m * g->n * g->k;
    if (macs < SHARE_MACS || !pool_claim()) {
        pass_on(g);
        return;
    }
    int by_rows = g->m > g->n;
    long length = by_rows ? g->m : g->n;
    long most = length / (4 * pool_threads()), least = length * PIECE_MACS / macs;
    long step = rounded(most > least ? most : least, PIECE_STEP);
    struct job job = {*g, 0, by_rows, step};
    pool_run(run_piece, &job, (length + step - 1) / step, macs >= WAKE_MACS);
}

/* --- what MLX calls --------------------------------------------------------------------------------------------- */

/* Above this many multiply-adds, a product with an untransposed B is passed on, where the pool shares it. */
enum { MIX_LIMIT = 1 << 20 };

static double_gemm next_dgemm;
static complex_gemm next_cgemm;
static unsigned char own[MAX_ROWS + 1];
static _Atomic uint64_t own_calls, passed_calls;
static int carrying;

EXPORT void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                        const float *b, int ldb, float beta, float *c, int ldc)
{
    if (order != ROW_MAJOR || m <= 0 || n <= 0 || k <= 0) {
        next_sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
        return;
    }
    if (carrying && m == k && m >= CARRIED_SIDE && lda == k && carries(a)) {
        run_carried(a, b, c);
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

EXPORT void millpond_rowblas_init(void *sgemm, void *dgemm, void *cgemm, int threads, long spin_us)
{
    next_sgemm = (real_gemm)sgemm;
    next_dgemm = (double_gemm)dgemm;
    next_cgemm = (complex_gemm)cgemm;
    choose_kernels();
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

EXPORT const char *millpond_rowblas_instructions(void) { return instructions; }

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
