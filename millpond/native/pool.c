/* Threads that share the pieces of one job; see pool.h. */

#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

enum { MAX_WORKERS = 63 };

static piece_function run;
static const void *job;

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

long now_ns(void)
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
        run(job, (long)((uint32_t)seen - 1));
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

int pool_claim(void) { return wanted_threads > 1 && !atomic_flag_test_and_set(&pool_busy); }

void pool_run(piece_function piece, const void *its_job, long pieces, int rouse)
{
    run = piece;
    job = its_job;
    if (workers < wanted_threads - 1)
        start_workers();
    atomic_store(&finished, 0);
    uint64_t number = (atomic_load(&board) >> 32) + 1;
    atomic_store(&board, number << 32 | (uint64_t)pieces);
    if (rouse && atomic_load(&sleepers) > 0) {
        pthread_mutex_lock(&sleep_lock);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&sleep_lock);
    }
    work();
    for (int i = 1; atomic_load(&finished) != (uint32_t)pieces; i++) {
        relax();
        if (i % 1024 == 0)
            sched_yield();
    }
    atomic_flag_clear(&pool_busy);
}

float *scratch(size_t floats)
{
    static _Thread_local float *memory;
    static _Thread_local size_t size;
    if (size < floats) {
        free(memory);
        memory = aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
        size = memory ? floats : 0;
    }
    return memory;
}

void pool_init(int threads, long spin_us)
{
    wanted_threads = threads < 1 ? 1 : threads > MAX_WORKERS + 1 ? MAX_WORKERS + 1 : threads;
    spin_ns = spin_us * 1000;
    pthread_atfork(NULL, NULL, after_fork);
}

int pool_threads(void) { return wanted_threads; }
