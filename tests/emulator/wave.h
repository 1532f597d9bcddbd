// The state of one wave, of its workgroup and of a launch, with the shadow state that the checks need.
//
// Checks on data follow the rule of memory checkers: a value nobody wrote may be copied and computed with (compilers do
// that with values that are never used); it is an error where it decides something: an address, a branch, EXEC, a
// matrix operand, or what is stored to global memory.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>
#include <vector>

#include "code_object.h"
#include "hazards.h"
#include "instruction.h"
#include "timing.h"

namespace emulator {

constexpr int lanes = 64;
constexpr uint64_t all_lanes = ~uint64_t{0};

// The high words of generic addresses that mean LDS and scratch.
constexpr uint32_t shared_aperture = 0xffff0001, private_aperture = 0xffff0002;

// What a kernel did wrong. Thrown by handlers, caught by the launch.
struct Fault : std::runtime_error {
    explicit Fault(const std::string &what) : std::runtime_error(what) {}
};

struct MemoryRange {
    uintptr_t begin, end;
    bool writable;
};

// What one instruction of the kernel has cost so far.
struct Cost {
    uint64_t count = 0, active_lanes = 0;
    uint64_t lds_cycles = 0, lds_least = 0;
    uint64_t lines = 0, lines_least = 0, bytes = 0;

    void add(const Cost &other);
};

// The words of LDS with what the race and the validity check must know of each.
struct LdsWord {
    uint32_t write_number = 0;   // which operation of the writer wrote it last (see Wave::lds_issued, vm_issued)
    uint32_t read_epoch = 0;     // in which stretch between barriers it was last read, counted from 1
    uint32_t readers = 0;        // by which waves, in that stretch
    int8_t writer = -1;          // -1: nobody wrote it
    uint8_t written_bytes = 0;   // by that operation
    uint8_t defined = 0;         // one bit for each byte
    bool by_memory = false;      // written by a load from global memory to LDS
    bool atomic = false;
};

struct Launch;
struct Workgroup;

enum class WaveState : uint8_t { running, at_barrier, ended };

struct Wave {
    alignas(64) uint32_t v[512][lanes];   // vector registers, accumulation registers from 256 on
    uint64_t defined[512];                // for each register, the lanes that hold a value
    uint32_t s[128];                      // scalar registers; VCC, M0 and EXEC in their places
    uint32_t s_defined[128];              // bit by bit
    bool scc, scc_defined;
    uint32_t pc, next_pc;                 // in words
    uint32_t mode;
    WaveState state;
    int number;                           // in its workgroup
    Workgroup *group;
    const Instruction *current;
    WaveTrace *trace;                     // what it issues, for the timing model; null: nobody asked

    // Operations under way. Vector memory and LDS return in order, so a counter each is enough: operation n has
    // returned when n <= done. Scalar loads return in any order: only lgkmcnt(0) tells.
    uint32_t vm_issued, vm_done, lds_issued, lds_done, smem_issued, smem_done;
    uint32_t v_vm[512], v_lds[512];       // the operation that will write this register
    uint32_t s_smem[128];
    uint32_t vm_released, lds_released;   // what had returned at the last barrier: other waves may rely on it

    Hazards hazards;

    // LDS reads that may still be under way at a barrier: at most 16 operations of two accesses.
    struct LdsRead {
        uint32_t number, bytes;
        uint64_t mask;
        uint32_t addresses[lanes];
    } lds_reads[32];

    uint64_t exec() const { return s64(exec_mask); }
    uint64_t s64(unsigned r) const { uint64_t x; memcpy(&x, &s[r], 8); return x; }

    [[noreturn]] void fail(const std::string &what, int lane = -1) const;
    [[noreturn]] void fail_lanes(const std::string &what, uint64_t lanes_with_it) const;

    // --- scalar registers
    uint32_t read_scalar(Operand operand, uint32_t &defined_bits) const;      // any scalar source
    uint64_t read_scalar64(Operand operand, uint64_t &defined_bits) const;
    uint32_t read_address(Operand operand, const char *what) const;          // must be defined
    void write_scalar(Operand operand, uint32_t value, uint32_t defined_bits = ~0u);
    void write_scalar64(Operand operand, uint64_t value, uint64_t defined_bits = all_lanes);
    void write_exec(uint64_t value, uint64_t defined_bits);
    void check_scalar(unsigned r) const { if (s_smem[r] > smem_done) fail_pending_scalar(r); }
    [[noreturn]] void fail_pending_scalar(unsigned r) const;
    void check_scalar_wait(unsigned r) const;
    // A vector instruction has written the scalar register and, where wide, the next one.
    void vector_wrote_scalar(unsigned r, bool wide) {
        hazards.scalar[r] = hazards.slot;
        if (wide) hazards.scalar[r + 1] = hazards.slot;
    }

    // --- vector registers: the register's number in v
    void check_vector(unsigned r) const {
        if (v_vm[r] > vm_done || v_lds[r] > lds_done) fail_pending_vector(r);
    }
    [[noreturn]] void fail_pending_vector(unsigned r) const;
    unsigned vector_register(Operand operand, unsigned count = 1) const;      // checks the number and waits
    // As a load's destination: loads of one kind return in order, so that one may follow another.
    unsigned load_destination(Operand operand, unsigned count, bool from_lds) const;
    unsigned register_number(Operand operand, unsigned count) const;          // checks the number only
    void check_read(unsigned r) const {                                       // wait states; not for accumulators
        if (unsigned n = hazards.missing_read(r, current->reader)) fail_hazard(r, n, "read");
    }
    void check_write(unsigned r) const {
        if (unsigned n = hazards.missing_write(r, current->operation->pipe == Pipe::vector))
            fail_hazard(r, n, "written");
    }
    [[noreturn]] void fail_hazard(unsigned r, unsigned missing, const char *what) const;
    void write_lanes(unsigned r, const uint32_t *values, uint64_t mask, uint64_t defined_lanes);

    void wait_vm(unsigned most);
    void wait_lgkm(unsigned most);
};

// A load from global memory to LDS that its wave has not waited for. It lands when the wait says so and no earlier: what
// reads LDS before finds the old bytes, as it may on hardware.
struct PendingLoad {
    uint32_t number, each;               // which operation of the wave; bytes of a lane
    uint32_t base;
    uint64_t mask;
    uint32_t data[lanes][4];
};

struct Workgroup {
    Launch *launch;
    uint32_t id[3];
    std::vector<Wave *> waves;
    std::vector<uint8_t> lds;
    std::vector<LdsWord> lds_words;
    std::vector<std::deque<PendingLoad>> pending_loads;   // of each wave
    uint32_t epoch;
    std::vector<std::vector<uint8_t>> scratch;   // for each wave: 64 x bytes
    std::vector<Cost> *costs;
    GroupTrace *trace;

    Cost &cost(const Instruction &instruction) { return (*costs)[instruction.index]; }
};

struct Launch {
    Arch arch;
    const CodeObject *code;
    const Kernel *kernel;
    uint32_t grid[3], block[3];
    uint32_t lds_bytes, scratch_bytes;
    std::vector<uint8_t> kernarg;
    std::vector<uint8_t> dispatch_packet;
    std::vector<MemoryRange> ranges;             // sorted
    bool check_ranges = true, strict = true;
    uint64_t instruction_limit;
    // Workgroups to record for the timing model; where there are any, no others run.
    std::vector<std::unique_ptr<GroupTrace>> traces;
};

// Reads or writes of global memory by one lane or by the scalar unit must lie in one range.
bool allowed(const Launch &launch, uintptr_t address, uint32_t bytes, bool write);

// Reads of LDS that a wave has not waited for when a barrier lets it pass count for the time after it, too.
void carry_reads_over_barrier(Wave &w);

// Runs every workgroup; throws Fault. Costs has an entry for each word of the text.
void run(Launch &launch, std::vector<Cost> &costs, int threads);

}  // namespace emulator
