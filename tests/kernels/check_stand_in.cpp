/* Prints a digest of what each instruction that tests stand in for makes of many operands, special ones among them: by
 * the CPU, or by the stand-in, whichever this is built for. Which NaN comes out is left open. */
#include <math.h>
#include <stdio.h>

#include "cpu/simd.h"
#include "cpu/tile_instructions.h"

static uint64_t state = 1;

static uint32_t random_bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 32);
}

/* Mostly of the usual sizes; now and then anything at all, and what is special. */
static float operand() {
    static const float special[] = {0.0f, -0.0f, 1.0f, -1.0f, INFINITE, -INFINITE, __builtin_nanf(""), 0x1p-126f,
                                    0x1p-127f, -0x1p-149f, 0x1.fffffep127f, -127.5f, -149.0f, 65520.0f, 0x1p-25f};
    const uint32_t choice = random_bits(), bits = random_bits();
    float x = static_cast<float>(static_cast<int32_t>(bits)) * 0x1p-27f;
    if (choice % 16 == 0) memcpy(&x, &bits, sizeof x);
    if (choice % 16 == 1) x = special[bits % (sizeof special / sizeof *special)];
    return x;
}

static uint16_t half_operand() {
    const float x = operand();
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
#if AITER_DTYPE_FP16
    return bits % 8 == 0 ? static_cast<uint16_t>(bits >> 16) : static_cast<uint16_t>(_cvtss_sh(x, 0));
#else
    return static_cast<uint16_t>(bits >> 16);
#endif
}

template <class Value, class Vector>
static Vector vector_of(Value (*make)()) {
    Value values[sizeof(Vector) / sizeof(Value)];
    for (Value &value : values) value = make();
    Vector v;
    memcpy(&v, values, sizeof v);
    return v;
}

static Vec floats() { return vector_of<float, Vec>(operand); }
static __m256i halves() { return vector_of<uint16_t, __m256i>(half_operand); }
static __m512i pairs() { return vector_of<uint16_t, __m512i>(half_operand); }

/* Of elements of 16 or 32 bits, the latter floats; MANTISSA and EXPONENT tell a NaN among the former. */
template <class Element, Element EXPONENT, Element MANTISSA, class Operation>
static void print(const char *name, const Operation &operation) {
    uint64_t digest = 1469598103934665603u;
    for (int i = 0; i < 20000; i++) {
        const auto result = operation();
        Element elements[sizeof result / sizeof(Element)];
        memcpy(elements, &result, sizeof result);
        for (Element e : elements) {
            if ((e & EXPONENT) == EXPONENT && (e & MANTISSA) != 0) e = EXPONENT | MANTISSA;
            digest = (digest ^ e) * 1099511628211u;
        }
    }
    printf("%s %016llx\n", name, static_cast<unsigned long long>(digest));
}

template <class Operation>
static void print_floats(const char *name, const Operation &operation) {
    print<uint32_t, 0x7f800000, 0x7fffff>(name, operation);
}

int main() {
    print_floats("max", [] { const Vec a = floats(), b = floats(); return maximum(a, b); });
    print_floats("mask", [] { return _mm512_movepi32_mask((__m512i)floats()) | 0u; });
    print<uint32_t, 0, 0>("product", [] { const __m512i a = pairs(), b = pairs(); return _mm512_maskz_mul_epu32(0xff, a, b); });
    print_floats("reduce", [] {
        const Vec a = floats();
        Vec rest = _mm512_maskz_reduce_ps(ALL_LANES, a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        for (int i = 0; i < LANES; i++) { /* what Intel's CPUs round to the nearest float, AMD's round down */
            const float nearest = a[i] - floorf(a[i]);
            if (nearest > 0.0f && rest[i] == nextafterf(nearest, 0.0f)) rest[i] = nearest;
        }
        return rest;
    });
    print_floats("scalef", [] { const Vec a = floats(), b = floats() * 16.0f; return _mm512_maskz_scalef_ps(ALL_LANES, a, b); });
    print_floats("widen", [] { return widen((HalfVec)halves()); });
    print_floats("from half", [] { return _mm512_maskz_cvtph_ps(ALL_LANES, halves()); });
    print<uint16_t, 0x7c00, 0x3ff>("to half", [] { return _mm512_maskz_cvtps_ph(ALL_LANES, floats(), _MM_FROUND_TO_NEAREST_INT); });
    print<uint16_t, 0, 0>("some words", [] { const __m512i a = pairs(); return _mm512_maskz_loadu_epi16(random_bits(), &a); });
    print<uint16_t, 0, 0>("permute", [] { const __m512i a = pairs(), b = pairs(); return _mm512_permutexvar_epi16(a, b); });
    print<uint16_t, 0, 0>("set", [] {
        return _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, static_cast<short>(random_bits()));
    });
#if AITER_CPU_AVX512BF16
    print<uint16_t, 0x7f80, 0x7f>("to bf16", [] { const Vec a = floats(), b = floats(); return _mm512_cvtne2ps_pbh(a, b); });
    print_floats("dot", [] { const Vec a = floats(); const __m512i b = pairs(), c = pairs(); return _mm512_dpbf16_ps(a, (__m512bh)b, (__m512bh)c); });
#endif
#if (AITER_DTYPE_BF16 && AITER_CPU_AMXBF16) || (AITER_DTYPE_FP16 && AITER_CPU_AMXFP16)
    if (!Tiles::permitted()) return 1;
    const Tiles tiles;
    print_floats("tiles", [] {
        struct { __m512i rows[16]; } sums, left, right;
        for (int i = 0; i < 16; i++) sums.rows[i] = (__m512i)floats(), left.rows[i] = pairs(), right.rows[i] = pairs();
        load_tile<0>(&sums, 64);
        zero_tile<3>();
        load_tile<1>(&left, 64);
        load_tile<2>(&right, 64);
        multiply_tiles<0, 1, 2>();
        multiply_tiles<3, 2, 1>();
        store_tile<0>(&sums, 64);
        store_tile<3>(&left, 64);
        for (int i = 0; i < 16; i++) sums.rows[i] = i % 2 ? left.rows[i] : sums.rows[i];
        return sums;
    });
#endif
}
