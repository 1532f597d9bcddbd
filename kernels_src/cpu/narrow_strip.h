/* A strip of few rows with the bits of any other strip: for results that may not depend on how many rows there are.
 *
 * row_attention.h is faster, but sums in another order. Here each sum is the one that strip_vector.h makes, term by
 * term, and the softmax is that of softmax.h. Only what lies along the lanes differs, so that lanes without a row cost
 * nothing in the products, and keys and values are read where they lie:
 *
 *     S [row][key]   = Q K^T       keys along the lanes: squares of K are turned round in registers
 *     S^T [key][row] -> P^T        turned round for the softmax
 *     O [row][d]    += P V         head_dim along the lanes, as in row_attention.h
 */
#ifndef AITER_CPU_NARROW_STRIP_H
#define AITER_CPU_NARROW_STRIP_H

#include "row_attention.h"
#include "softmax.h"

constexpr int BLOCK_ROW_KEYS = BLOCK_KEYS / ROW_KEYS; /* steps of ROW_KEYS keys in a block */
static_assert(BLOCK_KEYS % ROW_KEYS == 0 && ROW_KEYS % KEY_MULTIPLE == 0, "blocks are made of whole steps");

/* Where the keys and values of a block lie. */
struct NarrowBlock {
    RowStep steps[BLOCK_ROW_KEYS];
    int32_t first;
    int count;

    NarrowBlock() {}
    NarrowBlock(const KeyRows &rows, int64_t first_key, int keys, int64_t seen)
        : first(static_cast<int32_t>(first_key)), count(keys) {
        for (int i = 0; i * ROW_KEYS < count; i++) {
            const int here = static_cast<int>(minimum(ROW_KEYS, count - i * ROW_KEYS));
            steps[i] = RowStep(rows, first_key + i * ROW_KEYS, here, seen);
            for (int past = here; past < ROW_KEYS; past++) steps[i].values[past] = NO_ROW;
        }
    }
};

class NarrowWorker {
  public:
    static constexpr int OUTPUT = MAX_ROWS * OUTPUT_DIM; /* of a strip: O [row][OUTPUT_DIM] */
    static constexpr int SCORES = BLOCK_KEYS * STRIP_ROWS * (1 + DROPOUT), WEIGHTS = BLOCK_STEPS * STRIP_ROWS;

    NarrowWorker(float *scores_buffer, Step *weights_buffer, const Score &how, const Dropout &random)
        : scores(scores_buffer), kept(reinterpret_cast<int32_t *>(scores_buffer + BLOCK_KEYS * STRIP_ROWS)),
          weights(weights_buffer), score(how), dropout(random) {}

    /* Lets so many rows see a block, and fetches the `next` one. */
    void attend(Strip &strip, int rows, const NarrowBlock &block, const NarrowBlock &next) {
        switch (rows) {
        case 1: return attend<1>(strip, rows, block, next);
        case 2: return attend<2>(strip, rows, block, next);
        case 3:
        case 4: return attend<4>(strip, rows, block, next);
        default: return attend<MAX_ROWS>(strip, rows, block, next);
        }
    }

  private:
    template <int ROWS> void attend(Strip &strip, int rows, const NarrowBlock &block, const NarrowBlock &next) {
        for (int key = 0; key < block.count; key += LANES) {
            const int step = key / ROW_KEYS, lane = key % ROW_KEYS;
            const NarrowBlock &fetch = key < next.count ? next : block;
            multiply<ROWS>(strip, rows, block.steps[step].keys + lane, fetch.steps[step].keys + lane, key);
        }
        const int padded = round_up(block.count, KEY_MULTIPLE);
        with_vectors(strip, [&](auto vectors) {
            constexpr int VECTORS = decltype(vectors)::value;
            mask_scores<VECTORS>(scores, strip, score, block.first, padded);
            if (DROPOUT) draw<VECTORS>(kept, strip, dropout, block.first, padded);
            OnlineSoftmax softmax{scores, kept, weights, &strip, padded, score.softmax_scale(), 0, {}, {}, {}};
            softmax.run<VECTORS>();
        });
        constexpr int AT_ONCE = ROWS < ROWS_AT_ONCE ? ROWS : ROWS_AT_ONCE;
        for (int first = 0; first < rows; first += AT_ONCE) add<AT_ONCE>(strip, first, padded, block, next);
        strip.empty = false;
    }

    /* Scores of LANES keys from `key` on, [key][row]. */
    template <int ROWS>
    void multiply(const Strip &strip, int rows, const Cached *const *keys, const Cached *const *next, int key) {
        constexpr int REST = DIM_STEPS % LANES, WHOLE = DIM_STEPS - REST;
        Vec sums[ROWS], part[ROWS];
        for (int r = 0; r < ROWS; r++) sums[r] = part[r] = Vec{};
        for (int s = 0; s < WHOLE; s += LANES) {
            if (s > 0 && s % SCORE_PART == 0) close(sums, part, s == SCORE_PART);
            multiply_square<ROWS, LANES>(part, strip.queries + s * STRIP_ROWS, keys, next, s);
        }
        if constexpr (REST > 0) {
            if (WHOLE > 0 && WHOLE % SCORE_PART == 0) close(sums, part, WHOLE == SCORE_PART);
            multiply_square<ROWS, REST>(part, strip.queries + WHOLE * STRIP_ROWS, keys, next, WHOLE);
        }
        close(sums, part, DIM_STEPS <= SCORE_PART);
        for (int v = 0; v < strip.vectors; v++) {
            Vec square[LANES];
            for (int i = 0; i < LANES; i++) square[i] = sums[minimum(v * LANES + i, rows - 1)]; /* like the last one */
            transpose(square);
            for (int i = 0; i < LANES; i++) store(scores + Lanes::at(key + i, v), square[i]);
        }
    }

    /* Products along SIDE steps from `first` on; what will be multiplied next is fetched. */
    template <int ROWS, int SIDE>
    static AITER_INLINE_MEMBER void multiply_square(Vec (&total)[ROWS], const Step *queries, const Cached *const *keys,
                                                    const Cached *const *next, int first) {
        Vec square[LANES];
        AITER_UNROLL
        for (int i = 0; i < LANES; i++) {
            square[i] = (Vec)row_steps<SIDE * STEP_ELEMENTS>(keys[i] + first * STEP_ELEMENTS, 0);
            __builtin_prefetch(next[i] + first * STEP_ELEMENTS, 0, 2);
        }
        transpose(square);
        AITER_UNROLL
        for (int i = 0; i < SIDE; i++) {
            AITER_UNROLL
            for (int r = 0; r < ROWS; r++)
                total[r] = multiply_add(total[r], broadcast(queries[i * STRIP_ROWS + r]), (StepVec)square[i]);
        }
    }

    template <int ROWS> static AITER_INLINE_MEMBER void close(Vec (&sums)[ROWS], Vec (&part)[ROWS], bool first) {
        for (int r = 0; r < ROWS; r++) {
            sums[r] = first ? part[r] : sums[r] + part[r];
            part[r] = Vec{};
        }
    }

    /* The weighted values of ROWS rows: those of a block by themselves, then to what was there. */
    template <int ROWS>
    void add(const Strip &strip, int first, int padded, const NarrowBlock &block, const NarrowBlock &next) {
        RowState states[ROWS];
        for (RowState &state : states) state.clear();
        for (int i = 0; i * ROW_KEYS < padded; i++) {
            alignas(64) RowWeights mine[ROWS];
            for (int j = 0; j < ROW_KEYS / PAIR; j++)
                for (int r = 0; r < ROWS; r++) {
                    const int at = i * ROW_KEYS / PAIR + j, row = first + r;
                    mine[r][j] = at * PAIR < padded ? weights[Lanes::at(at, row / LANES) + row % LANES] : Weight{};
                }
            add_values<ROWS>(block.steps[i], first == 0 && i * ROW_KEYS < next.count ? next.steps[i] : block.steps[i],
                             mine, states);
        }
        for (int r = 0; r < ROWS; r++) {
            float *output = strip.output + (first + r) * OUTPUT_DIM;
            for (int d = 0; d < OUTPUT_DIM; d += LANES) {
                const Vec sum = load(states[r].output + d);
                store(output + d, strip.empty ? sum : load(output + d) + sum);
            }
        }
    }

    float *scores;
    int32_t *kept;
    Step *weights;
    Score score;
    Dropout dropout;
};

#endif
