"""The reader's losses: of its answers, and of its routings.

B questions, M sequences a question, Q = B*M, C = 4 + T candidates a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ragmoe.models.config import RagmoeBertConfig
from ragmoe.moe import LossInputs, StepTotals, routing_loss
from ragmoe.moe.probe import Asked


def answer_loss(start_QC: Tensor, end_QC: Tensor, start_BM: Tensor, end_BM: Tensor) -> Tensor:
    """The mean of two losses, each the mean of start and end.

    *Local*: in each sequence the right candidate against all others; where the answer is not there, the right one is
    "no answer here" (candidate 0). It makes "no answer here" mean what it says.

    *Shared*: over all sequences of a question together, the right answer against all other answers ("no answer here"
    left out), for the questions that have one. It makes scores of different passages comparable (Clark and Gardner
    2018, "Simple and Effective Multi-Paragraph Reading Comprehension").

    Args:
        start_QC, end_QC: float32 logits.
        start_BM, end_BM: int64 candidates.
    """
    local = (F.cross_entropy(start_QC, start_BM.reshape(-1)) + F.cross_entropy(end_QC, end_BM.reshape(-1))) / 2
    shared = (_shared(start_QC, start_BM) + _shared(end_QC, end_BM)) / 2
    return (local + shared) / 2


def _shared(logits_QC: Tensor, target_BM: Tensor) -> Tensor:
    B, M = target_BM.shape
    answers_BMC = logits_QC.view(B, M, -1)[..., 1:]
    answered_BM = target_BM > 0
    log_BMC = answers_BMC.flatten(1).log_softmax(dim=-1).view_as(answers_BMC)
    right_BM = log_BMC.gather(2, (target_BM - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    # Every question weighs the same, so that the mean does not depend on how a batch is cut into micro-batches.
    return -(right_BM * answered_BM).sum() / B


def routing_losses(names: Iterable[str], inputs: Sequence[LossInputs], step: StepTotals | None) -> dict[str, Tensor]:
    """Routing losses by name, each the mean over the sparse layers that ``inputs`` are of; none where there are none.

    Args:
        step: what they are told of the optimiser step, where the batch is a part of it.
    """

    def of_layer(name: str, at: int) -> Tensor:
        return routing_loss(name)(inputs[at], step.of(name, at) if step is not None else None)

    if not inputs:
        return {}
    return {name: torch.stack([of_layer(name, at) for at in range(len(inputs))]).mean() for name in names}


def asked_of_layers(config: RagmoeBertConfig, step: StepTotals | None = None) -> Asked | None:
    """What the further losses of a configuration ask of a layer besides its routing; None where that is nothing.

    Args:
        step: what they are told of the optimiser step, where the batch is a part of it.
    """
    losses = config.further_losses().values() if config.experts > 1 else ()
    asked = Asked(
        any(loss.needs_swapped for loss in losses),
        any(loss.needs_outputs for loss in losses),
        step.swap if step is not None else None,
    )
    return asked if asked.swapped or asked.outputs else None
