/* GRAD_ALL on sm_90a (see backward.h), 65 to 128 columns: two warpgroups of consumers, each with 64 keys and both their
 * gradients; tiles of 64 queries. S and dP have a row for each key. From top to bottom, one warpgroup's work on a tile:
 *
 *   matrix unit                      meanwhile
 *   dP = V dO^T                      P = exp2(S - LSE)
 *   dV += P dO                       dS = P (dP - delta), to shared memory in 16 bits
 *   dK += dS Q                       the other warpgroup's dS gets there, too
 *   dQ = dS^T K
 *   S = K Q^T of the next tile       dQ to shared memory, in float32
 *
 * From 97 columns on dV's product of each 16 queries sets off when their P is there. A tile that all of the warpgroup's keys
 * see whole goes through a body without masks.
 *
 * The other warpgroup does the same, up to a tile earlier or later: while one is at its exponentials, the other has the
 * matrix unit. Of dQ each multiplies half of the columns; up to 96 columns, where a half would be too narrow, all of
 * them, but of one of two tiles (a group).
 *
 *   copiers     Q and dO of the tiles to come, by tensor maps where all of a tile's rows exist, else 16 bytes a lane, with
 *               zeros; LSE and delta
 *   two lanes   in turns, a tile each: wait until all blocks before this one have added to it, add, tell the next
 *
 * A block waits only for blocks with earlier tickets, and a ticket is drawn when a block begins. So the earliest of the
 * blocks that have begun and not ended waits for none that is still at work: it ends, then so does the next, whatever
 * the order in which blocks begin and however few of them the device, or a part of it, has room for. */
#ifndef AITER_GPU_ARCH_SM90_ONE_PASS_H
#define AITER_GPU_ARCH_SM90_ONE_PASS_H

#include "gpu/arch/sm90_backward.h"
#include "gpu/arch/sm90_tensor_map.h"

namespace aiter {

/* The kernel's parameter: with maps of Q and dO, boxes of 64 columns of TOKENS rows, if there can be any. */
template <int TOKENS> struct MappedGradients : GradArguments {
    CUtensorMap query, grad_output;
    bool mapped;

    explicit MappedGradients(const GradArguments &call) : GradArguments(call) {
        const aiter_attention_problem &p = problem.forward;
        const auto make = [&](CUtensorMap &map, const void *tensor, const int64_t(&strides)[3]) {
            return tensor_map::make(map, tensor_map::Reuse::OFTEN, tensor, strides, p.packed_q ? 1 : p.batch,
                                    p.packed_q ? p.total_q : p.seqlen_q, p.heads_q, HEAD_DIM, TOKENS);
        };
        mapped = make(query, tensors.query, p.query_strides) &&
                 make(grad_output, tensors.grad_output, problem.grad_output_strides);
    }
};

/* CopiedTiles of queries and gradients of outputs that the bulk copy engine brings, where there are maps: then copiers
 * copy LSE and delta alone and, of tiles that have rows which count as missing, all, as before: these rows are to be
 * zeros, and may be those of another sequence. Such a tile the copiers make visible to wgmma themselves; so a consumer
 * need not, but where there are no maps and, as the own rows come by cp.async, when the first tile is there. */
template <class Tiles, int WAVES, int COPIERS, int BARRIERS_AT = 0, int BARRIERS = 2>
struct PassingTiles : CopiedTiles<Tiles, WAVES, COPIERS, BARRIERS_AT, BARRIERS> {
    using Base = CopiedTiles<Tiles, WAVES, COPIERS, BARRIERS_AT, BARRIERS>;
    using Launch = MappedGradients<Tiles::TOKENS>;
    using Base::Base, Base::current, Base::turn;
    using typename Base::PassingX;

    /* The bulk copy engine is to see the barriers, too. */
    static __device__ __forceinline__ void barriers_are_made() { mbarrier::made(); }
    template <class Share> static __device__ __forceinline__ const Launch &launch_of(const Share &share) {
        return static_cast<const Launch &>(share.sequence.arguments);
    }
    /* Must who has waited for a tile, not the first, make it visible? */
    template <class Share> static __device__ __forceinline__ bool must_publish(const Share &share) {
        return !launch_of(share).mapped;
    }
    template <class Share> __device__ __forceinline__ void copy_all(const Share &share) {
        copy_steps(
            share, share.tiles, [&](int count) { return share.tile_row(count); },
            [&](const RowPair &rows, int first, int thread) {
                this->copy_passing(this->stage(current), rows, first, thread);
            });
    }
    /* steps: of each head; row_of(count): where one begins; copy(rows, first, thread): by cp.async, to `current`. */
    template <class Share, class RowOf, class Copy>
    __device__ __forceinline__ void copy_steps(const Share &share, int steps, RowOf row_of, Copy copy) {
        if (share.tiles == 0) return;
        const Launch &launch = launch_of(share);
        const int thread = thread_in_block() - WAVES * WAVE;
        if (launch.mapped && thread == 0) tensor_map::prefetch(launch.query), tensor_map::prefetch(launch.grad_output);
        this->copy_own(share.own(), share.block_row, thread);
        RowPair passing = share.passing();
#pragma unroll 1
        for (int head = 0; head < share.heads_passing; ++head, share.sequence.next_head(passing))
#pragma unroll 1
            for (int count = 0; count < steps; ++count) {
                const int first = row_of(count);
                mbarrier::wait(this->empty(current), turn ^ 1); /* at once in the first turn */
                if (launch.mapped && first >= passing.begin && first + Tiles::TOKENS <= passing.count) {
                    if (thread < WAVE && elected()) copy_by_map(launch, share, first, share.first_head + head);
                    this->copy_terms(this->stage(current), passing, first, thread);
                    mbarrier::arrive_after_copies(this->full(current));
                } else {
                    copy(passing, first, thread);
                    if (launch.mapped) {
                        wait_for_copies();
                        wgmma::shared_is_written();
                        mbarrier::arrive(this->full(current));
                    } else {
                        mbarrier::arrive_after_copies(this->full(current));
                    }
                }
                this->advance();
            }
    }
    template <class Share>
    __device__ __forceinline__ void copy_by_map(const Launch &launch, const Share &share, int first, int head) const {
        const bool packed = launch.problem.forward.packed_q;
        const int token = first + (packed ? share.sequence.query.begin : 0);
        const int batch = packed ? 0 : share.sequence.batch;
        mbarrier::expect(this->full(current), 2 * PassingX::BYTES);
#pragma unroll
        for (int block = 0; block < PassingX::BLOCKS; ++block) {
            const SharedAddress to = this->stage(current) + block * PassingX::BLOCK_BYTES;
            tensor_map::copy(to, launch.query, block * 64, token, head, batch, this->full(current));
            tensor_map::copy(to + PassingX::BYTES, launch.grad_output, block * 64, token, head, batch,
                             this->full(current));
        }
    }
};

/* The lanes that add a block's part of the gradients of queries: calls add(sums, index, place, turn) for all tiles.
 * index: in this block; place: in the sums; turn: how many blocks add to the tile before this one. */
template <class Share, class Add> __device__ __forceinline__ void add_in_turn(const Share &share, Add add) {
    const QuerySums sums(share.sequence.arguments);
    int index = 0;
#pragma unroll 1
    for (int head = 0; head < share.heads_passing; ++head)
#pragma unroll 1
        for (int count = 0; count < share.tiles; ++count, ++index) {
            const int row = share.tile_row(count);
            const int64_t place = sums.tile(share.sequence, share.first_head + head, row);
            add(sums, index, place, static_cast<uint32_t>(share.turn(row)));
        }
}

/* Adds a tile from shared memory; arrives at `taken` when it has been read. */
__device__ __forceinline__ void add_to_sums(const QuerySums &sums, int64_t place, uint32_t turn, SharedAddress from,
                                            SharedAddress taken) {
    char *sum = sums.sums + place * QuerySums::TILE_BYTES;
    bulk::order();
    if (turn == 0) bulk::store(sum, from, QuerySums::TILE_BYTES);
    else bulk::add(sum, from, QuerySums::TILE_BYTES);
    bulk::end();
    bulk::wait_for_reads();
    mbarrier::arrive(taken);
    bulk::wait();
    bulk::order();
    add_release(sums.turns + place, 1);
}

/* To where its lanes' values are in QuerySums. */
template <class GradQuery> __device__ __forceinline__ void store_sums(const GradQuery &dq, SharedAddress to) {
#pragma unroll
    for (int n = 0; n < GradQuery::TILES; ++n) {
        const float(&c)[4] = dq.tile[0][n];
        shared_store(to + thread_in_block() % 128 * 16 + n * 128 * 16, make_float4(c[0], c[1], c[2], c[3]));
    }
}

struct OnePassShape {
    /* Whether the warpgroups each multiply all columns of one of two tiles, or half of the columns of each. */
    static constexpr bool PAIRED = QuerySums::PARTS == 1;
    static constexpr int GROUP = PAIRED ? 2 : 1;
    static constexpr int ROWS = 128, TOKENS = QuerySums::ROWS, STAGES = PAIRED ? 2 : 3;
    static constexpr int WAVES = 8;    /* of the consumers */
    static constexpr int COPIERS = 64; /* threads */
    /* Registers of a thread */
    static constexpr int CONSUMER_REGISTERS = 240, PRODUCER_REGISTERS = 24;
    /* Behind the stages: dS of a group of tiles, and their gradients of queries. */
    using GradScores = BlockLayout<ROWS, TOKENS>;
    static constexpr int GRADIENTS_BYTES = GROUP * (GradScores::BYTES + QuerySums::TILE_BYTES);
    using Stages = PassingTiles<BackwardTiles<HEAD_DIM, HEAD_DIM, GRAD_ALL, ROWS, TOKENS, STAGES, COPIERS>, WAVES,
                                COPIERS, GRADIENTS_BYTES>;
};

struct OnePassTiles : OnePassShape::Stages {
    using Shape = OnePassShape;
    using GradScores = Shape::GradScores;
    static constexpr bool PAIRED = Shape::PAIRED;
    static constexpr int GROUP = Shape::GROUP, WAVES = Shape::WAVES, COPIERS = Shape::COPIERS, TEAM_WAVES = 4;
    static constexpr int SHARED_BYTES =
        TILE_BYTES + Shape::GRADIENTS_BYTES + STAGE_BARRIERS_BYTES + 6 * mbarrier::BYTES;
    /* Whether products set off one right after the other: descriptors from scalars that are worked out once (from
     * anything else, each is made between two products), dP before the exponentials, the next tile awaited before dQ.
     * On an H100 this gave up to 3 % at 128 columns, and took 5 to 10 % at 96. */
    static constexpr bool AT_ONCE = !PAIRED;
    using Scores = Accumulator<1, TOKENS>;
    using Operand = uint32_t[TOKENS / 16][4];
    using Gradient = Accumulator<1, round_up(HEAD_DIM, 16)>;
    using GradQuery = Accumulator<1, QuerySums::PART_COLUMNS>;

    uint32_t group = 0;  /* of tiles whose gradients of queries are multiplied together */
    SharedAddress tile;  /* the current stage */
    const int kept_team; /* AT_ONCE: which warpgroup this is */

    __device__ __forceinline__ explicit OnePassTiles(SharedAddress shared)
        : Shape::Stages(shared), kept_team(wave() / 4) {
        if (thread_in_block() == 0) {
            make_barriers(2 * TEAM_WAVES), mbarrier::make(scored(), 2 * TEAM_WAVES),
                mbarrier::make(multiplied(), 2 * TEAM_WAVES);
            for (int i = 0; i < 2; ++i)
                mbarrier::make(to_be_added(i), PAIRED ? TEAM_WAVES : 2 * TEAM_WAVES), mbarrier::make(taken(i), 1);
            barriers_are_made();
        }
        barrier();
    }
    __device__ __forceinline__ SharedAddress grad_scores(int i) const {
        return this->stage(STAGES) + i * GradScores::BYTES;
    }
    __device__ __forceinline__ SharedAddress grad_query(int i) const {
        return grad_scores(GROUP) + i * QuerySums::TILE_BYTES;
    }
    /* dS is there; has been multiplied. A tile's dQ is there; its place is free again. */
    __device__ __forceinline__ SharedAddress scored() const { return full(STAGES); }
    __device__ __forceinline__ SharedAddress multiplied() const { return scored() + 8; }
    __device__ __forceinline__ SharedAddress to_be_added(int i) const { return scored() + 16 + i * 16; }
    __device__ __forceinline__ SharedAddress taken(int i) const { return to_be_added(i) + 8; }

    /* The lanes that add */
    __device__ __forceinline__ void add_up(const QuerySums &sums, int index, int64_t place, uint32_t turn) {
        const int from = PAIRED ? index % 2 : 0;
        wait_for_turn(sums, place, turn);
        mbarrier::wait(to_be_added(index % 2), index / 2 % 2);
        add_to_sums(sums, place, turn, grad_query(from), taken(from));
    }
    /* Every other tile: one can be added while the other becomes visible to all. */
    template <class Share> __device__ __forceinline__ void add_all(const Share &share, int adder) {
        add_in_turn(share, [&](const QuerySums &sums, int index, int64_t place, uint32_t turn) {
            if (index % 2 == adder) add_up(sums, index, place, turn);
        });
    }

    /* The consumers */
    static __device__ __forceinline__ int wave_row() { return wave() * ROW_TILE; }
    __device__ __forceinline__ int team() const { return AT_ONCE ? kept_team : wave() / 4; }
    __device__ __forceinline__ SharedAddress published(bool must_publish = true) const {
        mbarrier::wait(full(current), turn);
        if (must_publish) wgmma::shared_is_written();
        return AT_ONCE ? from_lane(this->stage(current), 0) : this->stage(current);
    }
    template <int OUTSTANDING, class Matrix> static __device__ __forceinline__ void finish(Matrix &matrix) {
        wgmma::wait<OUTSTANDING>();
        changed(matrix);
    }
    __device__ __forceinline__ void term(int which, int column, float (&run)[2]) const {
        term_at(tile, which, column, run);
    }
    /* Of the warpgroup's own rows and a tile's: x or, VALUES, y */
    template <bool VALUES> __device__ __forceinline__ void multiply(SharedAddress tile, Scores &s) const {
        multiply_rows<OwnX, PassingX, HEAD_DIM>(this->own + (VALUES ? OwnX::BYTES : 0) + team() * 64 * 128,
                                                tile + (VALUES ? PassingX::BYTES : 0), s);
    }
    template <bool VALUES> __device__ __forceinline__ void add(const Operand &a, Gradient &gradient) const {
        multiply_columns<PassingX, Gradient::TILES * 8>(a, tile + (VALUES ? PassingX::BYTES : 0), gradient);
    }
    /* WHICH of its group the tile is. */
    template <int WHICH> __device__ __forceinline__ void publish_grad_scores(const Operand &a) const {
        if (WHICH == 0) mbarrier::wait(multiplied(), group % 2 ^ 1);
        /* GradScores::chunk of the wave's row lane % 16, and of chunk lane / 16: no shuffle, no signed remainder. */
        const uint32_t thread = threadIdx.x;
        const SharedAddress lane_row =
            grad_scores(WHICH) + (thread / WAVE * ROW_TILE + thread % 16) * 128 + ((thread / 16 % 2 ^ thread) % 8 << 4);
#pragma unroll
        for (int j = 0; j < TOKENS / 16; ++j) store_matrices(GradScores::at(lane_row, 0, j), a[j]);
        wgmma::shared_is_written();
    }
    __device__ __forceinline__ void multiply_queries(GradQuery &dq) const {
        const wgmma::Matrix s = wgmma::matrix(grad_scores(PAIRED ? team() : 0));
        const wgmma::Matrix k = wgmma::matrix(this->own + (PAIRED ? 0 : team() * OwnX::BLOCK_BYTES), OwnX::BLOCK_BYTES);
        wgmma::begin();
#pragma unroll
        for (int j = 0; j < ROWS / 16; ++j)
            wgmma::Product<QuerySums::PART_COLUMNS>::multiply_both_transposed(dq.tile[0], s + j * 16 * 128 / 16,
                                                                              k + j * 16 * 128 / 16, j > 0);
        wgmma::end();
    }
    /* Not both: the group has one tile. */
    __device__ __forceinline__ void store_queries(const GradQuery &dq, bool both) const {
        mbarrier::arrive_as_wave(multiplied());
        if (PAIRED && !both && team() == 1) return;
        mbarrier::wait(taken(PAIRED ? team() : 0), group % 2 ^ 1);
        store_sums(dq, grad_query(PAIRED ? team() : 0) + (PAIRED ? 0 : team() * QuerySums::PART_BYTES));
        wgmma::shared_is_written();
        mbarrier::arrive_as_wave(to_be_added(PAIRED ? team() : group % 2));
    }
    template <int COLUMNS, class RowPointer>
    __device__ __forceinline__ void store(const Gradient &gradient, RowPointer row) const {
        Shape::Stages::template store<COLUMNS>(gradient, wave_row(), 0, row);
    }
};

/* What attention_backward.hip asks the loops for, beside attend(). TILE_TOKENS: queries of a tile of sums; Terms: what
 * RowWise is for. */
template <class Tiles, int TILE_TOKENS = Tiles::TOKENS, class Terms = Tiles> struct OnePassForm {
    using Tile = Tiles;
    using Scores = typename Tile::Scores;
    using Gradient = typename Tile::Gradient;
    using Share = aiter::Share<GRAD_ALL, Tile::ROWS, TILE_TOKENS>;
    using Rows = RowWise<GRAD_ALL, Terms, Share>;
    static constexpr int THREADS = Tile::WAVES * WAVE + 128, ROWS = Tile::ROWS, BLOCKS = 1;
    static constexpr int SHARED_BYTES = Tile::SHARED_BYTES;
    static __device__ __forceinline__ int forget(int x) { return opaque(x); }

    /* The copiers' own: numbers that they have no registers for would else be in local memory for consumers, too. The
     * assembler does not see that a shuffle gives what it is given. */
    static __device__ __forceinline__ Share apart(const Share &share) {
        Share result = share;
        for (int *x : {&result.kv_head, &result.first_head, &result.heads_passing, &result.block_row, &result.own_rows,
                       &result.first, &result.end, &result.tiles, &result.sequence.batch, &result.sequence.query.count,
                       &result.sequence.key.count})
            *x = from_lane(*x, 0);
        result.from_last = from_lane(int(result.from_last), 0);
        return result;
    }

    /* See BackwardTileLoop: waves that copy, two lanes that add, and both warpgroups' Consumer. */
    template <class Consumer, class Finish>
    static __device__ __forceinline__ void in_roles(const Share &share, SharedAddress shared, Finish finish) {
        Tile tile(shared);
        if (wave() >= Tile::WAVES) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Tile::Shape::PRODUCER_REGISTERS));
            const int adder = wave() - Tile::WAVES - Tile::COPIERS / WAVE;
            if (adder < 0) tile.copy_all(apart(share));
            else if (lane() == 0) tile.add_all(share, adder);
            return;
        }
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Tile::Shape::CONSUMER_REGISTERS));
        Gradient grad_x, grad_y;
        grad_x.clear(), grad_y.clear();
        if (share.tiles > 0) {
            Consumer(share, tile, grad_x, grad_y).consume();
            meet(1, Tile::WAVES * WAVE); /* gradients go by way of the own rows */
        }
        finish(tile, grad_x, grad_y);
    }
};

struct OnePassLoop : OnePassForm<OnePassTiles> {
    using Launch = Tile::Launch;

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
        int head = 0, count = 0, left; /* of the tile at hand; tiles from there on */
        /* Of a head, in the order in which they come: those in which all keys of the warpgroup take part with all rows. */
        int first_plain, plain_tiles;
        bool plain;    /* is the one at hand such a one? */
        Scores scores; /* of the tile at hand */

        __device__ __forceinline__ Consumer(const Share &share, Tile &tile, Gradient &grad_x, Gradient &grad_y)
            : share(share), tile(tile), grad_x(grad_x), grad_y(grad_y), rows(share, share.block_row + Tile::wave_row()),
              left(share.tiles * share.heads_passing) {
            const int team_row = share.block_row + tile.team() * 64;
            const Range all_see = share.all_see(team_row, 64);
            const int low = greater((all_see.low - share.first + Tile::TOKENS - 1) / Tile::TOKENS, 0);
            plain_tiles = greater((all_see.high - share.first) / Tile::TOKENS - low, 0);
            first_plain = share.from_last ? low : share.tiles - low - plain_tiles;
            look_at_tile();
        }
        __device__ __forceinline__ void consume() {
            rows.begin_head(0);
            tile.tile = tile.published();
            tile.template multiply<false>(tile.tile, scores);
            Tile::template finish<0>(scores);
            if constexpr (Tile::PAIRED) {
#pragma unroll 1
                while (left >= 2) step<0, false>(), step<1, true>();
                if (left > 0) step<0, true>();
            } else
#pragma unroll 1
                while (left > 0) step<0, true>();
            Tile::template finish<0>(scores);
            changed(grad_x), changed(grad_y);
        }
        /* dV += P dO, of 16 queries after the other: each product, a group of its own, sets off when its P is there. */
        template <int J> __device__ __forceinline__ void add_in_parts(typename Tile::Operand &a, wgmma::Matrix b) {
            if constexpr (J < Tile::TOKENS / 16) {
                constexpr int VALUES = Scores::VALUES / (Tile::TOKENS / 16);
                rows.template exponentiate<J * VALUES, (J + 1) * VALUES>(tile, scores);
                round_operand(scores, 0, J, a[J]);
                wgmma::begin();
                wgmma::Product<Gradient::TILES * 8>::multiply_transposed(grad_y.tile[0], a[J], b + J * 16 * 128 / 16);
                wgmma::end();
                add_in_parts<J + 1>(a, b);
            }
        }
        __device__ __forceinline__ void look_at_tile() {
            plain = static_cast<uint32_t>(count - first_plain) < static_cast<uint32_t>(plain_tiles);
        }
        /* WHICH of its group the tile is, and whether the last. */
        template <int WHICH, bool LAST> __device__ __forceinline__ void step() {
            /* Each its own: so what is done with a tile that all see has no branch, and exponentials and roundings mix. */
            if (!plain) step<WHICH, LAST>(share.tile_row(count), true);
            else step<WHICH, LAST>(ALIBI || DROPOUT ? share.tile_row(count) : 0, false); /* others need no place */
        }
        template <int WHICH, bool LAST> __device__ __forceinline__ void step(int first, bool masked) {
            Scores ds, derivative;
            typename Tile::Operand a;
            tile.template multiply<true>(tile.tile, ds);
            if (Tile::AT_ONCE) Tile::template finish<1>(scores); /* of before; but the assembler moves nothing across */
            if (Tile::AT_ONCE && !masked && !DROPOUT && !SOFTCAP && !ALIBI) {
                const wgmma::Matrix b = wgmma::matrix(tile.tile + Tile::PassingX::BYTES, Tile::PassingX::BLOCK_BYTES);
                add_in_parts<0>(a, b);
                Tile::template finish<Tile::TOKENS / 16>(ds);
            } else {
                rows.probabilities(tile, scores, derivative, first);
                if (masked) rows.hide(scores, first);
                if (DROPOUT) rows.drop(scores, first);
                if constexpr (DROPOUT) round_operands(rows.kept(scores), a);
                else round_operands(scores, a);
                tile.template add<true>(a, grad_y);
                Tile::template finish<1>(ds);
            }
            rows.grad_scores(tile, scores, derivative, ds);
            if (masked) rows.hide(ds, first); /* 0 * inf or 0 * NaN */
            typename Tile::Operand b;
            round_operands(ds, b);
            tile.template publish_grad_scores<WHICH>(b);
            if (LAST) mbarrier::arrive_as_wave(tile.scored());
            tile.template add<false>(b, grad_x);
            --left;
            if (++count == share.tiles) {
                count = 0;
                if (++head < share.heads_passing) rows.begin_head(head);
            }
            const SharedAddress before = tile.empty(tile.current);
            tile.advance();
            SharedAddress next = tile.tile;
            if (Tile::AT_ONCE && left > 0) next = tile.published(Tile::must_publish(share));
            typename Tile::GradQuery dq;
            if constexpr (LAST) {
                mbarrier::wait(tile.scored(), tile.group % 2);
                tile.multiply_queries(dq);
                if (!Tile::PAIRED) wgmma::wait<1>(); /* dK's operand makes room for the scores */
            }
            if (!Tile::AT_ONCE && left > 0) next = tile.published(Tile::must_publish(share));
            tile.template multiply<false>(next, scores);
            wgmma::wait<1>();
            mbarrier::arrive_as_wave(before);
            if constexpr (LAST) {
                changed(dq);
                tile.store_queries(dq, WHICH == 1);
                ++tile.group;
            }
            look_at_tile();                   /* while the scores are made */
            Tile::template finish<0>(scores); /* the assembler follows no product around a loop */
            tile.tile = next;
        }
    };
};

} // namespace aiter

#endif
