/* Latent attention on sm_90a (see sm90_latent.h): the warpgroup that copies. Each place is filled as soon as it is
 * free: in rounds of two tiles, the second's right half before the first's. */
#ifndef AITER_GPU_ARCH_SM90_LATENT_COPIES_H
#define AITER_GPU_ARCH_SM90_LATENT_COPIES_H

#include "gpu/arch/sm90_latent_tiles.h"

namespace aiter {

/* By maps: waves 0 and 1 copy a half of the values each, wave 2 the block that is none, as room for each comes free at
 * another time. One lane sets off all boxes, or where they are parts of a block (small pages) a lane for each. */
template <class Launch> struct LatentMappedCopier : LatentTiles {
    const Launch &launch;
    SharedAddress shared;
    uint32_t count = 0; /* tiles that have set off */
    int half = from_lane(wave() % 4, 0);
    int line, index; /* of this lane's box: its block, and which part of the block's rows */

    __device__ __forceinline__ LatentMappedCopier(const Launch &launch, SharedAddress shared)
        : launch(launch), shared(shared) {
        const int boxes = KEYS / greater(launch.box, 1), own = lane() / boxes, lines = half < 2 ? HALF_LINES : 1;
        index = lane() - own * boxes;
        line = own < lines ? lesser(half, 2) * HALF_LINES + own : LINES;
    }
    __device__ __forceinline__ void copy_tile(uint32_t number, int token, int head, int batch) const {
        const Stage stage(shared, number);
        mbarrier::wait(half < 2 ? stage.used(half) : stage.scored(), stage.turn ^ 1); /* at once in turn 0 */
        const bool whole = launch.box == KEYS;
        if (whole) token = from_lane(token, 0), batch = from_lane(batch, 0); /* all have the same */
        if (elected()) {
            if (half < 2) {
#pragma unroll
                for (int i = 0; i < HALF_LINES; ++i) {
                    const int own = half * HALF_LINES + i;
                    if (i % 2 == 0) mbarrier::arrive_and_expect(stage.full(group_of(own)), 2 * LINE_BYTES);
                    if (whole) copy_box(stage, own, 0, token, head, batch);
                }
            } else {
                mbarrier::arrive_and_expect(stage.full(group_of(VALUE_LINES)), LINE_BYTES);
                if (whole) copy_box(stage, VALUE_LINES, 0, token, head, batch);
            }
        }
        wave_sync();
        if (!whole && line < LINES) copy_box(stage, line, index, token, head, batch);
        wave_sync();
    }
    __device__ __forceinline__ void copy_box(const Stage &stage, int line, int index, int token, int head,
                                             int batch) const {
        tensor_map::copy<tensor_map::Reuse::ONCE>(stage.tile() + line * LINE_BYTES + index * (launch.box * 128),
                                                  launch.cache, line * 64, token, head, batch,
                                                  stage.full(group_of(line)));
    }
    /* Which tile of a piece comes at place i. The first round's are waited for in their order. */
    __device__ __forceinline__ int tile_at(int i, int tiles) const {
        return i ^ (ROUNDS && half == 1 && i >= 2 && (i | 1) < tiles);
    }
    __device__ __forceinline__ void copy_piece(const Sequence &sequence, const KeyValueRows<false> &, int first,
                                               int end) {
        const int tiles = (end - first + KEYS - 1) / KEYS;
#pragma unroll 1
        for (int i = 0; i < tiles; ++i) {
            const int tile = tile_at(i, tiles);
            copy_tile(count + tile, sequence.first_key + first + tile * KEYS, sequence.kv_head, sequence.kv_batch);
        }
        count += tiles;
    }
    __device__ __forceinline__ void copy_piece(const Sequence &sequence, const KeyValueRows<true> &rows, int first,
                                               int end) {
        using tensor_map::PageBox;
        const int tiles = (end - first + KEYS - 1) / KEYS;
        const auto look_up = [&](int tile) {
            return PageBox::look_up(rows, first + tile * KEYS + index * launch.box, launch.box);
        };
        int tile = 0;
        PageBox here = look_up(0);
#pragma unroll 1
        for (int i = 0; i < tiles; ++i) {
            const int next_tile = tile_at(i + 1, tiles);
            const PageBox next = look_up(next_tile);
            copy_tile(count + tile, here.token(), sequence.kv_head, here.page(rows));
            tile = next_tile, here = next;
        }
        count += tiles;
    }
};

/* By cp.async. Of a tile each thread has one chunk of 16 bytes in each block, of rows row, row + 16, ... Rows that the
 * piece does not have are zeros. Where a tile's rows are is looked up while the copies of the one before wait for
 * room. */
struct LatentCopier : LatentTiles {
    using Rows = KeyValueRows<PAGED>;
    static constexpr int PASS_ROWS = WARPGROUP / 8, PASSES = KEYS / PASS_ROWS;
    SharedAddress shared;
    uint32_t count = 0; /* tiles of which the keys have set off */
    int row = thread_in_block() % WARPGROUP / 8, chunk = thread_in_block() % 8;
    const char *from[PASSES]; /* this thread's chunks of the first block */

    __device__ __forceinline__ explicit LatentCopier(SharedAddress shared) : shared(shared) {}

    /* Of the tile of keys or values that begins at `first`. */
    template <bool VALUES>
    __device__ __forceinline__ void look_up(const Rows &rows, int first, const char *(&chunks)[PASSES]) const {
        const auto tile = rows.tile(first);
        typename Rows::Tile::Place places[PASSES];
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) places[pass] = tile.place(row, pass * PASS_ROWS);
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass)
            chunks[pass] = VALUES ? tile.value(places[pass], chunk * 16) : tile.key(places[pass], chunk * 16);
    }

    __device__ __forceinline__ void copy(const Rows &rows, int first, const Stage &stage, int line, int lines) const {
        const SharedAddress to = stage.tile() + RowLayout<64>::chunk(row, chunk) + line * LINE_BYTES;
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            const bool exists = rows.exists(first + row + pass * PASS_ROWS);
#pragma unroll
            for (int l = 0; l < lines; ++l)
                copy_async(to + l * LINE_BYTES + pass * PASS_ROWS * 128, from[pass] + (line + l) * 128, exists);
        }
    }

    /* Those from `first` on, which `from` is for; then it is for `next`. Which half comes free first? */
    __device__ __forceinline__ void copy_keys(const Rows &rows, int first, int next, int first_half) {
        const Stage stage(shared, count++);
        const char *coming[PASSES];
        /* At once in turn 0. */
        mbarrier::wait(stage.scored(), stage.turn ^ 1);
        copy(rows, first, stage, VALUE_LINES, LINES - VALUE_LINES);
        mbarrier::arrive_after_copies(stage.full(0));
        look_up<false>(rows, next, coming);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int half = first_half ^ i;
            mbarrier::wait(stage.used(half), stage.turn ^ 1);
#pragma unroll
            for (int group = 1; group <= 2; ++group) {
                copy(rows, first, stage, half * HALF_LINES + first_line(group), 2);
                mbarrier::arrive_after_copies(stage.full(half * 2 + group));
            }
        }
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) from[pass] = coming[pass];
    }
    __device__ __forceinline__ void copy_values(const Rows &rows, int first, uint32_t number) {
        const Stage stage(shared, number);
        look_up<true>(rows, first, from);
        mbarrier::wait(stage.scored(), stage.turn);
        copy(rows, first, stage, 0, VALUE_LINES);
        mbarrier::arrive_after_copies(stage.values());
    }

    /* Values come when the scores of their tile are made: after the keys of the next tile or, in rounds, after those of
     * their round, as the next round's keys wait for the products with them. */
    __device__ __forceinline__ void copy_piece(const Rows &rows, int first, int end, bool values) {
        look_up<false>(rows, first, from);
        int in_round = 0; /* whether it is a round's second tile */
#pragma unroll 1
        for (int key = first; key < end; key += KEYS) {
            const bool last = key + KEYS >= end;
            const int next = last ? key : key + KEYS;
            copy_keys(rows, key, next, in_round);
            if (values) {
                if (ROUNDS ? in_round : key > first) copy_values(rows, key - KEYS, count - 2);
                if (last || in_round) copy_values(rows, key, count - 1);
                look_up<false>(rows, next, from);
            }
            if (ROUNDS) in_round ^= 1;
        }
    }
};

} // namespace aiter

#endif
