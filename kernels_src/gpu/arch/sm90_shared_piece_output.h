/* The output of a piece that blocks share (arch/sm90_shared_piece.h), by the waves of a block that have some of its columns:
 *
 *     line of values   0 | wave 0 | wave 1 | wave 2 | wave 3 |       16 columns each; and, of a block that has two lines,
 *                      1 | wave 0 | wave 1 | wave 2 | wave 3 |       those of the second
 *
 *     registers        O; and what is taken of a tile, or of half of one: P, values
 *     at the end       the rows go to memory, or a part of them does, for the second kernel, or to the block that adds up */
#ifndef AITER_GPU_ARCH_SM90_SHARED_PIECE_OUTPUT_H
#define AITER_GPU_ARCH_SM90_SHARED_PIECE_OUTPUT_H

#include "gpu/arch/sm90_shared_piece_tiles.h"
#include "gpu/tile_loop.h"

namespace aiter {

/* Of 16 columns, as Finish asks for it (attention_forward.hip). */
template <int HEAD_DIM, int VALUE_DIM> struct SharedPieceColumns : StoresFromRegisters {
    using Tiles = SharedPieceTiles<HEAD_DIM, VALUE_DIM>;
    static constexpr bool SEVERAL_HEADS = Tiles::SEVERAL_HEADS;
    static constexpr int OWN_COLUMNS = Tiles::OWN_COLUMNS;
    using Output = Accumulator<1, OWN_COLUMNS>;
    struct OutputPlace {
        int first_column;
    };

    static __device__ __forceinline__ int wave_row() { return 0; }
    static __device__ __forceinline__ int first_column(OutputPlace place) { return place.first_column; }
    template <class RowPointer>
    static __device__ __forceinline__ void store_output(const Output &o, OutputPlace place, RowPointer row) {
        const int first = place.first_column + Output::lane_column(); /* by all lanes */
#pragma unroll
        for (int slot = 0; slot < Output::SLOTS; ++slot) {
            Element *to = row(Output::row(slot));
#pragma unroll
            for (int i = 0; i < Output::VALUES; i += 2)
                if (to != nullptr && first + Output::column(i) < VALUE_DIM)
                    global_store(to + first + Output::column(i), to_elements(o.get(slot, i), o.get(slot, i + 1)));
        }
    }
};

/* By a block that has so many LINES of the values. */
template <int HEAD_DIM, int VALUE_DIM, int LINES> struct SharedPieceOutput {
    using Tiles = SharedPieceTiles<HEAD_DIM, VALUE_DIM>;
    using Columns = SharedPieceColumns<HEAD_DIM, VALUE_DIM>;
    using Output = typename Columns::Output;
    using Unit = typename Tiles::Unit;
    using Handed = typename Tiles::Handed;
    using Softmax = typename Tiles::Softmax;
    using Work = typename Tiles::Work;
    static constexpr int SLOTS = Tiles::SLOTS, KEYS = Tiles::KEYS, WAVES = Tiles::OUTPUT_WAVES;

    /* ---- tile after tile ---- */

    /* Zeros in this wave's columns of values past the end. */
    static __device__ __forceinline__ void clear_past_end(SharedAddress values, int rows) {
        const int chunk = wave() * 2 + lane() % 2;
#pragma unroll 1
        for (int row = rows + lane() / 2; row < KEYS; row += WAVE / 2)
            shared_store(values + RowLayout<64>::chunk(row, chunk), make_uint4(0, 0, 0, 0));
        wave_sync();
    }

    /* A tile is taken in parts of 64 keys or fewer. The next one's operands set off when this one's first product has: by
     * then its own are there, and the few counters that the assembler waits by count none but the next one's. */
    static constexpr int STEPS = KEYS / 16, PARTS = (STEPS + 3) / 4, PART_STEPS = (STEPS + PARTS - 1) / PARTS,
                         ROUND = PARTS == 1 ? 2 : 1, PLACES = ROUND * PARTS; /* ROUND: tiles */
    static_assert(PLACES == 2 && ROUND % Tiles::BUNDLE == 0, "tiles of a bundle are waited for together");
    static constexpr __device__ int steps(int part) { return lesser(PART_STEPS, STEPS - part * PART_STEPS); }

    struct Part {
        uint32_t value[LINES][PART_STEPS][4];
        uint4 weight[PART_STEPS];
    };
    /* Beside a tile's first part. */
    struct Beside {
        float shrink[SLOTS];
        float2 sum;
    };

    template <class Way> struct Loop {
        const Way &way;
        Softmax &softmax;
        Output (&o)[LINES];
        Part part[PLACES];
        Beside beside[ROUND];
        const SharedAddress shared = opaque(way.shared), own = at<64>(rows_first<64>(), 0, wave()); /* not found anew */
        /* Of the tile that is read: where this lane reads first, and whom to tell when all has been. */
        SharedAddress values[LINES], weights, empty[LINES];
        Unit next = way.value_unit(); /* of the next tile */

        __device__ __forceinline__ Loop(const Way &way, Softmax &softmax, Output (&o)[LINES])
            : way(way), softmax(softmax), o(o) {
            next.shared = shared;
        }

        /* A tile's values and weights are there, and those of its bundle. */
        __device__ __forceinline__ void await(int tile) const {
            mbarrier::wait(Handed{shared, lesser(tile, way.tiles - 1)}.have_all(), 0);
        }
        /* Goes on to a tile that is there; behind the last one it stays where it is. Without a branch, or the assembler would
         * wait for what is on its way where the two ways meet. */
        __device__ __forceinline__ void go_on(int tile, int of_round) {
            const bool exists = tile < way.tiles;
            const Handed handed = {shared, exists ? tile : tile - 1};
            const int rows = way.task.sequence.keys.count - way.first(tile);
#pragma unroll
            for (int line = 0; line < LINES; ++line, next.advance()) {
                if (rows < KEYS && exists) clear_past_end(next.place(), rows);
                values[line] = exists ? next.place() + own : values[line];
                empty[line] = next.empty();
            }
            weights = handed.weights(0);
            Beside &moves = beside[of_round];
            load_now(moves.sum, handed.sums());
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot)
                load_now(moves.shrink[slot], handed.move(Output::row(slot)) + sizeof(float));
        }
        /* Part number n of a round that begins with `tile`, or of the one behind it. */
        __device__ __forceinline__ void read(int n, int tile) {
            const int p = n % PARTS;
            if (p == 0) go_on(tile + n / PARTS, n / PARTS % ROUND);
            Part &to = part[n % PLACES];
#pragma unroll
            for (int j = 0; j < PART_STEPS; ++j)
                if (j < steps(p)) load_now(to.weight[j], weights + (p * PART_STEPS + j) * WAVE * sizeof(uint4));
#pragma unroll
            for (int line = 0; line < LINES; ++line)
#pragma unroll
                for (int j = 0; j < PART_STEPS; ++j)
                    if (j < steps(p))
                        load_matrices_transposed(to.value[line][j], at<64>(values[line], (p * PART_STEPS + j) * 16, 0));
        }
        __device__ __forceinline__ void rescale(const Beside &moves, bool first) {
            float shrink[SLOTS];
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) shrink[slot] = first ? 1.0f : moves.shrink[slot];
#pragma unroll
            for (int line = 0; line < LINES; ++line) softmax.rescale(o[line], shrink);
            softmax.sum[0] = __fadd_rn(__fmul_rn(softmax.sum[0], shrink[0]), moves.sum.x);
            softmax.sum[1] = __fadd_rn(__fmul_rn(softmax.sum[1], shrink[1]), moves.sum.y);
        }
        __device__ __forceinline__ void multiply(const Part &from, int j) {
            const uint4 w = from.weight[j];
            const uint32_t four[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
            for (int line = 0; line < LINES; ++line) {
                const uint32_t(&v)[4] = from.value[line][j];
                multiply_add(o[line].tile[0][0], four, v[0], v[1]);
                multiply_add(o[line].tile[0][1], four, v[2], v[3]);
            }
        }
        /* The tile's values have been read. */
        __device__ __forceinline__ void release() {
#pragma unroll
            for (int line = 0; line < LINES; ++line) mbarrier::arrive_as_wave(empty[line]);
        }
        __device__ __forceinline__ void run() {
            const bool releases = way.tiles * LINES > Tiles::STAGES; /* else nothing comes to where values were */
            await(0);
            read(0, 0);
#pragma unroll 1
            for (int tile = 0; tile < way.tiles; tile += ROUND)
#pragma unroll
                for (int n = 0; n < PLACES; ++n) {
                    const int p = n % PARTS, of_round = n / PARTS;
                    if (of_round > 0 && tile + of_round >= way.tiles) break;
                    if (p == 0) rescale(beside[of_round], tile + of_round == 0);
                    /* Before the product, as the assembler moves no reads from above beyond it. */
                    if (PARTS == 2 && p == 1 && releases) release();
                    multiply(part[n], 0);
                    if (PARTS == 1 && releases) release();
                    if (p == 0 && (of_round + 1) % Tiles::BUNDLE == 0) await(tile + of_round + 1);
                    read(n + 1, tile);
#pragma unroll
                    for (int j = 1; j < PART_STEPS; ++j)
                        if (j < steps(p)) multiply(part[n], j);
                }
            const Handed last = {shared, way.tiles - 1};
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot)
                softmax.maximum[slot] = shared_load<float>(last.move(Output::row(slot)));
        }
    };

    /* ---- the end ---- */

    template <class Way> static __device__ __forceinline__ int first_column(const Way &way, int line) {
        return (way.first_line + line) * 64 + wave() * Columns::OWN_COLUMNS;
    }
    /* As a part, where the row tile has other pieces. */
    template <class Way>
    static __device__ __forceinline__ void leave_part(const Way &way, const Softmax &softmax,
                                                      const Output (&o)[LINES]) {
        const typename Work::DealtPart part(way.launch.work, way.task.piece, 0);
#pragma unroll
        for (int line = 0; line < LINES; ++line) {
            const int column = first_column(way, line) / Columns::OWN_COLUMNS;
            if (column < Work::SLOT_CHUNKS)
#pragma unroll
                for (int slot = 0; slot < SLOTS; ++slot)
                    part.leave(slot * Work::SLOT_CHUNKS + column, Work::chunk_of(o[line], slot, 0));
            if (column == 0) part.leave(softmax);
        }
    }

    /* Parts of a cluster's other pieces, in the memory of the block that has the same columns of the first. Who sends one
     * may end: none of its memory is asked for any more. */
    struct PartsOfOthers {
        static constexpr int SLOT_BYTES = LINES * Tiles::LINE_BYTES;
        SharedAddress shared;
        int bytes;           /* of a part */
        int number = wave(); /* which all lanes must ask together */
        __device__ __forceinline__ PartsOfOthers(SharedAddress shared, const Work &work)
            : shared(shared), bytes(Tiles::POINT_BYTES + Work::slots_in_use(work.rows) * SLOT_BYTES) {}
        __device__ __forceinline__ SharedAddress part(int piece) const {
            return shared + Tiles::PARTS_AT + (piece - 1) * bytes;
        }
        __device__ __forceinline__ SharedAddress values(int piece, int line, int slot) const {
            return part(piece) + Tiles::POINT_BYTES + slot * SLOT_BYTES +
                   ((line * WAVES + number) * WAVE + lane()) * sizeof(float4);
        }
        __device__ __forceinline__ SharedAddress point(int piece, int slot) const {
            return part(piece) + Output::row(slot) * sizeof(float2);
        }
        __device__ __forceinline__ SharedAddress are_there() const {
            return Tiles::barrier_at(shared, Tiles::HAVE_PARTS);
        }
    };
    template <class Way>
    static __device__ __forceinline__ void send_part(const Way &way, const Softmax &softmax, const Output (&o)[LINES]) {
        const PartsOfOthers to(cluster::of(way.shared, way.rank), way.launch.work);
        const int piece = way.task.piece.number;
        float2 point[SLOTS];
        Work::give_points(softmax, point);
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            if (Output::row(slot) >= way.launch.work.rows) continue;
#pragma unroll
            for (int line = 0; line < LINES; ++line) {
                uint32_t values[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) values[i] = __float_as_uint(o[line].get(slot, i));
                cluster::store(to.values(piece, line, slot), values, to.are_there());
            }
        }
        if (to.number == 0 && lane_leads_row())
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot)
                if (Output::row(slot) < way.launch.work.rows)
                    cluster::store(to.point(piece, slot), point[slot], to.are_there());
    }
    /* In the order of the pieces, as the second kernel. */
    template <class Way>
    static __device__ __forceinline__ void add_parts(const Way &way, Softmax &softmax, Output (&o)[LINES]) {
        const PartsOfOthers from(way.shared, way.launch.work);
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
                const Weights w(point[slot], other, seen[slot]);
                point[slot] = w.point, seen[slot] |= other.y != 0;
#pragma unroll
                for (int line = 0; line < LINES; ++line)
                    Work::set_chunk(
                        o[line], slot, 0,
                        w.add(Work::chunk_of(o[line], slot, 0), shared_load<float4>(from.values(piece, line, slot))));
            }
        }
        Work::take_points(softmax, point);
    }

    /* ---- the waves' share of a piece ---- */

    /* finish(task, softmax, output, its place): the rows. */
    template <class Way, class Finish>
    static __device__ __forceinline__ void run(const Way &way, const Score &score, Finish finish) {
        const auto &task = way.task;
        const bool together = way.launch.pieces_together > 0, others = together && task.piece.count > 1,
                   first = task.piece.number == 0;
        Softmax softmax(score.unit);
        Output o[LINES];
#pragma unroll
        for (int line = 0; line < LINES; ++line) o[line].clear();
        Loop<Way>(way, softmax, o).run();
        if (others && !first) return send_part(way, softmax, o);
        if (task.piece.count > 1 && !together) return leave_part(way, softmax, o);
        if (others) add_parts(way, softmax, o);
#pragma unroll
        for (int line = 0; line < LINES; ++line) {
            Softmax own = softmax; /* which the end of a row changes */
            finish(task, own, o[line], {first_column(way, line)});
        }
    }
};

} // namespace aiter

#endif
