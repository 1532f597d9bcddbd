"""Where kernels run: on PyTorch's own CPU threads, or on its current GPU stream."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable

import torch

from aiter import abi, jit

_get_num_threads = torch.get_num_threads

# A workspace up to this size is not worth an allocation where launches return when all is done.
SCRATCH_BYTES = 1 << 16
WORKSPACE_ALIGNMENT = 256


class CpuQueue:
    """Where CPU kernels run: PyTorch's own thread pool, so that no second pool fights it for the cores."""

    def __init__(self) -> None:
        # PyTorch loads its OpenMP runtime with global symbols; where that is not libgomp, kernels start own threads.
        function = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
        self.parallel = None if function is None else ctypes.cast(function, ctypes.c_void_p).value
        self.thread = threading.local()
        self.executors: dict[int, tuple[abi.CpuExecutor, int]] = {}
        # A forked child inherits the pool's data but not its threads: using it there would wait for ever.
        os.register_at_fork(after_in_child=self.leave_pool)

    def scratch(self) -> int:
        """The address of SCRATCH_BYTES that are this thread's, for as long as a launch takes."""
        try:
            return self.thread.address
        except AttributeError:
            self.thread.memory = ctypes.create_string_buffer(SCRATCH_BYTES + WORKSPACE_ALIGNMENT)
            first = ctypes.addressof(self.thread.memory)
            self.thread.address = first + -first % WORKSPACE_ALIGNMENT
            return self.thread.address

    def leave_pool(self) -> None:
        self.parallel = None
        self.executors = {}

    def executor(self) -> int:
        """The address of an executor with as many threads as PyTorch uses now."""
        num_threads = _get_num_threads()
        entry = self.executors.get(num_threads)
        if entry is None:
            struct = abi.CpuExecutor(self.parallel, num_threads, 0)
            entry = self.executors[num_threads] = (struct, ctypes.addressof(struct))
        return entry[1]


cpu_queue = CpuQueue()


def launcher(kernel: jit.Kernel, device: torch.device) -> Callable[[bytes], int]:
    """A function of a packed call that launches where PyTorch would: on its CPU threads, or on the current stream of
    the tensors' GPU. Returns 0 or, for values that a CPU kernel refuses, BAD_VALUES; raises LaunchError."""
    launch_raw, check = kernel.launch_raw, kernel.check
    # PyTorch's public function asks first whether CUDA is initialised: it is, as there are tensors.
    current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)

    def on_cpu(call: bytes) -> int:
        code = launch_raw(call, cpu_queue.executor())
        if code and code != abi.BAD_VALUES:
            check(code)
        return code

    def on_gpu(call: bytes) -> int:
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        if device.index == current_device():
            code = launch_raw(call, stream)
        else:
            with torch.cuda.device(device.index):
                code = launch_raw(call, stream)
        if code:
            check(code)
        return 0

    return on_cpu if device.type == "cpu" else on_gpu
