"""Rows of pairs of token and expert: from the tokens to the experts that serve them, and back.

Every row is gathered, forward and backward, where indexing would scatter and add row by row on one core.
S tokens, E experts, K experts a token, P pairs that are served (pair s*K + k is the k-th choice of token s), D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


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


def grouped_product(x_PD: Tensor, weight_EDH: Tensor, offsets_E: Tensor) -> Tensor:
    """``x W_e`` of each row by its expert, (P, H): torch's own, or where that cannot, the way around of transformers.

    It cannot while compiling in anything but bfloat16, nor in widths whose rows are no multiple of 16 bytes.
    """
    if torch.compiler.is_compiling():
        around = x_PD.dtype != torch.bfloat16
    else:
        # The gradient of the result is as wide as the result.
        around = any(width * x_PD.element_size() % 16 for width in weight_EDH.shape[1:])
    if around:
        return torch.ops.transformers.grouped_mm_fallback(x_PD, weight_EDH, offs=offsets_E)
    return F.grouped_mm(x_PD, weight_EDH, offs=offsets_E)


class Pairs:
    """The pairs of a routing that are served, sorted by expert, and what is done with their rows.

    Args:
        experts_SK: int64; E in a slot that nobody serves.
        partial: whether there may be such slots. They get no row, and add nothing.

    Attributes:
        offsets_E: int32, the end of each expert's rows.
    """

    def __init__(self, experts_SK: Tensor, experts: int, *, partial: bool) -> None:
        order_P, back_P, self.offsets_E = dispatch(experts_SK, experts)
        if partial:
            served = int(self.offsets_E[-1])
            order_P, back_P = order_P[:served], back_P.clamp(max=served)
        self._token_P = order_P.div(experts_SK.shape[1], rounding_mode="floor")
        self._order_P, self._place_SK = order_P, back_P.view_as(experts_SK)

    def rows_of(self, pairs_p: Tensor) -> Tensor:
        """Where the rows of some pairs are."""
        return self._place_SK.reshape(-1)[pairs_p]

    def gather(self, x_SD: Tensor) -> Tensor:
        """The token's row for each pair: (P, D)."""
        return _Gather.apply(x_SD, self._token_P, self._place_SK)

    def combine(self, y_PD: Tensor, weights_SK: Tensor) -> Tensor:
        """The weighted sum of each token's rows, (S, D) in their dtype, added up in float32 or better."""
        return _Combine.apply(y_PD, weights_SK.to(y_PD.dtype), self._token_P, self._order_P, self._place_SK)

    def blend(self, y_PD: Tensor, weights_SK: Tensor) -> Tensor:
        """``combine`` for weights that sum to one and slots that are all served, exactly the row where all are alike.

        It is the first row and the weighed differences of the others to it, so the first weight is never looked at.
        """
        weights_SK = weights_SK.to(y_PD.dtype)
        return _Blend.apply(y_PD, weights_SK, self._token_P, self._order_P, self._place_SK)

    def combine_changes(self, y_PD: Tensor, x_SD: Tensor, weights_SK: Tensor) -> Tensor:
        """``combine`` of what each pair's row is more than its token's, exactly zero where it is the same."""
        weights_SK = weights_SK.to(y_PD.dtype)
        return _CombineChanges.apply(y_PD, x_SD, weights_SK, self._token_P, self._order_P, self._place_SK)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, token_P: Tensor, place_SK: Tensor) -> Tensor:
        ctx.save_for_backward(place_SK)
        return x_SD.index_select(0, token_P)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (place_SK,) = ctx.saved_tensors
        return _sum(gradients[0], place_SK, None), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_PD: Tensor, weights_SK: Tensor, token_P: Tensor, order_P: Tensor, place_SK: Tensor
    ) -> Tensor:
        ctx.save_for_backward(y_PD, weights_SK, token_P, order_P)
        return _sum(y_PD, place_SK, weights_SK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *_combine_backward(gradients[0], *ctx.saved_tensors), None, None, None


class _Blend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_PD: Tensor, weights_SK: Tensor, token_P: Tensor, order_P: Tensor, place_SK: Tensor
    ) -> Tensor:
        ctx.save_for_backward(y_PD, weights_SK, token_P, order_P)
        first_SD, *others = (y_PD.index_select(0, place_S) for place_S in place_SK.unbind(1))
        if len(others) == 1:
            return torch.lerp(first_SD, others[0], weights_SK[:, 1:], out=first_SD)
        mixed_SD = first_SD.clone()
        for other_SD, weight_S in zip(others, weights_SK[:, 1:].unbind(1), strict=True):
            mixed_SD.addcmul_(other_SD.sub_(first_SD), weight_S.unsqueeze(1))
        return mixed_SD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        y_PD, weights_SK, token_P, order_P = ctx.saved_tensors
        kept_SK = torch.cat([1 - weights_SK[:, 1:].sum(dim=1, keepdim=True), weights_SK[:, 1:]], dim=1)
        grad_y_PD, grad_SK = _combine_backward(gradients[0], y_PD, kept_SK, token_P, order_P)
        return grad_y_PD, grad_SK - grad_SK[:, :1], None, None, None


class _CombineChanges(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_PD: Tensor, x_SD: Tensor, weights_SK: Tensor, token_P: Tensor, order_P: Tensor, place_SK: Tensor
    ) -> Tensor:
        change_PD = x_SD.index_select(0, token_P).to(y_PD.dtype)
        torch.sub(y_PD, change_PD, out=change_PD)
        ctx.save_for_backward(change_PD, y_PD, x_SD, weights_SK, token_P, order_P)
        return _sum(change_PD, place_SK, weights_SK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_SD,) = gradients
        change_PD, y_PD, x_SD, weights_SK, token_P, order_P = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Second derivatives have to know where it comes from.
            change_PD = y_PD - x_SD.index_select(0, token_P)
        flat_P = weights_SK.reshape(-1)
        served_P = torch.zeros_like(flat_P).index_copy(0, order_P, flat_P[order_P])
        grad_x_SD = -(grad_SD * served_P.view_as(weights_SK).sum(dim=1, keepdim=True)).to(x_SD.dtype)
        grad_y_PD, grad_weights_SK = _combine_backward(grad_SD, change_PD, weights_SK, token_P, order_P)
        return grad_y_PD, grad_x_SD, grad_weights_SK, None, None, None


def _combine_backward(
    grad_SD: Tensor, y_PD: Tensor, weights_SK: Tensor, token_P: Tensor, order_P: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of rows and weights, of differentiable operations, so that second derivatives exist."""
    grad_PD, flat_P = grad_SD.index_select(0, token_P), weights_SK.reshape(-1)
    grad_weights_P = torch.zeros_like(flat_P).index_copy(0, order_P, torch.linalg.vecdot(grad_PD, y_PD))
    share_P1 = flat_P[order_P].unsqueeze(1)
    # In place but where second derivatives are wanted: it is the largest tensor there is.
    grad_y_PD = grad_PD * share_P1 if torch.is_grad_enabled() else grad_PD.mul_(share_P1)
    return grad_y_PD, grad_weights_P.view_as(weights_SK)


def weighted_sum(y_SKD: Tensor, weights_SK: Tensor) -> Tensor:
    """``Pairs.combine`` of rows that lie in the order of the choices, to the last bit."""
    place_SK = torch.arange(weights_SK.numel(), device=y_SKD.device).view(weights_SK.shape)
    return _sum(y_SKD.flatten(0, 1), place_SK, weights_SK.to(y_SKD.dtype))


def _sum(y_PD: Tensor, place_SK: Tensor, weights_SK: Tensor | None) -> Tensor:
    """The (weighted) sum of each token's rows; those past the last are zero."""
    if y_PD.shape[0] < place_SK.numel():
        y_PD = F.pad(y_PD, (0, 0, 0, 1))
    return F.embedding_bag(place_SK, y_PD, mode="sum", per_sample_weights=weights_SK)
