"""CPU calls from wherever programs make them: forked children, many threads, other thread pools, parallel regions."""

import ctypes
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import aiter

PATIENCE = 60  # seconds; a pool that is waited for in vain is waited for for ever


class Calls(Dataset):
    """Calls of several layouts, each large enough for several threads, and what they return in the main thread."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(shape, generator=generator)

        self.arguments = [
            (randn(1, 300, 4, 64), randn(1, 300, 4, 64), randn(1, 300, 4, 64)),
            (randn(2, 1, 4, 64), randn(2, 2000, 4, 64), randn(2, 2000, 4, 64)),
            (randn(1, 100, 8, 64), randn(1, 700, 2, 64), randn(1, 700, 2, 64)),
        ]
        self.expected = [self[index] for index in range(len(self))]

    def __len__(self):
        return len(self.arguments)

    def __getitem__(self, index):
        return aiter.flash_attn_func(*self.arguments[index])

    def agree(self):
        """Compared without PyTorch, whose own operators hang in a forked child once they have used several threads."""
        return all((self[index].numpy() == self.expected[index].numpy()).all() for index in range(len(self)))


@pytest.fixture
def calls():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield Calls()
    torch.set_num_threads(threads)


def test_forked_child(calls):
    child = os.fork()
    if child == 0:
        os._exit(0 if calls.agree() else 1)
    end = time.monotonic() + PATIENCE
    while (status := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        time.sleep(0.01)
    if status == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert status == (child, 0)
    assert calls.agree()


def test_data_loader_workers(calls):
    loader = DataLoader(calls, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=PATIENCE)
    assert all(got.equal(expected) for got, expected in zip(loader, calls.expected, strict=True))


def test_thread_pool(calls):
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: calls.agree(), range(20)))


def test_inside_a_parallel_region(calls):
    """Every thread of a region of PyTorch's own OpenMP runtime makes calls: theirs are regions inside it."""
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if parallel is None:
        pytest.skip("PyTorch's OpenMP runtime is not libgomp")
    agreed = []
    body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: agreed.append(calls.agree()))
    parallel(body, None, 3, 0)
    assert agreed and all(agreed)
