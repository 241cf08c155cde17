"""Full experts on a processor: grouped products, with nothing around them that one core has to do alone.

What transformers' own ``grouped_mm`` does between the products suits a GPU: it gathers a bias for each pair of token
and expert, writes all answers to memory twice to weigh and to sort them, and its backward pass scatters and adds row by
row, on one core, and in half precision. Here a bias is added to an expert's rows where they lie, answers are weighed
and summed as they are gathered, and gradients are sums in float32 (in bfloat16 the gradient of a bias that is added up
row by row stops growing after some hundred rows). Products, and what is kept for backward, are the same.

Registered with transformers, for any of its models, as the experts implementation ``auto``: this on a processor, and
``grouped_mm`` elsewhere and in compiled graphs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from ragmoe.experts.rows import Pairs, grouped_product

AUTO = "auto"


def auto_experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What a module of fused experts, as transformers has them, answers: y_SD in the dtype of ``hidden_states``.

    Args:
        hidden_states: (S, D).
        top_k_index: (S, K) int64; the number of experts stands for nobody, where the module expects that.
        top_k_weights: (S, K).
    """
    run = _processor_forward if _on_processor(hidden_states) else grouped_mm_experts_forward
    return run(self, hidden_states, top_k_index, top_k_weights)


def runs_here(module: Any, x: Tensor) -> bool:
    """Whether a module of fused experts answers ``x`` by the kernel of this file, and not by one of transformers."""
    return module.config._experts_implementation == AUTO and _on_processor(x)


def _on_processor(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _processor_forward(module: Any, x_SD: Tensor, experts_SK: Tensor, weights_SK: Tensor) -> Tensor:
    pairs = Pairs(experts_SK, module.num_experts, partial=module._is_expert_parallel)
    counts = pairs.offsets_E.diff(prepend=pairs.offsets_E.new_zeros(1)).tolist() if module.has_bias else []

    def linear(x: Tensor, name: str) -> Tensor:
        weight = getattr(module, name)
        y = grouped_product(x, weight if module.is_transposed else weight.transpose(1, 2), pairs.offsets_E)
        return _AddBias.apply(y, getattr(module, f"{name}_bias"), counts) if module.has_bias else y

    # In the experts' own dtype, also under autocast: a half-precision copy of all experts takes longer than it saves.
    x_PD = pairs.gather(x_SD.to(module.down_proj.dtype))
    if module.has_gate:
        inner_PH = module._apply_gate(linear(x_PD, "gate_up_proj"))
    else:
        inner_PH = module.act_fn(linear(x_PD, "up_proj"))
    y_PD = linear(inner_PH, "down_proj")
    if module.has_post_expert_norm:
        y_PD = module.post_expert_norm(y_PD)
    return pairs.combine(y_PD, weights_SK).to(x_SD.dtype)


class _AddBias(torch.autograd.Function):
    """Adds each expert's bias to its rows, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        ctx.mark_dirty(x)
        torch._foreach_add_(x.split(counts), bias.unbind())
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = gradients
        return grad, torch.stack([rows.sum(dim=0) for rows in grad.split(ctx.counts)]), None


ExpertsInterface.register(AUTO, auto_experts_forward)
