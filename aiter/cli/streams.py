"""Standard streams that may be closed, full, or unable to show a character: what was asked for is done all the same."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from typing import TextIO

# For terminals and files that have no such characters (ASCII, EUC-JP, GBK).
_PLAIN = {"µ": "u", "█": "#", "·": ".", "…": "..."}


def prepare() -> None:
    """Replaces closed streams, and makes the others show what they cannot encode in another way."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # It takes the number of the closed one, or the next file that is opened would.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    codecs.register_error("aiter.plain", _show)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not a stand-in that somebody has put there
            stream.reconfigure(errors="aiter.plain")


def tell(message: str) -> None:
    """Writes a line to stderr, if anybody is there to read it."""
    with contextlib.suppress(OSError, ValueError):
        print(message, file=sys.stderr, flush=True)


def finish(status: int) -> int:
    """The exit status, once everything is written: 1 if stdout did not take what it should have."""
    error = _flush(sys.stdout)
    if error and not isinstance(error, BrokenPipeError):  # then whoever read it has seen enough
        tell(f"aiter: the output cannot be written: {error.strerror}")
    _flush(sys.stderr)
    return status or (1 if error else 0)


def _flush(stream: TextIO) -> OSError | None:
    try:
        stream.flush()
        return None
    except OSError as error:
        # Nothing more can be written there, not even when Python ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error


def _show(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":  # of a path that is not text, as it is
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return _PLAIN.get(character) or character.encode("ascii", "backslashreplace").decode(), error.start + 1
