"""Losses that are means over tokens, worked by hand; and any loss of a step that is cut into micro-batches."""

from __future__ import annotations

import math

import pytest
import torch
from made_routings import everything, inputs, routing
from torch import Tensor

from ragmoe import ModelError
from ragmoe.moe import LossInputs, StepTotals, loss_names, routing_loss, z_loss
from ragmoe.moe.probe import Probe, Swapped

LN2, LN3 = math.log(2), math.log(3)


def test_z_loss_by_hand() -> None:
    logits_SE = torch.tensor([[LN3, 0.0], [0.0, 0.0]], requires_grad=True)
    value = z_loss(routing(logits_SE, 1), everything(2))
    value.backward()
    assert value.item() == pytest.approx((math.log(4) ** 2 + LN2**2) / 2)
    # d/dl of log**2 is 2 log * p, over two tokens.
    assert logits_SE.grad[0].tolist() == pytest.approx([math.log(4) * 3 / 4, math.log(4) / 4])


def context(own: list[float], other: list[float], compared: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of one token that has chosen expert 0, with the gradients of both logits."""
    own_SE, other_SE = (torch.tensor([x], requires_grad=True) for x in (own, other))
    probe = Probe(Swapped(own_SE, other_SE, torch.tensor([compared])))
    value = routing_loss("context")(LossInputs(routing(torch.eye(2)[:1], 1)._replace(probe=probe), everything(1)))
    value.backward()
    return value.detach(), own_SE.grad[0], other_SE.grad[0]


def test_context_by_hand() -> None:
    # Expert 0 has 3/4 under its own neighbours and 1/2 under others': ln 2 - ln(3/2).
    value, own, other = context([LN3, 0.0], [0.0, 0.0])
    assert value.item() == pytest.approx(math.log(4 / 3))
    assert own.tolist() == pytest.approx([-1 / 4, 1 / 4]) and other.tolist() == pytest.approx([1 / 2, -1 / 2])


def test_context_pushes_where_the_gate_ignores_the_neighbours_and_rests_where_it_heeds_them() -> None:
    value, own, other = context([LN3, 0.0], [LN3, 0.0])
    assert value.item() == pytest.approx(LN2)
    assert own.tolist() == pytest.approx([-1 / 4, 1 / 4]) and torch.equal(other, -own)
    for arguments in (([LN3, 0.0], [0.0, LN3], True), ([LN3, 0.0], [LN3, 0.0], False)):
        value, own, other = context(*arguments)
        assert value.item() == 0.0 and not own.any() and not other.any()


def diversity(outputs_SKD: Tensor, experts: list[int], served: list[int] | None = None) -> Tensor:
    """The loss of one token that has chosen these of four experts."""
    made = routing(torch.randn(1, 4), 1)._replace(experts_SK=torch.tensor([experts]), probe=Probe(None, outputs_SKD))
    if served is not None:
        made = made._replace(served_SK=torch.tensor([served]))
    return routing_loss("diversity")(LossInputs(made, everything(1)))


def test_diversity_by_hand() -> None:
    outputs_SKD = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]], requires_grad=True)
    value = diversity(outputs_SKD, [2, 0])
    value.backward()
    assert value.item() == pytest.approx(1 / 2)
    # d cos**2 / du = 2 (u.v) / (|u||v|)**2 v - 2 cos**2 / |u|**2 u, and the same the other way about.
    assert outputs_SKD.grad.flatten().tolist() == pytest.approx([0.0, 1.0, 0.5, -0.5], abs=1e-6)


def test_diversity_counts_pairs_of_different_experts_that_serve() -> None:
    outputs_SKD = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    assert diversity(outputs_SKD, [0, 1, 2]).item() == pytest.approx((0 + 1 / 2 + 1 / 2) / 3)
    assert diversity(outputs_SKD, [0, 1, 0]).item() == pytest.approx((0 + 1 / 2) / 2)
    assert diversity(outputs_SKD, [0, 1, 2], served=[0, 4, 3]).item() == pytest.approx(1 / 2)
    assert diversity(outputs_SKD, [0, 4, 4]).item() == 0.0


def test_diversity_hardly_hears_experts_that_add_next_to_nothing() -> None:
    one = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    found = []
    for size in (1.0, 1e-3, 0.0):
        outputs_SKD = (size * one).requires_grad_()
        value = diversity(outputs_SKD, [0, 1])
        value.backward()
        found.append(value.item())
        assert outputs_SKD.grad.abs().max() < 2
    assert found[0] == pytest.approx(1 / 2) and found[1] < 1e-3 and found[2] == 0.0


@pytest.mark.parametrize("name", ["context", "diversity"])
def test_what_was_not_asked_for_is_missed(name: str) -> None:
    for probe in (None, Probe()):
        with pytest.raises(ModelError, match=f"the loss '{name}'"):
            routing_loss(name)(LossInputs(routing(torch.eye(4), 2)._replace(probe=probe), everything(4)))


# -- a step that is cut into micro-batches -----------------------------------------------------------------------------

S = 12
MASK_S = torch.tensor([1, 1, 1, 1, 1, 0, 1, 0, 0, 1, 0, 0]).bool()


def cut(name: str, logits_SE: Tensor, parts: int, *, scope: str) -> tuple[Tensor, Tensor]:
    """The mean of the micro-batches' losses, and its gradient."""
    loss = routing_loss(name)
    pieces = [inputs(x, mask_S=m) for x, m in zip(logits_SE.chunk(parts), MASK_S.chunk(parts), strict=True)]
    sums = {}
    if scope == "global":
        with torch.no_grad():
            sums = {name: torch.stack([loss.sums(piece) for piece in pieces]).sum(dim=0, keepdim=True)}
    totals = StepTotals(MASK_S.sum().float(), parts, sums)
    values = [loss(piece, totals.of(name, 0)) for piece in pieces]
    mean = torch.stack(values).mean()
    if scope == "global":
        assert all(torch.allclose(value, mean, atol=1e-6) for value in values) or loss.per_token
    return mean.detach(), torch.autograd.grad(mean, logits_SE)[0]


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("name", loss_names())
def test_a_step_is_the_same_however_it_is_cut(name: str, parts: int) -> None:
    logits_SE, loss = torch.randn(S, 4, requires_grad=True), routing_loss(name)
    want = loss(inputs(logits_SE, mask_S=MASK_S))
    gradient = torch.autograd.grad(want, logits_SE)[0]
    scopes = ["global", "micro"] if loss.per_token else ["global"]
    for scope in scopes:
        value, found = cut(name, logits_SE, parts, scope=scope)
        torch.testing.assert_close(value, want.detach())
        torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in loss_names() if not routing_loss(name).per_token])
def test_statistics_of_micro_batches_are_others(name: str) -> None:
    """With ``scope: micro`` each part is judged by itself: the loss is the plain mean of the parts' own."""
    logits_SE = torch.randn(S, 4, requires_grad=True)
    value, _ = cut(name, logits_SE, 4, scope="micro")
    pieces = zip(logits_SE.chunk(4), MASK_S.chunk(4), strict=True)
    own = torch.stack([routing_loss(name)(inputs(x, mask_S=m)) for x, m in pieces])
    assert torch.equal(value, own.mean().detach())
    whole = routing_loss(name)(inputs(logits_SE, mask_S=MASK_S))
    assert not torch.allclose(value, whole, rtol=1e-2)


def test_balance_in_each_part_is_asked_for_only_by_parts() -> None:
    """Half of the tokens all to one expert, the other half all to the other: balanced as a step, and never a part."""
    logits_SE = torch.tensor([[9.0, 0.0]] * 2 + [[0.0, 9.0]] * 2)
    loss, pieces = routing_loss("load_balance"), [inputs(x, 1) for x in logits_SE.chunk(2)]
    sums = torch.stack([loss.sums(piece) for piece in pieces]).sum(dim=0, keepdim=True)
    whole = StepTotals(torch.tensor(4.0), 2, {"load_balance": sums})
    for piece in pieces:
        assert loss(piece).item() == pytest.approx(2.0, abs=1e-3)
        assert loss(piece, whole.of("load_balance", 0)).item() == pytest.approx(1.0)
