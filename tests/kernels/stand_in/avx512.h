/* AVX-512 and AVX512-BF16 in plain C++ and AVX2, as far as the CPU kernels use them, so that tests run on any CPU with
 * AVX2 what is written for those that have more. Included before everything else (see g++ beside this file).
 *
 * Each function is named after its instruction and does what Intel's Software Developer's Manual says under that name,
 * with MXCSR as a process finds it. What the kernels never ask for (masked lanes, other rounding) ends the process.
 */
#ifndef STAND_IN_AVX512_H
#define STAND_IN_AVX512_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The kernels choose by these; immintrin.h, which would too, is done with. */
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1

namespace stand_in {

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t HalfWords __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

inline void require(bool met, const char *what) {
    if (met) return;
    fprintf(stderr, "stand-in for AVX-512 and AMX: %s\n", what);
    abort();
}

inline void require_all(__mmask16 mask) { require(mask == 0xffff, "masked lanes are not implemented"); }

inline __m256 half(Floats v, int i) {
    __m256 h;
    memcpy(&h, reinterpret_cast<const char *>(&v) + i * sizeof h, sizeof h);
    return h;
}

inline Floats join(__m256 low, __m256 high) {
    const __m256 halves[2] = {low, high};
    Floats v;
    memcpy(&v, halves, sizeof v);
    return v;
}

/* ---- AVX-512 F, BW, DQ ---- */

inline __m512i vpmovzxwd(__mmask16 mask, __m256i a) {
    require_all(mask);
    return (__m512i)__builtin_convertvector((HalfWords)a, Ints);
}

inline __m512i vpmuludq(__mmask8 mask, __m512i a, __m512i b) {
    require(mask == 0xff, "masked lanes are not implemented");
    typedef uint64_t Longs __attribute__((vector_size(4 * LANES)));
    return (__m512i)(((Longs)a & 0xffffffffu) * ((Longs)b & 0xffffffffu));
}

inline __m512i vpmovzxbd(__mmask16 mask, __m128i a) {
    require_all(mask);
    return (__m512i)__builtin_convertvector((Bytes)a, Ints);
}

inline __m512i vpmovzxbw(__mmask32 mask, __m256i a) {
    require(mask == ~__mmask32{}, "VPMOVZXBW is implemented without a mask only");
    typedef uint8_t Both __attribute__((vector_size(2 * LANES)));
    typedef uint16_t Wide __attribute__((vector_size(4 * LANES)));
    return (__m512i)__builtin_convertvector((Both)a, Wide);
}

inline __m512 vmaxps(__mmask16 mask, Floats a, Floats b) { /* b where they are not comparable, or both zero */
    require_all(mask);
    return a > b ? a : b;
}

inline __mmask16 vpmovd2m(__m512i a) {
    int signs = 0;
    for (int i = 0; i < LANES; i++) signs |= (((Ints)a)[i] < 0) << i;
    return static_cast<__mmask16>(signs);
}

/* a - floor(a), to the nearest float as Intel's CPUs round it (AMD's: down); -0 where that is zero, 0 for infinities. */
inline __m512 vreduceps(__mmask16 mask, Floats a, int control) {
    require_all(mask);
    require(control == (_MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC), "VREDUCEPS is implemented for rounding down only");
    const Floats rest = a - join(_mm256_floor_ps(half(a, 0)), _mm256_floor_ps(half(a, 1)));
    const Floats magnitude = (Floats)((Ints)a & 0x7fffffff);
    return magnitude == INFINITY ? Floats{} : rest == 0.0f ? -Floats{} : rest;
}

/* a 2^floor(b), rounded once; a quiet NaN in `a` gives way to an infinite `b`, a signalling one does not. */
inline float vscalefps(float a, float b) {
    uint32_t bits;
    memcpy(&bits, &a, sizeof bits);
    const bool quiet = bits >> 22 & 1;
    if (isnan(a) && !(quiet && isinf(b))) return NAN;
    if (isnan(b)) return b;
    if (isinf(b) && (b > 0 ? a == 0 : isinf(a))) return NAN;
    if (isnan(a)) return b > 0 ? INFINITY : 0.0f;
    const int exponent = static_cast<int>(fmaxf(fminf(floorf(b), 1000.0f), -1000.0f));
    return static_cast<float>(ldexp(static_cast<double>(a), exponent < -500 ? -500 : exponent));
}

inline __m512 vscalefps(__mmask16 mask, Floats a, Floats b) {
    require_all(mask);
    for (int i = 0; i < LANES; i++) a[i] = vscalefps(a[i], b[i]);
    return a;
}

inline __m512 vcvtph2ps(__mmask16 mask, __m256i a) {
    require_all(mask);
    return join(_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}

inline __m256i vcvtps2ph(__mmask16 mask, Floats a, int control) {
    require_all(mask);
    require(control == _MM_FROUND_TO_NEAREST_INT, "VCVTPS2PH is implemented for rounding to nearest only");
    return _mm256_set_m128i(_mm256_cvtps_ph(half(a, 1), _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(half(a, 0), _MM_FROUND_TO_NEAREST_INT));
}

typedef uint16_t Words[2 * LANES];

inline __m512i vmovdqu16(__mmask32 mask, const void *p) { /* what is masked is not read either */
    Words words = {};
    for (int i = 0; i < 2 * LANES; i++)
        if (mask >> i & 1) memcpy(&words[i], static_cast<const uint16_t *>(p) + i, sizeof words[i]);
    __m512i v;
    memcpy(&v, words, sizeof v);
    return v;
}

template <class... Values>
inline __m512i set_words(Values... from_the_last) {
    const uint16_t reversed[] = {static_cast<uint16_t>(from_the_last)...};
    Words words;
    for (int i = 0; i < 2 * LANES; i++) words[i] = reversed[2 * LANES - 1 - i];
    __m512i v;
    memcpy(&v, words, sizeof v);
    return v;
}

inline __m512i vpermw(__m512i order, __m512i a) {
    Words indices, from, to;
    memcpy(indices, &order, sizeof order);
    memcpy(from, &a, sizeof a);
    for (int i = 0; i < 2 * LANES; i++) to[i] = from[indices[i] % (2 * LANES)];
    memcpy(&a, to, sizeof a);
    return a;
}

/* ---- AVX512-BF16: denormals are zeros, those that come in and those that would go out; MXCSR has no say ---- */

inline Floats flush(Floats a) {
    const Ints bits = (Ints)a;
    return (Floats)((bits & 0x7f800000) == 0 ? bits & INT32_MIN : bits);
}

inline Floats fma(Floats a, Floats b, Floats c) {
    a = flush(a), b = flush(b), c = flush(c);
    return flush(join(_mm256_fmadd_ps(half(a, 0), half(b, 0), half(c, 0)), _mm256_fmadd_ps(half(a, 1), half(b, 1), half(c, 1))));
}

/* Elements 2i and 2i + 1 of what holds 16 pairs of bf16. */
inline Floats low_bf16(Ints pairs) { return (Floats)(pairs << 16); }
inline Floats high_bf16(Ints pairs) { return (Floats)(pairs & static_cast<int32_t>(0xffff0000)); }

__attribute__((noinline)) inline __m512 vdpbf16ps(Floats total, __m512bh a, __m512bh b) { /* the upper element first, each sum rounded */
    total = fma(high_bf16((Ints)a), high_bf16((Ints)b), total);
    return fma(low_bf16((Ints)a), low_bf16((Ints)b), total);
}

inline Ints to_bf16(Floats a) { /* to nearest even; NaN stays NaN and becomes quiet */
    const Ints bits = (Ints)flush(a), rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return ((a == a ? rounded : bits | 0x400000) >> 16) & 0xffff;
}

inline __m512bh vcvtne2ps2bf16(Floats upper, Floats lower) {
    const HalfWords halves[2] = {__builtin_convertvector(to_bf16(lower), HalfWords), __builtin_convertvector(to_bf16(upper), HalfWords)};
    __m512bh v;
    memcpy(&v, halves, sizeof v);
    return v;
}

}  // namespace stand_in

#define _mm512_maskz_cvtepu16_epi32 stand_in::vpmovzxwd
#define _mm512_maskz_mul_epu32 stand_in::vpmuludq
#define _mm512_maskz_cvtepu8_epi32 stand_in::vpmovzxbd
#define _mm512_maskz_cvtepu8_epi16 stand_in::vpmovzxbw
#define _mm512_maskz_max_ps stand_in::vmaxps
#define _mm512_movepi32_mask stand_in::vpmovd2m
#undef _mm512_maskz_reduce_ps
#define _mm512_maskz_reduce_ps stand_in::vreduceps
#define _mm512_maskz_scalef_ps stand_in::vscalefps
#define _mm512_maskz_cvtph_ps stand_in::vcvtph2ps
#undef _mm512_maskz_cvtps_ph
#define _mm512_maskz_cvtps_ph stand_in::vcvtps2ph
#define _mm512_maskz_loadu_epi16 stand_in::vmovdqu16
#define _mm512_set_epi16 stand_in::set_words
#define _mm512_permutexvar_epi16 stand_in::vpermw
#define _mm512_dpbf16_ps stand_in::vdpbf16ps
#define _mm512_cvtne2ps_pbh stand_in::vcvtne2ps2bf16

#endif
