"""`aiter cache …`: what is in a cache, clearing it, moving entries between machines."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from aiter.cli.table import count_kernels, duration, size, table
from aiter.jit import settings
from aiter.jit.archive import export_entries, import_entries
from aiter.jit.maintenance import Item, items
from aiter.jit.maintenance import clear as clear_entries
from aiter.jit.maintenance import verify as verify_entries


def list_entries(options: argparse.Namespace) -> int:
    folder = _folder(options)
    present = items(folder)
    if options.json:
        print(json.dumps({"folder": str(folder), "entries": [_json(item) for item in present]}, indent=2))
    elif not present:
        print(f"{folder} holds no kernels")
    else:
        now = time.time()
        rows = [(item.kernel, item.key, size(item.bytes), duration(max(0.0, now - item.built))) for item in present]
        print(table(("kernel", "key", "size", "age"), rows))
        print(f"\n{count_kernels(len(present))}, {size(sum(item.bytes for item in present))}, in {folder}")
    return 0


def verify(options: argparse.Namespace) -> int:
    folder = _folder(options)
    faults = verify_entries(folder)
    bad = {name: fault for name, fault in faults.items() if fault}
    if options.json:
        print(json.dumps({"folder": str(folder), "sound": len(faults) - len(bad), "faults": bad}, indent=2))
    else:
        for name, fault in bad.items():
            print(f"{name}: {fault}")
        print(f"{count_kernels(len(faults))} in {folder}: {len(faults) - len(bad)} sound, {len(bad)} bad")
        if bad:
            print("A damaged one is rebuilt when it is next needed; `aiter cache clear` removes all.")
    return 1 if bad else 0


def path(options: argparse.Namespace) -> int:
    folder = str(_folder(options))
    print(json.dumps({"folder": folder}) if options.json else folder)
    return 0


def clear(options: argparse.Namespace) -> int:
    folder = _folder(options)
    removed = clear_entries(folder, options.older_than, options.max_size, options.dry_run)
    if options.json:
        done = {"folder": str(folder), "dry_run": options.dry_run, "removed": [_json(item) for item in removed]}
        print(json.dumps(done, indent=2))
    else:
        verb = "would remove" if options.dry_run else "removed"
        print(f"{verb} {count_kernels(len(removed))}, {size(sum(item.bytes for item in removed))}, from {folder}")
    return 0


def export(options: argparse.Namespace) -> int:
    folder, target = _folder(options), Path(options.file).absolute()
    chosen = items(folder)
    if options.arch:
        archs = tuple(f"-{arch.strip()}" for arch in options.arch.split(","))
        chosen = [item for item in chosen if item.kernel.endswith(archs)]
    done = export_entries(folder, [item.name for item in chosen], target)
    # The archive may have gone to the standard output, or to where that goes.
    report = sys.stdout if target.is_file() and not target.is_relative_to("/dev") else sys.stderr
    total = sum(item.bytes for item in chosen)
    if options.json:
        print(json.dumps({"file": str(target), "bytes": total, "entries": done}, indent=2), file=report)
    else:
        print(f"wrote {count_kernels(len(done))}, {size(total)}, to {target}", file=report)
    return 0


def import_(options: argparse.Namespace) -> int:
    folder = _folder(options)
    new, present = import_entries(folder, Path(options.file).absolute())
    if options.json:
        print(json.dumps({"folder": str(folder), "imported": new, "already_there": present}, indent=2))
    else:
        print(f"imported {count_kernels(len(new))} into {folder}" + (f"; {len(present)} were there" if present else ""))
    return 0


def _folder(options: argparse.Namespace) -> Path:
    return Path(options.cache_dir).absolute() if options.cache_dir else settings.cache_dir()


def _json(item: Item) -> dict:
    return {"name": item.name, "bytes": item.bytes, "built": item.built, "used": item.used}
