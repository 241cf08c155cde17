"""What losses ask of a layer besides its routing: each expert's own answer, and the gate under other neighbours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from layer_config import layer_config
from torch import Tensor, nn

from ragmoe.experts import FeedForward
from ragmoe.gates import Routing
from ragmoe.moe import MoELayer
from ragmoe.moe.probe import Asked, own_outputs, serving, swap
from ragmoe.neighbours import Neighbours

D, H, E, R = 16, 24, 4, 8
Net = FeedForward | None


def layer(**changes: Any) -> tuple[MoELayer, Net]:
    """An MoE layer with nothing at zero, and the dense network where its experts stand beside one."""
    sizes = {"hidden_size": D, "intermediate_size": H, "experts": E, "neighbour_width": R, "initializer_range": 0.5}
    config = layer_config(**{**sizes, "gate": "retrieval", **changes})
    made = MoELayer(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    beside = config.expert_kind == "lora" or config.shared_expert
    return made, FeedForward(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)) if beside else None


def found(questions: int) -> Neighbours:
    embeddings_BNR = nn.functional.normalize(torch.randn(questions, 3, R), dim=-1)
    return Neighbours(embeddings_BNR, torch.rand(questions, 3), torch.ones(questions, 3, dtype=torch.bool))


def alone(moe: MoELayer, dense: Net, x_D: Tensor, expert: int) -> Tensor:
    """What one expert answers to one token, without the dense network's part."""
    one = Routing(torch.ones(1, 1), torch.tensor([[expert]]), torch.zeros(1, E))
    y_SD = moe.experts(x_D.unsqueeze(0), one, dense)
    return (y_SD if dense is None else y_SD - dense(x_D.unsqueeze(0)))[0]


KINDS = [{}, {"expert_kind": "lora"}, {"shared_expert": True}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_outputs_are_each_experts_own(kind: dict[str, Any]) -> None:
    moe, dense = layer(**kind)
    x_SD = torch.randn(6, D, requires_grad=True)
    routing = moe.gate(x_SD)
    # One slot is left empty, one is served by another expert.
    routing.experts_SK[0, 1] = E
    served_SK = routing.experts_SK.clone()
    served_SK[1, 0] = (served_SK[1, 0] + 1) % E
    routing = routing._replace(served_SK=served_SK)
    got = own_outputs(moe.experts, x_SD, routing, dense)
    rows = [
        torch.stack([alone(moe, dense, x_SD[s], e) if e < E else torch.zeros(D) for e in of_token])
        for s, of_token in enumerate(served_SK.tolist())
    ]
    want = torch.stack(rows)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    probes = torch.randn_like(want)
    parameters = [x_SD, *moe.experts.parameters()]
    for a, b in zip(*(torch.autograd.grad((y * probes).sum(), parameters) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_weighted_outputs_are_what_the_layer_answers(kind: dict[str, Any]) -> None:
    moe, dense = layer(**kind)
    x_BTD, neighbours = torch.randn(2, 5, D), found(2)
    plain, bare = moe(x_BTD, dense, neighbours)
    y_BTD, routing = moe(x_BTD, dense, neighbours, asked=Asked(swapped=False, outputs=True))
    assert torch.equal(plain, y_BTD) and bare.probe is None and routing.probe.swapped is None
    if dense is not None:
        y_BTD = y_BTD - dense(x_BTD)
    mixed_SD = (routing.probe.outputs_SKD * routing.weights_SK.unsqueeze(-1)).sum(dim=1)
    torch.testing.assert_close(mixed_SD.view_as(y_BTD), y_BTD, atol=1e-4, rtol=1e-4)


def test_untrained_lora_experts_add_nothing() -> None:
    moe, dense = layer(expert_kind="lora")
    moe.experts.reset_parameters()
    x_SD = torch.randn(6, D)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            assert own_outputs(moe.experts, x_SD, moe.gate(x_SD), dense).abs().max() < 1e-6


def test_small_additions_are_exact_in_half_precision() -> None:
    """They are differences of outputs a thousand times their size."""
    moe, dense = layer(expert_kind="lora")
    with torch.no_grad():
        for b in (moe.experts.up_b, moe.experts.down_b):
            b.mul_(1e-3)
    x_SD = torch.randn(6, D)
    routing = moe.gate(x_SD)
    want = own_outputs(moe.experts, x_SD, routing, dense)
    with torch.autocast("cpu", torch.bfloat16):
        got = own_outputs(moe.experts, x_SD, routing, dense)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-2)


def test_an_expert_that_is_held_back_is_not_asked() -> None:
    moe, _ = layer()
    with torch.no_grad():
        moe.experts.fused.up_proj[2] = torch.nan
    x_SD = torch.randn(6, D, requires_grad=True)
    for available in ([0, 1, 3], [1], []):
        moe.gate.set_available(torch.tensor([e in available for e in range(E)]))
        routing = moe.gate(x_SD)
        got = own_outputs(moe.experts, x_SD, routing, None)
        assert got.isfinite().all() and bool(got.any()) is bool(available)
        assert set(serving(routing).flatten().tolist()) <= {*available, E}


def test_the_gate_is_seen_under_both_neighbours_without_noise() -> None:
    moe, _ = layer(gate_noise=5.0, token_dropout=0.9)
    moe.gate.set_available(torch.tensor([True, True, False, True]))
    x_BTD, neighbours = torch.randn(2, 5, D), found(2)
    _, routing = moe.train()(x_BTD, None, neighbours, asked=Asked(swapped=True, outputs=False))
    own_SE, other_SE, compared_S = routing.probe.swapped
    moe.eval()
    x_SD = x_BTD.view(-1, D)
    assert torch.equal(own_SE, moe.gate(x_SD, neighbours).logits_SE)
    assert torch.equal(other_SE, moe.gate(x_SD, neighbours.rows([1, 0])).logits_SE)
    assert compared_S.all() and routing.probe.outputs_SKD is None
    assert not torch.allclose(own_SE[:, :2], other_SE[:, :2], atol=1e-3)
    _, routing = moe(x_BTD, None, None, asked=Asked(swapped=True, outputs=False))
    assert routing.probe.swapped is None


def test_a_question_is_swapped_with_another_whatever_the_order() -> None:
    neighbours = found(6)
    # Two questions have none, and two have the same.
    mask_BN = neighbours.mask_BN.clone()
    mask_BN[[1, 4]] = False
    neighbours = replace(neighbours, mask_BN=mask_BN)
    neighbours.embeddings_BNR[2] = neighbours.embeddings_BNR[0]
    neighbours.scores_BN[2] = neighbours.scores_BN[0]
    other, compared_B = swap(neighbours)
    assert not compared_B[[1, 4]].any() and compared_B.sum() == 3
    partners = [
        (neighbours.embeddings_BNR == x).flatten(1).all(dim=1).nonzero()[0].item() for x in other.embeddings_BNR
    ]
    assert all(partners[b] != b for b in compared_B.nonzero().flatten().tolist())
    order = torch.randperm(6)
    shuffled, also_B = swap(neighbours.rows(order.tolist()))
    # Which of the two that are alike comes first is all that the order decides.
    assert also_B.sum() == 3
    alike = {0, 2}
    for at, b in enumerate(order.tolist()):
        if b not in alike:
            assert also_B[at] == compared_B[b]
            assert not also_B[at] or torch.equal(shuffled.embeddings_BNR[at], other.embeddings_BNR[b])


def test_nobody_to_swap_with() -> None:
    for neighbours in (found(1), Neighbours.empty(3, R)):
        assert not swap(neighbours)[1].any()
