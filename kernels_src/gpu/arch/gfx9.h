/* AMD CDNA: gfx90a (MI200), gfx942 (MI300), gfx950 (MI350). Implements the interface described in gpu/arch.h; the wave,
 * memory and elements here, matrices in arch/gfx9_tiles.h. */
#ifndef AITER_GPU_ARCH_GFX9_H
#define AITER_GPU_ARCH_GFX9_H

#include "gpu/read_fp8.h"
#include "gpu/runtime.h"
#include "gpu/target.h"

namespace aiter {

constexpr int WAVE = 64;
constexpr int ROW_TILE = 32;
constexpr int LANES_PER_ROW = 2;
#if defined(AITER_GFX90A)
constexpr int XCDS = 1; /* the two dies of an MI250 are two devices */
#else
constexpr int XCDS = 8;
#endif
constexpr bool MASKS_OF_BITS = false;

typedef uint32_t u32x2 __attribute__((ext_vector_type(2)));
typedef uint32_t u32x4 __attribute__((ext_vector_type(4)));
typedef float f32x2 __attribute__((ext_vector_type(2)));
typedef float f32x16 __attribute__((ext_vector_type(16)));
typedef _Float16 f16x4 __attribute__((ext_vector_type(4)));
typedef _Float16 f16x8 __attribute__((ext_vector_type(8)));
typedef short i16x4 __attribute__((ext_vector_type(4)));
typedef __bf16 bf16x8 __attribute__((ext_vector_type(8)));
typedef u32x4 Chunk; /* 16 bytes, as they are copied */

/* ---- the wave ---- */

__device__ __forceinline__ int thread_in_block() { return static_cast<int>(__builtin_amdgcn_workitem_id_x()); }
__device__ __forceinline__ int lane() { return thread_in_block() & (WAVE - 1); }
__device__ __forceinline__ int wave() { return __builtin_amdgcn_readfirstlane(thread_in_block() / WAVE); }
__device__ __forceinline__ int block() { return static_cast<int>(__builtin_amdgcn_workgroup_id_x()); }
__device__ __forceinline__ int blocks() {
    return static_cast<int>(__builtin_amdgcn_grid_size_x() / __builtin_amdgcn_workgroup_size_x());
}

__device__ __forceinline__ void barrier() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
/* A barrier for shared memory alone: what the wave has stored is there and what it has read has come; its loads may be on
 * their way. */
__device__ __forceinline__ void meet() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
    __builtin_amdgcn_sched_barrier(0);
    __builtin_amdgcn_s_waitcnt(0xc07f); /* lgkmcnt(0) */
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_sched_barrier(0);
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}
__device__ __forceinline__ void keep_order() { __builtin_amdgcn_sched_barrier(0); }
/* Within one wave the LDS executes in order; only the compiler must keep it. */
__device__ __forceinline__ void wave_sync() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
    __builtin_amdgcn_wave_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}

__device__ __forceinline__ float exp2(float x) { return __builtin_amdgcn_exp2f(x); }
__device__ __forceinline__ float log2(float x) { return __builtin_amdgcn_logf(x); }
__device__ __forceinline__ float reciprocal(float x) { return __builtin_amdgcn_rcpf(x); }
__device__ __forceinline__ float approximate_reciprocal(float x) { return reciprocal(x); }

__device__ __forceinline__ uint64_t ballot(bool condition) {
    return __builtin_amdgcn_uicmp(static_cast<int>(condition), 0, 33 /* != */);
}
__device__ __forceinline__ int first_lane(uint64_t lanes) { return __builtin_ctzll(lanes); }
__device__ __forceinline__ bool wave_any(bool condition) { return ballot(condition) != 0; }

__device__ __forceinline__ float from_lane(float x, int source) {
    return __builtin_bit_cast(float, __builtin_amdgcn_ds_bpermute(source * 4, __builtin_bit_cast(int, x)));
}
__device__ __forceinline__ int from_lane(int x, int source) { return __builtin_amdgcn_ds_bpermute(source * 4, x); }
__device__ __forceinline__ float exchange_halves(float x) { return from_lane(x, lane() ^ 32); }

template <class T> __device__ __forceinline__ T wave_sum(T x) {
#pragma unroll
    for (int distance = 1; distance < WAVE; distance *= 2) x += from_lane(x, lane() ^ distance);
    return x;
}
template <int LANES = LANES_PER_ROW> __device__ __forceinline__ float row_max(float x) {
    if constexpr (LANES == 4) x = __builtin_fmaxf(x, from_lane(x, lane() ^ 16));
    return __builtin_fmaxf(x, exchange_halves(x));
}
template <int LANES = LANES_PER_ROW> __device__ __forceinline__ float row_sum(float x) {
    if constexpr (LANES == 4) x += from_lane(x, lane() ^ 16);
    return x + exchange_halves(x);
}

__device__ __forceinline__ bool lane_leads_row() { return lane() < 32; }

__device__ __forceinline__ int uniform(int x) { return __builtin_amdgcn_readfirstlane(x); }
template <class T> __device__ __forceinline__ T opaque(T x) {
    asm volatile("" : "+v"(x));
    return x;
}
template <class T> __device__ __forceinline__ T opaque_scalar(T x) {
    asm volatile("" : "+s"(x));
    return x;
}

/* The kernel's first parameter, once more: what is read from it then need not be kept in registers until then. */
template <class T> __device__ __forceinline__ const T &reread(const T &) {
    auto parameters = (const __attribute__((address_space(4))) char *)__builtin_amdgcn_kernarg_segment_ptr();
    asm volatile("" : "+s"(parameters));
    return *(const T *)parameters;
}

/* ---- shared memory (LDS) ---- */

typedef uint32_t SharedAddress;
template <class T> using LdsPointer = __attribute__((address_space(3))) T *;

__device__ __forceinline__ SharedAddress shared_address(void *pointer) {
    return static_cast<SharedAddress>(reinterpret_cast<uintptr_t>((LdsPointer<char>)pointer));
}
template <class T> __device__ __forceinline__ T *shared_pointer(SharedAddress address) {
    return (T *)reinterpret_cast<LdsPointer<T>>(static_cast<uintptr_t>(address));
}
template <class T> __device__ __forceinline__ T shared_load(SharedAddress address) {
    return *reinterpret_cast<LdsPointer<T>>(static_cast<uintptr_t>(address));
}
template <class T> __device__ __forceinline__ void shared_store(SharedAddress address, T value) {
    *reinterpret_cast<LdsPointer<T>>(static_cast<uintptr_t>(address)) = value;
}

/* ---- global memory: said so, as the compiler takes a pointer that may be null for one into any memory ---- */

template <class T> __device__ __forceinline__ T global_load(const void *pointer) {
    return *(const __attribute__((address_space(1))) T *)pointer;
}
template <class T> __device__ __forceinline__ void global_store(void *pointer, T value) {
    *(__attribute__((address_space(1))) T *)pointer = value;
}
template <class T> __device__ __forceinline__ T l2_load(const T *pointer) { return global_load<T>(pointer); }
template <class T> __device__ __forceinline__ void l2_store(T *pointer, T value) { global_store(pointer, value); }

/* Tiles in shared memory permute their 16-byte chunks by exclusive or, within lines that hold all banks once: 128 bytes
 * of 32 banks, on gfx950 256 bytes of 64. A read of 16 bytes a lane is served to 8 (16) lanes at a time, of which
 * gfx950 takes 0-3 12-15 20-27 together, so numbers that differ modulo 16 must be told apart, not just neighbours. */
#if defined(AITER_GFX950)
constexpr int LINE_CHUNKS = 16;
#else
constexpr int LINE_CHUNKS = 8;
#endif

/* The address `offset` further on, where `base` and `offset` are places in one layout: their bits within a line are
 * exclusive-ored, as the layouts are linear in them, the rest is added. */
__device__ __forceinline__ SharedAddress further(SharedAddress base, uint32_t offset) {
    constexpr uint32_t WITHIN = LINE_CHUNKS * 16 - 1;
    return (base ^ (offset & WITHIN)) + (offset & ~WITHIN);
}

/* Rows of HEAD_DIM elements, padded to whole lines or, up to 64 of them, to 128 bytes: two rows to a line of gfx950. */
template <int HEAD_DIM> struct RowLayout {
    static constexpr int BYTES = round_up(HEAD_DIM, HEAD_DIM <= 64 ? 64 : LINE_CHUNKS * 8) * 2;
    static __host__ __device__ constexpr uint32_t chunk(int row, int chunk) {
        const int turn = BYTES / 16 < LINE_CHUNKS ? row / 2 % 8 ^ row / 8 % 2 * 8 : row % LINE_CHUNKS;
        return static_cast<uint32_t>(((row * (BYTES / 16) + chunk) ^ turn) << 4);
    }
};

/* ---- elements ---- */

/* Eight and four elements of keys and values as they lie in memory, and the elements that they are. */
#if AITER_FP8_CACHE
typedef u32x2 Eight;
typedef uint32_t Four;
__device__ __forceinline__ u32x4 elements_of(u32x2 eight) {
    const u32x2 first = elements_of(eight.x), second = elements_of(eight.y);
    return {first.x, first.y, second.x, second.y};
}
#else
typedef u32x4 Eight;
typedef u32x2 Four;
__device__ __forceinline__ u32x2 elements_of(u32x2 four) { return four; }
#endif
__device__ __forceinline__ u32x4 elements_of(u32x4 eight) { return eight; }

/* The low or the high halves of two words, that of `x` in the low one. */
__device__ __forceinline__ uint32_t join_halves(uint32_t x, uint32_t y, bool high) {
    return __builtin_amdgcn_perm(y, x, high ? 0x07060302u : 0x05040100u);
}

#if defined(AITER_DTYPE_BF16)
__device__ __forceinline__ float to_float(Element bits) {
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
}
#if defined(__gfx950__)
__device__ __forceinline__ uint32_t to_elements(float x, float y) {
    typedef __bf16 bf16x2 __attribute__((ext_vector_type(2)));
    bf16x2 pair = {static_cast<__bf16>(x), static_cast<__bf16>(y)};
    return __builtin_bit_cast(uint32_t, pair);
}
#else
/* To nearest, ties away from zero: one addition each and a byte permute. A NaN that came from 16-bit inputs has zeros
 * in its low half, as has the one that the hardware makes, and those of 32-bit ones go through usual_nan(): so the addition
 * never carries out of it. */
__device__ __forceinline__ uint32_t to_elements(float x, float y) {
    const uint32_t a = __builtin_bit_cast(uint32_t, x) + 0x8000u, b = __builtin_bit_cast(uint32_t, y) + 0x8000u;
    return join_halves(a, b, true);
}
#endif
#else
__device__ __forceinline__ float to_float(Element bits) {
    return static_cast<float>(__builtin_bit_cast(_Float16, bits));
}
__device__ __forceinline__ uint32_t to_elements(float x, float y) {
    typedef _Float16 f16x2 __attribute__((ext_vector_type(2)));
    f16x2 pair = {static_cast<_Float16>(x), static_cast<_Float16>(y)};
    return __builtin_bit_cast(uint32_t, pair);
}
#endif
__device__ __forceinline__ Element to_element(float x) { return static_cast<Element>(to_elements(x, x)); }
__device__ __forceinline__ float usual_nan(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x); /* compared as such: else the compiler may leave it out */
    return __builtin_bit_cast(float, (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : bits);
}

} // namespace aiter

#endif
