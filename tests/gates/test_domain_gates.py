"""Gates of domains: a domain's own expert, beside those that all domains have in common."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ragmoe import ConfigError, ModelError, Neighbours
from ragmoe.gates import GateSettings, gate_class
from ragmoe.gates.routing import Tokens
from ragmoe.moe.capacity import overflow_class

SETTINGS = GateSettings(width=16, experts=5, top_k=2, neighbour_width=4, common_experts=2)
T = 7


def asked(*domains: int) -> Neighbours:
    return replace(Neighbours.empty(len(domains), 4), domain_B=torch.tensor(domains))


def test_a_token_goes_to_its_domains_expert_and_the_common_ones() -> None:
    gate = gate_class("oracle")(SETTINGS)
    x_SD = torch.randn(3 * T, 16)
    routing = gate(x_SD, asked(0, 2, 1))
    for b, domain in enumerate((0, 2, 1)):
        own = slice(b * T, (b + 1) * T)
        assert set(routing.experts_SK[own].flatten().tolist()) <= {domain, 3, 4}
        allowed = [domain, 3, 4]
        want = gate.token(x_SD[own])[:, allowed].topk(2, dim=-1)
        assert torch.equal(routing.experts_SK[own], torch.tensor(allowed)[want.indices])
        assert torch.allclose(routing.weights_SK[own], want.values.softmax(dim=-1))


def test_one_expert_a_token_is_the_domains_own() -> None:
    gate = gate_class("oracle")(replace(SETTINGS, top_k=1, common_experts=0))
    assert gate(torch.randn(2 * T, 16), asked(4, 1)).experts_SK.flatten().tolist() == [4] * T + [1] * T


def test_without_a_known_domain_it_is_the_token_gate() -> None:
    gate = gate_class("oracle")(SETTINGS)
    x_SD = torch.randn(2 * T, 16)
    want = gate.token(x_SD)
    assert torch.equal(gate(x_SD, None).logits_SE, want)
    assert torch.equal(gate(x_SD, Neighbours.empty(2, 4)).logits_SE, want)
    both = gate(x_SD, asked(-1, 0)).logits_SE
    assert torch.equal(both[:T], want[:T]) and (both[T:, 1:3] < -1000).all()


def test_gradients_are_finite_and_reach_the_token_part() -> None:
    gate = gate_class("oracle")(SETTINGS)
    routing = gate(torch.randn(2 * T, 16), asked(0, 1))
    (routing.weights_SK[:, 0].sum() + routing.logits_SE.logsumexp(dim=-1).sum()).backward()
    assert gate.token.weight.grad.isfinite().all() and gate.token.weight.grad.any()


def test_more_choices_than_a_domain_has_experts() -> None:
    with pytest.raises(
        ConfigError, match="chooses 2 experts, but a domain has one of its own and 0 in common"
    ) as caught:
        gate_class("oracle")(replace(SETTINGS, common_experts=0))
    assert "model.common_experts=1" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="common_experts is 6: expected 0 to 5"):
        replace(SETTINGS, common_experts=6)


def neighbours_of(vectors_BR: torch.Tensor) -> Neighbours:
    """One neighbour each."""
    B = len(vectors_BR)
    return Neighbours(vectors_BR.unsqueeze(1), torch.ones(B, 1), torch.ones(B, 1, dtype=torch.bool))


def some_questions() -> tuple[torch.Tensor, torch.Tensor]:
    """Forty questions of domains 0 and 2, around two directions; nobody asks about domain 1."""
    domain_Q = torch.tensor([0, 2] * 20)
    middle_QR = torch.where(domain_Q.unsqueeze(1) == 0, torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 0, 1.0, 0]))
    return middle_QR + 0.05 * torch.randn(40, 4), domain_Q


@pytest.mark.parametrize("name", ["centroid", "ridge"])
def test_a_fitted_gate_guesses_the_domain_from_the_neighbours(name: str) -> None:
    gate = gate_class(name)(SETTINGS)
    gate.fit(*some_questions())
    asked_BR = torch.tensor([[0.9, 0.1, 0.2, 0], [0, 0.1, 0.8, 0.1], [0.1, 0, 0.3, 0]])
    assert gate.domain(neighbours_of(asked_BR)).tolist() == [0, 2, 2]
    chosen = gate(torch.randn(3 * T, 16), neighbours_of(asked_BR)).experts_SK
    assert set(chosen[:T].flatten().tolist()) <= {0, 3, 4} and set(chosen[T:].flatten().tolist()) <= {2, 3, 4}
    none = Neighbours.empty(1, 4)
    x_SD = torch.randn(T, 16)
    assert gate.domain(none).tolist() == [-1] and torch.equal(gate(x_SD, none).logits_SE, gate.token(x_SD))


def test_centroid_is_the_nearest_mean() -> None:
    gate = gate_class("centroid")(SETTINGS)
    x_QR, domain_Q = some_questions()
    gate.fit(x_QR, domain_Q)
    means = torch.stack([x_QR[domain_Q == d].mean(dim=0) for d in (0, 2)])
    asked_BR = torch.randn(50, 4)
    nearest = torch.cdist(asked_BR, means).argmin(dim=1)
    assert torch.equal(gate.domain(neighbours_of(asked_BR)), torch.tensor([0, 2])[nearest])


def test_ridge_is_the_closed_form() -> None:
    gate = gate_class("ridge")(SETTINGS)
    x_QR, domain_Q = some_questions()
    gate.fit(x_QR, domain_Q)
    y_QD = torch.nn.functional.one_hot(domain_Q, 3).float()
    # The same with a column of ones that is not penalised.
    ones_QR = torch.cat([x_QR, torch.ones(40, 1)], dim=1).double()
    penalty = torch.diag(torch.tensor([1.0, 1, 1, 1, 0]).double())
    want = torch.linalg.solve(ones_QR.T @ ones_QR + penalty, ones_QR.T @ y_QD.double()).T.float()
    assert torch.allclose(gate.weight, want[:, :4], atol=1e-5)
    assert torch.allclose(gate.offset[[0, 2]], want[[0, 2], 4], atol=1e-5) and gate.offset[1] < -1000


@pytest.mark.parametrize("name", ["centroid", "ridge"])
def test_fitting_without_a_known_domain_is_refused(name: str) -> None:
    gate = gate_class(name)(SETTINGS)
    with pytest.raises(ModelError, match="none of the questions belongs to a domain") as caught:
        gate.fit(torch.randn(3, 4), torch.tensor([-1, -1, 4]))
    assert "model.expert_names" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="no expert is left for a domain"):
        gate_class(name)(replace(SETTINGS, common_experts=5))


def test_the_questions_of_a_domain_whose_expert_is_held_back_are_free() -> None:
    gate = gate_class("oracle")(replace(SETTINGS, top_k=1, common_experts=0))
    gate.set_available(torch.tensor([True, True, False, True, True]))
    x_SD = torch.randn(64, 16)
    got = gate(x_SD, asked(2)).experts_SK.flatten()
    want = gate.token(x_SD)
    want[:, 2] = -torch.inf
    assert torch.equal(got, want.argmax(dim=1)) and len(got.unique()) > 1


@pytest.mark.parametrize("name", ["centroid", "ridge"])
def test_a_fitted_gates_experts_stay_what_they_are(name: str) -> None:
    assert gate_class(name).fixed_experts and not gate_class("oracle").fixed_experts


@pytest.mark.parametrize("settings", [{}, {"scores": "sigmoid"}, {"selection": "expert_choice"}])
def test_no_selection_and_no_bias_leads_to_another_domain(settings: dict[str, str]) -> None:
    """Scores and biases are compared by more than logits; what is closed to a token stays closed."""
    gate = gate_class("oracle")(replace(SETTINGS, **settings))
    gate.balance_bias.copy_(torch.tensor([5.0, -5.0, 5.0, -5.0, -5.0]))
    routing = gate(torch.randn(2 * T, 16), asked(1, -1))
    assert set(routing.experts_SK[:T].flatten().tolist()) <= {1, 3, 4, 5}
    assert {1} <= set(routing.experts_SK[:T].flatten().tolist())


def test_an_overflow_goes_on_to_no_other_domain() -> None:
    gate = gate_class("oracle")(replace(SETTINGS, top_k=1, common_experts=1))
    gate.leaves_empty = True
    routing = gate(torch.randn(20, 16), asked(2))
    served_SK = overflow_class("next").serve(routing.experts_SK, routing.ranked_SE, torch.arange(20), 5)
    assert set(served_SK.flatten().tolist()) == {2, 4, 5} and (served_SK == 5).sum() == 10


def test_a_broken_expert_that_is_held_back_breaks_nothing() -> None:
    kinds = {"token": {}, "retrieval": {}, "hierarchical": {"groups": 3}, "modality": {"expert_types": (0,) * 6}}
    for name, more in kinds.items():
        gate = gate_class(name)(replace(SETTINGS, experts=6, common_experts=0, **more))
        with torch.no_grad():
            gate.token.weight[2] = torch.nan
            gate.balance_bias[2] = torch.nan
        gate.set_available(torch.tensor([True, True, False, True, True, True]))
        x_SD = torch.randn(40, 16)
        routing = gate(x_SD, Neighbours.empty(2, 4))
        assert routing.weights_SK.isfinite().all() and not (routing.experts_SK == 2).any(), name


def test_a_type_whose_experts_are_all_held_back_goes_to_any() -> None:
    torch.manual_seed(2)
    gate = gate_class("modality")(replace(SETTINGS, top_k=1, common_experts=0, expert_types=(0, 0, 0, 1, 1)))
    gate.set_available(torch.tensor([True, True, True, False, False]))
    tokens = Tokens(torch.ones(1, 8, dtype=torch.bool), torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]]))
    x_SD = torch.randn(8, 16)
    routing = gate(x_SD, None, tokens)
    assert torch.equal(routing.experts_SK, gate.token(x_SD)[:, :3].argmax(dim=1, keepdim=True))
    assert routing.experts_SK[4:].unique().numel() > 1 and torch.equal(routing.weights_SK, torch.ones(8, 1))
