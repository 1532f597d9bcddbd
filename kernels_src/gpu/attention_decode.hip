/* Attention for few query tokens (decoding): every key and value is read once, by all the query rows that need it, and
 * the reading is spread evenly over the whole GPU.
 *
 * A unit is one KV head of one sequence, with the query heads that share it: rows are (token, head) pairs, and up to
 * PART_ROWS of them take part at once. Its keys come in steps of STEP_KEYS. The steps of one head in all sequences, by
 * their real lengths, are laid end to end, and each such line is cut into equal ranges, one for each block that the GPU
 * can hold:
 *
 *     head 0   |  sequence 0  | s. 1 |   sequence 2   | ...    |  sequence 0 ...          head 1
 *     ranges   |  range 0   |  range 1   |  range 2   | ...    |  range 0   |  range 1 ...
 *
 * so whatever the lengths, all blocks have equally much to read, and blocks that run side by side read the same tokens
 * for one head each: where these lie side by side in memory, it opens a page once for all of them. Where no block has
 * much more to do for it, units are not cut, or into equal parts; all blocks find that out from the lengths, alike. What
 * a block has of a unit it computes like this:
 *
 *     a step         tile 0   tile 1   tile 2   tile 3  | next step ...    A tile is KEYS tokens of K and V. With one
 *     row tile 0     wave 0   wave 1   wave 2   wave 3  |                  row tile each wave takes every fourth tile;
 *                                                                          with more, waves are dealt to row tiles.
 *     where it lives   registers: Q, S/P of one tile, O, maximum and sum of each row, of this wave's tiles
 *                      on their way (registers or shared memory, see arch/ *_decode.h): the next tiles
 *     each tile        advance     the next tile has arrived; a later one sets off
 *                      scores      S = Q K^T
 *                      finish      what score.h does to them: normally nothing
 *                      hide        only where an edge of what the rows see cuts the tile
 *                      update      P = exp2(S - max)
 *                      accumulate  O += P V
 *     at the end       waves of a row tile add up what they have, halving their number through shared memory (a single
 *                      row tile of sm_90a: at once, see Results::row_tile); the first writes it: the whole of a unit to
 *                      the output, a part of one to the workspace
 *
 * With a window, steps are counted over the keys that any row sees, and pages before them are not looked up. With
 * batch_invariant, every range is one step of INVARIANT_KEYS keys, so that a unit is cut in the same places whatever
 * else there is.
 *
 * Parts of a unit that was cut are added up in the order of the ranges, whoever does it: results do not depend on
 * timing. Nothing here waits for the host or leaves anything behind, so all of it can be captured.
 *
 *     by a second kernel, merge     any arch
 *     by the last of its blocks     sm_90a, few rows: who it is, a counter in memory tells
 *     by the blocks of a cluster    sm_90a, few rows and few units of equal length: each unit has a cluster of its own,
 *                                   whose blocks hand their parts to each other through shared memory
 *
 * An arch may go through the keys of a part in a way of its own: arch/sm90_decode.h does up to 256 dimensions,
 * arch/sm90_latent.h for latent attention.
 *
 * What arch/ *_decode.h provides:
 *   Decode<HEAD_DIM, VALUE_DIM>       ROWS of a row tile, KEYS of a tile, WAVES of a block, BLOCKS of a CU/SM; RUN and
 *                                     LANES; Scores, Output and Queries: as Accumulator and Query in gpu/arch.h, with
 *                                     RUN columns adjacent and a row spread over LANES lanes; leads_row(). TEAM waves
 *                                     (above, a wave) have the same rows and tiles, each COLUMNS columns of O
 *   KeyValueStream<HEAD_DIM, VALUE_DIM, Rows>   (shared, rows, first, group, groups): the tiles group, group + groups,
 *                                               ... from token `first` to the end of rows; advance, scores and
 *                                               accumulate as above. COOPERATIVE: waves fetch tiles for each other, so
 *                                               that all must take part, and advance; else scores and accumulate
 *                                               have the next tile set off, if there is `more`
 */
#include "call_reader.h"
#include "gpu/decode_schedule.h"

namespace aiter {

using Output = Tile::Output;
using Softmax = OnlineSoftmax<Output::SLOTS, Tile::LANES>;
constexpr int SLOTS = Output::SLOTS, RUN = Tile::RUN;
static_assert(!DROPOUT, "dropout is for training: the forward kernel knows it");

/* What a block has of a unit: those of the keys first_key ... end_key - 1 that any row sees. */
struct Piece {
    Schedule::Place place;
    int range; /* its number */
    int rows;  /* of the unit */
    int first_key, end_key;
    bool begins, whole; /* is it the unit's beginning; all of it */
    bool again;         /* not the block's first */
};

#if defined(AITER_LATENT)
using Loop = LatentLoop;
#elif defined(AITER_RING)
using Loop = RingLoop<HEAD_DIM, VALUE_DIM>;
#else
/* ---- the loop over a piece's keys ---- */

using Memory = DecodeMemory<HEAD_DIM, VALUE_DIM>;
using Rows = KeyValueRows<PAGED>;
using Stream = Memory::Stream;
using Scores = Tile::Scores;

constexpr int TEAMS = Tile::TEAMS;

/* more: this wave has another tile after it. */
__device__ __forceinline__ void attend_tile(const Unit::Wave<Output, Tile::ROWS> &rows, Stream &stream,
                                            const Tile::Queries &queries, int first, bool more, const Score &score,
                                            Softmax &softmax, Output &o) {
    Scores s;
    stream.scores(queries, s, more);
    rows.finish(score, s, first);
    softmax.update(s, o);
    stream.accumulate(s, o, more);
}

/* The team's tiles among keys first_key ... end-1, for the rows from `wave_row` on. */
__device__ __forceinline__ void attend(const Unit &unit, SharedAddress shared, int first_key, int end, int wave_row,
                                       int group, int groups, const Score &score, Softmax &softmax, Output &o) {
    if (!Stream::COOPERATIVE && wave_row >= unit.rows) return;
    Rows rows = unit.sequence.keys;
    rows.begin = unit.sees(0).low;
    rows.count = end;
    const Unit::Wave<Output, Tile::ROWS> scored_rows(unit, wave_row, end);

    Stream stream(shared, rows, first_key, group, groups);
    Tile::Queries queries;
    queries.load(
        stream.query_memory(),
        [&](int row) { return wave_row + row < unit.rows ? unit.query(wave_row + row) : nullptr; }, score.query_bits);
    const int stride = groups * KEYS;
    int first = first_key + group * KEYS;
    if constexpr (Stream::COOPERATIVE) { /* all waves make the same number of rounds, as they meet in each */
        const int last_step = (end - first_key - 1) / STEP_KEYS;
        for (int tile = group; tile < (last_step + 1) * TEAMS; tile += groups, first += stride) {
            stream.advance();
            if (first < end && wave_row < unit.rows)
                attend_tile(scored_rows, stream, queries, first, true, score, softmax, o);
        }
    } else { /* the last tile has code of its own: a branch around loads would make others wait for them */
        for (; first + stride < end; first += stride)
            attend_tile(scored_rows, stream, queries, first, true, score, softmax, o);
        if (first < end) attend_tile(scored_rows, stream, queries, first, false, score, softmax, o);
    }
}

struct Loop {
    static constexpr int SHARED_BYTES = Memory::SHARED_BYTES, WRITERS = THREADS;
    static constexpr int OWN_COLUMNS = Tile::TEAM == 1 ? VALUE_DIM : Tile::COLUMNS; /* of a wave */

    /* The kernel's parameter: the call, and what a loop adds to it. */
    using Launch = Arguments;
    static Launch launch_of(const aiter_attention_call &call, int, uint32_t *) { return call; }

    /* Of the columns that a team's wave has. Not by wave(), which all lanes must ask together. */
    static __device__ __forceinline__ int first_column() {
        return Tile::TEAM == 1 ? 0 : thread_in_block() / WAVE % Tile::TEAM * Tile::COLUMNS;
    }

    /* Goes through the block's pieces: for_each_piece(visit) calls visit(unit, piece) for one after the other. Whoever
     * has rows of a result then calls write(piece, first row, softmax, o), in whole waves. */
    template <class Pieces, class Write>
    static __device__ __forceinline__ void run(const Launch &, char *shared, const Score &score, Pieces for_each_piece,
                                               Write write) {
        for_each_piece([&](const Unit &unit, const Piece &piece) {
            int row_tiles = 1; /* a power of two, as TEAMS is */
            while (row_tiles * Tile::ROWS < unit.rows) row_tiles *= 2;
            const int team = wave() / Tile::TEAM, groups = TEAMS / row_tiles, group = team / row_tiles;
            const int wave_row = team % row_tiles * Tile::ROWS;
            if (piece.again) barrier(); /* the last unit's use of shared memory is over */
            const auto &scored = unit.sequence.scaled(score);
            Softmax softmax(scored.unit);
            Output o;
            o.clear();
            if (piece.first_key < piece.end_key)
                attend(unit, shared_address(shared), piece.first_key, piece.end_key, wave_row, group, groups, scored,
                       softmax, o);
            add_up(shared, group, groups, row_tiles * Tile::TEAM, softmax, o, [] { barrier(); });
            write(piece, group == 0, wave_row, row_tiles * Tile::ROWS, softmax, o);
        });
    }
};
#endif
static_assert(Loop::SHARED_BYTES <= SHARED_LIMIT, "more shared memory than a block of this arch can have");

/* ---- results ---- */

__device__ __forceinline__ int column_of_lane(int i) { return Loop::first_column() + Output::column_of_lane(i); }

template <class T, int COUNT> struct alignas(sizeof(T) * COUNT) Pack {
    T item[COUNT];
};

/* Writes finished rows: all keys have been seen. */
__device__ __forceinline__ void store(const Unit &unit, int wave_row, const Score &score, Softmax &softmax, Output &o) {
    float log_sum[SLOTS];
    softmax.finish(log_sum);
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
        const int row = wave_row + Output::row(slot);
        const bool sees_keys = unit.sees_keys(row);
        if (!sees_keys) log_sum[slot] = -INFINITE;
        const float inverse = weight_of_keys(softmax.sum[slot], unit.share(row, log_sum[slot]));
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < Output::VALUES; ++i) {
            o.set(slot, i, sees_keys ? o.get(slot, i) * inverse : 0.0f);
            if (column_of_lane(i) < VALUE_DIM) total += o.get(slot, i);
        }
        bool spoiled = false;
        if (MASKED) {
            total = row_sum<Tile::LANES>(total);
            const bool suspect = total != total && __builtin_fabsf(log_sum[slot]) < INFINITE;
            for (uint64_t lanes = ballot(suspect && Tile::leads_row()); lanes != 0; lanes &= lanes - 1) {
                const int bad = from_lane(row, first_lane(lanes));
                const float its_log_sum = from_lane(log_sum[slot], first_lane(lanes));
                if (unit.repair(bad, score, its_log_sum, Loop::first_column(), Loop::OWN_COLUMNS))
                    spoiled |= row == bad;
            }
        }
        if (row < unit.padded_rows && Tile::leads_row()) unit.store_lse(row, log_sum[slot]);
        Element *to = row < unit.padded_rows && !spoiled ? unit.output(row) : nullptr;
#if defined(AITER_LATENT)
        store_elements<Tile::COLUMNS>(o, slot, to == nullptr ? to : to + Loop::first_column());
#else
        if (to == nullptr) continue;
#pragma unroll
        for (int i = 0; i < Output::VALUES; i += RUN) {
            Pack<uint32_t, RUN / 2> run;
#pragma unroll
            for (int j = 0; j < RUN; j += 2) run.item[j / 2] = to_elements(o.get(slot, i + j), o.get(slot, i + j + 1));
            if (column_of_lane(i) < VALUE_DIM)
                *reinterpret_cast<Pack<uint32_t, RUN / 2> *>(to + column_of_lane(i)) = run;
        }
#endif
    }
}

/* Part of a unit of so many rows. output_row(row), softmax_row(row): where the part's are. */
template <class OutputRow, class SoftmaxRow>
__device__ __forceinline__ void store_part(int rows, int wave_row, Softmax &softmax, const Output &o,
                                           OutputRow output_row, SoftmaxRow softmax_row) {
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
        const int row = wave_row + Output::row(slot);
        const float sum = row_sum<Tile::LANES>(softmax.sum[slot]);
        if (row >= rows) continue;
        float *to = output_row(row);
#pragma unroll
        for (int i = 0; i < Output::VALUES; i += RUN) {
            Pack<float, RUN> run;
#pragma unroll
            for (int j = 0; j < RUN; ++j) run.item[j] = o.get(slot, i + j);
            if (column_of_lane(i) < VALUE_DIM) *reinterpret_cast<Pack<float, RUN> *>(to + column_of_lane(i)) = run;
        }
        if (Tile::leads_row()) *reinterpret_cast<Pack<float, 2> *>(softmax_row(row)) = {{softmax.maximum[slot], sum}};
    }
}

/* ---- units that were cut ---- */

/* The parts of a unit in the workspace: place 1 of block `first`, and place 0 of those after it. */
struct PartsOfBlocks {
    const Parts &parts;
    int first;
    __device__ __forceinline__ const float *output_row(int i, int row) const {
        return parts.output_row(first + i, i == 0, row);
    }
    __device__ __forceinline__ const float *softmax_row(int i, int row) const {
        return parts.softmax_row(first + i, i == 0, row);
    }
};

/* A row, or a part of one, of which each lane of a wave has some dimensions: RUN adjacent ones of every RUN * WAVE, as
 * many as a load or store can have without leaving lanes idle. */
struct WaveRow {
    static constexpr int RUN = VALUE_DIM > 2 * WAVE ? 4 : VALUE_DIM > WAVE ? 2 : 1;
    static constexpr int RUNS = (VALUE_DIM + RUN * WAVE - 1) / (RUN * WAVE);
    float value[RUNS][RUN];

    static __device__ __forceinline__ int column(int run) { return (run * WAVE + lane()) * RUN; }
    static __device__ __forceinline__ bool has(int run) {
        return (run + 1) * RUN * WAVE <= VALUE_DIM || column(run) < VALUE_DIM;
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int r = 0; r < RUNS; ++r)
#pragma unroll
            for (int i = 0; i < RUN; ++i) value[r][i] = 0.0f;
    }
    __device__ __forceinline__ void load(const float *from) {
#pragma unroll
        for (int r = 0; r < RUNS; ++r)
            if (has(r)) {
                const auto run = *reinterpret_cast<const Pack<float, RUN> *>(from + column(r));
#pragma unroll
                for (int i = 0; i < RUN; ++i) value[r][i] = run.item[i];
            }
    }
    __device__ __forceinline__ void store(float *to) const {
#pragma unroll
        for (int r = 0; r < RUNS; ++r) {
            Pack<float, RUN> run;
#pragma unroll
            for (int i = 0; i < RUN; ++i) run.item[i] = value[r][i];
            if (has(r)) *reinterpret_cast<Pack<float, RUN> *>(to + column(r)) = run;
        }
    }
    __device__ __forceinline__ void store(Element *to) const {
#pragma unroll
        for (int r = 0; r < RUNS; ++r) {
            Pack<Element, RUN> run;
#pragma unroll
            for (int i = 0; i < RUN; ++i) run.item[i] = to_element(value[r][i]);
            if (has(r)) *reinterpret_cast<Pack<Element, RUN> *>(to + column(r)) = run;
        }
    }
    __device__ __forceinline__ void add(const WaveRow &other, float weight) {
#pragma unroll
        for (int r = 0; r < RUNS; ++r)
#pragma unroll
            for (int i = 0; i < RUN; ++i) value[r][i] += weight * other.value[r][i];
    }
};

/* A row whose parts have been added up, by a whole wave. */
__device__ __forceinline__ void store_row(const Unit &unit, int row, bool sees_keys, float maximum, float total,
                                          WaveRow &sum) {
    /* A score of +inf makes the output NaN (inf - inf), as it should, but the log-sum-exp is +inf. */
    const float log_sum = !sees_keys || maximum == -INFINITE && total == 0 ? -INFINITE
                          : maximum == INFINITE                            ? INFINITE
                                                                           : maximum + log2(total);
    const float inverse = weight_of_keys(total, unit.share(row, log_sum));
    bool spoiled = false;
#pragma unroll
    for (int r = 0; r < WaveRow::RUNS; ++r)
#pragma unroll
        for (int i = 0; i < WaveRow::RUN; ++i) {
            float &x = sum.value[r][i];
            x = sees_keys ? x * inverse : 0.0f;
            spoiled |= WaveRow::has(r) && x != x;
        }
    if (lane() == 0) unit.store_lse(row, log_sum);
    if (MASKED && wave_any(spoiled) && __builtin_fabsf(log_sum) < INFINITE &&
        unit.repair(row, Score(unit.arguments.problem), log_sum))
        return;
    sum.store(unit.output(row));
}

/* Adds up that many parts of a unit, more than one: rows `first_row` ... + rows - 1, by WAVES waves, which all take
 * part. Few parts: each row by one wave, which asks for all of them at once. More: by several waves, which take parts
 * in turn. How many these are, and so the order of additions, depends on the number of parts alone. With batch_invariant
 * not even on that, as parts may be there that the row does not see: there are always as many, and a part's wave and lane
 * are by its number in the sequence. meet(): where the waves do. */
struct alignas(16) MergeSums {
    static constexpr int TOGETHER = 4; /* parts on their way to a wave */
    static constexpr int OF_LANE = 4;  /* of which a lane looks at the maximum and sum at one time */
    static constexpr int INVARIANT_SLICES = 4;
    float of_wave[WaveRow::RUNS * WaveRow::RUN * WAVE];
};
template <int WAVES, class Parts, class Meet>
__device__ __forceinline__ void merge_rows(const Unit &unit, const Parts &parts, int all, int first_row, int rows,
                                           MergeSums *sums, Meet meet) {
    constexpr int TOGETHER = MergeSums::TOGETHER;
    const bool invariant = unit.arguments.problem.batch_invariant;
    int slices = invariant ? MergeSums::INVARIANT_SLICES : 1;
    while (!invariant && slices < WAVES && slices * TOGETHER < all) slices *= 2;
    int before = 0; /* parts of the sequence that nobody asks for */
    if (WINDOW && invariant) before = keys_to_read(unit.arguments.problem, unit.sequence.mask).low / INVARIANT_KEYS;
    const int slice = wave() % slices, own_first = (slice - before) & (slices - 1);
#pragma unroll 1
    for (int passed = 0; passed < rows; passed += WAVES / slices) {
        const int index = passed + wave() / slices, row = first_row + index;
        const bool sees_keys = unit.sees_keys(row);
        const int count = sees_keys && index < rows ? all : 0;
        WaveRow part[TOGETHER], sum;
        float its_maximum[TOGETHER];
        const auto request = [&](int first) {
#pragma unroll
            for (int j = 0; j < TOGETHER; ++j) {
                const int i = first + j * slices;
                its_maximum[j] = i < count ? parts.softmax_row(i, row)[0] : -INFINITE;
                part[j].clear();
                if (i < count) part[j].load(parts.output_row(i, row));
            }
        };
        request(own_first);

        float maximum = -INFINITE, total = 0.0f;
        /* visit(its maximum, its sum) */
        const auto for_own_parts = [&](auto visit) {
#pragma unroll 1
            for (int first = (lane() - before) & (WAVE - 1); first < count; first += MergeSums::OF_LANE * WAVE) {
                Pack<float, 2> own[MergeSums::OF_LANE];
#pragma unroll
                for (int j = 0; j < MergeSums::OF_LANE; ++j) {
                    const int i = first + j * WAVE;
                    own[j] = {{-INFINITE, 0.0f}};
                    if (i < count) own[j] = *reinterpret_cast<const Pack<float, 2> *>(parts.softmax_row(i, row));
                }
#pragma unroll
                for (int j = 0; j < MergeSums::OF_LANE; ++j) visit(own[j].item[0], own[j].item[1]);
            }
        };
        for_own_parts([&](float its, float) { maximum = __builtin_fmaxf(maximum, its); });
#pragma unroll
        for (int distance = 1; distance < WAVE; distance *= 2)
            maximum = __builtin_fmaxf(maximum, from_lane(maximum, lane() ^ distance));
        const float reference = maximum == -INFINITE ? 0.0f : maximum;
        for_own_parts([&](float its, float its_sum) { total += its_sum * exp2(its - reference); });
        total = wave_sum(total);

        sum.clear();
#pragma unroll 1
        for (int first = own_first; first < count; first += TOGETHER * slices) {
#pragma unroll
            for (int j = 0; j < TOGETHER; ++j) sum.add(part[j], exp2(its_maximum[j] - reference));
            request(first + TOGETHER * slices);
        }
        if (slices > 1) {
            sum.store(sums[wave()].of_wave);
            meet();
            if (slice == 0)
#pragma unroll 1
                for (int other = 1; other < slices; ++other) {
                    part[0].load(sums[wave() + other].of_wave);
                    sum.add(part[0], 1.0f);
                }
        }
        if (slice == 0 && index < rows && row < unit.padded_rows) store_row(unit, row, sees_keys, maximum, total, sum);
        if (slices > 1 && passed + WAVES / slices < rows) meet();
    }
}

#if defined(AITER_RING)
/* Parts of a row tile in shared memory, where rows 0 ... rows - 1 of each stand together: output, maximum, sum. Places
 * are such that lanes which write four rows at a time do not meet in a bank. */
struct NearParts {
    float *memory;
    int rows;
    __device__ __forceinline__ float *output_row(int i, int row) const {
        return memory + (i * rows + row) * Loop::PART_FLOATS;
    }
    __device__ __forceinline__ float *softmax_row(int i, int row) const { return output_row(i, row) + VALUE_DIM; }
};

/* A row of a few such parts, added up by a wave. */
struct NearRow {
    float maximum = -INFINITE, total = 0.0f;
    WaveRow sum;

    template <int MOST> static __device__ __forceinline__ NearRow of(const NearParts &parts, int count, int row) {
        NearRow result;
        result.sum.clear();
        float maxima[MOST], totals[MOST];
#pragma unroll
        for (int i = 0; i < MOST; ++i) {
            const bool exists = i < count;
            const float *part = parts.softmax_row(exists ? i : 0, row);
            maxima[i] = exists ? part[0] : -INFINITE;
            totals[i] = exists ? part[1] : 0.0f;
            result.maximum = __builtin_fmaxf(result.maximum, maxima[i]);
        }
        const float reference = result.maximum == -INFINITE ? 0.0f : result.maximum;
#pragma unroll
        for (int i = 0; i < MOST; ++i) {
            if (i >= count) break;
            const float weight = exp2(maxima[i] - reference);
            result.total += totals[i] * weight;
            WaveRow part = {};
            part.load(parts.output_row(i, row));
            result.sum.add(part, weight);
        }
        return result;
    }
    __device__ __forceinline__ void store_part(float *output, float *softmax) const {
        sum.store(output);
        if (lane() == 0) *reinterpret_cast<Pack<float, 2> *>(softmax) = {{maximum, total}};
    }
};
static_assert(Loop::READERS * Tile::ROWS / 2 * Loop::PART_FLOATS * 4 <= Loop::EXCHANGE_BYTES, "");
static_assert(Loop::READERS * sizeof(MergeSums) <= Loop::EXCHANGE_BYTES, "");

/* By all readers of a cluster's blocks, each of which has a part of the unit: a block hands rows to those that have
 * them in the end, and adds up its own. */
__device__ __forceinline__ void share_in_cluster(const Unit &unit, char *shared, const NearParts &waves, int groups,
                                                 int size) {
    const int each = (unit.padded_rows + size - 1) / size, rank = cluster::rank();
    const NearParts handed = {reinterpret_cast<float *>(shared + Loop::HANDED_AT), each};
    cluster::wait(); /* all blocks are there, whose memory is written now */
#pragma unroll 1
    for (int row = wave(); row < unit.rows; row += Loop::READERS) {
        const int owner = row / each, place = row - owner * each;
        NearRow::of<Loop::READERS>(waves, groups, row)
            .store_part(cluster::of(handed.output_row(rank, place), owner),
                        cluster::of(handed.softmax_row(rank, place), owner));
    }
    cluster::arrive();
    cluster::wait();
#pragma unroll 1
    for (int place = wave(); place < each; place += Loop::READERS) {
        const int row = rank * each + place;
        if (row >= unit.padded_rows) return;
        const bool sees_keys = unit.sees_keys(row);
        NearRow sum = NearRow::of<Tile::MOST_CLUSTER>(handed, sees_keys ? size : 0, place);
        store_row(unit, row, sees_keys, sum.maximum, sum.total, sum.sum);
    }
}

/* By all readers, who have written a part of the unit to the workspace: whoever comes last adds up all of them. */
__device__ __forceinline__ void merge_as_last(const Unit &unit, const Loop::Launch &launch, const Schedule &schedule,
                                              const Parts &parts, const Schedule::Place &place, char *shared) {
    const int first = schedule.first_range(place), last = schedule.last_range(place);
    if (Loop::count_arrival(launch.arrived + first, shared) != last - first) return;
    merge_rows<Loop::READERS>(unit, PartsOfBlocks{parts, first}, last - first + 1, 0, unit.padded_rows,
                              reinterpret_cast<MergeSums *>(shared + Loop::EXCHANGE_AT), [] { Loop::meet_readers(); });
}
#endif

/* ---- the kernel ---- */

/* Visits the pieces of a range. Returns whether there were any, of this one or before. */
template <class Visit>
__device__ __forceinline__ bool for_each_piece_of(int range, const Arguments &arguments, const Schedule &schedule,
                                                  bool again, Visit visit) {
    const int keys_of_step = step_keys(arguments.problem);
    int step, end;
    Schedule::Place place;
    if (schedule.cluster > 1) {
        place = schedule.own_unit();
        const Range own = schedule.own_steps(place.steps);
        step = own.low, end = own.high;
    } else {
        const auto [line, index] = schedule.range_of(range);
        step = schedule.range_begin(line, index);
        end = schedule.range_begin(line, index + 1);
        if (step >= end) return again;
        place = schedule.lines() == 1 ? schedule.find(step) : schedule.find(step, line);
        range = line * schedule.ranges + index;
    }

    for (;;) {
        const int lead = schedule.led(), all = place.steps - lead;
        const int first = greater(step - place.begin - lead, 0), last = lesser(end - place.begin - lead, all);
        if (lead == 0 || last > 0) {
            const Unit unit(reread(arguments), place.batch, place.index, schedule);
            const int origin = keys_to_read(arguments.problem, unit.sequence.mask).low;
            int end_key = lesser(unit.rows == 0 ? 0 : unit.sees(unit.rows - 1).high, origin + last * keys_of_step);
            int first_key = origin + first * keys_of_step;
            if (WINDOW) {
                /* With batch_invariant by so many that the piece's rest is dealt out as all of it was: a unit may begin with
                 * the rows of another token. */
                const int low = unit.sees(0).low, passed = arguments.problem.batch_invariant ? ROUND_KEYS : STEP_KEYS;
                first_key += greater(low - first_key, 0) / passed * passed;
                if (low >= end_key) end_key = 0; /* all rows are past the last key: there is no page to look up */
            }

            const bool whole = first == 0 && last == all && schedule.cluster == 1;
            visit(unit, Piece{place, range, unit.rows, first_key, end_key, first == 0, whole, again});
            again = true;
        }
        step = place.begin + lead + last;
        if (step >= end) return again;
        place = schedule.after(place);
    }
}

/* A block's pieces: pieces(visit) calls visit(unit, piece). */
struct Pieces {
    const Arguments &arguments;
    const Schedule &schedule;

    /* A block has one range; with batch_invariant, where each step is one and has sums of its own, it may have several,
     * and copies of the next go on while the last of one is used. */
    template <class Visit> __device__ __forceinline__ void operator()(Visit visit) const {
        bool again = false;
#pragma unroll 1
        for (int range = block(); range < schedule.blocks; range += schedule.at_once)
            again = for_each_piece_of(range, arguments, schedule, again, visit);
    }
    /* Where units are plain: visit(batch, KV head, first key, end) for each piece. To find out all about a unit takes 250
     * instructions more, while nothing is on its way to the block. */
    template <class Visit> __device__ __forceinline__ void keys_alone(Visit visit) const {
        const int steps = schedule.unit_steps;
        int batch, head, step, end; /* steps of the unit */
        if (schedule.cluster > 1) {
            const Schedule::Place place = schedule.own_unit();
            const Range own = schedule.own_steps(steps);
            batch = place.batch, head = place.index, step = own.low, end = own.high;
        } else {
            const auto [line, index] = schedule.range_of(block());
            const int begin = schedule.range_begin(line, index);
            head = schedule.lines() == 1 ? begin / schedule.length : line;
            batch = schedule.by_steps.quotient(begin - head * schedule.length);
            const int unit_begin = head * schedule.length + batch * steps;
            step = begin - unit_begin;
            end = schedule.range_begin(line, index + 1) - unit_begin;
        }
#pragma unroll 1
        for (; step < end; step = 0, end -= steps) {
            visit(batch, head, step * STEP_KEYS, lesser(arguments.problem.seqlen_k, lesser(end, steps) * STEP_KEYS));
            if (++batch == arguments.problem.batch) batch = 0, ++head;
        }
    }
};

/* Where results go. */
struct Results {
    const Loop::Launch &launch;
    const Schedule &schedule;
    const Parts &parts;
    const Score &score;
    char *shared;

    /* The unit once more, so that what only writing needs is not kept through the loop. */
    __device__ __forceinline__ Unit unit_of(const Piece &piece) const {
        const Arguments &arguments = launch;
        return Unit(reread(arguments), opaque_scalar(piece.place.batch), opaque_scalar(piece.place.index), schedule);
    }
    /* By all waves that write, of which some have rows that all keys of the piece are in; there are `rows` in all. */
    __device__ __forceinline__ void operator()(const Piece &piece, bool has_rows, int wave_row, int rows,
                                               Softmax &softmax, Output &o) const {
        if (piece.whole) {
            const Unit unit = unit_of(piece);
            if (has_rows) store(unit, wave_row, score, softmax, o);
            unit.clear_padding(rows, Loop::WRITERS);
            return;
        }
        if (has_rows) {
            store_part(
                piece.rows, wave_row, softmax, o,
                [&](int row) { return parts.output_row(piece.range, piece.begins, row); },
                [&](int row) { return parts.softmax_row(piece.range, piece.begins, row); });
        }
#if defined(AITER_RING)
        if (launch.arrived != nullptr) merge_as_last(unit_of(piece), launch, schedule, parts, piece.place, shared);
#endif
    }
#if defined(AITER_RING)
    /* By all readers, of which the first `groups` have some of the keys each, for all rows. */
    __device__ __forceinline__ void row_tile(const Piece &piece, int group, int groups, Softmax &softmax,
                                             Output &o) const {
        char *memory = shared + Loop::EXCHANGE_AT;
        const auto meet = [] { Loop::meet_readers(); };
        const Unit unit = unit_of(piece);
        const bool few = unit.rows <= Tile::ROWS / 2;
        const int left = few ? Loop::READERS : Loop::READERS / 2; /* parts for which there is room */
        add_up(memory, group, groups, 1, softmax, o, meet, left);
        groups = lesser(groups, left);
        const NearParts waves = {reinterpret_cast<float *>(memory), few ? Tile::ROWS / 2 : Tile::ROWS};
        meet(); /* nobody needs the queries any more */
        if (group < groups)
            store_part(
                unit.rows, 0, softmax, o, [&](int row) { return waves.output_row(group, row); },
                [&](int row) { return waves.softmax_row(group, row); });
        meet();
        if (launch.cluster > 1) return share_in_cluster(unit, shared, waves, groups, launch.cluster);
        const int rows = piece.whole ? lesser(unit.padded_rows, Tile::ROWS) : unit.rows;
#pragma unroll 1
        for (int row = wave(); row < rows; row += Loop::READERS) {
            const bool sees_keys = unit.sees_keys(row);
            NearRow sum = NearRow::of<Loop::READERS>(waves, row < unit.rows ? groups : 0, row);
            if (piece.whole) store_row(unit, row, sees_keys, sum.maximum, sum.total, sum.sum);
            else
                sum.store_part(parts.output_row(piece.range, piece.begins, row),
                               parts.softmax_row(piece.range, piece.begins, row));
        }
        if (piece.whole) unit.clear_padding(Tile::ROWS, Loop::WRITERS);
        else if (launch.arrived != nullptr) merge_as_last(unit, launch, schedule, parts, piece.place, shared);
    }
#endif
};

__global__ void __launch_bounds__(THREADS, Tile::BLOCKS)
    attention_decode(const AITER_GRID_CONSTANT Loop::Launch launch, const Cuts cuts, int grid) {
    const Arguments &arguments = launch;
    AITER_SHARED(shared, Loop::SHARED_BYTES);
    let_next_start();
#if defined(AITER_RING)
    Loop::prepare(launch, shared);
#endif
    wait_for_previous();
    clear_rest(arguments, cuts.at_once, THREADS);
    const Schedule schedule(arguments, cuts, grid);
    if (block() >= schedule.blocks) return;
    const Parts parts(arguments, grid);
    const Score score(arguments.problem);
    Loop::run(launch, shared, score, Pieces{arguments, schedule}, Results{launch, schedule, parts, score, shared});
}

/* ---- units that were cut, in a kernel of its own ---- */

constexpr int MERGE_WAVES = 8, MERGE_BLOCKS = 2; /* of a CU/SM; more, and nvcc spares registers */

/* `rows` of one unit. The grid goes over all units, or over all cuts where those are fewer: then the unit is the one
 * that the cut goes through first. */
__global__ void __launch_bounds__(MERGE_WAVES *WAVE, MERGE_BLOCKS)
    merge(const Arguments arguments, const Cuts cuts, int grid, int over_units, int rows) {
    __shared__ MergeSums sums[MERGE_WAVES];
    if (cuts.length == 0) wait_for_previous(); /* lengths may be from a kernel that the one before waits for */
    const Schedule schedule(arguments, cuts, grid);
    /* Even where there is nothing to merge: whoever comes next on the stream waits for this kernel alone. */
    if (schedule.whole) return wait_for_previous();
    const Parts parts(arguments, grid);
    const int row_blocks = (parts.rows + rows - 1) / rows, item = block() / row_blocks;
    const bool exists = over_units || item + 1 < schedule.blocks;
    const int batches = schedule.problem.batch;
    const Schedule::Place place = over_units ? schedule.unit(item % batches, item / batches)
                                             : schedule.find(exists ? schedule.range_begin(item + 1) : 0);
    const int first = schedule.first_range(place), last = schedule.last_range(place);
    wait_for_previous(); /* before the unit: what it reads may be from before that kernel, too */
    const Unit unit(arguments, place.batch, place.index, schedule);
    if (!exists || first == last || !over_units && first != item) return;
    merge_rows<MERGE_WAVES>(unit, PartsOfBlocks{parts, first}, last - first + 1, block() % row_blocks * rows, rows,
                            sums, [] { barrier(); });
}

/* ---- the host's side ---- */

/* What one launch consists of, on a GPU with that many compute units. */
struct Plan {
    int64_t units, steps, grid;
    int at_once; /* blocks of the launch */
    bool cuts;   /* may a block's range begin or end within a unit? */
    int cluster; /* see cluster_of */
    Plan(const aiter_attention_problem &p, bool alike, int compute_units) {
        units = static_cast<int64_t>(p.batch) * p.heads_kv * row_parts(p);
        steps = units * steps_of(p, most_keys_to_read(p));
        const Deal<int64_t> deal(p, row_parts(p), steps, static_cast<int64_t>(compute_units) * Tile::BLOCKS);
        grid = deal.blocks;
        const bool whole = alike && ranges_of_unit(p, deal, steps, steps_of(p, most_keys_to_read(p))) == 1;
        cuts = grid > 1 && steps > units && !whole;
        cluster = cluster_of(p, alike, steps, units, static_cast<int64_t>(compute_units) * Tile::BLOCKS);
        if (cluster > 0) grid = cluster * units, cuts = false;
        const int64_t most = p.batch_invariant ? int64_t(compute_units) * Tile::BLOCKS : grid;
        at_once = static_cast<int>(lesser(grid, most));
    }
};

} // namespace aiter

AITER_EXPORT void aiter_describe(aiter_description *description) {
    description->abi_version = AITER_ABI_VERSION;
    description->call_bytes = sizeof(aiter_call);
}

/* Enough for whichever of the machine's GPUs the launch will be on. */
AITER_EXPORT int64_t aiter_workspace_bytes(const aiter_call *call) {
    int devices = 0;
    int64_t most = 0;
    if (hipGetDeviceCount(&devices) != hipSuccess) return 0;
    for (int device = 0; device < devices; ++device) {
        const aiter::Plan plan(call->problem, false, aiter::compute_units(device));
        if (plan.cuts) most = aiter::greater(most, aiter::Parts::bytes(call->problem, plan.grid));
    }
    return most;
}

AITER_EXPORT int aiter_launch(const aiter_call *call, void *stream) {
    const aiter_attention_problem &problem = call->problem;
    if (const int error = aiter::check_problem(problem)) return error;
    int device = 0;
    if (const int error = hipGetDevice(&device)) return error;
    const int compute_units = aiter::compute_units(device);
    if (compute_units == 0) return aiter::LAUNCH_NO_COMPUTE_UNITS;
    const aiter::Plan plan(problem, aiter::all_alike(call->tensors), compute_units);
    if (plan.steps >= INT32_MAX) return aiter::LAUNCH_TOO_MANY_STEPS;
    if (plan.grid == 0) return 0;
    const int grid = static_cast<int>(plan.grid);
    const aiter::Cuts cuts(problem, call->tensors, grid, aiter::greater(plan.cluster, 1), plan.at_once);
#if defined(AITER_RING)
    if (plan.cluster > 1)
        return aiter::launch_next_in_clusters(plan.cluster, aiter::attention_decode, grid, aiter::THREADS,
                                              aiter::Loop::SHARED_BYTES, stream,
                                              aiter::Loop::launch_of(*call, plan.cluster, nullptr), cuts, grid);
    /* Few rows: the last of a unit's blocks adds up. More would keep one block busy for longer than a kernel takes. */
    if (plan.cuts && aiter::rows_of_unit(problem) <= aiter::Tile::ROWS && !problem.batch_invariant) {
        uint32_t *arrived = aiter::Parts::counters(*call, plan.grid);
        if (const int error = aiter::launch_next(aiter::clear_arrived, 1, 256, 0, stream, arrived, grid)) return error;
        return aiter::launch_next(aiter::attention_decode, grid, aiter::THREADS, aiter::Loop::SHARED_BYTES, stream,
                                  aiter::Loop::launch_of(*call, 1, arrived), cuts, grid);
    }
#endif
    if (const int error =
            aiter::launch_next(aiter::attention_decode, plan.at_once, aiter::THREADS, aiter::Loop::SHARED_BYTES, stream,
                               aiter::Loop::launch_of(*call, 1, nullptr), cuts, grid))
        return error;
    if (!plan.cuts) return 0;
    const int over_units = plan.units < grid - 1;
    /* One row a block, and more where not all blocks would find a place at one time: each has its unit to find, four
     * or five loads one after the other. */
    const int64_t items = over_units ? plan.units : grid - 1, unit_rows = aiter::rows_of_unit(problem);
    int rows = 1;
    const auto blocks = [&] { return items * ((unit_rows + rows - 1) / rows); };
    while (rows < unit_rows && blocks() > compute_units * aiter::MERGE_BLOCKS) rows *= 2;
    return aiter::launch_next(aiter::merge, blocks(), aiter::MERGE_WAVES * aiter::WAVE, 0, stream, *call, cuts, grid,
                              over_units, rows);
}

AITER_EXPORT const char *aiter_error_text(int code) { return aiter::error_text(code); }
