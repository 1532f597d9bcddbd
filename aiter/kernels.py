"""Which kernels there are, and which one a problem needs: the specs that the runtime is asked for."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

from aiter.errors import UnsupportedDtypeError, UnsupportedError
from aiter.jit.arch import is_amd, is_gpu
from aiter.jit.spec import Spec

if TYPE_CHECKING:
    from aiter.layout import Sizes
    from aiter.options import Options

# head_dim is a multiple of the step up to the maximum, or, of queries and keys alone, that of latent attention: 512
# that are values too, and 64 that carry positions (DeepSeek's models).
HEAD_DIM_STEP, HEAD_DIM_MAX, LATENT_HEAD_DIM = 8, 512, 576

# Up to this many rows (query tokens times query heads of one KV head) the decoding kernel wins: it splits the KV
# sequence over the GPU and reads it once for all rows, where the forward kernel gives a tile of rows to one block.
DECODE_ROWS = 64
# Where the forward kernel can cut keys (below) this many: with more, mma.sync bounds the decoding kernel, not memory.
# Measured on an H200: docs/hopper.md.
CUT_DECODE_ROWS = 32

# Two kernels have a second form on this arch, which a call takes by its sizes; AMD GPUs have the forward kernel's.
FORMS_ARCH = "sm_90a"
# "cut": the forward kernel can cut the keys that a tile of rows sees and deal the pieces to several blocks:
# kernels_src/gpu/pieces.h, which says how. It pays where tiles of so many rows leave half of the multiprocessors idle,
# from so many keys on; elsewhere the other form is faster. gfx942's and gfx950's loops up to so many dimensions have
# tiles of twice as many rows: kernels_src/gpu/arch/gfx9_forward.h.
CUT_HEAD_DIM_MAX, CUT_TILE_ROWS, CUT_KEYS, ALTERNATING_HEAD_DIM_MAX = 256, 128, 2048, 128
# "rounds": latent attention goes through the keys two tiles at a time, which is faster with more rows of a KV head than
# this, a block's; with fewer memory is the bound, and one after the other is: kernels_src/gpu/arch/sm90_latent.h. Both
# in one kernel took half again as long to compile.
IN_TURN_ROWS = 64
FORMS = "cut", "rounds"

# 8-bit floats that caches of keys and values may hold, as specs name them: kernels_src/include/fp8.h.
CACHE_DTYPES = ("e4m3fn", "e4m3fnuz", "e5m2")

# What a spec says where one kernel serves all.
ANY_HEAD_DIM = 0


class Gpu(NamedTuple):
    """What decides between kernels and their forms on a GPU."""

    multiprocessors: int = 0  # 0: no kernel can cut keys
    decode_rows: int = DECODE_ROWS  # up to so many the decoding kernel is faster than one that cuts keys
    has_rounds: bool = False
    alternates: bool = False

    def tile_rows(self, head_dim: int) -> int:
        return CUT_TILE_ROWS * (2 if self.alternates and head_dim <= ALTERNATING_HEAD_DIM_MAX else 1)

    @classmethod
    def of(cls, arch: str, multiprocessors: int) -> Gpu:
        if not has_form("cut", "attention_forward", arch, HEAD_DIM_STEP, HEAD_DIM_STEP, ()):
            return cls()
        has_both = arch == FORMS_ARCH
        decode_rows = CUT_DECODE_ROWS if has_both else DECODE_ROWS
        return cls(multiprocessors, decode_rows, has_both, is_amd(arch) and arch != "gfx90a")


CUTS_NO_KEYS = Gpu()


def forward_kernel(
    sizes: Sizes, head_dim: int, options: Options, gpu: Gpu = CUTS_NO_KEYS, equal_lengths: bool = False
) -> str:
    """A GPU's, by the number of rows of one KV head in a sequence; the CPU has one kernel for all.

    gpu: CUTS_NO_KEYS where its kernel cannot cut those of such a call. equal_lengths: whether the sizes
    are those of each sequence; if not, the decoding kernel shares out the longest better.

    Latent attention has room for its tiles in the decoding kernel alone. Where bits may not depend on how a prompt was
    cut into calls, all of it takes one kernel. Dropout is of training: decoding knows none.
    """
    if head_dim > HEAD_DIM_MAX:
        if options.dropout_p:
            raise UnsupportedError(f"head_dim {head_dim} has no dropout on a GPU; up to {HEAD_DIM_MAX} it does")
        return "attention_decode"
    if options.batch_invariant or options.dropout_p:
        return "attention_forward"
    group = sizes.heads_q // sizes.heads_kv
    rows = sizes.seqlen_q * group
    if rows > DECODE_ROWS:
        return "attention_forward"
    if rows <= gpu.decode_rows or not gpu.multiprocessors or _heads_together(group, options) < group:
        return "attention_decode"
    if cuts_keys(sizes, head_dim, options, gpu):
        return "attention_forward"
    many = 2 * sizes.batch * sizes.heads_kv > gpu.multiprocessors
    return "attention_forward" if many and equal_lengths else "attention_decode"


def _heads_together(group: int, options: Options) -> int:
    """Query heads that share a tile of the forward kernel's rows, of the `group` that share a KV head: Packing in
    kernels_src/gpu/sequence.h."""
    return group & -group if options.alibi_slopes is None else 1


def cuts_keys(sizes: Sizes, head_dim: int, options: Options, gpu: Gpu) -> bool:
    """Whether a call of the forward kernel has few rows and many keys, on a GPU whose kernel can cut these.
    `batch_invariant` does not come into it: its keys are always cut (kernel_spec)."""
    tile_rows = gpu.tile_rows(head_dim)
    if sizes.batch * sizes.heads_q * sizes.seqlen_q > gpu.multiprocessors * (tile_rows // 2):
        return False  # most calls: no time is lost with them
    batch, heads_q, heads_kv, seqlen_q, seqlen_k, *_ = sizes
    together = _heads_together(heads_q // heads_kv, options)
    tiles = -(-seqlen_q * together // tile_rows) * (heads_q // together) * batch
    left, right = options.window_left, options.window_right
    seen = seqlen_k if min(left, right) < 0 else min(seqlen_k, left + right + seqlen_q)
    return 2 * tiles <= gpu.multiprocessors and seen >= CUT_KEYS


def form_of(kernel: str, sizes: Sizes, head_dim: int, options: Options, gpu: Gpu) -> str | None:
    """Which of FORMS a call takes on a GPU."""
    if kernel == "attention_forward":
        return "cut" if cuts_keys(sizes, head_dim, options, gpu) else None
    if head_dim <= HEAD_DIM_MAX or not gpu.has_rounds:
        return None
    rows = sizes.heads_q // sizes.heads_kv
    if not options.batch_invariant:  # or a token's bits would depend on how many are in its call
        rows *= sizes.seqlen_q
    return "rounds" if rows > IN_TURN_ROWS else None


def has_form(form: str, kernel: str, arch: str, head_dim: int, value_dim: int, options: Collection[str]) -> bool:
    """options: names of the spec's."""
    has_both = arch == FORMS_ARCH
    if "dropout" in options or (has_both and {*CACHE_DTYPES} & {*options}):
        return False
    if form == "cut":
        fits = max(head_dim, value_dim) <= CUT_HEAD_DIM_MAX
        return kernel == "attention_forward" and fits and (has_both or is_amd(arch))
    return kernel == "attention_decode" and head_dim > HEAD_DIM_MAX and has_both


def kernel_spec(
    kernel: str,
    dtype: str,
    head_dim: int,
    causal: bool,
    arch: str,
    paged: bool = False,
    value_dim: int | None = None,
    options: tuple[str, ...] = (),
) -> Spec:
    """options: which of the call's options select code (Options.that_select_code), which of CACHE_DTYPES keys and
    values have, if any, and which of FORMS is wanted, where there is one.

    With batch_invariant that is always the one that cuts keys: sums of pieces have other bits, and a prompt, its chunks
    and single tokens are to agree.
    """
    if is_gpu(arch) and kernel == "attention_backward" and head_dim > HEAD_DIM_MAX:
        raise UnsupportedError(
            f"head_dim {head_dim} has no backward pass on {arch}: its tiles do not fit; up to {HEAD_DIM_MAX} they do"
        )
    if is_gpu(arch) and dtype == "fp32":
        raise UnsupportedDtypeError(f"fp32 is not supported on {arch}; supported there: fp16, bf16 (fp32 on CPUs)")
    chosen = dict.fromkeys(options, 1)
    if "batch_invariant" in options and (is_gpu(arch) or kernel != "attention_forward"):
        del chosen["batch_invariant"]  # a number of the call there
        chosen["cut"] = 1
    for form in FORMS:
        if form in chosen and not has_form(form, kernel, arch, head_dim, value_dim or head_dim, chosen):
            del chosen[form]
    if paged and is_gpu(arch):
        chosen["paged"] = 1
    if value_dim not in (None, head_dim):
        chosen["value_dim"] = value_dim
    return Spec(kernel, dtype, head_dim, causal, arch, tuple(sorted(chosen.items())))


def forms(
    kernel: str,
    dtype: str,
    head_dim: int,
    causal: bool,
    arch: str,
    paged: bool = False,
    value_dim: int | None = None,
    options: tuple[str, ...] = (),
) -> list[Spec]:
    """The specs that calls of one kernel can need, whatever their sizes."""
    rest = kernel, dtype, head_dim, causal, arch, paged, value_dim
    wanted = [(), *((form,) for form in FORMS)]
    return list(dict.fromkeys(kernel_spec(*rest, (*options, *form)) for form in wanted))


# The public operations, and with which kinds of keys and values each is called: in pages or not. The last attends to
# none: it writes them, which `aiter.flash_attn.flash_attn_with_kvcache` does too.
OPERATIONS = {
    "flash_attn_func": (False,),
    "flash_attn_with_kvcache": (True,),
    "grouped_query_attention": (False,),
    "multi_query_attention": (False,),
    "variable_length_attention": (False, True),
    "reshape_and_cache": (),
}


def specs_for(
    operation: str,
    dtype: str,
    head_dim: int,
    causal: bool,
    arch: str,
    backward: bool = False,
    value_dim: int | None = None,
    options: tuple[str, ...] = (),
    cache_dtype: str | None = None,
) -> list[Spec]:
    """Every spec that calls of a public operation can need on `arch`: what `aiter prewarm` builds for it.

    options: "alibi", "batch_invariant", "chunk", "dropout", "softcap", "window" where the calls have them. A window
    says what is causal itself, and chunks are built with one. cache_dtype: one of CACHE_DTYPES, or None: keys and
    values have the dtype of queries.
    """
    kept = () if cache_dtype is None else (cache_dtype,)
    if operation == "reshape_and_cache":
        return [kernel_spec("cache_write", dtype, ANY_HEAD_DIM, False, arch, options=kept)]
    if "chunk" in options:
        options = tuple(sorted({*options, "window"}))
    causal = causal and "window" not in options
    fits = head_dim <= HEAD_DIM_MAX or not is_gpu(arch)
    kernels = ["attention_forward"] if fits else []
    kernels += ["attention_decode"] if is_gpu(arch) and "dropout" not in options else []
    shape = dtype, head_dim, causal, arch
    specs = [
        spec
        for paged in OPERATIONS[operation]
        for kernel in kernels
        for spec in forms(kernel, *shape, paged, value_dim, (*options, *kept))
    ]
    if backward and fits and not kept and False in OPERATIONS[operation]:
        specs.append(kernel_spec("attention_backward", *shape, False, value_dim, options))
    return list(dict.fromkeys(specs))
