/* Latent attention on sm_90a (see sm90_latent.h), tiles in turn: what a warpgroup does with those of a piece. */
#ifndef AITER_GPU_ARCH_SM90_LATENT_IN_TURN_H
#define AITER_GPU_ARCH_SM90_LATENT_IN_TURN_H

#include "gpu/arch/sm90_latent_products.h"

namespace aiter {

struct LatentOrder : LatentWarpgroup {
    static constexpr int EARLY = 2; /* groups of scores that are begun before P of the tile before comes */

    /* P and the maxima that it was made with, by warpgroup `sender`, go to the other. */
    __device__ __forceinline__ void send(int sender, const Operand &p, const Softmax &softmax) const {
        const int row = opaque(wave_row + Scores::row(0)); /* or eight addresses are kept: registers are rare */
#pragma unroll
        for (int slot = 0; slot < 2; ++slot)
#pragma unroll
            for (int chunk = 0; chunk < KEYS / 8; ++chunk)
                shared_store(shared + P_AT + RowLayout<64>::chunk(row, chunk) + slot * (8 * 128) + lane() % 4 * 4,
                             p[chunk / 2][chunk % 2 * 2 + slot]);
        put_maxima(0, softmax);
        wgmma::shared_is_written();
        pass(P_OF + sender, 2 * WARPGROUP);
    }
    /* The output's product with what the other has sent. */
    __device__ __forceinline__ void begin_received(const Stage &stage, Softmax &softmax, Output &o) const {
        meet(P_OF + (opaque(number) ^ 1), 2 * WARPGROUP);
        float shrink[2];
        if (move_to_maxima(0, softmax, shrink)) softmax.rescale(o, shrink);
        see_copies(); /* the tile: the other has waited for it */
        const wgmma::Matrix p = wgmma::matrix(opaque(shared) + P_AT), v = values(stage);
        wgmma::begin();
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j)
            wgmma::Product<COLUMNS>::multiply_transposed(o.tile[0], p + j * 32 / 16, v + j * 16 * 128 / 16);
        wgmma::end();
    }

    /* What comes after the piece's first tile. */
    template <class Rows>
    __device__ __forceinline__ void attend(const Rows &rows, const LatentKeys &keys, const Score &score,
                                           Softmax &softmax, Output &o) const {
        int tile = number == 0 ? 2 : 1;
#pragma unroll 1
        for (; tile < keys.tiles; tile += 2) {
            const Stage own(shared, count + tile), before(shared, count + tile - 1);
            Scores s;
#pragma unroll
            for (int group = 0; group < EARLY; ++group) begin_scores(own, group, s);
            begin_received(before, softmax, o);
            begin_scores(own, EARLY, s);
            wgmma::wait<1>();
            arrive(before.used(number));
#pragma unroll
            for (int group = EARLY + 1; group < GROUPS; ++group) begin_scores(own, group, s);
            attend_own(rows, keys, tile, score, s, softmax, o,
                       [&](const Operand &p) { send(opaque(number), p, softmax); });
        }
        if (tile == keys.tiles) { /* the last one is the other's */
            const Stage last(shared, count + keys.tiles - 1);
            begin_received(last, softmax, o);
            end_product(last, o);
        }
    }
};

} // namespace aiter

#endif
