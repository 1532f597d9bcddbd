// Operands of vector instructions: 64 values of a type in, 64 values out. A handler names the types that it computes
// with; modifiers, DPP, SDWA, op_sel and constants follow from them here.
#pragma once

#include <cmath>
#include <tuple>
#include <type_traits>

#include "wave.h"

namespace emulator {

using half = _Float16;

struct bfloat16 {
    uint16_t bits;
    operator float() const { uint32_t x = uint32_t(bits) << 16; float f; memcpy(&f, &x, 4); return f; }
};

template <class T>
constexpr bool is_float = std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, half>;
template <class T> constexpr int words_of = sizeof(T) == 8 ? 2 : 1;

template <class To, class From> To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// Which words of 64-bit operands a word of the result depends on. Compiled code computes 64-bit products and sums with
// an undefined high half where it needs only the low half of the result.
enum class Words : uint16_t { together, apart, low_alone, high_alone };

// Which lanes an instruction writes, and in which of them its operands are defined: the 32-bit ones, and the low and
// high words of the 64-bit ones.
struct LaneMasks {
    uint64_t write, defined = all_lanes, low = all_lanes, high = all_lanes;
    explicit LaneMasks(const Wave &w) : write(w.exec()) {}
    uint64_t whole() const { return defined & low & high; }
    // Of one word of a 64-bit result.
    uint64_t of_word(int word, Words words) const {
        if (words == Words::apart) return defined & (word ? high : low);
        if (words == Words::low_alone && word == 0) return defined & low;
        if (words == Words::high_alone && word == 1) return defined & high;
        return whole();
    }
};

// DPP: for each lane the lane it reads, or -1.
void dpp_sources(const Wave &w, const Instruction &in, int *from);

// The raw 32-bit words of source i after DPP and SDWA.
void fetch_words(Wave &w, const Instruction &in, int i, uint32_t *raw, LaneMasks &masks);

// The constant of a scalar operand as a 16-bit float has it.
uint16_t half_constant(Operand operand, uint32_t value);

template <class T> T modified(T value, bool absolute, bool negative) {
    if (absolute) value = value < 0 || (value == 0 && std::signbit(double(value))) ? -value : value;
    return negative ? -value : value;
}

template <class T> const T *fetch(Wave &w, const Instruction &in, int i, T *buffer, LaneMasks &masks) {
    const Operand operand = in.source[i];
    const bool absolute = in.absolute >> i & 1, negative = in.negative >> i & 1;
    if constexpr (sizeof(T) == 8) {
        uint64_t raw[lanes];
        if (operand >= first_vgpr) {
            unsigned r = w.vector_register(operand, 2);
            w.check_read(r);
            w.check_read(r + 1);
            masks.low &= w.defined[r];
            masks.high &= w.defined[r + 1];
            for (int lane = 0; lane < lanes; ++lane) raw[lane] = w.v[r][lane] | uint64_t(w.v[r + 1][lane]) << 32;
            if (in.dpp && i == 0) {
                int from[lanes];
                dpp_sources(w, in, from);
                uint64_t moved[lanes];
                for (int lane = 0; lane < lanes; ++lane) {
                    moved[lane] = from[lane] < 0 ? 0 : raw[from[lane]];
                    if (from[lane] < 0 && !in.bound_control) masks.write &= ~(uint64_t{1} << lane);
                }
                memcpy(raw, moved, sizeof raw);
            }
        } else {
            uint64_t d, value = w.read_scalar64(operand, d);
            if (operand == literal && std::is_same_v<T, double>) value <<= 32;
            if (uint32_t(d) != ~0u) masks.low = 0;
            if (uint32_t(d >> 32) != ~0u) masks.high = 0;
            for (auto &x : raw) x = value;
        }
        for (int lane = 0; lane < lanes; ++lane) buffer[lane] = bit_cast<T>(raw[lane]);
    } else {
        const bool plain = !in.sdwa && !(in.dpp && i == 0);
        uint32_t raw[lanes];
        const uint32_t *from = raw;
        if (plain && operand >= first_vgpr) {
            unsigned r = w.vector_register(operand);
            w.check_read(r);
            masks.defined &= w.defined[r];
            from = w.v[r];
            if constexpr (sizeof(T) == 4)
                if (!(is_float<T> && (absolute || negative))) return reinterpret_cast<const T *>(from);
        } else {
            fetch_words(w, in, i, raw, masks);
        }
        if constexpr (sizeof(T) == 4) {
            for (int lane = 0; lane < lanes; ++lane) buffer[lane] = bit_cast<T>(from[lane]);
        } else {
            static_assert(sizeof(T) == 2);
            const bool high = in.format == Format::vop3 && (in.opsel >> i & 1);
            if (operand < first_vgpr && is_float<T> && !in.sdwa)
                for (auto &x : raw) x = half_constant(operand, x);
            for (int lane = 0; lane < lanes; ++lane)
                buffer[lane] = bit_cast<T>(uint16_t(high ? from[lane] >> 16 : from[lane]));
        }
    }
    if constexpr (is_float<T>)
        if (absolute || negative)
            for (int lane = 0; lane < lanes; ++lane) {
                if constexpr (sizeof(T) == 8) {
                    uint64_t x = bit_cast<uint64_t>(buffer[lane]);
                    if (absolute) x &= ~(uint64_t{1} << 63);
                    if (negative) x ^= uint64_t{1} << 63;
                    buffer[lane] = bit_cast<T>(x);
                } else {
                    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
                    Bits sign = Bits(1) << (sizeof(T) * 8 - 1), x = bit_cast<Bits>(buffer[lane]);
                    if (absolute) x &= ~sign;
                    if (negative) x ^= sign;
                    buffer[lane] = bit_cast<T>(x);
                }
            }
    return buffer;
}

// Writes the words of a result to register r of the destination, as SDWA and op_sel want it.
void store_words(Wave &w, const Instruction &in, unsigned word, uint32_t *raw, bool sixteen_bit,
                 const LaneMasks &masks);

template <class T> void store(Wave &w, const Instruction &in, T *result, const LaneMasks &masks) {
    if constexpr (is_float<T>) {
        if (in.output_scale) {
            const T factor = in.output_scale == 1 ? T(2) : in.output_scale == 2 ? T(4) : T(0.5);
            for (int lane = 0; lane < lanes; ++lane) result[lane] *= factor;
        }
        if (in.clamp)
            for (int lane = 0; lane < lanes; ++lane)
                result[lane] = result[lane] > T(0) ? (result[lane] < T(1) ? result[lane] : T(1)) : T(0);
    }
    uint32_t raw[lanes];
    if constexpr (sizeof(T) == 8) {
        for (int word = 0; word < 2; ++word) {
            for (int lane = 0; lane < lanes; ++lane)
                raw[lane] = uint32_t(bit_cast<uint64_t>(result[lane]) >> (32 * word));
            store_words(w, in, word, raw, false, masks);
        }
    } else if constexpr (sizeof(T) == 4) {
        store_words(w, in, 0, reinterpret_cast<uint32_t *>(result), false, masks);
    } else {
        for (int lane = 0; lane < lanes; ++lane) raw[lane] = bit_cast<uint16_t>(result[lane]);
        store_words(w, in, 0, raw, true, masks);
    }
}

template <class T> struct Lanes {
    alignas(64) T value[lanes];
};

// A vector operation from a function of one lane: struct Op { static R apply(A...); }.
template <class Op, class R, class... A, size_t... I>
void execute_lanes(Wave &w, const Instruction &in, R (*)(A...), std::index_sequence<I...>) {
    LaneMasks masks(w);
    std::tuple<Lanes<A>...> buffers;
    std::tuple<const A *...> inputs{fetch<A>(w, in, int(I), std::get<I>(buffers).value, masks)...};
    alignas(64) R result[lanes];
    for (int lane = 0; lane < lanes; ++lane) result[lane] = Op::apply(std::get<I>(inputs)[lane]...);
    store<R>(w, in, result, masks);
}

template <class R, class... A> constexpr size_t arity(R (*)(A...)) { return sizeof...(A); }

template <class Op> void execute_vector(Wave &w, const Instruction &in) {
    execute_lanes<Op>(w, in, &Op::apply, std::make_index_sequence<arity(&Op::apply)>());
}

struct VectorOp {
    const char *name;
    Execute execute;
    uint8_t cycles = 4;
};

// VECTOR(name, result type, (parameters), expression): one entry of a table of VectorOp.
#define VECTOR_CYCLES(name, cycles, R, parameters, ...)       \
    []() -> VectorOp {                                        \
        struct Op {                                           \
            static R apply parameters { return __VA_ARGS__; } \
        };                                                    \
        return {name, execute_vector<Op>, cycles};            \
    }()
#define VECTOR(name, R, parameters, ...) VECTOR_CYCLES(name, 4, R, parameters, __VA_ARGS__)

inline bool define_from(const VectorOp *table, size_t count, const std::string &name, Operation &operation) {
    for (size_t i = 0; i < count; ++i)
        if (name == table[i].name) {
            operation.execute = table[i].execute;
            operation.pipe = Pipe::vector;
            operation.cycles = table[i].cycles;
            return true;
        }
    return false;
}

}  // namespace emulator
