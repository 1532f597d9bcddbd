// Registers with their checks, waits, and how a fault is worded.
#include "wave.h"

#include <cstdio>

namespace emulator {

void Cost::add(const Cost &other) {
    count += other.count;
    active_lanes += other.active_lanes;
    lds_cycles += other.lds_cycles;
    lds_least += other.lds_least;
    lines += other.lines;
    lines_least += other.lines_least;
    bytes += other.bytes;
}

void Wave::fail(const std::string &what, int lane) const {
    char where[160];
    snprintf(where, sizeof where, "%s kernel %s, pc +0x%x: ", arch_name(group->launch->arch),
             group->launch->kernel->name.c_str(), unsigned((current->index - group->launch->kernel->entry) * 4));
    std::string text = what + "\n  at " + where + describe(*current) + "\n  in workgroup (";
    text += std::to_string(group->id[0]) + ", " + std::to_string(group->id[1]) + ", " + std::to_string(group->id[2]) +
            "), wave " + std::to_string(number);
    if (lane >= 0) text += ", lane " + std::to_string(lane);
    throw Fault(text);
}

void Wave::fail_lanes(const std::string &what, uint64_t lanes_with_it) const {
    fail(what, __builtin_ctzll(lanes_with_it));
}

namespace {

std::string vector_name(unsigned r) { return r < 256 ? "v" + std::to_string(r) : "a" + std::to_string(r - 256); }

// Constants of the source field: 128 and up integers, 240 and up floats.
bool constant(Operand operand, uint32_t &value) {
    if (operand >= 128 && operand <= 192) value = operand - 128;
    else if (operand >= 193 && operand <= 208) value = uint32_t(192 - int(operand));
    else if (operand >= 240 && operand <= 248) {
        const float values[] = {0.5f, -0.5f, 1.f, -1.f, 2.f, -2.f, 4.f, -4.f, 0.15915494f};
        memcpy(&value, &values[operand - 240], 4);
    } else return false;
    return true;
}

}  // namespace

void Wave::fail_pending_scalar(unsigned r) const {
    fail("s" + std::to_string(r) + " is used before s_waitcnt lgkmcnt(0) for the scalar load that writes it");
}

void Wave::fail_pending_vector(unsigned r) const {
    bool memory = v_vm[r] > vm_done;
    unsigned behind = memory ? vm_issued - v_vm[r] : lds_issued - v_lds[r];
    fail(vector_name(r) + " is used before s_waitcnt " + (memory ? "vmcnt(" : "lgkmcnt(") + std::to_string(behind) +
         ") for the " + (memory ? "load" : "LDS operation") + " that writes it");
}

void Wave::fail_hazard(unsigned r, unsigned missing, const char *what) const {
    fail(vector_name(r) + " is " + what + " too early: " + std::to_string(missing) + " more wait states (s_nop " +
         std::to_string(missing - 1) + ") are needed after what used it before");
}

void Wave::check_scalar_wait(unsigned r) const {
    const Pipe pipe = current->operation->pipe;
    if (pipe != Pipe::vector && pipe != Pipe::memory) return;
    // A lane-wise result of the vector unit (VCC, v_readlane) read by it again, or by a memory instruction.
    const unsigned states = pipe == Pipe::memory           ? (current->format == Format::smem ? 0 : 5)
                            : hazards.arch == Arch::gfx90a ? 0
                                                           : 2;
    if (unsigned n = hazards.missing_scalar(r, states))
        fail("s" + std::to_string(r) + " is read too early: " + std::to_string(n) +
             " more wait states are needed after the " + "vector instruction that writes it");
}

uint32_t Wave::read_scalar(Operand operand, uint32_t &defined_bits) const {
    uint32_t value;
    if (operand < 128) {
        check_scalar(operand);
        check_scalar_wait(operand);
        defined_bits = s_defined[operand];
        return s[operand];
    }
    defined_bits = ~0u;
    if (constant(operand, value)) return value;
    switch (operand) {
        case literal: return current->literal_value;
        case 235: return shared_aperture;                     // SRC_SHARED_BASE: where generic addresses mean LDS,
        case 237: return private_aperture;                    // SRC_PRIVATE_BASE: or scratch
        case 251: defined_bits = s_defined[vcc] & s_defined[vcc + 1]; return s64(vcc) == 0;
        case 252: return exec() == 0;
        case 253: defined_bits = scc_defined ? ~0u : 0; return scc;
    }
    fail("scalar operand " + std::to_string(operand) + " is not known to the emulator");
}

uint64_t Wave::read_scalar64(Operand operand, uint64_t &defined_bits) const {
    if (operand < 127) {
        check_scalar(operand);
        check_scalar(operand + 1);
        check_scalar_wait(operand);
        memcpy(&defined_bits, &s_defined[operand], 8);
        return s64(operand);
    }
    uint32_t d;
    uint32_t value = read_scalar(operand, d);
    defined_bits = d ? all_lanes : 0;
    if (operand == 235 || operand == 237) return uint64_t(value) << 32;
    if (operand >= 240 && operand <= 248) {                   // the double of that constant
        float single;
        memcpy(&single, &value, 4);
        double wide = operand == 248 ? 0.15915494309189532 : single;
        uint64_t result;
        memcpy(&result, &wide, 8);
        return result;
    }
    if (operand == literal) return value;                     // zero-extended for SALU
    return uint64_t(int64_t(int32_t(value)));
}

uint32_t Wave::read_address(Operand operand, const char *what) const {
    uint32_t d;
    uint32_t value = read_scalar(operand, d);
    if (d != ~0u) fail(std::string(what) + " comes from a scalar register with a value nobody wrote");
    return value;
}

void Wave::write_scalar(Operand operand, uint32_t value, uint32_t defined_bits) {
    if (operand > 127) fail("a scalar result cannot go there");
    if (operand == exec_mask || operand == exec_mask + 1) {
        if (defined_bits != ~0u) fail("EXEC is set from a value nobody wrote");
    }
    check_scalar(operand);
    s[operand] = value;
    s_defined[operand] = defined_bits;
    if (operand == m0) hazards.m0 = hazards.slot;
}

void Wave::write_scalar64(Operand operand, uint64_t value, uint64_t defined_bits) {
    write_scalar(operand, uint32_t(value), uint32_t(defined_bits));
    write_scalar(operand + 1, uint32_t(value >> 32), uint32_t(defined_bits >> 32));
}

void Wave::write_exec(uint64_t value, uint64_t defined_bits) { write_scalar64(exec_mask, value, defined_bits); }

unsigned Wave::register_number(Operand operand, unsigned count) const {
    const Kernel &kernel = *group->launch->kernel;
    unsigned r = operand - first_vgpr;
    if (hazards.unchecked && operand >= first_vgpr) {         // one file: v[AccumOffset + n] is a[n]
        if (r >= 256) r += kernel.accumulation_offset - 256;
        if (r + count <= kernel.registers) return r;
        fail("v" + std::to_string(r) + " is past the kernel's registers");
    }
    unsigned limit = r < 256 ? kernel.accumulation_offset : 256 + kernel.registers - kernel.accumulation_offset;
    if (operand < first_vgpr || r + count > limit)
        fail(operand < first_vgpr ? "a vector register is needed here"
                                  : vector_name(r) + " is past the kernel's registers");
    return r;
}

unsigned Wave::vector_register(Operand operand, unsigned count) const {
    unsigned r = register_number(operand, count);
    for (unsigned i = 0; i < count; ++i) check_vector(r + i);
    return r;
}

unsigned Wave::load_destination(Operand operand, unsigned count, bool from_lds) const {
    unsigned r = register_number(operand, count);
    for (unsigned i = r; i < r + count; ++i)
        if (from_lds ? v_vm[i] > vm_done : v_lds[i] > lds_done) fail_pending_vector(i);
    return r;
}

void Wave::write_lanes(unsigned r, const uint32_t *values, uint64_t mask, uint64_t defined_lanes) {
    if (mask == all_lanes) {
        memcpy(v[r], values, sizeof v[r]);
        defined[r] = defined_lanes;
        return;
    }
    uint32_t *to = v[r];
    for (int lane = 0; lane < lanes; ++lane) to[lane] = mask >> lane & 1 ? values[lane] : to[lane];
    defined[r] = (defined[r] & ~mask) | (defined_lanes & mask);
}

void Wave::wait_vm(unsigned most) {
    if (vm_issued > most && vm_issued - most > vm_done) vm_done = vm_issued - most;
    auto &pending = group->pending_loads[number];
    for (; !pending.empty() && pending.front().number <= vm_done; pending.pop_front()) {
        const PendingLoad &load = pending.front();
        for (int lane = 0; lane < lanes; ++lane)
            if (load.mask >> lane & 1) memcpy(&group->lds[load.base + lane * load.each], load.data[lane], load.each);
    }
}

void Wave::wait_lgkm(unsigned most) {
    if (most == 0) smem_done = smem_issued;
    if (lds_issued > most && lds_issued - most > lds_done) lds_done = lds_issued - most;
}

}  // namespace emulator
