"""Mixtures of experts as the decoders of transformers have them, with a gate that sees the neighbours.

A family's block calls ``self.gate(hidden_states)`` and knows nothing of neighbours; these stand in its place, under the
same names (``gate``, ``experts``, ``shared_experts``), so that plans for tensor and expert parallelism still fit.

S flattened tokens, D model width, E experts, K experts a token.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ragmoe._errors import ConfigError
from ragmoe._registry import Registry
from ragmoe.experts import FeedForward, LoraGluExperts, Start, gated
from ragmoe.experts.base import held_experts
from ragmoe.gates import Routing, gate_class
from ragmoe.moe.layer import gate_settings
from ragmoe.neighbours import Neighbours


@dataclass(frozen=True)
class BlockParts:
    """What a family's blocks are made of.

    Attributes:
        gate: a ``NeighbourGate`` that is also the family's own gate, of a configuration and a sparse layer's number.
        experts: the family's fused experts, of a configuration.
        mlp: the family's dense feed-forward network, of a configuration.
        shared: the experts that serve every token, of a configuration; None where the family has none.
    """

    gate: Callable[[Any, int], nn.Module]
    experts: Callable[[Any], nn.Module]
    mlp: Callable[[Any], nn.Module]
    shared: Callable[[Any], nn.Module] | None = None


class NeighbourGate(nn.Module):
    """Any gate of ragmoe as a family's ``...TopKRouter``, from which the family's file derives it.

    Being one, it is found where transformers records ``router_logits``; it returns what those return.

    Attributes:
        inner: the gate, by the name that the configuration says.
    """

    def __init__(self, config: Any, layer: int) -> None:
        # The family's own would make its weight here, which the inner gate has as ``token.weight``.
        nn.Module.__init__(self)
        self.inner = gate_class(config.gate)(settings := gate_settings(config, layer))
        self.top_k, self.num_experts, self.hidden_dim = settings.top_k, settings.experts, settings.width

    def forward(self, hidden_states: Tensor, neighbours: Neighbours | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (S, E) in float32, weights (S, K) as the family has them, and experts (S, K), best first."""
        x_SD = hidden_states.reshape(-1, self.hidden_dim)
        # Where the gate is kept in float32 beside a model in half precision, that is what it is computed in.
        kept = (parameter.dtype for parameter in self.inner.parameters() if parameter.is_floating_point())
        dtype = next(kept, x_SD.dtype)
        routing = self.inner(x_SD.to(dtype), neighbours)
        weights_SK = routing.weights_SK
        if not self.inner.settings.float_weights:
            weights_SK = weights_SK.to(x_SD.dtype)
        return routing.logits_SE, weights_SK, routing.experts_SK


class SparseBlock(nn.Module, ABC):
    """A gate and its experts, in the place of one feed-forward network of a decoder."""

    experts: Any

    def __init__(self, config: Any, parts: BlockParts, layer: int) -> None:
        super().__init__()
        # Mixtral's: unlike ``gate_jitter`` it disturbs what the experts see as well.
        self.jitter = float(getattr(config, "router_jitter_noise", 0.0))
        self.gate: Any = parts.gate(config, layer)

    def forward(self, hidden_states: Tensor, neighbours: Neighbours | None = None) -> Tensor:
        """Route and mix: (B, T, D). The neighbours are of as many questions as divide B."""
        if self.training and self.jitter:
            noise = torch.empty_like(hidden_states).uniform_(1 - self.jitter, 1 + self.jitter)
            hidden_states = hidden_states * noise
        x_SD = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = self.gate(x_SD, neighbours)
        # Not through experts of weight zero: one that is held back may hold NaN, and zero times NaN is NaN.
        y_SD = self.without(x_SD) if self.gate.inner.none_available else self.mix(x_SD, *routing)
        return y_SD.view_as(hidden_states)

    @property
    def changed(self) -> FeedForward | None:
        """The dense network that the experts only change; None where they stand in its place."""
        return None

    @abstractmethod
    def mix(self, x_SD: Tensor, logits_SE: Tensor, weights_SK: Tensor, experts_SK: Tensor) -> Tensor:
        """What the chosen experts answer together, with what answers every token."""

    @abstractmethod
    def copy_dense(self, mlp: Any, start: Start) -> float:
        """Start from a dense gated network; the largest absolute deviation of a weight from it, 0.0 for none."""

    @abstractmethod
    def without(self, x_SD: Tensor) -> Tensor:
        """What is left where no expert is available."""


def _holding(config: Any) -> Any:
    """A configuration of as many experts as a layer holds in memory."""
    if (held := held_experts(config)) == config.experts:
        return config
    config = copy.copy(config)
    config.experts = held
    return config


_BLOCKS: Registry[type[SparseBlock]] = Registry("expert kind of decoders")
register_block, block_names, block_class = _BLOCKS.register, _BLOCKS.names, _BLOCKS.find


@register_block("ffn")
class FusedBlock(SparseBlock):
    """The family's own experts, under their own names and through transformers' kernels."""

    def __init__(self, config: Any, parts: BlockParts, layer: int) -> None:
        super().__init__(config, parts, layer)
        self.experts = parts.experts(_holding(config))
        # The kernel that runs them is read from here, and may be changed later.
        self.experts.config = config
        self.shared_experts = parts.shared(config) if parts.shared is not None else None

    def mix(self, x_SD: Tensor, logits_SE: Tensor, weights_SK: Tensor, experts_SK: Tensor) -> Tensor:
        y_SD = self.experts(x_SD, experts_SK, weights_SK)
        return y_SD if self.shared_experts is None else y_SD + self.shared_experts(x_SD)

    @torch.no_grad()
    def copy_dense(self, mlp: Any, start: Start) -> float:
        gate_up, down = self.experts.gate_up_proj, self.experts.down_proj
        gate_up.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).expand_as(gate_up))
        down.copy_(mlp.down_proj.weight.expand_as(down))
        return start.apply(gate_up, down)

    def without(self, x_SD: Tensor) -> Tensor:
        return torch.zeros_like(x_SD) if self.shared_experts is None else self.shared_experts(x_SD)


@register_block("lora")
class LoraBlock(SparseBlock):
    """Low-rank experts on a dense network that they share (see ``ragmoe.experts.lora``)."""

    def __init__(self, config: Any, parts: BlockParts, layer: int) -> None:
        super().__init__(config, parts, layer)
        self.experts = LoraGluExperts(config)
        self.experts.sums_to_one = self.gate.inner.sums_to_one
        self.dense = parts.mlp(config)

    def mix(self, x_SD: Tensor, logits_SE: Tensor, weights_SK: Tensor, experts_SK: Tensor) -> Tensor:
        return self.experts(x_SD, Routing(weights_SK, experts_SK, logits_SE), self.changed)

    @property
    def changed(self) -> FeedForward:
        return gated(self.dense)

    def copy_dense(self, mlp: Any, start: Start) -> float:
        if start.amount:
            raise ConfigError("LoRA experts differ from the start and begin as the dense network: expected init=copy")
        self.dense.load_state_dict(mlp.state_dict())
        return 0.0

    def without(self, x_SD: Tensor) -> Tensor:
        return self.dense(x_SD)
