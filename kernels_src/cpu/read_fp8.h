/* Keys and values of 8 bits, as they are read: exactly, each to the float or bf16 that it is.
 *
 *   normal      s eeee mmm  ->  s 0000eeee mmm0000..., and the difference of the biases is added to the exponent
 *   subnormal   a small whole number of last places: converted as that or, among lanes of 16 bits, looked up
 *
 * Each function that takes a pointer here has a namesake for Element, or its caller has a form for that. */
#ifndef AITER_CPU_READ_FP8_H
#define AITER_CPU_READ_FP8_H

#include "fp8.h"
#include "simd.h"

#if !AITER_FP8_CACHE
typedef Element Cached; /* an element of keys and values in memory */
#else
typedef Fp8 Cached;

/* The bits of a bf16 and so many more in each lane, of a byte in it, given what it would be as a subnormal number. */
template <int MORE, class V> AITER_INLINE V to_bits(V bytes, V subnormal) {
    const V magnitude = bytes & 0x7f, sign = (bytes & 0x80) << (8 + MORE);
    const V normal = (magnitude << (MORE + 7 - FP8_MANTISSA)) + ((127 - FP8_BIAS) << (MORE + 7));
    const V finite = magnitude < (1 << FP8_MANTISSA) ? subnormal : normal;
#if defined(AITER_E4M3FN)
    return (magnitude == 0x7f ? V{} + (0x7fc0 << MORE) : finite) | sign;
#elif defined(AITER_E4M3FNUZ)
    return (bytes == 0x80 ? V{} + (0x7fc0 << MORE) : finite) | sign;
#else
    return (magnitude >= 0x7c ? finite | (0x7f80 << MORE) : finite) | sign; /* infinities, and NaN */
#endif
}

/* The smallest number, as bf16. */
constexpr uint16_t FP8_LEAST = (128 - FP8_BIAS - FP8_MANTISSA) << 7;

AITER_INLINE Vec to_floats(IntVec bytes) {
    const Vec least = (Vec)broadcast(FP8_LEAST << 16);
    return (Vec)to_bits<16>(bytes, (IntVec)(__builtin_convertvector(bytes & 0x7f, Vec) * least));
}

/* The first `count` bytes at p, one to a lane; zeros past them. */
AITER_INLINE IntVec load_bytes(const Fp8 *p, int count) {
    typedef uint8_t Bytes __attribute__((vector_size(LANES)));
    Bytes bytes = {};
    if (count >= LANES) memcpy(&bytes, p, sizeof bytes);
    else if (count > 0) memcpy(&bytes, p, count % LANES);
#if AITER_AVX512
    return (IntVec)_mm512_maskz_cvtepu8_epi32(ALL_LANES, (__m128i)bytes);
#elif AITER_AVX2
    return (IntVec)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)bytes));
#else
    return __builtin_convertvector(bytes, IntVec);
#endif
}

/* The first `count` elements at p, zeros in the other lanes; nothing past them is read. */
AITER_INLINE Vec to_floats(const Fp8 *p, int count) { return to_floats(load_bytes(p, count)); }

#if !AITER_DTYPE_FP32
/* The first `count` elements at p, up to 2 LANES, as 16 bits, two to a lane; zeros past them. */
AITER_INLINE IntVec element_pairs(const Fp8 *p, int count) {
#if AITER_DTYPE_BF16 && AITER_AVX512 /* in lanes of 16 bits: half of the instructions */
    typedef uint16_t Elements __attribute__((vector_size(sizeof(IntVec))));
    /* 0 to 7 times the smallest */
    const Elements subnormal = FP8_LEAST + Elements{0x10000 - FP8_LEAST, 0, 0x80, 0xc0, 0x100, 0x120, 0x140, 0x160};
    __m256i bytes = {};
    if (count >= 2 * LANES) memcpy(&bytes, p, sizeof bytes);
    else if (count > 0) memcpy(&bytes, p, count % (2 * LANES));
    const Elements wide = (Elements)_mm512_maskz_cvtepu8_epi16(~__mmask32{}, bytes);
    return (IntVec)to_bits<0>(wide, (Elements)_mm512_permutexvar_epi16((__m512i)wide, (__m512i)subnormal));
#else
    HalfVec bytes = HalfVec{};
    if (count >= 2 * LANES) memcpy(&bytes, p, sizeof bytes);
    else if (count > 0) memcpy(&bytes, p, count % (2 * LANES));
    const IntVec pairs = widen(bytes);
    const Vec even = to_floats(pairs & 0xff), odd = to_floats(pairs >> 8);
#if AITER_DTYPE_BF16
    return ((IntVec)even >> 16 & 0xffff) | ((IntVec)odd & static_cast<int32_t>(0xffff0000));
#else
    return widen(to_elements(even)) | widen(to_elements(odd)) << 16;
#endif
#endif
}
#endif
#endif

#endif
