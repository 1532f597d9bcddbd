// Scalar instructions: SOP1, SOP2, SOPK, SOPC, SOPP.
// Semantics: chapter "Instructions" of AMD's ISA documents for MI200 and MI300.
#include <algorithm>

#include "wave.h"

namespace emulator {

namespace {

// --- arithmetic on one or two operands: value in, value and SCC out --------------------------------------------------

struct Result {
    uint64_t value;
    int scc;                 // 0, 1, or keep_scc
    bool keep_value = false;
};
constexpr int keep_scc = -1;

struct Inputs {
    uint64_t a, b;           // the operands
    uint64_t old;            // of the destination
    bool scc;
    int16_t immediate;
};

// How the definedness of a result follows from that of its operands: all or nothing, or bit by bit.
enum class Taint : uint8_t { whole, bitwise };

struct ScalarOp {
    const char *name;
    uint8_t width_out, width_a, width_b;   // 1: 32 bit, 2: 64 bit, 0: none
    Taint taint;
    bool reads_scc, reads_old;
    Result (*compute)(const Inputs &);
};

#define COMPUTE(...) [](const Inputs &x) -> Result { return {__VA_ARGS__}; }
#define OP(name, out, a, b, taint, ...) {name, out, a, b, Taint::taint, false, false, COMPUTE(__VA_ARGS__)}
#define OP_SCC(name, out, a, b, ...) {name, out, a, b, Taint::whole, true, false, COMPUTE(__VA_ARGS__)}
#define OP_OLD(name, out, a, b, ...) {name, out, a, b, Taint::whole, false, true, COMPUTE(__VA_ARGS__)}

uint32_t low(uint64_t x) { return uint32_t(x); }
int32_t s32(uint64_t x) { return int32_t(uint32_t(x)); }
uint64_t field_mask(unsigned width) { return width >= 64 ? ~uint64_t{0} : (uint64_t{1} << width) - 1; }
uint32_t bfe_u32(uint32_t a, uint32_t b) { return a >> (b & 31) & uint32_t(field_mask(b >> 16 & 0x7f)); }
int64_t bfe_signed(int64_t a, unsigned offset, unsigned width) {
    if (!width) return 0;
    if (offset + width >= 64) return a >> offset;
    return int64_t(uint64_t(a) << (64 - offset - width)) >> (64 - width);
}
bool add_overflow(int32_t a, int32_t b) { int32_t r; return __builtin_add_overflow(a, b, &r); }
bool sub_overflow(int32_t a, int32_t b) { int32_t r; return __builtin_sub_overflow(a, b, &r); }
uint64_t reverse(uint64_t x, int width) {
    uint64_t r = 0;
    for (int i = 0; i < width; ++i) r |= (x >> i & 1) << (width - 1 - i);
    return r;
}
uint64_t first_one(uint64_t x) { return x ? __builtin_ctzll(x) : ~uint64_t{0}; }
uint64_t leading_u32(uint32_t x) { return x ? __builtin_clz(x) : ~uint64_t{0}; }
uint64_t leading_u64(uint64_t x) { return x ? __builtin_clzll(x) : ~uint64_t{0}; }
// For each group of four bits of which one is set: all four, or one bit for the group.
uint64_t groups_of_four(uint64_t x, bool one_bit) {
    uint64_t r = 0;
    for (int i = 0; i < 64; i += 4)
        if (x >> i & 15) r |= one_bit ? uint64_t{1} << (i / 4) : uint64_t{15} << i;
    return r;
}

const ScalarOp operations[] = {
    OP("s_add_u32", 1, 1, 1, whole, low(x.a + x.b), low(x.a) + uint64_t(low(x.b)) > 0xffffffffu),
    OP("s_sub_u32", 1, 1, 1, whole, low(x.a - x.b), low(x.a) < low(x.b)),
    OP("s_add_i32", 1, 1, 1, whole, low(x.a + x.b), add_overflow(s32(x.a), s32(x.b))),
    OP("s_sub_i32", 1, 1, 1, whole, low(x.a - x.b), sub_overflow(s32(x.a), s32(x.b))),
    OP_SCC("s_addc_u32", 1, 1, 1, low(x.a + x.b + x.scc), low(x.a) + uint64_t(low(x.b)) + x.scc > 0xffffffffu),
    OP_SCC("s_subb_u32", 1, 1, 1, low(x.a - x.b - x.scc), uint64_t(low(x.a)) < uint64_t(low(x.b)) + x.scc),
    OP("s_min_i32", 1, 1, 1, whole, low(std::min(s32(x.a), s32(x.b))), s32(x.a) < s32(x.b)),
    OP("s_min_u32", 1, 1, 1, whole, std::min(low(x.a), low(x.b)), low(x.a) < low(x.b)),
    OP("s_max_i32", 1, 1, 1, whole, low(std::max(s32(x.a), s32(x.b))), s32(x.a) > s32(x.b)),
    OP("s_max_u32", 1, 1, 1, whole, std::max(low(x.a), low(x.b)), low(x.a) > low(x.b)),
    OP_SCC("s_cselect_b32", 1, 1, 1, x.scc ? x.a : x.b, keep_scc),
    OP_SCC("s_cselect_b64", 2, 2, 2, x.scc ? x.a : x.b, keep_scc),
    OP("s_and_b32", 1, 1, 1, bitwise, x.a & x.b, low(x.a & x.b) != 0),
    OP("s_and_b64", 2, 2, 2, bitwise, x.a & x.b, (x.a & x.b) != 0),
    OP("s_or_b32", 1, 1, 1, bitwise, x.a | x.b, low(x.a | x.b) != 0),
    OP("s_or_b64", 2, 2, 2, bitwise, x.a | x.b, (x.a | x.b) != 0),
    OP("s_xor_b32", 1, 1, 1, bitwise, x.a ^ x.b, low(x.a ^ x.b) != 0),
    OP("s_xor_b64", 2, 2, 2, bitwise, x.a ^ x.b, (x.a ^ x.b) != 0),
    OP("s_andn2_b32", 1, 1, 1, bitwise, x.a & ~x.b, low(x.a & ~x.b) != 0),
    OP("s_andn2_b64", 2, 2, 2, bitwise, x.a & ~x.b, (x.a & ~x.b) != 0),
    OP("s_orn2_b32", 1, 1, 1, bitwise, x.a | ~x.b, low(x.a | ~x.b) != 0),
    OP("s_orn2_b64", 2, 2, 2, bitwise, x.a | ~x.b, (x.a | ~x.b) != 0),
    OP("s_nand_b32", 1, 1, 1, bitwise, ~(x.a & x.b), low(~(x.a & x.b)) != 0),
    OP("s_nand_b64", 2, 2, 2, bitwise, ~(x.a & x.b), ~(x.a & x.b) != 0),
    OP("s_nor_b32", 1, 1, 1, bitwise, ~(x.a | x.b), low(~(x.a | x.b)) != 0),
    OP("s_nor_b64", 2, 2, 2, bitwise, ~(x.a | x.b), ~(x.a | x.b) != 0),
    OP("s_xnor_b32", 1, 1, 1, bitwise, ~(x.a ^ x.b), low(~(x.a ^ x.b)) != 0),
    OP("s_xnor_b64", 2, 2, 2, bitwise, ~(x.a ^ x.b), ~(x.a ^ x.b) != 0),
    OP("s_lshl_b32", 1, 1, 1, whole, low(x.a) << (x.b & 31), low(low(x.a) << (x.b & 31)) != 0),
    OP("s_lshl_b64", 2, 2, 1, whole, x.a << (x.b & 63), (x.a << (x.b & 63)) != 0),
    OP("s_lshr_b32", 1, 1, 1, whole, low(x.a) >> (x.b & 31), low(x.a) >> (x.b & 31) != 0),
    OP("s_lshr_b64", 2, 2, 1, whole, x.a >> (x.b & 63), x.a >> (x.b & 63) != 0),
    OP("s_ashr_i32", 1, 1, 1, whole, low(s32(x.a) >> (x.b & 31)), s32(x.a) >> (x.b & 31) != 0),
    OP("s_ashr_i64", 2, 2, 1, whole, uint64_t(int64_t(x.a) >> (x.b & 63)), int64_t(x.a) >> (x.b & 63) != 0),
    OP("s_bfm_b32", 1, 1, 1, whole, low(field_mask(x.a & 31) << (x.b & 31)), keep_scc),
    OP("s_bfm_b64", 2, 1, 1, whole, field_mask(x.a & 63) << (x.b & 63), keep_scc),
    OP("s_mul_i32", 1, 1, 1, whole, low(x.a * x.b), keep_scc),
    OP("s_mul_hi_u32", 1, 1, 1, whole, uint64_t(low(x.a)) * low(x.b) >> 32, keep_scc),
    OP("s_mul_hi_i32", 1, 1, 1, whole, low(int64_t(s32(x.a)) * s32(x.b) >> 32), keep_scc),
    OP("s_bfe_u32", 1, 1, 1, whole, bfe_u32(low(x.a), low(x.b)), bfe_u32(low(x.a), low(x.b)) != 0),
    OP("s_bfe_i32", 1, 1, 1, whole, low(bfe_signed(s32(x.a), x.b & 31, std::min<unsigned>(x.b >> 16 & 0x7f,
       32 - (x.b & 31)))),
       low(bfe_signed(s32(x.a), x.b & 31, std::min<unsigned>(x.b >> 16 & 0x7f, 32 - (x.b & 31)))) != 0),
    OP("s_bfe_u64", 2, 2, 1, whole, x.a >> (x.b & 63) & field_mask(x.b >> 16 & 0x7f),
       (x.a >> (x.b & 63) & field_mask(x.b >> 16 & 0x7f)) != 0),
    OP("s_bfe_i64", 2, 2, 1, whole, uint64_t(bfe_signed(int64_t(x.a), x.b & 63, x.b >> 16 & 0x7f)),
       bfe_signed(int64_t(x.a), x.b & 63, x.b >> 16 & 0x7f) != 0),
    OP("s_absdiff_i32", 1, 1, 1, whole, low(std::max(s32(x.a), s32(x.b))) - low(std::min(s32(x.a), s32(x.b))),
       s32(x.a) != s32(x.b)),
    OP("s_lshl1_add_u32", 1, 1, 1, whole, low((low(x.a) << 1) + x.b),
       (uint64_t(low(x.a)) << 1) + low(x.b) > 0xffffffffu),
    OP("s_lshl2_add_u32", 1, 1, 1, whole, low((low(x.a) << 2) + x.b),
       (uint64_t(low(x.a)) << 2) + low(x.b) > 0xffffffffu),
    OP("s_lshl3_add_u32", 1, 1, 1, whole, low((low(x.a) << 3) + x.b),
       (uint64_t(low(x.a)) << 3) + low(x.b) > 0xffffffffu),
    OP("s_lshl4_add_u32", 1, 1, 1, whole, low((low(x.a) << 4) + x.b),
       (uint64_t(low(x.a)) << 4) + low(x.b) > 0xffffffffu),
    OP("s_pack_ll_b32_b16", 1, 1, 1, whole, (x.a & 0xffff) | (low(x.b) << 16), keep_scc),
    OP("s_pack_lh_b32_b16", 1, 1, 1, whole, (x.a & 0xffff) | (x.b & 0xffff0000), keep_scc),
    OP("s_pack_hh_b32_b16", 1, 1, 1, whole, (low(x.a) >> 16) | (x.b & 0xffff0000), keep_scc),

    OP("s_mov_b32", 1, 1, 0, bitwise, x.a, keep_scc),
    OP("s_mov_b64", 2, 2, 0, bitwise, x.a, keep_scc),
    {"s_cmov_b32", 1, 1, 0, Taint::whole, true, true, [](const Inputs &x) -> Result { return {x.a, keep_scc,
       !x.scc}; }},
    {"s_cmov_b64", 2, 2, 0, Taint::whole, true, true, [](const Inputs &x) -> Result { return {x.a, keep_scc,
       !x.scc}; }},
    OP("s_not_b32", 1, 1, 0, bitwise, low(~x.a), low(~x.a) != 0),
    OP("s_not_b64", 2, 2, 0, bitwise, ~x.a, ~x.a != 0),
    OP("s_wqm_b32", 1, 1, 0, whole, groups_of_four(low(x.a), false), low(x.a) != 0),
    OP("s_wqm_b64", 2, 2, 0, whole, groups_of_four(x.a, false), x.a != 0),
    OP("s_quadmask_b32", 1, 1, 0, whole, groups_of_four(low(x.a), true), low(x.a) != 0),
    OP("s_quadmask_b64", 2, 2, 0, whole, groups_of_four(x.a, true), x.a != 0),
    OP("s_brev_b32", 1, 1, 0, whole, reverse(low(x.a), 32), keep_scc),
    OP("s_brev_b64", 2, 2, 0, whole, reverse(x.a, 64), keep_scc),
    OP("s_bcnt0_i32_b32", 1, 1, 0, whole, uint64_t(32 - __builtin_popcount(low(x.a))), low(~x.a) != 0),
    OP("s_bcnt0_i32_b64", 1, 2, 0, whole, uint64_t(64 - __builtin_popcountll(x.a)), ~x.a != 0),
    OP("s_bcnt1_i32_b32", 1, 1, 0, whole, uint64_t(__builtin_popcount(low(x.a))), low(x.a) != 0),
    OP("s_bcnt1_i32_b64", 1, 2, 0, whole, uint64_t(__builtin_popcountll(x.a)), x.a != 0),
    OP("s_ff0_i32_b32", 1, 1, 0, whole, first_one(low(~x.a)), keep_scc),
    OP("s_ff0_i32_b64", 1, 2, 0, whole, first_one(~x.a), keep_scc),
    OP("s_ff1_i32_b32", 1, 1, 0, whole, first_one(low(x.a)), keep_scc),
    OP("s_ff1_i32_b64", 1, 2, 0, whole, first_one(x.a), keep_scc),
    OP("s_flbit_i32_b32", 1, 1, 0, whole, leading_u32(low(x.a)), keep_scc),
    OP("s_flbit_i32_b64", 1, 2, 0, whole, leading_u64(x.a), keep_scc),
    OP("s_flbit_i32", 1, 1, 0, whole, leading_u32(s32(x.a) < 0 ? ~low(x.a) : low(x.a)), keep_scc),
    OP("s_flbit_i32_i64", 1, 2, 0, whole, leading_u64(int64_t(x.a) < 0 ? ~x.a : x.a), keep_scc),
    OP("s_sext_i32_i8", 1, 1, 0, whole, low(int8_t(x.a)), keep_scc),
    OP("s_sext_i32_i16", 1, 1, 0, whole, low(int16_t(x.a)), keep_scc),
    OP_OLD("s_bitset0_b32", 1, 1, 0, x.old & ~(1u << (x.a & 31)), keep_scc),
    OP_OLD("s_bitset0_b64", 2, 1, 0, x.old & ~(uint64_t{1} << (x.a & 63)), keep_scc),
    OP_OLD("s_bitset1_b32", 1, 1, 0, x.old | 1u << (x.a & 31), keep_scc),
    OP_OLD("s_bitset1_b64", 2, 1, 0, x.old | uint64_t{1} << (x.a & 63), keep_scc),
    OP("s_abs_i32", 1, 1, 0, whole, s32(x.a) < 0 ? low(-x.a) : low(x.a), low(x.a) != 0),
    OP("s_bitreplicate_b64_b32", 2, 1, 0, whole, [](uint32_t a) {
        uint64_t r = 0;
        for (int i = 0; i < 32; ++i) r |= uint64_t(a >> i & 1) * 3 << (2 * i);
        return r;
    }(low(x.a)), keep_scc),

    OP("s_cmp_eq_i32", 0, 1, 1, whole, 0, low(x.a) == low(x.b)),
    OP("s_cmp_lg_i32", 0, 1, 1, whole, 0, low(x.a) != low(x.b)),
    OP("s_cmp_gt_i32", 0, 1, 1, whole, 0, s32(x.a) > s32(x.b)),
    OP("s_cmp_ge_i32", 0, 1, 1, whole, 0, s32(x.a) >= s32(x.b)),
    OP("s_cmp_lt_i32", 0, 1, 1, whole, 0, s32(x.a) < s32(x.b)),
    OP("s_cmp_le_i32", 0, 1, 1, whole, 0, s32(x.a) <= s32(x.b)),
    OP("s_cmp_eq_u32", 0, 1, 1, whole, 0, low(x.a) == low(x.b)),
    OP("s_cmp_lg_u32", 0, 1, 1, whole, 0, low(x.a) != low(x.b)),
    OP("s_cmp_gt_u32", 0, 1, 1, whole, 0, low(x.a) > low(x.b)),
    OP("s_cmp_ge_u32", 0, 1, 1, whole, 0, low(x.a) >= low(x.b)),
    OP("s_cmp_lt_u32", 0, 1, 1, whole, 0, low(x.a) < low(x.b)),
    OP("s_cmp_le_u32", 0, 1, 1, whole, 0, low(x.a) <= low(x.b)),
    OP("s_cmp_eq_u64", 0, 2, 2, whole, 0, x.a == x.b), OP("s_cmp_lg_u64", 0, 2, 2, whole, 0, x.a != x.b),
    OP("s_bitcmp0_b32", 0, 1, 1, whole, 0, !(low(x.a) >> (x.b & 31) & 1)),
    OP("s_bitcmp1_b32", 0, 1, 1, whole, 0, int(low(x.a) >> (x.b & 31) & 1)),
    OP("s_bitcmp0_b64", 0, 2, 1, whole, 0, !(x.a >> (x.b & 63) & 1)),
    OP("s_bitcmp1_b64", 0, 2, 1, whole, 0, int(x.a >> (x.b & 63) & 1)),

    OP("s_movk_i32", 1, 0, 0, whole, low(x.immediate), keep_scc),
    {"s_cmovk_i32", 1, 0, 0, Taint::whole, true, true, [](const Inputs &x) -> Result { return {low(x.immediate),
       keep_scc, !x.scc}; }},
    OP_OLD("s_addk_i32", 1, 0, 0, low(x.old + x.immediate), add_overflow(s32(x.old), x.immediate)),
    OP_OLD("s_mulk_i32", 1, 0, 0, low(x.old * x.immediate), keep_scc),
#define COMPARE_K(name, operator_)                                                                      \
    {"s_cmpk_" name "_i32", 0, 0, 0, Taint::whole, false, true, COMPUTE(0, s32(x.old) operator_ x.immediate)}, \
    {"s_cmpk_" name "_u32", 0, 0, 0, Taint::whole, false, true, COMPUTE(0, low(x.old) operator_ uint16_t(x.immediate))},
    COMPARE_K("eq", ==) COMPARE_K("lg", !=) COMPARE_K("gt", >)
    COMPARE_K("ge", >=) COMPARE_K("lt", <) COMPARE_K("le", <=)
};

// Which bits of a bitwise result are known: those that stay the same whatever the operands' unknown bits are.
uint64_t known_bits(const ScalarOp &op, const Inputs &x, uint64_t value, uint64_t known_a, uint64_t known_b) {
    Inputs flipped_a = x, flipped_b = x, flipped_both = x;
    flipped_a.a = flipped_both.a = x.a ^ ~known_a;
    flipped_b.b = flipped_both.b = x.b ^ ~known_b;
    uint64_t changes = 0;
    for (const Inputs &other : {flipped_a, flipped_b, flipped_both}) changes |= op.compute(other).value ^ value;
    return ~changes;
}

void execute_scalar(Wave &w, const Instruction &in) {
    const ScalarOp &op = operations[in.operation->detail];
    Inputs x{0, 0, 0, w.scc, int16_t(in.offset)};
    uint64_t da = all_lanes, db = all_lanes, d_old = all_lanes;
    uint32_t d32;
    auto widened = [](uint32_t d) { return d | 0xffffffff00000000u; };
    if (op.width_a == 1) { x.a = w.read_scalar(in.source[0], d32); da = widened(d32); }
    else if (op.width_a == 2) x.a = w.read_scalar64(in.source[0], da);
    if (op.width_b == 1) { x.b = w.read_scalar(in.source[1], d32); db = widened(d32); }
    else if (op.width_b == 2) x.b = w.read_scalar64(in.source[1], db);
    if (op.reads_old) {
        if (op.width_out == 2) x.old = w.read_scalar64(in.destination, d_old);
        else { x.old = w.read_scalar(in.destination, d32); d_old = widened(d32); }
    }
    Result result = op.compute(x);
    const bool others_known = d_old == all_lanes && (!op.reads_scc || w.scc_defined);
    const bool selects = op.reads_scc && op.width_b && result.scc == keep_scc;  // s_cselect: only the chosen operand
    uint64_t d;
    if (op.taint == Taint::bitwise) d = known_bits(op, x, result.value, da, db);
    else if (selects) d = w.scc_defined ? (x.scc ? da : db) : 0;
    else d = others_known && da == all_lanes && db == all_lanes ? all_lanes : 0;
    if (op.width_out && !result.keep_value) {
        if (op.width_out == 2) w.write_scalar64(in.destination, result.value, d);
        else w.write_scalar(in.destination, uint32_t(result.value), uint32_t(d));
    }
    if (result.scc != keep_scc) {
        const uint64_t relevant = op.width_out == 1 ? 0xffffffffu : all_lanes;
        w.scc = result.scc;
        // "Not zero" is known as soon as one known bit is set.
        const bool known_nonzero = op.taint == Taint::bitwise && (result.value & d & relevant);
        w.scc_defined = (d & relevant) == relevant || known_nonzero;
    }
}

// --- EXEC ------------------------------------------------------------------------------------------------------------

template <class F> void save_exec(Wave &w, const Instruction &in, F f, bool write_old) {
    uint64_t d, exec = w.exec();
    uint64_t a = w.read_scalar64(in.source[0], d);
    uint64_t result = f(a, exec);
    // Lanes that are off stay off, whatever their bit was.
    uint64_t matters = f(a ^ ~d, exec) ^ result;
    if (matters) w.fail("EXEC is set from a value nobody wrote", __builtin_ctzll(matters));
    w.write_scalar64(in.destination, write_old ? exec : result);
    w.write_exec(result, all_lanes);
    w.scc = result != 0;
    w.scc_defined = true;
}

#define SAVE_EXEC(name, ...)                                                                        \
    {"s_" name "_saveexec_b64", [](Wave &w, const Instruction &in) {                                \
         save_exec(w, in, [](uint64_t a, uint64_t exec) -> uint64_t { return __VA_ARGS__; }, true); \
     }}

// --- program flow ----------------------------------------------------------------------------------------------------

void jump(Wave &w, const Instruction &in) { w.next_pc = in.index + 1 + in.offset; }

void branch_if(Wave &w, const Instruction &in, bool condition, bool known) {
    if (!known) w.fail("a branch depends on a value nobody wrote");
    if (condition) jump(w, in);
}

bool vcc_known(Wave &w, bool &nonzero) {
    uint64_t d, value = w.read_scalar64(vcc, d);
    nonzero = value != 0;
    return d == all_lanes || (value & d);
}

void jump_to_address(Wave &w, uint64_t address) {
    const CodeObject &code = *w.group->launch->code;
    uint64_t index = (address - code.text) / 4;
    if (address < code.text || index >= code.instructions.size()) w.fail("a jump outside the code");
    w.next_pc = uint32_t(index);
}

uint64_t address_of_next(const Wave &w) { return w.group->launch->code->text + uint64_t(w.next_pc) * 4; }

uint64_t defined_pair(Wave &w, Operand operand) {
    uint64_t d, value = w.read_scalar64(operand, d);
    if (d != all_lanes) w.fail("a jump to an address nobody wrote");
    return value;
}

void wait_count(Wave &w, const Instruction &in) {
    unsigned immediate = uint16_t(in.offset);
    w.wait_vm((immediate & 15) | (immediate >> 14 & 3) << 4);
    w.wait_lgkm(immediate >> 8 & 15);
}

// Hardware registers (HW_REG_*): MODE 1, XCC_ID 20. Others read as zero.
void get_register(Wave &w, const Instruction &in) {
    unsigned id = in.offset & 63, offset = in.offset >> 6 & 31, size = (in.offset >> 11 & 31) + 1;
    uint32_t value = id == 1 ? w.mode : id == 20 ? w.group->id[0] % 8 : 0;
    w.write_scalar(in.destination, value >> offset & uint32_t(field_mask(size)));
}

void set_register(Wave &w, const Instruction &in, uint32_t value) {
    unsigned id = in.offset & 63, offset = in.offset >> 6 & 31, size = (in.offset >> 11 & 31) + 1;
    if (id != 1) w.fail("s_setreg: only MODE is known to the emulator");
    uint32_t mask = uint32_t(field_mask(size)) << offset;
    w.mode = (w.mode & ~mask) | (value << offset & mask);
    if (w.mode & 0xf) w.fail("rounding modes other than to nearest are not known to the emulator");
}

struct Special {
    const char *name;
    Execute execute;
};

#define DO(name, ...) {name, [](Wave &w, const Instruction &in) { (void)w; (void)in; __VA_ARGS__; }}

const Special specials[] = {
    SAVE_EXEC("and", a & exec),
    SAVE_EXEC("or", a | exec),
    SAVE_EXEC("xor", a ^ exec),
    SAVE_EXEC("andn2", a & ~exec),
    SAVE_EXEC("orn2", a | ~exec),
    SAVE_EXEC("nand", ~(a & exec)),
    SAVE_EXEC("nor", ~(a | exec)),
    SAVE_EXEC("xnor", ~(a ^ exec)),
    SAVE_EXEC("andn1", ~a & exec),
    SAVE_EXEC("orn1", ~a | exec),
    DO("s_andn1_wrexec_b64", save_exec(
                                 w, in, [](uint64_t a, uint64_t e) { return ~a & e; }, false)),
    DO("s_andn2_wrexec_b64", save_exec(
                                 w, in, [](uint64_t a, uint64_t e) { return a & ~e; }, false)),
    DO("s_getpc_b64", w.write_scalar64(in.destination, address_of_next(w))),
    DO("s_setpc_b64", jump_to_address(w, defined_pair(w, in.source[0]))),
    DO("s_swappc_b64", uint64_t to = defined_pair(w, in.source[0]);
       w.write_scalar64(in.destination, address_of_next(w)); jump_to_address(w, to)),
    DO("s_call_b64", w.write_scalar64(in.destination, address_of_next(w)); jump(w, in)),
    DO("s_branch", jump(w, in)),
    DO("s_cbranch_scc0", branch_if(w, in, !w.scc, w.scc_defined)),
    DO("s_cbranch_scc1", branch_if(w, in, w.scc, w.scc_defined)),
    DO("s_cbranch_vccz", bool nonzero; bool known = vcc_known(w, nonzero); branch_if(w, in, !nonzero, known)),
    DO("s_cbranch_vccnz", bool nonzero; bool known = vcc_known(w, nonzero); branch_if(w, in, nonzero, known)),
    DO("s_cbranch_execz", branch_if(w, in, w.exec() == 0, true)),
    DO("s_cbranch_execnz", branch_if(w, in, w.exec() != 0, true)),
    DO("s_endpgm", w.state = WaveState::ended),
    DO("s_barrier", w.state = WaveState::at_barrier),
    DO("s_waitcnt", wait_count(w, in)),
    DO("s_nop", w.hazards.slot += in.offset & 15),
    DO("s_trap", w.fail("the kernel trapped (an assertion or unreachable code)")),
    DO("s_getreg_b32", get_register(w, in)),
    DO("s_setreg_b32", set_register(w, in, w.read_address(in.destination, "MODE"))),
    DO("s_setreg_imm32_b32", set_register(w, in, in.literal_value)),
    // No effect on what a kernel computes.
    DO("s_sleep", ),
    DO("s_setprio", ),
    DO("s_icache_inv", ),
    DO("s_wakeup", ),
    DO("s_incperflevel", ),
    DO("s_decperflevel", ),
    DO("s_sendmsg", ),
    DO("s_sethalt", ),
    DO("s_ttracedata", ),
};

}  // namespace

bool define_scalar(const std::string &name, Operation &operation) {
    for (const ScalarOp &op : operations)
        if (name == op.name) {
            operation.execute = execute_scalar;
            operation.detail = uint16_t(&op - operations);
            operation.cycles = 4;
            return true;
        }
    for (const Special &special : specials)
        if (name == special.name) {
            operation.execute = special.execute;
            operation.cycles = 4;
            return true;
        }
    return false;
}

}  // namespace emulator
