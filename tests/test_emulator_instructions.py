"""What single instructions compute, against definitions in NumPy: vector, scalar, cross-lane, LDS and memory.

Each case is an assembled snippet: words 0 to 7 of a lane's input stand in v[8:15], what it leaves in v[16:23] comes out.
Definitions: chapter "Instructions" of AMD's ISA documents for MI200, MI300 and CDNA4.
"""

# ruff: noqa: E501 (tables: one case a line)

import emulator
import numpy as np
import pytest
from emulator import assembly
from emulator.assembly import LANES, Snippet

u32, i32, f32, u64, i64, f64, f16 = np.uint32, np.int32, np.float32, np.uint64, np.int64, np.float64, np.float16
M32 = u64(0xFFFFFFFF)


def special_floats() -> np.ndarray:
    values = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        3.5,
        -2.5,
        1e-40,
        -1e-40,
        65504.0,
        1e30,
        -1e30,
        np.inf,
        -np.inf,
        np.nan,
        2.0**-126,
    ]
    rng = np.random.default_rng(7)
    return np.concatenate([np.array(values, f32), rng.normal(0, 4, LANES - len(values)).astype(f32)])


def inputs(kind: str) -> np.ndarray:
    """(lanes, 8) words: "float" special values in many pairings, "integer" any bits, "half" packed 16-bit floats."""
    rng = np.random.default_rng(11)
    if kind == "integer":
        words = rng.integers(0, 2**32, (LANES, 8), dtype=u64).astype(u32)
        words[:8, 0] = [0, 1, 0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, 31, 32, 0xFFFF]
        words[4:12, 1] = [0, 1, 0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, 31, 32, 0xFFFF]
        return words
    if kind == "float":
        base = special_floats()
        return np.stack([np.roll(base, 5 * column * (column + 1) // 2) for column in range(8)], 1).view(u32)
    halves = rng.normal(0, 3, (LANES, 16)).astype(f16)
    halves[:6, 0] = [0.0, -0.0, np.inf, 65504.0, 6e-8, 1.0]
    return halves.view(u32)


def fl(x):
    return x.view(f32)


def double(low, high):
    return (low.astype(u64) | high.astype(u64) << u64(32)).view(f64)


def halves(x):
    return x.copy().view(f16).reshape(-1, 2)


def packed(x):
    return np.ascontiguousarray(x.astype(f16)).view(u32).reshape(-1)


def bits(mask) -> int:
    return sum(1 << lane for lane in range(len(mask)) if mask[lane])


def flush(x):
    return np.where(np.abs(x) < f32(2.0**-126), np.copysign(f32(0), x), x)


def bf16(x):
    words = x.view(u32).astype(u64)
    rounded = (words + u64(0x7FFF) + (words >> u64(16) & u64(1))) >> u64(16)
    return np.where(np.isnan(x), words >> u64(16) | u64(0x40), rounded).astype(u32) & u32(0xFFFF)


with np.errstate(all="ignore"):
    # name: (kind of input, assembly, expected v16 (or a tuple of registers) from the columns a, b, c, ...)
    INTEGER = {
        "add": ("v_add_u32 v16, v8, v9", lambda a, b, c: a + b),
        "sub": ("v_sub_u32 v16, v8, v9", lambda a, b, c: a - b),
        "subrev": ("v_subrev_u32 v16, v8, v9", lambda a, b, c: b - a),
        "mul_lo": ("v_mul_lo_u32 v16, v8, v9", lambda a, b, c: a * b),
        "mul_hi": ("v_mul_hi_u32 v16, v8, v9", lambda a, b, c: a.astype(u64) * b >> u64(32)),
        "mul_hi_signed": ("v_mul_hi_i32 v16, v8, v9", lambda a, b, c: (a.view(i32).astype(i64) * b.view(i32) >> i64(32)).astype(u32)),
        "mul24": ("v_mul_u32_u24 v16, v8, v9", lambda a, b, c: (a & u32(0xFFFFFF)) * (b & u32(0xFFFFFF))),
        "mad24": ("v_mad_u32_u24 v16, v8, v9, v10", lambda a, b, c: (a & u32(0xFFFFFF)) * (b & u32(0xFFFFFF)) + c),
        "add3": ("v_add3_u32 v16, v8, v9, v10", lambda a, b, c: a + b + c),
        "lshl_add": ("v_lshl_add_u32 v16, v8, v9, v10", lambda a, b, c: (a << (b & u32(31))) + c),
        "add_lshl": ("v_add_lshl_u32 v16, v8, v9, v10", lambda a, b, c: (a + b) << (c & u32(31))),
        "lshl_or": ("v_lshl_or_b32 v16, v8, 7, v10", lambda a, b, c: (a << u32(7)) | c),
        "and_or": ("v_and_or_b32 v16, v8, v9, v10", lambda a, b, c: (a & b) | c),
        "or3": ("v_or3_b32 v16, v8, v9, v10", lambda a, b, c: a | b | c),
        "bfi": ("v_bfi_b32 v16, v8, v9, v10", lambda a, b, c: (a & b) | (~a & c)),
        "bfe_u": ("v_bfe_u32 v16, v8, 5, 9", lambda a, b, c: a >> u32(5) & u32(511)),
        "bfe_i": ("v_bfe_i32 v16, v8, 5, 9", lambda a, b, c: ((a << u32(18)).view(i32) >> i32(23)).view(u32)),
        "alignbit": ("v_alignbit_b32 v16, v8, v9, v10",
                     lambda a, b, c: ((a.astype(u64) << u64(32) | b) >> (c & u32(31)).astype(u64)) & M32),
        "perm": ("s_mov_b32 s10, 0x07060302\n v_perm_b32 v16, v8, v9, s10", lambda a, b, c: a & u32(0xFFFF0000) | b >> u32(16)),
        "shl": ("v_lshlrev_b32 v16, v8, v9", lambda a, b, c: b << (a & u32(31))),
        "shr": ("v_lshrrev_b32 v16, v8, v9", lambda a, b, c: b >> (a & u32(31))),
        "ashr": ("v_ashrrev_i32 v16, v8, v9", lambda a, b, c: (b.view(i32) >> (a & u32(31)).view(i32)).view(u32)),
        "xnor": ("v_xnor_b32 v16, v8, v9", lambda a, b, c: ~(a ^ b)),
        "min_i": ("v_min_i32 v16, v8, v9", lambda a, b, c: np.minimum(a.view(i32), b.view(i32)).view(u32)),
        "max_u": ("v_max_u32 v16, v8, v9", lambda a, b, c: np.maximum(a, b)),
        "med3": ("v_med3_i32 v16, v8, v9, v10", lambda a, b, c: np.median(np.stack([x.view(i32).astype(i64) for x in (a, b, c)]), 0).astype(i64) & 0xFFFFFFFF),
        "bfrev": ("v_bfrev_b32 v16, v8", lambda a, b, c: np.array([int(f"{int(x):032b}"[::-1], 2) for x in a], u32)),
        "ffbh": ("v_ffbh_u32 v16, v8", lambda a, b, c: np.array([32 - int(x).bit_length() if x else 0xFFFFFFFF for x in a], u32)),
        "ffbl": ("v_ffbl_b32 v16, v8", lambda a, b, c: np.array([(int(x) & -int(x)).bit_length() - 1 if x else 0xFFFFFFFF for x in a], u32)),
        "bcnt": ("v_bcnt_u32_b32 v16, v8, v9", lambda a, b, c: np.array([bin(int(x)).count("1") for x in a], u32) + b),
        "mbcnt": ("s_mov_b32 s10, 0x0f0f0f0f\n v_mbcnt_lo_u32_b32 v16, s10, 0\n v_mbcnt_hi_u32_b32 v16, s10, v16",
                  lambda a, b, c: np.array([bin(0x0F0F0F0F0F0F0F0F & ((1 << lane) - 1)).count("1") for lane in range(64)], u32)),
        "add_carry": ("v_add_co_u32 v16, vcc, v8, v10\n s_nop 1\n v_addc_co_u32 v17, vcc, v9, v11, vcc",
                      lambda a, b, c, d: _words((a.astype(u64) | b.astype(u64) << u64(32)) + (c.astype(u64) | d.astype(u64) << u64(32)))),
        "mad64": ("v_mad_u64_u32 v[16:17], vcc, v8, v9, v[10:11]",
                  lambda a, b, c, d: _words(a.astype(u64) * b + (c.astype(u64) | d.astype(u64) << u64(32)))),
        "shl64": ("v_lshlrev_b64 v[16:17], 13, v[8:9]", lambda a, b, c: _words((a.astype(u64) | b.astype(u64) << u64(32)) << u64(13))),
        "literal": ("v_and_b32 v16, 0x12345678, v8", lambda a, b, c: a & u32(0x12345678)),
        "negative_constant": ("v_add_u32 v16, -7, v8", lambda a, b, c: a - u32(7)),
        "cmp_select": ("v_cmp_lt_i32 vcc, v8, v9\n s_nop 1\n v_cndmask_b32 v16, v10, v11, vcc",
                       lambda a, b, c, d: np.where(a.view(i32) < b.view(i32), d, c)),
        "sdwa": ("v_add_u32_sdwa v16, v8, v9 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:BYTE_1 src1_sel:WORD_1",
                 lambda a, b, c: (a >> u32(8) & u32(255)) + (b >> u32(16))),
        "sad": ("v_sad_u8 v16, v8, v9, v10", lambda a, b, c: c + sum(abs((a >> u32(s) & u32(255)).astype(i64) - (b >> u32(s) & u32(255)).astype(i64)) for s in (0, 8, 16, 24)).astype(u32)),
        "dot4": ("v_dot4_i32_i8 v16, v8, v9, v10", lambda a, b, c: (c.view(i32) + (a.copy().view(np.int8).reshape(-1, 4).astype(i32) * b.copy().view(np.int8).reshape(-1, 4)).sum(1, dtype=i32)).view(u32)),
        "pk_add_u16": ("v_pk_add_u16 v16, v8, v9", lambda a, b, c: (a.copy().view(np.uint16) + b.copy().view(np.uint16)).view(u32)),
        "pk_swapped": ("v_pk_sub_i16 v16, v8, v9 op_sel:[0,1] op_sel_hi:[1,0]",
                       lambda a, b, c: (a.copy().view(np.uint16) - (b >> u32(16) | b << u32(16)).view(np.uint16)).view(u32)),
        "cvt_f32_u32": ("v_cvt_f32_u32 v16, v8", lambda a, b, c: a.astype(f32).view(u32)),
        "cvt_f32_i32": ("v_cvt_f32_i32 v16, v8", lambda a, b, c: a.view(i32).astype(f32).view(u32)),
        "ubyte2": ("v_cvt_f32_ubyte2 v16, v8", lambda a, b, c: (a >> u32(16) & u32(255)).astype(f32).view(u32)),
    }  # fmt: skip
    FLOAT = {
        "add": ("v_add_f32 v16, v8, v9", lambda a, b, c: a + b),
        "sub_modifiers": ("v_sub_f32 v16, |v8|, -v9", lambda a, b, c: np.abs(a) + b),
        "mul_clamp": ("v_mul_f32 v16, v8, v9 clamp", lambda a, b, c: np.where(np.isnan(a * b), f32(0), np.clip(a * b, f32(0), f32(1)) + f32(0))),
        "mul_scale": ("v_mul_f32 v16, v8, v9 mul:4", lambda a, b, c: a * b * f32(4)),
        "fma": ("v_fma_f32 v16, v8, v9, v10", lambda a, b, c: (a.astype(f64) * b + c).astype(f32)),
        "fmac": ("v_mov_b32 v16, v10\n v_fmac_f32 v16, v8, v9", lambda a, b, c: (a.astype(f64) * b + c).astype(f32)),
        "max": ("v_max_f32 v16, v8, v9", lambda a, b, c: np.fmax(a, b)),
        "min": ("v_min_f32 v16, v8, v9", lambda a, b, c: np.fmin(a, b)),
        "max3": ("v_max3_f32 v16, v8, v9, v10", lambda a, b, c: np.fmax(np.fmax(a, b), c)),
        "exp": ("v_exp_f32 v16, v8", lambda a, b, c: flush(np.exp2(flush(a).astype(f64)).astype(f32))),
        "log": ("v_log_f32 v16, v8", lambda a, b, c: np.log2(flush(a).astype(f64)).astype(f32)),
        "rcp": ("v_rcp_f32 v16, v8", lambda a, b, c: flush(f32(1) / flush(a))),
        "sqrt": ("v_sqrt_f32 v16, v8", lambda a, b, c: np.sqrt(flush(a))),
        "rsq": ("v_rsq_f32 v16, v8", lambda a, b, c: (1 / np.sqrt(flush(a).astype(f64))).astype(f32)),
        "rndne": ("v_rndne_f32 v16, v8", lambda a, b, c: np.rint(a)),
        "floor": ("v_floor_f32 v16, v8", lambda a, b, c: np.floor(a)),
        "ldexp": ("v_ldexp_f32 v16, v8, -3", lambda a, b, c: np.ldexp(a, -3)),
        "pk_fma": ("v_pk_fma_f32 v[16:17], v[8:9], v[10:11], v[12:13]", lambda a, b, c, d, e, f: ((a.astype(f64) * c + e).astype(f32), (b.astype(f64) * d + f).astype(f32))),
        "pk_mul_swapped": ("v_pk_mul_f32 v[16:17], v[8:9], v[10:11] op_sel:[0,1] op_sel_hi:[1,0]", lambda a, b, c, d: (a * d, b * c)),
        "pk_add_negated": ("v_pk_add_f32 v[16:17], v[8:9], v[10:11] neg_lo:[0,1] neg_hi:[1,0]", lambda a, b, c, d: (a - c, -b + d)),
        "divide": (_DIVIDE := """
            v_div_scale_f32 v24, s[10:11], v9, v9, v8
            v_div_scale_f32 v25, vcc, v8, v9, v8
            v_rcp_f32 v26, v24
            s_nop 0
            v_fma_f32 v27, -v24, v26, 1.0
            v_fma_f32 v26, v27, v26, v26
            v_mul_f32 v27, v25, v26
            v_fma_f32 v28, -v24, v27, v25
            v_fma_f32 v27, v28, v26, v27
            v_fma_f32 v24, -v24, v27, v25
            s_nop 3
            v_div_fmas_f32 v24, v24, v26, v27
            v_div_fixup_f32 v16, v24, v9, v8""", lambda a, b, c: a / b),
    }  # fmt: skip


def _words(x):
    return (x & M32).astype(u32), (x >> u64(32)).astype(u32)


def archs():
    return [pytest.param(arch, marks=pytest.mark.skipif(assembly.missing(arch) is not None, reason=str(assembly.missing(arch))))
            for arch in emulator.ARCHS]  # fmt: skip


@pytest.fixture(scope="module")
def snippets():
    """Code objects by arch and name: assembling is the slow part."""
    made = {}

    def get(arch: str, key: str, cases: dict[str, str], **options) -> bytes:
        if (arch, key) not in made:
            made[arch, key] = assembly.code_object(
                arch, [Snippet(name, body, **options) for name, body in cases.items()]
            )
        return made[arch, key]

    return get


def columns(words: np.ndarray, function) -> list[np.ndarray]:
    return [words[:, i].copy() for i in range(function.__code__.co_argcount)]


@pytest.mark.parametrize("arch", archs())
def test_integer_instructions(arch, snippets):
    words = inputs("integer")
    code = snippets(arch, "integer", {name: body for name, (body, _) in INTEGER.items()})
    with emulator.session(arch) as gpu, np.errstate(all="ignore"):
        for name, (body, expected) in INTEGER.items():
            got = assembly.run(gpu, code, name, words)
            want = expected(*columns(words, expected))
            for register, column in enumerate(want if isinstance(want, tuple) else (want,)):
                np.testing.assert_array_equal(got[:, register], column.astype(u32), err_msg=body)


@pytest.mark.parametrize("arch", archs())
def test_float_instructions(arch, snippets):
    words = inputs("float")
    code = snippets(arch, "float", {name: body for name, (body, _) in FLOAT.items()})
    with emulator.session(arch) as gpu, np.errstate(all="ignore"):
        for name, (body, expected) in FLOAT.items():
            got = assembly.run(gpu, code, name, words)
            want = expected(*[fl(column) for column in columns(words, expected)])
            for register, column in enumerate(want if isinstance(want, tuple) else (want,)):
                # Two units in the last place: log2, the double rounding of this oracle's fma, the Newton division.
                result = fl(got[:, register].copy())
                np.testing.assert_allclose(result, column.astype(f32), rtol=2.0**-22, atol=2.0**-148, err_msg=body)
                signs = ~np.isnan(column)
                np.testing.assert_array_equal(np.signbit(result)[signs], np.signbit(column)[signs], err_msg=body)


HALF = {
    "cvt_f32_f16": ("v_cvt_f32_f16 v16, v8", lambda a, b, c: halves(a)[:, 0].astype(f32).view(u32)),
    "cvt_f16_f32": ("v_cvt_f32_f16 v17, v8\n v_cvt_f16_f32 v16, v17\n v_mov_b32 v17, 0", lambda a, b, c: a & u32(0xFFFF)),
    "pk_fma": ("v_pk_fma_f16 v16, v8, v9, v10", lambda a, b, c: packed(halves(a).astype(f64) * halves(b) + halves(c))),
    "pk_mul": ("v_pk_mul_f16 v16, v8, v9", lambda a, b, c: packed(halves(a).astype(f64) * halves(b))),
    "pk_add_negated": ("v_pk_add_f16 v16, v8, v9 neg_lo:[0,1] neg_hi:[0,1]", lambda a, b, c: packed(halves(a).astype(f64) - halves(b))),
    "pk_max": ("v_pk_max_f16 v16, v8, v9", lambda a, b, c: packed(np.fmax(halves(a), halves(b)))),
    "pkrtz": ("v_cvt_f32_f16 v17, v8\n v_cvt_f32_f16 v18, v9\n v_cvt_pkrtz_f16_f32 v16, v17, v18\n v_mov_b32 v17, 0\n v_mov_b32 v18, 0",
              lambda a, b, c: (a & u32(0xFFFF)) | b << u32(16)),
    "add_high": ("v_mov_b32 v16, 0x1234\n v_add_f16 v17, v8, v9", lambda a, b, c: (np.full(LANES, 0x1234, u32), packed(np.stack([halves(a)[:, 0] + halves(b)[:, 0], np.zeros(LANES)], 1)))),
    "pack": ("v_pack_b32_f16 v16, v8, v9", lambda a, b, c: (a & u32(0xFFFF)) | b << u32(16)),
    "mix": ("v_fma_mix_f32 v16, v8, v9, v10 op_sel:[0,1,0] op_sel_hi:[1,1,1]", lambda a, b, c: (halves(a)[:, 0].astype(f64) * halves(b)[:, 1] + halves(c)[:, 0]).astype(f32).view(u32)),
    "dot2": ("v_dot2_f32_f16 v16, v8, v9, 0", lambda a, b, c: (halves(a).astype(f32) * halves(b).astype(f32)).sum(1, dtype=f32).view(u32)),
}  # fmt: skip


@pytest.mark.parametrize("arch", archs())
def test_half_precision_instructions(arch, snippets):
    words = inputs("half")
    code = snippets(arch, "half", {name: body for name, (body, _) in HALF.items()})
    with emulator.session(arch) as gpu, np.errstate(all="ignore"):
        for name, (body, expected) in HALF.items():
            got = assembly.run(gpu, code, name, words)
            want = expected(*columns(words, expected))
            for register, column in enumerate(want if isinstance(want, tuple) else (want,)):
                np.testing.assert_array_equal(got[:, register], column, err_msg=body)


@pytest.mark.parametrize("arch", archs())
def test_bfloat16_conversion_on_gfx950(arch, snippets):
    if arch != "gfx950":
        pytest.skip("gfx950 only")
    words = inputs("float")
    code = snippets(arch, "bf16", {"convert": "v_cvt_pk_bf16_f32 v16, v8, v9",
                                   "bitop": "v_bitop3_b32 v16, v8, v9, v10 bitop3:0xca",
                                   "bitop16": "v_bitop3_b16 v16, v8, v9, v10 bitop3:0xca",
                                   "swap32": "v_mov_b32 v16, v8\n v_mov_b32 v17, v9\n s_nop 1\n v_permlane32_swap_b32 v16, v17",
                                   "swap16": "v_mov_b32 v16, v8\n v_mov_b32 v17, v9\n s_nop 1\n v_permlane16_swap_b32 v16, v17"})  # fmt: skip
    with emulator.session(arch) as gpu:
        a, b, c = (words[:, i].copy() for i in range(3))
        np.testing.assert_array_equal(
            assembly.run(gpu, code, "convert", words)[:, 0], bf16(fl(a)) | bf16(fl(b)) << u32(16)
        )
        np.testing.assert_array_equal(assembly.run(gpu, code, "bitop", words)[:, 0], (a & b) | (~a & c))
        low = assembly.run(gpu, code, "bitop16", words)[:, 0] & u32(0xFFFF)
        np.testing.assert_array_equal(low, ((a & b) | (~a & c)) & u32(0xFFFF))
        for row, name in ((32, "swap32"), (16, "swap16")):
            got = assembly.run(gpu, code, name, words)
            x, y = a.reshape(-1, 2, row).copy(), b.reshape(-1, 2, row).copy()
            x[:, 1], y[:, 0] = y[:, 0].copy(), x[:, 1].copy()
            np.testing.assert_array_equal(got[:, 0], x.reshape(-1))
            np.testing.assert_array_equal(got[:, 1], y.reshape(-1))


def lane_moves() -> dict[str, tuple[str, list[int]]]:
    """DPP and permutes: for each lane the lane whose value it gets, -1 for none (the old value, 99, stays)."""
    lane = np.arange(64)
    row, at = lane & ~15, lane & 15
    dpp = "v_mov_b32_dpp v16, v8 {} row_mask:0xf bank_mask:0xf"
    return {
        "quad_perm": (dpp.format("quad_perm:[1,0,3,2]"), lane ^ 1),
        "row_shl": (dpp.format("row_shl:3"), np.where(at < 13, lane + 3, -1)),
        "row_shr": (dpp.format("row_shr:4"), np.where(at >= 4, lane - 4, -1)),
        "row_ror": (dpp.format("row_ror:5"), row + (at - 5) % 16),
        "row_mirror": (dpp.format("row_mirror"), row + 15 - at),
        "row_half_mirror": (dpp.format("row_half_mirror"), (lane & ~7) + 7 - (lane & 7)),
        "row_bcast15": (dpp.format("row_bcast:15"), np.where(lane >= 16, row - 1, -1)),
        "row_bcast31": (dpp.format("row_bcast:31"), np.where(lane >= 32, 31, -1)),
        "row_newbcast": (dpp.format("row_newbcast:6"), row + 6),
        "bank_mask": ("v_mov_b32_dpp v16, v8 quad_perm:[0,1,2,3] row_mask:0x5 bank_mask:0x3", np.where((row // 16 % 2 == 0) & (at < 8), lane, -1)),
        "bpermute": ("v_xor_b32 v24, 37, v0\n v_lshlrev_b32 v24, 2, v24\n ds_bpermute_b32 v16, v24, v8\n s_waitcnt lgkmcnt(0)", lane ^ 37),
        "permute": ("v_add_u32 v24, 5, v0\n v_lshlrev_b32 v24, 2, v24\n ds_permute_b32 v16, v24, v8\n s_waitcnt lgkmcnt(0)", (lane - 5) % 64),
        "swizzle_xor": ("ds_swizzle_b32 v16, v8 offset:swizzle(SWAP,16)\n s_waitcnt lgkmcnt(0)", lane ^ 16),
        "readlane": ("v_readlane_b32 s10, v8, 17\n s_nop 3\n v_mov_b32 v16, s10", np.full(64, 17)),
        "readfirstlane": ("s_mov_b64 exec, 0xff00\n v_readfirstlane_b32 s10, v8\n s_mov_b64 exec, -1\n s_nop 3\n v_mov_b32 v16, s10", np.full(64, 8)),
        "exec_mask": ("s_mov_b64 s[10:11], exec\n s_mov_b32 exec_lo, 0xff\n s_mov_b32 exec_hi, 0\n v_mov_b32 v16, v8\n s_mov_b64 exec, s[10:11]",
                      np.where(lane < 8, lane, -1)),
    }  # fmt: skip


@pytest.mark.parametrize("arch", archs())
def test_values_that_cross_lanes(arch, snippets):
    moves = lane_moves()
    code = snippets(arch, "lanes", {name: f"v_mov_b32 v16, 99\n s_nop 4\n {body}" for name, (body, _) in moves.items()})
    words = inputs("integer")
    with emulator.session(arch) as gpu:
        for name, (body, source) in moves.items():
            want = np.where(source < 0, u32(99), words[source, 0])
            np.testing.assert_array_equal(assembly.run(gpu, code, name, words)[:, 0], want, err_msg=body)


SCALAR = {
    "add": ("s_add_u32 s12, s10, s11\n s_addc_u32 s13, 0, 0", lambda a, b: ((a + b) & 0xFFFFFFFF, (a + b) >> 32)),
    "sub": ("s_sub_u32 s12, s10, s11\n s_subb_u32 s13, 0, 0", lambda a, b: ((a - b) & 0xFFFFFFFF, 0xFFFFFFFF if a < b else 0)),
    "mul": ("s_mul_i32 s12, s10, s11\n s_mul_hi_u32 s13, s10, s11", lambda a, b: ((a * b) & 0xFFFFFFFF, a * b >> 32)),
    "logic": ("s_andn2_b32 s12, s10, s11\n s_nor_b32 s13, s10, s11", lambda a, b: (a & ~b & 0xFFFFFFFF, ~(a | b) & 0xFFFFFFFF)),
    "shift": ("s_lshl_b32 s12, s10, 5\n s_ashr_i32 s13, s10, 4", lambda a, b: (a << 5 & 0xFFFFFFFF, ((a ^ 1 << 31) - (1 << 31)) >> 4 & 0xFFFFFFFF)),
    "bfe": ("s_bfe_u32 s12, s10, 0x80004\n s_bfe_i32 s13, s10, 0x80004", lambda a, b: (a >> 4 & 255, ((a >> 4 & 255) ^ 128) - 128 & 0xFFFFFFFF)),
    "select": ("s_cmp_gt_u32 s10, s11\n s_cselect_b32 s12, s10, s11\n s_cselect_b32 s13, 1, 0", lambda a, b: (max(a, b), int(a > b))),
    "count": ("s_bcnt1_i32_b32 s12, s10\n s_ff1_i32_b32 s13, s10", lambda a, b: (bin(a).count("1"), (a & -a).bit_length() - 1 if a else 0xFFFFFFFF)),
    "flbit": ("s_flbit_i32_b32 s12, s10\n s_brev_b32 s13, s10", lambda a, b: (32 - a.bit_length() if a else 0xFFFFFFFF, int(f"{a:032b}"[::-1], 2))),
    "pack": ("s_pack_ll_b32_b16 s12, s10, s11\n s_pack_hh_b32_b16 s13, s10, s11", lambda a, b: ((a & 0xFFFF) | b << 16 & 0xFFFFFFFF, a >> 16 | b & 0xFFFF0000)),
    "loop": ("s_mov_b32 s12, 0\n s_mov_b32 s13, 7\n LABEL:\n s_add_u32 s12, s12, s10\n s_sub_u32 s13, s13, 1\n s_cmp_lg_u32 s13, 0\n s_cbranch_scc1 LABEL",
             lambda a, b: (7 * a & 0xFFFFFFFF, 0)),
    "bitset": ("s_mov_b32 s12, s10\n s_bitset1_b32 s12, 31\n s_mov_b32 s13, s10\n s_bitset0_b32 s13, 0", lambda a, b: (a | 1 << 31, a & ~1)),
    "call": ("s_getpc_b64 s[14:15]\n s_add_u32 s14, s14, 16\n s_addc_u32 s15, s15, 0\n s_mov_b32 s12, 1\n s_setpc_b64 s[14:15]\n s_mov_b32 s12, s10\n s_mov_b32 s13, s11", lambda a, b: (a, b)),
    "lshl_add": ("s_lshl2_add_u32 s12, s10, s11\n s_addc_u32 s13, 0, 0", lambda a, b: ((a * 4 & 0xFFFFFFFF) + b & 0xFFFFFFFF, int((a * 4 & 0xFFFFFFFF) + b > 0xFFFFFFFF or a >> 30 > 0))),
}  # fmt: skip


@pytest.mark.parametrize("arch", archs())
def test_scalar_instructions(arch, snippets):
    frame = """
        v_readlane_b32 s10, v8, 0
        v_readlane_b32 s11, v9, 0
        s_nop 4
        {}
        v_mov_b32 v16, s12
        v_mov_b32 v17, s13"""
    code = snippets(
        arch,
        "scalar",
        {f"s_{name}": frame.format(body.replace("LABEL", f"L_{name}")) for name, (body, _) in SCALAR.items()},
    )
    with emulator.session(arch) as gpu:
        for a, b in ((3, 5), (0xFFFFFFFF, 1), (0x80000000, 0x7FFFFFFF), (0, 0xDEADBEEF), (0x12345678, 0x9ABCDEF0)):
            words = np.zeros((LANES, 8), u32)
            words[:, 0], words[:, 1] = a, b
            for name, (body, expected) in SCALAR.items():
                got = assembly.run(gpu, code, f"s_{name}", words)
                assert tuple(int(x) for x in got[0, :2]) == expected(a, b), (body, hex(a), hex(b))


@pytest.mark.parametrize("arch", archs())
def test_lds_instructions(arch, snippets):
    wait = "s_waitcnt lgkmcnt(0)"
    cases = {
        "b128": f"v_lshlrev_b32 v24, 4, v0\n ds_write_b128 v24, v[8:11]\n v_xor_b32 v24, 48, v24\n ds_read_b128 v[16:19], v24\n {wait}",
        "two": f"v_lshlrev_b32 v24, 2, v0\n ds_write2st64_b32 v24, v8, v9 offset0:0 offset1:2\n ds_read2st64_b32 v[16:17], v24 offset0:2 offset1:0\n {wait}",
        "bytes": f"v_lshlrev_b32 v24, 2, v0\n ds_write_b32 v24, v8\n ds_read_u8 v16, v24 offset:1\n ds_read_i16 v17, v24 offset:2\n"
                 f" v_mov_b32 v18, v9\n ds_read_u16_d16_hi v18, v24\n ds_write_b16 v24, v9\n ds_read_b32 v19, v24\n {wait}",
        "atomic": f"v_mov_b32 v24, 0\n v_mov_b32 v25, 0\n v_mov_b32 v26, 1\n ds_write_b32 v24, v25\n ds_add_rtn_u32 v16, v24, v26\n ds_read_b32 v17, v24\n {wait}",
    }  # fmt: skip
    code = snippets(arch, "lds", cases, lds=2048)
    words = inputs("integer")
    lane = np.arange(64)
    with emulator.session(arch) as gpu:
        np.testing.assert_array_equal(assembly.run(gpu, code, "b128", words)[:, :4], words[lane ^ 3, :4])
        np.testing.assert_array_equal(assembly.run(gpu, code, "two", words)[:, :2], words[:, [1, 0]])
        got = assembly.run(gpu, code, "bytes", words)
        np.testing.assert_array_equal(got[:, 0], words[:, 0] >> 8 & 255)
        np.testing.assert_array_equal(got[:, 1].view(i32), words[:, 0].view(i32) >> 16)
        np.testing.assert_array_equal(got[:, 2], (words[:, 1] & 0xFFFF) | words[:, 0] << 16)
        np.testing.assert_array_equal(got[:, 3], (words[:, 0] & 0xFFFF0000) | (words[:, 1] & 0xFFFF))
        got = assembly.run(gpu, code, "atomic", words)
        assert sorted(got[:, 0]) == list(range(64)) and set(got[:, 1]) == {64}


def test_transposing_lds_read(snippets):
    """gfx950: of each 16 lanes, four read a row of 16 values; lane i gets column i of the four rows."""
    if assembly.missing("gfx950"):
        pytest.skip(assembly.missing("gfx950"))
    body = (
        "v_lshlrev_b32 v24, 3, v0\n ds_write_b64 v24, v[8:9]\n ds_read_b64_tr_b16 v[16:17], v24\n s_waitcnt lgkmcnt(0)"
    )
    words = inputs("integer")
    with emulator.session("gfx950") as gpu:
        got = assembly.run(gpu, snippets("gfx950", "transpose", {"transpose": body}, lds=512), "transpose", words)
    rows = words[:, :2].copy().view(np.uint16).reshape(4, 4, 16)  # 16 lanes, row, column
    want = np.ascontiguousarray(rows.transpose(0, 2, 1)).reshape(64, 4).view(u32)
    np.testing.assert_array_equal(got[:, :2], want)


@pytest.mark.parametrize("arch", archs())
def test_phases_of_wide_lds_accesses(arch, snippets):
    """Cycles of 16-byte accesses whose 4 lanes of a group lie side by side, `row` bytes from the next group."""
    cases = {}
    for row in (64, 128, 256):
        address = f"v_lshrrev_b32 v24, 2, v0\n v_mul_u32_u24 v24, {row}, v24\n v_and_b32 v25, 3, v0\n v_lshl_add_u32 v24, v25, 4, v24\n"
        cases[f"row{row}"] = f"{address} ds_write_b128 v24, v[8:11]\n ds_read_b128 v[16:19], v24\n s_waitcnt lgkmcnt(0)"
    code = snippets(arch, "phases", cases, lds=4096)
    # Reads take groups (0, 5), (1, 4), ... together on 32 banks, four groups (0, 3, 5, 6) on 64; writes neighbours.
    write = {64: 8, 128: 16, 256: 16}
    read = {64: 4, 128: 8, 256: 16} if arch == "gfx950" else {64: 8, 128: 16, 256: 16}
    with emulator.session(arch) as gpu:
        for row in (64, 128, 256):
            assembly.run(gpu, code, f"row{row}", inputs("integer"))
            assert gpu.stats()[f"row{row}"]["total"]["cycles"]["lds"] == write[row] + read[row], row


@pytest.mark.parametrize("arch", archs())
def test_memory_instructions(arch, snippets):
    resource = "s_mov_b32 s12, s4\n s_and_b32 s13, s5, 0xffff\n s_movk_i32 s14, 0x404\n s_mov_b32 s15, 0x20000\n"
    wait = "s_waitcnt vmcnt(0)"
    cases = {
        "short": f"global_load_ushort v16, v1, s[4:5] offset:2\n global_load_sbyte v17, v1, s[4:5] offset:3\n v_mov_b32 v18, -1\n"
                 f" global_load_short_d16_hi v18, v1, s[4:5]\n {wait}",
        "flat": f"v_mov_b32 v24, s4\n v_mov_b32 v25, s5\n v_lshl_add_u32 v26, v0, 5, 8\n v_add_co_u32 v24, vcc, v24, v26\n v_mov_b32 v27, 0\n s_nop 1\n"
                f" v_addc_co_u32 v25, vcc, v25, v27, vcc\n flat_load_dwordx2 v[16:17], v[24:25]\n {wait} lgkmcnt(0)",
        "buffer": f"{resource} buffer_load_dwordx4 v[16:19], v1, s[12:15], 0 offen\n {wait}",
        "scalar": "s_load_dwordx4 s[12:15], s[4:5], 0x20\n s_waitcnt lgkmcnt(0)\n v_mov_b32 v16, s12\n v_mov_b32 v17, s15",
        "atomic": f"v_mov_b32 v24, 0\n v_mov_b32 v25, 3\n s_add_u32 s10, s6, 0x1c\n s_addc_u32 s11, s7, 0\n"
                  f" global_atomic_add v16, v24, v25, s[10:11] {'glc' if arch == 'gfx90a' else 'sc0'}\n {wait}\n v_mov_b32 v23, v16",
    }  # fmt: skip
    code = snippets(arch, "memory", cases)
    words = inputs("integer")
    with emulator.session(arch) as gpu:
        got = assembly.run(gpu, code, "short", words)
        np.testing.assert_array_equal(got[:, 0], words[:, 0] >> 16)
        np.testing.assert_array_equal(got[:, 1].view(i32), words[:, 0].view(i32) >> 24)
        np.testing.assert_array_equal(got[:, 2], 0xFFFF | words[:, 0] << 16)
        np.testing.assert_array_equal(assembly.run(gpu, code, "flat", words)[:, :2], words[:, 2:4])
        # A buffer of 0x404 bytes: what lies past its end reads as zero, word by word.
        want = words[:, :4].copy()
        want[33:] = 0
        want[32, 1:] = 0
        np.testing.assert_array_equal(assembly.run(gpu, code, "buffer", words)[:, :4], want)
        got = assembly.run(gpu, code, "scalar", words)
        assert set(got[:, 0]) == {words[1, 0]} and set(got[:, 1]) == {words[1, 3]}
        np.testing.assert_array_equal(assembly.run(gpu, code, "atomic", words)[:, 0], 3 * np.arange(64))


@pytest.mark.parametrize("arch", archs())
def test_loads_that_go_to_lds(arch, snippets):
    if arch == "gfx90a":
        load = "s_mov_b32 s12, s4\n s_and_b32 s13, s5, 0xffff\n s_movk_i32 s14, -1\n s_mov_b32 s15, 0x20000\n buffer_load_dword v1, s[12:15], 0 offen lds"
    else:
        load = "global_load_lds_dword v1, s[4:5]"
    body = f"s_movk_i32 m0, 0x100\n s_nop 0\n {load}\n s_waitcnt vmcnt(0)\n v_lshlrev_b32 v24, 2, v0\n ds_read_b32 v16, v24 offset:0x100\n s_waitcnt lgkmcnt(0)"
    cases = {"to_lds": body}
    if arch == "gfx950":
        cases["to_lds_wide"] = (
            body.replace("_dword v1", "_dwordx4 v1")
            .replace("lshlrev_b32 v24, 2", "lshlrev_b32 v24, 4")
            .replace("ds_read_b32 v16", "ds_read_b128 v[16:19]")
        )
    code = snippets(arch, "to_lds", cases, lds=2048)
    words = inputs("integer")
    with emulator.session(arch) as gpu:
        np.testing.assert_array_equal(assembly.run(gpu, code, "to_lds", words)[:, 0], words[:, 0])
        if arch == "gfx950":
            np.testing.assert_array_equal(assembly.run(gpu, code, "to_lds_wide", words)[:, :4], words[:, :4])
