"""Losses of a batch's statistics, worked by hand; and what must not change any loss."""

from __future__ import annotations

import math

import pytest
import torch
from made_routings import everything, inputs, routing
from torch import Tensor

from ragmoe import ConfigError, ModelError
from ragmoe.gates import Routing
from ragmoe.moe import LossInputs, RoutingLoss, load_balance_loss, loss_names, register_loss, routing_loss
from ragmoe.moe import losses as losses_module

LN2, LN3 = math.log(2), math.log(3)
# Entropy of (1/4, 3/4) in nats.
QUARTER = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)


def by_name(name: str, routing: Routing, domain_S: Tensor | None = None) -> Tensor:
    return routing_loss(name)(LossInputs(routing, everything(len(routing.logits_SE)), domain_S))


def test_load_balance_by_hand() -> None:
    # Probabilities (3/4, 1/4) and (2/3, 1/3); both choose expert 0: 2 * (1 * (3/4 + 2/3) / 2) = 17/12.
    logits_SE = torch.tensor([[LN3, 0.0], [LN2, 0.0]])
    assert load_balance_loss(routing(logits_SE, 1), everything(2)).item() == pytest.approx(17 / 12)
    assert by_name("load_balance", routing(logits_SE, 1)).item() == pytest.approx(17 / 12)


def test_load_balance_by_hand_with_two_choices() -> None:
    # Probabilities (1/2, 1/3, 1/6) and (1/6, 1/2, 1/3); choices {0, 1} and {1, 2}: shares (1/4, 1/2, 1/4),
    # mean probabilities (1/3, 5/12, 1/4): 3 * (1/12 + 5/24 + 1/16) = 17/16.
    logits_SE = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0]]).log()
    assert load_balance_loss(routing(logits_SE, 2), everything(2)).item() == pytest.approx(17 / 16)


def test_load_balance_where_experts_choose() -> None:
    """A token is chosen by more experts than K or by fewer; an even load is 1, however a batch is padded with slots."""
    logits_SE = torch.zeros(4, 2)
    experts_SK = torch.tensor([[0, 1, 2], [0, 2, 2], [1, 2, 2], [2, 2, 2]])
    weights_SK = torch.zeros(4, 3)
    assert load_balance_loss(Routing(weights_SK, experts_SK, logits_SE), everything(4)).item() == pytest.approx(1.0)


# Of four experts: (balanced, one takes all).
ENDS = {"load_balance": (1, 4), "gshard": (1 / 16, 1 / 4), "importance": (0, 3), "uniform": (0, 3 / 16)}


@pytest.mark.parametrize("name", ENDS)
def test_balance_at_its_ends(name: str) -> None:
    one_takes_all = torch.tensor([[50.0, 0.0, 0.0, 0.0]] * 4)
    found = [by_name(name, routing(logits_SE, 1)).item() for logits_SE in (torch.eye(4) * 50, one_takes_all)]
    assert found == pytest.approx(ENDS[name])


def test_gshard_counts_first_choices_alone() -> None:
    # As above, first choices 0 and 1: (1/2 * 1/3 + 1/2 * 5/12 + 0) / 3 = 1/8.
    logits_SE = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0]]).log().requires_grad_()
    by_name("gshard", routing(logits_SE, 2)).backward()
    assert by_name("gshard", routing(logits_SE, 2)).item() == pytest.approx(1 / 8)
    # d/dl_0 of the first token: (1/2 * p_0 - (p_0 + p_1) / 2 * p_0) / 6 with p = (1/2, 1/3, 1/6) is 1/144.
    assert logits_SE.grad[0, 0].item() == pytest.approx(1 / 144)
    halved = load_balance_loss(routing(logits_SE, 1), everything(2)) / 9
    assert by_name("gshard", routing(logits_SE, 1)).item() == pytest.approx(halved.item())


def test_importance_and_uniform_by_hand() -> None:
    # One token with the weights (3/4, 1/4): mean 1/2, variance 1/16; d/dp_0 (2 p_0 - 1)**2 = 2, and dp_0/dl_0 = 3/16.
    logits_SE = torch.tensor([[LN3, 0.0]], requires_grad=True)
    importance = by_name("importance", routing(logits_SE, 2))
    assert importance.item() == pytest.approx(1 / 4)
    assert torch.autograd.grad(importance, logits_SE)[0].tolist()[0] == pytest.approx([3 / 8, -3 / 8])
    uniform = by_name("uniform", routing(logits_SE, 1))
    assert uniform.item() == pytest.approx(1 / 16)
    assert torch.autograd.grad(uniform, logits_SE)[0].tolist()[0] == pytest.approx([3 / 32, -3 / 32])
    # What is not chosen has no importance, whatever its probability.
    assert by_name("importance", routing(logits_SE, 1)).item() == pytest.approx(1.0)


def test_load_by_hand() -> None:
    # Sums (1.4, 0.6): mean 1, variance 0.16; d/dx_0 = (x_0 - 1) - 0.16.
    load_SE = torch.tensor([[0.9, 0.1], [0.5, 0.5]], requires_grad=True)
    value = by_name("load", routing(torch.zeros(2, 2), 1)._replace(load_SE=load_SE))
    value.backward()
    assert value.item() == pytest.approx(0.16)
    assert load_SE.grad.tolist() == [pytest.approx([0.24, -0.56])] * 2
    with pytest.raises(ModelError, match="no noise of its own: expected noisy top-k") as caught:
        by_name("load", routing(torch.zeros(2, 2), 1))
    assert "model.selection=noisy_top_k" in caught.value.hint


def test_domain_by_hand() -> None:
    # Each domain has its expert with 3/4: both experts are used alike, and what is left is the entropy of (1/4, 3/4).
    logits_SE = torch.tensor([[LN3, 0.0], [0.0, LN3], [9.0, 0.0]], requires_grad=True)
    value = by_name("domain", routing(logits_SE, 1), torch.tensor([0, 1, -1]))
    value.backward()
    assert value.item() == pytest.approx(QUARTER)
    # Half of the tokens, dH/dp_0 = -ln 3, dp_0/dl_0 = 3/16.
    assert logits_SE.grad[0].tolist() == pytest.approx([-LN3 * 3 / 32, LN3 * 3 / 32])
    assert not logits_SE.grad[2].any()


def test_domain_at_its_ends_and_where_tokens_are_uneven() -> None:
    own, domain_S = torch.eye(2).repeat_interleave(2, dim=0) * 60, torch.tensor([0, 0, 1, 1])
    assert by_name("domain", routing(own, 1), domain_S).item() == pytest.approx(0.0, abs=1e-6)
    for logits_SE in (torch.zeros(4, 2), own[[0, 0, 0, 0]], own[[0, 2, 0, 2]]):
        assert by_name("domain", routing(logits_SE, 1), domain_S).item() == pytest.approx(LN2)
    # Three tokens of one domain and one of the other: specialised, but out of balance over tokens.
    uneven = by_name("domain", routing(own[[0, 0, 0, 2]], 1), torch.tensor([0, 0, 0, 1]))
    assert uneven.item() == pytest.approx(LN2 - QUARTER)
    one_domain = torch.randn(4, 2, requires_grad=True)
    by_name("domain", routing(one_domain, 1), torch.zeros(4, dtype=torch.long)).backward()
    assert one_domain.grad.abs().max() < 1e-6
    with pytest.raises(ModelError, match="needs the domain of each question"):
        by_name("domain", routing(own, 1))


def test_layers_are_not_pooled() -> None:
    """Two layers lean to opposite experts: each is out of balance, though together they are not."""
    left = routing(torch.tensor([[9.0, 0.0]] * 4), 1)
    right = routing(torch.tensor([[0.0, 9.0]] * 4), 1)
    pooled = Routing(*(torch.cat(pair) for pair in zip(left[:3], right[:3], strict=True)))
    mean = (load_balance_loss(left, everything(4)) + load_balance_loss(right, everything(4))) / 2
    assert mean.item() == pytest.approx(2.0, abs=1e-3)
    assert load_balance_loss(pooled, everything(8)).item() == pytest.approx(1.0)


def test_names_and_unknown_names() -> None:
    want = ["context", "diversity", "domain", "gshard", "importance", "load", "load_balance", "uniform", "votes", "z"]
    assert loss_names() == want
    with pytest.raises(ConfigError, match="there is no routing loss 'switch'; there are: context, diversity, domain"):
        routing_loss("switch")


def test_a_loss_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in loss_names():
        monkeypatch.delitem(losses_module._LOSSES, name)
    monkeypatch.setitem(losses_module._LOSSES, "first", None)

    @register_loss("first")
    class First(RoutingLoss):
        def sums(self, inputs: LossInputs) -> Tensor:
            return (inputs.routing.experts_SK[:, 0] == 0).float().sum()

        def value(self, sums: Tensor, tokens: Tensor) -> Tensor:
            return sums / tokens

    assert loss_names() == ["first"]
    assert by_name("first", routing(torch.eye(4), 1)).item() == 0.25


# -- what holds for every loss -----------------------------------------------------------------------------------------

every_loss = pytest.mark.parametrize("name", loss_names())


@every_loss
@pytest.mark.parametrize("K", [1, 3])
def test_gradients_numerically(name: str, K: int) -> None:
    logits_SE = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    mask_S = torch.arange(8) % 4 != 2
    chosen = inputs(logits_SE.detach(), K).routing.experts_SK

    def loss(x_SE: Tensor) -> Tensor:
        return routing_loss(name)(inputs(x_SE, mask_S=mask_S, experts_SK=chosen))

    assert torch.autograd.gradcheck(loss, (logits_SE,))
    if (name, K) == ("diversity", 1):
        assert loss(logits_SE).item() == 0.0
        return
    loss(logits_SE).backward()
    assert not logits_SE.grad[~mask_S].any() and logits_SE.grad[mask_S].any()


@every_loss
def test_padding_and_order_change_nothing(name: str) -> None:
    logits_SE, loss = torch.randn(9, 4), routing_loss(name)
    want = loss(inputs(logits_SE))
    padded_SE, mask_S = torch.cat([logits_SE, torch.randn(5, 4) * 30]), torch.arange(14) < 9
    order = torch.randperm(14)
    assert want > 0
    for at in (torch.arange(14), order):
        torch.testing.assert_close(loss(inputs(padded_SE[at], mask_S=mask_S[at])), want)


@every_loss
def test_nothing_but_padding_is_zero(name: str) -> None:
    logits_SE = torch.randn(3, 4, requires_grad=True)
    for seen in (logits_SE, logits_SE[:0]):
        value = routing_loss(name)(inputs(seen, mask_S=torch.zeros(len(seen), dtype=torch.bool)))
        value.backward()
        assert value.item() == 0.0 and not logits_SE.grad.any()


@every_loss
@pytest.mark.parametrize("held_back", [[1], [0, 1, 2, 3]])
def test_experts_held_back_leave_it_finite(name: str, held_back: list[int]) -> None:
    logits_SE = torch.randn(6, 4, requires_grad=True)
    mask_E = torch.zeros(4, dtype=torch.bool)
    mask_E[held_back] = True
    value = routing_loss(name)(inputs(logits_SE.masked_fill(mask_E, -torch.inf)))
    value.backward()
    assert value.isfinite() and logits_SE.grad.isfinite().all()


@every_loss
def test_empty_slots_choose_nobody(name: str) -> None:
    """E is no expert: a slot that is left empty counts as if the token had one choice fewer."""
    logits_SE, loss = torch.randn(6, 4, requires_grad=True), routing_loss(name)
    first_SK = inputs(logits_SE, 1).routing.experts_SK
    half_empty = torch.cat([first_SK, torch.full((6, 1), 4)], dim=1)
    # The domains would come from the last choice.
    got, want = inputs(logits_SE, experts_SK=half_empty), inputs(logits_SE, 1)
    got = LossInputs(got.routing, got.mask_S, want.domain_S)
    torch.testing.assert_close(loss(got), loss(want))
    value = loss(inputs(logits_SE, experts_SK=torch.full((6, 2), 4)))
    value.backward()
    assert value.isfinite() and logits_SE.grad.isfinite().all()
