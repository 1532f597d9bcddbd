// Vector comparisons: v_cmp_* and v_cmpx_*, made from the condition and the type in their names.
#include "lanes.h"

namespace emulator {

namespace {

void store_mask(Wave &w, const Instruction &in, uint64_t result, const LaneMasks &masks) {
    // Bits of lanes that are off read as zero; the bit of a lane whose operands nobody wrote is itself unwritten.
    uint64_t value = result & masks.write, defined = masks.whole() | ~masks.write;
    w.write_scalar64(in.scalar_destination, value, defined);
    w.vector_wrote_scalar(in.scalar_destination, true);
    if (in.operation->detail) {                                // v_cmpx
        w.write_exec(value, defined);
        w.vector_wrote_scalar(exec_mask, true);
    }
}

template <class Condition, class T> void compare(Wave &w, const Instruction &in) {
    LaneMasks masks(w);
    Lanes<T> buffer_a, buffer_b;
    const T *a = fetch<T>(w, in, 0, buffer_a.value, masks), *b = fetch<T>(w, in, 1, buffer_b.value, masks);
    uint64_t result = 0;
    for (int lane = 0; lane < lanes; ++lane) result |= uint64_t(Condition::apply(a[lane], b[lane])) << lane;
    store_mask(w, in, result, masks);
}

// The classes of floating-point numbers, a bit each: signalling and quiet NaN, -inf, -normal, -denormal, -0, +0,
// +denormal, +normal, +inf.
template <class T> void compare_class(Wave &w, const Instruction &in) {
    LaneMasks masks(w);
    Lanes<T> buffer_a;
    Lanes<uint32_t> buffer_b;
    const T *a = fetch<T>(w, in, 0, buffer_a.value, masks);
    const uint32_t *b = fetch<uint32_t>(w, in, 1, buffer_b.value, masks);
    uint64_t result = 0;
    for (int lane = 0; lane < lanes; ++lane) {
        using Bits =
            std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
        constexpr int mantissa = sizeof(T) == 8 ? 52 : sizeof(T) == 4 ? 23 : 10;
        constexpr int exponents = int(sizeof(T)) * 8 - 1 - mantissa;
        Bits x = bit_cast<Bits>(a[lane]);
        bool negative = x >> (sizeof(T) * 8 - 1);
        Bits fraction = x & ((Bits(1) << mantissa) - 1), exponent = x >> mantissa & ((Bits(1) << exponents) - 1);
        int kind;
        if (exponent == (Bits(1) << exponents) - 1)
            kind = fraction ? int(fraction >> (mantissa - 1) & 1) : negative ? 2 : 9;
        else if (exponent) kind = negative ? 3 : 8;
        else if (fraction) kind = negative ? 4 : 7;
        else kind = negative ? 5 : 6;
        result |= uint64_t(b[lane] >> kind & 1) << lane;
    }
    store_mask(w, in, result, masks);
}

#define CONDITION(name, expression)   \
    struct name {                     \
        template <class T>            \
        static bool apply(T a, T b) { \
            (void)a;                  \
            (void)b;                  \
            return expression;        \
        }                             \
    }
CONDITION(Never, false);
CONDITION(Always, true);
CONDITION(Less, a < b);
CONDITION(Equal, a == b);
CONDITION(LessEqual, a <= b);
CONDITION(Greater, a > b);
CONDITION(LessGreater, a < b || a > b);
CONDITION(NotEqual, a != b);
CONDITION(GreaterEqual, a >= b);
CONDITION(Ordered, a == a && b == b);
CONDITION(Unordered, a != a || b != b);
CONDITION(NotGreaterEqual, !(a >= b));
CONDITION(NotLessGreater, !(a < b || a > b));
CONDITION(NotGreater, !(a > b));
CONDITION(NotLessEqual, !(a <= b));
CONDITION(NotLess, !(a < b));

template <class T> Execute by_condition(const std::string &c) {
    struct { const char *name; Execute execute; } table[] = {
        {"f", compare<Never, T>}, {"t", compare<Always, T>}, {"tru", compare<Always, T>}, {"lt", compare<Less, T>},
        {"eq", compare<Equal, T>}, {"le", compare<LessEqual, T>}, {"gt", compare<Greater, T>},
        {"lg", compare<LessGreater, T>}, {"ne", compare<NotEqual, T>}, {"ge", compare<GreaterEqual, T>},
        {"o", compare<Ordered, T>}, {"u", compare<Unordered, T>}, {"nge", compare<NotGreaterEqual, T>},
        {"nlg", compare<NotLessGreater, T>}, {"ngt", compare<NotGreater, T>}, {"nle", compare<NotLessEqual, T>},
        {"neq", compare<NotEqual, T>}, {"nlt", compare<NotLess, T>}};
    for (auto &entry : table)
        if (c == entry.name) return entry.execute;
    return nullptr;
}

}  // namespace

bool define_compare(const std::string &name, Operation &operation) {
    bool writes_exec = name.rfind("v_cmpx_", 0) == 0;
    if (!writes_exec && name.rfind("v_cmp_", 0) != 0) return false;
    size_t begin = writes_exec ? 7 : 6, split = name.rfind('_');
    std::string condition = name.substr(begin, split - begin), type = name.substr(split + 1);
    Execute execute = nullptr;
    if (condition == "class")
        execute = type == "f16" ? compare_class<half> : type == "f32" ? compare_class<float> : compare_class<double>;
    else if (type == "f16") execute = by_condition<half>(condition);
    else if (type == "f32") execute = by_condition<float>(condition);
    else if (type == "f64") execute = by_condition<double>(condition);
    else if (type == "i16") execute = by_condition<int16_t>(condition);
    else if (type == "u16") execute = by_condition<uint16_t>(condition);
    else if (type == "i32") execute = by_condition<int32_t>(condition);
    else if (type == "u32") execute = by_condition<uint32_t>(condition);
    else if (type == "i64") execute = by_condition<int64_t>(condition);
    else if (type == "u64") execute = by_condition<uint64_t>(condition);
    if (!execute) return false;
    operation.execute = execute;
    operation.pipe = Pipe::vector;
    operation.cycles = 4;
    operation.detail = writes_exec;
    return true;
}

}  // namespace emulator
