/* Few query rows on AMD CDNA: keys and values stream from global memory through registers into the matrix unit. Nothing
 * of them goes through shared memory, and no wave waits for another. Implements the interface described in
 * attention_decode.hip.
 *
 * Everything is computed transposed, as in arch/gfx9_tiles.h, but in 16x16 tiles of MFMA: S^T = K Q^T, O^T = V^T P^T.
 * With m = lane % 16 and g = lane / 16, accumulator register r of a tile is row 4 g + r, column m; an operand is row
 * (or column) m and a run of the contraction that begins with 4 g (gfx950: 8 g). So, for a tile of 32 tokens in halves
 * n:
 *
 *   K   a lane loads 16-byte chunks 4 j + g of tokens 16 n + m: each 8 dimensions of an operand, two of 16x16x16
 *   Q   the same chunks of row m
 *   S   register r of half n: token 16 n + 4 g + r, query row m. Rounded, these are the operand P^T as they stand
 *   V   a lane loads the same 8 dimensions (a wide piece, 128 in all) or 4 (a narrow piece, 64 in all) of its eight
 *       tokens 16 n + 4 g + i. Element e of them, for four tokens, is the operand V^T of an MFMA whose 16 rows are the
 *       dimensions 8 m + e: bytes change places within the lane, and that is all the transposing there is.
 *   O   register r of MFMA e: dimension 8 (4 g + r) + e of row m
 *
 * The loads of the next K tile start when S has used this one, those of V when O has: a wave always has one of the two
 * on its way, 8 KB at head_dim 128, and a CU 64 KB or more (304 CUs at 5.3 TB/s with 1 us of latency ask for 17). */
#ifndef AITER_GPU_ARCH_GFX9_DECODE_H
#define AITER_GPU_ARCH_GFX9_DECODE_H

#include "gpu/arch.h"
#include "gpu/sequence.h"

namespace aiter {

typedef float f32x4 __attribute__((ext_vector_type(4)));

/* tile += A * B; a lane's operands for one 16x16x16 (eight bytes) or for 32 places of the contraction (16 bytes). */
__device__ __forceinline__ f32x4 multiply_add(u32x2 a, u32x2 b, f32x4 tile) {
#if defined(AITER_DTYPE_BF16)
    return __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(__builtin_bit_cast(i16x4, a), __builtin_bit_cast(i16x4, b), tile,
                                                     0, 0, 0);
#else
    return __builtin_amdgcn_mfma_f32_16x16x16f16(__builtin_bit_cast(f16x4, a), __builtin_bit_cast(f16x4, b), tile, 0, 0,
                                                 0);
#endif
}
__device__ __forceinline__ f32x4 multiply_add(u32x4 a, u32x4 b, f32x4 tile) {
#if defined(__gfx950__) && defined(AITER_DTYPE_BF16)
    return __builtin_amdgcn_mfma_f32_16x16x32_bf16(__builtin_bit_cast(bf16x8, a), __builtin_bit_cast(bf16x8, b), tile,
                                                   0, 0, 0);
#elif defined(__gfx950__)
    return __builtin_amdgcn_mfma_f32_16x16x32_f16(__builtin_bit_cast(f16x8, a), __builtin_bit_cast(f16x8, b), tile, 0,
                                                  0, 0);
#else
    return multiply_add(a.zw, b.zw, multiply_add(a.xy, b.xy, tile));
#endif
}

template <int HEAD_DIM> struct DecodeQueries {
    static constexpr int STEPS = round_up(HEAD_DIM, 32) / 32;
    u32x4 operand[STEPS];

    template <class RowPointer> __device__ __forceinline__ void load(SharedAddress, RowPointer row, QueryBits bits) {
        const Element *source = row(lane() % 16);
        u32x4 chunk[STEPS] = {};
        if (source != nullptr)
#pragma unroll
            for (int j = 0; j < STEPS; ++j)
                chunk[j] = *reinterpret_cast<const u32x4 *>(source + 8 * lesser(4 * j + lane() / 16, HEAD_DIM / 8 - 1));
        /* opaque waits for them here: or the loop over the tiles would, in each round, for all that is on its way. */
#pragma unroll
        for (int j = 0; j < STEPS; ++j)
            operand[j] =
                opaque(4 * j + lane() / 16 < HEAD_DIM / 8 ? chunk[j] & bits.keep ^ bits.flip : u32x4{0, 0, 0, 0});
    }
};

struct DecodeScores {
    static constexpr int SLOTS = 1, VALUES = 8;
    f32x4 half[2];
    __device__ __forceinline__ float get(int, int i) const { return half[i / 4][i % 4]; }
    __device__ __forceinline__ void set(int, int i, float x) { half[i / 4][i % 4] = x; }
    __device__ __forceinline__ float largest(int) const {
        float x = get(0, 0);
#pragma unroll
        for (int i = 1; i < VALUES; ++i) x = __builtin_fmaxf(x, get(0, i));
        return x;
    }
    __device__ __forceinline__ float exponentiate(int, float scale, float reference) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            set(0, i, exp2(__builtin_fmaf(get(0, i), scale, -reference)));
            sum += get(0, i);
        }
        return sum;
    }
    static __device__ constexpr int column(int i) { return i / 4 * 16 + i % 4; }
    static __device__ __forceinline__ int lane_column() { return lane() / 16 * 4; }
};

template <int HEAD_DIM> struct DecodeOutput {
    static constexpr int REST = HEAD_DIM % 128;
    static constexpr int WIDE = HEAD_DIM / 128 + (REST > 64), NARROW = REST > 0 && REST <= 64;
    static constexpr int TILES = 8 * WIDE + 4 * NARROW;
    static constexpr int SLOTS = 1, VALUES = 4 * TILES;
    f32x4 tile[TILES];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int n = 0; n < TILES; ++n) tile[n] = f32x4{0, 0, 0, 0};
    }
    /* Values in the order of their dimensions: piece, register, element. */
    static constexpr int in_piece(int i) { return i % 32; }
    static constexpr int elements(int i) { return i / 32 < WIDE ? 8 : 4; } /* of a lane's piece */
    static constexpr int tile_of(int i) { return i / 32 * 8 + in_piece(i) % elements(i); }
    static constexpr int register_of(int i) { return in_piece(i) / elements(i); }
    __device__ __forceinline__ float get(int, int i) const { return tile[tile_of(i)][register_of(i)]; }
    __device__ __forceinline__ void set(int, int i, float x) { tile[tile_of(i)][register_of(i)] = x; }
    __device__ __forceinline__ void multiply(int, float factor) {
#pragma unroll
        for (int n = 0; n < TILES; ++n) tile[n] *= factor;
    }
    static __device__ __forceinline__ int row(int) { return lane() % 16; }
    static __device__ __forceinline__ int column_of_lane(int i) {
        return i / 32 * 128 + elements(i) * (lane() / 16 * 4) + in_piece(i);
    }
};

template <int HEAD_DIM, int VALUE_DIM> struct Decode {
    static constexpr int ROWS = 16;
    static constexpr int LANES = 4, RUN = 4;
    static constexpr int KEYS = 32;
    static constexpr int WAVES = 4, TEAM = team_of(VALUE_DIM), COLUMNS = columns_of_wave(VALUE_DIM, TEAM);
    static constexpr int BLOCKS = greater(HEAD_DIM, VALUE_DIM) <= 128 ? 2 : 1;
    using Scores = DecodeScores;
    using Output = DecodeOutput<COLUMNS>;
    using Queries = DecodeQueries<HEAD_DIM>;
    static __device__ __forceinline__ bool leads_row() { return lane() < 16; }
};

template <int HEAD_DIM, int VALUE_DIM, class Rows> struct KeyValueStream {
    static constexpr int SHARED_BYTES = 0;
    static constexpr bool COOPERATIVE = false;
    using Shape = Decode<HEAD_DIM, VALUE_DIM>;
    using Output = typename Shape::Output;
    static constexpr int KEYS = Shape::KEYS;
    static constexpr int STEPS = DecodeQueries<HEAD_DIM>::STEPS;
    static constexpr int WIDE = Output::WIDE, NARROW = Output::NARROW;
    using Place = typename Rows::Tile::Place;

    const Rows &rows;
    int stride;          /* from one tile of this wave to its next, in tokens */
    int current, coming; /* first token of the tile in use, and of the one on its way */
    Place place, next;   /* of token `coming + lane % 32`, and of the one a tile further: looked up a tile ahead */
    Eight key[2][STEPS];
    Eight wide[WIDE + 1][2][4]; /* one more than there are: an array of none is not C++ */
    Four narrow[NARROW + 1][2][4];

    __device__ __forceinline__ KeyValueStream(SharedAddress, const Rows &rows, int first, int group, int groups)
        : rows(rows), stride(groups * KEYS), coming(first + group * KEYS) {
        next = look_up(coming);
        issue_keys();
        issue_values();
    }
    __device__ __forceinline__ SharedAddress query_memory() const { return 0; }

    /* Past the end of the rows all tokens are the last one, and cost one line of memory. */
    __device__ __forceinline__ typename Rows::Tile tile(int first) const {
        return rows.tile(lesser(first, rows.count - 1));
    }
    __device__ __forceinline__ Place look_up(int first) const { return tile(first).place(lane() % KEYS, 0); }

    __device__ __forceinline__ void issue_keys() {
        place = next;
        next = look_up(coming + stride); /* first: loads arrive in order, and it is needed before the keys */
        const auto source = tile(coming);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const auto at = source.place_of_lane(place, lane() % 16, 16 * n);
#pragma unroll
            for (int j = 0; j < STEPS; ++j) {
                const int chunk = lesser(4 * j + lane() / 16, HEAD_DIM / 8 - 1);
                key[n][j] = *reinterpret_cast<const Eight *>(source.key(at, 8 * CACHED_BYTES * chunk));
            }
        }
    }
    /* Where this lane's `count` columns of a piece that begins with column `begin` stand; past the last, those. */
    template <int COUNT> static __device__ __forceinline__ int value_byte(int begin) {
        const int own = Shape::TEAM == 1 ? 0 : wave() % Shape::TEAM * Shape::COLUMNS;
        const int last = (VALUE_DIM - own - begin) / COUNT - 1; /* may be negative: the piece is nobody's */
        return CACHED_BYTES * (own + begin) + CACHED_BYTES * COUNT * lesser(lane() % 16, last);
    }
    __device__ __forceinline__ void issue_values() {
        const auto source = tile(coming);
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const auto at = source.place_of_lane(place, lane() / 16 * 4, 16 * n + i);
#pragma unroll
                for (int p = 0; p < WIDE; ++p)
                    wide[p][n][i] = *reinterpret_cast<const Eight *>(source.value(at, value_byte<8>(128 * p)));
                if constexpr (NARROW != 0)
                    narrow[0][n][i] = *reinterpret_cast<const Four *>(source.value(at, value_byte<4>(128 * WIDE)));
            }
    }

    __device__ __forceinline__ void advance() {}

    __device__ __forceinline__ void scores(const DecodeQueries<HEAD_DIM> &queries, DecodeScores &s, bool more) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            s.half[n] = f32x4{0, 0, 0, 0};
#pragma unroll
            for (int j = 0; j < STEPS; ++j) {
                u32x4 k = elements_of(key[n][j]);
                if (4 * j + 4 > HEAD_DIM / 8 && 4 * j + lane() / 16 >= HEAD_DIM / 8) k = u32x4{0, 0, 0, 0};
                s.half[n] = multiply_add(k, queries.operand[j], s.half[n]);
            }
        }
        current = coming;
        coming += stride;
        if (more) issue_keys();
    }

    /* The halves' eight tokens of element pair h, and which of the pair: an operand of V^T. */
    template <class Piece> static __device__ __forceinline__ u32x4 transposed(const Piece (&v)[2][4], int h, int odd) {
        return u32x4{join_halves(v[0][0][h], v[0][1][h], odd), join_halves(v[0][2][h], v[0][3][h], odd),
                     join_halves(v[1][0][h], v[1][1][h], odd), join_halves(v[1][2][h], v[1][3][h], odd)};
    }

    __device__ __forceinline__ void accumulate(const DecodeScores &s, Output &o, bool more) {
        if (current + KEYS > rows.count || WINDOW && current < rows.begin) { /* other values must be zeros */
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (!rows.exists(current + 16 * n + lane() / 16 * 4 + i)) {
#pragma unroll
                        for (int p = 0; p < WIDE; ++p) wide[p][n][i] = Eight{};
                        if constexpr (NARROW != 0) narrow[0][n][i] = Four{};
                    }
        }
        const u32x4 p = round_operand(s, 0, 0);
        u32x4 eights[WIDE + 1][2][4];
        u32x2 fours[2][4];
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int piece = 0; piece < WIDE; ++piece) eights[piece][n][i] = elements_of(wide[piece][n][i]);
                if constexpr (NARROW != 0) fours[n][i] = elements_of(narrow[0][n][i]);
            }
#pragma unroll
        for (int n = 0; n < Output::TILES; ++n) {
            const int e = n % 8;
            const u32x4 v = n / 8 < WIDE ? transposed(eights[n / 8], e / 2, e % 2) : transposed(fours, e / 2, e % 2);
            o.tile[n] = multiply_add(v, p, o.tile[n]);
        }
        if (more) issue_values();
    }
};

} // namespace aiter

#endif
