/* Latent attention on sm_90a (see sm90_latent.h), rounds of two tiles: what each warpgroup does with a piece's. */
#ifndef AITER_GPU_ARCH_SM90_LATENT_ROUNDS_H
#define AITER_GPU_ARCH_SM90_LATENT_ROUNDS_H

#include "gpu/arch/sm90_latent_products.h"

namespace aiter {

struct LatentOrder : LatentWarpgroup {
    /* A wave's P goes to the wave of the same rows in the other warpgroup, a lane's to the same lane: so a lane reads
     * what is for it before it writes its own into the same place, and none waits for another. */
    __device__ __forceinline__ int exchange_of(int sender) const { /* a named barrier; sender: which warpgroup */
        return P_OF_WAVE + sender * 4 + opaque(wave_row) / WAVE_ROWS;
    }
    __device__ __forceinline__ SharedAddress exchanged(int j) const {
        return shared + P_AT + wave_row * (KEYS * 2) + j * (WAVE * 16) + lane() * 16;
    }
    __device__ __forceinline__ void put(const Operand &p) const {
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j) shared_store(exchanged(j), uint4{p[j][0], p[j][1], p[j][2], p[j][3]});
    }
    /* P and its maxima, by warpgroup `sender`. */
    __device__ __forceinline__ void send(int sender, const Operand &p, const Softmax &softmax) const {
        put(p);
        put_maxima(sender, softmax);
        pass(exchange_of(sender), 2 * WAVE);
    }
    __device__ __forceinline__ void take(Operand &p) const {
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j) {
            const uint4 x = shared_load<uint4>(exchanged(j));
            p[j][0] = x.x, p[j][1] = x.y, p[j][2] = x.z, p[j][3] = x.w;
        }
    }
    /* To a maximum that has grown since P was made. Where it has not, P keeps its bits. */
    static __device__ __forceinline__ void rescale(Operand &p, const float (&shrink)[2]) {
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                p[j][i] = to_elements(to_float(static_cast<Element>(p[j][i])) * shrink[i % 2],
                                      to_float(static_cast<Element>(p[j][i] >> 16)) * shrink[i % 2]);
    }

    /* The output's product with what warpgroup `sender` has sent. */
    __device__ __forceinline__ void begin_received(int sender, const Stage &stage, Softmax &softmax, Output &o) const {
        Operand p;
        float shrink[2];
        meet(exchange_of(sender), 2 * WAVE);
        take(p);
        if (move_to_maxima(sender, softmax, shrink)) softmax.rescale(o, shrink);
        see_copies(); /* the tile: the other has waited for it */
        begin_product(p, stage, o);
    }

    /* Warpgroup 0: scores of the first tile, after the piece's first. */
    template <class Rows>
    __device__ __forceinline__ void attend_first(const Rows &rows, const LatentKeys &keys, const Score &score,
                                                 Softmax &softmax, Output &o) const {
#pragma unroll 1
        for (int tile = 2; tile < keys.tiles; tile += 2) {
            const Stage own(shared, count + tile), before(shared, count + tile - 1);
            Scores s;
            begin_received(1, before, softmax, o);
            begin_scores(own, 0, s);
            wgmma::wait<1>();
            arrive(before.used(0));
#pragma unroll
            for (int group = 1; group < GROUPS; ++group) begin_scores(own, group, s);
            attend_own(rows, keys, tile, score, s, softmax, o, [&](const Operand &p) { send(0, p, softmax); });
        }
    }

    /* Warpgroup 1: scores of the second tile, of which those of its own half of the values come first. P of the first
     * tile is scaled for the maxima of the second, which is multiplied before it. */
    template <class Rows>
    __device__ __forceinline__ void attend_second(const Rows &rows, const LatentKeys &keys, const Score &score,
                                                  Softmax &softmax, Output &o) const {
        constexpr int ORDER[GROUPS] = {0, 3, 4, 1, 2};
        Scores s;
        Operand p, received;
        float moved[2], shrink[2];
#pragma unroll 1
        for (int tile = 1; tile < keys.tiles; tile += 2) {
            const Stage own(shared, count + tile), before(shared, count + tile - 1);
#pragma unroll
            for (int i = 0; i < GROUPS; ++i) begin_scores(own, ORDER[i], s);
            wgmma::wait<0>();
            arrive(own.scored());
            changed(s);
            clear_past_end(own, keys.rows_of_tile(tile));
            rows.finish(score, s, keys.of_tile(tile));

            meet(exchange_of(0), 2 * WAVE);
            const bool first_grown = move_to_maxima(0, softmax, moved), grown = softmax.advance(s, shrink);
#pragma unroll
            for (int j = 0; j < KEYS / 16; ++j) round_operand(s, 0, j, p[j]);
            take(received);
            send(1, p, softmax);
            if (first_grown || grown) {
#pragma unroll
                for (int slot = 0; slot < 2; ++slot) moved[slot] *= shrink[slot];
                softmax.rescale(o, moved);
                rescale(received, shrink);
            }
            see_copies(); /* the first tile: the other has waited for it */
            begin_product(p, own, o);
            begin_product(received, before, o);
            wgmma::wait<1>();
            arrive(own.used(1));
            wgmma::wait<0>();
            arrive(before.used(1));
            changed(o);
        }
    }

    /* What comes after the piece's first tile. */
    template <class Rows>
    __device__ __forceinline__ void attend(const Rows &rows, const LatentKeys &keys, const Score &score,
                                           Softmax &softmax, Output &o) const {
        if (number == 0) attend_first(rows, keys, score, softmax, o);
        else attend_second(rows, keys, score, softmax, o);
        if (keys.tiles % 2 == number) { /* the last one is the other's */
            const Stage last(shared, count + keys.tiles - 1);
            begin_received(number ^ 1, last, softmax, o);
            end_product(last, o);
        }
    }
};

} // namespace aiter

#endif
