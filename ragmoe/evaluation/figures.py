"""What a report's pictures show, as matplotlib figures; matplotlib is imported when one is drawn.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), viridis and PuOr, which colour-blind readers tell
apart. Each function returns None where there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ragmoe.evaluation.experiment import DENSE, UNTRAINED
from ragmoe.evaluation.perturbation import REAL
from ragmoe.evaluation.report import few_documents
from ragmoe.evaluation.results import Results
from ragmoe.evaluation.statistics import FEW, compare, interval, lost_domains

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By arm, each a list of runs, one a seed.
Arms = Mapping[str, Sequence[Results]]

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
_SHOWN = {
    REAL: ("the question's own", BLUE, "o"),
    "null": ("none", BLACK, "|"),
    "shuffled": ("another question's", ORANGE, "s"),
    "wrong_domain": ("another domain's", PURPLE, "^"),
}


class Drawn(NamedTuple):
    """A figure, the name of its file, and what stands beside it."""

    figure: Figure
    name: str
    title: str
    caption: str


def scores(by_task: Mapping[str, Arms]) -> Drawn | None:
    """Macro F1 of each arm with its interval and its seeds, a panel for each task."""
    if not by_task:
        return None
    arms = _ranked(next(iter(by_task.values())))
    figure, axes_T = _panels(len(by_task), arms)
    for axes, runs in zip(axes_T, by_task.values(), strict=True):
        for y, arm in enumerate(arms):
            _score(axes, y, runs[arm], VERMILION if arm == DENSE else BLUE)
            if arm == DENSE and (mean := _macro(runs[arm])) is not None:
                axes.axvline(mean, color=VERMILION, linestyle="--", linewidth=1, zorder=0)
        axes.set_title(_title(runs, "\n"))
        axes.set_xlabel("macro F1 (points)")
    spans = [interval([run.samples[REAL] for run in of_arm]) for runs in by_task.values() for of_arm in runs.values()]
    seeds = max(len(of_arm) for runs in by_task.values() for of_arm in runs.values())
    caption = "Dot and line: the mean over seeds with its 95 % interval, which resamples documents within domains."
    caption += f" Small white dots: the {seeds} seeds." if seeds > 1 else ""
    caption += " Dashed: the dense arm." if DENSE in arms else ""
    caption += few_documents(*(span.per_domain_documents for span in spans if span))
    return Drawn(figure, "macro_f1.png", "Macro F1 of each arm", caption)


def _score(axes: Axes, y: int, runs: Sequence[Results], colour: str) -> None:
    """A row: interval, mean and seeds."""
    span, mean = interval([run.samples[REAL] for run in runs]), _macro(runs)
    if span is None or mean is None:
        return
    axes.plot([span.low, span.high], [y, y], color=colour, linewidth=1.5)
    axes.plot(mean, y, "o", color=colour, markersize=7)
    if len(runs) > 1:
        seeds = [run.macro_f1 for run in runs if run.macro_f1 is not None]
        axes.plot(seeds, [y] * len(seeds), "o", color=BLACK, markersize=3, markerfacecolor="white", markeredgewidth=0.7)


def differences(runs: Arms, baseline: str) -> Drawn | None:
    """What each arm gains on the baseline in each domain, with its interval."""
    # What no arm has learned yet would take the whole range of colours.
    others = [arm for arm in reversed(_ranked(runs)) if arm not in (baseline, UNTRAINED)]
    if baseline not in runs or not others:
        return None
    of_base = [run.samples[REAL] for run in runs[baseline]]
    samples = {arm: [run.samples[REAL] for run in runs[arm]] for arm in others}
    others = [arm for arm in others if not lost_domains([*samples[arm], *of_base])]
    if not others:
        return None
    found = [compare(samples[arm], of_base) for arm in others]
    domains = list(found[0].per_domain)
    cells_AD = [[(c.difference, c.low, c.high), *(c.per_domain[d] for d in domains)] for c in found]
    bound = max(1.0, *(abs(value) for row in cells_AD for value, _, _ in row))
    figure = blank(1.6 + 0.95 * (len(domains) + 1), 0.9 + 0.42 * len(others))
    axes = figure.subplots()
    values_AD = [[value for value, _, _ in row] for row in cells_AD]
    image = axes.imshow(values_AD, cmap="PuOr", vmin=-bound, vmax=bound, aspect="auto")
    fewest = {d: min(c.per_domain_documents[d] for c in found) for d in domains}
    # What a handful of documents leave out says little of others.
    enough_D = [True, *(fewest[d] >= FEW for d in domains)]
    for y, row in enumerate(cells_AD):
        for x, (value, low, high) in enumerate(row):
            axes.text(
                x,
                y,
                f"{value:+.1f}\n[{low:+.1f}, {high:+.1f}]".replace("-", "−"),
                horizontalalignment="center",
                verticalalignment="center",
                fontsize=7,
                fontweight="bold" if enough_D[x] and (low > 0 or high < 0) else "normal",
                color="white" if abs(value) > 0.5 * bound else "black",
            )
    _name_cells(axes, ["macro", *domains], others)
    axes.axvline(0.5, color="white", linewidth=3)
    axes.set_title(f"{_title(runs)}: F1 minus that of {baseline}")
    figure.colorbar(image, ax=axes, label="difference (points)", fraction=0.03, pad=0.02)
    caption = (
        "Difference of F1 with its 95 % interval; bold where the interval does not hold zero and enough documents "
    )
    caption += f"make it.{few_documents(fewest)}"
    return Drawn(figure, "differences.png", f"Difference to {baseline} by domain", caption)


def load(runs: Arms) -> Drawn | None:
    """Which experts each domain's tokens go to: a row of panels for each arm with more than one expert."""
    routings = {arm: of_arm[0].real["routing"] for arm, of_arm in runs.items()}
    routings = {arm: routing for arm, routing in routings.items() if routing and len(routing["experts"]) > 1}
    if not routings:
        return None
    shares_DLE = {arm: 100 * np.array([*routing["load_per_domain"].values()]) for arm, routing in routings.items()}
    D, L, E = np.max([shares.shape for shares in shares_DLE.values()], axis=0)
    top = max(shares.max() for shares in shares_DLE.values())
    names = {arm: [name.removeprefix("expert ") for name in routing["experts"]] for arm, routing in routings.items()}
    # Names that stand upright below the panels want room there.
    below = 0.07 * max(_upright(of_arm) for of_arm in names.values())
    figure = blank(1.6 + L * (0.4 + 0.17 * E), 0.6 + len(routings) * (0.3 + 0.15 * D + below))
    grid = figure.subplots(len(routings), L, squeeze=False)
    image: Any = None
    for row, (arm, routing) in enumerate(routings.items()):
        for at in range(L):
            axes = grid[row, at]
            if at >= len(routing["layers"]):
                axes.set_axis_off()
                continue
            image = axes.imshow(shares_DLE[arm][:, at], cmap="viridis", vmin=0, vmax=top, aspect="auto")
            _name_cells(axes, names[arm], [*routing["load_per_domain"]] if at == 0 else [], narrow=True)
            axes.set_title(f"{arm}, layer {routing['layers'][at]['layer']}")
            if row == len(routings) - 1:
                axes.set_xlabel("expert")
    figure.colorbar(image, ax=grid, label="share of the domain's choices (%)", fraction=0.02, pad=0.01)
    caption = (
        "Of the choices of experts for a domain's tokens, the share that fell on each, by sparse layer (first seed)."
    )
    return Drawn(figure, "load.png", "Load per expert and domain", caption)


def neighbours(by_task: Mapping[str, Arms]) -> Drawn | None:
    """Macro F1 of each arm where its gate is shown other neighbours: a panel for each task that tried it."""
    tried = {
        task: runs
        for task, runs in by_task.items()
        if any(_macro(of_arm, name) is not None for of_arm in runs.values() for name in _SHOWN if name != REAL)
    }
    if not tried:
        return None
    arms = _ranked(next(iter(tried.values())))
    figure, axes_T = _panels(len(tried), arms, beside=1.7)
    for axes, runs in zip(axes_T, tried.values(), strict=True):
        for name, (label, colour, marker) in _SHOWN.items():
            found = {y: _macro(runs[arm], name) for y, arm in enumerate(arms)}
            points = {y: value for y, value in found.items() if value is not None}
            size, width = (12, 2) if marker == "|" else (6, 0.5)
            axes.plot(
                list(points.values()),
                list(points),
                marker,
                color=colour,
                markersize=size,
                markeredgewidth=width,
                markeredgecolor=colour if marker == "|" else "white",
                label=label,
            )
        axes.set_title(_title(runs, "\n"))
        axes.set_xlabel("macro F1 (points)")
    handles, labels = axes_T[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", title="neighbours shown\nto the gate", alignment="left")
    caption = "What is read stays the same. An arm with one dot alone has a gate that sees no neighbours."
    return Drawn(figure, "neighbours.png", "Other neighbours shown to the gate", caption)


def _macro(runs: Sequence[Results], condition: str = REAL) -> float | None:
    """Macro F1 as the mean over seeds; None where one has none."""
    blocks = [run.conditions.get(condition) for run in runs]
    values = [block["macro"]["f1"] if block else None for block in blocks]
    present = [value for value in values if value is not None]
    return fmean(present) if len(present) == len(values) else None


def _ranked(runs: Arms) -> list[str]:
    """Arms from the worst to the best, as they stand from the bottom of a picture to its top."""
    return sorted(runs, key=lambda arm: -1.0 if (mean := _macro(runs[arm])) is None else mean)


def _title(runs: Arms, between: str = " ") -> str:
    """A task's name and its setting; between panels that stand side by side best in two lines."""
    first = next(iter(runs.values()))[0]
    return first.name if first.name == first.setting else f"{first.name}{between}({first.setting})"


def blank(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _panels(count: int, arms: Sequence[str], beside: float = 0.0) -> tuple[Figure, list[Axes]]:
    """Panels with a row for each arm, whose names stand at the left; ``beside``: inches at the right."""
    figure = blank(1.4 + 3.0 * count + beside, 1.2 + 0.27 * len(arms))
    axes_T = list(figure.subplots(1, count, squeeze=False, sharey=True)[0])
    for axes in axes_T:
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    axes_T[0].set_yticks(range(len(arms)), labels=arms)
    axes_T[0].set_ylim(-0.6, len(arms) - 0.4)
    return figure, axes_T


def _upright(columns: Sequence[str], most: int = 2) -> int:
    """The length of the longest name, where names longer than so many letters have to stand upright; else 0."""
    longest = max(map(len, columns))
    return longest if longest > most else 0


def _name_cells(axes: Axes, columns: Sequence[str], rows: Sequence[str], *, narrow: bool = False) -> None:
    """Names beside the cells of a heat map, which has no frame and no marks.

    Args:
        narrow: columns are about two letters wide, and not about eleven.
    """
    turn = 90 if narrow else 30
    turned = bool(_upright(columns, 2 if narrow else 11))
    axes.set_xticks(
        range(len(columns)),
        labels=columns,
        rotation=turn if turned else 0,
        ha="right" if turned and not narrow else "center",
    )
    axes.set_yticks(range(len(rows)), labels=rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
