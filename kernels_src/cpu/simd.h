/* One vector of floats and the few operations on it that the language does not give.
 *
 * Vec is a compiler vector as wide as the CPU level has registers, so + - * / < > and ?: work on it everywhere and
 * a * b + c becomes a fused multiply-add where there is one. Intrinsics appear only where they are faster than what
 * the compiler makes of the plain form.
 */
#ifndef AITER_CPU_SIMD_H
#define AITER_CPU_SIMD_H

#if defined(__clang__) ? __clang_major__ < 14 : !defined(__GNUC__) || __GNUC__ < 11
#error "CPU kernels need g++ 11 or clang++ 14, or a newer one"
#endif

#include <stdint.h>
#include <string.h>

#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define AITER_UNROLL _Pragma("unroll")
#else
#define AITER_UNROLL _Pragma("GCC unroll 32")
#endif
/* Off the fast path, or called once for much work: inlining it would only make builds slower. */
#define AITER_OUTLINE __attribute__((noinline))
#define AITER_INLINE_MEMBER inline __attribute__((always_inline))
#define AITER_INLINE static AITER_INLINE_MEMBER

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define AITER_AVX512 1
constexpr int LANES = 16;
/* The unmasked forms of some intrinsics make g++ 12 warn of an uninitialised value inside its own header. */
constexpr __mmask16 ALL_LANES = 0xffff;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define AITER_AVX2 1
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4))); /* comparisons of Vec give -1 (true) or 0 per lane */
typedef uint16_t HalfVec __attribute__((vector_size(LANES * 2)));

constexpr float INFINITE = __builtin_inff();

AITER_INLINE Vec load(const float *p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
AITER_INLINE IntVec load(const int32_t *p) {
    IntVec v;
    memcpy(&v, p, sizeof v);
    return v;
}
AITER_INLINE void store(float *p, Vec v) { memcpy(p, &v, sizeof v); }
AITER_INLINE void store(int32_t *p, IntVec v) { memcpy(p, &v, sizeof v); }
AITER_INLINE Vec broadcast(float x) { return x - Vec{}; } /* x - 0 folds to x; 0 + x would not */
AITER_INLINE IntVec broadcast(int32_t x) { return IntVec{} + x; }

/* These lanes of a and, counted on from its last one, of b. */
template <int... LANE, class V> AITER_INLINE V shuffle(V a, V b) {
#if __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(a, b, LANE...);
#else /* g++ 11 */
    const decltype(a < b) lanes = {LANE...};
    return __builtin_shuffle(a, b, lanes);
#endif
}

/* A number that a function's argument carries in its type. */
template <int N> struct Constant {
    static constexpr int value = N;
};

/* 0, 1, 2, ... */
AITER_INLINE IntVec lane_index() {
    int32_t lanes[LANES];
    AITER_UNROLL
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    return load(lanes);
}

AITER_INLINE IntVec widen(HalfVec v) {
#if AITER_AVX512
    return (IntVec)_mm512_maskz_cvtepu16_epi32(ALL_LANES, (__m256i)v);
#elif AITER_AVX2
    return (IntVec)_mm256_cvtepu16_epi32((__m128i)v);
#else
    return __builtin_convertvector(v, IntVec);
#endif
}

/* If one of the two is NaN, this is b. */
AITER_INLINE Vec maximum(Vec a, Vec b) {
#if AITER_AVX512
    return _mm512_maskz_max_ps(ALL_LANES, a, b);
#else
    return a > b ? a : b;
#endif
}

/* The next smaller whole number, of the size of an int32. */
AITER_INLINE Vec floor(Vec x) {
#if AITER_AVX2
    return _mm256_floor_ps(x);
#else
    const Vec whole = __builtin_convertvector(__builtin_convertvector(x, IntVec), Vec);
    return whole > x ? whole - 1.0f : whole;
#endif
}

AITER_INLINE bool any(IntVec mask) {
#if AITER_AVX512
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif AITER_AVX2
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    int64_t halves[2];
    memcpy(halves, &mask, sizeof halves);
    return (halves[0] | halves[1]) != 0;
#endif
}

/* The polynomial with these coefficients, that of x^0 first, at x. */
AITER_INLINE Vec horner(Vec, float last) { return broadcast(last); }
template <class... Rest> AITER_INLINE Vec horner(Vec x, float first, Rest... rest) {
    return horner(x, rest...) * x + first;
}

/* 2^x to about DEGREE x 4 bits: 13 bits for DEGREE 3, 18 for 4, all of a float for 6. 2^-inf is exactly 0; a result too
 * small for a normal number is a subnormal one on AVX-512, elsewhere 0. The coefficients are minimax in relative error
 * on [0, 1]. */
template <int DEGREE> AITER_INLINE Vec exp2(Vec x) {
    static_assert(DEGREE == 3 || DEGREE == 4 || DEGREE == 6, "no coefficients");
#if AITER_AVX512
    /* x - floor(x); 0 for infinities */
    const Vec f = _mm512_maskz_reduce_ps(ALL_LANES, x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    const Vec whole = floor(x);
    const Vec f = x - whole;
#endif
    Vec p;
    if (DEGREE == 3) {
        p = horner(f, 9.999252558e-01f, 6.958331466e-01f, 2.260679007e-01f, 7.802411169e-02f);
    } else if (DEGREE == 4) {
        p = horner(f, 1.000002623e+00f, 6.930038929e-01f, 2.414426506e-01f, 5.201156065e-02f, 1.353414636e-02f);
    } else {
        p = horner(f, 1.0f, 6.931470037e-01f, 2.402298301e-01f, 5.548334494e-02f, 9.678839706e-03f, 1.243969309e-03f,
                   2.170226653e-04f);
    }
#if AITER_AVX512
    return _mm512_maskz_scalef_ps(ALL_LANES, p, x); /* p * 2^floor(x) */
#else
    const IntVec scaled = (IntVec)p + (__builtin_convertvector(whole, IntVec) << 23);
    return (Vec)(x < -126.0f ? IntVec{} : scaled);
#endif
}

/* The same as tanh_by_exp2 for |x| <= NEAR_ZERO, where tanh is 0.45: x times a polynomial in x^2. The coefficients are
 * minimax in relative error, which is 2^-16, and 2^-27 for fp32. */
constexpr float NEAR_ZERO = 1.2984f;
template <int DEGREE> AITER_INLINE Vec tanh_near_zero(Vec x) {
    const Vec square = x * x;
    if (DEGREE <= 4) return x * horner(square, 3.465693141e-01f, -1.382997798e-02f, 5.917799025e-04f);
    return x *
           horner(square, 3.465735886e-01f, -1.387597767e-02f, 6.664405811e-04f, -3.200985278e-05f, 1.292948792e-06f);
}

/* (2^x - 1) / (2^x + 1), which is tanh(x ln 2 / 2), to about DEGREE x 4 bits of its own size: 2^x - 1 is never the
 * difference of two numbers that are nearly alike. The coefficients are minimax in relative error on [0, 1]. Scores are
 * mostly far from their cap, so most vectors are near zero; each number takes its own way, whatever is beside it. */
template <int DEGREE> AITER_INLINE Vec tanh_by_exp2(Vec x) {
    static_assert(DEGREE == 3 || DEGREE == 4 || DEGREE == 6, "no coefficients");
    const IntVec sign = (IntVec)x & INT32_MIN;
    Vec size = (Vec)((IntVec)x ^ sign);
    const IntVec far = size > NEAR_ZERO; /* NaN is not */
    if (!any(far)) return tanh_near_zero<DEGREE>(x);
    size = size > 64.0f ? broadcast(64.0f) : size; /* 1 to the last bit; NaN stays NaN */
#if AITER_AVX512
    const Vec f = _mm512_maskz_reduce_ps(ALL_LANES, size, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const Vec power = _mm512_maskz_scalef_ps(ALL_LANES, broadcast(1.0f), size);
#else
    const Vec whole = floor(size), f = size - whole;
    const Vec power = (Vec)((IntVec)broadcast(1.0f) + (__builtin_convertvector(whole, IntVec) << 23));
#endif
    Vec p; /* (2^f - 1) / f */
    if (DEGREE == 3) {
        p = horner(f, 6.931355633e-01f, 2.406171100e-01f, 5.352327570e-02f, 1.270729085e-02f);
    } else if (DEGREE == 4) {
        p = horner(f, 6.931475188e-01f, 2.402088274e-01f, 5.564865822e-02f, 9.213075379e-03f, 1.781432314e-03f);
    } else {
        p = horner(f, 6.931471721e-01f, 2.402271382e-01f, 5.549656508e-02f, 9.650650934e-03f, 1.271005744e-03f,
                   2.074557745e-04f);
    }
    const Vec less_one = power * (p * f) + (power - 1.0f);
    const Vec result = (Vec)((IntVec)(less_one / (less_one + 2.0f)) | sign);
    return far ? result : tanh_near_zero<DEGREE>(x);
}

/* ---- the element type of the tensors ---- */

#if AITER_DTYPE_FP32
typedef float Element;
constexpr int EXP2_DEGREE = 6;
AITER_INLINE float to_float(Element x) { return x; }
AITER_INLINE Vec to_floats(const Element *p) { return load(p); }
AITER_INLINE Vec to_elements(Vec v) { return v; }
typedef Vec ElementVec;
#else
typedef uint16_t Element;
typedef HalfVec ElementVec;
AITER_INLINE HalfVec load(const Element *p) {
    HalfVec v;
    memcpy(&v, p, sizeof v);
    return v;
}

#if AITER_DTYPE_BF16
constexpr int EXP2_DEGREE = 3;
constexpr uint16_t INFINITE_ELEMENT = 0x7f80; /* what is not less, without its sign, is infinite or NaN */

AITER_INLINE Vec to_floats(HalfVec v) { return (Vec)(widen(v) << 16); }

AITER_INLINE HalfVec to_elements(Vec v) { /* to nearest even; NaN stays NaN */
    const IntVec bits = (IntVec)v, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return __builtin_convertvector((v == v ? rounded : (bits | 0x400000)) >> 16, HalfVec);
}
#elif AITER_DTYPE_FP16
constexpr int EXP2_DEGREE = 4;
constexpr uint16_t INFINITE_ELEMENT = 0x7c00;

AITER_INLINE Vec to_floats(HalfVec v) {
#if AITER_AVX512
    return _mm512_maskz_cvtph_ps(ALL_LANES, (__m256i)v);
#elif AITER_AVX2
    return _mm256_cvtph_ps((__m128i)v);
#else
    const IntVec bits = widen(v), magnitude = (bits & 0x7fff) << 13;
    const Vec finite = (Vec)magnitude * 0x1p112f; /* moves the exponent; subnormals come out normal */
    const IntVec special = magnitude >= 0x0f800000;
    return (Vec)((special ? (magnitude | 0x7f800000) : (IntVec)finite) | ((bits & 0x8000) << 16));
#endif
}

AITER_INLINE HalfVec to_elements(Vec v) { /* to nearest even; NaN stays NaN */
#if AITER_AVX512
    return (HalfVec)_mm512_maskz_cvtps_ph(ALL_LANES, v, _MM_FROUND_TO_NEAREST_INT);
#elif AITER_AVX2
    return (HalfVec)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#else
    const IntVec bits = (IntVec)v, magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
    const IntVec normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const IntVec subnormal = (IntVec)((Vec)magnitude + 0.5f) - 0x3f000000; /* the addition rounds */
    const IntVec finite = magnitude < 0x38800000 ? subnormal : normal;
    const IntVec special = magnitude > 0x7f800000 ? broadcast(0x7e00) : broadcast(0x7c00);
    return __builtin_convertvector((magnitude >= 0x47800000 ? special : finite) | sign, HalfVec);
#endif
}
#else
#error "define AITER_DTYPE_FP32, AITER_DTYPE_BF16 or AITER_DTYPE_FP16"
#endif
AITER_INLINE Vec to_floats(const Element *p) { return to_floats(load(p)); }
#endif

/* The first `count` elements at p, zeros in the other lanes; nothing past them is read. */
AITER_INLINE Vec to_floats(const Element *p, int count) {
    if (count >= LANES) return to_floats(p);
    Element lanes[LANES] = {};
    memcpy(lanes, p, count % LANES * sizeof(Element)); /* count, which g++ 12 does not believe to be less than LANES */
    return to_floats(lanes);
}

AITER_INLINE void store_elements(Element *p, Vec v, int count) {
    const ElementVec elements = to_elements(v);
    if (count >= LANES) memcpy(p, &elements, sizeof elements);
    else memcpy(p, &elements, count * sizeof(Element));
}

/* ---- rows become columns ---- */

#if AITER_AVX512
#define AITER_ZIP_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define AITER_ZIP_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif AITER_AVX2
#define AITER_ZIP_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define AITER_ZIP_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define AITER_ZIP_LOW 0, 4, 1, 5
#define AITER_ZIP_HIGH 2, 6, 3, 7
#endif

/* Of every BLOCK lanes, the first (HALF: 0) or second (1) half of a and of b, UNIT lanes of each in turn. */
template <int UNIT, int BLOCK, int HALF, int... LANE>
AITER_INLINE Vec zip(Vec a, Vec b, std::integer_sequence<int, LANE...>) {
    return shuffle<(LANE / BLOCK * BLOCK + HALF * BLOCK / 2 + LANE % BLOCK / UNIT / 2 * UNIT + LANE % UNIT +
                    LANE / UNIT % 2 * LANES)...>(a, b);
}

/* Lane d of row i goes to lane i of row d: within 128 bits first, as that is one cheap instruction everywhere. */
AITER_INLINE void transpose(Vec (&rows)[LANES]) {
    constexpr int BLOCK = 4, BLOCKS = LANES / BLOCK;
    constexpr auto ALL = std::make_integer_sequence<int, LANES>();
    Vec next[LANES];
    AITER_UNROLL
    for (int stage = 1; stage < BLOCK; stage *= 2) {
        AITER_UNROLL
        for (int i = 0; i < LANES / 2; i++) {
            const int first = i / (BLOCK / 2) * BLOCK, low = first + i % (BLOCK / 2), high = low + BLOCK / 2;
            next[2 * i] = zip<1, BLOCK, 0>(rows[low], rows[high], ALL);
            next[2 * i + 1] = zip<1, BLOCK, 1>(rows[low], rows[high], ALL);
        }
        AITER_UNROLL
        for (int i = 0; i < LANES; i++) rows[i] = next[i];
    }
    AITER_UNROLL
    for (int stage = 1; stage < BLOCKS; stage *= 2) {
        AITER_UNROLL
        for (int i = 0; i < LANES / 2; i++) {
            const int to = i / BLOCK * 2 * BLOCK + i % BLOCK;
            next[to] = zip<4, LANES, 0>(rows[i], rows[i + LANES / 2], ALL);
            next[to + BLOCK] = zip<4, LANES, 1>(rows[i], rows[i + LANES / 2], ALL);
        }
        AITER_UNROLL
        for (int i = 0; i < LANES; i++) rows[i] = next[i];
    }
}

/* Adds lanes that are HALF apart, those of a in the lanes without that bit and those of b in the lanes with it: one
 * shuffle and one blend, as every second summand is where it belongs. */
template <int HALF, int... LANE> AITER_INLINE Vec fold(Vec a, Vec b, std::integer_sequence<int, LANE...>) {
    return shuffle<(LANE & HALF ? LANES + LANE : LANE)...>(a, b) +
           shuffle<(LANE & HALF ? LANES + LANE - HALF : LANE + HALF)...>(a, b);
}

/* Lane i of the result is the sum of the lanes of rows[i]. */
template <int HALF = LANES / 2> AITER_INLINE Vec sums_of(Vec (&rows)[LANES]) {
    AITER_UNROLL
    for (int i = 0; i < HALF; i++)
        rows[i] = fold<HALF>(rows[i], rows[i + HALF], std::make_integer_sequence<int, LANES>());
    if constexpr (HALF > 1) return sums_of<HALF / 2>(rows);
    return rows[0];
}

AITER_INLINE float sum(Vec v) {
    AITER_UNROLL
    for (int half = LANES / 2; half > 0; half /= 2) v = shuffle<AITER_ZIP_LOW>(v, v) + shuffle<AITER_ZIP_HIGH>(v, v);
    return v[0];
}

#endif
