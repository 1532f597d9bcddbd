/* Attention forward on the CPU: every layout of aiter_abi.h, many query tokens or one.
 *
 * Work is cut into units that depend on the problem alone, never on the number of threads; threads take units from a
 * counter, longest first. So any number of threads gives the same bits, and a late thread costs one unit at most.
 *
 *   unit = (sequence, KV head, tile of query rows, split of the keys)
 *
 *   many rows: rows lie along vector lanes         few rows (decoding): head_dim lies along vector lanes
 *   ------------------------------------------     ---------------------------------------------------------
 *   pack Q^T of the tile                           attend_rows reads K and V once, where they lie, for all
 *   for each block of keys                         rows of the group
 *       pack K and V of the block (L2)
 *       for each strip of the tile: attend_block (O^T stays in L2, S^T in L1)
 *   transpose O^T back, row by row
 *
 *   one split:   finish_row divides by the sum and writes the output row
 *   more splits: the row goes to the workspace unfinished; whoever completes the last split of a tile merges them in
 *                the order of the keys and finishes the row
 *
 * Masked keys take part with weight zero. Where such a key holds inf or NaN the row comes out NaN; finish_row sees that
 * and recomputes the row without the masked keys (attend_exactly).
 */
#include <stdlib.h>

#include "parallel.h"
#include "row_attention.h"
#include "strip.h"

namespace {

constexpr int64_t TARGET_UNITS = 64;             /* enough to keep the cores of a large socket busy */
constexpr int64_t MIN_SPLIT_KEYS = 512;          /* a shorter split costs more in merging than it gains */
constexpr int64_t MAX_TILE_STRIPS = 8;           /* Q^T and O^T of a tile share L2 with a block of keys */
constexpr int64_t MIN_TILE_STRIPS = 2;           /* packing K and V for fewer rows costs too much */
constexpr double SERIAL_FLOPS = 1.0e6;           /* below this, waking a second thread costs more than it brings */
constexpr double LOG2_E = 1.4426950408889634;
constexpr float LN_2 = 0.6931471805599453f;
constexpr int64_t ALIGNMENT = 64;

enum { OK = 0, OUT_OF_MEMORY = 1, NO_TILES = 2 };

/* How a problem is cut into units. */
struct Schedule {
    int64_t group, rows;              /* rows of one KV head, in the longest sequence */
    int64_t tile_rows, tiles, splits;
    int64_t heads, units;             /* (sequence, KV head) pairs; all units */
    bool few_rows;
    int64_t starts_bytes, counters_bytes, partials_bytes; /* the workspace */

    explicit Schedule(const aiter_attention_problem &p) {
        group = p.heads_kv > 0 ? p.heads_q / p.heads_kv : 0;
        rows = p.seqlen_q * group;
        heads = static_cast<int64_t>(p.batch) * p.heads_kv;
        few_rows = rows <= MAX_ROWS;
        tile_rows = few_rows ? MAX_ROWS : MAX_TILE_STRIPS * STRIP_ROWS;
        while (!few_rows && tile_rows > MIN_TILE_STRIPS * STRIP_ROWS && heads * ceil_div(rows, tile_rows) < TARGET_UNITS)
            tile_rows -= STRIP_ROWS;
        tiles = ceil_div(rows, tile_rows);
        splits = 1;
        const int64_t whole = heads * tiles;
        if (whole > 0 && whole < TARGET_UNITS)
            splits = clamp(p.seqlen_k / MIN_SPLIT_KEYS, 1, ceil_div(TARGET_UNITS, whole));
        units = whole * splits;
        starts_bytes = p.packed_q || p.packed_k ? 2 * (p.batch + 1) * static_cast<int64_t>(sizeof(int64_t)) : 0;
        counters_bytes = splits > 1 ? whole * static_cast<int64_t>(sizeof(int32_t)) : 0;
        partials_bytes = splits > 1 ? heads * rows * splits * static_cast<int64_t>(sizeof(RowState)) : 0;
    }

    int64_t starts_at() const { return 0; }
    int64_t counters_at() const { return ceil_div(starts_bytes, ALIGNMENT) * ALIGNMENT; }
    int64_t partials_at() const { return counters_at() + ceil_div(counters_bytes, ALIGNMENT) * ALIGNMENT; }
    int64_t workspace_bytes() const { return starts_bytes + counters_bytes > 0 ? partials_at() + partials_bytes : 0; }
};

/* One thread's buffers. */
struct Scratch {
    char *memory;
    Step *queries, *keys, *values, *weights;
    float *outputs, *maxima, *sums, *scores;
    int32_t *visible;

    explicit Scratch(const Schedule &schedule) {
        const int64_t rows = schedule.few_rows ? 0 : ceil_div(minimum(schedule.tile_rows, schedule.rows), STRIP_ROWS) * STRIP_ROWS;
        const int64_t sizes[] = {rows * DIM * 4, rows * DIM_STEPS * 4, rows * 4, rows * 4, rows * 4,
                                 BLOCK_KEYS * DIM_STEPS * 4, BLOCK_STEPS * DIM * 4, BLOCK_KEYS * STRIP_ROWS * 4,
                                 STEP_ELEMENTS > 1 ? BLOCK_STEPS * STRIP_ROWS * 4 : 0};
        int64_t total = 0;
        for (int64_t size : sizes) total += ceil_div(size, ALIGNMENT) * ALIGNMENT;
        memory = rows > 0 ? static_cast<char *>(aligned_alloc(ALIGNMENT, total)) : nullptr;
        char *next = memory;
        int index = 0;
        auto take = [&] {
            char *taken = next;
            next += ceil_div(sizes[index++], ALIGNMENT) * ALIGNMENT;
            return static_cast<void *>(taken);
        };
        if (!memory) return;
        outputs = static_cast<float *>(take());
        queries = static_cast<Step *>(take());
        maxima = static_cast<float *>(take());
        sums = static_cast<float *>(take());
        visible = static_cast<int32_t *>(take());
        keys = static_cast<Step *>(take());
        values = static_cast<Step *>(take());
        scores = static_cast<float *>(take());
        weights = STEP_ELEMENTS > 1 ? static_cast<Step *>(take()) : reinterpret_cast<Step *>(scores);
    }
    ~Scratch() { free(memory); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
};

struct Forward {
    const aiter_attention_problem &problem;
    const aiter_attention_tensors &tensors;
    const Schedule schedule;
    const int64_t *starts_q, *starts_k; /* packed only */
    int32_t *unfinished;                /* splits still to come, per tile */
    RowState *partials;                 /* [sequence, KV head][row][split] */
    float scale_log2, sign;
    int64_t next_unit = 0;              /* taken atomically */

    Forward(const aiter_attention_problem &p, const aiter_attention_tensors &t)
        : problem(p), tensors(t), schedule(p), starts_q(nullptr), starts_k(nullptr), unfinished(nullptr), partials(nullptr) {
        /* Scaling by a negative number is scaling by its magnitude with the query negated; and a masked score must stay
         * -inf even where the scale is zero. */
        sign = p.softmax_scale < 0.0f ? -1.0f : 1.0f;
        scale_log2 = static_cast<float>(p.softmax_scale * sign * LOG2_E);
        scale_log2 = scale_log2 == 0.0f ? 0x1p-126f : scale_log2;
        char *workspace = static_cast<char *>(t.workspace);
        if (schedule.starts_bytes > 0) {
            int64_t *starts = reinterpret_cast<int64_t *>(workspace + schedule.starts_at());
            if (p.packed_q) {
                find_starts(t.seqlens_q, p.batch, p.seqlen_q, p.total_q, starts);
                starts_q = starts;
            }
            if (p.packed_k) {
                find_starts(t.seqlens_k, p.batch, p.seqlen_k, p.total_k, starts + p.batch + 1);
                starts_k = starts + p.batch + 1;
            }
        }
        if (schedule.splits > 1) {
            unfinished = reinterpret_cast<int32_t *>(workspace + schedule.counters_at());
            for (int64_t i = 0; i < schedule.heads * schedule.tiles; i++) unfinished[i] = static_cast<int32_t>(schedule.splits);
            partials = reinterpret_cast<RowState *>(workspace + schedule.partials_at());
        }
    }

    Sequence sequence(int64_t b) const {
        Sequence s{length_of(tensors.seqlens_q, b, problem.seqlen_q), length_of(tensors.seqlens_k, b, problem.seqlen_k), 0, 0};
        if (starts_q) {
            s.first_q = starts_q[b];
            s.tokens_q = starts_q[b + 1] - starts_q[b];
        }
        if (starts_k) {
            s.first_k = starts_k[b];
            s.tokens_k = starts_k[b + 1] - starts_k[b];
        }
        if (problem.page_size > 0 && problem.num_pages == 0) s.tokens_k = 0;
        return s;
    }

    /* Takes units until none is left: what each thread does. */
    void operator()() {
        const Scratch scratch(schedule);
        if (!schedule.few_rows && !scratch.memory) return; /* another thread may have had more luck */
        const Tiles tiles;
        (void)tiles;
        for (;;) {
            const int64_t unit = __atomic_fetch_add(&next_unit, 1, __ATOMIC_RELAXED);
            if (unit >= schedule.units) return;
            run(unit, scratch);
        }
    }

    void run(int64_t unit, const Scratch &scratch) const {
        /* Later rows see more keys under a causal mask: the longest units come first. */
        const int64_t split = unit % schedule.splits, head_index = unit / schedule.splits % schedule.heads;
        const int64_t tile = schedule.tiles - 1 - unit / (schedule.splits * schedule.heads);
        const int64_t b = head_index / problem.heads_kv, head = head_index % problem.heads_kv;
        const Sequence seq = sequence(b);
        const QueryRows queries(problem, tensors, seq, b, head);
        const KeyRows keys(problem, tensors, seq, b, head);
        const int64_t first = tile * schedule.tile_rows, limit = minimum(first + schedule.tile_rows, schedule.rows);
        const int64_t end = clamp(seq.tokens_q * schedule.group, first, limit);
        if (!problem.packed_q && split == 0)
            for (int64_t row = end; row < limit; row++) { /* padding */
                memset(queries.output_row(row), 0, HEAD_DIM * sizeof(Element));
                queries.store_lse(row, -INFINITE);
            }
        if (first == end) return;
        const int64_t chunk = ceil_div(ceil_div(seq.tokens_k, schedule.splits), BLOCK_KEYS) * BLOCK_KEYS;
        const int64_t last_seen = visible_keys(seq, queries.token(end - 1));
        const int64_t first_key = minimum(split * chunk, last_seen), end_key = minimum(first_key + chunk, last_seen);
        auto deliver = [&](int64_t row, RowState &state) {
            if (schedule.splits == 1)
                finish_row(queries, keys, seq, row, state);
            else
                partials[(head_index * schedule.rows + row) * schedule.splits + split] = state;
        };
        if (schedule.few_rows)
            few_rows(queries, keys, seq, end, first_key, end_key, deliver);
        else
            many_rows(queries, keys, seq, first, end, first_key, end_key, scratch, deliver);
        if (schedule.splits > 1
            && __atomic_sub_fetch(&unfinished[head_index * schedule.tiles + tile], 1, __ATOMIC_ACQ_REL) == 0)
            for (int64_t row = first; row < end; row++) {
                RowState merged;
                merge(partials + (head_index * schedule.rows + row) * schedule.splits, merged);
                finish_row(queries, keys, seq, row, merged);
            }
    }

    template <class Deliver>
    void few_rows(const QueryRows &queries, const KeyRows &keys, const Sequence &seq, int64_t rows, int64_t first_key,
                  int64_t end_key, const Deliver &deliver) const {
        alignas(64) float query[MAX_ROWS][PADDED_DIM];
        RowState states[MAX_ROWS];
        int64_t visible[MAX_ROWS];
        for (int64_t r = 0; r < rows; r++) {
            load_query(query[r], queries.query_row(r), sign);
            visible[r] = visible_keys(seq, queries.token(r));
        }
        switch (rows) {
        case 1: attend_rows<1>(query, keys, first_key, end_key, visible, scale_log2, states); break;
        case 2: attend_rows<2>(query, keys, first_key, end_key, visible, scale_log2, states); break;
        case 3: attend_rows<3>(query, keys, first_key, end_key, visible, scale_log2, states); break;
        default: attend_rows<4>(query, keys, first_key, end_key, visible, scale_log2, states); break;
        }
        for (int64_t r = 0; r < rows; r++) deliver(r, states[r]);
    }

    template <class Deliver>
    void many_rows(const QueryRows &queries, const KeyRows &keys, const Sequence &seq, int64_t first, int64_t end,
                   int64_t first_key, int64_t end_key, const Scratch &scratch, const Deliver &deliver) const {
        Strip strips[MAX_TILE_STRIPS];
        const int count = static_cast<int>(ceil_div(end - first, STRIP_ROWS));
        for (int i = 0; i < count; i++) {
            const int64_t offset = static_cast<int64_t>(i) * STRIP_ROWS;
            strips[i] = {scratch.queries + offset * DIM_STEPS, scratch.outputs + offset * DIM,
                         scratch.maxima + offset, scratch.sums + offset, scratch.visible + offset, 0, 0, 0, true};
            open_strip(strips[i], queries, seq, first + offset, end, end_key);
        }
        const Element *key_rows[BLOCK_KEYS], *value_rows[BLOCK_KEYS];
        for (int64_t j = first_key; j < end_key; j += BLOCK_KEYS) {
            const int block = static_cast<int>(minimum(BLOCK_KEYS, end_key - j));
            keys.find(j, block, key_rows, value_rows);
            pack_keys(scratch.keys, key_rows, block);
            pack_values(scratch.values, value_rows, block);
            for (int i = 0; i < count; i++)
                attend_block(strips[i], scratch.keys, scratch.values, scratch.scores, scratch.weights,
                             static_cast<int32_t>(j), block, scale_log2);
        }
        for (int i = 0; i < count; i++) close_strip(strips[i], first + i * STRIP_ROWS, end, deliver);
    }

    void open_strip(Strip &strip, const QueryRows &queries, const Sequence &seq, int64_t first, int64_t end, int64_t end_key) const {
        strip.vectors = static_cast<int>(minimum(STRIP_VECTORS, ceil_div(end - first, LANES)));
        strip.most_visible = 0;
        strip.fewest_visible = static_cast<int32_t>(end_key);
        for (int v = 0; v < strip.vectors; v++) {
            const Element *rows[LANES];
            for (int i = 0; i < LANES; i++) {
                const int64_t row = first + v * LANES + i;
                rows[i] = row < end ? queries.query_row(row) : nullptr;
                /* Lanes without a row behave like the last one; their results go nowhere. */
                const int64_t seen = visible_keys(seq, queries.token(minimum(row, end - 1)));
                const int32_t visible = static_cast<int32_t>(minimum(seen, end_key));
                strip.visible[v * LANES + i] = visible;
                strip.most_visible = visible > strip.most_visible ? visible : strip.most_visible;
                strip.fewest_visible = visible < strip.fewest_visible ? visible : strip.fewest_visible;
                strip.maximum[v * LANES + i] = -INFINITE;
                strip.sum[v * LANES + i] = 0.0f;
            }
            pack_queries(strip.queries + v * LANES, rows, sign < 0.0f);
        }
    }

    /* Hands on the rows of a strip one by one. */
    template <class Deliver>
    void close_strip(const Strip &strip, int64_t first, int64_t end, const Deliver &deliver) const {
        for (int v = 0; v < strip.vectors; v++) {
            RowState states[LANES];
            for (int d = 0; d < PADDED_DIM; d += LANES) {
                Vec square[LANES];
                for (int i = 0; i < LANES; i++)
                    square[i] = strip.empty || d + i >= HEAD_DIM ? Vec{} : load(strip.output + (d + i) * STRIP_ROWS + v * LANES);
                transpose(square);
                for (int i = 0; i < LANES; i++) store(states[i].output + d, square[i]);
            }
            for (int i = 0; i < LANES && first + v * LANES + i < end; i++) {
                states[i].maximum = strip.maximum[v * LANES + i];
                states[i].sum = strip.sum[v * LANES + i];
                deliver(first + v * LANES + i, states[i]);
            }
        }
    }

    /* One row from its splits, added in the order of the keys. */
    void merge(const RowState *splits, RowState &merged) const {
        merged = splits[0];
        for (int64_t s = 1; s < schedule.splits; s++) {
            const float largest = splits[s].maximum > merged.maximum ? splits[s].maximum : merged.maximum;
            const float base = largest == -INFINITE ? 0.0f : largest;
            const float old_weight = exp2f(merged.maximum - base), weight = exp2f(splits[s].maximum - base);
            merged.maximum = largest;
            merged.sum = merged.sum * old_weight + splits[s].sum * weight;
            for (int d = 0; d < PADDED_DIM; d += LANES)
                store(merged.output + d, load(merged.output + d) * old_weight + load(splits[s].output + d) * weight);
        }
    }

    void finish_row(const QueryRows &queries, const KeyRows &keys, const Sequence &seq, int64_t row, RowState &state) const {
        Element *output = queries.output_row(row);
        const int64_t visible = visible_keys(seq, queries.token(row));
        if (visible == 0) {
            memset(output, 0, HEAD_DIM * sizeof(Element));
            queries.store_lse(row, -INFINITE);
            return;
        }
        IntVec nan = IntVec{};
        for (int d = 0; d < PADDED_DIM; d += LANES) {
            const Vec o = load(state.output + d);
            nan |= o != o;
        }
        if (any(nan)) {
            alignas(64) float query[PADDED_DIM];
            load_query(query, queries.query_row(row), sign);
            attend_exactly(query, keys, visible, scale_log2, state);
        }
        const float factor = 1.0f / state.sum; /* all scores -inf: 0 * inf, NaN as it should be */
        for (int d = 0; d < HEAD_DIM; d += LANES) store_elements(output + d, load(state.output + d) * factor, HEAD_DIM - d);
        queries.store_lse(row, (state.maximum + log2f(state.sum)) * LN_2);
    }
};

}  // namespace

AITER_EXPORT void aiter_describe(aiter_description *description) {
    *description = {AITER_ABI_VERSION, sizeof(aiter_attention_problem), sizeof(aiter_attention_tensors)};
}

AITER_EXPORT int64_t aiter_workspace_bytes(const aiter_attention_problem *problem) {
    return Schedule(*problem).workspace_bytes();
}

AITER_EXPORT int aiter_launch(const aiter_attention_problem *problem, const aiter_attention_tensors *tensors,
                              void *executor) {
    const aiter_cpu_executor *cpu = static_cast<const aiter_cpu_executor *>(executor);
    if (!Tiles::permitted()) return NO_TILES;
    Forward forward(*problem, *tensors);
    const Schedule &schedule = forward.schedule;
    const double flops = 4.0 * HEAD_DIM * schedule.heads * schedule.rows * problem->seqlen_k;
    const int64_t threads = flops < SERIAL_FLOPS ? 1 : minimum(cpu->num_threads, schedule.units);
    run_parallel(cpu, static_cast<int>(threads), forward);
    return forward.next_unit < schedule.units ? OUT_OF_MEMORY : OK;
}

AITER_EXPORT const char *aiter_error_text(int code) {
    switch (code) {
    case OK: return "no error";
    case OUT_OF_MEMORY: return "out of memory";
    case NO_TILES: return "Linux does not let this process use the AMX tile registers; AITER_CPU_ARCH can select another arch";
    default: return "unknown error";
    }
}
