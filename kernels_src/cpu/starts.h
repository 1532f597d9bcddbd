/* Where the rows of packed sequences begin. */
#ifndef AITER_CPU_STARTS_H
#define AITER_CPU_STARTS_H

#include <stdint.h>

/* Starts that do not fall and end within the rows; no more than `most` apart or, where lengths say how many rows of each
 * sequence count, with room for those. */
static inline bool starts_fit(const int32_t *starts, const int32_t *lengths, int64_t batch, int64_t most,
                              int64_t total) {
    if (!starts) return true;
    if (starts[0] < 0 || starts[batch] > total) return false;
    for (int64_t b = 0; b < batch; b++) {
        const int64_t length = static_cast<int64_t>(starts[b + 1]) - starts[b];
        if (length < (lengths ? lengths[b] : 0) || (!lengths && length > most)) return false;
    }
    return true;
}

#endif
