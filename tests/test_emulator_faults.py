"""Every error that the emulator promises, raised by a kernel that is wrong on purpose; and its right twin, which is not.

The snippets stand in the frame of emulator/assembly.py: v0 lane, inputs in v[8:15], s[4:5] input, s[6:7] output.
"""

# ruff: noqa: E501 (tables: one case a line)

import emulator
import numpy as np
import pytest
from emulator import assembly
from emulator.assembly import LANES, Snippet

ARCH = "gfx942"
pytestmark = pytest.mark.skipif(assembly.missing(ARCH) is not None, reason=str(assembly.missing(ARCH)))

LDS = "v_lshlrev_b32 v24, 2, v0\n"
WAVE = "v_readfirstlane_b32 s10, v0\n s_lshr_b32 s10, s10, 6\n"  # number of the wave
END_WAVE_1 = f"{WAVE} s_cmp_eq_u32 s10, 1\n s_cbranch_scc1 END_NAME\n"
# Both waves have their lane's address in v24; wave 0 writes there.
WAVE_0_WRITES = f"v_and_b32 v24, 63, v0\n v_lshlrev_b32 v24, 2, v24\n {WAVE} s_cmp_eq_u32 s10, 1\n s_cbranch_scc1 SKIP_NAME\n ds_write_b32 v24, v8\n SKIP_NAME:\n"
DONE = "\n s_waitcnt vmcnt(0) lgkmcnt(0)"
# Each wave loads 256 bytes to LDS twice, then reads what the other one loaded first.
LOADS_TO_LDS = f"{WAVE} s_lshl_b32 s10, s10, 8\n s_mov_b32 m0, s10\n s_nop 0\n global_load_lds_dword v1, s[4:5]\n s_add_u32 m0, s10, 0x200\n s_nop 0\n global_load_lds_dword v1, s[4:5]\n"
READS_OTHERS = f"v_lshlrev_b32 v24, 2, v0\n v_xor_b32 v24, 0x100, v24\n ds_read_b32 v16, v24{DONE}"

# name: (wrong snippet, words of the report, right snippet or None, waves)
FAULTS = {
    "read_outside": ("global_load_dword v16, v1, s[4:5] offset:2044" + DONE, ["read of 4 bytes", "outside the buffers", "lane 1"],
                     "global_load_dword v16, v1, s[4:5] offset:28" + DONE, 1),
    "scalar_read_outside": ("s_load_dwordx2 s[10:11], s[4:5], 0x800" + DONE, ["read of 8 bytes", "outside"], "s_load_dwordx2 s[10:11], s[4:5], 0x7f8" + DONE, 1),
    "write_outside": ("global_store_dword v1, v8, s[6:7] offset:2048", ["write of 4 bytes", "outside the buffers"], None, 1),
    "write_read_only": ("global_store_dword v1, v8, s[4:5]", ["write of 4 bytes", "read-only"], "global_store_dword v1, v8, s[6:7]", 1),
    "lds_outside": (f"{LDS} ds_write_b32 v24, v8 offset:772", ["LDS access at byte 1024", "the kernel has 1024", "lane 63"], f"{LDS} ds_write_b32 v24, v8 offset:768", 1),
    "lds_misaligned": (f"{LDS} ds_write_b32 v24, v8 offset:2", ["misaligned LDS access at byte 2"], None, 1),
    "undefined_store": ("v_mov_b32 v16, v40", ["value nobody wrote is stored", "global_store_dwordx4"], "v_mov_b32 v41, v40", 1),
    "undefined_through_arithmetic": ("v_add_f32 v40, v40, v8\n v_mul_f32 v16, v40, v9", ["value nobody wrote is stored"],
                                     "v_add_f32 v40, v40, v8\n v_mul_f32 v41, v40, v9", 1),
    "undefined_in_lanes_off": ("s_mov_b32 exec_lo, 0\n v_mov_b32 v40, v8\n s_mov_b64 exec, -1\n v_mov_b32 v16, v40", ["value nobody wrote is stored", "lane 0"],
                               "s_mov_b32 exec_lo, 0\n v_mov_b32 v40, v8\n v_mov_b32 v16, v40\n s_mov_b64 exec, -1", 1),
    "undefined_address": ("global_load_dword v16, v40, s[4:5]" + DONE, ["the address has a value nobody wrote"], None, 1),
    "undefined_lds_address": ("ds_read_b32 v16, v40" + DONE, ["the LDS address has a value nobody wrote"], None, 1),
    "undefined_lds_word": (f"{LDS} ds_read_b32 v16, v24{DONE}", ["value nobody wrote is stored"], f"{LDS} ds_write_b32 v24, v8\n ds_read_b32 v16, v24{DONE}", 1),
    "undefined_branch": ("s_cmp_eq_u32 s40, 0\n s_cbranch_scc1 L1_NAME\n L1_NAME:", ["a branch depends on a value nobody wrote"], "s_cmp_eq_u32 s40, 0", 1),
    "undefined_lane_condition": ("v_cmp_lt_u32 vcc, v40, v8\n s_cbranch_vccz L2_NAME\n L2_NAME:", ["a branch depends on a value nobody wrote"],
                                 "v_cmp_lt_u32 vcc, v40, v8\n s_nop 1\n v_cndmask_b32 v41, v8, v9, vcc", 1),
    "undefined_exec": ("v_cmp_lt_u32 vcc, v40, v8\n s_and_saveexec_b64 s[10:11], vcc\n s_mov_b64 exec, s[10:11]", ["EXEC is set from a value nobody wrote"],
                       "v_cmp_lt_u32 vcc, v40, v8\n s_mov_b64 s[12:13], 0\n s_and_b64 vcc, vcc, s[12:13]\n s_and_saveexec_b64 s[10:11], vcc\n s_mov_b64 exec, s[10:11]", 1),
    "undefined_selected": ("s_mov_b64 vcc, -1\n v_cndmask_b32 v16, v8, v40, vcc", ["value nobody wrote is stored"], "s_mov_b64 vcc, 0\n v_cndmask_b32 v16, v8, v40, vcc", 1),
    "undefined_matrix_operand": ("v_mfma_f32_32x32x8_f16 a[0:15], v[8:9], v[40:41], 0", ["a matrix operand has a value nobody wrote (v40)"],
                                 "v_mfma_f32_32x32x8_f16 a[0:15], v[8:9], v[10:11], 0", 1),
    "load_not_waited": ("global_load_dword v16, v1, s[4:5]\n v_mov_b32 v17, v16" + DONE, ["v16 is used before s_waitcnt vmcnt(0)", "v_mov_b32 v17, v16"],
                        "global_load_dword v16, v1, s[4:5]\n s_waitcnt vmcnt(0)\n v_mov_b32 v17, v16", 1),
    "load_count_too_high": ("global_load_dword v16, v1, s[4:5]\n global_load_dword v17, v1, s[4:5]\n s_waitcnt vmcnt(1)\n v_mov_b32 v18, v17" + DONE,
                            ["v17 is used before s_waitcnt vmcnt(0)"],
                            "global_load_dword v16, v1, s[4:5]\n global_load_dword v17, v1, s[4:5]\n s_waitcnt vmcnt(1)\n v_mov_b32 v18, v16" + DONE, 1),
    "load_overwritten": ("global_load_dword v16, v1, s[4:5]\n v_mov_b32 v16, 0" + DONE, ["v16 is used before s_waitcnt vmcnt(0)"],
                         "global_load_dword v16, v1, s[4:5]\n global_load_dword v16, v1, s[4:5]" + DONE, 1),
    "lds_not_waited": (f"{LDS} ds_write_b32 v24, v8\n ds_read_b32 v16, v24\n v_mov_b32 v17, v16{DONE}", ["v16 is used before s_waitcnt lgkmcnt(0)"], None, 1),
    "scalar_load_not_waited": ("s_load_dword s10, s[4:5], 0x0\n s_add_u32 s11, s10, 1" + DONE, ["s10 is used before s_waitcnt lgkmcnt(0)"],
                               "s_load_dword s10, s[4:5], 0x0\n s_waitcnt lgkmcnt(0)\n s_add_u32 s11, s10, 1", 1),
    "scalar_loads_out_of_order": ("s_load_dword s10, s[4:5], 0x0\n s_load_dword s11, s[4:5], 0x0\n s_waitcnt lgkmcnt(1)\n s_add_u32 s12, s10, 1" + DONE,
                                  ["s10 is used before s_waitcnt lgkmcnt(0)"], None, 1),
    "load_to_lds_not_waited": (f"s_mov_b32 m0, 0\n s_nop 0\n global_load_lds_dword v1, s[4:5]\n {LDS} ds_read_b32 v16, v24{DONE}", ["used before s_waitcnt vmcnt", "load to LDS"],
                               f"s_mov_b32 m0, 0\n s_nop 0\n global_load_lds_dword v1, s[4:5]\n s_waitcnt vmcnt(0)\n {LDS} ds_read_b32 v16, v24{DONE}", 1),
    "race_read": (f"{WAVE_0_WRITES} ds_read_b32 v16, v24{DONE}", ["race: LDS byte 0 was written by wave 0", "wave 1, lane 0"],
                  f"{WAVE_0_WRITES} s_waitcnt lgkmcnt(0)\n s_barrier\n ds_read_b32 v16, v24{DONE}", 2),
    "race_write": ("v_mov_b32 v24, 0\n ds_write_b32 v24, v8\n s_waitcnt lgkmcnt(0)", ["race: LDS byte 0 was written by wave 0"], None, 2),
    "race_write_after_read": (f"{LDS} ds_write_b32 v24, v8\n s_waitcnt lgkmcnt(0)\n s_barrier\n v_xor_b32 v25, 0x100, v24\n ds_read_b32 v16, v25\n s_waitcnt lgkmcnt(0)\n ds_write_b32 v24, v9",
                              ["race: LDS byte"],
                              f"{LDS} ds_write_b32 v24, v8\n s_waitcnt lgkmcnt(0)\n s_barrier\n v_xor_b32 v25, 0x100, v24\n ds_read_b32 v16, v25\n s_waitcnt lgkmcnt(0)\n s_barrier\n ds_write_b32 v24, v9", 2),
    "write_unfinished_at_barrier": (f"{WAVE_0_WRITES} s_barrier\n ds_read_b32 v16, v24{DONE}", ["race: LDS byte", "no completed write and barrier between"], None, 2),
    "read_unfinished_at_barrier": (f"{LDS} ds_write_b32 v24, v8\n s_waitcnt lgkmcnt(0)\n s_barrier\n v_xor_b32 v25, 0x100, v24\n ds_read_b32 v16, v25\n s_barrier\n ds_write_b32 v24, v9{DONE}",
                                   ["race: LDS byte", "is written while wave"], None, 2),
    "barrier_missed": (f"{END_WAVE_1} s_barrier\n END_NAME:", ["wave 1 has ended", "not every wave reaches this barrier", "s_barrier"], "s_barrier", 2),
    "matrix_result_early": ("v_mfma_f32_32x32x8_f16 v[32:47], v[8:9], v[10:11], 0\n s_nop 8\n v_mov_b32 v16, v32", ["v32 is read too early: 2 more wait states"],
                            "v_mfma_f32_32x32x8_f16 v[32:47], v[8:9], v[10:11], 0\n s_nop 10\n v_mov_b32 v16, v32", 1),
    "matrix_result_overwritten": ("v_mfma_f32_32x32x8_f16 v[32:47], v[8:9], v[10:11], 0\n v_mov_b32 v32, 0", ["v32 is written too early"], None, 1),
    "matrix_accumulator_overlap": ("v_mfma_f32_32x32x8_f16 v[32:47], v[8:9], v[10:11], 0\n v_mfma_f32_16x16x16_f16 v[48:51], v[8:9], v[10:11], v[36:39]", ["v36 is read too early"],
                                   "v_mfma_f32_32x32x8_f16 v[32:47], v[8:9], v[10:11], 0\n v_mfma_f32_32x32x8_f16 v[32:47], v[8:9], v[10:11], v[32:47]", 1),
    "matrix_after_vector": ("v_mov_b32 v24, v8\n v_mov_b32 v25, v9\n v_mfma_f32_32x32x8_f16 a[0:15], v[24:25], v[10:11], 0", ["v24 is read too early: 1 more"],
                            "v_mov_b32 v24, v8\n v_mov_b32 v25, v9\n s_nop 1\n v_mfma_f32_32x32x8_f16 a[0:15], v[24:25], v[10:11], 0", 1),
    "mask_after_compare": ("v_cmp_lt_i32 vcc, v8, v9\n v_cndmask_b32 v16, v8, v9, vcc", ["s106 is read too early: 2 more wait states"],
                           "v_cmp_lt_i32 vcc, v8, v9\n s_nop 1\n v_cndmask_b32 v16, v8, v9, vcc", 1),
    "lane_after_vector": ("v_add_u32 v24, v8, v9\n v_readlane_b32 s10, v24, 3", ["v24 is read too early: 1 more"], "v_add_u32 v24, v8, v9\n s_nop 0\n v_readlane_b32 s10, v24, 3", 1),
    "dpp_after_vector": ("v_add_u32 v24, v8, v9\n s_nop 0\n v_mov_b32_dpp v16, v24 row_shr:1 row_mask:0xf bank_mask:0xf", ["v24 is read too early: 1 more"],
                         "v_add_u32 v24, v8, v9\n s_nop 1\n v_mov_b32_dpp v16, v24 row_shr:1 row_mask:0xf bank_mask:0xf", 1),
    "address_after_vector": ("v_readfirstlane_b32 s10, v8\n v_readfirstlane_b32 s10, v0\n s_mov_b32 s12, s4\n s_mov_b32 s13, s5\n s_movk_i32 s14, 0x800\n s_mov_b32 s15, 0x20000\n"
                             " buffer_load_dword v16, v1, s[12:15], s10 offen" + DONE, ["s10 is read too early"], None, 1),
    "load_to_lds_over_barrier": (f"{LOADS_TO_LDS} s_barrier\n {READS_OTHERS}", ["race: LDS byte", "no completed write and barrier between"],
                                 f"{LOADS_TO_LDS} s_waitcnt vmcnt(1)\n s_barrier\n {READS_OTHERS}", 2),
    "load_to_lds_waited_for_too_late": (f"{LOADS_TO_LDS} s_barrier\n s_waitcnt vmcnt(0)\n {READS_OTHERS}", ["race: LDS byte"],
                                        f"{LOADS_TO_LDS} s_waitcnt vmcnt(0)\n s_barrier\n {READS_OTHERS}", 2),
    "load_to_lds_waited_for_in_part": (f"{LOADS_TO_LDS} s_waitcnt vmcnt(2)\n s_barrier\n {READS_OTHERS}", ["race: LDS byte"], None, 2),
    "m0_before_load_to_lds": ("s_mov_b32 m0, 0\n global_load_lds_dword v1, s[4:5]", ["one wait state is needed between writing M0"], None, 1),
    "unknown_instruction": ("s_cbranch_join s4", ["instruction not known to the emulator", "s_cbranch_join"], None, 1),
    "not_an_instruction": (".long 0xffffffff", ["instruction not known to the emulator", "0xffffffff"], None, 1),
    "register_past_the_kernels": ("v_mov_b32 v130, 0", ["v130 is past the kernel's registers"], "v_mov_b32 v127, 0", 1),
    "endless": ("L3_NAME:\n s_branch L3_NAME", ["the kernel does not end"], None, 1),
    "jump_outside": ("s_mov_b64 s[10:11], 0\n s_setpc_b64 s[10:11]", ["a jump outside the code"], None, 1),
    "trap": ("s_trap 2", ["the kernel trapped"], None, 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def code():
    snippets = []
    for name, (wrong, _, right, _) in FAULTS.items():
        snippets.append(Snippet(f"wrong_{name}", wrong.replace("NAME", f"w_{name}"), lds=1024))
        if right:
            snippets.append(Snippet(f"right_{name}", right.replace("NAME", f"r_{name}"), lds=1024))
    return assembly.code_object(ARCH, snippets)


def run(gpu, code, name, waves):
    return assembly.run(gpu, code, name, np.full((LANES * waves, 8), 0x3C003C00, np.uint32), waves)


@pytest.mark.parametrize("name", FAULTS)
def test_wrong_kernel_is_an_error_and_its_right_twin_is_not(name, code):
    _, words, right, waves = FAULTS[name]
    with emulator.session(ARCH, instruction_limit=10_000) as gpu:
        with pytest.raises(emulator.KernelFault) as caught:
            run(gpu, code, f"wrong_{name}", waves)
        report = str(caught.value)
        for word in [*words, f"{ARCH} kernel wrong_{name}, pc +0x", "in workgroup (0, 0, 0), wave "]:
            assert word in report, report
        if right:
            run(gpu, code, f"right_{name}", waves)


def test_launches_that_cannot_be(code):
    with emulator.session(ARCH) as gpu:
        with pytest.raises(emulator.KernelFault, match="takes 1 to 1024"):
            gpu.launch(code, "right_barrier_missed", (1,), (2048,), b"\0" * 16)
        with pytest.raises(emulator.KernelFault, match="bytes of LDS; gfx942 has 65536"):
            gpu.launch(code, "right_barrier_missed", (1,), (64,), b"\0" * 16, lds_bytes=65536)
        with pytest.raises(emulator.KernelFault, match="no kernel absent"):
            gpu.launch(code, "absent", (1,), (64,), b"\0" * 16)
        with pytest.raises(emulator.KernelFault, match="not an AMD GPU code object"):
            gpu.launch(b"\x7fELF" + b"\0" * 100, "absent", (1,), (64,))


def test_the_first_faulty_workgroup_is_reported_whatever_the_threads(code):
    words = np.zeros((LANES, 8), np.uint32)
    for threads in (1, 2):
        with emulator.session(ARCH, threads=threads) as gpu:
            gpu.allow(words.ctypes.data, words.nbytes, writable=True)
            arguments = np.array([words.ctypes.data] * 2, np.uint64).tobytes()
            with pytest.raises(emulator.KernelFault, match=r"workgroup \(0, 0, 0\)"):
                gpu.launch(code, "wrong_undefined_store", (3, 2), (64,), arguments)
