"""Gates that are fitted in closed form, before training, on the neighbours of the training questions.

Q questions, N neighbours, R encoder width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ragmoe.corpus.types import Question
from ragmoe.gates import FittedDomainGate
from ragmoe.index import Index
from ragmoe.models import RagmoeBertForQuestionAnswering
from ragmoe.neighbours import Neighbours
from ragmoe.training.retrieved import Retrieved

_CHUNK = 512


def fit_gates(
    model: RagmoeBertForQuestionAnswering,
    index: Index,
    questions: Sequence[Question],
    retrieved: Retrieved,
    n: int,
    *,
    again: bool,
) -> None:
    """Fit the gates that have something to fit; the same neighbours serve them all.

    Args:
        n: how many neighbours the gate sees.
        again: those too that were fitted before.
    """
    gates = [layer.gate for layer in model.moe_layers if isinstance(layer.gate, FittedDomainGate)]
    gates = [gate for gate in gates if again or not gate.is_ready]
    if not gates:
        return
    pooled = []
    for begin in range(0, len(questions), _CHUNK):
        places = range(begin, min(begin + _CHUNK, len(questions)))
        pooled.append(gates[0].pool(Neighbours.stack([retrieved.neighbours(place, n) for place in places])))
    at = {name: place for place, name in enumerate(model.expert_names)}
    domain_Q = torch.tensor([at.get(question.domain, -1) for question in questions])
    for gate in gates:
        gate.fit(torch.cat(pooled), domain_Q)
