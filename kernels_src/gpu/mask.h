/* Which keys a query row sees, and which rows see a key: the one place that knows.
 *
 *     keys ->  0 1 2 3 4 5 6 7
 *     row 0    x x x x . . . .      causal: row i, which stands at key i + diagonal, sees the keys up to there.
 *     row 1    x x x x x . . .      A window replaces that by an edge on either side, each of which may be absent:
 *     row 2    . x x x x x . .      here diagonal 3, left 4, right 0.
 *
 * AITER_CHUNK: and none outside of the row's own chunk of so many keys, whose edges do not move right within it.
 *
 * Both edges move right with the row, or stay. So the keys that any of some neighbouring rows sees begin with those of the
 * first and end with those of the last; those that all of them see, the other way round. Tiles of keys outside the
 * former are skipped, and within the latter nothing needs to be hidden. */
#ifndef AITER_GPU_MASK_H
#define AITER_GPU_MASK_H

#include "gpu/arch.h"

namespace aiter {

struct Range {
    int low, high; /* low <= i < high */
    __device__ __forceinline__ bool empty() const { return high <= low; }
    /* BOTH_ENDS: the range may begin after `begin`; else only its end is looked at. */
    template <bool BOTH_ENDS> __device__ __forceinline__ bool overlaps(int begin, int end) const {
        return begin < high && (!BOTH_ENDS || end > low);
    }
    template <bool BOTH_ENDS> __device__ __forceinline__ bool covers(int begin, int end) const {
        return end <= high && (!BOTH_ENDS || low <= begin);
    }
};

/* Positions are exact up to 2^29 tokens: what comes from device memory is clamped so that no sum overflows. */
struct Mask {
    static constexpr int FAR = 1 << 29;
    int rows, keys; /* that exist */
    int diagonal;   /* row i stands at key i + diagonal */
    int left, right;
#if AITER_CHUNK
    int chunk;
#endif

    Mask() = default;
    __device__ __forceinline__ Mask(const aiter_attention_problem &p, int rows, int keys, const int32_t *offsets,
                                    int batch)
        : rows(rows), keys(keys), diagonal(offsets == nullptr ? keys - rows : clamp(offsets[batch], -FAR, FAR)),
          left(lesser(p.window_left, FAR)), right(lesser(p.window_right, FAR)) {
#if AITER_CHUNK
        chunk = lesser(p.attention_chunk, FAR);
#endif
    }
    /* The chunk of a place. */
    __device__ __forceinline__ Range chunk_of(int place) const {
#if AITER_CHUNK
        const int past = place % chunk, first = place - (past < 0 ? past + chunk : past);
        return {first, first + chunk};
#else
        return {-2 * FAR, 2 * FAR - 1};
#endif
    }
    /* The keys that a row sees. */
    __device__ __forceinline__ Range keys_of(int row) const {
        const int own = row + diagonal;
        if (CAUSAL) return {0, clamp(own + 1, 0, keys)};
        if (WINDOW) {
            Range sees = {left < 0 ? 0 : clamp(own - left, 0, keys),
                          right < 0 ? keys : clamp(own + right + 1, 0, keys)};
            if (CHUNK) {
                const Range all = chunk_of(own);
                sees = {greater(sees.low, clamp(all.low, 0, keys)), lesser(sees.high, clamp(all.high, 0, keys))};
            }
            return sees;
        }
        return {0, keys};
    }
    /* The keys that any of the rows first ... end-1 sees, and those that all of them see. */
    __device__ __forceinline__ Range keys_of_any(int first, int end) const {
        end = lesser(end, rows);
        return {keys_of(first).low, first < end ? keys_of(end - 1).high : 0};
    }
    __device__ __forceinline__ Range keys_of_all(int first, int end) const {
        return {keys_of(lesser(end, rows) - 1).low, keys_of(first).high};
    }
    /* The rows that see a key. */
    __device__ __forceinline__ Range rows_of(int key) const {
        const int own = key - diagonal;
        if (CAUSAL) return {clamp(own, 0, rows), rows};
        if (WINDOW) {
            Range sees = {right < 0 ? 0 : clamp(own - right, 0, rows),
                          left < 0 ? rows : clamp(own + left + 1, 0, rows)};
            if (CHUNK) {
                const Range all = chunk_of(key);
                sees = {greater(sees.low, clamp(all.low - diagonal, 0, rows)),
                        lesser(sees.high, clamp(all.high - diagonal, 0, rows))};
            }
            return sees;
        }
        return {0, rows};
    }
};

/* Sets what a row does not see to `hidden`, in a tile of scores whose columns begin at `first`. range(slot): what the
 * row of a slot sees. BOTH_ENDS: the range may begin within the tile, not only end there. That takes three instructions
 * for a value, or little more than one where MASKS_OF_BITS. */
template <bool BOTH_ENDS, class Scores, class RangeOf>
__device__ __forceinline__ void hide(Scores &s, float hidden, int first, RangeOf range) {
#pragma unroll
    for (int slot = 0; slot < Scores::SLOTS; ++slot) {
        const Range sees = range(slot);
        const int low = BOTH_ENDS ? sees.low - first - Scores::lane_column() : 0;
        const int high = sees.high - first - Scores::lane_column();
        if constexpr (WINDOW && BOTH_ENDS && MASKS_OF_BITS) {
            const uint32_t visible = Scores::values_between(low, high);
#pragma unroll
            for (int i = 0; i < Scores::VALUES; ++i) /* opaque: see below */
                s.set(slot, i, opaque(visible >> i & 1 ? s.get(slot, i) : hidden));
            continue;
        }
        const int width = BOTH_ENDS && high < low ? 0 : high - low;
        int edge; /* low or high, from the first of 16 values on: columns are then small constants */
#pragma unroll
        for (int i = 0; i < Scores::VALUES; ++i) {
            /* opaque: for else the selections are moved out of the branch that spares most tiles of them, and all the
             * comparisons are made before the first selection. */
            if (i % 16 == 0) edge = opaque((BOTH_ENDS ? low : high) - Scores::column(i));
            const int column = Scores::column(i) - Scores::column(i / 16 * 16);
            const bool visible =
                BOTH_ENDS ? static_cast<unsigned>(column - edge) < static_cast<unsigned>(width) : column < edge;
            s.set(slot, i, opaque(visible ? s.get(slot, i) : hidden));
        }
    }
}

} // namespace aiter

#endif
