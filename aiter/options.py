"""What a call may ask of attention beyond its tensors, causal and softmax_scale: one value, from operation to kernel.

A new option is a field here, a field of the launch ABI or a macro of the spec, and the kernels' code; operations hand
on whatever keywords they get.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch

from aiter import checks
from aiter.dropout import draw_rng_state
from aiter.errors import UnsupportedError
from aiter.jit import settings

if TYPE_CHECKING:
    from aiter.layout import Sizes

NO_LIMIT = -1
FLOAT32_TINY = torch.finfo(torch.float32).tiny  # the least that is not subnormal, which GPUs may take for 0
SOFTCAP_MAX = 1e37  # with which kernels can still multiply
# GPU kernels find tanh with an error of 1e-7, which the cap multiplies: up to here it is less than what 16 bits show.
GPU_SOFTCAP_MAX = 1e4


class OptionKeywords(TypedDict, total=False):
    """The keywords of all operations that make an `Options`.

    window_size: (left, right), how many keys before and after its own position a query sees, both inclusive; -1 is no
        limit. Query i stands at key i + seq_k - seq_q. With `causal`, right is 0.
    softcap: 0.0 for none, or c > 0: scores become c * tanh(score / c), after softmax_scale and before the mask.
    alibi_slopes: float32 (heads_q,) or (batch, heads_q): score - slope * |distance|, after the soft cap. Takes no
        gradient.
    sinks: (heads_q,) float32 or of query's dtype: a score per head that joins the softmax's sum and has no value. The
        returned log-sum-exp is that of the keys alone.
    query_offsets: int32 (batch,): query 0 of sequence b stands at key query_offsets[b], instead of seq_k - seq_q.
    dropout_p: 0.0 for none, or 0 < p < 1: in training, weights of the softmax are left out with this probability (in
        steps of 1/65536) and the others divided by 1 - p. The returned log-sum-exp is that of all weights. The mask
        follows from rng_state and places alone, so that every device draws the same one, in both passes.
    rng_state: int64 (2,) on query's device, seed and offset of that mask; by default drawn from PyTorch's generator of
        the device. `aiter.dropout.keep_mask` shows the mask.
    attention_chunk: 0 for none, or c > 0: a query at key place i sees only keys of its own chunk of c, those from
        i - i % c on; causal and window_size hold besides.
    batch_invariant: no bit of a sequence's result depends on the rest of the batch, nor on how a prompt was cut into
        calls. Default: AITER_BATCH_INVARIANT.
    k_descale, v_descale: float32, one element, (heads_kv,) or (batch, heads_kv), on the device of key: what the 8-bit
        floats of key and value are to be multiplied by; None is 1. For float8 keys and values alone. Take no gradient.
    """

    window_size: tuple[int, int]
    softcap: float
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    query_offsets: torch.Tensor | None
    dropout_p: float
    rng_state: torch.Tensor | None
    attention_chunk: int
    batch_invariant: bool | None
    k_descale: torch.Tensor | None
    v_descale: torch.Tensor | None


_KNOWN = tuple(OptionKeywords.__annotations__)


class Options(NamedTuple):
    """The window is (NO_LIMIT, NO_LIMIT) where `causal` says all: see `one_mask`."""

    window_left: int = NO_LIMIT
    window_right: int = NO_LIMIT
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    query_offsets: torch.Tensor | None = None
    batch_invariant: bool = False
    dropout_p: float = 0.0
    rng_state: torch.Tensor | None = None
    attention_chunk: int = 0
    k_descale: torch.Tensor | None = None
    v_descale: torch.Tensor | None = None

    @property
    def that_select_code(self) -> tuple[str, ...]:
        """Names of the spec's options that these ask for, sorted."""
        alibi = ("alibi",) if self.alibi_slopes is not None else ()
        invariant = ("batch_invariant",) if self.batch_invariant else ()
        chunk = ("chunk",) if self.attention_chunk else ()
        dropout = ("dropout",) if self.dropout_p else ()
        softcap = ("softcap",) if self.softcap else ()
        window = ("window",) if self.has_window or chunk else ()  # whose kernels know ranges with two ends
        return (*alibi, *invariant, *chunk, *dropout, *softcap, *window)

    @property
    def has_window(self) -> bool:
        return self.window_left != NO_LIMIT or self.window_right != NO_LIMIT

    def check(
        self, query: torch.Tensor, key: torch.Tensor, sizes: Sizes | None = None, query_name: str = "query"
    ) -> None:
        """Raises for tensors that do not fit query and key, and, where they are known, the sizes."""
        batch = sizes.batch if sizes is not None else query.shape[0] if query.dim() == 4 else None
        for name, descale in (("k_descale", self.k_descale), ("v_descale", self.v_descale)):
            if descale is not None:
                checks.per_kv_head(name, descale, key, batch, None if sizes is None else sizes.heads_kv)
        if self.alibi_slopes is not None:
            per_head("alibi_slopes", self.alibi_slopes, query, (1, 2), batch, query_name=query_name)
            if torch.is_grad_enabled() and self.alibi_slopes.requires_grad:
                raise ValueError("alibi_slopes takes no gradient: detach it, or use torch.no_grad()")
        if self.sinks is not None:
            per_head("sinks", self.sinks, query, (1,), query_name=query_name)
        if self.query_offsets is not None:
            checks.indices("query_offsets", self.query_offsets, (batch,), "int32 (batch,)", query)
        if self.rng_state is not None:
            checks.same_device("rng_state", self.rng_state, query_name, query)
        if query.is_cuda and not torch.compiler.is_compiling() and self.softcap > GPU_SOFTCAP_MAX:
            raise UnsupportedError(
                f"softcap is {self.softcap:.4g}; GPU kernels take up to {GPU_SOFTCAP_MAX:.4g}, as scores would lose "
                "accuracy beyond: if they are far below the cap, leave it out"
            )

    def drawn(self, query: torch.Tensor) -> Options:
        """With a state to draw the mask from, where there is dropout."""
        if not self.dropout_p or self.rng_state is not None:
            return self
        return self._replace(rng_state=draw_rng_state(query.device))

    def readable(self) -> Options:
        """With tensors as kernels read them."""
        alibi_slopes, sinks, query_offsets = self.alibi_slopes, self.sinks, self.query_offsets
        k_descale, v_descale = self.k_descale, self.v_descale
        tensors = alibi_slopes, sinks, query_offsets, self.rng_state, k_descale, v_descale
        if all([tensor is None for tensor in tensors]):
            return self
        return self._replace(
            alibi_slopes=None if alibi_slopes is None else _numbers(alibi_slopes),
            sinks=None if sinks is None else _numbers(sinks),
            k_descale=None if k_descale is None else k_descale.resolve_neg(),
            v_descale=None if v_descale is None else v_descale.resolve_neg(),
            query_offsets=None if query_offsets is None else readable_index(query_offsets, checks.INT32_MIN),
            rng_state=None if self.rng_state is None else self.rng_state.contiguous(),
        )


def _numbers(values: torch.Tensor) -> torch.Tensor:
    """As kernels read them. Memory has the other sign of lazily negated ones, as parts of complex numbers can be."""
    return values.detach().resolve_neg().to(torch.float32).contiguous()


# Read once, when the package is imported: a call should not pay for a look at the environment.
BATCH_INVARIANT = settings.flag("AITER_BATCH_INVARIANT")
NO_OPTIONS = Options(batch_invariant=BATCH_INVARIANT)


def readable_index(index: torch.Tensor, least: int = -1) -> torch.Tensor:
    """An index tensor as kernels read it: int32, the last dimension adjacent. What is below `least` is out of range."""
    if index.dtype is torch.int32:
        return index if index.stride(-1) == 1 else index.contiguous()
    readable = index.clamp(least, checks.INT32_MAX).to(torch.int32)  # what is out of range stays so
    if readable.stride(-1) != 1:
        readable = readable.contiguous()
    if not torch.compiler.is_compiling():
        checks.remember_given(readable, index)
    return readable


def strides_per_kv_head(scale: torch.Tensor | None) -> tuple[int, int]:
    """From sequence to sequence and from head to head, of what `checks.per_kv_head` takes."""
    if scale is None or scale.numel() == 1:
        return 0, 0
    return (0, scale.stride(0)) if scale.dim() == 1 else (scale.stride(0), scale.stride(1))


def one_mask(causal: bool, left: int, right: int, chunk: int = 0) -> tuple[bool, int, int]:
    """causal and window as kernels know them, one or the other: a window that limits nothing before a row's own key and
    everything after it is the causal mask, for which there is code already."""
    if causal:
        right = 0
    if left == NO_LIMIT and right == 0 and not chunk:
        return True, NO_LIMIT, NO_LIMIT
    return False, left, right


def read_options(causal: bool, keywords: OptionKeywords) -> tuple[bool, Options]:
    """The mask and the options that an operation's `causal` and keywords ask for; tensors are yet to be checked
    (`Options.check`). Raises TypeError and ValueError that name the keyword, for unknown ones too."""
    if not keywords:
        return causal, NO_OPTIONS
    checks.flag("causal", causal)
    unknown = [name for name in keywords if name not in _KNOWN]
    if unknown:
        raise TypeError(f"there is no option {', '.join(sorted(unknown))}; there are: {', '.join(_KNOWN)}")
    window = keywords.get("window_size", (NO_LIMIT, NO_LIMIT))
    chunk = chunk_in_range(keywords.get("attention_chunk", 0))
    causal, left, right = one_mask(causal, *_window(window), chunk)
    dropout_p = dropout_in_range(keywords.get("dropout_p", 0.0))
    batch_invariant, rng_state = keywords.get("batch_invariant"), keywords.get("rng_state")
    if rng_state is not None:
        check_rng_state(rng_state)
    return causal, Options(
        left,
        right,
        softcap_in_range(keywords.get("softcap", 0.0)),
        keywords.get("alibi_slopes"),
        keywords.get("sinks"),
        keywords.get("query_offsets"),
        BATCH_INVARIANT if batch_invariant is None else checks.flag("batch_invariant", batch_invariant),
        dropout_p,
        rng_state if dropout_p else None,
        chunk,
        keywords.get("k_descale"),
        keywords.get("v_descale"),
    )


def _window(value: object) -> tuple[int, int]:
    if not (isinstance(value, (tuple, list)) and len(value) == 2):
        raise TypeError(f"window_size must be a pair (left, right) of ints, -1 for no limit, not {value!r}")
    for side in value:
        if not checks.is_int(side):
            raise TypeError(f"window_size must be a pair of ints, not {value!r}")
        if not NO_LIMIT <= side <= checks.INT32_MAX:
            raise ValueError(
                f"window_size is {tuple(value)}; each side must be -1 (no limit), or from 0 to {checks.INT32_MAX}"
            )
    return value[0], value[1]


def dropout_in_range(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"dropout_p must be a float, 0.0 for none, not {type(value).__name__}")
    if not 0 <= value < 1:
        raise ValueError(f"dropout_p is {value}; it must be from 0 (none) to less than 1")
    return float(value)


def check_rng_state(value: object) -> None:
    state = checks.tensor("rng_state", value, 1, "int64 (2,)")
    if state.shape != (2,) or state.dtype != torch.int64:
        given = f"{state.dtype} {tuple(state.shape)}"
        raise ValueError(f"rng_state is {given}; it must be torch.int64 (2,): a seed and an offset")


def chunk_in_range(value: object) -> int:
    if not checks.is_int(value):
        raise TypeError(f"attention_chunk must be an int, 0 for none, not {type(value).__name__}")
    if not 0 <= value <= checks.INT32_MAX:
        raise ValueError(f"attention_chunk is {value}; it must be 0 (none), or from 1 to {checks.INT32_MAX}")
    return value


def softcap_in_range(value: object) -> float:
    if torch.compiler.is_compiling() and isinstance(value, float):
        return value  # perhaps a symbol; see checks.softmax_scale
    number = checks.finite("softcap", value, "a float, 0.0 for none")
    if number != 0 and not FLOAT32_TINY <= number <= SOFTCAP_MAX:
        raise ValueError(
            f"softcap is {value}; it must be 0 (none) or a positive number, "
            f"from {FLOAT32_TINY:.4g} to {SOFTCAP_MAX:.4g}"
        )
    return number


def per_head(
    name: str,
    value: object,
    query: torch.Tensor,
    ranks: tuple[int, ...],
    batch: int | None = None,
    query_name: str = "query",
) -> torch.Tensor:
    """Checks numbers of which each query head has one, or each head of each sequence."""
    layout = "(heads_q,)" if ranks == (1,) else "(heads_q,) or (batch, heads_q)"
    value = checks.tensor(name, value, ranks, layout)
    checks.same_device(name, value, query_name, query)
    if value.dtype not in checks.DTYPE_NAMES:
        raise TypeError(f"{name} has dtype {value.dtype}; it must be torch.float32 (or that of {query_name})")
    if value.shape[-1] != query.shape[-2] or (value.dim() == 2 and batch is not None and value.shape[0] != batch):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; it must be {layout}: {query_name} has {query.shape[-2]} heads"
            + ("" if batch is None else f", the batch size is {batch}")
        )
    return value
