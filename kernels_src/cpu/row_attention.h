/* Attention of a few query rows, reading every key and value once, straight from where it lies.
 *
 * What decoding needs: memory bounds it, so nothing is packed, the rows of a group share each load and conversion, and
 * the rows of the next step travel to the cache while those of this step are worked on. head_dim runs along the lanes.
 */
#ifndef AITER_CPU_ROW_ATTENTION_H
#define AITER_CPU_ROW_ATTENTION_H

#include "dropout.h"
#include "row_operands.h"
#include "score.h"

constexpr int ROWS_AT_ONCE = 4; /* that share a load from L1; more than these, up to MAX_ROWS, share one from memory */
constexpr int ROW_KEYS = 16;    /* keys per step of the online softmax */
constexpr int SUMS_AT_ONCE = LANES == 16 ? 16 : 8; /* sums that the vector registers hold beside all else */
static_assert(ROW_KEYS % LANES == 0, "scores of a step fill whole vectors");

/* Online softmax of one row: maximum (log2 domain), sum of 2^(score - maximum), and values weighted likewise. */
struct RowState {
    float maximum, sum;
    alignas(64) float output[OUTPUT_DIM];

    void clear() {
        maximum = -INFINITE;
        sum = 0.0f;
        memset(output, 0, sizeof output);
    }
};

typedef RowVec RowQuery[KEY_VECTORS];
typedef Weight RowWeights[ROW_KEYS / PAIR];

/* Where the keys and values of one step lie. Past the last key that one is repeated, and values are zeros; places before
 * `seen` repeat that. */
struct RowStep {
    const Cached *keys[ROW_KEYS], *values[ROW_KEYS];

    RowStep() {}
    RowStep(const KeyRows &rows, int64_t first, int count, int64_t seen) {
        find_seen(rows, first, count, seen, keys, values);
        for (int i = count; i < ROW_KEYS; i++) {
            keys[i] = keys[count - 1];
            values[i] = NO_ROW;
        }
    }
};

static void load_query(RowQuery &query, const Element *row, float sign) {
    for (int v = 0; v < KEY_VECTORS; v++) query[v] = times_sign(key_vector(row, v), sign);
}

/* A query row, and what its weights depend on beside products. */
struct ScoredRow {
    const Element *query;
    int32_t place;
    float slope;       /* of ALiBi */
    int32_t row, head; /* as dropout counts them */

    /* The score of one key, by sums in float32 whatever the dtype. */
    float score(const Score &score, const Cached *key, int64_t index) const {
        Vec total = Vec{};
        for (int d = 0; d < HEAD_DIM; d += LANES)
            total += times_sign(to_floats(query + d, HEAD_DIM - d), score.sign) * to_floats(key + d, HEAD_DIM - d);
        return score(broadcast(sum(total)), broadcast(place - static_cast<int32_t>(index)), slope)[0];
    }
};

/* The exact answer for one row, in two passes over its keys: for rows in which a value that is not finite met a weight
 * that is zero, where the fast path has produced a NaN that the mathematics may not have. Leaves weights relative to
 * the true maximum in `state`. */
static AITER_OUTLINE void attend_exactly(const ScoredRow &row, const KeyRows &rows, KeyRange keys, const Score &scoring,
                                         const Dropout &dropout, RowState &state) {
    const Cached *key, *value;
    bool nan = false;
    state.clear();
    for (int64_t j = keys.low; j < keys.high; j++) {
        rows.find(j, 1, &key, &value);
        const float score = row.score(scoring, key, j);
        nan |= score != score;
        state.maximum = score > state.maximum ? score : state.maximum;
    }
    if (nan || state.maximum - state.maximum != 0.0f) { /* NaN, or all weights inf/inf, or 0/0 */
        state.maximum = nan ? __builtin_nanf("") : state.maximum;
        state.sum = state.maximum == -INFINITE ? 0.0f : 1.0f;
        for (float &o : state.output) o = __builtin_nanf("");
        return;
    }
    for (int64_t j = keys.low; j < keys.high; j++) {
        rows.find(j, 1, &key, &value);
        const float score = row.score(scoring, key, j);
        float weight = __builtin_exp2f(score - state.maximum);
        state.sum += weight;
        /* A weight is positive however small, and inf times it is inf. */
        if (weight < 0x1p-126f && score > -INFINITE) weight = 0x1p-126f;
        if (DROPOUT && !dropout.kept(broadcast(row.head), broadcast(row.row), broadcast(static_cast<int32_t>(j)))[0])
            weight = 0.0f;
        for (int d = 0; d < VALUE_DIM; d += LANES)
            store(state.output + d, load(state.output + d) + weight * to_floats(value + d, VALUE_DIM - d));
    }
}

/* Scores of every key with every row, not yet scaled, those of row r from scores + r * row_scores on: LANES at a time,
 * each in a vector until they are summed. */
template <int ROWS>
AITER_INLINE void score_keys(const RowQuery *queries, const RowStep &step, const RowStep &next, float *scores,
                             int row_scores) {
    constexpr int KEYS = LANES / (ROWS == 3 ? 4 : ROWS), PART = LANES / ROWS_AT_ONCE;
    for (int i = 0; i < ROW_KEYS; i += KEYS) {
        Vec products[LANES]; /* [row][key] */
        AITER_UNROLL
        for (int l = 0; l < LANES; l++) products[l] = Vec{};
        AITER_UNROLL
        for (int part = 0; part < KEYS; part += PART) {
            AITER_UNROLL
            for (int k = part; k < part + PART; k++) prefetch_row<HEAD_DIM>(next.keys[i + k]);
            for (int first = 0; first < KEY_VECTORS; first += LANE_STEPS) {
                AITER_UNROLL
                for (int v = first; v < first + LANE_STEPS; v++) {
                    AITER_UNROLL
                    for (int k = part; k < part + PART; k++) {
                        const RowVec key = key_vector(step.keys[i + k], v);
                        AITER_UNROLL
                        for (int r = 0; r < ROWS; r++)
                            products[r * KEYS + k] = multiply_add(products[r * KEYS + k], queries[r][v], key);
                    }
                }
            }
        }
        const Vec sums = sums_of(products);
        AITER_UNROLL
        for (int r = 0; r < ROWS; r++)
            memcpy(scores + r * row_scores + i, reinterpret_cast<const float *>(&sums) + r * KEYS,
                   KEYS * sizeof(float));
    }
}

/* Adds vectors [first, first + VECTORS) of all values to the rows' outputs, each times its weight. */
template <int ROWS, int VECTORS>
AITER_INLINE void add_vectors(int first, const RowStep &step, const RowStep &next, const RowWeights *weights,
                              RowState *states) {
    Vec total[ROWS][VECTORS];
    AITER_UNROLL
    for (int r = 0; r < ROWS; r++) {
        AITER_UNROLL
        for (int v = 0; v < VECTORS; v++) total[r][v] = load(states[r].output + (first + v) * LANES);
    }
    for (int i = 0; i < ROW_KEYS / PAIR; i++) {
        if (first == 0) {
            AITER_UNROLL
            for (int k = 0; k < PAIR; k++) prefetch_row<VALUE_DIM>(next.values[i * PAIR + k]);
        }
        AITER_UNROLL
        for (int v = 0; v < VECTORS; v++) {
            const RowVec value = value_vector(step.values + i * PAIR, first + v);
            AITER_UNROLL
            for (int r = 0; r < ROWS; r++) total[r][v] = multiply_add(total[r][v], broadcast(weights[r][i]), value);
        }
    }
    AITER_UNROLL
    for (int r = 0; r < ROWS; r++) {
        AITER_UNROLL
        for (int v = 0; v < VECTORS; v++) store(states[r].output + (first + v) * LANES, total[r][v]);
    }
}

template <int ROWS>
AITER_INLINE void add_values(const RowStep &step, const RowStep &next, const RowWeights *weights, RowState *states) {
    constexpr int MOST = SUMS_AT_ONCE / (ROWS == 3 ? 4 : ROWS), REST = OUTPUT_VECTORS % MOST;
    for (int first = 0; first < OUTPUT_VECTORS - REST; first += MOST)
        add_vectors<ROWS, MOST>(first, step, next, weights, states);
    if (REST > 0) add_vectors<ROWS, REST + !REST>(OUTPUT_VECTORS - REST, step, next, weights, states);
}

/* What one row sees of a step, counted from the step's first key, and what else its scores depend on. */
struct RowScope {
    int high, low;          /* the keys from low to high - 1; without AITER_WINDOW low does not count */
    int32_t distance;       /* place of the query less that of the first key */
    float slope;            /* of ALiBi */
    int32_t row, head, key; /* as dropout counts them; key: the first one */
};

/* ROWS rows of one KV head over the keys of a step. */
template <int ROWS>
static AITER_OUTLINE void attend_rows(const RowQuery *queries, const RowStep &step, const RowStep &next,
                                      const RowScope *scopes, const Score &score, const Dropout &dropout,
                                      RowState *states) {
    alignas(64) float all_scores[ROWS][ROW_KEYS];
    alignas(64) RowWeights weights[ROWS];
    score_keys<ROWS>(queries, step, next, all_scores[0], ROW_KEYS);
    for (int r = 0; r < ROWS; r++) {
        RowState &state = states[r];
        float *scores = all_scores[r];
        IntVec larger = IntVec{};
        for (int i = 0; i < ROW_KEYS; i += LANES) {
            const IntVec seen = in_range(lane_index(), scopes[r].low - i, scopes[r].high - i);
            const Vec all = score(load(scores + i), scopes[r].distance - i - lane_index(), scopes[r].slope);
            const Vec scaled = seen ? all : broadcast(-INFINITE);
            larger |= scaled > state.maximum;
            store(scores + i, scaled);
        }
        if (any(larger)) {
            float largest = state.maximum;
            for (int i = 0; i < ROW_KEYS; i++) largest = scores[i] > largest ? scores[i] : largest;
            const float factor = exp2<EXP2_DEGREE>(broadcast(state.maximum - largest))[0];
            state.maximum = largest;
            state.sum *= factor;
            for (int d = 0; d < OUTPUT_DIM; d += LANES) store(state.output + d, load(state.output + d) * factor);
        }
        const float base = state.maximum == -INFINITE ? 0.0f : state.maximum;
        Vec added = Vec{};
        for (int i = 0; i < ROW_KEYS; i += LANES) {
            const Vec weight = exp2<EXP2_DEGREE>(load(scores + i) - base);
            added += weight;
            const IntVec kept = DROPOUT ? dropout.kept(broadcast(scopes[r].head), broadcast(scopes[r].row),
                                                       scopes[r].key + i + lane_index())
                                        : IntVec{};
            store_weights(weights[r] + i / PAIR, DROPOUT ? kept ? weight : Vec{} : weight);
        }
        state.sum += sum(added);
    }
    add_values<ROWS>(step, next, weights, states);
}

/* Calls body(Constant<rows>(), first) for some of `count` rows after the others, as many as share a load from L1. */
template <class Body> AITER_INLINE void for_rows(int count, const Body &body) {
    for (int first = 0; first < count; first += ROWS_AT_ONCE) switch (count - first) {
        case 1: body(Constant<1>(), first); break;
        case 2: body(Constant<2>(), first); break;
        case 3: body(Constant<3>(), first); break;
        default: body(Constant<ROWS_AT_ONCE>(), first);
        }
}

/* Up to MAX_ROWS rows. */
static void attend_rows(int count, const RowQuery *queries, const RowStep &step, const RowStep &next,
                        const RowScope *scopes, const Score &score, const Dropout &dropout, RowState *states) {
    for_rows(count, [&](auto rows, int r) {
        const RowStep &fetch = r == 0 ? next : step; /* once is enough */
        attend_rows<decltype(rows)::value>(queries + r, step, fetch, scopes + r, score, dropout, states + r);
    });
}

#endif
