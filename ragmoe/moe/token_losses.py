"""Losses that are means over tokens: no token's part depends on which others are in the batch.

S tokens, E experts, K experts a token, D model width.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ragmoe._errors import ModelError
from ragmoe.gates.base import gate_class
from ragmoe.gates.routing import Routing
from ragmoe.moe.losses import LossInputs, RoutingLoss, register_loss
from ragmoe.moe.probe import serving

# A chosen expert is to be at least twice as likely under the question's own neighbours as under another's.
_MARGIN = math.log(2)
# Outputs with a root mean square below this count as shorter than one. A feed-forward network's are around one half;
# those of an expert that has just begun are tiny, and their direction would otherwise have an enormous gradient.
_QUIET = 0.01


class TokenLoss(RoutingLoss):
    """The mean over tokens of ``loss_S``."""

    per_token = True

    @abstractmethod
    def loss_S(self, inputs: LossInputs) -> Tensor:
        """Each token's part, padding included, where it may be anything finite."""

    def sums(self, inputs: LossInputs) -> Tensor:
        loss_S = self.loss_S(inputs)
        return (loss_S * inputs.mask_S.to(loss_S.dtype)).sum()

    def value(self, sums: Tensor, tokens: Tensor) -> Tensor:
        return sums / tokens


@register_loss("z")
class Z(TokenLoss):
    """The router z-loss: mean squared log of the softmax's denominator, which keeps the logits small."""

    summary = "keeps the logits small, and so training stable; on by default"
    source = "Zoph et al. 2022 (ST-MoE), equation 5"

    def loss_S(self, inputs: LossInputs) -> Tensor:
        log_S = torch.logsumexp(inputs.routing.logits_SE, dim=-1)
        # Where no expert is available the sum is zero and its logarithm -inf.
        return log_S.masked_fill(log_S.isneginf(), 0.0).square()


@register_loss("votes")
class Votes(TokenLoss):
    """The cross-entropy, in nats, of what the gate would choose by the token alone to what the neighbours vote.

    It teaches the part of the gate that sees the token alone, which then routes alike where nothing is found. The token
    states it leaves as they are (to make them tell the domain costs what they are for), and what the votes are worth
    beside it is learned elsewhere. Tokens of questions whose neighbours vote for nothing count 0.
    """

    summary = "teaches the token state to choose as the votes do, for where nothing is found; needs a gate with votes"
    source = "knowledge distillation (Hinton et al. 2015), from the votes to the token gate"
    needs_votes = True

    def check(self, config: Any) -> None:
        if not gate_class(config.gate).counts_votes:
            raise ModelError(
                f"the loss 'votes' teaches what the neighbours vote, and the gate {config.gate!r} counts no votes",
                hint="model.gate=memory",
            )

    def loss_S(self, inputs: LossInputs) -> Tensor:
        routing = inputs.routing
        # Without neighbours, and outside training, nothing is voted.
        return routing.logits_SE.new_zeros(len(routing.logits_SE)) if routing.missed_S is None else routing.missed_S


@register_loss("diversity")
class Diversity(TokenLoss):
    """The mean over pairs of a token's experts of the squared cosine of their outputs: 0 orthogonal, 1 parallel.

    The outputs are each expert's own, before weights; for experts beside a dense network (LoRA experts, a shared
    expert), what they add to it. Parameters would be cheaper to compare, but tell nothing: with its hidden units in
    another order a network is another point and the same function. Tokens with fewer than two different experts
    count 0. Copies that are exactly equal have no gradient: it is noise (``expert_noise``) that tells them apart first.

    Its cost is that of the layers' experts once more, and of the dense network where there is one, while training.
    """

    summary = "keeps the experts of a token from answering alike; costs their forward and backward once more"
    source = "squared cosine for the projections of Guo et al. 2025 (Advancing Expert Specialization)"
    needs_outputs = True

    def check(self, config: Any) -> None:
        if config.top_k < 2:
            raise ModelError(
                f"the loss 'diversity' compares the experts of a token, but top_k is {config.top_k}: expected 2 or more"
            )

    def loss_S(self, inputs: LossInputs) -> Tensor:
        probe = inputs.routing.probe
        if probe is None or probe.outputs_SKD is None:
            raise ModelError("the loss 'diversity' needs the outputs of each expert, and the routing has none")
        S, K, D = probe.outputs_SKD.shape
        E = inputs.routing.logits_SE.shape[1]
        served_SK = serving(inputs.routing)
        unit_SKD = F.normalize(probe.outputs_SKD.to(inputs.routing.logits_SE.dtype), dim=-1, eps=_QUIET * math.sqrt(D))
        total_S, pairs_S = unit_SKD.new_zeros(S), unit_SKD.new_zeros(S)
        for j, k in combinations(range(K), 2):
            counts_S = (served_SK[:, j] != served_SK[:, k]) & (served_SK[:, j] < E) & (served_SK[:, k] < E)
            total_S = total_S + (unit_SKD[:, j] * unit_SKD[:, k]).sum(dim=-1).square() * counts_S
            pairs_S = pairs_S + counts_S
        return total_S / pairs_S.clamp(min=1)


@register_loss("context")
class Context(TokenLoss):
    """A hinge on how much likelier the chosen experts are under a question's own neighbours than under another's.

    ``max(0, ln 2 - mean_k (log p(e_k | own) - log p(e_k | other)))`` in nats, for the experts e_k that the token has
    chosen: ln 2 where the gate ignores the neighbours, 0 where they make its choices twice as likely. A distance of
    both distributions would have no gradient where they are alike, which is where a gate starts.

    Tokens count 0 whose question, or the other one, has no neighbours to compare. The other question is one of the same
    optimiser step (see ``ragmoe.moe.probe.swap``), however the step is cut; on several ranks one of the same rank's.
    """

    summary = "makes the gate heed the neighbours, where it routes by the token alone; needs a gate that sees them"
    source = "the hinge of Hadsell et al. 2006, on the log-probabilities of the choices"
    needs_swapped = True

    def check(self, config: Any) -> None:
        if not gate_class(config.gate).uses_neighbours:
            raise ModelError(
                f"the loss 'context' teaches a gate to heed the neighbours, and the gate {config.gate!r} sees none"
            )

    def loss_S(self, inputs: LossInputs) -> Tensor:
        routing, probe = inputs.routing, inputs.routing.probe
        if probe is None or probe.swapped is None:
            raise ModelError("the loss 'context' compares two questions' neighbours, and the batch has none")
        own_SE, other_SE, compared_S = probe.swapped
        E = routing.logits_SE.shape[1]
        closed_SE = own_SE.isneginf() | other_SE.isneginf()
        gap_SE = _log_softmax(own_SE, closed_SE) - _log_softmax(other_SE, closed_SE)
        place_SK = routing.experts_SK.clamp(max=E - 1)
        chosen_SK = (routing.experts_SK < E) & ~closed_SE.gather(1, place_SK)
        gap_S = (gap_SE.gather(1, place_SK) * chosen_SK).sum(dim=1) / chosen_SK.sum(dim=1).clamp(min=1)
        return F.relu(_MARGIN - gap_S) * (compared_S & chosen_SK.any(dim=1))


def z_loss(routing: Routing, mask_S: Tensor) -> Tensor:
    """``z`` of a batch that is a whole step; ``mask_S`` is bool, False for padding."""
    return Z()(LossInputs(routing, mask_S))


def _log_softmax(logits_SE: Tensor, closed_SE: Tensor) -> Tensor:
    # The logarithm is -inf for an expert that is not available, and NaN where none is.
    return logits_SE.log_softmax(dim=-1).masked_fill(closed_SE, 0.0)
