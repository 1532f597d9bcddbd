/* Matrix products by fused multiply-add, in float whatever the element type: the engine of every CPU level.
 *
 * Both products of attention have the same form here, with query rows along the vector lanes:
 *
 *     scores        S^T[key][row] = sum over d   of K[key][d] * Q^T[d][row]
 *     accumulation  O^T[d][row]  += sum over key of V[key][d] * P^T[key][row]
 *
 * so that the right operand is loaded as whole vectors, the left one (K or V just as it lies in memory) is broadcast
 * element by element, and the softmax between the two works lane by lane without ever reducing across lanes.
 */
#ifndef AITER_CPU_MATRIX_FMA_H
#define AITER_CPU_MATRIX_FMA_H

#include "sequence.h"

#if AITER_AVX512 /* 32 registers: 8 x 3 sums, 3 right vectors, one broadcast in flight */
constexpr int STRIP_VECTORS = 3, TILE_ROWS = 8;
#elif AITER_AVX2 /* 16 registers */
constexpr int STRIP_VECTORS = 3, TILE_ROWS = 4;
#else
constexpr int STRIP_VECTORS = 2, TILE_ROWS = 4;
#endif
constexpr int STRIP_ROWS = STRIP_VECTORS * LANES; /* query rows that are worked on together */
constexpr int BLOCK_KEYS = 64;                    /* keys per step of the online softmax; K and V of a block fit L2 */
constexpr int KEY_MULTIPLE = 8;                   /* keys of a block are padded with zero rows to a multiple of this */

typedef float Packed; /* what one multiply-add takes of each operand */
constexpr int QUERY_STEPS = HEAD_DIM;

/* C[i][row] (+)= sum over s of a[i * a_row + s * a_step] * b[s][row], for i < count, a multiple of TILE_ROWS. */
template <int VECTORS>
static void multiply(float *c, const Packed *a, int64_t a_row, int64_t a_step, const Packed *b, int count, int steps,
                     bool accumulate) {
    for (int i0 = 0; i0 < count; i0 += TILE_ROWS, a += TILE_ROWS * a_row, c += TILE_ROWS * STRIP_ROWS) {
        Vec total[TILE_ROWS][VECTORS];
        AITER_UNROLL
        for (int i = 0; i < TILE_ROWS; i++)
            AITER_UNROLL
            for (int v = 0; v < VECTORS; v++)
                total[i][v] = accumulate ? load(c + i * STRIP_ROWS + v * LANES) : Vec{};
        for (int s = 0; s < steps; s++) {
            Vec right[VECTORS];
            AITER_UNROLL
            for (int v = 0; v < VECTORS; v++) right[v] = load(b + s * STRIP_ROWS + v * LANES);
            AITER_UNROLL
            for (int i = 0; i < TILE_ROWS; i++) {
                const Vec left = broadcast(a[i * a_row + s * a_step]);
                AITER_UNROLL
                for (int v = 0; v < VECTORS; v++) total[i][v] = left * right[v] + total[i][v];
            }
        }
        AITER_UNROLL
        for (int i = 0; i < TILE_ROWS; i++)
            AITER_UNROLL
            for (int v = 0; v < VECTORS; v++) store(c + i * STRIP_ROWS + v * LANES, total[i][v]);
    }
}

template <int VECTORS>
static void scores(float *s, const Packed *keys, const Packed *queries, int count) {
    multiply<VECTORS>(s, keys, HEAD_DIM, 1, queries, count, QUERY_STEPS, false);
}

template <int VECTORS>
static void accumulate(float *o, const Packed *values, const Packed *probabilities, int count, bool first) {
    multiply<VECTORS>(o, values, 1, HEAD_DIM, probabilities, HEAD_DIM, count, !first);
}

/* Q^T[d][lane] of LANES rows; a null row is zeros. `sign` is 1 or -1. */
static void pack_queries(Packed *queries, const Element *const (&rows)[LANES], float sign) {
    for (int d = 0; d < HEAD_DIM; d += LANES) {
        Vec square[LANES];
        for (int i = 0; i < LANES; i++)
            square[i] = rows[i] ? to_floats(rows[i] + d, HEAD_DIM - d) * sign : Vec{};
        transpose(square);
        for (int i = 0; i < LANES && d + i < HEAD_DIM; i++) store(queries + (d + i) * STRIP_ROWS, square[i]);
    }
}

static void pack_rows(Packed *packed, const Element *const *rows, int count) {
    for (int i = 0; i < count; i++, packed += HEAD_DIM)
        for (int d = 0; d < HEAD_DIM; d += LANES) {
            const Vec v = to_floats(rows[i] + d, HEAD_DIM - d);
            if (HEAD_DIM - d >= LANES)
                store(packed + d, v);
            else
                memcpy(packed + d, &v, (HEAD_DIM - d) * sizeof(float));
        }
    const int padding = (KEY_MULTIPLE - count % KEY_MULTIPLE) % KEY_MULTIPLE;
    memset(packed, 0, padding * HEAD_DIM * sizeof(Packed));
}

static void pack_keys(Packed *keys, const Element *const *rows, int count) { pack_rows(keys, rows, count); }
static void pack_values(Packed *values, const Element *const *rows, int count) { pack_rows(values, rows, count); }

#endif
