"""A routing with everything that any loss could ask for, made from its logits alone, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from ragmoe.gates import Routing
from ragmoe.moe import LossInputs
from ragmoe.moe.probe import Probe, Swapped


def everything(S: int) -> Tensor:
    return torch.ones(S, dtype=torch.bool)


def routing(logits_SE: Tensor, K: int) -> Routing:
    weights_SK, experts_SK = logits_SE.softmax(dim=1).topk(K)
    return Routing(weights_SK, experts_SK, logits_SE)


def inputs(logits_SE: Tensor, K: int = 2, mask_S: Tensor | None = None, experts_SK: Tensor | None = None) -> LossInputs:
    """The choices are the K best logits, or as given; a token's domain comes from what it has chosen."""
    S, E = logits_SE.shape
    if experts_SK is None:
        experts_SK = logits_SE.detach().topk(K).indices
    # What is held back is -inf, and so are its neighbours' logits and nothing else.
    finite_SE = logits_SE.masked_fill(logits_SE.isneginf(), 0.0)
    place_SK = experts_SK.clamp(max=E - 1)
    weights_SK = finite_SE.gather(1, place_SK).sigmoid().masked_fill(experts_SK == E, 0.0)
    other_SE = (finite_SE * 0.6 + torch.arange(E) * 0.3).masked_fill(logits_SE.isneginf(), -torch.inf)
    compared_S = experts_SK[:, 0] != 0
    turned = torch.arange(1, experts_SK.shape[1] + 1, dtype=logits_SE.dtype).view(1, -1, 1)
    outputs_SKD = (finite_SE.unsqueeze(1) * turned + turned).sin()
    return LossInputs(
        Routing(
            weights_SK,
            experts_SK,
            logits_SE,
            load_SE=finite_SE.sigmoid(),
            probe=Probe(Swapped(logits_SE, other_SE, compared_S), outputs_SKD),
            missed_S=-finite_SE.log_softmax(dim=1)[:, 0],
        ),
        everything(S) if mask_S is None else mask_S,
        experts_SK[:, -1].clamp(max=E - 1) % 3 - 1,
    )
