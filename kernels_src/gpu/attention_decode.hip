/* Attention for few query tokens (decoding): every key and value is read once, by all the query rows that need it, and
 * the reading is spread evenly over the whole GPU.
 *
 * A unit is one KV head of one sequence, with the query heads that share it: rows are (token, head) pairs, and up to
 * PART_ROWS of them take part at once. Its keys come in steps of STEP_KEYS. All steps of all units, by their real
 * lengths, are laid end to end and cut into equal ranges, one for each block that the GPU can hold:
 *
 *     units    |  sequence 0, head 0  |  sequence 0, head 1  | s. 1, head 0 | s. 1, head 1 | ...
 *     ranges   |  block 0    |  block 1    |  block 2    |  block 3    |  block 4    |  ...
 *
 * so whatever the lengths, all blocks have equally much to read. What a block has of a unit it computes like this:
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
 *     at the end       waves of a row tile add up what they have, halving their number through shared memory; the
 *                      first writes it: the whole of a unit to the output, a part of one to the workspace
 *
 * With a window, steps are counted over the keys that any row sees, and pages before them are not looked up. With
 * batch_invariant, every range is one step of INVARIANT_KEYS keys, so that a unit is cut in the same places whatever
 * else there is.
 *
 * A second kernel, merge, adds up the parts of each unit that a cut went through, in the order of the blocks: results
 * do not depend on timing. Nothing here waits for the host or leaves anything behind, so all of it can be captured.
 *
 * An arch may go through the keys of a part in a way of its own: arch/sm90_latent.h does for latent attention.
 *
 * What arch/ *_decode.h provides:
 *   Decode<HEAD_DIM, VALUE_DIM>       ROWS of a row tile, KEYS of a tile, WAVES of a block, BLOCKS of a CU/SM; RUN and
 *                                     LANES; Scores, Output and Queries: as Accumulator and Query in gpu/arch.h, with
 *                                     RUN columns adjacent and a row spread over LANES lanes; leads_row(). TEAM waves
 *                                     (above, a wave) have the same rows and tiles, each COLUMNS columns of O
 *   KeyValueStream<HEAD_DIM, VALUE_DIM, Rows>   (shared, rows, first, group, groups): the tiles group, group + groups,
 *                                               ... from token `first` to the end of rows; advance, scores and
 *                                               accumulate as above. COOPERATIVE: waves fetch tiles for each other, so
 *                                               that all must take part
 */
#include "call_reader.h"
#include "gpu/decode_schedule.h"

namespace aiter {

using Output = Tile::Output;
using Softmax = OnlineSoftmax<Output::SLOTS, Tile::LANES>;
constexpr int SLOTS = Output::SLOTS, RUN = Tile::RUN;
static_assert(!DROPOUT, "dropout is for training: the forward kernel knows it");

/* What a block has of a unit: those of the keys first_key ... end_key - 1 that any row sees. */
struct Piece {
    Schedule::Place place;
    int index; /* of the unit in its sequence */
    int first_key, end_key;
    bool begins, whole; /* is it the unit's beginning; all of it */
    bool again;         /* not the block's first */
};

#if defined(AITER_LATENT)
using Loop = LatentLoop;
#else
/* ---- the loop over a piece's keys ---- */

using Memory = DecodeMemory<HEAD_DIM, VALUE_DIM>;
using Rows = KeyValueRows<PAGED>;
using Stream = Memory::Stream;
using Scores = Tile::Scores;

constexpr int EXCHANGED = Memory::EXCHANGED;

/* The team's tiles among keys first_key ... end-1, for the rows from `wave_row` on. */
__device__ __forceinline__ void attend(const Unit &unit, SharedAddress shared, int first_key, int end, int wave_row,
                                       int group, int groups, const Score &score, Softmax &softmax, Output &o) {
    if (!Stream::COOPERATIVE && wave_row >= unit.rows) return;
    Rows rows = unit.sequence.keys;
    rows.begin = unit.sees(0).low;
    rows.count = end;
    const Unit::Wave<Output, Tile::ROWS> scored_rows(unit, wave_row, end);

    Stream stream(shared, rows, first_key, group, groups);
    Tile::Queries queries;
    queries.load(
        stream.query_memory(),
        [&](int row) { return wave_row + row < unit.rows ? unit.query(wave_row + row) : nullptr; }, score.query_bits);
    /* All waves make the same number of rounds: they may have to meet in each. */
    const int last_step = (end - first_key - 1) / STEP_KEYS;
    for (int tile = group; tile < (last_step + 1) * TEAMS; tile += groups) {
        stream.advance();
        const int first = first_key + tile * KEYS;
        if (first >= end || Stream::COOPERATIVE && wave_row >= unit.rows) continue;
        Scores s;
        stream.scores(queries, s);
        scored_rows.finish(score, s, first);
        softmax.update(s, o);
        stream.accumulate(s, o);
    }
}

/* Adds up what the groups of waves have: those with a higher number hand theirs to those with a lower one. */
__device__ __forceinline__ void add_up(char *shared, int group, int groups, int row_tiles, Softmax &softmax,
                                       Output &o) {
    for (int distance = groups / 2; distance > 0; distance /= 2) {
        barrier();
        const bool gives = group >= distance && group < 2 * distance, takes = group < distance;
        float *box = reinterpret_cast<float *>(shared) +
                     (wave() - (gives ? distance * row_tiles * Tile::TEAM : 0)) * EXCHANGED * WAVE + lane();
        if (gives)
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) {
                float *values = box + slot * (Output::VALUES + 2) * WAVE;
                values[0] = softmax.maximum[slot];
                values[WAVE] = softmax.sum[slot];
#pragma unroll
                for (int i = 0; i < Output::VALUES; ++i) values[(i + 2) * WAVE] = o.get(slot, i);
            }
        barrier();
        if (takes)
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) {
                const float *values = box + slot * (Output::VALUES + 2) * WAVE;
                const float theirs = values[0], next = __builtin_fmaxf(softmax.maximum[slot], theirs);
                const float reference = next == -INFINITE ? 0.0f : next;
                const float a = exp2(softmax.maximum[slot] - reference), b = exp2(theirs - reference);
                softmax.maximum[slot] = next;
                softmax.sum[slot] = softmax.sum[slot] * a + values[WAVE] * b;
#pragma unroll
                for (int i = 0; i < Output::VALUES; ++i)
                    o.set(slot, i, o.get(slot, i) * a + values[(i + 2) * WAVE] * b);
            }
    }
}

struct Loop {
    static constexpr int SHARED_BYTES = Memory::SHARED_BYTES;

    /* Of the columns that a team's wave has. Not by wave(), which all lanes must ask together. */
    static __device__ __forceinline__ int first_column() {
        return Tile::TEAM == 1 ? 0 : thread_in_block() / WAVE % Tile::TEAM * Tile::COLUMNS;
    }

    /* Goes through the block's pieces: for_each_piece(visit) calls visit(unit, piece) for one after the other. Whoever
     * has rows of a result then calls write(piece, first row, softmax, o), in whole waves. */
    template <class Pieces, class Write>
    static __device__ __forceinline__ void run(char *shared, const Score &score, Pieces for_each_piece, Write write) {
        for_each_piece([&](const Unit &unit, const Piece &piece) {
            int row_tiles = 1; /* a power of two, as TEAMS is */
            while (row_tiles * Tile::ROWS < unit.rows) row_tiles *= 2;
            const int team = wave() / Tile::TEAM, groups = TEAMS / row_tiles, group = team / row_tiles;
            const int wave_row = team % row_tiles * Tile::ROWS;
            if (piece.again) barrier(); /* the last unit's use of shared memory is over */
            const auto &scored = unit.sequence.scaled(score);
            Softmax softmax(scored.unit);
            Output o;
            o.clear();
            if (piece.first_key < piece.end_key)
                attend(unit, shared_address(shared), piece.first_key, piece.end_key, wave_row, group, groups, scored,
                       softmax, o);
            add_up(shared, group, groups, row_tiles, softmax, o);
            write(piece, group == 0, wave_row, row_tiles * Tile::ROWS, softmax, o);
        });
    }
};
#endif
static_assert(Loop::SHARED_BYTES <= SHARED_LIMIT, "more shared memory than a block of this arch can have");

/* ---- results ---- */

__device__ __forceinline__ int column_of_lane(int i) { return Loop::first_column() + Output::column_of_lane(i); }

template <class T, int COUNT> struct alignas(sizeof(T) * COUNT) Pack {
    T item[COUNT];
};

/* Writes finished rows: all keys have been seen. */
__device__ __forceinline__ void store(const Unit &unit, int wave_row, const Score &score, Softmax &softmax, Output &o) {
    float log_sum[SLOTS];
    softmax.finish(log_sum);
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
        const int row = wave_row + Output::row(slot);
        const bool sees_keys = unit.sees_keys(row);
        if (!sees_keys) log_sum[slot] = -INFINITE;
        const float inverse = reciprocal(softmax.sum[slot]) * unit.share(row, log_sum[slot]);
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < Output::VALUES; ++i) {
            o.set(slot, i, sees_keys ? o.get(slot, i) * inverse : 0.0f);
            if (column_of_lane(i) < VALUE_DIM) total += o.get(slot, i);
        }
        bool spoiled = false;
        if (MASKED) {
            total = row_sum<Tile::LANES>(total);
            const bool suspect = total != total && __builtin_fabsf(log_sum[slot]) < INFINITE;
            for (uint64_t lanes = ballot(suspect && Tile::leads_row()); lanes != 0; lanes &= lanes - 1) {
                const int bad = from_lane(row, first_lane(lanes));
                if (unit.repair(bad, score, from_lane(log_sum[slot], first_lane(lanes)))) spoiled |= row == bad;
            }
        }
        if (row >= unit.padded_rows) continue;
        if (Tile::leads_row()) unit.store_lse(row, log_sum[slot]);
        if (spoiled) continue;
        Element *to = unit.output(row);
#pragma unroll
        for (int i = 0; i < Output::VALUES; i += RUN) {
            Pack<uint32_t, RUN / 2> run;
#pragma unroll
            for (int j = 0; j < RUN; j += 2) run.item[j / 2] = to_elements(o.get(slot, i + j), o.get(slot, i + j + 1));
            if (column_of_lane(i) < VALUE_DIM)
                *reinterpret_cast<Pack<uint32_t, RUN / 2> *>(to + column_of_lane(i)) = run;
        }
    }
}

__device__ __forceinline__ void store_part(const Unit &unit, const Parts &parts, int place, int wave_row,
                                           Softmax &softmax, const Output &o) {
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
        const int row = wave_row + Output::row(slot);
        const float sum = row_sum<Tile::LANES>(softmax.sum[slot]);
        if (row >= unit.rows) continue;
        float *to = parts.output_row(block(), place, row);
#pragma unroll
        for (int i = 0; i < Output::VALUES; i += RUN) {
            Pack<float, RUN> run;
#pragma unroll
            for (int j = 0; j < RUN; ++j) run.item[j] = o.get(slot, i + j);
            if (column_of_lane(i) < VALUE_DIM) *reinterpret_cast<Pack<float, RUN> *>(to + column_of_lane(i)) = run;
        }
        if (Tile::leads_row())
            *reinterpret_cast<Pack<float, 2> *>(parts.softmax_row(block(), place, row)) = {
                {softmax.maximum[slot], sum}};
    }
}

/* ---- the kernel ---- */

template <class Visit>
__device__ __forceinline__ void for_each_piece(const Arguments &arguments, const Schedule &schedule, Visit visit) {
    const int end = schedule.range_begin(block() + 1), keys_of_step = step_keys(arguments.problem);
    int step = schedule.range_begin(block());
    Schedule::Place place = schedule.find(INT32_MAX, step);

    for (bool again = false; step < end; again = true) {
        const int index = (step - place.begin) / place.steps, unit_begin = place.begin + index * place.steps;
        const int first = step - unit_begin, last = lesser(end - unit_begin, place.steps);
        const Unit unit(reread(arguments), place.batch, index, schedule.parts);
        const int origin = keys_to_read(arguments.problem, unit.sequence.mask).low;
        const int end_key = lesser(unit.rows == 0 ? 0 : unit.sees(unit.rows - 1).high, origin + last * keys_of_step);
        int first_key = origin + first * keys_of_step;
        if (WINDOW) first_key += greater(unit.sees(0).low - first_key, 0) / STEP_KEYS * STEP_KEYS;

        visit(unit, Piece{place, index, first_key, end_key, first == 0, first == 0 && last == place.steps, again});

        step = unit_begin + last;
        if (step == place.begin + place.steps * schedule.units && step < end)
            place = {place.batch + 1, step, schedule.steps_in(place.batch + 1)};
    }
}

__global__ void __launch_bounds__(THREADS, Tile::BLOCKS) attention_decode(const Arguments arguments, int grid) {
    AITER_SHARED(shared, Loop::SHARED_BYTES);
    let_next_start();
    clear_rest(arguments, grid, THREADS);
    const Schedule schedule(arguments, grid);
    if (block() >= schedule.blocks) return;
    const Parts parts(arguments, grid);
    const Score score(arguments.problem);
    Loop::run(
        shared, score, [&](auto visit) { for_each_piece(arguments, schedule, visit); },
        [&](const Piece &piece, bool has_rows, int wave_row, int rows, Softmax &softmax, Output &o) {
            /* The unit once more, so that what only writing needs is not kept through the loop. */
            const Unit written(reread(arguments), opaque_scalar(piece.place.batch), opaque_scalar(piece.index),
                               schedule.parts);
            if (has_rows) {
                if (piece.whole) store(written, wave_row, score, softmax, o);
                else store_part(written, parts, piece.begins, wave_row, softmax, o);
            }
            if (piece.whole) written.clear_padding(rows);
        });
}

/* ---- units that were cut ---- */

constexpr int MERGE_ROWS = 2, MERGE_SLICES = 4, MERGE_WAVES = MERGE_ROWS * MERGE_SLICES;

/* Some rows of one unit; of each row, waves take parts in turn, their lanes dimensions. The grid goes over all units,
 * or over all cuts where those are fewer: then the unit is the one that the cut goes through first. */
__global__ void __launch_bounds__(MERGE_WAVES *WAVE) merge(const Arguments arguments, int grid, int over_units) {
    constexpr int DIMENSIONS = round_up(VALUE_DIM, WAVE) / WAVE; /* of a lane: lane, lane + WAVE, ... */
    __shared__ float sums[MERGE_WAVES][DIMENSIONS * WAVE];
    const Schedule schedule(arguments, grid);
    const Parts parts(arguments, grid);
    const int row_blocks = (parts.rows + MERGE_ROWS - 1) / MERGE_ROWS, item = block() / row_blocks;
    /* Even where there is nothing to merge: whoever comes next on the stream waits for this kernel alone. */
    wait_for_previous();
    if (!over_units && item + 1 >= schedule.blocks) return;
    const int step = over_units ? INT32_MAX : schedule.range_begin(item + 1);
    const Schedule::Place place = schedule.find(over_units ? item / schedule.units : schedule.problem.batch, step);
    const int index = over_units ? item % schedule.units : (step - place.begin) / place.steps;
    const int begin = place.begin + index * place.steps;
    const int first = schedule.block_of(begin), last = schedule.block_of(begin + place.steps - 1);
    if (over_units ? first == last : first != item) return;

    const Unit unit(arguments, place.batch, index, schedule.parts);
    const int row = block() % row_blocks * MERGE_ROWS + wave() / MERGE_SLICES, slice = wave() % MERGE_SLICES;
    const bool sees_keys = unit.sees_keys(row);
    const int count = sees_keys ? last - first + 1 : 0; /* parts: place 1 of the first block, place 0 of the others */

    float maximum = -INFINITE, total = 0.0f;
    for (int i = lane(); i < count; i += WAVE)
        maximum = __builtin_fmaxf(maximum, parts.softmax_row(first + i, i == 0, row)[0]);
#pragma unroll
    for (int distance = 1; distance < WAVE; distance *= 2)
        maximum = __builtin_fmaxf(maximum, from_lane(maximum, lane() ^ distance));
    const float reference = maximum == -INFINITE ? 0.0f : maximum;
    for (int i = lane(); i < count; i += WAVE) {
        const float *part = parts.softmax_row(first + i, i == 0, row);
        total += part[1] * exp2(part[0] - reference);
    }
    total = wave_sum(total);
    const float log_sum = maximum == -INFINITE && total == 0 ? -INFINITE : maximum + log2(total);

    float sum[DIMENSIONS] = {};
#pragma unroll 4
    for (int i = slice; i < count; i += MERGE_SLICES) {
        const float weight = exp2(parts.softmax_row(first + i, i == 0, row)[0] - reference);
        const float *part = parts.output_row(first + i, i == 0, row);
#pragma unroll
        for (int d = 0; d < DIMENSIONS; ++d)
            if (lane() + d * WAVE < VALUE_DIM) sum[d] += weight * part[lane() + d * WAVE];
    }
#pragma unroll
    for (int d = 0; d < DIMENSIONS; ++d) sums[wave()][lane() + d * WAVE] = sum[d];
    barrier();
    if (slice != 0 || row >= unit.padded_rows) return;
    const float share = unit.share(row, log_sum);
    bool spoiled = false;
#pragma unroll
    for (int d = 0; d < DIMENSIONS; ++d) {
        sum[d] = 0.0f;
#pragma unroll
        for (int w = 0; w < MERGE_SLICES; ++w) sum[d] += sums[wave() + w][lane() + d * WAVE];
        if (sees_keys) sum[d] *= reciprocal(total) * share;
        spoiled |= sum[d] != sum[d];
    }
    if (lane() == 0) unit.store_lse(row, log_sum);
    if (MASKED && wave_any(spoiled) && __builtin_fabsf(log_sum) < INFINITE &&
        unit.repair(row, Score(arguments.problem), log_sum))
        return;
#pragma unroll
    for (int d = 0; d < DIMENSIONS; ++d)
        if (lane() + d * WAVE < VALUE_DIM) unit.output(row)[lane() + d * WAVE] = to_element(sum[d]);
}

/* ---- the host's side ---- */

/* What one launch consists of, on a GPU with that many compute units. */
struct Plan {
    int64_t units, steps, grid;
    Plan(const aiter_attention_problem &p, int compute_units) {
        units = static_cast<int64_t>(p.batch) * p.heads_kv * row_parts(p);
        steps = units * steps_of(p, most_keys_to_read(p));
        grid = blocks_for(p, units, steps, static_cast<int64_t>(compute_units) * Tile::BLOCKS);
    }
    bool cuts() const { return grid > 1 && steps > units; } /* may they go through a unit? */
};
inline int compute_units(int device) {
    int count = 0;
    return hipDeviceGetAttribute(&count, hipDeviceAttributeMultiprocessorCount, device) == hipSuccess ? count : 0;
}

} // namespace aiter

AITER_EXPORT void aiter_describe(aiter_description *description) {
    description->abi_version = AITER_ABI_VERSION;
    description->call_bytes = sizeof(aiter_call);
}

/* Enough for whichever of the machine's GPUs the launch will be on. */
AITER_EXPORT int64_t aiter_workspace_bytes(const aiter_call *call) {
    int devices = 0, most = 0;
    if (hipGetDeviceCount(&devices) != hipSuccess) return 0;
    for (int device = 0; device < devices; ++device) {
        const int count = aiter::compute_units(device);
        if (count > most) most = count;
    }
    const aiter::Plan plan(call->problem, most);
    return plan.cuts() ? aiter::Parts::bytes(call->problem, plan.grid) : 0;
}

AITER_EXPORT int aiter_launch(const aiter_call *call, void *stream) {
    const aiter_attention_problem &problem = call->problem;
    if (const int error = aiter::check_problem(problem)) return error;
    int device = 0;
    if (const int error = hipGetDevice(&device)) return error;
    const aiter::Plan plan(problem, aiter::compute_units(device));
    if (plan.steps >= INT32_MAX) return aiter::LAUNCH_TOO_MANY_STEPS;
    const int grid = static_cast<int>(plan.grid);
    if (const int error = aiter::launch(aiter::attention_decode, grid, aiter::THREADS, aiter::Loop::SHARED_BYTES,
                                        stream, *call, grid))
        return error;
    if (!plan.cuts()) return 0;
    const int over_units = plan.units < grid - 1;
    const int64_t row_blocks = (aiter::rows_of_unit(problem) + aiter::MERGE_ROWS - 1) / aiter::MERGE_ROWS;
    return aiter::launch_next(aiter::merge, (over_units ? plan.units : grid - 1) * row_blocks,
                              aiter::MERGE_WAVES * aiter::WAVE, 0, stream, *call, grid, over_units);
}

AITER_EXPORT const char *aiter_error_text(int code) { return aiter::error_text(code); }
