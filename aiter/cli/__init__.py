"""The `aiter` command: what is here, what the cache holds, building ahead of time, a demonstration.

    aiter info                          versions, devices, compilers, caches
    aiter selftest                      every family of kernels on this device: right, and how fast
    aiter demo                          the five operations on the best device here, beside PyTorch's own
    aiter prewarm --arch gfx942 ...     build kernels ahead of time
    aiter cache list|verify|clear|path|export|import

Each takes --json where a program would read the output. Exit status: 0, or 1 where something is wrong, 2 for a bad
command line, 130 for an interrupt.
"""

from __future__ import annotations

import argparse

from aiter.cli import streams


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    streams.prepare()
    try:
        options = parser().parse_args(arguments)
    except SystemExit as end:  # help, or a bad command line: argparse has told
        return streams.finish(end.code if isinstance(end.code, int) else 0)
    if options.run is None:
        options.parser.print_help()
        return streams.finish(2)
    # Each command's module is loaded when it runs: `aiter --help` should not wait for PyTorch.
    import importlib

    from aiter.errors import AiterError

    module, function = options.run
    try:
        status = getattr(importlib.import_module(f"aiter.cli.{module}"), function)(options)
    except AiterError as error:
        streams.tell(f"aiter: {error}")
        status = 1
    except BrokenPipeError:
        status = 1
    except OSError as error:
        files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        streams.tell(f"aiter: {files}: {error.strerror}" if files else f"aiter: {error.strerror or error}")
        status = 1
    except KeyboardInterrupt:
        streams.tell("aiter: interrupted; nothing was left half done")
        status = 130
    return streams.finish(status)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from aiter import __version__

    examples = (
        "aiter info                                    # what this machine has",
        "aiter demo                                    # the five operations, beside PyTorch's own",
        "aiter prewarm --arch gfx942 --dtypes bf16     # build kernels ahead of time",
        "aiter cache list",
    )
    root = argparse.ArgumentParser(
        prog="aiter", description="JIT-compiled attention: kernels, their cache, a demo.", **_examples(*examples)
    )
    root.add_argument("--version", action="version", version=f"aiter {__version__}")
    commands = _add_commands(root)

    info = _command(commands, "info", "info", "run", "versions, devices and their arch, compilers, caches")
    _add_json(info)

    demo = _command(commands, "demo", "demo", "run", "run the five operations on the best device there is")
    demo.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if PyTorch has one, else the CPU")
    demo.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), help="default: fp16 on a GPU, fp32 on a CPU")
    _add_json(demo)

    text = "try every family of kernels on a device: errors against float64, speed against the device's own"
    ways = (
        "aiter selftest                        # the best device here; a minute or two",
        "aiter selftest --report aiter.json    # and one file to attach to a report",
    )
    selftest = _command(commands, "selftest", "selftest", "run", text, *ways)
    selftest.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if PyTorch has one, else the CPU")
    selftest.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    selftest.add_argument("--errors-only", action="store_true", help="time nothing")
    selftest.add_argument("--report", metavar="FILE", help="write all of it there, as JSON")
    _add_json(selftest)

    _add_prewarm(commands)
    _add_cache(commands)
    return root


def _add_prewarm(commands) -> None:
    text = "build kernels ahead of time, for chips that need not be here"
    examples = (
        "aiter prewarm                                                     # what this machine's devices need",
        "aiter prewarm --arch gfx942,gfx950 --dtypes bf16 --head-dims 128  # for GPUs that are elsewhere",
        "aiter prewarm --head-dims 192 --value-dims 128 --window both      # values with a head_dim of their own",
        "aiter prewarm --arch gfx942 --model config.json                   # what a model needs",
        "aiter prewarm --replay kernels.jsonl                              # what a program with AITER_RECORD used",
    )
    prewarm = _command(commands, "prewarm", "prewarm", "run", text, *examples)
    add = prewarm.add_argument
    add("--arch", metavar="LIST", help="gfx942,gfx950,x86-64-v4,... ; native: this machine's GPUs, or its CPU where it "
        "has none; cpu: its CPU. Default: native")  # fmt: skip
    add("--ops", metavar="LIST", help="operations; default: all")
    add("--dtypes", metavar="LIST", help="fp16,bf16,fp32; default: all that the arch has")
    add("--cache-dtypes", metavar="LIST", help="what keys and values are kept in: e4m3fn,e4m3fnuz,e5m2, or same, as "
        "queries, the default")  # fmt: skip
    add("--head-dims", metavar="LIST", help="default: 64,128")
    add("--value-dims", metavar="LIST", help="head_dims of values where they differ; default: those of --head-dims")
    flags = ("yes", "no", "both")
    add("--causal", choices=flags, help="default: both")
    add("--window", choices=flags, help="calls with window_size; default: no, or as --model says")
    add("--chunk", choices=flags, help="calls with attention_chunk; default: no")
    add("--dropout", choices=flags, help="calls with dropout_p; default: no")
    add("--softcap", choices=flags, help="calls with softcap; default: no, or as --model says")
    add("--alibi", choices=flags, help="calls with alibi_slopes; default: no")
    add("--batch-invariant", choices=flags, help="calls with batch_invariant, which CPUs have kernels for; "
        "default: no, or as AITER_BATCH_INVARIANT says")  # fmt: skip
    add("--backward", action="store_true", help="the kernels of the backward pass too")
    add("--model", metavar="FILE", help="a Hugging Face config.json, or its folder: head_dims, masks, soft caps and "
        "dtypes of all its parts")  # fmt: skip
    add("--replay", metavar="FILE", help="exactly the kernels that a program has written there (AITER_RECORD=FILE)")
    add("--jobs", metavar="N", type=_positive, help="compilers at a time; default: what CPUs and memory are enough for")
    add("--cache-dir", metavar="DIR", help="the cache to fill; default: AITER_CACHE_DIR or the user's")
    add("--dry-run", action="store_true", help="say what would be built, and build nothing")
    _add_json(prewarm)


def _add_cache(commands) -> None:
    cache = commands.add_parser("cache", help="look into the kernel cache, clear it, move entries between machines")
    verbs = _add_commands(cache)
    listing = _command(verbs, "list", "cache", "list_entries", "the entries")
    verify = _command(verbs, "verify", "cache", "verify", "check every entry; status 1 if one is bad")
    path = _command(verbs, "path", "cache", "path", "print the folder")
    examples = (
        "aiter cache clear                    # all kernels",
        "aiter cache clear --older-than 30d   # those that were not used for 30 days",
        "aiter cache clear --max-size 2G      # the longest unused, until 2 GB are left",
    )
    text = "remove all kernels, or those that the options name, and no other file; safe while other processes run"
    clear = _command(verbs, "clear", "cache", "clear", text, *examples)
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


def _add_commands(parent: argparse.ArgumentParser):
    """Commands below `parent`, which shows its help where none is given."""
    parent.set_defaults(run=None, parser=parent)
    return parent.add_subparsers(metavar="COMMAND")


def _command(commands, name: str, module: str, function: str, text: str, *examples: str) -> argparse.ArgumentParser:
    description = text[0].upper() + text[1:] + "."
    command = commands.add_parser(name, help=text, description=description, **_examples(*examples))
    command.set_defaults(run=(module, function))
    return command


def _examples(*lines: str) -> dict:
    if not lines:
        return {}
    epilog = "\n  ".join(("examples:", *lines))
    return {"epilog": epilog, "formatter_class": argparse.RawDescriptionHelpFormatter}


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
