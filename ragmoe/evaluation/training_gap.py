"""How far ahead of the dense arm the others are while they train: whether a difference still grows tells what to try.

Arms that learn from the same material see it in the same order, so their running losses are compared step by step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean

from ragmoe.evaluation.loss_figure import Curve
from ragmoe.evaluation.tables import NONE, Table, number

# Stretches that a training is cut into.
_PARTS = 4


def training_gap(by_arm: Mapping[str, Sequence[Curve]], reference: str) -> Table | None:
    """By how many per cent the perplexity of the text learned from is above the reference's, by parts of the training.

    Args:
        by_arm: the (step, nats) of each arm's trainings, one a seed in the order of the reference's.
        reference: the arm that the others are compared with.

    Returns:
        The table; None where no other arm has been trained over the same steps.
    """
    own = by_arm.get(reference, ())
    gaps = {arm: _gaps(curves, own) for arm, curves in by_arm.items() if arm != reference}
    last = max((steps[-1] for steps in map(_steps, own) if steps), default=0)
    if not any(gaps.values()):
        return None
    ends = [round(last * part / _PARTS) for part in range(_PARTS + 1)]
    rows = []
    for arm, pairs in gaps.items():
        cells = []
        for begin, end in pairwise(ends):
            found = [gap for step, gap in pairs if begin < step <= end]
            cells.append(number(100 * math.expm1(fmean(found)), 2, sign=True) if found else NONE)
        if pairs:
            rows.append([arm, *cells])
    heads = [f"to step {end}" for end in ends[1:]]
    note = "A mean over the steps since the column before; below zero the arm is ahead. Auxiliary losses are left out."
    return Table(f"Perplexity while training, against {reference}, %", ["arm", *heads], rows, note=note)


def _gaps(curves: Sequence[Curve], own: Sequence[Curve]) -> list[tuple[int, float]]:
    """At each step that both have, how much an arm's loss is above the reference's, in nats; empty unless all agree."""
    found: list[tuple[int, float]] = []
    for curve, reference in zip(curves, own):
        if _steps(curve) != _steps(reference):
            return []
        found += [(step, loss - base) for (step, loss), (_, base) in zip(curve, reference)]
    return found


def _steps(curve: Curve) -> list[int]:
    return [step for step, _ in curve]
