"""Who could have written a file. Loading a kernel runs its code, so it must be the user's own, or root's."""

from __future__ import annotations

import functools
import os
import shlex
import stat
from pathlib import Path

from aiter.errors import UntrustedCacheError


def check_chain(folder: Path) -> Path:
    """Returns `folder` with links resolved, if nobody but the user and root could have put something else there.

    Looks at every folder up to the root of the file system. Above the cache itself, one like /tmp is fine, where
    everybody may write but only owners may rename.
    """
    folder = Path(os.path.realpath(folder))
    check(folder)
    check_parents(folder)
    return folder


def check_parents(folder: Path) -> None:
    """The part of `check_chain` that can be asked before there is the folder, whose links are resolved."""
    for parent in folder.parents:
        try:
            status = os.stat(parent)
        except FileNotFoundError:
            continue  # to be made, by us
        if status.st_uid not in _trusted() and not _is_unmapped(status.st_uid):
            _refuse(parent, f"belongs to {_user(status.st_uid)}", "")
        if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
            _refuse(parent, "can be written by others", _if_ours(status, f"chmod go-w {shlex.quote(str(parent))}"))


def check(path: Path) -> os.stat_result:
    """Refuses a file or folder that belongs to someone else, or that someone else can write, or that is a link."""
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        _refuse(path, "is a symbolic link", f"rm {shlex.quote(str(path))}")
    if status.st_uid not in _trusted():
        command = f"chown -R {os.geteuid()} {shlex.quote(str(path))}"
        _refuse(path, f"belongs to {_user(status.st_uid)}", command if os.geteuid() == 0 else "")
    if status.st_mode & 0o022:
        _refuse(path, "can be written by others", _if_ours(status, f"chmod -R go-w {shlex.quote(str(path))}"))
    return status


def _trusted() -> tuple[int, int]:
    return (0, os.geteuid())


@functools.cache
def _overflow_uid() -> int | None:
    """In a container without root, the one user id that stands for all that have none there; else None."""
    try:
        with open("/proc/self/uid_map") as uid_map:
            if sum(int(line.split()[2]) for line in uid_map) >= 2**32 - 1:
                return None
        with open("/proc/sys/fs/overflowuid") as overflow:
            return int(overflow.read())
    except (OSError, ValueError, IndexError):
        return None


def _is_unmapped(uid: int) -> bool:
    # The host's root, whose / and /home such a container sees, is one of them. What matters is that the cache itself
    # is still the user's own.
    return uid == _overflow_uid()


def _user(uid: int) -> str:
    import pwd

    try:
        return f"user {pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return f"user {uid}"


def _if_ours(status: os.stat_result, command: str) -> str:
    """The command, if this user can run it."""
    return command if os.geteuid() in (0, status.st_uid) else ""


def _refuse(path: Path, reason: str, command: str) -> None:
    mend = f" (`{command}` mends that, if what is there may be trusted)" if command else ""
    raise UntrustedCacheError(
        f"{path} {reason}{mend}, and loading a kernel runs its code: kernels are only kept in a folder that belongs to "
        "you or root and that nobody else can write"
    )
