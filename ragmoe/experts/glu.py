"""Gated feed-forward experts (SwiGLU and its kin) in the fused layout of Mixtral, Qwen3-MoE and OLMoE.

E experts, D model width, H hidden width, S tokens, K experts a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from ragmoe._errors import ConfigError
from ragmoe.experts.base import FeedForward, held_experts, register_experts
from ragmoe.experts.eager import one_by_one
from ragmoe.experts.fused import FusedKind


@use_experts_implementation
class FusedGluExperts(nn.Module):
    """``down(act(gate x) * up x)`` of each expert, with fused parameters; see ``FusedExperts`` for the kernels."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        E, D, H = held_experts(config), config.hidden_size, config.intermediate_size
        self.num_experts = E
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * H, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, H))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """y_SD for hidden_states (S, D), top_k_index (S, K) int64 and top_k_weights (S, K); E in an empty slot."""

        def answer(x_pD: Tensor, expert: int) -> Tensor:
            gate_pH, up_pH = F.linear(x_pD, self.gate_up_proj[expert]).chunk(2, dim=-1)
            return F.linear(self.act_fn(gate_pH) * up_pH, self.down_proj[expert])

        return one_by_one(hidden_states, top_k_index, top_k_weights, self.num_experts, answer)


@register_experts("glu")
class GluExperts(FusedKind):
    """E gated networks, as decoders have them; they cannot start from a dense network without a gate of its own."""

    summary = "full gated networks (SwiGLU) through transformers' experts kernels, for decoders"
    fused_class = FusedGluExperts

    def __init__(self, config: Any, fused: nn.Module | None = None) -> None:
        """Build new ones, or stand around a family's own ``fused`` experts, which stay as they are."""
        super().__init__(config, fused)
        if fused is None:
            self.reset_parameters()

    def copy_dense(self, up: nn.Linear, down: nn.Linear, *, noise: float, generator: torch.Generator) -> float:
        raise ConfigError(
            "expert_kind is 'glu', but the base's feed-forward networks have no gate to start from",
            hint="model.expert_kind=lora or model.expert_kind=ffn",
        )


def gated(mlp: Any) -> FeedForward:
    """A gated network as transformers' models have it: ``gate_proj``, ``up_proj``, ``act_fn`` and ``down_proj``."""

    def up(x_SD: Tensor) -> Tensor:
        return torch.cat([mlp.gate_proj(x_SD), mlp.up_proj(x_SD)], dim=-1)

    def act(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return mlp.act_fn(gate) * up

    return FeedForward(up, act, mlp.down_proj)
