/* What differs from chip to chip, behind one interface. arch/gfx9.h (AMD CDNA: MFMA, waves of 64) and arch/sm80.h
 * (NVIDIA from Ampere on: mma.sync, warps of 32) each provide, in namespace aiter:
 *
 * The wave
 *   WAVE                       lanes of a wave
 *   XCDS                       chiplets over which consecutive blocks are dealt in turn (1: none)
 *   lane(), wave()             this lane in its wave; this wave in its block, as a scalar: all lanes ask together
 *   block(), blocks()          this block in the grid; of how many
 *   barrier()                  wait for all waves of the block, shared memory ordered
 *   keep_order()               the compiler leaves before it what stands before it, where that is for it to say
 *   exp2(x), log2(x)           hardware approximations, fp32; exp2(-inf) = 0
 *   reciprocal(x), approximate_reciprocal(x)   the latter for what is rounded to 16 bit later, in one instruction
 *   wave_any(c), ballot(c)     is c true in any lane; one bit for each lane where it is
 *   first_lane(bits)           the lowest lane in a ballot
 *   from_lane(x, l), wave_sum(x)
 *   uniform(x)                 x, which is the same in all lanes, as a scalar
 *   opaque(x)                  x, but the compiler cannot know it is the same as before: what depends on it is computed
 *                              again instead of being kept in registers through the loop
 *   opaque_scalar(x)           the same for a value that all lanes share
 *   reread(parameter)          the kernel's first parameter, but what is read from it is not what was read before
 *   global_load<T>(pointer), global_store(pointer, x)   for pointers that the compiler cannot see to be global
 *   l2_load(pointer), l2_store(pointer, x)   of what other blocks have written or will read: only the L2 cache keeps it
 *   SharedAddress              32-bit address in shared memory (LDS); shared_address(pointer), shared_pointer<T>(address)
 *
 * Elements: fp16 or bf16, held as 16 raw bits
 *   to_float(bits), to_element(x)          one value, rounded to nearest
 *   to_elements(x, y)                      two, packed; the first in the low half
 *   usual_nan(x)                           x, which the caller has given in fp32, as they take it: any NaN with the same bits
 *
 * Accumulator<ROW_TILES, COLUMNS>: fp32 matrix of ROW_TILES * ROW_TILE rows, spread over the lanes of a wave. Rows are
 * query rows; columns are keys (the scores S) or head dimensions (the output O). Both arches keep one row in
 * LANES_PER_ROW lanes, so the softmax of a row stays in registers:
 *   SLOTS, VALUES              rows that a lane holds a part of; values of each that it holds
 *   get(slot, i), set(slot, i, x)   a value; slot and i must be compile-time constants after unrolling
 *   largest(slot)              the greatest of the lane's values in a slot
 *   multiply(slot, factor)
 *   exponentiate(slot, scale, reference)   each value x becomes exp2(x * scale - reference); returns their sum
 *   row(slot)                  the row of this lane's slot; lanes of equal row(slot) share that row
 *   column(i) + lane_column()  the column of this lane's value i; column(i) is a compile-time constant
 *   values_between(low, high)  a bit for each value of a slot: whether its column (less lane_column()) is one of these.
 *                              Where MASKS_OF_BITS, which is where selecting by a bit is cheap
 *   row_max(x), row_sum(x)     over the lanes that share a row (all of them get the result); row_max<4>, where another
 *                              kind of tile spreads its rows over four
 *   lane_leads_row()           is this the first of the lanes that share a row
 *
 * RowLayout<HEAD_DIM>: rows of elements in shared memory so that the arch's reads and writes find all banks
 *   BYTES, chunk(row, c)       of a row, padding included; where its 16-byte chunk c stands
 *
 * Query<HEAD_DIM, ROW_TILES, TEAM>: the rows of Q that a wave, or all of a team's, work on, as operand of the matrix
 * unit
 *   SHARED_BYTES               shared memory that they need for it (0: all in registers)
 *   load(shared, row, bits)    row(r): pointer to query row r of this wave's tile, or null for zeros; `bits` are
 *                              applied to the elements on the way
 *
 * store_output<COLUMNS>(o, shared, row)   rounds and writes the first COLUMNS columns of O; row(r): where row r goes,
 *                                         or null; `shared`: the wave's memory of its Query, which is overwritten
 *
 * KeyValueTile<HEAD_DIM, VALUE_DIM, KEYS, THREADS>: KEYS tokens of K and of V on their way from global into shared
 * memory, copied by THREADS threads (a block, or one wave of it). The next tile is copied while this one is used:
 *   SHARED_BYTES
 *   KeyValueTile(shared, thread)
 *   issue(rows, first)         start to fetch keys first ... first+KEYS-1 (rows: see KeyValueRows in sequence.h)
 *   publish(sync)              wait for that tile and make it the current one, once all threads are done with the one
 *                              before. sync() is called where the THREADS threads must meet: pass barrier, or
 *                              wave_sync when they are one wave
 *   scores(query, s)           s = Q * K^T for the current tile
 *   ISSUES_WITH_SCORES         is there scores(query, s, rows, first), which does both, better than one after the other
 *   accumulate(s, o, column)   o += round(s) * V, of the columns of V from `column` on; s holds the probabilities now
 * Tokens past the end of the sequence, or before the first that any row sees, read as zeros in V; what they give in s
 * is finite or not, but never undefined.
 *
 * Shapes: Shape<HEAD_DIM, VALUE_DIM> proposes, for many query rows, ROW_TILES, KEYS, WAVES and BLOCKS (blocks that
 * should fit into one CU/SM at once; for __launch_bounds__).
 *
 * An arch may go through the tiles in a way of its own (wgmma in arch/sm90_forward.h, two alternating groups of waves in
 * arch/gfx9_forward.h): tile_loop.h says what such a loop provides. */
#ifndef AITER_GPU_ARCH_H
#define AITER_GPU_ARCH_H

#include "gpu/read_fp8.h"
#include "gpu/runtime.h"
#include "gpu/target.h"

namespace aiter {

__device__ __forceinline__ int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

/* What happens to queries on their way to the matrix unit, two elements at a time: their signs change, or they become
 * zeros (see score.h). */
struct QueryBits {
    uint32_t keep, flip;
    __device__ __forceinline__ uint32_t operator()(uint32_t two) const { return (two & keep) ^ flip; }
    __device__ __forceinline__ float factor() const { return keep == 0 ? 0.0f : flip == 0 ? 1.0f : -1.0f; }
};

} // namespace aiter

#if defined(AITER_GFX9)
#include "gpu/arch/gfx9_tiles.h"
#else
#include "gpu/arch/sm80.h"
#endif

#endif
