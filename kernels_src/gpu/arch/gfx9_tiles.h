/* Matrices on AMD CDNA: the second half of arch/gfx9.h.
 *
 * Everything is computed transposed. Scores: S^T = K Q^T, output: O^T = V^T P^T, both in 32x32 tiles of MFMA. A lane of
 * the 64 then holds one query row (lane % 32), and 16 of 32 keys or dimensions (half = lane / 32 picks which):
 *
 *     accumulator register r  <->  column 8 * (r / 4) + 4 * half + r % 4
 *
 * The B operand P^T of the second product wants, per lane, one query row and a run of keys: the registers that the
 * first product left behind, once converted to 16 bit. P never leaves its registers. All operands follow one rule, "a
 * lane holds 8 consecutive places of the contraction, of its half":
 *   K, Q   places are dimensions: chunk 2 J + half of 16 bytes, for each 16 dimensions J
 *   P      places are keys in accumulator order, so registers 8 J ... 8 J + 7
 *   V^T    stored in shared memory transposed, [dimension][key], with keys in the order P has them: the groups of four
 *          keys numbered (J, a, half) are stored at (J, half, a)
 * which is one operand of gfx950's 32x32x16 MFMA, or two of the 32x32x8 one. (Layouts: AMD's matrix instruction
 * calculator; they are tested against the emulator in tests/emulator.)
 *
 * A thread copies 16 bytes (8 dimensions) of four neighbouring keys: global loads to registers while the tile before is
 * in use, then to shared memory; the 4 x 8 block of V is transposed in registers by byte permutes on the way. */
#ifndef AITER_GPU_ARCH_GFX9_TILES_H
#define AITER_GPU_ARCH_GFX9_TILES_H

#include "gpu/arch.h"
#include "gpu/arch/gfx9.h"

namespace aiter {

#if defined(AITER_DTYPE_BF16)
typedef bf16x8 Operand8;
typedef i16x4 Operand4;
#else
typedef f16x8 Operand8;
typedef f16x4 Operand4;
#endif

/* tile += A * B over 16 places of the contraction: a lane's eight of A and its eight of B. */
__device__ __forceinline__ f32x16 multiply_add(u32x4 a, u32x4 b, f32x16 tile) {
#if defined(__gfx950__)
    const Operand8 a8 = __builtin_bit_cast(Operand8, a), b8 = __builtin_bit_cast(Operand8, b);
#if defined(AITER_DTYPE_BF16)
    return __builtin_amdgcn_mfma_f32_32x32x16_bf16(a8, b8, tile, 0, 0, 0);
#else
    return __builtin_amdgcn_mfma_f32_32x32x16_f16(a8, b8, tile, 0, 0, 0);
#endif
#else
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        /* Named vectors: clang's bit_cast of a swizzle (a.zw) takes the first elements, whichever are named. */
        const u32x2 a2 = {a[2 * half], a[2 * half + 1]}, b2 = {b[2 * half], b[2 * half + 1]};
        const Operand4 a4 = __builtin_bit_cast(Operand4, a2), b4 = __builtin_bit_cast(Operand4, b2);
#if defined(AITER_DTYPE_BF16)
        tile = __builtin_amdgcn_mfma_f32_32x32x8bf16_1k(a4, b4, tile, 0, 0, 0);
#else
        tile = __builtin_amdgcn_mfma_f32_32x32x8f16(a4, b4, tile, 0, 0, 0);
#endif
    }
    return tile;
#endif
}

/* Reads of operands from LDS that are on their way while products run: as many as cover its latency, which on gfx942 is
 * half of that of the others. */
#if defined(AITER_GFX942)
constexpr int READS_AHEAD = 2;
#else
constexpr int READS_AHEAD = 4;
#endif

/* COUNT products, each with an operand that read(i) loads from LDS some products before multiply(i, operand) uses it:
 * the first AHEAD in begin(). Left to itself the compiler reads an operand right before its product and waits. */
template <int COUNT, int READS, class Read> struct ReadAhead {
    static constexpr int PRODUCTS = COUNT, AHEAD = lesser(READS, COUNT);
    static constexpr int MAY_PASS = 0x002 | 0x004 | 0x400; /* vector, scalar, transcendental */
    Read read;
    u32x4 operand[COUNT];

    __device__ __forceinline__ explicit ReadAhead(Read read) : read(read) {}
    __device__ __forceinline__ void begin() {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) begin(i);
    }
    __device__ __forceinline__ void begin(int i) { operand[i] = read(i); }
    template <class Multiply> __device__ __forceinline__ void run(Multiply multiply) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (i + AHEAD < COUNT) operand[i + AHEAD] = read(i + AHEAD);
            __builtin_amdgcn_sched_barrier(MAY_PASS);
            multiply(i, operand[i]);
        }
    }
};
template <int COUNT, int READS, class Read>
__device__ __forceinline__ ReadAhead<COUNT, READS, Read> read_ahead(Read read) {
    return ReadAhead<COUNT, READS, Read>(read);
}

/* What is done beside PRODUCTS products, before the i-th of them: of COUNT things f(k) those that are due, when they are
 * spread over all, or when each waits for the last that leaves the others one of their own. */
template <int PRODUCTS, int COUNT, class F> __device__ __forceinline__ void spread(int i, F f) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k)
        if (k * PRODUCTS / COUNT == i) f(k);
}
template <int PRODUCTS, int COUNT, class F> __device__ __forceinline__ void at_last(int i, F f) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k)
        if (greater(PRODUCTS - COUNT + k, 0) == i) f(k);
}

template <int ROW_TILES, int COLUMNS> struct Accumulator {
    static constexpr int SLOTS = ROW_TILES;
    static constexpr int TILES = round_up(COLUMNS, 32) / 32;
    static constexpr int VALUES = TILES * 16;
    static constexpr int EIGHT_FURTHER = 4; /* values from one column to that eight further */
    static constexpr bool SLOTS_IN_PAIRS = false;
    f32x16 tile[ROW_TILES][TILES];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
            for (int n = 0; n < TILES; ++n) tile[m][n] = f32x16(0.0f);
    }
    __device__ __forceinline__ float get(int slot, int i) const { return tile[slot][i / 16][i % 16]; }
    __device__ __forceinline__ void set(int slot, int i, float x) { tile[slot][i / 16][i % 16] = x; }

    __device__ __forceinline__ float largest(int slot) const {
        float x = get(slot, 0);
#pragma unroll
        for (int i = 1; i < VALUES; ++i) x = __builtin_fmaxf(x, get(slot, i));
        return x;
    }
    __device__ __forceinline__ void multiply(int slot, float factor) {
#pragma unroll
        for (int i = 0; i < VALUES; ++i) set(slot, i, get(slot, i) * factor);
    }
    /* One by one: packed fp32 (v_pk_fma_f32) takes as long and may not run beside a matrix instruction. The build keeps
     * the compiler from packing what is written apart. */
    __device__ __forceinline__ float exponentiate(int slot, float scale, float reference) {
        float sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            const float p = exp2(__builtin_fmaf(get(slot, i), scale, -reference));
            set(slot, i, p);
            sum[i % 2] += p;
        }
        return sum[0] + sum[1];
    }
    static __device__ __forceinline__ int row(int slot) { return slot * 32 + (lane() & 31); }
    static __device__ constexpr int column(int i) { return i / 16 * 32 + i % 16 / 4 * 8 + i % 4; }
    static __device__ __forceinline__ int lane_column() { return lane() / 32 * 4; }
};

template <int HEAD_DIM, int ROW_TILES, int TEAM = 1> struct Query {
    static constexpr int STEPS = round_up(HEAD_DIM, 16) / 16;
    static constexpr int SHARED_BYTES = 0;
    u32x4 operand[ROW_TILES][STEPS];

    template <class RowPointer> __device__ __forceinline__ void load(SharedAddress, RowPointer row, QueryBits bits) {
        const int half = lane() / 32;
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
            const Element *source = row(m * 32 + (lane() & 31));
            u32x4 chunk[STEPS] = {};
            if (source != nullptr) {
#pragma unroll
                for (int j = 0; j < STEPS; ++j)
                    if (16 * j + 8 < HEAD_DIM || half == 0) chunk[j] = global_load<u32x4>(source + 16 * j + 8 * half);
            }
#pragma unroll
            for (int j = 0; j < STEPS; ++j) operand[m][j] = chunk[j] & bits.keep ^ bits.flip;
        }
    }
};

/* Straight from the registers, four dimensions (8 bytes) at a time: the two lanes of a row fill 16 bytes together, and
 * the L2 cache puts lines together. */
template <int WIDTH, int ROW_TILES, int COLUMNS, class RowPointer>
__device__ __forceinline__ void store_output(const Accumulator<ROW_TILES, COLUMNS> &o, SharedAddress, RowPointer row,
                                             int first_column = 0) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
        Element *to = row(o.row(m));
        if (to != nullptr)
#pragma unroll
            for (int i = 0; i < lesser(WIDTH, COLUMNS) / 2; i += 4) {
                if (first_column + o.column(i) >= WIDTH) break;
                global_store(
                    to + first_column + o.lane_column() + o.column(i),
                    u32x2{to_elements(o.get(m, i), o.get(m, i + 1)), to_elements(o.get(m, i + 2), o.get(m, i + 3))});
            }
    }
}

/* A tile of KEYS rows of COLUMNS elements, transposed: in shared memory [column][row], for operands that are columns.
 * */
template <int COLUMNS, int KEYS> struct TransposedLayout {
    static constexpr int CHUNKS = round_up(COLUMNS, 32) / 8; /* of 16 bytes in a row: whole MFMA tiles */
    static constexpr int BYTES = CHUNKS * 8 * KEYS * 2;

    /* A row of KEYS elements for each dimension, permuted so that neither neighbouring dimensions (reads) nor those 8
     * apart (the transposed stores) meet in a bank. Of two terms the first tells the former apart, the second the
     * latter. */
    static __host__ __device__ constexpr uint32_t offset(int dimension, int chunk) {
        const int d = dimension;
#if defined(AITER_GFX950)
        /* reads find 64 banks, stores 32 */
        const int turn = KEYS >= 128  ? d % 16 ^ d / 16 % 4 * 2 ^ d / 8 % 2
                         : KEYS == 64 ? d / 2 % 8 ^ (d / 8 % 4 * 2 + d / 32 % 2)
                                      : d / 4 % 4 ^ (d / 16 % 4 * 4 + d / 32 % 2);
#else
        const int turn = KEYS >= 64 ? d % 8 ^ d / 8 % 8 : d / 2 % 4 ^ (d / 16 % 2 + d / 8 % 2 * 2 + d / 32 % 2 * 4);
#endif
        return static_cast<uint32_t>(((d * (KEYS / 8) + chunk) ^ turn) << 4);
    }
};

/* How threads copy a tile of KEYS rows that have CHUNKS pieces of 16 bytes: in units, one piece of four neighbouring
 * keys. Eight lanes take one line of a row, so that global loads are whole 128-byte lines; the next eight the group in
 * the other half of the same 16 bytes of V^T, so that the transposed 8-byte stores of 16 lanes fill all banks. */
template <int CHUNKS, int KEYS> struct CopyUnits {
    static constexpr int LANE_CHUNKS = 8; /* neighbouring chunks copied by neighbouring lanes */
    static constexpr int GROUPS = KEYS / 4;
    static constexpr int COUNT = round_up(CHUNKS, LANE_CHUNKS) * GROUPS;
    /* Chunk of a unit, the place of its group of four keys in V^T, and the first of these. */
    static __device__ __forceinline__ int chunk(int unit) {
        return unit % LANE_CHUNKS + unit / (LANE_CHUNKS * GROUPS) * LANE_CHUNKS;
    }
    static __device__ __forceinline__ int place(int unit) { return unit / LANE_CHUNKS % GROUPS; }
    static __device__ __forceinline__ int key(int unit) { /* (J, half, a) -> first key of (J, a, half) */
        const int p = place(unit);
        return (p & ~3) * 4 + (p & 1) * 8 + (p & 2) * 2;
    }
};

/* Four rows of 16 bytes, and where they go in shared memory: as they are, or transposed. Addresses in shared memory are
 * one register for each place of a thread; the rest of them are constants that are added or, in the bits that the
 * layouts permute, exclusive-ored. Opaque, for else the compiler keeps every sum. */
template <int COLUMNS, class Rows>
__device__ __forceinline__ void store_rows(SharedAddress first_row, const Rows (&four)[4]) {
    const SharedAddress to = opaque(first_row);
#pragma unroll
    for (int k = 0; k < 4; ++k) shared_store(further(to, RowLayout<COLUMNS>::chunk(k, 0)), elements_of(four[k]));
}
template <int COLUMNS, int KEYS, class Rows>
__device__ __forceinline__ void store_transposed(SharedAddress first_column, const Rows (&rows)[4]) {
    const SharedAddress to = opaque(first_column);
    const u32x4 four[4] = {elements_of(rows[0]), elements_of(rows[1]), elements_of(rows[2]), elements_of(rows[3])};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const u32x2 column = {join_halves(four[0][i / 2], four[1][i / 2], i % 2),
                              join_halves(four[2][i / 2], four[3][i / 2], i % 2)};
        shared_store(further(to, TransposedLayout<COLUMNS, KEYS>::offset(i, 0)), column);
    }
}

/* Scores, or what they have become, of 16 neighbouring columns as the operand of a second product: they stay where they
 * are. */
template <class Scores> __device__ __forceinline__ u32x4 round_operand(const Scores &s, int slot, int step) {
    u32x4 p;
#pragma unroll
    for (int i = 0; i < 4; ++i) p[i] = to_elements(s.get(slot, 8 * step + 2 * i), s.get(slot, 8 * step + 2 * i + 1));
    return p;
}

/* A tile of keys and values in shared memory whose layouts permute chunks; V is transposed. */
template <int HEAD_DIM, int VALUE_DIM, int KEYS> struct PermutedTile {
    using ValueLayout = TransposedLayout<VALUE_DIM, KEYS>;
    static constexpr int KEY_BYTES = KEYS * RowLayout<HEAD_DIM>::BYTES, VALUE_BYTES = ValueLayout::BYTES;

    /* From where on this lane reads operands: of the n-th 32 keys and the j-th 16 dimensions, of the n-th 32 dimensions
     * and the j-th 16 keys. */
    static __device__ __forceinline__ SharedAddress keys(SharedAddress tile) {
        return opaque(tile + RowLayout<HEAD_DIM>::chunk(lane() & 31, lane() / 32));
    }
    static __device__ __forceinline__ u32x4 key(SharedAddress from, int n, int j) {
        return shared_load<u32x4>(further(from, RowLayout<HEAD_DIM>::chunk(n * 32, 2 * j)));
    }
    static __device__ __forceinline__ SharedAddress values(SharedAddress tile, int first_column) {
        return opaque(tile + ValueLayout::offset(lane() & 31, lane() / 32) + first_column * KEYS * 2);
    }
    static __device__ __forceinline__ u32x4 value(SharedAddress from, int n, int j) {
        return shared_load<u32x4>(further(from, ValueLayout::offset(n * 32, 2 * j)));
    }

    /* What a thread copies of the keys or of the values: a chunk of four neighbouring rows. */
    template <bool VALUES, int THREADS> struct Part {
        static constexpr int CHUNKS = VALUES ? ValueLayout::CHUNKS : round_up(HEAD_DIM, 16) / 8;
        using Units = CopyUnits<CHUNKS, KEYS>;
        static constexpr int LANES = Units::COUNT / Units::GROUPS; /* that copy chunks of one row */
        static constexpr int APART = 1, ROWS = 4;
        static_assert(Units::COUNT <= THREADS, "one unit for a thread");
        const int unit, chunk, row;
        __device__ __forceinline__ explicit Part(int thread)
            : unit(thread), chunk(Units::chunk(thread)), row(Units::key(thread)) {}
        __device__ __forceinline__ bool exists() const {
            return (Units::COUNT == THREADS || unit < Units::COUNT) && (LANES == CHUNKS || chunk < CHUNKS);
        }
        __device__ __forceinline__ SharedAddress place(SharedAddress tile) const {
            if (!VALUES) return opaque(tile + RowLayout<HEAD_DIM>::chunk(row, chunk));
            const int group = Units::place(unit);
            return opaque(tile + KEY_BYTES + ValueLayout::offset(chunk * 8, group / 2) + group % 2 * 8);
        }
        /* The k-th quarter of it, of keys a row; `to` is its place. */
        __device__ __forceinline__ void store(SharedAddress to, const Eight (&piece)[ROWS], int k) const {
            if constexpr (VALUES) {
                const u32x4 four[4] = {elements_of(piece[0]), elements_of(piece[1]), elements_of(piece[2]),
                                       elements_of(piece[3])};
#pragma unroll
                for (int i = 2 * k; i < 2 * k + 2; ++i)
                    shared_store(
                        further(to, ValueLayout::offset(i, 0)),
                        u32x2{join_halves(four[0][k], four[1][k], i % 2), join_halves(four[2][k], four[3][k], i % 2)});
            } else {
                shared_store(further(to, RowLayout<HEAD_DIM>::chunk(k, 0)), elements_of(piece[k]));
            }
        }
    };
};

/* The two products with a tile. */
template <int HEAD_DIM, int VALUE_DIM, int KEYS, class Layout, int READS = READS_AHEAD> struct TileProducts {
    static constexpr int STEPS = round_up(HEAD_DIM, 16) / 16; /* of the contraction of S */
    static constexpr int SCORE_PRODUCTS = KEYS / 32 * STEPS;
    static_assert(KEYS % 32 == 0, "whole MFMA tiles");

    /* begin() of what these return reads the first operands, run() makes the products; before(i) is called before the
     * i-th. */
    static __device__ __forceinline__ auto scores(SharedAddress key_tile) {
        const SharedAddress from = Layout::keys(key_tile);
        return read_ahead<SCORE_PRODUCTS, READS>([=](int i) { return Layout::key(from, i / STEPS, i % STEPS); });
    }
    template <class Products, int ROW_TILES, int TEAM, class Before>
    static __device__ __forceinline__ void multiply(Products &products, const Query<HEAD_DIM, ROW_TILES, TEAM> &query,
                                                    Accumulator<ROW_TILES, KEYS> &s, Before before) {
        s.clear();
        products.run([&](int i, u32x4 k) {
            const int n = i / STEPS, j = i % STEPS;
            before(i);
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) s.tile[m][n] = multiply_add(k, query.operand[m][j], s.tile[m][n]);
        });
    }

    /* The columns of V from first_column on, as many as `o` has: all of them, or a multiple of 64, after which the
     * permutation repeats. */
    template <class Output> struct Columns {
        static constexpr int COLUMNS = Output::TILES * 32, COUNT = KEYS / 16 * Output::TILES;
        static constexpr bool WHOLE = COLUMNS >= VALUE_DIM || VALUE_DIM % COLUMNS == 0; /* in every wave of a team */
        static __device__ __forceinline__ bool exists(int first_column, int i) {
            return WHOLE || first_column + i % Output::TILES * 32 < VALUE_DIM;
        }
    };
    template <class Output>
    static __device__ __forceinline__ auto outputs(SharedAddress value_tile, int first_column = 0) {
        const SharedAddress from = Layout::values(value_tile, first_column);
        return read_ahead<Columns<Output>::COUNT, READS>([=](int i) {
            constexpr int TILES = Output::TILES;
            return Columns<Output>::exists(first_column, i) ? Layout::value(from, i % TILES, i / TILES) : u32x4{};
        });
    }
    /* probabilities(slot, j): of the j-th 16 keys, as an operand. */
    template <class Products, class Probabilities, int ROW_TILES, int COLUMNS, class Before>
    static __device__ __forceinline__ void multiply(Products &products, Probabilities probabilities,
                                                    Accumulator<ROW_TILES, COLUMNS> &o, Before before,
                                                    int first_column = 0) {
        using Output = Accumulator<ROW_TILES, COLUMNS>;
        u32x4 p[ROW_TILES];
        products.run([&](int i, u32x4 v) {
            const int j = i / Output::TILES, n = i % Output::TILES;
            before(i);
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
                if (n == 0) p[m] = probabilities(m, j);
                if (Columns<Output>::exists(first_column, i)) o.tile[m][n] = multiply_add(v, p[m], o.tile[m][n]);
            }
        });
    }
};

template <int HEAD_DIM, int VALUE_DIM, int KEYS, int THREADS> struct KeyValueTile {
    using Layout = PermutedTile<HEAD_DIM, VALUE_DIM, KEYS>;
    using Products = TileProducts<HEAD_DIM, VALUE_DIM, KEYS, Layout>;
    using ValueLayout = typename Layout::ValueLayout;
    static constexpr int PRODUCTS = Products::SCORE_PRODUCTS;
    static constexpr int KEY_CHUNKS = Products::STEPS * 2, VALUE_CHUNKS = ValueLayout::CHUNKS; /* that products read */
    using Units = CopyUnits<greater(KEY_CHUNKS, VALUE_CHUNKS), KEYS>;
    static constexpr int COPIES = round_up(Units::COUNT, THREADS) / THREADS;
    static constexpr bool EVEN = Units::COUNT % THREADS == 0;
    static constexpr int UNIT_CHUNKS = Units::COUNT / Units::GROUPS;
    static constexpr int KEY_BYTES = Layout::KEY_BYTES, SHARED_BYTES = KEY_BYTES + Layout::VALUE_BYTES;
    /* Every thread has as much to copy, and knows where from without asking memory. */
    static constexpr bool ISSUES_WITH_SCORES =
        !PAGED && EVEN && UNIT_CHUNKS == HEAD_DIM / 8 && UNIT_CHUNKS == VALUE_DIM / 8;
    static_assert(!ISSUES_WITH_SCORES || PRODUCTS % (COPIES * 4) == 0, "as many products before each load");

    SharedAddress key_tile, value_tile;
    int thread;
    int begin, end;                         /* tokens of the tile on its way that exist, in the tile */
    Eight key[COPIES][4], value[COPIES][4]; /* on their way */

    __device__ __forceinline__ KeyValueTile(SharedAddress shared, int thread)
        : key_tile(shared), value_tile(shared + KEY_BYTES), thread(thread) {}

    template <class Rows> __device__ __forceinline__ void issue(const Rows &rows, int first) {
        expect(rows, first);
        const auto tile = rows.tile(first);
#pragma unroll
        for (int copy = 0; copy < COPIES; ++copy)
#pragma unroll
            for (int k = 0; k < 4; ++k) load(tile, copy, k);
    }
    template <class Rows> __device__ __forceinline__ void expect(const Rows &rows, int first) {
        end = rows.count - first;
        begin = WINDOW ? rows.begin - first : 0;
    }
    /* One row of a unit, of keys and of values. */
    template <class Rows> __device__ __forceinline__ void load(const Rows &tile, int copy, int k) {
        const int unit = thread + copy * THREADS, chunk = Units::chunk(unit);
        const bool exists = EVEN || unit < Units::COUNT;
        const bool key_exists = (UNIT_CHUNKS == HEAD_DIM / 8 || chunk < HEAD_DIM / 8) && exists;
        const bool value_exists = (UNIT_CHUNKS == VALUE_DIM / 8 || chunk < VALUE_DIM / 8) && exists;
        key[copy][k] = value[copy][k] = Eight{};
        if (HEAD_DIM == VALUE_DIM) {
            if (key_exists) {
                const auto place = tile.place(Units::key(unit), k);
                key[copy][k] = global_load<Eight>(tile.key(place, chunk * sizeof(Eight)));
                value[copy][k] = global_load<Eight>(tile.value(place, chunk * sizeof(Eight)));
            }
        } else {
            const auto place = tile.place(Units::key(unit), k);
            if (key_exists) key[copy][k] = global_load<Eight>(tile.key(place, chunk * sizeof(Eight)));
            if (value_exists) value[copy][k] = global_load<Eight>(tile.value(place, chunk * sizeof(Eight)));
        }
    }

    template <class Sync> __device__ __forceinline__ void publish(Sync sync) {
        sync();
        if (end < KEYS ||
            WINDOW && begin > 0) { /* the sequence ends within this tile: other tokens were read instead */
#pragma unroll
            for (int copy = 0; copy < COPIES; ++copy)
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const int token = Units::key(thread + copy * THREADS) + k;
                    if (token >= end || WINDOW && token < begin) value[copy][k] = Eight{};
                }
        }
#pragma unroll
        for (int copy = 0; copy < COPIES; ++copy) {
            const int unit = thread + copy * THREADS, chunk = Units::chunk(unit), place = Units::place(unit);
            if (!EVEN && unit >= Units::COUNT) continue;
            if (UNIT_CHUNKS == KEY_CHUNKS || chunk < KEY_CHUNKS)
                store_rows<HEAD_DIM>(key_tile + RowLayout<HEAD_DIM>::chunk(Units::key(unit), chunk), key[copy]);
            if (UNIT_CHUNKS == VALUE_CHUNKS || chunk < VALUE_CHUNKS)
                store_transposed<VALUE_DIM, KEYS>(
                    value_tile + ValueLayout::offset(chunk * 8, place / 2) + place % 2 * 8, value[copy]);
        }
        sync();
    }

    template <int ROW_TILES, int TEAM>
    __device__ __forceinline__ void scores(const Query<HEAD_DIM, ROW_TILES, TEAM> &query,
                                           Accumulator<ROW_TILES, KEYS> &s) const {
        multiply_keys(query, s, [](int) {});
    }
    /* The same while the tile from `first` on sets off: a load before every few products, as one after the other they
     * would hold up the wave. */
    template <int ROW_TILES, int TEAM, class Rows>
    __device__ __forceinline__ void scores(const Query<HEAD_DIM, ROW_TILES, TEAM> &query,
                                           Accumulator<ROW_TILES, KEYS> &s, const Rows &rows, int first) {
        expect(rows, first);
        const auto tile = rows.tile(first);
        multiply_keys(query, s, [&](int i) {
            constexpr int STRIDE = PRODUCTS / (COPIES * 4);
            if (i % STRIDE == 0) load(tile, i / STRIDE / 4, i / STRIDE % 4);
        });
    }
    template <int ROW_TILES, int TEAM, class Before>
    __device__ __forceinline__ void multiply_keys(const Query<HEAD_DIM, ROW_TILES, TEAM> &query,
                                                  Accumulator<ROW_TILES, KEYS> &s, Before before) const {
        auto products = Products::scores(key_tile);
        products.begin();
        Products::multiply(products, query, s, before);
    }
    template <int ROW_TILES, int COLUMNS>
    __device__ __forceinline__ void accumulate(const Accumulator<ROW_TILES, KEYS> &s,
                                               Accumulator<ROW_TILES, COLUMNS> &o, int first_column = 0) const {
        auto products = Products::template outputs<Accumulator<ROW_TILES, COLUMNS>>(value_tile, first_column);
        products.begin();
        Products::multiply(products, [&](int m, int j) { return round_operand(s, m, j); }, o, [](int) {}, first_column);
    }
};

/* Four waves of 32 query rows, or two teams. As many keys, up to 8192 elements of K and of V each, as let two blocks'
 * tiles fit into the 64 KB of LDS that a CU of gfx90a and gfx942 has, so that one computes while the other copies or
 * waits; beyond 128 dimensions the registers leave room for one block anyway, which can have all of it, unless they hold
 * the places of pages too. */
template <int HEAD_DIM, int VALUE_DIM> struct Shape {
    static constexpr int WIDER = greater(HEAD_DIM, VALUE_DIM);
    static constexpr int ROW_TILES = 1;
    static constexpr int KEYS = WIDER <= 64 ? 128 : WIDER <= (PAGED ? 128 : 256) ? 64 : 32;
    static constexpr int WAVES = 4, TEAM = team_of(VALUE_DIM);
    static constexpr int BLOCKS = WIDER <= 128 ? 2 : 1;
};

} // namespace aiter

#endif
