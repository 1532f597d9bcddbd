// LDS instructions. Semantics: chapter "LDS" and the DS_* entries of AMD's ISA documents for MI200, MI300 and CDNA4.
//
// Races. Each word remembers who wrote it last and with which operation. Another wave may touch it only when, at the
// last barrier that both passed, the writer already knew that operation to be complete (s_waitcnt before s_barrier).
// A word that was read since the last barrier, or by a read that was not complete at it, must not be written by another
// wave.
//
// Cycles. A wave's access is split into phases of fixed lanes; a phase takes as many cycles as its busiest bank (4
// bytes wide) has different words in it. There are 32 banks, so that a phase is 32 lanes of 4 bytes, 16 of 8, 8 of 16;
// reads of gfx950 find 64 banks and twice the lanes. Lanes of a phase are neighbours, except in reads of 12 and 16
// bytes. Sources: for gfx942 AMD's article "Avoiding LDS Bank Conflicts on AMD GPUs Using CK-Tile Framework" and the
// page on LDS of the Composable Kernel documentation; for gfx950 the measurements in HazyResearch/HipKittens,
// analysis/paper_experiments.
#include <algorithm>

#include "shared_memory.h"

namespace emulator {

bool touch_lds(Wave &w, uint32_t address, uint32_t bytes, Access access, uint32_t number, bool by_memory, bool defined,
               int lane) {
    Workgroup &group = *w.group;
    if (uint64_t(address) + bytes > group.lds.size())
        w.fail("LDS access at byte " + std::to_string(address) + " (" + std::to_string(bytes) +
                   " bytes); the kernel has " + std::to_string(group.lds.size()),
               lane);
    if (address & (std::min(bytes, 4u) - 1))
        w.fail("misaligned LDS access at byte " + std::to_string(address), lane);
    bool all_defined = true;
    for (uint32_t at = address; at < address + bytes;) {
        const uint32_t offset = at & 3, count = std::min(4 - offset, address + bytes - at);
        const uint8_t mask = uint8_t(((1u << count) - 1) << offset);
        LdsWord &word = group.lds_words[at / 4];
        at += count;
        const bool no_race = w.hazards.unchecked || (access == Access::atomic && word.atomic);
        if (word.writer >= 0 && (word.written_bytes & mask) && !no_race) {
            const Wave &writer = *group.waves[word.writer];
            if (word.writer != w.number) {
                const uint32_t released = word.by_memory ? writer.vm_released : writer.lds_released;
                if (word.write_number > released)
                    w.fail("race: LDS byte " + std::to_string(at - count) + " was written by wave " +
                               std::to_string(word.writer) + " and there is no completed write and barrier between",
                           lane);
            } else if (word.by_memory && word.write_number > w.vm_done) {
                w.fail("LDS byte " + std::to_string(at - count) +
                           " is used before s_waitcnt vmcnt for the load to LDS that writes it",
                       lane);
            }
        }
        if (access == Access::read) {
            if (word.read_epoch != group.epoch) {
                word.read_epoch = group.epoch;
                word.readers = 0;
            }
            word.readers |= 1u << w.number;
            all_defined &= (word.defined & mask) == mask;
        } else {
            if (word.read_epoch == group.epoch && (word.readers & ~(1u << w.number)) && !no_race)
                w.fail("race: LDS byte " + std::to_string(at - count) + " is written while wave " +
                           std::to_string(__builtin_ctz(word.readers & ~(1u << w.number))) +
                           " reads it: there is no barrier between", lane);
            if (access == Access::atomic) all_defined &= (word.defined & mask) == mask;
            word.written_bytes =
                word.writer == w.number && word.by_memory == by_memory ? word.written_bytes | mask : mask;
            word.writer = int8_t(w.number);
            word.write_number = number;
            word.by_memory = by_memory;
            word.atomic = access == Access::atomic;
            word.defined = defined ? word.defined | mask : word.defined & ~mask;
        }
    }
    return all_defined;
}

void carry_reads_over_barrier(Wave &w) {
    if (w.lds_done == w.lds_issued) return;
    for (const Wave::LdsRead &read : w.lds_reads) {
        if (read.number <= w.lds_done) continue;
        for (int lane = 0; lane < lanes; ++lane) {
            if (!(read.mask >> lane & 1)) continue;
            for (uint32_t at = read.addresses[lane] / 4; at <= (read.addresses[lane] + read.bytes - 1) / 4; ++at) {
                LdsWord &word = w.group->lds_words[at];
                if (word.read_epoch != w.group->epoch) word.readers = 0;
                word.read_epoch = w.group->epoch;
                word.readers |= 1u << w.number;
            }
        }
    }
}

void count_lds(Wave &w, const Instruction &in, const uint32_t *addresses, uint64_t mask, uint32_t bytes, bool write) {
    const uint32_t words = std::max(bytes / 4, 1u);
    const bool doubled = w.group->launch->arch == Arch::gfx950 && !write && words != 3;
    const uint32_t banks = doubled ? 64 : 32, per_phase = words == 3 ? 8 : banks / words;
    // The first lanes of the groups of four, in the order of the phases, of half a wave.
    static const uint8_t in_pairs[] = {0, 20, 4, 16, 8, 28, 12, 24}, in_fours[] = {0, 12, 20, 24, 4, 8, 16, 28};
    const uint8_t *groups = write || words < 3 ? nullptr : doubled ? in_fours : in_pairs;
    auto lane_at = [&](uint32_t i) { return groups ? (i & 32) + groups[(i & 31) / 4] + (i & 3) : i; };
    Cost &cost = w.group->cost(in);
    uint64_t cycles = 0, least = 0;
    for (uint32_t begin = 0; begin < lanes; begin += per_phase) {
        uint32_t seen[64][8], count[64] = {}, most = 0;       // the different words of each bank
        for (uint32_t i = begin; i < begin + per_phase; ++i) {
            const uint32_t lane = lane_at(i);
            if (!(mask >> lane & 1)) continue;
            for (uint32_t word = 0; word < words; ++word) {
                uint32_t address = addresses[lane] / 4 + word, bank = address % banks;
                bool known = false;
                for (uint32_t j = 0; j < std::min(count[bank], 8u); ++j) known |= seen[bank][j] == address;
                if (known) continue;
                if (count[bank] < 8) seen[bank][count[bank]] = address;
                most = std::max(most, ++count[bank]);
            }
        }
        cycles += most;
        least += most > 0;
    }
    cost.lds_cycles += cycles;
    cost.lds_least += least;
}

// --- atomic functions ------------------------------------------------------------------------------------------------

namespace {

template <class T> uint64_t back(T x) { uint64_t r = 0; memcpy(&r, &x, sizeof x); return r; }
template <class T> T as(uint64_t x) { T r; memcpy(&r, &x, sizeof r); return r; }

#define ATOMIC(name, ...)                                 \
    {name,                                                \
     [](uint64_t o, uint64_t d, uint64_t c) -> uint64_t { \
         using U = uint32_t;                              \
         using I = int32_t;                               \
         U old = U(o), data = U(d), cmp = U(c);           \
         (void)old;                                       \
         (void)data;                                      \
         (void)cmp;                                       \
         (void)sizeof(I);                                 \
         return back<U>(U(__VA_ARGS__));                  \
     },                                                   \
     [](uint64_t o, uint64_t d, uint64_t c) -> uint64_t { \
         using U = uint64_t;                              \
         using I = int64_t;                               \
         U old = o, data = d, cmp = c;                    \
         (void)old;                                       \
         (void)cmp;                                       \
         (void)data;                                      \
         (void)sizeof(I);                                 \
         return U(__VA_ARGS__);                           \
     }}
#define ATOMIC_FLOAT(name, ...)                            \
    {name,                                                 \
     [](uint64_t o, uint64_t d, uint64_t) -> uint64_t {    \
         float old = as<float>(o), data = as<float>(d);    \
         return back<float>(__VA_ARGS__);                  \
     },                                                    \
     [](uint64_t o, uint64_t d, uint64_t) -> uint64_t {    \
         double old = as<double>(o), data = as<double>(d); \
         return back<double>(__VA_ARGS__);                 \
     }}

uint64_t add_two_halves(uint64_t o, uint64_t d, uint64_t) {
    uint32_t r = 0;
    for (int i = 0; i < 2; ++i)
        r |= uint32_t(bit_cast<uint16_t>(half(as<half>(o >> 16 * i) + as<half>(d >> 16 * i)))) << (16 * i);
    return r;
}

uint64_t add_two_bfloats(uint64_t o, uint64_t d, uint64_t) {
    uint32_t r = 0;
    for (int i = 0; i < 2; ++i) {
        float sum = float(bfloat16{uint16_t(o >> 16 * i)}) + float(bfloat16{uint16_t(d >> 16 * i)});
        uint32_t bits = bit_cast<uint32_t>(sum);
        r |= ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) << (16 * i);
    }
    return r;
}

const AtomicOp atomics[] = {
    ATOMIC("add", old + data),
    ATOMIC("sub", old - data),
    ATOMIC("rsub", data - old),
    ATOMIC("inc", old >= data ? 0 : old + 1),
    ATOMIC("dec", old == 0 || old > data ? data : old - 1),
    ATOMIC("smin", std::min(I(old), I(data))),
    ATOMIC("smax", std::max(I(old), I(data))),
    ATOMIC("umin", std::min(old, data)),
    ATOMIC("umax", std::max(old, data)),
    ATOMIC("and", old & data),
    ATOMIC("or", old | data),
    ATOMIC("xor", old ^ data),
    ATOMIC("swap", data),
    ATOMIC("cmpswap", old == cmp ? data : old),
    ATOMIC_FLOAT("add_f", old + data),
    ATOMIC_FLOAT("min_f", std::fmin(old, data)),
    ATOMIC_FLOAT("max_f", std::fmax(old, data)),
    {"pk_add_f16", add_two_halves, nullptr},
    {"pk_add_bf16", add_two_bfloats, nullptr},
};

}  // namespace

const AtomicOp *find_atomic(const std::string &name) {
    for (const AtomicOp &atomic : atomics)
        if (name == atomic.name) return &atomic;
    return nullptr;
}

namespace {

// --- reads and writes ------------------------------------------------------------------------------------------------

// One line for each instruction: bytes of one access, how many accesses, how the value enters the register.
enum class Into : uint8_t { words, unsigned_part, signed_part, low_half, high_half };
struct LdsOp {
    const char *name;
    bool write;
    uint8_t bytes, accesses;
    uint16_t stride;                                          // bytes that one step of offset0 and offset1 means
    Into into;
    bool sign;
};
const LdsOp operations[] = {
    {"ds_read_b32", false, 4, 1, 0, Into::words, false},
    {"ds_read_b64", false, 8, 1, 0, Into::words, false},
    {"ds_read_b96", false, 12, 1, 0, Into::words, false},
    {"ds_read_b128", false, 16, 1, 0, Into::words, false},
    {"ds_read2_b32", false, 4, 2, 4, Into::words, false},
    {"ds_read2_b64", false, 8, 2, 8, Into::words, false},
    {"ds_read2st64_b32", false, 4, 2, 256, Into::words, false},
    {"ds_read2st64_b64", false, 8, 2, 512, Into::words, false},
    {"ds_read_u8", false, 1, 1, 0, Into::unsigned_part, false},
    {"ds_read_i8", false, 1, 1, 0, Into::signed_part, true},
    {"ds_read_u16", false, 2, 1, 0, Into::unsigned_part, false},
    {"ds_read_i16", false, 2, 1, 0, Into::signed_part, true},
    {"ds_read_u8_d16", false, 1, 1, 0, Into::low_half, false},
    {"ds_read_u8_d16_hi", false, 1, 1, 0, Into::high_half, false},
    {"ds_read_i8_d16", false, 1, 1, 0, Into::low_half, true},
    {"ds_read_i8_d16_hi", false, 1, 1, 0, Into::high_half, true},
    {"ds_read_u16_d16", false, 2, 1, 0, Into::low_half, false},
    {"ds_read_u16_d16_hi", false, 2, 1, 0, Into::high_half, false},
    {"ds_write_b32", true, 4, 1, 0, Into::words, false},
    {"ds_write_b64", true, 8, 1, 0, Into::words, false},
    {"ds_write_b96", true, 12, 1, 0, Into::words, false},
    {"ds_write_b128", true, 16, 1, 0, Into::words, false},
    {"ds_write2_b32", true, 4, 2, 4, Into::words, false},
    {"ds_write2_b64", true, 8, 2, 8, Into::words, false},
    {"ds_write2st64_b32", true, 4, 2, 256, Into::words, false},
    {"ds_write2st64_b64", true, 8, 2, 512, Into::words, false},
    {"ds_write_b8", true, 1, 1, 0, Into::words, false},
    {"ds_write_b16", true, 2, 1, 0, Into::words, false},
    {"ds_write_b8_d16_hi", true, 1, 1, 0, Into::high_half, false},
    {"ds_write_b16_d16_hi", true, 2, 1, 0, Into::high_half, false},
    {"ds_read_b64_tr_b16", false, 8, 1, 0, Into::words, false},
};

void fetch_addresses(Wave &w, const Instruction &in, uint32_t *addresses, uint64_t exec) {
    unsigned r = w.vector_register(in.source[0]);
    w.check_read(r);
    if (exec & ~w.defined[r]) w.fail_lanes("the LDS address has a value nobody wrote", exec & ~w.defined[r]);
    memcpy(addresses, w.v[r], sizeof w.v[r]);
}

uint32_t part_of(const LdsOp &op, uint32_t raw, uint32_t old) {
    uint32_t value = op.bytes == 1 ? (op.sign ? uint32_t(int8_t(raw)) : raw & 0xff)
                                   : (op.sign ? uint32_t(int16_t(raw)) : raw & 0xffff);
    if (op.into == Into::low_half) return (old & 0xffff0000) | (value & 0xffff);
    if (op.into == Into::high_half) return (old & 0xffff) | value << 16;
    return value;
}

void set_register(Wave &w, unsigned r, const uint32_t *values, uint64_t exec, uint64_t defined) {
    w.check_write(r);
    w.write_lanes(r, values, exec, defined);
    w.v_lds[r] = w.lds_issued;
    w.hazards.loaded(r);
}

void execute_access(Wave &w, const Instruction &in) {
    const LdsOp &op = operations[in.operation->detail];
    const uint64_t exec = w.exec();
    const uint32_t words = (op.bytes + 3) / 4, number = w.lds_issued + 1;
    Lanes<uint32_t> addresses, at;
    fetch_addresses(w, in, addresses.value, exec);
    for (int access = 0; access < op.accesses; ++access) {
        const uint32_t offset = op.accesses == 2 ? (access ? in.offset1 : in.offset0) * op.stride : uint32_t(in.offset);
        for (int lane = 0; lane < lanes; ++lane) at.value[lane] = addresses.value[lane] + offset;
        if (op.write) {
            unsigned r = w.vector_register(in.source[1 + access], words);
            for (uint32_t word = 0; word < words; ++word) w.check_read(r + word);
            for (int lane = 0; lane < lanes; ++lane) {
                if (!(exec >> lane & 1)) continue;
                for (uint32_t word = 0; word < words; ++word) {
                    uint32_t value = w.v[r + word][lane] >> (op.into == Into::high_half ? 16 : 0);
                    uint32_t size = std::min(4u, op.bytes - 4 * word), to = at.value[lane] + 4 * word;
                    touch_lds(w, to, size, Access::write, number, false, w.defined[r + word] >> lane & 1, lane);
                    memcpy(&w.group->lds[to], &value, size);
                }
            }
        } else {
            unsigned r = w.load_destination(in.destination + access * words, words, true);
            Lanes<uint32_t> values[4];
            uint64_t defined[4] = {all_lanes, all_lanes, all_lanes, all_lanes};
            for (int lane = 0; lane < lanes; ++lane) {
                if (!(exec >> lane & 1)) continue;
                for (uint32_t word = 0; word < words; ++word) {
                    uint32_t size = std::min(4u, op.bytes - 4 * word), from = at.value[lane] + 4 * word, raw = 0;
                    if (!touch_lds(w, from, size, Access::read, number, false, true, lane))
                        defined[word] &= ~(uint64_t{1} << lane);
                    memcpy(&raw, &w.group->lds[from], size);
                    values[word].value[lane] = op.into == Into::words ? raw : part_of(op, raw, w.v[r][lane]);
                }
            }
            Wave::LdsRead &read = w.lds_reads[(number * 2 + access) % 32];
            read.number = number;
            read.bytes = op.bytes;
            read.mask = exec;
            memcpy(read.addresses, at.value, sizeof read.addresses);
            if (access == 0) w.lds_issued = number;
            for (uint32_t word = 0; word < words; ++word)
                set_register(w, r + word, values[word].value, exec, defined[word]);
            if (access + 1 < op.accesses) w.lds_issued = number - 1;   // both accesses are one operation
        }
        count_lds(w, in, at.value, exec, op.bytes, op.write);
    }
    w.lds_issued = number;
}

// gfx950: 16 lanes read four rows of 16 16-bit values, and each gets a column.
void execute_transposed(Wave &w, const Instruction &in) {
    if (w.exec() != all_lanes) w.fail("a transposed LDS read with lanes switched off is not known to the emulator");
    Lanes<uint32_t> at, values[2];
    fetch_addresses(w, in, at.value, all_lanes);
    uint16_t raw[lanes][4];
    bool known[lanes];
    for (int lane = 0; lane < lanes; ++lane) {
        at.value[lane] += in.offset;
        if (at.value[lane] & 7) w.fail("misaligned LDS access at byte " + std::to_string(at.value[lane]), lane);
        known[lane] = touch_lds(w, at.value[lane], 8, Access::read, w.lds_issued + 1, false, true, lane);
        memcpy(raw[lane], &w.group->lds[at.value[lane]], 8);
    }
    uint64_t defined = all_lanes;
    for (int lane = 0; lane < lanes; ++lane) {
        uint16_t column[4];
        for (int row = 0; row < 4; ++row) {
            int from = (lane & ~15) + 4 * row + (lane & 15) / 4;
            column[row] = raw[from][lane & 3];
            if (!known[from]) defined &= ~(uint64_t{1} << lane);
        }
        memcpy(&values[0].value[lane], column, 4);
        memcpy(&values[1].value[lane], column + 2, 4);
    }
    ++w.lds_issued;
    unsigned r = w.load_destination(in.destination, 2, true);
    for (int word = 0; word < 2; ++word) set_register(w, r + word, values[word].value, all_lanes, defined);
    count_lds(w, in, at.value, all_lanes, 8, false);
}

// --- lanes exchanged through LDS's crossbar --------------------------------------------------------------------------

template <bool forward> void execute_permute(Wave &w, const Instruction &in) {
    const uint64_t exec = w.exec();
    Lanes<uint32_t> addresses, values{};
    fetch_addresses(w, in, addresses.value, exec);
    unsigned data = w.vector_register(in.source[1]);
    w.check_read(data);
    uint64_t defined = all_lanes;
    for (int lane = 0; lane < lanes; ++lane) {
        int other = (addresses.value[lane] + in.offset) / 4 & 63;
        if (!(exec >> lane & 1)) continue;
        int from = forward ? lane : other, to = forward ? other : lane;
        bool active = exec >> from & 1;                       // a lane that is off gives zero
        values.value[to] = active ? w.v[data][from] : 0;
        if (active && !(w.defined[data] >> from & 1)) defined &= ~(uint64_t{1} << to);
    }
    ++w.lds_issued;
    set_register(w, w.load_destination(in.destination, 1, true), values.value, exec, defined);
    Cost &cost = w.group->cost(in);
    cost.lds_cycles += 2;
    cost.lds_least += 2;
}

void execute_swizzle(Wave &w, const Instruction &in) {
    const uint64_t exec = w.exec();
    unsigned data = w.vector_register(in.source[0]);
    w.check_read(data);
    Lanes<uint32_t> values{};
    uint64_t defined = all_lanes;
    const uint32_t offset = uint16_t(in.offset);
    if (offset >= 0xe000) w.fail("this swizzle pattern is not known to the emulator");
    for (int lane = 0; lane < lanes; ++lane) {
        int from = offset & 0x8000 ? (lane & ~3) + (offset >> (2 * (lane & 3)) & 3)
                   : (lane & 32) | ((((lane & 31) & (offset & 31)) | (offset >> 5 & 31)) ^ (offset >> 10 & 31));
        bool active = exec >> from & 1;
        values.value[lane] = active ? w.v[data][from] : 0;
        if (active && !(w.defined[data] >> from & 1)) defined &= ~(uint64_t{1} << lane);
    }
    ++w.lds_issued;
    set_register(w, w.load_destination(in.destination, 1, true), values.value, exec, defined);
    Cost &cost = w.group->cost(in);
    cost.lds_cycles += 2;
    cost.lds_least += 2;
}

// --- atomics ---------------------------------------------------------------------------------------------------------

// detail: index of the atomic * 4 + (64 bit) * 2 + (returns the old value)
void execute_atomic(Wave &w, const Instruction &in) {
    const AtomicOp &atomic = atomics[in.operation->detail / 4];
    const bool wide = in.operation->detail & 2, returns = in.operation->detail & 1;
    const uint32_t bytes = wide ? 8 : 4, number = w.lds_issued + 1;
    const uint64_t exec = w.exec();
    Lanes<uint32_t> addresses, old[2]{};
    fetch_addresses(w, in, addresses.value, exec);
    const bool compares = !strcmp(atomic.name, "cmpswap");    // DS_CMPST: data0 is the value to compare with
    unsigned data = w.vector_register(in.source[compares ? 2 : 1], bytes / 4);
    unsigned compare = compares ? w.vector_register(in.source[1], bytes / 4) : data;
    uint64_t defined = all_lanes;
    for (int lane = 0; lane < lanes; ++lane) {
        if (!(exec >> lane & 1)) continue;
        uint32_t at = addresses.value[lane] + in.offset;
        auto operand = [&](unsigned r) { return w.v[r][lane] | (wide ? uint64_t(w.v[r + 1][lane]) << 32 : 0); };
        bool known = w.defined[data] >> lane & 1;
        known &= touch_lds(w, at, bytes, Access::atomic, number, false, known, lane);
        uint64_t before = 0, after;
        memcpy(&before, &w.group->lds[at], bytes);
        after = (wide ? atomic.apply64 : atomic.apply32)(before, operand(data), operand(compare));
        memcpy(&w.group->lds[at], &after, bytes);
        old[0].value[lane] = uint32_t(before);
        old[1].value[lane] = uint32_t(before >> 32);
        if (!known) defined &= ~(uint64_t{1} << lane);
        addresses.value[lane] = at;
    }
    w.lds_issued = number;
    if (returns) {
        unsigned r = w.load_destination(in.destination, bytes / 4, true);
        for (uint32_t word = 0; word < bytes / 4; ++word) set_register(w, r + word, old[word].value, exec, defined);
    }
    count_lds(w, in, addresses.value, exec, bytes, true);
}

// ds_add_rtn_u32 -> "add", 32 bit, returns.
bool parse_atomic(std::string name, Operation &operation) {
    if (name.rfind("ds_", 0) != 0) return false;
    name = name.substr(3);
    size_t split = name.rfind('_');
    if (split == name.npos) return false;
    std::string type = name.substr(split + 1), verb = name.substr(0, split);
    bool returns = verb.size() > 4 && verb.compare(verb.size() - 4, 4, "_rtn") == 0;
    if (returns) verb.resize(verb.size() - 4);
    if (verb == "wrxchg") verb = "swap";
    if (verb == "cmpst") verb = "cmpswap";
    if (type == "i32" || type == "i64") { if (verb == "min" || verb == "max") verb = "s" + verb; }
    if (type == "u32" || type == "u64") { if (verb == "min" || verb == "max") verb = "u" + verb; }
    if (verb == "pk_add") verb += "_" + type;
    else if (type[0] == 'f') verb += "_f";
    const AtomicOp *atomic = find_atomic(verb);
    if (!atomic) return false;
    bool wide = type.size() == 3 && type.substr(1) == "64";
    operation.detail = uint16_t((atomic - atomics) * 4 + wide * 2 + returns);
    return true;
}

}  // namespace

bool define_lds(const std::string &name, Operation &operation) {
    operation.detail = 0;
    Execute execute = nullptr;
    for (const LdsOp &op : operations)
        if (name == op.name) {
            execute = execute_access;
            operation.detail = uint16_t(&op - operations);
        }
    if (name == "ds_read_b64_tr_b16") execute = execute_transposed;
    if (name == "ds_permute_b32") execute = execute_permute<true>;
    if (name == "ds_bpermute_b32") execute = execute_permute<false>;
    if (name == "ds_swizzle_b32") execute = execute_swizzle;
    if (!execute && parse_atomic(name, operation)) execute = execute_atomic;
    if (name == "ds_nop") execute = [](Wave &, const Instruction &) {};
    if (!execute) return false;
    operation.execute = execute;
    operation.pipe = Pipe::lds;
    return true;
}

}  // namespace emulator
