"""The command line as a user drives it: what it prints, for people and programs, and its exit status."""

import json
import os
import shutil
import stat
import subprocess
import sys

import pytest

from aiter.cli import main, parser
from aiter.cli.model_config import read_model
from aiter.errors import AiterError
from aiter.jit import settings
from aiter.jit.arch import CPU_ARCHS, cpu_arch
from aiter.jit.log import logger
from aiter.jit.spec import Spec

SHARED_CACHE = os.environ["AITER_CACHE_DIR"]  # of all tests, see tests/conftest.py


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    for name in {"CXX", *settings.VARIABLES}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AITER_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(settings, "TEMPORARY_DIRS", ())
    level = logger.level
    yield tmp_path / "cache"
    logger.setLevel(level)


def run(capsys, *arguments):
    """Exit status, output, errors."""
    try:
        status = main(list(arguments))
    except SystemExit as exit:
        status = exit.code
    return status, *capsys.readouterr()


def run_json(capsys, *arguments):
    status, output, _ = run(capsys, *arguments, "--json")
    return status, json.loads(output)


def test_info(capsys, own_cache, monkeypatch):
    monkeypatch.setenv("AITER_HIPCC", "/nowhere/hipcc")
    monkeypatch.setenv("AITER_PREBUILT_DIRS", "/nowhere/prebuilt")
    status, facts = run_json(capsys, "info")
    assert status == 0
    assert facts["devices"][0]["device"] == "cpu" and facts["devices"][0]["arch"] == cpu_arch()
    assert facts["compilers"]["HIP"]["looked_for"] == ["/nowhere/hipcc (AITER_HIPCC)"]
    assert [cache["folder"] for cache in facts["caches"]] == ["/nowhere/prebuilt", str(own_cache)]
    status, text, _ = run(capsys, "info")
    assert status == 0
    for words in (
        cpu_arch(),
        str(own_cache),
        "looked for /nowhere/hipcc",
        "not there yet",
        "AITER_HIPCC=/nowhere/hipcc",
    ):
        assert words in text
    assert not own_cache.exists()


def test_info_without_a_home(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "user_cache_dir", lambda: None)
    private = tmp_path / "temporary" / f"aiter-{os.geteuid()}"
    status, facts = run_json(capsys, "info")
    assert status == 0 and [cache["folder"] for cache in facts["caches"]] == [str(private)]
    assert run(capsys, "cache", "path")[1].strip() == str(private)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda folder: folder.mkdir() or folder.chmod(0o777), "can be written by others"),
        (lambda folder: folder.parent.chmod(0o777), "can be written by others"),
        (lambda folder: folder.write_text(""), "not there, and cannot be made"),
        (lambda folder: folder.symlink_to("/proc/nowhere"), "  (not there"),
    ],
)
def test_info_says_what_is_wrong_with_a_cache(make, words, capsys, tmp_path, monkeypatch):
    folder = tmp_path / "volume" / "cache"
    folder.parent.mkdir()
    make(folder)
    monkeypatch.setenv("AITER_CACHE_DIR", str(folder))
    (tmp_path / "temporary" / f"aiter-{os.geteuid()}").mkdir()
    status, text, _ = run(capsys, "info")
    (writable,) = [line for line in text.splitlines() if line.startswith("  writable")]
    assert status == 0 and words in writable
    assert "  private  " in text, "where kernels are instead"


ONE_KERNEL = ("--arch", "cpu", "--ops", "flash_attn_func", "--dtypes", "fp32", "--head-dims", "8", "--causal", "no")


def put_one_kernel(capsys, folder):
    """Makes `folder` a cache that holds ONE_KERNEL, compiled at most once for all tests."""
    _, report = run_json(capsys, "prewarm", *ONE_KERNEL, "--cache-dir", SHARED_CACHE)
    name = report["kernels"][0]["name"]
    shutil.copytree(os.path.join(SHARED_CACHE, name), folder / name)


def test_archives_through_pipes(capsys, own_cache, tmp_path):
    put_one_kernel(capsys, own_cache)
    aiter = f"{sys.executable} -m aiter.cli cache"
    script = f"{aiter} export /dev/stdout | {aiter} import /dev/stdin --cache-dir {tmp_path / 'other'}"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {script}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("imported 1 kernel into") and done.stderr.startswith("wrote 1 kernel")
    assert run_json(capsys, "cache", "verify", "--cache-dir", str(tmp_path / "other"))[1]["sound"] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "FILE"),
        ("export", "FILE", "--arch", "gfx942"),
        ("import", "FILE"),
        ("import", "FOLDER"),
        ("import", "/dev/null"),
        ("export", "FOLDER"),
    ],
)
def test_errors_of_archives_name_the_file(arguments, capsys, tmp_path):
    paths = {"FILE": str(tmp_path / "k.tar"), "FOLDER": str(tmp_path)}
    arguments = [paths.get(argument, argument) for argument in arguments]
    status, _, errors = run(capsys, "cache", *arguments)
    assert status == 1 and arguments[1] in errors
    assert not (tmp_path / "k.tar").exists()


def test_the_help_of_clear_says_what_goes_and_what_stays(capsys):
    text = " ".join(run(capsys, "cache", "clear", "--help")[1].split())
    assert "Remove all kernels, or those that the options name, and no other file" in text


@pytest.mark.skipif(os.geteuid() != 0, reason="a layer is for others where root fills it")
def test_prewarm_says_where_others_cannot_read(capsys, tmp_path):
    put_one_kernel(capsys, tmp_path / "closed")
    (tmp_path / "closed").chmod(0o700)
    text = run(capsys, "prewarm", *ONE_KERNEL, "--cache-dir", str(tmp_path / "closed"))[1]
    assert f"`chmod a+rx {tmp_path / 'closed'}`" in text
    assert stat.S_IMODE((tmp_path / "closed").stat().st_mode) == 0o700


def test_a_small_prewarm_from_dry_run_to_clear(capsys, own_cache):
    choice = ("prewarm", "--arch", "cpu", "--ops", "flash_attn_func", "--dtypes", "fp32", "--head-dims", "8")
    status, report = run_json(capsys, *choice, "--dry-run")
    assert status == 0 and [kernel["state"] for kernel in report["kernels"]] == ["missing", "missing"]
    assert not own_cache.exists()
    status, text, _ = run(capsys, *choice, "--causal", "no", "--jobs", "1")
    assert status == 0 and "[1/1] built in " in text and "already there" in text
    status, report = run_json(capsys, *choice, "--causal", "no")
    assert [kernel["state"] for kernel in report["kernels"]] == ["present"]
    name = report["kernels"][0]["name"]

    assert run(capsys, "cache", "path")[1].strip() == str(own_cache)
    status, listing = run_json(capsys, "cache", "list")
    assert [entry["name"] for entry in listing["entries"]] == [name]
    assert name[:-24] in run(capsys, "cache", "list")[1].replace("  ", "-")
    assert run(capsys, "cache", "verify")[0] == 0
    other = own_cache.parent / "other"
    assert run(capsys, "cache", "export", str(own_cache.parent / "k.tar"))[0] == 0
    status, moved = run_json(capsys, "cache", "import", str(own_cache.parent / "k.tar"), "--cache-dir", str(other))
    assert status == 0 and moved["imported"] == [name]

    (own_cache / name / "kernel.so").write_bytes(b"")
    status, text, _ = run(capsys, "cache", "verify")
    assert status == 1 and "kernel.so has 0 bytes" in text
    assert run_json(capsys, "cache", "verify")[1]["faults"].keys() == {name}
    assert run(capsys, "cache", "clear", "--dry-run")[1].startswith("would remove 1 kernel")
    assert run(capsys, "cache", "clear")[1].startswith("removed 1 kernel")
    assert "holds no kernels" in run(capsys, "cache", "list")[1]


def test_prewarm_says_what_failed_in_the_compilers_words(capsys, own_cache, monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho so it is >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("AITER_CXX", str(compiler))
    choice = ("--arch", "x86-64-v3", "--ops", "flash_attn_func", "--dtypes", "fp32", "--head-dims", "8")
    status, text, errors = run(capsys, "prewarm", *choice, "--causal", "yes")
    assert status == 1
    assert "[1/1] failed" in text
    assert "failed: attention_forward-fp32-d8-causal-x86-64-v3" in errors and "so it is" in errors


def test_info_says_which_compilers_it_passes_over(capsys, monkeypatch, tmp_path):
    old = tmp_path / "g++"
    old.write_text("#!/bin/sh\necho 'g++ (GCC) 9.4.0'\necho 'Copyright (C) 2019 Free Software Foundation, Inc.'\n")
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    _, facts = run_json(capsys, "info")
    assert facts["compilers"]["C++"]["path"] not in (None, str(old))
    assert f"passed over: {old} (CXX): {old} is gcc 9.4.0, which is too old" in run(capsys, "info")[1]


@pytest.mark.parametrize("arch", ["gfx942", "sm_90a"])
def test_prewarm_covers_what_calls_need(arch, capsys):
    _, report = run_json(capsys, "prewarm", "--arch", arch, "--dry-run", "--head-dims", "64", "--backward")
    found = {(k["spec"]["kernel"], bool(k["spec"]["options"].get("paged"))) for k in report["kernels"]}
    assert found == {
        ("attention_forward", False),
        ("attention_forward", True),
        ("attention_decode", False),
        ("attention_decode", True),
        ("attention_backward", False),
        ("cache_write", False),
    }
    assert {k["spec"]["dtype"] for k in report["kernels"]} == {"fp16", "bf16"}


@pytest.mark.parametrize(
    "arguments, names",
    [
        (("--window", "both", "--causal", "yes"), {"d64-causal", "d64-window"}),
        (("--window", "yes", "--softcap", "yes", "--alibi", "yes"), {"d64-alibi-softcap-window"}),
        (("--chunk", "yes"), {"d64-chunk-window"}),
        (("--value-dims", "32,64", "--causal", "no"), {"d64-value_dim32", "d64"}),
    ],
)
def test_prewarm_takes_the_options_that_select_code(arguments, names, capsys):
    choice = ("--arch", "sm_90a", "--dtypes", "bf16", "--ops", "flash_attn_func", "--head-dims", "64", "--backward")
    _, report = run_json(capsys, "prewarm", *choice, "--dry-run", *arguments)
    kernels = ("attention_forward", "attention_decode", "attention_backward")
    expected = {f"{kernel}-bf16-{name}-sm_90a" for kernel in kernels for name in names}
    found = {Spec.from_json(kernel["spec"]).name for kernel in report["kernels"]}
    assert {name for name in found if "-cut" not in name} == expected
    forward = {name for name in expected if name.startswith("attention_forward")}
    assert {name.replace("-cut", "") for name in found if "-cut" in name} == forward  # in two forms


@pytest.mark.parametrize(
    "flags, variable, names", ((("yes",), "", [True]), (("both",), "1", [False, True]), ((), "1", [True]))
)
def test_prewarm_for_results_that_do_not_depend_on_the_batch(flags, variable, names, capsys, monkeypatch):
    """A CPU's forward kernels are built for it; on sm_90a and AMD GPUs there is one for it: that which cuts keys."""
    monkeypatch.setenv("AITER_BATCH_INVARIANT", variable)
    archs = "x86-64-v3,gfx942,sm_90a"
    choice = ("--arch", archs, "--dtypes", "bf16", "--head-dims", "64", "--causal", "yes", "--backward")
    choice = (*choice, "--ops", "flash_attn_func", "--dry-run", *(f"--batch-invariant={flag}" for flag in flags))
    _, report = run_json(capsys, "prewarm", *choice)
    gpus = "gfx942", "sm_90a"
    expected = {f"attention_{kernel}-bf16-d64-causal-{gpu}" for kernel in ("decode", "backward") for gpu in gpus}
    expected |= {f"attention_forward-bf16-d64-causal{'-cut' * name}-{gpu}" for name in {True, *names} for gpu in gpus}
    expected |= {"attention_backward-bf16-d64-causal-x86-64-v3"}
    expected |= {f"attention_forward-bf16-d64-causal{'-batch_invariant' * name}-x86-64-v3" for name in names}
    assert {Spec.from_json(kernel["spec"]).name for kernel in report["kernels"]} == expected


def test_prewarm_for_8_bit_caches(capsys):
    """They have no backward pass; what writes them has a kernel for each."""
    choice = ("--arch", "gfx942", "--dtypes", "bf16", "--head-dims", "64", "--causal", "yes", "--backward", "--dry-run")
    choice = (*choice, "--ops", "flash_attn_func,reshape_and_cache", "--cache-dtypes")
    _, report = run_json(capsys, "prewarm", *choice, "same,e4m3fnuz")
    expected = {f"attention_{kernel}-bf16-d64-causal" for kernel in ("forward", "decode", "backward")}
    expected |= {f"attention_{kernel}-bf16-d64-causal-e4m3fnuz" for kernel in ("forward", "decode")}
    expected |= {f"attention_forward-bf16-d64-causal-cut{kept}" for kept in ("", "-e4m3fnuz")}
    expected |= {"cache_write-bf16", "cache_write-bf16-e4m3fnuz"}
    assert {Spec.from_json(kernel["spec"]).name.removesuffix("-gfx942") for kernel in report["kernels"]} == expected


def test_prewarm_of_latent_attention(capsys):
    choice = ("--arch", "gfx942", "--dtypes", "bf16", "--head-dims", "576", "--causal", "yes", "--backward")
    _, report = run_json(capsys, "prewarm", *choice, "--ops", "variable_length_attention", "--dry-run")
    expected = {f"attention_decode-bf16-d576-causal{paged}-value_dim512-gfx942" for paged in ("", "-paged")}
    assert {Spec.from_json(kernel["spec"]).name for kernel in report["kernels"]} == expected


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--arch", "gfx1100"), "gfx90a, gfx942, gfx950"),
        (("--ops", "flash"), "flash_attn_func"),
        (("--dtypes", "fp8"), "fp16, bf16, fp32"),
        (("--arch", "gfx942", "--dtypes", "fp32"), "it has: fp16, bf16"),
        (("--cache-dtypes", "fp8"), "same, e4m3fn, e4m3fnuz, e5m2"),
        (("--head-dims", "100"), "every multiple of 8 up to 512"),
        (("--value-dims", "576"), "value head_dim 576 is not supported"),
        (("--replay", "x", "--window", "yes"), "exactly what was recorded"),
        (("--model", "missing.json"), "missing.json"),
        (("--replay", "missing"), "missing"),
        (("--replay", "x", "--arch", "gfx942"), "exactly what was recorded"),
        (("--jobs", "0"), "from 1 on"),
    ],
)
def test_bad_options_are_told_with_what_would_do(arguments, words, capsys):
    status, _, errors = run(capsys, "prewarm", *arguments)
    assert status in (1, 2) and words in errors and "Traceback" not in errors


@pytest.mark.parametrize("age", ["3", "d", "-1d", "nan", "1w"])
def test_ages_that_are_none(age, capsys):
    status, _, errors = run(capsys, "cache", "clear", f"--older-than={age}")
    assert status == 2 and "is not an age such as 30d" in errors


LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_attention_heads": 32}
WHISPER = {"d_model": 384, "encoder_attention_heads": 6, "decoder_attention_heads": 4, "torch_dtype": "float32"}
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": {"hidden_size": 4096, "num_attention_heads": 32, "dtype": "bfloat16"},
    "vision_config": {"hidden_size": 1152, "num_attention_heads": 16, "dtype": "float16"},
}
LATENT = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "kv_lora_rank": 512,
    "v_head_dim": 128,
    "head_dim": 64,
    "hidden_size": 7168,
    "num_attention_heads": 128,
}
GEMMA4 = {"architectures": ["XForCausalLM"], "head_dim": 256, "global_head_dim": 512, "num_attention_heads": 8}


GEMMA2 = {**GEMMA4, "global_head_dim": None, "attn_logit_softcapping": 50.0, "sliding_window": 4096}


def both(*head_dims):
    return tuple((head_dim, causal, head_dim, ()) for head_dim in head_dims for causal in (False, True))


def causal(head_dim, value_dim=None, *options):
    return head_dim, True, value_dim or head_dim, options


def windowed(head_dim, *options):
    """A kernel with a window has it tell what is causal."""
    return head_dim, False, head_dim, (*options, "window")


@pytest.mark.parametrize(
    "config, kernels, dtypes",
    [
        ({**LLAMA, "torch_dtype": "bfloat16"}, (causal(128),), ("bf16",)),
        ({**LLAMA, "head_dim": 256}, (causal(256),), ()),
        ({"n_embd": 768, "n_head": 12, "dtype": "float16"}, both(64), ("fp16",)),
        ({"text_config": {"head_dim": 64, "dtype": "torch.float32"}}, both(64), ("fp32",)),
        (WHISPER, both(64, 96), ("fp32",)),
        (LLAVA, ((72, False, 72, ()), *both(128)), ("bf16", "fp16")),
        (LATENT, (causal(192, 128), causal(576, 512)), ()),
        ({**LATENT, "kv_lora_rank": 256}, (causal(192, 128), causal(320, 256)), ()),
        ({**LATENT, "kv_lora_rank": None, "v_head_dim": 100}, (causal(192, 104),), ()),
        (GEMMA4, (causal(256), causal(512)), ()),
        (GEMMA2, (windowed(256, "softcap"), causal(256, 256, "softcap")), ()),
        ({**LLAMA, "sliding_window": 4096}, (windowed(128), causal(128)), ()),
        ({**LLAMA, "sliding_window": 4096, "use_sliding_window": False}, (causal(128),), ()),
        ({**LLAMA, "local_attention": 128, "is_causal": False}, ((128, False, 128, ()), windowed(128)), ()),
        ({**LLAMA, "head_dim": 192, "v_head_dim": 128}, (causal(192, 128),), ()),
        ({"embed_dim": 96, "num_heads": [3, 6, 12], "num_attention_heads": None}, both(32), ()),
        ({"hidden_sizes": [64, 160], "num_attention_heads": [1, 5]}, both(32, 64), ()),
        ({**LLAMA, "hidden_size": 288, "num_attention_heads": 8}, (causal(40),), ()),  # 36, padded
        ({"head_dim": 64, "linear_key_head_dim": 128, "use_head": True, "hidden_size": 64}, both(64), ()),
    ],
)
def test_model_configurations(config, kernels, dtypes, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = read_model(tmp_path / "config.json")
    assert model.kernels == kernels and model.dtypes == dtypes
    assert not model.notes


def test_parts_get_the_defaults_of_their_family(tmp_path):
    pytest.importorskip("transformers", reason="Hugging Face transformers is not installed")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": {"model_type": "gemma"}}))
    assert {kernel.head_dim for kernel in read_model(tmp_path).kernels} == {64, 256}


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "not a model configuration"),
        ("[]", "not a model configuration"),
        ("{}", "expected head_dim"),
        ('{"hidden_size": 100}', "expected head_dim"),
        ('{"head_dim": 520}', "head_dim 520 is not supported"),
        ('{"head_dim": "x"}', "expected head_dim"),
        ('{"model_type": "t5", "d_kv": 64, "relative_attention_num_buckets": 32}', "t5: has a position bias"),
        ('{"model_type": "bloom", "hidden_size": 64, "n_head": 8}', "has ALiBi"),
    ],
)
def test_what_no_kernel_is_built_for(content, words, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(AiterError, match=words):
        read_model(tmp_path / "config.json")


@pytest.mark.parametrize(
    "config, left_out, built",
    [({**GEMMA4, "global_head_dim": 1024}, 1024, 256), ({**LATENT, "kv_lora_rank": 1024}, 1088, 192)],
)
def test_model_prewarm_says_what_it_leaves_out(config, left_out, built, capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    choice = ("prewarm", "--model", str(tmp_path / "config.json"), "--arch", "gfx950", "--dry-run", "--json")
    status, output, errors = run(capsys, *choice)
    assert status == 0 and f"head_dim {left_out} is not supported" in errors
    assert {kernel["spec"]["head_dim"] for kernel in json.loads(output)["kernels"]} == {0, built}  # 0: any


def test_model_prewarm(capsys, tmp_path):
    config = {"architectures": ["X"], "head_dim": 96, "torch_dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, report = run_json(capsys, "prewarm", "--model", str(tmp_path / "config.json"), "--arch", "gfx950", "--dry-run")
    assert {(k["spec"]["head_dim"], k["spec"]["dtype"], k["spec"]["arch"]) for k in report["kernels"]} == {
        (96, "fp16", "gfx950"),
        (0, "fp16", "gfx950"),  # what writes caches serves all
    }


def test_native_without_a_gpu_is_the_cpu(capsys):
    _, report = run_json(capsys, "prewarm", "--dry-run", "--head-dims", "64")
    import torch

    if not torch.cuda.is_available():
        assert {k["spec"]["arch"] for k in report["kernels"]} == {cpu_arch()}
        assert cpu_arch() in CPU_ARCHS or os.uname().machine != "x86_64"


def test_demo(capsys, monkeypatch):
    monkeypatch.setenv("AITER_CACHE_DIR", SHARED_CACHE)
    status, report = run_json(capsys, "demo", "--device", "cpu")
    assert status == 0 and len(report["operations"]) == 5
    status, text, _ = run(capsys, "demo", "--device", "cpu")
    assert status == 0
    for row in report["operations"]:
        assert row["error"] < 1e-5 and row["operation"] in text


def test_as_a_program_without_a_terminal():
    command = [sys.executable, "-m", "aiter.cli"]
    done = subprocess.run([*command, "cache", "list"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, "") and "holds no kernels" in done.stdout
    with subprocess.Popen([*command, "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # as `| head` does when it has seen enough
        assert process.stderr.read() == ""


def test_kernels_are_looked_after_without_pytorch():
    script = """
import sys
from aiter.cli import main, parser
status = main(["prewarm", "--arch", "gfx942", "--dry-run", "--json"]) or main(["cache", "verify"])
sys.exit(status or "torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL).returncode == 0


def test_help_is_quick_and_names_every_command(capsys):
    status, text, _ = run(capsys, "--help")
    assert status == 0
    for command in ("info", "demo", "prewarm", "cache"):
        assert command in text
    status, shown, _ = run(capsys)
    assert status == 2 and shown == text, "without a command, too"
    status, text, _ = run(capsys, "cache")
    assert status == 2 and "aiter cache" in text and "export" in text


def test_help_shows_examples_that_work(capsys):
    """Each line of examples is a command line that is understood."""
    for command in ([], ["prewarm"], ["cache", "clear"]):
        text = run(capsys, *command, "--help")[1]
        examples = [line.split("#")[0].split() for line in text.partition("examples:")[2].splitlines() if line.strip()]
        assert len(examples) >= 3
        for program, *arguments in examples:
            assert program == "aiter" and parser().parse_args(arguments).run


def test_the_version(capsys):
    import aiter

    assert run(capsys, "--version") == (0, f"aiter {aiter.__version__}\n", "")
    done = subprocess.run([sys.executable, "-m", "aiter", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"aiter {aiter.__version__}\n")


def test_errors_name_the_file(capsys, tmp_path):
    assert run(capsys, "prewarm", "--replay", str(tmp_path))[2] == f"aiter: {tmp_path}: Is a directory\n"
