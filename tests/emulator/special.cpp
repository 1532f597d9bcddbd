// Vector instructions that are more than a function of one lane: carries, selects, lanes read by other lanes.
// Semantics: chapter "Instructions" of AMD's ISA documents for MI200, MI300 and CDNA4.
#include <algorithm>

#include "lanes.h"

namespace emulator {

namespace {

using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

constexpr u64 bit(int lane) { return u64{1} << lane; }

// The mask that a lane-wise select or carry reads: VCC, or the third source of VOP3.
u64 fetch_mask(Wave &w, const Instruction &in, LaneMasks &masks) {
    u64 d, value = w.read_scalar64(in.format == Format::vop3 ? in.source[2] : Operand(vcc), d);
    masks.defined &= d;
    return value;
}

void store_carry(Wave &w, const Instruction &in, u64 carry, const LaneMasks &masks) {
    w.write_scalar64(in.scalar_destination, carry & masks.write, masks.whole() | ~masks.write);
    w.vector_wrote_scalar(in.scalar_destination, true);
}

// Addition and subtraction with a carry out, and a carry in where with_carry.
template <bool subtract, bool reverse, bool with_carry> void add_carry(Wave &w, const Instruction &in) {
    LaneMasks masks(w);
    Lanes<u32> buffer_a, buffer_b, result;
    const u32 *a = fetch<u32>(w, in, 0, buffer_a.value, masks), *b = fetch<u32>(w, in, 1, buffer_b.value, masks);
    if (reverse) std::swap(a, b);
    u64 carry_in = with_carry ? fetch_mask(w, in, masks) : 0, carry = 0;
    for (int lane = 0; lane < lanes; ++lane) {
        u64 c = carry_in >> lane & 1;
        u64 x = subtract ? u64(a[lane]) - b[lane] - c : u64(a[lane]) + b[lane] + c;
        result.value[lane] = u32(x);
        carry |= (x >> 32 & 1) << lane;
    }
    if (in.clamp)
        for (int lane = 0; lane < lanes; ++lane)
            if (carry >> lane & 1) result.value[lane] = subtract ? 0 : ~0u;
    store<u32>(w, in, result.value, masks);
    store_carry(w, in, carry, masks);
}

void select(Wave &w, const Instruction &in) {
    LaneMasks masks(w), masks_a(w), masks_b(w);
    Lanes<float> buffer_a, buffer_b;                          // float: modifiers apply to the sign bit
    const float *a = fetch<float>(w, in, 0, buffer_a.value, masks_a),
                *b = fetch<float>(w, in, 1, buffer_b.value, masks_b);
    u64 which = fetch_mask(w, in, masks);
    // Only the chosen operand matters.
    masks.defined &= (which & masks_b.defined) | (~which & masks_a.defined);
    masks.write = masks_a.write;
    Lanes<u32> result;
    for (int lane = 0; lane < lanes; ++lane)
        result.value[lane] = bit_cast<u32>(which >> lane & 1 ? b[lane] : a[lane]);
    store<u32>(w, in, result.value, masks);
}

template <bool is_signed> void multiply_add_wide(Wave &w, const Instruction &in) {
    LaneMasks masks(w);
    Lanes<u32> buffer_a, buffer_b;
    Lanes<u64> buffer_c, result;
    const u32 *a = fetch<u32>(w, in, 0, buffer_a.value, masks), *b = fetch<u32>(w, in, 1, buffer_b.value, masks);
    const u64 *c = fetch<u64>(w, in, 2, buffer_c.value, masks);
    u64 carry = 0;
    for (int lane = 0; lane < lanes; ++lane) {
        u64 product = is_signed ? u64(int64_t(int32_t(a[lane])) * int32_t(b[lane])) : u64(a[lane]) * b[lane];
        carry |= u64(__builtin_add_overflow(product, c[lane], &result.value[lane])) << lane;
    }
    store<u64>(w, in, result.value, masks);
    store_carry(w, in, carry, masks);
}

// --- one lane to or from a scalar register ---------------------------------------------------------------------------

void read_lane_at(Wave &w, const Instruction &in, unsigned lane) {
    unsigned r = w.vector_register(in.source[0]);
    w.check_read(r);
    unsigned to = in.destination - first_vgpr;
    w.write_scalar(to, w.v[r][lane], w.defined[r] >> lane & 1 ? ~0u : 0);
    w.vector_wrote_scalar(to, false);
}

void read_first_lane(Wave &w, const Instruction &in) {
    if (in.source[0] < first_vgpr) {
        uint32_t d, value = w.read_scalar(in.source[0], d);
        w.write_scalar(in.destination - first_vgpr, value, d);
        return;
    }
    read_lane_at(w, in, w.exec() ? __builtin_ctzll(w.exec()) : 0);
}

void check_lane_select(Wave &w, Operand operand) {
    if (operand < 128 && w.hazards.missing_scalar(operand, 4))
        w.fail(
            "four wait states are needed between a vector instruction that writes a scalar register and its use as a "
            "lane");
}

void read_lane(Wave &w, const Instruction &in) {
    check_lane_select(w, in.source[1]);
    unsigned lane = w.read_address(in.source[1], "the lane to read") & 63;
    if (in.source[0] < first_vgpr) w.fail("v_readlane of a scalar register");
    read_lane_at(w, in, lane);
}

void write_lane(Wave &w, const Instruction &in) {
    check_lane_select(w, in.source[1]);
    uint32_t d, value = w.read_scalar(in.source[0], d);
    unsigned lane = w.read_address(in.source[1], "the lane to write") & 63, r = w.vector_register(in.destination);
    w.check_write(r);
    w.v[r][lane] = value;
    w.defined[r] = (w.defined[r] & ~bit(lane)) | (d == ~0u ? bit(lane) : 0);
    w.hazards.wrote(r, in, false);
}

// How many lanes below this one have their bit set, in the lower or upper half of a mask.
template <bool high> void count_below(Wave &w, const Instruction &in) {
    LaneMasks masks(w);
    Lanes<u32> buffer_a, buffer_b, result;
    const u32 *a = fetch<u32>(w, in, 0, buffer_a.value, masks), *b = fetch<u32>(w, in, 1, buffer_b.value, masks);
    for (int lane = 0; lane < lanes; ++lane) {
        u64 below = (bit(lane) - 1) >> (high ? 32 : 0);
        result.value[lane] = u32(__builtin_popcount(a[lane] & u32(below))) + b[lane];
    }
    store<u32>(w, in, result.value, masks);
}

// --- registers exchanged ---------------------------------------------------------------------------------------------

void swap_registers(Wave &w, const Instruction &in) {
    unsigned a = w.vector_register(in.destination), b = w.vector_register(in.source[0]);
    w.check_read(a);
    w.check_read(b);
    w.check_write(a);
    w.check_write(b);
    Lanes<u32> old_a, old_b;
    memcpy(old_a.value, w.v[a], sizeof w.v[a]);
    memcpy(old_b.value, w.v[b], sizeof w.v[b]);
    u64 defined_a = w.defined[a], defined_b = w.defined[b];
    w.write_lanes(a, old_b.value, w.exec(), defined_b);
    w.write_lanes(b, old_a.value, w.exec(), defined_a);
    w.hazards.wrote(a, in, false);
    w.hazards.wrote(b, in, false);
}

// Exchanges the odd rows of the destination with the even rows of the source; a row: 16 or 32 lanes.
template <int row> void swap_rows(Wave &w, const Instruction &in) {
    unsigned a = w.vector_register(in.destination), b = w.vector_register(in.source[0]);
    w.check_read(a);
    w.check_read(b);
    w.check_write(a);
    w.check_write(b);
    if (w.exec() != all_lanes) w.fail("v_permlane*_swap with lanes switched off is not known to the emulator");
    for (int lane = 0; lane < lanes; ++lane) {
        if (!(lane & row)) continue;
        int other = lane - row;
        std::swap(w.v[a][lane], w.v[b][other]);
        u64 x = w.defined[a] >> lane & 1, y = w.defined[b] >> other & 1;
        w.defined[a] = (w.defined[a] & ~bit(lane)) | y << lane;
        w.defined[b] = (w.defined[b] & ~bit(other)) | x << other;
    }
    w.hazards.wrote(a, in, false);
    w.hazards.wrote(b, in, false);
}

void move_accumulator(Wave &w, const Instruction &in) {
    LaneMasks masks(w);
    Lanes<u32> buffer, result;
    const u32 *a = fetch<u32>(w, in, 0, buffer.value, masks);
    memcpy(result.value, a, sizeof result.value);
    store<u32>(w, in, result.value, masks);
}

void move_accumulator_to_accumulator(Wave &w, const Instruction &in) {
    Instruction moved = in;
    moved.source[0] += first_vgpr;
    moved.destination += first_vgpr;
    move_accumulator(w, moved);
}

// --- any function of three bits --------------------------------------------------------------------------------------

template <class T> void any_of_three_bits(Wave &w, const Instruction &in) {
    const unsigned table = in.negative | in.absolute << 3 | in.output_scale << 6;
    Instruction plain = in;
    plain.negative = plain.absolute = plain.output_scale = 0;
    LaneMasks masks(w);
    Lanes<T> buffer[3], result;
    const T *a = fetch<T>(w, plain, 0, buffer[0].value, masks),
              *b = fetch<T>(w, plain, 1, buffer[1].value, masks);
    const T *c = fetch<T>(w, plain, 2, buffer[2].value, masks);
    for (int lane = 0; lane < lanes; ++lane) {
        T r = 0;
        for (unsigned i = 0; i < 8; ++i)
            if (table >> i & 1)
                r |= (i & 4 ? a[lane] : ~a[lane]) & (i & 2 ? b[lane] : ~b[lane]) & (i & 1 ? c[lane] : ~c[lane]);
        result.value[lane] = r;
    }
    store<T>(w, plain, result.value, masks);
}

// --- division: the steps around the Newton iteration of a / b --------------------------------------------------------

template <class T> struct Limits;
template <> struct Limits<float> { static constexpr int least = -126, mantissa = 23, scale = 64; };
template <> struct Limits<double> { static constexpr int least = -1022, mantissa = 53, scale = 128; };

// Of a denormal number: that of its encoding.
template <class T>
int exponent_of(T x) {
    return x == 0 ? Limits<T>::least - 1 : std::max(std::ilogb(x), Limits<T>::least - 1);
}

// Scales the numerator or denominator (source 0, equal to one of them) so that the iteration neither overflows nor
// loses bits; the carry says that v_div_fmas must scale the quotient back.
template <class T> void divide_scale(Wave &w, const Instruction &in) {
    LaneMasks masks(w);
    Lanes<T> buffer[3], result;
    const T *s0 = fetch<T>(w, in, 0, buffer[0].value, masks), *denominator = fetch<T>(w, in, 1, buffer[1].value, masks);
    const T *numerator = fetch<T>(w, in, 2, buffer[2].value, masks);
    constexpr int scale = Limits<T>::scale, range = sizeof(T) == 4 ? 96 : 768, low = sizeof(T) == 4 ? 23 : 53;
    u64 carry = 0;
    for (int lane = 0; lane < lanes; ++lane) {
        T a = s0[lane], d = denominator[lane], n = numerator[lane], r = a;
        bool flag = false;
        auto denormal = [](T x) { return x != 0 && std::fabs(x) < std::numeric_limits<T>::min(); };
        if (d == 0 || n == 0) r = std::numeric_limits<T>::quiet_NaN();
        else if (exponent_of(n) - exponent_of(d) >= range) {
            flag = true;
            if (a == d) r = std::ldexp(a, scale);
        } else if (denormal(d)) r = std::ldexp(a, scale);
        else if (denormal(T(1) / d) && denormal(n / d)) {
            flag = true;
            if (a == d) r = std::ldexp(a, scale);
        } else if (denormal(T(1) / d)) r = std::ldexp(a, -scale);
        else if (denormal(n / d)) {
            flag = true;
            if (a == n) r = std::ldexp(a, scale);
        } else if (exponent_of(n) < Limits<T>::least + low) r = std::ldexp(a, scale);
        result.value[lane] = r;
        carry |= u64(flag) << lane;
    }
    store<T>(w, in, result.value, masks);
    store_carry(w, in, carry, masks);
}

template <class T> void divide_fma(Wave &w, const Instruction &in) {
    if (w.hazards.missing_scalar(vcc, 4))
        w.fail("four wait states are needed between writing VCC and v_div_fmas");
    LaneMasks masks(w);
    Lanes<T> buffer[3], result;
    const T *a = fetch<T>(w, in, 0, buffer[0].value, masks), *b = fetch<T>(w, in, 1, buffer[1].value, masks);
    const T *c = fetch<T>(w, in, 2, buffer[2].value, masks);
    u64 d, scaled = w.read_scalar64(vcc, d);
    masks.defined &= d;
    for (int lane = 0; lane < lanes; ++lane) {
        T x = std::fma(a[lane], b[lane], c[lane]);
        const int scale = exponent_of(c[lane]) > 0 ? Limits<T>::scale : -Limits<T>::scale;
        result.value[lane] = scaled >> lane & 1 ? std::ldexp(x, scale) : x;
    }
    store<T>(w, in, result.value, masks);
}

template <class T> void divide_fixup(Wave &w, const Instruction &in) {
    LaneMasks masks(w);
    Lanes<T> buffer[3], result;
    const T *quotient = fetch<T>(w, in, 0, buffer[0].value, masks),
            *denominator = fetch<T>(w, in, 1, buffer[1].value, masks);
    const T *numerator = fetch<T>(w, in, 2, buffer[2].value, masks);
    for (int lane = 0; lane < lanes; ++lane) {
        double d = double(denominator[lane]), n = double(numerator[lane]), q = double(quotient[lane]);
        bool special = d != d || n != n || d == 0 || n == 0 || std::isinf(d) || std::isinf(n);
        bool sign = std::signbit(d) != std::signbit(n);
        // Every special case is what IEEE division gives; a quotient that has become NaN on the way has overflowed.
        constexpr int underflow = sizeof(T) == 8 ? -1075 : -150;
        if (!special && std::ilogb(n) - std::ilogb(d) < underflow) q = 0;
        if (q != q) q = std::numeric_limits<double>::infinity();
        result.value[lane] = special ? T(n / d) : T(sign ? -std::fabs(q) : std::fabs(q));
    }
    store<T>(w, in, result.value, masks);
}

const VectorOp operations[] = {
    {"v_cndmask_b32", select},
    {"v_add_co_u32", add_carry<false, false, false>}, {"v_sub_co_u32", add_carry<true, false, false>},
    {"v_subrev_co_u32", add_carry<true, true, false>}, {"v_addc_co_u32", add_carry<false, false, true>},
    {"v_subb_co_u32", add_carry<true, false, true>}, {"v_subbrev_co_u32", add_carry<true, true, true>},
    {"v_mad_u64_u32", multiply_add_wide<false>, 16}, {"v_mad_i64_i32", multiply_add_wide<true>, 16},
    {"v_readfirstlane_b32", read_first_lane}, {"v_readlane_b32", read_lane}, {"v_writelane_b32", write_lane},
    {"v_mbcnt_lo_u32_b32", count_below<false>}, {"v_mbcnt_hi_u32_b32", count_below<true>},
    {"v_swap_b32", swap_registers}, {"v_permlane16_swap_b32", swap_rows<16>}, {"v_permlane32_swap_b32", swap_rows<32>},
    {"v_accvgpr_read_b32", move_accumulator}, {"v_accvgpr_write_b32", move_accumulator},
    {"v_accvgpr_mov_b32", move_accumulator_to_accumulator}, {"v_bitop3_b32", any_of_three_bits<u32>},
    {"v_bitop3_b16", any_of_three_bits<u16>},
    {"v_div_scale_f32", divide_scale<float>}, {"v_div_scale_f64", divide_scale<double>},
    {"v_div_fmas_f32", divide_fma<float>}, {"v_div_fmas_f64", divide_fma<double>},
    {"v_div_fixup_f32", divide_fixup<float>}, {"v_div_fixup_f64", divide_fixup<double>},
    {"v_div_fixup_f16", divide_fixup<half>},
    {"v_nop", [](Wave &, const Instruction &) {}},
};

}  // namespace

bool define_special(const std::string &name, Operation &operation) {
    if (!define_from(operations, std::size(operations), name, operation)) return false;
    if (name == "v_mad_u64_u32" || name == "v_mad_i64_i32") operation.words = uint16_t(Words::low_alone);
    return true;
}

}  // namespace emulator
