/* Attention of a few query rows, reading every key and value once, straight from where it lies.
 *
 * What decoding needs: memory bounds it, so nothing is packed, the rows of a group share each load and conversion, and
 * the rows of the next step travel to the cache while those of this step are worked on. head_dim runs along the lanes.
 *
 * Products are float multiply-adds in every dtype. Dot products of bf16 pairs would save the conversion, but have half
 * the throughput (VDPBF16PS: one in two cycles, measured; multiply-add of the same width: two a cycle).
 */
#ifndef AITER_CPU_ROW_ATTENTION_H
#define AITER_CPU_ROW_ATTENTION_H

#include <math.h>

#include "sequence.h"

#if AITER_DTYPE_BF16
constexpr int UNIT_VECTORS = 2; /* a vector full of elements is this many vectors of floats; rows are padded to that */
#else
constexpr int UNIT_VECTORS = 1;
#endif
constexpr int ROW_KEYS = 16;            /* keys per step of the online softmax */
constexpr int PADDED_DIM = (HEAD_DIM + UNIT_VECTORS * LANES - 1) / (UNIT_VECTORS * LANES) * UNIT_VECTORS * LANES;
constexpr int ROW_VECTORS = PADDED_DIM / LANES;
#if AITER_AVX512
constexpr int KEYS_AT_ONCE = 4, SUMS_AT_ONCE = 16; /* sums that the vector registers hold beside all else */
#else
constexpr int KEYS_AT_ONCE = 2, SUMS_AT_ONCE = 8;
#endif
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

typedef Vec RowQuery[ROW_VECTORS];

/* Where the keys and values of one step lie; places past the last key repeat it. */
struct RowStep {
    const Element *keys[ROW_KEYS], *values[ROW_KEYS];

    RowStep() {}
    RowStep(const KeyRows &rows, int64_t first, int count) {
        rows.find(first, count, keys, values);
        for (int i = count; i < ROW_KEYS; i++) {
            keys[i] = keys[count - 1];
            values[i] = values[count - 1];
        }
    }
};

/* Vector v of a row as the products take it. Rows of bf16 are taken apart into even and odd elements, one instruction
 * each: vector 2c holds elements 2 (c LANES + lane), vector 2c + 1 those after them. */
AITER_INLINE Vec row_vector(const Element *row, int v) {
#if AITER_DTYPE_BF16
    const int first = v / 2 * 2 * LANES, left = HEAD_DIM - first;
    IntVec pairs = IntVec{};
    if (left >= 2 * LANES)
        memcpy(&pairs, row + first, sizeof pairs);
    else
#if AITER_AVX512
        pairs = (IntVec)_mm512_maskz_loadu_epi16((uint32_t{1} << (left & 31)) - 1, row + first);
#else
        memcpy(&pairs, row + first, left * sizeof(Element));
#endif
    return (Vec)(v % 2 == 0 ? pairs << 16 : pairs & static_cast<int32_t>(0xffff0000));
#else
    return to_floats(row + v * LANES, HEAD_DIM - v * LANES);
#endif
}

static void load_query(RowQuery &query, const Element *row, bool negated) {
    for (int v = 0; v < ROW_VECTORS; v++) {
        query[v] = row_vector(row, v);
        if (negated) query[v] = -query[v];
    }
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

AITER_INLINE float exact_dot(const Element *query, const Element *key) {
    Vec total = Vec{};
    for (int d = 0; d < HEAD_DIM; d += LANES) total += to_floats(query + d, HEAD_DIM - d) * to_floats(key + d, HEAD_DIM - d);
    return sum(total);
}

/* The exact answer for one row, in two passes over its keys: for rows in which a value that is not finite met a weight
 * that is zero, where the fast path has produced a NaN that the mathematics may not have. Leaves weights relative to
 * the true maximum in `state`. The scale may be negative here. */
static AITER_OUTLINE void attend_exactly(const Element *query, const KeyRows &rows, int64_t keys, float scale_log2, RowState &state) {
    const Element *key, *value;
    bool nan = false;
    state.clear();
    for (int64_t j = 0; j < keys; j++) {
        rows.find(j, 1, &key, &value);
        const float score = exact_dot(query, key) * scale_log2;
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
        const float score = exact_dot(query, key) * scale_log2;
        float weight = exp2f(score - state.maximum);
        state.sum += weight;
        /* A weight is positive however small, and inf times it is inf. */
        if (weight < 0x1p-126f && score > -INFINITE) weight = 0x1p-126f;
        for (int d = 0; d < HEAD_DIM; d += LANES)
            store(state.output + d, load(state.output + d) + weight * to_floats(value + d, HEAD_DIM - d));
    }
}

/* Into L2: L1 has too few buffers for lines under way to keep memory busy. */
AITER_INLINE void prefetch_row(const Element *row) {
    constexpr int LINE_ELEMENTS = 64 / sizeof(Element);
    for (int d = 0; d < HEAD_DIM; d += LINE_ELEMENTS) __builtin_prefetch(row + d, 0, 2);
}

/* Scores of every key with every row, not yet scaled. */
template <int ROWS>
AITER_INLINE void score_keys(const RowQuery *queries, const RowStep &step, const RowStep &next, float (*scores)[ROW_KEYS]) {
    Vec products[ROWS][ROW_KEYS]; /* to be summed over their lanes */
    for (int i = 0; i < ROW_KEYS; i += KEYS_AT_ONCE) {
        Vec total[ROWS][KEYS_AT_ONCE];
        AITER_UNROLL
        for (int k = 0; k < KEYS_AT_ONCE; k++) {
            prefetch_row(next.keys[i + k]);
            AITER_UNROLL
            for (int r = 0; r < ROWS; r++) total[r][k] = Vec{};
        }
        for (int first = 0; first < ROW_VECTORS; first += UNIT_VECTORS)
            AITER_UNROLL
            for (int v = first; v < first + UNIT_VECTORS; v++) {
                Vec key[KEYS_AT_ONCE];
                AITER_UNROLL
                for (int k = 0; k < KEYS_AT_ONCE; k++) key[k] = row_vector(step.keys[i + k], v);
                AITER_UNROLL
                for (int r = 0; r < ROWS; r++)
                    AITER_UNROLL
                    for (int k = 0; k < KEYS_AT_ONCE; k++) total[r][k] += queries[r][v] * key[k];
            }
        AITER_UNROLL
        for (int r = 0; r < ROWS; r++)
            AITER_UNROLL
            for (int k = 0; k < KEYS_AT_ONCE; k++) products[r][i + k] = total[r][k];
    }
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < ROW_KEYS; i += LANES) {
            Vec square[LANES];
            for (int l = 0; l < LANES; l++) square[l] = products[r][i + l];
            store(scores[r] + i, sums_of(square));
        }
}

/* Adds vectors [first, first + VECTORS) of all values to the rows' outputs, each times its weight. */
template <int ROWS, int VECTORS>
AITER_INLINE void add_vectors(int first, const RowStep &step, const RowStep &next, const float (*weights)[ROW_KEYS], RowState *states) {
    Vec total[ROWS][VECTORS];
    AITER_UNROLL
    for (int r = 0; r < ROWS; r++)
        AITER_UNROLL
        for (int v = 0; v < VECTORS; v++) total[r][v] = load(states[r].output + (first + v) * LANES);
    for (int i = 0; i < ROW_KEYS; i++) {
        if (first == 0) prefetch_row(next.values[i]);
        AITER_UNROLL
        for (int v = 0; v < VECTORS; v++) {
            const Vec value = row_vector(step.values[i], first + v);
            AITER_UNROLL
            for (int r = 0; r < ROWS; r++) total[r][v] += weights[r][i] * value;
        }
    }
    AITER_UNROLL
    for (int r = 0; r < ROWS; r++)
        AITER_UNROLL
        for (int v = 0; v < VECTORS; v++) store(states[r].output + (first + v) * LANES, total[r][v]);
}

template <int ROWS>
AITER_INLINE void add_values(const RowStep &step, const RowStep &next, const float (*weights)[ROW_KEYS], RowState *states) {
    constexpr int MOST = SUMS_AT_ONCE / (ROWS == 3 ? 4 : ROWS), REST = ROW_VECTORS % MOST;
    for (int first = 0; first < ROW_VECTORS - REST; first += MOST) add_vectors<ROWS, MOST>(first, step, next, weights, states);
    if (REST > 0) add_vectors<ROWS, REST + !REST>(ROW_VECTORS - REST, step, next, weights, states);
}

/* ROWS rows of one KV head over the keys of a step; row r sees the first seen[r] of them. */
template <int ROWS>
static AITER_OUTLINE void attend_rows(const RowQuery *queries, const RowStep &step, const RowStep &next, const int *seen,
                                      float scale_log2, RowState *states) {
    alignas(64) float weights[ROWS][ROW_KEYS];
    score_keys<ROWS>(queries, step, next, weights);
    for (int r = 0; r < ROWS; r++) {
        RowState &state = states[r];
        IntVec larger = IntVec{};
        for (int i = 0; i < ROW_KEYS; i += LANES) {
            const Vec scores = lane_index() < seen[r] - i ? load(weights[r] + i) * scale_log2 : broadcast(-INFINITE);
            larger |= scores > state.maximum;
            store(weights[r] + i, scores);
        }
        if (any(larger)) {
            float largest = state.maximum;
            for (int i = 0; i < ROW_KEYS; i++) largest = weights[r][i] > largest ? weights[r][i] : largest;
            const float factor = exp2<EXP2_DEGREE>(broadcast(state.maximum - largest))[0];
            state.maximum = largest;
            state.sum *= factor;
            for (int d = 0; d < PADDED_DIM; d += LANES) store(state.output + d, load(state.output + d) * factor);
        }
        const float base = state.maximum == -INFINITE ? 0.0f : state.maximum;
        Vec added = Vec{};
        for (int i = 0; i < ROW_KEYS; i += LANES) {
            const Vec weight = exp2<EXP2_DEGREE>(load(weights[r] + i) - base);
            added += weight;
            store(weights[r] + i, weight);
        }
        state.sum += sum(added);
    }
    add_values<ROWS>(step, next, weights, states);
}

static void attend_rows(int count_rows, const RowQuery *queries, const RowStep &step, const RowStep &next, const int *seen,
                        float scale_log2, RowState *states) {
    switch (count_rows) {
    case 1: return attend_rows<1>(queries, step, next, seen, scale_log2, states);
    case 2: return attend_rows<2>(queries, step, next, seen, scale_log2, states);
    case 3: return attend_rows<3>(queries, step, next, seen, scale_log2, states);
    default: return attend_rows<MAX_ROWS>(queries, step, next, seen, scale_log2, states);
    }
}

#endif
