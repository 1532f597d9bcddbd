/* Attention of a few query rows, reading every key and value once, straight from where it lies.
 *
 * What decoding needs: memory bounds it, so nothing is packed and the rows of a group share each load. head_dim runs
 * along the lanes here.
 */
#ifndef AITER_CPU_ROW_ATTENTION_H
#define AITER_CPU_ROW_ATTENTION_H

#include <math.h>

#include "sequence.h"

constexpr int MAX_ROWS = 4;                                /* query rows that share the loads of keys and values */
#if AITER_DTYPE_BF16
constexpr int ROW_VECTORS = (HEAD_DIM + 2 * LANES - 1) / (2 * LANES) * 2;
#else
constexpr int ROW_VECTORS = (HEAD_DIM + LANES - 1) / LANES;
#endif
constexpr int PADDED_DIM = ROW_VECTORS * LANES;
constexpr int ROW_KEYS = 16;                               /* keys per step of the online softmax */
static_assert(ROW_KEYS % LANES == 0, "scores of a step fill whole vectors");

/* Online softmax of one row: maximum (log2 domain), sum of 2^(score - maximum), and values weighted likewise. */
struct RowState {
    float maximum, sum;
    alignas(64) float output[PADDED_DIM];

    void clear() {
        maximum = -INFINITE;
        sum = 0.0f;
        memset(output, 0, sizeof output);
    }
};

/* Vector v of a row as floats. Rows of bf16 are taken apart into even and odd elements, which costs one instruction a
 * vector: vector 2c holds elements 2 (c LANES + lane), vector 2c + 1 those after them. */
AITER_INLINE Vec row_vector(const Element *row, int v) {
#if AITER_DTYPE_BF16
    const int first = v / 2 * 2 * LANES, left = HEAD_DIM - first;
    IntVec pairs = IntVec{};
    if (left >= 2 * LANES)
        memcpy(&pairs, row + first, sizeof pairs);
    else
        memcpy(&pairs, row + first, left * sizeof(Element));
    return (Vec)(v % 2 == 0 ? pairs << 16 : pairs & static_cast<int32_t>(0xffff0000));
#else
    return to_floats(row + v * LANES, HEAD_DIM - v * LANES);
#endif
}

/* The order of row_vector undone. */
static void restore_order(float *row) {
#if AITER_DTYPE_BF16
    for (int first = 0; first < PADDED_DIM; first += 2 * LANES) {
        const Vec even = load(row + first), odd = load(row + first + LANES);
        store(row + first, __builtin_shufflevector(even, odd, AITER_ZIP_LOW));
        store(row + first + LANES, __builtin_shufflevector(even, odd, AITER_ZIP_HIGH));
    }
#else
    (void)row;
#endif
}

AITER_INLINE float dot(const float *query, const Element *key) {
    Vec total = load(query) * row_vector(key, 0);
    for (int v = 1; v < ROW_VECTORS; v++) total += load(query + v * LANES) * row_vector(key, v);
    return sum(total);
}

static void load_query(float *query, const Element *row, float sign) {
    for (int v = 0; v < ROW_VECTORS; v++) store(query + v * LANES, row_vector(row, v) * sign);
}

/* The exact answer for one row, in two passes over its keys: for rows in which a value that is not finite met a weight
 * that is zero, where the fast path has produced a NaN that the mathematics may not have. Leaves weights relative to
 * the true maximum in `state`. */
static AITER_OUTLINE void attend_exactly(const float *query, const KeyRows &rows, int64_t keys, float scale_log2, RowState &state) {
    const Element *key, *value;
    bool nan = false;
    state.clear();
    for (int64_t j = 0; j < keys; j++) {
        rows.find(j, 1, &key, &value);
        const float score = dot(query, key) * scale_log2;
        nan |= score != score;
        state.maximum = score > state.maximum ? score : state.maximum;
    }
    if (nan || state.maximum - state.maximum != 0.0f) { /* NaN, or all weights inf/inf, or 0/0 */
        state.maximum = nan ? NAN : state.maximum;
        state.sum = state.maximum == -INFINITE ? 0.0f : 1.0f;
        for (float &o : state.output) o = NAN;
        return;
    }
    for (int64_t j = 0; j < keys; j++) {
        rows.find(j, 1, &key, &value);
        const float score = dot(query, key) * scale_log2;
        float weight = exp2f(score - state.maximum);
        state.sum += weight;
        /* A weight is positive however small, and inf times it is inf. */
        if (weight < 0x1p-126f && score > -INFINITE) weight = 0x1p-126f;
        for (int v = 0; v < ROW_VECTORS; v++)
            store(state.output + v * LANES, load(state.output + v * LANES) + weight * row_vector(value, v));
    }
    restore_order(state.output);
}

/* ROWS rows of one KV head over keys [first, first + count), count <= ROW_KEYS; row r sees those below visible[r]. */
template <int ROWS>
static AITER_OUTLINE void attend_rows(const float (*queries)[PADDED_DIM], const KeyRows &rows, int64_t first, int count,
                        const int64_t *visible, float scale_log2, RowState *states) {
    const Element *keys[ROW_KEYS], *values[ROW_KEYS];
    rows.find(first, count, keys, values);
    Vec products[ROWS][ROW_KEYS]; /* to be summed over their lanes */
    for (int i = 0; i < count; i++) {
        Vec total[ROWS];
        AITER_UNROLL
        for (int r = 0; r < ROWS; r++) total[r] = Vec{};
        AITER_UNROLL_4
        for (int v = 0; v < ROW_VECTORS; v++) {
            const Vec key = row_vector(keys[i], v);
            AITER_UNROLL
            for (int r = 0; r < ROWS; r++) total[r] += load(queries[r] + v * LANES) * key;
        }
        AITER_UNROLL
        for (int r = 0; r < ROWS; r++) products[r][i] = total[r];
    }
    alignas(64) float weights[ROWS][ROW_KEYS];
    for (int r = 0; r < ROWS; r++) {
        RowState &state = states[r];
        const int seen = static_cast<int>(clamp(visible[r] - first, 0, count));
        for (int i = seen; i < ROW_KEYS; i++) products[r][i] = broadcast(-INFINITE);
        float largest = state.maximum;
        for (int i = 0; i < ROW_KEYS; i += LANES) {
            Vec square[LANES];
            for (int l = 0; l < LANES; l++) square[l] = products[r][i + l];
            store(weights[r] + i, sums_of(square) * scale_log2);
        }
        for (int i = 0; i < seen; i++) largest = weights[r][i] > largest ? weights[r][i] : largest;
        const float base = largest == -INFINITE ? 0.0f : largest;
        if (largest > state.maximum) {
            const float factor = exp2<EXP2_DEGREE>(broadcast(state.maximum - largest))[0];
            state.maximum = largest;
            state.sum *= factor;
            for (int v = 0; v < ROW_VECTORS; v++)
                store(state.output + v * LANES, load(state.output + v * LANES) * factor);
        }
        Vec added = Vec{};
        for (int i = 0; i < ROW_KEYS; i += LANES) {
            const Vec weight = exp2<EXP2_DEGREE>(load(weights[r] + i) - base);
            added += weight;
            store(weights[r] + i, weight);
        }
        state.sum += sum(added);
    }
    for (int v = 0; v < ROW_VECTORS; v++) {
        Vec total[ROWS];
        AITER_UNROLL
        for (int r = 0; r < ROWS; r++) total[r] = load(states[r].output + v * LANES);
        for (int i = 0; i < count; i++) {
            const Vec value = row_vector(values[i], v);
            AITER_UNROLL
            for (int r = 0; r < ROWS; r++) total[r] += weights[r][i] * value;
        }
        AITER_UNROLL
        for (int r = 0; r < ROWS; r++) store(states[r].output + v * LANES, total[r]);
    }
}

static void attend_rows(int count_rows, const float (*queries)[PADDED_DIM], const KeyRows &rows, int64_t first, int count,
                        const int64_t *visible, float scale_log2, RowState *states) {
    switch (count_rows) {
    case 1: return attend_rows<1>(queries, rows, first, count, visible, scale_log2, states);
    case 2: return attend_rows<2>(queries, rows, first, count, visible, scale_log2, states);
    case 3: return attend_rows<3>(queries, rows, first, count, visible, scale_log2, states);
    default: return attend_rows<MAX_ROWS>(queries, rows, first, count, visible, scale_log2, states);
    }
}

#endif
