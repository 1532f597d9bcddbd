// A stand-in for the HIP runtime library: what a kernel library built by hipcc calls, with the emulator behind it; and
// the functions (emulator_*) that the Python module drives it with.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>

#include "timing_tables.h"
#include "wave.h"

using namespace emulator;

namespace {

struct Dim3 {
    uint32_t x, y, z;
};

// hipError_t values that callers may see.
enum { success = 0, invalid_value = 1, not_supported = 801, invalid_device_function = 98, launch_failure = 719 };

struct FatBinary {
    const uint8_t *data;
    std::map<Arch, std::shared_ptr<CodeObject>> objects;   // recordings outlive a bare one
};

struct FunctionEntry {
    FatBinary *binary;
    std::string name;
};

// The costs of all launches of one kernel since the last reset.
struct KernelRecord {
    const CodeObject *code;
    const Kernel *kernel;
    std::vector<Cost> costs;
    uint64_t launches = 0, workgroups = 0, waves = 0;
    uint32_t lds_bytes = 0, block = 0;
};

struct State {
    std::mutex mutex;
    Arch arch = Arch::gfx942;
    int threads = 1, last_error = success;
    int compute_units = 0;                                    // 0: as many as the arch has
    bool check_ranges = true, strict = true;
    uint64_t instruction_limit = 2000000000;
    std::string report = "no error";
    std::vector<MemoryRange> ranges;
    std::vector<std::unique_ptr<FatBinary>> binaries;
    std::map<const void *, FunctionEntry> functions;
    std::map<std::string, KernelRecord> records;
    std::string statistics;
    std::vector<uint64_t> traced;                             // workgroups to record of each launch
    std::map<std::string, Recording> recordings;              // of the last launch of each kernel
    std::string replayed;
};

State &state() {
    static State *all = new State;                            // outlives the kernels' own destructors
    return *all;
}

struct Configuration {
    Dim3 grid, block;
    size_t lds;
    void *stream;
};
thread_local std::vector<Configuration> configurations;

int failed(int code, const std::string &what) {
    state().last_error = code;
    state().report = what;
    return code;
}

template <class T> void put(std::vector<uint8_t> &to, uint32_t offset, T value) {
    if (offset + sizeof value <= to.size()) memcpy(&to[offset], &value, sizeof value);
}

// Explicit arguments from the caller's pointers, hidden ones from the launch ("Code Object V5 metadata" in LLVM's
// guide).
void fill_arguments(Launch &launch, void **arguments) {
    const Kernel &kernel = *launch.kernel;
    // Rounded up to the segment's alignment, up to which the compiler may read.
    launch.kernarg.assign(std::max<uint32_t>((kernel.kernarg_bytes + 15) / 16 * 16, 16), 0);
    size_t next = 0;
    for (const Argument &a : kernel.arguments) {
        if (a.kind.rfind("hidden_", 0) != 0) {
            memcpy(&launch.kernarg[a.offset], arguments[next++], a.size);
            continue;
        }
        const int axis = a.kind.back() - 'x';
        if (a.kind.rfind("hidden_block_count_", 0) == 0) put<uint32_t>(launch.kernarg, a.offset, launch.grid[axis]);
        else if (a.kind.rfind("hidden_group_size_", 0) == 0)
            put<uint16_t>(launch.kernarg, a.offset, uint16_t(launch.block[axis]));
        else if (a.kind == "hidden_grid_dims") put<uint16_t>(launch.kernarg, a.offset, 3);
        else if (a.kind == "hidden_dynamic_lds_size")
            put<uint32_t>(launch.kernarg, a.offset, launch.lds_bytes - kernel.lds_bytes);
    }
    // hsa_kernel_dispatch_packet_t
    launch.dispatch_packet.assign(64, 0);
    for (int axis = 0; axis < 3; ++axis) {
        put<uint16_t>(launch.dispatch_packet, 4 + 2 * axis, uint16_t(launch.block[axis]));
        put<uint32_t>(launch.dispatch_packet, 12 + 4 * axis, launch.grid[axis] * launch.block[axis]);
    }
    put<uint64_t>(launch.dispatch_packet, 40, uintptr_t(launch.kernarg.data()));
}

int launch_kernel(const void *function, Dim3 grid, Dim3 block, void **arguments, size_t dynamic_lds) {
    State &s = state();
    std::lock_guard<std::mutex> lock(s.mutex);
    auto entry = s.functions.find(function);
    if (entry == s.functions.end()) return failed(invalid_device_function, "launch of a function that is not a kernel");
    FatBinary &binary = *entry->second.binary;
    try {
        auto &code = binary.objects[s.arch];
        if (!code) {
            auto [data, size] = find_code_object(binary.data, s.arch);
            code = std::make_shared<CodeObject>(s.arch, data, size);
        }
        auto found = code->kernels.find(entry->second.name);
        if (found == code->kernels.end())
            return failed(invalid_device_function, "no kernel " + entry->second.name + " in the code object");
        const Kernel &kernel = found->second;
        Launch launch{};
        launch.arch = s.arch;
        launch.code = code.get();
        launch.kernel = &kernel;
        launch.lds_bytes = kernel.lds_bytes + uint32_t(dynamic_lds);
        launch.scratch_bytes = kernel.scratch_bytes;
        launch.ranges = s.ranges;
        launch.check_ranges = s.check_ranges;
        launch.strict = s.strict;
        launch.instruction_limit = s.instruction_limit;
        const uint32_t sizes[2][3] = {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}};
        memcpy(launch.grid, sizes[0], sizeof launch.grid);
        memcpy(launch.block, sizes[1], sizeof launch.block);
        const uint64_t threads = uint64_t(block.x) * block.y * block.z, groups = uint64_t(grid.x) * grid.y * grid.z;
        const uint32_t most_lds = s.arch == Arch::gfx950 ? 160 * 1024 : 64 * 1024;
        if (!threads || !groups || threads > kernel.max_workgroup)
            return failed(invalid_value, "a launch of " + std::to_string(groups) + " workgroups of " +
                                             std::to_string(threads) + " threads; this kernel takes 1 to " +
                                             std::to_string(kernel.max_workgroup));
        if (launch.lds_bytes > most_lds)
            return failed(invalid_value, "a launch with " + std::to_string(launch.lds_bytes) + " bytes of LDS; " +
                                             arch_name(s.arch) + " has " + std::to_string(most_lds));
        fill_arguments(launch, arguments);
        KernelRecord &record = s.records[kernel.name];
        if (record.code != code.get()) record = {code.get(), &kernel, std::vector<Cost>(code->instructions.size())};
        record.launches += 1;
        record.workgroups += groups;
        record.waves += groups * ((threads + lanes - 1) / lanes);
        record.lds_bytes = launch.lds_bytes;
        record.block = uint32_t(threads);
        for (uint64_t group : s.traced) {
            launch.traces.push_back(std::make_unique<GroupTrace>());
            launch.traces.back()->number = group;
        }
        run(launch, record.costs, s.threads);
        if (!s.traced.empty())
            s.recordings[kernel.name] = {code, &kernel, launch.lds_bytes, uint32_t(threads), std::move(launch.traces)};
    } catch (const std::exception &error) {
        return failed(launch_failure, error.what());
    }
    return success;
}

const char *error_name(int code) {
    switch (code) {
        case success: return "hipSuccess";
        case invalid_value: return "hipErrorInvalidValue";
        case invalid_device_function: return "hipErrorInvalidDeviceFunction";
        case not_supported: return "hipErrorNotSupported";
        default: return "hipErrorLaunchFailure";
    }
}

int attribute(int which) {
    const Arch arch = state().arch;
    switch (which) {
        case 63:                                                                           // multiprocessor count
            if (state().compute_units) return state().compute_units;
            return arch == Arch::gfx90a ? 104 : arch == Arch::gfx942 ? 304 : 256;
        case 87: return 64;                                                                // warp size
        case 74: return arch == Arch::gfx950 ? 160 * 1024 : 64 * 1024;                     // shared memory per block
        case 56: return 1024;                                                              // threads per block
        default: return 0;
    }
}

}  // namespace

extern "C" {

// --- registration: what the compiler's start-up code calls -----------------------------------------------------------

void **__hipRegisterFatBinary(const void *wrapper) {
    struct Wrapper { uint32_t magic, version; const uint8_t *binary; void *unused; };
    auto binary = std::make_unique<FatBinary>();
    binary->data = static_cast<const Wrapper *>(wrapper)->binary;
    std::lock_guard<std::mutex> lock(state().mutex);
    state().binaries.push_back(std::move(binary));
    return reinterpret_cast<void **>(state().binaries.back().get());
}

void __hipRegisterFunction(void **binary, const void *function, char *, const char *name, unsigned, void *, void *,
                           void *, void *, int *) {
    std::lock_guard<std::mutex> lock(state().mutex);
    state().functions[function] = {reinterpret_cast<FatBinary *>(binary), name};
}

void __hipRegisterVar(void **, void *, char *, const char *, int, size_t, int, int) {}
void __hipRegisterManagedVar(void **, void **, void *, const char *, size_t, unsigned) {}

void __hipUnregisterFatBinary(void **handle) {
    State &s = state();
    std::lock_guard<std::mutex> lock(s.mutex);
    auto *binary = reinterpret_cast<FatBinary *>(handle);
    for (auto it = s.functions.begin(); it != s.functions.end();)
        it = it->second.binary == binary ? s.functions.erase(it) : std::next(it);
    for (auto it = s.records.begin(); it != s.records.end();) {
        bool mine = false;
        for (auto &object : binary->objects) mine |= object.second.get() == it->second.code;
        it = mine ? s.records.erase(it) : std::next(it);
    }
    s.binaries.erase(std::remove_if(s.binaries.begin(), s.binaries.end(), [&](auto &b) { return b.get() == binary; }),
                     s.binaries.end());
}

int __hipPushCallConfiguration(Dim3 grid, Dim3 block, size_t lds, void *stream) {
    configurations.push_back({grid, block, lds, stream});
    return success;
}

int __hipPopCallConfiguration(Dim3 *grid, Dim3 *block, size_t *lds, void **stream) {
    if (configurations.empty()) return invalid_value;
    const Configuration &c = configurations.back();
    *grid = c.grid;
    *block = c.block;
    *lds = c.lds;
    *stream = c.stream;
    configurations.pop_back();
    return success;
}

// --- the runtime's functions -----------------------------------------------------------------------------------------

int hipLaunchKernel(const void *function, Dim3 grid, Dim3 block, void **arguments, size_t lds, void *) {
    return launch_kernel(function, grid, block, arguments, lds);
}

int hipExtLaunchKernel(const void *function, Dim3 grid, Dim3 block, void **arguments, size_t lds, void *, void *,
                       void *, int) {
    return launch_kernel(function, grid, block, arguments, lds);
}

int hipGetLastError() { int code = state().last_error; state().last_error = success; return code; }
int hipPeekAtLastError() { return state().last_error; }
const char *hipGetErrorName(int code) { return error_name(code); }
const char *hipGetErrorString(int code) { return code == success ? "no error" : state().report.c_str(); }
int hipGetDevice(int *device) { *device = 0; return success; }
int hipSetDevice(int device) { return device == 0 ? success : failed(101, "there is one device, number 0"); }
int hipGetDeviceCount(int *count) { *count = 1; return success; }
int hipDeviceGetAttribute(int *value, int which, int) { *value = attribute(which); return success; }
int hipDeviceSynchronize() { return success; }
int hipStreamSynchronize(void *) { return success; }
int hipFuncSetAttribute(const void *, int, int) { return success; }
int hipMemset(void *to, int value, size_t bytes) { memset(to, value, bytes); return success; }
int hipMemsetAsync(void *to, int value, size_t bytes, void *) { memset(to, value, bytes); return success; }
int hipMemcpy(void *to, const void *from, size_t bytes, int) { memcpy(to, from, bytes); return success; }
int hipMemcpyAsync(void *to, const void *from, size_t bytes, int, void *) { memcpy(to, from, bytes); return success; }
int hipStreamIsCapturing(void *, int *status) { *status = 0; return success; }

// --- for Python ------------------------------------------------------------------------------------------------------

int emulator_begin(const char *arch, int threads, uint64_t instruction_limit, int compute_units) {
    State &s = state();
    std::lock_guard<std::mutex> lock(s.mutex);
    if (!parse_arch(arch, s.arch)) return 1;
    s.threads = threads;
    s.compute_units = compute_units;
    s.instruction_limit = instruction_limit;
    s.ranges.clear();
    s.records.clear();
    s.statistics.clear();
    s.last_error = success;
    s.report = "no error";
    return 0;
}

const char *emulator_statistics();

void emulator_check_ranges(int on) { state().check_ranges = on; }
void emulator_strict(int on) { state().strict = on; }

void emulator_allow(const void *address, uint64_t bytes, int writable) {
    std::lock_guard<std::mutex> lock(state().mutex);
    state().ranges.push_back({uintptr_t(address), uintptr_t(address) + bytes, writable != 0});
}

void emulator_forbid_all() {
    std::lock_guard<std::mutex> lock(state().mutex);
    state().ranges.clear();
}

const char *emulator_report() { return state().report.c_str(); }

void emulator_reset_statistics() {
    std::lock_guard<std::mutex> lock(state().mutex);
    state().records.clear();
    state().statistics.clear();
}

// Launches a kernel of a bare code object with its arguments one after the other, as the kernel lays them out.
int emulator_launch(const uint8_t *code_object, const char *kernel, const uint32_t *grid, const uint32_t *block,
                    const uint8_t *arguments, uint64_t lds) {
    FatBinary binary{code_object, {}};
    const Dim3 g{grid[0], grid[1], grid[2]}, b{block[0], block[1], block[2]};
    std::vector<void *> pointers;
    try {
        auto &code = binary.objects[state().arch] = std::make_shared<CodeObject>(state().arch, code_object, 0);
        auto found = code->kernels.find(kernel);
        if (found == code->kernels.end()) return failed(invalid_device_function, std::string("no kernel ") + kernel);
        for (const Argument &a : found->second.arguments)
            if (a.kind.rfind("hidden_", 0) != 0) pointers.push_back(const_cast<uint8_t *>(arguments) + a.offset);
    } catch (const std::exception &error) {
        return failed(invalid_value, error.what());
    }
    state().functions[&binary] = {&binary, kernel};
    int code = launch_kernel(&binary, g, b, pointers.data(), lds);
    state().functions.erase(&binary);
    emulator_statistics();                                    // in words, while the code object is there
    state().records.clear();
    return code;
}

// One line for each kernel and for each of its instructions that ran; the Python module sums up. Tabs between fields.
const char *emulator_statistics() {
    State &s = state();
    std::lock_guard<std::mutex> lock(s.mutex);
    if (s.records.empty()) return s.statistics.c_str();
    s.statistics.clear();
    char line[512];
    for (auto &[name, r] : s.records) {
        const Kernel &k = *r.kernel;
        snprintf(line, sizeof line, "kernel\t%s\t%s\t%llu\t%llu\t%llu\t%u\t%u\t%u\t%u\t%u\t%u\t%u\n", name.c_str(),
                 arch_name(r.code->arch), (unsigned long long)r.launches, (unsigned long long)r.workgroups,
                 (unsigned long long)r.waves, k.registers, k.accumulation_offset, k.scalar_registers, r.lds_bytes,
                 k.scratch_bytes, r.block, k.entry);
        s.statistics += line;
        for (size_t i = 0; i < r.costs.size(); ++i) {
            const Cost &c = r.costs[i];
            if (!c.count || !r.code->instructions[i].operation) continue;
            const Instruction &in = r.code->instructions[i];
            const bool jumps =
                in.format == Format::sopp && in.operation->name[2] != 'n' &&
                (!strncmp(in.operation->name, "s_branch", 8) || !strncmp(in.operation->name, "s_cbranch", 9));
            long long target = jumps ? (long long)i + 1 + in.offset : -1;
            snprintf(line, sizeof line, "%zu\t%d\t%d\t%lld\t%llu\t%llu\t%llu\t%llu\t%llu\t%llu\t%llu\t", i,
                     int(in.operation->pipe), int(in.operation->cycles), target, (unsigned long long)c.count,
                     (unsigned long long)c.active_lanes, (unsigned long long)c.lds_cycles,
                     (unsigned long long)c.lds_least, (unsigned long long)c.lines, (unsigned long long)c.lines_least,
                     (unsigned long long)c.bytes);
            s.statistics += line + describe(in) + "\n";
        }
    }
    return s.statistics.c_str();
}

// --- the timing model ------------------------------------------------------------------------------------------------

// Records these workgroups of the launches that follow, which run no others; none: launches run whole again.
void emulator_trace(const uint64_t *groups, int count) {
    std::lock_guard<std::mutex> lock(state().mutex);
    state().traced.assign(groups, groups + count);
    if (count) state().recordings.clear();
}

// Plays what was recorded of a kernel; an empty text where nothing was.
const char *emulator_replay(const char *kernel, int resident, int groups, double clock_mhz, double sharers,
                            uint32_t marker, uint64_t from, uint64_t to, int events) {
    State &s = state();
    std::lock_guard<std::mutex> lock(s.mutex);
    auto found = s.recordings.find(kernel);
    s.replayed.clear();
    if (found != s.recordings.end())
        s.replayed = replay(found->second, {resident, groups, clock_mhz, sharers, marker, from, to, events != 0});
    return s.replayed.c_str();
}

double emulator_timing_get(const char *arch, const char *name) {
    Arch a;
    return parse_arch(arch, a) ? timing_parameter(a, name) : 0;
}

int emulator_timing_set(const char *arch, const char *name, double value) {
    Arch a;
    return parse_arch(arch, a) && set_timing_parameter(a, name, value);
}

// "name value source" lines, tabs between.
const char *emulator_timing_parameters(const char *arch) {
    static thread_local std::string text;
    text.clear();
    for (const TimingParameter &p : timing_parameters)
        text += std::string(p.name) + "\t" + std::to_string(emulator_timing_get(arch, p.name)) + "\t" + p.source + "\n";
    return text.c_str();
}

// The decoder's view, for tests: the text of the instruction at words, its size in *size.
const char *emulator_disassemble(const char *arch, const uint32_t *words, int available, int *size, int *known) {
    static thread_local std::string text;
    Arch a;
    if (!parse_arch(arch, a)) return "unknown arch";
    Instruction in = decode(a, words, uint32_t(available), 0);
    *size = in.size;
    *known = in.operation && in.operation->execute;
    text = describe(in);
    return text.c_str();
}

// Every operation that the tables name: "FORMAT opcode name known" lines.
const char *emulator_operations(const char *arch) {
    static thread_local std::string text;
    Arch a;
    if (!parse_arch(arch, a)) return "";
    std::vector<const Operation *> operations;
    auto keys = operation_table(a).known(&operations);
    text.clear();
    for (size_t i = 0; i < keys.size(); ++i)
        text += std::string(format_name(keys[i].first)) + " " + std::to_string(keys[i].second) + " " +
                operations[i]->name + (operations[i]->execute ? " 1\n" : " 0\n");
    return text.c_str();
}

}  // extern "C"
