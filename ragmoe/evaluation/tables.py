"""Tables that read the same in a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

NONE = "–"


@dataclass(frozen=True)
class Table:
    """Cells are text already; the first ``labels`` columns are aligned left, the others right.

    ``command`` makes the figures again; it stands in Markdown alone.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    labels: int = 1
    command: str = ""

    def markdown(self) -> str:
        """The table under its title, for a Markdown file."""
        marks = ["---" if at < self.labels else "---:" for at in range(len(self.columns))]
        lines = [_line(self.columns), _line(marks), *(_line(row) for row in self.rows)]
        below = [self.note] * bool(self.note) + [f"Made by `{self.command}`"] * bool(self.command)
        return f"### {self.title}\n\n" + "\n".join(lines) + "\n" + "".join(f"\n{text}\n" for text in below)

    def transposed(self, corner: str) -> Table:
        """The same with rows for columns; ``corner`` heads the new first column."""
        (_, *heads), *rows = zip(self.columns, *self.rows, strict=True)
        return replace(self, columns=[corner, *heads], rows=rows)

    @property
    def width(self) -> int:
        """Characters that a line needs at least: figures are never cut, labels only between words."""
        return sum(self._widths) + 3 * len(self.columns) + 2

    @property
    def _widths(self) -> list[int]:
        columns = zip(self.columns, *self.rows, strict=True)
        return [
            max(len(part) for cell in cells for part in (cell.split() if at < self.labels else [cell]) or [""])
            for at, cells in enumerate(columns)
        ]

    def rich(self) -> Any:
        """The table as ``rich`` prints it, its title above and its note below."""
        from rich import box
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=box.SIMPLE_HEAD)
        for at, (name, width) in enumerate(zip(self.columns, self._widths, strict=True)):
            left = at < self.labels
            table.add_column(
                Text(name),
                justify="left" if left else "right",
                overflow="fold",
                no_wrap=not left,
                min_width=width,
            )
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


def bounds(low: float | None, high: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """An interval as text."""
    if low is None or high is None:
        return NONE
    return f"[{number(low, digits, sign=sign)}, {number(high, digits, sign=sign)}]"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
