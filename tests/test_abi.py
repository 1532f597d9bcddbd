"""The C header and its Python mirror describe the same structs."""

import ctypes
import subprocess
from pathlib import Path

import pytest

from aiter import abi
from aiter.jit import sources

STRUCTS = {
    "aiter_attention_problem": abi.AttentionProblem,
    "aiter_attention_tensors": abi.AttentionTensors,
    "aiter_cpu_executor": abi.CpuExecutor,
    "aiter_description": abi.Description,
}
