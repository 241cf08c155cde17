"""The plainest kernel: expert after expert, and each token's choices summed in their order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def one_by_one(
    x_SD: Tensor, experts_SK: Tensor, weights_SK: Tensor, experts: int, answer: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """The weighted answers of the chosen experts, y_SD.

    Summed in the order of the choices, as in the other kernels: the numbers that experts have change nothing.

    Args:
        experts: E, which stands in slots that nobody serves.
        answer: of one expert to some tokens.
    """
    S, K = experts_SK.shape
    experts_P, weights_P = experts_SK.reshape(-1), weights_SK.reshape(-1)
    pairs, answers = [experts_P[:0]], [x_SD[:0]]
    for expert in experts_P.unique().tolist():
        if expert == experts:
            continue
        pairs_p = (experts_P == expert).nonzero().flatten()
        pairs.append(pairs_p)
        answers.append(answer(x_SD[pairs_p // K], expert) * weights_P[pairs_p].unsqueeze(1))
    y_PD = x_SD.new_zeros(S * K, x_SD.shape[1])
    return y_PD.index_copy(0, torch.cat(pairs), torch.cat(answers)).view(S, K, x_SD.shape[1]).sum(dim=1)
