/* Decoding: which block reads what, and where it leaves parts of a result. See attention_decode.hip. */
#ifndef AITER_GPU_DECODE_SCHEDULE_H
#define AITER_GPU_DECODE_SCHEDULE_H

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
#endif

namespace aiter {

#if defined(AITER_LATENT)
using Tile = LatentDecode;
#else
using Tile = Decode<HEAD_DIM, VALUE_DIM>;
#endif
constexpr int KEYS = Tile::KEYS, WAVES = Tile::WAVES, THREADS = WAVES * WAVE;
constexpr int TEAMS = WAVES / Tile::TEAM; /* waves of a team share rows and keys, and split the columns of V */
constexpr int STEP_KEYS = TEAMS * KEYS, PART_ROWS = TEAMS * Tile::ROWS;

/* Shared memory of a block: first for the tiles, if they pass through it, then for what waves hand to each other. */
template <int HEAD_DIM, int VALUE_DIM> struct DecodeMemory {
    using Tile = Decode<HEAD_DIM, VALUE_DIM>;
    using Output = typename Tile::Output;
    using Stream = KeyValueStream<HEAD_DIM, VALUE_DIM, KeyValueRows<PAGED>>;
    static constexpr int EXCHANGED = Output::SLOTS * (Output::VALUES + 2); /* floats of a lane: O, maximum, sum */
    static constexpr int EXCHANGE_BYTES = Tile::WAVES > Tile::TEAM ? Tile::WAVES / 2 * EXCHANGED *WAVE * 4 : 0;
    static constexpr int SHARED_BYTES = greater(Stream::SHARED_BYTES, EXCHANGE_BYTES);
};

/* batch_invariant: units are cut at the multiples of this many keys, wherever their blocks are, and have one row tile,
 * so that nothing about a row depends on what else there is. */
constexpr int INVARIANT_KEYS = 1024;
static_assert(INVARIANT_KEYS % STEP_KEYS == 0, "whole steps");

/* A unit is not cut into parts smaller than this many steps, on average: merging would cost more than it gains. */
constexpr int LEAST_STEPS = KEYS < 64 ? 4 : 2;

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

/* How many blocks share the steps. Where there are nearly as many units as there could be blocks, one for each: units
 * of equal length are then not cut. */
__host__ __device__ inline int64_t blocks_for(const aiter_attention_problem &p, int64_t units, int64_t steps,
                                              int64_t most) {
    if (p.batch_invariant) return steps;
    const int64_t useful = steps / LEAST_STEPS > units ? steps / LEAST_STEPS : units;
    return units <= most && units >= most - most / 16 ? units : useful < most ? useful : most;
}

/* The keys that steps are counted over: those that any row of the sequence sees. */
__device__ __forceinline__ Range keys_to_read(const aiter_attention_problem &p, const Mask &mask) {
    Range keys = {0, mask.keys};
    if (WINDOW) keys = mask.keys_of_any(0, mask.rows);
    if (WINDOW && p.batch_invariant) keys.low -= keys.low % INVARIANT_KEYS;
    return keys;
}
/* At most so many. */
inline int most_keys_to_read(const aiter_attention_problem &p) {
    int64_t most = p.seqlen_k;
    if (WINDOW && p.window_left >= 0 && p.window_right >= 0)
        most = lesser<int64_t>(most, int64_t(p.window_left) + p.window_right + p.seqlen_q);
    if (CHUNK) most = lesser<int64_t>(most, 2 * int64_t(p.attention_chunk) + p.seqlen_q);
    if (WINDOW && p.batch_invariant) most = lesser<int64_t>(most + INVARIANT_KEYS, INT32_MAX);
    return static_cast<int>(most);
}

/* All steps, numbered through: by sequence, then unit. The host has seen to it that 32 bits count them. */
struct Schedule {
    const aiter_attention_problem &problem;
    const Side queries, keys;
    const int32_t *offsets;
    int parts;         /* of the rows */
    int units;         /* of a sequence */
    int steps, blocks; /* of all sequences; blocks that have a range of them */
    int each, longer;  /* steps in a range; that many ranges at the beginning have one more */

    struct Place { /* of a step */
        int batch;
        int begin; /* first step of this sequence */
        int steps; /* of each of its units */
    };

    __device__ __forceinline__ Schedule(const Arguments &a, int grid)
        : problem(a.problem), queries(query_side(a.problem, a.tensors)), keys(key_side(a.problem, a.tensors)),
          offsets(a.tensors.query_offsets), parts(row_parts(problem)), units(problem.heads_kv * parts) {
        steps = find(problem.batch, INT32_MAX).begin;
        blocks = static_cast<int>(blocks_for(problem, problem.batch * units, steps, grid));
        each = steps / blocks;
        longer = steps - each * blocks;
    }
    __device__ __forceinline__ int range_begin(int block) const { return block * each + lesser(block, longer); }
    __device__ __forceinline__ int block_of(int step) const {
        const int ordinary = step - longer * (each + 1);
        return ordinary < 0 ? step / (each + 1) : longer + ordinary / each;
    }
    __device__ __forceinline__ bool all_alike() const {
        const bool same_keys = keys.lengths == nullptr && keys.starts == nullptr;
        return same_keys && (!WINDOW || queries.lengths == nullptr && queries.starts == nullptr && offsets == nullptr);
    }
    __device__ __forceinline__ int steps_in(int batch) const {
        const Mask mask(problem, WINDOW ? length_of(queries, batch) : 0, length_of(keys, batch),
                        WINDOW ? offsets : nullptr, batch);
        const Range range = keys_to_read(problem, mask);
        return steps_of(problem, range.high - range.low);
    }
    /* The sequence that a step belongs to, or sequence `wanted` where that comes first. Past the last one: where all
     * steps end. By a whole wave. */
    __device__ __forceinline__ Place find(int wanted, int step) const {
        if (all_alike()) {
            const int alike = steps_in(0);
            const int batch = step == INT32_MAX ? wanted : lesser(step / (alike * units), wanted);
            return {batch, batch * alike * units, alike};
        }
        int begin = 0;
#pragma unroll 1
        for (int base = 0; base < problem.batch; base += WAVE) {
            const int batch = base + lane();
            const int own = batch < problem.batch ? steps_in(batch) * units : 0;
            int sum = own;
#pragma unroll
            for (int distance = 1; distance < WAVE; distance *= 2) {
                const int other = from_lane(sum, (lane() - distance) & (WAVE - 1));
                if (lane() >= distance) sum += other;
            }
            const uint64_t found = ballot(batch < problem.batch && (step < begin + sum || batch == wanted));
            if (found != 0) {
                const int there = first_lane(found), its = uniform(from_lane(own, there));
                return {base + there, begin + uniform(from_lane(sum, there)) - its, its / units};
            }
            begin += uniform(from_lane(sum, WAVE - 1));
        }
        return {problem.batch, begin, 1};
    }
};

/* Parts of units in the workspace: block b has two places, 0 for a unit that began before its range and 1 for one that
 * goes on after it; with batch_invariant, where its range is one step, just one. Output not yet divided by the sum, in
 * fp32; maximum and sum of each row. */
struct Parts {
    float *output, *softmax;
    int rows, places;
    static __host__ __device__ int places_of(const aiter_attention_problem &p) { return p.batch_invariant ? 1 : 2; }
    static int64_t bytes(const aiter_attention_problem &p, int64_t blocks) {
        return blocks * places_of(p) * rows_of_unit(p) * (VALUE_DIM + 2) * static_cast<int64_t>(sizeof(float));
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
    int batch, group, first_head;
    Sequence sequence;                /* of the first head */
    int first_row, rows, padded_rows; /* of this part of the rows; padded_rows are written */

    __device__ __forceinline__ Unit(const Arguments &a, int batch, int index, int parts)
        : arguments(a), batch(batch), group(a.problem.heads_q / a.problem.heads_kv), first_head(index / parts * group),
          sequence(a, batch, first_head), first_row(index % parts * most_rows(a.problem)),
          rows(clamp(sequence.rows * group - first_row, 0, most_rows(a.problem))),
          padded_rows(clamp(sequence.padded_rows * group - first_row, 0, most_rows(a.problem))) {}

    /* Here rows count from the first of this part. */
    __device__ __forceinline__ int token(int row) const { return (first_row + row) / group; }
    __device__ __forceinline__ int head(int row) const { return (first_row + row) % group; }
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
     * whole wave, for one row; true if the row was then computed again and stored. */
    __device__ __forceinline__ bool repair(int row, const Score &score, float log_sum) const {
        const Sequence own = of_head(head(row));
        const Range sees = own.mask.keys_of(token(row));
        const Range read = keys_to_read(arguments.problem, own.mask);
        const bool hidden =
            values_not_finite(own, sees.high, read.high) || WINDOW && values_not_finite(own, read.low, sees.low);
        const Dropout none(arguments.problem, arguments.tensors);
        if (hidden) exact_row(own, token(row), score, none, log_sum, share(row, log_sum));
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
    /* Padding from row `first` on: zeros. By the whole block. */
    __device__ __forceinline__ void clear_padding(int first) const {
        constexpr int CHUNKS = VALUE_DIM / 8;
#pragma unroll 1
        for (int i = first * CHUNKS + thread_in_block(); i < padded_rows * CHUNKS; i += THREADS) {
            global_store(output(i / CHUNKS) + i % CHUNKS * 8, Chunk{});
            if (i % CHUNKS == 0) store_lse(i / CHUNKS, -INFINITE);
        }
    }
};

} // namespace aiter

#endif
