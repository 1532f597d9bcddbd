"""Matrix instructions: every shape's products, and where each element lies, against AMD's own tables.

`PLACES` holds coordinates that AMD's matrix instruction calculator prints (and for gfx950, which it does not know, the
ones that follow from the same rule with 8 values a lane). `layout` below is the rule; the emulator has its own.
"""

# ruff: noqa: E501 (tables: one case a line)

import re

import emulator
import numpy as np
import pytest
from emulator import assembly
from emulator.assembly import LANES, Snippet

# (arch, instruction): places of A[i][k] and D[i][j], each (i, k or j, block, place): register{lane}.[bits].
PLACES = {
    ("gfx942", "v_mfma_f32_32x32x8_f16"): (((1, 7, 0, 'v1{33}.[31:16]'), (31, 4, 0, 'v0{63}.[15:0]'), (17, 0, 0, 'v0{17}.[15:0]')), ((1, 31, 0, 'v1{31}'), (31, 16, 0, 'v15{48}'), (17, 3, 0, 'v9{3}'))),
    ("gfx942", "v_mfma_f32_16x16x16_bf16"): (((1, 15, 0, 'v1{49}.[31:16]'), (15, 8, 0, 'v0{47}.[15:0]'), (9, 0, 0, 'v0{9}.[15:0]')), ((1, 15, 0, 'v1{15}'), (15, 8, 0, 'v3{56}'), (9, 3, 0, 'v1{35}'))),
    ("gfx942", "v_mfma_f32_32x32x4_2b_f16"): (((1, 3, 1, 'v1{33}.[31:16]'), (31, 2, 0, 'v1{31}.[15:0]'), (17, 0, 1, 'v0{49}.[15:0]')), ((1, 31, 1, 'v17{31}'), (31, 16, 0, 'v15{48}'), (17, 3, 1, 'v25{3}'))),
    ("gfx942", "v_mfma_f32_16x16x4_4b_f16"): (((1, 3, 3, 'v1{49}.[31:16]'), (15, 2, 0, 'v1{15}.[15:0]'), (9, 0, 2, 'v0{41}.[15:0]')), ((1, 15, 3, 'v13{15}'), (15, 8, 0, 'v3{56}'), (9, 3, 2, 'v9{35}'))),
    ("gfx942", "v_mfma_f32_4x4x4_16b_f16"): (((1, 3, 15, 'v1{61}.[31:16]'), (3, 2, 0, 'v1{3}.[15:0]'), (3, 0, 8, 'v0{35}.[15:0]')), ((1, 3, 15, 'v1{63}'), (3, 2, 0, 'v3{2}'), (3, 3, 8, 'v3{35}'))),
    ("gfx942", "v_mfma_f32_32x32x2_f32"): (((1, 1, 0, 'v0{33}'), (31, 1, 0, 'v0{63}'), (17, 0, 0, 'v0{17}')), ((1, 31, 0, 'v1{31}'), (31, 16, 0, 'v15{48}'), (17, 3, 0, 'v9{3}'))),
    ("gfx942", "v_mfma_f32_16x16x4_f32"): (((1, 3, 0, 'v0{49}'), (15, 2, 0, 'v0{47}'), (9, 0, 0, 'v0{9}')), ((1, 15, 0, 'v1{15}'), (15, 8, 0, 'v3{56}'), (9, 3, 0, 'v1{35}'))),
    ("gfx942", "v_mfma_f32_32x32x1_2b_f32"): (((1, 0, 1, 'v0{33}'), (31, 0, 0, 'v0{31}'), (17, 0, 1, 'v0{49}')), ((1, 31, 1, 'v17{31}'), (31, 16, 0, 'v15{48}'), (17, 3, 1, 'v25{3}'))),
    ("gfx942", "v_mfma_i32_32x32x16_i8"): (((1, 15, 0, 'v1{33}.[31:24]'), (31, 8, 0, 'v0{63}.[7:0]'), (17, 0, 0, 'v0{17}.[7:0]')), ((1, 31, 0, 'v1{31}'), (31, 16, 0, 'v15{48}'), (17, 3, 0, 'v9{3}'))),
    ("gfx942", "v_mfma_i32_16x16x32_i8"): (((1, 31, 0, 'v1{49}.[31:24]'), (15, 16, 0, 'v0{47}.[7:0]'), (9, 0, 0, 'v0{9}.[7:0]')), ((1, 15, 0, 'v1{15}'), (15, 8, 0, 'v3{56}'), (9, 3, 0, 'v1{35}'))),
    ("gfx90a", "v_mfma_f32_32x32x8f16"): (((1, 7, 0, 'v1{33}.[31:16]'), (31, 4, 0, 'v0{63}.[15:0]'), (17, 0, 0, 'v0{17}.[15:0]')), ((1, 31, 0, 'v1{31}'), (31, 16, 0, 'v15{48}'), (17, 3, 0, 'v9{3}'))),
    ("gfx90a", "v_mfma_f32_16x16x16bf16_1k"): (((1, 15, 0, 'v1{49}.[31:16]'), (15, 8, 0, 'v0{47}.[15:0]'), (9, 0, 0, 'v0{9}.[15:0]')), ((1, 15, 0, 'v1{15}'), (15, 8, 0, 'v3{56}'), (9, 3, 0, 'v1{35}'))),
    ("gfx90a", "v_mfma_f32_32x32x4bf16"): (((1, 3, 0, 'v0{33}.[31:16]'), (31, 2, 0, 'v0{63}.[15:0]'), (17, 0, 0, 'v0{17}.[15:0]')), ((1, 31, 0, 'v1{31}'), (31, 16, 0, 'v15{48}'), (17, 3, 0, 'v9{3}'))),
    ("gfx90a", "v_mfma_i32_16x16x16i8"): (((1, 15, 0, 'v0{49}.[31:24]'), (15, 8, 0, 'v0{47}.[7:0]'), (9, 0, 0, 'v0{9}.[7:0]')), ((1, 15, 0, 'v1{15}'), (15, 8, 0, 'v3{56}'), (9, 3, 0, 'v1{35}'))),
    ("gfx950", "v_mfma_f32_32x32x16_f16"): (((1, 15, 0, 'v3{33}.[31:16]'), (31, 8, 0, 'v0{63}.[15:0]')), ((1, 31, 0, 'v1{31}'), (31, 16, 0, 'v15{48}'))),
    ("gfx950", "v_mfma_f32_32x32x16_bf16"): (((1, 15, 0, 'v3{33}.[31:16]'), (31, 8, 0, 'v0{63}.[15:0]')), ((1, 31, 0, 'v1{31}'), (31, 16, 0, 'v15{48}'))),
    ("gfx950", "v_mfma_f32_16x16x32_f16"): (((1, 31, 0, 'v3{49}.[31:16]'), (15, 16, 0, 'v0{47}.[15:0]')), ((1, 15, 0, 'v1{15}'), (15, 8, 0, 'v3{56}'))),
    ("gfx950", "v_mfma_f32_16x16x32_bf16"): (((1, 31, 0, 'v3{49}.[31:16]'), (15, 16, 0, 'v0{47}.[15:0]')), ((1, 15, 0, 'v1{15}'), (15, 8, 0, 'v3{56}'))),
    ("gfx950", "v_mfma_f32_32x32x8_f16"): (((1, 7, 0, 'v1{33}.[31:16]'),), ((31, 16, 0, 'v15{48}'),)),
    ("gfx950", "v_mfma_f32_16x16x16_bf16"): (((1, 15, 0, 'v1{49}.[31:16]'),), ((9, 3, 0, 'v1{35}'),)),
}  # fmt: skip
# Cycles of the same tables; gfx950 from its peak rate.
CYCLES = {
    "v_mfma_f32_32x32x8_f16": 32, "v_mfma_f32_16x16x16_bf16": 16, "v_mfma_f32_32x32x8f16": 64,
    "v_mfma_f32_16x16x16bf16_1k": 32, "v_mfma_f32_32x32x4_2b_f16": 64, "v_mfma_f32_4x4x4_16b_f16": 8,
    "v_mfma_f32_32x32x2_f32": 64, "v_mfma_f32_32x32x16_f16": 32, "v_mfma_f32_16x16x32_bf16": 16,
}  # fmt: skip


class Shape:
    def __init__(self, name: str):
        self.name = name
        self.m, self.n, self.k = map(int, re.search(r"(\d+)x(\d+)x(\d+)", name).groups())
        self.type = re.search(r"(bf16|f16|f32|i8)(_1k)?$", name)[1]
        blocks = re.search(r"_(\d+)b_", name)
        self.blocks = int(blocks[1]) if blocks else 1
        self.values = self.m * self.k * self.blocks // LANES
        self.bytes = {"f32": 4, "i8": 1}.get(self.type, 2)
        self.accumulators = self.m * self.n * self.blocks // LANES

    def input_place(self, i: int, k: int, block: int) -> tuple[int, int]:
        """Lane and position in its values of A[i][k], and of B[k][i]."""
        group = block if self.blocks > 1 else k // self.values
        return group * self.m + i, k % self.values

    def output_place(self, i: int, j: int, block: int) -> tuple[int, int]:
        """Lane and register of D[i][j]."""
        groups = LANES // self.n
        if self.m == 4:
            return block * self.n + j, i
        first = block * (self.m * self.n // LANES)
        return i // 4 % groups * self.n + j, first + i // (4 * groups) * 4 + i % 4


@pytest.mark.parametrize("arch, name", PLACES)
def test_the_rule_of_this_test_is_amds(arch, name):
    shape = Shape(name)
    for i, k, block, place in PLACES[arch, name][0]:
        register, lane, high = re.match(r"v(\d+)\{(\d+)\}(?:\.\[(\d+):)?", place).groups()
        position = int(register) * (4 // shape.bytes) + (int(high) // (8 * shape.bytes) if high else 0)
        assert shape.input_place(i, k, block) == (int(lane), position), place
    for i, j, block, place in PLACES[arch, name][1]:
        register, lane = re.match(r"v(\d+)\{(\d+)\}", place).groups()
        assert shape.output_place(i, j, block) == (int(lane), int(register)), place


def body(shape: Shape, window: int) -> str:
    words = shape.values * shape.bytes // 4
    operands = [f"v[{first}:{first + words - 1}]" if words > 1 else f"v{first}" for first in (8, 12)]
    a = f"a[0:{shape.accumulators - 1}]"
    reads = [f"v_accvgpr_read_b32 v{16 + i}, a{window + i}" for i in range(min(8, shape.accumulators))]
    return "\n".join(["s_nop 1", f"{shape.name} {a}, {operands[0]}, {operands[1]}, 0", "s_nop 1",
                      f"{shape.name} {a}, {operands[0]}, {operands[1]}, {a}", "s_nop 15", "s_nop 7", *reads])  # fmt: skip


def encoded(values: np.ndarray, kind: str) -> np.ndarray:
    """(lanes, values) of small whole numbers as words."""
    if kind == "f32":
        return values.astype(np.float32).view(np.uint32)
    if kind == "i8":
        return values.astype(np.int8).view(np.uint32)
    if kind == "f16":
        return values.astype(np.float16).view(np.uint32)
    return np.ascontiguousarray((values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)).view(np.uint32)


@pytest.fixture(scope="module")
def code():
    """One code object for each arch, with all its shapes and windows of 8 registers."""
    made = {}

    def get(arch: str) -> bytes:
        if arch not in made:
            if reason := assembly.missing(arch):
                pytest.skip(reason)
            shapes = [Shape(name) for a, name in PLACES if a == arch]
            made[arch] = assembly.code_object(arch, [Snippet(f"k_{shape.name}_{window}", body(shape, window))
                                                     for shape in shapes for window in range(0, shape.accumulators, 8)])  # fmt: skip
        return made[arch]

    return get


@pytest.mark.parametrize("arch, name", PLACES)
def test_products(arch, name, code):
    """Twice the product of two random matrices, from the registers where the tables say that its elements are."""
    shape = Shape(name)
    rng = np.random.default_rng(5)
    a = rng.integers(-8, 9, (shape.blocks, shape.m, shape.k))
    b = rng.integers(-8, 9, (shape.blocks, shape.k, shape.n))
    places = np.zeros((2, LANES, shape.values), np.int64)
    for block in range(shape.blocks):
        for k in range(shape.k):
            for i in range(shape.m):
                lane, position = shape.input_place(i, k, block)
                places[0, lane, position], places[1, lane, position] = a[block, i, k], b[block, k, i]
    words = np.zeros((LANES, 8), np.uint32)
    for side in range(2):
        encoded_side = encoded(places[side], shape.type).reshape(LANES, -1)
        words[:, 4 * side : 4 * side + encoded_side.shape[1]] = encoded_side
    got = np.zeros((LANES, shape.accumulators), np.uint32)
    with emulator.session(arch) as gpu:
        for window in range(0, shape.accumulators, 8):
            count = min(8, shape.accumulators - window)
            got[:, window : window + count] = assembly.run(gpu, code(arch), f"k_{name}_{window}", words)[:, :count]
            stats = gpu.stats()[f"k_{name}_{window}"]["total"]
            assert stats["cycles"]["matrix"] == 2 * CYCLES.get(name, stats["cycles"]["matrix"] / 2)
    values = got.view(np.int32 if shape.type == "i8" else np.float32)
    product = 2 * a @ b
    for block in range(shape.blocks):
        for i in range(shape.m):
            for j in range(shape.n):
                lane, register = shape.output_place(i, j, block)
                assert values[lane, register] == product[block, i, j], (block, i, j)


@pytest.mark.parametrize(
    "arch, name, flushes", [("gfx90a", "v_mfma_f32_32x32x8f16", True), ("gfx942", "v_mfma_f32_32x32x8_f16", False)]
)
def test_denormal_inputs(arch, name, flushes, code):
    """CDNA2 takes denormal 16-bit inputs as zero (PyTorch's notes on numerical accuracy), CDNA3 does not."""
    words = np.zeros((LANES, 8), np.uint32)
    words[:, 0] = 0x0001  # 2^-24
    words[:, 4] = 0x6400  # 1024
    with emulator.session(arch) as gpu:
        got = assembly.run(gpu, code(arch), f"k_{name}_0", words).view(np.float32)
    assert np.all(got[:, 0] == (0 if flushes else 2 * 2 * 2.0**-14))
