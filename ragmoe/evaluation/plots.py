"""The pictures of an experiment's report, as PNG files drawn by matplotlib (the extra ``report``).

What they show is in figures.py and loss_figure.py.
"""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragmoe._errors import RagmoeError
from ragmoe.evaluation import figures, loss_figure
from ragmoe.evaluation.figures import Drawn
from ragmoe.evaluation.loss_figure import Curve
from ragmoe.evaluation.results import Results
from ragmoe.evaluation.samples import write_bytes

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}
_DPI = 120


@dataclass(frozen=True)
class Picture:
    """A picture on the disk."""

    file: Path
    title: str
    caption: str

    def markdown(self, folder: Path, command: str) -> str:
        """The picture for a Markdown file in ``folder``, and the command that draws it again."""
        link = Path(os.path.relpath(self.file.resolve(), folder.resolve())).as_posix()
        return f"### {self.title}\n\n![{self.title}](<{link}>)\n\n{self.caption}\n\nMade by `{command}`\n"


def require_matplotlib() -> None:
    """RagmoeError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RagmoeError(
            "the pictures of a report are drawn by matplotlib, which is not installed",
            hint="pip install 'ragmoe[report]'",
        )


def draw(
    runs: Mapping[str, Mapping[str, Sequence[Results]]],
    losses: Mapping[str, Sequence[Curve]],
    baseline: str,
    folder: Path,
    *,
    otherwise: Sequence[str] = (),
) -> list[Picture]:
    """Draw every picture that the results are enough for. The same results give the same bytes.

    Args:
        runs: by arm and task name, one a seed; differences and load are drawn for the first task.
        losses: by arm, of each seed's training.
        baseline: the arm that differences are drawn against.
        folder: where the files go.
        otherwise: arms that learned from other material, whose losses are of other text.
    """
    import matplotlib

    tasks = list(next(iter(runs.values()))) if runs else []
    by_task = {task: {arm: of_arm[task] for arm, of_arm in runs.items()} for task in tasks}
    first = by_task[tasks[0]] if tasks else {}
    with matplotlib.rc_context(_STYLE):
        drawn = [
            figures.scores(by_task),
            figures.differences(first, baseline),
            figures.load(first),
            figures.neighbours(by_task),
            loss_figure.losses(losses, otherwise),
        ]
        return [_save(figure, folder) for figure in drawn if figure is not None]


def _save(drawn: Drawn, folder: Path) -> Picture:
    # Pillow comes with matplotlib.
    from PIL import Image

    pixels, content = io.BytesIO(), io.BytesIO()
    drawn.figure.savefig(pixels, format="png", dpi=_DPI)
    # A third of the bytes; the cells of a heat map keep their colours (within 2 % of a channel, by measurement).
    picture = Image.open(pixels).convert("RGB").quantize(256, kmeans=3, dither=Image.Dither.NONE)
    # Made anew of the pixels, it has no metadata: neither time nor version changes its bytes.
    picture.save(content, format="png", optimize=True)
    write_bytes(folder / drawn.name, content.getvalue())
    return Picture(folder / drawn.name, drawn.title, drawn.caption)
