/* The loop over the tiles of keys on sm_90a, with wgmma: four waves (a warpgroup) multiply 64 query rows by a whole tile at
 * once, asynchronously, and the vector unit works meanwhile.
 *
 *      matrix unit   Q K(0)^T | Q K(1)^T, P(0) V(0) | Q K(2)^T, P(1) V(1) | ...
 *      vector unit            | softmax of 0        | softmax of 1        | ...
 *                    a step:    scores of the next tile and the product of the last one set off together; as soon as the
 *                    scores are there their softmax begins, during which the product goes on
 *
 *   registers       Q (A operand), S of one tile, P of the one before, O
 *   shared memory   two tiles of K, two of V: blocks of 64 dimensions, rows of 128 bytes permuted as wgmma wants them.
 *                   In step j, where K(j + 1) and V(j) are in use, K(j + 2) and V(j + 1) are on their way (cp.async). */
#ifndef AITER_GPU_ARCH_SM90_FORWARD_H
#define AITER_GPU_ARCH_SM90_FORWARD_H

#include "gpu/arch/sm90.h"
#include "gpu/softmax.h"

#if defined(AITER_WGMMA)
namespace aiter {

template <int HEAD_DIM, class Sequence> struct WarpgroupLoop {
    /* Two warpgroups take turns at the matrix unit. Up to 64 dimensions two blocks fit, which helps more than larger tiles:
     * there the softmax is half of the work. */
    static constexpr int WAVES = 8, WAVE_ROWS = 16;
    static constexpr int KEYS = HEAD_DIM <= 64 ? 64 : 128, BLOCKS = HEAD_DIM <= 64 ? 2 : 1;
    static constexpr int THREADS = WAVES * WAVE;
    static constexpr int STEPS = round_up(HEAD_DIM, 16) / 16, LINES = round_up(HEAD_DIM, 64) / 64;
    static constexpr int TILE_BYTES = LINES * KEYS * 128;
    using Queries = Query<HEAD_DIM, 1>;
    using Scores = Accumulator<1, KEYS>;
    using Output = Accumulator<1, LINES * 64>;
    using Softmax = OnlineSoftmax<2>;
    static constexpr int SHARED_BYTES = 4 * TILE_BYTES + WAVES * Queries::SHARED_BYTES;

    static __device__ __forceinline__ SharedAddress query_memory(SharedAddress shared) {
        return shared + 4 * TILE_BYTES + wave() * Queries::SHARED_BYTES;
    }

    /* Starts to copy a tile of keys or of values; zeros past the end of the sequence and past HEAD_DIM. */
    template <bool VALUES>
    static __device__ __forceinline__ void copy(const Sequence &sequence, SharedAddress to, int first) {
        const auto tile = sequence.keys.tile(first);
        const int row = opaque(thread_in_block() / 8), chunk = thread_in_block() % 8;
        to += RowLayout<64>::chunk(row, chunk);
#pragma unroll
        for (int step = 0; step < KEYS; step += THREADS / 8) {
            if (KEYS % (THREADS / 8) != 0 && row + step >= KEYS) continue;
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
                wgmma::multiply_transposed(&o.tile[0][n * 8], p[j],
                                           wgmma::matrix(values + (n * KEYS + j * 16) * 128));
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

    static __device__ __forceinline__ void attend(const Sequence &sequence, SharedAddress shared, int block_row,
                                                  bool negate, Softmax &softmax, Output &o) {
        const int wave_row = block_row + wave() * WAVE_ROWS;
        const int rows_end = lesser(block_row + WAVES * WAVE_ROWS, sequence.rows);
        const int keys_end = block_row < rows_end ? sequence.visible(rows_end - 1) : 0; /* of the block */
        const int unmasked_keys = sequence.visible(wave_row);

        o.clear();
        if (keys_end == 0) return;
        SharedAddress keys = shared, next_keys = shared + TILE_BYTES;
        SharedAddress values = shared + 2 * TILE_BYTES, next_values = shared + 3 * TILE_BYTES;
        copy<false>(sequence, keys, 0);
        Queries queries;
        queries.load(query_memory(shared),
                     [&](int row) {
                         row += wave_row;
                         return row < sequence.rows ? sequence.query + row * sequence.query_stride : nullptr;
                     },
                     negate);
        Scores s;
        uint32_t p[KEYS / 16][4];
        float shrink[2];

        /* What is on its way is the current tile; the next ones set off. K is a tile ahead of V. */
        const auto turn = [&](int first) {
            wait_for_copies();
            wgmma::shared_is_written();
            barrier();
            if (first + KEYS < keys_end) copy<false>(sequence, next_keys, first + KEYS);
            if (first < keys_end) copy<true>(sequence, next_values, first);
        };
        const auto probabilities = [&](int first) {
            changed(s);
            if (first + KEYS > unmasked_keys) mask(s, sequence, wave_row, first);
            return softmax.advance(s, shrink);
        };
        /* All waves take part in every step, those too whose rows do not see the tile: a warpgroup multiplies as one, and in
         * branches that the compiler takes for divergent it would wait for each product. */
        turn(0);
        wgmma::begin();
        begin_scores(queries, keys, s);
        wgmma::wait<0>();
        probabilities(0);
        round(s, p);
        for (int first = KEYS; first < keys_end; first += KEYS) {
            exchange(keys, next_keys);
            exchange(values, next_values);
            turn(first);
            wgmma::begin();
            begin_scores(queries, keys, s);
            begin_output(p, values, o);
            wgmma::wait<1>();
            const bool grown = probabilities(first);
            wgmma::wait<0>();
            changed(o);
            if (grown) softmax.rescale(o, shrink);
            round(s, p);
        }
        exchange(values, next_values);
        turn(keys_end);
        wgmma::begin();
        begin_output(p, values, o);
        wgmma::wait<0>();
        changed(o);
    }
    static __device__ __forceinline__ void exchange(SharedAddress &x, SharedAddress &y) {
        const SharedAddress z = x;
        x = y;
        y = z;
    }
};

} // namespace aiter
#endif

#endif
