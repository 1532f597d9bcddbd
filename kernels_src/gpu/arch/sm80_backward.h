/* The backward pass on NVIDIA: own and passing rows in shared memory. Implements the interface that attention_backward.hip
 * describes, with mma.sync; on sm_90a the products are those of arch/sm90.h.
 *
 * A tile is stored in blocks of 64 columns: rows of 128 bytes, one after the other, their 16-byte chunks exclusive-ored
 * with row % 8. ldmatrix reads it without bank conflicts in both directions, and it is the 128-byte swizzle that wgmma
 * knows, as a matrix and as a transposed one. */
#ifndef AITER_GPU_ARCH_SM80_BACKWARD_H
#define AITER_GPU_ARCH_SM80_BACKWARD_H

#include "gpu/arch.h"
#include "gpu/arch/sm90.h"

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

/* Rows first ... first + ROWS - 1, by all threads; those past `count` and columns past HEAD_DIM become zeros. Eight lanes
 * copy one line of a row. */
template <int ROWS, int HEAD_DIM, int THREADS>
__device__ __forceinline__ void copy_tile(SharedAddress tile, const Rows &rows, int first, int count) {
    using Layout = BlockLayout<ROWS, HEAD_DIM>;
    constexpr int STEP = THREADS / 8;
    static_assert(ROWS % STEP == 0 && STEP % 8 == 0, "whole steps");
    const int row = thread_in_block() / 8, chunk = thread_in_block() % 8;
    const SharedAddress to = tile + Layout::chunk(row, chunk);
    const char *from = rows.row(first + row) + chunk * 16;
    const int left = count - first - row;
#pragma unroll
    for (int step = 0; step < ROWS; step += STEP)
#pragma unroll
        for (int block = 0; block < Layout::BLOCKS; ++block)
            copy_async(to + step * 128 + block * Layout::BLOCK_BYTES, from + step * rows.stride + block * 128,
                       step < left && (block * 64 + 64 <= HEAD_DIM || block * 64 + chunk * 8 < HEAD_DIM));
}

template <int HEAD_DIM, int PASS> struct Backward {
#if defined(AITER_WGMMA)
    static constexpr int WAVES = HEAD_DIM <= 192 ? 8 : 4;
    static constexpr int TEAM = 4;     /* waves that multiply together */
    static constexpr int TOKENS = 64;  /* passing rows of a tile */
    static constexpr int STAGES = HEAD_DIM <= 64 ? 4 : HEAD_DIM <= 128 ? 3 : 2;
    static constexpr int BLOCKS = 1;
    using Output = Accumulator<1, round_up(HEAD_DIM, 64)>;
#else
    static constexpr int WAVES = HEAD_DIM <= 128 ? 8 : 4;
    static constexpr int TEAM = 1;
    static constexpr int TOKENS = HEAD_DIM <= 64 ? 64 : HEAD_DIM <= 128 ? 32 : 16; /* under 100 KB, what every SM has */
    static constexpr int STAGES = 2;
    static constexpr int BLOCKS = 1;
    using Output = Accumulator<1, HEAD_DIM>;
#endif
    static constexpr int THREADS = WAVES * WAVE;
    static constexpr int ROWS = WAVES * ROW_TILE;
    static constexpr int COLUMN_RUN = 2;
    static constexpr bool BOTH_IN_ONE_PASS = HEAD_DIM <= 128; /* the gradients of keys and values */
    using Scores = Accumulator<1, TOKENS>;

    using OwnLayout = BlockLayout<ROWS, HEAD_DIM>;
    using Layout = BlockLayout<TOKENS, HEAD_DIM>;
    static constexpr int STAGE_BYTES = round_up(2 * Layout::BYTES + 2 * TOKENS * 4, 1024);
    static constexpr int OWN_BYTES = 2 * OwnLayout::BYTES;
    static constexpr int SHARED_BYTES = OWN_BYTES + STAGES * STAGE_BYTES + 1024; /* tiles begin at multiples of 1024 */

    SharedAddress own, stages, current, coming;
    SharedAddress own_rows; /* this wave's, or its team's */

    __device__ __forceinline__ explicit Backward(SharedAddress shared) {
        own = (shared + 1023) & ~1023u;
        stages = current = coming = own + OWN_BYTES;
        current += (STAGES - 1) * STAGE_BYTES;
        own_rows = own + wave() / TEAM * TEAM * ROW_TILE * 128;
    }

    __device__ __forceinline__ SharedAddress after(SharedAddress stage) const {
        return stage == stages + (STAGES - 1) * STAGE_BYTES ? stages : stage + STAGE_BYTES;
    }

    __device__ __forceinline__ void load_own(const RowPair &rows, int first) {
        copy_tile<ROWS, HEAD_DIM, THREADS>(own, rows.x, first, rows.count);
        if (PASS != GRAD_VALUE) copy_tile<ROWS, HEAD_DIM, THREADS>(own + OwnLayout::BYTES, rows.y, first, rows.count);
    }

    __device__ __forceinline__ void issue(const RowPair &rows, int first) {
        copy_tile<TOKENS, HEAD_DIM, THREADS>(coming, rows.x, first, rows.count);
        copy_tile<TOKENS, HEAD_DIM, THREADS>(coming + Layout::BYTES, rows.y, first, rows.count);
        if (!owns_queries(PASS) && thread_in_block() < 2 * TOKENS) {
            const int i = thread_in_block() % TOKENS;
            const float *from = thread_in_block() < TOKENS ? rows.terms.log_sum : rows.terms.delta;
            copy_word_async(coming + 2 * Layout::BYTES + thread_in_block() * 4, from + first + i, first + i < rows.count);
        }
        skip();
    }
    __device__ __forceinline__ void skip() {
        end_of_copies();
        coming = after(coming);
    }

    __device__ __forceinline__ void publish() {
        wait_for_copies_but<STAGES - 2>();
        before_products();
        barrier();
        current = after(current);
    }

    __device__ __forceinline__ void scores(Scores &s) const {
        multiply_rows<OwnLayout, Layout, HEAD_DIM>(own_rows, current, s);
    }
    __device__ __forceinline__ void grad_probabilities(Scores &dp) const {
        multiply_rows<OwnLayout, Layout, HEAD_DIM>(own_rows + OwnLayout::BYTES, current + Layout::BYTES, dp);
    }
    __device__ __forceinline__ void add_to_x(const Scores &ds, Output &dx) const {
        multiply_columns<Layout, HEAD_DIM>(ds, current, dx);
    }
    __device__ __forceinline__ void add_to_y(const Scores &p, Output &dy) const {
        multiply_columns<Layout, HEAD_DIM>(p, current + Layout::BYTES, dy);
    }

    /* log_sum or delta of the passing rows column ... column + COLUMN_RUN - 1 */
    __device__ __forceinline__ void term(int which, int column, float (&run)[COLUMN_RUN]) const {
        const float2 pair = shared_load<float2>(current + 2 * Layout::BYTES + which * TOKENS * 4 + column * 4);
        run[0] = pair.x, run[1] = pair.y;
    }

    template <class RowPointer> __device__ __forceinline__ void store(const Output &gradient, RowPointer row) const {
        Accumulator<1, HEAD_DIM> columns;
#pragma unroll
        for (int n = 0; n < columns.TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) columns.tile[0][n][i] = gradient.tile[0][n][i];
        store_output<HEAD_DIM, 1>(columns, own + wave() * ROW_TILE * RowLayout<HEAD_DIM>::BYTES, row);
    }

#if !defined(AITER_WGMMA)
    __device__ __forceinline__ void before_products() const {}

    /* s = A B^T, of 16 rows of A */
    template <class LayoutA, class LayoutB, int DIMENSIONS>
    static __device__ __forceinline__ void multiply_rows(SharedAddress a_rows, SharedAddress b_rows, Scores &s) {
        const SharedAddress a_lane = a_rows + LayoutA::chunk(lane() % 16, lane() / 16);
        const SharedAddress b_lane = b_rows + LayoutB::chunk(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2);
        s.clear();
#pragma unroll
        for (int j = 0; j < round_up(DIMENSIONS, 16) / 16; ++j) {
            uint32_t a[4];
            load_matrices(a, LayoutA::at(a_lane, 0, j));
#pragma unroll
            for (int n = 0; n < TOKENS / 16; ++n) {
                uint32_t b[4];
                load_matrices(b, LayoutB::at(b_lane, n * 16, j));
                multiply_add(s.tile[0][2 * n], a, b[0], b[1]);
                multiply_add(s.tile[0][2 * n + 1], a, b[2], b[3]);
            }
        }
    }

    /* o += round(s) B */
    template <class LayoutB, int DIMENSIONS>
    static __device__ __forceinline__ void multiply_columns(const Scores &s, SharedAddress b_rows, Output &o) {
        const SharedAddress b_lane = b_rows + LayoutB::chunk(lane() % 16, lane() / 16);
#pragma unroll
        for (int j = 0; j < TOKENS / 16; ++j) {
            uint32_t a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                a[i] = to_elements(s.tile[0][2 * j + i / 2][i % 2 * 2], s.tile[0][2 * j + i / 2][i % 2 * 2 + 1]);
#pragma unroll
            for (int n = 0; n < round_up(DIMENSIONS, 16) / 16; ++n) {
                uint32_t b[4];
                load_matrices_transposed(b, LayoutB::at(b_lane, j * 16, n));
                multiply_add(o.tile[0][2 * n], a, b[0], b[1]);
                multiply_add(o.tile[0][2 * n + 1], a, b[2], b[3]);
            }
        }
    }
    template <int OUTSTANDING, class Matrix> static __device__ __forceinline__ void finish(Matrix &) {}
#else
    __device__ __forceinline__ void before_products() const { wgmma::shared_is_written(); }

    template <class LayoutA, class LayoutB, int DIMENSIONS>
    static __device__ __forceinline__ void multiply_rows(SharedAddress a_rows, SharedAddress b_rows, Scores &s) {
        const uint64_t a = wgmma::matrix(a_rows), b = wgmma::matrix(b_rows);
        wgmma::begin();
#pragma unroll
        for (int j = 0; j < round_up(DIMENSIONS, 16) / 16; ++j)
            wgmma::multiply(s.tile[0], a + (j / 4 * LayoutA::BLOCK_BYTES + j % 4 * 32) / 16,
                            b + (j / 4 * LayoutB::BLOCK_BYTES + j % 4 * 32) / 16, j > 0);
        wgmma::end();
    }

    template <class LayoutB, int DIMENSIONS>
    static __device__ __forceinline__ void multiply_columns(const Scores &s, SharedAddress b_rows, Output &o) {
        const uint64_t b = wgmma::matrix(b_rows);
        uint32_t a[TOKENS / 16][4];
#pragma unroll
        for (int j = 0; j < TOKENS / 16; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                a[j][i] = to_elements(s.tile[0][2 * j + i / 2][i % 2 * 2], s.tile[0][2 * j + i / 2][i % 2 * 2 + 1]);
        wgmma::begin();
#pragma unroll
        for (int n = 0; n < LayoutB::BLOCKS; ++n)
#pragma unroll
            for (int j = 0; j < TOKENS / 16; ++j)
                wgmma::multiply_transposed(&o.tile[0][n * 8], a[j], b + (n * LayoutB::BLOCK_BYTES + j * 16 * 128) / 16);
        wgmma::end();
    }
    /* All products but the `OUTSTANDING` latest are done; `matrix` was the result of one of them. */
    template <int OUTSTANDING, class Matrix> static __device__ __forceinline__ void finish(Matrix &matrix) {
        wgmma::wait<OUTSTANDING>();
#pragma unroll
        for (int n = 0; n < Matrix::TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) wgmma::changed(matrix.tile[0][n][i]);
    }
#endif
};

} // namespace aiter

#endif
