/* One product on all cores; see gemm.h. */

#include "gemm.h"

#include "kernels.h"
#include "pool.h"

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

void own_product(const struct gemm *g)
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

void passed_product(const struct gemm *g)
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
