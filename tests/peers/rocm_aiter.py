"""ROCm/aiter's own tests of attention, from a checkout of theirs and unchanged, against this package under its names.

    python tests/peers/rocm_aiter.py PATH_OF_CHECKOUT [--files test_batch_prefill.py ...] [--count 20] [--longest 512]

Runs op_tests/ of mha, mha_varlen, batch_prefill, pa and mla as flash_attention.py, beside this file, runs the tests of
FlashAttention: of each test, `count` parametrisations are drawn. Their helpers come from the checkout; what measures
time, and what asks for a GPU, is stood in for. What a test imports and this package does not have is a function that
says so when it is called. Needs einops and pandas.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.util
import inspect
import logging
import math
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import flash_attention as peer
import pytest
import torch
import torch.nn.functional as F

import aiter

FILES = ("mha", "mha_varlen", "batch_prefill", "pa_v1", "pa_ragged", "mla")
FP8 = torch.float8_e4m3fnuz  # that of gfx942, which the tests are told that they run on
DTYPES = {
    **{"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp8": FP8},
    **{"i8": torch.int8, "i16": torch.int16, "i32": torch.int32, "u32": torch.uint32},
}
# Of tests that their script calls without pytest: what it calls them with by default, and a few more head counts.
ARGUMENTS: dict[str, list[tuple[list[str], list[Any]]]] = {
    "test_mla": [
        (["ctx_lens"], [21, 64, 256, 512]),
        (["batch_size"], [1, 3, 5]),
        (["nhead"], [4, 12, 16, 32, 128]),
        (["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"], [(512, 128, 64, 128)]),
        (["dtype", "kvtype"], [(torch.bfloat16, torch.bfloat16), (FP8, FP8)]),
        (["page_size"], [1]),
        (["varlen"], [False, True]),
        (["decode_qlen"], [1, 2, 3, 4]),
        (["return_lse"], [False, True]),
        (["is_causal"], [False, True]),
    ]
}
# Scripts that run as they are imported: with no head counts, this one runs nothing.
COMMAND_LINES = {"test_mla.py": ["-n"]}


class OnCpu(peer.OnCpu):
    """And what is moved to device 0."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.to and len(args) > 1 and type(args[1]) is int:
            args = (args[0], "cpu", *args[2:])
        return super().__torch_function__(function, types, args, kwargs)


def missing(name: str) -> Callable[..., NoReturn]:
    def function(*arguments: Any, **keywords: Any) -> NoReturn:
        raise NotImplementedError(f"{name} is not offered")

    return function


def per_tensor_quant(x: torch.Tensor, quant_dtype: torch.dtype = FP8, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.abs().max().float() / torch.finfo(quant_dtype).max
    return (x.float() / scale).to(quant_dtype), scale.view(1)


def padded(weights: torch.Tensor, starts: torch.Tensor, seqlen_q: int, seqlen_k: int) -> torch.Tensor:
    return F.pad(weights, (0, seqlen_k - weights.shape[-1], 0, seqlen_q - weights.shape[-2]))


def run_perftest(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> tuple[Any, float]:
    """Once; keywords that say how to measure are left out."""
    measuring = ("num_iters", "num_warmup", "num_rotate_args", "testGraph", "needTrace", "use_cuda_event")
    return function(*arguments, **{name: value for name, value in keywords.items() if name not in measuring}), 1.0


def perftest(*_: Any, **__: Any) -> Callable[..., Any]:
    return lambda function: lambda *arguments, **keywords: run_perftest(function, *arguments, **keywords)


def strict(check: Callable[..., Any]) -> Callable[..., Any]:
    """Their comparison, which reports a failure, as one that raises it."""

    def checked(a: torch.Tensor, b: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        share = check(a, b, *arguments, **keywords)
        if share > keywords.get("tol_err_ratio", 0.05):
            raise AssertionError(f"{100 * share:.1f} % of the elements differ")
        return share

    return checked


def stand_in(checkout: Path) -> None:
    """What the tests import beside attention."""

    def module(name: str, **content: Any) -> types.ModuleType:
        made = sys.modules[name] = types.ModuleType(name)
        made.__dict__.update(content)
        return made

    def theirs(name: str) -> types.ModuleType:
        spec = importlib.util.spec_from_file_location(f"aiter.{name}", checkout / "aiter" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        made = sys.modules[f"aiter.{name}"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
        return made

    own = aiter.__getattr__

    def lookup(name: str) -> Any:
        try:
            return own(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            raise NotImplementedError(f"aiter.{name} is not offered") from None

    aiter.__getattr__ = lookup
    words = {"str2bool": str, "str2tuple": str, "str2Dtype": str, "d_dtypes": DTYPES}  # for their command lines
    aiter.dtypes = types.SimpleNamespace(**DTYPES, **words)
    aiter.logger = logging.getLogger("op_tests")  # says nothing
    aiter.per_tensor_quant = per_tensor_quant
    aiter.mla = importlib.import_module("aiter.mla")
    module("aiter.jit.utils", __path__=[])
    module("aiter.jit.utils.chip_info", get_gfx=lambda: "gfx942", get_gfx_runtime=lambda: "gfx942")
    theirs("bert_padding")
    masks = theirs("test_mha_common")
    masks.ck_randval_to_dropout_mask = lambda weights, dropout_p: weights  # which have the signs of that mask
    masks.pad_rearrange_dropout_mask_hts_to_bhss = padded
    common = theirs("test_common")
    common.perftest, common.run_perftest = perftest, run_perftest
    common.checkAllclose = strict(common.checkAllclose)


def give_missing_names(path: Path) -> None:
    """Puts a function that says that it is not offered wherever the file imports what is not there."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "aiter":
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(node.module)
            found = sys.modules.setdefault(node.module, types.ModuleType(node.module))
            for alias in node.names:
                try:
                    getattr(found, alias.name)
                except (AttributeError, NotImplementedError):
                    setattr(found, alias.name, missing(f"{node.module}.{alias.name}"))


def tests_of(path: Path, rounds: int, found: Callable[..., Iterator[peer.Test]] = peer.tests_of) -> Iterator[peer.Test]:
    give_missing_names(path)
    sys.argv = [str(path), *COMMAND_LINES.get(path.name, [])]
    for test in found(path, rounds):
        if not test.parameters:
            test = test._replace(parameters=ARGUMENTS.get(test.name, []))
        yield test._replace(function=prepared(test.function))


def prepared(function: Callable[..., Any]) -> Callable[..., Any]:
    """With the one fixture that their tests use, and without combinations that they refuse by an assertion."""

    def call(**arguments: Any) -> Any:
        if "monkeypatch" not in inspect.signature(function).parameters:
            return function(**arguments)
        with pytest.MonkeyPatch.context() as monkeypatch:
            return function(monkeypatch=monkeypatch, **arguments)

    def called(**arguments: Any) -> Any:
        try:
            return call(**arguments)
        except pytest.fail.Exception as reason:  # no Exception for Python
            if "Child subprocess" in str(reason):
                pytest.skip("starts a process for the GPU")
            raise AssertionError(str(reason)) from None
        except AssertionError as reason:
            place = traceback.extract_tb(reason.__traceback__)[-1]
            if "not compiled with CUDA" in str(reason):
                pytest.skip("asks the GPU for more than tensors")
            if place.name == "generate_qkv" or "gqa_ratio" in (place.line or ""):
                pytest.skip("the test refuses the combination")
            raise

    return called


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path, help="a checkout of ROCm/aiter")
    parser.add_argument("--files", nargs="*", default=[f"test_{name}.py" for name in FILES], help="of op_tests/")
    parser.add_argument("--tests", default="", help="only tests whose names contain this")
    parser.add_argument("--count", type=int, default=20, help="parametrisations of each test (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=1 << 30, help="draw no longer sequences than this")
    parser.add_argument("--seconds", type=float, default=math.inf, help="for each test; then the next one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("PYTEST_CURRENT_TEST", "op_tests")  # tests skip themselves where they see pytest
    options.rounds = sys.maxsize  # their loops are over sequences and pages
    stand_in(options.checkout)
    peer.redirect()
    peer.tests_of = tests_of
    torch.set_default_device = lambda device: None
    failed = 0
    with OnCpu():
        for file in options.files:
            print(f"\n== op_tests/{file}")
            options.file = Path("op_tests") / file
            failed |= peer.run(options)
    return failed


if __name__ == "__main__":
    sys.exit(main())
