/* What kernels need of CUDA's runtime, upon the driver alone: the functions that gpu/runtime.h calls, and those that
 * nvcc's code calls when a library is loaded. A library of kernels linked with the runtime would carry a whole copy of
 * it, ten times as large as the kernels; bound to PyTorch's, it would be good for one version of CUDA.
 *
 *     loading      __cudaRegisterFatBinary, __cudaRegisterFunction    notes the code and the names of its kernels
 *     a launch     cudaLaunchKernelExC    the context's functions: at its first launch the code is brought there
 *
 * As with the runtime, a thread that has no context yet gets the primary one of the first GPU. The functions of nvcc's
 * are those of CUDA's crt/host_runtime.h, and the code's wrapper that of its fatbinary_section.h. */
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <fatbinary_section.h>
#include <pthread.h>

#include <atomic>

namespace {

/* ---- the driver ---- */

void *driver_function(const char *name) {
    static void *const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    return library == nullptr ? nullptr : dlsym(library, name);
}

struct Driver {
#define AITER_DRIVER(name) decltype(&::name) name = reinterpret_cast<decltype(&::name)>(driver_function(#name))
    AITER_DRIVER(cuInit);
    AITER_DRIVER(cuCtxGetCurrent);
    AITER_DRIVER(cuCtxSetCurrent);
    AITER_DRIVER(cuCtxGetDevice);
    AITER_DRIVER(cuDevicePrimaryCtxRetain);
    AITER_DRIVER(cuDeviceGetCount);
    AITER_DRIVER(cuDeviceGetAttribute);
    AITER_DRIVER(cuModuleLoadData);
    AITER_DRIVER(cuModuleGetFunction);
    AITER_DRIVER(cuFuncSetAttribute);
    AITER_DRIVER(cuLaunchKernel);
    AITER_DRIVER(cuLaunchKernelEx); /* from CUDA 11.8 */
    AITER_DRIVER(cuGetErrorString);
    AITER_DRIVER(cuThreadExchangeStreamCaptureMode);
#undef AITER_DRIVER
    CUresult state = cuInit == nullptr ? CUDA_ERROR_SHARED_OBJECT_INIT_FAILED : cuInit(0);
};

const Driver &driver() {
    static const Driver functions;
    return functions;
}

cudaError_t as_error(CUresult result) { return static_cast<cudaError_t>(result); } /* they share their numbers */

/* ---- what nvcc's code has told of this library ---- */

constexpr int MOST_KERNELS = 32;
struct Registered {
    const void *kernel; /* as the host's code names it */
    const char *name;   /* as the code for the GPU does */
};
const void *code = nullptr;
Registered registered[MOST_KERNELS];
int kernels = 0;

int index_of(const void *kernel) {
    for (int i = 0; i < kernels; ++i)
        if (registered[i].kernel == kernel) return i;
    return -1;
}

/* ---- the same in each context ---- */

struct Loaded {
    CUcontext context;
    CUfunction functions[MOST_KERNELS];
    std::atomic<int> shared[MOST_KERNELS]; /* bytes that a launch may ask for, as far as they were allowed here */
    Loaded *next;
};
std::atomic<Loaded *> loaded{nullptr}; /* contexts that have the code; there is one for each GPU */
pthread_mutex_t loading = PTHREAD_MUTEX_INITIALIZER;
struct Alone { /* in loading; <mutex> would take longer to read than all of this file */
    Alone() { pthread_mutex_lock(&loading); }
    ~Alone() { pthread_mutex_unlock(&loading); }
};

Loaded *find(CUcontext context) {
    Loaded *entry = loaded.load(std::memory_order_acquire);
    while (entry != nullptr && entry->context != context) entry = entry->next;
    return entry;
}

CUresult current_context(CUcontext &context) {
    const Driver &d = driver();
    if (d.state != CUDA_SUCCESS) return d.state;
    if (const CUresult error = d.cuCtxGetCurrent(&context)) return error;
    if (context != nullptr) return CUDA_SUCCESS;
    if (const CUresult error = d.cuDevicePrimaryCtxRetain(&context, 0)) return error;
    return d.cuCtxSetCurrent(context);
}

CUresult load(Loaded &entry) {
    const Driver &d = driver();
    CUmodule module;
    if (const CUresult error = d.cuModuleLoadData(&module, code)) return error;
    for (int i = 0; i < kernels; ++i)
        if (const CUresult error = d.cuModuleGetFunction(&entry.functions[i], module, registered[i].name)) return error;
    return CUDA_SUCCESS;
}

/* This library's code in the current context, brought there if need be, which may happen while a graph is captured. */
CUresult here(Loaded *&result) {
    CUcontext context = nullptr;
    if (const CUresult error = current_context(context)) return error;
    result = find(context);
    if (result != nullptr) return CUDA_SUCCESS;
    const Alone alone;
    result = find(context);
    if (result != nullptr) return CUDA_SUCCESS;
    Loaded *entry = new Loaded{};
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    driver().cuThreadExchangeStreamCaptureMode(&mode);
    const CUresult error = load(*entry);
    driver().cuThreadExchangeStreamCaptureMode(&mode);
    if (error != CUDA_SUCCESS) {
        delete entry;
        return error;
    }
    entry->context = context;
    entry->next = loaded.load(std::memory_order_relaxed);
    loaded.store(entry, std::memory_order_release);
    result = entry;
    return CUDA_SUCCESS;
}

} // namespace

/* ---- what runtime.h calls ---- */

extern "C" void *aiter_driver_function(const char *name) { return driver_function(name); }

cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value) {
    const int index = index_of(kernel);
    if (index < 0 || attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
    Loaded *entry = nullptr;
    if (const CUresult error = here(entry)) return as_error(error);
    if (entry->shared[index].load(std::memory_order_relaxed) >= value) return cudaSuccess;
    const CUresult error =
        driver().cuFuncSetAttribute(entry->functions[index], CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, value);
    if (error == CUDA_SUCCESS) entry->shared[index].store(value, std::memory_order_relaxed);
    return as_error(error);
}

constexpr unsigned MOST_ATTRIBUTES = 2; /* that the kernel may come up while the one before it ends; clusters' size */

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **arguments) {
    const int index = index_of(kernel);
    if (index < 0) return cudaErrorInvalidDeviceFunction;
    Loaded *entry = nullptr;
    if (const CUresult error = here(entry)) return as_error(error);
    const CUfunction function = entry->functions[index];
    const dim3 grid = config->gridDim, block = config->blockDim;
    const auto shared = static_cast<unsigned>(config->dynamicSmemBytes);
    if (config->numAttrs == 0)
        return as_error(driver().cuLaunchKernel(function, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared,
                                                config->stream, arguments, nullptr));
    CUlaunchAttribute attributes[MOST_ATTRIBUTES] = {};
    if (config->numAttrs > MOST_ATTRIBUTES || driver().cuLaunchKernelEx == nullptr) return cudaErrorNotSupported;
    for (unsigned i = 0; i < config->numAttrs; ++i) {
        const auto &value = config->attrs[i].val;
        if (config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization) {
            attributes[i].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[i].value.programmaticStreamSerializationAllowed = value.programmaticStreamSerializationAllowed;
        } else if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
            attributes[i].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            attributes[i].value.clusterDim.x = value.clusterDim.x;
            attributes[i].value.clusterDim.y = value.clusterDim.y;
            attributes[i].value.clusterDim.z = value.clusterDim.z;
        } else {
            return cudaErrorNotSupported;
        }
    }
    CUlaunchConfig own = {};
    own.gridDimX = grid.x, own.gridDimY = grid.y, own.gridDimZ = grid.z;
    own.blockDimX = block.x, own.blockDimY = block.y, own.blockDimZ = block.z;
    own.sharedMemBytes = shared;
    own.hStream = config->stream;
    own.attrs = attributes;
    own.numAttrs = config->numAttrs;
    return as_error(driver().cuLaunchKernelEx(&own, function, arguments, nullptr));
}

cudaError_t cudaGetDevice(int *device) {
    CUcontext context = nullptr;
    if (const CUresult error = current_context(context)) return as_error(error);
    CUdevice found = 0;
    const CUresult error = driver().cuCtxGetDevice(&found);
    *device = found;
    return as_error(error);
}
cudaError_t cudaGetDeviceCount(int *count) {
    const Driver &d = driver();
    return as_error(d.state != CUDA_SUCCESS ? d.state : d.cuDeviceGetCount(count));
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    const Driver &d = driver();
    if (d.state != CUDA_SUCCESS) return as_error(d.state);
    return as_error(d.cuDeviceGetAttribute(value, static_cast<CUdevice_attribute>(attribute), device));
}
const char *cudaGetErrorString(cudaError_t error) {
    const char *text = nullptr;
    if (driver().cuGetErrorString == nullptr) return "NVIDIA's driver, libcuda.so.1, cannot be loaded";
    driver().cuGetErrorString(static_cast<CUresult>(error), &text);
    return text == nullptr ? "unknown error" : text;
}

/* ---- what nvcc's code calls ---- */

extern "C" {

void **__cudaRegisterFatBinary(void *wrapper) {
    code = static_cast<const __fatBinC_Wrapper_t *>(wrapper)->data;
    return &const_cast<void *&>(code);
}
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {} /* at the end of the process: the driver cleans up */
void __cudaRegisterFunction(void **, const char *kernel, char *, const char *name, int, uint3 *, uint3 *, dim3 *,
                            dim3 *, int *) {
    if (kernels < MOST_KERNELS) registered[kernels++] = {kernel, name};
}

/* A kernel called by its name, with <<< >>>, which runtime.h does not: these are referred to, and never called. */
cudaError_t __cudaGetKernel(void **, const void *) { return cudaErrorNotSupported; }
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void *) { return cudaErrorNotSupported; }
cudaError_t __cudaPopCallConfiguration(dim3 *, dim3 *, size_t *, void *) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(void *, dim3, dim3, void **, size_t, cudaStream_t) { return cudaErrorNotSupported; }

} // extern "C"

cudaError_t cudaLaunchKernel(const void *, dim3, dim3, void **, size_t, cudaStream_t) { return cudaErrorNotSupported; }
