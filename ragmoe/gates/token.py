"""The token gate: linear in the token state, as in Switch, Mixtral and OLMoE. The baseline of every comparison."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ragmoe._errors import ConfigError
from ragmoe.gates.base import Gate, GateSettings, register_gate
from ragmoe.gates.linear import ExpertLinear
from ragmoe.neighbours import Neighbours


@register_gate("token")
class TokenGate(Gate):
    """``logits = W_t x``. Source: Shazeer et al. 2017; Fedus et al. 2021 (Switch)."""

    keeps_token_gate = True
    own_parameters: ClassVar[tuple[str, ...]] = ("balance_bias", "token.weight")
    summary = "linear in the token state; sees no neighbours"

    def __init__(self, settings: GateSettings) -> None:
        super().__init__(settings)
        self.token = ExpertLinear(settings.width, settings.experts)

    def logits(self, x_SD: Tensor, neighbours: Neighbours | None) -> Tensor:
        return self.token(x_SD)


@register_gate("softmax")
class SoftmaxGate(TokenGate):
    """Every expert answers every token, weighed by the softmax: a dense mixture, without any choice.

    Source: Jacobs et al. 1991; Jordan and Jacobs 1994.
    """

    keeps_token_gate = False
    fixed_experts = "it uses all of them for every token"
    summary = "all experts for every token, weighed by the softmax; costs E experts a token, and nothing is left out"

    def __init__(self, settings: GateSettings) -> None:
        if settings.top_k != settings.experts:
            raise ConfigError(
                f"the gate softmax uses all {settings.experts} experts for each token, but top_k is {settings.top_k}",
                hint=f"model.top_k={settings.experts}, or model.gate=token to choose",
            )
        super().__init__(settings)
