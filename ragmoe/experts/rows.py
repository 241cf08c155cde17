"""Rows of pairs of token and expert: from the order of tokens to that of experts, and back.

S tokens, E experts, K experts a token, P = S*K pairs (pair s*K + k is the k-th choice of token s).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Dispatch(NamedTuple):
    """Pairs of token and expert, sorted by expert, as grouped matrix products want them.

    Attributes:
        order_P: sorted position -> pair.
        back_P: pair -> sorted position.
        offsets_E: int32, the end of each expert's rows; pairs that nobody serves come after the last.
    """

    order_P: Tensor
    back_P: Tensor
    offsets_E: Tensor


def dispatch(experts_SK: Tensor, experts: int) -> Dispatch:
    """Sort the pairs of a routing by expert (stable, so that the result does not depend on chance)."""
    flat_P = experts_SK.reshape(-1)
    order_P = flat_P.argsort(stable=True)
    back_P = torch.empty_like(order_P)
    back_P[order_P] = torch.arange(order_P.numel(), device=order_P.device)
    # Not bincount, which on a GPU waits for the largest value before it knows how long its result is.
    pairs_E = torch.zeros(experts + 1, dtype=torch.int64, device=flat_P.device)
    offsets_E = pairs_E.scatter_add_(0, flat_P, torch.ones_like(flat_P))[:experts].cumsum(0).to(torch.int32)
    return Dispatch(order_P, back_P, offsets_E)


class _PermuteRows(torch.autograd.Function):
    """Rows in another order. The gradient is a gather as well, where indexing would scatter and add."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, order_P: Tensor, back_P: Tensor) -> Tensor:
        ctx.save_for_backward(order_P, back_P)
        return x_PD.index_select(0, order_P)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        order_P, back_P = ctx.saved_tensors
        # Through the same function, so that second derivatives exist.
        return permute_rows(gradients[0], back_P, order_P), None, None


def permute_rows(x_PD: Tensor, order_P: Tensor, back_P: Tensor) -> Tensor:
    """``x_PD[order_P]`` for a permutation and its inverse."""
    return _PermuteRows.apply(x_PD, order_P, back_P)


class Pairs:
    """Moves rows of pairs, where every pair is served."""

    def __init__(self, rows: Dispatch) -> None:
        self.order_P, self.back_P, self.offsets_E = rows

    def to_experts(self, x_PD: Tensor) -> Tensor:
        """Rows of tokens, sorted by expert."""
        return permute_rows(x_PD, self.order_P, self.back_P)

    def to_tokens(self, x_PD: Tensor) -> Tensor:
        """Rows of experts, in the order of the tokens."""
        return permute_rows(x_PD, self.back_P, self.order_P)


class PartialPairs(Pairs):
    """The same where some are not: they stay behind, and come back as zeros."""

    def __init__(self, rows: Dispatch) -> None:
        super().__init__(rows)
        self.pairs = rows.order_P.numel()
        self.order_P = rows.order_P[: int(rows.offsets_E[-1])]

    def to_experts(self, x_PD: Tensor) -> Tensor:
        return x_PD.index_select(0, self.order_P)

    def to_tokens(self, x_PD: Tensor) -> Tensor:
        return x_PD.new_zeros(self.pairs, x_PD.shape[1]).index_copy(0, self.order_P, x_PD)


def pairs_of(experts_SK: Tensor, experts: int, *, partial: bool) -> Pairs:
    """The pairs of a routing; ``partial`` where slots may be empty (E)."""
    rows = dispatch(experts_SK, experts)
    return PartialPairs(rows) if partial else Pairs(rows)
