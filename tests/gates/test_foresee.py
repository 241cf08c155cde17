"""What gates expect of neighbours before any token is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ragmoe import ModelError, Neighbours
from ragmoe.gates import Gate, GateSettings, gate_class

B, N, L, E, D, R = 2, 3, 2, 4, 6, 5


def trained(name: str, **changes: float) -> Gate:
    settings = GateSettings(width=D, experts=E, top_k=2, neighbour_width=R, attention_width=8, layer=1, **changes)
    gate = gate_class(name)(settings)
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    if name == "clusters":
        gate.centroids.normal_()
    return gate


@pytest.fixture
def neighbours() -> Neighbours:
    mask_BN = torch.tensor([[True, True, True], [True, False, False]])
    embeddings_BNR = F.normalize(torch.randn(B, N, R), dim=-1) * mask_BN.unsqueeze(-1)
    votes_BNLE = torch.rand(B, N, L, E).softmax(dim=-1) * mask_BN[..., None, None]
    return Neighbours(embeddings_BNR, torch.rand(B, N) * mask_BN, mask_BN, [], votes_BNLE)


def mean_vote(neighbours: Neighbours) -> Tensor:
    """Question by question, neighbour by neighbour."""
    rows = []
    for b in range(B):
        kept = neighbours.mask_BN[b]
        share = (neighbours.scores_BN[b][kept] / 0.1).softmax(dim=0)
        rows.append((share.unsqueeze(1) * neighbours.votes_BNLE[b, kept, 1]).sum(dim=0))
    return torch.stack(rows)


def test_gates_with_memory_expect_the_votes(neighbours: Neighbours) -> None:
    gate = trained("memory")
    votes_BE = 10 * gate.vote_scale * mean_vote(neighbours)
    assert torch.allclose(gate.foresee(neighbours), votes_BE, atol=1e-5)
    state_D = torch.randn(D)
    assert torch.allclose(gate.foresee(neighbours, state_D), votes_BE + gate.token.weight @ state_D, atol=1e-5)


@pytest.mark.parametrize("name", ["retrieval", "pooled", "memory", "retrieval+memory", "clusters"])
def test_they_expect_what_they_then_say_of_such_a_token(name: str, neighbours: Neighbours) -> None:
    """Under noise and dropout too, which are the training's; the bias counts, for it moves the choice."""
    gate = trained(name, noise=3.0, token_dropout=0.9)
    gate.balance_bias.copy_(torch.tensor([1.0, 0.0, -1.0, 0.0]))
    for state_D in (torch.zeros(D), torch.randn(D)):
        said = gate.eval()(state_D.expand(B, D), neighbours).logits_SE + gate.balance_bias
        assert torch.allclose(gate.train().foresee(neighbours, state_D), said, atol=1e-5)
    assert not gate.foresee(neighbours).requires_grad


def test_who_can_tell_nothing(neighbours: Neighbours) -> None:
    assert trained("token").foresee(neighbours) is None
    assert trained("retrieval").foresee(Neighbours.empty(B, R)) is None


def test_experts_that_are_not_available(neighbours: Neighbours) -> None:
    gate = trained("retrieval")
    gate.set_available(torch.tensor([True, False, True, True]))
    assert gate.foresee(neighbours).isneginf().tolist() == [[False, True, False, False]] * B


def test_neighbours_of_another_encoder(neighbours: Neighbours) -> None:
    wide = Neighbours(torch.zeros(B, N, R + 1), neighbours.scores_BN, neighbours.mask_BN)
    with pytest.raises(ModelError, match="embeddings are 6 wide, but the gate reads 5"):
        trained("retrieval").foresee(wide)
