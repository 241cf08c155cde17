"""Scores and selections: each against its definition, any of them with any gate."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ragmoe import ConfigError, Neighbours
from ragmoe.gates import (
    Gate,
    GateSettings,
    Tokens,
    gate_class,
    gate_names,
    scores_class,
    scores_names,
    selection_class,
    selection_names,
)

D, E, K, R = 16, 6, 2, 12
SETTINGS = GateSettings(width=D, experts=E, top_k=K, neighbour_width=R, attention_width=8)
# What a gate cannot be without.
NEEDS = {
    "softmax": {"top_k": E},
    "hierarchical": {"groups": 3},
    "modality": {"expert_types": (0, 0, 1, 1, -1, -1)},
    "oracle": {"common_experts": 1},
    "centroid": {"common_experts": 1},
    "ridge": {"common_experts": 1},
}


def trained(name: str = "token", **changes: object) -> Gate:
    """A gate none of whose parameters is zero any more."""
    gate = gate_class(name)(replace(SETTINGS, **{**NEEDS.get(name, {}), **changes}))
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return gate.eval()


def some_neighbours(questions: int = 2) -> Neighbours:
    embeddings_BNR = F.normalize(torch.randn(questions, 3, R), dim=-1)
    return Neighbours(
        embeddings_BNR,
        torch.rand(questions, 3),
        torch.ones(questions, 3, dtype=torch.bool),
        votes_BNLE=torch.rand(questions, 3, 1, E).softmax(dim=-1),
        domain_B=torch.arange(questions),
    )


def sequences(*lengths: int) -> Tokens:
    """Sequences of these lengths, padded on the right to the longest."""
    T = max(lengths)
    mask_BT = torch.arange(T) < torch.tensor(lengths).unsqueeze(1)
    return Tokens(mask_BT, (torch.arange(T) >= 2).long().expand(len(lengths), T))


@pytest.mark.parametrize("scores", scores_names())
@pytest.mark.parametrize("selection", selection_names())
@pytest.mark.parametrize("name", gate_names())
@pytest.mark.parametrize("normalise", [None, False])
def test_any_gate_with_any_selection_and_any_scores(
    name: str, selection: str, scores: str, normalise: bool | None
) -> None:
    gate = trained(name, selection=selection, scores=scores, normalise=normalise)
    gate.set_available(torch.arange(E) != 1)
    tokens, found, x_SD = sequences(5, 3), some_neighbours(), torch.randn(10, D)
    for mode in (gate.eval(), gate.train()):
        x_SD = x_SD.detach().requires_grad_()
        routing = mode(x_SD, found, tokens)
        assert routing.logits_SE.shape == (10, E) and routing.experts_SK.shape == routing.weights_SK.shape
        assert not (routing.experts_SK == 1).any()
        real_S = tokens.mask_BT.reshape(-1)
        assert ((routing.weights_SK > 0) | (routing.experts_SK == E) | (name in NEEDS)).all()
        sums_S = routing.weights_SK.sum(dim=1)[real_S]
        if gate.normalise:
            served_S = (routing.experts_SK < E).any(dim=1)[real_S]
            assert torch.allclose(sums_S, served_S.float(), atol=1e-6)
        (routing.weights_SK * torch.rand_like(routing.weights_SK)).sum().backward()
        assert x_SD.grad.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in gate.parameters())


@pytest.mark.parametrize("selection", selection_names())
def test_padding_and_other_sequences_change_no_choice(selection: str) -> None:
    gate, x_BTD = trained(selection=selection), torch.randn(2, 5, D)
    alone = gate(x_BTD[1, :3], None, sequences(3))
    both = gate(x_BTD.reshape(10, D), None, sequences(5, 3))
    slots = min(alone.experts_SK.shape[1], both.experts_SK.shape[1])
    assert torch.equal(both.experts_SK[5:8, :slots], alone.experts_SK[:, :slots])
    assert torch.equal(both.weights_SK[5:8, :slots], alone.weights_SK[:, :slots])
    assert (both.experts_SK[5:8, slots:] == E).all() and (alone.experts_SK[:, slots:] == E).all()


@pytest.mark.parametrize("normalise", [None, False])
def test_sigmoid_scores_by_hand(normalise: bool | None) -> None:
    gate = trained(scores="sigmoid", normalise=normalise, scale=2.5)
    gate.balance_bias[3] = 0.2
    x_SD = torch.randn(20, D)
    routing, p_SE = gate(x_SD), gate.logits(x_SD, None).sigmoid()
    chosen_SK = (p_SE + gate.balance_bias).topk(K, dim=1).indices
    assert torch.equal(routing.experts_SK, chosen_SK)
    want_SK = p_SE.gather(1, chosen_SK)
    if normalise is None:
        want_SK = want_SK / want_SK.sum(dim=1, keepdim=True)
    assert torch.allclose(routing.weights_SK, 2.5 * want_SK, atol=1e-6)


def test_a_bias_lifts_no_expert_that_is_held_back() -> None:
    gate = trained(scores="sigmoid")
    gate.balance_bias[0] = 1e6
    gate.set_available(torch.arange(E) != 0)
    assert not (gate(torch.randn(20, D)).experts_SK == 0).any()


def test_expert_choice_against_a_loop() -> None:
    gate, tokens, x_SD = trained(selection="expert_choice", normalise=False), sequences(7, 4), torch.randn(14, D)
    routing, p_SE = gate(x_SD, None, tokens), gate.logits(x_SD, None).softmax(dim=1)
    want: dict[int, dict[int, float]] = {s: {} for s in range(14)}
    for begin, length in ((0, 7), (7, 4)):
        room = math.ceil(length * K / E)
        for e in range(E):
            for s in sorted(range(begin, begin + length), key=lambda s: -p_SE[s, e].item())[:room]:
                want[s][e] = p_SE[s, e].item()
    for s in range(14):
        pairs = zip(routing.experts_SK[s].tolist(), routing.weights_SK[s].tolist(), strict=True)
        assert {e: w for e, w in pairs if e < E} == pytest.approx(want[s])
        best = [routing.logits_SE[s, e].item() for e in routing.experts_SK[s].tolist() if e < E]
        assert best == sorted(best, reverse=True)


def test_expert_choice_balances_what_top_k_does_not() -> None:
    """Every token wants expert 0."""
    x_SD = torch.randn(24, D)
    loads = {}
    for selection in ("top_k", "expert_choice"):
        gate = trained(selection=selection)
        gate.logits = lambda x_SD, found: F.pad(10 + x_SD[:, :1], (0, E - 1)) + 0.01 * x_SD[:, :E]  # type: ignore[method-assign]
        loads[selection] = gate(x_SD).choices_SE().sum(dim=0)
    assert loads["top_k"][0] == 24 and loads["expert_choice"].tolist() == [8] * E


def test_noisy_top_k_is_top_k_when_not_training() -> None:
    gate, x_SD = trained(selection="noisy_top_k"), torch.randn(20, D)
    routing = gate(x_SD)
    assert torch.equal(routing.logits_SE, gate.logits(x_SD, None)) and routing.load_SE is None


def test_the_scale_of_learned_noise() -> None:
    gate = trained(selection="noisy_top_k").train()
    x_SD = torch.randn(1, D).expand(4000, D)
    noise_SE = gate(x_SD).logits_SE - gate.logits(x_SD, None)
    want_E = F.softplus(gate.selection.noise(x_SD[:1]))[0]
    assert torch.allclose(noise_SE.std(dim=0), want_E, rtol=0.1)
    noise_SE.square().sum().backward()
    assert gate.selection.noise.weight.grad.abs().sum() > 0
    assert "selection.noise.weight" in set(gate.expert_parameters) & dict(gate.named_parameters()).keys()


def test_the_load_estimate_is_the_share_of_draws_that_choose_an_expert() -> None:
    """With the noise of the others held fast, as its definition has it."""
    gate = trained(selection="noisy_top_k")
    x_SD = torch.randn(1, D)
    clean_SE = gate.logits(x_SD, None)
    scale_SE = F.softplus(gate.selection.noise(x_SD))
    noisy_SE = clean_SE + torch.randn(1, E) * scale_SE
    got_E = gate.selection.load(clean_SE, noisy_SE, x_SD)[0]
    drawn = torch.randn(20000)
    for e in range(E):
        others = torch.cat([noisy_SE[0, :e], noisy_SE[0, e + 1 :]]).topk(K).values[-1]
        share = (clean_SE[0, e] + drawn * scale_SE[0, e] > others).float().mean()
        assert got_E[e].item() == pytest.approx(share.item(), abs=0.02)


def test_the_load_estimate_has_a_gradient_and_bears_missing_experts() -> None:
    gate = trained(selection="noisy_top_k").train()
    for there in ({0, 1, 2, 3, 4, 5}, {0, 2, 3, 5}, {2}, set()):
        gate.zero_grad()
        available_E = torch.tensor([e in there for e in range(E)])
        gate.set_available(available_E)
        load_SE = gate(torch.randn(9, D)).load_SE
        assert (load_SE[:, ~available_E] == 0).all()
        if there == {2}:
            assert (load_SE[:, 2] == 1).all()
        load_SE.sum().backward()
        assert gate.token.weight.grad.isfinite().all()
    assert trained(selection="noisy_top_k", top_k=E).train()(torch.randn(3, D)).load_SE.eq(1).all()


def test_jitter_only_in_training() -> None:
    gate, x_SD = trained(jitter=0.1), torch.ones(400, D)
    want = gate.logits(x_SD, None)
    assert torch.equal(gate(x_SD).logits_SE, want)
    gate.train()
    seen: list[Tensor] = []
    gate.logits = lambda x_SD, found: (seen.append(x_SD), want)[1]  # type: ignore[method-assign]
    gate(x_SD)
    assert seen[0].min() >= 0.9 and seen[0].max() <= 1.1 and seen[0].std() == pytest.approx(0.1 / math.sqrt(3), rel=0.1)


@given(
    st.integers(0, 12), st.integers(1, 8), st.integers(1, 8), st.sampled_from(selection_names()), st.integers(0, 2**16)
)
@settings(max_examples=60, deadline=None)
def test_any_size(S: int, experts: int, top_k: int, selection: str, seed: int) -> None:
    torch.manual_seed(seed)
    top_k = min(top_k, experts)
    gate = gate_class("token")(replace(SETTINGS, experts=experts, top_k=top_k, selection=selection))
    mask_BT = torch.rand(1, S) < 0.7
    routing = gate(torch.randn(S, D), None, Tokens(mask_BT))
    assert routing.experts_SK.shape[0] == S and routing.experts_SK.ge(0).all() and routing.experts_SK.le(experts).all()
    assert routing.weights_SK.isfinite().all()
    load_E = (routing.choices_SE() * mask_BT.reshape(-1, 1)).sum(dim=0)
    if selection == "expert_choice":
        assert load_E.tolist() == [math.ceil(int(mask_BT.sum()) * top_k / experts)] * experts
    else:
        assert load_E.sum() == mask_BT.sum() * top_k


@pytest.mark.parametrize(("of", "what"), [(scores_class, "kind of scores"), (selection_class, "selection")])
def test_unknown_names_list_what_exists(of: object, what: str) -> None:
    with pytest.raises(ConfigError, match=f"no {what} 'topk'; there are: .*"):
        of("topk")  # type: ignore[operator]
