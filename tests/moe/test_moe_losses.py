"""Routing losses: worked by hand, derived numerically, and what must not change them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ragmoe.gates import Routing
from ragmoe.moe import load_balance_loss, z_loss

LN3 = math.log(3)


def routing(logits_SE: Tensor, K: int) -> Routing:
    weights_SK, experts_SK = logits_SE.softmax(dim=1).topk(K)
    return Routing(weights_SK, experts_SK, logits_SE)


def everything(S: int) -> Tensor:
    return torch.ones(S, dtype=torch.bool)


def test_load_balance_by_hand() -> None:
    # Probabilities (3/4, 1/4) and (2/3, 1/3); both choose expert 0: 2 * (1 * (3/4 + 2/3) / 2) = 17/12.
    logits_SE = torch.tensor([[LN3, 0.0], [math.log(2), 0.0]])
    assert load_balance_loss(routing(logits_SE, 1), everything(2)).item() == pytest.approx(17 / 12)


def test_load_balance_by_hand_with_two_choices() -> None:
    # Probabilities (1/2, 1/3, 1/6) and (1/6, 1/2, 1/3); choices {0, 1} and {1, 2}: shares (1/4, 1/2, 1/4),
    # mean probabilities (1/3, 5/12, 1/4): 3 * (1/12 + 5/24 + 1/16) = 17/16.
    logits_SE = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0]]).log()
    assert load_balance_loss(routing(logits_SE, 2), everything(2)).item() == pytest.approx(17 / 16)


def test_load_balance_at_its_ends() -> None:
    balanced = torch.eye(4) * 50
    one_takes_all = torch.tensor([[50.0, 0.0, 0.0, 0.0]] * 4)
    assert load_balance_loss(routing(balanced, 1), everything(4)).item() == pytest.approx(1.0)
    assert load_balance_loss(routing(one_takes_all, 1), everything(4)).item() == pytest.approx(4.0)


def test_z_loss_by_hand() -> None:
    logits_SE = torch.tensor([[LN3, 0.0], [0.0, 0.0]])
    want = (math.log(4) ** 2 + math.log(2) ** 2) / 2
    assert z_loss(routing(logits_SE, 1), everything(2)).item() == pytest.approx(want)


LOSSES = [load_balance_loss, z_loss]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("K", [1, 2])
def test_gradients_numerically(loss: Callable[[Routing, Tensor], Tensor], K: int) -> None:
    logits_SE = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    mask_S = torch.tensor([True, True, False, True, True, False])
    chosen = routing(logits_SE.detach(), K).experts_SK
    assert torch.autograd.gradcheck(lambda x: loss(Routing(x, chosen, x), mask_S), (logits_SE,))
    loss(Routing(logits_SE, chosen, logits_SE), mask_S).backward()
    assert not logits_SE.grad[~mask_S].any() and logits_SE.grad[mask_S].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_and_order_change_nothing(loss: Callable[[Routing, Tensor], Tensor]) -> None:
    logits_SE = torch.randn(6, 4)
    want = loss(routing(logits_SE, 2), everything(6))
    padded = routing(torch.cat([logits_SE, torch.randn(5, 4) * 30]), 2)
    mask_S = torch.arange(11) < 6
    assert torch.allclose(loss(padded, mask_S), want)
    order = torch.randperm(11)
    shuffled = Routing(*(x[order] for x in padded[:3]))
    assert torch.allclose(loss(shuffled, mask_S[order]), want)


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_but_padding_is_zero(loss: Callable[[Routing, Tensor], Tensor]) -> None:
    assert loss(routing(torch.randn(3, 4), 1), torch.zeros(3, dtype=torch.bool)).item() == 0.0


def test_layers_are_not_pooled() -> None:
    """Two layers lean to opposite experts: each is out of balance, though together they are not."""
    left = routing(torch.tensor([[9.0, 0.0]] * 4), 1)
    right = routing(torch.tensor([[0.0, 9.0]] * 4), 1)
    pooled = Routing(*(torch.cat(pair) for pair in zip(left[:3], right[:3], strict=True)))
    mean = (load_balance_loss(left, everything(4)) + load_balance_loss(right, everything(4))) / 2
    assert mean.item() == pytest.approx(2.0, abs=1e-3)
    assert load_balance_loss(pooled, everything(8)).item() == pytest.approx(1.0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("held_back", [[1], [0, 1, 2, 3]])
def test_experts_held_back_leave_it_finite(loss: Callable[[Routing, Tensor], Tensor], held_back: list[int]) -> None:
    logits_SE = torch.randn(6, 4, requires_grad=True)
    mask_E = torch.zeros(4, dtype=torch.bool)
    mask_E[held_back] = True
    masked_SE = logits_SE.masked_fill(mask_E, -torch.inf)
    value = loss(Routing(masked_SE, torch.zeros(6, 1, dtype=torch.long), masked_SE), everything(6))
    value.backward()
    assert value.isfinite() and logits_SE.grad.isfinite().all()
