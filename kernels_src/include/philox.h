/* Which weights dropout leaves out: the same ones in the forward and the backward pass, on every CPU and GPU, whatever
 * the tiles and threads. Random numbers come from a counter, by Philox 4x32-10 (Salmon et al., "Parallel Random Numbers:
 * As Easy as 1, 2, 3", SC 2011): four words from four words and a key, with nothing kept between calls.
 *
 *     key      (seed)                     64 bits
 *     counter  (key, row, head, offset)   32 bits each; head = sequence * heads_q + query head
 *
 * One call decides for two query rows, eight apart, and four keys, two neighbours and the two that are eight further:
 * what a lane holds of a matrix product on one arch or the other, in the forward pass and, transposed, in the backward
 * pass. The counter is that of the first of them, without bit 3 of the row and bits 0 and 3 of the key, which say where
 * its 16 bits are:
 *
 *     word 2 * (bit 3 of the row) + bit 3 of the key, half bit 0 of the key
 *
 * A weight is kept where they are not less than the threshold, 65536 times the probability of being left out. Those that
 * are kept count 65536 / (65536 - threshold) times, so that the mean over the masks is exact. */
#ifndef AITER_PHILOX_H
#define AITER_PHILOX_H

#include <stdint.h>

#if defined(__HIP__) || defined(__CUDACC__)
#define AITER_PHILOX __host__ __device__ __forceinline__
#else
#define AITER_PHILOX inline __attribute__((always_inline))
#endif

constexpr uint32_t DROPOUT_UNIT = 65536;
constexpr int32_t DROPOUT_KEY_BITS = 9, DROPOUT_ROW_BITS = 8; /* that are not in the counter */

/* `words`, a counter, become random. Word is a uint32_t, or many of them side by side; wide_product(word, constant, high)
 * returns the low half of a product and leaves the high one. */
template <class Word, class WideProduct>
AITER_PHILOX void philox(Word (&words)[4], uint32_t key_low, uint32_t key_high, WideProduct wide_product) {
#if defined(__clang__) || defined(__CUDACC__)
#pragma unroll
#endif
    for (int round = 0; round < 10; round++) {
        Word high_0, high_2;
        const Word low_0 = wide_product(words[0], 0xd2511f53u, high_0);
        const Word low_2 = wide_product(words[2], 0xcd9e8d57u, high_2);
        words[0] = high_2 ^ words[1] ^ key_low;
        words[1] = low_2;
        words[2] = high_0 ^ words[3] ^ key_high;
        words[3] = low_0;
        key_low += 0x9e3779b9u;
        key_high += 0xbb67ae85u;
    }
}

#endif
