/* Threads that share the pieces of one job.
 *
 * Pieces are handed out as threads become free, so a thread that the system takes away delays one piece. Any thread may
 * call. One job at a time has the pool; who finds it busy does the work on its own thread. Workers spin for a moment
 * after a job, as the next one of a step comes soon, then sleep. After fork the child starts its own when it needs
 * them. */

#ifndef MILLPOND_POOL_H
#define MILLPOND_POOL_H

#include <stddef.h>

typedef void (*piece_function)(const void *job, long number);

/* Below this many multiply-adds one thread is as fast as several, and below the second a sleeping one wakes too late. */
enum { SHARE_MACS = 1 << 20, WAKE_MACS = 4 << 20 };

/* Once, before anything else. */
void pool_init(int threads, long spin_us);

int pool_threads(void);

/* Whether the pool is the caller's now; pool_run gives it back. Never with a single thread. */
int pool_claim(void);

/* Run pieces 0 to ``pieces`` - 1 and return when all are done; ``rouse`` sleeping workers too. */
void pool_run(piece_function piece, const void *job, long pieces, int rouse);

/* Memory of the calling thread, at least so many floats, for the work on one piece; NULL when there is none. */
float *scratch(size_t floats);

/* Monotonic. */
long now_ns(void);

#endif
