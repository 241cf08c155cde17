"""What every benchmark writes: rows in the shape of a result, the machine, a table."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ragmoe._threads import available_threads


def row(
    case: str, metric: str, value: float, *, baseline: float | None, target: float | None, unit: str = "share"
) -> dict[str, Any]:
    """A row of a benchmark's result; ratio is value to baseline, ok is whether it reaches the target."""
    ratio = value / baseline if baseline else None
    return {
        "case": case,
        "metric": metric,
        "value": round(value, 4),
        "unit": unit,
        "baseline": None if baseline is None else round(baseline, 4),
        "ratio": None if ratio is None else round(ratio, 4),
        "target": target,
        "ok": None if target is None or ratio is None else ratio >= target,
    }


def write_result(out: Path, bench: str, rows: list[dict[str, Any]], markdown: str) -> None:
    """Write a result as JSON and as Markdown beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {"bench": bench, "machine": machine(), "rows": rows}
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown, encoding="utf-8")


def machine() -> str:
    """The processor and its cores."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = (line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name"))
        name = next(lines, name).split(":")[-1].strip()
    return f"{name}, {available_threads()} threads"


def table(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [headers, ["---"] * len(headers), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"
