/* What a block of sm_90a's forward loop (arch/sm90_forward.h) has, and the kernel's parameter: the shape of its tiles, where
 * they are in shared memory, and the rings and slots in which its waves hand them to each other.
 *
 *     shared memory   | Q of each warpgroup, 1 or 2 row tiles | stages of K and V ... | barriers | tasks | sum so far |
 *     Ring            stages of K and V         filled by waves 0 and 1 of those that copy
 *     QueryRing       a warpgroup's places of Q                by wave 3
 *     Turn            slots, each a task                       by wave 2 */
#ifndef AITER_GPU_ARCH_SM90_FORWARD_TILES_H
#define AITER_GPU_ARCH_SM90_FORWARD_TILES_H

#include "gpu/pieces.h"
#include "gpu/arch/sm90_row_tiles.h"
#include "gpu/arch/sm90_tensor_map.h"
#include "gpu/score.h"
#include "gpu/sequence.h"
#include "gpu/softmax.h"

#include <type_traits>

namespace aiter {

/* A warpgroup has 64 rows. Up to 96 dimensions the softmax is half of the work or more, and with a cap up to 128: three
 * warpgroups hide it better. The keys of a tile are limited by registers (S and P take 3/4 of one for each, O one for
 * two dimensions), by shared memory, and by what is multiplied for nothing where the diagonal or the end cuts a tile. */
template <int HEAD_DIM, int VALUE_DIM> struct WarpgroupShape {
    static constexpr bool CAPPED = SOFTCAP && !ALIBI; /* with slopes it makes no difference */
    static constexpr int WIDER = greater(HEAD_DIM, VALUE_DIM), WARPGROUPS = WIDER <= (CAPPED ? 128 : 96) ? 3 : 2;
    static constexpr int KEYS = WIDER <= 64                        ? 128
                                : WIDER <= 96                      ? 96
                                : WIDER <= 128                     ? (CAPPED ? 80 : 128)
                                : WIDER <= 192 && VALUE_DIM <= 128 ? 112
                                : WIDER <= 192                     ? 96
                                                                   : 64;
};

template <int HEAD_DIM, int VALUE_DIM> struct ForwardTiles : WarpgroupShape<HEAD_DIM, VALUE_DIM> {
    using Shape = WarpgroupShape<HEAD_DIM, VALUE_DIM>;
    using Shape::WARPGROUPS, Shape::KEYS;
    static constexpr int WAVES = WARPGROUPS * 4; /* without those that copy */
    static constexpr int WAVE_ROWS = 16, BLOCK_ROWS = WAVES * WAVE_ROWS;
    static constexpr bool SEVERAL_HEADS = !ALIBI; /* in a row tile: there is one slope */
    using Packing = aiter::Packing<SEVERAL_HEADS>;
    static constexpr int BLOCKS = 1, WARPGROUP = 128, THREADS = (WARPGROUPS + 1) * WARPGROUP;
    /* Registers of a thread. A block begins with as many for each, and no more than that can be dealt out anew. */
    static constexpr int REGISTERS = 65536 / THREADS / 8 * 8;
    static constexpr int OWN_REGISTERS = WARPGROUPS == 3 ? 160 : 232, COPY_REGISTERS = WARPGROUPS == 3 ? 32 : 40;
    static_assert(WAVES * WAVE * OWN_REGISTERS + WARPGROUP * COPY_REGISTERS <= THREADS * REGISTERS, "or it hangs");

    static constexpr int COLUMNS = round_up(VALUE_DIM, 16), STEPS = round_up(HEAD_DIM, 16) / 16;
    static constexpr int LINES = round_up(HEAD_DIM, 64) / 64, VALUE_LINES = round_up(VALUE_DIM, 64) / 64;
    using Scores = Accumulator<1, KEYS>;
    using Output = Accumulator<1, COLUMNS>;
    using Softmax = OnlineSoftmax<2>;

    static constexpr int TILE_BYTES = greater(LINES, VALUE_LINES) * KEYS * 128; /* of a stage */
    static constexpr int QUERY_BYTES = LINES * 64 * 128;                        /* of a warpgroup */
    static constexpr int ALL_BYTES = SHARED_LIMIT - 1024;                       /* of what is no barrier and no task */
    /* What a block's tasks are: row tiles or, in kernels that cut keys, pieces of them. */
    using Work =
        std::conditional_t<CUT, Pieces<KEYS, WAVES, Output, ALL_BYTES - WARPGROUPS * QUERY_BYTES - 3 * TILE_BYTES>,
                           WholeRowTiles>;
    static constexpr int MOST_BYTES = ALL_BYTES - Work::SUM_BYTES;
    /* Of Q there is room for the next row tile too, where that leaves four stages. */
    static constexpr int QUERIES = (MOST_BYTES - 2 * WARPGROUPS * QUERY_BYTES) / TILE_BYTES >= 4 ? 2 : 1;
    static constexpr int RING_AT = QUERIES * WARPGROUPS * QUERY_BYTES;
    static constexpr int STAGES = lesser((MOST_BYTES - RING_AT) / TILE_BYTES, 8);
    /* The output leaves by the bulk copy engine, from the place of its row tile's queries, when the next row tile's first
     * scores have set off. */
    static constexpr bool BULK_OUTPUT = !CUT && QUERIES == 2 && VALUE_LINES <= LINES;
    /* What a row tile ends with is found while its last product is made, where that is known by then. */
    static constexpr bool EARLY_ENDS = !CUT;
    static constexpr int BARRIERS_AT = RING_AT + STAGES * TILE_BYTES;
    static constexpr int QUERY_BARRIERS_AT = BARRIERS_AT + STAGES * 16,
                         TURNS_AT = QUERY_BARRIERS_AT + QUERIES * WARPGROUPS * 16;
    static constexpr int TURNS = 3, TURN_BYTES = 256; /* two barriers and what a row tile is */
    static constexpr int ALMOST_DONE_AT = TURNS_AT + TURNS * TURN_BYTES, SUM_AT = ALMOST_DONE_AT + 16;
    static constexpr int SHARED_BYTES = SUM_AT + Work::SUM_BYTES;
    static_assert(STAGES >= 3 && KEYS % 16 == 0 && SUM_AT % 16 == 0 && SHARED_BYTES <= SHARED_LIMIT, "");

    /* No more row tiles than that read a KV head's keys nearly ONCE, if keys are many besides: memory is the bound then
     * (by trial, docs/hopper.md). */
    static constexpr int FEW_ROW_TILES = 512 / BLOCK_ROWS, KEYS_OF_TOKEN = 4;

    using Order = RowTileOrder<Packing, (LINES + VALUE_LINES) * 128>;

    /* The kernel's parameter. */
    struct Launch : Arguments {
        CUtensorMap query, key, value, output;
        bool output_is_mapped;
        int few_tokens; /* of a sequence, that fill so many */
        int box;        /* keys that a map's copy brings; 0: there are no maps */
        int tasks;      /* in all: row tiles or what they are cut into */
        /* Pieces that a SharedPiece's cluster has at one time, and adds up; 1: the second kernel does. */
        int together = 1;
        Order order;
        Packing packing;
        uint32_t *next; /* counts those that are taken after the first of each block; null: in a fixed order */
        SmallCap small_cap;
        Work work;
        Divisor sharing, by_together; /* sharing: blocks that share a piece, in clusters */

        /* Is a sequence of so many tokens and keys one that reads its keys nearly ONCE? */
        __host__ __device__ __forceinline__ bool few(int64_t tokens, int64_t keys) const {
            return tokens <= few_tokens && tokens * KEYS_OF_TOKEN <= keys;
        }
    };

    /* x, which is the same in all lanes: or the assembler takes branches on it for divergent, and in those it would
     * wait for each product. */
    static __device__ __forceinline__ int same(int x) { return from_lane(x, 0); }

    /* A row tile that sees no keys goes through one tile of them all the same, masked. */
    static __device__ __forceinline__ Range at_least_one(const Range &keys) {
        return {same(keys.empty() ? 0 : keys.low), same(keys.empty() ? 1 : keys.high)};
    }

    /* ---- ring of K and V ---- */

    struct Ring {
        SharedAddress shared;
        int stage = 0;
        uint32_t turn = 0; /* how often, modulo 2, the stages have been gone through */

        __device__ __forceinline__ SharedAddress tile() const { return shared + RING_AT + stage * TILE_BYTES; }
        __device__ __forceinline__ SharedAddress full() const { return shared + BARRIERS_AT + stage * 16; }
        __device__ __forceinline__ SharedAddress empty() const { return full() + mbarrier::BYTES; }
        __device__ __forceinline__ void advance() {
            if (++stage == STAGES) stage = 0, turn ^= 1;
        }
        /* The next tile to be used: its stage, which is to be released. */
        __device__ __forceinline__ Ring take() {
            mbarrier::wait(full(), turn);
            const Ring taken = *this;
            advance();
            return taken;
        }
        __device__ __forceinline__ void release() const {
            if (lane() == 0) mbarrier::arrive(empty());
        }
        /* The next stage to be filled. */
        __device__ __forceinline__ void vacate() const { mbarrier::wait(empty(), turn ^ 1); /* at once in turn 0 */ }
    };

    /* Q of one warpgroup: the stages of a ring of its own. */
    struct QueryRing {
        SharedAddress shared;
        int warpgroup, stage = 0;
        uint32_t turn = 0;

        __device__ __forceinline__ SharedAddress tile() const {
            return shared + (stage * WARPGROUPS + warpgroup) * QUERY_BYTES;
        }
        __device__ __forceinline__ SharedAddress full() const {
            return shared + QUERY_BARRIERS_AT + (stage * WARPGROUPS + warpgroup) * 16;
        }
        __device__ __forceinline__ SharedAddress empty() const { return full() + mbarrier::BYTES; }
        __device__ __forceinline__ void advance() {
            if (++stage == QUERIES) stage = 0, turn ^= 1;
        }
    };

    /* ---- tasks ---- */

    /* Wave 2 of those that copy finds out what the block's tasks are, row tiles or pieces of them, and hands them to the
     * others in slots of shared memory, each with barriers like those of the ring: one slot for the task that the
     * warpgroups are at, one for that which is copied, one for the next. That is looked for as soon as only the last
     * values are to be copied: not later, as it takes 300 instructions, and its queries 2000 cycles more; and not before,
     * as what is taken early is taken from a block that might be free earlier. */
    struct Turn {
        SharedAddress shared;
        int slot = 0;
        uint32_t turn = 0;

        __device__ __forceinline__ SharedAddress full() const { return shared + TURNS_AT + slot * TURN_BYTES; }
        __device__ __forceinline__ SharedAddress empty() const { return full() + mbarrier::BYTES; }
        __device__ __forceinline__ SharedAddress exists() const { return full() + 16; }
        __device__ __forceinline__ SharedAddress task() const { return full() + 32; }
        __device__ __forceinline__ Turn after() const {
            return slot + 1 == TURNS ? Turn{shared, 0, turn ^ 1} : Turn{shared, slot + 1, turn};
        }

        /* Is there another task? */
        __device__ __forceinline__ bool await() const {
            mbarrier::wait(full(), turn);
            return same(shared_load<int>(exists()));
        }
        /* By words, of all lanes the same, into an empty slot: as a whole it would be copied byte by byte. */
        template <class Task> __device__ __forceinline__ void write(const Task &task) const {
            static_assert(std::is_trivially_copyable<Task>::value && sizeof(Task) % 4 == 0, "");
#pragma unroll
            for (int i = 0; i < int(sizeof(Task) / 4); ++i) {
                uint32_t word;
                __builtin_memcpy(&word, reinterpret_cast<const char *>(&task) + i * 4, 4);
                shared_store(this->task() + i * 4, word);
            }
            wave_sync(); /* one lane announces it */
        }
        template <class Task> __device__ __forceinline__ Task read() const {
            static_assert(sizeof(Task) <= TURN_BYTES - 32, "");
            return shared_load<Task>(task());
        }
        __device__ __forceinline__ void release() const {
            wave_sync();
            if (lane() == 0) mbarrier::arrive(empty());
        }
        __device__ __forceinline__ void vacate() const { mbarrier::wait(empty(), turn ^ 1); }
        __device__ __forceinline__ void announce(bool another) const {
            if (lane() == 0) {
                shared_store(exists(), static_cast<int>(another));
                mbarrier::arrive(full());
            }
            wave_sync();
        }
    };
};

} // namespace aiter

#endif
