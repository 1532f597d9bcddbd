"""Where kernels run: on PyTorch's own CPU threads, or on its current GPU stream."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

import torch

from aiter import abi, jit

_get_num_threads = torch.get_num_threads


class CpuQueue:
    """Where CPU kernels run: PyTorch's own thread pool, so that no second pool fights it for the cores."""

    def __init__(self) -> None:
        # PyTorch loads its OpenMP runtime with global symbols; where that is not libgomp, kernels start own threads.
        self.parallel = ctypes.cast(getattr(ctypes.CDLL(None), "GOMP_parallel", None), ctypes.c_void_p).value
        self.executors: dict[int, tuple[abi.CpuExecutor, int]] = {}
        # A forked child inherits the pool's data but not its threads: using it there would wait for ever.
        os.register_at_fork(after_in_child=self.leave_pool)

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


def launcher(kernel: jit.Kernel, device: torch.device) -> Callable[[bytes], None]:
    """A function of a packed call that launches where PyTorch would: on its CPU threads, or on the current stream of
    the tensors' GPU."""
    launch_raw, check = kernel.launch_raw, kernel.check

    def on_cpu(call: bytes) -> None:
        code = launch_raw(call, cpu_queue.executor())
        if code:
            check(code)

    def on_gpu(call: bytes) -> None:
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        if device.index == torch.cuda.current_device():
            code = launch_raw(call, stream)
        else:
            with torch.cuda.device(device.index):
                code = launch_raw(call, stream)
        if code:
            check(code)

    return on_cpu if device.type == "cpu" else on_gpu
