"""Plain tables and quantities for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Columns under a line of headings; the first `left` columns aligned left, the others right."""
    lines = [tuple(map(str, head)), *(tuple(map(str, row)) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def render(line: Sequence[str]) -> str:
        cells = (line[i].ljust(width) if i < left else line[i].rjust(width) for i, width in enumerate(widths))
        return "  ".join(cells).rstrip()

    return "\n".join([render(lines[0]), "  ".join("-" * width for width in widths), *map(render, lines[1:])])


def size(count: float) -> str:
    """Bytes as B, kB, MB, GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def duration(seconds: float) -> str:
    """Seconds as µs, ms, s, min, h, d, whichever reads best."""
    units = ((1e-3, 1e6, "µs"), (1, 1e3, "ms"), (120, 1, "s"), (7200, 1 / 60, "min"), (172800, 1 / 3600, "h"))
    for limit, factor, unit in (*units, (float("inf"), 1 / 86400, "d")):
        if seconds < limit:
            value = seconds * factor
            return f"{value:.{0 if value >= 100 else 1}f} {unit}"
    return "for ever"


def count_kernels(number: int) -> str:
    return f"{number} kernel{'' if number == 1 else 's'}"
