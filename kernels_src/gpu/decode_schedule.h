/* Decoding: which block reads what, and where it leaves parts of a result. See attention_decode.hip. */
#ifndef AITER_GPU_DECODE_SCHEDULE_H
#define AITER_GPU_DECODE_SCHEDULE_H

#include "gpu/decode_add_up.h"
#include "gpu/divisor.h"
#include "gpu/softmax.h"
#if defined(AITER_GFX9)
#include "gpu/arch/gfx9_decode.h"
#else
#include "gpu/arch/sm80_decode.h"
#endif
/* Latent attention has a loop of its own on wgmma, whose copies do not convert 8-bit keys and values. */
#if defined(AITER_WGMMA) && AITER_HEAD_DIM == 576 && AITER_VALUE_DIM == 512 && !AITER_FP8_CACHE
#define AITER_LATENT 1
#include "gpu/arch/sm90_latent.h"
#elif defined(AITER_WGMMA) && AITER_HEAD_DIM <= 256 && AITER_VALUE_DIM <= 256
#define AITER_RING 1
#include "gpu/arch/sm90_decode.h"
#endif

namespace aiter {

#if defined(AITER_LATENT)
using Tile = LatentDecode;
#elif defined(AITER_RING)
using Tile = RingDecode<HEAD_DIM, VALUE_DIM>;
#else
/* Each team of waves has tiles, or rows, of its own; its waves share them, and split the columns of V. */
struct Tile : Decode<HEAD_DIM, VALUE_DIM> {
    static constexpr int TEAMS = WAVES / TEAM, STEP_KEYS = TEAMS * KEYS, PART_ROWS = TEAMS * ROWS;
    static constexpr int ALIGNMENT = 1, MOST_CLUSTER = 1, MERGE_STEPS = 0, PIECE_STEPS = 0;
};
#endif
constexpr int KEYS = Tile::KEYS, THREADS = Tile::WAVES * WAVE;
constexpr int STEP_KEYS = Tile::STEP_KEYS, PART_ROWS = Tile::PART_ROWS;

/* Shared memory of a block: first for the tiles, if they pass through it, then for what waves hand to each other. */
template <int HEAD_DIM, int VALUE_DIM> struct DecodeMemory {
    using Tile = Decode<HEAD_DIM, VALUE_DIM>;
    using Output = typename Tile::Output;
    using Stream = KeyValueStream<HEAD_DIM, VALUE_DIM, KeyValueRows<PAGED>>;
    static constexpr int EXCHANGE_BYTES =
        Tile::WAVES > Tile::TEAM ? Tile::WAVES / 2 * EXCHANGED_FLOATS<Output> *WAVE * 4 : 0;
    static constexpr int SHARED_BYTES = greater(Stream::SHARED_BYTES, EXCHANGE_BYTES);
};

/* batch_invariant: units are cut at the multiples of this many keys, wherever their blocks are, and have one row tile,
 * so that nothing about a row depends on what else there is. */
constexpr int INVARIANT_KEYS = 1024;
/* A multiple of what any loop deals out to its waves, or takes together, at one time. */
constexpr int ROUND_KEYS = 256;
static_assert(INVARIANT_KEYS % ROUND_KEYS == 0 && ROUND_KEYS % STEP_KEYS == 0, "whole rounds of whole steps");

/* A unit is not cut into parts smaller than this many steps, on average: merging would cost more than it gains. */
constexpr int LEAST_STEPS = KEYS < 64 && Tile::MOST_CLUSTER == 1 ? 4 : 2;

__host__ __device__ inline int64_t all_rows(const aiter_attention_problem &p) { /* of a KV head in a sequence */
    return static_cast<int64_t>(p.seqlen_q) * (p.heads_q / p.heads_kv);
}
/* Those that one unit has; more than that are several units. */
__host__ __device__ inline int most_rows(const aiter_attention_problem &p) {
    return p.batch_invariant ? Tile::ROWS : PART_ROWS;
}
__host__ __device__ inline int rows_of_unit(const aiter_attention_problem &p) {
    return static_cast<int>(lesser<int64_t>(all_rows(p), most_rows(p)));
}
__host__ __device__ inline int row_parts(const aiter_attention_problem &p) {
    return static_cast<int>((all_rows(p) + most_rows(p) - 1) / most_rows(p));
}
/* Keys of a step, and steps of a unit with this many keys: at least one, which writes the output where there is nothing
 * to read. */
__host__ __device__ inline int step_keys(const aiter_attention_problem &p) {
    return p.batch_invariant ? INVARIANT_KEYS : STEP_KEYS;
}
__host__ __device__ inline int steps_of(const aiter_attention_problem &p, int keys) {
    return keys <= 0 ? 1 : p.batch_invariant ? (keys - 1) / INVARIANT_KEYS + 1 : (keys - 1) / STEP_KEYS + 1;
}

/* Are sequences of equal length, as far as the keys to read go? */
__host__ __device__ inline bool all_alike(const aiter_attention_tensors &t) {
    return t.seqlens_k == nullptr && t.starts_k == nullptr && t.page_indptr == nullptr &&
           (!WINDOW || t.seqlens_q == nullptr && t.starts_q == nullptr && t.query_offsets == nullptr);
}
/* Besides, are units a sequence's KV heads, with the same rows, of which one sees all keys? */
inline bool all_plain(const aiter_attention_problem &p, const aiter_attention_tensors &t) {
    return all_alike(t) && !WINDOW && t.seqlens_q == nullptr && t.starts_q == nullptr && t.query_offsets == nullptr &&
           row_parts(p) == 1 && !p.batch_invariant;
}

/* How the steps, so many in all, are dealt to at most so many blocks. The GPU, which divides 64 bits slowly, knows that
 * 32 are enough. */
template <class Int> struct Deal {
    Int units, blocks; /* of all sequences; that have a range of steps */
    Int lines;         /* that are cut on their own, each into as many ranges: those of one unit of each sequence, or
                          a single one */
    Int rounds, share; /* whole units that a range would have, at most; ranges that each unit can have, all as many */

    Deal() = default;
    __host__ __device__ Deal(const aiter_attention_problem &p, int parts, Int steps, Int most) {
        const Int line_units = p.heads_kv * static_cast<Int>(greater(parts, 1));
        units = p.batch * static_cast<Int>(p.heads_kv) * parts;
        const Int useful = lesser<Int>(greater<Int>(steps / LEAST_STEPS, units), most),
                  even = useful / line_units * line_units;
        blocks = p.batch_invariant ? steps : even >= useful - useful / 16 ? even : useful;
        lines = blocks % line_units == 0 ? line_units : 1;
        const Int ranges = greater<Int>(blocks / lines, 1);
        rounds = (units / lines + ranges - 1) / ranges;
        share = units < useful ? useful / greater<Int>(units, 1) : 1;
    }
};

/* How units are parted. 0: ranges are equal, and units are cut wherever these end. Else each is taken for as long as the
 * longest of them, and is not cut (1; a range may have several), or has that many ranges of its own. That is done where
 * no block has much more to do for it than all have on average: a sixteenth, as memory has enough to do in the last
 * round, or what cutting costs. Never where cuts may not depend on what else there is. */
template <class Int>
__host__ __device__ inline int ranges_of_unit(const aiter_attention_problem &p, const Deal<Int> &deal, Int steps,
                                              int longest) {
    if (p.batch_invariant) return 0;
    const int64_t blocks = deal.blocks, most = steps + lesser<int64_t>(deal.units, blocks) * Tile::PIECE_STEPS;
    const int64_t whole = int64_t(deal.rounds) * longest * blocks;
    if (whole * 15 <= int64_t(steps) * 16 || whole <= most + blocks * Tile::MERGE_STEPS) return 1;
    if (Tile::PIECE_STEPS == 0 || deal.share < 2) return 0;
    return (longest + deal.share - 1) / deal.share * blocks <= most ? static_cast<int>(deal.share) : 0;
}

/* What is the same for all blocks of a launch. Nothing is read yet while they work it out: so the host does what it
 * can. */
struct Cuts {
    int parts;                /* of the rows */
    int line_units;           /* of one sequence: as many lines */
    int group;                /* query heads of a KV head */
    int length = 0;           /* steps of a line; 0: lengths on the device tell, and the rest */
    int unit_steps = 0;       /* of each unit; 0: they differ. Shorter ones have no keys in the last of these */
    Deal<int> deal;           /* for as many steps as there are, or as are enough for all blocks */
    int blocks;               /* that have a range of steps; with batch_invariant, ranges */
    int at_once;              /* blocks of the launch, where those are fewer: each takes several ranges */
    int ranges = 1;           /* of what is cut on its own: of a line, or of all */
    int cut = 0, grain = 1;   /* steps that are cut: of a line, or of all; that are not parted: 1, or those of a unit */
    int each = 0, longer = 0; /* grains in a range; that many ranges at the beginning have one more */
    int cluster;              /* if not 1: blocks that have equal parts of one unit; then unit_steps may be known */
    int lead = 0;             /* see led() */
    bool whole = false;       /* units are not cut */
    bool plain;               /* units are: see all_plain() */
    Divisor by_line_units, by_group, by_cluster, by_steps; /* by known unit_steps, if no cluster */

    __host__ Cuts(const aiter_attention_problem &p, const aiter_attention_tensors &t, int grid, int cluster,
                  int at_once)
        : parts(row_parts(p)), line_units(p.heads_kv * parts), group(p.heads_q / p.heads_kv), blocks(grid),
          at_once(at_once), cluster(cluster), plain(all_plain(p, t)), by_line_units(line_units), by_group(group),
          by_cluster(cluster) {
        const bool alike = all_alike(t);
        if (WINDOW) return;
        if (alike) unit_steps = steps_of(p, p.seqlen_k);
        if (cluster > 1) return;
        if (!p.batch_invariant) {
            /* Lengths that the device knows are mostly enough for all blocks. */
            set(Deal<int>(p, parts, alike ? unit_steps * p.batch * line_units : INT32_MAX, grid));
            if (alike) cut_lines(p, unit_steps * p.batch, unit_steps);
        }
        if (alike) by_steps = Divisor(unit_steps);
    }
    /* Steps before those of each unit that stand for what its beginning costs a block, so that all have as much to do
     * however many units begin in their ranges. A range that ends among them has nothing of the unit. */
    __host__ __device__ int led() const { return Tile::PIECE_STEPS == 0 ? 0 : lead; }
    /* That are cut on their own, or 1. */
    __host__ __device__ int lines() const { return ranges == blocks ? 1 : line_units; }
    __host__ __device__ void set(const Deal<int> &dealt) {
        deal = dealt;
        blocks = dealt.blocks;
        ranges = blocks / dealt.lines;
    }
    /* So many steps of a line, of which the longest unit has `longest`. */
    __host__ __device__ void cut_lines(const aiter_attention_problem &p, int steps, int longest) {
        const int of_unit = ranges_of_unit(p, deal, steps * line_units, longest);
        whole = of_unit == 1;
        if (of_unit > 1) {
            unit_steps = (longest + of_unit - 1) / of_unit * of_unit;
            blocks = of_unit * deal.units;
            ranges = of_unit * p.batch;
        } else if (whole) unit_steps = longest;
        else if (!p.batch_invariant) lead = Tile::PIECE_STEPS, unit_steps += unit_steps > 0 ? led() : 0;
        length = of_unit > 0 ? unit_steps * p.batch : steps + led() * p.batch;
        const int cut_units = lines() == 1 ? line_units : 1;
        cut = length * cut_units;
        grain = whole ? unit_steps : 1;
        const int grains = whole ? p.batch * cut_units : cut;
        each = grains / ranges;
        longer = grains - each * ranges;
    }
};

/* Few units that are alike: how many blocks side by side (a cluster) have equal parts of one and add them up by
 * themselves, which takes a microsecond or two where a kernel of its own takes five. 1: units are not cut; 0: that is not
 * the way. Half of an H100's SMs read as fast as all of them; where there is little to read, fewer do. Where nearly all
 * are to be in clusters, some of these find no place beside the others, and come too late. */
inline int cluster_of(const aiter_attention_problem &p, bool alike, int64_t steps, int64_t units, int64_t most) {
    if (Tile::MOST_CLUSTER == 1 || p.batch_invariant || !alike && p.batch > 1) return 0;
    if (rows_of_unit(p) > Tile::ROWS || units == 0 || units > most) return 0;
    const int64_t steps_of_unit = steps / units;
    int size = Tile::MOST_CLUSTER;
    while (size > 1 && (size * units > most * 3 / 4 || size * LEAST_STEPS > steps_of_unit)) size /= 2;
    return size * units < most * 3 / 8 && steps_of_unit > 16 * size ? 0 : size;
}

/* The keys that steps are counted over: those that any row of the sequence sees. */
__device__ __forceinline__ Range keys_to_read(const aiter_attention_problem &p, const Mask &mask) {
    Range keys = {0, mask.keys};
    if (WINDOW) keys = mask.keys_of_any(0, mask.rows);
    if (WINDOW) keys.low -= keys.low % Tile::ALIGNMENT;
    if (WINDOW && p.batch_invariant) keys.low -= keys.low % INVARIANT_KEYS;
    return keys;
}
/* At most so many. */
inline int most_keys_to_read(const aiter_attention_problem &p) {
    int64_t most = p.seqlen_k;
    if (WINDOW && p.window_left >= 0 && p.window_right >= 0)
        most = lesser<int64_t>(most, int64_t(p.window_left) + p.window_right + p.seqlen_q + Tile::ALIGNMENT);
    if (CHUNK) most = lesser<int64_t>(most, 2 * int64_t(p.attention_chunk) + p.seqlen_q + Tile::ALIGNMENT);
    if (WINDOW && p.batch_invariant) most = lesser<int64_t>(most + INVARIANT_KEYS, INT32_MAX);
    return static_cast<int>(most);
}

/* All steps, numbered through: by the unit's index in its sequence, then sequence. So blocks that run at one time read
 * the same tokens, each for another KV head: where those lie side by side, a memory page is opened once for all of them.
 * The host has seen to it that 32 bits count them. */
struct Schedule : Cuts {
    const aiter_attention_problem &problem;
    const Side queries, keys;
    const int32_t *offsets;
    const bool alike;
    struct Place { /* of a step: its unit */
        int batch, index;
        int begin, steps; /* the unit's first step; how many it has, with those that lead it */
        __device__ __forceinline__ Place moved(int lines, int length) const {
            return {batch, index + lines, begin + lines * length, steps};
        }
    };

    __device__ __forceinline__ Schedule(const Arguments &a, const Cuts &cuts, int grid)
        : Cuts(cuts), problem(a.problem), queries(query_side(a.problem, a.tensors)),
          keys(key_side(a.problem, a.tensors)), offsets(a.tensors.query_offsets), alike(all_alike(a.tensors)) {
        if (cluster > 1 || length > 0) return;
        const LineSteps steps = line_steps();
        const int all = steps.sum * line_units;
        if (alike) unit_steps = steps.longest;
        if (WINDOW || problem.batch_invariant || all / LEAST_STEPS < grid) set(Deal<int>(problem, parts, all, grid));
        cut_lines(problem, steps.sum, steps.longest);
    }
    /* Of a line's range, or of all steps'. */
    __device__ __forceinline__ int range_begin(int line, int index) const {
        return line * cut + (index * each + lesser(index, longer)) * grain;
    }
    __device__ __forceinline__ int range_begin(int range) const { return range_begin(range / ranges, range % ranges); }
    __device__ __forceinline__ int block_of(int step) const {
        const int index = step % cut / grain, ordinary = index - longer * (each + 1);
        return step / cut * ranges + (ordinary < 0 ? index / (each + 1) : longer + ordinary / each);
    }
    /* The first and the last range that have keys of a unit. */
    __device__ __forceinline__ int first_range(const Place &unit) const { return block_of(unit.begin + led()); }
    __device__ __forceinline__ int last_range(const Place &unit) const { return block_of(unit.begin + unit.steps - 1); }
    __device__ __forceinline__ int steps_in(int batch) const {
        const Mask mask(problem, WINDOW ? length_of(queries, batch) : 0, length_of(keys, batch),
                        WINDOW ? offsets : nullptr, batch);
        const Range range = keys_to_read(problem, mask);
        return steps_of(problem, range.high - range.low);
    }
    /* Ranges are taken by their numbers: those that are read at one time, side by side, are the same of different
     * lines. */
    struct LineRange {
        int line, index;
    };
    __device__ __forceinline__ LineRange range_of(int number) const {
        const int index = ranges == blocks ? number : by_line_units.quotient(number);
        return {number - index * lines(), index};
    }
    /* The part of a unit that the block of a cluster has: which unit, and which of all its steps. */
    __device__ __forceinline__ Place own_unit() const {
        const int number = by_cluster.quotient(block()), batch = by_line_units.quotient(number);
        return {batch, number - batch * line_units, 0, steps_in(batch)};
    }
    __device__ __forceinline__ Range own_steps(int all) const {
        const int rank = block() - by_cluster.quotient(block()) * cluster;
        const int each = by_cluster.quotient(all), longer = all - each * cluster;
        const int begin = each * rank + lesser(rank, longer);
        return {begin, begin + each + (rank < longer)};
    }
    /* By a whole wave. */
    __device__ __forceinline__ Place find(int step) const { return find(step, uniform(step / length)); }
    __device__ __forceinline__ Place find(int step, int index) const { /* where it is known in which line it is */
        return in_line(problem.batch, step - index * length).moved(index, length);
    }
    __device__ __forceinline__ Place unit(int batch, int index) const {
        return in_line(batch, INT32_MAX).moved(index, length);
    }
    __device__ __forceinline__ Place after(const Place &place) const {
        const bool last = place.batch + 1 == problem.batch;
        const int batch = last ? 0 : place.batch + 1;
        return {batch, uniform(place.index + last), place.begin + place.steps,
                unit_steps > 0 ? unit_steps : steps_in(batch) + led()};
    }

  private:
    static constexpr int OWN = 4; /* sequences of a lane: their lengths are on their way together */

    struct LineSteps {
        int sum, longest; /* of all units, of one */
    };
    __device__ __forceinline__ LineSteps line_steps() const {
        if (alike) {
            const int steps = steps_in(0);
            return {steps * problem.batch, steps};
        }
        int sum = 0, longest = 0;
#pragma unroll 1
        for (int base = lane(); base < problem.batch; base += OWN * WAVE) {
            int own[OWN];
#pragma unroll
            for (int i = 0; i < OWN; ++i) own[i] = base + i * WAVE < problem.batch ? steps_in(base + i * WAVE) : 0;
#pragma unroll
            for (int i = 0; i < OWN; ++i) sum += own[i], longest = greater(longest, own[i]);
        }
#pragma unroll
        for (int distance = 1; distance < WAVE; distance *= 2)
            longest = greater(longest, from_lane(longest, lane() ^ distance));
        return {uniform(wave_sum(sum)), uniform(longest)};
    }
    /* The sequence of a line that a step belongs to, or sequence `wanted` where that comes first. Past the last one:
     * where all steps end. */
    __device__ __forceinline__ Place in_line(int wanted, int step) const {
        if (unit_steps > 0) {
            const int before = alike && !WINDOW ? by_steps.quotient(step) : step / unit_steps;
            const int batch = step == INT32_MAX ? wanted : lesser(before, wanted);
            return {batch, 0, batch * unit_steps, unit_steps};
        }
        int begin = 0;
#pragma unroll 1
        for (int base = 0; base < problem.batch; base += OWN * WAVE) {
            int own[OWN], sum = 0;
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                const int batch = base + lane() * OWN + i;
                own[i] = batch < problem.batch ? steps_in(batch) + led() : 0;
            }
#pragma unroll
            for (int i = 0; i < OWN; ++i) sum += own[i];
            const int its = sum;
#pragma unroll
            for (int distance = 1; distance < WAVE; distance *= 2) {
                const int other = from_lane(sum, (lane() - distance) & (WAVE - 1));
                if (lane() >= distance) sum += other;
            }
            Place place = {base + lane() * OWN, 0, begin + sum - its, own[0]};
#pragma unroll
            for (int i = 1; i < OWN; ++i)
                if (place.batch < wanted && place.begin + place.steps <= step) {
                    ++place.batch;
                    place.begin += place.steps;
                    place.steps = own[i];
                }
            const bool here = place.batch == wanted || place.begin + place.steps > step;
            if (const uint64_t found = ballot(place.batch < problem.batch && here)) {
                const int there = first_lane(found);
                return {uniform(from_lane(place.batch, there)), 0, uniform(from_lane(place.begin, there)),
                        uniform(from_lane(place.steps, there))};
            }
            begin += uniform(from_lane(sum, WAVE - 1));
        }
        return {problem.batch, 0, begin, 1};
    }
};

/* Parts of units in the workspace: range b has two places, 0 for a unit that began before it and 1 for one that goes on
 * after it; with batch_invariant, where a range is one step, just one. Output not yet divided by the sum, in fp32;
 * maximum and sum of each row; a counter for each range. */
struct Parts {
    float *output, *softmax;
    int rows, places;
    static __host__ __device__ int places_of(const aiter_attention_problem &p) { return p.batch_invariant ? 1 : 2; }
    static int64_t bytes(const aiter_attention_problem &p, int64_t blocks) {
        return blocks * (places_of(p) * rows_of_unit(p) * (VALUE_DIM + 2) + 1) * static_cast<int64_t>(sizeof(float));
    }
    static uint32_t *counters(const Arguments &a, int64_t blocks) {
        char *workspace = static_cast<char *>(a.tensors.workspace);
        return reinterpret_cast<uint32_t *>(workspace + bytes(a.problem, blocks)) - blocks;
    }
    __device__ __forceinline__ Parts(const Arguments &a, int grid)
        : rows(rows_of_unit(a.problem)), places(places_of(a.problem)) {
        output = static_cast<float *>(a.tensors.workspace);
        softmax = output + static_cast<int64_t>(grid) * places * rows * VALUE_DIM;
    }
    __device__ __forceinline__ int64_t index(int block, int place, int row) const {
        return (block * static_cast<int64_t>(places) + (places == 2 ? place : 0)) * rows + row;
    }
    __device__ __forceinline__ float *output_row(int block, int place, int row) const {
        return output + index(block, place, row) * VALUE_DIM;
    }
    __device__ __forceinline__ float *softmax_row(int block, int place, int row) const {
        return softmax + index(block, place, row) * 2;
    }
};

/* A unit: rows of the query that share a KV head. Row r is query token r / group of head first_head + r % group. */
struct Unit {
    const Arguments &arguments;
    int batch, group;
    Divisor by_group;
    int first_head;
    Sequence sequence;                /* of the first head */
    int first_row, rows, padded_rows; /* of this part of the rows; padded_rows are written */

    __device__ __forceinline__ Unit(const Arguments &a, int batch, int index, const Cuts &cuts)
        : Unit(a, batch, cuts, cuts.parts == 1 ? index : index / cuts.parts, cuts.parts == 1 ? 0 : index % cuts.parts) {
    }
    __device__ __forceinline__ Unit(const Arguments &a, int batch, const Cuts &cuts, int kv_head, int part)
        : arguments(a), batch(batch), group(cuts.group), by_group(cuts.by_group), first_head(kv_head * group),
          sequence(a, batch, first_head, kv_head), first_row(part * most_rows(a.problem)),
          rows(clamp(sequence.rows * group - first_row, 0, most_rows(a.problem))),
          padded_rows(clamp(sequence.padded_rows * group - first_row, 0, most_rows(a.problem))) {}

    /* Here rows count from the first of this part. */
    __device__ __forceinline__ int token(int row) const { return by_group.quotient(first_row + row); }
    __device__ __forceinline__ int head(int row) const { return first_row + row - token(row) * group; }
    __device__ __forceinline__ Range sees(int row) const { return sequence.mask.keys_of(token(row)); }
    __device__ __forceinline__ bool sees_keys(int row) const { return row < rows && !sees(row).empty(); }
    __device__ __forceinline__ int position(int row) const { return token(row) + sequence.mask.diagonal; }
    __device__ __forceinline__ float slope(int row) const {
        return alibi_slope(arguments.problem, arguments.tensors, batch, first_head + (row < rows ? head(row) : 0));
    }
    /* What a row is multiplied by beside the inverse of its sum. */
    __device__ __forceinline__ float share(int row, float log_sum) const {
        const float share = share_of_keys(arguments.tensors.sinks, first_head + (row < rows ? head(row) : 0), log_sum);
        return FP8 ? share * sequence.value_descale() : share;
    }
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
    __device__ __forceinline__ Sequence of_head(int head) const {
        const aiter_attention_problem &p = arguments.problem;
        Sequence own = sequence;
        own.query += head * p.query_strides[2];
        own.output += head * p.output_strides[2];
        if (own.lse != nullptr) own.lse += head * p.lse_strides[1];
        own.slope = alibi_slope(p, arguments.tensors, batch, first_head + head);
        return own;
    }
    /* A row that is NaN though its log-sum-exp is finite: was it a hidden value, 0 * inf in a matrix product? By a
     * whole wave, for one row; true if the row, or those columns of it that the wave has, was then computed again and
     * stored. */
    __device__ __forceinline__ bool repair(int row, const Score &score, float log_sum, int first_column = 0,
                                           int columns = VALUE_DIM) const {
        const Sequence own = of_head(head(row));
        const Range sees = own.mask.keys_of(token(row));
        const Range read = keys_to_read(arguments.problem, own.mask);
        const bool hidden =
            values_not_finite(own, sees.high, read.high) || WINDOW && values_not_finite(own, read.low, sees.low);
        const Dropout none(arguments.problem, arguments.tensors);
        if (hidden) exact_row(own, token(row), score, none, log_sum, share(row, log_sum), first_column, columns);
        return hidden;
    }
    /* The rows of a wave, among keys before `end`: what they see, and what score.h and mask.h do to their scores. */
    template <class Output, int ROWS> struct Wave {
        static constexpr int SLOTS = Output::SLOTS;
        Range sees[SLOTS], all_see;
        float slope[SLOTS];
        int position[SLOTS];

        __device__ __forceinline__ Wave(const Unit &unit, int first_row, int end) {
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) {
                const int row = first_row + Output::row(slot);
                sees[slot] = MASKED && row < unit.rows ? unit.sees(row) : Range{0, end};
                sees[slot].high = lesser(sees[slot].high, end);
                if (ALIBI) slope[slot] = unit.slope(row), position[slot] = unit.position(row);
            }
            all_see = {0, end};
            if (MASKED && first_row < unit.rows) {
                all_see.high = lesser(unit.sees(first_row).high, end);
                if (WINDOW) all_see.low = unit.sees(lesser(first_row + ROWS, unit.rows) - 1).low;
            }
        }
        /* A tile of scores, whose columns begin at `first`. */
        template <class Scores> __device__ __forceinline__ void finish(const Score &score, Scores &s, int first) const {
            score.finish(s, first, [&](int slot) { return slope[slot]; }, [&](int slot) { return position[slot]; });
            if (!all_see.covers<WINDOW>(first, first + KEYS))
                hide<WINDOW>(s, -INFINITE, first, [&](int slot) { return sees[slot]; });
        }
    };
    /* Padding from row `first` on: zeros. By the first threads of the block. */
    __device__ __forceinline__ void clear_padding(int first, int threads) const {
        constexpr int CHUNKS = VALUE_DIM / 8;
#pragma unroll 1
        for (int i = first * CHUNKS + thread_in_block(); i < padded_rows * CHUNKS; i += threads) {
            global_store(output(i / CHUNKS) + i % CHUNKS * 8, Chunk{});
            if (i % CHUNKS == 0) store_lse(i / CHUNKS, -INFINITE);
        }
    }
};

} // namespace aiter

#endif
