/* Decoding: where results go, and how the parts of a unit that was cut are added up. See attention_decode.hip.
 *
 *     store          a whole unit, from the registers of a row tile's first wave to the output
 *     store_part     a part of one, to the workspace or, sm_90a, to shared memory, where waves or a cluster's blocks add up
 *     merge_rows     many parts, from the workspace: a row by one wave, or by several that take its parts in turn
 *     NearRow        few parts, from shared memory: a row by one wave, all parts at once
 *     store_row      a row that has been added up */
#ifndef AITER_GPU_DECODE_RESULTS_H
#define AITER_GPU_DECODE_RESULTS_H

#include "gpu/decode_loop.h"

namespace aiter {

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
        const float inverse = weight_of_keys(softmax.sum[slot], unit.share(row, log_sum[slot]));
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
                const float its_log_sum = from_lane(log_sum[slot], first_lane(lanes));
                if (unit.repair(bad, score, its_log_sum, Loop::first_column(), Loop::OWN_COLUMNS))
                    spoiled |= row == bad;
            }
        }
        if (row < unit.padded_rows && Tile::leads_row()) unit.store_lse(row, log_sum[slot]);
        Element *to = row < unit.padded_rows && !spoiled ? unit.output(row) : nullptr;
#if defined(AITER_LATENT)
        store_elements<Tile::COLUMNS>(o, slot, to == nullptr ? to : to + Loop::first_column());
#else
        if (to == nullptr) continue;
#pragma unroll
        for (int i = 0; i < Output::VALUES; i += RUN) {
            Pack<uint32_t, RUN / 2> run;
#pragma unroll
            for (int j = 0; j < RUN; j += 2) run.item[j / 2] = to_elements(o.get(slot, i + j), o.get(slot, i + j + 1));
            if (column_of_lane(i) < VALUE_DIM)
                *reinterpret_cast<Pack<uint32_t, RUN / 2> *>(to + column_of_lane(i)) = run;
        }
#endif
    }
}

/* Part of a unit of so many rows. output_row(row), softmax_row(row): where the part's are. */
template <class OutputRow, class SoftmaxRow>
__device__ __forceinline__ void store_part(int rows, int wave_row, Softmax &softmax, const Output &o,
                                           OutputRow output_row, SoftmaxRow softmax_row) {
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
        const int row = wave_row + Output::row(slot);
        const float sum = row_sum<Tile::LANES>(softmax.sum[slot]);
        if (row >= rows) continue;
        float *to = output_row(row);
#pragma unroll
        for (int i = 0; i < Output::VALUES; i += RUN) {
            Pack<float, RUN> run;
#pragma unroll
            for (int j = 0; j < RUN; ++j) run.item[j] = o.get(slot, i + j);
            if (column_of_lane(i) < VALUE_DIM) *reinterpret_cast<Pack<float, RUN> *>(to + column_of_lane(i)) = run;
        }
        if (Tile::leads_row()) *reinterpret_cast<Pack<float, 2> *>(softmax_row(row)) = {{softmax.maximum[slot], sum}};
    }
}

/* ---- units that were cut ---- */

/* The parts of a unit in the workspace: place 1 of block `first`, and place 0 of those after it. */
struct PartsOfBlocks {
    const Parts &parts;
    int first;
    __device__ __forceinline__ const float *output_row(int i, int row) const {
        return parts.output_row(first + i, i == 0, row);
    }
    __device__ __forceinline__ const float *softmax_row(int i, int row) const {
        return parts.softmax_row(first + i, i == 0, row);
    }
};

/* A row, or a part of one, of which each lane of a wave has some dimensions: RUN adjacent ones of every RUN * WAVE, as
 * many as a load or store can have without leaving lanes idle. */
struct WaveRow {
    static constexpr int RUN = VALUE_DIM > 2 * WAVE ? 4 : VALUE_DIM > WAVE ? 2 : 1;
    static constexpr int RUNS = (VALUE_DIM + RUN * WAVE - 1) / (RUN * WAVE);
    float value[RUNS][RUN];

    static __device__ __forceinline__ int column(int run) { return (run * WAVE + lane()) * RUN; }
    static __device__ __forceinline__ bool has(int run) {
        return (run + 1) * RUN * WAVE <= VALUE_DIM || column(run) < VALUE_DIM;
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int r = 0; r < RUNS; ++r)
#pragma unroll
            for (int i = 0; i < RUN; ++i) value[r][i] = 0.0f;
    }
    __device__ __forceinline__ void load(const float *from) {
#pragma unroll
        for (int r = 0; r < RUNS; ++r)
            if (has(r)) {
                const auto run = *reinterpret_cast<const Pack<float, RUN> *>(from + column(r));
#pragma unroll
                for (int i = 0; i < RUN; ++i) value[r][i] = run.item[i];
            }
    }
    __device__ __forceinline__ void store(float *to) const {
#pragma unroll
        for (int r = 0; r < RUNS; ++r) {
            Pack<float, RUN> run;
#pragma unroll
            for (int i = 0; i < RUN; ++i) run.item[i] = value[r][i];
            if (has(r)) *reinterpret_cast<Pack<float, RUN> *>(to + column(r)) = run;
        }
    }
    __device__ __forceinline__ void store(Element *to) const {
#pragma unroll
        for (int r = 0; r < RUNS; ++r) {
            Pack<Element, RUN> run;
#pragma unroll
            for (int i = 0; i < RUN; ++i) run.item[i] = to_element(value[r][i]);
            if (has(r)) *reinterpret_cast<Pack<Element, RUN> *>(to + column(r)) = run;
        }
    }
    __device__ __forceinline__ void add(const WaveRow &other, float weight) {
#pragma unroll
        for (int r = 0; r < RUNS; ++r)
#pragma unroll
            for (int i = 0; i < RUN; ++i) value[r][i] += weight * other.value[r][i];
    }
};

/* A row whose parts have been added up, by a whole wave. */
__device__ __forceinline__ void store_row(const Unit &unit, int row, bool sees_keys, float maximum, float total,
                                          WaveRow &sum) {
    /* A score of +inf makes the output NaN (inf - inf), as it should, but the log-sum-exp is +inf. */
    const float log_sum = !sees_keys || maximum == -INFINITE && total == 0 ? -INFINITE
                          : maximum == INFINITE                            ? INFINITE
                                                                           : maximum + log2(total);
    const float inverse = weight_of_keys(total, unit.share(row, log_sum));
    bool spoiled = false;
#pragma unroll
    for (int r = 0; r < WaveRow::RUNS; ++r)
#pragma unroll
        for (int i = 0; i < WaveRow::RUN; ++i) {
            float &x = sum.value[r][i];
            x = sees_keys ? x * inverse : 0.0f;
            spoiled |= WaveRow::has(r) && x != x;
        }
    if (lane() == 0) unit.store_lse(row, log_sum);
    if (MASKED && wave_any(spoiled) && __builtin_fabsf(log_sum) < INFINITE &&
        unit.repair(row, Score(unit.arguments.problem), log_sum))
        return;
    sum.store(unit.output(row));
}

/* Adds up that many parts of a unit, more than one: rows `first_row` ... + rows - 1, by WAVES waves, which all take
 * part. Few parts: each row by one wave, which asks for all of them at once. More: by several waves, which take parts
 * in turn. How many these are, and so the order of additions, depends on the number of parts alone. With batch_invariant
 * not even on that, as parts may be there that the row does not see: there are always as many, and a part's wave and lane
 * are by its number in the sequence. meet(): where the waves do. */
struct alignas(16) MergeSums {
    static constexpr int TOGETHER = 4; /* parts on their way to a wave */
    static constexpr int OF_LANE = 4;  /* of which a lane looks at the maximum and sum at one time */
    static constexpr int INVARIANT_SLICES = 4;
    float of_wave[WaveRow::RUNS * WaveRow::RUN * WAVE];
};
template <int WAVES, class Parts, class Meet>
__device__ __forceinline__ void merge_rows(const Unit &unit, const Parts &parts, int all, int first_row, int rows,
                                           MergeSums *sums, Meet meet) {
    constexpr int TOGETHER = MergeSums::TOGETHER;
    const bool invariant = unit.arguments.problem.batch_invariant;
    int slices = invariant ? MergeSums::INVARIANT_SLICES : 1;
    while (!invariant && slices < WAVES && slices * TOGETHER < all) slices *= 2;
    int before = 0; /* parts of the sequence that nobody asks for */
    if (WINDOW && invariant) before = keys_to_read(unit.arguments.problem, unit.sequence.mask).low / INVARIANT_KEYS;
    const int slice = wave() % slices, own_first = (slice - before) & (slices - 1);
#pragma unroll 1
    for (int passed = 0; passed < rows; passed += WAVES / slices) {
        const int index = passed + wave() / slices, row = first_row + index;
        const bool sees_keys = unit.sees_keys(row);
        const int count = sees_keys && index < rows ? all : 0;
        WaveRow part[TOGETHER], sum;
        float its_maximum[TOGETHER];
        const auto request = [&](int first) {
#pragma unroll
            for (int j = 0; j < TOGETHER; ++j) {
                const int i = first + j * slices;
                its_maximum[j] = i < count ? parts.softmax_row(i, row)[0] : -INFINITE;
                part[j].clear();
                if (i < count) part[j].load(parts.output_row(i, row));
            }
        };
        request(own_first);

        float maximum = -INFINITE, total = 0.0f;
        /* visit(its maximum, its sum) */
        const auto for_own_parts = [&](auto visit) {
#pragma unroll 1
            for (int first = (lane() - before) & (WAVE - 1); first < count; first += MergeSums::OF_LANE * WAVE) {
                Pack<float, 2> own[MergeSums::OF_LANE];
#pragma unroll
                for (int j = 0; j < MergeSums::OF_LANE; ++j) {
                    const int i = first + j * WAVE;
                    own[j] = {{-INFINITE, 0.0f}};
                    if (i < count) own[j] = *reinterpret_cast<const Pack<float, 2> *>(parts.softmax_row(i, row));
                }
#pragma unroll
                for (int j = 0; j < MergeSums::OF_LANE; ++j) visit(own[j].item[0], own[j].item[1]);
            }
        };
        for_own_parts([&](float its, float) { maximum = __builtin_fmaxf(maximum, its); });
#pragma unroll
        for (int distance = 1; distance < WAVE; distance *= 2)
            maximum = __builtin_fmaxf(maximum, from_lane(maximum, lane() ^ distance));
        const float reference = maximum == -INFINITE ? 0.0f : maximum;
        for_own_parts([&](float its, float its_sum) { total += its_sum * exp2(its - reference); });
        total = wave_sum(total);

        sum.clear();
#pragma unroll 1
        for (int first = own_first; first < count; first += TOGETHER * slices) {
#pragma unroll
            for (int j = 0; j < TOGETHER; ++j) sum.add(part[j], exp2(its_maximum[j] - reference));
            request(first + TOGETHER * slices);
        }
        if (slices > 1) {
            sum.store(sums[wave()].of_wave);
            meet();
            if (slice == 0)
#pragma unroll 1
                for (int other = 1; other < slices; ++other) {
                    part[0].load(sums[wave() + other].of_wave);
                    sum.add(part[0], 1.0f);
                }
        }
        if (slice == 0 && index < rows && row < unit.padded_rows) store_row(unit, row, sees_keys, maximum, total, sum);
        if (slices > 1 && passed + WAVES / slices < rows) meet();
    }
}

#if defined(AITER_RING)
/* Parts of a row tile in shared memory, where rows 0 ... rows - 1 of each stand together: output, maximum, sum. Places
 * are such that lanes which write four rows at a time do not meet in a bank. */
struct NearParts {
    float *memory;
    int rows;
    __device__ __forceinline__ float *output_row(int i, int row) const {
        return memory + (i * rows + row) * Loop::PART_FLOATS;
    }
    __device__ __forceinline__ float *softmax_row(int i, int row) const { return output_row(i, row) + VALUE_DIM; }
};

/* A row of a few such parts, added up by a wave. */
struct NearRow {
    float maximum = -INFINITE, total = 0.0f;
    WaveRow sum;

    template <int MOST> static __device__ __forceinline__ NearRow of(const NearParts &parts, int count, int row) {
        NearRow result;
        result.sum.clear();
        float maxima[MOST], totals[MOST];
#pragma unroll
        for (int i = 0; i < MOST; ++i) {
            const bool exists = i < count;
            const float *part = parts.softmax_row(exists ? i : 0, row);
            maxima[i] = exists ? part[0] : -INFINITE;
            totals[i] = exists ? part[1] : 0.0f;
            result.maximum = __builtin_fmaxf(result.maximum, maxima[i]);
        }
        const float reference = result.maximum == -INFINITE ? 0.0f : result.maximum;
#pragma unroll
        for (int i = 0; i < MOST; ++i) {
            if (i >= count) break;
            const float weight = exp2(maxima[i] - reference);
            result.total += totals[i] * weight;
            WaveRow part = {};
            part.load(parts.output_row(i, row));
            result.sum.add(part, weight);
        }
        return result;
    }
    __device__ __forceinline__ void store_part(float *output, float *softmax) const {
        sum.store(output);
        if (lane() == 0) *reinterpret_cast<Pack<float, 2> *>(softmax) = {{maximum, total}};
    }
};
static_assert(Loop::READERS * Tile::ROWS / 2 * Loop::PART_FLOATS * 4 <= Loop::EXCHANGE_BYTES, "");
static_assert(Loop::READERS * sizeof(MergeSums) <= Loop::EXCHANGE_BYTES, "");

/* By all readers of a cluster's blocks, each of which has a part of the unit: a block hands rows to those that have
 * them in the end, and adds up its own. */
__device__ __forceinline__ void share_in_cluster(const Unit &unit, char *shared, const NearParts &waves, int groups,
                                                 int size) {
    const int each = (unit.padded_rows + size - 1) / size, rank = cluster::rank();
    const NearParts handed = {reinterpret_cast<float *>(shared + Loop::HANDED_AT), each};
    cluster::wait(); /* all blocks are there, whose memory is written now */
#pragma unroll 1
    for (int row = wave(); row < unit.rows; row += Loop::READERS) {
        const int owner = row / each, place = row - owner * each;
        NearRow::of<Loop::READERS>(waves, groups, row)
            .store_part(cluster::of(handed.output_row(rank, place), owner),
                        cluster::of(handed.softmax_row(rank, place), owner));
    }
    cluster::arrive();
    cluster::wait();
#pragma unroll 1
    for (int place = wave(); place < each; place += Loop::READERS) {
        const int row = rank * each + place;
        if (row >= unit.padded_rows) return;
        const bool sees_keys = unit.sees_keys(row);
        NearRow sum = NearRow::of<Tile::MOST_CLUSTER>(handed, sees_keys ? size : 0, place);
        store_row(unit, row, sees_keys, sum.maximum, sum.total, sum.sum);
    }
}

/* By all readers, who have written a part of the unit to the workspace: whoever comes last adds up all of them. */
__device__ __forceinline__ void merge_as_last(const Unit &unit, const Loop::Launch &launch, const Schedule &schedule,
                                              const Parts &parts, const Schedule::Place &place, char *shared) {
    const int first = schedule.first_range(place), last = schedule.last_range(place);
    if (Loop::count_arrival(launch.arrived + first, shared) != last - first) return;
    merge_rows<Loop::READERS>(unit, PartsOfBlocks{parts, first}, last - first + 1, 0, unit.padded_rows,
                              reinterpret_cast<MergeSums *>(shared + Loop::EXCHANGE_AT), [] { Loop::meet_readers(); });
}
#endif

} // namespace aiter

#endif
