"""The MoE layer: route, dispatch, combine. B sequences, T positions, D model width, S = B*T tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ragmoe.experts import FeedForward, experts_class
from ragmoe.gates import GateSettings, Routing, gate_class
from ragmoe.moe.probe import Asked, take_probe
from ragmoe.neighbours import Neighbours


def gate_settings(config: Any, layer: int = 0) -> GateSettings:
    """The gate's part of a model's configuration; ``layer`` is its place among the sparse layers."""
    return GateSettings(
        width=config.hidden_size,
        experts=config.experts,
        top_k=config.top_k,
        neighbour_width=config.neighbour_width,
        attention_width=config.gate_width,
        normalise=config.normalise_weights,
        noise=config.gate_noise,
        token_dropout=config.token_dropout,
        layer=layer,
        common_experts=config.common_experts,
        vote_start=config.vote_start,
    )


class MoELayer(nn.Module):
    """A gate and its experts, in the place of one feed-forward network.

    Dropless: every token reaches all the experts it was routed to.
    """

    def __init__(self, config: Any, layer: int = 0) -> None:
        super().__init__()
        self.gate = gate_class(config.gate)(gate_settings(config, layer))
        self.experts = experts_class(config.expert_kind)(config)

    def forward(
        self,
        x_BTD: Tensor,
        dense: FeedForward | None,
        neighbours: Neighbours | None = None,
        asked: Asked | None = None,
    ) -> tuple[Tensor, Routing]:
        """Route and mix.

        Args:
            dense: the layer's own feed-forward network where it has kept one (LoRA experts, shared expert).
            neighbours: of as many questions as divide B; sequences of one question are consecutive.
            asked: what the losses want to know besides, as ``probe`` of the routing.

        Returns:
            y_BTD and the routing of all S tokens, padding included. Where no expert is available, y_BTD is what the
            dense network answers, or zero without one.
        """
        x_SD = x_BTD.reshape(-1, x_BTD.shape[-1])
        routing = self.gate(x_SD, neighbours)
        if self.gate.none_available:
            # Not through experts of weight zero: one that is held back may hold NaN, and zero times NaN is NaN.
            y_SD = dense(x_SD) if dense is not None else torch.zeros_like(x_SD)
        else:
            y_SD = self.experts(x_SD, routing, dense)
        if asked is not None:
            probe = take_probe(self.gate, self.experts, x_SD, routing, neighbours, dense, asked)
            routing = routing._replace(probe=probe)
        return y_SD.view_as(x_BTD), routing
