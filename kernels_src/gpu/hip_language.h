/* What the kernels use of HIP's language and of its runtime, in place of <hip/hip_runtime.h>: that header and those which
 * it and the compiler bring along take longer to read than most kernels take to compile, twice, for the device's half of
 * the compilation and for the host's. Builds say -nogpuinc, so clang adds none of its own.
 *
 * The runtime's functions are part of its binary interface, the same from ROCm 5.0 to 7; hip_runtime_api.h is where they
 * are from, and tests/kernels/test_hip_language.py holds this header against it where that is installed. */
#ifndef AITER_GPU_HIP_LANGUAGE_H
#define AITER_GPU_HIP_LANGUAGE_H

#include <stddef.h>
#include <stdint.h>

/* ---- the language ---- */

#define __host__ __attribute__((host))
#define __device__ __attribute__((device))
#define __global__ __attribute__((global))
#define __shared__ __attribute__((shared))
#define __forceinline__ inline __attribute__((always_inline))
/* Threads of a block; waves that each SIMD should have room for. */
#define __launch_bounds__(threads, ...)                                                                                \
    __attribute__((amdgpu_flat_work_group_size(1, threads) __VA_OPT__(, amdgpu_waves_per_eu(__VA_ARGS__))))

typedef float float2 __attribute__((ext_vector_type(2)));
typedef float float4 __attribute__((ext_vector_type(4)));
__device__ __forceinline__ float2 make_float2(float x, float y) { return {x, y}; }
__device__ __forceinline__ float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
typedef uint32_t uint2 __attribute__((ext_vector_type(2)));
typedef uint32_t uint4 __attribute__((ext_vector_type(4)));

__device__ __forceinline__ uint32_t atomicAdd(uint32_t *address, uint32_t value) {
    return __hip_atomic_fetch_add(address, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}

/* ---- the runtime ---- */

struct dim3 {
    uint32_t x, y, z;
    __host__ __device__ constexpr dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
};
enum hipError_t : int { hipSuccess = 0 };
enum hipDeviceAttribute_t : int { hipDeviceAttributeMultiprocessorCount = 63 };
typedef struct ihipStream_t *hipStream_t;

extern "C" {
const char *hipGetErrorString(hipError_t error);
hipError_t hipGetLastError(void);
hipError_t hipGetDevice(int *device);
hipError_t hipGetDeviceCount(int *count);
hipError_t hipDeviceGetAttribute(int *value, hipDeviceAttribute_t attribute, int device);
hipError_t hipLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                           hipStream_t stream);
/* clang calls this one in what stands for a kernel on the host. */
hipError_t __hipPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, hipStream_t *stream);
}

#endif
