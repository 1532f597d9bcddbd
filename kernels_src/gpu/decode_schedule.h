/* Decoding: which block reads what, and where it leaves parts of a result. See attention_decode.hip. */
#ifndef AITER_GPU_DECODE_SCHEDULE_H
#define AITER_GPU_DECODE_SCHEDULE_H

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
using Tile = Decode<HEAD_DIM>;
using Problem = Sequence<CAUSAL, PAGED>;
constexpr int KEYS = Tile::KEYS, WAVES = Tile::WAVES, THREADS = WAVES * WAVE;
constexpr int STEP_KEYS = WAVES * KEYS, PART_ROWS = WAVES * Tile::ROWS;

/* A unit is not cut into parts smaller than this many steps, on average: merging would cost more than it gains. */
constexpr int LEAST_STEPS = 4;

__host__ __device__ inline int64_t all_rows(const aiter_attention_problem &p) { /* of a KV head in a sequence */
    return static_cast<int64_t>(p.seqlen_q) * (p.heads_q / p.heads_kv);
}
/* Those that one unit has; more than that are several units. */
__host__ __device__ inline int rows_of_unit(const aiter_attention_problem &p) {
    return static_cast<int>(all_rows(p) < PART_ROWS ? all_rows(p) : PART_ROWS);
}
__host__ __device__ inline int row_parts(const aiter_attention_problem &p) {
    return static_cast<int>((all_rows(p) + PART_ROWS - 1) / PART_ROWS);
}
/* Steps of a unit with this many keys: at least one, which writes the output where there is nothing to read. */
__host__ __device__ inline int steps_of(int keys) { return keys > STEP_KEYS ? (keys - 1) / STEP_KEYS + 1 : 1; }

/* How many blocks share the steps. */
__host__ __device__ inline int64_t blocks_for(int64_t units, int64_t steps, int64_t most) {
    const int64_t useful = steps / LEAST_STEPS > units ? steps / LEAST_STEPS : units;
    return useful < most ? useful : most;
}

/* All steps, numbered through: by sequence, then unit. The host has seen to it that 32 bits count them. */
struct Schedule {
    const aiter_attention_problem &problem;
    const int32_t *lengths; /* null: all alike */
    int parts;              /* of the rows */
    int units;              /* of a sequence */
    int steps, blocks;      /* of all sequences; blocks that have a range of them */
    int each, longer;       /* steps in a range; that many ranges at the beginning have one more */

    struct Place { /* of a step */
        int batch;
        int begin; /* first step of this sequence */
        int steps; /* of each of its units */
    };

    __device__ __forceinline__ Schedule(const Arguments &a, int grid)
        : problem(a.problem), lengths(a.tensors.seqlens_k), parts(row_parts(problem)), units(problem.heads_kv * parts) {
        steps = find(problem.batch, INT32_MAX).begin;
        blocks = static_cast<int>(blocks_for(problem.batch * units, steps, grid));
        each = steps / blocks;
        longer = steps - each * blocks;
    }
    __device__ __forceinline__ int range_begin(int block) const { return block * each + lesser(block, longer); }
    __device__ __forceinline__ int block_of(int step) const {
        const int ordinary = step - longer * (each + 1);
        return ordinary < 0 ? step / (each + 1) : longer + ordinary / each;
    }
    __device__ __forceinline__ int steps_in(int batch) const {
        return steps_of(lengths == nullptr ? problem.seqlen_k : clamp(lengths[batch], 0, problem.seqlen_k));
    }
    /* The sequence that a step belongs to, or sequence `wanted` where that comes first. Past the last one: where all
     * steps end. By a whole wave. */
    __device__ __forceinline__ Place find(int wanted, int step) const {
        if (lengths == nullptr) {
            const int alike = steps_of(problem.seqlen_k);
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
 * goes on after it. Output not yet divided by the sum, in fp32; maximum and sum of each row. */
struct Parts {
    float *output, *softmax;
    int rows;
    static int64_t bytes(int64_t blocks, int rows) {
        return blocks * 2 * rows * (HEAD_DIM + 2) * static_cast<int64_t>(sizeof(float));
    }
    __device__ __forceinline__ Parts(const Arguments &a, int grid) : rows(rows_of_unit(a.problem)) {
        output = static_cast<float *>(a.tensors.workspace);
        softmax = output + static_cast<int64_t>(grid) * 2 * rows * HEAD_DIM;
    }
    __device__ __forceinline__ int64_t index(int block, int place, int row) const {
        return (block * int64_t(2) + place) * rows + row;
    }
    __device__ __forceinline__ float *output_row(int block, int place, int row) const {
        return output + index(block, place, row) * HEAD_DIM;
    }
    __device__ __forceinline__ float *softmax_row(int block, int place, int row) const {
        return softmax + index(block, place, row) * 2;
    }
};

/* A unit: rows of the query that share a KV head. Row r is query token r / group of head first_head + r % group. */
struct Unit {
    const Arguments &arguments;
    int batch, group, first_head;
    Problem sequence;                 /* of the first head */
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
    /* A row that is NaN though its log-sum-exp is finite: was it a masked value, 0 * inf in a matrix product? By a
     * whole wave, for one row; true if the row was then computed again and stored. */
    __device__ __forceinline__ bool repair(int row, float log_sum) const {
        const Problem own(arguments, batch, first_head + head(row));
        const bool masked = values_not_finite<HEAD_DIM>(own, own.visible(token(row)), own.keys.count);
        if (masked) exact_row<HEAD_DIM>(own, token(row), arguments.problem.softmax_scale * LOG2_E, log_sum);
        return masked;
    }
};

} // namespace aiter

#endif
