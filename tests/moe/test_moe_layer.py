"""The MoE layer against a naive loop over tokens and choices: outputs and all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_config import layer_config
from torch import Tensor, nn
from torch.nn import functional as F

from ragmoe import Neighbours
from ragmoe.experts import FeedForward
from ragmoe.moe import MoELayer

D, H, E, B, T, N, R = 16, 32, 4, 2, 5, 3, 12


def build(kind: str, gate: str = "retrieval", **changes: Any) -> MoELayer:
    sizes = {"hidden_size": D, "intermediate_size": H, "experts": E, "neighbour_width": R}
    settings = {**sizes, "gate": gate, "expert_kind": kind, "_experts_implementation": "grouped_mm", **changes}
    layer = MoELayer(layer_config(**settings))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return layer


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

    @property
    def network(self) -> FeedForward:
        return FeedForward(self.up, F.gelu, self.down)


def neighbours() -> Neighbours:
    mask_BN = torch.tensor([[True, True, True], [True, False, False]])
    return Neighbours(F.normalize(torch.randn(B, N, R), dim=-1), torch.rand(B, N), mask_BN)


def one_expert(layer: MoELayer, dense: Dense | None, x_D: Tensor, e: int) -> Tensor:
    experts: Any = layer.experts
    if hasattr(experts, "fused"):
        h_H = F.gelu(experts.fused.up_proj[e] @ x_D + experts.fused.up_proj_bias[e])
        return experts.fused.down_proj[e] @ h_H + experts.fused.down_proj_bias[e]
    assert dense is not None
    h_H = F.gelu(dense.up.weight @ x_D + dense.up.bias + x_D @ experts.up_a[e] @ experts.up_b[e])
    return dense.down.weight @ h_H + dense.down.bias + h_H @ experts.down_a[e] @ experts.down_b[e]


def naive(layer: MoELayer, dense: Dense | None, x_BTD: Tensor, found: Neighbours | None, allowed: list[int]) -> Tensor:
    """One token, one choice at a time. A LoRA mixture is the dense network plus what each expert changes of it."""
    x_SD = x_BTD.reshape(-1, D)
    logits_SE = layer.gate.logits(x_SD, found)
    rows = []
    for x_D, logits_E in zip(x_SD, logits_SE, strict=True):
        best = sorted(allowed, key=lambda e: -logits_E[e].item())[: layer.gate.settings.top_k]
        over = best if layer.gate.normalise and len(best) > 1 else allowed
        y_D = dense.network(x_D) if dense is not None else torch.zeros(D)
        base_D = y_D if hasattr(layer.experts, "up_a") else torch.zeros(D)
        for e in best:
            weight = logits_E[e].exp() / logits_E[over].exp().sum()
            if layer.gate.normalise and len(best) == 1:
                weight = weight / weight.detach()
            y_D = y_D + weight * (one_expert(layer, dense, x_D, e) - base_D)
        rows.append(y_D)
    return torch.stack(rows).view_as(x_BTD)


def gradients(layer: MoELayer, dense: Dense | None, x_BTD: Tensor, y_BTD: Tensor) -> dict[str, Tensor | None]:
    modules = {"layer": layer, **({"dense": dense} if dense is not None else {})}
    named = {f"{k}.{name}": p for k, module in modules.items() for name, p in module.named_parameters()}
    named["x"] = x_BTD
    loss = (y_BTD * torch.linspace(-1, 1, y_BTD.numel()).view_as(y_BTD)).sum()
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


def compare(layer: MoELayer, dense: Dense | None, x_BTD: Tensor, found: Neighbours | None, allowed: list[int]) -> None:
    x_BTD = x_BTD.requires_grad_()
    y_BTD, _ = layer(x_BTD, dense.network if dense is not None else None, found)
    want_BTD = naive(layer, dense, x_BTD, found, allowed)
    assert torch.allclose(y_BTD, want_BTD, atol=1e-5)
    got, want = gradients(layer, dense, x_BTD, y_BTD), gradients(layer, dense, x_BTD, want_BTD)
    for name, gradient in want.items():
        mine = got[name]
        if gradient is None:
            assert mine is None or not mine.any(), name
        else:
            assert mine is not None and torch.allclose(mine, gradient, rtol=1e-4, atol=1e-5), name


KINDS = [("lora", False), ("ffn", False), ("ffn", True)]


@pytest.mark.parametrize(("kind", "shared"), KINDS)
@pytest.mark.parametrize("top_k", [1, 2, E])
@pytest.mark.parametrize("normalise", [None, False])
def test_outputs_and_gradients_against_the_loop(kind: str, shared: bool, top_k: int, normalise: bool | None) -> None:
    layer = build(kind, top_k=top_k, shared_expert=shared, normalise_weights=normalise)
    dense = Dense() if shared or kind == "lora" else None
    compare(layer, dense, torch.randn(B, T, D), neighbours(), list(range(E)))


@pytest.mark.parametrize(("kind", "shared"), KINDS)
def test_one_token(kind: str, shared: bool) -> None:
    layer, dense = build(kind, shared_expert=shared), Dense() if shared or kind == "lora" else None
    compare(layer, dense, torch.randn(1, 1, D), None, list(range(E)))


@pytest.mark.parametrize(("kind", "shared"), KINDS)
def test_one_expert(kind: str, shared: bool) -> None:
    layer = build(kind, shared_expert=shared, experts=1, top_k=1)
    compare(layer, Dense() if shared or kind == "lora" else None, torch.randn(B, T, D), neighbours(), [0])


@pytest.mark.parametrize("kind", ["lora", "ffn"])
def test_experts_that_no_token_chooses(kind: str) -> None:
    layer, dense = build(kind, "token", experts=8), Dense() if kind == "lora" else None
    with torch.no_grad():
        layer.gate.balance_bias[:] = torch.tensor([0, 0, 1e4, 0, 0, 1e4, 0, 0])
    y_BTD, routing = layer(x_BTD := torch.randn(B, T, D, requires_grad=True), dense and dense.network)
    assert set(routing.experts_SK.flatten().tolist()) == {2, 5}
    y_BTD.square().sum().backward()
    assert x_BTD.grad.isfinite().all()
    for parameter in layer.experts.parameters():
        assert [bool(row.any()) for row in parameter.grad] == [e in (2, 5) for e in range(8)]


@pytest.mark.parametrize(("kind", "shared"), KINDS)
def test_experts_held_back(kind: str, shared: bool) -> None:
    layer, dense = build(kind, shared_expert=shared), Dense() if shared or kind == "lora" else None
    layer.gate.set_available(torch.tensor([True, False, True, True]))
    compare(layer, dense, torch.randn(B, T, D), neighbours(), [0, 2, 3])


@pytest.mark.parametrize(("kind", "shared"), KINDS)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_a_broken_expert_held_back_harms_nothing(kind: str, shared: bool, implementation: str) -> None:
    layer = build(kind, shared_expert=shared, top_k=3, _experts_implementation=implementation)
    dense = Dense() if shared or kind == "lora" else None
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter[1] = torch.nan
    layer.gate.set_available(torch.tensor([True, False, True, False]))
    y_BTD, routing = layer(torch.randn(B, T, D), dense and dense.network, neighbours())
    assert y_BTD.isfinite().all()
    assert not (routing.experts_SK == 1).any()


def test_with_no_expert_available_lora_answers_like_the_dense_network() -> None:
    layer, dense = build("lora"), Dense()
    layer.gate.set_available(torch.zeros(E, dtype=torch.bool))
    x_BTD = torch.randn(B, T, D, requires_grad=True)
    y_BTD, _ = layer(x_BTD, dense.network, neighbours())
    assert torch.equal(y_BTD, dense.network(x_BTD))
    for name, gradient in gradients(layer, dense, x_BTD, y_BTD).items():
        assert gradient is None or gradient.isfinite().all(), name
        if name.startswith("layer"):
            assert gradient is None or not gradient.any(), name


@pytest.mark.parametrize(("kind", "shared"), KINDS)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_with_broken_experts_and_none_available_what_is_left_answers(
    kind: str, shared: bool, implementation: str
) -> None:
    layer = build(kind, shared_expert=shared, _experts_implementation=implementation)
    dense = Dense() if shared or kind == "lora" else None
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.fill_(torch.nan)
    layer.gate.set_available(torch.zeros(E, dtype=torch.bool))
    x_BTD = torch.randn(B, T, D, requires_grad=True)
    y_BTD, routing = layer(x_BTD, dense and dense.network, neighbours())
    assert torch.equal(y_BTD, dense.network(x_BTD) if dense else torch.zeros(B, T, D))
    assert not routing.weights_SK.any()
    layer.gate.set_available(torch.ones(E, dtype=torch.bool))
    assert layer(x_BTD, dense and dense.network, neighbours())[0].isnan().all()


@pytest.mark.parametrize("kind", ["lora", "ffn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    layer, dense = build(kind), Dense() if kind == "lora" else None
    x_BTD, found = torch.randn(B, T, D), neighbours()
    want_BTD, _ = layer(x_BTD, dense and dense.network, found)
    layer.to(dtype)
    y_BTD, routing = layer(x_BTD.to(dtype), dense and dense.to(dtype).network, found)
    assert y_BTD.dtype == dtype and routing.logits_SE.dtype == torch.float32
    assert (y_BTD.float() - want_BTD).abs().mean() < 0.1 * want_BTD.abs().mean()


@pytest.mark.parametrize("kind", ["lora", "ffn"])
def test_autocast(kind: str) -> None:
    layer, dense, x_BTD, found = build(kind), Dense(), torch.randn(B, T, D), neighbours()
    network = dense.network if kind == "lora" else None
    want_BTD, _ = layer(x_BTD, network, found)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_BTD, _ = layer(x_BTD, network, found)
    y_BTD.float().square().sum().backward()
    assert (y_BTD.float() - want_BTD).abs().mean() < 0.1 * want_BTD.abs().mean()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
