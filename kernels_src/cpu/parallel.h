/* Runs one body on several threads: on the pool that the caller hands over, or on short-lived threads of its own.
 *
 * The body must not care how many threads really come: each takes work units from a shared counter until none is left.
 */
#ifndef AITER_CPU_PARALLEL_H
#define AITER_CPU_PARALLEL_H

#include <pthread.h>

#include "aiter_abi.h"

constexpr double SERIAL_FLOPS = 1.0e6; /* for less work than this, waking a second thread costs more than it brings */

template <class Body> static void run_parallel(const aiter_cpu_executor *executor, int threads, Body &body) {
    if (threads <= 1) {
        body();
        return;
    }
    if (executor->parallel) {
        executor->parallel([](void *data) { (*static_cast<Body *>(data))(); }, &body, threads, 0);
        return;
    }
    constexpr int MAX_OWN_THREADS = 64;
    pthread_t started[MAX_OWN_THREADS];
    int count = 0;
    while (count < threads - 1 && count < MAX_OWN_THREADS) {
        auto run = [](void *data) -> void * {
            (*static_cast<Body *>(data))();
            return nullptr;
        };
        if (pthread_create(&started[count], nullptr, run, &body) != 0) break; /* fewer threads do the same work */
        count++;
    }
    body();
    for (int i = 0; i < count; i++) pthread_join(started[i], nullptr);
}

#endif
