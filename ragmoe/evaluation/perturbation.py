"""Neighbours that are not the question's own: what the gate sees changes, what is read does not.

``null`` shows no neighbours, ``shuffled`` those of another question, ``wrong_domain`` those of a question of another
domain.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ragmoe._errors import ConfigError

if TYPE_CHECKING:
    from ragmoe.corpus.types import Question

REAL = "real"
SEED = 20


def partners(questions: Sequence[Question], asked: Sequence[str], perturbation: str) -> list[int] | None:
    """For each question the position of the one whose neighbours it is shown; None where it is shown its own or none.

    A partner is drawn from the whole set with a fixed seed, per question, so it does not depend on what was done
    already. It never asks the same words: questions worded alike retrieve alike. ConfigError where there is none.
    """
    if perturbation in {REAL, "null"}:
        return None
    candidates = list(range(len(questions)))
    by_domain: dict[str, list[int]] = defaultdict(list)
    for i in candidates:
        by_domain[questions[i].domain].append(i)
    if perturbation == "wrong_domain" and len(by_domain) < 2:
        raise ConfigError(
            f"the perturbation wrong_domain needs questions of two domains; there is only {', '.join(by_domain)}"
        )
    if len(set(asked)) < 2:
        raise ConfigError(f"the perturbation {perturbation} needs two different questions or more; there is one")
    others = {d: [i for i in candidates if questions[i].domain != d] for d in by_domain}
    return [
        _draw(
            others[question.domain] if perturbation == "wrong_domain" else candidates,
            asked,
            i,
            random.Random(f"{SEED}:{perturbation}:{question.id}"),
            perturbation,
        )
        for i, question in enumerate(questions)
    ]


def _draw(candidates: Sequence[int], asked: Sequence[str], own: int, rng: random.Random, perturbation: str) -> int:
    """One of the candidates that asks something else."""
    for _ in range(32):
        choice = rng.choice(candidates)
        if asked[choice] != asked[own]:
            return choice
    different = [i for i in candidates if asked[i] != asked[own]]
    if not different:
        raise ConfigError(f"the perturbation {perturbation}: every other question asks the same as {asked[own]!r}")
    return rng.choice(different)
