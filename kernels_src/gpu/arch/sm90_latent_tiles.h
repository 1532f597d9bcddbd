/* Latent attention on sm_90a (see sm90_latent.h): sizes, what is where in shared memory, and the barriers of a tile's
 * room. */
#ifndef AITER_GPU_ARCH_SM90_LATENT_TILES_H
#define AITER_GPU_ARCH_SM90_LATENT_TILES_H

#include "gpu/arch/sm80_decode.h"
#include "gpu/arch/sm90_tensor_map.h"
#include "gpu/sequence.h"
#include "gpu/softmax.h"

namespace aiter {

/* What the schedule is made for: all waves of a block work on the same rows. */
struct LatentDecode {
    static constexpr int ROWS = 64, PART_ROWS = ROWS, KEYS = 64, STEP_KEYS = KEYS, WAVES = 12, BLOCKS = 1;
    static constexpr int ALIGNMENT = 1, MOST_CLUSTER = 1;
    /* What cutting costs in the time of a step, 2.2 us: a kernel that adds up; for a block, one more piece. */
    static constexpr int MERGE_STEPS = 4, PIECE_STEPS = 6;
    static constexpr int LANES = LANES_PER_ROW, RUN = 2;
    static constexpr int COLUMNS = VALUE_DIM / 2; /* of a warpgroup */
    using Scores = Accumulator<1, KEYS>;
    using Output = DecodeOutput<COLUMNS>;
    static __device__ __forceinline__ bool leads_row() { return lane_leads_row(); }
};

struct LatentTiles : LatentDecode {
    static constexpr int WARPGROUP = 128, WAVE_ROWS = 16;

    static constexpr int LINES = HEAD_DIM / 64, VALUE_LINES = VALUE_DIM / 64; /* blocks of a tile */
    static constexpr int LINE_BYTES = KEYS * 128, TILE_BYTES = LINES * LINE_BYTES, STAGES = 2;
    static_assert(HEAD_DIM == 576 && VALUE_DIM == 512 && ROWS == KEYS, "");

    /* Group 0 is the last block, group g > 0 blocks 2 g - 2 and 2 g - 1. */
    static constexpr int GROUPS = 5, HALF_LINES = VALUE_LINES / 2;
    static __device__ constexpr int first_line(int group) { return group == 0 ? VALUE_LINES : 2 * group - 2; }
    static __device__ constexpr int end_line(int group) { return group == 0 ? LINES : 2 * group; }
    static __device__ constexpr int group_of(int line) { return line == VALUE_LINES ? 0 : 1 + line / 2; }

    static constexpr int TILES_AT = TILE_BYTES, P_AT = TILES_AT + STAGES * TILE_BYTES;
    static constexpr int BARRIERS_AT = P_AT + LINE_BYTES, STAGE_BARRIERS = GROUPS + 4;
    static constexpr int MAXIMA_AT = BARRIERS_AT + round_up(STAGES * STAGE_BARRIERS * mbarrier::BYTES, 16);
    static constexpr int SUMS_AT = MAXIMA_AT + 2 * ROWS * 4, SHARED_BYTES = SUMS_AT + 2 * ROWS * 4;
    static_assert(SHARED_BYTES <= SHARED_LIMIT, "");

    /* Room for a tile: that of the block's tile number `count`. */
    struct Stage {
        SharedAddress shared;
        uint32_t index, turn; /* turn: how often it has been used before, modulo 2 */
        __device__ __forceinline__ Stage(SharedAddress shared, uint32_t count)
            : shared(shared), index(count % STAGES), turn(count / STAGES % 2) {}
        __device__ __forceinline__ SharedAddress tile() const { return shared + TILES_AT + index * TILE_BYTES; }
        __device__ __forceinline__ SharedAddress barrier(int i) const {
            return shared + BARRIERS_AT + (index * STAGE_BARRIERS + i) * mbarrier::BYTES;
        }
        /* A group has arrived; the values have, where they come later; scores are made; a half's products are. */
        __device__ __forceinline__ SharedAddress full(int group) const { return barrier(group); }
        __device__ __forceinline__ SharedAddress values() const { return barrier(GROUPS); }
        __device__ __forceinline__ SharedAddress scored() const { return barrier(GROUPS + 1); }
        __device__ __forceinline__ SharedAddress used(int half) const { return barrier(GROUPS + 2 + half); }
        __device__ __forceinline__ void make_barriers(bool mapped) const {
            for (int group = 0; group < GROUPS; ++group) mbarrier::make(full(group), mapped ? 1 : WARPGROUP);
            mbarrier::make(values(), WARPGROUP);
            for (int i = GROUPS + 1; i < STAGE_BARRIERS; ++i) mbarrier::make(barrier(i), 4); /* by waves */
        }
    };
};

} // namespace aiter

#endif
