/* Strips on matrix tiles: the tiles multiply one strip's scores while the vector units soften those of the strip before.
 *
 *   tiles     scores 1 | accumulate 0 | scores 2 | accumulate 1 | ...
 *   vectors   soften 0 |              | soften 1 |              | ...
 *
 * Both streams are interleaved a few dozen instructions at a time, which is what the CPU can reorder; that is why a
 * strip's work ends one call later than it begins.
 */
#ifndef AITER_CPU_STRIP_TILES_H
#define AITER_CPU_STRIP_TILES_H

class StripWorker {
  public:
    StripWorker(float *scores_buffer, Step *weights_buffer, float scale)
        : scores(scores_buffer), next_scores(scores_buffer + BLOCK_KEYS * STRIP_ROWS), weights(weights_buffer),
          scale_log2(scale) {
        softening.strip = nullptr;
    }

    /* Lets the strip see the packed block of `count` keys that begins at `first_key`. The values must stay until the
     * next call has returned. */
    void attend(Strip &strip, const Step *keys, const Step *values, int32_t first_key, int count) {
        const int seen = static_cast<int>(minimum(count, strip.most_visible - first_key));
        if (seen <= 0) return;
        const int padded = round_up(seen, KEY_MULTIPLE);
        const int calls = padded / (2 * TILE_SIDE) * (DIM_STEPS / TILE_SIDE);
        const int share = softening.strip ? round_up(ceil_div(softening.count, calls), 2) : 0;
        auto meanwhile = [&] {
            if (share > 0) vectors == 1 ? softening.advance<1>(share) : softening.advance<2>(share);
        };
        if (strip.vectors == 1)
            score<1>(strip, keys, padded, meanwhile);
        else
            score<2>(strip, keys, padded, meanwhile);
        finish();
        softening = {next_scores, weights, &strip, padded, 0, scale_log2, {}, {}};
        next_scores = scores;
        scores = const_cast<float *>(softening.scores);
        vectors = strip.vectors;
        pending_values = values;
        const bool hides = strip.fewest_visible < first_key + padded;
        vectors == 1 ? begin<1>(hides, first_key) : begin<2>(hides, first_key);
    }

    /* Completes the strip of the last call. */
    void finish() {
        if (softening.strip) vectors == 1 ? finish<1>() : finish<2>();
    }

  private:
    template <int VECTORS, class Meanwhile>
    void score(const Strip &strip, const Step *keys, int count, const Meanwhile &meanwhile) {
        multiply<VECTORS, STRIP_ROWS, DIM_STEPS, 1, STRIP_ROWS>(next_scores, keys, strip.queries, count, DIM_STEPS, false, meanwhile);
    }

    template <int VECTORS>
    void begin(bool hides, int32_t first_key) {
        if (hides) hide_keys<VECTORS>(scores, *softening.strip, first_key, softening.count);
        softening.begin<VECTORS>();
    }

    template <int VECTORS>
    void finish() {
        softening.finish<VECTORS>();
        Strip &strip = *softening.strip;
        multiply<VECTORS, STRIP_ROWS, VALUE_ROW, VALUE_STEP, STRIP_ROWS>(strip.output, pending_values, weights, DIM,
                                                                         softening.count / STEP_ELEMENTS, !strip.empty);
        strip.empty = false;
        softening.strip = nullptr;
    }

    float *scores, *next_scores;
    Step *weights;
    float scale_log2;
    Softening softening;
    const Step *pending_values;
    int vectors;
};

#endif
