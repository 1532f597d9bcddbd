/* A strip of few rows with the bits of any other strip: for results that may not depend on how many rows there are.
 *
 * Each sum is the one that strip_vector.h makes, term by term, and each step of the softmax that of softmax.h. Only what
 * lies along the lanes differs, so that rows that are not there cost nothing, and keys and values are read where they lie:
 *
 *     S [row][key]  = Q K^T        head_dim along the lanes: row_attention.h, whose order of sums strip_vector.h keeps to
 *     P [row][key]  = 2^(S - max)  keys along the lanes; only sums go from key to key
 *     O [row][d]   += P V          head_dim along the lanes: row_attention.h
 *
 * A block of keys has sums of its own, which are added to the strip's when it closes. It is worked off as if no row's
 * maximum had to move; where one had, its weights are made once more from its scores.
 */
#ifndef AITER_CPU_NARROW_STRIP_H
#define AITER_CPU_NARROW_STRIP_H

#include "row_attention.h"
#include "softmax.h"

static_assert(BLOCK_KEYS % ROW_KEYS == 0 && ROW_KEYS % KEY_MULTIPLE == 0, "blocks are made of whole steps");

/* The rows of one KV head. */
struct NarrowStrip {
    Strip strip;
    int rows;
    const RowQuery *queries;
    float *scores;    /* [row][BLOCK_KEYS] */
    RowState *states; /* of the block that is open: sums of weights and of weighted values */

    void open_block(int32_t key) {
        first_key = end_key = key;
        unknown = 0;
        for (int r = 0; r < rows; r++) unknown |= uint32_t{strip.maximum[r] == -INFINITE} << r;
        clear();
    }

    /* Lets all rows see the next step of the block, and fetches the `next` one of all. */
    void attend(const RowStep &step, const RowStep &next, const Score &score, const Dropout &dropout) {
        for_rows(rows, [&](auto some, int first) {
            const RowStep &fetched = first == 0 ? next : step; /* once is enough */
            score_step<decltype(some)::value>(first, step, fetched, end_key, score);
            if (!unknown) add_step<decltype(some)::value>(first, step, fetched, end_key, score, dropout);
        });
        if (unknown) /* values are needed when the block closes */
            for (const Cached *value : step.values) prefetch_row<VALUE_DIM>(value);
        end_key += ROW_KEYS;
    }

    /* step_at(key): the block's step that begins there. */
    template <class StepAt> void close_block(const Score &score, const Dropout &dropout, const StepAt &step_at) {
        for (int again = 0; again < 2; again++) {
            const uint32_t moves = again == 0 ? unknown : exceeding;
            if (!moves) continue;
            raise(moves, score.softmax_scale());
            clear();
            for (int32_t key = first_key; key < end_key; key += ROW_KEYS) {
                const RowStep step = step_at(key);
                for_rows(rows, [&](auto some, int first) {
                    add_step<decltype(some)::value>(first, step, step, key, score, dropout);
                });
            }
        }
        for (int r = 0; r < rows; r++) {
            strip.sum[r] += states[r].sum;
            float *output = strip.output + r * OUTPUT_DIM;
            for (int d = 0; d < OUTPUT_DIM; d += LANES) {
                const Vec added = load(states[r].output + d);
                store(output + d, strip.empty ? added : load(output + d) + added);
            }
        }
        strip.empty = false;
    }

  private:
    void clear() {
        exceeding = 0;
        for (int r = 0; r < rows; r++) states[r].clear();
    }

    template <int ROWS>
    AITER_OUTLINE void score_step(int first, const RowStep &step, const RowStep &next, int32_t key,
                                  const Score &score) {
        score_keys<ROWS>(queries + first, step, next, scores + first * BLOCK_KEYS + (key - first_key), BLOCK_KEYS);
        if (PLAIN_SCORES && !strip.seen.cuts(key, ROW_KEYS)) return;
        for (int r = first; r < first + ROWS; r++)
            for (int i = 0; i < ROW_KEYS; i += LANES) {
                float *s = scores + r * BLOCK_KEYS + (key - first_key) + i;
                const IntVec keys = key + i + lane_index();
                Vec all = load(s);
                if (!PLAIN_SCORES) all = score(all, (ALIBI ? strip.place[r] : 0) - keys, ALIBI ? strip.slope[r] : 0.0f);
                store(s, in_range(keys, WINDOW ? strip.low[r] : 0, strip.high[r]) ? all : broadcast(-INFINITE));
            }
    }

    /* From scores to weights, what OnlineSoftmax does in one lane, and to sums of these and of weighted values. */
    template <int ROWS>
    AITER_OUTLINE void add_step(int first, const RowStep &step, const RowStep &next, int32_t key, const Score &score,
                                const Dropout &dropout) {
        const float scale = score.softmax_scale();
        alignas(64) RowWeights weights[ROWS];
        alignas(64) float pairs[ROWS][ROW_KEYS]; /* sums of the weights of two keys, each twice */
        for (int i = 0; i < ROWS; i++) {
            const int r = first + i;
            const float *s = scores + r * BLOCK_KEYS + (key - first_key);
            const float base = strip.maximum[r] == -INFINITE ? 0.0f : strip.maximum[r];
            Vec largest = broadcast(-INFINITE);
            for (int j = 0; j < ROW_KEYS; j += LANES) {
                const Vec power = load(s + j) * scale - base, weight = exp2<EXP2_DEGREE>(power);
                largest = maximum(largest, power);
                store(pairs[i] + j, fold<1>(weight, weight, std::make_integer_sequence<int, LANES>()));
                const IntVec kept =
                    DROPOUT ? dropout.kept(broadcast(strip.head[r]), broadcast(strip.row[r]), key + j + lane_index())
                            : IntVec{};
                store_weights(weights[i] + j / PAIR, DROPOUT ? kept ? weight : Vec{} : weight);
            }
            exceeding |= uint32_t{any(largest > RESCALE_THRESHOLD)} << r;
        }
        for (int j = 0; j < ROW_KEYS; j += 2) { /* of all rows, as each addition waits for the one before */
            AITER_UNROLL
            for (int i = 0; i < ROWS; i++) states[first + i].sum += pairs[i][j];
        }
        add_values<ROWS>(step, next, weights, states + first);
    }

    /* Moves the maxima of these rows to those of the block. */
    AITER_OUTLINE void raise(uint32_t moves, float scale) {
        for (; moves; moves &= moves - 1) {
            const int r = __builtin_ctz(moves);
            const float *s = scores + r * BLOCK_KEYS;
            float largest = -INFINITE;
            for (int i = 0; i < end_key - first_key; i++) largest = largest > s[i] ? largest : s[i];
            const float old = strip.maximum[r], moved = largest * scale;
            if (old == -INFINITE && !(moved > -INFINITE)) continue;
            const float factor = exp2<EXP2_DEGREE>(broadcast(old - moved))[0];
            strip.maximum[r] = moved;
            strip.sum[r] *= factor;
            if (strip.empty) continue;
            float *output = strip.output + r * OUTPUT_DIM;
            for (int d = 0; d < OUTPUT_DIM; d += LANES) store(output + d, load(output + d) * factor);
        }
    }

    int32_t first_key, end_key;  /* of the block that is open */
    uint32_t unknown, exceeding; /* rows that had no maximum; rows with a score that exceeds theirs by too much */
};

#endif
