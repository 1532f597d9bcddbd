"""The `aiter` command: what is here, what the cache holds, building ahead of time, a demonstration.

    aiter info                          versions, devices, compilers, caches
    aiter demo                          the five operations on the best device here, beside PyTorch's own
    aiter prewarm --arch gfx942 ...     build kernels ahead of time
    aiter cache list|verify|clear|path|export|import

Each takes --json where a program would read the output. Exit status: 0, or 1 where something is wrong, 2 for a bad
command line, 130 for an interrupt.
"""

from __future__ import annotations

import argparse
import os
import sys


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    options = parser().parse_args(arguments)
    # Each command's module is loaded when it runs: `aiter --help` should not wait for PyTorch.
    import importlib

    from aiter.errors import AiterError

    module, function = options.run
    try:
        status = getattr(importlib.import_module(f"aiter.cli.{module}"), function)(options)
        sys.stdout.flush()
        return status
    except AiterError as error:
        print(f"aiter: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # Whoever read the output has seen enough. Nothing more can be written, not even when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        print(f"aiter: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("aiter: interrupted; nothing was left half done", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = argparse.ArgumentParser(prog="aiter", description="JIT-compiled attention: kernels, their cache, a demo.")
    commands = root.add_subparsers(metavar="COMMAND", required=True)

    info = _command(commands, "info", "info", "run", "versions, devices and their arch, compilers, caches")
    _add_json(info)

    demo = _command(commands, "demo", "demo", "run", "run the five operations on the best device there is")
    demo.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if PyTorch has one, else the CPU")
    demo.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), help="default: fp16 on a GPU, fp32 on a CPU")
    _add_json(demo)

    _add_prewarm(commands)
    _add_cache(commands)
    return root


def _add_prewarm(commands) -> None:
    text = "build kernels ahead of time, for chips that need not be here"
    prewarm = _command(commands, "prewarm", "prewarm", "run", text)
    add = prewarm.add_argument
    add("--arch", metavar="LIST", help="gfx942,gfx950,x86-64-v4,... ; native: this machine's GPUs, or its CPU where it "
        "has none; cpu: its CPU. Default: native")  # fmt: skip
    add("--ops", metavar="LIST", help="operations; default: all")
    add("--dtypes", metavar="LIST", help="fp16,bf16,fp32; default: all that the arch has")
    add("--head-dims", metavar="LIST", help="default: 64,128")
    add("--causal", choices=("yes", "no", "both"), help="default: both")
    add("--backward", action="store_true", help="the kernels of the backward pass too")
    add("--model", metavar="FILE", help="a Hugging Face config.json: takes head_dim and dtype from it")
    add("--replay", metavar="FILE", help="exactly the kernels that a program has written there (AITER_RECORD=FILE)")
    add("--jobs", metavar="N", type=_positive, help="compilers at a time; default: one per core")
    add("--cache-dir", metavar="DIR", help="the cache to fill; default: AITER_CACHE_DIR or the user's")
    add("--dry-run", action="store_true", help="say what would be built, and build nothing")
    _add_json(prewarm)


def _add_cache(commands) -> None:
    cache = commands.add_parser("cache", help="look into the kernel cache, clear it, move entries between machines")
    verbs = cache.add_subparsers(metavar="COMMAND", required=True)
    listing = _command(verbs, "list", "cache", "list_entries", "the entries")
    verify = _command(verbs, "verify", "cache", "verify", "check every entry; status 1 if one is bad")
    path = _command(verbs, "path", "cache", "path", "print the folder")
    text = "remove all kernels, or those that the options name, and no other file; safe while other processes run"
    clear = _command(verbs, "clear", "cache", "clear", text)
    clear.add_argument("--older-than", metavar="AGE", type=_age, help="only those not used for 30d, 12h, 10m, 5s")
    clear.add_argument("--max-size", metavar="SIZE", type=_size, help="the longest unused, until 500M, 2G are left")
    clear.add_argument("--dry-run", action="store_true", help="say what would go, and remove nothing")
    export = _command(verbs, "export", "cache", "export", "write entries to an archive")
    export.add_argument("--arch", metavar="LIST", help="only for these archs")
    export.add_argument("file", metavar="FILE")
    take = _command(verbs, "import", "cache", "import_", "put the entries of an archive into the cache")
    take.add_argument("file", metavar="FILE", help="from someone you trust: its kernels will run")
    for command in (listing, verify, path, clear, export, take):
        command.add_argument("--cache-dir", metavar="DIR", help="default: AITER_CACHE_DIR or the user's")
        _add_json(command)


def _command(commands, name: str, module: str, function: str, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.set_defaults(run=(module, function))
    return command


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="for a program to read")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _age(text: str) -> float:
    return _quantity(text, {"s": 1, "m": 60, "h": 3600, "d": 86400}, "an age such as 30d, 12h, 10m or 5s")


def _size(text: str) -> int:
    units = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
    return int(_quantity(text.removesuffix("B"), units, "a size such as 500M or 2G"))


def _quantity(text: str, units: dict[str, int], wanted: str) -> float:
    number = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = text[len(number) :].lower()
    try:
        value = float(number) * units[unit]
        if 0 <= value < float("inf"):
            return value
    except (ValueError, KeyError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
