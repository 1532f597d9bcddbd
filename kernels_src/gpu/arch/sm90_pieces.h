/* What a block of sm_90a's forward loop (arch/sm90_forward.h) takes at one time: a row tile with all of its keys
 * (WholeRowTiles) or, in kernels built with AITER_CUT, a piece of them (Pieces). Each piece is attended to on its own, from
 * a softmax that has seen nothing; what comes out is added up in the order of the pieces.
 *
 *     keys of a row tile   |  piece 0   |  piece 1   |  piece 2   |  3  |      Pieces are whole tiles of keys.
 *
 *     dealt    each piece is work of its own, for any block:      a short chunk of a prompt, or single tokens, over many
 *              its part goes to memory, and whoever writes the    keys: few row tiles, which would leave most of the
 *              last part of a wave's rows adds up all of them     multiprocessors idle
 *     in turn  a block takes one after the other, and keeps       batch_invariant, many row tiles: bits are those of
 *              the sum so far in memory of its own                pieces that are dealt, at the price of the cuts
 *
 * With batch_invariant the cuts are at multiples of INVARIANT_KEYS, wherever rows begin and whatever else there is: so a
 * row's bits depend neither on the manner nor on the rows beside it, of which some see pieces that it does not. Those
 * leave it as it was (Sum::add). Else pieces are as many as give each block one.
 *
 * A part is as its threads hold it: 16 bytes for each lane, lanes side by side, and at the end the two rows' maxima and
 * sums. Only waves that have rows have parts.
 *
 * Why that is safe:
 *   blocks    No block waits for another, so it does not matter how many of the grid are resident: who comes last does the
 *             sum, and the others have gone on. In turn, a block shares nothing.
 *   counters  One for each row tile and wave of it. Each piece of a row tile has the same number of them all, from the same
 *             lengths, and each wave with rows arrives once with each. They are cleared by a kernel that the launch
 *             overlaps: who counts waits for it first.
 *   memory    Who arrives has written its part; all lanes fence, meet, and one counts. Who counts last fences, and the
 *             lanes meet before they read. Parts go past the L1 cache. In turn, each lane reads what it wrote itself.
 *   space     Follows from sizes in the call, which a captured launch repeats, and is the most that any of the machine's
 *             GPUs needs, as how many pieces are dealt depends on its multiprocessors. A part's place is less than
 *             part_count(): pieces are dealt as `count` says, and in turn there are no more blocks than multiprocessors. */
#ifndef AITER_GPU_ARCH_SM90_PIECES_H
#define AITER_GPU_ARCH_SM90_PIECES_H

#include "gpu/arch/sm90.h"
#include "gpu/runtime.h"
#include "gpu/softmax.h"

namespace aiter {

/* Row tiles as they are: says what Pieces says, and leaves no code behind. */
struct WholeRowTiles {
    static constexpr int COUNTERS_TOGETHER = 1;

    WholeRowTiles() = default;
    WholeRowTiles(const aiter_attention_problem &, int64_t, int64_t, int) {}
    static int64_t count(int64_t row_tiles) { return row_tiles; }
    static int64_t counters(int64_t) { return 0; }
    static int64_t workspace_bytes(int64_t, int, bool counted) { return counted ? sizeof(uint32_t) : 0; }
    static bool place_in(void *, int64_t) { return true; }

    template <class RowTile> struct Task : RowTile {
        using RowTile::RowTile;
        __device__ __forceinline__ const Range &own(const Range &keys) const { return keys; }
        template <class Launch> __device__ __forceinline__ bool advance(const Launch &) { return false; }
    };
    template <class Task, class Softmax, class Output>
    __device__ __forceinline__ bool add_up(const Task &, Softmax &, Output &) const {
        return true;
    }
};

/* Which of a row tile's pieces this is. */
struct Piece {
    int number = 0, count = 1;
    int row_tile = 0; /* of all, where pieces are dealt */
    Range keys;
    __device__ __forceinline__ bool is_last() const { return number + 1 == count; }
};

/* How row tiles are cut; a part of the kernel's parameter. WAVES: of a row tile, of 16 rows each. */
template <int KEYS, int WAVES, class Output> struct Pieces {
    static constexpr int INVARIANT_KEYS = 4096 / KEYS * KEYS;
    static constexpr int LEAST_KEYS = 1024 / KEYS * KEYS; /* to be dealt: with fewer, beginning and end take longer */
    static constexpr int64_t MOST_BYTES = int64_t(256) << 20;
    static constexpr int COUNTERS_TOGETHER = 64; /* a multiple of so many is there, and is cleared */
    static constexpr int CHUNKS = Output::SLOTS * Output::VALUES / 4 + 1; /* of 16 bytes, of a lane's part */
    static constexpr int MANY = 24, AT_ONCE = CHUNKS > MANY ? 1 : 2; /* parts whose loads are under way: registers */
    static_assert(Output::SLOTS == 2 && Output::VALUES % 4 == 0, "");

    int keys = 0;  /* of a piece; 0: nothing is cut */
    int dealt = 0; /* pieces of a row tile that are work of their own, at most; 0: a block takes all of them in turn */
    int waves = 0; /* of a row tile that have rows */
    bool at_multiples = false;   /* are the cuts at multiples of `keys`? Else counted from a row tile's first key on */
    uint32_t *arrived = nullptr; /* of each row tile and wave: parts that are in memory */
    float4 *parts = nullptr;

    /* ---- host ---- */

    Pieces() = default;
    /* rows: of a row tile's that there can be. */
    Pieces(const aiter_attention_problem &p, int64_t row_tiles, int64_t rows, int blocks)
        : waves(static_cast<int>(lesser<int64_t>((rows + 15) / 16, WAVES))), at_multiples(p.batch_invariant) {
        const bool few = row_tiles * 2 <= blocks;
        /* Keys that a row tile sees, at most: a window's, from the beginning of a tile of keys on. */
        int64_t seen = greater(p.seqlen_k, 1);
        if (WINDOW && p.window_left >= 0 && p.window_right >= 0)
            seen = lesser<int64_t>(seen, int64_t(p.window_left) + p.window_right + rows + KEYS);
        if (p.batch_invariant) {
            keys = p.seqlen_k > INVARIANT_KEYS ? INVARIANT_KEYS : 0;
        } else if (few && row_tiles > 0) {
            const int64_t count = lesser<int64_t>(blocks / row_tiles, seen / LEAST_KEYS);
            if (count > 1) keys = round_up(static_cast<int>((seen + count - 1) / count), KEYS);
        }
        if (keys == 0 || !few) return;
        const int64_t most = (seen + keys - 1) / keys + (WINDOW && at_multiples); /* it may begin within a piece */
        if (row_tiles * most * part_bytes() <= MOST_BYTES) dealt = static_cast<int>(most);
        else if (!at_multiples) keys = 0;
    }
    /* Of tasks. */
    int64_t count(int64_t row_tiles) const { return dealt > 0 ? row_tiles * dealt : row_tiles; }

    /* The workspace: the counter of tasks, those of parts that have arrived, parts. */
    int64_t counters(int64_t row_tiles) const { return dealt > 0 ? 1 + row_tiles * waves : 0; }
    int64_t workspace_bytes(int64_t row_tiles, int blocks, bool counted) const {
        return keys > 0 ? parts_at(row_tiles) + part_count(row_tiles, blocks) * part_bytes()
                        : counted * int64_t(sizeof(uint32_t));
    }
    /* False where there is none for the parts: nobody told how many multiprocessors there are. */
    bool place_in(void *workspace, int64_t row_tiles) {
        if (keys == 0) return true;
        arrived = static_cast<uint32_t *>(workspace) + 1;
        parts = reinterpret_cast<float4 *>(static_cast<char *>(workspace) + parts_at(row_tiles));
        return workspace != nullptr;
    }

    /* ---- device ---- */

    /* The piece of a row tile with these keys that is number `index` of all tasks or, taken in turn, number `turn`. */
    __device__ __forceinline__ Piece piece(const Range &all, int index, int turn) const {
        Piece result;
        result.keys = all;
        result.number = turn;
        if (keys == 0) return result;
        const int origin = at_multiples ? all.low - all.low % keys : all.low;
        result.count = all.empty() ? 1 : (all.high - origin + keys - 1) / keys;
        if (dealt > 0) result.count = lesser(result.count, dealt);
        result.row_tile = dealt > 0 ? index / dealt : 0;
        if (dealt > 0) result.number = index - result.row_tile * dealt;
        result.keys.low = greater(all.low, origin + result.number * keys);
        result.keys.high = result.is_last() ? all.high : origin + (result.number + 1) * keys;
        return result;
    }

    template <class RowTile> struct Task : RowTile {
        Piece piece;

        template <class Launch>
        __device__ __forceinline__ Task(const Launch &launch, int index)
            : RowTile(launch, launch.work.dealt > 0 ? index / launch.work.dealt : index),
              piece(launch.work.piece(RowTile::keys, index, 0)) {}
        __device__ __forceinline__ bool exists() const { return piece.number < piece.count && RowTile::exists(); }
        /* Of these keys, those that are in the piece. */
        __device__ __forceinline__ Range own(const Range &keys) const {
            return {greater(keys.low, piece.keys.low), lesser(keys.high, piece.keys.high)};
        }
        /* To the next piece that the same block takes; false: there is none. */
        template <class Launch> __device__ __forceinline__ bool advance(const Launch &launch) {
            if (launch.work.dealt > 0 || piece.is_last()) return false;
            piece = launch.work.piece(RowTile::keys, 0, piece.number + 1);
            return true;
        }
    };

    /* What a wave has of the keys so far: an output that is not yet divided, and of each row a reference point and a
     * sum, which all its lanes know. */
    template <class Softmax> struct Sum {
        Softmax &softmax;
        Output &o;

        /* Adds what is in memory, of keys that come before (BEFORE) or after. A row that has seen no keys on one side is
         * what it is on the other, bit for bit. */
        template <bool BEFORE> __device__ __forceinline__ void add(const float4 *part) {
            const float4 last = __ldcg(part + (CHUNKS - 1) * WAVE);
            const float maxima[2] = {last.x, last.z}, sums[2] = {last.y, last.w};
            float own[2], other[2];
            bool only_own[2], only_other[2];
#pragma unroll
            for (int slot = 0; slot < 2; ++slot) {
                float &maximum = softmax.maximum[slot], &sum = softmax.sum[slot];
                only_other[slot] = sum == 0, only_own[slot] = sums[slot] == 0 && !only_other[slot];
                const float next = __builtin_fmaxf(maximum, maxima[slot]);
                own[slot] = exp2(maximum - next), other[slot] = exp2(maxima[slot] - next);
                maximum = only_own[slot] ? maximum : only_other[slot] ? maxima[slot] : next;
                sum = only_own[slot]     ? sum
                      : only_other[slot] ? sums[slot]
                                         : weighted<BEFORE>(sum, own[slot], sums[slot], other[slot]);
            }
            each_chunk([&](int chunk, int slot, int i) {
                const float4 x = __ldcg(part + chunk * WAVE);
                const float theirs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float mine = o.get(slot, i + j);
                    o.set(slot, i + j,
                          only_own[slot]     ? mine
                          : only_other[slot] ? theirs[j]
                                             : weighted<BEFORE>(mine, own[slot], theirs[j], other[slot]));
                }
            });
        }
        /* The earlier one's product is rounded: the same whichever of the two is in memory. */
        template <bool BEFORE>
        static __device__ __forceinline__ float weighted(float mine, float own, float theirs, float other) {
            return BEFORE ? __fmaf_rn(mine, own, __fmul_rn(theirs, other))
                          : __fmaf_rn(theirs, other, __fmul_rn(mine, own));
        }
        __device__ __forceinline__ void load(const float4 *part) {
            const float4 x = __ldcg(part + (CHUNKS - 1) * WAVE);
            softmax.maximum[0] = x.x, softmax.sum[0] = x.y, softmax.maximum[1] = x.z, softmax.sum[1] = x.w;
            each_chunk([&](int chunk, int slot, int i) {
                const float4 x = __ldcg(part + chunk * WAVE);
                o.set(slot, i, x.x), o.set(slot, i + 1, x.y), o.set(slot, i + 2, x.z), o.set(slot, i + 3, x.w);
            });
        }
        __device__ __forceinline__ void store(float4 *part) const {
            each_chunk([&](int chunk, int slot, int i) {
                __stcg(part + chunk * WAVE,
                       make_float4(o.get(slot, i), o.get(slot, i + 1), o.get(slot, i + 2), o.get(slot, i + 3)));
            });
            __stcg(part + (CHUNKS - 1) * WAVE,
                   make_float4(softmax.maximum[0], softmax.sum[0], softmax.maximum[1], softmax.sum[1]));
        }
        template <class Visit> static __device__ __forceinline__ void each_chunk(Visit visit) {
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS - 1; ++chunk) {
                visit(chunk, chunk / (Output::VALUES / 4), chunk % (Output::VALUES / 4) * 4);
                if (CHUNKS > MANY && chunk % 8 == 7)
                    asm volatile("" ::: "memory"); /* loads are not all to set off now */
            }
        }
    };

    /* By each wave, with what it has of a task. Are these now its rows' results, of all pieces? */
    template <class Task, class Softmax>
    __device__ __forceinline__ bool add_up(const Task &task, Softmax &softmax, Output &o) const {
        const Piece &piece = task.piece;
        if (piece.count == 1) return true;
        if (wave() >= waves) return false;
        Sum<Softmax> sum = {softmax, o};
#pragma unroll
        for (int slot = 0; slot < 2; ++slot) softmax.sum[slot] = row_sum(softmax.sum[slot]);
        if (dealt > 0) {
            const int first = piece.row_tile * dealt;
            sum.store(part(first + piece.number));
            if (!is_last_to_arrive(piece)) return false;
            sum.load(part(first));
#pragma unroll AT_ONCE
            for (int i = 1; i < piece.count; ++i) sum.template add<false>(part(first + i));
        } else {
            if (piece.number > 0) sum.template add<true>(part(block()));
            if (!piece.is_last()) {
                sum.store(part(block()));
                return false;
            }
        }
#pragma unroll
        for (int slot = 0; slot < 2; ++slot) softmax.sum[slot] = lane_leads_row() ? softmax.sum[slot] : 0.0f;
        return true;
    }

  private:
    int64_t part_bytes() const { return int64_t(waves) * CHUNKS * WAVE * sizeof(float4); }
    int64_t part_count(int64_t row_tiles, int blocks) const {
        return dealt > 0 ? count(row_tiles) : lesser<int64_t>(row_tiles, blocks);
    }
    int64_t parts_at(int64_t row_tiles) const {
        constexpr int64_t TOGETHER = COUNTERS_TOGETHER;
        const int64_t all = greater<int64_t>(counters(row_tiles), 1);
        return (all + TOGETHER - 1) / TOGETHER * TOGETHER * sizeof(uint32_t);
    }
    __device__ __forceinline__ float4 *part(int number) const {
        return parts + (static_cast<int64_t>(number) * waves + wave()) * (CHUNKS * WAVE) + lane();
    }
    __device__ __forceinline__ bool is_last_to_arrive(const Piece &piece) const {
        uint32_t *counter = arrived + piece.row_tile * waves + wave(); /* which all lanes ask together */
        wait_for_previous();                                           /* clear_counters */
        __threadfence();
        wave_sync();
        int before = 0;
        if (lane() == 0) {
            before = static_cast<int>(atomicAdd(counter, 1u));
            __threadfence();
        }
        wave_sync();
        return from_lane(before, 0) == piece.count - 1;
    }
};

} // namespace aiter

#endif
