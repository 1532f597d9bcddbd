/* Attention of a strip: STRIP_ROWS query rows side by side along the vector lanes, over one block of keys at a time.
 *
 *            rows ->                                          lane by lane, no reduction across lanes:
 *   keys   S^T = K Q^T     P^T = 2^(scale S^T - maximum)      maximum, sum
 *    |     ---------------------------------------------
 *    v     O^T += V^T P^T                                     times 2^(old - new maximum) when the maximum moves
 *
 * The maximum that the weights are relative to follows the true one only when that has grown by RESCALE_THRESHOLD:
 * O^T is then rescaled a few times per sequence instead of once per block, and weights stay below 2^RESCALE_THRESHOLD.
 */
#ifndef AITER_CPU_STRIP_H
#define AITER_CPU_STRIP_H

#include "packed.h"

#if AITER_TILES
#include "matrix_amx.h"
#else
#include "matrix_vector.h"
#endif

constexpr float RESCALE_THRESHOLD = 8.0f;

struct Strip {
    Step *queries; /* Q^T [DIM_STEPS][STRIP_ROWS] */
    float *output; /* O^T [DIM][STRIP_ROWS], relative to `maximum`, not yet divided by `sum` */
    float *maximum, *sum;
    int32_t *visible; /* row sees the keys below this */
    int32_t fewest_visible, most_visible; /* over the rows of the strip */
    int vectors;      /* how many of STRIP_VECTORS hold rows */
    bool empty;       /* nothing accumulated yet, `output` is not initialised */
};

template <int VECTORS>
static void hide_keys(float *s, const Strip &strip, int32_t first_key, int count) {
    for (int v = 0; v < VECTORS; v++) {
        const IntVec visible = load(strip.visible + v * LANES) - first_key;
        for (int j = 0; j < count; j++) {
            float *p = s + j * STRIP_ROWS + v * LANES;
            store(p, visible > j ? load(p) : broadcast(-INFINITE));
        }
    }
}

/* From scores to weights (which may overlay them); updates maximum and sum, and rescales what was accumulated where the maximum moved. */
template <int VECTORS>
static void soften(const float *s, Step *weights, Strip &strip, int count, float scale_log2) {
    Vec largest[VECTORS];
    for (int v = 0; v < VECTORS; v++) largest[v] = broadcast(-INFINITE);
    for (int j = 0; j < count; j++)
        AITER_UNROLL
        for (int v = 0; v < VECTORS; v++) largest[v] = maximum(largest[v], load(s + j * STRIP_ROWS + v * LANES));
    for (int v = 0; v < VECTORS; v++) {
        Vec maximum = load(strip.maximum + v * LANES), sum = load(strip.sum + v * LANES);
        const Vec candidate = largest[v] * scale_log2;
        const IntVec moves = candidate > maximum + RESCALE_THRESHOLD;
        Vec base = maximum == -INFINITE ? Vec{} : maximum; /* -inf - -inf would be NaN */
        if (any(moves)) {
            base = moves ? candidate : base;
            const Vec factor = moves ? exp2<EXP2_DEGREE>(maximum - base) : broadcast(1.0f);
            maximum = moves ? candidate : maximum;
            store(strip.maximum + v * LANES, maximum);
            sum *= factor;
            if (!strip.empty)
                for (int d = 0; d < HEAD_DIM; d++) {
                    float *p = strip.output + d * STRIP_ROWS + v * LANES;
                    store(p, load(p) * factor);
                }
        }
        Vec added = Vec{}; /* a sum of its own for the block: rounding errors grow with the length of a sum */
        for (int j = 0; j < count; j += 2) {
            const float *p = s + j * STRIP_ROWS + v * LANES;
            const Vec low = exp2<EXP2_DEGREE>(load(p) * scale_log2 - base);
            const Vec high = exp2<EXP2_DEGREE>(load(p + STRIP_ROWS) * scale_log2 - base);
            added += low + high;
            store_weights(weights + v * LANES, j, low, high);
        }
        store(strip.sum + v * LANES, sum + added);
    }
}

/* Lets VECTORS of the strip see `count` packed keys, a multiple of KEY_MULTIPLE. */
template <int VECTORS>
static void attend_block(Strip &strip, const Step *keys, const Step *values, float *s, Step *weights, int32_t first_key,
                         int count, float scale_log2) {
    multiply<VECTORS>(s, keys, DIM_STEPS, 1, strip.queries, count, DIM_STEPS, false);
    if (strip.fewest_visible < first_key + count) hide_keys<VECTORS>(s, strip, first_key, count);
    soften<VECTORS>(s, weights, strip, count, scale_log2);
    multiply<VECTORS>(strip.output, values, VALUE_ROW, VALUE_STEP, weights, DIM, count / STEP_ELEMENTS, !strip.empty);
    strip.empty = false;
}

/* Lets the strip see the packed block of `count` keys that begins at `first_key`. */
static void attend_block(Strip &strip, const Step *keys, const Step *values, float *s, Step *weights, int32_t first_key,
                         int count, float scale_log2) {
    const int seen = static_cast<int>(minimum(count, strip.most_visible - first_key));
    if (seen <= 0) return;
    const int padded = round_up(seen, KEY_MULTIPLE);
    switch (strip.vectors) {
    case 1: return attend_block<1>(strip, keys, values, s, weights, first_key, padded, scale_log2);
    case 2: return attend_block<2>(strip, keys, values, s, weights, first_key, padded, scale_log2);
    default: return attend_block<STRIP_VECTORS>(strip, keys, values, s, weights, first_key, padded, scale_log2);
    }
}

#endif
