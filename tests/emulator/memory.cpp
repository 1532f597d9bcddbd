// Loads, stores and atomics on global memory and scratch: SMEM, FLAT, GLOBAL, SCRATCH, MUBUF. Host memory is the GPU's.
// Semantics: chapters "Scalar Memory", "Vector Memory" and "Flat Memory" of AMD's ISA documents for MI200, MI300,
// CDNA4.
#include <algorithm>

#include "shared_memory.h"

namespace emulator {

namespace {

constexpr uint64_t bit(int lane) { return uint64_t{1} << lane; }

enum class Into : uint8_t { words, unsigned_part, signed_part, low_half, high_half };
enum class Kind : uint8_t { load, store, load_to_lds };

struct MemoryOp {
    const char *suffix;      // after "global_", "buffer_" ...
    Kind kind;
    uint8_t bytes;
    Into into;
    bool sign;
};

const MemoryOp operations[] = {
    {"load_ubyte", Kind::load, 1, Into::unsigned_part, false},
    {"load_sbyte", Kind::load, 1, Into::signed_part, true},
    {"load_ushort", Kind::load, 2, Into::unsigned_part, false},
    {"load_sshort", Kind::load, 2, Into::signed_part, true},
    {"load_dword", Kind::load, 4, Into::words, false},
    {"load_dwordx2", Kind::load, 8, Into::words, false},
    {"load_dwordx3", Kind::load, 12, Into::words, false},
    {"load_dwordx4", Kind::load, 16, Into::words, false},
    {"load_ubyte_d16", Kind::load, 1, Into::low_half, false},
    {"load_ubyte_d16_hi", Kind::load, 1, Into::high_half, false},
    {"load_sbyte_d16", Kind::load, 1, Into::low_half, true},
    {"load_sbyte_d16_hi", Kind::load, 1, Into::high_half, true},
    {"load_short_d16", Kind::load, 2, Into::low_half, false},
    {"load_short_d16_hi", Kind::load, 2, Into::high_half, false},
    {"store_byte", Kind::store, 1, Into::words, false},
    {"store_byte_d16_hi", Kind::store, 1, Into::high_half, false},
    {"store_short", Kind::store, 2, Into::words, false},
    {"store_short_d16_hi", Kind::store, 2, Into::high_half, false},
    {"store_dword", Kind::store, 4, Into::words, false},
    {"store_dwordx2", Kind::store, 8, Into::words, false},
    {"store_dwordx3", Kind::store, 12, Into::words, false},
    {"store_dwordx4", Kind::store, 16, Into::words, false},
    {"load_lds_ubyte", Kind::load_to_lds, 1, Into::unsigned_part, false},
    {"load_lds_sbyte", Kind::load_to_lds, 1, Into::signed_part, true},
    {"load_lds_ushort", Kind::load_to_lds, 2, Into::unsigned_part, false},
    {"load_lds_sshort", Kind::load_to_lds, 2, Into::signed_part, true},
    {"load_lds_dword", Kind::load_to_lds, 4, Into::words, false},
    {"load_lds_dwordx3", Kind::load_to_lds, 12, Into::words, false},
    {"load_lds_dwordx4", Kind::load_to_lds, 16, Into::words, false},
};

// --- addresses of the lanes ------------------------------------------------------------------------------------------

struct Access {
    uint64_t address[lanes];
    uint64_t mask;                 // lanes that take part
    uint64_t in_range;             // of these, the lanes that a buffer's range check lets through (in whole)
    uint8_t words_in_range[lanes]; // MUBUF checks each word
    uint64_t scratch = 0, lds = 0; // lanes whose address is one of these, counted from its beginning
};

// VGPR count words hold an address or offset; every active lane must have written it.
unsigned address_register(Wave &w, Operand operand, unsigned count, uint64_t exec) {
    unsigned r = w.vector_register(operand, count);
    for (unsigned i = 0; i < count; ++i) {
        w.check_read(r + i);
        if (exec & ~w.defined[r + i]) w.fail_lanes("the address has a value nobody wrote", exec & ~w.defined[r + i]);
    }
    return r;
}

uint64_t scalar_pair(Wave &w, Operand operand, const char *what) {
    return w.read_address(operand, what) | uint64_t(w.read_address(operand + 1, what)) << 32;
}

void flat_addresses(Wave &w, const Instruction &in, Access &a) {
    if (in.format == Format::scratch) {
        a.scratch = all_lanes;
        uint32_t base = in.offset;
        if (in.has_scalar_offset) base += w.read_address(in.scalar_address, "the scratch address");
        const bool has_vector = in.offset_enabled;
        unsigned r = has_vector ? address_register(w, in.source[0], 1, a.mask) : 0;
        for (int lane = 0; lane < lanes; ++lane) a.address[lane] = uint32_t(base + (has_vector ? w.v[r][lane] : 0));
        return;
    }
    if (in.has_scalar_offset) {
        uint64_t base = scalar_pair(w, in.scalar_address, "the address") + int64_t(in.offset);
        unsigned r = address_register(w, in.source[0], 1, a.mask);
        for (int lane = 0; lane < lanes; ++lane) a.address[lane] = base + w.v[r][lane];
        return;
    }
    unsigned r = address_register(w, in.source[0], 2, a.mask);
    for (int lane = 0; lane < lanes; ++lane)
        a.address[lane] = (w.v[r][lane] | uint64_t(w.v[r + 1][lane]) << 32) + int64_t(in.offset);
    if (in.format != Format::flat) return;
    for (int lane = 0; lane < lanes; ++lane) {
        const uint32_t high = uint32_t(a.address[lane] >> 32);
        if (high != shared_aperture && high != private_aperture) continue;
        (high == shared_aperture ? a.lds : a.scratch) |= bit(lane);
        a.address[lane] = uint32_t(a.address[lane]);
    }
}

void buffer_addresses(Wave &w, const Instruction &in, Access &a, uint32_t bytes) {
    uint32_t resource[4];
    for (int i = 0; i < 4; ++i) resource[i] = w.read_address(in.scalar_address + i, "the buffer resource");
    const uint64_t base = resource[0] | uint64_t(resource[1] & 0xffff) << 32;
    const bool adds_lane = resource[3] >> 23 & 1;
    // HipKittens' resources ask for swizzling, and are used without an index, as if they did not.
    const bool plain = w.hazards.unchecked && !in.index_enabled && !adds_lane;
    const uint32_t stride = plain ? 0 : resource[1] >> 16 & 0x3fff, records = resource[2];
    const bool swizzled = !plain && resource[1] >> 31;
    const uint32_t scalar = w.read_address(in.scalar_offset, "the buffer offset");
    unsigned r = 0;
    if (in.index_enabled || in.offset_enabled)
        r = address_register(w, in.source[0], in.index_enabled + in.offset_enabled, a.mask);
    a.scratch = swizzled && adds_lane ? all_lanes : 0;        // the resource that scratch is reached through
    for (int lane = 0; lane < lanes; ++lane) {
        uint32_t index = in.index_enabled ? w.v[r][lane] : 0;
        uint32_t offset = in.offset + (in.offset_enabled ? w.v[r + in.index_enabled][lane] : 0);
        a.words_in_range[lane] = uint8_t((bytes + 3) / 4);
        if (a.scratch) {
            a.address[lane] = offset + scalar / lanes;        // the scalar offset counts the bytes of all lanes
            continue;
        }
        if (swizzled) w.fail("swizzled buffers are not known to the emulator");
        a.address[lane] = base + scalar + uint64_t(stride) * index + offset;
        uint32_t inside = 0;
        for (uint32_t at = 0; at < bytes; at += 4) {
            uint64_t end = uint64_t(offset) + at + std::min(4u, bytes - at);
            bool ok = stride ? index < records && end <= stride : end + scalar <= records;
            inside += ok;
        }
        a.words_in_range[lane] = uint8_t(inside);
        if (!inside) a.in_range &= ~bit(lane);
    }
}

void count_lines(Wave &w, const Instruction &in, const Access &a, uint32_t bytes) {
    uint64_t lines[2 * lanes];
    int count = 0;
    const uint64_t mask = a.mask & a.in_range & ~a.scratch & ~a.lds;
    for (int lane = 0; lane < lanes; ++lane) {
        if (!(mask >> lane & 1)) continue;
        for (uint64_t line = a.address[lane] / 128; line <= (a.address[lane] + bytes - 1) / 128; ++line)
            if (!count || lines[count - 1] != line) lines[count++] = line;
    }
    std::sort(lines, lines + count);
    if (w.trace) {
        uint64_t parts[4 * lanes];
        int n = 0;
        for (int lane = 0; lane < lanes; ++lane) {
            if (!(mask >> lane & 1)) continue;
            for (uint64_t part = a.address[lane] / 64; part <= (a.address[lane] + bytes - 1) / 64; ++part)
                if (!n || parts[n - 1] != part) parts[n++] = part;
        }
        std::sort(parts, parts + n);
        w.trace->lines.insert(w.trace->lines.end(), parts, std::unique(parts, parts + n));
    }
    Cost &cost = w.group->cost(in);
    cost.lines += std::unique(lines, lines + count) - lines;
    uint64_t total = uint64_t(__builtin_popcountll(mask)) * bytes;
    cost.lines_least += (total + 127) / 128;
    cost.bytes += total;
}

// Every byte of every lane must lie in memory that the launch may touch.
void check_access(Wave &w, const Access &a, uint32_t bytes, bool write) {
    const uint32_t scratch_bytes = w.group->launch->scratch_bytes;
    for (int lane = 0; a.scratch && lane < lanes; ++lane)
        if ((a.mask & a.scratch & bit(lane)) && a.address[lane] + bytes > scratch_bytes)
            w.fail("scratch access at byte " + std::to_string(a.address[lane]) + "; the kernel has " +
                       std::to_string(scratch_bytes),
                   lane);
    const uint64_t mask = a.mask & a.in_range & ~a.scratch & ~a.lds;
    if (!mask) return;
    uint64_t low = ~uint64_t{0}, high = 0;
    for (int lane = 0; lane < lanes; ++lane)
        if (mask >> lane & 1) {
            low = std::min(low, a.address[lane]);
            high = std::max(high, a.address[lane]);
        }
    if (high - low < (1u << 30) && allowed(*w.group->launch, low, uint32_t(high - low) + bytes, write)) return;
    for (int lane = 0; lane < lanes; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const uint32_t size = a.words_in_range[lane] ? std::min<uint32_t>(bytes, a.words_in_range[lane] * 4) : bytes;
        if (allowed(*w.group->launch, a.address[lane], size, write)) continue;
        char text[160];
        bool readable = write && allowed(*w.group->launch, a.address[lane], size, false);
        snprintf(text, sizeof text, "%s of %u bytes at 0x%llx, which is %s", write ? "write" : "read", size,
                 (unsigned long long)a.address[lane], readable ? "read-only" : "outside the buffers of this launch");
        w.fail(text, lane);
    }
}

uint8_t *host_address(Wave &w, const Access &a, int lane) {
    if (a.lds >> lane & 1) return &w.group->lds[a.address[lane]];
    if (a.scratch >> lane & 1)
        return &w.group->scratch[w.number][uint64_t(lane) * w.group->launch->scratch_bytes + a.address[lane]];
    return reinterpret_cast<uint8_t *>(a.address[lane]);
}

void locate(Wave &w, const Instruction &in, Access &a, uint32_t bytes) {
    a.mask = w.exec();
    a.in_range = all_lanes;
    memset(a.words_in_range, int((bytes + 3) / 4), sizeof a.words_in_range);
    if (in.format == Format::mubuf) buffer_addresses(w, in, a, bytes);
    else flat_addresses(w, in, a);
}

uint32_t part_of(const MemoryOp &op, uint32_t raw, uint32_t old) {
    uint32_t value = op.bytes == 1 ? (op.sign ? uint32_t(int8_t(raw)) : raw & 0xff)
                                   : (op.sign ? uint32_t(int16_t(raw)) : raw & 0xffff);
    if (op.into == Into::low_half) return (old & 0xffff0000) | (value & 0xffff);
    if (op.into == Into::high_half) return (old & 0xffff) | value << 16;
    return value;
}

void set_register(Wave &w, const Instruction &in, unsigned r, const uint32_t *values, uint64_t mask) {
    w.check_write(r);
    w.write_lanes(r, values, mask, all_lanes);
    w.v_vm[r] = w.vm_issued;
    if (in.format == Format::flat) w.v_lds[r] = w.lds_issued;
    w.hazards.loaded(r);
}

void issue(Wave &w, const Instruction &in) {
    ++w.vm_issued;
    if (in.format == Format::flat) ++w.lds_issued;            // a flat access may turn out to be one to LDS
}

// A load whose data goes to LDS: lane l writes at M0 + offset + l * bytes.
void load_to_lds(Wave &w, const Instruction &in, const Access &a, const MemoryOp &op) {
    if (w.hazards.m0 && !w.hazards.unchecked && w.hazards.slot < w.hazards.m0 + 2)
        w.fail("one wait state is needed between writing M0 and a load to LDS");
    const uint32_t base = (w.read_address(m0, "M0") & 0x3ffff) + uint32_t(in.offset);
    const uint32_t each = std::max<uint32_t>(op.bytes, 4);
    const uint32_t number = w.vm_issued + 1;
    issue(w, in);
    PendingLoad &pending = w.group->pending_loads[w.number].emplace_back();
    pending.number = number;
    pending.each = each;
    pending.base = base;
    pending.mask = a.mask;
    for (int lane = 0; lane < lanes; ++lane) {
        if (!(a.mask >> lane & 1)) continue;
        uint32_t (&data)[4] = pending.data[lane];
        memset(data, 0, sizeof data);
        if (a.in_range >> lane & 1) memcpy(data, host_address(w, a, lane), op.bytes);
        if (op.into != Into::words) data[0] = part_of(op, data[0], 0);
        const uint32_t to = base + lane * each;
        touch_lds(w, to, each, emulator::Access::write, number, true, true, lane);
    }
}

void execute_memory(Wave &w, const Instruction &in) {
    MemoryOp op = operations[in.operation->detail];
    if (in.to_lds && op.kind == Kind::load) op.kind = Kind::load_to_lds;
    const uint32_t words = (op.bytes + 3) / 4;
    Access a;
    locate(w, in, a, op.bytes);
    check_access(w, a, op.bytes, op.kind == Kind::store);
    count_lines(w, in, a, op.bytes);
    // Generic addresses of LDS: the same checks as for LDS instructions.
    uint64_t unwritten = 0;
    for (int lane = 0; a.lds && lane < lanes; ++lane)
        if (a.mask & a.lds & bit(lane))
            if (!touch_lds(w, uint32_t(a.address[lane]), op.bytes,
                           op.kind == Kind::store ? emulator::Access::write : emulator::Access::read, w.lds_issued + 1,
                           false, true, lane))
                unwritten |= bit(lane);
    if (op.kind == Kind::load_to_lds) return load_to_lds(w, in, a, op);
    if (op.kind == Kind::store) {
        unsigned r = w.vector_register(in.source[1], words);
        for (uint32_t word = 0; word < words; ++word) {
            w.check_read(r + word);
            uint64_t unknown = a.mask & a.in_range & ~a.scratch & ~w.defined[r + word];
            if (unknown) w.fail_lanes("a value nobody wrote is stored to global memory", unknown);
            if (words > 2) w.hazards.vector[r + word].stored = w.hazards.slot;
        }
        for (int lane = 0; lane < lanes; ++lane) {
            if (!(a.mask & a.in_range & bit(lane))) continue;
            uint32_t data[4];
            for (uint32_t word = 0; word < words; ++word) data[word] = w.v[r + word][lane];
            if (op.into == Into::high_half) data[0] >>= 16;
            memcpy(host_address(w, a, lane), data, std::min<uint32_t>(op.bytes, a.words_in_range[lane] * 4));
        }
        issue(w, in);
        return;
    }
    unsigned r = w.load_destination(in.destination, words, false);
    Lanes<uint32_t> values[4];
    for (int lane = 0; lane < lanes; ++lane) {
        if (!(a.mask >> lane & 1)) continue;
        uint32_t data[4] = {};
        if (a.in_range >> lane & 1)
            memcpy(data, host_address(w, a, lane), std::min<uint32_t>(op.bytes, a.words_in_range[lane] * 4));
        if (op.into != Into::words) data[0] = part_of(op, data[0], w.v[r][lane]);
        for (uint32_t word = 0; word < words; ++word) values[word].value[lane] = data[word];
    }
    issue(w, in);
    for (uint32_t word = 0; word < words; ++word) {
        set_register(w, in, r + word, values[word].value, a.mask);
        w.defined[r + word] &= ~unwritten;
    }
}

// --- atomics: detail = bytes -----------------------------------------------------------------------------------------

struct GlobalAtomic {
    const AtomicOp *atomic;
    uint8_t bytes;
};
std::vector<GlobalAtomic> &global_atomics() {
    static std::vector<GlobalAtomic> all;
    return all;
}

void execute_atomic(Wave &w, const Instruction &in) {
    const GlobalAtomic &op = global_atomics()[in.operation->detail];
    const bool compares = !strcmp(op.atomic->name, "cmpswap"), wide = op.bytes == 8;
    const uint32_t words = op.bytes / 4;
    Access a;
    locate(w, in, a, op.bytes);
    check_access(w, a, op.bytes, true);
    count_lines(w, in, a, op.bytes);
    unsigned data = w.vector_register(in.source[1], words * (compares ? 2 : 1));
    uint64_t unknown = 0;
    for (uint32_t word = 0; word < words * (compares ? 2 : 1); ++word) {
        w.check_read(data + word);
        unknown |= a.mask & a.in_range & ~w.defined[data + word];
    }
    if (unknown) w.fail_lanes("a value nobody wrote is stored to global memory", unknown);
    Lanes<uint32_t> old[2]{};
    for (int lane = 0; lane < lanes; ++lane) {
        if (!(a.mask & a.in_range & bit(lane))) continue;
        if (a.address[lane] % op.bytes) w.fail("misaligned atomic", lane);
        auto operand = [&](unsigned r) { return w.v[r][lane] | (wide ? uint64_t(w.v[r + 1][lane]) << 32 : 0); };
        const uint64_t value = operand(data), compare = compares ? operand(data + words) : 0;
        uint64_t before;
        if (wide) {                                           // other workgroups may run at the same time
            auto *at = reinterpret_cast<uint64_t *>(host_address(w, a, lane));
            before = __atomic_load_n(at, __ATOMIC_SEQ_CST);
            while (!__atomic_compare_exchange_n(at, &before, op.atomic->apply64(before, value, compare), false,
                                                __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
        } else {
            auto *at = reinterpret_cast<uint32_t *>(host_address(w, a, lane));
            uint32_t expected = __atomic_load_n(at, __ATOMIC_SEQ_CST);
            while (!__atomic_compare_exchange_n(at, &expected, uint32_t(op.atomic->apply32(expected, value, compare)),
                                                false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
            }
            before = expected;
        }
        old[0].value[lane] = uint32_t(before);
        old[1].value[lane] = uint32_t(before >> 32);
    }
    issue(w, in);
    if (!in.returns_value) return;
    unsigned r = w.load_destination(in.destination, words, false);
    for (uint32_t word = 0; word < words; ++word) set_register(w, in, r + word, old[word].value, a.mask);
}

// "atomic_add_x2" -> add, 8 bytes; "atomic_add_f32", "atomic_pk_add_f16", "atomic_min_f64".
bool parse_atomic(std::string name, Operation &operation) {
    if (name.rfind("atomic_", 0) != 0) return false;
    name = name.substr(7);
    uint8_t bytes = 4;
    auto strip = [&](const char *suffix) {
        size_t n = strlen(suffix);
        if (name.size() < n || name.compare(name.size() - n, n, suffix)) return false;
        name.resize(name.size() - n);
        return true;
    };
    if (name.rfind("pk_add", 0) == 0) {}
    else if (strip("_x2")) bytes = 8;
    else if (strip("_f64")) { bytes = 8; name += "_f"; }
    else if (strip("_f32")) name += "_f";
    const AtomicOp *atomic = find_atomic(name);
    if (!atomic) return false;
    operation.detail = uint16_t(global_atomics().size());
    global_atomics().push_back({atomic, bytes});
    return true;
}

// --- scalar loads: detail = words, +64 for buffers -------------------------------------------------------------------

void execute_scalar_load(Wave &w, const Instruction &in) {
    const uint32_t words = in.operation->detail & 63;
    const bool buffer = in.operation->detail & 64;
    uint64_t offset = int64_t(in.offset);
    if (in.has_scalar_offset) offset += w.read_address(in.scalar_offset, "the offset");
    uint32_t data[16] = {}, inside = words;
    uint64_t address;
    if (buffer) {
        uint64_t low = scalar_pair(w, in.scalar_address, "the buffer resource");
        uint32_t records = w.read_address(in.scalar_address + 2, "the buffer resource");
        address = (low & 0xffffffffffff) + (offset & ~uint64_t{3});
        inside = uint32_t(std::min<uint64_t>(words, offset >= records ? 0 : (records - offset) / 4));
    } else {
        address = (scalar_pair(w, in.scalar_address, "the address") + offset) & ~uint64_t{3};
    }
    if (inside && !allowed(*w.group->launch, address, inside * 4, false)) {
        char text[128];
        snprintf(text, sizeof text, "read of %u bytes at 0x%llx, which is outside the buffers of this launch",
                 inside * 4, (unsigned long long)address);
        w.fail(text);
    }
    memcpy(data, reinterpret_cast<const void *>(address), inside * 4);
    ++w.smem_issued;
    for (uint32_t i = 0; i < words; ++i) {
        w.write_scalar(in.destination + i, data[i]);
        w.s_smem[in.destination + i] = w.smem_issued;
    }
}

void execute_time(Wave &w, const Instruction &in) {
    ++w.smem_issued;
    w.write_scalar64(in.destination, w.hazards.slot);
    for (int i = 0; i < 2; ++i) w.s_smem[in.destination + i] = w.smem_issued;
}

void execute_nothing(Wave &, const Instruction &) {}

}  // namespace

bool define_memory(const std::string &name, Operation &operation) {
    operation.pipe = Pipe::memory;
    if (name == "s_memtime" || name == "s_memrealtime") {
        operation.execute = execute_time;
        return true;
    }
    for (uint16_t words : {1, 2, 4, 8, 16}) {
        std::string suffix = words == 1 ? "load_dword" : "load_dwordx" + std::to_string(words);
        if (name == "s_" + suffix || name == "s_buffer_" + suffix) {
            operation.execute = execute_scalar_load;
            operation.detail = words + (name[2] == 'b' ? 64 : 0);
            return true;
        }
    }
    for (const char *cache : {"s_dcache_inv", "s_dcache_wb", "s_dcache_inv_vol", "s_dcache_wb_vol", "buffer_wbl2",
                              "buffer_invl2", "buffer_inv", "buffer_wbinvl1", "buffer_wbinvl1_vol"})
        if (name == cache) {
            operation.execute = execute_nothing;
            return true;
        }
    for (const char *prefix : {"global_", "flat_", "scratch_", "buffer_"}) {
        if (name.rfind(prefix, 0) != 0) continue;
        std::string suffix = name.substr(strlen(prefix));
        for (const MemoryOp &op : operations)
            if (suffix == op.suffix) {
                operation.execute = execute_memory;
                operation.detail = uint16_t(&op - operations);
                return true;
            }
        if (parse_atomic(suffix, operation)) {
            operation.execute = execute_atomic;
            return true;
        }
    }
    operation.pipe = Pipe::scalar;
    return false;
}

}  // namespace emulator
