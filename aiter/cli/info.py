"""`aiter info`: what is here, for a newcomer and for a bug report."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

from aiter.cli.table import count_kernels, size
from aiter.errors import AiterError
from aiter.jit import settings, trust
from aiter.jit.arch import arch_of, cpu_arch
from aiter.jit.disk import forbids_execution
from aiter.jit.maintenance import items
from aiter.jit.toolchain import TOOLCHAINS, Toolchain


def run(options: argparse.Namespace) -> int:
    facts = facts_of_machine()
    print(json.dumps(facts, indent=2) if options.json else _text(facts))
    return 0


def facts_of_machine() -> dict:
    """Versions, devices, compilers, caches, settings."""
    import torch

    import aiter

    return {
        "versions": {"aiter": aiter.__version__, "python": platform.python_version(), "torch": torch.__version__},
        "devices": _devices(torch),
        "compilers": {toolchain.language: _compiler(toolchain) for toolchain in TOOLCHAINS},
        "caches": _caches(),
        "settings": {name: os.environ[name] for name in settings.VARIABLES if name in os.environ},
    }


def _devices(torch) -> list[dict]:
    devices = [{"device": "cpu", "name": _cpu_name(), **_arch(cpu_arch)}]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.device("cuda", index)
            name = torch.cuda.get_device_name(device)
            devices.append({"device": str(device), "name": name, **_arch(lambda device=device: arch_of(device))})
    return devices


def _arch(detect) -> dict:
    try:
        return {"arch": detect()}
    except AiterError as error:
        return {"arch": None, "problem": str(error)}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            return next(line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _compiler(toolchain: Toolchain) -> dict:
    compiler, looked = toolchain.choose()
    passed_over = [f"{place}{fault}" for place, fault in looked.items() if fault]
    facts = {"variable": toolchain.variable, "passed_over": passed_over}
    if compiler is None:
        return {"path": None, "looked_for": list(looked), **facts}
    try:
        version = compiler.release()
    except AiterError as error:
        version = str(error)
    return {"path": compiler.path, "version": version, **facts}


def _caches() -> list[dict]:
    """Each folder that calls look into. A private one is used where the cache cannot be."""
    prebuilt, own, private = settings.prebuilt_dirs(), settings.cache_dir(), settings.private_dirs()
    return [
        *({"layer": "prebuilt", **_cache(folder)} for folder in prebuilt),
        {"layer": "writable", **_cache(own)},
        *({"layer": "private", **_cache(folder)} for folder in private if os.path.isdir(folder) and folder != own),
    ]


def _cache(folder: Path) -> dict:
    facts: dict = {"folder": str(folder), "exists": os.path.isdir(folder)}
    real = Path(os.path.realpath(folder))
    existing = next(path for path in (real, *real.parents) if os.path.exists(path))
    facts["writable"] = os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)
    facts["noexec"] = forbids_execution(folder)
    try:
        trust.check_chain(real) if facts["exists"] else trust.check_parents(real)
        present = items(folder)
        facts |= {"entries": len(present), "bytes": sum(item.bytes for item in present)}
    except (AiterError, OSError) as error:
        facts["problem"] = str(error)
    return facts


def _text(facts: dict) -> str:
    lines = ["Versions", *(f"  {name:<8} {value}" for name, value in facts["versions"].items()), "", "Devices"]
    for device in facts["devices"]:
        lines.append(f"  {device['device']:<8} {device['arch'] or 'not supported'}  ({device['name']})")
        lines += [f"           {device['problem']}"] if "problem" in device else []
    lines += ["", "Compilers"]
    for language, compiler in facts["compilers"].items():
        if compiler["path"]:
            lines.append(f"  {language:<8} {compiler['path']}  ({compiler['version']})")
        else:
            lines.append(f"  {language:<8} none; looked for {', '.join(compiler['looked_for'])}")
            lines.append(f"           set {compiler['variable']} to its path if it is elsewhere")
        lines += [f"           passed over: {words}" for words in compiler["passed_over"]]
    lines += ["", "Caches, in the order in which they are searched"]
    for cache in facts["caches"]:
        if "problem" in cache:
            state = cache["problem"]
        elif not cache["exists"]:
            state = "not there yet" if cache["writable"] else "not there, and cannot be made"
        else:
            state = f"{count_kernels(cache['entries'])}, {size(cache['bytes'])}"
            state += "" if cache["writable"] or cache["layer"] == "prebuilt" else "; cannot be written"
        if cache["noexec"]:
            state += "; mounted noexec: kernels cannot be loaded from there"
        lines.append(f"  {cache['layer']:<8} {cache['folder']}  ({state})")
    if facts["settings"]:
        lines += ["", "Settings", *(f"  {name}={value}" for name, value in facts["settings"].items())]
    return "\n".join(lines)
