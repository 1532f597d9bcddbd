/* How blocks of AMD's forward loops take pieces of keys (gpu/pieces.h): each has one task, or, where sums of pieces that
 * are taken in turn need a place in memory, no more blocks than can be at work at one time take row tiles one after the
 * other.
 *
 *     dealt, CUs left idle      several blocks have a share of a task: arch/gfx9_scored_pieces.h
 *     dealt, or few row tiles   block = task
 *     in turn, many             block b:  b, then what the counter of its chiplet says next    | sum in place b of memory
 *
 * A counter for each chiplet, because consecutive tasks are to be dealt to chiplets in turn, as the hardware deals blocks:
 * so what reads the same keys finds them in one L2 cache. Places are more than chiplets, so each counter has blocks that ask
 * it. A place is one block's until it ends: L2 caches of different chiplets do not see what the others hold. */
#ifndef AITER_GPU_ARCH_GFX9_PIECES_H
#define AITER_GPU_ARCH_GFX9_PIECES_H

#include "gpu/pieces.h"

namespace aiter {

__global__ void clear_counters(uint32_t *counters) { counters[thread_in_block()] = 0; }

template <int KEYS, int WAVES, class Output> struct PiecesOfBlocks : Pieces<KEYS, WAVES, Output, 0> {
    using Base = Pieces<KEYS, WAVES, Output, 0>;
    static constexpr int TILE_KEYS = KEYS, TILES = Base::INVARIANT_KEYS / KEYS; /* of a piece */
    int tasks = 0;
    uint32_t *next = nullptr; /* counters of tasks after each block's first; null: there are none */
    /* Whether blocks share tasks: with batch_invariant, where one wave has room for all rows, and CUs would idle, or in the last
     * turn, while others have a task each. Shared, a task takes about (32 + rows) / 24 of a CU's time for a whole one, as
     * predicted: scores are written and read beside keys and values. Scores so take no more than 90 MB with 304 CUs. */
    bool scored = false;
    char *scores = nullptr;

    PiecesOfBlocks() = default;
    PiecesOfBlocks(const aiter_attention_problem &p, int64_t row_tiles, int64_t rows, int compute_units)
        : Base(p, row_tiles, rows, compute_units) {
        const int64_t pieces = row_tiles * this->dealt,
                      turns = (pieces + compute_units - 1) / greater(compute_units, 1);
        scored = this->at_multiples && pieces > 0 && this->waves() == 1 &&
                 pieces * (32 + rows) <= 24 * turns * compute_units;
    }
    /* places: for sums in turn. */
    int64_t workspace_bytes(int64_t row_tiles, int places) const {
        const int64_t parts = Base::workspace_bytes(row_tiles, places, false);
        return parts + (scored ? row_tiles * this->dealt * TILES * scores_bytes() : 0);
    }
    /* Of a tile: scores of each row, and the greatest, in 16 bytes. */
    __host__ __device__ __forceinline__ int64_t scores_bytes() const { return this->rows * (KEYS * 4 + 16); }
    __device__ __forceinline__ char *scores_of(const Piece &piece, int tile) const {
        return scores + (int64_t(piece.row_tile * this->dealt + piece.number) * TILES + tile) * scores_bytes();
    }
    int64_t blocks(int places) const { return next == nullptr ? tasks : places; }
    __device__ __forceinline__ bool adds_up(const Piece &piece) const { return scored || Base::adds_up(piece); }
    /* What a launch needs beside place_in(). */
    int prepare(int64_t row_tiles, int places, void *stream) {
        const int64_t count = this->count(row_tiles);
        if (count > 0x7fffffff) return LAUNCH_GRID_TOO_LARGE;
        tasks = static_cast<int>(count);
        scores = this->parts - Base::PARTS_AT + Base::workspace_bytes(row_tiles, places, false);
        if (!this->needs_parts() || this->dealt > 0 || tasks <= places) return 0;
        next = reinterpret_cast<uint32_t *>(this->parts - Base::PARTS_AT);
        return launch(clear_counters, 1, XCDS, 0, stream, next);
    }

    /* This block's task after the one that it has had; none from `tasks` on. */
    __device__ __forceinline__ int next_task(SharedAddress shared) const {
        if (next == nullptr) return tasks;
        const int chiplet = block() % XCDS;
        barrier(); /* nobody uses shared memory any more */
        if (thread_in_block() == 0)
            shared_store<uint32_t>(shared, aiter::blocks() + chiplet + XCDS * atomicAdd(next + chiplet, 1u));
        barrier();
        const int index = uniform(shared_load<int>(shared));
        barrier();
        return index;
    }
};

} // namespace aiter

#endif
