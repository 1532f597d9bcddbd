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
 *                   `full` completes when it has arrived, `empty` when all waves are done with it.
 *
 * Here: the launch, and a block's roles. What they do: sm90_forward_copies.h and sm90_forward_products.h, upon what is in
 * shared memory, sm90_forward_tiles.h. */
#ifndef AITER_GPU_ARCH_SM90_FORWARD_H
#define AITER_GPU_ARCH_SM90_FORWARD_H

#include "gpu/arch/sm90_forward_copies.h"
#include "gpu/arch/sm90_forward_products.h"
#include "gpu/arch/sm90_shared_piece.h"

namespace aiter {

/* The kernel that counts is launched early, and waits for this one where it counts first. */
__global__ void clear_counter(uint32_t *counter) {
    let_next_start();
    *counter = 0;
}

template <int HEAD_DIM, int VALUE_DIM> struct WarpgroupLoop : ForwardTiles<HEAD_DIM, VALUE_DIM> {
    using Tiles = ForwardTiles<HEAD_DIM, VALUE_DIM>;
    using Copies = ForwardCopies<HEAD_DIM, VALUE_DIM>;
    using Products = ForwardProducts<HEAD_DIM, VALUE_DIM>;
    using Tiles::COLUMNS, Tiles::BULK_OUTPUT, Tiles::EARLY_ENDS, Tiles::SHARED_BYTES, Tiles::ALMOST_DONE_AT,
        Tiles::TURNS;
    using Tiles::OWN_REGISTERS, Tiles::COPY_REGISTERS, Tiles::FEW_ROW_TILES, Tiles::at_least_one;
    using Tiles::WAVES, Tiles::WARPGROUPS, Tiles::KEYS, Tiles::WAVE_ROWS, Tiles::BLOCK_ROWS, Tiles::THREADS;
    using typename Tiles::Launch, typename Tiles::Work, typename Tiles::Packing;
    using typename Tiles::Output, typename Tiles::Softmax;
    using typename Tiles::Ring, typename Tiles::QueryRing, typename Tiles::Turn;
    using OutputPlace = typename Products::OutputPlace;
    using Shared = SharedPieceOf<HEAD_DIM, VALUE_DIM>;

    /* The first of this wave's rows, in the block's. It has all columns. */
    static __device__ __forceinline__ int wave_row() { return wave() * WAVE_ROWS; }
    static constexpr int OWN_COLUMNS = VALUE_DIM;
    static __device__ __forceinline__ int first_column(OutputPlace) { return 0; }

    static __device__ __forceinline__ Place place(const Launch &launch, int index) { return launch.order.place(index); }
    static Packing packing_of(const aiter_attention_problem &p) { return Packing(p); }
    static __device__ __forceinline__ Packing packing(const Launch &launch) { return launch.packing; }

    /* ---- host ---- */

    /* How a call's row tiles are cut, on a GPU with so many multiprocessors. */
    static Work work_of(const aiter_attention_problem &p, int64_t tiles, int blocks) {
        return Work(p, tiles, lesser<int64_t>(int64_t(p.seqlen_q) << packing_of(p).bits, BLOCK_ROWS), blocks);
    }
    /* For the counter, and for what pieces leave. Where it is the lengths of padded sequences alone that make row tiles
     * differ, nothing here tells: then there is no counter, and each row tile gets a block of its own. Nor where there are
     * blocks enough. All that on whichever of the machine's GPUs the launch will be, from numbers that are the same
     * whenever a graph of the launch is replayed. */
    static int64_t workspace_bytes(const aiter_attention_problem &p, int64_t tiles) {
        const bool differ = MASKED || p.packed_q || p.packed_k;
        if (!CUT && !differ) return 0;
        return most_of_devices([&](int blocks) {
            const Work work = work_of(p, tiles, blocks);
            return work.workspace_bytes(tiles, blocks, differ && work.count(tiles) > blocks);
        });
    }

    static __device__ __forceinline__ int alignment(const Launch &launch) { return PAGED ? greater(launch.box, 1) : 1; }

    /* add_up: the second kernel, where keys are cut and dealt. share: the one that deals with a SharedPiece, if any. */
    static int start(void (*kernel)(Launch), const aiter_attention_call &call, int64_t tiles, void *stream,
                     void (*add_up)(Launch) = nullptr, void (*share)(Launch) = nullptr) {
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
        const int bits = packing_of(p).bits;
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
        launch.packing = packing_of(p);
        const bool given = t.seqlens_q != nullptr || t.seqlens_k != nullptr || t.starts_q != nullptr ||
                           t.starts_k != nullptr || t.page_indptr != nullptr;
        const bool equal = !MASKED && !given;
        const bool counted = !equal && t.workspace != nullptr && tasks > blocks;
        launch.next = counted ? static_cast<uint32_t *>(t.workspace) : nullptr;
        int failed;
        if (share != nullptr && Shared::takes(launch, tiles, blocks)) {
            failed = Shared::start(share, launch, stream);
        } else {
            const int64_t grid = equal || counted ? lesser<int64_t>(tasks, blocks) : tasks;
            if (counted)
                if (const int failed = aiter::launch(clear_counter, 1, 1, 0, stream, launch.next)) return failed;
            if (counted) failed = launch_next(kernel, grid, THREADS, SHARED_BYTES, stream, launch);
            else failed = aiter::launch(kernel, grid, THREADS, SHARED_BYTES, stream, launch);
        }
        const int64_t additions = launch.work.additions(tiles);
        if (failed || additions == 0 || launch.together > 1) return failed;
        return launch_next(add_up, additions, launch.work.adding_threads(), 0, stream, launch);
    }

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
                Copies::template find_tasks<Task>(launch, shared);
            } else if (role == 3) {
                QueryRing ring = {shared, 0};
#pragma unroll 1
                for (; turn.await(); turn = turn.after()) {
                    const Task tile = turn.template read<Task>();
                    turn.release();
#pragma unroll 1
                    for (ring.warpgroup = 0; ring.warpgroup < WARPGROUPS; ++ring.warpgroup)
                        Copies::copy_queries(launch, tile, ring);
                    ring.advance();
                }
                wait_for_copies();
            } else {
                Ring ring = {shared};
#pragma unroll 1
                for (; turn.await(); turn = turn.after()) {
                    const Task tile = turn.template read<Task>();
                    turn.release();
                    Copies::copy_tiles(launch, tile.sequence, ring, at_least_one(tile.own(tile.keys)), [&] {
                        if (lane() == 0) mbarrier::arrive(shared + ALMOST_DONE_AT);
                    });
                }
                wait_for_copies();
            }
        } else {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(OWN_REGISTERS));
            typename Products::Warpgroup warpgroup(launch, shared);
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
