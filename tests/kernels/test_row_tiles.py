"""In which order sm_90a's forward kernel takes row tiles (kernels_src/gpu/arch/sm90_row_tiles.h), run on the CPU with a
thread for each lane of a wave: each row tile that exists has one number, and the longest come first where needed."""

import itertools
import random
import subprocess

import pytest
from test_cpu_builds import COMPILER, HERE, SOURCES, run

DRAWN = random.Random(7)
# query heads, KV heads, bits (2^bits heads share a row tile), rows of a row tile, heads together; lengths
CASES = {
    "one": (1, 1, 0, 128, 1, [1]),
    "around a row tile": (2, 2, 0, 128, 1, [127, 128, 129, 0, 256, 257]),
    "heads in a row tile": (8, 2, 2, 128, 2, [1, 33, 500, 64]),
    "three of four heads apart": (12, 2, 1, 192, 3, [300, 7, 0, 700]),
    "all heads": (4, 4, 0, 192, 4, [DRAWN.randrange(900) for _ in range(20)]),
    "heads that are left over": (5, 5, 0, 128, 2, [DRAWN.randrange(400) for _ in range(9)]),
    "more than a wave": (2, 1, 1, 128, 1, [DRAWN.randrange(300) for _ in range(70)]),
    "none among the first 32": (1, 1, 0, 128, 1, [0] * 40 + [5, 0, 200] + [0] * 33),
    "none at all": (2, 2, 0, 128, 2, [0, 0, 0]),
}


@pytest.fixture(scope="module")
def orders(tmp_path_factory):
    """Both builds: with a mask, and without."""
    if COMPILER is None:
        pytest.skip("no g++ or clang++")
    programs = {}
    for masked in (True, False):
        programs[masked] = str(tmp_path_factory.mktemp("row_tiles") / "check")
        flags = ["-std=c++20", "-O1", "-pthread", "-Wall", "-Wextra", "-Wno-parentheses", f"-DAITER_MASKED={masked:d}"]
        run(COMPILER, *flags, f"-I{SOURCES}", str(HERE / "check_row_tiles.cpp"), "-o", programs[masked])

    def order(masked, *numbers, lengths):
        words = [programs[masked], *map(str, (*numbers, *lengths))]
        printed = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
        padded, packed = printed.removeprefix("padded\n").split("packed\n")
        return [[tuple(map(int, line.split())) for line in part.splitlines()] for part in (padded, packed)]

    return order


@pytest.mark.parametrize("masked", (True, False), ids=("masked", "full"))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_row_tile_once(orders, case, masked):
    *numbers, lengths = case
    heads, _, bits, rows, together = numbers
    of = [-(-(length << bits) // rows) for length in lengths]
    own_heads = range(0, heads, 1 << bits)
    padded, packed = orders(masked, *numbers, lengths=lengths)
    everywhere = itertools.product(range(len(lengths)), own_heads, range(max(of)))
    assert sorted(padded) == sorted(everywhere)
    assert sorted(packed) == [(b, h, t) for b, n in enumerate(of) for h in own_heads for t in range(n)]

    # Sequences are looked at 32 at a time.
    assert [b // 32 for b, _, _ in packed] == sorted(b // 32 for b, _, _ in packed)
    for _, looked_at in itertools.groupby(packed, lambda place: place[0] // 32):
        looked_at = list(looked_at)
        if masked:  # some heads after the other, and of these the last row tiles first
            sections = [(h >> bits) // together for _, h, _ in looked_at]
            assert sections == sorted(sections)
            for _, section in itertools.groupby(looked_at, lambda place: (place[1] >> bits) // together):
                levels = [t for _, _, t in section]
                assert levels == sorted(levels, reverse=True)
        else:  # what reads the same keys together
            assert [(b, h) for b, h, _ in looked_at] == sorted((b, h) for b, h, _ in looked_at)


@pytest.mark.skipif(COMPILER is None, reason="no g++ or clang++")
def test_divisors(tmp_path):
    """Exact for what there can be: all of 31 bits. Around each multiple, where a quotient that is off shows."""
    program = str(tmp_path / "check")
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", f"-I{SOURCES}"]
    run(COMPILER, *flags, str(HERE / "check_divisor.cpp"), "-o", program)
    checked = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stdout) == (0, "")
