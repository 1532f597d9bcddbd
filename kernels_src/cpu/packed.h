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

#include "sequence.h"

#if (AITER_DTYPE_BF16 && AITER_CPU_AMXBF16) || (AITER_DTYPE_FP16 && AITER_CPU_AMXFP16)
#define AITER_TILES 1
#define AITER_PAIRS 1
#elif AITER_DTYPE_BF16 && AITER_CPU_AVX512BF16
#define AITER_DOT_PRODUCTS 1
#define AITER_PAIRS 1
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

#if AITER_TILES
#if AITER_BACKWARD
constexpr int STRIP_VECTORS = 2, BLOCK_KEYS = 128;
#else
constexpr int STRIP_VECTORS = 4, BLOCK_KEYS = 256; /* so that tiles of K, V and O^T come from L2 less often */
#endif
constexpr int MIN_TILE_ROWS = 256;
constexpr int KEY_MULTIPLE = 32;            /* a tile of weights takes 32 keys */
constexpr int DIM = round_up(HEAD_DIM, 32); /* head_dim as the products see it: padded with zeros */
#else
#if AITER_AVX2
constexpr int STRIP_VECTORS = 3, BLOCK_KEYS = 128;
#elif AITER_AVX512
constexpr int STRIP_VECTORS = 3, BLOCK_KEYS = 64;
#else
constexpr int STRIP_VECTORS = 2, BLOCK_KEYS = 64;
#endif
constexpr int MIN_TILE_ROWS = 96;
constexpr int KEY_MULTIPLE = 8;
constexpr int DIM = HEAD_DIM;
#endif
constexpr int MAX_TILE_ROWS = 1024;
/* STRIP_VECTORS: vectors of query rows that are worked on together. BLOCK_KEYS: keys per step of the online softmax;
 * scores and weights of a strip fit L1 (without tiles), packed keys and values L2. KEY_MULTIPLE: blocks are padded with
 * zero keys. MIN_TILE_ROWS: for fewer rows than this, packing keys and values costs too much of the time.
 * MAX_TILE_ROWS: Q^T and O^T of a tile lie in L2, or beside it where it is small; packing less often is worth more. */
constexpr int STRIP_ROWS = STRIP_VECTORS * LANES;
constexpr int DIM_STEPS = DIM / STEP_ELEMENTS;
constexpr bool FULL_PRECISION = sizeof(Element) == sizeof(float); /* else rounding to 16 bits outweighs all other */
constexpr int SCORE_PART = FULL_PRECISION ? 64 : DIM_STEPS;       /* steps that a score is summed over at a time */
constexpr int BLOCK_STEPS = BLOCK_KEYS / STEP_ELEMENTS;
constexpr int PACKED_VALUES = BLOCK_KEYS * DIM_STEPS;           /* where the values of a packed block begin */
constexpr int PACKED_BLOCK = PACKED_VALUES + BLOCK_STEPS * DIM; /* steps in a packed block */

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

#if AITER_TILES
using Lanes = Tiled<STRIP_VECTORS>;            /* what has the rows of a strip along its lanes */
using KeySteps = Tiled<DIM_STEPS / LANES>;     /* K[key][step] */
using ValueSteps = Tiled<BLOCK_STEPS / LANES>; /* V^T[d][step] */
using ValueColumns = ValueSteps;
#else
using Lanes = Strided<STRIP_ROWS>;
using KeySteps = Strided<DIM_STEPS>;
using ValueSteps = Strided<DIM>;   /* V[step][d] */
using ValueColumns = Columns<DIM>; /* the same, as V^T */
#endif

AITER_INLINE Vec multiply_add(Vec total, Vec a, Vec b) { return a * b + total; }
#if AITER_DOT_PRODUCTS
AITER_INLINE Vec multiply_add(Vec total, IntVec a, IntVec b) {
    return _mm512_dpbf16_ps(total, (__m512bh)a, (__m512bh)b);
}
#endif

AITER_INLINE Vec negate(Vec steps) { return -steps; }
#if AITER_PAIRS
AITER_INLINE IntVec negate(IntVec steps) { return steps ^ static_cast<int32_t>(0x80008000); }
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

/* Steps [first, first + LANES) of a row, zeros past its end. */
AITER_INLINE StepVec row_steps(const Element *row, int first) {
#if AITER_PAIRS
    StepVec v = StepVec{};
    const int left = HEAD_DIM / 2 - first;
    if (left >= LANES) memcpy(&v, row + first * 2, sizeof v);
    else if (left > 0) memcpy(&v, row + first * 2, left * sizeof(Step));
    return v;
#else
    return to_floats(row + first, HEAD_DIM - first);
#endif
}

/* Q^T[step][lane] of LANES rows, vector v of a strip; a null row is zeros. */
static AITER_OUTLINE void pack_queries(Step *queries, int v, const Element *const *rows, bool negated) {
    for (int s = 0; s < DIM_STEPS; s += LANES) {
        Vec square[LANES];
        for (int i = 0; i < LANES; i++) {
            const StepVec steps = rows[i] ? row_steps(rows[i], s) : StepVec{};
            square[i] = (Vec)(negated ? negate(steps) : steps);
        }
        transpose(square);
        for (int i = 0; i < LANES && s + i < DIM_STEPS; i++)
            store(reinterpret_cast<float *>(queries) + Lanes::at(s + i, v), square[i]);
    }
}

/* K[key][step] */
static void pack_keys(Step *keys, const Element *const *rows, int count) {
    for (int i = 0; i < round_up(count, KEY_MULTIPLE); i++)
        for (int s = 0; s < DIM_STEPS; s += LANES)
            store_steps(keys + KeySteps::at(i, s / LANES), i < count ? row_steps(rows[i], s) : StepVec{},
                        DIM_STEPS - s);
}

/* Rows as the right operand of a product that sums over them: [step][d], WIDTH values apart. Null rows and those from
 * `count` to `padded` are zeros. */
template <int WIDTH> static inline void pack_steps(Step *packed, const Element *const *rows, int count, int padded) {
    for (int i = 0; i < padded; i += STEP_ELEMENTS, packed += WIDTH)
        for (int d = 0; d < WIDTH; d += LANES) {
            StepVec steps = StepVec{};
            if (i < count && rows[i] && d < HEAD_DIM)
#if AITER_PAIRS
                steps = interleave(rows[i] + d, i + 1 < count && rows[i + 1] ? rows[i + 1] + d : nullptr, HEAD_DIM - d);
#else
                steps = to_floats(rows[i] + d, HEAD_DIM - d);
#endif
            store_steps(packed + d, steps, WIDTH - d);
        }
}

#if AITER_TILES
/* V^T[d][step], through squares of LANES steps by LANES values of d. */
static void pack_values(Step *values, const Element *const *rows, int count) {
    for (int first = 0; first < count; first += LANES * STEP_ELEMENTS)
        for (int d = 0; d < DIM; d += LANES) {
            Vec square[LANES];
            for (int i = 0; i < LANES; i++) {
                const int key = first + i * STEP_ELEMENTS;
                square[i] =
                    key < count && d < HEAD_DIM
                        ? (Vec)interleave(rows[key] + d, key + 1 < count ? rows[key + 1] + d : nullptr, HEAD_DIM - d)
                        : Vec{};
            }
            transpose(square);
            for (int i = 0; i < LANES; i++)
                store(reinterpret_cast<float *>(values) + ValueSteps::at(d + i, first / STEP_ELEMENTS / LANES),
                      square[i]);
        }
}
#elif AITER_PAIRS
/* V[step][d] */
static void pack_values(Step *values, const Element *const *rows, int count) {
    pack_steps<DIM>(values, rows, count, round_up(count, KEY_MULTIPLE));
}
#else
static void pack_values(Step *values, const Element *const *rows, int count) { pack_keys(values, rows, count); }
#endif

static inline AITER_OUTLINE void pack_block(Step *packed, const KeyRows &rows, int64_t first, int count) {
    const Element *keys[BLOCK_KEYS], *values[BLOCK_KEYS];
    rows.find(first, count, keys, values);
    pack_keys(packed, keys, count);
    pack_values(packed + PACKED_VALUES, values, count);
}

#endif
