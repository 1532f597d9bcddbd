/* Softmax over keys that arrive tile by tile, and what turns its result into output rows. One wave, its rows in
 * registers: see Accumulator in gpu/arch.h.
 *
 * Scores stay as the matrix unit left them; exp2(score * scale - maximum) is one fused multiply-add and one exp2. The
 * maximum of a row is a reference point, not the true maximum: it moves only when a score exceeds it by more than
 * THRESHOLD, so that the output is rescaled in few tiles. Probabilities are then up to 2^THRESHOLD, which 16 bit hold
 * as exactly as those below 1. What is far below 1 fp16 does not hold: less than 2^-25 is 0, and on gfx90a, whose matrix
 * unit takes subnormal numbers for 0, less than 2^-14, though the sum has it. So there the reference point is BELOW the
 * greatest score, and probabilities are up to 2^15. */
#ifndef AITER_GPU_SOFTMAX_H
#define AITER_GPU_SOFTMAX_H

#include "gpu/arch.h"
#include "gpu/dropout.h"
#include "gpu/score.h"
#include "gpu/sequence.h"

namespace aiter {

template <int SLOTS, int LANES = LANES_PER_ROW> struct OnlineSoftmax {
#if defined(AITER_DTYPE_BF16) && !AITER_FP8_CACHE
    static constexpr float BELOW = 0.0f;
#else
    static constexpr float BELOW = 7.0f; /* fp16, in which 8-bit values are multiplied, too */
#endif
    static constexpr float THRESHOLD = 8.0f + BELOW;
    /* No score is less, and unlike -inf it can be subtracted from a score that is. */
    static constexpr float LOWEST = -3.40282347e38f;
    float scale;
    float maximum[SLOTS]; /* of score * scale */
    float sum[SLOTS];     /* of the probabilities that this lane has seen */

    __device__ __forceinline__ explicit OnlineSoftmax(float scale) : scale(scale) {
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) maximum[slot] = LOWEST, sum[slot] = 0.0f;
    }

    /* Where a row's reference point is after a tile whose greatest score, times scale, is `top`. Only a row that must moves
     * it: its bits do not depend on which rows share its wave. */
    __device__ __forceinline__ float reference(int slot, float top) const {
        return top > maximum[slot] + THRESHOLD ? top - BELOW : maximum[slot];
    }

    /* Scores, -inf where masked, become probabilities relative to `maximum`. Returns whether that has moved in any row
     * of the wave; then the output so far must be multiplied by `shrink`. All maxima first, so that between the branch
     * and the end all exponentials, sums and roundings can be mixed: an exponential takes the place of eight other
     * instructions. at_growth(slot): before these. largest(slot): the greatest of this lane's scores. */
    template <class Scores> __device__ __forceinline__ bool advance(Scores &s, float (&shrink)[SLOTS]) {
        return advance(s, shrink, [](int) {}, [&](int slot) { return s.largest(slot); });
    }
    template <class Scores, class AtGrowth, class Largest>
    __device__ __forceinline__ bool advance(Scores &s, float (&shrink)[SLOTS], AtGrowth at_growth, Largest largest) {
        float top[SLOTS]; /* of this lane */
        bool grown = false;
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            top[slot] = largest(slot) * scale;
            shrink[slot] = 1.0f;
            grown |= top[slot] > maximum[slot] + THRESHOLD;
        }
        grown = wave_any(grown);
        if (__builtin_expect(grown, false)) {
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) {
                top[slot] = row_max<LANES>(top[slot]);
                const float next = reference(slot, top[slot]);
                shrink[slot] = exp2(maximum[slot] - next);
                maximum[slot] = next;
                sum[slot] *= shrink[slot];
                at_growth(slot);
            }
        }
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) sum[slot] += s.exponentiate(slot, scale, maximum[slot]);
        return grown;
    }

    /* The same without a reference point, for scores of a SmallCap. */
    template <class Scores> __device__ __forceinline__ void add(Scores &s) {
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            maximum[slot] = 0.0f;
            sum[slot] += s.exponentiate(slot, 1.0f, 0.0f);
        }
    }

    /* The same where others have found maxima, none of them smaller. */
    __device__ __forceinline__ bool move_to(const float (&maxima)[SLOTS], float (&shrink)[SLOTS]) {
        bool grown = false;
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            const bool own = maxima[slot] == maximum[slot]; /* both -inf, it may be */
            shrink[slot] = own ? 1.0f : exp2(maximum[slot] - maxima[slot]);
            maximum[slot] = maxima[slot];
            sum[slot] *= shrink[slot];
            grown |= !own;
        }
        return wave_any(grown);
    }

    template <class Output> static __device__ __forceinline__ void rescale(Output &o, const float (&shrink)[SLOTS]) {
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) o.multiply(slot, shrink[slot]);
    }

    /* Both at once, for an output that is not in use meanwhile. Where a lane has one row, the output is rescaled when
     * its maximum moves: then no branch stands between the exponentials and the product that takes them. */
    template <class Scores, class Output> __device__ __forceinline__ void update(Scores &s, Output &o) {
        update(s, o, [&](int slot) { return s.largest(slot); });
    }
    template <class Scores, class Output, class Largest>
    __device__ __forceinline__ void update(Scores &s, Output &o, Largest largest) {
        float shrink[SLOTS];
        if constexpr (SLOTS == 1) {
            advance(s, shrink, [&](int slot) { o.multiply(slot, shrink[slot]); }, largest);
        } else if (advance(s, shrink)) {
            rescale(o, shrink);
        }
    }

    /* Sum over the whole row, and the logarithm (base 2) of the sum of exponentials: after the last tile. */
    __device__ __forceinline__ void finish(float (&log_sum)[SLOTS]) {
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            sum[slot] = row_sum<LANES>(sum[slot]);
            /* A score of +inf makes the probabilities NaN (inf - inf), as it should, but the log-sum-exp is +inf. */
            log_sum[slot] = maximum[slot] == INFINITE ? INFINITE : maximum[slot] + log2(sum[slot]);
        }
    }
};

/* The softmax's end: what joins its sum beside the keys. A sink is a score without a value; `log_sum` is that of the
 * keys, in base 2. Returns their share of the whole, which the output is multiplied by. */
__device__ __forceinline__ float share_of_keys(const float *sinks, int head, float log_sum) {
    return sinks == nullptr ? 1.0f : reciprocal(1.0f + exp2(usual_nan(sinks[head]) * LOG2_E - log_sum));
}
/* What a row's output is multiplied by. If a sink has all of the weight, the keys' sum may be 0, too. */
__device__ __forceinline__ float weight_of_keys(float sum, float share) {
    return share == 0.0f ? 0.0f : reciprocal(sum) * share;
}

/* One row once more, by a whole wave, key by key and only those it sees: for rows into which a matrix product has let
 * 0 * inf or 0 * NaN of a masked value. `log_sum` of the row is in base 2 and right, `share` what its weights are
 * multiplied by. Writes the columns that are asked for. Slow and rare. */
__device__ __forceinline__ void exact_row(const Sequence &sequence, int row, const Score &score, const Dropout &dropout,
                                          float log_sum, float share, int first_column = 0, int columns = VALUE_DIM) {
    constexpr int DIMENSIONS = round_up(HEAD_DIM, WAVE) / WAVE; /* of a lane: lane, lane + WAVE, ... */
    constexpr int VALUE_DIMENSIONS = round_up(VALUE_DIM, WAVE) / WAVE;
    float q[DIMENSIONS], result[VALUE_DIMENSIONS] = {};
    const auto &scored = sequence.scaled(score);
#pragma unroll
    for (int i = 0; i < DIMENSIONS; ++i) {
        const int d = lane() + i * WAVE;
        q[i] =
            d < HEAD_DIM ? to_float(sequence.query[row * sequence.query_stride + d]) * scored.query_bits.factor() : 0;
    }
    const Range sees = sequence.mask.keys_of(row);
#pragma unroll 1
    for (int key = sees.low; key < sees.high; ++key) {
        const auto tile = sequence.keys.tile(key);
        const auto place = tile.place(0, 0);
        const Cached *k = reinterpret_cast<const Cached *>(tile.key(place, 0));
        const Cached *v = reinterpret_cast<const Cached *>(tile.value(place, 0));
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < DIMENSIONS; ++i)
            if (lane() + i * WAVE < HEAD_DIM) dot += q[i] * to_float(k[lane() + i * WAVE]);
        const float distance = __builtin_fabsf(static_cast<float>(row + sequence.mask.diagonal - key));
        float p = exp2(scored.finish(wave_sum(dot), sequence.slope, distance) * scored.unit - log_sum) * share;
#if AITER_DROPOUT
        p = dropout.keeps(sequence.drawn_head, row, key) ? p : 0.0f;
#endif
#pragma unroll
        for (int i = 0; i < VALUE_DIMENSIONS; ++i)
            if (lane() + i * WAVE < VALUE_DIM) result[i] += p * to_float(v[lane() + i * WAVE]);
    }
#pragma unroll
    for (int i = 0; i < VALUE_DIMENSIONS; ++i) {
        const int column = lane() + i * WAVE;
        if (column < VALUE_DIM && column >= first_column && column < first_column + columns)
            sequence.output[row * sequence.output_stride + column] = to_element(result[i]);
    }
}

/* Is there a NaN or infinity among the values of tokens begin ... end-1? Asked by a whole wave. */
__device__ __forceinline__ bool values_not_finite(const Sequence &sequence, int begin, int end) {
    bool found = false;
#pragma unroll 1
    for (int key = begin; key < end; ++key) {
        const auto tile = sequence.keys.tile(key);
        const Cached *v = reinterpret_cast<const Cached *>(tile.value(tile.place(0, 0), 0));
        for (int d = lane(); d < VALUE_DIM; d += WAVE) found |= !(__builtin_fabsf(to_float(v[d])) < INFINITE);
    }
    return wave_any(found);
}

} // namespace aiter

#endif
