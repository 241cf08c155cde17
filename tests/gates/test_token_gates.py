"""Gates on the token state alone: two-layer, dense mixture, task, hierarchical, modality."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from ragmoe import ConfigError
from ragmoe.gates import GateSettings, Tokens, gate_class

D, E = 16, 6
SETTINGS = GateSettings(width=D, experts=E, top_k=2, neighbour_width=4, attention_width=8)


def test_mlp_is_two_layers_with_gradients() -> None:
    gate, x_SD = gate_class("mlp")(SETTINGS), torch.randn(5, D, requires_grad=True)
    want = torch.relu(x_SD @ gate.hidden.weight.T + gate.hidden.bias) @ gate.out.weight.T
    got = gate(x_SD).logits_SE
    assert torch.allclose(got, want, atol=1e-6)
    (got_grad,) = torch.autograd.grad(got.square().sum(), x_SD)
    (want_grad,) = torch.autograd.grad(want.square().sum(), x_SD)
    assert torch.allclose(got_grad, want_grad, atol=1e-5)


def test_softmax_is_the_dense_mixture() -> None:
    gate, x_SD = gate_class("softmax")(replace(SETTINGS, top_k=E)), torch.randn(5, D)
    routing = gate(x_SD)
    weights_SE = torch.zeros(5, E).scatter(1, routing.experts_SK, routing.weights_SK)
    assert torch.allclose(weights_SE, gate.token(x_SD).softmax(dim=1))
    with pytest.raises(ConfigError, match="uses all 6 experts for each token, but top_k is 2") as caught:
        gate_class("softmax")(SETTINGS)
    assert "model.top_k=6" in str(caught.value.hint)


def tokens() -> Tokens:
    """Two sequences of five, the second with two of padding; the first two tokens of each are the question."""
    mask_BT = torch.tensor([[True] * 5, [True, True, True, False, False]])
    return Tokens(mask_BT, torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 0, 0]]))


def test_a_task_has_one_routing_by_its_question() -> None:
    gate, x_BTD = gate_class("task")(SETTINGS), torch.randn(2, 5, D, requires_grad=True)
    got = gate(x_BTD.view(10, D), None, tokens()).logits_SE.view(2, 5, E)
    want = torch.stack([gate.token(x_BTD[b, :2].mean(dim=0)) for b in range(2)])
    assert torch.allclose(got, want.unsqueeze(1).expand(2, 5, E), atol=1e-6)
    (grad,) = torch.autograd.grad(got.square().sum(), x_BTD)
    assert grad[:, :2].abs().sum() > 0 and grad[:, 2:].abs().sum() == 0


def test_a_task_without_types_is_the_mean_of_what_is_no_padding() -> None:
    gate, x_BTD = gate_class("task")(SETTINGS), torch.randn(2, 5, D)
    passage = Tokens(tokens().mask_BT, torch.ones(2, 5, dtype=torch.long))
    for placed in (Tokens(tokens().mask_BT), passage):
        got = gate(x_BTD.view(10, D), None, placed).logits_SE.view(2, 5, E)
        assert torch.allclose(got[1, 0], gate.token(x_BTD[1, :3].mean(dim=0)), atol=1e-6)
    nothing = gate(x_BTD.view(10, D), None, Tokens(torch.zeros(2, 5, dtype=torch.bool)))
    assert nothing.logits_SE.isfinite().all()


def test_hierarchical_chooses_a_group_and_then_experts_inside_it() -> None:
    gate, x_SD = gate_class("hierarchical")(replace(SETTINGS, groups=3)), torch.randn(40, D)
    routing = gate(x_SD)
    group_SG, inside_SE = gate.group(x_SD), gate.token(x_SD)
    for s in range(40):
        group = int(group_SG[s].argmax())
        inside = inside_SE[s, 2 * group : 2 * group + 2]
        assert sorted(routing.experts_SK[s].tolist()) == [2 * group, 2 * group + 1]
        assert int(routing.experts_SK[s, 0]) == 2 * group + int(inside.argmax())
        joint = group_SG[s].log_softmax(dim=0)[group] + inside.log_softmax(dim=0)
        assert torch.allclose(routing.logits_SE[s, 2 * group : 2 * group + 2], joint, atol=1e-5)
        assert torch.allclose(routing.weights_SK[s].sort().values, joint.exp().sort().values, atol=1e-5)
    assert len({tuple(sorted(row)) for row in routing.experts_SK.tolist()}) == 3
    normalised = gate_class("hierarchical")(replace(SETTINGS, groups=3, normalise=True))
    normalised.load_state_dict(gate.state_dict())
    assert torch.allclose(normalised(x_SD).weights_SK.sum(dim=1), torch.ones(40))
    assert torch.allclose(routing.logits_SE.exp().sum(dim=1), torch.ones(40))
    routing.weights_SK[:, 0].sum().backward()
    assert gate.group.weight.grad.abs().sum() > 0 and gate.token.weight.grad.abs().sum() > 0


def test_a_group_without_available_experts_is_not_chosen() -> None:
    gate = gate_class("hierarchical")(replace(SETTINGS, groups=3))
    gate.set_available(torch.tensor([True, True, False, False, True, True]))
    assert not torch.isin(gate(torch.randn(40, D)).experts_SK, torch.tensor([2, 3])).any()


@pytest.mark.parametrize("groups", [1, 4, 0])
def test_groups_that_do_not_divide_the_experts(groups: int) -> None:
    with pytest.raises(ConfigError, match=f"expert_groups is {groups}: expected .* divides the 6 experts") as caught:
        gate_class("hierarchical")(replace(SETTINGS, groups=groups))
    assert "model.expert_groups=2" in str(caught.value.hint)


def test_a_group_smaller_than_the_choice() -> None:
    with pytest.raises(ConfigError, match="top_k is 3, but a group has 2 experts"):
        gate_class("hierarchical")(replace(SETTINGS, groups=3, top_k=3))


def test_each_modality_has_its_experts_and_the_joint_ones() -> None:
    gate = gate_class("modality")(replace(SETTINGS, expert_types=(0, 0, 1, 1, 1, -1)))
    x_SD, placed = torch.randn(10, D), tokens()
    routing, plain_SE = gate(x_SD, None, placed), gate.token(x_SD)
    for s, kind in enumerate(placed.types_BT.reshape(-1).tolist()):
        allowed = [0, 1, 5] if kind == 0 else [2, 3, 4, 5]
        want = plain_SE[s, allowed].topk(2)
        assert routing.experts_SK[s].tolist() == [allowed[i] for i in want.indices]
        assert torch.allclose(routing.weights_SK[s], want.values.softmax(dim=0), atol=1e-6)


def test_tokens_of_no_known_type() -> None:
    gate, x_SD = gate_class("modality")(replace(SETTINGS, expert_types=(0, 0, 0, 1, 1, 1))), torch.randn(10, D)
    assert gate(x_SD).experts_SK.max() <= 2
    strange = Tokens(torch.ones(1, 10, dtype=torch.bool), torch.full((1, 10), 7))
    assert torch.equal(gate(x_SD, None, strange).logits_SE, gate.token(x_SD))


@pytest.mark.parametrize("types", [None, (0, 1), (0, 0, 0, 1, 1, -2)])
def test_types_that_do_not_fit_the_experts(types: tuple[int, ...] | None) -> None:
    with pytest.raises(ConfigError, match="expected the type of token that each of the 6 experts serves"):
        gate_class("modality")(replace(SETTINGS, expert_types=types))
    with pytest.raises(ConfigError, match="top_k is 2, but 1 experts serve tokens of type 1"):
        gate_class("modality")(replace(SETTINGS, expert_types=(0, 0, 0, 0, 0, 1)))


def test_a_gate_is_the_same_after_its_weights_are_loaded() -> None:
    kinds = {"modality": {"expert_types": (0, 0, 1, 1, 1, -1)}, "hierarchical": {"groups": 2}, "mlp": {}}
    for name, more in kinds.items():
        settings = replace(SETTINGS, **more)
        one, two = gate_class(name)(settings), gate_class(name)(settings)
        two.load_state_dict(one.state_dict())
        x_SD = F.normalize(torch.randn(10, D))
        assert torch.equal(one(x_SD, None, tokens()).weights_SK, two(x_SD, None, tokens()).weights_SK)
