"""The C header and its Python mirror describe the same structs, field by field."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from aiter import abi

HEADER = Path(__file__).parent.parent / "kernels_src" / "include" / "aiter_abi.h"


def python_structs():
    """The ctypes mirrors by their C names: AttentionProblem mirrors aiter_attention_problem."""
    classes = (c for c in vars(abi).values() if isinstance(c, type) and issubclass(c, ctypes.Structure))
    return {"aiter" + re.sub("([A-Z])", lambda m: "_" + m[1].lower(), c.__name__): c for c in classes}


def test_every_struct_is_mirrored():
    declared = set(re.findall(r"^typedef struct (\w+)", HEADER.read_text(), re.MULTILINE))
    assert declared and declared == set(python_structs())


def test_version():
    assert f"#define AITER_ABI_VERSION {abi.ABI_VERSION}\n" in HEADER.read_text()


def test_layouts(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        pytest.skip("no C compiler (cc, gcc, clang) on PATH")
    lines = ["#include <stddef.h>", "#include <stdio.h>", f'#include "{HEADER}"', "int main(void) {"]
    expected = []
    for name, cls in python_structs().items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        expected.append(f"{name} {ctypes.sizeof(cls)}")
        for field, *_ in cls._fields_:
            member = f"(({name} *)0)->{field}"
            lines.append(f'printf("{name}.{field} %zu %zu\\n", offsetof({name}, {field}), sizeof({member}));')
            expected.append(f"{name}.{field} {getattr(cls, field).offset} {getattr(cls, field).size}")
    source, program = tmp_path / "layout.c", tmp_path / "layout"
    source.write_text("\n".join([*lines, "return 0; }"]))
    subprocess.run([compiler, str(source), "-o", str(program)], check=True)
    printed = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    assert printed.splitlines() == expected
    assert len(expected) > 30


def _problem(values):
    """The fields of a forward problem as `pack_call` takes them."""
    return (
        *values[:5],
        abi.pack_layout(*values[5:13]),
        *values[13:27],
        abi.pack_more_strides(*values[27:32]),
        values[32],
        abi.pack_options(*values[33:42]),
    )


@pytest.mark.parametrize(
    ("call", "pack"),
    [
        (abi.AttentionCall, lambda *v: abi.pack_call(*_problem(v), *v[42:47], abi.pack_addresses(*v[47:]))),
        (abi.AttentionGradCall, lambda *v: abi.pack_grad_call(*_problem(v), *v[42:])),
        (abi.CacheWriteCall, abi.pack_cache_write),
    ],
    ids=["forward", "backward", "cache write"],
)
def test_packing(call, pack):
    """Packed in two pieces, a call is what its struct says."""

    def fill(struct):
        for name, kind in struct._fields_:
            if issubclass(kind, ctypes.Structure):
                fill(getattr(struct, name))
            elif issubclass(kind, ctypes.Array):
                for index in range(kind._length_):
                    values.append(len(values) + 1)
                    getattr(struct, name)[index] = values[-1]
            else:
                values.append(len(values) + 1)
                setattr(struct, name, values[-1])

    values: list[int] = []
    filled = call()
    fill(filled)
    assert pack(*values[:-1]) + abi.pack_workspace(values[-1]) == bytes(filled)
