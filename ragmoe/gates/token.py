"""The token gate: linear in the token state, as in Switch, Mixtral and OLMoE. The baseline of every comparison."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ragmoe.gates.base import Gate, GateSettings, register_gate
from ragmoe.neighbours import Neighbours


@register_gate("token")
class TokenGate(Gate):
    """``logits = W_t x``. Source: Shazeer et al. 2017; Fedus et al. 2021 (Switch)."""

    expert_parameters: ClassVar[tuple[str, ...]] = ("balance_bias", "token.weight")
    summary = "linear in the token state; sees no neighbours"

    def __init__(self, settings: GateSettings) -> None:
        super().__init__(settings)
        self.token = nn.Linear(settings.width, settings.experts, bias=False)

    def logits(self, x_SD: Tensor, neighbours: Neighbours | None) -> Tensor:
        return self.token(x_SD)
