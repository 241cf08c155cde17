"""The MoE layer: route, dispatch, combine. B sequences, T positions, D model width, S = B*T tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ragmoe.experts import FeedForward, experts_class
from ragmoe.gates import GateSettings, Routing, Tokens, gate_class
from ragmoe.moe.capacity import Capacity
from ragmoe.moe.probe import Asked, take_probe
from ragmoe.neighbours import Neighbours


def experts_a_token(config: Any) -> int:
    """K. Readers call it ``top_k``, which in a decoder's configuration would be taken for sampling's."""
    own = getattr(config, "num_experts_per_tok", None)
    return int(config.top_k if own is None else own)


def gate_settings(config: Any, layer: int = 0) -> GateSettings:
    """The gate's part of a model's configuration; ``layer`` is its place among the sparse layers."""
    return GateSettings(
        width=config.hidden_size,
        experts=config.experts,
        top_k=experts_a_token(config),
        neighbour_width=config.neighbour_width,
        attention_width=config.gate_width,
        normalise=config.normalise_weights,
        scores=config.scores,
        selection=config.selection,
        scale=config.weight_scale,
        float_weights=getattr(config, "float_weights", False),
        noise=config.gate_noise,
        jitter=config.gate_jitter,
        token_dropout=config.token_dropout,
        layer=layer,
        common_experts=config.common_experts,
        vote_start=config.vote_start,
        groups=config.expert_groups,
        expert_types=tuple(config.expert_types) if config.expert_types is not None else None,
        choice_groups=getattr(config, "choice_groups", 1),
        chosen_groups=getattr(config, "chosen_groups", 1),
    )


class MoELayer(nn.Module):
    """A gate and its experts, in the place of one feed-forward network.

    Dropless unless ``capacity_factor`` is set: every token reaches all the experts it was routed to. What an expert
    takes at most is then its share of a batch while training, and of each sequence otherwise.
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
        self.experts.sums_to_one = self.gate.sums_to_one

    def route(self, x_BTD: Tensor, neighbours: Neighbours | None = None, tokens: Tokens | None = None) -> Routing:
        """Who serves the tokens; see ``forward`` for the arguments."""
        if tokens is None:
            tokens = Tokens(torch.ones(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device))
        routing = self.gate(x_BTD.reshape(-1, x_BTD.shape[-1]), neighbours, tokens)
        if self.capacity is None:
            return routing
        served_SK = self._who_serves(self.capacity, routing, tokens.mask_BT)
        if self.capacity.overflow.passes_on:
            weights_SK, _ = self.gate.weigh(routing.logits_SE, served_SK)
            routing = routing._replace(weights_SK=weights_SK.to(routing.weights_SK.dtype))
        return routing._replace(served_SK=served_SK)

    def _who_serves(self, capacity: Capacity, routing: Routing, mask_BT: Tensor) -> Tensor:
        """Who serves each choice: while training of the whole batch at once, otherwise of each sequence by itself, so
        that an answer does not depend on what else is read beside it."""
        (B, T), mask_S, top_k = mask_BT.shape, mask_BT.reshape(-1), self.gate.settings.top_k
        serve = partial(capacity.serve, training=self.training, available=self.gate.selection.available)
        if self.training or B <= 1:
            return serve(routing, mask_S, top_k)
        rows = [slice(b * T, (b + 1) * T) for b in range(B)]
        return torch.cat([serve(routing.rows(row), mask_S[row], top_k) for row in rows])

    def key_values(self, x_BTD: Tensor, routing: Routing) -> Tensor | None:
        """What the experts add to the keys and values of the layer's attention, (B, T, 2 D); None where they do not."""
        if self.experts.key_value is None or self.gate.none_available:
            return None
        added_S2D = self.experts.key_values(x_BTD.reshape(-1, x_BTD.shape[-1]), _served(routing))
        return None if added_S2D is None else added_S2D.view(*x_BTD.shape[:2], -1)

    def forward(
        self,
        x_BTD: Tensor,
        dense: FeedForward | None,
        neighbours: Neighbours | None = None,
        tokens: Tokens | None = None,
        routing: Routing | None = None,
        asked: Asked | None = None,
        routed_BTD: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """Route and mix.

        Args:
            dense: the layer's own feed-forward network where it has kept one (LoRA experts, shared expert).
            neighbours: of as many questions as divide B; sequences of one question are consecutive.
            tokens: which of them are padding, and their types; None means no padding and no types.
            routing: where the tokens were routed already, for the experts of attention.
            asked: what the losses want to know besides, as ``probe`` of the routing.
            routed_BTD: the states that were routed then; None means those that are mixed.

        Returns:
            y_BTD and the routing of all S tokens, padding included. Where no expert is available, y_BTD is what the
            dense network answers, or zero without one.
        """
        if routing is None:
            routing = self.route(x_BTD, neighbours, tokens)
        x_SD = x_BTD.reshape(-1, x_BTD.shape[-1])
        if self.gate.none_available:
            # Not through experts of weight zero: one that is held back may hold NaN, and zero times NaN is NaN.
            y_SD = dense(x_SD) if dense is not None else torch.zeros_like(x_SD)
        else:
            y_SD = self.experts(x_SD, _served(routing), dense)
        if asked is not None:
            seen_SD = x_SD if routed_BTD is None else routed_BTD.reshape(x_SD.shape)
            probe = take_probe(self.gate, self.experts, x_SD, seen_SD, routing, neighbours, tokens, dense, asked)
            routing = routing._replace(probe=probe)
        return y_SD.view_as(x_BTD), routing


def _served(routing: Routing) -> Routing:
    """The routing as experts see it: those who serve in the place of those that were chosen."""
    return routing if routing.served_SK is None else routing._replace(experts_SK=routing.served_SK)
