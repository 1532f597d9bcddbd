"""Reading a call's tensors in C, where that can be: kernels_src/include/call_reader.h, which every kernel of attention
has in it, so that nothing is to be compiled for it alone.

    in C        in Python               answer
    is_index    layout.index_tensor     True, for an index tensor that is as kernels read it
    sizes_of    layout.read_sizes       the fields of Sizes
    pack        plan.pack               the call as bytes, but for its workspace
    form_of     -                       what a call's arguments are, and where its tensors lie: see repeated.py
    fill        -                       a call like that, with other addresses
    lacks_memory  lacks_memory          True, where the memory of one of a call's tensors was freed

That is for calls as they mostly are; None for all others, which Python then looks at. Before the first kernel is
loaded, and where PyTorch cannot tell C what a tensor is, the functions themselves are None, or Python's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from aiter import checks
from aiter.kernels import HEAD_DIM_MAX, HEAD_DIM_STEP, LATENT_HEAD_DIM

is_index: Callable[..., bool | None] | None = None
sizes_of: Callable[..., tuple[int, ...] | None] | None = None
pack: Callable[..., bytes | None] | None = None
form_of: Callable[..., tuple[bytes, bytes] | None] | None = None
fill: Callable[..., bytes | None] | None = None


def lacks_memory(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool | None:
    """Whether one of a call's arguments is, or has in it, a tensor whose memory was freed."""
    return checks.is_freed((*arguments, *keywords.values()))


def take_from(library: ctypes.CDLL) -> None:
    """From now on reads tensors with what a loaded kernel has in it for that, if it does and nothing did before."""
    global is_index, sizes_of, pack, form_of, fill, lacks_memory
    exchange = exchange_of_torch()
    if pack is None and exchange is not None and hasattr(library, "aiter_call_reader"):
        is_index, sizes_of, pack, form_of, fill, in_c = functions_of(library, exchange)
        lacks_memory = in_c or lacks_memory


def exchange_of_torch() -> int | None:
    """The address of the functions that PyTorch, from 2.10 on, has for who reads tensors in C (DLPackExchangeAPI)."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.argtypes, pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
    try:
        return None if capsule is None else pointer(capsule, b"dlpack_exchange_api")
    except ValueError:  # something else that goes by this name
        return None


# What C asks, and asks tensors for: it must stay.
_OBJECTS = checks.has_memory, torch.Tensor, torch.nn.Parameter, "requires_grad", "is_neg"


def functions_of(library: ctypes.CDLL, exchange: int) -> tuple[Callable[..., Any] | None, ...]:
    """The six functions of a library that has them."""
    address = ctypes.cast(library.aiter_call_reader, ctypes.c_void_p).value
    assert address is not None
    objects = [ctypes.py_object] * len(_OBJECTS)
    make = ctypes.PYFUNCTYPE(
        ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int] * 3, ctypes.c_uint64, *objects
    )(address)  # fmt: skip
    functions = make(exchange, HEAD_DIM_STEP, HEAD_DIM_MAX, LATENT_HEAD_DIM, checks.LOW_ADDRESSES, *_OBJECTS)
    if functions is None:  # Python's functions cannot be seen from there, or this is another version of DLPack
        return (None,) * 6
    return ctypes.cast(functions, ctypes.py_object).value
