/* What a kernel is built for, known to the device's and to the host's half of the compilation alike: the arch with its
 * limits, and the options of the spec. This file alone asks which arch it is; others ask for
 *
 *   AITER_GFX9       AMD CDNA, with AITER_GFX90A, AITER_GFX942 or AITER_GFX950      arch/gfx9*.h
 *   else             NVIDIA from Ampere on, with mma.sync                             arch/sm80*.h
 *   AITER_WGMMA      sm_90a, which has wgmma besides                                  arch/sm80*.h, arch/sm90*.h */
#ifndef AITER_GPU_TARGET_H
#define AITER_GPU_TARGET_H

#include <stdint.h>

#include "fp8.h"

/* ---- the arch ---- */

#if defined(__HIP__)
#define AITER_GFX9 1
/* clang names the arch to the device's half only; the build names it to both. */
#if !defined(AITER_GFX90A) && !defined(AITER_GFX942) && !defined(AITER_GFX950)
#error "name the arch: -DAITER_GFX90A=1, -DAITER_GFX942=1 or -DAITER_GFX950=1 beside --offload-arch"
#endif
#if defined(__HIP_DEVICE_COMPILE__) &&                                                                                 \
    !(defined(__gfx90a__) && defined(AITER_GFX90A) || defined(__gfx942__) && defined(AITER_GFX942) ||                  \
      defined(__gfx950__) && defined(AITER_GFX950))
#error "--offload-arch and -DAITER_GFX... name different archs"
#endif
#elif defined(__CUDA_ARCH_LIST__)
#if __CUDA_ARCH_LIST__ >= 900 && __CUDA_ARCH_LIST__ < 1000 && !defined(AITER_WITHOUT_WGMMA) /* to try sm_80's loops */
#define AITER_WGMMA 1
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "build for sm_90a, not sm_90"
#endif
#endif
#else
#error "hipcc or nvcc builds this"
#endif

namespace aiter {

/* Shared memory (LDS) that one block can have, in bytes. NVIDIA: "Technical Specifications per Compute Capability". */
#if defined(AITER_GFX950)
constexpr int SHARED_LIMIT = 160 * 1024;
#elif defined(AITER_GFX9)
constexpr int SHARED_LIMIT = 64 * 1024;
#else
constexpr int CUDA_ARCH = __CUDA_ARCH_LIST__; /* 800, 900: one at a time is built for */
constexpr int shared_limit(int arch) {
    return (arch == 800 || arch == 870 ? 163 : arch >= 900 && arch < 1200 ? 227 : 99) * 1024;
}
constexpr int SHARED_LIMIT = shared_limit(CUDA_ARCH);
#endif

/* ---- the options ---- */

#if defined(AITER_DTYPE_BF16) == defined(AITER_DTYPE_FP16)
#error "a GPU kernel is for one dtype: AITER_DTYPE_BF16 or AITER_DTYPE_FP16"
#endif
#ifndef AITER_VALUE_DIM
#define AITER_VALUE_DIM AITER_HEAD_DIM
#endif
#ifndef AITER_WINDOW
#define AITER_WINDOW 0
#endif
#ifndef AITER_SOFTCAP
#define AITER_SOFTCAP 0
#endif
#ifndef AITER_ALIBI
#define AITER_ALIBI 0
#endif
#ifndef AITER_CHUNK
#define AITER_CHUNK 0
#endif
#ifndef AITER_DROPOUT
#define AITER_DROPOUT 0
#endif
#ifndef AITER_PAGED
#define AITER_PAGED 0
#endif
#ifndef AITER_CUT
#define AITER_CUT 0
#endif
#ifndef AITER_ROUNDS
#define AITER_ROUNDS 0
#endif

constexpr int HEAD_DIM = AITER_HEAD_DIM;   /* of queries and keys */
constexpr int VALUE_DIM = AITER_VALUE_DIM; /* of values and the output */
constexpr bool CAUSAL = AITER_CAUSAL, WINDOW = AITER_WINDOW, SOFTCAP = AITER_SOFTCAP, ALIBI = AITER_ALIBI;
constexpr bool CHUNK = AITER_CHUNK, DROPOUT = AITER_DROPOUT, PAGED = AITER_PAGED;
constexpr bool CUT = AITER_CUT;           /* the keys of a row tile, where that is worth it: pieces.h */
constexpr bool ROUNDS = AITER_ROUNDS;     /* of two tiles, in latent attention: arch/sm90_latent.h */
constexpr bool MASKED = CAUSAL || WINDOW; /* a row may see fewer keys than there are */

constexpr int MOST_DIM = 512;
static_assert(HEAD_DIM > 0 && HEAD_DIM % 8 == 0, "head_dim is a multiple of 8");
static_assert(HEAD_DIM <= MOST_DIM || (HEAD_DIM == 576 && VALUE_DIM == 512),
              "head_dim is at most 512, or 576 with 512");
static_assert(VALUE_DIM > 0 && VALUE_DIM % 8 == 0 && VALUE_DIM <= MOST_DIM, "value_dim is a multiple of 8 up to 512");
static_assert(!(CAUSAL && WINDOW), "a window has its own right edge: it replaces causal");
static_assert(WINDOW || !CHUNK, "chunks go with a window, whose sides may be without limits");

typedef uint16_t Element; /* bits of an fp16 or bf16 */
#if AITER_FP8_CACHE
typedef Fp8 Cached; /* an element of keys and values in memory */
#else
typedef Element Cached;
#endif
constexpr bool FP8 = AITER_FP8_CACHE;
constexpr int CACHED_BYTES = sizeof(Cached);

__host__ __device__ constexpr int round_up(int value, int multiple) {
    return (value + multiple - 1) / multiple * multiple;
}
template <class T> __host__ __device__ constexpr T lesser(T x, T y) { return x < y ? x : y; }
template <class T> __host__ __device__ constexpr T greater(T x, T y) { return x > y ? x : y; }

/* Beyond 256 columns the output of a wave's rows does not fit into its registers: then the waves of a team have the
 * same rows and keys, all compute the scores, and each has its part of the output's columns. That makes three products
 * of two. */
__host__ __device__ constexpr int team_of(int value_dim) { return value_dim > 256 ? 2 : 1; }
__host__ __device__ constexpr int columns_of_wave(int dim, int team) {
    return team == 1 ? dim : round_up(dim / team, 64);
}

} // namespace aiter

#endif
