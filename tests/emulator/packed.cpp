// Packed instructions (VOP3P): two 16-bit values or two floats in one operand, and dot products.
// Semantics: chapter "Instructions" of AMD's ISA documents for MI200, MI300 and CDNA4.
#include <algorithm>

#include "lanes.h"

namespace emulator {

namespace {

using u16 = uint16_t;
using i16 = int16_t;
using u32 = uint32_t;
using i32 = int32_t;

// The 32-bit words of source i; constants of 16-bit float instructions are 16-bit floats.
template <class T> const u32 *fetch_packed(Wave &w, const Instruction &in, int i, u32 *buffer, LaneMasks &masks) {
    fetch_words(w, in, i, buffer, masks);
    if (is_float<T> && in.source[i] < first_vgpr)
        for (int lane = 0; lane < lanes; ++lane)
            buffer[lane] =
                in.source[i] >= 240 && in.source[i] <= 248 ? half_constant(in.source[i], buffer[lane]) : buffer[lane];
    return buffer;
}

// Half of a packed operand as the instruction selects it for this half of the result.
template <class T> T part(const Instruction &in, int i, u32 word, bool high_result) {
    bool high = (high_result ? in.opsel_high : in.opsel) >> i & 1;
    u16 bits = u16(high ? word >> 16 : word);
    if (is_float<T> && ((high_result ? in.negative_high : in.negative) >> i & 1)) bits ^= 0x8000;
    return bit_cast<T>(bits);
}

template <class Op, class T, class... A, size_t... I>
void execute_packed_lanes(Wave &w, const Instruction &in, T (*)(A...), std::index_sequence<I...>) {
    LaneMasks masks(w);
    Lanes<u32> buffers[sizeof...(A)], result;
    const u32 *words[] = {fetch_packed<T>(w, in, int(I), buffers[I].value, masks)...};
    for (int lane = 0; lane < lanes; ++lane) {
        u32 packed = 0;
        for (int high = 0; high < 2; ++high) {
            T value = Op::apply(part<A>(in, int(I), words[I][lane], high)...);
            if constexpr (is_float<T>)
                if (in.clamp) value = value > T(0) ? (value < T(1) ? value : T(1)) : T(0);
            packed |= u32(bit_cast<u16>(value)) << (16 * high);
        }
        result.value[lane] = packed;
    }
    store_words(w, in, 0, result.value, false, masks);
}

template <class Op> void execute_packed(Wave &w, const Instruction &in) {
    execute_packed_lanes<Op>(w, in, &Op::apply, std::make_index_sequence<arity(&Op::apply)>());
}

#define PACKED(name, T, parameters, ...)                         \
    []() -> VectorOp {                                           \
        struct Op {                                              \
            static T apply parameters { return T(__VA_ARGS__); } \
        };                                                       \
        return {name, execute_packed<Op>};                       \
    }()

// --- two floats ------------------------------------------------------------------------------------------------------

template <class Op, int count> void execute_two_floats(Wave &w, const Instruction &in) {
    LaneMasks masks(w);
    Lanes<float> sources[count][2], result;                   // [source][half of the result]
    for (int i = 0; i < count; ++i) {
        u32 words[2][lanes];
        if (in.source[i] >= first_vgpr) {
            unsigned r = w.vector_register(in.source[i], 2);
            for (int word = 0; word < 2; ++word) {
                w.check_read(r + word);
                memcpy(words[word], w.v[r + word], sizeof words[word]);
                bool used = (in.opsel >> i & 1) == word || (in.opsel_high >> i & 1) == word;
                if (used) masks.defined &= w.defined[r + word];
            }
        } else {
            for (int word = 0; word < 2; ++word) {
                uint32_t d, value = w.read_scalar(in.source[i] < 127 ? in.source[i] + word : in.source[i], d);
                bool used = (in.opsel >> i & 1) == word || (in.opsel_high >> i & 1) == word;
                if (used && d != ~0u) masks.defined = 0;
                for (auto &x : words[word]) x = value;
            }
        }
        for (int half = 0; half < 2; ++half) {
            const u32 *from = words[(half ? in.opsel_high : in.opsel) >> i & 1];
            u32 sign = (half ? in.negative_high : in.negative) >> i & 1 ? 0x80000000u : 0;
            for (int lane = 0; lane < lanes; ++lane) sources[i][half].value[lane] = bit_cast<float>(from[lane] ^ sign);
        }
    }
    for (int half = 0; half < 2; ++half) {
        const float *a = sources[0][half].value, *b = sources[1][half].value, *c = sources[count - 1][half].value;
        for (int lane = 0; lane < lanes; ++lane) result.value[lane] = Op::apply(a[lane], b[lane], c[lane]);
        if (in.clamp)
            for (auto &x : result.value) x = x > 0 ? (x < 1 ? x : 1.f) : 0.f;
        store_words(w, in, half, reinterpret_cast<u32 *>(result.value), false, masks);
    }
}

struct FmaFloat { static float apply(float a, float b, float c) { return __builtin_fmaf(a, b, c); } };
struct MulFloat { static float apply(float a, float b, float) { return a * b; } };
struct AddFloat { static float apply(float a, float b, float) { return a + b; } };

void move_two(Wave &w, const Instruction &in) {
    LaneMasks masks[2]{LaneMasks(w), LaneMasks(w)};
    Lanes<u32> result[2];
    for (int i = 0; i < 2; ++i) {                             // low word from source 0, high word from source 1
        Instruction one = in;
        one.source[i] +=
            (in.opsel >> i & 1) && in.source[i] != literal && (in.source[i] < 127 || in.source[i] >= first_vgpr);
        fetch_words(w, one, i, result[i].value, masks[i]);
    }
    for (int i = 0; i < 2; ++i) store_words(w, in, i, result[i].value, false, masks[i]);
}

// --- mixed precision and dot products --------------------------------------------------------------------------------

// v_fma_mix: each source is a float or half of a packed one.
template <int kind> void fma_mix(Wave &w, const Instruction &in) {   // 0: float result, 1: low half, 2: high half
    LaneMasks masks(w);
    Lanes<u32> buffers[3], result;
    for (int i = 0; i < 3; ++i) fetch_words(w, in, i, buffers[i].value, masks);
    unsigned r = w.vector_register(in.destination);
    for (int lane = 0; lane < lanes; ++lane) {
        float x[3];
        for (int i = 0; i < 3; ++i) {
            u32 word = buffers[i].value[lane];
            if (in.opsel_high >> i & 1) {
                u16 bits = in.source[i] < first_vgpr ? half_constant(in.source[i], word) : u16(word);
                x[i] = float(bit_cast<half>(in.opsel >> i & 1 ? u16(word >> 16) : bits));
            } else {
                x[i] = bit_cast<float>(word);
            }
            if (in.negative_high >> i & 1) x[i] = std::fabs(x[i]);
            if (in.negative >> i & 1) x[i] = -x[i];
        }
        float value = std::fma(x[0], x[1], x[2]);
        if (in.clamp) value = value > 0 ? (value < 1 ? value : 1.f) : 0.f;
        u32 old = w.v[r][lane];
        if (kind == 0) result.value[lane] = bit_cast<u32>(value);
        else if (kind == 1) result.value[lane] = (old & 0xffff0000) | bit_cast<u16>(half(value));
        else result.value[lane] = (old & 0xffff) | u32(bit_cast<u16>(half(value))) << 16;
    }
    store_words(w, in, 0, result.value, false, masks);
}

i32 signed_part(u32 x, int i, int width) { return i32(x << (32 - width * (i + 1))) >> (32 - width); }
u32 unsigned_part(u32 x, int i, int width) { return x >> (width * i) & ((1u << width) - 1); }

template <int width> u32 dot_signed(u32 a, u32 b, u32 c) {
    for (int i = 0; i < 32 / width; ++i) c += u32(signed_part(a, i, width) * signed_part(b, i, width));
    return c;
}
template <int width> u32 dot_unsigned(u32 a, u32 b, u32 c) {
    for (int i = 0; i < 32 / width; ++i) c += unsigned_part(a, i, width) * unsigned_part(b, i, width);
    return c;
}
float dot_half(u32 a, u32 b, float c) {
    for (int i = 0; i < 2; ++i)
        c += float(bit_cast<half>(u16(a >> 16 * i))) * float(bit_cast<half>(u16(b >> 16 * i)));
    return c;
}
float dot_bfloat16(u32 a, u32 b, float c) {
    for (int i = 0; i < 2; ++i) c += float(bfloat16{u16(a >> 16 * i)}) * float(bfloat16{u16(b >> 16 * i)});
    return c;
}

const VectorOp operations[] = {
    PACKED("v_pk_add_f16", half, (half a, half b), a + b),
    PACKED("v_pk_mul_f16", half, (half a, half b), a *b),
    PACKED("v_pk_fma_f16", half, (half a, half b, half c), double(a) * double(b) + double(c)),
    PACKED("v_pk_fmac_f16", half, (half a, half b, half c), double(a) * double(b) + double(c)),
    PACKED("v_pk_min_f16", half, (half a, half b),
           a != a   ? b
           : b != b ? a
           : a < b  ? a
                    : b),
    PACKED("v_pk_max_f16", half, (half a, half b),
           a != a   ? b
           : b != b ? a
           : a > b  ? a
                    : b),
    PACKED("v_pk_add_u16", u16, (u16 a, u16 b), a + b),
    PACKED("v_pk_add_i16", u16, (u16 a, u16 b), a + b),
    PACKED("v_pk_sub_u16", u16, (u16 a, u16 b), a - b),
    PACKED("v_pk_sub_i16", u16, (u16 a, u16 b), a - b),
    PACKED("v_pk_mul_lo_u16", u16, (u16 a, u16 b), u32(a) * b),
    PACKED("v_pk_mad_u16", u16, (u16 a, u16 b, u16 c), u32(a) * b + c),
    PACKED("v_pk_mad_i16", u16, (u16 a, u16 b, u16 c), u32(a) * b + c),
    PACKED("v_pk_min_i16", i16, (i16 a, i16 b), std::min(a, b)),
    PACKED("v_pk_max_i16", i16, (i16 a, i16 b), std::max(a, b)),
    PACKED("v_pk_min_u16", u16, (u16 a, u16 b), std::min(a, b)),
    PACKED("v_pk_max_u16", u16, (u16 a, u16 b), std::max(a, b)),
    PACKED("v_pk_lshlrev_b16", u16, (u16 a, u16 b), b << (a & 15)),
    PACKED("v_pk_lshrrev_b16", u16, (u16 a, u16 b), b >> (a & 15)),
    PACKED("v_pk_ashrrev_i16", i16, (i16 a, i16 b), b >> (a & 15)),
    {"v_pk_fma_f32", execute_two_floats<FmaFloat, 3>},
    {"v_pk_mul_f32", execute_two_floats<MulFloat, 2>},
    {"v_pk_add_f32", execute_two_floats<AddFloat, 2>},
    {"v_pk_mov_b32", move_two},
    {"v_fma_mix_f32", fma_mix<0>},
    {"v_fma_mixlo_f16", fma_mix<1>},
    {"v_fma_mixhi_f16", fma_mix<2>},
    VECTOR("v_dot2_f32_f16", float, (u32 a, u32 b, float c), dot_half(a, b, c)),
    VECTOR("v_dot2c_f32_f16", float, (u32 a, u32 b, float c), dot_half(a, b, c)),
    VECTOR("v_dot2_f32_bf16", float, (u32 a, u32 b, float c), dot_bfloat16(a, b, c)),
    VECTOR("v_dot2c_f32_bf16", float, (u32 a, u32 b, float c), dot_bfloat16(a, b, c)),
    VECTOR("v_dot2_i32_i16", u32, (u32 a, u32 b, u32 c), dot_signed<16>(a, b, c)),
    VECTOR("v_dot2c_i32_i16", u32, (u32 a, u32 b, u32 c), dot_signed<16>(a, b, c)),
    VECTOR("v_dot2_u32_u16", u32, (u32 a, u32 b, u32 c), dot_unsigned<16>(a, b, c)),
    VECTOR("v_dot4_i32_i8", u32, (u32 a, u32 b, u32 c), dot_signed<8>(a, b, c)),
    VECTOR("v_dot4c_i32_i8", u32, (u32 a, u32 b, u32 c), dot_signed<8>(a, b, c)),
    VECTOR("v_dot4_u32_u8", u32, (u32 a, u32 b, u32 c), dot_unsigned<8>(a, b, c)),
    VECTOR("v_dot8_i32_i4", u32, (u32 a, u32 b, u32 c), dot_signed<4>(a, b, c)),
    VECTOR("v_dot8c_i32_i4", u32, (u32 a, u32 b, u32 c), dot_signed<4>(a, b, c)),
    VECTOR("v_dot8_u32_u4", u32, (u32 a, u32 b, u32 c), dot_unsigned<4>(a, b, c)),
};

}  // namespace

bool define_packed(const std::string &name, Operation &operation) {
    if (!define_from(operations, std::size(operations), name, operation)) return false;
    operation.destination_is_source =
        name == "v_pk_fmac_f16" || name.find("c_f32_") != name.npos || name.find("c_i32_") != name.npos;
    return true;
}

}  // namespace emulator
