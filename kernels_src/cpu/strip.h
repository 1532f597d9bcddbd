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

#include "matrix_fma.h"

constexpr float RESCALE_THRESHOLD = 8.0f;

struct Strip {
    Packed *queries; /* Q^T [QUERY_STEPS][STRIP_ROWS] */
    float *output;   /* O^T [HEAD_DIM][STRIP_ROWS], relative to `maximum`, not yet divided by `sum` */
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

/* Scores to weights in place; updates maximum and sum, and rescales what was accumulated where the maximum moved. */
template <int VECTORS>
static void soften(float *s, Strip &strip, int count, float scale_log2) {
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
        for (int j = 0; j < count; j++) {
            float *p = s + j * STRIP_ROWS + v * LANES;
            const Vec weight = exp2<EXP2_DEGREE>(load(p) * scale_log2 - base);
            sum += weight;
            store(p, weight);
        }
        store(strip.sum + v * LANES, sum);
    }
}

template <int VECTORS>
static void attend_block(Strip &strip, const Packed *keys, const Packed *values, float *s, int32_t first_key, int count,
                         float scale_log2) {
    scores<VECTORS>(s, keys, strip.queries, count);
    if (strip.fewest_visible < first_key + count) hide_keys<VECTORS>(s, strip, first_key, count);
    soften<VECTORS>(s, strip, count, scale_log2);
    accumulate<VECTORS>(strip.output, values, s, count, strip.empty);
    strip.empty = false;
}

/* Lets the strip see the packed block of `count` keys that begins at `first_key`. */
static void attend_block(Strip &strip, const Packed *keys, const Packed *values, float *s, int32_t first_key, int count,
                         float scale_log2) {
    const int seen = static_cast<int>(minimum(count, strip.most_visible - first_key));
    if (seen <= 0) return;
    const int padded = static_cast<int>(ceil_div(seen, KEY_MULTIPLE) * KEY_MULTIPLE);
    switch (strip.vectors) {
    case 1: return attend_block<1>(strip, keys, values, s, first_key, padded, scale_log2);
    case 2: return attend_block<2>(strip, keys, values, s, first_key, padded, scale_log2);
#if !(AITER_AVX512 || AITER_AVX2)
    default: return;
#else
    default: return attend_block<3>(strip, keys, values, s, first_key, padded, scale_log2);
#endif
    }
}

#endif
