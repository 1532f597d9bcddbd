/* What the blocks of the backward pass work on: rows of two tensors that belong together, and which of them see which.
 *
 * Every pass has the same form. A block owns rows of a pair (x, y) of tensors and lets rows of another pair pass by:
 *
 *                          own x, y            passing x, y        gives
 *   GRAD_QUERY             query, grad_output  key, value          grad_query
 *   GRAD_KEY_VALUE         key, value          query, grad_output  grad_key, grad_value
 *   GRAD_KEY, GRAD_VALUE   the same, one gradient each: for head dimensions that leave no registers for both
 *   GRAD_ALL               as GRAD_KEY_VALUE, and adds each tile's share of grad_query to sums in memory: QuerySums
 *
 * and with P and dS (or their transposes: rows are the own ones, columns the passing ones) of own and passing rows
 *
 *   P = exp2(score(x_own x_passing^T) - LSE)           dS = P * (y_own y_passing^T - delta) * score'
 *   gradient of x_own += dS x_passing                  gradient of y_own += P^ y_passing
 *
 * (with dropout, P where it is kept in the gradient of y, and the product of the ys, times its scale, likewise in dS)
 *
 * where score is that of score.h, the LSE (base 2) and delta = rowsum(output * grad_output) - grad_lse belong to query
 * rows, whichever side they are on. x has HEAD_DIM columns, y VALUE_DIM. */
#ifndef AITER_GPU_BACKWARD_H
#define AITER_GPU_BACKWARD_H

#include "gpu/arch.h"
#include "gpu/mask.h"
#include "gpu/score.h"
#include "gpu/sequence.h"

namespace aiter {

enum Pass { GRAD_QUERY, GRAD_KEY_VALUE, GRAD_KEY, GRAD_VALUE, GRAD_ALL };

__host__ __device__ constexpr bool owns_queries(int pass) { return pass == GRAD_QUERY; }
__host__ __device__ constexpr bool gives_x(int pass) { return pass != GRAD_VALUE; }
__host__ __device__ constexpr bool gives_y(int pass) {
    return pass == GRAD_KEY_VALUE || pass == GRAD_VALUE || pass == GRAD_ALL;
}

/* Tiles begin at multiples of some number, not where the first row is that anyone sees. */
template <int PASS> constexpr bool BEGINS_BEFORE = DROPOUT || PASS == GRAD_ALL;

using GradArguments = aiter_attention_grad_call; /* the kernel parameter */

/* Rows of one head of one sequence in one tensor. */
struct Rows {
    char *row_0;
    int64_t stride; /* bytes */
    __device__ __forceinline__ char *row(int i) const { return row_0 + i * stride; }
};

/* Where many keys share a row's weight, fp16 holds their probabilities badly, and gfx90a's matrix unit, which takes
 * subnormal numbers for 0, not at all below 2^-14. So P is ENLARGED as it is worked out, gradients of scores are
 * made smaller again, and those of values at the end. */
#if defined(AITER_DTYPE_BF16)
constexpr float ENLARGED = 1.0f, ENLARGED_BITS = 0.0f;
#else
constexpr float ENLARGED = 1024.0f, ENLARGED_BITS = 10.0f;
#endif
/* (dP - delta) / ENLARGED, of a delta that is already divided. */
__device__ __forceinline__ float less_delta(float dp, float delta) {
    return ENLARGED == 1.0f ? dp - delta : __builtin_fmaf(dp, 1.0f / ENLARGED, -delta);
}

/* Of a query row, as the workspace holds them: such that what is made of them is ENLARGED, and made smaller again. */
struct alignas(8) LseAndDelta {
    float lse, delta;
};

struct RowPair {
    Rows x, y;
    LseAndDelta *terms; /* of query rows */
    int count;          /* rows from there on count as missing, */
    int begin = 0;      /* and so do those before; only where BEGINS_BEFORE are tiles begun before it */
};

/* One sequence: its rows of the query side (query, output, their gradients) and of the key side. */
struct GradSequence {
    const GradArguments &arguments;
    int batch;
    Extent query, key;
    Mask mask;

    __device__ __forceinline__ GradSequence(const GradArguments &arguments, int batch)
        : arguments(arguments), batch(batch) {
        const aiter_attention_problem &p = arguments.problem.forward;
        query = extent(query_side(p, arguments.tensors), batch);
        key = extent(key_side(p, arguments.tensors), batch);
        mask = Mask(p, query.count, key.count, arguments.tensors.query_offsets, batch);
        mask.diagonal = uniform(mask.diagonal);
    }
    __device__ __forceinline__ Rows rows(const void *tensor, const int64_t (&strides)[3], const Extent &extent,
                                         bool packed, int head) const {
        const int64_t first = head * strides[2] + (packed ? extent.begin * strides[1] : batch * strides[0]);
        return {static_cast<char *>(const_cast<void *>(tensor)) + first * 2, strides[1] * 2};
    }
    __device__ __forceinline__ Rows query_rows(const void *tensor, const int64_t (&strides)[3], int head) const {
        return rows(tensor, strides, query, arguments.problem.forward.packed_q, head);
    }
    __device__ __forceinline__ Rows key_rows(const void *tensor, const int64_t (&strides)[3], int head) const {
        return rows(tensor, strides, key, arguments.problem.forward.packed_k, head);
    }
    /* LSE and delta: a row of all tokens for every query head. */
    static __host__ __device__ __forceinline__ int64_t query_tokens(const aiter_attention_problem &p) {
        return p.packed_q ? p.total_q : int64_t(p.batch) * p.seqlen_q;
    }
    __device__ __forceinline__ LseAndDelta *terms(int head) const {
        const aiter_attention_problem &p = arguments.problem.forward;
        return static_cast<LseAndDelta *>(arguments.tensors.workspace) + head * query_tokens(p) +
               (p.packed_q ? query.begin : int64_t(batch) * p.seqlen_q);
    }
    __device__ __forceinline__ RowPair queries(int head) const {
        return {query_rows(arguments.tensors.query, arguments.problem.forward.query_strides, head),
                query_rows(arguments.tensors.grad_output, arguments.problem.grad_output_strides, head), terms(head),
                query.count};
    }
    /* From the rows of a query head to those of the next. */
    __device__ __forceinline__ void next_head(RowPair &pair) const {
        pair.x.row_0 += arguments.problem.forward.query_strides[2] * 2;
        pair.y.row_0 += arguments.problem.grad_output_strides[2] * 2;
        pair.terms += query_tokens(arguments.problem.forward);
    }
    __device__ __forceinline__ RowPair keys(int head) const {
        return {key_rows(arguments.tensors.key, arguments.problem.forward.key_strides, head),
                key_rows(arguments.tensors.value, arguments.problem.forward.value_strides, head), nullptr, key.count};
    }
    /* Rows of the gradients to be written: past the valid ones they are zeros. */
    __device__ __forceinline__ int padded_queries() const {
        return arguments.problem.forward.packed_q ? query.count : arguments.problem.forward.seqlen_q;
    }
    __device__ __forceinline__ int padded_keys() const {
        return arguments.problem.forward.packed_k ? key.count : arguments.problem.forward.seqlen_k;
    }
};

/* In the workspace: LSE and delta of all query rows, then a row of zeros. */
__host__ __device__ inline int64_t zeros_at(const aiter_attention_problem &p) {
    return (GradSequence::query_tokens(p) * p.heads_q * int64_t(sizeof(LseAndDelta)) + 15) / 16 * 16;
}

/* Where GRAD_ALL adds up the gradients of queries: behind those, in float32, a tile of rows of one head at a time, as
 * its lanes hold them. Blocks add to a tile in a fixed order, so that the sum is the same in every run: `turns` counts
 * those that have. The first does not add but write. A block's place in the order of all blocks is a ticket that it
 * draws when it begins; whom it waits for has drawn one before it.
 *
 * Starts of packed sequences that fall, which only the device sees, give two sequences one tile. Its sums are then
 * anything; but turns only rise, by one for each block of either, and a block waits until there are as many as it has
 * before it, or more: that comes, whoever else counts there. */
struct QuerySums {
    static constexpr int ROWS = 64, COLUMNS = round_up(HEAD_DIM, HEAD_DIM <= 96 ? 16 : 64);
    static constexpr int PARTS = COLUMNS <= 96 ? 1 : 2, PART_COLUMNS = COLUMNS / PARTS;
    static constexpr int PART_BYTES = ROWS * PART_COLUMNS * 4, TILE_BYTES = PARTS * PART_BYTES;
    uint32_t *ticket, *turns;
    char *sums;
    int64_t head_tiles;

    static __host__ __device__ int64_t tiles_of_head(const aiter_attention_problem &p) {
        return p.packed_q ? p.total_q / ROWS + p.batch + 1 : p.batch * ((p.seqlen_q + int64_t(ROWS) - 1) / ROWS);
    }
    static __host__ __device__ int64_t counters(const aiter_attention_problem &p) {
        return 1 + tiles_of_head(p) * p.heads_q;
    }
    static __host__ __device__ int64_t counters_at(const aiter_attention_problem &p) {
        return (zeros_at(p) + HEAD_DIM * 2 + 127) / 128 * 128;
    }
    static __host__ __device__ int64_t sums_at(const aiter_attention_problem &p) {
        return (counters_at(p) + counters(p) * int64_t(sizeof(uint32_t)) + 127) / 128 * 128;
    }
    static int64_t end(const aiter_attention_problem &p) {
        return sums_at(p) + tiles_of_head(p) * p.heads_q * TILE_BYTES;
    }
    __device__ __forceinline__ explicit QuerySums(const GradArguments &arguments) {
        const aiter_attention_problem &p = arguments.problem.forward;
        char *workspace = static_cast<char *>(arguments.tensors.workspace);
        ticket = reinterpret_cast<uint32_t *>(workspace + counters_at(p));
        turns = ticket + 1;
        sums = workspace + sums_at(p);
        head_tiles = tiles_of_head(p);
    }
    /* Of the tile that begins with a sequence's row `row`. Packed sequences begin anywhere: each has its last tile to
     * itself. */
    __device__ __forceinline__ int64_t tile(const GradSequence &sequence, int head, int row) const {
        const aiter_attention_problem &p = sequence.arguments.problem.forward;
        const int64_t first = p.packed_q ? sequence.query.begin / ROWS + sequence.batch
                                         : sequence.batch * ((p.seqlen_q + int64_t(ROWS) - 1) / ROWS);
        return head * head_tiles + first + row / ROWS;
    }
};

/* One block's part of the work on a unit, a KV head of a sequence. */
struct UnitBlock {
    int unit, part;
    bool from_last;
};

/* GRAD_ALL: blocks that a multiprocessor works on at one time. */
#if defined(AITER_WGMMA)
constexpr int ONE_PASS_BLOCKS = 1;
#else
constexpr int ONE_PASS_BLOCKS = HEAD_DIM <= 64 ? 2 : 1;
#endif

/* GRAD_ALL: which ticket gets which block of keys. The blocks of a unit add to a tile of queries in the order of their
 * tickets, and an addition is seen by the next block only some 3 microseconds later, longer than a tile takes: blocks
 * that come to a tile at one time wait for each other, those that come one after the other do not. So tickets are dealt
 * in sets of units, as many as the device works on at one time, a block of each unit in turn; and set after set they
 * change direction. Under a causal mask, in keys (downwards) and tiles of queries (to the right):
 *
 *          a set            the next set
 *     0  < < < < < < <     7  > > > > > > >     Numbers: the order in which tickets are drawn.
 *     1      < < < < <     6      > > > > >     <  The last tile comes first. Blocks come to it one after the other, as
 *     2          < < <     5          > > >        they begin: when the blocks of the set before end, from below.
 *     3              <     4              >     >  The first tile comes first. Each block is two behind the one below.
 *
 * Where blocks have equally many tiles, those of the first set queue up, once. The last set is one of the left kind, so
 * that the shortest blocks fill the gaps at the end. A set's size is part of the order in which gradients are added,
 * and therefore a constant, not the device's. */
struct KeyBlocks {
    static constexpr int AT_ONCE = 128 * ONE_PASS_BLOCKS; /* an H100 has 132 multiprocessors */
    int units, parts, set_units;

    __host__ __device__ KeyBlocks(int units, int parts)
        : units(units), parts(parts), set_units(parts < AT_ONCE ? AT_ONCE / greater(parts, 1) : 1) {}
    __host__ __device__ int sets() const { return (units + set_units - 1) / set_units; }
    __device__ __forceinline__ UnitBlock block(int ticket) const {
        const int set = ticket / (set_units * parts), in_set = ticket - set * set_units * parts;
        const int width = lesser(set_units, units - set * set_units);
        const bool from_last = (sets() - set) % 2 == 0;
        const int part = in_set / width;
        return {set * set_units + in_set % width, from_last ? parts - 1 - part : part, from_last};
    }
};

/* What one block does: `rows` own rows from block_row on, and the passing rows that see them. Blocks with most to do
 * come first: under a causal mask those of the last query rows, or of the first keys. */
template <int PASS, int ROWS, int TOKENS> struct Share {
    GradSequence sequence;
    int kv_head, first_head, query_head, heads_passing;
    int row_block, row_blocks, block_row; /* own side: the block's rows */
    int own_rows, padded_rows;            /* all that exist, all to be written */
    int first, end, tiles; /* passing rows that any own row takes part with, how many tiles; the same for each head */
    bool from_last;        /* GRAD_ALL: which way the unit is gone through, see KeyBlocks */

    static __device__ __forceinline__ int heads(const aiter_attention_problem &problem) { /* that share passing rows */
        return owns_queries(PASS) ? problem.heads_q / problem.heads_kv : 1;
    }
    static __device__ __forceinline__ int blocks(const aiter_attention_problem &problem) {
        return ((owns_queries(PASS) ? problem.seqlen_q : problem.seqlen_k) + ROWS - 1) / ROWS;
    }
    static __device__ __forceinline__ UnitBlock work(const aiter_attention_problem &problem, int block) {
        const int units = problem.batch * problem.heads_kv, parts = heads(problem) * blocks(problem);
        if (PASS == GRAD_ALL) return KeyBlocks(units, parts).block(block);
        const Work work = work_of_block(block, units, parts);
        return {work.unit, work.part, false};
    }
    __device__ __forceinline__ Share(const GradArguments &arguments, int block)
        : sequence(arguments, work(arguments.problem.forward, block).unit / arguments.problem.forward.heads_kv) {
        const aiter_attention_problem &problem = arguments.problem.forward;
        const UnitBlock work = Share::work(problem, block);
        if (PASS == GRAD_ALL) from_last = work.from_last;
        const int group = problem.heads_q / problem.heads_kv;
        row_block = work.part / heads(problem), row_blocks = blocks(problem);
        kv_head = work.unit % problem.heads_kv;
        first_head = kv_head * group;
        query_head = first_head + work.part % heads(problem);
        heads_passing = owns_queries(PASS) ? 1 : group;
        block_row = (owns_queries(PASS) ? row_blocks - 1 - row_block : row_block) * ROWS;
        own_rows = owns_queries(PASS) ? sequence.query.count : sequence.key.count;
        padded_rows = owns_queries(PASS) ? sequence.padded_queries() : sequence.padded_keys();
        const int seen = sees(block_row).low;
        first = seen;
        if (PASS == GRAD_ALL) first -= first % TOKENS; /* the tiles are those of all blocks */
        else if (DROPOUT) first -= first % 16;         /* where four words begin to decide: see dropout.h */
        end = sees(lesser(block_row + ROWS, own_rows) - 1).high;
        /* Where nothing is seen there is no tile, even if one would begin before: nor has a block a turn at it. */
        tiles = block_row < own_rows && end > seen ? (end - first + TOKENS - 1) / TOKENS : 0;
    }
    /* The passing rows that an own row takes part with. GRAD_ALL: a key that is missing takes part with none. It is
     * zeros, but its probabilities may be infinite, and so would be its share of the gradients of queries, times zero. */
    __device__ __forceinline__ Range sees(int own_row) const {
        if (PASS == GRAD_ALL && own_row >= own_rows) return {0, 0};
        return owns_queries(PASS) ? sequence.mask.keys_of(own_row) : sequence.mask.rows_of(own_row);
    }
    /* Those that all of `count` own rows take part with; GRAD_ALL: none, if one of these is missing. */
    __device__ __forceinline__ Range all_see(int first_row, int count) const {
        if (PASS == GRAD_ALL && first_row + count > own_rows) return {0, 0};
        return {sees(lesser(first_row + count, own_rows) - 1).low, sees(first_row).high};
    }
    /* Where an own row stands among the passing ones. */
    __device__ __forceinline__ int position(int own_row) const {
        return owns_queries(PASS) ? own_row + sequence.mask.diagonal : own_row - sequence.mask.diagonal;
    }
    __device__ __forceinline__ float slope(int passing_head) const {
        return alibi_slope(sequence.arguments.problem.forward, sequence.arguments.tensors, sequence.batch,
                           owns_queries(PASS) ? query_head : first_head + passing_head);
    }
    /* Of passing rows' head, as dropout counts heads. */
    __device__ __forceinline__ int drawn_head(int passing_head) const {
        return sequence.batch * sequence.arguments.problem.forward.heads_q +
               (owns_queries(PASS) ? query_head : first_head + passing_head);
    }
    __device__ __forceinline__ RowPair own() const {
        RowPair pair = owns_queries(PASS) ? sequence.queries(query_head) : sequence.keys(kv_head);
        if (PASS == GRAD_ALL) { /* keys that no row sees may be NaN, and meet gradients of 0 */
            const Range seen = sequence.mask.keys_of_any(0, sequence.mask.rows);
            pair.begin = seen.low, pair.count = lesser(pair.count, seen.high);
        }
        return pair;
    }
    /* The first row of a tile. */
    __device__ __forceinline__ int tile_row(int count) const {
        return first + (PASS == GRAD_ALL && !from_last ? tiles - 1 - count : count) * TOKENS;
    }
    /* GRAD_ALL: how many of the unit's blocks come to a tile before this one. */
    __device__ __forceinline__ int turn(int tile_row) const {
        const Range keys = sequence.mask.keys_of_any(tile_row, tile_row + TOKENS);
        return from_last ? (keys.high - 1) / ROWS - row_block : row_block - keys.low / ROWS;
    }
    /* Past `end`, and before the first that any own row takes part with, they count as missing: what nobody sees may be
     * NaN. */
    __device__ __forceinline__ RowPair passing() const {
        RowPair pair = owns_queries(PASS) ? sequence.keys(kv_head) : sequence.queries(first_head);
        pair.count = end;
        if (BEGINS_BEFORE<PASS>) pair.begin = sees(block_row).low;
        return pair;
    }
};

} // namespace aiter

#endif
