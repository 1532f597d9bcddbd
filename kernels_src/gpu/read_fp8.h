/* Keys and values of 8 bits, as they are read: on their way to the matrix unit each becomes the 16-bit element that it
 * is, exactly. Four at a time, as they lie in a register:
 *
 *   native      v_cvt_pk_f32_fp8 / bf8  e4m3fnuz on gfx942; e4m3fn and, for bf16, e5m2 on gfx950
 *               cvt.f16x2.e4m3x2        e4m3fn on NVIDIA from sm_89 on
 *   else        each byte moves to the upper half of 16 bits. So e5m2 is an fp16. Of e4m3, with the exponent moved on by
 *               one bit, an fp16 that is 2^-8 (fnuz: 2^-7) of the number; subnormal ones too, which the product makes
 *               normal. NaN is told apart by a carry.
 *
 * What comes as fp16 and is to be bf16 goes through a float. */
#ifndef AITER_GPU_READ_FP8_H
#define AITER_GPU_READ_FP8_H

#include "gpu/runtime.h"
#include "gpu/target.h"

namespace aiter {

#if AITER_FP8_CACHE

/* Elements of 16 bits: the first and second, the third and fourth. */
#if defined(AITER_GFX9)
typedef uint32_t TwoPairs __attribute__((ext_vector_type(2)));
#else
typedef uint2 TwoPairs;
#endif

/* The low (or high) two bytes of x as the upper halves of 16 bits each. */
__device__ __forceinline__ uint32_t spread(uint32_t x, bool high) {
#if defined(AITER_GFX9)
    return __builtin_amdgcn_perm(0, x, high ? 0x030c020cu : 0x010c000cu);
#else
    return __byte_perm(x, 0, high ? 0x3424 : 0x1404);
#endif
}

/* Pairs of fp16: times a power of two; the first and the second as floats. */
#if defined(AITER_GFX9)
typedef _Float16 HalfPair __attribute__((ext_vector_type(2)));
__device__ __forceinline__ uint32_t times(uint32_t halves, float factor) {
    return __builtin_bit_cast(uint32_t, __builtin_bit_cast(HalfPair, halves) * HalfPair(static_cast<_Float16>(factor)));
}
__device__ __forceinline__ float first_half(uint32_t halves) {
    return static_cast<float>(__builtin_bit_cast(HalfPair, halves).x);
}
__device__ __forceinline__ float second_half(uint32_t halves) {
    return static_cast<float>(__builtin_bit_cast(HalfPair, halves).y);
}
#else
__device__ __forceinline__ uint32_t times(uint32_t halves, float factor) {
    uint32_t result;
    asm("{\n.reg .b16 f;\n.reg .b32 both;\ncvt.rn.f16.f32 f, %2;\nmov.b32 both, {f, f};\nmul.f16x2 %0, %1, both;\n}"
        : "=r"(result)
        : "r"(halves), "f"(factor));
    return result;
}
__device__ __forceinline__ float first_half(uint32_t halves) {
    float x;
    asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %1;\ncvt.f32.f16 %0, a;\n}" : "=f"(x) : "r"(halves));
    return x;
}
__device__ __forceinline__ float second_half(uint32_t halves) {
    float x;
    asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %1;\ncvt.f32.f16 %0, b;\n}" : "=f"(x) : "r"(halves));
    return x;
}
#endif

/* Two of the four bytes as fp16. */
__device__ __forceinline__ uint32_t to_halves(uint32_t x, bool high) {
#if defined(AITER_E4M3FN) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    const uint16_t two = static_cast<uint16_t>(high ? x >> 16 : x);
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(two));
    return halves;
#elif defined(AITER_E5M2)
    return spread(x, high);
#else
    const uint32_t upper = spread(x, high), sign = upper & 0x80008000u, small = (upper & 0x7f007f00u) >> 1;
    const uint32_t number = times(small, static_cast<float>(1 << (15 - FP8_BIAS)));
#if defined(AITER_E4M3FN)
    const uint32_t all_ones = (small + 0x00800080u) & 0x40004000u;
    const uint32_t nan = (all_ones << 1) - (all_ones >> 6); /* 0x7f00 */
#else
    const uint32_t minus_zero = sign & ~(small + 0x7fff7fffu), nan = minus_zero - (minus_zero >> 8); /* 0x7f80 */
#endif
    return number | sign | nan;
#endif
}

/* Two floats that are numbers of the element's type, or NaN, as elements. */
__device__ __forceinline__ uint32_t pair_of(float x, float y) {
#if defined(AITER_GFX9) && defined(AITER_DTYPE_BF16)
    return __builtin_amdgcn_perm(__builtin_bit_cast(uint32_t, y), __builtin_bit_cast(uint32_t, x), 0x07060302u);
#elif defined(AITER_GFX9)
    return __builtin_bit_cast(uint32_t, __builtin_amdgcn_cvt_pkrtz(x, y));
#else
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
    return pair;
#endif
}

__device__ __forceinline__ TwoPairs elements_of(uint32_t four) {
#if defined(AITER_E4M3FNUZ) && defined(__gfx942__) || defined(AITER_E4M3FN) && defined(__gfx950__)
    const auto low = __builtin_amdgcn_cvt_pk_f32_fp8(four, false), high = __builtin_amdgcn_cvt_pk_f32_fp8(four, true);
    return {pair_of(low[0], low[1]), pair_of(high[0], high[1])};
#elif defined(AITER_E5M2) && defined(__gfx950__) && defined(AITER_DTYPE_BF16)
    const auto low = __builtin_amdgcn_cvt_pk_f32_bf8(four, false), high = __builtin_amdgcn_cvt_pk_f32_bf8(four, true);
    return {pair_of(low[0], low[1]), pair_of(high[0], high[1])};
#else
    const uint32_t low = to_halves(four, false), high = to_halves(four, true);
#if defined(AITER_DTYPE_FP16)
    return {low, high};
#else
    return {pair_of(first_half(low), second_half(low)), pair_of(first_half(high), second_half(high))};
#endif
#endif
}

__device__ __forceinline__ float to_float(Fp8 x) { return first_half(to_halves(x.bits, false)); }

#endif

} // namespace aiter

#endif
