/* The warpgroup of sm_90a's forward loop (arch/sm90_forward.h) that multiplies nothing: it finds out what the block's
 * tasks are, and brings their tiles. */
#ifndef AITER_GPU_ARCH_SM90_FORWARD_COPIES_H
#define AITER_GPU_ARCH_SM90_FORWARD_COPIES_H

#include "gpu/arch/sm90_forward_tiles.h"

namespace aiter {

template <int HEAD_DIM, int VALUE_DIM> struct ForwardCopies : ForwardTiles<HEAD_DIM, VALUE_DIM> {
    using Tiles = ForwardTiles<HEAD_DIM, VALUE_DIM>;
    using Tiles::BLOCK_ROWS, Tiles::QUERY_BYTES, Tiles::ALMOST_DONE_AT, Tiles::at_least_one;
    using Tiles::WAVES, Tiles::WARPGROUPS, Tiles::KEYS, Tiles::LINES, Tiles::VALUE_LINES, Tiles::SEVERAL_HEADS;
    using typename Tiles::Launch, typename Tiles::Order, typename Tiles::Ring, typename Tiles::QueryRing;
    using typename Tiles::Turn;

    /* By wave 2: see Turn. */
    template <class Task>
    static __device__ __forceinline__ void find_tasks(const Launch &launch, SharedAddress shared) {
        Turn turn = {shared};
        int index = block();
        PackedOrder<Order, BLOCK_ROWS> packed;
        uint32_t copied = 0; /* modulo 2 */
#pragma unroll 1
        while (index < launch.tasks) {
            Place at;
            if (launch.order.together.by > 0) {
                if (!packed.find(launch, launch.order, index, at)) break;
            } else {
                at = launch.order.place(launch.work.row_tile(index));
            }
            const Task task(launch, at, index);
            turn.write(task);
            if (task.exists()) {
                turn.announce(true);
                turn = turn.after();
                turn.vacate();
                mbarrier::wait(shared + ALMOST_DONE_AT, copied);
                wave_sync(); /* or a lane that has slept might find it two phases on */
                copied ^= 1;
            }
            if (launch.next == nullptr) {
                index += static_cast<int>(gridDim.x);
            } else {
                wait_for_previous(); /* clear_counter */
                int taken = 0;
                if (lane() == 0) taken = static_cast<int>(atomicAdd(launch.next, 1u));
                index = static_cast<int>(gridDim.x) + from_lane(taken, 0);
            }
        }
        turn.announce(false);
        if (CUT || launch.next != nullptr) wait_for_previous(); /* some thread must, in each block: runtime.h */
    }

    /* ---- copies ---- */

    /* Wave 0 copies keys, wave 1 values: each passes over the other's stages. */
    template <bool VALUES> static __device__ __forceinline__ bool is_others() { return VALUES != (wave() != WAVES); }

    template <bool VALUES, tensor_map::Reuse REUSE>
    static __device__ __forceinline__ void copy_by_map(const Launch &launch, const Sequence &sequence, Ring &ring,
                                                       int first) {
        if (is_others<VALUES>()) return ring.advance();
        ring.vacate();
        if (elected()) {
            constexpr int OWN_LINES = VALUES ? VALUE_LINES : LINES;
            mbarrier::arrive_and_expect(ring.full(), OWN_LINES * KEYS * 128);
#pragma unroll
            for (int line = 0; line < OWN_LINES; ++line)
                tensor_map::copy<REUSE>(ring.tile() + line * KEYS * 128, VALUES ? launch.value : launch.key, line * 64,
                                        sequence.first_key + first, sequence.kv_head, sequence.kv_batch, ring.full());
        }
        wave_sync();
        ring.advance();
    }

    /* A lane for each box. */
    template <bool VALUES, tensor_map::Reuse REUSE>
    static __device__ __forceinline__ void copy_pages(const Launch &launch, const Sequence &sequence, Ring &ring,
                                                      const tensor_map::PageBox &box) {
        constexpr int OWN_LINES = VALUES ? VALUE_LINES : LINES;
        if (is_others<VALUES>()) return ring.advance();
        const int row = lane() * launch.box;
        ring.vacate();
        if (lane() == 0) mbarrier::arrive_and_expect(ring.full(), OWN_LINES * KEYS * 128);
        wave_sync();
        if (row < KEYS) {
            const int page = box.page(sequence.keys), token = box.token();
#pragma unroll
            for (int line = 0; line < OWN_LINES; ++line)
                tensor_map::copy<REUSE>(ring.tile() + (line * KEYS + row) * 128, VALUES ? launch.value : launch.key,
                                        line * 64, token, sequence.kv_head, page, ring.full());
        }
        wave_sync();
        ring.advance();
    }

    /* Zeros past the end of the sequence, before its window, and past the last column. */
    template <bool VALUES>
    static __device__ __forceinline__ void copy_rows(const Sequence &sequence, Ring &ring, int first) {
        if (is_others<VALUES>()) return ring.advance();
        ring.vacate();
        constexpr int PASS_ROWS = WAVE / 8;
        const int row = lane() / 8, chunk = lane() % 8;
        const SharedAddress to = ring.tile() + RowLayout<64>::chunk(row, chunk);
        /* In parts, as Sequence knows tiles of 128 tokens at most, and these begin before the end. What stands past the
         * end of K is masked, and of V cleared (clear_past_end). */
#pragma unroll 1
        for (int part = 0; part < KEYS && first + part < sequence.keys.count; part += 64) {
            const auto tile = sequence.keys.tile(first + part);
#pragma unroll 1
            for (int step = 0; step < lesser(KEYS - part, 64); step += PASS_ROWS) {
                const auto place = tile.place(row, step);
                const bool exists = sequence.keys.exists(first + part + row + step);
                constexpr int OWN_DIM = VALUES ? VALUE_DIM : HEAD_DIM;
#pragma unroll
                for (int line = 0; line < (VALUES ? VALUE_LINES : LINES); ++line) {
                    const int byte = line * 128 + chunk * 16;
                    const bool valid = exists && (line * 64 + 64 <= OWN_DIM || byte < OWN_DIM * 2);
                    copy_async((to ^ (step & PASS_ROWS) << 4) + (part + step) * 128 + line * KEYS * 128,
                               VALUES ? tile.value(place, byte) : tile.key(place, byte), valid);
                }
            }
        }
        mbarrier::arrive_after_copies(ring.full());
        ring.advance();
    }

    /* In the order of the ring. find(first): where the tile from key `first` on is, asked for a tile ahead. Calls
     * almost_done() before the last tile. */
    template <class Find, class CopyKeys, class CopyValues, class AlmostDone>
    static __device__ __forceinline__ void copy_tiles(const Range &keys, Find find, CopyKeys copy_keys,
                                                      CopyValues copy_values, AlmostDone almost_done) {
        auto here = find(keys.low), next = find(keys.low + KEYS);
        copy_keys(here);
#pragma unroll 1
        for (int first = keys.low + KEYS; first < keys.high; first += KEYS) {
            const auto before = here;
            here = next;
            next = find(first + KEYS);
            copy_keys(here);
            copy_values(before);
        }
        almost_done();
        copy_values(here);
    }
    template <class AlmostDone>
    static __device__ __forceinline__ void copy_tiles(const Launch &launch, const Sequence &sequence, Ring &ring,
                                                      const Range &keys, AlmostDone almost_done) {
        if (launch.box == 0)
            copy_tiles(
                keys, [](int first) { return first; }, [&](int first) { copy_rows<false>(sequence, ring, first); },
                [&](int first) { copy_rows<true>(sequence, ring, first); }, almost_done);
        else if (launch.few(sequence.rows, sequence.keys.count))
            copy_boxes<tensor_map::Reuse::ONCE>(launch, sequence, ring, keys, almost_done);
        else copy_boxes<tensor_map::Reuse::OFTEN>(launch, sequence, ring, keys, almost_done);
    }
    template <tensor_map::Reuse REUSE, class AlmostDone>
    static __device__ __forceinline__ void copy_boxes(const Launch &launch, const Sequence &sequence, Ring &ring,
                                                      const Range &keys, AlmostDone almost_done) {
        if constexpr (PAGED)
            copy_tiles(
                keys,
                [&](int first) {
                    return tensor_map::PageBox::look_up(sequence.keys, first + lane() * launch.box, launch.box);
                },
                [&](const auto &box) { copy_pages<false, REUSE>(launch, sequence, ring, box); },
                [&](const auto &box) { copy_pages<true, REUSE>(launch, sequence, ring, box); }, almost_done);
        else
            copy_tiles(
                keys, [](int first) { return first; },
                [&](int first) { copy_by_map<false, REUSE>(launch, sequence, ring, first); },
                [&](int first) { copy_by_map<true, REUSE>(launch, sequence, ring, first); }, almost_done);
    }

    /* The rows of Q of one warpgroup; zeros past the last row and past HEAD_DIM. */
    template <class RowTile>
    static __device__ __forceinline__ void copy_query_rows(const Launch &launch, const RowTile &tile, SharedAddress to,
                                                           int first_row) {
        const Sequence &sequence = tile.sequence;
        const int chunk = lane() % 8;
#pragma unroll 4
        for (int row = lane() / 8; row < 64; row += 4) {
            const int token = tile.token(first_row + row);
            const bool exists = token < sequence.rows;
            const Element *from = sequence.query;
            if (exists) {
                from += token * sequence.query_stride;
                if (SEVERAL_HEADS) from += tile.member(first_row + row) * launch.problem.query_strides[2];
            }
#pragma unroll
            for (int line = 0; line < LINES; ++line) {
                const int byte = line * 128 + chunk * 16;
                const bool valid = exists && (line * 64 + 64 <= HEAD_DIM || byte < HEAD_DIM * 2);
                copy_async(to + line * 64 * 128 + RowLayout<64>::chunk(row, chunk),
                           reinterpret_cast<const char *>(from) + byte, valid);
            }
        }
    }

    template <class RowTile>
    static __device__ __forceinline__ void copy_queries(const Launch &launch, const RowTile &tile,
                                                        const QueryRing &ring) {
        const Sequence &sequence = tile.sequence;
        const int first_row = tile.first_row + ring.warpgroup * 64;
        mbarrier::wait(ring.empty(), ring.turn ^ 1); /* at once in the first turn */
        if (launch.box == 0) {
            copy_query_rows(launch, tile, ring.tile(), first_row);
            mbarrier::arrive_after_copies(ring.full());
        } else {
            if (elected()) {
                mbarrier::arrive_and_expect(ring.full(), QUERY_BYTES);
#pragma unroll
                for (int line = 0; line < LINES; ++line)
                    tensor_map::copy(ring.tile() + line * 64 * 128, launch.query, line * 64,
                                     sequence.first_query + tile.token(first_row), sequence.query_head,
                                     sequence.query_batch, ring.full());
            }
            wave_sync();
        }
    }
};

} // namespace aiter

#endif
