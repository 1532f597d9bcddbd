"""Processes of a gloo group that stay alive between tests: to start one takes longer than most tests.

They are killed in the end. A process that ends by itself while a DeviceMesh is still there may abort: PyTorch 2.13's
gloo threads live as long as their groups, which the mesh holds, and one that drops the last tensor of a collective
while Python shuts down is ended in the middle of a destructor.

ranks.run(4, cases.gradients, ...)    the function on each of 4 ranks, with a group of them; its results, by rank
"""

import atexit
import importlib.util
import multiprocessing
import os
import shutil
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

# Of a collective, and of a task, which may wait for two: what hangs ends, and is reported.
COLLECTIVE_S, TASK_S = 40, 120


def _rank(rank, world, store, pipe):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=COLLECTIVE_S),
    )
    while True:
        function, arguments, keywords = pipe.recv()
        torch.manual_seed(20)
        try:
            pipe.send((True, function(*arguments, **keywords)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class Ranks:
    def __init__(self, world):
        context = multiprocessing.get_context("forkserver")
        preload = ["torch", "torch.distributed", "aiter.distributed"]
        if importlib.util.find_spec("transformers"):
            preload += ["aiter.transformers", "transformers.models.auto.modeling_auto"]
        context.set_forkserver_preload(preload)
        self.folder = tempfile.mkdtemp(prefix="aiter-ranks-")
        self.pipes, self.processes = [], []
        for rank in range(world):
            own, theirs = context.Pipe()
            process = context.Process(
                target=_rank, args=(rank, world, os.path.join(self.folder, "store"), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(own)
            self.processes.append(process)

    def run(self, function, *arguments, **keywords):
        for pipe in self.pipes:
            pipe.send((function, arguments, keywords))
        results, errors = [], []
        for rank, pipe in enumerate(self.pipes):
            try:
                done, result = pipe.recv() if pipe.poll(TASK_S) else (False, f"no answer in {TASK_S} s")
            except EOFError:
                done, result = False, "the process ended"
            results.append(result)
            if not done:
                errors.append(f"rank {rank}: {result}")
        if errors:
            self.end()
            raise AssertionError("\n".join(errors))
        return results

    def end(self):
        for process in self.processes:
            process.kill()
            process.join()
        shutil.rmtree(self.folder, ignore_errors=True)
        if _alive.get(len(self.processes)) is self:
            del _alive[len(self.processes)]


_alive = {}


def run(world, function, *arguments, **keywords):
    """The function's results on each of `world` ranks, in order; AssertionError with the tracebacks of those that
    raised."""
    if world not in _alive:
        _alive[world] = Ranks(world)
    return _alive[world].run(function, *arguments, **keywords)


@atexit.register
def _end():
    for ranks in list(_alive.values()):
        ranks.end()
