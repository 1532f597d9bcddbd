/* GRAD_ALL on sm_90a (see backward.h, arch/sm90_one_pass.h) at 256 columns, where no warpgroup has registers for
 * two gradients: each has one, of the same 64 keys, and half of the columns of dQ. Of a tile of 64 queries, with a row
 * of S and dP for each key:
 *
 *   warpgroup 0    S    P -+-  dV += P dO             +-  right half of dQ = dS^T K  ->  to where dO was
 *                          |  float32                 |  16 bits
 *   warpgroup 1    dP      +-  dS -> shared memory  --+-  dK += dS Q,  left half     ->  to where Q was
 *
 *   two waves      copy Q, dO, LSE and delta of the tiles to come
 *   one lane       waits until all blocks before this one have added to the tile, adds, tells the next
 *
 * So probabilities of one warpgroup overlap with products of the other. Half of a tile's dQ in float32 takes as many
 * bytes as its Q or its dO, and takes their places: Q is then read by none but dK, dO by none but dV. */
#ifndef AITER_GPU_ARCH_SM90_ONE_PASS_WIDE_H
#define AITER_GPU_ARCH_SM90_ONE_PASS_WIDE_H

#include "gpu/arch/sm90_one_pass.h"

namespace aiter {

struct WideOnePassShape {
    static constexpr int ROWS = 64, TOKENS = QuerySums::ROWS, STAGES = 2;
    static constexpr int WAVES = 8;    /* of the consumers */
    static constexpr int COPIERS = 64; /* threads */
    /* Behind the stages: P and dS. */
    using GradScores = BlockLayout<ROWS, TOKENS>;
    static constexpr int PROBABILITIES_BYTES = ROWS * TOKENS * 4;
    using Stages = CopiedTiles<BackwardTiles<HEAD_DIM, HEAD_DIM, GRAD_ALL, ROWS, TOKENS, STAGES, COPIERS>, WAVES,
                               COPIERS, PROBABILITIES_BYTES + GradScores::BYTES, 3>;
};

struct WideOnePassTiles : WideOnePassShape::Stages {
    using Shape = WideOnePassShape;
    using GradScores = Shape::GradScores;
    using Scores = Accumulator<1, TOKENS>;
    using Operand = uint32_t[TOKENS / 16][4];
    using Gradient = Accumulator<1, round_up(HEAD_DIM, 16)>;
    using GradQuery = Accumulator<1, QuerySums::PART_COLUMNS>;
    static constexpr int WAVES = Shape::WAVES, COPIERS = Shape::COPIERS, TEAM_THREADS = 128;
    static constexpr int SHARED_BYTES =
        TILE_BYTES + Shape::PROBABILITIES_BYTES + GradScores::BYTES + STAGE_BARRIERS_BYTES + 4 * mbarrier::BYTES;
    static_assert(STAGES == 2, "the stage says which tile this is");
    static_assert(QuerySums::PARTS == 2 && QuerySums::PART_BYTES == PassingX::BYTES, "dQ fits where Q and dO were");

    SharedAddress tile; /* the current stage */

    __device__ __forceinline__ explicit WideOnePassTiles(SharedAddress shared) : Shape::Stages(shared) {
        if (thread_in_block() == 0) {
            make_barriers(1);
            for (int i = 0; i < STAGES; ++i) mbarrier::make(to_be_added(i), 2 * TEAM_THREADS);
            mbarrier::make(probable(), TEAM_THREADS), mbarrier::make(weighed(), TEAM_THREADS);
            mbarrier::make(scored(), TEAM_THREADS), mbarrier::make(multiplied(), 2 * TEAM_THREADS);
        }
        barrier();
    }
    __device__ __forceinline__ SharedAddress probabilities() const { return this->stage(STAGES); }
    __device__ __forceinline__ SharedAddress grad_scores() const {
        return probabilities() + Shape::PROBABILITIES_BYTES;
    }
    /* Of a stage: the tile's gradient is there, in its place. The stage is empty when that has been added. */
    __device__ __forceinline__ SharedAddress to_be_added(int i) const { return empty(i) + 8; }
    /* P is there; has been read. dS is there; has been multiplied. */
    __device__ __forceinline__ SharedAddress probable() const { return full(STAGES); }
    __device__ __forceinline__ SharedAddress weighed() const { return probable() + 8; }
    __device__ __forceinline__ SharedAddress scored() const { return probable() + 16; }
    __device__ __forceinline__ SharedAddress multiplied() const { return probable() + 24; }
    /* Which tile this is, modulo 2. */
    __device__ __forceinline__ uint32_t odd() const { return static_cast<uint32_t>(current); }

    /* The lane that adds */
    __device__ __forceinline__ void add_up(const QuerySums &sums, int index, int64_t place, uint32_t turn) {
        const int at = index % STAGES;
        wait_for_turn(sums, place, turn);
        mbarrier::wait(to_be_added(at), index / STAGES % 2);
        add_to_sums(sums, place, turn, this->stage(at), empty(at));
    }

    /* The consumers */
    static __device__ __forceinline__ int wave_row() { return wave() % 4 * ROW_TILE; }
    __device__ __forceinline__ void publish() {
        mbarrier::wait(full(current), turn);
        wgmma::shared_is_written();
        tile = this->stage(current);
    }
    template <class Matrix> static __device__ __forceinline__ void finish(Matrix &matrix) {
        wgmma::wait<0>();
        changed(matrix);
    }
    __device__ __forceinline__ void term(int which, int column, float (&run)[2]) const {
        term_at(tile, which, column, run);
    }
    /* Of the own rows and the tile: x or, VALUES, y */
    template <bool VALUES> __device__ __forceinline__ void multiply(Scores &s) const {
        multiply_rows<OwnX, PassingX, HEAD_DIM>(this->own + (VALUES ? OwnX::BYTES : 0),
                                                tile + (VALUES ? PassingX::BYTES : 0), s);
    }
    template <bool VALUES> __device__ __forceinline__ void add(const Operand &a, Gradient &gradient) const {
        multiply_columns<PassingX, Gradient::TILES * 8>(a, tile + (VALUES ? PassingX::BYTES : 0), gradient);
    }
    __device__ __forceinline__ SharedAddress place_of_probabilities() const {
        return probabilities() + thread_in_block() % TEAM_THREADS * 16;
    }
    __device__ __forceinline__ void hand_over(const Scores &p) const {
        mbarrier::wait(weighed(), odd() ^ 1);
#pragma unroll
        for (int n = 0; n < Scores::TILES; ++n) {
            const float(&c)[4] = p.tile[0][n];
            shared_store(place_of_probabilities() + n * TEAM_THREADS * 16, make_float4(c[0], c[1], c[2], c[3]));
        }
        mbarrier::arrive(probable());
    }
    __device__ __forceinline__ void take_over(Scores &p) const {
        mbarrier::wait(probable(), odd());
#pragma unroll
        for (int n = 0; n < Scores::TILES; ++n) {
            const float4 c = shared_load<float4>(place_of_probabilities() + n * TEAM_THREADS * 16);
            p.tile[0][n][0] = c.x, p.tile[0][n][1] = c.y, p.tile[0][n][2] = c.z, p.tile[0][n][3] = c.w;
        }
        mbarrier::arrive(weighed());
    }
    __device__ __forceinline__ void publish_grad_scores(const Operand &a) const {
        mbarrier::wait(multiplied(), odd() ^ 1);
        const SharedAddress lane_row = grad_scores() + GradScores::chunk(wave_row() + lane() % 16, lane() / 16);
#pragma unroll
        for (int j = 0; j < TOKENS / 16; ++j) store_matrices(GradScores::at(lane_row, 0, j), a[j]);
        wgmma::shared_is_written();
        mbarrier::arrive(scored());
    }
    template <int PART> __device__ __forceinline__ void add_to_queries() {
        mbarrier::wait(scored(), odd());
        GradQuery dq;
        const wgmma::Matrix s = wgmma::matrix(grad_scores());
        const wgmma::Matrix k =
            wgmma::matrix(this->own + PART * QuerySums::PART_COLUMNS / 64 * OwnX::BLOCK_BYTES, OwnX::BLOCK_BYTES);
        wgmma::begin();
#pragma unroll
        for (int j = 0; j < ROWS / 16; ++j)
            wgmma::Product<QuerySums::PART_COLUMNS>::multiply_both_transposed(dq.tile[0], s + j * 16 * 128 / 16,
                                                                              k + j * 16 * 128 / 16, j > 0);
        wgmma::end();
        finish(dq);
        mbarrier::arrive(multiplied());
        meet(2 + PART, TEAM_THREADS); /* no wave of the warpgroup reads the tile any more */
        store_sums(dq, tile + PART * QuerySums::PART_BYTES);
        wgmma::shared_is_written();
        mbarrier::arrive(to_be_added(current));
    }
    template <int COLUMNS, class RowPointer>
    __device__ __forceinline__ void store(const Gradient &gradient, RowPointer row) const {
        Shape::Stages::template store<COLUMNS>(gradient, wave_row(), 0, row);
    }
};

struct WideOnePassLoop : OnePassForm<WideOnePassTiles> {
    /* As BackwardTileLoop::attend, but either gradient may be a NoGradient. */
    template <class Finish>
    static __device__ __forceinline__ void attend(const Share &share, SharedAddress shared, Finish finish) {
        Tile tile(shared);
        NoGradient none;
        if (wave() >= Tile::WAVES) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
            if (wave() < Tile::WAVES + Tile::COPIERS / WAVE) tile.copy_all(share);
            else if (wave() == Tile::WAVES + Tile::COPIERS / WAVE && lane() == 0)
                add_in_turn(share, [&](const QuerySums &sums, int index, int64_t place, uint32_t turn) {
                    tile.add_up(sums, index, place, turn);
                });
            return;
        }
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        Gradient gradient;
        gradient.clear();
        if (share.tiles > 0) {
            if (wave() < Tile::WAVES / 2) consume<true>(share, tile, gradient);
            else consume<false>(share, tile, gradient);
            changed(gradient);
            meet(1, Tile::WAVES * WAVE); /* gradients go by way of the own rows */
        }
        if (wave() < Tile::WAVES / 2) {
            tile.own += Tile::OwnX::BYTES; /* the way that its gradient goes is that of its operand */
            finish(tile, none, gradient);
        } else {
            finish(tile, gradient, none);
        }
    }

    /* VALUES: the first warpgroup's part. */
    template <bool VALUES>
    static __device__ __forceinline__ void consume(const Share &share, Tile &tile, Gradient &gradient) {
        const Range all_see = share.all_see(share.block_row, ROWS);
        Rows rows(share, share.block_row + Tile::wave_row());
        for (int head = 0; head < share.heads_passing; ++head) {
            rows.begin_head(head);
            for (int count = 0; count < share.tiles; ++count) {
                const int first = share.tile_row(count);
                const bool masked = first < all_see.low || first + Tile::TOKENS > all_see.high;
                Scores s;
                Tile::Operand a;
                tile.publish();
                tile.template multiply<!VALUES>(s);
                tile.finish(s);
                if constexpr (VALUES) {
                    Scores derivative;
                    rows.probabilities(tile, s, derivative, first);
                    if (masked) rows.hide(s, first);
                    if (DROPOUT) rows.drop(s, first);
                    if constexpr (DROPOUT) round_operands(rows.kept(s), a);
                    else round_operands(s, a);
                    if (SOFTCAP)
#pragma unroll
                        for (int n = 0; n < Scores::TILES; ++n)
#pragma unroll
                            for (int i = 0; i < 4; ++i) s.tile[0][n][i] *= derivative.tile[0][n][i];
                    tile.hand_over(s);
                    tile.template add<true>(a, gradient);
                    tile.template add_to_queries<1>();
                } else {
                    Scores p;
                    tile.take_over(p);
                    rows.template grad_scores<false>(tile, p, p, s);
                    if (masked) rows.hide(s, first); /* 0 * inf or 0 * NaN */
                    round_operands(s, a);
                    tile.publish_grad_scores(a);
                    tile.template add<false>(a, gradient);
                    tile.template add_to_queries<0>();
                }
                tile.advance();
            }
        }
    }
};

} // namespace aiter

#endif
