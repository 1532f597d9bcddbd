/* A piece of keys (gpu/pieces.h) that few rows see, by a cluster of blocks: for single tokens with batch_invariant. The
 * forward loop (arch/sm90_forward.h), whose bits these must be, takes its tiles one after the other, with a matrix
 * instruction of 64 rows. What its bits depend on is less: the order in which the values of tiles are added up, and the
 * softmax's reference point, which moves from tile to tile. All else happens here at one time:
 *
 *                       tile 0  |  tile 1  |  tile 2  |  tile 3  | ...          of keys
 *      scores         block 0,  | block 1, | block 0, | block 1, |              a wave for each tile:
 *                     wave 4    | wave 4   | wave 5   | wave 5   |              S = Q K^T, the greatest of each row
 *          |  greatest scores, to all blocks: where the reference point is
 *      weights        the same waves: P = exp2(S - reference)
 *          |  P, to all blocks
 *      output         tile after tile, a wave for each 16 columns:              O = O * shrink + P V
 *                     block 0 has the first 64 columns, block 1 the others
 *
 *   a block           waves 0 to 3: output; 4 to 7: scores
 *   shared memory     units, of 64 columns of a tile of keys or of values, which wave 0 copies by tensor maps before there is
 *                     anything to add up: the keys of the block's tiles, then its columns of all values, the last of them to
 *                     where keys have been. P as lanes hold it, of all tiles; the greatest scores; each lane's sums of
 *                     weights. Blocks write into each other's, where a barrier counts the bytes
 *   at the end        where the row tile has this piece alone, the rows. Else a part: to the blocks of the row tile's first piece,
 *                     where a cluster has room for those of all pieces, which add them up; or to memory, for the second
 *                     kernel
 *
 * mma.sync adds up as wgmma does: on an H200, of 10^8 sums of 128 products, fp16 and bf16, of like and unlike magnitudes, none
 * had other bits, and tests/test_cuda.py compares the loops' on whatever GPU it runs. So few rows do with its 16. */
#ifndef AITER_GPU_ARCH_SM90_SHARED_PIECE_H
#define AITER_GPU_ARCH_SM90_SHARED_PIECE_H

#include "gpu/arch/sm90_forward_tiles.h"
#include "gpu/mask.h"
#include "gpu/tile_loop.h"

/* Beyond, a block has no room for all of a piece. */
#define AITER_SHARES_PIECES (AITER_CUT && AITER_HEAD_DIM <= 128 && AITER_VALUE_DIM <= 128)

namespace aiter {

template <int HEAD_DIM, int VALUE_DIM> struct SharedPiece : ForwardTiles<HEAD_DIM, VALUE_DIM>, StoresFromRegisters {
    using Tiles = ForwardTiles<HEAD_DIM, VALUE_DIM>;
    using Tiles::KEYS, Tiles::STEPS, Tiles::LINES, Tiles::VALUE_LINES, Tiles::SEVERAL_HEADS, Tiles::at_least_one;
    using typename Tiles::Launch, typename Tiles::Work, typename Tiles::Scores, typename Tiles::Softmax;
    static constexpr int ROWS = 16, TILES = Work::INVARIANT_KEYS / KEYS, SLOTS = 2;
    static constexpr int CLUSTER = VALUE_LINES; /* blocks that share a piece */
    static constexpr int OUTPUT_WAVES = 4, SCORE_WAVES = 4, THREADS = (OUTPUT_WAVES + SCORE_WAVES) * WAVE;
    static constexpr int OWN_COLUMNS = 16; /* of a wave of output: a chunk of a part's values in each slot */
    using Output = Accumulator<1, OWN_COLUMNS>;
    static_assert(OUTPUT_WAVES * OWN_COLUMNS == 64, "a line of values");
    /* Blocks that any GPU has room for in a cluster, and pieces that it adds up. */
    static constexpr int MOST_TOGETHER = 8, MOST_PIECES = MOST_TOGETHER / CLUSTER;

    static constexpr int UNIT_BYTES = KEYS * 128, WEIGHT_BYTES = KEYS / 16 * WAVE * sizeof(uint4); /* of a tile */
    /* Of a piece: the values of all waves, and the rows' reference points and sums. */
    static constexpr int PART_VALUE_BYTES = OUTPUT_WAVES * SLOTS * WAVE * sizeof(float4),
                         PART_BYTES = PART_VALUE_BYTES + ROWS * sizeof(float2),
                         PARTS_BYTES = (MOST_PIECES - 1) * PART_BYTES;
    static constexpr int REST_BYTES =
        TILES * (WEIGHT_BYTES + ROWS * (sizeof(float) + sizeof(float2)) + WAVE * sizeof(float2)) + PARTS_BYTES + 1024;
    static constexpr int STAGES = (SHARED_LIMIT - 1024 - REST_BYTES) / UNIT_BYTES; /* units there is room for */
    static constexpr int WEIGHTS_AT = STAGES * UNIT_BYTES, SUMS_AT = WEIGHTS_AT + TILES * WEIGHT_BYTES,
                         MOVES_AT = SUMS_AT + TILES * WAVE * sizeof(float2),
                         TOPS_AT = MOVES_AT + TILES * ROWS * sizeof(float2),
                         PARTS_AT = TOPS_AT + TILES * ROWS * sizeof(float), BARRIERS_AT = PARTS_AT + PARTS_BYTES,
                         TILE_BARRIERS_AT = BARRIERS_AT + STAGES * 2 * mbarrier::BYTES,
                         HAVE_PARTS_AT = TILE_BARRIERS_AT + TILES * 2 * mbarrier::BYTES;
    static constexpr int SHARED_BYTES = HAVE_PARTS_AT + mbarrier::BYTES;
    static_assert(STAGES >= TILES && SHARED_BYTES <= SHARED_LIMIT, "values need room that keys have had");

    /* Whether a launch's pieces are for clusters, if its tensors have maps. */
    static bool takes(const Launch &launch, int64_t row_tiles, int blocks) {
        const Work &work = launch.work;
        return work.at_multiples && launch.box != 0 && work.rows <= ROWS && (work.keys == 0 || work.dealt > 0) &&
               work.count(row_tiles) * CLUSTER <= blocks;
    }

    /* multiprocessors: a cluster finds room within a part of the GPU alone, so there may not be as many as there are
     * blocks for. (An H200 has room for 30 of 4 blocks, 17 of 6, 15 of 8: half of its multiprocessors always do.) */
    static int start(void (*kernel)(Launch), Launch &launch, int64_t tasks, int multiprocessors, void *stream) {
        launch.order.together.by = 0; /* as each task has blocks of its own, there need be no other order */
        const int pieces = launch.work.dealt;
        if (pieces > 1 && pieces <= MOST_PIECES && tasks * CLUSTER * 2 <= multiprocessors)
            launch.pieces_together = pieces;
        /* In twos even where each has a piece of its own: stores to a cluster of one are an error to compute-sanitizer. */
        const int together = greater(greater(launch.pieces_together, 1) * CLUSTER, 2);
        const int64_t blocks = (tasks * CLUSTER + together - 1) / together * together;
        return launch_next_in_clusters(together, kernel, blocks, THREADS, SHARED_BYTES, stream, launch);
    }

    /* ---- shared memory ---- */

    /* What is copied at one time: number `u` of all that the block copies. */
    struct Unit {
        SharedAddress shared;
        int stage;
        uint32_t turn;
        __device__ __forceinline__ Unit(SharedAddress shared, int u)
            : shared(shared), stage(u % STAGES), turn(u / STAGES & 1) {}
        __device__ __forceinline__ void advance() {
            if (++stage == STAGES) stage = 0, turn ^= 1;
        }
        __device__ __forceinline__ SharedAddress place() const { return shared + stage * UNIT_BYTES; }
        __device__ __forceinline__ SharedAddress full() const {
            return shared + BARRIERS_AT + stage * 2 * mbarrier::BYTES;
        }
        /* Of keys alone: they have been read. */
        __device__ __forceinline__ SharedAddress empty() const { return full() + mbarrier::BYTES; }
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
        __device__ __forceinline__ SharedAddress have_tops() const {
            return shared + TILE_BARRIERS_AT + tile * 2 * mbarrier::BYTES;
        }
        __device__ __forceinline__ SharedAddress have_weights() const { return have_tops() + mbarrier::BYTES; }
    };
    /* By one thread: each such operation is one of the whole wave's. */
    static __device__ __forceinline__ void make_barriers(SharedAddress shared) {
        for (int u = 0; u < STAGES; ++u)
            mbarrier::make(Unit(shared, u).full(), 1), mbarrier::make(Unit(shared, u).empty(), 1);
        for (int tile = 0; tile < TILES; ++tile) {
            mbarrier::make(Handed{shared, tile}.have_tops(), 1);
            mbarrier::make(Handed{shared, tile}.have_weights(), 1);
        }
        mbarrier::make(shared + HAVE_PARTS_AT, 1);
        mbarrier::made();
    }
    /* What other threads' stores are to bring: by one thread, before or after them. */
    static __device__ __forceinline__ void expect(SharedAddress shared, int tiles) {
#pragma unroll 1
        for (int tile = 0; tile < tiles; ++tile) {
            const Handed handed = {shared, tile};
            mbarrier::arrive_and_expect(handed.have_tops(), ROWS * sizeof(float));
            mbarrier::arrive_and_expect(handed.have_weights(), WEIGHT_BYTES + (ROWS + WAVE) * sizeof(float2));
        }
    }

    /* ---- what all waves know ---- */

    /* This block's among those that share its piece. */
    static __device__ __forceinline__ int rank() { return CLUSTER == 1 ? 0 : cluster::rank() % CLUSTER; }
    /* Whether other blocks write into this one's memory. */
    static __device__ __forceinline__ bool meets_others(const Launch &launch) {
        return CLUSTER > 1 || launch.pieces_together > 0;
    }

    template <class Task> struct Way {
        const Launch &launch;
        const Task &task;
        SharedAddress shared;
        int rank = SharedPiece::rank();
        Range keys;
        int tiles;

        __device__ __forceinline__ Way(const Launch &launch, const Task &task, SharedAddress shared)
            : launch(launch), task(task), shared(shared), keys(at_least_one(task.own(task.keys))) {
            const Range any = task.own(task.keys_of_any(task.first_row, ROWS));
            tiles = any.empty() ? 1 : (any.high - keys.low + KEYS - 1) / KEYS;
        }
        /* Of block `to` of those that share the piece. */
        __device__ __forceinline__ SharedAddress shared_of(int to) const {
            return cluster::of(shared, cluster::rank() - rank + to);
        }
        __device__ __forceinline__ int first(int tile) const { return keys.low + tile * KEYS; }
        /* Units: lines of the block's own tiles of keys, then its line of the values of all tiles. */
        __device__ __forceinline__ int own_tiles() const { return (tiles - rank + CLUSTER - 1) / CLUSTER; }
        __device__ __forceinline__ int key_unit(int own_tile, int line) const { return own_tile * LINES + line; }
        __device__ __forceinline__ int value_unit(int tile) const { return own_tiles() * LINES + tile; }

        /* ---- copies, by one wave ---- */

        /* Where a tile is, for the boxes of this lane. */
        using Box = std::conditional_t<PAGED, tensor_map::PageBox, int>;
        __device__ __forceinline__ Box find(int tile) const {
            const int row = lane() * launch.box;
            if constexpr (PAGED) return tensor_map::PageBox::look_up(task.sequence.keys, first(tile) + row, launch.box);
            else return task.sequence.first_key + first(tile);
        }
        template <class Box>
        __device__ __forceinline__ void copy(int u, const CUtensorMap &map, int line, const Box &box) const {
            const Sequence &sequence = task.sequence;
            const Unit unit(shared, u);
            if (u >= STAGES) mbarrier::wait(unit.empty(), 0);
            if constexpr (PAGED) {
                if (lane() == 0) mbarrier::arrive_and_expect(unit.full(), UNIT_BYTES);
                wave_sync();
                const int row = lane() * launch.box;
                if (row < KEYS)
                    tensor_map::copy<tensor_map::Reuse::ONCE>(unit.place() + row * 128, map, line * 64, box.token(),
                                                              sequence.kv_head, box.page(sequence.keys), unit.full());
            } else if (elected()) {
                mbarrier::arrive_and_expect(unit.full(), UNIT_BYTES);
                tensor_map::copy<tensor_map::Reuse::ONCE>(unit.place(), map, line * 64, box, sequence.kv_head,
                                                          sequence.kv_batch, unit.full());
            }
            wave_sync();
        }
        __device__ __forceinline__ void copy_all() const {
            Box boxes[TILES];
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) boxes[tile] = find(tile);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
                if (tile < tiles && tile % CLUSTER == rank)
#pragma unroll
                    for (int line = 0; line < LINES; ++line)
                        copy(key_unit(tile / CLUSTER, line), launch.key, line, boxes[tile]);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
                if (tile < tiles) copy(value_unit(tile), launch.value, rank, boxes[tile]);
        }
    };

    /* ---- scores and weights ---- */

    struct Queries {
        uint32_t operand[STEPS][4];

        template <class Task>
        __device__ __forceinline__ Queries(const Launch &launch, const Task &task, const QueryBits &bits) {
            const Sequence &sequence = task.sequence;
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) {
                const int row = task.first_row + Scores::row(slot), token = task.token(row);
                const Element *from = sequence.query + token * sequence.query_stride;
                if (SEVERAL_HEADS) from += task.member(row) * launch.problem.query_strides[2];
#pragma unroll
                for (int j = 0; j < STEPS; ++j)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int column = j * 16 + half * 8 + Scores::lane_column();
                        const bool exists = token < sequence.rows && (HEAD_DIM % 16 == 0 || column < HEAD_DIM);
                        operand[j][half * 2 + slot] = exists ? bits(global_load<uint32_t>(from + column)) : 0;
                    }
            }
        }
    };
    static __device__ __forceinline__ void multiply(const Queries &queries, SharedAddress keys, int line, Scores &s) {
        const SharedAddress lane_row = keys + columns_first<64>();
#pragma unroll
        for (int j = line * 4; j < lesser(line * 4 + 4, STEPS); ++j)
#pragma unroll
            for (int n = 0; n < KEYS / 16; ++n) {
                uint32_t k[4];
                load_matrices(k, at<64>(lane_row, n * 16, j % 4));
                multiply_add(s.tile[0][2 * n], queries.operand[j], k[0], k[1]);
                multiply_add(s.tile[0][2 * n + 1], queries.operand[j], k[2], k[3]);
            }
    }

    template <class Task> static __device__ __forceinline__ void weigh(const Way<Task> &way, const Score &score) {
        const Task &task = way.task;
        const Launch &launch = way.launch;
        const Sequence &sequence = task.sequence;
        const Mask &mask = sequence.mask;
        const Queries queries(launch, task, score.query_bits);
        const Range whole = task.keys_of_all(task.first_row, ROWS);
        if (meets_others(launch)) cluster::wait(); /* the others' barriers are there */
#pragma unroll 1
        for (int i = wave() - OUTPUT_WAVES; i * CLUSTER + way.rank < way.tiles; i += SCORE_WAVES) {
            const int tile = i * CLUSTER + way.rank, first = way.first(tile);
            Scores s;
            s.clear();
#pragma unroll
            for (int line = 0; line < LINES; ++line) {
                const Unit unit(way.shared, way.key_unit(i, line));
                mbarrier::wait(unit.full(), 0);
                multiply(queries, unit.place(), line, s);
                wave_sync();
                if (lane() == 0) mbarrier::arrive(unit.empty());
            }
            Softmax softmax(score.unit);
            float shrink[SLOTS] = {1.0f, 1.0f};
            const bool small = SmallCap::POSSIBLE && launch.small_cap.holds;
            if (small) {
                launch.small_cap.finish(score, s);
            } else {
                score.finish(
                    s, first, [&](int) { return sequence.slope; },
                    [&](int slot) { return task.first_row + Scores::row(slot) + mask.diagonal; });
            }
            if (!whole.template covers<WINDOW>(first, first + KEYS))
                hide<WINDOW>(s, -INFINITE, first, [&](int slot) {
                    return mask.keys_of(task.token(opaque(task.first_row) + Scores::row(slot)));
                });
            if (small) {
                softmax.add(s);
            } else {
                float top[SLOTS];
#pragma unroll
                for (int slot = 0; slot < SLOTS; ++slot) top[slot] = row_max(s.largest(slot) * score.unit);
#pragma unroll
                for (int to = 0; to < CLUSTER; ++to) {
                    const Handed handed = {way.shared_of(to), tile};
#pragma unroll
                    for (int slot = 0; slot < SLOTS; ++slot)
                        if (lane_leads_row())
                            cluster::store(handed.top(Scores::row(slot)), top[slot], handed.have_tops());
                }
#pragma unroll 1
                for (int before = 0; before < tile; ++before) {
                    const Handed handed = {way.shared, before};
                    mbarrier::wait(handed.have_tops(), 0);
#pragma unroll
                    for (int slot = 0; slot < SLOTS; ++slot)
                        softmax.maximum[slot] =
                            softmax.reference(slot, shared_load<float>(handed.top(Scores::row(slot))));
                }
#pragma unroll
                for (int slot = 0; slot < SLOTS; ++slot) {
                    const float next = softmax.reference(slot, top[slot]);
                    shrink[slot] = exp2(softmax.maximum[slot] - next);
                    softmax.maximum[slot] = next;
                    softmax.sum[slot] = s.exponentiate(slot, score.unit, softmax.maximum[slot]);
                }
            }
            uint32_t p[KEYS / 16][4];
#pragma unroll
            for (int j = 0; j < KEYS / 16; ++j) round_operand(s, 0, j, p[j]);
#pragma unroll
            for (int to = 0; to < CLUSTER; ++to) {
                const Handed handed = {way.shared_of(to), tile};
#pragma unroll
                for (int j = 0; j < KEYS / 16; ++j) cluster::store(handed.weights(j), p[j], handed.have_weights());
#pragma unroll
                for (int slot = 0; slot < SLOTS; ++slot)
                    if (lane_leads_row())
                        cluster::store(handed.move(Scores::row(slot)), make_float2(softmax.maximum[slot], shrink[slot]),
                                       handed.have_weights());
                cluster::store(handed.sums(), make_float2(softmax.sum[0], softmax.sum[1]), handed.have_weights());
            }
        }
    }

    /* ---- output ---- */

    /* Zeros in this wave's columns of values past the end. */
    static __device__ __forceinline__ void clear_past_end(SharedAddress values, int rows) {
        if (rows >= KEYS) return;
        const int chunk = wave() * 2 + lane() % 2;
        for (int row = rows + lane() / 2; row < KEYS; row += WAVE / 2)
            shared_store(values + RowLayout<64>::chunk(row, chunk), make_uint4(0, 0, 0, 0));
        wave_sync();
    }

    /* What the output takes of a tile: on its way from shared memory while the tile before is multiplied, in two halves, as
     * all waves of the block read as much in as many cycles as a half takes. */
    struct Operands {
        static constexpr int STEPS = KEYS / 16, HALF = (STEPS + 1) / 2;
        uint32_t value[STEPS][4];
        uint4 weight[STEPS];
        float2 move[SLOTS], sum;

        /* unit: of the tile's values. */
        template <class Task>
        __device__ __forceinline__ SharedAddress await(const Way<Task> &way, int tile, const Unit &unit) const {
            mbarrier::wait_for_both(unit.full(), unit.turn, Handed{way.shared, tile}.have_weights(), 0);
            clear_past_end(unit.place(), way.task.sequence.keys.count - way.first(tile));
            return unit.place();
        }
        /* values: as this lane reads the first of them. */
        __device__ __forceinline__ void read_values(SharedAddress values) {
#pragma unroll
            for (int j = 0; j < STEPS; ++j) load_matrices_transposed(value[j], at<64>(values, j * 16, 0));
        }
        __device__ __forceinline__ void read_weights(const Handed &handed) {
#pragma unroll
            for (int j = 0; j < STEPS; ++j) weight[j] = shared_load<uint4>(handed.weights(j));
            sum = shared_load<float2>(handed.sums());
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) move[slot] = shared_load<float2>(handed.move(Scores::row(slot)));
        }
        __device__ __forceinline__ void rescale(bool first, Softmax &softmax, Output &o) const {
            float shrink[SLOTS];
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot)
                softmax.maximum[slot] = move[slot].x, shrink[slot] = first ? 1.0f : move[slot].y;
            softmax.rescale(o, shrink);
            softmax.sum[0] = __fadd_rn(__fmul_rn(softmax.sum[0], shrink[0]), sum.x);
            softmax.sum[1] = __fadd_rn(__fmul_rn(softmax.sum[1], shrink[1]), sum.y);
        }
        template <int BEGIN, int END> __device__ __forceinline__ void add(Output &o) const {
#pragma unroll
            for (int j = BEGIN; j < END; ++j) {
                const uint32_t four[4] = {weight[j].x, weight[j].y, weight[j].z, weight[j].w};
                multiply_add(o.tile[0][0], four, value[j][0], value[j][1]);
                multiply_add(o.tile[0][1], four, value[j][2], value[j][3]);
            }
        }
    };
    /* In `o` this wave's columns. */
    template <class Task>
    static __device__ __forceinline__ void add_up(const Way<Task> &way, Softmax &softmax, Output &o) {
        Operands even, odd;
        o.clear();
        const SharedAddress own = at<64>(rows_first<64>(), 0, wave()); /* in a unit */
        Unit unit(way.shared, way.value_unit(0));
        even.read_values(even.await(way, 0, unit) + own);
        even.read_weights({way.shared, 0});
        const auto step = [&](int tile, const Operands &here, Operands &next) __attribute__((always_inline)) {
            const bool more = tile + 1 < way.tiles;
            here.rescale(tile == 0, softmax, o);
            unit.advance();
            if (more) next.read_values(next.await(way, tile + 1, unit) + own);
            here.template add<0, Operands::HALF>(o);
            if (more) next.read_weights({way.shared, tile + 1});
            here.template add<Operands::HALF, Operands::STEPS>(o);
            return more;
        };
#pragma unroll 1
        for (int tile = 0; step(tile, even, odd) && step(tile + 1, odd, even); tile += 2) continue;
    }

    /* As Finish asks for it (attention_forward.hip). */
    static __device__ __forceinline__ int first_column() { return (rank() * OUTPUT_WAVES + wave()) * OWN_COLUMNS; }
    static __device__ __forceinline__ int wave_row() { return 0; }
    template <class RowPointer>
    static __device__ __forceinline__ void store_output(const Output &o, OutputPlace, RowPointer row) {
        const int first = first_column() + Output::lane_column(); /* by all lanes */
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            Element *to = row(Output::row(slot));
#pragma unroll
            for (int i = 0; i < Output::VALUES; i += 2)
                if (to != nullptr && first + Output::column(i) < VALUE_DIM)
                    global_store(to + first + Output::column(i), to_elements(o.get(slot, i), o.get(slot, i + 1)));
        }
    }

    /* As a part, where the row tile has other pieces. */
    template <class Task>
    static __device__ __forceinline__ void leave_part(const Way<Task> &way, const Softmax &softmax, const Output &o) {
        const typename Work::DealtPart part(way.launch.work, way.task.piece, 0);
        const int column = first_column() / OWN_COLUMNS;
        if (column < Work::SLOT_CHUNKS)
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot)
                part.leave(slot * Work::SLOT_CHUNKS + column, Work::chunk_of(o, slot, 0));
        if (column == 0) part.leave(softmax);
    }

    /* Parts of a cluster's other pieces, in the memory of the block that has the same columns of the first. Who sends one
     * may end: none of its memory is asked for any more. */
    struct PartsOfOthers {
        SharedAddress shared;
        int number = wave(); /* which all lanes must ask together */
        __device__ __forceinline__ SharedAddress part(int piece) const {
            return shared + PARTS_AT + (piece - 1) * PART_BYTES;
        }
        __device__ __forceinline__ SharedAddress values(int piece, int slot) const {
            return part(piece) + ((number * SLOTS + slot) * WAVE + lane()) * sizeof(float4);
        }
        __device__ __forceinline__ SharedAddress point(int piece, int slot) const {
            return part(piece) + PART_VALUE_BYTES + Output::row(slot) * sizeof(float2);
        }
        __device__ __forceinline__ SharedAddress are_there() const { return shared + HAVE_PARTS_AT; }
    };
    static __device__ __forceinline__ void expect_parts(SharedAddress shared, const Work &work, const Piece &piece) {
        const int bytes = work.rows * (OUTPUT_WAVES * OWN_COLUMNS * sizeof(float) + sizeof(float2));
        mbarrier::arrive_and_expect(shared + HAVE_PARTS_AT, (piece.count - 1) * bytes);
    }
    template <class Task>
    static __device__ __forceinline__ void send_part(const Way<Task> &way, const Softmax &softmax, const Output &o) {
        const PartsOfOthers to = {cluster::of(way.shared, way.rank)};
        const int piece = way.task.piece.number;
        float2 point[SLOTS];
        Work::give_points(softmax, point);
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            if (Output::row(slot) >= way.launch.work.rows) continue;
            uint32_t values[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) values[i] = __float_as_uint(o.get(slot, i));
            cluster::store(to.values(piece, slot), values, to.are_there());
        }
        if (to.number == 0 && lane_leads_row())
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot)
                if (Output::row(slot) < way.launch.work.rows)
                    cluster::store(to.point(piece, slot), point[slot], to.are_there());
    }
    /* In the order of the pieces, as the second kernel. */
    template <class Task>
    static __device__ __forceinline__ void add_parts(const Way<Task> &way, Softmax &softmax, Output &o) {
        const PartsOfOthers from = {way.shared};
        float2 point[SLOTS];
        Work::give_points(softmax, point);
        bool seen[SLOTS];
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) seen[slot] = point[slot].y != 0;
        mbarrier::wait(from.are_there(), 0);
#pragma unroll 1
        for (int piece = 1; piece < way.task.piece.count; ++piece) {
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) {
                if (Output::row(slot) >= way.launch.work.rows) continue;
                const float2 other = shared_load<float2>(from.point(piece, slot));
                const float4 values = shared_load<float4>(from.values(piece, slot));
                const Weights w(point[slot], other, seen[slot]);
                point[slot] = w.point, seen[slot] |= other.y != 0;
                Work::set_chunk(o, slot, 0, w.add(Work::chunk_of(o, slot, 0), values));
            }
        }
        Work::take_points(softmax, point);
    }

    /* ---- the block ---- */

    template <class RowTile, class Finish>
    static __device__ __forceinline__ void run(const Launch &launch, SharedAddress shared, const Score &score,
                                               Finish finish) {
        using Task = typename Work::template Task<RowTile>;
        let_next_start();
        wait_for_previous();
        clear_rest(launch, static_cast<int>(gridDim.x), THREADS);
        if (thread_in_block() == WAVE) make_barriers(shared);
        const bool together = launch.pieces_together > 0;
        int index = lesser(block() / CLUSTER, launch.tasks - 1); /* CLUSTER 1: there may be one block more */
        const bool exists = block() / CLUSTER == index;
        if (together) { /* one piece after the other, and not one row tile */
            const int pieces = launch.pieces_together;
            index = index / pieces + index % pieces * launch.work.by_row_tiles.by;
        }
        const Task task(launch, launch.order.place(launch.work.row_tile(index)), index);
        const Way<Task> way(launch, task, shared);
        barrier();
        if (meets_others(launch)) cluster::appear();
        if (!exists || !task.exists()) return;
        if (wave() >= OUTPUT_WAVES) return weigh(way, score);
        if (wave() == 0) way.copy_all();
        const bool others = together && task.piece.count > 1, first = task.piece.number == 0;
        if (thread_in_block() == WAVE) {
            expect(shared, way.tiles);
            if (others && first) expect_parts(shared, launch.work, task.piece);
        }
        if (meets_others(launch)) cluster::wait();
        Softmax softmax(score.unit);
        Output o;
        add_up(way, softmax, o);
        if (others && !first) return send_part(way, softmax, o);
        if (task.piece.count > 1 && !together) return leave_part(way, softmax, o);
        if (others) add_parts(way, softmax, o);
        finish(task, softmax, o);
    }
};

/* Where there is none. */
struct NoSharedPiece {
    template <class Launch> static bool takes(const Launch &, int64_t, int) { return false; }
    template <class Kernel, class Launch> static int start(Kernel, Launch &, int64_t, int, void *) { return 0; }
};
template <int HEAD_DIM, int VALUE_DIM>
using SharedPieceOf = std::conditional_t<AITER_SHARES_PIECES, SharedPiece<HEAD_DIM, VALUE_DIM>, NoSharedPiece>;

} // namespace aiter

#endif
