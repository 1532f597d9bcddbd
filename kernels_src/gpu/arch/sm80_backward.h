/* The backward pass on NVIDIA with mma.sync: own and passing rows in shared memory, all waves copy and all multiply.
 * Implements the interface that attention_backward.hip describes. sm_90a has a loop of its own in arch/sm90_backward.h,
 * on the same tiles:
 *
 *   shared memory   own x | own y | stage 0 | stage 1 | ...      a stage: passing x | passing y | log_sum | delta
 *
 * A tile is stored in blocks of 64 columns: rows of 128 bytes, one after the other, their 16-byte chunks exclusive-ored
 * with row % 8. ldmatrix reads it without bank conflicts in both directions, and it is the 128-byte swizzle that wgmma
 * knows, as a matrix and as a transposed one. */
#ifndef AITER_GPU_ARCH_SM80_BACKWARD_H
#define AITER_GPU_ARCH_SM80_BACKWARD_H

#include "gpu/arch.h"
#include "gpu/backward.h"

namespace aiter {

template <int ROWS, int COLUMNS> struct BlockLayout {
    static constexpr int BLOCKS = round_up(COLUMNS, 64) / 64;
    static constexpr int BLOCK_BYTES = ROWS * 128;
    static constexpr int BYTES = BLOCKS * BLOCK_BYTES;
    static __device__ __forceinline__ uint32_t chunk(int row, int chunk) {
        return static_cast<uint32_t>(chunk / 8 * BLOCK_BYTES + row * 128 + ((chunk ^ row) % 8 << 4));
    }
    /* From the address that a lane names in the first 16 x 16 elements to that in those at (row, 16 * j). */
    static __device__ __forceinline__ SharedAddress at(SharedAddress lane_row, int row, int j) {
        return (lane_row ^ (2 * j % 8 << 4)) + 2 * j / 8 * BLOCK_BYTES + row * 128;
    }
};

/* GRAD_ALL: until `turn` blocks have added to a tile of QuerySums. Or more of them: see there. */
__device__ __forceinline__ void wait_for_turn(const QuerySums &sums, int64_t place, uint32_t turn) {
    while (load_acquire(sums.turns + place) < turn) {
    }
}

/* Shared memory of a block, and its filling by THREADS threads. Tiles begin at multiples of ALIGNMENT: 128 bytes do for
 * ldmatrix, and AITER_SHARED begins at such a one. */
template <int HEAD_DIM, int VALUE_DIM, int PASS, int OWN_ROWS, int PASSING_ROWS, int STAGE_COUNT, int THREADS,
          int ALIGNMENT = 1024>
struct BackwardTiles {
    static constexpr int ROWS = OWN_ROWS, TOKENS = PASSING_ROWS, STAGES = STAGE_COUNT;
    static constexpr int COLUMN_RUN = 2;
    static constexpr bool BOTH_IN_ONE_PASS = HEAD_DIM + VALUE_DIM <= 256; /* the gradients of keys and values */
    using OwnX = BlockLayout<ROWS, HEAD_DIM>;
    using OwnY = BlockLayout<ROWS, VALUE_DIM>;
    using PassingX = BlockLayout<TOKENS, HEAD_DIM>;
    using PassingY = BlockLayout<TOKENS, VALUE_DIM>;
    static constexpr int TERMS_AT = PassingX::BYTES + PassingY::BYTES;
    static constexpr int STAGE_BYTES = round_up(TERMS_AT + 2 * TOKENS * 4, ALIGNMENT);
    static constexpr int OWN_BYTES = OwnX::BYTES + OwnY::BYTES;
    static constexpr int TILE_BYTES = OWN_BYTES + STAGES * STAGE_BYTES + (ALIGNMENT > 128 ? ALIGNMENT : 0);

    SharedAddress own;
    __device__ __forceinline__ explicit BackwardTiles(SharedAddress shared)
        : own((shared + ALIGNMENT - 1) & ~(ALIGNMENT - 1u)) {}

    __device__ __forceinline__ SharedAddress stage(int i) const { return own + OWN_BYTES + i * STAGE_BYTES; }

    /* Rows first ... first + COUNT - 1; those that the pair does not have and columns past COLUMNS become zeros. Eight
     * lanes copy one line of a row. */
    template <int COUNT, int COLUMNS>
    static __device__ __forceinline__ void copy(SharedAddress tile, const Rows &rows, int first, const RowPair &pair,
                                                int thread) {
        using Layout = BlockLayout<COUNT, COLUMNS>;
        constexpr int STEP = THREADS / 8;
        constexpr bool BEFORE = BEGINS_BEFORE<PASS>;
        static_assert(COUNT % STEP == 0 && STEP % 8 == 0, "whole steps");
        const int row = thread / 8, chunk = thread % 8;
        const SharedAddress to = tile + Layout::chunk(row, chunk);
        const char *from = rows.row(first + row) + chunk * 16;
        const int left = pair.count - first - row, missing = BEFORE ? pair.begin - first - row : 0;
#pragma unroll
        for (int step = 0; step < COUNT; step += STEP)
#pragma unroll
            for (int block = 0; block < Layout::BLOCKS; ++block)
                copy_async(to + step * 128 + block * Layout::BLOCK_BYTES, from + step * rows.stride + block * 128,
                           step < left && (!BEFORE || step >= missing) &&
                               (block * 64 + 64 <= COLUMNS || block * 64 + chunk * 8 < COLUMNS));
    }
    __device__ __forceinline__ void copy_own(const RowPair &rows, int first, int thread) const {
        copy<ROWS, HEAD_DIM>(own, rows.x, first, rows, thread);
        if (PASS != GRAD_VALUE) copy<ROWS, VALUE_DIM>(own + OwnX::BYTES, rows.y, first, rows, thread);
    }
    __device__ __forceinline__ void copy_passing(SharedAddress to, const RowPair &rows, int first, int thread) const {
        copy<TOKENS, HEAD_DIM>(to, rows.x, first, rows, thread);
        copy<TOKENS, VALUE_DIM>(to + PassingX::BYTES, rows.y, first, rows, thread);
        copy_terms(to, rows, first, thread);
    }
    __device__ __forceinline__ void copy_terms(SharedAddress to, const RowPair &rows, int first, int thread) const {
#pragma unroll
        for (int step = 0; step < 2 * TOKENS; step += THREADS) { /* taken apart on the way */
            const int word = step + thread;
            if (owns_queries(PASS) || word >= 2 * TOKENS) break;
            const int i = first + word / 2;
            const float *terms = reinterpret_cast<const float *>(rows.terms + i);
            copy_word_async(to + TERMS_AT + (word % 2 * TOKENS + word / 2) * 4, terms + word % 2, i < rows.count);
        }
    }

    static __device__ __forceinline__ void term_at(SharedAddress stage, int which, int column,
                                                   float (&run)[COLUMN_RUN]) {
        const float2 pair = shared_load<float2>(stage + TERMS_AT + which * TOKENS * 4 + column * 4);
        run[0] = pair.x, run[1] = pair.y;
    }

    /* Two scores become probabilities; two gradients of probabilities become those of scores. */
    static __device__ __forceinline__ void exponentiate(float &x, float &y, float scale, float log_x, float log_y) {
        x = exp2(__builtin_fmaf(x, scale, -log_x)), y = exp2(__builtin_fmaf(y, scale, -log_y));
    }
    static __device__ __forceinline__ void weigh(float &x, float &y, float p_x, float p_y, float d_x, float d_y) {
        x = p_x * less_delta(x, d_x), y = p_y * less_delta(y, d_y);
    }

    /* By way of the own rows in shared memory, needed no more: of the rows that begin with `row`, the columns that
     * begin with `column`. Gradients whose rows differ in length each have a place of their own there, as one wave may
     * be at the second while another is at the first. */
    template <int COLUMNS, class Gradient, class RowPointer>
    __device__ __forceinline__ void store(const Gradient &gradient, int row, int column, RowPointer pointer) const {
        Accumulator<Gradient::SLOTS / 2, lesser(COLUMNS, Gradient::TILES * 8)> columns;
#pragma unroll
        for (int m = 0; m < Gradient::SLOTS / 2; ++m)
#pragma unroll
            for (int n = 0; n < columns.TILES; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) columns.tile[m][n][i] = gradient.tile[m][n][i];
        static_assert(
            ROWS * RowLayout<HEAD_DIM>::BYTES <= OwnX::BYTES && ROWS * RowLayout<VALUE_DIM>::BYTES <= OwnY::BYTES, "");
        const SharedAddress place = own + (COLUMNS == HEAD_DIM ? 0 : OwnX::BYTES);
        store_output<COLUMNS>(columns, place + row * RowLayout<COLUMNS>::BYTES, pointer, column);
    }
};

/* Tiles that all threads copy, one after the other, each while those before it are in use. */
template <class Tiles> struct TilesInTurn : Tiles {
    int coming = 0, current = Tiles::STAGES - 1;
    SharedAddress tile; /* the current stage */

    using Tiles::Tiles;
    __device__ __forceinline__ void load_own(const RowPair &rows, int first) {
        this->copy_own(rows, first, thread_in_block());
    }
    __device__ __forceinline__ void issue(const RowPair &rows, int first) {
        this->copy_passing(this->stage(coming), rows, first, thread_in_block());
        skip();
    }
    __device__ __forceinline__ void skip() {
        end_of_copies();
        coming = coming + 1 == Tiles::STAGES ? 0 : coming + 1;
    }
    __device__ __forceinline__ void publish() {
        wait_for_copies_but<Tiles::STAGES - 2>();
        barrier();
        current = current + 1 == Tiles::STAGES ? 0 : current + 1;
        tile = this->stage(current);
    }
    static __device__ __forceinline__ void end() { barrier(); }
};

/* Tiles are small enough for the 99 KB of shared memory that every SM from sm_80 on has. Beyond 256 columns, teams of
 * two waves have 16 rows. */
struct BackwardShape {
    int waves, tokens;
};
constexpr BackwardShape backward_shape(int wider) {
    return wider <= 64    ? BackwardShape{8, 64}
           : wider <= 128 ? BackwardShape{8, 32}
           : wider <= 256 ? BackwardShape{4, 16}
                          : BackwardShape{SHARED_LIMIT >= 160 * 1024 ? 4 : 2, 16};
}
constexpr int backward_rows(int wider) { return backward_shape(wider).waves / team_of(wider) * ROW_TILE; }

template <int HEAD_DIM, int VALUE_DIM, int PASS>
using BackwardStages = TilesInTurn<BackwardTiles<HEAD_DIM, VALUE_DIM, PASS, backward_rows(greater(HEAD_DIM, VALUE_DIM)),
                                                 backward_shape(greater(HEAD_DIM, VALUE_DIM)).tokens, 2,
                                                 backward_shape(greater(HEAD_DIM, VALUE_DIM)).waves * WAVE>>;

template <int HEAD_DIM, int VALUE_DIM, int PASS> struct Backward : BackwardStages<HEAD_DIM, VALUE_DIM, PASS> {
    static constexpr int WIDER = greater(HEAD_DIM, VALUE_DIM), TEAM = team_of(WIDER);
    static constexpr int WAVES = backward_shape(WIDER).waves, THREADS = WAVES * WAVE, BLOCKS = 1;
    using Tiles = BackwardStages<HEAD_DIM, VALUE_DIM, PASS>;
    using typename Tiles::OwnX, typename Tiles::OwnY, typename Tiles::PassingX, typename Tiles::PassingY;
    static constexpr int TOKENS = Tiles::TOKENS, STAGES = Tiles::STAGES, SHARED_BYTES = Tiles::TILE_BYTES;
    using Scores = Accumulator<1, TOKENS>;
    using GradX = Accumulator<1, columns_of_wave(HEAD_DIM, TEAM)>;
    using GradY = Accumulator<1, columns_of_wave(VALUE_DIM, TEAM)>;
    static __device__ __forceinline__ int wave_row() { return (TEAM == 1 ? wave() : wave() / TEAM) * ROW_TILE; }
    template <int DIM> static __device__ __forceinline__ int first_column() {
        return TEAM == 1 ? 0 : wave() % TEAM * columns_of_wave(DIM, TEAM);
    }
    static __device__ __forceinline__ int forget(int x) { return opaque(x); }
    static constexpr bool ALL_TAKE_PART = false;

    using Tiles::tile;

    __device__ __forceinline__ explicit Backward(SharedAddress shared) : Tiles(shared) {}

    __device__ __forceinline__ void scores(Scores &s) const {
        multiply_rows<OwnX, PassingX, HEAD_DIM>(this->own, tile, s);
    }
    __device__ __forceinline__ void grad_probabilities(Scores &dp) const {
        multiply_rows<OwnY, PassingY, VALUE_DIM>(this->own + OwnX::BYTES, tile + PassingX::BYTES, dp);
    }
    __device__ __forceinline__ void add_to_x(const Scores &ds, GradX &dx) const {
        multiply_columns<PassingX, HEAD_DIM>(ds, tile, dx);
    }
    __device__ __forceinline__ void add_to_y(const Scores &p, GradY &dy) const {
        multiply_columns<PassingY, VALUE_DIM>(p, tile + PassingX::BYTES, dy);
    }
    __device__ __forceinline__ void term(int which, int column, float (&run)[2]) const {
        Tiles::term_at(tile, which, column, run);
    }

    /* s = A B^T, of this wave's 16 rows of A */
    template <class Own, class Passing, int COLUMNS>
    static __device__ __forceinline__ void multiply_rows(SharedAddress a_rows, SharedAddress b_rows, Scores &s) {
        const SharedAddress a_lane = a_rows + Own::chunk(wave_row() + lane() % 16, lane() / 16);
        const SharedAddress b_lane = b_rows + Passing::chunk(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2);
        s.clear();
#pragma unroll
        for (int j = 0; j < round_up(COLUMNS, 16) / 16; ++j) {
            uint32_t a[4];
            load_matrices(a, Own::at(a_lane, 0, j));
#pragma unroll
            for (int n = 0; n < TOKENS / 16; ++n) {
                uint32_t b[4];
                load_matrices(b, Passing::at(b_lane, n * 16, j));
                multiply_add(s.tile[0][2 * n], a, b[0], b[1]);
                multiply_add(s.tile[0][2 * n + 1], a, b[2], b[3]);
            }
        }
    }

    /* o += round(s) B, of this wave's columns of B: all of them, or a multiple of 64 from a multiple of 64 on */
    template <class Passing, int COLUMNS>
    static __device__ __forceinline__ void multiply_columns(const Scores &s, SharedAddress b_rows,
                                                            Accumulator<1, columns_of_wave(COLUMNS, TEAM)> &o) {
        const int first = first_column<COLUMNS>();
        const SharedAddress b_lane =
            b_rows + Passing::chunk(lane() % 16, lane() / 16) + first / 64 * Passing::BLOCK_BYTES;
#pragma unroll
        for (int j = 0; j < TOKENS / 16; ++j) {
            uint32_t a[4];
            round_operand(s, 0, j, a);
#pragma unroll
            for (int n = 0; n < round_up(columns_of_wave(COLUMNS, TEAM), 16) / 16; ++n) {
                if (TEAM > 1 && first + n * 16 >= COLUMNS) break;
                uint32_t b[4];
                load_matrices_transposed(b, Passing::at(b_lane, j * 16, n));
                multiply_add(o.tile[0][2 * n], a, b[0], b[1]);
                multiply_add(o.tile[0][2 * n + 1], a, b[2], b[3]);
            }
        }
    }

    template <int COLUMNS, class Gradient, class RowPointer>
    __device__ __forceinline__ void store(const Gradient &gradient, RowPointer row) const {
        Tiles::template store<COLUMNS>(gradient, wave_row(), first_column<COLUMNS>(), row);
    }
};

} // namespace aiter

#endif
