// Runs a launch: workgroups one after the other (or on several threads), the waves of a workgroup in turn, each until
// it reaches a barrier or its end.
#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#include "wave.h"

namespace emulator {

void execute_unknown(Wave &w, const Instruction &in) {
    char text[128];
    snprintf(text, sizeof text, "instruction not known to the emulator: %s%s%s 0x%08x 0x%08x", format_name(in.format),
             in.operation ? " " : "", in.operation ? in.operation->name : "", in.words[0], in.words[1]);
    w.fail(text);
}

bool allowed(const Launch &launch, uintptr_t address, uint32_t bytes, bool write) {
    const uintptr_t end = address + bytes;
    const CodeObject &code = *launch.code;
    auto inside = [&](uintptr_t from, uintptr_t to) { return address >= from && end <= to; };
    auto after = std::upper_bound(launch.ranges.begin(), launch.ranges.end(), address,
                                  [](uintptr_t a, const MemoryRange &r) { return a < r.begin; });
    // Ranges may overlap (a tensor and a view of it), so that the one before is not always the one that fits.
    for (auto range = after; range != launch.ranges.begin();) {
        --range;
        if (inside(range->begin, range->end) && (range->writable || !write)) return true;
    }
    if (inside(code.begin, code.end)) return true;            // constants and __device__ variables
    if (write) return !launch.check_ranges;
    const auto argument = uintptr_t(launch.kernarg.data()), packet = uintptr_t(launch.dispatch_packet.data());
    if (inside(argument, argument + launch.kernarg.size()) || inside(packet, packet + launch.dispatch_packet.size()))
        return true;
    return !launch.check_ranges;
}

namespace {

// The registers that a wave starts with: "Initial Kernel Execution State" in LLVM's User Guide for AMDGPU Backend.
void initialise(Wave &w, Workgroup &group, int number) {
    Launch &launch = *group.launch;
    const Kernel &kernel = *launch.kernel;
    memset(static_cast<void *>(&w), 0, sizeof w);
    w.group = &group;
    w.number = number;
    w.pc = kernel.entry;
    w.mode = kernel.float_mode;
    w.hazards.arch = launch.arch;
    w.hazards.unchecked = !launch.strict;
    w.hazards.slot = 1000;                                    // far from 0, which stands for never
    unsigned next = 0;
    auto give = [&](uint32_t value) { w.s[next] = value; w.s_defined[next] = ~0u; ++next; };
    auto give_pointer = [&](uint64_t value) { give(uint32_t(value)); give(uint32_t(value >> 32)); };
    const uint64_t kernarg = uintptr_t(launch.kernarg.data());
    const uint32_t properties = kernel.properties, resources2 = kernel.resources2;
    const bool architected_scratch = launch.arch != Arch::gfx90a;
    if (properties & 1) {  // the buffer resource for scratch: swizzled, adds the lane
        give(0); give(0x80000000u); give(0xffffffffu); give(0x00800000u);
    }
    if (properties & 2) give_pointer(uintptr_t(launch.dispatch_packet.data()));
    if (properties & 4) give_pointer(0);                      // queue
    if (properties & 8) give_pointer(kernarg);
    if (properties & 16) give_pointer(0);                     // dispatch id
    if (properties & 32) give_pointer(0);                     // flat scratch
    if (properties & 64) give(launch.scratch_bytes);
    if (unsigned preloaded = kernel.preload & 127) {
        const unsigned offset = kernel.preload >> 7;
        for (unsigned i = 0; i < preloaded; ++i) {
            uint32_t value = 0;
            if ((offset + i) * 4 + 4 <= launch.kernarg.size()) memcpy(&value, &launch.kernarg[(offset + i) * 4], 4);
            give(value);
        }
        w.pc += 64;                                           // past the code for hardware that does not preload
    }
    next = std::max(next, resources2 >> 1 & 31);
    for (int axis = 0; axis < 3; ++axis)
        if (resources2 >> (7 + axis) & 1) give(group.id[axis]);
    if (resources2 >> 10 & 1) give(0);
    if ((resources2 & 1) && !architected_scratch) give(0);    // the wave's offset into scratch
    // Registers that hardware sets whatever the kernel asks for: FLAT_SCRATCH, the trap registers' neighbours, M0.
    for (unsigned r : {102u, 103u, 104u, 105u}) w.s_defined[r] = ~0u;

    const uint32_t threads = launch.block[0] * launch.block[1] * launch.block[2];
    uint64_t exec = 0;
    for (int lane = 0; lane < lanes; ++lane) {
        uint32_t id = uint32_t(number) * lanes + lane;
        if (id >= threads) break;
        exec |= uint64_t{1} << lane;
        uint32_t x = id % launch.block[0], y = id / launch.block[0] % launch.block[1],
                 z = id / launch.block[0] / launch.block[1];
        w.v[0][lane] = x | y << 10 | z << 20;
    }
    w.defined[0] = exec;
    w.write_exec(exec, all_lanes);
}

void run_wave(Wave &w, uint64_t &budget, uint64_t most) {
    const CodeObject &code = *w.group->launch->code;
    const Instruction *instructions = code.instructions.data();
    const size_t count = code.instructions.size();
    Cost *costs = w.group->costs->data();
    while (w.state == WaveState::running && most--) {
        if (w.pc >= count) w.fail("the program ran past the end of the code");
        const Instruction &in = instructions[w.pc];
        w.current = &in;
        w.next_pc = w.pc + in.size;
        if (budget-- == 0) w.fail("the kernel does not end");
        ++w.hazards.slot;
        Cost &cost = costs[w.pc];
        ++cost.count;
        cost.active_lanes += __builtin_popcountll(w.exec());
        if (w.trace) {
            const uint64_t lds_before = cost.lds_cycles;
            const size_t lines_before = w.trace->lines.size();
            in.execute(w, in);
            w.trace->events.push_back({w.pc, uint32_t(lines_before), uint16_t(w.trace->lines.size() - lines_before),
                                       uint16_t(cost.lds_cycles - lds_before)});
        } else {
            in.execute(w, in);
        }
        w.pc = w.next_pc;
    }
}

void run_workgroup(Workgroup &group, std::vector<std::unique_ptr<Wave>> &storage) {
    Launch &launch = *group.launch;
    const uint32_t threads = launch.block[0] * launch.block[1] * launch.block[2], count = (threads + lanes - 1) / lanes;
    while (storage.size() < count) storage.push_back(std::make_unique<Wave>());
    group.waves.clear();
    if (group.trace) group.trace->waves.resize(count);
    for (uint32_t i = 0; i < count; ++i) {
        initialise(*storage[i], group, int(i));
        if (group.trace) storage[i]->trace = &group.trace->waves[i];
        group.waves.push_back(storage[i].get());
    }
    group.lds.assign(launch.lds_bytes, 0xcd);
    group.lds_words.assign((launch.lds_bytes + 3) / 4, LdsWord());
    group.scratch.assign(count, std::vector<uint8_t>(uint64_t(launch.scratch_bytes) * lanes, 0xcd));
    group.pending_loads.assign(count, {});
    group.epoch = 1;
    uint64_t budget = launch.instruction_limit;
    for (;;) {
        // Code that is held to the rules may run wave by wave; other code may rely on waves going side by side.
        const uint64_t most = launch.strict ? ~uint64_t{0} : 1;
        for (bool running = true; running;) {
            running = false;
            for (Wave *w : group.waves) {
                run_wave(*w, budget, most);
                running |= w->state == WaveState::running;
            }
        }
        const Wave *waiting = nullptr, *ended = nullptr;
        for (Wave *w : group.waves) {
            (w->state == WaveState::ended ? ended : waiting) = w;
        }
        if (!waiting) return;
        if (ended)
            waiting->fail("wave " + std::to_string(ended->number) +
                          " has ended, so that not every wave reaches this barrier");
        ++group.epoch;
        for (Wave *w : group.waves) {
            w->vm_released = w->vm_done;
            w->lds_released = w->lds_done;
            w->state = WaveState::running;
            carry_reads_over_barrier(*w);
        }
    }
}

}  // namespace

void run(Launch &launch, std::vector<Cost> &costs, int threads) {
    std::sort(launch.ranges.begin(), launch.ranges.end(),
              [](const MemoryRange &a, const MemoryRange &b) { return a.begin < b.begin; });
    const uint64_t all = uint64_t(launch.grid[0]) * launch.grid[1] * launch.grid[2];
    const uint64_t total = launch.traces.empty() ? all : launch.traces.size();
    std::atomic<uint64_t> next{0};
    std::mutex mutex;
    std::exception_ptr fault;
    uint64_t faulty = ~uint64_t{0};
    auto work = [&] {
        std::vector<Cost> mine(launch.code->instructions.size());
        std::vector<std::unique_ptr<Wave>> storage;
        Workgroup group;
        group.launch = &launch;
        group.costs = &mine;
        for (uint64_t i; (i = next++) < total;) {
            group.trace = launch.traces.empty() ? nullptr : launch.traces[i].get();
            const uint64_t number = group.trace ? group.trace->number % all : i;
            group.id[0] = uint32_t(number % launch.grid[0]);
            group.id[1] = uint32_t(number / launch.grid[0] % launch.grid[1]);
            group.id[2] = uint32_t(number / launch.grid[0] / launch.grid[1]);
            try {
                run_workgroup(group, storage);
            } catch (...) {
                std::lock_guard<std::mutex> lock(mutex);
                if (i < faulty) { faulty = i; fault = std::current_exception(); }
                next = total;
            }
        }
        std::lock_guard<std::mutex> lock(mutex);
        for (size_t i = 0; i < mine.size(); ++i) costs[i].add(mine[i]);
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads && uint64_t(i) < total; ++i) others.emplace_back(work);
    work();
    for (auto &thread : others) thread.join();
    if (fault) std::rethrow_exception(fault);
}

}  // namespace emulator
