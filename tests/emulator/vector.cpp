// Vector arithmetic: one line for each instruction. Semantics: chapter "Instructions" of AMD's ISA documents for MI200,
// MI300 and CDNA4. A quarter of the lanes a cycle makes 4 cycles; transcendental functions and wide integer products
// take four times as long.
#include <algorithm>
#include <utility>

#include "lanes.h"

namespace emulator {

namespace {

using u8 = uint8_t;
using u16 = uint16_t;
using i16 = int16_t;
using u32 = uint32_t;
using i32 = int32_t;
using u64 = uint64_t;
using i64 = int64_t;

// Single-precision transcendental functions neither take nor give denormal numbers.
float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.f, x) : x; }

// The smaller and the larger number; of a number and a NaN the number; -0 is smaller than +0.
template <class T> T lesser(T a, T b) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit(double(a)) ? a : b;
    return a < b ? a : b;
}
template <class T> T greater(T a, T b) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit(double(a)) ? b : a;
    return a > b ? a : b;
}
// The same, but a NaN wins (IEEE 754-2019 minimum and maximum).
float minimum(float a, float b) { return a != a ? a : b != b ? b : lesser(a, b); }
float maximum(float a, float b) { return a != a ? a : b != b ? b : greater(a, b); }
template <class T> T median(T a, T b, T c) { return std::max(std::min(a, b), std::min(std::max(a, b), c)); }
template <class T> T median_float(T a, T b, T c) {
    if (a != a || b != b || c != c) return lesser(lesser(a, b), c);
    return median(a, b, c);
}

i32 signed24(u32 x) { return i32(x << 8) >> 8; }
u32 unsigned24(u32 x) { return x & 0xffffff; }
u32 leading(u32 x) { return x ? u32(__builtin_clz(x)) : ~0u; }
u32 reversed(u32 x) {
    x = (x >> 1 & 0x55555555) | (x & 0x55555555) << 1;
    x = (x >> 2 & 0x33333333) | (x & 0x33333333) << 2;
    x = (x >> 4 & 0x0f0f0f0f) | (x & 0x0f0f0f0f) << 4;
    return __builtin_bswap32(x);
}
u32 field(u32 a, u32 offset, u32 width) { return width ? a >> offset & (~0u >> (32 - width)) : 0; }
i32 field_signed(i32 a, u32 offset, u32 width) {
    if (!width) return 0;
    if (offset + width >= 32) return a >> offset;
    return i32(u32(a) << (32 - offset - width)) >> (32 - width);
}
u32 byte_of(u64 pool, u32 select) {
    if (select >= 13) return 0xff;
    if (select == 12) return 0;
    if (select >= 8) return pool >> ((select - 8) * 16 + 15) & 1 ? 0xff : 0;
    return pool >> (8 * select) & 0xff;
}
u32 permuted(u32 a, u32 b, u32 select) {
    u64 pool = u64(a) << 32 | b;
    u32 r = 0;
    for (int i = 0; i < 4; ++i) r |= byte_of(pool, select >> (8 * i) & 0xff) << (8 * i);
    return r;
}
u32 sum_of_differences(u32 a, u32 b, u32 c) {
    for (int i = 0; i < 4; ++i) c += std::abs(i32(a >> (8 * i) & 0xff) - i32(b >> (8 * i) & 0xff));
    return c;
}
float exp2_flushed(float x) { return flush(exp2f(flush(x))); }
float log2_flushed(float x) { return log2f(flush(x)); }
float reciprocal(float x) { return flush(1.f / flush(x)); }
float reciprocal_root(float x) { return float(1.0 / std::sqrt(double(flush(x)))); }
float turn_sine(float x) { return float(std::sin(double(x) * 6.283185307179586)); }
float turn_cosine(float x) { return float(std::cos(double(x) * 6.283185307179586)); }
template <class T> T fraction(T x) {
    T r = x - std::floor(x);
    T below_one = sizeof(T) == 8 ? T(1) - T(1.1102230246251565e-16) : T(1) - T(5.9604645e-8);
    return r < T(1) || r != r ? r : below_one;
}
template <class T> int exponent(T x) {
    if (!(std::fabs(x) <= std::numeric_limits<T>::max()) || x == 0) return 0;
    int e;
    std::frexp(x, &e);
    return e;
}
template <class T> T mantissa(T x) {
    int e;
    return std::isfinite(x) ? std::frexp(x, &e) : x;
}

const VectorOp operations[] = {
    // --- moves and bits
    VECTOR("v_mov_b32", u32, (u32 a), a),
    VECTOR("v_mov_b64", u64, (u64 a), a),
    VECTOR("v_not_b32", u32, (u32 a), ~a),
    VECTOR("v_bfrev_b32", u32, (u32 a), reversed(a)),
    VECTOR("v_ffbh_u32", u32, (u32 a), leading(a)),
    VECTOR("v_ffbl_b32", u32, (u32 a), a ? u32(__builtin_ctz(a)) : ~0u),
    VECTOR("v_ffbh_i32", u32, (i32 a), leading(a < 0 ? ~a : a)),
    VECTOR("v_and_b32", u32, (u32 a, u32 b), a & b),
    VECTOR("v_or_b32", u32, (u32 a, u32 b), a | b),
    VECTOR("v_xor_b32", u32, (u32 a, u32 b), a ^ b),
    VECTOR("v_xnor_b32", u32, (u32 a, u32 b), ~(a ^ b)),
    VECTOR("v_lshlrev_b32", u32, (u32 a, u32 b), b << (a & 31)),
    VECTOR("v_lshrrev_b32", u32, (u32 a, u32 b), b >> (a & 31)),
    VECTOR("v_ashrrev_i32", i32, (u32 a, i32 b), b >> (a & 31)),
    VECTOR("v_lshlrev_b64", u64, (u32 a, u64 b), b << (a & 63)),
    VECTOR("v_lshrrev_b64", u64, (u32 a, u64 b), b >> (a & 63)),
    VECTOR("v_ashrrev_i64", i64, (u32 a, i64 b), b >> (a & 63)),
    VECTOR("v_lshlrev_b16", u16, (u16 a, u16 b), b << (a & 15)),
    VECTOR("v_lshrrev_b16", u16, (u16 a, u16 b), b >> (a & 15)),
    VECTOR("v_ashrrev_i16", i16, (u16 a, i16 b), b >> (a & 15)),
    VECTOR("v_bfe_u32", u32, (u32 a, u32 b, u32 c), field(a, b & 31, c & 31)),
    VECTOR("v_bfe_i32", i32, (i32 a, u32 b, u32 c), field_signed(a, b & 31, c & 31)),
    VECTOR("v_bfi_b32", u32, (u32 a, u32 b, u32 c), (a & b) | (~a & c)),
    VECTOR("v_bfm_b32", u32, (u32 a, u32 b), ((1u << (a & 31)) - 1) << (b & 31)),
    VECTOR("v_alignbit_b32", u32, (u32 a, u32 b, u32 c), u32((u64(a) << 32 | b) >> (c & 31))),
    VECTOR("v_alignbyte_b32", u32, (u32 a, u32 b, u32 c), u32((u64(a) << 32 | b) >> (8 * (c & 3)))),
    VECTOR("v_perm_b32", u32, (u32 a, u32 b, u32 c), permuted(a, b, c)),
    VECTOR("v_lshl_or_b32", u32, (u32 a, u32 b, u32 c), a << (b & 31) | c),
    VECTOR("v_and_or_b32", u32, (u32 a, u32 b, u32 c), (a & b) | c),
    VECTOR("v_or3_b32", u32, (u32 a, u32 b, u32 c), a | b | c),
    VECTOR("v_bcnt_u32_b32", u32, (u32 a, u32 b), u32(__builtin_popcount(a)) + b),
    VECTOR("v_pack_b32_f16", u32, (half a, half b), bit_cast<u16>(a) | u32(bit_cast<u16>(b)) << 16),

    // --- integers
    VECTOR("v_add_u32", u32, (u32 a, u32 b), a + b),
    VECTOR("v_sub_u32", u32, (u32 a, u32 b), a - b),
    VECTOR("v_subrev_u32", u32, (u32 a, u32 b), b - a),
    VECTOR("v_add_i32", u32, (u32 a, u32 b), a + b),
    VECTOR("v_sub_i32", u32, (u32 a, u32 b), a - b),
    VECTOR("v_add3_u32", u32, (u32 a, u32 b, u32 c), a + b + c),
    VECTOR("v_lshl_add_u32", u32, (u32 a, u32 b, u32 c), (a << (b & 31)) + c),
    VECTOR("v_add_lshl_u32", u32, (u32 a, u32 b, u32 c), (a + b) << (c & 31)),
    VECTOR("v_xad_u32", u32, (u32 a, u32 b, u32 c), (a ^ b) + c),
    VECTOR("v_lshl_add_u64", u64, (u64 a, u32 b, u64 c), (a << (b & 7)) + c),
    VECTOR("v_min_i32", i32, (i32 a, i32 b), std::min(a, b)),
    VECTOR("v_max_i32", i32, (i32 a, i32 b), std::max(a, b)),
    VECTOR("v_min_u32", u32, (u32 a, u32 b), std::min(a, b)),
    VECTOR("v_max_u32", u32, (u32 a, u32 b), std::max(a, b)),
    VECTOR("v_min3_i32", i32, (i32 a, i32 b, i32 c), std::min(std::min(a, b), c)),
    VECTOR("v_max3_i32", i32, (i32 a, i32 b, i32 c), std::max(std::max(a, b), c)),
    VECTOR("v_min3_u32", u32, (u32 a, u32 b, u32 c), std::min(std::min(a, b), c)),
    VECTOR("v_max3_u32", u32, (u32 a, u32 b, u32 c), std::max(std::max(a, b), c)),
    VECTOR("v_med3_i32", i32, (i32 a, i32 b, i32 c), median(a, b, c)),
    VECTOR("v_med3_u32", u32, (u32 a, u32 b, u32 c), median(a, b, c)),
    VECTOR("v_mul_i32_i24", i32, (u32 a, u32 b), i32(u32(signed24(a)) * u32(signed24(b)))),
    VECTOR("v_mul_u32_u24", u32, (u32 a, u32 b), unsigned24(a) * unsigned24(b)),
    VECTOR("v_mul_hi_i32_i24", i32, (u32 a, u32 b), i32(i64(signed24(a)) * signed24(b) >> 32)),
    VECTOR("v_mul_hi_u32_u24", u32, (u32 a, u32 b), u32(u64(unsigned24(a)) * unsigned24(b) >> 32)),
    VECTOR("v_mad_i32_i24", u32, (u32 a, u32 b, u32 c), u32(signed24(a)) * u32(signed24(b)) + c),
    VECTOR("v_mad_u32_u24", u32, (u32 a, u32 b, u32 c), unsigned24(a) * unsigned24(b) + c),
    VECTOR_CYCLES("v_mul_lo_u32", 16, u32, (u32 a, u32 b), a * b),
    VECTOR_CYCLES("v_mul_hi_u32", 16, u32, (u32 a, u32 b), u32(u64(a) * b >> 32)),
    VECTOR_CYCLES("v_mul_hi_i32", 16, i32, (i32 a, i32 b), i32(i64(a) * b >> 32)),
    VECTOR("v_mad_u32_u16", u32, (u16 a, u16 b, u32 c), u32(a) * b + c),
    VECTOR("v_mad_i32_i16", u32, (i16 a, i16 b, u32 c), u32(i32(a) * b) + c),
    VECTOR("v_sad_u8", u32, (u32 a, u32 b, u32 c), sum_of_differences(a, b, c)),
    VECTOR("v_sad_u32", u32, (u32 a, u32 b, u32 c), std::max(a, b) - std::min(a, b) + c),
    VECTOR("v_add_u16", u16, (u16 a, u16 b), a + b),
    VECTOR("v_sub_u16", u16, (u16 a, u16 b), a - b),
    VECTOR("v_subrev_u16", u16, (u16 a, u16 b), b - a),
    VECTOR("v_add_i16", u16, (u16 a, u16 b), a + b),
    VECTOR("v_sub_i16", u16, (u16 a, u16 b), a - b),
    VECTOR("v_mul_lo_u16", u16, (u16 a, u16 b), u16(u32(a) * b)),
    VECTOR("v_max_u16", u16, (u16 a, u16 b), std::max(a, b)),
    VECTOR("v_max_i16", i16, (i16 a, i16 b), std::max(a, b)),
    VECTOR("v_min_u16", u16, (u16 a, u16 b), std::min(a, b)),
    VECTOR("v_min_i16", i16, (i16 a, i16 b), std::min(a, b)),
    VECTOR("v_mad_u16", u16, (u16 a, u16 b, u16 c), u16(u32(a) * b + c)),
    VECTOR("v_mad_i16", u16, (u16 a, u16 b, u16 c), u16(u32(a) * b + c)),
    VECTOR("v_mad_legacy_u16", u16, (u16 a, u16 b, u16 c), u16(u32(a) * b + c)),
    VECTOR("v_mad_legacy_i16", u16, (u16 a, u16 b, u16 c), u16(u32(a) * b + c)),
    VECTOR("v_min3_i16", i16, (i16 a, i16 b, i16 c), std::min(std::min(a, b), c)),
    VECTOR("v_max3_i16", i16, (i16 a, i16 b, i16 c), std::max(std::max(a, b), c)),
    VECTOR("v_min3_u16", u16, (u16 a, u16 b, u16 c), std::min(std::min(a, b), c)),
    VECTOR("v_max3_u16", u16, (u16 a, u16 b, u16 c), std::max(std::max(a, b), c)),
    VECTOR("v_med3_i16", i16, (i16 a, i16 b, i16 c), median(a, b, c)),
    VECTOR("v_med3_u16", u16, (u16 a, u16 b, u16 c), median(a, b, c)),

    // --- single precision
    VECTOR("v_add_f32", float, (float a, float b), a + b),
    VECTOR("v_sub_f32", float, (float a, float b), a - b),
    VECTOR("v_subrev_f32", float, (float a, float b), b - a),
    VECTOR("v_mul_f32", float, (float a, float b), a * b),
    VECTOR("v_mul_legacy_f32", float, (float a, float b), a == 0 || b == 0 ? 0.f : a * b),
    VECTOR("v_min_f32", float, (float a, float b), lesser(a, b)),
    VECTOR("v_max_f32", float, (float a, float b), greater(a, b)),
    VECTOR("v_min3_f32", float, (float a, float b, float c), lesser(lesser(a, b), c)),
    VECTOR("v_max3_f32", float, (float a, float b, float c), greater(greater(a, b), c)),
    VECTOR("v_med3_f32", float, (float a, float b, float c), median_float(a, b, c)),
    VECTOR("v_minimum3_f32", float, (float a, float b, float c), minimum(minimum(a, b), c)),
    VECTOR("v_maximum3_f32", float, (float a, float b, float c), maximum(maximum(a, b), c)),
    VECTOR("v_fma_f32", float, (float a, float b, float c), __builtin_fmaf(a, b, c)),
    VECTOR("v_fmac_f32", float, (float a, float b, float c), __builtin_fmaf(a, b, c)),
    VECTOR("v_fmamk_f32", float, (float a, float b, float c), __builtin_fmaf(a, b, c)),
    VECTOR("v_fmaak_f32", float, (float a, float b, float c), __builtin_fmaf(a, b, c)),
    VECTOR("v_mac_f32", float, (float a, float b, float c), a * b + c),
    VECTOR("v_mad_f32", float, (float a, float b, float c), a * b + c),
    VECTOR("v_madmk_f32", float, (float a, float b, float c), a * b + c),
    VECTOR("v_madak_f32", float, (float a, float b, float c), a * b + c),
    VECTOR("v_fract_f32", float, (float a), fraction(a)),
    VECTOR("v_trunc_f32", float, (float a), std::trunc(a)),
    VECTOR("v_ceil_f32", float, (float a), std::ceil(a)),
    VECTOR("v_rndne_f32", float, (float a), std::nearbyint(a)),
    VECTOR("v_floor_f32", float, (float a), std::floor(a)),
    VECTOR("v_ldexp_f32", float, (float a, i32 b), std::ldexp(a, std::clamp(b, -300, 300))),
    VECTOR("v_frexp_exp_i32_f32", i32, (float a), exponent(a)),
    VECTOR("v_frexp_mant_f32", float, (float a), mantissa(a)),
    VECTOR_CYCLES("v_exp_f32", 16, float, (float a), exp2_flushed(a)),
    VECTOR_CYCLES("v_exp_legacy_f32", 16, float, (float a), exp2_flushed(a)),
    VECTOR_CYCLES("v_log_f32", 16, float, (float a), log2_flushed(a)),
    VECTOR_CYCLES("v_log_legacy_f32", 16, float, (float a), log2_flushed(a)),
    VECTOR_CYCLES("v_rcp_f32", 16, float, (float a), reciprocal(a)),
    VECTOR_CYCLES("v_rcp_iflag_f32", 16, float, (float a), reciprocal(a)),
    VECTOR_CYCLES("v_rsq_f32", 16, float, (float a), reciprocal_root(a)),
    VECTOR_CYCLES("v_sqrt_f32", 16, float, (float a), std::sqrt(flush(a))),
    VECTOR_CYCLES("v_sin_f32", 16, float, (float a), turn_sine(a)),
    VECTOR_CYCLES("v_cos_f32", 16, float, (float a), turn_cosine(a)),

    // --- double precision
    VECTOR("v_add_f64", double, (double a, double b), a + b),
    VECTOR("v_mul_f64", double, (double a, double b), a * b),
    VECTOR("v_min_f64", double, (double a, double b), lesser(a, b)),
    VECTOR("v_max_f64", double, (double a, double b), greater(a, b)),
    VECTOR("v_fma_f64", double, (double a, double b, double c), __builtin_fma(a, b, c)),
    VECTOR("v_fmac_f64", double, (double a, double b, double c), __builtin_fma(a, b, c)),
    VECTOR("v_trunc_f64", double, (double a), std::trunc(a)),
    VECTOR("v_ceil_f64", double, (double a), std::ceil(a)),
    VECTOR("v_rndne_f64", double, (double a), std::nearbyint(a)),
    VECTOR("v_floor_f64", double, (double a), std::floor(a)),
    VECTOR("v_fract_f64", double, (double a), fraction(a)),
    VECTOR("v_ldexp_f64", double, (double a, i32 b), std::ldexp(a, std::clamp(b, -3000, 3000))),
    VECTOR("v_frexp_exp_i32_f64", i32, (double a), exponent(a)),
    VECTOR("v_frexp_mant_f64", double, (double a), mantissa(a)),
    VECTOR_CYCLES("v_rcp_f64", 16, double, (double a), 1.0 / a),
    VECTOR_CYCLES("v_rsq_f64", 16, double, (double a), 1.0 / std::sqrt(a)),
    VECTOR_CYCLES("v_sqrt_f64", 16, double, (double a), std::sqrt(a)),

    // --- half precision
    VECTOR("v_add_f16", half, (half a, half b), a + b),
    VECTOR("v_sub_f16", half, (half a, half b), a - b),
    VECTOR("v_subrev_f16", half, (half a, half b), b - a),
    VECTOR("v_mul_f16", half, (half a, half b), a * b),
    VECTOR("v_min_f16", half, (half a, half b), lesser(a, b)),
    VECTOR("v_max_f16", half, (half a, half b), greater(a, b)),
    VECTOR("v_min3_f16", half, (half a, half b, half c), lesser(lesser(a, b), c)),
    VECTOR("v_max3_f16", half, (half a, half b, half c), greater(greater(a, b), c)),
    VECTOR("v_med3_f16", half, (half a, half b, half c), median_float(a, b, c)),
    VECTOR("v_fma_f16", half, (half a, half b, half c), half(double(a) * double(b) + double(c))),
    VECTOR("v_fma_legacy_f16", half, (half a, half b, half c), half(double(a) * double(b) + double(c))),
    VECTOR("v_mac_f16", half, (half a, half b, half c), half(a * b) + c),
    VECTOR("v_mad_f16", half, (half a, half b, half c), half(a * b) + c),
    VECTOR("v_mad_legacy_f16", half, (half a, half b, half c), half(a * b) + c),
    VECTOR("v_madmk_f16", half, (half a, half b, half c), half(a * b) + c),
    VECTOR("v_madak_f16", half, (half a, half b, half c), half(a * b) + c),
    VECTOR("v_floor_f16", half, (half a), half(std::floor(float(a)))),
    VECTOR("v_ceil_f16", half, (half a), half(std::ceil(float(a)))),
    VECTOR("v_trunc_f16", half, (half a), half(std::trunc(float(a)))),
    VECTOR("v_rndne_f16", half, (half a), half(std::nearbyint(float(a)))),
    VECTOR("v_fract_f16", half, (half a), half(float(a) - std::floor(float(a)))),
    VECTOR("v_ldexp_f16", half, (half a, i16 b), half(std::ldexp(double(a), b))),
    VECTOR("v_frexp_mant_f16", half, (half a), half(mantissa(float(a)))),
    VECTOR("v_frexp_exp_i16_f16", i16, (half a), i16(exponent(float(a)))),
    VECTOR_CYCLES("v_exp_f16", 16, half, (half a), half(exp2f(a))),
    VECTOR_CYCLES("v_log_f16", 16, half, (half a), half(log2f(a))),
    VECTOR_CYCLES("v_rcp_f16", 16, half, (half a), half(1.f / float(a))),
    VECTOR_CYCLES("v_rsq_f16", 16, half, (half a), half(1.f / std::sqrt(float(a)))),
    VECTOR_CYCLES("v_sqrt_f16", 16, half, (half a), half(std::sqrt(float(a)))),
    VECTOR_CYCLES("v_sin_f16", 16, half, (half a), half(turn_sine(a))),
    VECTOR_CYCLES("v_cos_f16", 16, half, (half a), half(turn_cosine(a))),
};

bool starts(const std::string &text, const char *with) { return text.rfind(with, 0) == 0; }

}  // namespace

bool define_vector(const std::string &name, Operation &operation) {
    if (!define_from(operations, std::size(operations), name, operation)) return false;
    operation.transcendental = operation.cycles == 16 && !starts(name, "v_mul_");
    operation.destination_is_source = starts(name, "v_fmac_") || starts(name, "v_mac_");
    if (name == "v_mov_b64") operation.words = uint16_t(Words::apart);
    if (name == "v_lshl_add_u64" || name == "v_lshlrev_b64") operation.words = uint16_t(Words::low_alone);
    if (name == "v_lshrrev_b64" || name == "v_ashrrev_i64") operation.words = uint16_t(Words::high_alone);
    // Of the 16-bit instructions only these leave the other half of their destination alone.
    operation.writes_high_half_kept =
        name == "v_mad_f16" || name == "v_mad_u16" || name == "v_mad_i16" || name == "v_fma_f16";
    return true;
}

}  // namespace emulator
