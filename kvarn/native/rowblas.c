/* cblas for MLX on the CPU: products of a few rows done here, everything else passed on.
 *
 * Loaded with RTLD_GLOBAL before mlx.core, so that MLX binds to these three symbols instead of its reference BLAS.
 * One decode step multiplies a few rows by every weight once; a general sgemm first packs the weights, which costs
 * more than the product. Reading them in place runs at the speed of memory.
 *
 * Any thread may call. One product at a time uses the pool; one that finds it busy runs on its own thread. Workers
 * spin for a moment after a product, as the next one of a step comes soon, then sleep. After fork the child starts
 * its own pool when it needs one. */

#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };
enum { MAX_ROWS = 32, MAX_WORKERS = 63 };

#define EXPORT __attribute__((visibility("default")))

typedef void (*real_gemm)(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *,
                          int);
typedef void (*double_gemm)(int, int, int, int, int, int, double, const double *, int, const double *, int, double,
                            double *, int);
typedef void (*complex_gemm)(int, int, int, int, int, int, const void *, const void *, int, const void *, int,
                             const void *, void *, int);
typedef void (*product)(long m, long n, long k, const float *a, long lda, const float *b, long ldb, float *c, long ldc);

/* --- kernels by instruction set ------------------------------------------------------------------------------- */

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

static product dot_rows = dot_rows_portable;
static product mix_rows = mix_rows_portable;
static const char *instructions = "portable";

static void choose_kernels(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) {
        dot_rows = dot_rows_avx512;
        mix_rows = mix_rows_avx512;
        instructions = "avx512";
    } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        dot_rows = dot_rows_avx2;
        mix_rows = mix_rows_avx2;
        instructions = "avx2";
    }
#elif defined(__aarch64__)
    instructions = "neon";
#endif
}

/* --- the pool -------------------------------------------------------------------------------------------------- */

enum {
    /* Weights a thread takes at a time: small enough to even out threads that are slowed down by others. */
    CHUNK_BYTES = 64 * 1024,
    /* Below this one thread is as fast as several. */
    SHARE_BYTES = 2 * CHUNK_BYTES,
    /* Below this a sleeping worker would wake too late to help. */
    WAKE_BYTES = 256 * 1024,
};

static struct {
    long m, n, k, lda, ldb, ldc, chunk;
    const float *a, *b;
    float *c;
} job;

/* High half: number of the job; low half: chunks nobody has taken. Taking one pins the job until it is finished. */
static _Atomic uint64_t board;
static _Atomic uint32_t finished;
static _Atomic int sleepers;
static atomic_flag pool_busy = ATOMIC_FLAG_INIT;
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static int wanted_threads = 1;
static int workers;
static long spin_ns = 200 * 1000;

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static long now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void work(void)
{
    uint64_t seen = atomic_load(&board);
    while ((uint32_t)seen != 0) {
        if (!atomic_compare_exchange_weak(&board, &seen, seen - 1))
            continue;
        long from = (long)((uint32_t)seen - 1) * job.chunk;
        long count = job.n - from < job.chunk ? job.n - from : job.chunk;
        dot_rows(job.m, count, job.k, job.a, job.lda, job.b + from * job.ldb, job.ldb, job.c + from, job.ldc);
        atomic_fetch_add(&finished, 1);
        seen = atomic_load(&board);
    }
}

static void await_job(uint32_t last)
{
    long until = now_ns() + spin_ns;
    for (int i = 1; (uint32_t)(atomic_load(&board) >> 32) == last; i++) {
        relax();
        if (i % 64 == 0 && now_ns() > until) {
            pthread_mutex_lock(&sleep_lock);
            atomic_fetch_add(&sleepers, 1);
            while ((uint32_t)(atomic_load(&board) >> 32) == last)
                pthread_cond_wait(&wake, &sleep_lock);
            atomic_fetch_sub(&sleepers, 1);
            pthread_mutex_unlock(&sleep_lock);
            return;
        }
    }
}

static void *worker_main(void *unused)
{
    for (;;) {
        uint32_t last = (uint32_t)(atomic_load(&board) >> 32);
        work();
        await_job(last);
    }
    return unused;
}

static void start_workers(void)
{
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, 256 * 1024);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (workers < wanted_threads - 1) {
        pthread_t thread;
        if (pthread_create(&thread, &attributes, worker_main, NULL) != 0)
            break;
        workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

static void after_fork(void)
{
    workers = 0;
    atomic_store(&board, 0);
    atomic_store(&sleepers, 0);
    atomic_flag_clear(&pool_busy);
    pthread_mutex_init(&sleep_lock, NULL);
    pthread_cond_init(&wake, NULL);
}

/* C = A . B^T, the columns of C shared out over the pool. */
static void share_dot_rows(long m, long n, long k, const float *a, long lda, const float *b, long ldb, float *c,
                           long ldc)
{
    long bytes = n * k * (long)sizeof(float);
    if (wanted_threads == 1 || bytes < SHARE_BYTES || atomic_flag_test_and_set(&pool_busy)) {
        dot_rows(m, n, k, a, lda, b, ldb, c, ldc);
        return;
    }
    if (workers < wanted_threads - 1)
        start_workers();
    long chunk = CHUNK_BYTES / (k * (long)sizeof(float));
    chunk = chunk < 12 ? 12 : chunk / 12 * 12; /* a multiple of both tile widths */
    long chunks = (n + chunk - 1) / chunk;
    job.m = m, job.n = n, job.k = k, job.a = a, job.lda = lda, job.b = b, job.ldb = ldb, job.c = c, job.ldc = ldc;
    job.chunk = chunk;
    atomic_store(&finished, 0);
    uint64_t number = (atomic_load(&board) >> 32) + 1;
    atomic_store(&board, number << 32 | (uint64_t)chunks);
    if (bytes >= WAKE_BYTES && atomic_load(&sleepers) > 0) {
        pthread_mutex_lock(&sleep_lock);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&sleep_lock);
    }
    work();
    for (int i = 1; atomic_load(&finished) != (uint32_t)chunks; i++) {
        relax();
        if (i % 1024 == 0)
            sched_yield();
    }
    atomic_flag_clear(&pool_busy);
}

/* --- what MLX calls --------------------------------------------------------------------------------------------- */

/* Above this many multiply-adds, a product with an untransposed B is passed on, where several threads share it. */
enum { MIX_LIMIT = 1 << 20 };

static real_gemm next_sgemm;
static double_gemm next_dgemm;
static complex_gemm next_cgemm;
static unsigned char own[MAX_ROWS + 1];
static _Atomic uint64_t own_calls, passed_calls;

EXPORT void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                        const float *b, int ldb, float beta, float *c, int ldc)
{
    /* One row is the same memory, transposed or not, when its elements are neighbours. */
    int plain_a = trans_a == NO_TRANS || (m == 1 && lda == 1);
    if (order == ROW_MAJOR && plain_a && m > 0 && m <= MAX_ROWS && n > 0 && k > 0 && alpha == 1.0f && beta == 0.0f) {
        long macs = (long)m * n * k;
        long stride = trans_a == NO_TRANS ? lda : k;
        if (trans_b == TRANS && own[m]) {
            atomic_fetch_add_explicit(&own_calls, 1, memory_order_relaxed);
            share_dot_rows(m, n, k, a, stride, b, ldb, c, ldc);
            return;
        }
        if (trans_b == NO_TRANS && own[m] && m <= 4 && macs <= MIX_LIMIT) {
            atomic_fetch_add_explicit(&own_calls, 1, memory_order_relaxed);
            mix_rows(m, n, k, a, stride, b, ldb, c, ldc);
            return;
        }
    }
    atomic_fetch_add_explicit(&passed_calls, 1, memory_order_relaxed);
    next_sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
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

EXPORT void kvarn_rowblas_init(void *sgemm, void *dgemm, void *cgemm, int threads, long spin_us)
{
    next_sgemm = (real_gemm)sgemm;
    next_dgemm = (double_gemm)dgemm;
    next_cgemm = (complex_gemm)cgemm;
    wanted_threads = threads < 1 ? 1 : threads > MAX_WORKERS + 1 ? MAX_WORKERS + 1 : threads;
    spin_ns = spin_us * 1000;
    choose_kernels();
    pthread_atfork(NULL, NULL, after_fork);
}

/* Whether products of this many rows are done here. */
EXPORT void kvarn_rowblas_take(int rows, int yes)
{
    if (rows >= 1 && rows <= MAX_ROWS)
        own[rows] = (unsigned char)(yes != 0);
}

EXPORT int kvarn_rowblas_max_rows(void) { return MAX_ROWS; }

EXPORT const char *kvarn_rowblas_instructions(void) { return instructions; }

EXPORT uint64_t kvarn_rowblas_own_calls(void) { return atomic_load(&own_calls); }

EXPORT uint64_t kvarn_rowblas_passed_calls(void) { return atomic_load(&passed_calls); }

/* Fastest time in ns, of several tries, for rows x k times n x k, done here (yes) or passed on. Negative: no memory. */
EXPORT long kvarn_rowblas_measure(int rows, int n, int k, int yes, int tries)
{
    float *a = calloc((size_t)rows * k, sizeof(float));
    float *b = malloc((size_t)n * k * sizeof(float));
    float *c = malloc((size_t)rows * n * sizeof(float));
    long best = -1;
    if (a && b && c && rows >= 1 && rows <= MAX_ROWS) {
        memset(b, 0, (size_t)n * k * sizeof(float));
        for (int i = 0; i < tries; i++) {
            long start = now_ns();
            if (yes)
                share_dot_rows(rows, n, k, a, k, b, k, c, n);
            else
                next_sgemm(ROW_MAJOR, NO_TRANS, TRANS, rows, n, k, 1.0f, a, k, b, k, 0.0f, c, n);
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
