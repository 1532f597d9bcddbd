/* The loop of a backward pass over the tiles of passing rows (see backward.h), for every arch whose waves work alone.
 *
 *   publish             the tile that was on its way is the current one (block barrier)
 *   issue               another sets off
 *   scores              S = x x^T                               matrix unit
 *   grad_probabilities  dP = y y^T                              matrix unit
 *   probabilities       P = exp2(score(S) - LSE)                vector unit, meanwhile
 *   drop                the sign of P says where dropout leaves it out: see dropout.h
 *   add_to_y            gradient of y += P y                    matrix unit
 *   grad_scores         dS = P (dP - delta) score'              vector unit, meanwhile
 *   add_to_x            gradient of x += dS x                   matrix unit
 *
 * A loop is a struct with the members of this one; an arch with a better way to go through the tiles brings its own
 * (arch/sm90_backward.h, arch/gfx9_key_gradients.h), and attention_backward.hip picks it. All share the arithmetic on
 * scores, RowWise. */
#ifndef AITER_GPU_BACKWARD_LOOP_H
#define AITER_GPU_BACKWARD_LOOP_H

#include "gpu/backward.h"
#include "gpu/dropout.h"
#include "gpu/mask.h"
#include "gpu/score.h"
#if defined(AITER_GFX9)
#include "gpu/arch/gfx9_backward.h"
#else
#include "gpu/arch/sm80_backward.h"
#endif

namespace aiter {

/* Scores to probabilities, and gradients of probabilities to those of scores, for the rows of one wave. A tile gives
 * term(which, column, run): LSE (0) or delta (1) of COLUMN_RUN passing rows. */
template <int PASS, class Tile, class Share> struct RowWise {
    using Scores = typename Tile::Scores;
    static constexpr int SLOTS = Scores::SLOTS, COLUMN_RUN = Tile::COLUMN_RUN;
    const Share &share;
    int wave_row;
    Score score;
    Dropout dropout;
    float slope;                    /* of the query head at hand */
    int drawn_head;                 /* the same head, as dropout counts them */
    float lse[SLOTS], delta[SLOTS]; /* of own query rows */

    __device__ __forceinline__ RowWise(const Share &share, int wave_row)
        : share(share), wave_row(wave_row), score(Score::with_sign(share.sequence.arguments.problem.forward)),
          dropout(share.sequence.arguments.problem.forward, share.sequence.arguments.tensors) {
        if (owns_queries(PASS))
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) {
                const int row = wave_row + Scores::row(slot);
                const LseAndDelta *rows = share.sequence.terms(share.query_head);
                const LseAndDelta terms = row < share.own_rows ? rows[row] : LseAndDelta{INFINITE, 0.0f};
                lse[slot] = terms.lse, delta[slot] = terms.delta;
            }
    }
    __device__ __forceinline__ void begin_head(int head) {
        if (ALIBI) slope = share.slope(head);
        if (DROPOUT) drawn_head = share.drawn_head(head);
    }
    /* Zeros where own and passing rows do not see each other. */
    __device__ __forceinline__ void hide(Scores &s, int first) const {
        aiter::hide<true>(s, 0.0f, first, [&](int slot) { return share.sees(wave_row + Scores::row(slot)); });
    }
    /* With a soft cap, `derivative` receives that of the scores. */
    __device__ __forceinline__ void probabilities(const Tile &tile, Scores &p, Scores &derivative, int first) const {
        if constexpr (SOFTCAP || ALIBI)
            score.finish(
                p, derivative, first, [&](int) { return slope; },
                [&](int slot) { return share.position(wave_row + Scores::row(slot)); });
        exponentiate<0, Scores::VALUES>(tile, p);
    }
    /* Of a lane's values in a row, those from BEGIN to END. */
    template <int BEGIN, int END> __device__ __forceinline__ void exponentiate(const Tile &tile, Scores &p) const {
#pragma unroll
        for (int i = BEGIN; i < END; i += COLUMN_RUN) {
            float run[COLUMN_RUN];
            if (!owns_queries(PASS)) tile.term(0, Scores::column(i) + Scores::lane_column(), run);
#pragma unroll
            for (int j = 0; j < COLUMN_RUN; j += 2)
#pragma unroll
                for (int slot = 0; slot < SLOTS; ++slot) {
                    float x = p.get(slot, i + j), y = p.get(slot, i + j + 1);
                    if (owns_queries(PASS)) run[j] = run[j + 1] = lse[slot];
                    Tile::exponentiate(x, y, score.unit, run[j], run[j + 1]);
                    p.set(slot, i + j, x), p.set(slot, i + j + 1, y);
                }
        }
    }
    /* Probabilities become negative where they are left out, -0 for 0. */
    __device__ __forceinline__ void drop(Scores &p, int first) const {
        dropout.template for_tile<Scores, !owns_queries(PASS)>(
            drawn_head, first, [&](int slot) { return wave_row + Scores::row(slot); },
            [&](int slot, int i, bool kept) { p.set(slot, i, kept ? p.get(slot, i) : -p.get(slot, i)); });
    }
    /* What is left. */
    static __device__ __forceinline__ Scores kept(const Scores &p) {
        Scores result;
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot)
#pragma unroll
            for (int i = 0; i < Scores::VALUES; ++i) result.set(slot, i, p.get(slot, i) < 0.0f ? 0.0f : p.get(slot, i));
        return result;
    }
    /* Not CAPPED: p has been multiplied by the soft cap's derivative. */
    template <bool CAPPED = SOFTCAP>
    __device__ __forceinline__ void grad_scores(const Tile &tile, const Scores &p, const Scores &derivative,
                                                Scores &ds) const {
#pragma unroll
        for (int i = 0; i < Scores::VALUES; i += COLUMN_RUN) {
            float run[COLUMN_RUN];
            if (!owns_queries(PASS)) tile.term(1, Scores::column(i) + Scores::lane_column(), run);
#pragma unroll
            for (int j = 0; j < COLUMN_RUN; j += 2)
#pragma unroll
                for (int slot = 0; slot < SLOTS; ++slot) {
                    float x = ds.get(slot, i + j), y = ds.get(slot, i + j + 1);
                    float p_x = p.get(slot, i + j), p_y = p.get(slot, i + j + 1);
                    if (owns_queries(PASS)) run[j] = run[j + 1] = delta[slot];
                    if (DROPOUT) {
                        x = __builtin_signbit(p_x) ? 0.0f : x * dropout.scale, p_x = __builtin_fabsf(p_x);
                        y = __builtin_signbit(p_y) ? 0.0f : y * dropout.scale, p_y = __builtin_fabsf(p_y);
                    }
                    Tile::weigh(x, y, p_x, p_y, run[j], run[j + 1]);
                    if (CAPPED) x *= derivative.get(slot, i + j), y *= derivative.get(slot, i + j + 1);
                    ds.set(slot, i + j, x), ds.set(slot, i + j + 1, y);
                }
        }
    }
};

/* Starts one tile after the other on its way. */
template <class Tile, class Share> struct Issue {
    const Share &share;
    Tile &tile;
    int head = 0, count = 0; /* of the next one: which of the passing heads, which of its tiles */
    RowPair passing;         /* of that head */

    __device__ __forceinline__ Issue(const Share &share, Tile &tile)
        : share(share), tile(tile), passing(share.passing()) {}
    __device__ __forceinline__ void operator()() {
        if (head == share.heads_passing) return tile.skip();
        tile.issue(passing, share.tile_row(count));
        if (++count < share.tiles) return;
        count = 0;
        if (++head < share.heads_passing) share.sequence.next_head(passing);
    }
};

/* Takes the place of a gradient that other waves of the block have. */
struct NoGradient {};
template <class Gradient> constexpr bool HAS_GRADIENT = true;
template <> inline constexpr bool HAS_GRADIENT<NoGradient &> = false;

template <int PASS> struct BackwardTileLoop {
    using Tile = Backward<HEAD_DIM, VALUE_DIM, PASS>;
    using Scores = typename Tile::Scores;
    using GradX = typename Tile::GradX;
    using GradY = typename Tile::GradY;
    using Share = aiter::Share<PASS, Tile::ROWS, Tile::TOKENS>;
    static constexpr int THREADS = Tile::THREADS, ROWS = Tile::ROWS, BLOCKS = Tile::BLOCKS;
    static constexpr int SHARED_BYTES = Tile::SHARED_BYTES;
    static constexpr bool BOTH_IN_ONE_PASS = Tile::BOTH_IN_ONE_PASS;
    static __device__ __forceinline__ int forget(int x) { return Tile::forget(x); }

    /* The gradients of each wave's own rows. At its end, calls finish(tile, grad_x, grad_y) in every wave that owns
     * rows: a loop may use more threads than these have. */
    template <class Finish>
    static __device__ __forceinline__ void attend(const Share &share, SharedAddress shared, Finish finish) {
        Tile tile(shared);
        GradX grad_x;
        GradY grad_y;
        if (gives_x(PASS)) grad_x.clear();
        if (gives_y(PASS)) grad_y.clear();
        if (share.tiles > 0) multiply(share, tile, grad_x, grad_y);
        finish(tile, grad_x, grad_y);
    }

    static __device__ __forceinline__ void multiply(const Share &share, Tile &tile, GradX &grad_x, GradY &grad_y) {
        Issue<Tile, Share> issue(share, tile);
        tile.load_own(share.own(), share.block_row);
#pragma unroll
        for (int stage = 0; stage < Tile::STAGES - 1; ++stage) issue();

        /* The passing rows that any row of the wave takes part with are first.low ... last.high - 1; those that all of
         * its rows do, last.low ... first.high - 1. */
        const int wave_row = share.block_row + Tile::wave_row();
        const Range first_sees = share.sees(wave_row);
        const Range last_sees = share.sees(lesser(wave_row + ROW_TILE, share.own_rows) - 1);
        const int seen_end = wave_row < share.own_rows ? last_sees.high : 0;
        RowWise<PASS, Tile, Share> rows(share, wave_row);
        for (int head = 0; head < share.heads_passing; ++head) {
            rows.begin_head(head);
            for (int count = 0, first = share.first; count < share.tiles; ++count, first += Tile::TOKENS) {
                tile.publish();
                issue();
                const int end = first + Tile::TOKENS;
                const bool sees_some = end > first_sees.low && first < seen_end;
                if (!Tile::ALL_TAKE_PART && !sees_some) continue; /* the tile is the other waves' */
                const bool masked = first < last_sees.low || end > first_sees.high;
                Scores p, derivative, ds;
                tile.scores(p);
                if (gives_x(PASS)) tile.grad_probabilities(ds);
                rows.probabilities(tile, p, derivative, first);
                if (masked) rows.hide(p, first);
                if (DROPOUT) rows.drop(p, first);
                if constexpr (gives_y(PASS) && DROPOUT) tile.add_to_y(rows.kept(p), grad_y);
                else if (gives_y(PASS)) tile.add_to_y(p, grad_y);
                if (!gives_x(PASS)) continue;
                rows.grad_scores(tile, p, derivative, ds);
                if (masked) rows.hide(ds, first); /* 0 * inf or 0 * NaN */
                tile.add_to_x(ds, grad_x);
            }
        }
        tile.end();
    }
};

} // namespace aiter

#endif
