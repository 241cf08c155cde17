"""The pooled gate: the token state beside the neighbours' weighted mean. The cheapest way to let retrieval speak."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ragmoe.gates.attention import weigh
from ragmoe.gates.base import GateSettings, register_gate
from ragmoe.gates.context import ContextGate
from ragmoe.gates.linear import ExpertLinear
from ragmoe.neighbours import Neighbours


@register_gate("pooled")
class PooledGate(ContextGate):
    """``logits = W_t x + W_c mean(neighbours)``, the mean weighted by the softmax of the retrieval scores.

    ``W_c`` starts at zero and has no bias: at step 0, and wherever there are no neighbours, it is the token gate.
    """

    summary = "token state plus the mean of the neighbours; one summary for all tokens of a question"
    # Cosine scores of neighbours lie within a tenth or two of each other; this makes the best count a few times the
    # worst.
    temperature = 0.1

    def __init__(self, settings: GateSettings) -> None:
        super().__init__(settings)
        self.context = ExpertLinear(settings.neighbour_width, settings.experts)
        self.reset_parameters()

    @torch.no_grad()
    def set_context(self, directions_ER: Tensor) -> None:
        self.context.weight.copy_(directions_ER)

    def logits(self, x_SD: Tensor, neighbours: Neighbours | None) -> Tensor:
        logits_SE = super().logits(x_SD, neighbours)
        if neighbours is None:
            return logits_SE
        pooled_BR = torch.einsum("bn,bnr->br", weigh(neighbours, self.temperature), neighbours.embeddings_BNR)
        context_BE = self.context(pooled_BR.to(x_SD.dtype) * math.sqrt(self.settings.neighbour_width))
        return logits_SE + context_BE.repeat_interleave(x_SD.shape[0] // len(neighbours), dim=0)
