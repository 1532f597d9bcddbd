/* The backward pass's loop on sm_90a for a gradient or two at a time (see backward_loop.h), with wgmma, on the tiles of
 * arch/sm80_backward.h. All gradients in one pass: arch/sm90_one_pass.h.
 *
 *   the producer    one warpgroup copies tiles by cp.async, as far ahead as there are stages, and needs few registers
 *   the consumers   own 64 rows each, and go through the tiles independently: while one works on probabilities, another
 *                   has the matrix unit
 *
 * How they hand tiles on: CopiedTiles. */
#ifndef AITER_GPU_ARCH_SM90_BACKWARD_H
#define AITER_GPU_ARCH_SM90_BACKWARD_H

#include "gpu/arch/sm80_backward.h"
#include "gpu/arch/sm90.h"
#include "gpu/backward_loop.h"

namespace aiter {

/* s = A B^T, of a warpgroup's 64 rows of A and COLUMNS columns of both */
template <class Own, class Passing, int COLUMNS, class Scores>
__device__ __forceinline__ void multiply_rows(SharedAddress a_rows, SharedAddress b_rows, Scores &s) {
    const wgmma::Matrix a = wgmma::matrix(a_rows), b = wgmma::matrix(b_rows);
    wgmma::begin();
#pragma unroll
    for (int j = 0; j < round_up(COLUMNS, 16) / 16; ++j)
        wgmma::Product<Scores::TILES * 8>::multiply(s.tile[0], a + (j / 4 * Own::BLOCK_BYTES + j % 4 * 32) / 16,
                                                    b + (j / 4 * Passing::BLOCK_BYTES + j % 4 * 32) / 16, j > 0);
    wgmma::end();
}

/* A warpgroup's 64 x (16 * DEPTH) values as the left side of a product. */
template <int DEPTH, class Scores>
__device__ __forceinline__ void round_operands(const Scores &s, uint32_t (&a)[DEPTH][4]) {
#pragma unroll
    for (int j = 0; j < DEPTH; ++j) round_operand(s, 0, j, a[j]);
}

/* o += A B, in products of WIDTH columns */
template <class Passing, int WIDTH, int DEPTH, class Gradient>
__device__ __forceinline__ void multiply_columns(const uint32_t (&a)[DEPTH][4], SharedAddress b_rows, Gradient &o) {
    const wgmma::Matrix b = wgmma::matrix(b_rows, Passing::BLOCK_BYTES);
    wgmma::begin();
#pragma unroll
    for (int n = 0; n < Gradient::TILES * 8 / WIDTH; ++n)
#pragma unroll
        for (int j = 0; j < DEPTH; ++j)
            wgmma::Product<WIDTH>::multiply_transposed(&o.tile[0][n * 8], a[j],
                                                       b + (n * Passing::BLOCK_BYTES + j * 16 * 128) / 16);
    wgmma::end();
}

/* Tiles that waves past the first WAVES copy, as far ahead as there are stages, for those. Two barriers in shared
 * memory (mbarrier), and room for more of a loop's own, belong to each stage, BARRIERS_AT bytes behind the last:
 * `full` is complete when all copies of a tile have arrived, `empty` when all who use it have said that they need it
 * no more (mbarrier::arrive_as_wave). compute-sanitizer's racecheck follows each thread's own arrivals only: where one
 * lane arrives for its wave, it reports the other lanes' reads of LSE and delta. */
template <class Tiles, int WAVES, int COPIERS, int BARRIERS_AT = 0, int BARRIERS = 2> struct CopiedTiles : Tiles {
    static constexpr int STAGE_BARRIERS_BYTES = Tiles::STAGES * BARRIERS * mbarrier::BYTES;

    int current = 0;   /* stage */
    uint32_t turn = 0; /* how often, modulo 2, the stages have been gone through */

    using Tiles::Tiles;
    __device__ __forceinline__ SharedAddress full(int i) const {
        return this->stage(Tiles::STAGES) + BARRIERS_AT + i * BARRIERS * mbarrier::BYTES;
    }
    __device__ __forceinline__ SharedAddress empty(int i) const { return full(i) + mbarrier::BYTES; }
    __device__ __forceinline__ void make_barriers(int arrivals) const {
        for (int i = 0; i < Tiles::STAGES; ++i) mbarrier::make(full(i), COPIERS), mbarrier::make(empty(i), arrivals);
    }
    __device__ __forceinline__ void advance() {
        if (++current == Tiles::STAGES) current = 0, turn ^= 1;
    }

    /* The copiers' part */
    template <class Share> __device__ __forceinline__ void copy_all(const Share &share) {
        if (share.tiles == 0) return;
        this->copy_own(share.own(), share.block_row, thread_in_block() - WAVES * WAVE);
        Issue<CopiedTiles, Share> issue(share, *this);
        for (int count = 0; count < share.tiles * share.heads_passing; ++count) issue();
    }
    __device__ __forceinline__ void issue(const RowPair &rows, int first) {
        mbarrier::wait(empty(current), turn ^ 1); /* at once in the first turn */
        this->copy_passing(this->stage(current), rows, first, thread_in_block() - WAVES * WAVE);
        mbarrier::arrive_after_copies(full(current));
        advance();
    }
    __device__ __forceinline__ void skip() {}
};

template <int HEAD_DIM, int VALUE_DIM, int PASS> struct BackwardWarpgroupShape {
    static constexpr int WIDER = greater(HEAD_DIM, VALUE_DIM);
    /* Of the consumers. With twelve there is always one that multiplies, if they get by on the registers. */
    static constexpr int WAVES = WIDER > 192 ? 4 : WIDER <= 64 && PASS == GRAD_QUERY ? 12 : 8;
    static constexpr int STAGES = WIDER <= 128 ? 4 : 2;
    static constexpr int COPIERS = 128; /* threads */
    /* Registers of a thread. A block of n threads starts with 65536 / n each and then deals them out anew. */
    static constexpr int CONSUMER_REGISTERS = WAVES == 12 ? 152 : WIDER <= 64 ? 224 : 240;
    static constexpr int PRODUCER_REGISTERS = WIDER <= 64 ? 56 : 24;
};

template <int HEAD_DIM, int VALUE_DIM, int PASS, class Shape = BackwardWarpgroupShape<HEAD_DIM, VALUE_DIM, PASS>>
using BackwardWarpgroupStages =
    CopiedTiles<BackwardTiles<HEAD_DIM, VALUE_DIM, PASS, Shape::WAVES * ROW_TILE, 64, Shape::STAGES, Shape::COPIERS>,
                Shape::WAVES, Shape::COPIERS>;

template <int HEAD_DIM, int VALUE_DIM, int PASS>
struct BackwardWarpgroupTiles : BackwardWarpgroupStages<HEAD_DIM, VALUE_DIM, PASS> {
    using Shape = BackwardWarpgroupShape<HEAD_DIM, VALUE_DIM, PASS>;
    using Tiles = BackwardWarpgroupStages<HEAD_DIM, VALUE_DIM, PASS>;
    static constexpr int WAVES = Shape::WAVES, TEAM = 4, TOKENS = 64;
    /* Groups of products that run on into the next tile: their operands are in registers that nothing else can use. */
    static constexpr int RUN_ON = PASS == GRAD_KEY_VALUE && Shape::WIDER > 64 ? 0 : 1;
    using typename Tiles::OwnX, typename Tiles::OwnY, typename Tiles::PassingX, typename Tiles::PassingY;
    static constexpr int SHARED_BYTES = Tiles::TILE_BYTES + Tiles::STAGE_BARRIERS_BYTES;
    using Scores = Accumulator<1, TOKENS>;
    using GradX = Accumulator<1, round_up(HEAD_DIM, 64)>;
    using GradY = Accumulator<1, round_up(VALUE_DIM, 64)>;

    SharedAddress tile;  /* the current stage */
    int unreleased = -1; /* the stage before, while products that read it may run */

    __device__ __forceinline__ explicit BackwardWarpgroupTiles(SharedAddress shared) : Tiles(shared) {
        if (thread_in_block() == 0) this->make_barriers(WAVES);
        barrier();
    }

    /* The producer */
    __device__ __forceinline__ bool produces() const { return wave() >= WAVES; }
    static __device__ __forceinline__ void begin_to_produce() {
        if (WAVES > 4) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Shape::PRODUCER_REGISTERS));
    }

    /* The consumers */
    static __device__ __forceinline__ void begin_to_consume() {
        if (WAVES > 4) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Shape::CONSUMER_REGISTERS));
    }
    __device__ __forceinline__ void publish() {
        mbarrier::wait(this->full(this->current), this->turn);
        wgmma::shared_is_written();
        tile = this->stage(this->current);
    }
    /* All but the latest N groups of products are done; the stage before this one is needed no more. */
    template <int OUTSTANDING> __device__ __forceinline__ void release() {
        wait<OUTSTANDING>();
        wave_sync();
        if (unreleased >= 0) mbarrier::arrive_as_wave(this->empty(unreleased));
        unreleased = this->current;
        this->advance();
    }
    template <int OUTSTANDING> static __device__ __forceinline__ void wait() { wgmma::wait<OUTSTANDING>(); }
    template <int OUTSTANDING, class Matrix> static __device__ __forceinline__ void finish(Matrix &matrix) {
        wait<OUTSTANDING>();
        changed(matrix);
    }
    __device__ __forceinline__ void end() { asm volatile("bar.sync 1, %0;" ::"n"(WAVES * WAVE) : "memory"); }

    static __device__ __forceinline__ int wave_row() { return wave() * ROW_TILE; }
    /* In the own x; of the own y, BlockLayout has rows of the same length. */
    static __device__ __forceinline__ int team_rows() { return wave() / TEAM * TEAM * ROW_TILE * 128; }
    __device__ __forceinline__ void scores(Scores &s) const {
        multiply_rows<OwnX, PassingX, HEAD_DIM>(this->own + team_rows(), tile, s);
    }
    __device__ __forceinline__ void grad_probabilities(Scores &dp) const {
        multiply_rows<OwnY, PassingY, VALUE_DIM>(this->own + OwnX::BYTES + team_rows(), tile + PassingX::BYTES, dp);
    }
    __device__ __forceinline__ void add_to_x(const Scores &ds, GradX &dx) const {
        uint32_t a[TOKENS / 16][4];
        round_operands(ds, a);
        multiply_columns<PassingX, 64>(a, tile, dx);
    }
    __device__ __forceinline__ void add_to_y(const Scores &p, GradY &dy) const {
        uint32_t a[TOKENS / 16][4];
        round_operands(p, a);
        multiply_columns<PassingY, 64>(a, tile + PassingX::BYTES, dy);
    }
    __device__ __forceinline__ void term(int which, int column, float (&run)[2]) const {
        Tiles::term_at(tile, which, column, run);
    }

    template <int COLUMNS, class Gradient, class RowPointer>
    __device__ __forceinline__ void store(const Gradient &gradient, RowPointer row) const {
        Tiles::template store<COLUMNS>(gradient, wave_row(), 0, row);
    }
};

template <int PASS> struct BackwardWarpgroupLoop {
    using Tile = BackwardWarpgroupTiles<HEAD_DIM, VALUE_DIM, PASS>;
    using Scores = typename Tile::Scores;
    using GradX = typename Tile::GradX;
    using GradY = typename Tile::GradY;
    using Share = aiter::Share<PASS, Tile::ROWS, Tile::TOKENS>;
    static constexpr int THREADS = Tile::WAVES * WAVE + 128, ROWS = Tile::ROWS, BLOCKS = 1;
    static constexpr int SHARED_BYTES = Tile::SHARED_BYTES;
    static constexpr bool BOTH_IN_ONE_PASS = Tile::BOTH_IN_ONE_PASS;
    static __device__ __forceinline__ int forget(int x) { return opaque(x); }

    /* See BackwardTileLoop. */
    template <class Finish>
    static __device__ __forceinline__ void attend(const Share &share, SharedAddress shared, Finish finish) {
        Tile tile(shared);
        if (tile.produces()) {
            tile.begin_to_produce();
            tile.copy_all(share);
        } else {
            tile.begin_to_consume();
            GradX grad_x;
            GradY grad_y;
            if (gives_x(PASS)) grad_x.clear();
            if (gives_y(PASS)) grad_y.clear();
            if (share.tiles > 0) consume(share, tile, grad_x, grad_y);
            finish(tile, grad_x, grad_y);
        }
    }

    static __device__ __forceinline__ void consume(const Share &share, Tile &tile, GradX &grad_x, GradY &grad_y) {
        /* As in BackwardTileLoop, but of a warpgroup's rows: its waves multiply together. */
        constexpr int TEAM_ROWS = Tile::TEAM * ROW_TILE;
        const int team_row = share.block_row + wave() / Tile::TEAM * TEAM_ROWS;
        const Range first_sees = share.sees(team_row);
        const Range last_sees = share.sees(lesser(team_row + TEAM_ROWS, share.own_rows) - 1);
        const int seen_end = team_row < share.own_rows ? last_sees.high : 0;
        RowWise<PASS, Tile, Share> rows(share, share.block_row + wave() * ROW_TILE);
        for (int head = 0; head < share.heads_passing; ++head) {
            rows.begin_head(head);
            for (int count = 0; count < share.tiles; ++count) {
                const int first = share.tile_row(count);
                tile.publish();
                const int end = first + Tile::TOKENS;
                if (end <= first_sees.low || first >= seen_end) { /* the tile is the other waves' */
                    tile.template release<0>();
                    continue;
                }
                const bool masked = first < last_sees.low || end > first_sees.high;
                Scores p, derivative, ds;
                tile.scores(p);
                if (gives_x(PASS)) tile.grad_probabilities(ds);
                tile.template release<gives_x(PASS) ? 2 : 1>();
                tile.template finish<gives_x(PASS) ? 1 : 0>(p);
                rows.probabilities(tile, p, derivative, first);
                if (masked) rows.hide(p, first);
                if (DROPOUT) rows.drop(p, first);
                if constexpr (gives_y(PASS) && DROPOUT) tile.add_to_y(rows.kept(p), grad_y);
                else if (gives_y(PASS)) tile.add_to_y(p, grad_y);
                if (!gives_x(PASS)) continue;
                tile.template finish<gives_y(PASS) ? 1 : 0>(ds);
                rows.grad_scores(tile, p, derivative, ds);
                if (masked) rows.hide(ds, first); /* 0 * inf or 0 * NaN */
                tile.add_to_x(ds, grad_x);
                tile.template wait<Tile::RUN_ON>();
            }
        }
        if (gives_y(PASS)) tile.template finish<0>(grad_y);
        if (gives_x(PASS)) tile.template finish<0>(grad_x);
        tile.end();
    }
};

} // namespace aiter

#endif
