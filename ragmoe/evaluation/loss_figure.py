"""The picture of training: each arm's loss, as the mean over its seeds, smoothed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle
from statistics import fmean

from ragmoe.evaluation.figures import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, Drawn, blank

# Of a training: (step, loss).
Curve = Sequence[tuple[int, float]]


def losses(by_arm: Mapping[str, Sequence[Curve]], otherwise: Sequence[str] = ()) -> Drawn | None:
    """The loss of each arm's training, as the mean over its seeds, smoothed.

    Args:
        otherwise: arms that learned from other material, which the caption names.
    """
    curves = {arm: smoothed(_mean_curve(of_arm)) for arm, of_arm in by_arm.items()}
    curves = {arm: curve for arm, curve in curves.items() if len(curve) > 1}
    if not curves:
        return None
    figure = blank(7.2, 3.4)
    axes = figure.subplots()
    colours = [VERMILION, BLUE, GREEN, ORANGE, PURPLE, SKY, BLACK]
    styles = dict(zip(curves, cycle((line, colour) for line in ("-", "--", ":") for colour in colours), strict=False))
    # The legend has the order in which the curves end.
    for arm, curve in sorted(curves.items(), key=lambda entry: -entry[1][-1][1]):
        steps, values = zip(*curve, strict=True)
        line, colour = styles[arm]
        axes.plot(steps, values, line, color=colour, linewidth=1.4, label=arm)
    # The first quarter falls steeply and would leave no room for differences: it may leave the picture at the top.
    late = [loss for curve in curves.values() for step, loss in curve if step >= curve[-1][0] / 4]
    margin = 0.05 * (max(late) - min(late)) or 0.1
    axes.set_ylim(min(late) - margin, max(late) + margin)
    axes.set_xlim(left=0)
    axes.grid(axis="y")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("training loss of the answers (nats)")
    figure.legend(loc="outside right upper")
    seeds = max(sum(bool(curve) for curve in by_arm[arm]) for arm in curves)
    caption = f"{'Mean over the seeds, s' if seeds > 1 else 'S'}moothed by an exponential average over a fifth of the "
    caption += "training. The steep beginning leaves the picture at the top."
    if shown := [arm for arm in curves if arm in otherwise]:
        caption += f" Not to be compared with the others: {', '.join(shown)}, which learned from other material."
    return Drawn(figure, "loss.png", "Training loss", caption)


def smoothed(curve: Curve) -> list[tuple[int, float]]:
    """An exponential moving average whose memory is a fifth of the curve's points."""
    keep = 1 - 2 / (max(1, len(curve) // 5) + 1)
    made: list[tuple[int, float]] = []
    for step, loss in curve:
        made.append((step, keep * made[-1][1] + (1 - keep) * loss if made else loss))
    return made


def _mean_curve(curves: Sequence[Curve]) -> list[tuple[int, float]]:
    """The mean over the trainings that began, at the steps that all of them reached."""
    values: dict[int, list[float]] = defaultdict(list)
    for curve in curves:
        for step, loss in curve:
            values[step].append(loss)
    begun = sum(bool(curve) for curve in curves)
    return [(step, fmean(found)) for step, found in sorted(values.items()) if len(found) == begun]
