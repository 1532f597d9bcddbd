/* AITER_DROPOUT on the GPU: which weights are kept (philox.h says), a tile of scores at a time. Four words decide for two
 * rows and four keys; a lane uses as many of these as it holds:
 *
 *                       rows are queries                     rows are keys (gradients of keys and values)
 *     gfx9              one row, four keys                   two rows, one key
 *     sm_80 and later   two rows (slots), four keys          two rows, two keys (slots)
 *
 * The softmax's own sum is that of all weights; what is kept counts `scale` times, which joins the last multiplication of
 * an output or a gradient. Tiles begin at multiples of 16. */
#ifndef AITER_GPU_DROPOUT_H
#define AITER_GPU_DROPOUT_H

#include "gpu/arch.h"
#include "philox.h"

namespace aiter {

struct WideProduct {
    __device__ __forceinline__ uint32_t operator()(uint32_t a, uint32_t b, uint32_t &high) const {
        const uint64_t product = static_cast<uint64_t>(a) * b;
        high = static_cast<uint32_t>(product >> 32);
        return static_cast<uint32_t>(product);
    }
};

struct Dropout {
    uint32_t seed_low, seed_high, offset, threshold;
    float scale; /* 1 without AITER_DROPOUT */

    template <class Tensors>
    __device__ __forceinline__ Dropout(const aiter_attention_problem &p, const Tensors &t) : scale(1.0f) {
        if (!DROPOUT) return;
        const auto word = [&](int i) {
            return static_cast<uint32_t>(uniform(reinterpret_cast<const int32_t *>(t.rng_state)[i]));
        };
        seed_low = word(0), seed_high = word(1), offset = word(2);
        threshold = static_cast<uint32_t>(p.dropout_threshold);
        scale = static_cast<float>(DROPOUT_UNIT) / static_cast<float>(DROPOUT_UNIT - threshold);
    }

    __device__ __forceinline__ void draw(uint32_t (&words)[4], int head, int row, int key) const {
        words[0] = static_cast<uint32_t>(key & ~DROPOUT_KEY_BITS);
        words[1] = static_cast<uint32_t>(row & ~DROPOUT_ROW_BITS);
        words[2] = static_cast<uint32_t>(head), words[3] = offset;
        philox(words, seed_low, seed_high, WideProduct());
    }
    __device__ __forceinline__ bool low_kept(uint32_t word) const { return (word & 0xffff) >= threshold; }
    __device__ __forceinline__ bool high_kept(uint32_t word) const { return word >> 16 >= threshold; }

    /* One weight. */
    __device__ __forceinline__ bool keeps(int head, int row, int key) const {
        uint32_t words[4];
        draw(words, head, row, key);
        const uint32_t first = key & 8 ? words[1] : words[0], second = key & 8 ? words[3] : words[2];
        const uint32_t word = row & 8 ? second : first;
        return key & 1 ? high_kept(word) : low_kept(word);
    }

    /* Calls each(slot, i, kept) for every value of a tile whose columns begin at `first`; place(slot): where its row
     * stands. Rows are queries and columns keys, or, KEYS_ARE_ROWS, the other way round. */
    template <class Scores, bool KEYS_ARE_ROWS, class PlaceOf, class Each>
    __device__ __forceinline__ void for_tile(int head, int first, PlaceOf place, Each each) const {
        constexpr int FURTHER = Scores::EIGHT_FURTHER; /* from a value to that eight columns further */
        constexpr bool PAIRS = Scores::SLOTS_IN_PAIRS; /* slots 2n and 2n + 1 are rows eight apart */
        const int lane_first = first + Scores::lane_column();
#pragma unroll
        for (int i = 0; i < Scores::VALUES; ++i) {
            if (Scores::column(i) & 8 || (!KEYS_ARE_ROWS && Scores::column(i) & 1)) continue;
            const int column = lane_first + Scores::column(i);
            uint32_t words[4];
#pragma unroll
            for (int slot = 0; slot < Scores::SLOTS; ++slot) {
                const int own = place(slot);
                if (!PAIRS || slot % 2 == 0)
                    draw(words, head, KEYS_ARE_ROWS ? column : own, KEYS_ARE_ROWS ? own : column);
                const bool eight = PAIRS ? slot % 2 : own & 8;
                if (KEYS_ARE_ROWS) { /* query rows `column` and the one eight further */
                    const uint32_t x = eight ? words[1] : words[0], y = eight ? words[3] : words[2];
                    each(slot, i, own & 1 ? high_kept(x) : low_kept(x));
                    each(slot, i + FURTHER, own & 1 ? high_kept(y) : low_kept(y));
                } else { /* two keys, and those eight further */
                    const uint32_t x = eight ? words[2] : words[0], y = eight ? words[3] : words[1];
                    each(slot, i, low_kept(x));
                    each(slot, i + 1, high_kept(x));
                    each(slot, i + FURTHER, low_kept(y));
                    each(slot, i + FURTHER + 1, high_kept(y));
                }
            }
        }
    }
};

} // namespace aiter

#endif
