/* The gradients of keys and values on AMD CDNA, up to 128 dimensions: eight waves, in pairs that own the same 32 keys. One
 * of a pair has the probabilities, the other their gradients, one of each on every SIMD: each keeps one tensor and one
 * gradient in registers, so that two fit on a SIMD, and while one multiplies (M) the other has the vector unit (V).
 *
 *                       tile n                                   n + 1
 *   probabilities   M: S(n), dV += P(n-1) dO  |  V: P(n) = exp2(S - LSE)     | M ...
 *   gradients       V: dS(n-1) = P (dP-delta) |  M: dP(n), dK += dS(n-1) Q   | V ...
 *                               barriers      A                              B
 *
 *   exchange     P(n) goes to the other wave through shared memory in float32, as its lanes hold it
 *   copies       In V, half of the waves of either kind store a tensor by rows, the others a tensor transposed, from
 *                registers that load the next tile at once. A part of shared memory is written between the same two
 *                barriers in which nobody reads it, so there is one buffer for each:
 *
 *                written by             before A            read before B        | written before B    read before A
 *                probabilities                                                   | Q by rows (n+1)     S(n+1)
 *                                                                                | dO transposed (n)   dV: P(n) dO
 *                gradients              dO by rows (n)      dP(n)                |
 *                                       Q transposed (n-1)  dK: dS(n-1) Q        |
 *
 * Tiles that a pair does not see it skips, but for its part of the copies and the barriers. */
#ifndef AITER_GPU_ARCH_GFX9_PAIRED_BACKWARD_H
#define AITER_GPU_ARCH_GFX9_PAIRED_BACKWARD_H

#include <type_traits>

#include "gpu/backward_loop.h"

namespace aiter {

/* A tensor's tile in shared memory: by rows, then transposed. */
template <int COLUMNS> struct PassingTensor {
    static constexpr int TOKENS = 32;
    using Layout = PermutedTile<COLUMNS, COLUMNS, TOKENS>;
    using Products = TileProducts<COLUMNS, COLUMNS, TOKENS, Layout, 4>;
    static constexpr int ROW_BYTES = Layout::KEY_BYTES, BYTES = ROW_BYTES + Layout::VALUE_BYTES;
};

struct PairedTile : BackwardBase<HEAD_DIM, VALUE_DIM, GRAD_KEY_VALUE> {
    using Base = BackwardBase<HEAD_DIM, VALUE_DIM, GRAD_KEY_VALUE>;
    using TensorX = PassingTensor<HEAD_DIM>;
    using TensorY = PassingTensor<VALUE_DIM>;
    static constexpr int PAIRS = 4, THREADS = 2 * PAIRS * WAVE;
    static constexpr int Y_AT = TensorX::BYTES, EXCHANGE_AT = Y_AT + TensorY::BYTES;
    static constexpr int PAIR_BYTES = TOKENS * ROW_TILE * 4, TERMS_AT = EXCHANGE_AT + PAIRS * PAIR_BYTES;
    static constexpr int TERM_BYTES = TOKENS * 4; /* LSE of a tile, then delta; of two tiles */
    static constexpr int SHARED_BYTES = TERMS_AT + 2 * 2 * TERM_BYTES;
    static_assert(ROWS == PAIRS * ROW_TILE, "32 own rows for each pair");

    SharedAddress terms; /* of the tile at hand */

    static __device__ __forceinline__ int pair() { return wave() % PAIRS; }
    static __device__ __forceinline__ int wave_row() { return pair() * ROW_TILE; }
    __device__ __forceinline__ void term(int which, int column, float (&run)[COLUMN_RUN]) const {
        const auto four = shared_load<f32x4_run>(terms + which * TERM_BYTES + column * 4);
#pragma unroll
        for (int i = 0; i < COLUMN_RUN; ++i) run[i] = four[i];
    }
    /* P of the pair's tile. */
    __device__ __forceinline__ SharedAddress exchange() const {
        return opaque(shared + EXCHANGE_AT + pair() * PAIR_BYTES + lane() * 16);
    }
    static __device__ __forceinline__ void put(SharedAddress to, const Scores &p) {
#pragma unroll
        for (int i = 0; i < 16; i += 4)
            shared_store(to + i * WAVE * 4, f32x4_run{p.get(0, i), p.get(0, i + 1), p.get(0, i + 2), p.get(0, i + 3)});
    }
    static __device__ __forceinline__ void take(SharedAddress from, Scores &p) {
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
            const auto four = shared_load<f32x4_run>(from + i * WAVE * 4);
#pragma unroll
            for (int j = 0; j < 4; ++j) p.set(0, i + j, four[j]);
        }
    }
};

/* The tiles of all passing heads, one after the other; then the last for ever. */
template <class Share> struct PassingTiles {
    const Share &share;
    int left, first; /* tiles, this one with them; its first row */
    int head = 0, count = 0;
    RowPair rows; /* of the head */

    __device__ __forceinline__ explicit PassingTiles(const Share &share)
        : share(share), left(share.heads_passing * share.tiles), first(share.first), rows(share.passing()) {}
    __device__ __forceinline__ bool begins() const { return head == 0 && count == 0; }
    __device__ __forceinline__ void next() {
        if (--left <= 0) return;
        ++count, first += PairedTile::TOKENS;
        if (count < share.tiles) return;
        count = 0, first = share.first;
        ++head;
        share.sequence.next_head(rows);
    }
};

/* A thread's part of x's tiles or, where IS_Y, of y's: four rows of 16 bytes, to be stored by rows or TRANSPOSED. The
 * next tile is loaded where the one before was stored; past the last, something is for nothing. */
template <bool IS_Y, bool TRANSPOSED, class Share> struct PassingCopy {
    static constexpr int TOKENS = PairedTile::TOKENS, ROWS = 4;
    static constexpr int COLUMNS = IS_Y ? VALUE_DIM : HEAD_DIM;
    static constexpr bool TERMS = !IS_Y && !TRANSPOSED; /* copies LSE and delta, too */
    using Part = typename PassingTensor<COLUMNS>::Layout::template Part<TRANSPOSED, PairedTile::THREADS / 4>;

    PassingTiles<Share> tiles;
    const Part part;
    const SharedAddress to, terms;
    u32x4 piece[ROWS] = {};
    f32x2 piece_terms = {};
    int begin = 0, end = TOKENS; /* rows of the tile on its way that exist, in the tile */
    const char *base;            /* of that tile */
    const LseAndDelta *base_terms;

    __device__ __forceinline__ PassingCopy(const Share &share, SharedAddress shared)
        : tiles(share), part(thread_in_block() % (PairedTile::THREADS / 4)),
          to(part.place(shared + (IS_Y ? PairedTile::Y_AT : 0))),
          terms(opaque(shared + PairedTile::TERMS_AT + thread_in_block() % WAVE * 4)) {}

    static __device__ __forceinline__ bool takes_terms() {
        return TERMS && thread_in_block() % (PairedTile::THREADS / 4) < TOKENS;
    }
    __device__ __forceinline__ const Rows &rows() const { return IS_Y ? tiles.rows.y : tiles.rows.x; }
    /* To the next tile, which load() is then about. */
    __device__ __forceinline__ void go_on() {
        begin = DROPOUT ? tiles.rows.begin - tiles.first : 0, end = tiles.rows.count - tiles.first;
        base = rows().row(tiles.first);
        base_terms = tiles.rows.terms + tiles.first;
        tiles.next();
    }
    __device__ __forceinline__ void load(int k) {
        const auto place = static_cast<uint32_t>(lesser(part.row + k, end - 1)) & (TOKENS - 1);
        piece[k] = u32x4{0, 0, 0, 0};
        if (part.exists() && (Part::LANES == COLUMNS / 8 || part.chunk < COLUMNS / 8))
            piece[k] = global_load<u32x4>(
                base + (place * (static_cast<uint32_t>(rows().stride) & 0xffffff) + part.chunk * 16));
        if (TERMS && k == ROWS - 1)
            piece_terms = global_load<f32x2>(base_terms + lesser(thread_in_block() % TOKENS, end - 1));
    }
    __device__ __forceinline__ void load() {
#pragma unroll
        for (int k = 0; k < ROWS; ++k) load(k);
    }
    __device__ __forceinline__ void clear_rest() {
        if (__builtin_expect(end < TOKENS || DROPOUT && begin > 0, false))
#pragma unroll
            for (int k = 0; k < ROWS; ++k)
                if (part.row + k >= end || DROPOUT && part.row + k < begin) piece[k] = u32x4{0, 0, 0, 0};
    }
    __device__ __forceinline__ void store(int k) const {
        if (part.exists()) part.store(to, piece, k);
    }
    __device__ __forceinline__ void store() const {
#pragma unroll
        for (int k = 0; k < ROWS; ++k) store(k);
    }
    __device__ __forceinline__ void store_terms(int parity) const {
        if (!takes_terms()) return;
        shared_store(terms + parity * 2 * PairedTile::TERM_BYTES, piece_terms.x);
        shared_store(terms + parity * 2 * PairedTile::TERM_BYTES + PairedTile::TERM_BYTES, piece_terms.y);
    }
};

struct PairedLoop {
    static constexpr int PASS = GRAD_KEY_VALUE;
    using Tile = PairedTile;
    using Scores = Tile::Scores;
    using GradX = Tile::GradX;
    using GradY = Tile::GradY;
    using TensorX = Tile::TensorX;
    using TensorY = Tile::TensorY;
    static constexpr int TOKENS = Tile::TOKENS;
    using Share = aiter::Share<PASS, Tile::ROWS, TOKENS>;
    using Rows = RowWise<PASS, Tile, Share>;
    using Tiles = PassingTiles<Share>;
    static constexpr int THREADS = Tile::THREADS, ROWS = Tile::ROWS, BLOCKS = 1;
    static constexpr int SHARED_BYTES = Tile::SHARED_BYTES;
    static constexpr bool BOTH_IN_ONE_PASS = true;
    static __device__ __forceinline__ int forget(int x) { return Tile::forget(x); }

    template <class Finish>
    static __device__ __forceinline__ void attend(const Share &share, SharedAddress shared, Finish finish) {
        Tile tile;
        tile.shared = shared;
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

    static __device__ __forceinline__ auto own_rows(const Share &share, const aiter::Rows &tensor) {
        const int first = share.block_row + Tile::wave_row(), count = share.own_rows;
        return [tensor, first, count](int r) {
            return first + r < count ? reinterpret_cast<const Element *>(tensor.row(first + r)) : nullptr;
        };
    }

    /* What the wave has stored is there and what it has read has come; its loads may be on their way. */
    static __device__ __forceinline__ void meet() {
        __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
        __builtin_amdgcn_sched_barrier(0);
        __builtin_amdgcn_s_waitcnt(0xc07f); /* lgkmcnt(0) */
        __builtin_amdgcn_s_barrier();
        __builtin_amdgcn_sched_barrier(0);
        __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
    }

    /* Which tiles the wave's rows see, and which of them all rows see all of. */
    struct Seen {
        Range first, last;
        int end;
        __device__ __forceinline__ explicit Seen(const Share &share) {
            const int row = share.block_row + Tile::wave_row();
            first = share.sees(row), last = share.sees(lesser(row + ROW_TILE, share.own_rows) - 1);
            end = row < share.own_rows ? last.high : 0;
        }
        __device__ __forceinline__ bool some(int tile) const { return tile + TOKENS > first.low && tile < end; }
        __device__ __forceinline__ bool masked(int tile) const { return tile < last.low || tile + TOKENS > first.high; }
    };

    /* M: s = rows of a tile times own ones, of the tile if `sees`, and gradient += p columns of the one before, if `saw`;
     * beside them, the copies. Ends with the barrier, which the last products, whose operands have been read, do not
     * keep waiting. */
    template <class OfRows, class OfColumns, class Own, class Gradient, class Copy>
    static __device__ __forceinline__ void multiply(SharedAddress rows, SharedAddress columns, bool sees, bool saw,
                                                    const Own &own, Scores &s, const u32x4 (&p)[TOKENS / 16],
                                                    Gradient &gradient, Copy &copy) {
        using Products = typename OfColumns::Products;
        using ScoreProducts = typename OfRows::Products;
        constexpr int SCORE_PRODUCTS = ScoreProducts::SCORE_PRODUCTS;
        constexpr int STRIDE = SCORE_PRODUCTS / Copy::ROWS; /* products before a row is stored */
        __builtin_amdgcn_s_setprio(2);
        auto outputs = Products::template outputs<Gradient>(columns);
        const auto copy_at_once = [&] {
            copy.store();
            outputs.begin();
        };
        if (STRIDE == 0) copy_at_once();
        if (__builtin_expect(sees, true)) {
            auto scores = ScoreProducts::scores(rows);
            scores.begin();
            ScoreProducts::multiply(scores, own, s, [&](int i) {
                if (STRIDE == 0) return;
                if (i % STRIDE == STRIDE - 1 && i / STRIDE < Copy::ROWS) copy.store(i / STRIDE);
                constexpr int READ = SCORE_PRODUCTS - outputs.AHEAD;
                if (i >= READ) outputs.begin(i - READ);
            });
        } else if (STRIDE > 0) {
            copy_at_once();
        }
        if (__builtin_expect(saw, true)) {
            constexpr int LATER = outputs.AHEAD;
            Products::multiply(
                outputs, [&](int, int j) { return p[j]; }, gradient,
                [&](int i) {
                    if (i < Copy::ROWS) copy.load(i);
                    if (i == outputs.PRODUCTS - LATER) meet();
                });
#pragma unroll
            for (int k = outputs.PRODUCTS; k < Copy::ROWS; ++k) copy.load(k);
        } else {
            copy.load();
            meet();
        }
        __builtin_amdgcn_s_setprio(0);
    }

    template <bool BY_ROWS>
    static __device__ __forceinline__ void probabilities(const Share &share, Tile &tile, GradY &grad_y) {
        tile.own_x.load(tile.shared, own_rows(share, share.own().x), {~0u, 0u});
        const Seen seen(share);
        Rows rows(share, share.block_row + Tile::wave_row());
        PassingCopy<BY_ROWS, !BY_ROWS, Share> copy(share, tile.shared);
        if (BY_ROWS) { /* from the first tile on; the others, from the one before */
            copy.go_on();
            copy.load();
            copy.clear_rest();
        }
        copy.go_on();
        meet();

        u32x4 p16[TOKENS / 16];
        Scores p;
        bool saw = false;
        int parity = 0;
        for (Tiles at(share);; at.next()) {
            const bool sees = at.left > 0 && seen.some(at.first);
            multiply<TensorX, TensorY>(tile.shared, tile.shared + Tile::Y_AT + TensorY::ROW_BYTES, sees, saw, tile.own_x,
                                       p, p16, grad_y, copy);
            if (at.left == 0) break;
            if (__builtin_expect(sees, true)) {
                Scores derivative;
                tile.terms = tile.shared + Tile::TERMS_AT + parity * 2 * Tile::TERM_BYTES;
                rows.begin_head(at.head);
                rows.probabilities(tile, p, derivative, at.first);
                if (seen.masked(at.first)) rows.hide(p, at.first);
                if (DROPOUT) rows.drop(p, at.first);
                Tile::put(tile.exchange(), p);
#pragma unroll
                for (int j = 0; j < TOKENS / 16; ++j) p16[j] = round_operand(DROPOUT ? Rows::kept(p) : p, 0, j);
            }
            saw = sees;
            parity ^= 1;
            copy.clear_rest();
            copy.go_on();
            meet();
        }
        meet();
    }

    template <bool BY_ROWS>
    static __device__ __forceinline__ void gradients(const Share &share, Tile &tile, GradX &grad_x) {
        tile.own_y.load(tile.shared, own_rows(share, share.own().y), {~0u, 0u});
        const Seen seen(share);
        Rows rows(share, share.block_row + Tile::wave_row());
        PassingCopy<!BY_ROWS, !BY_ROWS, Share> copy(share, tile.shared);
        copy.go_on();
        copy.load();
        if (BY_ROWS) { /* a tile ahead */
            copy.clear_rest();
            copy.store();
            copy.store_terms(0);
            copy.go_on();
            copy.load();
        }
        meet();

        u32x4 ds16[TOKENS / 16];
        Scores ds;
        bool saw = false;
        int parity = 1, before = 0; /* of the tile before */
        for (Tiles at(share);; at.next()) {
            if (__builtin_expect(saw, true)) {
                Scores p, derivative;
                tile.terms = tile.shared + Tile::TERMS_AT + parity * 2 * Tile::TERM_BYTES;
                Tile::take(tile.exchange(), p);
                rows.grad_scores(tile, p, derivative, ds);
                if (seen.masked(before)) rows.hide(ds, before); /* 0 * inf or 0 * NaN */
#pragma unroll
                for (int j = 0; j < TOKENS / 16; ++j) ds16[j] = round_operand(ds, 0, j);
            }
            copy.clear_rest();
            copy.go_on();
            meet();
            const bool ends = at.left == 0, sees = !ends && seen.some(at.first);
            copy.store_terms(parity);
            multiply<TensorY, TensorX>(tile.shared + Tile::Y_AT, tile.shared + TensorX::ROW_BYTES, sees, saw, tile.own_y,
                                       ds, ds16, grad_x, copy);
            if (ends) break;
            saw = sees;
            before = at.first;
            parity ^= 1;
        }
    }
};

/* A soft cap's derivative would have to be exchanged, too. */
template <int PASS>
using BackwardLoopOf =
    std::conditional_t<PASS == GRAD_KEY_VALUE && greater(HEAD_DIM, VALUE_DIM) <= 128 && !SOFTCAP, PairedLoop,
                       BackwardTileLoop<PASS>>;

} // namespace aiter

#endif
