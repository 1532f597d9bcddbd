/* The online softmax of a strip: STRIP_ROWS query rows side by side along the vector lanes, over some keys at a time.
 *
 *            rows ->                                          lane by lane, no reduction across lanes:
 *   keys   S^T = K Q^T     P^T = 2^(scale S^T - maximum)      maximum, sum
 *    |     ---------------------------------------------
 *    v     O^T += V^T P^T                                     times 2^(old - new maximum) when the maximum moves
 *
 * The maximum that the weights are relative to follows the true one only when that has grown by RESCALE_THRESHOLD:
 * O^T is then rescaled a few times per sequence instead of once per block, and weights stay below 2^RESCALE_THRESHOLD.
 */
#ifndef AITER_CPU_SOFTMAX_H
#define AITER_CPU_SOFTMAX_H

#include "dropout.h"
#include "packed.h"
#include "score.h"

constexpr float RESCALE_THRESHOLD = 8.0f;

struct Strip {
    Step *queries; /* Q^T [DIM_STEPS][STRIP_ROWS] */
    float *output; /* O^T [VALUE_WIDTH][STRIP_ROWS], or with narrow_strip.h O [row][OUTPUT_DIM], relative to `maximum`,
                    * not yet divided by `sum` */
    float *maximum, *sum;
    int32_t *high, *low; /* each row sees the keys from low to high - 1; low only with AITER_WINDOW */
    int32_t *place;      /* of each row among the keys, and its slope: only with AITER_ALIBI */
    float *slope;
    int32_t *row, *head; /* of each row, as dropout counts them: only with AITER_DROPOUT */
    Visibility seen;     /* by the rows of the strip */
    int vectors;         /* that hold rows: 1, 2 or STRIP_VECTORS */
    int score_part;      /* steps that a score is summed over at a time */
    bool empty;          /* nothing accumulated yet, `output` is not initialised */

    /* How many of these keys no row of the strip sees before the first that one does, rounded down. */
    int first_seen(int32_t first_key, int count, int multiple) const {
        return WINDOW ? static_cast<int>(clamp(seen.some.low - first_key, 0, count)) / multiple * multiple : 0;
    }
};

/* Calls body(Constant<vectors of the strip>()). */
template <class Body> AITER_INLINE void with_vectors(const Strip &strip, const Body &body) {
    switch (strip.vectors) {
    case 1: return body(Constant<1>());
    case 2: return body(Constant<2>());
    default: return body(Constant<STRIP_VECTORS>());
    }
}

/* Works out the scores of products with keys begin ... end - 1 of some, where that is more than the softmax does. */
template <int VECTORS>
static void work_out(float *s, const Strip &strip, const Score &score, int32_t first_key, int begin, int end) {
    for (int v = 0; v < VECTORS; v++) {
        const IntVec distance = ALIBI ? load(strip.place + v * LANES) - first_key : IntVec{};
        const Vec slope = ALIBI ? load(strip.slope + v * LANES) : Vec{};
        for (int j = begin; j < end; j++) {
            float *p = s + Lanes::at(j, v);
            store(p, score(load(p), distance - j, slope));
        }
    }
}

template <int VECTORS> static void hide_keys(float *s, const Strip &strip, int32_t first_key, int begin, int end) {
    for (int v = 0; v < VECTORS; v++) {
        const IntVec high = load(strip.high + v * LANES) - first_key,
                     low = WINDOW ? load(strip.low + v * LANES) - first_key : IntVec{};
        for (int j = begin; j < end; j++) {
            float *p = s + Lanes::at(j, v);
            store(p, in_range(j, low, high) ? load(p) : broadcast(-INFINITE));
        }
    }
}

/* Which weights of some keys are kept, laid out as their scores. */
template <int VECTORS>
static AITER_OUTLINE void draw(int32_t *kept, const Strip &strip, const Dropout &dropout, int32_t first_key,
                               int count) {
    for (int v = 0; v < VECTORS; v++)
        dropout.kept(load(strip.head + v * LANES), load(strip.row + v * LANES), first_key, count,
                     [&](int j, IntVec keeps) { store(kept + Lanes::at(j, v), keeps); });
}

/* From products with keys begin ... end - 1 of those from `first_key` on to what the softmax takes. */
template <int VECTORS>
AITER_INLINE void mask_scores(float *s, const Strip &strip, const Score &score, int32_t first_key, int begin, int end) {
    if (!PLAIN_SCORES) work_out<VECTORS>(s, strip, score, first_key, begin, end);
    if (strip.seen.cuts(first_key + begin, end - begin)) hide_keys<VECTORS>(s, strip, first_key, begin, end);
}

/* From the scores of some keys to weights, in one pass that hopes that the maximum need not move, and in pieces, so
 * that it can be worked off while matrix tiles multiply:
 *
 *     if (begin()) raise();                      a row has no maximum yet
 *     advance(), advance(), ...
 *     if (!finish()) raise(), finish();          a score exceeds its row's maximum by too much
 *
 * raise() rescales what has been accumulated: by then that must be all that is relative to the old maximum. */
struct OnlineSoftmax {
    const float *scores;
    const int32_t *kept; /* which weights are stored, as `draw` says; the others are zeros. Only with AITER_DROPOUT */
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
        const OnlineSoftmax from = *this; /* a copy, as storing weights could change what only this points to */
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
                if (DROPOUT) {
                    const IntVec low_kept = load(from.kept + Lanes::at(j, v)),
                                 high_kept = load(from.kept + Lanes::at(j, v) + Lanes::ROW);
                    store_weights(from.weights, j, v, low_kept ? low_weight : Vec{}, high_kept ? high_weight : Vec{});
                } else {
                    store_weights(from.weights, j, v, low_weight, high_weight);
                }
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

    /* All of it at once. */
    template <int VECTORS> void run() {
        if (begin<VECTORS>()) raise<VECTORS>();
        if (finish<VECTORS>()) return;
        raise<VECTORS>();
        finish<VECTORS>();
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
        for (int d = 0; d < VALUE_DIM; d++) {
            float *p = strip->output + Lanes::at(d, v);
            store(p, load(p) * factor);
        }
    }
};

#endif
