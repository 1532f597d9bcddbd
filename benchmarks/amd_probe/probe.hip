/* Measures what the timing model of tests/emulator assumes, on any card of gfx90a, gfx942 or gfx950, in under a minute:
 *
 *     hipcc -O2 --offload-arch=native benchmarks/amd_probe/probe.hip -o probe && ./probe > probe.json
 *     python benchmarks/amd_timing.py --arch gfx942 --probe probe.json
 *
 * One wave, or as many as a test names, runs a loop of known instructions between two readings of the shader clock
 * (s_memtime); the loop without them is subtracted. Each result is a parameter of timing_tables.h, or of use to one:
 * what starts with "seen_" is not a parameter, and amd_timing.py leaves it alone.
 *
 *     chase      one lane follows pointers: latency of LDS, L1, L2 and memory
 *     repeat     the same instruction again and again: LDS paths, transcendental and packed ones, matrix instructions
 *     mixed      an instruction behind a matrix instruction: what may run in its shadow
 *     stream     all CUs read a large buffer: bandwidth, and from one CU's share lines on their way */
#include <hip/hip_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#define CHECK(call)                                                                                                    \
    do {                                                                                                               \
        hipError_t error = (call);                                                                                     \
        if (error != hipSuccess) {                                                                                     \
            fprintf(stderr, "%s: %s\n", #call, hipGetErrorString(error));                                              \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* The compiler's own names: HIP's need its device library, which not every toolchain has. */
__device__ __forceinline__ uint32_t thread() { return __builtin_amdgcn_workitem_id_x(); }
__device__ __forceinline__ uint32_t block() { return __builtin_amdgcn_workgroup_id_x(); }
__device__ __forceinline__ void sync() { asm volatile("s_waitcnt lgkmcnt(0)\n s_barrier" ::: "memory"); }

__device__ __forceinline__ uint64_t cycles() {
    uint64_t now;
    asm volatile("s_waitcnt vmcnt(0) lgkmcnt(0)\n s_memtime %0\n s_waitcnt lgkmcnt(0)" : "=s"(now)::"memory");
    return now;
}

/* One lane follows indices through memory; result[0]: cycles of all steps, result[1]: where it ended. */
__global__ void chase_memory(const uint32_t *next, uint64_t *result, int steps) {
    uint32_t at = 0;
    if (thread()) return;
    for (int i = 0; i < steps; ++i) at = next[at]; /* what fits a cache is in it afterwards */
    const uint64_t begin = cycles();
    for (int i = 0; i < steps; ++i) at = next[at];
    result[1] = at;
    result[0] = cycles() - begin;
}

__global__ void chase_lds(uint64_t *result, int steps) {
    __shared__ uint32_t next[256];
    for (uint32_t i = thread(); i < 256; i += 64) next[i] = (i + 97) % 256;
    sync();
    if (thread()) return;
    uint32_t at = 0;
    const uint64_t begin = cycles();
    for (int i = 0; i < steps; ++i) at = next[at];
    result[1] = at;
    result[0] = cycles() - begin;
}

/* Sixteen times the text in a loop; wave 0 reports. The text has v[40:67], which begin as zeros, and %0, an address. */
#define FOUR(text) text text text text
#define SIXTEEN(text) FOUR(text) FOUR(text) FOUR(text) FOUR(text)
#define ZERO(r) "v_mov_b32 v" #r ", 0\n"
#define ZEROS                                                                                                          \
    ZERO(40)                                                                                                           \
    ZERO(41) ZERO(42) ZERO(43) ZERO(44) ZERO(45) ZERO(46) ZERO(47) ZERO(48) ZERO(49) ZERO(50) ZERO(51) ZERO(52)        \
        ZERO(53) ZERO(54) ZERO(55) ZERO(56) ZERO(57) ZERO(58) ZERO(59) ZERO(60) ZERO(61) ZERO(62) ZERO(63) ZERO(64)    \
            ZERO(65) ZERO(66) ZERO(67)
#define USED                                                                                                           \
    "v40", "v41", "v42", "v43", "v44", "v45", "v46", "v47", "v48", "v49", "v50", "v51", "v52", "v53", "v54", "v55",    \
        "v56", "v57", "v58", "v59", "v60", "v61", "v62", "v63", "v64", "v65", "v66", "v67", "s40", "scc", "memory"
#define REPEAT(name, text)                                                                                             \
    __global__ void __launch_bounds__(256) name(uint64_t *result, int times) {                                         \
        __shared__ uint32_t memory[1024];                                                                              \
        if (thread() < 64)                                                                                             \
            for (uint32_t i = thread(); i < 1024; i += 64) memory[i] = 0;                                              \
        sync();                                                                                                        \
        const uint32_t address = thread() % 64 * 16;                                                                   \
        const uint64_t begin = cycles();                                                                               \
        asm volatile(                                                                                                  \
            ZEROS "s_mov_b32 s40, %1\n s_nop 7\n 1:\n" SIXTEEN(                                                        \
                text) "s_waitcnt lgkmcnt(0)\n s_sub_u32 s40, s40, 1\n s_cmp_lg_u32 s40, 0\n s_cbranch_scc1 1b\n"       \
                      "s_nop 15\n s_nop 15\n"                                                                          \
            :                                                                                                          \
            : "v"(address), "s"(times)                                                                                 \
            : USED);                                                                                                   \
        const uint64_t taken = cycles() - begin;                                                                       \
        if (thread() == 0) {                                                                                           \
            result[0] = taken;                                                                                         \
            result[1] = memory[0];                                                                                     \
        }                                                                                                              \
    }
/* a 16x16x16 matrix instruction on v[40:43]; then what stands behind it */
#if defined(__gfx90a__)
#define MATRIX "v_mfma_f32_16x16x16f16 v[40:43], v[60:61], v[62:63], v[40:43]\n"
#define MATRIX_LONG "v_mfma_f32_32x32x8f16 v[40:55], v[60:61], v[62:63], v[40:55]\n"
#else
#define MATRIX "v_mfma_f32_16x16x16_f16 v[40:43], v[60:61], v[62:63], v[40:43]\n"
#define MATRIX_LONG "v_mfma_f32_32x32x8_f16 v[40:55], v[60:61], v[62:63], v[40:55]\n"
#endif
REPEAT(nothing, "")
REPEAT(plain, "v_add_f32 v56, v64, v65\n")
REPEAT(plain_dependent, "v_add_f32 v56, v56, v65\n")
REPEAT(transcendental, "v_exp_f32 v56, v64\n")
REPEAT(packed, "v_pk_mul_f32 v[56:57], v[64:65], v[66:67]\n")
REPEAT(lds_read_4, "ds_read_b32 v56, %0\n")
REPEAT(lds_read_8, "ds_read_b64 v[56:57], %0\n")
REPEAT(lds_read_16, "ds_read_b128 v[56:59], %0\n")
REPEAT(lds_write_4, "ds_write_b32 %0, v64\n")
REPEAT(lds_write_8, "ds_write_b64 %0, v[64:65]\n")
REPEAT(lds_write_16, "ds_write_b128 %0, v[64:67]\n")
REPEAT(matrix, MATRIX)
REPEAT(matrix_long, MATRIX_LONG)
REPEAT(matrix_then_plain, MATRIX "v_add_f32 v56, v64, v65\n")
REPEAT(matrix_then_packed, MATRIX "v_pk_mul_f32 v[56:57], v[64:65], v[66:67]\n")
REPEAT(matrix_then_four_plain, MATRIX FOUR("v_add_f32 v56, v64, v65\n"))
REPEAT(barrier, "s_barrier\n")
REPEAT(branch, "s_branch 1\n s_nop 0\n")

/* Each thread reads 16 bytes, then as much further on. */
__global__ void __launch_bounds__(1024) stream(const uint4 *from, uint4 *to, size_t count, size_t step) {
    uint4 sum{};
    for (size_t i = block() * size_t{1024} + thread(); i < count; i += step) {
        const uint4 x = from[i];
        sum.x ^= x.x ^ x.y ^ x.z ^ x.w;
    }
    if (sum.x == 0x12345678u) to[0] = sum;
}

namespace {

uint64_t *result; /* two words that kernels write */

double taken() {
    uint64_t host[2];
    CHECK(hipDeviceSynchronize());
    CHECK(hipMemcpy(host, result, sizeof host, hipMemcpyDeviceToHost));
    return static_cast<double>(host[0]);
}

double chase(size_t bytes, int steps) {
    const size_t stride = 32, count = bytes / (stride * sizeof(uint32_t)); /* a line each */
    std::vector<uint32_t> order(count), next(count * stride);
    for (size_t i = 0; i < count; ++i) order[i] = static_cast<uint32_t>(i);
    uint32_t state = 1;
    for (size_t i = count - 1; i > 0; --i) { /* one cycle through all of them */
        state = state * 1664525u + 1013904223u;
        std::swap(order[i], order[state % i]);
    }
    for (size_t i = 0; i < count; ++i) next[order[i] * stride] = static_cast<uint32_t>(order[(i + 1) % count] * stride);
    uint32_t *device;
    CHECK(hipMalloc(reinterpret_cast<void **>(&device), next.size() * sizeof(uint32_t)));
    CHECK(hipMemcpy(device, next.data(), next.size() * sizeof(uint32_t), hipMemcpyHostToDevice));
    hipLaunchKernelGGL(chase_memory, dim3(1), dim3(64), 0, 0, device, result, steps);
    const double cycles = taken() / steps;
    CHECK(hipFree(device));
    return cycles;
}

double repeat(void (*kernel)(uint64_t *, int), int threads = 64, int times = 200) {
    double best = 1e30;
    for (int i = 0; i < 3; ++i) {
        hipLaunchKernelGGL(kernel, dim3(1), dim3(threads), 0, 0, result, times);
        best = std::min(best, taken());
    }
    return best / times / 16;
}

double gb_per_s(size_t bytes, int blocks) {
    uint4 *memory;
    CHECK(hipMalloc(reinterpret_cast<void **>(&memory), bytes));
    CHECK(hipMemset(memory, 1, bytes));
    hipEvent_t begin, end;
    CHECK(hipEventCreate(&begin));
    CHECK(hipEventCreate(&end));
    float best = 1e30f;
    for (int i = 0; i < 5; ++i) {
        CHECK(hipEventRecord(begin, 0));
        hipLaunchKernelGGL(stream, dim3(blocks), dim3(1024), 0, 0, memory, memory, bytes / sizeof(uint4),
                           size_t{1024} * blocks);
        CHECK(hipEventRecord(end, 0));
        CHECK(hipEventSynchronize(end));
        float milliseconds;
        CHECK(hipEventElapsedTime(&milliseconds, begin, end));
        best = std::min(best, milliseconds);
    }
    CHECK(hipFree(memory));
    return static_cast<double>(bytes) / best * 1e-6;
}

} // namespace

int main() {
    hipDeviceProp_t device;
    CHECK(hipGetDeviceProperties(&device, 0));
    CHECK(hipMalloc(reinterpret_cast<void **>(&result), 64));
    const double mhz = device.clockRate / 1000.0, line = 128;
    const double empty = repeat(nothing);
    auto cost = [&](void (*kernel)(uint64_t *, int), int threads = 64) { return repeat(kernel, threads) - empty; };
    const double one = cost(plain), product = cost(matrix);
    const double l2 = chase(512 << 10, 4000), memory = chase(size_t{1} << 30, 20000);
    const double all = gb_per_s(size_t{1} << 30, device.multiProcessorCount * 2), single = gb_per_s(64 << 20, 1);
    std::string arch(device.gcnArchName);
    printf("{\"%s\": {\n", arch.substr(0, arch.find(':')).c_str());
    auto print = [](const char *name, double value) { printf("  \"%s\": %.3f,\n", name, value); };
    print("clock_mhz", mhz);
    print("cus", device.multiProcessorCount);
    hipLaunchKernelGGL(chase_lds, dim3(1), dim3(64), 0, 0, result, 4000);
    const double lds = taken() / 4000;
    /* sixteen accesses, then the wait for the last */
    auto path = [&](void (*kernel)(uint64_t *, int)) { return cost(kernel) - lds / 16; };
    print("lds_read_latency_4", lds);
    print("lds_read_cycles_4", path(lds_read_4));
    print("lds_read_cycles_8", path(lds_read_8));
    print("lds_read_cycles_16", path(lds_read_16));
    print("lds_write_cycles_4", path(lds_write_4));
    print("lds_write_cycles_8", path(lds_write_8));
    print("lds_write_cycles_16", path(lds_write_16));
    print("vector_latency_turns", std::max(0.0, (cost(plain_dependent) - one) / 4));
    print("barrier", cost(barrier, 256));
    print("branch_taken", cost(branch));
    print("l1_latency", chase(8 << 10, 4000));
    print("l2_latency", l2);
    print("memory_ns", memory / mhz * 1000);
    print("memory_efficiency", 1.0); /* of what was measured: */
    print("memory_gb_per_s", all);
    print("misses", std::max(1.0, single / mhz * 1000 * memory / line));
    print("packed_after_matrix", std::max(0.0, (cost(matrix_then_packed) - product) / 4 - 1));
    print("seen_plain", one);
    print("seen_transcendental", cost(transcendental));
    print("seen_packed", cost(packed));
    print("seen_matrix_16x16x16", product);
    print("seen_matrix_32x32x8", cost(matrix_long));
    print("seen_matrix_then_plain", cost(matrix_then_plain));
    printf("  \"seen_matrix_then_four_plain\": %.3f\n}}\n", cost(matrix_then_four_plain));
    return 0;
}
