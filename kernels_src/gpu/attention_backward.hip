/* The gradients of attention, from its output and log-sum-exp; scores and probabilities are computed again, a tile at a
 * time, and never stored. Three passes, one after the other on the stream:
 *
 *   lse_and_delta        a row of the output and its gradient at a time: LSE and delta of the row to the workspace
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
 *   each tile           see backward_loop.h, or the loop that an arch has of its own (arch/sm90_backward.h,
 *                       arch/gfx9_query_gradient.h, arch/gfx9_key_gradients.h)
 *   at the end          the gradients of the own rows, times the scale where they are of queries or keys, go to memory;
 *                       so do zeros for rows that belong to no sequence
 *
 * A gradient is summed in one place, by one block, in one order: the result is the same in every run, with no atomics.
 * The price is that S and dP are computed in both passes, seven products of matrices where five would do. On NVIDIA,
 * long sequences are spared it at some head dimensions (in_one_pass): the last two passes are then
 *
 *   GRAD_ALL             as GRAD_KEY_VALUE; a tile's gradients of queries, too, added to float32 sums in the workspace
 *   finish_queries       the sums, times the scale, rounded
 *
 *                      tile 0   tile 1   tile 2 ...         Blocks add to a tile one after the other, in an order
 *     block of keys 0    ->       ->       ->   dK, dV      that depends on the problem alone: again the result is the
 *     block of keys 1    ->       ->       ->   dK, dV      same in every run. How they keep out of each other's way:
 *                        |        |        |                KeyBlocks in backward.h; how they wait for each other:
 *                        dQ       dQ       dQ               arch/sm90_one_pass.h, arch/sm80_one_pass.h.
 *
 * A softmax scale of zero makes all scores zero, whatever their products: the passes then read a row of zeros as every
 * query, which stands in the workspace.
 *
 * The interface of an arch, Backward<HEAD_DIM, VALUE_DIM, PASS>, implemented by arch/<arch>_backward.h:
 *   THREADS, ROWS              of a block; ROWS are its own rows, ROW_TILE for each wave or, beyond 256 columns, for
 *                              two of them, each with half of the columns of the gradient; wave_row() of these rows
 *   TOKENS, STAGES             passing rows of a tile; tiles that are on their way or in use
 *   COLUMN_RUN                 adjacent columns of an accumulator in a lane
 *   BOTH_IN_ONE_PASS           whether GRAD_KEY_VALUE fits into the registers
 *   Scores, GradX, GradY       accumulators: own rows x passing rows, own rows x columns of x, of y (or more)
 *   ALL_TAKE_PART              whether every wave must compute every tile, also those that its rows do not see
 *   load_own(pair, first)      the own rows, zeros past the last; they are there after the first publish
 *   issue(pair, first)         start to fetch passing rows; skip() takes the place of an issue where none is left
 *   publish, scores, grad_probabilities, add_to_x, add_to_y
 *   term(which, column, run)   LSE (0) or delta (1) of a run of passing rows
 *   exponentiate, weigh        of two scores, or two gradients of probabilities, at a time
 *   end()                      the block is done with its shared memory; store may use it
 *   store<COLUMNS>(gradient, row)   row(r): pointer to row r of this wave's in memory, or null
 *   forget(x)                  x, in a way that nothing worked out from it before is kept for later
 *
 * Built for the options of target.h, without pages. */
#define AITER_BACKWARD
#include <type_traits>

#include "gpu/backward_loop.h"
#if defined(AITER_WGMMA)
#include "gpu/arch/sm90_backward.h"
#if AITER_HEAD_DIM <= 64
#include "gpu/arch/sm90_one_pass_narrow.h"
#elif AITER_HEAD_DIM <= 128
#include "gpu/arch/sm90_one_pass.h"
#elif AITER_HEAD_DIM == 256
#include "gpu/arch/sm90_one_pass_wide.h"
#endif
#elif defined(AITER_GFX9) && AITER_HEAD_DIM <= 128 && AITER_VALUE_DIM <= 128 && !AITER_SOFTCAP
#include "gpu/arch/gfx9_key_gradients.h"
#include "gpu/arch/gfx9_query_gradient.h"
#elif !defined(AITER_GFX9) && AITER_HEAD_DIM == AITER_VALUE_DIM && (AITER_HEAD_DIM == 64 || AITER_HEAD_DIM == 128)
#define AITER_MMA_ONE_PASS
#include "gpu/arch/sm80_one_pass.h"
#endif

namespace aiter {

static_assert(!PAGED, "the backward pass knows no pages");
static_assert(HEAD_DIM <= 512, "latent attention's backward pass is that of its separate keys and values");

#if defined(AITER_WGMMA) && AITER_HEAD_DIM <= 256 && AITER_VALUE_DIM <= 256 /* beyond, gradients do not fit */
#if AITER_HEAD_DIM <= 64
template <int PASS> using Loop = std::conditional_t<PASS == GRAD_ALL, NarrowOnePassLoop, BackwardWarpgroupLoop<PASS>>;
#elif AITER_HEAD_DIM <= 128
template <int PASS> using Loop = std::conditional_t<PASS == GRAD_ALL, OnePassLoop, BackwardWarpgroupLoop<PASS>>;
#elif AITER_HEAD_DIM == 256
template <int PASS> using Loop = std::conditional_t<PASS == GRAD_ALL, WideOnePassLoop, BackwardWarpgroupLoop<PASS>>;
#else
template <int PASS> using Loop = BackwardWarpgroupLoop<PASS>;
#endif
/* At 96 and 128 columns, soft caps and dropout leave too few registers: the loop would spill some 50 of them. At 192,
 * three passes are faster. */
constexpr bool HAS_ONE_PASS =
    HEAD_DIM == VALUE_DIM &&
    (HEAD_DIM == 64 || (HEAD_DIM == 96 || HEAD_DIM == 128) && !SOFTCAP && !DROPOUT || HEAD_DIM == 256);
#elif defined(AITER_GFX9) && AITER_HEAD_DIM <= 128 && AITER_VALUE_DIM <= 128 && !AITER_SOFTCAP
/* Beyond, a SIMD's registers hold one wave; a soft cap's derivative takes too many, too. */
template <int PASS> using Loop = std::conditional_t<PASS == GRAD_QUERY, QueryLoop, PairedLoop>;
constexpr bool HAS_ONE_PASS = false;
#elif defined(AITER_MMA_ONE_PASS)
template <int PASS> using Loop = std::conditional_t<PASS == GRAD_ALL, OnePassLoop, BackwardTileLoop<PASS>>;
/* Two passes where a multiprocessor has 100 KB of shared memory. */
constexpr bool HAS_ONE_PASS = OnePassLoop::SHARED_BYTES * ONE_PASS_BLOCKS <= SHARED_LIMIT;
#else
template <int PASS> using Loop = BackwardTileLoop<PASS>;
constexpr bool HAS_ONE_PASS = false;
#endif

/* Whether GRAD_ALL takes the place of the passes after the first (figures: docs/hopper_backward.md). Its sums make
 * traffic, which counts for less the longer the sequences are: on an H100, causal attention over 1024 tokens gained 4 %
 * from it where no block waited. And blocks that see the same tiles queue up when the first of them begin, each for
 * about as long as a tile takes (see KeyBlocks): all tiles that a multiprocessor goes through must outnumber them by
 * far, or more is lost than gained. */
constexpr int ONE_PASS_KEYS = 1024;
template <int PASS = GRAD_ALL> /* a template, so that it is not built where no loop has it */
__host__ __device__ inline bool in_one_pass(const aiter_attention_problem &p) {
    if constexpr (HAS_ONE_PASS) {
        if (p.seqlen_k < ONE_PASS_KEYS || p.heads_kv <= 0) return false;
        constexpr int ROWS = Loop<PASS>::ROWS;
        const KeyBlocks blocks(p.batch * p.heads_kv, (p.seqlen_k + ROWS - 1) / ROWS);
        const int seen_alike = blocks.parts - (MASKED ? lesser(p.seqlen_q / ROWS, blocks.parts) : 0);
        const int64_t tiles = int64_t(p.seqlen_q / QuerySums::ROWS) * (p.heads_q / p.heads_kv) * blocks.sets();
        return tiles >= 8 * seen_alike;
    }
    return false;
}

/* ---- LSE and delta of the query rows: LANES neighbouring lanes take a row ---- */

constexpr int TERM_THREADS = 256;
constexpr int TERM_LANES = VALUE_DIM <= 64 ? 8 : VALUE_DIM <= 128 ? 16 : 32;
constexpr int TERM_ROWS = TERM_THREADS / TERM_LANES;

__global__ void __launch_bounds__(TERM_THREADS) lse_and_delta(const GradArguments arguments) {
    const aiter_attention_problem &problem = arguments.problem.forward;
    if (block() == 0 && thread_in_block() < HEAD_DIM / 8)
        global_store(static_cast<char *>(arguments.tensors.workspace) + zeros_at(problem) + thread_in_block() * 16,
                     Chunk{});
    if (in_one_pass(problem)) {
        uint32_t *counters = QuerySums(arguments).ticket;
        const int64_t count = QuerySums::counters(problem), step = int64_t(blocks()) * TERM_THREADS;
#pragma unroll 1
        for (int64_t i = int64_t(block()) * TERM_THREADS + thread_in_block(); i < count; i += step) counters[i] = 0;
    }
    const int row_blocks = (problem.seqlen_q + TERM_ROWS - 1) / TERM_ROWS;
    const int head = block() / row_blocks % problem.heads_q;
    const GradSequence sequence(arguments, block() / row_blocks / problem.heads_q);
    const int row = block() % row_blocks * TERM_ROWS + thread_in_block() / TERM_LANES;
    const int lane_in_row = thread_in_block() % TERM_LANES;

    const bool exists = row < sequence.query.count, blind = sequence.mask.keys_of(row).empty();
    float delta = 0.0f;
    if (exists && !blind) {
        const char *output = sequence.query_rows(arguments.tensors.output, problem.output_strides, head).row(row);
        const char *grad =
            sequence.query_rows(arguments.tensors.grad_output, arguments.problem.grad_output_strides, head).row(row);
#pragma unroll
        for (int chunk = lane_in_row; chunk < VALUE_DIM / 8; chunk += TERM_LANES) {
            Element o[8], g[8];
            __builtin_memcpy(o, __builtin_assume_aligned(output + chunk * 16, 16), 16);
            __builtin_memcpy(g, __builtin_assume_aligned(grad + chunk * 16, 16), 16);
#pragma unroll
            for (int i = 0; i < 8; ++i) delta += to_float(o[i]) * to_float(g[i]);
        }
    }
#pragma unroll
    for (int distance = 1; distance < TERM_LANES; distance *= 2) delta += from_lane(delta, lane() ^ distance);
    if (!exists || lane_in_row != 0) return;
    const int64_t place = head * problem.lse_strides[1] + row +
                          (problem.packed_q ? sequence.query.begin : sequence.batch * problem.lse_strides[0]);
    if (!blind && arguments.tensors.grad_lse != nullptr) delta -= usual_nan(arguments.tensors.grad_lse[place]);
    /* The probabilities of a row that sees nothing are all zero. */
    const float lse = usual_nan(arguments.tensors.lse[place]) * LOG2_E - ENLARGED_BITS;
    sequence.terms(head)[row] = {blind ? INFINITE : lse, delta / ENLARGED};
}

/* ---- the gradients ---- */

template <int PASS> using ShareOf = typename Loop<PASS>::Share;

/* One gradient of the block's own rows: where its tensor is. */
template <int COLUMNS> struct Destination {
    void *tensor;
    const int64_t (&strides)[3];
    float factor; /* what the sum must be multiplied by */
};

template <int PASS> __device__ __forceinline__ auto destination_of_x(const GradArguments &a) {
    const aiter_attention_problem &p = a.problem.forward;
    return Destination<HEAD_DIM>{owns_queries(PASS) ? a.tensors.grad_query : a.tensors.grad_key,
                                 owns_queries(PASS) ? a.problem.grad_query_strides : a.problem.grad_key_strides,
                                 Score::is_zero(p) ? 0.0f : p.softmax_scale};
}
__device__ __forceinline__ auto destination_of_y(const GradArguments &a) {
    const float scale = DROPOUT ? Dropout(a.problem.forward, a.tensors).scale : 1.0f;
    return Destination<VALUE_DIM>{a.tensors.grad_value, a.problem.grad_value_strides, scale / ENLARGED};
}

template <int PASS, int COLUMNS, class Share>
__device__ __forceinline__ Rows rows_of(const Share &share, const Destination<COLUMNS> &to) {
    return owns_queries(PASS) ? share.sequence.query_rows(to.tensor, to.strides, share.query_head)
                              : share.sequence.key_rows(to.tensor, to.strides, share.kv_head);
}

template <int PASS, int COLUMNS, class Tile, class Gradient>
__device__ __forceinline__ void store(const ShareOf<PASS> &share, const Tile &tile, Gradient &gradient,
                                      const Destination<COLUMNS> &to) {
    const Rows rows = rows_of<PASS, COLUMNS>(share, to);
    const int wave_row = share.block_row + Tile::wave_row();
#pragma unroll
    for (int slot = 0; slot < Gradient::SLOTS; ++slot) {
        const bool exists = wave_row + Gradient::row(slot) < share.own_rows && to.factor != 0;
#pragma unroll
        for (int i = 0; i < Gradient::VALUES; ++i)
            gradient.set(slot, i, exists ? gradient.get(slot, i) * to.factor : 0.0f);
    }
    tile.template store<COLUMNS>(gradient, [&](int row) {
        return wave_row + row < share.padded_rows ? reinterpret_cast<Element *>(rows.row(wave_row + row)) : nullptr;
    });
}

/* Zeros in the block's part of the packed rows that belong to no sequence. */
template <int PASS, int COLUMNS, class Share>
__device__ __forceinline__ void clear_rest(const Share &share, const Destination<COLUMNS> &to, int threads) {
    const GradArguments &a = share.sequence.arguments;
    const aiter_attention_problem &p = a.problem.forward;
    const Rows rows = rows_of<PASS, COLUMNS>(share, to);
    const Side side = owns_queries(PASS) ? query_side(p, a.tensors) : key_side(p, a.tensors);
    clear_rest<COLUMNS>(
        side, owns_queries(PASS) ? share.sequence.query : share.sequence.key, share.sequence.batch, p.batch,
        share.row_block * threads + thread_in_block(), share.row_blocks * threads,
        [&](int64_t row, int column) { global_store(rows.row_0 + row * rows.stride + column * 2, Chunk{}); });
}

/* Where blocks wait for each other, the order in which they have begun. */
template <int PASS> __device__ __forceinline__ int number_of_block(const GradArguments &arguments, char *shared) {
    if (PASS != GRAD_ALL) return block();
#if !defined(AITER_GFX9)
    int *number = reinterpret_cast<int *>(shared);
    if (thread_in_block() == 0) *number = static_cast<int>(atomicAdd(QuerySums(arguments).ticket, 1u));
    barrier();
    const int result = *number;
    barrier();
    return result;
#endif
}

/* The parameter of a pass's kernel. */
template <class Loop, class = void> struct ParameterOf {
    using Type = GradArguments;
};
template <class Loop> struct ParameterOf<Loop, std::void_t<typename Loop::Launch>> {
    using Type = typename Loop::Launch;
};
template <int PASS> using Parameter = typename ParameterOf<Loop<PASS>>::Type;
#define AITER_PARAMETER const AITER_GRID_CONSTANT Parameter<PASS>

template <int PASS>
__global__ void __launch_bounds__(Loop<PASS>::THREADS, Loop<PASS>::BLOCKS)
    attention_backward(AITER_PARAMETER arguments) {
    AITER_SHARED(shared, Loop<PASS>::SHARED_BYTES);
    const int number = number_of_block<PASS>(arguments, shared);
    const ShareOf<PASS> first_share(arguments, number);
    constexpr int THREADS = Loop<PASS>::THREADS;
    if (gives_x(PASS)) clear_rest<PASS, HEAD_DIM>(first_share, destination_of_x<PASS>(arguments), THREADS);
    if (gives_y(PASS)) clear_rest<PASS, VALUE_DIM>(first_share, destination_of_y(arguments), THREADS);
    if (first_share.block_row >= first_share.padded_rows) return;
    Loop<PASS>::attend(first_share, shared_address(shared), [&](const auto &tile, auto &grad_x, auto &grad_y) {
        /* Worked out anew, so that the loop need not keep it in registers. */
        const ShareOf<PASS> share(arguments, Loop<PASS>::forget(number));
        if constexpr (gives_x(PASS) && HAS_GRADIENT<decltype(grad_x)>)
            store<PASS>(share, tile, grad_x, destination_of_x<PASS>(arguments));
        if constexpr (gives_y(PASS) && HAS_GRADIENT<decltype(grad_y)>)
            store<PASS>(share, tile, grad_y, destination_of_y(arguments));
    });
}

/* The gradients of queries, as GRAD_ALL has added them up, times the scale and rounded: a tile of rows. */
constexpr int FINISH_THREADS = 128 * QuerySums::PARTS;
template <int PASS = GRAD_ALL>
__global__ void __launch_bounds__(FINISH_THREADS) finish_queries(const GradArguments arguments) {
    constexpr int COLUMNS = QuerySums::COLUMNS, CHUNKS = HEAD_DIM / 8;
    __shared__ uint4 rounded[QuerySums::ROWS][COLUMNS / 8 + 1]; /* rows in different banks */
    const Share<GRAD_QUERY, QuerySums::ROWS, 64> share(arguments, block());
    const Destination<HEAD_DIM> to = destination_of_x<GRAD_QUERY>(arguments);
    clear_rest<GRAD_QUERY, HEAD_DIM>(share, to, FINISH_THREADS);
    if (share.block_row >= share.padded_rows) return;

    const QuerySums sums(arguments);
    const int part = thread_in_block() / 128, thread = thread_in_block() % 128;
    const float4 *from = reinterpret_cast<const float4 *>(
        sums.sums + sums.tile(share.sequence, share.query_head, share.block_row) * QuerySums::TILE_BYTES +
        part * QuerySums::PART_BYTES);
    const int row = thread / 32 * 16 + thread % 32 / 4, column = part * QuerySums::PART_COLUMNS + thread % 4 * 2;
    const float factor = share.tiles > 0 ? to.factor : 0.0f;
    const bool first = share.block_row + row < share.own_rows && factor != 0;
    const bool second = share.block_row + row + 8 < share.own_rows && factor != 0;
#pragma unroll
    for (int n = 0; n < QuerySums::PART_COLUMNS / 8; ++n) {
        const float4 x = factor != 0 ? from[n * 128 + thread] : float4{0, 0, 0, 0};
        Element *place = reinterpret_cast<Element *>(rounded[row]) + column + n * 8;
        *reinterpret_cast<uint32_t *>(place) = first ? to_elements(x.x * factor, x.y * factor) : 0;
        *reinterpret_cast<uint32_t *>(place + 8 * sizeof(rounded[0]) / 2) =
            second ? to_elements(x.z * factor, x.w * factor) : 0;
    }
    barrier();
    const Rows rows = rows_of<GRAD_QUERY, HEAD_DIM>(share, to);
#pragma unroll 1
    for (int i = thread_in_block(); i < QuerySums::ROWS * CHUNKS; i += FINISH_THREADS)
        if (share.block_row + i / CHUNKS < share.padded_rows)
            global_store(rows.row(share.block_row + i / CHUNKS) + i % CHUNKS * 16, rounded[i / CHUNKS][i % CHUNKS]);
}
template <int PASS = GRAD_ALL> int launch_finish(const GradArguments &arguments, void *stream) {
    const aiter_attention_problem &p = arguments.problem.forward;
    const int64_t tiles = (p.seqlen_q + int64_t(QuerySums::ROWS) - 1) / QuerySums::ROWS;
    return launch(finish_queries<PASS>, tiles * p.heads_q * p.batch, FINISH_THREADS, 0, stream, arguments);
}

template <int PASS> int launch_pass(const GradArguments &arguments, void *stream) {
    static_assert(Loop<PASS>::SHARED_BYTES <= SHARED_LIMIT, "more shared memory than a block of this arch can have");
    const aiter_attention_problem &p = arguments.problem.forward;
    const int64_t rows = owns_queries(PASS) ? p.seqlen_q : p.seqlen_k;
    const int64_t heads = owns_queries(PASS) ? p.heads_q : p.heads_kv;
    return launch(attention_backward<PASS>, (rows + Loop<PASS>::ROWS - 1) / Loop<PASS>::ROWS * heads * p.batch,
                  Loop<PASS>::THREADS, Loop<PASS>::SHARED_BYTES, stream, Parameter<PASS>(arguments));
}

/* A template, so that only the passes that are launched are built. */
template <bool BUILD = HAS_ONE_PASS> int launch_gradients(const GradArguments &arguments, void *stream) {
    if constexpr (BUILD)
        if (in_one_pass(arguments.problem.forward)) {
            const int error = launch_pass<GRAD_ALL>(arguments, stream);
            return error == 0 ? launch_finish(arguments, stream) : error;
        }
    int error = launch_pass<GRAD_QUERY>(arguments, stream);
    if constexpr (Loop<GRAD_KEY_VALUE>::BOTH_IN_ONE_PASS) {
        if (error == 0) error = launch_pass<GRAD_KEY_VALUE>(arguments, stream);
    } else {
        if (error == 0) error = launch_pass<GRAD_KEY>(arguments, stream);
        if (error == 0) error = launch_pass<GRAD_VALUE>(arguments, stream);
    }
    return error;
}

} // namespace aiter

AITER_EXPORT void aiter_describe(aiter_description *description) {
    description->abi_version = AITER_ABI_VERSION;
    description->call_bytes = sizeof(aiter_call);
}

AITER_EXPORT int64_t aiter_workspace_bytes(const aiter_call *call) {
    const aiter_attention_problem &p = call->problem.forward;
    return aiter::in_one_pass(p) ? aiter::QuerySums::end(p) : aiter::zeros_at(p) + aiter::HEAD_DIM * 2;
}

AITER_EXPORT int aiter_launch(const aiter_call *call, void *stream) {
    const aiter_attention_problem &p = call->problem.forward;
    if (const int error = aiter::check_problem(p)) return error;
    const int64_t limit = int64_t(1) << 24; /* for queries as for keys: either may pass by */
    if (p.query_strides[1] >= limit || call->problem.grad_output_strides[1] >= limit)
        return aiter::LAUNCH_STRIDE_TOO_LARGE;
    aiter_call arguments = *call;
    if (aiter::Score::is_zero(p)) {
        arguments.tensors.query = static_cast<char *>(call->tensors.workspace) + aiter::zeros_at(p);
        for (int64_t &stride : arguments.problem.forward.query_strides) stride = 0;
    }
    const int64_t row_blocks = (p.seqlen_q + int64_t(aiter::TERM_ROWS) - 1) / aiter::TERM_ROWS;
    const int64_t blocks = row_blocks * p.heads_q * p.batch;
    int error = aiter::launch(aiter::lse_and_delta, blocks, aiter::TERM_THREADS, 0, stream, arguments);
    if (error == 0) error = aiter::launch_gradients(arguments, stream);
    return error;
}

AITER_EXPORT const char *aiter_error_text(int code) { return aiter::error_text(code); }
