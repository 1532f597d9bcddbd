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
constexpr int ROW_VECTORS = (HEAD_DIM + LANES - 1) / LANES;
constexpr int PADDED_DIM = ROW_VECTORS * LANES;
constexpr int ROW_KEYS = 16;                               /* keys per step of the online softmax */
static_assert(ROW_KEYS % LANES == 0, "scores of a step fill whole vectors");

/* Online softmax of one row: maximum (log2 domain), sum of 2^(score - maximum), and values weighted likewise. */
struct RowState {
    float maximum, sum;
    alignas(64) float output[PADDED_DIM];
};

AITER_INLINE Vec row_vector(const Element *row, int v) { return to_floats(row + v * LANES, HEAD_DIM - v * LANES); }

AITER_INLINE float dot(const float *query, const Element *key) {
    Vec total = load(query) * row_vector(key, 0);
    AITER_UNROLL
    for (int v = 1; v < ROW_VECTORS; v++) total += load(query + v * LANES) * row_vector(key, v);
    return sum(total);
}

static void load_query(float *query, const Element *row, float sign) {
    for (int v = 0; v < ROW_VECTORS; v++) store(query + v * LANES, row_vector(row, v) * sign);
}

/* The exact answer for one row, in two passes over its keys: for rows in which a value that is not finite met a weight
 * that is zero, where the fast path has produced a NaN that the mathematics may not have. Leaves weights relative to
 * the true maximum in `state`. */
static void attend_exactly(const float *query, const KeyRows &rows, int64_t keys, float scale_log2, RowState &state) {
    const Element *key, *value;
    bool nan = false;
    state.maximum = -INFINITE;
    for (int64_t j = 0; j < keys; j++) {
        rows.find(j, 1, &key, &value);
        const float score = dot(query, key) * scale_log2;
        nan |= score != score;
        state.maximum = score > state.maximum ? score : state.maximum;
    }
    state.sum = 0.0f;
    for (float &o : state.output) o = 0.0f;
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
}

/* Rows [0, ROWS) over keys [first, end), where row r sees only those below visible[r]. */
template <int ROWS>
static void attend_rows(const float (*queries)[PADDED_DIM], const KeyRows &rows, int64_t first, int64_t end,
                        const int64_t *visible, float scale_log2, RowState *states) {
    for (int r = 0; r < ROWS; r++) {
        states[r].maximum = -INFINITE;
        states[r].sum = 0.0f;
        memset(states[r].output, 0, sizeof states[r].output);
    }
    const Element *keys[ROW_KEYS], *values[ROW_KEYS];
    for (int64_t j = first; j < end; j += ROW_KEYS) {
        const int count = static_cast<int>(minimum(ROW_KEYS, end - j));
        rows.find(j, count, keys, values);
        alignas(64) float weights[ROWS][ROW_KEYS];
        for (int i = 0; i < count; i++) {
            Vec total[ROWS];
            AITER_UNROLL
            for (int r = 0; r < ROWS; r++) total[r] = Vec{};
            AITER_UNROLL
            for (int v = 0; v < ROW_VECTORS; v++) {
                const Vec key = row_vector(keys[i], v);
                AITER_UNROLL
                for (int r = 0; r < ROWS; r++) total[r] += load(queries[r] + v * LANES) * key;
            }
            AITER_UNROLL
            for (int r = 0; r < ROWS; r++) weights[r][i] = j + i < visible[r] ? sum(total[r]) * scale_log2 : -INFINITE;
        }
        for (int r = 0; r < ROWS; r++) {
            RowState &state = states[r];
            for (int i = count; i < ROW_KEYS; i++) weights[r][i] = -INFINITE;
            float largest = state.maximum;
            for (int i = 0; i < count; i++) largest = weights[r][i] > largest ? weights[r][i] : largest;
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
        AITER_UNROLL
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
}

#endif
