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

#include "matrix.h"

constexpr float RESCALE_THRESHOLD = 8.0f;

struct Strip {
    Step *queries; /* Q^T [DIM_STEPS][STRIP_ROWS] */
    float *output; /* O^T [DIM][STRIP_ROWS], relative to `maximum`, not yet divided by `sum` */
    float *maximum, *sum;
    int32_t *visible;                     /* row sees the keys below this */
    int32_t fewest_visible, most_visible; /* over the rows of the strip */
    int vectors;                          /* that hold rows: 1, 2 or STRIP_VECTORS */
    bool empty;                           /* nothing accumulated yet, `output` is not initialised */
};

template <int N> struct Constant {
    static constexpr int value = N;
};

/* Calls body(Constant<vectors of the strip>()). */
template <class Body> AITER_INLINE void with_vectors(const Strip &strip, const Body &body) {
    switch (strip.vectors) {
    case 1: return body(Constant<1>());
    case 2: return body(Constant<2>());
    default: return body(Constant<STRIP_VECTORS>());
    }
}

template <int VECTORS> static void hide_keys(float *s, const Strip &strip, int32_t first_key, int count) {
    for (int v = 0; v < VECTORS; v++) {
        const IntVec visible = load(strip.visible + v * LANES) - first_key;
        for (int j = 0; j < count; j++) {
            float *p = s + Lanes::at(j, v);
            store(p, visible > j ? load(p) : broadcast(-INFINITE));
        }
    }
}

/* From the scores of some keys to weights, in one pass that hopes that the maximum need not move, and in pieces, so
 * that it can be worked off while matrix tiles multiply:
 *
 *     if (begin()) raise();                      a row has no maximum yet
 *     advance(), advance(), ...
 *     if (!finish()) raise(), finish();          a score exceeds its row's maximum by too much
 *
 * raise() rescales what has been accumulated: by then that must be all that is relative to the old maximum. */
struct Softening {
    const float *scores;
    Step *weights;
    Strip *strip;
    int count; /* keys */
    float scale_log2;
    int done;
    Vec base[STRIP_VECTORS], largest[STRIP_VECTORS], total[STRIP_VECTORS];

    template <int VECTORS> bool begin() {
        IntVec none = IntVec{};
        for (int v = 0; v < VECTORS; v++) {
            const Vec maximum = load(strip->maximum + v * LANES);
            none |= maximum == -INFINITE;
            base[v] = maximum == -INFINITE ? Vec{} : maximum; /* -inf - -inf would be NaN */
            largest[v] = broadcast(-INFINITE);
            total[v] = Vec{}; /* a sum of its own: rounding errors grow with the length of a sum */
        }
        done = 0;
        return any(none);
    }

    /* The next `keys` keys, an even number. */
    template <int VECTORS> void advance(int keys) {
        const int end = static_cast<int>(minimum(done + keys, count));
        const Softening from = *this; /* a copy, as storing weights could change what only this points to */
        Vec most[VECTORS], sum[VECTORS];
        AITER_UNROLL
        for (int v = 0; v < VECTORS; v++) most[v] = largest[v], sum[v] = total[v];
        for (int j = done; j < end; j += 2) {
            AITER_UNROLL
            for (int v = 0; v < VECTORS; v++) {
                const Vec low = load(from.scores + Lanes::at(j, v)) * from.scale_log2 - from.base[v];
                const Vec high = load(from.scores + Lanes::at(j, v) + Lanes::ROW) * from.scale_log2 - from.base[v];
                const Vec low_weight = exp2<EXP2_DEGREE>(low), high_weight = exp2<EXP2_DEGREE>(high);
                most[v] = maximum(maximum(most[v], low), high);
                sum[v] += low_weight + high_weight;
                store_weights(from.weights, j, v, low_weight, high_weight);
            }
        }
        AITER_UNROLL
        for (int v = 0; v < VECTORS; v++) largest[v] = most[v], total[v] = sum[v];
        done = end;
    }

    template <int VECTORS> bool finish() {
        advance<VECTORS>(count - done);
        IntVec exceeds = IntVec{};
        for (int v = 0; v < VECTORS; v++) exceeds |= largest[v] > RESCALE_THRESHOLD;
        if (any(exceeds)) return false;
        for (int v = 0; v < VECTORS; v++) store(strip->sum + v * LANES, load(strip->sum + v * LANES) + total[v]);
        return true;
    }

    template <int VECTORS> AITER_OUTLINE void raise() {
        for (int v = 0; v < VECTORS; v++) {
            Vec candidate = broadcast(-INFINITE);
            for (int j = 0; j < count; j++) candidate = maximum(candidate, load(scores + Lanes::at(j, v)));
            candidate *= scale_log2;
            const Vec old = load(strip->maximum + v * LANES);
            /* Each row decides for itself, so that its bits do not depend on which rows share the strip. */
            const IntVec first = (old == -INFINITE) & (candidate > -INFINITE),
                         moves = first | (largest[v] > RESCALE_THRESHOLD);
            if (!any(moves)) continue;
            const Vec moved = moves ? candidate : old;
            store(strip->maximum + v * LANES, moved);
            rescale(v, moves ? exp2<EXP2_DEGREE>(old - moved) : broadcast(1.0f));
        }
        begin<VECTORS>();
    }

    void rescale(int v, Vec factor) {
        store(strip->sum + v * LANES, load(strip->sum + v * LANES) * factor);
        if (strip->empty) return;
        for (int d = 0; d < HEAD_DIM; d++) {
            float *p = strip->output + Lanes::at(d, v);
            store(p, load(p) * factor);
        }
    }
};

/* The rows of keys and values that will be packed next. They are brought into L2 while others are worked on, a few at a
 * time, as the CPU can queue no more; by itself it does not see rows coming that lie far apart. */
class NextRows {
    const Element *rows[2 * BLOCK_KEYS];
    int expected = 0, fetched = 0, share = 0;

  public:
    /* `count` keys from the first one on, in so many calls of fetch(). */
    void expect(const KeyRows &source, int64_t first, int count, int64_t calls) {
        source.find(first, count, rows, rows + count);
        expected = 2 * count;
        fetched = 0;
        share = static_cast<int>(ceil_div(expected, calls));
    }

    void fetch() {
        for (int i = 0; i < share && fetched < expected; i++) prefetch_row(rows[fetched++]);
    }
};

#if AITER_TILES
#include "strip_tiles.h"
#else
/* Works on one strip and one block of keys after the other. */
class StripWorker {
  public:
    static constexpr int SCORES = BLOCK_KEYS * STRIP_ROWS,
                         WEIGHTS = BLOCK_STEPS * STRIP_ROWS; /* sizes of its buffers */
    static constexpr int PACKED_BLOCKS = 1;                  /* that it needs at a time */

    StripWorker(float *scores_buffer, Step *weights_buffer, float scale)
        : scores(scores_buffer), weights(weights_buffer), scale_log2(scale) {}

    /* These `count` keys from the first one on will be packed when `strips` strips have seen the block before them. */
    void expect(const KeyRows &rows, int64_t first, int count, int64_t strips) {
        next.expect(rows, first, count, strips * (BLOCK_KEYS + DIM) / PIECE);
    }

    /* Lets the strip see the packed block of `count` keys that begins at `first_key`. */
    void attend(Strip &strip, const Step *keys, const Step *values, int32_t first_key, int count) {
        const int seen = static_cast<int>(minimum(count, strip.most_visible - first_key));
        if (seen <= 0) return;
        const int padded = round_up(seen, KEY_MULTIPLE);
        with_vectors(strip,
                     [&](auto vectors) { attend<decltype(vectors)::value>(strip, keys, values, first_key, padded); });
    }

    void finish() {}

  private:
    template <int VECTORS>
    void attend(Strip &strip, const Step *keys, const Step *values, int32_t first_key, int count) {
        product<VECTORS, KeySteps>(scores, keys, strip.queries, count, DIM_STEPS, false, SCORE_PART);
        if (strip.fewest_visible < first_key + count) hide_keys<VECTORS>(scores, strip, first_key, count);
        Softening softening{scores, weights, &strip, count, scale_log2, 0, {}, {}, {}};
        if (softening.begin<VECTORS>()) softening.raise<VECTORS>();
        if (!softening.finish<VECTORS>()) {
            softening.raise<VECTORS>();
            softening.finish<VECTORS>();
        }
        const int steps = count / STEP_ELEMENTS;
        product<VECTORS, ValueColumns>(strip.output, values, weights, DIM, steps, !strip.empty, steps);
        strip.empty = false;
    }

    template <int VECTORS, class A>
    void product(float *c, const Step *a, const Step *b, int count, int steps, bool accumulate, int part) {
        for (int first = 0; first < count; first += PIECE) {
            next.fetch();
            multiply<VECTORS, Lanes, A, Lanes>(c + first * Lanes::ROW, a + first * A::ROW, b, PIECE, steps, accumulate,
                                               part);
        }
    }

    static constexpr int PIECE = KEY_MULTIPLE; /* rows of a product between two calls of next.fetch() */
    NextRows next;
    float *scores;
    Step *weights;
    float scale_log2;
};
#endif

#endif
