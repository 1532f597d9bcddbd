/* NVIDIA sm_90a: wgmma, with which four waves (a warpgroup) multiply 64 rows by tiles in shared memory while they go
 *on. 
 * The results and the operands in registers have the layout of mma.sync (arch/sm80.h): wave w of the four has rows
 * 16 w ... 16 w + 15. Matrices in shared memory are blocks of rows of 128 bytes with the 128-byte swizzle, 1024-byte
 * aligned (PTX ISA, "Matrix descriptor" and "Shared memory layouts" of wgmma); the distance from eight rows to the next
 * eight is 1024 bytes, and 16 columns further on is 32 bytes, swizzled or not. */
#ifndef AITER_GPU_ARCH_SM90_H
#define AITER_GPU_ARCH_SM90_H

/* The list is known to the host's half of a compilation too, which must come to the same answer. */
#if defined(__CUDA_ARCH_LIST__)
#if __CUDA_ARCH_LIST__ >= 900 && __CUDA_ARCH_LIST__ < 1000
#define AITER_WGMMA 1
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "build for sm_90a, not sm_90"
#endif
#endif
#endif

#if defined(AITER_WGMMA)
namespace aiter {
namespace wgmma {

#if defined(AITER_DTYPE_BF16)
#define AITER_WGMMA_64X64X16 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
#else
#define AITER_WGMMA_64X64X16 "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
#endif
#define AITER_WGMMA_RESULT                                                                                             \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "  \
    "%24, %25, %26, %27, %28, %29, %30, %31}"
#define AITER_WGMMA_TILE(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define AITER_WGMMA_TILES                                                                                              \
    AITER_WGMMA_TILE(0), AITER_WGMMA_TILE(1), AITER_WGMMA_TILE(2), AITER_WGMMA_TILE(3), AITER_WGMMA_TILE(4),           \
        AITER_WGMMA_TILE(5), AITER_WGMMA_TILE(6), AITER_WGMMA_TILE(7)

__device__ __forceinline__ uint64_t matrix(SharedAddress address) {
    constexpr uint64_t SWIZZLE_128 = uint64_t(1) << 62, EIGHT_ROWS = uint64_t(1024 / 16) << 32, UNUSED = 1 << 16;
    return SWIZZLE_128 | EIGHT_ROWS | UNUSED | (address >> 4);
}

/* Writes to shared memory by this thread become visible to wgmma; a barrier must follow. */
__device__ __forceinline__ void shared_is_written() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int OUTSTANDING> __device__ __forceinline__ void wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(OUTSTANDING) : "memory");
}
/* The value of x is not known before this point. */
__device__ __forceinline__ void changed(float &x) { asm volatile("" : "+f"(x)::"memory"); }

/* c (64 x 64) = or += A (64 x 16) B^T, with B (64 x 16); both in shared memory by rows. */
__device__ __forceinline__ void multiply(float (*c)[4], uint64_t a, uint64_t b, bool add) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n" AITER_WGMMA_64X64X16 AITER_WGMMA_RESULT
                 ", %32, %33, add, 1, 1, 0, 0;\n}"
                 : AITER_WGMMA_TILES
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

/* The same with A in registers. */
__device__ __forceinline__ void multiply(float (*c)[4], const uint32_t (&a)[4], uint64_t b, bool add) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n" AITER_WGMMA_64X64X16 AITER_WGMMA_RESULT
                 ", {%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}"
                 : AITER_WGMMA_TILES
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}

/* c (64 x 64) += A (64 x 16, in registers) B, with B (16 x 64) in shared memory by rows. */
__device__ __forceinline__ void multiply_transposed(float (*c)[4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n" AITER_WGMMA_64X64X16 AITER_WGMMA_RESULT
                 ", {%32, %33, %34, %35}, %36, add, 1, 1, 1;\n}"
                 : AITER_WGMMA_TILES
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

} // namespace wgmma

/* Barriers in shared memory on which some threads arrive and others wait, phase after phase (PTX ISA, "mbarrier"). */
namespace mbarrier {

__device__ __forceinline__ void make(SharedAddress at, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(SharedAddress at) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(at) : "memory");
}
/* As soon as all copies that this thread has begun (cp.async) are there. */
__device__ __forceinline__ void arrive_after_copies(SharedAddress at) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(at) : "memory");
}
/* Until the phase of this parity is complete; the phase before the first one, of parity 1, is. */
__device__ __forceinline__ void wait(SharedAddress at, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
            at),
        "r"(parity)
        : "memory");
}

} // namespace mbarrier
} // namespace aiter
#endif

#endif
