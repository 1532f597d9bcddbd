/* The gradients of keys and values on AMD CDNA, up to 128 dimensions: eight waves, in pairs that own the same 32 keys. One
 * of a pair has the probabilities, the other their gradients, one of each on every SIMD: each keeps one tensor and one
 * gradient in registers, so that two fit on a SIMD, and while one multiplies (M) the other has the vector unit (V).
 *
 *                       tile n                                  n + 1
 *   probabilities   M: S(n), dV += P(n-1) dO  |  V: P(n) = exp2(S - LSE)    |  M ...
 *   gradients       V: dS(n-1) = P (dP-delta) |  M: dP(n), dK += dS(n-1) Q  |  V ...
 *   barriers                                  A                             B
 *
 *   barriers     Before the last few products of M, so that the other wave follows without a gap. Those come first, by
 *                priority, then the other products of M, then V.
 *   exchange     P(n) goes to the other wave through shared memory, in float32, as its lanes hold it.
 *   copies       In M. Half of the waves of either kind store a tensor by rows, the others a tensor transposed. A part of
 *                shared memory is written between two barriers where nobody reads it, so one buffer is enough for each:
 *
 *                before A   probabilities store dO by rows (n), Q transposed (n-1), and read Q by rows, dO transposed
 *                before B   gradients store Q by rows (n+1), dO transposed (n), and read dO by rows, Q transposed
 *
 *   LSE, delta   A lane has those of one passing row, and lends them to its neighbours: see own_term. */
#ifndef AITER_GPU_ARCH_GFX9_KEY_GRADIENTS_H
#define AITER_GPU_ARCH_GFX9_KEY_GRADIENTS_H

#include "gpu/arch/gfx9_passing.h"

namespace aiter {

struct PairedTile : AlternatingTile<GRAD_KEY_VALUE> {
    static constexpr int PAIRS = WAVES / 2, ROWS = PAIRS * ROW_TILE;
    static constexpr int Y_AT = TensorX::BYTES, EXCHANGE_AT = Y_AT + TensorY::BYTES;
    static constexpr int PAIR_BYTES = TOKENS * ROW_TILE * 4, SHARED_BYTES = EXCHANGE_AT + PAIRS * PAIR_BYTES;

    static constexpr int TERMS = TOKENS / 32;
    const SharedAddress exchange; /* where this lane's part of the pair's P is */
    f32x2 terms[TERMS];           /* LSE and delta of the passing rows own_term(n) */
    float own[TERMS];             /* that of the two which the wave wants */

    __device__ __forceinline__ explicit PairedTile(SharedAddress memory)
        : exchange(opaque(memory + EXCHANGE_AT + pair() * PAIR_BYTES + lane() * 16)) {
        shared = memory;
    }
    static __device__ __forceinline__ int pair() { return wave() % PAIRS; }
    static __device__ __forceinline__ int wave_row() { return pair() * ROW_TILE; }

    /* Of 16 lanes, lane i has the term of the passing row that value 16 n + i of an accumulator belongs to, and all
     * others take it from there: that is an operand of the instruction that wants it. */
    static __device__ __forceinline__ int own_term(int n) {
        return n * 32 + Scores::column(lane() % 16) + Scores::lane_column();
    }
    template <class Tiles> __device__ __forceinline__ void load_terms(const Tiles &tiles) {
#pragma unroll
        for (int n = 0; n < TERMS; ++n) terms[n] = tiles.terms(own_term(n));
    }
    /* Both are one load, so both must stay, or it would be waited for as soon as the other's register is wanted. */
    __device__ __forceinline__ void use_term(int which) {
#pragma unroll
        for (int n = 0; n < TERMS; ++n) own[n] = opaque(terms[n])[which];
    }
    template <int LANE> static __device__ __forceinline__ float term_of(float own) {
        constexpr int BROADCAST = 0x150; /* row_newbcast */
        return __builtin_bit_cast(
            float, __builtin_amdgcn_mov_dpp(__builtin_bit_cast(int, own), BROADCAST + LANE, 0xf, 0xf, true));
    }
    template <int FIRST> static __device__ __forceinline__ void run_of(float own, float (&run)[COLUMN_RUN]) {
        run[0] = term_of<FIRST>(own), run[1] = term_of<FIRST + 1>(own);
        run[2] = term_of<FIRST + 2>(own), run[3] = term_of<FIRST + 3>(own);
    }
    __device__ __forceinline__ void term(int, int column, float (&run)[COLUMN_RUN]) const {
        const int value = column - Scores::lane_column(); /* a constant, once the loop around it is unrolled */
        const float from = own[value / 32];
        switch (value % 32 / 8) {
        case 0: return run_of<0>(from, run);
        case 1: return run_of<4>(from, run);
        case 2: return run_of<8>(from, run);
        default: return run_of<12>(from, run);
        }
    }
    __device__ __forceinline__ void put(const Scores &p) const {
#pragma unroll
        for (int i = 0; i < Scores::VALUES; i += 4)
            shared_store(exchange + i * WAVE * 4,
                         f32x4_run{p.get(0, i), p.get(0, i + 1), p.get(0, i + 2), p.get(0, i + 3)});
    }
    __device__ __forceinline__ void take(Scores &p) const {
#pragma unroll
        for (int i = 0; i < Scores::VALUES; i += 4) {
            const auto four = shared_load<f32x4_run>(exchange + i * WAVE * 4);
#pragma unroll
            for (int j = 0; j < 4; ++j) p.set(0, i + j, four[j]);
        }
    }
};

struct PairedLoop : PassingLoop<GRAD_KEY_VALUE, PairedTile> {
    template <class Finish>
    static __device__ __forceinline__ void attend(const Share &share, SharedAddress shared, Finish finish) {
        Tile tile(shared);
        NoGradient none;
        const bool first_half = wave() % Tile::PAIRS < Tile::PAIRS / 2;
        if (wave() < Tile::PAIRS) {
            GradY grad_y;
            grad_y.clear();
            if (share.tiles > 0)
                first_half ? probabilities<true>(share, tile, grad_y) : probabilities<false>(share, tile, grad_y);
            finish(tile, none, grad_y);
        } else {
            GradX grad_x;
            grad_x.clear();
            if (share.tiles > 0)
                first_half ? gradients<true>(share, tile, grad_x) : gradients<false>(share, tile, grad_x);
            finish(tile, grad_x, none);
        }
    }

    /* The barrier, then M: s = rows of a tile times own ones, and gradient += p columns of the tile before; beside them,
     * the copies. Then the next barrier, which the last products, whose operands have been read, do not keep waiting. */
    template <class OfRows, class OfColumns, class Own, class Gradient, class Copy>
    static __device__ __forceinline__ void multiply(SharedAddress rows, SharedAddress columns, const Own &own,
                                                    Scores &s, const u32x4 (&p)[TOKENS / 16], Gradient &gradient,
                                                    Copy &copy) {
        using Products = typename OfColumns::Products;
        using ScoreProducts = typename OfRows::Products;
        auto scores = ScoreProducts::scores(rows);
        auto outputs = Products::template outputs<Gradient>(columns);
        meet();
        __builtin_amdgcn_s_setprio(2);
        scores.begin();
        ScoreProducts::multiply(scores, own, s, [&](int i) {
            spread<scores.PRODUCTS, Copy::ROWS>(i, [&](int k) { copy.store(k); });
            at_last<scores.PRODUCTS, outputs.AHEAD>(i, [&](int k) { outputs.begin(k); });
        });
        Products::multiply(
            outputs, [&](int, int j) { return p[j]; }, gradient,
            [&](int i) {
                constexpr int LAST = outputs.PRODUCTS - outputs.AHEAD; /* whose operand is read beside these */
                spread<greater(LAST, 1), Copy::ROWS>(i, [&](int k) { copy.load(k); });
                if (i == LAST) {
                    meet();
                    __builtin_amdgcn_s_setprio(3);
                }
            });
        __builtin_amdgcn_s_setprio(0);
    }
    template <bool BY_ROWS>
    static __device__ __forceinline__ void probabilities(const Share &share, Tile &tile, GradY &grad_y) {
        tile.own_x.load(tile.shared, own_rows(share, share.own().x, Tile::wave_row()), {~0u, 0u});
        const TileEdges edges(share, Tile::wave_row());
        Rows rows(share, share.block_row + Tile::wave_row());
        PassingCopy<BY_ROWS, !BY_ROWS, Share> copy(share, tile.shared + (BY_ROWS ? Tile::Y_AT : 0));
        if (BY_ROWS) { /* from the first tile on; the others, from the one before, of zeros */
            copy.go_on();
            copy.load();
            copy.clear_rest();
        }
        copy.go_on();
        const SharedAddress columns = tile.shared + Tile::Y_AT + TensorY::ROW_BYTES;
        u32x4 p16[TOKENS / 16] = {};
        for (Tiles at(share); at.left > 0; at.next()) {
            Scores p, derivative;
            tile.load_terms(at);
            multiply<TensorX, TensorY>(tile.shared, columns, tile.own_x, p, p16, grad_y, copy);
            rows.begin_head(at.head);
            tile.use_term(0);
            rows.probabilities(tile, p, derivative, at.first);
            if (__builtin_expect(edges.cut(at.first), false)) rows.hide(p, at.first);
            if (DROPOUT) rows.drop(p, at.first);
            tile.put(p);
#pragma unroll
            for (int j = 0; j < TOKENS / 16; ++j) p16[j] = round_operand(DROPOUT ? Rows::kept(p) : p, 0, j);
            copy.clear_rest();
            copy.go_on();
        }
        meet();
        copy.store_all();
        Tile::multiply_last<TensorY>(columns, p16, grad_y);
        meet();
    }

    template <bool BY_ROWS>
    static __device__ __forceinline__ void gradients(const Share &share, Tile &tile, GradX &grad_x) {
        tile.own_y.load(tile.shared, own_rows(share, share.own().y, Tile::wave_row()), {~0u, 0u});
        const TileEdges edges(share, Tile::wave_row());
        Rows rows(share, share.block_row + Tile::wave_row());
        PassingCopy<!BY_ROWS, !BY_ROWS, Share> copy(share, tile.shared + (BY_ROWS ? 0 : Tile::Y_AT));
        if (!BY_ROWS) copy.store_all(); /* zeros: what stands before the first tile */
        copy.go_on();
        copy.load();
        copy.clear_rest();
        copy.go_on();
        if (BY_ROWS) { /* a tile ahead */
            copy.store_all();
            copy.load();
            copy.clear_rest();
            copy.go_on();
        }
        meet();
        const SharedAddress columns = tile.shared + TensorX::ROW_BYTES;
        u32x4 ds16[TOKENS / 16] = {};
        for (Tiles at(share); at.left > 0; at.next()) {
            Scores p, derivative, ds;
            tile.load_terms(at);
            multiply<TensorY, TensorX>(tile.shared + Tile::Y_AT, columns, tile.own_y, ds, ds16, grad_x, copy);
            tile.take(p);
            tile.use_term(1);
            rows.grad_scores(tile, p, derivative, ds);
            if (__builtin_expect(edges.cut(at.first), false)) rows.hide(ds, at.first); /* 0 * inf or 0 * NaN */
#pragma unroll
            for (int j = 0; j < TOKENS / 16; ++j) ds16[j] = round_operand(ds, 0, j);
            copy.clear_rest();
            copy.go_on();
        }
        meet();
        Tile::multiply_last<TensorX>(columns, ds16, grad_x);
    }
};

} // namespace aiter

#endif
