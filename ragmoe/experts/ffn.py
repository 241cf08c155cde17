"""Full feed-forward experts in Hugging Face's fused layout, run by Hugging Face's own kernels.

E experts, D model width, H hidden width, S tokens, K experts a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from ragmoe.experts.base import held_experts, register_experts
from ragmoe.experts.eager import one_by_one
from ragmoe.experts.fused import FusedKind


@use_experts_implementation(has_gate=False, has_bias=True)
class FusedExperts(nn.Module):
    """E feed-forward networks as fused three-dimensional parameters.

    ``config._experts_implementation`` chooses the kernel: ``auto`` (see kernel.py), ``eager`` (the loop below),
    ``batched_mm``, ``grouped_mm`` and whatever else is registered with transformers.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        E, D, H = held_experts(config), config.hidden_size, config.intermediate_size
        self.num_experts = E
        self.up_proj = nn.Parameter(torch.empty(E, H, D))
        self.up_proj_bias = nn.Parameter(torch.empty(E, H))
        self.down_proj = nn.Parameter(torch.empty(E, D, H))
        self.down_proj_bias = nn.Parameter(torch.empty(E, D))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """y_SD for hidden_states (S, D), top_k_index (S, K) int64 and top_k_weights (S, K); E in an empty slot."""

        def answer(x_pD: Tensor, expert: int) -> Tensor:
            h_pH = self.act_fn(F.linear(x_pD, self.up_proj[expert], self.up_proj_bias[expert]))
            return F.linear(h_pH, self.down_proj[expert], self.down_proj_bias[expert])

        return one_by_one(hidden_states, top_k_index, top_k_weights, self.num_experts, answer)


@register_experts("ffn")
class FeedForwardExperts(FusedKind):
    """E full networks. With a shared expert, the dense network answers too and the experts start at zero beside it."""

    summary = "full feed-forward networks through transformers' experts kernels"
    fused_class = FusedExperts

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.shared = bool(config.shared_expert)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.shared:
            init.zeros_(self.fused.down_proj)

    @torch.no_grad()
    def copy_dense(self, up: nn.Linear, down: nn.Linear, *, noise: float, generator: torch.Generator) -> float:
        """Copy the network into every expert; beside a shared expert only its first matrix, the second stays zero."""
        deviation = 0.0
        pairs = [(self.fused.up_proj, up.weight), (self.fused.up_proj_bias, up.bias)]
        if not self.shared:
            pairs += [(self.fused.down_proj, down.weight), (self.fused.down_proj_bias, down.bias)]
        for fused, source in pairs:
            fused.copy_(source.unsqueeze(0).expand_as(fused))
            if noise and source.dim() == 2:
                std = noise * source.float().std()
                drawn = std * torch.randn(fused.shape, generator=generator, dtype=torch.float32)
                fused.add_(drawn.to(fused.dtype))
                deviation = max(deviation, drawn.abs().max().item())
        return deviation
