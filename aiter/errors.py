"""The package's own exceptions. Each message says what was given, what was expected and what to do about it.

Bad arguments of an operation raise ValueError (LengthError and OverlapError are such) or TypeError; everything that can
go wrong after that is one of these.
"""


class AiterError(Exception):
    """Base of every error that aiter raises, bad arguments aside."""


class SettingError(AiterError, ValueError):
    """An AITER_… environment variable has a value that cannot be used."""


class LengthError(AiterError, ValueError, RuntimeError):
    """A length is negative, or more tokens than there is room for. FlashAttention raises RuntimeError for that, which
    programs written for it may expect."""


class OverlapError(AiterError, ValueError):
    """Two sequences of one call would write new tokens to one place of a cache; chance would say which of them stay."""


class UnsupportedError(AiterError):
    """What was asked for is well formed, but there is no kernel for it."""


class UnsupportedArchError(UnsupportedError):
    """The device's architecture is not one that kernels are written for."""


class UnsupportedDtypeError(UnsupportedError):
    """The dtype is not supported on this architecture."""


class KernelUnavailableError(AiterError):
    """A kernel is in no cache and cannot be built here; subclasses and the message say why."""


class CompilationDisabledError(KernelUnavailableError):
    """A kernel is in no cache and AITER_NO_COMPILE forbids building it."""


class CompilerNotFoundError(KernelUnavailableError):
    """No compiler for this architecture; the message lists what was looked for and where."""


class CompilationError(KernelUnavailableError):
    """The compiler failed, or ran past AITER_COMPILE_TIMEOUT.

    `command` is the command line, `output` the compiler's words, `log` the file that keeps them (None where no folder
    would take it).
    """

    def __init__(self, message: str, command: str = "", output: str = "", log: str | None = None) -> None:
        super().__init__(message)
        self.command = command
        self.output = output
        self.log = log


class CacheError(AiterError):
    """The kernel cache cannot be used: no folder can be written, or an archive is not what it claims to be."""


class UntrustedCacheError(CacheError):
    """Someone else could have written the cache. Loading runs code, so nothing is loaded from there."""


class LoadError(AiterError):
    """A kernel's .so cannot be loaded, or does not speak this version's launch ABI."""


class LaunchError(AiterError):
    """A kernel refused or failed a launch; `code` is what it returned."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class RankMismatchError(AiterError, ValueError):
    """The ranks of a group were asked for different things, or one of them refused its arguments: the message says who.
    All ranks raise, so that none waits for another."""
