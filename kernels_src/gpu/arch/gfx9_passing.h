/* What the loops of the backward pass on AMD CDNA up to 128 dimensions share (arch/gfx9_query_gradient.h,
 * arch/gfx9_key_gradients.h): eight waves, two on every SIMD, of which one multiplies (M) while the other has the vector
 * unit (V). Tiles of passing rows go from memory to registers to shared memory, beside the products of the waves that
 * copy them; half a tile is stored by rows, half transposed, each by threads of its own. There are no branches for tiles
 * that a wave's rows do not see: the block's other waves multiply meanwhile, and so does it, with zeros. */
#ifndef AITER_GPU_ARCH_GFX9_PASSING_H
#define AITER_GPU_ARCH_GFX9_PASSING_H

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
        /* In units of 16 bytes a stride has 24 bits, for which there is a fast multiplication. */
        const auto place = static_cast<uint32_t>(lesser(part.row + k, end - 1)) & (TOKENS - 1);
        const uint32_t stride = static_cast<uint32_t>(rows().stride / 16) & 0xffffff;
        piece[k] = u32x4{0, 0, 0, 0};
        if (part.exists() && (Part::LANES == COLUMNS / 8 || part.chunk < COLUMNS / 8))
            piece[k] = global_load<u32x4>(base + (place * stride + part.chunk) * 16);
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

struct NoCopy {
    static constexpr int ROWS = 4;
    __device__ __forceinline__ void go_on() {}
    __device__ __forceinline__ void load(int = 0) {}
    __device__ __forceinline__ void clear_rest() {}
    __device__ __forceinline__ void store(int, int = 0) const {}
    __device__ __forceinline__ void store_all(int = 0) const {}
};

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
template <class Share> __device__ __forceinline__ auto own_rows(const Share &share, const Rows &tensor, int wave_row) {
    const int first = share.block_row + wave_row, count = share.own_rows;
    return [tensor, first, count](int r) {
        return first + r < count ? reinterpret_cast<const Element *>(tensor.row(first + r)) : nullptr;
    };
}

/* What both loops' tiles have. */
template <int PASS> struct AlternatingTile : BackwardBase<HEAD_DIM, VALUE_DIM, PASS> {
    using TensorX = PassingTensor<HEAD_DIM>;
    using TensorY = PassingTensor<VALUE_DIM>;
    static constexpr int TOKENS = PASSING_TOKENS, WAVES = 8, THREADS = WAVES * WAVE;
    using Scores = Accumulator<1, TOKENS>;

    /* One by one: the other wave of the SIMD multiplies meanwhile. */
    static __device__ __forceinline__ void exponentiate(float &x, float &y, float scale, float log_x, float log_y) {
        x = exp2(__builtin_fmaf(x, scale, -log_x));
        __builtin_amdgcn_sched_barrier(0);
        y = exp2(__builtin_fmaf(y, scale, -log_y));
        __builtin_amdgcn_sched_barrier(0);
    }
    static __device__ __forceinline__ void weigh(float &x, float &y, float p_x, float p_y, float d_x, float d_y) {
        x = p_x * less_delta(x, d_x), y = p_y * less_delta(y, d_y);
    }
    /* After the last tile: gradient += p columns of it. */
    template <class OfColumns, class Gradient>
    static __device__ __forceinline__ void multiply_last(SharedAddress columns, const u32x4 (&p)[TOKENS / 16],
                                                         Gradient &gradient) {
        auto outputs = OfColumns::Products::template outputs<Gradient>(columns);
        outputs.begin();
        OfColumns::Products::multiply(outputs, [&](int, int j) { return p[j]; }, gradient, [](int) {});
    }
};

/* What both loops have of their tiles. */
template <int OF_PASS, class OwnTile> struct PassingLoop {
    static constexpr int PASS = OF_PASS;
    using Tile = OwnTile;
    using Scores = typename Tile::Scores;
    using GradX = typename Tile::GradX;
    using GradY = typename Tile::GradY;
    using TensorX = typename Tile::TensorX;
    using TensorY = typename Tile::TensorY;
    using Share = aiter::Share<PASS, Tile::ROWS, Tile::TOKENS>;
    using Rows = RowWise<PASS, Tile, Share>;
    using Tiles = PassingTiles<Share>;
    static constexpr int TOKENS = Tile::TOKENS, THREADS = Tile::THREADS, ROWS = Tile::ROWS, BLOCKS = 1;
    static constexpr int SHARED_BYTES = Tile::SHARED_BYTES;
    static constexpr bool BOTH_IN_ONE_PASS = true;
    static __device__ __forceinline__ int forget(int x) { return Tile::forget(x); }
};

} // namespace aiter

#endif
