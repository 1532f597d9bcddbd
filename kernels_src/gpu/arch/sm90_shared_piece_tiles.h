/* What a block has that shares a piece (arch/sm90_shared_piece.h): where things are in shared memory, what there is to do,
 * and the copies.
 *
 *     shared memory   | units of keys and values ... | P of each tile | sums | moves | greatest scores | parts | barriers |
 *     Unit            64 columns of a tile of keys or of values, a place of a ring       filled by the wave that copies
 *     Handed          of a tile: what blocks hand to each other                          by the waves that make scores
 *
 * What arrives is counted by barriers of its tile, each used once, and not by some of the place in the ring: who waited for
 * one of these would have had to wait for all that was in the place before. */
#ifndef AITER_GPU_ARCH_SM90_SHARED_PIECE_TILES_H
#define AITER_GPU_ARCH_SM90_SHARED_PIECE_TILES_H

#include "gpu/arch/sm90_forward_tiles.h"

namespace aiter {

template <int HEAD_DIM, int VALUE_DIM> struct SharedPieceTiles : ForwardTiles<HEAD_DIM, VALUE_DIM> {
    using Tiles = ForwardTiles<HEAD_DIM, VALUE_DIM>;
    using Tiles::KEYS, Tiles::LINES, Tiles::VALUE_LINES, Tiles::at_least_one;
    using typename Tiles::Launch, typename Tiles::Work;
    static constexpr int ROWS = 16, SLOTS = 2, TILES = Work::INVARIANT_KEYS / KEYS; /* of a piece, at most */
    static constexpr int OUTPUT_WAVES = 4, SCORE_WAVES = 4, COPY_WAVE = OUTPUT_WAVES + SCORE_WAVES,
                         BARRIER_WAVE = COPY_WAVE + 1, THREADS = (BARRIER_WAVE + 1) * WAVE;
    static constexpr int OWN_COLUMNS = 16; /* of a wave of output, in each line */
    static_assert(OUTPUT_WAVES * OWN_COLUMNS == 64, "a line of values");

    /* A piece is shared by as many blocks as values have lines or, by two lines a block, by half as many. */
    static constexpr int MOST_LINES = lesser(VALUE_LINES, 2), MOST_SHARING = VALUE_LINES,
                         LEAST_SHARING = (VALUE_LINES + 1) / 2;
    /* Blocks that any GPU has room for in a cluster. */
    static constexpr int MOST_TOGETHER = 8;

    static constexpr int UNIT_BYTES = KEYS * 128, WEIGHT_BYTES = KEYS / 16 * WAVE * sizeof(uint4); /* of a tile */
    static constexpr int HANDED_BYTES =
        WEIGHT_BYTES + (ROWS + WAVE) * sizeof(float2); /* of a tile, behind its scores */
    /* Parts of pieces that a block adds up: values of all waves, and the rows' reference points and sums. There is room for
     * those of a cluster's most pieces where rows are 8 or fewer, and of half as many else. */
    static constexpr int POINT_BYTES = ROWS * sizeof(float2), LINE_BYTES = OUTPUT_WAVES * WAVE * sizeof(float4);
    static constexpr int PARTS_BYTES = (MOST_TOGETHER / LEAST_SHARING - 1) * (MOST_LINES * LINE_BYTES + POINT_BYTES);
    static_assert((MOST_TOGETHER / MOST_SHARING - 1) * (LINE_BYTES + POINT_BYTES) <= PARTS_BYTES, "");
    /* Output waits for tiles of 64 keys by two: a wait costs it as much as a fourth of such a tile. */
    static constexpr int BUNDLE = KEYS <= 64 ? 2 : 1, BUNDLES = (TILES + BUNDLE - 1) / BUNDLE;
    static constexpr int KEY_TILES = (TILES + LEAST_SHARING - 1) / LEAST_SHARING; /* of a block */
    /* Lines of keys, at most, that are waited for together. */
    static constexpr int KEY_LINES = LINES > 2 ? 2 : 1, KEY_BARRIERS = (LINES + KEY_LINES - 1) / KEY_LINES;
    static constexpr int BOXES = PAGED ? TILES * KEYS / 8 : 0, BOX_BYTES = sizeof(int2); /* of a piece, of pages of 8 */
    static constexpr int REST_BYTES = TILES * (HANDED_BYTES + ROWS * sizeof(float)) + PARTS_BYTES + BOXES * BOX_BYTES;
    /* Barriers, by their numbers; the last ones are those of units. */
    static constexpr int FIRST_BUNDLE = KEY_TILES * KEY_BARRIERS, FIRST_TOPS = FIRST_BUNDLE + BUNDLES,
                         HAVE_PARTS = FIRST_TOPS + TILES, FIRST_UNIT = HAVE_PARTS + 1;
    static constexpr int STAGES = /* units there is room for */
        (SHARED_LIMIT - 1024 - REST_BYTES - FIRST_UNIT * mbarrier::BYTES) / (UNIT_BYTES + mbarrier::BYTES);
    static constexpr int WEIGHTS_AT = STAGES * UNIT_BYTES, SUMS_AT = WEIGHTS_AT + TILES * WEIGHT_BYTES,
                         MOVES_AT = SUMS_AT + TILES * WAVE * sizeof(float2),
                         TOPS_AT = MOVES_AT + TILES * ROWS * sizeof(float2),
                         PARTS_AT = TOPS_AT + TILES * ROWS * sizeof(float), BOXES_AT = PARTS_AT + PARTS_BYTES,
                         BARRIERS_AT = BOXES_AT + BOXES * BOX_BYTES;
    static constexpr int BARRIERS = FIRST_UNIT + STAGES, SHARED_BYTES = BARRIERS_AT + BARRIERS * mbarrier::BYTES;
    /* Output waits for a tile or two ahead, before it has released the places of the one that it is at. */
    static_assert(STAGES >= 2 * MOST_LINES && SHARED_BYTES <= SHARED_LIMIT - 1024, "");

    /* What a piece's part takes in the memory of the block that adds it up. */
    static __device__ __forceinline__ int bytes_of_part(const Launch &launch, int lines) {
        return launch.work.rows * static_cast<int>(lines * 64 * sizeof(float) + sizeof(float2));
    }
    static __device__ __forceinline__ SharedAddress barrier_at(SharedAddress shared, int number) {
        return shared + BARRIERS_AT + number * mbarrier::BYTES;
    }
    /* By one thread: with as many as there are barriers it takes 2000 cycles more. */
    static __device__ __forceinline__ void make_barriers(SharedAddress shared) {
#pragma unroll
        for (int i = 0; i < BARRIERS; ++i) mbarrier::make(barrier_at(shared, i), i < FIRST_UNIT ? 1 : OUTPUT_WAVES);
        mbarrier::made();
    }

    /* Until they are made: by all other waves, in two groups, as compute-sanitizer takes it for an error when a block's waves
     * wait at several places for a barrier of all of them. */
    static constexpr int OUTPUT_THREADS = (OUTPUT_WAVES + 1) * WAVE, OTHER_THREADS = (SCORE_WAVES + 2) * WAVE;
    static __device__ __forceinline__ void await_barriers(bool output) {
        if (output) meet(1, OUTPUT_THREADS);
        else meet(2, OTHER_THREADS);
    }
    static __device__ __forceinline__ void tell_of_barriers() {
        pass(1, OUTPUT_THREADS);
        pass(2, OTHER_THREADS);
    }

    /* What is copied at one time, and where: of all that the block copies, number `n`. */
    struct Unit {
        SharedAddress shared;
        int stage;
        uint32_t turn;
        __device__ __forceinline__ Unit(SharedAddress shared, int n)
            : shared(shared), stage(n % STAGES), turn(n / STAGES & 1) {}
        __device__ __forceinline__ void advance() {
            if (++stage == STAGES) stage = 0, turn ^= 1;
        }
        __device__ __forceinline__ SharedAddress place() const { return shared + stage * UNIT_BYTES; }
        /* What was there has been read: by all waves of output, or by one of scores. */
        __device__ __forceinline__ SharedAddress empty() const { return barrier_at(shared, FIRST_UNIT + stage); }
    };
    /* What blocks hand to each other of a tile, in the memory of any of them. */
    struct Handed {
        SharedAddress shared;
        int tile;
        __device__ __forceinline__ SharedAddress weights(int step) const {
            return shared + WEIGHTS_AT + tile * WEIGHT_BYTES + (step * WAVE + lane()) * sizeof(uint4);
        }
        __device__ __forceinline__ SharedAddress sums() const {
            return shared + SUMS_AT + (tile * WAVE + lane()) * sizeof(float2);
        }
        /* Where the tile moves a row's reference point to, and what all before it is to be multiplied by. */
        __device__ __forceinline__ SharedAddress move(int row) const {
            return shared + MOVES_AT + (tile * ROWS + row) * sizeof(float2);
        }
        __device__ __forceinline__ SharedAddress top(int row) const {
            return shared + TOPS_AT + (tile * ROWS + row) * sizeof(float);
        }
        __device__ __forceinline__ SharedAddress have_tops() const { return barrier_at(shared, FIRST_TOPS + tile); }
        /* P and the values of the bundle that the tile is in. */
        __device__ __forceinline__ SharedAddress have_all() const {
            return barrier_at(shared, FIRST_BUNDLE + tile / BUNDLE);
        }
    };

    /* ---- what all waves know of a piece ---- */

    /* Whether other blocks write into this one's memory. */
    static __device__ __forceinline__ bool meets_others(const Launch &launch) {
        return launch.sharing.by > 1 || launch.pieces_together > 0;
    }
    /* Until their barriers are there. */
    static __device__ __forceinline__ void await_others(const Launch &launch) {
        if (meets_others(launch)) cluster::wait();
    }

    template <class Task> struct Way {
        const Launch &launch;
        const Task &task;
        SharedAddress shared;
        int rank, sharing; /* this block's number among those that share the piece; those */
        Range keys;
        int tiles;
        int first_line, lines; /* of values, the block's */

        __device__ __forceinline__ Way(const Launch &launch, const Task &task, SharedAddress shared, int rank)
            : launch(launch), task(task), shared(shared), rank(rank), sharing(launch.sharing.by),
              keys(at_least_one(task.own(task.keys))) {
            const Range any = task.own(task.keys_of_any(task.first_row, ROWS));
            tiles = any.empty() ? 1 : (any.high - keys.low + KEYS - 1) / KEYS;
            const int most = sharing == MOST_SHARING ? 1 : MOST_LINES;
            first_line = rank * most, lines = lesser(most, VALUE_LINES - first_line);
        }
        /* Of block `to` of those that share the piece. */
        __device__ __forceinline__ SharedAddress shared_of(int to) const {
            return cluster::of(shared, cluster::rank() - rank + to);
        }
        __device__ __forceinline__ int first(int tile) const { return keys.low + tile * KEYS; }
        __device__ __forceinline__ int own_tiles() const { return (tiles - rank + sharing - 1) / sharing; }

        /* Units, in the order of their copies: lines of the block's own tiles of keys, then its lines of the values of all
         * tiles. (Values that follow the keys of their tiles hold places of the ring until their weights are there.) */
        __device__ __forceinline__ Unit key_unit(int own_tile) const { return {shared, own_tile * LINES}; }
        __device__ __forceinline__ Unit value_unit() const { return {shared, own_tiles() * LINES}; }
        /* Lines of keys that are waited for together have arrived. */
        __device__ __forceinline__ SharedAddress have_keys(int own_tile, int line) const {
            return barrier_at(shared, own_tile * KEY_BARRIERS + line / KEY_LINES);
        }

        /* What copies and other threads' stores are to bring: by one thread, before or after them. */
        __device__ __forceinline__ void expect() const {
#pragma unroll 1
            for (int i = 0; i < own_tiles(); ++i)
#pragma unroll
                for (int line = 0; line < LINES; line += KEY_LINES)
                    mbarrier::arrive_and_expect(have_keys(i, line), lesser(LINES - line, KEY_LINES) * UNIT_BYTES);
#pragma unroll 1
            for (int tile = 0; tile < tiles; ++tile) {
                const Handed handed = {shared, tile};
                mbarrier::arrive_and_expect(handed.have_tops(), ROWS * sizeof(float));
                if (tile % BUNDLE > 0) continue;
                const int together = lesser(BUNDLE, tiles - tile);
                mbarrier::arrive_and_expect(handed.have_all(), together * (HANDED_BYTES + lines * UNIT_BYTES));
            }
        }

        /* Nobody else waits for the greatest scores of the last tiles, and the block must not end before they are there. */
        __device__ __forceinline__ void await_tops() const {
            if (launch.small_cap.applies()) return; /* nobody sends any */
#pragma unroll 1
            for (int tile = 0; tile < tiles; ++tile) mbarrier::wait(Handed{shared, tile}.have_tops(), 0);
        }

        /* ---- copies, by one wave ---- */

        /* Where the piece's boxes are, if they are parts of pages: page and token, all looked up at one time. */
        template <class Rows> __device__ __forceinline__ void find_boxes(const Rows &rows) const {
            const int count = tiles * KEYS / launch.box;
#pragma unroll 4
            for (int i = lane(); i < count; i += WAVE) {
                const auto box = tensor_map::PageBox::look_up(rows, keys.low + i * launch.box, launch.box);
                shared_store(shared + BOXES_AT + i * BOX_BYTES, make_int2(box.page(rows), box.token()));
            }
            wave_sync();
        }
        /* boxes: of a tile. arrives: the barrier that counts the bytes. */
        __device__ __forceinline__ void copy(Unit &unit, const CUtensorMap &map, int tile, int line, int boxes,
                                             SharedAddress arrives) const {
            const Sequence &sequence = task.sequence;
            mbarrier::wait(unit.empty(), unit.turn ^ 1); /* at once in turn 0 */
            if (PAGED) {
                if (lane() < boxes) {
                    const int2 box = shared_load<int2>(shared + BOXES_AT + (tile * boxes + lane()) * BOX_BYTES);
                    tensor_map::copy<tensor_map::Reuse::ONCE>(unit.place() + lane() * launch.box * 128, map, line * 64,
                                                              box.y, sequence.kv_head, box.x, arrives);
                }
            } else if (elected()) {
                tensor_map::copy<tensor_map::Reuse::ONCE>(unit.place(), map, line * 64,
                                                          sequence.first_key + first(tile), sequence.kv_head,
                                                          sequence.kv_batch, arrives);
            }
            wave_sync();
            unit.advance();
        }
        __device__ __forceinline__ void copy_all() const {
            if constexpr (PAGED) find_boxes(task.sequence.keys);
            const int boxes = PAGED ? KEYS / launch.box : 1;
            Unit unit(shared, 0);
#pragma unroll 1
            for (int i = 0; i < own_tiles(); ++i)
#pragma unroll
                for (int line = 0; line < LINES; ++line)
                    copy(unit, launch.key, i * sharing + rank, line, boxes, have_keys(i, line));
#pragma unroll 1
            for (int tile = 0; tile < tiles; ++tile)
#pragma unroll 1
                for (int line = 0; line < lines; ++line)
                    copy(unit, launch.value, tile, first_line + line, boxes, Handed{shared, tile}.have_all());
        }
    };
};

} // namespace aiter

#endif
