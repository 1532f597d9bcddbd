"""The stand-in for the HIP runtime: libraries built by the real hipcc, launched on the emulator; and what it counts."""

import ctypes
import os
import shutil
import subprocess

import emulator
import numpy as np
import pytest

SOURCE = r"""
#include <hip/hip_runtime.h>
#include <stdint.h>
#define LANE __builtin_amdgcn_workitem_id_x()
typedef _Float16 half4 __attribute__((ext_vector_type(4)));
typedef float float16 __attribute__((ext_vector_type(16)));
#if defined(__HIP_DEVICE_COMPILE__)
__device__ static void barrier() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
#else
__device__ static void barrier() {}
#endif
__constant__ const float table[4] = {1.f, 10.f, 100.f, 1000.f};

// Reverses each block of threads through dynamic LDS; uses constants, 64-bit addresses, integer division, arguments of
// several sizes.
extern "C" __global__ void reverse(float *out, const float *in, int64_t count, short which, int divisor) {
  extern __shared__ float shared[];
  int64_t at = (int64_t)__builtin_amdgcn_workgroup_id_x() * __builtin_amdgcn_workgroup_size_x() + LANE;
  int size = __builtin_amdgcn_workgroup_size_x();
  shared[LANE] = at < count ? in[at] : 0.f;
  barrier();
  if (at < count) out[at] = shared[size - 1 - LANE] * table[which & 3] + (float)((int)at / divisor);
}

// Sums into one place, from all blocks at once.
extern "C" __global__ void total(uint32_t *sum) {
  __atomic_fetch_add(sum, LANE + 1000 * __builtin_amdgcn_workgroup_id_y(), __ATOMIC_RELAXED);
}

// A loop of matrix products whose operands come from LDS; stride: words between lanes, so that conflicts can be chosen.
extern "C" __global__ void loop(float *out, const half4 *in, int steps, int stride) {
  __shared__ uint32_t shared[64 * 32];
  for (int i = LANE; i < 64 * 32; i += 64) shared[i] = 0x3c003c00;
  barrier();
  float16 sum = {};
  for (int step = 0; step < steps; ++step) {
    half4 a = in[LANE + 64 * step];
    union { uint32_t words[2]; half4 value; } b;
    b.words[0] = b.words[1] = shared[(LANE + (step & 1)) * stride];
    sum = __builtin_amdgcn_mfma_f32_32x32x8f16(a, b.value, sum, 0, 0, 0);
  }
  for (int i = 0; i < 16; ++i) out[LANE * 16 + i] = sum[i];
}

// LDS and scratch through generic pointers: which one, only the address tells.
extern "C" __global__ void generic(float *out, int which) {
  __shared__ float shared[64];
  float mine[4] = {1.f, 2.f, 3.f, 4.f};
  shared[LANE] = 100.f + LANE;
  barrier();
  float *from = which & 1 ? &shared[63 - LANE] : &mine[which & 3];
  asm volatile("" : "+v"(from));
  *from += 0.5f;
  barrier();
  out[LANE] = which & 1 ? shared[LANE] : mine[which & 3];
}

extern "C" __global__ void leaves_the_buffer(float *out) { out[LANE + 1] = 1.f; }

#define LAUNCH(call) { call; return (int)hipGetLastError(); }
extern "C" int launch_reverse(float *out, const float *in, int64_t count, int which, int divisor, int block)
LAUNCH((reverse<<<dim3((count + block - 1) / block), dim3(block), block * 4, 0>>>(out, in, count, which, divisor)))
extern "C" int launch_total(uint32_t *sum) LAUNCH((total<<<dim3(3, 2), dim3(128), 0, 0>>>(sum)))
extern "C" int launch_loop(float *out, const void *in, int steps, int stride)
LAUNCH((loop<<<dim3(1), dim3(64), 0, 0>>>(out, (const half4 *)in, steps, stride)))
extern "C" int launch_generic(float *out, int which) LAUNCH((generic<<<dim3(1), dim3(64), 0, 0>>>(out, which)))
extern "C" int launch_outside(float *out) LAUNCH((leaves_the_buffer<<<dim3(2), dim3(64), 0, 0>>>(out)))
extern "C" const char *text(int code) { return hipGetErrorString((hipError_t)code); }
extern "C" int processors() {
  int count = 0;
  (void)hipDeviceGetAttribute(&count, hipDeviceAttributeMultiprocessorCount, 0);
  return count;
}
"""


@pytest.fixture(scope="module", params=emulator.ARCHS)
def library(request, tmp_path_factory):
    """(arch, path) of the source above, built for each arch that the hipcc at hand knows."""
    hipcc = os.environ.get("AITER_HIPCC") or shutil.which("hipcc")
    if not hipcc:
        pytest.skip("no hipcc (AITER_HIPCC, PATH)")
    folder = tmp_path_factory.mktemp(request.param)
    source, library = folder / "kernels.hip", folder / "kernels.so"
    source.write_text(SOURCE)
    options = ["-O3", "-std=c++17", "-fPIC", "-shared", "-nogpulib", "-no-hip-rt"]
    command = [hipcc, "-x", "hip", f"--offload-arch={request.param}", *options, str(source), "-o", str(library)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"{hipcc} cannot build for {request.param}: {result.stderr[-300:]}")
    return request.param, library


def load(path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.text.restype = ctypes.c_char_p
    return loaded


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


@pytest.mark.parametrize("threads", [1, 2])
def test_launch_with_arguments_constants_and_dynamic_lds(library, threads):
    arch, path = library
    data = np.random.default_rng(3).normal(size=1000).astype(np.float32)
    out = np.zeros(1000, np.float32)
    with emulator.session(arch, threads=threads) as gpu:
        loaded = load(path)
        gpu.allow(data.ctypes.data, data.nbytes)
        gpu.allow(out.ctypes.data, out.nbytes, writable=True)
        assert loaded.launch_reverse(pointer(out), pointer(data), ctypes.c_int64(1000), 2, 7, 192) == 0, gpu.report()
        stats = gpu.stats()["reverse"]
        assert loaded.processors() == {"gfx90a": 104, "gfx942": 304, "gfx950": 256}[arch]
    padded = np.zeros(1152, np.float32)
    padded[:1000] = data
    reversed_blocks = padded.reshape(-1, 192)[:, ::-1].reshape(-1)[:1000]
    np.testing.assert_allclose(out, reversed_blocks * 100 + np.arange(1000) // 7, rtol=1e-6, atol=1e-5)
    assert (stats["workgroups"], stats["waves"], stats["lds_bytes"]) == (6, 18, 768)
    assert stats["scratch_bytes"] == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_atomics_of_all_workgroups(library, threads):
    arch, path = library
    total = np.zeros(1, np.uint32)
    with emulator.session(arch, threads=threads) as gpu:
        gpu.allow(total.ctypes.data, 4, writable=True)
        assert load(path).launch_total(pointer(total)) == 0, gpu.report()
    assert total[0] == 6 * 127 * 128 // 2 + 3 * 128 * 1000


@pytest.mark.parametrize("which", [1, 2])
def test_generic_pointers(library, which):
    arch, path = library
    out = np.zeros(64, np.float32)
    with emulator.session(arch) as gpu:
        gpu.allow(out.ctypes.data, out.nbytes, writable=True)
        assert load(path).launch_generic(pointer(out), which) == 0, gpu.report()
    np.testing.assert_array_equal(out, 100.5 + np.arange(64) if which == 1 else np.full(64, 3.5))


def test_a_fault_is_an_error_code_and_the_next_launch_works(library):
    arch, path = library
    out = np.zeros(128, np.float32)
    with emulator.session(arch) as gpu:
        loaded = load(path)
        gpu.allow(out.ctypes.data, 64 * 4, writable=True)
        code = loaded.launch_outside(pointer(out))
        assert code != 0
        assert "outside the buffers" in loaded.text(code).decode() and "lane 63" in gpu.report()
        gpu.allow(out.ctypes.data, out.nbytes, writable=True)
        assert loaded.launch_outside(pointer(out)) == 0
        assert out[0] == 0 and out[1] == 1 and out[64] == 1


def test_counts_of_the_main_loop(library):
    """An iteration has one matrix product, one load of 8 bytes a lane and one LDS read; the stride makes conflicts."""
    arch, path = library
    steps = 12
    memory = np.ones(steps * 256 + 64, np.float16)
    first = -memory.ctypes.data % 128 // 2  # on a boundary of cache lines
    data = memory[first : first + steps * 256]
    out = np.zeros((64, 16), np.float32)
    banks = 64 if arch == "gfx950" else 32
    for stride, ways in ((1, 1), (2, 2), (16, 16)):
        with emulator.session(arch) as gpu:
            gpu.allow(data.ctypes.data, data.nbytes)
            gpu.allow(out.ctypes.data, out.nbytes, writable=True)
            assert load(path).launch_loop(pointer(out), pointer(data), steps, stride) == 0, gpu.report()
            stats = gpu.stats()["loop"]
        assert np.all(out == 8 * steps)
        total = stats["total"]
        products = sum(count for name, count in total["instructions"].items() if "mfma" in name)
        assert products == steps and total["cycles"]["matrix"] == steps * (64 if arch == "gfx90a" else 32)
        loop = stats["main_loop"]
        per_step = sum(count for name, count in loop["instructions"].items() if "mfma" in name)
        assert loop["cycles"]["matrix"] == per_step * (64 if arch == "gfx90a" else 32)
        assert loop["narrowest_load"] == 8
        assert loop["lines"] == loop["lines_least"] == per_step * 4  # 64 lanes of 8 bytes: 4 lines of 128
        phases = 64 // banks  # a phase serves as many lanes as there are banks; 16 words apart, 2 or 4 banks serve all
        assert loop["cycles"]["lds"] == per_step * phases * ways, (stride, loop["cycles"])
        assert loop["lds_conflicts"] == pytest.approx(1 - 1 / ways)
        assert stats["waves_per_simd"] >= 1
