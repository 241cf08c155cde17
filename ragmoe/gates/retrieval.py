"""The retrieval gate: each token attends over the neighbours of its question, and routes by what it finds there.

This is what ragmoe is for. S tokens, A attention width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragmoe.gates.attention import NeighbourAttention
from ragmoe.gates.base import GateSettings, register_gate
from ragmoe.gates.context import ContextGate
from ragmoe.gates.linear import ExpertLinear
from ragmoe.neighbours import Neighbours


@register_gate("retrieval")
class RetrievalGate(ContextGate):
    """``logits = W_t x + W_c c``, with ``c`` the attention of the token over the neighbours and a *null neighbour*.

    Nothing is added after ``c``, which is zero where there are no neighbours. Therefore

    * at step 0 (``W_c`` is zero) the gate equals the token gate bit for bit, and
    * with no neighbours it equals its own token part, also after training.
    """

    summary = "token state plus its attention over the neighbours, with a null neighbour to fall back on"

    def __init__(self, settings: GateSettings) -> None:
        super().__init__(settings)
        self.attention = NeighbourAttention(settings.width, settings.neighbour_width, settings.attention_width)
        self.context = ExpertLinear(settings.attention_width, settings.experts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.attention.reset_parameters()

    @torch.no_grad()
    def set_context(self, directions_ER: Tensor) -> None:
        # As close as the attention's width allows. Its first values take the place of as many random ones, no larger.
        value_AR, context_EA = self.attention.value.weight, self.context.weight
        parts = torch.linalg.svd(directions_ER.float().to(value_AR.device), full_matrices=False)
        U_EX, strength_X, V_XR = (part.to(value_AR.dtype) for part in parts)
        X = min(len(strength_X), len(value_AR))
        size = value_AR.norm(dim=1).mean()
        value_AR[:X] = V_XR[:X] * size
        context_EA.zero_()
        context_EA[:, :X] = U_EX[:, :X] * strength_X[:X] / size

    def logits(self, x_SD: Tensor, neighbours: Neighbours | None) -> Tensor:
        logits_SE = super().logits(x_SD, neighbours)
        if neighbours is None:
            return logits_SE
        found_SA = self.attention(x_SD, neighbours, prepared=neighbours.prepared(self.settings.layer))
        return logits_SE + self.context(found_SA)

    def prepare(self, neighbours: Neighbours) -> tuple[Tensor, Tensor]:
        return self.attention.key_values(neighbours, self.token.weight.dtype)
