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
 *   few rows that must have the bits of many (AITER_BATCH_INVARIANT): narrow_strip.h
 *
 *   one split:   finish_row divides by the sum, which the sink joins, and writes the output row
 *   more splits: the row goes to the workspace unfinished; whoever completes the last split of a tile merges them in
 *                the order of the keys and finishes the row
 *
 * Masked keys take part with weight zero. Where such a key holds inf or NaN the row comes out NaN; finish_row sees that
 * and recomputes the row without the masked keys (attend_exactly).
 */
#include <string.h>

#include "call_reader.h"
#include "check_values.h"
#include "launch_errors.h"
#include "mask.h"
#include "parallel.h"
#include "row_attention.h"
#include "schedule.h"
#include "score.h"
#include "sequence.h"
#include "strip.h"

namespace {

struct Forward {
    const aiter_attention_problem &problem;
    const aiter_attention_tensors &tensors;
    const Schedule schedule;
    const Sequences sequences;
    const Mask mask;
    const Score score;
    const Dropout dropout;
    int32_t *unfinished = nullptr; /* splits still to come, for all units that differ in nothing else */
    RowState *partials = nullptr;  /* [sequence][KV head][row][split] */
    int64_t next_unit = 0;         /* taken atomically */

    Forward(const aiter_attention_problem &p, const aiter_attention_tensors &t, int64_t threads)
        : problem(p), tensors(t), schedule(p, threads), sequences(p, t, t.workspace), mask(p), score(p, t.alibi_slopes),
          dropout(p, t.rng_state) {
        if (schedule.splits > 1) {
            char *workspace = static_cast<char *>(t.workspace);
            unfinished = reinterpret_cast<int32_t *>(workspace + schedule.counters_at());
            for (int64_t i = 0; i < schedule.units / schedule.splits; i++)
                unfinished[i] = static_cast<int32_t>(schedule.splits);
            partials = reinterpret_cast<RowState *>(workspace + schedule.partials_at());
        }
        if (p.clear_rest)
            sequences.for_rest_q(p.total_q, [&](int64_t token) {
                for (int64_t head = 0; head < p.heads_kv; head++)
                    clear(QueryRows(p, t, {1, 0, token, 0, 0}, 0, head), 0, schedule.group);
            });
    }

#if AITER_FP8_CACHE
    Score score_of(int64_t b, int64_t head) const {
        return Score(problem, tensors.alibi_slopes,
                     descale_of(tensors.key_descale, problem.key_descale_strides, b, head));
    }
#else
    const Score &score_of(int64_t, int64_t) const { return score; }
#endif

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
        const Sequence seq = sequences[b];
        const int64_t first = tile * schedule.tile_rows, limit = minimum(first + schedule.tile_rows, schedule.rows);
        const int64_t end = clamp(seq.tokens_q * schedule.group, first, limit);
        if (!problem.packed_q && problem.clear_rest && split == 0)
            for (int64_t head = first_head; head < end_head; head++)
                clear(QueryRows(problem, tensors, seq, b, head), end, limit);
        if (first == end) return;
        const Visibility seen(mask, seq, first / schedule.group, (end - 1) / schedule.group);
        /* The splits of this unit: its own or, where splits are not shared out, all of them. */
        const KeyRange pieces = INVARIANT && schedule.splits == 1
                                    ? KeyRange{seen.some.low / INVARIANT_KEYS, ceil_div(seen.some.high, INVARIANT_KEYS)}
                                    : KeyRange{split, split + 1};
        int64_t piece = pieces.low;
        auto deliver = [&](const QueryRows &queries, const KeyRows &keys, int64_t head, int64_t row, RowState &state) {
            if (schedule.splits > 1) {
                partials_of(b, head, row)[split] = state;
            } else if (piece == pieces.low && piece + 1 >= pieces.high) {
                finish_row(queries, keys, seq, b, head, row, state);
            } else {
                RowState &merged = scratch.row_states[row - first];
                if (piece == pieces.low) merged = state;
                else merge(merged, state);
                if (piece + 1 == pieces.high) finish_row(queries, keys, seq, b, head, row, merged);
            }
        };
        do {
            const KeyRange part = part_of(seen.some, seq, piece);
            if (!schedule.few_rows) many_rows(seq, b, first_head, first, end, part, seen.some.low, scratch, deliver);
            else few_rows(seq, b, first_head, end_head, end, part, seen.some.low, scratch, deliver);
        } while (++piece < pieces.high);
        if (schedule.splits > 1 && __atomic_sub_fetch(&unfinished[whole], 1, __ATOMIC_ACQ_REL) == 0)
            for (int64_t head = first_head; head < end_head; head++) {
                const QueryRows queries(problem, tensors, seq, b, head);
                const KeyRows keys(problem, tensors, seq, b, head);
                for (int64_t row = first; row < end; row++) {
                    RowState merged = *partials_of(b, head, row);
                    for (int64_t s = 1; s < schedule.splits; s++) merge(merged, partials_of(b, head, row)[s]);
                    finish_row(queries, keys, seq, b, head, row, merged);
                }
            }
    }

    RowState *partials_of(int64_t b, int64_t head, int64_t row) const {
        return partials + ((b * problem.heads_kv + head) * schedule.rows + row) * schedule.splits;
    }

    /* A query head of a sequence, as dropout counts them. */
    int32_t head_of(int64_t b, int64_t query_head) const {
        return static_cast<int32_t>(b * problem.heads_q + query_head);
    }

    /* What a split of the keys has to look at: the blocks of keys lie alike in all splits, tiles and threads. */
    KeyRange part_of(const KeyRange &seen, const Sequence &seq, int64_t split) const {
        if (WINDOW && seen.low >= seen.high)
            return {seen.low, seen.low}; /* none, and there is no first one to begin at */
        if (INVARIANT) {
            const int64_t first = maximum(split * INVARIANT_KEYS, seen.low / BLOCK_KEYS * BLOCK_KEYS);
            return {first, maximum(first, minimum((split + 1) * INVARIANT_KEYS, seen.high))};
        }
        const int64_t base = WINDOW ? seen.low / BLOCK_KEYS * BLOCK_KEYS : 0;
        const int64_t all = WINDOW ? seen.high - base : seq.tokens_k;
        const int64_t chunk = ceil_div(ceil_div(all, schedule.splits), BLOCK_KEYS) * BLOCK_KEYS;
        const int64_t first = minimum(base + split * chunk, seen.high);
        return {first, minimum(first + chunk, seen.high)};
    }

    static void clear(const QueryRows &queries, int64_t first, int64_t end) {
        for (int64_t row = first; row < end; row++) {
            memset(queries.output_row(row), 0, VALUE_DIM * sizeof(Element));
            queries.store_lse(row, -INFINITE);
        }
    }

    /* Calls body(i, key, step, next) for each step of keys of the i-th head, and with the one that follows: all heads of some
     * keys, then all heads of the next keys, which is mostly the order of memory, whatever the layout. */
    template <class StepAt, class Body>
    static AITER_INLINE_MEMBER void for_steps(int64_t heads, int64_t first_key, int64_t end_key, const StepAt &step_at,
                                              const Body &body) {
        RowStep now, next;
        if (first_key < end_key) next = step_at(0, first_key);
        for (int64_t key = first_key; key < end_key; key += ROW_KEYS)
            for (int64_t i = 0; i < heads; i++) {
                now = next;
                if (i + 1 < heads) next = step_at(i + 1, key);
                else if (key + ROW_KEYS < end_key) next = step_at(0, key + ROW_KEYS);
                body(i, key, now, next);
            }
    }

#if !AITER_NARROW_STRIPS
    template <class Deliver>
    void few_rows(const Sequence &seq, int64_t b, int64_t first_head, int64_t end_head, int64_t rows,
                  const KeyRange &part, int64_t first_seen, const Scratch &scratch, const Deliver &deliver) const {
        KeyRange visible[MAX_ROWS];
        for (int64_t r = 0; r < rows; r++) visible[r] = mask.seen_by(seq, r / schedule.group);
        for (int64_t head = first_head; head < end_head; head++) {
            const QueryRows queries(problem, tensors, seq, b, head);
            for (int64_t r = 0; r < rows; r++) {
                const int64_t i = (head - first_head) * rows + r;
                load_query(scratch.row_queries[i], queries.query_row(r), score_of(b, head).sign);
                scratch.row_states[i].clear();
            }
        }
        const int64_t first_key = WINDOW ? maximum(part.low, first_seen / ROW_KEYS * ROW_KEYS) : part.low;
        auto step_at = [&](int64_t i, int64_t key) {
            return RowStep(KeyRows(problem, tensors, seq, b, first_head + i), key,
                           static_cast<int>(minimum(ROW_KEYS, part.high - key)), first_seen);
        };
        auto attend = [&](int64_t i, int64_t j, const RowStep &step, const RowStep &next) {
            RowScope scopes[MAX_ROWS];
            for (int64_t r = 0; r < rows; r++) {
                scopes[r].high = static_cast<int>(clamp(visible[r].high - j, 0, minimum(ROW_KEYS, part.high - j)));
                if (WINDOW) scopes[r].low = static_cast<int>(clamp(visible[r].low - j, 0, ROW_KEYS));
                const int64_t head = (first_head + i) * schedule.group + r % schedule.group;
                if (ALIBI) {
                    scopes[r].distance = place_of(seq, r / schedule.group) - static_cast<int32_t>(j);
                    scopes[r].slope = score.slope(b, head);
                }
                if (DROPOUT) {
                    scopes[r].row = static_cast<int32_t>(r / schedule.group);
                    scopes[r].head = head_of(b, head);
                    scopes[r].key = static_cast<int32_t>(j);
                }
            }
            attend_rows(static_cast<int>(rows), scratch.row_queries + i * rows, step, next, scopes,
                        score_of(b, first_head + i), dropout, scratch.row_states + i * rows);
        };
        for_steps(end_head - first_head, first_key, part.high, step_at, attend);
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
#else
    /* Few rows with the bits that they would have among many. */
    template <class Deliver>
    void few_rows(const Sequence &seq, int64_t b, int64_t first_head, int64_t end_head, int64_t rows,
                  const KeyRange &part, int64_t first_seen, const Scratch &scratch, const Deliver &deliver) const {
        const int64_t heads = end_head - first_head;
        auto keys_of = [&](int64_t i) { return KeyRows(problem, tensors, seq, b, first_head + i); };
        for (int64_t i = 0; i < heads; i++) {
            NarrowStrip &own = scratch.narrow_strips[i];
            own.strip = strip_at(scratch, i, scratch.outputs + i * rows * OUTPUT_DIM);
            const QueryRows queries(problem, tensors, seq, b, first_head + i);
            open_strip(own.strip, queries, seq, b, first_head + i, 0, rows, part.high);
            own.rows = static_cast<int>(rows);
            own.queries = scratch.row_queries + i * rows;
            own.scores = scratch.scores + i * rows * BLOCK_KEYS;
            own.states = scratch.row_states + i * rows;
            for (int64_t r = 0; r < rows; r++)
                load_query(scratch.row_queries[i * rows + r], queries.query_row(r), score_of(b, first_head + i).sign);
        }
        auto step_at = [&](int64_t i, int64_t key) {
            return RowStep(keys_of(i), key, static_cast<int>(minimum(ROW_KEYS, part.high - key)), first_seen);
        };
        for_steps(heads, part.low, part.high, step_at,
                  [&](int64_t i, int64_t j, const RowStep &step, const RowStep &next) {
                      NarrowStrip &own = scratch.narrow_strips[i];
                      const Score &of_head = score_of(b, first_head + i);
                      const int64_t of_block = (j - part.low) % BLOCK_KEYS;
                      if (of_block == 0) own.open_block(static_cast<int32_t>(j));
                      own.attend(step, next, of_head, dropout);
                      if (of_block + ROW_KEYS == BLOCK_KEYS || j + ROW_KEYS >= part.high)
                          own.close_block(of_head, dropout, [&](int64_t key) { return step_at(i, key); });
                  });
        for (int64_t i = 0; i < heads; i++) {
            const QueryRows queries(problem, tensors, seq, b, first_head + i);
            const Strip &strip = scratch.narrow_strips[i].strip;
            for (int64_t r = 0; r < rows; r++) {
                RowState state;
                state.clear();
                state.maximum = strip.maximum[r];
                state.sum = strip.sum[r];
                if (!strip.empty) memcpy(state.output, strip.output + r * OUTPUT_DIM, sizeof state.output);
                restore_order(state.output);
                deliver(queries, keys_of(i), first_head + i, r, state);
            }
        }
    }
#endif

    template <class Deliver>
    void many_rows(const Sequence &seq, int64_t b, int64_t head, int64_t first, int64_t end, const KeyRange &part,
                   int64_t first_seen, const Scratch &scratch, const Deliver &deliver_row) const {
        const QueryRows queries(problem, tensors, seq, b, head);
        const KeyRows keys(problem, tensors, seq, b, head);
        auto deliver = [&](int64_t row, RowState &state) { deliver_row(queries, keys, head, row, state); };
        /* Strips of even widths: one of a single vector has too few sums to keep the multiply-add units busy. */
        Strip strips[MAX_TILE_STRIPS];
        const int64_t vectors = ceil_div(end - first, LANES), count = ceil_div(vectors, STRIP_VECTORS);
        auto first_row = [&](int64_t i) { return minimum(first + i * vectors / count * LANES, end); };
        for (int64_t i = 0; i < count; i++) {
            strips[i] = strip_at(scratch, i, scratch.outputs + i * STRIP_ROWS * VALUE_WIDTH);
            open_strip(strips[i], queries, seq, b, head, first_row(i), first_row(i + 1), part.high);
        }
        StripWorker worker(scratch.scores, scratch.weights, score_of(b, head), dropout);
        for (int64_t j = part.low; j < part.high; j += BLOCK_KEYS) {
            const int block = static_cast<int>(minimum(BLOCK_KEYS, part.high - j));
            Step *packed = scratch.packed + (j - part.low) / BLOCK_KEYS % StripWorker::PACKED_BLOCKS * PACKED_BLOCK;
            pack_block(packed, keys, j, block, first_seen);
            worker.expect(keys, j + block, static_cast<int>(minimum(BLOCK_KEYS, part.high - j - block)), count);
            for (int64_t i = 0; i < count; i++)
                worker.attend(strips[i], packed, packed + PACKED_VALUES, static_cast<int32_t>(j), block);
        }
        worker.finish();
        for (int64_t i = 0; i < count; i++) close_strip(strips[i], first_row(i), first_row(i + 1), deliver);
    }

    /* The i-th strip of a thread. */
    static Strip strip_at(const Scratch &scratch, int64_t i, float *output) {
        const int64_t offset = i * STRIP_ROWS;
        return {scratch.queries + offset * DIM_STEPS,
                output,
                scratch.maxima + offset,
                scratch.sums + offset,
                scratch.highs + offset,
                scratch.lows + offset,
                scratch.places + offset,
                scratch.slopes + offset,
                scratch.tokens + offset,
                scratch.heads + offset,
                {},
                0,
                SCORE_PART,
                true};
    }

    AITER_OUTLINE void open_strip(Strip &strip, const QueryRows &queries, const Sequence &seq, int64_t b, int64_t head,
                                  int64_t first, int64_t end, int64_t end_key) const {
        const int vectors = static_cast<int>(ceil_div(end - first, LANES));
        strip.vectors = vectors <= 2 ? vectors : STRIP_VECTORS;
        strip.score_part = is_short(seq.tokens_k) ? SHORT_PART : SCORE_PART;
        strip.seen = Visibility(mask, seq, queries.token(first), queries.token(end - 1));
        strip.seen.some.high = minimum(strip.seen.some.high, end_key);
        strip.seen.every.high = minimum(strip.seen.every.high, end_key);
        for (int v = 0; v < strip.vectors; v++) {
            const Element *rows[LANES];
            for (int i = 0; i < LANES; i++) {
                const int64_t row = first + v * LANES + i;
                rows[i] = row < end ? queries.query_row(row) : nullptr;
                /* Lanes without a row behave like the last one; their results go nowhere. */
                const int64_t like = minimum(row, end - 1), token = queries.token(like);
                const KeyRange seen = mask.seen_by(seq, token);
                strip.high[v * LANES + i] = static_cast<int32_t>(minimum(seen.high, end_key));
                if (WINDOW) strip.low[v * LANES + i] = static_cast<int32_t>(seen.low);
                if (ALIBI) {
                    strip.place[v * LANES + i] = place_of(seq, token);
                    strip.slope[v * LANES + i] = score.slope(b, head * schedule.group + like % schedule.group);
                }
                if (DROPOUT) {
                    strip.row[v * LANES + i] = static_cast<int32_t>(token);
                    strip.head[v * LANES + i] = head_of(b, head * schedule.group + like % schedule.group);
                }
                strip.maximum[v * LANES + i] = -INFINITE;
                strip.sum[v * LANES + i] = 0.0f;
            }
            if (!schedule.few_rows) pack_lanes<HEAD_DIM>(strip.queries, v, rows, score_of(b, head).sign);
        }
    }

    /* Hands on the rows of a strip one by one. */
    template <class Deliver>
    void close_strip(const Strip &strip, int64_t first, int64_t end, const Deliver &deliver) const {
        for (int v = 0; v < strip.vectors; v++) {
            RowState states[LANES];
            for (int d = 0; d < round_up(VALUE_DIM, LANES); d += LANES) {
                Vec square[LANES];
                for (int i = 0; i < LANES; i++)
                    square[i] = strip.empty || d + i >= VALUE_DIM ? Vec{} : load(strip.output + Lanes::at(d + i, v));
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

    /* Adds what a row has come to with the next keys. */
    AITER_OUTLINE static void merge(RowState &merged, const RowState &next) {
        const float largest = next.maximum > merged.maximum ? next.maximum : merged.maximum;
        const float base = largest == -INFINITE ? 0.0f : largest;
        const float old_weight = __builtin_exp2f(merged.maximum - base), weight = __builtin_exp2f(next.maximum - base);
        merged.maximum = largest;
        merged.sum = merged.sum * old_weight + next.sum * weight;
        for (int d = 0; d < round_up(VALUE_DIM, LANES); d += LANES)
            store(merged.output + d, load(merged.output + d) * old_weight + load(next.output + d) * weight);
    }

    AITER_OUTLINE void finish_row(const QueryRows &queries, const KeyRows &keys, const Sequence &seq, int64_t b,
                                  int64_t head, int64_t row, RowState &state) const {
        Element *output = queries.output_row(row);
        const int64_t token = queries.token(row), query_head = head * schedule.group + row % schedule.group;
        const KeyRange seen = mask.seen_by(seq, token);
        if (seen.low >= seen.high) return clear(queries, row, row + 1);
        IntVec nan = IntVec{};
        for (int d = 0; d < round_up(VALUE_DIM, LANES); d += LANES) {
            const Vec o = load(state.output + d);
            nan |= o != o;
        }
        if (any(nan)) {
            const ScoredRow scored{queries.query_row(row), place_of(seq, token), score.slope(b, query_head),
                                   static_cast<int32_t>(token), head_of(b, query_head)};
            attend_exactly(scored, keys, seen, score_of(b, head), dropout, state);
        }
        float sum = state.sum;
        if (tensors.sinks)
            sum += __builtin_exp2f(static_cast<float>(tensors.sinks[query_head] * LOG2_E) - state.maximum);
        const float descale = descale_of(tensors.value_descale, problem.value_descale_strides, b, head);
        const float factor = dropout.scale * descale / sum; /* all scores -inf: 0 * inf, NaN as it should be */
        for (int d = 0; d < VALUE_DIM; d += LANES)
            store_elements(output + d, load(state.output + d) * factor, VALUE_DIM - d);
        if (!queries.lse) return;
        /* In double: the gradients of a whole row are as wrong as its log-sum-exp. */
        queries.store_lse(row,
                          static_cast<float>((state.maximum + __builtin_log2(static_cast<double>(state.sum))) * LN_2));
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
    if (call->problem.check_values == 3) return OK;
    Forward forward(call->problem, call->tensors, cpu->num_threads);
    const Schedule &schedule = forward.schedule;
    const int64_t threads = schedule.serial ? 1 : minimum(cpu->num_threads, schedule.units);
    auto work = [&] { forward.work(); };
    run_parallel(cpu, static_cast<int>(threads), work);
    return forward.next_unit < schedule.units ? OUT_OF_MEMORY : OK;
}
