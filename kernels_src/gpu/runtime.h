/* One source, two compilers: hipcc builds it for AMD, nvcc for NVIDIA. The sources use HIP's names for the few runtime
 * calls they make; this header gives those names their CUDA meaning where nvcc compiles. Behind them is not CUDA's
 * runtime but cuda_runtime.cpp.
 *
 * Also here: shared memory of a kernel, whose size AMD compilers want to know and NVIDIA's launch must be told, and the
 * error codes that every GPU kernel library returns. */
#ifndef AITER_GPU_RUNTIME_H
#define AITER_GPU_RUNTIME_H

#if defined(__HIP__)
#include "gpu/hip_language.h"
#else
#include <cuda_runtime.h>
using hipError_t = cudaError_t;
using hipStream_t = cudaStream_t;
constexpr hipError_t hipSuccess = cudaSuccess;
inline const char *hipGetErrorString(hipError_t error) { return cudaGetErrorString(error); }
inline hipError_t hipGetDevice(int *device) { return cudaGetDevice(device); }
inline hipError_t hipGetDeviceCount(int *count) { return cudaGetDeviceCount(count); }
constexpr auto hipDeviceAttributeMultiprocessorCount = cudaDevAttrMultiProcessorCount;
inline hipError_t hipDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    return cudaDeviceGetAttribute(value, attribute, device);
}
#endif

#include <stdint.h>

#include "aiter_abi.h"
#include "gpu/target.h"

#if defined(__HIP__)
#define AITER_SHARED(name, bytes) __shared__ __attribute__((aligned(256))) char name[bytes]
#define AITER_SHARED_OF_LAUNCH(name) extern __shared__ __attribute__((aligned(256))) char name[]
#define AITER_GRID_CONSTANT
#else
#define AITER_GRID_CONSTANT __grid_constant__ /* the parameter has an address in memory that all threads share */
#define AITER_SHARED(name, bytes) extern __shared__ __align__(1024) char name[]
#define AITER_SHARED_OF_LAUNCH(name) AITER_SHARED(name, )
#endif

namespace aiter {

/* CUs or SMs; 0 where that cannot be told. */
inline int compute_units(int device) {
    int count = 0;
    return hipDeviceGetAttribute(&count, hipDeviceAttributeMultiprocessorCount, device) == hipSuccess ? count : 0;
}

/* The most of what of(compute units) is for any of the machine's GPUs, as nobody knows which one a launch will be on. */
template <class Of> int64_t most_of_devices(Of of) {
    int devices = 0;
    if (hipGetDeviceCount(&devices) != hipSuccess) return 0;
    int64_t most = 0;
    for (int device = 0; device < devices; ++device) {
        const int64_t own = of(compute_units(device));
        if (own > most) most = own;
    }
    return most;
}

/* Codes of aiter_launch: a HIP/CUDA error as it is, or one of these. */
enum LaunchError : int {
    LAUNCH_GRID_TOO_LARGE = 100001,
    LAUNCH_STRIDE_TOO_LARGE = 100002,
    LAUNCH_BAD_PROBLEM = 100003,
    LAUNCH_TOO_MANY_STEPS = 100004,
    LAUNCH_NO_COMPUTE_UNITS = 100005,
};

inline const char *error_text(int code) {
    switch (code) {
    case 0: return "success";
    case LAUNCH_GRID_TOO_LARGE: return "more blocks than one launch can have (2^31 - 1)";
    case LAUNCH_STRIDE_TOO_LARGE: return "the stride from token to token is 2^24 elements or more";
    case LAUNCH_TOO_MANY_STEPS: return "too many keys in all: the decoding kernel counts its steps in 32 bits";
    case LAUNCH_NO_COMPUTE_UNITS: return "the driver does not tell how many compute units this GPU has";
    case LAUNCH_BAD_PROBLEM: return "the problem contradicts itself or the options this kernel was built with";
    default: return hipGetErrorString(static_cast<hipError_t>(code));
    }
}

#if defined(__HIP__)
/* Arguments are as the kernel's parameters have them: `arguments` become such on the way in. */
template <class... Parameters>
int launch_on_amd(void (*kernel)(Parameters...), dim3 grid, int threads, int shared, void *stream,
                  Parameters... arguments) {
    void *addresses[] = {&arguments...};
    const hipError_t error = hipLaunchKernel(reinterpret_cast<const void *>(kernel), grid, dim3(threads), addresses,
                                             static_cast<size_t>(shared), static_cast<hipStream_t>(stream));
    if (error != hipSuccess) static_cast<void>(hipGetLastError()); /* or PyTorch's next launch reports it again */
    return error;
}
#else
template <class... Parameters, class... Arguments>
int launch_on_nvidia(cudaLaunchAttribute *attributes, unsigned count, void (*kernel)(Parameters...), dim3 grid,
                     int threads, int shared, void *stream, const Arguments &...arguments) {
    if (shared > 48 * 1024) { /* the limit belongs to the current device */
        const hipError_t error = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                                      cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
        if (error != hipSuccess) return error;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    config.numAttrs = count;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}
#endif

/* Starts `kernel` with `shared` bytes of AITER_SHARED_OF_LAUNCH. */
template <class... Parameters, class... Arguments>
int launch_with_shared(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared, void *stream,
                       const Arguments &...arguments) {
    if (blocks == 0) return 0;
    if (blocks > 0x7fffffff) return LAUNCH_GRID_TOO_LARGE;
    const dim3 grid(static_cast<unsigned>(blocks));
#if !defined(__HIP__)
    return launch_on_nvidia(nullptr, 0, kernel, grid, threads, shared, stream, arguments...);
#else
    return launch_on_amd<Parameters...>(kernel, grid, threads, shared, stream, arguments...);
#endif
}
/* The same with `shared` bytes of AITER_SHARED memory, which on AMD are part of the kernel. */
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared, void *stream,
           const Arguments &...arguments) {
#if defined(__HIP__)
    shared = 0;
#endif
    return launch_with_shared(kernel, blocks, threads, shared, stream, arguments...);
}

/* A kernel lets the one after it on the stream come up while it still runs, where that is launched with launch_next() and
 * the GPU can (NVIDIA, sm_90 on). Until wait_for_previous() that one may touch no memory that another kernel reads or
 * writes, and in each of its blocks some thread must wait there: who waits for a kernel has so waited for all before. */
__device__ __forceinline__ void let_next_start() {
#if !defined(__HIP__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if !defined(__HIP__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#if !defined(__HIP__)
inline cudaLaunchAttribute early_start() {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    return early;
}
/* In clusters of so many blocks. */
template <class... Parameters, class... Arguments>
int launch_next_in_clusters(int cluster, void (*kernel)(Parameters...), int64_t blocks, int threads, int shared,
                            void *stream, const Arguments &...arguments) {
    if (blocks == 0) return 0;
    if (blocks > 0x7fffffff) return LAUNCH_GRID_TOO_LARGE;
    cudaLaunchAttribute attributes[] = {early_start(), {}};
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = static_cast<unsigned>(cluster);
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    return launch_on_nvidia(attributes, 2, kernel, dim3(static_cast<unsigned>(blocks)), threads, shared, stream,
                            arguments...);
}
#endif
template <class... Parameters, class... Arguments>
int launch_next(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared, void *stream,
                const Arguments &...arguments) {
#if !defined(__HIP__)
    if (CUDA_ARCH >= 900) {
        if (blocks == 0) return 0;
        if (blocks > 0x7fffffff) return LAUNCH_GRID_TOO_LARGE;
        cudaLaunchAttribute early = early_start();
        return launch_on_nvidia(&early, 1, kernel, dim3(static_cast<unsigned>(blocks)), threads, shared, stream,
                                arguments...);
    }
#endif
    return launch(kernel, blocks, threads, shared, stream, arguments...);
}

} // namespace aiter

#endif
