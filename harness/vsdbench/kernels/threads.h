/* Threads that wait for each other between the parts of a layer. */
#pragma once

#include <sched.h>
#include <stdatomic.h>

#define SPINS 20000 /* some milliseconds */

/* Where threads wait for each other. Those of OpenMP go to sleep after a while, and where another program is running on
 * the same cores, waking up two hundred times a step takes ten times as long as the step. */
typedef struct {
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_int round;
    int threads;
} Meeting;

static void wait_for_all(Meeting* meeting) {
    int round = atomic_load_explicit(&meeting->round, memory_order_acquire);
    if (atomic_fetch_add_explicit(&meeting->arrived, 1, memory_order_acq_rel) + 1 == meeting->threads) {
        atomic_store_explicit(&meeting->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&meeting->round, round + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&meeting->round, memory_order_acquire) == round; spins++) {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
        if (spins > SPINS) sched_yield(); /* more threads than cores */
    }
}
