"""The `aiter` logger. Unless the program sets up logging itself, its messages go to stderr from level INFO on (see
AITER_LOG): one line when something is compiled, and silence otherwise."""

from __future__ import annotations

import logging
import sys

from aiter.jit import settings

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class _Stderr(logging.Handler):
    """Writes to the stderr of the moment, and only where nobody else handles the message."""

    def emit(self, record: logging.LogRecord) -> None:
        others = [handler for handler in logger.handlers if handler is not self]
        if others or logging.getLogger().handlers:
            return
        try:
            sys.stderr.write(f"aiter: {record.getMessage()}\n")
            sys.stderr.flush()
        except (OSError, ValueError, AttributeError):
            pass  # stderr is closed: nobody to tell


logger = logging.getLogger("aiter")
if not logger.handlers:
    logger.addHandler(_Stderr())
    if logger.level == logging.NOTSET:
        _chosen = settings.text("AITER_LOG").lower() or "info"
        logger.setLevel(_LEVELS.get(_chosen, logging.INFO))
        if _chosen not in _LEVELS:  # a warning, because an import should not fail for this
            logger.warning("AITER_LOG=%r: expected one of %s", _chosen, ", ".join(_LEVELS))
