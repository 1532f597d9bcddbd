/* The gradients over one block of keys and one group of query rows.
 *
 * Query rows lie along the vector lanes, as in the forward pass (see packed.h):
 *
 *     S^T[key][row]  = K Q^T          P^T  = 2^(scale S^T - log_sum)        from the row's log-sum-exp
 *     dP^T[key][row] = V dO^T         dS^T = P^T (dP^T - delta)
 *
 *     dQ^T[d][row] += K^T dS^T        sums over keys
 *     dV[key][d]   += P^T dO          sum over rows: here P^T and dS^T are the left operand,
 *     dK[key][d]   += dS^T Q          and d lies along the lanes
 *
 * delta is the row sum of dO * O less the gradient of the row's log-sum-exp. The factor softmax_scale of dQ and dK is
 * applied when they are written.
 */
#ifndef AITER_CPU_GRADIENT_H
#define AITER_CPU_GRADIENT_H

#include "packed.h"

#if AITER_TILES
#include "matrix_amx.h"
#else
#include "matrix_vector.h"
#endif

constexpr int GROUP_STRIPS = 4;
constexpr int GROUP_ROWS = GROUP_STRIPS * STRIP_ROWS; /* rows per sum of dK and dV: they are loaded and stored as often */
constexpr int GROUP_STEPS = GROUP_ROWS / STEP_ELEMENTS;
constexpr int RUN_STEPS = STEP_ELEMENTS > 1 ? DIM_STEPS : 32;
constexpr int WIDE = round_up(DIM, LANES);            /* head_dim where it lies along the lanes */

/* K and V of a block: as left operands of the scores, and K as left operand of dQ. */
struct GradBlock {
    Step keys[BLOCK_KEYS * DIM_STEPS], values[BLOCK_KEYS * DIM_STEPS], key_columns[BLOCK_STEPS * DIM];
    float grad_keys[BLOCK_KEYS * WIDE], grad_values[BLOCK_KEYS * WIDE];
};

/* Q and dO of a group of rows: transposed for the scores, as they are for dK and dV. */
struct GradRows {
    Step queries[GROUP_STRIPS][DIM_STEPS * STRIP_ROWS], grad_outputs[GROUP_STRIPS][DIM_STEPS * STRIP_ROWS];
    Step query_steps[GROUP_STEPS * WIDE], grad_output_steps[GROUP_STEPS * WIDE];
    float log_sum[GROUP_ROWS], delta[GROUP_ROWS]; /* log_sum in the log2 domain; inf for rows that take no part */
    int32_t visible[GROUP_ROWS];                  /* the row sees the keys below this */
    int32_t fewest_visible, most_visible;
};

/* What one block and one group make: scores to weights, gradients of weights to gradients of scores. */
struct GradTile {
    float scores[BLOCK_KEYS * STRIP_ROWS], grad_weights[BLOCK_KEYS * STRIP_ROWS];
    Step weights[BLOCK_KEYS * GROUP_STEPS], grad_scores[BLOCK_KEYS * GROUP_STEPS]; /* left operands: [key][row] */
    Step grad_columns[BLOCK_STEPS * STRIP_ROWS];                                  /* right operand: [step of keys][row] */
};

/* LANES values of a left operand, rows of which hold GROUP_ROWS. */
AITER_INLINE void store_left(Step *left, Vec v) {
#if AITER_PAIRS
    const HalfVec elements = to_elements(v);
    memcpy(left, &elements, sizeof elements);
#else
    store(left, v);
#endif
}

/* Weights and gradients of scores of one strip, from its scores and gradients of weights. */
static void grade_scores(GradTile &tile, const GradRows &rows, int strip, int32_t first_key, int count, float scale_log2) {
    const bool hides = rows.fewest_visible < first_key + count;
    for (int v = 0; v < STRIP_VECTORS; v++) {
        const int row = strip * STRIP_ROWS + v * LANES;
        const Vec log_sum = load(rows.log_sum + row), delta = load(rows.delta + row);
        const IntVec visible = load(rows.visible + row) - first_key;
        for (int j = 0; j < count; j += 2) {
            Vec weight[2], grad[2];
            AITER_UNROLL
            for (int i = 0; i < 2; i++) {
                const int at = (j + i) * STRIP_ROWS + v * LANES;
                weight[i] = exp2<EXP2_DEGREE>(load(tile.scores + at) * scale_log2 - log_sum);
                grad[i] = weight[i] * (load(tile.grad_weights + at) - delta);
                if (hides) {
                    const IntVec seen = visible > j + i;
                    weight[i] = seen ? weight[i] : Vec{};
                    grad[i] = seen ? grad[i] : Vec{};
                }
                store_left(tile.weights + (j + i) * GROUP_STEPS + row / STEP_ELEMENTS, weight[i]);
                store_left(tile.grad_scores + (j + i) * GROUP_STEPS + row / STEP_ELEMENTS, grad[i]);
            }
            store_weights(tile.grad_columns + v * LANES, j, grad[0], grad[1]);
        }
    }
}

/* C[i][d] += sum over s of left[i][s] * right[s][d], all of WIDE. */
static void multiply_wide(float *c, const Step *left, const Step *right, int count, int steps) {
    int d = 0;
    for (; d + STRIP_VECTORS * LANES <= WIDE; d += STRIP_VECTORS * LANES)
        multiply<STRIP_VECTORS, WIDE, GROUP_STEPS, 1, WIDE>(c + d, left, right + d, count, steps, true);
    for (; d < WIDE; d += LANES) multiply<1, WIDE, GROUP_STEPS, 1, WIDE>(c + d, left, right + d, count, steps, true);
}

/* Adds what `count` keys, a multiple of KEY_MULTIPLE, and a group of rows have to do with each other: to the block's
 * dK and dV, and to dQ^T[strip][d][row] of the group (first: instead of adding, begins it). */
static void grade_block(GradBlock &block, GradRows &rows, GradTile &tile, float *grad_queries, int32_t first_key, int count,
                        float scale_log2, bool first) {
    for (int strip = 0; strip < GROUP_STRIPS; strip++) {
        multiply<STRIP_VECTORS, STRIP_ROWS, DIM_STEPS, 1, STRIP_ROWS>(tile.scores, block.keys, rows.queries[strip], count,
                                                                      DIM_STEPS, false);
        /* dP - delta is a small difference of large sums: summed in runs, as rounding errors grow with a sum's length. */
        for (int s = 0; s < DIM_STEPS; s += RUN_STEPS)
            multiply<STRIP_VECTORS, STRIP_ROWS, DIM_STEPS, 1, STRIP_ROWS>(
                tile.grad_weights, block.values + s, rows.grad_outputs[strip] + s * STRIP_ROWS, count,
                static_cast<int>(minimum(RUN_STEPS, DIM_STEPS - s)), s > 0);
        grade_scores(tile, rows, strip, first_key, count, scale_log2);
        multiply<STRIP_VECTORS, STRIP_ROWS, VALUE_ROW, VALUE_STEP, STRIP_ROWS>(
            grad_queries + strip * DIM * STRIP_ROWS, block.key_columns, tile.grad_columns, DIM, count / STEP_ELEMENTS, !first);
    }
    multiply_wide(block.grad_values, tile.weights, rows.grad_output_steps, count, GROUP_STEPS);
    multiply_wide(block.grad_keys, tile.grad_scores, rows.query_steps, count, GROUP_STEPS);
}

#endif
