"""Gates with expert memory: the neighbours vote for the experts that have served questions about them.

Each passage of an index carries how much it speaks for each expert: at first for its domain's expert or for none,
after ``ragmoe index annotate`` for those that were routed to when questions about it were answered.
S tokens of B questions, N neighbours, L sparse layers, E experts, A attention width.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ragmoe._errors import ModelError
from ragmoe.gates.attention import weigh
from ragmoe.gates.base import Gate, GateSettings, register_gate
from ragmoe.gates.retrieval import RetrievalGate
from ragmoe.gates.token import TokenGate
from ragmoe.neighbours import Neighbours

# A learned scale moves by about one learning rate a step. Gates learn with rates around 1e-3, and a vote counts for
# nothing before it is worth a few units of logit: so one unit of the parameter is worth ten.
_UNIT = 10.0
# As in the pooled gate.
TEMPERATURE = 0.1


class VotingGate(TokenGate):
    """``logits = W_t x + s v``, with ``v`` what the neighbours vote, weighted by the softmax of their scores.

    Wherever there are no neighbours, or none of them votes, it is the token gate; at step 0 too, for the learned scale
    ``s`` starts at zero unless ``vote_start`` says otherwise.
    """

    uses_neighbours = True
    counts_votes = True

    def __init__(self, settings: GateSettings) -> None:
        super().__init__(settings)
        self.vote_scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.constant_(self.vote_scale, self.settings.vote_start / _UNIT)

    @abstractmethod
    def votes(self, neighbours: Neighbours) -> Tensor:
        """What each neighbour votes, float32 (B, N, E), summing to one over E, or to zero where it votes for none."""

    def logits(self, x_SD: Tensor, neighbours: Neighbours | None) -> Tensor:
        logits_SE = super().logits(x_SD, neighbours)
        if neighbours is None:
            return logits_SE
        scaled_BE = (_UNIT * self.vote_scale * heard(self, neighbours)).to(x_SD.dtype)
        return logits_SE + scaled_BE.repeat_interleave(x_SD.shape[0] // len(neighbours), dim=0)

    def missed(self, x_SD: Tensor, neighbours: Neighbours) -> Tensor:
        return missed(self, x_SD, neighbours)


@register_gate("memory")
class MemoryGate(VotingGate):
    """The votes are those that the passages of an index carry (``Neighbours.votes_BNLE``)."""

    uses_votes = True
    summary = "token state plus the votes of the neighbours for the experts that have served them"

    def votes(self, neighbours: Neighbours) -> Tensor:
        return recorded_votes(self, neighbours)


@register_gate("retrieval+memory")
class RetrievalMemoryGate(RetrievalGate):
    """``logits = W_t x + W_c c + s v``: context and votes, both weighted by each token's own attention."""

    uses_votes = True
    summary = "the retrieval gate, with the votes of the neighbours that each token attends to"

    def __init__(self, settings: GateSettings) -> None:
        super().__init__(settings)
        self.vote_scale = nn.Parameter(torch.full((1,), settings.vote_start / _UNIT))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        # The base class resets before this class has made its own.
        if hasattr(self, "vote_scale"):
            init.constant_(self.vote_scale, self.settings.vote_start / _UNIT)

    def logits(self, x_SD: Tensor, neighbours: Neighbours | None) -> Tensor:
        logits_SE = self.token(x_SD)
        if neighbours is None:
            return logits_SE
        prepared = neighbours.prepared(self.settings.layer)
        found_SV = self.attention(x_SD, neighbours, self.votes(neighbours), prepared)
        context_SA, votes_SE = found_SV.split([self.attention.width, self.settings.experts], dim=-1)
        return logits_SE + self.context(context_SA) + _UNIT * self.vote_scale * votes_SE

    def votes(self, neighbours: Neighbours) -> Tensor:
        return recorded_votes(self, neighbours)

    def missed(self, x_SD: Tensor, neighbours: Neighbours) -> Tensor:
        return missed(self, x_SD, neighbours)


def heard(gate: VotingGate | RetrievalMemoryGate, neighbours: Neighbours) -> Tensor:
    """What the neighbours of each question vote, weighted by the softmax of their scores, float32 (B, E)."""
    return torch.einsum("bn,bne->be", weigh(neighbours, TEMPERATURE).float(), gate.votes(neighbours).float())


def missed(gate: VotingGate | RetrievalMemoryGate, x_SD: Tensor, neighbours: Neighbours) -> Tensor:
    """The cross-entropy of the token's own choice to the votes, float32 (S,), without a gradient to the token states.

    Votes for nothing count nothing, and so do those for experts that are held back.
    """
    if gate.none_available:
        return x_SD.new_zeros(len(x_SD), dtype=torch.float32)
    votes_BE = heard(gate, neighbours).masked_fill(~gate.available, 0.0)
    log_SE = gate.token(x_SD.detach()).float().masked_fill(~gate.available, -torch.inf).log_softmax(dim=-1)
    votes_SE = votes_BE.repeat_interleave(len(x_SD) // len(neighbours), dim=0)
    return -(votes_SE * log_SE.masked_fill(votes_SE == 0, 0.0)).sum(dim=-1)


def recorded_votes(gate: Gate, neighbours: Neighbours) -> Tensor:
    """The votes that neighbours carry for a gate's own layer, float32 (B, N, E).

    Raises:
        ModelError: the neighbours carry none, or for other experts.
    """
    settings = gate.settings
    if neighbours.votes_BNLE is None:
        if neighbours.mask_BN.any():
            raise ModelError(
                "the gate has expert memory, but the neighbours carry no votes",
                hint="bring them with model.recall(neighbours, index)",
            )
        return neighbours.scores_BN.new_zeros(*neighbours.mask_BN.shape, settings.experts)
    L, E = neighbours.votes_BNLE.shape[2:]
    if settings.experts != E or settings.layer >= L:
        raise ModelError(f"the neighbours vote for {E} experts in {L} layers; expected {settings.experts} experts")
    return neighbours.votes_BNLE[:, :, settings.layer]
