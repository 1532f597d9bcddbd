"""AITER_RECORD: writing down which kernels a program uses, for `aiter prewarm --replay`."""

from __future__ import annotations

import json
import os

from aiter.jit import settings
from aiter.jit.log import logger
from aiter.jit.spec import Spec


def record(spec: Spec) -> None:
    """Appends the spec as one line to the file named by AITER_RECORD, if any. Called once per process and spec.

    One write to a file opened for appending: lines of several processes do not mix.
    """
    path = settings.record_file()
    if path is None:
        return
    line = json.dumps(spec.to_json(), separators=(",", ":")) + "\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        logger.warning("AITER_RECORD=%s cannot be written: %s", path, error)


def read_record(path: os.PathLike | str) -> list[Spec]:
    """The specs in a recorded file, each once, in order. Raises ValueError that names the line that is not one."""
    specs: dict[Spec, None] = {}
    with open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    specs[Spec.from_json(line)] = None
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from None
    return list(specs)
