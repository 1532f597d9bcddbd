/* Attention of a strip: STRIP_ROWS query rows side by side along the vector lanes, over one block of keys at a time.
 *
 *            rows ->                                          lane by lane, no reduction across lanes:
 *   keys   S^T = K Q^T     P^T = 2^(scale S^T - maximum)      maximum, sum
 *    |     ---------------------------------------------
 *    v     O^T += V^T P^T                                     times 2^(old - new maximum) when the maximum moves
 *
 * The maximum that the weights are relative to follows the true one only when that has grown by RESCALE_THRESHOLD:
 * O^T is then rescaled a few times per sequence instead of once per block, and weights stay below 2^RESCALE_THRESHOLD.
 */
#ifndef AITER_CPU_STRIP_H
#define AITER_CPU_STRIP_H

#include "packed.h"

#if AITER_TILES
#include "matrix_amx.h"
#else
#include "matrix_vector.h"
#endif

constexpr float RESCALE_THRESHOLD = 8.0f;

struct Strip {
    Step *queries; /* Q^T [DIM_STEPS][STRIP_ROWS] */
    float *output; /* O^T [DIM][STRIP_ROWS], relative to `maximum`, not yet divided by `sum` */
    float *maximum, *sum;
    int32_t *visible; /* row sees the keys below this */
    int32_t fewest_visible, most_visible; /* over the rows of the strip */
    int vectors;      /* how many of STRIP_VECTORS hold rows */
    bool empty;       /* nothing accumulated yet, `output` is not initialised */
};

template <int VECTORS>
static void hide_keys(float *s, const Strip &strip, int32_t first_key, int count) {
    for (int v = 0; v < VECTORS; v++) {
        const IntVec visible = load(strip.visible + v * LANES) - first_key;
        for (int j = 0; j < count; j++) {
            float *p = s + j * STRIP_ROWS + v * LANES;
            store(p, visible > j ? load(p) : broadcast(-INFINITE));
        }
    }
}

/* From scores to weights, in pieces, so that it can be worked off while matrix tiles multiply. */
struct Softening {
    const float *scores;
    Step *weights; /* may overlay the scores */
    Strip *strip;
    int count, done; /* keys */
    float scale_log2;
    Vec base[STRIP_VECTORS], added[STRIP_VECTORS];

    /* Brings maximum and sum up to date, and rescales what was accumulated where the maximum moves. */
    template <int VECTORS>
    void begin() {
        Vec largest[VECTORS];
        for (int v = 0; v < VECTORS; v++) largest[v] = broadcast(-INFINITE);
        for (int j = 0; j < count; j++)
            AITER_UNROLL
            for (int v = 0; v < VECTORS; v++) largest[v] = maximum(largest[v], load(scores + j * STRIP_ROWS + v * LANES));
        for (int v = 0; v < VECTORS; v++) {
            const Vec old = load(strip->maximum + v * LANES), candidate = largest[v] * scale_log2;
            const IntVec moves = candidate > old + RESCALE_THRESHOLD;
            base[v] = old == -INFINITE ? Vec{} : old; /* -inf - -inf would be NaN */
            added[v] = Vec{}; /* a sum of its own for the block: rounding errors grow with the length of a sum */
            if (any(moves)) {
                base[v] = moves ? candidate : base[v];
                store(strip->maximum + v * LANES, moves ? candidate : old);
                rescale(v, moves ? exp2<EXP2_DEGREE>(old - base[v]) : broadcast(1.0f));
            }
        }
        done = 0;
    }

    void rescale(int v, Vec factor) {
        store(strip->sum + v * LANES, load(strip->sum + v * LANES) * factor);
        if (strip->empty) return;
        for (int d = 0; d < HEAD_DIM; d++) {
            float *p = strip->output + d * STRIP_ROWS + v * LANES;
            store(p, load(p) * factor);
        }
    }

    /* The next `keys` keys, an even number. */
    template <int VECTORS>
    void advance(int keys) {
        const int end = static_cast<int>(minimum(done + keys, count));
        Vec total[VECTORS];
        AITER_UNROLL
        for (int v = 0; v < VECTORS; v++) total[v] = added[v];
        for (int j = done; j < end; j += 2)
            AITER_UNROLL
            for (int v = 0; v < VECTORS; v++) {
                const float *p = scores + j * STRIP_ROWS + v * LANES;
                const Vec low = exp2<EXP2_DEGREE>(load(p) * scale_log2 - base[v]);
                const Vec high = exp2<EXP2_DEGREE>(load(p + STRIP_ROWS) * scale_log2 - base[v]);
                total[v] += low + high;
                store_weights(weights + v * LANES, j, low, high);
            }
        AITER_UNROLL
        for (int v = 0; v < VECTORS; v++) added[v] = total[v];
        done = end;
    }

    template <int VECTORS>
    void finish() {
        advance<VECTORS>(count - done);
        for (int v = 0; v < VECTORS; v++) store(strip->sum + v * LANES, load(strip->sum + v * LANES) + added[v]);
    }
};

#if AITER_TILES
#include "strip_tiles.h"
#else
/* Works on one strip and one block of keys after the other. */
class StripWorker {
  public:
    StripWorker(float *scores_buffer, Step *weights_buffer, float scale)
        : scores(scores_buffer), weights(weights_buffer), scale_log2(scale) {}

    /* Lets the strip see the packed block of `count` keys that begins at `first_key`. */
    void attend(Strip &strip, const Step *keys, const Step *values, int32_t first_key, int count) {
        const int seen = static_cast<int>(minimum(count, strip.most_visible - first_key));
        if (seen <= 0) return;
        const int padded = round_up(seen, KEY_MULTIPLE);
        switch (strip.vectors) {
        case 1: return attend<1>(strip, keys, values, first_key, padded);
        case 2: return attend<2>(strip, keys, values, first_key, padded);
        default: return attend<STRIP_VECTORS>(strip, keys, values, first_key, padded);
        }
    }

    void finish() {}

  private:
    template <int VECTORS>
    void attend(Strip &strip, const Step *keys, const Step *values, int32_t first_key, int count) {
        multiply<VECTORS, STRIP_ROWS, DIM_STEPS, 1, STRIP_ROWS>(scores, keys, strip.queries, count, DIM_STEPS, false);
        if (strip.fewest_visible < first_key + count) hide_keys<VECTORS>(scores, strip, first_key, count);
        Softening softening{scores, weights, &strip, count, 0, scale_log2, {}, {}};
        softening.begin<VECTORS>();
        softening.finish<VECTORS>();
        multiply<VECTORS, STRIP_ROWS, VALUE_ROW, VALUE_STEP, STRIP_ROWS>(strip.output, values, weights, DIM,
                                                                         count / STEP_ELEMENTS, !strip.empty);
        strip.empty = false;
    }

    float *scores;
    Step *weights;
    float scale_log2;
};
#endif

#endif
