/* The warpgroups of sm_90a's forward loop (arch/sm90_forward.h) that multiply: one's way through the tiles of a row tile, and
 * the place from which its output leaves. */
#ifndef AITER_GPU_ARCH_SM90_FORWARD_PRODUCTS_H
#define AITER_GPU_ARCH_SM90_FORWARD_PRODUCTS_H

#include "gpu/arch/sm90_forward_tiles.h"
#include "gpu/mask.h"

namespace aiter {

template <int HEAD_DIM, int VALUE_DIM> struct ForwardProducts : ForwardTiles<HEAD_DIM, VALUE_DIM> {
    using Tiles = ForwardTiles<HEAD_DIM, VALUE_DIM>;
    using Tiles::KEYS, Tiles::STEPS, Tiles::COLUMNS, Tiles::VALUE_LINES, Tiles::QUERY_BYTES, Tiles::SUM_AT;
    using Tiles::WARPGROUPS, Tiles::WARPGROUP, Tiles::WAVE_ROWS, Tiles::BULK_OUTPUT, Tiles::same, Tiles::at_least_one;
    using typename Tiles::Launch, typename Tiles::Work, typename Tiles::Ring, typename Tiles::QueryRing;
    using typename Tiles::Scores, typename Tiles::Output, typename Tiles::Softmax;

    /* Where a wave's rows of Q are and, later, its output, until the bulk copy engine has taken it to memory. */
    struct OutputPlace {
        SharedAddress rows = 0;
        bool filled = false;
        int token, head, batch; /* of the tensor of outputs, where it is */

        /* Copies what is there, if anything is. By the whole wave, which has written it. */
        __device__ __forceinline__ void send(const Launch &launch) {
            wgmma::shared_is_written(); /* whether it is sent or the next queries come there */
            wave_sync();
            if (filled && lane() == 0) { /* who also waits, and gives the room back: release_queries_before() */
#pragma unroll
                for (int line = 0; line < VALUE_LINES; ++line)
                    tensor_map::store(launch.output, line * 64, token, head, batch, rows + line * 64 * 128);
                bulk::end();
            }
            wave_sync();
            filled = false;
        }
    };

    /* ---- products ---- */

    static __device__ __forceinline__ void begin_scores(SharedAddress queries, SharedAddress keys, Scores &s) {
        const wgmma::Matrix a = wgmma::matrix(opaque(queries)), b = wgmma::matrix(keys);
#pragma unroll
        for (int j = 0; j < STEPS; ++j)
            wgmma::Product<KEYS>::multiply(s.tile[0], a + (j / 4 * 64 * 128 + j % 4 * 32) / 16,
                                           b + (j / 4 * KEYS * 128 + j % 4 * 32) / 16, j > 0);
        wgmma::end();
    }
    static __device__ __forceinline__ void begin_output(const uint32_t (&p)[KEYS / 16][4], SharedAddress values,
                                                        Output &o) {
        const wgmma::Matrix b = wgmma::matrix(values, KEYS * 128);
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j)
            wgmma::Product<COLUMNS>::multiply_transposed(o.tile[0], p[j], b + j * 16 * 128 / 16);
        wgmma::end();
    }
    static __device__ __forceinline__ void round(const Scores &s, uint32_t (&p)[KEYS / 16][4]) {
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j) round_operand(s, 0, j, p[j]);
    }

    /* One warpgroup's way through the tiles of a row tile. */
    struct Warpgroup {
        const Launch &launch;
        SharedAddress shared;
        int number = wave() / 4; /* of the warpgroup */
        Ring ring = {shared};
        QueryRing queries = {shared, number};
        int own_rows = wave() % 4 * WAVE_ROWS; /* the wave's, in the warpgroup's */
        OutputPlace output;
        bool is_after = false; /* another row tile */

        __device__ __forceinline__ Warpgroup(const Launch &launch, SharedAddress shared)
            : launch(launch), shared(shared) {
            if (number == WARPGROUPS - 1) pass(FIRST_TURN, 2 * WARPGROUP); /* the first begins */
        }

        /* Named barriers: the warpgroup's own meeting, and its turn to set off. */
        static constexpr int FIRST_MEETING = 1, FIRST_TURN = 4;
        __device__ __forceinline__ void meet_all() const { meet(FIRST_MEETING + number, WARPGROUP); }
        __device__ __forceinline__ void await_turn() const { meet(FIRST_TURN + number, 2 * WARPGROUP); }
        __device__ __forceinline__ void pass_turn() const {
            pass(FIRST_TURN + (number + 1 == WARPGROUPS ? 0 : number + 1), 2 * WARPGROUP);
        }
        /* Not by the bulk copy engine: what other threads have copied becomes visible to wgmma. */
        __device__ __forceinline__ Ring take() {
            const Ring taken = ring.take();
            if (launch.box == 0) wgmma::shared_is_written();
            return taken;
        }

        __device__ __forceinline__ void await_queries(const QueryBits &bits) {
            const bool change = bits.keep == 0 || bits.flip != 0; /* rare */
            mbarrier::wait(queries.full(), queries.turn);
            if (change) {
                const SharedAddress mine = queries.tile() + thread_in_block() % WARPGROUP * 4;
#pragma unroll 1
                for (int i = 0; i < QUERY_BYTES; i += WARPGROUP * 4)
                    shared_store(mine + i, bits(shared_load<uint32_t>(mine + i)));
            }
            if (change || launch.box == 0) wgmma::shared_is_written();
            if (change) meet_all();
        }

        /* Values past the end of the sequence become zeros: what the tensor holds there meets probabilities of 0. */
        __device__ __forceinline__ void clear_past_end(SharedAddress values, int rows) const {
            if (rows >= KEYS) return;
            clear_rows_from<KEYS, VALUE_LINES>(values, rows);
            wgmma::shared_is_written();
            meet_all();
        }

        __device__ __forceinline__ SharedAddress own_queries() const { return queries.tile() + own_rows * 128; }
        /* The place of the queries before these, and of their output, is read no more as soon as the copies of that are
         * under way: looked for only now, when they have had time. */
        __device__ __forceinline__ void release_queries_before() {
            bulk::wait_for_reads(); /* by all lanes: a branch would make the assembler wait for the product */
            if (is_after && lane() == 0) mbarrier::arrive(QueryRing{shared, number, queries.stage ^ 1}.empty());
            is_after = true;
        }

        /* Tiles that only other warpgroups see are passed over, but in step with these. read_task(): what there is to
         * do. at_last_product(): while it is made. */
        template <class ReadTask, class AtLastProduct>
        __device__ __forceinline__ void attend(ReadTask read_task, const Score &score, Softmax &softmax, Output &o,
                                               AtLastProduct at_last_product) {
            Scores s;
            await_queries(score.query_bits);
            const Ring first_keys = take();
            await_turn();
            wgmma::begin();
            begin_scores(queries.tile(), first_keys.tile(),
                         s); /* they need nothing of the task but its place in the rings */
            pass_turn();
            if (BULK_OUTPUT) output.send(launch);
            const auto tile = read_task();
            const Sequence &sequence = tile.sequence;
            const int wave_row = tile.first_row + wave() * WAVE_ROWS;
            const Mask &mask = sequence.mask;
            const Range keys = at_least_one(tile.own(tile.keys));
            const int keys_count = same(sequence.keys.count), first_row = tile.first_row + number * 64;
            /* What any of the warpgroup's rows sees ends here; what all of them see, or all of the wave's, needs no
             * mask. */
            const Range any = tile.own(tile.keys_of_any(first_row, 64)), all = tile.keys_of_all(first_row, 64);
            const Range of_wave = tile.keys_of_all(wave_row, WAVE_ROWS);
            const int own_end = same(any.empty() ? keys.low + 1 : any.high);
            const Range whole = {same(all.low), lesser(own_end, same(all.high))};
            const Range wave_whole = {same(of_wave.low), same(of_wave.high)};
            uint32_t p[KEYS / 16][4];
            float shrink[2];
            typename Work::InTurn pieces(launch.work, keys.low);
            const auto finish = [&](int first) {
                score.finish(
                    s, first, [&](int) { return sequence.slope; },
                    [&](int slot) { return wave_row + Scores::row(slot) + mask.diagonal; });
            };
            const auto hide = [&](int first) {
                if (!wave_whole.template covers<WINDOW>(first, first + KEYS))
                    aiter::hide<WINDOW>(s, -INFINITE, first, [&](int slot) {
                        return mask.keys_of(tile.token(opaque(wave_row) + Scores::row(slot)));
                    });
            };

            /* Scores become weights. Is the output to be multiplied by `shrink`? */
            const auto weigh = [&](int first, bool masked) __attribute__((always_inline)) {
                if (launch.small_cap.applies()) {
                    launch.small_cap.finish(score, s);
                    if (masked) hide(first);
                    softmax.add(s);
                    return false;
                }
                finish(first);
                if (masked) hide(first);
                return softmax.advance(s, shrink);
            };

            wgmma::wait<0>();
            first_keys.release();
            changed(s);
            weigh(keys.low, true);
            round(s, p);
            if (BULK_OUTPUT) release_queries_before();
            /* cut: the tile is the first of a piece; with its scores, the last product of the piece before is made. */
            const auto step = [&](int first, bool masked, bool cut = false) __attribute__((always_inline)) {
                const Ring key_tile = take();
                await_turn();
                wgmma::begin();
                begin_scores(queries.tile(), key_tile.tile(), s);
                const Ring values = take();
                wgmma::begin();
                begin_output(p, values.tile(), o);
                pass_turn();
                wgmma::wait<1>();
                key_tile.release();
                changed(s);
                if (cut) pieces.set_aside(softmax);
                const bool grown = weigh(first, masked);
                wgmma::wait<0>();
                values.release();
                changed(o);
                round(s, p); /* before the branch: it fits between the exponentials */
                if (cut) pieces.leave(launch.work, shared + SUM_AT, o);
                else if (grown) softmax.rescale(o, shrink);
            };
            int first = keys.low + KEYS;
#pragma unroll 1
            for (;;) {
                int end = own_end;
                if constexpr (CUT)
                    end = same(lesser(end, pieces.end)), first = same(first); /* or it is not seen to be */
                if constexpr (WINDOW)
#pragma unroll 1
                    for (; first < lesser(end, whole.low); first += KEYS) step(first, true);
#pragma unroll 1
                for (; first + KEYS <= lesser(end, whole.high); first += KEYS) step(first, false);
#pragma unroll 1
                for (; first < end; first += KEYS) step(first, true);
                if (!CUT || first >= own_end) break;
                step(first, true, true);
                first += KEYS;
            }
            if (!BULK_OUTPUT && lane() == 0) mbarrier::arrive(queries.empty());
            queries.advance();
            if (first < keys.high) pass_over_scores();
            Ring last_values = take();
            clear_past_end(last_values.tile(), keys_count - (first - KEYS));
            wgmma::begin();
            begin_output(p, last_values.tile(), o);
            at_last_product();
            if (BULK_OUTPUT) meet_all(); /* the last scores of all are made: the place of Q is free */
#pragma unroll 1
            for (; first < keys.high; first += KEYS) {
                wgmma::wait<0>();
                last_values.release(); /* now, or the copies could not go on */
                if (first + KEYS < keys.high) pass_over_scores();
                last_values = take();
            }
            wgmma::wait<0>();
            last_values.release();
            changed(o);
            pieces.collect(launch.work, shared + SUM_AT, softmax, o);
        }
        __device__ __forceinline__ void pass_over_scores() {
            take().release();
            await_turn();
            pass_turn();
        }
    };
};

} // namespace aiter

#endif
