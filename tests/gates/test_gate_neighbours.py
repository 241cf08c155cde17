"""Gates that see neighbours: step 0, no neighbours, and what must not matter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ragmoe import ModelError, Neighbours
from ragmoe.gates import Gate, GateSettings, gate_class

L, E = 3, 5
SETTINGS = GateSettings(width=16, experts=E, top_k=2, neighbour_width=12, attention_width=8, layer=1)
B, T, N = 3, 6, 4


@pytest.fixture(params=["pooled", "retrieval", "memory", "retrieval+memory", "clusters"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def gate(name: str) -> Gate:
    """Trained: no parameter is zero."""
    gate = gate_class(name)(SETTINGS)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        if name == "clusters":
            gate.centroids.copy_(F.normalize(torch.randn(E, 12), dim=-1))
    return gate.eval()


@pytest.fixture
def x_SD() -> Tensor:
    return torch.randn(B * T, 16)


@pytest.fixture
def neighbours() -> Neighbours:
    mask_BN = torch.tensor([[True] * 4, [True, True, False, False], [True] * 4])
    embeddings_BNR = F.normalize(torch.randn(B, N, 12), dim=-1) * mask_BN.unsqueeze(-1)
    votes_BNLE = torch.rand(B, N, L, E).softmax(dim=-1) * mask_BN[..., None, None]
    votes_BNLE[0, 1] = 0.0
    return Neighbours(embeddings_BNR, torch.rand(B, N) * mask_BN, mask_BN, votes_BNLE=votes_BNLE)


def token_part(gate: Gate, x_SD: Tensor) -> Tensor:
    return gate.token(x_SD)


@pytest.mark.parametrize("training", [True, False])
def test_at_step_0_equals_the_token_gate_bit_for_bit(
    name: str, training: bool, x_SD: Tensor, neighbours: Neighbours
) -> None:
    token, other = gate_class("token")(SETTINGS).train(training), gate_class(name)(SETTINGS).train(training)
    with torch.no_grad():
        other.token.weight.copy_(token.token.weight)
    want, got = token(x_SD), other(x_SD, neighbours)
    for field in ("weights_SK", "experts_SK", "logits_SE"):
        assert torch.equal(getattr(got, field), getattr(want, field))


def test_neighbours_matter_to_a_trained_gate(gate: Gate, x_SD: Tensor, neighbours: Neighbours) -> None:
    assert (gate(x_SD, neighbours).logits_SE - token_part(gate, x_SD)).abs().amax(dim=1).min() > 0.01


def test_half_precision_throughout(gate: Gate, x_SD: Tensor, neighbours: Neighbours) -> None:
    want_SE = gate(x_SD, neighbours).logits_SE
    half = gate.bfloat16()(x_SD.bfloat16(), neighbours.to(torch.bfloat16)).logits_SE
    assert torch.allclose(half, want_SE, atol=0.1, rtol=0.05)


def test_no_neighbours_leave_the_token_part_bit_for_bit(gate: Gate, x_SD: Tensor, neighbours: Neighbours) -> None:
    want = token_part(gate, x_SD)
    nobody = torch.zeros(B, N, dtype=torch.bool)
    assert torch.equal(gate(x_SD, None).logits_SE, want)
    assert torch.equal(gate(x_SD, Neighbours.empty(B, 12)).logits_SE, want)
    assert torch.equal(gate(x_SD, neighbours.masked(nobody)).logits_SE, want)
    garbage = Neighbours(
        torch.randn(B, N, 12) * 100, torch.randn(B, N) * 100, nobody, votes_BNLE=torch.randn(B, N, L, E)
    )
    assert torch.equal(gate(x_SD, garbage).logits_SE, want)


def test_a_row_without_neighbours_beside_rows_that_have_some(gate: Gate, x_SD: Tensor, neighbours: Neighbours) -> None:
    keep_BN = torch.tensor([[True], [False], [True]]).expand(B, N)
    got = gate(x_SD, neighbours.masked(keep_BN)).logits_SE
    full = gate(x_SD, neighbours).logits_SE
    assert torch.equal(got[T : 2 * T], token_part(gate, x_SD)[T : 2 * T])
    assert torch.allclose(got[:T], full[:T], atol=1e-6) and torch.allclose(got[2 * T :], full[2 * T :], atol=1e-6)


def test_order_of_neighbours_changes_nothing(gate: Gate, x_SD: Tensor, neighbours: Neighbours) -> None:
    order = torch.tensor([2, 0, 3, 1])
    other = Neighbours(
        neighbours.embeddings_BNR[:, order],
        neighbours.scores_BN[:, order],
        neighbours.mask_BN[:, order],
        votes_BNLE=neighbours.votes_BNLE[:, order],
    )
    assert torch.allclose(gate(x_SD, other).logits_SE, gate(x_SD, neighbours).logits_SE, atol=1e-6)


def test_padding_neighbours_change_nothing(gate: Gate, x_SD: Tensor, neighbours: Neighbours) -> None:
    padded = Neighbours(
        torch.cat([neighbours.embeddings_BNR, torch.randn(B, 3, 12) * 50], dim=1),
        torch.cat([neighbours.scores_BN, torch.full((B, 3), 99.0)], dim=1),
        torch.cat([neighbours.mask_BN, torch.zeros(B, 3, dtype=torch.bool)], dim=1),
        votes_BNLE=torch.cat([neighbours.votes_BNLE, torch.randn(B, 3, L, E) * 50], dim=1),
    )
    assert torch.allclose(gate(x_SD, padded).logits_SE, gate(x_SD, neighbours).logits_SE, atol=1e-6)


def test_a_sequence_depends_on_itself_and_its_own_neighbours_alone(
    gate: Gate, x_SD: Tensor, neighbours: Neighbours
) -> None:
    want = gate(x_SD, neighbours).logits_SE[T : 2 * T]
    alone = gate(x_SD[T : 2 * T], neighbours.rows([1])).logits_SE
    assert torch.allclose(alone, want, atol=1e-6)
    padding = gate(torch.cat([x_SD[T : 2 * T], torch.randn(3, 16) * 50]), neighbours.rows([1])).logits_SE
    assert torch.allclose(padding[:T], want, atol=1e-6)


def test_several_sequences_share_the_neighbours_of_one_question(
    gate: Gate, x_SD: Tensor, neighbours: Neighbours
) -> None:
    two = neighbours.rows([0, 2])
    each = neighbours.rows([0, 0, 2, 2])
    x_SD = torch.randn(4 * T, 16)
    assert torch.allclose(gate(x_SD, two).logits_SE, gate(x_SD, each).logits_SE, atol=1e-6)


@pytest.mark.parametrize("name", ["memory", "retrieval+memory"])
def test_the_token_alone_can_learn_what_the_neighbours_vote(name: str) -> None:
    """A question's share of the cross-entropy, by hand; then, taught, the gate routes alike without neighbours."""
    torch.manual_seed(1)
    settings = replace(SETTINGS, layer=1, vote_start=4.0)
    gate = gate_class(name)(settings)
    votes_BNLE = torch.zeros(2, 2, 2, E)
    votes_BNLE[0, :, 1, 0] = 1.0  # unanimous
    votes_BNLE[1, 0, 1, 2] = 1.0  # the other neighbour speaks for nobody
    found = Neighbours(
        torch.randn(2, 2, settings.neighbour_width), torch.zeros(2, 2), torch.ones(2, 2).bool(), votes_BNLE=votes_BNLE
    )
    kinds = torch.randn(2, settings.width)
    x_SD = kinds.repeat_interleave(3, dim=0).requires_grad_()
    log_SE = gate.token(x_SD).log_softmax(dim=1)
    want = torch.cat([-log_SE[:3, 0], -0.5 * log_SE[3:, 2]])
    torch.testing.assert_close(gate.train()(x_SD, found).missed_S, want)
    assert gate.eval()(x_SD, found).missed_S is None and gate.train()(x_SD).missed_S is None
    optimiser = torch.optim.Adam(gate.token.parameters(), lr=0.1)
    for _ in range(50):
        gate(x_SD, found).missed_S.mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    assert x_SD.grad is None
    assert gate.eval()(x_SD).experts_SK[:, 0].tolist() == [0, 0, 0, 2, 2, 2]
    # Who is held back is voted for in vain.
    gate.train().set_available(torch.arange(E) != 0)
    missed_S = gate(x_SD, found).missed_S
    assert not missed_S[:3].any() and missed_S.isfinite().all()
    gate.set_available(torch.zeros(E).bool())
    assert not gate(x_SD, found).missed_S.any()


@pytest.mark.parametrize("name", ["retrieval", "retrieval+memory"])
def test_retrieval_gate_against_a_loop(name: str, gate: Gate, x_SD: Tensor, neighbours: Neighbours) -> None:
    logits_SE = gate.logits(x_SD, neighbours)
    look = gate.attention
    for s in range(B * T):
        b = s // T
        query_A = look.query.weight @ x_SD[s]
        scores, values, votes = [query_A @ look.null_key / 8**0.5], [torch.zeros(8)], [torch.zeros(E)]
        for n in range(N):
            if neighbours.mask_BN[b, n]:
                embedding_R = neighbours.embeddings_BNR[b, n] * 12**0.5
                bias = look.score_scale[0] * neighbours.scores_BN[b, n]
                scores.append(query_A @ look.key.weight @ embedding_R / 8**0.5 + bias)
                values.append(look.value.weight @ embedding_R)
                votes.append(neighbours.votes_BNLE[b, n, 1])
        attention_N1 = torch.stack(scores).softmax(dim=0).unsqueeze(1)
        want_E = gate.token.weight @ x_SD[s] + gate.context.weight @ (attention_N1 * torch.stack(values)).sum(dim=0)
        if name == "retrieval+memory":
            want_E = want_E + 10 * gate.vote_scale * (attention_N1 * torch.stack(votes)).sum(dim=0)
        assert torch.allclose(logits_SE[s], want_E, atol=1e-5)


@pytest.mark.parametrize("name", ["pooled"])
def test_pooled_gate_against_a_loop(gate: Gate, x_SD: Tensor, neighbours: Neighbours) -> None:
    logits_SE = gate.logits(x_SD, neighbours)
    for b in range(B):
        have = [n for n in range(N) if neighbours.mask_BN[b, n]]
        weights = (neighbours.scores_BN[b, have] / 0.1).softmax(dim=0)
        mean_R = (weights.unsqueeze(1) * neighbours.embeddings_BNR[b, have]).sum(dim=0)
        want_TE = token_part(gate, x_SD[b * T : (b + 1) * T]) + gate.context.weight @ (mean_R * 12**0.5)
        assert torch.allclose(logits_SE[b * T : (b + 1) * T], want_TE, atol=1e-5)


@pytest.mark.parametrize("name", ["memory"])
def test_memory_gate_against_a_loop(gate: Gate, x_SD: Tensor, neighbours: Neighbours) -> None:
    logits_SE = gate.logits(x_SD, neighbours)
    for b in range(B):
        have = [n for n in range(N) if neighbours.mask_BN[b, n]]
        weights = (neighbours.scores_BN[b, have] / 0.1).softmax(dim=0)
        votes_E = (weights.unsqueeze(1) * neighbours.votes_BNLE[b, have, 1]).sum(dim=0)
        want_TE = token_part(gate, x_SD[b * T : (b + 1) * T]) + 10 * gate.vote_scale * votes_E
        assert torch.allclose(logits_SE[b * T : (b + 1) * T], want_TE, atol=1e-5)


@pytest.mark.parametrize("name", ["clusters"])
def test_cluster_gate_against_a_loop(gate: Gate, x_SD: Tensor, neighbours: Neighbours) -> None:
    logits_SE = gate.logits(x_SD, neighbours)
    for b in range(B):
        have = [n for n in range(N) if neighbours.mask_BN[b, n]]
        weights = (neighbours.scores_BN[b, have] / 0.1).softmax(dim=0)
        votes_E = torch.zeros(E)
        for n, weight in zip(have, weights, strict=True):
            distance_E = (gate.centroids - neighbours.embeddings_BNR[b, n]).norm(dim=1)
            votes_E[distance_E.argmin()] += weight
        want_TE = token_part(gate, x_SD[b * T : (b + 1) * T]) + 10 * gate.vote_scale * votes_E
        assert torch.allclose(logits_SE[b * T : (b + 1) * T], want_TE, atol=1e-5)


def test_no_neighbour_votes_before_there_are_clusters(x_SD: Tensor, neighbours: Neighbours) -> None:
    gate = gate_class("clusters")(replace(SETTINGS, vote_start=4.0))
    assert not gate.is_ready
    assert torch.equal(gate(x_SD, neighbours).logits_SE, token_part(gate, x_SD))


@pytest.mark.parametrize("name", ["memory", "retrieval+memory"])
def test_neighbours_that_do_not_vote_are_refused(gate: Gate, x_SD: Tensor, neighbours: Neighbours) -> None:
    with pytest.raises(ModelError, match="carry no votes") as caught:
        gate(x_SD, replace(neighbours, votes_BNLE=None))
    assert "model.recall" in str(caught.value.hint)
    with pytest.raises(ModelError, match="vote for 4 experts in 3 layers; expected 5"):
        gate(x_SD, replace(neighbours, votes_BNLE=torch.rand(B, N, L, 4)))
    with pytest.raises(ModelError, match="5 experts in 1 layers"):
        gate(x_SD, replace(neighbours, votes_BNLE=torch.rand(B, N, 1, E)))


def test_gradients_reach_every_parameter_and_stay_finite(gate: Gate, x_SD: Tensor, neighbours: Neighbours) -> None:
    some = neighbours.masked(torch.tensor([[True], [False], [True]]).expand(B, N))
    gate(x_SD.requires_grad_(), some).logits_SE.square().sum().backward()
    assert x_SD.grad.isfinite().all()
    for name, parameter in gate.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_gradients_reach_the_context_at_step_0(name: str, x_SD: Tensor, neighbours: Neighbours) -> None:
    gate = gate_class(name)(SETTINGS)
    if name == "clusters":
        gate.centroids.normal_()
    gate(x_SD, neighbours).weights_SK[:, 0].sum().backward()
    late = [p for at, p in gate.named_parameters() if at in ("context.weight", "vote_scale")]
    assert late and all(parameter.grad.any() for parameter in late)


@pytest.mark.parametrize("of_memory", ["memory", "retrieval+memory"])
def test_votes_may_count_from_the_start(of_memory: str, x_SD: Tensor, neighbours: Neighbours) -> None:
    gate = gate_class(of_memory)(replace(SETTINGS, vote_start=3.0))
    all_for_one = torch.zeros(B, N, L, E)
    all_for_one[..., 1] = 1.0
    voted = replace(neighbours, mask_BN=torch.ones(B, N, dtype=torch.bool), votes_BNLE=all_for_one)
    gained_SE = gate(x_SD, voted).logits_SE - token_part(gate, x_SD)
    # The null neighbour takes its share of the attention where there is one.
    assert (gained_SE[:, 1] > 1.0).all() and (gained_SE[:, 1] < 3.0 + 1e-5).all()
    if of_memory == "memory":
        torch.testing.assert_close(gained_SE[:, 1], torch.full_like(gained_SE[:, 1], 3.0))
    assert not gained_SE[:, [at for at in range(E) if at != 1]].any()
