"""The kernel ``auto``: on modules of all layouts, with slots that nobody serves, in half precision, and elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations import use_experts_implementation

from ragmoe.experts import kernel
from ragmoe.experts.ffn import FusedExperts
from ragmoe.experts.rows import grouped_product

D, H, E = 16, 32, 4


def experts(layout: type[nn.Module], implementation: str) -> nn.Module:
    torch.manual_seed(3)
    config = {"hidden_size": D, "intermediate_size": H, "experts": E, "hidden_act": "gelu"}
    module = layout(SimpleNamespace(**config, _experts_implementation=implementation))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module


class _Layout(nn.Module):
    """Fused experts as they are in other models: gated, transposed, with biases and a norm after each."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = E
        self.gate_up_proj = nn.Parameter(torch.empty(E, D, 2 * H))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(E, 2 * H))
        self.down_proj = nn.Parameter(torch.empty(E, H, D))
        self.down_proj_bias = nn.Parameter(torch.empty(E, D))
        self.act_fn, self.post_expert_norm = F.silu, nn.RMSNorm(D)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        raise AssertionError("never the loop")


OtherLayout = use_experts_implementation(is_transposed=True, has_bias=True, has_post_expert_norm=True)(_Layout)


def answers(module: nn.Module, experts_SK: Tensor) -> list[Tensor]:
    """The output and the gradients of x, the weights and all parameters."""
    torch.manual_seed(5)
    x_SD = torch.randn(experts_SK.shape[0], D, requires_grad=True)
    weights_SK = torch.rand(experts_SK.shape, requires_grad=True)
    y_SD = module(x_SD, experts_SK, weights_SK.masked_fill(experts_SK == E, 0.0))
    loss = (y_SD * torch.linspace(-1, 1, y_SD.numel()).view_as(y_SD)).sum()
    return [y_SD, *torch.autograd.grad(loss, [x_SD, weights_SK, *module.parameters()])]


def test_any_layout_that_transformers_knows() -> None:
    experts_SK = torch.rand(9, E).topk(2).indices
    got, want = (answers(experts(OtherLayout, name), experts_SK) for name in ("auto", "grouped_mm"))
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_slots_that_nobody_serves() -> None:
    experts_SK = torch.tensor([[0, E], [E, E], [2, 0], [E, 3]])
    modules = [experts(FusedExperts, name) for name in ("auto", "eager")]
    modules[0]._is_expert_parallel = True  # type: ignore[assignment]
    got, want = (answers(module, experts_SK) for module in modules)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert not got[0][1].any() and got[0][3].any()


def test_gradients_of_biases_do_not_stop_growing_in_bfloat16() -> None:
    module = experts(FusedExperts, "auto").bfloat16()
    y_SD = module(torch.zeros(2000, D).bfloat16(), torch.zeros(2000, 1, dtype=torch.long), torch.ones(2000, 1))
    y_SD.sum().backward()
    # Two thousand ones; added up one by one in bfloat16 they are 256.
    assert module.down_proj_bias.grad[0].tolist() == [2000.0] * D


def test_under_autocast_it_computes_in_the_experts_own_dtype() -> None:
    module, x_SD = experts(FusedExperts, "auto"), torch.randn(6, D).bfloat16()
    experts_SK, weights_SK = torch.rand(6, E).topk(2).indices, torch.rand(6, 2)
    want_SD = module(x_SD.float(), experts_SK, weights_SK).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_SD = module(x_SD, experts_SK, weights_SK)
    assert torch.equal(y_SD, want_SD)


def test_elsewhere_it_is_grouped_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(kernel, "grouped_mm_experts_forward", lambda module, x_SD, *rest: called.append(x_SD.device))
    module, experts_SK = experts(FusedExperts, "auto"), torch.zeros(2, 1, dtype=torch.long)
    module(torch.zeros(2, D, device="meta"), experts_SK, torch.ones(2, 1))
    assert called == [torch.device("meta")]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    module(torch.zeros(2, D), experts_SK, torch.ones(2, 1))
    assert len(called) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inner", "outer"), [(16, 16), (16, 18), (18, 16), (17, 19)])
def test_products_of_any_width(inner: int, outer: int, dtype: torch.dtype) -> None:
    """torch's own grouped product takes rows of a multiple of 16 bytes alone."""
    x, weight = torch.randn(7, inner, dtype=dtype), torch.randn(3, outer, inner, dtype=dtype)
    offsets, rows = torch.tensor([2, 2, 7], dtype=torch.int32), [(0, 2), (2, 2), (2, 7)]
    x.requires_grad_(), weight.requires_grad_()
    got = grouped_product(x, weight.transpose(1, 2), offsets)
    want = torch.cat([x[begin:end] @ weight[e].T for e, (begin, end) in enumerate(rows)])
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    for mine, theirs in zip(*(torch.autograd.grad(y, (x, weight), grad) for y in (got, want)), strict=True):
        torch.testing.assert_close(mine, theirs)
