/* Attention for many query tokens: output = softmax(scale * Q K^T) V, keys a tile at a time, nothing of it in memory.
 *
 *                 keys ->   tile 0   tile 1   tile 2  ...
 *                         +--------+--------+--------+
 *   query rows   wave 0   |        |        |        |     A block has a tile of query rows of one head; each of its
 *     of one     wave 1   |  S, P  |        |        |     waves has some of the rows, with all their keys.
 *     block      wave 2   |        |        |        |
 *                wave 3   +--------+--------+--------+
 *
 *   where it lives   registers: Q (or shared memory, see the arch), S/P of one tile, O, maximum and sum of each row
 *                    shared memory: K and V of one tile, for all waves; the next tile is on its way there
 *
 *   each tile        S = Q K^T, mask where the diagonal or the end of the sequence cuts the tile, P = exp2(S - max),
 *                    O += P V: see tile_loop.h, or the loop that an arch has of its own (arch/sm90_forward.h)
 *
 *   at the end       O / sum and the log-sum-exp go to memory. Causal only: a NaN that a masked value has left in a row
 *                    (0 * inf within a matrix product) is found there, and that row is computed again key by key.
 *
 * Blocks of one KV head stand together in the grid, and of these the ones with most keys come first, so that the short
 * ones fill the gaps at the end. Built for one dtype, AITER_HEAD_DIM, AITER_CAUSAL and AITER_PAGED. */
#include "gpu/tile_loop.h"

#if !defined(__HIP__)
#include "gpu/arch/sm90_forward.h"
#endif

#ifndef AITER_PAGED
#define AITER_PAGED 0
#endif

namespace aiter {

constexpr int HEAD_DIM = AITER_HEAD_DIM;
constexpr bool CAUSAL = AITER_CAUSAL, PAGED = AITER_PAGED;
using Problem = Sequence<CAUSAL, PAGED>;
#if defined(AITER_WGMMA)
using Loop = WarpgroupLoop<HEAD_DIM, Problem>;
#else
using Loop = TileLoop<HEAD_DIM, Problem>;
#endif
using Output = Loop::Output;
constexpr int SLOTS = Output::SLOTS;
constexpr int WAVE_ROWS = Loop::WAVE_ROWS, BLOCK_ROWS = Loop::WAVES * WAVE_ROWS;

/* Rows of one head of one sequence, which a block works on at one time; Loop::place says in which order. */
struct RowTile {
    Problem sequence;
    int first_row;
    int keys_end; /* keys that any of its rows sees lie before this */

    __device__ __forceinline__ RowTile(const Loop::Launch &launch, int index)
        : RowTile(launch, Loop::place(launch, index, (launch.problem.seqlen_q + BLOCK_ROWS - 1) / BLOCK_ROWS)) {}
    __device__ __forceinline__ RowTile(const Loop::Launch &launch, Place place)
        : sequence(launch, place.batch(launch.problem), place.head(launch.problem)),
          first_row(place.row_tile * BLOCK_ROWS) {
        const int rows_end = lesser(first_row + BLOCK_ROWS, sequence.rows);
        keys_end = first_row < rows_end ? sequence.visible(rows_end - 1) : 0;
    }

    /* Whether any of its rows is to be written. */
    __device__ __forceinline__ bool exists() const { return first_row < sequence.padded_rows; }
};

__device__ __forceinline__ void store(const RowTile &tile, SharedAddress shared, float signed_scale,
                                      OnlineSoftmax<SLOTS> &softmax, Output &o) {
    const Problem &sequence = tile.sequence;
    const int wave_row = tile.first_row + wave() * WAVE_ROWS;
    float log_sum[SLOTS];
    softmax.finish(log_sum);
    bool spoiled[SLOTS]; /* rows that are NaN though their scores are not */
    bool any_spoiled = false;
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
        const int row = wave_row + Output::row(slot);
        const bool sees_keys = row < sequence.rows && sequence.visible(row) > 0;
        const float inverse = reciprocal(softmax.sum[slot]);
        float row_total = 0.0f;
#pragma unroll
        for (int i = 0; i < Output::VALUES; ++i) {
            o.set(slot, i, sees_keys ? o.get(slot, i) * inverse : 0.0f);
            row_total += o.get(slot, i);
        }
        if (!sees_keys) log_sum[slot] = -INFINITE;
        spoiled[slot] = false;
        if (CAUSAL) {
            row_total = row_sum(row_total);
            spoiled[slot] = row_total != row_total && __builtin_fabsf(log_sum[slot]) < INFINITE;
            any_spoiled |= spoiled[slot];
        }
    }
    if (CAUSAL && wave_any(any_spoiled)) { /* is it a masked value that did it? */
        const int last_row = lesser(tile.first_row + BLOCK_ROWS, sequence.rows) - 1;
        const int end = lesser(round_up(sequence.visible(last_row), Loop::KEYS), sequence.keys.count);
        if (!values_not_finite<HEAD_DIM>(sequence, sequence.visible(wave_row), end))
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) spoiled[slot] = false;
    }
    Loop::store_output(o, shared, [&](int row) {
        row += wave_row;
        return row < sequence.padded_rows ? sequence.output + row * sequence.output_stride : nullptr;
    });
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
        const int row = wave_row + Output::row(slot);
        if (sequence.lse != nullptr && row < sequence.padded_rows && lane_leads_row())
            global_store(sequence.lse + row, log_sum[slot] * LN_2);
    }
    if (CAUSAL && wave_any(any_spoiled)) {
        wave_sync(); /* these rows are written once more, by other lanes */
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot)
#pragma unroll 1
            for (uint64_t lanes = ballot(spoiled[slot] && lane_leads_row()); lanes != 0; lanes &= lanes - 1) {
                const int leader = first_lane(lanes);
                exact_row<HEAD_DIM>(sequence, from_lane(wave_row + Output::row(slot), leader), signed_scale,
                                    from_lane(log_sum[slot], leader));
            }
    }
}

__global__ void __launch_bounds__(Loop::THREADS, Loop::BLOCKS)
    attention_forward(const AITER_GRID_CONSTANT Loop::Launch launch) {
    AITER_SHARED(shared, Loop::SHARED_BYTES);
    Loop::run<RowTile>(launch, shared_address(shared), [&](const RowTile &tile, auto &softmax, auto &o) {
        store(tile, shared_address(shared), launch.problem.softmax_scale * LOG2_E, softmax, o);
    });
}

} // namespace aiter

AITER_EXPORT void aiter_describe(aiter_description *description) {
    description->abi_version = AITER_ABI_VERSION;
    description->call_bytes = sizeof(aiter_call);
}

AITER_EXPORT int64_t aiter_workspace_bytes(const aiter_call *call) {
    return aiter::Loop::workspace_bytes(call->problem);
}

AITER_EXPORT int aiter_launch(const aiter_call *call, void *stream) {
    const aiter_attention_problem &p = call->problem;
    if (const int error = aiter::check_problem(p)) return error;
    const int64_t row_tiles = (p.seqlen_q + int64_t(aiter::BLOCK_ROWS) - 1) / aiter::BLOCK_ROWS;
    return aiter::Loop::start(aiter::attention_forward, *call, row_tiles * p.heads_q * p.batch, stream);
}

AITER_EXPORT const char *aiter_error_text(int code) { return aiter::error_text(code); }
