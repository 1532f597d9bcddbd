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
 *   a block           waves 0 to 3: output (sm90_shared_piece_output.h); 4 to 7: scores; 8, beyond 192 dimensions
 *                     9 too: copies, by tensor maps, in the order of their use: the keys of the block's tiles, then its
 *                     lines of all values. The last wave makes the barriers and tells them what to expect
 *   shared memory     sm90_shared_piece_tiles.h. Blocks write into each other's, where a barrier counts the bytes
 *   at the end        where the row tile has this piece alone, the rows. Else a part: to blocks of the cluster, which has all
 *                     of the row tile's pieces and of which each adds up some columns; or to memory, for the second kernel
 *
 * A cluster that has more pieces than blocks takes them in turns. What is copied goes on from one to the next:
 *
 *                       turn 0                         |  turn 1                        | ...
 *      block 0          piece 0                        |  piece 2                       |
 *      block 1          piece 1                        |  piece 3                       |
 *      each block       the same columns of all parts: |  0, then 1                     |  2, then 3
 *
 * Parts of two turns have room. A block sends those of a turn when it has added up the ones before, and of these has some
 * from all blocks: so each of them has by then added up what was in the place before that.
 *
 * How many blocks? As many as values have lines, or half, with two lines each; the most with which a cluster can add up, in
 * turns where that takes no longer than the second kernel; else the most that there are, or the loop takes the pieces.
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
    using Tiles::MOST_SHARING, Tiles::LEAST_SHARING, Tiles::MOST_TOGETHER, Tiles::IN_TURNS;
    using Tiles::OUTPUT_WAVES, Tiles::SCORE_WAVES, Tiles::FIRST_COPY_WAVE, Tiles::COPY_WAVES, Tiles::BARRIER_WAVE;
    using Tiles::THREADS, Tiles::SHARED_BYTES, Tiles::await_others;
    using typename Tiles::Launch, typename Tiles::Work, typename Tiles::Scores, typename Tiles::Softmax;
    using typename Tiles::Unit, typename Tiles::Handed;
    template <class Task> using Way = typename Tiles::template Way<Task>;

    /* ---- host ---- */

    /* A cluster finds room within a part of the GPU alone, so there may not be as many as there are blocks for: an H200 of
     * 132 multiprocessors has room for 15 of 8 blocks, 17 of 6, 30 of 4. (The others come later.) */
    static bool have_room(int64_t clusters, int together, int multiprocessors) {
        const int percent = together <= 2 ? 100 : together == 6 || together == 7 ? 75 : 90;
        return clusters * together * 100 <= int64_t(multiprocessors) * percent;
    }
    /* Decides how a launch's pieces are shared, if they are and its tensors have maps. */
    static bool takes(Launch &launch, int64_t row_tiles, int multiprocessors) {
        const Work &work = launch.work;
        if (!work.at_multiples || launch.box == 0 || work.rows > ROWS || work.keys > 0 && work.dealt == 0) return false;
        const int64_t tasks = work.count(row_tiles);
        const int pieces = greater(work.dealt, 1);
        const auto share = [&](int sharing, int at_once) {
            launch.sharing = Divisor(sharing), launch.together = at_once, launch.by_together = Divisor(at_once);
            if (at_once > 1) launch.tasks = static_cast<int>(row_tiles * at_once);
            return true;
        };
        for (int sharing : {MOST_SHARING, LEAST_SHARING})
            if (pieces * sharing <= MOST_TOGETHER && have_room(row_tiles, pieces * sharing, multiprocessors))
                return share(sharing, pieces);
        /* In turns, unless more blocks at one time gain more than the second kernel takes, about half a piece: half of the
         * multiprocessors read as fast as all. */
        int most = MOST_TOGETHER;
        while (most > 1 && !have_room(row_tiles, most, multiprocessors)) most /= 2;
        const int turns = (pieces + most - 1) / most;
        const int64_t of_dealt = greater<int64_t>(4 * tasks, 2 * multiprocessors); /* in halves of a turn of all */
        if (IN_TURNS && most > 1 &&
            (2 * turns - 1) * int64_t(multiprocessors) <= of_dealt + multiprocessors * Tiles::VALUE_LINES / 16)
            return share(1, (pieces + turns - 1) / turns);
        for (int sharing : {MOST_SHARING, LEAST_SHARING})
            if (have_room(tasks, sharing, multiprocessors)) return share(sharing, 1);
        return false;
    }
    static int start(void (*kernel)(Launch), Launch &launch, void *stream) {
        launch.order.together.by = 0; /* as each task has blocks of its own, there need be no other order */
        const int sharing = launch.sharing.by;
        /* In twos even where each has a piece of its own: stores to a cluster of one are an error to compute-sanitizer. */
        const int together = greater(launch.together * sharing, 2);
        const int64_t blocks = (int64_t(launch.tasks) * sharing + together - 1) / together * together;
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
    template <class Way>
    static __device__ __forceinline__ void pass_tiles(const Way &way, int from, int to, Softmax &softmax) {
        for (; from < to; from += 4) {
            const auto number = [&](int i) { return lesser(from + i, to - 1); };
            const auto handed = [&](int i) { return Handed{way.shared, number(i)}; };
#pragma unroll
            for (int i = 0; i < 4; ++i) mbarrier::wait(handed(i).have_tops(), way.parity(number(i)));
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

    /* Of all tiles of the block's piece, each fourth. */
    template <class Task>
    static __device__ __forceinline__ void weigh(const Way<Task> &way, const Queries &queries, const Score &score) {
        const Task &task = way.task;
        const Launch &launch = way.launch;
        const Sequence &sequence = task.sequence;
        const Mask &mask = sequence.mask;
        const Range whole = task.keys_of_all(task.first_row, ROWS);
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
                if (line % Tiles::KEY_LINES == 0) mbarrier::wait(way.have_keys(i, line), way.parity(i));
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
                way.await_tops_passed();
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
                pass_tiles(way, passed, tile, softmax);
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
            way.await_before(tile, Handed{way.shared, tile}.have_read());
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

        /* While others find out what there is to do. */
        const bool makes_barriers = wave() == BARRIER_WAVE;
        if (makes_barriers) {
            if (lane() == 0) Tiles::make_barriers(shared);
            wave_sync();
            Tiles::tell_of_barriers();
        }
        const int number = launch.sharing.quotient(block()), rank = block() - number * launch.sharing.by;
        int index = lesser(number, launch.tasks - 1); /* in clusters of two there may be one block more */
        if (launch.together > 1) {                    /* one piece after the other, and not one row tile */
            const int row_tile = launch.by_together.quotient(index);
            index = row_tile + (index - row_tile * launch.together) * launch.work.by_row_tiles.by;
        }
        const Task task(launch, launch.order.place(launch.work.row_tile(index)), index);
        Way<Task> way(launch, task, shared, rank);
        /* Barriers are there. Is there anything to do? */
        const auto begin = [&](int role, int waves) {
            if (!makes_barriers) Tiles::await_barriers(role, waves);
            if (Tiles::meets_others(launch)) cluster::appear();
            const bool exists = number < launch.tasks && task.exists();
            if (!exists) await_others(launch);
            return exists;
        };
        if (wave() < OUTPUT_WAVES) {
            const bool exists = begin(Tiles::FOR_OUTPUT, OUTPUT_WAVES);
            clear_rest(launch, static_cast<int>(gridDim.x), OUTPUT_WAVES * WAVE); /* while scores are made */
            if (!exists) return;
            await_others(launch);
            SharedPieceOutput<HEAD_DIM, VALUE_DIM>::run(way, score, finish);
        } else if (wave() < FIRST_COPY_WAVE) {
            if (!begin(Tiles::FOR_SCORES, SCORE_WAVES)) return;
            /* While keys are on their way: others begin to copy when the cluster's blocks have appeared. */
            const Queries queries(launch, task, score.query_bits);
            await_others(launch);
            for (; way.turn < way.turns && way.here; way.go_on()) {
                weigh(way, queries, score);
                way.tell_tops_passed();
            }
        } else {
            const int copier = COPY_WAVES == 1 ? 0 : wave() - FIRST_COPY_WAVE;
            if (!begin(Tiles::FOR_COPIES, COPY_WAVES)) return;
            for (; way.turn < way.turns; way.go_on()) {
                if (!makes_barriers && way.here) way.copy_all(copier);
                if (makes_barriers && lane() == 0) {
                    if (way.here) way.expect();
                    if (way.adds()) way.expect_parts();
                }
                wave_sync();
                if (way.turn == 0) await_others(launch);
                if (makes_barriers && way.here) {
                    way.await_scores();
                    way.tell_tops_passed();
                }
            }
        }
    }
};

/* Where nothing is cut. */
struct NoSharedPiece {
    template <class Launch> static bool takes(const Launch &, int64_t, int) { return false; }
    template <class Kernel, class Launch> static int start(Kernel, Launch &, void *) { return 0; }
};
template <int HEAD_DIM, int VALUE_DIM>
using SharedPieceOf = std::conditional_t<CUT, SharedPiece<HEAD_DIM, VALUE_DIM>, NoSharedPiece>;

} // namespace aiter

#endif
