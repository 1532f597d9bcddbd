// Every number of the timing model, for each arch, with its source. What starts with "assumed" was found nowhere: it
// takes the end that makes a kernel slower, and reports list it. The probe (benchmarks/amd_probe) measures most of them
// on a card; its file replaces them (emulator_timing_set).
//
// Cycles are those of the shader clock. Bytes and lines are those of one CU unless said otherwise.
#pragma once

namespace emulator {

struct TimingParameter {
    const char *name;
    double gfx90a, gfx942, gfx950;
    const char *source;
};

#define ISSUE "GCN and CDNA ISA documents: each SIMD issues every 4 cycles, one instruction a wave and unit"
#define UBENCH "gcnasm ubench, measured on an MI308X at 1.42 GHz"
#define PEAK "AMD's data sheet"
#define SHADOW "LLVM PRs #233721, #239095, #184084 (traces of MI308X and MI350X)"

constexpr TimingParameter timing_parameters[] = {
    // --- the chip
    {"clock_mhz", 1700, 2100, 2400, PEAK},
    {"cus", 104, 304, 256, PEAK ": of one die for gfx90a"},
    {"xcds", 1, 8, 8, "CDNA white papers"},
    {"power_tflops", 0, 708, 1610, "bf16 that power allows: AMD, max achievable FLOPs on MI300X; gfx950: the fastest "
        "GEMM of HipKittens on MI355X; gfx90a: none published"},
    {"lds_bytes", 65536, 65536, 163840, "ISA documents"},

    // --- issue
    {"turn", 4, 4, 4, ISSUE},
    {"vector_latency_turns", 0, 0, 0, "turns that a dependent vector instruction waits beyond the next; the ISA lists "
        "no wait state and no interlock between plain ones"},
    {"transcendental_latency_turns", 1, 1, 1, "LLVM GCNHazardRecognizer: one wait state after a transcendental one"},
    {"vector_to_scalar", 16, 16, 16, "assumed: from a vector instruction that writes a scalar register to a scalar one"},
    {"branch_taken", 20, 20, 20, "assumed: from a taken branch to the next instruction"},
    {"barrier", 20, 20, 20, "assumed: from the last wave's arrival to the first instruction after it"},
    {"scalar_load", 200, 200, 200, "assumed: a scalar load that hits its cache"},
    {"group_start", 500, 500, 500, "assumed: from one workgroup's end to the next one's first instruction"},

    // --- matrix instructions; their passes stand in matrix.cpp
    {"matrix_blocks_short", 1, 1, 1, SHADOW ": turns that vector instructions wait behind one, A and B of 8 bytes"},
    {"matrix_blocks_wide", 1, 1, 1, SHADOW ": turns more for A or B of 16 bytes"},
    {"matrix_blocks_long", 2, 2, 2, SHADOW ": turns behind one of 8 passes and more"},
    {"packed_after_matrix", 2, 2, 2, SHADOW ": turns that v_pk_*_f32 and dot products wait after the last pass"},

    // --- LDS
    {"lds_read_latency_4", 64, 32, 69, UBENCH "; gfx950: triton PR #2507; gfx90a: assumed, GCN's"},
    {"lds_read_latency_8", 76, 44, 81, UBENCH "; others: the same steps"},
    {"lds_read_latency_16", 80, 48, 85, UBENCH "; others: the same steps"},
    {"lds_write_latency_4", 71, 39, 76, UBENCH "; others: the same steps"},
    {"lds_write_latency_8", 80, 48, 85, UBENCH "; others: the same steps"},
    {"lds_write_latency_16", 92, 60, 97, UBENCH "; others: the same steps"},
    {"lds_read_cycles_4", 6, 6, 6, UBENCH ": fitted to its cycles of one wave; a SIMD's path to and from LDS"},
    {"lds_read_cycles_8", 9, 9, 9, UBENCH ": fitted as above"},
    {"lds_read_cycles_16", 18, 18, 18, UBENCH ": fitted as above"},
    {"lds_write_cycles_4", 8, 8, 8, UBENCH ": fitted as above"},
    {"lds_write_cycles_8", 12, 12, 12, UBENCH ": fitted as above"},
    {"lds_write_cycles_16", 26, 26, 26, UBENCH ": fitted as above"},

    // --- global memory
    {"line", 64, 128, 128, "CDNA2, CDNA3 white papers: line of the vector L1"},
    {"l1_bytes", 16384, 32768, 32768, "CDNA2, CDNA3 white papers"},
    {"l1_bytes_per_cycle", 64, 64, 64, "rocprof-compute documentation"},
    {"l1_latency", 116, 100, 100, UBENCH "; gfx90a: assumed"},
    {"l2_latency", 320, 291, 291, UBENCH "; others: assumed"},
    {"l2_bytes_per_cycle", 2048, 2048, 2048, "CDNA3 white paper: 16 channels of 128 bytes, all CUs of an XCD together"},
    {"memory_ns", 500, 438, 500, UBENCH "; others: assumed"},
    {"memory_gb_per_s", 1638, 5300, 8000, PEAK ": of one die for gfx90a"},
    {"memory_efficiency", 0.8, 0.8, 0.8, "assumed: the share of the data sheet's bandwidth that copies reach"},
    {"misses", 98, 64, 98, "assumed: cache lines on their way to one CU; no less than memory_efficiency asks for"},
    {"memory_queue", 64, 64, 64, "assumed: cycles of work that wait before the address unit until a wave must"},
};

#undef ISSUE
#undef UBENCH
#undef PEAK
#undef SHADOW

}  // namespace emulator
