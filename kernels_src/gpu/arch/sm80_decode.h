/* Few query rows on NVIDIA: keys and values stream through a ring of stages in shared memory, filled by cp.async.
 * Implements the interface described in attention_decode.hip; matrices and tiles are those of arch/sm80.h.
 *
 *   a stage     WAVES tiles, of KEYS tokens each: tile w is fetched by wave w
 *   the ring    stage i is in use, stages i + 1 ... i + STAGES - 1 are on their way: about 64 KB of a block, 128 KB of
 *               an SM. 132 SMs with 1 us of latency at 3 TB/s ask for 23 KB each.
 *
 * With up to 16 query rows (one row tile) a wave uses the tile that it has fetched, and no wave ever waits for another.
 * With more, waves of different row tiles use the same tiles, and the block meets once a stage. */
#ifndef AITER_GPU_ARCH_SM80_DECODE_H
#define AITER_GPU_ARCH_SM80_DECODE_H

#include "gpu/sequence.h"

namespace aiter {

template <int OUTSTANDING> __device__ __forceinline__ void wait_for_all_copies_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(OUTSTANDING) : "memory");
}
__device__ __forceinline__ void end_of_stage() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/* A kernel lets the one after it come up, which waits where it needs the results (see launch_next in gpu/runtime.h). */
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <int HEAD_DIM> struct DecodeOutput : Accumulator<1, HEAD_DIM> {
    static __device__ __forceinline__ int column_of_lane(int i) {
        return DecodeOutput::column(i) + DecodeOutput::lane_column();
    }
};

template <int HEAD_DIM> struct Decode {
    static constexpr int ROWS = ROW_TILE;
    static constexpr int LANES = LANES_PER_ROW, RUN = 2;
    static constexpr int KEYS = HEAD_DIM <= 64 ? 32 : 16;
    static constexpr int WAVES = HEAD_DIM <= 128 ? 4 : 2;
    static constexpr int BLOCKS = 2;
    using Scores = Accumulator<1, KEYS>;
    using Output = DecodeOutput<HEAD_DIM>;
    using Queries = Query<HEAD_DIM, 1>;
    static __device__ __forceinline__ bool leads_row() { return lane_leads_row(); }
};

template <int HEAD_DIM, class Rows> struct KeyValueStream {
    using Shape = Decode<HEAD_DIM>;
    using Tile = KeyValueTile<HEAD_DIM, Shape::KEYS, WAVE>;
    using Queries = typename Shape::Queries;
    static constexpr int WAVES = Shape::WAVES, KEYS = Shape::KEYS;
    static constexpr int TILE_BYTES = Tile::STAGE_BYTES; /* K, then V */
    static constexpr int STAGE_BYTES = WAVES * TILE_BYTES;
    static constexpr int STAGES = 96 * 1024 / STAGE_BYTES; /* two blocks fit into the 228 KB of an H100's SM */
    static constexpr int QUERY_BYTES = Queries::IN_REGISTERS ? 0 : WAVES * Queries::SHARED_BYTES;
    static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + QUERY_BYTES;
    static_assert(STAGES >= 3 && KEYS <= WAVE && Queries::SHARED_BYTES <= TILE_BYTES, "");

    const Rows &rows;
    SharedAddress shared;
    int group, groups;
    int coming;                       /* first token of the tile that this wave fetches next */
    typename Rows::Tile::Place place; /* of token `coming + lane`, looked up a stage ahead */
    int stage = STAGES - 1;           /* the one in use: none yet */
    int sub = 0;                      /* tile of the stage that comes next for this wave's rows */
    Tile tile;

    __device__ __forceinline__ KeyValueStream(SharedAddress shared, const Rows &rows, int first, int group, int groups)
        : rows(rows), shared(shared), group(group), groups(groups), coming(first + wave() * KEYS), tile(shared, 0) {
        look_up();
#pragma unroll
        for (int i = 0; i < STAGES - 1; ++i) issue(i);
    }

    /* Where a wave may put its queries: in the stage that is fetched last, in the place of its own tile. */
    __device__ __forceinline__ SharedAddress query_memory() const {
        return Queries::IN_REGISTERS ? shared + (STAGES - 1) * STAGE_BYTES + wave() * TILE_BYTES
                                     : shared + STAGES * STAGE_BYTES + wave() * Queries::SHARED_BYTES;
    }

    __device__ __forceinline__ void look_up() {
        if (coming < rows.count) place = rows.tile(coming).place(lane() % KEYS, 0);
    }

    /* This wave's tile of the coming stage sets off to place `to` of the ring. */
    __device__ __forceinline__ void issue(int to) {
        constexpr int CHUNKS = 2 * Tile::STEPS; /* of a row: the last may lie past HEAD_DIM, and is zeros */
        constexpr int UNITS = KEYS * CHUNKS;
        if (coming < rows.count) {
            const SharedAddress keys = shared + to * STAGE_BYTES + wave() * TILE_BYTES;
            const auto source = rows.tile(coming);
#pragma unroll
            for (int i = 0; i < round_up(UNITS, WAVE) / WAVE; ++i) {
                const int unit = lane() + i * WAVE;
                const int token = unit / CHUNKS, chunk = unit % CHUNKS;
                const auto at = source.place_of_lane(place, token, 0);
                if (UNITS % WAVE != 0 && unit >= UNITS) break;
                const bool valid = coming + token < rows.count && chunk < HEAD_DIM / 8;
                const SharedAddress row = keys + RowLayout<HEAD_DIM>::chunk(token, chunk);
                copy_async(row, source.key(at, chunk * 16), valid);
                copy_async(row + Tile::KEY_BYTES, source.value(at, chunk * 16), valid);
            }
            coming += WAVES * KEYS;
            look_up();
        }
        end_of_stage();
    }

    __device__ __forceinline__ void advance() {
        if (sub == 0) {
            wait_for_all_copies_but<STAGES - 2>();
            groups == WAVES ? wave_sync() : barrier(); /* tiles are here, and the stage before is free */
            issue(stage);
            stage = stage == STAGES - 1 ? 0 : stage + 1;
        }
        tile.current = shared + stage * STAGE_BYTES + (group + sub) * TILE_BYTES;
        sub = sub + groups == WAVES ? 0 : sub + groups;
    }
    __device__ __forceinline__ void scores(const Queries &queries, typename Shape::Scores &s) {
        tile.scores(queries, s);
    }
    __device__ __forceinline__ void accumulate(const typename Shape::Scores &s, typename Shape::Output &o) {
        tile.accumulate(s, o);
    }
};

} // namespace aiter

#endif
