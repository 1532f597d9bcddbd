/* Softmax over keys that arrive tile by tile, and what turns its result into output rows. One wave, its rows in
 * registers: see Accumulator in gpu/arch.h.
 *
 * Scores stay as the matrix unit left them; exp2(score * scale - maximum) is one fused multiply-add and one exp2. The
 * maximum of a row is a reference point, not the true maximum: it moves only when a score exceeds it by more than
 * THRESHOLD, so that the output is rescaled in few tiles. Probabilities are then up to 2^THRESHOLD, which 16 bit hold
 * as exactly as those below 1. */
#ifndef AITER_GPU_SOFTMAX_H
#define AITER_GPU_SOFTMAX_H

#include "gpu/sequence.h"

namespace aiter {

constexpr float INFINITE = __builtin_inff();
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

/* Softmax in the exp2 domain needs a positive scale: queries are negated for a negative one, and for zero one so small
 * that every score becomes 0, while masked ones stay -inf. */
struct Scale {
    float positive;
    bool negate;
    __device__ __forceinline__ explicit Scale(float scale) : negate(scale < 0) {
        positive = scale == 0 ? 1e-37f : (negate ? -scale : scale) * LOG2_E;
    }
};

template <int SLOTS, int LANES = LANES_PER_ROW> struct OnlineSoftmax {
    static constexpr float THRESHOLD = 8.0f;
    float scale;
    float maximum[SLOTS]; /* of score * scale */
    float sum[SLOTS];     /* of the probabilities that this lane has seen */

    __device__ __forceinline__ explicit OnlineSoftmax(float scale) : scale(scale) {
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) maximum[slot] = -INFINITE, sum[slot] = 0.0f;
    }

    /* Scores, -inf where masked, become probabilities relative to `maximum`. Returns whether that has moved in any row
     * of the wave; then the output so far must be multiplied by `shrink`. One row after the other, so that the greatest
     * value of the next is looked for while the exponentials of this one are made. */
    template <class Scores> __device__ __forceinline__ bool advance(Scores &s, float (&shrink)[SLOTS]) {
        bool grown = false;
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            const float top = s.largest(slot) * scale; /* of this lane */
            shrink[slot] = 1.0f;
            if (wave_any(top > maximum[slot] + THRESHOLD)) {
                const float next = __builtin_fmaxf(maximum[slot], row_max<LANES>(top));
                shrink[slot] = next == -INFINITE ? 1.0f : exp2(maximum[slot] - next);
                maximum[slot] = next;
                sum[slot] *= shrink[slot];
                grown = true;
            }
            const float reference = maximum[slot] == -INFINITE ? 0.0f : maximum[slot];
            sum[slot] += s.exponentiate(slot, scale, reference);
        }
        return grown;
    }

    template <class Output> static __device__ __forceinline__ void rescale(Output &o, const float (&shrink)[SLOTS]) {
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) o.multiply(slot, shrink[slot]);
    }

    /* Both at once, for an output that is not in use meanwhile. */
    template <class Scores, class Output> __device__ __forceinline__ void update(Scores &s, Output &o) {
        float shrink[SLOTS];
        if (advance(s, shrink)) rescale(o, shrink);
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

/* -inf for the keys of the tile beginning at `first` that a row does not see. The wave's rows begin at `wave_row`. */
template <class Scores, class Sequence>
__device__ __forceinline__ void mask(Scores &s, const Sequence &sequence, int wave_row, int first) {
    wave_row = opaque(wave_row);
#pragma unroll
    for (int slot = 0; slot < Scores::SLOTS; ++slot) {
        const int limit = sequence.visible(wave_row + Scores::row(slot)) - first - Scores::lane_column();
        int rest; /* of the limit, from the first of 16 values on: columns are then small constants */
#pragma unroll
        for (int i = 0; i < Scores::VALUES; ++i) {
            /* opaque: for else the selections are moved out of the branch that spares most tiles of them, and all the
             * comparisons are made before the first selection. */
            if (i % 16 == 0) rest = opaque(limit - Scores::column(i));
            const bool visible = Scores::column(i) - Scores::column(i / 16 * 16) < rest;
            s.set(slot, i, opaque(visible ? s.get(slot, i) : -INFINITE));
        }
    }
}

/* One row once more, by a whole wave, key by key and only those it sees: for rows into which a matrix product has let
 * 0 * inf or 0 * NaN of a masked value. `log_sum` of the row is in base 2 and right. Slow and rare. */
template <int HEAD_DIM, class Sequence>
__device__ __forceinline__ void exact_row(const Sequence &sequence, int row, float signed_scale, float log_sum) {
    constexpr int DIMENSIONS = round_up(HEAD_DIM, WAVE) / WAVE; /* of a lane: lane, lane + WAVE, ... */
    float q[DIMENSIONS], result[DIMENSIONS];
#pragma unroll
    for (int i = 0; i < DIMENSIONS; ++i) {
        const int d = lane() + i * WAVE;
        q[i] = d < HEAD_DIM ? to_float(sequence.query[row * sequence.query_stride + d]) : 0.0f;
        result[i] = 0.0f;
    }
#pragma unroll 1
    for (int key = 0; key < sequence.visible(row); ++key) {
        const auto tile = sequence.keys.tile(key);
        const auto place = tile.place(0, 0);
        const Element *k = reinterpret_cast<const Element *>(tile.key(place, 0));
        const Element *v = reinterpret_cast<const Element *>(tile.value(place, 0));
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < DIMENSIONS; ++i)
            if (lane() + i * WAVE < HEAD_DIM) dot += q[i] * to_float(k[lane() + i * WAVE]);
        const float p = exp2(wave_sum(dot) * signed_scale - log_sum);
#pragma unroll
        for (int i = 0; i < DIMENSIONS; ++i)
            if (lane() + i * WAVE < HEAD_DIM) result[i] += p * to_float(v[lane() + i * WAVE]);
    }
#pragma unroll
    for (int i = 0; i < DIMENSIONS; ++i)
        if (lane() + i * WAVE < HEAD_DIM)
            sequence.output[row * sequence.output_stride + lane() + i * WAVE] = to_element(result[i]);
}

/* Is there a NaN or infinity among the values of tokens begin ... end-1? Asked by a whole wave. */
template <int HEAD_DIM, class Sequence>
__device__ __forceinline__ bool values_not_finite(const Sequence &sequence, int begin, int end) {
    bool found = false;
#pragma unroll 1
    for (int key = begin; key < end; ++key) {
        const auto tile = sequence.keys.tile(key);
        const Element *v = reinterpret_cast<const Element *>(tile.value(tile.place(0, 0), 0));
        for (int d = lane(); d < HEAD_DIM; d += WAVE) found |= !(__builtin_fabsf(to_float(v[d])) < INFINITE);
    }
    return wave_any(found);
}

} // namespace aiter

#endif
