"""The MoE layer: route, dispatch, combine. B sequences, T positions, D model width, S = B*T tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ragmoe.experts import FeedForward, experts_class
from ragmoe.gates import GateSettings, Routing, Tokens, gate_class
from ragmoe.moe.capacity import Capacity
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
        scores=config.scores,
        selection=config.selection,
        scale=config.weight_scale,
        noise=config.gate_noise,
        jitter=config.gate_jitter,
        token_dropout=config.token_dropout,
        layer=layer,
        common_experts=config.common_experts,
        vote_start=config.vote_start,
        groups=config.expert_groups,
        expert_types=tuple(config.expert_types) if config.expert_types is not None else None,
    )


class MoELayer(nn.Module):
    """A gate and its experts, in the place of one feed-forward network.

    Dropless unless ``capacity_factor`` is set: every token reaches all the experts it was routed to.
    """

    def __init__(self, config: Any, layer: int = 0) -> None:
        super().__init__()
        self.gate = gate_class(config.gate)(gate_settings(config, layer))
        self.experts = experts_class(config.expert_kind)(config)
        self.capacity = Capacity.of(config)
        if self.capacity is not None:
            self.gate.leaves_empty = True
        if self.gate.leaves_empty:
            self.experts.allow_empty(drops=self.capacity is not None and self.capacity.overflow.drops)

    def forward(
        self,
        x_BTD: Tensor,
        dense: FeedForward | None,
        neighbours: Neighbours | None = None,
        tokens: Tokens | None = None,
    ) -> tuple[Tensor, Routing]:
        """Route and mix.

        Args:
            dense: the layer's own feed-forward network where it has kept one (LoRA experts, shared expert).
            neighbours: of as many questions as divide B; sequences of one question are consecutive.
            tokens: which of them are padding, and their types; None means no padding and no types.

        Returns:
            y_BTD and the routing of all S tokens, padding included. Where no expert is available, y_BTD is what the
            dense network answers, or zero without one.
        """
        if tokens is None:
            tokens = Tokens(torch.ones(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device))
        x_SD = x_BTD.reshape(-1, x_BTD.shape[-1])
        routing = self.gate(x_SD, neighbours, tokens)
        if self.capacity is not None:
            routing = self._limited(routing, self.capacity, tokens.mask_BT.reshape(-1))
        if self.gate.none_available:
            # Not through experts of weight zero: one that is held back may hold NaN, and zero times NaN is NaN.
            y_SD = dense(x_SD) if dense is not None else torch.zeros_like(x_SD)
        else:
            served_SK = routing.experts_SK if routing.served_SK is None else routing.served_SK
            y_SD = self.experts(x_SD, routing._replace(experts_SK=served_SK), dense)
        return y_SD.view_as(x_BTD), routing

    def _limited(self, routing: Routing, capacity: Capacity, mask_S: Tensor) -> Routing:
        """The routing with who serves it, and the weights of those who do where choices were passed on."""
        served_SK = capacity.serve(routing, mask_S, self.gate.settings.top_k, training=self.training)
        if capacity.overflow.passes_on:
            weights_SK, _ = self.gate.weigh(routing.logits_SE, served_SK)
            routing = routing._replace(weights_SK=weights_SK.to(routing.weights_SK.dtype))
        return routing._replace(served_SK=served_SK)
