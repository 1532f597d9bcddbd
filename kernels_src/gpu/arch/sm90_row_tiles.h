/* In which order the blocks of sm_90a's forward loop (arch/sm90_forward.h) take row tiles: the host chooses, a wave of each
 * block finds out where row tile number n is. Work is shared out well where long row tiles come first and short ones fill
 * the gaps at the end, and keys are read once where row tiles that read the same ones come together.
 *
 *   RowTileOrder   every unit (a KV head of a sequence) has equally many row tiles, as the longest sequence has. Some units
 *                  at a time, and of these the last row tiles first
 *   PackedOrder    sequences are packed, and each has its own: only row tiles that exist have numbers. One wave finds them,
 *                  which looks at 32 sequences, a lane each. Under a mask it takes those that are furthest from a beginning
 *                  first, of some heads at a time:
 *
 *     level 2    1  .  .  .  .      A head of five sequences, the first of which has three row tiles. Those of level 2
 *           1    2  .  .  3  .      come first: under a causal mask they are the longest. Tokens that decode stand on
 *           0    4  5  6  7  8      level 0, between the chunks of these heads and those of the next: so memory and
 *                                   the matrix unit are busy by turns in all of the call.
 *
 *                  Without a mask a sequence's row tiles are alike, and come together.
 *
 * What each choice gave: docs/hopper.md. */
#ifndef AITER_GPU_ARCH_SM90_ROW_TILES_H
#define AITER_GPU_ARCH_SM90_ROW_TILES_H

#include "gpu/arch.h"
#include "gpu/divisor.h"
#include "gpu/sequence.h"

namespace aiter {

/* A part of the kernel's parameter. KEY_BYTES: of a key and its value. */
template <class Packing, int KEY_BYTES> struct RowTileOrder {
    static constexpr int64_t CACHED_BYTES = int64_t(32) << 20; /* of keys and values that are read by many blocks */

    int bits, heads;                 /* 2^bits heads share a row tile; so many times there are as many */
    int row_tiles;                   /* of one of those */
    Divisor group, heads_kv;         /* group: of those that read one KV head */
    int first;                       /* units of the first section, if it is a small one */
    int first_tiles;                 /* their row tiles */
    Divisor section_tiles;           /* of a section that is not */
    Divisor level, first_level;      /* row tiles that stand equally far from the ends of a section's heads */
    int section;                     /* units whose row tiles are taken together */
    Divisor together, last_together; /* heads of packed sequences, likewise. together.by 0: it is place()'s order */

    struct Together {
        int units, heads; /* heads 0: not packed */
    };

    RowTileOrder() = default;
    /* packed: whether to take PackedOrder. */
    RowTileOrder(const aiter_attention_problem &p, int64_t all_row_tiles, int blocks, bool packed)
        : RowTileOrder(p, all_row_tiles,
                       Together{MASKED ? units_together(p, all_row_tiles, blocks) : 1,
                                packed && all_row_tiles > 0 ? heads_together(p) : 0}) {}
    RowTileOrder(const aiter_attention_problem &p, int64_t all_row_tiles, const Together &taken)
        : bits(Packing(p).bits), heads(p.heads_q >> bits), group(heads / p.heads_kv), heads_kv(p.heads_kv) {
        const int units = p.batch * p.heads_kv;
        section = lesser(taken.units, greater(units, 1));
        row_tiles = static_cast<int>(all_row_tiles / greater<int64_t>(int64_t(units) * group.by, 1));
        const int unit_tiles = group.by * row_tiles;
        first = units % section;
        first_tiles = first * unit_tiles;
        section_tiles = Divisor(int64_t(section) * unit_tiles);
        level = Divisor(section * group.by), first_level = Divisor(first * group.by);
        together = Divisor(taken.heads), last_together = Divisor(taken.heads > 0 ? heads % taken.heads : 0);
        if (taken.heads == 0) together.by = 0;
    }

    /* Units whose tiles are taken together where tiles differ in work: those that see most keys come first, over all of
     * the section, so that at the end short ones fill the gaps. For that a section should have several tiles for each
     * block. But then many units are begun at one time, and their keys and values come from memory all at once: no more
     * than the L2 cache holds, and no more than leave each of them some blocks (by trial). So few as eight are no matter:
     * theirs are many keys, and they are read again for each round of tiles without being missed. */
    static int units_together(const aiter_attention_problem &p, int64_t row_tiles, int blocks) {
        constexpr int64_t TILES_OF_BLOCK = 4, FEW = 8, BLOCKS_OF_UNIT = HEAD_DIM <= 96 ? 2 : 8;
        const int64_t unit_tiles = row_tiles / greater<int64_t>(int64_t(p.batch) * p.heads_kv, 1);
        const int64_t bytes = greater<int64_t>(int64_t(p.seqlen_k) * KEY_BYTES, 1); /* of one unit */
        const int64_t balanced = TILES_OF_BLOCK * blocks / greater<int64_t>(unit_tiles, 1) + 1;
        const int64_t most = lesser(CACHED_BYTES / bytes, blocks / BLOCKS_OF_UNIT);
        return static_cast<int>(lesser(balanced, greater(most, FEW)));
    }
    /* As many as the L2 cache holds of the sequences that are looked at. */
    static int heads_together(const aiter_attention_problem &p) {
        const int64_t keys = p.packed_k ? p.total_k : int64_t(p.batch) * p.seqlen_k, looked_at = lesser(p.batch, WAVE);
        const int64_t bytes = keys * looked_at / greater(p.batch, 1) * KEY_BYTES; /* of a KV head */
        const int64_t heads_kv = lesser<int64_t>(CACHED_BYTES / greater<int64_t>(bytes, 1), p.heads_kv);
        return static_cast<int>(greater<int64_t>(heads_kv, 1)) * (p.heads_q / p.heads_kv >> Packing(p).bits);
    }

    /* Where row tile number `index` of all is. The last section must not be a small one: the first is. */
    __device__ __forceinline__ Place place(int index) const {
        const int later = index - first_tiles, sections = section_tiles.quotient(greater(later, 0));
        const bool small = later < 0;
        const int rest = small ? index : later - sections * section_tiles.by;
        const int heads_of_level = small ? first_level.by : level.by;
        const int number = (small ? first_level : level).quotient(rest);
        const int of_level = rest - number * heads_of_level, unit_of_section = group.quotient(of_level);
        const int unit = (small ? 0 : first + sections * section) + unit_of_section, batch = heads_kv.quotient(unit);
        return place(batch, unit - batch * heads_kv.by, of_level - unit_of_section * group.by, row_tiles - 1 - number);
    }
    /* member: of the group. */
    __device__ __forceinline__ Place place(int batch, int kv_head, int member, int row_tile) const {
        return {batch, kv_head * group.by + member << bits, kv_head, row_tile};
    }
};

/* Numbers are asked for in ascending order. BLOCK_ROWS: of a row tile. */
template <class Order, int BLOCK_ROWS> struct PackedOrder {
    int first = -WAVE; /* of the sequences that are looked at */
    int row_tiles = 0; /* of the lane's */
    int end = 0;       /* the first number that belongs to none of them or, under a mask, not to this level */

    /* Where the row tile with this number is. False: there is none. */
    __device__ __forceinline__ bool find(const Arguments &arguments, const Order &order, int number, Place &at) {
        return MASKED ? levels.find(*this, arguments, order, number, at) : find_in_turn(arguments, order, number, at);
    }

  private:
    struct Levels {
        int head = 1 << 30, level = 0; /* the first head; the level below */
        uint32_t having = 0;           /* lanes of sequences that have a row tile on this level */

        __device__ __forceinline__ bool find(PackedOrder &packed, const Arguments &arguments, const Order &order,
                                             int number, Place &at) {
            const int together = order.together.by;
#pragma unroll 1
            while (number >= packed.end) {
                if (level == 0) {
                    head += together;
                    if (head >= order.heads) {
                        head = 0;
                        if (!packed.look(arguments, order)) return false;
                    }
                    level = __reduce_max_sync(~0u, packed.row_tiles);
                    if (level == 0) continue;
                }
                having = static_cast<uint32_t>(ballot(packed.row_tiles >= level));
                packed.end += __popc(having) * lesser(together, order.heads - head);
                --level;
            }
            const bool last = order.heads - head < together;
            const int heads = last ? order.last_together.by : together;
            const int rest = number - packed.end + __popc(having) * heads;
            const int sequence = (last ? order.last_together : order.together).quotient(rest);
            const bool here = having >> lane() & 1 && __popc(having & ((1u << lane()) - 1)) == sequence;
            at = packed.place(order, first_lane(ballot(here)), head + rest - sequence * heads, level);
            return true;
        }
    } levels;

    __device__ __forceinline__ bool find_in_turn(const Arguments &arguments, const Order &order, int number,
                                                 Place &at) {
        const int heads = order.heads;
#pragma unroll 1
        while (number >= end) {
            if (!look(arguments, order)) return false;
            end += wave_sum(row_tiles) * heads;
        }
        int after = row_tiles; /* of this lane's sequence and those behind it */
#pragma unroll
        for (int distance = 1; distance < WAVE; distance *= 2) {
            const int others = __shfl_down_sync(~0u, after, distance);
            if (lane() + distance < WAVE) after += others;
        }
        const int rest = number - end + after * heads; /* from the sequence's first on */
        const int sequence = first_lane(ballot(rest >= 0 && rest < row_tiles * heads));
        const int own = from_lane(rest, sequence), tiles = from_lane(row_tiles, sequence);
        at = place(order, sequence, own / tiles, tiles - 1 - own % tiles);
        return true;
    }
    /* At the next sequences. */
    __device__ __forceinline__ bool look(const Arguments &arguments, const Order &order) {
        const aiter_attention_problem &p = arguments.problem;
        first += WAVE;
        if (first >= p.batch) return false;
        const int own = first + lane(), rows = own < p.batch ? length_of(query_side(p, arguments.tensors), own) : 0;
        row_tiles = ((rows << order.bits) + BLOCK_ROWS - 1) / BLOCK_ROWS;
        return true;
    }
    __device__ __forceinline__ Place place(const Order &order, int sequence, int head, int row_tile) const {
        const int kv_head = order.group.quotient(head);
        return order.place(first + sequence, kv_head, head - kv_head * order.group.by, row_tile);
    }
};

} // namespace aiter

#endif
