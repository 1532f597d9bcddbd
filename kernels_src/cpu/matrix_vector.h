/* Matrix products by multiply-add or by dot products of pairs: right operand in whole vectors, left one broadcast. */
#ifndef AITER_CPU_MATRIX_VECTOR_H
#define AITER_CPU_MATRIX_VECTOR_H

#include "packed.h"

#if AITER_AVX512
constexpr int TILE_ROWS = 8; /* of 32 registers: 8 x 3 sums, 3 right vectors, one broadcast */
#else
constexpr int TILE_ROWS = 4; /* of 16 registers: 4 x 3 sums, 3 right vectors, one broadcast */
#endif

struct Tiles { /* nothing to set up */
    static bool permitted() { return true; }
};

/* C[i][lane] (+)= sum over s of A[i][s] * B[s][lane], for i < count, a multiple of ROWS, and VECTORS of lanes; `part`
 * steps are summed at a time. C, A and B are their layouts. */
template <int VECTORS, class C, class A, class B, int ROWS = TILE_ROWS>
static void multiply(float *c, const Step *a, const Step *b, int count, int steps, bool accumulate, int part) {
    for (int first = 0; first < count; first += ROWS, a += ROWS * A::ROW, c += ROWS * C::ROW)
        for (int begin = 0; begin < steps; begin += part) {
            const int end = static_cast<int>(minimum(begin + part, steps));
            Vec total[ROWS][VECTORS];
            AITER_UNROLL
            for (int i = 0; i < ROWS; i++) {
                AITER_UNROLL
                for (int v = 0; v < VECTORS; v++) total[i][v] = Vec{};
            }
            for (int s = begin; s < end; s++) {
                StepVec right[VECTORS];
                AITER_UNROLL
                for (int v = 0; v < VECTORS; v++) right[v] = load_steps(b + B::at(s, v));
                AITER_UNROLL
                for (int i = 0; i < ROWS; i++) {
                    const StepVec left = broadcast(a[i * A::ROW + s * A::STEP]);
                    AITER_UNROLL
                    for (int v = 0; v < VECTORS; v++) total[i][v] = multiply_add(total[i][v], left, right[v]);
                }
            }
            AITER_UNROLL
            for (int i = 0; i < ROWS; i++) {
                AITER_UNROLL
                for (int v = 0; v < VECTORS; v++) {
                    float *p = c + C::at(i, v);
                    store(p, accumulate || begin > 0 ? load(p) + total[i][v] : total[i][v]);
                }
            }
        }
}

template <int VECTORS, class C, class A, class B>
static void multiply(float *c, const Step *a, const Step *b, int count, int steps, bool accumulate) {
    multiply<VECTORS, C, A, B>(c, a, b, count, steps, accumulate, steps);
}

#endif
