/* NVIDIA sm_90a: what Hopper has beyond sm_80. Products of a warpgroup (wgmma), barriers in shared memory (mbarrier),
 * copies of whole tiles by the bulk copy engine (TMA), barriers for some of a block's waves.
 *
 * wgmma: four waves (a warpgroup) multiply 64 rows by a tile in shared memory while they go on. Results, and an operand
 * in registers, have the layout of mma.sync (arch/sm80.h): wave w of the four has rows 16 w ... 16 w + 15. Matrices in
 * shared memory are blocks of 64 columns, rows of 128 bytes with the 128-byte swizzle, 1024-byte aligned (PTX ISA,
 * "Matrix descriptor" and "Shared memory layouts" of wgmma); the distance from eight rows to the next eight is 1024
 * bytes, and 16 columns further on is 32 bytes, swizzled or not. */
#ifndef AITER_GPU_ARCH_SM90_H
#define AITER_GPU_ARCH_SM90_H

#include "gpu/arch/sm80.h"

namespace aiter {
namespace wgmma {

/* A tile in shared memory, the half of its descriptor that differs; `bytes` further on is matrix(...) + bytes / 16.
 * block_bytes: from one block of 64 columns to the next, where B is read across them. */
typedef uint32_t Matrix;
__device__ __forceinline__ Matrix matrix(SharedAddress address, uint32_t block_bytes = 16) {
    return block_bytes / 16 << 16 | address >> 4;
}
/* The other half: 128-byte swizzle, 1024 bytes from eight rows to the next eight. */
#define AITER_WGMMA_DESCRIPTOR "0x40000040"

/* Writes to shared memory by this thread become visible to wgmma; a barrier must follow. */
__device__ __forceinline__ void shared_is_written() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int OUTSTANDING> __device__ __forceinline__ void wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(OUTSTANDING) : "memory");
}
/* The value of x is not known before this point. */
__device__ __forceinline__ void changed(float &x) { asm volatile("" : "+f"(x)::"memory"); }

/* One instruction each, 16 deep, COLUMNS (a multiple of 16) wide; c: tiles of 8 columns, 4 values a lane.
 *   multiply              c = or += A B^T, A (64 x 16) and B (COLUMNS x 16) in shared memory by rows
 *   multiply_transposed   c += A B, A (64 x 16) in registers or in shared memory by rows, B (16 x COLUMNS) in shared
 *                         memory by rows
 *   multiply_both_transposed   c = or += A^T B, A (16 x 64) and B (16 x COLUMNS) in shared memory by rows */
template <int COLUMNS> struct Product;

#if defined(AITER_DTYPE_BF16)
#define AITER_WGMMA_TYPES ".f32.bf16.bf16 "
#else
#define AITER_WGMMA_TYPES ".f32.f16.f16 "
#endif
#define AITER_WGMMA_RESULT_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define AITER_WGMMA_RESULT_32 AITER_WGMMA_RESULT_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define AITER_WGMMA_RESULT_48 AITER_WGMMA_RESULT_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define AITER_WGMMA_RESULT_64 AITER_WGMMA_RESULT_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define AITER_WGMMA_RESULT_80 AITER_WGMMA_RESULT_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define AITER_WGMMA_RESULT_96 AITER_WGMMA_RESULT_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define AITER_WGMMA_RESULT_112 AITER_WGMMA_RESULT_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define AITER_WGMMA_RESULT_128 AITER_WGMMA_RESULT_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define AITER_WGMMA_RESULT_144 AITER_WGMMA_RESULT_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define AITER_WGMMA_RESULT_160 AITER_WGMMA_RESULT_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define AITER_WGMMA_RESULT_176 AITER_WGMMA_RESULT_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define AITER_WGMMA_RESULT_192 AITER_WGMMA_RESULT_176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define AITER_WGMMA_RESULT_208 AITER_WGMMA_RESULT_192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define AITER_WGMMA_RESULT_224 AITER_WGMMA_RESULT_208 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define AITER_WGMMA_RESULT_240 AITER_WGMMA_RESULT_224 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define AITER_WGMMA_RESULT_256 AITER_WGMMA_RESULT_240 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define AITER_WGMMA_TILE(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define AITER_WGMMA_TILES_16 AITER_WGMMA_TILE(0), AITER_WGMMA_TILE(1)
#define AITER_WGMMA_TILES_32 AITER_WGMMA_TILES_16, AITER_WGMMA_TILE(2), AITER_WGMMA_TILE(3)
#define AITER_WGMMA_TILES_48 AITER_WGMMA_TILES_32, AITER_WGMMA_TILE(4), AITER_WGMMA_TILE(5)
#define AITER_WGMMA_TILES_64 AITER_WGMMA_TILES_48, AITER_WGMMA_TILE(6), AITER_WGMMA_TILE(7)
#define AITER_WGMMA_TILES_80 AITER_WGMMA_TILES_64, AITER_WGMMA_TILE(8), AITER_WGMMA_TILE(9)
#define AITER_WGMMA_TILES_96 AITER_WGMMA_TILES_80, AITER_WGMMA_TILE(10), AITER_WGMMA_TILE(11)
#define AITER_WGMMA_TILES_112 AITER_WGMMA_TILES_96, AITER_WGMMA_TILE(12), AITER_WGMMA_TILE(13)
#define AITER_WGMMA_TILES_128 AITER_WGMMA_TILES_112, AITER_WGMMA_TILE(14), AITER_WGMMA_TILE(15)
#define AITER_WGMMA_TILES_144 AITER_WGMMA_TILES_128, AITER_WGMMA_TILE(16), AITER_WGMMA_TILE(17)
#define AITER_WGMMA_TILES_160 AITER_WGMMA_TILES_144, AITER_WGMMA_TILE(18), AITER_WGMMA_TILE(19)
#define AITER_WGMMA_TILES_176 AITER_WGMMA_TILES_160, AITER_WGMMA_TILE(20), AITER_WGMMA_TILE(21)
#define AITER_WGMMA_TILES_192 AITER_WGMMA_TILES_176, AITER_WGMMA_TILE(22), AITER_WGMMA_TILE(23)
#define AITER_WGMMA_TILES_208 AITER_WGMMA_TILES_192, AITER_WGMMA_TILE(24), AITER_WGMMA_TILE(25)
#define AITER_WGMMA_TILES_224 AITER_WGMMA_TILES_208, AITER_WGMMA_TILE(26), AITER_WGMMA_TILE(27)
#define AITER_WGMMA_TILES_240 AITER_WGMMA_TILES_224, AITER_WGMMA_TILE(28), AITER_WGMMA_TILE(29)
#define AITER_WGMMA_TILES_256 AITER_WGMMA_TILES_240, AITER_WGMMA_TILE(30), AITER_WGMMA_TILE(31)
/* A and B in shared memory; transposed: whether A and B are, in wgmma's sense, by columns. */
#define AITER_PRODUCT_OF_TWO(name, n, i0, i1, i2, transposed)                                                          \
    static __device__ __forceinline__ void name(float(*c)[4], Matrix a, Matrix b, bool add) {                          \
        asm volatile("{\n.reg .pred add;\n.reg .b64 a, b;\nsetp.ne.b32 add, %" #i2 ", 0;\nmov.b64 a, {%" #i0           \
                     ", " AITER_WGMMA_DESCRIPTOR "};\nmov.b64 b, {%" #i1 ", " AITER_WGMMA_DESCRIPTOR                   \
                     "};\nwgmma.mma_async.sync.aligned.m64n" #n "k16" AITER_WGMMA_TYPES "{" AITER_WGMMA_RESULT_##n     \
                     "}, a, b, add, 1, 1, " transposed ";\n}"                                                          \
                     : AITER_WGMMA_TILES_##n                                                                           \
                     : "r"(a), "r"(b), "r"(static_cast<int>(add)));                                                    \
    }
/* i0 ... i4: the numbers of the operands after the result, which takes the first n / 2. */
#define AITER_PRODUCT(n, i0, i1, i2, i3, i4)                                                                           \
    template <> struct Product<n> {                                                                                    \
        AITER_PRODUCT_OF_TWO(multiply, n, i0, i1, i2, "0, 0")                                                          \
        AITER_PRODUCT_OF_TWO(multiply_both_transposed, n, i0, i1, i2, "1, 1")                                          \
        static __device__ __forceinline__ void multiply_transposed(float (*c)[4], const uint32_t (&a)[4], Matrix b) {  \
            asm volatile("{\n.reg .pred add;\n.reg .b64 b;\nsetp.eq.b32 add, 0, 0;\nmov.b64 b, {%" #i4                 \
                         ", " AITER_WGMMA_DESCRIPTOR "};\nwgmma.mma_async.sync.aligned.m64n" #n                        \
                         "k16" AITER_WGMMA_TYPES "{" AITER_WGMMA_RESULT_##n "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3  \
                                                                            "}, b, add, 1, 1, 1;\n}"                   \
                         : AITER_WGMMA_TILES_##n                                                                       \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b));                                        \
        }                                                                                                              \
        static __device__ __forceinline__ void multiply_transposed(float (*c)[4], Matrix a, Matrix b) {                \
            asm volatile("{\n.reg .pred add;\n.reg .b64 a, b;\nsetp.eq.b32 add, 0, 0;\nmov.b64 a, {%" #i0              \
                         ", " AITER_WGMMA_DESCRIPTOR "};\nmov.b64 b, {%" #i1 ", " AITER_WGMMA_DESCRIPTOR               \
                         "};\nwgmma.mma_async.sync.aligned.m64n" #n "k16" AITER_WGMMA_TYPES "{" AITER_WGMMA_RESULT_##n \
                         "}, a, b, add, 1, 1, 0, 1;\n}"                                                                \
                         : AITER_WGMMA_TILES_##n                                                                       \
                         : "r"(a), "r"(b));                                                                            \
        }                                                                                                              \
    };
AITER_PRODUCT(16, 8, 9, 10, 11, 12)
AITER_PRODUCT(32, 16, 17, 18, 19, 20)
AITER_PRODUCT(48, 24, 25, 26, 27, 28)
AITER_PRODUCT(64, 32, 33, 34, 35, 36)
AITER_PRODUCT(80, 40, 41, 42, 43, 44)
AITER_PRODUCT(96, 48, 49, 50, 51, 52)
AITER_PRODUCT(112, 56, 57, 58, 59, 60)
AITER_PRODUCT(128, 64, 65, 66, 67, 68)
AITER_PRODUCT(144, 72, 73, 74, 75, 76)
AITER_PRODUCT(160, 80, 81, 82, 83, 84)
AITER_PRODUCT(176, 88, 89, 90, 91, 92)
AITER_PRODUCT(192, 96, 97, 98, 99, 100)
AITER_PRODUCT(208, 104, 105, 106, 107, 108)
AITER_PRODUCT(224, 112, 113, 114, 115, 116)
AITER_PRODUCT(240, 120, 121, 122, 123, 124)
AITER_PRODUCT(256, 128, 129, 130, 131, 132)
#undef AITER_PRODUCT
#undef AITER_PRODUCT_OF_TWO
#undef AITER_WGMMA_TILE

} // namespace wgmma

/* The same of a whole result. */
template <int COLUMNS> __device__ __forceinline__ void changed(Accumulator<1, COLUMNS> &m) {
#pragma unroll
    for (int n = 0; n < m.TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) wgmma::changed(m.tile[0][n][i]);
}

/* Copies of whole lines between shared and global memory by the bulk copy engine, begun by one thread. */
namespace bulk {

__device__ __forceinline__ void store(void *to, SharedAddress from, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
                 : "memory");
}
/* Adds float32 values to those in memory. */
__device__ __forceinline__ void add(void *to, SharedAddress from, uint32_t bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
                 "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void end() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/* What this thread has begun has been read; has been written. */
__device__ __forceinline__ void wait_for_reads() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
/* Between these and other accesses to global memory. */
__device__ __forceinline__ void order() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

} // namespace bulk

/* From shared memory, setting off here and not where it is needed. */
__device__ __forceinline__ void load_now(uint4 &x, SharedAddress at) {
    asm volatile("ld.volatile.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(at));
}
__device__ __forceinline__ void load_now(float2 &x, SharedAddress at) {
    asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(at));
}

/* Four 8 x 8 matrices to shared memory: the reverse of load_matrices. */
__device__ __forceinline__ void store_matrices(SharedAddress row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}

/* The columns that exist of a lane's row `slot`, straight from the registers, 16 bytes a lane: the four lanes that share
 * a row exchange what they have of 32 columns. By all lanes; to: where the row goes, or null. */
template <int EXISTING, int COLUMNS>
__device__ __forceinline__ void store_elements(const Accumulator<1, COLUMNS> &o, int slot, Element *to) {
    constexpr int TILES = Accumulator<1, COLUMNS>::TILES;
    const int t = lane() % 4;
    const bool high = t & 2, odd = t & 1;
#pragma unroll
    for (int n = 0; n < TILES; n += 4) {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            w[i] = n + i < TILES ? to_elements(o.get(slot, 2 * (n + i < TILES ? n + i : 0)),
                                               o.get(slot, 2 * (n + i < TILES ? n + i : 0) + 1))
                                 : 0;
        /* Lane t is to have tile n + t: first the half of the tiles that it is in, then the tile. */
        const uint32_t a0 = high ? w[2] : w[0], a1 = high ? w[3] : w[1];
        const uint32_t b0 = __shfl_xor_sync(~0u, high ? w[0] : w[2], 2);
        const uint32_t b1 = __shfl_xor_sync(~0u, high ? w[1] : w[3], 2);
        const uint32_t a = odd ? a1 : a0, b = odd ? b1 : b0;
        const uint32_t from_a = __shfl_xor_sync(~0u, odd ? a0 : a1, 1);
        const uint32_t from_b = __shfl_xor_sync(~0u, odd ? b0 : b1, 1);
        const uint2 own = odd ? make_uint2(from_a, a) : make_uint2(a, from_a);
        const uint2 other = odd ? make_uint2(from_b, b) : make_uint2(b, from_b);
        const uint4 chunk =
            high ? make_uint4(other.x, other.y, own.x, own.y) : make_uint4(own.x, own.y, other.x, other.y);
        if (to != nullptr && (n + t) * 8 < EXISTING) reinterpret_cast<uint4 *>(to)[n + t] = chunk;
    }
}

/* By a warpgroup: zeros in the rows from `row` on of a tile of ROWS rows, in as many blocks of 64 columns. */
template <int ROWS, int BLOCKS> __device__ __forceinline__ void clear_rows_from(SharedAddress tile, int row) {
    constexpr int THREADS = 128;
    const SharedAddress mine = tile + thread_in_block() % THREADS * 16;
#pragma unroll 1
    for (int i = row * 128; i < ROWS * 128; i += THREADS * 16)
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block)
            if (i + thread_in_block() % THREADS * 16 < ROWS * 128)
                shared_store(mine + i + block * ROWS * 128, make_uint4(0, 0, 0, 0));
}

/* In one lane, the same each time; called by a whole wave. Of code behind it the assembler knows that one lane runs it: the
 * boxes of a tensor map (sm90_tensor_map.h), whose operands are a wave's and not a lane's, set off one right after the
 * other there. Behind lane() == 0 each takes a round of a loop over lanes, 64 cycles. */
__device__ __forceinline__ bool elected() {
    uint32_t result;
    asm volatile("{\n.reg .pred one;\nelect.sync _|one, -1;\nselp.u32 %0, 1, 0, one;\n}" : "=r"(result));
    return result;
}

/* Barriers in shared memory on which some threads arrive and others wait, phase after phase (PTX ISA, "mbarrier"). */
namespace mbarrier {

constexpr int BYTES = 8;

__device__ __forceinline__ void make(SharedAddress at, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}
/* After the last make(); a barrier of the block must follow. */
__device__ __forceinline__ void made() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void arrive(SharedAddress at) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(at) : "memory");
}
/* So many times. */
__device__ __forceinline__ void arrive(SharedAddress at, int count) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
/* By all lanes of a wave, each when it has read and written what it had to: one arrives for all, as each arrival is an
 * atomic operation on shared memory. Elected anew, or whether a lane is the one would take a register. */
__device__ __forceinline__ void arrive_as_wave(SharedAddress at) {
    wave_sync();
    asm volatile("{\n.reg .pred one;\nelect.sync _|one, -1;\n@one mbarrier.arrive.shared.b64 _, [%0];\n}" ::"r"(at)
                 : "memory");
}
/* As soon as all copies that this thread has begun (cp.async) are there. */
__device__ __forceinline__ void arrive_after_copies(SharedAddress at) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(at) : "memory");
}
/* The phase, to which this thread has not arrived yet, is complete only when so many bytes more have been copied. */
__device__ __forceinline__ void expect(SharedAddress at, uint32_t bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
/* Arrives; and the phase is complete only when so many bytes more have been copied (tensor_map::copy). */
__device__ __forceinline__ void arrive_and_expect(SharedAddress at, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
/* Until the phase of this parity is complete; the phase before the first one, of parity 1, is. With a time, and one that
 * never passes, as a wave sleeps till then: without one it asked again every 70 cycles. */
__device__ __forceinline__ void wait(SharedAddress at, uint32_t parity) {
    constexpr uint32_t NANOSECONDS = 10000000;
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1, %2;\n@!done bra again;\n}" ::
            "r"(at),
        "r"(parity), "n"(NANOSECONDS)
        : "memory");
}

} // namespace mbarrier

/* Blocks that run at one time, side by side, and can read each other's shared memory. */
namespace cluster {

__device__ __forceinline__ int rank() {
    uint32_t x;
    asm volatile("mov.u32 %0, %cluster_ctarank;" : "=r"(x));
    return static_cast<int>(x);
}
/* What stands at the same place in the shared memory of another block. */
__device__ __forceinline__ float *of(float *own, int rank) {
    float *theirs;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(own), "r"(rank));
    return theirs;
}
__device__ __forceinline__ SharedAddress of(SharedAddress own, int rank) {
    SharedAddress theirs;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(own), "r"(rank));
    return theirs;
}
/* To the memory of a block, where the bytes count for a barrier that expects them: no fence is needed, which would wait for
 * all that is being copied. */
__device__ __forceinline__ void store(SharedAddress to, float x, SharedAddress barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(x),
                 "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void store(SharedAddress to, float2 x, SharedAddress barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to),
                 "f"(x.x), "f"(x.y), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void store(SharedAddress to, const uint32_t (&x)[4], SharedAddress barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
                 "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(barrier)
                 : "memory");
}
/* This block is there: for others, who do so before they wait(). */
__device__ __forceinline__ void appear() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
/* All threads that have not ended. What was written before arrive() can be read after wait(). */
__device__ __forceinline__ void arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

} // namespace cluster

/* Barriers 1 to 15, for `threads` of a block's threads: those that wait and those that only arrive. */
__device__ __forceinline__ void meet(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void pass(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

} // namespace aiter

#endif
