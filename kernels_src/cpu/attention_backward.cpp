/* Attention backward on the CPU: dQ, dK and dV from the saved output and log-sum-exp; no score is ever stored.
 *
 * Three phases, each shared by all threads, each in units that depend on the problem alone, so that every run with any
 * number of threads gives the same bits:
 *
 *   measure   unit = (sequence, KV head, rows)    log-sum-exp and delta = sum of dO * O - dLSE of each row, to the
 *                                                 workspace
 *   grade     unit = (sequence, KV head, chunk of the keys)
 *                 for each run of RUN_BLOCKS blocks of keys (K, V, dK, dV of the run in L2)
 *                     for each group of query rows (Q, dO, dQ of the group in L1 and L2)
 *                         for each block: grade_block (gradient.h), five products
 *                     write dK and dV of the run
 *             dQ is a sum over all keys: each chunk leaves its part in the workspace
 *   gather    unit = (sequence, KV head, group of rows)    adds the chunks' parts of dQ in order and writes it
 *
 * The number of chunks is bounded, so the workspace grows linearly with the length of the sequences.
 */
#define AITER_BACKWARD
#include <math.h>
#include <stdlib.h>

#include "gradient.h"
#include "parallel.h"

namespace {

constexpr int RUN_BLOCKS = 256 / BLOCK_KEYS;
constexpr int64_t TARGET_UNITS = 32;    /* units of `grade` worth having; more chunks take more memory */
constexpr int64_t MIN_CHUNK_KEYS = 512; /* fewer keys would not pay for packing all query rows again */
constexpr double SERIAL_FLOPS = 1.0e6;  /* below this, waking a second thread costs more than it brings */
constexpr double LOG2_E = 1.4426950408889634;
constexpr int64_t ALIGNMENT = 64;

enum { OK = 0, OUT_OF_MEMORY = 1, NO_TILES = 2 };

AITER_INLINE int64_t aligned(int64_t bytes) { return ceil_div(bytes, ALIGNMENT) * ALIGNMENT; }

struct Schedule {
    int64_t heads;                /* pairs of sequence and KV head */
    int64_t query_group, rows;    /* query heads per KV head; rows of one KV head, in the longest sequence */
    int64_t groups, chunks;
    int64_t starts_at, terms_at, parts_at, bytes; /* the workspace */

    explicit Schedule(const aiter_attention_problem &p) {
        heads = static_cast<int64_t>(p.batch) * p.heads_kv;
        query_group = p.heads_kv > 0 ? p.heads_q / p.heads_kv : 0;
        rows = p.seqlen_q * query_group;
        groups = ceil_div(rows, GROUP_ROWS);
        chunks = heads > 0 ? clamp(TARGET_UNITS / heads, 1, clamp(p.seqlen_k / MIN_CHUNK_KEYS, 1, TARGET_UNITS)) : 1;
        starts_at = 0;
        terms_at = aligned(2 * (p.batch + 1) * static_cast<int64_t>(sizeof(int64_t)));
        parts_at = terms_at + aligned(2 * heads * groups * GROUP_ROWS * static_cast<int64_t>(sizeof(float)));
        bytes = parts_at + heads * groups * chunks * PART * static_cast<int64_t>(sizeof(float));
    }

    static constexpr int64_t PART = static_cast<int64_t>(DIM) * GROUP_ROWS; /* dQ of a group: [strip][d][row] */
};

/* One thread's buffers. */
struct alignas(ALIGNMENT) Scratch {
    GradBlock blocks[RUN_BLOCKS];
    GradRows rows;
    GradTile tile;
};

/* Rows of one tensor that belong to one sequence and one KV head. */
template <class T>
struct Rows {
    T *first;
    int64_t token_stride, head_stride, group;

    Rows(T *tensor, const int64_t *strides, bool packed, int64_t b, int64_t first_token, int64_t first_head, int64_t heads)
        : first(tensor + (packed ? 0 : b * strides[0]) + first_token * strides[1] + first_head * strides[2]),
          token_stride(strides[1]), head_stride(strides[2]), group(heads) {}
    T *operator[](int64_t row) const { return first + row / group * token_stride + row % group * head_stride; }
};

struct Backward {
    const aiter_attention_grad_problem &grads;
    const aiter_attention_problem &problem;
    const aiter_attention_grad_tensors &tensors;
    const Schedule schedule;
    const int64_t *starts_q, *starts_k; /* packed only */
    float *log_sums, *deltas;           /* [sequence, KV head][row] */
    float *parts;                       /* [sequence, KV head][group of rows][chunk][strip][d][row] */
    float scale_log2;
    bool negated;
    int64_t next[3] = {0, 0, 0}; /* unit of each phase, taken atomically */

    Backward(const aiter_attention_grad_problem &g, const aiter_attention_grad_tensors &t)
        : grads(g), problem(g.forward), tensors(t), schedule(problem), starts_q(nullptr), starts_k(nullptr) {
        negated = problem.softmax_scale < 0.0f; /* as in the forward pass */
        scale_log2 = static_cast<float>(fabs(problem.softmax_scale) * LOG2_E);
        char *workspace = static_cast<char *>(t.workspace);
        int64_t *starts = reinterpret_cast<int64_t *>(workspace + schedule.starts_at);
        if (problem.packed_q) {
            find_starts(t.seqlens_q, problem.batch, problem.seqlen_q, problem.total_q, starts);
            starts_q = starts;
        }
        if (problem.packed_k) {
            find_starts(t.seqlens_k, problem.batch, problem.seqlen_k, problem.total_k, starts + problem.batch + 1);
            starts_k = starts + problem.batch + 1;
        }
        log_sums = reinterpret_cast<float *>(workspace + schedule.terms_at);
        deltas = log_sums + schedule.heads * schedule.groups * GROUP_ROWS;
        parts = reinterpret_cast<float *>(workspace + schedule.parts_at);
    }

    Sequence sequence(int64_t b) const {
        return find_sequence(starts_q, tensors.seqlens_q, problem.seqlen_q, starts_k, tensors.seqlens_k, problem.seqlen_k, b);
    }

    template <class T>
    Rows<T> query_rows(T *tensor, const int64_t *strides, const Sequence &seq, int64_t b, int64_t head) const {
        return {tensor, strides, problem.packed_q != 0, b, seq.first_q, head * schedule.query_group, schedule.query_group};
    }
    template <class T>
    Rows<T> key_rows(T *tensor, const int64_t *strides, const Sequence &seq, int64_t b, int64_t head) const {
        return {tensor, strides, problem.packed_k != 0, b, seq.first_k, head, 1};
    }
    static const Element *elements(const void *tensor) { return static_cast<const Element *>(tensor); }
    static Element *elements(void *tensor) { return static_cast<Element *>(tensor); }

    /* Calls unit(sequence number, KV head, index) for units of a phase until none is left. */
    template <class Unit>
    void each_unit(int phase, int64_t per_head, const Unit &unit) {
        for (;;) {
            const int64_t taken = __atomic_fetch_add(&next[phase], 1, __ATOMIC_RELAXED);
            if (taken >= per_head * schedule.heads) return;
            const int64_t head_index = taken % schedule.heads;
            unit(head_index / problem.heads_kv, head_index % problem.heads_kv, taken / schedule.heads);
        }
    }

    void measure() {
        each_unit(0, schedule.groups, [&](int64_t b, int64_t head, int64_t group) { measure(b, head, group); });
    }

    void measure(int64_t b, int64_t head, int64_t group) const {
        const Sequence seq = sequence(b);
        const auto outputs = query_rows(elements(tensors.output), problem.output_strides, seq, b, head);
        const auto grad_outputs = query_rows(elements(tensors.grad_output), grads.grad_output_strides, seq, b, head);
        const int64_t first_head = head * schedule.query_group, batch = problem.packed_q ? 0 : b;
        const int64_t lse_at = batch * problem.lse_strides[0] + first_head * problem.lse_strides[1] + seq.first_q;
        const int64_t at = ((b * problem.heads_kv + head) * schedule.groups + group) * GROUP_ROWS;
        for (int64_t i = 0; i < GROUP_ROWS; i++) {
            const int64_t row = group * GROUP_ROWS + i, token = row / schedule.query_group;
            log_sums[at + i] = INFINITE; /* weights of 2^-inf = 0, for rows that are not there or see no key */
            deltas[at + i] = 0.0f;
            if (token >= seq.tokens_q || visible_keys(seq, token) == 0) continue;
            Vec products = Vec{};
            for (int d = 0; d < HEAD_DIM; d += LANES)
                products += to_floats(outputs[row] + d, HEAD_DIM - d) * to_floats(grad_outputs[row] + d, HEAD_DIM - d);
            const int64_t lse = lse_at + row % schedule.query_group * problem.lse_strides[1] + token;
            log_sums[at + i] = static_cast<float>(tensors.lse[lse] * LOG2_E);
            deltas[at + i] = sum(products) - (tensors.grad_lse ? tensors.grad_lse[lse] : 0.0f);
        }
    }

    void grade() {
        Scratch *scratch = static_cast<Scratch *>(aligned_alloc(ALIGNMENT, sizeof(Scratch)));
        if (!scratch) return; /* another thread may have had more luck */
        {
            const Tiles tiles;
            (void)tiles;
            each_unit(1, schedule.chunks, [&](int64_t b, int64_t head, int64_t chunk) { grade(b, head, chunk, *scratch); });
        }
        free(scratch);
    }

    int64_t chunk_keys(const Sequence &seq) const {
        return ceil_div(ceil_div(seq.tokens_k, schedule.chunks), BLOCK_KEYS) * BLOCK_KEYS;
    }

    /* The keys that some row of the group sees are those below this. */
    int64_t most_visible(const Sequence &seq, int64_t group) const {
        const int64_t last = minimum((group + 1) * GROUP_ROWS, seq.tokens_q * schedule.query_group) - 1;
        return last < group * GROUP_ROWS ? 0 : visible_keys(seq, last / schedule.query_group);
    }

    float *part(int64_t b, int64_t head, int64_t group, int64_t chunk) const {
        const int64_t index = ((b * problem.heads_kv + head) * schedule.groups + group) * schedule.chunks + chunk;
        return parts + index * Schedule::PART;
    }

    void grade(int64_t b, int64_t head, int64_t chunk, Scratch &scratch) const {
        const Sequence seq = sequence(b);
        const auto keys = key_rows(elements(tensors.key), problem.key_strides, seq, b, head);
        const auto values = key_rows(elements(tensors.value), problem.value_strides, seq, b, head);
        const auto grad_keys = key_rows(elements(tensors.grad_key), grads.grad_key_strides, seq, b, head);
        const auto grad_values = key_rows(elements(tensors.grad_value), grads.grad_value_strides, seq, b, head);
        const int64_t first = minimum(chunk * chunk_keys(seq), seq.tokens_k), end = minimum(first + chunk_keys(seq), seq.tokens_k);
        for (int64_t j = first; j < end; j += RUN_BLOCKS * BLOCK_KEYS) {
            const int64_t run_end = minimum(j + RUN_BLOCKS * BLOCK_KEYS, end);
            for (int64_t k = j; k < run_end; k += BLOCK_KEYS)
                open_block(scratch.blocks[(k - j) / BLOCK_KEYS], keys, values, k, static_cast<int>(minimum(BLOCK_KEYS, run_end - k)));
            for (int64_t group = 0; group < schedule.groups; group++) {
                const int64_t seen = minimum(most_visible(seq, group), run_end);
                if (seen <= j) continue;
                open_rows(scratch.rows, seq, b, head, group);
                for (int64_t k = j; k < seen; k += BLOCK_KEYS) {
                    const int count = round_up(static_cast<int>(minimum(BLOCK_KEYS, seen - k)), KEY_MULTIPLE);
                    grade_block(scratch.blocks[(k - j) / BLOCK_KEYS], scratch.rows, scratch.tile, part(b, head, group, chunk),
                                static_cast<int32_t>(k), count, scale_log2, k == first);
                }
            }
            for (int64_t k = j; k < run_end; k++) {
                const GradBlock &block = scratch.blocks[(k - j) / BLOCK_KEYS];
                store_row(grad_keys[k], block.grad_keys + (k - j) % BLOCK_KEYS * WIDE, problem.softmax_scale);
                store_row(grad_values[k], block.grad_values + (k - j) % BLOCK_KEYS * WIDE, 1.0f);
            }
        }
        if (!problem.packed_k && chunk == 0) /* padding */
            for (int64_t k = seq.tokens_k; k < problem.seqlen_k; k++) {
                memset(grad_keys[k], 0, HEAD_DIM * sizeof(Element));
                memset(grad_values[k], 0, HEAD_DIM * sizeof(Element));
            }
    }

    static void open_block(GradBlock &block, const Rows<const Element> &keys, const Rows<const Element> &values, int64_t first,
                           int count) {
        const Element *key_rows[BLOCK_KEYS], *value_rows[BLOCK_KEYS];
        for (int i = 0; i < count; i++) {
            key_rows[i] = keys[first + i];
            value_rows[i] = values[first + i];
        }
        pack_keys(block.keys, key_rows, count);
        pack_keys(block.values, value_rows, count);
        pack_values(block.key_columns, key_rows, count);
        memset(block.grad_keys, 0, sizeof block.grad_keys);
        memset(block.grad_values, 0, sizeof block.grad_values);
    }

    void open_rows(GradRows &packed, const Sequence &seq, int64_t b, int64_t head, int64_t group) const {
        const auto queries = query_rows(elements(tensors.query), problem.query_strides, seq, b, head);
        const auto grad_outputs = query_rows(elements(tensors.grad_output), grads.grad_output_strides, seq, b, head);
        const Element *query[GROUP_ROWS], *grad_output[GROUP_ROWS];
        const int64_t first = group * GROUP_ROWS, end = seq.tokens_q * schedule.query_group;
        packed.fewest_visible = INT32_MAX;
        for (int64_t i = 0; i < GROUP_ROWS; i++) {
            const bool there = first + i < end;
            query[i] = there ? queries[first + i] : nullptr;
            grad_output[i] = there ? grad_outputs[first + i] : nullptr;
            packed.visible[i] = there ? static_cast<int32_t>(visible_keys(seq, (first + i) / schedule.query_group)) : 0;
            packed.fewest_visible = static_cast<int32_t>(minimum(packed.fewest_visible, packed.visible[i]));
        }
        const int64_t at = ((b * problem.heads_kv + head) * schedule.groups + group) * GROUP_ROWS;
        memcpy(packed.log_sum, log_sums + at, sizeof packed.log_sum);
        memcpy(packed.delta, deltas + at, sizeof packed.delta);
        for (int strip = 0; strip < GROUP_STRIPS; strip++)
            for (int v = 0; v < STRIP_VECTORS; v++) {
                const int row = strip * STRIP_ROWS + v * LANES;
                pack_queries(packed.queries[strip] + v * LANES, query + row, negated);
                pack_queries(packed.grad_outputs[strip] + v * LANES, grad_output + row, false);
            }
        pack_steps<WIDE>(packed.query_steps, query, GROUP_ROWS, GROUP_ROWS);
        pack_steps<WIDE>(packed.grad_output_steps, grad_output, GROUP_ROWS, GROUP_ROWS);
    }

    static void store_row(Element *row, const float *values, float scale) {
        for (int d = 0; d < HEAD_DIM; d += LANES) store_elements(row + d, load(values + d) * scale, HEAD_DIM - d);
    }

    void gather() {
        each_unit(2, schedule.groups, [&](int64_t b, int64_t head, int64_t group) { gather(b, head, group); });
    }

    void gather(int64_t b, int64_t head, int64_t group) const {
        const Sequence seq = sequence(b);
        const auto grad_queries = query_rows(elements(tensors.grad_query), grads.grad_query_strides, seq, b, head);
        const int64_t limit = problem.packed_q ? seq.tokens_q * schedule.query_group : schedule.rows;
        const int64_t seen = most_visible(seq, group), keys = chunk_keys(seq);
        const int64_t chunks = keys > 0 ? ceil_div(seen, keys) : 0; /* those that any row of the group sees */
        alignas(ALIGNMENT) float rows[LANES][WIDE];
        for (int64_t i = 0; i < GROUP_ROWS && group * GROUP_ROWS + i < limit; i += LANES) {
            const int64_t at = i / STRIP_ROWS * DIM * STRIP_ROWS + i % STRIP_ROWS;
            for (int d = 0; d < WIDE; d += LANES) {
                Vec square[LANES];
                for (int l = 0; l < LANES; l++) {
                    square[l] = Vec{};
                    for (int64_t chunk = 0; chunk < chunks && d + l < DIM; chunk++)
                        square[l] += load(part(b, head, group, chunk) + at + (d + l) * STRIP_ROWS);
                }
                transpose(square);
                for (int l = 0; l < LANES; l++) store(rows[l] + d, square[l]);
            }
            for (int64_t l = 0; l < LANES && group * GROUP_ROWS + i + l < limit; l++)
                store_row(grad_queries[group * GROUP_ROWS + i + l], rows[l], problem.softmax_scale);
        }
    }
};

}  // namespace

AITER_EXPORT void aiter_describe(aiter_description *description) {
    *description = {AITER_ABI_VERSION, sizeof(aiter_attention_grad_problem), sizeof(aiter_attention_grad_tensors)};
}

AITER_EXPORT int64_t aiter_workspace_bytes(const aiter_attention_grad_problem *problem) {
    return Schedule(problem->forward).bytes;
}

AITER_EXPORT int aiter_launch(const aiter_attention_grad_problem *problem, const aiter_attention_grad_tensors *tensors,
                              void *executor) {
    if (!Tiles::permitted()) return NO_TILES;
    const aiter_cpu_executor *cpu = static_cast<const aiter_cpu_executor *>(executor);
    Backward backward(*problem, *tensors);
    const aiter_attention_problem &p = problem->forward;
    const double flops = 10.0 * HEAD_DIM * p.batch * p.heads_q * p.seqlen_q * p.seqlen_k;
    const int threads = flops < SERIAL_FLOPS ? 1 : cpu->num_threads;
    auto measure = [&] { backward.measure(); };
    auto grade = [&] { backward.grade(); };
    auto gather = [&] { backward.gather(); };
    run_parallel(cpu, threads, measure);
    run_parallel(cpu, threads, grade);
    if (backward.next[1] < backward.schedule.chunks * backward.schedule.heads) return OUT_OF_MEMORY;
    run_parallel(cpu, threads, gather);
    return OK;
}

AITER_EXPORT const char *aiter_error_text(int code) {
    switch (code) {
    case OK: return "no error";
    case OUT_OF_MEMORY: return "out of memory";
    case NO_TILES: return "Linux does not let this process use the AMX tile registers; AITER_CPU_ARCH can select another arch";
    default: return "unknown error";
    }
}
