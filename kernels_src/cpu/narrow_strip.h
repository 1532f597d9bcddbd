/* A strip of few rows with the bits of any other strip, for results that must not depend on how many rows there are.
 *
 * What row_attention.h does for few rows is faster, but sums in another order. Here each sum is the one that
 * strip_vector.h makes, term by term, and the softmax is that of softmax.h; only what lies along the lanes differs, so
 * that lanes without a row cost nothing in the products:
 *
 *     S [row][key]    = Q K^T      keys along the lanes, K packed as columns
 *     S^T [key][row]  -> P^T       turned round for the softmax
 *     O [row][d]     += P V        head_dim along the lanes
 */
#ifndef AITER_CPU_NARROW_STRIP_H
#define AITER_CPU_NARROW_STRIP_H

#include "matrix.h"
#include "next_rows.h"
#include "softmax.h"

class NarrowWorker {
    static constexpr int KEY_STRIPS = (BLOCK_KEYS + STRIP_ROWS - 1) / STRIP_ROWS; /* keys lie in strips, too */
    static constexpr int ROOM = KEY_STRIPS * STRIP_ROWS;                          /* for so many keys */

  public:
    /* Rows of an output, and how far they lie apart. */
    static constexpr int OUTPUT_ROW = round_up(VALUE_DIM, LANES);
    static constexpr int OUTPUT = MAX_ROWS * OUTPUT_ROW;
    static constexpr int PRODUCTS = MAX_ROWS * ROOM, SCORES = BLOCK_KEYS * STRIP_ROWS,
                         WEIGHTS = BLOCK_STEPS * STRIP_ROWS;
    static constexpr int PACKED = ROOM * DIM_STEPS + BLOCK_STEPS * PADDED<VALUE_DIM> + LANES; /* reads go past the end */

    NarrowWorker(float *products_buffer, float *scores_buffer, Step *weights_buffer, Step *packed_buffer,
                 const Score &how)
        : products(products_buffer), scores(scores_buffer), weights(weights_buffer), keys(packed_buffer),
          values(packed_buffer + ROOM * DIM_STEPS), score(how) {}

    /* These keys are the next ones. */
    void expect(const KeyRows &rows, int64_t first, int count, int64_t seen) {
        next.expect(rows, first, count, 2 * BLOCK_KEYS / LANES, seen);
    }

    /* Lets `rows` rows see `count` keys from `first` on, of which those before `seen` need not be there. */
    void attend(Strip &strip, int rows, const KeyRows &source, int64_t first, int count, int64_t seen) {
        const Element *key_rows[ROOM] = {}, *value_rows[BLOCK_KEYS];
        find_seen(source, first, count, seen, key_rows, value_rows);
        for (int v = 0; v * LANES < count; v++) {
            pack_lanes<HEAD_DIM>(keys + v / STRIP_VECTORS * DIM_STEPS * STRIP_ROWS, v % STRIP_VECTORS,
                                 key_rows + v * LANES, 1.0f);
            next.fetch();
        }
        pack_step_rows<VALUE_DIM>(values, value_rows, count);
        switch (rows) {
        case 1: return attend<1, 1>(strip, rows, static_cast<int32_t>(first), count);
        case 2: return attend<2, 2>(strip, rows, static_cast<int32_t>(first), count);
        case 3:
        case 4: return attend<4, 4>(strip, rows, static_cast<int32_t>(first), count);
        default: return attend<TILE_ROWS, MAX_ROWS>(strip, rows, static_cast<int32_t>(first), count);
        }
    }

  private:
    /* For ROWS rows in all, AT_ONCE at a time. */
    template <int AT_ONCE, int ROWS> void attend(Strip &strip, int rows, int32_t first_key, int count) {
        using ByRow = Columns<STRIP_ROWS>; /* what has rows along the lanes, as a left operand */
        for (int first = 0; first < count; first += STRIP_ROWS)
            multiply<STRIP_VECTORS, Strided<ROOM>, ByRow, Lanes, AT_ONCE>(
                products + first, strip.queries, keys + first * DIM_STEPS, ROWS, DIM_STEPS, false, SCORE_PART);
        turn(strip.vectors, rows, count);
        const int padded = round_up(count, KEY_MULTIPLE);
        with_vectors(strip, [&](auto vectors) {
            constexpr int VECTORS = decltype(vectors)::value;
            mask_scores<VECTORS>(scores, strip, score, first_key, padded);
            OnlineSoftmax softmax{scores, weights, &strip, padded, score.softmax_scale(), 0, {}, {}, {}};
            softmax.run<VECTORS>();
        });
        using Output = Strided<OUTPUT_ROW>;
        using Values = Strided<PADDED<VALUE_DIM>>;
        constexpr int WHOLE = OUTPUT_ROW / STRIP_ROWS * STRIP_ROWS, REST = (OUTPUT_ROW - WHOLE) / LANES;
        const int steps = padded / STEP_ELEMENTS;
        for (int d = 0; d < WHOLE; d += STRIP_ROWS) {
            multiply<STRIP_VECTORS, Output, ByRow, Values, AT_ONCE>(strip.output + d, weights, values + d, ROWS, steps,
                                                                    !strip.empty, steps);
            next.fetch();
        }
        if constexpr (REST > 0)
            multiply<REST, Output, ByRow, Values, AT_ONCE>(strip.output + WHOLE, weights, values + WHOLE, ROWS, steps,
                                                           !strip.empty, steps);
        strip.empty = false;
    }

    /* S[row][key] to S^T[key][row]; lanes without a row are like the last one. */
    void turn(int vectors, int rows, int count) {
        for (int key = 0; key < count; key += LANES)
            for (int v = 0; v < vectors; v++) {
                Vec square[LANES];
                for (int i = 0; i < LANES; i++)
                    square[i] = load(products + minimum(v * LANES + i, rows - 1) * ROOM + key);
                transpose(square);
                for (int i = 0; i < LANES; i++) store(scores + Lanes::at(key + i, v), square[i]);
            }
        next.fetch();
    }

    float *products, *scores;
    Step *weights, *keys, *values;
    Score score;
    NextRows next;
};

#endif
