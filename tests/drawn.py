"""Which combinations of options and layouts the random tests draw, and how often.

    AITER_DRAWN=drawn.jsonl pytest tests/test_options.py tests/kernels/test_{cpu_options,gpu_random}.py
    python tests/drawn.py drawn.jsonl       # the tables of docs/drawn_options.md

Draws are derandomized: the same on every machine that runs the same tests.
"""

import collections
import json
import os
import sys

_FILE = os.environ.get("AITER_DRAWN")
_OPTIONS = ("causal", "window", "softcap", "alibi", "sinks", "offsets", "unequal dims", "chunk", "dropout")


def note(where: str, operation: str, layout: str, **on: bool) -> None:
    """One problem that a test has drawn: `on` says which of _OPTIONS it has (spaces as underscores)."""
    if _FILE:
        names = [name for name in _OPTIONS if on.pop(name.replace(" ", "_"), False)]
        assert not on, f"unknown: {on}"
        line = json.dumps({"where": where, "operation": operation, "layout": layout, "on": names})
        with open(_FILE, "a") as file:  # a short line is appended whole: several workers write
            file.write(line + "\n")


def note_call(where: str, operation: str, call, dims: tuple[int, int], causal: bool) -> None:
    """The same for a `random_calls.Call`."""
    names = {"window": "window", "softcap": "softcap", "alibi": "alibi_slopes", "sinks": "sinks"}
    names |= {"offsets": "query_offsets", "chunk": "chunk", "dropout": "rng_state"}
    on = {name: key in call.options for name, key in names.items()}
    note(where, operation, call.layout, causal=causal, unequal_dims=dims[0] != dims[1], **on)


def table(lines: list[dict]) -> str:
    """Markdown: a row for each operation and place, columns for options; then pairs of options."""
    kinds = collections.defaultdict(list)
    for line in lines:
        kinds[line["operation"], line["where"]].append(line["on"])
    rows = [_row("operation", "where", "problems", *_OPTIONS, "none"), _row(*["---"] * (len(_OPTIONS) + 4))]
    for (operation, where), problems in sorted(kinds.items()):
        counts = [sum(name in on for on in problems) for name in _OPTIONS]
        rows.append(_row(operation, where, len(problems), *counts, sum(not on for on in problems)))
    rows += ["", _row("together with", *_OPTIONS), _row(*["---"] * (len(_OPTIONS) + 1))]
    for one in _OPTIONS:
        both = [sum(one in line["on"] and other in line["on"] for line in lines) for other in _OPTIONS]
        rows.append(_row(one, *("" if other == one else n for other, n in zip(_OPTIONS, both, strict=True))))
    layouts = collections.Counter(line["layout"] for line in lines)
    distinct = {(line["operation"], line["layout"], *line["on"]) for line in lines}
    rows += [
        "",
        "Layouts: " + ", ".join(f"{name} {count}" for name, count in layouts.most_common()) + ".",
        f"Different combinations of operation, layout and options: {len(distinct)}, of {len(lines)} problems.",
    ]
    return "\n".join(rows)


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(table([json.loads(line) for line in file]))
