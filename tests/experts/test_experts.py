"""Experts by themselves: the registry, dispatch, kernels, starting from a dense network."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ragmoe import ConfigError
from ragmoe.experts import Experts, FeedForward, experts_class, experts_names
from ragmoe.experts.rows import dispatch
from ragmoe.gates import Routing

D, H, E = 16, 32, 4


def config(**changes: Any) -> SimpleNamespace:
    settings = {
        "hidden_size": D,
        "intermediate_size": H,
        "experts": E,
        "expert_rank": 8,
        "hidden_act": "gelu",
        "initializer_range": 0.02,
        "shared_expert": False,
        "_experts_implementation": "eager",
    }
    return SimpleNamespace(**{**settings, **changes})


def trained(kind: str, **changes: Any) -> Experts:
    experts = experts_class(kind)(config(**changes))
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return experts


def routing(S: int, K: int, experts: int = E) -> Routing:
    logits_SE = torch.randn(S, experts)
    weights_SK, experts_SK = logits_SE.softmax(dim=1).topk(K)
    return Routing(weights_SK, experts_SK, logits_SE)


def gradients(experts: Experts, x_SD: Tensor, r: Routing) -> tuple[Tensor, dict[str, Tensor]]:
    experts.zero_grad()
    x_SD, weights_SK = x_SD.clone().requires_grad_(), r.weights_SK.clone().requires_grad_()
    y_SD = experts(x_SD, r._replace(weights_SK=weights_SK), None)
    (y_SD * torch.linspace(-1, 1, y_SD.numel()).view_as(y_SD)).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in experts.named_parameters()}
    return y_SD.detach(), {**found, "x": x_SD.grad, "weights": weights_SK.grad}


@pytest.mark.parametrize("implementation", ["auto", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", ["ffn", "glu"])
@pytest.mark.parametrize(("S", "K", "experts"), [(10, 2, 4), (1, 1, 4), (7, 4, 4), (5, 1, 1), (3, 2, 16)])
def test_kernels_of_full_experts_agree(implementation: str, kind: str, S: int, K: int, experts: int) -> None:
    module, x_SD, r = trained(kind, experts=experts), torch.randn(S, D), routing(S, K, experts)
    want, want_gradients = gradients(module, x_SD, r)
    module.fused.config._experts_implementation = implementation
    got, got_gradients = gradients(module, x_SD, r)
    assert torch.allclose(got, want, atol=1e-5)
    for name, gradient in want_gradients.items():
        assert torch.allclose(got_gradients[name], gradient, atol=1e-5), name


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_numbers_that_experts_have_change_nothing(implementation: str) -> None:
    """To the last bit: each token's choices are summed in their own order."""
    module, x_SD, r = trained("ffn", _experts_implementation=implementation), torch.randn(30, D), routing(30, 4)
    want, order = module(x_SD, r, None), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter[order])
    assert torch.equal(module(x_SD, r._replace(experts_SK=order.argsort()[r.experts_SK]), None), want)


def test_dispatch_by_hand() -> None:
    found = dispatch(torch.tensor([[2, 0], [2, 3], [0, 2]]), experts=5)
    assert found.order_P.tolist() == [1, 4, 0, 2, 5, 3]
    assert found.back_P.tolist() == [2, 0, 3, 5, 1, 4]
    assert found.offsets_E.tolist() == [2, 2, 5, 6, 6]
    assert found.offsets_E.dtype == torch.int32


def dense(up: nn.Linear, down: nn.Linear) -> FeedForward:
    return FeedForward(up, F.gelu, down)


@pytest.mark.parametrize("training", [True, False])
def test_untrained_lora_experts_are_the_dense_network_bit_for_bit(training: bool) -> None:
    experts = experts_class("lora")(config()).train(training)
    network = dense(nn.Linear(D, H), nn.Linear(H, D))
    x_SD = torch.randn(50, D) * 3
    assert torch.equal(experts(x_SD, routing(50, 2), network), network(x_SD))


def test_untrained_lora_experts_have_a_gradient() -> None:
    experts, network = experts_class("lora")(config()), dense(nn.Linear(D, H), nn.Linear(H, D))
    experts(torch.randn(50, D), routing(50, 2), network).square().sum().backward()
    assert experts.up_b.grad.any() and experts.down_b.grad.any()


def test_copies_of_a_dense_network() -> None:
    experts, up, down = trained("ffn"), nn.Linear(D, H), nn.Linear(H, D)
    assert experts.copy_dense(up, down, noise=0.0, generator=torch.Generator()) == 0.0
    for parameter, source in zip(experts.parameters(), (up.weight, up.bias, down.weight, down.bias), strict=True):
        assert all(torch.equal(one, source) for one in parameter)


def test_noise_tells_copies_apart_and_is_reported() -> None:
    experts, up, down = trained("ffn"), nn.Linear(D, H), nn.Linear(H, D)
    deviation = experts.copy_dense(up, down, noise=0.1, generator=torch.Generator().manual_seed(1))
    differences = [experts.fused.up_proj - up.weight, experts.fused.down_proj - down.weight]
    assert deviation == pytest.approx(max(d.abs().max().item() for d in differences), abs=1e-6)
    assert (differences[0].std() / up.weight.std()).item() == pytest.approx(0.1, rel=0.1)
    assert not torch.equal(experts.fused.up_proj[0], experts.fused.up_proj[1])
    assert torch.equal(experts.fused.up_proj_bias[0], up.bias)


def test_beside_a_shared_expert_they_start_at_nothing() -> None:
    experts, up, down = experts_class("ffn")(config(shared_expert=True)), nn.Linear(D, H), nn.Linear(H, D)
    experts.copy_dense(up, down, noise=0.0, generator=torch.Generator())
    x_SD, network = torch.randn(9, D), dense(up, down)
    assert torch.equal(experts(x_SD, routing(9, 2), network), network(x_SD))
    experts(x_SD, routing(9, 2), network).square().sum().backward()
    assert experts.fused.down_proj.grad.any()


def test_what_cannot_be_built() -> None:
    assert experts_names() == ["ffn", "glu", "lora"]
    with pytest.raises(ConfigError, match="no expert kind 'moe'; there are: ffn, glu, lora"):
        experts_class("moe")
    for rank in (0, 12):
        with pytest.raises(ConfigError, match=f"expert rank is {rank}: expected a positive multiple of 8"):
            experts_class("lora")(config(expert_rank=rank))
    with pytest.raises(ConfigError, match=r"expert_noise is 0\.1, but LoRA experts differ from the start"):
        trained("lora").copy_dense(nn.Linear(D, H), nn.Linear(H, D), noise=0.1, generator=torch.Generator())


@pytest.mark.parametrize("kind", ["ffn", "lora"])
def test_every_parameter_has_the_expert_first(kind: str) -> None:
    assert {parameter.shape[0] for parameter in trained(kind).parameters()} == {E}
