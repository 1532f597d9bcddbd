"""The Dockerfile of docs/deployment.md, acted out.

Kernels are built in one stage; in the other they are used by another user, read-only, with no compiler on PATH and no
home folder, and nothing is written.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aiter.jit.settings import VARIABLES

HIPCC = os.environ.get("AITER_HIPCC")
ROOT = Path(__file__).resolve().parents[2]

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"), reason="becoming another user takes root and setpriv"
)

CPU_CALL = """
import torch, aiter
q, k, v = (torch.randn(2, 40, 4, 64) for _ in range(3))
expected = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
error = (aiter.flash_attn_func(q, k, v, causal=True) - expected.transpose(1, 2)).abs().max()
assert error < 1e-5, error
print("right")
"""

# Loads the gfx942 kernels that calls of one kind can need, behind a HIP runtime whose functions do nothing.
GPU_LOAD = """
import ctypes, sys
from aiter.kernels import specs_for
from aiter.jit import get_kernel
ctypes.CDLL(sys.argv[1])
specs = specs_for("flash_attn_func", "fp16", 64, True, "gfx942")
for spec in specs:
    get_kernel(spec)
print(len(specs), "loaded")
"""


def test_the_page_lists_every_setting_in_the_packages_words():
    page = (ROOT / "docs" / "deployment.md").read_text()
    for name, meaning in VARIABLES.items():
        assert f"| `{name}` | {meaning} |" in page


def build_stage(folder: Path, options: str) -> None:
    command = [sys.executable, "-m", "aiter.cli", "prewarm", "--cache-dir", str(folder), *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def runtime_stage(folder: Path, script: str, *arguments: str) -> str:
    """Runs a Python script as nobody. The one capability only lets it read where the interpreter is installed."""
    before = _files(folder)
    user = ("--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs")
    capability = [f"--{kind}=+dac_read_search" for kind in ("inh-caps", "ambient-caps")]
    command = [shutil.which("setpriv"), *user, *capability, "--bounding-set=-all,+dac_read_search"]
    environment = {"PATH": "/nowhere", "HOME": "/nonexistent", "TMPDIR": "/nonexistent", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, sys.executable, "-c", script, *arguments],
        env={**environment, "AITER_PREBUILT_DIRS": str(folder)},
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    assert "aiter" not in done.stderr  # no warning, no line about a compilation
    assert _files(folder) == before
    return done.stdout


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.fixture
def image(tmp_path):
    """A folder that becomes read-only, as an image's layers are, once image.seal() is called."""

    class Image:
        folder = tmp_path / "image"

        sealed = False

        def seal(self):
            subprocess.run(["mount", "--bind", self.folder, self.folder], check=True)
            self.sealed = True
            subprocess.run(["mount", "-o", "remount,ro,bind", self.folder], check=True)

    image = Image()
    image.folder.mkdir()
    yield image
    if image.sealed:
        subprocess.run(["umount", "-l", image.folder], check=True)


@needs_root
def test_cpu_kernels(image):
    build_stage(image.folder, "--arch cpu --ops flash_attn_func --dtypes fp32 --head-dims 64 --causal yes")
    image.seal()
    assert runtime_stage(image.folder, CPU_CALL) == "right\n"


@needs_root
@pytest.mark.skipif(not HIPCC, reason="AITER_HIPCC names no hipcc that builds gfx942")
def test_gpu_kernels(image, tmp_path):
    build_stage(image.folder, "--arch gfx942 --ops flash_attn_func --dtypes fp16 --head-dims 64 --causal yes")
    libraries = list(image.folder.glob("*/kernel.so"))
    names = set()
    for library in libraries:
        symbols = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
        names |= {word for line in symbols.stdout.splitlines() if "hip" in (word := line.split()[-1])}
        needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
        assert "amdhip" not in needed.stdout
    assert "hipLaunchKernel" in names
    runtime = tmp_path / "libamdhip64.so.7"
    (tmp_path / "runtime.c").write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in sorted(names)))
    subprocess.run(["cc", "-shared", "-fPIC", tmp_path / "runtime.c", "-o", runtime], check=True)
    image.seal()
    assert runtime_stage(image.folder, GPU_LOAD, str(runtime)) == f"{len(libraries)} loaded\n"


@needs_root
def test_a_kernel_that_is_missing_is_a_clear_error(image):
    script = CPU_CALL.replace("error =", "import os; os.environ['AITER_NO_COMPILE'] = '1'\nerror =")
    image.seal()
    with pytest.raises(
        AssertionError, match="CompilationDisabledError: no usable kernel attention_forward-fp32-d64-causal"
    ):
        runtime_stage(image.folder, script)
