"""The documents hold: their Python runs, their links lead somewhere, their gathered figures are the measured ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
CLIENTS = ("transformers", "diffusers", "sglang", "vllm")  # where one is missing, its page is skipped
# Programs that need a model, a process of their own and this package installed, and the tests that see to it.
PROGRAMS = {"docs/vllm.md": "tests/clients/vllm/test_plugin.py::test_program"}
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if _BLOCK.search(page.read_text())], ids=name)
def test_python_runs(page):
    code = "".join(_BLOCK.findall(page.read_text()))
    for client in CLIENTS:
        if re.search(rf"^(import|from) (aiter\.)?{client}\b", code, re.MULTILINE):
            pytest.importorskip(client)
    if name(page) in PROGRAMS:
        command = [sys.executable, "-m", "pytest", "-n", "0", PROGRAMS[name(page)]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-4000:]
    else:
        run_page(page)


def run_page(page: Path) -> None:
    """All blocks of a page, in order, as one program on the CPU; an error names the page and the line."""
    text = page.read_text()
    torch._dynamo.reset()
    names = {"__name__": "__main__"}
    for block in _BLOCK.finditer(text):
        lines_before = text[: block.start(1)].count("\n")
        exec(compile("\n" * lines_before + block[1], str(page), "exec"), names)


def heading_anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", _CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in _LINK.findall(_CODE.sub("", page.read_text())):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)} links to {link}"
        if anchor:
            assert anchor in heading_anchors(target), f"{name(page)} links to {link}, which has no such heading"


def test_pages_that_the_code_names_exist():
    for source in sorted((ROOT / "aiter").rglob("*.py")):
        for path in re.findall(r"\bdocs/[\w/]+\.md\b", source.read_text()):
            assert (ROOT / path).exists(), f"{name(source)} names {path}"


def test_gathered_figures_are_the_measured_ones(monkeypatch):
    """The table of docs/benchmarks.md is what benchmarks/overview.py makes of docs/figures/*.json."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import overview

    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert overview.markdown() in page, "run `python benchmarks/overview.py` and put its table into docs/benchmarks.md"
