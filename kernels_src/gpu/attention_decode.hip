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
 *                      update      P = exp2(S - max)
 *                      accumulate  O += P V
 *     at the end       waves of a row tile add up what they have, halving their number through shared memory; the
 *                      first writes it: the whole of a unit to the output, a part of one to the workspace
 *
 * A second kernel, merge, adds up the parts of each unit that a cut went through, in the order of the blocks: results do
 * not depend on timing. Nothing here waits for the host or leaves anything behind, so all of it can be captured.
 *
 * What arch/ *_decode.h provides:
 *   Decode<HEAD_DIM>                  ROWS of a row tile, KEYS of a tile, WAVES of a block, BLOCKS of a CU/SM; RUN and
 *                                     LANES; Scores, Output and Queries: as Accumulator and Query in gpu/arch.h, with
 *                                     RUN columns adjacent and a row spread over LANES lanes; leads_row()
 *   KeyValueStream<HEAD_DIM, Rows>    (shared, rows, first, group, groups): the tiles group, group + groups, ... from
 *                                     token `first` to the end of rows; advance, scores and accumulate as above
 */
#if defined(__HIP__)
#include "gpu/arch/gfx9_decode.h"
#else
#include "gpu/arch/sm80_decode.h"
#endif
#include "gpu/softmax.h"

#ifndef AITER_PAGED
#define AITER_PAGED 0
#endif

namespace aiter {

constexpr int HEAD_DIM = AITER_HEAD_DIM;
constexpr bool CAUSAL = AITER_CAUSAL, PAGED = AITER_PAGED;
using Shape_ = Decode<HEAD_DIM>;
using Problem = Sequence<CAUSAL, PAGED>;
using Rows = KeyValueRows<PAGED>;
using Stream = KeyValueStream<HEAD_DIM, Rows>;
using Scores = Shape_::Scores;
using Output = Shape_::Output;
using Softmax = OnlineSoftmax<Output::SLOTS, Shape_::LANES>;
constexpr int KEYS = Shape_::KEYS, WAVES = Shape_::WAVES, THREADS = WAVES * WAVE;
constexpr int STEP_KEYS = WAVES * KEYS, PART_ROWS = WAVES * Shape_::ROWS;
constexpr int SLOTS = Output::SLOTS, RUN = Shape_::RUN;

constexpr int EXCHANGED = SLOTS * (Output::VALUES + 2); /* floats of a lane: O, maximum, sum */
constexpr int EXCHANGE_BYTES = WAVES / 2 * EXCHANGED * WAVE * 4;
constexpr int SHARED_BYTES = Stream::SHARED_BYTES > EXCHANGE_BYTES ? Stream::SHARED_BYTES : EXCHANGE_BYTES;

/* A unit is not cut into parts smaller than this many steps, on average: merging would cost more than it gains. */
constexpr int LEAST_STEPS = 4;

/* ---- who reads what ---- */

__host__ __device__ inline int row_parts(const aiter_attention_problem &p) { /* of a unit: units of their own */
    const int64_t rows = static_cast<int64_t>(p.seqlen_q) * (p.heads_q / p.heads_kv);
    return static_cast<int>((rows + PART_ROWS - 1) / PART_ROWS);
}
__host__ __device__ inline int part_rows(const aiter_attention_problem &p) {
    const int64_t rows = static_cast<int64_t>(p.seqlen_q) * (p.heads_q / p.heads_kv);
    return static_cast<int>(rows < PART_ROWS ? rows : PART_ROWS);
}
/* Steps of a unit with this many keys: at least one, which writes the output where there is nothing to read. */
__host__ __device__ inline int steps_of(int keys) { return keys > STEP_KEYS ? (keys - 1) / STEP_KEYS + 1 : 1; }

/* How many blocks share the steps. */
__host__ __device__ inline int64_t blocks_for(int64_t units, int64_t steps, int64_t most) {
    const int64_t useful = steps / LEAST_STEPS > units ? steps / LEAST_STEPS : units;
    return useful < most ? useful : most;
}

struct Schedule {
    const aiter_attention_problem &problem;
    const int32_t *lengths; /* null: all alike */
    int units;              /* of a sequence */
    int64_t steps, blocks;  /* of all sequences; that have a range of them */

    struct Place {          /* of a step */
        int batch;
        int64_t begin;      /* first step of this sequence */
        int steps;          /* of each of its units */
    };

    __device__ __forceinline__ Schedule(const Arguments &a, int grid)
        : problem(a.problem), lengths(a.tensors.seqlens_k), units(problem.heads_kv * row_parts(problem)) {
        steps = find(INT64_MAX).begin;
        blocks = blocks_for(static_cast<int64_t>(problem.batch) * units, steps, grid);
    }
    __device__ __forceinline__ int64_t range_begin(int block) const { return steps * block / blocks; }
    __device__ __forceinline__ int block_of(int64_t step) const { /* the last whose range begins no later */
        return static_cast<int>(((step + 1) * blocks - 1) / steps);
    }
    __device__ __forceinline__ int steps_in(int batch) const {
        return steps_of(lengths == nullptr ? problem.seqlen_k : clamp(lengths[batch], 0, problem.seqlen_k));
    }
    /* By a whole wave. Past the last step: one sequence further, which begins where all end. */
    __device__ __forceinline__ Place find(int64_t step) const {
        if (lengths == nullptr) {
            const int alike = steps_of(problem.seqlen_k);
            const int64_t batch = lesser(step / (static_cast<int64_t>(alike) * units), int64_t(problem.batch));
            return {static_cast<int>(batch), batch * alike * units, alike};
        }
        int64_t begin = 0;
        for (int base = 0; base < problem.batch; base += WAVE) {
            const int batch = base + lane();
            const int own = batch < problem.batch ? steps_in(batch) : 0;
            int sum = own; /* of the sequences base ... batch: no more than 2^31 / STEP_KEYS for each lane */
#pragma unroll
            for (int distance = 1; distance < WAVE; distance *= 2) {
                const int other = from_lane(sum, (lane() - distance) & (WAVE - 1));
                if (lane() >= distance) sum += other;
            }
            const uint64_t beyond = ballot(step < begin + static_cast<int64_t>(sum) * units);
            if (beyond != 0) {
                const int found = first_lane(beyond), found_steps = uniform(from_lane(own, found));
                begin += static_cast<int64_t>(uniform(from_lane(sum, found)) - found_steps) * units;
                return {base + found, begin, found_steps};
            }
            begin += static_cast<int64_t>(uniform(from_lane(sum, WAVE - 1))) * units;
        }
        return {problem.batch, begin, 1};
    }
};

/* Parts of units in the workspace: block b has two places, 0 for a unit that began before its range and 1 for one that
 * goes on after it. Output not yet divided by the sum, in fp32; maximum and sum of each row. */
struct Parts {
    float *output, *softmax;
    int rows;
    __host__ __device__ static int64_t bytes(int64_t blocks, int rows) {
        return blocks * 2 * rows * (HEAD_DIM + 2) * static_cast<int64_t>(sizeof(float));
    }
    __device__ __forceinline__ Parts(const Arguments &a, int grid) : rows(part_rows(a.problem)) {
        output = static_cast<float *>(a.tensors.workspace);
        softmax = output + static_cast<int64_t>(grid) * 2 * rows * HEAD_DIM;
    }
    __device__ __forceinline__ float *output_row(int block, int place, int row) const {
        return output + ((block * int64_t(2) + place) * rows + row) * HEAD_DIM;
    }
    __device__ __forceinline__ float *softmax_row(int block, int place, int row) const {
        return softmax + ((block * int64_t(2) + place) * rows + row) * 2;
    }
};

/* A unit: rows of the query that share a KV head. Row r is query token r / group of head first_head + r % group. */
struct Unit {
    const Arguments &arguments;
    int batch, group, first_head;
    Problem sequence; /* of the first head */
    int first_row, rows, padded_rows; /* of this part of the rows; padded_rows are written */

    __device__ __forceinline__ Unit(const Arguments &a, int batch, int index, int parts)
        : arguments(a), batch(batch), group(a.problem.heads_q / a.problem.heads_kv), first_head(index / parts * group),
          sequence(a, batch, first_head), first_row(index % parts * PART_ROWS),
          rows(clamp(sequence.rows * group - first_row, 0, PART_ROWS)),
          padded_rows(clamp(sequence.padded_rows * group - first_row, 0, PART_ROWS)) {}

    /* Here rows count from the first of this part. */
    __device__ __forceinline__ int token(int row) const { return (first_row + row) / group; }
    __device__ __forceinline__ int head(int row) const { return (first_row + row) % group; }
    __device__ __forceinline__ int visible(int row) const { return sequence.visible(token(row)); }
    __device__ __forceinline__ const Element *query(int row) const {
        return sequence.query + token(row) * sequence.query_stride + head(row) * arguments.problem.query_strides[2];
    }
    __device__ __forceinline__ Element *output(int row) const {
        return sequence.output + token(row) * sequence.output_stride + head(row) * arguments.problem.output_strides[2];
    }
    __device__ __forceinline__ void store_lse(int row, float log_sum) const {
        if (sequence.lse != nullptr)
            sequence.lse[head(row) * arguments.problem.lse_strides[1] + token(row)] = log_sum * LN_2;
    }
    /* A row that is NaN though its log-sum-exp is finite: was it a masked value, 0 * inf in a matrix product? By a whole
     * wave, for one row; true if the row was then computed again and stored. */
    __device__ __forceinline__ bool repair(int row, float log_sum) const {
        const Problem own(arguments, batch, first_head + head(row));
        const bool masked = values_not_finite<HEAD_DIM>(own, own.visible(token(row)), own.keys.count);
        if (masked) exact_row<HEAD_DIM>(own, token(row), arguments.problem.softmax_scale * LOG2_E, log_sum);
        return masked;
    }
};

/* ---- one unit, or a part of it ---- */

/* -inf for the keys of the tile beginning at `first` that a row does not see: those from `limit` on. */
__device__ __forceinline__ void mask_from(Scores &s, const int (&limit)[SLOTS], int first) {
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
        const int seen = limit[slot] - first - Scores::lane_column();
#pragma unroll
        for (int i = 0; i < Scores::VALUES; ++i)
            /* opaque: for else the selection is moved out of the branch that spares most tiles of it */
            s.set(slot, i, opaque(Scores::column(i) < seen ? s.get(slot, i) : -INFINITE));
    }
}

/* The wave's tiles among keys first_key ... end-1, for the rows from `wave_row` on. */
__device__ __forceinline__ void attend(const Unit &unit, SharedAddress shared, int first_key, int end, int wave_row,
                                       int group, int groups, bool negate, Softmax &softmax, Output &o) {
    Rows rows = unit.sequence.keys;
    rows.count = end;
    int limit[SLOTS]; /* keys that a row sees */
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
        const int row = wave_row + Output::row(slot);
        limit[slot] = CAUSAL && row < unit.rows ? lesser(unit.visible(row), end) : end;
    }
    const int all_see = CAUSAL && wave_row < unit.rows ? lesser(unit.visible(wave_row), end) : end;

    Stream stream(shared, rows, first_key, group, groups);
    Shape_::Queries queries;
    queries.load(stream.query_memory(),
                 [&](int row) { return wave_row + row < unit.rows ? unit.query(wave_row + row) : nullptr; }, negate);
    /* All waves make the same number of rounds: they may have to meet in each. */
    const int last_step = (end - first_key - 1) / STEP_KEYS;
    for (int tile = group; tile < (last_step + 1) * WAVES; tile += groups) {
        stream.advance();
        const int first = first_key + tile * KEYS;
        if (first >= end) continue;
        Scores s;
        stream.scores(queries, s);
        if (first + KEYS > all_see) mask_from(s, limit, first);
        softmax.update(s, o);
        stream.accumulate(s, o);
    }
}

/* Adds up what the groups of waves have: those with a higher number hand theirs to those with a lower one. */
__device__ __forceinline__ void add_up(char *shared, int group, int groups, int row_tiles, Softmax &softmax, Output &o) {
    for (int distance = groups / 2; distance > 0; distance /= 2) {
        barrier();
        const bool gives = group >= distance && group < 2 * distance, takes = group < distance;
        float *box = reinterpret_cast<float *>(shared) +
                     (wave() - (gives ? distance * row_tiles : 0)) * EXCHANGED * WAVE + lane();
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

template <class T, int COUNT> struct alignas(sizeof(T) * COUNT) Pack {
    T item[COUNT];
};

/* Writes finished rows: all keys have been seen. */
__device__ __forceinline__ void store(const Unit &unit, int wave_row, Softmax &softmax, Output &o) {
    float log_sum[SLOTS];
    softmax.finish(log_sum);
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
        const int row = wave_row + Output::row(slot);
        const bool sees_keys = row < unit.rows && unit.visible(row) > 0;
        if (!sees_keys) log_sum[slot] = -INFINITE;
        const float inverse = reciprocal(softmax.sum[slot]);
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < Output::VALUES; ++i) {
            o.set(slot, i, sees_keys ? o.get(slot, i) * inverse : 0.0f);
            if (Output::column_of_lane(i) < HEAD_DIM) total += o.get(slot, i);
        }
        bool spoiled = false;
        if (CAUSAL) {
            total = row_sum<Shape_::LANES>(total);
            const bool suspect = total != total && __builtin_fabsf(log_sum[slot]) < INFINITE;
            for (uint64_t lanes = ballot(suspect && Shape_::leads_row()); lanes != 0; lanes &= lanes - 1) {
                const int bad = from_lane(row, first_lane(lanes));
                if (unit.repair(bad, from_lane(log_sum[slot], first_lane(lanes)))) spoiled |= row == bad;
            }
        }
        if (row >= unit.padded_rows) continue;
        if (Shape_::leads_row()) unit.store_lse(row, log_sum[slot]);
        if (spoiled) continue;
        Element *to = unit.output(row);
#pragma unroll
        for (int i = 0; i < Output::VALUES; i += RUN) {
            Pack<uint32_t, RUN / 2> run;
#pragma unroll
            for (int j = 0; j < RUN; j += 2) run.item[j / 2] = to_elements(o.get(slot, i + j), o.get(slot, i + j + 1));
            if (Output::column_of_lane(i) < HEAD_DIM) *reinterpret_cast<Pack<uint32_t, RUN / 2> *>(to + Output::column_of_lane(i)) = run;
        }
    }
}

__device__ __forceinline__ void store_part(const Unit &unit, const Parts &parts, int place, int wave_row,
                                           Softmax &softmax, const Output &o) {
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
        const int row = wave_row + Output::row(slot);
        const float sum = row_sum<Shape_::LANES>(softmax.sum[slot]);
        if (row >= unit.rows) continue;
        float *to = parts.output_row(block(), place, row);
#pragma unroll
        for (int i = 0; i < Output::VALUES; i += RUN) {
            Pack<float, RUN> run;
#pragma unroll
            for (int j = 0; j < RUN; ++j) run.item[j] = o.get(slot, i + j);
            if (Output::column_of_lane(i) < HEAD_DIM) *reinterpret_cast<Pack<float, RUN> *>(to + Output::column_of_lane(i)) = run;
        }
        if (Shape_::leads_row())
            *reinterpret_cast<Pack<float, 2> *>(parts.softmax_row(block(), place, row)) = {{softmax.maximum[slot], sum}};
    }
}

__global__ void __launch_bounds__(THREADS, Shape_::BLOCKS) attention_decode(const Arguments arguments, int grid) {
    AITER_SHARED(shared, SHARED_BYTES);
    const Schedule schedule(arguments, grid);
    if (block() >= schedule.blocks) return;
    const Parts parts(arguments, grid);
    const Scale scale(arguments.problem.softmax_scale);
    const int64_t end = schedule.range_begin(block() + 1);
    int64_t step = schedule.range_begin(block());
    Schedule::Place place = schedule.find(step);

    for (bool again = false; step < end; again = true) {
        const int index = static_cast<int>((step - place.begin) / place.steps);
        const int64_t unit_begin = place.begin + static_cast<int64_t>(index) * place.steps;
        const int first = static_cast<int>(step - unit_begin);
        const int last = static_cast<int>(lesser(end - unit_begin, int64_t(place.steps)));
        const Unit unit(arguments, place.batch, index, row_parts(arguments.problem));

        int row_tiles = 1; /* a power of two, as WAVES is */
        while (row_tiles * Shape_::ROWS < unit.padded_rows) row_tiles *= 2;
        const int groups = WAVES / row_tiles, group = wave() / row_tiles;
        const int wave_row = wave() % row_tiles * Shape_::ROWS;
        const int seen = unit.rows == 0 ? 0 : unit.visible(unit.rows - 1);
        const int first_key = first * STEP_KEYS, end_key = lesser(seen, last * STEP_KEYS);

        if (again) barrier(); /* the last unit's use of shared memory is over */
        Softmax softmax(scale.positive);
        Output o;
        o.clear();
        if (first_key < end_key)
            attend(unit, shared_address(shared), first_key, end_key, wave_row, group, groups, scale.negate, softmax, o);
        add_up(shared, group, groups, row_tiles, softmax, o);
        if (group == 0) {
            if (first == 0 && last == place.steps) store(unit, wave_row, softmax, o);
            else store_part(unit, parts, first == 0, wave_row, softmax, o);
        }

        step = unit_begin + last;
        if (step == place.begin + static_cast<int64_t>(place.steps) * schedule.units && step < end)
            place = {place.batch + 1, step, schedule.steps_in(place.batch + 1)};
    }
}

/* ---- units that were cut ---- */

/* Block (cut, row): the cut before range `cut`, if it is the first through its unit, and one row of that unit. Waves take
 * parts in turn, their lanes dimensions. */
__global__ void __launch_bounds__(THREADS) merge(const Arguments arguments, int grid) {
    constexpr int DIMENSIONS = round_up(HEAD_DIM, WAVE) / WAVE; /* of a lane: lane, lane + WAVE, ... */
    __shared__ float sums[WAVES][DIMENSIONS * WAVE];
    const Schedule schedule(arguments, grid);
    const Parts parts(arguments, grid);
    const int cut = block() / parts.rows + 1, row = block() % parts.rows;
    if (cut >= schedule.blocks) return;
    const int64_t step = schedule.range_begin(cut);
    const Schedule::Place place = schedule.find(step);
    const int index = static_cast<int>((step - place.begin) / place.steps);
    const int64_t unit_begin = place.begin + static_cast<int64_t>(index) * place.steps;
    if (step == unit_begin || schedule.range_begin(cut - 1) > unit_begin) return;
    const Unit unit(arguments, place.batch, index, row_parts(arguments.problem));
    if (row >= unit.padded_rows) return;

    int count = 0; /* parts: place 1 of the block before the cut, place 0 of those after it */
    float log_sum = -INFINITE, maximum = -INFINITE, total = 0.0f;
    if (row < unit.rows && unit.visible(row) > 0) {
        count = schedule.block_of(unit_begin + place.steps - 1) - cut + 2;
        for (int i = lane(); i < count; i += WAVE)
            maximum = __builtin_fmaxf(maximum, parts.softmax_row(cut - 1 + i, i == 0, row)[0]);
#pragma unroll
        for (int distance = 1; distance < WAVE; distance *= 2)
            maximum = __builtin_fmaxf(maximum, from_lane(maximum, lane() ^ distance));
        const float reference = maximum == -INFINITE ? 0.0f : maximum;
        for (int i = lane(); i < count; i += WAVE) {
            const float *part = parts.softmax_row(cut - 1 + i, i == 0, row);
            total += part[1] * exp2(part[0] - reference);
        }
        total = wave_sum(total);
        log_sum = maximum == -INFINITE && total == 0 ? -INFINITE : maximum + log2(total);
    }

    const float reference = maximum == -INFINITE ? 0.0f : maximum;
    float sum[DIMENSIONS] = {};
#pragma unroll 4
    for (int i = wave(); i < count; i += WAVES) {
        const float weight = exp2(parts.softmax_row(cut - 1 + i, i == 0, row)[0] - reference);
        const float *part = parts.output_row(cut - 1 + i, i == 0, row);
#pragma unroll
        for (int d = 0; d < DIMENSIONS; ++d)
            if (lane() + d * WAVE < HEAD_DIM) sum[d] += weight * part[lane() + d * WAVE];
    }
#pragma unroll
    for (int d = 0; d < DIMENSIONS; ++d) sums[wave()][lane() + d * WAVE] = sum[d];
    barrier();
    if (wave() != 0) return;
    bool spoiled = false;
#pragma unroll
    for (int d = 0; d < DIMENSIONS; ++d) {
        sum[d] = 0.0f;
#pragma unroll
        for (int w = 0; w < WAVES; ++w) sum[d] += sums[w][lane() + d * WAVE];
        if (count != 0) sum[d] *= reciprocal(total);
        spoiled |= sum[d] != sum[d];
    }
    if (lane() == 0) unit.store_lse(row, log_sum);
    if (CAUSAL && wave_any(spoiled) && __builtin_fabsf(log_sum) < INFINITE && unit.repair(row, log_sum)) return;
#pragma unroll
    for (int d = 0; d < DIMENSIONS; ++d)
        if (lane() + d * WAVE < HEAD_DIM) unit.output(row)[lane() + d * WAVE] = to_element(sum[d]);
}

/* ---- the host's side ---- */

/* Blocks of a launch on a GPU with that many compute units. */
inline int64_t grid_of(const aiter_attention_problem &p, int compute_units) {
    const int64_t units = static_cast<int64_t>(p.batch) * p.heads_kv * row_parts(p);
    return blocks_for(units, units * steps_of(p.seqlen_k), static_cast<int64_t>(compute_units) * Shape_::BLOCKS);
}
inline int compute_units(int device) {
    int count = 0;
    return hipDeviceGetAttribute(&count, hipDeviceAttributeMultiprocessorCount, device) == hipSuccess ? count : 0;
}

} // namespace aiter

AITER_EXPORT void aiter_describe(aiter_description *description) {
    description->abi_version = AITER_ABI_VERSION;
    description->problem_bytes = sizeof(aiter_attention_problem);
    description->tensors_bytes = sizeof(aiter_attention_tensors);
}

/* Enough for whichever of the machine's GPUs the launch will be on. */
AITER_EXPORT int64_t aiter_workspace_bytes(const aiter_attention_problem *problem) {
    int devices = 0, most = 0;
    if (hipGetDeviceCount(&devices) != hipSuccess) return 0;
    for (int device = 0; device < devices; ++device) {
        const int count = aiter::compute_units(device);
        if (count > most) most = count;
    }
    const int64_t grid = aiter::grid_of(*problem, most);
    return grid < 2 || aiter::steps_of(problem->seqlen_k) == 1 ? 0 : aiter::Parts::bytes(grid, aiter::part_rows(*problem));
}

AITER_EXPORT int aiter_launch(const aiter_attention_problem *problem, const aiter_attention_tensors *tensors,
                              void *stream) {
    if (const int error = aiter::check_problem(*problem)) return error;
    int device = 0;
    if (const int error = hipGetDevice(&device)) return error;
    const int grid = static_cast<int>(aiter::grid_of(*problem, aiter::compute_units(device)));
    const aiter::Arguments arguments = {*problem, *tensors};
    if (const int error =
            aiter::launch(aiter::attention_decode, grid, aiter::THREADS, aiter::SHARED_BYTES, stream, arguments, grid))
        return error;
    const int64_t cuts = aiter::steps_of(problem->seqlen_k) == 1 ? 0 : grid - 1; /* that may go through a unit */
    return aiter::launch(aiter::merge, cuts * aiter::part_rows(*problem), aiter::THREADS, 0, stream, arguments, grid);
}

AITER_EXPORT const char *aiter_error_text(int code) { return aiter::error_text(code); }
