/* Division of numbers from 0 to 2^31 - 1 by one that the host knows, which spares the GPU a long sequence: it has no
 * instruction for a quotient, and 25 take its place, with conversions to float and back in a chain (T. Granlund,
 * P. Montgomery, "Division by Invariant Integers using Multiplication", 1994, figure 4.1). */
#ifndef AITER_GPU_DIVISOR_H
#define AITER_GPU_DIVISOR_H

#include <stdint.h>

namespace aiter {

struct Divisor {
    int by = 1;
    uint32_t factor = 1;
    int shift = 0;

    Divisor() = default;
    /* Of 31 bits. 0 counts as 1: what would be divided by it there is none of. */
    __host__ explicit Divisor(int64_t number) : by(number > 0 ? static_cast<int>(number) : 1) {
        while (int64_t(1) << shift < by) ++shift;
        factor = static_cast<uint32_t>((uint64_t((int64_t(1) << shift) - by) << 32) / by + 1);
    }
    __host__ __device__ __forceinline__ int quotient(int x) const {
        return static_cast<int>((static_cast<uint32_t>(uint64_t(x) * factor >> 32) + x) >> shift);
    }
};

} // namespace aiter

#endif
