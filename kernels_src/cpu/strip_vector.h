/* Strips by vector instructions: the scores of a block of keys, their softmax, and the values that they weight. */
#ifndef AITER_CPU_STRIP_VECTOR_H
#define AITER_CPU_STRIP_VECTOR_H

#include "matrix.h"
#include "next_rows.h"
#include "softmax.h"

/* Works on one strip and one block of keys after the other. */
class StripWorker {
  public:
    static constexpr int SCORES = BLOCK_KEYS * STRIP_ROWS * (1 + DROPOUT),
                         WEIGHTS = BLOCK_STEPS * STRIP_ROWS; /* sizes of its buffers */
    static constexpr int PACKED_BLOCKS = 1;                  /* that it needs at a time */

    StripWorker(float *scores_buffer, Step *weights_buffer, const Score &how, const Dropout &random)
        : scores(scores_buffer), kept(reinterpret_cast<int32_t *>(scores_buffer + BLOCK_KEYS * STRIP_ROWS)),
          weights(weights_buffer), score(how), dropout(random) {}

    /* These `count` keys from the first one on will be packed when `strips` strips have seen the block before them. */
    void expect(const KeyRows &rows, int64_t first, int count, int64_t strips) {
        next.expect(rows, first, count, strips * (BLOCK_KEYS + VALUE_WIDTH) / PIECE);
    }

    /* Lets the strip see the packed block of `count` keys that begins at `first_key`. */
    void attend(Strip &strip, const Step *keys, const Step *values, int32_t first_key, int count) {
        const int skipped = strip.first_seen(first_key, count, KEY_MULTIPLE);
        const int seen = static_cast<int>(minimum(count, strip.seen.some.high - first_key)) - skipped;
        if (seen <= 0) return;
        keys += KeySteps::at(skipped, 0);
        values += StepRows<VALUE_DIM>::at(skipped / STEP_ELEMENTS, 0);
        const int padded = round_up(seen, KEY_MULTIPLE);
        with_vectors(strip, [&](auto vectors) {
            attend<decltype(vectors)::value>(strip, keys, values, first_key + skipped, padded);
        });
    }

    void finish() {}

  private:
    template <int VECTORS>
    void attend(Strip &strip, const Step *keys, const Step *values, int32_t first_key, int count) {
        for_pieces(count, [&](int first) {
            float *c = scores + first * Lanes::ROW;
            const Step *a = keys + first * KeySteps::ROW;
#if AITER_BATCH_INVARIANT
            multiply_by_lanes<VECTORS, Lanes, KeySteps, Lanes>(c, a, strip.queries, PIECE);
#else
            multiply<VECTORS, Lanes, KeySteps, Lanes>(c, a, strip.queries, PIECE, DIM_STEPS, false, strip.score_part);
#endif
        });
        mask_scores<VECTORS>(scores, strip, score, first_key, 0, count);
        if (DROPOUT) draw<VECTORS>(kept, strip, dropout, first_key, count);
        OnlineSoftmax softmax{scores, kept, weights, &strip, count, score.softmax_scale(), 0, {}, {}, {}};
        softmax.run<VECTORS>();
        const int steps = count / STEP_ELEMENTS;
        for_pieces(VALUE_WIDTH, [&](int first) {
            multiply<VECTORS, Lanes, ValueColumns, Lanes>(strip.output + first * Lanes::ROW,
                                                          values + first * ValueColumns::ROW, weights, PIECE, steps,
                                                          !strip.empty);
        });
        strip.empty = false;
    }

    /* Multiplies so many rows, PIECE at a time. */
    template <class Multiply> AITER_INLINE_MEMBER void for_pieces(int count, const Multiply &multiply_piece) {
        for (int first = 0; first < count; first += PIECE) {
            next.fetch();
            multiply_piece(first);
        }
    }

    static constexpr int PIECE = KEY_MULTIPLE; /* rows of a product between two calls of next.fetch() */
    NextRows next;
    float *scores;
    int32_t *kept;
    Step *weights;
    Score score;
    Dropout dropout;
};

#endif
