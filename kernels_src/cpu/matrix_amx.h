/* Matrix products on AMX tiles: 16 x 16 sums from 16 rows of 16 pairs each.
 *
 * Of the eight tile registers four hold sums (32 x 32), two the left and two the right operand, so that every tile
 * that is loaded takes part in two products.
 *
 *              t6   t7    right: 16 steps x 16 query rows each
 *        t4    t0   t1
 *        t5    t2   t3    left: 16 rows x 16 steps each
 */
#ifndef AITER_CPU_MATRIX_AMX_H
#define AITER_CPU_MATRIX_AMX_H

#include "packed.h"
#include "cpu/tile_instructions.h"

static_assert(LANES == 16 && STRIP_VECTORS % 2 == 0, "tiles are 16 x 16");

constexpr int TILE_SIDE = 16;

/* C[i][lane] (+)= sum over s of A[i][s] * B[s][lane], for 32 i from `first` on and the lanes of vectors FROM and,
 * where TO is two more, the one after it. */
template <int FROM, int TO, class C, class A, class B, class Meanwhile>
AITER_INLINE void multiply_square(float *c, const Step *a, const Step *b, int first, int steps, bool accumulate,
                                  const Meanwhile &meanwhile) {
    constexpr int64_t A_BYTES = A::ROW * sizeof(Step), B_BYTES = B::ROW * sizeof(Step),
                      C_BYTES = C::ROW * sizeof(float);
    constexpr bool BOTH = TO - FROM == 2;
    float *upper = c + C::at(first, FROM), *lower = c + C::at(first + TILE_SIDE, FROM);
    if (accumulate) {
        load_tile<0>(upper, C_BYTES);
        load_tile<2>(lower, C_BYTES);
        if (BOTH) load_tile<1>(upper + C::at(0, 1), C_BYTES);
        if (BOTH) load_tile<3>(lower + C::at(0, 1), C_BYTES);
    } else {
        zero_tile<0>();
        zero_tile<2>();
        if (BOTH) zero_tile<1>();
        if (BOTH) zero_tile<3>();
    }
    for (int s = 0; s < steps; s += TILE_SIDE) {
        load_tile<4>(a + A::at(first, s / TILE_SIDE), A_BYTES);
        load_tile<6>(b + B::at(s, FROM), B_BYTES);
        multiply_tiles<0, 4, 6>();
        load_tile<5>(a + A::at(first + TILE_SIDE, s / TILE_SIDE), A_BYTES);
        multiply_tiles<2, 5, 6>();
        if (BOTH) {
            load_tile<7>(b + B::at(s, FROM + 1), B_BYTES);
            multiply_tiles<1, 4, 7>();
            multiply_tiles<3, 5, 7>();
        }
        meanwhile();
    }
    store_tile<0>(upper, C_BYTES);
    store_tile<2>(lower, C_BYTES);
    if (BOTH) store_tile<1>(upper + C::at(0, 1), C_BYTES);
    if (BOTH) store_tile<3>(lower + C::at(0, 1), C_BYTES);
}

/* The same for i < count, a multiple of 32, and VECTORS of lanes, steps in sixteens. C, A and B are their layouts.
 * `meanwhile` is called after every few products, to do what the vector units can do at the same time. */
template <int VECTORS, class C, class A, class B, class Meanwhile>
static void multiply(float *c, const Step *a, const Step *b, int count, int steps, bool accumulate,
                     const Meanwhile &meanwhile) {
    for (int first = 0; first < count; first += 2 * TILE_SIDE) {
        multiply_square<0, (VECTORS < 2 ? VECTORS : 2), C, A, B>(c, a, b, first, steps, accumulate, meanwhile);
        if constexpr (VECTORS > 2) multiply_square<2, VECTORS, C, A, B>(c, a, b, first, steps, accumulate, meanwhile);
    }
}

template <int VECTORS, class C, class A, class B>
static void multiply(float *c, const Step *a, const Step *b, int count, int steps, bool accumulate,
                     int /* part: always all steps */ = 0) {
    multiply<VECTORS, C, A, B>(c, a, b, count, steps, accumulate, [] {});
}

#endif
