"""The emulator's tables and decoder against LLVM's assembler and disassembler, for every opcode of every encoding."""

# ruff: noqa: E501 (tables: one case a line)

import re
import subprocess

import emulator
import pytest
from emulator import assembly

LLVM_MC = assembly.llvm("llvm-mc")

# For each encoding: how many opcodes, and words with operands that are legal for most of them. A name counts where any
# of the variants is an instruction. Field positions: "Microcode Formats" in AMD's ISA documents.
V = 0x100
THREE = 4 | 6 << 9 | 8 << 18 | V | V << 9 | V << 18
ENCODINGS = {
    "SOP2": (0x35, [lambda o: [0x80000000 | o << 23 | 4 << 16 | 2 << 8 | 4], lambda o: [0x80000000 | o << 23 | 2 << 8 | 4]]),
    "SOPK": (0x16, [lambda o: [0xB0000000 | o << 23 | 4 << 16 | 1], lambda o: [0xB0000000 | o << 23 | 1, 5]]),
    "SOP1": (0x100, [lambda o: [0xBE800000 | o << 8 | 4 << 16 | 4], lambda o: [0xBE800000 | o << 8 | 4 << 16],
                     lambda o: [0xBE800000 | o << 8 | 4]]),
    "SOPC": (0x80, [lambda o: [0xBF000000 | o << 16 | 4 << 8 | 4]]),
    "SOPP": (0x80, [lambda o: [0xBF800000 | o << 16]]),
    "SMEM": (0x100, [lambda o: [0xC0000000 | o << 18 | 1 << 17 | 8 << 6 | 2, 0], lambda o: [0xC0000000 | o << 18, 0],
                     lambda o: [0xC0000000 | o << 18 | 1 << 17 | 6 << 6 | 2, 0]]),
    "VOP2": (0x3E, [lambda o: [o << 25 | 4 << 17 | 2 << 9 | 258], lambda o: [o << 25 | 4 << 17 | 2 << 9 | 258, 0x3F800000]]),
    "VOP1": (0x100, [lambda o: [0x7E000000 | o << 9 | 4 << 17 | 260], lambda o: [0x7E000000 | o << 9]]),
    "VOPC": (0x100, [lambda o: [0x7C000000 | o << 17 | 2 << 9 | 260]]),
    "VOP3": (0x300, [lambda o: [0xD0000000 | o << 16 | 4, THREE], lambda o: [0xD0000000 | o << 16 | 4, 4 | 6 << 9 | V | V << 9],
                     lambda o: [0xD0000000 | o << 16 | 0x6A << 8 | 4, THREE], lambda o: [0xD0000000 | o << 16 | 4, 4 | 6 << 9 | V]]),
    "VOP3P": (0x80, [lambda o: [0xD3800000 | o << 16 | 32, 4 | 6 << 9 | 32 << 18 | V * (1 + (1 << 9) + (1 << 18)) | 3 << 27],
                     lambda o: [0xD3800000 | o << 16 | 32 | 1 << 14, THREE | 3 << 27],
                     lambda o: [0xD3800000 | o << 16 | 4 | 1 << 14, 4 | V | 3 << 27],
                     lambda o: [0xD3800000 | o << 16 | 4, 4 | V | 6 << 9 | V << 9],
                     lambda o: [0xD3800000 | o << 16 | 4 | 1 << 14, 4 | V | 6 << 9 | V << 9 | 3 << 27],
                     lambda o: [0xD3800000 | o << 16 | 32, 4 | 6 << 9 | 32 << 18 | V * (1 + (1 << 9) + (1 << 18))],
                     lambda o: [0xD3800000 | o << 16 | 4, 4 | V | 18 << 27]]),
    "DS": (0x100, [lambda o: [0xD8000000 | o << 17, 4 << 24 | 2 << 8 | 4 << 16], lambda o: [0xD8000000 | o << 17, 4 << 24 | 2 << 8],
                   lambda o: [0xD8000000 | o << 17, 2 << 8], lambda o: [0xD8000000 | o << 17, 2 << 8 | 4 << 16],
                   lambda o: [0xD8000000 | o << 17, 4 << 24], lambda o: [0xD8000000 | o << 17, 0]]),
    "FLAT": (0x80, [lambda o: [0xDC000000 | o << 18, 4 << 24 | 2 << 8], lambda o: [0xDC000000 | o << 18, 2 << 8],
                    lambda o: [0xDC000000 | o << 18, 4 << 24]]),
    "GLOBAL": (0x80, [lambda o: [0xDC008000 | o << 18, 4 << 24 | 2 << 8 | 0x7F << 16], lambda o: [0xDC008000 | o << 18, 2 << 8 | 0x7F << 16],
                      lambda o: [0xDC008000 | o << 18, 4 << 24 | 0x7F << 16], lambda o: [0xDC008000 | o << 18, 0x7F << 16]]),
    "SCRATCH": (0x80, [lambda o: [0xDC004000 | o << 18, 4 << 24 | 2 << 8 | 0x7F << 16], lambda o: [0xDC004000 | o << 18, 2 << 8 | 0x7F << 16],
                       lambda o: [0xDC004000 | o << 18, 4 << 24 | 0x7F << 16], lambda o: [0xDC004000 | o << 18, 0x7F << 16]]),
    "MUBUF": (0x80, [lambda o: [0xE0001000 | o << 18, 4 << 8 | 2 << 16 | 4 << 24], lambda o: [0xE0000000 | o << 18, 2 << 16 | 4 << 24],
                     lambda o: [0xE0000000 | o << 18, 0]]),
}  # fmt: skip


def disassembled(arch: str) -> dict[tuple[str, int], list[tuple[str, str]]]:
    """LLVM's (mnemonic, whole text) for every encoding and opcode."""
    asked, lines = {}, []
    for format_, (count, variants) in ENCODINGS.items():
        for opcode in range(0x1C0 if format_ == "VOP3" else 0, count):
            for variant in variants:
                words = variant(opcode)
                data = b"".join(word.to_bytes(4, "little") for word in words)
                asked[",".join(f"0x{byte:02x}" for byte in data)] = (format_, opcode)
                lines.append("[" + ",".join(f"0x{byte:02x}" for byte in data) + "]")  # brackets: one by one
    result = subprocess.run([LLVM_MC, "-disassemble", "-triple=amdgcn", f"-mcpu={arch}", "-show-encoding"],
                            input="\n".join(lines), capture_output=True, text=True)  # fmt: skip
    found: dict[tuple[str, int], list[tuple[str, str]]] = {}
    for text, encoding in re.findall(r"^\s*(\S.*?)\s*(?:;|//) encoding: \[(.*)\]$", result.stdout, re.M):
        if encoding in asked:
            mnemonic = re.sub(r"_e(32|64)$", "", text.split()[0])
            found.setdefault(asked[encoding], []).append((mnemonic, text))
    return found


@pytest.fixture(scope="module")
def llvm_names():
    if not LLVM_MC:
        pytest.skip(f"no llvm-mc of LLVM {assembly.OLDEST_LLVM} or newer on PATH")
    return {arch: disassembled(arch) for arch in ("gfx90a", "gfx942")}


# What LLVM calls an opcode of another place or none that matters here: graphics, traps, debugging.
_NOT_LISTED = re.compile(r"screen_partition|tbuffer|^ds_(gws|ordered|nop)|s_cbranch_join")


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942"])
def test_every_opcode_has_llvms_name(arch, llvm_names):
    ours: dict[tuple[str, int], str] = {(f, opcode): name for f, opcode, name, _ in emulator.operations(arch)}
    wrong = []
    for (format_, opcode), names in llvm_names[arch].items():
        expected = {name for name, _ in names}
        got = ours.get((format_, opcode))
        if got not in expected and not all(_NOT_LISTED.search(name) for name in expected):
            wrong.append(f"{format_} {opcode:#x}: {got}, LLVM says {sorted(expected)}")
    assert not wrong, "\n".join(wrong)
    unknown = [f"{format_} {opcode:#x} {name}" for (format_, opcode), name in ours.items()
               if format_ in ENCODINGS and (format_, opcode) not in llvm_names[arch]
               and not (format_ == "VOP3" and opcode < 0x1C0)]  # fmt: skip
    assert not unknown, "LLVM does not know: " + ", ".join(unknown)


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942"])
def test_decoder_agrees_on_name_and_size(arch, llvm_names):
    for (format_, opcode), names in llvm_names[arch].items():
        for variant in ENCODINGS[format_][1]:
            words = variant(opcode)
            text, size, _ = emulator.disassemble(arch, words)
            if {name for name, _ in names} == {text.split()[0]}:
                assert size <= 2
                break
        else:
            assert all(_NOT_LISTED.search(name) for name, _ in names), (format_, opcode, names)


# gfx950 has what gfx942 has, but for XF32, and these (LLVM 19 does not know gfx950, so a newer assembler is asked).
GFX950 = """
v_prng_b32 v4, v2
v_permlane16_swap_b32 v4, v2
v_permlane32_swap_b32 v4, v2
v_cvt_f32_bf16 v4, v2
v_ashr_pk_i8_i32 v4, v2, v3, v6
v_ashr_pk_u8_i32 v4, v2, v3, v6
v_cvt_pk_bf16_f32 v4, v2, v3
v_cvt_pk_f16_f32 v4, v2, v3
v_cvt_sr_bf16_f32 v4, v2, v3
v_cvt_sr_f16_f32 v4, v2, v3
v_bitop3_b32 v4, v2, v3, v6 bitop3:0x80
v_bitop3_b16 v4, v2, v3, v6 bitop3:0x80
v_minimum3_f32 v4, v2, v3, v6
v_maximum3_f32 v4, v2, v3, v6
v_pk_minimum3_f16 v4, v2, v3, v6
v_pk_maximum3_f16 v4, v2, v3, v6
v_dot2_f32_bf16 v4, v2, v3, v6
v_dot2c_f32_bf16 v4, v2, v3
ds_read_b64_tr_b16 v[4:5], v2
ds_read_b64_tr_b8 v[4:5], v2
ds_read_b64_tr_b4 v[4:5], v2
ds_read_b96_tr_b6 v[4:6], v2
global_load_lds_dwordx3 v2, s[4:5]
global_load_lds_dwordx4 v2, s[4:5]
buffer_load_dwordx4 v2, s[4:7], 0 offen lds
v_mfma_f32_16x16x32_f16 a[0:3], v[4:7], v[8:11], a[0:3]
v_mfma_f32_32x32x16_f16 a[0:15], v[4:7], v[8:11], a[0:15]
v_mfma_f32_16x16x32_bf16 v[0:3], v[4:7], v[8:11], v[0:3]
v_mfma_f32_32x32x16_bf16 a[0:15], v[4:7], v[8:11], a[0:15]
v_mfma_i32_16x16x64_i8 a[0:3], v[4:7], v[8:11], a[0:3]
v_mfma_i32_32x32x32_i8 a[0:15], v[4:7], v[8:11], a[0:15]
buffer_atomic_pk_add_bf16 v4, v2, s[4:7], 0 offen
""".strip().splitlines()


@pytest.mark.skipif(assembly.missing("gfx950") is not None, reason=str(assembly.missing("gfx950")))
def test_gfx950_names():
    words = assembly.machine_code("gfx950", GFX950)
    at = 0
    for line in GFX950:
        text, size, _ = emulator.disassemble("gfx950", words[at:])
        assert text.split()[0] == line.split()[0]
        at += size
    assert at == len(words)


@pytest.mark.skipif(assembly.missing("gfx950") is not None, reason=str(assembly.missing("gfx950")))
def test_gfx950_keeps_the_opcodes_of_gfx942(llvm_names):
    ours = {(f, opcode): name for f, opcode, name, _ in emulator.operations("gfx950")}
    lines, expected = [], []
    for key, names in llvm_names["gfx942"].items():
        name, text = names[0]
        # Left out: text that does not assemble again, and what gfx950 has dropped.
        if ours.get(key) == name and not re.search(
            r"Invalid register|v_dot.*op_sel_hi|buffer_wbinvl1|v_mad.k_f16|s_call|fork", text
        ):
            lines.append(text)
            expected.append(name)
    words = assembly.machine_code("gfx950", lines)
    at = 0
    for line, name in zip(lines, expected, strict=True):
        text, size, _ = emulator.disassemble("gfx950", words[at:])
        assert text.split()[0] == name, line
        at += size
    assert at == len(words)
