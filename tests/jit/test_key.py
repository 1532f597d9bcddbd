"""The spec and its key: what changes it, what does not, and what is refused."""

import dataclasses
import itertools
import os
import shutil

import pytest

from aiter.errors import UnsupportedArchError, UnsupportedError
from aiter.jit import sources
from aiter.jit.arch import CPU_ARCHS, check
from aiter.jit.recipe import recipe_for
from aiter.jit.spec import Spec

BASE = Spec("tiny", "fp32", 64, False, "x86-64-v3")


def key(root, spec=BASE):
    return recipe_for(spec, root).key


def test_key_is_the_same_elsewhere_and_later(tree, tmp_path):
    before = key(tree)
    elsewhere = tmp_path / "another place" / "src"
    shutil.copytree(tree, elsewhere)
    for path in elsewhere.rglob("*"):
        os.utime(path, (1, 1))
    assert key(elsewhere) == before


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bf16"},
        {"head_dim": 128},
        {"causal": True},
        {"arch": "x86-64-v4"},
        {"options": (("paged", 1),)},
        {"options": (("paged", 2),)},
    ],
)
def test_every_field_of_the_spec_changes_key_and_name(tree, change):
    other = dataclasses.replace(BASE, **change)
    assert key(tree, other) != key(tree)
    assert other.name != BASE.name


@pytest.mark.parametrize("file", ["cpu/tiny.cpp", "include/answer.h", "include/aiter_abi.h"])
def test_every_source_changes_the_key(tree, file):
    before = key(tree)
    (tree / file).write_text((tree / file).read_text() + "\n")
    assert key(tree) != before


def test_a_new_file_that_hides_an_included_one_changes_the_key(tree):
    before = key(tree)
    (tree / "cpu" / "answer.h").write_text("#define ANSWER 2\n")  # found before include/answer.h
    assert key(tree) != before


def test_files_that_are_not_included_do_not_change_the_key(tree):
    before = key(tree)
    (tree / "cpu" / "other.cpp").write_text("int x;")
    (tree / "include" / "unused.h").write_text("int y;")
    assert key(tree) == before


def test_includes_are_followed_through_other_files_and_in_circles(tree):
    (tree / "include" / "answer.h").write_text('#pragma once\n  #  include <deep/one.h>\n#include "answer.h"\n')
    (tree / "include" / "deep").mkdir()
    (tree / "include" / "deep" / "one.h").write_text('#include "../../cpu/two.h"\n#include "../../../outside.h"\n')
    (tree / "cpu" / "two.h").write_text("#include <vector>\n")
    (tree.parent / "outside.h").write_text("int outside;\n")
    assert list(sources.collect(tree, "cpu/tiny.cpp")) == [
        "cpu/tiny.cpp",
        "cpu/two.h",
        "include/aiter_abi.h",
        "include/answer.h",
        "include/deep/one.h",
    ]


def test_the_real_sources_are_found_and_have_keys():
    root = sources.find_root()
    for spec in (
        Spec("attention_forward", "bf16", 128, True, "x86-64-v3"),
        Spec("attention_forward", "bf16", 128, True, "gfx942"),
        Spec("attention_forward", "bf16", 128, True, "sm_90a"),
    ):
        recipe = recipe_for(spec, root)
        assert recipe.name == f"{spec.name}-{recipe.key}"
        assert len(recipe.files) > 1


def test_unknown_kernels_and_archs_are_named_with_what_there_is(tree):
    with pytest.raises(UnsupportedError, match=r"'nothing' for x86-64-v3; kernels for it: tiny"):
        recipe_for(dataclasses.replace(BASE, kernel="nothing"), tree)
    with pytest.raises(UnsupportedArchError, match=r"'gfx1100'.*gfx90a, gfx942, gfx950"):
        recipe_for(dataclasses.replace(BASE, arch="gfx1100"), tree)


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx950", "sm_80", "sm_90a", "sm_120", *CPU_ARCHS])
def test_supported_archs(arch):
    assert check(arch) == arch


@pytest.mark.parametrize("arch", ["gfx906", "sm_75", "sm_", "sm_90 -x", "x86-64-v9", "../etc", "native"])
def test_unsupported_archs(arch):
    with pytest.raises(UnsupportedArchError):
        check(arch)


def test_cpu_archs_build_on_each_other():
    needs = [arch.cpuinfo for arch in CPU_ARCHS.values()]
    assert all(less < more for less, more in itertools.pairwise(needs))


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": "../../evil"},
        {"kernel": "a; rm -rf x"},
        {"kernel": 3},
        {"dtype": "fp8"},
        {"head_dim": "64"},
        {"head_dim": -1},
        {"head_dim": True},
        {"causal": 1},
        {"arch": "gfx942;x"},
        {"arch": "-march=native"},
        {"options": (("paged", "1; x"),)},
        {"options": (("b", 1), ("a", 1))},
        {"options": (("a", 1), ("a", 2))},
        {"options": ("ab",)},
    ],
)
def test_specs_that_are_none(change):
    with pytest.raises(ValueError):
        dataclasses.replace(BASE, **change)


def test_json_and_back():
    spec = Spec("tiny", "bf16", 72, True, "gfx950", (("a", 1), ("paged", 1)))
    assert Spec.from_json(spec.to_json()) == spec
    for text in ("", "{}", "[]", "null", '{"kernel": "x"}', '{"kernel":"t","dtype":"fp16","head_dim":8,"arch":"a"}'):
        with pytest.raises(ValueError, match="not a kernel spec"):
            Spec.from_json(text)
