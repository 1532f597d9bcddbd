/* NVIDIA from sm_80 on: mma.sync m16n8k16, ldmatrix, cp.async. Implements the interface described in gpu/arch.h.
 *
 * Scores S = Q K^T and output O += P V in tiles of 16 rows and 8 columns. In one tile a lane holds (PTX ISA, "Matrix
 * fragments for mma.m16n8k16"; g = lane / 4, t = lane % 4)
 *
 *     c0 c1 : row g,     columns 2 t, 2 t + 1
 *     c2 c3 : row g + 8, columns 2 t, 2 t + 1
 *
 * so a lane has two rows of each 16 (slots), a quad of lanes shares them, and two neighbouring tiles of S, rounded to
 * 16 bit, are the A operand of the second product as they stand: P never leaves its registers.
 *
 * K and V go by cp.async into one of two stages of shared memory while the other is in use. K is read by ldmatrix, V by
 * ldmatrix.trans, both 16 x 16 elements at a time. With 32 rows a wave (two row tiles) each of those feeds four mma;
 * with 16 it would be two, and shared memory would be the bottleneck.
 *
 * Keys and values of 8 bits arrive as they are, in a place beside the tile where each thread finds again what it has
 * copied, and it takes them to the tile as elements: so products and their shared memory are the same. Of tiles there is
 * one then, of 16 bits, and the next is on its way in half of its bytes.
 *
 * How much shared memory a block can have differs: 99 KB on sm_86, sm_89 and sm_120, 163 on sm_80, 227 on sm_90. Shape
 * takes the largest tiles that fit. */
#ifndef AITER_GPU_ARCH_SM80_H
#define AITER_GPU_ARCH_SM80_H

#include "gpu/arch.h"

namespace aiter {

constexpr int WAVE = 32;
constexpr int ROW_TILE = 16;
constexpr int LANES_PER_ROW = 4;
constexpr int XCDS = 1;
constexpr bool MASKS_OF_BITS = true; /* one instruction makes predicates of seven bits */

/* ---- the wave ---- */

__device__ __forceinline__ int thread_in_block() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int lane() { return thread_in_block() & (WAVE - 1); }
__device__ __forceinline__ int wave() { return __shfl_sync(~0u, thread_in_block() / WAVE, 0); }
__device__ __forceinline__ int block() { return static_cast<int>(blockIdx.x); }
__device__ __forceinline__ int blocks() { return static_cast<int>(gridDim.x); }

__device__ __forceinline__ void barrier() { __syncthreads(); }
__device__ __forceinline__ void wave_sync() { __syncwarp(); }
__device__ __forceinline__ void keep_order() {} /* the assembler mixes as it likes */

__device__ __forceinline__ float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
/* Rounded to nearest as __frcp_rn is, which is made this way but where x or the result is subnormal: those are 0 here,
 * and no function is called, while which no product could be under way. */
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    const float error = fmaf(x, y, -1.0f), better = fmaf(y, -error, y);
    return fabsf(error) < 1.0f ? better : y; /* of 0 and of infinity, or nearly */
}
__device__ __forceinline__ float approximate_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint64_t ballot(bool condition) { return __ballot_sync(~0u, condition); }
__device__ __forceinline__ int first_lane(uint64_t lanes) { return __ffsll(static_cast<long long>(lanes)) - 1; }
__device__ __forceinline__ bool wave_any(bool condition) { return __any_sync(~0u, condition); }

template <class T> __device__ __forceinline__ T from_lane(T x, int source) { return __shfl_sync(~0u, x, source); }
template <class T> __device__ __forceinline__ T wave_sum(T x) {
#pragma unroll
    for (int distance = 1; distance < WAVE; distance *= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}
template <int LANES = LANES_PER_ROW> __device__ __forceinline__ float row_max(float x) {
    static_assert(LANES == LANES_PER_ROW, "");
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
template <int LANES = LANES_PER_ROW> __device__ __forceinline__ float row_sum(float x) {
    static_assert(LANES == LANES_PER_ROW, "");
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ __forceinline__ bool lane_leads_row() { return lane() % 4 == 0; }

__device__ __forceinline__ int uniform(int x) { return x; }
template <class T> __device__ __forceinline__ T opaque(T x) {
    asm volatile("" : "+r"(x));
    return x;
}
__device__ __forceinline__ float opaque(float x) {
    asm volatile("" : "+f"(x));
    return x;
}
template <class T> __device__ __forceinline__ T opaque_scalar(T x) { return x; }

/* Parameters are constant memory, and read where they are needed. */
template <class T> __device__ __forceinline__ const T &reread(const T &parameter) { return parameter; }

/* ---- shared memory ---- */

typedef uint32_t SharedAddress;

__device__ __forceinline__ SharedAddress shared_address(void *pointer) {
    return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}
template <class T> __device__ __forceinline__ T *shared_pointer(SharedAddress address) {
    return static_cast<T *>(__cvta_shared_to_generic(address));
}
template <class T> __device__ __forceinline__ T shared_load(SharedAddress address) {
    return *static_cast<const T *>(__cvta_shared_to_generic(address));
}
template <class T> __device__ __forceinline__ void shared_store(SharedAddress address, T value) {
    *static_cast<T *>(__cvta_shared_to_generic(address)) = value;
}

/* Four 8 x 8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8. */
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row));
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row));
}
/* 16 bytes, past the first-level cache; zeros, and nothing read, when not `valid`. */
__device__ __forceinline__ void copy_async(SharedAddress to, const char *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
#if AITER_FP8_CACHE
/* The same of eight bytes. */
__device__ __forceinline__ void copy_eight_async(SharedAddress to, const char *from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(valid ? 8 : 0) : "memory");
}
#endif
__device__ __forceinline__ void copy_word_async(SharedAddress to, const float *from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
}
/* Copies since the last end_of_copies() are a group; a thread waits for all its groups but the latest OUTSTANDING. */
__device__ __forceinline__ void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int OUTSTANDING> __device__ __forceinline__ void wait_for_copies_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(OUTSTANDING) : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/* Rows of 16-byte chunks, padded to whole 128-byte lines (all 32 banks). Chunk c
 * of row r stands at c ^ (r % 8) within its line, so that equal chunks of eight neighbouring rows, and all chunks of
 * one line of a row, lie in different banks. */
template <int HEAD_DIM> struct RowLayout {
    static constexpr int BYTES = round_up(HEAD_DIM, 64) * 2;
    static __device__ __forceinline__ uint32_t chunk(int row, int chunk) {
        return static_cast<uint32_t>(row * BYTES + ((chunk ^ (row & 7)) << 4));
    }
};

/* ---- global memory ---- */

typedef uint4 Chunk; /* 16 bytes, as they are copied */

template <class T> __device__ __forceinline__ T global_load(const void *pointer) {
    return *static_cast<const T *>(pointer);
}
template <class T> __device__ __forceinline__ void global_store(void *pointer, T value) {
    *static_cast<T *>(pointer) = value;
}
template <class T> __device__ __forceinline__ T l2_load(const T *pointer) { return __ldcg(pointer); }
template <class T> __device__ __forceinline__ void l2_store(T *pointer, T value) { __stcg(pointer, value); }

/* A counter in global memory by which blocks order what they write. */
__device__ __forceinline__ uint32_t load_acquire(const uint32_t *from) {
    uint32_t x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}
/* Behind all that the thread, or its block when its waves met last, had written. */
__device__ __forceinline__ void add_release(uint32_t *to, uint32_t x) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}

/* ---- elements ---- */

#if defined(AITER_DTYPE_BF16)
__device__ __forceinline__ float to_float(Element bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
__device__ __forceinline__ uint32_t to_elements(float x, float y) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
    return pair;
}
#else
__device__ __forceinline__ float to_float(Element bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
__device__ __forceinline__ uint32_t to_elements(float x, float y) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
    return pair;
}
#endif
__device__ __forceinline__ Element to_element(float x) { return static_cast<Element>(to_elements(x, x)); }
__device__ __forceinline__ float usual_nan(float x) { return x; } /* to_elements() knows all of them */

#if AITER_FP8_CACHE
/* What lies at `raw`, eight elements as they are in memory, goes to the tile as elements. */
__device__ __forceinline__ void convert_eight(SharedAddress to, SharedAddress raw) {
    const uint2 eight = shared_load<uint2>(raw);
    const TwoPairs first = elements_of(eight.x), second = elements_of(eight.y);
    shared_store(to, uint4{first.x, first.y, second.x, second.y});
}
#endif

/* ---- matrices ---- */

/* c (16 x 8) += A (16 x 16) * B (16 x 8) */
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(AITER_DTYPE_BF16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
#endif
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <int ROW_TILES, int COLUMNS> struct Accumulator {
    static constexpr int SLOTS = 2 * ROW_TILES;
    static constexpr int TILES = round_up(COLUMNS, 16) / 8;
    static constexpr int VALUES = TILES * 2;
    static constexpr int EIGHT_FURTHER = 2;      /* values from one column to that eight further */
    static constexpr bool SLOTS_IN_PAIRS = true; /* whose rows are eight apart */
    float tile[ROW_TILES][TILES][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
            for (int n = 0; n < TILES; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) tile[m][n][i] = 0.0f;
    }
    __device__ __forceinline__ float get(int slot, int i) const { return tile[slot / 2][i / 2][slot % 2 * 2 + i % 2]; }
    __device__ __forceinline__ void set(int slot, int i, float x) { tile[slot / 2][i / 2][slot % 2 * 2 + i % 2] = x; }
    __device__ __forceinline__ float largest(int slot) const {
        static_assert(VALUES % 4 == 0, "");
        /* Four, as each step waits for the one before. */
        float x = get(slot, 0), y = get(slot, 1), z = get(slot, 2), w = get(slot, 3);
#pragma unroll
        for (int i = 4; i < VALUES; i += 4) {
            x = fmaxf(x, get(slot, i)), y = fmaxf(y, get(slot, i + 1));
            z = fmaxf(z, get(slot, i + 2)), w = fmaxf(w, get(slot, i + 3));
        }
        return fmaxf(fmaxf(x, y), fmaxf(z, w));
    }
    __device__ __forceinline__ void multiply(int slot, float factor) {
#pragma unroll
        for (int i = 0; i < VALUES; ++i) set(slot, i, get(slot, i) * factor);
    }
    __device__ __forceinline__ float exponentiate(int slot, float scale, float reference) {
        float sum[2] = {}; /* two, likewise */
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            set(slot, i, exp2(fmaf(get(slot, i), scale, -reference)));
            sum[i % 2] += get(slot, i);
        }
        return sum[0] + sum[1];
    }
    static __device__ __forceinline__ int row(int slot) { return slot * 8 + lane() / 4; }
    static __device__ constexpr int column(int i) { return i / 2 * 8 + i % 2; }
    static __device__ __forceinline__ int lane_column() { return lane() % 4 * 2; }
    /* A bit for each of a slot's values: whether its column is one of low ... high-1. */
    static __device__ __forceinline__ uint32_t values_between(int low, int high) {
        static_assert(VALUES <= 32, "");
        const auto below = [](int column) {
            column = clamp(column, 0, COLUMNS);
            const int values = column / 8 * 2 + lesser(column % 8, 2);
            return static_cast<uint32_t>((uint64_t(1) << values) - 1);
        };
        return opaque(below(high) & ~below(low));
    }
};

/* ldmatrix reads 16 rows of 16 elements as four 8 x 8 matrices, lane l naming a row: in the order (0,0) (8,0) (0,8)
 * (8,8) for operands whose registers alternate in rows first (Q, and V transposed), or (0,0) (0,8) (8,0) (8,8) for
 * those that alternate in columns first (K). A chunk is 8 elements. */
template <int HEAD_DIM> __device__ __forceinline__ uint32_t rows_first() {
    return RowLayout<HEAD_DIM>::chunk(lane() % 16, lane() / 16);
}
template <int HEAD_DIM> __device__ __forceinline__ uint32_t columns_first() {
    return RowLayout<HEAD_DIM>::chunk(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2);
}
/* From the address that a lane names in the first 16 x 16 elements to that in those at (row, 16 * j). */
template <int HEAD_DIM> __device__ __forceinline__ SharedAddress at(SharedAddress lane_row, int row, int j) {
    return (lane_row ^ ((2 * j & 7) << 4)) + 2 * j / 8 * 128 + row * RowLayout<HEAD_DIM>::BYTES;
}

/* Scores, or what they have become, of 16 neighbouring columns as the A operand of a second product: they stay where
 * they are. */
template <class Scores>
__device__ __forceinline__ void round_operand(const Scores &s, int row_tile, int step, uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float(&c)[4] = s.tile[row_tile][2 * step + i / 2];
        a[i] = to_elements(c[i % 2 * 2], c[i % 2 * 2 + 1]);
    }
}

/* The waves of a team load the rows together, into one memory; a barrier must follow. */
template <int HEAD_DIM, int ROW_TILES, int TEAM = 1> struct Query {
    static constexpr int STEPS = round_up(HEAD_DIM, 16) / 16;
    static constexpr int CHUNKS = RowLayout<HEAD_DIM>::BYTES / 16;
    static constexpr bool IN_REGISTERS = ROW_TILES * STEPS * 4 <= 32 && TEAM == 1;
    static constexpr int ROWS = ROW_TILES * 16;
    static constexpr int SHARED_BYTES = ROWS * RowLayout<HEAD_DIM>::BYTES;
    SharedAddress rows;
    uint32_t operand[IN_REGISTERS ? ROW_TILES : 1][IN_REGISTERS ? STEPS : 1][4];

    template <class RowPointer>
    __device__ __forceinline__ void load(SharedAddress shared, RowPointer row, QueryBits bits) {
        rows = shared;
#pragma unroll
        for (int step = 0; step < ROWS * CHUNKS / WAVE / TEAM;
             ++step) { /* unrolled: all loads are in flight together */
            const int i = (TEAM == 1 ? lane() : thread_in_block() % (TEAM * WAVE)) + step * TEAM * WAVE, r = i / CHUNKS,
                      chunk = i % CHUNKS;
            const Element *source = row(r);
            uint4 elements = {0, 0, 0, 0};
            if (source != nullptr && chunk < HEAD_DIM / 8) elements = reinterpret_cast<const uint4 *>(source)[chunk];
            shared_store(shared + RowLayout<HEAD_DIM>::chunk(r, chunk),
                         uint4{bits(elements.x), bits(elements.y), bits(elements.z), bits(elements.w)});
        }
        __syncwarp();
        if constexpr (IN_REGISTERS)
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
                for (int j = 0; j < STEPS; ++j) read(operand[m][j], m, j);
    }
    __device__ __forceinline__ void read(uint32_t (&a)[4], int m, int j) const {
        load_matrices(a, at<HEAD_DIM>(rows + rows_first<HEAD_DIM>(), m * 16, j));
    }
};

/* By way of the wave's query rows in shared memory, which it needs no more: from there whole rows go out, 16 bytes a
 * lane and lanes side by side. */
template <int WIDTH, int ROW_TILES, int COLUMNS, class RowPointer>
__device__ __forceinline__ void store_output(const Accumulator<ROW_TILES, COLUMNS> &o, SharedAddress shared,
                                             RowPointer row, int first_column = 0) {
    constexpr int CHUNKS = lesser(WIDTH, COLUMNS) / 8, ROWS = ROW_TILES * 16;
    const auto exists = [&](int n) { return first_column + n * 8 < WIDTH; };
    __syncwarp();
#pragma unroll
    for (int slot = 0; slot < ROW_TILES * 2; ++slot)
#pragma unroll
        for (int n = 0; n < CHUNKS; ++n)
            if (exists(n))
                shared_store(shared + RowLayout<WIDTH>::chunk(o.row(slot), first_column / 8 + n) + lane() % 4 * 4,
                             to_elements(o.get(slot, 2 * n), o.get(slot, 2 * n + 1)));
    __syncwarp();
#pragma unroll 4
    for (int i = lane(); i < ROWS * CHUNKS; i += WAVE) {
        Element *to = row(i / CHUNKS);
        const int chunk = first_column / 8 + i % CHUNKS;
        if (to != nullptr && exists(i % CHUNKS))
            reinterpret_cast<uint4 *>(to)[chunk] =
                shared_load<uint4>(shared + RowLayout<WIDTH>::chunk(i / CHUNKS, chunk));
    }
}

/* Copies chunk thread % 8 of each line of 128 bytes of a tile's rows, a row to eight threads. */
template <int COLUMNS, int KEYS, int THREADS> struct TileCopy {
    static constexpr int CHUNKS = round_up(COLUMNS, 16) / 8; /* of a row that products read */
    static constexpr int LINES = RowLayout<COLUMNS>::BYTES / 128;
    static constexpr int PASS_ROWS = THREADS / 8;
    static_assert(KEYS % PASS_ROWS == 0, "whole passes");

    /* Calls visit(line, chunk, where it stands in the tile, does the row have it?) for a thread's chunks of one row. */
    template <class Visit>
    static __device__ __forceinline__ void for_chunks(SharedAddress to, int pass, int thread, Visit visit) {
#pragma unroll
        for (int line = 0; line < LINES; ++line) {
            const int chunk = line * 8 + thread % 8;
            if (line * 8 + 8 > CHUNKS && chunk >= CHUNKS) continue; /* no product reads this chunk */
            visit(line, chunk,
                  (to ^ (pass * PASS_ROWS % 8 << 4)) + line * 128 + pass * PASS_ROWS * RowLayout<COLUMNS>::BYTES,
                  line * 8 + 8 <= COLUMNS / 8 || chunk < COLUMNS / 8);
        }
    }
};

template <int HEAD_DIM, int VALUE_DIM, int KEYS, int THREADS> struct KeyValueTile {
    using Keys = TileCopy<HEAD_DIM, KEYS, THREADS>;
    using Values = TileCopy<VALUE_DIM, KEYS, THREADS>;
    static constexpr int STEPS = Keys::CHUNKS / 2, VALUE_STEPS = Values::CHUNKS / 2;
    static constexpr int PASSES = KEYS / Keys::PASS_ROWS;
    static constexpr int KEY_BYTES = KEYS * RowLayout<HEAD_DIM>::BYTES;
    static constexpr int STAGE_BYTES = KEY_BYTES + KEYS * RowLayout<VALUE_DIM>::BYTES;
    static constexpr int SHARED_BYTES = FP8 ? STAGE_BYTES + STAGE_BYTES / 2 : 2 * STAGE_BYTES;
    static_assert(KEYS % 16 == 0, "whole mma tiles");
    static constexpr bool ISSUES_WITH_SCORES = false;

    SharedAddress shared, current, coming;
    int thread;

    __device__ __forceinline__ KeyValueTile(SharedAddress shared, int thread)
        : shared(shared), current(FP8 ? shared : shared + STAGE_BYTES), coming(FP8 ? shared + STAGE_BYTES : shared),
          thread(thread) {}

    /* Where a thread's chunk of 8-bit elements is kept until it is converted. */
    __device__ __forceinline__ SharedAddress raw_key(int pass, int line) const {
        return coming + ((pass * Keys::LINES + line) * THREADS + thread) * 8;
    }
    __device__ __forceinline__ SharedAddress raw_value(int pass, int line) const {
        return coming + KEY_BYTES / 2 + ((pass * Values::LINES + line) * THREADS + thread) * 8;
    }

    template <class Rows> __device__ __forceinline__ void issue(const Rows &rows, int first) {
        const auto tile = rows.tile(first);
        const int row = opaque(thread / 8);
        const SharedAddress keys = coming + RowLayout<HEAD_DIM>::chunk(row, thread % 8);
        const SharedAddress values = coming + KEY_BYTES + RowLayout<VALUE_DIM>::chunk(row, thread % 8);
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            const auto place = tile.place(row, pass * Keys::PASS_ROWS);
            const bool exists = rows.exists(first + row + pass * Keys::PASS_ROWS);
            Keys::for_chunks(keys, pass, thread, [&](int line, int chunk, SharedAddress to, bool has) {
#if AITER_FP8_CACHE
                copy_eight_async(raw_key(pass, line), tile.key(place, chunk * 8), exists && has);
#else
                copy_async(to, tile.key(place, chunk * 16), exists && has);
#endif
            });
            Values::for_chunks(values, pass, thread, [&](int line, int chunk, SharedAddress to, bool has) {
#if AITER_FP8_CACHE
                copy_eight_async(raw_value(pass, line), tile.value(place, chunk * 8), exists && has);
#else
                copy_async(to, tile.value(place, chunk * 16), exists && has);
#endif
            });
        }
    }

#if AITER_FP8_CACHE
    template <class Sync> __device__ __forceinline__ void publish(Sync sync) {
        wait_for_copies();
        sync(); /* nobody uses the tile any more */
        const int row = opaque(thread / 8);
        const SharedAddress keys = current + RowLayout<HEAD_DIM>::chunk(row, thread % 8);
        const SharedAddress values = current + KEY_BYTES + RowLayout<VALUE_DIM>::chunk(row, thread % 8);
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            Keys::for_chunks(keys, pass, thread,
                             [&](int line, int, SharedAddress to, bool) { convert_eight(to, raw_key(pass, line)); });
            Values::for_chunks(values, pass, thread, [&](int line, int, SharedAddress to, bool) {
                convert_eight(to, raw_value(pass, line));
            });
        }
        sync();
    }
#else
    template <class Sync> __device__ __forceinline__ void publish(Sync sync) {
        wait_for_copies();
        sync();
        const SharedAddress free = current;
        current = coming;
        coming = free;
    }
#endif

    template <int ROW_TILES, int TEAM>
    __device__ __forceinline__ void scores(const Query<HEAD_DIM, ROW_TILES, TEAM> &query,
                                           Accumulator<ROW_TILES, KEYS> &s) const {
        const SharedAddress lane_row = current + columns_first<HEAD_DIM>();
        s.clear();
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
            uint32_t q[ROW_TILES][4];
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
                if constexpr (Query<HEAD_DIM, ROW_TILES, TEAM>::IN_REGISTERS) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) q[m][i] = query.operand[m][j][i];
                } else {
                    query.read(q[m], m, j);
                }
            }
#pragma unroll
            for (int n = 0; n < KEYS / 16; ++n) {
                uint32_t k[4];
                load_matrices(k, at<HEAD_DIM>(lane_row, n * 16, j));
#pragma unroll
                for (int m = 0; m < ROW_TILES; ++m) {
                    multiply_add(s.tile[m][2 * n], q[m], k[0], k[1]);
                    multiply_add(s.tile[m][2 * n + 1], q[m], k[2], k[3]);
                }
            }
        }
    }

    /* The columns of V from first_column on, as many as `o` has: all of them, or a multiple of 64. */
    template <int ROW_TILES, int COLUMNS>
    __device__ __forceinline__ void accumulate(const Accumulator<ROW_TILES, KEYS> &s,
                                               Accumulator<ROW_TILES, COLUMNS> &o, int first_column = 0) const {
        const SharedAddress lane_row = current + KEY_BYTES + rows_first<VALUE_DIM>() + first_column * 2;
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j) {
            uint32_t p[ROW_TILES][4];
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) round_operand(s, m, j, p[m]);
#pragma unroll
            for (int n = 0; n < round_up(COLUMNS, 16) / 16; ++n) {
                /* Does V have as many columns in each part? */
                if (VALUE_STEPS * 16 % round_up(COLUMNS, 16) != 0 && first_column / 16 + n >= VALUE_STEPS) break;
                uint32_t v[4];
                load_matrices_transposed(v, at<VALUE_DIM>(lane_row, j * 16, n));
#pragma unroll
                for (int m = 0; m < ROW_TILES; ++m) {
                    multiply_add(o.tile[m][2 * n], p[m], v[0], v[1]);
                    multiply_add(o.tile[m][2 * n + 1], p[m], v[2], v[3]);
                }
            }
        }
    }
};

/* How many query rows a block has, and keys a tile. */
struct ForwardShape {
    int row_tiles, waves, keys;
};
constexpr int forward_bytes(int head_dim, int value_dim, ForwardShape shape) {
    const int key_row = round_up(head_dim, 64) * 2, value_row = round_up(value_dim, 64) * 2;
    const int rows = shape.waves / team_of(value_dim) * shape.row_tiles * 16;
    return rows * greater(key_row, value_row) + (FP8 ? 3 : 4) * shape.keys * (key_row + value_row) / 2;
}
/* 128 query rows, four waves of 32, or eight of 16 where the output of 32 would not fit into the registers; the more
 * keys the better. What is too large becomes smaller, keys first, as long as each wave copies whole rows. */
constexpr ForwardShape forward_shape(int head_dim, int value_dim) {
    for (int waves = value_dim <= 128 ? 4 : 8; waves > 1; waves /= 2)
        for (int keys = 64; keys >= greater(16, waves * 4); keys /= 2) {
            const ForwardShape shape = {value_dim <= 128 ? 2 : 1, waves, keys};
            if (forward_bytes(head_dim, value_dim, shape) <= SHARED_LIMIT) return shape;
        }
    return {1, 2, 16};
}

template <int HEAD_DIM, int VALUE_DIM> struct Shape {
    static constexpr ForwardShape CHOSEN = forward_shape(HEAD_DIM, VALUE_DIM);
    static constexpr int ROW_TILES = CHOSEN.row_tiles, KEYS = CHOSEN.keys, WAVES = CHOSEN.waves;
    static constexpr int TEAM = team_of(VALUE_DIM);
    static constexpr int BLOCKS = greater(HEAD_DIM, VALUE_DIM) <= 128 ? 2 : 1;
};

} // namespace aiter

#endif
