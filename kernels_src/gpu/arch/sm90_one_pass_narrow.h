/* GRAD_ALL on sm_90a (see backward.h, arch/sm90_one_pass.h) up to 64 columns: steps of 128 queries, two of QuerySums'
 * tiles (halves), so that products, waits and barriers come half as often. Two warpgroups of consumers, each with 64
 * keys and both their gradients, and the dQ of one half. From top to bottom, one warpgroup's work on a step:
 *
 *   matrix unit                    meanwhile
 *   dP = V dO^T                    P = exp2(S - LSE) of the first half
 *   dV += P dO, first half         P of the second
 *                                  dS = P (dP - delta) of the first half, to shared memory in 16 bits
 *   dV += P dO, second half
 *   dK += dS Q, first half         dS of the second
 *   dK += dS Q, second half        the other warpgroup's dS gets there, too
 *   dQ = dS^T K
 *   S = K Q^T of the next step     dQ to shared memory, in float32
 *
 * S and dP of 128 queries are 128 registers of each thread, both gradients 64: what else there is must be of one half.
 * Soft caps and dropout need more; with them, dP of the second half sets off when dS of the first is there (WHOLE).
 *
 *   copiers     Q, dO, LSE and delta of the steps to come
 *   two lanes   a half each: wait until all blocks before this one have added to its tile, add, tell the next
 *
 * A head's last step may have a tile too many, its second half. Its rows are past the last that any key sees, and count
 * as missing: they change no gradient. Its dQ is made, and taken, but not added. */
#ifndef AITER_GPU_ARCH_SM90_ONE_PASS_NARROW_H
#define AITER_GPU_ARCH_SM90_ONE_PASS_NARROW_H

#include "gpu/arch/sm90_one_pass.h"

namespace aiter {

struct NarrowOnePassShape {
    static constexpr int HALVES = 2, HALF = QuerySums::ROWS;
    static constexpr int ROWS = 128, TOKENS = HALVES * HALF, STAGES = 2;
    static constexpr int WAVES = 8;                                         /* of the consumers */
    static constexpr int COPIERS = 64;                                      /* threads */
    static constexpr int CONSUMER_REGISTERS = 240, PRODUCER_REGISTERS = 24; /* of a thread */
    /* Whether dP of both halves is made at once: it takes 32 registers more. */
    static constexpr bool WHOLE = !SOFTCAP && !DROPOUT;
    /* Behind the stages: dS and dQ of both halves. */
    using GradScores = BlockLayout<ROWS, HALF>;
    static constexpr int GRADIENTS_BYTES = HALVES * (GradScores::BYTES + QuerySums::TILE_BYTES);
    using Stages = PassingTiles<BackwardTiles<HEAD_DIM, HEAD_DIM, GRAD_ALL, ROWS, TOKENS, STAGES, COPIERS>, WAVES,
                                COPIERS, GRADIENTS_BYTES>;
};

struct NarrowOnePassTiles : NarrowOnePassShape::Stages {
    using Shape = NarrowOnePassShape;
    using GradScores = Shape::GradScores;
    static constexpr int HALVES = Shape::HALVES, HALF = Shape::HALF, WAVES = Shape::WAVES, COPIERS = Shape::COPIERS;
    static constexpr int TEAM_WAVES = 4;
    static constexpr int SHARED_BYTES =
        TILE_BYTES + Shape::GRADIENTS_BYTES + STAGE_BARRIERS_BYTES + (2 + 2 * HALVES) * mbarrier::BYTES;
    static_assert(QuerySums::PARTS == 1, "a warpgroup multiplies all columns of dQ");
    using StepScores = Accumulator<1, TOKENS>;
    using Scores = Accumulator<1, HALF>;
    using Operand = uint32_t[HALF / 16][4];
    using Gradient = Accumulator<1, round_up(HEAD_DIM, 16)>;
    using GradQuery = Accumulator<1, QuerySums::COLUMNS>;

    uint32_t step = 0;  /* of the consumers: how many came before */
    SharedAddress tile; /* the current stage */
    const int team;     /* which warpgroup this is */

    __device__ __forceinline__ explicit NarrowOnePassTiles(SharedAddress shared)
        : Shape::Stages(shared), team(wave() / 4) {
        if (thread_in_block() == 0) {
            make_barriers(2 * TEAM_WAVES), mbarrier::make(scored(), 2 * TEAM_WAVES),
                mbarrier::make(multiplied(), 2 * TEAM_WAVES);
            for (int i = 0; i < HALVES; ++i) mbarrier::make(to_be_added(i), TEAM_WAVES), mbarrier::make(taken(i), 1);
            barriers_are_made();
        }
        barrier();
    }
    /* Where one half's values stand in scores of a step. */
    static __device__ __forceinline__ Scores &half(StepScores &s, int which) {
        return reinterpret_cast<Scores &>(s.tile[0][which * Scores::TILES]);
    }
    __device__ __forceinline__ SharedAddress grad_scores(int half) const {
        return this->stage(STAGES) + half * GradScores::BYTES;
    }
    __device__ __forceinline__ SharedAddress grad_query(int half) const {
        return grad_scores(HALVES) + half * QuerySums::TILE_BYTES;
    }
    /* A half's dQ is there; its place is free again. dS of both is there; has been multiplied. */
    __device__ __forceinline__ SharedAddress to_be_added(int half) const { return full(STAGES) + half * 16; }
    __device__ __forceinline__ SharedAddress taken(int half) const { return to_be_added(half) + 8; }
    __device__ __forceinline__ SharedAddress scored() const { return full(STAGES) + HALVES * 16; }
    __device__ __forceinline__ SharedAddress multiplied() const { return scored() + 8; }

    /* The steps of a head, in the order in which they are gone through. */
    template <class Share> static __device__ __forceinline__ int steps(const Share &share) {
        return (share.tiles + HALVES - 1) / HALVES;
    }
    template <class Share> static __device__ __forceinline__ int step_row(const Share &share, int count) {
        return share.first + (share.from_last ? count : steps(share) - 1 - count) * TOKENS;
    }

    /* The copiers */
    template <class Share> __device__ __forceinline__ void copy_all(const Share &share) {
        this->copy_steps(
            share, steps(share), [&](int count) { return step_row(share, count); },
            [&](const RowPair &rows, int first, int thread) { copy_step(rows, first, thread); });
    }
    __device__ __forceinline__ void issue(const RowPair &rows, int first) {
        mbarrier::wait(empty(current), turn ^ 1); /* at once in the first turn */
        copy_step(rows, first, thread_in_block() - WAVES * WAVE);
        mbarrier::arrive_after_copies(full(current));
        advance();
    }
    __device__ __forceinline__ void copy_step(const RowPair &rows, int first, int thread) const {
        const SharedAddress to = this->stage(current);
#pragma unroll 1
        for (int half = 0; half < HALVES; ++half) { /* one after the other: for want of registers */
            const int from = first + half * HALF;
            const SharedAddress place = to + half * HALF * 128;
            copy<HALF, HEAD_DIM>(place, rows.x, from, rows, thread);
            copy<HALF, HEAD_DIM>(place + PassingX::BYTES, rows.y, from, rows, thread);
            copy_half_terms(to, rows, from, half * HALF, thread);
        }
    }
    static __device__ __forceinline__ void copy_half_terms(SharedAddress stage, const RowPair &rows, int first,
                                                           int place, int thread) {
#pragma unroll
        for (int step = 0; step < 2 * HALF; step += COPIERS) {
            const int word = step + thread, i = first + word / 2;
            const float *terms = reinterpret_cast<const float *>(rows.terms + i);
            copy_word_async(stage + TERMS_AT + (word % 2 * TOKENS + place + word / 2) * 4, terms + word % 2,
                            i < rows.count);
        }
    }

    /* The lane that adds one half of each step */
    template <class Share> __device__ __forceinline__ void add_all(const Share &share, int half) {
        const QuerySums sums(share.sequence.arguments);
        uint32_t step = 0;
#pragma unroll 1
        for (int head = 0; head < share.heads_passing; ++head)
#pragma unroll 1
            for (int count = 0; count < steps(share); ++count, ++step) {
                const int row = step_row(share, count) + half * HALF;
                if (row < share.end) { /* and so the block has a turn */
                    const int64_t place = sums.tile(share.sequence, share.first_head + head, row);
                    const uint32_t turn = static_cast<uint32_t>(share.turn(row));
                    wait_for_turn(sums, place, turn);
                    mbarrier::wait(to_be_added(half), step % 2);
                    add_to_sums(sums, place, turn, grad_query(half), taken(half));
                } else {
                    mbarrier::wait(to_be_added(half), step % 2);
                    mbarrier::arrive(taken(half));
                }
            }
    }

    /* The consumers */
    static __device__ __forceinline__ int wave_row() { return wave() * ROW_TILE; }
    __device__ __forceinline__ SharedAddress published(bool must_publish = true) const {
        mbarrier::wait(full(step % STAGES), step / STAGES % 2);
        if (must_publish) wgmma::shared_is_written();
        return this->stage(step % STAGES);
    }
    template <int OUTSTANDING, class Matrix> static __device__ __forceinline__ void finish(Matrix &matrix) {
        wgmma::wait<OUTSTANDING>();
        changed(matrix);
    }
    /* Of the warpgroup's own rows and a step's: x or, VALUES, y */
    template <bool VALUES> __device__ __forceinline__ void multiply(SharedAddress tile, StepScores &s) const {
        multiply_rows<OwnX, PassingX, HEAD_DIM>(this->own + (VALUES ? OwnX::BYTES : 0) + team * 64 * 128,
                                                tile + (VALUES ? PassingX::BYTES : 0), s);
    }
    /* The same of y, one half */
    __device__ __forceinline__ void multiply_half(int half, Scores &s) const {
        multiply_rows<OwnX, PassingX, HEAD_DIM>(this->own + OwnX::BYTES + team * 64 * 128,
                                                tile + PassingX::BYTES + half * HALF * 128, s);
    }
    template <bool VALUES> __device__ __forceinline__ void add(const Operand &a, int half, Gradient &gradient) const {
        multiply_columns<PassingX, Gradient::TILES * 8>(a, tile + (VALUES ? PassingX::BYTES : 0) + half * HALF * 128,
                                                        gradient);
    }
    __device__ __forceinline__ void await_place_for_grad_scores() const { mbarrier::wait(multiplied(), step % 2 ^ 1); }
    __device__ __forceinline__ void put_grad_scores(const Operand &a, int half) const {
        const int row = thread_in_block() / WAVE * ROW_TILE; /* wave_row(), without a shuffle */
        const SharedAddress lane_row = grad_scores(half) + GradScores::chunk(row + lane() % 16, lane() / 16);
#pragma unroll
        for (int j = 0; j < HALF / 16; ++j) store_matrices(GradScores::at(lane_row, 0, j), a[j]);
    }
    __device__ __forceinline__ void publish_grad_scores() const {
        wgmma::shared_is_written();
        mbarrier::arrive_as_wave(scored());
    }
    /* dQ of the warpgroup's half */
    __device__ __forceinline__ void multiply_queries(GradQuery &dq) const {
        const wgmma::Matrix s = wgmma::matrix(grad_scores(team));
        const wgmma::Matrix k = wgmma::matrix(this->own, OwnX::BLOCK_BYTES);
        wgmma::begin();
#pragma unroll
        for (int j = 0; j < ROWS / 16; ++j)
            wgmma::Product<QuerySums::COLUMNS>::multiply_both_transposed(dq.tile[0], s + j * 16 * 128 / 16,
                                                                         k + j * 16 * 128 / 16, j > 0);
        wgmma::end();
    }
    __device__ __forceinline__ void store_queries(const GradQuery &dq) const {
        mbarrier::arrive_as_wave(multiplied());
        mbarrier::wait(taken(team), step % 2); /* of the step before: `step` is the next already */
        store_sums(dq, grad_query(team));
        wgmma::shared_is_written();
        mbarrier::arrive_as_wave(to_be_added(team));
    }
    template <int COLUMNS, class RowPointer>
    __device__ __forceinline__ void store(const Gradient &gradient, RowPointer row) const {
        Shape::Stages::template store<COLUMNS>(gradient, wave_row(), 0, row);
    }

    /* What RowWise asks for: half of a step. */
    struct Half {
        using Scores = NarrowOnePassTiles::Scores;
        static constexpr int COLUMN_RUN = NarrowOnePassTiles::COLUMN_RUN;
        SharedAddress stage;
        __device__ __forceinline__ void term(int which, int column, float (&run)[2]) const {
            term_at(stage, which, column, run);
        }
        static __device__ __forceinline__ void exponentiate(float &x, float &y, float scale, float log_x, float log_y) {
            NarrowOnePassTiles::exponentiate(x, y, scale, log_x, log_y);
        }
        static __device__ __forceinline__ void weigh(float &x, float &y, float p_x, float p_y, float d_x, float d_y) {
            NarrowOnePassTiles::weigh(x, y, p_x, p_y, d_x, d_y);
        }
    };
    __device__ __forceinline__ Half terms(int half) const { return {tile + half * HALF * 4}; }
};

struct NarrowOnePassLoop : OnePassForm<NarrowOnePassTiles, NarrowOnePassTiles::HALF, NarrowOnePassTiles::Half> {
    using Launch = NarrowOnePassTiles::Launch;

    /* See BackwardTileLoop. */
    template <class Finish>
    static __device__ __forceinline__ void attend(const Share &share, SharedAddress shared, Finish finish) {
        in_roles<Consumer>(share, shared, finish);
    }

    struct Consumer {
        const Share &share;
        Tile &tile;
        Gradient &grad_x, &grad_y;
        Rows rows;
        int head = 0, count = 0;  /* of the step at hand */
        int seen_by_all, seen_to; /* query rows that all keys of the warpgroup take part with */
        Tile::StepScores scores;  /* of the step at hand */

        __device__ __forceinline__ Consumer(const Share &share, Tile &tile, Gradient &grad_x, Gradient &grad_y)
            : share(share), tile(tile), grad_x(grad_x), grad_y(grad_y),
              rows(share, share.block_row + Tile::wave_row()) {
            const Range all_see = share.all_see(share.block_row + tile.team * 64, 64);
            seen_by_all = all_see.low, seen_to = all_see.high;
            const int steps = Tile::steps(share);
            const int low = greater((seen_by_all - share.first + Tile::TOKENS - 1) / Tile::TOKENS, 0);
            plain_steps = greater((seen_to - share.first) / Tile::TOKENS - low, 0);
            first_plain = share.from_last ? low : steps - low - plain_steps;
            look_at_step();
        }
        __device__ __forceinline__ void consume() {
            rows.begin_head(0);
            tile.tile = tile.published();
            tile.multiply<false>(tile.tile, scores);
            Tile::finish<0>(scores);
#pragma unroll 1
            while (head < share.heads_passing) step();
            Tile::finish<0>(scores);
            changed(grad_x), changed(grad_y);
        }
        __device__ __forceinline__ bool masked(int first) const {
            return first < seen_by_all || first + Tile::HALF > seen_to;
        }
        __device__ __forceinline__ void probabilities(Scores &p, Scores &derivative, int half, int first,
                                                      bool plain) const {
            rows.probabilities(tile.terms(half), p, derivative, first);
            if (!plain && masked(first)) rows.hide(p, first);
            if (DROPOUT) rows.drop(p, first);
        }
        __device__ __forceinline__ void add_to_y(const Scores &p, int half) {
            Tile::Operand a;
            if constexpr (DROPOUT) round_operands(rows.kept(p), a);
            else round_operands(p, a);
            tile.add<true>(a, half, grad_y);
        }
        __device__ __forceinline__ void grad_scores(const Scores &p, const Scores &derivative, Scores &ds, int half,
                                                    int first, bool plain, Tile::Operand &b) const {
            rows.grad_scores(tile.terms(half), p, derivative, ds);
            if (!plain && masked(first)) rows.hide(ds, first); /* 0 * inf or 0 * NaN */
            round_operands(ds, b);
            tile.put_grad_scores(b, half);
        }
        /* Of a head, in the order in which they come: those in which all keys of the warpgroup take part with all rows. */
        int first_plain, plain_steps;
        bool plain; /* is the one at hand such a one? */
        __device__ __forceinline__ void look_at_step() {
            plain = static_cast<uint32_t>(count - first_plain) < static_cast<uint32_t>(plain_steps);
        }
        /* Each its own, as in OnePassLoop. */
        __device__ __forceinline__ void step() {
            if (!plain) step(false);
            else step(true);
        }
        __device__ __forceinline__ void step(bool plain) {
            constexpr bool WHOLE = Tile::Shape::WHOLE;
            const int first = Tile::step_row(share, count), second = first + Tile::HALF;
            Tile::StepScores ds, derivative;
            Scores &p_0 = Tile::half(scores, 0), &p_1 = Tile::half(scores, 1);
            Scores &ds_0 = Tile::half(ds, 0), &ds_1 = Tile::half(ds, 1);
            Scores &derivative_0 = Tile::half(derivative, 0), &derivative_1 = Tile::half(derivative, 1);
            Tile::Operand b_0, b_1;
            if constexpr (WHOLE) tile.multiply<true>(tile.tile, ds);
            else tile.multiply_half(0, ds_0);
            probabilities(p_0, derivative_0, 0, first, plain);
            add_to_y(p_0, 0);
            if constexpr (WHOLE) {
                probabilities(p_1, derivative_1, 1, second, plain);
                Tile::finish<1>(ds);
            } else {
                Tile::finish<1>(ds_0);
            }
            tile.await_place_for_grad_scores();
            grad_scores(p_0, derivative_0, ds_0, 0, first, plain, b_0);
            if constexpr (WHOLE) {
                add_to_y(p_1, 1);
                tile.add<false>(b_0, 0, grad_x);
            } else {
                tile.multiply_half(1, ds_1);
                tile.add<false>(b_0, 0, grad_x);
                probabilities(p_1, derivative_1, 1, second, plain);
                add_to_y(p_1, 1);
                Tile::finish<2>(ds_1);
            }
            grad_scores(p_1, derivative_1, ds_1, 1, second, plain, b_1);
            tile.publish_grad_scores();
            tile.add<false>(b_1, 1, grad_x);
            if (++count == Tile::steps(share)) {
                count = 0;
                if (++head < share.heads_passing) rows.begin_head(head);
            }
            Tile::GradQuery dq;
            mbarrier::wait(tile.scored(), tile.step % 2);
            tile.multiply_queries(dq);
            wgmma::wait<1>(); /* operands make room for the scores */
            const SharedAddress before = tile.empty(tile.step % Tile::STAGES);
            SharedAddress next = tile.tile;
            ++tile.step;
            if (head < share.heads_passing) next = tile.published(Tile::must_publish(share));
            tile.multiply<false>(next, scores);
            wgmma::wait<1>();
            mbarrier::arrive_as_wave(before);
            changed(dq);
            tile.store_queries(dq);
            look_at_step();          /* while the scores are made */
            Tile::finish<0>(scores); /* the assembler follows no product around a loop */
            tile.tile = next;
        }
    };
};

} // namespace aiter

#endif
