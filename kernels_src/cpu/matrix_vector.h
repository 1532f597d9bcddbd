/* Matrix products by multiply-add or by dot products of pairs: right operand in whole vectors, left one broadcast. */
#ifndef AITER_CPU_MATRIX_VECTOR_H
#define AITER_CPU_MATRIX_VECTOR_H

#include "row_operands.h"

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

#if AITER_BATCH_INVARIANT
/* C[i][lane] = sum over the steps of a head_dim of A[i][s] * B[s][lane], each sum in the order of row_attention.h, where
 * head_dim lies along the lanes: first what one lane adds up there, then sums of two lanes, of four and so on, whose
 * numbers differ in the highest bit, in the next one and so on. Those that are complete wait for their counterparts; the
 * first two are made side by side, but for AVX2, which can't read the broadcasts of twice as many sums. */
template <int VECTORS, class C, class A, class B>
static void multiply_by_lanes(float *c, const Step *a, const Step *b, int count) {
    constexpr int SIDE = LANES == 8 ? 1 : 2, ROWS = TILE_ROWS / SIDE, SUMS = ROWS * VECTORS, TURNS = LANES / SIDE;
    constexpr bool WHOLE = DIM_STEPS % (LANES * LANE_STEPS) == 0;
    alignas(64) float waiting[4][SUMS][LANES]; /* of twice as many lanes each */
    for (int first = 0; first < count; first += ROWS, a += ROWS * A::ROW, c += ROWS * C::ROW)
        for (int turn = 0; turn < TURNS; turn++) {
            int lane = 0; /* the bits of turn, turned round */
            for (int bit = 1; bit < TURNS; bit *= 2) lane += turn & bit ? TURNS / 2 / bit : 0;
            Vec total[SIDE][SUMS]; /* [row][vector] */
            AITER_UNROLL
            for (int side = 0; side < SIDE; side++) {
                AITER_UNROLL
                for (int i = 0; i < SUMS; i++) total[side][i] = Vec{};
            }
            for (int n = 0; n < KEY_VECTORS; n++) {
                AITER_UNROLL
                for (int side = 0; side < SIDE; side++) {
                    const int s = (n / LANE_STEPS * LANES + lane + side * TURNS) * LANE_STEPS + n % LANE_STEPS;
                    const bool exists = WHOLE || s < DIM_STEPS;
                    StepVec right[VECTORS];
                    AITER_UNROLL
                    for (int v = 0; v < VECTORS; v++) right[v] = exists ? load_steps(b + B::at(s, v)) : StepVec{};
                    AITER_UNROLL
                    for (int i = 0; i < ROWS; i++) {
                        const StepVec left = broadcast(exists ? a[i * A::ROW + s * A::STEP] : Step{});
                        AITER_UNROLL
                        for (int v = 0; v < VECTORS; v++) {
                            Vec &sum = total[side][i * VECTORS + v];
                            sum = multiply_add(sum, left, right[v]);
                        }
                    }
                }
            }
            if (SIDE == 2) {
                AITER_UNROLL
                for (int i = 0; i < SUMS; i++) total[0][i] += total[SIDE - 1][i];
            }
            int depth = 0;
            for (; turn >> depth & 1; depth++) {
                AITER_UNROLL
                for (int i = 0; i < SUMS; i++) total[0][i] += load(waiting[depth][i]);
            }
            AITER_UNROLL
            for (int i = 0; i < SUMS; i++)
                store(turn + 1 == TURNS ? c + C::at(i / VECTORS, i % VECTORS) : waiting[depth][i], total[0][i]);
        }
}
#endif

#endif
