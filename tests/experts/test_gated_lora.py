"""LoRA experts of gated networks against the formula, one token and one expert at a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from ragmoe.experts import LoraGluExperts, gated
from ragmoe.gates import Routing

D, H, E, S = 16, 32, 4, 9


def network() -> nn.Module:
    return LlamaMLP(LlamaConfig(hidden_size=D, intermediate_size=H, num_attention_heads=2))


def made(trained: bool) -> LoraGluExperts:
    experts = LoraGluExperts(SimpleNamespace(hidden_size=D, intermediate_size=H, experts=E, expert_rank=8))
    if trained:
        for parameter in experts.parameters():
            parameter.data = torch.randn_like(parameter) * 0.3
    return experts


def routing(K: int) -> Routing:
    logits_SE = torch.randn(S, E)
    weights_SK, experts_SK = logits_SE.softmax(dim=1).topk(K)
    return Routing(weights_SK.requires_grad_(), experts_SK, logits_SE)


def by_hand(experts: LoraGluExperts, x_SD: Tensor, r: Routing, mlp: nn.Module) -> Tensor:
    """Each expert's own three matrices, put together in full; the weights may sum to anything."""
    rows = []
    for x_D, weights_K, experts_K in zip(x_SD, r.weights_SK, r.experts_SK, strict=True):
        # What no expert takes of the token's weight, the dense network has.
        total_H = (1 - weights_K.sum()) * F.silu(mlp.gate_proj(x_D)) * mlp.up_proj(x_D)
        low_D = torch.zeros(D)
        for weight, e in zip(weights_K, experts_K, strict=True):
            both_2HD = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) + (experts.up_a[e] @ experts.up_b[e]).T
            gate_H, up_H = (both_2HD @ x_D).chunk(2)
            inner_H = F.silu(gate_H) * up_H
            total_H = total_H + weight * inner_H
            low_D = low_D + weight * (inner_H @ experts.down_a[e] @ experts.down_b[e])
        rows.append(mlp.down_proj(total_H) + low_D)
    return torch.stack(rows)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_answers_and_gradients_are_those_of_the_formula(K: int) -> None:
    experts, mlp, r = made(trained=True), network(), routing(K)
    x_SD, weight_SD = torch.randn(S, D, requires_grad=True), torch.linspace(-1, 1, S * D).view(S, D)
    of = [x_SD, r.weights_SK, *experts.parameters(), *mlp.parameters()]
    found = []
    for y_SD in (experts(x_SD, r, gated(mlp)), by_hand(experts, x_SD, r, mlp)):
        found.append([y_SD, *torch.autograd.grad((y_SD * weight_SD).sum(), of)])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))


def test_untrained_they_are_the_network_bit_for_bit() -> None:
    mlp, x_SD = network(), torch.randn(S, D) * 3
    assert torch.equal(made(trained=False)(x_SD, routing(2), gated(mlp)), mlp(x_SD))
    assert torch.equal(gated(mlp)(x_SD), mlp(x_SD))
