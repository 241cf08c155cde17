"""Progress of long commands, on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Show:
    """Progress on stderr: one bar for each stage of an index and each condition of an evaluation."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._tasks: dict[str, Any] = {}

    def say(self, line: str) -> None:
        """A line above the bars; those of the step before go."""
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks = {}
        self._bars.console.print(line, markup=False, highlight=False)

    def line(self, text: str) -> None:
        """A line above the bars, which stay."""
        self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def questions(self, done: int, total: int, condition: str) -> None:
        """Called by an evaluation."""
        self.stage("questions" if condition == "real" else f"{condition} neighbours", done, total)

    def stage(self, name: str, done: int, total: int) -> None:
        """Called by the building of an index."""
        if name not in self._tasks:
            self._bars.start()
            self._tasks[name] = self._bars.add_task(name, total=total)
        self._bars.update(self._tasks[name], completed=done, total=total)


@contextmanager
def working(on: str) -> Iterator[None]:
    """Say on a terminal what is being done while nothing can be counted yet; nothing of it stays."""
    from rich.console import Console

    with Console(stderr=True).status(f"{on} ..."):
        yield


@contextmanager
def progress() -> Iterator[Show]:
    """Bars while something long runs; nothing of them stays."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:>22}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=Console(stderr=True))
    try:
        yield Show(bars)
    finally:
        # Where nothing was shown, rich would still end with an empty line.
        if bars.live.is_started:
            bars.stop()
