"""What this process may use of the machine: a container sees all CPUs and all memory, and may be allowed a part."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

# Measured: g++ 12, nvcc 13 and hipcc (clang 19) take up to 210 MB for the largest of our kernels; the rest is headroom.
COMPILER_BYTES = 300 << 20

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


def compilers_at_once() -> int:
    """How many compilers may run side by side: one per CPU, as far as memory goes, and one in any case."""
    return max(1, min(cpus(), memory_bytes() // COMPILER_BYTES))


def cpus() -> int:
    """CPUs that this process may use: those it is bound to, and no more than its container's quota."""
    allowed = float(len(os.sched_getaffinity(0)))
    for group in _groups("cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (group / "cpu.max").read_text().split()  # "max 100000" where there is none
            allowed = min(allowed, float(quota) / float(period))
        with contextlib.suppress(OSError, ValueError):
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:
                allowed = min(allowed, int(quota) / int(period))
    return max(1, math.ceil(allowed))


def memory_bytes() -> int:
    """Memory that this process and its children may still take: what the machine has left, and no more than the limit
    of its container leaves."""
    left = _meminfo("MemAvailable")
    for group in _groups("memory"):
        for limit, used in (("memory.max", "anon"), ("memory.limit_in_bytes", "total_rss")):
            with contextlib.suppress(OSError, ValueError):
                # Files that the kernel keeps in memory count as used, too, and make room when it is needed.
                left = min(left, int((group / limit).read_text()) - _field(group / "memory.stat", used))
    return max(0, left)


def _groups(controller: str) -> Iterator[Path]:
    """The folders of the control groups that this process is in, of version 1 and 2, each with those above it."""
    with contextlib.suppress(OSError):
        for line in (_PROC / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            for root in (_CGROUPS / controllers, _CGROUPS / controller) if controllers else (_CGROUPS,):
                # Without a namespace of its own, a container is told a path of the host; its group is then the root.
                inside = root / os.path.normpath("/" + path).lstrip("/")
                for group in (inside, *inside.parents):
                    yield group
                    if group == root:
                        break


def _meminfo(name: str) -> int:
    try:
        return _field(_PROC / "meminfo", f"{name}:") * 1024
    except (OSError, ValueError):
        return 1 << 62  # not told, so not a limit


def _field(path: Path, name: str) -> int:
    """The number after `name` in a file of names and numbers."""
    for line in path.read_text().splitlines():
        if line.split()[:1] == [name]:
            return int(line.split()[1])
    raise ValueError(f"no {name} in {path}")
