"""What routes, by the names that configurations use."""

from __future__ import annotations

from typing import NamedTuple

from ragmoe.gates.base import gate_class, gate_names
from ragmoe.gates.scores import scores_class, scores_names
from ragmoe.gates.selection import selection_class, selection_names


class Part(NamedTuple):
    """One setting and what it can be.

    Attributes:
        setting: its key in a configuration.
        entries: names, and a line each on when to use it.
    """

    title: str
    setting: str
    entries: dict[str, str]


def catalogue() -> list[Part]:
    """Gates, selections, scores, and what is done where capacity is limited."""
    from ragmoe.moe.capacity import overflow_class, overflow_names, priority_class, priority_names

    return [
        Part("Gates: how experts are scored", "model.gate", {n: gate_class(n).summary for n in gate_names()}),
        Part(
            "Selections: which experts are chosen by their scores",
            "model.selection",
            {n: selection_class(n).summary for n in selection_names()},
        ),
        Part(
            "Scores: how logits become weights",
            "model.scores",
            {n: scores_class(n).summary for n in scores_names()},
        ),
        Part(
            "Overflow: what becomes of choices beyond model.capacity_factor",
            "model.overflow",
            {n: overflow_class(n).summary for n in overflow_names()},
        ),
        Part(
            "Priority: whose choices are served first",
            "model.overflow_priority",
            {n: priority_class(n).summary for n in priority_names()},
        ),
    ]
