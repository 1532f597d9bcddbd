/* Attention backward on the CPU: every layout of aiter_abi.h but pages, without ever storing a score matrix.
 *
 * Units of work depend on the problem alone and are taken from a counter, so that any number of threads gives the same
 * bits. A (sequence, KV head) pair is a head here; rows are the query rows of all query heads that share it.
 *
 *   first    unit (head, block of rows)      lse and delta of each row, to the workspace; zeros where nothing is seen
 *   then     unit (tile of keys, head)       K^T, V^T, K of the tile packed; dK^T, dV^T in L2
 *                for each block of rows that sees the tile, last block first:
 *                    pack Q, dO                                        (L2)
 *                    gather: S, dP, P, dS (L1), dK^T and dV^T          (backward_block.h)
 *                    wait until the tile before this one has added its part of the block's dQ
 *                    dQ += dS K                                        (workspace, fp32)
 *                    the last tile that the block sees writes the rows of dQ
 *                write the rows of dK and dV
 *
 * A unit waits for units with smaller numbers only, and those were all taken before it: somebody is at work on them.
 * Tiles of one head are far apart in the order of units and go through the blocks in step, so waits are rare and short.
 */
#define AITER_BACKWARD 1

#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "backward_block.h"
#include "launch_errors.h"
#include "mask.h"
#include "parallel.h"
#include "score.h"
#include "sequence.h"

namespace {

constexpr int64_t TARGET_UNITS = 32; /* tiles are made smaller where there are fewer */

/* How a problem is cut into units, and where things lie in the workspace. */
struct Schedule {
    int64_t group, heads, blocks, tile_keys, tiles;
    int64_t rows; /* of one KV head in all sequences, as far as they need memory */
    int64_t first_tile_unit, units;
    int64_t rows_at, progress_at, lse_at, rest_at, delta_at, grad_queries_at, workspace_bytes;

    explicit Schedule(const aiter_attention_problem &p) {
        group = p.heads_kv > 0 ? p.heads_q / p.heads_kv : 0;
        heads = static_cast<int64_t>(p.batch) * p.heads_kv;
        blocks = ceil_div(p.seqlen_q * group, BLOCK_ROWS);
        int64_t strips = TILE_STRIPS;
        if (!p.batch_invariant)
            while (strips > 2 && heads * ceil_div(p.seqlen_k, strips * STRIP_ROWS) < TARGET_UNITS) strips--;
        tile_keys = strips * STRIP_ROWS;
        tiles = ceil_div(p.seqlen_k, tile_keys);
        if (tiles > 0 && !p.batch_invariant) tile_keys = ceil_div(ceil_div(p.seqlen_k, tiles), STRIP_ROWS) * STRIP_ROWS;
        first_tile_unit = heads * blocks;
        units = first_tile_unit + heads * tiles;
        const int64_t all_rows = (p.packed_q ? p.total_q : p.batch * static_cast<int64_t>(p.seqlen_q)) * group;
        rows = all_rows + p.batch * static_cast<int64_t>(KEY_MULTIPLE);
        rows_at = aligned(Sequences::workspace_bytes(p));
        progress_at = aligned(rows_at + (p.batch + 1) * static_cast<int64_t>(sizeof(int64_t)));
        lse_at = aligned(progress_at + heads * blocks * static_cast<int64_t>(sizeof(int32_t)));
        rest_at = aligned(lse_at + p.heads_kv * rows * static_cast<int64_t>(sizeof(float)));
        delta_at = aligned(rest_at + p.heads_kv * rows * static_cast<int64_t>(sizeof(float)));
        grad_queries_at = aligned(delta_at + p.heads_kv * rows * static_cast<int64_t>(sizeof(float)));
        workspace_bytes = grad_queries_at + p.heads_kv * rows * WIDTH * static_cast<int64_t>(sizeof(float));
    }
};

/* One thread's buffers. */
struct Scratch {
    char *memory = nullptr;
    int64_t bytes = 0;
    KeyTile tile{};
    RowBlock block{};
    Weights weights{};

    explicit Scratch(const Schedule &schedule) {
        place(schedule); /* counts bytes */
        memory = static_cast<char *>(aligned_alloc(ALIGNMENT, bytes));
        bytes = 0;
        if (memory) place(schedule);
    }
    ~Scratch() { free(memory); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;

    template <class T> void take(T *&pointer, int64_t count) {
        if (memory) pointer = reinterpret_cast<T *>(memory + bytes);
        bytes += aligned(count * static_cast<int64_t>(sizeof(T)));
    }

    void place(const Schedule &schedule) {
        take(tile.keys_t, schedule.tile_keys * DIM_STEPS);
        take(tile.values_t, schedule.tile_keys * VALUE_STEPS);
        take(tile.keys, TILE_STEPS * WIDTH);
        take(tile.grad_keys_t, schedule.tile_keys * DIM);
        take(tile.grad_values_t, schedule.tile_keys * VALUE_WIDTH);
        take(block.queries, BLOCK_ROWS * DIM_STEPS);
        take(block.grads, BLOCK_ROWS * VALUE_STEPS);
        take(block.queries_t, BLOCK_ROW_STEPS * DIM);
        take(block.grads_t, BLOCK_ROW_STEPS * VALUE_WIDTH);
        take(block.high, BLOCK_ROWS);
        take(block.low, WINDOW ? BLOCK_ROWS : 0);
        take(block.place, ALIBI ? BLOCK_ROWS : 0);
        take(block.slope, ALIBI ? BLOCK_ROWS : 0);
        take(block.row, DROPOUT ? BLOCK_ROWS : 0);
        take(block.head, DROPOUT ? BLOCK_ROWS : 0);
        take(weights.scores, BLOCK_ROWS * STRIP_ROWS);
        take(weights.grads, BLOCK_ROWS * STRIP_ROWS);
        take(weights.right, BLOCK_ROW_STEPS * STRIP_ROWS);
        take(weights.grad_right, BLOCK_ROW_STEPS * STRIP_ROWS);
        take(weights.grad_left, BLOCK_ROWS * LEFT_ROW);
    }
};

/* One (sequence, KV head) pair: its rows in every tensor and in the workspace. */
struct Head {
    Sequence seq;
    int64_t rows; /* query rows of the group */
    int64_t batch, first_query_head;
    Rows query, output, grad_output, grad_query, key, value, grad_key, grad_value;
    const float *lse, *grad_lse; /* token 0 of the first query head; grad_lse may be null */
    int64_t lse_head_stride;
    float *row_lse, *row_rest, *row_delta, *grad_queries;
    int32_t *progress; /* per block: 0, then 1 when its rows are prepared, then one more for each tile in dQ */
};

struct Backward {
    const aiter_attention_grad_problem &problem;
    const aiter_attention_problem &forward;
    const aiter_attention_grad_tensors &tensors;
    const Schedule schedule;
    const Sequences sequences;
    const Mask mask;
    const Score score;
    const Dropout dropout;
    int64_t *first_rows;   /* of each sequence in the workspace */
    int64_t next_unit = 0; /* taken atomically */

    Backward(const aiter_attention_grad_problem &p, const aiter_attention_grad_tensors &t)
        : problem(p), forward(p.forward), tensors(t), schedule(p.forward), sequences(p.forward, t, t.workspace),
          mask(p.forward), score(p.forward, t.alibi_slopes), dropout(p.forward, t.rng_state),
          first_rows(at<int64_t>(schedule.rows_at)) {
        first_rows[0] = 0;
        for (int64_t b = 0; b < forward.batch; b++)
            first_rows[b + 1] =
                first_rows[b] + ceil_div(sequences[b].tokens_q * schedule.group, KEY_MULTIPLE) * KEY_MULTIPLE;
        memset(at<int32_t>(schedule.progress_at), 0, schedule.heads * schedule.blocks * sizeof(int32_t));
        sequences.for_rest_q(forward.total_q, [&](int64_t token) {
            clear<HEAD_DIM>(t.grad_query, p.grad_query_strides, token, forward.heads_q);
        });
        sequences.for_rest_k(forward.total_k, [&](int64_t token) {
            clear<HEAD_DIM>(t.grad_key, p.grad_key_strides, token, forward.heads_kv);
            clear<VALUE_DIM>(t.grad_value, p.grad_value_strides, token, forward.heads_kv);
        });
    }

    template <class T> T *at(int64_t offset) const {
        return reinterpret_cast<T *>(static_cast<char *>(tensors.workspace) + offset);
    }

    /* All heads of a row of a packed tensor. */
    template <int N> static void clear(void *tensor, const int64_t *strides, int64_t token, int64_t heads) {
        const Rows rows(tensor, strides, 0, token, 0, heads);
        for (int64_t head = 0; head < heads; head++) memset(rows[head], 0, N * sizeof(Element));
    }

    Head head(int64_t index) const {
        const int64_t b = index / forward.heads_kv, h = index % forward.heads_kv, group = schedule.group;
        const Sequence seq = sequences[b];
        const int64_t bq = forward.packed_q ? 0 : b, bk = forward.packed_k ? 0 : b;
        const int64_t lse_at = bq * forward.lse_strides[0] + h * group * forward.lse_strides[1] + seq.first_q;
        const int64_t row = h * schedule.rows + first_rows[b];
        return {seq,
                seq.tokens_q * group,
                b,
                h * group,
                Rows(tensors.query, forward.query_strides, bq, seq.first_q, h, group),
                Rows(tensors.output, forward.output_strides, bq, seq.first_q, h, group),
                Rows(tensors.grad_output, problem.grad_output_strides, bq, seq.first_q, h, group),
                Rows(tensors.grad_query, problem.grad_query_strides, bq, seq.first_q, h, group),
                Rows(tensors.key, forward.key_strides, bk, seq.first_k, h, 1),
                Rows(tensors.value, forward.value_strides, bk, seq.first_k, h, 1),
                Rows(tensors.grad_key, problem.grad_key_strides, bk, seq.first_k, h, 1),
                Rows(tensors.grad_value, problem.grad_value_strides, bk, seq.first_k, h, 1),
                tensors.lse + lse_at,
                tensors.grad_lse ? tensors.grad_lse + lse_at : nullptr,
                forward.lse_strides[1],
                at<float>(schedule.lse_at) + row,
                at<float>(schedule.rest_at) + row,
                at<float>(schedule.delta_at) + row,
                at<float>(schedule.grad_queries_at) + row * WIDTH,
                at<int32_t>(schedule.progress_at) + index * schedule.blocks};
    }

    /* Takes units until none is left: what each thread does. */
    void operator()() {
        Scratch scratch(schedule);
        if (!scratch.memory) return; /* another thread may have had more luck */
        const Tiles tiles;
        (void)tiles;
        for (;;) {
            const int64_t unit = __atomic_fetch_add(&next_unit, 1, __ATOMIC_RELAXED);
            if (unit >= schedule.units) return;
            const int64_t tile_unit = unit - schedule.first_tile_unit;
            if (tile_unit < 0) prepare(head(unit / schedule.blocks), unit % schedule.blocks);
            else run_tile(head(tile_unit % schedule.heads), tile_unit / schedule.heads, scratch);
        }
    }

    /* lse and delta of a block of rows; zeros for rows that get no gradient from any tile. */
    void prepare(const Head &h, int64_t block) const {
        const int64_t first = block * BLOCK_ROWS, end = minimum(first + BLOCK_ROWS, h.rows);
        if (!forward.packed_q)
            for (int64_t row = first > h.rows ? first : h.rows;
                 row < minimum(first + BLOCK_ROWS, forward.seqlen_q * schedule.group); row++)
                memset(h.grad_query[row], 0, HEAD_DIM * sizeof(Element)); /* padding */
        const KeyRange seen = first < end ? visible(h, block).some : KeyRange{0, 0};
        for (int64_t row = first; row < end; row++) {
            const int64_t token = row / schedule.group, at = row % schedule.group * h.lse_head_stride + token;
            const Element *output = h.output[row], *grad_output = h.grad_output[row];
            Vec total = Vec{};
            for (int d = 0; d < VALUE_DIM; d += LANES)
                total += to_floats(output + d, VALUE_DIM - d) * to_floats(grad_output + d, VALUE_DIM - d);
            const KeyRange keys = mask.seen_by(h.seq, token);
            const bool blind = keys.low >= keys.high;
            /* A row that sees keys and yet has an infinite lse has infinite scores: its softmax is inf/inf or 0/0. */
            const float lse = h.lse[at] - h.lse[at] == 0.0f ? h.lse[at] : __builtin_nanf("");
            const double exact = lse * LOG2_E;
            h.row_lse[row] = blind ? INFINITE : static_cast<float>(exact);
            h.row_rest[row] = blind ? 1.0f : static_cast<float>(1.0 + (h.row_lse[row] - exact) * LN_2);
            h.row_delta[row] = blind ? 0.0f : (whole(h) ? 0.0f : sum(total)) - (h.grad_lse ? h.grad_lse[at] : 0.0f);
            if (seen.low >= seen.high) memset(h.grad_query[row], 0, HEAD_DIM * sizeof(Element));
        }
        for (int64_t row = end; first < end && row < ceil_div(end, KEY_MULTIPLE) * KEY_MULTIPLE; row++) {
            h.row_lse[row] = INFINITE;
            h.row_rest[row] = 1.0f;
            h.row_delta[row] = 0.0f;
        }
        __atomic_store_n(&h.progress[block], 1, __ATOMIC_RELEASE);
    }

    /* Whether one strip holds all keys of the softmax, and float32 is worth the trouble. */
    bool whole(const Head &h) const { return FULL_PRECISION && !problem.lse_is_given && h.seq.tokens_k <= STRIP_ROWS; }

    Visibility visible(const Head &h, int64_t block) const {
        const int64_t first = block * BLOCK_ROWS, end = minimum(first + BLOCK_ROWS, h.rows);
        return Visibility(mask, h.seq, first / schedule.group, (end - 1) / schedule.group);
    }

    static void wait_for(const int32_t &progress, int32_t wanted) {
        for (int spins = 0; __atomic_load_n(&progress, __ATOMIC_ACQUIRE) < wanted; spins++)
            if (spins >= 256) sched_yield(); /* more threads than cores, perhaps */
    }

    void run_tile(const Head &h, int64_t index, Scratch &scratch) const {
        KeyTile &tile = scratch.tile;
        tile.first = index * schedule.tile_keys;
        const int64_t end = minimum(tile.first + schedule.tile_keys, forward.seqlen_k);
        if (!forward.packed_k)
            for (int64_t key = tile.first > h.seq.tokens_k ? tile.first : h.seq.tokens_k; key < end;
                 key++) { /* padding */
                memset(h.grad_key[key], 0, HEAD_DIM * sizeof(Element));
                memset(h.grad_value[key], 0, VALUE_DIM * sizeof(Element));
            }
        tile.count = static_cast<int>(minimum(end, h.seq.tokens_k) - tile.first);
        if (tile.count <= 0) return;
        const KeyRange seen = h.rows > 0 ? Visibility(mask, h.seq, 0, h.seq.tokens_q - 1).some : KeyRange{0, 0};
        tile.seen = {static_cast<int>(clamp(seen.low - tile.first, 0, tile.count)),
                     static_cast<int>(clamp(seen.high - tile.first, 0, tile.count))};
        tile.vectors = round_up((tile.count + LANES - 1) / LANES, STRIP_MULTIPLE);
        pack_columns<HEAD_DIM>(tile.keys_t, h.key, tile, score.sign);
        pack_columns<VALUE_DIM>(tile.values_t, h.value, tile, 1.0f);
        pack_rows(tile.keys, h.key, tile);
        const int64_t lanes = ceil_div(tile.vectors, STRIP_VECTORS) * STRIP_ROWS;
        memset(tile.grad_keys_t, 0, lanes * DIM * sizeof(float));
        memset(tile.grad_values_t, 0, lanes * VALUE_WIDTH * sizeof(float));
        for (int64_t block = ceil_div(h.rows, BLOCK_ROWS) - 1; block >= 0; block--) {
            scratch.block.seen = visible(h, block);
            const KeyRange &seen = scratch.block.seen.some;
            if (seen.high <= tile.first) break; /* and earlier rows see no later keys */
            if (WINDOW && (seen.low >= tile.first + tile.count || seen.low >= seen.high)) continue;
            run_block(h, block, index, scratch);
        }
        write_columns<HEAD_DIM>(h.grad_key, tile, tile.grad_keys_t, forward.softmax_scale);
        write_columns<VALUE_DIM>(h.grad_value, tile, tile.grad_values_t, dropout.scale);
    }

    /* A block of rows that sees the tile. */
    void run_block(const Head &h, int64_t index, int64_t tile_index, Scratch &scratch) const {
        const KeyTile &tile = scratch.tile;
        RowBlock &block = scratch.block;
        const int64_t first = index * BLOCK_ROWS;
        const int count = static_cast<int>(minimum(BLOCK_ROWS, h.rows - first));
        block.rows = round_up(count, KEY_MULTIPLE);
        block.whole = whole(h);
        const bool few = is_short(h.seq.tokens_k) || (FULL_PRECISION && !forward.batch_invariant &&
                                                      forward.seqlen_q * schedule.group <= MAX_ROWS); /* rows */
        block.score_part = few ? SHORT_PART : SCORE_PART;
        block.grad_part = few ? SHORT_PART : GRAD_PART;
        block.lse = h.row_lse + first;
        block.rest = h.row_rest + first;
        block.delta = h.row_delta + first;
        const Element *queries[BLOCK_ROWS], *grads[BLOCK_ROWS];
        for (int r = 0; r < block.rows; r++) { /* rows of padding are like the last one, but their weights are zero */
            const int64_t row = first + minimum(r, count - 1), token = row / schedule.group;
            const KeyRange seen = mask.seen_by(h.seq, token);
            queries[r] = seen.low < seen.high ? h.query[row] : NO_ROW;
            grads[r] = seen.low < seen.high ? h.grad_output[row] : NO_ROW;
            block.high[r] = static_cast<int32_t>(seen.high);
            if (WINDOW) block.low[r] = static_cast<int32_t>(seen.low);
            const int64_t head = h.first_query_head + row % schedule.group;
            if (ALIBI) {
                block.place[r] = place_of(h.seq, token);
                block.slope[r] = score.slope(h.batch, head);
            }
            if (DROPOUT) {
                block.row[r] = static_cast<int32_t>(token);
                block.head[r] = static_cast<int32_t>(h.batch * forward.heads_q + head);
            }
        }
        pack_row_steps<HEAD_DIM>(block.queries, queries, count);
        pack_row_steps<VALUE_DIM>(block.grads, grads, count);
        pack_step_rows<HEAD_DIM>(block.queries_t, queries, count);
        pack_step_rows<VALUE_DIM>(block.grads_t, grads, count);
        wait_for(h.progress[index], 1);
        const TileKeys keys = gather(tile, block, scratch.weights, score, dropout);
        /* How many tiles that the block sees come before this one. */
        const int32_t before =
            static_cast<int32_t>(tile_index - (WINDOW ? block.seen.some.low / schedule.tile_keys : 0));
        wait_for(h.progress[index], 1 + before);
        float *grad_queries = h.grad_queries + first * WIDTH;
        add_grad_queries(grad_queries, tile, block, scratch.weights, keys, before > 0);
        if (block.seen.some.high <= tile.first + tile.count)
            write_grad_queries(h.grad_query, first, count, grad_queries, forward.softmax_scale);
        else __atomic_store_n(&h.progress[index], 2 + before, __ATOMIC_RELEASE);
    }
};

} // namespace

AITER_EXPORT void aiter_describe(aiter_description *description) {
    *description = {AITER_ABI_VERSION, sizeof(aiter_call)};
}

AITER_EXPORT int64_t aiter_workspace_bytes(const aiter_call *call) {
    return Schedule(call->problem.forward).workspace_bytes;
}

AITER_EXPORT int aiter_launch(const aiter_call *call, void *executor) {
    const aiter_cpu_executor *cpu = static_cast<const aiter_cpu_executor *>(executor);
    if (!Tiles::permitted()) return NO_TILES;
    Backward backward(call->problem, call->tensors);
    const aiter_attention_problem &problem = call->problem.forward;
    const Schedule &schedule = backward.schedule;
    const double flops =
        (6.0 * HEAD_DIM + 4.0 * VALUE_DIM) * schedule.heads * schedule.group * problem.seqlen_q * problem.seqlen_k;
    const int64_t threads = flops < SERIAL_FLOPS ? 1 : minimum(cpu->num_threads, schedule.units);
    run_parallel(cpu, static_cast<int>(threads), backward);
    return backward.next_unit < schedule.units ? OUT_OF_MEMORY : OK;
}
