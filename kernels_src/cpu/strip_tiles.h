/* Strips on matrix tiles: the vector units take the softmax of some scores while the tiles multiply.
 *
 * A block of keys is cut into chunks. While the softmax of chunk c of a strip is taken, the tiles accumulate a part of
 * the block before (of another strip, mostly), whose weights are there, and then multiply the scores of chunk c + 1:
 *
 *   tiles     scores B0 | part of A | scores B1 | part of A | scores B2 | ... | scores C0 | part of B | scores C1 | ...
 *   vectors             | softmax B0            | softmax B1            | ...             | softmax C0
 *
 * Caps, slopes and masks are a part of the softmax. Both streams are interleaved a few dozen instructions at a time, which
 * is what the CPU can reorder; that is why a strip's work ends two calls later than it begins.
 */
#ifndef AITER_CPU_STRIP_TILES_H
#define AITER_CPU_STRIP_TILES_H

#include "matrix.h"
#include "next_rows.h"
#include "softmax.h"

class StripWorker {
    static constexpr int CHUNK = 2 * TILE_SIDE; /* keys whose softmax is taken together */

    /* A strip and a block of keys: the values of keys [first, end) have weights, and are still to be accumulated. */
    struct Block {
        Strip *strip;
        const Step *values;
        Step *weights;
        int first, end;
        int dimensions; /* that they have been accumulated in */
    };

  public:
    static constexpr int SCORES = (2 + DROPOUT) * CHUNK * STRIP_ROWS,
                         WEIGHTS = 2 * BLOCK_STEPS * STRIP_ROWS; /* sizes of its buffers */
    static constexpr int PACKED_BLOCKS = 2; /* as it may still be busy with the last strip of the block before */

    StripWorker(float *scores_buffer, Step *weights_buffer, const Score &how, const Dropout &random)
        : scores(scores_buffer), next_scores(scores_buffer + CHUNK * STRIP_ROWS),
          kept(reinterpret_cast<int32_t *>(scores_buffer + 2 * CHUNK * STRIP_ROWS)),
          soft{nullptr, nullptr, weights_buffer, 0, 0, 0},
          pending{nullptr, nullptr, weights_buffer + BLOCK_STEPS * STRIP_ROWS, 0, 0, 0}, score_of(how),
          dropout(random) {
        softmax.kept = kept;
        softmax.scale_log2 = how.softmax_scale();
        softmax.count = softmax.done = 0;
    }

    /* These `count` keys from the first one on will be packed when `strips` strips have seen the block before them. */
    void expect(const KeyRows &rows, int64_t first, int count, int64_t strips) {
        next.expect(rows, first, count, strips * (BLOCK_KEYS / CHUNK) * 2 * (DIM_STEPS / TILE_SIDE));
    }

    /* Lets the strip see the packed block of `count` keys that begins at `first_key`. The values must stay until the
     * next call that sees any has returned. */
    void attend(Strip &strip, const Step *keys, const Step *values, int32_t first_key, int count) {
        const int skipped = strip.first_seen(first_key, count, CHUNK);
        const int seen = static_cast<int>(minimum(count, strip.seen.some.high - first_key));
        if (seen <= skipped) return;
        const int part = ceil_div(VALUE_WIDTH / CHUNK, ceil_div(seen - skipped, CHUNK)) * CHUNK;
        for (int first = skipped; first < seen; first += CHUNK) {
            multiply_scores(strip, keys + KeySteps::at(first, 0));
            finish_softmax();
            if (first == skipped) open(strip, values, first);
            begin_softmax(first_key + first, first);
            if (pending.strip) accumulate(pending, part);
        }
    }

    /* Completes what the last calls have begun. */
    void finish() {
        finish_softmax();
        accumulate_all(pending);
        accumulate_all(soft);
        soft.strip = pending.strip = nullptr;
    }

  private:
    /* What the vector units do meanwhile, in pieces. */
    auto piece(int pieces) {
        const int keys = round_up(ceil_div(softmax.count - softmax.done, pieces), 2);
        return [this, keys] {
            next.fetch();
            if (softmax.done < softmax.count)
                with_vectors(*soft.strip, [&](auto vectors) { advance<decltype(vectors)::value>(keys); });
        };
    }

    /* How often a product of a chunk of keys, or of as many dimensions, calls `meanwhile`. */
    static int groups(const Strip &strip, int steps) { return steps / TILE_SIDE * (strip.vectors + 1) / 2; }

    void multiply_scores(const Strip &strip, const Step *keys) {
        const auto meanwhile = piece(groups(strip, DIM_STEPS));
        with_vectors(strip, [&](auto vectors) {
            multiply<decltype(vectors)::value, Lanes, KeySteps, Lanes>(next_scores, keys, strip.queries, CHUNK,
                                                                       DIM_STEPS, false, meanwhile);
        });
    }

    /* The block whose weights are there is the one to accumulate now; keys from `first` on are next. */
    void open(Strip &strip, const Step *values, int first) {
        accumulate_all(pending);
        Step *free = pending.weights;
        pending = soft;
        soft = {&strip, values, free, first, first, 0};
    }

    void begin_softmax(int32_t first_key, int first) {
        float *mine = next_scores;
        next_scores = scores;
        scores = mine;
        softmax.scores = mine;
        softmax.weights = soft.weights + Lanes::at(first / STEP_ELEMENTS, 0);
        softmax.strip = soft.strip;
        softmax.count = CHUNK;
        with_vectors(*soft.strip, [&](auto vectors) { begin<decltype(vectors)::value>(first_key); });
    }

    template <int VECTORS> void begin(int32_t first_key) {
        softmax_key = first_key;
        prepared = PLAIN_SCORES && !soft.strip->seen.cuts(first_key, CHUNK) ? CHUNK : 0;
        if (DROPOUT) draw<VECTORS>(kept, *soft.strip, dropout, first_key, CHUNK);
        if (softmax.begin<VECTORS>()) raise<VECTORS>();
    }

    void finish_softmax() {
        if (softmax.count == 0) return;
        with_vectors(*soft.strip, [&](auto vectors) { finish<decltype(vectors)::value>(); });
        soft.end += CHUNK;
        softmax.count = softmax.done = 0;
    }

    /* Products with the keys before `end` become what the softmax takes, if they are not that yet. */
    template <int VECTORS> void prepare(int end) {
        if (prepared >= end) return;
        mask_scores<VECTORS>(scores, *soft.strip, score_of, softmax_key, prepared, end);
        prepared = end;
    }
    template <int VECTORS> void advance(int keys) {
        prepare<VECTORS>(static_cast<int>(minimum(softmax.done + keys, softmax.count)));
        softmax.advance<VECTORS>(keys);
    }

    template <int VECTORS> void finish() {
        prepare<VECTORS>(softmax.count);
        if (softmax.finish<VECTORS>()) return;
        raise<VECTORS>();
        softmax.finish<VECTORS>();
    }

    template <int VECTORS> AITER_OUTLINE void raise() {
        if (pending.strip == soft.strip) accumulate_all(pending);
        if (soft.first < soft.end) {
            Block so_far = soft;
            accumulate_all(so_far);
            soft.first = soft.end;
        }
        prepare<VECTORS>(softmax.count);
        softmax.raise<VECTORS>();
    }

    /* The next `dimensions` of the values of a block. */
    void accumulate(Block &block, int dimensions) {
        const int count = static_cast<int>(minimum(dimensions, VALUE_WIDTH - block.dimensions)),
                  steps = (block.end - block.first) / STEP_ELEMENTS;
        const auto meanwhile = piece(groups(*block.strip, count / CHUNK * steps + DIM_STEPS));
        with_vectors(*block.strip,
                     [&](auto vectors) { accumulate<decltype(vectors)::value>(block, count, steps, meanwhile); });
        block.dimensions += count;
        if (block.dimensions < VALUE_WIDTH) return;
        block.strip->empty = false;
        block.strip = nullptr;
    }

    template <int VECTORS, class Meanwhile>
    void accumulate(const Block &block, int count, int steps, const Meanwhile &meanwhile) {
        multiply<VECTORS, Lanes, ValueColumns, Lanes>(
            block.strip->output + Lanes::at(block.dimensions, 0),
            block.values + ValueColumns::at(block.dimensions, block.first / CHUNK),
            block.weights + Lanes::at(block.first / STEP_ELEMENTS, 0), count, steps, !block.strip->empty, meanwhile);
    }

    AITER_OUTLINE void accumulate_all(Block &block) {
        if (block.strip && block.first < block.end) accumulate(block, VALUE_WIDTH);
    }

    float *scores, *next_scores;
    int32_t *kept; /* of the softmax that is being taken */
    OnlineSoftmax softmax;
    int32_t softmax_key; /* the first of its keys */
    int prepared;        /* how many of them have scores, and not products */
    Block soft, pending; /* whose softmax is being taken; whose values are being accumulated */
    Score score_of;
    Dropout dropout;
    NextRows next;
};

#endif
