/* What a block has that shares a piece (arch/sm90_shared_piece.h): where things are in shared memory, what there is to do,
 * and the copies.
 *
 *     shared memory   | units of keys and values ... | P of each tile | sums | moves | greatest scores | parts | barriers |
 *     Unit            64 columns of a tile of keys or of values, a place of a ring       filled by the wave that copies
 *     Handed          of a tile: what blocks hand to each other                          by the waves that make scores
 *     parts           of strips of 16 columns that the block adds up                     by output's waves of all blocks
 *
 * What arrives is counted by barriers of its tile, each used once in a turn, and not by some of the place in the ring: who
 * waited for one of these would have had to wait for all that was in the place before. */
#ifndef AITER_GPU_ARCH_SM90_SHARED_PIECE_TILES_H
#define AITER_GPU_ARCH_SM90_SHARED_PIECE_TILES_H

#include "gpu/arch/sm90_forward_tiles.h"

namespace aiter {

template <int HEAD_DIM, int VALUE_DIM> struct SharedPieceTiles : ForwardTiles<HEAD_DIM, VALUE_DIM> {
    using Tiles = ForwardTiles<HEAD_DIM, VALUE_DIM>;
    using Tiles::KEYS, Tiles::LINES, Tiles::VALUE_LINES, Tiles::at_least_one;
    using typename Tiles::Launch, typename Tiles::Work;
    static constexpr int ROWS = 16, SLOTS = 2, TILES = Work::INVARIANT_KEYS / KEYS; /* of a piece, at most */
    /* A wave tells the engine of a copy in 300 to 400 cycles: of units of 8 KB, 26 bytes a cycle, that was the bound. */
    static constexpr int OUTPUT_WAVES = 4, SCORE_WAVES = 4, COPY_WAVES = LINES == 4 ? 2 : 1;
    static constexpr int FIRST_COPY_WAVE = OUTPUT_WAVES + SCORE_WAVES, BARRIER_WAVE = FIRST_COPY_WAVE + COPY_WAVES,
                         THREADS = (BARRIER_WAVE + 1) * WAVE;
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
    /* Parts of pieces that blocks of a cluster add up, each block some strips of 16 columns. Of a turn, in which each block
     * has a piece: its points, and of each strip the values. */
    static constexpr int STRIPS = VALUE_LINES * OUTPUT_WAVES, SLOT_BYTES = WAVE * sizeof(float4),
                         STRIP_BYTES = SLOTS * SLOT_BYTES, POINT_BYTES = ROWS * sizeof(float2);
    /* Of 5 to 7 blocks the first four add up, of 3 the first two; each has 1 << strip_bits() strips, as far as there are any. */
    static constexpr int STRIP_BITS = 2 + (VALUE_LINES > 1) + (VALUE_LINES > 2); /* for one block */
    static constexpr __host__ __device__ int strip_bits(int blocks) {
        return greater(STRIP_BITS - (blocks >= 2) - (blocks >= 4) - (blocks >= 8), 0);
    }
    static constexpr int most_strips(int sharing) { /* of all pieces of a turn, in one block */
        int most = 0;
        for (int pieces = 2; pieces * sharing <= MOST_TOGETHER; ++pieces)
            most = greater(most, pieces << strip_bits(pieces * sharing));
        return most;
    }
    static_assert(1 << strip_bits(2 * LEAST_SHARING) <= OUTPUT_WAVES &&
                      STRIPS % (1 << strip_bits(2 * LEAST_SHARING)) == 0,
                  "a wave has one strip at most");
    /* Output waits for tiles of 64 keys by two: a wait costs it as much as a fourth of such a tile. */
    static constexpr int BUNDLE = KEYS <= 64 ? 2 : 1, BUNDLES = (TILES + BUNDLE - 1) / BUNDLE;
    /* Blocks that take several pieces, one after the other, share none: then parts of two turns are under way. (With bundles
     * a short first piece could have half of one.) */
    static constexpr bool IN_TURNS = LEAST_SHARING == 1 && BUNDLE == 1;
    static constexpr int POINTS_BYTES = MOST_TOGETHER / LEAST_SHARING * POINT_BYTES,
                         TURN_BYTES = POINTS_BYTES +
                                      greater(most_strips(MOST_SHARING), most_strips(LEAST_SHARING)) * STRIP_BYTES,
                         PARTS_BYTES = (IN_TURNS ? 2 : 1) * TURN_BYTES;
    static constexpr int KEY_TILES = (TILES + LEAST_SHARING - 1) / LEAST_SHARING; /* of a block */
    /* Lines of keys, at most, that are waited for together. */
    static constexpr int KEY_LINES = LINES > 2 ? 2 : 1, KEY_BARRIERS = (LINES + KEY_LINES - 1) / KEY_LINES;
    static constexpr int BOXES = PAGED ? TILES * KEYS / 8 : 0, BOX_BYTES = sizeof(int2), /* of a piece, of pages of 8 */
        ALL_BOX_BYTES = COPY_WAVES * BOXES * BOX_BYTES;
    static constexpr int REST_BYTES = TILES * (HANDED_BYTES + ROWS * sizeof(float)) + PARTS_BYTES + ALL_BOX_BYTES;
    /* Barriers, by their numbers; the last ones are those of units. */
    static constexpr int FIRST_BUNDLE = KEY_TILES * KEY_BARRIERS, FIRST_TOPS = FIRST_BUNDLE + BUNDLES,
                         HAVE_PARTS = FIRST_TOPS + TILES, TOPS_PASSED = HAVE_PARTS + 2, FIRST_READ = TOPS_PASSED + 1,
                         FIRST_UNIT = FIRST_READ + (IN_TURNS ? TILES : 0);
    static constexpr int ROOM = /* for units */
        (SHARED_LIMIT - 1024 - REST_BYTES - FIRST_UNIT * mbarrier::BYTES) / (UNIT_BYTES + mbarrier::BYTES);
    /* A place of the ring is always filled by the same wave: who waits for it then waits for what it has copied itself, and
     * not, if others are behind, for the time before that. */
    static constexpr int STAGES = ROOM - ROOM % COPY_WAVES;
    static constexpr int WEIGHTS_AT = STAGES * UNIT_BYTES, SUMS_AT = WEIGHTS_AT + TILES * WEIGHT_BYTES,
                         MOVES_AT = SUMS_AT + TILES * WAVE * sizeof(float2),
                         TOPS_AT = MOVES_AT + TILES * ROWS * sizeof(float2),
                         PARTS_AT = TOPS_AT + TILES * ROWS * sizeof(float), BOXES_AT = PARTS_AT + PARTS_BYTES,
                         BARRIERS_AT = BOXES_AT + ALL_BOX_BYTES;
    static constexpr int BARRIERS = FIRST_UNIT + STAGES, SHARED_BYTES = BARRIERS_AT + BARRIERS * mbarrier::BYTES;
    /* Output waits for a tile or two ahead, before it has released the places of the one that it is at. */
    static_assert(STAGES >= 2 * MOST_LINES && SHARED_BYTES <= SHARED_LIMIT - 1024, "");

    static __device__ __forceinline__ SharedAddress barrier_at(SharedAddress shared, int number) {
        return shared + BARRIERS_AT + number * mbarrier::BYTES;
    }
    /* By one thread: with as many as there are barriers it takes 2000 cycles more. */
    static __device__ __forceinline__ void make_barriers(SharedAddress shared) {
#pragma unroll
        for (int i = 0; i < BARRIERS; ++i)
            mbarrier::make(barrier_at(shared, i), i < TOPS_PASSED    ? 1
                                                  : i == TOPS_PASSED ? SCORE_WAVES + 1
                                                                     : OUTPUT_WAVES);
        mbarrier::made();
    }

    /* Named barriers: those above are made, for waves of each role; and the waves of the output. (Of each role's own, as
     * compute-sanitizer takes it for an error when waves wait at several places for one barrier.) */
    enum { FOR_OUTPUT = 1, FOR_SCORES, FOR_COPIES, OUTPUT };
    static __device__ __forceinline__ void await_barriers(int role, int waves) { meet(role, (waves + 1) * WAVE); }
    static __device__ __forceinline__ void tell_of_barriers() {
        pass(FOR_OUTPUT, (OUTPUT_WAVES + 1) * WAVE);
        pass(FOR_SCORES, (SCORE_WAVES + 1) * WAVE);
        pass(FOR_COPIES, (COPY_WAVES + 1) * WAVE);
    }
    static __device__ __forceinline__ void meet_output() {
        wave_sync();
        meet(OUTPUT, OUTPUT_WAVES * WAVE);
    }

    /* What is copied at one time, and where: of all that the block copies, number `n`. */
    struct Unit {
        SharedAddress shared;
        int stage;
        uint32_t turn;
        __device__ __forceinline__ Unit(SharedAddress shared, int n)
            : shared(shared), stage(n % STAGES), turn(n / STAGES & 1) {}
        __device__ __forceinline__ void advance(int units = 1) {
            stage += units;
            if (stage >= STAGES) stage -= STAGES, turn ^= 1;
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
        /* In turns: all waves of output have taken what they were handed, and the place is the next turn's. */
        __device__ __forceinline__ SharedAddress have_read() const { return barrier_at(shared, FIRST_READ + tile); }
    };

    /* ---- what all waves know of a piece ---- */

    /* Whether other blocks write into this one's memory. */
    static __device__ __forceinline__ bool meets_others(const Launch &launch) {
        return launch.sharing.by > 1 || launch.together > 1;
    }
    /* Until their barriers are there. */
    static __device__ __forceinline__ void await_others(const Launch &launch) {
        if (meets_others(launch)) cluster::wait();
    }

    /* Who adds up a row tile's parts: of a cluster's `blocks`, those that have pieces of it. */
    struct Adders {
        int blocks, bits;
        __device__ __forceinline__ explicit Adders(int blocks) : blocks(blocks), bits(strip_bits(blocks)) {}
        __device__ __forceinline__ int of(int strip) const { return strip >> bits; }
        __device__ __forceinline__ int first_strip(int block) const { return block << bits; }
        __device__ __forceinline__ int strips(int block) const { return first_strip(block) < STRIPS ? 1 << bits : 0; }
    };

    template <class Task> struct Way {
        const Launch &launch;
        const Task &task;
        SharedAddress shared;
        int rank, sharing;     /* this block's number among those that share the piece; those */
        int at_once;           /* pieces of the row tile that a cluster has at one time */
        int turns;             /* one after the other */
        int first_line, lines; /* of values, the block's */
        int first_tiles;       /* of its first piece */
        /* This turn. */
        int turn = 0, first_unit = 0; /* of the copies' */
        bool here = true;             /* has the block a piece? */
        Piece piece;
        Range keys;
        int tiles;

        __device__ __forceinline__ Way(const Launch &launch, const Task &task, SharedAddress shared, int rank)
            : launch(launch), task(task), shared(shared), rank(rank), sharing(launch.sharing.by), piece(task.piece) {
            const int count = piece.count;
            at_once = lesser(launch.together, count);
            turns = IN_TURNS && launch.together > 1 ? launch.by_together.quotient(count + launch.together - 1) : 1;
            const int most = sharing == MOST_SHARING ? 1 : MOST_LINES;
            first_line = rank * most, lines = lesser(most, VALUE_LINES - first_line);
            begin();
            first_tiles = tiles;
        }
        __device__ __forceinline__ void begin() {
            keys = at_least_one(piece.own(task.keys));
            const Range any = piece.own(task.keys_of_any(task.first_row, ROWS));
            tiles = any.empty() ? 1 : (any.high - keys.low + KEYS - 1) / KEYS;
        }
        /* To the next turn. */
        __device__ __forceinline__ void go_on() {
            if (++turn >= turns) return;
            first_unit += own_tiles() * LINES + tiles * lines;
            const int number = piece.number + at_once;
            here = number < piece.count;
            if (!here) return;
            piece = launch.work.piece(task.keys, piece.row_tile + number * launch.work.by_row_tiles.by);
            begin();
        }
        /* Of a tile's barriers, which complete in each turn that has the tile. Short pieces are the row tile's first and
         * last, and so the block's. */
        __device__ __forceinline__ uint32_t parity(int tile) const {
            return turn - (turn > 0 && tile >= first_tiles) & 1;
        }
        /* Until one is used no more for an earlier turn: by who brings something to it, or it could be one further. */
        __device__ __forceinline__ void await_before(int tile, SharedAddress barrier) const {
            if (turn > 0) mbarrier::wait(barrier, parity(tile) ^ 1);
        }
        /* A turn's greatest scores are all there, and who makes scores has seen as many as it needs: the next turn's may
         * come. (In turns a piece is one block's, whose waves write to no other.) */
        __device__ __forceinline__ SharedAddress tops_passed() const { return barrier_at(shared, TOPS_PASSED); }
        __device__ __forceinline__ void await_tops_passed() const {
            if (turn > 0) mbarrier::wait(tops_passed(), turn & 1 ^ 1);
        }
        /* Of this turn; not before that of the turn before is complete, which who had no tile, or sent no greatest scores, has
         * not waited for yet. */
        __device__ __forceinline__ void tell_tops_passed() const {
            await_tops_passed();
            if (turns > 1) mbarrier::arrive_as_wave(tops_passed());
        }
        /* Do blocks of the cluster add up parts? */
        __device__ __forceinline__ bool adds() const { return launch.together > 1 && piece.count > 1; }
        __device__ __forceinline__ Adders adders() const { return Adders(at_once * sharing); }
        __device__ __forceinline__ int pieces_of(int any_turn) const {
            return lesser(at_once, piece.count - any_turn * at_once);
        }
        /* Parts of a turn are there. */
        __device__ __forceinline__ SharedAddress have_parts(int any_turn) const {
            return barrier_at(shared, HAVE_PARTS + any_turn % 2);
        }
        /* Of block `to` of those that share the piece. */
        __device__ __forceinline__ SharedAddress shared_of(int to) const {
            return cluster::of(shared, cluster::rank() - rank + to);
        }
        __device__ __forceinline__ int first(int tile) const { return keys.low + tile * KEYS; }
        __device__ __forceinline__ int own_tiles() const { return launch.sharing.quotient(tiles - rank + sharing - 1); }

        /* Units, in the order of their copies: lines of the block's own tiles of keys, then its lines of the values of all
         * tiles. (Values that follow the keys of their tiles hold places of the ring until their weights are there.) */
        __device__ __forceinline__ Unit key_unit(int own_tile) const { return {shared, first_unit + own_tile * LINES}; }
        __device__ __forceinline__ Unit value_unit() const { return {shared, first_unit + own_tiles() * LINES}; }
        /* Lines of keys that are waited for together have arrived. */
        __device__ __forceinline__ SharedAddress have_keys(int own_tile, int line) const {
            return barrier_at(shared, own_tile * KEY_BARRIERS + line / KEY_LINES);
        }

        /* What copies and other threads' stores are to bring in this turn: by one thread, before or after them, and after
         * what they brought in the one before. */
        __device__ __forceinline__ void expect(int tile, SharedAddress barrier, uint32_t bytes) const {
            await_before(tile, barrier);
            mbarrier::arrive_and_expect(barrier, bytes);
        }
        __device__ __forceinline__ void expect() const {
#pragma unroll 1
            for (int i = 0; i < own_tiles(); ++i)
#pragma unroll
                for (int line = 0; line < LINES; line += KEY_LINES)
                    expect(i, have_keys(i, line), lesser(LINES - line, KEY_LINES) * UNIT_BYTES);
#pragma unroll 1
            for (int tile = 0; tile < tiles; ++tile) {
                const Handed handed = {shared, tile};
                if (tops_are_sent()) expect(tile, handed.have_tops(), ROWS * sizeof(float));
                if (tile % BUNDLE > 0) continue;
                const int together = lesser(BUNDLE, tiles - tile);
                expect(tile, handed.have_all(), together * (HANDED_BYTES + lines * UNIT_BYTES));
            }
        }
        __device__ __forceinline__ void expect_parts() const {
            const Adders all = adders();
            const int strips = all.strips(cluster::rank());
            const int row_bytes = sizeof(float2) + strips * OWN_COLUMNS * sizeof(float);
            if (turn > 1) mbarrier::wait(have_parts(turn), turn / 2 % 2 ^ 1);
            mbarrier::arrive_and_expect(have_parts(turn), pieces_of(turn) * launch.work.rows * row_bytes);
        }
        __device__ __forceinline__ bool tops_are_sent() const { return !launch.small_cap.applies(); }
        /* By the wave that expects: the block must not end before the greatest scores of its last tiles are there, which nobody
         * else waits for; nor may the next turn's keys be expected before who makes scores has seen this one's. */
        __device__ __forceinline__ void await_scores() const {
#pragma unroll 1
            for (int tile = 0; tile < tiles; ++tile) {
                const Handed handed = {shared, tile};
                mbarrier::wait(tops_are_sent() ? handed.have_tops() : handed.have_all(), parity(tile));
            }
        }

        /* ---- copies: each wave that copies, of number `copier` among them, every COPY_WAVES-th unit ---- */

        /* Where the piece's boxes are, if they are parts of pages: page and token, all looked up at one time. */
        __device__ __forceinline__ SharedAddress box(int copier, int i) const {
            return shared + BOXES_AT + (copier * BOXES + i) * BOX_BYTES;
        }
        template <class Rows> __device__ __forceinline__ void find_boxes(const Rows &rows, int copier) const {
            const int count = tiles * KEYS / launch.box;
#pragma unroll 4
            for (int i = lane(); i < count; i += WAVE) {
                const auto found = tensor_map::PageBox::look_up(rows, keys.low + i * launch.box, launch.box);
                shared_store(box(copier, i), make_int2(found.page(rows), found.token()));
            }
            wave_sync();
        }
        /* boxes: where they are. arrives: the barrier that counts the bytes, of the block's tile `number`. */
        __device__ __forceinline__ void copy(Unit &unit, const CUtensorMap &map, int number, int tile, int line,
                                             SharedAddress boxes, SharedAddress arrives) const {
            const Sequence &sequence = task.sequence;
            mbarrier::wait(unit.empty(), unit.turn ^ 1); /* at once where nothing has been */
            await_before(number, arrives);
            if (PAGED) {
                const int count = KEYS / launch.box;
                if (lane() < count) {
                    const int2 box = shared_load<int2>(boxes + (tile * count + lane()) * BOX_BYTES);
                    tensor_map::copy<tensor_map::Reuse::ONCE>(unit.place() + lane() * launch.box * 128, map, line * 64,
                                                              box.y, sequence.kv_head, box.x, arrives);
                }
            } else if (elected()) {
                tensor_map::copy<tensor_map::Reuse::ONCE>(unit.place(), map, line * 64,
                                                          sequence.first_key + first(tile), sequence.kv_head,
                                                          sequence.kv_batch, arrives);
            }
            wave_sync();
            unit.advance(COPY_WAVES);
        }
        __device__ __forceinline__ void copy_all(int copier) const {
            const SharedAddress boxes = box(copier, 0);
            if constexpr (PAGED) find_boxes(task.sequence.keys, copier);
            static_assert(LINES % COPY_WAVES == 0 && (COPY_WAVES == 1 || !IN_TURNS) && MOST_LINES <= 2, "");
            Unit unit = key_unit(0);
            unit.advance(copier);
#pragma unroll 1
            for (int i = 0; i < own_tiles(); ++i)
#pragma unroll
                for (int line = 0; line < LINES; line += COPY_WAVES)
                    copy(unit, launch.key, i, i * sharing + rank, line + copier, boxes, have_keys(i, line + copier));
#pragma unroll 1
            for (int i = copier; i < tiles * lines; i += COPY_WAVES) {
                const int tile = i >> lines - 1, line = i & lines - 1;
                copy(unit, launch.value, tile, tile, first_line + line, boxes, Handed{shared, tile}.have_all());
            }
        }
    };
};

} // namespace aiter

#endif
