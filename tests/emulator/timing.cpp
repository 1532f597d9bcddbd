// The timing model: plays the recorded instructions of the workgroups that share one CU, cycle by cycle.
//
//     functional execution ──► traces: what each wave issued, cache lines, LDS bank cycles
//     replay ──► when it issues: a CU of four SIMDs, each with its waves, vector and matrix unit
//                                 LDS, address unit and L1 for all four; L2 and memory as this CU's share
//
// A SIMD has its turn every four cycles. In a turn each of its waves may issue one instruction, each unit takes one, and
// waves come by priority (s_setprio), then age. A wave issues in order; it waits for
//
//     vmcnt, lgkmcnt   s_waitcnt: memory and LDS return in order, scalar loads in any
//     barrier          the other waves of its workgroup
//     result           a register that a matrix, transcendental or lane-to-scalar instruction will write
//     matrix           the matrix unit, which works passes x 4 cycles on each instruction
//     shadow           what may not issue beside a matrix instruction: anything in its first turns, packed fp32 and dot
//                      products until it is done, everything beside fp32 and fp64 ones
//     vector           the vector unit: another wave's instruction, 16 cycles of a transcendental one
//     lds, memory      the path to LDS or the address unit, when it is full
//     nop, fetch       s_nop and s_sleep; the first instruction after a taken branch
//     other            another wave of the SIMD that comes first
//
// Loads: the address unit takes 16 lanes a cycle and the L1 64 bytes; a line that is not there takes one of the misses in
// flight and this CU's share of the bandwidth of the L2 or, when it was not asked for before, of memory, with the
// latency of either. Neighbour CUs are not played: `sharers` of them ask for the same lines, and each brings as many of
// them from memory; the others find them in the L2.
//
// Not modelled: instruction fetch but for branches, TLBs, the order of DRAM pages, clocks that change, the tails of
// other workgroups. Numbers: timing_tables.h.
#include "timing.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <queue>
#include <unordered_map>

#include "timing_tables.h"

namespace emulator {

namespace {

std::map<std::string, double> &replaced(Arch arch) {
    static std::map<std::string, double> all[3];
    return all[int(arch)];
}

// --- what an instruction asks for ------------------------------------------------------------------------------------

enum class Unit : uint8_t { scalar, vector, matrix, lds, memory, scalar_memory, wait, barrier, end };
enum Stall : uint8_t {
    issued, vmcnt, lgkmcnt, barrier_wait, result, matrix_busy, shadow, vector_busy, lds_busy, memory_busy, nop, fetch,
    other, stalls
};
constexpr const char *stall_names[] = {"issued", "vmcnt", "lgkmcnt", "barrier", "result", "matrix", "shadow",
                                       "vector", "lds", "memory", "nop", "fetch", "other"};
constexpr const char *unit_names[] = {"scalar", "vector", "matrix", "lds", "memory", "scalar memory", "wait",
                                      "barrier", "end"};

struct Range {
    uint16_t first, count;
};

// What the replay needs to know of an instruction, worked out once.
struct Needs {
    Unit unit = Unit::scalar;
    uint16_t cycles = 4;               // of the vector or matrix unit
    uint8_t words = 1, accesses = 1;   // of LDS and memory accesses
    bool packed = false, alone = false, transcendental = false, to_lds = false, write = false, atomic = false,
         branch = false;
    uint16_t immediate = 0;
    uint8_t matrix_bytes = 0;          // a lane's part of the wider of A and B
    bool sleeps = false, nops = false, priority = false;
    std::vector<Range> reads, writes;  // vector registers
    std::vector<Range> scalar_reads;   // by a unit that waits for lane-to-scalar results
    Range scalar_write{0, 0};
};

bool has(const char *name, const char *part) { return strstr(name, part) != nullptr; }
bool begins(const char *name, const char *part) { return !strncmp(name, part, strlen(part)); }

uint8_t memory_words(const char *name) {
    if (has(name, "x4") || has(name, "128")) return 4;
    if (has(name, "x3") || has(name, "96")) return 3;
    if (has(name, "x2") || has(name, "64")) return 2;
    return 1;
}

Needs needs_of(const Instruction &in) {
    Needs n;
    if (!in.operation) return n;
    const Operation &op = *in.operation;
    const char *name = op.name;
    auto vector_range = [](std::vector<Range> &to, Operand operand, unsigned count) {
        if (operand >= first_vgpr && count) to.push_back({uint16_t(operand - first_vgpr), uint16_t(count)});
    };
    auto scalar_range = [&](Operand operand, unsigned count) {
        if (operand < 128) n.scalar_reads.push_back({operand, uint16_t(count)});
    };
    n.immediate = uint16_t(in.offset);
    switch (op.pipe) {
        case Pipe::scalar:
            if (!strcmp(name, "s_waitcnt")) n.unit = Unit::wait;
            else if (!strcmp(name, "s_barrier")) n.unit = Unit::barrier;
            else if (!strcmp(name, "s_endpgm")) n.unit = Unit::end;
            n.nops = !strcmp(name, "s_nop");
            n.sleeps = !strcmp(name, "s_sleep");
            n.priority = !strcmp(name, "s_setprio");
            n.branch = begins(name, "s_cbranch") || begins(name, "s_branch") || has(name, "pc_b64") ||
                       begins(name, "s_call");
            if (has(name, "vcc")) scalar_range(vcc, 2);
            if (in.format != Format::sopp) {
                scalar_range(in.source[0], 2);
                if (in.format == Format::sop2 || in.format == Format::sopc) scalar_range(in.source[1], 2);
            }
            break;
        case Pipe::vector: {
            n.unit = Unit::vector;
            n.cycles = op.cycles;
            n.transcendental = op.transcendental;
            n.packed = (begins(name, "v_pk_") && has(name, "f32")) || !strcmp(name, "v_pk_mov_b32") ||
                       begins(name, "v_dot");
            const unsigned words = has(name, "64") || n.packed ? 2 : 1;
            const bool one = in.format == Format::vop1, three = in.format == Format::vop3 || in.format == Format::vop3p;
            vector_range(n.reads, in.source[0], words);
            if (!one) vector_range(n.reads, in.source[1], words);
            if (three || op.destination_is_source) vector_range(n.reads, in.source[2], words);
            vector_range(n.writes, in.destination, words);
            if (begins(name, "v_cmp")) n.scalar_write = {in.scalar_destination, 2};
            else if (begins(name, "v_read")) n.scalar_write = {in.destination, 1};
            else if (in.format == Format::vop3 && in.scalar_destination != vcc)
                n.scalar_write = {in.scalar_destination, 2};
            if (n.scalar_write.first >= 128) n.scalar_write = {0, 0};
            break;
        }
        case Pipe::matrix:
            n.unit = Unit::matrix;
            n.cycles = op.cycles;
            n.alone = !op.matrix.beside_vector;
            n.matrix_bytes = uint8_t(4 * std::max(op.matrix.a_words, op.matrix.b_words));
            vector_range(n.reads, in.source[0], op.matrix.a_words);
            vector_range(n.reads, in.source[1], op.matrix.b_words);
            vector_range(n.reads, in.source[2], op.matrix.accumulators);
            vector_range(n.writes, in.destination, op.matrix.accumulators);
            break;
        case Pipe::lds:
            n.unit = Unit::lds;
            n.words = memory_words(name);
            if (has(name, "read2") || has(name, "write2")) n.words = has(name, "b64") ? 2 : 1, n.accesses = 2;
            n.write = has(name, "write");
            n.atomic = !n.write && !has(name, "read") && !has(name, "permute") && !has(name, "swizzle");
            vector_range(n.reads, in.source[0], 1);
            if (n.write || has(name, "permute")) vector_range(n.reads, in.source[1], n.words);
            if (n.accesses == 2 && n.write) vector_range(n.reads, in.source[2], n.words);
            break;
        case Pipe::memory:
            if (in.format == Format::smem) {
                n.unit = Unit::scalar_memory;
                scalar_range(in.scalar_address, 2);
                break;
            }
            n.unit = Unit::memory;
            n.words = memory_words(name);
            n.to_lds = in.to_lds || has(name, "lds");
            n.write = has(name, "store");
            n.atomic = has(name, "atomic");
            vector_range(n.reads, in.source[0], 1);
            if (n.write || n.atomic) vector_range(n.reads, in.source[1], n.words);
            if (in.has_scalar_offset || in.format == Format::mubuf)
                scalar_range(in.scalar_address, in.format == Format::mubuf ? 4 : 2);
            break;
    }
    return n;
}

// --- the CU ----------------------------------------------------------------------------------------------------------

using Cycle = uint64_t;

struct PlayedWave {
    const WaveTrace *trace;
    int group, simd, number;
    size_t next = 0;
    Cycle earliest = 0;
    Stall waits_as = issued;                                  // why it may not issue before `earliest`
    int priority = 0;
    bool at_barrier = false, ended = false;
    std::deque<Cycle> memory, lds;                            // when each operation under way returns, in order
    Cycle scalar_loads = 0;
    int scalar_loads_issued = 0;
    std::array<Cycle, 512> vector_ready{};
    std::array<Cycle, 128> scalar_ready{};
};

struct PlayedGroup {
    int number, live, arrived = 0;
    Cycle start, end = 0;
};

struct Simd {
    std::vector<PlayedWave *> waves;                          // oldest first
    Cycle vector_free = 0, matrix_free = 0, shadow_until = 0, packed_from = 0, lds_free = 0;
};

struct Work {
    uint64_t matrix = 0, vector = 0, lds = 0, lds_conflicts = 0, l1_bytes = 0, l2_bytes = 0, memory_bytes = 0,
             instructions = 0;
};

class Cu {
public:
    Cu(const Recording &recording, const ReplayOptions &options) : recording_(recording), options_(options) {
        const Arch arch = recording.code->arch;
        auto value = [&](const char *name) { return timing_parameter(arch, name); };
        turn_ = Cycle(value("turn"));
        auto turns = [&](const char *name) { return Cycle(value(name)) * turn_; };
        vector_latency_ = turns("vector_latency_turns");
        transcendental_latency_ = turns("transcendental_latency_turns");
        blocks_short_ = turns("matrix_blocks_short");
        blocks_wide_ = turns("matrix_blocks_wide");
        blocks_long_ = turns("matrix_blocks_long");
        packed_after_ = turns("packed_after_matrix");
        vector_to_scalar_ = Cycle(value("vector_to_scalar"));
        branch_taken_ = Cycle(value("branch_taken"));
        barrier_ = Cycle(value("barrier"));
        scalar_load_ = Cycle(value("scalar_load"));
        group_start_ = Cycle(value("group_start"));
        for (int i = 0; i < 3; ++i) {
            const std::string bytes = std::to_string(4 << i);
            read_latency_[i] = Cycle(value(("lds_read_latency_" + bytes).c_str()));
            write_latency_[i] = Cycle(value(("lds_write_latency_" + bytes).c_str()));
            read_cycles_[i] = Cycle(value(("lds_read_cycles_" + bytes).c_str()));
            write_cycles_[i] = Cycle(value(("lds_write_cycles_" + bytes).c_str()));
        }
        line_ = Cycle(value("line"));
        l1_lines_ = size_t(value("l1_bytes")) / line_;
        l1_rate_ = value("l1_bytes_per_cycle");
        l1_latency_ = Cycle(value("l1_latency"));
        l2_latency_ = Cycle(value("l2_latency"));
        l2_rate_ = value("l2_bytes_per_cycle") / (value("cus") / value("xcds"));
        memory_latency_ = Cycle(value("memory_ns") * options.clock_mhz / 1000);
        sharers_ = std::max<uint64_t>(1, uint64_t(options.sharers + 0.5));
        memory_rate_ = value("memory_gb_per_s") * 1000 * value("memory_efficiency") / options.clock_mhz / value("cus");
        misses_ = size_t(value("misses"));
        memory_queue_ = Cycle(value("memory_queue"));
        needs_.resize(recording.code->instructions.size());
        known_.resize(needs_.size());
        stalls_of_.resize(needs_.size());
    }

    std::string play() {
        for (int i = 0; i < options_.resident; ++i) start_group(0);
        Cycle now = 0;
        for (; live_ && now < (Cycle(1) << 40); ++now) {
            if (waiting_start_.size() && waiting_start_.front() <= now) {
                waiting_start_.pop_front();
                start_group(now);
            }
            take_turn(simds_[now % 4], now);
        }
        end_ = now;
        return text();
    }

private:
    const Recording &recording_;
    const ReplayOptions &options_;
    Cycle turn_, vector_latency_, transcendental_latency_, blocks_short_, blocks_wide_, blocks_long_, packed_after_,
        vector_to_scalar_, branch_taken_, barrier_, scalar_load_, group_start_, read_latency_[3], read_cycles_[3],
        write_latency_[3], write_cycles_[3], line_, l1_latency_, l2_latency_, memory_latency_, memory_queue_;
    size_t l1_lines_, misses_;
    uint64_t sharers_;
    double l1_rate_, l2_rate_, memory_rate_;
    std::vector<Needs> needs_;
    std::vector<uint8_t> known_;
    std::vector<std::array<uint64_t, stalls>> stalls_of_;

    Simd simds_[4];
    std::vector<std::unique_ptr<PlayedWave>> waves_;
    std::vector<PlayedGroup> groups_;
    std::deque<Cycle> waiting_start_;
    int next_simd_ = 0, live_ = 0;
    Cycle end_ = 0;
    Work work_;
    std::string marks_, events_;

    // memory
    Cycle lds_free_ = 0, address_free_ = 0, refused_[4] = {};   // since when a SIMD waits for the address unit
    double l2_free_ = 0, memory_free_ = 0;
    std::priority_queue<Cycle, std::vector<Cycle>, std::greater<Cycle>> in_flight_;
    std::unordered_map<uint64_t, std::pair<Cycle, uint64_t>> l1_;   // line -> when it is there, last use
    std::deque<std::pair<uint64_t, uint64_t>> l1_order_;            // uses, oldest first
    std::unordered_map<uint64_t, Cycle> l2_;                        // lines that this CU asked for -> when they came
    uint64_t uses_ = 0, first_asked_ = 0;

    bool counted(Cycle now) const { return now >= options_.from && now < options_.to; }

    void start_group(Cycle now) {
        if (int(groups_.size()) >= options_.groups) return;
        const GroupTrace &trace = *recording_.groups[groups_.size() % recording_.groups.size()];
        groups_.push_back({int(groups_.size()), int(trace.waves.size()), 0, now, 0});
        for (size_t i = 0; i < trace.waves.size(); ++i) {
            auto wave = std::make_unique<PlayedWave>();
            wave->trace = &trace.waves[i];
            wave->group = groups_.back().number;
            wave->number = int(i);
            wave->simd = next_simd_;
            wave->earliest = now;
            simds_[next_simd_].waves.push_back(wave.get());
            next_simd_ = (next_simd_ + 1) % 4;
            waves_.push_back(std::move(wave));
            ++live_;
        }
    }

    const Needs &needs(uint32_t index) {
        if (!known_[index]) {
            needs_[index] = needs_of(recording_.code->instructions[index]);
            known_[index] = 1;
        }
        return needs_[index];
    }

    void take_turn(Simd &simd, Cycle now) {
        bool taken[int(Unit::end) + 1] = {};
        PlayedWave *order[16];
        int count = 0;
        for (PlayedWave *w : simd.waves) {
            if (w->ended) continue;
            int at = count++;
            for (; at > 0 && order[at - 1]->priority < w->priority; --at) order[at] = order[at - 1];
            order[at] = w;
        }
        bool gone = false;
        for (int i = 0; i < count; ++i) {
            PlayedWave &w = *order[i];
            const TraceEvent &event = w.trace->events[w.next];
            const Needs &n = needs(event.index);
            Stall reason = hindrance(simd, w, n, now);
            const Unit unit = n.unit == Unit::matrix ? Unit::vector : n.unit;   // they share the issue port
            const bool shared = unit != Unit::wait && unit != Unit::barrier && unit != Unit::end && !n.nops;
            if (reason == issued && shared && taken[int(unit)]) reason = other;
            const uint32_t blamed = w.at_barrier ? w.trace->events[w.next - 1].index : event.index;
            if (counted(now)) stalls_of_[blamed][reason] += turn_;
            if (reason != issued) continue;
            if (shared) taken[int(unit)] = true;
            issue(simd, w, event, n, now);
            gone |= w.ended;
        }
        if (!gone) return;
        auto ended = [](PlayedWave *w) { return w->ended; };
        simd.waves.erase(std::remove_if(simd.waves.begin(), simd.waves.end(), ended), simd.waves.end());
    }

    // Why the wave cannot issue its next instruction now, or `issued`.
    Stall hindrance(Simd &simd, PlayedWave &w, const Needs &n, Cycle now) {
        if (w.at_barrier) return barrier_wait;
        if (now < w.earliest) return w.waits_as;
        while (!w.memory.empty() && w.memory.front() <= now) w.memory.pop_front();
        while (!w.lds.empty() && w.lds.front() <= now) w.lds.pop_front();
        for (const Range &r : n.scalar_reads)
            for (unsigned i = r.first; i < unsigned(r.first + r.count) && i < 128; ++i)
                if (w.scalar_ready[i] > now) return result;
        switch (n.unit) {
            case Unit::wait: {
                const unsigned most_memory = (n.immediate & 15) | (n.immediate >> 14 & 3) << 4;
                const unsigned most_lgkm = n.immediate >> 8 & 15;
                if (w.memory.size() > most_memory) return vmcnt;
                const bool scalar = w.scalar_loads > now;
                if (w.lds.size() + (scalar ? w.scalar_loads_issued : 0) > most_lgkm) return lgkmcnt;
                return issued;
            }
            case Unit::end:
                return issued;
            case Unit::vector:
            case Unit::matrix:
                if (n.unit == Unit::matrix && simd.matrix_free > now) return matrix_busy;
                for (const Range &r : n.reads)
                    if (Cycle ready = latest(w, r); ready > now) return result;
                if (simd.shadow_until > now) return shadow;
                if (simd.vector_free > now) return vector_busy;
                if (n.unit == Unit::matrix) return issued;
                return n.packed && simd.packed_from > now ? shadow : issued;
            case Unit::lds:
                for (const Range &r : n.reads)
                    if (latest(w, r) > now) return result;
                if (w.lds.size() >= 15 || simd.lds_free >= now + turn_) return lds_busy;
                return issued;
            case Unit::memory:
                for (const Range &r : n.reads)
                    if (latest(w, r) > now) return result;
                if (w.memory.size() >= 63) return memory_busy;
                return address_unit_takes(int(&simd - simds_), now) ? issued : memory_busy;
            default:
                return issued;
        }
    }

    // The SIMD that was refused first goes first.
    bool address_unit_takes(int simd, Cycle now) {
        Cycle &since = refused_[simd];
        bool first = address_free_ <= now + memory_queue_;
        for (Cycle other_since : refused_) first &= !other_since || other_since >= (since ? since : now);
        if (!first && !since) since = std::max<Cycle>(now, 1);
        return first;
    }

    Cycle latest(const PlayedWave &w, const Range &r) const {
        Cycle most = 0;
        for (unsigned i = r.first; i < unsigned(r.first + r.count) && i < 512; ++i)
            most = std::max(most, w.vector_ready[i]);
        return most;
    }

    void issue(Simd &simd, PlayedWave &w, const TraceEvent &event, const Needs &n, Cycle now) {
        const bool counts = counted(now);
        if (event.index == options_.marker) mark(w, now);
        w.earliest = now + turn_;
        w.waits_as = issued;
        Cycle busy = turn_;
        switch (n.unit) {
            case Unit::vector:
                busy = n.cycles;
                simd.vector_free = now + n.cycles;
                if (n.packed) simd.matrix_free = std::max(simd.matrix_free, now + n.cycles);
                set_ready(w, n, now + n.cycles + (n.transcendental ? transcendental_latency_ : vector_latency_));
                for (unsigned i = n.scalar_write.first; i < unsigned(n.scalar_write.first + n.scalar_write.count); ++i)
                    w.scalar_ready[i] = now + vector_to_scalar_;
                if (counts) work_.vector += n.cycles;
                break;
            case Unit::matrix: {
                busy = n.cycles;
                simd.matrix_free = now + n.cycles;
                Cycle blocked = blocks_short_ + (n.matrix_bytes >= 16 ? blocks_wide_ : 0);
                if (n.cycles >= 8 * turn_) blocked = std::max(blocked, blocks_long_);
                if (n.alone) blocked = n.cycles;
                simd.shadow_until = now + blocked;
                simd.packed_from = now + n.cycles + packed_after_ + (n.matrix_bytes >= 16 ? turn_ : 0);
                // Others than a chain of accumulations are kept away by the wait states that programs must have.
                set_ready(w, n, now + n.cycles);
                if (counts) work_.matrix += n.cycles;
                break;
            }
            case Unit::lds: busy = access_lds(simd, w, event, n, now); break;
            case Unit::memory:
                refused_[w.simd] = 0;
                busy = access_memory(w, event, n, now);
                break;
            case Unit::scalar_memory:
                w.scalar_loads_issued = w.scalar_loads > now ? w.scalar_loads_issued + 1 : 1;
                w.scalar_loads = now + scalar_load_;
                break;
            case Unit::barrier: arrive(w, now); break;
            case Unit::end: finish(w, now); break;
            default:
                if (n.nops || n.sleeps) {
                    w.earliest = now + (n.sleeps ? 64 * Cycle(n.immediate & 127) : turn_ * ((n.immediate & 15) + 1));
                    w.waits_as = nop;
                }
                if (n.priority) w.priority = n.immediate & 3;
        }
        if (counts) {
            ++work_.instructions;
            if (options_.events) {
                char line[96];
                snprintf(line, sizeof line, "event\t%d\t%d\t%llu\t%llu\t%s\t%u\n", w.group, w.number,
                         (unsigned long long)now, (unsigned long long)busy, unit_names[int(n.unit)], event.index);
                events_ += line;
            }
        }
        ++w.next;
        if (w.ended) return;
        if (n.branch && w.trace->events[w.next].index != event.index + 1) {
            w.earliest = now + branch_taken_;
            w.waits_as = fetch;
        }
    }

    void set_ready(PlayedWave &w, const Needs &n, Cycle when) {
        for (const Range &r : n.writes)
            for (unsigned i = r.first; i < unsigned(r.first + r.count) && i < 512; ++i) w.vector_ready[i] = when;
    }

    Cycle access_lds(Simd &simd, PlayedWave &w, const TraceEvent &event, const Needs &n, Cycle now) {
        const int size = n.words == 1 ? 0 : n.words == 2 ? 1 : 2;
        const Cycle path = n.accesses * (n.write || n.atomic ? write_cycles_ : read_cycles_)[size];
        const Cycle banks = std::max<Cycle>(event.lds_cycles, 1);
        const Cycle begin = std::max(now, lds_free_);
        simd.lds_free = std::max(now, simd.lds_free) + path;
        lds_free_ = begin + banks;
        const Cycle least = std::max<Cycle>(path, 1);
        const Cycle latency = (n.write || n.atomic ? write_latency_ : read_latency_)[size];
        const Cycle late = banks > least ? banks - least : 0;
        Cycle done = begin + latency + late + (n.accesses - 1) * path / n.accesses;
        if (!w.lds.empty()) done = std::max(done, w.lds.back());
        w.lds.push_back(done);
        if (counted(now)) work_.lds += banks;
        return path;
    }

    // When a line is in the L1.
    Cycle fetch_line(uint64_t line, Cycle now) {
        auto found = l1_.find(line);
        l1_order_.push_back({line, ++uses_});
        if (found != l1_.end()) {
            found->second.second = uses_;
            return std::max(now, found->second.first) + (found->second.first > now ? 0 : l1_latency_);
        }
        while (l1_.size() >= l1_lines_ && !l1_order_.empty()) {
            auto [old, use] = l1_order_.front();
            l1_order_.pop_front();
            auto it = l1_.find(old);
            if (it != l1_.end() && it->second.second == use) l1_.erase(it);
        }
        while (!in_flight_.empty() && in_flight_.top() <= now) in_flight_.pop();
        Cycle begin = now;
        if (in_flight_.size() >= misses_) {
            begin = in_flight_.top();
            in_flight_.pop();
        }
        l2_free_ = std::max(l2_free_, double(begin)) + line_ / l2_rate_;
        Cycle done = Cycle(l2_free_) + l2_latency_;
        auto [known, first] = l2_.insert({line, 0});
        // Of the CUs that share a line, the first to ask waits for memory. This one is it as often as the others.
        if (first && first_asked_++ % sharers_ == 0) {
            memory_free_ = std::max(memory_free_, double(begin)) + line_ / memory_rate_;
            done = std::max(done, Cycle(memory_free_) + memory_latency_);
            known->second = done;
            if (counted(now)) work_.memory_bytes += line_;
        } else {
            done = std::max(done, known->second);
        }
        in_flight_.push(done);
        if (counted(now)) work_.l2_bytes += line_;
        l1_[line] = {done, uses_};
        return done;
    }

    Cycle access_memory(PlayedWave &w, const TraceEvent &event, const Needs &n, Cycle now) {
        const Cycle per_line = Cycle(line_ / l1_rate_), factor = line_ / 64;
        Cycle at = std::max(now, address_free_), done = at + l1_latency_;
        const Cycle begin = at;
        uint64_t last = ~uint64_t{0};
        Cycle lines = 0;
        for (uint32_t i = 0; i < event.lines; ++i) {
            // Workgroups on a CU are of different heads: no line is both one's and another's.
            const uint64_t line = w.trace->lines[event.first_line + i] / factor + (uint64_t(w.group) << 48);
            if (line == last) continue;
            last = line;
            ++lines;
            if (n.write || n.atomic) {
                l2_free_ = std::max(l2_free_, double(at)) + 2 * line_ / l2_rate_;   // half the rate of reads
                memory_free_ = std::max(memory_free_, double(at)) + line_ / memory_rate_;
                done = std::max(done, Cycle(l2_free_) + l2_latency_);
                if (counted(now)) work_.l2_bytes += line_, work_.memory_bytes += line_;
            } else {
                done = std::max(done, fetch_line(line, at));
            }
            at += per_line;
        }
        const Cycle busy = std::max<Cycle>(lines * per_line, 4);
        address_free_ = begin + busy;
        if (n.to_lds) lds_free_ = std::max(lds_free_, now) + 2 * n.words;      // its writes take LDS's banks, too
        if (!w.memory.empty()) done = std::max(done, w.memory.back());
        w.memory.push_back(done);
        if (counted(now)) work_.l1_bytes += lines * line_;
        return busy;
    }

    void arrive(PlayedWave &w, Cycle now) {
        PlayedGroup &group = groups_[w.group];
        w.at_barrier = true;
        if (++group.arrived < group.live) return;
        group.arrived = 0;
        for (auto &other_wave : waves_)
            if (other_wave->group == w.group && !other_wave->ended) {
                other_wave->at_barrier = false;
                other_wave->earliest = now + barrier_;
                other_wave->waits_as = barrier_wait;
            }
    }

    void finish(PlayedWave &w, Cycle now) {
        PlayedGroup &group = groups_[w.group];
        w.ended = true;
        --live_;
        if (--group.live) return;
        group.end = now;
        if (int(groups_.size() + waiting_start_.size()) < options_.groups) {
            waiting_start_.push_back(now + group_start_);
            if (!live_) {                                     // nobody else keeps the clock going
                waiting_start_.pop_back();
                start_group(now + group_start_);
            }
        }
    }

    void mark(const PlayedWave &w, Cycle now) {
        char line[64];
        snprintf(line, sizeof line, "mark\t%d\t%d\t%llu\n", w.group, w.number, (unsigned long long)now);
        marks_ += line;
    }

    std::string text() {
        char line[256];
        std::string out;
        auto number = [&](const char *name, uint64_t value) {
            snprintf(line, sizeof line, "work\t%s\t%llu\n", name, (unsigned long long)value);
            out += line;
        };
        number("cycles", end_);
        number("matrix", work_.matrix);
        number("vector", work_.vector);
        number("lds", work_.lds);
        number("l1_bytes", work_.l1_bytes);
        number("l2_bytes", work_.l2_bytes);
        number("memory_bytes", work_.memory_bytes);
        number("instructions", work_.instructions);
        for (const PlayedGroup &g : groups_) {
            snprintf(line, sizeof line, "group\t%d\t%llu\t%llu\n", g.number, (unsigned long long)g.start,
                     (unsigned long long)g.end);
            out += line;
        }
        out += marks_;
        for (size_t i = 0; i < stalls_of_.size(); ++i)
            for (int s = 0; s < stalls; ++s)
                if (stalls_of_[i][s]) {
                    snprintf(line, sizeof line, "stall\t%zu\t%s\t%s\t%llu\t", i, unit_names[int(needs_[i].unit)],
                             stall_names[s], (unsigned long long)stalls_of_[i][s]);
                    out += line + describe(recording_.code->instructions[i]) + "\n";
                }
        return out + events_;
    }
};

}  // namespace

double timing_parameter(Arch arch, const std::string &name) {
    auto changed = replaced(arch).find(name);
    if (changed != replaced(arch).end()) return changed->second;
    for (const TimingParameter &p : timing_parameters)
        if (name == p.name) return arch == Arch::gfx90a ? p.gfx90a : arch == Arch::gfx942 ? p.gfx942 : p.gfx950;
    return 0;
}

bool set_timing_parameter(Arch arch, const std::string &name, double value) {
    for (const TimingParameter &p : timing_parameters)
        if (name == p.name) {
            replaced(arch)[name] = value;
            return true;
        }
    return false;
}

std::string replay(const Recording &recording, const ReplayOptions &options) { return Cu(recording, options).play(); }

}  // namespace emulator
