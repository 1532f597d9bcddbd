/* The backward pass on sm_90a. Implements the interface that attention_backward.hip describes, with wgmma.
 *
 *   one warpgroup   carries: copies tiles by cp.async, as far ahead as there are stages, and needs few registers
 *   the others      own 64 rows each, and go through the tiles independently: while one works on probabilities, another
 *                   has the matrix unit
 *
 * Two barriers in shared memory (mbarrier) belong to each stage: `full` completes when all carriers' copies of a tile
 * have arrived, `empty` when all owning threads are done with it. One lane could arrive for its wave, after a
 * wave_sync; but compute-sanitizer's racecheck follows each thread's own arrivals only, and reported the other lanes'
 * reads of log_sum and delta. No difference in time was seen beyond the card's own spread. */
#ifndef AITER_GPU_ARCH_SM90_BACKWARD_H
#define AITER_GPU_ARCH_SM90_BACKWARD_H

#include "gpu/arch/sm90.h"

#if defined(AITER_WGMMA)
namespace aiter {

template <int HEAD_DIM, int PASS> struct BackwardShape {
    /* That own rows. With twelve there is always one that multiplies, if they get by on the registers. */
    static constexpr int WAVES = HEAD_DIM > 192 ? 4 : HEAD_DIM <= 64 && PASS == GRAD_QUERY ? 12 : 8;
    static constexpr int STAGES = HEAD_DIM <= 128 ? 4 : 2;
    /* Registers of a thread. A block of n threads starts with 65536 / n each and then deals them out anew. */
    static constexpr int OWNER_REGISTERS = WAVES == 12 ? 152 : HEAD_DIM <= 64 ? 224 : 240;
    static constexpr int CARRIER_REGISTERS = WAVES == 12 || HEAD_DIM <= 64 ? 56 : 24;
};

template <int HEAD_DIM, int PASS>
struct Backward : BackwardTiles<HEAD_DIM, PASS, BackwardShape<HEAD_DIM, PASS>::WAVES * ROW_TILE, 64,
                                BackwardShape<HEAD_DIM, PASS>::STAGES, 128> {
    using Shape = BackwardShape<HEAD_DIM, PASS>;
    static constexpr int WAVES = Shape::WAVES, TEAM = 4, BLOCKS = 1;
    static constexpr int THREADS = WAVES * WAVE + 128;
    static constexpr bool CARRIERS = true;
    static constexpr int TOKENS = 64, STAGES = Shape::STAGES;
    /* Groups of products that run on into the next tile: their operands are in registers that nothing else can use. */
    static constexpr int RUN_ON = PASS == GRAD_KEY_VALUE && HEAD_DIM > 64 ? 0 : 1;
    using Tiles = BackwardTiles<HEAD_DIM, PASS, WAVES * ROW_TILE, TOKENS, STAGES, 128>;
    using Layout = typename Tiles::Layout;
    using OwnLayout = typename Tiles::OwnLayout;
    static constexpr int SHARED_BYTES = Tiles::TILE_BYTES + STAGES * 16;
    using Scores = Accumulator<1, TOKENS>;
    using Output = Accumulator<1, round_up(HEAD_DIM, 64)>;
    static __device__ __forceinline__ int forget(int x) { return opaque(x); }

    int current = 0;     /* stage */
    uint32_t turn = 0;   /* how often, modulo 2, the stages have been gone through */
    SharedAddress tile;  /* the current stage */
    int unreleased = -1; /* the stage before, while products that read it may run */

    __device__ __forceinline__ explicit Backward(SharedAddress shared) : Tiles(shared) {
        if (thread_in_block() == 0)
            for (int i = 0; i < STAGES; ++i) mbarrier::make(full(i), 128), mbarrier::make(empty(i), WAVES * WAVE);
        barrier();
    }
    __device__ __forceinline__ SharedAddress full(int i) const { return this->stage(STAGES) + i * 16; }
    __device__ __forceinline__ SharedAddress empty(int i) const { return full(i) + 8; }
    __device__ __forceinline__ void advance() {
        if (++current == STAGES) current = 0, turn ^= 1;
    }

    /* The carriers */
    __device__ __forceinline__ bool carries() const { return wave() >= WAVES; }
    static __device__ __forceinline__ void begin_to_carry() {
        if (WAVES > 4) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Shape::CARRIER_REGISTERS));
    }
    __device__ __forceinline__ void load_own(const RowPair &rows, int first) {
        this->copy_own(rows, first, thread_in_block() - WAVES * WAVE);
    }
    __device__ __forceinline__ void issue(const RowPair &rows, int first) {
        mbarrier::wait(empty(current), turn ^ 1); /* at once in the first turn */
        this->copy_passing(this->stage(current), rows, first, thread_in_block() - WAVES * WAVE);
        mbarrier::arrive_after_copies(full(current));
        advance();
    }
    __device__ __forceinline__ void skip() {}

    /* The owners */
    static __device__ __forceinline__ void begin_to_own() {
        if (WAVES > 4) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Shape::OWNER_REGISTERS));
    }
    __device__ __forceinline__ void publish() {
        mbarrier::wait(full(current), turn);
        wgmma::shared_is_written();
        tile = this->stage(current);
    }
    /* All but the latest N groups of products are done; the stage before this one is needed no more. */
    template <int OUTSTANDING> __device__ __forceinline__ void release() {
        wait<OUTSTANDING>();
        wave_sync();
        if (unreleased >= 0) mbarrier::arrive(empty(unreleased));
        unreleased = current;
        advance();
    }
    template <int OUTSTANDING> static __device__ __forceinline__ void wait() { wgmma::wait<OUTSTANDING>(); }
    template <int OUTSTANDING, class Matrix> static __device__ __forceinline__ void finish(Matrix &matrix) {
        wait<OUTSTANDING>();
#pragma unroll
        for (int n = 0; n < Matrix::TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) wgmma::changed(matrix.tile[0][n][i]);
    }
    __device__ __forceinline__ void end() { asm volatile("bar.sync 1, %0;" ::"n"(WAVES * WAVE) : "memory"); }

    __device__ __forceinline__ SharedAddress team_rows() const {
        return this->own + wave() / TEAM * TEAM * ROW_TILE * 128;
    }
    __device__ __forceinline__ void scores(Scores &s) const { multiply_rows(team_rows(), tile, s); }
    __device__ __forceinline__ void grad_probabilities(Scores &dp) const {
        multiply_rows(team_rows() + OwnLayout::BYTES, tile + Layout::BYTES, dp);
    }
    __device__ __forceinline__ void add_to_x(const Scores &ds, Output &dx) const { multiply_columns(ds, tile, dx); }
    __device__ __forceinline__ void add_to_y(const Scores &p, Output &dy) const {
        multiply_columns(p, tile + Layout::BYTES, dy);
    }
    __device__ __forceinline__ void term(int which, int column, float (&run)[2]) const {
        Tiles::term_at(tile, which, column, run);
    }

    /* s = A B^T, of 64 rows of A */
    static __device__ __forceinline__ void multiply_rows(SharedAddress a_rows, SharedAddress b_rows, Scores &s) {
        const wgmma::Matrix a = wgmma::matrix(a_rows), b = wgmma::matrix(b_rows);
        wgmma::begin();
#pragma unroll
        for (int j = 0; j < round_up(HEAD_DIM, 16) / 16; ++j)
            wgmma::Product<TOKENS>::multiply(s.tile[0], a + (j / 4 * OwnLayout::BLOCK_BYTES + j % 4 * 32) / 16,
                                             b + (j / 4 * Layout::BLOCK_BYTES + j % 4 * 32) / 16, j > 0);
        wgmma::end();
    }

    /* o += round(s) B */
    static __device__ __forceinline__ void multiply_columns(const Scores &s, SharedAddress b_rows, Output &o) {
        const wgmma::Matrix b = wgmma::matrix(b_rows);
        uint32_t a[TOKENS / 16][4];
#pragma unroll
        for (int j = 0; j < TOKENS / 16; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                a[j][i] = to_elements(s.tile[0][2 * j + i / 2][i % 2 * 2], s.tile[0][2 * j + i / 2][i % 2 * 2 + 1]);
        wgmma::begin();
#pragma unroll
        for (int n = 0; n < Layout::BLOCKS; ++n)
#pragma unroll
            for (int j = 0; j < TOKENS / 16; ++j)
                wgmma::Product<64>::multiply_transposed(&o.tile[0][n * 8], a[j],
                                                        b + (n * Layout::BLOCK_BYTES + j * 16 * 128) / 16);
        wgmma::end();
    }
};

} // namespace aiter
#endif

#endif
