"""The logit of an expert is, to the last bit, independent of what other experts there are; else it is a product."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ragmoe.gates.linear import ExpertLinear, expert_logits


@pytest.mark.parametrize("width", [16, 24, 128, 384])
def test_more_experts_change_no_bit(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    weight_ED = torch.randn(33, width, generator=generator)
    for tokens in (1, 2, 13, 64, 300):
        x_SD = torch.randn(tokens, width, generator=generator)
        for experts in range(1, 33):
            fewer = expert_logits(x_SD, weight_ED[:experts])
            assert torch.equal(fewer, expert_logits(x_SD, weight_ED[: experts + 1])[:, :experts]), (tokens, experts)


@pytest.mark.parametrize("experts", [1, 3, 16, 21])
def test_outputs_and_gradients_are_those_of_a_product(experts: int) -> None:
    torch.manual_seed(experts)
    linear, x_SD = ExpertLinear(12, experts), torch.randn(2, 5, 12, requires_grad=True)
    out = linear(x_SD)
    want = F.linear(x_SD, linear.weight)
    assert out.shape == (2, 5, experts) and out.is_contiguous()
    torch.testing.assert_close(out, want)
    upstream = torch.randn_like(out)
    for got, expected in zip(*(torch.autograd.grad(y, (x_SD, linear.weight), upstream) for y in (out, want))):
        torch.testing.assert_close(got, expected)
    assert list(linear.state_dict()) == ["weight"] and linear.weight.shape == (experts, 12)
