/* The gradients of attention, from its output and log-sum-exp; scores and probabilities are computed again, a tile at a
 * time, and never stored. Three passes, one after the other on the stream:
 *
 *   row_terms            a row of the output and its gradient at a time: delta and log_sum of the row to the workspace
 *   GRAD_QUERY           a block owns query rows and goes through the keys that they see
 *   GRAD_KEY_VALUE       a block owns keys and goes through the query rows that see them, of all heads of the group
 *
 * The last two are one kernel (see backward.h: own rows, passing rows, x and y):
 *
 *                 passing rows ->   tile 0   tile 1   tile 2 ...
 *                       +---------+--------+--------+--------+
 *             wave 0    | x, y    |        |        |        |     shared memory   passing x and y, some tiles ahead
 *       own   wave 1    | and     | S, P,  |        |        |     registers       S and P, dP and dS of one tile;
 *       rows  wave 2    | their   | dP, dS |        |        |                     gradients of the own rows
 *             wave 3    | grads   |        |        |        |     either          own x and y, as suits the arch
 *                       +---------+--------+--------+--------+
 *
 *   each tile   publish             the tile that was on its way is the current one (block barrier)
 *               issue               another sets off
 *               scores              S = x x^T                          matrix unit
 *               grad_probabilities  dP = y y^T                         matrix unit
 *                                   P = exp2(scale * S - log_sum)      vector unit, meanwhile
 *               add_to_y            gradient of y += P y               matrix unit
 *                                   dS = P (dP - delta)                vector unit, meanwhile
 *               add_to_x            gradient of x += dS x              matrix unit
 *
 * A gradient is summed in one place, by one block, in one order: the result is the same in every run, with no atomics.
 * The price is that S and dP are computed in both passes, seven products of matrices where five would do.
 *
 * The interface of an arch, Backward<HEAD_DIM, PASS>, implemented by arch/<arch>_backward.h:
 *   WAVES, THREADS, ROWS       of a block; ROWS are its own rows, ROW_TILE for each of WAVES waves
 *   TEAM                       waves that multiply together and so must do the same
 *   TOKENS, STAGES             passing rows of a tile; tiles that are on their way or in use
 *   COLUMN_RUN                 adjacent columns of an accumulator in a lane
 *   BOTH_IN_ONE_PASS           whether GRAD_KEY_VALUE fits into the registers
 *   CARRIERS                   whether other waves than the owning ones carry the tiles: carries(), begin_to_carry(),
 *                              begin_to_own()
 *   Scores, Output             accumulators: own rows x passing rows, own rows x head_dim (or more)
 *   load_own(pair, first)      the own rows, zeros past the last; they are there after the first publish
 *   issue(pair, first)         start to fetch passing rows; skip() takes the place of an issue where none is left
 *   publish, scores, grad_probabilities, add_to_x, add_to_y
 *   term(which, column, run)   log_sum (0) or delta (1) of a run of passing rows
 *   exponentiate, weigh        of two scores, or two gradients of probabilities, at a time
 *   wait<N>(), finish<N>(m)    products may run on: wait for all but the latest N groups of them; `m` can be read then
 *   release<N>()               the same; and the tile before this one may be overwritten
 *   RUN_ON                     groups that may run on into the next tile
 *   end()                      the block is done with its shared memory; store may use it
 *   store(gradient, row)       row(r): pointer to row r of this wave's in memory, or null
 *   forget(x)                  x, in a way that nothing worked out from it before is kept for later
 *
 * Built for one dtype, AITER_HEAD_DIM and AITER_CAUSAL. */
#define AITER_BACKWARD
#include "gpu/backward.h"

namespace aiter {

constexpr int HEAD_DIM = AITER_HEAD_DIM;
constexpr bool CAUSAL = AITER_CAUSAL;
constexpr float INFINITE = __builtin_inff();
constexpr float LOG2_E = 1.4426950408889634f;

/* ---- delta and log_sum of the query rows: LANES neighbouring lanes take a row ---- */

constexpr int TERM_THREADS = 256;
constexpr int TERM_LANES = HEAD_DIM <= 64 ? 8 : HEAD_DIM <= 128 ? 16 : 32;
constexpr int TERM_ROWS = TERM_THREADS / TERM_LANES;

__global__ void __launch_bounds__(TERM_THREADS) row_terms(const GradArguments arguments) {
    const aiter_attention_problem &problem = arguments.problem.forward;
    const int row_blocks = (problem.seqlen_q + TERM_ROWS - 1) / TERM_ROWS;
    const int head = block() / row_blocks % problem.heads_q;
    const GradSequence sequence(arguments, block() / row_blocks / problem.heads_q);
    const int row = block() % row_blocks * TERM_ROWS + thread_in_block() / TERM_LANES;
    const int lane_in_row = thread_in_block() % TERM_LANES;

    const Window sees = window<CAUSAL, GRAD_QUERY>(sequence, row);
    const bool exists = row < sequence.query.count, blind = sees.high <= sees.low;
    float delta = 0.0f;
    if (exists && !blind && lane_in_row < HEAD_DIM / 8) {
        const char *output = sequence.query_rows(arguments.tensors.output, problem.output_strides, head).row(row);
        const char *grad =
            sequence.query_rows(arguments.tensors.grad_output, arguments.problem.grad_output_strides, head).row(row);
        Element o[8], g[8];
        __builtin_memcpy(o, __builtin_assume_aligned(output + lane_in_row * 16, 16), 16);
        __builtin_memcpy(g, __builtin_assume_aligned(grad + lane_in_row * 16, 16), 16);
#pragma unroll
        for (int i = 0; i < 8; ++i) delta += to_float(o[i]) * to_float(g[i]);
    }
#pragma unroll
    for (int distance = 1; distance < TERM_LANES; distance *= 2) delta += from_lane(delta, lane() ^ distance);
    if (!exists || lane_in_row != 0) return;
    const int64_t place = head * problem.lse_strides[1] + row +
                          (problem.packed_q ? sequence.query.begin : sequence.batch * problem.lse_strides[0]);
    if (!blind && arguments.tensors.grad_lse != nullptr) delta -= arguments.tensors.grad_lse[place];
    /* The probabilities of a row that sees nothing are all zero. */
    sequence.terms(head)[row] = {blind ? INFINITE : arguments.tensors.lse[place] * LOG2_E, delta};
}

/* ---- the gradients ---- */

/* Zeros where own and passing rows do not see each other. */
template <class Scores, class Share>
__device__ __forceinline__ void hide(Scores &s, const Share &share, int wave_row, int first) {
#pragma unroll
    for (int slot = 0; slot < Scores::SLOTS; ++slot) {
        const Window window = share.see(wave_row + Scores::row(slot));
        const int low = window.low - first - Scores::lane_column(), high = window.high - first - Scores::lane_column();
#pragma unroll
        for (int i = 0; i < Scores::VALUES; ++i)
            if (Scores::column(i) < low || Scores::column(i) >= high) s.set(slot, i, 0.0f);
    }
}

template <int PASS> using TileOf = Backward<HEAD_DIM, PASS>;

/* What one block does. Blocks with most to do come first: those of the last query rows, or of the first keys. */
template <int PASS> struct Share {
    using Tile = TileOf<PASS>;
    GradSequence sequence;
    int kv_head, first_head, query_head, heads_passing;
    int block_row, own_rows, padded_rows; /* own side: the first of the block, all that exist, all to be written */
    int first, tiles;                     /* the first passing row, and how many tiles; the same for each head */

    static __device__ __forceinline__ Work work(const aiter_attention_problem &problem, int block) {
        return work_of_block(block, problem.batch * problem.heads_kv, heads(problem) * row_blocks(problem));
    }
    static __device__ __forceinline__ int heads(const aiter_attention_problem &problem) { /* that share passing rows */
        return owns_queries(PASS) ? problem.heads_q / problem.heads_kv : 1;
    }
    static __device__ __forceinline__ int row_blocks(const aiter_attention_problem &problem) {
        return ((owns_queries(PASS) ? problem.seqlen_q : problem.seqlen_k) + Tile::ROWS - 1) / Tile::ROWS;
    }
    __device__ __forceinline__ explicit Share(const GradArguments &arguments, int block)
        : sequence(arguments, work(arguments.problem.forward, block).unit / arguments.problem.forward.heads_kv) {
        const aiter_attention_problem &problem = arguments.problem.forward;
        const Work work = Share::work(problem, block);
        const int group = problem.heads_q / problem.heads_kv, row_block = work.part / heads(problem);
        kv_head = work.unit % problem.heads_kv;
        first_head = kv_head * group;
        query_head = first_head + work.part % heads(problem);
        heads_passing = owns_queries(PASS) ? 1 : group;
        block_row = (owns_queries(PASS) ? row_blocks(problem) - 1 - row_block : row_block) * Tile::ROWS;
        own_rows = owns_queries(PASS) ? sequence.query.count : sequence.key.count;
        padded_rows = owns_queries(PASS) ? sequence.padded_queries() : sequence.padded_keys();
        first = see(block_row).low;
        const int passing_rows = see(lesser(block_row + Tile::ROWS, own_rows) - 1).high - first;
        tiles = block_row < own_rows && passing_rows > 0 ? (passing_rows + Tile::TOKENS - 1) / Tile::TOKENS : 0;
    }
    __device__ __forceinline__ Window see(int own_row) const { return window<CAUSAL, PASS>(sequence, own_row); }
    __device__ __forceinline__ RowPair own() const {
        return owns_queries(PASS) ? sequence.queries(query_head) : sequence.keys(kv_head);
    }
    __device__ __forceinline__ RowPair passing() const {
        return owns_queries(PASS) ? sequence.keys(kv_head) : sequence.queries(first_head);
    }
};

/* Starts one tile after the other on its way. */
template <int PASS> struct Issue {
    const Share<PASS> &share;
    TileOf<PASS> &tile;
    int head = 0, count = 0; /* of the next one: which of the passing heads, which of its tiles */
    RowPair passing;         /* of that head */

    __device__ __forceinline__ Issue(const Share<PASS> &share, TileOf<PASS> &tile)
        : share(share), tile(tile), passing(share.passing()) {}
    __device__ __forceinline__ void operator()() {
        if (head == share.heads_passing) return tile.skip();
        tile.issue(passing, share.first + count * TileOf<PASS>::TOKENS);
        if (++count < share.tiles) return;
        count = 0;
        if (++head < share.heads_passing) share.sequence.next_head(passing);
    }
};

template <int PASS> __device__ __forceinline__ void carry(const Share<PASS> &share, TileOf<PASS> &tile) {
    if (share.tiles == 0) return;
    tile.load_own(share.own(), share.block_row);
    Issue<PASS> issue(share, tile);
    for (int count = 0; count < share.tiles * share.heads_passing; ++count) issue();
}

/* The gradients of this wave's own rows. */
template <int PASS, class Output>
__device__ __forceinline__ void multiply(const Share<PASS> &share, TileOf<PASS> &tile, int wave_row, Output &grad_x,
                                         Output &grad_y) {
    using Tile = TileOf<PASS>;
    using Scores = typename Tile::Scores;
    constexpr int SLOTS = Scores::SLOTS, COLUMN_RUN = Tile::COLUMN_RUN, TEAM_ROWS = Tile::TEAM * ROW_TILE;

    Issue<PASS> issue(share, tile);
    if (!Tile::CARRIERS) {
        tile.load_own(share.own(), share.block_row);
#pragma unroll
        for (int stage = 0; stage < Tile::STAGES - 1; ++stage) issue();
    }
    /* The passing rows that any row of the team takes part with are first.low ... last.high - 1; those that all of its
     * rows do, last.low ... first.high - 1. */
    const int team_row = share.block_row + wave() / Tile::TEAM * TEAM_ROWS;
    const Window team_first = share.see(team_row);
    const Window team_last = share.see(lesser(team_row + TEAM_ROWS, share.own_rows) - 1);
    float log_sum[SLOTS], delta[SLOTS]; /* of own query rows */
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
        const int row = wave_row + Scores::row(slot);
        if (owns_queries(PASS)) {
            const Terms *rows = share.sequence.terms(share.query_head);
            const Terms terms = row < share.own_rows ? rows[row] : Terms{INFINITE, 0.0f};
            log_sum[slot] = terms.log_sum, delta[slot] = terms.delta;
        }
    }
    const float scale = share.sequence.arguments.problem.forward.softmax_scale * LOG2_E;

    for (int head = 0; head < share.heads_passing; ++head)
        for (int count = 0, first = share.first; count < share.tiles; ++count, first += Tile::TOKENS) {
            tile.publish();
            if (!Tile::CARRIERS) issue();
            const int end = first + Tile::TOKENS;
            if (end <= team_first.low || first >= team_last.high) { /* causal: the tile is the other waves' */
                tile.template release<0>();
                continue;
            }
            const bool masked = first < team_last.low || end > team_first.high;
            Scores p, ds;
            tile.scores(p);
            if (gives_x(PASS)) tile.grad_probabilities(ds);
            tile.template release<gives_x(PASS) ? 2 : 1>();
            tile.template finish<gives_x(PASS) ? 1 : 0>(p);
#pragma unroll
            for (int i = 0; i < Scores::VALUES; i += COLUMN_RUN) {
                float run[COLUMN_RUN];
                if (!owns_queries(PASS)) tile.term(0, Scores::column(i) + Scores::lane_column(), run);
#pragma unroll
                for (int j = 0; j < COLUMN_RUN; j += 2)
#pragma unroll
                    for (int slot = 0; slot < SLOTS; ++slot) {
                        float x = p.get(slot, i + j), y = p.get(slot, i + j + 1);
                        if (owns_queries(PASS)) run[j] = run[j + 1] = log_sum[slot];
                        Tile::exponentiate(x, y, scale, run[j], run[j + 1]);
                        p.set(slot, i + j, x), p.set(slot, i + j + 1, y);
                    }
            }
            if (masked) hide(p, share, wave_row, first);
            if (gives_y(PASS)) tile.add_to_y(p, grad_y);
            if (!gives_x(PASS)) continue;
            tile.template finish<gives_y(PASS) ? 1 : 0>(ds);
#pragma unroll
            for (int i = 0; i < Scores::VALUES; i += COLUMN_RUN) {
                float run[COLUMN_RUN];
                if (!owns_queries(PASS)) tile.term(1, Scores::column(i) + Scores::lane_column(), run);
#pragma unroll
                for (int j = 0; j < COLUMN_RUN; j += 2)
#pragma unroll
                    for (int slot = 0; slot < SLOTS; ++slot) {
                        float x = ds.get(slot, i + j), y = ds.get(slot, i + j + 1);
                        if (owns_queries(PASS)) run[j] = run[j + 1] = delta[slot];
                        Tile::weigh(x, y, p.get(slot, i + j), p.get(slot, i + j + 1), run[j], run[j + 1]);
                        ds.set(slot, i + j, x), ds.set(slot, i + j + 1, y);
                    }
            }
            if (masked) hide(ds, share, wave_row, first); /* 0 * inf or 0 * NaN */
            tile.add_to_x(ds, grad_x);
            tile.template wait<Tile::RUN_ON>();
        }
    if (gives_y(PASS)) tile.template finish<0>(grad_y);
    if (gives_x(PASS)) tile.template finish<0>(grad_x);
    tile.end();
}

template <int PASS> __device__ __forceinline__ void own(const Share<PASS> &first_share, TileOf<PASS> &tile) {
    using Output = typename TileOf<PASS>::Output;
    const int wave_row = first_share.block_row + wave() * ROW_TILE;
    Output grad_x, grad_y;
    if (gives_x(PASS)) grad_x.clear();
    if (gives_y(PASS)) grad_y.clear();
    if (first_share.tiles > 0) multiply<PASS>(first_share, tile, wave_row, grad_x, grad_y);

    /* Worked out anew, so that the loop need not keep it in registers. */
    const Share<PASS> share(first_share.sequence.arguments, TileOf<PASS>::forget(block()));
    const auto store = [&](Output &gradient, void *tensor, const int64_t(&strides)[3], float factor) {
        const Rows rows = owns_queries(PASS) ? share.sequence.query_rows(tensor, strides, share.query_head)
                                             : share.sequence.key_rows(tensor, strides, share.kv_head);
#pragma unroll
        for (int slot = 0; slot < Output::SLOTS; ++slot) {
            const bool exists = wave_row + Output::row(slot) < share.own_rows;
#pragma unroll
            for (int i = 0; i < Output::VALUES; ++i)
                gradient.set(slot, i, exists ? gradient.get(slot, i) * factor : 0.0f);
        }
        tile.store(gradient, [&](int row) {
            return wave_row + row < share.padded_rows ? reinterpret_cast<Element *>(rows.row(wave_row + row)) : nullptr;
        });
    };
    const aiter_attention_grad_problem &p = share.sequence.arguments.problem;
    const aiter_attention_grad_tensors &t = share.sequence.arguments.tensors;
    if (owns_queries(PASS)) store(grad_x, t.grad_query, p.grad_query_strides, p.forward.softmax_scale);
    if (!owns_queries(PASS) && gives_x(PASS)) store(grad_x, t.grad_key, p.grad_key_strides, p.forward.softmax_scale);
    if (gives_y(PASS)) store(grad_y, t.grad_value, p.grad_value_strides, 1.0f);
}

template <int PASS>
__global__ void __launch_bounds__(TileOf<PASS>::THREADS, TileOf<PASS>::BLOCKS)
    attention_backward(const GradArguments arguments) {
    AITER_SHARED(shared, TileOf<PASS>::SHARED_BYTES);
    const Share<PASS> share(arguments, block());
    if (share.block_row >= share.padded_rows) return;
    TileOf<PASS> tile(shared_address(shared));
    if constexpr (TileOf<PASS>::CARRIERS) {
        if (tile.carries()) {
            tile.begin_to_carry();
            carry<PASS>(share, tile);
        } else {
            tile.begin_to_own();
            own<PASS>(share, tile);
        }
    } else {
        own<PASS>(share, tile);
    }
}

template <int PASS> int launch_pass(const GradArguments &arguments, void *stream) {
    using Tile = TileOf<PASS>;
    const aiter_attention_problem &p = arguments.problem.forward;
    const int64_t rows = owns_queries(PASS) ? p.seqlen_q : p.seqlen_k;
    const int64_t heads = owns_queries(PASS) ? p.heads_q : p.heads_kv;
    return launch(attention_backward<PASS>, (rows + Tile::ROWS - 1) / Tile::ROWS * heads * p.batch, Tile::THREADS,
                  Tile::SHARED_BYTES, stream, arguments);
}

} // namespace aiter

AITER_EXPORT void aiter_describe(aiter_description *description) {
    description->abi_version = AITER_ABI_VERSION;
    description->call_bytes = sizeof(aiter_call);
}

AITER_EXPORT int64_t aiter_workspace_bytes(const aiter_call *call) {
    const aiter_attention_problem &p = call->problem.forward;
    return sizeof(aiter::Terms) * p.heads_q * (p.packed_q ? p.total_q : int64_t(p.batch) * p.seqlen_q);
}

AITER_EXPORT int aiter_launch(const aiter_call *call, void *stream) {
    const aiter_attention_problem &p = call->problem.forward;
    if (const int error = aiter::check_problem(p)) return error;
    const int64_t limit = int64_t(1) << 24; /* for queries as for keys: either may pass by */
    if (p.query_strides[1] >= limit || call->problem.grad_output_strides[1] >= limit) return aiter::LAUNCH_STRIDE_TOO_LARGE;
    const int64_t row_blocks = (p.seqlen_q + int64_t(aiter::TERM_ROWS) - 1) / aiter::TERM_ROWS;
    const int64_t blocks = row_blocks * p.heads_q * p.batch;
    int error = aiter::launch(aiter::row_terms, blocks, aiter::TERM_THREADS, 0, stream, *call);
    if (error == 0) error = aiter::launch_pass<aiter::GRAD_QUERY>(*call, stream);
    if constexpr (aiter::TileOf<aiter::GRAD_KEY_VALUE>::BOTH_IN_ONE_PASS) {
        if (error == 0) error = aiter::launch_pass<aiter::GRAD_KEY_VALUE>(*call, stream);
    } else {
        if (error == 0) error = aiter::launch_pass<aiter::GRAD_KEY>(*call, stream);
        if (error == 0) error = aiter::launch_pass<aiter::GRAD_VALUE>(*call, stream);
    }
    return error;
}

AITER_EXPORT const char *aiter_error_text(int code) { return aiter::error_text(code); }
