/* Attention for few query tokens (decoding): every key and value is read once, by all the query rows that need it, and
 * the reading is spread evenly over the whole GPU.
 *
 * A unit is one KV head of one sequence, with the query heads that share it: rows are (token, head) pairs, and up to
 * PART_ROWS of them take part at once. Its keys come in steps of STEP_KEYS. The steps of one head in all sequences, by
 * their real lengths, are laid end to end, and each such line is cut into equal ranges, one for each block that the GPU
 * can hold:
 *
 *     head 0   |  sequence 0  | s. 1 |   sequence 2   | ...    |  sequence 0 ...          head 1
 *     ranges   |  range 0   |  range 1   |  range 2   | ...    |  range 0   |  range 1 ...
 *
 * so whatever the lengths, all blocks have equally much to read, and blocks that run side by side read the same tokens
 * for one head each: where these lie side by side in memory, it opens a page once for all of them. Where no block has
 * much more to do for it, units are not cut, or into equal parts; all blocks find that out from the lengths, alike. What
 * a block has of a unit it computes like this:
 *
 *     a step         tile 0   tile 1   tile 2   tile 3  | next step ...    A tile is KEYS tokens of K and V. With one
 *     row tile 0     wave 0   wave 1   wave 2   wave 3  |                  row tile each wave takes every fourth tile;
 *                                                                          with more, waves are dealt to row tiles.
 *     where it lives   registers: Q, S/P of one tile, O, maximum and sum of each row, of this wave's tiles
 *                      on their way (registers or shared memory, see arch/ *_decode.h): the next tiles
 *     each tile        advance     the next tile has arrived; a later one sets off
 *                      scores      S = Q K^T
 *                      finish      what score.h does to them: normally nothing
 *                      hide        only where an edge of what the rows see cuts the tile
 *                      update      P = exp2(S - max)
 *                      accumulate  O += P V
 *     at the end       waves of a row tile add up what they have, halving their number through shared memory (a single
 *                      row tile of sm_90a: at once, see Results::row_tile); the first writes it: the whole of a unit to
 *                      the output, a part of one to the workspace
 *
 * With a window, steps are counted over the keys that any row sees, and pages before them are not looked up. With
 * batch_invariant, every range is one step of INVARIANT_KEYS keys, so that a unit is cut in the same places whatever
 * else there is.
 *
 * Parts of a unit that was cut are added up in the order of the ranges, whoever does it: results do not depend on
 * timing. Nothing here waits for the host or leaves anything behind, so all of it can be captured.
 *
 *     by a second kernel, merge     any arch
 *     by the last of its blocks     sm_90a, few rows in few parts: who it is, a counter in memory tells
 *     by the blocks of a cluster    sm_90a, few rows and few units of equal length: each unit has a cluster of its own,
 *                                   whose blocks hand their parts to each other through shared memory
 *
 * An arch may go through the keys of a part in a way of its own: arch/sm90_decode.h does up to 256 dimensions,
 * arch/sm90_latent.h for latent attention.
 *
 * What arch/ *_decode.h provides:
 *   Decode<HEAD_DIM, VALUE_DIM>       ROWS of a row tile, KEYS of a tile, WAVES of a block, BLOCKS of a CU/SM; RUN and
 *                                     LANES; Scores, Output and Queries: as Accumulator and Query in gpu/arch.h, with
 *                                     RUN columns adjacent and a row spread over LANES lanes; leads_row(). TEAM waves
 *                                     (above, a wave) have the same rows and tiles, each COLUMNS columns of O
 *   KeyValueStream<HEAD_DIM, VALUE_DIM, Rows>   (shared, rows, first, group, groups): the tiles group, group + groups,
 *                                               ... from token `first` to the end of rows; advance, scores and
 *                                               accumulate as above. COOPERATIVE: waves fetch tiles for each other, so
 *                                               that all must take part, and advance; else scores and accumulate
 *                                               have the next tile set off, if there is `more`
 */
#include "call_reader.h"
#include "gpu/decode_results.h"

namespace aiter {

/* Visits the pieces of a range. Returns whether there were any, of this one or before. */
template <class Visit>
__device__ __forceinline__ bool for_each_piece_of(int range, const Arguments &arguments, const Schedule &schedule,
                                                  bool again, Visit visit) {
    const int keys_of_step = step_keys(arguments.problem);
    int step, end;
    Schedule::Place place;
    if (schedule.cluster > 1) {
        place = schedule.own_unit();
        const Range own = schedule.own_steps(place.steps);
        step = own.low, end = own.high;
    } else {
        const auto [line, index] = schedule.range_of(range);
        step = schedule.range_begin(line, index);
        end = schedule.range_begin(line, index + 1);
        if (step >= end) return again;
        place = schedule.lines() == 1 ? schedule.find(step) : schedule.find(step, line);
        range = line * schedule.ranges + index;
    }

    for (;;) {
        const int lead = schedule.led(), all = place.steps - lead;
        const int first = greater(step - place.begin - lead, 0), last = lesser(end - place.begin - lead, all);
        if (lead == 0 || last > 0) {
            const Unit unit(reread(arguments), place.batch, place.index, schedule);
            const int origin = keys_to_read(arguments.problem, unit.sequence.mask).low;
            int end_key = lesser(unit.rows == 0 ? 0 : unit.sees(unit.rows - 1).high, origin + last * keys_of_step);
            int first_key = origin + first * keys_of_step;
            if (WINDOW) {
                /* With batch_invariant by so many that the piece's rest is dealt out as all of it was: a unit may begin with
                 * the rows of another token. */
                const int low = unit.sees(0).low, passed = arguments.problem.batch_invariant ? ROUND_KEYS : STEP_KEYS;
                first_key += greater(low - first_key, 0) / passed * passed;
                if (low >= end_key) end_key = 0; /* all rows are past the last key: there is no page to look up */
            }

            const bool whole = first == 0 && last == all && schedule.cluster == 1;
            visit(unit, Piece{place, range, unit.rows, first_key, end_key, first == 0, whole, again});
            again = true;
        }
        step = place.begin + lead + last;
        if (step >= end) return again;
        place = schedule.after(place);
    }
}

/* A block's pieces: pieces(visit) calls visit(unit, piece). */
struct Pieces {
    const Arguments &arguments;
    const Schedule &schedule;

    /* A block has one range; with batch_invariant, where each step is one and has sums of its own, it may have several,
     * and copies of the next go on while the last of one is used. */
    template <class Visit> __device__ __forceinline__ void operator()(Visit visit) const {
        bool again = false;
#pragma unroll 1
        for (int range = block(); range < schedule.blocks; range += schedule.at_once)
            again = for_each_piece_of(range, arguments, schedule, again, visit);
    }
    /* Where units are plain: visit(batch, KV head, first key, end) for each piece. To find out all about a unit takes 250
     * instructions more, while nothing is on its way to the block. */
    template <class Visit> __device__ __forceinline__ void keys_alone(Visit visit) const {
        const int steps = schedule.unit_steps;
        int batch, head, step, end; /* steps of the unit */
        if (schedule.cluster > 1) {
            const Schedule::Place place = schedule.own_unit();
            const Range own = schedule.own_steps(steps);
            batch = place.batch, head = place.index, step = own.low, end = own.high;
        } else {
            const auto [line, index] = schedule.range_of(block());
            const int begin = schedule.range_begin(line, index);
            head = schedule.lines() == 1 ? begin / schedule.length : line;
            batch = schedule.by_steps.quotient(begin - head * schedule.length);
            const int unit_begin = head * schedule.length + batch * steps;
            step = begin - unit_begin;
            end = schedule.range_begin(line, index + 1) - unit_begin;
        }
#pragma unroll 1
        for (; step < end; step = 0, end -= steps) {
            visit(batch, head, step * STEP_KEYS, lesser(arguments.problem.seqlen_k, lesser(end, steps) * STEP_KEYS));
            if (++batch == arguments.problem.batch) batch = 0, ++head;
        }
    }
};

/* Where results go. */
struct Results {
    const Loop::Launch &launch;
    const Schedule &schedule;
    const Parts &parts;
    const Score &score;
    char *shared;

    /* The unit once more, so that what only writing needs is not kept through the loop. */
    __device__ __forceinline__ Unit unit_of(const Piece &piece) const {
        const Arguments &arguments = launch;
        return Unit(reread(arguments), opaque_scalar(piece.place.batch), opaque_scalar(piece.place.index), schedule);
    }
    /* By all waves that write, of which some have rows that all keys of the piece are in; there are `rows` in all. */
    __device__ __forceinline__ void operator()(const Piece &piece, bool has_rows, int wave_row, int rows,
                                               Softmax &softmax, Output &o) const {
        if (piece.whole) {
            const Unit unit = unit_of(piece);
            if (has_rows) store(unit, wave_row, score, softmax, o);
            unit.clear_padding(rows, Loop::WRITERS);
            return;
        }
        if (has_rows) {
            store_part(
                piece.rows, wave_row, softmax, o,
                [&](int row) { return parts.output_row(piece.range, piece.begins, row); },
                [&](int row) { return parts.softmax_row(piece.range, piece.begins, row); });
        }
#if defined(AITER_RING)
        if (launch.arrived != nullptr) merge_as_last(unit_of(piece), launch, schedule, parts, piece.place, shared);
#endif
    }
#if defined(AITER_RING)
    /* By all readers, of which the first `groups` have some of the keys each, for all rows. */
    __device__ __forceinline__ void row_tile(const Piece &piece, int group, int groups, Softmax &softmax,
                                             Output &o) const {
        char *memory = shared + Loop::EXCHANGE_AT;
        const auto meet = [] { Loop::meet_readers(); };
        const Unit unit = unit_of(piece);
        const bool few = unit.rows <= Tile::ROWS / 2;
        const int left = few ? Loop::READERS : Loop::READERS / 2; /* parts for which there is room */
        add_up(memory, group, groups, 1, softmax, o, meet, left);
        groups = lesser(groups, left);
        const NearParts waves = {reinterpret_cast<float *>(memory), few ? Tile::ROWS / 2 : Tile::ROWS};
        meet(); /* nobody needs the queries any more */
        if (group < groups)
            store_part(
                unit.rows, 0, softmax, o, [&](int row) { return waves.output_row(group, row); },
                [&](int row) { return waves.softmax_row(group, row); });
        meet();
        if (launch.cluster > 1) return share_in_cluster(unit, shared, waves, groups, launch.cluster);
        const int rows = piece.whole ? lesser(unit.padded_rows, Tile::ROWS) : unit.rows;
#pragma unroll 1
        for (int row = wave(); row < rows; row += Loop::READERS) {
            const bool sees_keys = unit.sees_keys(row);
            NearRow sum = NearRow::of<Loop::READERS>(waves, row < unit.rows ? groups : 0, row);
            if (piece.whole) store_row(unit, row, sees_keys, sum.maximum, sum.total, sum.sum);
            else
                sum.store_part(parts.output_row(piece.range, piece.begins, row),
                               parts.softmax_row(piece.range, piece.begins, row));
        }
        if (piece.whole) unit.clear_padding(Tile::ROWS, Loop::WRITERS);
        else if (launch.arrived != nullptr) merge_as_last(unit, launch, schedule, parts, piece.place, shared);
    }
#endif
};

__global__ void __launch_bounds__(THREADS, Tile::BLOCKS)
    attention_decode(const AITER_GRID_CONSTANT Loop::Launch launch, const Cuts cuts, int grid) {
    const Arguments &arguments = launch;
    AITER_SHARED(shared, Loop::SHARED_BYTES);
    let_next_start();
#if defined(AITER_RING)
    Loop::prepare(launch, shared);
#endif
    wait_for_previous();
    clear_rest(arguments, cuts.at_once, THREADS);
    const Schedule schedule(arguments, cuts, grid);
    if (block() >= schedule.blocks) return;
    const Parts parts(arguments, grid);
    const Score score(arguments.problem);
    Loop::run(launch, shared, score, Pieces{arguments, schedule}, Results{launch, schedule, parts, score, shared});
}

/* ---- units that were cut, in a kernel of its own ---- */

constexpr int MERGE_WAVES = 8, MERGE_BLOCKS = 2; /* of a CU/SM; more, and nvcc spares registers */

/* `rows` of one unit. The grid goes over all units, or over all cuts where those are fewer: then the unit is the one
 * that the cut goes through first. */
__global__ void __launch_bounds__(MERGE_WAVES *WAVE, MERGE_BLOCKS)
    merge(const Arguments arguments, const Cuts cuts, int grid, int over_units, int rows) {
    __shared__ MergeSums sums[MERGE_WAVES];
    if (cuts.length == 0) wait_for_previous(); /* lengths may be from a kernel that the one before waits for */
    const Schedule schedule(arguments, cuts, grid);
    /* Even where there is nothing to merge: whoever comes next on the stream waits for this kernel alone. */
    if (schedule.whole) return wait_for_previous();
    const Parts parts(arguments, grid);
    const int row_blocks = (parts.rows + rows - 1) / rows, item = block() / row_blocks;
    const bool exists = over_units || item + 1 < schedule.blocks;
    const int batches = schedule.problem.batch;
    const Schedule::Place place = over_units ? schedule.unit(item % batches, item / batches)
                                             : schedule.find(exists ? schedule.range_begin(item + 1) : 0);
    const int first = schedule.first_range(place), last = schedule.last_range(place);
    wait_for_previous(); /* before the unit: what it reads may be from before that kernel, too */
    const Unit unit(arguments, place.batch, place.index, schedule);
    if (!exists || first == last || !over_units && first != item) return;
    merge_rows<MERGE_WAVES>(unit, PartsOfBlocks{parts, first}, last - first + 1, block() % row_blocks * rows, rows,
                            sums, [] { barrier(); });
}

/* ---- the host's side ---- */

/* What one launch consists of, on a GPU with that many compute units. */
struct Plan {
    int64_t units, steps, grid;
    int at_once; /* blocks of the launch */
    bool cuts;   /* may a block's range begin or end within a unit? */
    int cluster; /* see cluster_of */
    Plan(const aiter_attention_problem &p, bool alike, int compute_units) {
        units = static_cast<int64_t>(p.batch) * p.heads_kv * row_parts(p);
        steps = units * steps_of(p, most_keys_to_read(p));
        const Deal<int64_t> deal(p, row_parts(p), steps, static_cast<int64_t>(compute_units) * Tile::BLOCKS);
        grid = deal.blocks;
        const bool whole = alike && ranges_of_unit(p, deal, steps, steps_of(p, most_keys_to_read(p))) == 1;
        cuts = grid > 1 && steps > units && !whole;
        cluster = cluster_of(p, alike, steps, units, static_cast<int64_t>(compute_units) * Tile::BLOCKS);
        if (cluster > 0) grid = cluster * units, cuts = false;
        const int64_t most = p.batch_invariant ? int64_t(compute_units) * Tile::BLOCKS : grid;
        at_once = static_cast<int>(lesser(grid, most));
    }
};

} // namespace aiter

AITER_EXPORT void aiter_describe(aiter_description *description) {
    description->abi_version = AITER_ABI_VERSION;
    description->call_bytes = sizeof(aiter_call);
}

/* Enough for whichever of the machine's GPUs the launch will be on. */
AITER_EXPORT int64_t aiter_workspace_bytes(const aiter_call *call) {
    int devices = 0;
    int64_t most = 0;
    if (hipGetDeviceCount(&devices) != hipSuccess) return 0;
    for (int device = 0; device < devices; ++device) {
        const aiter::Plan plan(call->problem, false, aiter::compute_units(device));
        if (plan.cuts) most = aiter::greater(most, aiter::Parts::bytes(call->problem, plan.grid));
    }
    return most;
}

AITER_EXPORT int aiter_launch(const aiter_call *call, void *stream) {
    const aiter_attention_problem &problem = call->problem;
    if (const int error = aiter::check_problem(problem)) return error;
    int device = 0;
    if (const int error = hipGetDevice(&device)) return error;
    const int compute_units = aiter::compute_units(device);
    if (compute_units == 0) return aiter::LAUNCH_NO_COMPUTE_UNITS;
    const aiter::Plan plan(problem, aiter::all_alike(call->tensors), compute_units);
    if (plan.steps >= INT32_MAX) return aiter::LAUNCH_TOO_MANY_STEPS;
    if (plan.grid == 0) return 0;
    const int grid = static_cast<int>(plan.grid);
    const aiter::Cuts cuts(problem, call->tensors, grid, aiter::greater(plan.cluster, 1), plan.at_once);
#if defined(AITER_RING)
    if (plan.cluster > 1)
        return aiter::launch_next_in_clusters(plan.cluster, aiter::attention_decode, grid, aiter::THREADS,
                                              aiter::Loop::SHARED_BYTES, stream,
                                              aiter::Loop::launch_of(*call, plan.cluster, nullptr), cuts, grid);
    /* Few rows in few parts: the last of a unit's blocks adds up. More of either would keep one block busy for longer than
     * a kernel takes. (On an H200 11 parts take 0.97 of the kernel's time, 16 take 1.4 times, 33 to 132 up to 1.5 times.) */
    if (plan.cuts && aiter::rows_of_unit(problem) <= aiter::Tile::ROWS && plan.grid <= 12 * plan.units &&
        !problem.batch_invariant) {
        uint32_t *arrived = aiter::Parts::counters(*call, plan.grid);
        if (const int error = aiter::launch_next(aiter::clear_arrived, 1, 256, 0, stream, arrived, grid)) return error;
        return aiter::launch_next(aiter::attention_decode, grid, aiter::THREADS, aiter::Loop::SHARED_BYTES, stream,
                                  aiter::Loop::launch_of(*call, 1, arrived), cuts, grid);
    }
#endif
    if (const int error =
            aiter::launch_next(aiter::attention_decode, plan.at_once, aiter::THREADS, aiter::Loop::SHARED_BYTES, stream,
                               aiter::Loop::launch_of(*call, 1, nullptr), cuts, grid))
        return error;
    if (!plan.cuts) return 0;
    const int over_units = plan.units < grid - 1;
    /* One row a block, and more where not all blocks would find a place at one time: each has its unit to find, four
     * or five loads one after the other. */
    const int64_t items = over_units ? plan.units : grid - 1, unit_rows = aiter::rows_of_unit(problem);
    int rows = 1;
    const auto blocks = [&] { return items * ((unit_rows + rows - 1) / rows); };
    while (rows < unit_rows && blocks() > compute_units * aiter::MERGE_BLOCKS) rows *= 2;
    return aiter::launch_next(aiter::merge, blocks(), aiter::MERGE_WAVES * aiter::WAVE, 0, stream, *call, cuts, grid,
                              over_units, rows);
}

AITER_EXPORT const char *aiter_error_text(int code) { return aiter::error_text(code); }
