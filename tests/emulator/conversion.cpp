// Conversions between number formats. Semantics: the V_CVT_* entries of AMD's ISA documents for MI200, MI300 and CDNA4.
#include <algorithm>
#include <limits>

#include "lanes.h"

namespace emulator {

namespace {

using u16 = uint16_t;
using i16 = int16_t;
using u32 = uint32_t;
using i32 = int32_t;

// Float to integer saturates, and NaN becomes 0.
template <class To, class From> To saturate(From x) {
    if (x != x) return 0;
    if (double(x) <= double(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
    if (double(x) >= double(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
    return To(x);
}

u32 pair(u32 low, u32 high) { return (low & 0xffff) | high << 16; }

u16 to_half(float x) { return bit_cast<u16>(half(x)); }

// Rounded towards zero: where rounding to nearest went away from zero, one step back.
u16 to_half_towards_zero(float x) {
    half nearest = half(x);
    u16 bits = bit_cast<u16>(nearest);
    if (x == x && std::fabs(float(nearest)) > std::fabs(x)) --bits;
    return bits;
}

u16 to_bfloat16(float x) {
    u32 bits = bit_cast<u32>(x);
    if (x != x) return u16(bits >> 16 | 0x40);
    return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The float of 8 bits in the low byte of x: OCP's e4m3 and e5m2, or those of which each has one NaN and no negative zero
// (fnuz), whose exponents are biased by one more.
template <int MANTISSA, bool FNUZ> float from_fp8(u32 x) {
    const int exponent_bits = 7 - MANTISSA, bias = (1 << (exponent_bits - 1)) - !FNUZ;
    const int exponent = x >> MANTISSA & ((1 << exponent_bits) - 1), mantissa = x & ((1 << MANTISSA) - 1);
    const float sign = x & 0x80 ? -1.f : 1.f, nan = std::numeric_limits<float>::quiet_NaN();
    if (FNUZ && (x & 0xff) == 0x80) return nan;
    if (!FNUZ && MANTISSA == 3 && (x & 0x7f) == 0x7f) return std::copysign(nan, sign);
    if (!FNUZ && MANTISSA == 2 && exponent == 31)
        return std::copysign(mantissa ? nan : std::numeric_limits<float>::infinity(), sign);
    if (exponent == 0) return sign * std::ldexp(float(mantissa), 1 - bias - MANTISSA);
    return sign * std::ldexp(float(mantissa | 1 << MANTISSA), exponent - bias - MANTISSA);
}

template <int MANTISSA, bool FNUZ> uint64_t two_from_fp8(u16 x) {
    return bit_cast<u32>(from_fp8<MANTISSA, FNUZ>(x)) | uint64_t(bit_cast<u32>(from_fp8<MANTISSA, FNUZ>(x >> 8))) << 32;
}

float from_bfloat16(u16 x) { return bfloat16{x}; }

template <class T> u32 packed_norm(float x, float scale) {
    return u16(saturate<T>(std::nearbyint(std::clamp(x, scale == 65535.f ? 0.f : -1.f, 1.f) * scale)));
}

u32 clamped_u16(u32 x) { return std::min(x, 65535u); }
u32 clamped_i16(i32 x) { return u16(std::clamp(x, -32768, 32767)); }

u32 insert_byte(float x, u32 which, u32 into) {
    u32 shift = 8 * (which & 3);
    return (into & ~(255u << shift)) | u32(saturate<uint8_t>(std::nearbyint(x))) << shift;
}

const VectorOp operations[] = {
    VECTOR("v_cvt_f32_i32", float, (i32 a), float(a)),
    VECTOR("v_cvt_f32_u32", float, (u32 a), float(a)),
    VECTOR("v_cvt_u32_f32", u32, (float a), saturate<u32>(a)),
    VECTOR("v_cvt_i32_f32", i32, (float a), saturate<i32>(a)),
    VECTOR("v_cvt_rpi_i32_f32", i32, (float a), saturate<i32>(std::floor(a + 0.5f))),
    VECTOR("v_cvt_flr_i32_f32", i32, (float a), saturate<i32>(std::floor(a))),
    VECTOR("v_cvt_f16_f32", half, (float a), half(a)),
    VECTOR("v_cvt_f32_f16", float, (half a), float(a)),
    VECTOR("v_cvt_f32_bf16", float, (u16 a), from_bfloat16(a)),
    VECTOR("v_cvt_f32_f64", float, (double a), float(a)),
    VECTOR("v_cvt_f64_f32", double, (float a), double(a)),
    VECTOR("v_cvt_i32_f64", i32, (double a), saturate<i32>(a)),
    VECTOR("v_cvt_u32_f64", u32, (double a), saturate<u32>(a)),
    VECTOR("v_cvt_f64_i32", double, (i32 a), double(a)),
    VECTOR("v_cvt_f64_u32", double, (u32 a), double(a)),
    VECTOR("v_cvt_f32_ubyte0", float, (u32 a), float(a & 255)),
    VECTOR("v_cvt_f32_ubyte1", float, (u32 a), float(a >> 8 & 255)),
    VECTOR("v_cvt_f32_ubyte2", float, (u32 a), float(a >> 16 & 255)),
    VECTOR("v_cvt_f32_ubyte3", float, (u32 a), float(a >> 24)),
    VECTOR("v_cvt_f16_u16", half, (u16 a), half(float(a))),
    VECTOR("v_cvt_f16_i16", half, (i16 a), half(float(a))),
    VECTOR("v_cvt_u16_f16", u16, (half a), saturate<u16>(float(a))),
    VECTOR("v_cvt_i16_f16", i16, (half a), saturate<i16>(float(a))),
    VECTOR("v_cvt_pkrtz_f16_f32", u32, (float a, float b), pair(to_half_towards_zero(a), to_half_towards_zero(b))),
    VECTOR("v_cvt_pk_f16_f32", u32, (float a, float b), pair(to_half(a), to_half(b))),
    VECTOR("v_cvt_pk_bf16_f32", u32, (float a, float b), pair(to_bfloat16(a), to_bfloat16(b))),
    VECTOR("v_cvt_pk_u16_u32", u32, (u32 a, u32 b), pair(clamped_u16(a), clamped_u16(b))),
    VECTOR("v_cvt_pk_i16_i32", u32, (i32 a, i32 b), pair(clamped_i16(a), clamped_i16(b))),
    VECTOR("v_cvt_pknorm_i16_f32", u32, (float a, float b),
           pair(packed_norm<i16>(a, 32767.f), packed_norm<i16>(b, 32767.f))),
    VECTOR("v_cvt_pknorm_u16_f32", u32, (float a, float b),
           pair(packed_norm<u16>(a, 65535.f), packed_norm<u16>(b, 65535.f))),
    VECTOR("v_cvt_pk_u8_f32", u32, (float a, u32 b, u32 c), insert_byte(a, b, c)),
};

// Which formats fp8 and bf8 are is the arch's.
const VectorOp fp8_operations[] = {
    VECTOR("v_cvt_pk_f32_fp8", uint64_t, (u16 a), two_from_fp8<3, true>(a)),
    VECTOR("v_cvt_pk_f32_bf8", uint64_t, (u16 a), two_from_fp8<2, true>(a)),
};
const VectorOp ocp_fp8_operations[] = {
    VECTOR("v_cvt_pk_f32_fp8", uint64_t, (u16 a), two_from_fp8<3, false>(a)),
    VECTOR("v_cvt_pk_f32_bf8", uint64_t, (u16 a), two_from_fp8<2, false>(a)),
};

}  // namespace

bool define_conversion(const std::string &name, Operation &operation, Arch arch) {
    const auto &fp8 = arch == Arch::gfx950 ? ocp_fp8_operations : fp8_operations;
    if (define_from(fp8, std::size(fp8), name, operation)) return true;
    return define_from(operations, std::size(operations), name, operation);
}

}  // namespace emulator
