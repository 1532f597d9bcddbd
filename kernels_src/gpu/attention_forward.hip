/* Attention for many query tokens: output = softmax(scale * Q K^T) V, keys a tile at a time, nothing of it in memory.
 *
 *                 keys ->   tile 0   tile 1   tile 2  ...
 *                         +--------+--------+--------+
 *   query rows   wave 0   |        |        |        |     A block has a tile of query rows of one head, or of several
 *     of one     wave 1   |  S, P  |        |        |     that read one KV head; each of its waves has some of the
 *     block      wave 2   |        |        |        |     rows, with all their keys.
 *                wave 3   +--------+--------+--------+
 *
 *   where it lives   registers: Q (or shared memory, see the arch), S/P of one tile, O, maximum and sum of each row
 *                    shared memory: K and V of one tile, for all waves; the next tile is on its way there
 *
 *   each tile        S = Q K^T, cap and slope (score.h), mask where an edge of what the rows see cuts the tile
 *                    (mask.h), P = exp2(S - max), O += P V: see tile_loop.h, or the loop that an arch has of its own
 *                    (arch/sm90_forward.h, arch/gfx9_forward.h)
 *
 *   at the end       O / sum, less what a sink takes, and the log-sum-exp go to memory. With a mask: a NaN that a
 *                    hidden value has left in a row (0 * inf within a matrix product) is found there, and that row is
 *                    computed again key by key.
 *
 * Blocks of one KV head stand together in the grid, and of these the last rows, which with a causal mask see most keys,
 * come first, so that the short ones fill the gaps at the end. Built for the options of target.h. */
#include "call_reader.h"
#include "gpu/tile_loop.h"
#if defined(AITER_WGMMA)
#include "gpu/arch/sm90_forward.h"
#elif defined(AITER_GFX9)
#include "gpu/arch/gfx9_paired_forward.h"
#include "gpu/arch/gfx9_scored_pieces.h"
#endif

namespace aiter {

/* wgmma's loop knows no dropout, its registers hold no output of more than 256 columns, and its copies do not convert
 * 8-bit keys and values. */
#if defined(AITER_WGMMA) && AITER_HEAD_DIM <= 256 && AITER_VALUE_DIM <= 256 && !AITER_DROPOUT && !AITER_FP8_CACHE
using Loop = WarpgroupLoop<HEAD_DIM, VALUE_DIM>;
#elif defined(AITER_GFX9)
using Loop = LoopOf<HEAD_DIM, VALUE_DIM>;
#elif AITER_CUT
#error "this loop cuts no keys"
#else
using Loop = TileLoop<HEAD_DIM, VALUE_DIM>;
#endif
constexpr int WAVE_ROWS = Loop::WAVE_ROWS, BLOCK_ROWS = Loop::BLOCK_ROWS;

/* Rows of one sequence, which a block works on at one time: of one head or of several (Packing). Loop::place says in
 * which order. */
struct RowTile : Loop::Packing {
    int head; /* the first */
    Sequence sequence;
    int first_row;
    Range
        keys; /* that any of its rows sees; batch_invariant, dropout: from the beginning of a tile on, wherever rows begin */

    static int64_t of_heads(const aiter_attention_problem &p) {
        const int bits = Loop::packing_of(p).bits;
        return ((int64_t(p.seqlen_q) << bits) + BLOCK_ROWS - 1) / BLOCK_ROWS;
    }
    static int64_t of_all(const aiter_attention_problem &p) {
        return of_heads(p) * (p.heads_q >> Loop::packing_of(p).bits) * p.batch;
    }
    __device__ __forceinline__ RowTile(const Loop::Launch &launch, int index)
        : RowTile(launch, Loop::place(launch, index)) {}
    __device__ __forceinline__ RowTile(const Loop::Launch &launch, const Place &place)
        : Loop::Packing(Loop::packing(launch)), head(place.head), sequence(launch, place),
          first_row(place.row_tile * BLOCK_ROWS) {
        /* Not by keys_of_any(), of what is being made: for gfx942 that costs 226 instructions. */
        keys = sequence.mask.keys_of_any(token(first_row), token(first_row + BLOCK_ROWS - 1) + 1);
        if (WINDOW) keys.low -= keys.low % Loop::alignment(launch);
        sequence.keys.begin = lesser(keys.low, greater(sequence.keys.count - 1, 0)); /* a key that there is */
        if (WINDOW && (DROPOUT || launch.problem.batch_invariant)) keys.low -= keys.low % Loop::KEYS;
    }

    /* The keys that any of so many rows from `row` on sees, and those that all of them see. */
    __device__ __forceinline__ Range keys_of_any(int row, int rows) const {
        return sequence.mask.keys_of_any(token(row), token(row + rows - 1) + 1);
    }
    __device__ __forceinline__ Range keys_of_all(int row, int rows) const {
        return sequence.mask.keys_of_all(token(row), token(row + rows - 1) + 1);
    }
    /* Whether any of its rows is to be written. */
    __device__ __forceinline__ bool exists() const { return token(first_row) < sequence.padded_rows; }
    /* The same sequence in the head of a row. */
    __device__ __forceinline__ Sequence sequence_of(int row, const aiter_attention_problem &p) const {
        Sequence own = sequence;
        own.query += member(row) * p.query_strides[2];
        own.output += member(row) * p.output_strides[2];
        return own;
    }
};

/* Did a value that not all of the wave's rows see stand in its matrix products, and is not finite? */
__device__ __forceinline__ bool met_hidden_infinity(const RowTile &tile, int wave_row) {
    const Sequence &sequence = tile.sequence;
    const Range keys = tile.keys;
    const Range all_see = tile.keys_of_all(wave_row, WAVE_ROWS);
    const int end = lesser(keys.low + round_up(keys.high - keys.low, Loop::KEYS), sequence.keys.count);
    return values_not_finite(sequence, all_see.high, end) ||
           WINDOW && values_not_finite(sequence, keys.low, lesser(all_see.low, end));
}

/* What a wave's rows end with, as far as that does not depend on their output. Holder: the loop, or another that has a
 * wave's results as a loop has them. */
template <class Holder> struct RowEnds {
    using Output = typename Holder::Output;
    static constexpr int SLOTS = Output::SLOTS;
    float log_sum[SLOTS], share[SLOTS], weight[SLOTS]; /* weight: what the output is to be multiplied by */
    bool sees_keys[SLOTS], all_see;                    /* all_see: all rows of the wave */
    bool whole;                                        /* all_see, and the loop may send all of the rows at one time */
    int wave_row;                                      /* the first of the wave */

    RowEnds() = default;
    __device__ __forceinline__ RowEnds(const Loop::Launch &launch, const RowTile &tile, const Dropout &dropout,
                                       OnlineSoftmax<SLOTS> &softmax)
        : wave_row(tile.first_row + Holder::wave_row()) {
        const Sequence &sequence = tile.sequence;
        bool see = true;
        softmax.finish(log_sum);
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            const int row = wave_row + Output::row(slot), token = tile.token(row);
            sees_keys[slot] = token < sequence.rows && !sequence.mask.keys_of(token).empty();
            see &= sees_keys[slot];
            share[slot] = share_of_keys(launch.tensors.sinks, tile.head + tile.member(row), log_sum[slot]);
            if (FP8) share[slot] *= sequence.value_descale();
            if (DROPOUT) share[slot] *= dropout.scale;
        }
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) weight[slot] = weight_of_keys(softmax.sum[slot], share[slot]);
        all_see = !wave_any(!see);
        whole = all_see && Holder::can_send(launch, tile, wave_row);
        if (!all_see) /* in few waves */
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) log_sum[slot] = sees_keys[slot] ? log_sum[slot] : -INFINITE;
    }
};

/* Where a RowTile goes when all of its keys have been seen. */
template <class Holder> struct Finish {
    using Ends = RowEnds<Holder>;
    using Output = typename Holder::Output;
    using OutputPlace = typename Holder::OutputPlace;
    static constexpr int SLOTS = Output::SLOTS;
    const Loop::Launch &launch;
    OutputPlace place;
    const Score &score;

    __device__ __forceinline__ Ends ends(const RowTile &tile, OnlineSoftmax<SLOTS> &softmax) const {
        const Ends ends(launch, tile, dropout(), softmax);
        const Sequence &sequence = tile.sequence;
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            const int row = ends.wave_row + Output::row(slot), token = tile.token(row);
            float *to = sequence.lse + token;
            if (Holder::SEVERAL_HEADS) to += tile.member(row) * launch.problem.lse_strides[1];
            if (sequence.lse != nullptr && token < sequence.padded_rows && lane_leads_row())
                global_store(to, ends.log_sum[slot] * LN_2);
        }
        return ends;
    }
    /* place: in shared memory, which a loop's output goes by. */
    __device__ __forceinline__ void store(const RowTile &tile, const Ends &ends, Output &o, OutputPlace &place) const {
        const aiter_attention_problem &p = launch.problem;
        const Sequence &sequence = tile.sequence;
        const int wave_row = ends.wave_row;
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) o.multiply(slot, ends.weight[slot]);
        const bool may_be_nan = Holder::round_output(o, place);
        if (ends.whole && !may_be_nan) return Holder::leave(tile, wave_row, place);
        if (!ends.all_see)
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot)
#pragma unroll
                for (int i = 0; i < Output::VALUES; ++i) o.set(slot, i, ends.sees_keys[slot] ? o.get(slot, i) : 0.0f);
        bool spoiled[SLOTS] = {}; /* rows that are NaN though their scores are not */
        bool any_spoiled = false;
        if (may_be_nan)
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) {
                float x = 0.0f, y = 0.0f; /* two, as each sum waits for the one before */
#pragma unroll
                for (int i = 0; i < Output::VALUES; i += 2) x += o.get(slot, i), y += o.get(slot, i + 1);
                const float row_total = row_sum(x + y);
                spoiled[slot] = row_total != row_total && __builtin_fabsf(ends.log_sum[slot]) < INFINITE;
                any_spoiled |= spoiled[slot];
            }
        if (MASKED && wave_any(any_spoiled)) /* is it a hidden value that did it? */
            if (!met_hidden_infinity(tile, wave_row))
#pragma unroll
                for (int slot = 0; slot < SLOTS; ++slot) spoiled[slot] = false;
        Holder::store_output(o, place, [&](int row) {
            row += wave_row;
            Element *to = sequence.output + tile.token(row) * sequence.output_stride;
            if (Holder::SEVERAL_HEADS) to += tile.member(row) * p.output_strides[2];
            return tile.token(row) < sequence.padded_rows ? to : nullptr;
        });
        if (MASKED && wave_any(any_spoiled)) {
            wave_sync(); /* these rows are written once more, by other lanes */
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot)
#pragma unroll 1
                for (uint64_t lanes = ballot(spoiled[slot] && lane_leads_row()); lanes != 0; lanes &= lanes - 1) {
                    const int leader = first_lane(lanes), row = from_lane(wave_row + Output::row(slot), leader);
                    const float log_sum = from_lane(ends.log_sum[slot], leader),
                                share = from_lane(ends.share[slot], leader);
                    const int first = Holder::first_column(place);
                    if (Holder::SEVERAL_HEADS)
                        exact_row(tile.sequence_of(row, p), tile.token(row), score, dropout(), log_sum, share, first,
                                  Holder::OWN_COLUMNS);
                    else exact_row(sequence, row, score, dropout(), log_sum, share, first, Holder::OWN_COLUMNS);
                }
        }
    }
    __device__ __forceinline__ void operator()(const RowTile &tile, OnlineSoftmax<SLOTS> &softmax, Output &o) const {
        OutputPlace place = this->place;
        store(tile, ends(tile, softmax), o, place);
    }

  private:
    __device__ __forceinline__ Dropout dropout() const { return Dropout(launch.problem, launch.tensors); }
};

__global__ void __launch_bounds__(Loop::THREADS, Loop::BLOCKS)
    attention_forward(const AITER_GRID_CONSTANT Loop::Launch launch) {
    AITER_SHARED_OF_LAUNCH(shared);
    const Score score(launch.problem);
    Loop::run<RowTile>(launch, shared_address(shared), score,
                       Finish<Loop>{launch, Loop::OutputPlace{shared_address(shared)}, score});
}

#if AITER_CUT
#if defined(AITER_WGMMA)
/* A piece of keys that few rows see. Always in clusters, whose size the launch says. */
__global__ void __cluster_dims__() __launch_bounds__(Loop::Shared::THREADS, 1)
    share_pieces(const AITER_GRID_CONSTANT Loop::Launch launch) {
    AITER_SHARED_OF_LAUNCH(shared);
    const Score score(launch.problem);
    using Columns = Loop::Shared::Columns;
    Loop::Shared::run<RowTile>(
        launch, shared_address(shared), score,
        [&](const RowTile &tile, Loop::Softmax &softmax, Columns::Output &o, Columns::OutputPlace place) {
            Finish<Columns>{launch, place, score}(tile, softmax, o);
        });
}
#else
/* Pieces of keys that few rows see, in place of attention_forward. 2 waves on a SIMD at least: with registers for one alone
 * the compiler keeps products' sums in those that only matrix instructions use, and moves them to and fro. */
using Scored = ScoredPieces<Loop>;
__global__ void __launch_bounds__(WAVE, 2) score_keys(const Loop::Launch launch) {
    Scored::score_keys<RowTile>(launch, Score(launch.problem));
}
__global__ void __launch_bounds__(Scored::THREADS, 2) sum_values(const Loop::Launch launch) {
    __shared__ Scored::Exchange exchange;
    Scored::sum_values<RowTile>(launch, exchange, Score(launch.problem));
}
#endif
/* Where keys are dealt to several blocks: a block for each wave's rows of a row tile, which adds up what those have
 * left. What the row tile is it finds out before these have ended: lengths are older than both kernels. */
__global__ void __launch_bounds__(Loop::Work::MOST_ADDING_THREADS)
    add_up_pieces(const AITER_GRID_CONSTANT Loop::Launch launch) {
    const Loop::Work &work = launch.work;
    const int row_tile = block() / work.waves(), of_tile = block() % work.waves();
    const Place place = Loop::place(launch, row_tile);
    Loop::Work::Task<RowTile> task(launch, place, row_tile);
    wait_for_previous();
    if (!work.adds_up(task.piece) || !task.exists()) return;
    const Score score(launch.problem);
    Loop::Softmax softmax(score.unit);
    Loop::Output o;
    __shared__ Loop::Work::Sums sums;
    if (!work.add_up(task.piece, of_tile, sums, softmax, o)) return;
    task.first_row += of_tile * WAVE_ROWS; /* these are the first wave's */
    Finish<Loop>{launch, Loop::OutputPlace{shared_address(&sums)}, score}(task, softmax, o);
}
#endif

} // namespace aiter

AITER_EXPORT void aiter_describe(aiter_description *description) {
    description->abi_version = AITER_ABI_VERSION;
    description->call_bytes = sizeof(aiter_call);
}

AITER_EXPORT int64_t aiter_workspace_bytes(const aiter_call *call) {
    const aiter_attention_problem &p = call->problem;
    return aiter::check_problem(p) ? 0 : aiter::Loop::workspace_bytes(p, aiter::RowTile::of_all(p));
}

AITER_EXPORT int aiter_launch(const aiter_call *call, void *stream) {
    const aiter_attention_problem &p = call->problem;
    if (const int error = aiter::check_problem(p)) return error;
    const int64_t row_tiles = aiter::RowTile::of_all(p);
#if AITER_CUT && defined(AITER_WGMMA)
    return aiter::Loop::start(aiter::attention_forward, *call, row_tiles, stream, aiter::add_up_pieces,
                              aiter::share_pieces);
#elif AITER_CUT
    return aiter::Loop::start(aiter::attention_forward, *call, row_tiles, stream, aiter::add_up_pieces,
                              [=](const aiter::Loop::Launch &launch) {
                                  return aiter::Scored::start(launch, aiter::score_keys, aiter::sum_values, stream);
                              });
#else
    return aiter::Loop::start(aiter::attention_forward, *call, row_tiles, stream);
#endif
}

AITER_EXPORT const char *aiter_error_text(int code) { return aiter::error_text(code); }
