// What the timing model plays: traces, recorded while workgroups execute.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "code_object.h"

namespace emulator {

// One executed instruction.
struct TraceEvent {
    uint32_t index;          // of the instruction in the text
    uint32_t first_line;     // of the cache lines that it touched, in WaveTrace::lines
    uint16_t lines;
    uint16_t lds_cycles;     // of LDS's banks
};

struct WaveTrace {
    std::vector<TraceEvent> events;
    std::vector<uint64_t> lines;                              // addresses / 64
};

struct GroupTrace {
    uint64_t number;
    std::vector<WaveTrace> waves;
};

struct Recording {
    std::shared_ptr<const CodeObject> code;
    const Kernel *kernel;
    uint32_t lds_bytes, threads;
    std::vector<std::unique_ptr<GroupTrace>> groups;
};

// How to play a recording.
struct ReplayOptions {
    int resident, groups;    // workgroups on the CU at a time, and in all: those recorded, again and again
    double clock_mhz;
    double sharers;          // CUs of an XCD that load the same lines at about the same time
    uint32_t marker;         // instruction whose issue times are noted
    uint64_t from, to;       // cycles in which the units' work and the waves' stalls are counted
    bool events;             // whether to list what was issued in them
};

// Plays the recording on one CU and returns lines of fields between tabs (timing.py reads them).
std::string replay(const Recording &recording, const ReplayOptions &options);

// The value of a parameter of timing_tables.h, which set may have replaced.
double timing_parameter(Arch arch, const std::string &name);
bool set_timing_parameter(Arch arch, const std::string &name, double value);

}  // namespace emulator
