"""Losses of a routing: pure, masked, of one layer at a time (pooling layers lets their imbalances cancel).

S tokens, E experts, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragmoe.gates.routing import Routing


def load_balance_loss(routing: Routing, mask_S: Tensor) -> Tensor:
    """Switch's load balance: ``E * sum_e f_e p_e``, 1.0 when balanced, up to E when one expert takes all.

    ``f_e`` is the share of choices that fell on expert e (no gradient), ``p_e`` its mean probability.
    Source: Fedus et al. 2021, equation 4, with the choices of all K slots counted.

    Args:
        mask_S: bool, False for padding, which counts nowhere.
    """
    E, K = routing.logits_SE.shape[1], routing.experts_SK.shape[1]
    kept_S = mask_S.to(routing.logits_SE.dtype)
    tokens = kept_S.sum().clamp(min=1)
    load_E = (routing.choices_SE() * kept_S.unsqueeze(1)).sum(dim=0) / (tokens * K)
    # Where no expert is available the softmax of -inf is NaN.
    probability_SE = routing.logits_SE.softmax(dim=-1).masked_fill(routing.logits_SE.isneginf(), 0.0)
    probability_E = (probability_SE * kept_S.unsqueeze(1)).sum(dim=0) / tokens
    return E * (load_E * probability_E).sum()


def z_loss(routing: Routing, mask_S: Tensor) -> Tensor:
    """The router z-loss: mean squared log of the softmax's denominator, which keeps the logits small.

    Source: Zoph et al. 2022 (ST-MoE), equation 5.

    Args:
        mask_S: bool, False for padding, which counts nowhere.
    """
    log_S = torch.logsumexp(routing.logits_SE, dim=-1)
    # Where no expert is available the sum is zero and its logarithm -inf.
    squared_S = log_S.masked_fill(log_S.isneginf(), 0.0).square()
    kept_S = mask_S.to(squared_S.dtype)
    return (squared_S * kept_S).sum() / kept_S.sum().clamp(min=1)
