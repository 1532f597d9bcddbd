/* AITER_DROPOUT on the CPU: which weights are kept (philox.h says), lanes at a time. The softmax's own sum is that of all
 * weights; what is kept counts `scale` times, which joins the last multiplication of an output or a gradient.
 */
#ifndef AITER_CPU_DROPOUT_H
#define AITER_CPU_DROPOUT_H

#include "philox.h"
#include "simd.h"

#if AITER_DROPOUT
constexpr bool DROPOUT = true;
#else
constexpr bool DROPOUT = false;
#endif

typedef uint32_t WordVec __attribute__((vector_size(LANES * 4)));
typedef uint64_t LongVec __attribute__((vector_size(LANES * 4)));

/* The product of the even lanes, 64 bits each. */
AITER_INLINE LongVec even_product(WordVec a, uint32_t b) {
#if AITER_AVX512
    return (LongVec)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)(WordVec{} + b));
#elif AITER_AVX2
    return (LongVec)_mm256_mul_epu32((__m256i)a, (__m256i)(WordVec{} + b));
#else
    return ((LongVec)a & 0xffffffffu) * b;
#endif
}

struct WideProduct {
    AITER_INLINE_MEMBER WordVec operator()(WordVec a, uint32_t b, WordVec &high) const {
        const LongVec even = even_product(a, b), odd = even_product((WordVec)((LongVec)a >> 32), b);
        high = (WordVec)((even >> 32) | (odd & (uint64_t(0xffffffffu) << 32)));
        return a * b;
    }
};

struct Dropout {
    uint32_t seed_low, seed_high, offset;
    int32_t threshold;
    float scale; /* 1 without AITER_DROPOUT */

    template <class Problem> Dropout(const Problem &p, const int64_t *rng_state) : scale(1.0f) {
        if (!DROPOUT) return;
        seed_low = static_cast<uint32_t>(rng_state[0]);
        seed_high = static_cast<uint32_t>(static_cast<uint64_t>(rng_state[0]) >> 32);
        offset = static_cast<uint32_t>(rng_state[1]);
        threshold = p.dropout_threshold;
        scale = static_cast<float>(DROPOUT_UNIT / static_cast<double>(DROPOUT_UNIT - threshold));
    }

    /* The four words that decide, for rows of heads and a key, lane by lane. */
    struct Words {
        WordVec words[4];

        AITER_INLINE_MEMBER Words(const Dropout &dropout, IntVec head, IntVec row, IntVec key)
            : words{(WordVec)(key & ~DROPOUT_KEY_BITS), (WordVec)(row & ~DROPOUT_ROW_BITS), (WordVec)head,
                    WordVec{} + dropout.offset} {
            philox(words, dropout.seed_low, dropout.seed_high, WideProduct());
        }
    };

    /* All bits set where the weights of a key are kept. */
    AITER_INLINE_MEMBER IntVec kept(IntVec head, IntVec row, IntVec key) const {
        const Words drawn(*this, head, row, key);
        const IntVec second_row = (row & 8) != 0, second_keys = (key & 8) != 0, high = (key & 1) != 0;
        const IntVec first = second_keys ? (IntVec)drawn.words[1] : (IntVec)drawn.words[0];
        const IntVec second = second_keys ? (IntVec)drawn.words[3] : (IntVec)drawn.words[2];
        const IntVec word = second_row ? second : first;
        return ((high ? word >> 16 : word) & 0xffff) >= threshold;
    }

    /* The same for `count` keys from the first one on, which are the same in all lanes: put(i, kept) for each. */
    template <class Put>
    AITER_INLINE_MEMBER void kept(IntVec head, IntVec row, int32_t first, int count, const Put &put) const {
        const IntVec second_row = (row & 8) != 0;
        for (int32_t sixteen = first / 16 * 16; sixteen < first + count; sixteen += 16)
            for (int pair = 0; pair < 8; pair += 2) {
                const Words drawn(*this, head, row, broadcast(sixteen + pair));
                for (int i = 0; i < 4; i++) {
                    const int at = sixteen - first + pair + i % 2 + i / 2 * 8;
                    if (at < 0 || at >= count) continue;
                    const IntVec word = second_row ? (IntVec)drawn.words[2 + i / 2] : (IntVec)drawn.words[i / 2];
                    put(at, ((i % 2 ? word >> 16 : word) & 0xffff) >= threshold);
                }
            }
    }
};

#endif
