/* The loop over the tiles of keys, for every arch whose waves work alone.
 *
 *   publish     the tile that was on its way is the current one (block barrier)
 *   issue       the tile after it sets off: its copy runs during what follows; on AMD with the scores
 *   scores      S = Q K^T          matrix unit
 *   finish      what score.h does to them: normally nothing
 *   hide        only where an edge of what the rows see cuts the tile
 *   update      P = exp2(S - max)  vector unit, while other waves use the matrix unit
 *   dropout     zeros in P: normally none, see dropout.h
 *   accumulate  O += P V           matrix unit
 *
 * A loop is a struct with the members of this one; an arch with a better way to go through the tiles brings its own,
 * and attention_forward.hip picks it. */
#ifndef AITER_GPU_TILE_LOOP_H
#define AITER_GPU_TILE_LOOP_H

#include "gpu/arch.h"
#include "gpu/dropout.h"
#include "gpu/mask.h"
#if AITER_CUT && defined(AITER_GFX9)
#include "gpu/arch/gfx9_pieces.h"
#else
#include "gpu/pieces.h"
#endif
#include "gpu/score.h"
#include "gpu/sequence.h"
#include "gpu/softmax.h"

namespace aiter {

/* Whether heads that read one KV head share row tiles (Packing): not with slopes nor dropout, which are a head's. Without
 * wgmma NVIDIA's loop could, too: it has not run so. */
#if defined(AITER_GFX9)
constexpr bool HEADS_SHARE_ROW_TILES = !ALIBI && !DROPOUT;
#else
constexpr bool HEADS_SHARE_ROW_TILES = false;
#endif

/* The kernel's parameter: the call, and what these loops add to it. */
template <class Work> struct LaunchOfWaves : Arguments {
    Packing<HEADS_SHARE_ROW_TILES> packing;
    bool four_waves = false; /* see AlternatingLoop */
    Work work;

    LaunchOfWaves(const Arguments &call, const Packing<HEADS_SHARE_ROW_TILES> &packing)
        : Arguments(call), packing(packing) {}
};

/* What attention_forward.hip asks of who has output in registers, and no other way to memory than from there. */
struct StoresFromRegisters {
    using OutputPlace = SharedAddress;
    /* See WarpgroupLoop. */
    template <class Launch, class RowTile>
    static __device__ __forceinline__ bool can_send(const Launch &, const RowTile &, int) {
        return false;
    }
    template <class Output, class Place>
    static __device__ __forceinline__ bool round_output(const Output &, const Place &) {
        return MASKED;
    }
    template <class RowTile, class Place>
    static __device__ __forceinline__ void leave(const RowTile &, int, const Place &) {}
};

/* What loops have in common whose waves, or teams of waves, have rows of their own. `Loop` is the one that is made of
 * this: it has SHARED_BYTES, TILE_BYTES of them for keys and values, and attend(), which leaves in `o` the sums of P V and
 * in `softmax` what they must be divided by. PART_WAVES: that the part of a piece has room for. */
template <class Loop, int HEAD_DIM, int VALUE_DIM, class Tile, int PART_WAVES = Tile::WAVES>
struct LoopOfWaves : Tile, StoresFromRegisters {
    using Queries = Query<HEAD_DIM, Tile::ROW_TILES, Tile::TEAM>;
    using Scores = Accumulator<Tile::ROW_TILES, Tile::KEYS>;
    using Output = Accumulator<Tile::ROW_TILES, columns_of_wave(VALUE_DIM, Tile::TEAM)>;
    using Softmax = OnlineSoftmax<Output::SLOTS>;
    static constexpr int THREADS = Tile::WAVES * WAVE;
    static constexpr int TEAM = Tile::TEAM, TEAMS = Tile::WAVES / TEAM; /* without teams, of one wave each */
    static constexpr int WAVE_ROWS = Tile::ROW_TILES * ROW_TILE, BLOCK_ROWS = TEAMS * WAVE_ROWS;
    static constexpr bool SEVERAL_HEADS = HEADS_SHARE_ROW_TILES;
    using Packing = aiter::Packing<SEVERAL_HEADS>;
    /* Of a team's queries and, later, its output. */
    static constexpr int TEAM_BYTES = greater(Queries::SHARED_BYTES, Query<VALUE_DIM, Tile::ROW_TILES>::SHARED_BYTES);

    /* What a block has to do: a row tile or, in kernels that cut keys, pieces of one. */
#if AITER_CUT && defined(AITER_GFX9)
    using Work = PiecesOfBlocks<Tile::KEYS, PART_WAVES, Output>;
#else
    using Work = WholeRowTiles;
#endif
    using Launch = LaunchOfWaves<Work>;

    /* As many heads share a row tile as it has room for all rows of. */
    static Packing packing_of(const aiter_attention_problem &p) { return Packing(p, BLOCK_ROWS); }
    static Launch launch_of(const aiter_attention_call &call) { return {call, packing_of(call.problem)}; }
    static int start_blocks(void (*kernel)(Launch), const Launch &launch, int64_t count, void *stream) {
        return launch_with_shared(kernel, count, Loop::THREADS, Loop::SHARED_BYTES, stream, launch);
    }
#if AITER_CUT && defined(AITER_GFX9)
    static Work work_of(const aiter_attention_problem &p, int64_t row_tiles, int compute_units) {
        const int64_t rows = int64_t(p.seqlen_q) << packing_of(p).bits;
        return Work(p, row_tiles, lesser<int64_t>(rows, BLOCK_ROWS), compute_units);
    }
    /* Blocks that have a place for their sum of pieces: as many as are at work at one time. */
    static int places(int compute_units) { return compute_units * Tile::BLOCKS; }
    static int64_t workspace_bytes(const aiter_attention_problem &p, int64_t row_tiles) {
        return most_of_devices([&](int compute_units) {
            return work_of(p, row_tiles, compute_units).workspace_bytes(row_tiles, places(compute_units));
        });
    }
    /* add_up: the second kernel, where pieces are dealt. start_scored(launch): where others than `kernel` make the parts. */
    template <class StartScored>
    static int start(void (*kernel)(Launch), const aiter_attention_call &call, int64_t row_tiles, void *stream,
                     void (*add_up)(Launch), StartScored start_scored) {
        int device = 0;
        if (const hipError_t error = hipGetDevice(&device)) return error;
        const int compute_units = aiter::compute_units(device);
        if (compute_units == 0) return LAUNCH_NO_COMPUTE_UNITS;
        Launch launch = launch_of(call);
        Work &work = launch.work;
        work = work_of(call.problem, row_tiles, compute_units);
        if (!work.place_in(call.tensors.workspace)) return LAUNCH_NO_COMPUTE_UNITS;
        if (const int failed = work.prepare(row_tiles, places(compute_units), stream)) return failed;
        const int64_t blocks = work.blocks(places(compute_units));
        const int failed = work.scored ? start_scored(launch) : Loop::start_blocks(kernel, launch, blocks, stream);
        if (failed) return failed;
        return aiter::launch(add_up, work.additions(row_tiles), work.adding_threads(), 0, stream, launch);
    }
#else
    static int64_t workspace_bytes(const aiter_attention_problem &, int64_t) { return 0; }
    static int start(void (*kernel)(Launch), const aiter_attention_call &call, int64_t row_tiles, void *stream) {
        return Loop::start_blocks(kernel, launch_of(call), row_tiles, stream);
    }
#endif
    /* Of the heads that share them. */
    static __device__ __forceinline__ int row_tiles(const Launch &launch) {
        const int64_t rows = int64_t(launch.problem.seqlen_q) << launch.packing.bits;
        return static_cast<int>((rows + BLOCK_ROWS - 1) / BLOCK_ROWS);
    }

    static __device__ __forceinline__ Packing packing(const Launch &launch) { return launch.packing; }
    /* A window's first tile begins at a multiple of this. */
    static __device__ __forceinline__ int alignment(const Launch &) { return 1; }
    /* Units one after the other; of one unit's tiles those that see most keys come first, so that short ones fill the
     * gaps at the end. */
    static __device__ __forceinline__ Place place(const Launch &launch, int index) {
        const aiter_attention_problem &p = launch.problem;
        const int bits = launch.packing.bits;
        const int group = (p.heads_q / p.heads_kv) >> bits, row_tiles = LoopOfWaves::row_tiles(launch);
        const auto work = work_of_block(index, p.batch * p.heads_kv, group * row_tiles);
        const int kv_head = work.unit % p.heads_kv;
        return {work.unit / p.heads_kv, (kv_head * group + work.part % group) << bits, kv_head,
                row_tiles - 1 - work.part / group};
    }

    static __device__ __forceinline__ int team() { return TEAM == 1 ? wave() : wave() / TEAM; }
    /* The first of this wave's rows, in the block's. */
    static __device__ __forceinline__ int wave_row() { return team() * WAVE_ROWS; }
    static constexpr int OWN_COLUMNS = columns_of_wave(VALUE_DIM, Tile::TEAM); /* of a wave */
    static __device__ __forceinline__ int first_column(OutputPlace = {}) {
        return TEAM == 1 ? 0 : wave() % TEAM * OWN_COLUMNS;
    }
    /* This team's, for its query rows and later for store_output. */
    static __device__ __forceinline__ SharedAddress query_memory(SharedAddress shared) {
        return shared + Loop::TILE_BYTES + team() * TEAM_BYTES;
    }
    template <class RowTile>
    static __device__ __forceinline__ void load_queries(Queries &queries, const Launch &launch, const RowTile &tile,
                                                        SharedAddress shared, int wave_row, QueryBits bits) {
        const Sequence &sequence = tile.sequence;
        queries.load(
            query_memory(shared),
            [&](int row) {
                row += wave_row;
                const int token = tile.token(row);
                const Element *from = sequence.query + token * sequence.query_stride;
                if (SEVERAL_HEADS) from += tile.member(row) * launch.problem.query_strides[2];
                return token < sequence.rows ? from : nullptr;
            },
            bits);
    }
    template <class RowPointer>
    static __device__ __forceinline__ void store_output(const Output &o, SharedAddress shared, RowPointer row) {
        aiter::store_output<VALUE_DIM>(o, query_memory(shared), row, first_column());
    }

    /* Goes through the block's row tiles, here one. Leaves in `o` the sums of P V, and in `softmax` what they must be
     * divided by, and calls finish(tile, softmax, o) in every wave that has rows: a loop may use more threads than its
     * WAVES have. Then clears the rows that belong to no sequence: last, when registers are free. */
    template <class RowTile, class Finish>
    static __device__ __forceinline__ void run(const Launch &launch, SharedAddress shared, const Score &score,
                                               Finish finish) {
#if AITER_CUT && defined(AITER_GFX9)
        each_task<RowTile>(launch, shared, [&](const Launch &launch, const auto &task, const RowTile &piece) {
            const auto &scored = task.sequence.scaled(score);
            Softmax softmax(scored.unit);
            Output o;
            Loop::attend(launch, piece, shared, scored, Dropout(launch.problem, launch.tensors), softmax, o);
            if (launch.work.is_whole(task, softmax, o)) finish(task, softmax, o);
        });
        clear_rest(launch, aiter::blocks(), THREADS);
#else
        const RowTile tile(launch, block());
        if (tile.exists()) {
            const auto &scored = tile.sequence.scaled(score);
            Softmax softmax(scored.unit);
            Output o;
            Loop::attend(launch, tile, shared, scored, Dropout(launch.problem, launch.tensors), softmax, o);
            finish(tile, softmax, o);
        }
        clear_rest(launch, blocks(launch), THREADS);
#endif
    }
#if AITER_CUT && defined(AITER_GFX9)
    /* visit(parameter, task, piece): what the block has to do, and the row tile with those of its keys that belong to it.
     * The kernel's parameter is read again for each, or registers would hold what of it is the same for all. */
    template <class RowTile, class Visit>
    static __device__ __forceinline__ void each_task(const Launch &parameter, SharedAddress shared, Visit visit) {
#pragma unroll 1
        for (int index = block(); index < parameter.work.tasks; index = parameter.work.next_task(shared)) {
            const Launch &launch = reread(parameter);
            const typename Work::template Task<RowTile> task(launch, place(launch, launch.work.row_tile(index)), index);
            RowTile piece = task;
            piece.keys = task.piece.keys;
            if (task.exists()) visit(launch, task, piece);
        }
    }
#endif
    static __device__ __forceinline__ int blocks(const Launch &launch) {
        return row_tiles(launch) * (launch.problem.heads_q >> launch.packing.bits) * launch.problem.batch;
    }

    /* Caps, slopes and masks the scores of the tile of keys from `first` on; whether it has changed any. */
    template <class RowTile>
    static __device__ __forceinline__ bool finish_scores(Scores &s, int first, int wave_row, const Range &keys_of_all,
                                                         const RowTile &tile, const Score &score) {
        const Mask &mask = tile.sequence.mask;
        score.finish(
            s, first, [&](int) { return tile.sequence.slope; },
            [&](int slot) { return wave_row + Scores::row(slot) + mask.diagonal; });
        const bool cut = !keys_of_all.covers<WINDOW>(first, first + Tile::KEYS);
        if (__builtin_expect(cut, false))
            hide<WINDOW>(s, -INFINITE, first,
                         [&](int slot) { return mask.keys_of(tile.token(opaque(wave_row) + Scores::row(slot))); });
        return SOFTCAP || ALIBI || cut;
    }
    static __device__ __forceinline__ void drop(Scores &s, int first, int wave_row, const Sequence &sequence,
                                                const Dropout &dropout) {
#if AITER_DROPOUT
        dropout.for_tile<Scores, false>(
            sequence.drawn_head, first, [&](int slot) { return wave_row + Scores::row(slot); },
            [&](int slot, int i, bool kept) { s.set(slot, i, kept ? s.get(slot, i) : 0.0f); });
#endif
    }
};

template <int HEAD_DIM, int VALUE_DIM, int PART_WAVES = Shape<HEAD_DIM, VALUE_DIM>::WAVES>
struct TileLoop : LoopOfWaves<TileLoop<HEAD_DIM, VALUE_DIM, PART_WAVES>, HEAD_DIM, VALUE_DIM,
                              Shape<HEAD_DIM, VALUE_DIM>, PART_WAVES> {
    using Base = LoopOfWaves<TileLoop, HEAD_DIM, VALUE_DIM, Shape<HEAD_DIM, VALUE_DIM>, PART_WAVES>;
    using Base::KEYS, Base::WAVE_ROWS;
    using typename Base::Launch, typename Base::Output, typename Base::Queries, typename Base::Scores;
    using typename Base::Softmax;
    using KeysAndValues = KeyValueTile<HEAD_DIM, VALUE_DIM, KEYS, Base::THREADS>;
    static constexpr int TILE_BYTES = KeysAndValues::SHARED_BYTES;
    static constexpr int SHARED_BYTES = TILE_BYTES + Base::TEAMS * Base::TEAM_BYTES;
    static_assert(SHARED_BYTES <= SHARED_LIMIT, "more shared memory than a block of this arch can have");

    template <class RowTile>
    static __device__ __forceinline__ void attend(const Launch &launch, const RowTile &row_tile, SharedAddress shared,
                                                  const Score &score, const Dropout &dropout, Softmax &softmax,
                                                  Output &o) {
        const int wave_row = row_tile.first_row + Base::wave_row();
        const Range wave_keys = row_tile.keys_of_any(wave_row, WAVE_ROWS);
        const Range keys_of_all = row_tile.keys_of_all(wave_row, WAVE_ROWS);
        const Range &block_keys = row_tile.keys;
        const KeyValueRows<PAGED> &keys = row_tile.sequence.keys;

        o.clear();
        if (block_keys.empty()) return;
        KeysAndValues tile(shared, thread_in_block());
        tile.issue(keys, block_keys.low);
        Queries queries;
        Base::load_queries(queries, launch, row_tile, shared, wave_row, score.query_bits);

        typename Base::Work::InTurn pieces(launch.work, block_keys.low);
        for (int first = block_keys.low; first < block_keys.high; first += KEYS) {
            const int end = first + KEYS;
            tile.publish(barrier);
            const bool seen = wave_keys.overlaps<WINDOW>(first, end);
            if constexpr (CUT) pieces.pass(launch.work, first, seen, softmax, o);
            if (end < block_keys.high && !(KeysAndValues::ISSUES_WITH_SCORES && seen)) tile.issue(keys, end);
            if (!seen) continue; /* the tile is the other waves' */
            Scores s;
            if constexpr (KeysAndValues::ISSUES_WITH_SCORES)
                tile.scores(queries, s, keys, end < block_keys.high ? end : first); /* the last one for nothing */
            else tile.scores(queries, s);
            Base::finish_scores(s, first, wave_row, keys_of_all, row_tile, score);
            softmax.update(s, o);
            Base::drop(s, first, wave_row, row_tile.sequence, dropout);
            tile.accumulate(s, o, Base::first_column());
        }
        if constexpr (CUT) pieces.collect(launch.work, shared, softmax, o);
        if (Base::TEAM > 1) barrier(); /* nobody reads the team's queries any more */
    }
};

} // namespace aiter

#endif
