"""Whether the hipcc at hand can build our kernels: Debian's, for one, is older than most of the GPUs."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from aiter.errors import CompilationError
from aiter.jit import process
from aiter.jit.toolchain import HIP


@functools.cache
def missing(arch: str) -> str | None:
    """Why kernels cannot be built for the arch here, or None."""
    compiler, looked = HIP.choose()
    if compiler is None:
        places = ", ".join(f"{place}{fault}" for place, fault in looked.items())
        return f"no hipcc that would do (.ci/amd-toolchain makes one); looked for {places}"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "empty.hip").write_text("")
        options = ["-x", "hip", f"--offload-arch={arch}", "-nogpulib", "-c", "empty.hip", "-o", "empty.o"]
        try:
            with open(Path(folder) / "words", "w+b") as words:
                status = process.run([compiler.path, *options], 60, words, words, folder)
                words.seek(0)
                said = process.decode(words.read())
        except (CompilationError, TimeoutError) as error:
            status, said = 1, str(error)
    return f"{compiler.path} cannot build for {arch}: {said[-300:]}" if status else None
