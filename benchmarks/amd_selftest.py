"""What `aiter selftest` will take on AMD GPUs, by the timing model: makes aiter/cli/selftest_predictions.json.

    AITER_HIPCC=... python benchmarks/amd_selftest.py [--arch gfx90a,gfx942,gfx950]

Families of kernels for which the model has a launch: see amd_timing.py, which is run for each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from aiter.cli.selftest_cases import Family, families  # noqa: E402

ARCHS = "gfx90a,gfx942,gfx950"
FILE = HERE.parent / "aiter" / "cli" / "selftest_predictions.json"
VALIDATION = HERE.parent / "docs" / "figures" / "amd-validation.json"


def kernel_of(family: Family) -> str | None:
    """The model's name for it; None where the model has none."""
    if family.options or family.value_dim or family.form != "dense" or family.head_dim > 256 or family.latent:
        return None
    if family.large.rows not in (1, family.large.keys):
        return None
    if family.backward:
        return "backward"
    if family.large.rows == 1:
        return "decode"
    return "forward" if family.large.group == 1 else None


def seconds(family: Family, kernel: str, arch: str) -> float:
    size = family.large
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, str(HERE / "amd_timing.py"), "--arch", arch, "--kernel", kernel, "--json", file.name]
        command += ["--head-dim", str(family.head_dim), "--batch", str(size.batch), "--seq", str(size.keys)]
        command += ["--heads", str(size.heads_kv * size.group), "--kv-heads", str(size.heads_kv)]
        command += ["--causal"] if family.causal else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (report,) = json.loads(Path(file.name).read_text())
    if kernel == "decode":
        return family.bytes(size, 2) / report["kernels"][0]["TB/s"] / 1e12
    return family.products(size) / report["launch"]["TFLOP/s under the power limit"] / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default=ARCHS)
    predicted: dict[str, dict[str, float]] = {}
    for arch in parser.parse_args().arch.split(","):
        for family in families(on_gpu=True):
            kernel = kernel_of(family)
            if kernel:
                predicted.setdefault(arch, {})[family.name] = float(f"{seconds(family, kernel, arch):.4g}")
                print(arch, family.name, predicted[arch][family.name], flush=True)
    error = json.loads(VALIDATION.read_text())["summary"]["all"]
    report = {"dtype": "bf16", "error": {name: error[name] for name in ("median", "worst")}, "seconds": predicted}
    FILE.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
