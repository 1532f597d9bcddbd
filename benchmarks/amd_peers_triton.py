"""Compiles a Triton kernel that amd_peers.py names, without a GPU; run by an interpreter that has Triton.

    python benchmarks/amd_peers_triton.py SOURCE TARGET ARCH HEAD_DIM SEQ BLOCK_N WAVES_PER_EU

SOURCE: HipKittens' analysis/baselines/attn/triton_baseline_v02.py. Its host code asks for a GPU when it is imported, so
only the functions up to the forward kernel are taken, without the autotuner, whose choice is given here.
"""

import importlib.util
import inspect
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

FLAGS = (
    "PERSISTENT", "PERSISTENT_DYNAMIC", "VARLEN", "PRE_LOAD_V", "USE_BIAS", "ENABLE_DROPOUT", "RETURN_ENCODED_SOFTMAX",
    "USE_ALIBI", "INT8", "USE_P_SCALE", "INT8_KV",
)  # fmt: skip
ABSENT = (
    "bias", "Q_descale", "K_descale", "P_scale", "P_descale", "V_descale", "cu_seqlens_q", "cu_seqlens_k",
    "atomic_counter", "encoded_softmax", "alibi_slopes",
)  # fmt: skip
UNIT_STRIDES = ("stride_qk", "stride_kk", "stride_vn", "stride_on")


def forward_kernel(source: Path, folder: str):
    text = source.read_text()
    begin, kernel = text.index("def get_gfx_version"), text.index("@triton.jit\ndef attn_fwd(")
    end = text.index("@triton.jit\n", kernel + 1)
    path = Path(folder) / "kernel.py"
    functions = text[text.index("@triton.jit\ndef cdiv_fn") : begin]
    path.write_text("import triton\nimport triton.language as tl\n\n\n" + functions + text[kernel:end])
    spec = importlib.util.spec_from_file_location("kernel", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.attn_fwd


def main() -> None:
    source, target, arch, *numbers = sys.argv[1:]
    head_dim, seq, block_n, waves = map(int, numbers)
    with tempfile.TemporaryDirectory() as folder:
        kernel = forward_kernel(Path(source), folder)
        names = list(inspect.signature(kernel.fn).parameters)
        constants = dict.fromkeys(FLAGS, False) | dict.fromkeys(ABSENT) | dict.fromkeys(UNIT_STRIDES, 1)
        constants |= {"SM_SCALE": head_dim**-0.5, "NUM_CU": 304, "GRID_CU_MULTIP": 2, "B": 1, "HQ": 1, "HK": 1}
        constants |= {"ACTUAL_BLOCK_DMODEL": head_dim, "BLOCK_DMODEL": head_dim, "BLOCK_M": 128, "BLOCK_N": block_n}
        constants |= {"MAX_SEQLENS_Q": seq, "MAX_SEQLENS_K": seq, "IS_CAUSAL": True}
        types = {"L": "*fp32", "dropout_p": "fp32"} | dict.fromkeys(("Q", "K", "V", "Out"), "*bf16")
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        aligned = [i for i, name in enumerate(names) if signature[name][0] == "*" or name.startswith("stride")]
        built = triton.compile(
            ASTSource(
                fn=kernel,
                signature=signature,
                constexprs={(names.index(name),): value for name, value in constants.items()},
                attrs={(i,): [["tt.divisibility", 16]] for i in aligned if signature[names[i]] != "constexpr"},
            ),
            target=GPUTarget("hip", arch, 64),
            options={"num_warps": 4, "num_stages": 1, "waves_per_eu": waves},
        )
        Path(target).write_bytes(built.asm["hsaco"])


if __name__ == "__main__":
    main()
