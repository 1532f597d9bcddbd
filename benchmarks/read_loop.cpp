/* Reads memory as fast as it goes, and does nothing else with it: the bound of decoding.
 *
 * Threads take pieces from a counter, so that a slow one holds nobody up; two pieces ahead is what the prefetchers of
 * one core need to be told. */
#include <stdint.h>
#include <string.h>

#include <atomic>

#include "cpu/parallel.h"

typedef int64_t Vector __attribute__((vector_size(64)));
constexpr int64_t PIECE = 1 << 16, AHEAD = 1 << 13;

static int64_t sum_of(const char *piece) {
    Vector sums[4] = {};
    for (int64_t i = 0; i < PIECE; i += sizeof sums) {
        for (int v = 0; v < 4; v++) {
            const char *line = piece + i + v * static_cast<int64_t>(sizeof(Vector));
            Vector values;
            memcpy(&values, line, sizeof values);
            sums[v] += values;
            __builtin_prefetch(line + AHEAD, 0, 2);
        }
    }
    const Vector total = sums[0] + sums[1] + sums[2] + sums[3];
    return total[0] + total[1] + total[2] + total[3] + total[4] + total[5] + total[6] + total[7];
}

/* On the threads that the kernels run on: other ones would share the cores with those, which spin for a while after each
 * call. The sum keeps the compiler from leaving the reading out. */
extern "C" int64_t read_memory(const char *memory, int64_t bytes, const aiter_cpu_executor *executor) {
    std::atomic<int64_t> next{0}, total{0};
    auto work = [&] {
        int64_t sum = 0;
        for (int64_t piece; (piece = next.fetch_add(PIECE)) + PIECE <= bytes;) sum += sum_of(memory + piece);
        total += sum;
    };
    run_parallel(executor, executor->num_threads, work);
    return total;
}
