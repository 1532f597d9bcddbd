"""Every GPU kernel compiles for NVIDIA GPUs from the same source: nvcc needs no GPU for that."""

import pytest

from aiter.jit.cache import Cache
from aiter.jit.loader import load
from aiter.jit.recipe import recipe_for
from aiter.jit.spec import Spec
from aiter.jit.toolchain import NvccToolchain

pytestmark = pytest.mark.skipif(NvccToolchain().find() is None, reason="no nvcc: set AITER_NVCC or put it on PATH")
PAGED = (("paged", 1),)
ALL = (("alibi", 1), ("softcap", 1))
TRAINED = (("alibi", 1), ("chunk", 1), ("dropout", 1), ("softcap", 1))


@pytest.mark.parametrize(
    "spec",
    (
        Spec("attention_forward", "bf16", 128, True, "sm_90a"),
        Spec("attention_forward", "bf16", 256, False, "sm_90a", (("cut", 1), *PAGED, ("window", 1))),
        Spec("attention_forward", "fp16", 64, False, "sm_80", PAGED),
        Spec("attention_decode", "bf16", 128, False, "sm_90a", PAGED),
        Spec("attention_decode", "fp16", 40, True, "sm_80"),
        Spec("attention_backward", "bf16", 128, True, "sm_90a"),
        Spec("attention_backward", "fp16", 64, False, "sm_80", (("dropout", 1),)),
        Spec("attention_backward", "bf16", 64, True, "sm_90a", (("dropout", 1),)),
        Spec("attention_backward", "bf16", 256, True, "sm_90a", (("softcap", 1),)),
        Spec("attention_backward", "fp16", 512, False, "sm_90a"),
        # every option, on a GPU with little shared memory
        Spec("attention_forward", "bf16", 192, False, "sm_86", (*TRAINED, ("value_dim", 128), ("window", 1))),
        Spec("attention_decode", "fp16", 512, False, "sm_86", (*ALL[:1], *PAGED, *ALL[1:], ("window", 1))),
        Spec("attention_backward", "bf16", 96, False, "sm_86", (*TRAINED, ("value_dim", 64), ("window", 1))),
        # 8-bit keys and values: converted by an instruction and by bits
        Spec("attention_decode", "bf16", 128, False, "sm_90a", (("e4m3fn", 1), *PAGED)),
        Spec("attention_forward", "bf16", 128, True, "sm_90a", (("e4m3fn", 1), *PAGED)),
        Spec("attention_decode", "fp16", 576, True, "sm_80", (("e4m3fnuz", 1), *PAGED, ("value_dim", 512))),
        Spec("attention_decode", "bf16", 576, True, "sm_90a", (*PAGED, ("value_dim", 512))),
        Spec("attention_decode", "bf16", 576, False, "sm_90a", (("rounds", 1), ("value_dim", 512))),
        Spec("attention_forward", "bf16", 64, True, "sm_80", (("e5m2", 1),)),
        Spec("cache_write", "bf16", 0, False, "sm_80", (("e4m3fn", 1),)),
    ),
    ids=lambda spec: spec.name,
)
def test_builds(spec):
    with Cache().obtain(recipe_for(spec)) as entry:
        assert 10_000 < entry.library.stat().st_size < 300_000, "a copy of CUDA's runtime has a megabyte"
        load(spec, entry.library)  # lacks no function, of whatever runtime, and needs no driver yet
