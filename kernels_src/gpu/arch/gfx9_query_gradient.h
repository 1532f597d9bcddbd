/* The gradient of queries on AMD CDNA, up to 128 dimensions: eight waves in two groups of four, one of each on every SIMD,
 * that alternate as those of the forward pass do (arch/gfx9_forward.h).
 *
 *               between two barriers: tile n                             n + 1
 *   group 0     M: S(n), dP(n), dQ += dS(n-1) K   V: P(n), dS(n)   |     M                  V      |  ...
 *   group 1     V: P(n-1), dS(n-1)                M: as above      |     V                  M      |  ...
 *
 *   barriers    Group 0 meets after V; group 1 before the last products of M, so that group 0 follows without a gap.
 *   copies      In M, group 0 stores keys and values of tile n + 1 by rows, group 1 keys of tile n transposed. There are
 *               two buffers: what is stored between two barriers is read between the next two. */
#ifndef AITER_GPU_ARCH_GFX9_QUERY_GRADIENT_H
#define AITER_GPU_ARCH_GFX9_QUERY_GRADIENT_H

#include "gpu/arch/gfx9_passing.h"

namespace aiter {

struct QueryTile : AlternatingTile<GRAD_QUERY> {
    static constexpr int ROWS = WAVES * ROW_TILE;
    /* A buffer: keys by rows and transposed, values by rows. */
    static constexpr int Y_AT = TensorX::BYTES, BUFFER_BYTES = Y_AT + TensorY::ROW_BYTES;
    static constexpr int SHARED_BYTES = 2 * BUFFER_BYTES;
    static __device__ __forceinline__ int wave_row() { return wave() * ROW_TILE; }
    __device__ __forceinline__ explicit QueryTile(SharedAddress memory) { shared = memory; }
    __device__ __forceinline__ void term(int, int, float (&)[COLUMN_RUN]) const {}
};

struct QueryLoop : PassingLoop<GRAD_QUERY, QueryTile> {
    template <class Finish>
    static __device__ __forceinline__ void attend(const Share &share, SharedAddress shared, Finish finish) {
        Tile tile(shared);
        GradX grad_x;
        NoGradient none;
        grad_x.clear();
        if (share.tiles > 0) {
            const int kind = wave() / 2;
            if (kind == 0) attend<0>(share, tile, PassingCopy<false, false, Share>(share, shared), grad_x);
            else if (kind == 1)
                attend<0>(share, tile, PassingCopy<true, false, Share>(share, shared + Tile::Y_AT), grad_x);
            else if (kind == 2) attend<1>(share, tile, PassingCopy<false, true, Share>(share, shared), grad_x);
            else attend<1>(share, tile, NoCopy(), grad_x);
        }
        finish(tile, grad_x, none);
    }

    template <int GROUP, class Copy>
    static __device__ __forceinline__ void attend(const Share &share, Tile &tile, Copy copy, GradX &grad_x) {
        using ProductsX = typename TensorX::Products;
        using ProductsY = typename TensorY::Products;
        tile.own_x.load(tile.shared, own_rows(share, share.own().x, Tile::wave_row()), {~0u, 0u});
        tile.own_y.load(tile.shared, own_rows(share, share.own().y, Tile::wave_row()), {~0u, 0u});
        const TileEdges edges(share, Tile::wave_row());
        Rows rows(share, share.block_row + Tile::wave_row());
        if (GROUP == 1) copy.store_all(Tile::BUFFER_BYTES); /* zeros: what stands before the first tile */
        copy.go_on();
        copy.load();
        copy.clear_rest();
        copy.go_on();
        if (GROUP == 0) { /* a tile ahead */
            copy.store_all();
            copy.load();
            copy.clear_rest();
            copy.go_on();
        }
        meet();

        u32x4 ds16[TOKENS / 16] = {};
        int at_buffer = 0;
        rows.begin_head(0);
        for (Tiles at(share); at.left > 0; at.next()) {
            const int other_buffer = Tile::BUFFER_BYTES - at_buffer, to = GROUP == 0 ? other_buffer : at_buffer;
            const SharedAddress buffer = tile.shared + at_buffer;
            Scores p, derivative, ds;
            auto scores = ProductsX::scores(buffer);
            auto gradients = ProductsY::scores(buffer + Tile::Y_AT);
            auto outputs = ProductsX::template outputs<GradX>(tile.shared + other_buffer + TensorX::ROW_BYTES);
            __builtin_amdgcn_s_setprio(2);
            scores.begin();
            ProductsX::multiply(scores, tile.own_x, p, [&](int i) {
                at_last<scores.PRODUCTS, gradients.AHEAD>(i, [&](int k) { gradients.begin(k); });
            });
            ProductsY::multiply(gradients, tile.own_y, ds, [&](int i) {
                spread<gradients.PRODUCTS, Copy::ROWS>(i, [&](int k) { copy.store(k, to); });
                at_last<gradients.PRODUCTS, outputs.AHEAD>(i, [&](int k) { outputs.begin(k); });
            });
            ProductsX::multiply(
                outputs, [&](int, int j) { return ds16[j]; }, grad_x,
                [&](int i) {
                    constexpr int LAST = outputs.PRODUCTS - outputs.AHEAD; /* whose operand is read beside these */
                    spread<greater(LAST, 1), Copy::ROWS>(i, [&](int k) { copy.load(k); });
                    if (GROUP == 1 && i == LAST) {
                        meet();
                        __builtin_amdgcn_s_setprio(3);
                    }
                });
            __builtin_amdgcn_s_setprio(GROUP);
            const bool cut = edges.cut(at.first);
            rows.probabilities(tile, p, derivative, at.first);
            if (__builtin_expect(cut, false)) rows.hide(p, at.first);
            if (DROPOUT) rows.drop(p, at.first);
            rows.grad_scores(tile, p, derivative, ds);
            if (__builtin_expect(cut, false)) rows.hide(ds, at.first); /* 0 * inf or 0 * NaN */
#pragma unroll
            for (int j = 0; j < TOKENS / 16; ++j) ds16[j] = round_operand(ds, 0, j);
            copy.clear_rest();
            copy.go_on();
            if (GROUP == 0) meet();
            at_buffer = other_buffer;
        }
        const SharedAddress last = tile.shared + Tile::BUFFER_BYTES - at_buffer;
        Tile::multiply_last<TensorX>(last + TensorX::ROW_BYTES, ds16, grad_x);
    }
};

} // namespace aiter

#endif
