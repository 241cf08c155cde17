"""The two-layer gate: a small network on the token state, where a linear gate cannot tell tokens apart."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from ragmoe.gates.base import Gate, GateSettings, register_gate
from ragmoe.gates.linear import ExpertLinear
from ragmoe.neighbours import Neighbours


@register_gate("mlp")
class MlpGate(Gate):
    """``logits = W_2 relu(W_1 x + b_1)``, with a hidden layer of ``attention_width``; sees no neighbours.

    Source: the two-layer gates of GShard's family (Lepikhin et al. 2020).
    """

    own_parameters: ClassVar[tuple[str, ...]] = ("balance_bias", "out.weight")
    summary = "a two-layer network on the token state; sees no neighbours"

    def __init__(self, settings: GateSettings) -> None:
        super().__init__(settings)
        self.hidden = nn.Linear(settings.width, settings.attention_width)
        self.out = ExpertLinear(settings.attention_width, settings.experts)

    def logits(self, x_SD: Tensor, neighbours: Neighbours | None) -> Tensor:
        return self.out(F.relu(self.hidden(x_SD)))
