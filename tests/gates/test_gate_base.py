"""What every gate gets from its base class: choice, weights, noise, bias, availability, the registry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from ragmoe import ConfigError, ModelError, Neighbours
from ragmoe.gates import Gate, GateSettings, TokenGate, gate_class, gate_names, register_gate
from ragmoe.gates.base import _GATES

SETTINGS = GateSettings(width=16, experts=5, top_k=2, neighbour_width=12, attention_width=8)
ALL = ["pooled", "retrieval", "token"]


def trained(name: str, **changes: object) -> Gate:
    """A gate none of whose parameters is zero any more."""
    gate = gate_class(name)(replace(SETTINGS, **changes))
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return gate.eval()


def test_a_gate_that_wants_recorded_votes_counts_votes() -> None:
    class Mine(TokenGate):
        uses_votes = True

    assert Mine.counts_votes and gate_class("clusters").counts_votes and not TokenGate.counts_votes


def some_neighbours(questions: int = 3, n: int = 4, width: int = SETTINGS.neighbour_width) -> Neighbours:
    embeddings_BNR = torch.nn.functional.normalize(torch.randn(questions, n, width), dim=-1)
    return Neighbours(embeddings_BNR, torch.rand(questions, n), torch.ones(questions, n, dtype=torch.bool))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("normalise", [None, True, False])
def test_choice_and_weights_against_a_loop(name: str, top_k: int, normalise: bool | None) -> None:
    gate, x_SD, neighbours = trained(name, top_k=top_k, normalise=normalise), torch.randn(12, 16), some_neighbours()
    routing = gate(x_SD, neighbours)
    logits_SE = gate.logits(x_SD, neighbours)
    assert torch.equal(routing.logits_SE, logits_SE)
    for s in range(12):
        row = logits_SE[s].tolist()
        best = sorted(range(5), key=lambda e: -row[e])[:top_k]
        assert routing.experts_SK[s].tolist() == best
        over = logits_SE[s] if normalise is False else logits_SE[s, best]
        weights_K = logits_SE[s, best].exp() / over.exp().sum()
        assert torch.allclose(routing.weights_SK[s], weights_K, atol=1e-6)


def test_normalised_weights_sum_to_one_and_a_single_choice_keeps_its_gradient() -> None:
    x_SD = torch.randn(12, 16)
    assert torch.allclose(trained("token")(x_SD).weights_SK.sum(dim=1), torch.ones(12))
    single = trained("token", top_k=1)
    routing = single(x_SD)
    assert torch.equal(routing.weights_SK, torch.ones(12, 1))
    routing.weights_SK.sum().backward()
    got, single.token.weight.grad = single.token.weight.grad, None
    single.logits(x_SD, None).log_softmax(dim=1).gather(1, routing.experts_SK).sum().backward()
    assert torch.allclose(got, single.token.weight.grad, atol=1e-6)
    assert got.abs().max() > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_balance_bias_moves_the_choice_and_not_the_weights(name: str) -> None:
    gate, x_SD, neighbours = trained(name), torch.randn(12, 16), some_neighbours()
    before = gate(x_SD, neighbours)
    gate.balance_bias[4] = 1000.0
    after = gate(x_SD, neighbours)
    assert (after.experts_SK[:, 0] == 4).all()
    assert not (before.experts_SK[:, 0] == 4).all()
    assert torch.equal(after.logits_SE, before.logits_SE)
    chosen_SK = before.logits_SE.gather(1, after.experts_SK)
    assert torch.allclose(after.weights_SK, chosen_SK.softmax(dim=1))


def test_update_of_the_balance_bias_by_hand() -> None:
    gate = trained("token")
    gate.update_balance_bias(torch.tensor([0.5, 0.2, 0.2, 0.1, 0.0]), rate=0.1)
    assert torch.allclose(gate.balance_bias, torch.tensor([-0.1, 0.0, 0.0, 0.1, 0.1]))


def test_noise_only_in_training() -> None:
    gate, x_SD = trained("token", noise=0.5), torch.randn(500, 16)
    clean = gate.logits(x_SD, None)
    assert torch.equal(gate(x_SD).logits_SE, clean)
    gate.train()
    noise = gate(x_SD).logits_SE - clean
    assert noise.std().item() == pytest.approx(0.5, rel=0.1)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.05)


@pytest.mark.parametrize("name", ["pooled", "retrieval"])
def test_token_dropout_only_in_training_and_only_beside_neighbours(name: str) -> None:
    gate, neighbours = trained(name, token_dropout=1.0), some_neighbours()
    one, two = torch.randn(12, 16), torch.randn(12, 16)
    assert not torch.allclose(gate(one, neighbours).logits_SE, gate(two, neighbours).logits_SE)
    gate.train()
    assert torch.equal(gate(one, neighbours).logits_SE, gate(two, neighbours).logits_SE)
    assert torch.equal(gate(one, None).logits_SE, gate.logits(one, None))


def test_share_of_dropped_tokens() -> None:
    gate, neighbours = trained("pooled", token_dropout=0.3).train(), some_neighbours(questions=1)
    routing = gate(torch.randn(2000, 16), neighbours)
    without_token = gate.logits(torch.zeros(1, 16), neighbours)
    dropped = (routing.logits_SE == without_token).all(dim=1).float().mean().item()
    assert dropped == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("name", ALL)
def test_experts_held_back_are_never_chosen_and_the_rest_renormalise(name: str) -> None:
    gate, x_SD, neighbours = trained(name), torch.randn(12, 16), some_neighbours()
    gate.balance_bias[0] = 1000.0
    gate.set_available(torch.tensor([False, True, True, False, True]))
    routing = gate(x_SD, neighbours)
    assert set(routing.experts_SK.flatten().tolist()) <= {1, 2, 4}
    assert routing.logits_SE[:, [0, 3]].isneginf().all()
    assert torch.allclose(routing.weights_SK.sum(dim=1), torch.ones(12))


def test_fewer_available_than_chosen() -> None:
    gate, x_SD = trained("token", top_k=3), torch.randn(12, 16).requires_grad_()
    gate.set_available(torch.tensor([False, False, True, False, False]))
    routing = gate(x_SD)
    assert (routing.experts_SK == 2).all()
    assert torch.equal(routing.weights_SK, torch.tensor([[1.0, 0.0, 0.0]]).expand(12, 3))


@pytest.mark.parametrize("normalise", [True, False])
def test_none_available_gives_zero_weights_and_finite_gradients(normalise: bool) -> None:
    gate, x_SD = trained("token", normalise=normalise), torch.randn(12, 16).requires_grad_()
    gate.set_available(torch.zeros(5, dtype=torch.bool))
    weights_SK = gate(x_SD).weights_SK
    assert torch.equal(weights_SK, torch.zeros(12, 2))
    weights_SK.sum().backward()
    assert x_SD.grad.isfinite().all() and gate.token.weight.grad.isfinite().all()


@pytest.mark.parametrize("top_k", [0, 6])
def test_impossible_top_k(top_k: int) -> None:
    with pytest.raises(ConfigError, match=rf"top_k is {top_k}: expected 1 to 5, the number of experts"):
        replace(SETTINGS, top_k=top_k)


@pytest.mark.parametrize("name", ["pooled", "retrieval"])
def test_neighbours_that_do_not_fit(name: str) -> None:
    gate = trained(name)
    with pytest.raises(ValueError, match="10 tokens cannot be shared out over the neighbours of 3 questions"):
        gate(torch.randn(10, 16), some_neighbours())
    with pytest.raises(ModelError, match="embeddings are 7 wide, but the gate reads 12"):
        gate(torch.randn(12, 16), some_neighbours(width=7))


def test_unknown_gate_lists_what_exists() -> None:
    with pytest.raises(ConfigError, match=r"no gate 'retreival'; there are: .*pooled, .*token"):
        gate_class("retreival")


@pytest.fixture
def registry() -> Iterator[None]:
    before = dict(_GATES)
    yield
    _GATES.clear()
    _GATES.update(before)


@pytest.mark.usefixtures("registry")
def test_a_new_gate_is_a_few_lines() -> None:
    @register_gate("first")
    class FirstGate(Gate):
        def logits(self, x_SD: torch.Tensor, neighbours: Neighbours | None) -> torch.Tensor:
            return x_SD.new_zeros(x_SD.shape[0], self.settings.experts)

    assert "first" in gate_names()
    routing = gate_class("first")(SETTINGS)(torch.randn(3, 16))
    assert torch.allclose(routing.weights_SK, torch.full((3, 2), 0.5))
