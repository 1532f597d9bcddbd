/* The output of a piece that blocks share (arch/sm90_shared_piece.h), by the waves of a block that have some of its columns:
 *
 *     line of values   0 | wave 0 | wave 1 | wave 2 | wave 3 |       16 columns each; and, of a block that has two lines,
 *                      1 | wave 0 | wave 1 | wave 2 | wave 3 |       those of the second
 *
 *     registers        O; and what is taken of a tile, or of half of one: P, values
 *     at the end       the rows go to memory, or a part of them does, for the second kernel, or to blocks that add up */
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

template <int HEAD_DIM, int VALUE_DIM> struct SharedPieceOutput {
    using Tiles = SharedPieceTiles<HEAD_DIM, VALUE_DIM>;
    using Columns = SharedPieceColumns<HEAD_DIM, VALUE_DIM>;
    using Output = typename Columns::Output;
    using Unit = typename Tiles::Unit;
    using Handed = typename Tiles::Handed;
    using Softmax = typename Tiles::Softmax;
    using Work = typename Tiles::Work;
    static constexpr int SLOTS = Tiles::SLOTS, KEYS = Tiles::KEYS, WAVES = Tiles::OUTPUT_WAVES,
                         LINES_OF_BLOCK = Tiles::MOST_LINES;

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

    template <int LINES> struct Part {
        uint32_t value[LINES][PART_STEPS][4];
        uint4 weight[PART_STEPS];
    };
    /* Beside a tile's first part. */
    struct Beside {
        float2 move[SLOTS];
        float2 sum;
    };

    /* By a block that has so many LINES of the values. */
    template <int LINES, class Way> struct Loop {
        using Part = SharedPieceOutput::Part<LINES>;
        const Way &way;
        Softmax &softmax;
        Output (&o)[LINES_OF_BLOCK];
        Part part[PLACES];
        Beside beside[ROUND];
        const SharedAddress shared = opaque(way.shared), own = at<64>(rows_first<64>(), 0, wave()); /* not found anew */
        /* Of the tile that is read: where this lane reads first, and whom to tell when all has been. */
        SharedAddress values[LINES], weights, empty[LINES];
        Unit next = way.value_unit(); /* of the next tile */

        __device__ __forceinline__ Loop(const Way &way, Softmax &softmax, Output (&o)[LINES_OF_BLOCK])
            : way(way), softmax(softmax), o(o) {
            next.shared = shared;
        }

        /* A tile's values and weights are there, and those of its bundle. */
        __device__ __forceinline__ void await(int tile) const {
            tile = lesser(tile, way.tiles - 1);
            mbarrier::wait(Handed{shared, tile}.have_all(), way.parity(tile));
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
            for (int slot = 0; slot < SLOTS; ++slot) load_now(moves.move[slot], handed.move(Output::row(slot)));
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
            for (int slot = 0; slot < SLOTS; ++slot) {
                softmax.maximum[slot] = moves.move[slot].x; /* after the last tile the piece's */
                shrink[slot] = first ? 1.0f : moves.move[slot].y;
            }
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
        /* All that there was of the tile has been read. */
        __device__ __forceinline__ void release(int tile) {
#pragma unroll
            for (int line = 0; line < LINES; ++line) mbarrier::arrive_as_wave(empty[line]);
            if (way.turns > 1) mbarrier::arrive_as_wave(Handed{shared, tile}.have_read());
        }
        __device__ __forceinline__ void run() {
            /* Else nothing comes to where values were. */
            const bool releases = way.tiles * way.lines > Tiles::STAGES || way.turns > 1;
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
                    if (PARTS == 2 && p == 1 && releases) release(tile + of_round);
                    multiply(part[n], 0);
                    if (PARTS == 1 && releases) release(tile + of_round);
                    if (p == 0 && (of_round + 1) % Tiles::BUNDLE == 0) await(tile + of_round + 1);
                    read(n + 1, tile);
#pragma unroll
                    for (int j = 1; j < PART_STEPS; ++j)
                        if (j < steps(p)) multiply(part[n], j);
                }
        }
    };

    /* ---- the end ---- */

    template <class Way> static __device__ __forceinline__ int first_column(const Way &way, int line) {
        return (way.first_line + line) * 64 + wave() * Columns::OWN_COLUMNS;
    }
    /* As a part, where the row tile has other pieces. */
    template <class Way>
    static __device__ __forceinline__ void leave_part(const Way &way, const Softmax &softmax,
                                                      const Output (&o)[LINES_OF_BLOCK]) {
        const typename Work::DealtPart part(way.launch.work, way.piece, 0);
#pragma unroll
        for (int line = 0; line < LINES_OF_BLOCK; ++line) {
            const int column = first_column(way, line) / Columns::OWN_COLUMNS;
            if (line < way.lines && column < Work::SLOT_CHUNKS)
#pragma unroll
                for (int slot = 0; slot < SLOTS; ++slot)
                    part.leave(slot * Work::SLOT_CHUNKS + column, Work::chunk_of(o[line], slot, 0));
            if (column == 0) part.leave(softmax);
        }
    }

    /* Parts of a turn's pieces, in the memory of a block that adds them up. */
    struct Parts {
        SharedAddress shared;
        int turn, pieces; /* pieces: at one time */
        __device__ __forceinline__ SharedAddress points(int piece) const {
            return shared + Tiles::PARTS_AT + turn % 2 * Tiles::TURN_BYTES + piece * Tiles::POINT_BYTES;
        }
        __device__ __forceinline__ SharedAddress point(int piece, int slot) const {
            return points(piece) + Output::row(slot) * sizeof(float2);
        }
        /* strip: of those that the block adds up. */
        __device__ __forceinline__ SharedAddress values(int strip, int piece, int slot) const {
            return points(0) + Tiles::POINTS_BYTES + (strip * pieces + piece) * Tiles::STRIP_BYTES +
                   slot * Tiles::SLOT_BYTES + lane() * sizeof(float4);
        }
    };
    /* To whom adds it up. Who sends a part may end: none of its memory is asked for any more. */
    template <class Way>
    static __device__ __forceinline__ void send_part(const Way &way, const Softmax &softmax,
                                                     const Output (&o)[LINES_OF_BLOCK]) {
        const int number = wave(); /* which all lanes must ask together */
        const int piece = way.piece.number - way.turn * way.at_once, rows = way.launch.work.rows;
        const auto all = way.adders();
        float2 point[SLOTS];
        Work::give_points(softmax, point);
#pragma unroll
        for (int line = 0; line < LINES_OF_BLOCK; ++line) {
            if (line >= way.lines) break;
            const int strip = (way.first_line + line) * WAVES + number, block = all.of(strip);
            const Parts to = {cluster::of(way.shared, block), way.turn, way.at_once};
            const SharedAddress barrier = cluster::of(way.have_parts(way.turn), block);
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) {
                if (Output::row(slot) >= rows) continue;
                uint32_t values[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) values[i] = __float_as_uint(o[line].get(slot, i));
                cluster::store(to.values(strip - all.first_strip(block), piece, slot), values, barrier);
            }
        }
        if (way.first_line > 0 || !lane_leads_row()) return;
#pragma unroll 1
        for (int block = number; block < all.blocks; block += WAVES) {
            const Parts to = {cluster::of(way.shared, block), way.turn, way.at_once};
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot)
                if (Output::row(slot) < rows)
                    cluster::store(to.point(piece, slot), point[slot], cluster::of(way.have_parts(way.turn), block));
        }
    }
    /* What this wave adds up: a strip, if any, in the order of the pieces, as the second kernel. */
    template <class Way> struct Sum {
        static constexpr int TOGETHER = 4; /* parts that are read at one time */
        const Way &way;
        Output o;
        float2 point[SLOTS];
        bool seen[SLOTS];

        __device__ __forceinline__ Sum(const Way &way) : way(way) {
            o.clear(); /* rows that do not exist */
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) point[slot] = make_float2(0, 0);
        }
        /* Of the block's strips; by all lanes. */
        __device__ __forceinline__ int of_block() const {
            return wave() - way.adders().first_strip(cluster::rank()) & WAVES - 1;
        }
        __device__ __forceinline__ int strip() const { return way.adders().first_strip(cluster::rank()) + of_block(); }
        __device__ __forceinline__ bool exists() const { return of_block() < way.adders().strips(cluster::rank()); }
        /* Parts of a turn. All waves of the output wait for them: before the next but one sets off they have been read. */
        __device__ __forceinline__ void add(int turn) {
            mbarrier::wait(way.have_parts(turn), turn / 2 % 2);
            const int of_block = this->of_block();
            if (!exists()) return;
            const Parts parts = {way.shared, turn, way.at_once};
            const int count = way.pieces_of(turn);
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) {
                if (Output::row(slot) >= way.launch.work.rows) continue;
#pragma unroll 1
                for (int first = 0; first < count; first += TOGETHER) {
                    float4 values[TOGETHER];
                    float2 points[TOGETHER];
#pragma unroll
                    for (int i = 0; i < TOGETHER; ++i) {
                        if (first + i >= count) continue;
                        values[i] = shared_load<float4>(parts.values(of_block, first + i, slot));
                        points[i] = shared_load<float2>(parts.point(first + i, slot));
                    }
#pragma unroll
                    for (int i = 0; i < TOGETHER; ++i) {
                        if (first + i >= count) continue;
                        if (turn + first + i == 0) {
                            point[slot] = points[i], seen[slot] = points[i].y != 0;
                            Work::set_chunk(o, slot, 0, values[i]);
                            continue;
                        }
                        const Weights w(point[slot], points[i], seen[slot]);
                        point[slot] = w.point, seen[slot] |= points[i].y != 0;
                        Work::set_chunk(o, slot, 0, w.add(Work::chunk_of(o, slot, 0), values[i]));
                    }
                }
            }
        }
    };

    /* ---- the waves' share of a piece ---- */

    /* finish(task, softmax, output, its place): the rows. */
    template <class Way, class Finish>
    static __device__ __forceinline__ void run(Way &way, const Score &score, Finish finish) {
        const auto &task = way.task;
        const bool adds = way.adds();
        Softmax softmax(score.unit);
        Output o[LINES_OF_BLOCK];
        Sum<Way> sum(way);
#pragma unroll 1
        for (; way.turn < way.turns; way.go_on()) {
            if (way.here) {
#pragma unroll
                for (int line = 0; line < LINES_OF_BLOCK; ++line) o[line].clear();
                if (LINES_OF_BLOCK == 1 || way.lines == 1) Loop<1, Way>(way, softmax, o).run();
                else Loop<LINES_OF_BLOCK, Way>(way, softmax, o).run();
            }
            if (!adds) break;
            if (way.turn > 0) sum.add(way.turn - 1);
            if (!way.here) continue;
            if (way.turns > 1) Tiles::meet_output(); /* all of the block's waves have added up */
            send_part(way, softmax, o);
            softmax = Softmax(score.unit);
        }
        int lines = way.lines, column = first_column(way, 0);
        if (adds) {
            sum.add(way.turns - 1);
            if (!sum.exists()) return;
            Work::take_points(softmax, sum.point);
            o[0] = sum.o, lines = 1, column = sum.strip() * Columns::OWN_COLUMNS;
        } else if (way.piece.count > 1) {
            return leave_part(way, softmax, o);
        }
#pragma unroll 1
        for (int line = 0; line < lines; ++line, column += 64) {
            Softmax own = softmax; /* which the end of a row changes */
            finish(task, own, o[0], {column});
            o[0] = o[LINES_OF_BLOCK - 1];
        }
    }
};

} // namespace aiter

#endif
