/* How a forward problem is cut into units of work, and the memory that units need. */
#ifndef AITER_CPU_SCHEDULE_H
#define AITER_CPU_SCHEDULE_H

#include <stdlib.h>

#include "mask.h"
#include "parallel.h"
#include "row_attention.h"
#include "score.h"
#include "strip.h"

#if AITER_BATCH_INVARIANT
constexpr bool INVARIANT = true; /* no bit of a row depends on other sequences, or on the other rows of its own */
#else
constexpr bool INVARIANT = false;
#endif

constexpr int64_t TARGET_UNITS = 64;     /* enough to keep the cores of a large socket busy */
constexpr int64_t MIN_SPLIT_KEYS = 512;  /* a shorter split costs more in merging than it gains */
constexpr int64_t UNITS_PER_THREAD = 4;  /* for an even load, as units differ in length */
constexpr int64_t INVARIANT_KEYS = 1024; /* where nothing but the sequence may decide, a split has so many keys */
constexpr int64_t INVARIANT_ROWS = 64;   /* and splits are shared out only for so few rows of a KV head */
constexpr int64_t MAX_TILE_STRIPS = MAX_TILE_ROWS / STRIP_ROWS;
constexpr int64_t MIN_TILE_STRIPS = MIN_TILE_ROWS / STRIP_ROWS; /* packing K and V for fewer rows costs too much */

/* unit = (tile of rows, sequence, set of KV heads, split of the keys)
 *
 * Where keys are split, and so what the workspace holds, depends on the problem alone. How many rows a tile has is up
 * to the number of threads: large tiles pack keys less often, and no bit of a row depends on the others of its tile.
 *
 * With AITER_BATCH_INVARIANT, the place of a key alone says to which split it belongs. Splits are then shared out, or worked
 * off by one unit that merges them as it goes: the bits are the same. */
struct Schedule {
    int64_t group, rows; /* query heads per KV head; rows of one KV head in the longest sequence */
    bool serial;         /* one thread will do */
    bool few_rows;       /* that read K and V where they lie */
    int64_t tile_rows, tiles;
    int64_t set_heads, sets; /* KV heads of one unit; sets of one sequence */
    int64_t splits, units;
    int64_t sequences_bytes, counters_bytes, partials_bytes; /* parts of the workspace */

    Schedule(const aiter_attention_problem &p, int64_t threads) {
        group = p.heads_kv > 0 ? p.heads_q / p.heads_kv : 0;
        rows = p.seqlen_q * group;
        const Mask mask(p);
        const int64_t row_keys = mask.most_keys(1, p.seqlen_k);
        serial = 2.0 * (HEAD_DIM + VALUE_DIM) * p.batch * p.heads_kv * rows * row_keys < SERIAL_FLOPS;
        few_rows = rows <= MAX_ROWS && !(INVARIANT && TILES); /* no other way to the sums that tiles make */
        const int64_t most_splits = clamp(row_keys / MIN_SPLIT_KEYS, 1, TARGET_UNITS);
        if (few_rows) {
            /* Memory bounds these: all heads of a token lie side by side, so one unit reads them all. */
            tile_rows = rows;
            tiles = rows > 0;
            splits = INVARIANT ? ceil_div(p.seqlen_k, INVARIANT_KEYS)
                               : clamp(ceil_div(TARGET_UNITS, p.batch + !p.batch), 1, most_splits);
            splits = splits > 0 ? splits : 1;
            set_heads = p.heads_kv;
            while (set_heads > 1 && p.batch * splits * ceil_div(p.heads_kv, set_heads) < TARGET_UNITS / 4)
                set_heads = ceil_div(set_heads, 2);
            sets = set_heads > 0 ? ceil_div(p.heads_kv, set_heads) : 0;
        } else {
            set_heads = 1;
            sets = p.heads_kv;
            cut_rows(p.batch * sets, TARGET_UNITS / 2);
            const int64_t whole = p.batch * sets * tiles;
            splits = whole > 0 ? clamp(TARGET_UNITS / 2 / whole, 1, most_splits) : 1;
            if (INVARIANT) splits = splits > 1 && rows <= INVARIANT_ROWS ? ceil_div(p.seqlen_k, INVARIANT_KEYS) : 1;
        }
        sequences_bytes = Sequences::workspace_bytes(p);
        counters_bytes = splits > 1 ? tiles * p.batch * sets * static_cast<int64_t>(sizeof(int32_t)) : 0;
        partials_bytes = splits > 1 ? p.batch * p.heads_kv * rows * splits * static_cast<int64_t>(sizeof(RowState)) : 0;
        if (splits == 1 && !few_rows) cut_rows(p.batch * sets, UNITS_PER_THREAD * threads);
        units = tiles * p.batch * sets * splits;
    }

    int64_t counters_at() const { return aligned(sequences_bytes); }
    int64_t partials_at() const { return counters_at() + aligned(counters_bytes); }
    int64_t workspace_bytes() const { return partials_at() + aligned(partials_bytes); }

  private:
    /* Into the largest tiles that make so many units, if any do. */
    void cut_rows(int64_t heads, int64_t wanted) {
        const int64_t enough = ceil_div(wanted, heads > 0 ? heads : 1);
        const int64_t strips = enough > 1 ? (rows - 1) / (enough - 1) / STRIP_ROWS : MAX_TILE_STRIPS;
        tile_rows = clamp(strips, MIN_TILE_STRIPS, MAX_TILE_STRIPS) * STRIP_ROWS;
        if (!serial && heads == 1 && rows <= tile_rows) tile_rows = ceil_div(rows, 2 * LANES) * LANES;
        tiles = ceil_div(rows, tile_rows);
    }
};

/* One thread's buffers. */
struct Scratch {
    Step *queries, *packed, *weights;
    float *outputs, *maxima, *sums, *scores, *slopes;
    int32_t *highs, *lows, *places, *tokens, *heads;
#if AITER_NARROW_STRIPS
    NarrowStrip *narrow_strips; /* one for each KV head */
#endif
    RowQuery *row_queries;
    RowState *row_states; /* few rows: one for each; else, of invariant results, what splits have come to */
    char *memory;

    explicit Scratch(const Schedule &schedule) : memory(nullptr) {
        const int64_t bytes = lay_out(schedule);
        memory = static_cast<char *>(aligned_alloc(ALIGNMENT, aligned(bytes)));
        if (memory) lay_out(schedule);
    }
    ~Scratch() { free(memory); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;

  private:
    template <class T> void take(T *&buffer, int64_t count, int64_t &offset) {
        buffer = reinterpret_cast<T *>(memory + offset);
        offset += aligned(count * static_cast<int64_t>(sizeof(T)));
    }

    /* Points every buffer to its place and returns how many bytes they take. */
    int64_t lay_out(const Schedule &schedule) {
        int64_t end = 0;
        if (schedule.few_rows) {
            take(row_queries, schedule.set_heads * schedule.rows, end);
            take(row_states, schedule.set_heads * schedule.rows, end);
            if (!INVARIANT) return end;
        }
        const int64_t strips =
            schedule.few_rows ? schedule.set_heads : ceil_div(minimum(schedule.tile_rows, schedule.rows), STRIP_ROWS);
        const int64_t rows = strips * STRIP_ROWS;
        take(queries, schedule.few_rows ? 0 : rows * DIM_STEPS, end);
        take(maxima, rows, end);
        take(sums, rows, end);
        take(highs, rows, end);
        take(lows, WINDOW ? rows : 0, end);
        take(places, ALIBI ? rows : 0, end);
        take(slopes, ALIBI ? rows : 0, end);
        take(tokens, DROPOUT ? rows : 0, end);
        take(heads, DROPOUT ? rows : 0, end);
#if AITER_NARROW_STRIPS
        if (schedule.few_rows) {
            take(narrow_strips, strips, end);
            take(outputs, strips * schedule.rows * OUTPUT_DIM, end);
            take(scores, strips * schedule.rows * BLOCK_KEYS, end);
            return end;
        }
#endif
        take(row_states, INVARIANT && schedule.splits == 1 ? rows : 0, end);
        take(outputs, rows * VALUE_WIDTH, end);
        take(packed, StripWorker::PACKED_BLOCKS * PACKED_BLOCK, end);
        take(scores, StripWorker::SCORES, end);
        take(weights, StripWorker::WEIGHTS, end);
        return end;
    }
};

#endif
