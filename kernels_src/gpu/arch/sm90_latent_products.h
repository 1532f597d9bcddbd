/* Latent attention on sm_90a (see sm90_latent.h): what a warpgroup that multiplies does, in whichever order. */
#ifndef AITER_GPU_ARCH_SM90_LATENT_PRODUCTS_H
#define AITER_GPU_ARCH_SM90_LATENT_PRODUCTS_H

#include "gpu/arch/sm90_latent_tiles.h"

namespace aiter {

/* Which keys a piece has. */
struct LatentKeys {
    int first, count, tiles;
    /* From one lane: or the assembler takes branches on it for divergent, and waits for products in them. */
    __device__ __forceinline__ LatentKeys(int first, int end)
        : first(first), count(from_lane(end - first, 0)), tiles((count + LatentDecode::KEYS - 1) / LatentDecode::KEYS) {
    }
    __device__ __forceinline__ int of_tile(int tile) const { return first + tile * LatentDecode::KEYS; }
    __device__ __forceinline__ int rows_of_tile(int tile) const { return count - tile * LatentDecode::KEYS; }
};

struct LatentWarpgroup : LatentTiles {
    using Softmax = OnlineSoftmax<2>;
    using Operand = uint32_t[KEYS / 16][4]; /* P of a wave, as wgmma takes it from registers */

    SharedAddress shared;
    bool mapped, apart; /* copies are by maps; values have their own */
    int number = wave() / 4;
    int wave_row = wave() % 4 * WAVE_ROWS;
    uint32_t count = 0; /* tiles of earlier pieces */

    __device__ __forceinline__ LatentWarpgroup(SharedAddress shared, bool mapped, bool apart)
        : shared(shared), mapped(mapped), apart(apart) {}

    /* Named barriers: both warpgroups meet; P of one of them is there; a wave's P is (in rounds: waves 0 to 7). */
    static constexpr int BOTH = 1, P_OF = 2, CLEARED = 4, P_OF_WAVE = 6;
    static __device__ __forceinline__ void meet_both() { meet(BOTH, 2 * WARPGROUP); }
    static __device__ __forceinline__ void arrive(SharedAddress barrier) {
        if (lane() == 0) mbarrier::arrive(barrier);
    }

    /* Not by maps: what other threads have copied becomes visible to wgmma. */
    __device__ __forceinline__ void see_copies() const {
        if (!mapped) wgmma::shared_is_written();
    }
    /* By maps: rows past the end of a piece's last tile become zeros: what the tensor holds there meets probabilities
     * of 0. */
    __device__ __forceinline__ void clear_past_end(const Stage &stage, int rows) const {
        if (!mapped || rows >= KEYS) return;
        clear_rows_from<KEYS, VALUE_LINES>(stage.tile(), rows);
        wgmma::shared_is_written();
        meet(CLEARED + opaque(number), WARPGROUP);
    }

    /* ---- products ---- */

    template <class Unit> __device__ __forceinline__ void load_queries(const Unit &unit, const QueryBits &bits) {
        constexpr int LANES_OF_ROW = 2 * WARPGROUP / ROWS, CHUNKS = HEAD_DIM / 8 / LANES_OF_ROW;
        const int row = thread_in_block() / LANES_OF_ROW, lane_chunk = thread_in_block() % LANES_OF_ROW;
        const uint4 *from = row < unit.rows ? reinterpret_cast<const uint4 *>(unit.query(row)) : nullptr;
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
            const int chunk = i * LANES_OF_ROW + lane_chunk;
            uint4 x = {0, 0, 0, 0};
            if (from != nullptr) x = from[chunk];
            shared_store(shared + chunk / 8 * LINE_BYTES + RowLayout<64>::chunk(row, chunk % 8),
                         uint4{bits(x.x), bits(x.y), bits(x.z), bits(x.w)});
        }
        wgmma::shared_is_written();
        meet_both();
    }

    /* A group of a tile's blocks, as soon as it has arrived. */
    __device__ __forceinline__ void begin_scores(const Stage &stage, int group, Scores &s) const {
        mbarrier::wait(stage.full(group), stage.turn);
        see_copies();
        const wgmma::Matrix q = wgmma::matrix(opaque(shared)), k = wgmma::matrix(opaque(stage.tile()));
        wgmma::begin();
#pragma unroll
        for (int line = first_line(group); line < end_line(group); ++line)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                wgmma::Product<KEYS>::multiply(s.tile[0], q + (line * LINE_BYTES + j * 32) / 16,
                                               k + (line * LINE_BYTES + j * 32) / 16, group > 0 || j > 0);
        wgmma::end();
    }

    /* This warpgroup's half of the values. */
    __device__ __forceinline__ wgmma::Matrix values(const Stage &stage) const {
        if (apart) {
            mbarrier::wait(stage.values(), stage.turn);
            wgmma::shared_is_written();
        }
        return wgmma::matrix(stage.tile() + number * (VALUE_LINES / 2) * LINE_BYTES, LINE_BYTES);
    }
    __device__ __forceinline__ void begin_product(const Operand &p, const Stage &stage, Output &o) const {
        const wgmma::Matrix v = values(stage);
        wgmma::begin();
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j)
            wgmma::Product<COLUMNS>::multiply_transposed(o.tile[0], p[j], v + j * 16 * 128 / 16);
        wgmma::end();
    }

    __device__ __forceinline__ void end_product(const Stage &stage, Output &o) const {
        wgmma::wait<0>();
        arrive(stage.used(number));
        changed(o);
    }

    /* ---- what goes to the other warpgroup ---- */

    /* The maxima that P was made with. `tile`: of the two that have room. */
    __device__ __forceinline__ SharedAddress maximum_of(int tile, int slot) const {
        return shared + MAXIMA_AT + (tile * ROWS + wave_row + Scores::row(slot)) * 4;
    }
    __device__ __forceinline__ void put_maxima(int tile, const Softmax &softmax) const {
        if (lane_leads_row())
#pragma unroll
            for (int slot = 0; slot < 2; ++slot) shared_store(maximum_of(tile, slot), softmax.maximum[slot]);
    }
    __device__ __forceinline__ bool move_to_maxima(int tile, Softmax &softmax, float (&shrink)[2]) const {
        float maxima[2];
#pragma unroll
        for (int slot = 0; slot < 2; ++slot) maxima[slot] = shared_load<float>(maximum_of(tile, slot));
        return softmax.move_to(maxima, shrink);
    }

    /* ---- tiles ---- */

    /* An own tile, whose scores are on their way: its P goes to the other warpgroup, send(p), and is multiplied. */
    template <class Rows, class Send>
    __device__ __forceinline__ void attend_own(const Rows &rows, const LatentKeys &keys, int tile, const Score &score,
                                               Scores &s, Softmax &softmax, Output &o, const Send &send) const {
        const Stage own(shared, count + tile);
        Operand p;
        float shrink[2];
        wgmma::wait<0>();
        arrive(own.scored());
        changed(s);
        changed(o);
        clear_past_end(own, keys.rows_of_tile(tile));
        rows.finish(score, s, keys.of_tile(tile));
        const bool grown = softmax.advance(s, shrink);
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j) round_operand(s, 0, j, p[j]);
        send(p);
        if (grown) softmax.rescale(o, shrink);
        begin_product(p, own, o);
        end_product(own, o);
    }
    /* The first of a piece: nothing has come from the other warpgroup yet. */
    template <class Rows, class Send>
    __device__ __forceinline__ void attend_first_tile(const Rows &rows, const LatentKeys &keys, const Score &score,
                                                      Softmax &softmax, Output &o, const Send &send) const {
        Scores s;
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) begin_scores(Stage(shared, count), group, s);
        attend_own(rows, keys, 0, score, s, softmax, o, send);
    }

    /* A piece's rows' sums. Each warpgroup has those of its own tiles. Nobody needs Q and P any more. */
    __device__ __forceinline__ void add_up_sums(Softmax &softmax) const {
        const SharedAddress sums = shared + SUMS_AT;
        float sum[2];
#pragma unroll
        for (int slot = 0; slot < 2; ++slot) {
            sum[slot] = row_sum(softmax.sum[slot]);
            if (lane_leads_row()) shared_store(sums + (number * ROWS + wave_row + Scores::row(slot)) * 4, sum[slot]);
        }
        meet_both();
#pragma unroll
        for (int slot = 0; slot < 2; ++slot) {
            const float other = shared_load<float>(sums + ((number ^ 1) * ROWS + wave_row + Scores::row(slot)) * 4);
            softmax.sum[slot] = lane_leads_row() ? sum[slot] + other : 0.0f; /* of this lane */
        }
    }
};

} // namespace aiter

#endif
