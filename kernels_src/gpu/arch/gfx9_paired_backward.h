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
    using Products = TileProducts<COLUMNS, COLUMNS, TOKENS, Layout>;
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

/* A thread's part of one tensor's tiles: four rows of 16 bytes, to be stored by rows or transposed. */
struct PassingCopy {
    static constexpr int TOKENS = PairedTile::TOKENS;
    template <bool TRANSPOSED, int COLUMNS>
    using Part = typename PassingTensor<COLUMNS>::Layout::template Part<TRANSPOSED, PairedTile::THREADS / 4>;

    const bool is_y, transposed; /* the same for a wave */
    int row, chunk, chunks;      /* of the tile; chunks of a row in memory */
    bool exists, loads;          /* has a place in shared memory; in memory, too */
    SharedAddress to;
    u32x4 piece[4];
    int begin, end; /* rows of the tile on its way that exist, in the tile */

    __device__ __forceinline__ PassingCopy(SharedAddress shared, bool is_y, bool transposed)
        : is_y(is_y), transposed(transposed) {
        of_kind([&](auto part_of, int columns) {
            const decltype(part_of.part()) part = part_of.part();
            row = part.row, chunk = part.chunk, exists = part.exists();
            loads = exists && chunk < columns / 8;
            to = part.place(shared + (this->is_y ? PairedTile::Y_AT : 0));
        });
    }
    template <bool TRANSPOSED, int COLUMNS> struct Kind {
        static __device__ __forceinline__ auto part() {
            return Part<TRANSPOSED, COLUMNS>(thread_in_block() % (PairedTile::THREADS / 4));
        }
    };
    /* Calls f(Kind, columns). */
    template <class F> __device__ __forceinline__ void of_kind(F f) const {
        const auto of_layout = [&](auto by_rows, auto by_columns, int columns) {
            if (transposed) f(by_columns, columns);
            else f(by_rows, columns);
        };
        if (HEAD_DIM == VALUE_DIM || !is_y)
            of_layout(Kind<false, HEAD_DIM>(), Kind<true, HEAD_DIM>(), HEAD_DIM);
        else of_layout(Kind<false, VALUE_DIM>(), Kind<true, VALUE_DIM>(), VALUE_DIM);
    }
    __device__ __forceinline__ void load(const RowPair &rows, int first) {
        begin = DROPOUT ? rows.begin - first : 0, end = rows.count - first;
        const Rows &from = is_y ? rows.y : rows.x;
        const char *base = opaque_scalar(from.row(first));
        const auto stride = static_cast<uint32_t>(from.stride);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const auto place = static_cast<uint32_t>(lesser(row + k, end - 1));
            piece[k] = u32x4{0, 0, 0, 0};
            if (loads) piece[k] = global_load<u32x4>(base + ((place & (TOKENS - 1)) * (stride & 0xffffff) + chunk * 16));
        }
    }
    __device__ __forceinline__ void store() {
        if (__builtin_expect(end < TOKENS || DROPOUT && begin > 0, false))
#pragma unroll
            for (int k = 0; k < 4; ++k)
                if (row + k >= end || DROPOUT && row + k < begin) piece[k] = u32x4{0, 0, 0, 0};
        of_kind([&](auto part_of, int) {
            const decltype(part_of.part()) part = part_of.part();
            if (exists)
#pragma unroll
                for (int k = 0; k < 4; ++k) part.store(to, piece, k);
        });
    }
};

/* The tiles of all passing heads, one after the other. */
template <class Share> struct PassingTiles {
    const Share &share;
    int left, first; /* tiles, this one with them; its first row */
    int head = 0, count = 0;
    RowPair rows; /* of the head */

    __device__ __forceinline__ explicit PassingTiles(const Share &share)
        : share(share), left(share.heads_passing * share.tiles), first(share.first), rows(share.passing()) {}
    __device__ __forceinline__ void next() {
        --left, first += PairedTile::TOKENS;
        if (++count < share.tiles) return;
        count = 0, first = share.first;
        if (++head < share.heads_passing) share.sequence.next_head(rows);
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
        if (wave() < Tile::PAIRS) {
            GradY grad_y;
            grad_y.clear();
            if (share.tiles > 0) probabilities(share, tile, grad_y);
            finish(tile, none, grad_y);
        } else {
            GradX grad_x;
            grad_x.clear();
            if (share.tiles > 0) gradients(share, tile, grad_x);
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

    /* M: s = rows of a tile times own ones, of the tile if `sees`, and gradient += p columns of the one before, if `saw`.
     * Ends with the barrier, which the last products, whose operands have been read, do not keep waiting. */
    template <class OfRows, class OfColumns, class Own, class Gradient>
    static __device__ __forceinline__ void multiply(SharedAddress rows, SharedAddress columns, bool sees, bool saw,
                                                    const Own &own, Scores &s, const u32x4 (&p)[TOKENS / 16],
                                                    Gradient &gradient) {
        using Products = typename OfColumns::Products;
        using ScoreProducts = typename OfRows::Products;
        __builtin_amdgcn_s_setprio(2);
        auto outputs = Products::template outputs<Gradient>(columns);
        static_assert(outputs.AHEAD <= ScoreProducts::SCORE_PRODUCTS, "begun while scores are multiplied");
        if (__builtin_expect(sees, true)) {
            auto scores = ScoreProducts::scores(rows);
            scores.begin();
            ScoreProducts::multiply(scores, own, s, [&](int i) {
                constexpr int READ = ScoreProducts::SCORE_PRODUCTS - outputs.AHEAD;
                if (i >= READ) outputs.begin(i - READ);
            });
        } else {
            outputs.begin();
        }
        if (__builtin_expect(saw, true)) {
            constexpr int LATER = lesser(READS_AHEAD, 2);
            Products::multiply(
                outputs, [&](int, int j) { return p[j]; }, gradient,
                [&](int i) {
                    if (i == outputs.PRODUCTS - LATER) meet();
                });
        } else {
            meet();
        }
        __builtin_amdgcn_s_setprio(0);
    }

    static __device__ __forceinline__ void probabilities(const Share &share, Tile &tile, GradY &grad_y) {
        tile.own_x.load(tile.shared, own_rows(share, share.own().x), {~0u, 0u});
        const bool by_rows = wave() % Tile::PAIRS < Tile::PAIRS / 2;
        const Seen seen(share);
        Rows rows(share, share.block_row + Tile::wave_row());
        PassingCopy copy(tile.shared, !by_rows, !by_rows);
        Tiles coming(share);
        f32x2 coming_terms;
        const auto load = [&] {
            if (coming.left <= 0) return;
            copy.load(coming.rows, coming.first);
            if (by_rows && thread_in_block() < TOKENS)
                coming_terms = global_load<f32x2>(coming.rows.terms + coming.first + lesser(thread_in_block(), copy.end - 1));
            coming.next();
        };
        const auto store = [&](int parity) {
            copy.store();
            if (by_rows && thread_in_block() < TOKENS) {
                const SharedAddress to = tile.shared + Tile::TERMS_AT + parity * 2 * Tile::TERM_BYTES + thread_in_block() * 4;
                shared_store(to, coming_terms.x);
                shared_store(to + Tile::TERM_BYTES, coming_terms.y);
            }
        };
        load();
        if (by_rows) {
            store(0);
            load();
        }
        meet();

        u32x4 p16[TOKENS / 16];
        Scores p;
        bool saw = false;
        int parity = 0;
        for (Tiles at(share);; at.next()) {
            const bool sees = at.left > 0 && seen.some(at.first);
            multiply<TensorX, TensorY>(tile.shared, tile.shared + Tile::Y_AT + TensorY::ROW_BYTES, sees, saw, tile.own_x,
                                       p, p16, grad_y);
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
            if (!by_rows || at.left > 1) store(parity);
            load();
            meet();
        }
        meet();
    }

    static __device__ __forceinline__ void gradients(const Share &share, Tile &tile, GradX &grad_x) {
        tile.own_y.load(tile.shared, own_rows(share, share.own().y), {~0u, 0u});
        const bool by_rows = wave() % Tile::PAIRS < Tile::PAIRS / 2;
        const Seen seen(share);
        Rows rows(share, share.block_row + Tile::wave_row());
        PassingCopy copy(tile.shared, by_rows, !by_rows);
        Tiles coming(share);
        const auto load = [&] {
            if (coming.left <= 0) return;
            copy.load(coming.rows, coming.first);
            coming.next();
        };
        load();
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
            const bool begins = at.count == 0 && at.head == 0, ends = at.left == 0;
            if (by_rows ? !ends : !begins) {
                copy.store();
                load();
            }
            meet();
            const bool sees = !ends && seen.some(at.first);
            multiply<TensorY, TensorX>(tile.shared + Tile::Y_AT, tile.shared + TensorX::ROW_BYTES, sees, saw, tile.own_y,
                                       ds, ds16, grad_x);
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
