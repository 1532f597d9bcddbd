/* Dealt pieces of keys (gpu/pieces.h) of few row tiles with few rows, on AMD CDNA: single tokens on many keys. Were each
 * piece one block's, most CUs would idle, and a CU cannot have more than so many cache lines on their way from memory. So in
 * place of attention_forward there are two kernels, with a share of a piece for each block:
 *
 *     1. score_keys     a wave for each tile of keys           S = Q K^T, cap, slope, mask; each row's greatest -> workspace
 *     2. sum_values     a block for each 32 columns of a piece's values; in rounds of PROBABILITY_WAVES tiles:
 *                         wave 1, ... a tile of the round      where reference points are after it, from the greatest scores
 *                                                              of all tiles up to it; P = exp2(S - reference) -> LDS
 *                         wave 0      all tiles, in order      O += P V, at the end -> part of the piece
 *     3. add_up_pieces  as ever
 *
 *     sum_values         round 0       1             2
 *       wave 1, ...      P(0)      |   P(1)      |   P(2)      |  ...     P(r): of round r's tiles. LDS holds those of two
 *       wave 0                     |   P(0) V(0) |   P(1) V(1) |  ...     rounds, so each round needs one barrier.
 *
 *     registers          1: Q; K of a tile, as operands, straight from memory; S
 *                        2: wave 1, ...: S of its tile, and that of the next round on its way
 *                           wave 0: O, 32 columns; V of the next round's tiles on their way, 64 bytes of each row
 *
 * Bits are the loop's: S and O come from the same matrix instructions with the same operands, tiles are added to O and to the
 * rows' sums in the same order, and reference points move from tile to tile by the same rule. When S is made, or who has the
 * other columns, does not matter. The workspace has S of the rows that there are: 4 bytes for each row and key. */
#ifndef AITER_GPU_ARCH_GFX9_SCORED_PIECES_H
#define AITER_GPU_ARCH_GFX9_SCORED_PIECES_H

#include <type_traits>

#include "gpu/tile_loop.h"

namespace aiter {

/* A tile's scores in memory, as a lane sees them: 16 bytes of each lane whose row exists, those of a half side by side, then
 * each row's greatest, times the scale. Other lanes see the last row's. */
template <class Work> struct ScoresOfTile {
    const int rows, row;
    char *const scores;

    __device__ __forceinline__ ScoresOfTile(const Work &work, const Piece &piece, int tile)
        : rows(work.rows), row(lesser(lane() % ROW_TILE, rows - 1)), scores(work.scores_of(piece, tile)) {}
    __device__ __forceinline__ bool exists() const { return lane() % ROW_TILE < rows; }
    __device__ __forceinline__ float4 *chunk(int i) const {
        return reinterpret_cast<float4 *>(scores) + (2 * i * rows + (lane() / ROW_TILE * rows + row));
    }
    __device__ __forceinline__ float *greatest() const {
        return reinterpret_cast<float *>(scores) + rows * Work::TILE_KEYS + row;
    }
};

/* Where a lane finds the COUNT words of a tile that it reads, step(k) tokens after its `row`; the last tokens take the place of
 * those past the end. */
template <bool PAGED, class Values> struct ValuePlaces;
template <class Values> struct ValuePlaces<false, Values> {
    const KeyValueRows<false> &rows;
    const int row, byte;
    const char *base;
    uint32_t offset[Values::COUNT];

    __device__ __forceinline__ ValuePlaces(const KeyValueRows<false> &rows, int, int row, int byte)
        : rows(rows), row(row), byte(byte) {
        set_offsets(Values::TOKENS - 1);
    }
    __device__ __forceinline__ void set_offsets(int last) {
#pragma unroll
        for (int k = 0; k < Values::COUNT; ++k)
            offset[k] = lesser(Values::step(k) + row, last) * rows.value_stride + byte;
    }
    /* next: the tile that is gone to after it. */
    __device__ __forceinline__ void go_to(int first, int) {
        base = rows.value + static_cast<int64_t>(first) * rows.value_stride;
        const int last = rows.count - 1 - first;
        if (__builtin_expect(last < Values::TOKENS - 1, false)) set_offsets(last); /* no whole tile follows */
    }
    __device__ __forceinline__ const char *operator()(int k) const { return base + offset[k]; }
};
/* Lane l looks up token l, a tile ahead, and before values are loaded: who waits for it would wait for those, too. */
template <class Values> struct ValuePlaces<true, Values> {
    static constexpr int LOOKED_UP = round_up(Values::TOKENS, WAVE) / WAVE;
    const KeyValueRows<true> &rows;
    const int row, byte;
    KeyValueRows<true>::Tile::Place ahead[LOOKED_UP];
    const char *from[Values::COUNT];

    __device__ __forceinline__ ValuePlaces(const KeyValueRows<true> &rows, int first, int row, int byte)
        : rows(rows), row(row), byte(byte) {
        look_up(first);
    }
    __device__ __forceinline__ void look_up(int first) {
#pragma unroll
        for (int n = 0; n < LOOKED_UP; ++n) ahead[n] = rows.tile(first).place(lane(), n * WAVE);
    }
    __device__ __forceinline__ void go_to(int first, int next) {
        uint64_t token[LOOKED_UP];
#pragma unroll
        for (int n = 0; n < LOOKED_UP; ++n) token[n] = reinterpret_cast<uint64_t>(rows.tile(first).value(ahead[n], 0));
#pragma unroll
        for (int k = 0; k < Values::COUNT; ++k) {
            const int step = Values::step(k), lane = row + step % WAVE;
            const auto half = [&](int shift) {
                return static_cast<uint32_t>(from_lane(static_cast<int>(token[step / WAVE] >> shift), lane));
            };
            from[k] = reinterpret_cast<const char *>(uint64_t(half(32)) << 32 | half(0)) + byte;
        }
        look_up(next);
    }
    __device__ __forceinline__ const char *operator()(int k) const { return from[k]; }
};

/* Values of 32 columns on their way to the matrix unit, of the next TILES tiles of KEYS tokens. A lane reads, of every other
 * token, its column and the neighbour's, which reads the tokens between. */
template <int KEYS, int TILES> struct ValueColumns {
    static constexpr int TOKENS = KEYS, COUNT = KEYS / 4; /* words of a lane, in P's order, each of two tokens */
    using Rows = KeyValueRows<PAGED>;
    using Pair = std::conditional_t<FP8, uint16_t, uint32_t>; /* two columns */
    const Rows &rows;
    const int last, row;     /* last: token that is read; row: of a lane's first token */
    const bool exists;       /* are there such columns? */
    const uint32_t selector; /* of a column's two tokens, in the other lane's pair and in the own */
    ValuePlaces<PAGED, ValueColumns> places;
    Pair pair[TILES][COUNT];

    __device__ __forceinline__ ValueColumns(const Rows &rows, const Range &keys, int column)
        : rows(rows), last(keys.high - 1), row(lane() / 32 * 4 + lane() % 2), exists(column < VALUE_DIM),
          selector(selector_of(lane() % 2)), places(rows, keys.low, row, column / 2 * 2 * CACHED_BYTES) {
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
#pragma unroll
            for (int k = 0; k < COUNT; ++k) pair[n][k] = 0;
            go_to(keys.low + n * KEYS);
#pragma unroll
            for (int j = 0; j < KEYS / 16; ++j) load(n, j);
        }
    }
    /* Tokens from a lane's first one on. */
    static __device__ __forceinline__ constexpr int step(int k) { return k / 2 * 8 + k % 2 * 2; }

    /* To the tile from `tile` on; past the last token that is for nothing. */
    __device__ __forceinline__ void go_to(int tile) { places.go_to(lesser(tile, last), lesser(tile + KEYS, last)); }
    /* Of the j-th 16 tokens. */
    __device__ __forceinline__ void load(int n, int j) {
        if (VALUE_DIM % 32 != 0 && !exists) return;
#pragma unroll
        for (int k = 4 * j; k < 4 * j + 4; ++k) pair[n][k] = global_load<Pair>(places(k));
    }
    /* Other tokens were read instead of those that there are none of. */
    __device__ __forceinline__ void clear_rest(int n, int tile) {
        if (__builtin_expect(tile + KEYS > rows.count || WINDOW && tile < rows.begin, false))
#pragma unroll
            for (int k = 0; k < COUNT; ++k) pair[n][k] = rows.exists(tile + step(k) + row) ? pair[n][k] : 0;
    }
    __device__ __forceinline__ u32x4 operand(int n, int j) const {
        uint32_t word[4]; /* this lane's column */
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t own = pair[n][4 * j + i];
            word[i] = __builtin_amdgcn_perm(of_neighbour(own), own, selector);
        }
#if AITER_FP8_CACHE
        return elements_of(u32x2{word[0] | word[1] << 16, word[2] | word[3] << 16});
#else
        return {word[0], word[1], word[2], word[3]};
#endif
    }

  private:
    static __device__ __forceinline__ uint32_t selector_of(bool odd) {
        if (FP8) return odd ? 0x0c0c0105 : 0x0c0c0400;
        return odd ? 0x03020706 : 0x05040100;
    }
    /* Lanes 2 n and 2 n + 1 exchange. */
    static __device__ __forceinline__ uint32_t of_neighbour(uint32_t x) {
        return __builtin_amdgcn_mov_dpp(static_cast<int>(x), 0xb1 /* quad_perm:[1,0,3,2] */, 0xf, 0xf, true);
    }
};

template <class Loop> struct ScoredPieces {
    using Launch = typename Loop::Launch;
    using Work = typename Loop::Work;
    using Softmax = typename Loop::Softmax;
    using Scores = typename Loop::Scores;
    static constexpr int KEYS = Loop::KEYS, WAVE_ROWS = Loop::WAVE_ROWS, CHUNKS = Scores::VALUES / 4;
    using Products = TileProducts<HEAD_DIM, VALUE_DIM, KEYS, void>;
    using Columns = Accumulator<1, 32>;
    static_assert(Scores::SLOTS == 1 && Loop::TEAM == 1, "a lane has a row, a wave has all columns");

    /* Several blocks have a share of one task: of `shares` blocks the number of this one, and whose rows and keys it is for.
     * Blocks of all row tiles' same shares stand together, so that those of a KV head go to one chiplet. */
    template <class RowTile> struct Share : Work::template Task<RowTile> {
        int number;
        __device__ __forceinline__ Share(const Launch &launch, int shares)
            : Share(launch, shares, launch.work.row_tile(block()), launch.work.by_row_tiles.quotient(block())) {}
        __device__ __forceinline__ Share(const Launch &launch, int shares, int row_tile, int index)
            : Work::template Task<RowTile>(launch, Loop::place(launch, row_tile),
                                           row_tile + index / shares * launch.work.by_row_tiles.by),
              number(index % shares) {}
    };

    /* Some row sees each tile of the piece: all rows are one wave's. */
    template <class RowTile>
    static __device__ __forceinline__ void score_keys(const Launch &launch, const Score &score) {
        const Share<RowTile> share(launch, Work::TILES);
        const int first = share.piece.keys.low + share.number * KEYS, row = share.first_row;
        if (!share.exists() || first >= share.piece.keys.high) return;
        const auto &scored = share.sequence.scaled(score);
        typename Loop::Queries queries;
        Loop::load_queries(queries, launch, share, 0, row, scored.query_bits);
        const auto tile = share.sequence.keys.tile(first);
        typename KeyValueRows<PAGED>::Tile::Place place[KEYS / 32];
#pragma unroll
        for (int n = 0; n < KEYS / 32; ++n) place[n] = tile.place(lane() % 32, n * 32);
        auto products = read_ahead<Products::SCORE_PRODUCTS, 16>([&](int i) {
            const int n = i / Products::STEPS, chunk = i % Products::STEPS * 2 + lane() / 32;
            Eight k{};
            if (HEAD_DIM % 16 == 0 || chunk < HEAD_DIM / 8)
                k = global_load<Eight>(tile.key(place[n], chunk * static_cast<int>(sizeof(Eight))));
            return elements_of(k);
        });
        products.begin();
        Scores s;
        Products::multiply(products, queries, s, [](int) {});
        Loop::finish_scores(s, first, row, share.keys_of_all(row, WAVE_ROWS), share, scored);
        const float greatest = row_max(s.largest(0) * scored.unit);
        const ScoresOfTile<Work> to(launch.work, share.piece, share.number);
        if (!to.exists()) return;
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) l2_store(to.chunk(i), Work::chunk_of(s, 0, 4 * i));
        if (lane_leads_row()) l2_store(to.greatest(), greatest);
    }

    template <int WAVES> struct ExchangeOf { /* in shared memory, of two rounds' tiles */
        static constexpr int PLACES = 2 * WAVES;
        u32x4 p[PLACES][KEYS / 16][WAVE];
        /* Of each tile: what the output so far is to be multiplied by, the sum of P, the reference point after it. */
        float shrink[PLACES][WAVE], sum[PLACES][WAVE], maximum[PLACES][WAVE];
    };
    /* As many as keep up with wave 0, if values of as many tiles have registers and LDS has room for two blocks. */
    static constexpr int PROBABILITY_WAVES = KEYS <= 64 && 2 * sizeof(ExchangeOf<4>) <= SHARED_LIMIT ? 4 : 2;
    static constexpr int THREADS = (1 + PROBABILITY_WAVES) * WAVE;
    static constexpr int SHARES = Loop::Output::TILES; /* blocks of a piece */
    using Exchange = ExchangeOf<PROBABILITY_WAVES>;

    template <class RowTile>
    static __device__ __forceinline__ void sum_values(const Launch &launch, Exchange &exchange, const Score &score) {
        const Share<RowTile> share(launch, SHARES);
        if (share.exists()) {
            const auto &scored = share.sequence.scaled(score);
            Softmax softmax(scored.unit);
            if (wave() > 0) probabilities(launch.work, share, wave() - 1, exchange, softmax);
            else output(launch.work, share, exchange, softmax);
        }
        clear_rest(launch, blocks(), THREADS);
    }

    static int start(const Launch &launch, void (*score_keys)(Launch), void (*sum_values)(Launch), void *stream) {
        const int64_t pieces = launch.work.tasks;
        if (const int failed = aiter::launch(score_keys, pieces * Work::TILES, WAVE, 0, stream, launch)) return failed;
        return aiter::launch(sum_values, pieces * SHARES, THREADS, 0, stream, launch);
    }

  private:
    template <class Share>
    static __device__ __forceinline__ void probabilities(const Work &work, const Share &share, int own,
                                                         Exchange &exchange, Softmax &softmax) {
        const Range keys = share.piece.keys;
        if (keys.empty()) return;
        const int last = (keys.high - keys.low - 1) / KEYS; /* tile; past it, it is loaded once more for nothing */
        Scores next;                                        /* of this wave's tile of the round */
        float greatest[PROBABILITY_WAVES];                  /* of the round's tiles */
        const auto load = [&](int tile) {
#pragma unroll
            for (int i = 0; i < PROBABILITY_WAVES; ++i)
                greatest[i] = l2_load(ScoresOfTile<Work>(work, share.piece, lesser(tile + i, last)).greatest());
            const ScoresOfTile<Work> from(work, share.piece, lesser(tile + own, last));
#pragma unroll
            for (int i = 0; i < CHUNKS; ++i) Work::set_chunk(next, 0, 4 * i, l2_load(from.chunk(i)));
        };
        load(0);
        int place = own;
        for (int tile = 0; tile <= last; tile += PROBABILITY_WAVES) {
            Scores s = next;
            float shrink = 1.0f, maximum = softmax.maximum[0];
#pragma unroll
            for (int i = 0; i < PROBABILITY_WAVES; ++i) {
                const float before = softmax.maximum[0];
                softmax.maximum[0] = softmax.reference(0, greatest[i]);
                if (i == own) maximum = softmax.maximum[0], shrink = exp2(before - maximum);
            }
            load(tile + PROBABILITY_WAVES);
            keep_order();
            const float sum = s.exponentiate(0, softmax.scale, maximum);
#pragma unroll
            for (int j = 0; j < KEYS / 16; ++j) exchange.p[place][j][lane()] = round_operand(s, 0, j);
            exchange.shrink[place][lane()] = shrink;
            exchange.sum[place][lane()] = sum;
            exchange.maximum[place][lane()] = maximum;
            meet();
            place = place == own ? own + PROBABILITY_WAVES : own;
        }
    }

    /* What the tile from `first` on gives, n-th of those on their way and at `place` in the exchange. */
    template <class Values>
    static __device__ __forceinline__ void add(const Exchange &exchange, int place, Values &values, int n, int first,
                                               Softmax &softmax, Columns &o) {
        values.clear_rest(n, first);
        values.go_to(first + PROBABILITY_WAVES * KEYS);
        const float shrink = exchange.shrink[place][lane()];
        if (__builtin_expect(wave_any(shrink != 1.0f), false)) {
            o.multiply(0, shrink);
            softmax.sum[0] *= shrink;
        }
        softmax.sum[0] += exchange.sum[place][lane()];
        softmax.maximum[0] = exchange.maximum[place][lane()];
        u32x4 p[KEYS / 16];
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j) p[j] = exchange.p[place][j][lane()];
        auto products = read_ahead<KEYS / 16, 1>([&](int j) { return values.operand(n, j); });
        products.begin();
        Products::multiply(products, [&](int, int j) { return p[j]; }, o, [&](int j) { values.load(n, j); });
    }
    template <class Share>
    static __device__ __forceinline__ void output(const Work &work, const Share &share, Exchange &exchange,
                                                  Softmax &softmax) {
        const Range keys = share.piece.keys;
        Columns o;
        o.clear();
        if (!keys.empty()) {
            ValueColumns<KEYS, PROBABILITY_WAVES> values(share.sequence.keys, keys, share.number * 32 + lane() % 32);
            int place = 0, first = keys.low; /* place: in the exchange, of the round's first tile */
            for (; first + (PROBABILITY_WAVES - 1) * KEYS < keys.high; first += PROBABILITY_WAVES * KEYS) {
                meet();
#pragma unroll
                for (int i = 0; i < PROBABILITY_WAVES; ++i)
                    add(exchange, place + i, values, i, first + i * KEYS, softmax, o);
                place ^= PROBABILITY_WAVES;
            }
            if (first < keys.high) meet();
#pragma unroll
            for (int i = 0; i < PROBABILITY_WAVES - 1; ++i)
                if (first + i * KEYS < keys.high) add(exchange, place + i, values, i, first + i * KEYS, softmax, o);
        }
        const typename Work::DealtPart part(work, share.piece, 0);
        if (share.number == 0) part.leave(softmax);
#pragma unroll
        for (int i = 0; i < Columns::VALUES / 4; ++i)
            part.leave(share.number * (Columns::VALUES / 4) + i, Work::chunk_of(o, 0, 4 * i));
    }
};

} // namespace aiter

#endif
