/* Floats of 8 bits, which keys and values may be kept in: their formats, and how a float becomes one. How they are read
 * again is in cpu/read_fp8.h and gpu/read_fp8.h.
 *
 *   AITER_E4M3FN     s eeee mmm   bias 7    to 448     no infinities; NaN is 0x7f, 0xff
 *   AITER_E4M3FNUZ   s eeee mmm   bias 8    to 240     no infinities, no negative zero; NaN is 0x80
 *   AITER_E5M2       s eeeee mm   bias 15   to 57344   as fp16, whose upper half it is
 *
 * Each number is one of fp16 and of bf16 too. (OCP 8-bit Floating Point Specification; for fnuz: Noune et al., 2022,
 * https://arxiv.org/abs/2206.02915.) */
#ifndef AITER_FP8_H
#define AITER_FP8_H

#include <stdint.h>

#if defined(__HIP__) || defined(__CUDACC__)
#define AITER_MEMBER __host__ __device__ __forceinline__
#define AITER_BOTH AITER_MEMBER
#else
#define AITER_MEMBER inline
#define AITER_BOTH static inline
#endif

#if defined(AITER_E4M3FN) || defined(AITER_E4M3FNUZ) || defined(AITER_E5M2)
#define AITER_FP8_CACHE 1

struct Fp8 {
    uint8_t bits;
};

#if defined(AITER_E4M3FN)
constexpr int FP8_MANTISSA = 3, FP8_BIAS = 7;
constexpr uint32_t FP8_LARGEST = 0x43e00000, FP8_NAN = 0x7f; /* the former as a float */
constexpr bool FP8_SIGNED_ZERO = true;                       /* there is a negative zero, and NaN has a sign */
#elif defined(AITER_E4M3FNUZ)
constexpr int FP8_MANTISSA = 3, FP8_BIAS = 8;
constexpr uint32_t FP8_LARGEST = 0x43700000, FP8_NAN = 0x80;
constexpr bool FP8_SIGNED_ZERO = false;
#else
constexpr int FP8_MANTISSA = 2, FP8_BIAS = 15;
constexpr uint32_t FP8_LARGEST = 0x47600000, FP8_NAN = 0x7f;
constexpr bool FP8_SIGNED_ZERO = true;
#endif

/* To nearest even; what is beyond the largest number, infinities too, becomes that; NaN stays NaN. By bits, as half of
 * the chips have no instruction for it. */
AITER_BOTH Fp8 to_fp8(float x) {
    constexpr uint32_t SHIFT = 23 - FP8_MANTISSA;
    uint32_t bits, result;
    __builtin_memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 24 & 0x80;
    uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return {static_cast<uint8_t>(FP8_SIGNED_ZERO ? FP8_NAN | sign : FP8_NAN)};
    if (magnitude > FP8_LARGEST) magnitude = FP8_LARGEST;
    if (magnitude < (128u - FP8_BIAS) << 23) { /* subnormal: adding this makes the float round at the last place */
        const uint32_t magic = (128u - FP8_BIAS + SHIFT) << 23;
        float sum, step;
        __builtin_memcpy(&sum, &magnitude, sizeof sum);
        __builtin_memcpy(&step, &magic, sizeof step);
        sum += step;
        __builtin_memcpy(&result, &sum, sizeof result);
        result -= magic;
    } else {
        const uint32_t odd = magnitude >> SHIFT & 1;
        result = ((magnitude + (1u << (SHIFT - 1)) - 1 + odd) >> SHIFT) - ((127u - FP8_BIAS) << FP8_MANTISSA);
    }
    return {static_cast<uint8_t>(FP8_SIGNED_ZERO || result ? result | sign : 0)};
}
#else
#define AITER_FP8_CACHE 0
#endif

#endif
