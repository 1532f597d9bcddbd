"""A kernel that builds in 0.1 s, for tests of everything around kernels."""

import shutil
import time
from pathlib import Path

from aiter.jit import arch, sources
from aiter.jit.spec import Spec

TINY = """
#include "aiter_abi.h"
#include "answer.h"
void aiter_describe(aiter_description *d) { *d = {AITER_ABI_VERSION, sizeof(aiter_call)}; }
int64_t aiter_workspace_bytes(const aiter_call *call) { return ANSWER * AITER_HEAD_DIM + call->problem.batch; }
int aiter_launch(const aiter_call *call, void *) { return call->problem.batch; }
const char *aiter_error_text(int code) { return code == 7 ? "seven" : "not seven"; }
"""


def make_tree(root: Path) -> Path:
    """A folder of kernel sources that has the kernel `tiny`."""
    (root / "cpu").mkdir(parents=True)
    (root / "include").mkdir()
    shutil.copy(sources.find_root() / "include" / "aiter_abi.h", root / "include")
    (root / "include" / "answer.h").write_text("#define ANSWER 1\n")
    (root / "cpu" / "tiny.cpp").write_text(TINY)
    return root


def tiny_spec(head_dim: int = 64) -> Spec:
    return Spec("tiny", "fp32", head_dim, False, arch.cpu_arch())


def left_behind(folder: Path) -> list[str]:
    """What is in a cache folder besides entries, and should not be."""
    return sorted(
        str(path.relative_to(folder)) for name in (".building", ".locks") for path in (folder / name).glob("*")
    )


def ends(group: int) -> bool:
    """Whether all processes of a group that was killed are gone, soon; those are that wait for nothing but a parent."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not any(_in_group(stat, group) for stat in Path("/proc").glob("[0-9]*/stat")):
            return True
        time.sleep(0.01)
    return False


def _in_group(stat: Path, group: int) -> bool:
    try:
        state, _, process_group, *_ = stat.read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return False  # gone meanwhile
    return int(process_group) == group and state not in "ZX"
