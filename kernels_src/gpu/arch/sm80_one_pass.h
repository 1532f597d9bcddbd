/* GRAD_ALL with mma.sync (see backward.h), at 64 and 128 columns: blocks of 128 keys, tiles of 64 queries. S and dP have
 * a row for each key, and a wave computes patches of 32 x 32 of them. What it reads from shared memory then serves two
 * products; with patches of 16 x 64 the keys' gradients would read twice as much, and shared memory is what mma.sync
 * waits for.
 *
 *                  64 columns: 4 waves, two blocks        128 columns: 8 waves, in teams of two
 *     S, dP        32 keys, both halves of the queries    32 keys, each wave of the team one half of the queries
 *     dV, dK       32 keys, all columns                   32 keys, each half of the columns
 *     dQ           32 queries x 32 columns                the same
 *
 *     shared memory    own K | own V | stage 0 | stage 1 | dS | of teams: P        a stage: Q | dO | LSE | delta
 *
 * A tile, from top to bottom:
 *
 *     (barrier)    the tile is there, the next one sets off
 *     S            then one lane tells that this block has added to the tile before: stores of a while ago. And all ask
 *                  how many have added to this one
 *     P            exp2(S - LSE);          dV += P dO         of teams dP before it, without a soft cap
 *     dP, dS       P (dP - delta), 16 bits of it to shared memory, of teams P as well
 *                  if all blocks before this one have added to the tile, its sums set off; else they are waited for
 *     dK           += dS Q
 *     (barrier)    dS is there
 *     dV, dK       of teams: the other half of the queries
 *     dQ           sums += dS^T K, and back to memory
 *
 * So neither sums nor counters are waited for where it is the block's turn. A block waits only for blocks with earlier
 * tickets: why that ends, whatever number of them is at work, see sm90_one_pass.h. */
#ifndef AITER_GPU_ARCH_SM80_ONE_PASS_H
#define AITER_GPU_ARCH_SM80_ONE_PASS_H

#include "gpu/arch/sm80_backward.h"
#include "gpu/backward_loop.h"

namespace aiter {

/* What other blocks have written, past this multiprocessor's cache. Neither acquires: a branch on what the first has
 * loaded keeps the second behind it, and both are answered by the cache that all share. */
__device__ __forceinline__ uint32_t load_shared_by_all(const uint32_t *from) {
    uint32_t x;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}
/* Zeros, and nothing read, when not `valid`. */
__device__ __forceinline__ void load_shared_by_all(float (&x)[4], const char *from, bool valid) {
    asm volatile("{\n"
                 ".reg .pred valid;\n"
                 "setp.ne.b32 valid, %5, 0;\n"
                 "mov.f32 %0, 0f00000000;\n"
                 "mov.f32 %1, 0f00000000;\n"
                 "mov.f32 %2, 0f00000000;\n"
                 "mov.f32 %3, 0f00000000;\n"
                 "@valid ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];\n"
                 "}\n"
                 : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                 : "l"(from), "r"(int(valid))
                 : "memory");
}

struct OnePassShape {
    static constexpr int TEAM = HEAD_DIM <= 64 ? 1 : 2, BLOCKS = ONE_PASS_BLOCKS;
    static constexpr int WAVES = 8 / BLOCKS, THREADS = WAVES * WAVE;
    static constexpr int PATCH = 32; /* keys, or queries, of a wave's scores */
    static constexpr int ROWS = WAVES / TEAM * PATCH, TOKENS = QuerySums::ROWS, STAGES = 2;
    using Stages = TilesInTurn<BackwardTiles<HEAD_DIM, HEAD_DIM, GRAD_ALL, ROWS, TOKENS, STAGES, THREADS, 128>>;
    static_assert(TOKENS == 2 * PATCH, "queries have two halves");
};

struct OnePassTiles : OnePassShape::Stages {
    using Shape = OnePassShape;
    using Tiles = Shape::Stages;
    static constexpr int TEAM = Shape::TEAM, PATCH = Shape::PATCH, STEPS = PATCH / 16;
    /* Behind the stages: dS and, of teams, P. */
    using Passed = BlockLayout<ROWS, TOKENS>;
    static constexpr int SHARED_BYTES = TILE_BYTES + TEAM * Passed::BYTES;
    using Scores = Accumulator<STEPS, PATCH>;
    using Operand = uint32_t[STEPS][STEPS][4];
    using Gradient = Accumulator<STEPS, HEAD_DIM / TEAM>;
    static constexpr int QUERY_COLUMNS = HEAD_DIM / (Shape::WAVES / 2);
    using GradQuery = Accumulator<STEPS, QUERY_COLUMNS>;

    const int number; /* of the wave */
    int half;         /* of the tile's queries, at hand */

    __device__ __forceinline__ explicit OnePassTiles(SharedAddress shared) : Tiles(shared), number(wave()) {
        half = TEAM == 1 ? 0 : number % 2;
    }

    __device__ __forceinline__ int key() const { return number / TEAM * PATCH; }
    static __device__ __forceinline__ int wave_row() { return wave() / TEAM * PATCH; }
    __device__ __forceinline__ int column() const { return TEAM == 1 ? 0 : number % 2 * (HEAD_DIM / TEAM); }
    __device__ __forceinline__ int query() const { return number % 2 * PATCH; }
    __device__ __forceinline__ int query_column() const { return number / 2 * QUERY_COLUMNS; }
    __device__ __forceinline__ SharedAddress grad_scores() const { return stage(STAGES); }
    __device__ __forceinline__ SharedAddress probabilities() const { return grad_scores() + Passed::BYTES; }

    __device__ __forceinline__ void term(int which, int column, float (&run)[2]) const {
        Tiles::term_at(tile + half * PATCH * 4, which, column, run);
    }

    /* Of the own keys and half of the queries: x or, VALUES, y */
    template <bool VALUES> __device__ __forceinline__ void multiply(Scores &s) const {
        const SharedAddress a_lane = own + (VALUES ? OwnX::BYTES : 0) + OwnX::chunk(key() + lane() % 16, lane() / 16);
        const SharedAddress b_lane = tile + (VALUES ? PassingX::BYTES : 0) + half * PATCH * 128 +
                                     PassingX::chunk(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2);
        s.clear();
#pragma unroll
        for (int j = 0; j < HEAD_DIM / 16; ++j) {
            uint32_t a[STEPS][4];
#pragma unroll
            for (int m = 0; m < STEPS; ++m) load_matrices(a[m], OwnX::at(a_lane, m * 16, j));
#pragma unroll
            for (int n = 0; n < STEPS; ++n) {
                uint32_t b[4];
                load_matrices(b, PassingX::at(b_lane, n * 16, j));
                multiply_add(a, b, n, s);
            }
        }
    }
    /* Rows of both of a's row tiles by 16 columns. */
    template <class Matrix>
    static __device__ __forceinline__ void multiply_add(const uint32_t (&a)[STEPS][4], const uint32_t (&b)[4], int n,
                                                        Matrix &c) {
#pragma unroll
        for (int m = 0; m < STEPS; ++m) {
            aiter::multiply_add(c.tile[m][2 * n], a[m], b[0], b[1]);
            aiter::multiply_add(c.tile[m][2 * n + 1], a[m], b[2], b[3]);
        }
    }
    static __device__ __forceinline__ void round(const Scores &s, Operand &a) {
#pragma unroll
        for (int j = 0; j < STEPS; ++j)
#pragma unroll
            for (int m = 0; m < STEPS; ++m) round_operand(s, m, j, a[j][m]);
    }
    /* gradient += a B, of half of the queries: dS and x or, VALUES, P and y */
    template <bool VALUES> __device__ __forceinline__ void add(const Operand &a, int half, Gradient &gradient) const {
        const SharedAddress b_lane = tile + (VALUES ? PassingX::BYTES : 0) + half * PATCH * 128 +
                                     column() / 64 * PassingX::BLOCK_BYTES + PassingX::chunk(lane() % 16, lane() / 16);
#pragma unroll
        for (int j = 0; j < STEPS; ++j)
#pragma unroll
            for (int n = 0; n < HEAD_DIM / TEAM / 16; ++n) {
                uint32_t b[4];
                load_matrices_transposed(b, PassingX::at(b_lane, j * 16, n));
                multiply_add(a[j], b, n, gradient);
            }
    }

    /* To shared memory, and from there as an operand: the wave's keys and half of the queries. */
    __device__ __forceinline__ void pass(const Operand &a, SharedAddress to) const {
        const SharedAddress place =
            to + Passed::chunk(key() + lane() / 4, half * (PATCH / 8)) + lane() % 4 * 4; /* conflicts of banks: none */
#pragma unroll
        for (int j = 0; j < STEPS; ++j)
#pragma unroll
            for (int m = 0; m < STEPS; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    shared_store(Passed::at(place ^ (i / 2 << 4), m * 16 + i % 2 * 8, j), a[j][m][i]);
    }
    __device__ __forceinline__ void take(Operand &a, SharedAddress from, int half) const {
        const SharedAddress a_lane = from + Passed::chunk(key() + lane() % 16, lane() / 16 + half * (PATCH / 8));
#pragma unroll
        for (int j = 0; j < STEPS; ++j)
#pragma unroll
            for (int m = 0; m < STEPS; ++m) load_matrices(a[j][m], Passed::at(a_lane, m * 16, j));
    }

    /* dq += dS^T K */
    __device__ __forceinline__ void multiply_queries(GradQuery &dq) const {
        const SharedAddress a_lane =
            grad_scores() + Passed::chunk(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2 + query() / 8);
        const SharedAddress b_lane = own + query_column() / 64 * OwnX::BLOCK_BYTES +
                                     OwnX::chunk(lane() % 16, lane() / 16 + query_column() % 64 / 8);
#pragma unroll
        for (int k = 0; k < ROWS / 16; ++k) {
            uint32_t a[STEPS][4];
#pragma unroll
            for (int m = 0; m < STEPS; ++m) load_matrices_transposed(a[m], Passed::at(a_lane, k * 16, m));
#pragma unroll
            for (int n = 0; n < QUERY_COLUMNS / 16; ++n) {
                uint32_t b[4];
                load_matrices_transposed(b, OwnX::at(b_lane, k * 16, n));
                multiply_add(a, b, n, dq);
            }
        }
    }
    /* Calls each(values, where they are in a tile of QuerySums). */
    template <class Each> __device__ __forceinline__ void for_sums(GradQuery &dq, Each each) const {
        const int first = (query_column() / 8 * 4 + query() / 16) * 512 + lane() * 16;
#pragma unroll
        for (int n = 0; n < GradQuery::TILES; ++n)
#pragma unroll
            for (int m = 0; m < STEPS; ++m) each(dq.tile[m][n], first + (n * 4 + m) * 512);
    }

    template <int COLUMNS, class RowPointer>
    __device__ __forceinline__ void store(const Gradient &gradient, RowPointer row) const {
        Tiles::template store<COLUMNS>(gradient, key(), column(), row);
    }
};

struct OnePassLoop {
    using Tile = OnePassTiles;
    using Scores = Tile::Scores;
    using Share = aiter::Share<GRAD_ALL, Tile::ROWS, Tile::TOKENS>;
    static constexpr int THREADS = OnePassShape::THREADS, ROWS = Tile::ROWS, BLOCKS = OnePassShape::BLOCKS;
    static constexpr int SHARED_BYTES = Tile::SHARED_BYTES;
    static __device__ __forceinline__ int forget(int x) { return opaque(x); }

    /* See BackwardTileLoop. */
    template <class Finish>
    static __device__ __forceinline__ void attend(const Share &share, SharedAddress shared, Finish finish) {
        const Share scalars = scalar(share);
        Tile tile(shared);
        Tile::Gradient grad_x, grad_y;
        grad_x.clear(), grad_y.clear();
        if (scalars.tiles > 0) Work(scalars, tile, grad_x, grad_y).multiply();
        finish(tile, grad_x, grad_y);
    }
    /* From one lane, the compiler sees that it is the same in all, and keeps it in scalar registers: else some 50 of
     * the others would be spilled. */
    static __device__ __forceinline__ void make_scalar(int &x) { x = from_lane(x, 0); }
    static __device__ __forceinline__ Share scalar(Share share) {
        make_scalar(share.kv_head), make_scalar(share.first_head);
        make_scalar(share.row_block), make_scalar(share.block_row), make_scalar(share.own_rows);
        make_scalar(share.first), make_scalar(share.end), make_scalar(share.tiles);
        GradSequence &sequence = share.sequence;
        make_scalar(sequence.batch), make_scalar(sequence.query.count), make_scalar(sequence.key.count);
        make_scalar(sequence.mask.rows), make_scalar(sequence.mask.keys), make_scalar(sequence.mask.diagonal);
        share.from_last = from_lane(static_cast<int>(share.from_last), 0);
        return share;
    }

    struct Work {
        const Share &share;
        Tile &tile;
        Tile::Gradient &grad_x, &grad_y;
        RowWise<GRAD_ALL, Tile, Share> rows;
        QuerySums sums;
        Range seen_by_all; /* query rows that all of the wave's keys take part with */
        int place, before; /* in the sums: of this tile, and of the last */
        uint32_t turn;     /* how many blocks add to this tile before this one does */

        __device__ __forceinline__ Work(const Share &share, Tile &tile, Tile::Gradient &grad_x, Tile::Gradient &grad_y)
            : share(share), tile(tile), grad_x(grad_x), grad_y(grad_y), rows(share, share.block_row + tile.key()),
              sums(share.sequence.arguments) {
            seen_by_all = share.all_see(rows.wave_row, Tile::PATCH);
        }
        __device__ __forceinline__ void multiply() {
            Issue<Tile, Share> issue(share, tile);
            tile.load_own(share.own(), share.block_row);
            issue();
            bool begun = false;
#pragma unroll 1
            for (int head = 0; head < share.heads_passing; ++head) {
                rows.begin_head(head);
#pragma unroll 1
                for (int count = 0; count < share.tiles; ++count) {
                    const int first = share.tile_row(count);
                    place = static_cast<int>(sums.tile(share.sequence, share.first_head + head, first));
                    turn = static_cast<uint32_t>(share.turn(first));
                    tile.publish();
                    issue();
                    step(first, begun);
                    before = place, begun = true;
                }
            }
            tile.end();
            tell();
        }
        /* All waves have stored their part of the tile before, and met since. */
        __device__ __forceinline__ void tell() const {
            if (thread_in_block() == 0) add_release(sums.turns + before, 1);
        }
        __device__ __forceinline__ void step(int first, bool begun) {
            Tile::GradQuery dq;
            uint32_t added;
#pragma unroll
            for (int half = 0; half < 2 / Tile::TEAM; ++half) {
                if (Tile::TEAM == 1) tile.half = half;
                Scores p;
                Tile::Operand ds;
                const int row = first + tile.half * Tile::PATCH;
                tile.template multiply<false>(p);
                if (half == 0) {
                    if (begun) tell();
                    added = load_shared_by_all(sums.turns + place);
                }
                weigh(row, p, ds);
                tile.pass(ds, tile.grad_scores());
                if (half + 1 == 2 / Tile::TEAM) {
                    if (added < turn) wait_for_turn(sums, place, turn);
                    const char *sum = sums.sums + place * int64_t(QuerySums::TILE_BYTES);
                    tile.for_sums(dq, [&](float(&x)[4], int at) { load_shared_by_all(x, sum + at, turn > 0); });
                }
                tile.template add<false>(ds, tile.half, grad_x);
            }
            barrier();
            if (Tile::TEAM > 1) {
                Tile::Operand a;
                tile.take(a, tile.probabilities(), tile.half ^ 1);
                tile.template add<true>(a, tile.half ^ 1, grad_y);
                tile.take(a, tile.grad_scores(), tile.half ^ 1);
                tile.template add<false>(a, tile.half ^ 1, grad_x);
            }
            tile.multiply_queries(dq);
            char *sum = sums.sums + place * int64_t(QuerySums::TILE_BYTES);
            tile.for_sums(
                dq, [&](const float(&x)[4], int at) { global_store(sum + at, make_float4(x[0], x[1], x[2], x[3])); });
        }
        /* From S to P, for dV, and dS. */
        __device__ __forceinline__ void weigh(int first, Scores &p, Tile::Operand &rounded) {
            const bool masked = first < seen_by_all.low || first + Tile::PATCH > seen_by_all.high;
            constexpr bool EARLY = Tile::TEAM > 1 && !SOFTCAP; /* faster at 128 columns, slower at 64 */
            Scores derivative, ds;
            if (EARLY) tile.template multiply<true>(ds);
            rows.probabilities(tile, p, derivative, first);
            if (masked) rows.hide(p, first);
            if (DROPOUT) rows.drop(p, first);
            if constexpr (DROPOUT) Tile::round(rows.kept(p), rounded);
            else Tile::round(p, rounded);
            if (Tile::TEAM > 1) tile.pass(rounded, tile.probabilities());
            tile.template add<true>(rounded, tile.half, grad_y);
            if (SOFTCAP) /* now, as dP comes into its registers */
#pragma unroll
                for (int slot = 0; slot < Scores::SLOTS; ++slot)
#pragma unroll
                    for (int i = 0; i < Scores::VALUES; ++i) p.set(slot, i, p.get(slot, i) * derivative.get(slot, i));
            if (!EARLY) tile.template multiply<true>(ds);
            rows.template grad_scores<false>(tile, p, derivative, ds);
            if (masked) rows.hide(ds, first); /* 0 * inf or 0 * NaN */
            Tile::round(ds, rounded);
        }
    };
};

} // namespace aiter

#endif
