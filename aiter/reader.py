"""Reading a call's tensors in C, where that can be: kernels_src/include/call_reader.h, which every kernel of attention
has in it, so that nothing is to be compiled for it alone.

    is_index, sizes_of, pack    what layout.py and plan.py have of these names, for calls as they mostly are; None for all
                                others, and for every call before a kernel is loaded, or where PyTorch cannot tell C what
                                a tensor is
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from aiter.kernels import HEAD_DIM_MAX, HEAD_DIM_STEP, LATENT_HEAD_DIM


def _ask_python(*arguments: Any) -> None:
    return None


is_index: Callable[..., bool | None] = _ask_python
sizes_of: Callable[..., tuple[int, ...] | None] = _ask_python
pack: Callable[..., bytes | None] = _ask_python


def take_from(library: ctypes.CDLL) -> None:
    """From now on reads tensors with what a loaded kernel has in it for that, if it does and nothing did before."""
    global is_index, sizes_of, pack
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)  # PyTorch 2.10
    function = getattr(library, "aiter_call_reader", None)
    if capsule is None or function is None or pack is not _ask_python:
        return
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.argtypes, pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
    types = (ctypes.py_object, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int)
    make = ctypes.PYFUNCTYPE(*types)(ctypes.cast(function, ctypes.c_void_p).value)
    try:
        exchange = pointer(capsule, b"dlpack_exchange_api")
        is_index, sizes_of, pack = make(exchange, HEAD_DIM_STEP, HEAD_DIM_MAX, LATENT_HEAD_DIM)
    except ValueError:  # another kind of capsule, or a null pointer for the functions
        return
