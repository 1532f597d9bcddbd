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

/* Passing rows of a tile: as many as give its products some length. */
constexpr int PASSING_TOKENS = greater(HEAD_DIM, VALUE_DIM) <= 64 ? 64 : 32;

/* A tensor's tile in shared memory: by rows, then transposed. */
template <int COLUMNS> struct PassingTensor {
    static constexpr int TOKENS = PASSING_TOKENS;
    using Layout = PermutedTile<COLUMNS, COLUMNS, TOKENS>;
    using Products = TileProducts<COLUMNS, COLUMNS, TOKENS, Layout, 4>;
    static constexpr int ROW_BYTES = Layout::KEY_BYTES, BYTES = ROW_BYTES + Layout::VALUE_BYTES;
};

struct PairedTile : BackwardBase<HEAD_DIM, VALUE_DIM, GRAD_KEY_VALUE> {
    using Base = BackwardBase<HEAD_DIM, VALUE_DIM, GRAD_KEY_VALUE>;
    using TensorX = PassingTensor<HEAD_DIM>;
    using TensorY = PassingTensor<VALUE_DIM>;
    static constexpr int TOKENS = PASSING_TOKENS;
    using Scores = Accumulator<1, TOKENS>;
    static constexpr int PAIRS = 4, THREADS = 2 * PAIRS * WAVE;
    static constexpr int Y_AT = TensorX::BYTES, EXCHANGE_AT = Y_AT + TensorY::BYTES;
    static constexpr int PAIR_BYTES = TOKENS * ROW_TILE * 4, SHARED_BYTES = EXCHANGE_AT + PAIRS * PAIR_BYTES;
    static_assert(ROWS == PAIRS * ROW_TILE, "32 own rows for each pair");

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
    /* One by one: the other wave of the SIMD multiplies meanwhile. */
    static __device__ __forceinline__ void exponentiate(float &x, float &y, float scale, float log_x, float log_y) {
        x = exp2(__builtin_fmaf(x, scale, -log_x));
        __builtin_amdgcn_sched_barrier(0);
        y = exp2(__builtin_fmaf(y, scale, -log_y));
        __builtin_amdgcn_sched_barrier(0);
    }
    static __device__ __forceinline__ void weigh(float &x, float &y, float p_x, float p_y, float d_x, float d_y) {
        x = p_x * (x - d_x), y = p_y * (y - d_y);
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

/* The tiles of all passing heads, one after the other; then the last for ever. */
template <class Share> struct PassingTiles {
    static constexpr int TOKENS = PASSING_TOKENS;
    const Share &share;
    const int tiles, heads;
    int left, first; /* tiles of all heads, this one with them; its first row */
    int head = 0, count = 0;
    RowPair rows; /* of the head */

    __device__ __forceinline__ explicit PassingTiles(const Share &share)
        : share(share), tiles(uniform(share.tiles)), heads(uniform(share.heads_passing)), left(heads * tiles),
          first(uniform(share.first)), rows(share.passing()) {
        rows.count = uniform(rows.count);
    }
    __device__ __forceinline__ void next() {
        if (--left <= 0) return;
        ++count, first += TOKENS;
        if (__builtin_expect(count < tiles, true)) return;
        count = 0, first = uniform(share.first);
        ++head;
        share.sequence.next_head(rows);
    }
    /* LSE and delta of one of the tile's rows. */
    __device__ __forceinline__ f32x2 terms(int row) const {
        const auto place = static_cast<uint32_t>(lesser(row, rows.count - 1 - first));
        const auto *tile = reinterpret_cast<const char *>(rows.terms + first);
        return global_load<f32x2>(tile + place * static_cast<uint32_t>(sizeof(LseAndDelta)));
    }
};

/* A thread's part of x's tiles or, where IS_Y, of y's: four rows of 16 bytes, to be stored by rows or TRANSPOSED. The
 * next tile is loaded where the one before was stored; past the last, something is for nothing. */
template <bool IS_Y, bool TRANSPOSED, class Share> struct PassingCopy {
    static constexpr int TOKENS = PASSING_TOKENS, ROWS = 4, COPIERS = 128; /* threads that copy one tensor in one way */
    static constexpr int COLUMNS = IS_Y ? VALUE_DIM : HEAD_DIM;
    using Part = typename PassingTensor<COLUMNS>::Layout::template Part<TRANSPOSED, COPIERS>;

    PassingTiles<Share> tiles;
    const Part part;
    const SharedAddress to;
    u32x4 piece[ROWS] = {};
    int begin = 0, end = TOKENS; /* rows of the tile on its way that exist, in the tile */
    const char *base;            /* of that tile */

    /* The tile in shared memory begins with its rows, and those are followed by what is transposed. */
    __device__ __forceinline__ PassingCopy(const Share &share, SharedAddress tile)
        : tiles(share), part(thread_in_block() % COPIERS), to(part.place(tile)) {}

    __device__ __forceinline__ const Rows &rows() const { return IS_Y ? tiles.rows.y : tiles.rows.x; }
    /* To the next tile, which load() is then about. */
    __device__ __forceinline__ void go_on() {
        begin = DROPOUT ? tiles.rows.begin - tiles.first : 0, end = tiles.rows.count - tiles.first;
        base = rows().row(tiles.first);
        tiles.next();
    }
    __device__ __forceinline__ void load(int k) {
        const auto place = static_cast<uint32_t>(lesser(part.row + k, end - 1)) & (TOKENS - 1);
        piece[k] = u32x4{0, 0, 0, 0};
        if (part.exists() && (Part::LANES == COLUMNS / 8 || part.chunk < COLUMNS / 8))
            piece[k] = global_load<u32x4>(
                base + (place * (static_cast<uint32_t>(rows().stride) & 0xffffff) + part.chunk * 16));
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
    /* `offset` bytes further, in another buffer. */
    __device__ __forceinline__ void store(int k, int offset = 0) const {
        if (part.exists()) part.store(to + offset, piece, k);
    }
    __device__ __forceinline__ void store_all(int offset = 0) const {
#pragma unroll
        for (int k = 0; k < ROWS; ++k) store(k, offset);
    }
};

/* What the wave has stored is there and what it has read has come; its loads may be on their way. */
__device__ __forceinline__ void meet() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
    __builtin_amdgcn_sched_barrier(0);
    __builtin_amdgcn_s_waitcnt(0xc07f); /* lgkmcnt(0) */
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_sched_barrier(0);
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}

/* Whether some row of a wave does not see all of a tile. */
struct TileEdges {
    int low, high;
    template <class Share> __device__ __forceinline__ TileEdges(const Share &share, int wave_row) {
        const int row = share.block_row + wave_row;
        low = uniform(share.sees(lesser(row + ROW_TILE, share.own_rows) - 1).low);
        high = uniform(share.sees(row).high);
    }
    __device__ __forceinline__ bool cut(int tile) const { return tile < low || tile + PASSING_TOKENS > high; }
};

/* Rows of one own tensor, for Query::load. */
template <class Share>
__device__ __forceinline__ auto own_rows(const Share &share, const Rows &tensor, int wave_row) {
    const int first = share.block_row + wave_row, count = share.own_rows;
    return [tensor, first, count](int r) {
        return first + r < count ? reinterpret_cast<const Element *>(tensor.row(first + r)) : nullptr;
    };
}

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
    static __device__ __forceinline__ void multiply(SharedAddress rows, SharedAddress columns, const Own &own, Scores &s,
                                                    const u32x4 (&p)[TOKENS / 16], Gradient &gradient, Copy &copy) {
        using Products = typename OfColumns::Products;
        using ScoreProducts = typename OfRows::Products;
        constexpr int SCORE_PRODUCTS = ScoreProducts::SCORE_PRODUCTS;
        constexpr int STRIDE = SCORE_PRODUCTS / Copy::ROWS; /* products before a row is stored */
        auto scores = ScoreProducts::scores(rows);
        auto outputs = Products::template outputs<Gradient>(columns);
        meet();
        __builtin_amdgcn_s_setprio(2);
        scores.begin();
        if (STRIDE == 0) {
            copy.store_all();
            outputs.begin();
        }
        ScoreProducts::multiply(scores, own, s, [&](int i) {
            if (STRIDE == 0) return;
            if (i % STRIDE == STRIDE - 1 && i / STRIDE < Copy::ROWS) copy.store(i / STRIDE);
            constexpr int READ = SCORE_PRODUCTS - outputs.AHEAD;
            if (i >= READ) outputs.begin(i - READ);
        });
        if (outputs.PRODUCTS < Copy::ROWS) copy.load();
        Products::multiply(
            outputs, [&](int, int j) { return p[j]; }, gradient,
            [&](int i) {
                if (outputs.PRODUCTS >= Copy::ROWS && i < Copy::ROWS) copy.load(i);
                if (i == outputs.PRODUCTS - outputs.AHEAD) {
                    meet();
                    __builtin_amdgcn_s_setprio(3);
                }
            });
        __builtin_amdgcn_s_setprio(0);
    }
    /* After the last tile: gradient += p columns of it. */
    template <class OfColumns, class Gradient>
    static __device__ __forceinline__ void multiply(SharedAddress columns, const u32x4 (&p)[TOKENS / 16],
                                                    Gradient &gradient) {
        auto outputs = OfColumns::Products::template outputs<Gradient>(columns);
        outputs.begin();
        OfColumns::Products::multiply(
            outputs, [&](int, int j) { return p[j]; }, gradient, [](int) {});
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
        multiply<TensorY>(columns, p16, grad_y);
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
        multiply<TensorX>(columns, ds16, grad_x);
    }
};

/* The gradient of queries: eight waves in two groups of four, one of each on every SIMD, that alternate as those of the
 * forward pass do (arch/gfx9_forward.h). */
struct QueryTile : BackwardBase<HEAD_DIM, VALUE_DIM, GRAD_QUERY> {
    using TensorX = PassingTensor<HEAD_DIM>;
    using TensorY = PassingTensor<VALUE_DIM>;
    static constexpr int TOKENS = PASSING_TOKENS;
    using Scores = Accumulator<1, TOKENS>;
    static constexpr int WAVES = 8, THREADS = WAVES * WAVE, ROWS = WAVES * ROW_TILE;
    /* A buffer: keys by rows and transposed, values by rows. */
    static constexpr int Y_AT = TensorX::BYTES, BUFFER_BYTES = Y_AT + TensorY::ROW_BYTES;
    static constexpr int SHARED_BYTES = 2 * BUFFER_BYTES;
    static __device__ __forceinline__ int wave_row() { return wave() * ROW_TILE; }
    __device__ __forceinline__ explicit QueryTile(SharedAddress memory) { shared = memory; }
    __device__ __forceinline__ void term(int, int, float (&)[COLUMN_RUN]) const {}
    static __device__ __forceinline__ void exponentiate(float &x, float &y, float scale, float log_x, float log_y) {
        PairedTile::exponentiate(x, y, scale, log_x, log_y);
    }
    static __device__ __forceinline__ void weigh(float &x, float &y, float p_x, float p_y, float d_x, float d_y) {
        PairedTile::weigh(x, y, p_x, p_y, d_x, d_y);
    }
};

struct NoCopy {
    static constexpr int ROWS = 4;
    __device__ __forceinline__ void go_on() {}
    __device__ __forceinline__ void load(int = 0) {}
    __device__ __forceinline__ void clear_rest() {}
    __device__ __forceinline__ void store(int, int = 0) const {}
    __device__ __forceinline__ void store_all(int = 0) const {}
};

struct QueryLoop {
    static constexpr int PASS = GRAD_QUERY;
    using Tile = QueryTile;
    using Scores = Tile::Scores;
    using GradX = Tile::GradX;
    using GradY = Tile::GradY;
    using TensorX = Tile::TensorX;
    using TensorY = Tile::TensorY;
    using Share = aiter::Share<PASS, Tile::ROWS, Tile::TOKENS>;
    using Rows = RowWise<PASS, Tile, Share>;
    using Tiles = PassingTiles<Share>;
    static constexpr int TOKENS = Tile::TOKENS, THREADS = Tile::THREADS, ROWS = Tile::ROWS, BLOCKS = 1;
    static constexpr int SHARED_BYTES = Tile::SHARED_BYTES;
    static constexpr bool BOTH_IN_ONE_PASS = true;
    static __device__ __forceinline__ int forget(int x) { return Tile::forget(x); }

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
                constexpr int READ = ProductsX::SCORE_PRODUCTS - gradients.AHEAD;
                if (i >= READ) gradients.begin(i - READ);
            });
            ProductsY::multiply(gradients, tile.own_y, ds, [&](int i) {
                constexpr int STRIDE = ProductsY::SCORE_PRODUCTS / Copy::ROWS;
                constexpr int READ = ProductsY::SCORE_PRODUCTS - outputs.AHEAD;
                static_assert(STRIDE > 0 && READ >= 0, "");
                if (i % STRIDE == 0 && i / STRIDE < Copy::ROWS) copy.store(i / STRIDE, to);
                if (i >= READ) outputs.begin(i - READ);
            });
            ProductsX::multiply(
                outputs, [&](int, int j) { return ds16[j]; }, grad_x,
                [&](int i) {
                    if (i < Copy::ROWS) copy.load(i);
                    if (GROUP == 1 && i == outputs.PRODUCTS - outputs.AHEAD) {
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
        PairedLoop::multiply<TensorX>(last + TensorX::ROW_BYTES, ds16, grad_x);
    }
};

/* A soft cap
 * derivative would have to be exchanged, too. */
constexpr bool PAIRED = greater(HEAD_DIM, VALUE_DIM) <= 128 && !SOFTCAP;
template <int PASS>
using BackwardLoopOf =
    std::conditional_t<!PAIRED, BackwardTileLoop<PASS>,
                       std::conditional_t<PASS == GRAD_KEY_VALUE, PairedLoop,
                                          std::conditional_t<PASS == GRAD_QUERY, QueryLoop, BackwardTileLoop<PASS>>>>;

} // namespace aiter

#endif
