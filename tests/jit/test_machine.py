"""What a container may use, from stand-ins for the files in which Linux says so."""

import os

import pytest

from aiter.jit import machine

GB = 1 << 30


@pytest.fixture
def computer(tmp_path, monkeypatch):
    """computer(cpus, gigabytes, cgroup, files) is a machine with these control groups."""

    def make(cpus: int, gigabytes: float, cgroup: str = "0::/\n", files: dict[str, str] = {}) -> None:  # noqa: B006
        monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
        monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cpus)))
        (tmp_path / "proc" / "self").mkdir(parents=True)
        (tmp_path / "proc" / "self" / "cgroup").write_text(cgroup)
        (tmp_path / "proc" / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {int(gigabytes * GB) >> 10} kB\n")
        for name, content in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    return make


def test_a_machine_without_limits(computer):
    computer(16, 64)
    assert (machine.cpus(), machine.memory_bytes(), machine.compilers_at_once()) == (16, 64 * GB, 16)


CONTAINERS = {
    "version 2": ("0::/\n", {"cpu.max": "250000 100000\n", "memory.max": f"{2 * GB}\n", "memory.stat": f"anon {GB}\n"}),
    "version 2, a limit above": (
        "0::/pod/app\n",
        {
            "pod/cpu.max": "250000 100000\n",
            "pod/memory.max": f"{2 * GB}\n",
            "pod/memory.stat": f"anon {GB}\n",
            "pod/app/cpu.max": "max 100000\n",
            "pod/app/memory.max": "max\n",
        },
    ),
    "version 1": (
        "4:memory:/docker/app\n3:cpu,cpuacct:/docker/app\n",
        {
            "cpu,cpuacct/docker/app/cpu.cfs_quota_us": "250000\n",
            "cpu,cpuacct/docker/app/cpu.cfs_period_us": "100000\n",
            "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "memory/docker/app/memory.limit_in_bytes": f"{2 * GB}\n",
            "memory/docker/app/memory.stat": f"cache 77\ntotal_rss {GB}\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/memory.stat": "total_rss 0\n",
        },
    ),
    "version 1, paths of the host": (
        "4:memory:/docker/0123\n3:cpu:/docker/0123\n",
        {
            "cpu/cpu.cfs_quota_us": "250000\n",
            "cpu/cpu.cfs_period_us": "100000\n",
            "memory/memory.limit_in_bytes": f"{2 * GB}\n",
            "memory/memory.stat": f"total_rss {GB}\n",
        },
    ),
}


@pytest.mark.parametrize("cgroup, files", CONTAINERS.values(), ids=CONTAINERS)
def test_a_container_with_a_part_of_the_machine(cgroup, files, computer):
    computer(16, 64, cgroup, files)
    assert machine.cpus() == 3, "two and a half"
    assert machine.memory_bytes() == GB, "what is left of two gigabytes"
    assert machine.compilers_at_once() == 3


def test_one_compiler_runs_in_any_case(computer):
    computer(16, 0.01, files={"cpu.max": "1000 100000\n", "memory.max": "nonsense\n"})
    assert machine.compilers_at_once() == 1


def test_this_machine(monkeypatch):
    assert 1 <= machine.compilers_at_once() <= machine.cpus() <= len(os.sched_getaffinity(0))
    assert 0 < machine.memory_bytes() < 1 << 50
