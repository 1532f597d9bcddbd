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
 *                     block 0 has the first line of 64 columns, block 1 the next one
 *
 *   a block           waves 0 to 3: output (sm90_shared_piece_output.h); 4 to 7: scores; 8: copies, by tensor maps, in the
 *                     order of their use: the keys of the block's tiles, then its lines of all values. Wave 9 makes
 *                     the barriers and tells them what to expect
 *   shared memory     sm90_shared_piece_tiles.h. Blocks write into each other's, where a barrier counts the bytes
 *   at the end        where the row tile has this piece alone, the rows. Else a part: to the blocks of the row tile's first piece,
 *                     where a cluster has room for those of all pieces, which add them up; or to memory, for the second
 *                     kernel
 *
 * How many blocks? As many as values have lines, or half, with two lines each: the most with which a cluster can add up,
 * or else the most that there are. Where even half is more than there are, the loop takes the pieces.
 *
 * mma.sync adds up as wgmma does: on an H200, of 10^8 sums of 128 products, fp16 and bf16, of like and unlike magnitudes, none
 * had other bits, and tests/test_cuda.py compares the loops' on whatever GPU it runs. So few rows do with its 16. */
#ifndef AITER_GPU_ARCH_SM90_SHARED_PIECE_H
#define AITER_GPU_ARCH_SM90_SHARED_PIECE_H

#include "gpu/arch/sm90_shared_piece_output.h"
#include "gpu/mask.h"

namespace aiter {

template <int HEAD_DIM, int VALUE_DIM> struct SharedPiece : SharedPieceTiles<HEAD_DIM, VALUE_DIM> {
    using Tiles = SharedPieceTiles<HEAD_DIM, VALUE_DIM>;
    using Columns = SharedPieceColumns<HEAD_DIM, VALUE_DIM>;
    using Tiles::KEYS, Tiles::LINES, Tiles::STEPS, Tiles::ROWS, Tiles::SLOTS, Tiles::SEVERAL_HEADS;
    using Tiles::MOST_SHARING, Tiles::LEAST_SHARING, Tiles::MOST_LINES, Tiles::MOST_TOGETHER;
    using Tiles::OUTPUT_WAVES, Tiles::SCORE_WAVES, Tiles::COPY_WAVE, Tiles::BARRIER_WAVE;
    using Tiles::THREADS, Tiles::SHARED_BYTES, Tiles::await_others;
    using typename Tiles::Launch, typename Tiles::Work, typename Tiles::Scores, typename Tiles::Softmax;
    using typename Tiles::Unit, typename Tiles::Handed;
    template <class Task> using Way = typename Tiles::template Way<Task>;

    /* ---- host ---- */

    /* Decides how a launch's pieces are shared, if they are and its tensors have maps. A cluster finds room within a part
     * of the GPU alone, so there may not be as many as there are blocks for: of up to 8 blocks there are on half of the
     * multiprocessors, of 4 on nine tenths, of 2 on all. (An H200 has room for 15 of 8, 17 of 6, 30 of 4.) */
    static bool takes(Launch &launch, int64_t row_tiles, int multiprocessors) {
        const Work &work = launch.work;
        if (!work.at_multiples || launch.box == 0 || work.rows > ROWS || work.keys > 0 && work.dealt == 0) return false;
        const int64_t tasks = work.count(row_tiles);
        const int pieces = greater(work.dealt, 1);
        for (int sharing : {MOST_SHARING, LEAST_SHARING})
            if (pieces * sharing * Work::slots_in_use(work.rows) <= MOST_TOGETHER &&
                tasks * sharing * 2 <= multiprocessors) {
                launch.sharing = Divisor(sharing);
                launch.pieces_together = pieces > 1 ? pieces : 0;
                return true;
            }
        for (int sharing : {MOST_SHARING, LEAST_SHARING})
            if (tasks * sharing * 10 <= multiprocessors * (sharing > 2 ? 9 : 10)) {
                launch.sharing = Divisor(sharing);
                return true;
            }
        return false;
    }
    static int start(void (*kernel)(Launch), Launch &launch, int64_t tasks, void *stream) {
        launch.order.together.by = 0; /* as each task has blocks of its own, there need be no other order */
        const int sharing = launch.sharing.by;
        /* In twos even where each has a piece of its own: stores to a cluster of one are an error to compute-sanitizer. */
        const int together = greater(greater(launch.pieces_together, 1) * sharing, 2);
        const int64_t blocks = (tasks * sharing + together - 1) / together * together;
        return launch_next_in_clusters(together, kernel, blocks, THREADS, SHARED_BYTES, stream, launch);
    }

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

    /* Takes the reference point past tiles `from` to `to` - 1, four at a time; past the last one perhaps several times,
     * which changes nothing. */
    static __device__ __forceinline__ void pass_tiles(SharedAddress shared, int from, int to, Softmax &softmax) {
        for (; from < to; from += 4) {
            const auto handed = [&](int i) { return Handed{shared, lesser(from + i, to - 1)}; };
#pragma unroll
            for (int i = 0; i < 4; ++i) mbarrier::wait(handed(i).have_tops(), 0);
            float tops[4][SLOTS];
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int slot = 0; slot < SLOTS; ++slot)
                    tops[i][slot] = shared_load<float>(handed(i).top(Scores::row(slot)));
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int slot = 0; slot < SLOTS; ++slot) softmax.maximum[slot] = softmax.reference(slot, tops[i][slot]);
        }
    }

    /* Of all tiles of the block, each fourth. */
    template <class Task>
    static __device__ __forceinline__ void weigh(const Way<Task> &way, const Queries &queries, const Score &score) {
        const Task &task = way.task;
        const Launch &launch = way.launch;
        const Sequence &sequence = task.sequence;
        const Mask &mask = sequence.mask;
        const Range whole = task.keys_of_all(task.first_row, ROWS);
        await_others(launch);
        Softmax softmax(score.unit);
        int passed = 0; /* tiles that its reference point has passed */
#pragma unroll 1
        for (int i = wave() - OUTPUT_WAVES; i * way.sharing + way.rank < way.tiles; i += SCORE_WAVES) {
            const int tile = i * way.sharing + way.rank, first = way.first(tile);
            Scores s;
            s.clear();
            Unit unit = way.key_unit(i);
#pragma unroll
            for (int line = 0; line < LINES; ++line, unit.advance()) {
                if (line % Tiles::KEY_LINES == 0) mbarrier::wait(way.have_keys(i, line), 0);
                multiply(queries, unit.place(), line, s);
                wave_sync();
                if (lane() == 0) mbarrier::arrive(unit.empty(), OUTPUT_WAVES); /* for all that it waits for */
            }
            float shrink[SLOTS] = {1.0f, 1.0f};
            const bool small = launch.small_cap.applies();
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
                softmax.sum[0] = softmax.sum[1] = 0.0f;
                softmax.add(s);
            } else {
                float top[SLOTS];
#pragma unroll
                for (int slot = 0; slot < SLOTS; ++slot) top[slot] = row_max(s.largest(slot) * score.unit);
#pragma unroll 1
                for (int to = 0; to < way.sharing; ++to) {
                    const Handed handed = {way.shared_of(to), tile};
#pragma unroll
                    for (int slot = 0; slot < SLOTS; ++slot)
                        if (lane_leads_row())
                            cluster::store(handed.top(Scores::row(slot)), top[slot], handed.have_tops());
                }
                pass_tiles(way.shared, passed, tile, softmax);
                passed = tile + 1;
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
#pragma unroll 1
            for (int to = 0; to < way.sharing; ++to) {
                const Handed handed = {way.shared_of(to), tile};
#pragma unroll
                for (int j = 0; j < KEYS / 16; ++j) cluster::store(handed.weights(j), p[j], handed.have_all());
#pragma unroll
                for (int slot = 0; slot < SLOTS; ++slot)
                    if (lane_leads_row())
                        cluster::store(handed.move(Scores::row(slot)), make_float2(softmax.maximum[slot], shrink[slot]),
                                       handed.have_all());
                cluster::store(handed.sums(), make_float2(softmax.sum[0], softmax.sum[1]), handed.have_all());
            }
        }
    }

    /* ---- the block ---- */

    /* finish(task, softmax, output, its place): the rows, whose output is Columns::Output. */
    template <class RowTile, class Finish>
    static __device__ __forceinline__ void run(const Launch &launch, SharedAddress shared, const Score &score,
                                               Finish finish) {
        using Task = typename Work::template Task<RowTile>;
        wait_for_previous();
        let_next_start(); /* the second kernel, for which lengths then are there */
        clear_rest(launch, static_cast<int>(gridDim.x), THREADS);
        const bool makes_barriers = wave() == BARRIER_WAVE; /* while others find out what there is to do */
        if (makes_barriers) {
            if (lane() == 0) Tiles::make_barriers(shared);
            wave_sync();
            Tiles::tell_of_barriers();
        }
        const int number = launch.sharing.quotient(block()), rank = block() - number * launch.sharing.by;
        const bool together = launch.pieces_together > 0;
        int index = lesser(number, launch.tasks - 1); /* in clusters of two there may be one block more */
        if (together) {                               /* one piece after the other, and not one row tile */
            const int pieces = launch.pieces_together;
            index = index / pieces + index % pieces * launch.work.by_row_tiles.by;
        }
        const Task task(launch, launch.order.place(launch.work.row_tile(index)), index);
        const Way<Task> way(launch, task, shared, rank);
        /* Barriers are there. Is there anything to do? */
        const auto begin = [&](bool output) {
            if (!makes_barriers) Tiles::await_barriers(output);
            if (Tiles::meets_others(launch)) cluster::appear();
            const bool exists = number < launch.tasks && task.exists();
            if (!exists) await_others(launch);
            return exists;
        };
        if (wave() < OUTPUT_WAVES) {
            if (!begin(true)) return;
            await_others(launch);
            if (MOST_LINES == 2 && way.lines == 2) SharedPieceOutput<HEAD_DIM, VALUE_DIM, 2>::run(way, score, finish);
            else SharedPieceOutput<HEAD_DIM, VALUE_DIM, 1>::run(way, score, finish);
        } else if (wave() < COPY_WAVE) {
            const Queries queries(launch, task, score.query_bits); /* on their way meanwhile */
            if (begin(false)) weigh(way, queries, score);
        } else {
            if (!begin(false)) return;
            if (wave() == COPY_WAVE) way.copy_all();
            if (makes_barriers && lane() == 0) {
                way.expect();
                if (together && task.piece.number == 0)
                    mbarrier::arrive_and_expect(Tiles::barrier_at(shared, Tiles::HAVE_PARTS),
                                                (task.piece.count - 1) * Tiles::bytes_of_part(launch, way.lines));
            }
            wave_sync();
            await_others(launch);
            if (makes_barriers) way.await_tops();
        }
    }
};

/* Where nothing is cut. */
struct NoSharedPiece {
    template <class Launch> static bool takes(const Launch &, int64_t, int) { return false; }
    template <class Kernel, class Launch> static int start(Kernel, Launch &, int64_t, void *) { return 0; }
};
template <int HEAD_DIM, int VALUE_DIM>
using SharedPieceOf = std::conditional_t<CUT, SharedPiece<HEAD_DIM, VALUE_DIM>, NoSharedPiece>;

} // namespace aiter

#endif
