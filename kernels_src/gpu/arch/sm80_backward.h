/* The backward pass on NVIDIA with mma.sync: own and passing rows in shared memory, all waves copy and all multiply.
 * Implements the interface that attention_backward.hip describes. sm_90a has its own in arch/sm90_backward.h, on the
 * same tiles:
 *
 *   shared memory   own x | own y | stage 0 | stage 1 | ...      a stage: passing x | passing y | log_sum | delta
 *
 * A tile is stored in blocks of 64 columns: rows of 128 bytes, one after the other, their 16-byte chunks exclusive-ored
 * with row % 8. ldmatrix reads it without bank conflicts in both directions, and it is the 128-byte swizzle that wgmma
 * knows, as a matrix and as a transposed one. */
#ifndef AITER_GPU_ARCH_SM80_BACKWARD_H
#define AITER_GPU_ARCH_SM80_BACKWARD_H

#include "gpu/arch.h"

namespace aiter {

template <int ROWS, int HEAD_DIM> struct BlockLayout {
    static constexpr int BLOCKS = round_up(HEAD_DIM, 64) / 64;
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

template <int OUTSTANDING> __device__ __forceinline__ void wait_for_copies_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(OUTSTANDING) : "memory");
}
__device__ __forceinline__ void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void copy_word_async(SharedAddress to, const float *from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
}

/* Shared memory of a block, and its filling by THREADS threads. */
template <int HEAD_DIM, int PASS, int OWN_ROWS, int PASSING_ROWS, int STAGE_COUNT, int THREADS> struct BackwardTiles {
    static constexpr int ROWS = OWN_ROWS, TOKENS = PASSING_ROWS, STAGES = STAGE_COUNT;
    static constexpr int COLUMN_RUN = 2;
    static constexpr bool BOTH_IN_ONE_PASS = HEAD_DIM <= 128; /* the gradients of keys and values */
    using OwnLayout = BlockLayout<ROWS, HEAD_DIM>;
    using Layout = BlockLayout<TOKENS, HEAD_DIM>;
    static constexpr int TERMS_AT = 2 * Layout::BYTES;
    static constexpr int STAGE_BYTES = round_up(TERMS_AT + 2 * TOKENS * 4, 1024);
    static constexpr int OWN_BYTES = 2 * OwnLayout::BYTES;
    static constexpr int TILE_BYTES = OWN_BYTES + STAGES * STAGE_BYTES + 1024; /* tiles begin at multiples of 1024 */

    SharedAddress own;
    __device__ __forceinline__ explicit BackwardTiles(SharedAddress shared) : own((shared + 1023) & ~1023u) {}

    __device__ __forceinline__ SharedAddress stage(int i) const { return own + OWN_BYTES + i * STAGE_BYTES; }

    /* Rows first ... first + COUNT - 1; those past `count` and columns past HEAD_DIM become zeros. Eight lanes copy one
     * line of a row. */
    template <int COUNT>
    static __device__ __forceinline__ void copy(SharedAddress tile, const Rows &rows, int first, int count,
                                                int thread) {
        using Layout = BlockLayout<COUNT, HEAD_DIM>;
        constexpr int STEP = THREADS / 8;
        static_assert(COUNT % STEP == 0 && STEP % 8 == 0, "whole steps");
        const int row = thread / 8, chunk = thread % 8;
        const SharedAddress to = tile + Layout::chunk(row, chunk);
        const char *from = rows.row(first + row) + chunk * 16;
        const int left = count - first - row;
#pragma unroll
        for (int step = 0; step < COUNT; step += STEP)
#pragma unroll
            for (int block = 0; block < Layout::BLOCKS; ++block)
                copy_async(to + step * 128 + block * Layout::BLOCK_BYTES, from + step * rows.stride + block * 128,
                           step < left && (block * 64 + 64 <= HEAD_DIM || block * 64 + chunk * 8 < HEAD_DIM));
    }
    __device__ __forceinline__ void copy_own(const RowPair &rows, int first, int thread) const {
        copy<ROWS>(own, rows.x, first, rows.count, thread);
        if (PASS != GRAD_VALUE) copy<ROWS>(own + OwnLayout::BYTES, rows.y, first, rows.count, thread);
    }
    __device__ __forceinline__ void copy_passing(SharedAddress to, const RowPair &rows, int first, int thread) const {
        copy<TOKENS>(to, rows.x, first, rows.count, thread);
        copy<TOKENS>(to + Layout::BYTES, rows.y, first, rows.count, thread);
        if (!owns_queries(PASS) && thread < 2 * TOKENS) { /* taken apart on the way */
            const int i = first + thread / 2;
            const float *terms = reinterpret_cast<const float *>(rows.terms + i);
            copy_word_async(to + TERMS_AT + (thread % 2 * TOKENS + thread / 2) * 4, terms + thread % 2, i < rows.count);
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
        x = p_x * (x - d_x), y = p_y * (y - d_y);
    }

    /* By way of the own rows in shared memory, needed no more. */
    template <class Output, class RowPointer>
    __device__ __forceinline__ void store(const Output &gradient, RowPointer row) const {
        Accumulator<1, HEAD_DIM> columns;
#pragma unroll
        for (int n = 0; n < columns.TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) columns.tile[0][n][i] = gradient.tile[0][n][i];
        store_output<HEAD_DIM>(columns, own + wave() * ROW_TILE * RowLayout<HEAD_DIM>::BYTES, row);
    }
};

} // namespace aiter

#include "gpu/arch/sm90_backward.h"

#if !defined(AITER_WGMMA)
namespace aiter {

/* Tiles are small enough for the 99 KB of shared memory that every SM from sm_80 on has. */
constexpr int backward_waves(int head_dim) { return head_dim <= 128 ? 8 : 4; }
constexpr int backward_tokens(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 32 : 16; }

template <int HEAD_DIM, int PASS>
struct Backward : BackwardTiles<HEAD_DIM, PASS, backward_waves(HEAD_DIM) * ROW_TILE, backward_tokens(HEAD_DIM), 2,
                                backward_waves(HEAD_DIM) * WAVE> {
    static constexpr int WAVES = backward_waves(HEAD_DIM), THREADS = WAVES * WAVE, TEAM = 1, BLOCKS = 1;
    using Tiles = BackwardTiles<HEAD_DIM, PASS, WAVES * ROW_TILE, backward_tokens(HEAD_DIM), 2, THREADS>;
    using Layout = typename Tiles::Layout;
    using OwnLayout = typename Tiles::OwnLayout;
    static constexpr int TOKENS = Tiles::TOKENS, STAGES = Tiles::STAGES, SHARED_BYTES = Tiles::TILE_BYTES;
    static constexpr int RUN_ON = 0;
    static constexpr bool CARRIERS = false;
    using Scores = Accumulator<1, TOKENS>;
    using Output = Accumulator<1, HEAD_DIM>;
    static __device__ __forceinline__ int forget(int x) { return opaque(x); }

    int coming = 0, current = STAGES - 1;
    SharedAddress tile; /* the current stage */

    __device__ __forceinline__ explicit Backward(SharedAddress shared) : Tiles(shared) {}

    __device__ __forceinline__ void load_own(const RowPair &rows, int first) {
        this->copy_own(rows, first, thread_in_block());
    }
    __device__ __forceinline__ void issue(const RowPair &rows, int first) {
        this->copy_passing(this->stage(coming), rows, first, thread_in_block());
        skip();
    }
    __device__ __forceinline__ void skip() {
        end_of_copies();
        coming = coming + 1 == STAGES ? 0 : coming + 1;
    }
    __device__ __forceinline__ void publish() {
        wait_for_copies_but<STAGES - 2>();
        barrier();
        current = current + 1 == STAGES ? 0 : current + 1;
        tile = this->stage(current);
    }
    template <int> __device__ __forceinline__ void release() {}
    template <int> static __device__ __forceinline__ void wait() {}
    template <int, class Matrix> static __device__ __forceinline__ void finish(Matrix &) {}
    __device__ __forceinline__ void end() { barrier(); }

    __device__ __forceinline__ void scores(Scores &s) const { multiply_rows(this->own, tile, s); }
    __device__ __forceinline__ void grad_probabilities(Scores &dp) const {
        multiply_rows(this->own + OwnLayout::BYTES, tile + Layout::BYTES, dp);
    }
    __device__ __forceinline__ void add_to_x(const Scores &ds, Output &dx) const { multiply_columns(ds, tile, dx); }
    __device__ __forceinline__ void add_to_y(const Scores &p, Output &dy) const {
        multiply_columns(p, tile + Layout::BYTES, dy);
    }
    __device__ __forceinline__ void term(int which, int column, float (&run)[2]) const {
        Tiles::term_at(tile, which, column, run);
    }

    /* s = A B^T, of this wave's 16 rows of A */
    static __device__ __forceinline__ void multiply_rows(SharedAddress a_rows, SharedAddress b_rows, Scores &s) {
        const SharedAddress a_lane = a_rows + OwnLayout::chunk(wave() * ROW_TILE + lane() % 16, lane() / 16);
        const SharedAddress b_lane = b_rows + Layout::chunk(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2);
        s.clear();
#pragma unroll
        for (int j = 0; j < round_up(HEAD_DIM, 16) / 16; ++j) {
            uint32_t a[4];
            load_matrices(a, OwnLayout::at(a_lane, 0, j));
#pragma unroll
            for (int n = 0; n < TOKENS / 16; ++n) {
                uint32_t b[4];
                load_matrices(b, Layout::at(b_lane, n * 16, j));
                multiply_add(s.tile[0][2 * n], a, b[0], b[1]);
                multiply_add(s.tile[0][2 * n + 1], a, b[2], b[3]);
            }
        }
    }

    /* o += round(s) B */
    static __device__ __forceinline__ void multiply_columns(const Scores &s, SharedAddress b_rows, Output &o) {
        const SharedAddress b_lane = b_rows + Layout::chunk(lane() % 16, lane() / 16);
#pragma unroll
        for (int j = 0; j < TOKENS / 16; ++j) {
            uint32_t a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                a[i] = to_elements(s.tile[0][2 * j + i / 2][i % 2 * 2], s.tile[0][2 * j + i / 2][i % 2 * 2 + 1]);
#pragma unroll
            for (int n = 0; n < round_up(HEAD_DIM, 16) / 16; ++n) {
                uint32_t b[4];
                load_matrices_transposed(b, Layout::at(b_lane, j * 16, n));
                multiply_add(o.tile[0][2 * n], a, b[0], b[1]);
                multiply_add(o.tile[0][2 * n + 1], a, b[2], b[3]);
            }
        }
    }
};

} // namespace aiter
#endif

#endif
