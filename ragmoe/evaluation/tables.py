"""Tables that read the same in a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

NONE = "–"


@dataclass(frozen=True)
class Table:
    """Cells are text already; the first ``labels`` columns are aligned left, the others right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    labels: int = 1

    def markdown(self) -> str:
        """The table under its title, for a Markdown file."""
        marks = ["---" if at < self.labels else "---:" for at in range(len(self.columns))]
        lines = [_line(self.columns), _line(marks), *(_line(row) for row in self.rows)]
        return f"### {self.title}\n\n" + "\n".join(lines) + "\n" + (f"\n{self.note}\n" if self.note else "")

    def rich(self) -> Any:
        """The table as ``rich`` prints it, its title above and its note below."""
        from rich import box
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=box.SIMPLE_HEAD)
        for at, name in enumerate(self.columns):
            left = at < self.labels
            table.add_column(Text(name), justify="left" if left else "right", overflow="fold", no_wrap=not left)
        for row in self.rows:
            # As Text, so that square brackets are no markup.
            table.add_row(*map(Text, row))
        return Group(
            Text(self.title, style="bold"), table, *([Text(self.note + "\n", style="dim")] if self.note else [])
        )


def markdown(tables: Iterable[Table]) -> str:
    """Several tables for one file."""
    return "\n".join(table.markdown() for table in tables)


def number(value: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """A figure as text; a dash where there is none."""
    return NONE if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def bounds(low: float | None, high: float | None, *, sign: bool = False) -> str:
    """An interval as text."""
    return NONE if low is None or high is None else f"[{number(low, sign=sign)}, {number(high, sign=sign)}]"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
