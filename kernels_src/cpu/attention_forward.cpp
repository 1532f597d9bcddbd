/* Attention forward on the CPU: every layout of aiter_abi.h, many query tokens or one.
 *
 * Work is cut into units; threads take them from a counter, longest first, so that a late thread costs one unit at
 * most. Nothing that decides over a row's bits depends on the number of threads (schedule.h).
 *
 *   unit = (sequence, KV head, tile of query rows, split of the keys)
 *
 *   many rows: rows lie along vector lanes         few rows (decoding): head_dim lies along vector lanes
 *   ------------------------------------------     ---------------------------------------------------------
 *   pack Q^T of the tile                           attend_rows reads K and V once, where they lie, for all
 *   for each block of keys                         rows of the group
 *       pack K and V of the block (L2)
 *       for each strip of the tile: attend (O^T stays in L2, S^T in L1), and fetch a few rows of the next block
 *   transpose O^T back, row by row
 *
 *   one split:   finish_row divides by the sum and writes the output row
 *   more splits: the row goes to the workspace unfinished; whoever completes the last split of a tile merges them in
 *                the order of the keys and finishes the row
 *
 * Masked keys take part with weight zero. Where such a key holds inf or NaN the row comes out NaN; finish_row sees that
 * and recomputes the row without the masked keys (attend_exactly).
 */
#include "check_values.h"
#include "launch_errors.h"
#include "schedule.h"

namespace {

struct Forward {
    const aiter_attention_problem &problem;
    const aiter_attention_tensors &tensors;
    const Schedule schedule;
    const int64_t *starts_q, *starts_k; /* packed only */
    int32_t *unfinished;                /* splits still to come, for all units that differ in nothing else */
    RowState *partials;                 /* [sequence][KV head][row][split] */
    float scale_log2, sign;
    int64_t next_unit = 0; /* taken atomically */

    Forward(const aiter_attention_problem &p, const aiter_attention_tensors &t, int64_t threads)
        : problem(p), tensors(t), schedule(p, threads), starts_q(nullptr), starts_k(nullptr), unfinished(nullptr),
          partials(nullptr) {
        /* Scaling by a negative number is scaling by its magnitude with the query negated; and a masked score must stay
         * -inf even where the scale is zero. */
        sign = p.softmax_scale < 0.0f ? -1.0f : 1.0f;
        scale_log2 = static_cast<float>(p.softmax_scale * sign * LOG2_E);
        scale_log2 = scale_log2 == 0.0f ? 0x1p-126f : scale_log2;
        char *workspace = static_cast<char *>(t.workspace);
        if (schedule.starts_bytes > 0) {
            int64_t *starts = reinterpret_cast<int64_t *>(workspace);
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
            for (int64_t i = 0; i < schedule.units / schedule.splits; i++)
                unfinished[i] = static_cast<int32_t>(schedule.splits);
            partials = reinterpret_cast<RowState *>(workspace + schedule.partials_at());
        }
    }

    Sequence sequence(int64_t b) const {
        Sequence s = find_sequence(starts_q, tensors.seqlens_q, problem.seqlen_q, starts_k, tensors.seqlens_k,
                                   problem.seqlen_k, b);
        if (problem.page_size > 0 && problem.num_pages == 0) s.tokens_k = 0;
        return s;
    }

    /* Takes units until none is left: what each thread does. */
    void work() {
        const Scratch scratch(schedule);
        if (!scratch.memory) return; /* another thread may have had more luck */
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
        const int64_t split = unit % schedule.splits, whole = unit / schedule.splits;
        const int64_t set = whole % schedule.sets, b = whole / schedule.sets % problem.batch;
        const int64_t tile = schedule.tiles - 1 - whole / (schedule.sets * problem.batch);
        const int64_t first_head = set * schedule.set_heads;
        const int64_t end_head = minimum(first_head + schedule.set_heads, problem.heads_kv);
        const Sequence seq = sequence(b);
        const int64_t first = tile * schedule.tile_rows, limit = minimum(first + schedule.tile_rows, schedule.rows);
        const int64_t end = clamp(seq.tokens_q * schedule.group, first, limit);
        if (!problem.packed_q && split == 0)
            for (int64_t head = first_head; head < end_head; head++)
                clear_padding(QueryRows(problem, tensors, seq, b, head), end, limit);
        if (first == end) return;
        const int64_t chunk = ceil_div(ceil_div(seq.tokens_k, schedule.splits), BLOCK_KEYS) * BLOCK_KEYS;
        const int64_t last_seen = visible_keys(seq, (end - 1) / schedule.group);
        const int64_t first_key = minimum(split * chunk, last_seen), end_key = minimum(first_key + chunk, last_seen);
        auto deliver = [&](const QueryRows &queries, const KeyRows &keys, int64_t head, int64_t row, RowState &state) {
            if (schedule.splits == 1) finish_row(queries, keys, seq, row, state);
            else partials_of(b, head, row)[split] = state;
        };
        if (schedule.few_rows) few_rows(seq, b, first_head, end_head, end, first_key, end_key, scratch, deliver);
        else many_rows(seq, b, first_head, first, end, first_key, end_key, scratch, deliver);
        if (schedule.splits > 1 && __atomic_sub_fetch(&unfinished[whole], 1, __ATOMIC_ACQ_REL) == 0)
            for (int64_t head = first_head; head < end_head; head++) {
                const QueryRows queries(problem, tensors, seq, b, head);
                const KeyRows keys(problem, tensors, seq, b, head);
                for (int64_t row = first; row < end; row++) {
                    RowState merged;
                    merge(partials_of(b, head, row), merged);
                    finish_row(queries, keys, seq, row, merged);
                }
            }
    }

    RowState *partials_of(int64_t b, int64_t head, int64_t row) const {
        return partials + ((b * problem.heads_kv + head) * schedule.rows + row) * schedule.splits;
    }

    static void clear_padding(const QueryRows &queries, int64_t first, int64_t end) {
        for (int64_t row = first; row < end; row++) {
            memset(queries.output_row(row), 0, HEAD_DIM * sizeof(Element));
            queries.store_lse(row, -INFINITE);
        }
    }

    template <class Deliver>
    void few_rows(const Sequence &seq, int64_t b, int64_t first_head, int64_t end_head, int64_t rows, int64_t first_key,
                  int64_t end_key, const Scratch &scratch, const Deliver &deliver) const {
        int64_t visible[MAX_ROWS];
        for (int64_t r = 0; r < rows; r++) visible[r] = visible_keys(seq, r / schedule.group);
        for (int64_t head = first_head; head < end_head; head++) {
            const QueryRows queries(problem, tensors, seq, b, head);
            for (int64_t r = 0; r < rows; r++) {
                const int64_t i = (head - first_head) * rows + r;
                load_query(scratch.row_queries[i], queries.query_row(r), sign < 0.0f);
                scratch.row_states[i].clear();
            }
        }
        /* All heads of some keys, then all heads of the next keys: mostly the order of memory, whatever the layout. */
        const int64_t heads = end_head - first_head, steps = ceil_div(end_key - first_key, ROW_KEYS) * heads;
        auto locate = [&](int64_t step) {
            const int64_t j = first_key + step / heads * ROW_KEYS;
            return RowStep(KeyRows(problem, tensors, seq, b, first_head + step % heads), j,
                           static_cast<int>(minimum(ROW_KEYS, end_key - j)));
        };
        RowStep now, next;
        if (steps > 0) next = locate(0);
        for (int64_t step = 0; step < steps; step++) {
            now = next;
            if (step + 1 < steps) next = locate(step + 1);
            int seen[MAX_ROWS];
            const int64_t j = first_key + step / heads * ROW_KEYS, i = step % heads * rows;
            for (int64_t r = 0; r < rows; r++)
                seen[r] = static_cast<int>(clamp(visible[r] - j, 0, minimum(ROW_KEYS, end_key - j)));
            attend_rows(static_cast<int>(rows), scratch.row_queries + i, now, next, seen, scale_log2,
                        scratch.row_states + i);
        }
        for (int64_t head = first_head; head < end_head; head++) {
            const QueryRows queries(problem, tensors, seq, b, head);
            const KeyRows keys(problem, tensors, seq, b, head);
            for (int64_t r = 0; r < rows; r++) {
                RowState &state = scratch.row_states[(head - first_head) * rows + r];
                restore_order(state.output);
                deliver(queries, keys, head, r, state);
            }
        }
    }

    template <class Deliver>
    void many_rows(const Sequence &seq, int64_t b, int64_t head, int64_t first, int64_t end, int64_t first_key,
                   int64_t end_key, const Scratch &scratch, const Deliver &deliver_row) const {
        const QueryRows queries(problem, tensors, seq, b, head);
        const KeyRows keys(problem, tensors, seq, b, head);
        auto deliver = [&](int64_t row, RowState &state) { deliver_row(queries, keys, head, row, state); };
        /* Strips of even widths: one of a single vector has too few sums to keep the multiply-add units busy. */
        Strip strips[MAX_TILE_STRIPS];
        const int64_t vectors = ceil_div(end - first, LANES), count = ceil_div(vectors, STRIP_VECTORS);
        auto first_row = [&](int64_t i) { return minimum(first + i * vectors / count * LANES, end); };
        for (int64_t i = 0; i < count; i++) {
            const int64_t offset = i * STRIP_ROWS;
            strips[i] = {scratch.queries + offset * DIM_STEPS,
                         scratch.outputs + offset * DIM,
                         scratch.maxima + offset,
                         scratch.sums + offset,
                         scratch.visible + offset,
                         0,
                         0,
                         0,
                         true};
            open_strip(strips[i], queries, seq, first_row(i), first_row(i + 1), end_key);
        }
        StripWorker worker(scratch.scores, scratch.weights, scale_log2);
        for (int64_t j = first_key; j < end_key; j += BLOCK_KEYS) {
            const int block = static_cast<int>(minimum(BLOCK_KEYS, end_key - j));
            Step *packed = scratch.packed + (j - first_key) / BLOCK_KEYS % StripWorker::PACKED_BLOCKS * PACKED_BLOCK;
            pack_block(packed, keys, j, block);
            worker.expect(keys, j + block, static_cast<int>(minimum(BLOCK_KEYS, end_key - j - block)), count);
            for (int64_t i = 0; i < count; i++)
                worker.attend(strips[i], packed, packed + PACKED_VALUES, static_cast<int32_t>(j), block);
        }
        worker.finish();
        for (int64_t i = 0; i < count; i++) close_strip(strips[i], first_row(i), first_row(i + 1), deliver);
    }

    AITER_OUTLINE void open_strip(Strip &strip, const QueryRows &queries, const Sequence &seq, int64_t first,
                                  int64_t end, int64_t end_key) const {
        const int vectors = static_cast<int>(ceil_div(end - first, LANES));
        strip.vectors = vectors <= 2 ? vectors : STRIP_VECTORS;
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
            pack_queries(strip.queries, v, rows, sign < 0.0f);
        }
    }

    /* Hands on the rows of a strip one by one. */
    template <class Deliver>
    void close_strip(const Strip &strip, int64_t first, int64_t end, const Deliver &deliver) const {
        for (int v = 0; v < strip.vectors; v++) {
            RowState states[LANES];
            for (int d = 0; d < round_up(HEAD_DIM, LANES); d += LANES) {
                Vec square[LANES];
                for (int i = 0; i < LANES; i++)
                    square[i] = strip.empty || d + i >= HEAD_DIM ? Vec{} : load(strip.output + Lanes::at(d + i, v));
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
    AITER_OUTLINE void merge(const RowState *splits, RowState &merged) const {
        merged = splits[0];
        for (int64_t s = 1; s < schedule.splits; s++) {
            const float largest = splits[s].maximum > merged.maximum ? splits[s].maximum : merged.maximum;
            const float base = largest == -INFINITE ? 0.0f : largest;
            const float old_weight = exp2f(merged.maximum - base), weight = exp2f(splits[s].maximum - base);
            merged.maximum = largest;
            merged.sum = merged.sum * old_weight + splits[s].sum * weight;
            for (int d = 0; d < round_up(HEAD_DIM, LANES); d += LANES)
                store(merged.output + d, load(merged.output + d) * old_weight + load(splits[s].output + d) * weight);
        }
    }

    AITER_OUTLINE void finish_row(const QueryRows &queries, const KeyRows &keys, const Sequence &seq, int64_t row,
                                  RowState &state) const {
        Element *output = queries.output_row(row);
        const int64_t visible = visible_keys(seq, queries.token(row));
        if (visible == 0) {
            memset(output, 0, HEAD_DIM * sizeof(Element));
            queries.store_lse(row, -INFINITE);
            return;
        }
        IntVec nan = IntVec{};
        for (int d = 0; d < round_up(HEAD_DIM, LANES); d += LANES) {
            const Vec o = load(state.output + d);
            nan |= o != o;
        }
        if (any(nan)) {
            attend_exactly(queries.query_row(row), keys, visible, scale_log2 * sign, state);
        }
        const float factor = 1.0f / state.sum; /* all scores -inf: 0 * inf, NaN as it should be */
        for (int d = 0; d < HEAD_DIM; d += LANES)
            store_elements(output + d, load(state.output + d) * factor, HEAD_DIM - d);
        if (!queries.lse) return;
        /* In double: the gradients of a whole row are as wrong as its log-sum-exp. */
        queries.store_lse(row, static_cast<float>((state.maximum + log2(static_cast<double>(state.sum))) * LN_2));
    }
};

} // namespace

AITER_EXPORT void aiter_describe(aiter_description *description) {
    *description = {AITER_ABI_VERSION, sizeof(aiter_call)};
}

AITER_EXPORT int64_t aiter_workspace_bytes(const aiter_call *call) {
    return Schedule(call->problem, 1).workspace_bytes();
}

AITER_EXPORT int aiter_launch(const aiter_call *call, void *executor) {
    const aiter_cpu_executor *cpu = static_cast<const aiter_cpu_executor *>(executor);
    if (!Tiles::permitted()) return NO_TILES;
    if (!values_fit(call->problem, call->tensors)) return BAD_VALUES;
    Forward forward(call->problem, call->tensors, cpu->num_threads);
    const Schedule &schedule = forward.schedule;
    const int64_t threads = schedule.serial ? 1 : minimum(cpu->num_threads, schedule.units);
    auto work = [&] { forward.work(); };
    run_parallel(cpu, static_cast<int>(threads), work);
    return forward.next_unit < schedule.units ? OUT_OF_MEMORY : OK;
}
