/* What the matrix products take: queries, keys, values and weights, rearranged once and then used many times.
 *
 * Both products of attention have the same form here, with query rows along the vector lanes:
 *
 *     scores        S^T[key][row]  = sum over d   of K[key][d]   * Q^T[d][row]
 *     accumulation  O^T[d][row]   += sum over key of V^T[d][key] * P^T[key][row]
 *
 * so that the softmax between the two works lane by lane and never reduces across lanes. A "step" is what one
 * multiply-add takes of each operand along the sum: one float, or two 16-bit values that share 32 bits.
 *
 *   engine                 step                          used for
 *   multiply-add           float                         fp32; fp16 and bf16 where there is nothing better
 *   bf16 dot product       bf16 pair                     AVX512-BF16
 *   matrix tiles           bf16 pair or fp16 pair        AMX
 */
#ifndef AITER_CPU_PACKED_H
#define AITER_CPU_PACKED_H

#include "mask.h"

#if (AITER_DTYPE_BF16 && AITER_CPU_AMXBF16) || (AITER_DTYPE_FP16 && AITER_CPU_AMXFP16)
#define AITER_TILES 1
#define AITER_PAIRS 1
#elif AITER_DTYPE_BF16 && AITER_CPU_AVX512BF16
#define AITER_DOT_PRODUCTS 1
#define AITER_PAIRS 1
#endif

#if AITER_TILES
constexpr bool TILES = true;
#else
constexpr bool TILES = false;
#endif

#if AITER_PAIRS
typedef int32_t Step;
typedef IntVec StepVec;
constexpr int STEP_ELEMENTS = 2;
#else
typedef float Step;
typedef Vec StepVec;
constexpr int STEP_ELEMENTS = 1;
#endif
static_assert(sizeof(Step) == 4, "a step fills one lane");

constexpr int round_up(int a, int b) { return (a + b - 1) / b * b; }

/* Rows of more elements than this leave room for half as many in the caches. */
constexpr int HALVES = HEAD_DIM + VALUE_DIM > 2 * 256 ? 2 : 1;

#if AITER_TILES
#if AITER_BACKWARD
constexpr int STRIP_VECTORS = 2, BLOCK_KEYS = 128 / HALVES;
#else
constexpr int STRIP_VECTORS = 4, BLOCK_KEYS = 256 / HALVES; /* so that tiles of K, V, O^T come from L2 less often */
#endif
constexpr int MIN_TILE_ROWS = 256;
constexpr int KEY_MULTIPLE = 32; /* a tile of weights takes 32 keys */
constexpr int DIM_MULTIPLE = 32; /* products see head_dim padded with zeros */
#else
#if AITER_AVX2
constexpr int STRIP_VECTORS = 3, BLOCK_KEYS = 128 / HALVES;
#elif AITER_AVX512
constexpr int STRIP_VECTORS = 3, BLOCK_KEYS = 64 / HALVES;
#else
constexpr int STRIP_VECTORS = 2, BLOCK_KEYS = 64 / HALVES;
#endif
constexpr int MIN_TILE_ROWS = 96;
constexpr int KEY_MULTIPLE = 8;
constexpr int DIM_MULTIPLE = 8;
#endif
constexpr int MAX_TILE_ROWS = 1024 / HALVES;
/* STRIP_VECTORS: vectors of query rows that are worked on together. BLOCK_KEYS: keys per step of the online softmax;
 * scores and weights of a strip fit L1 (without tiles), packed keys and values L2. KEY_MULTIPLE: blocks are padded with
 * zero keys. MIN_TILE_ROWS: for fewer rows than this, packing keys and values costs too much of the time.
 * MAX_TILE_ROWS: Q^T and O^T of a tile lie in L2, or beside it where it is small; packing less often is worth more. */
constexpr int STRIP_ROWS = STRIP_VECTORS * LANES;

/* A head_dim as the products see it, N being HEAD_DIM or VALUE_DIM. */
template <int N> constexpr int PADDED = round_up(N, DIM_MULTIPLE);
template <int N> constexpr int STEPS = PADDED<N> / STEP_ELEMENTS;

constexpr int DIM = PADDED<HEAD_DIM>, DIM_STEPS = STEPS<HEAD_DIM>;
constexpr int VALUE_WIDTH = PADDED<VALUE_DIM>;
constexpr bool FULL_PRECISION = sizeof(Element) == sizeof(float); /* else rounding to 16 bits outweighs all other */
/* Steps that a score is summed over at a time; and in short sequences, nearly as exact as sums lane by lane: others sum
 * products of few columns so. Both passes alike: what a score is wrong by cancels in the gradients. */
constexpr int SCORE_PART = FULL_PRECISION ? 64 : DIM_STEPS, SHORT_PART = 16, SHORT_KEYS = 48;
inline bool is_short(int64_t keys) { return FULL_PRECISION && keys <= SHORT_KEYS; }
constexpr int BLOCK_STEPS = BLOCK_KEYS / STEP_ELEMENTS;
constexpr int PACKED_VALUES = BLOCK_KEYS * DIM_STEPS;                   /* where the values of a packed block begin */
constexpr int PACKED_BLOCK = PACKED_VALUES + BLOCK_STEPS * VALUE_WIDTH; /* steps in a packed block */

/* Where vector v of a row lies in a matrix: row after row, or in tiles of 16 rows by one vector, 1 KB each in one
 * piece, which matrix tiles load faster than rows that lie far apart. */
template <int ROW_STEPS> struct Strided {
    static constexpr int ROW = ROW_STEPS, STEP = 1;
    static constexpr int at(int row, int v) { return row * ROW + v * LANES; }
};

template <int VECTORS> struct Tiled {
    static constexpr int ROW = LANES;
    static constexpr int at(unsigned row, unsigned v) { /* unsigned, so that divisions are shifts */
        return static_cast<int>((row / LANES * VECTORS + v) * LANES * LANES + row % LANES * LANES);
    }
};

/* The transposed of a strided matrix, for left operands. */
template <int ROW_STEPS> struct Columns {
    static constexpr int ROW = 1, STEP = ROW_STEPS;
};

/* Lanes: what has the rows of a strip along its lanes. Of rows of N elements, RowSteps: [row][step], StepRows: [row
 * step][d] or, on tiles, [d][row step], and StepColumns: that as [d][row step]. */
#if AITER_TILES
using Lanes = Tiled<STRIP_VECTORS>;
template <int N> using RowSteps = Tiled<STEPS<N> / LANES>;
template <int N> using StepRows = Tiled<BLOCK_STEPS / LANES>;
template <int N> using StepColumns = StepRows<N>;
#else
using Lanes = Strided<STRIP_ROWS>;
template <int N> using RowSteps = Strided<STEPS<N>>;
template <int N> using StepRows = Strided<PADDED<N>>;
template <int N> using StepColumns = Columns<PADDED<N>>;
#endif
using KeySteps = RowSteps<HEAD_DIM>;         /* K[key][step] */
using ValueColumns = StepColumns<VALUE_DIM>; /* V^T[d][key step] */

AITER_INLINE Vec multiply_add(Vec total, Vec a, Vec b) { return a * b + total; }
#if AITER_DOT_PRODUCTS
AITER_INLINE Vec multiply_add(Vec total, IntVec a, IntVec b) {
    return _mm512_dpbf16_ps(total, (__m512bh)a, (__m512bh)b);
}
#endif

/* Times -1, 0 or 1. What is not finite times 0 is NaN. */
AITER_INLINE Vec times_sign(Vec steps, float sign) { return sign == 1.0f ? steps : steps * sign; }
#if AITER_PAIRS
AITER_INLINE IntVec times_sign(IntVec steps, float sign) {
    typedef uint16_t Elements __attribute__((vector_size(sizeof(IntVec))));
    constexpr uint16_t MAGNITUDE = 0x7fff; /* also the bits of a NaN */
    if (sign == 0.0f) {
        const Elements magnitude = (Elements)steps & MAGNITUDE;
        return (IntVec)(magnitude >= INFINITE_ELEMENT ? Elements{} + MAGNITUDE : Elements{});
    }
    return sign < 0.0f ? steps ^ static_cast<int32_t>(0x80008000) : steps;
}
#endif

AITER_INLINE StepVec load_steps(const Step *p) { return load(p); }
AITER_INLINE void store_steps(Step *p, StepVec v) { memcpy(p, &v, sizeof v); }
AITER_INLINE void store_steps(Step *p, StepVec v, int count) {
    if (count >= LANES) store_steps(p, v);
    else memcpy(p, &v, count * sizeof(Step));
}

#if AITER_PAIRS
/* Two rows, element by element: the first in the lower half of each lane. */
AITER_INLINE StepVec interleave(const Element *low, const Element *high, int count) {
    HalfVec a = HalfVec{}, b = HalfVec{};
    if (count >= LANES) {
        a = load(low);
        if (high) b = load(high);
    } else {
        memcpy(&a, low, count * sizeof(Element));
        if (high) memcpy(&b, high, count * sizeof(Element));
    }
    return widen(a) | (widen(b) << 16);
}

/* The weights of two keys. */
AITER_INLINE StepVec to_pairs(Vec low, Vec high) {
#if AITER_DTYPE_BF16
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (StepVec)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
#else
    return widen(to_elements(low)) | (widen(to_elements(high)) << 16);
#endif
}
#endif

/* The weights of two keys with the rows of vector v. */
AITER_INLINE void store_weights(Step *weights, int key, int v, Vec low, Vec high) {
#if AITER_PAIRS
    store_steps(weights + Lanes::at(key / 2u, v), to_pairs(low, high));
#else
    store(weights + Lanes::at(key, v), low);
    store(weights + Lanes::at(key + 1, v), high);
#endif
}

/* In the place of a row that takes no part, whose zero weights must not meet what is not finite. */
alignas(ALIGNMENT) static const Cached NO_ROW[HEAD_DIM + VALUE_DIM] = {};

/* Steps [first, first + LANES) of a row of N elements, zeros past its end. */
template <int N> AITER_INLINE StepVec row_steps(const Element *row, int first) {
#if AITER_PAIRS
    StepVec v = StepVec{};
    const int left = N / 2 - first;
    if (left >= LANES) memcpy(&v, row + first * 2, sizeof v);
    else if (left > 0) memcpy(&v, row + first * 2, left * sizeof(Step));
    return v;
#else
    return to_floats(row + first, N - first);
#endif
}

#if AITER_FP8_CACHE
template <int N> AITER_INLINE StepVec row_steps(const Fp8 *row, int first) {
#if AITER_PAIRS
    return element_pairs(row + first * 2, N - first * 2);
#else
    return to_floats(row + first, N - first);
#endif
}
#if AITER_PAIRS
AITER_INLINE StepVec interleave(const Fp8 *low, const Fp8 *high, int count) {
    return to_pairs(to_floats(low, count), high ? to_floats(high, count) : Vec{});
}
#endif
#endif

/* [step][lane] of LANES rows, vector v of a strip, times `sign`; a null row is zeros. For Q^T, and in the backward pass
 * K^T and V^T. */
template <int N> static AITER_OUTLINE void pack_lanes(Step *lanes, int v, const Element *const *rows, float sign) {
    for (int s = 0; s < STEPS<N>; s += LANES) {
        Vec square[LANES];
        for (int i = 0; i < LANES; i++)
            square[i] = (Vec)(rows[i] ? times_sign(row_steps<N>(rows[i], s), sign) : StepVec{});
        transpose(square);
        for (int i = 0; i < LANES && s + i < STEPS<N>; i++)
            store(reinterpret_cast<float *>(lanes) + Lanes::at(s + i, v), square[i]);
    }
}

/* [row][step], for K, and in the backward pass, where all rows are of Element, Q and dO. */
template <int N> static void pack_row_steps(Step *packed, const Cached *const *rows, int count) {
    for (int i = 0; i < round_up(count, KEY_MULTIPLE); i++)
        for (int s = 0; s < STEPS<N>; s += LANES)
            store_steps(packed + RowSteps<N>::at(i, s / LANES), i < count ? row_steps<N>(rows[i], s) : StepVec{},
                        STEPS<N> - s);
}

#if AITER_TILES
/* [d][row step], through squares of LANES steps by LANES values of d. */
template <int N> static void pack_step_rows(Step *packed, const Cached *const *rows, int count) {
    for (int first = 0; first < count; first += LANES * STEP_ELEMENTS)
        for (int d = 0; d < PADDED<N>; d += LANES) {
            Vec square[LANES];
            for (int i = 0; i < LANES; i++) {
                const int row = first + i * STEP_ELEMENTS;
                square[i] = row < count && d < N
                                ? (Vec)interleave(rows[row] + d, row + 1 < count ? rows[row + 1] + d : nullptr, N - d)
                                : Vec{};
            }
            transpose(square);
            for (int i = 0; i < LANES; i++)
                store(reinterpret_cast<float *>(packed) + StepRows<N>::at(d + i, first / STEP_ELEMENTS / LANES),
                      square[i]);
        }
}
#elif AITER_PAIRS
/* [row step][d], for V, and in the backward pass Q and dO. */
template <int N> static void pack_step_rows(Step *packed, const Cached *const *rows, int count) {
    for (int i = 0; i < round_up(count, KEY_MULTIPLE); i += STEP_ELEMENTS, packed += PADDED<N>)
        for (int d = 0; d < PADDED<N>; d += LANES) {
            StepVec steps = StepVec{};
            if (i < count) steps = interleave(rows[i] + d, i + 1 < count ? rows[i + 1] + d : nullptr, N - d);
            store_steps(packed + d, steps, PADDED<N> - d);
        }
}
#else
template <int N> static void pack_step_rows(Step *packed, const Cached *const *rows, int count) {
    pack_row_steps<N>(packed, rows, count);
}
#endif

/* Keys [first, first + count) and their values. Those before `seen`, which nobody sees, are not read. */
static inline AITER_OUTLINE void pack_block(Step *packed, const KeyRows &rows, int64_t first, int count, int64_t seen) {
    const Cached *keys[BLOCK_KEYS], *values[BLOCK_KEYS];
    find_seen(rows, first, count, seen, keys, values);
    pack_row_steps<HEAD_DIM>(packed, keys, count);
    pack_step_rows<VALUE_DIM>(packed + PACKED_VALUES, values, count);
}

#endif
