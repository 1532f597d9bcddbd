/* What row_attention.h multiplies, in the form that takes the fewest instructions to get at.
 *
 *                      vector v of a key                  vector v of a value              product
 *   fp32, fp16         LANES elements as floats           the same                         multiply-add
 *   bf16               even or odd ones of 2 LANES        the same                         multiply-add
 *   bf16, AVX512-BF16  2 LANES elements, pairs as they    half of 2 LANES, each paired     dot product of pairs
 *                      lie side by side                   with that of the next value
 */
#ifndef AITER_CPU_ROW_OPERANDS_H
#define AITER_CPU_ROW_OPERANDS_H

#include "packed.h"

#if AITER_DTYPE_BF16
constexpr int UNIT_VECTORS = 2; /* a vector full of elements is this many vectors of floats; rows are padded to that */
#else
constexpr int UNIT_VECTORS = 1;
#endif
constexpr int UNIT = UNIT_VECTORS * LANES;
constexpr int OUTPUT_DIM = round_up(VALUE_DIM, UNIT);
constexpr int OUTPUT_VECTORS = OUTPUT_DIM / LANES; /* of floats: what an output row fills */

#if AITER_DOT_PRODUCTS

typedef StepVec RowVec;
typedef Step Weight; /* of two keys */
constexpr int PAIR = 2;

template <class Row> AITER_INLINE RowVec key_vector(const Row *row, int v) {
    return row_steps<HEAD_DIM>(row, v * LANES);
}

/* Elements 8 i to 8 i + 3 of 2 LANES are in the even vector, the others in the odd one: one instruction each. */
#define AITER_ZIP_4(first) first, first + 32, first + 1, first + 33, first + 2, first + 34, first + 3, first + 35
#define AITER_ZIP_QUARTERS(first)                                                                                      \
    AITER_ZIP_4(first), AITER_ZIP_4(first + 8), AITER_ZIP_4(first + 16), AITER_ZIP_4(first + 24)
AITER_INLINE RowVec value_vector(const Cached *const *values, int v) {
    typedef uint16_t Elements __attribute__((vector_size(sizeof(RowVec))));
    const Elements first = (Elements)row_steps<VALUE_DIM>(values[0], v / 2 * LANES),
                   second = (Elements)row_steps<VALUE_DIM>(values[1], v / 2 * LANES);
    return v % 2 == 0 ? (RowVec)shuffle<AITER_ZIP_QUARTERS(0)>(first, second)
                      : (RowVec)shuffle<AITER_ZIP_QUARTERS(4)>(first, second);
}

AITER_INLINE void store_weights(Weight *weights, Vec values) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(values, values);
    memcpy(weights, &rounded, LANES * sizeof(Element));
}

/* The order of elements that value_vector() leaves in an output row, undone. */
AITER_INLINE void restore_order(float *row) {
    for (int first = 0; first < OUTPUT_DIM; first += 2 * LANES) {
        const Vec low = load(row + first), high = load(row + first + LANES);
        store(row + first, shuffle<0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23>(low, high));
        store(row + first + LANES, shuffle<8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31>(low, high));
    }
}

#else

typedef Vec RowVec;
typedef float Weight;
constexpr int PAIR = 1;

AITER_INLINE void store_weights(Weight *weights, Vec values) { store(weights, values); }

#if !AITER_DTYPE_FP32
/* The first `count` elements of a row, up to 2 LANES, two to a lane; zeros past them. */
AITER_INLINE IntVec element_pairs(const Element *row, int count) {
    IntVec pairs = IntVec{};
    if (count >= 2 * LANES) memcpy(&pairs, row, sizeof pairs);
    else
#if AITER_AVX512
        pairs = (IntVec)_mm512_maskz_loadu_epi16((uint32_t{1} << (count & 31)) - 1, row);
#else
        memcpy(&pairs, row, count * sizeof(Element));
#endif
    return pairs;
}
#endif

#if AITER_DTYPE_BF16

/* Of 2 LANES elements, the even ones (0) or the odd ones (1) as floats: one instruction. */
AITER_INLINE Vec half_of(IntVec pairs, int odd) {
    return (Vec)(odd == 0 ? pairs << 16 : pairs & static_cast<int32_t>(0xffff0000));
}

/* Vector 2 c holds elements 2 (c LANES + lane), vector 2 c + 1 those after them. */
template <int N, class Row> AITER_INLINE RowVec row_vector(const Row *row, int v) {
    const int first = v / 2 * 2 * LANES;
    return half_of(element_pairs(row + first, N - first), v % 2);
}

AITER_INLINE void restore_order(float *row) {
    for (int first = 0; first < OUTPUT_DIM; first += 2 * LANES) {
        const Vec even = load(row + first), odd = load(row + first + LANES);
        store(row + first, shuffle<AITER_ZIP_LOW>(even, odd));
        store(row + first + LANES, shuffle<AITER_ZIP_HIGH>(even, odd));
    }
}

#else

template <int N, class Row> AITER_INLINE RowVec row_vector(const Row *row, int v) {
    return to_floats(row + v * LANES, N - v * LANES);
}
AITER_INLINE void restore_order(float *) {}

#endif

template <class Row> AITER_INLINE RowVec key_vector(const Row *row, int v) { return row_vector<HEAD_DIM>(row, v); }
AITER_INLINE RowVec value_vector(const Cached *const *values, int v) { return row_vector<VALUE_DIM>(values[0], v); }

#endif

constexpr int KEY_VECTORS = round_up(HEAD_DIM, UNIT) / LANES / PAIR; /* of a query or key */
constexpr int LANE_STEPS = UNIT_VECTORS / PAIR; /* lie side by side, and in one lane of vectors one after the other */

#endif
