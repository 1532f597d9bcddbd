"""The timing model of the emulator: relations that must hold whatever its numbers are, and figures that follow from its
tables. Loops of the snippets stand in the frame of emulator/assembly.py."""

import struct
import subprocess
from pathlib import Path

import emulator
import numpy as np
import pytest
from emulator import assembly, hipcc, timing
from emulator.assembly import LANES, Snippet

from aiter.jit.toolchain import HIP

ARCH = "gfx942"
pytestmark = pytest.mark.skipif(assembly.missing(ARCH) is not None, reason=str(assembly.missing(ARCH)))

LINES = " v_lshlrev_b32 v24, 2, v0\n v_and_b32 v25, 63, v0\n v_lshlrev_b32 v26, 7, v25\n v_lshlrev_b32 v27, 4, v25\n"
MATRIX = "v_mfma_f32_32x32x8_f16 a[{0}:{1}], v[8:9], v[10:11], a[{0}:{1}]"
CHAIN = [MATRIX.format(0, 15), MATRIX.format(16, 31)]  # two independent accumulators, 32 cycles each
CLEAR = "\n".join(f" v_accvgpr_write_b32 a{i}, 0" for i in range(32))
PACKED, PLAIN = "v_pk_fma_f32 v[28:29], v[8:9], v[10:11], v[12:13]", "v_fma_f32 v28, v8, v10, v12"
WAIT = "s_waitcnt vmcnt(0) lgkmcnt(0)"

LOOPS = {
    "matrix": CHAIN * 4,
    "matrix_twice": CHAIN * 8,
    "matrix_and_plain": [x for pair in zip(CHAIN * 4, [PLAIN] * 8, strict=True) for x in pair],
    "matrix_and_packed": [x for pair in zip(CHAIN * 4, [PACKED] * 8, strict=True) for x in pair],
    "plain": [PLAIN] * 16,
    "exponential": ["v_exp_f32 v28, v8"] * 16,
    "reads": ["ds_read_b32 v28, v24"] * 8 + [WAIT],
    "reads_with_conflicts": ["ds_read_b32 v28, v26"] * 8 + [WAIT],
    "loads": ["global_load_dwordx4 v[28:31], v27, s[4:5]"] * 4 + [WAIT],
    "loads_of_many_lines": ["global_load_dword v28, v26, s[4:5]"] * 4 + [WAIT],
    "loads_in_shadow": ["global_load_dword v28, v24, s[4:5]", *CHAIN * 8, WAIT],
    "loads_alone": ["global_load_dword v28, v24, s[4:5]", WAIT, *CHAIN * 8],
    "nops": ["s_nop 7"] * 4,
    "one_nop": ["s_nop 0"] * 4,
    "barrier": [*[PLAIN] * 16, "s_barrier"],
}


def loop(name: str, body: list[str], times: int = 60) -> Snippet:
    lines = "\n ".join(body)
    text = f"{LINES}{CLEAR}\n s_movk_i32 s20, {times}\n s_nop 7\nL_{name}:\n {lines}\n s_sub_u32 s20, s20, 1\n"
    return Snippet(name, text + f" s_cmp_lg_u32 s20, 0\n s_cbranch_scc1 L_{name}", lds=32768)


@pytest.fixture(scope="module")
def code():
    fill = "\n".join(f" ds_write_b32 v24, v8 offset:{offset}" for offset in range(0, 30720, 2048))
    snippets = [loop(name, body) for name, body in LOOPS.items()]
    for snippet in snippets:
        snippet.body = snippet.body.replace(CLEAR, f"{CLEAR}\n{fill}\n {WAIT}")
    return assembly.code_object(ARCH, snippets)


@pytest.fixture(scope="module")
def play(code):
    """Plays a loop, by its name and waves; each once."""
    seen = {}

    def played(name: str, waves: int = 4, **how: float) -> timing.Played:
        key = (name, waves, *how.items())
        if key not in seen:
            with emulator.session(ARCH) as gpu, timing.recorded([0]):
                gpu.check_addresses(False)
                gpu.strict(False)
                assembly.run(gpu, code, name, np.full((LANES * waves, 8), 0x3C003C00, np.uint32), waves)
                played.stats = gpu.stats()  # of the last recording, which can be played again
            seen[key] = timing.play(ARCH, name, played.stats[name], resident=1, **how)
        return seen[key]

    return played


def test_the_matrix_unit_works_without_a_gap_and_two_waves_share_it(play):
    one, two = play("matrix", 4), play("matrix", 8)
    assert 8 * 32 <= one.period <= 8 * 32 + 40 and one.matrix_util > 0.85
    assert two.cycles - one.cycles > 55 * 8 * 32  # the work of one wave more
    assert two.total["matrix"] == 2 * one.total["matrix"] and two.reasons["matrix"] > 0.3
    assert play("matrix_twice").period > 1.8 * one.period


def test_plain_instructions_fit_beside_matrix_products_and_packed_ones_do_not(play):
    alone, plain, packed = play("matrix"), play("matrix_and_plain"), play("matrix_and_packed")
    assert plain.period <= alone.period * 1.1
    assert packed.period >= alone.period + 7 * 3 * 4  # each waits for the last pass and two turns
    assert packed.reasons["shadow"] > plain.reasons.get("shadow", 0)


def test_transcendental_instructions_take_four_times_as_long(play):
    overhead = play("plain").period - 16 * 4
    assert play("exponential").period - overhead == pytest.approx(4 * 16 * 4, rel=0.1)


@pytest.mark.parametrize(
    "less, more, least",
    [
        ("reads", "reads_with_conflicts", 4),
        ("loads", "loads_of_many_lines", 1.5),
        ("loads_in_shadow", "loads_alone", 1.1),
        ("one_nop", "nops", 2),
        ("plain", "barrier", 1.0),
    ],
)
def test_what_costs_more(play, less, more, least):
    assert play(more).period >= play(less).period * least


def test_waits_are_named_and_blamed_on_their_instruction(play):
    alone = play("loads_alone")
    assert alone.reasons["vmcnt"] > 0.1
    index = max(alone.stalls, key=lambda i: alone.stalls[i].get("vmcnt", 0))
    assert alone.texts[index][1].startswith("s_waitcnt")
    assert play("reads_with_conflicts").lds_util > 0.9
    assert play("nops").reasons["nop"] > 0.6


def test_a_slower_memory_and_fewer_misses_cost_more(play):
    known = timing.values(ARCH)
    before = play("loads_of_many_lines").cycles
    timing.replace(ARCH, {"memory_ns": 4 * known["memory_ns"], "misses": 4})
    try:
        assert play("loads_of_many_lines", clock_mhz=2100.0).cycles > 1.3 * before
    finally:
        timing.replace(ARCH, {name: known[name] for name in ("memory_ns", "misses")})
    with pytest.raises(ValueError, match="no parameter 'speed'"):
        timing.replace(ARCH, {"speed": 1})


def test_loops_are_periodic_and_everything_is_the_same_twice(play):
    for name in ("matrix", "matrix_and_packed", "reads"):
        assert play(name, 8, skip=3).drift < 0.1
    first, again = (timing.play(ARCH, "reads", play.stats["reads"], resident=1) for _ in range(2))
    assert (first.cycles, first.stalls, first.work) == (again.cycles, again.stalls, again.work)


def test_workgroups_follow_each_other_on_a_cu(play):
    many = play("matrix", 4, groups=6)
    assert len(many.groups) == 6 and many.cycles_a_group < many.cycles / 5
    starts = [begin for begin, _ in many.groups]
    assert starts == sorted(starts) and starts[1] > many.groups[0][1]


def test_every_number_of_the_model_has_a_source():
    for arch in emulator.ARCHS:
        for name, (value, source) in timing.parameters(arch).items():
            assert source.strip() and value >= 0, name


def test_workgroups_take_the_first_free_place():
    assert timing.makespan([3, 1, 1, 1], 2) == 3
    assert timing.makespan([1, 1, 1, 3], 2) == 4
    assert timing.makespan([], 2) == 0


def test_power_allows_a_busy_unit_no_more_than_its_limit():
    for arch in ("gfx942", "gfx950"):
        limit = timing.values(arch)["power_tflops"]
        assert timing.tflops(arch, 1.0) == pytest.approx(limit)
        speeds = [timing.tflops(arch, util) for util in (0.2, 0.4, 0.6, 0.8, 1.0)]
        assert speeds == sorted(speeds)


def test_loads_to_lds_land_when_the_wait_says_so():
    """What reads before it finds the old bytes, where it is not an error."""
    body = (
        "v_lshlrev_b32 v24, 2, v0\n ds_write_b32 v24, v8\n s_waitcnt lgkmcnt(0)\n s_mov_b32 m0, 0\n s_nop 0\n"
        " global_load_lds_dword v24, s[4:5]\n ds_read_b32 v16, v24\n s_waitcnt lgkmcnt(0)\n"
        " s_waitcnt vmcnt(0)\n ds_read_b32 v17, v24\n s_waitcnt lgkmcnt(0)"
    )
    code = assembly.code_object(ARCH, [Snippet("late", body, lds=256)])
    inputs = np.arange(LANES * 8, dtype=np.uint32).reshape(LANES, 8)
    with emulator.session(ARCH) as gpu:
        gpu.strict(False)
        result = assembly.run(gpu, code, "late", inputs)
    assert (result[:, 0] == inputs[:, 0]).all()
    assert (result[:, 1] == inputs.reshape(-1)[:LANES]).all()


PROBE = Path(__file__).parents[1] / "benchmarks" / "amd_probe" / "probe.hip"


@pytest.mark.skipif(hipcc.missing(ARCH) is not None, reason="no hipcc that would do")
def test_the_probe_runs_and_finds_the_model_s_own_numbers(tmp_path):
    target = tmp_path / "probe.co"
    options = ["-O2", "-nogpulib", "--cuda-device-only", "--no-gpu-bundle-output", f"--offload-arch={ARCH}"]
    compiler, _ = HIP.choose()
    subprocess.run([compiler.path, *options, "-c", PROBE, "-o", target], check=True)
    code, result = target.read_bytes(), np.zeros(8, np.uint64)

    def cost(name: str, threads: int = 64) -> float:
        kernel = f"_Z{len(name)}{name}Pmi"
        with emulator.session(ARCH) as gpu, timing.recorded([0]):
            gpu.allow(result.ctypes.data, result.nbytes, writable=True)
            gpu.launch(code, kernel, (1,), (threads,), struct.pack("<Qi", result.ctypes.data, 40))
            stats = gpu.stats()[kernel]
        assert result[0] > 0
        return timing.play(ARCH, kernel, stats, resident=1).period

    empty = cost("nothing")
    expected = {"plain": 4, "plain_dependent": 4, "transcendental": 16, "packed": 4, "matrix": 16, "matrix_long": 32}
    expected |= {"matrix_then_plain": 16, "matrix_then_packed": 28, "branch": timing.values(ARCH)["branch_taken"]}
    for name, cycles in expected.items():
        assert (cost(name) - empty) / 16 == pytest.approx(cycles, rel=0.1), name
    assert (cost("barrier", 256) - empty) / 16 >= timing.values(ARCH)["barrier"]
