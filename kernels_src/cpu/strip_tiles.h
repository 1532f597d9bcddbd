/* Strips on matrix tiles: the vector units soften some scores while the tiles multiply.
 *
 * A block of keys is cut into chunks. While chunk c of a strip is softened, the tiles accumulate a part of the block
 * that was softened before (of another strip, mostly), and then multiply the scores of chunk c + 1:
 *
 *   tiles     scores B0 | part of A | scores B1 | part of A | scores B2 | ... | scores C0 | part of B | scores C1 | ...
 *   vectors             | soften B0             | soften B1             | ...             | soften C0
 *
 * Both streams are interleaved a few dozen instructions at a time, which is what the CPU can reorder; that is why a
 * strip's work ends two calls later than it begins.
 */
#ifndef AITER_CPU_STRIP_TILES_H
#define AITER_CPU_STRIP_TILES_H

class StripWorker {
    static constexpr int CHUNK = 2 * TILE_SIDE; /* keys that are softened together */

    /* A strip and a block of keys: the values of keys [first, end) have weights, and are still to be accumulated. */
    struct Block {
        Strip *strip;
        const Step *values;
        Step *weights;
        int first, end;
        int dimensions; /* that they have been accumulated in */
    };

  public:
    static constexpr int SCORES = 2 * CHUNK * STRIP_ROWS,
                         WEIGHTS = 2 * BLOCK_STEPS * STRIP_ROWS; /* sizes of its buffers */
    static constexpr int PACKED_BLOCKS = 2; /* as it may still be busy with the last strip of the block before */

    StripWorker(float *scores_buffer, Step *weights_buffer, float scale)
        : scores(scores_buffer), next_scores(scores_buffer + CHUNK * STRIP_ROWS),
          soft{nullptr, nullptr, weights_buffer, 0, 0, 0},
          pending{nullptr, nullptr, weights_buffer + BLOCK_STEPS * STRIP_ROWS, 0, 0, 0} {
        softening.scale_log2 = scale;
        softening.count = softening.done = 0;
    }

    /* These `count` keys from the first one on will be packed when `strips` strips have seen the block before them. */
    void expect(const KeyRows &rows, int64_t first, int count, int64_t strips) {
        next.expect(rows, first, count, strips * (BLOCK_KEYS / CHUNK) * 2 * (DIM_STEPS / TILE_SIDE));
    }

    /* Lets the strip see the packed block of `count` keys that begins at `first_key`. The values must stay until the
     * next call that sees any has returned. */
    void attend(Strip &strip, const Step *keys, const Step *values, int32_t first_key, int count) {
        const int seen = static_cast<int>(minimum(count, strip.most_visible - first_key));
        if (seen <= 0) return;
        const int chunks = ceil_div(seen, CHUNK);
        const int part = ceil_div(DIM / CHUNK, chunks) * CHUNK;
        for (int c = 0; c < chunks; c++) {
            score(strip, keys + KeySteps::at(c * CHUNK, 0));
            finish_softening();
            if (c == 0) open(strip, values);
            begin_softening(first_key + c * CHUNK, c * CHUNK);
            if (pending.strip) accumulate(pending, part);
        }
    }

    /* Completes what the last calls have begun. */
    void finish() {
        finish_softening();
        accumulate_all(pending);
        accumulate_all(soft);
        soft.strip = pending.strip = nullptr;
    }

  private:
    /* What the vector units do meanwhile, in pieces. */
    auto piece(int pieces) {
        const int keys = round_up(ceil_div(softening.count - softening.done, pieces), 2);
        return [this, keys] {
            next.fetch();
            if (softening.done < softening.count)
                with_vectors(*soft.strip, [&](auto vectors) { softening.advance<decltype(vectors)::value>(keys); });
        };
    }

    /* How often a product of a chunk of keys, or of as many dimensions, calls `meanwhile`. */
    static int groups(const Strip &strip, int steps) { return steps / TILE_SIDE * (strip.vectors + 1) / 2; }

    void score(const Strip &strip, const Step *keys) {
        const auto meanwhile = piece(groups(strip, DIM_STEPS));
        with_vectors(strip, [&](auto vectors) {
            multiply<decltype(vectors)::value, Lanes, KeySteps, Lanes>(next_scores, keys, strip.queries, CHUNK,
                                                                       DIM_STEPS, false, meanwhile);
        });
    }

    /* The block that has been softened is the one to accumulate now. */
    void open(Strip &strip, const Step *values) {
        accumulate_all(pending);
        Step *free = pending.weights;
        pending = soft;
        soft = {&strip, values, free, 0, 0, 0};
    }

    void begin_softening(int32_t first_key, int first) {
        float *mine = next_scores;
        next_scores = scores;
        scores = mine;
        softening.scores = mine;
        softening.weights = soft.weights + Lanes::at(first / STEP_ELEMENTS, 0);
        softening.strip = soft.strip;
        softening.count = CHUNK;
        with_vectors(*soft.strip, [&](auto vectors) { begin<decltype(vectors)::value>(first_key); });
    }

    template <int VECTORS> void begin(int32_t first_key) {
        if (soft.strip->fewest_visible < first_key + CHUNK) hide_keys<VECTORS>(scores, *soft.strip, first_key, CHUNK);
        if (softening.begin<VECTORS>()) raise<VECTORS>();
    }

    void finish_softening() {
        if (softening.count == 0) return;
        with_vectors(*soft.strip, [&](auto vectors) { finish<decltype(vectors)::value>(); });
        soft.end += CHUNK;
        softening.count = softening.done = 0;
    }

    template <int VECTORS> void finish() {
        if (softening.finish<VECTORS>()) return;
        raise<VECTORS>();
        softening.finish<VECTORS>();
    }

    template <int VECTORS> AITER_OUTLINE void raise() {
        if (pending.strip == soft.strip) accumulate_all(pending);
        if (soft.first < soft.end) {
            Block so_far = soft;
            accumulate_all(so_far);
            soft.first = soft.end;
        }
        softening.raise<VECTORS>();
    }

    /* The next `dimensions` of the values of a block. */
    void accumulate(Block &block, int dimensions) {
        const int count = static_cast<int>(minimum(dimensions, DIM - block.dimensions)),
                  steps = (block.end - block.first) / STEP_ELEMENTS;
        const auto meanwhile = piece(groups(*block.strip, count / CHUNK * steps + DIM_STEPS));
        with_vectors(*block.strip,
                     [&](auto vectors) { accumulate<decltype(vectors)::value>(block, count, steps, meanwhile); });
        block.dimensions += count;
        if (block.dimensions < DIM) return;
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
        if (block.strip && block.first < block.end) accumulate(block, DIM);
    }

    float *scores, *next_scores;
    Softening softening;
    Block soft, pending;
    NextRows next;
};

#endif
