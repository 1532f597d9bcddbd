/* A strip of few rows with the bits of any other strip: for results that may not depend on how many rows there are.
 *
 * row_attention.h is faster, but sums in another order. Here each sum is the one that strip_vector.h makes, term by
 * term, and each step of the softmax that of softmax.h. Only what lies along the lanes differs, so that rows that are not
 * there cost nothing, and keys and values are read where they lie:
 *
 *     S [row][key]  = Q K^T        keys along the lanes: squares of K are turned round in registers
 *     P [row][key]  = 2^(S - max)  likewise; only sums go from key to key
 *     O [row][d]   += P V          head_dim along the lanes, as in row_attention.h
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

/* The next steps of LANES keys: rows of them, and when those are turned round, vectors of steps. 16-bit elements that are
 * multiplied as floats are turned round as they are, which takes half of the instructions. */
struct KeySquare {
#if AITER_DTYPE_BF16 && !AITER_DOT_PRODUCTS
    static constexpr int STEPS = 2 * LANES;
    static constexpr bool DEALT = !AITER_FP8_CACHE; /* see deal(); with floats it gains nothing */
    IntVec rows[LANES];

    template <int N, class Row> static AITER_INLINE_MEMBER IntVec row(const Row *key) { return element_pairs(key, N); }
    AITER_INLINE_MEMBER Vec step(int s) const { return half_of(rows[s / 2], s % 2); }
#elif AITER_DTYPE_FP16 && (AITER_AVX512 || AITER_AVX2) && !AITER_FP8_CACHE
    typedef uint16_t Elements __attribute__((vector_size(sizeof(Vec))));
    static constexpr int STEPS = 2 * LANES;
    static constexpr bool DEALT = false;
    Elements rows[LANES];

    template <int N> static AITER_INLINE_MEMBER Elements row(const Element *key) {
        return (Elements)element_pairs(key, N);
    }
    AITER_INLINE_MEMBER Vec step(int s) const {
        HalfVec halves[2];
        memcpy(halves, &rows[s / 16 * 8 + s % 8], sizeof halves);
        return to_floats(halves[s / 8 % 2]);
    }
#else
    static constexpr int STEPS = LANES;
    static constexpr bool DEALT = false;
    Vec rows[LANES];

    template <int N, class Row> static AITER_INLINE_MEMBER Vec row(const Row *key) { return (Vec)row_steps<N>(key, 0); }
    AITER_INLINE_MEMBER StepVec step(int s) const { return (StepVec)rows[s]; }
#endif
};

class NarrowWorker {
  public:
    static constexpr int OUTPUT = MAX_ROWS * OUTPUT_DIM; /* of a strip: O [row][OUTPUT_DIM] */
    static constexpr int SCORES = MAX_ROWS * BLOCK_KEYS, WEIGHTS = MAX_ROWS * BLOCK_STEPS;

    NarrowWorker(float *scores_buffer, Step *weights_buffer, const Score &how, const Dropout &random)
        : scores(scores_buffer), weights(reinterpret_cast<RowWeights *>(weights_buffer)), score(how), dropout(random) {}

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
        /* Vectors of keys that are multiplied side by side: a sum has to wait for what was added to it before. */
        constexpr int GROUPS = LANES < ROW_KEYS && 2 * ROWS <= SUMS_AT_ONCE ? 2 : 1;
        for (int key = 0; key < block.count; key += GROUPS * LANES) {
            const int step = key / ROW_KEYS, lane = key % ROW_KEYS;
            const NarrowBlock &fetch = key < next.count ? next : block;
            multiply<ROWS, GROUPS>(strip, block.steps[step].keys + lane, fetch.steps[step].keys + lane, key);
        }
        alignas(64) float pairs[ROWS][BLOCK_KEYS]; /* sums of the weights of two keys, each twice */
        for (int r = 0; r < ROWS; r++)
            if (r < rows) weigh(strip, r, block, pairs[r]);
            else memset(pairs[r], 0, sizeof pairs[r]);
        float total[ROWS] = {}; /* of all rows at once, as each addition waits for the one before */
        for (int i = 0; i < round_up(block.count, ROW_KEYS); i += 2) {
            AITER_UNROLL
            for (int r = 0; r < ROWS; r++) total[r] += pairs[r][i];
        }
        for (int r = 0; r < rows; r++) strip.sum[r] += total[r];
        constexpr int AT_ONCE = ROWS < ROWS_AT_ONCE ? ROWS : ROWS_AT_ONCE;
        for (int first = 0; first < rows; first += AT_ONCE) add<AT_ONCE>(strip, first, block, next);
        strip.empty = false;
    }

    /* Scores of GROUPS times LANES keys from `key` on, [row][key]. */
    template <int ROWS, int GROUPS>
    void multiply(const Strip &strip, const Cached *const *keys, const Cached *const *next, int key) {
        constexpr int SIDE = KeySquare::STEPS, REST = DIM_STEPS % SIDE, WHOLE = DIM_STEPS - REST;
        Vec sums[ROWS * GROUPS], part[ROWS * GROUPS]; /* [row][group] */
        for (int i = 0; i < ROWS * GROUPS; i++) sums[i] = part[i] = Vec{};
        for (int s = 0; s < WHOLE; s += SIDE) {
            if (s > 0 && s % SCORE_PART == 0) close(sums, part, s == SCORE_PART);
            multiply_squares<ROWS, GROUPS, SIDE>(part, strip.queries + s * STRIP_ROWS, keys, next, s);
        }
        if constexpr (REST > 0) {
            if (WHOLE > 0 && WHOLE % SCORE_PART == 0) close(sums, part, WHOLE == SCORE_PART);
            multiply_squares<ROWS, GROUPS, REST>(part, strip.queries + WHOLE * STRIP_ROWS, keys, next, WHOLE);
        }
        close(sums, part, DIM_STEPS <= SCORE_PART);
        for (int i = 0; i < ROWS * GROUPS; i++)
            store(scores + i / GROUPS * BLOCK_KEYS + key + i % GROUPS * LANES, sums[i]);
    }

    /* Products along SIDE steps from `first` on; what will be multiplied next is fetched. */
    template <int ROWS, int GROUPS, int SIDE>
    static AITER_INLINE_MEMBER void multiply_squares(Vec (&total)[ROWS * GROUPS], const Step *queries,
                                                     const Cached *const *keys, const Cached *const *next, int first) {
        /* Row by row, a share of the next rows with each square. */
        constexpr int KEYS = GROUPS * LANES, SHARE = (KEYS * KeySquare::STEPS + DIM_STEPS - 1) / DIM_STEPS;
        const int from = first / KeySquare::STEPS * SHARE;
        for (int i = 0; i < SHARE && from + i < KEYS; i++) prefetch_row<HEAD_DIM>(next[from + i]);
        KeySquare squares[GROUPS];
        for (int g = 0; g < GROUPS; g++) {
            KeySquare &square = squares[g];
            /* Many rows read many queries, and loads are what they have too few of. */
            constexpr bool DEALT = KeySquare::DEALT && SIDE == KeySquare::STEPS && ROWS < MAX_ROWS;
            AITER_UNROLL
            for (int i = 0; i < LANES; i++)
                if constexpr (DEALT) {
                    constexpr int PIECE = 16 / static_cast<int>(sizeof(Cached));
                    const IntVec cells = deal(keys + g * LANES + i % 4, first * STEP_ELEMENTS + i / 4 * PIECE);
                    memcpy(&square.rows[i], &cells, sizeof cells);
                } else {
                    square.rows[i] = KeySquare::row<SIDE * STEP_ELEMENTS>(keys[g * LANES + i] + first * STEP_ELEMENTS);
                }
            transpose<DEALT>(square.rows);
        }
        AITER_UNROLL
        for (int i = 0; i < SIDE; i++) {
            AITER_UNROLL
            for (int g = 0; g < GROUPS; g++) {
                const StepVec step = squares[g].step(i);
                AITER_UNROLL
                for (int r = 0; r < ROWS; r++) {
                    Vec &sum = total[r * GROUPS + g];
                    sum = multiply_add(sum, broadcast(queries[i * STRIP_ROWS + r]), step);
                }
            }
        }
    }

    template <int COUNT> static AITER_INLINE_MEMBER void close(Vec (&sums)[COUNT], Vec (&part)[COUNT], bool first) {
        for (int i = 0; i < COUNT; i++) {
            sums[i] = first ? part[i] : sums[i] + part[i];
            part[i] = Vec{};
        }
    }

    /* From a row's scores to its weights and what OnlineSoftmax adds up of these: what it does in one lane. */
    void weigh(Strip &strip, int r, const NarrowBlock &block, float *pairs) {
        float *s = scores + r * BLOCK_KEYS;
        const int count = round_up(block.count, ROW_KEYS);
        if (!PLAIN_SCORES || strip.seen.cuts(block.first, count))
            for (int i = 0; i < count; i += LANES) {
                const IntVec key = block.first + i + lane_index();
                Vec all = load(s + i);
                if (!PLAIN_SCORES) all = score(all, (ALIBI ? strip.place[r] : 0) - key, ALIBI ? strip.slope[r] : 0.0f);
                store(s + i, in_range(key, WINDOW ? strip.low[r] : 0, strip.high[r]) ? all : broadcast(-INFINITE));
            }
        if (strip.maximum[r] == -INFINITE) raise(strip, r, count);
        if (weigh(strip, r, block.first, count, pairs)) return;
        raise(strip, r, count);
        weigh(strip, r, block.first, count, pairs);
    }

    /* Returns whether no score exceeds the maximum by too much. */
    bool weigh(const Strip &strip, int r, int32_t first_key, int count, float *pairs) {
        const float *s = scores + r * BLOCK_KEYS, scale = score.softmax_scale();
        const float base = strip.maximum[r] == -INFINITE ? 0.0f : strip.maximum[r];
        Vec largest = broadcast(-INFINITE);
        for (int i = 0; i < count; i += LANES) {
            const Vec power = load(s + i) * scale - base, weight = exp2<EXP2_DEGREE>(power);
            largest = maximum(largest, power);
            store(pairs + i, fold<1>(weight, weight, std::make_integer_sequence<int, LANES>()));
            const IntVec kept =
                DROPOUT ? dropout.kept(broadcast(strip.head[r]), broadcast(strip.row[r]), first_key + i + lane_index())
                        : IntVec{};
            store_weights(weights[i / ROW_KEYS * MAX_ROWS + r] + i % ROW_KEYS / PAIR,
                          DROPOUT ? kept ? weight : Vec{} : weight);
        }
        return !any(largest > RESCALE_THRESHOLD);
    }

    AITER_OUTLINE void raise(Strip &strip, int r, int count) {
        float largest = -INFINITE;
        for (int i = 0; i < count; i++) {
            const float s = scores[r * BLOCK_KEYS + i];
            largest = largest > s ? largest : s;
        }
        const float old = strip.maximum[r], moved = largest * score.softmax_scale();
        if (old == -INFINITE && !(moved > -INFINITE)) return;
        const float factor = exp2<EXP2_DEGREE>(broadcast(old - moved))[0];
        strip.maximum[r] = moved;
        strip.sum[r] *= factor;
        if (strip.empty) return;
        float *output = strip.output + r * OUTPUT_DIM;
        for (int d = 0; d < OUTPUT_DIM; d += LANES) store(output + d, load(output + d) * factor);
    }

    /* The weighted values of ROWS rows: those of a block by themselves, then to what was there. */
    template <int ROWS> void add(const Strip &strip, int first, const NarrowBlock &block, const NarrowBlock &next) {
        RowState states[ROWS];
        for (RowState &state : states) state.clear();
        for (int i = 0; i * ROW_KEYS < block.count; i++)
            add_values<ROWS>(block.steps[i], first == 0 && i * ROW_KEYS < next.count ? next.steps[i] : block.steps[i],
                             weights + i * MAX_ROWS + first, states);
        for (int r = 0; r < ROWS; r++) {
            float *output = strip.output + (first + r) * OUTPUT_DIM;
            for (int d = 0; d < OUTPUT_DIM; d += LANES) {
                const Vec sum = load(states[r].output + d);
                store(output + d, strip.empty ? sum : load(output + d) + sum);
            }
        }
    }

    float *scores;       /* [row][BLOCK_KEYS] */
    RowWeights *weights; /* [step of ROW_KEYS][MAX_ROWS] */
    Score score;
    Dropout dropout;
};

#endif
