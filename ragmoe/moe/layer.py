"""The MoE layer: route, dispatch, combine. B sequences, T positions, D model width, S = B*T tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ragmoe.experts import FeedForward, experts_class
from ragmoe.gates import GateSettings, Routing, gate_class
from ragmoe.neighbours import Neighbours


def gate_settings(config: Any) -> GateSettings:
    """The gate's part of a model's configuration."""
    return GateSettings(
        width=config.hidden_size,
        experts=config.experts,
        top_k=config.top_k,
        neighbour_width=config.neighbour_width,
        attention_width=config.gate_width,
        normalise=config.normalise_weights,
        noise=config.gate_noise,
        token_dropout=config.token_dropout,
    )


class MoELayer(nn.Module):
    """A gate and its experts, in the place of one feed-forward network.

    Dropless: every token reaches all the experts it was routed to.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate = gate_class(config.gate)(gate_settings(config))
        self.experts = experts_class(config.expert_kind)(config)

    def forward(
        self, x_BTD: Tensor, dense: FeedForward | None, neighbours: Neighbours | None = None
    ) -> tuple[Tensor, Routing]:
        """Route and mix.

        Args:
            dense: the layer's own feed-forward network where it has kept one (LoRA experts, shared expert).
            neighbours: of as many questions as divide B; sequences of one question are consecutive.

        Returns:
            y_BTD and the routing of all S tokens, padding included.
        """
        x_SD = x_BTD.reshape(-1, x_BTD.shape[-1])
        routing = self.gate(x_SD, neighbours)
        y_SD = self.experts.mix(x_SD, routing, dense)
        return y_SD.view_as(x_BTD), routing
