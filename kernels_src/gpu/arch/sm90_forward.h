/* The loop over the tiles of keys on sm_90a: wgmma, copies by the bulk copy engine, blocks that stay.
 *
 *   block           one for each SM. It takes row tiles one after the other: in a fixed order or, where they differ in
 *                   work, by a counter in memory. While its last products are made and its output goes out, the first
 *                   tiles of the next row tile arrive.
 *   roles           two or three warpgroups multiply, 64 rows each; the last one copies:
 *       waves 0, 1  K and V into a ring of stages, as far ahead as there are stages, in the order of their use:
 *                   K(0), K(1), V(0), K(2), V(1), ... V(last). One lane sets off a tile (tensor maps); or, from pages,
 *                   one for each of its boxes, which are parts of pages, and which it has looked up a tile ahead.
 *                   Tensors of which there is no map, and pages whose size is no multiple of 8, are copied 16 bytes a
 *                   lane (cp.async)
 *       wave 2      finds out which row tiles the block takes
 *       wave 3      Q, as soon as there is room for it
 *   a warpgroup     In each step the scores of a tile and the product of the one before set off together; as soon as
 *                   the scores are there their softmax begins, while the product goes on. The warpgroups take turns in
 *                   setting off (ping-pong), so that one's softmax falls into another's products:
 *
 *      matrix unit   Q K(0)^T | Q K(1)^T, P(0) V(0) | Q K(2)^T, P(1) V(1) | ...
 *      vector unit            | softmax of 0        | softmax of 1        | ...
 *
 *                   Tiles that all of its rows see whole go through a loop without masks; before it come those that a
 *                   window's left edge cuts, after it those that the diagonal or the end cuts.
 *                   A row tile ends as follows: what its sums say is found while the last product is made; the output goes
 *                   to where its queries were, and from there, when the next row tile's first scores have set off, to
 *                   memory by the bulk copy engine: a wave's 16 rows at one time, where all exist, see keys and are not
 *                   NaN. Else, and where there is room for the queries of one row tile only, from registers.
 *   registers       S of one tile, P of the one before, O
 *   shared memory   Q of two row tiles, where there is room, and the ring: a stage is a tile of K or of V in blocks of 64
 *                   dimensions, rows of 128 bytes permuted as wgmma wants them. Two barriers (mbarrier) belong to each:
 *                   `full` completes when it has arrived, `empty` when all waves are done with it. */
#ifndef AITER_GPU_ARCH_SM90_FORWARD_H
#define AITER_GPU_ARCH_SM90_FORWARD_H

#include "gpu/arch/sm90_pieces.h"
#include "gpu/arch/sm90_row_tiles.h"
#include "gpu/arch/sm90_tensor_map.h"
#include "gpu/mask.h"
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

/* The kernel that counts is launched early, and waits for this one where it counts first. */
__global__ void clear_counter(uint32_t *counter) {
    let_next_start();
    *counter = 0;
}

template <int HEAD_DIM, int VALUE_DIM> struct WarpgroupLoop : WarpgroupShape<HEAD_DIM, VALUE_DIM> {
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
        Order order;
        Packing packing;
        uint32_t *next; /* counts those that are taken after the first of each block; null: in a fixed order */
        SmallCap small_cap;
        Work work;

        __host__ __device__ __forceinline__ bool few(int64_t tokens, int64_t keys) const {
            return tokens <= few_tokens && tokens * KEYS_OF_TOKEN <= keys;
        }
    };

    /* The first of this wave's rows, in the block's. It has all columns. */
    static __device__ __forceinline__ int wave_row() { return wave() * WAVE_ROWS; }
    static constexpr int OWN_COLUMNS = VALUE_DIM;
    static __device__ __forceinline__ int first_column() { return 0; }

    /* ---- host ---- */

    /* How a call's row tiles are cut, on a GPU with so many multiprocessors. */
    static Work work_of(const aiter_attention_problem &p, int64_t tiles, int blocks) {
        return Work(p, tiles, lesser<int64_t>(int64_t(p.seqlen_q) << Packing(p).bits, BLOCK_ROWS), blocks);
    }
    /* For the counter, and for what pieces leave. Where it is the lengths of padded sequences alone that make row tiles
     * differ, nothing here tells: then there is no counter, and each row tile gets a block of its own. Nor where there are
     * blocks enough. All that on whichever of the machine's GPUs the launch will be, from numbers that are the same
     * whenever a graph of the launch is replayed. */
    static int64_t workspace_bytes(const aiter_attention_problem &p, int64_t tiles) {
        const bool differ = MASKED || p.packed_q || p.packed_k;
        if (!CUT && !differ) return 0;
        int devices = 0;
        if (hipGetDeviceCount(&devices) != hipSuccess) return 0;
        int64_t most = 0;
        for (int device = 0; device < devices; ++device) {
            const int blocks = compute_units(device);
            const Work work = work_of(p, tiles, blocks);
            most = greater(most, work.workspace_bytes(tiles, blocks, differ && work.count(tiles) > blocks));
        }
        return most;
    }

    static __device__ __forceinline__ int alignment(const Launch &launch) { return PAGED ? greater(launch.box, 1) : 1; }

    /* add_up: the second kernel, where keys are cut and dealt. */
    static int start(void (*kernel)(Launch), const aiter_attention_call &call, int64_t tiles, void *stream,
                     void (*add_up)(Launch) = nullptr) {
        const aiter_attention_problem &p = call.problem;
        const aiter_attention_tensors &t = call.tensors;
        int device = 0;
        if (const hipError_t error = hipGetDevice(&device)) return error;
        const int blocks = compute_units(device);
        if (blocks == 0) return LAUNCH_NO_COMPUTE_UNITS;
        Launch launch;
        static_cast<Arguments &>(launch) = call;
        launch.work = work_of(p, tiles, blocks);
        if (!launch.work.place_in(t.workspace)) return LAUNCH_NO_COMPUTE_UNITS;
        const int64_t tasks = launch.work.count(tiles);
        if (tasks > 0x7fffffff) return LAUNCH_GRID_TOO_LARGE;
        launch.tasks = static_cast<int>(tasks);
        launch.small_cap = SmallCap(p);
        launch.box = PAGED ? tensor_map::box_of(p.page_size, KEYS) : KEYS;
        const int bits = Packing(p).bits;
        const int apart = greater((p.heads_q / p.heads_kv) >> bits, 1); /* heads that share no row tile */
        launch.few_tokens = FEW_ROW_TILES / apart * BLOCK_ROWS >> bits;
        const int64_t tokens =
            p.packed_q ? p.total_q / greater(p.batch, 1) : p.seqlen_q; /* of a sequence, on average */
        const auto reuse = launch.few(tokens, p.seqlen_k) ? tensor_map::Reuse::ONCE : tensor_map::Reuse::OFTEN;
        const bool mapped =
            tensor_map::make_keys_and_values(launch.key, launch.value, reuse, call, launch.box) &&
            tensor_map::make(launch.query, tensor_map::Reuse::OFTEN, t.query, p.query_strides, p.packed_q ? 1 : p.batch,
                             p.packed_q ? p.total_q : p.seqlen_q, p.heads_q, HEAD_DIM, 64 >> bits, 1 << bits);
        if (!mapped) launch.box = 0;
        launch.output_is_mapped =
            BULK_OUTPUT && tensor_map::make(launch.output, tensor_map::Reuse::OFTEN, t.output, p.output_strides,
                                            p.packed_q ? 1 : p.batch, p.packed_q ? p.total_q : p.seqlen_q, p.heads_q,
                                            VALUE_DIM, greater(WAVE_ROWS >> bits, 1), lesser(1 << bits, WAVE_ROWS));
        launch.order = {p, tiles, blocks, p.packed_q && tasks == tiles};
        launch.packing = Packing(p);
        const bool given = t.seqlens_q != nullptr || t.seqlens_k != nullptr || t.starts_q != nullptr ||
                           t.starts_k != nullptr || t.page_indptr != nullptr;
        const bool equal = !MASKED && !given;
        const bool counted = !equal && t.workspace != nullptr && tasks > blocks;
        launch.next = counted ? static_cast<uint32_t *>(t.workspace) : nullptr;
        const int64_t grid = equal || counted ? lesser<int64_t>(tasks, blocks) : tasks;
        if (counted)
            if (const int failed = aiter::launch(clear_counter, 1, 1, 0, stream, launch.next)) return failed;
        const int failed = counted ? launch_next(kernel, grid, THREADS, SHARED_BYTES, stream, launch)
                                   : aiter::launch(kernel, grid, THREADS, SHARED_BYTES, stream, launch);
        const int64_t additions = launch.work.additions(tiles);
        if (failed || additions == 0) return failed;
        return launch_next(add_up, additions, launch.work.adding_threads(), 0, stream, launch);
    }

    /* x, which is the same in all lanes: or the assembler takes branches on it for divergent, and in those it would
     * wait for each product. */
    static __device__ __forceinline__ int same(int x) { return from_lane(x, 0); }

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

    /* ---- which row tiles a block takes ---- */

    static __device__ __forceinline__ Place place(const Launch &launch, int index) { return launch.order.place(index); }
    static __device__ __forceinline__ Packing packing(const Launch &launch) { return launch.packing; }

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

    /* Where a wave's rows of Q are and, later, its output, until the bulk copy engine has taken it to memory. */
    struct OutputPlace {
        SharedAddress rows = 0;
        bool filled = false;
        int token, head, batch; /* of the tensor of outputs, where it is */

        /* Copies what is there, if anything is. By the whole wave, which has written it. */
        __device__ __forceinline__ void send(const Launch &launch) {
            wgmma::shared_is_written(); /* whether it is sent or the next queries come there */
            wave_sync();
            if (filled && lane() == 0) { /* who also waits, and gives the room back: release_queries_before() */
#pragma unroll
                for (int line = 0; line < VALUE_LINES; ++line)
                    tensor_map::store(launch.output, line * 64, token, head, batch, rows + line * 64 * 128);
                bulk::end();
            }
            wave_sync();
            filled = false;
        }
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

    /* ---- products ---- */

    static __device__ __forceinline__ void begin_scores(SharedAddress queries, SharedAddress keys, Scores &s) {
        const wgmma::Matrix a = wgmma::matrix(opaque(queries)), b = wgmma::matrix(keys);
#pragma unroll
        for (int j = 0; j < STEPS; ++j)
            wgmma::Product<KEYS>::multiply(s.tile[0], a + (j / 4 * 64 * 128 + j % 4 * 32) / 16,
                                           b + (j / 4 * KEYS * 128 + j % 4 * 32) / 16, j > 0);
        wgmma::end();
    }
    static __device__ __forceinline__ void begin_output(const uint32_t (&p)[KEYS / 16][4], SharedAddress values,
                                                        Output &o) {
        const wgmma::Matrix b = wgmma::matrix(values, KEYS * 128);
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j)
            wgmma::Product<COLUMNS>::multiply_transposed(o.tile[0], p[j], b + j * 16 * 128 / 16);
        wgmma::end();
    }
    static __device__ __forceinline__ void round(const Scores &s, uint32_t (&p)[KEYS / 16][4]) {
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j) round_operand(s, 0, j, p[j]);
    }

    /* A row tile that sees no keys goes through one tile of them all the same, masked. */
    static __device__ __forceinline__ Range at_least_one(const Range &keys) {
        return {same(keys.empty() ? 0 : keys.low), same(keys.empty() ? 1 : keys.high)};
    }

    /* One warpgroup's way through the tiles of a row tile. */
    struct Warpgroup {
        const Launch &launch;
        SharedAddress shared;
        int number = wave() / 4; /* of the warpgroup */
        Ring ring = {shared};
        QueryRing queries = {shared, number};
        int own_rows = wave() % 4 * WAVE_ROWS; /* the wave's, in the warpgroup's */
        OutputPlace output;
        bool is_after = false; /* another row tile */

        __device__ __forceinline__ Warpgroup(const Launch &launch, SharedAddress shared)
            : launch(launch), shared(shared) {
            if (number == WARPGROUPS - 1) pass(FIRST_TURN, 2 * WARPGROUP); /* the first begins */
        }

        /* Named barriers: the warpgroup's own meeting, and its turn to set off. */
        static constexpr int FIRST_MEETING = 1, FIRST_TURN = 4;
        __device__ __forceinline__ void meet_all() const { meet(FIRST_MEETING + number, WARPGROUP); }
        __device__ __forceinline__ void await_turn() const { meet(FIRST_TURN + number, 2 * WARPGROUP); }
        __device__ __forceinline__ void pass_turn() const {
            pass(FIRST_TURN + (number + 1 == WARPGROUPS ? 0 : number + 1), 2 * WARPGROUP);
        }
        /* Not by the bulk copy engine: what other threads have copied becomes visible to wgmma. */
        __device__ __forceinline__ Ring take() {
            const Ring taken = ring.take();
            if (launch.box == 0) wgmma::shared_is_written();
            return taken;
        }

        __device__ __forceinline__ void await_queries(const QueryBits &bits) {
            const bool change = bits.keep == 0 || bits.flip != 0; /* rare */
            mbarrier::wait(queries.full(), queries.turn);
            if (change) {
                const SharedAddress mine = queries.tile() + thread_in_block() % WARPGROUP * 4;
#pragma unroll 1
                for (int i = 0; i < QUERY_BYTES; i += WARPGROUP * 4)
                    shared_store(mine + i, bits(shared_load<uint32_t>(mine + i)));
            }
            if (change || launch.box == 0) wgmma::shared_is_written();
            if (change) meet_all();
        }

        /* Values past the end of the sequence become zeros: what the tensor holds there meets probabilities of 0. */
        __device__ __forceinline__ void clear_past_end(SharedAddress values, int rows) const {
            if (rows >= KEYS) return;
            clear_rows_from<KEYS, VALUE_LINES>(values, rows);
            wgmma::shared_is_written();
            meet_all();
        }

        __device__ __forceinline__ SharedAddress own_queries() const { return queries.tile() + own_rows * 128; }
        /* The place of the queries before these, and of their output, is read no more as soon as the copies of that are
         * under way: looked for only now, when they have had time. */
        __device__ __forceinline__ void release_queries_before() {
            bulk::wait_for_reads(); /* by all lanes: a branch would make the assembler wait for the product */
            if (is_after && lane() == 0) mbarrier::arrive(QueryRing{shared, number, queries.stage ^ 1}.empty());
            is_after = true;
        }

        /* Tiles that only other warpgroups see are passed over, but in step with these. read_task(): what there is to
         * do. at_last_product(): while it is made. */
        template <class ReadTask, class AtLastProduct>
        __device__ __forceinline__ void attend(ReadTask read_task, const Score &score, Softmax &softmax, Output &o,
                                               AtLastProduct at_last_product) {
            Scores s;
            await_queries(score.query_bits);
            const Ring first_keys = take();
            await_turn();
            wgmma::begin();
            begin_scores(queries.tile(), first_keys.tile(),
                         s); /* they need nothing of the task but its place in the rings */
            pass_turn();
            if (BULK_OUTPUT) output.send(launch);
            const auto tile = read_task();
            const Sequence &sequence = tile.sequence;
            const int wave_row = tile.first_row + wave() * WAVE_ROWS;
            const Mask &mask = sequence.mask;
            const Range keys = at_least_one(tile.own(tile.keys));
            const int keys_count = same(sequence.keys.count), first_row = tile.first_row + number * 64;
            /* What any of the warpgroup's rows sees ends here; what all of them see, or all of the wave's, needs no
             * mask. */
            const int first_token = tile.token(first_row), end_token = tile.token(first_row + 63) + 1;
            const Range any = tile.own(mask.keys_of_any(first_token, end_token));
            const Range all = mask.keys_of_all(first_token, end_token);
            const Range of_wave = mask.keys_of_all(tile.token(wave_row), tile.token(wave_row + WAVE_ROWS - 1) + 1);
            const int own_end = same(any.empty() ? keys.low + 1 : any.high);
            const Range whole = {same(all.low), lesser(own_end, same(all.high))};
            const Range wave_whole = {same(of_wave.low), same(of_wave.high)};
            uint32_t p[KEYS / 16][4];
            float shrink[2];
            typename Work::InTurn pieces(launch.work, keys.low);
            const auto finish = [&](int first) {
                score.finish(
                    s, first, [&](int) { return sequence.slope; },
                    [&](int slot) { return wave_row + Scores::row(slot) + mask.diagonal; });
            };
            const auto hide = [&](int first) {
                if (!wave_whole.template covers<WINDOW>(first, first + KEYS))
                    aiter::hide<WINDOW>(s, -INFINITE, first, [&](int slot) {
                        return mask.keys_of(tile.token(opaque(wave_row) + Scores::row(slot)));
                    });
            };

            /* Scores become weights. Is the output to be multiplied by `shrink`? */
            const auto weigh = [&](int first, bool masked) __attribute__((always_inline)) {
                if (SmallCap::POSSIBLE && launch.small_cap.holds) {
                    launch.small_cap.finish(score, s);
                    if (masked) hide(first);
                    softmax.add(s);
                    return false;
                }
                finish(first);
                if (masked) hide(first);
                return softmax.advance(s, shrink);
            };

            wgmma::wait<0>();
            first_keys.release();
            changed(s);
            weigh(keys.low, true);
            round(s, p);
            if (BULK_OUTPUT) release_queries_before();
            /* cut: the tile is the first of a piece; with its scores, the last product of the piece before is made. */
            const auto step = [&](int first, bool masked, bool cut = false) __attribute__((always_inline)) {
                const Ring key_tile = take();
                await_turn();
                wgmma::begin();
                begin_scores(queries.tile(), key_tile.tile(), s);
                const Ring values = take();
                wgmma::begin();
                begin_output(p, values.tile(), o);
                pass_turn();
                wgmma::wait<1>();
                key_tile.release();
                changed(s);
                if (cut) pieces.set_aside(softmax);
                const bool grown = weigh(first, masked);
                wgmma::wait<0>();
                values.release();
                changed(o);
                round(s, p); /* before the branch: it fits between the exponentials */
                if (cut) pieces.leave(launch.work, shared + SUM_AT, o);
                else if (grown) softmax.rescale(o, shrink);
            };
            int first = keys.low + KEYS;
#pragma unroll 1
            for (;;) {
                int end = own_end;
                if constexpr (CUT)
                    end = same(lesser(end, pieces.end)), first = same(first); /* or it is not seen to be */
                if constexpr (WINDOW)
#pragma unroll 1
                    for (; first < lesser(end, whole.low); first += KEYS) step(first, true);
#pragma unroll 1
                for (; first + KEYS <= lesser(end, whole.high); first += KEYS) step(first, false);
#pragma unroll 1
                for (; first < end; first += KEYS) step(first, true);
                if (!CUT || first >= own_end) break;
                step(first, true, true);
                first += KEYS;
            }
            if (!BULK_OUTPUT && lane() == 0) mbarrier::arrive(queries.empty());
            queries.advance();
            if (first < keys.high) pass_over_scores();
            Ring last_values = take();
            clear_past_end(last_values.tile(), keys_count - (first - KEYS));
            wgmma::begin();
            begin_output(p, last_values.tile(), o);
            at_last_product();
            if (BULK_OUTPUT) meet_all(); /* the last scores of all are made: the place of Q is free */
#pragma unroll 1
            for (; first < keys.high; first += KEYS) {
                wgmma::wait<0>();
                last_values.release(); /* now, or the copies could not go on */
                if (first + KEYS < keys.high) pass_over_scores();
                last_values = take();
            }
            wgmma::wait<0>();
            last_values.release();
            changed(o);
            pieces.collect(launch.work, shared + SUM_AT, softmax, o);
        }
        __device__ __forceinline__ void pass_over_scores() {
            take().release();
            await_turn();
            pass_turn();
        }
    };

    /* ---- the block ---- */

    /* See TileLoop. Of finish both halves are asked for: ends(), and store(). */
    template <class RowTile, class Finish>
    static __device__ __forceinline__ void run(const Launch &launch, SharedAddress shared, const Score &score,
                                               Finish finish) {
        using Task = typename Work::template Task<RowTile>;
        if (CUT) let_next_start();
        const bool mapped = launch.box != 0;
        clear_rest(launch, static_cast<int>(gridDim.x), THREADS); /* first, while all threads have as many registers */
        if (thread_in_block() == 0) {
            for (Ring r = {shared}; r.turn == 0; r.advance()) {
                mbarrier::make(r.full(), mapped ? 1 : WAVE);
                mbarrier::make(r.empty(), WAVES);
            }
            for (int i = 0; i < WARPGROUPS; ++i)
                for (QueryRing r = {shared, i}; r.turn == 0; r.advance()) {
                    mbarrier::make(r.full(), mapped ? 1 : WAVE);
                    mbarrier::make(r.empty(), 4);
                }
            mbarrier::make(shared + ALMOST_DONE_AT, 2); /* by the waves that copy keys and values */
            for (int slot = 0; slot < TURNS; ++slot) {
                const Turn turn = {shared, slot};
                mbarrier::make(turn.full(), 1);
                mbarrier::make(turn.empty(), WAVES + 3); /* all waves that read */
            }
            mbarrier::made();
        }
        barrier();
        Turn turn = {shared};
        if (wave() >= WAVES) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COPY_REGISTERS));
            const int role = wave() - WAVES;
            if (role == 2) {
                find_tasks<Task>(launch, shared);
            } else if (role == 3) {
                QueryRing ring = {shared, 0};
#pragma unroll 1
                for (; turn.await(); turn = turn.after()) {
                    const Task tile = turn.template read<Task>();
                    turn.release();
#pragma unroll 1
                    for (ring.warpgroup = 0; ring.warpgroup < WARPGROUPS; ++ring.warpgroup)
                        copy_queries(launch, tile, ring);
                    ring.advance();
                }
                wait_for_copies();
            } else {
                Ring ring = {shared};
#pragma unroll 1
                for (; turn.await(); turn = turn.after()) {
                    const Task tile = turn.template read<Task>();
                    turn.release();
                    copy_tiles(launch, tile.sequence, ring, at_least_one(tile.own(tile.keys)), [&] {
                        if (lane() == 0) mbarrier::arrive(shared + ALMOST_DONE_AT);
                    });
                }
                wait_for_copies();
            }
        } else {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(OWN_REGISTERS));
            Warpgroup warpgroup(launch, shared);
#pragma unroll 1
            for (; turn.await(); turn = turn.after()) {
                Softmax softmax(score.unit);
                Output o;
                o.clear();
                const SharedAddress place = warpgroup.own_queries();
                decltype(finish.ends(turn.template read<Task>(), softmax)) ends;
                const auto read_task = [&] { return turn.template read<Task>(); };
                warpgroup.attend(read_task, score, softmax, o, [&] {
                    if (EARLY_ENDS) ends = finish.ends(read_task(), softmax);
                });
                const Task task = turn.template read<Task>(); /* again: registers were few meanwhile */
                if (launch.work.is_whole(task, softmax, o)) {
                    if (!EARLY_ENDS) ends = finish.ends(task, softmax);
                    warpgroup.output.rows = place;
                    finish.store(task, ends, o, warpgroup.output);
                }
                turn.release();
            }
            if (BULK_OUTPUT) {
                warpgroup.output.send(launch);
                bulk::wait_for_reads();
            }
            /* The first warpgroup's turn has been passed to it once more than it has taken. */
            if (warpgroup.number == 0) warpgroup.await_turn();
        }
    }

    /* Whether all of the wave's rows can go out at one time: they exist. */
    template <class RowTile>
    static __device__ __forceinline__ bool can_send(const Launch &launch, const RowTile &tile, int wave_row) {
        return BULK_OUTPUT && launch.output_is_mapped &&
               tile.token(wave_row + WAVE_ROWS - 1) < tile.sequence.padded_rows;
    }
    /* The output as it is to be in memory goes to the wave's place, in blocks of 64 columns as wgmma would read them.
     * Returns whether any of it could be NaN. */
    static __device__ __forceinline__ bool round_output(const Output &o, const OutputPlace &place) {
        if constexpr (CUT) return MASKED;
        const SharedAddress lane_row = place.rows + rows_first<64>();
        uint32_t greatest[2] = {}; /* two, as each step waits for the one before */
#pragma unroll
        for (int j = 0; j < COLUMNS / 16; ++j) {
            uint32_t four[4];
            round_operand(o, 0, j, four);
            if (BULK_OUTPUT) store_matrices((lane_row ^ j % 4 << 5) + j / 4 * 64 * 128, four);
            if (MASKED)
#pragma unroll
                for (int i = 0; i < 2; ++i) greatest[i] = __vimax3_s16x2(greatest[i], four[2 * i], four[2 * i + 1]);
        }
        /* All NaNs are converted to the same bits, and no positive number has greater ones. */
        const uint32_t both = __vmaxs2(greatest[0], greatest[1]);
        return MASKED && wave_any(both >> 16 == 0x7fff || (both & 0xffff) == 0x7fff);
    }
    /* What is there is to go to memory as it is. */
    template <class RowTile>
    static __device__ __forceinline__ void leave(const RowTile &tile, int wave_row, OutputPlace &place) {
        const Sequence &sequence = tile.sequence;
        place.filled = true;
        place.token = sequence.first_query + tile.token(wave_row);
        place.head = sequence.query_head + tile.member(wave_row);
        place.batch = sequence.query_batch;
    }

    /* row(r): where row r of the wave goes, or null. */
    template <class RowPointer>
    static __device__ __forceinline__ void store_output(const Output &o, const OutputPlace &, RowPointer row) {
#pragma unroll
        for (int slot = 0; slot < 2; ++slot) store_elements<VALUE_DIM>(o, slot, row(Output::row(slot)));
    }
};

} // namespace aiter

#endif
