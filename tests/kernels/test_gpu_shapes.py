"""The tiles of every head_dim that is served fit into what a block of each GPU can have: checked by the compilers
alone, as check_shapes.hip contains no kernel."""

import subprocess
from pathlib import Path

import pytest

from aiter.jit.arch import is_amd
from aiter.jit.spec import Spec
from aiter.jit.toolchain import toolchain_for

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "kernels_src"


CASES = [(arch, ()) for arch in ("gfx90a", "gfx942", "gfx950", "sm_80", "sm_86", "sm_90a", "sm_120")]
CASES += [("sm_90a", (("softcap", 1),))]  # has tiles of its own there
CASES += [("sm_90a", (("cut", 1),))]


@pytest.mark.parametrize("arch, options", CASES, ids=["-".join([a, *dict(o)]) for a, o in CASES])
def test_every_shape_fits(arch, options, tmp_path):
    toolchain = toolchain_for(arch)
    compiler = toolchain.find()
    if compiler is None:
        pytest.skip(f"no {toolchain.language} compiler: set {toolchain.variable}")
    flags = toolchain.flags(Spec("check_shapes", "bf16", 64, True, arch, options))
    words = [compiler.path, *flags, f"-I{SOURCES}", f"-I{SOURCES / 'include'}"]
    words += ["-c"] if is_amd(arch) else ["-x", "cu", "-cubin"]
    words += ["-o", str(tmp_path / "nothing"), str(HERE / "check_shapes.hip")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("head_dim, value_dim", ((64, 64), (128, 128), (192, 192), (256, 256), (192, 128), (256, 128)))
def test_pieces_have_room_for_what_they_leave(head_dim, value_dim, tmp_path):
    """Of kernels that cut keys, with batch_invariant: by a program that runs without a GPU."""
    toolchain = toolchain_for("sm_90a")
    compiler = toolchain.find()
    if compiler is None:
        pytest.skip(f"no {toolchain.language} compiler: set {toolchain.variable}")
    options = (("cut", 1), *((("value_dim", value_dim),) if value_dim != head_dim else ()))
    spec = Spec("attention_forward", "bf16", head_dim, False, "sm_90a", options)
    first, link = toolchain.commands(spec, str(HERE / "check_pieces.hip"), compiler)
    run = {"cwd": SOURCES, "capture_output": True, "text": True}
    objects = str(tmp_path / "check.o")
    done = subprocess.run([objects if word == "kernel.o" else word for word in first], **run)
    assert done.returncode == 0, done.stderr
    program = str(tmp_path / "check")
    words = [objects if word == "kernel.o" else word for word in link if word != "-shared"]
    done = subprocess.run([*words[: words.index("-o") + 1], program], **run)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
