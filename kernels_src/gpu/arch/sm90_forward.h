/* The loop over the tiles of keys on sm_90a, with wgmma: four waves (a warpgroup) multiply 64 query rows by a whole
 * tile at once, asynchronously, and the vector unit works meanwhile.
 *
 *   carriers       one warpgroup copies tiles (cp.async) into a ring of stages, as far ahead as there are stages, in
 *                  the order in which they are used: K(0), K(1), V(0), K(2), V(1), ... V(last)
 *   the others     have 64 query rows each and go through the tiles on their own, so that one's softmax falls into
 *                  another's products. In each step the scores of a tile and the product of the one before set off
 *                  together; as soon as the scores are there their softmax begins, while the product goes on:
 *
 *      matrix unit   Q K(0)^T | Q K(1)^T, P(0) V(0) | Q K(2)^T, P(1) V(1) | ...
 *      vector unit            | softmax of 0        | softmax of 1        | ...
 *
 *   registers       Q (A operand), S of one tile, P of the one before, O
 *   shared memory   the ring: a stage is a tile of K or of V in blocks of 64 dimensions, rows of 128 bytes permuted as
 *                   wgmma wants them. Two barriers (mbarrier) belong to each: `full` completes when the carriers'
 *                   copies have arrived, `empty` when all other waves are done with it. */
#ifndef AITER_GPU_ARCH_SM90_FORWARD_H
#define AITER_GPU_ARCH_SM90_FORWARD_H

#include "gpu/arch/sm90.h"
#include "gpu/softmax.h"

#if defined(AITER_WGMMA)
namespace aiter {

template <int HEAD_DIM, class Sequence> struct WarpgroupLoop {
    /* Without the carriers. Up to 64 dimensions the softmax is half of the work: three warpgroups hide it better. */
    static constexpr int WAVES = HEAD_DIM <= 64 ? 12 : 8, WAVE_ROWS = 16;
    static constexpr int KEYS = HEAD_DIM <= 64 ? 64 : 128, STAGES = HEAD_DIM <= 64 ? 6 : 5, BLOCKS = 1;
    static constexpr int CARRIERS = 128, THREADS = WAVES * WAVE + CARRIERS;
    /* Registers of a thread. A block begins with as many for each, and no more than that can be dealt out anew. */
    static constexpr int REGISTERS = 65536 / THREADS / 8 * 8;
    static constexpr int OWN_REGISTERS = WAVES == 12 ? 160 : 240, CARRIER_REGISTERS = WAVES == 12 ? 32 : 24;
    static_assert(WAVES * WAVE * OWN_REGISTERS + CARRIERS * CARRIER_REGISTERS <= THREADS * REGISTERS, "or it hangs");
    static constexpr int STEPS = round_up(HEAD_DIM, 16) / 16, LINES = round_up(HEAD_DIM, 64) / 64;
    static constexpr int TILE_BYTES = LINES * KEYS * 128;
    using Queries = Query<HEAD_DIM, 1>;
    using Scores = Accumulator<1, KEYS>;
    using Output = Accumulator<1, LINES * 64>;
    using Softmax = OnlineSoftmax<2>;
    static constexpr int QUERIES_AT = STAGES * TILE_BYTES, BARRIERS_AT = QUERIES_AT + WAVES * Queries::SHARED_BYTES;
    static constexpr int SHARED_BYTES = BARRIERS_AT + STAGES * 16;

    static __device__ __forceinline__ SharedAddress query_memory(SharedAddress shared) {
        return shared + QUERIES_AT + wave() * Queries::SHARED_BYTES;
    }

    struct Ring {
        SharedAddress shared;
        int stage = 0;
        uint32_t turn = 0; /* how often, modulo 2, the stages have been gone through */

        __device__ __forceinline__ SharedAddress tile() const { return shared + stage * TILE_BYTES; }
        __device__ __forceinline__ SharedAddress full() const { return shared + BARRIERS_AT + stage * 16; }
        __device__ __forceinline__ SharedAddress empty() const { return full() + 8; }
        __device__ __forceinline__ void advance() {
            if (++stage == STAGES) stage = 0, turn ^= 1;
        }
        /* The next tile to be used: its stage, which is to be released with empty(). */
        __device__ __forceinline__ Ring take() {
            mbarrier::wait(full(), turn);
            wgmma::shared_is_written();
            const Ring taken = *this;
            advance();
            return taken;
        }
        __device__ __forceinline__ void release() const {
            if (lane() == 0) mbarrier::arrive(empty());
        }
    };

    /* Copies a tile of keys or of values; zeros past the end of the sequence and past HEAD_DIM. */
    template <bool VALUES>
    static __device__ __forceinline__ void copy(const Sequence &sequence, Ring &ring, int first) {
        mbarrier::wait(ring.empty(), ring.turn ^ 1); /* at once in the first turn */
        const auto tile = sequence.keys.tile(first);
        const int thread = thread_in_block() - WAVES * WAVE, row = thread / 8, chunk = thread % 8;
        const SharedAddress to = ring.tile() + RowLayout<64>::chunk(row, chunk);
#pragma unroll 2 /* carriers have few registers */
        for (int step = 0; step < KEYS; step += CARRIERS / 8) {
            const auto place = tile.place(row, step);
            const bool exists = first + row + step < sequence.keys.count;
#pragma unroll
            for (int line = 0; line < LINES; ++line) {
                const int byte = line * 128 + chunk * 16;
                const bool valid = exists && (line * 64 + 64 <= HEAD_DIM || byte < HEAD_DIM * 2);
                copy_async(to + step * 128 + line * KEYS * 128,
                           VALUES ? tile.value(place, byte) : tile.key(place, byte), valid);
            }
        }
        mbarrier::arrive_after_copies(ring.full());
        ring.advance();
    }

    static __device__ __forceinline__ void begin_scores(const Queries &queries, SharedAddress keys, Scores &s) {
#pragma unroll
        for (int n = 0; n < KEYS / 64; ++n)
#pragma unroll
            for (int j = 0; j < STEPS; ++j)
                wgmma::multiply(&s.tile[0][n * 8], queries.operand[0][j],
                                wgmma::matrix(keys + (j / 4 * KEYS + n * 64) * 128 + j % 4 * 32), j > 0);
        wgmma::end();
    }
    static __device__ __forceinline__ void begin_output(const uint32_t (&p)[KEYS / 16][4], SharedAddress values,
                                                        Output &o) {
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j)
#pragma unroll
            for (int n = 0; n < LINES; ++n)
                wgmma::multiply_transposed(&o.tile[0][n * 8], p[j], wgmma::matrix(values + (n * KEYS + j * 16) * 128));
        wgmma::end();
    }
    template <class Matrix> static __device__ __forceinline__ void changed(Matrix &m) {
#pragma unroll
        for (int n = 0; n < Matrix::TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) wgmma::changed(m.tile[0][n][i]);
    }
    static __device__ __forceinline__ void round(const Scores &s, uint32_t (&p)[KEYS / 16][4]) {
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float(&c)[4] = s.tile[0][2 * j + i / 2];
                p[j][i] = to_elements(c[i % 2 * 2], c[i % 2 * 2 + 1]);
            }
    }

    /* See TileLoop. */
    template <class Finish>
    static __device__ __forceinline__ void attend(const Sequence &sequence, SharedAddress shared, int block_row,
                                                  bool negate, Softmax &softmax, Output &o, Finish finish) {
        const int rows_end = lesser(block_row + WAVES * WAVE_ROWS, sequence.rows);
        const int keys_end = block_row < rows_end ? sequence.visible(rows_end - 1) : 0; /* of the block */
        Ring ring = {shared};
        if (thread_in_block() == 0)
            for (Ring r = ring; r.turn == 0; r.advance()) {
                mbarrier::make(r.full(), CARRIERS);
                mbarrier::make(r.empty(), WAVES);
            }
        barrier();
        if (wave() >= WAVES) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(CARRIER_REGISTERS));
            if (keys_end > 0) carry(sequence, ring, keys_end);
        } else {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(OWN_REGISTERS));
            o.clear();
            if (keys_end > 0) multiply(sequence, ring, block_row + wave() * WAVE_ROWS, keys_end, negate, softmax, o);
            finish();
        }
    }

    static __device__ __forceinline__ void carry(const Sequence &sequence, Ring &ring, int keys_end) {
        copy<false>(sequence, ring, 0);
#pragma unroll 1
        for (int first = KEYS; first < keys_end; first += KEYS) {
            copy<false>(sequence, ring, first);
            copy<true>(sequence, ring, first - KEYS);
        }
        copy<true>(sequence, ring, (keys_end - 1) / KEYS * KEYS);
        wait_for_copies();
    }

    /* All waves take part in every step, those too whose rows do not see the tile: a warpgroup multiplies as one, and
     * in branches that the compiler takes for divergent it would wait for each product. */
    static __device__ __forceinline__ void multiply(const Sequence &sequence, Ring &ring, int wave_row, int keys_end,
                                                    bool negate, Softmax &softmax, Output &o) {
        const int unmasked_keys = sequence.visible(wave_row);
        Queries queries;
        queries.load(
            query_memory(ring.shared),
            [&](int row) {
                row += wave_row;
                return row < sequence.rows ? sequence.query + row * sequence.query_stride : nullptr;
            },
            negate);
        Scores s;
        uint32_t p[KEYS / 16][4];
        float shrink[2];
        const auto probabilities = [&](int first) {
            changed(s);
            if (first + KEYS > unmasked_keys) mask(s, sequence, wave_row, first);
            return softmax.advance(s, shrink);
        };

        const Ring first_keys = ring.take();
        wgmma::begin();
        begin_scores(queries, first_keys.tile(), s);
        wgmma::wait<0>();
        first_keys.release();
        probabilities(0);
        round(s, p);
#pragma unroll 1
        for (int first = KEYS; first < keys_end; first += KEYS) {
            const Ring keys = ring.take(), values = ring.take();
            wgmma::begin();
            begin_scores(queries, keys.tile(), s);
            begin_output(p, values.tile(), o);
            wgmma::wait<1>();
            keys.release();
            const bool grown = probabilities(first);
            wgmma::wait<0>();
            values.release();
            changed(o);
            if (grown) softmax.rescale(o, shrink);
            round(s, p);
        }
        const Ring last_values = ring.take();
        wgmma::begin();
        begin_output(p, last_values.tile(), o);
        wgmma::wait<0>();
        changed(o);
    }
};

} // namespace aiter
#endif

#endif
