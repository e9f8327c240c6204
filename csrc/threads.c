/* The worker pool: a few threads that share one loop over cells, rows or panels at a time. dispatch.c calls
 * fd_parallel_for; Python sets the number of threads.
 *
 * Not OpenMP: a child forked after libgomp ran hangs in its first parallel region, and its threads take milliseconds to
 * wake after an idle spell. Here the caller works too and waits only for workers that joined in, and a forked child
 * starts with an empty pool. If two callers come at once, the second finds the pool busy and does its work alone, which
 * costs less than waiting.
 *
 * A worker without work spins for SPIN_NANOSECONDS and then sleeps on a condition variable, so that the calls of
 * neighbouring layers find it awake (1 us instead of 30 to 50 on a virtual machine). It spins only if its last wait was
 * that short. A longer spin would take the core from the threads of whatever runs between two dropouts: with 100 us
 * torch's multiplication of a million floats took twice as long, with 20 us it took no longer than alone.
 *
 * A library that calls us may have threads of its own, which spin for its next loop. Work then runs on these (the
 * team), because two pools on the same cores wait for each other for milliseconds. The team is always asked for as many
 * threads as it has, since another number would end some and start others. A forked child has no team.
 *
 * Ranges are handed out a grain at a time, so that a thread that the system suspends delays one grain at most.
 *
 * A job is computed under its caller's floating-point modes on every thread, so that rounding upward or flushing
 * subnormals to zero in the caller gives the same bits on any number of threads.
 */
#define _GNU_SOURCE /* sched_getaffinity */

#include "kernels.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>

enum { MAX_THREADS = 256, SPIN_NANOSECONDS = 20000 };

/* The cells that a thread takes at a time. Fewer than two grains run on the calling thread alone, because waking
 * another thread costs as much as 100,000 cells. A team that is awake starts in a microsecond, so its grain is smaller:
 * torch begins to share its own work there. */
enum { GRAIN_CELLS = 128 * FD_BLOCK_CELLS, TEAM_GRAIN_CELLS = 64 * FD_BLOCK_CELLS };

/* How this thread rounds, whether it flushes subnormals, and which exceptions trap: FPCR on Arm, MXCSR on x86 without
 * its flags, which only record exceptions. */
#if defined(__x86_64__)
enum { MXCSR_FLAGS = 0x3F };
static uint64_t float_modes(void) { return __builtin_ia32_stmxcsr() & ~(unsigned)MXCSR_FLAGS; }
static void set_float_modes(uint64_t modes) {
    __builtin_ia32_ldmxcsr((unsigned)modes | (__builtin_ia32_stmxcsr() & (unsigned)MXCSR_FLAGS));
}
#elif defined(__aarch64__)
static uint64_t float_modes(void) {
    uint64_t modes;
    __asm__ volatile("mrs %0, fpcr" : "=r"(modes));
    return modes;
}
static void set_float_modes(uint64_t modes) { __asm__ volatile("msr fpcr, %0" : : "r"(modes) : "memory"); }
#else
static uint64_t float_modes(void) { return 0; }
static void set_float_modes(uint64_t modes) { (void)modes; }
#endif

typedef struct {
    fd_kernel kernel;
    const void *args;
    uint64_t end, grain; /* in units */
    _Atomic uint64_t next;
    uint64_t modes; /* of the caller */
} job_t;

/* busy: held by the caller whose job the pool runs; others try to lock it and never wait. lock: guards the variables
 * below it. The atomic ones are written under it, and read without it too. */
static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER, lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
static job_t *job;
static int seats;              /* workers the job still admits */
static int workers;            /* threads started */
static atomic_uint generation; /* of the job, so that a worker joins each one once */
static atomic_int working;     /* workers inside the job */

static atomic_int wanted;       /* threads asked for; 0: not set yet */
static _Thread_local int limit; /* asked for by this caller alone; 0: none */

typedef void (*team_t)(void (*work)(void *), void *data, unsigned threads, unsigned flags); /* GOMP_parallel's type */
static _Atomic(team_t) team;

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void work(job_t *j) {
    for (;;) {
        /* Seams lie on multiples of the grain, of cells itself one of FD_BLOCK_CELLS. */
        uint64_t begin = atomic_load_explicit(&j->next, memory_order_relaxed), end;
        do {
            if (begin >= j->end) return;
            end = j->end - begin > j->grain ? begin + j->grain - begin % j->grain : j->end;
        } while (
            !atomic_compare_exchange_weak_explicit(&j->next, &begin, end, memory_order_relaxed, memory_order_relaxed));
        j->kernel(j->args, begin, end);
    }
}

/* On a thread other than the caller's. Its floating-point modes are restored afterwards. */
static void work_elsewhere(void *j) {
    const uint64_t own = float_modes(), wanted = ((job_t *)j)->modes;
    if (own != wanted) set_float_modes(wanted);
    work(j);
    if (own != wanted) set_float_modes(own);
}

static void *worker(void *unused) {
    unsigned seen = 0;
    int spin = 1;
    (void)unused;
    for (;;) {
        int64_t idle_since = now();
        if (spin)
            while (atomic_load(&generation) == seen && now() - idle_since < SPIN_NANOSECONDS) relax();
        pthread_mutex_lock(&lock);
        while (seats == 0 || atomic_load(&generation) == seen) {
            seen = atomic_load(&generation); /* no seat left in that one */
            pthread_cond_wait(&wake, &lock);
        }
        seen = atomic_load(&generation);
        seats--;
        atomic_fetch_add(&working, 1);
        job_t *j = job;
        pthread_mutex_unlock(&lock);
        spin = now() - idle_since < SPIN_NANOSECONDS;
        work_elsewhere(j);
        pthread_mutex_lock(&lock);
        if (atomic_fetch_sub(&working, 1) == 1) pthread_cond_signal(&done);
        pthread_mutex_unlock(&lock);
    }
    return NULL;
}

#if !defined(_WIN32)
/* The child has only the thread that forked. Locks that other threads held would stay locked for ever. */
static void reset_in_child(void) {
    pthread_mutex_init(&busy, NULL);
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&wake, NULL);
    pthread_cond_init(&done, NULL);
    job = NULL;
    seats = workers = 0;
    atomic_store(&working, 0);
    atomic_store(&team, NULL);
}

static void register_reset(void) { pthread_atfork(NULL, NULL, reset_in_child); }

static void watch_for_forks(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, register_reset);
}
#else
static void watch_for_forks(void) {}
#endif

/* Called with lock held. Fewer threads than asked for are no error: the others do the work. */
static void start_workers(int n) {
    watch_for_forks();
    for (; workers < n; workers++) {
        pthread_t thread;
        pthread_attr_t detached;
        pthread_attr_init(&detached);
        pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
        int failed = pthread_create(&thread, &detached, worker, NULL);
        pthread_attr_destroy(&detached);
        if (failed) return;
    }
}

/* Units in so many cells; at least one. */
static uint64_t units_in(uint64_t cells, uint64_t unit) { return unit >= cells ? 1 : unit > 1 ? cells / unit : cells; }

void fd_parallel_for(fd_kernel kernel, const void *args, uint64_t begin, uint64_t end, uint64_t unit) {
    uint64_t grain = units_in(TEAM_GRAIN_CELLS, unit);
    team_t run = limit > 1 && limit < MAX_THREADS && end - begin >= 2 * grain ? atomic_load(&team) : NULL;
    if (run) {
        job_t j = {kernel, args, end, grain, begin, float_modes()};
        run(work_elsewhere, &j, (unsigned)limit, 0);
        return;
    }
    int threads = limit ? limit : fd_get_num_threads();
    grain = units_in(GRAIN_CELLS, unit);
    uint64_t grains = (end - begin) / grain;
    if ((uint64_t)threads > grains) threads = (int)grains;
    if (threads <= 1 || pthread_mutex_trylock(&busy) != 0) {
        if (end > begin) kernel(args, begin, end);
        return;
    }
    job_t j = {kernel, args, end, grain, begin, float_modes()};
    pthread_mutex_lock(&lock);
    start_workers(threads - 1);
    job = &j;
    seats = threads - 1 < workers ? threads - 1 : workers;
    atomic_fetch_add(&generation, 1);
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&lock);
    work(&j);
    pthread_mutex_lock(&lock);
    seats = 0; /* workers that wake up now stay out */
    pthread_mutex_unlock(&lock);
    for (int64_t until = now() + SPIN_NANOSECONDS; atomic_load(&working) > 0 && now() < until;) relax();
    pthread_mutex_lock(&lock);
    while (atomic_load(&working) > 0) pthread_cond_wait(&done, &lock);
    job = NULL;
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&busy);
}

static int usable_cpus(void) {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
#if defined(_WIN32)
    const int n = pthread_num_processors_np(); /* in the process's affinity mask */
#else
    const int n = (int)sysconf(_SC_NPROCESSORS_ONLN);
#endif
    return n > 0 ? n : 1;
}

int fd_set_num_threads(int n) {
    if (n < 1 || n > MAX_THREADS) return FD_BAD_ARGUMENT;
    atomic_store(&wanted, n);
    return FD_OK;
}

void fd_limit_threads(int n) { limit = n < 0 ? 1 : n > MAX_THREADS ? MAX_THREADS : n; }

void fd_use_team(uintptr_t parallel) {
    watch_for_forks();
    atomic_store(&team, (team_t)parallel);
}

int fd_get_num_threads(void) {
    int n = atomic_load_explicit(&wanted, memory_order_relaxed);
    if (n == 0) {
        n = usable_cpus();
        if (n > MAX_THREADS) n = MAX_THREADS;
        atomic_store_explicit(&wanted, n, memory_order_relaxed);
    }
    return n;
}
